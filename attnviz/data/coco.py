"""COCO: pictures with the classes and masks of their objects.

The official folder, with one file of objects a split (2014's names are found, too)::

    val2017/000000000139.jpg
    annotations/instances_val2017.json     pictures, categories, objects with their regions

Regions are polygons, or runs of pixels, plain or compressed, as the file's crowds. The masks of
all objects make one mask of classes; the 80 categories, whose numbers have gaps, become classes
0 to 79 in the order of their numbers.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from ..files import first_line
from ..images import MAX_PIXELS
from .folder import Problems, check_limit
from .masks import IGNORE, MaskedImages

__all__ = ["decode_runs", "fill_polygons", "load_coco"]

Split = Literal["train", "val"]
Region = list[np.ndarray] | dict[str, object]


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of one picture, as annotated; a mask is drawn from them."""

    image_id: str
    size: tuple[int, int]
    """Height and width that the regions were drawn on."""
    class_ids: tuple[int, ...]
    """Class of each object, from 0."""
    crowds: tuple[bool, ...]
    """Whether the object stands for many that were not told apart."""
    areas: tuple[float, ...]
    """In pixels, as annotated."""
    regions: tuple[Region, ...]
    """Polygons, each ``(points, 2)`` in pixels, or runs."""

    def mask(self) -> UInt8[np.ndarray, "h w"]:
        """Draws crowds (left out of scores) and then objects, the largest first.

        Raises:
            ValueError: A region cannot be understood.
        """
        if not 0 < self.size[0] * self.size[1] <= MAX_PIXELS:
            raise ValueError(f"expected a size for {self.image_id!r}, got {self.size}")
        mask = np.zeros(self.size, np.uint8)
        order = sorted(
            range(len(self.class_ids)), key=lambda i: (not self.crowds[i], -self.areas[i])
        )
        for i in order:
            try:
                inside = _draw(self.regions[i], self.size)
            except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
                raise ValueError(
                    f"expected polygons or runs for object {i} of {self.image_id!r}, got others "
                    f"({error}); get the annotations again"
                ) from error
            mask[inside] = IGNORE if self.crowds[i] else 1 + self.class_ids[i]
        return mask


def load_coco(root: str | Path, split: Split = "val", *, limit: int | None = None) -> MaskedImages:
    """Reads the pictures, classes and masks of COCO.

    A picture's classes are those of all its objects, crowds included; crowds are left out of
    scores. Pictures without an object are kept, with no class and an empty mask.

    Args:
        root: The folder with ``annotations``.
        split: ``train`` (118,287 pictures; its list alone takes 40 s and 2 GB) or ``val``
            (5,000).
        limit: Keep only so many pictures, by number.

    Raises:
        FileNotFoundError: The list, or all of its pictures, are not there.
        ValueError: `split` is unknown, or the list has another format.
    """
    if split not in ("train", "val"):
        raise ValueError(f"expected `split` in ('train', 'val'), got {split!r}")
    check_limit(limit)
    listed = find_instances(Path(root), split)
    folder = _pictures(Path(root), listed)
    problems = Problems()
    files, names, objects = read_instances(listed, problems)
    there = {path.name for path in folder.iterdir()}
    lost = [file for file, _ in files.values() if file not in there]
    problems.add_all(f"pictures of {listed.name} that are not there", sorted(lost))
    numbers = [number for number in sorted(files) if files[number][0] in there][:limit]
    if not numbers:
        raise FileNotFoundError(
            f"expected pictures of {listed.name} in {str(folder)!r}, found none; unpack "
            f"{folder.name}.zip"
        )
    image_ids = [Path(files[number][0]).stem for number in numbers]
    drawn = [
        _objects(image_id, files[number][1], objects.get(number, []))
        for image_id, number in zip(image_ids, numbers, strict=True)
    ]
    return MaskedImages(
        folder, image_ids, [files[number][0] for number in numbers],
        [tuple(sorted(set(item.class_ids))) for item in drawn], drawn, Objects.mask,
        class_names=names, split=split, problems=problems.lines(),
        sources={"images": str(folder), "labels": str(listed), "masks": str(listed)},
    )  # fmt: skip


def find_instances(root: Path, split: str) -> Path:
    """The file of objects of a split, the newest if there are several."""
    found = sorted((root / "annotations").glob(f"instances_{split}20??.json"))
    if not found:
        raise FileNotFoundError(
            f"expected annotations/instances_{split}2017.json in {str(root)!r}, found none; run: "
            "attnviz data fetch coco"
        )
    return found[-1]


def _pictures(root: Path, listed: Path) -> Path:
    name = listed.stem.removeprefix("instances_")
    for folder in (root / name, root / "images" / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"expected pictures in {str(root / name)!r}, found none; unpack {name}.zip"
    )


Row = tuple[int, bool, float, Region]
Files = dict[int, tuple[str, tuple[int, int]]]


def read_instances(
    path: Path, problems: Problems
) -> tuple[Files, tuple[str, ...], dict[int, list[Row]]]:
    """Reads a file of objects.

    Args:
        path: The file.
        problems: Takes objects that cannot be used, which are left out.

    Returns:
        By number of the picture its file and size, the names of the classes, and by number of
        the picture its objects: class from 0, crowd, area, region.

    Raises:
        ValueError: The file is no such file.
    """
    try:
        table = json.loads(path.read_bytes(), object_hook=_packed)
        files = {
            int(row["id"]): (str(row["file_name"]), (int(row["height"]), int(row["width"])))
            for row in table["images"]
        }
        categories = sorted((int(row["id"]), str(row["name"])) for row in table["categories"])
        annotations = table["annotations"]
        class_of = {number: class_id for class_id, (number, _) in enumerate(categories)}
        objects: dict[int, list[Row]] = {}
        for row in annotations:
            number, category, where = row["image_id"], row["category_id"], f"object {row['id']}"
            if number not in files:
                problems.add(f"objects of unknown pictures in {path.name}", where)
            elif category not in class_of:
                problems.add(f"objects of unknown classes in {path.name}", where)
            elif not row.get("segmentation"):
                problems.add(f"objects without a region in {path.name}", where)
            else:
                objects.setdefault(number, []).append(
                    (
                        class_of[category], bool(row.get("iscrowd", 0)),
                        float(row.get("area", 0)), row["segmentation"],
                    )
                )  # fmt: skip
    except (
        ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError,
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"expected COCO's instances in {str(path)!r}, got something else ({reason}); get the "
            "annotations again"
        ) from error
    outside = [file for file, _ in files.values() if Path(file).name != file]
    if outside:
        raise ValueError(f"expected names of files in {str(path)!r}, got {outside[0][:80]!r}")
    return files, tuple(name for _, name in categories), objects


def _packed(row: dict[str, object]) -> dict[str, object]:
    # Lists of numbers become arrays while the file is parsed: a tenth of the memory.
    region = row.get("segmentation")
    if isinstance(region, list):
        row["segmentation"] = [np.array(points, np.float32) for points in region]
    elif isinstance(row.get("counts"), list):
        row["counts"] = np.array(row["counts"], np.int64)
    return row


def _objects(image_id: str, size: tuple[int, int], rows: Sequence[Row]) -> Objects:
    class_ids, crowds, areas, regions = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Objects(image_id, size, class_ids, crowds, areas, regions)


# ------------------------------------------------------------------------------------- regions


def _draw(region: Region, size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    if isinstance(region, list):
        return fill_polygons([points.reshape(-1, 2) for points in region], size)
    counts = region["counts"]
    if tuple(region["size"]) != size:
        raise ValueError(f"runs of {tuple(region['size'])} in a picture of {size}")
    return decode_runs(_unpack_runs(counts) if isinstance(counts, str) else counts, size)


def decode_runs(runs: Int[np.ndarray, " n"], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Makes a mask of the lengths of its runs, outside and inside by turns, down the columns.

    Args:
        runs: Lengths, the first outside, together the number of pixels.
        size: Height and width.

    Raises:
        ValueError: The lengths do not fill the mask.

    Example:
        >>> decode_runs(np.array([1, 2, 3]), (2, 3)).astype(int)
        array([[0, 1, 0],
               [1, 0, 0]])
    """
    height, width = size
    if len(runs) == 0 or runs.min() < 0 or sum(map(int, runs)) != height * width:
        raise ValueError(f"expected runs of {height * width} pixels in all, got another sum")
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(inside.reshape(width, height).T)


def _unpack_runs(text: str) -> Int[np.ndarray, " n"]:
    # Base 32, lowest digit first, from the character "0" on: bit 5 says that more digits follow,
    # bit 4 of the last one is the sign. From the fourth on, each is less the last but one.
    runs: list[int] = []
    value = shift = 0
    for character in text.encode("latin-1"):
        digit = character - 48
        if not 0 <= digit < 64:
            raise ValueError(f"the character {chr(character)!r} in compressed runs")
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("compressed runs that end early")
    return np.array(runs, np.int64)


def fill_polygons(
    polygons: Sequence[Float[np.ndarray, "n 2"]], size: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """Makes the mask of the pixels whose centers lie in one of the polygons.

    A pixel's center is half a pixel from its corner, so that the polygon round pixels 0 and 1
    goes from 0 to 2. Where a polygon meets itself, inside and outside change by turns.

    Args:
        polygons: Corners ``(x, y)`` in pixels; may leave the picture.
        size: Height and width.

    Raises:
        ValueError: A corner is no number.
    """
    height, width = size
    filled = np.zeros(size, bool)
    for points in polygons:
        points = np.asarray(points, np.float64)
        if not np.isfinite(points).all():
            raise ValueError("corners that are no numbers")
        # Each edge crosses the rows whose centers lie between its ends; inside begins or ends
        # at the first center right of the crossing.
        (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
        first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(int)
        stop = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(int)
        counts = stop - first
        edge = np.repeat(np.arange(len(points)), counts)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts - first, counts)
        slope = (x1 - x0)[edge] / (y1 - y0)[edge]
        crossing = x0[edge] + (row + 0.5 - y0[edge]) * slope
        column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)
        if not len(edge):
            continue
        top, left = row.min(), column.min()  # only the window round the polygon is counted
        high, wide = row.max() - top + 1, column.max() - left + 1
        changes = np.bincount((row - top) * wide + column - left, minlength=high * wide)
        inside = changes.reshape(high, wide).cumsum(axis=1)[:, :-1] % 2 == 1
        filled[top : top + high, left : left + wide - 1] |= inside
    return filled
