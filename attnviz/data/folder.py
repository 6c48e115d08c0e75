"""Pictures with a class and boxes: the item that every localization reader gives.

:func:`load_folder` reads any folder of pictures. The readers of named data sets
(:mod:`~attnviz.data.imagenet`, :mod:`~attnviz.data.cub`) give the same :class:`LabeledImages`.
Boxes are ``(x0, y0, x1, y1)``, half-open, in pixels of the file. Nothing here decodes a picture
before ``read`` is called; sizes come from file headers.
"""

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import overload

from PIL import Image
from tqdm import tqdm

from ..files import printable
from ..images import damage_named, opened, read_image

__all__ = ["Box", "BoxList", "LabeledImage", "LabeledImages", "load_folder", "read_box_list"]

Box = tuple[float, float, float, float]
"""``(x0, y0, x1, y1)``, half-open: a picture's full box is ``(0, 0, width, height)``."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_ORIENTATION = 274  # the EXIF tag
_UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LabeledImage:
    """One picture of a data set, not yet read."""

    image_id: str
    """Name of the picture, unique in its data set."""
    path: Path
    """The file."""
    class_id: int | None
    """Number of the class; None where the data set has no classes."""
    boxes: tuple[Box, ...]
    """Boxes of the class, half-open, in pixels of the file; may be empty."""
    upright: bool = True
    """Whether the EXIF orientation is applied. Published data sets leave it out, as their boxes
    and masks were drawn on the stored pixels."""

    def read(self) -> Image.Image:
        """Reads the picture as 8-bit RGB; see :func:`attnviz.images.read_image`."""
        return read_image(self.path) if self.upright else read_stored(self.path)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture that ``read`` gives, from the file's header."""
        return read_size(self.path, self.upright)


class LabeledImages(Sequence[LabeledImage]):
    """A data set of labeled pictures; items are made when asked for, a slice is a data set.

    Args:
        folder: The folder that `files` are relative to.
        files: One name a picture, with ``/`` between folders.
        class_ids: The class of each picture.
        boxes: The boxes of each picture.
        class_names: Names of the classes; empty where none are known.
        problems: What was wrong with the data, one line each, most of it left out or repaired.
        sources: Where pictures, labels, names and boxes were found.
        upright: See :class:`LabeledImage`.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str],
        class_ids: Sequence[int | None],
        boxes: Sequence[tuple[Box, ...]],
        *,
        class_names: Sequence[str] = (),
        problems: Iterable[str] = (),
        sources: Mapping[str, str] | None = None,
        upright: bool = True,
    ) -> None:
        self.folder = folder
        self.class_names = tuple(class_names)
        self.problems = list(problems)
        self.sources = dict(sources or {})
        self.upright = upright
        self._files, self._class_ids, self._boxes = list(files), list(class_ids), list(boxes)
        self._image_ids = _image_ids(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, i: int) -> LabeledImage: ...
    @overload
    def __getitem__(self, i: slice) -> "LabeledImages": ...
    def __getitem__(self, i: int | slice) -> "LabeledImage | LabeledImages":
        if isinstance(i, slice):
            part = LabeledImages(
                self.folder, self._files[i], self._class_ids[i], self._boxes[i],
                class_names=self.class_names, problems=self.problems, sources=self.sources,
                upright=self.upright,
            )  # fmt: skip
            part._image_ids = self._image_ids[i]
            return part
        return LabeledImage(
            self._image_ids[i], self.folder / self._files[i], self._class_ids[i], self._boxes[i],
            self.upright,
        )  # fmt: skip

    def __iter__(self) -> Iterator[LabeledImage]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"LabeledImages({str(self.folder)!r}, {len(self)} images, {self.box_count} boxes, "
            f"{len(self.class_names)} class names, {len(self.problems)} problems)"
        )

    @property
    def box_count(self) -> int:
        """Number of boxes of all pictures."""
        return sum(map(len, self._boxes))

    @property
    def class_count(self) -> int:
        """Number of classes that have a picture."""
        return len(set(self._class_ids) - {None})


# ------------------------------------------------------------------- shared by all readers


class Problems:
    """What is wrong with a data set, grouped by kind so that each kind makes one line."""

    def __init__(self) -> None:
        self._kinds: dict[str, list] = {}
        self._kept: list[str] = []

    def add(self, kind: str, where: str, count: int = 1) -> None:
        """Notes one more problem of a kind; the first three places are kept."""
        entry = self._kinds.setdefault(kind, [0, []])
        entry[0] += count
        if len(entry[1]) < 3:
            entry[1].append(printable(where))

    def add_all(self, kind: str, places: Iterable[str]) -> None:
        """Notes a problem for every place."""
        for place in places:
            self.add(kind, place)

    def keep(self, lines: Iterable[str]) -> None:
        """Takes over the lines of another reader."""
        self._kept += lines

    def lines(self) -> list[str]:
        """One line a kind: what, how many, the first places."""
        return self._kept + [
            f"{kind}: {', '.join(where)}"
            if count == len(where)
            else f"{kind}: {count:,}, first {', '.join(where)}"
            for kind, (count, where) in self._kinds.items()
        ]


class PictureNames:
    """Finds a file by the name that a list gives it: with or without suffix or folders."""

    def __init__(self, files: Sequence[str]) -> None:
        self._exact = {file: i for i, file in enumerate(files)}
        self._whole = _unique(_stem(file) for file in files)
        self._short = _unique(_stem(file).rpartition("/")[2] for file in files)

    def find(self, name: str) -> int | None:
        """Returns the number of the file, or None where no file or several have the name."""
        name = name.strip().replace("\\", "/").removeprefix("./")
        stem = _stem(name)
        behind = stem.partition("/")[2]  # lists often begin with the split's folder
        for names, key in (
            (self._exact, name), (self._whole, stem), (self._whole, behind),
            (self._short, stem.rpartition("/")[2]),
        ):  # fmt: skip
            if key in names:
                return names[key]
        return None


def _unique(names: Iterable[str]) -> dict[str, int]:
    names = list(names)
    counts = Counter(names)
    return {name: i for i, name in enumerate(names) if counts[name] == 1}


def list_pictures(folder: Path) -> list[str]:
    """Names of all pictures below a folder, relative to it, sorted; hidden files are left out."""
    found, seen = [], set()
    for top, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(top).relative_to(folder).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append(prefix + name)
    return sorted(found)


def list_names(folder: Path) -> list[str]:
    """Names of all that is in a folder, in no order; none where there is no folder."""
    return [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without their ends; a byte order mark is dropped."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected text in UTF-8, got {str(path)!r} ({error.reason}); save it as UTF-8"
        ) from None


def check_limit(limit: int | None) -> None:
    """Raises ValueError unless `limit` is None or at least 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"expected `limit` of at least 1, got {limit}")


def fit_all(
    folder: Path,
    files: Sequence[str],
    boxes: Sequence[Sequence[Box]],
    drawn_on: Sequence[tuple[int, int] | None],
    problems: Problems,
    *,
    upright: bool,
    progress: bool = False,
) -> list[tuple[Box, ...] | None]:
    """Boxes in pixels of the files: scaled, cut at the border, empty ones left out.

    Args:
        folder: Where the files are.
        files: Names of the pictures; only headers of those with boxes are read.
        boxes: Boxes of each picture, half-open.
        drawn_on: The (height, width) that each picture's boxes were drawn on; None: the file's.
        problems: Takes what was repaired.
        upright: Whether the EXIF orientation counts.
        progress: Show a progress bar.

    Returns:
        The boxes of each picture, and None for a picture whose header cannot be read.
    """
    fitted: list[tuple[Box, ...] | None] = []
    jobs = zip(files, boxes, drawn_on, strict=True)
    for file, drawn, size in tqdm(
        jobs, "picture sizes", len(files), unit="image", leave=False, disable=not progress
    ):
        if not drawn:
            fitted.append(())
            continue
        try:
            fitted.append(_fit(drawn, size, read_size(folder / file, upright), file, problems))
        except ValueError:
            problems.add("pictures that cannot be read", file)
            fitted.append(None)
    return fitted


def _fit(
    boxes: Sequence[Box],
    drawn_on: tuple[int, int] | None,
    size: tuple[int, int],
    where: str,
    problems: Problems,
) -> tuple[Box, ...]:
    height, width = size
    if drawn_on and min(drawn_on) < 1:
        problems.add("sizes below 1 pixel, the file's own taken", where)
        drawn_on = None
    drawn_height, drawn_width = drawn_on or size
    kept = []
    for x0, y0, x1, y1 in boxes:
        left, right = x0 * width / drawn_width, x1 * width / drawn_width
        whole = (left, y0 * height / drawn_height, right, y1 * height / drawn_height)
        if not all(map(math.isfinite, whole)):
            problems.add("boxes that are no numbers, left out", where)
            continue
        limits = (width, height, width, height)
        cut = tuple(min(max(side, 0.0), limit) for side, limit in zip(whole, limits, strict=True))
        if cut[0] >= cut[2] or cut[1] >= cut[3]:
            problems.add("boxes without area or outside the picture, left out", where)
            continue
        if max(abs(a - b) for a, b in zip(cut, whole, strict=True)) > 1:
            problems.add("boxes that leave the picture, cut", where)
        kept.append(cut)
    return tuple(kept)


def _header(path: Path) -> tuple[tuple[int, int], int]:
    """Width and height as stored, and the EXIF orientation."""
    with opened(path) as image, damage_named(path):
        turned = image.getexif().get(_ORIENTATION, 1)
        return image.size, turned if turned in range(1, 9) else 1


def read_stored(path: Path) -> Image.Image:
    """Reads a picture as 8-bit RGB, its pixels where the file has them, whatever EXIF says."""
    image = read_image(path)
    turn = _UNTURN.get(_header(path)[1])
    return image if turn is None else image.transpose(turn)


def read_size(path: Path, upright: bool) -> tuple[int, int]:
    """Height and width of a picture, from its header."""
    (width, height), orientation = _header(path)
    return (width, height) if upright and orientation >= 5 else (height, width)


def _stem(file: str) -> str:
    stem, dot, suffix = file.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in (*SUFFIXES, ".xml") else file


def _image_ids(files: Sequence[str]) -> list[str]:
    # The shortest of file stem, path without suffix, path that is unique in the data set.
    for name in (lambda file: _stem(file).rpartition("/")[2], _stem):
        ids = [name(file) for file in files]
        if len(set(ids)) == len(ids):
            return ids
    return list(files)


# ---------------------------------------------------------------------------- lists of boxes


@dataclass(frozen=True)
class BoxList:
    """A list of boxes, as written."""

    boxes: dict[str, list[Box]] = field(default_factory=dict)
    """Boxes by the picture's name."""
    classes: dict[str, str] = field(default_factory=dict)
    """Class by the picture's name, a number or a name; empty without such a column."""
    drawn_on: tuple[int, int] | None = None
    """The (height, width) in which the coordinates count; None: the size of each file."""


def read_box_list(path: Path, problems: Problems) -> BoxList:
    """Reads a list of boxes with a header line.

    The format, one box a line, several lines for a picture with several boxes::

        image,x0,y0,x1,y1,class
        cat/one.jpg,12,30.5,80,95,cat

    Coordinates count pixels from 0, ``x1`` and ``y1`` are the first ones outside. ``class``, or
    ``label``, may be missing and may be a number; other columns are ignored; ``;`` may stand for
    ``,``. A file named ``boxes_227.csv`` or ``boxes_640x480.csv`` (width x height) holds boxes
    for pictures of that size, which are scaled to the files.

    Args:
        path: The file.
        problems: Takes the lines that cannot be understood, which are left out.

    Raises:
        ValueError: The header names no ``image``, ``x0``, ``y0``, ``x1``, ``y1``.
    """
    lines = read_lines(path)
    delimiter = ";" if lines and ";" in lines[0] else ","
    rows = csv.reader(lines, delimiter=delimiter)
    header = [name.strip().lower() for name in next(rows, [])]
    wanted = ["image", "x0", "y0", "x1", "y1"]
    if not set(wanted) <= set(header):
        raise ValueError(
            f"expected a first line with image,x0,y0,x1,y1 in {str(path)!r}, "
            f"got {','.join(header)[:80]!r}"
        )
    columns = [header.index(name) for name in wanted]
    label = next((header.index(name) for name in ("class", "label") if name in header), None)
    found = BoxList(drawn_on=_stated_size(path))
    for row in rows:
        if not row:
            continue
        where = f"line {rows.line_num}"
        try:
            name, *sides = (row[column].strip() for column in columns)
            box = tuple(float(side) for side in sides)
        except (IndexError, ValueError):
            problems.add(f"lines of {path.name} that are no box, left out", where)
            continue
        found.boxes.setdefault(name, []).append(box)
        if label is not None and label < len(row):
            text = row[label].strip()
            if found.classes.setdefault(name, text) != text:
                problems.add(f"pictures with two classes in {path.name}, the first kept", where)
    return found


def _stated_size(path: Path) -> tuple[int, int] | None:
    match = re.fullmatch(r"boxes_(\d+)(?:x(\d+))?", path.stem)
    return (int(match[2] or match[1]), int(match[1])) if match else None


# -------------------------------------------------------------------------------- any folder


def load_folder(
    root: str | Path,
    *,
    boxes: str | Path | None = "auto",
    limit: int | None = None,
    progress: bool = False,
) -> LabeledImages:
    """Reads any folder of pictures: flat, or with one sub-folder a class.

    ::

        root/cat/one.jpg           classes are the sub-folders, in the order of their names
        root/dog/two.png
        root/one.jpg               or flat: classes from boxes.csv, or none (class_id is None)
        root/boxes.csv             boxes, optional; see read_box_list

    Args:
        root: The folder.
        boxes: ``auto`` takes ``boxes.csv`` or ``boxes_*.csv`` in the folder, a path that file,
            None none.
        limit: Keep only so many pictures, the first by name.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: There is no such folder or no such list.
        ValueError: It holds no picture, or the list has another format.
    """
    root = Path(root)
    check_limit(limit)
    if not root.is_dir():
        raise FileNotFoundError(
            f"expected a folder of pictures, got {str(root)!r}, which is none; name one"
        )
    files = list_pictures(root)
    if not files:
        raise ValueError(f"expected pictures ({', '.join(SUFFIXES)}) in {str(root)!r}, got none")
    problems = Problems()
    listed, source = BoxList(), None
    if boxes is not None:
        source = Path(boxes) if boxes != "auto" else find_box_list([root])
        if source is not None and not source.is_file():
            raise FileNotFoundError(f"expected a list of boxes, got {str(source)!r}")
        listed = read_box_list(source, problems) if source else listed

    labels = [PurePosixPath(file).parts[0] if "/" in file else None for file in files]
    flat = not any(labels)
    names = PictureNames(files)
    drawn: list[list[Box]] = [[] for _ in files]
    for name, found in listed.boxes.items():
        i = names.find(name)
        if i is None:
            problems.add(f"pictures of {source.name} that are not there", name)
            continue
        drawn[i] += found
        label = listed.classes.get(name)
        if flat:
            labels[i] = label
        elif label not in (None, labels[i]) and not label.isdecimal():
            problems.add(f"pictures of another class in {source.name} than their folder's", name)
    if not flat:
        problems.add_all(
            "pictures beside the class folders, without a class",
            (file for file in files if "/" not in file),
        )
    known = sorted({label for label in labels if label is not None})
    numbered = flat and bool(known) and all(label.isdecimal() for label in known)
    number = {label: int(label) if numbered else i for i, label in enumerate(known)}
    keep = slice(limit)
    files, drawn = files[keep], drawn[keep]
    fitted = fit_all(
        root, files, drawn, [listed.drawn_on] * len(files), problems, upright=True,
        progress=progress,
    )  # fmt: skip
    sources = {"images": str(root)} | ({"boxes": str(source)} if source else {})
    return collect(
        root, files, [number.get(label) for label in labels[keep]], fitted, problems,
        class_names=() if numbered else known, sources=sources,
    )  # fmt: skip


def collect(
    folder: Path,
    files: Sequence[str],
    class_ids: Sequence[int | None],
    boxes: Sequence[tuple[Box, ...] | None],
    problems: Problems,
    *,
    class_names: Sequence[str],
    sources: Mapping[str, str],
    upright: bool = True,
) -> LabeledImages:
    """The data set of the pictures whose boxes are not None."""
    keep = [i for i, found in enumerate(boxes) if found is not None]
    return LabeledImages(
        folder, [files[i] for i in keep], [class_ids[i] for i in keep], [boxes[i] for i in keep],
        class_names=class_names, problems=problems.lines(), sources=sources, upright=upright,
    )  # fmt: skip


def find_box_list(places: Iterable[Path]) -> Path | None:
    """The ``boxes.csv`` or ``boxes_*.csv`` in the first place that has one."""
    for place in places:
        for pattern in ("boxes.csv", "boxes_*.csv"):
            for path in sorted(place.glob(pattern)):
                return path
    return None
