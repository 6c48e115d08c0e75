"""The tables of chapter 3: attention maps, boxes and what they hit.

A network is run over a data set. What is measured on a picture is written to a cache file at
once, so a run that was stopped goes on where it was, and tables that share measurements share one
pass: 3.1 to 3.7 but for Score-CAM and cMWP.

Per picture and map only this is kept: its class's rank, and whether the box at each of
:data:`THRESHOLDS` is right (intersection over union of at least 0.5 with a true box). Boxes are
found at the resolution of the network's input, to which the true boxes are carried exactly; the
preset ``released`` finds them in the picture itself.

The thesis' stages S1 to S5 are those of VGG16. The deepest stage of any network is called S5,
the one before it S4, and so on; columns of stages that a network has not got stay empty.
"""

import base64
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..cam import Scaling, fuse, resize
from ..explain import (
    GradientAt,
    StageMaps,
    excitation_backprop,
    provenance,
    scorecam,
    stage_maps,
)
from ..localize import Box, Rule, View, grabcut, join_crops, mask_to_box, simonyan, sweep_boxes
from ..localize import Preset as Crops
from ..localize import views as crop_views
from ..metrics import (
    BoxConvention,
    best_ious,
    centered_boxes,
    choose_threshold,
    class_ranks,
    split_half,
    sweep_ious,
)
from ..networks import load_network
from ..probes import occlusion_table
from ..stages import Staged
from .measured import (
    FORMAT,
    STAGES,
    Item,
    Part,
    Store,
    check_class_ids,
    check_classes,
    open_items,
    run_part,
    stage_notes,
    state_hash,
    tensors,
)
from .processes import own_device
from .table import Row, Table, mean_cell, numbers

__all__ = ["METHODS", "TABLES", "THRESHOLDS", "make"]

TABLES = ("3.1", "3.2", "3.3", "3.4", "3.5", "3.6", "3.7", "3.8")

Data = Literal["scenes", "ilsvrc", "cub"]
PresetName = Literal["thesis", "released", "literature"]
ThresholdRule = Literal["auto", "fixed", "held_out"]

METHODS = {
    "gradcam": "GradCAM",
    "gradcam_pp": "GradCAM++",
    "scorecam": "ScoreCAM",
    "normgrad": "NormGrad",
    "layercam": "LayerCAM",
    "layercam_normal": "LayerCAM-normal",
    "cam": "CAM",
    "cmwp": "cMWP",
}
"""The methods that a table can compute, and their names in the thesis."""

THRESHOLDS = np.concatenate(
    [np.arange(21) / 100, np.arange(22, 61, 2) / 100, np.arange(65, 91, 5) / 100]
)
"""The shares of a map's maximum at which boxes are found: finer where the best ones lie."""

_SHARES = np.arange(8, 101, 2) / 100  # sides of the centered square; as many as thresholds
_FUSED = [STAGES[:3], STAGES[:4], STAGES]  # the settings of tables 3.2 and 3.3
_GRADIENT_METHODS = ("gradcam", "gradcam_pp", "normgrad", "layercam", "layercam_normal", "cam")
_OCCLUDERS = ("gradcam", "gradcam_pp", "layercam")


@dataclass(frozen=True)
class _Preset:
    # How a picture is shown, its boxes found and compared; attnviz.localize has the rules.
    crops: Crops
    rule: Rule
    gradient_at: GradientAt
    convention: BoxConvention
    fixed: float  # threshold, as a share of the maximum
    cut: Literal["simonyan", "grabcut", "none"]
    cut_stages: tuple[str, ...]  # of LayerCAM
    whole: bool  # boxes are found in the picture, not in the network's input


_PRESETS = {
    "thesis": _Preset(
        "resize", "component", "native", "half_open", 0.15, "simonyan", ("S1", "S2"), False
    ),
    "released": _Preset(
        "tencrop", "rect", "pool_up", "plus_one", 0.15, "grabcut", ("S1", "S2", "S3"), True
    ),
    "literature": _Preset("resize", "contour_area", "native", "plus_one", 0.20, "none", (), False),
}


# ------------------------------------------------------------------------------- what to measure


@dataclass(frozen=True)
class _Setting:
    # One map of a picture: a method in one stage, or fused over several, deepest first.
    method: str
    stages: tuple[str, ...]
    scaling: Scaling = "tanh"
    gamma: float = 2.0
    cut: bool = False

    def __str__(self) -> str:
        fused = f" {self.scaling} {self.gamma:g}" if len(self.stages) > 1 else ""
        return f"{self.method} {'+'.join(self.stages)}{fused}{' cut' if self.cut else ''}"


def _gradient_settings(stages: Sequence[str], preset: _Preset) -> list[_Setting]:
    found = [_Setting(m, (s,)) for m in _GRADIENT_METHODS if m != "cam" for s in stages]
    found += [_Setting("cam", ("S5",))]
    found += [_Setting("layercam", (s,), cut=True) for s in stages if s in preset.cut_stages]
    found += [
        _Setting("layercam", chosen, scaling, gamma)
        for chosen in _FUSED
        if set(chosen) <= set(stages)
        for scaling, gamma in [("tanh", g) for g in (1.0, 2.0, 3.0, 4.0)]
        + [(scaling, 1.0) for scaling in ("none", "sqrt", "tan")]
    ]
    for method in ("gradcam", "gradcam_pp", "normgrad", "layercam"):
        found += _cumulative(method, stages)
    return list(dict.fromkeys(found))


def _cumulative(method: str, stages: Sequence[str]) -> list[_Setting]:
    return [_Setting(method, tuple(stages[:count])) for count in range(2, len(stages) + 1)]


def _setting(
    table: str, row: Mapping[str, object], column: str, stages: Sequence[str], preset: _Preset
) -> _Setting | None:
    # The map behind a number of the thesis; None where there is no code for the method or the
    # network has no such stage.
    name = str(row.get("method", "LayerCAM")).rstrip("*")
    method = next((key for key, printed in METHODS.items() if printed == name), None)
    if method is None:
        return None
    if table in ("3.1", "3.7"):
        cut = method == "layercam" and column in preset.cut_stages
        found = _Setting(method, (column,), cut=cut)
    elif table == "3.2":
        chosen = tuple(str(row["setting"]).split("+"))
        found = _Setting(method, chosen, "tanh", float(column.removeprefix("gamma=")))
    elif table == "3.3":
        found = _Setting(method, tuple(str(row["setting"]).split("+")), column, 1.0)
    elif table == "3.4":
        count = STAGES.index(column.removeprefix("+")) + 1
        found = _Setting(method, STAGES[:count])
    elif method == "layercam":  # 3.5: the best row of 3.2; 3.6: the stages are not printed
        wanted = STAGES[: 4 if table == "3.5" else 3]
        found = _Setting(method, tuple(stage for stage in wanted if stage in stages))
    else:
        found = _Setting(method, ("S5",))
    return found if set(found.stages) <= set(stages) else None


def _views(net: Staged, size: tuple[int, int], crops: Crops) -> tuple[View, ...]:
    side = net.image_size
    side = (side, side) if isinstance(side, int) else side
    if crops == "resize":
        return (View(size, side, (0, 0), side),)
    if side[0] != side[1]:
        raise ValueError(f"expected a network of square images for ten crops, got {side}")
    return crop_views(size, crops, crop=side[0], resize=round(side[0] * 256 / 224))


# ------------------------------------------------------------------------------ measured values


def _box_part(
    name: str,
    net: Staged,
    settings: Sequence[_Setting],
    preset: _Preset,
    run: Callable[[Tensor, list[int]], StageMaps],
    facts: Mapping[str, object],
) -> Part:
    # Settings of which `run` gives the maps of all stages.
    def measure(items: Sequence[Item], pixels: Sequence[np.ndarray]) -> list[dict]:
        views = [_views(net, picture.shape[:2], preset.crops) for picture in pixels]
        maps, scores = _joined_maps(net, items, pixels, views, run)
        ranks = class_ranks(scores, [item.class_id for item in items]).tolist()
        fields = {setting: _field(setting, maps, views[0][0].resized) for setting in settings}
        records = []
        for i, item in enumerate(items):
            view, rows = views[i][0], []
            size = view.image_size if preset.whole else view.resized
            true = [box if preset.whole else view.box_to_network(box) for box in item.boxes]
            for setting in settings:
                map = fields[setting][i]
                if setting.cut:
                    shown = pixels[i] if preset.whole else view.pixels(pixels[i])
                    rows.append(_cut_ious(shown, map, true, preset))
                else:
                    boxes, positions = sweep_boxes(
                        map, THRESHOLDS, preset.rule, size=size if preset.whole else None
                    )
                    rows.append(
                        sweep_ious(boxes, positions, true, len(THRESHOLDS), preset.convention)
                    )
            rows.append(best_ious(centered_boxes(size, _SHARES), true, preset.convention))
            hits = _packed(np.stack(rows) >= 0.5)
            records.append({"rank": ranks[i], "hits": hits})
        return records

    names = (*settings, "square")
    facts = {"settings": [str(each) for each in names], **asdict(preset), **facts}
    facts |= {"thresholds": THRESHOLDS.tolist(), "shares": _SHARES.tolist()}
    return Part(name, facts, measure, names)


def _joined_maps(
    net: Staged,
    items: Sequence[Item],
    pixels: Sequence[np.ndarray],
    views: Sequence[Sequence[View]],
    run: Callable[[Tensor, list[int]], StageMaps],
    chunk: int = 16,
) -> tuple[dict[str, list[Tensor]], Tensor]:
    # The raw maps (b, h, w) of each method and stage, and scores summed over crops.
    shown = [view.pixels(picture) for picture, each in zip(pixels, views, strict=True)
             for view in each]  # fmt: skip
    ids = [item.class_id for item, each in zip(items, views, strict=True) for _ in each]
    found = [
        run(tensors(net, shown[start : start + chunk]), ids[start : start + chunk])
        for start in range(0, len(shown), chunk)
    ]
    scores = torch.cat([part.scores for part in found]).float().cpu()
    scores = scores.unflatten(0, (len(items), -1)).sum(dim=1)
    maps = {
        method: [torch.cat([part[method][k] for part in found]).float().cpu()
                 for k in range(len(found[0].stages))]
        for method in found[0]
    }  # fmt: skip
    count = len(views[0])
    if count == 1:
        return maps, scores
    return {
        method: [
            torch.stack([
                join_crops(stage[i * count : (i + 1) * count], each)
                for i, each in enumerate(views)
            ])
            for stage in per_stage
        ]
        for method, per_stage in maps.items()
    }, scores  # fmt: skip


def _field(setting: _Setting, maps: Mapping[str, list[Tensor]], size: tuple[int, int]) -> Tensor:
    # The map of a setting for every picture, at the size of the network's input.
    chosen = [maps[setting.method][-1 - STAGES.index(stage)] for stage in setting.stages]
    if len(chosen) == 1:
        return resize(chosen[0], size)
    return fuse(chosen[::-1], setting.gamma, size, scaling=setting.scaling)


def _cut_ious(pixels: np.ndarray, map: Tensor, true: Sequence[Box], preset: _Preset) -> np.ndarray:
    # One box, which counts at every threshold.
    map = resize(map, pixels.shape[:2])
    mask = simonyan(pixels, map) if preset.cut == "simonyan" else grabcut(pixels, map)
    iou = best_ious([mask_to_box(mask, preset.rule)], true, preset.convention)
    return iou.repeat(len(THRESHOLDS))


def _occlusion_part(net: Staged) -> Part:
    # The network's answers to each picture, as it is and covered where a map is strong.
    deepest = [len(net.stage_names)]

    def measure(items: Sequence[Item], pixels: Sequence[np.ndarray]) -> list[dict]:
        views = [_views(net, picture.shape[:2], "resize")[0] for picture in pixels]
        images = tensors(net, [v.pixels(p) for v, p in zip(views, pixels, strict=True)])
        ids = [item.class_id for item in items]
        maps = stage_maps(net, images, ids, _OCCLUDERS, stages=deepest)
        records: list[dict] = [{} for _ in items]
        for method in _OCCLUDERS:
            table = occlusion_table(net, images, ids, maps[method][0])
            for record, row in zip(records, table.to_dict("records"), strict=True):
                record["original"] = [row["rank"], row["confidence"], 0.0]
                record[METHODS[method]] = [
                    row["rank_covered"], row["confidence_covered"], row["area"]
                ]  # fmt: skip
        return records

    return Part("occlusion", {"threshold": 0.7, "fill": "mean"}, measure)


def _packed(hits: np.ndarray) -> str:
    return base64.b64encode(np.packbits(hits)).decode()


def _unpacked(text: str, rows: int) -> np.ndarray:
    count = rows * len(THRESHOLDS)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count)
    return bits.reshape(rows, -1).astype(bool)


# ------------------------------------------------------------------------------ from hits to rows


@dataclass(frozen=True)
class _Hits:
    # What all boxes of all pictures are worth: one row of hits per picture for each setting.
    hits: dict[_Setting | str, np.ndarray]
    ranks: np.ndarray
    image_ids: list[str]
    fixed: float

    def right(self, setting: _Setting | str, rule: ThresholdRule) -> np.ndarray:
        """Whether each picture's box is right, by a rule for the threshold."""
        hits = self.hits[setting]
        if rule == "fixed":
            return hits[:, int(np.abs(THRESHOLDS - self.fixed).argmin())]
        return hits[np.arange(len(hits)), self.chosen(setting)]

    def chosen(self, setting: _Setting | str) -> np.ndarray:
        """The threshold of each picture: the best one of the half that it is not in."""
        if not self.divided:
            raise ValueError(
                f"expected pictures in both halves to choose thresholds on, got "
                f"{len(self.image_ids)} in one; use more images or the fixed threshold"
            )
        half, hits = split_half(self.image_ids), self.hits[setting].astype(np.float64)
        return np.where(half, choose_threshold(hits[~half]), choose_threshold(hits[half]))

    @property
    def divided(self) -> bool:
        """Whether there are pictures in both halves."""
        half = split_half(self.image_ids)
        return bool(half.any() and not half.all())

    def counted(self, setting: _Setting | str, metric: str, rule: ThresholdRule) -> np.ndarray:
        """Which pictures count as right by ``loc1``, ``loc5`` or ``gt_known``."""
        most = {"loc1": 1, "loc5": 5}.get(metric)
        right = self.right(setting, rule)
        return right if most is None else right & (self.ranks < most)


def _box_rows(
    table: str,
    paper: Sequence[Mapping[str, object]],
    measured: _Hits,
    stages: Sequence[str],
    preset: _Preset,
    rule: ThresholdRule,
) -> tuple[list[Row], list[Row]]:
    # The rows of the thesis with our numbers, and those that it does not have.
    label = "method" if "method" in paper[0] else "setting"
    columns = [name for name in paper[0] if name not in (label, "metric")]
    by_row = "metric" in paper[0]  # else loc1 and loc5 are columns

    def find(row: Mapping[str, object], column: str, cut: bool = True) -> _Setting | None:
        setting = _setting(table, row, column, stages, preset)
        if setting is not None and not cut:
            setting = replace(setting, cut=False)
        return setting if setting in measured.hits else None

    def counted(
        row: Mapping[str, object], rule: ThresholdRule, metric: str = "", cut: bool = True
    ) -> Row:
        cells = {}
        for column in columns:
            setting = find(row, column, cut)
            name = metric or str(row["metric"] if by_row else column)
            values = None if setting is None else measured.counted(setting, name, rule)
            cells[column] = mean_cell(None, values)
        return cells

    def single(row: Mapping[str, object], value: Callable[[_Setting], float | None]) -> Row:
        found = {column: find(row, column) for column in columns}
        return {
            column: mean_cell(None) | {"ours": None if setting is None else value(setting)}
            for column, setting in found.items()
        }

    def best(setting: _Setting) -> float:
        return round(100 * float(measured.hits[setting].mean(axis=0).max()), 2)

    def chosen(setting: _Setting) -> float | None:
        if setting.cut:
            return None
        return round(100 * float(THRESHOLDS[measured.chosen(setting)].mean()), 2)

    def named(row: Mapping[str, object], text: str) -> Row:
        if by_row:
            return {label: row[label], "metric": text}
        return {label: f"{row[label]}, {text}"}

    rows, extra = [], []
    other: ThresholdRule = "held_out" if rule == "fixed" else "fixed"
    word = f"fixed {100 * measured.fixed:g} %" if other == "fixed" else "held out"
    for row in paper:
        ours = counted(row, rule)
        words = {name: row[name] for name in row if name not in columns}
        rows.append(words | {c: ours[c] | {"paper": row[c]} for c in columns})
        settings = [setting for column in columns if (setting := find(row, column))]
        if not settings:
            continue
        if other == "fixed" or measured.divided:
            text = f"{row['metric']}, {word}" if by_row else word
            extra.append(named(row, text) | counted(row, other))
        if any(setting.cut for setting in settings):
            words = {label: f"{row[label]} without graph cut", "metric": row["metric"]}
            extra.append(words | counted(row, rule, cut=False))
        if row.get("metric", "loc5") == "loc5":
            extra.append(named(row, "gt_known") | counted(row, rule, "gt_known"))
            extra.append(named(row, "MaxBoxAcc") | single(row, best))
            if measured.divided:
                extra.append(named(row, "threshold, held out") | single(row, chosen))
    return rows, extra


def _occlusion_rows(
    paper: Sequence[Mapping[str, object]], records: Mapping[str, dict]
) -> tuple[list[Row], list[Row]]:
    names = [name for name in paper[0] if name != "metric"]
    values = {name: np.array([record[name] for record in records.values()]) for name in names}
    right = values["original"][:, 0] == 0
    kept = {  # pictures that were classified wrong are not covered
        name: np.where(right[:, None], found, values["original"]) for name, found in values.items()
    }
    measures = {
        "Top1 Acc": lambda v: v[:, 0] < 1,
        "Top5 Acc": lambda v: v[:, 0] < 5,
        "Confidence": lambda v: v[:, 1],
    }
    rows, extra = [], []
    for row in paper:
        measure = measures[str(row["metric"])]
        rows.append({"metric": row["metric"]} | {
            name: mean_cell(row[name], measure(kept[name])) for name in names
        })  # fmt: skip
        extra.append({"metric": f"{row['metric']} of those classified right"} | {
            name: mean_cell(None, measure(values[name][right])) for name in names
        })  # fmt: skip
    extra.append({"metric": "covered area"} | {
        name: mean_cell(None, values[name][right, 2]) for name in names
    })  # fmt: skip
    return rows, extra


# ------------------------------------------------------------------------------------ the tables


def make(
    id: str,
    *,
    data: Data,
    network: str | Staged | None,
    weights: str | Path,
    root: Path,
    limit: int | None,
    seed: int,
    device: str | torch.device,
    cache: Path,
    progress: bool,
    preset: PresetName = "thesis",
    threshold: ThresholdRule = "auto",
    gradient_at: GradientAt | None = None,
    methods: Sequence[str] | None = None,
    channels: int | None = 64,
    batch: int = 8,
) -> Table:
    """Makes one table of chapter 3; see :func:`attnviz.tables.make_table`."""
    _check(id, data, preset, threshold, gradient_at, methods, channels, batch)
    items, notes = open_items(data, root, limit, seed, progress)  # before weights are downloaded
    if network is None:
        network = "scenes_fc" if data == "scenes" else "vgg16"
    net = network
    if not isinstance(net, Staged):
        net = load_network(network, weights, data=root, device=own_device(device))
    check_classes(net, data)
    check_class_ids(net, items, data)
    choices = _PRESETS[preset]
    if gradient_at is not None:
        choices = replace(choices, gradient_at=gradient_at)
    stages = STAGES[: len(net.stage_names)]
    parts = _parts(id, net, stages, choices, methods, channels, batch)
    common = {
        "format": FORMAT, "attnviz": __version__, "network": net.name,
        "weights": state_hash(net), "stages": list(net.stage_names), "data": data,
        "seed": seed if data == "scenes" else None, "batch": batch,
        "image_size": net.image_size, "mean": net.mean, "std": net.std,
    }  # fmt: skip
    found, unread = {}, {}
    for part in parts:
        facts = common | part.facts
        store = Store(cache, f"{part.name}-{net.name}-{data}", facts)
        found[part.name], failed = run_part(part, items, store, batch, progress)
        unread |= dict.fromkeys(failed)
    ids = [item.image_id for item in items if item.image_id not in unread]
    if not ids:
        raise ValueError(f"expected pictures that can be read, got none of {len(items)}")
    if unread:
        shown = ", ".join(list(unread)[:5])
        notes.append(f"{len(unread)} pictures could not be read and are left out: {shown}")
    paper = numbers()[id]["rows"]
    if id == "3.8":
        rows, extra = _occlusion_rows(paper, {i: found["occlusion"][i] for i in ids})
        notes += _occlusion_notes()
    else:
        fixed = 0.05 if id == "3.6" else choices.fixed
        measured = _collect(parts, found, ids, fixed, METHODS if methods is None else methods)
        rule = threshold
        if rule == "auto":
            rule = "fixed" if net.name == "vgg16" else "held_out"
        rows, extra = _box_rows(id, paper, measured, stages, choices, rule)
        notes += _box_notes(id, measured, rule, choices, preset, methods, channels)
    notes += stage_notes(net, stages, id)
    return Table(
        id=id, title=numbers()[id]["title"], data=data, network=net.name, preset=preset,
        seed=seed, versions=dict(provenance(net)["versions"]), n=len(ids), rows=rows,
        extra=extra, notes=notes, weights=dict(net.provenance),
    )  # fmt: skip


def _parts(
    id: str,
    net: Staged,
    stages: Sequence[str],
    preset: _Preset,
    methods: Sequence[str] | None,
    channels: int | None,
    batch: int,
) -> list[Part]:
    # The passes that a table needs. Numbers of stages count from the shallowest.
    if id == "3.8":
        return [_occlusion_part(net)]
    count = len(net.stage_names)
    numbers = list(range(count - len(stages) + 1, count + 1))

    def gradients(images: Tensor, ids: list[int]) -> StageMaps:
        return stage_maps(
            net, images, ids, _GRADIENT_METHODS, stages=numbers, gradient_at=preset.gradient_at
        )

    parts = [_box_part("maps", net, _gradient_settings(stages, preset), preset, gradients, {})]
    wanted = set(METHODS if methods is None else methods)
    if id in ("3.1", "3.4") and "scorecam" in wanted:

        def masked(images: Tensor, ids: list[int]) -> StageMaps:
            return scorecam(
                net, images, ids, stages=numbers, channels=channels, batch_size=4 * batch
            )

        settings = [_Setting("scorecam", (stage,)) for stage in stages]
        settings += _cumulative("scorecam", stages)
        facts = {"channels": channels, "form": "released"}
        parts.append(_box_part("scorecam", net, settings, preset, masked, facts))
    if id == "3.5" and "cmwp" in wanted:

        def excited(images: Tensor, ids: list[int]) -> StageMaps:
            return excitation_backprop(net, images, ids, stages=[count])

        settings = [_Setting("cmwp", ("S5",))]
        parts.append(_box_part("cmwp", net, settings, preset, excited, {}))
    return parts


def _collect(
    parts: Sequence[Part],
    found: Mapping[str, Mapping[str, dict]],
    ids: list[str],
    fixed: float,
    wanted: Collection[str],
) -> _Hits:
    hits: dict[_Setting | str, np.ndarray] = {}
    for part in parts:
        names = part.settings
        stack = np.stack([_unpacked(found[part.name][i]["hits"], len(names)) for i in ids])
        hits |= {
            name: stack[:, k]
            for k, name in enumerate(names)
            if isinstance(name, str) or name.method in wanted
        }
    ranks = np.array([found[parts[0].name][i]["rank"] for i in ids])
    return _Hits(hits, ranks, ids, fixed)


# ----------------------------------------------------------------------------------------- notes


def _share(values: np.ndarray) -> str:
    cell = mean_cell(None, values)
    return f"{cell['ours']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"


def _box_notes(
    id: str,
    measured: _Hits,
    rule: ThresholdRule,
    preset: _Preset,
    preset_name: str,
    methods: Sequence[str] | None,
    channels: int | None,
) -> list[str]:
    shown = {
        "fixed": f"ours: the fixed threshold of {100 * measured.fixed:g} % of the maximum",
        "held_out": "ours: for each picture the threshold (one for each map) that is best, by "
        "the box alone, on the half of the pictures that it is not in",
    }[rule]
    notes = [
        f"preset {preset_name}: picture shown by {preset.crops}, gradient {preset.gradient_at}, "
        f"boxes by {preset.rule}"
    ]
    notes.append(
        f"{shown}; the other rule is in the extra rows, with MaxBoxAcc, which is optimistic"
    )
    square = measured.hits["square"]
    notes.append(
        "without any network, by the box alone (gt_known): the full picture "
        f"{_share(square[:, -1])}"
        + (
            f", the best centered square {_share(measured.right('square', 'held_out'))} "
            "(its side held out)"
            if measured.divided
            else ""
        )
        + f"; the full picture with this network's classes: loc1 "
        f"{_share(square[:, -1] & (measured.ranks < 1))}"
    )
    notes.append(
        f"classification: top-1 {_share(measured.ranks < 1)}, top-5 {_share(measured.ranks < 5)}"
    )
    if id in ("3.1", "3.7") and preset.cut_stages:
        notes.append(
            f"LayerCAM in {', '.join(preset.cut_stages)} takes a graph cut ({preset.cut}, preset "
            f"{preset_name}), which no other method gets and no threshold changes; without it in "
            "the extra rows"
        )
    wanted = set(METHODS if methods is None else methods)
    if id in ("3.1", "3.4"):
        notes.append(
            f"Score-CAM: the {channels} channels of highest variance of each stage"
            if "scorecam" in wanted and channels is not None
            else "Score-CAM: all channels"
            if "scorecam" in wanted
            else "Score-CAM was not computed"
        )
    if id in ("3.5", "3.6"):
        notes.append(
            "rows without ours are numbers of other networks, trained for localization, as the "
            "thesis quotes them; CAM is exact only where global average pooling and one linear "
            "layer follow the deepest stage"
        )
    if id == "3.6":
        notes.append("the thesis does not print the fused stages: S5, S4 and S3 are taken")
    return notes


def _occlusion_notes() -> list[str]:
    return [
        "covered where the map of the deepest stage reaches 70 % of its maximum, with the mean "
        "color; the thesis does not say with what",
        "only pictures that are classified right are covered; the rows are shares of all "
        "pictures, the extra rows of those classified right",
        "lower is better, but a map that covers more lowers more: compare the covered area",
    ]


# ---------------------------------------------------------------------------------------- checks


def _check(
    id: str,
    data: str,
    preset: str,
    threshold: str,
    gradient_at: str | None,
    methods: Sequence[str] | None,
    channels: int | None,
    batch: int,
) -> None:
    for name, value, choices in (
        ("data", data, get_args(Data)),
        ("preset", preset, get_args(PresetName)),
        ("threshold", threshold, get_args(ThresholdRule)),
        ("gradient_at", gradient_at, (None, *get_args(GradientAt))),
        *(("methods", method, tuple(METHODS)) for method in methods or ()),
    ):
        if value not in choices:
            raise ValueError(f"expected `{name}` in {choices}, got {value!r}")
    for name, value in (("channels", channels), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"expected `{name}` of at least 1, got {value}")
    if id == "3.6" and data == "ilsvrc":
        raise ValueError("expected `data` in ('cub', 'scenes') for table 3.6, got 'ilsvrc'")
