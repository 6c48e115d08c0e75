import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch.testing import assert_close

from attnviz.localize import box_iou, map_to_box, sweep_boxes
from attnviz.metrics import (
    average_precision,
    best_ious,
    bootstrap_interval,
    box_ious,
    centered_boxes,
    choose_threshold,
    class_ious,
    class_ranks,
    confusion_matrix,
    held_out_hits,
    image_ious,
    localization_baselines,
    localization_hits,
    localization_scores,
    max_box_acc,
    max_box_acc_v2,
    mean_average_precision,
    mean_iou,
    recall_noise,
    region_counts,
    split_half,
    sweep_counts,
    sweep_ious,
    sweep_region_ious,
)


def _replica(scores, targets):
    # Every distinct score as a threshold, counted image by image.
    positives = sum(targets)
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        pairs = zip(scores, targets, strict=True)
        taken = [target for score, target in pairs if score >= threshold]
        recall = sum(taken) / positives
        area += (recall - recall_before) * sum(taken) / len(taken)
        recall_before = recall
    return area


@pytest.mark.parametrize("levels", [3, 10, 10_000], ids=["many ties", "ties", "hardly a tie"])
def test_average_precision_equals_its_definition_threshold_by_threshold(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (40, 6), generator=generator) / levels - 0.5
    targets = (torch.rand(40, 6, generator=generator) < 0.3).float()
    targets[0] = 1  # no class is empty
    expected = [_replica(s, t) for s, t in zip(scores.T.tolist(), targets.T.tolist(), strict=True)]
    assert_close(average_precision(scores, targets), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("scores", "targets", "expected"),
    [
        ([4, 3, 2, 1], [1, 1, 0, 0], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], (1 / 3 + 2 / 4) / 2),
        ([4, 3, 2, 1], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([1, 1, 1, 1], [1, 0, 0, 0], 1 / 4),
        ([5], [1], 1.0),
    ],
    ids=["perfect", "reversed", "mixed", "all tied", "one image"],
)
def test_average_precision_by_hand(scores, targets, expected):
    scores, targets = (torch.tensor(values)[:, None].float() for values in (scores, targets))
    found = average_precision(scores, targets)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_order_of_images_with_equal_scores_has_no_influence():
    scores, targets = torch.tensor([2.0, 1, 1, 1, 0]), torch.tensor([0.0, 1, 0, 1, 1])
    turned = torch.tensor([4, 3, 2, 1, 0])
    assert_close(
        average_precision(scores[:, None], targets[:, None]),
        average_precision(scores[turned, None], targets[turned, None]),
    )


def test_class_without_an_image_is_nan_and_is_left_out_of_the_mean():
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.8, 0.6]])
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    found = average_precision(scores, targets)
    assert_close(found, torch.tensor([1, torch.nan, 0.5], dtype=torch.float64), equal_nan=True)
    assert mean_average_precision(scores, targets).item() == 0.75
    assert mean_average_precision(scores, torch.zeros(2, 3)).isnan()


# ------------------------------------------------------------------------- boxes against boxes


def test_ious_by_hand():
    a = [(0, 0, 2, 2), (1, 1, 3, 3), (5, 5, 6, 7)]
    assert box_ious(a, a).tolist() == pytest.approx(
        np.array([[1, 1 / 7, 0], [1 / 7, 1, 0], [0, 0, 1]])
    )
    assert box_ious(a[:1], [(0, 0, 4, 4)]).item() == 1 / 4


def test_one_more_pixel_by_hand():
    pair = [(0, 0, 1, 1)], [(0, 0, 3, 1)]  # 2 x 2 against 4 x 2 pixels
    assert box_ious(*pair, "plus_one").item() == 1 / 2
    assert box_ious(*pair).item() == 1 / 3
    shifted = box_ious([(0, 0, 10, 10)], [(5, 5, 15, 15)], "plus_one").item()
    assert shifted == pytest.approx(36 / (2 * 121 - 36))
    touching = [(0, 0, 4, 4)], [(4, 0, 8, 4)]
    assert box_ious(*touching, "plus_one").item() == 0
    assert box_ious(*touching).item() == 0


_SIDE = some.integers(0, 12)
_BOX = some.tuples(_SIDE, _SIDE, _SIDE, _SIDE).map(
    lambda s: (min(s[0], s[2]), min(s[1], s[3]), max(s[0], s[2]) + 1, max(s[1], s[3]) + 1)
)


@given(_BOX, _BOX)
def test_ious_equal_a_count_of_pixels(a, b):
    for convention, extra in (("half_open", 0), ("plus_one", 1)):
        masks = np.zeros((2, 16, 16), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, (a, b)):
            mask[y0 : y1 + extra, x0 : x1 + extra] = True
        expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        found = box_ious([a], [b], convention).item()
        apart = min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
        assert found == pytest.approx(0 if apart else expected)
        assert found == box_ious([b], [a], convention).item()
    assert box_ious([a], [b]).item() == pytest.approx(box_iou(a, b))


def test_the_best_of_several_true_boxes_counts():
    truths = [(0, 0, 4, 4), (10, 10, 20, 20)]
    assert best_ious([(10, 10, 20, 15), (0, 0, 4, 4)], truths).tolist() == [0.5, 1.0]
    assert image_ious([(10, 10, 20, 15), None], [truths, truths[:1]]).tolist() == [0.5, 0.0]


def test_arrays_tensors_and_lists_are_boxes():
    boxes = [(0, 0, 4, 4), (1, 1, 3, 5)]
    expected = box_ious(boxes, boxes)
    for other in (np.array(boxes), torch.tensor(boxes), torch.tensor(boxes).double()):
        assert (box_ious(other, boxes) == expected).all()
    assert box_ious([], boxes).shape == (0, 2)


# -------------------------------------------------------------------- images at one threshold


def test_rank_counts_higher_scores_and_equal_ones_before():
    scores = torch.tensor([[3.0, 1, 2, 2], [0, 0, 0, 0], [1, 2, 3, 4]])
    assert class_ranks(scores, [3, 0, 3]).tolist() == [2, 0, 0]
    assert class_ranks(scores, torch.tensor([0, 3, 0])).tolist() == [0, 3, 3]
    first = scores.argmax(1)
    assert class_ranks(scores, first).tolist() == [0, 0, 0]


def test_hits_by_hand():
    hits = localization_hits(
        np.array([0, 4, 5, 0, 0]), np.array([0.5, 0.9, 0.9, 0.49, 1.0]), image_ids=list("abcde")
    )
    assert hits["cls1"].tolist() == [True, False, False, True, True]
    assert hits["cls5"].tolist() == [True, True, False, True, True]
    assert hits["gt_known"].tolist() == [True, True, True, False, True]
    assert hits["loc1"].tolist() == [True, False, False, False, True]
    assert hits["loc5"].tolist() == [True, True, False, False, True]
    assert hits.sum().tolist() == [3, 4, 4, 2, 3]
    scores = localization_scores(hits)
    assert scores["score"].tolist() == [0.6, 0.8, 0.8, 0.4, 0.6]
    assert scores["count"].tolist() == [3, 4, 4, 2, 3]
    assert (scores["images"] == 5).all()
    assert (scores["low"] <= scores["score"]).all()
    assert (scores["high"] >= scores["score"]).all()
    assert hits.index.name == "image_id"


def test_a_joined_table_scores_as_the_whole():
    ranks, ious = np.arange(8) % 3, np.arange(8) / 8
    whole = localization_scores(localization_hits(ranks, ious))
    parts = [localization_hits(ranks[n], ious[n]) for n in (slice(0, 3), slice(3, 8))]
    pd.testing.assert_frame_equal(localization_scores(pd.concat(parts)), whole)


def test_loc5_needs_no_other_map_than_the_true_class():
    # The official protocol: right if one of five (class, box) pairs has the class and the box.
    generator = np.random.default_rng(0)
    scores = torch.from_numpy(generator.random((40, 12)))
    truth, ious = generator.integers(0, 12, 40), generator.random((40, 12))
    right = []
    for row in range(40):
        five = scores[row].argsort(descending=True)[:5].tolist()
        right.append(any(c == truth[row] and ious[row, c] >= 0.5 for c in five))
    own = ious[np.arange(40), truth]
    hits = localization_hits(class_ranks(scores, torch.from_numpy(truth)), own)
    assert hits["loc5"].tolist() == right


def test_bootstrap_interval_is_that_of_the_normal_approximation_and_repeatable():
    values = np.arange(400) % 4 == 0
    low, high = bootstrap_interval(values)
    deviation = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == pytest.approx((0.25 - deviation, 0.25 + deviation), abs=0.006)
    assert (low, high) == bootstrap_interval(values)
    other = bootstrap_interval(values, generator=torch.Generator().manual_seed(5))
    assert other != (low, high)
    assert bootstrap_interval(np.ones(7)) == (1.0, 1.0)
    narrow = bootstrap_interval(values, 0.5)
    assert low < narrow[0] < narrow[1] < high


# ------------------------------------------------------------------- images at many thresholds

THRESHOLDS = np.arange(0, 1, 0.02)


def _images(count=6):
    """Smooth maps and a few true boxes each."""
    generator = np.random.default_rng(3)
    for _ in range(count):
        values = cv2.GaussianBlur(generator.random((36, 44)).astype(np.float32), (0, 0), 4)
        map = torch.from_numpy(values - values.min())
        corners = generator.integers(0, 18, (2, 2))
        yield map, [(int(x), int(y), int(x) + 20, int(y) + 15) for x, y in corners]


@pytest.mark.parametrize("rule", ["component", "rect", "contour_area"])
def test_max_box_acc_equals_a_naive_loop(rule):
    expected = {}
    for least in (0.1, 0.3, 0.5):
        best = 0.0
        for threshold in THRESHOLDS:
            right = 0
            for map, truths in _images():
                box = map_to_box(map, float(threshold), rule)
                right += any(box_iou(box, truth) >= least for truth in truths)
            best = max(best, right / 6)
        expected[least] = best
    ious = []
    for map, truths in _images():
        boxes, positions = sweep_boxes(map, THRESHOLDS, rule)
        ious.append(sweep_ious(boxes, positions, truths, len(THRESHOLDS)))
    counts = sweep_counts(np.stack(ious), tuple(expected))
    assert max_box_acc(counts, 6).tolist() == pytest.approx(list(expected.values()))
    assert max_box_acc_v2(counts, 6) == pytest.approx(np.mean(list(expected.values())))
    assert 0 < max_box_acc(counts[0], 6) <= 1


def test_with_all_regions_the_best_one_counts():
    map = torch.zeros(20, 20)
    map[0:10, 0:10], map[15:20, 15:20] = 0.5, 1.0
    truths = [(15, 15, 20, 20)]
    thresholds = np.array([0.1, 0.6])
    best = {
        keep: sweep_ious(*sweep_boxes(map, thresholds, keep=keep), truths, 2).tolist()
        for keep in ("largest", "all")
    }
    assert best == {"largest": [0, 1], "all": [1, 1]}


def test_counts_of_parts_add_up():
    ious = np.random.default_rng(0).random((9, 5))
    parts = sweep_counts(ious[:4]) + sweep_counts(ious[4:])
    assert (parts == sweep_counts(ious)).all()
    assert parts.shape == (3, 5)
    assert (np.diff(parts, axis=0) <= 0).all()  # a stricter measure never counts more


def test_the_threshold_is_one_for_all_images_not_the_best_of_each():
    ious = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert max_box_acc(sweep_counts(ious, [0.5])[0], 2) == 0.5


# ------------------------------------------------------------------ thresholds chosen elsewhere


def test_halves_do_not_depend_on_order_or_company():
    ids = [f"ILSVRC2012_val_{n:08d}" for n in range(1000)]
    halves = dict(zip(ids, split_half(ids)))
    assert split_half(ids[::-3]).tolist() == [halves[each] for each in ids[::-3]]
    assert 450 < sum(halves.values()) < 550
    assert split_half(["a", "b", "c", "d"]).tolist() == [False, False, False, False]
    assert split_half([]).shape == (0,)


def test_the_middle_of_the_best_thresholds_is_chosen():
    ious = np.array([[0.0, 0.6, 0.6, 0.6, 0.1], [0.0, 0.6, 0.6, 0.6, 0.9]])
    assert choose_threshold(ious) == 2
    assert choose_threshold(ious, 0.8) == 4


def test_the_scored_half_has_no_say_in_the_threshold():
    generator = np.random.default_rng(0)
    ious, scored = generator.random((30, 11)), np.arange(30) % 2 == 0
    position, hits = held_out_hits(ious, scored)
    assert (hits == (ious[scored, position] >= 0.5)).all()
    changed = ious.copy()
    changed[scored] = 0
    assert held_out_hits(changed, scored)[0] == position
    best = sweep_counts(ious[scored], [0.5]).max() / 15
    assert hits.mean() <= best


# --------------------------------------------------------------------- without any network


def test_centered_boxes_by_hand():
    assert centered_boxes((100, 200), np.array([0.5, 1.0])).tolist() == [
        [50, 25, 150, 75],
        [0, 0, 200, 100],
    ]


def test_baselines_by_hand():
    sizes = [(100, 100)] * 4
    half = [(25, 25, 75, 75)]
    truths = [half, half, half, [(0, 0, 100, 90)]]
    table = localization_baselines(sizes, truths, np.array([False, False, True, True]))
    square, full = table.loc["centered square"], table.loc["full image"]
    assert square["share"] == pytest.approx(0.53)  # 0.36 to 0.70 are all right
    assert (square["images"], square["count"], square["score"]) == (2, 1, 0.5)
    assert (full["share"], full["count"], full["score"]) == (1, 1, 0.5)
    assert (table["low"] <= table["score"]).all()


@pytest.mark.real
def test_baselines_on_real_boxes(real_data):
    boxes = pd.read_csv(real_data / "ilsvrc" / "boxes_227.csv")
    groups = boxes.groupby("image")[["x0", "y0", "x1", "y1"]]
    truths = {image: rows.to_numpy() for image, rows in groups}
    sizes = [(227, 227)] * len(truths)
    table = localization_baselines(sizes, list(truths.values()), split_half(list(truths)))
    assert table.loc["full image", "score"] == pytest.approx(0.47, abs=0.06)
    assert table.loc["centered square", "score"] == pytest.approx(0.61, abs=0.06)


# ---------------------------------------------------------------------------------- bad inputs


def test_bad_arguments_say_what_is_expected(untyped):
    box = [(0, 0, 2, 2)]
    with pytest.raises(ValueError, match=r"\(5.0, 5.0, 3.0, 8.0\); is it \(x, y, width"):
        box_ious(box, [(0, 0, 1, 1), (5, 5, 3, 8)])
    with pytest.raises(ValueError, match=r"got an array \(4, 5\)"):
        box_ious(box, np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"`convention` in \('half_open', 'plus_one'\), got 'in"):
        box_ious(box, box, "inclusive")
    with pytest.raises(ValueError, match="at least one true box in `truths`, got none"):
        best_ious(box, [])
    with pytest.raises(ValueError, match="true boxes for 1 images, got 2"):
        image_ious(box, [box, box])
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="scores without NaN"):
        class_ranks(scores.log() - scores.log(), [0, 1])
    with pytest.raises(ValueError, match=r"2 class ids, got \(1,\)"):
        class_ranks(scores, [0])
    with pytest.raises(ValueError, match="classes from 0 to 2, got 3"):
        class_ranks(scores, [0, 3])
    with pytest.raises(ValueError, match="as many ranks as ious, got 2 and 3"):
        localization_hits(np.zeros(2, int), np.zeros(3))
    with pytest.raises(ValueError, match="at least one image in `hits`"):
        localization_scores(pd.DataFrame({"loc1": []}))
    with pytest.raises(ValueError, match="at least one value, got none"):
        bootstrap_interval(np.zeros(0))
    with pytest.raises(ValueError, match=r"`level` in \(0, 1\), got 95"):
        bootstrap_interval(np.zeros(3), 95)
    with pytest.raises(ValueError, match="expected `images` of at least 4, got 3"):
        max_box_acc(np.array([1, 4]), 3)
    with pytest.raises(ValueError, match="one image and threshold to choose on, got none"):
        held_out_hits(np.zeros((2, 3)), np.array([True, True]))
    with pytest.raises(ValueError, match="one image to score on, got none; use more images"):
        held_out_hits(np.zeros((2, 3)), np.array([False, False]))


# -------------------------------------------------------------------------- regions and pixels


def test_recall_and_noise_by_hand():
    # the map points at 4 pixels, the object has 5, 3 are shared
    maps = torch.tensor([[[1.0, 0.5, 0.5, 0.6], [0.4, 0.49, 0.0, 0.1]]])
    masks = torch.tensor([[[1, 1, 1, 0], [1, 1, 0, 0]]]).bool()
    assert region_counts(maps, masks).tolist() == [[3, 4, 5]]
    recall, noise = recall_noise(maps, masks)
    assert recall.tolist() == [pytest.approx(3 / 5)]
    assert noise.tolist() == [pytest.approx(1 / 4)]
    recall, noise = recall_noise(maps, masks, threshold=0.4)
    assert recall.tolist() == [1.0]
    assert noise.tolist() == [pytest.approx(1 / 6)]


def test_recall_and_noise_do_not_depend_on_the_unit_of_the_map(generator):
    maps = torch.rand(3, 5, 6, generator=generator)
    masks = torch.rand(3, 5, 6, generator=generator) < 0.4
    for unit in (2.0**-20, 2.0**20):
        for a, b in zip(recall_noise(maps, masks), recall_noise(unit * maps, masks)):
            assert torch.equal(a, b)


def test_a_map_of_the_object_itself_is_perfect_and_one_of_the_rest_is_noise(generator):
    masks = torch.rand(2, 5, 6, generator=generator) < 0.4
    recall, noise = recall_noise(masks.float(), masks)
    assert recall.tolist() == [1, 1]
    assert noise.tolist() == [0, 0]
    recall, noise = recall_noise((~masks).float(), masks)
    assert recall.tolist() == [0, 0]
    assert noise.tolist() == [1, 1]


def test_zero_maps_and_missing_objects_have_no_share():
    maps = torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])
    masks = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)]).bool()
    recall, noise = recall_noise(maps, masks)
    assert recall[0] == 0
    assert noise[0].isnan()
    assert recall[1].isnan()
    assert noise[1] == 1


def test_pixels_that_do_not_count_change_nothing(generator):
    maps = torch.rand(2, 4, 6, generator=generator)
    masks = torch.rand(2, 4, 6, generator=generator) < 0.5
    maps[:, :, 0] = 1.0  # the maximum stays inside
    valid = torch.ones(2, 4, 6, dtype=torch.bool)
    valid[:, :, 3:] = False
    counts = region_counts(maps, masks, valid=valid)
    assert torch.equal(counts, region_counts(maps[:, :, :3], masks[:, :, :3]))


def test_confusion_counts_every_pixel_once(generator):
    predictions = torch.randint(0, 4, (3, 5, 6), generator=generator)
    targets = torch.randint(0, 4, (3, 5, 6), generator=generator)
    targets[torch.rand(3, 5, 6, generator=generator) < 0.2] = 255
    expected = [[0] * 4 for _ in range(4)]
    for p, t in zip(predictions.flatten().tolist(), targets.flatten().tolist()):
        if t != 255:
            expected[t][p] += 1
    confusion = confusion_matrix(predictions, targets.to(torch.uint8), 4)
    assert confusion.tolist() == expected
    parts = [confusion_matrix(predictions[i], targets[i], 4) for i in range(3)]
    assert torch.equal(sum(parts), confusion)


def test_mean_iou_by_hand():
    # class 0: 2 of 2 + 1 + 1; class 1: 3 of 3 + 1 + 2; class 2: 0 of 1; class 3 is not there
    confusion = torch.tensor([[2, 1, 0, 0], [1, 3, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    ious = class_ious(confusion)
    assert ious[:3].tolist() == [pytest.approx(2 / 4), pytest.approx(3 / 6), 0]
    assert ious[3].isnan()
    assert mean_iou(confusion).item() == pytest.approx(1 / 3)


def test_mean_iou_equals_scikit_learns_jaccard_score(generator):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions = torch.randint(0, 5, (500,), generator=generator)
    targets = torch.randint(0, 5, (500,), generator=generator)
    confusion = confusion_matrix(predictions, targets, 5)
    expected = sklearn.jaccard_score(targets, predictions, average="macro")
    assert mean_iou(confusion).item() == pytest.approx(expected)


def test_a_class_that_does_not_exist_is_refused():
    zeros = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="from 0 to 2 in `predictions`, got 3"):
        confusion_matrix(torch.tensor([0, 3, 1]), zeros, 3)
    with pytest.raises(ValueError, match="from 0 to 2 in `targets`, got -1"):
        confusion_matrix(zeros, torch.tensor([0, -1, 255]), 3)


def test_swept_regions_are_those_of_every_threshold_by_itself(generator):
    map = torch.rand(9, 7, generator=generator)
    map[2:4] = 0
    mask = torch.rand(9, 7, generator=generator) < 0.3
    valid = torch.rand(9, 7, generator=generator) < 0.8
    thresholds = np.array([0.0, 0.1, 0.35, 0.5, 0.99, 1.0])
    ious = sweep_region_ious(map, mask, thresholds, valid)
    whole = sweep_region_ious(map, mask, thresholds)
    for threshold, iou, all_counted in zip(thresholds, ious, whole):
        for value, keep in ((iou, valid), (all_counted, torch.ones_like(valid))):
            places = [(y, x) for y in range(9) for x in range(7) if keep[y, x]]
            found = {p for p in places if map[p] >= threshold * map.max() and map[p] > 0}
            true = {p for p in places if mask[p]}
            assert value == pytest.approx(len(found & true) / len(found | true))


def test_swept_regions_by_hand():
    map = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    mask = torch.tensor([[True, False], [False, True]])
    ious = sweep_region_ious(map, mask, np.array([0.2, 0.25, 0.5, 0.6, 1.0]))
    assert ious.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 3, 1 / 2, 1 / 2])
    assert sweep_region_ious(1e-20 * map, mask, np.array([0.5]))[0] == pytest.approx(1 / 3)


def test_swept_regions_of_empty_maps_and_masks():
    empty, some_place = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    thresholds = np.array([0.1, 0.9])
    assert sweep_region_ious(empty, some_place > 0, thresholds).tolist() == [0, 0]
    assert sweep_region_ious(some_place, empty > 0, thresholds).tolist() == [0, 0]
    assert np.isnan(sweep_region_ious(empty, empty > 0, thresholds)).all()
