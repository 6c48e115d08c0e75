r"""Measures of a classifier's scores: arithmetic on tensors, without a network.

Symbols: ``b`` images, ``k`` classes. A target is 1 where the class is present, 0 where it is not.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["average_precision", "mean_average_precision"]


def average_precision(
    scores: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]
) -> Float[Tensor, " k"]:
    r"""Area under each class's precision-recall curve, as a sum of steps.

    .. math:: \mathrm{AP} = \sum_n (R_n - R_{n-1}) P_n

    with recall :math:`R_n` and precision :math:`P_n` at the n-th distinct score, highest first;
    images with equal scores enter together, so their order has no influence. This is
    scikit-learn's definition. VOC's (since 2010) first raises each precision to the largest at
    any higher recall, so it is never lower.

    Args:
        scores: Class scores; only their order within a class matters.
        targets: 1 where the class is present, else 0.

    Returns:
        The average precision of each class in [0, 1], float64; NaN for a class that no image has.

    References:
        The PASCAL Visual Object Classes Challenge: A Retrospective (Everingham et al., 2015),
        https://doi.org/10.1007/s11263-014-0733-5.
    """
    columns = zip(scores.double().unbind(1), targets.double().unbind(1), strict=True)
    return torch.stack([_area(score, target) for score, target in columns])


def mean_average_precision(
    scores: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]
) -> Float[Tensor, ""]:
    """Mean of :func:`average_precision` over the classes that occur; NaN if none does."""
    return average_precision(scores, targets).nanmean()


def _area(score: Float[Tensor, " b"], target: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    order = score.argsort(descending=True)
    ends = torch.ones_like(order, dtype=torch.bool)
    ends[:-1] = score[order].diff() != 0  # the last image of each group of equal scores
    found = target[order].cumsum(0)[ends]
    taken = torch.arange(1, len(order) + 1, device=score.device)[ends]
    recall = found / target.sum()
    return (recall.diff(prepend=recall.new_zeros(1)) * found / taken).sum()
