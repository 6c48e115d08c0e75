"""The attention maps of a whole data set, accumulated while a network trains.

:class:`AttentionMemory` maps (image_id, class_id) to one map at the network's resolution. It is
keyed by what the data set says, never by a running number, so neither shuffling nor the batch
size nor the number of processes changes it. The arithmetic is in :mod:`attnviz.oaa`.

One safetensors file holds a snapshot: whole or not there, with a checksum, opened memory-mapped.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Bool, Float, Num
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .checks import check_choice, check_size, check_whole
from .files import first_line, write_whole

__all__ = ["AttentionMemory", "Precision", "Rule", "place"]

Rule = Literal["max", "mean"]
Precision = Literal["float16", "uint8"]

FILE = "memory.safetensors"
_FORMAT = "attnviz memory 1"
_TYPES = {"I64": np.int64, "I32": np.int32, "U16": np.uint16, "F16": np.float16, "U8": np.uint8}
_CHUNK = 1 << 22  # bytes read or written at once
_MAPS = 1 << 10  # maps averaged at once


class AttentionMemory:
    """Maps (image_id, class_id) to the attention accumulated so far.

    ``memory[image_id, class_id]`` is a new float32 tensor ``(h, w)`` in [0, 1], zero before the
    first :meth:`update`. Nothing on the disk changes before :meth:`save`.

    Args:
        grids: Height and width of each image's maps, by image id.
        labels: The classes of each image, by image id; there may be none.
        rule: How maps join: ``max`` (Eq. 4.4) or ``mean`` (Eq. 4.9), cell by cell over the maps
            that saw the cell. Only ``max`` is exact in any order, ``mean`` is so up to rounding.
        run_id: Name of the training. A memory is never loaded for, or merged with, another run.
        dtype: How values are kept: ``float16``, or ``uint8`` in steps of 1/255.
        keep_last: Keep each last map as well, in 8 bits, for :func:`attnviz.oaa.drop_mask`.

    Raises:
        ValueError: An image has a grid but no labels or the other way round, or a class twice.

    Example:
        >>> memory = AttentionMemory({"cat": (2, 2)}, {"cat": [7]}, run_id="a")
        >>> memory.update("cat", 7, torch.tensor([[0.0, 1.0], [0.5, 0.0]]))
        True
        >>> memory["cat", 7]
        tensor([[0.0000, 1.0000],
                [0.5000, 0.0000]])
    """

    rule: Rule
    """How maps join."""
    run_id: str
    """Name of the training that this memory belongs to."""
    image_ids: tuple[str, ...]
    """The images, in the order given."""

    def __init__(
        self,
        grids: Mapping[str, tuple[int, int]],
        labels: Mapping[str, Sequence[int]],
        rule: Rule = "max",
        *,
        run_id: str,
        dtype: Precision = "float16",
        keep_last: bool = False,
    ) -> None:
        for name, value, choice in (("rule", rule, Rule), ("dtype", dtype, Precision)):
            check_choice(name, value, choice)
        if rule == "mean" and dtype == "uint8":
            raise ValueError(
                "expected `dtype` 'float16' for the mean, got 'uint8'; small changes vanish in it"
            )
        odd = grids.keys() ^ labels.keys()
        if odd:
            raise ValueError(
                f"expected a grid and labels of every image, got one of the two for {min(odd)!r}"
            )
        if not isinstance(run_id, str):
            raise TypeError(f"expected `run_id` as text, got {run_id!r}")
        for image_id, grid in grids.items():
            check_size(f"grids[{image_id!r}]", grid)
            if max(grid) > 65_535:
                raise ValueError(f"expected a grid below 65,536, got {grid} of {image_id!r}")
        for image_id, classes in labels.items():
            for class_id in classes:
                check_whole(f"labels[{image_id!r}]", class_id, 0)
            if max(classes, default=0) >= 2**31:
                raise ValueError(f"expected classes below 2**31, got {max(classes)}")
            if len(set(classes)) < len(classes):
                raise ValueError(f"expected each class of {image_id!r} once, got {list(classes)}")
        encoded = [image_id.encode() for image_id in grids]
        index = {
            "id_ends": np.cumsum([len(each) for each in encoded], dtype=np.int64),
            "label_counts": np.array([len(labels[each]) for each in grids], np.int32),
            "class_ids": np.array([c for each in grids for c in labels[each]], np.int32),
            "grids": np.array(list(grids.values()), np.uint16).reshape(-1, 2),
            "ids": np.frombuffer(b"".join(encoded), np.uint8),
        }
        self._open(index, {"run_id": run_id, "rule": rule})
        cells = int(self._starts[-1])
        self._arrays["counts"] = np.zeros(len(self._class_ids), np.int32)
        self._arrays["cells"] = np.zeros(cells, dtype)
        if keep_last:
            self._arrays["steps"] = np.full(len(self._class_ids), -1, np.int64)
            self._arrays["last"] = np.zeros(cells, np.uint8)

    def _open(self, arrays: dict[str, np.ndarray], metadata: Mapping[str, str]) -> None:
        self._arrays = arrays
        self.run_id, self.rule = metadata["run_id"], metadata["rule"]
        text, ends = arrays["ids"].tobytes(), [0, *arrays["id_ends"].tolist()]
        self.image_ids = tuple(text[a:b].decode() for a, b in pairwise(ends))
        self._rows = {image_id: row for row, image_id in enumerate(self.image_ids)}
        self._class_ids = arrays["class_ids"]
        self._entries = _ends(arrays["label_counts"])  # first map of each image
        areas = arrays["grids"].astype(np.int64).prod(axis=1)
        self._starts = _ends(np.repeat(areas, arrays["label_counts"]))  # first cell of each map

    def empty(self) -> "AttentionMemory":
        """Returns a memory of the same images and run without any map.

        Processes that each fill an empty one may be merged into one memory without a visit
        counting twice.
        """
        made = object.__new__(AttentionMemory)
        made.__dict__.update(self.__dict__)
        made._arrays = dict(self._arrays)
        made._arrays.pop("visits", None)
        for name in {"counts", "cells", "last"} & self._arrays.keys():
            made._arrays[name] = np.zeros_like(self._arrays[name])
        if "steps" in self._arrays:
            made._arrays["steps"] = np.full(len(self._class_ids), -1, np.int64)
        return made

    # ------------------------------------------------------------------------------- reading

    def __getitem__(self, key: tuple[str, int]) -> Float[Tensor, "h w"]:
        return self._map("cells", self._entry(*key), key[0])

    def __contains__(self, key: tuple[str, int]) -> bool:
        image_id, class_id = key
        return image_id in self._rows and class_id in self.class_ids(image_id)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for image_id in self.image_ids:
            for class_id in self.class_ids(image_id):
                yield image_id, class_id

    def __len__(self) -> int:
        return len(self._class_ids)

    def __repr__(self) -> str:
        images, maps = len(self.image_ids), len(self)
        return f"AttentionMemory({images} images, {maps} maps, {self.rule}, run {self.run_id!r})"

    def class_ids(self, image_id: str) -> tuple[int, ...]:
        """Returns the classes of an image."""
        row = self._row(image_id)
        return tuple(self._class_ids[self._entries[row] : self._entries[row + 1]].tolist())

    def grid(self, image_id: str) -> tuple[int, int]:
        """Returns height and width of the maps of an image."""
        return tuple(self._arrays["grids"][self._row(image_id)].tolist())

    def count(self, image_id: str, class_id: int) -> int:
        """Returns how many maps were accumulated."""
        return max(0, int(self._arrays["counts"][self._entry(image_id, class_id)]))

    def last(self, image_id: str, class_id: int) -> Float[Tensor, "h w"] | None:
        """Returns the last map that was accumulated, in steps of 1/255; None before the first."""
        if "last" not in self._arrays:
            raise ValueError("expected a memory made with `keep_last`, got one without last maps")
        entry = self._entry(image_id, class_id)
        return None if self._arrays["steps"][entry] < 0 else self._map("last", entry, image_id)

    def missing(self) -> list[tuple[str, int]]:
        """Returns the keys without a map: never accepted and not filled."""
        entries = np.flatnonzero(self._arrays["counts"] == 0)
        rows = np.searchsorted(self._entries, entries, side="right") - 1
        classes = self._class_ids[entries].tolist()
        return [(self.image_ids[row], c) for row, c in zip(rows.tolist(), classes, strict=True)]

    def _row(self, image_id: str) -> int:
        try:
            return self._rows[image_id]
        except KeyError:
            raise KeyError(
                f"expected an image of this memory, got {image_id!r}; it has {len(self._rows)}"
            ) from None

    def _entry(self, image_id: str, class_id: int) -> int:
        classes = self.class_ids(image_id)
        if class_id not in classes:
            raise KeyError(f"expected a class of {image_id!r} in {classes}, got {class_id}")
        return int(self._entries[self._rows[image_id]]) + classes.index(class_id)

    def _cells(self, entry: int) -> slice:
        return slice(self._starts[entry], self._starts[entry + 1])

    def _map(self, name: str, entry: int, image_id: str) -> Float[Tensor, "h w"]:
        values = self._arrays[name][self._cells(entry)]
        unit = 255 if values.dtype == np.uint8 else 1
        return torch.from_numpy(values.astype(np.float32) / unit).reshape(self.grid(image_id))

    # ------------------------------------------------------------------------------- writing

    def update(
        self,
        image_id: str,
        class_id: int,
        map: Float[Tensor, "h w"],
        valid: Bool[Tensor, "h w"] | None = None,
        *,
        step: int = 0,
    ) -> bool:
        """Accumulates one map.

        Args:
            image_id: The image.
            class_id: One of its classes.
            map: Attention in [0, 1] on the image's grid, not mirrored; see :func:`place`.
            valid: The cells that were seen; the others stay as they are. All if None. A mean has
                to count the maps of each cell from the first cropped one on.
            step: When in the training, at least 0: of two last maps :meth:`merge` keeps the later.

        Returns:
            Whether it was accumulated: a map without a positive value is skipped.

        Raises:
            KeyError: The memory has no such image or class.
            ValueError: The map has another size or leaves [0, 1].
        """
        entry = self._entry(image_id, class_id)
        values = self._values(image_id, map)
        if valid is not None and valid.shape != map.shape:
            raise ValueError(
                f"expected `valid` of {tuple(map.shape)} like the map, got {tuple(valid.shape)}"
            )
        seen = np.ones(len(values), bool) if valid is None else valid.cpu().numpy().ravel()
        if not (values * seen).any():
            return False
        cells, counts = self._arrays["cells"][self._cells(entry)], self._arrays["counts"]
        if counts[entry] < 0:  # what `fill` wrote is no visit
            cells[:], counts[entry] = 0, 0
        if self.rule == "max":
            _raise(cells, _stored(values, cells.dtype), seen)
        else:
            if not seen.all() and "visits" not in self._arrays:
                self._arrays["visits"] = self._visits(0, len(self)).astype(np.int32)
            before = self._visits(entry, entry + 1)
            np.copyto(cells, (before * cells + values) / (before + 1), "same_kind", seen)  # (4.9)
            if "visits" in self._arrays:
                self._arrays["visits"][self._cells(entry)] += seen
        counts[entry] += 1
        if "last" in self._arrays:
            last = self._arrays["last"]
            np.copyto(last[self._cells(entry)], _stored(values, last.dtype), where=seen)
            self._arrays["steps"][entry] = step
        return True

    def fill(self, image_id: str, class_id: int, map: Float[Tensor, "h w"]) -> bool:
        """Writes a map for a class that was never accepted, so that no target is missing.

        It counts as no visit: the next :meth:`update` discards it.

        Returns:
            Whether it was written: an accumulated map stays.
        """
        entry = self._entry(image_id, class_id)
        values, counts = self._values(image_id, map), self._arrays["counts"]
        if counts[entry] > 0:
            return False
        cells = self._arrays["cells"]
        cells[self._cells(entry)] = _stored(values, cells.dtype)
        counts[entry] = -1
        return True

    def merge(self, other: "AttentionMemory") -> None:
        """Takes in what another process accumulated of the same run.

        The result is that of one memory with the visits of both, so the two must not share any
        (a maximum forgives it, counts and means do not); see :meth:`empty`. Of the last maps the
        one with the later step stays, of equal steps this memory's.

        Raises:
            ValueError: It is of another run, rule or data set, or one of the two was filled.
        """
        mine, yours = self._arrays, other._arrays
        fixed = ("id_ends", "label_counts", "class_ids", "grids", "ids")
        alike = (self.run_id, self.rule, "last" in mine) == (
            other.run_id,
            other.rule,
            "last" in yours,
        )
        if not alike or mine["cells"].dtype != yours["cells"].dtype:
            raise ValueError(f"expected a memory to merge made like {self!r}, got {other!r}")
        if not all(mine[k] is yours[k] or np.array_equal(mine[k], yours[k]) for k in fixed):
            raise ValueError("expected a memory of the same images and labels, got other ones")
        if (mine["counts"] < 0).any() or (yours["counts"] < 0).any():
            raise ValueError("expected memories to merge before `fill`, got a filled one")
        if self.rule == "max":
            _raise(mine["cells"], yours["cells"])
        else:
            self._average(other)
        mine["counts"] += yours["counts"]
        if "last" in mine:
            later = yours["steps"] > mine["steps"]
            for entry in np.flatnonzero(later).tolist():
                mine["last"][self._cells(entry)] = yours["last"][self._cells(entry)]
            np.copyto(mine["steps"], yours["steps"], where=later)

    def _average(self, other: "AttentionMemory") -> None:
        mine, yours = self._arrays, other._arrays
        visits = None
        if "visits" in mine or "visits" in yours:
            visits = np.empty(len(mine["cells"]), np.int32)
        for start in range(0, len(self), _MAPS):
            stop = min(start + _MAPS, len(self))
            part = slice(self._starts[start], self._starts[stop])
            a, b = mine["cells"][part], yours["cells"][part].astype(np.float32)
            m, n = self._visits(start, stop), other._visits(start, stop)
            a[:] = (m * a.astype(np.float32) + n * b) / np.maximum(m + n, 1)
            if visits is not None:
                visits[part] = m + n
        if visits is not None:
            mine["visits"] = visits

    def _visits(self, start: int, stop: int) -> np.ndarray:
        # How many maps saw each cell of some maps: all of them, unless one was cropped.
        if "visits" in self._arrays:
            visits = self._arrays["visits"][self._starts[start] : self._starts[stop]]
        else:
            areas = np.diff(self._starts[start : stop + 1])
            visits = np.repeat(self._arrays["counts"][start:stop], areas)
        return visits.astype(np.float32)

    def _values(self, image_id: str, map: Float[Tensor, "h w"]) -> np.ndarray:
        grid = self.grid(image_id)
        if tuple(map.shape) != grid:
            raise ValueError(
                f"expected a map of {grid} for {image_id!r}, got {tuple(map.shape)}; "
                "was the image resized or cropped? see attnviz.memory.place"
            )
        values = map.detach().float().cpu().numpy().ravel()
        if not (values.min() >= 0 and values.max() <= 1 + 1e-5):  # what resizing rounds off
            raise ValueError(
                f"expected a map in [0, 1] for {image_id!r}, got values from {values.min():.3g} "
                f"to {values.max():.3g}; attnviz.oaa.attention makes one"
            )
        return values

    # ----------------------------------------------------------------------------------- files

    def save(self, folder: str | Path) -> None:
        """Writes a snapshot into a folder, replacing an older one at once.

        A process that is killed here leaves the old snapshot or the new one, never a mixture.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        order = sorted(self._arrays, key=lambda name: -self._arrays[name].itemsize)  # aligns them
        header: dict[str, dict] = {
            "__metadata__": {"format": _FORMAT, "rule": self.rule, "run_id": self.run_id}
        }
        names = {np.dtype(kind): name for name, kind in _TYPES.items()}
        end = 0
        for name in order:
            array = self._arrays[name]
            start, end = end, end + array.nbytes
            header[name] = {
                "dtype": names[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [start, end],
            }

        def write(file: BinaryIO) -> None:
            file.write(_encode(header, 0))
            checksum = 0
            with _bar("saving the memory", end) as bar:
                for name in order:
                    data = memoryview(self._arrays[name].reshape(-1).view(np.uint8))
                    for at in range(0, len(data), _CHUNK):
                        file.write(data[at : at + _CHUNK])
                        checksum = zlib.crc32(data[at : at + _CHUNK], checksum)
                        bar.update(len(data[at : at + _CHUNK]))
            file.seek(0)
            file.write(_encode(header, checksum))

        write_whole(folder / FILE, write)
        _sync(folder)

    @classmethod
    def load(cls, folder: str | Path, run_id: str | None = None) -> "AttentionMemory":
        """Opens the snapshot in a folder, memory-mapped; its checksum is verified.

        Args:
            folder: Where :meth:`save` wrote it.
            run_id: The run it must belong to; any if None.

        Raises:
            FileNotFoundError: There is no snapshot.
            ValueError: It is damaged, no memory, or another run's.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"expected an attention memory in {str(folder)!r}, found no {FILE} there"
            )
        try:
            with path.open("rb") as file:
                metadata, arrays = _read(file, path.stat().st_size)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"expected an attention memory, got {str(path)!r}, which is damaged or something "
                f"else ({first_line(error)}); delete it and accumulate again"
            ) from error
        if run_id is not None and metadata["run_id"] != run_id:
            raise ValueError(
                f"expected the memory of run {run_id!r} in {str(folder)!r}, got that of run "
                f"{metadata['run_id']!r}; name another folder or delete it"
            )
        memory = object.__new__(cls)
        memory._open(arrays, metadata)
        return memory

    def export_png(self, folder: str | Path) -> None:
        """Writes each map as an 8-bit picture, ``IMAGE_CLASS.png``, at its own resolution.

        255 is attention 1. What can't stand in a file name, such as ``/``, becomes ``%2F``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for image_id, class_id in tqdm(self, "exporting maps", len(self), delay=2, unit=" maps"):
            pixels = _stored(self[image_id, class_id].numpy(), np.dtype(np.uint8))
            path = folder / f"{quote(image_id, safe=' ')}_{class_id}.png"
            picture = Image.fromarray(pixels)
            write_whole(path, lambda file, picture=picture: picture.save(file, "png"))


# ---------------------------------------------------------------------------------- placement


def place(
    map: Float[Tensor, "h w"],
    box: tuple[Real, Real, Real, Real] = (0, 0, 1, 1),
    flipped: bool = False,
    grid: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, "H W"], Bool[Tensor, "H W"]]:
    """Carries the map of a view, cut out, resized and mirrored, to the grid of its image.

    A map is taken to cover its view. Where the view's width is no multiple of the network's
    stride, the map ends up to one cell before the right edge, or after it; the map of the
    mirrored view then leaves out the other edge, and mirrored back lies shifted by that rest.

    Args:
        map: The map of the view.
        box: The part of the image in the view, (x0, y0, x1, y1) in shares of the image's width
            and height.
        flipped: Whether the view was mirrored left to right, after cutting.
        grid: Height and width of the image's maps; the map's own if None.

    Returns:
        The map on the image's grid, bilinear, and the cells whose center lies in the view; the
        others are 0. Both are what :meth:`AttentionMemory.update` takes.
    """
    if grid is not None:
        check_size("grid", grid)
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"expected `box` as (x0, y0, x1, y1) in shares, got {tuple(box)}")
    height, width = map.shape if grid is None else grid
    rows = _sampling(map.shape[0], height, y0, y1)
    columns = _sampling(map.shape[1], width, x0, x1)
    view = (map.flip(-1) if flipped else map).detach().cpu().double()
    valid = (rows.sum(dim=1) > 0)[:, None] & (columns.sum(dim=1) > 0)
    return (rows @ view @ columns.T).to(map.dtype), valid


def _sampling(count: int, cells: int, start: Real, end: Real) -> Num[Tensor, "cells count"]:
    # Weights of the view's cells in each cell of the grid; zero where it was not seen.
    center = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    position = (center - start) / (end - start) * count - 0.5
    position = position.clamp(0, count - 1).round(decimals=9)  # exact where cells coincide
    distance = (position[:, None] - torch.arange(count)).abs()
    return (1 - distance).clamp_min(0) * ((start <= center) & (center <= end))[:, None]


# -------------------------------------------------------------------------------- the snapshot


def _encode(header: dict[str, dict], checksum: int) -> bytes:
    # The header that safetensors prescribes; the checksum covers the header as well.
    whole = zlib.crc32(json.dumps(header).encode(), checksum)
    metadata = header["__metadata__"] | {"checksum": f"{whole:08x}"}
    text = json.dumps(header | {"__metadata__": metadata}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read(file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("its header is cut off")
    header = json.loads(file.read(length))
    metadata = header["__metadata__"]
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
    stated = metadata.pop("checksum")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max(entry["data_offsets"][1] for entry in entries.values())
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes instead of {8 + length + end}")
    checksum = 0
    with _bar("checking the memory", end) as bar:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
            bar.update(len(chunk))
    if f"{zlib.crc32(json.dumps(header).encode(), checksum):08x}" != stated:
        raise ValueError("its checksum is wrong")
    whole = np.memmap(file, np.uint8, "c")  # copy on write: the file stays as it is
    arrays = {}
    for name, entry in entries.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        array = whole[start:stop].view(np.ndarray).view(_TYPES[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return metadata, arrays


def _stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    values = np.abs(values).clip(max=1)  # no -0, whose bits `_raise` would take for the largest
    return (np.rint(values * 255) if dtype == np.uint8 else values).astype(dtype)


def _raise(cells: np.ndarray, values: np.ndarray, where: np.ndarray | bool = True) -> None:
    # The maximum, in place (4.4). The bits of floats that are not negative sort as they do; as
    # integers it takes a thirtieth of the time.
    bits = f"u{cells.itemsize}"
    np.maximum(cells.view(bits), values.view(bits), out=cells.view(bits), where=where)


def _ends(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _bar(text: str, size: int) -> tqdm:
    return tqdm(desc=text, total=size, unit="B", unit_scale=True, delay=2)


def _sync(folder: Path) -> None:
    # Makes the new name survive a loss of power, where folders can be opened.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
