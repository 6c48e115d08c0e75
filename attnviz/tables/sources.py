"""Where the maps of a table's row come from: a training of chapter 4, and what of it.

Each training has a folder of the cache, named after its config, so a stopped table goes on and
tables share trainings.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from ..explain import package_versions
from ..training import OAAConfig, integral_config, train_integral, train_oaa
from .processes import processes
from .table import Row, Table, numbers

__all__ = ["Source", "folder_of", "images_of", "joined", "repeated", "trained", "trained_table"]

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


def trained(
    source: Source, cache: Path, root: Path | None, progress: bool
) -> tuple[Path, Path | None]:
    """Returns the folders of a row's trainings, which are made or finished here."""

    def train(how: Callable, config: object, out: Path) -> None:
        processes().once(
            out.name,
            lambda: how(
                config, out, (out / "checkpoint.pt").is_file(), data=root, progress=progress
            ),
        )

    run = folder_of(cache, source.oaa)
    train(train_oaa, source.oaa, run)
    if source.integral is None:
        return run, None
    changes = {"epochs": source.oaa.epochs, "seed": source.oaa.seed, **source.integral}
    config = integral_config(run, device=source.oaa.device, **changes)
    second = folder_of(cache, config, source=run.name)
    train(train_integral, config, second)
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
    if repeats < 1:
        raise ValueError(f"expected `repeats` of at least 1, got {repeats}")
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
