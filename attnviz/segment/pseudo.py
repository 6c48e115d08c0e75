"""Pseudo labels of a whole data set: maps in, label pictures out, in a run that can be resumed.

:func:`write_labels` gives each picture a PNG with VOC's numbers and colors: 0 background,
``1 + class_id``, 255 for what no training counts. The arithmetic is in :mod:`attnviz.labels`.
Maps come from a :data:`MapsOf`: :func:`memory_maps`, :func:`network_maps` and :func:`fused_maps`
make one, and so does any function.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from operator import index
from pathlib import Path
from typing import Literal, Protocol, get_args
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..cam import METHODS, fuse, resize
from ..checks import check_number, check_whole
from ..data.masks import IGNORE, voc_colors
from ..explain import stage_maps
from ..files import only_one, write_whole
from ..images import damage_named, opened, to_pixels
from ..labels import (
    CRF_PRESETS,
    Oversegmentation,
    check_axes,
    check_picture,
    dense_crf,
    detect_saliency,
    saliency_labels,
    superpixel_labels,
    superpixel_mean,
    superpixels,
)
from ..memory import AttentionMemory
from ..networks import load_network
from ..oaa import attention
from ..stages import Staged

__all__ = [
    "Item",
    "LabelConfig",
    "LabelRun",
    "MapsOf",
    "fused_maps",
    "label_file",
    "label_picture",
    "memory_maps",
    "network_maps",
    "run_network",
    "write_labels",
]

LabelRule = Literal["saliency", "affinity", "constant", "superpixels"]
_RECORD, _PROBLEMS = "labels.json", "problems.json"


class Item(Protocol):
    """One picture of a data set: its name, its classes, and ``read()`` or ``image``."""

    image_id: str
    class_ids: Sequence[int]


MapsOf = Callable[[Item], Float[Tensor, "k h w"]]
"""Gives the maps of a picture, one for each of its ``class_ids`` in that order, of any size. What
it is, for the record of the run, may stand in an attribute ``provenance``, a mapping; else it is
the function's name, so that functions that give other maps need other names. One without a name,
as a ``lambda``, can't be told from the next: it labels a new folder only."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Everything that pseudo labels depend on, beside the maps."""

    rule: LabelRule = "saliency"
    """What is background: ``saliency`` (:func:`attnviz.labels.saliency_labels`), without it
    ``affinity`` or ``constant`` (:func:`attnviz.labels.background`), or ``superpixels`` with a
    low mean (Eq. 3.11)."""
    saliency: str = "detect"
    """For that rule: ``detect``, or a folder with a grey picture ``IMAGE_ID.png`` for each."""
    superpixels: Oversegmentation | None = None
    """The regions of Eq. 3.11; with another rule each map becomes its mean over them first, so
    that borders follow the picture."""
    count: int = 1000
    """About how many regions; see :func:`attnviz.labels.superpixels`. A picture of 112 pixels
    has room for about 100."""
    crf: str | None = None
    """A name of :data:`attnviz.labels.CRF_PRESETS`; None: no random field."""
    strength: float | None = None
    """See :func:`attnviz.labels.background`; for ``affinity`` and ``constant``."""
    threshold: float = 0.3
    """What a superpixel's mean, or a value beside saliency, has to reach to count."""
    conflict: float = 0.9
    """What several channels may not exceed; see :func:`attnviz.labels.saliency_labels`."""
    salient: float = 32 / 255
    """A background pixel is not that salient."""
    strong: float = 0.8
    """A salient background pixel is not that much of any class."""
    least: float = 0.01
    """Share of the pixels that objects have to take; else the image is left out."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rule", get_args(LabelRule)),
            ("superpixels", (None, *get_args(Oversegmentation))),
            ("crf", (None, *CRF_PRESETS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"expected `{name}` in {allowed}, got {getattr(self, name)!r}; "
                    "choose one of these"
                )
        if self.rule == "superpixels" and self.superpixels is None:
            raise ValueError(
                f"expected `superpixels` in {get_args(Oversegmentation)} for their rule, got None"
            )
        if not isinstance(self.saliency, str):
            raise TypeError(
                f"expected `saliency` as 'detect' or the name of a folder, got {self.saliency!r}"
            )
        check_whole("count", self.count, 1)
        if self.strength is not None:
            check_number("strength", self.strength, 0)
        for name in ("threshold", "conflict", "salient", "strong", "least"):
            check_number(name, getattr(self, name), 0, 1)


@dataclass(frozen=True)
class LabelRun:
    """What a call of :func:`write_labels` did."""

    folder: Path
    """Where the labels are; ``label_file(folder, image_id)`` is one."""
    written: int
    """Labels written now."""
    kept: int
    """Labels that were there already."""
    problems: dict[str, str] = field(default_factory=dict)
    """By image id, why a picture has no label; also in ``problems.json``."""


def label_file(folder: str | Path, image_id: str) -> Path:
    """Returns the file of a picture's label; what can't stand in a name becomes ``%2F``."""
    return Path(folder) / f"{quote(image_id, safe=' ')}.png"


# ----------------------------------------------------------------------------------- one picture


def label_picture(
    image: UInt8[np.ndarray, "h w 3"],
    maps: Float[Tensor, "k H W"],
    class_ids: Sequence[int],
    config: LabelConfig | None = None,
    saliency: Float[Tensor, "h w"] | None = None,
) -> UInt8[np.ndarray, "h w"]:
    """Returns the pseudo label of one picture.

    Args:
        image: The picture, RGB.
        maps: The map of each class, of any size; resized bilinearly.
        class_ids: The picture's classes, from 0, each once.
        config: What to do; the default rules if None.
        saliency: What the rule ``saliency`` takes in place of the built-in detector's.

    Returns:
        0 background, ``1 + class_id``, or 255.

    Raises:
        TypeError: The picture, the maps, the saliency or a class is of another kind.
        ValueError: The picture is not one of 8 bits, the maps are not one for each class or not
            finite, or a size is another.
    """
    config = LabelConfig() if config is None else config
    check_picture(image)
    size = image.shape[:2]
    class_ids = _class_numbers(class_ids)
    check_axes("maps", maps, "k h w")
    if len(maps) != len(class_ids):
        raise ValueError(f"expected a map for each of {len(class_ids)} classes, got {len(maps)}")
    if not maps.isfinite().all():
        raise ValueError("expected finite maps, got NaN or infinity; check the network")
    if saliency is not None:
        check_axes("saliency", saliency, "h w")
        if tuple(saliency.shape) != size:
            raise ValueError(
                f"expected a saliency of {size[0]} x {size[1]}, the picture's size, "
                f"got {' x '.join(map(str, saliency.shape))}"
            )
    maps = resize(maps.float(), size) if len(maps) else maps.new_zeros(0, *size)
    refine = None if config.crf is None else partial(dense_crf, image, preset=config.crf)
    regions = None
    if config.superpixels is not None:
        regions = superpixels(image, config.superpixels, config.count)
    if config.rule == "superpixels":
        found = superpixel_labels(maps, regions, config.threshold, refine=refine)
    else:
        if regions is not None:
            maps = superpixel_mean(maps, regions)
        rules = {"conflict": config.conflict, "least": config.least, "refine": refine}
        if config.rule == "saliency":
            saliency = detect_saliency(image) if saliency is None else saliency
            rules |= {"salient": config.salient, "strong": config.strong}
            found = saliency_labels(maps, saliency, floor=config.threshold, **rules)
        else:
            rules |= {"rule": config.rule, "strength": config.strength}
            found = saliency_labels(maps, **rules)
    numbers = np.full(256, IGNORE, np.uint8)
    numbers[: 1 + len(class_ids)] = [0, *(1 + class_id for class_id in class_ids)]
    return numbers[found]


def _class_numbers(class_ids: Sequence[int]) -> list[int]:
    try:
        numbers = [index(each) for each in class_ids]
    except TypeError:
        raise TypeError(f"expected classes as whole numbers, got {class_ids!r}") from None
    wrong = [each for each in numbers if not 0 <= each < IGNORE - 1]
    if wrong:
        raise ValueError(f"expected classes from 0 to {IGNORE - 2}, got {wrong[0]}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"expected each class once, got {numbers}; join the maps of a class")
    return numbers


# ------------------------------------------------------------------------------------ a data set


def write_labels(
    items: Iterable[Item],
    maps_of: MapsOf,
    out: str | Path,
    config: LabelConfig | None = None,
    *,
    workers: int = 0,
    progress: bool = True,
) -> LabelRun:
    """Writes the pseudo label of every picture as a PNG in VOC's colors.

    Each file is whole or not there, and a picture that has one is not looked at again: a run
    that was killed goes on where it was. A file that was damaged since is made again, an
    ``image_id`` that comes again is one picture. A picture with a problem gets no label and stops
    nothing; the next call tries it again.

    Args:
        items: The pictures.
        maps_of: Where maps come from; called here, in the order of the pictures.
        out: The folder of the labels; made if it is missing.
        config: What to do; the default rules if None.
        workers: Processes that make labels; 0: all in this one. A script that asks for some
            has to keep its own calls under ``if __name__ == "__main__":``.
        progress: Show a progress bar.

    Returns:
        What was done.

    Raises:
        ValueError: There is no picture, or the labels in `out` were made in another way, or one
            that is not known.
        FileExistsError: Another run is at work in `out`.
        ImportError: A package that `config` needs is missing.
    """
    config, out = LabelConfig() if config is None else config, Path(out)
    if config.crf is not None:  # before hours of maps
        dense_crf(np.zeros((1, 1, 3), np.uint8), torch.ones(2, 1, 1), config.crf)
    if config.rule == "saliency" and config.saliency != "detect":
        if not Path(config.saliency).is_dir():
            raise FileNotFoundError(
                f"expected a folder of saliency pictures, got {config.saliency!r}, which is none; "
                "name another, or 'detect'"
            )
    check_whole("workers", workers, 0)
    make_folder(out, "labels")
    with only_one(out, "label run"):
        return _write(items, maps_of, out, config, workers, progress)


def _write(
    items: Iterable[Item],
    maps_of: MapsOf,
    out: Path,
    config: LabelConfig,
    workers: int,
    progress: bool,
) -> LabelRun:
    _check_record(out, config, maps_of)
    for part in out.glob(".*.part"):  # of a run that was killed
        part.unlink(missing_ok=True)
    files, seen = {path.name for path in out.glob("*.png") if path.is_file()}, set()
    count = len(items) if isinstance(items, Sequence) else None
    counts, problems = {"written": 0, "kept": 0}, {}
    with tqdm(desc="pseudo labels", total=count, unit=" images", disable=not progress) as bar:

        def jobs() -> Iterator[tuple[str, tuple]]:
            for item in items:
                path = label_file(out, str(item.image_id))
                again = path.name in seen
                seen.add(path.name)
                if again or (path.name in files and is_kept(path)):
                    counts["kept"] += not again
                    bar.update()
                    continue
                try:
                    maps = torch.as_tensor(maps_of(item)).detach().float()
                except _PICTURE_ERRORS as error:
                    note(item.image_id, _reason(error))
                    continue
                # as an array: a tensor would be sent as an open file
                yield item.image_id, (item, maps.numpy(force=True), path, config)

        def note(image_id: str, problem: str | None) -> None:
            if problem is None:
                counts["written"] += 1
            else:
                problems[image_id] = problem
            bar.update()

        _run(jobs(), note, workers)
    if counts["written"] + counts["kept"] + len(problems) == 0:
        raise ValueError("expected at least one picture in `items`, got none")
    if problems:
        write_whole(out / _PROBLEMS, json.dumps(problems, indent=2).encode() + b"\n")
    else:
        (out / _PROBLEMS).unlink(missing_ok=True)
    return LabelRun(out, counts["written"], counts["kept"], problems)


_PICTURE_ERRORS = (ValueError, TypeError, OSError, KeyError, OverflowError, RuntimeError)


def _run(
    jobs: Iterator[tuple[str, tuple]], note: Callable[[str, str | None], None], workers: int
) -> None:
    if workers == 0:
        for image_id, job in jobs:
            note(image_id, _label(*job))
        return
    context = multiprocessing.get_context("spawn")  # forked processes and torch's threads lock up
    pool = ProcessPoolExecutor(workers, context, _begin)
    waiting: dict[Future, str] = {}
    try:
        for image_id, job in jobs:
            waiting[pool.submit(_label, *job)] = image_id
            if len(waiting) >= 4 * workers:  # enough ahead that none has to wait
                _collect(waiting, note, FIRST_COMPLETED)
        _collect(waiting, note, "ALL_COMPLETED")
    except BrokenProcessPool as error:
        raise ConnectionError(
            "expected the processes to go on, but one has ended, perhaps for want of memory; "
            "call again with fewer `workers`, what is finished is kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(
    waiting: dict[Future, str], note: Callable[[str, str | None], None], when: str
) -> None:
    for future in wait(waiting, return_when=when).done:
        note(waiting.pop(future), future.result())


def _begin() -> None:
    # In a new process: one thread, and an end with the process that began it, however that ended.
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _label(item: Item, maps: np.ndarray, path: Path, config: LabelConfig) -> str | None:
    # Writes the label of a picture; says why not where it can't.
    try:
        image = to_pixels(_picture(item))
        saliency = None
        if config.rule == "saliency" and config.saliency != "detect":
            saliency = _read_saliency(Path(config.saliency), item.image_id)
        labels = label_picture(image, torch.from_numpy(maps), item.class_ids, config, saliency)
        picture = Image.fromarray(labels)
        picture.putpalette(voc_colors().tobytes())
        write_whole(path, lambda file: picture.save(file, "png"))
    except _PICTURE_ERRORS as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def _read_saliency(folder: Path, image_id: str) -> Float[Tensor, "h w"]:
    path = label_file(folder, image_id)
    try:
        with opened(path, "grey picture") as image, damage_named(path, "grey picture"):
            return torch.from_numpy(np.array(image.convert("L"), np.float32) / 255)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"expected the saliency of {image_id!r}, found no {str(path)!r}; make it, or leave "
            "the picture out"
        ) from None


def make_folder(folder: Path, what: str) -> None:
    """Makes a folder for `what` if it is missing; raises NotADirectoryError if a file is there."""
    file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if file is not None:
        raise NotADirectoryError(
            f"expected a folder for {what}, got the file {str(file)!r}; name another"
        )
    folder.mkdir(parents=True, exist_ok=True)


def is_kept(path: Path) -> bool:
    """Says whether a picture that was written is there and whole; deletes a damaged one."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=["png"]) as picture:
            picture.verify()  # the checksums, to the end
    except (OSError, SyntaxError, ValueError):
        path.unlink()
        return False
    return True


def _check_record(out: Path, config: LabelConfig, maps_of: MapsOf) -> None:
    name = getattr(maps_of, "__name__", "a function")
    facts = getattr(maps_of, "provenance", {"maps": name})
    made = any(out.glob("*.png"))
    check_record(
        out / _RECORD, asdict(config) | {f"maps.{k}": v for k, v in facts.items()}, "labels", made
    )
    if made and not hasattr(maps_of, "provenance") and name in ("a function", "<lambda>"):
        raise ValueError(
            f"expected maps of a function with a name for the labels in {str(out)!r}, got {name}, "
            "which can't be told from another; name it with `def`, and another folder"
        )


def check_record(path: Path, facts: Mapping[str, object], what: str, made: bool) -> None:
    """Writes what pictures are made with, or compares it with what was written.

    Args:
        path: The record's file.
        facts: What they are made with.
        what: What they are, for messages.
        made: Whether some are there.

    Raises:
        ValueError: They were made with something else, or it is not known with what.
    """
    now = json.loads(json.dumps(facts))
    if not path.exists():
        if made:
            raise ValueError(
                f"expected the record {path.name} of the {what} in {str(path.parent)!r}, found "
                "none; name another folder"
            )
        write_whole(path, json.dumps(now, indent=2).encode() + b"\n")
        return
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"expected the record of {what}, got {str(path)!r}, which is damaged; delete "
            "the folder and start again"
        ) from error
    changed = sorted(
        name for name in now.keys() | before.keys() if now.get(name) != before.get(name)
    )
    if changed:
        stated = ", ".join(f"{name} {before.get(name)!r}" for name in changed)
        given = ", ".join(f"{name} {now.get(name)!r}" for name in changed)
        raise ValueError(
            f"expected {what} as in {str(path.parent)!r} ({stated}), got {given}; "
            "name another folder"
        )


# ---------------------------------------------------------------------------- where maps come from


@dataclass(frozen=True)
class _Maps:
    make: MapsOf
    provenance: Mapping[str, object]

    def __call__(self, item: Item) -> Float[Tensor, "k h w"]:
        if not len(item.class_ids):
            return torch.zeros(0, 1, 1)
        return self.make(item)


def memory_maps(run: str | Path) -> MapsOf:
    """Gives the maps that a run of :func:`~attnviz.training.train_oaa` has accumulated.

    Args:
        run: The folder of the finished run.
    """
    memory = AttentionMemory.load(Path(run) / "memory")

    def make(item: Item) -> Float[Tensor, "k h w"]:
        return torch.stack([memory[item.image_id, class_id] for class_id in item.class_ids])

    return _Maps(make, {"kind": "memory", "run_id": memory.run_id})


def run_network(run: str | Path, *, device: str | torch.device = "cpu") -> Staged:
    """Loads the network at the end of a run of chapter 4, for pictures at the run's size.

    Args:
        run: The folder of the finished run.
        device: Where the network is put.
    """
    run = Path(run)
    source = json.loads((run / "config.json").read_text())
    if "run" in source:  # an integral model sees pictures as the run that it learned from
        source = json.loads((Path(source["run"]) / "config.json").read_text())
    net = load_network("oaa", run / "network.safetensors", device=device)
    size = source["size"]
    net.image_size = (size, size) if source["fit"] == "square" else size
    return net


def network_maps(run: str | Path, *, device: str | torch.device = "cpu") -> MapsOf:
    """Gives the class maps (Eq. 4.2) of the network at the end of a run, at the run's size.

    Of a run of :func:`~attnviz.training.train_integral` they are those of OAA+.

    Args:
        run: See :func:`run_network`.
        device: See :func:`run_network`.
    """
    net = run_network(run, device=device)

    @torch.no_grad()
    def make(item: Item) -> Float[Tensor, "k h w"]:
        maps = attention(net.model.class_maps(net.preprocess(_picture(item))))
        return maps[0, list(item.class_ids)].cpu()

    return _Maps(make, {"kind": "network", **net.provenance})


def fused_maps(
    net: Staged, method: str = "layercam", stages: Sequence[int] | None = None, gamma: float = 2.0
) -> MapsOf:
    """Gives maps of the stages of a classifier, fused (Eq. 3.9), for a picture's own classes.

    Args:
        net: A network whose classes are those of the pictures.
        method: A name of :data:`attnviz.cam.METHODS`.
        stages: Numbers of the stages, 1 = shallowest; of a single one the map is not scaled. All
            if None.
        gamma: See :func:`attnviz.fuse`.
    """
    if method not in METHODS:
        raise ValueError(f"expected `method` in {tuple(METHODS)}, got {method!r}")
    numbers = net.check_stages(stages)

    def make(item: Item) -> Float[Tensor, "k h w"]:
        image, classes = net.preprocess(_picture(item)), [list(item.class_ids)]
        maps = stage_maps(net, image, classes, (method,), stages=numbers)[method]
        return fuse(maps, gamma)[0].cpu()

    facts = {"kind": method, "stages": list(numbers), "gamma": gamma, "network": net.name}
    return _Maps(make, {**facts, **net.provenance})


def _picture(item: Item) -> Image.Image | np.ndarray:
    return item.read() if hasattr(item, "read") else item.image
