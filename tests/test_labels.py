import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from attnviz.labels import (
    CRF,
    CRF_PRESETS,
    background,
    dense_crf,
    detect_saliency,
    saliency_labels,
    superpixel_labels,
    superpixel_mean,
    superpixels,
)


@pytest.fixture
def two_halves():
    # Red left of column 23, blue right of it, with noise; taller than wide.
    random = np.random.default_rng(0)
    image = np.zeros((70, 40, 3), np.uint8)
    image[:, :23, 0], image[:, 23:, 2] = 200, 200
    return np.clip(image + random.integers(0, 12, image.shape), 0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------- superpixels


@pytest.mark.parametrize("method", ["slic", "felzenszwalb"])
def test_superpixels_number_every_pixel_without_a_gap_and_keep_to_edges(two_halves, method):
    regions = superpixels(two_halves, method, count=30)
    assert regions.shape == (70, 40)
    assert set(regions.ravel()) == set(range(regions.max() + 1))
    assert not set(regions[:, :23].ravel()) & set(regions[:, 23:].ravel())


@pytest.mark.parametrize("method", ["slic", "felzenszwalb"])
def test_a_larger_count_gives_more_superpixels(method):
    y, x = np.mgrid[:64, :80]
    waves = np.stack([np.sin(y / 5), np.sin(x / 6), np.sin((x + y) / 9)], axis=2)
    image = (127 + 120 * waves).astype(np.uint8)
    few, many = (superpixels(image, method, n).max() for n in (10, 200))
    assert few < many


def test_superpixels_are_refused_by_an_unknown_method(two_halves, untyped):
    with pytest.raises(ValueError, match=r"`method` in \('slic', 'felzenszwalb'\), got 'mcg'"):
        superpixels(two_halves, "mcg")
    with pytest.raises(ValueError, match="`count` of at least 1, got 0"):
        superpixels(two_halves, count=0)


MAPS, WHITE = torch.ones(1, 6, 8), np.full((6, 8, 3), 255, np.uint8)
NOT_TAKEN = {
    "a picture of floats": (detect_saliency, (WHITE / 255,), "of uint8, got float64; attnviz.im"),
    "a tensor": (superpixels, (torch.from_numpy(WHITE),), "array of uint8, got Tensor; attnviz"),
    "a grey picture": (superpixels, (WHITE[..., 0],), r"of shape \(h, w, 3\), got \(6, 8\)"),
    "floats in a field": (dense_crf, (WHITE / 255, MAPS), "picture of uint8, got float64"),
    "an array": (dense_crf, (WHITE, MAPS.numpy()), "`probabilities` as a tensor, got ndarray; "),
    "one label": (dense_crf, (WHITE, MAPS[0]), r"of shape \(k, h, w\), got \(6, 8\)"),
    "below 0": (dense_crf, (WHITE, -MAPS), "probabilities of at least 0, got -1; a softmax"),
    "a map": (saliency_labels, (MAPS[0],), r"`maps` of shape \(k, h, w\), got \(6, 8\)"),
    "maps in an array": (saliency_labels, (MAPS.numpy(),), "`maps` as a tensor, got ndarray; tor"),
    "whole numbers": (saliency_labels, (MAPS.long(),), "`maps` of floats, got torch.int64; call"),
    "a saliency": (saliency_labels, (MAPS, WHITE[..., 0]), "`saliency` as a tensor, got ndarray"),
    "two of them": (saliency_labels, (MAPS, MAPS), r"`saliency` of shape \(h, w\), got \(1, 6, 8"),
    "regions below 0": (superpixel_labels, (MAPS, -np.ones((6, 8), int)), "from 0, got -1"),
    "parts": (superpixel_labels, (MAPS, np.ones((6, 8))), "array of whole numbers, got float64;"),
    "a list": (superpixel_mean, (MAPS, [[0]]), "array of whole numbers, got list; attnviz.labels"),
    "a text": (superpixel_labels, (MAPS, np.zeros((6, 8), int), "a"), "`background` as a number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_TAKEN)
def test_what_is_no_picture_map_or_region_is_refused_in_one_line(kind, untyped):
    function, arguments, message = NOT_TAKEN[kind]
    with pytest.raises((TypeError, ValueError), match=f"^expected .*{message}"):
        function(*arguments)


def slow_superpixel_labels(maps, regions, background):
    # Eq. 3.11 pixel by pixel.
    height, width = regions.shape
    labels = np.zeros((height, width), int)
    for y in range(height):
        for x in range(width):
            members = [
                (i, j)
                for i in range(height)
                for j in range(width)
                if regions[i, j] == regions[y, x]
            ]
            scores = []
            for map in maps:
                peak = max(v for row in map for v in row)
                values = [map[i][j] / peak if peak > 0 else 0.0 for i, j in members]
                scores.append(sum(values) / len(values))
            best = max(range(len(scores)), key=lambda c: scores[c])
            labels[y, x] = 0 if scores[best] < background else 1 + best
    return labels


@pytest.mark.parametrize("background", [0.2, 0.3, 0.4])
def test_superpixel_labels_are_equation_3_11(generator, background):
    maps = torch.rand(3, 9, 7, generator=generator, dtype=torch.float64) ** 2
    maps[2] *= 40  # a unit has no influence
    regions = np.random.default_rng(2).integers(0, 9, (9, 7))
    found = superpixel_labels(maps, regions, background)
    assert found.dtype == np.uint8
    wanted = slow_superpixel_labels(maps.tolist(), regions, background)
    assert len(np.unique(wanted)) > 2
    np.testing.assert_array_equal(found, wanted)


def test_a_superpixel_exactly_at_the_background_threshold_is_an_object():
    maps = torch.tensor([[[1.0, 0.0, 0.25, 0.25]]], dtype=torch.float64)
    labels = superpixel_labels(maps, np.array([[0, 0, 1, 1]]), background=0.25)
    assert labels.tolist() == [[1, 1, 1, 1]]


def test_superpixel_means_keep_the_sum_and_do_nothing_twice(generator):
    maps = torch.rand(2, 12, 5, generator=generator, dtype=torch.float64)
    regions = np.arange(60).reshape(12, 5) // 7
    once = superpixel_mean(maps, regions)
    torch.testing.assert_close(once.sum(dim=(1, 2)), maps.sum(dim=(1, 2)))
    torch.testing.assert_close(superpixel_mean(once, regions), once)
    assert {len(np.unique(once[0].numpy()[regions == r].round(12))) for r in range(9)} == {1}


def test_superpixels_of_single_pixels_change_no_map(generator):
    maps = torch.rand(2, 4, 5, generator=generator)
    assert torch.equal(superpixel_mean(maps, np.arange(20).reshape(4, 5)), maps)


def test_an_image_without_classes_is_background_in_every_superpixel():
    labels = superpixel_labels(torch.zeros(0, 3, 4), np.zeros((3, 4), int))
    assert labels.tolist() == [[0] * 4] * 3


# ------------------------------------------------------------------------------ saliency labels

# One pixel for each rule of the released pseudo labels, in a row. The last two pixels stretch
# both maps to [0, 1] and are 1 + class by rule 2.
TRUTH = [
    # map 1, map 2, saliency: label, reason
    (0.60, 0.10, 0.70, 1, "the larger map wins against 1 - saliency"),
    (0.10, 0.60, 0.70, 2, "the other one"),
    (0.40, 0.10, 0.10, 0, "1 - saliency wins where nothing is salient"),
    (0.29, 0.20, 0.80, 255, "all below the floor: background, yet salient"),
    (0.31, 0.20, 0.80, 1, "just above the floor"),
    (0.29, 0.20, 0.60, 255, "1 - saliency is above the floor and wins, yet salient"),
    (0.20, 0.20, 31 / 255, 0, "just not salient"),
    (0.20, 0.20, 32 / 255, 255, "just salient"),
    (0.92, 0.91, 1.00, 255, "two maps above the conflict threshold"),
    (0.92, 0.90, 1.00, 1, "only one of them above"),
    (0.95, 0.10, 0.05, 255, "map and background conflict"),
    (0.81, 0.10, 0.05, 255, "background where a map is strong"),
    (0.80, 0.10, 0.05, 0, "background where a map is not quite strong"),
    (0.50, 0.50, 0.50, 255, "three equal: background first, then salient"),
    (0.50, 0.50, 0.60, 1, "two equal maps: the first"),
    (1.00, 0.00, 1.00, 1, "top of map 1, bottom of map 2"),
    (0.00, 1.00, 1.00, 2, "top of map 2, bottom of map 1"),
]


def truth_rows():
    rows = torch.tensor([row[:3] for row in TRUTH], dtype=torch.float64)
    return rows[:, :2].T[:, None], rows[:, 2][None], [row[3] for row in TRUTH]


@pytest.mark.parametrize("unit", [1.0, 256.0, 2**-20])
def test_each_rule_of_the_released_pseudo_labels_decides_its_pixel(unit):
    maps, saliency, wanted = truth_rows()
    found = saliency_labels(maps * unit, saliency)[0].tolist()
    assert [row for row, label in zip(TRUTH, found) if label != row[3]] == []
    assert found == wanted


def test_the_order_of_the_rules_decides_where_several_apply():
    # 1 and 2 before 4: dropped to background, so salient counts. 3 before 4: a conflict stays
    # 255 even where the background would not. 5 last: pixels ignored before are no objects.
    maps = torch.zeros(1, 10, 20, dtype=torch.float64)
    maps[0, 0, 0] = 1.0
    saliency = torch.zeros(10, 20, dtype=torch.float64)
    assert (saliency_labels(maps, saliency) == 255).all()  # the only object pixel is a conflict
    saliency[0, 0] = 1.0
    assert (saliency_labels(maps, saliency) == 255).all()  # 1 of 200 pixels is too few
    maps[0, 0, 1] = saliency[0, 1] = 1.0
    found = saliency_labels(maps, saliency)  # 2 of 200 are just enough
    assert found[0, :2].tolist() == [1, 1]
    assert (found.ravel()[2:] == 0).all()
    assert (saliency_labels(maps, saliency, least=0.011) == 255).all()


@pytest.mark.parametrize(
    ("changed", "pixel", "label"),
    [
        ({"floor": 0.32}, (0.31, 0.2, 0.8), 255),
        ({"conflict": 0.94}, (0.92, 0.91, 1.0), 1),
        ({"salient": 0.3}, (0.2, 0.2, 0.25), 0),
        ({"strong": 0.85}, (0.81, 0.1, 0.05), 0),
    ],
)
def test_each_threshold_moves_its_rule(changed, pixel, label):
    tops = [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
    rows = torch.tensor([pixel, *tops], dtype=torch.float64).T[:, None]
    default = saliency_labels(rows[:2], rows[2])[0]
    assert default[0] != label
    assert saliency_labels(rows[:2], rows[2], **changed)[0].tolist() == [label, 1, 2]


def test_labels_do_not_depend_on_the_unit_or_offset_of_a_map(generator):
    maps = torch.rand(3, 20, 30, generator=generator, dtype=torch.float64)
    saliency = torch.rand(20, 30, generator=generator, dtype=torch.float64)
    wanted = saliency_labels(maps, saliency)
    assert set(np.unique(wanted)) == {0, 1, 2, 3, 255}
    factors = torch.tensor([3.0, 0.2, 70.0], dtype=torch.float64)[:, None, None]
    np.testing.assert_array_equal(saliency_labels(maps * factors + 5, saliency), wanted)


def test_flat_maps_are_no_object_and_an_image_without_classes_is_ignored():
    saliency = torch.zeros(3, 4)
    flat = saliency_labels(torch.ones(2, 3, 4), saliency, least=0.0)
    assert (flat == 0).all()
    assert (saliency_labels(torch.ones(0, 3, 4), saliency) == 255).all()
    assert (saliency_labels(torch.ones(0, 3, 4)) == 255).all()
    assert (saliency_labels(torch.ones(0, 3, 4), saliency, least=0.0) == 0).all()


def test_without_saliency_the_maps_own_background_decides():
    maps = torch.tensor([[[0.27, 0.28, 0.6, 1.0, 0.95, 0.0]], [[0.0, 0.0, 0.0, 0.0, 0.95, 1.0]]])
    # (1 - 0.27)^4 = 0.284 > 0.27, (1 - 0.28)^4 = 0.269 < 0.28
    assert saliency_labels(maps).tolist() == [[0, 1, 1, 1, 255, 2]]
    assert saliency_labels(maps, strength=32.0).tolist() == [[1, 1, 1, 1, 255, 2]]
    assert saliency_labels(maps, rule="constant").tolist() == [[1, 1, 1, 1, 255, 2]]
    assert saliency_labels(maps, rule="constant", strength=0.3).tolist() == [[0, 0, 1, 1, 255, 2]]


def test_background_is_a_power_of_what_the_maps_leave_over(generator):
    maps = torch.rand(3, 4, 5, generator=generator, dtype=torch.float64)
    found = background(maps)
    for y in range(4):
        for x in range(5):
            assert found[y, x].item() == pytest.approx((1 - max(maps[:, y, x].tolist())) ** 4)
    assert (background(maps, "affinity", 32.0) < found).all()
    assert (background(maps, "constant") == 0.25).all()
    assert (background(maps[:0]) == 1).all()


def test_background_is_refused_by_an_unknown_rule(untyped):
    with pytest.raises(ValueError, match=r"`rule` in \('affinity', 'constant'\), got 'none'"):
        background(torch.zeros(1, 2, 2), "none")


def test_refinement_sees_background_and_classes_and_decides(generator):
    maps = torch.rand(2, 6, 8, generator=generator)
    seen = []

    def turn(channels):
        seen.append(channels)
        return channels.roll(1, 0)  # each label's evidence goes to the next

    regions = np.arange(48).reshape(6, 8)
    plain = superpixel_labels(maps, regions)
    np.testing.assert_array_equal(superpixel_labels(maps, regions, refine=turn), (plain + 1) % 3)
    assert torch.equal(seen[0][0], torch.full((6, 8), 0.3))
    assert saliency_labels(maps, torch.zeros(6, 8), refine=turn, conflict=1.0).max() == 255
    assert seen[1].shape == (3, 6, 8)
    assert not ((seen[1] > 0) & (seen[1] < 0.3)).any()


# --------------------------------------------------------------------------- saliency detection


@pytest.mark.parametrize("size", [(120, 90), (60, 300), (500, 375)])
def test_a_disk_on_a_two_colored_ground_is_salient(size):
    random = np.random.default_rng(3)
    height, width = size
    image = np.full((*size, 3), 90, np.uint8)
    image[:, width // 2 :] = (120, 150, 90)  # a second background, as far from the first
    y, x = np.ogrid[:height, :width]
    disk = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(size) / 4) ** 2
    image[disk] = (220, 60, 40)
    image = np.clip(image + random.integers(-8, 8, image.shape), 0, 255).astype(np.uint8)
    found = detect_saliency(image)
    assert found.shape == size
    assert (found.min(), found.max()) == (0, 1)
    assert found[disk].mean() > 0.8
    assert found[~disk].mean() < 0.15
    assert torch.equal(found, detect_saliency(image))


def test_a_picture_of_one_color_has_nothing_salient():
    assert (detect_saliency(np.full((40, 64, 3), 77, np.uint8)) == 0).all()


@pytest.mark.real
@pytest.mark.slow
def test_salient_pixels_are_objects_more_often_than_central_ones(real_data):
    from attnviz.data.voc import load_voc

    items = load_voc(real_data / "voc2012", "val")
    shares = []
    for item in [items[i * len(items) // 24] for i in range(24)]:
        mask = item.read_mask()
        y, x = (np.abs((np.arange(n) + 0.5) / n - 0.5) for n in mask.shape)
        central = -torch.from_numpy(y[:, None] ** 2 + x**2)
        known, most = mask != 255, int((mask != 255).sum()) // 4
        for scores in (detect_saliency(np.asarray(item.read())), central):
            first = scores.numpy()[known].argsort()[-most:]
            shares.append((mask[known][first] > 0).mean())
    assert np.mean(shares[0::2]) > np.mean(shares[1::2])


# ------------------------------------------------------------------------ conditional random field


def slow_mean_field(image, probabilities, crf):
    # Kraehenbuehl and Koltun's update with every pair of pixels, kernels scaled on both sides by
    # the roots of their sums.
    labels, height, width = probabilities.shape
    places = np.array([(y, x) for y in range(height) for x in range(width)], float)
    colors = image.reshape(-1, 3).astype(float)
    near = ((places[:, None] - places) ** 2).sum(axis=2)
    alike = ((colors[:, None] - colors) ** 2).sum(axis=2)
    kernels = [
        (crf.w_smooth, np.exp(-near / (2 * crf.s_smooth**2))),
        (crf.w_color, np.exp(-near / (2 * crf.s_space**2) - alike / (2 * crf.s_color**2))),
    ]
    energy = -np.log(np.maximum(probabilities.reshape(labels, -1), 1e-5))
    found = np.exp(-energy) / np.exp(-energy).sum(axis=0)
    for _ in range(crf.iterations):
        message = 0
        for weight, kernel in kernels:
            root = 1 / np.sqrt(kernel.sum(axis=0))
            message = message + weight * (found @ (kernel * root[:, None] * root))
        found = np.exp(message - energy)
        found /= found.sum(axis=0)
    return found.reshape(labels, height, width)


def test_the_random_field_is_mean_field_over_all_pairs_of_pixels():
    # The package filters on a lattice, which only approximates the kernels.
    random = np.random.default_rng(4)
    image = np.zeros((12, 20, 3), np.uint8)
    image[:, 11:] = (90, 40, 10)
    image += random.integers(0, 6, image.shape, dtype=np.uint8)
    probabilities = random.random((3, 12, 20))
    probabilities /= probabilities.sum(axis=0)
    crf = CRF(3, 1.0, 2.0, 1.5, 6.0, 15.0)
    found = dense_crf(image, torch.from_numpy(probabilities), crf).numpy()
    wanted = slow_mean_field(image, probabilities, crf)
    moved = np.abs(wanted - probabilities).mean()
    assert np.abs(found - wanted).mean() < 0.2 * moved
    assert (found.argmax(axis=0) == wanted.argmax(axis=0)).mean() > 0.93


@pytest.mark.parametrize("preset", CRF_PRESETS)
def test_constant_pictures_and_probabilities_keep_their_largest_label(preset):
    probabilities = torch.tensor([0.2, 0.5, 0.3])[:, None, None].expand(3, 24, 37)
    found = dense_crf(np.full((24, 37, 3), 128, np.uint8), probabilities, preset)
    assert (found.argmax(dim=0) == 1).all()
    torch.testing.assert_close(found.sum(dim=0), torch.ones(24, 37))


def test_labels_snap_to_the_edge_of_a_picture_that_is_no_square(two_halves):
    # The border of the labels is a slanted line; the picture's edge is at column 23 of 40.
    y, x = np.mgrid[:70, :40]
    left = 1 / (1 + np.exp((x - 23 - (y - 35) / 6) / 4))
    probabilities = torch.from_numpy(np.stack([left, 1 - left]))
    before = probabilities.argmax(dim=0).numpy()
    after = dense_crf(two_halves, probabilities, "maps").argmax(dim=0).numpy()
    assert (before != (x >= 23)).mean() > 0.04
    np.testing.assert_array_equal(after, x >= 23)


def test_the_random_field_turns_with_the_picture(two_halves, generator):
    probabilities = torch.rand(2, 70, 40, generator=generator)
    plain = dense_crf(two_halves, probabilities, "maps")
    turned = dense_crf(two_halves.swapaxes(0, 1), probabilities.swapaxes(1, 2), "maps")
    assert (plain.argmax(0) == turned.argmax(0).T).float().mean() > 0.98


def test_the_random_field_takes_any_unit_and_leaves_its_arguments_alone(two_halves, generator):
    probabilities = torch.rand(3, 70, 40, generator=generator)
    probabilities[:, 0, 0] = 0
    image, kept = two_halves.copy(), probabilities.clone()
    found = dense_crf(image, probabilities, "maps")
    torch.testing.assert_close(dense_crf(image, probabilities * 7, "maps"), found)
    assert found.isfinite().all()
    assert np.array_equal(image, two_halves)
    assert torch.equal(probabilities, kept)


def test_the_random_field_refuses_another_size_and_an_unknown_preset(two_halves, untyped):
    probabilities = torch.ones(2, 40, 70)
    with pytest.raises(ValueError, match=r"picture of 40 x 70.*, got \(70, 40, 3\); resize"):
        dense_crf(two_halves, probabilities)
    with pytest.raises(ValueError, match=r"`preset` in \('oaa_caffe'.*, got 'deeplab'"):
        dense_crf(two_halves, torch.ones(2, 70, 40), "deeplab")


def test_a_missing_package_is_named_with_its_remedy(two_halves, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ImportError, match="pydensecrf2.*`pip install pydensecrf2`"):
        dense_crf(two_halves, torch.ones(2, 70, 40))


def test_labels_refined_by_the_random_field_follow_the_picture(two_halves):
    y, x = np.mgrid[:70, :40]
    maps = torch.from_numpy(np.exp(-((y - 35) ** 2 + (x - 9) ** 2) / 400))[None]
    plain = saliency_labels(maps, rule="constant")
    refined = saliency_labels(
        maps, rule="constant", refine=partial(dense_crf, two_halves, preset="maps")
    )
    truth = x < 23
    assert ((refined == 1) == truth).mean() > ((plain == 1) == truth).mean() + 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "expected `iterations` of at least 1, got 0"),
        ({"s_smooth": 0}, "expected a finite `s_smooth` above 0, got 0"),
        ({"s_color": float("nan")}, "expected a finite `s_color` above 0, got nan"),
        ({"w_color": -1}, "expected a finite `w_color` at least 0, got -1"),
    ],
)
def test_numbers_that_would_end_the_process_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CRF_PRESETS["maps"], **changes)


def test_what_is_no_map_is_named():
    maps, regions = torch.rand(2, 4, 6), np.zeros((4, 6), int)
    broken = maps.clone()
    broken[0, 0, 0] = torch.nan
    for call in (superpixel_labels, saliency_labels):
        options = (regions,) if call is superpixel_labels else ()
        with pytest.raises(ValueError, match="expected finite maps, got NaN or infinity"):
            call(broken, *options)
        with pytest.raises(ValueError, match="expected at most 254 maps, got 255"):
            call(torch.rand(255, 4, 6), *options)
    with pytest.raises(ValueError, match="expected a saliency from 0 to 1, got values beyond"):
        saliency_labels(maps, torch.full((4, 6), 255.0))
    with pytest.raises(ValueError, match="expected finite probabilities"):
        dense_crf(np.zeros((4, 6, 3), np.uint8), broken)
