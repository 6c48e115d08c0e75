r"""Gradient-based activation propagation (gAP): which channels a decision rests on.

Symbols: :math:`d` is a decision, a class score or one open neuron of a deeper stage;
:math:`F^k_{xy}` channel :math:`k` of a stage's activation, :math:`G = \partial d / \partial F`
its gradient, :math:`A` the attention maps, :math:`Z = hw` the positions of the stage. Maps are
signed and lie at the stage's resolution. Nothing here runs a network: see :mod:`attnviz.crops`.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import check_choice

__all__ = [
    "Score",
    "attention",
    "channel_scores",
    "contributions",
    "explained_fraction",
    "peak",
    "shares",
    "suppress",
]

Score = Literal["AA", "MA", "AG", "MG"]


def attention(
    activation: Float[Tensor, "*b c h w"], gradient: Float[Tensor, "*b c h w"]
) -> Float[Tensor, "*b c h w"]:
    r"""Propagates a decision to each place of each channel: :math:`A = G \cdot F` (5.3).

    In a network without biases the maps of a stage sum to the decision exactly.
    """
    return gradient * activation


def contributions(maps: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c"]:
    r"""Averages each channel's map: :math:`\alpha_k = \frac{1}{Z} \sum_{xy} A^k_{xy}` (5.4)."""
    return maps.mean(dim=(-2, -1))


def channel_scores(
    activation: Float[Tensor, "*b c h w"],
    gradient: Float[Tensor, "*b c h w"],
    score: Score = "AA",
) -> Float[Tensor, "*b c"]:
    """Scores each channel for a decision in one of the ways of thesis table 5.1.

    Args:
        activation: The stage's activation.
        gradient: The gradient of the decision.
        score: ``AA``: mean of the attention map, the contribution of Eq. 5.4. ``MA``: its
            maximum. ``AG``: mean of the gradient. ``MG``: its maximum.
    """
    check_choice("score", score, Score)
    values = attention(activation, gradient) if score[1] == "A" else gradient
    return values.mean(dim=(-2, -1)) if score[0] == "A" else values.amax(dim=(-2, -1))


def peak(map: Float[Tensor, "h w"]) -> tuple[int, int]:
    """Finds the row and column of the largest value (5.5), the first in reading order."""
    row, column = divmod(int(map.flatten().argmax()), map.shape[1])
    return row, column


def shares(contributions: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """Divides the positive contributions by their sum; negative ones get 0, as all do if none."""
    positive = contributions.relu()
    total = positive.sum(dim=-1, keepdim=True)
    return positive / total.clamp_min(torch.finfo(positive.dtype).tiny)


def explained_fraction(
    maps: Float[Tensor, "*b c h w"], decision: Float[Tensor, "*b"]
) -> Float[Tensor, "*b"]:
    r"""Divides what the maps sum to by the decision: :math:`\sum_{kxy} A^k_{xy} / d`.

    1 where no bias takes part. It may lie below 0 or above 1; NaN or infinite for a decision
    of 0.
    """
    return maps.sum(dim=(-3, -2, -1)) / decision


def suppress(
    maps: Float[Tensor, "c h w"],
    contributions: Float[Tensor, " c"],
    threshold: float = 0.9,
    most: int | None = None,
) -> tuple[int, ...]:
    r"""Keeps, of the channels that light up the same places, the one that contributes most.

    Each map is made a mask at half of its maximum, a choice where the thesis is silent. Going
    down the positive contributions, a channel is dropped whose mask overlaps that of one kept
    with an intersection over union above `threshold`.

    Args:
        maps: One decision's maps.
        contributions: One for each channel.
        threshold: The overlap from which two channels count as one.
        most: Stop when so many are kept; never if None.

    Returns:
        The channels kept, the largest contribution first.

    References:
        Thesis section 5.3.1.3.
    """
    order = contributions.argsort(descending=True, stable=True)
    order = order[contributions[order] > 0]
    flat = maps[order].flatten(1)
    masks = (flat >= flat.amax(dim=1, keepdim=True) / 2).float()  # whose counts are exact
    shared, areas = masks @ masks.T, masks.sum(dim=1)
    same = shared / (areas[:, None] + areas - shared) > threshold
    kept: list[int] = []
    dropped = torch.zeros(len(order), dtype=torch.bool, device=maps.device)
    for place, channel in enumerate(order.tolist()):
        if len(kept) == most:
            break
        if not dropped[place]:
            kept.append(channel)
            dropped |= same[place]
    return tuple(kept)
