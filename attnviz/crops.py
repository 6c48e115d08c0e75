r"""Decomposes neurons in receptive-field windows: exact, and far smaller than the image.

A neuron depends on a small window of the stage below. :func:`run` keeps, of one forward pass,
the ReLU masks and the few values that a way back needs; :func:`decompose` then goes only
backward, many decisions at once, and each layer only as far as its window reaches. Nothing is
computed twice and nothing outside the cone at all.

Gradients lie as ``(n, h, w, c)``: a convolution is one matrix product per window position, whose
taps are added where they came from. Decisions whose windows look alike go together. Windows
are clipped at the border of the image where that saves more than running fewer decisions at once
costs; what lies outside is no activation and gets nothing.

Layers that mix all positions (squeeze-and-excitation, attention) or that have no rule here,
and layers with hooks of the user, have no such window: between stages that hold one, the whole
maps are differentiated by autograd, with the same result.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional

from .gap import Score, attention, channel_scores, contributions
from .graphs import OUTPUT, trace
from .stages import Staged

__all__ = ["Forward", "Neuron", "Window", "class_score", "decompose", "field_of_view", "run"]

Box = tuple[int, int, int, int]
_Rule = Literal["conv", "scale", "relu", "max", "mean", "same", "add", "cat", "pointwise"]
_ACTIVATIONS = (
    nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardtanh, nn.Softplus, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softsign, nn.LogSigmoid,
)  # fmt: skip
_FUNCTIONS: dict[_Rule, set[str]] = {
    "relu": {"relu", "relu_", "relu6"},
    "same": {"dropout", "dropout_", "dropout2d", "feature_dropout", "contiguous", "clone",
             "stochastic_depth"},
    "add": {"add", "iadd", "add_"},
    "cat": {"cat", "concat"},
    "pointwise": {"leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
                  "hardtanh", "softplus", "sigmoid", "tanh"},
}  # fmt: skip
_NAMES = ("kernel_size", "stride", "padding")
_MAX = (nn.MaxPool2d, (*_NAMES, "dilation", "ceil_mode", "return_indices"))
_MEAN = (nn.AvgPool2d, (*_NAMES, "ceil_mode", "count_include_pad", "divisor_override"))
_POOLS = {functional.max_pool2d: _MAX, functional.avg_pool2d: _MEAN}
_IDLE = {"StochasticDepth", "DropPath"}  # torchvision's and timm's; idle in evaluation mode
_POINTWISE = {"LayerNorm2d", "BatchNormAct2d", "LayerScale2d"}  # torchvision's and timm's
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STEP_COST = 1e6  # multiplications that take as long as handling one step once more
_LARGEST = 2**25  # numbers in one intermediate result


class Neuron(NamedTuple):
    """One place of one channel of a stage."""

    stage: int
    channel: int
    row: int
    column: int

    def __str__(self) -> str:
        return f"{self.stage}:{self.channel}@{self.row},{self.column}"


@dataclass(frozen=True, eq=False)
class Window:
    """Where one decision looks at a stage, and its gradient there; elsewhere it is zero."""

    decision: float
    """The value of the decision: a class score or an activation."""
    top: int
    """The first row of the window."""
    left: int
    """Its first column."""
    size: tuple[int, int]
    """Height and width of the whole stage."""
    activation: Float[Tensor, "c h w"]
    """The stage's activation in the window."""
    gradient: Float[Tensor, "c h w"]
    """The decision's gradient in the window."""
    contributions: Float[Tensor, " c"]
    """The mean of each channel's attention over the whole stage, Eq. 5.4."""

    @property
    def attention(self) -> Float[Tensor, "c h w"]:
        """The attention map of each channel in the window, Eq. 5.3."""
        return attention(self.activation, self.gradient)

    def scores(self, score: Score = "AA") -> Float[Tensor, " c"]:
        """Scores each channel over the whole stage, see :func:`attnviz.gap.channel_scores`."""
        if self.gradient.numel() == 0:  # it saw only padding
            return torch.zeros_like(self.contributions)
        values = channel_scores(self.activation, self.gradient, score)
        inside = self.gradient[0].numel() / math.prod(self.size)
        if score[0] == "A":
            return values * inside
        return values.clamp_min(0) if inside < 1 else values

    def whole(self, values: Float[Tensor, "*c h w"]) -> Float[Tensor, "*c H W"]:
        """Puts values of the window into the whole stage, zero elsewhere."""
        whole = values.new_zeros(*values.shape[:-2], *self.size)
        height, width = values.shape[-2:]
        whole[..., self.top : self.top + height, self.left : self.left + width] = values
        return whole


# --------------------------------------------------------------------------------------- program


class _Step(NamedTuple):
    # One call of the network; its arguments name the values that it takes.
    node: fx.Node
    layer: nn.Module | None
    holder: fx.GraphModule
    args: tuple
    kwargs: dict

    @property
    def name(self) -> str:
        if self.node.op == "call_method":
            return self.node.target
        return getattr(self.node.target, "__name__", "")

    @property
    def sources(self) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.map_arg((self.args, self.kwargs), found.append)
        return found


@dataclass(frozen=True, eq=False)
class _Program:
    # The whole network as one list of steps.
    steps: tuple[_Step, ...]
    stages: tuple[fx.Node, ...]  # the image, then each stage
    final: object  # the output, nodes in place of values
    done: tuple[tuple[fx.Node, ...], ...]  # values that nobody needs after each step
    crossing: frozenset[fx.Node]  # values from before a stage that are used after it as well
    opened: tuple[nn.Module, ...]  # modules that are run layer by layer
    paths: dict = field(default_factory=dict)  # from a stage to a shallower one: the steps
    measured: dict = field(default_factory=dict)  # and the windows along them


_PROGRAMS: WeakKeyDictionary[Staged, _Program] = WeakKeyDictionary()


def _program(net: Staged, *, inside: bool = True) -> _Program:
    known, values, steps, opened = {}, {}, [], []
    for segment in net._parts.segments:
        graph = segment.module.graph
        holders = [node for node in graph.nodes if node.op == "placeholder"]
        for holder, name in zip(holders, segment.inputs, strict=True):
            known[holder] = values.setdefault(name, holder)
        _append(segment.module, known, steps, opened if inside else None)
        results = fx.map_arg(graph.output_node().args[0], known.__getitem__)
        values.update(zip(segment.outputs, results, strict=True))
    image = values[net._parts.segments[0].inputs[0]]
    stages = (image, *(values[name] for name in net._parts.stages))
    kept = {*stages}
    fx.map_arg(values[OUTPUT], kept.add)
    last = {source: index for index, step in enumerate(steps) for source in step.sources}
    done: list[list[fx.Node]] = [[] for _ in steps]
    for node, index in last.items():
        if node not in kept:
            done[index].append(node)
    made = {step.node: index for index, step in enumerate(steps)}
    crossing = {
        node
        for node, index in last.items()
        for stage in stages[1:]
        if node is not stage and made.get(node, -1) < made[stage] < index
    }
    return _Program(
        steps=tuple(steps),
        stages=stages,
        final=values[OUTPUT],
        done=tuple(map(tuple, done)),
        crossing=frozenset(crossing),
        opened=tuple(opened),
    )


def _append(
    module: fx.GraphModule,
    known: dict[fx.Node, fx.Node],
    steps: list[_Step],
    opened: list[nn.Module] | None,
) -> None:
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        layer = module.get_submodule(node.target) if node.op == "call_module" else None
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        inner = None
        if opened is not None and layer is not None and not kwargs:
            inner = _open(layer)
        if inner is None:
            known[node] = node
            steps.append(_Step(node, layer, module, args, kwargs))
            continue
        holders = (n for n in inner.graph.nodes if n.op == "placeholder")
        within = dict(zip(holders, args, strict=False))
        _append(inner, within, steps, opened)
        opened.append(layer)
        known[node] = within[inner.graph.output_node().args[0]]


def _open(layer: nn.Module) -> fx.GraphModule | None:
    # The graph inside a module that the network calls as a whole, if that helps.
    if not list(layer.children()) or _layer_rule(layer) is not None or _is_hooked(layer):
        return None
    try:
        inner = trace(layer, None)
    except TypeError:
        return None
    return inner if isinstance(inner.graph.output_node().args[0], fx.Node) else None


def _is_hooked(layer: nn.Module) -> bool:
    return any(getattr(part, kind) for part in layer.modules() for kind in _HOOKS)


def _call(step: _Step, env: dict[fx.Node, object]) -> object:
    if step.node.op == "get_attr":
        path, _, name = step.node.target.rpartition(".")
        return getattr(step.holder.get_submodule(path), name)
    args, kwargs = fx.map_arg((step.args, step.kwargs), env.__getitem__)
    if step.layer is not None:
        return step.layer(*args, **kwargs)
    if step.node.op == "call_method":
        return getattr(args[0], step.node.target)(*args[1:], **kwargs)
    return step.node.target(*args, **kwargs)


# --------------------------------------------------------------------------------------- forward


@dataclass(frozen=True, eq=False)
class Forward:
    """One image's forward pass, with what ways back need. Made by :func:`run`."""

    net: Staged
    """The network."""
    image: Float[Tensor, "1 c H W"]
    """The image, normalized."""
    activations: tuple[Float[Tensor, "c _ _"], ...]
    """The activation of each stage, shallow first."""
    output: object
    """The model's own output; differentiable by the deepest stage's activation."""
    _program: _Program
    _kept: dict[fx.Node, Tensor]
    _rules: dict[fx.Node, _Rule | None]
    _shapes: dict[fx.Node, tuple[int, ...]]
    _rows: dict[tuple[fx.Node, Callable | None], Tensor] = field(default_factory=dict)
    _paths: dict[tuple[int, int], "_Path | None"] = field(default_factory=dict)

    def values(self, stage: int) -> Float[Tensor, "1 c h w"]:
        """Returns the activation of a stage; the image for stage 0."""
        return self._kept[self._program.stages[stage]]

    def size(self, stage: int) -> tuple[int, int]:
        """Returns height and width of a stage; of the image for stage 0."""
        return tuple(self.values(stage).shape[2:])

    def score(self, class_id: int) -> Float[Tensor, ""]:
        """Returns the score of a class, differentiable by the deepest stage's activation.

        Raises:
            ValueError: There is no such class, or the network gives no finite scores.
        """
        output = self.output
        if not isinstance(output, Tensor) or output.ndim not in (1, 2):
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"expected a network output of one row of scores per image, got {got}; decompose "
                "a neuron instead"
            )
        classes = max(2, output.numel())
        if not 0 <= class_id < classes:
            raise ValueError(f"expected a class from 0 to {classes - 1}, got {class_id}")
        with torch.inference_mode(False), torch.enable_grad():
            score = class_score(output, class_id)[0]
        if not score.isfinite():
            raise ValueError(
                "expected finite scores, got NaN or infinity; check the network's weights and "
                "the image for NaN, and half precision for overflow"
            )
        return score

    def check(self, neuron: Neuron) -> Neuron:
        """Returns the neuron if it exists and is open.

        Raises:
            ValueError: It is out of range, or its activation is not above 0.
        """
        stages = len(self.activations)
        if not 1 <= neuron.stage <= stages:
            raise ValueError(f"expected a stage from 1 to {stages}, got {neuron.stage}")
        shape = self.activations[neuron.stage - 1].shape
        for name, value, size in zip(neuron._fields[1:], neuron[1:], shape, strict=True):
            if not 0 <= value < size:
                raise ValueError(
                    f"expected a {name} from 0 to {size - 1} in stage {neuron.stage}, got {value}"
                )
        activation = float(self.activations[neuron.stage - 1][neuron[1:]])
        if not activation > 0:
            raise ValueError(
                f"expected an open neuron, got {neuron} with activation {activation:.3g}; only "
                "what is above 0 can be decomposed"
            )
        return neuron

    def is_local(self, top: int, stage: int) -> bool:
        """Tells whether neurons of stage `top` are decomposed into `stage` in windows."""
        return _path(self, top, stage) is not None

    def _gather(
        self, node: fx.Node, box: np.ndarray, change: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        # A kept value, or a change of it, in windows (n, h, w, c); the nearest beyond the border.
        value = self._kept[node].detach()[0].flatten(1)
        places = _places(box, self._shapes[node][2:]).to(value.device)
        if (node, change) not in self._rows and len(places) < value.shape[1] // 4:
            found = value[:, places].t().contiguous()
            found = found if change is None else change(found)
        else:  # a position becomes one stretch of memory
            if (node, change) not in self._rows:
                found = value if change is None else change(value)
                self._rows[node, change] = found.t().contiguous()
            found = self._rows[node, change].index_select(0, places)
        return found.view(len(box), *(box[0, 1] - box[0, 0]).tolist(), -1)


def run(net: Staged, image: Float[Tensor, "1 c h w"]) -> Forward:
    """Runs a network on one image and keeps what :func:`decompose` needs.

    Works inside ``no_grad`` and ``inference_mode``, and leaves the model as it was.

    Raises:
        ValueError: It is not one image, or not one that the network can take.
    """
    net._check_images(image)
    if len(image) != 1:
        raise ValueError(f"expected one image (1, c, h, w), got {len(image)}; pass images[:1]")
    program = _PROGRAMS.get(net)
    if program is None or any(map(_is_hooked, program.opened)):
        program = _program(net)
        with torch.inference_mode(False):
            forward = _run(net, program, image)
        same = not program.opened or torch.equal(_flat(net(image)), _flat(forward.output))
        if same:  # a module that computes something else when opened stays closed
            _PROGRAMS[net] = program
            return forward
        program = _PROGRAMS[net] = _program(net, inside=False)
    with torch.inference_mode(False):
        return _run(net, program, image)


def _flat(output: object) -> Tensor:
    found = torch.utils._pytree.tree_leaves(output)
    return torch.cat([each.detach().flatten() for each in found if isinstance(each, Tensor)])


def _run(net: Staged, program: _Program, image: Tensor) -> Forward:
    image = image.clone() if image.is_inference() else image.detach()
    env: dict[fx.Node, object] = {program.stages[0]: image}
    kept: dict[fx.Node, Tensor] = {program.stages[0]: image}
    versions: dict[fx.Node, int] = {}
    rules: dict[fx.Node, _Rule | None] = {}
    shapes: dict[fx.Node, tuple[int, ...]] = {program.stages[0]: tuple(image.shape)}
    deepest = program.stages[-1]

    def keep(node: fx.Node, value: Tensor) -> None:
        kept[node], versions[node] = value, value._version

    class Runner:
        @staticmethod
        def forward(_: Tensor) -> None:
            recording = False
            for step, done in zip(program.steps, program.done, strict=True):
                if not recording:
                    rules[step.node] = rule = _rule(step, shapes)
                    if rule in ("max", "pointwise"):
                        value = env[step.sources[0]]
                        keep(step.sources[0], value.clone() if _writes(step) else value)
                with torch.set_grad_enabled(recording):
                    env[step.node] = value = _call(step, env)
                if isinstance(value, Tensor):
                    shapes[step.node] = tuple(value.shape)
                if step.node in program.crossing and isinstance(value, Tensor):
                    keep(step.node, value.detach().clone())
                elif not recording and (rule == "relu" or step.node in program.stages):
                    keep(step.node, value)
                if step.node is deepest:
                    kept[deepest] = env[deepest] = value.detach().requires_grad_()
                    recording = True
                for node in done:
                    env.pop(node, None)

    net._call(Runner, [image], image)
    stale = {node for node, version in versions.items() if kept[node]._version != version}
    for step in program.steps:  # something worked in place on what was kept
        if step.node in stale or (
            rules.get(step.node) in ("max", "pointwise") and step.sources[0] in stale
        ):
            rules[step.node] = None
    for stage in program.stages[1:]:
        if kept[stage].ndim != 4:
            raise ValueError(
                f"expected stages of shape (b, c, h, w), got {tuple(kept[stage].shape)}; "
                "name other `cuts`"
            )
    return Forward(
        net=net,
        image=image,
        activations=tuple(kept[stage].detach()[0] for stage in program.stages[1:]),
        output=fx.map_arg(program.final, env.__getitem__),
        _program=program,
        _kept={node: value.detach() if node is not deepest else value
               for node, value in kept.items()},
        _rules=rules,
        _shapes=shapes,
    )  # fmt: skip


def class_score(output: object, class_id: int) -> Float[Tensor, " b"]:
    """Returns the score of a class; a single score is that of class 1, its negative of 0."""
    scores = output.reshape(len(output), -1)
    if scores.shape[1] == 1:
        return scores[:, 0] if class_id else -scores[:, 0]
    return scores[:, class_id]


# --------------------------------------------------------------------------------------- rules


def _rule(step: _Step, shapes: dict[fx.Node, tuple[int, ...]]) -> _Rule | None:
    # How to go back through a step in windows; None where that can't be done.
    taken = [shapes.get(source, ()) for source in step.sources]
    if not taken or any(len(shape) != 4 for shape in taken):
        return None
    if step.layer is not None:
        return None if _is_hooked(step.layer) else _layer_rule(step.layer)
    if step.node.target in _POOLS:
        return _layer_rule(_pool(step))
    rule = next((rule for rule, names in _FUNCTIONS.items() if step.name in names), None)
    if rule == "add":
        alike = len(set(taken)) == 1 and all(
            isinstance(arg, fx.Node | int | float) for arg in step.args
        )
        return "add" if alike and not step.kwargs else None
    if rule == "cat":
        return "cat" if (*step.args[1:], *step.kwargs.values()) in ((1,), (-3,)) else None
    return rule if len(taken) == 1 else None


def _layer_rule(layer: nn.Module) -> _Rule | None:
    kind, name = type(layer), type(layer).__name__
    if isinstance(layer, nn.Conv2d):
        own = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
        return "conv" if own and layer.padding_mode == "zeros" else None
    if isinstance(layer, nn.BatchNorm2d) and kind.forward is nn.BatchNorm2d.forward:
        return "scale" if layer.running_var is not None else None
    if isinstance(layer, nn.MaxPool2d):
        return None if layer.return_indices else "max"
    if isinstance(layer, nn.ReLU | nn.ReLU6):
        return "relu"
    if isinstance(layer, nn.AvgPool2d):
        return "mean"
    if isinstance(layer, nn.Identity | nn.modules.dropout._DropoutNd) or name in _IDLE:
        return "same"
    return "pointwise" if isinstance(layer, _ACTIVATIONS) or name in _POINTWISE else None


def _writes(step: _Step) -> bool:
    if step.layer is not None:
        return any(getattr(part, "inplace", False) for part in step.layer.modules())
    return step.name.endswith("_") or True in (*step.args, step.kwargs.get("inplace"))


def _pool(step: _Step) -> nn.Module:
    # The layer of a pooling step.
    if step.layer is not None:
        return step.layer
    layer, names = _POOLS[step.node.target]
    given = dict(zip(names, step.args[1:], strict=False)) | step.kwargs
    return layer(**{name: value for name, value in given.items() if name in names})


class _Geometry(NamedTuple):
    # Which rows and columns of its input a layer's output sees.
    kernel: np.ndarray
    stride: np.ndarray
    padding: np.ndarray
    dilation: np.ndarray

    @property
    def reach(self) -> np.ndarray:
        return self.dilation * (self.kernel - 1) + 1

    @property
    def taps(self) -> list[tuple[int, int]]:
        rows, columns = (range(k) for k in self.kernel)
        return [(i * int(self.dilation[0]), j * int(self.dilation[1]))
                for i in rows for j in columns]  # fmt: skip


def _geometry(step: _Step, rule: _Rule) -> _Geometry | None:
    if rule not in ("conv", "max", "mean"):
        return None
    layer = step.layer if rule == "conv" else _pool(step)
    dilation = getattr(layer, "dilation", 1)
    pairs = [np.broadcast_to(v, 2) for v in (layer.kernel_size, layer.stride, dilation)]
    padding = layer.padding
    if isinstance(padding, str):  # torch puts the odd one of "same" behind
        padding = pairs[2] * (pairs[0] - 1) // 2 if padding == "same" else 0
    return _Geometry(pairs[0], pairs[1], np.broadcast_to(padding, 2), pairs[2])


# --------------------------------------------------------------------------------------- windows


@dataclass(frozen=True, eq=False)
class _Path:
    # The steps that lead from one value to another, last first, and what each value's window is:
    # position * stride + base, where base is (first, behind the last) for position 0.
    steps: tuple[_Step, ...]
    sources: tuple[tuple[fx.Node, ...], ...]  # of each step, those on the path
    geometries: tuple[_Geometry | None, ...]
    start: fx.Node
    end: fx.Node
    index: dict[fx.Node, int]
    stride: np.ndarray  # (values, row or column)
    base: np.ndarray  # (values, first or last, row or column)


@dataclass(frozen=True, eq=False)
class _Boxes:
    # Windows of decisions that lie alike: (decisions, values, first or last, row or column).
    index: dict[fx.Node, int]
    values: np.ndarray
    members: np.ndarray

    def __getitem__(self, node: fx.Node) -> np.ndarray:
        return self.values[:, self.index[node]]

    def sides(self, node: fx.Node) -> list[int]:
        low, high = self.values[0, self.index[node]]
        return (high - low).tolist()


def _path(forward: Forward, top: int, stage: int) -> _Path | None:
    program, rules, key = forward._program, forward._rules, (top, stage)
    if key not in forward._paths:
        if key not in program.paths:
            program.paths[key] = _find_path(program, top, stage)
        steps, sources = program.paths[key]
        local = all(rules.get(step.node) for step in steps)
        if local and key not in program.measured:
            ends = program.stages[top], program.stages[stage]
            program.measured[key] = _measure(steps, sources, *ends, rules)
        forward._paths[key] = program.measured[key] if local else None
    return forward._paths[key]


def _find_path(
    program: _Program, top: int, stage: int
) -> tuple[tuple[_Step, ...], tuple[tuple[fx.Node, ...], ...]]:
    start, end = program.stages[top], program.stages[stage]
    depends = {end}
    for step in program.steps:
        if step.node is not end and not depends.isdisjoint(step.sources):
            depends.add(step.node)
    wanted, steps, sources = {start}, [], []
    for step in reversed(program.steps):
        if step.node in wanted and step.node in depends and step.node is not end:
            steps.append(step)
            sources.append(tuple(s for s in dict.fromkeys(step.sources) if s in depends))
            wanted.update(sources[-1])
    return tuple(steps), tuple(sources)


def _measure(
    steps: tuple[_Step, ...],
    sources: tuple[tuple[fx.Node, ...], ...],
    start: fx.Node,
    end: fx.Node,
    rules: dict[fx.Node, _Rule | None],
) -> _Path:
    geometries = tuple(_geometry(step, rules[step.node]) for step in steps)
    stride = {start: np.ones(2, int)}
    base = {start: np.array([[0, 0], [1, 1]])}
    for step, taken, geometry in zip(steps, sources, geometries, strict=True):
        jump = 1 if geometry is None else geometry.stride
        seen = _seen(base[step.node], geometry)
        for source in taken:
            stride[source] = stride[step.node] * jump
            known = base.get(source, seen)
            base[source] = np.stack([np.minimum(known[0], seen[0]), np.maximum(known[1], seen[1])])
    index = {node: place for place, node in enumerate(base)}
    return _Path(
        steps, sources, geometries, start, end, index,
        np.stack(list(stride.values())), np.stack(list(base.values())),
    )  # fmt: skip


def _seen(box: np.ndarray, geometry: _Geometry | None) -> np.ndarray:
    # The places that a layer looks at for a window (..., first or last, row or column).
    if geometry is None:
        return box
    low = box[..., 0, :] * geometry.stride - geometry.padding
    high = (box[..., 1, :] - 1) * geometry.stride - geometry.padding + geometry.reach
    return np.stack([low, high], axis=-2)


def _clipped(forward: Forward, path: _Path, positions: np.ndarray) -> tuple[np.ndarray, ...]:
    # The windows of decisions, as they are and within the borders.
    whole = positions[:, None, None] * path.stride[:, None] + path.base
    sizes = np.array([forward._shapes[node][2:] for node in path.index])
    low = whole[:, :, 0].clip(0, sizes - 1)
    return whole, np.stack([low, whole[:, :, 1].clip(low + 1, sizes)], axis=2)


def _groups(forward: Forward, path: _Path, positions: np.ndarray) -> list[_Boxes]:
    # Decisions whose windows have the same sizes and lie alike.
    whole, clipped = _clipped(forward, path, positions)
    alike = [clipped[:, :, 1] - clipped[:, :, 0]]
    for step, taken, geometry in zip(path.steps, path.sources, path.geometries, strict=True):
        seen = _seen(clipped[:, path.index[step.node]], geometry)
        alike += [(seen - clipped[:, path.index[source]])[:, :1] for source in taken]
    _, group = np.unique(np.concatenate(alike, axis=1), axis=0, return_inverse=True)
    group = group.reshape(-1)
    count = int(group.max()) + 1
    saved = _cost(path, whole) - _cost(path, clipped)
    if saved < (count - 1) * len(path.steps) * _STEP_COST:
        found = [_Boxes(path.index, whole, np.arange(len(positions)))]
    else:
        members = (np.flatnonzero(group == each) for each in range(count))
        found = [_Boxes(path.index, clipped[m], m) for m in members]
    return [part for boxes in found for part in _parts(forward, path, boxes)]


def _cost(path: _Path, boxes: np.ndarray) -> float:
    areas = (boxes[:, :, 1] - boxes[:, :, 0]).prod(axis=2).sum(axis=0)
    return sum(
        float(areas[path.index[step.node]]) * step.layer.weight.numel()
        for step in path.steps
        if isinstance(step.layer, nn.Conv2d)
    )


def _parts(forward: Forward, path: _Path, boxes: _Boxes) -> Iterator[_Boxes]:
    # As many at once as leave every intermediate result small.
    largest = 1
    for step, taken, geometry in zip(path.steps, path.sources, path.geometries, strict=True):
        taps = 1 if geometry is None else len(geometry.taps)
        width = max(forward._shapes[node][1] for node in (step.node, *taken))
        largest = max(largest, math.prod(boxes.sides(step.node)) * taps * width)
    most = max(1, _LARGEST // largest)
    for first in range(0, len(boxes.members), most):
        part = slice(first, first + most)
        yield _Boxes(boxes.index, boxes.values[part], boxes.members[part])


def _places(box: np.ndarray, size: tuple[int, int]) -> Tensor:
    # The index of each place of the windows among all places, the nearest one if outside.
    height, width = box[0, 1] - box[0, 0]
    rows = (box[:, 0, :1] + np.arange(height)).clip(0, size[0] - 1)
    columns = (box[:, 0, 1:] + np.arange(width)).clip(0, size[1] - 1)
    return torch.from_numpy((rows[:, :, None] * size[1] + columns[:, None, :]).reshape(-1))


def _inside(box: np.ndarray, size: tuple[int, int], like: Tensor) -> Tensor | None:
    # 1 for each place of the windows (n, h, w, 1) within the border, 0 beyond; None if all are.
    if (box[:, 0] >= 0).all() and (box[:, 1] <= size).all():
        return None
    sides = box[0, 1] - box[0, 0]
    rows, columns = (box[:, 0, axis, None] + np.arange(sides[axis]) for axis in (0, 1))
    rows, columns = (rows >= 0) & (rows < size[0]), (columns >= 0) & (columns < size[1])
    return torch.from_numpy(rows[:, :, None] & columns[:, None, :])[..., None].to(like)


def _is_open(value: Tensor) -> Tensor:
    return (value > 0).to(value)  # times a number is many times faster than where it is true


def _is_between(value: Tensor) -> Tensor:
    return ((value > 0) & (value < 6)).to(value)


# -------------------------------------------------------------------------------------- way back


def _descend(forward: Forward, path: _Path, boxes: _Boxes, start: Tensor, guided: bool) -> Tensor:
    # From gradients (n, 1, 1, c) of the decisions to those of the windows at the end of the path.
    reached = {path.start: start}
    back = _Back(forward, boxes, guided)
    for step, taken, geometry in zip(path.steps, path.sources, path.geometries, strict=True):
        rule = getattr(back, f"_{forward._rules[step.node]}")
        parts = rule(step, reached.pop(step.node), geometry)
        seen = _seen(boxes[step.node][0], geometry)
        for source in taken:
            part = parts[source] if isinstance(parts, dict) else parts
            _place(reached, source, part, (seen[0] - boxes[source][0, 0]).tolist(), boxes)
    return reached[path.end]


def _place(
    reached: dict[fx.Node, Tensor], node: fx.Node, part: Tensor, shift: list[int], boxes: _Boxes
) -> None:
    # Adds what a step handed down to what its source has got from others.
    sides, given = boxes.sides(node), list(part.shape[1:3])
    if node not in reached:
        if shift == [0, 0] and given == sides:
            reached[node] = part
            return
        reached[node] = part.new_zeros(part.shape[0], *sides, part.shape[3])
    into, out = [], []
    for offset, side, length in zip(shift, sides, given, strict=True):
        low, high = max(0, offset), max(0, offset, min(side, offset + length))
        into.append(slice(low, high))
        out.append(slice(low - offset, high - offset))
    reached[node][:, into[0], into[1]] += part[:, out[0], out[1]]


@dataclass(frozen=True, eq=False)
class _Back:
    # What each kind of step hands down: one tensor for all sources, or one for each.
    forward: Forward
    boxes: _Boxes
    guided: bool

    def _without_padding(self, step: _Step, geometry: _Geometry, part: Tensor) -> Tensor:
        # What a layer took from its padding is no activation.
        if not geometry.padding.any():
            return part
        size = self.forward._shapes[step.sources[0]][2:]
        inside = _inside(_seen(self.boxes[step.node], geometry), size, part)
        return part if inside is None else part.mul_(inside)

    def _conv(self, step: _Step, gradient: Tensor, geometry: _Geometry) -> Tensor:
        layer = step.layer
        weight = layer.weight.detach()
        flat = gradient.reshape(-1, gradient.shape[3])
        handed = _taps(flat, weight, layer.groups)
        return self._without_padding(
            step, geometry, _collect(handed, gradient.shape[:3], geometry)
        )

    def _scale(self, step: _Step, gradient: Tensor, _: None) -> Tensor:
        layer = step.layer
        factor = (layer.running_var + layer.eps).rsqrt()
        return gradient * (factor if layer.weight is None else factor * layer.weight.detach())

    def _relu(self, step: _Step, gradient: Tensor, _: None) -> Tensor:
        six = isinstance(step.layer, nn.ReLU6) or step.name == "relu6"
        change = _is_between if six else _is_open
        passed = gradient * self.forward._gather(step.node, self.boxes[step.node], change)
        return passed.relu_() if self.guided else passed

    def _max(self, step: _Step, gradient: Tensor, geometry: _Geometry) -> Tensor:
        source = step.sources[0]
        box = _seen(self.boxes[step.node], geometry)
        value = self.forward._gather(source, box)
        inside = _inside(box, self.forward._shapes[source][2:], value)
        if inside is not None:
            value = value + inside.log()  # minus infinity beyond the border
        views = [_tap(value, tap, gradient, geometry) for tap in geometry.taps]
        best = reduce(torch.maximum, views)
        handed = torch.zeros_like(value)
        for view, tap in zip(views, geometry.taps, strict=True):
            taken = gradient * (view == best).to(gradient)
            _tap(handed, tap, gradient, geometry).add_(taken)
            gradient = gradient - taken  # the first of equals gets all, as in torch
        return handed

    def _mean(self, step: _Step, gradient: Tensor, geometry: _Geometry) -> Tensor:
        size = self.forward._shapes[step.sources[0]][2:]
        share = gradient / _counts(_pool(step), geometry, self.boxes[step.node], size).to(gradient)
        side = (np.array(gradient.shape[1:3]) - 1) * geometry.stride + geometry.reach
        handed = gradient.new_zeros(len(gradient), *side, gradient.shape[3])
        for tap in geometry.taps:
            _tap(handed, tap, gradient, geometry).add_(share)
        return self._without_padding(step, geometry, handed)

    def _same(self, step: _Step, gradient: Tensor, _: None) -> Tensor:
        return gradient

    def _add(self, step: _Step, gradient: Tensor, _: None) -> dict[fx.Node, Tensor]:
        sources = step.sources
        if len(set(sources)) < len(sources):  # x + x
            return {sources[0]: gradient * 2}
        # each may add to it
        return {source: gradient.clone() if i else gradient for i, source in enumerate(sources)}

    def _cat(self, step: _Step, gradient: Tensor, _: None) -> dict[fx.Node, Tensor]:
        widths = [self.forward._shapes[source][1] for source in step.sources]
        found: dict[fx.Node, Tensor] = {}
        for source, part in zip(step.sources, gradient.split(widths, dim=3), strict=True):
            found[source] = found[source] + part if source in found else part.contiguous()
        return found

    def _pointwise(self, step: _Step, gradient: Tensor, _: None) -> Tensor:
        source = step.sources[0]
        value = self.forward._gather(source, self.boxes[step.node]).permute(0, 3, 1, 2)
        with torch.enable_grad():
            value.requires_grad_()
            result = _call(step, {source: value * 1})  # it may work in place
        [found] = torch.autograd.grad(result, value, gradient.permute(0, 3, 1, 2))
        return found.permute(0, 2, 3, 1).contiguous()


def _counts(
    layer: nn.AvgPool2d, geometry: _Geometry, box: np.ndarray, size: tuple[int, int]
) -> Tensor:
    # By how much each place of an average pooling divides: (n, h, w, 1).
    if layer.divisor_override:
        return torch.full((1, 1, 1, 1), layer.divisor_override)
    sides = []
    for axis in (0, 1):
        place = box[:, 0, axis, None] + np.arange(box[0, 1, axis] - box[0, 0, axis])
        low = place * geometry.stride[axis] - geometry.padding[axis]
        high = np.minimum(low + geometry.kernel[axis], size[axis] + geometry.padding[axis])
        if not layer.count_include_pad:
            low, high = low.clip(0), np.minimum(high, size[axis])
        sides.append((high - low).clip(1))
    return torch.from_numpy(sides[0][:, :, None] * sides[1][:, None, :])[..., None]


def _taps(flat: Tensor, weight: Tensor, groups: int) -> Tensor:
    # What each position hands to each tap: (positions, taps, input channels).
    outputs, inputs = weight.shape[:2]
    count = weight[0, 0].numel()
    if groups == 1 and len(flat) * 2 < outputs:  # turn the smaller of the two
        return (flat @ weight.reshape(outputs, -1)).view(-1, inputs, count).transpose(1, 2)
    by_tap = weight.flatten(2).transpose(1, 2)  # (outputs, taps, inputs)
    if groups == 1:
        return (flat @ by_tap.reshape(outputs, -1)).view(-1, count, inputs)
    if outputs == groups:
        return flat[:, None] * by_tap[None, ..., 0].transpose(1, 2)
    flat, by_tap = flat.unflatten(1, (groups, -1)), by_tap.unflatten(0, (groups, -1))
    return torch.einsum("pgo,goti->ptgi", flat, by_tap).flatten(2)


def _collect(handed: Tensor, shape: Sequence[int], geometry: _Geometry) -> Tensor:
    # Adds what the taps of all positions hand to the same place.
    handed = handed.view(*shape, *handed.shape[1:])
    if len(geometry.taps) == 1 and (geometry.stride == 1).all():
        return handed[..., 0, :]
    side = (np.array(shape[1:]) - 1) * geometry.stride + geometry.reach
    found = handed.new_zeros(shape[0], *side.tolist(), handed.shape[-1])
    for index, tap in enumerate(geometry.taps):
        part = handed[..., index, :]
        _tap(found, tap, part, geometry).add_(part)
    return found


def _tap(values: Tensor, tap: tuple[int, int], like: Tensor, geometry: _Geometry) -> Tensor:
    # The places of a window that one tap of the kernel sees, one for each place of `like`.
    rows, columns = (
        slice(first, first + (length - 1) * int(step) + 1, int(step))
        for first, length, step in zip(tap, like.shape[1:3], geometry.stride, strict=True)
    )
    return values[:, rows, columns]


# ------------------------------------------------------------------------------------- whole maps


def _replay(
    forward: Forward,
    stage: int,
    values: Tensor,
    until: fx.Node | None = None,
    call: Callable[[_Step, dict[fx.Node, object]], object] = _call,
) -> dict[fx.Node, object]:
    # Runs what follows a stage on other values of it; other values from before it are kept.
    program = forward._program
    end = program.stages[stage]
    env: dict[fx.Node, object] = {
        node: forward._kept[node].expand(len(values), *forward._kept[node].shape[1:]).clone()
        for node in program.crossing
        if node in forward._kept
    }
    env[end] = values
    made = next((i for i, step in enumerate(program.steps, 1) if step.node is end), 0)
    for step, done in zip(program.steps[made:], program.done[made:], strict=True):
        if all(source in env for source in step.sources):
            env[step.node] = call(step, env)
        if step.node is until:
            break
        for node in done:
            env.pop(node, None)
    return env


def _scores_of(forward: Forward, env: dict[fx.Node, object], class_id: int) -> Tensor:
    return class_score(fx.map_arg(forward._program.final, env.__getitem__), class_id)


def _differentiate(
    forward: Forward,
    stage: int,
    count: int,
    pick: Callable[[dict[fx.Node, object]], Tensor],
    until: fx.Node | None,
    guided: bool,
) -> Tensor:
    # The gradient (count, c, h, w) of one picked value per copy of a stage's whole activation.
    leaf = forward.values(stage).detach().expand(count, -1, -1, -1).clone().requires_grad_()
    call = _guided_call if guided else _call
    with torch.enable_grad():  # a leaf must not be worked on in place
        picked = pick(_replay(forward, stage, leaf.clone(), until, call)).sum()
    [gradient] = torch.autograd.grad(picked, leaf)
    return gradient


def _guided_call(step: _Step, env: dict[fx.Node, object]) -> object:
    result = _call(step, env)
    if isinstance(step.layer, nn.ReLU | nn.ReLU6) or step.name in _FUNCTIONS["relu"]:
        result.register_hook(torch.relu)
    return result


# ------------------------------------------------------------------------------------- decompose


def decompose(
    forward: Forward,
    decisions: int | Sequence[Neuron],
    stage: int | None = None,
    *,
    crops: bool = True,
    guided: bool = False,
) -> list[Window]:
    """Differentiates decisions by the activation of a shallower stage.

    Args:
        forward: The forward pass of :func:`run`.
        decisions: A class, or open neurons that are all of one stage.
        stage: The stage to decompose them into, 0 = the image; the next shallower one if None.
        crops: Compute in windows where the layers allow it. Otherwise the whole maps are
            differentiated, slowly and with the same result.
        guided: Let only positive gradients pass each ReLU, as guided backpropagation does.

    Returns:
        One window for each decision; for a class the whole stage.

    Raises:
        ValueError: A class, neuron or stage does not exist, or a neuron is not open.
    """
    if isinstance(decisions, int):
        return [_decompose_class(forward, decisions, stage, guided)]
    if not decisions:
        return []
    neurons = [forward.check(neuron) for neuron in decisions]
    tops = {neuron.stage for neuron in neurons}
    if len(tops) > 1:
        raise ValueError(f"expected neurons of one stage, got stages {sorted(tops)}")
    top = tops.pop()
    stage = top - 1 if stage is None else stage
    if not 0 <= stage < top:
        raise ValueError(f"expected a stage from 0 to {top - 1} to decompose into, got {stage}")
    with torch.inference_mode(False), torch.no_grad():
        path = _path(forward, top, stage) if crops else None
        if path is None:
            return _in_whole_maps(forward, neurons, stage, guided)
        return _in_windows(forward, path, neurons, stage, guided)


def _decompose_class(forward: Forward, class_id: int, stage: int | None, guided: bool) -> Window:
    deepest = len(forward.activations)
    stage = deepest if stage is None else stage
    if not 0 <= stage <= deepest:
        raise ValueError(f"expected a stage from 0 to {deepest} to decompose into, got {stage}")
    score = forward.score(class_id)
    if stage == deepest and not guided:
        with torch.inference_mode(False):
            [gradient] = torch.autograd.grad(score, forward.values(stage), retain_graph=True)
    else:
        pick = partial(_scores_of, forward, class_id=class_id)
        with torch.inference_mode(False):
            gradient = _differentiate(forward, stage, 1, pick, None, guided)
    return _whole(forward, float(score.detach()), stage, gradient[0])


def _whole(forward: Forward, decision: float, stage: int, gradient: Tensor) -> Window:
    size, activation = forward.size(stage), forward.values(stage).detach()[0]
    alphas = contributions(attention(activation, gradient))
    return Window(decision, 0, 0, size, activation, gradient, alphas)


def _in_whole_maps(
    forward: Forward, neurons: Sequence[Neuron], stage: int, guided: bool
) -> list[Window]:
    top = forward._program.stages[neurons[0].stage]
    most = max(1, _LARGEST // 4 // forward.values(stage).numel())
    found = []
    for first in range(0, len(neurons), most):
        part = neurons[first : first + most]
        _, channels, rows, columns = (list(each) for each in zip(*part, strict=True))

        def pick(env: dict, index: tuple = (range(len(part)), channels, rows, columns)) -> Tensor:
            return env[top][tuple(map(list, index))]

        gradients = _differentiate(forward, stage, len(part), pick, top, guided)
        for neuron, gradient in zip(part, gradients, strict=True):
            found.append(_whole(forward, _value(forward, neuron), stage, gradient))
    return found


def _in_windows(
    forward: Forward, path: _Path, neurons: Sequence[Neuron], stage: int, guided: bool
) -> list[Window]:
    positions = np.array([neuron[2:] for neuron in neurons])
    channels = torch.tensor([neuron.channel for neuron in neurons])
    size, values = forward.size(stage), forward.values(stage).detach()[0]
    found: dict[int, Window] = {}
    for boxes in _groups(forward, path, positions):
        members = boxes.members
        start = values.new_zeros(len(members), 1, 1, forward._shapes[path.start][1])
        start[torch.arange(len(members)), 0, 0, channels[torch.from_numpy(members)]] = 1
        gradients = _descend(forward, path, boxes, start, guided).permute(0, 3, 1, 2)
        activations = forward._gather(path.end, boxes[path.end]).permute(0, 3, 1, 2)
        alphas = attention(activations, gradients).sum(dim=(2, 3)) / math.prod(size)
        parts = zip(members, gradients, activations, alphas, boxes[path.end], strict=True)
        for index, gradient, activation, alpha, box in parts:
            (top, left), (bottom, right) = box.clip(0, size).tolist()
            shift = (np.array([top, left]) - box[0]).tolist()
            rows = slice(shift[0], shift[0] + bottom - top)
            columns = slice(shift[1], shift[1] + right - left)
            found[int(index)] = Window(
                decision=_value(forward, neurons[index]),
                top=top,
                left=left,
                size=size,
                activation=activation[:, rows, columns],
                gradient=gradient[:, rows, columns],
                contributions=alpha,
            )
    return [found[index] for index in range(len(neurons))]


def _value(forward: Forward, neuron: Neuron) -> float:
    return float(forward.activations[neuron.stage - 1][neuron[1:]])


def field_of_view(forward: Forward, stage: int, row: int, column: int) -> Box:
    """Returns the pixels ``(x0, y0, x1, y1)`` that a place of a stage can depend on.

    The box is half-open and clipped to the image; the whole image where a layer before the stage
    mixes all positions.
    """
    height, width = forward.size(0)
    path = _path(forward, stage, 0)
    if path is None:
        return 0, 0, width, height
    last = path.index[path.end]
    seen = np.array([row, column]) * path.stride[last] + path.base[last]
    (y0, x0), (y1, x1) = seen.clip(0, (height, width)).tolist()
    return x0, y0, x1, y1
