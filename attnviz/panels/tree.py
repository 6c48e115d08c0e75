"""The evidence explorer: the channels behind a decision, as a tree that grows on click.

The browser lays the tree out and draws every picture from 8 bit maps; :func:`crop_picture` and
:func:`crop_map` repeat in Python how it cuts them, and are tested equal. The panel itself runs no
network: it asks its :class:`~attnviz.tree.Evidence` to expand a node, in a thread of its own.
:func:`explore_evidence` makes both.
"""

import io
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import traitlets
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from .. import colors
from ..cam import normalize
from ..crops import Window, run
from ..stages import Staged, check_network
from ..tree import CLASS, Edge, Evidence, Node, _tight, evidence
from .layercam import LONGEST_SIDE
from .panel import (
    ClassId,
    Panel,
    Picture,
    Setting,
    ask,
    asked_classes,
    check_index,
    check_lengths,
    check_settings,
    check_width,
    encode_picture,
    image_name,
    palettes,
    quantize,
    require,
    source,
    wrapped,
)

if TYPE_CHECKING:
    from ..figures.sheet import Sheet

__all__ = ["TreePanel", "crop_map", "crop_picture", "explore_evidence"]

Class = tuple[int, str, float, float | None]
Histograms = Mapping[tuple[int, int], Mapping[str, float]]
Link = tuple[int, list[tuple[int, int]]]

MOST = 8
"""How many channels a node can show."""

_THUMB, _CARD = 56, 122
_ON_PATH, _EDGE = "#1264c4", "#b9c0ca"
_SKETCH = 140  # longest side of a stored guided gradient
_EXACT = 48  # up to this side it is stored without loss


class _Layout(NamedTuple):
    # By link: places in pixels, edges with their share, and two lines of text.
    places: dict[str, tuple[int, float]]
    edges: list[tuple[str, str, float]]
    labels: dict[str, tuple[str, str]]


@dataclass
class _Scene:
    # What is known of one picture.
    names: dict[int, str]
    trees: dict[int, Evidence] = field(default_factory=dict)
    owner: dict[str, Evidence] = field(default_factory=dict)
    families: dict[str, list[Edge]] = field(default_factory=dict)
    maps: dict[tuple[str, str], tuple[UInt8[np.ndarray, "_ _"], float]] = field(
        default_factory=dict
    )
    pixels: UInt8[np.ndarray, "h w 3"] | None = None
    data: dict[str, object] = field(default_factory=dict)


class TreePanel(Panel):
    """The channels behind a decision, and the channels behind those: a tree that grows on click.

    A node is named by its link: the class, then one ``stage:channel`` for each step, such as
    ``281/5:112/4:57``. Where the class is the first one shown, it may be left out.

    Args:
        images: The picture, uint8, height x width x 3, or several.
        classes: The classes to choose from: ``(id, name, score, probability)`` each; a list of
            such lists for several pictures.
        plant: Makes the evidence of a class of a picture, by their numbers; called when they are
            first shown.
        names: Names of the pictures.
        network: The network's name.
        histograms: For a channel ``(stage, channel)``, how often it is top evidence by class.
        **settings: Initial values of the traits below.
    """

    image_index = traitlets.Int(0).tag(sync=True)
    """Which picture is shown, from 0. Its evidence is made when it is first shown."""
    class_ids = traitlets.List(traitlets.Int()).tag(sync=True)
    """The class whose tree is shown, or two to compare."""
    class_id = traitlets.Int().tag(sync=True)
    """The first of :attr:`class_ids`: other panels' class can be linked to it."""
    selected = traitlets.Unicode().tag(sync=True)
    """Link of the selected node; setting it opens the nodes on its path."""
    opened = traitlets.List(traitlets.Unicode()).tag(sync=True)
    """Links of the nodes that are open."""
    top = traitlets.Int(3).tag(sync=True)
    """How many channels of a node are shown, from 1 to 8."""
    last_stage = traitlets.Int(1).tag(sync=True)
    """The shallowest stage that is shown."""
    cropped = traitlets.Bool(True).tag(sync=True)
    """Whether nodes show their receptive field alone or the whole picture."""

    _esm = source("tree")

    def __init__(
        self,
        images: UInt8[np.ndarray, "_ _ 3"] | Sequence[UInt8[np.ndarray, "_ _ 3"]],
        classes: Sequence[Class] | Sequence[Sequence[Class]],
        plant: Callable[[int, int], Evidence],
        *,
        names: Sequence[str] | None = None,
        network: str = "",
        histograms: Histograms | None = None,
        **settings: Setting,
    ) -> None:
        check_settings(settings, type(self))
        if isinstance(images, np.ndarray):
            images, classes = [images], [classes]
        if names is None:
            names = [f"picture {number + 1}" for number in range(len(images))]
        check_lengths(len(images), classes=classes, names=names)
        if not all(classes):
            raise ValueError("expected at least one class in `classes`, got none")
        self._lock = threading.RLock()  # round the model: evidence is made in two threads
        self._worker = ThreadPoolExecutor(1, "attnviz-tree")
        self._newest: dict[str, str] = {}
        self._plant, self._network = plant, network
        self._images, self._classes = images, classes
        self._common = {
            "network": network,
            "pictures": [str(name) for name in names],
            "most": MOST,
            "palettes": palettes(),
            "histograms": {
                f"{stage}:{channel}": sorted(
                    ([str(name), float(value)] for name, value in histogram.items()),
                    key=lambda row: -row[1],
                )[:MOST]
                for (stage, channel), histogram in (histograms or {}).items()
            },
        }
        self._scenes: dict[int, _Scene] = {}
        index = check_index(settings.get("image_index", 0), len(images))
        entries = classes[index]
        first = settings.get("class_id", int(entries[0][0]))
        shown = settings.setdefault("class_ids", [first])
        settings["class_id"] = shown[0]
        settings.setdefault("selected", str(shown[0]))
        settings.setdefault("opened", [str(number) for number in shown])
        self._enter(index, shown[0])
        super().__init__(_data=self._scenes[index].data, **settings)
        self.on_msg(self._asked)

    def _enter(self, index: int, class_id: int) -> None:
        # What belongs to a picture; its evidence is kept when another one is shown.
        self._at = index
        if index not in self._scenes:
            names = {int(number): str(name) for number, name, *_ in self._classes[index]}
            self._scenes[index] = _Scene(names)
        scene = self._scenes[index]
        self._names, self._trees, self._owner = scene.names, scene.trees, scene.owner
        self._families, self._maps = scene.families, scene.maps
        if not scene.data:
            first = self._tree(class_id).to_json()
            scene.pixels, picture = encode_picture(
                Image.fromarray(self._images[index]), LONGEST_SIDE
            )
            scene.data = self._common | picture | {
                "index": index,
                "classes": [
                    {"id": int(number), "name": str(name), "score": float(score),
                     "probability": None if probability is None else float(probability)}
                    for number, name, score, probability in self._classes[index]
                ],
                "stages": first["stages"],
                "imageSize": list(first["image_size"]),
                "packets": [],
            }  # fmt: skip
        self._pixels = scene.pixels
        self._stages = {each["stage"]: tuple(each["size"]) for each in scene.data["stages"]}
        self._size = tuple(scene.data["imageSize"])

    @traitlets.validate("image_index")
    def _check_image_index(self, proposal: traitlets.Bunch) -> int:
        return check_index(proposal.value, len(self._images))

    @traitlets.observe("image_index")
    def _show_picture(self, change: traitlets.Bunch) -> None:
        if self.image_index == self._at:  # at the start
            return
        offered = [int(number) for number, *_ in self._classes[self.image_index]]
        shown = self.class_id if self.class_id in offered else offered[0]
        before, wanted = self._at, self.image_index
        with self._lock, self.hold_sync():
            try:  # all that may fail, before any other trait is changed
                self._enter(wanted, shown)
                for best in self._children(shown, f"class:{shown}")[:1]:
                    self._children(shown, best.id)
            except BaseException as error:
                self._enter(before, self.class_ids[0])
                self.image_index = before
                self.send({"picture": wanted, "error": _line(error)})
                raise
            self._data = self._scenes[wanted].data
            self.class_ids, self.selected, self.opened = [shown], str(shown), [str(shown)]
            self._open_best()

    def _open_best(self) -> None:
        # The strongest channel of the class.
        if found := self.children():
            best = found[0]
            self.selected = f"{self.class_ids[0]}/{best.stage}:{best.channel}"
            self.children(self.selected)
            self.opened = [*self.opened, self.selected]

    def grow(self, depth: int, *, progress: bool = False) -> None:
        """Opens every node down to `depth` steps below the classes shown.

        Args:
            depth: 1 opens the classes only, 2 their channels too.
            progress: Shows a progress bar.
        """
        opened = list(self.opened)
        for number in self.class_ids:
            level = [(str(number), f"class:{number}")]
            for _ in tqdm(range(depth), desc="stages", disable=not progress, leave=False):
                level = [(link, key) for link, key in level if self._depth(key) > self.last_stage]
                if level and (packet := self._expand(number, *_nodes(*(key for _, key in level)))):
                    self._tell(None, packet)
                opened += [link for link, _ in level]
                level = [
                    (f"{link}/{child.stage}:{child.channel}", child.id)
                    for link, key in level
                    for child in self._children(number, key)
                ]
        self.opened = list(dict.fromkeys(opened))

    def add_sketches(self, *, progress: bool = False) -> None:
        """Makes the guided gradients of all nodes shown, for a page without a kernel."""
        known = {name for packet in self._data["packets"] for name, _ in packet["sketches"]}
        links = [link for link in self.opened if _parse(link)[0] in self.class_ids]
        shown = {node.id for link in links for node in self.children(link)}
        missing = sorted(shown - known, key=self._depth)
        bar = tqdm(total=len(missing), desc="gradients", disable=not progress, leave=False)
        for _, stage in groupby(missing, self._depth):
            while part := list(islice(stage, 16)):
                self._tell(None, self._draw(part))
                bar.update(len(part))
        bar.close()

    def children(self, link: str = "") -> list[Node]:
        """Returns the channels that a node is made of, largest share first.

        Args:
            link: The node's link; the first class shown if empty.
        """
        class_id, steps = self._parse(link or str(self.class_ids[0]))
        return self._children(class_id, self._follow_steps(class_id, steps))

    @property
    def trees(self) -> list[Evidence]:
        """The evidence of the classes shown."""
        return [self._tree(number) for number in self.class_ids]

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the open tree drawn plainly: what shows where no widget can be drawn."""
        sheets = [self._draw_tree(number) for number in self.class_ids]
        width = max(sheet.shape[1] for sheet in sheets)
        margins = [((0, 0), (0, width - sheet.shape[1]), (0, 0)) for sheet in sheets]
        padded = zip(sheets, margins, strict=True)
        return np.concatenate([np.pad(*each, constant_values=255) for each in padded])

    def __repr__(self) -> str:
        network = f"{self._network}, " if self._network else ""
        names = " and ".join(repr(self._names[number]) for number in self.class_ids)
        return f"TreePanel({network}{names}, {len(self.opened)} open, selected {self.selected!r})"

    # ------------------------------------------------------------------------------ the evidence

    def _tree(self, class_id: int) -> Evidence:
        with self._lock:
            if class_id not in self._trees:
                self._trees[class_id] = self._plant(self._at, class_id)
            return self._trees[class_id]

    def _expand(self, class_id: int, *nodes: str) -> dict[str, object] | None:
        # Makes the families of nodes, or of the class; returns what is new of them.
        with self._lock:
            keys = dict.fromkeys(nodes) or (f"class:{class_id}",)
            new = [key for key in keys if key not in self._families]
            if not new:
                return None
            made = self._owners(new) if nodes else {self._tree(class_id): new}
            for tree, part in made.items():
                tree.expand(*(part if nodes else ()))
                for key in part:
                    self._families[key] = tree.children(key if nodes else CLASS)
                    for edge in self._families[key]:
                        self._owner.setdefault(edge.child, tree)
            return self._packet(made)

    def _owners(self, names: Iterable[str]) -> dict[Evidence, list[str]]:
        # The nodes by the evidence that they belong to: classes share the nodes of an image.
        found: dict[Evidence, list[str]] = {}
        for name in names:
            if name not in self._owner:
                raise ValueError(f"expected a node of the tree, got {name!r}")
            found.setdefault(self._owner[name], []).append(name)
        return found

    def _node(self, name: str) -> Node:
        return self._owner[name].nodes[name]

    def _packet(
        self, made: Mapping[Evidence, Sequence[str]], sketches: Sequence[Sequence] = ()
    ) -> dict[str, object]:
        packets = self._scenes[self._at].data["packets"]
        block, records, named = [], [], [name for name, _ in sketches]
        for tree, key in ((tree, key) for tree, keys in made.items() for key in keys):
            parent = CLASS if key.startswith("class:") else key
            named += [edge.child for edge in self._families[key]]
            children = []
            for edge in self._families[key]:
                map = np.asarray(edge.map.float().cpu())
                levels, most = quantize(map), max(float(map.max()), 0.0)
                self._maps[key, edge.child] = levels, most
                top, left, bottom, right = _window(levels)
                block.append(levels[top:bottom, left:right].tobytes())
                children.append({
                    "id": edge.child,
                    "contribution": edge.contribution,
                    "share": edge.share,
                    "window": [top, left, bottom - top, right - left],
                    "maximum": most,
                })  # fmt: skip
            explained = tree.explained.get(parent, np.nan)
            records.append({
                "key": key,
                "children": children,
                "explained": explained if np.isfinite(explained) else None,
                "note": tree.note if parent == CLASS else None,
            })  # fmt: skip
        packet = {
            "number": len(packets),
            "picture": self._at,
            "nodes": [_record(self._node(name)) for name in dict.fromkeys(named)],
            "families": records,
            "maps": zlib.compress(b"".join(block), 9) if block else b"",
            "sketches": list(sketches),
        }
        packets.append(packet)
        return packet

    def _children(self, class_id: int, key: str) -> list[Node]:
        # The shown children of a node; made and sent where they are not known yet.
        found = [self._node(edge.child) for edge in self._family(class_id, key)]
        return [node for node in found if node.stage >= self.last_stage][: self.top]

    def _family(self, class_id: int, key: str) -> list[Edge]:
        if packet := self._expand(class_id, *_nodes(key)):
            self._tell(None, packet)
        return self._families[key]

    def _depth(self, key: str) -> int:
        return max(self._stages) + 1 if key.startswith("class:") else int(key.partition(":")[0])

    def _draw(self, names: Sequence[str]) -> dict[str, object]:
        # The guided gradients and the tight boxes of nodes of one stage.
        with self._lock:
            sketches = []
            for tree, part in self._owners(names).items():
                for name, window in zip(part, tree.guided(*part), strict=True):
                    tree.nodes[name] = replace(tree.nodes[name], tight=_tight(window))
                    sketches.append([name, _sketch(window)])
            return self._packet({}, sketches)

    # ------------------------------------------------------------------------------ the browser

    def _asked(self, _: object, request: dict[str, object], __: object) -> None:
        # Runs in whatever thread the front end uses: the work is done in the panel's own.
        view = str(request["id"]).partition(":")[0]
        if request["kind"] == "sketch":
            self._newest[view] = request["id"]
        job = self._worker.submit(self._answer, request)
        job.add_done_callback(lambda job: self._report(request, job))

    def _answer(self, request: dict[str, object]) -> dict[str, object] | None:
        class_id, key = int(request["class_id"]), request["key"]
        if request["kind"] == "expand":
            return self._expand(class_id, *_nodes(key)) or self._packet_of(key)
        view = str(request["id"]).partition(":")[0]
        if self._newest[view] != request["id"]:
            return None  # another node has been selected since
        return self._draw([key])

    def _packet_of(self, key: str) -> dict[str, object]:
        return next(
            packet for packet in self._data["packets"]
            if any(family["key"] == key for family in packet["families"])
        )  # fmt: skip

    def _report(self, request: dict[str, object], job: Future) -> None:
        error = job.exception()
        if error is None:
            self._tell(request["id"], job.result())
        else:
            self.send({"id": request["id"], "error": _line(error)})

    def _tell(self, number: str | None, packet: dict[str, object] | None) -> None:
        if packet is None:
            self.send({"id": number})
            return
        plain = packet | {"maps": None, "sketches": [node for node, _ in packet["sketches"]]}
        buffers = [packet["maps"], *(sketch for _, sketch in packet["sketches"])]
        self.send({"id": number, "packet": plain}, buffers)

    # -------------------------------------------------------------------------------- the traits

    def _parse(self, link: str) -> Link:
        return _parse(link if re.match(r"\d+(/|$)", link) else f"{self.class_ids[0]}/{link}")

    def _follow_steps(self, class_id: int, steps: Sequence[tuple[int, int]]) -> str:
        # The key of the node at the end of a path, whose nodes are made where needed.
        key = f"class:{class_id}"
        for stage, channel in steps:
            near = [edge.child for edge in self._family(class_id, key)]
            found = [child for child in near if child.startswith(f"{stage}:{channel}@")]
            if not found:
                names = [child.partition("@")[0] for child in near]
                raise ValueError(f"expected a channel in {names}, got '{stage}:{channel}'")
            key = found[0]
        return key

    @traitlets.validate("class_ids")
    def _check_class_ids(self, proposal: traitlets.Bunch) -> list[int]:
        given = list(dict.fromkeys(proposal.value))
        require(
            len(given) in (1, 2) and set(given) <= set(self._names),
            f"`class_ids` of one or two of {list(self._names)}, got {proposal.value}; "
            "explore_evidence takes further classes as `class_ids`",
        )
        for number in given:
            self._family(number, f"class:{number}")
        return given

    @traitlets.validate("class_id")
    def _check_class_id(self, proposal: traitlets.Bunch) -> int:
        known = list(self._names)
        require(
            proposal.value in known,
            f"`class_id` in {known}, got {proposal.value}; "
            "explore_evidence takes further classes as `class_ids`",
        )
        return proposal.value

    @traitlets.observe("class_id")
    def _show_class(self, change: traitlets.Bunch) -> None:
        if self.class_ids[0] != self.class_id:
            self.class_ids = list(dict.fromkeys([self.class_id, *self.class_ids[1:]]))

    @traitlets.validate("selected")
    def _check_selected(self, proposal: traitlets.Bunch) -> str:
        try:
            class_id, steps = self._parse(proposal.value)
            if class_id not in self._names:
                raise ValueError(f"expected a class in {list(self._names)}, got {class_id}")
            self._follow_steps(class_id, steps)
        except ValueError as error:
            raise traitlets.TraitError(
                f"expected `selected` to be a link in the tree, got {proposal.value!r}; {error}"
            ) from error
        return "/".join([str(class_id), *(f"{stage}:{channel}" for stage, channel in steps)])

    @traitlets.observe("selected", "class_ids")
    def _show_selected(self, change: traitlets.Bunch) -> None:
        self.class_id = self.class_ids[0]
        class_id = _parse(self.selected)[0]
        if class_id not in self.class_ids:
            if change.name == "selected":
                self.class_ids = [class_id, *self.class_ids[1:]]
            else:
                self.selected = str(self.class_ids[0])
        parts = self.selected.split("/")
        parents = ["/".join(parts[:count]) for count in range(1, len(parts))]
        roots = [str(number) for number in self.class_ids]
        wanted = [link for link in (*roots, *parents) if link not in self.opened]
        if wanted:
            self.opened = [*self.opened, *wanted]

    @traitlets.validate("top")
    def _check_top(self, proposal: traitlets.Bunch) -> int:
        require(1 <= proposal.value <= MOST, f"`top` from 1 to {MOST}, got {proposal.value}")
        return proposal.value

    @traitlets.validate("last_stage")
    def _check_last_stage(self, proposal: traitlets.Bunch) -> int:
        known = sorted(self._stages)
        require(proposal.value in known, f"`last_stage` in {known}, got {proposal.value}")
        return proposal.value

    # ------------------------------------------------------------------------------- the picture

    def thumbnail(self, link: str, size: int = _THUMB) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the picture of a node as the browser draws it, at most `size` pixels a side."""
        class_id, steps = self._parse(link)
        key = self._follow_steps(class_id, steps)
        box = (0.0, 0.0, 1.0, 1.0)
        if steps and self.cropped:
            (height, width), field = self._size, self._node(key).field
            box = tuple(np.array(field) / (width, height, width, height))
        shape = _fitted(box, self._size, size)
        if steps:
            parent = self._follow_steps(class_id, steps[:-1])
            map = crop_map(self._maps[parent, key][0] / 255, box, shape)
        else:  # the class: all that its channels attend to
            edges = self._families.get(key, [])[: self.top]
            maps = [self._maps[key, edge.child] for edge in edges]
            map = sum(crop_map(levels / 255 * most, box, shape) for levels, most in maps)
            map = normalize(torch.as_tensor(map + np.zeros(shape))).numpy()
        pixels = crop_picture(self._pixels, box, shape)
        return colors.overlay(pixels, map, opacity=self.opacity, palette=self.palette)

    def to_figure(self, width: float = 7.0) -> "Sheet":
        """Returns the open tree as a matplotlib figure, for a paper.

        Lines and text are lines and text in it, so save it as PDF or SVG with ``savefig``.

        Args:
            width: The largest width of the figure in inches; a small tree takes less.
        """
        from matplotlib.patches import FancyBboxPatch, PathPatch
        from matplotlib.path import Path

        from ..figures.sheet import canvas, put_image, put_text

        check_width(width)
        pixel = 1 / 96  # inches of a pixel of the page
        trees = [self._lay_out(number) for number in self.class_ids]
        wide = max(x + _CARD for tree in trees for x, _ in tree.places.values()) + 64
        heights = [max(y for _, y in tree.places.values()) + _THUMB + 48 for tree in trees]
        scale = min(1.0, width / (wide * pixel))
        figure, axis = canvas(wide * pixel * scale, sum(heights) * pixel * scale)
        axis.set(xlim=(0, wide), ylim=(sum(heights), 0))
        path = self.selected.split("/")
        on_path = {"/".join(path[:count]) for count in range(1, len(path) + 1)}
        for tree, top in zip(trees, np.cumsum([0, *heights]), strict=False):
            cards = {  # left, upper and width; the class has a longer name
                link: (x + 50, y + top + 24, _CARD) if "/" in link else (8, y + top + 24, 164)
                for link, (x, y) in tree.places.items()
            }
            for x, stage in {x: link.split("/")[-1].split(":")[0] for link, (x, *_) in
                             cards.items() if "/" in link}.items():  # fmt: skip
                put_text(axis, x, top + 12, f"Stage {stage}", 8 * scale, ha="left")
            most = max((share for *_, share in tree.edges), default=1)
            for parent, child, share in tree.edges:
                (x0, y0, across), (x1, y1, _) = cards[parent], cards[child]
                start, end = (x0 + across, y0 + 30), (x1, y1 + 30)
                bends = [(start[0] + 26, start[1]), (end[0] - 26, end[1])]
                curve = Path([start, *bends, end], [Path.MOVETO, *[Path.CURVE4] * 3])
                color = _ON_PATH if child in on_path else _EDGE
                thick = max(9 * share / most, 0.6) * scale
                axis.add_patch(PathPatch(curve, fill=False, edgecolor=color, lw=thick))
            for link, (x, y, across) in cards.items():
                axis.add_patch(FancyBboxPatch(
                    (x + 4, y + 4), across - 8, 52, boxstyle="round,pad=4", facecolor="white",
                    edgecolor=_ON_PATH if link in on_path else _EDGE, lw=0.9 * scale,
                ))  # fmt: skip
                thumb = self.thumbnail(link, 2 * _THUMB)
                high, broad = thumb.shape[0] / 2, thumb.shape[1] / 2
                left, upper = x + 2 + (_THUMB - broad) / 2, y + 30 - high / 2
                put_image(axis, thumb[::-1], left, upper, broad)  # rows run down this axis
                axis.images[-1].set_zorder(2)
                name, share = tree.labels[link]
                lines = wrapped(name, (across - _THUMB - 10) * pixel, 7).split("\n")[:2]
                for line, text in enumerate((*lines, share)):
                    weight = "normal" if text is share else "bold"
                    put_text(axis, x + 7 + _THUMB, y + 24 + 13 * line, text, 7 * scale,
                             ha="left", weight=weight, parse_math=False)  # fmt: skip
        return figure

    def _lay_out(self, class_id: int) -> _Layout:
        # Leaves in rows, parents in the middle of their children, like the browser.
        step, row = 170, 68
        stages = sorted(self._stages, reverse=True)
        places: dict[str, tuple[int, float]] = {}
        edges: list[tuple[str, str, float]] = []
        labels = {str(class_id): (self._names[class_id], "")}
        rows = 0.0

        def visit(link: str, key: str) -> None:
            nonlocal rows
            shown = link in self.opened and key in self._families
            nodes = self._children(class_id, key) if shown else []
            shares = {edge.child: edge.share for edge in self._families.get(key, [])}
            ys = []
            for node in nodes:
                child = f"{link}/{node.stage}:{node.channel}"
                labels[child] = (str(node.channel), f"{shares[node.id]:.0%}")
                edges.append((link, child, shares[node.id]))
                visit(child, node.id)
                ys.append(places[child][1])
            stage = self._depth(key)
            column = 1 + stages.index(stage) if stage in stages else 0
            if not ys:
                ys, rows = [rows], rows + row
            places[link] = (column * step, (ys[0] + ys[-1]) / 2)

        visit(str(class_id), f"class:{class_id}")
        return _Layout(places, edges, labels)

    def _draw_tree(self, class_id: int) -> UInt8[np.ndarray, "h w 3"]:
        places, edges, labels = self._lay_out(class_id)
        largest = max((share for *_, share in edges), default=1)
        width = max(x for x, _ in places.values()) + 170
        height = max(y for _, y in places.values()) + 68
        sheet = Image.new("RGB", (width + 20, int(height) + 20), "white")
        draw = ImageDraw.Draw(sheet)
        for parent, child, share in edges:
            (x0, y0), (x1, y1) = places[parent], places[child]
            draw.line(
                [(x0 + 112, y0 + 38), (x1 + 6, y1 + 38)],
                fill=(170, 176, 186), width=max(round(8 * share / largest), 1),
            )  # fmt: skip
        for link, (x, y) in places.items():
            thumb = Image.fromarray(self.thumbnail(link))
            across, down = (_THUMB - thumb.width) // 2, (_THUMB - thumb.height) // 2
            sheet.paste(thumb, (x + 10 + across, int(y) + 10 + down))
            for line, text in enumerate(labels[link]):
                safe = text.encode("latin-1", "replace").decode("latin-1")  # Pillow's own font
                draw.text((x + 16 + _THUMB, y + 24 + 14 * line), safe[:14], fill=(40, 44, 52))
        return np.asarray(sheet)


def explore_evidence(
    net: Staged,
    images: Picture | Sequence[Picture] | Float[Tensor, "3 h w"] | Float[Tensor, "b 3 h w"],
    class_ids: ClassId | Sequence[ClassId] = None,
    *,
    classes: int = 5,
    stages: Sequence[int] | None = None,
    merge: float | None = None,
    names: str | Sequence[str] | None = None,
    histograms: Histograms | None = None,
    **settings: Setting,
) -> TreePanel:
    """Opens the explorer of the channels behind a network's decision on a picture.

    Args:
        net: The network, cut into stages: from ``attnviz.load_network`` or ``attnviz.staged``.
        images: A picture (Pillow image, path, or array of height x width x 3), a list of
            pictures, or a normalized tensor.
        class_ids: The class to show, by number or name, or two to compare; the best scoring one
            if None. For a list of pictures, one of these for each.
        classes: How many of the best scoring classes to offer beside `class_ids`.
        stages: Numbers of the stages to pass, 1 = shallowest; all if None.
        merge: Leave out channels that light up the same places as a stronger one, with an
            intersection over union above this; none if None. See :func:`attnviz.evidence`.
        names: Names of the pictures; file names if None.
        histograms: For a channel ``(stage, channel)``, how often it is top evidence by class
            name; shown with the channel.
        **settings: Initial values of the panel's traits, such as ``top=4``.

    Returns:
        The panel.

    Example:
        ``explore_evidence(net, "cat.jpg", "tabby").save_html("why.html")``
    """
    check_settings(settings, TreePanel)
    check_network(net)
    if isinstance(images, Tensor) and images.ndim == 3:
        images = images[None]
    single = isinstance(images, Tensor) and len(images) == 1
    if single or not isinstance(images, list | tuple | Tensor):
        images = images if single else [images]
        class_ids = None if class_ids is None else [class_ids]
        names = [names] if isinstance(names, str) else names
    class_ids = [None] * len(images) if class_ids is None else class_ids
    check_lengths(len(images), class_ids=class_ids)
    if any(isinstance(asked, list | tuple) and not asked for asked in class_ids):
        raise ValueError(
            "expected at least one class in `class_ids`, got none; None shows the best"
        )
    if histograms is not None and not isinstance(histograms, Mapping):
        raise TypeError(
            f"expected `histograms` as counts by (stage, channel), got {type(histograms).__name__}"
        )
    if names is None:
        names = [image_name(image, number) for number, image in enumerate(images, 1)]
    tensors, pictures, entries = [], [], []
    for image, asked in zip(images, class_ids, strict=True):
        tensor, pixels, scores, offered = ask(net, image, asked, classes)
        probabilities = net.probabilities(torch.tensor([scores]))[0].tolist()
        tensors.append(tensor)
        pictures.append(pixels)
        entries.append([(*entry, probabilities[entry[0]]) for entry in offered])
    index = settings.get("image_index", 0)
    at = index if isinstance(index, int) and 0 <= index < len(images) else 0
    shown = min(max(len(set(asked_classes(net, class_ids[at]))), 1), 2)
    if "class_id" not in settings:
        settings.setdefault("class_ids", [number for number, *_ in entries[at][:shown]])
    forward = cache(lambda number: run(net, tensors[number]))
    panel = TreePanel(
        pictures,
        entries,
        lambda number, class_id: evidence(
            net, forward(number), class_id, MOST, stages=stages, depth=1, merge=merge
        ),
        names=names,
        network=net.name,
        histograms=histograms,
        **settings,
    )  # fmt: skip
    if "selected" not in settings:
        panel._open_best()
    return panel


# ---------------------------------------------------------------------------------------- drawing


def crop_picture(
    image: UInt8[np.ndarray, "h w 3"], box: Sequence[float], size: tuple[int, int]
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Cuts a box out of a picture and resizes it, as the browser does.

    Args:
        image: The picture.
        box: ``(x0, y0, x1, y1)``, each in [0, 1].
        size: Height and width of the result. Where it is a reduction, the picture is halved
            first, so that nothing is skipped; the rest is bilinear.
    """
    x0, y0, x1, y1 = box
    ratio = max((x1 - x0) * image.shape[1] / size[1], (y1 - y0) * image.shape[0] / size[0])
    values = image.astype(np.int64)
    for _ in range(max(int(np.floor(np.log2(ratio))), 0)):
        height, width = values.shape[0] // 2, values.shape[1] // 2
        if min(height, width) < 8:
            break
        quarters = values[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
        values = (quarters.sum((1, 3)) + 2) >> 2
    return np.floor(_bilinear(values, box, size) + 0.5).astype(np.uint8)


def crop_map(
    map: Float[np.ndarray, "h w"], box: Sequence[float], size: tuple[int, int]
) -> Float[np.ndarray, "_ _"]:
    """Cuts a box, each side in [0, 1], out of a map and resizes it bilinearly."""
    return _bilinear(map[:, :, None], box, size)[:, :, 0]


def _bilinear(
    values: Float[np.ndarray, "h w c"], box: Sequence[float], size: tuple[int, int]
) -> Float[np.ndarray, "_ _ c"]:
    x0, y0, x1, y1 = box
    left, right, u = _places(x0, x1, size[1], values.shape[1])
    upper, lower, v = _places(y0, y1, size[0], values.shape[0])
    u, v = u[None, :, None], v[:, None, None]
    above = values[upper][:, left] + u * (values[upper][:, right] - values[upper][:, left])
    under = values[lower][:, left] + u * (values[lower][:, right] - values[lower][:, left])
    return above + v * (under - above)


def _places(
    start: float, end: float, count: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Where the pixels of a crop lie in the old row; pixel centers aligned.
    wanted = (start + (np.arange(count) + 0.5) / count * (end - start)) * length - 0.5
    place = np.clip(wanted, 0, length - 1)
    low = np.floor(place).astype(int)
    return low, np.minimum(low + 1, length - 1), place - low


def _fitted(box: Sequence[float], image_size: tuple[int, int], side: int) -> tuple[int, int]:
    # The size of a picture of the box that fits a square.
    across, down = (box[2] - box[0]) * image_size[1], (box[3] - box[1]) * image_size[0]
    factor = side / max(across, down)
    return max(int(down * factor + 0.5), 1), max(int(across * factor + 0.5), 1)


def _window(levels: UInt8[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    # Top, left, bottom, right of what is not zero: maps of deep paths are zero nearly everywhere.
    rows, columns = levels.any(1).nonzero()[0], levels.any(0).nonzero()[0]
    if not len(rows):
        return 0, 0, 0, 0
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _parse(link: str) -> Link:
    if not re.fullmatch(r"\d+(/\d+:\d+)*", link):
        raise ValueError("a link looks like 281/5:112/4:57: the class, then stage:channel")
    first, *rest = link.split("/")
    return int(first), [tuple(map(int, part.split(":"))) for part in rest]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _nodes(*keys: str) -> list[str]:
    # The nodes among the keys of families; that of a class has none.
    return [key for key in keys if not key.startswith("class:")]


def _record(node: Node) -> dict[str, object]:
    return {
        "id": node.id,
        "stage": node.stage,
        "channel": node.channel,
        "peak": list(node.peak),
        "activation": node.activation,
        "field": list(node.field),
        "tight": node.tight and list(node.tight),
    }


def _sketch(window: Window) -> bytes:
    # A guided gradient as a picture: gray is zero, one scale for all colors keeps their balance.
    values = window.gradient.float().cpu().numpy().transpose(1, 2, 0)
    most = np.quantile(np.abs(values), 0.995)  # its few largest values would hide the others
    values = np.clip(values / max(most, np.finfo(np.float32).tiny), -1, 1)
    gray = np.floor((values / 2 + 0.5) * 255 + 0.5).astype(np.uint8)
    image = Image.fromarray(gray if gray.shape[2] == 3 else gray[:, :, 0]).convert("RGB")
    image.thumbnail((_SKETCH, _SKETCH), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, lossless=max(image.size) <= _EXACT)
    return buffer.getvalue()
