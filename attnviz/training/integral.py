"""The integral attention model: a network that learns the accumulated maps themselves (OAA+).

:func:`train_integral` takes the memory of a run of :func:`~attnviz.training.train_oaa` as soft
labels, on the same pictures. From the memory of a run with the drop layer it makes OAA+++.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..evolution import EvolutionWriter
from ..files import first_line, write_whole
from ..memory import AttentionMemory
from ..networks import OAANetwork, check_weights, oaa_network
from ..oaa import Reduction, enhancement_loss, hybrid_loss, soft_cross_entropy
from .loop import PRESETS, AttentionConfig, Loop, new_state, optimizer_for, run_epochs
from .measure import (
    averages,
    grids_of,
    masked_pairs,
    observe,
    qualities,
    quality_rows,
    watched_pairs,
    watches,
)
from .oaa import OAAConfig, Preset, Task, accumulated_targets, gathered, opened, write_network
from .pictures import Batch
from .runs import (
    alone,
    check_choices,
    check_rates,
    json_bytes,
    open_run,
    reproducible,
    save_run,
    start_fabric,
    together,
)

__all__ = ["IntegralConfig", "integral_config", "train_integral"]

Loss = Literal["hybrid", "mce", "ep"]


@dataclass(frozen=True, kw_only=True)
class IntegralConfig(AttentionConfig):
    """Everything that a training on accumulated maps depends on; see :func:`integral_config`."""

    run: str
    """The folder of a finished training with accumulation; its pictures are learned from."""
    weights: str = "auto"
    """``auto``: ImageNet's, or for ``scenes``, which has none, the run's own network;
    ``classifier``: the run's own network; ``random``; or a file."""
    preset: Preset = "small"
    """Where the values came from."""
    loss: Loss = "hybrid"
    """``hybrid`` (Eq. 4.8), ``mce`` (4.5) or ``ep``, its positive part alone (4.6)."""
    reduction: Reduction = "thesis"
    """``thesis`` averages each class by itself, ``released`` all classes together."""
    split: float = 0.0
    """What divides the enhanced region from the constrained one (table 4.6)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, preset=Preset, loss=Loss, reduction=Reduction)
        check_rates(self, split=1)


def integral_config(
    run: str | Path, preset: Preset | None = None, **changes: object
) -> IntegralConfig:
    """Returns the config of a preset, changed where the caller wants it.

    Args:
        run: The folder of a finished training with accumulation.
        preset: Whose values, as in :func:`~attnviz.training.oaa_config`; the run's if None.
            ``released`` pools the classes in the loss as well.
        **changes: Fields of :class:`IntegralConfig`.
    """
    preset = read_config(Path(run)).preset if preset is None else preset
    if preset not in PRESETS:
        raise ValueError(f"expected `preset` in {get_args(Preset)}, got {preset!r}")
    own = {"reduction": "released"} if preset == "released" else {}
    return IntegralConfig(
        **{"run": str(run), "preset": preset, **PRESETS[preset], **own, **changes}
    )


def read_config(run: Path) -> OAAConfig:
    """Reads the config of a training with accumulation.

    Raises:
        FileNotFoundError: There is no finished run.
        ValueError: It is another kind of run, or damaged.
    """
    if not (run / "metrics.json").is_file() or not (run / "memory").is_dir():
        raise FileNotFoundError(
            f"expected a finished run of `attnviz train oaa` in {str(run)!r}, got none; "
            "train it, or finish it with --resume"
        )
    try:
        return OAAConfig(**json.loads((run / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"expected the config of a run of `attnviz train oaa` in {str(run)!r}, got one that "
            f"cannot be read ({first_line(error)}); train it again"
        ) from error


def train_integral(
    config: IntegralConfig,
    out: str | Path,
    resume: bool = False,
    *,
    data: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Trains a network whose class maps are the accumulated ones: OAA+, after OAA++ OAA+++.

    Bits, several processes and the caller's random state are as in
    :func:`~attnviz.training.train_oaa`. The maps are read off as from a classifier, ReLU and
    division by the maximum, not through the sigmoid of the loss.

    Args:
        config: What to train, on what, how.
        out: The folder of the run; made if it is missing.
        resume: Whether to continue the run in `out` after its last checkpoint.
        data: The data root; see :func:`attnviz.networks.data_root`.
        progress: Whether to show bars on stderr.

    Returns:
        The folder of the run. Its ``network.safetensors`` is for ``load_network("oaa", ...)``.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        FileNotFoundError: A run to resume, to learn from, or data are missing.
        ValueError: The run in `out` has another config, its checkpoint is damaged, the device is
            missing, or the loss is not finite.
        ConnectionError: Another process has ended; the run can be resumed.
    """
    out, run = Path(out), Path(config.run)
    source = read_config(run)
    fabric = start_fabric(config)
    state = open_run(config, out, resume, fabric, ("task", "optimizer"))
    if state and state["epoch"] == config.epochs and (out / "metrics.json").is_file():
        return out
    check_weights(_weights(config, source))
    memory = AttentionMemory.load(run / "memory")
    shown = progress and fabric.is_global_zero
    with alone(out, fabric), reproducible(config, fabric), together(out, fabric):
        pictures = opened(source, "train", data, shown)
        if tuple(pictures.image_ids) != memory.image_ids:
            raise ValueError(
                f"expected the pictures that {str(run)!r} learned from, got others; put its "
                "data back, or train it again"
            )
        torch.manual_seed(config.seed)
        network = oaa_network(
            source.network, len(pictures.class_names), _weights(config, source),
            ceil_mode=source.ceil_mode, data=data,
        )  # fmt: skip
        optimizer = optimizer_for(config, network.old_parameters(), network.new_parameters())
        task = Task(network).to(memory_format=torch.channels_last)
        task, optimizer = fabric.setup(task, optimizer)
        if state is None:
            state = new_state(asdict(config))
        else:
            task.load_state_dict(state.pop("task"))
            optimizer.load_state_dict(state.pop("optimizer"))
        loop = Loop(
            config, out, fabric, task, optimizer, pictures, network.mean, network.std, shown
        )
        lesson = _Learning(loop, network, memory, source)
        lesson.save(state)
        if run_epochs(loop, state, lesson):
            lesson.finish(state)
        fabric.barrier()
    return out


def _weights(config: IntegralConfig, source: OAAConfig) -> str | Path:
    own = config.weights == "auto" and source.network == "scenes"
    if own or config.weights == "classifier":
        return Path(config.run) / "network.safetensors"
    return config.weights


class _Learning:
    # What a step teaches, what an epoch measures.
    def __init__(
        self, loop: Loop, network: OAANetwork, memory: AttentionMemory, source: OAAConfig
    ) -> None:
        self.loop, self.network, self.memory, self.source = loop, network, memory, source
        pictures, config, self.first = loop.pictures, loop.config, loop.fabric.is_global_zero
        if self.first:
            self.measured = masked_pairs(pictures, config.measured) if config.measured else []
            self.watched = watched_pairs(pictures, config.watched)
            text = json.dumps(asdict(config)) + memory.run_id
            self.writer = EvolutionWriter(
                loop.out, watches(pictures, self.watched, grids_of(network, pictures.sizes)),
                run_id=hashlib.sha256(text.encode()).hexdigest()[:16], network=source.network,
                data=source.data, class_names=pictures.class_names, epochs=config.epochs,
                method="integral", rule=memory.rule, drop=source.drop != "none",
            )  # fmt: skip

    def learn(
        self, batch: Batch, images: Float[Tensor, "b 3 h w"], place: tuple[int, int]
    ) -> Float[Tensor, " b"]:
        maps, _ = self.loop.task(images)
        maps = maps.float()
        wanted, known = accumulated_targets(
            self.memory, self.loop.pictures, batch, tuple(maps.shape[1:])
        )
        if not known.any():  # the step takes part all the same, as several processes need it to
            return maps.mean(dim=(1, 2, 3)) * 0
        wanted, known = wanted.to(maps.device), known.to(maps.device)
        loss = _loss(self.loop.config, maps[known], wanted[known])
        return known * loss * (len(known) / known.sum())

    def finish_epoch(self, epoch: int) -> dict[str, float]:
        if not self.first:
            return {}
        pictures = self.loop.pictures
        seen = observe(self.network, pictures, {*self.measured, *self.watched}, self.loop.fabric)
        recall, noise = averages(qualities(pictures, self.measured, seen.get))
        names = {pair: (pictures.image_ids[pair[0]], pair[1]) for pair in self.watched}
        there = [pair for pair in self.watched if pair in seen]
        self.writer.write(
            epoch, {names[pair]: seen[pair] for pair in there},
            scores={names[pair]: seen.scores[pair] for pair in there},
        )  # fmt: skip
        return {"recall_epoch": recall, "noise_epoch": noise}

    def save(self, state: dict) -> None:
        loop = self.loop
        if self.first:
            save_run(loop.out, state, task=loop.task, optimizer=loop.optimizer)
        loop.fabric.barrier()

    def finish(self, state: dict) -> None:
        loop, memory, pictures = self.loop, self.memory, self.loop.pictures
        unreadable = gathered(pictures.unreadable, loop.fabric)
        if not self.first:
            return
        pairs = masked_pairs(pictures)
        text = "final maps" if loop.shown else None
        seen = observe(self.network, pictures, pairs, loop.fabric, text=text)
        ids = pictures.image_ids
        metrics = {
            "loss": state["history"][-1]["loss"],
            "maps": {
                "integral": quality_rows(qualities(pictures, pairs, seen.get), pictures),
                "accumulated": quality_rows(
                    qualities(pictures, pairs, lambda pair: memory[ids[pair[0]], pair[1]]),
                    pictures,
                ),
            },
            "training_images": len(pictures),
            "left_out": {
                "images that cannot be read": {
                    "images": len(unreadable), "first": sorted(unreadable)[:5],
                }
            },
            "seconds": sum(row["seconds"] for row in state["history"]),
            "measuring_seconds": sum(row["measuring_seconds"] for row in state["history"]),
        }  # fmt: skip
        facts = {"targets": memory.run_id, "loss": loop.config.loss}
        write_network(loop, self.network, self.source, metrics, facts, _command(loop.config))
        write_whole(loop.out / "metrics.json", json_bytes(metrics))


def _loss(
    config: IntegralConfig, maps: Float[Tensor, "b k h w"], targets: Float[Tensor, "b k h w"]
) -> Float[Tensor, ""]:
    if config.loss == "mce":
        return soft_cross_entropy(maps, targets, config.reduction)
    loss = hybrid_loss if config.loss == "hybrid" else enhancement_loss
    return loss(maps, targets, config.split, config.reduction)


def _command(config: IntegralConfig) -> str:
    standard = IntegralConfig(run=config.run, preset=config.preset, **PRESETS[config.preset])
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    given = {k: v for k, v in given.items() if v != getattr(standard, k)}
    stated = "".join(f", {name}={value!r}" for name, value in given.items())
    return f'train_integral(integral_config("OAA", {config.preset!r}{stated}), "RUN")'
