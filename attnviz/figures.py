"""Figures for papers and chapters: results in, a matplotlib figure out.

:func:`make_figure` draws a figure of the thesis by its number, from generated scenes or given
pictures; :func:`stage_grid` and :func:`map_grid` show maps one already has. Widths are in inches;
a column of a two-column paper is 3.5, a page 7. Maps lie over the darkened picture in grey, so
bright means attention in a print without color, too.

In figures 1.2, 1.3, 3.1, 3.2 and 3.4 to 3.6 shallow stages take their gradient at the pooling
layer that follows (``gradient_at="pool_up"``), as the released code does.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import wrap

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from .cam import fuse, normalize, resize, scale
from .colors import colorize, overlay, palette
from .data.folder import LabeledImage, LabeledImages
from .data.scenes import CLASS_NAMES, Scene, Scenes
from .explain import StageMaps, excitation_backprop, stage_maps
from .images import to_pixels
from .localize import Box, box_iou, map_to_box
from .networks import load_network
from .probes import gradient_variance
from .stages import Pieces, Staged

__all__ = [
    "LABEL_SECONDS",
    "Example",
    "Sheet",
    "figure_names",
    "make_figure",
    "map_grid",
    "stage_grid",
]

COLUMN, PAGE = 3.5, 7.0
LABEL_SECONDS = {"label": 1, "box": 10, "mask": 78}
"""What a person needs for one label of each kind, as thesis section 1.1 prints it."""

_NAMES = {
    "cam": "CAM",
    "gradcam": "Grad-CAM",
    "gradcam_pp": "Grad-CAM++",
    "gradcam_pp_released": "Grad-CAM++ (released)",
    "layercam": "LayerCAM",
    "layercam_normal": "LayerCAM-normal",
    "normgrad": "NormGrad",
    "scorecam": "Score-CAM",
    "mwp": "MWP",
    "cmwp": "cMWP",
}
_TRUTH, _FOUND = "#ff4040", "#40ff60"
_TEXT, _SMALL, _TINY = 8, 7, 6
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


def stage_grid(
    picture: UInt8[np.ndarray, "h w 3"],
    maps: StageMaps,
    *,
    index: int = 0,
    fused: Sequence[int] | None = None,
    gamma: float = 2.0,
    width: float = 7.0,
    dpi: int = 130,
) -> Sheet:
    """Shows a picture with the map of every stage and their fusion, one row per method.

    Every map is drawn as it enters the fusion: divided by its maximum and, but for the deepest
    fused stage, scaled by tanh.

    Args:
        picture: The picture that was explained.
        maps: The maps, of one class per image.
        index: The image's place in the batch.
        fused: Numbers of the stages that are fused; the deepest three if None.
        gamma: The factor inside tanh; see :func:`attnviz.cam.scale`.
        width: Width of the figure in inches.
        dpi: Resolution of the figure on a screen.

    References:
        The layout of thesis figures 3.1, 3.2 and 3.5.
    """
    numbers = maps.stages
    chosen = [numbers.index(stage) for stage in (fused or numbers[-3:])]
    columns, rows = len(numbers) + 2, len(maps)
    height = width / columns * picture.shape[0] / picture.shape[1] * rows + 0.25
    figure = Sheet(figsize=(width, height), dpi=dpi, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    axes = figure.subplots(rows, columns, squeeze=False)
    titles = ["picture", *(f"stage {number}" for number in numbers)]
    titles.append("fused " + "+".join(str(numbers[position]) for position in chosen))
    for row, (method, stages) in zip(axes, maps.items(), strict=True):
        single = [stage[index].cpu() for stage in stages]
        joint = fuse([single[position] for position in chosen], gamma, picture.shape[:2])
        shown = [_large(scale(stage, "tanh", gamma).numpy(), picture) for stage in single[:-1]]
        shown += [_large(scale(single[-1], "none").numpy(), picture), joint.numpy()]
        pictures = [picture, *(overlay(picture, map) for map in shown)]
        for axis, pixels in zip(row, pictures, strict=True):
            axis.imshow(pixels, interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(_NAMES[method], fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    return figure


def _large(map: np.ndarray, picture: UInt8[np.ndarray, "h w 3"]) -> np.ndarray:
    # At the picture's size, with the stage's own grid visible: what the network really sees.
    size = (picture.shape[1], picture.shape[0])
    return np.asarray(Image.fromarray(map).resize(size, Image.Resampling.NEAREST))


def map_grid(
    picture: UInt8[np.ndarray, "h w 3"],
    maps: Mapping[str, Float[Tensor, "_ _"]],
    *,
    columns: int = 5,
    width: float = 7.0,
    dpi: int = 80,
) -> Sheet:
    """Shows a picture and any maps of it, each under its name, to compare methods or classes.

    Args:
        picture: The picture that was explained.
        maps: One map of any resolution for each title; each is divided by its own maximum.
        columns: Cells in a row, the picture's among them.
        width: Width of the figure in inches.
        dpi: Resolution of the figure on a screen.
    """
    cells = {"picture": _shown(picture)}
    cells |= {title: _laid(picture, normalize(map.cpu())) for title, map in maps.items()}
    names = list(cells)
    ratio = picture.shape[0] / picture.shape[1]
    cell = (width - 0.04) / columns
    title = 0.05 + 0.12 * max(name.count("\n") + 1 for name in names)
    height = cell * ratio + title
    rows = -(-len(names) // columns)
    figure, axis = _canvas(width, rows * height + 0.02, dpi)
    for position, name in enumerate(names):
        x = 0.04 + position % columns * cell
        y = (rows - 1 - position // columns) * height + 0.02
        _image(axis, cells[name], x, y, cell - 0.04)
        _text(axis, x + cell / 2 - 0.02, y + height - title + 0.01, name, _TEXT, va="bottom")
    return figure


# ------------------------------------------------------------------- figures by their number


@dataclass(frozen=True, eq=False)
class Example:
    """A picture to draw, with what is known of it."""

    picture: UInt8[np.ndarray, "h w 3"]
    """The picture."""
    class_id: int | None = None
    """The network's number of the class to explain; None for the highest score."""
    boxes: tuple[Box, ...] = ()
    """True boxes of that class, ``(x0, y0, x1, y1)`` in pixels, half-open."""
    mask: Bool[np.ndarray, "h w"] | None = None
    """The true pixels of that class."""
    scene: Scene | None = None
    """The generated scene with all its truth, if it is one."""
    name: str = "picture"
    """Where it comes from."""


@dataclass(frozen=True)
class _Kind:
    title: str
    draw: Callable[[Staged, list[Example], int], Sheet]
    network: str = "scenes_fc"
    wanted: tuple[str, ...] = ("horse",)  # classes of the generated scenes
    several: int = 0  # how many further scenes with several objects


def figure_names() -> list[tuple[str, str]]:
    """The number and the title of every figure that :func:`make_figure` draws, in order."""
    return [(number, kind.title) for number, kind in _FIGURES.items()]


def make_figure(
    number: str,
    *,
    network: str | Staged | None = None,
    pictures: LabeledImages | Iterable[object] | None = None,
    seed: int = 0,
) -> Sheet:
    """Draws a figure of the thesis.

    Args:
        number: The figure's number, such as ``"3.1"``; see :func:`figure_names`.
        network: A network or its name; a bundled one if None.
        pictures: Pictures to draw, of which the first ones are taken, as many as the figure has
            room for: :class:`Example` objects, a :class:`~attnviz.data.folder.LabeledImages` or
            what :func:`attnviz.images.to_pixels` reads. A labeled picture is explained for its
            class where the network knows the name, others for the highest score. None takes
            generated scenes: the first of the validation split that show one object of a class
            named beforehand, whatever their maps look like.
        seed: Number of the generated data set, and of random choices.

    Returns:
        The figure, ready for ``savefig``.

    Raises:
        ValueError: There is no such figure, or what is given can't be shown in it.
    """
    if number not in _FIGURES:
        known = ", ".join(_FIGURES)
        raise ValueError(f"expected a figure in {{{known}}}, got {number!r}")
    kind = _FIGURES[number]
    net = load_network(network or kind.network) if not isinstance(network, Staged) else network
    if pictures is None:
        examples = _generated(net, kind, seed)
    else:
        examples = _given(net, pictures, len(kind.wanted) + kind.several)
    figure = kind.draw(net, examples, seed)
    weights = {key: net.provenance[key] for key in ("weights", "sha256") if key in net.provenance}
    weights = ", ".join(f"{key} {value}" for key, value in weights.items())
    names = ", ".join(each.name for each in examples)
    figure.facts = f"figure {number}; network {net.name}, {weights}; {names}; seed {seed}"
    return figure


def _generated(net: Staged, kind: _Kind, seed: int) -> list[Example]:
    if tuple(net.class_names or ()) != CLASS_NAMES:
        raise ValueError(
            f"expected `pictures` for {net.name}, got none; only scenes_fc and scenes_conv know "
            "the classes of the generated scenes"
        )
    scenes = Scenes("val", count=10_000, seed=seed, objects="few")
    found = [
        next(s for s in scenes if [o.class_id for o in s.objects] == [CLASS_NAMES.index(name)])
        for name in kind.wanted
    ]
    crowded = Scenes("val", count=1000, seed=seed, objects="several")
    found += islice((s for s in crowded if len(s.objects) == len(s.class_ids) == 3), kind.several)
    return [_of_scene(scene, seed) for scene in found]


def _of_scene(scene: Scene, seed: int) -> Example:
    first = scene.objects[0].class_id
    same = [each for each in scene.objects if each.class_id == first]
    mask = np.any([each.mask for each in same], axis=0)
    name = f"generated {scene.image_id} of seed {seed}"
    return Example(scene.image, first, tuple(each.box for each in same), mask, scene, name)


def _given(net: Staged, pictures: LabeledImages | Iterable[object], most: int) -> list[Example]:
    class_names = pictures.class_names if isinstance(pictures, LabeledImages) else ()
    found = []
    for item in islice(iter(pictures), most):
        if isinstance(item, Example):
            found.append(item)
        elif isinstance(item, LabeledImage):
            boxes = tuple(tuple(round(side) for side in box) for box in item.boxes)
            class_id = _known_class(net, item.class_id, class_names)
            found.append(Example(to_pixels(item.read()), class_id, boxes, name=item.image_id))
        else:
            name = Path(item).name if isinstance(item, str | Path) else "picture"
            found.append(Example(to_pixels(item), name=name))
    if not found:
        raise ValueError("expected at least one picture, got none")
    return found


def _known_class(net: Staged, class_id: int | None, class_names: Sequence[str]) -> int | None:
    # Folders number their classes by themselves: only the name says which of the network's it is.
    if class_id is None or class_id >= len(class_names) or not net.class_names:
        return None
    try:
        return net.class_id(class_names[class_id].split(",")[0])
    except ValueError:
        return None


# --------------------------------------------------------------------------- maps and pixels


def _maps(
    net: Staged,
    example: Example,
    methods: Sequence[str] = ("layercam",),
    stages: Sequence[int] | None = None,
) -> StageMaps:
    images = net.preprocess(example.picture)
    return stage_maps(net, images, example.class_id, methods, stages=stages, gradient_at="pool_up")


def _shown(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    # The picture at the size at which it is drawn: sharp, and not larger than print needs.
    height, width = picture.shape[:2]
    factor = max(1, -(-_SIDE // max(height, width)))
    factor = min(factor, 2 * _SIDE / max(height, width))
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _grey(picture: UInt8[np.ndarray, "h w 3"], share: float) -> UInt8[np.ndarray, "h w 3"]:
    grey = np.asarray(Image.fromarray(picture).convert("L"), dtype=float) * share
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def _laid(picture: UInt8[np.ndarray, "h w 3"], map: Tensor, smooth: bool = False) -> np.ndarray:
    # A map in [0, 1] over the darkened picture, with the stage's own grid unless `smooth`.
    large = _shown(picture)
    values = resize(map, large.shape[:2]).numpy() if smooth else _large(map.numpy(), large)
    return overlay(_grey(large, 0.5), values, opacity=0.95)


def _phased(maps: StageMaps, method: str, net: Staged) -> list[Tensor]:
    # Each stage as it enters the fusion: all but the deepest scaled by tanh.
    deepest = len(net.stage_names)
    return [
        scale(stage[0].cpu(), "none" if number == deepest else "tanh")
        for number, stage in zip(maps.stages, maps[method], strict=True)
    ]


def _class_name(net: Staged, class_id: int) -> str:
    # In lines of at most 14 letters, two at best.
    name = net.class_names[class_id].split(",")[0] if net.class_names else f"class {class_id}"
    return "\n".join(wrap(name, 14, max_lines=2, placeholder=" ..."))


def _need_stages(net: Staged, number: str, least: int) -> int:
    count = len(net.stage_names)
    if count < least:
        raise ValueError(
            f"expected a network of at least {least} stages for figure {number}, got {net.name} "
            f"with {count}"
        )
    return count


# ------------------------------------------------------------------------------- the canvas


def _canvas(width: float, height: float, dpi: int = 130) -> tuple[Sheet, Axes]:
    # One axis over the whole figure whose unit is the inch, for pictures, boxes and arrows.
    figure = Sheet(figsize=(width, height), dpi=dpi)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def _image(axis: Axes, pixels: np.ndarray, x: float, y: float, width: float) -> float:
    """Draws pixels with their lower left corner at (x, y); returns the height."""
    height = width * pixels.shape[0] / pixels.shape[1]
    limits = axis.get_xlim(), axis.get_ylim()
    extent = (x, x + width, y, y + height)
    axis.imshow(pixels, extent=extent, interpolation="none", aspect="auto")
    axis.set(xlim=limits[0], ylim=limits[1])
    return height


def _text(axis: Axes, x: float, y: float, text: str, size: float = _SMALL, **options: object):  # noqa: ANN202
    options = {"ha": "center", "va": "center", "linespacing": 1.15} | options
    return axis.text(x, y, text, fontsize=size, **options)


def _box(axis: Axes, x: float, y: float, width: float, height: float, text: str = "") -> None:
    patch = Rectangle((x, y), width, height, facecolor="#eeeeee", edgecolor="black", lw=0.7)
    axis.add_patch(patch)
    if text:
        _text(axis, x + width / 2, y + height / 2, text)


def _arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-"
) -> None:
    axis.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=7, lw=0.9, linestyle=style,
            color="black", shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def _network(
    axis: Axes, net: Staged, x: float, middle: float, width: float, tall: float
) -> list[float]:
    """Draws the stages as bars that get lower; returns the middle of each."""
    count = len(net.stage_names)
    step = width / count
    centers = []
    for number in range(count):
        height = tall * (1 - 0.62 * number / max(count - 1, 1))
        left = x + number * step
        _box(axis, left, middle - height / 2, step * 0.72, height)
        centers.append(left + step * 0.36)
        if number < count - 1:
            gap = step * 0.28
            axis.plot([left + step - gap, left + step], [middle, middle], color="black", lw=0.7)
    return centers


def _outline(
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


def _grid(
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
    figure, axis = _canvas(width, top + sum(slots) + (gap + below) * len(rows))
    bottom, places = axis.get_ylim()[1] - top, []
    for position, title in enumerate(titles):
        x = left + position * (cell + gap) + cell / 2
        _text(axis, x, bottom + 0.06, title, _TEXT, va="baseline")
    for row, label, height, slot in zip(rows, labels, heights, slots, strict=True):
        bottom -= slot
        middle = bottom + slot / 2
        _text(axis, left / 2 - 0.01, middle, label, _TEXT, rotation=90)
        line = [
            (left + k * (cell + gap), middle - height / 2, cell, height) for k in range(len(row))
        ]
        for pixels, (x, y, size, _) in zip(row, line, strict=True):
            _image(axis, _fit(pixels, height / cell), x, y, size)
        places.append(line)
        bottom -= gap + below
    return figure, axis, places


def _fit(pixels: np.ndarray, ratio: float) -> np.ndarray:
    # The pixels, squeezed if they have not the ratio of height to width of their row.
    height = round(pixels.shape[1] * ratio)
    if abs(height - pixels.shape[0]) <= 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((pixels.shape[1], height)))


# ------------------------------------------------------------------------------- chapter 1


def _label_costs(net: Staged, examples: list[Example], seed: int) -> Sheet:
    if any(each.scene is None for each in examples):
        raise ValueError(
            "expected generated scenes for figure 1.1, got pictures without the masks of their "
            "objects; leave `pictures` out"
        )
    rows = []
    for each in examples:
        picture = _shown(each.picture)
        masks = [item.mask for item in each.scene.objects]
        rows.append([picture, picture, _painted(picture, masks)])
    titles = [f"{what}, {LABEL_SECONDS[key]} s" for key, what in
              (("label", "class label"), ("box", "box"), ("mask", "pixel mask"))]  # fmt: skip
    figure, axis, places = _grid(rows, titles, [""] * len(rows), COLUMN, below=0.17)
    for each, line in zip(examples, places, strict=True):
        classes, objects = each.scene.class_ids, each.scene.objects
        x, y, width, height = line[0]
        names = "\n".join(_class_name(net, class_id) for class_id in classes)
        frame = {"facecolor": "white", "edgecolor": "black", "lw": 0.6, "pad": 1.5}
        top = y + height - 0.06
        _text(axis, x + 0.06, top, names, _TINY, ha="left", va="top", bbox=frame)
        for item in objects:
            _outline(axis, item.box, each.picture.shape[:2], line[1], _TRUTH)
        counts = {"label": len(classes), "box": len(objects), "mask": len(objects)}
        for (key, count), (x, y, width, _) in zip(counts.items(), line, strict=True):
            total = f"{count} × {LABEL_SECONDS[key]} s = {count * LABEL_SECONDS[key]} s"
            _text(axis, x + width / 2, y - 0.085, total)
    return figure


def _painted(picture: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    # Objects in shades from light to dark with a white rim, over the faded picture.
    size = (picture.shape[1], picture.shape[0])
    painted = _grey(picture, 0.45).astype(float)
    levels = np.linspace(235, 120, len(masks)).astype(int)
    for mask, level in zip(masks, levels, strict=True):
        large = np.asarray(Image.fromarray(mask).resize(size))
        painted[large] = 0.25 * painted[large] + 0.75 * palette("inferno")[level]
        painted[_rim(large)] = 255
    return painted.astype(np.uint8)


def _rim(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    # The outermost two pixels of a region.
    inner = np.pad(mask, 2)
    kept = [inner[2 + y : inner.shape[0] - 2 + y, 2 + x : inner.shape[1] - 2 + x]
            for y in (-2, 0, 2) for x in (-2, 0, 2)]  # fmt: skip
    return mask & ~np.all(kept, axis=0)


def _concept(net: Staged, examples: list[Example], seed: int) -> Sheet:
    example = examples[0]
    maps = _maps(net, example, ("gradcam",), [len(net.stage_names)])
    class_id = int(maps.class_ids[0])
    raw = fuse([maps["gradcam"][0][0]], size=example.picture.shape[:2], scaled="none")
    picture, laid = _shown(example.picture), _laid(example.picture, raw, smooth=True)
    ratio = picture.shape[0] / picture.shape[1]
    side = min(1.1, 1.1 / ratio)
    tall = side * ratio
    figure, axis = _canvas(COLUMN, 2 * tall + 0.44)
    top, low = tall + 0.42, 0.02
    middle = top + tall / 2
    _image(axis, picture, 0.02, top, side)
    _text(axis, 0.02 + side / 2, top - 0.09, "picture")
    start = side + 0.27
    last = _network(axis, net, start, middle, 1.15, tall)[-1]
    _text(axis, start + 0.4, top - 0.09, "network")
    _arrow(axis, (side + 0.05, middle), (start - 0.03, middle))
    _arrow(axis, (last + 0.09, middle), (last + 0.3, middle))
    name = _class_name(net, class_id)
    _text(axis, last + 0.33, middle, f"predicts\n“{name}”", ha="left")
    x = min(last - side / 2, COLUMN - side - 0.02)
    _image(axis, laid, x, low, side)
    box = map_to_box(raw, 0.5)
    if box is not None:
        _outline(axis, box, example.picture.shape[:2], (x, low, side, tall), _TRUTH)
    _arrow(axis, (last, middle - 0.21 * tall), (last, low + tall + 0.03))
    _text(axis, last + 0.06, top - 0.09, "activation,\ngradient", ha="left")
    _text(axis, x - 0.1, low + tall * 0.62, f"attention map\nof “{name}”", _TEXT, ha="right")
    _text(axis, x - 0.1, low + tall * 0.27, "box: values above\nhalf the maximum", ha="right")
    return figure


def _rough(net: Staged, examples: list[Example], seed: int) -> Sheet:
    if any(each.mask is None for each in examples):
        raise ValueError(
            "expected pictures with a mask of the object for figure 1.3, got one without; give "
            "Example(picture, mask=...) or leave `pictures` out"
        )
    deepest = len(net.stage_names)
    rows, names, shares = [], [], []
    for each in examples:
        maps = _maps(net, each, ("gradcam",), [deepest])
        map = normalize(maps["gradcam"][0][0])
        region = resize(map, each.picture.shape[:2]).numpy() > 0.5
        shares.append(_shares(region, each.mask))
        picture = _shown(each.picture)
        regions = [_filled(picture, region, each.mask), _filled(picture, each.mask, each.mask)]
        rows.append([picture, _laid(each.picture, map), *regions])
        names.append(_class_name(net, int(maps.class_ids[0])))
    titles = ["picture", f"stage {deepest} map", "above half", "object"]
    figure, axis, places = _grid(rows, titles, names, COLUMN, below=0.17)
    for line, (found, inside) in zip(places, shares, strict=True):
        text = f"{found:.0%} of the object found, {inside:.0%} of the region on it"
        _text(axis, line[0][0], line[0][1] - 0.085, text, ha="left")
    return figure


def _shares(region: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """The share of the mask that lies in the region, and of the region in the mask."""
    both = (region & mask).sum()
    return both / max(mask.sum(), 1), both / max(region.sum(), 1)


def _filled(picture: np.ndarray, region: np.ndarray, mask: np.ndarray) -> np.ndarray:
    # A region in white over the dark picture, the true object's rim in red.
    size = (picture.shape[1], picture.shape[0])
    inside, truth = (np.asarray(Image.fromarray(m).resize(size)) for m in (region, mask))
    painted = _grey(picture, 0.4)
    painted[inside] = 255 - _grey(picture, 0.25)[inside]
    painted[_rim(truth)] = np.array(to_rgb("#ff3030")) * 255
    return painted


# ------------------------------------------------------------------------------- chapter 2


def _cam_pipeline(net: Staged, examples: list[Example], seed: int) -> Sheet:
    example = examples[0]
    images = net.preprocess(example.picture)
    pieces = net.differentiable(images, [len(net.stage_names)])
    activation = pieces.activations[0].detach()
    class_id, weights = _linear_weights(net, pieces, example.class_id)
    contributions = weights * activation[0].sum((1, 2)) / activation[0, 0].numel()
    order = contributions.argsort(descending=True).tolist()
    channels = [*order[:2], order[-1]]  # what speaks most for the class, and most against it
    map = normalize(torch.einsum("c,chw->hw", weights, activation[0]))
    tiles = [_tile(normalize(activation[0, k]), 168) for k in channels]
    name, picture = _class_name(net, class_id).replace("\n", " "), _shown(example.picture)
    ratio = picture.shape[0] / picture.shape[1]
    side = min(0.85, 0.85 / ratio)
    tall = side * ratio
    figure, axis = _canvas(PAGE, 2 * tall + 0.8)
    top, low = tall + 0.74, 0.26
    middle, across = top + tall / 2, low + tall / 2
    _image(axis, picture, 0.02, top, side)
    _text(axis, 0.02 + side / 2, top - 0.1, "picture")
    _arrow(axis, (side + 0.06, middle), (1.12, middle))
    last = _network(axis, net, 1.15, middle, 1.05, tall)[-1]
    _text(axis, 1.6, top - 0.1, "convolutions")
    _arrow(axis, (last + 0.1, middle), (2.44, middle))
    for position, tile in enumerate(reversed(tiles)):  # a pile, the strongest in front
        shift = 0.1 * (1 - position)
        _image(axis, tile, 2.62 + shift, middle - 0.35 * tall + 0.8 * shift, 0.7 * side)
    _text(axis, 2.9, top - 0.1, f"{len(weights)} feature maps $A^k$")
    boxes = ((3.72, 0.78, "average\nover places"), (4.86, 0.78, "linear layer\n$w_k$"))
    starts = (3.4, 4.52, 5.66)
    for (x, width, text), start in zip(boxes, starts, strict=False):
        _arrow(axis, (start, middle), (x - 0.03, middle))
        _box(axis, x, middle - 0.2, width, 0.4, text)
    _arrow(axis, (5.66, middle), (5.92, middle))
    score = float(pieces.output[0, class_id].detach())
    _text(axis, 5.96, middle, f"score of\n“{name}”\n{score:.1f}", ha="left")
    x = 0.02
    for position, (k, tile) in enumerate(zip(channels, tiles, strict=True)):
        weight = float(weights[k])
        sign = "−" if weight < 0 else "+" if position else ""
        before = "+ ...  " if position == 2 else ""
        x += 0.27 if before else 0
        _text(axis, x + 0.56, across, f"{before}{sign} {abs(weight):.2f} ×", _TEXT, ha="right")
        _image(axis, tile, x + 0.6, low, side)
        _text(axis, x + 0.6 + side / 2, low - 0.12, f"$A^{{{k}}}$", _TEXT)
        x += side + 0.64
    _text(axis, x + 0.06, across, "=", _TEXT)
    x = PAGE - 2 * side - 0.42
    _image(axis, _tile(map, 168), x, low, side)
    _text(axis, x + side / 2, low - 0.14, r"map $M=\sum_k w_k A^k$", _SMALL)
    _arrow(axis, (x + side + 0.04, across), (x + side + 0.31, across))
    x += side + 0.34
    _image(axis, _laid(example.picture, map, smooth=True), x, low, side)
    _text(axis, x + side / 2, low - 0.12, "enlarged")
    rail = low + tall + 0.14  # the weights come down to the sum below
    corner = [(5.25, middle - 0.2), (5.25, rail), (0.42, rail)]
    axis.plot(*zip(*corner, strict=True), color="black", lw=0.9, linestyle="--")
    _arrow(axis, (0.42, rail), (0.42, across + 0.1))
    _text(axis, 5.31, rail + 0.1, "the same weights", ha="left")
    return figure


def _linear_weights(net: Staged, pieces: Pieces, class_id: int | None) -> tuple[int, Tensor]:
    # The weights behind the global average: the gradient, summed over places that are all equal.
    chosen = int(pieces.output[0].argmax()) if class_id is None else class_id
    gradient = torch.autograd.grad(pieces.output[0, chosen], pieces.activations[0])[0][0]
    weights = gradient.sum((1, 2))
    if not torch.allclose(gradient * gradient[0].numel(), weights[:, None, None], atol=1e-5):
        raise ValueError(
            f"expected a network that ends in a global average and one linear layer for figure "
            f"2.1, got {net.name}; scenes_conv and resnet50 do"
        )
    return chosen, weights


def _families(net: Staged, examples: list[Example], seed: int) -> Sheet:
    example, size = examples[0], examples[0].picture.shape[:2]
    images, stages = net.preprocess(example.picture), [2, len(net.stage_names)]
    deep = stage_maps(net, images, example.class_id, ("gradcam",), stages=stages)
    class_id = int(deep.class_ids[0])
    relevance = excitation_backprop(net, images, class_id, stages=stages)["cmwp"][0][0]
    drop = _occlusion_drop(net, images, class_id)
    maps = (relevance, deep["gradcam"][1][0], drop)
    picture = _shown(example.picture)
    ratio = picture.shape[0] / picture.shape[1]
    side = min(0.95, 0.95 / ratio)
    tall, small = side * ratio, 0.5 * side
    figure, axis = _canvas(PAGE, 0.85 * tall + max(tall, 0.95) + 0.6)
    for column, (family, map) in enumerate(zip(_FAMILIES, maps, strict=True)):
        left, top = 0.05 + column * 2.34, axis.get_ylim()[1] - 0.12
        _text(axis, left + 1.1, top, f"({'abc'[column]}) {family.title}", _TEXT)
        middle = top - 0.14 - 0.375 * tall
        hidden = [_hidden(picture, place) for place in ((0.1, 0.1), (0.5, 0.2), (0.3, 0.55))]
        pile = hidden if column == 2 else [picture]
        for number, each in enumerate(pile):
            shift = 0.07 * (number - (len(pile) - 1) / 2)
            _image(axis, each, left + 0.05 + shift, middle - small * ratio / 2 - shift, small)
        start = left + 0.05 + small
        _arrow(axis, (start + 0.13, middle), (start + 0.3, middle))
        centers = _network(axis, net, start + 0.33, middle, 0.72, 0.75 * tall)
        end = start + 1.0
        _arrow(axis, (end, middle), (end + 0.2, middle))
        _text(axis, end + 0.23, middle, "score", ha="left")
        low = 0.04 + (max(tall, 0.95) - tall) / 2
        large = normalize(resize(map, size) if column == 2 else map)
        _image(axis, _laid(example.picture, large, smooth=column > 0), left, low, side)
        target = (left + side / 2, low + tall + 0.03)
        below = middle - 0.47 * tall
        if column == 0:
            points = [(end + 0.38, middle - 0.09), (end + 0.38, below), (target[0], below)]
        elif column == 1:
            points = [
                (centers[-1], middle - 0.16 * tall),
                (centers[-1], below),
                (target[0], below),
            ]
            axis.plot([end + 0.38, end + 0.38, centers[-1]], [middle - 0.09, below, below],
                      color="black", lw=0.9, linestyle="--")  # fmt: skip
        else:
            points = [(end + 0.38, middle - 0.09), (end + 0.38, below), (target[0], below)]
        axis.plot(*zip(*points, strict=True), color="black", lw=0.9, linestyle=family.line)
        _arrow(axis, points[-1], target)
        text = f"{family.way}\n\n{family.members}"
        _text(axis, left + side + 0.08, low + tall / 2 - 0.02, text, _SMALL, ha="left")
    return figure


@dataclass(frozen=True)
class _Family:
    title: str
    way: str
    members: str
    line: str


_FAMILIES = (
    _Family(
        "backpropagation", "relevance or gradient\npassed down to\nthe pixels",
        "gradient, guided\nbackpropagation,\nMWP, cMWP (shown)", "--",
    ),
    _Family(
        "class activation maps", "feature maps, weighed\nand summed",
        "CAM, Grad-CAM\n(shown), Grad-CAM++,\nLayerCAM, NormGrad,\nScore-CAM", "-",
    ),
    _Family(
        "perturbation", "places hidden, the loss\nof score drawn there",
        "occlusion (shown),\nlearned masks", "-",
    ),
)  # fmt: skip


def _occlusion_drop(net: Staged, images: Tensor, class_id: int, places: int = 14) -> Tensor:
    # How much of the score is lost where a grey square, a fifth of the side, covers the image.
    height, width = images.shape[-2:]
    covered = images.repeat(places * places, 1, 1, 1)
    for number in range(places * places):
        row, column = divmod(number, places)
        y, x = round((row + 0.5) * height / places), round((column + 0.5) * width / places)
        rows = slice(max(0, y - height // 10), y + height // 10)
        covered[number, :, rows, max(0, x - width // 10) : x + width // 10] = 0
    scores = torch.cat([net(part)[:, class_id] for part in covered.split(49)])
    return (net(images)[0, class_id] - scores).relu().reshape(places, places)


def _hidden(picture: UInt8[np.ndarray, "h w 3"], place: tuple[float, float]) -> np.ndarray:
    covered, (height, width) = picture.copy(), picture.shape[:2]
    y, x = round(place[0] * height), round(place[1] * width)
    covered[y : y + height // 3, x : x + width // 3] = 128
    return covered


# ------------------------------------------------------------------------------- chapter 3


def _compared(
    net: Staged, examples: list[Example], methods: Sequence[str], stages: Sequence[int]
) -> Sheet:
    # A row for each method below each other; the picture and a color bar in the first column.
    rows, labels = [], []
    for each in examples:
        maps, picture = _maps(net, each, methods, stages), _shown(each.picture)
        for method in methods:
            shown = [_laid(each.picture, map) for map in _phased(maps, method, net)]
            first = picture if method == methods[0] else np.full_like(picture, 255)
            rows.append([first, *shown])
            labels.append(_class_name(net, int(maps.class_ids[0])))
    titles = ["picture", *(f"stage {stage}" for stage in stages)]
    figure, axis, places = _grid(
        rows, titles, [_NAMES[m] for m in methods] * len(examples), COLUMN
    )
    for line, name in list(zip(places, labels, strict=True))[1 :: len(methods)]:
        x, y, width, height = line[0]
        middle = y + height / 2
        _text(axis, x + width / 2, middle + 0.22, f"class\n“{name}”")
        _color_bar(axis, x + 0.1 * width, middle - 0.18, 0.8 * width)
    return figure


def _color_bar(axis: Axes, x: float, y: float, width: float) -> None:
    _image(axis, np.repeat(palette("inferno")[None], 26, axis=0), x, y, width)
    axis.add_patch(Rectangle((x, y), width, width * 26 / 256, fill=False, lw=0.5))
    _text(axis, x, y - 0.08, "0", _TINY)
    _text(axis, x + width, y - 0.08, "max", _TINY, ha="right")
    _text(axis, x + width / 2, y + width * 26 / 256 + 0.07, "attention", _TINY)


def _two_methods(net: Staged, examples: list[Example], seed: int) -> Sheet:
    count = _need_stages(net, "3.1", 3)
    return _compared(net, examples, ("gradcam", "layercam"), (count - 2, count))


def _shallow(net: Staged, examples: list[Example], seed: int) -> Sheet:
    count = _need_stages(net, "3.2", 4)
    return _compared(net, examples, ("gradcam", "gradcam_pp"), tuple(range(count - 3, count)))


def _variance(net: Staged, examples: list[Example], seed: int) -> Sheet:
    tables = [
        gradient_variance(net, net.preprocess(each.picture), each.class_id) for each in examples
    ]
    keys = ["method", "stage", "channel"]
    table = pd.concat(tables).groupby(keys)[["variance", "relative"]].mean()
    count = len(net.stage_names)
    blocks, channels = _channel_blocks(net, examples[0], seed)
    picture = _shown(examples[0].picture)
    ratio = picture.shape[0] / picture.shape[1]
    cell = min((PAGE - 0.3) / (count + 1) - 0.08, 1.05 / ratio)
    height = 2.4 + cell * ratio
    figure = Sheet(figsize=(PAGE, height), dpi=130)
    for column, (method, what) in enumerate(
        (m, w) for m in ("gradcam", "gradcam_pp") for w in ("variance", "relative")
    ):
        axis = figure.add_axes((0.065 + column * 0.243, 1 - 1.53 / height, 0.185, 1.24 / height))
        for stage in range(1, count + 1):
            _curve(axis, table.loc[method, stage][what].dropna().to_numpy(), stage, count)
        if what == "variance":
            axis.set_yscale("log")
            title = f"({'ab'[column // 2]}) {_NAMES[method]}"
            axis.set_title(title, fontsize=_TEXT, pad=4, x=1.16)
        else:
            axis.set_ylim(0, 1.04)
        axis.set_ylabel("variance" if what == "variance" else "variance / mean square",
                        fontsize=_SMALL, labelpad=1)  # fmt: skip
        axis.set_xlabel("feature maps, sorted (%)", fontsize=_SMALL, labelpad=1)
        axis.tick_params(labelsize=_TINY, length=2, pad=1.5)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=count, fontsize=_SMALL, frameon=False, loc="upper center",
        bbox_to_anchor=(0.5, 1 - 1.81 / height), handlelength=3.2,
    )  # fmt: skip
    _channel_row(figure, picture, cell, blocks, channels)
    return figure


def _curve(axis: Axes, values: np.ndarray, stage: int, count: int) -> None:
    shares = (np.arange(len(values)) + 0.5) / max(len(values), 1) * 100
    color = palette("inferno")[round((stage - 1) / max(count - 1, 1) * 190)] / 255
    axis.plot(
        shares, np.sort(values)[::-1], color=color, lw=1.1, label=f"stage {stage}",
        linestyle=("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[(stage - 1) % 5],
        marker="osD^v"[(stage - 1) % 5], markersize=2.6, markevery=0.25,
    )  # fmt: skip


def _channel_blocks(
    net: Staged, example: Example, seed: int
) -> tuple[list[np.ndarray], list[list[int]]]:
    # Four channels of each stage, chosen at random among those that vary, as 2 x 2 pictures.
    with torch.no_grad():
        activations, _ = net.activations(net.preprocess(example.picture))
    generator = np.random.default_rng(seed)
    blocks, numbers = [], []
    for activation in activations:
        varied = (activation[0].amax((1, 2)) > activation[0].amin((1, 2))).nonzero()[:, 0].tolist()
        chosen = sorted(generator.choice(varied, min(4, len(varied)), replace=False).tolist())
        tiles = [
            np.pad(
                _tile(normalize(activation[0, k])), ((3, 3), (3, 3), (0, 0)), constant_values=255
            )
            for k in chosen
        ]
        tiles += [np.full_like(tiles[0], 255)] * (4 - len(tiles))
        blocks.append(np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])]))
        numbers.append(chosen)
    return blocks, numbers


def _tile(map: Tensor, side: int = 112) -> np.ndarray:
    height, width = map.shape
    size = (side, round(side * height / width))
    return colorize(
        np.asarray(Image.fromarray(map.numpy()).resize(size, Image.Resampling.NEAREST))
    )


def _channel_row(
    figure: Sheet,
    picture: np.ndarray,
    cell: float,
    blocks: list[np.ndarray],
    channels: list[list[int]],
) -> None:
    tall = 0.36 + cell * picture.shape[0] / picture.shape[1]
    axis = figure.add_axes((0, 0, 1, tall / figure.get_figheight()), label="channels")
    axis.set(xlim=(0, PAGE), ylim=(0, tall))
    axis.axis("off")
    start = (PAGE - (cell + 0.08) * (len(blocks) + 1)) / 2 + 0.08
    _text(axis, start - 0.11, tall / 2 - 0.01, "(c) feature maps", _TEXT, rotation=90)
    height = _image(axis, picture, start, 0.17, cell)
    _text(axis, start + cell / 2, 0.17 + height + 0.09, "picture", _SMALL)
    for position, (block, numbers) in enumerate(zip(blocks, channels, strict=True), start=1):
        x = start + position * (cell + 0.08)
        height = _image(axis, block, x, 0.17, cell)
        _text(axis, x + cell / 2, 0.17 + height + 0.09, f"stage {position}", _SMALL)
        _text(axis, x + cell / 2, 0.08, "no. " + ", ".join(map(str, numbers)), _TINY)


def _pipeline(net: Staged, examples: list[Example], seed: int) -> Sheet:
    count = _need_stages(net, "3.4", 3)
    example = examples[0]
    maps = _maps(net, example)
    raw = [stage[0] for stage in maps["layercam"]]
    fused = fuse(raw[-3:], size=example.picture.shape[:2])
    picture = _shown(example.picture)
    ratio = picture.shape[0] / picture.shape[1]
    wide = 0.86 / max(ratio, 0.9)
    tall = wide * ratio
    figure, axis = _canvas(PAGE, 2 * tall + 0.66)
    top, low = tall + 0.64, 0.22
    middle, left, gap = top + tall / 2, wide + 0.3, 0.05
    cell = min(wide, (PAGE - left - 2 * wide - 0.62) / count - gap)
    bar = cell * 0.64
    _image(axis, picture, 0.02, top, wide)
    _text(axis, 0.02 + wide / 2, top - 0.09, "picture")
    _text(axis, left - 0.08, low + cell * ratio / 2, "LayerCAM", _TEXT, ha="right")
    end = wide + 0.05
    for number, map in enumerate(_phased(maps, "layercam", net)):
        x, height = left + number * (cell + gap), tall * (1 - 0.5 * number / (count - 1))
        center = x + cell / 2
        _arrow(axis, (end, middle), (center - bar / 2, middle))
        end = center + bar / 2
        _box(axis, center - bar / 2, middle - height / 2, bar, height, f"stage {number + 1}")
        drawn = _image(axis, _laid(example.picture, map), x, low, cell)
        _arrow(axis, (center, middle - height / 2), (center, low + drawn + 0.03))
        _text(axis, center, low - 0.1, f"$M^{{({number + 1})}}$", _TEXT)
        if number >= count - 3:
            axis.add_patch(Rectangle((x, low), cell, drawn, fill=False, lw=1.8, color="black"))
    right = left + count * (cell + gap) - gap
    name = _class_name(net, int(maps.class_ids[0]))
    _arrow(axis, (end, middle), (right + 0.12, middle))
    _text(axis, right + 0.15, middle, f"score $y$ of “{name}”", _TEXT, ha="left")
    formulas = (
        r"$g^k = \partial y\,/\,\partial A^k$",
        r"$M = \mathrm{ReLU}\,(\sum_k \mathrm{ReLU}(g^k)\,A^k)$",
    )
    for line, formula in enumerate(formulas, start=1):
        _text(axis, right + 0.15, middle - 0.24 * line, formula, _TEXT, ha="left")
    x, pixels = right + 0.3, _laid(example.picture, fused.clamp(0, 1), smooth=True)
    _arrow(axis, (right + 0.04, low + drawn / 2), (x - 0.03, low + drawn / 2))
    _image(axis, pixels, x, low, wide)
    _text(axis, x + wide / 2, low - 0.1, f"fused, stages {count - 2} to {count}", _SMALL)
    _arrow(axis, (x + wide + 0.03, low + drawn / 2), (x + wide + 0.26, low + drawn / 2))
    x += wide + 0.29
    _image(axis, picture, x, low, wide)
    box = map_to_box(fused, 0.4)
    if box is not None:
        place = (x, low, wide, tall)
        _outline(axis, box, example.picture.shape[:2], place, _FOUND, (0, (3, 1.5)))
    _text(axis, x + wide / 2, low - 0.1, "box, above 40 %", _SMALL)
    return figure


def _stages(net: Staged, examples: list[Example], seed: int) -> Sheet:
    count = _need_stages(net, "3.5", 3)
    rows, names = [], []
    for each in examples:
        maps = _maps(net, each)
        fused = fuse([stage[0] for stage in maps["layercam"][-3:]], size=each.picture.shape[:2])
        shown = [_laid(each.picture, map) for map in _phased(maps, "layercam", net)]
        rows.append([_shown(each.picture), *shown, _laid(each.picture, fused, smooth=True)])
        names.append(_class_name(net, int(maps.class_ids[0])))
    titles = ["picture", *(f"stage {number}" for number in range(1, count + 1))]
    titles.append("fused " + "+".join(map(str, range(count - 2, count + 1))))
    return _grid(rows, titles, names, PAGE)[0]


def _boxes(net: Staged, examples: list[Example], seed: int, threshold: float = 0.15) -> Sheet:
    _need_stages(net, "3.6", 3)
    if not all(each.boxes for each in examples):
        raise ValueError(
            "expected pictures with true boxes for figure 3.6, got one without; give a folder "
            "with a list of boxes, or leave `pictures` out"
        )
    methods = ("gradcam", "gradcam_pp", "layercam")
    rows, found, names = [], [], []
    for each in examples:
        maps, size = _maps(net, each, methods), each.picture.shape[:2]
        deep = [fuse([maps[m][-1][0]], size=size, scaled="none") for m in methods[:2]]
        fused = fuse([stage[0] for stage in maps["layercam"][-3:]], size=size)
        rows.append([_shown(each.picture)])
        rows[-1] += [_laid(each.picture, map.clamp(0, 1), smooth=True) for map in (*deep, fused)]
        found.append([map_to_box(map, threshold) for map in (*deep, fused)])
        names.append(_class_name(net, int(maps.class_ids[0])))
    titles = ["picture", *(_NAMES[method] for method in methods)]
    figure, axis, places = _grid(rows, titles, names, COLUMN, below=0.15)
    for each, line, boxes in zip(examples, places, found, strict=True):
        for place in line:
            for box in each.boxes:
                _outline(axis, box, each.picture.shape[:2], place, _TRUTH)
        for (x, y, width, height), box in zip(line[1:], boxes, strict=True):
            iou = max(box_iou(box, truth) for truth in each.boxes) if box else 0.0
            if box is not None:
                place = (x, y, width, height)
                _outline(axis, box, each.picture.shape[:2], place, _FOUND, (0, (3, 1.5)))
            _text(axis, x + width / 2, y - 0.075, f"IoU {iou:.2f}")
    return figure


_FIGURES = {
    "1.1": _Kind("Label types and what they cost", _label_costs, several=1),
    "1.2": _Kind("What an attention map is", _concept, "scenes_conv", ("deer",)),
    "1.3": _Kind(
        "A deep map is rough and incomplete", _rough, "scenes_conv",
        ("deer", "fire engine", "steamer"),
    ),
    "2.1": _Kind("How CAM weighs feature maps", _cam_pipeline, "scenes_conv", ("deer",)),
    "2.2": _Kind("Three families of explainers", _families, "scenes_conv", ("deer",)),
    "3.1": _Kind("Grad-CAM and LayerCAM, a shallow and the deepest stage", _two_methods),
    "3.2": _Kind(
        "Grad-CAM and Grad-CAM++ in shallow stages", _shallow, wanted=("horse", "fire engine")
    ),
    "3.3": _Kind(
        "How much the gradient varies within a feature map", _variance,
        wanted=("horse", "deer", "fire engine", "steamer"),
    ),
    "3.4": _Kind("LayerCAM: maps of all stages, fused", _pipeline),
    "3.5": _Kind(
        "LayerCAM, stage by stage, and fused", _stages,
        wanted=("horse", "fire engine", "steamer", "deer"),
    ),
    "3.6": _Kind(
        "Boxes of three methods against the truth", _boxes, "scenes_conv",
        ("horse", "taxi", "trawler", "crane ship"),
    ),
}  # fmt: skip
