"""Figures of chapter 4: attention that accumulates while a classifier trains.

They are drawn from recorded trainings; see :mod:`attnviz.evolution`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.axes import Axes
from torch import Tensor

from ..evolution import Evolution, load_evolution
from ..networks import bundled_folder
from .sheet import (
    COLUMN,
    PAGE,
    SMALL,
    TEXT,
    Sheet,
    canvas,
    enlarged,
    map_over,
    picture_grid,
    put_arrow,
    put_box,
    put_image,
    put_network,
    put_text,
)

__all__ = ["FIGURES"]

Runs = Mapping[str, Evolution]


@dataclass(frozen=True)
class RunKind:
    title: str
    draw: Callable[[Runs, int], Sheet]
    variants: tuple[str, ...] = ("OAA",)  # which trainings it shows


def given_runs(number: str, kind: RunKind, runs: Iterable[object] | None) -> Runs:
    """The recorded trainings that a figure shows, by their names; bundled ones if None."""
    if runs is None:
        runs = sorted(path for path in (bundled_folder() / "runs").iterdir() if path.is_dir())
    found: dict[str, Evolution] = {}
    for run in runs:
        run = run if isinstance(run, Evolution) else load_evolution(run)
        if found.setdefault(run.variant, run) is not run:
            raise ValueError(
                f"expected one training of each kind, got two of {run.variant}: "
                f"{str(found[run.variant].run)!r} and {str(run.run)!r}"
            )
    missing = [name for name in kind.variants if name not in found]
    if missing:
        raise ValueError(
            f"expected trainings of {' and '.join(kind.variants)} for figure {number}, got none "
            f"of {' and '.join(missing)}"
        )
    chosen = {name: found[name] for name in kind.variants}
    pairs = {
        tuple((each.image_id, each.class_id) for each in run.watched) for run in chosen.values()
    }
    if len(pairs) > 1:
        raise ValueError(
            f"expected trainings that watch the same pictures for figure {number}, got "
            "different ones; train them on the same data"
        )
    for run in chosen.values():
        if len(run.epochs) < 3:
            raise ValueError(
                f"expected at least 3 recorded epochs, got {len(run.epochs)} in {str(run.run)!r}"
            )
    return chosen


# -------------------------------------------------------------------------- what is recorded


def _chosen_epochs(run: Evolution, count: int) -> list[int]:
    # Places of evenly spread epochs, from the first whose maps count to the last.
    return np.linspace(min(1, len(run.epochs) - 1), len(run.epochs) - 1, count).round().astype(int)


def _movement(run: Evolution, number: int) -> float:
    # How much the maps of the chosen epochs differ: 1 - intersection over union of what lies
    # above half of their maximum, over all of them.
    maps = run.maps[number][_chosen_epochs(run, 3)]
    above = [map >= 0.5 * map.max() for map in maps if map.max() > 0]
    if len(above) < 2:
        return 0.0
    return 1 - np.logical_and.reduce(above).sum() / np.logical_or.reduce(above).sum()


def _by_movement(run: Evolution, most: int, *, still: bool = False) -> list[int]:
    # Of the pairs that were accumulated those whose attention moves most, or least.
    sign = 1 if still else -1
    return sorted(_accumulated(run), key=lambda n: sign * _movement(run, n))[:most]


def _accumulated(run: Evolution) -> list[int]:
    # The pairs with an accumulated map, or all where there are fewer than two.
    found = [n for n, maps in enumerate(run.accumulated) if maps[-1].any()]
    return found if len(found) > 1 else list(range(len(run.watched)))


def _tensor(map: UInt8[np.ndarray, "h w"]) -> Tensor:
    return torch.from_numpy(map.astype(np.float32) / 255)


def _laid(run: Evolution, number: int, map: UInt8[np.ndarray, "h w"]) -> np.ndarray:
    return map_over(run.picture(number), _tensor(map).clamp(0, 1), smooth=True)


def _label(run: Evolution, number: int) -> str:
    return run.class_names[run.watched[number].class_id].replace(" ", "\n", 1)


# ---------------------------------------------------------------------- strips of a training


def _strip(run: Evolution, number: int, count: int = 3) -> list[np.ndarray]:
    maps = [_laid(run, number, run.maps[number][place]) for place in _chosen_epochs(run, count)]
    return [*maps, _laid(run, number, run.accumulated[number][-1])]


def _strip_titles(run: Evolution, count: int = 3) -> list[str]:
    epochs = [f"epoch {run.epochs[place]}" for place in _chosen_epochs(run, count)]
    return ["picture", *epochs, {"max": "maximum"}.get(run.rule, run.rule)]


def _moving(runs: Runs, seed: int) -> Sheet:
    return _strips(runs["OAA"], _by_movement(runs["OAA"], 3))


def _resting(runs: Runs, seed: int) -> Sheet:
    return _strips(runs["OAA"], _by_movement(runs["OAA"], 2, still=True))


def _strips(
    run: Evolution, numbers: Sequence[int], count: int = 3, width: float = COLUMN
) -> Sheet:
    rows = [[enlarged(run.picture(n)), *_strip(run, n, count)] for n in numbers]
    labels = [_label(run, n) for n in numbers]
    return picture_grid(rows, _strip_titles(run, count), labels, width)[0]


def _evolution(runs: Runs, seed: int) -> Sheet:
    return _strips(runs["OAA"], _by_movement(runs["OAA"], 5), 6, PAGE)


def _evolution_with_drop(runs: Runs, seed: int) -> Sheet:
    plain, drop = runs["OAA"], runs["OAA++"]
    rows, labels = [], []
    for number in _by_movement(plain, 3, still=True):
        for run, name in ((plain, "OAA"), (drop, "OAA++")):
            rows.append([enlarged(run.picture(number)), *_strip(run, number, 6)])
            labels.append(f"{_label(run, number)}\n{name}")
    return picture_grid(rows, _strip_titles(plain, 6), labels, PAGE)[0]


# -------------------------------------------------------------------------- variants compared


def _compared(runs: Runs, variants: Sequence[str], most: int, width: float) -> Sheet:
    plain = runs["OAA"]
    numbers = _accumulated(plain)[:most]
    rows = []
    for number in numbers:
        final = {"CAM": plain.maps[number][-1]}
        for name, run in runs.items():
            final[name] = (run.accumulated or run.maps)[number][-1]
        rows.append([enlarged(plain.picture(number))])
        rows[-1] += [_laid(plain, number, final[name]) for name in variants]
    labels = [_label(plain, number) for number in numbers]
    return picture_grid(rows, ["picture", *variants], labels, width)[0]


def _with_and_without_drop(runs: Runs, seed: int) -> Sheet:
    return _compared(runs, ("OAA", "OAA++"), 4, COLUMN)


def _all_variants(runs: Runs, seed: int) -> Sheet:
    return _compared(runs, ("CAM", "OAA", "OAA++", "OAA+"), 4, PAGE)


def _recall(runs: Runs, seed: int) -> Sheet:
    figure = Sheet(figsize=(COLUMN, 2.3), dpi=130, layout="constrained")
    axis = figure.subplots()
    styles = {"OAA": ("-", "o", "#0b559f"), "OAA++": ("--", "s", "#c2410c")}
    for name, (style, marker, color) in styles.items():
        rows = runs[name].curves
        epochs = [row["epoch"] for row in rows]
        accumulated = [100 * row["recall_accumulated"] for row in rows]
        axis.plot(
            epochs, accumulated, style, marker=marker, ms=3, lw=1.2, color=color,
            label=f"{name}, accumulated",
        )  # fmt: skip
        single = [100 * row["recall_epoch"] for row in rows]
        axis.plot(epochs, single, ":", marker=marker, ms=2, lw=0.9, color=color, mfc="white",
                  label=f"{name}, map of the epoch")  # fmt: skip
    axis.set_xlabel("epoch", fontsize=TEXT)
    axis.set_ylabel("recall of the object (%)", fontsize=TEXT)
    axis.tick_params(labelsize=SMALL)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=SMALL, frameon=False)
    return figure


# ------------------------------------------------------------------------------- diagrams


def _piles(axis: Axes, x: float, middle: float, text: str) -> float:
    # Class maps of a 1 x 1 convolution, as a pile; returns where it ends.
    for shift in (0.1, 0.05, 0.0):
        put_box(axis, x + shift, middle - 0.2 + shift, 0.34, 0.34)
    put_text(axis, x + 0.22, middle - 0.33, text)
    return x + 0.46


def _classifier(
    axis: Axes, picture: np.ndarray, x: float, middle: float, side: float, *, pooled: bool = True
) -> tuple[float, float]:
    # Picture, stages, class maps and, if `pooled`, average and scores; returns where the class
    # maps are and where it all ends.
    ratio = picture.shape[0] / picture.shape[1]
    put_image(axis, picture, x, middle - side * ratio / 2, side)
    put_arrow(axis, (x + side + 0.02, middle), (x + side + 0.18, middle))
    put_network(axis, 5, x + side + 0.2, middle, 1.0, side * ratio)
    start = x + side + 1.24
    put_arrow(axis, (start - 0.12, middle), (start, middle))
    end = _piles(axis, start + 0.02, middle, "class maps $F^c$")
    if pooled:
        put_arrow(axis, (end + 0.02, middle), (end + 0.18, middle))
        put_box(axis, end + 0.2, middle - 0.13, 0.42, 0.26, "GAP")
        put_arrow(axis, (end + 0.64, middle), (end + 0.8, middle))
        put_text(axis, end + 0.84, middle, "scores,\nloss", ha="left")
        return start + 0.2, end + 1.2
    return start + 0.2, end


def _accumulation(
    axis: Axes, run: Evolution, number: int, places: Sequence[int], x: float, low: float,
    side: float, step: float,
) -> float:  # fmt: skip
    # Maps of some epochs above, their running maximum below; returns where it ends.
    ratio = run.picture(number).shape[0] / run.picture(number).shape[1]
    tall = side * ratio
    for position, place in enumerate(places):
        left = x + position * step
        put_image(axis, _laid(run, number, run.maps[number][place]), left, low + tall + 0.4, side)
        put_text(
            axis, left + side / 2, low + 2 * tall + 0.49,
            rf"$A_{{{run.epochs[place]}}}$", TEXT,
        )  # fmt: skip
        put_image(axis, _laid(run, number, run.accumulated[number][place]), left, low, side)
        put_text(axis, left + side / 2, low - 0.1, rf"$M_{{{run.epochs[place]}}}$", TEXT)
        put_arrow(axis, (left + side / 2, low + tall + 0.38), (left + side / 2, low + tall + 0.03))
        put_text(axis, left + side / 2 + 0.06, low + tall + 0.2, "max", SMALL, ha="left")
        if position:
            put_arrow(
                axis, (left - step + side + 0.02, low + tall / 2), (left - 0.03, low + tall / 2)
            )
    return x + len(places) * step


def _first(runs: Runs) -> tuple[Evolution, int, UInt8[np.ndarray, "h w 3"]]:
    run = runs["OAA"]
    number = _by_movement(run, 1)[0]
    return run, number, enlarged(run.picture(number))


def _process(runs: Runs, seed: int) -> Sheet:
    run, number, picture = _first(runs)
    side, ratio = 1.0, picture.shape[0] / picture.shape[1]
    figure, axis = canvas(PAGE, 3 * side * ratio + 1.3)
    middle = 2 * side * ratio + 1.2 + side * ratio / 2
    start = (PAGE - 4.4) / 2
    maps, _ = _classifier(axis, picture, start, middle, side)
    places = _chosen_epochs(run, 5)
    step = (PAGE - 0.1) / 5
    _accumulation(axis, run, number, places, 0.15, 0.22, side, step)
    top = 2 * side * ratio + 0.88
    bus = top + 0.12
    put_arrow(axis, (maps, middle - 0.42), (maps, bus))
    axis.plot([0.15 + side / 2, 0.15 + 4 * step + side / 2], [bus, bus], color="black", lw=0.9)
    put_text(
        axis, maps + 0.08, bus + 0.15, r"$A = \mathrm{ReLU}(F^c)\,/\,\max F^c$, every epoch",
        ha="left",
    )  # fmt: skip
    return figure


def _dropping(runs: Runs, seed: int) -> Sheet:
    run, number, picture = _first(runs)
    place = _chosen_epochs(run, 3)[1]
    before = run.maps[number][place - 1]
    after = runs["OAA++"].maps[number][place]
    side, ratio = 1.0, picture.shape[0] / picture.shape[1]
    tall = side * ratio
    figure, axis = canvas(PAGE, 2 * tall + 0.95)
    low, middle = 0.25, tall + 0.68 + tall / 2
    hidden = _hidden(run.picture(number), before)
    put_image(axis, picture, 0.05, middle - tall / 2, side)
    put_text(axis, 0.05 + side / 2, middle - tall / 2 - 0.1, "image $I$")
    put_arrow(axis, (side + 0.08, middle), (side + 0.38, middle))
    axis.plot(side + 0.5, middle, "o", ms=13, mfc="#eeeeee", mec="#c00000", mew=1.2)
    put_text(axis, side + 0.5, middle, "×", TEXT)
    put_image(axis, _laid(run, number, before), 0.05, low, side)
    put_text(axis, 0.05 + side / 2, low - 0.1, rf"$A_{{{run.epochs[place] - 1}}}$", TEXT)
    put_arrow(axis, (side + 0.08, low + tall / 2), (side + 0.5, low + tall / 2))
    put_arrow(axis, (side + 0.5, low + tall / 2), (side + 0.5, middle - 0.12))
    put_text(
        axis, side + 0.58, low + tall / 2, "hide where $A > \\delta$,\nwith probability $\\beta$",
        ha="left",
    )  # fmt: skip
    put_arrow(axis, (side + 0.62, middle), (side + 0.8, middle))
    maps, _ = _classifier(axis, hidden, side + 0.84, middle, side)
    x = maps - side / 2
    put_arrow(axis, (maps, middle - 0.42), (maps, low + tall + 0.04))
    put_image(axis, _laid(run, number, after), x, low, side)
    put_text(axis, x + side / 2, low - 0.1, rf"$A_{{{run.epochs[place]}}}$", TEXT)
    put_arrow(axis, (x + side + 0.04, low + tall / 2), (x + side + 0.55, low + tall / 2))
    put_text(axis, x + side + 0.3, low + tall / 2 + 0.12, "max")
    put_image(
        axis, _laid(run, number, runs["OAA++"].accumulated[number][place]), x + side + 0.6, low,
        side,
    )  # fmt: skip
    put_text(axis, x + 1.5 * side + 0.6, low - 0.1, rf"$M_{{{run.epochs[place]}}}$", TEXT)
    return figure


def _hidden(
    picture: UInt8[np.ndarray, "h w 3"], map: UInt8[np.ndarray, "h w"], threshold: float = 0.6
) -> np.ndarray:
    # The picture as the network sees it behind the drop layer: grey where attention was strong.
    large = enlarged(picture).copy()
    values = torch.nn.functional.interpolate(
        _tensor(map)[None, None], large.shape[:2], mode="bilinear", align_corners=False
    )[0, 0]
    large[(values > threshold).numpy()] = 128
    return large


def _whole_pipeline(runs: Runs, seed: int) -> Sheet:
    run, number, picture = _first(runs)
    side, ratio = 0.8, picture.shape[0] / picture.shape[1]
    tall = side * ratio
    figure, axis = canvas(PAGE, 2 * tall + 1.12)
    low, middle = 0.25, tall + 0.78 + tall / 2
    top = axis.get_ylim()[1] - 0.1
    put_text(axis, 1.6, top, "(a) online attention accumulation", TEXT)
    maps, _ = _classifier(axis, picture, 0.05, middle, side, pooled=False)
    put_arrow(axis, (maps + 0.3, middle), (maps + 0.46, middle))
    put_text(axis, maps + 0.5, middle, "GAP,\nloss", ha="left")
    step = 0.86
    for position, place in enumerate(_chosen_epochs(run, 2)):
        put_image(
            axis, _laid(run, number, run.maps[number][place]), 0.05 + position * step, low, side
        )
        put_text(
            axis, 0.05 + position * step + side / 2, low - 0.1,
            rf"$A_{{{run.epochs[place]}}}$", TEXT,
        )  # fmt: skip
    x = 0.05 + 2 * step + 0.5
    put_arrow(axis, (maps, middle - 0.42), (maps, low + tall + 0.12))
    put_arrow(axis, (x - 0.48, low + tall / 2), (x - 0.04, low + tall / 2))
    put_text(axis, x - 0.26, low + tall / 2 + 0.12, "max")
    put_image(axis, _laid(run, number, run.accumulated[number][-1]), x, low, side)
    put_text(axis, x + side / 2, low - 0.1, "accumulated $M$", TEXT)
    axis.plot([3.5, 3.5], [0.05, top + 0.05], ":", color="black", lw=0.8)
    left = 3.6
    put_text(axis, left + 1.6, top, "(b) integral attention model", TEXT)
    maps, end = _classifier(axis, picture, left, middle, side, pooled=False)
    put_arrow(axis, (maps, middle - 0.42), (maps, low + tall / 2 + 0.14))
    put_box(axis, maps - 0.42, low + tall / 2 - 0.13, 0.84, 0.26, "hybrid loss")
    put_arrow(axis, (x + side + 0.04, low + tall / 2), (maps - 0.45, low + tall / 2), "--")
    put_text(axis, (x + side + maps - 0.4) / 2, low + tall / 2 + 0.12, "soft label")
    put_arrow(axis, (end + 0.04, middle), (end + 0.16, middle))
    integral, small = runs["OAA+"], PAGE - end - 0.22
    put_image(
        axis, _laid(integral, number, integral.maps[number][-1]), end + 0.19,
        middle - small * ratio / 2, small,
    )  # fmt: skip
    put_text(axis, end + 0.19 + small / 2, middle - small * ratio / 2 - 0.1, "OAA+", TEXT)
    return figure


def _two_branches(runs: Runs, seed: int) -> Sheet:
    run, number, picture = _first(runs)
    side, ratio = 0.9, picture.shape[0] / picture.shape[1]
    tall = side * ratio
    figure, axis = canvas(PAGE, max(2 * tall + 0.9, 2.4))
    middle = axis.get_ylim()[1] / 2
    put_image(axis, picture, 0.05, middle - tall / 2, side)
    put_arrow(axis, (0.05 + side + 0.02, middle), (0.05 + side + 0.2, middle))
    put_network(axis, 5, 0.3 + side, middle, 1.1, tall)
    put_text(axis, 0.85 + side, middle - tall / 2 - 0.12, "shared stages")
    fork = 1.42 + side
    for sign, name in ((1, "$F_1$"), (-1, "$F_2$")):
        y = middle + sign * (tall / 2 + 0.12)
        put_arrow(axis, (fork - 0.12, middle), (fork + 0.3, y))
        end = _piles(axis, fork + 0.34, y, name)
        if sign > 0:
            put_arrow(axis, (end + 0.02, y), (end + 0.22, y))
            put_box(axis, end + 0.24, y - 0.13, 0.42, 0.26, "GAP")
            put_arrow(axis, (end + 0.68, y), (end + 0.88, y))
            put_text(axis, end + 0.92, y, "scores,\nclass loss", ha="left")
            put_image(
                axis, _laid(run, number, run.accumulated[number][-1]), end + 1.55, y - tall / 2,
                side,
            )  # fmt: skip
            put_text(axis, end + 1.55 + side / 2, y - tall / 2 - 0.1, "accumulated $M$", TEXT)
            corner = (end + 1.55 + side / 2, y - tall / 2 - 0.2)
        else:
            put_arrow(axis, (end + 0.02, y), (end + 0.5, y))
            put_box(axis, end + 0.54, y - 0.13, 0.84, 0.26, "hybrid loss")
            put_arrow(axis, corner, (end + 1.42, y), "--")
            put_text(axis, end + 0.96, y - 0.26, "at test: the map of $F_2$")
    return figure


FIGURES = {
    "4.1": RunKind("Attention moves while a classifier trains", _moving),
    "4.2": RunKind("Attention that moves little", _resting),
    "4.3": RunKind(
        "Integral attention learning (OAA+)", _whole_pipeline, ("OAA", "OAA+")
    ),
    "4.4": RunKind("Online attention accumulation", _process),
    "4.5": RunKind("The attention drop layer", _dropping, ("OAA", "OAA++")),
    "4.6": RunKind("OAA and OAA++", _with_and_without_drop, ("OAA", "OAA++")),
    "4.7": RunKind(
        "CAM, OAA, OAA++ and OAA+", _all_variants, ("OAA", "OAA++", "OAA+")
    ),
    "4.10": RunKind("Recall while a classifier trains", _recall, ("OAA", "OAA++")),
    "4.11": RunKind("Attention while a classifier trains", _evolution),
    "4.12": RunKind(
        "Attention with and without the drop layer", _evolution_with_drop, ("OAA", "OAA++")
    ),
    "4.13": RunKind("OAA for localization", _two_branches),
}  # fmt: skip
