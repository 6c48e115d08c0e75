"""Table 5.1: do contributions of channels agree with what removing them does?

A network is run over a data set; the decisions of each picture's evidence tree are decomposed and
every channel below them is removed, in three ways. The mean of a picture's decisions is kept at
once, so a stopped table goes on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image

from .. import __version__
from ..explain import provenance
from ..networks import load_network
from ..probes.ablation import AblationFill
from ..probes.pearson import agreement, channel_means, decompositions
from ..stages import Staged
from .measured import (
    FORMAT,
    STAGES,
    Item,
    Part,
    Store,
    check_classes,
    open_items,
    run_part,
    stage_notes,
    state_hash,
    tensors,
)
from .processes import own_device
from .table import Row, Table, mean_cell, numbers

__all__ = ["TABLES", "make"]

TABLES = ("5.1",)

_DATASETS = {"ilsvrc": "ILSVRC", "voc2012": "VOC", "scenes": "ILSVRC", "cub": "ILSVRC"}
_SHOWN: AblationFill = "dataset_mean"
_CALIBRATION = 64  # pictures whose mean activations stand for the data set's


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
    top: int = 3,
    decisions: int = 9,
) -> Table:
    """Makes table 5.1; see :func:`attnviz.tables.make_table`."""
    if data not in _DATASETS:
        raise ValueError(f"expected `data` in {tuple(_DATASETS)} for table 5.1, got {data!r}")
    for name, value in (("top", top), ("decisions", decisions)):
        if value < 1:
            raise ValueError(f"expected `{name}` of at least 1, got {value}")
    limit = 40 if limit is None and data == "scenes" else limit
    items, notes = open_items(data, root, limit, seed, progress)
    if network is None:
        network = "scenes_fc" if data == "scenes" else "vgg16"
    net = network
    if not isinstance(net, Staged):
        net = load_network(network, weights, data=root, device=own_device(device))
    if data != "voc2012":
        check_classes(net, data)
    size = net.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)

    def shown(pixels: Sequence[np.ndarray]) -> torch.Tensor:
        squeezed = [Image.fromarray(each).resize(size[::-1]) for each in pixels]
        return tensors(net, [np.array(each) for each in squeezed])

    first = [pixels for item in items[:_CALIBRATION] if (pixels := _read(item)) is not None]
    if not first:
        raise ValueError(f"expected pictures that can be read, got none of {len(items)}")
    means = channel_means(net, shown(first).split(8))

    def measure(items: Sequence[Item], pixels: Sequence[np.ndarray]) -> list[dict]:
        images = shown(pixels)
        with torch.no_grad():
            best = net(images).argmax(dim=1).tolist()
        ids = [
            guess if item.class_id is None else item.class_id
            for item, guess in zip(items, best, strict=True)
        ]
        table = agreement(decompositions(net, images, ids, means=means, top=top, most=decisions))
        found: list[dict] = [{"values": {}, "decisions": 0} for _ in items]
        keys = ["image", "fill", "score", "stage"]
        for (image, *key), part in table.groupby(keys)["pearson"]:
            value = part.mean()
            found[image]["values"]["/".join(map(str, key))] = (
                None if np.isnan(value) else float(value)
            )
        for image, part in table.groupby("image"):
            found[image]["decisions"] = int(part["decision"].nunique())
        return found

    facts = {
        "format": FORMAT, "attnviz": __version__, "network": net.name,
        "weights": state_hash(net), "stages": list(net.stage_names), "data": data,
        "seed": seed if data == "scenes" else None, "top": top, "decisions": decisions,
        "calibration": [item.image_id for item in items[:_CALIBRATION]],
    }  # fmt: skip
    part = Part("decisions", facts, measure)
    store = Store(cache, f"decisions-{net.name}-{data}", facts)
    records, unread = run_part(part, items, store, 4, progress)
    if unread:
        notes.append(f"{len(unread)} pictures could not be read: {', '.join(unread[:5])}")
    values = [record["values"] for record in records.values()]
    count = len(net.stage_names)
    rows = [
        _row(row, values, count, _SHOWN, row["dataset"] == _DATASETS[data])
        for row in numbers()[id]["rows"]
    ]
    ours = [row for row in numbers()[id]["rows"] if row["dataset"] == _DATASETS[data]]
    extra = [
        _row({**row, "dataset": f"{data}, {fill}"}, values, count, fill, paper=False)
        for fill in get_args(AblationFill)
        if fill != _SHOWN
        for row in ours
    ]
    total = sum(record["decisions"] for record in records.values())
    notes += [
        f"{total:,} decisions: the class, and of its evidence tree (top {top}) at most "
        f"{decisions} neurons of a stage; means of each picture's decisions [95 % over pictures]",
        "a removed channel is replaced by its mean over the data set "
        f"({len(first)} pictures); by zero and by its mean over the picture in the extra rows",
        "empty where removal has no effect, as the mean over the picture before global average "
        "pooling",
    ]
    if _DATASETS[data].lower() != data and data != "voc2012":
        notes.append(f"ours are numbers of {data}, beside the thesis' of ILSVRC")
    notes += stage_notes(net, STAGES[:count], id)
    return Table(
        id=id, title=numbers()[id]["title"], data=data, network=net.name, preset="thesis",
        seed=seed, versions=dict(provenance(net)["versions"]), n=len(values), rows=rows,
        extra=extra, notes=notes, weights=dict(net.provenance),
    )  # fmt: skip


def _read(item: Item) -> np.ndarray | None:
    try:
        return item.read()
    except (ValueError, OSError):  # reported when it is measured
        return None


def _row(
    row: Row, values: Sequence[dict], count: int, fill: AblationFill, ours: bool = True,
    paper: bool = True,
) -> Row:  # fmt: skip
    made: Row = {}
    for column, printed in row.items():
        if not isinstance(printed, float):
            made[column] = printed
            continue
        stage = int(column[-1]) - 5 + count  # the deepest is S5
        key = f"{fill}/{row['strategy']}/{stage}"
        known = [each[key] for each in values if each.get(key) is not None] if ours else []
        made[column] = mean_cell(printed if paper else None, np.array(known), 1.0, 3)
    return made
