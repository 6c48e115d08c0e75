"""Pictures with classes and a mask: the item that every segmentation reader gives.

The readers (:mod:`~attnviz.data.voc`, :mod:`~attnviz.data.coco`, :mod:`~attnviz.data.context`,
:mod:`~attnviz.data.dagm`, :mod:`~attnviz.data.surface`) give the same :class:`MaskedImages`.
Numbers are those of PASCAL VOC. A picture's ``class_ids`` count from 0 without background; in a
mask 0 is background, ``1 + class_id`` a class, and 255 (65,535 where there are more than 254
classes) is left out of every score. Nothing is decoded before ``read`` or ``read_mask``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image
from tqdm import tqdm

from ..images import damage_named, opened
from .folder import Problems, read_size, read_stored

__all__ = ["IGNORE", "MaskedImage", "MaskedImages", "voc_colors"]

IGNORE = 255
"""The value of mask pixels that no score counts."""

Mask = UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]


@dataclass(frozen=True, slots=True)
class MaskedImage:
    """One picture of a data set with its classes, not yet read."""

    image_id: str
    """Name of the picture, unique in its data set."""
    path: Path
    """The file."""
    class_ids: tuple[int, ...]
    """The classes in the picture, ascending, from 0, without background; may be empty."""
    class_count: int
    """Number of classes of the data set, without background."""
    source: Callable[[], np.ndarray] | None
    """Reads the raw mask; None: the picture has none."""

    def read(self) -> Image.Image:
        """Reads the picture as 8-bit RGB, unturned, as masks were drawn on stored pixels."""
        return read_stored(self.path)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture, from the file's header."""
        return read_size(self.path, upright=False)

    def read_mask(self) -> Mask | None:
        """Reads the mask: 0 background, ``1 + class_id``, 255 left out of scores.

        Returns:
            The mask, of the picture's size; None where the picture has none.

        Raises:
            ValueError: It is damaged, of another size, or has values outside the classes.
        """
        if self.source is None:
            return None
        mask = self.source()
        if mask.shape != self.size:
            raise ValueError(
                f"expected a mask of {_text(self.size)} for {self.image_id!r}, the size of its "
                f"picture, got {_text(mask.shape)}; do the two belong together?"
            )
        seen = np.bincount(mask.ravel()) if mask.dtype == np.uint8 else np.unique(mask)
        values = np.flatnonzero(seen) if mask.dtype == np.uint8 else seen
        wrong = values[(values > self.class_count) & (values != ignore_value(self.class_count))]
        if wrong.size:
            raise ValueError(
                f"expected labels 0 to {self.class_count} or {ignore_value(self.class_count)} in "
                f"the mask of {self.image_id!r}, got {wrong[0]}; is it of another data set?"
            )
        return mask


class MaskedImages(Sequence[MaskedImage]):
    """A data set of pictures with masks; items are made when asked for, a slice is a data set.

    Args:
        folder: The folder that `files` are relative to.
        image_ids: The name of each picture.
        files: The file of each picture, with ``/`` between folders.
        class_ids: The classes of each picture.
        masks: What `decode` makes a mask of; None for a picture without.
        decode: Makes the raw mask; a function of a module, so that workers can be sent it.
        class_names: Names of the classes, without background.
        split: Part of the data set.
        problems: What was wrong with the data, one line each, most of it left out.
        sources: Where pictures, labels and masks were found.
    """

    def __init__(
        self,
        folder: Path,
        image_ids: Sequence[str],
        files: Sequence[str],
        class_ids: Sequence[tuple[int, ...]],
        masks: Sequence[object],
        decode: Callable[[object], np.ndarray],
        *,
        class_names: Sequence[str],
        split: str,
        problems: Iterable[str] = (),
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.class_names = tuple(class_names)
        self.split = split
        self.problems = list(problems)
        self.sources = dict(sources or {})
        self._rows = list(zip(image_ids, files, class_ids, masks, strict=True))
        self._decode = decode

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> MaskedImage: ...
    @overload
    def __getitem__(self, i: slice) -> "MaskedImages": ...
    def __getitem__(self, i: int | slice) -> "MaskedImage | MaskedImages":
        if isinstance(i, slice):
            return self._part(self._rows[i], self.problems)
        image_id, file, class_ids, mask = self._rows[i]
        source = None if mask is None else partial(self._decode, mask)
        return MaskedImage(image_id, self.folder / file, class_ids, len(self.class_names), source)

    def __iter__(self) -> Iterator[MaskedImage]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"MaskedImages({str(self.folder)!r}, {self.split!r}, {len(self)} images, "
            f"{self.mask_count} masks, {len(self.class_names)} classes, "
            f"{len(self.problems)} problems)"
        )

    @property
    def mask_count(self) -> int:
        """Number of pictures with a mask."""
        return sum(mask is not None for *_, mask in self._rows)

    @property
    def ignore(self) -> int:
        """The value of mask pixels that no score counts."""
        return ignore_value(len(self.class_names))

    def checked(self, *, pictures: bool = True, progress: bool = False) -> "MaskedImages":
        """Reads everything once and returns the sound part, for runs that must not stop.

        A damaged picture is left out, a picture with an unusable mask stays without it; both
        are added to ``problems``.

        Args:
            pictures: Whether pictures are read, too, not only masks.
            progress: Show a progress bar.
        """
        problems, sound = Problems(), []
        for row, item in tqdm(
            zip(self._rows, self, strict=True), "masks", len(self), unit="image",
            disable=not progress,
        ):  # fmt: skip
            try:
                if pictures:
                    item.read()
            except (ValueError, OSError):
                problems.add("pictures that cannot be read, left out", item.path.name)
                continue
            try:
                item.read_mask()
            except (ValueError, OSError) as error:
                problems.add("masks that cannot be used, left out", f"{item.image_id} ({error})")
                row = (*row[:3], None)
            sound.append(row)
        return self._part(sound, [*self.problems, *problems.lines()])

    def _part(self, rows: list[tuple], problems: list[str]) -> "MaskedImages":
        part = MaskedImages(
            self.folder, (), (), (), (), self._decode, class_names=self.class_names,
            split=self.split, problems=problems, sources=self.sources,
        )  # fmt: skip
        part._rows = rows
        return part


def ignore_value(class_count: int) -> int:
    """255, or 65,535 where 255 is a class."""
    return IGNORE if class_count < IGNORE else 65_535


def _text(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


# --------------------------------------------------------------------------- masks in pictures


def voc_colors(count: int = 256) -> UInt8[np.ndarray, "n 3"]:
    """The colors of PASCAL VOC's masks by label.

    The bits of the label go round red, green and blue, three at a time, highest first: label 1
    is (128, 0, 0), 15 (192, 128, 128) and 255 (224, 224, 192).
    """
    labels = np.arange(count)
    colors = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype("u1")
    return colors


def read_label_picture(path: Path) -> Mask:
    """Reads the labels of a mask in a picture file.

    Grey pictures hold the labels themselves. Palette pictures hold them as indices, unless the
    palette has VOC's colors in another order; those, and RGB pictures, are read by color. An RGB
    picture all grey holds the labels, too, unless it is in VOC's colors.

    Raises:
        ValueError: The file cannot be read, or has colors that are not VOC's.
    """
    with opened(path, "mask") as image:
        with damage_named(path, "mask"):
            image.load()
        return _labels(image, path)


def read_region(source: tuple[Path | None, Path, int]) -> Mask:
    """Reads a mask of one label from a picture that is bright inside, above 127.

    Args:
        source: The mask's file, None where all is background; the picture's; the label.

    Raises:
        ValueError: A file cannot be read.
    """
    mask, picture, label = source
    if mask is None:
        return np.zeros(read_size(picture, upright=False), np.uint8)
    return np.where(np.asarray(read_stored(mask).convert("L")) > 127, label, 0).astype(np.uint8)


def _labels(image: Image.Image, path: Path) -> Mask:
    if image.mode in ("RGBA", "LA", "PA"):
        image = image.convert(image.mode[:-1].replace("P", "RGB"))
    if image.mode == "P":
        indices = np.asarray(image)
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        used = np.unique(indices)
        if used[-1] >= len(palette) or (palette[used] == voc_colors()[used]).all():
            return indices
        by_color = _color_labels(palette)
        return indices if (by_color[used] < 0).any() else by_color.astype(np.uint8)[indices]
    if image.mode == "RGB":
        colors = np.asarray(image)
        found = _color_labels(colors)
        if (found >= 0).all():
            return found.astype(np.uint8)
        if (colors == colors[:, :, :1]).all():
            return np.ascontiguousarray(colors[:, :, 0])
        color = tuple(colors[found < 0][0].tolist())
        raise ValueError(f"expected VOC's colors in {str(path)!r}, got {color}; save it as labels")
    labels = np.asarray(image)
    if image.mode == "F" or labels.min() < 0 or labels.max() > 65_535:
        raise ValueError(f"expected labels from 0 to 255 in {str(path)!r}; save it as 8-bit grey")
    return labels.astype(np.uint8 if labels.max() < 256 else np.uint16)


def _color_labels(colors: UInt8[np.ndarray, "*n 3"]) -> np.ndarray:
    # The label of each color, -1 for colors that are none.
    codes, known = _codes(colors), _codes(voc_colors())
    order = np.argsort(known)
    place = np.minimum(np.searchsorted(known, codes, sorter=order), 255)
    labels = order[place]
    return np.where(known[labels] == codes, labels, -1)


def _codes(colors: np.ndarray) -> np.ndarray:
    return colors.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
