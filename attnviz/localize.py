"""From a map to a mask, a component and a box.

Boxes are ``(x0, y0, x1, y1)`` in pixels, half-open: ``x1 - x0`` is the width. Three rules find
the box of a map; they differ in what is compared with the threshold and in what "largest" means:

* ``component`` (the thesis): pixels above a share of the maximum; the region with most pixels.
* ``rect`` (the released code): the map cut down to 8 bits, values above that share of 255; the
  region with the largest bounding rectangle.
* ``contour_area`` (the literature's evaluation): the map stretched to 0..255; the contour with
  the largest area, its box clipped to the last row and column.

A :class:`View` carries maps and boxes between an image and what the network saw of it. Scores
of boxes are in :mod:`attnviz.metrics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .checks import check_choice, check_number, check_size, check_whole

__all__ = [
    "THRESHOLDS",
    "Box",
    "Preset",
    "Rule",
    "View",
    "box_iou",
    "component_boxes",
    "eight_bit",
    "grabcut",
    "join_crops",
    "largest_component",
    "map_to_box",
    "mask_to_box",
    "peaks",
    "simonyan",
    "sweep_boxes",
    "views",
]

Box = tuple[int, int, int, int]
Rule = Literal["component", "rect", "contour_area"]
Preset = Literal["tencrop", "resize", "center"]

THRESHOLDS = np.arange(1000) / 1000
"""The thresholds of a sweep: 0 to 0.999 in steps of 0.001."""


# ------------------------------------------------------------------------------ boxes of a map


def map_to_box(
    map: Float[Tensor, "h w"],
    threshold: float = 0.15,
    rule: Rule = "component",
    *,
    size: tuple[int, int] | None = None,
) -> Box | None:
    """Returns the box of the largest connected region above a share of the map's maximum.

    Args:
        map: A map at the resolution of the image, or of any other with `size`.
        threshold: Share of the maximum, from 0 to 1, that pixels must exceed.
        rule: What is compared and which region is largest; see the module's description.
        size: Height and width of the image, to which the map is resized first: bilinearly for
            ``component``, bicubically for the other two (``rect``: after the cut to 8 bits).

    Returns:
        The tight box of that region, diagonal neighbors connected. For a map without a positive
        value None, and ``(0, 0, 1, 1)`` by ``rect``; None for a flat map by ``contour_area``.

    Raises:
        ValueError: `map` has not two dimensions, or `threshold` or `rule` is out of range.

    References:
        Thesis section 3.4.1.1 (15 % of the maximum); for ``contour_area`` Evaluating Weakly
        Supervised Object Localization Methods Right (Choe et al., 2020),
        https://arxiv.org/abs/2001.07437.
    """
    _check_threshold(threshold)
    values, cuts = _compared(map, np.array([threshold]), rule, size)
    return mask_to_box(values > cuts[0], rule)


def mask_to_box(mask: Bool[np.ndarray, "h w"], rule: Rule = "component") -> Box | None:
    """Returns the box of the largest region of a mask; without one as :func:`map_to_box`."""
    _check_rule(rule)
    boxes, weights = _regions(mask, rule)
    if not len(boxes):
        return (0, 0, 1, 1) if rule == "rect" else None
    return tuple(boxes[weights.argmax()].tolist())


def component_boxes(
    map: Float[Tensor, "h w"], threshold: float = 0.15, *, min_pixels: int = 1
) -> list[Box]:
    """Returns the box of every connected region above a share of the map's maximum.

    Args:
        map: A map at the resolution of the image.
        threshold: Share of the maximum, from 0 to 1, that pixels must exceed.
        min_pixels: Regions with fewer pixels are left out.

    Returns:
        The boxes, the region with the most pixels first; no box for a map without a positive
        value. The first one is that of :func:`map_to_box`.
    """
    _check_threshold(threshold)
    values, cuts = _compared(map, np.array([threshold]), "component", None)
    boxes, weights = _regions(values > cuts[0], "component")
    order = np.argsort(-weights, kind="stable")
    return [tuple(boxes[n].tolist()) for n in order if weights[n] >= min_pixels]


def sweep_boxes(
    map: Float[Tensor, "h w"],
    thresholds: Float[np.ndarray, " t"] = THRESHOLDS,
    rule: Rule = "component",
    *,
    keep: Literal["largest", "all"] = "largest",
    size: tuple[int, int] | None = None,
) -> tuple[Int[np.ndarray, "n 4"], Int[np.ndarray, " n"]]:
    """Finds the boxes of a map at many thresholds.

    The same boxes as :func:`map_to_box` finds one by one, in a fraction of the time: equal masks
    are looked at once, and only inside the region that the threshold below left.

    Args:
        map: A map, as for :func:`map_to_box`.
        thresholds: Shares of the maximum, ascending, each in [0, 1).
        rule: See :func:`map_to_box`.
        keep: One box per threshold, or the box of every region (``all``, as MaxBoxAccV2 has it;
            by ``contour_area`` those of holes as well).
        size: See :func:`map_to_box`.

    Returns:
        The boxes, and for each the position of its threshold in `thresholds`, ascending. A
        threshold without a region has no box, by ``rect`` too.
    """
    if keep not in ("largest", "all"):
        raise ValueError(f"expected `keep` in ('largest', 'all'), got {keep!r}")
    if not (len(thresholds) and (np.diff(thresholds) >= 0).all()):
        raise ValueError("expected `thresholds` in ascending order, at least one; sort them")
    _check_threshold(float(thresholds[0]))
    _check_threshold(float(thresholds[-1]))
    values, cuts = _compared(map, thresholds, rule, size)
    whole = values.shape
    follow = _Follow() if (rule, keep) == ("component", "largest") else None
    top = left = before = regions = 0
    found, positions = [np.zeros((0, 4), np.int64)], []
    for position, cut in enumerate(cuts):
        mask = (values[top:, left:] > cut).view(np.uint8)
        pixels = int(np.count_nonzero(mask))
        if not pixels:
            break
        if pixels != before:  # else the same mask, since masks only shrink
            x, y, width, height = cv2.boundingRect(mask)
            values = values[: top + y + height, : left + x + width]
            x, y = x & ~1, y & ~1  # even: OpenCV numbers regions by blocks of 2 x 2
            top, left, before = top + y, left + x, pixels
            mask = mask[y : y + height + 1, x : x + width + 1]
            if follow is not None:
                boxes = follow.largest(mask, pixels, values, (top, left))
            elif keep == "largest" and rule == "rect":
                boxes, regions = _largest_rectangle(mask, regions)
                boxes = boxes + (left, top, left, top)
            else:
                boxes, weights = _regions(mask, rule, (top, left), whole)
                boxes = boxes if keep == "all" else boxes[weights.argmax()][None]
        found.append(boxes)
        positions += [position] * len(boxes)
    return np.concatenate(found), np.array(positions, np.int64)


def eight_bit(
    map: Float[Tensor, "_ _"], size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w"]:
    """Returns a map as the released code thresholds it: ReLU, maximum 255, rounded down.

    Args:
        map: A map of any resolution.
        size: Height and width to which the 8-bit map is resized bicubically, if any.

    Returns:
        Values from 0 to 255; all 0 for a map without a positive value.
    """
    _check_map(map)
    if size is not None:
        check_size("size", size)
    positive = map.detach().double().relu()
    peak = positive.max()
    scaled = positive / peak * 255 if peak > 0 else torch.zeros_like(positive)
    return _cubic(scaled.cpu().numpy().astype(np.uint8), size)


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


def peaks(
    map: Float[Tensor, "h w"], *, window: int = 3, at_least: float | None = None
) -> Int[np.ndarray, "n 2"]:
    """Finds the local maxima of a map, one for each instance at best.

    Args:
        map: A map, or a class's scores by location; it may be signed.
        window: Odd side of the square in which a peak has no greater neighbor.
        at_least: Lowest value of a peak, in the map's unit; its median if None.

    Returns:
        Row and column of each peak, highest first. Connected places of one value are one peak,
        the topmost and then leftmost of them; a flat map has none.

    References:
        Weakly Supervised Instance Segmentation using Class Peak Response (Zhou et al., 2018),
        https://arxiv.org/abs/1804.00880.
    """
    _check_map(map)
    check_whole("window", window, 3)
    if at_least is not None:
        check_number("at_least", at_least)
    if window % 2 == 0:
        raise ValueError(f"expected `window` as an odd number from 3, got {window}")
    values = map.detach().double().cpu().numpy()
    if values.min() == values.max():
        return np.zeros((0, 2), np.int64)
    highest = cv2.dilate(values, np.ones((window, window), np.uint8))  # the border is -infinity
    low = np.median(values) if at_least is None else at_least
    mask = (values == highest) & (values >= low)
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    numbers, first = np.unique(labels, return_index=True)
    places = np.stack(np.unravel_index(first[numbers > 0], labels.shape), axis=1)
    order = np.lexsort((places[:, 1], places[:, 0], -values[tuple(places.T)]))
    return places[order]


def _compared(
    map: Tensor, thresholds: np.ndarray, rule: Rule, size: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    # The values and, for each threshold, the number that they must exceed.
    _check_map(map)
    _check_rule(rule)
    if size is not None:
        check_size("size", size)
    map = map.detach() if map.dtype == torch.float64 else map.detach().float()
    if rule == "component":
        map = map if size is None else _linear(map, size)
        shares = torch.from_numpy(thresholds).to(map)
        return map.cpu().numpy(), (shares * map.max()).cpu().numpy()
    if rule == "rect":  # cv2.threshold cuts bytes at the number rounded down: 38.25 keeps 39
        return eight_bit(map, size), np.floor(255 * thresholds)
    values = _cubic(map.double().cpu().numpy(), size)
    span = values.max() - values.min()
    stretched = (values - values.min()) / (span if span > 0 else 1) * 255
    stretched = stretched.astype(np.uint8)
    return stretched, np.floor(thresholds * stretched.max())


def _regions(
    mask: np.ndarray,
    rule: Rule,
    offset: tuple[int, int] = (0, 0),
    size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    # The box and the weight of every region of a mask that lies at `offset` in a whole of `size`.
    (top, left), (height, width) = offset, size or mask.shape
    mask = mask.astype(np.uint8)
    if rule == "contour_area":
        contours, _ = cv2.findContours(
            mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top)
        )
        boxes = np.array([cv2.boundingRect(each) for each in contours], np.int64).reshape(-1, 4)
        boxes[:, 2:] = np.minimum(boxes[:, :2] + boxes[:, 2:], (width - 1, height - 1))
        return boxes, np.array([cv2.contourArea(each) for each in contours])
    # A hole lies inside the rectangle of its region: regions are enough for `rect`.
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    boxes, pixels = statistics[1:, :4].astype(np.int64), statistics[1:, cv2.CC_STAT_AREA]
    weights = boxes[:, 2] * boxes[:, 3] if rule == "rect" else pixels
    boxes[:, 2:] += boxes[:, :2]
    return boxes + (left, top, left, top), weights


class _Follow:
    # The largest region of a mask that shrinks from call to call. All regions are looked at only
    # where the one that was the largest may no longer be: a region never grows, so the others
    # have at most `_others` pixels outside of it, and inside what it has lost.
    def __init__(self) -> None:
        self._seed: tuple[int, int] | None = None  # its highest place, in the whole
        self._pixels = self._others = 0

    def largest(
        self, mask: np.ndarray, pixels: int, values: np.ndarray, offset: tuple[int, int]
    ) -> np.ndarray:
        """Returns the box of a mask with so many pixels, which lies at `offset` in `values`."""
        top, left = offset
        if self._others == 0:
            outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            if len(outlines) == 1:
                self._pixels = pixels
                x, y, width, height = cv2.boundingRect(outlines[0])
                return np.array([[left + x, top + y, left + x + width, top + y + height]])
        box = self._flooded(mask, pixels, offset)
        if box is None:
            box = self._counted(mask, values[top:, left:], offset)
        x, y, width, height = box
        return np.array([[left + x, top + y, left + x + width, top + y + height]])

    def _flooded(
        self, mask: np.ndarray, pixels: int, offset: tuple[int, int]
    ) -> Sequence[int] | None:
        # Of the region with the seed; None where another one may be as large.
        if self._seed is None:
            return None
        y, x = self._seed[0] - offset[0], self._seed[1] - offset[1]
        if not (0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]):
            return None
        found, _, _, box = cv2.floodFill(mask, None, (x, y), 2, flags=8)
        others = max(self._others, min(self._pixels, pixels) - found)
        if found <= others:
            return None
        self._pixels, self._others = found, 0 if found == pixels else others
        return box

    def _counted(
        self, mask: np.ndarray, values: np.ndarray, offset: tuple[int, int]
    ) -> Sequence[int]:
        _, labels = cv2.connectedComponents(mask, connectivity=8)  # statistics take thrice as long
        pixels = np.bincount(labels.ravel())
        pixels[0] = 0
        number = int(pixels.argmax())
        self._pixels = int(pixels[number])
        pixels[number] = 0
        self._others = int(pixels.max())
        region = labels == number
        x, y, width, height = box = cv2.boundingRect(region.view(np.uint8))
        part = (slice(y, y + height), slice(x, x + width))
        inside = np.where(region[part], values[part], -np.inf)
        row, column = divmod(int(inside.argmax()), width)
        self._seed = (offset[0] + y + row, offset[1] + x + column)
        return box


def _largest_rectangle(mask: np.ndarray, regions: int) -> tuple[np.ndarray, int]:
    # The largest bounding rectangle, and about how many regions there are: what to expect next.
    # Outlines are faster than labels, unless there are many regions.
    if regions <= 60:
        contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        boxes = np.array([cv2.boundingRect(each) for each in contours])
        weights = boxes[:, 2] * boxes[:, 3]
        best = np.flatnonzero(weights == weights.max())
        if len(best) == 1:  # else the topmost one is wanted, and outlines have another order
            x, y, width, height = boxes[best[0]].tolist()
            return np.array([[x, y, x + width, y + height]]), len(contours)
    boxes, weights = _regions(mask, "rect")
    return boxes[weights.argmax()][None], len(boxes)


def _linear(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(maps[None, None], size=size, mode="bilinear")[0, 0]


def _cubic(values: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    if size is None or values.shape == tuple(size):
        return values
    return cv2.resize(values, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)


def _check_map(map: Tensor) -> None:
    if not isinstance(map, Tensor):
        raise TypeError(
            f"expected `map` as a tensor, got {type(map).__name__}; torch.from_numpy(map)?"
        )
    if map.ndim != 2 or not map.numel():
        raise ValueError(f"expected `map` of shape (h, w), got {tuple(map.shape)}; map[0]?")
    if not map.isfinite().all():
        raise ValueError("expected `map` without NaN and infinity; look where they come from")


def _check_threshold(threshold: float) -> None:
    if not isinstance(threshold, Real) or not 0 <= threshold < 1:
        raise ValueError(f"expected `threshold` in [0, 1), got {threshold!r}")


def _check_rule(rule: str) -> None:
    check_choice("rule", rule, Rule)


# ----------------------------------------------------------------------------------- graph cut


def grabcut(
    image: UInt8[np.ndarray, "h w 3"],
    map: Float[Tensor, "h w"],
    threshold: float = 0.15,
    *,
    iterations: int = 1,
    seed: int = 0,
) -> Bool[np.ndarray, "h w"]:
    """Grows a map's strong places into an object along the colors of the image.

    What the released code calls GraphCut: OpenCV's grabCut in which places above the threshold
    are certainly object and all others only probably background, so the mask is never smaller
    than the thresholded map. The thesis takes this step for the two shallowest stages, the
    released code for the three shallowest.

    Args:
        image: The image's pixels, RGB.
        map: A map at the resolution of the image.
        threshold: Share of the maximum that sure places must exceed.
        iterations: How often mixtures and cut are repeated.
        seed: Seed of OpenCV's random numbers, which place the first mixtures; it is set anew.

    Returns:
        The object; the thresholded map itself where it is empty or covers the whole image.

    References:
        "GrabCut" (Rother et al., 2004), https://doi.org/10.1145/1015706.1015720; thesis section
        3.4.1.1.
    """
    seeds = _seeds(image, map, threshold)
    if seeds.all() or not seeds.any():  # OpenCV raises where one side has no pixel
        return seeds
    mask = np.where(seeds, cv2.GC_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    cv2.setRNGSeed(seed)
    models = np.zeros((2, 1, 65))
    cv2.grabCut(image, mask, None, *models, iterations, cv2.GC_INIT_WITH_MASK)
    return (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)


def simonyan(
    image: UInt8[np.ndarray, "h w 3"],
    map: Float[Tensor, "h w"],
    *,
    foreground: float = 0.95,
    background: float = 0.30,
    threshold: float = 0.15,
    seed: int = 0,
) -> Bool[np.ndarray, "h w"]:
    """Cuts an image into object and background from quantiles of a map.

    Places from the upper quantile are certainly object, those up to the lower quantile certainly
    background. Only these two sets shape the two color mixtures; one graph cut then divides the
    places between. The engine is OpenCV's grabCut with its mixtures kept fixed.

    Args:
        image: The image's pixels, RGB.
        map: A map at the resolution of the image.
        foreground: Quantile of the map from which places are object.
        background: Quantile of the map up to which places are background. In a map with more
            zeros than that, all zeros are.
        threshold: Share of the maximum for the mask of a flat map, which has no such places.
        seed: Seed of OpenCV's random numbers, which place the mixtures; it is set anew.

    Returns:
        The object; :func:`mask_to_box` takes its largest component.

    References:
        Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency
        Maps (Simonyan et al., 2014), https://arxiv.org/abs/1312.6034; Interactive Graph Cuts
        (Boykov and Jolly, 2001), https://doi.org/10.1109/ICCV.2001.937505.
    """
    if not 0 <= background < foreground <= 1:
        raise ValueError(
            f"expected 0 <= `background` < `foreground` <= 1, got {background} and {foreground}"
        )
    plain = _seeds(image, map, threshold)
    values = map.detach().double().cpu().numpy()
    low, high = np.quantile(values, (background, foreground))
    inside, outside = (values >= high) & (values > low), values <= low
    if not inside.any() or not outside.any():
        return plain
    sure = np.concatenate([image[inside], image[outside]])[None]
    labels = np.repeat([cv2.GC_FGD, cv2.GC_BGD], [inside.sum(), outside.sum()])
    cv2.setRNGSeed(seed)
    models = np.zeros((2, 1, 65))
    cv2.grabCut(
        sure, labels.astype(np.uint8)[None], None, *models, 0, cv2.GC_INIT_WITH_MASK
    )  # 0 iterations: the mixtures of the sure places and no cut
    mask = np.select([inside, outside], [cv2.GC_FGD, cv2.GC_BGD], cv2.GC_PR_BGD).astype(np.uint8)
    cv2.grabCut(image, mask, None, *models, 1, cv2.GC_EVAL_FREEZE_MODEL)
    return (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)


def _seeds(image: np.ndarray, map: Tensor, threshold: float) -> np.ndarray:
    _check_threshold(threshold)
    values, cuts = _compared(map, np.array([threshold]), "component", None)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"expected `image` as bytes of shape (h, w, 3), got {image.dtype} {image.shape}"
        )
    if image.shape[:2] != values.shape:
        raise ValueError(
            f"expected `map` at the image's size {image.shape[:2]}, got {values.shape}; "
            "resize it first"
        )
    return values > cuts[0]


# ------------------------------------------------------------------- what the network saw of it


@dataclass(frozen=True)
class View:
    """What a network sees of an image: the image resized, a window cut out, perhaps mirrored.

    Sizes are (height, width). Boxes are carried exactly, as fractions of pixels.
    """

    image_size: tuple[int, int]
    """Size of the image."""
    resized: tuple[int, int]
    """Size to which the whole image is resized."""
    offset: tuple[int, int]
    """Row and column, in the resized image, where the window begins."""
    size: tuple[int, int]
    """Size of the window, which is the network's input."""
    mirrored: bool = False
    """Whether the window is turned left to right."""

    def __post_init__(self) -> None:
        for start, length, whole in zip(self.offset, self.size, self.resized, strict=True):
            if start < 0 or length < 1 or start + length > whole:
                raise ValueError(
                    f"expected a window inside the resized image {self.resized}, got "
                    f"{self.size} at {self.offset}; make the crop smaller"
                )

    def pixels(self, image: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the window's pixels, resized bilinearly with antialiasing."""
        self._check_size(image.shape[:2])
        height, width = self.resized
        whole = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        window = np.asarray(whole)[self._window]
        return np.ascontiguousarray(window[:, ::-1] if self.mirrored else window)

    def box_to_network(self, box: Sequence[Real]) -> tuple[float, float, float, float]:
        """Returns a box of the image in the network's coordinates; it may reach outside."""
        y, x = self._scale
        x0, x1 = (float(each) * x - self.offset[1] for each in (box[0], box[2]))
        y0, y1 = (float(each) * y - self.offset[0] for each in (box[1], box[3]))
        x0, x1 = self._mirror(x0, x1)
        return x0, y0, x1, y1

    def box_to_image(self, box: Sequence[Real]) -> tuple[float, float, float, float]:
        """Returns a box of the network's input in the image's coordinates."""
        y, x = self._scale
        x0, x1 = self._mirror(float(box[0]), float(box[2]))
        x0, x1 = ((each + self.offset[1]) / x for each in (x0, x1))
        y0, y1 = ((float(each) + self.offset[0]) / y for each in (box[1], box[3]))
        return x0, y0, x1, y1

    def map_to_network(self, map: Float[Tensor, "_ _"]) -> Float[Tensor, "h w"]:
        """Returns what the network sees of a map at the image's size."""
        self._check_size(tuple(map.shape))
        window = _linear(map, self.resized)[self._window]
        return window.flip(1) if self.mirrored else window

    def map_to_resized(self, map: Float[Tensor, "_ _"]) -> Float[Tensor, "h w"]:
        """Returns a map of the input, at any resolution, in the resized image; 0 outside."""
        window = _linear(map, self.size)
        window = window.flip(1) if self.mirrored else window
        (top, left), (height, width) = self.offset, self.size
        below, right = self.resized[0] - top - height, self.resized[1] - left - width
        return pad(window, (left, right, top, below))

    def map_to_image(self, map: Float[Tensor, "_ _"]) -> Float[Tensor, "h w"]:
        """Returns a map of the input, at any resolution, at the image's size; 0 outside."""
        return _linear(self.map_to_resized(map), self.image_size)

    @property
    def _scale(self) -> tuple[float, float]:
        return self.resized[0] / self.image_size[0], self.resized[1] / self.image_size[1]

    @property
    def _window(self) -> tuple[slice, slice]:
        (top, left), (height, width) = self.offset, self.size
        return slice(top, top + height), slice(left, left + width)

    def _mirror(self, x0: float, x1: float) -> tuple[float, float]:
        return (self.size[1] - x1, self.size[1] - x0) if self.mirrored else (x0, x1)

    def _check_size(self, size: tuple[int, int]) -> None:
        if tuple(size) != tuple(self.image_size):
            raise ValueError(f"expected the image's size {self.image_size}, got {tuple(size)}")


def views(
    image_size: tuple[int, int], preset: Preset = "tencrop", *, crop: int = 224, resize: int = 256
) -> tuple[View, ...]:
    """Returns the windows of an image that a localization protocol shows to the network.

    Args:
        image_size: Height and width of the image.
        preset: ``tencrop`` (the released code): the image squeezed to a square, its corners and
            center, and the same mirrored, in torchvision's order. ``resize``: the whole image
            squeezed to the input. ``center``: the short side resized, the center cut out, as in
            plain classification; what lies outside can't be localized.
        crop: Side of the network's input.
        resize: Side to which the image is resized before the crop; ``resize`` ignores it.

    Returns:
        One view, or ten.

    Example:
        >>> view = views((375, 500), "center")[0]
        >>> view.resized, view.offset
        ((256, 341), (16, 58))
    """
    check_choice("preset", preset, Preset)
    size = (crop, crop)
    if preset == "resize":
        return (View(image_size, size, (0, 0), size),)
    if preset == "center":
        short = min(image_size)
        resized = tuple(int(resize * side / short) for side in image_size)
        middle = tuple(round((side - crop) / 2) for side in resized)
        return (View(image_size, resized, middle, size),)
    end, middle = resize - crop, round((resize - crop) / 2)
    places = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    straight = [View(image_size, (resize, resize), place, size) for place in places]
    turned = [  # the same places in the mirrored image
        View(image_size, (resize, resize), (top, end - left), size, mirrored=True)
        for top, left in places
    ]
    return (*straight, *turned)


def join_crops(maps: Float[Tensor, "b _ _"], views: Sequence[View]) -> Float[Tensor, "h w"]:
    """Sums the raw maps of several windows where they lie in the resized image.

    Windows overlap more in the middle, where the sum therefore weighs more, as in the released
    code. The scores of the windows are summed as they are.

    Args:
        maps: One raw map per view, at any resolution, none normalized.
        views: The windows, of one image.

    Returns:
        The sum at the size of the resized image; :func:`map_to_box` with the image's `size` (and
        ``rule="rect"``, as released) gives the box in the image.
    """
    if len(maps) != len(views) or not views:
        raise ValueError(f"expected one map per view, got {len(maps)} maps, {len(views)} views")
    if len({(view.image_size, view.resized) for view in views}) > 1:
        raise ValueError("expected views of one resized image, got several; join each image alone")
    return sum(view.map_to_resized(map) for map, view in zip(maps, views, strict=True))
