"""The player: how attention grows during a training, epoch by epoch, with the recall beside it.

The browser draws and plays; :meth:`EvolutionPlayer.render` and :meth:`EvolutionPlayer.curve`
repeat in Python what it draws, from the same 8 bit maps, and are tested equal to it. A training
that still runs is followed by a thread that looks into the folder of the run.
"""

import math
import threading
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
import traitlets
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from .. import colors
from ..cam import resize
from ..evolution import Evolution, load_evolution, request_stop
from .panel import (
    Line,
    Panel,
    Setting,
    borders,
    check_index,
    check_settings,
    check_width,
    encode_picture,
    palettes,
    put_lines,
    require,
    source,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..figures.sheet import Sheet

__all__ = ["EvolutionPlayer", "explore_accumulation"]

Highlight = Literal["epoch", "first", "none"]
Curve = Literal["picture", "training"]
Run = str | PathLike[str]

LONGEST_SIDE = 336
"""Pictures are shown with at most this many pixels a side: several stand side by side."""

SPEEDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Epochs per second to choose from."""

_TONES = ("#b35900", "#0b63b0", "#00754f", "#a03a7e", "#6a5acd", "#5f6670")  # on white
_NEW, _NEW_SHARE, _TRUTH = (0, 229, 255), 0.6, (255, 255, 255)


class _Training(Protocol):
    # A thread or a process: is_alive() of threading and multiprocessing.
    def is_alive(self) -> bool: ...


class _Process(Protocol):
    # subprocess.Popen
    def poll(self) -> int | None: ...


class _Series(NamedTuple):
    # One column: the maps of an epoch, or the accumulated ones, of one run.
    name: str
    note: str
    run: int
    kind: Literal["maps", "accumulated"]


class _Class(NamedTuple):
    # A watched class of a picture; its place in the recording of each run.
    class_id: int
    name: str
    places: tuple[int, ...]
    mask: UInt8[np.ndarray, "h w"] | None


class _Shown(NamedTuple):
    name: str
    pixels: UInt8[np.ndarray, "h w 3"]
    classes: tuple[_Class, ...]


class EvolutionPlayer(Panel):
    """How attention grows during a training: play it, scrub through it, compare runs.

    Everything is drawn in the browser; the settings are traits that can be read, set and observed
    from Python. :func:`explore_accumulation` makes one from the folders of runs.

    Args:
        evolutions: What the runs have recorded.
        names: A name for each run, or None for ``OAA``, ``OAA++`` and ``OAA+`` by their settings.
        following: Whether the runs may have no epoch yet, since they are just beginning.
        **settings: Initial values of the traits below.

    Raises:
        ValueError: The runs do not watch the same pictures and classes, or hold no epoch.
    """

    image_index = traitlets.Int(0).tag(sync=True)
    """Which picture is shown, from 0."""
    class_id = traitlets.Int().tag(sync=True)
    """The class whose maps are shown. A picture without it shows its first class."""
    epoch = traitlets.Int(0).tag(sync=True)
    """The epoch that is shown; the last one at first. 0 while none is recorded."""
    threshold = traitlets.Float(0.5).tag(sync=True)
    """The share of the map's maximum from which a pixel counts as found, in (0, 1)."""
    highlight = traitlets.Unicode("epoch").tag(sync=True)
    """Which found pixels are marked in accumulated maps: those new in this ``epoch``, those new
    since the ``first`` one, or ``none``."""
    contour = traitlets.Bool(True).tag(sync=True)
    """Whether the outline of what is found is drawn."""
    truth = traitlets.Bool(True).tag(sync=True)
    """Whether the outline of the true mask is drawn."""
    curve_of = traitlets.Unicode("picture").tag(sync=True)
    """The curves: of this ``picture`` at the threshold, or as the ``training`` recorded them."""
    speed = traitlets.Float(4.0).tag(sync=True)
    """Epochs per second while it plays, one of :data:`SPEEDS`."""
    stopping = traitlets.Bool(False).tag(sync=True)
    """Whether the training was asked to end; see :meth:`stop`."""
    live = traitlets.Bool(False, read_only=True).tag(sync=True)
    """Whether a training is being followed."""

    _frames = traitlets.Dict().tag(sync=True)
    _esm = source("player")

    def __init__(
        self,
        evolutions: Sequence[Evolution],
        names: Sequence[str] | None = None,
        *,
        following: bool = False,
        **settings: Setting,
    ) -> None:
        self._ended = threading.Event()  # first, since a widget that fails is closed as well
        check_settings(settings, type(self))
        _check_same(evolutions)
        if not following:
            _check_recorded(evolutions)
        self._evolutions = tuple(evolutions)
        self._series = _choose_series(evolutions, names)
        self._pictures, records = _read_pictures(evolutions, self._series)
        self._epochs = _epochs(evolutions)
        index = settings.get("image_index", 0)
        known = isinstance(index, int) and 0 <= index < len(self._pictures)
        settings.setdefault("class_id", self._pictures[index if known else 0].classes[0].class_id)
        settings.setdefault("epoch", self._epochs[-1] if self._epochs else 0)
        first = evolutions[0]
        data = {
            "title": f"{first.network}, {first.data}",
            "series": [
                {"name": each.name, "note": each.note, "grows": each.kind == "accumulated"}
                for each in self._series
            ],
            "speeds": list(SPEEDS),
            "palettes": palettes(),
            "pictures": records,
        }
        super().__init__(_data=data, _frames=self._pack(), **settings)

    def render(self) -> list[UInt8[np.ndarray, "h w 3"]]:
        """Returns the columns as the browser draws them: one picture for each map."""
        picture, entry = self._now
        shown = []
        for number in range(len(self._series)):
            levels = self._levels(number, entry)
            pixels = colors.overlay(
                picture.pixels, levels / 255, opacity=self.opacity, palette=self.palette
            )
            shown.append(_tint(pixels, self.new(number)))
        return shown

    def found(self, series: int) -> Bool[np.ndarray, "h w"]:
        """Returns the pixels of a column that count as found."""
        return _found(self._levels(series, self._now[1]), self.threshold)

    def new(self, series: int) -> Bool[np.ndarray, "h w"]:
        """Returns the pixels that are marked in a column: found now and not before."""
        _, entry = self._now
        now = self.found(series)
        frames = self._frames_of(series)
        at = self._place
        grows = self._series[series].kind == "accumulated"
        if self.highlight == "none" or not grows or at < 1 or frames[at] < 0:
            return np.zeros_like(now)
        before = frames[at - 1] if self.highlight == "epoch" else 0
        if before < 0:
            return np.zeros_like(now)
        return now & ~_found(self._levels(series, entry, before), self.threshold)

    def curve(self) -> dict[str, dict[str, Float[np.ndarray, " t"]]]:
        """Returns the curves of the picture and class that are shown, by column.

        Per epoch: ``found``, the share of the picture; and with a true mask ``recall``, the share
        of the object that is found, and ``noise``, the share of the found that is not object. NaN
        where an epoch is not recorded or nothing was found. Maps are resized to the picture as it
        is shown, at most :data:`LONGEST_SIDE` pixels a side.
        """
        _, entry = self._now
        limit = math.ceil(self.threshold * 255)
        curves = {}
        for number, series in enumerate(self._series):
            frames = self._frames_of(number)
            counts = {
                frame: _count(self._levels(number, entry, frame), entry.mask)
                for frame in sorted({frame for frame in frames if frame >= 0})
            }
            rows = [
                _rates(*counts[frame], limit) if frame >= 0 else (math.nan,) * 3
                for frame in frames
            ]
            columns = np.array(rows, float).reshape(-1, 3).T
            kinds = ("found",) if entry.mask is None else ("found", "recall", "noise")
            curves[series.name] = dict(zip(kinds, columns, strict=False))
        return curves

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the picture and all columns side by side: what shows without widgets."""
        picture, entry = self._now
        columns = [picture.pixels, *self.render()]
        height, width = picture.pixels.shape[:2]
        factor = 240 / max(height, width)
        cell = (max(round(width * factor), 1), max(round(height * factor), 1))
        step = max(cell[0], 120) + 8
        sheet = Image.new("RGB", (len(columns) * step - 8, cell[1] + 22), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        epoch = f"epoch {self.epoch}" if self.epoch else "no epoch yet"
        titles = [entry.name, *(f"{each.name}, {epoch}" for each in self._series)]
        for number, (pixels, title) in enumerate(zip(columns, titles, strict=True)):
            shown = Image.fromarray(pixels).resize(cell, Image.Resampling.LANCZOS)
            pen, regions = ImageDraw.Draw(shown), []
            if self.truth and entry.mask is not None:
                regions.append((entry.mask == 1, _TRUTH))
            if self.contour and number > 0:
                regions.append((self.found(number - 1), _NEW))
            for region, color in regions:
                for line in _outline(region):
                    pen.line([round(value * factor) for value in line], fill=color, width=1)
            draw.text((number * step, 2), title, fill=(30, 32, 36), font=font)
            sheet.paste(shown, (number * step, 22))
        return np.asarray(sheet)

    def to_figure(self, width: float = 7.0) -> "Sheet":
        """Returns what is on screen as a matplotlib figure, for a paper: maps and curves.

        Lines and text are lines and text in it, so save it as PDF or SVG with ``savefig``.

        Args:
            width: Width of the figure in inches.
        """
        from ..figures.sheet import SMALL, TEXT, canvas, put_image, put_text

        check_width(width)
        picture, entry = self._now
        curves = self.curve()
        columns = [picture.pixels, *self.render()]
        gap, below, top = 0.08, 1.75, 0.42
        cell = (width - gap * (len(columns) - 1)) / len(columns)
        tall = cell * picture.pixels.shape[0] / picture.pixels.shape[1]
        figure, axis = canvas(width, below + tall + top)
        title = f"{picture.name}, epoch {self.epoch}" if self.epoch else "no epoch yet"
        put_text(
            axis, 0, below + tall + 0.32, title, TEXT, ha="left", weight="bold", parse_math=False
        )
        for number, pixels in enumerate(columns):
            x = number * (cell + gap)
            put_image(axis, pixels, x, below, cell)
            regions = []
            if self.truth and entry.mask is not None:
                regions.append((entry.mask == 1, "white"))
            if self.contour and number:
                regions.append((self.found(number - 1), "#00e5ff"))
            for region, color in regions:
                place = (x, below, cell, tall)
                put_lines(axis, _outline(region), region.shape, place, color)
            name = self._series[number - 1].name if number else entry.name
            tone = _TONES[number - 1] if number else "black"
            put_text(
                axis, x, below + tall + 0.1, name, SMALL, ha="left", color=tone, parse_math=False
            )
            if number and self._epochs:
                shown = ("recall", "noise") if entry.mask is not None else ("found",)
                shares = curves[name]
                words = [f"{kind} {shares[kind][self._place]:.0%}" for kind in shown]
                text = ", ".join(words).replace("nan%", "–")
                put_text(axis, x, below - 0.1, text, SMALL, ha="left")
        self._put_curves(axis, curves, (0.42, 0.36, width - 0.5, below - 0.75))
        return figure

    def _put_curves(
        self, axis: "Axes", curves: Mapping[str, Mapping[str, Float[np.ndarray, " t"]]],
        place: tuple[float, float, float, float],
    ) -> None:  # fmt: skip
        from ..figures.sheet import SMALL, TINY

        chart = axis.inset_axes(place, transform=axis.transData)
        kinds = set()
        for number, shares in enumerate(curves.values()):
            kinds = {"recall", "noise"} & set(shares) or {"found"}
            for kind in kinds:
                dashes = "--" if kind == "noise" else "-"
                chart.plot(self._epochs, shares[kind], dashes, color=_TONES[number], lw=1.1)
        if self._epochs:
            chart.axvline(self.epoch, color="black", lw=0.8)
        found = "found" in kinds
        chart.set_ylim(*(() if found else (0, 1.02)))
        if len(self._epochs) > 1:
            chart.set_xlim(self._epochs[0], self._epochs[-1])
        chart.set_xlabel("epoch", fontsize=SMALL, labelpad=1)
        chart.set_title(
            "share of the picture found" if found else "recall (solid) and noise (dashed)",
            fontsize=SMALL, pad=3,
        )  # fmt: skip
        chart.tick_params(labelsize=TINY, length=2)
        chart.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        chart.spines[["top", "right"]].set_visible(False)

    def stop(self) -> None:
        """Asks the training that is followed to end at its next step, with a checkpoint."""
        self.stopping = True

    def close(self) -> None:
        """Ends the panel and the following of the training; the training goes on."""
        self._ended.set()
        super().close()

    @property
    def class_name(self) -> str:
        """The name of the class that is shown."""
        return self._now[1].name

    @property
    def state(self) -> dict[str, object]:
        """The data and the settings; a saved page follows no training."""
        return super().state | {"live": False, "stopping": False}

    def __repr__(self) -> str:
        names = ", ".join(each.name for each in self._series)
        count = len(self._pictures)
        return (
            f"EvolutionPlayer({names}; {count} picture{'s' * (count > 1)}, "
            f"{self.class_name!r}, epoch {self.epoch} of {len(self._epochs)})"
        )

    # ------------------------------------------------------------------------------- frames

    @property
    def _now(self) -> tuple[_Shown, _Class]:
        picture = self._pictures[self.image_index]
        entry = next(each for each in picture.classes if each.class_id == self.class_id)
        return picture, entry

    @property
    def _place(self) -> int:
        return self._epochs.index(self.epoch) if self._epochs else -1

    def _frames_of(self, series: int) -> list[int]:
        # For each epoch of all runs the last frame up to it of this run, -1 before its first.
        recorded = self._evolutions[self._series[series].run].epochs
        return [int(np.searchsorted(recorded, epoch, "right")) - 1 for epoch in self._epochs]

    def _stack(self, series: int, entry: _Class) -> UInt8[np.ndarray, "t h w"]:
        each = self._series[series]
        evolution, place = self._evolutions[each.run], entry.places[each.run]
        return (evolution.maps if each.kind == "maps" else evolution.accumulated)[place]

    def _levels(
        self, series: int, entry: _Class, frame: int | None = None
    ) -> UInt8[np.ndarray, "h w"]:
        size = self._pictures[self.image_index].pixels.shape[:2]
        if frame is None:
            frame = self._frames_of(series)[self._place] if self._epochs else -1
        if frame < 0:
            return np.zeros(size, np.uint8)
        return _stretch(self._stack(series, entry)[frame], size)

    def _pack(self) -> dict[str, object]:
        # Everything that grows while a training runs.
        evolutions = self._evolutions
        return {
            "epochs": list(self._epochs),
            "planned": max(each.planned for each in evolutions),
            "frames": [self._frames_of(number) for number in range(len(self._series))],
            "counts": [len(evolutions[each.run].epochs) for each in self._series],
            "maps": [self._pack_maps(picture) for picture in self._pictures],
            "gates": [
                [self._pack_gates(entry) for entry in picture.classes]
                for picture in self._pictures
            ],
            "training": [_training_curves(each, evolutions) for each in self._series],
            "skipped": [
                f"{each.run.name}/{line}" if len(evolutions) > 1 else line
                for each in evolutions
                for line in each.skipped
            ],
        }

    def _pack_maps(self, picture: _Shown) -> bytes:
        # By class, column and epoch; each epoch as its difference from the one before, modulo
        # 256: an accumulated map changes in few places.
        parts = (
            np.diff(self._stack(number, entry), axis=0, prepend=np.uint8(0)).tobytes()
            for entry in picture.classes
            for number in range(len(self._series))
        )
        return zlib.compress(b"".join(parts), 9)

    def _pack_gates(self, entry: _Class) -> list[dict[str, list]]:
        gates = []
        for each in self._series:
            evolution, place = self._evolutions[each.run], entry.places[each.run]
            scores = evolution.scores[:, place].tolist()
            gates.append(
                {
                    "scores": [round(score, 4) if math.isfinite(score) else None
                               for score in scores],
                    "accepted": evolution.accepted[:, place].tolist(),
                }
            )  # fmt: skip
        return gates

    def _take(self, evolutions: Sequence[Evolution]) -> None:
        # New epochs of a running training. Who looks at the last epoch goes on with it.
        follows = not self._epochs or self.epoch == self._epochs[-1]
        self._evolutions = tuple(evolutions)
        self._epochs = _epochs(evolutions)
        self._frames = self._pack()
        if self._epochs and (follows or self.epoch not in self._epochs):
            self.epoch = self._epochs[-1]

    def _follow(
        self, runs: Sequence[Path], training: _Training | _Process | None, seconds: float
    ) -> None:
        self.set_trait("live", True)
        arguments = (weakref.ref(self), self._ended, tuple(runs), training, seconds)
        threading.Thread(target=_watch, args=arguments, daemon=True).start()

    # ------------------------------------------------------------------------------ settings

    @traitlets.observe("image_index")
    def _keep_class(self, change: traitlets.Bunch) -> None:
        known = [each.class_id for each in self._pictures[self.image_index].classes]
        if self.class_id not in known:
            self.class_id = known[0]

    @traitlets.observe("stopping")
    def _ask_to_stop(self, change: traitlets.Bunch) -> None:
        if change.new and self.live:
            for each in self._evolutions:
                if not each.finished:
                    request_stop(each.run)

    @traitlets.validate("image_index")
    def _check_image_index(self, proposal: traitlets.Bunch) -> int:
        return check_index(proposal.value, len(self._pictures))

    @traitlets.validate("class_id")
    def _check_class_id(self, proposal: traitlets.Bunch) -> int:
        known = [each.class_id for each in self._pictures[self.image_index].classes]
        require(
            proposal.value in known,
            f"`class_id` in {known}, got {proposal.value}; the others were not watched",
        )
        return proposal.value

    @traitlets.validate("epoch")
    def _check_epoch(self, proposal: traitlets.Bunch) -> int:
        known = self._epochs or (0,)
        require(
            proposal.value in known,
            f"`epoch` as a recorded one from {known[0]} to {known[-1]}, got {proposal.value}",
        )
        return proposal.value

    @traitlets.validate("threshold")
    def _check_threshold(self, proposal: traitlets.Bunch) -> float:
        require(
            0 < proposal.value < 1,
            f"`threshold` in (0, 1), got {proposal.value:g}; it is a share of the maximum",
        )
        return proposal.value

    @traitlets.validate("highlight", "curve_of", "speed")
    def _check_choice(self, proposal: traitlets.Bunch) -> str | float:
        name = proposal.trait.name
        choices = {
            "highlight": get_args(Highlight),
            "curve_of": get_args(Curve),
            "speed": SPEEDS,
        }[name]
        require(proposal.value in choices, f"`{name}` in {choices}, got {proposal.value!r}")
        return proposal.value


def explore_accumulation(
    runs: Run | Sequence[Run] | Mapping[str, Run],
    *,
    training: _Training | _Process | None = None,
    seconds: float = 1.0,
    **settings: Setting,
) -> EvolutionPlayer:
    """Opens the player on what one or several trainings have recorded.

    One run shows the map of the epoch beside the accumulated one. Several runs that watch the
    same pictures show CAM, which is the epoch's map of the first run, and then one map of each. A
    run that has not recorded all its epochs is followed: new epochs appear as they come, and the
    stop button ends the training.

    Args:
        runs: The folder of a run, several, or several by the name to show.
        training: The thread or process that trains, if there is one: the player waits for its
            first record and ends following when it ends.
        seconds: How often to look for new epochs.
        **settings: Initial values of the player's traits, such as ``threshold=0.3``.

    Returns:
        The player.

    Raises:
        FileNotFoundError: A folder is missing or holds no recorded run.
        ValueError: A recording can't be read, or the runs watch different pictures.

    Example:
        ``explore_accumulation(["cam_run", "drop_run"]).save_html("player.html")``
    """
    check_settings(settings, EvolutionPlayer)
    names = list(runs) if isinstance(runs, Mapping) else None
    if isinstance(runs, Mapping):
        runs = list(runs.values())
    if not isinstance(runs, str | PathLike | Iterable):
        raise TypeError(f"expected the folders of runs in `runs`, got {type(runs).__name__}")
    folders = [Path(run) for run in ([runs] if isinstance(runs, str | PathLike) else runs)]
    if not folders:
        raise ValueError("expected the folder of at least one run in `runs`, got none")
    _await_first(folders, training)
    evolutions = [load_evolution(folder) for folder in folders]
    live = not all(each.finished for each in evolutions) and _runs(training)
    player = EvolutionPlayer(evolutions, names, following=live, **settings)
    if live:
        player._follow(folders, training, seconds)
    return player


# ------------------------------------------------------------------------------------ following

FIRST_RECORD = 120.0
"""Seconds to wait for the first record of a training that has just been started."""


def _runs(training: _Training | _Process | None) -> bool:
    # Without a handle nobody knows: an unfinished run is taken for a running one.
    if training is None:
        return True
    return training.is_alive() if hasattr(training, "is_alive") else training.poll() is None


def _await_first(folders: Sequence[Path], training: _Training | _Process | None) -> None:
    if training is None:
        return
    if not hasattr(training, "is_alive") and not hasattr(training, "poll"):
        raise TypeError(
            f"expected `training` as a thread or a process, got {type(training).__name__}"
        )
    deadline, pause = monotonic() + FIRST_RECORD, threading.Event()
    headers = [folder / "evolution" / "evolution.json" for folder in folders]
    while not all(header.is_file() for header in headers):
        if not _runs(training) or monotonic() > deadline:
            return
        pause.wait(0.1)


def _watch(
    reference: "weakref.ref[EvolutionPlayer]",
    ended: threading.Event,
    runs: Sequence[Path],
    training: _Training | _Process | None,
    seconds: float,
) -> None:
    seen = None
    while not ended.wait(seconds):
        alive = _runs(training)  # asked first: what came before its end is then read below
        player = reference()
        if player is None:
            return
        try:
            found = tuple(_signature(runs))
            if found != seen:
                evolutions = [load_evolution(run) for run in runs]
                player._take(evolutions)
                seen = found
            going = alive and not all(each.finished for each in player._evolutions)
        except (OSError, ValueError):  # the folder was taken away; what is shown stays
            going = False
        if not going:
            player.set_trait("live", False)
            return
        del player


def _signature(runs: Sequence[Path]) -> Iterator[tuple[str, int]]:
    for run in runs:
        for path in sorted([*(run / "evolution").glob("e*.*"), run / "history.csv"]):
            if path.exists():
                yield str(path), path.stat().st_mtime_ns


# ---------------------------------------------------------------------------------------- input


def _check_same(evolutions: Sequence[Evolution]) -> None:
    if not evolutions:
        raise ValueError("expected at least one recorded run, got none")
    first, *others = evolutions
    ours = _places(first)
    for other in others:
        theirs = _places(other)
        runs = f"{first.run.name!r} and {other.run.name!r}; open each run by itself"
        for pair in ours.keys() ^ theirs.keys():
            raise ValueError(
                f"expected runs that watch the same pictures and classes, got {pair} in only one "
                f"of {runs}"
            )
        for pair, number in ours.items():
            # the images of a generated data set have the same names whatever their seed and size
            if not np.array_equal(first.picture(number), other.picture(theirs[pair])):
                raise ValueError(
                    f"expected runs that watch the same pictures, got two that are both called "
                    f"{pair[0]!r} in {runs}"
                )


def _places(evolution: Evolution) -> dict[tuple[str, int], int]:
    return {(each.image_id, each.class_id): n for n, each in enumerate(evolution.watched)}


def _check_recorded(evolutions: Sequence[Evolution]) -> None:
    for each in evolutions:
        if not each.epochs:
            why = f" ({each.skipped[0]})" if each.skipped else ""
            raise ValueError(
                f"expected recorded epochs in {str(each.run)!r}, got none{why}; train first"
            )


def _choose_series(
    evolutions: Sequence[Evolution], names: Sequence[str] | None
) -> tuple[_Series, ...]:
    given = names or [each.variant for each in evolutions]
    if names is None and len(set(given)) < len(given):
        given = [f"{name} ({each.run.name})" for name, each in zip(given, evolutions, strict=True)]
    series = []
    plain = [number for number, each in enumerate(evolutions) if each.method == "oaa"]
    plain.sort(key=lambda number: evolutions[number].drop)
    if plain:
        series.append(_Series("CAM", "this epoch", plain[0], "maps"))
    for number, (name, each) in enumerate(zip(given, evolutions, strict=True)):
        if each.method == "oaa":
            series.append(_Series(str(name), f"{each.rule} so far", number, "accumulated"))
        else:
            series.append(_Series(str(name), "this epoch", number, "maps"))
    return tuple(series)


def _read_pictures(
    evolutions: Sequence[Evolution], series: Sequence[_Series]
) -> tuple[list[_Shown], list[dict[str, object]]]:
    # What Python keeps and what is sent: the same decoded picture and masks.
    first = evolutions[0]
    places = [_places(evolution) for evolution in evolutions]
    images: dict[str, list[int]] = {}
    for number, each in enumerate(first.watched):
        images.setdefault(each.image_id, []).append(number)
    shown, records = [], []
    for name, numbers in images.items():
        pixels, record = encode_picture(Image.fromarray(first.picture(numbers[0])), LONGEST_SIDE)
        classes = []
        for number in numbers:
            each, mask = first.watched[number], first.mask(number)
            if mask is not None:
                size = pixels.shape[1::-1]
                resized = Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
                mask = np.asarray(resized)
            pair = (each.image_id, each.class_id)
            found = tuple(run[pair] for run in places)
            classes.append(_Class(each.class_id, first.class_names[each.class_id], found, mask))
        shown.append(_Shown(name, pixels, tuple(classes)))
        masks = b"".join(entry.mask.tobytes() for entry in classes if entry.mask is not None)
        records.append(
            record
            | {
                "name": name,
                "masks": zlib.compress(masks, 9),
                "classes": [
                    {
                        "id": entry.class_id,
                        "name": entry.name,
                        "masked": entry.mask is not None,
                        "grids": [
                            list(evolutions[each.run].watched[entry.places[each.run]].grid)
                            for each in series
                        ],
                    }
                    for entry in classes
                ],
            }
        )
    return shown, records


def _epochs(evolutions: Sequence[Evolution]) -> tuple[int, ...]:
    return tuple(sorted({epoch for each in evolutions for epoch in each.epochs}))


def _training_curves(
    series: _Series, evolutions: Sequence[Evolution]
) -> dict[str, list[float | None]]:
    # What the training measured itself, at the epochs of all runs.
    rows = {int(row["epoch"]): row for row in evolutions[series.run].curves if row.get("epoch")}
    suffix = "epoch" if series.kind == "maps" else "accumulated"
    columns = {
        "recall": f"recall_{suffix}",
        "noise": f"noise_{suffix}",
        "loss": "loss",
        "precision": "mean_average_precision",
    }
    return {
        name: [
            value if math.isfinite(value := rows.get(epoch, {}).get(column, math.nan)) else None
            for epoch in _epochs(evolutions)
        ]
        for name, column in columns.items()
    }


# -------------------------------------------------------------------- what the browser draws too


def _stretch(map: UInt8[np.ndarray, "h w"], size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    """Resizes a map to the picture; 255 is then its largest value."""
    values = resize(torch.from_numpy(map)[None].float(), size)[0].double().numpy()
    peak = values.max()
    return np.floor(values * (255 / peak if peak > 0 else 0) + 0.5).astype(np.uint8)


def _found(levels: UInt8[np.ndarray, "h w"], threshold: float) -> Bool[np.ndarray, "h w"]:
    return levels >= threshold * 255


def _tint(
    pixels: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    mixed = (1 - _NEW_SHARE) * pixels + _NEW_SHARE * np.array(_NEW) + 0.5
    return np.where(mask[..., None], mixed.astype(np.uint8), pixels)


def _count(
    levels: UInt8[np.ndarray, "h w"], mask: UInt8[np.ndarray, "h w"] | None
) -> tuple[Int[np.ndarray, "256"], Int[np.ndarray, "256"]]:
    """Counts the pixels at or above each level: on the object, and elsewhere."""
    inside = np.zeros(levels.shape, bool) if mask is None else mask == 1
    outside = ~inside if mask is None else mask == 0
    return tuple(
        np.bincount(levels[part], minlength=256)[::-1].cumsum()[::-1] for part in (inside, outside)
    )


def _rates(
    inside: Int[np.ndarray, "256"], outside: Int[np.ndarray, "256"], limit: int
) -> tuple[float, float, float]:
    # Shares of the found pixels: of the picture, of the object, and not object.
    hit, miss = int(inside[limit]), int(outside[limit])
    return (
        (hit + miss) / int(inside[0] + outside[0]),
        hit / int(inside[0]) if inside[0] else math.nan,
        miss / (hit + miss) if hit + miss else math.nan,
    )


def _outline(mask: Bool[np.ndarray, "h w"]) -> list[Line]:
    """Returns the edges of a region as lines between pixels, those of the picture included."""
    return [tuple(value - 1 for value in line) for line in borders(np.pad(mask, 1))]
