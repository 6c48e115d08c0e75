"""Caltech-UCSD Birds-200-2011: 11,788 pictures of 200 kinds of birds, one box each.

The folder, as its archive unpacks, with one picture a line and a number for each picture::

    images/001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
    images.txt                1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
    train_test_split.txt      1 0                         1: training, 0: test
    image_class_labels.txt    1 1                         classes count from 1
    bounding_boxes.txt        1 60.0 27.0 325.0 304.0     left, top, width, height
    classes.txt               1 001.Black_footed_Albatross
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from ..checks import check_choice
from .folder import Box, LabeledImages, Problems, check_limit, collect, fit_all, read_lines

__all__ = ["load_cub"]

Split = Literal["train", "test", "all"]
_Value = TypeVar("_Value")


def load_cub(
    root: str | Path, split: Split = "test", *, limit: int | None = None, progress: bool = False
) -> LabeledImages:
    """Reads the pictures, classes (from 0) and boxes of CUB-200-2011.

    Args:
        root: The folder that holds ``images.txt``, or ``CUB_200_2011`` with it.
        split: ``train`` (5,994 pictures), ``test`` (5,794) or ``all``.
        limit: Keep only so many pictures, in the order of ``images.txt``.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: The folder or one of its lists is not there.
        ValueError: `split` is unknown, or a list has another format.
    """
    check_choice("split", split, Split)
    check_limit(limit)
    folder = _folder(Path(root))
    problems = Problems()
    files = _read(folder / "images.txt", 2, lambda words: words[0], problems)
    labels = _read(folder / "image_class_labels.txt", 2, lambda words: int(words[0]), problems)
    trains = _read(folder / "train_test_split.txt", 2, lambda words: int(words[0]), problems)
    boxes = _read(folder / "bounding_boxes.txt", 5, _box, problems)
    names = _read(folder / "classes.txt", 2, lambda words: words[0], problems)
    count = max(names, default=0)
    if min(names) < 1 or count != len(names):
        raise ValueError(
            f"expected classes 1 to {count} in {str(folder / 'classes.txt')!r}, got {len(names)}"
        )

    wanted = {"train": (1,), "test": (0,), "all": (0, 1)}[split]
    kept: list[tuple[str, int, list[Box]]] = []
    for number, file in files.items():
        if number not in labels or number not in trains:
            problems.add("pictures without a class or a split, left out", file)
        elif trains[number] not in (0, 1):
            problems.add("splits other than 0 and 1 in train_test_split.txt", f"picture {number}")
        elif not 1 <= labels[number] <= count:
            kind = f"classes outside 1 to {count} in image_class_labels.txt"
            problems.add(kind, f"picture {number} ({labels[number]})")
        elif trains[number] in wanted:
            if limit is not None and len(kept) == limit:
                break
            if not (folder / "images" / file).is_file():
                problems.add("pictures that are not there", file)
                continue
            if number not in boxes:
                problems.add("pictures without a box", file)
            kept.append((file, labels[number] - 1, [boxes[number]] if number in boxes else []))
    if not kept:
        raise FileNotFoundError(
            f"expected pictures of {split} in {str(folder / 'images')!r}, found none of those "
            "that images.txt names; unpack the archive again"
        )
    paths = [file for file, _, _ in kept]
    fitted = fit_all(
        folder / "images", paths, [drawn for _, _, drawn in kept], [None] * len(kept), problems,
        upright=False, progress=progress,
    )  # fmt: skip
    return collect(
        folder / "images", paths, [label for _, label, _ in kept], fitted, problems,
        class_names=[_pretty(names[i]) for i in range(1, count + 1)],
        sources={"images": str(folder / "images"), "labels": str(folder)}, upright=False,
    )  # fmt: skip


def _folder(root: Path) -> Path:
    for folder in (root, root / "CUB_200_2011"):
        if (folder / "images.txt").is_file():
            return folder
    raise FileNotFoundError(
        f"expected images.txt of CUB-200-2011 in {str(root)!r} or its CUB_200_2011, found none; "
        "unpack CUB_200_2011.tgz there"
    )


def _read(
    path: Path, count: int, read: Callable[[list[str]], _Value], problems: Problems
) -> dict[int, _Value]:
    # Lines of a number and further words, separated by spaces.
    if not path.is_file():
        raise FileNotFoundError(f"expected {str(path)!r}, found none; unpack the archive again")
    found: dict[int, _Value] = {}
    for line_number, line in enumerate(read_lines(path), start=1):
        number, *words = line.split() or [""]
        if not number:
            continue
        try:
            if len(words) != count - 1:
                raise ValueError
            found[int(number)] = read(words)
        except ValueError:
            kind = f"lines of {path.name} without {count} values, left out"
            problems.add(kind, f"line {line_number}")
    if not found:
        raise ValueError(f"expected lines of {count} values in {str(path)!r}, got none")
    return found


def _box(words: list[str]) -> Box:
    x, y, width, height = map(float, words)
    return x, y, x + width, y + height


def _pretty(name: str) -> str:
    # 001.Black_footed_Albatross
    return name.partition(".")[2].replace("_", " ") or name
