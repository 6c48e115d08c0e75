"""*scenes*: a generated data set of drawn objects made of parts, with full ground truth.

Nothing in it is real: every picture is drawn from integers that follow from ``(seed, split,
index)``, so it needs no file and has the same bytes everywhere. Three families of four classes
share a large body; each class has one small part of its own (antlers, light bar, funnel, ...)
and a context (snow, road, water, ...) that goes with it more often than not. The objects'
colors are random and carry nothing about the class.

A drawing is a list of polygons in model units (object length about 1000, y downwards). Shapes are
built once per process and cached; a scene transforms their vertices in fixed-point arithmetic and
fills them at twice the size, then halves by an integer mean of 2 x 2 pixels.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from .draws import Draws, check_choice, check_integer

__all__ = [
    "CLASS_CONTEXTS",
    "CLASS_NAMES",
    "CLASS_PARTS",
    "CONTEXT_NAMES",
    "FAMILIES",
    "PART_NAMES",
    "SHARED_PARTS",
    "Scene",
    "SceneObject",
    "Scenes",
    "draw_scene",
]

FAMILIES: dict[str, tuple[str, ...]] = {
    "animal": ("deer", "ox", "ram", "horse"),
    "van": ("taxi", "ambulance", "ice-cream van", "fire engine"),
    "ship": ("steamer", "lightship", "trawler", "crane ship"),
}
"""The classes of each family; they share a body."""

CLASS_NAMES: tuple[str, ...] = tuple(name for names in FAMILIES.values() for name in names)
"""The class names; a class id is a place in this tuple."""

CLASS_PARTS: dict[str, str] = {
    "deer": "antlers",
    "ox": "horns",
    "ram": "curled horn",
    "horse": "mane",
    "taxi": "roof sign",
    "ambulance": "light bar",
    "ice-cream van": "ice cream",
    "fire engine": "ladder",
    "steamer": "funnel",
    "lightship": "lantern",
    "trawler": "net",
    "crane ship": "crane",
}
"""The part that only this class has."""

CLASS_CONTEXTS: dict[str, str] = {
    "deer": "snow",
    "ox": "grass",
    "ram": "rocks",
    "horse": "fence",
    "taxi": "crossing",
    "ambulance": "road",
    "ice-cream van": "beach",
    "fire engine": "cobbles",
    "steamer": "water",
    "lightship": "ice",
    "trawler": "jetty",
    "crane ship": "quay",
}
"""The context that goes with the class in about 60 % of its objects."""

SHARED_PARTS: dict[str, tuple[str, ...]] = {
    "animal": ("body", "head", "legs", "tail"),
    "van": ("body", "wheels", "windows"),
    "ship": ("body", "cabin", "windows"),
}
"""The parts that all classes of a family have."""

PART_NAMES: tuple[str, ...] = (
    "body",
    "head",
    "legs",
    "tail",
    "wheels",
    "windows",
    "cabin",
    *CLASS_PARTS.values(),
)
"""All part names: seven shared ones, then the own part of each class, in class order."""

CONTEXT_NAMES: tuple[str, ...] = tuple(CLASS_CONTEXTS.values())
"""All context names, in the order of their classes."""

_SPLITS = {"train": 0, "val": 1, "test": 2}
_COUNTS = {"few": (1, 2), "several": (2, 4)}
_LENGTHS = {"few": (60, 86), "several": (36, 52)}  # object length, percent of the image size
_VARIANTS = 16  # shapes per class, built once per process
_SHIFT = 4  # cv2's fractional bits
_CONTEXT_LABEL = 200  # label map: 0 nothing, 1 + object * parts + part, 200 + context


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene with its visible region, after occlusion by other objects."""

    class_id: int
    """Place in ``CLASS_NAMES``."""
    box: tuple[int, int, int, int]
    """``(x0, y0, x1, y1)`` in pixels, half-open, tight round ``mask``."""
    mask: Bool[np.ndarray, "h w"]
    """The visible pixels."""
    parts: dict[str, Bool[np.ndarray, "h w"]]
    """The visible pixels of each part; disjoint, together ``mask``. A hidden part is empty."""


@dataclass(frozen=True)
class Scene:
    """One generated image with its ground truth."""

    image: UInt8[np.ndarray, "h w 3"]
    """RGB, 0 to 255."""
    class_ids: tuple[int, ...]
    """The classes present, ascending, each once."""
    objects: tuple[SceneObject, ...]
    """From back to front; empty when drawn with ``masks=False``."""
    contexts: dict[str, Bool[np.ndarray, "h w"]]
    """The visible pixels of each context present, objects and clutter excluded."""
    image_id: str
    """Such as ``scenes-train-000012``: split and index, not seed, size or kind."""


# Shapes: polygons in model units

_Number = int | float
_Point = tuple[_Number, _Number]
_Polygon = list[_Point]

# Color roles of a piece; an object's colors are a list in this order
_OUTLINE, _BODY, _BODY_SHADE, _BODY_LIGHT, _FAR, _FAR_SHADE, _MARK, _PART, _PART_SHADE = range(9)
_SECOND, _SECOND_SHADE, _GLASS, _GLASS_LIGHT, _LAMP, _DARK, _WHITE, _BLACK = range(9, 17)


def _smooth(points: Sequence[_Point], steps: int = 5, closed: bool = True) -> _Polygon:
    """Catmull-Rom curve through the points."""
    n = len(points)
    curve = []
    for i in range(n if closed else n - 1):
        near = [
            points[(i + k) % n] if closed else points[min(max(i + k, 0), n - 1)]
            for k in (-1, 0, 1, 2)
        ]
        for step in range(steps):
            t = step / steps
            weights = (
                -t + 2 * t * t - t**3,
                2 - 5 * t * t + 3 * t**3,
                t + 4 * t * t - 3 * t**3,
                t**3 - t * t,
            )
            x, y = (sum(w * q[k] for w, q in zip(weights, near, strict=True)) / 2 for k in (0, 1))
            curve.append((x, y))
    return curve if closed else [*curve, points[-1]]


def _rounded(points: Sequence[_Point], radius: _Number, steps: int = 4) -> _Polygon:
    """The polygon with its corners rounded."""
    result = []
    for i, (x, y) in enumerate(points):
        ends = []
        for px, py in (points[i - 1], points[(i + 1) % len(points)]):
            length = math.hypot(px - x, py - y)
            share = min(radius / length, 0.5) if length else 0
            ends.append((x + (px - x) * share, y + (py - y) * share))
        (ax, ay), (bx, by) = ends
        for step in range(steps + 1):
            t = step / steps
            u, v, w = (1 - t) ** 2, 2 * t * (1 - t), t * t
            result.append((u * ax + v * x + w * bx, u * ay + v * y + w * by))
    return result


def _box(x0: _Number, y0: _Number, x1: _Number, y1: _Number, radius: _Number = 0) -> _Polygon:
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    return _rounded(corners, radius) if radius else corners


def _ellipse(
    x: _Number, y: _Number, rx: _Number, ry: _Number | None = None, n: int = 20
) -> _Polygon:
    ry = rx if ry is None else ry
    angles = [2 * math.pi * k / n for k in range(n)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _limb(points: Sequence[_Point], widths: Sequence[_Number], steps: int = 5) -> _Polygon:
    """A smooth stroke through the points whose width follows `widths`, with a rounded tip."""
    spine = _smooth(points, steps, closed=False)
    left, right = [], []
    for i, (x, y) in enumerate(spine):
        (px, py), (qx, qy) = spine[max(i - 1, 0)], spine[min(i + 1, len(spine) - 1)]
        length = math.hypot(qx - px, qy - py) or 1
        place = i / (len(spine) - 1) * (len(widths) - 1)
        k = min(int(place), len(widths) - 2)
        half = (widths[k] + (widths[k + 1] - widths[k]) * (place - k)) / 2
        nx, ny = -(qy - py) / length * half, (qx - px) / length * half
        left.append((x + nx, y + ny))
        right.append((x - nx, y - ny))
    (px, py), (x, y) = spine[-2:]
    length = math.hypot(x - px, y - py) or 1
    tip = (x + (x - px) / length * widths[-1] / 2, y + (y - py) / length * widths[-1] / 2)
    return [*left, tip, *reversed(right)]


def _moved(polygon: _Polygon, dx: _Number, dy: _Number, scale: _Number = 1) -> _Polygon:
    return [(x * scale + dx, y * scale + dy) for x, y in polygon]


def _turned(polygon: _Polygon, center: _Point, degrees: _Number) -> _Polygon:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    cx, cy = center
    return [
        (cx + (x - cx) * c - (y - cy) * s, cy + (x - cx) * s + (y - cy) * c) for x, y in polygon
    ]


def _offset(polygon: _Polygon, amount: _Number, below: _Number = 0) -> _Polygon:
    """Moves each vertex outwards by `amount`, less `below` where it faces the ground."""
    points = np.array(polygon)
    points = points[np.abs(points - np.roll(points, 1, 0)).max(1) > 0.5]
    edges = points - np.roll(points, 1, 0)
    before = np.stack([edges[:, 1], -edges[:, 0]], 1) / _length(edges)
    crosses = np.roll(points, 1, 0) * points[:, ::-1]
    if (crosses[:, 0] - crosses[:, 1]).sum() < 0:
        before = -before
    normal = before + np.roll(before, -1, 0)
    normal /= _length(normal)
    # a miter keeps the distance at corners, up to a limit
    miter = np.minimum(1 / np.maximum((before * normal).sum(1), 0.4), 2)
    facing = np.maximum(0.35 * normal[:, 0] + 0.94 * normal[:, 1], 0)
    moved = points + normal * (miter * (amount - below * facing))[:, None]
    return [(x, y) for x, y in moved.tolist()]


def _length(vectors: np.ndarray) -> np.ndarray:
    return np.maximum(np.sqrt((vectors * vectors).sum(1, keepdims=True)), 1e-9)


@dataclass(frozen=True)
class _Shape:
    """A drawing, ready to transform: all vertices in one array, and what to fill in order."""

    vertices: np.ndarray  # (n, 2) int64, model units
    pieces: tuple[tuple[int, int, int, int], ...]  # start, stop, color role, part or 0
    extent: tuple[int, int, int, int]  # x0, y0, x1, y1 of the vertices


class _Pen:
    """Collects the pieces of a drawing, back to front."""

    def __init__(self) -> None:
        self.pieces: list[tuple[_Polygon, int, int]] = []

    def fill(self, part: str | int, role: int, *polygons: _Polygon) -> None:
        number = PART_NAMES.index(part) if isinstance(part, str) else part
        self.pieces += [(polygon, role, number) for polygon in polygons]

    def solid(
        self,
        part: str | int,
        role: int,
        *polygons: _Polygon,
        shade: int | None = None,
        depth: _Number = 16,
        line: _Number = 11,
    ) -> None:
        """Polygons joined under one outline, with a shade along their lower right rims."""
        if line:
            self.fill(part, _OUTLINE, *(_offset(p, line) for p in polygons))
        if shade is None:
            self.fill(part, role, *polygons)
            return
        self.fill(part, shade, *polygons)
        for polygon in polygons:
            self.fill(part, role, _offset(polygon, 0, depth))

    def shape(self) -> _Shape:
        vertices, pieces, start = [], [], 0
        for polygon, role, part in self.pieces:
            vertices += polygon
            pieces.append((start, start + len(polygon), role, part))
            start += len(polygon)
        # the odd offset keeps ties such as 12.5, where the last bit of a cosine would decide, away
        points = [(math.floor(x + 0.5137), math.floor(y + 0.5137)) for x, y in vertices]
        array = np.array(points, dtype=np.int64)
        extent = (*array.min(0).tolist(), *array.max(0).tolist())
        return _Shape(array, tuple(pieces), extent)


# The drawings: tables of coordinates, laid out by hand
# fmt: off


# The animals


def _animal(own: str, draws: Draws) -> _Shape:
    pen = _Pen()
    stretch, lift, drop = draws.between(-30, 40), draws.between(-45, 30), draws.between(-25, 25)
    belly, nod = draws.between(-15, 25), draws.between(-7, 9)
    rear = -stretch

    far, near = [], []
    for x, back, group in ((330 + rear, 1, far), (706, 0, far), (246 + rear, 1, near),
                           (628, 0, near)):
        swing = draws.between(-48, 48)
        knee = (x + swing * 0.35 + (-16 if back else 10), 745)
        foot = (x + swing * 0.9, 925 + drop)
        leg = _limb([(x, 470), (x + 4, 590), knee, (foot[0], foot[1] - 24)],
                    [70, 138 if back else 116, 66, 50])
        hoof = [(foot[0] - 31, foot[1] - 24), (foot[0] + 31, foot[1] - 24),
                (foot[0] + 42, foot[1] + 24), (foot[0] - 36, foot[1] + 24)]
        group.append((leg, _rounded(hoof, 12)))
    wag = draws.between(-25, 25)
    tail = _limb([(195 + rear, 425), (130 + rear, 440), (100 + rear + wag, 530),
                  (96 + rear + wag, 640)], [46, 30, 26, 30])
    tuft = _smooth([(80 + rear + wag, 600), (112 + rear + wag, 600), (126 + rear + wag, 670),
                    (96 + rear + wag, 745), (66 + rear + wag, 670)])
    torso = _smooth([
        (205 + rear, 388), (300 + rear, 368), (430, 388), (545, 376), (618, 340),
        (672, 258 + lift),
        (722, 200 + lift), (790, 200 + lift), (832, 270 + lift), (810, 370), (786, 462),
        (744, 556),
        (650, 612), (500, 632 + belly), (340, 612 + belly / 2), (232 + rear, 612),
        (166 + rear, 530),
        (158 + rear, 435),
    ])

    for leg, hoof in far:
        pen.solid("legs", _FAR, leg, shade=_FAR_SHADE, depth=10)
        pen.solid("legs", _DARK, hoof, line=0)
    pen.solid("tail", _BODY_SHADE, tail)
    pen.solid("tail", _SECOND, tuft, shade=_SECOND_SHADE)

    def head(polygon: _Polygon) -> _Polygon:
        return _turned(_moved(_moved(polygon, -760, -200, 1.12), 760, 212 + lift),
                       (760, 220 + lift), nod)

    _antlers_behind(pen, own, head)
    pen.solid("head", _FAR, head(_smooth([(800, 190), (790, 120), (830, 60), (856, 120),
                                          (842, 185)])))
    for leg, hoof in near:
        pen.fill("legs", _OUTLINE, *(_offset(p, 11) for p in (leg, hoof)))
    pen.solid("body", _BODY, torso, shade=_BODY_SHADE, depth=34)
    for _ in range(4):
        x, y = draws.between(250, 640), draws.between(425, 520)
        r = draws.between(36, 66)
        spot = [(x + dx * r * draws.between(80, 120) / 100,
                 y + dy * r * draws.between(65, 105) / 100)
                for dx, dy in _ellipse(0, 0, 1, 1, 7)]
        pen.fill("body", _MARK, _smooth(spot, 3))
    for leg, hoof in near:
        pen.solid("legs", _BODY, leg, shade=_BODY_SHADE, depth=12, line=0)
        pen.solid("legs", _DARK, hoof, line=0)
    if own == "mane":
        crest = [(640, 322), (690, 230 + lift), (724, 165 + lift), (800, 132 + lift)]
        outer, inner = [], []
        for i, (x, y) in enumerate(_smooth(crest, 4, closed=False)):
            wave = 12 if i % 2 else -12
            outer.append((x - 40 - wave * 0.6, y - 22 - wave))
            inner.append((x + 26 + wave, y + 24 + wave * 1.6))
        mane = _smooth([*outer, (850, 168 + lift), *reversed(inner)], 3)
        pen.solid(own, _PART, mane, shade=_PART_SHADE, depth=20, line=8)
        for i in (3, 6, 9):
            x, y = _smooth(crest, 4, closed=False)[i]
            lock = _limb([(x - 26, y - 14), (x, y), (x + 14, y + 24)], [4, 12, 4])
            pen.fill(own, _PART_SHADE, lock)

    skull = head(_smooth([
        (735, 178), (790, 152), (850, 176), (905, 226), (948, 262), (966, 305), (945, 345),
        (895, 352), (838, 336), (778, 318), (732, 262),
    ]))
    pen.solid("head", _BODY, skull, shade=_BODY_SHADE, depth=20)
    pen.fill("head", _SECOND, head(_smooth([(918, 244), (950, 268), (962, 305), (942, 340),
                                            (900, 345), (884, 300)])))
    pen.fill("head", _OUTLINE, head(_ellipse(938, 284, 10, 13, 10)))
    pen.fill("head", _OUTLINE, head(_limb([(950, 322), (915, 324), (885, 312)], [8, 8, 4], 3)))
    pen.fill("head", _WHITE, head(_ellipse(838, 226, 25, 27, 14)))
    pen.fill("head", _BLACK, head(_ellipse(845, 229, 17, 20, 12)))
    pen.fill("head", _WHITE, head(_ellipse(851, 221, 6, 6, 8)))
    if own != "curled horn":
        pen.solid("head", _BODY, head(_smooth([(748, 226), (706, 196), (668, 130), (735, 146),
                                               (782, 196)])),
                  line=8)
        pen.fill("head", _SECOND, head(_smooth([(744, 208), (716, 186), (694, 152), (736, 166),
                                                (762, 196)])))
    if own == "mane":
        pen.solid(own, _PART, head(_smooth([(742, 178), (790, 130), (838, 150), (852, 205),
                                            (815, 186), (790, 200)])),
                  shade=_PART_SHADE, line=8)
    _antlers_front(pen, own, head)
    return pen.shape()


def _antlers_behind(pen: _Pen, own: str, head: Callable[[_Polygon], _Polygon]) -> None:
    if own == "antlers":
        antler = _antler()
        pen.solid(own, _PART_SHADE, *(head(_moved(p, 74, 8)) for p in antler), line=4)
    elif own == "horns":
        horn = _limb([(818, 180), (872, 130), (902, 60), (886, -20)], [62, 54, 36, 8])
        pen.solid(own, _PART_SHADE, head(horn), line=8)


def _antler() -> list[_Polygon]:
    return [
        _limb([(782, 190), (768, 120), (716, 50), (690, -40), (722, -130)], [25, 24, 20, 17, 9]),
        _limb([(764, 112), (800, 60), (806, 0)], [20, 18, 8]),
        _limb([(706, 26), (658, -14), (640, -70)], [20, 17, 8]),
        _limb([(692, -30), (738, -56), (756, -98)], [17, 14, 8]),
    ]


def _antlers_front(pen: _Pen, own: str, head: Callable[[_Polygon], _Polygon]) -> None:
    if own == "antlers":
        pen.solid(own, _PART, *map(head, _antler()), line=5)
    elif own == "horns":
        horn = _limb([(770, 186), (712, 140), (672, 66), (690, -30)], [66, 58, 40, 8])
        pen.solid(own, _PART, head(horn), shade=_PART_SHADE, depth=18, line=9)
        for t in (0.2, 0.36):
            x, y = 770 - 150 * t, 186 - 150 * t
            pen.fill(own, _PART_SHADE, head(_limb([(x - 24, y + 24), (x + 8, y - 24)], [9, 9], 1)))
    elif own == "curled horn":
        spiral = []
        for k in range(11):
            angle = math.radians(-62 - 40 * k)
            radius = 80 - 6 * k
            spiral.append((754 + radius * math.cos(angle), 226 + radius * math.sin(angle)))
        horn = head(_limb(spiral, [66, 62, 55, 45, 33, 10], 3))
        pen.fill(own, _OUTLINE, head(_ellipse(748, 226, 70, 70)))
        pen.solid(own, _PART, horn, shade=_PART_SHADE, depth=10, line=9)
        for k in range(9):
            angle = math.radians(-80 - 36 * k)
            radius = 77.5 - 5.4 * k
            inner, outer = radius - 21 + 1.7 * k, radius + 23 - 1.7 * k
            rib = [(754 + r * math.cos(angle), 226 + r * math.sin(angle)) for r in (inner, outer)]
            pen.fill(own, _PART_SHADE, head(_limb(rib, [8, 8], 1)))


# The vans


def _van(own: str, draws: Draws) -> _Shape:
    pen = _Pen()
    roof, nose = draws.between(-35, 25), draws.between(-30, 25)
    front, rear, wheel = draws.between(735, 775), draws.between(215, 255), draws.between(88, 102)
    top = 110 + roof
    _on_roof(pen, own, top)
    shell = _rounded([
        (30, 520), (38, top + 20), (70, top), (640, top), (676, top + 12), (812, 292),
        (930, 322 + nose // 3),
        (972, 372), (985, 520),
    ], 46)
    pen.fill("body", _OUTLINE, _box(60, 470, 960, 548, 20))
    pen.solid("body", _BODY, shell, shade=_BODY_SHADE, depth=34)
    pen.fill("body", _BODY_LIGHT, _box(84, top + 16, 620, top + 30, 6))
    band = draws.between(345, 372)
    pen.fill("body", _MARK, _box(38, band, 972, band + draws.between(26, 52)))
    pen.fill("body", _OUTLINE, _box(20, 500, 300, 528, 12), _box(700, 500, 1000, 528, 12))
    glass = [
        _rounded([(650, top + 40), (662, top + 44), (776, 300), (650, 300)], 16),
        _rounded([(518, top + 40), (622, top + 40), (622, 300), (518, 300)], 16),
    ]
    panes = draws.between(1, 3)
    left, right = 84, 476
    step = (right - left) / panes
    glass += [_box(left + step * k + 10, top + 44, left + step * (k + 1) - 10, 285, 16)
              for k in range(panes)]
    for pane in glass:
        pen.solid("windows", _GLASS, pane, line=9)
        x, y = min(p[0] for p in pane), max(p[1] for p in pane)
        glint = [(x + 14, y - 12), (x + 38, y - 12), (x + 84, top + 58), (x + 60, top + 58)]
        if pane is glass[0]:
            glint = [(x + 22, y - 12), (x + 48, y - 12), (x + 34, top + 116), (x + 18, top + 80)]
        pen.fill("windows", _GLASS_LIGHT, glint)
    pen.fill("body", _OUTLINE, _box(500, top + 26, 507, 492), _box(634, 300, 641, 492))
    pen.fill("body", _OUTLINE, _box(524, 322, 568, 336, 6))
    pen.solid("body", _LAMP, _ellipse(948, 398, 24, 34, 14), line=8)
    pen.solid("body", _SECOND, _box(34, 380, 56, 440, 8), line=6)
    pen.fill("body", _BLACK, *(_ellipse(x, 506, wheel + 20, wheel + 20) for x in (rear, front)))
    for x in (rear, front):
        pen.fill("wheels", _OUTLINE, _ellipse(x, 520, wheel, wheel, 24))
        pen.fill("wheels", _DARK, _ellipse(x, 520, wheel - 12, wheel - 12, 24))
        pen.fill("wheels", _WHITE, _ellipse(x, 520, wheel * 0.52))
        pen.fill("wheels", _SECOND_SHADE, _ellipse(x, 520, wheel * 0.4))
        pen.fill("wheels", _OUTLINE, _ellipse(x, 520, wheel * 0.14, n=10))
    return pen.shape()


def _on_roof(pen: _Pen, own: str, top: int) -> None:
    if own == "roof sign":
        pen.fill(own, _OUTLINE, _box(250, top - 30, 290, top + 10),
                 _box(440, top - 30, 480, top + 10))
        sign = _rounded([(210, top - 14), (236, top - 118), (494, top - 118), (520, top - 14)], 22)
        pen.solid(own, _PART, sign, shade=_PART_SHADE, depth=14)
        for k in range(6):
            for row in range(2):
                if (k + row) % 2:
                    x, y = 250 + 39 * k, top - 104 + 38 * row
                    pen.fill(own, _BLACK, _box(x, y, x + 39, y + 38))
    elif own == "light bar":
        pen.solid(own, _DARK, _box(214, top - 26, 606, top + 6, 8))
        pen.solid(own, _PART, _box(226, top - 96, 594, top - 18, 34), shade=_PART_SHADE, depth=16)
        pen.fill(own, _OUTLINE, _box(346, top - 98, 474, top - 18))
        pen.fill(own, _WHITE, _box(354, top - 88, 466, top - 26))
        for x in (252, 496):
            pen.fill(own, _LAMP, _box(x, top - 84, x + 72, top - 68, 8))
        for x, dx in ((200, -34), (290, 0), (530, 0), (620, 34)):
            low, high = (118, 158) if dx == 0 else (84, 112)
            ray = [(x, top - low), (x + dx, top - high)]
            pen.solid(own, _LAMP, _limb(ray, [15, 10], 1), line=5)
    elif own == "ice cream":
        tip, rim, x = top + 10, top - 146, 330
        cone = [(x - 66, rim), (x + 66, rim), (x + 16, tip), (x - 16, tip)]
        pen.solid(own, _SECOND, cone, shade=_SECOND_SHADE, depth=14)
        for k in (-1, 0, 1):
            pen.fill(own, _SECOND_SHADE, _limb([(x + 46 * k - 18, rim + 8),
                                                (x + 14 * k + 4, tip - 30)], [8, 8], 1))
        scoops = [_ellipse(x - 40, rim - 18, 50, 48), _ellipse(x + 40, rim - 18, 50, 48),
                  _ellipse(x, rim - 76, 54, 52)]
        pen.solid(own, _PART, *scoops, shade=_PART_SHADE, depth=22)
        pen.solid(own, _LAMP, _ellipse(x + 4, rim - 140, 22, 22, 12), line=8)
    elif own == "ladder":
        rise = -50
        lower = [(96, top - 24), (640, top - 24 + rise)]
        upper = [(96, top - 84), (640, top - 84 + rise)]
        for x in (160, 520):
            pen.fill(own, _OUTLINE, _box(x, top - 60, x + 24, top + 10))
        rungs = []
        for k in range(6):
            x = 140 + 91 * k
            y = top - 24 + rise * (x - 96) / 544
            rungs.append(_limb([(x, y), (x, y - 60)], [13, 13], 1))
        rails = [_limb(rail, [17, 17], 1) for rail in (lower, upper)]
        pen.solid(own, _PART, *rungs, line=4)
        pen.solid(own, _PART, *rails, line=6)


# The ships


def _ship(own: str, draws: Draws) -> _Shape:
    pen = _Pen()
    bow, stern, keel = draws.between(380, 425), draws.between(450, 480), draws.between(690, 735)
    house = draws.between(-20, 30)
    x0, x1 = 300 + house, 650 + house
    _on_deck(pen, own, x0, bow)
    bridge = _rounded([(x0 + 150, 240), (x1 - 26, 240), (x1 - 6, 262), (x1 - 34, 372),
                       (x0 + 150, 372)], 14)
    pen.solid("cabin", _SECOND, bridge, shade=_SECOND_SHADE, depth=20)
    pen.solid("cabin", _MARK, _box(x0 + 128, 216, x1 + 10, 246, 12))
    pen.solid("cabin", _SECOND, _box(x0, 352, x1, 520, 14), shade=_SECOND_SHADE, depth=24)
    pen.solid("cabin", _MARK, _box(x0 - 16, 340, x1 + 16, 364, 10), line=8)
    span = (x1 - 44) - (x0 + 168)
    for k in range(3):
        x = x0 + 168 + span * k / 3
        pen.solid("windows", _GLASS, _box(x + 4, 268, x + span / 3 - 12, 326, 8), line=7)
        pen.fill("windows", _GLASS_LIGHT,
                 [(x + 10, 318), (x + 20, 318), (x + 36, 274), (x + 26, 274)])
    for k in range(4):
        x = x0 + 52 + (x1 - x0 - 104) * k / 3
        pen.solid("windows", _GLASS, _ellipse(x, 420, 25, 25, 14), line=8)
        pen.fill("windows", _GLASS_LIGHT, _ellipse(x - 7, 412, 8, 8, 8))
    sheer = _smooth([(30, stern - 6), (200, stern + 24), (450, stern + 34), (700, stern + 6),
                     (985, bow)], 5, False)
    hull = [*sheer, (960, bow + 90), *_smooth([(935, bow + 140), (870, keel - 40), (800, keel)],
                                              4, False),
            *_smooth([(160, keel), (90, keel - 40), (52, keel - 120)], 4, False)]
    pen.solid("body", _BODY, hull, shade=_BODY_SHADE, depth=46)
    stripe = [(x, y + 14) for x, y in sheer[1:-1]]
    pen.fill("body", _MARK, [*stripe, *((x, y + 30) for x, y in reversed(stripe))])
    pen.fill("body", _FAR_SHADE, [(78, keel - 52), (878, keel - 52), (862, keel - 34),
                                  (800, keel), (160, keel),
                                  (100, keel - 30)])
    for k in range(4):
        x = 210 + 150 * k
        pen.fill("windows", _OUTLINE, _ellipse(x, 568, 24, 24, 14))
        pen.fill("windows", _GLASS, _ellipse(x, 568, 15, 15, 12))
    x, y = 858, bow + 96
    flukes = _limb([(x - 30, y + 44), (x, y + 74), (x + 30, y + 44)], [6, 15, 6], 4)
    pen.fill("body", _OUTLINE, _box(x - 6, y, x + 6, y + 66), flukes,
             _box(x - 22, y + 8, x + 22, y + 19))
    return pen.shape()


def _on_deck(pen: _Pen, own: str, x0: int, bow: int) -> None:
    if own == "funnel":
        x = x0 + 20
        puffs = [_ellipse(x + 22, 108, 26, 22), _ellipse(x - 18, 78, 34, 28),
                 _ellipse(x - 68, 62, 26, 21)]
        pen.solid(own, _WHITE, *puffs, shade=_GLASS_LIGHT, depth=10, line=7)
        funnel = [(x - 6, 360), (x, 160), (x + 74, 160), (x + 80, 360)]
        pen.solid(own, _PART, funnel, shade=_PART_SHADE, depth=20)
        pen.fill(own, _PART_SHADE, [(x + 52, 160), (x + 74, 160), (x + 80, 360), (x + 56, 360)])
        pen.fill(own, _WHITE, [(x - 2, 222), (x + 76, 222), (x + 78, 266), (x - 4, 266)])
        pen.solid(own, _OUTLINE, _box(x - 8, 150, x + 82, 176, 8), line=4)
    elif own == "lantern":
        x = 190
        tower = [(x - 38, 500), (x - 22, 200), (x + 22, 200), (x + 38, 500)]
        pen.solid(own, _PART, tower, shade=_PART_SHADE, line=9)
        for y in (240, 330, 420):
            half, below = 22 + (y - 200) * 16 / 300, 22 + (y + 42 - 200) * 16 / 300
            pen.fill(own, _WHITE, [(x - half, y), (x + half, y), (x + below, y + 42),
                                   (x - below, y + 42)])
        pen.solid(own, _DARK, _box(x - 46, 186, x + 46, 206, 6), line=5)
        pen.solid(own, _LAMP, _box(x - 28, 124, x + 28, 186), line=8)
        pen.fill(own, _WHITE, _box(x - 14, 132, x + 2, 180))
        pen.solid(own, _PART, [(x - 42, 126), (x, 70), (x + 42, 126)], shade=_PART_SHADE, line=9)
    elif own == "net":
        end = (62, 214)
        pen.fill(own, _OUTLINE, _limb([(x0 - 40, 500), end], [24, 16], 1),
                 _limb([(x0 - 36, 500), (x0 - 30, 206)], [24, 18], 1),
                 _limb([(x0 - 30, 214), end], [9, 9], 1))
        x, y = 74, 228
        bag = _smooth([(x, y), (x + 30, y + 50), (x + 50, y + 124), (x + 28, y + 178),
                       (x - 24, y + 178),
                       (x - 46, y + 124), (x - 28, y + 50)])
        pen.solid(own, _PART, bag, shade=_PART_SHADE, depth=20, line=9)
        for k in (-1, 0, 1):
            pen.fill(own, _OUTLINE, _limb([(x + 8 * k, y + 24), (x + 28 * k - 8, y + 108),
                                           (x + 18 * k, y + 176)], [6, 6], 3))
        for dy, half in ((58, 30), (96, 41), (134, 45)):
            pen.fill(own, _OUTLINE, _limb([(x - half, y + dy), (x, y + dy + 14),
                                           (x + half, y + dy)], [6, 6], 3))
    elif own == "crane":
        x = 800
        pen.solid(own, _PART, [(x - 22, bow + 90), (x - 15, 190), (x + 15, 190),
                               (x + 22, bow + 90)],
                  shade=_PART_SHADE, line=7)
        for y in (226, 300):
            pen.fill(own, _OUTLINE, _limb([(x - 16, y), (x + 17, y + 40)], [7, 7], 1))
        pen.fill(own, _OUTLINE, _limb([(x, 84), (950, 138)], [7, 7], 1),
                 _limb([(x, 84), (704, 138)], [7, 7], 1))
        pen.solid(own, _PART, _box(x - 8, 74, x + 8, 150), _box(690, 137, 984, 156), line=5)
        pen.fill(own, _OUTLINE, _limb([(956, 150), (956, 246)], [8, 8], 1))
        hook = [(971, 250), (963, 280), (936, 274), (934, 254)]
        pen.fill(own, _OUTLINE, _limb(hook, [11, 14, 11]))
        pen.solid(own, _DARK, _box(686, 150, 730, 196, 8), line=5)
        pen.solid(own, _SECOND, _box(x - 26, 154, x + 34, 208, 8), shade=_SECOND_SHADE, line=6)
        pen.fill(own, _GLASS, _box(x + 4, 162, x + 28, 190))


_BUILDERS = {"animal": _animal, "van": _van, "ship": _ship}
_FAMILY_OF = tuple(family for family, names in FAMILIES.items() for _ in names)


@cache
def _object_shape(class_id: int, variant: int) -> _Shape:
    name = CLASS_NAMES[class_id]
    return _BUILDERS[_FAMILY_OF[class_id]](CLASS_PARTS[name], Draws(1, class_id, variant))


# Contexts: a patch under or behind the object, in the object's model units; the patch's middle is
# at (500, 0), where the object stands. Roles are places in `_CONTEXT_COLORS`.

_CONTEXT_COLORS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "snow": ((226, 234, 244), (190, 206, 226), (252, 253, 255)),
    "grass": ((112, 158, 74), (74, 118, 50), (160, 196, 98)),
    "rocks": ((150, 142, 134), (104, 98, 96), (190, 184, 174)),
    "fence": ((150, 108, 70), (98, 68, 44), (192, 150, 104)),
    "crossing": ((92, 92, 98), (236, 236, 232), (70, 70, 78)),
    "road": ((84, 86, 92), (240, 206, 92), (206, 206, 202)),
    "beach": ((230, 204, 148), (202, 172, 116), (250, 234, 196)),
    "cobbles": ((142, 132, 126), (98, 90, 88), (178, 168, 158)),
    "water": ((72, 138, 190), (48, 104, 160), (170, 212, 234)),
    "ice": ((190, 222, 234), (132, 178, 204), (240, 250, 252)),
    "jetty": ((168, 128, 86), (104, 76, 52), (204, 168, 122)),
    "quay": ((150, 150, 156), (106, 106, 114), (190, 190, 192)),
}


def _ground(draws: Draws, height: int = 150) -> _Polygon:
    """A flat blob 1360 wide round the middle."""
    points = []
    for k in range(14):
        angle = 2 * math.pi * k / 14
        x, y = math.cos(angle), math.sin(angle)
        wobble = draws.between(90, 110) / 100
        points.append((500 + 680 * wobble * math.copysign(abs(x) ** 0.6, x),
                       height * wobble * math.copysign(abs(y) ** 0.6, y)))
    return _smooth(points, 3)


def _spots(draws: Draws, count: int, height: int = 110) -> list[_Point]:
    """Points spread over the ground: one per column, in random rows."""
    return [(500 + 1180 * (k + 0.5) / count - 590 + draws.between(-20, 20),
             draws.between(-height, height))
            for k in range(count)]


def _snow(pen: _Pen, draws: Draws) -> None:
    pen.fill(0, 1, _ground(draws, 150))
    pen.fill(0, 0, _moved(_ground(draws, 130), 0, -14))
    for x, y in _spots(draws, 7, 90):
        pen.fill(0, 2, _ellipse(x, y - 10, draws.between(40, 80), 16, 10))
        pen.fill(0, 1, _limb([(x - 60, y + 20), (x, y + 6), (x + 60, y + 24)], [4, 14, 4], 3))


def _grass(pen: _Pen, draws: Draws) -> None:
    pen.fill(0, 0, _ground(draws))
    for x, y in _spots(draws, 22, 125):
        for dx in (-22, 0, 22):
            role = 1 if draws.chance(60) else 2
            pen.fill(0, role, [(x + dx - 9, y + 20), (x + dx * 1.8, y - draws.between(40, 70)),
                               (x + dx + 9, y + 20)])


def _rocks(pen: _Pen, draws: Draws) -> None:
    for x, y in sorted(_spots(draws, 11, 90), key=lambda p: p[1]):
        rx, ry = draws.between(80, 130), draws.between(50, 80)
        stone = [(x + rx * math.cos(a) * draws.between(80, 110) / 100,
                  y + ry * math.sin(a) * draws.between(80, 110) / 100)
                 for a in (2 * math.pi * k / 8 for k in range(8))]
        pen.fill(0, 1, stone)
        pen.fill(0, 0, _offset(stone, -6, 22))
        pen.fill(0, 2, [(x - rx * 0.6, y - ry * 0.3), (x - rx * 0.1, y - ry * 0.7),
                        (x + rx * 0.3, y - ry * 0.5)])


def _fence(pen: _Pen, draws: Draws) -> None:
    for y in (-300, -170, -40):
        tilt = draws.between(-14, 14)
        pen.fill(0, 1, [(-180, y + 30), (1180, y + 30 + tilt), (1180, y + 58 + tilt),
                        (-180, y + 58)])
        pen.fill(0, 0, [(-180, y), (1180, y + tilt), (1180, y + 44 + tilt), (-180, y + 44)])
    for k in range(7):
        x = -160 + 205 * k + draws.between(-8, 8)
        pen.fill(0, 1, [(x + 8, 60), (x + 8, -350), (x + 38, -386), (x + 68, -350), (x + 68, 60)])
        pen.fill(0, 2, [(x, 60), (x, -350), (x + 30, -386), (x + 54, -350), (x + 54, 60)])


def _slab(draws: Draws, height: int) -> _Polygon:
    lean = draws.between(40, 110)
    return [(-170 + lean, -height), (1170 - lean // 2, -height), (1170 + lean, height),
            (-170 - lean // 2, height)]


def _crossing(pen: _Pen, draws: Draws) -> None:
    pen.fill(0, 0, _slab(draws, 140))
    for k in range(7):
        x, lean = -100 + 185 * k, draws.between(20, 26)
        pen.fill(0, 1, [(x + lean, -112), (x + 92 + lean, -112), (x + 100 - lean, 112),
                        (x - lean, 112)])


def _road(pen: _Pen, draws: Draws) -> None:
    pen.fill(0, 0, _slab(draws, 140))
    pen.fill(0, 2, [(-140, -118), (1140, -118), (1144, -102), (-144, -102)],
             [(-170, 104), (1180, 104), (1180, 122), (-174, 122)])
    start = draws.between(-150, -60)
    for k in range(6):
        x = start + 215 * k
        pen.fill(0, 1, [(x, 28), (x + 120, 28), (x + 120, 56), (x - 4, 56)])


def _beach(pen: _Pen, draws: Draws) -> None:
    pen.fill(0, 1, _ground(draws, 150))
    pen.fill(0, 0, _moved(_ground(draws, 132), 0, -10))
    for x, y in _spots(draws, 20, 110):
        pen.fill(0, 1 if draws.chance(55) else 2, _ellipse(x, y, draws.between(9, 22), 9, 8))
    for x, y in _spots(draws, 5, 90):
        pen.fill(0, 2, _limb([(x - 90, y), (x - 30, y - 12), (x + 30, y + 8), (x + 90, y - 4)],
                             [4, 12, 12, 4], 3))


def _cobbles(pen: _Pen, draws: Draws) -> None:
    pen.fill(0, 1, _slab(draws, 145))
    for row in range(4):
        y = -138 + 72 * row
        for k in range(12):
            x = -120 + 106 * k + (53 if row % 2 else 0)
            stone = _box(x, y, x + 94, y + 58, 24)
            pen.fill(0, 0 if draws.chance(65) else 2, stone)


def _water(pen: _Pen, draws: Draws) -> None:
    pen.fill(0, 0, _moved(_ground(draws, 170), 0, -40))
    for x, y in _spots(draws, 16, 130):
        role = 2 if draws.chance(50) else 1
        wave = [(x - 90, y - 40), (x - 45, y - 58), (x, y - 40), (x + 45, y - 24),
                (x + 90, y - 40)]
        pen.fill(0, role, _limb(wave, [5, 20, 20, 5], 3))


def _ice(pen: _Pen, draws: Draws) -> None:
    for x, y in sorted(_spots(draws, 9, 120), key=lambda p: p[1]):
        r = draws.between(110, 150)
        floe = [(x + r * math.cos(a) * draws.between(80, 115) / 100,
                 y - 30 + 0.36 * r * math.sin(a))
                for a in (2 * math.pi * k / 7 for k in range(7))]
        pen.fill(0, 1, _moved(floe, 0, 24))
        pen.fill(0, 0, floe)
        pen.fill(0, 2, [(x - r * 0.6, y - 34), (x, y - 52), (x + r * 0.5, y - 42), (x, y - 30)])


def _jetty(pen: _Pen, draws: Draws) -> None:
    for k in range(6):
        x = -120 + 235 * k + draws.between(-12, 12)
        pen.fill(0, 1, _box(x, -190, x + 46, 150))
        pen.fill(0, 2, _box(x, -200, x + 46, -176, 8))
    pen.fill(0, 1, _box(-180, -96, 1180, 12))
    for k in range(12):
        x = -180 + 113.4 * k
        pen.fill(0, 0 if draws.chance(60) else 2, _box(x, -96, x + 104, -14))


def _quay(pen: _Pen, draws: Draws) -> None:
    pen.fill(0, 1, _box(-180, -170, 1180, 120))
    pen.fill(0, 2, _box(-196, -196, 1196, -152, 8))
    for row in range(3):
        y = -140 + 86 * row
        for k in range(8):
            x = -172 + 170 * k - (60 if row % 2 else 0)
            pen.fill(0, 0 if draws.chance(70) else 2,
                     _box(max(x, -174), y, min(x + 158, 1174), y + 74))


_CONTEXT_BUILDERS: tuple[Callable[[_Pen, Draws], None], ...] = (
    _snow, _grass, _rocks, _fence, _crossing, _road, _beach, _cobbles, _water, _ice, _jetty, _quay
)


@cache
def _context_shape(number: int, variant: int) -> _Shape:
    pen = _Pen()
    _CONTEXT_BUILDERS[number](pen, Draws(2, number, variant))
    return pen.shape()


# Clutter: things without a class, in the object's color roles


def _clutter(kind: int, draws: Draws) -> _Shape:
    pen = _Pen()
    if kind == 0:  # a tree
        pen.solid(0, _DARK, _limb([(500, 520), (500, 1000)], [70, 110], 1))
        crowns = [_ellipse(500 + dx, 330 + dy, r) for dx, dy, r in
                  ((-150, 60, 190), (150, 70, 180), (0, -90, 210 + draws.between(-30, 30)))]
        pen.solid(0, _BODY, *crowns, shade=_BODY_SHADE, depth=50)
    elif kind == 1:  # a fir
        pen.solid(0, _DARK, _box(450, 820, 550, 1000))
        for y in (560, 330, 100):
            half = 120 + (y // 3)
            pen.solid(0, _BODY, [(500, y), (500 + half, y + 330), (500 - half, y + 330)],
                      shade=_BODY_SHADE)
    elif kind == 2:  # a cloud
        puffs = [_ellipse(x, y, r, r * 0.8) for x, y, r in
                 ((250, 620, 190), (500, 520, 250), (760, 620, 200))]
        pen.solid(0, _WHITE, *puffs, shade=_GLASS_LIGHT, depth=50)
    elif kind == 3:  # a house
        pen.solid(0, _BODY, _box(180, 450, 820, 1000), shade=_BODY_SHADE, depth=40)
        pen.solid(0, _PART, [(100, 480), (500, 150), (900, 480)], shade=_PART_SHADE, depth=30)
        pen.solid(0, _DARK, _box(300, 660, 450, 1000))
        pen.solid(0, _GLASS, _box(560, 620, 720, 780))
    elif kind == 4:  # a flower
        pen.solid(0, _SECOND_SHADE, _limb([(500, 500), (480, 760), (520, 1000)], [34, 34, 34]))
        petals = [_ellipse(500 + 170 * math.cos(a), 340 + 170 * math.sin(a), 115)
                  for a in (2 * math.pi * k / 6 for k in range(6))]
        pen.solid(0, _PART, *petals, shade=_PART_SHADE, depth=30)
        pen.solid(0, _LAMP, _ellipse(500, 340, 100))
    elif kind == 5:  # a ball
        pen.solid(0, _BODY, _ellipse(500, 500, 420, n=28), shade=_BODY_SHADE, depth=110)
        pen.fill(0, _WHITE, _limb([(120, 400), (500, 520), (880, 400)], [30, 130, 30]))
        pen.fill(0, _PART, _ellipse(360, 270, 80, 60))
    elif kind == 6:  # an umbrella
        pen.solid(0, _DARK, _limb([(500, 300), (500, 1000)], [36, 36], 1))
        pen.solid(0, _PART, _smooth([(60, 470), (220, 210), (500, 110), (780, 210), (940, 470),
                                     (720, 430), (500, 470),
                                     (280, 430)]), shade=_PART_SHADE, depth=60)
        pen.fill(0, _WHITE, [(500, 116), (610, 440), (500, 468), (390, 440)])
    else:  # a stone
        stone = [(500 + 430 * math.cos(a), 600 + 300 * math.sin(a) * draws.between(80, 110) / 100)
                 for a in (2 * math.pi * k / 8 for k in range(8))]
        pen.solid(0, _FAR, _rounded(stone, 120), shade=_FAR_SHADE, depth=90)
    return pen.shape()


_CLUTTER_KINDS = 8


@cache
def _clutter_shape(kind: int, variant: int) -> _Shape:
    return _clutter(kind, Draws(3, kind, variant))


# Colors and textures

_Color = tuple[int, int, int]

_PALETTE: tuple[_Color, ...] = (
    (214, 72, 62), (232, 122, 58), (240, 176, 64), (222, 206, 92), (142, 184, 76), (72, 150, 88),
    (58, 160, 150), (70, 158, 206), (66, 106, 192), (104, 84, 180), (158, 88, 178), (214, 96, 150),
    (236, 150, 160), (150, 98, 64), (196, 148, 102), (226, 200, 164), (122, 124, 132),
    (188, 190, 192),
    (236, 232, 222), (92, 70, 62), (62, 82, 96), (128, 150, 118), (176, 60, 92), (110, 190, 176),
)


def _tint(color: _Color, share: int) -> _Color:
    """The color times share percent, towards white above 100."""
    if share <= 100:
        return (color[0] * share // 100, color[1] * share // 100, color[2] * share // 100)
    more = share - 100
    r, g, b = (c + (255 - c) * more // 100 for c in color)
    return (r, g, b)


def _luma(color: _Color) -> int:
    return (3 * color[0] + 6 * color[1] + color[2]) // 10


def _paint(draws: Draws) -> _Color:
    r, g, b = _PALETTE[draws.below(len(_PALETTE))]
    jitter = draws.between(-16, 16)
    r, g, b = r + jitter + draws.between(-10, 10), g + jitter, b + jitter + draws.between(-10, 10)
    return (min(max(r, 12), 248), min(max(g, 12), 248), min(max(b, 12), 248))


def _colors(draws: Draws) -> list[_Color]:
    """One color per role."""
    body, second, part = _paint(draws), _paint(draws), _paint(draws)
    if abs(_luma(part) - _luma(body)) < 36:
        part = _tint(part, 155) if _luma(body) < 128 else _tint(part, 55)
    if abs(_luma(second) - _luma(body)) < 24:
        second = _tint(second, 145) if _luma(body) < 128 else _tint(second, 62)
    mark = _paint(draws) if draws.chance(50) else body
    glass, lamp = (164, 204, 222), (250, 222, 120)
    if draws.chance(30):
        glass, lamp = (206, 218, 206), (244, 176, 96)
    return [
        _tint(body, 26), body, _tint(body, 74), _tint(body, 128), _tint(body, 66), _tint(body, 50),
        mark, part, _tint(part, 70), second, _tint(second, 72), glass, _tint(glass, 150), lamp,
        (52, 50, 56), (246, 244, 238), (26, 24, 30),
    ]


_TILE = 640
_TEXTURES = 8
_GRAINS = 3


def _noise(key: int) -> np.ndarray:
    raw = np.random.PCG64(np.random.SeedSequence((4, key))).random_raw(_TILE * _TILE // 8)
    return raw.astype("<u8").view(np.uint8).reshape(_TILE, _TILE).astype(np.int64)


def _blurred(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Periodic box mean of (2 * rows + 1, 2 * columns + 1), stretched to 0..255; integers only."""
    for axis, radius in ((0, rows), (1, columns), (0, rows), (1, columns)):
        if radius:
            pad = [(radius + 1, radius) if k == axis else (0, 0) for k in (0, 1)]
            sums = np.pad(values, pad, mode="wrap").cumsum(axis)
            n = values.shape[axis]
            high = sums.take(range(2 * radius + 1, 2 * radius + 1 + n), axis)
            values = (high - sums.take(range(n), axis)) * 16 // (2 * radius + 1)
    values = values - values.min()
    return values * 255 // max(int(values.max()), 1)


def _triangle(values: np.ndarray, period: int) -> np.ndarray:
    """Triangle wave 0..255."""
    return abs(values % period * 2 - period) * 255 // period


@cache
def _texture(kind: int) -> np.ndarray:
    """A gray tile, uint8, at the drawing's double size."""
    y, x = np.mgrid[:_TILE, :_TILE]
    noise = _noise(kind)
    soft = _blurred(noise, 10, 10)
    if kind == 0:  # clouds
        tile = soft * 3 // 5 + _blurred(_noise(20), 3, 3) * 2 // 5
    elif kind == 1:  # weave
        tile = ((x // 5 + y // 5) % 2) * 90 + _triangle(x + y, 10) // 4 + soft // 3
    elif kind == 2:  # wavy stripes
        tile = _triangle(y + soft // 6, 22) * 3 // 5 + noise // 6 + soft // 4
    elif kind == 3:  # bricks
        row = y // 20
        joint = (y % 20 < 3) | ((x + row % 2 * 20) % 40 < 3)
        tone = 120 + (row * 37 + (x + row % 2 * 20) // 40 * 53) % 70
        tile = np.where(joint, 30, tone) + noise // 5
    elif kind == 4:  # contours, like marble
        tile = _triangle(soft * 5, 256) * 3 // 5 + soft // 3
    elif kind == 5:  # wood
        rings = _triangle(y + _blurred(_noise(21), 4, 60) // 3, 40)
        tile = _blurred(noise, 0, 40) * 3 // 5 + rings * 2 // 5
    elif kind == 6:  # pebbles
        fine = _blurred(noise, 4, 4)
        tile = np.where(fine > 140, 150 + fine // 3, 40 + fine // 2)
    else:  # leaves, mottled
        fine = _blurred(noise, 2, 5)
        tile = np.where(fine > 150, 200, np.where(fine > 110, 120, 60)) + soft // 5
    return np.clip(tile, 0, 255).astype(np.uint8)


@cache
def _grain(strength: int) -> tuple[np.ndarray, np.ndarray]:
    """What to add and what to subtract, uint8 RGB, at the image's size."""
    coarse = _blurred(_noise(30 + strength), 2, 2) - 127
    fine = np.stack([_noise(40 + 3 * strength + c) - 127 for c in range(3)], axis=-1)
    signed = coarse[..., None] * (14 + 7 * strength) // 128 + fine * (7 + 4 * strength) // 128
    return np.maximum(signed, 0).astype(np.uint8), np.maximum(-signed, 0).astype(np.uint8)


def _window(tile: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """A crop of the tile, repeated where it is too small."""
    if top + height <= _TILE and left + width <= _TILE:
        return tile[top : top + height, left : left + width]
    rows, columns = np.arange(top, top + height) % _TILE, np.arange(left, left + width) % _TILE
    return tile[rows[:, None], columns]


def _ramp(dark: _Color, light: _Color) -> np.ndarray:
    """256 colors from dark to light, as cv2.applyColorMap takes them."""
    steps = np.arange(256, dtype=np.int64)[:, None]
    low, high = np.array(dark), np.array(light)
    return (low + (high - low) * steps // 255).astype(np.uint8)[:, None]


# fmt: on
# Scenes


@dataclass(frozen=True)
class _Placed:
    """Where an object stands, in pixels of the double-size canvas."""

    class_id: int
    shape: _Shape
    length: int  # of 1000 model units
    box: tuple[int, int, int, int]
    foot: tuple[int, int]  # the middle of its lower edge


def _fill(
    canvas: np.ndarray,
    labels: np.ndarray | None,
    shape: _Shape,
    matrix: tuple[int, int, int, int, int, int],
    colors: Sequence[_Color],
    label: int,
    labelled_parts: bool,
) -> None:
    """Transforms the shape's vertices, in fixed point, and fills its pieces."""
    xx, xy, yx, yy, x0, y0 = matrix
    moved = shape.vertices @ np.array(((xx, yx), (xy, yy)))
    moved += (x0, y0)
    moved >>= 16
    points = moved.astype(np.int32)
    for start, stop, role, part in shape.pieces:
        polygon = [points[start:stop]]
        cv2.fillPoly(canvas, polygon, colors[role], cv2.LINE_8, _SHIFT)
        if labels is not None:
            number = label + part if labelled_parts else label
            cv2.fillPoly(labels, polygon, number, cv2.LINE_8, _SHIFT)


def _matrix(
    length: int,
    stretch: int,
    mirrored: bool,
    turn: int,
    model: tuple[int, int],
    pixel: tuple[int, int],
) -> tuple[int, int, int, int, int, int]:
    """Maps the model point to the double-size pixel.

    A model unit is length / 1000 pixels, `stretch` percent of it vertically; `turn` is in quarter
    degrees.
    """
    angle = math.radians(turn / 4)
    c, s = round(65536 * math.cos(angle)), round(65536 * math.sin(angle))
    unit = length << _SHIFT
    xx, xy = unit * c // 1000, -unit * s // 1000 * stretch // 100
    yx, yy = unit * s // 1000, unit * c // 1000 * stretch // 100
    if mirrored:
        xx, xy = -xx, -xy
    mx, my = model
    x0 = (pixel[0] << _SHIFT + 16) - xx * mx - xy * my
    y0 = (pixel[1] << _SHIFT + 16) - yx * mx - yy * my
    return xx, xy, yx, yy, x0, y0


def _place(
    draws: Draws, side: int, class_id: int, percent: int, others: Sequence[_Placed]
) -> _Placed:
    """Tries places and shrinks until the object covers little of the others' boxes."""
    shape = _object_shape(class_id, draws.below(_VARIANTS))
    x0, y0, x1, y1 = shape.extent
    best, least = None, 101
    for attempt in range(40):
        length = side * percent * (60 - attempt) // 6000
        width, height = (x1 - x0) * length // 1000, (y1 - y0) * length // 1000
        left = draws.between(0, max(side - width, 0))
        top = draws.between(0, max(side - height, 0))
        box = (left, top, left + width, top + height)
        covered = max(
            (_shared(box, o.box) * 100 // min(_area(box), _area(o.box)) for o in others), default=0
        )
        if covered < least:
            foot = (left + width // 2, top + height)
            best, least = _Placed(class_id, shape, length, box, foot), covered
        if least <= 10:
            break
    assert best is not None
    return best


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """The area of the intersection of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0


def _background(draws: Draws, side: int) -> np.ndarray:
    canvas = np.empty((side, side, 3), np.uint8)
    horizon = side * draws.between(30, 65) // 100 if draws.chance(55) else side
    for start, stop in ((0, horizon), (horizon, side)):
        tile = _texture(draws.below(_TEXTURES))
        free = max(_TILE - side, 1)
        crop = _window(tile, draws.below(free), draws.below(free), stop - start, side)
        color = _paint(draws)
        ramp = _ramp(_tint(color, draws.between(50, 85)), _tint(color, draws.between(108, 150)))
        if stop > start:
            canvas[start:stop] = cv2.applyColorMap(np.ascontiguousarray(crop), ramp)
    return canvas


def _contexts(
    draws: Draws, side: int, placed: Sequence[_Placed]
) -> list[tuple[int, int, tuple[int, int]]]:
    """(number, length, foot) of each context: mostly the object's own, sometimes another's."""
    contexts = []
    for item in placed:
        fate = draws.below(100)
        number = item.class_id
        if fate >= 60:  # another context of the family, or none
            family = _FAMILY_OF[item.class_id]
            others = [
                k for k, name in enumerate(_FAMILY_OF) if name == family and k != item.class_id
            ]
            number = others[draws.below(len(others))]
        if fate < 75:
            x, y = item.foot
            contexts.append((number, item.length, (x, y - item.length * 5 // 100)))
    if draws.chance(25):
        present = {item.class_id for item in placed}
        absent = [k for k in range(len(CLASS_NAMES)) if k not in present]
        foot = (draws.between(side // 8, side * 7 // 8), draws.between(side // 4, side * 15 // 16))
        contexts.append(
            (absent[draws.below(len(absent))], side * draws.between(34, 52) // 100, foot)
        )
    return sorted(contexts, key=lambda context: context[2][1])


def _halved(canvas: np.ndarray) -> np.ndarray:
    """Integer mean of 2 x 2 pixels, rounded."""
    rows = np.add(canvas[0::2], canvas[1::2], dtype=np.uint16)
    flat = rows.ravel()
    total = flat[:-3] + flat[3:]  # each pixel and its right neighbor; every other one counts
    total += 2
    total >>= 2
    means = np.empty(flat.shape, np.uint8)
    means[:-3] = total
    pixels = means.view("V3")[::2].copy()
    return pixels.view(np.uint8).reshape(rows.shape[0], -1, 3)


@lru_cache(maxsize=64)
def _class_orders(*key: int) -> tuple[tuple[int, ...], ...]:
    """Which class the first, second, ... object has in each scene of a block of scenes.

    Each class comes once per object number and block, so that the classes are balanced.
    """
    draws = Draws(5, *key)
    orders = []
    for _ in range(max(most for _, most in _COUNTS.values())):
        order = list(range(len(CLASS_NAMES)))
        for k in range(len(order) - 1, 0, -1):
            other = draws.below(k + 1)
            order[k], order[other] = order[other], order[k]
        orders.append(tuple(order))
    return tuple(orders)


def _drawn(
    index: int, split: str, seed: int, size: int, objects: str, masks: bool
) -> tuple[np.ndarray, np.ndarray | None, list[int]]:
    """The image, its label map, and the class of each object from back to front."""
    key = (seed, _SPLITS[split], int(objects == "few"))
    draws = Draws(0, *key, index)
    orders = _class_orders(*key, index // len(CLASS_NAMES))
    side = 2 * size
    canvas = _background(draws, side)
    labels = np.zeros((side, side), np.uint8) if masks else None

    fewest, most = _COUNTS[objects]
    count = draws.between(fewest, most)
    low, high = _LENGTHS[objects]
    placed: list[_Placed] = []
    for _ in range(count):
        class_id = orders[len(placed)][index % len(CLASS_NAMES)]
        if draws.chance(15) and placed:
            class_id = placed[-1].class_id
        percent = draws.between(low, high)
        if objects == "few" and count == 2:
            percent = percent * 78 // 100
        placed.append(_place(draws, side, class_id, percent, placed))
    placed.sort(key=lambda item: item.foot[1])

    for number, length, foot in _contexts(draws, side, placed):
        shape = _context_shape(number, draws.below(_VARIANTS))
        share = draws.between(86, 112)
        colors = [_tint(color, share) for color in _CONTEXT_COLORS[CONTEXT_NAMES[number]]]
        matrix = _matrix(length, 100, draws.chance(50), draws.between(-8, 8), (500, 0), foot)
        _fill(canvas, labels, shape, matrix, colors, _CONTEXT_LABEL + number, False)
    for _ in range(draws.between(1, 4)):
        shape = _clutter_shape(draws.below(_CLUTTER_KINDS), draws.below(_VARIANTS))
        pixel = (draws.between(0, side), draws.between(0, side))
        matrix = _matrix(
            side * draws.between(12, 26) // 100,
            100,
            draws.chance(50),
            draws.between(-24, 24),
            (500, 500),
            pixel,
        )
        _fill(canvas, labels, shape, matrix, _colors(draws), 0, False)
    for k, item in enumerate(placed):
        x0, _, x1, y1 = item.shape.extent
        matrix = _matrix(
            item.length,
            draws.between(94, 104),
            draws.chance(50),
            draws.between(-18, 18),
            ((x0 + x1) // 2, y1),
            item.foot,
        )
        _fill(canvas, labels, item.shape, matrix, _colors(draws), 1 + k * len(PART_NAMES), True)

    image = _halved(canvas)
    more, less = _grain(draws.below(_GRAINS))
    top, left = draws.below(max(_TILE - size, 1)), draws.below(max(_TILE - size, 1))
    image = cv2.add(image, _window(more, top, left, size, size))
    image = cv2.subtract(image, _window(less, top, left, size, size))
    return image, None if labels is None else labels[1::2, 1::2], [k.class_id for k in placed]


def _check(split: object, seed: object, size: object, objects: object) -> None:
    check_choice("split", split, _SPLITS)
    check_integer("seed", seed, 0)
    check_integer("size", size, 32)
    check_choice("objects", objects, _COUNTS)


def draw_scene(
    index: int,
    *,
    split: str = "train",
    seed: int = 0,
    size: int = 112,
    objects: str = "several",
    masks: bool = True,
) -> Scene:
    """Draws one generated scene with its ground truth.

    The bytes depend on the arguments alone, except `masks`, which only says whether to build the
    ground truth; without it `objects` and `contexts` are empty and drawing is faster.

    Args:
        index: Number of the scene within its split, from 0; there is no last one.
        split: Part of the data set; the splits share no picture.
        seed: Number of the data set, from 0.
        size: Height and width in pixels, at least 32.
        objects: ``several`` for 2 to 4 objects, ``few`` for 1 or 2 larger ones.
        masks: Whether to build the objects and contexts.

    Returns:
        The scene.

    Raises:
        TypeError: A number is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> scene = draw_scene(3)
        >>> scene.image.shape
        (112, 112, 3)
        >>> scene.class_ids == tuple(sorted({item.class_id for item in scene.objects}))
        True
    """
    check_integer("index", index, 0)
    _check(split, seed, size, objects)
    image, labels, class_ids = _drawn(int(index), split, int(seed), int(size), objects, masks)
    found, contexts = (), {}
    if labels is not None:
        found = tuple(_object(labels, k, class_id) for k, class_id in enumerate(class_ids))
        contexts = {
            name: mask
            for number, name in enumerate(CONTEXT_NAMES)
            if (mask := labels == _CONTEXT_LABEL + number).any()
        }
    present = tuple(sorted(set(class_ids)))
    return Scene(image, present, found, contexts, f"scenes-{split}-{index:06d}")


def _object(labels: np.ndarray, k: int, class_id: int) -> SceneObject:
    first = 1 + k * len(PART_NAMES)
    mask = (labels >= first) & (labels < first + len(PART_NAMES))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    names = (*SHARED_PARTS[_FAMILY_OF[class_id]], CLASS_PARTS[CLASS_NAMES[class_id]])
    parts = {name: labels == first + PART_NAMES.index(name) for name in names}
    return SceneObject(class_id, box, mask, parts)


class Scenes(Dataset):
    """The generated data set *scenes*: an indexed view of :func:`draw_scene`.

    Nothing is stored; items are drawn when asked for, in any order and in any process.

    Args:
        split: Part of the data set.
        count: Number of scenes.
        seed: Number of the data set, from 0.
        size: Height and width in pixels, at least 32.
        objects: ``several`` for 2 to 4 objects, ``few`` for 1 or 2 larger ones.
    """

    class_names: tuple[str, ...] = CLASS_NAMES
    """The class names, in the order of the target."""

    def __init__(
        self,
        split: str = "train",
        count: int = 2000,
        seed: int = 0,
        size: int = 112,
        objects: str = "several",
    ) -> None:
        _check(split, seed, size, objects)
        check_integer("count", count, 1)
        self.split, self.objects = split, objects
        self.count, self.seed, self.size = int(count), int(seed), int(size)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Scene]:
        return map(self.__getitem__, range(self.count))

    def __getitem__(self, i: int) -> Scene:
        return self._scene(i, masks=True)

    def training_item(self, i: int) -> tuple[UInt8[Tensor, "3 h w"], Float[Tensor, " k"], str]:
        """Draws one training pair, without masks.

        Args:
            i: Number of the scene.

        Returns:
            The image, 0 to 255; the target, 1 for each class present; the image id.
        """
        scene = self._scene(i, masks=False)
        target = torch.zeros(len(CLASS_NAMES))
        target[list(scene.class_ids)] = 1
        image = torch.from_numpy(np.ascontiguousarray(scene.image.transpose(2, 0, 1)))
        return image, target, scene.image_id

    def _scene(self, i: int, masks: bool) -> Scene:
        if not -self.count <= i < self.count:
            raise IndexError(
                f"expected an index in [{-self.count}, {self.count}), got {i}; "
                "make the data set larger with `count`"
            )
        return draw_scene(
            i % self.count,
            split=self.split,
            seed=self.seed,
            size=self.size,
            objects=self.objects,
            masks=masks,
        )
