"""Pictures that a network is measured on, one record a picture, kept at once."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.cub import load_cub
from ..data.folder import LabeledImage
from ..data.imagenet import load_imagenet
from ..data.masks import MaskedImage
from ..data.scenes import CLASS_NAMES, draw_scene
from ..data.voc import load_voc
from ..localize import Box
from ..stages import Staged
from .processes import Processes, processes

__all__ = ["Item", "Part", "Store", "open_items", "run_part"]

Data = Literal["scenes", "ilsvrc", "cub", "voc2012"]

STAGES = ("S5", "S4", "S3", "S2", "S1")
CLASS_COUNTS = {"scenes": len(CLASS_NAMES), "ilsvrc": 1000, "cub": 200}
FORMAT = 1  # of the cache files; another number when the same settings give other values
_READERS = 4  # threads that decode pictures


@dataclass(frozen=True)
class Item:
    """A picture to measure on."""

    image_id: str
    """Its name."""
    class_id: int | None
    """Its class; None where the highest score decides."""
    boxes: tuple[Box, ...]
    """True boxes of that class."""
    digest: str
    """Hash of what the measurements depend on besides the settings."""
    read: Callable[[], np.ndarray]
    """Reads its pixels."""

    @property
    def key(self) -> tuple[str, str]:
        """What a record is found by."""
        return self.image_id, self.digest


def open_items(
    data: Data, root: Path, limit: int | None, seed: int, progress: bool
) -> tuple[list[Item], list[str]]:
    """Returns the pictures with a class and a box, and what there is to say about the data."""
    if data == "scenes":
        return _scenes(200 if limit is None else limit, seed), [
            "generated pictures: split test of scenes, few objects, only pictures whose objects "
            "are of one class"
        ]
    if data == "voc2012":
        pictures = load_voc(root / data, "val", limit=limit, progress=progress)
        items = [
            Item(each.image_id, None, (), _digest(each.image_id), _reader(each))
            for each in pictures
        ]
        return items, [f"{len(items)} of the 1,449 validation pictures", *pictures.problems]
    if data == "ilsvrc":
        images = load_imagenet(root / "ilsvrc", "val", limit=limit, progress=progress)
        whole, split = 50_000, "validation"
    else:
        images = load_cub(root / "cub", "test", limit=limit, progress=progress)
        whole, split = 5_794, "test"
    items = [_picture(image) for image in images if image.boxes and image.class_id is not None]
    notes = list(images.problems)
    if len(items) < whole:
        notes.insert(
            0,
            f"{len(items)} of the {whole:,} {split} pictures: not the numbers of the whole set",
        )
    if not items:
        raise ValueError(f"expected pictures of {data} with a class and a box, got none")
    return items, notes


def _picture(image: LabeledImage) -> Item:
    size = image.path.stat().st_size if image.path.is_file() else None
    facts = json.dumps([image.class_id, image.boxes, size])
    return Item(
        image.image_id, image.class_id, image.boxes, _digest(facts),
        lambda: np.array(image.read()),
    )  # fmt: skip


def _reader(image: MaskedImage) -> Callable[[], np.ndarray]:
    return lambda: np.array(image.read())


def _scenes(count: int, seed: int) -> list[Item]:
    items: list[Item] = []
    index = 0
    while len(items) < count:
        scene = draw_scene(index, split="test", seed=seed, objects="few")
        if len(scene.class_ids) == 1:
            boxes = tuple(each.box for each in scene.objects)
            items.append(
                Item(
                    scene.image_id, scene.class_ids[0], boxes, _digest(scene.image.tobytes()),
                    lambda index=index: draw_scene(
                        index, split="test", seed=seed, objects="few", masks=False
                    ).image,
                )
            )  # fmt: skip
        index += 1
    return items


def _digest(value: str | bytes) -> str:
    value = value.encode() if isinstance(value, str) else value
    return hashlib.sha256(value).hexdigest()[:16]


def tensors(net: Staged, pixels: Sequence[np.ndarray]) -> Tensor:
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(part)[:, None, None] for part in (net.mean, net.std))
    return ((images - mean) / std).to(net.device, net.dtype)


@dataclass(frozen=True)
class Part:
    """A pass over the pictures, which makes one record for each."""

    name: str
    facts: dict[str, object]
    measure: Callable[[Sequence[Item], Sequence[np.ndarray]], list[dict[str, object]]]
    settings: tuple[object, ...] = ()


class Store:
    """The records of one part, one line of JSON a picture, in one file a process."""

    def __init__(self, folder: Path, name: str, facts: Mapping[str, object]) -> None:
        key = _digest(json.dumps(facts, sort_keys=True))
        self.folder, self.stem = folder, f"{name}-{key}"
        self.own = folder / f"{self.stem}.{processes().rank}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.own.exists():
                self.add([{"facts": facts}])
        except OSError as error:
            raise OSError(
                f"expected `cache` as a folder that can be written to, got {str(folder)!r} "
                f"({error.strerror}); choose another one"
            ) from error
        data = self.own.read_bytes()
        if not data.endswith(b"\n"):  # a line that was being written when the run was stopped
            with self.own.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def load(self) -> dict[tuple[str, str], dict]:
        """Returns the last record of each picture as it was then, of all processes."""
        found: dict[tuple[str, str], dict] = {}
        for path in sorted(self.folder.glob(f"{self.stem}.*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and {"id", "digest"} <= record.keys():
                    found[record["id"], record["digest"]] = record
        return found

    def add(self, records: Sequence[dict]) -> None:
        """Writes records at once."""
        text = "".join(json.dumps(record, ensure_ascii=True) + "\n" for record in records)
        with self.own.open("a", encoding="utf-8") as file:
            file.write(text)


def run_part(
    part: Part, items: Sequence[Item], store: Store, batch: int, progress: bool
) -> tuple[dict[str, dict], list[str]]:
    """Returns the record of every picture that can be read, and the names of the others.

    A batch is always the same pictures, so that a stopped run, and one of several processes,
    gives the same values to the last bit. All processes return all records, and the first one's
    folder keeps them.

    Raises:
        ConnectionError: Another process has ended.
        ValueError: Another process has other pictures or another network.
    """
    team = processes()
    with team.answering():
        records = store.load()
        todo, common = _missing(team, store, items, records, batch)
        bar = tqdm(
            total=len(todo), desc=part.name, unit="batch", delay=2,
            disable=not progress or team.rank > 0,
        )  # fmt: skip

        def show(done: int, waiting: str) -> None:
            bar.set_postfix_str(waiting, refresh=False)
            bar.update(done - bar.n)

        with bar:
            for block, pixels in _read_ahead(team.share(todo)):
                readable = [i for i, picture in enumerate(pixels) if picture is not None]
                if any(block[i].key not in records for i in readable):
                    chosen = [block[i] for i in readable]
                    measured = part.measure(chosen, [pixels[i] for i in readable])
                    new = [
                        {"id": item.image_id, "digest": item.digest, **values}
                        for item, values in zip(chosen, measured, strict=True)
                    ]
                    store.add(new)
                    records |= {(record["id"], record["digest"]): record for record in new}
                show(team.advance(), "")
            team.wait(show)
        own = {key: record for key, record in records.items() if key not in common}
        for other in team.gather(own):
            records |= other
        if team.rank == 0 and team.count > 1:  # other machines may have other folders
            there = store.load()
            store.add([record for key, record in records.items() if key not in there])
    unread = [item.image_id for item in items if item.key not in records]
    return {item.image_id: records[item.key] for item in items if item.key in records}, unread


def _missing(
    team: Processes, store: Store, items: Sequence[Item], records: Collection, batch: int
) -> tuple[list[Sequence[Item]], set]:
    # The batches in which no process knows a picture's record, and what all of them know.
    text = json.dumps([store.stem, batch, [item.key for item in items]])
    found = team.gather((_digest(text), len(items), set(records)))
    if len({digest for digest, _, _ in found}) > 1:
        counts = ", ".join(str(count) for _, count, _ in found)
        raise ValueError(
            "expected the same pictures, network and versions in all processes, got others; give "
            f"all machines the same data ({counts} pictures)"
        )
    keys = [each for _, _, each in found]
    known = set.union(*keys)
    blocks = [items[start : start + batch] for start in range(0, len(items), batch)]
    todo = [block for block in blocks if any(item.key not in known for item in block)]
    return todo, set.intersection(*keys)


def _read_ahead(
    blocks: Sequence[Sequence[Item]],
) -> Iterator[tuple[Sequence[Item], list[np.ndarray | None]]]:
    # Reads the pictures of the next block while this one is measured.
    with ThreadPoolExecutor(_READERS) as pool:
        ahead: list[Future] = []
        for number in range(len(blocks)):
            waiting = ahead or [pool.submit(_read, item) for item in blocks[number]]
            following = blocks[number + 1] if number + 1 < len(blocks) else []
            ahead = [pool.submit(_read, item) for item in following]
            yield blocks[number], [each.result() for each in waiting]


def _read(item: Item) -> np.ndarray | None:
    try:
        return item.read()
    except (ValueError, OSError):  # reported at the end
        return None


def state_hash(net: Staged) -> str:
    digest = hashlib.sha256()
    for name, value in net.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def stage_notes(net: Staged, stages: Sequence[str], id: str) -> list[str]:
    names = net.stage_names[-len(stages) :][::-1]
    pairs = ", ".join(f"{stage} = {name}" for stage, name in zip(stages, names, strict=True))
    notes = []
    if net.name != "vgg16":
        notes.append(f"the thesis' network is VGG16, ours is {net.name}")
    notes.append(f"stages, the deepest is S5: {pairs}")
    missing = STAGES[len(stages) :]
    if missing and id in ("3.1", "3.2", "3.3", "3.4", "3.7"):
        notes.append(f"{net.name} has {len(stages)} stages: numbers with {missing[0]} are empty")
    if len(net.stage_names) > len(STAGES):
        notes.append(f"the {len(net.stage_names) - len(STAGES)} shallowest stages are left out")
    return notes


def check_classes(net: Staged, data: Data) -> None:
    count = CLASS_COUNTS[data]
    if net.class_names is not None and len(net.class_names) != count:
        raise ValueError(
            f"expected a network of the {count} classes of {data}, got {net.name} with "
            f"{len(net.class_names)}; name another network or other data"
        )


def check_class_ids(net: Staged, items: Sequence[Item], data: Data) -> None:
    # A network whose classes have no names says how many there are only by its scores.
    if net.class_names is not None:
        return
    height, width = (net.image_size,) * 2 if isinstance(net.image_size, int) else net.image_size
    blank = torch.zeros(1, len(net.mean), height, width, device=net.device, dtype=net.dtype)
    scores, last = net(blank), max(item.class_id for item in items)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] <= last:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"expected a network with a score for each class of {data}, up to {last}, got "
            f"{net.name} with scores {got}; name another network or other weights"
        )
