"""What every panel is made of: its state, its checks, its picture, and how data is sent.

A panel is one anywidget. Its data is sent once and its state is a few small traits; everything
is drawn in the browser. So the same JavaScript also runs in a page without a kernel: see
:mod:`attnviz.panels.export`.
"""

import base64
import io
import os
import textwrap
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

import anywidget
import numpy as np
import torch
import traitlets
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor

from .. import colors
from ..checks import plain
from ..images import to_pixels
from ..stages import Staged
from .export import save_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..figures.sheet import Sheet

__all__ = ["Panel"]

ClassId = int | str | Sequence[int | str] | None
Picture = Image.Image | np.ndarray | str | Path
Setting = bool | int | float | str | Sequence[int] | Sequence[str]
Line = tuple[int, int, int, int]

EXACT_BYTES = 32_000
"""Pictures that take no more than this as PNG are sent so, larger ones as JPEG."""

_WIDGET_TRAITS = {"_esm", "_css", "_anywidget_id", *anywidget.AnyWidget.class_trait_names()}


def source(name: str) -> str:
    """Returns the JavaScript module of a panel: the shared part, then its own.

    The two are joined here because a module loaded from a blob has no neighbours to import.
    """
    folder = files("attnviz.panels") / "js"
    return "\n".join((folder / f"{part}.js").read_text("utf-8") for part in ("core", name))


def style() -> str:
    """Returns the style sheet of the panels."""
    return (files("attnviz.panels") / "js" / "panel.css").read_text("utf-8")


class Panel(anywidget.AnyWidget):
    """A panel: draws itself in the browser, leaves a picture in the notebook, saves as a page.

    A subclass sets ``_esm``, declares its traits and has a method ``picture`` that returns the
    pixels which stand for it where no widget can be drawn.

    Args:
        **settings: Initial values of the traits.

    Raises:
        TypeError: A setting is not a trait of the panel.
    """

    opacity = traitlets.Float(0.8).tag(sync=True)
    """The weight of the color where a map is largest, in [0, 1]."""
    palette = traitlets.Unicode("inferno").tag(sync=True)
    """The color table, one of :data:`attnviz.colors.PALETTES`."""

    _data = traitlets.Dict().tag(sync=True)
    _css = style()

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Saves the panel in its current state as one page that needs no kernel and no network.

        Args:
            path: The file; replaced as a whole, or not at all.

        Returns:
            The path of the file.
        """
        return save_page(path, title=repr(self), module=self._esm, css=self._css, state=self.state)

    def to_figure(self, width: float = 7.0) -> "Sheet":
        """Returns what is on screen as a matplotlib figure, for a paper.

        Lines and text are lines and text in it, so save it as PDF or SVG with ``savefig``.

        Args:
            width: Width of the figure in inches.
        """
        from ..figures.sheet import canvas, put_image  # matplotlib, which a panel does without

        check_width(width)
        pixels = self.picture()
        figure, axis = canvas(width, width * pixels.shape[0] / pixels.shape[1])
        put_image(axis, pixels, 0, 0, width)
        return figure

    @property
    def state(self) -> dict[str, object]:
        """The data and the settings of the panel: what the browser needs to draw it."""
        return self.get_state([name for name in self.keys if name not in _WIDGET_TRAITS])

    def _repr_mimebundle_(self, **kwargs: object) -> tuple[dict[str, object], dict[str, object]]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        buffer = io.BytesIO()
        Image.fromarray(self.picture()).save(buffer, "JPEG", quality=85)
        return data | {"image/jpeg": base64.b64encode(buffer.getvalue()).decode()}, metadata

    @traitlets.validate("opacity")
    def _check_opacity(self, proposal: traitlets.Bunch) -> float:
        require(0 <= proposal.value <= 1, f"`opacity` in [0, 1], got {proposal.value:g}")
        return proposal.value

    @traitlets.validate("palette")
    def _check_palette(self, proposal: traitlets.Bunch) -> str:
        choices = colors.PALETTES
        require(proposal.value in choices, f"`palette` in {choices}, got {proposal.value!r}")
        return proposal.value


def wrapped(text: str, width: float, size: float) -> str:
    """Breaks a figure's text into lines of `width` inches at `size` points."""
    return textwrap.fill(text, max(int(width * 72 / (0.55 * size)), 12))


# --------------------------------------------------------------------------------------- checks


def require(condition: bool, message: str) -> None:
    """Raises a trait's error unless a condition holds."""
    if not condition:
        raise traitlets.TraitError(f"expected {message}")


def check_index(index: int, count: int) -> int:
    """Returns the place of a picture among `count`, or raises the trait's error."""
    require(
        0 <= index < count,
        f"`image_index` in [0, {count}), got {index}; the panel has {count} "
        f"picture{'s' * (count > 1)}",
    )
    return index


def check_lengths(count: int, **given: Sequence[object]) -> None:
    """Raises a ValueError unless there are pictures and as many entries of all the others."""
    if count == 0:
        raise ValueError("expected at least one picture in `images`, got none")
    for name, values in given.items():
        if len(values) != count:
            raise ValueError(
                f"expected {count} entries in `{name}`, one for each picture, got {len(values)}"
            )


def check_width(width: float) -> None:
    """Raises an error unless a figure can be so many inches wide."""
    if not isinstance(width, Real):
        raise TypeError(
            f"expected `width` in inches, got {width!r}; to_figure().savefig(name) saves a figure"
        )
    if not 1 <= width <= 100:
        raise ValueError(f"expected `width` from 1 to 100 inches, got {width:g}")


def check_settings(settings: dict[str, Setting], panel: type[Panel]) -> None:
    """Raises a TypeError if a panel has no such setting; traitlets alone would drop it."""
    known = [
        name
        for name, trait in panel.class_traits(sync=True).items()
        if name not in _WIDGET_TRAITS and not name.startswith("_") and not trait.read_only
    ]
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4) or known
            raise TypeError(
                f"expected a setting of the panel, got `{name}`; the nearest are {near}"
            )


# ------------------------------------------------------------------------------------- outlines


def borders(labels: Shaped[np.ndarray, "h w"]) -> list[Line]:
    """Returns the lines between pixels of different labels, ``(x0, y0, x1, y1)``."""
    lines = []
    for turned in (False, True):
        field = labels.T if turned else labels
        for row, edge in enumerate(field[1:] != field[:-1], 1):
            ends = np.flatnonzero(np.diff(edge, prepend=False, append=False))
            for start, end in ends.reshape(-1, 2).tolist():
                lines.append((row, start, row, end) if turned else (start, row, end, row))
    return lines


def put_lines(
    axis: "Axes", lines: Sequence[Line], size: tuple[int, int],
    place: tuple[float, float, float, float], color: str,
) -> None:  # fmt: skip
    """Draws lines of a picture of `size` that is at `place` in a figure, over dark ones."""
    from matplotlib.collections import LineCollection

    x, y, width, height = place
    across, down = width / size[1], height / size[0]
    ends = [
        [(x + x0 * across, y + height - y0 * down), (x + x1 * across, y + height - y1 * down)]
        for x0, y0, x1, y1 in lines
    ]
    for tone, thick in (("black", 1.8), (color, 1.0)):
        axis.add_collection(LineCollection(ends, colors=tone, linewidths=thick), autolim=False)


# ------------------------------------------------------------------------------ what is sent once


def palettes() -> dict[str, bytes]:
    """Returns the color tables as the browser reads them: RGB, 256 levels each."""
    return {name: colors.palette(name).tobytes() for name in colors.PALETTES}


def encode_picture(
    image: Image.Image, longest: int
) -> tuple[UInt8[np.ndarray, "h w 3"], dict[str, object]]:
    """Returns a picture as the browser decodes it, and the record that is sent; small ones exact.

    Args:
        image: The picture.
        longest: It is shown with at most this many pixels a side.
    """
    if max(image.size) > longest:
        image = image.copy()
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    mime, encoded = "image/png", png.getvalue()
    if len(encoded) > EXACT_BYTES:
        image.save(jpeg, "JPEG", quality=88)
        mime, encoded = "image/jpeg", jpeg.getvalue()
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    size = {"width": image.width, "height": image.height}
    return pixels, size | {"mime": mime, "image": encoded}


def check_map(map: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Returns a map in double precision, or raises a ValueError if it can't be drawn."""
    map = np.asarray(map, np.float64)
    if map.ndim != 2 or map.size == 0:
        raise ValueError(f"expected maps of shape (h, w), at least 1 x 1, got {map.shape}")
    if not np.isfinite(map).all():
        raise ValueError("expected finite maps, got NaN or infinity; check the network")
    return map


def quantize(map: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Returns a map in 256 levels of its largest value; negative values are 0."""
    map = check_map(map)
    peak = map.max()
    if peak <= 0:
        return np.zeros(map.shape, np.uint8)
    return np.floor(np.maximum(map / peak, 0) * 255 + 0.5).astype(np.uint8)


# ------------------------------------------------------------------------- what a network is asked


def ask(
    net: Staged, image: Picture | Tensor, asked: ClassId, classes: int
) -> tuple[Tensor, UInt8[np.ndarray, "h w 3"], list[float], list[tuple[int, str, float]]]:
    """Asks a network about a picture.

    Returns:
        The tensor that the network sees, the pixels that the reader sees, the score of every
        class, and of the classes asked for and the `classes` best ones ``(id, name, score)``.
    """
    tensor, pixels = _read_image(net, image)
    scores = _class_scores(net, tensor)
    chosen = _choose_classes(net, scores, asked, classes)
    names = net.class_names or {number: f"class {number}" for number in chosen}
    entries = [(number, str(names[number]), scores[number]) for number in chosen]
    return tensor, pixels, scores, entries


def _read_image(net: Staged, image: Picture | Tensor) -> tuple[Tensor, UInt8[np.ndarray, "h w 3"]]:
    if isinstance(image, Tensor):
        mean, std = (torch.tensor(values)[:, None, None] for values in (net.mean, net.std))
        pixels = ((image.detach().float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
        return image[None].to(net.device, net.dtype), pixels.permute(1, 2, 0).contiguous().numpy()
    pixels = to_pixels(image)
    return net.preprocess(pixels), pixels


def _class_scores(net: Staged, tensor: Tensor) -> list[float]:
    # Of every class; two for a network with one output.
    output = net(tensor)
    if not isinstance(output, Tensor) or output.ndim not in (1, 2):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"expected a network output of one row of scores per image, got {got}")
    scores = output.flatten().tolist()
    return scores if len(scores) > 1 else [-scores[0], scores[0]]  # classes 0 and 1, as explain


def asked_classes(net: Staged, asked: ClassId) -> list[int]:
    """Returns the numbers of the classes asked for: none, one, or several in any container."""
    asked = [] if asked is None else plain(asked)
    if isinstance(asked, str) or not isinstance(asked, Iterable):
        asked = [asked]
    return [net.class_id(plain(each)) for each in asked]


def _choose_classes(net: Staged, scores: list[float], asked: ClassId, classes: int) -> list[int]:
    # The classes asked for, then the best scoring ones, `classes` of them.
    numbers = asked_classes(net, asked)
    best = sorted(range(len(scores)), key=lambda number: -scores[number])[: max(classes, 1)]
    return list(dict.fromkeys(numbers)) + [number for number in best if number not in numbers]


def image_name(image: Picture | Tensor, number: int) -> str:
    """Returns the name of a picture's file, or its number."""
    return Path(image).stem if isinstance(image, str | os.PathLike) else f"picture {number}"
