"""The tables of chapter 4: trainings with accumulated attention, and the quality of their maps.

A table trains what its rows compare, each training in a folder of the cache named after its
config, so a stopped table goes on and tables share trainings. Maps are measured on the training
images that have masks, as in the thesis: what is accumulated exists for them only.

Map mIoU: a pixel is of the class, among the image's own, whose map is largest there, and
background where all of them lie below a threshold, the best one of the half of the images that
the image is not in. The thesis' mIoU is that of a segmentation network trained on such labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..cam import resize
from ..memory import AttentionMemory
from ..metrics import bootstrap_interval, split_half
from ..networks import oaa_network
from ..segment.pseudo import LabelRule
from ..training import OAAConfig, train_oaa
from ..training.measure import masked_pairs, observe, qualities
from ..training.oaa import Preset, opened
from ..training.pictures import Pictures
from ..training.runs import start_fabric
from .segmentation import Plan, segmented_rows
from .sources import (
    Source,
    cache_for,
    config_of,
    finished,
    folder_of,
    images_of,
    joined,
    repeated,
    trained,
    trained_table,
)
from .table import Row, Table, numbers

__all__ = ["TABLES", "make"]

TABLES = ("4.5", "4.6", "4.8", "4.9", "4.10", "4.11", "4.13", "4.14")

_BACKGROUND = np.arange(0.05, 0.96, 0.05)
_RESAMPLES = 500


# ------------------------------------------------------------------------------- what is trained


def _sources(id: str, config: OAAConfig) -> dict[int, Source]:
    # What stands behind each row of the thesis, by its place; rows of other papers have none.
    def oaa(**changes: object) -> Source:
        return Source(OAAConfig(**asdict(config) | changes))

    plain, drop = oaa(), oaa(drop="image")
    final = Source(plain.oaa, maps="final")
    if id == "4.5":
        losses = [Source(plain.oaa, {"loss": loss}, "final") for loss in ("mce", "ep", "hybrid")]
        return dict(enumerate([final, oaa(rule="mean"), plain, *losses]))
    if id == "4.6":
        return {
            place: Source(plain.oaa, {"split": row["threshold"]}, "final")
            for place, row in enumerate(numbers()[id]["rows"])
        }
    if id == "4.8":
        return {
            place: oaa(drop="image", threshold=row["delta"], rate=row["beta"])
            for place, row in enumerate(numbers()[id]["rows"])
        }
    if id == "4.9":
        rows = [plain, drop, oaa(drop="feature"), Source(drop.oaa, maps="final")]
        return dict(enumerate(rows))
    if id == "4.10":  # as shares of the 30,000 steps that are the preset's
        return {
            place: oaa(drop="image", epochs=max(2, round(config.epochs * row["iters"] / 30_000)))
            for place, row in enumerate(numbers()[id]["rows"])
        }
    return dict(enumerate([final, plain, drop]))  # 4.11, 4.13


# ------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class _Measured:
    # What a row's maps are worth, by image and by image-class pair.
    image_ids: list[str]
    counts: np.ndarray  # (images, thresholds, 1 + classes, 3): right, predicted, true pixels
    classes: np.ndarray  # of each pair
    recall: np.ndarray
    noise: np.ndarray

    def overlaps(self) -> tuple[float, float, float]:
        """Mean intersection over union in percent, with its interval; thresholds held out."""
        half = split_half(self.image_ids)
        chosen = np.zeros(len(half), dtype=int)
        for part in (half, ~half):
            other = self.counts[~part].sum(axis=0)
            chosen[part] = int(_mean_overlap(other).argmax()) if (~part).any() else 0
        kept = self.counts[np.arange(len(half)), chosen].astype(np.float64)
        draws = np.random.default_rng(0).multinomial(
            len(kept), np.full(len(kept), 1 / len(kept)), size=_RESAMPLES
        )
        sums = (draws @ kept.reshape(len(kept), -1)).reshape(_RESAMPLES, *kept.shape[1:])
        low, high = np.percentile(_mean_overlap(sums), [2.5, 97.5])
        return tuple(100 * float(v) for v in (_mean_overlap(kept.sum(axis=0)), low, high))


def _mean_overlap(counts: np.ndarray) -> np.ndarray:
    right, predicted, true = np.moveaxis(counts.astype(np.float64), -1, 0)
    union = predicted + true - right
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nanmean(np.where(true > 0, right / union, np.nan), axis=-1)


def _measure(source: Source, cache: Path, root: Path | None, progress: bool) -> _Measured:
    run, integral = trained(source, cache, root, progress)
    config = source.oaa
    pictures = opened(config, "train", root, False)
    pairs, ids = masked_pairs(pictures), pictures.image_ids
    if not pairs:
        raise ValueError(
            f"expected masks to measure maps with, got none for the pictures of {config.data}"
        )
    if source.maps == "accumulated":
        memory = AttentionMemory.load(run / "memory")

        def map_of(pair: tuple[int, int]) -> Tensor | None:
            return memory[ids[pair[0]], pair[1]]

    else:
        weights = (integral or run) / "network.safetensors"
        network = oaa_network(config.network, len(pictures.class_names), weights)
        fabric = start_fabric(config)
        network = fabric.to_device(network)
        text = "maps" if progress else None
        map_of = observe(network, pictures, pairs, fabric, text=text).get
    found = qualities(pictures, pairs, map_of)
    by_image: dict[int, list[int]] = {}
    for i, class_id in pairs:
        by_image.setdefault(i, []).append(class_id)
    bar = tqdm(by_image.items(), "overlaps", unit="image", delay=2, disable=not progress)
    counts = [_counted(pictures, i, {c: map_of((i, c)) for c in classes}) for i, classes in bar]
    return _Measured(
        [ids[i] for i in by_image], np.stack(counts), np.array([c for _, c in found]),
        np.array([recall for recall, _ in found.values()]),
        np.array([noise for _, noise in found.values()]),
    )  # fmt: skip


def _counted(pictures: Pictures, i: int, maps: Mapping[int, Tensor | None]) -> np.ndarray:
    # Right, predicted and true pixels of every class, background first, at each threshold.
    counts = np.zeros((len(_BACKGROUND), 1 + len(pictures.class_names), 3), dtype=np.int32)
    truth, values, best = None, None, None
    for class_id, map in maps.items():
        mask = pictures.mask(i, class_id)
        if truth is None:
            truth = np.zeros(mask.shape, dtype=np.int64)
            values, best = np.zeros(mask.shape, dtype=np.float32), np.zeros_like(truth)
        truth[mask == 1] = 1 + class_id
        truth[mask == 255] = -1
        if map is None:
            continue
        shown = resize(map[None], mask.shape)[0].numpy()
        larger = shown > values
        values[larger], best[larger] = shown[larger], 1 + class_id
    known = truth >= 0
    truth, values, best = truth[known], values[known], best[known]
    size = counts.shape[1]
    for place, threshold in enumerate(_BACKGROUND):
        predicted = np.where(values > threshold, best, 0)
        counts[place, :, 0] = np.bincount(truth[truth == predicted], minlength=size)
        counts[place, :, 1] = np.bincount(predicted, minlength=size)
        counts[place, :, 2] = np.bincount(truth, minlength=size)
    return counts


# ------------------------------------------------------------------------------------ the tables


def make(
    id: str,
    *,
    data: str,
    network: str | None,
    weights: str | Path,
    root: Path,
    limit: int | None,
    seed: int,
    device: str,
    cache: Path,
    progress: bool,
    preset: Preset | None = None,
    epochs: int | None = None,
    repeats: int = 1,
    measure: Literal["maps", "segmentation"] = "maps",
    rule: LabelRule | None = None,
    segment_epochs: int | None = None,
    workers: int = 0,
) -> Table:
    """Makes one table of chapter 4; see :func:`attnviz.tables.make_table`."""
    if measure not in ("maps", "segmentation"):
        raise ValueError(f"expected `measure` in ('maps', 'segmentation'), got {measure!r}")
    network = network or ("scenes" if data == "scenes" else "vgg16")
    config = config_of(
        id, data, network, preset, device=device, limit=limit, epochs=epochs, weights=str(weights)
    )
    if id == "4.14":
        return _localization(config, root, seed, repeats, cache, progress)
    if measure == "segmentation":
        if "miou" not in numbers()[id]["rows"][0] or id == "4.11":
            raise ValueError(
                f"expected `measure` 'maps' for table {id}, got 'segmentation'; its numbers are "
                "of maps"
            )
        found = segmented_rows(
            id,
            lambda again, name, _: {
                (place, ""): Plan(source, name) for place, source in _sources(id, again).items()
            },
            config, root=root, seed=seed, cache=cache, progress=progress, repeats=repeats,
            rule=rule, segment_epochs=segment_epochs, workers=workers,
        )  # fmt: skip
        return trained_table(id, config, seed, *found)
    cache = cache_for(cache, config, root)
    measured = repeated(
        replace(config, seed=seed), repeats,
        lambda again: {
            place: partial(_measure, source, cache, root, progress)
            for place, source in _sources(id, again).items()
        },
        progress,
    )  # fmt: skip
    class_names = opened(config, "train", root, False).class_names
    rows = [
        _row(row, measured.get(place), class_names)
        for place, row in enumerate(numbers()[id]["rows"])
    ]
    count = len(next(iter(measured.values()))[0].image_ids)
    return trained_table(id, config, seed, count, rows, [], _notes(id, config, repeats))


def _localization(
    config: OAAConfig, root: Path | None, seed: int, repeats: int, cache: Path, progress: bool
) -> Table:
    # Table 4.14: boxes of unseen images, by the maps of the two branches of one training.
    cache = cache_for(cache, config, root)

    def boxes(again: OAAConfig) -> dict:
        branched = replace(again, branch=True)
        run = folder_of(cache, branched)
        return finished(train_oaa, branched, run, root, progress)["localization"]

    made = repeated(
        replace(config, seed=seed), repeats, lambda again: {"": partial(boxes, again)}, progress
    )
    found = made[""]
    if not found[0] or not found[0]["cam"]["images"]:
        raise ValueError(
            f"expected unseen pictures of one class with a box for table 4.14, got none in "
            f"{config.data}; take cub or scenes"
        )
    names = {"CAM": "cam", "OAA": "oaa"}

    def cells(paper: Mapping[str, object], measure: str) -> dict[str, float | None]:
        name = names.get(str(paper.get("method")))
        parts = ("score", "low", "high")
        values = [[each[name][measure][part] for part in parts] for each in found if name]
        return joined(paper.get(measure), values)

    rows: list[Row] = [
        {"method": row["method"]} | {measure: cells(row, measure) for measure in ("loc1", "loc5")}
        for row in numbers()["4.14"]["rows"]
    ]
    extra: list[Row] = []
    for name, key in names.items():
        values = [[each[key]["gt_known"][k] for k in ("score", "low", "high")] for each in found]
        extra.append(
            {
                "method": f"{name}, gt_known",
                "loc1": joined(None, values),
                "loc5": joined(None, None),
            }
        )
    notes = [
        f"boxes around the largest region above {100 * found[0]['cam']['threshold']:g} % of the "
        "maximum of the true class' map; classes by the first branch",
        "CAM: the map of the branch that classifies; OAA: that of the branch that learned the "
        "accumulated maps",
        "rows without ours are of other papers, as the thesis quotes them",
        *_notes("4.14", config, repeats)[-2:],
    ]
    if config.data == "scenes":
        notes.insert(0, "generated pictures: split val of scenes, those of one class")
    count = found[0]["cam"]["images"]
    return trained_table("4.14", config, seed, count, rows, extra, notes)


def _row(
    paper: Mapping[str, object], measured: Sequence[_Measured] | None, class_names: Sequence[str]
) -> Row:
    row: Row = {}
    for column, value in paper.items():
        values: Callable[[_Measured], tuple[float, float, float]] | None = None
        if column == "miou":
            values = _Measured.overlaps
        elif column in ("recall", "noise"):
            values = _mean_of(column)
        elif column == "class_mean_computed":
            values = _class_mean
        elif column in class_names:
            values = _mean_of("recall", class_names.index(column))
        elif not isinstance(value, float) or column in ("threshold", "delta", "beta"):
            row[column] = value
            continue
        known = measured if values is not None else None  # another data set's class
        row[column] = joined(value, known and [values(each) for each in known])
    if "class_mean_computed" in paper:
        for number, name in enumerate(class_names):
            if name not in paper:
                recall = _mean_of("recall", number)
                row[name] = joined(None, measured and [recall(each) for each in measured])
    return row


def _mean_of(
    what: str, class_id: int | None = None
) -> Callable[[_Measured], tuple[float, float, float]]:
    def mean(measured: _Measured) -> tuple[float, float, float]:
        values = getattr(measured, what)
        if class_id is not None:
            values = values[measured.classes == class_id]
        values = values[~np.isnan(values)]
        if not len(values):
            return (float("nan"),) * 3
        low, high = bootstrap_interval(values, resamples=_RESAMPLES)
        return tuple(100 * float(v) for v in (values.mean(), low, high))

    return mean


def _class_mean(measured: _Measured) -> tuple[float, float, float]:
    means = [np.nanmean(measured.recall[measured.classes == c]) for c in set(measured.classes)]
    return 100 * float(np.mean(means)), float("nan"), float("nan")


def _notes(id: str, config: OAAConfig, repeats: int) -> list[str]:
    notes = [
        "mIoU of the maps themselves: the image's class whose map is largest, background below a "
        "threshold chosen on the other half of the images; the thesis' mIoU is that of a "
        "segmentation network trained on labels made from such maps",
        f"{images_of(config)} training images, "
        f"{config.epochs} epochs, preset {config.preset}",
    ]  # fmt: skip
    if "recall" in numbers()[id]["rows"][0] or id == "4.13":
        notes.append(
            "recall and noise at half of each map's maximum, means over image-class pairs"
        )
    if config.data == "scenes":
        notes.insert(0, "generated pictures: split train of scenes, few objects")
    if repeats > 1:
        notes.append(f"ours: mean of {repeats} trainings [least, largest]")
    else:
        notes.append("ours: one training [95 % over images]; trainings differ by more")
    if id == "4.10":
        notes.append("30,000 steps stand for the preset's epochs, the others for their share")
    return notes
