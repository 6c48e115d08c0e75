import pytest
import torch
from torch.testing import assert_close

from attnviz.metrics import average_precision, mean_average_precision


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
