"""Traces a network with torch.fx, finds its stages and cuts it into segments.

The trace runs on a shadow of the module tree: the same parameters, buffers and layer hooks, in
evaluation mode, so nothing of the user's model is touched. Used by :mod:`attnviz.stages`.
"""

import inspect
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.proxy import TraceError
from torch.utils._pytree import tree_leaves

from .checks import shown
from .files import first_line

__all__ = ["OUTPUT", "CutNetwork", "Segment", "cut_network", "input_channels", "trace"]

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
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_UNTRACEABLE = (  # what a model's own code raises when it runs on symbols
    TraceError, TypeError, RuntimeError, ValueError, AttributeError, AssertionError, IndexError,
    KeyError,
)  # fmt: skip
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
        graph, nodes = _cut_at_names(model, _checked(model, cuts), size)
    pools = [_pool_after(node, graph) for node in nodes]
    return CutNetwork(
        stage_names=tuple(_name_of(node, graph, nodes) for node in nodes),
        stages=tuple(node.name for node in nodes),
        pools=tuple(pool and pool.name for pool in pools),
        segments=_split(model, graph, nodes, [pool for pool in pools if pool is not None]),
    )


def _cut_at_names(
    model: nn.Module, cuts: Sequence[str], size: tuple[int, int]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    graph = trace(model, size, inside=_ancestors(cuts))
    nodes = [_node_of(cut, graph) for cut in cuts]
    position = _positions(graph)
    if any(position[a] >= position[b] for a, b in pairwise(nodes)):
        raise ValueError(f"expected `cuts` in the order the network runs them, got {list(cuts)}")
    return graph, nodes


def _cut_at_stages(
    model: nn.Module, size: tuple[int, int]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    graph = trace(model, size)
    nodes = _find_stages(model, graph, size)
    hooked = _hooked_containers(model)
    if hooked:
        # a hooked container must be called as a whole, or its hooks would not run
        names = [_name_of(node, graph, nodes) for node in nodes]
        _refuse_hooks(hooked & _ancestors(names))
        graph = trace(model, size, whole=hooked)
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
    # The module tree once more, in evaluation mode, unhooked, with buffers of its own.
    if id(module) not in memo:
        # not copy.copy, which parametrized modules refuse
        memo[id(module)] = shadow = type(module).__new__(type(module))
        state = shadow.__dict__
        state.update(module.__dict__)
        state["training"] = False
        state["_compiled_call_impl"] = None
        state["_buffers"] = {
            name: None if buffer is None else buffer.clone()
            for name, buffer in module._buffers.items()
        }
        state.update({kind: {} for kind in _HOOKS})
        state["_modules"] = {
            name: child if child is None else _shadow(child, memo)
            for name, child in module._modules.items()
        }
    return memo[id(module)]


def _link(graph: fx.GraphModule, model: nn.Module) -> None:
    # Parameters and buffers become the model's own, whatever it does with them later.
    linked = []
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            holder, original = graph.get_submodule(path), _submodule(model, path)
            if original is None or not hasattr(original, name):  # a constant of the trace
                holder.__dict__[name] = getattr(holder, name)
            else:
                linked.append((holder, original))
    for holder, original in linked:  # now that no constant is among the holder's own any more
        holder.__dict__["_parameters"] = _Detached(original._parameters)
        holder.__dict__["_buffers"] = original._buffers


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


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


def trace(
    model: nn.Module,
    size: tuple[int, int] | None,
    inside: Set[str] | None = None,
    whole: Set[str] = frozenset(),
) -> fx.GraphModule:
    """Traces a network; compares the trace with it on noise of `size`, unless that is None.

    Args:
        model: The network, or a module of it.
        size: Height and width of its images.
        inside: Names of the only modules to trace into; all but the layers if None.
        whole: Names of modules not to trace into.

    Raises:
        TypeError: It can't be traced, or computes something else then.
    """
    shadow = _shadow(model, {})
    tracer = _Tracer(inside, whole)
    parameters = list(inspect.signature(shadow.forward).parameters.values())
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in _VARIADIC]
    if len(required) != 1:
        raise TypeError(
            f"expected a network of one input, got {type(model).__name__}.forward"
            f"({', '.join(required)}); wrap it in a module that takes the images alone"
        )
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    try:
        with _without_custom_functions():
            graph = tracer.trace(shadow, concrete_args=defaults)
    except _UNTRACEABLE as error:
        # the model's own code ran on symbols instead of tensors: any of these may come of it
        raise TypeError(
            "expected a convolutional network that torch.fx can trace, got "
            f"{type(model).__name__} ({first_line(error)}); name the modules that end its stages "
            "in `cuts`"
        ) from error
    for node in list(graph.nodes)[1:]:
        if node.op == "placeholder":  # an optional argument, which keeps its default
            _erase(node, graph)
    traced = fx.GraphModule(shadow, graph)
    _follow_writes(traced)
    _check_buffers(model, shadow)
    if size is not None:
        _check_equal(model, shadow, traced, size)
    for name, module in model.named_modules(remove_duplicate=False):
        if tracer.is_leaf_module(module, name):  # the layers are the model's own from here on
            twin = shadow.get_submodule(name)
            for part, original in zip(twin.modules(), module.modules(), strict=True):
                shared = {kind: original.__dict__[kind] for kind in (*_HOOKS, "_buffers")}
                part.__dict__.update(shared, _parameters=_Detached(original._parameters))
    return traced


def _check_buffers(model: nn.Module, shadow: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, shadow.get_buffer(name)):
            raise TypeError(
                f"expected a network that keeps its buffers in evaluation, got "
                f"{type(model).__name__}, whose forward changes {name!r}; name the modules that "
                "end its stages in `cuts`"
            )


@contextmanager
def _without_custom_functions() -> Iterator[None]:
    # Tracing looks into a custom autograd function and would lose its backward.
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: object, **kwargs: object) -> object:
        if any(isinstance(arg, fx.Proxy) for arg in (*args, *kwargs.values())):
            raise TraceError(f"{cls.__name__} is a custom autograd function")
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = original


def _follow_writes(graph: fx.GraphModule) -> None:
    # Who uses a value after a layer worked on it in place uses what that layer returns.
    position = _positions(graph)
    for node in list(graph.graph.nodes):
        if node.all_input_nodes and _writes(node, graph):
            for user in list(node.all_input_nodes[0].users):
                if position[user] > position[node]:
                    user.replace_input_with(node.all_input_nodes[0], node)
    graph.recompile()


def _check_equal(
    model: nn.Module, shadow: nn.Module, graph: fx.GraphModule, size: tuple[int, int]
) -> None:
    # A trace sees calls on tensors, not what Python names share: compare once, on noise.
    image = _noise(model, size)
    if image is None:
        return
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(0)
            expected = shadow(image.clone())
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise ValueError(
                f"expected {type(model).__name__} to take images of shape {tuple(image.shape)}, "
                f"but it failed ({first_line(error)}); give the height and width it takes as "
                "`image_size`"
            ) from error
        torch.manual_seed(0)
        found = graph.forward(image.clone())
    pairs = zip(tree_leaves(expected), tree_leaves(found), strict=True)
    if not all(_close(a, b) for a, b in pairs if isinstance(a, Tensor)):
        raise TypeError(
            f"expected a network that computes the same when traced, got {type(model).__name__}, "
            "which writes into a value in place that it uses under another name; name the "
            "modules that end its stages in `cuts`"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.double().allclose(b.double(), equal_nan=True)


def _noise(model: nn.Module, size: tuple[int, int]) -> Tensor | None:
    channels, weight = input_channels(model), next(model.parameters(), None)
    if channels is None or weight is None:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, channels, *size, generator=generator).to(weight.device, weight.dtype)


def _erase(node: fx.Node, graph: fx.Graph) -> None:
    for user in list(node.users):
        _erase(user, graph)
    graph.erase_node(node)


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


def _checked(model: nn.Module, cuts: object) -> list[str]:
    listed = isinstance(cuts, Iterable) and not isinstance(cuts, str)
    cuts = list(cuts) if listed else cuts
    if not listed or not cuts or not all(isinstance(cut, str) for cut in cuts):
        raise ValueError(f"expected `cuts` as a list of module names, got {shown(cuts)}")
    names = [name for name, _ in model.named_modules() if name]
    for cut in cuts:
        if cut not in names:
            near = get_close_matches(cut, names, n=3, cutoff=0.3)
            raise ValueError(
                f"expected `cuts` to name modules of {type(model).__name__}, got {cut!r}; "
                f"the nearest are {near}"
            )
    _refuse_hooks(_hooked_containers(model) & _ancestors(cuts))
    return cuts


def _ancestors(names: Sequence[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {".".join(part[:depth]) for part in parts for depth in range(len(part))}


# ---------------------------------------------------------------------------------- find stages


def _find_stages(model: nn.Module, graph: fx.GraphModule, size: tuple[int, int]) -> list[fx.Node]:
    found = _stage_nodes(model, graph, size)
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


def _refuse_tokens(
    model: nn.Module, graph: fx.GraphModule, shapes: Mapping[fx.Node, tuple[int, ...]]
) -> None:
    # Attention between places, or linear layers on rows of tokens: no stages of (b, c, h, w).
    for node in graph.graph.nodes:
        name, inputs = _function_name(node), node.all_input_nodes
        values = [n for n in inputs if n.op != "get_attr" and len(shapes.get(n, ())) > 2]
        products = name in ("matmul", "bmm", "einsum", "baddbmm") and len(values) > 1
        tokens = isinstance(_module_of(node, graph), nn.Linear) and len(shapes[inputs[0]]) == 3
        if name == "scaled_dot_product_attention" or products or tokens:
            raise TypeError(
                f"expected a convolutional network, got {type(model).__name__} with "
                f"{'layers on tokens' if tokens else 'attention between places'}; name the "
                "modules that end its stages in `cuts` if their outputs are (b, c, h, w)"
            )


def _stage_nodes(model: nn.Module, graph: fx.GraphModule, size: tuple[int, int]) -> list[fx.Node]:
    image = _noise(model, size)
    if image is None:
        return []
    shapes = _shapes(graph, image)
    _refuse_tokens(model, graph, shapes)
    nodes = list(graph.graph.nodes)
    bottlenecks = _bottlenecks(nodes)
    last_weight = max((i for i, n in enumerate(nodes) if _has_weights(n, graph)), default=0)
    groups: dict[tuple[int, int], list[int]] = {}  # (halvings, pools passed) -> positions
    pools = 0
    for index, node in enumerate(nodes[:last_weight]):
        shape = shapes.get(node)
        if node not in bottlenecks or shape is None or len(shape) != 4 or min(shape[2:]) < 2:
            continue
        if _is_pool(node, graph):
            pools += 1
        if node.op != "placeholder":
            # halvings, so that borders lost to unpadded convolutions begin no stage
            halvings = round(math.log2(size[0] * size[1] / (shape[2] * shape[3])) / 2)
            groups.setdefault((halvings, pools), []).append(index)
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


def _shapes(graph: fx.GraphModule, image: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    found = {}

    class Shapes(FakeTensorProp):
        def run_node(self, node: fx.Node) -> object:
            result = super().run_node(node)
            if isinstance(result, Tensor):
                found[node] = tuple(result.shape)
            return result

        def call_module(self, target: str, args: tuple, kwargs: dict) -> object:
            return graph.get_submodule(target).forward(*args, **kwargs)  # no hook runs

    with torch.no_grad():
        Shapes(graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(image)
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
    names |= {"permute", "transpose", "movedim", "chunk", "split"}
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
    model: nn.Module, graph: fx.GraphModule, cuts: list[fx.Node], pools: list[fx.Node]
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
        module = _segment_module(
            model, graph, body, inputs, outputs, output if last else None, cut_set
        )
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
    model: nn.Module,
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
    _link(module, model)
    return module


def _overwritten(node: fx.Node, graph: fx.GraphModule) -> bool:
    # May a consumer work in place on this value, directly, through an alias or deep inside?
    for user in node.users:
        module = _module_of(user, graph)
        inside = module is not None and any(_is_in_place(part) for part in module.modules())
        if inside or _writes(user, graph):
            return True
        if _is_alias(user, graph) and _overwritten(user, graph):
            return True
    return False


def _writes(node: fx.Node, graph: fx.GraphModule) -> bool:
    # Does it change its first input and return it?
    module = _module_of(node, graph)
    if module is not None:
        return _is_in_place(module) and not module._modules
    name = _function_name(node)
    underscored = name.endswith("_") and not name.endswith("__")
    return bool(underscored or node.kwargs.get("inplace") or node.target in _IN_PLACE)


def _is_in_place(module: nn.Module) -> bool:
    return getattr(module, "inplace", False) is True
