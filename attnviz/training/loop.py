"""Epochs and steps, with checkpoints between them: what every training of chapter 4 shares.

A :class:`Lesson` says what a batch teaches and what is kept; :func:`run_epochs` does the rest.
Everything random follows from the seed, the epoch and the step, so a checkpoint needs no random
state: a run goes on after its last checkpoint to the bits it would have reached undisturbed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from lightning_fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm

from ..evolution import stop_requested
from .pictures import Batch, Draws, Pictures, groups, prefetched
from .runs import (
    Device,
    Precision,
    batches,
    check_choices,
    check_counts,
    check_rates,
    epoch_seed,
    normalized,
    one_cycle,
    poly,
    step,
    steps,
)

__all__ = [
    "PRESETS",
    "Lesson",
    "Loop",
    "LoopConfig",
    "new_state",
    "optimizer_for",
    "run_epochs",
    "train_step",
]

Schedule = Literal["one_cycle", "poly", "step", "steps"]
Optimizer = Literal["adamw", "sgd"]
SCHEDULES = {"one_cycle": one_cycle, "poly": poly, "step": step, "steps": steps}


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What epochs and steps depend on."""

    epochs: int = 12
    """How often every training image is seen."""
    batch_size: int = 8
    """Images per step, over all processes."""
    accumulate: int = 1
    """In how many parts a process computes its share of a step; more parts need less memory."""
    optimizer: Optimizer = "adamw"
    """``adamw`` or ``sgd``."""
    learning_rate: float = 3e-3
    """The largest learning rate."""
    multipliers: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Factors on it: pretrained weights, their biases, new weights, their biases."""
    weight_decay: float = 0.01
    """Weight decay."""
    decay_biases: bool = True
    """Whether biases decay, too."""
    momentum: float = 0.9
    """SGD's momentum."""
    nesterov: bool = False
    """Whether it is Nesterov's."""
    schedule: Schedule = "one_cycle"
    """``one_cycle``, ``poly`` (power 0.9), ``step`` (a tenth in the last third) or ``steps`` (a
    tenth after each third)."""
    shuffle: bool = True
    """Whether each epoch has its own order."""
    flips: bool = True
    """Whether half of the views are mirrored."""
    crops: bool = False
    """Whether a view is a part of the image, half to all of each side long."""
    jitter: bool = False
    """Whether colors vary, as in the released training."""
    seed: int = 0
    """Number behind everything random."""
    device: Device = "auto"
    """``auto`` takes a GPU where there is one."""
    precision: Precision = "auto"
    """``auto`` takes bfloat16 where the processor computes with it, else ``32`` bits."""
    threads: int = 1
    """Processor threads of the computation; another number rounds differently."""
    workers: int = 1
    """Threads that read pictures ahead."""
    checkpoint_steps: int | None = None
    """Save every so many steps as well, not only after each epoch."""
    checkpoint_seconds: int | None = None
    """Save as soon as the last checkpoint is so old, as well."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # JSON has lists
        check_choices(
            self, optimizer=Optimizer, schedule=Schedule, device=Device, precision=Precision
        )
        check_counts(
            self, epochs=1, batch_size=1, accumulate=1, seed=0, threads=1,
            workers=1, checkpoint_steps=1, checkpoint_seconds=1,
        )  # fmt: skip
        check_rates(self, learning_rate=math.inf, weight_decay=math.inf, momentum=1)
        if len(self.multipliers) != 4:
            raise ValueError(
                f"expected four `multipliers`, got {self.multipliers}; give those of old weights, "
                "old biases, new weights and new biases"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(LoopConfig):
    """What the trainings depend on whose attention is recorded."""

    measured: int = 300
    """After each epoch, recall and noise are measured on so many training images with masks."""
    watched: int = 6
    """Number of image-class pairs that the player shows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, measured=0, watched=1)


_SGD = {"optimizer": "sgd", "epochs": 15, "learning_rate": 1e-3}
PRESETS: dict[str, dict[str, object]] = {
    "small": {},
    # 30,000 steps of 5 images are 14.2 passes over VOC's 10,582, a tenth of the rate after two
    # thirds; biases learn twice as fast and don't decay, as in the author's first code
    "thesis": _SGD
    | {"batch_size": 5, "schedule": "step", "weight_decay": 2e-4, "decay_biases": False}
    | {"multipliers": (1.0, 2.0, 1.0, 2.0)},
    "released": _SGD
    | {"batch_size": 5, "schedule": "step", "weight_decay": 5e-4, "nesterov": True}
    | {"multipliers": (1.0, 2.0, 10.0, 20.0), "shuffle": False, "flips": False, "jitter": True},
    # what later papers on weak supervision mostly share
    "literature": _SGD
    | {"batch_size": 16, "schedule": "poly", "weight_decay": 5e-4, "learning_rate": 0.01}
    | {"multipliers": (1.0, 1.0, 10.0, 10.0), "crops": True},
}


class Lesson(Protocol):
    """What a training does with its batches."""

    def learn(
        self, batch: Batch, images: Float[Tensor, "b 3 h w"], place: tuple[int, int]
    ) -> Float[Tensor, " b"]:
        """Returns the loss of each image; `place` is the epoch and a step that never repeats."""

    def finish_epoch(self, epoch: int) -> dict[str, float]:
        """Measures and records after an epoch, from 1; returns more columns of the history."""

    def save(self, state: dict) -> None:
        """Writes a checkpoint."""


@dataclass
class Loop:
    """A training under way."""

    config: LoopConfig
    out: Path
    fabric: Fabric
    task: nn.Module
    """What is called and learns, set up by Fabric."""
    optimizer: torch.optim.Optimizer
    pictures: Pictures
    mean: Sequence[float]
    std: Sequence[float]
    shown: bool
    """Whether to show a bar."""
    views: Callable[..., list[Batch]] = groups
    """Reads the views of a step, called as :func:`~attnviz.training.pictures.groups`."""
    held: int = 1
    """For how many steps the learning rate stays as it is."""


def optimizer_for(
    config: LoopConfig, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Makes the optimizer, its learning rates multiplied for weights and biases, old and new."""
    groups = []
    for parameters, (weight, bias) in (
        (old, config.multipliers[:2]), (new, config.multipliers[2:])
    ):  # fmt: skip
        for members, factor, decays in (
            ([p for p in parameters if p.ndim > 1], weight, True),
            ([p for p in parameters if p.ndim == 1], bias, config.decay_biases),
        ):
            if members:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": members, "factor": factor, "weight_decay": decay})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.learning_rate)
    return torch.optim.SGD(
        groups, config.learning_rate, config.momentum, nesterov=config.nesterov
    )  # fmt: skip


def run_epochs(loop: Loop, state: dict, lesson: Lesson) -> bool:
    """Trains from where `state` stands to the last epoch.

    Args:
        loop: The training.
        state: ``epoch`` and ``step`` (done), ``history``, ``running`` (the sums of this epoch).
        lesson: What a batch teaches.

    Returns:
        Whether it got to the end; False if :func:`attnviz.evolution.request_stop` ended it.

    Raises:
        ValueError: The loss is not finite.
    """
    config, whole = loop.config, _whole(loop)
    bar = tqdm(
        desc=str(loop.out), total=whole * config.epochs, unit=" images", disable=not loop.shown,
        initial=whole * state["epoch"] + state["step"] * config.batch_size, mininterval=0.5,
    )  # fmt: skip
    with bar:
        while state["epoch"] < config.epochs:
            if not _epoch(loop, state, lesson, bar):
                return False
            started, running = perf_counter(), state["running"]
            row = {
                "epoch": state["epoch"] + 1,
                "loss": _shared_mean(loop, _mean_loss(loop, state)),
                "seconds": running["seconds"],
                "images_per_second": whole / running["seconds"],
            }
            state["epoch"], state["step"], state["running"] = state["epoch"] + 1, 0, _nothing()
            row |= lesson.finish_epoch(state["epoch"])
            row["measuring_seconds"] = perf_counter() - started
            state["history"].append(row)
            lesson.save(state)
            bar.set_postfix_str(_progress(state, row["loss"]))
            if _stops(loop):
                return state["epoch"] == config.epochs
    return True


def _epoch(loop: Loop, state: dict, lesson: Lesson, bar: tqdm) -> bool:
    config, fabric, epoch = loop.config, loop.fabric, state["epoch"]
    draws = Draws.of(
        config.seed, epoch, len(loop.pictures), shuffle=config.shuffle, flips=config.flips,
        crops=config.crops,
    )  # fmt: skip
    parts = batches(draws.order, config.batch_size)
    schedule = SCHEDULES[config.schedule]
    saved = monotonic()
    mine = [part[fabric.global_rank :: fabric.world_size].tolist() for part in parts]
    jobs = [
        partial(loop.views, loop.pictures, indices, draws, config.jitter, config.accumulate)
        for indices in mine[state["step"] :]
    ]
    loop.task.train()
    started = perf_counter()
    for views in prefetched(jobs, config.workers):
        number = state["step"]
        since = number - (epoch * len(parts) + number) % loop.held
        rate = config.learning_rate * schedule((epoch + since / len(parts)) / config.epochs)
        for group in loop.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        place = (epoch, epoch * len(parts) + number)
        running = state["running"]
        running["loss"] = running["loss"].to(fabric.device) + train_step(
            loop, lesson, views, place
        )
        state["step"] += 1
        bar.update(len(parts[number]))
        if state["step"] % 20 == 0 or state["step"] == len(parts):
            bar.set_postfix_str(_progress(state, _mean_loss(loop, state)))
        if state["step"] < len(parts):
            stops = fabric.world_size == 1 and stop_requested(loop.out)
            if stops or _due(config, state["step"], saved, fabric):
                running["seconds"] += perf_counter() - started
                lesson.save(state)
                saved, started = monotonic(), perf_counter()
            if stops:
                return False
    state["running"]["seconds"] += perf_counter() - started
    return True


def train_step(
    loop: Loop, lesson: Lesson, views: list[Batch], place: tuple[int, int]
) -> Float[Tensor, ""]:
    """Learns from the views of one step; `place` as in :meth:`Lesson.learn`.

    Returns:
        The mean loss.
    """
    fabric = loop.fabric
    torch.manual_seed(epoch_seed(loop.config.seed, place[1]) + fabric.global_rank)  # dropout
    total = torch.zeros((), device=fabric.device)
    loop.optimizer.zero_grad()
    for number, batch in enumerate(views):
        images = normalized(fabric.to_device(batch.pixels), loop.mean, loop.std)
        with fabric.no_backward_sync(loop.task, enabled=number + 1 < len(views)):
            losses = lesson.learn(batch, images, place)
            readable = batch.readable.to(losses.device)
            loss = torch.where(readable, losses, 0).mean() * batch.share
            fabric.backward(loss)
        total += loss.detach()
    loop.optimizer.step()
    return total


def _due(config: LoopConfig, done: int, saved: float, fabric: Fabric) -> bool:
    if config.checkpoint_steps is not None and done % config.checkpoint_steps == 0:
        return True
    if config.checkpoint_seconds is None:
        return False
    return fabric.broadcast(monotonic() - saved >= config.checkpoint_seconds)


def _stops(loop: Loop) -> bool:
    return loop.fabric.broadcast(stop_requested(loop.out))


def _mean_loss(loop: Loop, state: dict) -> float:
    mean = state["running"]["loss"].item() / state["step"]
    if not math.isfinite(mean):
        raise ValueError(
            f"expected a finite loss, got {mean} in epoch {state['epoch'] + 1}, step "
            f"{state['step']}; lower `learning_rate` (now {loop.config.learning_rate})"
        )
    return mean


def _shared_mean(loop: Loop, value: float) -> float:
    tensor = loop.fabric.to_device(torch.tensor(value, dtype=torch.float64))
    return loop.fabric.all_reduce(tensor, reduce_op="mean").item()


def _nothing() -> dict[str, object]:
    return {"loss": torch.zeros((), dtype=torch.float64), "seconds": 0.0}


def new_state(config: dict) -> dict:
    """Returns the state of a run that has not begun."""
    return {"config": config, "epoch": 0, "step": 0, "history": [], "running": _nothing()}


def _whole(loop: Loop) -> int:
    return sum(map(len, batches(torch.arange(len(loop.pictures)), loop.config.batch_size)))


def _progress(state: dict, loss: float) -> str:
    last = state["history"][-1] if state["history"] else {}
    area = last.get("mean_average_precision")
    score = "" if area is None else f", mAP={area:.3f}"
    return f"epochs={state['epoch']}, loss={loss:.3f}{score}"
