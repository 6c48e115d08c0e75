"""The tables of segmentation: maps of a classifier become labels, labels a network, it masks.

A row is made in steps that all stay in the cache: trainings (:mod:`.sources`), pseudo labels,
picture by picture, a segmentation network trained on them, and its scores on pictures that were
never learned from. A stopped table goes on; rows and tables share what they have in common.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.masks import read_label_picture
from ..deeplab import SEGMENTATION_NETWORKS, load_segmentation
from ..files import write_whole
from ..metrics import confusion_matrix, mean_iou
from ..segment import (
    LabelConfig,
    evaluate,
    fused_maps,
    label_file,
    memory_maps,
    network_maps,
    run_network,
    write_labels,
)
from ..segment.pseudo import LabelRule
from ..training import OAAConfig, SegmentConfig, segment_config, train_segment
from ..training.oaa import Preset, opened
from ..training.pictures import Pictures, open_pictures
from ..training.runs import json_bytes
from .processes import own_device
from .sources import (
    Source,
    cache_for,
    config_of,
    finished,
    folder_of,
    images_of,
    joined,
    repeated,
    result,
    trained,
    trained_table,
)
from .table import Row, Table, numbers

__all__ = ["TABLES", "Plan", "make", "segmented_rows"]

TABLES = ("3.11", "3.12", "3.13", "4.1", "4.2", "4.3", "4.4", "4.7", "4.12")

_WORDS = ("no", "method", "setting", "stages", "supervision", "threshold", "delta", "beta",
          "iters")  # fmt: skip
_WHOLE = ("val", "test", "miou", "mean", "LargeFOV", "DeepLabv2")
_MULTI = ("4.1", "4.2", "4.3", "4.4", "4.12")  # tested at several sizes; the others at one
_REFINED = (*_MULTI, "3.11", "3.12")  # the rows show what the dense CRF gives, extra the others
_DEFAULT = {"scenes": "scenes", "vgg16": "largefov_vgg16", "resnet50": "largefov_resnet50",
            "resnet101": "largefov_resnet101"}  # fmt: skip
_DEEPLABV2 = {"scenes": "scenes_aspp", "resnet101": "aspp_resnet101"}
_VARIANTS = {
    "OAA": (False, False), "OAA+": (False, True), "OAA++": (True, False), "OAA+++": (True, True),
}  # fmt: skip


# ------------------------------------------------------------------------------ what is compared


@dataclass(frozen=True)
class Plan:
    """What a segmentation network learns from."""

    source: Source | None
    """Of pseudo labels; None: there are none."""
    network: str
    """See :data:`attnviz.deeplab.SEGMENTATION_NETWORKS`."""
    share: float = 1.0
    """Share of the pictures that are learned from."""
    true: float = 0.0
    """Share of the pictures that have their true masks."""


Plans = Mapping[tuple[int, str], Plan]
"""Plans by row and column; column ``""`` is all of a row."""


def _plans(id: str, config: OAAConfig, network: str, deep: str | None) -> Plans:
    # What stands behind each cell of the thesis, by row and column; other papers' have none.
    def learned(drop: bool, integral: bool) -> Source:
        oaa = OAAConfig(**asdict(config) | {"drop": "image" if drop else "none"})
        return Source(oaa, {"loss": "hybrid"} if integral else None,
                      "final" if integral else "accumulated")  # fmt: skip

    def stages(method: str, *numbers: int) -> Source:
        return Source(config, maps="final", method=method, stages=numbers)

    rows = numbers()[id]["rows"]
    plans: dict[tuple[int, str], Plan] = {}
    if id == "3.11":
        own = 3 if config.network.startswith("resnet") else 2
        chosen = {0: stages("gradcam", -1), 1: stages("gradcam_pp", -1),
                  own: stages("layercam", -1, -2, -3, -4)}  # fmt: skip
        return {(place, ""): Plan(source, network) for place, source in chosen.items()}
    if id == "3.12":
        for place, row in enumerate(rows):
            names = [int(name[1:]) - 6 for name in row["stages"].split("+")]  # S5 is the last
            plans[place, ""] = Plan(stages("layercam", *names), network)
        return plans
    if id == "3.13":
        chosen = (stages("cam", -1), stages("layercam", -1, -2, -3, -4))
        return {(place, ""): Plan(source, network) for place, source in enumerate(chosen)}
    if id == "4.7":
        for place, row in enumerate(rows):
            counts = {
                kind: int(number) / 10_582
                for number, kind in re.findall(r"(\d+) (\w+)", row["setting"])
            }
            weak, true = counts.get("weak", 0.0), counts.get("pixel", 0.0)
            source = learned(False, True) if weak else None
            plans[place, ""] = Plan(source, network, weak + true, true if weak else 0.0)
        return plans
    names = {"LargeFOV": network, "DeepLabv2": deep} if id == "4.12" else {"": network}
    for place, row in enumerate(rows):
        source = learned(*_VARIANTS[row["method"]]) if row["method"] in _VARIANTS else None
        if source is None and not row["method"].startswith("upper bound"):
            continue
        for column, name in names.items():
            if name is not None:
                plans[place, column] = Plan(source, name)
    return plans


# ------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class _Maker:
    # Makes what plans name, and remembers it in the cache.
    cache: Path
    root: Path | None
    label: LabelConfig
    changes: Mapping[str, object]  # of the segmentation's config
    multi: bool
    tested: bool  # whether a third part of the data is measured as well
    seeds: bool  # whether labels are all that is made
    workers: int
    progress: bool

    def labels(self, source: Source) -> tuple[Path, dict[str, float]] | None:
        """Returns a folder of pseudo labels, and how good they are; None without such stages."""
        run, integral = trained(source, self.cache, self.root, self.progress)
        facts = [source.maps, source.method, list(source.stages), str(integral and integral.name)]
        folder = folder_of(self.cache, self.label, run=run.name, maps=facts)
        quality = result(
            folder / "quality.json", lambda: self._write(source, run, integral, folder),
            self.progress,
        )  # fmt: skip
        return None if quality is None else (folder, quality)

    def _write(self, source: Source, run: Path, integral: Path | None, folder: Path) -> None:
        # The labels and, last, how good they are; nothing where the network lacks a stage.
        pictures = opened(source.oaa, "train", self.root, False)
        items = [pictures.item(i) for i in range(len(pictures))]
        if source.maps == "accumulated":
            maps_of = memory_maps(run)
        elif source.method is None:
            maps_of = network_maps(integral or run)
        else:
            net = run_network(integral or run)
            depth = len(net.stage_names)
            chosen = [n + 1 + depth for n in source.stages]
            if min(chosen) < 1:
                return
            maps_of = fused_maps(net, source.method, chosen)
        write_labels(items, maps_of, folder, self.label, workers=self.workers,
                     progress=self.progress)  # fmt: skip
        quality = _quality(pictures, folder, self.progress)
        write_whole(folder / "quality.json", json_bytes(quality))

    def scores(self, plan: Plan, config: OAAConfig) -> dict[str, object] | None:
        """Trains a plan's network; returns its scores by split, None where it has no maps."""
        labels, quality = "true", None
        if plan.source is not None:
            made = self.labels(plan.source)
            if made is None:
                return None
            labels, quality = str(made[0]), made[1]
        if self.seeds:
            return {"labels": quality, "validation": None, "test": None}
        total = len(opened(config, "train", self.root, False))
        changes = {
            **self.changes,
            "labels": labels,
            "network": plan.network,
            "data": config.data,
            "seed": config.seed,
            "images": config.images,
            "objects": config.objects,
        }
        if plan.share < 0.999 or config.limit is not None:
            changes["limit"] = max(2, round(total * min(1.0, plan.share)))
        if plan.true:
            changes["true_count"] = round(total * plan.true)
        preset = "small" if plan.network.startswith("scenes") else "thesis"
        second = segment_config(preset, **changes)
        run = folder_of(self.cache, replace(second, labels=Path(labels).name))
        metrics = finished(train_segment, second, run, self.root, self.progress)
        found: dict[str, object] = {"labels": quality, "test": None}
        if not self.multi:  # the training has measured these
            found["validation"] = metrics.get("validation")
        wanted = [split for split in ("validation", "test") if split not in found]
        for split in wanted + ["test"] * self.tested:
            stored = run / f"scores-{split}-{'multi' if self.multi else 'single'}.json"
            make = partial(self._evaluate, second, split, stored)
            found[split] = result(stored, make, self.progress)
        return found

    def _evaluate(self, config: SegmentConfig, split: str, stored: Path) -> None:
        pictures = open_pictures(
            config.data, split, size=config.size, count=config.validation_images,
            limit=config.validation_images, seed=config.seed, objects=config.objects,
            root=self.root,
        )  # fmt: skip
        if pictures is None:
            return
        items = [*map(pictures.item, range(len(pictures)))]
        test = "multi" if self.multi else "single"
        network = load_segmentation(stored.with_name("network.safetensors"))
        network.to(own_device("cuda" if config.device == "cuda" else "cpu"))
        scores = evaluate(network, items, test, workers=self.workers, progress=self.progress)
        write_whole(stored, json_bytes(scores.to_json()))


def _quality(pictures: Pictures, folder: Path, progress: bool) -> dict[str, float]:
    # Of the pseudo labels: mean IoU with the true masks where they label, and the share they do.
    count = 1 + len(pictures.class_names)
    total, labeled, known = torch.zeros(count, count, dtype=torch.long), 0, 0
    bar = tqdm(range(len(pictures)), "labels and masks", unit="image", delay=2,
               disable=not progress)  # fmt: skip
    for i in bar:
        item = pictures.item(i)
        path = label_file(folder, item.image_id)
        truth = item.read_mask() if path.is_file() and hasattr(item, "read_mask") else None
        if truth is None:
            continue
        found = read_label_picture(path)
        known += int((truth != 255).sum())
        both = (truth != 255) & (found != 255)
        labeled += int(both.sum())
        total += confusion_matrix(torch.from_numpy(found[both]), torch.from_numpy(truth[both]),
                                  count)  # fmt: skip
    return {"miou": float(mean_iou(total)), "labeled": labeled / max(known, 1)}


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
    rule: LabelRule | None = None,
    segment_epochs: int | None = None,
    workers: int = 0,
) -> Table:
    """Makes one table of segmentation; see :func:`attnviz.tables.make_table`."""
    usual = {"4.2": "resnet101", "4.12": "resnet101"}.get(id, "vgg16")
    network = network or ("scenes" if data == "scenes" else usual)
    config = config_of(
        id, data, network, preset, device=device, limit=limit, epochs=epochs, weights=str(weights)
    )
    found = segmented_rows(
        id, partial(_plans, id), config, root=root, seed=seed, cache=cache, progress=progress,
        repeats=repeats, rule=rule, segment_epochs=segment_epochs, workers=workers,
    )  # fmt: skip
    return trained_table(id, config, seed, *found)


def segmented_rows(
    id: str,
    plans_of: Callable[[OAAConfig, str, str | None], Plans],
    config: OAAConfig,
    *,
    root: Path,
    seed: int,
    cache: Path,
    progress: bool,
    repeats: int,
    rule: LabelRule | None,
    segment_epochs: int | None,
    workers: int,
) -> tuple[int, list[Row], list[Row], list[str]]:
    """Trains and measures the networks behind a table's cells.

    Args:
        id: Number of the table.
        plans_of: Gives the plans for a config and the names of two segmentation networks, the
            second one None where there is none.
        config: The classifier's training.
        root: The data root.
        seed: The first training's.
        cache: Where everything stays.
        progress: Whether to show bars.
        repeats: Trainings of each row.
        rule: What background is in pseudo labels; the thesis' in that chapter if None.
        segment_epochs: Of a segmentation; those of its preset if None.
        workers: Processes for pseudo labels and dense CRFs; 0: none beside this one.

    Returns:
        On how many pictures scores are measured, rows, extra rows and notes.
    """
    if config.data not in ("scenes", "voc2012", "coco"):
        raise ValueError(
            f"expected `data` with masks of several classes for table {id}, got {config.data!r}; "
            "take scenes, voc2012 or coco"
        )
    rule = rule or ("superpixels" if id in ("3.11", "3.12") else "saliency")
    label = LabelConfig(
        rule=rule, superpixels="slic" if rule == "superpixels" else None,
        count=100 if config.data == "scenes" else 1000,  # about as many pixels in each
    )  # fmt: skip
    changes: dict[str, object] = {"device": config.device}
    if config.limit is not None:
        changes["validation_images"] = min(300, config.limit)
    if segment_epochs is not None:
        changes["epochs"] = segment_epochs
    if Path(config.weights).is_file():
        changes["weights"] = config.weights
    name = _DEFAULT.get(config.network, config.network)
    if name not in SEGMENTATION_NETWORKS:
        raise ValueError(
            f"expected `network` in {(*_DEFAULT, 'squeezenet1_1', 'mobilenet_v2')}, "
            f"got {config.network!r}"
        )
    deep = _DEEPLABV2.get(config.network)
    tested = id == "4.4" or "test" in numbers()[id]["rows"][0]
    folder = cache_for(cache, config, root)
    maker = _Maker(
        folder, root, label, changes, id in _MULTI, tested, id == "3.13", workers, progress
    )
    made = repeated(
        replace(config, seed=seed), repeats,
        lambda again: {
            place: partial(maker.scores, plan, again)
            for place, plan in plans_of(again, name, deep).items()
        },
        progress,
    )  # fmt: skip
    found = {
        place: some
        for place, each in made.items()
        if (some := [scores for scores in each if scores is not None])
    }
    rows, extra = _rows(id, found)
    part = "test" if id == "4.4" else "validation"
    some = next(iter(found.values()))[0][part] if found else None
    count = len(opened(config, "train", root, False)) if some is None else some["images"]
    return count, rows, extra, _notes(id, config, rule, repeats)


def _rows(id: str, found: Mapping[tuple[int, str], list[dict]]) -> tuple[list[Row], list[Row]]:
    shown, other = ("crf", "plain") if id in _REFINED else ("plain", "crf")
    name = {"crf": "with dense CRF", "plain": "without dense CRF"}[other]
    rows, extra = [], []
    classes: dict[str, None] = {}
    if "background" in numbers()[id]["rows"][0]:  # a column for each class of other data
        some = (scores["validation"]["plain"]["classes"] for each in found.values()
                for scores in each if scores["validation"])  # fmt: skip
        classes = dict.fromkeys(name for names in some for name in names)
    for place, printed in enumerate(numbers()[id]["rows"]):
        paper = {**printed, **{name: None for name in classes if name not in printed}}
        mine = {column: each for (number, column), each in found.items() if number == place}
        words = [key for key in paper if key in _WORDS]
        word = next((key for key in words if isinstance(paper[key], str)), words[0])
        rows.append(_row(id, paper, mine, shown))
        if not mine:
            continue
        unprinted = {k: v if k in _WORDS else None for k, v in paper.items()}
        first = next(iter(mine.values()))[0]
        if first["validation"] is not None or first["test"] is not None:
            extra.append(_row(id, unprinted | {word: f"{paper[word]}, {name}"}, mine, other))
        if first["labels"] is not None:
            named = unprinted | {word: f"{paper[word]}, its labels"}
            extra.append(_row(id, named, mine, "labels"))
    return rows, extra


def _row(id: str, paper: Mapping[str, object], found: Mapping[str, list[dict]], kind: str) -> Row:
    row: Row = {}
    for column, value in paper.items():
        if column in _WORDS:
            row[column] = value
            continue
        each = found.get(column, found.get("")) or []
        split = "test" if column == "test" or id == "4.4" else "validation"
        row[column] = joined(value, [_value(scores, split, kind, column) for scores in each])
    return row


def _value(
    scores: Mapping[str, object], split: str, kind: str, column: str
) -> tuple[float, float, float]:
    unknown = (float("nan"),) * 3
    whole = column in _WHOLE
    if kind == "labels":
        return (100 * scores["labels"]["miou"], *unknown[1:]) if whole else unknown
    if scores[split] is None:
        return unknown
    found = scores[split][kind]
    if whole:
        return tuple(100 * found[part] for part in ("mean_iou", "low", "high"))
    iou = found["classes"].get(column)
    return unknown if iou is None else (100 * iou, *unknown[1:])


def _notes(id: str, config: OAAConfig, rule: str, repeats: int) -> list[str]:
    notes = [
        f"pseudo labels by the rule {rule!r}; `extra` has their own mIoU on the training pictures",
        "tested at " + ("five sizes" if id in _MULTI else "one size")
        + ", rows " + ("with" if id in _REFINED else "without") + " dense CRF, `extra` the other",
        f"{images_of(config)} training images, classifier of {config.epochs} epochs, preset "
        f"{config.preset}",
        "rows without ours are of other papers, as the thesis quotes them",
    ]  # fmt: skip
    if id == "3.13":
        notes[1] = (
            "rows are quoted: a method of other authors; `extra` has the seeds that it would be "
            "given, of the training pictures, scored where they label"
        )
    if config.data == "scenes":
        notes.insert(0, "generated pictures: splits train and val of scenes, few objects")
    if "test" in numbers()[id]["rows"][0] or id == "4.4":
        notes.append("the masks of VOC's test part are not public: "
                     "attnviz.segment.write_submission writes what its server takes")  # fmt: skip
    if repeats > 1:
        notes.append(f"ours: mean of {repeats} trainings [least, largest]")
    else:
        notes.append("ours: one training [95 % over images]; trainings differ by more")
    return notes
