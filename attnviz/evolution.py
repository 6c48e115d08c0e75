"""The evolution of attention during a training: recorded by the loop, read by the player.

For a few watched pairs of image and class, every epoch leaves the map of that epoch and the map
accumulated so far, both on the feature grid with 8 bits. A recording is the folder
``RUN/evolution``: ``evolution.json``, one ``epoch-0001.npz`` per epoch, the pictures and, where
they are known, the true masks. Every file is written whole, so a recording can be read while the
training goes on, and a training asked to end by :func:`request_stop` from another process.

This module knows neither the training nor the panel.
"""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from .checks import check_choice
from .files import first_line, read_arrays, write_whole
from .images import damage_named, opened

__all__ = [
    "Evolution",
    "EvolutionWriter",
    "Watch",
    "Watched",
    "load_evolution",
    "request_stop",
    "stop_requested",
]

Method = Literal["oaa", "integral"]
Pair = tuple[str, int]

FORMAT = 1
"""The version of the folder's layout."""

_IGNORED = 128  # in a mask file, between 0 (not the class) and 255 (the class)


class _Maps(Protocol):
    def __getitem__(self, pair: Pair) -> Tensor | np.ndarray: ...


class Watch(NamedTuple):
    """A pair of image and class to record."""

    image_id: str
    """The image's key in the data set."""
    class_id: int
    """The class whose map is recorded."""
    image: Image.Image | UInt8[np.ndarray, "H W 3"]
    """The picture, as the reader shall see it."""
    grid: tuple[int, int]
    """Height and width of the recorded maps."""
    mask: Bool[np.ndarray, "H W"] | UInt8[np.ndarray, "H W"] | None = None
    """Where the class truly is: booleans, or 0 no, 1 yes, 255 ignored."""


@dataclass(frozen=True)
class Watched:
    """A recorded pair of image and class."""

    image_id: str
    """The image's key in the data set."""
    class_id: int
    """The class whose map is recorded."""
    size: tuple[int, int]
    """Height and width of the picture."""
    grid: tuple[int, int]
    """Height and width of the maps."""
    picture: str
    """The picture's file in the folder."""
    mask: str | None
    """The file of the true mask in the folder, if it is known."""


@dataclass(frozen=True)
class Evolution:
    """What a training has recorded so far."""

    run: Path
    """The folder of the run."""
    run_id: str
    """The run's own identifier."""
    network: str
    """The network's name."""
    data: str
    """The data set's name."""
    method: Method
    """``oaa`` accumulates; ``integral`` learns from accumulated maps and has none of its own."""
    rule: str
    """How maps are accumulated: ``max`` or ``mean``."""
    drop: bool
    """Whether the attention drop layer was on (OAA++)."""
    planned: int
    """The number of epochs that the training plans."""
    class_names: tuple[str, ...]
    """A class id is a place in it."""
    watched: tuple[Watched, ...]
    """The recorded pairs."""
    epochs: tuple[int, ...]
    """The epochs that could be read, ascending, from 1."""
    maps: tuple[UInt8[np.ndarray, "t _ _"], ...]
    """For each pair its map in every epoch, 255 = 1."""
    accumulated: tuple[UInt8[np.ndarray, "t _ _"], ...]
    """For each pair its accumulated map after every epoch; empty for ``integral``."""
    scores: Float[np.ndarray, "t n"]
    """The class score of every pair; NaN where it is not known."""
    accepted: Bool[np.ndarray, "t n"]
    """Whether the epoch's map passed the gate and was accumulated."""
    curves: tuple[dict[str, float], ...]
    """The rows of ``history.csv``, one per epoch; missing values are NaN."""
    skipped: tuple[str, ...]
    """One line for each file that could not be read."""

    @property
    def variant(self) -> str:
        """Its name in the thesis: ``OAA``, ``OAA++`` (drop), ``OAA+`` or ``OAA+++`` (integral)."""
        return "OAA" + "+" * (2 * self.drop + (self.method == "integral"))

    @property
    def finished(self) -> bool:
        """Whether every planned epoch is there."""
        return bool(self.epochs) and self.epochs[-1] >= self.planned

    def picture(self, number: int) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the picture of a pair."""
        return _pixels(self.run / "evolution" / self.watched[number].picture, "RGB")

    def mask(self, number: int) -> UInt8[np.ndarray, "H W"] | None:
        """Returns where the class of a pair truly is: 0 no, 1 yes, 255 ignored; or None."""
        name = self.watched[number].mask
        if name is None:
            return None
        levels = _pixels(self.run / "evolution" / name, "L")
        return np.where(levels == _IGNORED, 255, levels > _IGNORED).astype(np.uint8)


class EvolutionWriter:
    """Records the evolution of a training into ``RUN/evolution``.

    To be made once at the start of a training and again when it is resumed; one process only. It
    takes back a stop that was asked for before.

    Args:
        run: The folder of the run; made if it is missing.
        watched: The pairs of image and class to record.
        run_id: The run's own identifier; a resumed run keeps it.
        network: The network's name.
        data: The data set's name.
        class_names: The names of all classes.
        epochs: The number of epochs planned.
        method: ``oaa``, or ``integral``, which has no accumulated maps.
        rule: How maps are accumulated, for the reader.
        drop: Whether the attention drop layer is on, for the reader.

    Raises:
        FileExistsError: The folder holds the recording of another run.
        ValueError: The watched pairs are not usable.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        watched: Sequence[Watch],
        *,
        run_id: str,
        network: str,
        data: str,
        class_names: Sequence[str],
        epochs: int,
        method: Method = "oaa",
        rule: str = "max",
        drop: bool = False,
    ) -> None:
        check_choice("method", method, Method)
        self.run, self.folder = Path(run), Path(run) / "evolution"
        self.run_id, self.method = str(run_id), method
        self.folder.mkdir(parents=True, exist_ok=True)
        header = self.folder / "evolution.json"
        if header.is_file() and _read_header(header)["run_id"] != self.run_id:
            raise FileExistsError(
                f"expected the recording of run {self.run_id!r} in {str(self.folder)!r}, got one "
                f"of {_read_header(header)['run_id']!r}; choose another folder"
            )
        _check_watched(watched, len(class_names))
        self.watched = tuple(self._save_watched(number, each) for number, each in _named(watched))
        settings = {
            "format": FORMAT,
            "run_id": self.run_id,
            "network": network,
            "data": data,
            "method": method,
            "rule": rule,
            "drop": bool(drop),
            "planned": int(epochs),
            "class_names": [str(name) for name in class_names],
            "watched": [asdict(each) for each in self.watched],
        }
        text = json.dumps(settings, indent=1).encode()
        write_whole(header, text)
        (self.run / "stop").unlink(missing_ok=True)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The watched ``(image_id, class_id)``, in the order given."""
        return tuple((each.image_id, each.class_id) for each in self.watched)

    def write(
        self,
        epoch: int,
        maps: Mapping[Pair, Tensor | np.ndarray],
        accumulated: _Maps | None = None,
        scores: Mapping[Pair, float] | None = None,
        accepted: Mapping[Pair, bool] | None = None,
    ) -> Path:
        """Records one epoch; an epoch recorded before is replaced.

        Args:
            epoch: The number of the epoch, from 1.
            maps: The map of each pair in this epoch, ``(h, w)`` on its grid, in [0, 1] and not
                flipped; a pair that is missing was not seen and has a zero map.
            accumulated: Gives the accumulated map of each pair, for instance the memory itself;
                None for ``integral``.
            scores: The class score of each pair; NaN where missing.
            accepted: Whether the map of a pair was accumulated; False where missing.

        Returns:
            The path of the file.
        """
        if epoch < 1:
            raise ValueError(f"expected `epoch` of at least 1, got {epoch}")
        if (accumulated is None) != (self.method == "integral"):
            got = "none" if accumulated is None else "some"
            raise ValueError(
                f"expected `accumulated` maps for 'oaa' and none for 'integral', got {got} for "
                f"{self.method!r}"
            )
        scores, accepted = scores or {}, accepted or {}
        arrays = {
            "run_id": np.array(self.run_id),
            "scores": np.array([float(scores.get(p, math.nan)) for p in self.pairs], np.float32),
            "accepted": np.array([bool(accepted.get(pair, False)) for pair in self.pairs]),
        }
        for number, (pair, each) in enumerate(zip(self.pairs, self.watched, strict=True)):
            seen = maps.get(pair)
            seen = np.zeros(each.grid) if seen is None else seen
            arrays[f"maps_{number:03d}"] = _eight_bit(seen, each.grid, pair)
            if accumulated is not None:
                levels = _eight_bit(accumulated[pair], each.grid, pair)
                arrays[f"accumulated_{number:03d}"] = levels
        path = self.folder / f"epoch-{epoch:04d}.npz"
        write_whole(path, lambda file: np.savez_compressed(file, **arrays))
        return path

    def _save_watched(self, number: int, each: Watch) -> Watched:
        image = each.image
        image = image.convert("RGB") if isinstance(image, Image.Image) else Image.fromarray(image)
        picture, mask = f"picture-{number:03d}", None
        suffix, encoded = _encoded(image)
        write_whole(self.folder / (picture + suffix), encoded)
        if each.mask is not None:
            mask = f"mask-{number:03d}-{int(each.class_id)}.png"
            levels = np.select([each.mask == 255, each.mask > 0], [_IGNORED, 255], 0)
            drawn = Image.fromarray(levels.astype(np.uint8))
            write_whole(self.folder / mask, lambda file: drawn.save(file, "PNG"))
        size, grid = (image.height, image.width), (int(each.grid[0]), int(each.grid[1]))
        return Watched(str(each.image_id), int(each.class_id), size, grid, picture + suffix, mask)


def load_evolution(run: str | os.PathLike[str]) -> Evolution:
    """Reads what a training has recorded so far; it may still be running.

    An epoch whose file is damaged or of another run is left out and named in ``skipped``.

    Args:
        run: The folder of the run.

    Raises:
        FileNotFoundError: There is no run, or nothing was recorded.
        ValueError: The recording can't be read.
    """
    run = Path(run)
    header = run / "evolution" / "evolution.json"
    if not run.is_dir():
        raise FileNotFoundError(
            f"expected the folder of a run, got {str(run)!r}, which is not there; "
            "attnviz train oaa --out makes one"
        )
    if not header.is_file():
        raise FileNotFoundError(
            f"expected a recorded run in {str(run)!r}, got a folder without "
            "evolution/evolution.json; has the training begun?"
        )
    settings = _read_header(header)
    try:
        watched = tuple(map(_watched_from, settings["watched"]))
        known = {name: _of_kind(kind, settings[name], name) for name, kind in _KNOWN.items()}
        class_names = tuple(_of_kind(str, name, "class") for name in settings["class_names"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a whole recording in {str(header)!r}, got a damaged one "
            f"({first_line(error)}); delete the folder and train again"
        ) from error
    recorded, skipped = [], []
    for path in sorted(header.parent.glob("epoch-*.npz")):
        try:
            number = int(path.stem.removeprefix("epoch-"))
            recorded.append((number, _read_epoch(path, watched, known)))
        except ValueError as error:
            skipped.append(f"{path.name} left out: {error}")
    recorded.sort(key=lambda each: each[0])
    curves, problem = _read_history(run / "history.csv")
    return Evolution(
        run=run,
        **known,
        class_names=class_names,
        watched=watched,
        epochs=tuple(number for number, _ in recorded),
        maps=_stacked("maps", recorded, watched),
        accumulated=_stacked("accumulated", recorded, watched) if known["method"] == "oaa" else (),
        scores=_rows("scores", recorded, len(watched), np.float32),
        accepted=_rows("accepted", recorded, len(watched), bool),
        curves=curves,
        skipped=(*skipped, *problem),
    )


def request_stop(run: str | os.PathLike[str]) -> None:
    """Asks the training of a run to end at its next step, with a checkpoint."""
    if not Path(run).is_dir():
        raise FileNotFoundError(
            f"expected the folder of a run, got {str(run)!r}, which is not there"
        )
    (Path(run) / "stop").touch()


def stop_requested(run: str | os.PathLike[str]) -> bool:
    """Whether the training of a run was asked to end; cheap enough for every step."""
    return (Path(run) / "stop").exists()


# --------------------------------------------------------------------------------------- files


def _read_header(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text("utf-8"))
        version = settings["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a recording, got {str(path)!r}, which is damaged; "
            "delete the folder and train again"
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"expected a recording of format {FORMAT}, got {version!r} in {str(path)!r}; "
            "install the version of attnviz that wrote it"
        )
    return settings


_KNOWN = {
    "run_id": str, "network": str, "data": str, "method": str, "rule": str, "drop": bool,
    "planned": int,
}  # fmt: skip


def _of_kind(kind: type, value: object, name: str) -> object:
    if type(value) is not kind:
        raise TypeError(f"{name} {value!r}")
    return value


def _watched_from(row: dict) -> Watched:
    sides = {
        name: tuple(_of_kind(int, side, name) for side in row[name]) for name in ("size", "grid")
    }
    if any(len(each) != 2 or not 0 < min(each) <= max(each) < 65_536 for each in sides.values()):
        raise ValueError(f"sizes {sides}")
    for name, kind in (("image_id", str), ("class_id", int), ("picture", str)):
        _of_kind(kind, row[name], name)
    if row["mask"] is not None:
        _of_kind(str, row["mask"], "mask")
    return Watched(**row | sides)


def _read_epoch(
    path: Path, watched: Sequence[Watched], known: Mapping[str, object]
) -> dict[str, np.ndarray]:
    kinds = ("maps", "accumulated") if known["method"] == "oaa" else ("maps",)
    try:
        arrays = read_arrays(path)
        run_id = str(arrays["run_id"])
    except (ValueError, KeyError) as error:
        raise ValueError("it is damaged or cut short") from error
    if run_id != known["run_id"]:
        raise ValueError(f"it belongs to run {run_id!r}")
    shapes = {name: (np.dtype(kind), (len(watched),)) for name, kind in
              (("scores", np.float32), ("accepted", bool))}  # fmt: skip
    for number, each in enumerate(watched):
        for kind in kinds:
            shapes[f"{kind}_{number:03d}"] = (np.dtype(np.uint8), each.grid)
    for name, (dtype, shape) in shapes.items():
        found = arrays.get(name, np.zeros(()))
        if (found.dtype, found.shape) != (dtype, shape):
            raise ValueError(
                f"expected {name} as {dtype} {shape}, got {found.dtype} {found.shape}"
            )
    return arrays


def _read_history(path: Path) -> tuple[tuple[dict[str, float], ...], list[str]]:
    if not path.is_file():
        return (), []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                {name: float(text) if text else math.nan for name, text in row.items()}
                for row in csv.DictReader(file, restval="")
            ]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        return (), [f"history.csv left out: {' '.join(str(error).split())}"]
    return tuple(rows), []


def _stacked(
    kind: str, recorded: Sequence[tuple[int, dict]], watched: Sequence[Watched]
) -> tuple[np.ndarray, ...]:
    return tuple(
        np.stack([arrays[f"{kind}_{number:03d}"] for _, arrays in recorded])
        if recorded
        else np.zeros((0, *each.grid), np.uint8)
        for number, each in enumerate(watched)
    )


def _rows(kind: str, recorded: Sequence[tuple[int, dict]], count: int, dtype: type) -> np.ndarray:
    return np.array([arrays[kind] for _, arrays in recorded], dtype).reshape(-1, count)


def _pixels(path: Path, mode: str) -> UInt8[np.ndarray, "H W *c"]:
    try:
        with opened(path) as image, damage_named(path):
            return np.asarray(image.convert(mode))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected a whole picture, got {str(path)!r}, which is missing or damaged; "
            "train again to record it"
        ) from error


def _encoded(image: Image.Image) -> tuple[str, bytes]:
    # Small and drawn pictures stay exact, photographs take a fifth.
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    if png.tell() <= 64_000:
        return ".png", png.getvalue()
    image.save(jpeg, "JPEG", quality=92)
    return ".jpg", jpeg.getvalue()


# --------------------------------------------------------------------------------------- input


def _check_watched(watched: Sequence[Watch], classes: int) -> None:
    if not watched:
        raise ValueError("expected at least one pair to record in `watched`, got none")
    pairs = [(each.image_id, each.class_id) for each in watched]
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise ValueError(f"expected each pair once in `watched`, got {twice} twice")
    for each in watched:
        size = each.image.size[::-1] if isinstance(each.image, Image.Image) else each.image.shape
        if not 0 <= each.class_id < classes:
            raise ValueError(
                f"expected class ids from 0 to {classes - 1} in `watched`, got {each.class_id}"
            )
        if each.mask is not None and each.mask.shape != tuple(size[:2]):
            raise ValueError(
                f"expected the mask of {each.image_id!r} in the size of its picture "
                f"{tuple(size[:2])}, got {each.mask.shape}"
            )


def _named(watched: Sequence[Watch]) -> list[tuple[int, Watch]]:
    # Pairs of one image share its picture's number.
    numbers: dict[str, int] = {}
    return [(numbers.setdefault(each.image_id, len(numbers)), each) for each in watched]


def _eight_bit(
    map: Tensor | np.ndarray, grid: tuple[int, int], pair: Pair
) -> UInt8[np.ndarray, "h w"]:
    values = map.detach().float().cpu().numpy() if isinstance(map, Tensor) else np.asarray(map)
    if values.shape != tuple(grid):
        raise ValueError(f"expected a map of shape {grid} for {pair}, got {values.shape}")
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"expected a map in [0, 1] for {pair}, got values from {values.min()} to "
            f"{values.max()}; divide it by its maximum, Eq. 4.2"
        )
    return np.floor(values * 255.0 + 0.5).astype(np.uint8)
