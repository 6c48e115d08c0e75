"""Tables 3.9 and 3.10: where the maps of a classifier of surfaces say that a defect is.

A classifier is trained from image labels alone, in a folder of the cache named after its config,
or given. For every defective test picture and every map the intersection over union with the
mask is kept at each of :data:`THRESHOLDS` (thesis Eq. 3.10). As in the thesis a row shows the
best threshold of these very pictures, one for each map, which is optimistic; the extra rows
show it held out: for each picture the one that is best on the half that the picture is not in.

The thesis' layers are the residual stages of ResNet-50. The deepest stage of any network is
called layer4, the one before it layer3, and so on.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from .. import __version__
from ..cam import fuse, resize
from ..explain import GradientAt, provenance, stage_maps
from ..metrics import split_half, sweep_region_ious
from ..networks import load_network
from ..stages import Staged
from ..training import DefectConfig, defect_config, train_defect
from ..training.defect import Preset, Surface, open_surfaces
from .localization import METHODS
from .measured import FORMAT, Item, Part, Store, run_part, state_hash
from .processes import own_device, processes
from .sources import finished
from .table import Row, Table, mean_cell, numbers

__all__ = ["TABLES", "THRESHOLDS", "make"]

TABLES = ("3.9", "3.10")

THRESHOLDS = np.arange(1, 100) / 100
"""The shares of a map's maximum at which it is compared with the mask."""

_METHODS = ("gradcam", "gradcam_pp", "layercam")
_LAYERS = ("layer4", "layer3", "layer2", "layer1")
_FUSED = ("layer4+layer3", "layer3+layer2")
_CONTROL = ("no network", "picture")
_TEST_IMAGES = 400  # of the generated ones, as many as the thesis has
_TIMED = 20  # pictures


# ------------------------------------------------------------------------------- the classifiers


@dataclass(frozen=True)
class _Classifier:
    # A trained network, the seed of its data, and what is known of it.
    net: Staged
    seed: int
    note: str


def _given(network: str | Staged, weights: str | Path, root: Path) -> Staged | None:
    # A network that knows defects already; None where one has to be trained.
    if isinstance(network, Staged):
        if "defect" not in (network.class_names or ()):
            raise ValueError(
                f"expected a network with a class 'defect', got {network.name}; train one with "
                "attnviz train defect"
            )
        return network
    if str(weights) in ("auto", "random"):
        return None
    loaded = load_network(network, weights, data=root)
    return loaded if "defect" in (loaded.class_names or ()) else None


def _trained(
    config: DefectConfig, root: Path, cache: Path, repeats: int, progress: bool
) -> list[_Classifier]:
    def train(again: DefectConfig) -> Path:
        text = json.dumps(asdict(again), sort_keys=True)
        if again.data != "defects":
            surfaces, _ = open_surfaces(again.data, "train", limit=again.limit, root=root)
            text += repr([(each.image_id, each.defective) for each in surfaces])
        run = cache / f"DefectConfig-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        finished(train_defect, again, run, root, progress)
        return run

    configs = [replace(config, seed=config.seed + repeat) for repeat in range(repeats)]
    runs = processes().each([partial(train, again) for again in configs], progress)
    found = []
    for again, run in zip(configs, runs, strict=True):
        metrics = json.loads((run / "metrics.json").read_text())
        note = (
            f"seed {again.seed}: trained on {metrics['training_images']} labels, "
            f"{again.epochs} epochs, preset {again.preset}; on {metrics['images']} other pictures "
            f"accuracy {100 * metrics['accuracy']:.1f} % (always the larger class: "
            f"{100 * metrics['accuracy_without_looking']:.1f} %), average precision "
            f"{100 * metrics['average_precision']:.1f} %"
        )
        net = load_network(again.network, run / "network.safetensors", data=root)
        found.append(_Classifier(net.to(own_device(config.device)), again.seed, note))
    return found


# ------------------------------------------------------------------------------ what is measured


def _names(net: Staged) -> list[tuple[str, str]]:
    # Method and layers of every map, those of the thesis' tables and the others' beside them.
    layers = _LAYERS[: len(net.stage_names)]
    fused = [each for each in _FUSED if set(each.split("+")) <= set(layers)]
    return [(method, layer) for method in _METHODS for layer in (*layers, *fused)]


def _part(
    net: Staged, surfaces: Mapping[str, Surface], gradient_at: GradientAt, facts: dict
) -> Part:
    layers = _LAYERS[: len(net.stage_names)]
    count, defect = len(net.stage_names), net.class_id("defect")
    stages = range(count - len(layers) + 1, count + 1)
    names = [*_names(net), _CONTROL]

    def measure(items: Sequence[Item], pixels: Sequence[np.ndarray]) -> list[dict]:
        records = []
        for item, picture in zip(items, pixels, strict=True):
            images = net.preprocess(picture)
            maps = stage_maps(
                net, images, defect, _METHODS, stages=stages, gradient_at=gradient_at
            )
            mask = torch.from_numpy(surfaces[item.image_id].read_mask())
            rows = []
            for method, layer in names[:-1]:
                chosen = [maps[method][-1 - _LAYERS.index(each)].float().cpu()
                          for each in layer.split("+")[::-1]]  # fmt: skip
                fused = chosen[0] if len(chosen) == 1 else fuse(chosen)
                shown = resize(fused, tuple(mask.shape))[0]
                rows.append(sweep_region_ious(shown, mask == 1, THRESHOLDS, mask != 255))
            grey = torch.from_numpy(picture.mean(axis=2))
            control = (grey - grey.median()).abs()
            rows.append(sweep_region_ious(control, mask == 1, THRESHOLDS, mask != 255))
            scores = maps.scores[0].float()
            records.append(
                {
                    "found": bool(scores.argmax() == defect),
                    "area": float((mask == 1).double().mean()),
                    "ious": base64.b64encode(np.stack(rows).astype("<f4").tobytes()).decode(),
                }
            )
        return records

    facts = facts | {
        "maps": [" ".join(each) for each in names], "gradient_at": gradient_at,
        "thresholds": THRESHOLDS.tolist(),
    }  # fmt: skip
    return Part("defects", facts, measure, tuple(names))


@dataclass(frozen=True)
class _Measured:
    # Intersections over union of each map: one row per picture, one column per threshold.
    ious: dict[tuple[str, str], np.ndarray]
    image_ids: list[str]
    found: np.ndarray  # whether the network says that there is a defect
    area: np.ndarray  # the share of the picture that is defective

    def best(self, name: tuple[str, str], detected: bool = False) -> np.ndarray | None:
        """Values at the one threshold that is best for these very pictures.

        With `detected` only of those that the network finds a defect in; None without any.
        """
        ious = self.ious[name][self.found] if detected else self.ious[name]
        return ious[:, ious.mean(axis=0).argmax()] if len(ious) else None

    def held_out(self, name: tuple[str, str]) -> np.ndarray | None:
        """Values at the threshold that is best on the other half; None without two halves."""
        half, ious = split_half(self.image_ids), self.ious[name]
        if half.all() or not half.any():
            return None
        first, second = (int(ious[part].mean(axis=0).argmax()) for part in (~half, half))
        return np.where(half, ious[:, first], ious[:, second])

    def threshold(self, name: tuple[str, str]) -> float:
        """The threshold of :meth:`best`."""
        return float(THRESHOLDS[self.ious[name].mean(axis=0).argmax()])


def _measure(
    classifier: _Classifier, data: str, gradient_at: GradientAt, root: Path,
    cache: Path, limit: int | None, progress: bool,
) -> tuple[_Measured, list[Surface], list[str]]:  # fmt: skip
    net = classifier.net
    size = net.image_size if isinstance(net.image_size, int) else net.image_size[0]
    surfaces, notes = open_surfaces(
        data, "test", count=_TEST_IMAGES, limit=limit, size=size, seed=classifier.seed,
        root=root,
    )  # fmt: skip
    items, unknown = [], 0
    for each in surfaces:
        mask = each.read_mask() if each.defective else None
        if mask is None or not (mask == 1).any():
            unknown += each.defective
            continue
        digest = hashlib.sha256(mask.tobytes()).hexdigest()[:16]
        items.append(Item(each.image_id, 0, (), digest, lambda each=each: np.array(each.read())))
    if not items:
        raise ValueError(f"expected masks of defects in {data}, got none")
    notes.append(
        f"{len(items)} defective of {len(surfaces)} test pictures are measured"
        + (f"; {unknown} defective ones have no mask or an empty one" if unknown else "")
    )
    facts = {
        "format": FORMAT, "attnviz": __version__, "network": net.name,
        "weights": state_hash(net), "stages": list(net.stage_names), "data": data,
        "seed": classifier.seed if data == "defects" else None,
        "image_size": net.image_size, "mean": net.mean, "std": net.std,
    }  # fmt: skip
    part = _part(net, {each.image_id: each for each in surfaces}, gradient_at, facts)
    store = Store(cache, f"{part.name}-{net.name}-{data}", part.facts)
    records, unread = run_part(part, items, store, 8, progress)
    ids = [item.image_id for item in items if item.image_id in records]
    if not ids:
        raise ValueError(f"expected pictures that can be read, got none of {len(items)}")
    if unread:
        notes.append(f"{len(unread)} pictures could not be read: {', '.join(unread[:5])}")
    values = np.stack([
        np.frombuffer(base64.b64decode(records[i]["ious"]), "<f4").reshape(len(part.settings), -1)
        for i in ids
    ]).astype(np.float64)  # fmt: skip
    measured = _Measured(
        {name: values[:, k] for k, name in enumerate(part.settings)}, ids,
        np.array([records[i]["found"] for i in ids]), np.array([records[i]["area"] for i in ids]),
    )  # fmt: skip
    shown = [each for each in surfaces if each.image_id in set(ids)]
    return measured, shown, notes


def _frames(net: Staged, surfaces: Sequence[Surface], gradient_at: GradientAt) -> dict:
    # Maps per second of each method in layer3, one picture at a time, forward and backward.
    defect, stage = net.class_id("defect"), [max(len(net.stage_names) - 1, 1)]
    rates: dict[str, list[float]] = {method: [] for method in _METHODS}
    for place, surface in enumerate((surfaces[0], *surfaces[:_TIMED])):  # the first to warm up
        images = net.preprocess(surface.read())
        for method in _METHODS:
            start = perf_counter()
            maps = stage_maps(
                net, images, defect, (method,), stages=stage, gradient_at=gradient_at
            )
            maps[method][0].cpu()  # what a GPU has begun is awaited here
            if place:
                rates[method].append(1 / (perf_counter() - start))
    return {method: np.array(values) for method, values in rates.items()}


# ------------------------------------------------------------------------------------ the tables


def make(
    id: str,
    *,
    data: str,
    network: str | Staged | None,
    weights: str | Path,
    root: Path,
    limit: int | None,
    seed: int,
    device: str | torch.device,
    cache: Path,
    progress: bool,
    preset: Preset | None = None,
    gradient_at: GradientAt = "native",
    epochs: int | None = None,
    repeats: int = 1,
) -> Table:
    """Makes one table of defects; see :func:`attnviz.tables.make_table`."""
    if repeats < 1:
        raise ValueError(f"expected `repeats` of at least 1, got {repeats}")
    data = "defects" if data == "scenes" else data  # what is generated of surfaces
    open_surfaces(data, "test", count=100, limit=limit, root=root)  # before weights are loaded
    if network is None:
        network = "defects" if data == "defects" else "resnet50"
    given = _given(network, weights, root)
    if given is not None and (repeats > 1 or epochs is not None or preset is not None):
        raise ValueError(
            f"expected no `repeats`, `epochs` or `preset` with {given.name}, which is trained; "
            "leave them out, or leave its weights out"
        )
    if given is not None:
        classifiers = [_Classifier(given.to(own_device(device)), seed, "the network was given")]
        preset = "given"
    else:
        changes = {"limit": limit, "epochs": epochs}
        config = defect_config(
            preset, data=data, network=network, weights=str(weights), seed=seed,
            device=str(device).partition(":")[0],
            **{key: value for key, value in changes.items() if value is not None},
        )  # fmt: skip
        classifiers = _trained(config, root, cache, repeats, progress)
        preset = config.preset
    found, notes = [], []
    for each in classifiers:
        measured, surfaces, said = _measure(each, data, gradient_at, root, cache, limit, progress)
        found.append(measured)
        notes = said if len(found) == 1 else notes
    first = classifiers[0].net
    paper = numbers()[id]["rows"]
    if id == "3.9":
        frames = _frames(first, surfaces, gradient_at)
        rows, extra = _method_rows(paper, found, frames)
        notes.append(
            f"fps: one picture of {first.image_size} at a time on {first.device.type}, forward "
            "and backward pass and map, reading and resizing left out; the thesis does not name "
            "its GPU"
        )
    else:
        rows, extra = _layer_rows(paper, found)
    notes += [each.note for each in classifiers] + _notes(found, first, gradient_at, repeats)
    return Table(
        id=id, title=numbers()[id]["title"], data=data, network=first.name, preset=preset,
        seed=seed,
        versions=dict(provenance(first)["versions"]), n=len(found[0].image_ids), rows=rows,
        extra=extra, notes=notes, weights=dict(first.provenance),
    )  # fmt: skip


def _joined(paper: object, values: Sequence[np.ndarray | None]) -> dict[str, float | None]:
    # One training: its mean and interval over pictures. Several: their mean, least and largest.
    if len(values) == 1 or any(each is None for each in values):
        return mean_cell(paper, values[0])
    means = [100 * float(each.mean()) for each in values]
    shown = {"ours": np.mean(means), "low": min(means), "high": max(means)}
    return mean_cell(paper) | {name: round(float(value), 2) for name, value in shown.items()}


def _method_rows(
    paper: Sequence[Mapping[str, object]],
    found: Sequence[_Measured],
    frames: Mapping[str, np.ndarray],
) -> tuple[list[Row], list[Row]]:
    keys = {METHODS[method]: method for method in _METHODS}
    rows, extra = [], []
    for row in paper:
        method = keys.get(str(row["method"]))
        name = (method, "layer3")
        if method is None or name not in found[0].ious:
            rows.append(row | {key: mean_cell(row[key]) for key in ("miou", "fps")})
            continue
        rows.append({
            "method": row["method"],
            "miou": _joined(row["miou"], [each.best(name) for each in found]),
            "fps": mean_cell(row["fps"], frames[method], factor=1),
        })  # fmt: skip
        for text, cell in _ways(found, name).items():
            extra.append({"method": f"{row['method']}, {text}", "miou": cell})
    control = "no network: distance from the median grey"
    best = _joined(None, [each.best(_CONTROL) for each in found])
    extra.append({"method": control, "miou": best})
    for text, cell in _ways(found, _CONTROL).items():
        extra.append({"method": f"{control}, {text}", "miou": cell})
    return rows, [row | {"fps": mean_cell(None)} for row in extra]


def _layer_rows(
    paper: Sequence[Mapping[str, object]], found: Sequence[_Measured]
) -> tuple[list[Row], list[Row]]:
    [printed] = paper
    columns = [name for name in printed if name != "method"]
    rows, extra = [], []
    for method in reversed(_METHODS):
        there = [column for column in columns if (method, column) in found[0].ious]
        own = printed if method == "layercam" else dict.fromkeys(columns)
        best = {
            column: _joined(own[column], [each.best((method, column)) for each in found])
            for column in there
        }
        empty = {column: mean_cell(own[column]) for column in columns}
        target = rows if method == "layercam" else extra
        target.append({"method": METHODS[method]} | empty | best)
        ways = {column: _ways(found, (method, column)) for column in there}
        for text in ways[there[0]]:
            cells = {column: mean_cell(None) for column in columns}
            cells |= {column: each[text] for column, each in ways.items()}
            extra.append({"method": f"{METHODS[method]}, {text}"} | cells)
    return rows, extra


def _ways(found: Sequence[_Measured], name: tuple[str, str]) -> dict[str, dict]:
    # What the extra rows say of a map.
    thresholds = 100 * np.mean([each.threshold(name) for each in found])
    return {
        "held out": _joined(None, [each.held_out(name) for each in found]),
        "where the network finds one": _joined(None, [each.best(name, True) for each in found]),
        "threshold, % of the maximum": mean_cell(None) | {"ours": round(float(thresholds), 2)},
    }


def _notes(
    found: Sequence[_Measured], net: Staged, gradient_at: GradientAt, repeats: int
) -> list[str]:
    layers = _LAYERS[: len(net.stage_names)]
    pairs = ", ".join(
        f"{layer} = {name}" for layer, name in zip(layers, net.stage_names[::-1], strict=False)
    )
    notes = [
        "ours: the threshold, one for each map, that is best on these very pictures, as in the "
        "thesis: optimistic; held out in the extra rows",
        f"layers, the deepest is layer4: {pairs}"
        + ("; the shallowest is left out" if len(net.stage_names) > len(layers) else ""),
        f"gradient {gradient_at}; fused by tanh of the shallower map and maximum (Eq. 3.9)",
        "the network says of "
        + ", ".join(f"{100 * each.found.mean():.1f} %" for each in found)
        + " of these pictures that they have a defect; all are measured",
        "the whole picture would give an mIoU of "
        + ", ".join(f"{100 * each.area.mean():.2f} %" for each in found)
        + f"; the median defect takes {100 * np.median(found[0].area):.2f} % of its picture",
    ]
    if net.name != "resnet50":
        notes.append(f"the thesis' network is ResNet-50, ours is {net.name}")
    if repeats > 1:
        notes.append(f"ours: mean of {repeats} trainings [least, largest]")
    return notes
