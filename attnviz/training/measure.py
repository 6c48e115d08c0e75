"""What a network knows and where it looks, measured between the epochs of a training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy

import numpy as np
import torch
from jaxtyping import Float
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from ..cam import resize
from ..evolution import Watch
from ..localize import map_to_box
from ..metrics import (
    average_precision,
    class_ranks,
    image_ious,
    localization_hits,
    localization_scores,
    recall_noise,
)
from ..networks import OAANetwork
from ..oaa import accepts, attention
from .pictures import Pictures
from .runs import normalized

__all__ = [
    "Observed", "averages", "by_class", "class_maps", "grids_of", "known", "localize",
    "masked_pairs", "observe", "qualities", "quality_rows", "validate", "watched_pairs", "watches",
]  # fmt: skip

Pair = tuple[int, int]
"""Place of an image in :class:`Pictures`, class."""


class Observed(dict[Pair, Float[Tensor, "h w"]]):
    """Maps of unaltered images by pair, with the scores and what the gate says of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[Pair, float] = {}
        self.accepted: dict[Pair, bool] = {}


def grids_of(
    network: OAANetwork, sizes: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], tuple[int, int]]:
    """Returns height and width of the class maps for each size of image, without computing."""
    shape = deepcopy(network).to("meta")
    return {
        size: tuple(shape.class_maps(torch.empty(1, 3, *size, device="meta")).shape[2:])
        for size in sorted(set(sizes))
    }


@torch.no_grad()
def class_maps(
    network: OAANetwork,
    pictures: Pictures,
    indices: Sequence[int],
    fabric: Fabric,
    *,
    maps_of: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
    text: str | None = None,
) -> Iterator[tuple[list[int], Float[Tensor, "b k h w"]]]:
    """Computes the class maps of unaltered images in eval mode; images that cannot be read lack.

    Args:
        network: The network.
        pictures: Where the images are.
        indices: Which of them.
        fabric: What computes.
        maps_of: What makes the maps; the network's own if None.
        batch_size: Images at once.
        text: What the bar says; no bar if None.
    """
    training = network.training
    network.eval()
    by_size: dict[tuple[int, int], list[int]] = {}
    for i in indices:
        by_size.setdefault(pictures.sizes[i], []).append(i)
    try:
        with tqdm(desc=text, total=len(indices), unit=" images", disable=text is None) as bar:
            for members in by_size.values():
                for start in range(0, len(members), batch_size):
                    part = members[start : start + batch_size]
                    read = [(i, pictures.pixels(i)) for i in part]
                    there = [(i, pixels) for i, pixels in read if pixels is not None]
                    bar.update(len(part))
                    if not there:
                        continue
                    pixels = fabric.to_device(torch.stack([pixels for _, pixels in there]))
                    with fabric.autocast():
                        images = normalized(pixels, network.mean, network.std)
                        found = (maps_of or network.class_maps)(images)
                    yield [i for i, _ in there], found.float()
    finally:
        network.train(training)


def observe(
    network: OAANetwork,
    pictures: Pictures,
    pairs: Iterable[Pair],
    fabric: Fabric,
    *,
    maps_of: Callable[[Tensor], Tensor] | None = None,
    text: str | None = None,
) -> Observed:
    """Returns the attention (Eq. 4.2) of image-class pairs, as the network sees them now."""
    wanted: dict[int, list[int]] = {}
    for i, class_id in pairs:
        wanted.setdefault(i, []).append(class_id)
    observed = Observed()
    for indices, maps in class_maps(
        network, pictures, list(wanted), fabric, maps_of=maps_of, text=text
    ):
        scores = maps.mean(dim=(2, 3))
        passed = accepts(scores, pictures.targets(indices).bool().to(maps.device)).cpu()
        seen, scores = attention(maps).cpu(), scores.cpu()
        for row, i in enumerate(indices):
            for class_id in wanted[i]:
                observed[i, class_id] = seen[row, class_id]
                observed.scores[i, class_id] = float(scores[row, class_id])
                observed.accepted[i, class_id] = bool(passed[row, class_id])
    return observed


def masked_pairs(pictures: Pictures, most: int | None = None) -> list[Pair]:
    """Returns the pairs whose class a mask shows, of at most so many images, spread evenly."""
    chosen = range(len(pictures))
    if most is not None and most < len(pictures):
        chosen = [i * len(pictures) // most for i in range(most)]
    return [
        (i, c) for i in chosen for c in pictures.class_ids[i] if pictures.mask(i, c) is not None
    ]


def qualities(
    pictures: Pictures, pairs: Iterable[Pair], map_of: Callable[[Pair], Tensor | None]
) -> dict[Pair, tuple[float, float]]:
    """Returns recall and noise at half of the maximum of each pair's map, at the mask's size."""
    found = {}
    for pair in pairs:
        map, mask = map_of(pair), pictures.mask(*pair)
        if map is None or mask is None:
            continue
        labels = torch.from_numpy(mask)[None]
        shown = resize(map[None], tuple(mask.shape))
        recall, noise = recall_noise(shown, labels == 1, valid=labels != 255)
        found[pair] = (recall.item(), noise.item())
    return found


def averages(found: Mapping[Pair, tuple[float, float]]) -> tuple[float, float]:
    """Returns recall and noise over all pairs (table 4.11); NaN without any."""
    if not found:
        return math.nan, math.nan
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    return tuple(values.nanmean(dim=0).tolist())


def by_class(
    found: Mapping[Pair, tuple[float, float]], class_names: Sequence[str]
) -> dict[str, dict[str, float | int | None]]:
    """Returns recall and noise of each class that a mask shows (table 4.13)."""
    rows = {}
    for class_id, name in enumerate(class_names):
        part = {pair: value for pair, value in found.items() if pair[1] == class_id}
        if part:
            recall, noise = averages(part)
            rows[name] = {"maps": len(part), "recall": known(recall), "noise": known(noise)}
    return rows


def quality_rows(
    found: Mapping[Pair, tuple[float, float]], pictures: Pictures
) -> dict[str, object]:
    """Returns recall and noise over all maps and by class, for JSON."""
    recall, noise = averages(found)
    return {
        "maps": len(found),
        "recall": known(recall),
        "noise": known(noise),
        "classes": by_class(found, pictures.class_names),
    }


def known(value: float) -> float | None:
    """Returns None for NaN, which JSON does not know."""
    return None if math.isnan(value) else value


def validate(
    network: OAANetwork,
    pictures: Pictures,
    fabric: Fabric,
    *,
    maps_of: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, object]:
    """Returns loss and average precisions on images."""
    scores, targets = [], []
    everything = range(len(pictures))
    for indices, maps in class_maps(network, pictures, everything, fabric, maps_of=maps_of):
        scores.append(maps.mean(dim=(2, 3)).cpu())
        targets.append(pictures.targets(indices))
    scores, targets = torch.cat(scores), torch.cat(targets)
    areas = average_precision(scores, targets)
    return {
        "images": len(scores),
        "loss": binary_cross_entropy_with_logits(scores, targets).item(),
        "mean_average_precision": areas.nanmean().item(),
        "average_precision": {
            name: known(area)
            for name, area in zip(pictures.class_names, areas.tolist(), strict=True)
        },
    }


def watched_pairs(pictures: Pictures, count: int) -> list[Pair]:
    """Chooses pairs to show: one of each of the first images, those with a mask first."""
    pairs = [(i, c) for i in range(min(len(pictures), 50 * count)) for c in pictures.class_ids[i]]
    masked = [pair for pair in pairs if pictures.mask(*pair) is not None]
    chosen, images, classes = [], set(), set()
    for fresh in (True, False):  # different classes first
        for pair in masked or pairs:
            i, class_id = pair
            if len(chosen) == count or i in images or (fresh and class_id in classes):
                continue
            if pictures.pixels(i) is None:
                continue
            chosen.append(pair)
            images.add(i)
            classes.add(class_id)
    return chosen


def watches(
    pictures: Pictures,
    pairs: Sequence[Pair],
    grids: Mapping[tuple[int, int], tuple[int, int]],
) -> list[Watch]:
    """Describes the watched pairs for :class:`attnviz.evolution.EvolutionWriter`."""
    return [
        Watch(
            pictures.image_ids[i], class_id, pictures.item(i).read(), grids[pictures.sizes[i]],
            pictures.mask(i, class_id),
        )
        for i, class_id in pairs
    ]  # fmt: skip


BOX_THRESHOLD = 0.2
"""Share of the maximum that bounds a box; the protocol of CAM, which the thesis refers to."""


def localize(
    network: OAANetwork,
    maps_of: Callable[[Tensor], Tensor],
    pictures: Pictures,
    fabric: Fabric,
) -> dict[str, object]:
    """Scores boxes of unseen images with one class: loc1, loc5 and their parts, in percent.

    A box bounds the largest region above a fifth of the maximum of the true class' map.

    Args:
        network: Says the class.
        maps_of: Makes the maps that boxes come from.
        pictures: The images; those with several classes or without a box are left out.
        fabric: What computes.
    """
    single = [
        i for i, classes in enumerate(pictures.class_ids)
        if len(classes) == 1 and pictures.boxes(i, classes[0])
    ]  # fmt: skip
    if not single:
        return {"images": 0}
    ranks, boxes, truths = [], [], []
    for indices, scores in class_maps(network, pictures, single, fabric):
        class_ids = [pictures.class_ids[i][0] for i in indices]
        ranks.append(class_ranks(scores.mean(dim=(2, 3)).cpu(), class_ids))
    for indices, maps in class_maps(network, pictures, single, fabric, maps_of=maps_of):
        for i, map in zip(indices, attention(maps).cpu(), strict=True):
            class_id = pictures.class_ids[i][0]
            box = map_to_box(map[class_id], BOX_THRESHOLD, size=pictures.item(i).size)
            boxes.append(box)
            truths.append(pictures.boxes(i, class_id))
    hits = localization_hits(np.concatenate(ranks), image_ious(boxes, truths))
    scores = localization_scores(hits)
    return {"images": len(hits), "threshold": BOX_THRESHOLD} | {
        name: {key: 100 * float(scores.loc[name, key]) for key in ("score", "low", "high")}
        for name in scores.index
    }
