"""Chapter 4's training: a classifier whose attention is accumulated while it learns.

:func:`train_oaa` takes the class maps of each step's own forward pass, so that accumulation costs
next to nothing. What the thesis leaves silent is a field of :class:`OAAConfig`, named there.

Beside what every run has, its folder holds ``memory`` (the accumulated maps, at the end),
``evolution`` (what the player shows) and, while it is under way, ``memory-STEP``, which belongs to
the checkpoint and goes with it.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from ..evolution import EvolutionWriter
from ..files import write_whole
from ..memory import AttentionMemory, Rule, place
from ..networks import OAANetwork, check_weights, oaa_network
from ..oaa import accepts, attention, drop, drop_mask, hybrid_loss
from .loop import PRESETS, AttentionConfig, Loop, new_state, optimizer_for, run_epochs
from .measure import (
    averages,
    grids_of,
    localize,
    masked_pairs,
    observe,
    qualities,
    quality_rows,
    validate,
    watched_pairs,
    watches,
)
from .pictures import Batch, Fit, Pictures, cut, open_pictures
from .runs import (
    alone,
    check_choices,
    check_counts,
    check_rates,
    json_bytes,
    network_bytes,
    open_run,
    reproducible,
    save_run,
    start_fabric,
    table,
    together,
)

__all__ = ["OAAConfig", "Preset", "oaa_config", "train_oaa"]

Network = Literal["scenes", "vgg16", "resnet50", "resnet101", "squeezenet1_1", "mobilenet_v2"]
Preset = Literal["small", "thesis", "released", "literature"]
Drop = Literal["none", "image", "feature"]
Objects = Literal["few", "several"]


@dataclass(frozen=True, kw_only=True)
class OAAConfig(AttentionConfig):
    """Everything that a training with accumulation depends on; see :func:`oaa_config`."""

    data: str = "scenes"
    """``scenes``, ``voc2012``, ``coco``, ``cub``, or a folder of labeled pictures."""
    network: Network = "scenes"
    """See :func:`attnviz.networks.oaa_network`."""
    weights: str = "auto"
    """``auto``: ImageNet's, for ``scenes`` none; ``random``; or a file."""
    preset: Preset = "small"
    """Where the values came from."""
    images: int = 2000
    """Number of training scenes."""
    validation_images: int = 300
    """At most so many images that are never learned from; the mean average precision is theirs."""
    objects: Objects = "few"
    """Kind of the scenes."""
    limit: int | None = None
    """At most so many images, for a quick look."""
    size: int = 112
    """Short side of the images at the network's input, in pixels."""
    fit: Fit = "aspect"
    """``aspect`` keeps the ratio of the sides, up to a long one of a multiple of 32 pixels,
    ``square`` does not."""
    ceil_mode: bool = False
    """Whether VGG16's poolings round up, as Caffe's do."""
    rule: Rule = "max"
    """How maps join: ``max`` (Eq. 4.4) or ``mean`` (Eq. 4.9)."""
    gate: bool = True
    """Whether only labels among an image's highest scores are accumulated; the thesis is silent,
    the released code does."""
    start: int = 1
    """Epochs before the first map is accumulated; the thesis is silent, released code has 1."""
    fallback: bool = True
    """Whether classes that were never accumulated get the final model's map."""
    drop: Drop = "none"
    """The drop layer of algorithm 1 on the ``image`` or on the backbone's ``feature``."""
    threshold: float = 0.6
    """Its threshold: what exceeds it is dropped."""
    rate: float = 0.5
    """Its rate: in how many of the views."""
    drop_start: int = 0
    """Epochs before anything is dropped; never before a map was accumulated."""
    branch: bool = False
    """Whether a second head learns from the accumulated maps (figure 4.13), for unseen images."""
    branch_weight: float = 1.0
    """Weight of its loss, :func:`attnviz.oaa.hybrid_loss`; the thesis is silent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            self, network=Network, preset=Preset, objects=Objects, fit=Fit, rule=Rule, drop=Drop
        )
        check_counts(self, images=2, validation_images=1, limit=2, size=32, start=0, drop_start=0)
        check_rates(self, threshold=1, rate=1, branch_weight=math.inf)
        if self.start >= self.epochs:
            raise ValueError(
                f"expected `epochs` above `start`, {self.start}, from where on attention is "
                f"accumulated, got {self.epochs}; train longer"
            )


def oaa_config(preset: Preset = "small", **changes: object) -> OAAConfig:
    """Returns the config of a preset, changed where the caller wants it.

    Where the sources differ (batch, learning rate, its factors, weight decay, momentum, schedule,
    augmentation), ``thesis`` follows the text and, where that is silent, the author's first code,
    ``released`` his later PyTorch code, ``literature`` what later papers share. ``small`` trains
    the small network on scenes in a few minutes.

    Args:
        preset: Whose values.
        **changes: Fields of :class:`OAAConfig`.

    Example:
        >>> config = oaa_config("released", network="vgg16", data="voc2012")
        >>> config.multipliers
        (1.0, 2.0, 10.0, 20.0)
    """
    if preset not in PRESETS:
        raise ValueError(f"expected `preset` in {get_args(Preset)}, got {preset!r}")
    size = {} if preset == "small" else {"size": 224}
    return OAAConfig(**{"preset": preset, **size, **PRESETS[preset], **changes})


def train_oaa(
    config: OAAConfig,
    out: str | Path,
    resume: bool = False,
    *,
    data: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Trains a classifier and accumulates its attention on the way: OAA, with drop layer OAA++.

    On one process of the same machine and thread number, equal configs give equal bits,
    interrupted or not. Under torchrun each process takes its share of every step; the memories
    are merged with every checkpoint. The random state of the caller is left alone.

    Args:
        config: What to train, on what, how.
        out: The folder of the run; made if it is missing.
        resume: Whether to continue the run in `out` after its last checkpoint. A finished run is
            left as it is.
        data: The data root; see :func:`attnviz.networks.data_root`.
        progress: Whether to show bars on stderr.

    Returns:
        The folder of the run. ``network.safetensors`` is for ``load_network("oaa", weights=...)``,
        ``memory`` for ``AttentionMemory.load``. Without ``metrics.json`` the run was asked to
        stop, and goes on with `resume`.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        FileNotFoundError: `resume` is True and there is no checkpoint, or data are missing.
        ValueError: The run in `out` has another config, its checkpoint is damaged, the device is
            missing, or the loss is not finite.
        ConnectionError: Another process has ended; the run can be resumed.
    """
    out, root = Path(out), data
    fabric = start_fabric(config)
    state = open_run(config, out, resume, fabric, ("task", "optimizer", "memory", "run_id"))
    if state and state["epoch"] == config.epochs and (out / "metrics.json").is_file():
        return out
    check_weights(config.weights)
    shown = progress and fabric.is_global_zero
    with alone(out, fabric), reproducible(config, fabric), together(out, fabric):
        pictures = opened(config, "train", root, shown)
        validation = opened(config, "validation", root, shown) if fabric.is_global_zero else None
        torch.manual_seed(config.seed)
        network = oaa_network(
            config.network, len(pictures.class_names), config.weights,
            ceil_mode=config.ceil_mode, data=root,
        )  # fmt: skip
        branch = deepcopy(network.head) if config.branch else None
        task = Task(network, branch).to(memory_format=torch.channels_last)
        old = network.old_parameters()
        new = [*network.new_parameters(), *([] if branch is None else branch.parameters())]
        optimizer = optimizer_for(config, old, new)
        task, optimizer = fabric.setup(task, optimizer)
        grids = grids_of(network, pictures.sizes)
        memory = _memory(config, out, pictures, grids, state)
        if state is None:
            state = new_state(asdict(config)) | {"run_id": memory.run_id}
            state |= {"memory": None, "metrics": {}, "visits": 0}
        else:
            task.load_state_dict(state.pop("task"))
            optimizer.load_state_dict(state.pop("optimizer"))
        loop = Loop(
            config, out, fabric, task, optimizer, pictures, network.mean, network.std, shown
        )
        lesson = _Accumulating(loop, network, branch, memory, validation, grids, state)
        lesson.save(state)
        if run_epochs(loop, state, lesson):
            lesson.finish(state)
        fabric.barrier()
    return out


def opened(
    config: OAAConfig, split: Literal["train", "validation"], root: str | Path | None, shown: bool
) -> Pictures | None:
    """Opens the pictures of a config."""
    train = split == "train"
    count = config.images if train else config.validation_images
    most = [n for n in (config.limit, None if train else config.validation_images) if n]
    return open_pictures(
        config.data, split, size=config.size, fit=config.fit, count=count,
        limit=min(most, default=None), seed=config.seed, objects=config.objects, root=root,
        progress=shown,
    )  # fmt: skip


# ---------------------------------------------------------------------------------- accumulation


class Task(nn.Module):
    """A network as a training calls it: a drop layer before or behind its backbone, two heads.

    Args:
        network: The network.
        branch: Another head on its backbone, or None.
    """

    def __init__(self, network: OAANetwork, branch: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.branch = network, branch

    def forward(
        self, images: Tensor, mask: Tensor | None = None, feature: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the class maps of both heads; None for one that is not there."""
        if mask is not None and not feature:
            images = drop(images, mask, 1.0)
        features = self.network.backbone(images)
        if mask is not None and feature:
            small = interpolate(mask[:, None].float(), features.shape[2:])
            features = drop(features, small[:, 0] > 0, 1.0)
        second = None if self.branch is None else self.branch(features)
        return self.network.head(features), second


class Accumulator:
    """Takes the maps of training steps into a memory, and gives the drop layer's masks back.

    Args:
        config: Rule, gate, start and drop layer.
        memory: What has been accumulated by all processes.
        pictures: The training images.
        shared: Whether several processes accumulate, each for itself until :meth:`merge`.
    """

    def __init__(
        self, config: OAAConfig, memory: AttentionMemory, pictures: Pictures, shared: bool = False
    ) -> None:
        self.config, self.memory, self.pictures = config, memory, pictures
        self._image_ids = pictures.image_ids
        self._own = memory.empty() if shared else memory
        self._late: list[tuple] = []

    def mask(self, batch: Batch, epoch: int) -> Bool[Tensor, "b H W"] | None:
        """Marks what algorithm 1 drops from each view; None where that is nothing."""
        config = self.config
        if config.drop == "none" or epoch < max(config.drop_start, config.start + 1):
            return None
        size = tuple(batch.pixels.shape[2:])
        mask = torch.zeros(len(batch.indices), *size, dtype=torch.bool)
        for row, i in enumerate(batch.indices):
            if batch.chances[row] >= config.rate:
                continue
            image_id = self._image_ids[i]
            last = [self.memory.last(image_id, c) for c in self.pictures.class_ids[i]]
            last = [each for each in last if each is not None]
            if not last:
                continue
            maps = torch.stack(last)[None]
            labels = torch.ones(1, len(last), dtype=torch.bool)
            whole = drop_mask(maps, labels, size, config.threshold)
            view = cut(whole[:, None].float(), batch.boxes[row])[0, 0] > 0.5
            mask[row] = view.flip(1) if batch.flips[row] else view
        return mask if mask.any() else None

    def take(
        self, batch: Batch, class_maps: Float[Tensor, "b k h w"], place: tuple[int, int]
    ) -> None:
        """Accumulates the maps of a step that pass the gate.

        On a GPU their copy is only awaited at the next call, while the GPU computes on.
        """
        epoch, step = place
        if epoch < self.config.start:
            return
        keys = [
            (row, c) for row, i in enumerate(batch.indices) for c in self.pictures.class_ids[i]
        ]
        rows, classes = (torch.tensor(part) for part in zip(*keys, strict=True))
        class_maps = class_maps.detach().float()
        labels = torch.zeros(class_maps.shape[:2], dtype=torch.bool)
        labels[rows, classes] = True
        device = class_maps.device
        near = (rows.to(device), classes.to(device))
        maps = attention(class_maps[near][:, None])[:, 0]
        passed = labels.to(device)[near]
        if self.config.gate:
            passed = accepts(class_maps.mean(dim=(2, 3)), labels.to(device))[near]
        # a map that is not finite is the loss's to report
        passed = passed & batch.readable[rows].to(device) & maps.isfinite().all(dim=2).all(dim=1)
        copies = [each.to("cpu", non_blocking=True) for each in (maps, passed)]
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._late.append((event, batch, keys, *copies, step))
        while len(self._late) > (device.type == "cuda"):
            self._store(*self._late.pop(0))

    def _store(
        self,
        event: torch.cuda.Event | None,
        batch: Batch,
        keys: list[tuple[int, int]],
        maps: Float[Tensor, "n h w"],
        passed: Bool[Tensor, " n"],
        step: int,
    ) -> None:
        if event is not None:
            event.synchronize()
        whole = (0.0, 0.0, 1.0, 1.0)
        for (row, class_id), map, accepted in zip(keys, maps, passed.tolist(), strict=True):
            if not accepted:
                continue
            valid = None
            if batch.boxes[row] != whole:
                map, valid = place(map, batch.boxes[row], batch.flips[row])
            elif batch.flips[row]:
                map = map.flip(1)
            image_id = self._image_ids[batch.indices[row]]
            self._own.update(image_id, class_id, map, valid, step=step)

    def merge(self, out: Path, fabric: Fabric) -> None:
        """Makes every process' memory that of all of them; all processes have to call it."""
        while self._late:
            self._store(*self._late.pop(0))
        if self._own is self.memory:
            return
        folders = [out / f"memory-of-{rank}" for rank in range(fabric.world_size)]
        own = folders[fabric.global_rank]
        self._own.save(own)
        fabric.barrier()
        for folder in folders:  # in one order, so that all get equal bits
            self.memory.merge(AttentionMemory.load(folder, self.memory.run_id))
        fabric.barrier()
        shutil.rmtree(own)
        self._own = self.memory.empty()


def classification_losses(
    loop: Loop,
    accumulator: Accumulator | None,
    batch: Batch,
    images: Float[Tensor, "b 3 h w"],
    place: tuple[int, int],
) -> tuple[Float[Tensor, " b"], Tensor | None]:
    """Returns the loss of each image (Eq. 4.1), accumulating on the way, and the second maps.

    Args:
        loop: The training.
        accumulator: What takes the maps; None for a training without accumulation.
        batch: The views.
        images: The views, normalized.
        place: The epoch, from 0, and a number of the step that never repeats.
    """
    fabric, mask = loop.fabric, None
    if accumulator is not None:
        mask = accumulator.mask(batch, place[0])
        mask = None if mask is None else fabric.to_device(mask)
    maps, second = loop.task(images, mask, loop.config.drop == "feature")
    if accumulator is not None:
        accumulator.take(batch, maps, place)
    scores = maps.float().mean(dim=(2, 3))
    targets = fabric.to_device(loop.pictures.targets(batch.indices))
    losses = binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return losses.mean(dim=1), second


def accumulated_targets(
    memory: AttentionMemory,
    pictures: Pictures,
    batch: Batch,
    shape: tuple[int, int, int],
) -> tuple[Float[Tensor, "b k h w"], Bool[Tensor, " b"]]:
    """Returns accumulated maps, divided by their maximum, as targets for the views of a batch.

    Args:
        memory: The maps.
        pictures: Where the batch is from.
        batch: The views, mirrored or cut: so are their targets.
        shape: Classes, height and width of the class maps.

    Returns:
        The targets, zero for absent classes, and which images have one.
    """
    targets = torch.zeros(len(batch.indices), *shape)
    image_ids = pictures.image_ids
    for row, i in enumerate(batch.indices):
        for class_id in pictures.class_ids[i]:
            map = attention(memory[image_ids[i], class_id][None, None])
            view = cut(map, batch.boxes[row])[0, 0]
            targets[row, class_id] = view.flip(1) if batch.flips[row] else view
    return targets, (targets.amax(dim=(1, 2, 3)) > 0) & batch.readable


# ------------------------------------------------------------------------------------ the lesson


class _Accumulating:
    # What a step teaches and keeps, what an epoch measures, what a checkpoint holds.
    def __init__(
        self,
        loop: Loop,
        network: OAANetwork,
        branch: nn.Module | None,
        memory: AttentionMemory,
        validation: Pictures | None,
        grids: Mapping[tuple[int, int], tuple[int, int]],
        state: dict,
    ) -> None:
        config, pictures, self.first = loop.config, loop.pictures, loop.fabric.is_global_zero
        self.loop, self.network, self.branch, self.memory = loop, network, branch, memory
        self.validation = validation
        shared = loop.fabric.world_size > 1
        self.accumulator = Accumulator(config, memory, pictures, shared)
        self.metrics, self.visits = state["metrics"], state["visits"]
        if self.first:
            self.measured = masked_pairs(pictures, config.measured) if config.measured else []
            self.watched = watched_pairs(pictures, config.watched)
            self.writer = EvolutionWriter(
                loop.out, watches(pictures, self.watched, grids), run_id=memory.run_id,
                network=config.network, data=config.data, class_names=pictures.class_names,
                epochs=config.epochs, rule=config.rule, drop=config.drop != "none",
            )  # fmt: skip

    def learn(
        self, batch: Batch, images: Float[Tensor, "b 3 h w"], place: tuple[int, int]
    ) -> Float[Tensor, " b"]:
        losses, second = classification_losses(self.loop, self.accumulator, batch, images, place)
        if second is None:
            return losses
        weight = self.loop.config.branch_weight
        return losses + weight * self.learn_branch(batch, second.float(), place)

    def learn_branch(
        self, batch: Batch, maps: Float[Tensor, "b k h w"], place: tuple[int, int]
    ) -> Float[Tensor, " b"]:
        wanted, known = accumulated_targets(
            self.memory, self.loop.pictures, batch, tuple(maps.shape[1:])
        )
        wanted, known = wanted.to(maps.device), known.to(maps.device)
        started = place[0] > self.loop.config.start and bool(known.any())
        if not started:  # the head takes part all the same, as several processes need it to
            return maps.mean(dim=(1, 2, 3)) * 0
        # the maps of the image's own classes alone (thesis 4.3.5): with the absent ones, which
        # are nothing but background, the head would learn to answer with none
        own = wanted.amax(dim=(2, 3)) > 0
        loss = hybrid_loss(maps[own][:, None], wanted[own][:, None])
        # a mean over the maps that have a target, shared out over the images that have one
        return known.float() * len(known) / known.sum() * loss

    def finish_epoch(self, epoch: int) -> dict[str, float]:
        accumulator, fabric = self.accumulator, self.loop.fabric
        accumulator.merge(self.loop.out, fabric)
        if not self.first:
            return {}
        pictures = self.loop.pictures
        seen = observe(self.network, pictures, {*self.measured, *self.watched}, fabric)
        now = averages(qualities(pictures, self.measured, seen.get))
        kept = averages(qualities(pictures, self.measured, self.accumulated))
        names = [(pictures.image_ids[i], c) for i, c in self.watched]
        pairs = list(zip(self.watched, names, strict=True))
        self.writer.write(
            epoch, {name: seen[pair] for pair, name in pairs if pair in seen}, self.memory,
            {name: seen.scores[pair] for pair, name in pairs if pair in seen},
            {name: seen.accepted[pair] for pair, name in pairs if pair in seen},
        )  # fmt: skip
        before, self.visits = self.visits, sum(self.memory.count(*key) for key in self.memory)
        # without images of their own to validate on, the training images say how far it is
        self.metrics = validate(self.network, self.validation or pictures, fabric)
        return {
            "mean_average_precision": self.metrics["mean_average_precision"],
            "recall_epoch": now[0],
            "noise_epoch": now[1],
            "recall_accumulated": kept[0],
            "noise_accumulated": kept[1],
            "accepted": (self.visits - before) / len(self.memory),
        }

    def accumulated(self, pair: tuple[int, int]) -> Float[Tensor, "h w"]:
        return self.memory[self.loop.pictures.image_ids[pair[0]], pair[1]]

    def save(self, state: dict) -> None:
        # Weights and memory of one step, in files that a killed run finds together or not at all.
        loop = self.loop
        self.accumulator.merge(loop.out, loop.fabric)
        if loop.fabric.is_global_zero:
            name = f"memory-{state['epoch']:04d}-{state['step']:06d}"
            self.memory.save(loop.out / name)
            state |= {"memory": name, "metrics": self.metrics, "visits": self.visits}
            save_run(loop.out, state, task=loop.task, optimizer=loop.optimizer)
            _remove(loop.out, keep=name)
        loop.fabric.barrier()

    def finish(self, state: dict) -> None:
        loop, memory, pictures = self.loop, self.memory, self.loop.pictures
        unreadable = gathered(pictures.unreadable, loop.fabric)
        if not self.first:
            return
        never = memory.missing()
        numbers = {image_id: i for i, image_id in enumerate(pictures.image_ids)}
        pairs = masked_pairs(pictures)
        wanted = {*pairs, *((numbers[image_id], c) for image_id, c in never)}
        text = "final maps" if loop.shown else None
        seen = observe(self.network, pictures, wanted, loop.fabric, text=text)
        filled = 0
        if loop.config.fallback:
            for image_id, class_id in never:
                map = seen.get((numbers[image_id], class_id))
                if map is not None and map.any():
                    filled += memory.fill(image_id, class_id, map)
        memory.save(loop.out / "memory")
        without = {image_id for image_id, _ in never}
        without -= {image_id for image_id, c in memory if memory.count(image_id, c) > 0}
        kinds = {
            "images without a label": pictures.unlabeled,
            "images that cannot be read": sorted(unreadable),
            "images without a main object (no map was ever accepted)": sorted(without),
        }
        found = {
            "cam": qualities(pictures, pairs, seen.get),
            "accumulated": qualities(pictures, pairs, self.accumulated),
        }
        rows = state["history"]
        metrics = state["metrics"] | {
            "validated_on": "training" if self.validation is None else "validation",
            "maps": {name: quality_rows(each, pictures) for name, each in found.items()},
            "training_images": len(pictures),
            "never_accepted": len(never),
            "filled": filled,
            "left_out": {
                kind: {"images": len(ids), "first": list(ids)[:5]} for kind, ids in kinds.items()
            },
            "seconds": sum(row["seconds"] for row in rows),
            "measuring_seconds": sum(row["measuring_seconds"] for row in rows),
        }
        facts = {"run_id": memory.run_id}
        if self.branch is not None:
            second = with_head(self.network, self.branch)
            metrics["localization"] = self.localization(second)
            content = network_bytes(
                second.state_dict(), second.metadata(pictures.class_names) | facts
            )
            write_whole(loop.out / "branch.safetensors", content)
        write_network(loop, self.network, loop.config, metrics, facts, command(loop.config))
        write_whole(loop.out / "metrics.json", json_bytes(metrics))
        _remove(loop.out, keep=None)

    def localization(self, second: OAANetwork) -> dict[str, dict[str, object]]:
        # Classes by the first head; boxes by either head's map of the true class.
        unseen = self.validation
        if unseen is None:
            return {}
        return {
            name: localize(self.network, maps_of, unseen, self.loop.fabric)
            for name, maps_of in (("cam", self.network.class_maps), ("oaa", second.class_maps))
        }


def with_head(network: OAANetwork, head: nn.Module) -> OAANetwork:
    """Returns a network that shares the backbone and has another head."""
    other = copy(network)
    other._modules = dict(network._modules)
    other.head = head
    return other


def gathered(found: dict[str, str], fabric: Fabric) -> dict[str, str]:
    """Returns what all processes have found; all have to call it."""
    if fabric.world_size == 1:
        return found
    parts: list[dict[str, str]] = [{} for _ in range(fabric.world_size)]
    torch.distributed.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}


# ------------------------------------------------------------------------------------- the folder


def _run_id(config: OAAConfig, pictures: Pictures) -> str:
    # Equal trainings have equal names, so that their memories are equal files.
    text = json.dumps([asdict(config), pictures.image_ids, pictures.sizes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _memory(
    config: OAAConfig,
    out: Path,
    pictures: Pictures,
    grids: Mapping[tuple[int, int], tuple[int, int]],
    state: dict | None,
) -> AttentionMemory:
    run_id = _run_id(config, pictures)
    if state is not None:
        if state["run_id"] != run_id:
            raise ValueError(
                f"expected the pictures of the run in {str(out)!r}, got others; "
                "put its data back, or start a new run"
            )
        there = (out / state["memory"]).is_dir()
        return AttentionMemory.load(out / (state["memory"] if there else "memory"), run_id)
    ids, sizes = pictures.image_ids, pictures.sizes
    return AttentionMemory(
        {image_id: grids[size] for image_id, size in zip(ids, sizes, strict=True)},
        dict(zip(ids, pictures.class_ids, strict=True)),
        config.rule, run_id=run_id, keep_last=config.drop != "none",
    )  # fmt: skip


def _remove(out: Path, keep: str | None) -> None:
    # Snapshots of other steps, and what a killed run left.
    for folder in out.glob("memory-*"):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


def write_network(
    loop: Loop,
    network: OAANetwork,
    source: OAAConfig,
    metrics: Mapping[str, object],
    facts: Mapping[str, str],
    call: str,
) -> None:
    """Writes a trained network and a card that says how it was made.

    Args:
        loop: The training.
        network: Its network.
        source: What was accumulated, and on which data.
        metrics: What it reached.
        facts: More metadata.
        call: How to repeat it.
    """
    names = loop.pictures.class_names
    metadata = network.metadata(names) | {"size": str(source.size), "data": source.data}
    content = network_bytes(network.state_dict(), {**metadata, "command": call, **facts})
    write_whole(loop.out / "network.safetensors", content)
    rows = [(key, value) for key, value in metrics.items() if isinstance(value, float | int | str)]
    card = _CARD.format(
        network=source.network,
        data=source.data,
        command=call,
        config=table(("", ""), asdict(loop.config).items()),
        metrics=table(("", ""), rows),
        maps=table(
            ("maps", "n", "recall", "noise"),
            [(k, m["maps"], m["recall"], m["noise"]) for k, m in metrics["maps"].items()],
        ),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    write_whole(loop.out / "network.md", card.encode())


def command(config: OAAConfig) -> str:
    """Returns the call that repeats a training."""
    standard = oaa_config(config.preset)
    changed = {f.name: getattr(config, f.name) for f in fields(config)}
    given = {k: v for k, v in changed.items() if v != getattr(standard, k) and k != "preset"}
    stated = "".join(f", {name}={value!r}" for name, value in given.items())
    return f'train_oaa(oaa_config({config.preset!r}{stated}), "RUN")'


_CARD = """# {network} on {data}, with accumulated attention

```
{command}
```

{config}

## Metrics

{metrics}

{maps}

Recall: the share of the object that the map points at with at least half of its maximum. Noise:
the share of what it points at that is not the object. Both are means over the maps of training
images that have a mask. sha256 of the weights: `{sha256}`.
"""
