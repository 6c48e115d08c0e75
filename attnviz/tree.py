"""Evidence trees: a decision traced to channels, each of those to the channels below it.

A class rests on channels of the deepest stage; the place of each that contributes most is a
neuron, which rests on channels of the stage below, and so on. A neuron reached twice is one
node, so the tree is an acyclic graph. :func:`evidence` grows it, :meth:`Evidence.expand` lets it
grow where a reader asks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .crops import Forward, Neuron, Window, class_score, decompose, field_of_view, run
from .explain import provenance
from .gap import suppress
from .stages import Staged, check_network

if TYPE_CHECKING:
    from networkx import DiGraph
    from pandas import DataFrame

__all__ = ["CLASS", "Edge", "Evidence", "Node", "evidence"]

CLASS = "class"
"""The root of a tree that explains a class."""
Box = tuple[int, int, int, int]
Picture = Image.Image | np.ndarray | str | Path
_WEAK = 0.01  # of the largest guided gradient: not part of the tight box


@dataclass(frozen=True)
class Node:
    """One neuron of a tree: the place of a channel that contributes most to a decision."""

    id: str
    """Its name, ``stage:channel@row,column``."""
    stage: int
    """Number of its stage, 1 = shallowest."""
    channel: int
    """Number of its channel."""
    peak: tuple[int, int]
    """Row and column of the neuron, at the stage's resolution."""
    activation: float
    """What it puts out, above 0."""
    field: Box
    """The pixels ``(x0, y0, x1, y1)`` of the network's input that it can see, half-open."""
    tight: Box | None = None
    """The box of the pixels that excite it: its guided gradient above 1 % of the maximum."""

    @property
    def neuron(self) -> Neuron:
        """Its place in the network."""
        return Neuron(self.stage, self.channel, *self.peak)


@dataclass(frozen=True, eq=False)
class Edge:
    """What one channel contributes to one decision."""

    parent: str
    """The decision: ``class`` or the id of a node."""
    child: str
    """The node of the channel."""
    contribution: float
    r""":math:`\alpha`: the mean of the attention map over the whole stage, Eq. 5.4."""
    share: float
    """The contribution divided by the sum of all positive ones, 0 to 1."""
    _window: Float[Tensor, "_ _"] = field(repr=False)
    _corner: tuple[int, int] = field(repr=False)
    _size: tuple[int, int] = field(repr=False)

    @property
    def map(self) -> Float[Tensor, "h w"]:
        """The channel's attention map for this decision, over the whole stage."""
        whole = self._window.new_zeros(self._size)
        (top, left), (height, width) = self._corner, self._window.shape
        whole[top : top + height, left : left + width] = self._window
        return whole


class Evidence:
    """The channels behind a decision, as a graph that can grow. Made by :func:`evidence`."""

    nodes: dict[str, Node]
    """The neurons by id, in the order in which they were found."""
    edges: list[Edge]
    """The contributions, those to one decision together and the largest first."""
    explained: dict[str, float]
    """For each decision that was decomposed, what all channels sum to divided by the decision:
    1 without biases."""
    root: str
    """``class``, or the id of the neuron that is explained."""
    class_id: int | None
    """The class explained, None for a neuron."""
    score: float
    """The score of the class before softmax, or the neuron's activation."""
    probability: float | None
    """The probability of the class, None for a neuron."""
    note: str | None
    """Why the tree is empty, None if it is not."""
    forward: Forward
    """The forward pass that it was made from; serves further trees of the same image."""

    def __init__(
        self,
        forward: Forward,
        target: int | Neuron,
        top: int,
        stages: tuple[int, ...],
        merge: float | None,
        crops: bool,
    ) -> None:
        self.forward, self.top = forward, top
        self.nodes, self.edges, self.explained, self.note = {}, [], {}, None
        self._stages, self._merge, self._crops = stages, merge, crops
        self._below: dict[str, list[Edge]] = {}
        self._above: dict[str, list[Edge]] = {}
        if isinstance(target, Neuron):
            self.class_id = self.probability = None
            self.root = self._node(forward.check(target)).id
            self.score = self.nodes[self.root].activation
        else:
            self.root, self.class_id = CLASS, target
            [window] = decompose(forward, target, stages[-1])
            self.score = window.decision
            self.probability = _probability(forward, target)
            self._grow([(CLASS, window)], stages[-1], top)
            if not self.edges:
                self.note = (
                    f"no channel of stage {stages[-1]} speaks for {self._title()}, "
                    f"whose score is {self.score:.3g}"
                )

    @property
    def class_name(self) -> str | None:
        """The name of the class, if the network knows it."""
        names = self.forward.net.class_names
        return None if names is None or self.class_id is None else names[self.class_id]

    def children(self, id: str) -> list[Edge]:
        """Returns what a decision rests on, the largest contribution first."""
        self._check(id)
        return list(self._below.get(id, ()))

    def parents(self, id: str) -> list[Edge]:
        """Returns the decisions that a node contributes to."""
        self._check(id)
        return list(self._above.get(id, ()))

    def expand(self, *ids: str, top: int | None = None) -> list[Edge]:
        """Decomposes nodes into the stage below; those of one stage at once.

        Args:
            *ids: Nodes. One that is decomposed already is not decomposed again, and one of the
                shallowest stage has nothing below it.
            top: The number of channels; that of the tree if None.

        Returns:
            The edges to their children.

        Raises:
            ValueError: There is no such node.
        """
        for id in ids:
            self._check(id)
        top = self.top if top is None else _check_top(top)
        closed = [self.nodes[id] for id in dict.fromkeys(ids) if id not in self.explained]
        for stage in sorted({node.stage for node in closed}, reverse=True):
            below = max((number for number in self._stages if number < stage), default=None)
            if below is None:
                continue
            chosen = [node for node in closed if node.stage == stage]
            neurons = [node.neuron for node in chosen]
            windows = decompose(self.forward, neurons, below, crops=self._crops)
            pairs = [(node.id, window) for node, window in zip(chosen, windows, strict=True)]
            self._grow(pairs, below, top)
        return [edge for id in ids for edge in self._below.get(id, ())]

    def guided(self, *ids: str) -> list[Window]:
        """Returns the guided gradient of nodes by the image, in the window that they see.

        Guided backpropagation lets only positive gradients pass each ReLU; it shows what
        excites a neuron. The nodes must be of one stage.

        References:
            Striving for Simplicity: The All Convolutional Net (Springenberg et al., 2015),
            https://arxiv.org/abs/1412.6806.
        """
        for id in ids:
            self._check(id)
        neurons = [self.nodes[id].neuron for id in ids]
        return decompose(self.forward, neurons, 0, guided=True, crops=self._crops)

    def tighten(self, *ids: str) -> None:
        """Finds the tight boxes of nodes, of all if none is named."""
        for id in ids:
            self._check(id)
        loose = [n for n in map(self.nodes.get, ids or tuple(self.nodes)) if n.tight is None]
        for stage in sorted({node.stage for node in loose}):
            chosen = [node for node in loose if node.stage == stage]
            windows = self.guided(*(node.id for node in chosen))
            for node, window in zip(chosen, windows, strict=True):
                self.nodes[node.id] = replace(node, tight=_tight(window))

    def saliency(self, weighted: bool = True) -> Float[Tensor, "H W"]:
        """Sums the gradients of the tree's leaves by the image.

        Args:
            weighted: Weigh each leaf with its share of the decision along all paths to it. The
                thesis' words leave the weight open.

        Returns:
            The sum over the colors of the absolute value, at the size of the image.

        References:
            Thesis section 5.3.1.5.
        """
        weights = self._weights()
        leaves = [node for node in self.nodes.values() if node.id not in self._below]
        total = torch.zeros_like(self.forward.image[0])
        for stage in sorted({node.stage for node in leaves}):
            chosen = [node for node in leaves if node.stage == stage]
            windows = decompose(
                self.forward, [node.neuron for node in chosen], 0, crops=self._crops
            )
            for node, window in zip(chosen, windows, strict=True):
                rows = slice(window.top, window.top + window.gradient.shape[1])
                columns = slice(window.left, window.left + window.gradient.shape[2])
                weight = weights[node.id] if weighted else 1.0
                total[:, rows, columns] += weight * window.gradient
        return total.abs().sum(dim=0)

    def to_json(self) -> dict[str, object]:
        """Returns the tree without its maps as plain values, for :func:`json.dump`."""
        net = self.forward.net
        stages = [
            {
                "stage": number,
                "name": net.stage_names[number - 1],
                "channels": len(self.forward.activations[number - 1]),
                "size": list(self.forward.size(number)),
            }
            for number in self._stages
        ]
        nodes = [
            {
                "id": node.id,
                "stage": node.stage,
                "channel": node.channel,
                "peak": list(node.peak),
                "activation": node.activation,
                "field": list(node.field),
                "tight": node.tight and list(node.tight),
                "expanded": node.id in self.explained,
            }
            for node in self.nodes.values()
        ]
        edges = [
            {
                "parent": edge.parent,
                "child": edge.child,
                "contribution": edge.contribution,
                "share": edge.share,
            }
            for edge in self.edges
        ]
        finite = {id: value if math.isfinite(value) else None
                  for id, value in self.explained.items()}  # fmt: skip
        return {
            "format": 1,
            "network": net.name,
            "root": self.root,
            "class_id": self.class_id,
            "class_name": self.class_name,
            "score": self.score,
            "probability": self.probability,
            "image_size": list(self.forward.size(0)),
            "top": self.top,
            "note": self.note,
            "stages": stages,
            "nodes": nodes,
            "edges": edges,
            "explained": finite,
            "provenance": self.provenance,
        }

    @property
    def provenance(self) -> dict[str, object]:
        """Network, weights, versions, and which stages were decomposed in whole maps."""
        whole = [
            stage
            for below, stage in zip(self._stages, self._stages[1:], strict=False)
            if not (self._crops and self.forward.is_local(stage, below))
        ]
        return provenance(self.forward.net) | {"merge": self._merge, "whole_maps": whole}

    def to_frame(self) -> "DataFrame":
        """Returns a table with one row for each edge and what is known of its child."""
        from pandas import DataFrame

        columns = ["parent", "child", "stage", "channel", "row", "column", "activation",
                   "contribution", "share"]  # fmt: skip
        rows = [
            (edge.parent, edge.child, *node.neuron, node.activation, edge.contribution, edge.share)
            for edge in self.edges
            for node in [self.nodes[edge.child]]
        ]
        return DataFrame(rows, columns=columns)

    def to_networkx(self) -> "DiGraph":
        """Returns the graph, from decisions to what they rest on."""
        from networkx import DiGraph

        graph = DiGraph(score=self.score, network=self.forward.net.name)
        graph.add_node(self.root)
        for node in self.nodes.values():
            facts = {"stage": node.stage, "channel": node.channel, "peak": node.peak}
            graph.add_node(node.id, **facts, activation=node.activation, field=node.field)
        for edge in self.edges:
            graph.add_edge(
                edge.parent, edge.child, contribution=edge.contribution, share=edge.share
            )
        return graph

    def __repr__(self) -> str:
        if self.note:
            return f"Evidence({self.note})"
        return f"Evidence({self._title()}: {len(self.nodes)} nodes, {len(self.edges)} edges)"

    def _repr_html_(self) -> str:
        if self.note:
            return f"<p>{self.note}</p>"
        table = self.to_frame().head(self.top).to_html(index=False, float_format="{:.3g}".format)
        return f"<p>{self!r}</p>{table}"

    def _title(self) -> str:
        if self.class_id is None:
            return f"neuron {self.root}"
        name = self.class_name
        return f"class {self.class_id}" if name is None else f"class {self.class_id} ({name})"

    def _check(self, id: str) -> None:
        if id != self.root and id not in self.nodes:
            raise ValueError(
                f"expected a node of the tree, got {id!r}; it has {len(self.nodes)}, "
                f"such as {next(iter(self.nodes), None)!r}"
            )

    def _node(self, neuron: Neuron) -> Node:
        id = str(neuron)
        if id not in self.nodes:
            stage, channel, *place = neuron
            self.nodes[id] = Node(
                id=id,
                stage=stage,
                channel=channel,
                peak=(place[0], place[1]),
                activation=float(self.forward.activations[stage - 1][channel, *place]),
                field=field_of_view(self.forward, stage, *place),
            )
        return self.nodes[id]

    def _grow(self, decisions: Sequence[tuple[str, Window]], stage: int, top: int) -> None:
        alphas = torch.stack([window.contributions for _, window in decisions])
        totals = zip(alphas.sum(dim=1).tolist(), alphas.relu().sum(dim=1).tolist(), strict=True)
        for (parent, window), (total, positive) in zip(decisions, totals, strict=True):
            total *= math.prod(window.size)
            self.explained[parent] = total / window.decision if window.decision else math.nan
            for channel, alpha, place, map in _strongest(window, top, self._merge):
                row, column = window.top + place[0], window.left + place[1]
                child = self._node(Neuron(stage, channel, row, column)).id
                edge = Edge(
                    parent=parent,
                    child=child,
                    contribution=alpha,
                    share=alpha / positive,
                    _window=map,
                    _corner=(window.top, window.left),
                    _size=window.size,
                )
                self.edges.append(edge)
                self._below.setdefault(parent, []).append(edge)
                self._above.setdefault(child, []).append(edge)

    def _weights(self) -> dict[str, float]:
        # The share of each node in the decision along all paths, the root's being 1.
        weights = {self.root: 1.0} | dict.fromkeys(self.nodes.keys() - {self.root}, 0.0)
        for edge in sorted(self.edges, key=lambda edge: -self.nodes[edge.child].stage):
            weights[edge.child] += weights[edge.parent] * edge.share
        return weights


def evidence(
    net: Staged,
    image: Float[Tensor, "1 c h w"] | Float[Tensor, "c h w"] | Picture | Forward,
    class_id: int | str | Neuron | tuple[int, int, int, int] | None = None,
    top: int = 3,
    *,
    stages: Sequence[int] | None = None,
    depth: int | None = None,
    merge: float | None = None,
    tight: bool = False,
    crops: bool = True,
) -> Evidence:
    """Traces a decision of a network down to the channels that it rests on.

    From one forward pass, each decision is decomposed into the stage below: the `top` channels
    with the largest positive contributions are its evidence, and of each the open neuron that
    contributes most is decomposed in turn. The model is left as it was.

    Args:
        net: A network from :func:`attnviz.staged` or :func:`attnviz.load_network`.
        image: A normalized image, a picture for :meth:`Staged.preprocess`, or the ``forward`` of
            another tree, which saves the forward pass.
        class_id: A class by number or name, the one with the highest score if None; or a neuron
            ``(stage, channel, row, column)``.
        top: Channels for each decision.
        stages: Numbers of the stages to pass, 1 = shallowest; all if None. Those between are
            passed over.
        depth: Decisions in a row to decompose; all if None. 1 gives the channels of the
            deepest stage only, to be expanded one by one.
        merge: Leave out channels that light up the same places as a stronger one of the same
            decision, with an intersection over union above this (the thesis takes 0.9, to show
            a tree to people); none if None.
        tight: Find the boxes of the pixels that excite each node; takes a multiple of the time.
        crops: Compute in receptive-field windows where the layers allow it; else in whole maps,
            slowly and with the same result.

    Returns:
        The tree. It is empty, and its ``note`` says so, if nothing speaks for the class.

    Raises:
        ValueError: An argument is out of range, a neuron does not exist or is not open, or the
            image is too small.
        TypeError: The network is not cut into stages, or an argument is of another type.

    Example:
        >>> from torchvision.models import resnet18
        >>> import attnviz
        >>> net = attnviz.staged(resnet18())
        >>> tree = evidence(net, torch.rand(1, 3, 64, 64), 3, depth=1)
        >>> [edge.parent for edge in tree.edges]
        ['class', 'class', 'class']

    References:
        Thesis sections 5.2.2 and 5.2.3, Eqs. 5.2-5.5.
    """
    check_network(net)
    if isinstance(image, Forward) and image.net is not net:
        raise ValueError(
            f"expected a forward pass of {net.name}, got one of {image.net.name}; give the image"
        )
    _check_top(top)
    numbers = net.check_stages(stages)
    if depth is not None and depth < 1:
        raise ValueError(f"expected `depth` of at least 1, got {depth}")
    if merge is not None and not 0 < merge <= 1:
        raise ValueError(f"expected `merge` in (0, 1], got {merge}")
    forward = image if isinstance(image, Forward) else run(net, _image(net, image))
    target = _target(forward, class_id)
    if isinstance(target, Neuron) and stages is None:
        numbers = tuple(number for number in numbers if number <= target.stage)
    tree = Evidence(forward, target, top, numbers, merge, crops)
    front = list(tree.nodes)
    left = len(numbers) if depth is None else depth - (tree.root == CLASS)
    for _ in range(left):
        front = list(dict.fromkeys(edge.child for edge in tree.expand(*front)))
    if tight:
        tree.tighten()
    return tree


def _image(net: Staged, image: Tensor | Picture) -> Tensor:
    if not isinstance(image, Tensor):
        return net.preprocess(image)
    return image[None] if image.ndim == 3 else image


def _check_top(top: int) -> int:
    if not isinstance(top, Integral):
        raise TypeError(f"expected `top` as a number of channels, got {top!r}")
    if top < 1:
        raise ValueError(f"expected `top` of at least 1, got {top}")
    return top


def _target(forward: Forward, class_id: object) -> int | Neuron:
    if isinstance(class_id, tuple):
        if len(class_id) != 4 or not all(isinstance(part, Integral) for part in class_id):
            raise ValueError(
                f"expected a neuron as (stage, channel, row, column), got {class_id!r}"
            )
        return Neuron(*map(int, class_id))
    if isinstance(class_id, Integral | str):
        return forward.net.class_id(class_id if isinstance(class_id, str) else int(class_id))
    if class_id is not None:
        raise TypeError(
            "expected `class_id` as the number or name of a class or as a neuron "
            f"(stage, channel, row, column), got {class_id!r}"
        )
    output = forward.output
    if not isinstance(output, Tensor) or output.ndim not in (1, 2):
        return 0  # which decompose refuses in its own words
    return int(output > 0) if output.numel() == 1 else int(output.argmax())


def _probability(forward: Forward, class_id: int) -> float:
    scores = forward.output.detach()
    if scores.numel() == 1:
        return float(class_score(scores, class_id).float().sigmoid())
    return float(forward.net.probabilities(scores.reshape(1, -1))[0, class_id])


def _strongest(
    window: Window, top: int, merge: float | None
) -> list[tuple[int, float, tuple[int, int], Tensor]]:
    # The channels with the largest positive contributions: channel, alpha, peak, map.
    alphas = window.contributions
    if merge is not None:
        kept = suppress(window.attention, alphas, merge)
        alphas = torch.zeros_like(alphas).index_copy(
            0, torch.tensor(kept, dtype=torch.long), alphas[list(kept)]
        )
    most = top
    while True:  # a positive contribution may come from closed places alone, but seldom does
        values, channels = alphas.topk(min(most, len(alphas)))
        activation = window.activation[channels]
        maps = activation * window.gradient[channels]
        highest, places = (maps * (activation > 0)).flatten(1).max(dim=1)
        lists = (each.tolist() for each in (channels, values, highest, places))
        width = maps.shape[2]
        found = [
            (channel, alpha, divmod(place, width), map)
            for channel, alpha, high, place, map in zip(*lists, maps, strict=True)
            if alpha > 0 and high > 0
        ]
        if len(found) >= top or most >= len(alphas) or values[-1] <= 0:
            return found[:top]
        most *= 4


def _tight(window: Window) -> Box | None:
    # The pixels of a guided gradient that are not weak; None without any.
    size = window.gradient.abs().amax(dim=0)
    strong = size > _WEAK * size.max()
    rows, columns = strong.any(dim=1).nonzero()[:, 0], strong.any(dim=0).nonzero()[:, 0]
    if not len(rows):
        return None
    (y0, y1), (x0, x1) = rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
    return window.left + x0, window.top + y0, window.left + x1 + 1, window.top + y1 + 1
