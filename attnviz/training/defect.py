"""A classifier that says whether a surface has a defect, from image labels alone.

:func:`train_defect` learns from pictures with and without a defect (thesis 3.4.3.1); where the
defect is, only the maps of the trained network say. No mask is looked at.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..checks import check_choice
from ..data.dagm import load_dagm
from ..data.defects import Defect, Defects, draw_defect
from ..data.masks import MaskedImage
from ..data.surface import load_magnetic_tile
from ..files import write_whole
from ..metrics import average_precision
from ..networks import FiveStage, data_root, load_network
from .loop import Loop, LoopConfig, new_state, optimizer_for, run_epochs
from .oaa import gathered
from .pictures import Batch, Pictures
from .runs import (
    alone,
    check_choices,
    check_counts,
    json_bytes,
    network_bytes,
    normalized,
    open_run,
    reproducible,
    save_run,
    start_fabric,
    table,
    together,
)

__all__ = [
    "CLASS_NAMES", "Data", "DefectConfig", "Surface", "defect_config", "open_surfaces",
    "train_defect",
]  # fmt: skip

CLASS_NAMES = ("defect", "sound")
"""The classes: a defect somewhere, or none."""

Data = Literal["defects", "dagm2007", "magnetic_tile"]
Network = Literal["defects", "squeezenet1_1", "resnet50"]
Preset = Literal["small", "thesis"]
Split = Literal["train", "validation", "test"]

_SIZES = {"defects": 112, "dagm2007": 512, "magnetic_tile": 256}
_PRESETS: dict[str, dict[str, object]] = {
    "small": {"epochs": 10, "batch_size": 16, "multipliers": (0.1, 0.1, 1.0, 1.0)},
    "thesis": {
        "optimizer": "sgd", "epochs": 15, "batch_size": 32, "learning_rate": 1e-3,
        "schedule": "steps", "weight_decay": 1e-4,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DefectConfig(LoopConfig):
    """Everything that a training on surfaces depends on; see :func:`defect_config`."""

    data: Data = "defects"
    """``defects`` are generated; ``dagm2007`` and ``magnetic_tile`` are folders of the data
    root."""
    network: Network = "defects"
    """``defects``: :class:`FiveStage` with its head ``gap``; ``squeezenet1_1``; ``resnet50``, the
    thesis'."""
    weights: str = "auto"
    """``auto``: ImageNet's, for ``defects`` none; ``random``; or a file."""
    preset: Preset = "small"
    """Where the values came from."""
    images: int = 1600
    """Number of generated pictures to learn from."""
    validation_images: int = 400
    """At most so many pictures that are never learned from, to measure on."""
    limit: int | None = None
    """At most so many pictures of either kind; for a quick look."""
    size: int = 112
    """Height and width at the network's input, to which pictures are squeezed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, data=Data, network=Network, preset=Preset)
        check_counts(self, images=2, validation_images=2, limit=2, size=64)
        if self.network == "defects" and self.weights not in ("auto", "random"):
            raise ValueError(
                f"expected `weights` 'auto' or 'random' for the network 'defects', got "
                f"{self.weights!r}; it has no pretrained ones"
            )


def defect_config(preset: Preset | None = None, **changes: object) -> DefectConfig:
    """Returns the config of a preset, changed where the caller wants it.

    ``thesis``: SGD, 15 epochs, batches of 32, a learning rate of 0.001 that falls to a tenth
    after epochs 5 and 10; weight decay, momentum, flips and the size of the pictures are ours, as
    the thesis is silent. ``small`` trains a small network on a processor in minutes, pretrained
    layers ten times slower than new ones.

    Args:
        preset: Whose values; None takes ``thesis`` for ``resnet50``, else ``small``.
        **changes: Fields of :class:`DefectConfig`. The size is 112 for generated pictures, 512
            for DAGM 2007 and 256 for magnetic tiles unless it is given.

    Example:
        >>> config = defect_config("thesis", data="dagm2007", network="resnet50")
        >>> config.epochs, config.batch_size, config.size
        (15, 32, 512)
    """
    if preset is None:
        preset = "thesis" if changes.get("network") == "resnet50" else "small"
    if preset not in _PRESETS:
        raise ValueError(f"expected `preset` in {get_args(Preset)}, got {preset!r}")
    size = {"size": _SIZES.get(changes.get("data", "defects"), 112)}
    return DefectConfig(**{"preset": preset, **size, **_PRESETS[preset], **changes})


def train_defect(
    config: DefectConfig,
    out: str | Path,
    resume: bool = False,
    *,
    data: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Trains a network to say whether a surface has a defect: softmax cross-entropy, two classes.

    On one process of the same machine and thread number, equal configs give equal bits,
    interrupted or not. The random state of the caller is left alone. Under torchrun each process
    takes its share of every batch.

    Args:
        config: What to train, on what, how.
        out: The folder of the run; made if it is missing.
        resume: Whether to continue the run in `out` after its last checkpoint. A finished run
            is left as it is.
        data: The data root; see :func:`attnviz.networks.data_root`.
        progress: Whether to show bars on stderr.

    Returns:
        The folder of the run. Its ``network.safetensors`` is for
        ``load_network(config.network, weights=...)``, with the classes :data:`CLASS_NAMES`.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        FileNotFoundError: A run to resume, pictures or weights are missing.
        ValueError: The run in `out` has another config, its checkpoint is damaged, the device is
            missing, a class has no pictures, or the loss is not finite.
        ConnectionError: Another process has ended; the run can be resumed.
    """
    out = Path(out)
    fabric = start_fabric(config)
    state = open_run(config, out, resume, fabric, ("task", "optimizer"))
    if state and state["epoch"] == config.epochs and (out / "metrics.json").is_file():
        return out
    with alone(out, fabric), reproducible(config, fabric), together(out, fabric):
        pictures, unseen = (_opened(config, split, data) for split in ("train", "validation"))
        torch.manual_seed(config.seed)
        model, head, mean, std = _network(config, data)
        new = list(head.parameters())
        old = [p for p in model.parameters() if all(p is not each for each in new)]
        optimizer = optimizer_for(config, old, new)
        task, optimizer = fabric.setup(model.to(memory_format=torch.channels_last), optimizer)
        if state is None:
            state = new_state(asdict(config)) | {"metrics": {}}
        else:
            task.load_state_dict(state.pop("task"))
            optimizer.load_state_dict(state.pop("optimizer"))
        shown = progress and fabric.is_global_zero
        loop = Loop(config, out, fabric, task, optimizer, pictures, mean, std, shown)
        lesson = _Deciding(loop, unseen, state["metrics"])
        lesson.save(state)
        if run_epochs(loop, state, lesson):
            lesson.finish(model, state)
        fabric.barrier()
    return out


# -------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Surface:
    """A picture of a surface, whatever data set it is from, not yet read."""

    image_id: str
    """Name of the picture, unique in its data set."""
    defective: bool
    """Whether its label says that there is a defect."""
    size: tuple[int, int]
    """Height and width."""
    source: Callable[[], Defect | MaskedImage]
    """Draws or finds the item of the data set."""

    @property
    def class_ids(self) -> tuple[int]:
        """Its place in :data:`CLASS_NAMES`."""
        return (0,) if self.defective else (1,)

    def read(self) -> Image.Image:
        """Reads the picture."""
        return self.source().read()

    def read_mask(self) -> UInt8[ndarray, "h w"] | None:
        """Reads where the defect is: 1, 0 elsewhere, 255 not counted; None where no mask is."""
        mask = self.source().read_mask()
        if mask is None:
            return None
        mask = mask.astype("uint8")
        mask[(mask > 0) & (mask < 255)] = 1  # tiles number the kinds of their defects
        return mask


def open_surfaces(
    data: Data,
    split: Split,
    *,
    count: int = 1600,
    limit: int | None = None,
    size: int = 112,
    seed: int = 0,
    root: str | Path | None = None,
) -> tuple[list[Surface], list[str]]:
    """Opens pictures of surfaces with and without a defect.

    Args:
        data: The data set.
        split: ``train``, ``validation`` or ``test``; those of real pictures are one and the same.
        count: How many generated pictures.
        limit: At most so many, taken evenly.
        size: Height and width of generated pictures.
        seed: Number of the generated data set.
        root: The data root; see :func:`attnviz.networks.data_root`.

    Returns:
        The pictures, and what there is to say of the data.

    Raises:
        FileNotFoundError: The data set is not there.
        ValueError: It is unknown, or a class has no picture.
    """
    check_choice("data", data, Data)
    if data == "defects":
        part = "val" if split == "validation" else split
        drawn = Defects(part, min(count, limit or count), seed, size)
        found = [
            Surface(
                each.image_id, bool(each.class_ids), (size, size),
                partial(draw_defect, index, split=part, seed=seed, size=size),
            )
            for index, each in enumerate(drawn)
        ]  # fmt: skip
        notes = [f"generated pictures: split {part} of defects"]
    else:
        load = {"dagm2007": load_dagm, "magnetic_tile": load_magnetic_tile}[data]
        items = load(data_root(root) / data, "train" if split == "train" else "test", limit=limit)
        found = [
            Surface(each.image_id, bool(each.class_ids), each.size, partial(items.__getitem__, i))
            for i, each in enumerate(items)
        ]
        notes = list(items.problems)
    defective = sum(each.defective for each in found)
    if not 0 < defective < len(found):
        raise ValueError(
            f"expected pictures with and without a defect in {data}, got {defective} with one "
            f"of {len(found)}; take more pictures"
        )
    return found, notes


def _opened(config: DefectConfig, split: Split, root: str | Path | None) -> Pictures:
    train = split == "train"
    most = [n for n in (config.limit, None if train else config.validation_images) if n]
    surfaces, _ = open_surfaces(
        config.data, split, count=config.images if train else config.validation_images,
        limit=min(most, default=None), size=config.size, seed=config.seed, root=root,
    )  # fmt: skip
    return Pictures(surfaces, CLASS_NAMES, config.size, "square")


# --------------------------------------------------------------------------------------- network


def _network(
    config: DefectConfig, root: str | Path | None
) -> tuple[nn.Module, nn.Module, tuple[float, ...], tuple[float, ...]]:
    # The network, what of it is new, and what it wants pixels to be normalized with.
    if config.network == "defects":
        model = FiveStage(len(CLASS_NAMES), "gap", config.size)
        return model, model, model.mean, model.std
    net = load_network(config.network, config.weights, data=root)
    layers = [each for each in net.model.named_modules() if isinstance(each[1], _CLASSIFYING)]
    name, last = layers[-1]
    if isinstance(last, nn.Linear):
        head = nn.Linear(last.in_features, len(CLASS_NAMES))
    else:
        head = nn.Conv2d(last.in_channels, len(CLASS_NAMES), 1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    net.model.set_submodule(name, head)
    return net.model, head, net.mean, net.std


_CLASSIFYING = (nn.Linear, nn.Conv2d)


# ------------------------------------------------------------------------------------ the lesson


class _Deciding:
    # What a step teaches, what an epoch measures.
    def __init__(self, loop: Loop, unseen: Pictures, metrics: dict[str, object]) -> None:
        self.loop, self.unseen, self.metrics = loop, unseen, metrics

    def learn(
        self, batch: Batch, images: Float[Tensor, "b 3 h w"], place: tuple[int, int]
    ) -> Float[Tensor, " b"]:
        scores = self.loop.task(images).float()
        targets = self.loop.pictures.targets(batch.indices).argmax(dim=1)
        return cross_entropy(scores, targets.to(scores.device), reduction="none")

    def finish_epoch(self, epoch: int) -> dict[str, float]:
        if not self.loop.fabric.is_global_zero:
            return {}
        self.metrics = self.measure()
        names = ("accuracy", "average_precision")
        return {name: self.metrics[name] for name in names} | {
            "validation_loss": self.metrics["loss"]
        }

    @torch.no_grad()
    def measure(self) -> dict[str, object]:
        """Measures on pictures that are never learned from."""
        loop, pictures = self.loop, self.unseen
        network = loop.task.module  # by itself, as the other processes don't take part
        network.eval()
        scores, targets = [], []
        for indices in torch.arange(len(pictures)).split(32):
            read = [(i, pictures.pixels(i)) for i in indices.tolist()]
            there = [(i, pixels) for i, pixels in read if pixels is not None]
            if there:
                pixels = loop.fabric.to_device(torch.stack([pixels for _, pixels in there]))
                with loop.fabric.autocast():
                    found = network(normalized(pixels, loop.mean, loop.std))
                scores.append(found.float().cpu())
                targets.append(pictures.targets([i for i, _ in there]))
        scores, targets = torch.cat(scores), torch.cat(targets)
        wanted = targets.argmax(dim=1)
        margins = (scores[:, :1] - scores[:, 1:]), targets[:, :1]
        share = targets[:, 0].double().mean().item()
        return {
            "images": len(scores),
            "defective": int(targets[:, 0].sum()),
            "loss": cross_entropy(scores, wanted).item(),
            "accuracy": (scores.argmax(dim=1) == wanted).double().mean().item(),
            "accuracy_without_looking": max(share, 1 - share),
            "average_precision": average_precision(*margins).item(),
        }

    def save(self, state: dict) -> None:
        loop = self.loop
        state["metrics"] = self.metrics
        if loop.fabric.is_global_zero:
            save_run(loop.out, state, task=loop.task, optimizer=loop.optimizer)
        loop.fabric.barrier()

    def finish(self, model: nn.Module, state: dict) -> None:
        loop = self.loop
        unreadable = gathered(loop.pictures.unreadable | self.unseen.unreadable, loop.fabric)
        if not loop.fabric.is_global_zero:
            return
        metrics = {
            **self.metrics,
            "training_images": len(loop.pictures),
            "training_defective": sum(ids == (0,) for ids in loop.pictures.class_ids),
            "training_loss": state["history"][-1]["loss"],
            "unreadable": sorted(unreadable),
            "seconds": sum(row["seconds"] for row in state["history"]),
        }
        _write_network(loop, model, metrics)
        write_whole(loop.out / "metrics.json", json_bytes(metrics))


def _write_network(loop: Loop, model: nn.Module, metrics: dict[str, object]) -> None:
    config, command = loop.config, _command(loop.config)
    metadata = {
        "kind": "defect",
        "network": config.network,
        "class_names": ",".join(CLASS_NAMES),
        "multilabel": "False",
        "size": str(config.size),
        "data": config.data,
        "command": command,
        "mean_average_precision": (
            f"{metrics['average_precision']:.4f} on {metrics['images']} validation images"
        ),
    }
    if config.network == "defects":
        metadata["head"] = model.head
    content = network_bytes(model.state_dict(), metadata)
    write_whole(loop.out / "network.safetensors", content)
    card = _CARD.format(
        network=config.network,
        data=config.data,
        generated=", **generated** surfaces," if config.data == "defects" else "",
        command=command,
        config=table(("", ""), asdict(config).items()),
        metrics=table(("", ""), ((k, v) for k, v in metrics.items() if k != "unreadable")),
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    write_whole(loop.out / "network.md", card.encode())


def _command(config: DefectConfig) -> str:
    standard = defect_config(config.preset, data=config.data, network=config.network)
    changed = {f.name: getattr(config, f.name) for f in fields(config)}
    given = {k: v for k, v in changed.items() if v != getattr(standard, k)}
    given = {"data": config.data, "network": config.network, **given}
    options = ("data", "network", "weights", "images", "limit", "size", "epochs", "seed")
    if set(given) <= set(options) and standard == defect_config(**_named(config)):
        stated = " ".join(f"--{name} {value}" for name, value in given.items())
        return f"attnviz train defect {stated} --out RUN"
    stated = "".join(f", {name}={value!r}" for name, value in given.items())
    return f'train_defect(defect_config({config.preset!r}{stated}), "RUN")'


def _named(config: DefectConfig) -> dict[str, str]:
    return {"data": config.data, "network": config.network}


_CARD = """# {network} on {data}

A network that says whether a surface has a defect, trained on *{data}*{generated} from image
labels alone. Its maps for the class `defect` say where.

```
{command}
```

{config}

## Metrics

On pictures that were never learned from; `accuracy_without_looking` is that of always naming the
more frequent class. One training, one seed; the last epoch is kept, none is chosen.

{metrics}

The file has {size:,} bytes and the sha256 `{sha256}`. On generated surfaces, training and
validation come from the same program: the numbers say nothing of other surfaces.
"""
