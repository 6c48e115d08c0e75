"""What accumulation costs: training steps with and without it, in turn, as ratios.

A step is all of it: forward, loss, backward, optimizer, and with OAA the attention, the gate and
the update of the memory, with OAA++ the drop layer, too. Every map passes the gate here, which is
the most that a step can cost.
"""

import gc
import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from .bench import (
    Benchmark,
    Row,
    _device_name,
    _quiet,
    _resident_peak,
    _start_measuring,
    _time,
    _trim,
    _versions,
)
from .memory import AttentionMemory
from .networks import oaa_network
from .training.loop import Loop, optimizer_for, train_step
from .training.measure import grids_of
from .training.oaa import Accumulator, OAAConfig, Task, classification_losses, oaa_config
from .training.pictures import Batch, Draws, groups, open_pictures
from .training.runs import start_fabric

__all__ = ["bench_oaa"]

PLAIN = "training step"
CASES = {PLAIN: None, "training step with OAA": "none", "training step with OAA++": "image"}
STEPS = 4  # of a round


def bench_oaa(
    networks: Sequence[str] = ("scenes", "squeezenet1_1"),
    batch: int = 8,
    rounds: int = 15,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    *,
    size: int | None = None,
    memory: bool = True,
    progress: bool = True,
) -> Benchmark:
    """Measures time and peak memory of training steps with OAA and OAA++ against those without.

    Args:
        networks: Names for :func:`attnviz.networks.oaa_network`; weights are random.
        batch: Images per step.
        rounds: How often each case runs, four steps each time.
        device: ``auto`` takes CUDA where there is one.
        seed: The seed of weights, images and order.
        size: Height and width of the images; the usual one of each network if None.
        memory: Whether to measure memory too; on a CPU that needs Linux.
        progress: Whether to show a progress bar.

    Returns:
        The ratios; median and quartiles over the rounds.

    Raises:
        ValueError: An argument is out of range, or a network is unknown.
    """
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"expected `{name}` of 1 or more, got {value}")
    rows: list[Row] = []
    total = len(networks) * len(CASES) * (rounds + memory)
    with tqdm(total=total, disable=not progress, unit="run") as bar, _quiet():
        for network in networks:
            bar.set_description(f"{network}, batch {batch}")
            side = size or (112 if network == "scenes" else 224)
            subjects = {case: _Subject(network, side, batch, device, seed, case) for case in CASES}
            names, order = list(CASES), random.Random(seed)
            seconds: dict[str, list[float]] = {case: [] for case in CASES}
            for subject in subjects.values():
                subject.run(subject.images)
            for _ in range(rounds):
                order.shuffle(names)
                for case in names:
                    seconds[case].append(_time(subjects[case].run, subjects[case].images))
                    bar.update()
            device_used = subjects[PLAIN].loop.fabric.device
            del subjects
            peaks: dict[str, int | None] = dict.fromkeys(CASES)
            for case in CASES if memory else ():
                work = (network, side, batch, device_used.type, seed, case)
                peaks[case] = _peak(*work) if device_used.type == "cuda" else _apart(*work)
                bar.update()
            rows += _rows(f"{network}, batch {batch}", seconds, peaks)
    return Benchmark(_device_name(device_used), _versions(), rows, rounds, seed)


class _Subject:
    # A training in which every picture has been seen once.
    def __init__(
        self, network: str, size: int, batch: int, device: str, seed: int, case: str
    ) -> None:
        config = _config(network, size, batch, device, seed, CASES[case] or "none")
        torch.manual_seed(seed)
        pictures = open_pictures("scenes", "train", size=size, count=STEPS * batch, seed=seed)
        model = oaa_network(network, len(pictures.class_names), "random")
        optimizer = optimizer_for(config, model.old_parameters(), model.new_parameters())
        task = Task(model).to(memory_format=torch.channels_last)
        fabric = start_fabric(config)
        task, optimizer = fabric.setup(task, optimizer)
        task.train()
        self.loop = Loop(
            config, Path(), fabric, task, optimizer, pictures, model.mean, model.std, False
        )
        self.accumulator = None
        if CASES[case] is not None:
            grids = grids_of(model, pictures.sizes)
            memory = AttentionMemory(
                dict.fromkeys(pictures.image_ids, grids[size, size]),
                dict(zip(pictures.image_ids, pictures.class_ids, strict=True)),
                run_id="bench", keep_last=CASES[case] == "image",
            )  # fmt: skip
            self.accumulator = Accumulator(config, memory, pictures)
        draws = Draws.of(seed, 0, len(pictures), shuffle=True, flips=True, crops=False)
        self.views = [
            groups(pictures, part.tolist(), draws, False, 1) for part in draws.order.split(batch)
        ]
        self.images = torch.zeros(1, device=fabric.device)  # what says where time is taken
        self.steps = 0

    def run(self, images: torch.Tensor) -> None:
        for views in self.views:
            train_step(self.loop, self, views, (2, self.steps))
            self.steps += 1

    def learn(
        self, batch: Batch, images: Float[torch.Tensor, "b 3 h w"], place: tuple[int, int]
    ) -> Float[torch.Tensor, " b"]:
        return classification_losses(self.loop, self.accumulator, batch, images, place)[0]


def _config(network: str, size: int, batch: int, device: str, seed: int, drop: str) -> OAAConfig:
    return oaa_config(
        network=network, size=size, batch_size=batch, device=device, seed=seed, drop=drop,
        start=0, gate=False, learning_rate=0.0,
    )  # fmt: skip


def _rows(where: str, seconds: dict[str, list[float]], peaks: dict[str, int | None]) -> list[Row]:
    rows: list[Row] = []
    for case in list(CASES)[1:]:
        ratios = np.array(seconds[case]) / np.array(seconds[PLAIN])
        low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).round(4).tolist()
        peak, floor = peaks[case], peaks[PLAIN]
        rows.append({
            "case": f"{where}: {case}", "baseline": f"{where}: {PLAIN}",
            "ratio": ratio, "low": low, "high": high,
            "peak_memory_ratio": round(peak / floor, 4) if peak is not None and floor else None,
        })  # fmt: skip
    return rows


def _apart(*work: str | int) -> int | None:
    # In a new process, so that no case inherits what another left behind.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start_measuring) as pool:
        return pool.submit(_peak, *work).result()


def _peak(network: str, size: int, batch: int, device: str, seed: int, case: str) -> int | None:
    # Bytes that a training needs at most, network, optimizer and attention memory included.
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject = _Subject(network, size, batch, device, seed, case)
        subject.run(subject.images)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    small = _Subject("scenes", 32, 2, device, seed, case)  # loads code, so that only work counts
    small.run(small.images)
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is used now
    except OSError:
        return None
    before = _resident_peak()
    subject = _Subject(network, size, batch, device, seed, case)
    subject.run(subject.images)
    return _resident_peak() - before
