import numpy as np
import pytest
import torch
from scipy import ndimage

from attnviz.localize import box_iou, largest_component, map_to_box


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
    map = torch.zeros(70, 90)
    for step in range(60):  # a diagonal of 120 pixels in a rectangle of 60 x 61
        map[step, step] = map[step, step + 1] = 1.0
    map[65:70, 0:88] = 1.0  # 440 pixels
    assert map_to_box(map) == (0, 65, 88, 70)


def test_a_map_without_a_positive_value_has_no_box():
    assert map_to_box(torch.zeros(4, 4)) is None
    assert map_to_box(-torch.ones(4, 4)) is None


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
