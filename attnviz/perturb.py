"""Looks at an image through the channels of an activation, one after another.

What a mask hides becomes zero, which in a normalized image is the mean color. Used by
:func:`attnviz.explain.scorecam`; nothing here knows classes or stages.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .cam import resize

__all__ = ["channel_masks", "channel_scores", "informative_channels"]


def informative_channels(
    activation: Float[Tensor, "b c h w"], most: int | None = None
) -> Bool[Tensor, "b c"]:
    """Finds the channels that vary over their positions, at most the `most` that vary most."""
    flat = activation.flatten(2)
    varied = flat.amax(dim=2) > flat.amin(dim=2)
    if most is None or most >= varied.shape[1]:
        return varied
    chosen = flat.var(dim=2, correction=0).topk(most, dim=1).indices
    return varied & torch.zeros_like(varied).scatter(1, chosen, True)


def channel_masks(
    channels: Float[Tensor, "n h w"], size: tuple[int, int]
) -> Float[Tensor, "n H W"]:
    r"""Turns channels into masks :math:`(U - \min U) / (\max U - \min U)`, in [0, 1].

    :math:`U` is the channel resized bilinearly, pixel centers aligned (``align_corners=False``).
    A constant channel has no mask: leave it out, see :func:`informative_channels`.
    """
    large = resize(channels, size)
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    return (large - low) / (high - low).clamp_min(torch.finfo(large.dtype).tiny)


def channel_scores(
    score: Callable[[Float[Tensor, "n d H W"], Int[Tensor, " n"]], Float[Tensor, "n k"]],
    images: Float[Tensor, "b d H W"],
    activation: Float[Tensor, "b c h w"],
    chosen: Bool[Tensor, "b c"],
    batch_size: int,
) -> Float[Tensor, "b c k"] | None:
    """Scores each image seen through each chosen channel alone.

    Args:
        score: From masked images and the places of their originals in `images` to `k` values.
        images: The images.
        activation: Their activation, whose channels are the masks.
        chosen: The channels to run.
        batch_size: Masked images that exist at one time.

    Returns:
        The values, 0 for other channels; None if no channel is chosen.
    """
    rows, places = chosen.nonzero(as_tuple=True)
    found = []
    for start in range(0, len(rows), batch_size):
        row, place = (part[start : start + batch_size] for part in (rows, places))
        masks = channel_masks(activation[row, place], images.shape[-2:]).to(images.dtype)
        found.append(score(images[row] * masks[:, None], row).to(activation.dtype))
    if not found:
        return None
    values = torch.cat(found)
    scores = values.new_zeros(*chosen.shape, values.shape[1])
    scores[rows, places] = values
    return scores
