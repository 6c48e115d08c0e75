"""Pictures for a training: at the network's size, with their classes, in views of each epoch.

Everything random in an epoch follows from ``(seed, epoch)`` and is drawn for all pictures at once,
whatever is made of it. So a training with the drop layer sees the same order and the same views
as one without, and a batch is the same on one process or on many.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data.folder import Box
from ..data.scenes import Scenes
from ..images import network_size
from ..networks import data_root
from .runs import epoch_seed

__all__ = ["Batch", "Draws", "Pictures", "groups", "open_pictures", "prefetched"]

Fit = Literal["aspect", "square"]
KEPT_BYTES = 1 << 30  # pixels that stay in memory, instead of being read in every epoch


class Item(Protocol):
    """One picture of a data set."""

    image_id: str

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""

    def read(self) -> Image.Image:
        """Reads it."""


@dataclass(frozen=True)
class _Drawn:
    # A scene, drawn and kept.
    image_id: str
    class_ids: tuple[int, ...]
    pixels: UInt8[np.ndarray, "h w 3"]
    mask: UInt8[np.ndarray, "h w"]
    boxes: dict[int, list[Box]]

    @property
    def size(self) -> tuple[int, int]:
        return self.mask.shape

    def read(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def read_mask(self) -> UInt8[np.ndarray, "h w"]:
        return self.mask


class Pictures:
    """The pictures of a split that have a class and a readable header.

    Args:
        items: The pictures.
        class_names: Names of the classes.
        size: Length of the short side at the network's input; None: as the files have it.
        fit: ``aspect`` keeps the ratio of the sides, ``square`` does not.
    """

    def __init__(
        self, items: Sequence[Item], class_names: Sequence[str], size: int | None, fit: Fit
    ) -> None:
        self.class_names = tuple(class_names)
        self.unlabeled: list[str] = []
        self.unreadable: dict[str, str] = {}
        self.image_ids: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.class_ids: list[tuple[int, ...]] = []
        self._items: list[Item] = []
        self._kept: dict[int, UInt8[Tensor, "3 h w"]] = {}
        self._bytes = 0
        for item in items:
            classes = _classes(item)
            if not classes:
                self.unlabeled.append(item.image_id)
                continue
            try:
                height, width = item.size
            except (ValueError, OSError) as error:
                self.unreadable[item.image_id] = str(error)
                continue
            # a square picture stays one, whatever network_size rounds long sides to
            square = fit == "square" or height == width
            if size is None:
                self.sizes.append((height, width))
            else:
                fitted = (size, size) if square else network_size((height, width), size)
                self.sizes.append(fitted)
            self._items.append(item)
            self.image_ids.append(item.image_id)
            self.class_ids.append(classes)

    def __len__(self) -> int:
        return len(self._items)

    def item(self, i: int) -> Item:
        """Returns what the data set says of a picture."""
        return self._items[i]

    def pixels(self, i: int) -> UInt8[Tensor, "3 h w"] | None:
        """Reads a picture at the network's size; None, and a note, where it cannot be read."""
        if i in self._kept:
            return self._kept[i]
        height, width = self.sizes[i]
        try:
            image = self._items[i].read()
        except (ValueError, OSError) as error:
            self.unreadable[self._items[i].image_id] = str(error)
            return None
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
        if self._bytes + pixels.nbytes <= KEPT_BYTES:
            self._kept[i] = pixels
            self._bytes += pixels.nbytes
        return pixels

    def mask(self, i: int, class_id: int) -> UInt8[np.ndarray, "h w"] | None:
        """Reads where a class is: 1, 255 for unknown, 0; None without a mask that shows it."""
        labels = self._labels(i)
        if labels is None or not (labels == class_id + 1).any():
            return None
        ignored = 255 if len(self.class_names) < 255 else 65_535
        mask = (labels == class_id + 1).astype(np.uint8)
        mask[labels == ignored] = 255
        return mask

    def boxes(self, i: int, class_id: int) -> list[Box]:
        """Returns the boxes of a class, in pixels of the file; none where none are known."""
        boxes = getattr(self._items[i], "boxes", ())
        return list(boxes.get(class_id, ()) if isinstance(boxes, dict) else boxes)

    def _labels(self, i: int) -> np.ndarray | None:
        read = getattr(self._items[i], "read_mask", None)
        try:
            return None if read is None else read()
        except (ValueError, OSError):
            return None

    def targets(self, indices: Sequence[int]) -> Float[Tensor, "b k"]:
        """Returns 1 for each class of each picture."""
        targets = torch.zeros(len(indices), len(self.class_names))
        for row, i in enumerate(indices):
            targets[row, list(self.class_ids[i])] = 1
        return targets


def _classes(item: Item) -> tuple[int, ...]:
    several = getattr(item, "class_ids", None)
    if several is not None:
        return tuple(several)
    return () if item.class_id is None else (item.class_id,)


def open_pictures(
    data: str,
    split: Literal["train", "validation", "test"],
    *,
    size: int | None,
    fit: Fit = "aspect",
    count: int = 1000,
    limit: int | None = None,
    seed: int = 0,
    objects: str = "few",
    root: str | Path | None = None,
    progress: bool = False,
) -> Pictures | None:
    """Opens a data set for a training.

    Args:
        data: ``scenes``, ``voc2012``, ``coco``, ``cub``, or a folder of labeled pictures.
        split: What is learned from, or what is never seen; a folder has no ``validation``, and
            only ``scenes`` have a ``test`` beside it.
        size: See :class:`Pictures`.
        fit: See :class:`Pictures`.
        count: How many scenes are drawn.
        limit: At most so many pictures, spread evenly over the split.
        seed: Number of the scenes.
        objects: Kind of the scenes.
        root: The data root; see :func:`attnviz.networks.data_root`.
        progress: Show a progress bar.

    Returns:
        The pictures; None where the data set has no such part.

    Raises:
        FileNotFoundError: The data set is not there.
        ValueError: Fewer than two of its pictures can be used.
    """
    train = split == "train"
    if data == "scenes":
        count = min(count, limit or count)
        drawn = Scenes().size if size is None else size
        part = "val" if split == "validation" else split
        items = _draw(part, count, seed, drawn, objects, progress)
        names = Scenes.class_names
    else:
        source = None if split == "test" else _open(data, train, data_root(root), progress)
        if source is None:
            return None
        chosen = min(limit or len(source), len(source))
        items = [source[i * len(source) // chosen] for i in range(chosen)]
        most = max((c for item in items for c in _classes(item)), default=-1)
        names = source.class_names or [str(i) for i in range(1 + most)]
    pictures = Pictures(items, names, size, fit)
    if len(pictures) < 2:
        raise ValueError(
            f"expected at least two labeled pictures in {data}, got {len(pictures)} of "
            f"{len(items)}; {len(pictures.unlabeled)} have no label, "
            f"{len(pictures.unreadable)} cannot be read"
        )
    return pictures


def _open(data: str, train: bool, root: Path, progress: bool) -> Sequence[Item] | None:
    if data == "voc2012":
        from ..data.voc import load_voc

        try:
            return load_voc(root / data, "train_aug" if train else "val", progress=progress)
        except FileNotFoundError:
            if not train:
                raise
            return load_voc(root / data, "train", progress=progress)
    if data == "coco":
        from ..data.coco import load_coco

        return load_coco(root / data, "train" if train else "val")
    if data == "cub":
        from ..data.cub import load_cub

        return load_cub(root / data, "train" if train else "test", progress=progress)
    if not train:
        return None
    from ..data.folder import load_folder

    return load_folder(data, progress=progress)


def _draw(
    split: str, count: int, seed: int, size: int, objects: str, progress: bool
) -> list[_Drawn]:
    scenes, items = Scenes(split, count, seed, size, objects), []
    for scene in tqdm(scenes, f"drawing {split}", count, unit=" images", disable=not progress):
        labels = np.zeros(scene.image.shape[:2], np.uint8)
        boxes: dict[int, list[Box]] = {}
        for each in scene.objects:
            labels[each.mask] = each.class_id + 1
            boxes.setdefault(each.class_id, []).append(each.box)
        items.append(_Drawn(scene.image_id, scene.class_ids, scene.image, labels, boxes))
    return items


# ---------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class Draws:
    """Everything random in one epoch, for every picture."""

    order: Int[Tensor, " n"]
    """The order of the pictures."""
    flips: Bool[Tensor, " n"]
    """Which are mirrored left to right."""
    boxes: Float[Tensor, "n 4"]
    """The part in the view, (x0, y0, x1, y1) in shares of width and height."""
    chances: Float[Tensor, " n"]
    """The drop layer's r of algorithm 1."""
    colors: Float[Tensor, "n 4"]
    """Changes of brightness, contrast, saturation and hue, from -1 to 1."""
    shares: Float[Tensor, "n 3"]
    """From 0 to 1: the size, top and left of a crop of the picture, enlarged or reduced."""

    @classmethod
    def of(
        cls, seed: int, epoch: int, count: int, *, shuffle: bool, flips: bool, crops: bool
    ) -> "Draws":
        """Draws an epoch; what is switched off changes nothing else."""
        generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
        order = torch.randperm(count, generator=generator)
        draws = torch.rand(count, 10, generator=generator)
        side = 1 - 0.5 * draws[:, 1:2]  # from half a side to the whole
        corner = draws[:, 2:4] * (1 - side)
        boxes = torch.cat([corner, corner + side], dim=1)
        return cls(
            order if shuffle else torch.arange(count),
            draws[:, 0] < 0.5 if flips else torch.zeros(count, dtype=torch.bool),
            boxes if crops else torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(count, 4),
            draws[:, 4],
            draws[:, 5:9] * 2 - 1,
            torch.rand(count, 3, generator=generator),
        )


@dataclass(frozen=True)
class Batch:
    """Views of one size that go through the network together."""

    indices: list[int]
    """Places in :class:`Pictures`."""
    pixels: UInt8[Tensor, "b 3 h w"]
    """The views; grey where a picture cannot be read."""
    readable: Bool[Tensor, " b"]
    """Which could be read; the others count nothing."""
    flips: list[bool]
    """Which are mirrored."""
    boxes: list[tuple[float, ...]]
    """The part of the picture in each view."""
    chances: Float[Tensor, " b"]
    """The drop layer's draws."""
    share: float
    """Number of these views as a share of the process's part of the step."""

    @property
    def cropped(self) -> bool:
        """Whether any view is a part only."""
        return any(box != (0.0, 0.0, 1.0, 1.0) for box in self.boxes)


def groups(
    pictures: Pictures, indices: Sequence[int], draws: Draws, jitter: bool, parts: int
) -> list[Batch]:
    """Reads the views of a step, grouped by size and cut into at least `parts` parts."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i in indices:
        by_size.setdefault(pictures.sizes[i], []).append(i)
    most = -(-len(indices) // parts)
    made = []
    for size, members in by_size.items():
        for start in range(0, len(members), most):
            part = members[start : start + most]
            made.append(_batch(pictures, part, size, draws, jitter, len(part) / len(indices)))
    return made


def _batch(
    pictures: Pictures,
    indices: list[int],
    size: tuple[int, int],
    draws: Draws,
    jitter: bool,
    share: float,
) -> Batch:
    read = [pictures.pixels(i) for i in indices]
    boxes = [tuple(draws.boxes[i].tolist()) for i in indices]
    flips = draws.flips[indices].tolist()
    views = []
    for i, pixels, box, flip in zip(indices, read, boxes, flips, strict=True):
        if pixels is None:
            pixels = torch.full((3, *size), 128, dtype=torch.uint8)
        pixels = cut(pixels[None], box)[0]
        if jitter:
            pixels = _colored(pixels, draws.colors[i].tolist())
        views.append(pixels.flip(2) if flip else pixels)
    readable = torch.tensor([pixels is not None for pixels in read])
    return Batch(
        indices, torch.stack(views), readable, flips, boxes, draws.chances[indices], share
    )


def cut(images: Tensor, box: tuple[float, ...]) -> Tensor:
    """Cuts a part out and resizes it to the size of the whole; box in shares."""
    if box == (0.0, 0.0, 1.0, 1.0):
        return images
    height, width = images.shape[2:]
    rows = _positions(height, box[1], box[3])
    columns = _positions(width, box[0], box[2])
    grid = torch.stack(torch.broadcast_tensors(columns[None, :], rows[:, None]), dim=2)
    kind = images.dtype
    found = torch.nn.functional.grid_sample(
        images.float(), grid[None].expand(len(images), -1, -1, -1).to(images.device),
        mode="bilinear", padding_mode="border", align_corners=False,
    )  # fmt: skip
    return found.round().to(kind) if kind == torch.uint8 else found.to(kind)


def _positions(length: int, start: float, end: float) -> Float[Tensor, " n"]:
    # Centers of the view's pixels in grid_sample's coordinates of the whole, -1 to 1.
    return 2 * (start + (torch.arange(length) + 0.5) / length * (end - start)) - 1


def _colored(pixels: UInt8[Tensor, "3 h w"], changes: Sequence[float]) -> UInt8[Tensor, "3 h w"]:
    # The released training's ColorJitter(0.3, 0.3, 0.3, 0.1), in a fixed order.
    from torchvision.transforms.v2 import functional as colors

    brightness, contrast, saturation, hue = changes
    pixels = colors.adjust_brightness(pixels, 1 + 0.3 * brightness)
    pixels = colors.adjust_contrast(pixels, 1 + 0.3 * contrast)
    pixels = colors.adjust_saturation(pixels, 1 + 0.3 * saturation)
    return colors.adjust_hue(pixels, 0.1 * hue)


def prefetched(jobs: Sequence[Callable[[], list[Batch]]], workers: int) -> Iterator[list[Batch]]:
    """Runs jobs in threads, a few ahead, and gives their results in order."""
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(job) for job in jobs[: 2 * workers])
        try:
            for i in range(len(jobs)):
                yield waiting.popleft().result()
                if i + 2 * workers < len(jobs):
                    waiting.append(pool.submit(jobs[i + 2 * workers]))
        finally:
            for future in waiting:
                future.cancel()
