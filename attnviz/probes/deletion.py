r"""Deletion, insertion and average drop: does a score depend on the places that a map names?

Symbols: :math:`p(x)` is the probability of one class for image :math:`x`, :math:`M` an attention
map; ``b`` images, ``p`` points of a curve. These measures need no box and no mask, but the images
they are taken on are unlike any that the network was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..cam import normalize, resize
from ..checks import check_choice, check_whole
from ..stages import Staged
from .occlusion import Fill, _check_maps, _chosen, _filling

__all__ = ["Curves", "average_drop", "deletion_curves"]


@dataclass(frozen=True, eq=False)
class Curves:
    """The probability of a class while its image disappears, and while it appears."""

    shares: Float[Tensor, " p"]
    """Share of the pixels that are changed, ascending from 0 to 1."""
    deletion: Float[Tensor, "b p"]
    """The probability without these pixels, the map's strongest; 0 to 1."""
    insertion: Float[Tensor, "b p"]
    """The probability with nothing but them; 0 to 1."""

    def areas(self) -> pd.DataFrame:
        """Returns the areas under both curves, from 0 to 1, by the trapezoidal rule.

        One row per image; columns ``deletion``, where a good map has little, and ``insertion``,
        where it has much. Tables of parts join with ``pandas.concat``.
        """
        columns = {"deletion": self.deletion, "insertion": self.insertion}
        return pd.DataFrame(
            {name: torch.trapezoid(c, self.shares).tolist() for name, c in columns.items()}
        )


def deletion_curves(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None,
    maps: Float[Tensor, "b _ _"],
    *,
    steps: int = 20,
    fill: Fill = "mean",
    canvas: Fill = "blur",
    batch_size: int = 32,
) -> Curves:
    """Takes the pixels of each image away, strongest first, and puts them on an empty one.

    Two forward passes per image and point. Of pixels with equal values in the map, as where it
    is zero, those further up and then further left go first.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image; the highest score's if None.
        maps: The map of that class for each image, raw or not; resized to the images.
        steps: Most steps from the first pixel to the last. They are equally long but for the
            last one.
        fill: What takes the place of pixels in deletion; see :func:`attnviz.probes.occlude`.
        canvas: What insertion begins with; the paper blurs, since the edges of inserted patches
            on an even ground are evidence of their own.
        batch_size: Changed images in one forward pass.

    Returns:
        The curves.

    Raises:
        ValueError: An argument is out of range, or a map is not finite.

    References:
        RISE: Randomized Input Sampling for Explanation of Black-box Models (Petsiuk et al.,
        2018), https://arxiv.org/abs/1806.07421.
    """
    steps = check_whole("steps", steps, 1)
    batch_size = check_whole("batch_size", batch_size, 1)
    for name, value in (("fill", fill), ("canvas", canvas)):
        check_choice(name, value, Fill)
    _check_maps(net, images, maps)
    values = _sized(maps, images)
    ids = _chosen(net, images, class_ids)
    order = values.flatten(1).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1).reshape(values.shape)
    total = order.shape[1]
    counts = torch.tensor([*range(0, total, -(-total // steps)), total], device=images.device)

    def curve(start: Tensor, end: Tensor) -> Tensor:
        found = []
        for chunk in torch.arange(len(images) * len(counts), device=ids.device).split(batch_size):
            image, point = chunk // len(counts), chunk % len(counts)
            changed = ranks[image] < counts[point, None, None]
            mixed = torch.where(changed[:, None], end[image], start[image])
            found.append(_probability(net, mixed, ids[image]))
        return torch.cat(found).reshape(len(images), len(counts))

    covered, empty = (_filling(net, images, kind).expand_as(images) for kind in (fill, canvas))
    return Curves(
        shares=counts.cpu().double() / total,
        deletion=curve(images, covered),
        insertion=curve(empty, images),
    )


def average_drop(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None,
    maps: Float[Tensor, "b _ _"],
) -> pd.DataFrame:
    r"""Looks at each image through its map, and says how much of its confidence is lost.

    .. math:: \mathrm{drop} = \frac{\max(0, \; p(x) - p(x \cdot M / \max M))}{p(x)}

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects: what the map hides gets the mean
            color.
        class_ids: One class for all images or one per image; the highest score's if None.
        maps: The map of that class for each image, raw or not; divided by its maximum, then
            resized to the images.

    Returns:
        One row per image: ``class_id``; ``confidence`` and ``confidence_masked`` from 0 to 1;
        ``drop`` from 0 to 1, 0 for an image without confidence; ``increase``, whether the
        confidence grew. The means of the last two are the published "Average Drop" (lower is
        better) and "Increase in Confidence".

    References:
        Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks (Chattopadhay
        et al., 2018), https://arxiv.org/abs/1710.11063.
    """
    _check_maps(net, images, maps)
    masks = _sized(normalize(maps), images)[:, None]
    ids = _chosen(net, images, class_ids)
    whole, masked = (_probability(net, shown, ids) for shown in (images, images * masks))
    drop = ((whole - masked).relu() / whole).nan_to_num(0.0)
    columns = {"class_id": ids, "confidence": whole, "confidence_masked": masked, "drop": drop}
    columns["increase"] = masked > whole
    return pd.DataFrame({name: column.tolist() for name, column in columns.items()})


def _sized(maps: Tensor, images: Tensor) -> Tensor:
    return resize(maps.detach().to(images), tuple(images.shape[-2:]))


def _probability(net: Staged, images: Tensor, ids: Tensor) -> Tensor:
    scores = net(images).cpu().double()
    probabilities = scores.sigmoid() if net.multilabel else scores.softmax(dim=1)
    return probabilities.gather(1, ids.cpu()[:, None])[:, 0]
