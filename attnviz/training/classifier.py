"""Training loops, short enough to read from top to bottom.

:func:`train_classifier` trains a small five-stage network to name what a picture shows. It needs
no file: the pictures are drawn, kept as bytes in memory, and every random choice follows from
``(seed, epoch)``. So a run that was killed, at any moment, continues to the very weights that it
would have reached undisturbed.

A run is a folder: ``config.json``, ``checkpoint.pt`` (after every epoch), ``history.csv`` and, at
the end, ``network.safetensors`` with its card ``network.md`` and ``metrics.json``.
"""

import hashlib
import math
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from .. import __version__
from ..data.scenes import Scenes
from ..files import write_whole
from ..metrics import average_precision
from ..networks import FiveStage
from .runs import (
    Device,
    Precision,
    alone,
    batches,
    check_choices,
    check_counts,
    check_rates,
    epoch_seed,
    json_bytes,
    network_bytes,
    normalized,
    one_cycle,
    open_run,
    reproducible,
    resolved,
    save_run,
    start_fabric,
    table,
)

__all__ = ["TrainConfig", "train_classifier"]

Network = Literal["scenes_fc", "scenes_conv"]
Data = Literal["scenes"]
Objects = Literal["few", "several", "both"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training depends on."""

    network: Network = "scenes_fc"
    """``scenes_fc`` or ``scenes_conv``: :class:`FiveStage` with that head."""
    data: Data = "scenes"
    """The data set; *scenes* is generated."""
    objects: Objects = "both"
    """Scenes with ``few`` large objects, ``several`` small ones, or half of ``both``."""
    images: int = 4000
    """Number of training images."""
    validation_images: int = 800
    """Number of images that the network never sees and is measured on."""
    limit: int | None = None
    """At most so many images of either kind; for a quick look."""
    size: int = 112
    """Height and width of the images, in pixels, a multiple of 16."""
    epochs: int = 12
    """How often every training image is seen."""
    batch_size: int = 8
    """Images per step, over all processes."""
    learning_rate: float = 3e-3
    """The largest learning rate, reached after 15 % of the steps; see :func:`one_cycle`."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    seed: int = 0
    """Number behind everything random: data set, first weights, order, flips and dropout."""
    device: Device = "auto"
    """``auto`` takes a GPU where there is one."""
    precision: Precision = "auto"
    """``auto`` takes bfloat16 where the processor computes with it, else ``32`` bits."""
    threads: int = 1
    """Processor threads. A larger number is faster on an idle machine and rounds differently."""

    def __post_init__(self) -> None:
        check_choices(
            self, network=Network, data=Data, objects=Objects, device=Device, precision=Precision
        )
        check_counts(
            self, images=2, validation_images=1, limit=2, size=32, epochs=1, batch_size=2, seed=0,
            threads=1,
        )  # fmt: skip
        check_rates(self, learning_rate=math.inf, weight_decay=math.inf)
        if self.size % 16:
            raise ValueError(
                f"expected `size` as a multiple of 16, got {self.size}; "
                f"take {self.size // 16 * 16 or 32}"
            )

    @property
    def head(self) -> Literal["fc", "conv"]:
        """The head of the network."""
        return "fc" if self.network == "scenes_fc" else "conv"

    @property
    def command(self) -> str:
        """The command, or where the command line has no such option the call, for this run."""
        options = ("network", "data", "limit", "epochs", "seed", "device")
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {f.name: changed[f.name] for f in fields(self) if changed[f.name] != f.default}
        if changed.keys() - set(options):
            given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
            return f'train_classifier(TrainConfig({given}), "RUN")'
        always = {name: getattr(self, name) for name in ("data", "network", "epochs", "seed")}
        given = " ".join(f"--{name} {value}" for name, value in {**always, **changed}.items())
        return f"attnviz train classifier {given} --out RUN"


def train_classifier(
    config: TrainConfig, out: str | Path, resume: bool = False, *, progress: bool = True
) -> Path:
    """Trains a network to say which classes a picture shows; several may be right.

    Binary cross-entropy, AdamW, one-cycle learning rate, horizontal flips. On one process of the
    same machine and thread number, equal configs give equal bits, interrupted or not. The random
    state of the caller is left alone. Under torchrun each process takes its share of every batch.

    Args:
        config: What to train, on what, how.
        out: The folder of the run; made if it is missing.
        resume: Whether to continue the run in `out` after its last whole epoch. A finished run
            is left as it is.
        progress: Whether to show bars on stderr.

    Returns:
        The folder of the run. Its ``network.safetensors`` is for
        ``load_network(config.network, weights=...)``.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        FileNotFoundError: `resume` is True and there is no checkpoint.
        ValueError: The run in `out` has another config, its checkpoint is damaged, the device is
            missing, or the loss is not finite.
    """
    out = Path(out)
    fabric = start_fabric(config)
    state = open_run(config, out, resume, fabric, ("task", "optimizer"))
    if state and state["epoch"] == config.epochs and (out / "network.md").is_file():
        return out
    with alone(out, fabric), reproducible(config, fabric):
        torch.manual_seed(config.seed)
        model = FiveStage(len(Scenes.class_names), config.head, config.size)
        task = _Task(model).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(task.parameters(), weight_decay=config.weight_decay)
        task, optimizer = fabric.setup(task, optimizer)
        if state is None:
            state = {"config": asdict(config), "epoch": 0, "history": [], "metrics": {}}
        else:
            task.load_state_dict(state.pop("task"))
            optimizer.load_state_dict(state.pop("optimizer"))
        _save_epoch(out, state, task, optimizer, fabric)  # and what a killed run left unwritten

        if state["epoch"] < config.epochs:
            bars = progress and fabric.is_global_zero
            train = fabric.to_device(_drawn(config, "train", bars))
            validation = fabric.to_device(_drawn(config, "val", bars))
            with _bar(config, len(train[0]), state, bars) as bar:
                while state["epoch"] < config.epochs:
                    row = _train_epoch(state, config, task, optimizer, train, fabric, bar)
                    state["metrics"] = metrics = _validate(config, model, *validation)
                    row["validation_loss"] = metrics["loss"]
                    row["mean_average_precision"] = metrics["mean_average_precision"]
                    state["history"].append(row)
                    state["epoch"] += 1
                    _save_epoch(out, state, task, optimizer, fabric)
                    bar.set_postfix_str(_progress(state, row["loss"]))
        if fabric.is_global_zero:
            _write_network(out, config, model, state, fabric)
        fabric.barrier()
    return out


# ---------------------------------------------------------------------------------------- loop


class _Task(nn.Module):
    # The network and its loss. A flattened layer has to find each part at each place anew and
    # learns slowly; beside it a linear layer on the averaged last stage, which sees every place
    # at once, teaches the stages. It is left out of the trained network.
    def __init__(self, model: FiveStage) -> None:
        super().__init__()
        self.model = model
        channels, classes = model.stage5[-3].out_channels, len(Scenes.class_names)
        self.auxiliary = nn.Linear(channels, classes) if model.head == "fc" else None

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        activation = self.model.last_stage(images)
        scores = self.model.classify(activation).float()
        loss = binary_cross_entropy_with_logits(scores, targets)
        if self.auxiliary is None:
            return loss, torch.zeros_like(loss)
        scores = self.auxiliary(activation.mean(dim=(2, 3))).float()
        return loss, binary_cross_entropy_with_logits(scores, targets)


def _train_epoch(
    state: dict,
    config: TrainConfig,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: tuple[UInt8[Tensor, "b 3 h w"], Float[Tensor, "b k"]],
    fabric: Fabric,
    bar: tqdm,
) -> dict[str, float]:
    images, targets = train
    epoch, start = state["epoch"], perf_counter()
    generator = torch.Generator().manual_seed(epoch_seed(config.seed, epoch))
    torch.manual_seed(epoch_seed(config.seed, epoch) + fabric.global_rank)  # dropout
    order = torch.randperm(len(images), generator=generator).to(images.device)
    flips = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    parts = batches(order, config.batch_size)
    total = torch.zeros((), device=images.device)
    task.train()
    for step, batch in enumerate(parts):
        rate = config.learning_rate * one_cycle((epoch + step / len(parts)) / config.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        mine = batch[fabric.global_rank :: fabric.world_size]
        pixels = torch.where(flips[mine, None, None, None], images[mine].flip(3), images[mine])
        loss, auxiliary = task(_normalized(pixels), targets[mine])
        optimizer.zero_grad()
        fabric.backward(loss + auxiliary)
        optimizer.step()
        total += loss.detach()
        bar.update(len(batch))
        if step % 20 == 19 or step + 1 == len(parts):
            mean = total.item() / (step + 1)
            if not math.isfinite(mean):
                raise ValueError(
                    f"expected a finite loss, got {mean} in epoch {epoch + 1}, step {step + 1}; "
                    f"lower `learning_rate` (now {config.learning_rate})"
                )
            bar.set_postfix_str(_progress(state, mean))
    seconds = perf_counter() - start
    return {
        "epoch": epoch + 1,
        "loss": mean,
        "images_per_second": sum(map(len, parts)) / seconds,
        "seconds": seconds,
    }


@torch.no_grad()
def _validate(
    config: TrainConfig, model: nn.Module, images: UInt8[Tensor, "b 3 h w"], targets: Tensor
) -> dict[str, object]:
    model.eval()
    scores = torch.cat([model(_normalized(batch)).float() for batch in images.split(100)])
    loss = binary_cross_entropy_with_logits(scores, targets).item()
    areas = average_precision(scores, targets)
    kinds, start = {}, 0
    for kind, count in _counts(config, config.validation_images):
        part = slice(start, start := start + count)
        mean = average_precision(scores[part], targets[part]).nanmean().item()
        kinds[kind] = {"images": count, "mean_average_precision": mean}
    return {
        "images": len(images),
        "loss": loss,
        "mean_average_precision": areas.nanmean().item(),
        "objects": kinds,
        "positives": dict(zip(Scenes.class_names, targets.sum(0).int().tolist(), strict=True)),
        "average_precision": {
            name: None if math.isnan(area) else area  # JSON knows no NaN
            for name, area in zip(Scenes.class_names, areas.tolist(), strict=True)
        },
    }


def _normalized(pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    return normalized(pixels, FiveStage.mean, FiveStage.std)


def _bar(config: TrainConfig, count: int, state: dict, shown: bool) -> tqdm:
    seen = sum(map(len, batches(torch.arange(count), config.batch_size)))
    return tqdm(
        desc=config.network, total=seen * config.epochs, initial=seen * state["epoch"],
        unit=" images", disable=not shown, mininterval=0.5,
    )  # fmt: skip


def _progress(state: dict, loss: float) -> str:
    last = state["history"][-1:]
    score = f", mAP={last[0]['mean_average_precision']:.3f}" if last else ""
    return f"epochs={state['epoch']}, loss={loss:.3f}{score}"


# ---------------------------------------------------------------------------------------- data


def _counts(config: TrainConfig, images: int) -> list[tuple[str, int]]:
    # How many scenes of each kind: (kind, count), none of them empty.
    images = min(images, config.limit or images)
    if config.objects != "both":
        return [(config.objects, images)]
    halves = [("few", images // 2), ("several", images - images // 2)]
    return [(kind, count) for kind, count in halves if count]


def _drawn(
    config: TrainConfig, split: Literal["train", "val"], shown: bool
) -> tuple[UInt8[Tensor, "b 3 h w"], Float[Tensor, "b k"]]:
    # The whole split as bytes: 38 kB per image, drawn once instead of in every epoch.
    counts = _counts(config, config.images if split == "train" else config.validation_images)
    total = sum(count for _, count in counts)
    images = torch.empty(total, 3, config.size, config.size, dtype=torch.uint8)
    targets = torch.empty(total, len(Scenes.class_names))
    with tqdm(desc=f"drawing {split}", total=total, unit=" images", disable=not shown) as bar:
        row = 0
        for kind, count in counts:
            scenes = Scenes(split, count, config.seed, config.size, kind)
            for i in range(count):
                images[row], targets[row], _ = scenes.training_item(i)
                row += 1
                bar.update()
    return images.contiguous(memory_format=torch.channels_last), targets


def _save_epoch(
    out: Path, state: dict, task: nn.Module, optimizer: torch.optim.Optimizer, fabric: Fabric
) -> None:
    if fabric.is_global_zero:
        save_run(out, state, task=task, optimizer=optimizer)
    fabric.barrier()


# ------------------------------------------------------------------------------- network and card


def _write_network(
    out: Path, config: TrainConfig, model: FiveStage, state: dict, fabric: Fabric
) -> None:
    metrics = state["metrics"]
    metadata = {
        "class_names": ",".join(Scenes.class_names),
        "head": config.head,
        "size": str(config.size),
        "command": config.command,
        "data": f"{config.data}, generated, {_kinds(config, config.images)}",
        "mean_average_precision": (
            f"{metrics['mean_average_precision']:.4f} on {metrics['images']} validation images"
        ),
    }
    content = network_bytes(model.state_dict(), metadata)
    write_whole(out / "network.safetensors", content)
    write_whole(out / "metrics.json", json_bytes(metrics))
    write_whole(out / "network.md", _card(config, model, state, fabric, content).encode())


def _kinds(config: TrainConfig, images: int) -> str:
    counts = _counts(config, images)
    return " and ".join(f"{count} images with {kind} objects" for kind, count in counts)


def _card(
    config: TrainConfig, model: FiveStage, state: dict, fabric: Fabric, content: bytes
) -> str:
    metrics, last = state["metrics"], state["history"][-1]
    head = {
        "fc": "a hidden layer on the flattened last stage",
        "conv": "one 1 x 1 convolution per class on the last stage, averaged",
    }[config.head]
    device, precision = resolved(config)
    seconds = sum(row["seconds"] for row in state["history"])
    facts = {
        "data": f"*{config.data}*, **generated**: drawn from the seed by `attnviz.data.scenes`",
        "training images": f"{_kinds(config, config.images)}, split `train`",
        "validation images": f"{_kinds(config, config.validation_images)}, split `val`",
        "seed": f"{config.seed}, for data, first weights, order, flips and dropout",
        "epochs": f"{config.epochs}; the last is kept, none is chosen",
        "optimizer": f"AdamW, batches of {config.batch_size}, one cycle up to "
        f"{config.learning_rate}, weight decay {config.weight_decay}",
        "loss": f"binary cross-entropy; at the end {last['loss']:.4f} in training, "
        f"{metrics['loss']:.4f} in validation",
        "computed on": f"{device}, precision {precision}, threads: {config.threads}, "
        f"processes: {fabric.world_size}",
        "time": f"{seconds:.0f} s, without drawing and validation",
        "versions": f"attnviz {__version__}, torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "file": f"{len(content):,} bytes, sha256 `{hashlib.sha256(content).hexdigest()}`",
        "license": "the package's",
    }
    overall = [("all", metrics["images"], metrics["mean_average_precision"])]
    overall += [
        (f"{kind} objects", part["images"], part["mean_average_precision"])
        for kind, part in metrics["objects"].items()
    ]
    classes = [
        (name, metrics["positives"][name], "none" if area is None else area)
        for name, area in metrics["average_precision"].items()
    ]
    return _CARD.format(
        network=config.network,
        size=config.size,
        head=head,
        command=config.command,
        facts=table(("", ""), facts.items()),
        overall=table(("validation images", "n", "mean average precision"), overall),
        classes=table(("class", "images that show it", "average precision"), classes),
    )


_CARD = """# {network}

A small five-stage network that names the drawn objects in a picture of {size} x {size} pixels;
several answers may be right. Its head is {head}.
It is made for teaching and for tests of attention maps.

## How it was made

```
{command}
```

{facts}

Repeated with these versions on the same kind of processor, the command gives the same bytes;
elsewhere rounding differs, and with it, slightly, the weights and the numbers below.

## Metrics

Average precision is the area under the precision-recall curve, not interpolated, on the
validation images; one training, one seed.

{overall}

{classes}

## Known limits

* It knows these drawn classes and nothing else; its answer to a photograph means nothing.
* Training and validation images come from the same program: the numbers say how well it does on
  new scenes of this kind, not on other pictures.
* Its scores rank images; their sigmoid is not a calibrated probability.
* In the training images contexts go with classes more often than not, so it may use them.
"""
