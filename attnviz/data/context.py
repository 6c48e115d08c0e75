"""PASCAL-Context: a label for every pixel of 10,103 pictures of PASCAL VOC 2010.

The official parts, those that are there, beside the pictures of VOC (2010, or 2012, which holds
the same ones)::

    trainval/2008_000002.mat               LabelMap, labels of labels.txt
    labels.txt                             1: accordion ... 459 labels
    59_context_labels/2008_000002.png      59 frequent ones, of 59_labels.txt; or 33
    59_labels.txt
    JPEGImages/                            or VOCdevkit/VOC2010, ../voc2012, or `pictures`
    train.txt, val.txt                     optional, one name a line

Without its PNGs a smaller set is made from ``trainval``, label by label of the same name; what
has no name in it is background. With 459 labels masks are 16-bit and 65,535 is left out.
"""

import re
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8, UInt16

from .folder import Problems, check_limit, list_names, read_lines
from .masks import MaskedImages, read_label_picture
from .matlab import read_matrix

__all__ = ["load_context"]

Set = Literal[33, 59, 459]
# The short lists spell three labels otherwise than the long one.
_ALIASES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}


def load_context(
    root: str | Path,
    split: str = "all",
    *,
    labels: Set = 59,
    pictures: str | Path | None = None,
    limit: int | None = None,
) -> MaskedImages:
    """Reads the pictures and label maps of PASCAL-Context.

    A picture's classes are not listed anywhere: ``class_ids`` are empty, only masks tell.

    Args:
        root: The folder with ``labels.txt`` or ``59_labels.txt``.
        split: ``all``, or the name of a list in the folder, such as ``train`` (4,998) or
            ``val`` (5,105).
        labels: Which set of labels: 33, 59 or 459.
        pictures: The folder of the pictures; None looks in the places named above.
        limit: Keep only so many pictures, by name.

    Raises:
        FileNotFoundError: Label maps, names, pictures or the list are not there.
        ValueError: `labels` is another number, or a list of names has another format.
    """
    if labels not in (33, 59, 459):
        raise ValueError(f"expected `labels` in (33, 59, 459), got {labels!r}")
    check_limit(limit)
    root = Path(root)
    folder = _find_pictures(root, pictures)
    problems = Problems()
    maps, suffix, names, table = _find_maps(root, labels, problems)
    there = {name[:-4] for name in list_names(maps) if name.lower().endswith(suffix)}
    image_ids = sorted(there)
    if split != "all":
        image_ids = _read_split(root, split)
        problems.add_all("label maps that are not there", (i for i in image_ids if i not in there))
    files = {Path(name).stem: name for name in list_names(folder)}
    problems.add_all("pictures that are not there", (i for i in image_ids if i not in files))
    image_ids = [i for i in image_ids if i in files][:limit]
    if not image_ids:
        raise FileNotFoundError(
            f"expected pictures of the label maps in {str(folder)!r}, found none; name the folder "
            "of VOC's JPEGImages"
        )
    return MaskedImages(
        folder, image_ids, [files[i] for i in image_ids], [()] * len(image_ids),
        [maps / f"{i}{suffix}" if i in there else None for i in image_ids],
        read_label_picture if table is None else partial(_read_map, table=table),
        class_names=names, split=split, problems=problems.lines(),
        sources={"images": str(folder), "masks": str(maps)},
    )  # fmt: skip


def _find_pictures(root: Path, pictures: str | Path | None) -> Path:
    places = [Path(pictures)] if pictures is not None else [
        root / "JPEGImages", root / "VOC2010" / "JPEGImages",
        root / "VOCdevkit" / "VOC2010" / "JPEGImages",
        root.parent / "voc2012" / "JPEGImages", root.parent / "voc2012" / "VOC2012" / "JPEGImages",
        root.parent / "voc2012" / "VOCdevkit" / "VOC2012" / "JPEGImages",
    ]  # fmt: skip
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"expected VOC's pictures in {str(places[0])!r}, found none; put JPEGImages there or "
        "PASCAL VOC 2012 into the folder voc2012 beside"
    )


def _find_maps(
    root: Path, labels: Set, problems: Problems
) -> tuple[Path, str, tuple[str, ...], np.ndarray | None]:
    # The folder of the maps, their suffix, the names, and the table from labels.txt's numbers.
    short = root / f"{labels}_labels.txt"
    drawn, whole = root / f"{labels}_context_labels", root / "trainval"
    if labels != 459 and drawn.is_dir():
        return drawn, ".png", _read_names(short), None
    if not whole.is_dir():
        there = f"{drawn.name} or trainval" if labels != 459 else "trainval"
        raise FileNotFoundError(
            f"expected {there} of PASCAL-Context in {str(root)!r}, found none; unpack the "
            "archives there"
        )
    long = _read_names(root / "labels.txt")
    if labels == 459:
        return whole, ".mat", long, np.arange(len(long) + 1)
    names, table = _read_names(short), np.zeros(len(long) + 1, int)
    for number, name in enumerate(names, start=1):
        found = [i for i, other in enumerate(long, start=1) if other in (name, _ALIASES.get(name))]
        table[found] = number
        if not found:
            problems.add("labels that labels.txt does not have", name)
    return whole, ".mat", names, table


def _read_names(path: Path) -> tuple[str, ...]:
    # "12: name", from 1 on
    if not path.is_file():
        raise FileNotFoundError(f"expected {str(path)!r}, found none; download it from the page")
    rows = [re.fullmatch(r"\s*(\d+)\s*:\s*(.*?)\s*", line) for line in read_lines(path)]
    names = {int(row[1]): row[2] for row in rows if row}
    if not names or sorted(names) != list(range(1, len(names) + 1)):
        raise ValueError(
            f"expected lines such as '1: accordion' in {str(path)!r}, numbered from 1, got others"
        )
    return tuple(names[number] for number in sorted(names))


def _read_split(root: Path, split: str) -> list[str]:
    path = root / f"{split}.txt"
    if not path.is_file():
        lists = sorted(p.stem for p in root.glob("*.txt") if "labels" not in p.stem)
        there = ", ".join(lists) or "none"
        raise FileNotFoundError(f"expected `split` 'all' or {str(path)!r}; there: {there}")
    return [Path(line.split()[0]).stem for line in read_lines(path) if line.strip()]


def _read_map(
    path: Path, table: np.ndarray
) -> UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]:
    labels = read_matrix(path, "LabelMap")
    if labels.min() < 0 or labels.max() >= len(table):
        wrong = labels[(labels < 0) | (labels >= len(table))].flat[0]
        raise ValueError(f"expected labels 0 to {len(table) - 1} in {str(path)!r}, got {wrong}")
    return table.astype(np.uint8 if table.max() < 255 else np.uint16)[labels]
