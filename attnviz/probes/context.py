"""What lies under the maps: parts, objects and contexts, by masks that people or programs drew.

:func:`map_labels` names what the channels behind a class lie on (thesis figures 5.13, 5.14);
:func:`concept_overlap` and :func:`concept_detectors` ask, on generated scenes, whether they lie on
what makes the class.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from tqdm import tqdm

from ..cam import resize
from ..crops import decompose, run
from ..data.scenes import CLASS_CONTEXTS, CLASS_NAMES, CLASS_PARTS, Scene
from ..stages import Staged

if TYPE_CHECKING:
    from ..tree import Evidence

__all__ = [
    "concept_detectors",
    "concept_overlap",
    "label_regions",
    "label_shares",
    "map_labels",
    "scene_concepts",
    "scene_regions",
]

Regions = Mapping[str, Bool[np.ndarray, "h w"]]


# ------------------------------------------------------------------------------------- regions


def label_regions(
    mask: Integer[np.ndarray, "h w"], names: Sequence[str], *, ignore: int = 255
) -> dict[str, Bool[np.ndarray, "h w"]]:
    """Splits a mask of PASCAL-Context or VOC into the region of each label in it.

    Args:
        mask: 0 for background, which has no region, from 1 on the labels.
        names: Names of the labels, from 1 on.
        ignore: A value without a region.
    """
    present = [int(value) for value in np.unique(mask) if value not in (0, ignore)]
    return {names[value - 1]: mask == value for value in present}


def scene_regions(scene: Scene) -> dict[str, Bool[np.ndarray, "h w"]]:
    """Collects the regions of a scene: its objects by class, and its contexts."""
    regions: dict[str, np.ndarray] = {}
    for item in scene.objects:
        name = CLASS_NAMES[item.class_id]
        regions[name] = regions.get(name, False) | item.mask
    return regions | scene.contexts


def scene_concepts(scene: Scene) -> dict[str, Bool[np.ndarray, "h w"]]:
    """Collects the regions of a scene's parts, by name over all objects, and its contexts."""
    regions: dict[str, np.ndarray] = {}
    for item in scene.objects:
        for name, mask in item.parts.items():
            regions[name] = regions.get(name, False) | mask
    return {name: mask for name, mask in (regions | scene.contexts).items() if mask.any()}


# -------------------------------------------------------------------------------------- labels


def map_labels(tree: "Evidence", regions: Regions, *, level: float = 0.5) -> pd.DataFrame:
    """Names, for each map of a tree, the region that it overlaps most.

    A map is resized to the regions and cut at `level` of its maximum, a choice where the thesis
    is silent.

    Args:
        tree: The evidence for a class.
        regions: Masks by name, of the picture that the tree explains, at any one size.
        level: Where a map is cut, as a share of its maximum.

    Returns:
        One row for each edge: ``class_id``, ``parent``, ``stage``, ``channel``, ``share``,
        ``label``, the region of the largest intersection over union, and its ``iou``; where
        no region is met the label is None.

    References:
        Thesis section 5.3.2.3.
    """
    rows = []
    names = list(regions)
    for edge in tree.edges:
        node = tree.nodes[edge.child]
        label, iou = None, 0.0
        if names:
            masks = torch.from_numpy(np.stack([regions[name] for name in names]))
            found = _ious(edge.map[None].cpu(), masks, level)[0]
            iou = float(found.max())
            label = names[int(found.argmax())] if iou > 0 else None
        rows.append([tree.class_id, edge.parent, node.stage, node.channel, edge.share, label, iou])
    columns = ["class_id", "parent", "stage", "channel", "share", "label", "iou"]
    return pd.DataFrame(rows, columns=columns)


def label_shares(table: pd.DataFrame, stage: int | None = None) -> pd.DataFrame:
    """Counts how often the maps of each class lie on each label.

    Args:
        table: Rows of :func:`map_labels`, of any number of images.
        stage: Only maps of this stage; all if None.

    Returns:
        The share of each label (columns) among the maps of each class (rows), 0 to 1; the
        column ``none`` counts maps that meet no region.

    References:
        Thesis figure 5.14.
    """
    chosen = table if stage is None else table[table["stage"] == stage]
    return pd.crosstab(chosen["class_id"], chosen["label"].fillna("none"), normalize="index")


# ------------------------------------------------------------------------------------- concepts


def concept_overlap(
    net: Staged,
    scenes: Iterable[Scene],
    *,
    stage: int | None = None,
    top: int = 3,
    level: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Measures whether the channels behind a class lie on what makes it that class.

    Each class in a scene is decomposed into one stage. The maps of its `top` channels, cut at
    `level` of their maximum, are compared with the class' own part and its context where these
    are in sight. As a control stand beside them as many channels drawn from all others that the
    class depends on, for better or worse, by the size of their maps without the sign.

    Args:
        net: A network of the classes of *scenes*.
        scenes: Scenes with masks.
        stage: The stage; the deepest if None.
        top: How many channels.
        level: Where a map is cut.
        seed: Number behind the control.
        progress: Whether to show a bar.

    Returns:
        One row for each channel: ``image_id``, ``class_id``, ``chosen`` (``evidence`` or
        ``random``), ``rank``, ``channel``, ``share``; the intersection over union with the own
        ``part``, the own ``context`` and the whole ``object``, NaN for what is not in sight; and
        the name and overlap of the ``best`` of all concepts in the scene, ``best_iou``.
    """
    deepest = len(net.stage_names) if stage is None else net.check_stages([stage])[0]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for scene in tqdm(scenes, "concepts", unit="scene", delay=2, disable=not progress):
        forward = run(net, net.preprocess(scene.image))
        concepts, regions = scene_concepts(scene), scene_regions(scene)
        names = list(concepts)
        masks = torch.from_numpy(np.stack([concepts[name] for name in names]))
        for class_id in scene.class_ids:
            [window] = decompose(forward, class_id, deepest)
            maps, alphas = window.attention.cpu(), window.contributions.cpu()
            order = alphas.argsort(descending=True, stable=True)
            best = order[alphas[order] > 0][:top]
            others = maps.flatten(1).abs().amax(dim=1) > 0
            others[best] = False
            others = others.nonzero()[:, 0]
            drawn = others[torch.randperm(len(others), generator=generator)][: len(best)]
            name = CLASS_NAMES[class_id]
            own = {"part": CLASS_PARTS[name], "context": CLASS_CONTEXTS[name]}
            positive = alphas.relu().sum()
            for chosen, channels, shown in (
                ("evidence", best, maps[best]), ("random", drawn, maps[drawn].abs())
            ):  # fmt: skip
                ious = _ious(shown, masks, level)
                whole = _ious(shown, torch.from_numpy(regions[name])[None], level)
                for rank, channel in enumerate(channels.tolist()):
                    found = dict(zip(names, ious[rank].tolist(), strict=True))
                    most = max(found, key=found.get)
                    rows.append(
                        {
                            "image_id": scene.image_id, "class_id": class_id, "chosen": chosen,
                            "rank": rank + 1, "channel": channel,
                            "share": float(alphas[channel].relu() / positive),
                            **{kind: found.get(n, float("nan")) for kind, n in own.items()},
                            "object": float(whole[rank, 0]), "best": most, "best_iou": found[most],
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def concept_detectors(
    net: Staged,
    scenes: Sequence[Scene],
    *,
    stage: int | None = None,
    quantile: float = 0.98,
    batch_size: int = 32,
) -> pd.DataFrame:
    r"""Finds which part or context each channel detects over a whole data set.

    A channel's activations are cut at one value for all scenes, which the share `quantile` of
    them does not exceed; the masks at this value are compared with those of a concept:

    .. math:: \mathrm{IoU} = \frac{\sum |M_k \cap C|}{\sum |M_k \cup C|}

    with both sums over all scenes.

    Args:
        net: The network.
        scenes: Scenes with masks.
        stage: The stage; the deepest if None.
        quantile: Share of a channel's activations below its cut.
        batch_size: Scenes in one forward pass.

    Returns:
        The overlap of each channel (rows) with each concept (columns). A channel that is open in
        fewer places than the quantile leaves has overlaps from these places.

    References:
        Network Dissection (Bau et al., 2017), https://arxiv.org/abs/1704.05796.
    """
    deepest = len(net.stage_names) if stage is None else net.check_stages([stage])[0]
    scenes = list(scenes)
    kept = []
    for start in range(0, len(scenes), batch_size):
        part = scenes[start : start + batch_size]
        batch = torch.cat([net.preprocess(scene.image) for scene in part])
        with torch.no_grad():
            kept.append(net.activations(batch)[0][deepest - 1].float().cpu())
    activations = torch.cat(kept)
    values = activations.transpose(0, 1).flatten(1).numpy()
    cuts = torch.from_numpy(np.quantile(values, quantile, axis=1)).float()
    concepts = [scene_concepts(scene) for scene in scenes]
    names = sorted({name for each in concepts for name in each})
    size = scenes[0].image.shape[:2]
    shared = torch.zeros(activations.shape[1], len(names))
    areas, sizes = torch.zeros(activations.shape[1], 1), torch.zeros(len(names))
    for activation, found in zip(activations, concepts, strict=True):
        large = resize(activation, size)
        masks = ((large > cuts[:, None, None]) & (large > 0)).flatten(1).float()
        empty = np.zeros(size, bool)
        drawn = np.stack([found.get(name, empty) for name in names])
        wanted = torch.from_numpy(drawn).flatten(1).float()
        shared += masks @ wanted.T
        areas += masks.sum(dim=1, keepdim=True)
        sizes += wanted.sum(dim=1)
    ious = shared / (areas + sizes - shared)
    return pd.DataFrame(ious.numpy(), columns=names).rename_axis("channel")


def _ious(
    maps: Float[Tensor, "n _ _"], masks: Bool[Tensor, "m h w"], level: float
) -> Float[Tensor, "n m"]:
    # Overlap of each map, resized and cut, with each mask; 0 for a map without a positive value.
    large = resize(maps, tuple(masks.shape[1:]))
    top = large.amax(dim=(1, 2), keepdim=True)
    cut = ((large >= level * top) & (top > 0)).flatten(1).double()
    wanted = masks.flatten(1).double()
    shared = cut @ wanted.T
    union = cut.sum(dim=1, keepdim=True) + wanted.sum(dim=1) - shared
    return shared / union.clamp_min(1)
