"""The tables of the thesis: the numbers it printed beside those of a network and data at hand.

:func:`make_table` runs a network over a data set and returns a :class:`Table`. What is measured
on a picture is written to a cache file at once, so a run that was stopped goes on where it was,
and tables that share measurements share one pass: 3.1 to 3.7 but for Score-CAM and cMWP.

Per picture and map only this is kept: its class's rank, and whether the box at each of
:data:`THRESHOLDS` is right (intersection over union of at least 0.5 with a true box). Boxes are
found at the resolution of the network's input, to which the true boxes are carried exactly; the
preset ``released`` finds them in the picture itself.

The thesis' stages S1 to S5 are those of VGG16. The deepest stage of any network is called S5,
the one before it S4, and so on; columns of stages that a network has not got stay empty.
"""

import base64
import hashlib
import html
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import cache as cached
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import __version__
from .cam import Scaling, fuse, resize
from .data.cub import load_cub
from .data.folder import LabeledImage
from .data.imagenet import load_imagenet
from .data.scenes import CLASS_NAMES, draw_scene
from .explain import (
    GradientAt,
    StageMaps,
    excitation_backprop,
    provenance,
    scorecam,
    stage_maps,
)
from .localize import Box, Rule, View, grabcut, join_crops, mask_to_box, simonyan, sweep_boxes
from .localize import Preset as Crops
from .localize import views as crop_views
from .metrics import (
    BoxConvention,
    best_ious,
    bootstrap_interval,
    centered_boxes,
    choose_threshold,
    class_ranks,
    split_half,
    sweep_ious,
)
from .networks import data_root as find_data_root
from .networks import load_network
from .probes import occlusion_table
from .stages import Staged

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["METHODS", "THRESHOLDS", "Table", "make_table", "table_names"]

Data = Literal["scenes", "ilsvrc", "cub"]
PresetName = Literal["thesis", "released", "literature"]
ThresholdRule = Literal["auto", "fixed", "held_out"]
Row = dict[str, object]

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
_STAGES = ("S5", "S4", "S3", "S2", "S1")
_FUSED = [_STAGES[:3], _STAGES[:4], _STAGES]  # the settings of tables 3.2 and 3.3
_GRADIENT_METHODS = ("gradcam", "gradcam_pp", "normgrad", "layercam", "layercam_normal", "cam")
_OCCLUDERS = ("gradcam", "gradcam_pp", "layercam")
_FORMAT = 1  # of the cache files; another number when the same settings give other values
_CLASS_COUNTS = {"scenes": len(CLASS_NAMES), "ilsvrc": 1000, "cub": 200}


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


# --------------------------------------------------------------------------------- the result


@dataclass(frozen=True, eq=False)
class Table:
    """One table of the thesis, its numbers beside ours."""

    id: str
    """Number of the table, such as ``3.1``."""
    title: str
    """What it shows."""
    data: str
    """Name of the data set."""
    network: str
    """Name of the network."""
    preset: str
    """Whose choices were made where sources differ."""
    seed: int
    """Seed of generated data."""
    versions: dict[str, str]
    """Versions of the packages."""
    n: int
    """Number of pictures measured."""
    rows: list[Row]
    """The rows of the thesis. A number is ``{"paper", "ours", "low", "high"}``, in percent: the
    printed one, ours and its 95 % bootstrap interval over pictures; None where there is none."""
    extra: list[Row]
    """Rows of the same columns that the thesis does not have: the other rule for thresholds, the
    boxes alone (``gt_known``), the thresholds themselves, the same without graph cut."""
    notes: list[str]
    """What must be known to read the numbers."""
    weights: dict[str, str]
    """Where the network's weights come from."""

    def to_json(self) -> dict[str, object]:
        """Returns the table as plain values, for :func:`json.dump`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_frame(self, extra: bool = False) -> "DataFrame":
        """Returns the rows, the thesis' numbers beside ours.

        Args:
            extra: Also the rows that the thesis does not have.

        Returns:
            One row each; columns ``(column, "paper" | "ours" | "low" | "high")``.
        """
        from pandas import DataFrame, MultiIndex

        rows = self.rows + (self.extra if extra else [])
        names = [name for name in self.rows[0] if isinstance(self.rows[0][name], dict)]
        words = [name for name in self.rows[0] if name not in names]
        kinds = ("paper", "ours", "low", "high")
        values = [[row[name][kind] for name in names for kind in kinds] for row in rows]
        index = MultiIndex.from_tuples([tuple(row[word] for word in words) for row in rows])
        columns = MultiIndex.from_product([names, kinds])
        return DataFrame(values, index.set_names(words), columns, dtype=np.float64)

    def __str__(self) -> str:
        head = f"table {self.id}: {self.title}; {self.network} on {self.data}, {self.n} images"
        cells = [self._texts(row) for row in self.rows + self.extra]
        widths = [max(map(len, column)) for column in zip(list(self.rows[0]), *cells, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in [list(self.rows[0]), *cells]
        ]
        lines.insert(1 + len(self.rows), "-" * max(map(len, lines)))
        return "\n".join([head, "paper | ours [95 %]", *lines, *(f"* {n}" for n in self.notes)])

    def _repr_html_(self) -> str:
        def line(texts: Iterable[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{html.escape(t)}</{tag}>' for t in texts)}</tr>"

        head = html.escape(
            f"Table {self.id}: {self.title}; {self.network} on {self.data}, {self.n} images. "
            "Thesis | ours [95 %]"
        )
        body = "".join(line(self._texts(row), "td") for row in self.rows)
        more = "".join(line(self._texts(row), "td") for row in self.extra)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return (
            f"<table><caption>{head}</caption>{line(self.rows[0], 'th')}{body}</table>"
            f"<details><summary>{len(self.extra)} more rows</summary><table>"
            f"{line(self.rows[0], 'th')}{more}</table></details><ul>{notes}</ul>"
        )

    @staticmethod
    def _texts(row: Row) -> list[str]:
        def text(cell: object) -> str:
            if not isinstance(cell, dict):
                return str(cell)
            paper, ours = (
                "-" if cell[kind] is None else f"{cell[kind]:.2f}" for kind in ("paper", "ours")
            )
            spread = "" if cell["low"] is None else f" [{cell['low']:.1f}, {cell['high']:.1f}]"
            return f"{paper} | {ours}{spread}"

        return [text(cell) for cell in row.values()]


@cached
def _numbers() -> dict[str, dict]:
    return json.loads(Path(__file__).with_name("paper_numbers.json").read_text())


def table_names() -> list[tuple[str, str]]:
    """Returns the number and the title of every table that can be made."""
    return [(name, table["title"]) for name, table in _numbers().items()]


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
        count = _STAGES.index(column.removeprefix("+")) + 1
        found = _Setting(method, _STAGES[:count])
    elif method == "layercam":  # 3.5: the best row of 3.2; 3.6: the stages are not printed
        wanted = _STAGES[: 4 if table == "3.5" else 3]
        found = _Setting(method, tuple(stage for stage in wanted if stage in stages))
    else:
        found = _Setting(method, ("S5",))
    return found if set(found.stages) <= set(stages) else None


# --------------------------------------------------------------------------------- the pictures


@dataclass(frozen=True)
class _Item:
    image_id: str
    class_id: int
    boxes: tuple[Box, ...]
    digest: str  # of what the measurements depend on besides the settings
    read: Callable[[], np.ndarray]

    @property
    def key(self) -> tuple[str, str]:
        return self.image_id, self.digest


def _items(
    data: Data, root: Path, limit: int | None, seed: int, progress: bool
) -> tuple[list[_Item], list[str]]:
    # The pictures with a class and a box, and what there is to say about the data.
    if data == "scenes":
        return _scenes(200 if limit is None else limit, seed), [
            "generated pictures: split test of scenes, few objects, only pictures whose objects "
            "are of one class"
        ]
    if data == "ilsvrc":
        images = load_imagenet(root / "ilsvrc", "val", limit=limit, progress=progress)
        whole, split = 50_000, "validation"
    else:
        images = load_cub(root / "cub", "test", limit=limit, progress=progress)
        whole, split = 5_794, "test"
    items = [_picture(image) for image in images if image.boxes and image.class_id is not None]
    notes = list(images.problems)
    if len(items) < whole:
        notes.insert(
            0,
            f"{len(items)} of the {whole:,} {split} pictures: not the numbers of the whole set",
        )
    if not items:
        raise ValueError(f"expected pictures of {data} with a class and a box, got none")
    return items, notes


def _picture(image: LabeledImage) -> _Item:
    size = image.path.stat().st_size if image.path.is_file() else None
    facts = json.dumps([image.class_id, image.boxes, size])
    return _Item(
        image.image_id, image.class_id, image.boxes, _digest(facts),
        lambda: np.array(image.read()),
    )  # fmt: skip


def _scenes(count: int, seed: int) -> list[_Item]:
    items: list[_Item] = []
    index = 0
    while len(items) < count:
        scene = draw_scene(index, split="test", seed=seed, objects="few")
        if len(scene.class_ids) == 1:
            boxes = tuple(each.box for each in scene.objects)
            items.append(
                _Item(
                    scene.image_id, scene.class_ids[0], boxes, _digest(scene.image.tobytes()),
                    lambda index=index: draw_scene(
                        index, split="test", seed=seed, objects="few", masks=False
                    ).image,
                )
            )  # fmt: skip
        index += 1
    return items


def _digest(value: str | bytes) -> str:
    value = value.encode() if isinstance(value, str) else value
    return hashlib.sha256(value).hexdigest()[:16]


def _views(net: Staged, size: tuple[int, int], crops: Crops) -> tuple[View, ...]:
    side = net.image_size
    side = (side, side) if isinstance(side, int) else side
    if crops == "resize":
        return (View(size, side, (0, 0), side),)
    if side[0] != side[1]:
        raise ValueError(f"expected a network of square images for ten crops, got {side}")
    return crop_views(size, crops, crop=side[0], resize=round(side[0] * 256 / 224))


def _tensors(net: Staged, pixels: Sequence[np.ndarray]) -> Tensor:
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(part)[:, None, None] for part in (net.mean, net.std))
    return ((images - mean) / std).to(net.device, net.dtype)


# ------------------------------------------------------------------------------ measured values


@dataclass(frozen=True)
class _Part:
    # A pass over the pictures: what it depends on, and one record for each picture.
    name: str
    facts: dict[str, object]
    measure: Callable[[Sequence[_Item], Sequence[np.ndarray]], list[dict[str, object]]]
    settings: tuple[_Setting | str, ...] = ()


def _box_part(
    name: str,
    net: Staged,
    settings: Sequence[_Setting],
    preset: _Preset,
    run: Callable[[Tensor, list[int]], StageMaps],
    facts: Mapping[str, object],
) -> _Part:
    # Settings of which `run` gives the maps of all stages.
    def measure(items: Sequence[_Item], pixels: Sequence[np.ndarray]) -> list[dict]:
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
    return _Part(name, facts, measure, names)


def _joined_maps(
    net: Staged,
    items: Sequence[_Item],
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
        run(_tensors(net, shown[start : start + chunk]), ids[start : start + chunk])
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
    chosen = [maps[setting.method][-1 - _STAGES.index(stage)] for stage in setting.stages]
    if len(chosen) == 1:
        return resize(chosen[0], size)
    return fuse(chosen[::-1], setting.gamma, size, scaling=setting.scaling)


def _cut_ious(pixels: np.ndarray, map: Tensor, true: Sequence[Box], preset: _Preset) -> np.ndarray:
    # One box, which counts at every threshold.
    map = resize(map, pixels.shape[:2])
    mask = simonyan(pixels, map) if preset.cut == "simonyan" else grabcut(pixels, map)
    iou = best_ious([mask_to_box(mask, preset.rule)], true, preset.convention)
    return iou.repeat(len(THRESHOLDS))


def _occlusion_part(net: Staged) -> _Part:
    # The network's answers to each picture, as it is and covered where a map is strong.
    deepest = [len(net.stage_names)]

    def measure(items: Sequence[_Item], pixels: Sequence[np.ndarray]) -> list[dict]:
        views = [_views(net, picture.shape[:2], "resize")[0] for picture in pixels]
        images = _tensors(net, [v.pixels(p) for v, p in zip(views, pixels, strict=True)])
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

    return _Part("occlusion", {"threshold": 0.7, "fill": "mean"}, measure)


def _packed(hits: np.ndarray) -> str:
    return base64.b64encode(np.packbits(hits)).decode()


def _unpacked(text: str, rows: int) -> np.ndarray:
    count = rows * len(THRESHOLDS)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count)
    return bits.reshape(rows, -1).astype(bool)


# ------------------------------------------------------------------------------ runs and caches


class _Store:
    """The records of one part, one line of JSON a picture, in one file a process."""

    def __init__(self, folder: Path, name: str, facts: Mapping[str, object]) -> None:
        key = _digest(json.dumps(facts, sort_keys=True))
        self.folder, self.stem = folder, f"{name}-{key}"
        self.own = folder / f"{self.stem}.{_process()[0]}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.own.exists():
                self._append([{"facts": facts}])
        except OSError as error:
            raise OSError(
                f"expected `cache` as a folder that can be written to, got {str(folder)!r} "
                f"({error.strerror}); choose another one"
            ) from error
        data = self.own.read_bytes()
        if not data.endswith(b"\n"):  # a line that was being written when the run was stopped
            with self.own.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def load(self) -> dict[tuple[str, str], dict]:
        """Returns the last record of each picture as it was then, of all processes."""
        found: dict[tuple[str, str], dict] = {}
        for path in sorted(self.folder.glob(f"{self.stem}.*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if "id" in record:
                    found[record["id"], record["digest"]] = record
        return found

    def add(self, records: Sequence[dict]) -> None:
        self._append(records)

    def _append(self, records: Sequence[dict]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in records)
        with self.own.open("a", encoding="utf-8") as file:
            file.write(text)


def _process() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _run(
    part: _Part, items: Sequence[_Item], store: _Store, batch: int, progress: bool
) -> tuple[dict[str, dict], list[str]]:
    # The record of every picture that can be read, and the names of the others. A batch is
    # always the same pictures, so that a stopped run gives the same values to the last bit.
    rank, world = _process()
    records = store.load()
    unread: list[str] = []
    starts = list(range(0, len(items), batch))[rank::world]
    bar = tqdm(starts, part.name, unit="batch", delay=2, disable=not progress or rank > 0)
    for start in bar:
        block = items[start : start + batch]
        pixels = {item.key: _read(item) for item in block if item.key not in records}
        unread += [item.image_id for item in block if pixels.get(item.key, ...) is None]
        if all(picture is None for picture in pixels.values()):  # or there is none
            continue
        for item in block:
            if item.key in records:
                pixels[item.key] = _read(item)
        readable = [item for item in block if pixels[item.key] is not None]
        measured = part.measure(readable, [pixels[item.key] for item in readable])
        new = [
            {"id": item.image_id, "digest": item.digest, **values}
            for item, values in zip(readable, measured, strict=True)
        ]
        store.add(new)
        records |= {(record["id"], record["digest"]): record for record in new}
    if world > 1:
        _wait()
        records = store.load()
        unread = [item.image_id for item in items if item.key not in records]
    return {item.image_id: records[item.key] for item in items if item.key in records}, unread


def _read(item: _Item) -> np.ndarray | None:
    try:
        return item.read()
    except (ValueError, OSError):  # reported at the end
        return None


def _wait() -> None:
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    distributed.barrier()


def _state_hash(net: Staged) -> str:
    digest = hashlib.sha256()
    for name, value in net.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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


def _cell(paper: object, values: np.ndarray | None = None) -> dict[str, float | None]:
    # A number of the thesis beside the mean of values from 0 to 1, in percent.
    cell = {"paper": paper, "ours": None, "low": None, "high": None}
    if values is None or not len(values):
        return cell
    numbers = values.astype(np.float64)
    resamples = min(2000, max(200, 20_000_000 // len(numbers)))
    low, high = bootstrap_interval(numbers, resamples=resamples)
    shown = {"ours": numbers.mean(), "low": low, "high": high}
    return cell | {name: round(100 * float(value), 2) for name, value in shown.items()}


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
            cells[column] = _cell(None, values)
        return cells

    def single(row: Mapping[str, object], value: Callable[[_Setting], float | None]) -> Row:
        found = {column: find(row, column) for column in columns}
        return {
            column: _cell(None) | {"ours": None if setting is None else value(setting)}
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
            name: _cell(row[name], measure(kept[name])) for name in names
        })  # fmt: skip
        extra.append({"metric": f"{row['metric']} of those classified right"} | {
            name: _cell(None, measure(values[name][right])) for name in names
        })  # fmt: skip
    extra.append({"metric": "covered area"} | {
        name: _cell(None, values[name][right, 2]) for name in names
    })  # fmt: skip
    return rows, extra


# ------------------------------------------------------------------------------------ the tables


def make_table(
    id: str,
    *,
    data: Data = "scenes",
    network: str | Staged | None = None,
    weights: str | Path = "auto",
    data_root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    preset: PresetName = "thesis",
    threshold: ThresholdRule = "auto",
    gradient_at: GradientAt | None = None,
    methods: Sequence[str] | None = None,
    channels: int | None = 64,
    batch: int = 8,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: bool = True,
) -> Table:
    """Makes one table of the thesis with a network and data of one's own.

    Args:
        id: Number of the table; see :func:`table_names`.
        data: ``ilsvrc`` or ``cub``, folders of the data root, or the generated ``scenes``.
        network: A name for :func:`attnviz.load_network`, or a network that is loaded; the
            bundled ``scenes_fc`` or ``vgg16`` if None.
        weights: See :func:`attnviz.load_network`.
        data_root: Folder of the data sets; see :func:`attnviz.networks.data_root`.
        limit: Take only so many pictures; all if None, 200 of the scenes.
        seed: Number of the generated data set.
        preset: Whose choices are made where sources differ. ``thesis``: the picture squeezed to
            the network's input, the gradient of the activation itself, the largest component
            above 15 % of the maximum, the graph cut of Simonyan et al. for LayerCAM in S1 and
            S2. ``released``: ten crops, the gradient after the pooling, the largest rectangle,
            grabCut in S1 to S3. ``literature``: as ``thesis``, but the largest contour above
            20 %, no graph cut.
        threshold: Which threshold the rows show; the other is in ``extra``. ``fixed``: the
            preset's, 5 % in table 3.6. ``held_out``: for each picture the one that is best on
            the half of the pictures it is not in. ``auto``: ``fixed`` for VGG16, for which the
            15 % were chosen, ``held_out`` for every other network.
        gradient_at: Where the gradient is taken, in place of the preset's choice; see
            :func:`attnviz.stage_maps`. Before a max-pooling it makes a large difference.
        methods: Keys of :data:`METHODS` to compute; all of the table if None. Score-CAM takes
            by far the longest.
        channels: How many channels Score-CAM uses in each stage, those of highest variance; all
            if None.
        batch: Pictures in one forward pass.
        device: Where the network runs.
        cache: Folder for the measurements; a stopped run goes on from there. ``attnviz/tables``
            in the user's cache folder if None.
        progress: Show progress bars.

    Returns:
        The table.

    Raises:
        ValueError: There is no such table, an argument is out of range, or the network does not
            know the data's classes.
        FileNotFoundError: The data set or the weights are not there.

    References:
        Thesis sections 3.4.1 and 3.4.2.
    """
    _check(id, data, preset, threshold, gradient_at, methods, limit, channels, batch)
    root = find_data_root(data_root)
    items, notes = _items(data, root, limit, seed, progress)  # before weights are downloaded
    if network is None:
        network = "scenes_fc" if data == "scenes" else "vgg16"
    net = network
    if not isinstance(net, Staged):
        net = load_network(network, weights, data=root, device=device)
    _check_classes(net, data)
    _check_class_ids(net, items, data)
    choices = _PRESETS[preset]
    if gradient_at is not None:
        choices = replace(choices, gradient_at=gradient_at)
    stages = _STAGES[: len(net.stage_names)]
    parts = _parts(id, net, stages, choices, methods, channels, batch)
    folder = _cache_folder() if cache is None else Path(cache)
    common = {
        "format": _FORMAT, "attnviz": __version__, "network": net.name,
        "weights": _state_hash(net), "stages": list(net.stage_names), "data": data,
        "seed": seed if data == "scenes" else None, "batch": batch,
        "image_size": net.image_size, "mean": net.mean, "std": net.std,
    }  # fmt: skip
    found, unread = {}, {}
    for part in parts:
        facts = common | part.facts
        store = _Store(folder, f"{part.name}-{net.name}-{data}", facts)
        found[part.name], failed = _run(part, items, store, batch, progress)
        unread |= dict.fromkeys(failed)
    ids = [item.image_id for item in items if item.image_id not in unread]
    if not ids:
        raise ValueError(f"expected pictures that can be read, got none of {len(items)}")
    if unread:
        shown = ", ".join(list(unread)[:5])
        notes.append(f"{len(unread)} pictures could not be read and are left out: {shown}")
    paper = _numbers()[id]["rows"]
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
    notes += _stage_notes(net, stages, id)
    return Table(
        id=id, title=_numbers()[id]["title"], data=data, network=net.name, preset=preset,
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
) -> list[_Part]:
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
    parts: Sequence[_Part],
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


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "attnviz" / "tables"


# ----------------------------------------------------------------------------------------- notes


def _share(values: np.ndarray) -> str:
    cell = _cell(None, values)
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


def _stage_notes(net: Staged, stages: Sequence[str], id: str) -> list[str]:
    names = net.stage_names[-len(stages) :][::-1]
    pairs = ", ".join(f"{stage} = {name}" for stage, name in zip(stages, names, strict=True))
    notes = []
    if net.name != "vgg16":
        notes.append(f"the thesis' network is VGG16, ours is {net.name}")
    notes.append(f"stages, the deepest is S5: {pairs}")
    missing = _STAGES[len(stages) :]
    if missing and id in ("3.1", "3.2", "3.3", "3.4", "3.7"):
        notes.append(f"{net.name} has {len(stages)} stages: numbers with {missing[0]} are empty")
    if len(net.stage_names) > len(_STAGES):
        notes.append(f"the {len(net.stage_names) - len(_STAGES)} shallowest stages are left out")
    return notes


# ---------------------------------------------------------------------------------------- checks


def _check(
    id: str,
    data: str,
    preset: str,
    threshold: str,
    gradient_at: str | None,
    methods: Sequence[str] | None,
    limit: int | None,
    channels: int | None,
    batch: int,
) -> None:
    names = list(_numbers())
    if id not in names:
        near = get_close_matches(str(id), names, n=3)
        raise ValueError(
            f"expected the number of a table in {', '.join(names)}, got {id!r}"
            + (f"; the nearest are {', '.join(near)}" if near else "")
        )
    for name, value, choices in (
        ("data", data, get_args(Data)),
        ("preset", preset, get_args(PresetName)),
        ("threshold", threshold, get_args(ThresholdRule)),
        ("gradient_at", gradient_at, (None, *get_args(GradientAt))),
        *(("methods", method, tuple(METHODS)) for method in methods or ()),
    ):
        if value not in choices:
            raise ValueError(f"expected `{name}` in {choices}, got {value!r}")
    for name, value in (("limit", limit), ("channels", channels), ("batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"expected `{name}` of at least 1, got {value}")
    if id == "3.6" and data == "ilsvrc":
        raise ValueError("expected `data` in ('cub', 'scenes') for table 3.6, got 'ilsvrc'")


def _check_classes(net: Staged, data: Data) -> None:
    count = _CLASS_COUNTS[data]
    if net.class_names is not None and len(net.class_names) != count:
        raise ValueError(
            f"expected a network of the {count} classes of {data}, got {net.name} with "
            f"{len(net.class_names)}; name another network or other data"
        )


def _check_class_ids(net: Staged, items: Sequence[_Item], data: Data) -> None:
    # A network whose classes have no names says how many there are only by its scores.
    if net.class_names is not None:
        return
    height, width = (net.image_size,) * 2 if isinstance(net.image_size, int) else net.image_size
    blank = torch.zeros(1, len(net.mean), height, width, device=net.device, dtype=net.dtype)
    scores, last = net(blank), max(item.class_id for item in items)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] <= last:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"expected a network with a score for each class of {data}, up to {last}, got "
            f"{net.name} with scores {got}; name another network or other weights"
        )
