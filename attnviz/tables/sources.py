"""Where the maps of a table's row come from: a training of chapter 4, and what of it.

Each training has a folder of the cache, named after its config, so a stopped table goes on and
tables share trainings.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from tqdm import tqdm

from ..checks import check_whole
from ..explain import package_versions
from ..files import only_one
from ..training import OAAConfig, integral_config, oaa_config, train_integral, train_oaa
from ..training.oaa import Preset, opened
from ..training.pictures import Item
from .processes import processes
from .table import Row, Table, numbers

__all__ = [
    "Source", "cache_for", "config_of", "finished", "folder_of", "images_of", "joined",
    "repeated", "result", "trained", "trained_table",
]  # fmt: skip

_DATA = ("scenes", "voc2012", "coco", "cub")
K, T = TypeVar("K"), TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A training, and what of it gives maps."""

    oaa: OAAConfig
    """The training with accumulation."""
    integral: Mapping[str, object] | None = None
    """Changes of the config of an integral model that learns its maps; None: there is none."""
    maps: Literal["accumulated", "final"] = "accumulated"
    """The accumulated maps, or those of the last network."""
    method: str | None = None
    """How a classifier's stages give maps, for ``final``; None: its class maps, Eq. 4.2."""
    stages: tuple[int, ...] = ()
    """Which stages."""


def folder_of(cache: Path, config: object, **also: object) -> Path:
    """Returns the folder of a config: of a training, or of what is made of one."""
    facts = {key: value for key, value in asdict(config).items() if key != "run"} | also
    text = json.dumps(facts, sort_keys=True, default=str)
    return cache / f"{type(config).__name__}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def images_of(config: OAAConfig) -> str:
    """Says how many images a training learns from."""
    if config.data == "scenes":
        return str(min(config.images, config.limit or config.images))
    return "all" if config.limit is None else str(config.limit)


def config_of(
    id: str, data: str, network: str, preset: Preset | None, **changes: object
) -> OAAConfig:
    """Returns the config of a table's trainings; `changes` that are None change nothing."""
    if data not in _DATA and not Path(data).is_dir():
        raise ValueError(
            f"expected `data` in {_DATA} or a folder of labeled pictures for table {id}, "
            f"got {data!r}"
        )
    if network == "scenes" and preset not in (None, "small"):
        raise ValueError(
            f"expected no `preset` with the small network of scenes, got {preset!r}; leave it out"
        )
    preset = "small" if network == "scenes" else preset or "thesis"
    given = {name: value for name, value in changes.items() if value is not None}
    return oaa_config(preset, data=data, network=network, **given)


def cache_for(cache: Path, config: OAAConfig, root: Path | None) -> Path:
    """Returns the folder of the cache for a config's pictures and weights as they are now.

    Other pictures, classes, files or weights under the same name have another folder. Of masks
    some fifty are compared.
    """
    digest, given = hashlib.sha256(), Path(config.weights).is_file()
    if given:
        digest.update(Path(config.weights).read_bytes())
    if config.data == "scenes":
        return cache / f"scenes-{digest.hexdigest()[:16]}" if given else cache
    for split in ("train", "validation"):
        pictures = opened(config, split, root, False)
        count = 0 if pictures is None else len(pictures)
        for i in range(count):
            item = pictures.item(i)
            facts = [split, item.image_id, pictures.class_ids[i], pictures.sizes[i]]
            digest.update(repr([*facts, item.path.stat().st_size]).encode())
            if i % max(1, count // 50) == 0 and hasattr(item, "read_mask"):
                digest.update(_mask_bytes(item))
    return cache / f"{Path(config.data).name}-{digest.hexdigest()[:16]}"


def _mask_bytes(item: Item) -> bytes:
    try:
        mask = item.read_mask()
    except (ValueError, OSError) as error:
        return str(error).encode()
    return b"" if mask is None else mask.tobytes()


def result(path: Path, make: Callable[[], object], progress: bool) -> dict | None:
    """Returns what a JSON file in a folder of the cache holds; it is made if it is not there.

    A file that is damaged is made again. Where another process makes it, its end is waited for.

    Args:
        path: The file.
        make: Makes it; None is returned if it does not.
        progress: Whether to say that another process is waited for.
    """

    def guarded() -> None:
        if _read(path) is not None:
            return
        lock = path.parent.with_name(f"{path.parent.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        say = partial(tqdm.write, file=sys.stderr) if progress else str
        with only_one(lock, "table", say):
            if _read(path) is None:
                path.unlink(missing_ok=True)
                make()

    processes().once(f"{path.parent.name}/{path.name}", guarded)
    return _read(path)


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def finished(
    how: Callable, config: object, run: Path, root: Path | None, progress: bool
) -> dict[str, object]:
    """Returns the metrics of a training in the cache, which is made or finished here."""

    def train() -> None:
        resume = (run / "checkpoint.pt").is_file()
        how(config, run, resume, data=root, progress=progress)

    metrics = result(run / "metrics.json", train, progress)
    if metrics is None:
        raise ValueError(f"expected the training in {str(run)!r} to end, got a stop; start again")
    return metrics


def trained(
    source: Source, cache: Path, root: Path | None, progress: bool
) -> tuple[Path, Path | None]:
    """Returns the folders of a row's trainings, which are made or finished here."""
    run = folder_of(cache, source.oaa)
    finished(train_oaa, source.oaa, run, root, progress)
    if source.integral is None:
        return run, None
    changes = {"epochs": source.oaa.epochs, "seed": source.oaa.seed, **source.integral}
    config = integral_config(run, device=source.oaa.device, **changes)
    second = folder_of(cache, config, source=run.name)
    finished(train_integral, config, second, root, progress)
    return run, second


def repeated(
    config: OAAConfig,
    repeats: int,
    jobs_of: Callable[[OAAConfig], Mapping[K, Callable[[], T]]],
    progress: bool,
) -> dict[K, list[T]]:
    """Does what every cell of a table needs, once for each seed, in all processes there are.

    Args:
        config: The trainings', with the first seed.
        repeats: How many seeds.
        jobs_of: What to do for a config, by cell.
        progress: Whether to show bars.

    Returns:
        What each cell's jobs gave.
    """
    check_whole("repeats", repeats, 1)
    seeds = [replace(config, seed=config.seed + repeat) for repeat in range(repeats)]
    jobs = [(cell, job) for again in seeds for cell, job in jobs_of(again).items()]
    found: dict[K, list[T]] = {}
    made = processes().each([job for _, job in jobs], progress)
    for (cell, _), value in zip(jobs, made, strict=True):
        found.setdefault(cell, []).append(value)
    return found


def joined(paper: object, found: Sequence[Sequence[float]] | None) -> dict[str, float | None]:
    """Puts what trainings gave beside a number of the thesis.

    Args:
        paper: The number of the thesis.
        found: The value, low and high end of each training. Of one, these are shown; of several,
            their mean, least and largest.
    """
    cell = {"paper": paper, "ours": None, "low": None, "high": None}
    if not found:
        return cell
    values = np.array(found, dtype=np.float64)
    shown = values[0]
    if len(values) > 1:
        shown = np.array([values[:, 0].mean(), values[:, 0].min(), values[:, 0].max()])
    rounded = [None if np.isnan(value) else round(float(value), 2) for value in shown]
    return cell | dict(zip(("ours", "low", "high"), rounded, strict=True))


def trained_table(
    id: str,
    config: OAAConfig,
    seed: int,
    count: int,
    rows: list[Row],
    extra: list[Row],
    notes: list[str],
) -> Table:
    """Returns the table of trainings with a config.

    Args:
        id: Its number.
        config: The trainings', but for the seed.
        seed: The first training's.
        count: Pictures measured.
        rows: Its rows.
        extra: Those that the thesis does not have.
        notes: What must be known to read it.
    """
    return Table(
        id=id, title=numbers()[id]["title"], data=config.data, network=config.network,
        preset=config.preset, seed=seed, versions=package_versions(), n=count, rows=rows,
        extra=extra, notes=notes, weights={"weights": "trained for this table"},
    )  # fmt: skip
