"""The LayerCAM panel: the maps of every stage over one picture, fused as you drag.

The browser draws; :meth:`LayerCAMPanel.render` repeats in Python what it draws, from the same 8
bit maps, and is tested equal to it. The panel itself knows no network: :func:`explore_stages`
runs one and hands its maps over.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import torch
import traitlets
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from .. import colors
from ..cam import Scaling, fuse, normalize
from ..localize import Box, map_to_box
from ..stages import Staged, check_network
from .panel import (
    ClassId,
    Panel,
    Picture,
    Setting,
    ask,
    check_index,
    check_lengths,
    check_settings,
    check_width,
    encode_picture,
    image_name,
    palettes,
    quantize,
    require,
    source,
    wrapped,
)

if TYPE_CHECKING:
    from ..figures.sheet import Sheet

__all__ = ["LayerCAMPanel", "explore_stages"]

Class = tuple[int, str, float]
StageMaps = Mapping[str, Sequence[np.ndarray]]

LONGEST_SIDE = 448
"""Pictures are shown with at most this many pixels a side; boxes keep the picture's own pixels."""

_SCALED = ("shallow", "all", "none")
_FOUND, _TRUTH = (0, 229, 255), (255, 255, 255)


class _Shown(NamedTuple):
    # One picture as the browser shows it, and its 8 bit maps by class and method.
    pixels: UInt8[np.ndarray, "h w 3"]
    full_size: tuple[int, int]
    stacks: dict[int, dict[str, list[np.ndarray]]]


class LayerCAMPanel(Panel):
    """The maps of every stage over one picture, fused as you drag.

    Everything is drawn in the browser; the settings are traits that can be read, set and observed
    from Python.

    Args:
        images: The picture, or several: uint8, height x width x 3.
        classes: The classes to choose from, best first: ``(id, name, score)`` each; a list of
            such lists for several pictures.
        maps: For each class, its stage maps by method, shallow stage first, raw and at the
            stage's own resolution; a list of such lists for several pictures.
        stage_names: Names of the stages, shallow first.
        boxes: Ground truth boxes, ``(x0, y0, x1, y1)`` each, half-open, in pixels of the picture;
            a list of such lists for several pictures.
        names: Names of the pictures.
        network: The network's name.
        **settings: Initial values of the traits below.

    Raises:
        ValueError: Pictures, classes and maps do not fit together.
    """

    image_index = traitlets.Int(0).tag(sync=True)
    """Which picture is shown, from 0."""
    class_id = traitlets.Int().tag(sync=True)
    """The class whose maps are shown. A picture without it shows its first class."""
    method = traitlets.Unicode().tag(sync=True)
    """The method that made the maps, such as ``layercam``."""
    stages = traitlets.List(traitlets.Int()).tag(sync=True)
    """The stages that are fused, 1 = shallowest; the deepest three at first. May be empty."""
    gamma = traitlets.Float(2.0).tag(sync=True)
    """The factor inside ``tanh``, in (0, 8]."""
    scaling = traitlets.Unicode("tanh").tag(sync=True)
    """The scaling function of Eq. 3.9: ``tanh``, ``none``, ``sqrt`` or ``tan``."""
    scaled = traitlets.Unicode("shallow").tag(sync=True)
    """Which stages are scaled: ``shallow`` (all selected but the deepest), ``all``, ``none``."""
    threshold = traitlets.Float(0.15).tag(sync=True)
    """The share of the map's maximum above which a pixel belongs to the box, in [0, 1)."""
    box = traitlets.Tuple(
        *(traitlets.Int() for _ in range(4)), default_value=None, allow_none=True, read_only=True
    ).tag(sync=True)
    """The box round the largest component, half-open, in pixels of the picture, or None."""

    _esm = source("layercam")

    def __init__(
        self,
        images: UInt8[np.ndarray, "_ _ 3"] | Sequence[UInt8[np.ndarray, "_ _ 3"]],
        classes: Sequence[Class] | Sequence[Sequence[Class]],
        maps: Sequence[StageMaps] | Sequence[Sequence[StageMaps]],
        *,
        stage_names: Sequence[str] | None = None,
        boxes: Sequence[Box] | Sequence[Sequence[Box]] | None = None,
        names: str | Sequence[str] | None = None,
        network: str = "",
        **settings: Setting,
    ) -> None:
        check_settings(settings, type(self))
        if isinstance(images, np.ndarray) and images.ndim == 3:
            images, classes, maps = [images], [classes], [maps]
            boxes = None if boxes is None else [boxes]
            names = [names] if isinstance(names, str) else names
        count = len(images)
        boxes = [[] for _ in range(count)] if boxes is None else boxes
        names = [f"picture {number + 1}" for number in range(count)] if names is None else names
        check_lengths(count, classes=classes, maps=maps, boxes=boxes, names=names)
        methods, depth = _check_maps(classes, maps)
        if stage_names is None:
            stage_names = [f"stage {number + 1}" for number in range(depth)]
        if len(stage_names) != depth:
            raise ValueError(
                f"expected {depth} names in `stage_names`, one for each map of a class, "
                f"got {len(stage_names)}"
            )
        self._methods, self._depth = methods, depth
        self._network, self._truths = network, boxes
        self._pictures, records = [], []
        for image, entries, stacks, truths, name in zip(
            images, classes, maps, boxes, names, strict=True
        ):
            picture, record = _encode(image, entries, stacks, methods)
            self._pictures.append(picture)
            records.append(record | {"name": str(name), "boxes": _plain_boxes(truths)})
        settings.setdefault("method", methods[0])
        settings.setdefault("stages", list(range(max(1, depth - 2), depth + 1)))
        index = settings.get("image_index", 0)
        known = isinstance(index, int) and 0 <= index < count
        settings.setdefault("class_id", int(classes[index if known else 0][0][0]))
        data = {
            "network": network,
            "stageNames": [str(name) for name in stage_names],
            "methods": methods,
            "palettes": palettes(),
            "pictures": records,
        }
        super().__init__(_data=data, **settings)

    def fused(self) -> Float[np.ndarray, "h w"]:
        """Returns the fused map as it is shown: divided by its maximum, in [0, 1]."""
        return normalize(self._fuse()).numpy()

    def render(self) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the picture with the fused map over it, as the browser draws it."""
        pixels = self._pictures[self.image_index].pixels
        return colors.overlay(pixels, self.fused(), opacity=self.opacity, palette=self.palette)

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """Returns :meth:`render` with boxes, enlarged if small: what shows without widgets."""
        image = Image.fromarray(self.render())
        larger = max(1, 336 // max(image.size))  # small pictures would be hard to see
        image = image.resize((image.width * larger, image.height * larger))
        draw = ImageDraw.Draw(image)
        full_height, full_width = self._pictures[self.image_index].full_size
        across, down = image.width / full_width, image.height / full_height
        truths = [(box, _TRUTH) for box in self._truths[self.image_index]]
        for (x0, y0, x1, y1), color in [*truths, *([(self.box, _FOUND)] if self.box else [])]:
            corners = (x0 * across, y0 * down, x1 * across - 1, y1 * down - 1)
            draw.rectangle(corners, outline=color, width=2)
        return np.asarray(image)

    def to_figure(self, width: float = 3.5) -> "Sheet":
        """Returns what is on screen as a matplotlib figure, for a paper.

        Lines and text are lines and text in it, so save it as PDF or SVG with ``savefig``.

        Args:
            width: Width of the figure in inches.

        Example:
            ``panel.to_figure().savefig("cat.pdf")``
        """
        from ..figures.sheet import TEXT, TINY, canvas, put_image, put_outline, put_text

        check_width(width)
        full_size = self._pictures[self.image_index].full_size
        pixels = self.render()
        caption = wrapped(self._caption(), width, TEXT)
        below = 0.3 + 0.15 * (caption.count("\n") + 1)
        tall = width * pixels.shape[0] / pixels.shape[1]
        figure, axis = canvas(width, tall + below)
        put_image(axis, pixels, 0, below, width)
        place = (0, below, width, tall)
        for box in self._truths[self.image_index]:
            put_outline(axis, box, full_size, place, "white", "--")
        if self.box:
            put_outline(axis, self.box, full_size, place, "#00e5ff")
        put_text(axis, 0, below - 0.05, caption, TEXT, ha="left", va="top", parse_math=False)
        bar = axis.inset_axes((0, 0.17, width, 0.08), transform=axis.transData)
        bar.imshow(colors.palette(self.palette)[None], extent=(0, 1, 0, 1), aspect="auto")
        bar.set(yticks=[], xticks=[0, self.threshold, 1])
        bar.set_xticklabels(["0", f"threshold {self.threshold:.2f}", "1"], fontsize=TINY)
        bar.tick_params(length=2, pad=1.5)
        for label, side in zip(bar.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set_ha(side)
        return figure

    def _caption(self) -> str:
        from ..figures.examples import NAMES

        stages = ", ".join(map(str, self.stages)) or "none"
        bent = self.scaled == "all" or (self.scaled == "shallow" and len(self.stages) > 1)
        curves = {"tanh": f"tanh({self.gamma:g}x)", "sqrt": "√x", "tan": "tan x"}
        curve = f", {curves[self.scaling]}" if bent and self.scaling in curves else ""
        name = f"{NAMES.get(self.method, self.method)} of {self.class_name}"
        return f"{name}, stage{'s' * (len(self.stages) > 1)} {stages}{curve}"

    @property
    def class_name(self) -> str:
        """The name of the class that is shown."""
        entries = self._data["pictures"][self.image_index]["classes"]
        return next(entry["name"] for entry in entries if entry["id"] == self.class_id)

    def __repr__(self) -> str:
        network = f"{self._network}, " if self._network else ""
        return (
            f"LayerCAMPanel({network}{len(self._pictures)} "
            f"picture{'s' * (len(self._pictures) > 1)}, {self.class_name!r}, {self.method}, "
            f"stages {self.stages}, gamma {self.gamma:g})"
        )

    def _fuse(self) -> Float[Tensor, "h w"]:
        picture = self._pictures[self.image_index]
        size = picture.pixels.shape[:2]
        stack = picture.stacks[self.class_id][self.method]
        chosen = [torch.from_numpy(stack[stage - 1])[None].float() / 255 for stage in self.stages]
        if not chosen:
            return torch.zeros(size)
        return fuse(chosen, self.gamma, size, scaling=self.scaling, scaled=self.scaled)[0]

    @traitlets.default("box")
    def _find_box(self) -> Box | None:
        fused = self._fuse()
        box = map_to_box(fused, self.threshold)
        if box is None:
            return None
        full_height, full_width = self._pictures[self.image_index].full_size
        across, down = full_width / fused.shape[1], full_height / fused.shape[0]
        return tuple(
            int(np.floor(value * factor + 0.5))
            for value, factor in zip(box, (across, down, across, down), strict=True)
        )

    @traitlets.observe(
        "image_index", "class_id", "method", "stages", "gamma", "scaling", "scaled", "threshold"
    )
    def _follow(self, change: traitlets.Bunch) -> None:
        stacks = self._pictures[self.image_index].stacks
        if self.class_id not in stacks:
            self.class_id = next(iter(stacks))
        self.set_trait("box", self._find_box())

    @traitlets.validate("image_index")
    def _check_image_index(self, proposal: traitlets.Bunch) -> int:
        return check_index(proposal.value, len(self._pictures))

    @traitlets.validate("class_id")
    def _check_class_id(self, proposal: traitlets.Bunch) -> int:
        known = list(self._pictures[self.image_index].stacks)
        require(
            proposal.value in known,
            f"`class_id` in {known}, got {proposal.value}; "
            "explore_stages takes further classes as `class_ids`",
        )
        return proposal.value

    @traitlets.validate("stages")
    def _check_stages(self, proposal: traitlets.Bunch) -> list[int]:
        require(
            all(1 <= stage <= self._depth for stage in proposal.value),
            f"`stages` from 1 to {self._depth}, got {proposal.value}; 1 is the shallowest",
        )
        return sorted(set(proposal.value))

    @traitlets.validate("gamma")
    def _check_gamma(self, proposal: traitlets.Bunch) -> float:
        require(
            0 < proposal.value <= 8,
            f"`gamma` in (0, 8], got {proposal.value:g}; the thesis found 2 best",
        )
        return proposal.value

    @traitlets.validate("threshold")
    def _check_threshold(self, proposal: traitlets.Bunch) -> float:
        require(
            0 <= proposal.value < 1,
            f"`threshold` in [0, 1), got {proposal.value:g}; it is a share of the maximum",
        )
        return proposal.value

    @traitlets.validate("method", "scaling", "scaled")
    def _check_choice(self, proposal: traitlets.Bunch) -> str:
        name = proposal.trait.name
        choices = {
            "method": tuple(self._methods),
            "scaling": get_args(Scaling),
            "scaled": _SCALED,
        }[name]
        require(proposal.value in choices, f"`{name}` in {choices}, got {proposal.value!r}")
        return proposal.value


def explore_stages(
    net: Staged,
    images: Picture | Sequence[Picture] | Float[Tensor, "b 3 h w"],
    class_ids: ClassId | Sequence[ClassId] = None,
    *,
    methods: Sequence[str] = ("layercam", "gradcam", "gradcam_pp"),
    classes: int = 5,
    boxes: Sequence[Box] | Sequence[Sequence[Box]] | None = None,
    names: str | Sequence[str] | None = None,
    gradient_at: str = "native",
    **settings: Setting,
) -> LayerCAMPanel:
    """Opens the LayerCAM panel on what a network attends to in one or several pictures.

    Args:
        net: The network, cut into stages: from ``attnviz.load_network`` or ``attnviz.staged``.
        images: A picture (Pillow image, path, or array of height x width x 3), a list of
            pictures, or a normalized tensor ``(b, 3, h, w)``.
        class_ids: The class to show first, by number or name, or several to choose from; for a
            list of pictures, one of these for each. The best scoring one if None.
        methods: The methods to choose from, names of :data:`attnviz.cam.METHODS`.
        classes: How many of the best scoring classes to offer beside `class_ids`.
        boxes: Ground truth boxes, ``(x0, y0, x1, y1)`` each, half-open, in pixels of the
            picture; a list of such lists for a list of pictures.
        names: Names of the pictures; file names if None.
        gradient_at: See :func:`attnviz.explain.stage_maps`.
        **settings: Initial values of the panel's traits, such as ``gamma=4``.

    Returns:
        The panel.

    Example:
        ``explore_stages(net, "cat.jpg", "tabby", gamma=4).save_html("cat.html")``
    """
    from ..explain import stage_maps  # runs networks, which a panel alone does not need

    check_settings(settings, LayerCAMPanel)
    check_network(net)
    if not isinstance(images, list | tuple | Tensor):
        images = [images]
        class_ids = None if class_ids is None else [class_ids]
        boxes = None if boxes is None else [boxes]
        names = [names] if isinstance(names, str) else names
    class_ids = [None] * len(images) if class_ids is None else class_ids
    check_lengths(len(images), class_ids=class_ids)
    if names is None:
        names = [image_name(image, number) for number, image in enumerate(images, 1)]
    pictures, entries, stacks = [], [], []
    for image, asked in zip(images, class_ids, strict=True):
        tensor, pixels, _, shown = ask(net, image, asked, classes)
        chosen = [number for number, *_ in shown]
        found = stage_maps(net, tensor, [chosen], methods, gradient_at=gradient_at)
        pictures.append(pixels)
        entries.append(shown)
        stacks.append(
            [
                {
                    name: [stage[0, k].float().cpu().numpy() for stage in maps]
                    for name, maps in found.items()
                }
                for k in range(len(chosen))
            ]
        )
    return LayerCAMPanel(
        pictures,
        entries,
        stacks,
        stage_names=net.stage_names,
        boxes=boxes,
        names=names,
        network=net.name,
        **settings,
    )


# ---------------------------------------------------------------------------------------- input


def _check_maps(
    classes: Sequence[Sequence[Class]], maps: Sequence[Sequence[StageMaps]]
) -> tuple[list[str], int]:
    # All pictures and classes offer the same methods and the same number of stages.
    methods, depth = None, None
    for number, (entries, stacks) in enumerate(zip(classes, maps, strict=True)):
        if not entries or len(entries) != len(stacks):
            raise ValueError(
                f"expected one entry in `maps` for each class of picture {number}, "
                f"got {len(stacks)} for {len(entries)} classes"
            )
        for stack in stacks:
            methods = methods or list(stack)
            depth = depth or len(next(iter(stack.values()), ()))
            lengths = {name: len(stages) for name, stages in stack.items()}
            if not depth or lengths != dict.fromkeys(methods, depth):
                raise ValueError(
                    f"expected {depth} stage maps for each of {methods} in `maps`, got {lengths}"
                )
    return methods, depth


def _encode(
    image: UInt8[np.ndarray, "h w 3"],
    entries: Sequence[Class],
    stacks: Sequence[StageMaps],
    methods: Sequence[str],
) -> tuple[_Shown, dict[str, object]]:
    # What Python keeps and what is sent: the same 8 bit maps, the same decoded picture.
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8):
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"expected pictures as uint8 arrays, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"expected pictures of shape (height, width, 3), got {image.shape}")
    pixels, shown = encode_picture(Image.fromarray(image), LONGEST_SIDE)
    levels = {
        int(entry[0]): {name: [quantize(stage) for stage in stack[name]] for name in methods}
        for entry, stack in zip(entries, stacks, strict=True)
    }
    depth = len(stacks[0][methods[0]])
    sizes = [level.shape for level in levels[int(entries[0][0])][methods[0]]]
    for stack in levels.values():
        for name in methods:
            if [level.shape for level in stack[name]] != sizes:
                raise ValueError(
                    "expected the maps of a stage in one size for every class and method, "
                    f"got {[level.shape for level in stack[name]]} and {sizes}"
                )
    record = shown | {
        "fullWidth": image.shape[1],
        "fullHeight": image.shape[0],
        "classes": [
            {"id": int(number), "name": str(name), "score": float(score)}
            for number, name, score in entries
        ],
        "sizes": [list(size) for size in sizes],
        "maps": zlib.compress(_pack(list(levels.values()), methods, depth), 9),
    }
    return _Shown(pixels, image.shape[:2], levels), record


def _pack(stacks: list[dict[str, list[np.ndarray]]], methods: Sequence[str], depth: int) -> bytes:
    # By method, stage and class; each class as its difference from the one before, modulo 256,
    # since the maps of similar classes are similar: a third less to send than the plain bytes.
    return b"".join(
        np.diff(np.stack([stack[name][stage] for stack in stacks]), axis=0, prepend=np.uint8(0))
        .astype(np.uint8)
        .tobytes()
        for name in methods
        for stage in range(depth)
    )


def _plain_boxes(boxes: Sequence[Box]) -> list[list[float]]:
    plain = [[float(value) for value in box] for box in boxes]
    for box in plain:
        if len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(
                f"expected `boxes` of (x0, y0, x1, y1) with x0 < x1, y0 < y1, got {box}"
            )
    return plain
