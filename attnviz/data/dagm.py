"""DAGM 2007: ten artificial surfaces, with and without a defect.

The folders, as their archives unpack::

    Class1/Train/0576.PNG                  and Test/; grey, 512 x 512
    Class1/Train/Label/0576_label.PNG      a coarse ellipse, white, for pictures with a defect
    Class1/Train/Label/Labels.txt          576 1 0576.PNG 1 0576_label.PNG: 1 means a defect

The ten surfaces are not the classes: as in the thesis (3.4.3) the only class is ``defect``.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..checks import check_choice
from .folder import SUFFIXES, Problems, check_limit, list_names, read_lines
from .masks import MaskedImages, read_region

__all__ = ["load_dagm"]

Split = Literal["train", "test", "all"]


def load_dagm(
    root: str | Path,
    split: Split = "test",
    *,
    surfaces: Sequence[int] | None = None,
    limit: int | None = None,
) -> MaskedImages:
    """Reads the pictures and defects of DAGM 2007.

    Pictures without a defect have an empty mask.

    Args:
        root: The folder with ``Class1``, or one with a folder that has it.
        split: ``train``, ``test`` (the thesis' own split was never published) or ``all``.
        surfaces: Numbers of the surfaces, from 1; None takes all that are there.
        limit: Keep only so many pictures, taken evenly from all.

    Raises:
        FileNotFoundError: No pictures of this split are there.
        ValueError: `split` is unknown.
    """
    check_choice("split", split, Split)
    check_limit(limit)
    folder = _folder(Path(root))
    problems = Problems()
    rows = [
        (file, defect, mask)
        for number, surface in surface_folders(folder)
        if surfaces is None or number in surfaces
        for part in ("Train", "Test")
        if split in ("all", part.lower())
        for file, defect, mask in _read_part(folder, f"{surface}/{part}", problems)
    ]
    if not rows:
        raise FileNotFoundError(
            f"expected pictures such as Class1/{split.title()}/0576.PNG in {str(folder)!r}, "
            "found none; unpack the archives there"
        )
    rows = evenly(rows, limit)
    return MaskedImages(
        folder, [Path(file).with_suffix("").as_posix() for file, _, _ in rows],
        [file for file, _, _ in rows], [(0,) if defect else () for _, defect, _ in rows],
        [
            None if defect and mask is None else (mask, folder / file, 1)
            for file, defect, mask in rows
        ],
        read_region, class_names=("defect",), split=split, problems=problems.lines(),
        sources={"images": str(folder), "masks": str(folder)},
    )  # fmt: skip


def evenly(rows: list, limit: int | None) -> list:
    """So many of the rows, at even distances."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i * len(rows) // limit] for i in range(limit)]


def surface_folders(folder: Path) -> list[tuple[int, str]]:
    """Numbers and names of the folders ``Class1``, ``Class2``, ..., by number."""
    matches = (re.fullmatch(r"Class(\d+)", name) for name in list_names(folder))
    return sorted((int(match[1]), match[0]) for match in matches if match)


def _folder(root: Path) -> Path:
    places = [root, *(root / name for name in sorted(list_names(root)))]
    for place in places:
        if surface_folders(place):
            return place
    raise FileNotFoundError(
        f"expected Class1 to Class10 of DAGM 2007 in {str(root)!r}, found none; unpack the "
        "archives there"
    )


def _read_part(
    folder: Path, part: str, problems: Problems
) -> Iterator[tuple[str, bool, Path | None]]:
    # File, whether it has a defect, and its mask.
    labels = folder / part / "Label"
    masks = {
        Path(name).stem.removesuffix("_label"): labels / name
        for name in list_names(labels)
        if Path(name).stem.endswith("_label")
    }
    listed = _read_labels(labels / "Labels.txt", part, problems)
    files = sorted(n for n in list_names(folder / part) if n.lower().endswith(SUFFIXES))
    stems = {Path(name).stem for name in files}
    problems.add_all(
        "masks of pictures that are not there",
        (f"{part}/Label/{masks[stem].name}" for stem in sorted(masks.keys() - stems)),
    )
    for name in files:
        stem = Path(name).stem
        mask = masks.get(stem)
        defect = listed.get(stem, mask is not None)
        if listed and stem not in listed:
            problems.add("pictures that Labels.txt does not name", f"{part}/{name}")
        if defect and mask is None:
            problems.add("masks of defects that are not there", f"{part}/{name}")
        elif mask is not None and not defect:
            problems.add("pictures with a mask but no defect in Labels.txt", f"{part}/{name}")
        yield f"{part}/{name}", defect, mask if defect else None


def _read_labels(path: Path, part: str, problems: Problems) -> dict[str, bool]:
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(read_lines(path), start=1):
        words = line.split()
        if len(words) < 3:  # a first line with the number of the surface
            continue
        if words[1] not in ("0", "1"):
            problems.add("lines of Labels.txt that are neither 0 nor 1", f"{part} line {number}")
            continue
        found[Path(words[2]).stem] = words[1] == "1"
    return found
