import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image
from scipy import ndimage
from torchvision.transforms.functional import center_crop, ten_crop
from torchvision.transforms.functional import resize as torchvision_resize

from attnviz.localize import (
    View,
    box_iou,
    component_boxes,
    eight_bit,
    grabcut,
    join_crops,
    largest_component,
    map_to_box,
    mask_to_box,
    peaks,
    simonyan,
    sweep_boxes,
    views,
)

RULES = ("component", "rect", "contour_area")


def _smooth(seed, height=40, width=52, sigma=2.5):
    """A random map with several hills, float32."""
    values = np.random.default_rng(seed).random((height, width)).astype(np.float32)
    values = cv2.GaussianBlur(values, (0, 0), sigma)
    return torch.from_numpy((values - values.min()) ** 2)


def _diagonal_and_bar():
    """A diagonal of 120 pixels in a rectangle of 61 x 60, and a bar of 440 pixels."""
    map = torch.zeros(70, 90)
    for step in range(60):
        map[step, step] = map[step, step + 1] = 1.0
    map[65:70, 0:88] = 1.0
    return map


def test_box_is_tight_and_half_open():
    map = torch.zeros(10, 12)
    map[2:5, 3:9] = 1.0
    assert map_to_box(map) == (3, 2, 9, 5)


def test_threshold_is_a_share_of_the_maximum_and_exclusive():
    map = torch.tensor([[0.0, 3.0, 6.0, 20.0]])
    assert map_to_box(map, 0.15) == (2, 0, 4, 1)  # 3.0 is 15 % exactly and stays out
    assert map_to_box(map, 0.1) == (1, 0, 4, 1)
    assert map_to_box(map * 1e-20, 0.1) == (1, 0, 4, 1)


def test_diagonal_neighbors_are_connected():
    assert map_to_box(torch.eye(5)) == (0, 0, 5, 5)


def test_the_region_with_most_pixels_wins_not_the_largest_rectangle():
    assert map_to_box(_diagonal_and_bar()) == (0, 65, 88, 70)


def test_by_rect_the_largest_rectangle_wins_not_the_most_pixels():
    assert map_to_box(_diagonal_and_bar(), rule="rect") == (0, 0, 61, 60)  # 3660 against 440


def test_by_contour_area_the_largest_outline_wins_and_the_last_row_and_column_are_cut():
    assert map_to_box(_diagonal_and_bar(), rule="contour_area") == (0, 65, 88, 69)
    map = torch.zeros(20, 30)
    map[3:7, 20:30] = 1.0
    assert map_to_box(map, rule="contour_area") == (20, 3, 29, 7)


def test_a_map_without_a_positive_value_has_no_box():
    assert map_to_box(torch.zeros(4, 4)) is None
    assert map_to_box(-torch.ones(4, 4)) is None
    assert map_to_box(torch.zeros(4, 4), rule="rect") == (0, 0, 1, 1)
    assert map_to_box(torch.ones(4, 4), rule="contour_area") is None
    assert len(sweep_boxes(torch.zeros(4, 4))[0]) == 0


def test_bytes_from_39_on_are_above_15_percent():
    map = torch.tensor([[38.0, 39.0, 255.0]]) / 255
    assert eight_bit(map).tolist() == [[38, 39, 255]]
    assert map_to_box(map, 0.15, "rect") == (1, 0, 3, 1)
    assert map_to_box(torch.tensor([[38.99, 255.0]]), 0.15, "rect") == (1, 0, 2, 1)  # cut, 38
    assert map_to_box(torch.tensor([[38.99, 255.0]]), 0.15) == (0, 0, 2, 1)
    assert map_to_box(map * 1e-20, 0.15, "rect") == (1, 0, 3, 1)


def _released_box(map, threshold):
    # The released chain as it is written: every contour, the largest bounding rectangle.
    values = np.floor(map.clamp_min(0).double().numpy() / map.double().max().item() * 255)
    _, binary = cv2.threshold(values.astype(np.uint8), threshold * 255, 255, cv2.THRESH_BINARY)
    contours, _ = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    largest, box = 0, (0, 0, 1, 1)
    for contour in contours:
        x, y, w, h = cv2.boundingRect(contour)
        if w * h > largest:
            largest, box = w * h, (x, y, x + w, y + h)
    return largest, box


def _area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


@pytest.mark.parametrize("threshold", [0.0, 0.15, 0.4, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_rect_equals_the_released_chain(seed, threshold):
    map = _smooth(seed, sigma=1.2)
    largest, expected = _released_box(map, threshold)
    found = map_to_box(map, threshold, "rect")
    assert found == expected or _area(found) == largest  # of equal ones either


def _evaluation_box(map, threshold):
    # The literature's chain: stretched to bytes, above int(threshold * max), largest contour.
    stretched = map.double().numpy() - map.double().min().item()
    values = (stretched / stretched.max() * 255).astype(np.uint8)
    mask = (values > int(threshold * values.max())).astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    x, y, w, h = cv2.boundingRect(max(contours, key=cv2.contourArea))
    return x, y, min(x + w, map.shape[1] - 1), min(y + h, map.shape[0] - 1)


@pytest.mark.parametrize("seed", range(4))
def test_contour_area_equals_the_evaluation_chain(seed):
    map = _smooth(seed, sigma=1.2) - 0.01
    for threshold in (0.0, 0.2, 0.5, 0.9):
        assert map_to_box(map, threshold, "contour_area") == _evaluation_box(map, threshold)


@pytest.mark.parametrize("rule", RULES)
def test_a_box_can_be_found_at_the_size_of_the_image(rule):
    map = torch.zeros(8, 8)
    map[2:6, 1:5] = 1.0
    x0, y0, x1, y1 = map_to_box(map, 0.5, rule, size=(80, 160))
    assert abs(x0 - 20) <= 1
    assert abs(x1 - 100) <= 1
    assert abs(y0 - 20) <= 1
    assert abs(y1 - 60) <= 1


def test_every_region_has_a_box_the_largest_first():
    map = torch.zeros(10, 20)
    map[0:2, 0:2] = map[4:9, 3:8] = 1.0
    map[0, 19] = 0.5
    assert component_boxes(map) == [(3, 4, 8, 9), (0, 0, 2, 2), (19, 0, 20, 1)]
    assert component_boxes(map, 0.6, min_pixels=5) == [(3, 4, 8, 9)]
    assert component_boxes(torch.zeros(3, 3)) == []


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_finds_the_boxes_of_single_thresholds(rule, seed):
    map = _smooth(seed, sigma=1.5)
    thresholds = np.arange(0, 1, 0.01)
    boxes, positions = sweep_boxes(map, thresholds, rule)
    assert positions.tolist() == list(range(100))
    expected = [map_to_box(map, float(threshold), rule) for threshold in thresholds]
    assert boxes.tolist() == [list(box) for box in expected]


def test_a_sweep_follows_the_largest_region_from_one_to_another():
    map = torch.zeros(40, 60)
    map[2:32, 2:12] = torch.linspace(0.15, 0.45, 30)[:, None]  # wide and low, shrinks row by row
    map[5:10, 20:50] = torch.linspace(0.3, 0.65, 30)  # shrinks column by column
    map[20:30, 22:32] = 0.6
    map[20:30, 26] = 0.5  # falls apart into two
    map[35:38, 40:43] = 1.0
    thresholds = np.arange(0, 1, 0.01)
    boxes, _ = sweep_boxes(map, thresholds)
    expected = [map_to_box(map, float(threshold)) for threshold in thresholds]
    assert boxes.tolist() == [list(box) for box in expected]
    places = {(box[0], box[1]) for box in expected}
    assert {(22, 20), (27, 20), (40, 35)} <= places
    assert any(x < 12 for x, _ in places)


@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_of_noise_finds_the_boxes_of_single_thresholds(seed):
    map, thresholds = _smooth(seed, sigma=0.6), np.arange(0, 1, 0.02)
    boxes, _ = sweep_boxes(map, thresholds)
    expected = [map_to_box(map, float(threshold)) for threshold in thresholds]
    assert boxes.tolist() == [list(box) for box in expected]
    assert len({box[:2] for box in expected}) > 5


@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_breaks_ties_as_single_thresholds_do(seed):
    generator = np.random.default_rng(seed)
    map = torch.from_numpy((generator.integers(0, 9, (31, 37)) == 8) * generator.random((31, 37)))
    boxes, _ = sweep_boxes(map, np.arange(0, 1, 0.05))
    expected = [map_to_box(map, float(threshold)) for threshold in np.arange(0, 1, 0.05)]
    assert boxes.tolist() == [list(box) for box in expected]


@given(some.integers(0, 10_000), some.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]))
def test_the_region_is_the_same_by_outlines_and_by_labels(seed, share):
    mask = np.random.default_rng(seed).random((15, 18)) < share  # holes in holes, thin lines
    region = largest_component(mask)
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    expected = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else None
    assert mask_to_box(mask) == expected
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    boxes = component_boxes(torch.from_numpy(mask * 1.0), 0.5)
    sizes = {(x, y, x + w, y + h) for x, y, w, h in statistics[1:, :4].tolist()}
    assert set(boxes) == sizes
    assert len(boxes) == len(statistics) - 1
    least = int(np.median(statistics[1:, 4])) if len(sizes) else 1
    kept = component_boxes(torch.from_numpy(mask * 1.0), 0.5, min_pixels=least)
    assert len(kept) == (statistics[1:, 4] >= least).sum()


def test_a_sweep_of_all_regions_finds_every_component():
    map = _smooth(0)
    thresholds = np.array([0.1, 0.3, 0.3, 0.8])
    boxes, positions = sweep_boxes(map, thresholds, keep="all")
    for position, threshold in enumerate(thresholds):
        found = {tuple(box) for box in boxes[positions == position].tolist()}
        assert found == set(component_boxes(map, float(threshold)))


def test_peaks_by_hand():
    map = torch.zeros(7, 9)
    map[1, 1], map[5, 6], map[5, 7] = 3.0, 5.0, 5.0  # the last two are one
    map[2, 2] = 2.0  # beside the first
    map[0, 8] = 1.0  # in the corner
    assert peaks(map).tolist()[:3] == [[5, 6], [1, 1], [0, 8]]
    assert peaks(map, at_least=1.0).tolist() == [[5, 6], [1, 1], [0, 8]]
    assert peaks(map, at_least=2.5).tolist() == [[5, 6], [1, 1]]
    assert peaks(torch.ones(4, 4)).tolist() == []
    assert peaks(torch.tensor([[-3.0, -1.0, -2.0]])).tolist() == [[0, 1]]  # maps with sign


@pytest.mark.parametrize("seed", range(3))
def test_peaks_equal_a_search_place_by_place(seed):
    map = _smooth(seed, sigma=1.0).double()
    height, width = map.shape
    found = set()
    for row in range(height):
        for column in range(width):
            around = map[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            if map[row, column] == around.max() and map[row, column] >= np.median(map):
                found.add((row, column))
    places = peaks(map)
    assert {tuple(place) for place in places.tolist()} == found
    values = [map[row, column].item() for row, column in places.tolist()]
    assert values == sorted(values, reverse=True)


# ----------------------------------------------------------------------------------- graph cut


def _scene():
    """A red object of 30 x 24 pixels on blue ground, and a map that knows only its middle."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[..., 2] = 200
    image[20:50, 30:54] = (220, 30, 20)
    noise = np.random.default_rng(0).integers(0, 20, image.shape)
    map = torch.zeros(60, 80)
    map[32:38, 38:46] = 1.0
    return (image + noise).astype(np.uint8), map


def test_grabcut_grows_a_seed_into_the_object():
    image, map = _scene()
    assert mask_to_box(grabcut(image, map)) == (30, 20, 54, 50)


def test_simonyan_grows_a_seed_into_the_object_and_stops_at_the_lower_quantile():
    image, map = _scene()
    wide = torch.from_numpy(cv2.GaussianBlur(map.numpy(), (0, 0), 14))
    assert mask_to_box(simonyan(image, wide)) == (30, 20, 54, 50)
    assert mask_to_box(simonyan(image, map)) == (38, 32, 46, 38)  # all zeros are background


def _noise():
    """Clouds of color and a wide hill: mixtures that depend on where they begin."""
    image = np.random.default_rng(1).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 3)
    return image, torch.from_numpy(cv2.GaussianBlur(_scene()[1].numpy(), (0, 0), 6))


def test_grabcut_holds_the_thresholded_map():
    image, map = _noise()
    assert (grabcut(image, map) >= (map > 0.15 * map.max()).numpy()).all()


@pytest.mark.parametrize("cut", [grabcut, simonyan])
def test_a_cut_repeats_itself_whatever_was_drawn_before(cut):
    image, map = _noise()
    masks = []
    for seed in range(4):
        cv2.setRNGSeed(seed)
        masks.append(cut(image, map))
    assert all((mask == masks[0]).all() for mask in masks)
    assert any((cut(image, map, seed=seed) != masks[0]).any() for seed in range(1, 4))


def test_simonyan_keeps_its_sure_places():
    image, _ = _scene()
    map = torch.rand(60, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = simonyan(image, map)
    low, high = np.quantile(map.numpy(), (0.3, 0.95))
    assert mask[map.numpy() > high].all()
    assert not mask[map.numpy() < low].any()


@pytest.mark.parametrize("cut", [grabcut, simonyan])
def test_without_a_seed_the_thresholded_map_is_the_object(cut):
    image, _ = _scene()
    assert not cut(image, torch.zeros(60, 80)).any()
    assert cut(image, torch.ones(60, 80)).all()


# ------------------------------------------------------------------- what the network saw of it

SIZES = [(375, 500), (500, 333), (227, 227), (301, 640)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", ["tencrop", "resize", "center"])
def test_boxes_survive_the_way_to_the_network_and_back(size, preset):
    for view in views(size, preset):
        box = (11, 22, 133, 244)
        assert view.box_to_image(view.box_to_network(box)) == pytest.approx(box)
        x0, y0, x1, y1 = view.box_to_network(box)
        assert x0 < x1
        assert y0 < y1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", ["tencrop", "resize", "center"])
def test_a_box_lies_where_its_pixels_lie(size, preset):
    image = np.zeros((*size, 3), np.uint8)
    box = (size[1] // 2 - 40, size[0] // 2 - 30, size[1] // 2 + 60, size[0] // 2 + 20)
    image[box[1] : box[3], box[0] : box[2]] = 255
    for view in views(size, preset):
        seen = torch.from_numpy(view.pixels(image)[..., 0] / 255.0)
        assert seen.shape == view.size
        expected = view.box_to_network(box)
        assert np.abs(np.subtract(map_to_box(seen, 0.5), expected)).max() <= 1
        back = map_to_box(view.map_to_image(seen), 0.5)
        factor = max(np.divide(view.image_size, view.resized))
        assert np.abs(np.subtract(back, box)).max() <= 1 + factor


def test_boxes_by_hand():
    view = View((100, 200), (256, 256), (32, 0), (224, 224))
    assert view.box_to_network((50, 25, 100, 75)) == (64, 32, 128, 160)
    mirrored = View((100, 200), (256, 256), (32, 0), (224, 224), mirrored=True)
    assert mirrored.box_to_network((50, 25, 100, 75)) == (96, 32, 160, 160)


@pytest.mark.parametrize("preset", ["tencrop", "center"])
def test_windows_are_those_of_torchvision(preset):
    pixels = np.random.default_rng(0).integers(0, 255, (90, 131, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if preset == "tencrop":
        expected = ten_crop(torchvision_resize(image, [81, 81]), 64)
    else:
        expected = [center_crop(torchvision_resize(image, 81), 64)]
    found = [view.pixels(pixels) for view in views((90, 131), preset, crop=64, resize=81)]
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert (one == np.asarray(other)).all()


def test_ten_windows_of_a_map_sum_to_the_map_times_their_number():
    size = (120, 90)
    whole = torch.rand(size, generator=torch.Generator().manual_seed(1))
    ten = views(size, crop=56, resize=64)
    joined = join_crops(torch.stack([view.map_to_network(whole) for view in ten]), ten)
    number = join_crops(torch.ones(10, 7, 7), ten)
    direct = View(size, (64, 64), (0, 0), (64, 64)).map_to_network(whole)
    torch.testing.assert_close(joined, direct * number)
    assert number.min() == 2
    assert number.max() == 10
    box = map_to_box(joined, rule="rect", size=size)
    assert 0 <= box[0] < box[2] <= 90
    assert 0 <= box[1] < box[3] <= 120


def test_a_map_is_zero_outside_of_the_window():
    view = views((100, 200), "center", crop=56, resize=64)[0]
    map = view.map_to_image(torch.ones(7, 7))
    assert map.shape == (100, 200)
    assert map[:, :55].sum() == 0
    assert map[50, 100] == 1


@pytest.mark.parametrize("seed", range(5))
def test_largest_component_agrees_with_scipy(seed):
    mask = np.random.default_rng(seed).random((30, 40)) < 0.3
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = [(labels == k).sum() for k in range(1, count + 1)]
    region = largest_component(mask)
    assert region.sum() == max(sizes)
    assert (mask | ~region).all()
    assert len(np.unique(labels[region])) == 1


def test_iou_by_hand():
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1.0
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 2, 2), (2, 0, 4, 2)) == 0.0


def test_bad_arguments_say_what_is_expected(untyped):
    with pytest.raises(ValueError, match=r"shape \(h, w\), got \(1, 4, 4\)"):
        map_to_box(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"`threshold` in \[0, 1\), got 15"):
        map_to_box(torch.zeros(4, 4), 15)
    with pytest.raises(ValueError, match=r"`rule` in \('component', .*, got 'largest'"):
        map_to_box(torch.zeros(4, 4), rule="largest")
    with pytest.raises(ValueError, match=r"`rule` in .*, got 'largest'"):
        mask_to_box(np.zeros((4, 4), bool), rule="largest")
    with pytest.raises(ValueError, match="`thresholds` in ascending order"):
        sweep_boxes(torch.zeros(4, 4), np.array([0.5, 0.1]))
    with pytest.raises(ValueError, match=r"`threshold` in \[0, 1\), got 1.0"):
        sweep_boxes(torch.zeros(4, 4), np.array([0.5, 1.0]))
    with pytest.raises(ValueError, match=r"`keep` in \('largest', 'all'\), got 'some'"):
        sweep_boxes(torch.zeros(4, 4), keep="some")
    with pytest.raises(ValueError, match="`window` as an odd number from 3, got 4"):
        peaks(torch.zeros(4, 4), window=4)
    image = np.zeros((6, 8, 3), np.uint8)
    for cut in (grabcut, simonyan):
        with pytest.raises(ValueError, match=r"image's size \(6, 8\), got \(4, 4\); resize"):
            cut(image, torch.zeros(4, 4))
    with pytest.raises(ValueError, match="`background` < `foreground` <= 1, got 0.5 and 0.4"):
        simonyan(image, torch.zeros(6, 8), foreground=0.4, background=0.5)
    with pytest.raises(ValueError, match=r"inside the resized image \(200, 200\), got \(224, 224"):
        View((50, 50), (200, 200), (0, 0), (224, 224))
    with pytest.raises(ValueError, match=r"`preset` in .*, got 'fivecrop'"):
        views((50, 50), "fivecrop")
    view = views((50, 60))[0]
    with pytest.raises(ValueError, match=r"image's size \(50, 60\), got \(60, 50\)"):
        view.pixels(np.zeros((60, 50, 3), np.uint8))
    with pytest.raises(ValueError, match="one map per view, got 2 maps, 1 views"):
        join_crops(torch.zeros(2, 7, 7), [view])
    with pytest.raises(ValueError, match="views of one resized image, got several"):
        join_crops(torch.zeros(2, 7, 7), [view, views((60, 50))[0]])
