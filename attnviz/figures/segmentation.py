"""Figures of segmentation: pictures, true masks, and the masks or pseudo labels of several ways.

They are drawn from folders of label pictures ``IMAGE_ID.png``, as pseudo-label runs and
segmentation networks write them; see :mod:`attnviz.segment`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from textwrap import wrap

import numpy as np
from jaxtyping import UInt8

from ..data.masks import IGNORE, MaskedImage, read_label_picture, voc_colors
from ..data.scenes import CLASS_NAMES, Scene, draw_scene
from ..data.voc import VOC_CLASS_NAMES
from ..images import to_pixels
from ..networks import bundled_folder
from .sheet import COLUMN, PAGE, Sheet, enlarged, greyed, picture_grid

__all__ = ["FIGURES"]

_Truth = tuple[str, UInt8[np.ndarray, "h w 3"], np.ndarray]  # name, picture, mask


@dataclass(frozen=True)
class MaskKind:
    title: str
    columns: tuple[str, ...]
    width: float
    most: int = 3  # pictures


FIGURES = {
    "2.5": MaskKind("Pictures of several classes, and their masks", (), COLUMN),
    "3.9": MaskKind("Segmentation with more stages", ("S5", "S5+S4", "S5+S4+S3"), PAGE),
    "4.8": MaskKind("Segmentation by OAA and OAA+", ("OAA", "OAA+"), COLUMN),
    "4.9": MaskKind(
        "Pseudo labels of the trained model and of its accumulated maps",
        ("OAA++ model", "OAA++"), COLUMN,
    ),
}  # fmt: skip


def draw_masks(
    number: str,
    kind: MaskKind,
    masks: Mapping[str, object] | None,
    pictures: Iterable[MaskedImage] | None,
    seed: int,
) -> Sheet:
    """Draws a figure; of the bundled folders, or of given ones in the columns' order."""
    if not kind.columns:
        items = _crowded(kind.most, pictures, seed)
        return _drawn(number, kind, {}, items, [_classes(i, mask) for i, _, mask in items])
    if masks is None:
        folder = bundled_folder() / "masks" / number
        masks = {name: folder / name.replace(" ", "_") for name in kind.columns}
    if len(masks) != len(kind.columns):
        raise ValueError(
            f"expected {len(kind.columns)} folders of masks for figure {number} "
            f"({', '.join(kind.columns)}), got {len(masks)}"
        )
    folders = {name: Path(folder) for name, folder in masks.items()}
    found = [{path.stem for path in folder.glob("*.png")} for folder in folders.values()]
    shared = sorted(set.intersection(*found))
    if not shared:
        raise ValueError(
            "expected label pictures IMAGE_ID.png of the same images in all of "
            f"{', '.join(str(folder) for folder in folders.values())}, got none"
        )
    items = _items(shared[: kind.most], pictures, seed)
    return _drawn(number, kind, folders, items, [""] * len(items))


def _drawn(
    number: str, kind: MaskKind, folders: Mapping[str, Path], items: Sequence[_Truth],
    labels: Sequence[str],
) -> Sheet:  # fmt: skip
    rows = []
    for image_id, picture, truth in items:
        drawn = [read_label_picture(folder / f"{image_id}.png") for folder in folders.values()]
        rows.append([enlarged(picture), *(_laid(picture, labels) for labels in [truth, *drawn])])
    titles = ["picture", "true mask", *folders]
    figure = picture_grid(rows, titles, labels, kind.width)[0]
    named = ", ".join(f"{name}: {folder.name}" for name, folder in folders.items())
    named = f"masks {named}; " if named else ""
    figure.facts = f"figure {number}; {named}{', '.join(i for i, _, _ in items)}"
    return figure


def _crowded(most: int, pictures: Iterable[MaskedImage] | None, seed: int) -> list[_Truth]:
    # The first pictures whose masks show two classes or more.
    if pictures is None:
        found = (_truth(draw_scene(i, split="val", seed=seed, objects="several"))
                 for i in count())  # fmt: skip
    else:
        read = ((item, item.read_mask()) for item in pictures)
        found = ((item.image_id, to_pixels(item.read()), mask)
                 for item, mask in read if mask is not None)  # fmt: skip
    several = (each for each in found if len(set(np.unique(each[2])) - {0, IGNORE}) > 1)
    if not (chosen := list(islice(several, most))):
        raise ValueError("expected `pictures` with masks of two classes or more, got none")
    return chosen


def _items(
    image_ids: Sequence[str], pictures: Iterable[MaskedImage] | None, seed: int
) -> list[_Truth]:
    if pictures is None:
        return [_generated(image_id, seed) for image_id in image_ids]
    known = {item.image_id: item for item in pictures if item.image_id in set(image_ids)}
    lacking = [image_id for image_id in image_ids if image_id not in known]
    if lacking:
        raise ValueError(f"expected `pictures` with {lacking[0]!r}, whose mask is given, got none")
    return [(i, to_pixels(known[i].read()), known[i].read_mask()) for i in image_ids]


def _generated(image_id: str, seed: int) -> _Truth:
    match = re.fullmatch(r"scenes-(train|val|test)-(\d+)", image_id)
    if match is None:
        raise ValueError(f"expected masks of generated scenes, got {image_id!r}; give `pictures`")
    return _truth(draw_scene(int(match[2]), split=match[1], seed=seed, objects="few"))


def _classes(image_id: str, mask: np.ndarray) -> str:
    # The names of what a mask shows, of VOC or of the generated scenes.
    names = CLASS_NAMES if image_id.startswith("scenes-") else VOC_CLASS_NAMES
    shown = ", ".join(names[label - 1] for label in np.unique(mask) if 0 < label < IGNORE)
    return "\n".join(wrap(shown, 20))


def _truth(scene: Scene) -> _Truth:
    labels = np.zeros(scene.image.shape[:2], np.uint8)
    for each in scene.objects:
        labels[each.mask] = each.class_id + 1
    return scene.image_id, scene.image, labels


def _laid(
    picture: UInt8[np.ndarray, "h w 3"], labels: UInt8[np.ndarray, "h w"] | None
) -> UInt8[np.ndarray, "H W 3"]:
    # Labels in VOC's colors over the greyed picture; what is not labeled is light.
    large = greyed(enlarged(picture), 0.6)
    if labels is None:
        return large
    rows = np.arange(large.shape[0]) * labels.shape[0] // large.shape[0]
    columns = np.arange(large.shape[1]) * labels.shape[1] // large.shape[1]
    shown = labels[rows[:, None], columns]
    mixed = np.where((shown > 0)[..., None], 0.25 * large + 0.75 * voc_colors()[shown], large)
    mixed[shown == IGNORE] = 235
    return mixed.astype(np.uint8)
