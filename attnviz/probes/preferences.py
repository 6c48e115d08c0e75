r"""What shallow stages look for: colors, edges and textures where their attention lies.

Symbols: :math:`f` is a local feature of the picture, :math:`M` a map, both over its pixels.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float, UInt8
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..cam import resize

__all__ = ["FEATURES", "attended_features", "local_features"]

FEATURES = (
    "red", "green", "blue", "saturation",
    "vertical edges", "rising edges", "horizontal edges", "falling edges",
    "fine texture", "coarse texture",
)  # fmt: skip
"""The names of :func:`local_features`. A rising edge goes up to the right."""


def local_features(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "f h w"]:
    """Computes color, edges by direction and texture by size at each pixel of a picture.

    Colors and saturation (largest less smallest color) are in [0, 1]. Edges are the length of
    the brightness' gradient, each in the one of four directions that is nearest. Texture is the
    difference of brightness from its mean nearby (Gaussian of 1 pixel), and of that from its
    mean farther around (4 pixels), without sign.
    """
    colors = image.transpose(2, 0, 1) / 255
    brightness = np.tensordot([0.299, 0.587, 0.114], colors, 1)
    down, right = np.gradient(brightness)
    octant = np.round(np.arctan2(down, right) / (np.pi / 4)).astype(int) % 4
    length = np.hypot(down, right)
    near, around = gaussian_filter(brightness, 1), gaussian_filter(brightness, 4)
    return np.stack([
        *colors, colors.max(axis=0) - colors.min(axis=0),
        *(length * (octant == k) for k in range(4)),
        np.abs(brightness - near), np.abs(near - around),
    ])  # fmt: skip


def attended_features(image: UInt8[np.ndarray, "h w 3"], map: Float[Tensor, "_ _"]) -> pd.Series:
    r"""Compares the picture where the map is with the picture as a whole, feature by feature.

    .. math:: z = \Big( \frac{\sum M f}{\sum M} - \bar f \Big) \Big/ \sigma_f

    An edge draws any shallow map, so that a large value alone says nothing about a class: hold
    it against that of a map of another class, or of the same map moved elsewhere.

    Args:
        image: The picture, RGB.
        map: Its map, at least 0; resized to the picture.

    Returns:
        By name of :data:`FEATURES`, the difference in standard deviations over the picture; 0
        for a feature that is the same everywhere, NaN for a map that is zero.

    Raises:
        ValueError: The picture is not of bytes (h, w, 3), or the map not finite and at least 0.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"expected `image` as bytes of shape (h, w, 3), got {image.dtype} {image.shape}"
        )
    if not map.isfinite().all() or (map < 0).any():
        raise ValueError("expected `map` finite and at least 0, got NaN, infinity or less")
    features = local_features(image).reshape(len(FEATURES), -1)
    weights = resize(map.double()[None], image.shape[:2])[0].flatten().numpy(force=True)
    total = weights.sum()
    attended = features @ weights / total if total > 0 else np.full(len(features), np.nan)
    spread = features.std(axis=1)
    difference = attended - features.mean(axis=1)
    return pd.Series(difference / np.where(spread > 1e-12, spread, np.inf), FEATURES)
