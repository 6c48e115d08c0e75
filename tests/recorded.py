"""Runs recorded without a training: maps that wander over an object."""

import csv
from pathlib import Path

import numpy as np

from attnviz.evolution import EvolutionWriter, Watch, stop_requested

CLASS_NAMES = ["deer", "</script><b>taxi", "ship"]
PAIRS = [("pond", 0, (48, 64)), ("pond", 2, (48, 64)), ("street", 1, (60, 40))]
GRID = (6, 8)


def watch(masks=True, grid=GRID):
    generator = np.random.default_rng(3)
    pictures = {
        name: generator.integers(0, 256, (*size, 3), dtype=np.uint8) for name, _, size in PAIRS
    }
    pairs = []
    for number, (name, class_id, (height, width)) in enumerate(PAIRS):
        y, x = np.mgrid[:height, :width]
        mask = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (10 + 3 * number) ** 2
        pairs.append(Watch(name, class_id, pictures[name], grid, mask if masks else None))
    return pairs


def maps_of(epoch, pairs, grid=GRID, seed=0):
    generator = np.random.default_rng([seed, epoch])
    y, x = np.mgrid[: grid[0], : grid[1]]
    found = {}
    for pair in pairs:
        cy, cx = generator.uniform(0.2, 0.8, 2) * grid
        map = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 4)
        found[pair] = map / map.max()
    return found


def writer(run, epochs=5, *, masks=True, grid=GRID, **settings):
    known = {"run_id": Path(run).name, "network": "five stages", "data": "scenes"}
    return EvolutionWriter(
        run, watch(masks, grid), class_names=CLASS_NAMES, epochs=epochs, **known | settings
    )


def record(run, epochs=5, *, planned=None, seed=0, history=False, **settings):
    """Records a run whose accumulated map is the maximum of its maps."""
    target = writer(run, planned or epochs, **settings)
    integral = target.method == "integral"
    grid = target.watched[0].grid
    accumulated = dict.fromkeys(target.pairs, np.zeros(grid))
    for epoch in range(1, epochs + 1):
        maps = maps_of(epoch, target.pairs, grid, seed)
        accumulated = {pair: np.maximum(accumulated[pair], maps[pair]) for pair in maps}
        scores = {pair: epoch + number / 8 for number, pair in enumerate(target.pairs)}
        accepted = {pair: epoch > 1 for pair in target.pairs}
        target.write(epoch, maps, None if integral else accumulated, scores, accepted)
    if history:
        names = ("epoch", "loss", "recall_epoch", "noise_epoch", "recall_accumulated")
        with (Path(run) / "history.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(names)
            rows.writerows([e, 1 / e, 0.25, "", e / 10] for e in range(1, epochs + 1))
    return Path(run)


def train(target, epochs, wait):
    """Records one epoch after each `wait`, until it is asked to stop."""
    top = dict.fromkeys(target.pairs, np.zeros(GRID))
    for epoch in range(1, epochs + 1):
        wait()
        if stop_requested(target.run):
            return
        maps = maps_of(epoch, target.pairs)
        top = {pair: np.maximum(top[pair], maps[pair]) for pair in maps}
        target.write(epoch, maps, top)
