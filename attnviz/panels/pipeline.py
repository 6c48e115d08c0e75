"""The label panel: from class maps to pseudo labels, step by step, with the thresholds as sliders.

The browser makes the labels and draws them; :meth:`LabelPanel.labels` and
:meth:`LabelPanel.render` make the same from the same 8 bit maps in Python, by
:mod:`attnviz.labels`, and are tested equal. The panel knows no network: maps, saliency and a
network's masks are handed to :func:`explore_labels`.
"""

import zlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from os import PathLike
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import traitlets
from jaxtyping import Float, Int, Num, Shaped, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from .. import colors
from ..data.masks import IGNORE
from ..images import to_pixels
from ..labels import (
    STRENGTHS,
    Oversegmentation,
    background,
    saliency_labels,
    superpixel_labels,
    superpixel_mean,
    superpixels,
)
from .panel import (
    Line,
    Panel,
    borders,
    check_map,
    check_settings,
    check_width,
    encode_picture,
    palettes,
    put_lines,
    quantize,
    require,
    source,
    wrapped,
)

if TYPE_CHECKING:
    from ..figures.sheet import Sheet

__all__ = ["LabelPanel", "explore_labels"]

Method = Literal["rules", "superpixels"]
Cue = Literal["saliency", "affinity", "constant"]
Array = Shaped[np.ndarray, "..."] | Shaped[Tensor, "..."]
Picture = Image.Image | np.ndarray | str | PathLike[str]
Setting = bool | int | float | str

LONGEST_SIDE = 512
"""Pictures are shown with at most this many pixels a side; PASCAL VOC's keep their own."""

_USED = {
    "saliency": ("floor", "salient", "strong"), "affinity": ("power",), "constant": ("constant",),
}  # fmt: skip

TONES = (
    (255, 140, 40), (60, 180, 255), (70, 215, 140), (240, 120, 200), (250, 220, 60),
    (150, 130, 255), (235, 70, 70), (120, 220, 225),
)  # fmt: skip
"""The colors of the classes, in their order; they repeat."""


class LabelPanel(Panel):
    """From class maps to pseudo labels: each step beside the other, redrawn as you drag.

    Everything is made in the browser; the settings are traits that can be read, set and observed
    from Python. :func:`explore_labels` opens one. Masks and labels have 0 for background,
    1 + the class number, and 255 for pixels that do not count.

    Args:
        image: The picture, uint8, height x width x 3.
        maps: The map of each class by its number, at any resolution, in any unit.
        class_names: Name of each class; numbers beyond are called ``class 7``.
        saliency: How much each pixel belongs to an object, in [0, 1], at any resolution.
        predictions: Masks of a network by name, such as with and without CRF.
        truth: The true mask.
        network: What made the maps.
        **settings: Initial values of the traits below.

    Raises:
        ValueError: Arrays do not fit together.
    """

    method = traitlets.Unicode("rules").tag(sync=True)
    """What makes the labels: the ``rules`` of the thesis' chapter 4 for each pixel, or the vote
    of ``superpixels`` (Eq. 3.11)."""
    cue = traitlets.Unicode().tag(sync=True)
    """How the rules know background: by ``saliency``, or from the maps by ``affinity`` (one minus
    their maximum, to a power) or as a ``constant``."""
    floor = traitlets.Float(0.3).tag(sync=True)
    """Values below count nothing, in [0, 1]; by saliency only."""
    conflict = traitlets.Float(0.9).tag(sync=True)
    """A pixel that two exceed is left out, in [0, 1]."""
    salient = traitlets.Float(32 / 255).tag(sync=True)
    """Background that is this salient is left out, in [0, 1]; by saliency only."""
    strong = traitlets.Float(0.8).tag(sync=True)
    """Background where a map exceeds this is left out, in [0, 1]; by saliency only."""
    least = traitlets.Float(0.01).tag(sync=True)
    """A picture with a smaller share of objects is left out as a whole, in [0, 1]."""
    power = traitlets.Float(float(STRENGTHS["affinity"])).tag(sync=True)
    """The power of the ``affinity`` cue, in [1, 32]."""
    constant = traitlets.Float(float(STRENGTHS["constant"])).tag(sync=True)
    """The value of the ``constant`` cue, in [0, 1]."""
    regions = traitlets.Unicode("slic").tag(sync=True)
    """What cuts the picture into superpixels: ``slic`` or ``felzenszwalb``."""
    background = traitlets.Float(0.3).tag(sync=True)
    """Superpixels where no mean reaches it are background, in [0, 1]."""
    averaged = traitlets.Bool(False).tag(sync=True)
    """Whether the rules see the maps' means over the superpixels, which moves their borders to
    those of the picture."""
    class_id = traitlets.Int().tag(sync=True)
    """The class whose map is shown."""
    prediction = traitlets.Unicode().tag(sync=True)
    """The name of the network's mask that is shown; empty without any."""
    outlined = traitlets.Bool(True).tag(sync=True)
    """Whether the outline of the true objects is drawn."""

    _esm = source("pipeline")

    def __init__(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        maps: Mapping[int, Num[np.ndarray, "_ _"]],
        class_names: Sequence[str],
        *,
        saliency: Num[np.ndarray, "_ _"] | None = None,
        predictions: Mapping[str, Num[np.ndarray, "h w"]] | None = None,
        truth: Num[np.ndarray, "h w"] | None = None,
        network: str = "",
        **settings: Setting,
    ) -> None:
        check_settings(settings, type(self))
        _check(image, maps, class_names)
        shown, record = encode_picture(Image.fromarray(image), LONGEST_SIDE)
        size = shown.shape[:2]
        reduced = image if image.shape == shown.shape else shown
        self._pixels, self._network = shown, network
        self._levels = {int(number): _levels(map, size) for number, map in maps.items()}
        self._maps = {k: _stretch(levels, size) for k, levels in self._levels.items()}
        self._saliency = None if saliency is None else _saliency(saliency, size)
        self._regions = {name: superpixels(reduced, name) for name in get_args(Oversegmentation)}
        full = image.shape[:2]
        self._predictions = {
            str(name): _mask(mask, "predictions", full, size)
            for name, mask in (predictions or {}).items()
        }
        self._truth = None if truth is None else _mask(truth, "truth", full, size)
        self._names = {
            number: str(class_names[number]) if number < len(class_names) else f"class {number}"
            for number in dict.fromkeys([*self._levels, *self._masks])
        }
        settings.setdefault("cue", "affinity" if saliency is None else "saliency")
        settings.setdefault("class_id", next(iter(self._levels)))
        settings.setdefault("prediction", next(iter(self._predictions), ""))
        data = record | {
            "network": network,
            "classes": [{"id": number, "name": name} for number, name in self._names.items()],
            "grids": [list(levels.shape) for levels in self._levels.values()],
            "salient": saliency is not None,
            "regions": list(self._regions),
            "predictions": list(self._predictions),
            "truth": truth is not None,
            "tones": [list(tone) for tone in self._tones.values()],
            "palettes": palettes(),
            "planes": self._pack(),
        }
        super().__init__(_data=data, **settings)

    def labels(self) -> UInt8[np.ndarray, "h w"]:
        """Returns the pseudo labels that are shown: 0, 1 + the class number, or 255."""
        if self.method == "superpixels":
            found = superpixel_labels(self._stack, self._regions[self.regions], self.background)
        else:
            by_saliency = self.cue == "saliency"
            found = saliency_labels(
                self._steps,
                self._cue_of_saliency if by_saliency else None,
                floor=self.floor,
                conflict=self.conflict,
                salient=self.salient,
                strong=self.strong,
                least=self.least,
                rule="affinity" if by_saliency else self.cue,
                strength=self.power if self.cue == "affinity" else self.constant,
            )
        table = np.full(256, IGNORE, np.uint8)
        table[: len(self._levels) + 1] = [0, *(1 + number for number in self._levels)]
        return table[found]

    def evidence(self) -> Float[np.ndarray, "h w"]:
        """Returns the map that is shown, in [0, 1]: of superpixels, or as the rules see it."""
        map = self._steps[list(self._levels).index(self.class_id)].numpy()
        return map if self.method == "superpixels" else _spread(map)

    def cue_map(self) -> Float[np.ndarray, "h w"]:
        """Returns how much each pixel is background, in [0, 1], before any threshold."""
        if self.method == "superpixels":
            return np.full(self._pixels.shape[:2], self.background)
        if self.cue == "saliency":
            return 1 - self._cue_of_saliency.numpy()
        spread = torch.from_numpy(np.stack([_spread(map) for map in self._steps.numpy()]))
        strength = self.power if self.cue == "affinity" else self.constant
        return background(spread, self.cue, strength).numpy()

    def render(self) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
        """Returns the steps as the browser draws them, without outlines."""

        def lay(map: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
            return colors.overlay(self._pixels, map, opacity=self.opacity, palette=self.palette)

        voted = self.method == "superpixels"
        steps = {
            "picture": self._pixels,
            "maps": lay(self.evidence()),
            "background": self._net() if voted else lay(self.cue_map()),
            "labels": self._paint(self.labels()),
        }
        if self.prediction:
            steps["network"] = self._paint(self._predictions[self.prediction])
        return steps

    def scores(self) -> dict[str, dict[str, float]]:
        """Returns the intersection over union with the true mask, by class, of this one picture.

        Of the ``labels`` and, where there is one, of the ``network``'s mask; ``mean`` is over the
        classes that occur in either. Pixels that the truth or the labels leave out do not count.
        Empty without a true mask. A data set's mIoU is another number, not the pictures' mean.
        """
        if self._truth is None:
            return {}
        found = {"labels": self.labels()}
        if self.prediction:
            found["network"] = self._predictions[self.prediction]
        names = {0: "background"} | {1 + k: name for k, name in self._names.items()}
        scores = {}
        for what, labels in found.items():
            counted = (labels != IGNORE) & (self._truth != IGNORE)
            values = {}
            for label, name in names.items():
                ours, true = labels[counted] == label, self._truth[counted] == label
                union = (ours | true).sum()
                values[name] = float((ours & true).sum() / union) if union else np.nan
            known = [value for value in values.values() if not np.isnan(value)]
            scores[what] = values | {"mean": float(np.mean(known)) if known else np.nan}
        return scores

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the steps side by side: what shows where no widget can be drawn."""
        steps = self.render()
        titles = self._titles()
        height, width = self._pixels.shape[:2]
        factor = 240 / max(height, width)
        cell = (max(round(width * factor), 1), max(round(height * factor), 1))
        step = max(cell[0], 150) + 8
        sheet = Image.new("RGB", (len(steps) * step - 8, cell[1] + 22), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        for number, (name, pixels) in enumerate(steps.items()):
            shown = Image.fromarray(pixels).resize(cell, Image.Resampling.LANCZOS)
            pen = ImageDraw.Draw(shown)
            for line in self._outline:
                pen.line([round(value * factor) for value in line], fill="white", width=1)
            draw.text((number * step, 2), titles[name], fill=(30, 32, 36), font=font)
            sheet.paste(shown, (number * step, 22))
        return np.asarray(sheet)

    def to_figure(self, width: float = 7.0) -> "Sheet":
        """Returns what is on screen as a matplotlib figure, for a paper: steps, colors, settings.

        Lines and text are lines and text in it, so save it as PDF or SVG with ``savefig``.

        Args:
            width: Width of the figure in inches.
        """
        from matplotlib.patches import Rectangle

        from ..figures.sheet import SMALL, TINY, canvas, put_image, put_text

        check_width(width)
        steps, titles, outline = self.render(), self._titles(), self._outline
        gap, line = 0.08, 0.13
        cell = (width - gap * (len(steps) - 1)) / len(steps)
        size = self._pixels.shape[:2]
        tall = cell * size[0] / size[1]
        columns = max(int(width / 1.2), 1)  # of the names below
        above = [wrapped(titles[name], cell, SMALL) for name in steps]
        names = {
            number: wrapped(self._names[number], width / columns - 0.25, SMALL)
            for number in self._tones
        }
        caption = wrapped(self._caption(), width, TINY)
        rows = [list(names)[k : k + columns] for k in range(0, len(names), columns)]
        lines = [max(names[number].count("\n") + 1 for number in row) for row in rows]
        below = 0.14 + line * (caption.count("\n") + 1 + sum(lines))
        top = 0.08 + line * max(text.count("\n") + 1 for text in above)
        figure, axis = canvas(width, below + tall + top)
        look = {"ha": "left", "va": "top", "parse_math": False}
        for number, (text, pixels) in enumerate(zip(above, steps.values(), strict=True)):
            x = number * (cell + gap)
            put_image(axis, pixels, x, below, cell)
            put_lines(axis, outline, size, (x, below, cell, tall), "white")
            put_text(axis, x, below + tall + 0.04, text, SMALL, **look | {"va": "baseline"})
        y = below - 0.06
        for row, count in zip(rows, lines, strict=True):
            for place, number in enumerate(row):
                x, tone = place * width / columns, np.array(self._tones[number]) / 255
                axis.add_patch(Rectangle((x, y - 0.1), 0.1, 0.1, facecolor=tone))
                put_text(
                    axis, x + 0.15, y, names[number], SMALL, **look | {"va": "center_baseline"}
                )
            y -= line * count
        put_text(axis, 0, y - 0.04, caption, TINY, **look)
        return figure

    def _caption(self) -> str:
        # What made the labels: the thresholds in use, as the browser writes them too.
        if self.method == "superpixels":
            how, used = f"Vote of {self.regions} superpixels", ["background"]
        else:
            how = f"Rules, background by {self.cue}"
            how += f", maps averaged over {self.regions} superpixels" if self.averaged else ""
            used = ["conflict", "least", *_USED[self.cue]]
        return f"{how}: {', '.join(f'{name} {round(getattr(self, name), 3):g}' for name in used)}"

    def __repr__(self) -> str:
        network = f"{self._network}, " if self._network else ""
        names = ", ".join(self._names[number] for number in self._levels)
        how = self.regions if self.method == "superpixels" else self.cue
        return f"LabelPanel({network}{names}; {self.method}, {how})"

    # ------------------------------------------------------------------------------- the steps

    @property
    def _stack(self) -> Float[Tensor, "k h w"]:
        return torch.from_numpy(np.stack([*self._maps.values()]) / 255)

    @property
    def _steps(self) -> Float[Tensor, "k h w"]:
        if self.method == "superpixels" or self.averaged:
            return superpixel_mean(self._stack, self._regions[self.regions])
        return self._stack

    @property
    def _cue_of_saliency(self) -> Float[Tensor, "h w"]:
        return torch.from_numpy(self._saliency / 255)

    @property
    def _outline(self) -> list[Line]:
        # Of the true objects, where it is drawn.
        return borders(self._truth) if self.outlined and self._truth is not None else []

    @property
    def _masks(self) -> list[int]:
        # The classes of the masks, beside those that have a map.
        masks = [*self._predictions.values()]
        masks += [] if self._truth is None else [self._truth]
        values = np.unique(np.concatenate([mask.ravel() for mask in masks] or [[]]))
        return [int(value) - 1 for value in values if value not in (0, IGNORE)]

    @property
    def _tones(self) -> dict[int, tuple[int, int, int]]:
        return {number: TONES[k % len(TONES)] for k, number in enumerate(self._names)}

    def _titles(self) -> dict[str, str]:
        counted = self._regions[self.regions].max() + 1
        scores = {
            name: f", mIoU {100 * each['mean']:.0f} %" for name, each in self.scores().items()
        }
        cue = f"{counted} superpixels" if self.method == "superpixels" else f"by {self.cue}"
        return {
            "picture": "Picture",
            "maps": f"Map: {self._names[self.class_id]}",
            "background": cue if self.method == "superpixels" else f"Background {cue}",
            "labels": f"Labels{scores.get('labels', '')}",
            "network": f"{self.prediction}{scores.get('network', '')}",
        }

    def _net(self) -> UInt8[np.ndarray, "h w 3"]:
        # The picture with the borders of its superpixels.
        shown = self._pixels.copy()
        regions = self._regions[self.regions]
        edge = np.zeros(regions.shape, bool)
        edge[1:] |= regions[1:] != regions[:-1]
        edge[:, 1:] |= regions[:, 1:] != regions[:, :-1]
        shown[edge] = _mix(shown[edge], np.array(_BORDER), 160)
        return shown

    def _paint(self, labels: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
        weight = int(np.floor(self.opacity * 256 + 0.5))
        table = np.zeros((256, 3), np.int64)
        for number, tone in self._tones.items():
            table[1 + number] = tone
        y, x = np.indices(labels.shape)
        width = max(2, labels.shape[1] // 56)
        stripes = ((x + y) // width % 2 == 0)[..., None]
        left_out = np.where(stripes, _mix(self._pixels, np.array(_LEFT_OUT), weight), self._pixels)
        painted = _mix(self._pixels, table[labels], weight)
        dimmed = _mix(self._pixels, np.zeros(3, int), weight >> 1)
        objects = (labels > 0) & (labels != IGNORE)
        shown = np.where(objects[..., None], painted, dimmed)
        return np.where((labels == IGNORE)[..., None], left_out, shown).astype(np.uint8)

    def _pack(self) -> bytes:
        # Maps at their own size, the rest at the picture's. A row is sent as its difference from
        # the one above, modulo 256, since neighbors are similar.
        planes = [*self._levels.values()]
        planes += [] if self._saliency is None else [self._saliency]
        for regions in self._regions.values():
            planes += [(regions >> 8).astype(np.uint8), (regions & 255).astype(np.uint8)]
        planes += self._predictions.values()
        planes += [] if self._truth is None else [self._truth]
        rows = (np.diff(plane, axis=0, prepend=np.uint8(0)).tobytes() for plane in planes)
        return zlib.compress(b"".join(rows), 9)

    # -------------------------------------------------------------------------------- settings

    @traitlets.validate(
        "floor", "conflict", "salient", "strong", "least", "constant", "background"
    )
    def _check_share(self, proposal: traitlets.Bunch) -> float:
        require(
            0 <= proposal.value <= 1,
            f"`{proposal.trait.name}` in [0, 1], got {proposal.value:g}",
        )
        return proposal.value

    @traitlets.validate("power")
    def _check_power(self, proposal: traitlets.Bunch) -> float:
        require(1 <= proposal.value <= 32, f"`power` in [1, 32], got {proposal.value:g}")
        return proposal.value

    @traitlets.validate("method", "cue", "regions", "prediction", "class_id")
    def _check_choice(self, proposal: traitlets.Bunch) -> str | int:
        name = proposal.trait.name
        cues = get_args(Cue)[self._saliency is None :]
        choices = {
            "method": get_args(Method),
            "cue": cues,
            "regions": get_args(Oversegmentation),
            "prediction": tuple(self._predictions) or ("",),
            "class_id": tuple(self._levels),
        }[name]
        why = "; the panel was opened without saliency" if proposal.value == "saliency" else ""
        require(proposal.value in choices, f"`{name}` in {choices}, got {proposal.value!r}{why}")
        return proposal.value


def explore_labels(
    image: Picture,
    maps: Mapping[int, Array] | Array,
    class_names: Sequence[str],
    *,
    saliency: Array | None = None,
    predictions: Mapping[str, Array] | Array | None = None,
    truth: Array | None = None,
    network: str = "",
    **settings: Setting,
) -> LabelPanel:
    """Opens the panel on how class maps become pseudo labels, with every threshold as a slider.

    It shows the picture, a class's map, what speaks for background, the labels and a network's
    mask beside each other. Labels are made again in the browser while a slider moves, and scored
    against the true mask if there is one.

    Args:
        image: The picture: Pillow image, path, or array of height x width x 3.
        maps: The map of each class of the picture by its number, or all of them as one array
            ``(k, h, w)`` for the classes from 0; at any resolution, in any unit.
        class_names: The names of the classes, by number.
        saliency: How much each pixel belongs to an object, in [0, 1], such as
            :func:`attnviz.labels.detect_saliency`; without it background is known from the maps.
        predictions: A network's mask of the picture's size, or several by name, such as with and
            without CRF: 0 background, 1 + the class number, 255 left out.
        truth: The true mask.
        network: What made the maps, to show.
        **settings: Initial values of the panel's traits, such as ``floor=0.2``.

    Returns:
        The panel.

    Raises:
        ValueError: Arrays do not fit together.

    Example:
        ``explore_labels("dog.jpg", {11: map}, CLASS_NAMES, saliency=detect_saliency(image))``
    """
    check_settings(settings, LabelPanel)
    if not isinstance(maps, Mapping):
        maps = _array(maps)
        if maps.ndim != 3:
            raise ValueError(f"expected `maps` of shape (k, h, w), got {maps.shape}")
        maps = dict(enumerate(maps))
    if predictions is not None and not isinstance(predictions, Mapping):
        predictions = {"network": predictions}
    return LabelPanel(
        to_pixels(image),
        {number: _array(map) for number, map in maps.items()},
        class_names,
        saliency=None if saliency is None else _array(saliency),
        predictions={name: _array(mask) for name, mask in (predictions or {}).items()},
        truth=None if truth is None else _array(truth),
        network=network,
        **settings,
    )


# ---------------------------------------------------------------------------------------- input


def _array(values: Array) -> Shaped[np.ndarray, "..."]:
    values = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    if values.dtype.kind not in "buif":
        raise TypeError(f"expected maps and masks of real numbers, got {values.dtype}")
    return values


def _check(
    image: UInt8[np.ndarray, "h w 3"],
    maps: Mapping[int, Num[np.ndarray, "_ _"]],
    class_names: Sequence[str],
) -> None:
    if not maps:
        raise ValueError("expected at least one class in `maps`, got none")
    if class_names is None or len(class_names) == 0:
        raise ValueError("expected a name for each class in `class_names`, got none")
    last = min(len(class_names), IGNORE - 1) - 1
    for number in maps:
        if not (isinstance(number, Integral) and 0 <= number <= last):
            raise ValueError(
                f"expected classes of `maps` as whole numbers from 0 to {last}, each with a name "
                f"in `class_names`, got {number!r}"
            )


def _levels(map: Num[np.ndarray, "_ _"], size: tuple[int, int]) -> UInt8[np.ndarray, "_ _"]:
    # A map in 256 levels; one larger than the picture is shown is reduced to that first.
    map = check_map(map)
    if map.shape[0] > size[0] or map.shape[1] > size[1]:
        map = _resized(map, size)
    return quantize(map)


def _saliency(values: Num[np.ndarray, "_ _"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    if values.dtype == np.uint8:
        values = values / 255
    low, high = (values.min(), values.max()) if values.size else (np.nan, np.nan)
    if values.ndim != 2 or not (low >= 0 and high <= 1):
        raise ValueError(
            f"expected `saliency` of shape (h, w) in [0, 1], got {values.shape} from "
            f"{low:g} to {high:g}"
        )
    resized = values if values.shape == size else _resized(values, size)
    return np.floor(np.clip(resized, 0, 1) * 255 + 0.5).astype(np.uint8)


def _resized(values: Num[np.ndarray, "_ _"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    tensor = torch.from_numpy(np.array(values, np.float64))[None, None]
    return interpolate(tensor, size, mode="bilinear", antialias=True)[0, 0].numpy()


def _mask(
    mask: Num[np.ndarray, "_ _"], kind: str, full: tuple[int, int], size: tuple[int, int]
) -> UInt8[np.ndarray, "h w"]:
    if mask.shape != full:
        raise ValueError(
            f"expected a mask of {full[0]} x {full[1]} in `{kind}`, the picture's size, got "
            f"{' x '.join(map(str, mask.shape))}; do the two belong together?"
        )
    if mask.min() < 0 or mask.max() > IGNORE or (mask != np.floor(mask)).any():
        raise ValueError(
            f"expected labels from 0 to 255 in `{kind}`, got {mask.min():g} to {mask.max():g}"
        )
    image = Image.fromarray(mask.astype(np.uint8))
    return np.array(image.resize(size[::-1], Image.Resampling.NEAREST))


# -------------------------------------------------------------------- what the browser does too

_BORDER, _LEFT_OUT = (255, 255, 255), (255, 255, 255)


def _stretch(levels: UInt8[np.ndarray, "_ _"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """Resizes a map to the picture; 255 is then its largest value."""
    upper, lower, down = _places(levels.shape[0], size[0])
    left, right, across = _places(levels.shape[1], size[1])
    values = levels.astype(np.float64)
    lines = values[upper] + down[:, None] * (values[lower] - values[upper])
    values = lines[:, left] + across * (lines[:, right] - lines[:, left])
    peak = values.max()
    return np.floor(values * (255 / peak if peak > 0 else 0) + 0.5).astype(np.uint8)


def _places(
    count: int, wanted: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    # Where the pixels of a resized row lie in the old row; pixel centers aligned.
    place = np.maximum((np.arange(wanted) + 0.5) * count / wanted - 0.5, 0)
    low = np.minimum(np.floor(place).astype(int), count - 1)
    return low, np.minimum(low + 1, count - 1), (place - low).astype(np.float32).astype(float)


def _spread(map: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Stretches a map to [0, 1], as the rules do; a flat one is zero."""
    low, high = map.min(), map.max()
    return (map - low) / (high - low if high > low else 1)


def _mix(
    pixels: UInt8[np.ndarray, "*n 3"], color: Int[np.ndarray, "..."], weight: int
) -> Int[np.ndarray, "*n 3"]:
    # Whole numbers, so that the browser gets the same: `weight` of 256 is the color alone.
    return ((256 - weight) * pixels.astype(np.int64) + weight * color + 128) >> 8
