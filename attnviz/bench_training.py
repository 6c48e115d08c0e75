"""What training steps cost, in turn, as ratios: accumulation, and segmentation.

A step is all of it: forward, loss, backward, optimizer, and with OAA the attention, the gate and
the update of the memory, with OAA++ the drop layer, too. Every map passes the gate here, which is
the most that a step can cost. A step of a segmentation is compared with the same one written by
hand in plain torch. Reading pictures is left out: trainings do it in threads of their own.
"""

import gc
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch.nn.functional import cross_entropy, interpolate
from tqdm.auto import tqdm

from .bench import (
    Benchmark,
    Row,
    _device_name,
    _quiet,
    _resident_peak,
    _time,
    _trim,
    _versions,
    peaks_apart,
    row_of,
)
from .data.masks import IGNORE
from .deeplab import segmentation_network
from .memory import AttentionMemory
from .networks import oaa_network
from .training.loop import Loop, optimizer_for, train_step
from .training.measure import grids_of
from .training.oaa import Accumulator, OAAConfig, Task, classification_losses, oaa_config
from .training.pictures import Batch, Draws, groups, open_pictures
from .training.runs import normalized, start_fabric
from .training.segment import _Masks as Masks
from .training.segment import _Task as MaskTask
from .training.segment import segment_config, views

__all__ = ["bench_oaa", "bench_segment"]

PLAIN = "training step"
CASES = {PLAIN: None, "training step with OAA": "none", "training step with OAA++": "image"}
BY_HAND, SEGMENT = "segmentation step in plain torch", "segmentation step"
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
    return _bench(dict.fromkeys(list(CASES)[1:], PLAIN), networks, batch, rounds, device, seed,
                  size, memory, progress)  # fmt: skip


def bench_segment(
    networks: Sequence[str] = ("scenes",),
    batch: int = 8,
    rounds: int = 15,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    *,
    size: int | None = None,
    memory: bool = True,
    progress: bool = True,
) -> Benchmark:
    """Measures time and peak memory of DeepLab's training steps against plain torch.

    Args:
        networks: Names for :func:`attnviz.deeplab.segmentation_network`; weights are random.
        batch: See :func:`bench_oaa`, as for the others.
        rounds: How often each case runs, four steps each time.
        device: Where to compute.
        seed: The seed of weights, images and order.
        size: Height and width of the views: 112 for ``scenes``, else 321 if None.
        memory: Whether to measure memory too.
        progress: Whether to show a progress bar.

    Returns:
        The ratios; median and quartiles over the rounds.

    Raises:
        ValueError: An argument is out of range, or a network is unknown.
    """
    return _bench(
        {SEGMENT: BY_HAND}, networks, batch, rounds, device, seed, size, memory, progress
    )


def _bench(
    baselines: Mapping[str, str],
    networks: Sequence[str],
    batch: int,
    rounds: int,
    device: str,
    seed: int,
    size: int | None,
    memory: bool,
    progress: bool,
) -> Benchmark:
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"expected `{name}` of 1 or more, got {value}")
    rows: list[Row] = []
    cases = [*dict.fromkeys(baselines.values()), *baselines]
    total = len(networks) * len(cases) * (rounds + memory)
    with tqdm(total=total, disable=not progress, unit="run") as bar, _quiet():
        for network in networks:
            where = f"{network}, batch {batch}"
            bar.set_description(where)
            large = 224 if PLAIN in cases else 321
            side = size or (112 if network.startswith("scenes") else large)
            subjects = {case: _subject(network, side, batch, device, seed, case) for case in cases}
            names, order = list(cases), random.Random(seed)
            seconds: dict[str, list[float]] = {case: [] for case in cases}
            for subject in subjects.values():
                subject.run(subject.images)
            for _ in range(rounds):
                order.shuffle(names)
                for case in names:
                    seconds[case].append(_time(subjects[case].run, subjects[case].images))
                    bar.update()
            used = subjects[cases[0]].images.device
            del subjects
            peaks: dict[str, int | None] = dict.fromkeys(cases)
            works = [(network, side, batch, used.type, seed, case) for case in cases if memory]
            measured = (
                (_peak(*work) for work in works) if used.type == "cuda"
                else peaks_apart(works, _peak, alone=True)
            )  # fmt: skip
            for work, peak in zip(works, measured, strict=True):
                peaks[work[-1]] = peak
                bar.update()
            rows += [
                row_of(
                    f"{where}: {case}", f"{where}: {baseline}",
                    np.array(seconds[case]) / np.array(seconds[baseline]),
                    (peaks[case], peaks[baseline]),
                )
                for case, baseline in baselines.items()
            ]  # fmt: skip
    return Benchmark(_device_name(used), _versions(), rows, rounds, seed)


def _subject(
    network: str, size: int, batch: int, device: str, seed: int, case: str
) -> "_Subject | _Masks":
    kind = _Masks if case in (SEGMENT, BY_HAND) else _Subject
    return kind(network, size, batch, device, seed, case)


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
        for parts in self.views:
            train_step(self.loop, self, parts, (2, self.steps))
            self.steps += 1

    def learn(
        self, batch: Batch, images: Float[torch.Tensor, "b 3 h w"], place: tuple[int, int]
    ) -> Float[torch.Tensor, " b"]:
        return classification_losses(self.loop, self.accumulator, batch, images, place)[0]


class _Masks:
    # A training on true masks, or the same one by hand.
    def __init__(
        self, network: str, size: int, batch: int, device: str, seed: int, case: str
    ) -> None:
        config = segment_config(
            network=network, crop=size, batch_size=batch, device=device, seed=seed,
            learning_rate=0.0, precision="32",
        )  # fmt: skip
        torch.manual_seed(seed)
        pictures = open_pictures("scenes", "train", size=size, count=STEPS * batch, seed=seed)
        model = segmentation_network(network, len(pictures.class_names), "random")
        optimizer = optimizer_for(config, model.old_parameters(), model.new_parameters())
        fabric = start_fabric(config)
        task = MaskTask(model, config.loss).to(fabric.device, memory_format=torch.channels_last)
        task.train()
        self.model, self.optimizer, self.by_hand = model, optimizer, case == BY_HAND
        if not self.by_hand:
            task, self.optimizer = fabric.setup(task, optimizer)
        self.loop = Loop(
            config, Path(), fabric, task, self.optimizer, pictures, model.mean, model.std, False
        )
        self.lesson = Masks(self.loop, model, None, {})
        draws = Draws.of(seed, 0, len(pictures), shuffle=True, flips=True, crops=False)
        fill = tuple(round(255 * part) for part in model.mean)
        read = partial(views, config, fill, pictures)
        self.views = [read(part.tolist(), draws, False, 1) for part in draws.order.split(batch)]
        self.images = torch.zeros(1, device=fabric.device)  # what says where time is taken

    def run(self, images: torch.Tensor) -> None:
        for number, parts in enumerate(self.views):
            if self.by_hand:
                self.step(parts[0].pixels.to(images.device), parts[0].labels.to(images.device))
            else:
                train_step(self.loop, self.lesson, parts, (0, number))

    def step(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        scores = self.model(normalized(pixels, self.model.mean, self.model.std))
        shown = interpolate(
            scores, labels.shape[1:], mode="bilinear", align_corners=self.model.cornered
        )
        cross_entropy(shown, labels.long(), ignore_index=IGNORE).backward()
        self.optimizer.step()


def _config(network: str, size: int, batch: int, device: str, seed: int, drop: str) -> OAAConfig:
    return oaa_config(
        network=network, size=size, batch_size=batch, device=device, seed=seed, drop=drop,
        start=0, gate=False, learning_rate=0.0,
    )  # fmt: skip


def _peak(network: str, size: int, batch: int, device: str, seed: int, case: str) -> int | None:
    # Bytes that a training needs at most, network, optimizer and attention memory included.
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        subject = _subject(network, size, batch, device, seed, case)
        subject.run(subject.images)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    small = _subject("scenes", 32, 2, device, seed, case)  # loads code, so that only work counts
    small.run(small.images)
    _trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is used now
    except OSError:
        return None
    before = _resident_peak()
    subject = _subject(network, size, batch, device, seed, case)
    subject.run(subject.images)
    return _resident_peak() - before
