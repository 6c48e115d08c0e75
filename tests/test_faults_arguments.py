"""Public functions meet any numbers: a result as documented, or one clear line."""

import math
from fractions import Fraction
from typing import get_args

import hypothesis.strategies as st
import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tiny import Tiny

import attnviz
from attnviz import cam, colors, gap, labels, localize, metrics, probes
from attnviz.explain import excitation_backprop, scorecam, stage_maps
from attnviz.instances import find_instances
from attnviz.memory import AttentionMemory, place
from attnviz.probes import masks, saliency

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.uint8, torch.int64, torch.bool)
SPECIAL = (0.0, 1.0, -1.0, 8.0, 1e-6, -1e-6)
WILD = (math.nan, math.inf, -math.inf)
ODD_NUMBERS = st.sampled_from((math.nan, math.inf, -1, 0, 1.5, "a", None, 10**30, [1], True))

settings.register_profile(
    "faults", derandomize=True, deadline=None, max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
few = settings(settings.get_profile("faults"))


@pytest.fixture(autouse=True, scope="module")
def _untyped():
    # users run without type checks
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@st.composite
def tensors(draw, *sides, dtypes=FLOATS, wild=False, low=-8.0):
    """Numbers of every kind; a side is its length, or the least and the most."""
    shape = [draw(st.integers(*side)) if isinstance(side, tuple) else side for side in sides]
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator) * (8 - low) + low
    values[torch.rand(shape, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))] = 0
    for special in draw(st.lists(st.sampled_from(WILD if wild else SPECIAL), max_size=2)):
        if values.numel():
            place = torch.randint(values.numel(), (1,), generator=generator)
            values.view(-1)[place] = max(special, low) if special == special else special
    dtype = draw(st.sampled_from(dtypes))
    return (values.nan_to_num(0, 0, 0) if not dtype.is_floating_point else values).to(dtype)


def _answer(function, *arguments, **named):
    """The result, or None where the arguments are refused in one clear line."""
    try:
        return function(*arguments, **named)
    except (ValueError, TypeError, KeyError) as error:
        said = str(error.args[0])
        assert said.startswith("expected "), said
        assert said.isprintable()
        assert len(said) < 400
        return None


def _between(values, low, high):
    values = torch.as_tensor(np.asarray(values) if not torch.is_tensor(values) else values)
    assert ((values >= low) & (values <= high)).all(), values  # NaN is neither


# ------------------------------------------------------------------------------------------ cam


@few
@given(tensors((0, 2), (0, 3), (1, 5), (1, 5)), st.sampled_from(sorted(cam.METHODS)))
def test_maps_of_finite_numbers_are_finite(activation, name):
    gradient = activation.flip(-1) - 1
    found = cam.METHODS[name](activation.relu(), gradient)
    b, _, h, w = activation.shape
    assert (found.shape, found.dtype) == ((b, h, w), activation.dtype)
    _between(found, -math.inf if name == "cam" else 0, math.inf)
    assert not cam.METHODS[name](activation.relu(), torch.zeros_like(gradient)).any()


@few
@given(tensors((0, 3), (1, 5), (1, 5)))
def test_normalized_and_scaled_maps_keep_their_range(maps):
    _between(cam.normalize(maps), 0, 1)
    for scaling in ("none", "tanh", "sqrt", "tan"):
        _between(cam.scale(maps, scaling), 0, math.tan(1) * 1.01 if scaling == "tan" else 1)


@few
@given(
    tensors(2, (0, 5), (0, 5), dtypes=FLOATS + OTHERS, wild=True),
    st.sampled_from([None, (3, 4), (1, 1), (0, 2), (2.5, 3), ("a", 2), 7, (3,), (-1, 5)]),
    ODD_NUMBERS,
)
def test_fusion_says_what_it_cannot_fuse(maps, size, gamma):
    found = _answer(cam.fuse, [maps, maps], gamma, size)
    if found is not None:
        assert found.shape == (2, *(size or maps.shape[1:]))
        _between(found, 0, 1)


# ------------------------------------------------------------------------------------- localize


@few
@given(
    tensors((0, 6), (0, 6), dtypes=FLOATS + OTHERS, wild=True),
    st.sampled_from(get_args(localize.Rule)),
    st.sampled_from([0, 0.15, 0.5, 0.999, 1, -0.1, math.nan, "a", None]),
    st.sampled_from([None, (7, 9), (1, 1), (0, 4), (3, "a"), 5]),
)
def test_boxes_lie_inside_the_picture(map, rule, threshold, size):
    box = _answer(localize.map_to_box, map, threshold, rule, size=size)
    if box is not None:
        height, width = size or map.shape
        assert 0 <= box[0] <= box[2] <= width
        assert 0 <= box[1] <= box[3] <= height
        swept = localize.sweep_boxes(map, np.array([threshold]), rule, size=size)[0]
        assert rule == "rect" or swept.tolist() == [list(box)]
    whole = _answer(localize.eight_bit, map, size)
    assert whole is None or (whole.shape, whole.dtype) == (tuple(size or map.shape), np.uint8)
    if size is None and rule == "component" and map.numel():
        boxes = _answer(localize.component_boxes, map, threshold)
        assert boxes is None or boxes[:1] == ([] if box is None else [box])


@few
@given(tensors((0, 6), (0, 6), dtypes=FLOATS + OTHERS, wild=True), ODD_NUMBERS, ODD_NUMBERS)
def test_peaks_lie_in_the_map(map, window, at_least):
    for odd in ({"window": window}, {"at_least": at_least}, {}):
        found = _answer(localize.peaks, map, **odd)
        if found is not None:
            assert found.shape[1] == 2
            assert (found < map.shape).all()


@few
@given(
    tensors((1, 8), (1, 8), dtypes=FLOATS + OTHERS, wild=True),
    st.sampled_from([np.uint8, np.float64, np.int64]), st.sampled_from([(3,), (4,), ()]),
    st.sampled_from([localize.grabcut, localize.simonyan]),
)  # fmt: skip
def test_cuts_are_masks_of_the_picture(map, dtype, channels, cut):
    image = (np.arange(map.numel() * math.prod(channels)) * 37 % 255).astype(dtype)
    found = _answer(cut, image.reshape(*map.shape, *channels), map)
    if found is not None:
        assert (found.shape, found.dtype, dtype) == (map.shape, bool, np.uint8)


# -------------------------------------------------------------------------------------- metrics


@few
@given(tensors((0, 6), (0, 4), wild=True), st.integers(0, 999))
def test_average_precision_is_a_share_or_nan_without_an_image(scores, seed):
    targets = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    found = _answer(metrics.average_precision, scores, targets.to(scores))
    if found is not None:
        assert found.isnan().tolist() == (~targets.any(dim=0)).tolist()
        _between(found.nan_to_num(0), 0, 1 + 1e-9)


@few
@given(
    st.lists(st.one_of(st.none(), st.tuples(*[st.sampled_from((0, 1, 2.5, 7, *WILD))] * 4))),
    st.sampled_from(["half_open", "plus_one"]),
)
def test_overlaps_are_shares(boxes, convention):
    found = _answer(metrics.box_ious, boxes, boxes, convention)
    if found is not None:
        assert found.shape == (len(boxes),) * 2
        _between(found, 0, 1)


@few
@given(
    tensors((0, 4), (0, 3), wild=True),
    st.lists(st.sampled_from((0, 1, 2, -1, 7)), max_size=4),
)
def test_ranks_are_places(scores, class_ids):
    found = _answer(metrics.class_ranks, scores, class_ids)
    if found is not None:
        assert len(found) == len(scores) == len(class_ids)
        assert len(found) == 0 or 0 <= found.min() <= found.max() < scores.shape[1]


@few
@given(
    st.lists(st.sampled_from((0.0, 1.0, 0.5)), max_size=5).map(np.array),
    ODD_NUMBERS, st.sampled_from((0, 1, 50, -1, 2.5, "a")),
)  # fmt: skip
def test_intervals_hold_their_order(values, level, resamples):
    for odd in ({"level": level}, {"resamples": resamples}):
        found = _answer(metrics.bootstrap_interval, values, **odd)
        assert found is None or values.min() <= found[0] <= found[1] <= values.max()


@few
@given(st.integers(0, 3), st.integers(0, 4), st.sampled_from([0, 1, 3, -1, 2.5]))
def test_shares_of_right_boxes_are_shares(images, thresholds, count):
    ious = np.linspace(0, 1, images * thresholds).reshape(images, thresholds)
    counts = metrics.sweep_counts(ious)
    for found in (
        _answer(metrics.max_box_acc, counts, count), _answer(metrics.max_box_acc_v2, counts, count)
    ):  # fmt: skip
        assert found is None or np.all((found >= 0) & (found <= 1))
    place = _answer(metrics.choose_threshold, ious)
    assert place is None or place < thresholds
    held = _answer(metrics.held_out_hits, ious, np.arange(images) % 2 == 0)
    assert held is None or held[0] < thresholds
    sizes, truths = [(5, 7)] * images, [[(0, 0, 3, 3)]] * images
    table = _answer(metrics.localization_baselines, sizes, truths, np.arange(images) % 2 == 0)
    assert table is None or table["score"].between(0, 1).all()


@few
@given(tensors((0, 3), (1, 5), (1, 5), low=0), st.integers(0, 999), st.sampled_from((0, 0.5, 1)))
def test_recall_and_noise_are_shares(maps, seed, threshold):
    masks = torch.rand(maps.shape, generator=torch.Generator().manual_seed(seed)) > 0.6
    recall, noise = metrics.recall_noise(maps, masks, threshold)
    assert recall.isnan().tolist() == (~masks.flatten(1).any(dim=1)).tolist()
    assert noise.isnan().tolist() == (~maps.flatten(1).any(dim=1)).tolist()
    _between(torch.cat([recall, noise]).nan_to_num(0), 0, 1)
    for map, mask in zip(maps, masks):
        swept = metrics.sweep_region_ious(map, mask, np.array([0, 0.5, 1.0]))
        _between(np.nan_to_num(swept), 0, 1)


@few
@given(
    st.sampled_from([torch.uint8, torch.int16, torch.int64]),
    st.lists(st.sampled_from((0, 1, 2, 120, 255)), max_size=6),
    st.sampled_from([1, 3, 121, 256, 300, 0, -1, 2.5]),
    st.sampled_from([255, -1, 1]),
)
def test_confusions_count_what_counts(dtype, classes, count, ignored):
    found = torch.tensor(classes).to(dtype)
    matrix = _answer(metrics.confusion_matrix, found, found.flip(0), count, ignored)
    if matrix is not None:
        assert matrix.shape == (count, count)
        assert int(matrix.sum()) == sum(each != ignored for each in classes)
        _between(metrics.class_ious(matrix).nan_to_num(0), 0, 1)


# --------------------------------------------------------------------------------------- labels


IMAGES = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 3)).map(
    lambda drawn: np.random.default_rng(drawn[2]).integers(
        0, (1, 2, 256, 256)[drawn[2]], (*drawn[:2], 3), dtype=np.uint8
    )
)


@few
@given(IMAGES, st.sampled_from(["slic", "felzenszwalb", "mcg"]), ODD_NUMBERS)
def test_regions_are_numbered_without_a_gap(image, method, count):
    for found in (
        _answer(labels.superpixels, image, method, count), _answer(labels.superpixels, image)
    ):  # fmt: skip
        assert found is None or np.array_equal(np.unique(found), np.arange(found.max() + 1))


@few
@given(tensors((0, 3), (1, 7), (1, 7), wild=True), st.integers(1, 5))
def test_means_and_labels_of_regions_are_those_of_any_precision(maps, size):
    regions = np.arange(maps[0].numel() if len(maps) else 1) // size
    regions = regions.reshape(maps.shape[1:]) if len(maps) else np.zeros(maps.shape[1:], int)
    means = labels.superpixel_mean(maps, regions)
    assert (means.shape, means.dtype) == (maps.shape, maps.dtype)
    found = _answer(labels.superpixel_labels, maps, regions)
    assert (found is None) == (not maps.isfinite().all())
    assert found is None or (found.shape == regions.shape and found.max() <= len(maps))


@few
@given(
    tensors((0, 3), (1, 7), (1, 7), wild=True), st.sampled_from(["affinity", "constant", "x"]),
    st.booleans(), ODD_NUMBERS,
)  # fmt: skip
def test_labels_are_classes_background_or_left_out(maps, rule, salient, odd):
    saliency = torch.rand(maps.shape[1:], generator=torch.Generator().manual_seed(0))
    found = _answer(labels.saliency_labels, maps, saliency if salient else None, rule=rule)
    if found is not None:
        assert (found.shape, found.dtype) == (maps.shape[1:], np.uint8)
        assert np.isin(found, [*range(1 + len(maps)), 255]).all()
    share = _answer(labels.background, maps.nan_to_num(0, 0, 0).clamp(0, 1), rule, odd)
    assert share is None or share.shape == maps.shape[1:]


@few
@given(IMAGES)
def test_saliency_is_from_0_to_1(image):
    found = _answer(labels.detect_saliency, image)
    if found is not None:
        assert found.shape == image.shape[:2]
        _between(found, 0, 1)


@few
@given(IMAGES, tensors((0, 3), (1, 4), (1, 4), dtypes=FLOATS, wild=True, low=0), st.booleans())
def test_a_random_field_gives_probabilities(image, scores, fits):
    if fits:
        image = np.resize(image, (*scores.shape[1:], 3))
    found = _answer(labels.dense_crf, image, scores)
    if found is not None:
        assert (found.shape, found.dtype) == (scores.shape, scores.dtype)
        _between(found.float().sum(dim=0), 0.97, 1.03)


@few
@given(st.sampled_from(["iterations", "w_smooth", "s_smooth", "w_color", "s_color"]), ODD_NUMBERS)
def test_a_random_field_of_odd_numbers_is_refused(name, value):
    numbers = {"iterations": 1} | dict.fromkeys(
        ("w_smooth", "s_smooth", "w_color", "s_space", "s_color"), 3
    )
    _answer(labels.CRF, **{**numbers, name: value})


# --------------------------------------------------------------------------------------- memory


@few
@given(
    tensors((0, 4), (0, 4), dtypes=FLOATS + OTHERS, wild=True, low=-1), st.booleans(),
    st.sampled_from(["float16", "uint8"]),
)  # fmt: skip
def test_a_memory_holds_shares_and_refuses_other_maps(map, halved, dtype):
    memory = AttentionMemory({"a": (2, 3)}, {"a": [1]}, run_id="r", dtype=dtype)
    map = map.clamp(0, 1) if halved and map.dtype.is_floating_point else map
    if _answer(memory.update, "a", 1, map):
        assert map.shape == (2, 3)
    _answer(memory.fill, "a", 1, map)
    _between(memory["a", 1], 0, 1)


@few
@given(
    st.sampled_from([(2, 3), (0, 3), (70_000, 1), (2,), 2, (2.5, 3), ("a", 1), None]),
    st.sampled_from([[1], [], [1, 1], [-1], [2**40], ["a"], 3, [1.5]]),
    st.sampled_from(["r", 7, ""]),
)
def test_a_memory_is_made_of_grids_and_classes(grid, classes, run_id):
    memory = _answer(AttentionMemory, {"a": grid}, {"a": classes}, run_id=run_id)
    assert memory is None or memory.class_ids("a") == tuple(classes)
    assert memory is None or memory.grid("a") == grid


@few
@given(
    tensors((1, 4), (1, 4)), st.tuples(*[st.sampled_from((-0.5, 0, 0.3, 1, 1.4, math.nan))] * 4),
    st.booleans(), st.sampled_from([None, (3, 5), (1, 1), (0, 2), (2.5, 1)]),
)  # fmt: skip
def test_what_is_placed_stays_between_its_values(map, box, flipped, grid):
    found = _answer(place, map, box, flipped, grid)
    if found is not None:
        placed, valid = found
        assert placed.shape == valid.shape == (grid or map.shape)
        assert not placed[~valid].any()
        slack = 0.05 * (1 + map.abs().max())
        _between(placed, min(0, map.min()) - slack, max(0, map.max()) + slack)


# --------------------------------------------------------------------------------------- colors


@few
@given(
    tensors((0, 5), (0, 5), dtypes=(torch.float16, torch.float32, torch.float64), wild=True),
    ODD_NUMBERS, st.sampled_from(colors.PALETTES), st.booleans(),
)  # fmt: skip
def test_colors_are_bytes(map, opacity, name, fits):
    image = np.full((*(map.shape if fits else (2, 9)), 3), 200, np.uint8)
    for found in (
        _answer(colors.colorize, map.numpy(), name),
        _answer(colors.overlay, image, map.numpy(), palette=name),
        _answer(colors.overlay, image, map.numpy(), opacity=opacity, palette=name),
    ):
        assert found is None or (found.shape, found.dtype) == ((*map.shape, 3), np.uint8)


# ------------------------------------------------------------------------------------------ gap


@few
@given(tensors((0, 4), (1, 5), (1, 5)), st.sampled_from(["AA", "MA", "AG", "MG"]))
def test_contributions_and_shares_are_finite(activation, score):
    maps = gap.attention(activation, activation.flip(-1))
    for values in (gap.contributions(maps), gap.channel_scores(activation, maps, score)):
        assert (values.shape, values.dtype) == (activation.shape[:1], activation.dtype)
        assert values.isfinite().all()
        shares = gap.shares(values)
        _between(shares, 0, 1)
        total = float(shares.float().sum())
        assert total == pytest.approx(1, abs=0.02) if (values > 0).any() else total == 0
        kept = gap.suppress(maps, values)
        assert set(kept) <= set(values.nonzero()[:, 0].tolist())
    for map in maps:
        row, column = gap.peak(map)
        assert map[row, column] == map.max()


def test_channels_are_suppressed_alike_in_every_precision():
    # half of them share 60 of 100 columns: bfloat16 counts pixels to 256 only
    maps = torch.zeros(2, 40, 100)
    maps[0, :, :80], maps[1, :, :89] = 1, 1
    weights = torch.tensor([2.0, 1.0])
    kept = [gap.suppress(maps.to(dtype), weights.to(dtype), 0.8995) for dtype in FLOATS]
    assert kept == [kept[-1]] * 4


# ------------------------------------------------------------------------------ explain, probes


@pytest.fixture(scope="module")
def net():
    return attnviz.staged(Tiny())


ANY = (*FLOATS, torch.uint8, torch.int64)
PICTURES = st.one_of(
    tensors((1, 2), 3, (4, 12), (4, 12), dtypes=(torch.float32,), low=-3),
    tensors((1, 2), 3, (4, 12), (4, 12), dtypes=(torch.float32,), low=-3, wild=True),
    tensors((0, 2), (2, 4), (0, 12), (0, 12), dtypes=ANY, wild=True, low=-3),
)
CLASSES = st.sampled_from(
    [None, 1, 9, -1, [0, 1], [[0, 1]], [[0, 1], [2]], [], [[]], "a", 1.5, [None], math.nan, {3}]
)


@few
@given(
    images=PICTURES, class_ids=CLASSES, stages=st.sampled_from([None, [1], [3, 1], [0], [9], []])
)
def test_maps_of_any_picture_are_finite_or_refused(net, images, class_ids, stages):
    for made in (
        _answer(stage_maps, net, images, class_ids, tuple(cam.METHODS), stages=stages),
        _answer(scorecam, net, images, class_ids, stages=stages, channels=2),
        _answer(excitation_backprop, net, images, class_ids, stages=stages),
    ):
        for method in made or ():
            for map in made[method]:
                assert len(map) == len(images)
                assert map.isfinite().all()


@few
@given(
    images=PICTURES, maps=tensors((0, 2), (1, 6), (1, 6), wild=True),
    threshold=st.sampled_from([0.7, 1, 0, -1, math.nan, "a"]),
    fill=st.sampled_from(["mean", "grey", "black", "blur", "x"]),
)  # fmt: skip
def test_probes_of_any_picture_are_finite_or_refused(net, images, maps, threshold, fill):
    covered = _answer(probes.occlude, net, images, maps, threshold, fill)
    assert covered is None or covered.shape == images.shape
    table = _answer(probes.occlusion_table, net, images, [1] * len(images), maps, threshold, fill)
    if table is not None:
        _answer(probes.occlusion_scores, table)
    curves = _answer(probes.deletion_curves, net, images, None, maps, steps=2, fill="mean")
    if curves is not None:
        _between(torch.cat([curves.deletion, curves.insertion]), 0, 1)
    drops = _answer(probes.average_drop, net, images, None, maps)
    assert drops is None or drops["drop"].between(0, 1).all()
    _answer(probes.gradient_variance, net, images, None)


WAYS = {  # to attribute a decision to pixels, with as few passes as may be, and odd arguments
    masks.sliding_occlusion: ({}, ("size", "stride", "batch_size")),
    masks.rise: ({"masks": 3}, ("masks", "grid", "keep", "batch_size", "seed")),
    masks.lime: (
        {"samples": 3, "regions": 2},
        ("regions", "samples", "width", "ridge", "batch_size", "seed"),
    ),
    masks.meaningful_perturbation: (
        {"steps": 2, "grid": 2}, ("grid", "steps", "area", "smoothness", "seed")
    ),
    saliency.smoothgrad: ({"samples": 2}, ("samples", "noise")),
    saliency.integrated_gradients: ({"steps": 2}, ("steps",)),
}  # fmt: skip


@few
@given(images=PICTURES, class_ids=CLASSES)
def test_attribution_to_pixels_is_finite_or_refused(net, images, class_ids):
    plain = (saliency.gradient, saliency.deeplift, saliency.guided_backprop, saliency.deconvnet)
    options = {way: {} for way in plain} | {way: named for way, (named, _) in WAYS.items()}
    for way, named in options.items():
        found = _answer(way, net, images, class_ids, **named)
        if found is not None:
            assert found.shape in (images.shape, (len(images), *images.shape[2:]))
            assert found.isfinite().all()
    found = _answer(masks.prediction_difference, net, images, images.flip(2), class_ids)
    assert found is None or found.isfinite().all()


@few
@given(number=ODD_NUMBERS.filter(lambda number: number != 10**30))
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_attribution_with_odd_numbers_is_finite_or_refused(net, way, number):
    images = torch.linspace(-2, 2, 3 * 64).reshape(1, 3, 8, 8)
    options, names = WAYS[way]
    for name in names:
        found = _answer(way, net, images, None, **options | {name: number})
        assert found is None or found.isfinite().all()


def test_a_network_that_is_not_cut_is_named(net):
    images, maps = torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8)
    calls = {
        stage_maps: (images,), scorecam: (images,), excitation_backprop: (images,),
        attnviz.evidence: (images, 1), find_instances: (images,),
        probes.deletion_curves: (images, 1, maps), probes.gradient_variance: (images,),
        probes.occlude: (images, maps), saliency.deconvnet: (images,),
    } | dict.fromkeys(WAYS, (images,))  # fmt: skip
    for call, arguments in calls.items():
        message = "expected a network from attnviz.staged .* got Tiny; attnviz.staged"
        with pytest.raises(TypeError, match=message):
            call(net.model, *arguments)


@pytest.mark.parametrize(
    "call", [stage_maps, scorecam, excitation_backprop, probes.gradient_variance, *WAYS]
)
@pytest.mark.parametrize(
    "image", [None, "cat.jpg", np.zeros((1, 3, 8, 8)), [torch.zeros(3, 8, 8)]]
)
def test_what_is_no_tensor_is_named(net, call, image):
    with pytest.raises(TypeError, match=r"expected images as a tensor \(b, c, h, w\), got"):
        call(net, image)


def test_numbers_of_numpy_and_fractions_count(net):
    images = torch.linspace(-2, 2, 3 * 64).reshape(1, 3, 8, 8)
    for way, (options, _) in WAYS.items():
        odd = {name: np.int64(value) for name, value in options.items()}
        odd |= {"seed": np.int64(0)} if "seed" in WAYS[way][1] else {}
        odd |= {"batch_size": np.int64(2)} if "batch_size" in WAYS[way][1] else {}
        torch.testing.assert_close(way(net, images, 1, **odd), way(net, images, 1, **options))
    half = masks.rise(net, images, 1, masks=3, keep=Fraction(1, 2))
    assert torch.equal(half, masks.rise(net, images, 1, masks=3))


@few
@given(
    value=st.sampled_from((
        None, 1.5, "a", True, [None], ["x"], [1.7], 4.0, np.ones((2, 3)), torch.ones(2, 3), {1: 2},
        math.nan, Fraction(1, 3),
    )),
)  # fmt: skip
def test_any_argument_is_answered_or_refused_in_a_short_line(net, value):
    images = torch.linspace(-2, 2, 3 * 64).reshape(1, 3, 8, 8)
    maps = torch.ones(1, 8, 8)
    for function, arguments, names in (
        (stage_maps, (images,), ("class_ids", "methods", "stages", "gradient_at", "precision")),
        (scorecam, (images,), ("class_ids", "stages", "form", "batch_size", "channels")),
        (probes.deletion_curves, (images, 1), ("maps",)),
        (probes.deletion_curves, (images, 1, maps), ("steps", "fill", "canvas", "batch_size")),
        (probes.occlude, (images, maps), ("threshold", "fill")),
        (probes.occlude, (images,), ("maps",)),
        (probes.occlusion_table, (images,), ("class_ids",)),
        (saliency.deeplift, (images,), ("class_ids", "baseline")),
        (saliency.smoothgrad, (images,), ("generator", "samples", "noise")),
    ):
        for name in names:
            named = {name: value}
            if function is saliency.smoothgrad and name != "samples":
                named["samples"] = 2
            if function is probes.occlusion_table:
                named["maps"] = maps
            _answer(function, net, *arguments, **named)
    model = Tiny()
    for name in ("cuts", "image_size", "mean", "std", "class_names", "multilabel"):
        _answer(attnviz.staged, model, **{name: value})
    for function in (net.class_id, net.check_stages):
        _answer(function, value)
    _answer(cam.fuse, [maps.numpy(), value])
    _answer(cam.scale, maps, "tanh", value)
