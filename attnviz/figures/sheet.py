"""A figure of pictures, boxes and arrows, placed in inches, whose text is embedded as text."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from ..cam import resize
from ..colors import colorize, overlay, palette
from ..localize import Box

__all__ = ["COLUMN", "PAGE", "Sheet"]

COLUMN, PAGE = 3.5, 7.0
"""Widths of a column of a two-column paper and of a page, in inches."""
TRUTH, FOUND = "#ff4040", "#40ff60"
TEXT, SMALL, TINY = 8, 7, 6
_SIDE = 224  # pixels of the long side at which pictures are drawn, at least


class Sheet(Figure):
    """A figure that a notebook shows as it is, without pyplot and its shared state."""

    facts = ""
    """What a repetition needs: network, weights and pictures; goes into a saved PDF."""

    def _repr_jpeg_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="jpeg", pil_kwargs={"quality": 90})
        return data.getvalue()

    def savefig(self, fname: object, **options: object) -> None:
        """Saves the figure; in a PDF or SVG, text stays text in embedded TrueType fonts."""
        suffix = fname.suffix if isinstance(fname, Path) else f".{str(fname).rpartition('.')[2]}"
        if (options.get("format") or suffix[1:]).lower() == "pdf":  # the same bytes every time
            facts = {"Subject": self.facts, "CreationDate": None}
            options["metadata"] = facts | (options.get("metadata") or {})
        with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
            super().savefig(fname, **options)


def canvas(width: float, height: float, dpi: int = 130) -> tuple[Sheet, Axes]:
    # One axis over the whole figure whose unit is the inch, for pictures, boxes and arrows.
    figure = Sheet(figsize=(width, height), dpi=dpi)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def put_image(axis: Axes, pixels: np.ndarray, x: float, y: float, width: float) -> float:
    """Draws pixels with their lower left corner at (x, y); returns the height."""
    height = width * pixels.shape[0] / pixels.shape[1]
    limits = axis.get_xlim(), axis.get_ylim()
    extent = (x, x + width, y, y + height)
    axis.imshow(pixels, extent=extent, interpolation="none", aspect="auto")
    axis.set(xlim=limits[0], ylim=limits[1])
    return height


def put_text(axis: Axes, x: float, y: float, text: str, size: float = SMALL, **options: object):  # noqa: ANN202
    options = {"ha": "center", "va": "center", "linespacing": 1.15} | options
    return axis.text(x, y, text, fontsize=size, **options)


def put_box(axis: Axes, x: float, y: float, width: float, height: float, text: str = "") -> None:
    patch = Rectangle((x, y), width, height, facecolor="#eeeeee", edgecolor="black", lw=0.7)
    axis.add_patch(patch)
    if text:
        put_text(axis, x + width / 2, y + height / 2, text)


def put_arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-"
) -> None:
    axis.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=7, lw=0.9, linestyle=style,
            color="black", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def put_network(
    axis: Axes, count: int, x: float, middle: float, width: float, tall: float
) -> list[float]:
    """Draws `count` stages as bars that get lower; returns the middle of each."""
    step = width / count
    centers = []
    for number in range(count):
        height = tall * (1 - 0.62 * number / max(count - 1, 1))
        left = x + number * step
        put_box(axis, left, middle - height / 2, step * 0.72, height)
        centers.append(left + step * 0.36)
        if number < count - 1:
            gap = step * 0.28
            axis.plot([left + step - gap, left + step], [middle, middle], color="black", lw=0.7)
    return centers


def put_outline(
    axis: Axes, box: Box, size: tuple[int, int], place: tuple[float, float, float, float],
    color: str, style: str = "-",
) -> None:  # fmt: skip
    # A box of a picture of `size` that is drawn at `place` = (x, y, width, height).
    x, y, width, height = place
    x0, x1 = (x + side * width / size[1] for side in (box[0], box[2]))
    y0, y1 = (y + height - side * height / size[0] for side in (box[1], box[3]))
    patch = Rectangle((x0, y1), x1 - x0, y0 - y1, fill=False, edgecolor=color, lw=1.3)
    patch.set_linestyle(style)
    patch.set_path_effects([withStroke(linewidth=2.3, foreground="black")])
    if style != "-":  # a dark line below the dashes, and the dashes
        below = Rectangle((x0, y1), x1 - x0, y0 - y1, fill=False, edgecolor="black", lw=2.3)
        axis.add_patch(below)
        patch.set_path_effects([])
    axis.add_patch(patch)


def picture_grid(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    labels: Sequence[str],
    width: float,
    below: float = 0.0,
) -> tuple[Sheet, Axes, list[list[tuple[float, float, float, float]]]]:
    """Pictures in rows; returns the place (x, y, width, height) of each in inches."""
    left = 0.06 + 0.14 * max(label.count("\n") + 1 if label else 0 for label in labels)
    top, gap = 0.2, 0.04
    cell = (width - left - gap * (len(titles) - 1) - 0.02) / len(titles)
    heights = [cell * row[0].shape[0] / row[0].shape[1] for row in rows]
    # a row is as high as its label is long
    slots = [
        max(height, *(0.08 * len(line) for line in label.split("\n")))
        for height, label in zip(heights, labels, strict=True)
    ]
    figure, axis = canvas(width, top + sum(slots) + (gap + below) * len(rows))
    bottom, places = axis.get_ylim()[1] - top, []
    for position, title in enumerate(titles):
        x = left + position * (cell + gap) + cell / 2
        put_text(axis, x, bottom + 0.06, title, TEXT, va="baseline")
    for row, label, height, slot in zip(rows, labels, heights, slots, strict=True):
        bottom -= slot
        middle = bottom + slot / 2
        put_text(axis, left / 2 - 0.01, middle, label, TEXT, rotation=90)
        line = [
            (left + k * (cell + gap), middle - height / 2, cell, height) for k in range(len(row))
        ]
        for pixels, (x, y, size, _) in zip(row, line, strict=True):
            put_image(axis, _fit(pixels, height / cell), x, y, size)
        places.append(line)
        bottom -= gap + below
    return figure, axis, places


def _fit(pixels: np.ndarray, ratio: float) -> np.ndarray:
    # The pixels, squeezed if they have not the ratio of height to width of their row.
    height = round(pixels.shape[1] * ratio)
    if abs(height - pixels.shape[0]) <= 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((pixels.shape[1], height)))


def color_bar(axis: Axes, x: float, y: float, width: float) -> None:
    put_image(axis, np.repeat(palette("inferno")[None], 26, axis=0), x, y, width)
    axis.add_patch(Rectangle((x, y), width, width * 26 / 256, fill=False, lw=0.5))
    put_text(axis, x, y - 0.08, "0", TINY)
    put_text(axis, x + width, y - 0.08, "max", TINY, ha="right")
    put_text(axis, x + width / 2, y + width * 26 / 256 + 0.07, "attention", TINY)


# ---------------------------------------------------------------------------- maps and pixels


def enlarged(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    # The picture at the size at which it is drawn: sharp, and not larger than print needs.
    height, width = picture.shape[:2]
    factor = max(1, -(-_SIDE // max(height, width)))
    factor = min(factor, 2 * _SIDE / max(height, width))
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def greyed(picture: UInt8[np.ndarray, "h w 3"], share: float) -> UInt8[np.ndarray, "h w 3"]:
    grey = np.asarray(Image.fromarray(picture).convert("L"), dtype=float) * share
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def map_over(picture: UInt8[np.ndarray, "h w 3"], map: Tensor, smooth: bool = False) -> np.ndarray:
    # A map in [0, 1] over the darkened picture, with the stage's own grid unless `smooth`.
    large = enlarged(picture)
    values = resize(map, large.shape[:2]).numpy() if smooth else blocky(map.numpy(), large)
    return overlay(greyed(large, 0.5), values, opacity=0.95)


def blocky(map: np.ndarray, picture: UInt8[np.ndarray, "h w 3"]) -> np.ndarray:
    # At the picture's size, with the stage's own grid visible: what the network really sees.
    size = (picture.shape[1], picture.shape[0])
    return np.asarray(Image.fromarray(map).resize(size, Image.Resampling.NEAREST))


def rim(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    # The outermost two pixels of a region.
    inner = np.pad(mask, 2)
    kept = [inner[2 + y : inner.shape[0] - 2 + y, 2 + x : inner.shape[1] - 2 + x]
            for y in (-2, 0, 2) for x in (-2, 0, 2)]  # fmt: skip
    return mask & ~np.all(kept, axis=0)


def map_tile(map: Tensor, side: int = 112) -> np.ndarray:
    height, width = map.shape
    size = (side, round(side * height / width))
    return colorize(
        np.asarray(Image.fromarray(map.numpy()).resize(size, Image.Resampling.NEAREST))
    )
