"""PASCAL VOC 2012: pictures with image-level classes and segmentation masks.

The official folder, or what is there of it, with the augmented masks (10,582 training pictures)
and lists of classes that are usually put beside::

    JPEGImages/2007_000032.jpg
    SegmentationClass/2007_000032.png      SegmentationClassAug/2007_000032.png
    ImageSets/Segmentation/train.txt       val.txt, trainval.txt, train_aug.txt: one name a line
    Annotations/2007_000032.xml            objects with a class and a box
    train_aug_cls.txt                      2007_000032 0 14       classes from 0, of each picture

Masks may be palette pictures, as published, grey ones, or RGB in VOC's colors.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from tqdm import tqdm

from ..checks import check_choice
from .folder import Problems, check_limit, list_names, read_lines
from .masks import MaskedImages, read_label_picture

__all__ = ["VOC_CLASS_NAMES", "load_voc"]

VOC_CLASS_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
"""The classes, without background, in the order of their numbers."""

Labels = Literal["auto", "list", "boxes", "masks"]
Masks = Literal["auto", "SegmentationClass", "SegmentationClassAug", "none"]
_NUMBER = {name: number for number, name in enumerate(VOC_CLASS_NAMES)}


def load_voc(
    root: str | Path,
    split: str = "val",
    *,
    labels: Labels = "auto",
    masks: Masks = "auto",
    limit: int | None = None,
    progress: bool = False,
) -> MaskedImages:
    """Reads the pictures, classes and masks of a split of PASCAL VOC 2012.

    No mask is opened, unless `labels` come from the masks. What a mask is worth is known when it
    is read; see :meth:`MaskedImages.checked`.

    Args:
        root: The folder with ``JPEGImages``, or one with ``VOC2012`` or ``VOCdevkit/VOC2012``.
        split: A list of ``ImageSets/Segmentation`` (or ``Main``), by the name of its file:
            ``train`` (1,464 pictures), ``val`` (1,449), ``trainval``, ``train_aug`` (10,582,
            also as ``trainaug``), ``test`` (no classes, no masks).
        labels: Where the classes come from: the ``list`` SPLIT_cls.txt, the objects with
            ``boxes`` in ``Annotations``, the ``masks``, or ``auto``, the first of these there
            is. Boxes name every object, difficult and cut ones included, also where no mask
            shows it.
        masks: Their folder; ``auto`` takes the augmented one for ``train_aug`` and the official
            one for other splits, or else the other one.
        limit: Keep only so many pictures, the first of the list.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: The folder, the list, or all of its pictures or their classes are not
            there.
        ValueError: `labels`, `masks` or `limit` is none that can be chosen, or a list is no text.
    """
    return read_voc(root, split, Problems(), labels, masks, limit, progress)


def read_voc(
    root: str | Path,
    split: str,
    problems: Problems,
    labels: Labels = "auto",
    masks: Masks = "auto",
    limit: int | None = None,
    progress: bool = False,
) -> MaskedImages:
    """Does the work of :func:`load_voc`; `problems` has what was found also if that raises."""
    for name, value, choices in (("labels", labels, Labels), ("masks", masks, Masks)):
        check_choice(name, value, choices)
    check_limit(limit)
    folder = find_voc(Path(root))
    listed = _find_list(folder, split)
    image_ids = _names(listed, problems)

    files = {PurePosixPath(name).stem: name for name in list_names(folder / "JPEGImages")}
    problems.add_all(
        f"pictures of {listed.name} that are not there", (i for i in image_ids if i not in files)
    )
    image_ids = [image_id for image_id in image_ids if image_id in files][:limit]
    if not image_ids:
        raise FileNotFoundError(
            f"expected pictures of {listed.name} in {str(folder / 'JPEGImages')!r}, found none; "
            "unpack the archive again"
        )
    sources = {"images": str(folder / "JPEGImages"), "split": str(listed)}
    paths = _mask_paths(folder, split, masks)
    found = [paths.get(image_id) for image_id in image_ids]
    if any(found):
        sources["masks"] = str(next(filter(None, found)).parent)
    if masks != "none" and split != "test":  # whose masks are not published
        bare = (i for i, mask in zip(image_ids, found, strict=True) if mask is None)
        problems.add_all(f"masks of {listed.name} that are not there", bare)

    class_ids, source = _classes(folder, split, labels, image_ids, found, problems, progress)
    if source is not None:
        sources["labels"] = str(source)
    keep = [i for i, classes in enumerate(class_ids) if classes is not None]
    if not keep:
        other = ", such as 'masks'" if any(found) and labels != "masks" else ""
        raise FileNotFoundError(
            f"expected the classes of {listed.name}'s pictures in {str(source)!r}, found none; "
            f"choose other `labels`{other}"
        )
    return MaskedImages(
        folder / "JPEGImages",
        [image_ids[i] for i in keep],
        [files[image_ids[i]] for i in keep],
        [class_ids[i] for i in keep],
        [found[i] for i in keep],
        read_label_picture,
        class_names=VOC_CLASS_NAMES, split=split, problems=problems.lines(), sources=sources,
    )  # fmt: skip


def find_voc(root: Path) -> Path:
    """The folder with ``JPEGImages``: `root` or VOC2012 below it."""
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise FileNotFoundError(
        f"expected JPEGImages of PASCAL VOC in {str(root)!r} or its VOCdevkit/VOC2012, found "
        "none; unpack VOCtrainval_11-May-2012.tar there"
    )


def _plain(name: str) -> str:
    # train_aug and trainaug are one split
    return re.sub("[^a-z0-9]", "", name.lower())


def _find_list(folder: Path, split: str) -> Path:
    lists = folder / "ImageSets" / "Segmentation"
    for place in (lists, folder / "ImageSets" / "Main"):
        for path in sorted(place.glob("*.txt")):
            if _plain(path.stem) == _plain(split):
                return path
    there = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
    raise FileNotFoundError(f"expected the list {split}.txt in {str(lists)!r}; there: {there}")


def _names(path: Path, problems: Problems) -> list[str]:
    # Some lists name files: "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png"
    names = [PurePosixPath(line.split()[0]).stem for line in read_lines(path) if line.strip()]
    unique = list(dict.fromkeys(names))
    if len(unique) < len(names):
        problems.add(f"names that come twice in {path.name}", f"{len(names) - len(unique)}")
    return unique


def _mask_paths(folder: Path, split: str, masks: str) -> dict[str, Path]:
    if masks == "none":
        return {}
    places = ["SegmentationClassAug", "SegmentationClass"]  # the last one wins
    if masks != "auto":
        places = [masks]
    elif _plain(split).endswith("aug"):
        places.reverse()
    return {
        name[:-4]: folder / place / name
        for place in places
        for name in list_names(folder / place)
        if name.lower().endswith(".png")
    }


def _classes(
    folder: Path,
    split: str,
    labels: str,
    image_ids: Sequence[str],
    masks: Sequence[Path | None],
    problems: Problems,
    progress: bool,
) -> tuple[list[tuple[int, ...] | None], Path | None]:
    # The classes of each picture, None where they are not known, and where they come from.
    listed = next(
        (p for p in sorted(folder.glob("*_cls.txt")) if _plain(p.stem) == _plain(f"{split}cls")),
        folder / f"{split}_cls.txt",
    )
    boxes = folder / "Annotations"
    if labels == "auto":
        if listed.is_file():
            labels = "list"
        elif boxes.is_dir():
            labels = "boxes"
        elif any(masks):
            labels = "masks"
        else:
            if split != "test":
                problems.add("classes that are not there", f"{listed.name}, Annotations, masks")
            return [()] * len(image_ids), None
    if labels == "list":
        if not listed.is_file():
            raise FileNotFoundError(f"expected the classes in {str(listed)!r}, found none")
        found = _read_classes(listed, problems)
        classes, source = [found.get(image_id) for image_id in image_ids], listed
    elif labels == "boxes":
        bar = tqdm(image_ids, "classes", unit="image", leave=False, disable=not progress)
        classes, source = [_box_classes(boxes / f"{i}.xml", problems) for i in bar], boxes
    else:
        bar = tqdm(masks, "classes", unit="mask", leave=False, disable=not progress)
        classes = [mask and _mask_classes(mask, problems) for mask in bar]
        source = next((mask.parent for mask in masks if mask), None)
    lost = (i for i, known in zip(image_ids, classes, strict=True) if known is None)
    problems.add_all("pictures without classes, left out", lost)
    return classes, source


def _read_classes(path: Path, problems: Problems) -> dict[str, tuple[int, ...]]:
    found = {}
    for number, line in enumerate(read_lines(path), start=1):
        name, *words = line.split() or [""]
        if not name:
            continue
        try:
            classes = {int(word) for word in words}
        except ValueError:
            problems.add(f"lines of {path.name} that are no classes, left out", f"line {number}")
            continue
        if any(not 0 <= class_id < len(VOC_CLASS_NAMES) for class_id in classes):
            kind = f"classes outside 0 to {len(VOC_CLASS_NAMES) - 1} in {path.name}, left out"
            problems.add(kind, f"line {number}")
            continue
        found[PurePosixPath(name).stem] = tuple(sorted(classes))
    return found


def _box_classes(path: Path, problems: Problems) -> tuple[int, ...] | None:
    try:
        objects = ElementTree.parse(path).iterfind("object/name")
        names = {(name.text or "").strip() for name in objects}
    except FileNotFoundError:
        return None
    except (ElementTree.ParseError, ValueError, LookupError, OSError):
        problems.add("annotations that cannot be read", path.name)
        return None
    if names - _NUMBER.keys():
        unknown = sorted(names - _NUMBER.keys())[0]
        problems.add("objects of other classes than VOC's", f"{path.name} ({unknown})")
    return tuple(sorted(_NUMBER[name] for name in names & _NUMBER.keys()))


def _mask_classes(path: Path, problems: Problems) -> tuple[int, ...] | None:
    try:
        values = np.unique(read_label_picture(path)).tolist()
    except (ValueError, OSError):
        problems.add("masks that cannot be read", path.name)
        return None
    return tuple(value - 1 for value in values if 0 < value <= len(VOC_CLASS_NAMES))
