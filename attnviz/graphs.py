"""Traces a network with torch.fx, finds its stages and cuts it into segments.

The trace runs on a shadow of the module tree: the same parameters, buffers and layer hooks, in
evaluation mode, so nothing of the user's model is touched. Used by :mod:`attnviz.stages`.
"""

import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.proxy import TraceError

__all__ = ["OUTPUT", "CutNetwork", "Segment", "cut_network", "input_channels"]

OUTPUT = "output"
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.Sigmoid, nn.Tanh,
)  # fmt: skip
_ACTIVATION_NAMES = {
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "selu", "celu", "gelu", "silu",
    "swish", "mish", "hardswish", "hard_swish", "hardtanh", "softplus", "sigmoid", "tanh",
}  # fmt: skip
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.FractionalMaxPool2d)
_POOL_NAMES = {"max_pool2d", "boolean_dispatch", "avg_pool2d"}
_ALIASES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRANSFORMERS = ("MultiheadAttention", "TransformerEncoder", "WindowAttention", "SelfAttention")


@dataclass(frozen=True)
class Segment:
    """A run of graph nodes as a module: takes the values `inputs`, gives the values `outputs`."""

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ends: str
    """The stage or pooling layer that ends it, or :data:`OUTPUT`."""
    dead: tuple[str, ...]
    """Inputs that no later segment needs."""


@dataclass(frozen=True)
class CutNetwork:
    """A network as a chain of segments."""

    stage_names: tuple[str, ...]
    """For the reader: the module that returns each stage, shallow first."""
    stages: tuple[str, ...]
    """The value of each stage."""
    pools: tuple[str | None, ...]
    """The value of the pooling layer that follows each stage, if one does."""
    segments: tuple[Segment, ...]


def cut_network(model: nn.Module, cuts: Sequence[str] | None, size: tuple[int, int]) -> CutNetwork:
    """Cuts a network at the modules named, or at the stages found for images of `size`.

    Raises:
        TypeError: The model can't be traced or is not convolutional.
        ValueError: A cut does not exist, or a hook is in the way.
    """
    if cuts is None:
        graph, nodes = _cut_at_stages(model, size)
    else:
        graph, nodes = _cut_at_names(model, cuts)
    pools = [_pool_after(node, graph) for node in nodes]
    return CutNetwork(
        stage_names=tuple(_name_of(node, graph, nodes) for node in nodes),
        stages=tuple(node.name for node in nodes),
        pools=tuple(pool and pool.name for pool in pools),
        segments=_split(graph, nodes, [pool for pool in pools if pool is not None]),
    )


def _cut_at_names(model: nn.Module, cuts: Sequence[str]) -> tuple[fx.GraphModule, list[fx.Node]]:
    _check_cuts(model, cuts)
    graph = _trace(model, inside=_ancestors(cuts))
    nodes = [_node_of(cut, graph) for cut in cuts]
    position = _positions(graph)
    if any(position[a] >= position[b] for a, b in pairwise(nodes)):
        raise ValueError(f"expected `cuts` in the order the network runs them, got {list(cuts)}")
    return graph, nodes


def _cut_at_stages(
    model: nn.Module, size: tuple[int, int]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    graph = _trace(model)
    nodes = _find_stages(model, graph, size)
    hooked = _hooked_containers(model)
    if hooked:
        # a hooked container must be called as a whole, or its hooks would not run
        names = [_name_of(node, graph, nodes) for node in nodes]
        _refuse_hooks(hooked & _ancestors(names))
        graph = _trace(model, whole=hooked)
        nodes = [_node_of(name, graph) for name in names]
    return graph, nodes


# -------------------------------------------------------------------------------------- shadow


def input_channels(model: nn.Module) -> int | None:
    """Returns the channels of the images that a network takes; None without a convolution."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.in_channels
    return None


class _Detached(Mapping):
    # A module's parameters, each seen without its gradient: always the current tensor, frozen.
    def __init__(self, parameters: Mapping[str, nn.Parameter | None]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor | None:
        parameter = self._parameters[name]
        return None if parameter is None else parameter.detach()

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def _shadow(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    # The module tree once more, in evaluation mode, sharing parameters, buffers and hooks.
    if id(module) not in memo:
        # not copy.copy, which parametrized modules refuse
        memo[id(module)] = shadow = type(module).__new__(type(module))
        state = shadow.__dict__
        state.update(module.__dict__)
        state["training"] = False
        state["_compiled_call_impl"] = None
        state["_modules"] = {
            name: child if child is None else _shadow(child, memo)
            for name, child in module._modules.items()
        }
    return memo[id(module)]


def _freeze(graph: fx.GraphModule) -> None:
    for module in graph.modules():
        if not isinstance(module._parameters, _Detached):
            module.__dict__["_parameters"] = _Detached(module._parameters)


def _hooked_containers(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if not _atomic(module) and any(getattr(module, kind) for kind in _HOOKS)
    }


def _refuse_hooks(hooked: set[str]) -> None:
    if hooked:
        shown = ", ".join(repr(name) if name else "the model itself" for name in sorted(hooked))
        raise ValueError(
            f"expected no hook on a module that holds a stage inside, got hooks on {shown}; "
            "remove them, or hook the layers within"
        )


# --------------------------------------------------------------------------------------- tracing


def _atomic(module: nn.Module) -> bool:
    # Layers are never traced into: torch's own, subclasses of them, and all without children.
    if isinstance(module, _CONTAINERS):
        return False
    built_in = any(
        cls.__module__.startswith("torch.nn.modules") and cls is not nn.Module
        for cls in type(module).__mro__
    )
    return built_in or not module._modules


class _Tracer(fx.Tracer):
    trace_asserts = True

    def __init__(self, inside: Set[str] | None, whole: Set[str]) -> None:
        super().__init__()
        self._inside = inside
        self._whole = whole

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if self._inside is not None:
            return name not in self._inside
        return name in self._whole or _atomic(module)


def _trace(
    model: nn.Module, inside: Set[str] | None = None, whole: Set[str] = frozenset()
) -> fx.GraphModule:
    shadow = _shadow(model, {})
    tracer = _Tracer(inside, whole)
    for name, module in shadow.named_modules():
        if not tracer.is_leaf_module(module, name):  # the trace must not set off a hook
            module.__dict__.update({kind: {} for kind in _HOOKS})
    parameters = list(inspect.signature(shadow.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        graph = tracer.trace(shadow, concrete_args=defaults)
    except (TraceError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        # the model's own code ran on symbols instead of tensors: any of these may come of it
        raise TypeError(
            "expected a convolutional network that torch.fx can trace, got "
            f"{type(model).__name__} ({_first_line(error)}); name the modules that end its stages "
            "in `cuts`"
        ) from error
    for node in list(graph.nodes)[1:]:
        if node.op == "placeholder":  # an optional argument, which keeps its default
            _erase(node, graph)
    traced = fx.GraphModule(shadow, graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    _freeze(traced)
    return traced


def _erase(node: fx.Node, graph: fx.Graph) -> None:
    for user in list(node.users):
        _erase(user, graph)
    graph.erase_node(node)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _scopes(node: fx.Node) -> list[str]:
    # Names of the modules that the node was called in, outermost first.
    stack = node.meta.get("nn_module_stack") or {}
    return [name for name, _ in stack.values() if name]


def _name_of(node: fx.Node, graph: fx.GraphModule, cuts: Sequence[fx.Node]) -> str:
    # The outermost module that returns this node's value and holds no other cut, or the node.
    for scope in _scopes(node):
        holds = sum(scope in _scopes(cut) for cut in cuts)
        if holds == 1 and _node_of_scope(scope, graph) is node:
            return scope
    return node.target if node.op == "call_module" and _calls(node, graph) == 1 else node.name


def _calls(node: fx.Node, graph: fx.GraphModule) -> int:
    return sum(
        other.op == "call_module" and other.target == node.target for other in graph.graph.nodes
    )


def _node_of_scope(scope: str, graph: fx.GraphModule) -> fx.Node | None:
    inside = [node for node in graph.graph.nodes if scope in _scopes(node)]
    inside += [n for n in graph.graph.nodes if n.op == "call_module" and n.target == scope]
    return max(inside, key=_positions(graph).get) if inside else None


def _positions(graph: fx.GraphModule) -> dict[fx.Node, int]:
    return {node: index for index, node in enumerate(graph.graph.nodes)}


def _node_of(name: str, graph: fx.GraphModule) -> fx.Node:
    found = _node_of_scope(name, graph)
    if found is None:
        found = next((node for node in graph.graph.nodes if node.name == name), None)
    if found is None or found.op in ("placeholder", "output"):
        raise ValueError(
            f"expected `cuts` to name modules that the network runs, got {name!r}, which "
            "it does not run"
        )
    return found


def _check_cuts(model: nn.Module, cuts: Sequence[str]) -> None:
    if isinstance(cuts, str) or not cuts:
        raise ValueError(f"expected `cuts` as a list of module names, got {cuts!r}")
    names = [name for name, _ in model.named_modules() if name]
    for cut in cuts:
        if cut not in names:
            near = get_close_matches(cut, names, n=3, cutoff=0.3)
            raise ValueError(
                f"expected `cuts` to name modules of {type(model).__name__}, got {cut!r}; "
                f"the nearest are {near}"
            )
    _refuse_hooks(_hooked_containers(model) & _ancestors(cuts))


def _ancestors(names: Sequence[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {".".join(part[:depth]) for part in parts for depth in range(len(part))}


# ---------------------------------------------------------------------------------- find stages


def _find_stages(
    model: nn.Module, graph: fx.GraphModule, input_size: tuple[int, int]
) -> list[fx.Node]:
    found = _stage_nodes(model, graph, input_size)
    kind = type(model).__name__
    attends = {
        type(module).__name__
        for module in model.modules()
        if any(word in type(module).__name__ for word in _TRANSFORMERS)
    }
    if attends or not found:
        reason = f"with {sorted(attends)[0]}" if attends else "without a convolutional stage"
        raise TypeError(
            f"expected a convolutional network, got {kind} {reason}; "
            "name the modules that end its stages in `cuts` if their outputs are (b, c, h, w)"
        )
    return found


def _stage_nodes(
    model: nn.Module, graph: fx.GraphModule, input_size: tuple[int, int]
) -> list[fx.Node]:
    channels = input_channels(model)
    if channels is None:
        return []
    shapes = _shapes(model, graph, (1, channels, *input_size))
    nodes = list(graph.graph.nodes)
    bottlenecks = _bottlenecks(nodes)
    last_weight = max((i for i, n in enumerate(nodes) if _has_weights(n, graph)), default=0)
    groups: dict[tuple[int, int], list[int]] = {}  # (area, pools passed) -> positions
    pools = 0
    for index, node in enumerate(nodes[:last_weight]):
        shape = shapes.get(node)
        if node not in bottlenecks or shape is None or len(shape) != 4 or min(shape[2:]) < 2:
            continue
        if _is_pool(node, graph):
            pools += 1
        if node.op != "placeholder":
            groups.setdefault((shape[2] * shape[3], pools), []).append(index)
    ends, previous = [], -1
    for positions in groups.values():
        convolves = any(_is_convolution(n, graph) for n in nodes[previous + 1 : positions[-1] + 1])
        previous = positions[-1]
        if convolves:
            ends.append(_stage_end([nodes[i] for i in positions], nodes, graph))
    return [end for end in ends if end is not None]


def _stage_end(
    candidates: list[fx.Node], nodes: list[fx.Node], graph: fx.GraphModule
) -> fx.Node | None:
    # The last activated candidate; the last block output where more than a projection follows.
    named = [n for n in candidates if not _is_alias(n, graph) and not _is_layer_norm(n, graph)]
    named = [n for n in named if not _is_pool(n, graph)]
    activated = [n for n in named if _is_activated(n, graph)]
    if not named:
        return None
    if activated:
        between = nodes[nodes.index(activated[-1]) + 1 : nodes.index(named[-1]) + 1]
        if sum(_is_convolution(node, graph) for node in between) <= 1:
            return activated[-1]
    return named[-1]


def _shapes(
    model: nn.Module, graph: fx.GraphModule, shape: tuple[int, ...]
) -> dict[fx.Node, tuple[int, ...]]:
    found = {}

    class Shapes(FakeTensorProp):
        def call_module(self, target: str, args: tuple, kwargs: dict) -> object:
            return graph.get_submodule(target).forward(*args, **kwargs)  # no hook runs

        def run_node(self, node: fx.Node) -> object:
            result = super().run_node(node)
            if isinstance(result, Tensor):
                found[node] = tuple(result.shape)
            return result

    sample = next(model.parameters())
    image = torch.empty(shape, device=sample.device, dtype=sample.dtype)
    try:
        with torch.no_grad():
            Shapes(graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(image)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"expected {type(model).__name__} to take images of shape {shape}, but it failed "
            f"({_first_line(error)}); give the height and width it takes as `image_size`"
        ) from error
    return found


def _bottlenecks(nodes: list[fx.Node]) -> set[fx.Node]:
    # Nodes that every later value depends on alone: the only live value after them.
    position = {node: index for index, node in enumerate(nodes)}
    reach = -1  # the last use of any value made so far
    found = set()
    open_values = {}
    for index, node in enumerate(nodes):
        if node.op in ("get_attr", "output"):
            continue
        open_values = {n: last for n, last in open_values.items() if last > index}
        uses = [position[user] for user in node.users]
        reach = max(uses, default=-1)
        if not open_values and reach > index:
            found.add(node)
        if reach > index:
            open_values[node] = reach
    return found


def _module_of(node: fx.Node, graph: fx.GraphModule) -> nn.Module | None:
    return graph.get_submodule(node.target) if node.op == "call_module" else None


def _function_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return node.target
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _has_weights(node: fx.Node, graph: fx.GraphModule) -> bool:
    module = _module_of(node, graph)
    if module is not None:
        return any(True for _ in module.parameters())
    return node.op == "get_attr"


def _is_convolution(node: fx.Node, graph: fx.GraphModule) -> bool:
    module = _module_of(node, graph)
    if module is None:
        return _function_name(node) == "conv2d"
    return any(isinstance(child, nn.modules.conv._ConvNd) for child in module.modules())


def _is_pool(node: fx.Node, graph: fx.GraphModule) -> bool:
    module = _module_of(node, graph)
    return isinstance(module, _POOLS) or _function_name(node) in _POOL_NAMES


def _is_alias(node: fx.Node, graph: fx.GraphModule) -> bool:
    module = _module_of(node, graph)
    names = {"dropout", "dropout2d", "flatten", "view", "reshape", "contiguous", "getitem"}
    return isinstance(module, _ALIASES) or _function_name(node) in names


def _is_layer_norm(node: fx.Node, graph: fx.GraphModule) -> bool:
    return isinstance(_module_of(node, graph), nn.LayerNorm)


def _is_activated(node: fx.Node, graph: fx.GraphModule) -> bool:
    module = _module_of(node, graph)
    if module is not None:
        last = list(module.modules())[-1]  # timm joins normalization and activation in a layer
        return isinstance(last, _ACTIVATIONS)
    name = _function_name(node)
    if name in ("cat", "concat", "add", "iadd"):
        parts = node.args[0] if name in ("cat", "concat") else node.args
        return all(isinstance(part, fx.Node) and _is_activated(part, graph) for part in parts)
    return name in _ACTIVATION_NAMES


def _pool_after(node: fx.Node, graph: fx.GraphModule) -> fx.Node | None:
    users = [user for user in node.users if user.op != "output"]
    return users[0] if len(users) == 1 and _is_pool(users[0], graph) else None


# --------------------------------------------------------------------------------------- split


def _split(
    graph: fx.GraphModule, cuts: list[fx.Node], pools: list[fx.Node]
) -> tuple[Segment, ...]:
    nodes = list(graph.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    output = nodes[-1]
    bounds = sorted({position[node] + 1 for node in [*cuts, *pools]}) + [len(nodes)]
    starts = [0, *bounds[:-1]]
    cut_set = {*cuts, *pools}
    segments = []
    for start, stop in zip(starts, bounds, strict=True):
        body = nodes[start:stop]
        before = [n for n in nodes[:start] if n.op != "get_attr"]
        needed = {source for node in body for source in node.all_input_nodes}
        inputs = [n for n in before if n in needed]
        if start == 0:
            inputs = [nodes[0]]
        later = {source for node in nodes[stop:] for source in node.all_input_nodes}
        outputs = [n for n in body if n in later or n in cut_set]
        outputs = [n for n in outputs if n.op not in ("placeholder", "get_attr")]
        names = tuple(node.name for node in outputs)
        last = stop == len(nodes)
        module = _segment_module(graph, body, inputs, outputs, output if last else None, cut_set)
        segments.append(
            Segment(
                module=module,
                inputs=tuple(node.name for node in inputs),
                outputs=(*names, OUTPUT) if last else names,
                ends=OUTPUT if last else nodes[stop - 1].name,
                dead=tuple(node.name for node in inputs if node not in later),
            )
        )
    return tuple(segments)


def _segment_module(
    graph: fx.GraphModule,
    body: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
    final: fx.Node | None,
    cuts: set[fx.Node],
) -> fx.GraphModule:
    part = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        made[node] = part.placeholder(node.name)
    for node in inputs:
        if node in cuts and _overwritten(node, graph):  # what is kept must stay as it was
            made[node] = part.call_method("clone", (made[node],))

    def value(node: fx.Node) -> fx.Node:
        if node not in made and node.op == "get_attr":
            made[node] = part.node_copy(node, value)
        return made[node]

    for node in body:
        if node.op not in ("placeholder", "output"):
            made[node] = part.node_copy(node, value)
    results = [made[node] for node in outputs]
    if final is not None:
        results.append(fx.map_arg(final.args[0], value))
    part.output(tuple(results))
    module = fx.GraphModule(graph, part)
    _freeze(module)
    return module


def _overwritten(node: fx.Node, graph: fx.GraphModule) -> bool:
    # Does a consumer work in place on this value, directly or through an alias?
    for user in node.users:
        module = _module_of(user, graph)
        if module is not None and any(getattr(m, "inplace", False) for m in module.modules()):
            return True
        if user.kwargs.get("inplace") or user.target in (operator.iadd, operator.imul):
            return True
        name = _function_name(user)
        if name.endswith("_") and not name.endswith("__"):
            return True
        if _is_alias(user, graph) and _overwritten(user, graph):
            return True
    return False
