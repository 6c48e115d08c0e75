r"""What a channel responds to: its strongest patches in a data set, its classes, its like.

:func:`index_channels` runs a data set once and keeps, for each channel of each stage, the
pictures in which it responds most; the index lies on disk, a run that was cut off goes on.
Symbols: :math:`N^c_k` counts how often channel :math:`k` was among the most important ones of a
decomposition for an image of class :math:`c`, :math:`D_k` is its discriminativeness.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from tqdm import tqdm

from ..crops import Forward, field_of_view, run
from ..files import first_line, read_arrays, write_whole
from ..stages import Staged

if TYPE_CHECKING:
    from ..tree import Evidence

__all__ = [
    "ChannelCard",
    "ChannelIndex",
    "Patch",
    "channel_groups",
    "count_channels",
    "discriminativeness",
    "index_channels",
    "map_overlaps",
    "stage_discriminativeness",
]

_SAVE_EVERY = 20.0  # seconds


@runtime_checkable
class Item(Protocol):
    """One item of a data set.

    Its picture is what ``read`` gives or its ``image``; its classes, if it has any, are
    ``class_ids`` or ``class_id``.
    """

    image_id: str


@runtime_checkable
class Items(Protocol):
    """A data set: items by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Item: ...


@dataclass(frozen=True)
class Patch:
    """A place in a data set where a channel responds."""

    image_id: str
    """The picture."""
    item: int
    """Its number in the data set."""
    activation: float
    """The largest activation of the channel in this picture."""
    peak: tuple[int, int]
    """Where: row and column of the stage."""
    field: tuple[int, int, int, int]
    """What the place sees, ``(x0, y0, x1, y1)`` in pixels of the network's input."""


@dataclass(frozen=True, eq=False)
class ChannelCard:
    """What is known of one channel."""

    stage: int
    """Number of the stage, 1 = shallowest."""
    channel: int
    """Number of the channel."""
    patches: tuple[Patch, ...]
    """Where it responds most, one patch per picture, the strongest first."""
    classes: pd.Series
    """How many of these pictures show each class, the most frequent first; empty for data
    without classes."""
    counts: pd.Series
    """How often the channel was among the most important ones, by class; empty if not given."""
    discriminativeness: float
    r""":math:`D` (5.13), from `counts`; NaN if there are none."""

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{patch.image_id}</td><td>{patch.activation:.2f}</td><td>{patch.field}</td>"
            "</tr>"
            for patch in self.patches
        )
        classes = ", ".join(f"{name} {count}" for name, count in self.classes.head(5).items())
        return (
            f"<table><caption>stage {self.stage}, channel {self.channel}; {classes}; "
            f"D {self.discriminativeness:.2f}</caption><tr><th>picture</th><th>activation</th>"
            f"<th>field</th></tr>{rows}</table>"
        )


@dataclass(frozen=True, eq=False)
class ChannelIndex:
    """Where each channel responds most in a data set. Made by :func:`index_channels`."""

    net: Staged
    """The network."""
    data: Items
    """The data set."""
    stages: tuple[int, ...]
    """The stages indexed."""
    activations: tuple[Float[np.ndarray, "_ _"], ...]
    """For each stage the largest activations of each channel, the strongest picture first."""
    items: tuple[Int[np.ndarray, "_ _"], ...]
    """The numbers of the pictures; -1 where the channel is open in fewer."""
    places: tuple[Int[np.ndarray, "_ _"], ...]
    """The places of the peaks, row by row."""
    sizes: Int[np.ndarray, "i 2"]
    """Height and width of each picture as the network takes it."""
    _forwards: dict[tuple[int, int], Forward] = field(default_factory=dict)

    def patches(self, stage: int, channel: int) -> tuple[Patch, ...]:
        """Returns where a channel responds most, one patch per picture, the strongest first."""
        row = self._row(stage)
        if not 0 <= channel < len(self.items[row]):
            raise ValueError(
                f"expected a channel from 0 to {len(self.items[row]) - 1} of stage {stage}, "
                f"got {channel}"
            )
        found = []
        columns = (part[row][channel] for part in (self.items, self.activations, self.places))
        for item, activation, place in zip(*columns, strict=True):
            if item >= 0:
                size = tuple(self.sizes[item].tolist())
                peak = divmod(int(place), self._grid(stage, size)[1])
                box = self._field(stage, peak, size)
                name = self.data[int(item)].image_id
                found.append(Patch(name, int(item), float(activation), peak, box))
        return tuple(found)

    def pictures(self, stage: int, channel: int) -> list[UInt8[np.ndarray, "h w 3"]]:
        """Cuts the patches of a channel out of their pictures."""
        found = []
        for patch in self.patches(stage, channel):
            image = self.net.preprocess(_picture(self.data[patch.item]))[0]
            x0, y0, x1, y1 = patch.field
            mean, std = (image.new_tensor(p)[:, None, None] for p in (self.net.mean, self.net.std))
            pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte()
            found.append(pixels[:, y0:y1, x0:x1].permute(1, 2, 0).cpu().numpy())
        return found

    def card(self, stage: int, channel: int, counts: pd.DataFrame | None = None) -> ChannelCard:
        """Describes one channel.

        Args:
            stage: Number of the stage.
            channel: Number of the channel.
            counts: The table of :func:`count_channels`, if there is one.
        """
        patches = self.patches(stage, channel)
        classes = [c for patch in patches for c in _classes(self.data[patch.item])]
        names = self.net.class_names
        shown = pd.Series([names[c] if names else c for c in classes], dtype=object)
        own = pd.Series(dtype=int)
        if counts is not None:
            rows = counts[(counts["stage"] == stage) & (counts["channel"] == channel)]
            own = rows.set_index("class_id")["count"].sort_values(ascending=False)
        share = own.max() / own.sum() if len(own) else float("nan")
        return ChannelCard(stage, channel, patches, shown.value_counts(), own, float(share))

    def _row(self, stage: int) -> int:
        if stage not in self.stages:
            raise ValueError(f"expected a stage of the index, {self.stages}, got {stage}")
        return self.stages.index(stage)

    def _geometry(self, size: tuple[int, int]) -> Forward:
        # A forward pass on nothing tells sizes and fields of this size of pictures.
        if size not in self._forwards:
            blank = torch.zeros(
                1, len(self.net.mean), *size, device=self.net.device, dtype=self.net.dtype
            )
            self._forwards[size] = run(self.net, blank)
        return self._forwards[size]

    def _grid(self, stage: int, size: tuple[int, int]) -> tuple[int, int]:
        return self._geometry(size).size(stage)

    def _field(
        self, stage: int, peak: tuple[int, int], size: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        return field_of_view(self._geometry(size), stage, *peak)


def index_channels(
    net: Staged,
    data: Items,
    stages: Sequence[int] | None = None,
    *,
    top: int = 9,
    batch_size: int = 16,
    cache: str | Path | None = None,
    progress: bool = True,
) -> ChannelIndex:
    """Finds for every channel the pictures of a data set in which it responds most.

    Args:
        net: The network.
        data: A data set: items with an ``image_id`` and a picture (an attribute ``image`` or a
            method ``read``), and, if they have classes, ``class_ids`` or ``class_id``.
        stages: Numbers of the stages, 1 = shallowest; all if None.
        top: How many pictures to keep per channel. Of equal ones the earlier is kept.
        batch_size: Pictures in one forward pass.
        cache: A file for the index, ``.npz``. It is read if it is there, continued if it is not
            complete, and written while the index is made.
        progress: Whether to show a bar.

    Returns:
        The index.

    Raises:
        ValueError: `data` is empty, `top` below 1, or `cache` is the index of something else.
    """
    numbers = net.check_stages(stages)
    if len(data) == 0 or top < 1:
        raise ValueError(
            f"expected pictures and `top` of at least 1, got {len(data)} pictures and top {top}"
        )
    cache = None if cache is None else Path(cache)
    key = _key(net, data, numbers, top)
    state = _empty(len(data))
    if cache is not None and cache.is_file():
        state = _load(cache, key, len(data), numbers)
    bar = tqdm(
        total=len(data), initial=int(state["done"]), desc="indexing channels", unit="image",
        delay=2, disable=not progress,
    )  # fmt: skip
    saved = perf_counter()
    with bar:
        try:
            for start in range(int(state["done"]), len(data), batch_size):
                stop = min(start + batch_size, len(data))
                state = _extended(net, data, state, range(start, stop), numbers, top)
                bar.update(stop - start)
                if cache is not None and perf_counter() - saved > _SAVE_EVERY:
                    _save(cache, key, state)
                    saved = perf_counter()
        finally:  # also what was done before an error or an interruption
            if cache is not None:
                _save(cache, key, state)
    parts = (tuple(state[f"{name}{n}"] for n in numbers) for name in _ARRAYS)
    return ChannelIndex(net, data, numbers, *parts, state["sizes"])


_ARRAYS = ("activations", "items", "places")


def _empty(count: int) -> dict[str, np.ndarray]:
    return {"done": np.array(0), "sizes": np.zeros((count, 2), np.int64)}


def _extended(
    net: Staged,
    data: Items,
    state: dict[str, np.ndarray],
    new: range,
    numbers: Sequence[int],
    top: int,
) -> dict[str, np.ndarray]:
    # The state with some more pictures; the given one stays whole if reading fails.
    state = state | {"sizes": state["sizes"].copy()}
    images = [(i, net.preprocess(_picture(data[i]))) for i in new]
    for size, group in groupby(images, key=lambda pair: tuple(pair[1].shape[2:])):
        rows, batch = zip(*group, strict=True)
        state["sizes"][list(rows)] = size
        with torch.no_grad():
            activations = net.activations(torch.cat(batch))[0]
        for number in numbers:
            value, place = activations[number - 1].flatten(2).float().max(dim=2)
            found = [value.T.cpu().numpy(), np.array(rows)[None], place.T.cpu().numpy()]
            found[1] = np.where(found[0] > 0, found[1], -1)  # closed everywhere
            names = [f"{name}{number}" for name in _ARRAYS]
            if names[0] in state:
                found = [
                    np.concatenate([state[name], part], axis=1)
                    for name, part in zip(names, found, strict=True)
                ]
            values = np.where(found[1] >= 0, found[0], -np.inf)
            order = np.argsort(-values, axis=1, kind="stable")[:, :top]
            for name, part in zip(names, found, strict=True):
                state[name] = np.take_along_axis(part, order, axis=1)
    return state | {"done": np.array(new.stop)}


def _picture(item: Item) -> object:
    return item.read() if hasattr(item, "read") else item.image


def _classes(item: Item) -> tuple[int, ...]:
    found = getattr(item, "class_ids", getattr(item, "class_id", ()))
    return tuple(found) if isinstance(found, Iterable) else () if found is None else (found,)


def _key(net: Staged, data: Items, numbers: Sequence[int], top: int) -> str:
    digest = hashlib.sha256()
    for name, value in net.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    facts = [net.stage_names, net.mean, net.std, net.image_size, list(numbers), top]
    ids = [data[i].image_id for i in range(len(data))]
    digest.update(json.dumps([facts, ids]).encode())
    return digest.hexdigest()


def _load(path: Path, key: str, count: int, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    try:
        state = read_arrays(path)
        found = str(state.pop("key"))
        if found == key:
            _check_arrays(state, count, numbers)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"expected an index in {str(path)!r}, got a file that cannot be read "
            f"({first_line(error)}); delete it"
        ) from error
    if found != key:
        raise ValueError(
            f"expected the index of this network, data, stages and top in {str(path)!r}, got "
            "another one; name another file or delete it"
        )
    return state


def _check_arrays(state: dict[str, np.ndarray], count: int, numbers: Sequence[int]) -> None:
    wanted = {"done": ("i", 0), "sizes": ("i", 2)}
    if state["done"]:
        kinds = zip(_ARRAYS, "fii", strict=True)
        wanted |= {f"{name}{n}": (kind, 2) for name, kind in kinds for n in numbers}
    found = {name: (array.dtype.kind, array.ndim) for name, array in state.items()}
    if found != wanted or state["sizes"].shape != (count, 2):
        raise ValueError("it holds other arrays")


def _save(path: Path, key: str, state: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: np.savez(file, key=np.array(key), **state))


# --------------------------------------------------------------------------- discriminativeness


def count_channels(trees: Iterable[tuple[int, "Evidence"]]) -> pd.DataFrame:
    r"""Counts how often each channel is among the most important ones of a decomposition.

    Args:
        trees: For each image its label and the evidence for it, of the thesis' top 3.

    Returns:
        :math:`N^c_k`: one row for each ``stage``, ``channel`` and ``class_id`` with its
        ``count``, of one or more.
    """
    rows = [
        (tree.nodes[edge.child].stage, tree.nodes[edge.child].channel, class_id)
        for class_id, tree in trees
        for edge in tree.edges
    ]
    table = pd.DataFrame(rows, columns=["stage", "channel", "class_id"])
    return table.groupby(["stage", "channel", "class_id"]).size().reset_index(name="count")


def discriminativeness(counts: pd.DataFrame) -> pd.DataFrame:
    r"""Measures how much each channel belongs to one class.

    .. math:: D_k = \frac{\max_c N^c_k}{\sum_c N^c_k}

    1 for a channel of a single class; 1/C for one that serves all C classes alike. A channel
    seen once has 1 as well: compare only where ``count`` is large.

    Args:
        counts: The table of :func:`count_channels`.

    Returns:
        One row per channel: ``stage``, ``channel``, ``count`` over all classes,
        ``discriminativeness`` and the ``class_id`` of the largest count.

    References:
        Thesis Eq. 5.13.
    """
    groups = counts.groupby(["stage", "channel"])["count"]
    total, largest = groups.sum(), groups.max()
    first = counts.loc[groups.idxmax(), ["stage", "channel", "class_id"]]
    table = pd.DataFrame({"count": total, "discriminativeness": largest / total}).reset_index()
    return table.merge(first, on=["stage", "channel"])


def stage_discriminativeness(counts: pd.DataFrame, least: int = 1) -> pd.Series:
    """Averages :func:`discriminativeness` over the channels counted `least` times or more.

    References:
        Thesis figure 5.6.
    """
    table = discriminativeness(counts)
    return table[table["count"] >= least].groupby("stage")["discriminativeness"].mean()


# --------------------------------------------------------------------------------------- groups


def map_overlaps(maps: Float[Tensor, "c h w"], level: float = 0.5) -> Float[Tensor, "c c"]:
    """Computes the intersection over union of each pair of maps, cut at `level` of their maximum.

    NaN for a map without a positive value, whose mask is empty.
    """
    masks = _masks(maps, level).flatten(1).double()
    shared = masks @ masks.T
    areas = masks.sum(dim=1)
    overlaps = shared / (areas[:, None] + areas - shared)
    empty = areas == 0
    overlaps[empty], overlaps[:, empty] = torch.nan, torch.nan
    return overlaps


def channel_groups(
    maps: Float[Tensor, "c h w"], threshold: float = 0.5, level: float = 0.5
) -> Iterator[tuple[int, ...]]:
    """Groups channels whose maps light up the same places, directly or by way of others.

    Args:
        maps: The attention maps, or activations, of one decision's channels.
        threshold: The intersection over union above which two channels are linked.
        level: Where a map is cut, as a share of its maximum.

    Yields:
        The channels of each group, the largest group first; channels without a positive value
        belong to none.
    """
    linked = (map_overlaps(maps, level) > threshold).numpy()
    count, labels = connected_components(linked, directed=False)
    groups = [np.flatnonzero(labels == label).tolist() for label in range(count)]
    alive = (maps.flatten(1).amax(dim=1) > 0).tolist()
    for group in sorted(groups, key=lambda group: (-len(group), group)):
        if alive[group[0]]:
            yield tuple(group)


def _masks(maps: Tensor, level: float) -> Bool[Tensor, "*b h w"]:
    top = maps.flatten(-2).amax(dim=-1)[..., None, None]
    return (maps >= level * top) & (top > 0)
