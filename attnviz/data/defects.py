"""*defects*: a generated data set of textured surfaces with and without a defect.

In the manner of DAGM 2007: grey pictures of several surfaces; about half of them have one
scratch, a group of spots or a blotch. There is a label, a coarse ellipse as DAGM has it and, as
DAGM does not have it, the fine mask of the pixels that the defect changed. Surfaces have stains,
uneven light and, some of them, regular patterns, so that neither darkness nor a line alone gives
a defect away.

Every picture is computed from integers that follow from ``(seed, split, index)``; it needs no
file and has the same bytes everywhere. Surfaces are made once per process, as tiles that repeat;
a picture is a window of one, turned and lit anew.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from torch.utils.data import Dataset

from .draws import Draws, check_choice, check_integer

__all__ = ["DEFECT_KINDS", "SURFACE_NAMES", "Defect", "Defects", "draw_defect"]

SURFACE_NAMES: tuple[str, ...] = ("brushed", "cast", "woven", "leather", "wood", "stone")
"""The surfaces."""

DEFECT_KINDS: tuple[str, ...] = ("scratch", "spots", "blotch")
"""What a defect looks like; all are of the one class ``defect``."""

_SPLITS = {"train": 0, "val": 1, "test": 2}
_TILE = 512  # pixels after which a surface repeats
_LARGEST = 512  # pixels of a side: the picture is one window of the tile
_SHIFT = 4  # cv2's fractional bits
_VISIBLE = 64  # of 255: the share of a pixel's change from which the fine mask has it


@dataclass(frozen=True)
class Defect:
    """One generated picture with its ground truth."""

    image_id: str
    """Such as ``defects-train-000012``: split and index, not seed or size."""
    image: UInt8[np.ndarray, "h w 3"]
    """Grey, as RGB, 0 to 255."""
    surface: str
    """One of ``SURFACE_NAMES``."""
    kind: str | None
    """One of ``DEFECT_KINDS``; None without a defect."""
    mask: Bool[np.ndarray, "h w"]
    """The pixels that the defect changed noticeably."""
    ellipse: Bool[np.ndarray, "h w"]
    """A coarse ellipse round ``mask``."""

    @property
    def class_ids(self) -> tuple[int, ...]:
        """``(0,)`` with a defect, else empty."""
        return () if self.kind is None else (0,)

    def read(self) -> Image.Image:
        """Returns the picture, as data sets on disk do."""
        return Image.fromarray(self.image)

    def read_mask(self) -> UInt8[np.ndarray, "h w"]:
        """Returns the fine mask, 1 inside, as data sets on disk do."""
        return self.mask.astype(np.uint8)


# Surfaces: periodic fields of integers


def _noise(draws: Draws) -> np.ndarray:
    key = [draws.below(65536) for _ in range(4)]
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(_TILE * _TILE // 4)
    values = raw.astype("<u8").view("<u2").reshape(_TILE, _TILE).astype(np.int64)
    return 64 * (values - 32768)


def _blurred(field: np.ndarray, height: int, width: int, times: int = 2) -> np.ndarray:
    """Periodic mean over a window of twice the radii and one, several times."""
    for axis, radius in ((0, height), (1, width)):
        count = 2 * radius + 1
        for _ in range(times if radius else 0):
            along = np.moveaxis(field, axis, 0)
            sums = np.pad(along, ((radius + 1, radius), (0, 0)), mode="wrap").cumsum(axis=0)
            field = np.moveaxis((sums[count:] - sums[:-count]) // count, 0, axis)
    return field


def _leveled(field: np.ndarray) -> np.ndarray:
    """Shifted and scaled to a mean of 0 and a mean size of 500."""
    field = field - field.sum() // field.size
    return field * 500 // max(np.abs(field).sum() // field.size, 1)


def _soft(draws: Draws, height: int, width: int, times: int = 2) -> np.ndarray:
    return _leveled(_blurred(_noise(draws), height, width, times))


def _wave(angles: np.ndarray) -> np.ndarray:
    """-1000 times the cosine of angles in 4096ths of a turn."""
    table = [math.floor(-1000 * math.cos(math.tau * k / 4096) + 0.5137) for k in range(4096)]
    return np.array(table)[angles % 4096]


def _brushed(draws: Draws) -> np.ndarray:
    return 3 * _soft(draws, 0, 40) + 2 * _soft(draws, 2, 90) + _soft(draws, 0, 1) // 2


def _cast(draws: Draws) -> np.ndarray:
    grain = _blurred(_noise(draws), 1, 1, 1)
    lumps = _leveled(_blurred(grain, 2, 2) - _blurred(grain, 6, 6))
    return 3 * lumps + 2 * _leveled(grain) + _soft(draws, 16, 16)


def _woven(draws: Draws) -> np.ndarray:
    y, x = np.mgrid[:_TILE, :_TILE]
    threads = 2 * draws.between(27, 33)  # even, so that the weave repeats with the tile
    across = x * 4096 * threads // _TILE + _soft(draws, 20, 20)
    down = y * 4096 * threads // _TILE + _soft(draws, 20, 20)
    over = (across // 4096 + down // 4096) % 2 == 0
    warp = 3 * _wave(across) + 2 * _wave(down // 2) + _soft(draws, 6, 0)
    weft = 3 * _wave(down) + 2 * _wave(across // 2) + _soft(draws, 0, 6)
    return np.where(over, warp, weft) + _soft(draws, 1, 1)


def _leather(draws: Draws) -> np.ndarray:
    # Cells round scattered points: the distance to the second nearest less that to the nearest.
    cells, reach, turn = 40, 40, _TILE * 16  # a sixteenth of a pixel is one
    nearest = np.full((_TILE, _TILE), turn * turn)
    second = nearest.copy()
    for cell in range(cells * cells):
        cy, cx = ((place * turn + draws.below(turn)) // cells for place in divmod(cell, cells))
        rows, columns = (np.arange(c // 16 - reach, c // 16 + reach) for c in (cy, cx))
        near = (rows[:, None] * 16 - cy) ** 2 + (columns * 16 - cx) ** 2
        place = np.ix_(rows % _TILE, columns % _TILE)
        second[place] = np.minimum(second[place], np.maximum(nearest[place], near))
        nearest[place] = np.minimum(nearest[place], near)
    furrow = np.minimum(np.floor(np.sqrt(second) - np.sqrt(nearest)).astype(np.int64), 64)
    return 3 * _leveled(_blurred(64 * furrow, 1, 1, 1)) + _soft(draws, 1, 1)


def _wood(draws: Draws) -> np.ndarray:
    rows = np.arange(_TILE)[:, None] * 4096 * 20 // _TILE
    rings = _wave(rows + 5 * _soft(draws, 20, 100, 3))
    return rings + 2 * _soft(draws, 0, 24) + 2 * _soft(draws, 1, 8)


def _stone(draws: Draws) -> np.ndarray:
    veins = _leveled(-np.abs(_soft(draws, 12, 12)))
    return 2 * _soft(draws, 1, 1) + 3 * _soft(draws, 3, 3) + 2 * _soft(draws, 8, 8) + veins


def _clouds(draws: Draws) -> np.ndarray:
    return _soft(draws, 36, 36, 3)


_BUILDERS: tuple[Callable[[Draws], np.ndarray], ...] = (
    _brushed, _cast, _woven, _leather, _wood, _stone, _clouds,
)  # fmt: skip
_CLOUDS = 6


@cache
def _tile(number: int) -> np.ndarray:
    """A surface, twice in each direction, so that a window may begin anywhere."""
    field = np.clip(_leveled(_BUILDERS[number](Draws(21, number))), -2000, 2000)
    return np.tile(field.astype(np.int16), (2, 2))


def _window(draws: Draws, number: int, size: int) -> np.ndarray:
    top, left = draws.below(_TILE), draws.below(_TILE)
    window = _tile(number)[top : top + size, left : left + size].astype(np.int32)
    if draws.chance(50):
        window = window.T
    return window[:: 1 if draws.chance(50) else -1, :: 1 if draws.chance(50) else -1]


# Defects: shares of 255 by which each pixel changes

_Point = tuple[float, float]
# The cosine and sine of whole degrees, rounded so that they are the same everywhere.
_TURNS = [
    tuple(round(f(math.radians(a)) * 4096) / 4096 for f in (math.cos, math.sin))
    for a in range(360)
]


def _filled(polygons: list[list[_Point]], size: int) -> np.ndarray:
    """The share of each pixel inside one of the polygons, 0 to 255."""
    canvas = np.zeros((2 * size, 2 * size), np.uint8)
    for polygon in polygons:
        points = [
            [math.floor((2 * side - 0.5) * (1 << _SHIFT) + 0.5137) for side in point]
            for point in polygon
        ]
        cv2.fillPoly(canvas, [np.array(points, np.int32)], 255, cv2.LINE_8, _SHIFT)
    rows = canvas[0::2].astype(np.int32) + canvas[1::2]
    return (rows[:, 0::2] + rows[:, 1::2]) // 4


def _blurred_share(share: np.ndarray, radius: int) -> np.ndarray:
    for _ in range(2):
        window = (2 * radius + 1,) * 2
        sums = cv2.boxFilter(share.astype(np.float64), -1, window, normalize=False)
        share = sums.astype(np.int32) // (window[0] * window[1])
    return share


def _blob(draws: Draws, center: _Point, radius: float, corners: int, rough: int) -> list[_Point]:
    first = draws.below(360)
    points = []
    for k in range(corners):
        cosine, sine = _TURNS[(first + k * 360 // corners) % 360]
        reach = radius * draws.between(100 - rough, 100 + rough) / 100
        points.append((center[0] + reach * cosine, center[1] + reach * sine))
    return points


def _scratch(draws: Draws, size: int) -> tuple[np.ndarray, np.ndarray]:
    cosine, sine = _TURNS[draws.below(360)]
    half = size * draws.between(11, 30) / 100
    bow = half * draws.between(-35, 35) / 100
    cx, cy = (size * draws.between(30, 70) / 100 for _ in range(2))
    width = size * draws.between(8, 20) / 1000
    shake = [draws.between(-20, 20) / 100 * width for _ in range(13)]
    sides: tuple[list[_Point], list[_Point]] = ([], [])
    for k in range(13):
        along = k / 6 - 1  # from -1 to 1
        off = bow * (1 - along * along) + shake[k]
        thick = width * (1 - along * along * along * along) + 0.2
        for side, sign in zip(sides, (0.5, -0.5), strict=True):
            u, v = half * along, off + sign * thick
            side.append((cx + u * cosine - v * sine, cy + u * sine + v * cosine))
    line = [*sides[0], *reversed(sides[1])]
    return _filled([line], size), _filled([_moved(line, -sine * width, cosine * width)], size)


def _spots(draws: Draws, size: int) -> tuple[np.ndarray, np.ndarray]:
    cx, cy = (draws.between(18, 82) for _ in range(2))
    cores, rims = [], []
    for k in range(draws.between(1, 5)):
        reach = 0 if k == 0 else 9
        center = tuple(size * (c + draws.between(-reach, reach)) / 100 for c in (cx, cy))
        core = _blob(draws, center, size * draws.between(14, 36) / 1000, 10, 25)
        cores.append(core)
        rims.append(_moved(core, size * 0.011, size * 0.011))
    return _filled(cores, size), _filled(rims, size)


def _blotch(draws: Draws, size: int) -> tuple[np.ndarray, np.ndarray]:
    center = tuple(size * draws.between(22, 78) / 100 for _ in range(2))
    blob = _blob(draws, center, size * draws.between(9, 17) / 100, 14, 35)
    share = _blurred_share(_filled([blob], size), max(size // 40, 1))
    return share, np.zeros_like(share)


def _moved(polygon: list[_Point], dx: float, dy: float) -> list[_Point]:
    return [(x + dx, y + dy) for x, y in polygon]


_DRAWERS = {"scratch": _scratch, "spots": _spots, "blotch": _blotch}
_STRENGTHS = {"scratch": (36, 72), "spots": (36, 72), "blotch": (14, 32)}  # grey levels


def _ellipse(mask: np.ndarray) -> np.ndarray:
    """The ellipse round the least of the turned boxes that hold the mask, a pixel wider."""
    rows, columns = np.nonzero(mask)
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    best = None
    for angle in range(0, 180, 10):
        # in sixteenths, so that all squares below stay whole numbers of 63 bits
        cosine, sine = (math.floor(16 * turn + 0.5) for turn in _TURNS[angle])
        u, v = columns * cosine + rows * sine, rows * cosine - columns * sine
        ends = [(int(w.min()), int(w.max())) for w in (u, v)]
        sides = [high - low + 32 for low, high in ends]
        if best is None or sides[0] * sides[1] < best[0]:
            best = sides[0] * sides[1], cosine, sine, ends, sides
    _, cosine, sine, ends, sides = best
    # twice the distances from the middle; an ellipse round a box is sqrt(2) times as long
    u = 2 * (x * cosine + y * sine) - sum(ends[0])
    v = 2 * (y * cosine - x * sine) - sum(ends[1])
    a, b = (side * 1449 // 1024 for side in sides)
    return (u * b) ** 2 + (v * a) ** 2 <= (a * b) ** 2


# Pictures


def draw_defect(index: int, *, split: str = "train", seed: int = 0, size: int = 112) -> Defect:
    """Draws one surface, in about half of the cases with a defect.

    Args:
        index: Number of the picture within its split, from 0; there is no last one.
        split: Part of the data set; the splits share no picture.
        seed: Number of the data set, from 0.
        size: Height and width in pixels, 64 to 512.

    Raises:
        TypeError: A number is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> item = draw_defect(1)
        >>> item.image.shape, item.class_ids
        ((112, 112, 3), (0,))
        >>> bool((item.mask <= item.ellipse).all())
        True
    """
    check_integer("index", index, 0)
    _check(split, seed, size)
    index, seed, size = int(index), int(seed), int(size)
    draws = Draws(20, _SPLITS[split], seed, index)
    surface = draws.below(len(SURFACE_NAMES))
    kind = DEFECT_KINDS[draws.below(len(DEFECT_KINDS))] if draws.chance(50) else None

    texture = _window(draws, surface, size) * draws.between(8, 15) // 500
    light = _window(draws, _CLOUDS, size) * draws.between(2, 9) // 500
    ramp = np.arange(size) * 2 - size
    light += ramp * draws.between(-16, 16) // size
    light += ramp[:, None] * draws.between(-16, 16) // size
    light += draws.between(95, 165)

    mask = ellipse = np.zeros((size, size), bool)
    if kind is not None:
        core, rim = _DRAWERS[kind](draws, size)
        strength = draws.between(*_STRENGTHS[kind]) * (1 if draws.chance(35) else -1)
        texture -= texture * core * draws.between(20, 80) // (255 * 100)
        rim = np.maximum(rim - core, 0)
        light += (strength * core - strength * rim // 2) // 255
        mask = np.maximum(core, rim // 2) >= _VISIBLE
        ellipse = _ellipse(mask)
    grey = np.clip(texture + light, 0, 255).astype(np.uint8)
    image = np.repeat(grey[:, :, None], 3, axis=2)
    name = f"defects-{split}-{index:06d}"
    return Defect(name, image, SURFACE_NAMES[surface], kind, mask, ellipse)


def _check(split: object, seed: object, size: object) -> None:
    check_choice("split", split, _SPLITS)
    check_integer("seed", seed, 0)
    check_integer("size", size, 64)
    if size > _LARGEST:
        raise ValueError(f"expected `size` <= {_LARGEST}, got {size}; give a smaller number")


class Defects(Dataset):
    """The generated data set *defects*: an indexed view of :func:`draw_defect`.

    Nothing is stored; items are drawn when asked for, in any order and in any process.

    Args:
        split: Part of the data set.
        count: Number of pictures.
        seed: Number of the data set, from 0.
        size: Height and width in pixels, 64 to 512.
    """

    class_names: tuple[str, ...] = ("defect",)
    """The only class."""

    def __init__(
        self, split: str = "train", count: int = 2000, seed: int = 0, size: int = 112
    ) -> None:
        _check(split, seed, size)
        check_integer("count", count, 1)
        self.split, self.count, self.seed, self.size = split, int(count), int(seed), int(size)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Defect]:
        return map(self.__getitem__, range(self.count))

    def __getitem__(self, i: int) -> Defect:
        if not -self.count <= i < self.count:
            raise IndexError(
                f"expected an index in [{-self.count}, {self.count}), got {i}; "
                "make the data set larger with `count`"
            )
        return draw_defect(i % self.count, split=self.split, seed=self.seed, size=self.size)
