"""Color: tables, colored maps, and maps laid over pictures.

One source for the figures, the ``attnviz map`` command and the panels; the JavaScript of the
panels repeats :func:`overlay` step by step and is tested equal to it. Values are quantized to
256 levels first, so a color stands for one level everywhere. Nothing here normalizes a map: see
:func:`attnviz.cam.normalize`.
"""

from numbers import Real
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, UInt8

__all__ = ["PALETTES", "Palette", "colorize", "overlay", "palette"]

Palette = Literal["inferno", "viridis", "turbo", "jet", "gray"]

PALETTES: tuple[str, ...] = get_args(Palette)
"""The names of the color tables; the first one is the default."""


def palette(name: Palette = "inferno") -> UInt8[np.ndarray, "256 3"]:
    """Returns a color table: the RGB color of each of 256 levels, low first.

    ``inferno``, ``viridis`` and ``gray`` are perceptually uniform and can be read with any
    color vision; ``turbo`` and ``jet`` are there for comparison with older figures.
    """
    if name not in PALETTES:
        raise ValueError(f"expected `palette` in {PALETTES}, got {name!r}")
    from matplotlib import colormaps  # importing attnviz must stay light

    return _round(colormaps[name](np.arange(256))[:, :3] * 255)


def colorize(
    map: Float[np.ndarray, "h w"], palette: Palette = "inferno"
) -> UInt8[np.ndarray, "h w 3"]:
    """Colors a map in [0, 1]; values outside are clipped."""
    return _table(palette)[_levels(map)]


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    map: Float[np.ndarray, "h w"],
    *,
    opacity: float = 0.8,
    palette: Palette = "inferno",
) -> UInt8[np.ndarray, "h w 3"]:
    r"""Lays a map in [0, 1] over a picture of the same size.

    .. math:: \mathrm{result} = (1 - \alpha) \, \mathrm{image} + \alpha \, \mathrm{color}(v),
        \qquad \alpha = \mathrm{opacity} \cdot \sqrt{v}

    The photograph stays as it is where the map is zero, and the root keeps weak regions visible:
    a constant :math:`\alpha` veils the whole photograph, a linear one hides the map's extent.

    Args:
        image: The picture.
        map: The map, for instance from :func:`attnviz.cam.fuse`, normalized and resized.
        opacity: The weight of the color where the map is 1, in [0, 1].
        palette: The color table's name.

    Returns:
        The picture with the map.
    """
    if image.shape[:2] != map.shape:
        raise ValueError(f"expected a map of {image.shape[:2]}, the picture's, got {map.shape}")
    if not isinstance(opacity, Real) or not 0 <= opacity <= 1:
        raise ValueError(f"expected `opacity` from 0 to 1, got {opacity!r}")
    levels = _levels(map)
    weight = opacity * np.sqrt(np.arange(256) / 255)[:, None]
    color = weight * _table(palette)
    return _round((1 - weight)[levels] * image + color[levels])


_table = palette  # the arguments named `palette` hide the function


def _levels(map: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    if np.isnan(map).any():
        raise ValueError("expected a map without NaN; look where they come from")
    return _round(np.clip(map, 0, 1) * 255)


def _round(values: Float[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n"]:
    return np.floor(values + 0.5).astype(np.uint8)  # as JavaScript's Math.round, not half to even
