"""Segmentation learned from masks: pseudo labels, true ones, or some of each (table 4.7).

A step's views are the pictures at random sizes, cut to one size and filled up with the mean color,
which no loss counts. Scores are measured on pictures with true masks that are never learned from,
always with and without a dense CRF.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from ..checks import check_choice
from ..data.masks import IGNORE, read_label_picture
from ..deeplab import SEGMENTATION_NETWORKS, SegmentationNetwork, segmentation_network
from ..files import write_whole
from ..labels import dense_crf
from ..networks import check_weights
from ..segment.inference import Scores, check_labels, evaluate
from ..segment.pseudo import label_file
from .loop import Loop, LoopConfig, new_state, optimizer_for, run_epochs
from .oaa import Objects, gathered
from .pictures import Batch, Draws, Item, Pictures, open_pictures
from .runs import (
    alone,
    check_choices,
    check_counts,
    json_bytes,
    network_bytes,
    open_run,
    reproducible,
    save_run,
    start_fabric,
    table,
    together,
)

__all__ = ["SegmentConfig", "segment_config", "train_segment"]

Preset = Literal["small", "thesis"]
Loss = Literal["full", "pyramid"]


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(LoopConfig):
    """Everything that a training on masks depends on; see :func:`segment_config`."""

    data: str = "scenes"
    """``scenes``, ``voc2012``, ``coco``, or a folder of labeled pictures."""
    labels: str = "true"
    """``true`` masks, the upper bound, or a folder of label pictures as
    :func:`attnviz.segment.write_labels` makes them, also one that holds them in ``labels``."""
    true_count: int = 0
    """So many images, drawn by the seed, are learned from with their true masks, the others with
    the folder's labels (table 4.7)."""
    network: str = "scenes"
    """See :func:`attnviz.deeplab.segmentation_network`."""
    weights: str = "auto"
    """``auto``: ImageNet's, for ``scenes`` the bundled classifier's; ``random``; or a file."""
    preset: Preset = "small"
    """Where the values came from."""
    images: int = 2000
    """Number of training scenes."""
    validation_images: int = 300
    """At most so many images that are never learned from, for the scores at the end."""
    measured: int = 100
    """After each epoch, the mean IoU is measured on so many of these."""
    objects: Objects = "few"
    """Kind of the scenes."""
    limit: int | None = None
    """At most so many training images, spread evenly, as in the first rows of table 4.7."""
    size: int | None = None
    """Short side of the images, in pixels; None: as the files have it, 112 for scenes. Else the
    scores are measured in windows of `crop`, not of the network's own size."""
    crop: int = 112
    """Height and width of the views, in pixels."""
    scales: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    """Sizes of the images, as factors, of which each view has one."""
    loss: Loss = "full"
    """``full``: at the pixels of the view. ``pyramid``: DeepLabv2's, the sum over views at sizes
    1, 0.75 and 0.5 and over the largest of the three scores, at their resolution."""
    held: int = 1
    """For how many steps the learning rate stays as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scales", tuple(self.scales))  # JSON has lists
        check_choices(self, preset=Preset, objects=Objects, loss=Loss)
        check_counts(
            self,
            images=2,
            validation_images=1,
            measured=0,
            true_count=0,
            limit=2,
            size=32,
            crop=17,
            held=1,
        )
        if self.network not in SEGMENTATION_NETWORKS:
            raise ValueError(
                f"expected `network` in {SEGMENTATION_NETWORKS}, got {self.network!r}; choose "
                "one of these"
            )
        if not self.scales or not all(0.1 <= scale <= 10 for scale in self.scales):
            raise ValueError(
                f"expected `scales` as factors from 0.1 to 10, got {self.scales}; try (1.0,)"
            )
        if self.crops or self.jitter:
            raise ValueError(
                "expected `crops` and `jitter` False; views of a segmentation are cut by `crop` "
                "and `scales`"
            )
        if self.true_count and self.labels == "true":
            raise ValueError(
                "expected a folder as `labels` beside `true_count`, got 'true'; all masks are "
                "true then"
            )


# thesis 4.3.2, and where it is silent, DeepLab's published settings: 15,000 steps of 10 images are
# 14.2 passes over VOC's 10,582, of a schedule of 16,000
_LARGE_FOV = {
    "optimizer": "sgd", "epochs": 15, "batch_size": 10, "learning_rate": 1e-3, "crop": 321,
    "weight_decay": 5e-4, "decay_biases": False, "schedule": "poly",
}  # fmt: skip
_RECIPES = {
    "largefov_vgg16": _LARGE_FOV | {"multipliers": (1.0, 2.0, 10.0, 20.0)},
    "aspp_resnet101": _LARGE_FOV
    | {"multipliers": (1.0, 1.0, 10.0, 20.0), "learning_rate": 2.5e-4, "epochs": 19}
    | {"accumulate": 2, "held": 10, "loss": "pyramid", "scales": (0.5, 0.75, 1.0, 1.25, 1.5)},
}
_OTHER = _LARGE_FOV | {"multipliers": (1.0, 1.0, 10.0, 10.0)}
_SMALL = {"epochs": 6, "batch_size": 8, "learning_rate": 3e-3}


def segment_config(preset: Preset = "small", **changes: object) -> SegmentConfig:
    """Returns the config of a preset, changed where the caller wants it.

    ``thesis`` is DeepLab's own recipe for each network, which the thesis and its released code
    follow: SGD, ``poly``, views of 321 pixels; for ``aspp_resnet101`` DeepLabv2's. (Section 3.4.4
    also names a learning rate divided by ten after 12,000 of 16,000 steps: ``schedule="step"``
    comes close.) ``small`` trains the small network on scenes in a few minutes.

    Args:
        preset: Whose values.
        **changes: Fields of :class:`SegmentConfig`.

    Example:
        >>> config = segment_config("thesis", network="largefov_vgg16", data="voc2012")
        >>> config.multipliers
        (1.0, 2.0, 10.0, 20.0)
    """
    check_choice("preset", preset, Preset)
    recipe = _SMALL
    if preset == "thesis":
        recipe = _RECIPES.get(changes.get("network", "scenes"), _OTHER)
    return SegmentConfig(**{"preset": preset, **recipe, **changes})


def train_segment(
    config: SegmentConfig,
    out: str | Path,
    resume: bool = False,
    *,
    data: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Trains a segmentation network on masks.

    Bits, several processes and the caller's random state are as in
    :func:`~attnviz.training.train_oaa`. Images without labels, or whose labels have another size
    or other classes, are left out before the first step and listed in ``metrics.json``.

    Args:
        config: What to train, on what, how.
        out: The folder of the run; made if it is missing.
        resume: Whether to continue the run in `out` after its last checkpoint. A finished run is
            left as it is.
        data: The data root; see :func:`attnviz.networks.data_root`.
        progress: Whether to show bars on stderr.

    Returns:
        The folder of the run. ``network.safetensors`` is for
        :func:`attnviz.deeplab.load_segmentation`, ``metrics.json`` has the scores.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        FileNotFoundError: `resume` is True and there is no checkpoint, or labels or data are
            missing.
        ValueError: The run in `out` has another config, its checkpoint is damaged, fewer than two
            images have labels that can be used, the device is missing, or the loss is not finite.
        ConnectionError: Another process has ended; the run can be resumed.
        ImportError: pydensecrf2 is not installed.
    """
    out = Path(out)
    dense_crf(np.zeros((1, 1, 3), np.uint8), torch.ones(2, 1, 1))  # missing? not after hours
    folder = None if config.labels == "true" else _label_folder(Path(config.labels))
    fabric = start_fabric(config)
    state = open_run(config, out, resume, fabric, ("task", "optimizer"))
    if state and state["epoch"] == config.epochs and (out / "metrics.json").is_file():
        return out
    check_weights(config.weights)
    shown = progress and fabric.is_global_zero
    with alone(out, fabric), reproducible(config, fabric), together(out, fabric):
        pictures = _opened(config, "train", data, shown)
        pictures, left_out = _labeled(pictures, folder, config, shown)
        validation = _opened(config, "validation", data, shown) if fabric.is_global_zero else None
        torch.manual_seed(config.seed)
        network = segmentation_network(
            config.network, len(pictures.class_names), config.weights, data=data
        )
        network.class_names = pictures.class_names
        optimizer = optimizer_for(config, network.old_parameters(), network.new_parameters())
        task = _Task(network, config.loss).to(memory_format=torch.channels_last)
        task, optimizer = fabric.setup(task, optimizer)
        if state is None:
            state = new_state(asdict(config))
        else:
            task.load_state_dict(state.pop("task"))
            optimizer.load_state_dict(state.pop("optimizer"))
        fill = tuple(round(255 * part) for part in network.mean)
        loop = Loop(
            config, out, fabric, task, optimizer, pictures, network.mean, network.std, shown,
            partial(views, config, fill), config.held,
        )  # fmt: skip
        lesson = _Masks(loop, network, validation, left_out)
        lesson.save(state)
        if run_epochs(loop, state, lesson):
            lesson.finish(state)
        fabric.barrier()
    return out


# ------------------------------------------------------------------------------------- labels


def _opened(
    config: SegmentConfig, split: str, root: str | Path | None, shown: bool
) -> Pictures | None:
    train = split == "train"
    return open_pictures(
        config.data, split, size=config.size,
        count=config.images if train else config.validation_images,
        limit=config.limit if train else config.validation_images, seed=config.seed,
        objects=config.objects, root=root, progress=shown,
    )  # fmt: skip


@dataclass(frozen=True)
class _Relabeled:
    # A picture with labels from a file in place of its mask.
    item: Item
    path: Path

    @property
    def image_id(self) -> str:
        return self.item.image_id

    @property
    def class_ids(self) -> tuple[int, ...]:
        several = getattr(self.item, "class_ids", None)
        return (self.item.class_id,) if several is None else several

    @property
    def size(self) -> tuple[int, int]:
        return self.item.size

    def read(self) -> Image.Image:
        return self.item.read()

    def read_mask(self) -> np.ndarray | None:
        return read_label_picture(self.path) if self.path.is_file() else None


def _labeled(
    pictures: Pictures, folder: Path | None, config: SegmentConfig, shown: bool
) -> tuple[Pictures, dict[str, list[str]]]:
    # The pictures whose labels can be used, with these, and why others are left out.
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(pictures), generator=generator)
    true = set(order[: config.true_count].tolist())
    items, missing, unusable = [], [], []
    for i in tqdm(range(len(pictures)), "labels", unit=" images", disable=not shown):
        item = pictures.item(i)
        if folder is not None and i not in true:
            item = _Relabeled(item, label_file(folder, item.image_id))
        try:
            labels = item.read_mask() if hasattr(item, "read_mask") else None
            if labels is None:
                missing.append(item.image_id)
                continue
            check_labels(labels, item.size, 1 + len(pictures.class_names))
        except (ValueError, OSError) as error:
            unusable.append(f"{item.image_id} ({error})")
            continue
        items.append(item)
    if len(items) < 2:
        first = f"; the first: {unusable[0]}" if unusable else ""
        raise ValueError(
            f"expected labels for at least two of the {len(pictures)} pictures in "
            f"{config.labels!r}, got {len(items)}; {len(missing)} have none, {len(unusable)} have "
            f"some that cannot be used{first}"
        )
    left_out = {
        "images without a class": pictures.unlabeled,
        "images without labels": missing,
        "images whose labels cannot be used": unusable,
    }
    return Pictures(items, pictures.class_names, config.size, "aspect"), left_out


def _label_folder(folder: Path) -> Path:
    inside = folder / "labels"
    folder = inside if inside.is_dir() else folder
    if not any(folder.glob("*.png")):
        state = "has none" if folder.is_dir() else "is not there"
        raise FileNotFoundError(
            f"expected label pictures ID.png in {str(folder)!r}, which {state}; name a folder "
            "that a pseudo-label run has written, or 'true'"
        )
    return folder


# -------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class LabeledBatch(Batch):
    """Views that go through the network together, with their labels."""

    labels: UInt8[Tensor, "b h w"]
    """The labels; 255 does not count, as beside the picture."""


def views(
    config: SegmentConfig,
    fill: tuple[int, int, int],
    pictures: Pictures,
    indices: Sequence[int],
    draws: Draws,
    jitter: bool,
    parts: int,
) -> list[LabeledBatch]:
    """Reads the views of a step, cut into `parts`.

    Args:
        config: Says the sizes.
        fill: The color beside the picture.
        pictures: Pictures with labels.
        indices: Which of them.
        draws: The epoch's chances.
        jitter: False; see :class:`SegmentConfig`.
        parts: See :func:`~attnviz.training.pictures.groups`.
    """
    most = -(-len(indices) // parts)
    made = []
    for start in range(0, len(indices), most):
        part = list(indices[start : start + most])
        cuts = [_view(config, fill, pictures, i, draws) for i in part]
        made.append(
            LabeledBatch(
                part,
                torch.stack([pixels for pixels, _, _ in cuts]),
                torch.tensor([readable for _, _, readable in cuts]),
                draws.flips[part].tolist(),
                [tuple(draws.boxes[i].tolist()) for i in part],
                draws.chances[part],
                len(part) / len(indices),
                torch.stack([labels for _, labels, _ in cuts]),
            )
        )
    return made


def _view(
    config: SegmentConfig, fill: tuple[int, int, int], pictures: Pictures, i: int, draws: Draws
) -> tuple[UInt8[Tensor, "3 s s"], UInt8[Tensor, "s s"], bool]:
    side = config.crop
    pixels = pictures.pixels(i)
    if pixels is None:
        return (
            torch.full((3, side, side), 128, dtype=torch.uint8),
            torch.full((side, side), IGNORE, dtype=torch.uint8), False,
        )  # fmt: skip
    height, width = pixels.shape[1:]
    labels = np.ascontiguousarray(pictures.item(i).read_mask())
    if labels.shape != (height, width):
        labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    chance, top, left = draws.shares[i].tolist()
    scale = config.scales[int(chance * len(config.scales))]
    top = int(top * (max(round(height * scale) - side, 0) + 1))
    left = int(left * (max(round(width * scale) - side, 0) + 1))
    flip = bool(draws.flips[i])
    # The pixel of the view at (x, y) shows the picture at ((x + left + 1/2) / scale - 1/2, ...).
    first, step = ((left + side - 0.5), -1) if flip else ((left + 0.5), 1)
    matrix = np.array(
        [[step / scale, 0, first / scale - 0.5], [0, 1 / scale, (top + 0.5) / scale - 0.5]]
    )
    image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    shown, known = (
        cv2.warpAffine(
            values, matrix, (side, side), flags=how | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT, borderValue=beside,
        )
        for values, how, beside in (
            (image, cv2.INTER_LINEAR, fill), (labels, cv2.INTER_NEAREST, IGNORE)
        )
    )  # fmt: skip
    return torch.from_numpy(shown).permute(2, 0, 1), torch.from_numpy(known), True


# ------------------------------------------------------------------------------------ the lesson


class _Task(nn.Module):
    # The network as the training calls it, once a step.
    def __init__(self, network: SegmentationNetwork, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, images: Tensor) -> list[Tensor]:
        whole = self.network(images)
        if self.loss == "full":
            return [self.network.enlarged(whole.float(), tuple(images.shape[2:]))]
        smaller = [self.network(self._reduced(images, scale)) for scale in (0.75, 0.5)]
        size = tuple(whole.shape[2:])
        all_scales = [whole, *(self.network.enlarged(scores, size) for scores in smaller)]
        return [whole, *smaller, torch.stack(all_scales).amax(dim=0)]

    def _reduced(self, images: Tensor, scale: float) -> Tensor:
        size = [self.network.fitting(int(side * scale)) for side in images.shape[2:]]
        return interpolate(
            images, size, mode="bilinear", align_corners=self.network.cornered
        ).contiguous(memory_format=torch.channels_last)


def segmentation_losses(
    scores: Float[Tensor, "b k h w"], labels: UInt8[Tensor, "b H W"]
) -> Float[Tensor, " b"]:
    """Returns the cross-entropy of each image; their mean is that of all pixels that count.

    Labels are reduced to the resolution of the scores, by the nearest one; 255 does not count.
    """
    size = tuple(scores.shape[2:])
    if tuple(labels.shape[1:]) != size:
        labels = interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0]
    labels = labels.long()
    losses = cross_entropy(scores.float(), labels, ignore_index=IGNORE, reduction="none")
    counted = (labels != IGNORE).sum().clamp_min(1)
    return losses.sum(dim=(1, 2)) * (len(labels) / counted)


class _Masks:
    # What a step teaches, what an epoch measures.
    def __init__(
        self,
        loop: Loop,
        network: SegmentationNetwork,
        validation: Pictures | None,
        left_out: dict[str, list[str]],
    ) -> None:
        self.loop, self.network, self.left_out = loop, network, left_out
        self.first = loop.fabric.is_global_zero
        self.items = [] if validation is None else [*map(validation.item, range(len(validation)))]

    def learn(
        self, batch: LabeledBatch, images: Float[Tensor, "b 3 h w"], place: tuple[int, int]
    ) -> Float[Tensor, " b"]:
        labels = self.loop.fabric.to_device(batch.labels)
        return sum(segmentation_losses(scores, labels) for scores in self.loop.task(images))

    def finish_epoch(self, epoch: int) -> dict[str, float]:
        count = min(self.loop.config.measured, len(self.items))
        if not self.first or count == 0:
            return {}
        chosen = [self.items[i * len(self.items) // count] for i in range(count)]
        return {"mean_iou": self._scores(chosen, None).mean_iou()}

    def _scores(self, items: list[Item], crf: str | None, shown: bool = False) -> Scores:
        window = None if self.loop.config.size is None else self.loop.config.crop
        with self.loop.fabric.autocast():
            return evaluate(self.network, items, "single", crf, window=window, progress=shown)

    def save(self, state: dict) -> None:
        loop = self.loop
        if self.first:
            save_run(loop.out, state, task=loop.task, optimizer=loop.optimizer)
        loop.fabric.barrier()

    def finish(self, state: dict) -> None:
        loop = self.loop
        unreadable = gathered(loop.pictures.unreadable, loop.fabric)
        if not self.first:
            return
        left_out = {**self.left_out, "images that cannot be read": sorted(unreadable)}
        rows = state["history"]
        metrics = {
            "init": self.network.provenance["weights"],
            "loss": rows[-1]["loss"],
            "training_images": len(loop.pictures),
            "left_out": {
                kind: {"images": len(ids), "first": list(ids)[:5]}
                for kind, ids in left_out.items()
            },
            "seconds": sum(row["seconds"] for row in rows),
            "measuring_seconds": sum(row["measuring_seconds"] for row in rows),
        }
        if self.items:
            scores = self._scores(self.items, "oaa_pytorch", loop.shown)
            metrics |= {"validation": scores.to_json()}
        self._write(metrics)
        write_whole(loop.out / "metrics.json", json_bytes(metrics))

    def _write(self, metrics: dict[str, object]) -> None:
        loop, network, call = self.loop, self.network, _command(self.loop.config)
        facts = {"data": loop.config.data, "labels": loop.config.labels, "command": call}
        metadata = network.metadata(loop.pictures.class_names) | facts
        content = network_bytes(network.state_dict(), metadata)
        write_whole(loop.out / "network.safetensors", content)
        kinds = metrics.get("validation", {})
        card = _CARD.format(
            network=network.name,
            data=loop.config.data,
            command=call,
            config=table(("", ""), asdict(loop.config).items()),
            metrics=table(
                ("", ""), [(k, v) for k, v in metrics.items() if isinstance(v, float | int | str)]
            ),
            scores=table(
                ("", "mean IoU", "low", "high"),
                [
                    (kind, *(kinds[kind][key] for key in ("mean_iou", "low", "high")))
                    for kind in ("plain", "crf")
                    if kind in kinds
                ],
            ),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        write_whole(loop.out / "network.md", card.encode())


def _command(config: SegmentConfig) -> str:
    standard = segment_config(config.preset, network=config.network)
    given = {f.name: getattr(config, f.name) for f in fields(config)}
    given = {k: v for k, v in given.items() if v != getattr(standard, k) or k == "network"}
    stated = "".join(f", {name}={value!r}" for name, value in given.items())
    return f'train_segment(segment_config({config.preset!r}{stated}), "RUN")'


_CARD = """# {network} on {data}, segmentation

```
{command}
```

{config}

## Metrics

{metrics}

{scores}

Mean IoU of pictures that were not learned from, at one scale, without (plain) and with a dense
CRF, and its 95 % bootstrap interval. sha256 of the weights: `{sha256}`.
"""
