"""From a map to a mask, a component and a box.

Boxes are ``(x0, y0, x1, y1)`` in pixels, half-open: ``x1 - x0`` is the width.
"""

import cv2
import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["box_iou", "largest_component", "map_to_box"]

Box = tuple[int, int, int, int]


def map_to_box(map: Float[Tensor, "h w"], threshold: float = 0.15) -> Box | None:
    """Returns the box of the largest connected region above a share of the map's maximum.

    Args:
        map: A map at the resolution of the image.
        threshold: Share of the maximum, from 0 to 1, that pixels must exceed.

    Returns:
        The tight box of the region with the most pixels, diagonal neighbors connected; None for
        a map without a positive value.

    Raises:
        ValueError: `map` has not two dimensions, or `threshold` is out of range.

    References:
        Thesis section 3.4.1.1 (15 % of the maximum).
    """
    if map.ndim != 2:
        raise ValueError(f"expected `map` of shape (h, w), got {tuple(map.shape)}; map[0]?")
    if not 0 <= threshold < 1:
        raise ValueError(f"expected `threshold` in [0, 1), got {threshold}")
    peak = map.max()
    if not peak > 0:
        return None
    region = largest_component((map > threshold * peak).cpu().numpy())
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def largest_component(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Returns the 8-connected region with the most pixels; the topmost one where several do."""
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8
    )
    if count == 1:
        return np.zeros_like(mask)
    return labels == 1 + statistics[1:, cv2.CC_STAT_AREA].argmax()


def box_iou(a: Box, b: Box) -> float:
    """Returns the intersection over union of two half-open boxes, from 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)
