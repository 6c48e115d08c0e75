"""Cuts any traceable CNN into explicit stages and a head.

Stage k is the post-activation output of the last convolution at one resolution, before the
pooling or the stride that ends it; stage 1 is the shallowest. The network is traced with
torch.fx and run piece by piece, so nothing is hooked: the model stays as it was, several
threads may use one :class:`Staged`, and an in-place layer can't spoil what is kept.
"""

import copy
import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.proxy import TraceError

from .images import network_size, to_pixels

__all__ = ["Pieces", "Staged", "staged"]

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
class Pieces:
    """What one forward pass leaves: stage activations, pooled activations and the output."""

    activations: tuple[Tensor, ...]
    """The activation of each stage asked for, ``(b, c, h, w)``, shallow first."""
    pooled: tuple[Tensor | None, ...]
    """The output of the pooling layer that follows each stage, or None where there is none."""
    output: object
    """The model's own output."""


class Staged:
    """A convolutional network cut into explicit stages and a head.

    Calling it gives the output of ``model.eval()``, bit for bit. The parameters are the
    model's own and follow its updates and moves; its training mode, gradients, hooks and
    ``requires_grad`` are neither used nor changed. Made by :func:`staged`.
    """

    model: nn.Module
    """The user's model, as it was given."""
    name: str
    """The network's name."""
    stage_names: tuple[str, ...]
    """Name of the module (or graph node) that ends each stage, shallow first."""
    mean: tuple[float, ...]
    """Mean of each color channel, for pixels in [0, 1], that the network expects taken off."""
    std: tuple[float, ...]
    """Standard deviation of each color channel that the network expects divided by."""
    image_size: int | tuple[int, int]
    """Short side of the images it expects, or their exact height and width."""
    class_names: tuple[str, ...] | None
    """Name of each class, if known."""
    provenance: dict[str, str]
    """Where the weights come from."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule, cuts: Sequence[fx.Node]) -> None:
        self.model = model
        names = tuple(_name_of(node, graph, cuts) for node in cuts)
        self.stage_names = names
        self._stages = tuple(node.name for node in cuts)
        pools = [_pool_after(node, graph) for node in cuts]
        self._pools = tuple(pool.name if pool is not None else None for pool in pools)
        self._segments = _split(graph, list(cuts), [pool for pool in pools if pool is not None])
        self._in_channels = _in_channels(model)

    def __call__(self, images: Tensor) -> object:
        """Returns the model's output for images ``(b, c, h, w)``, without a gradient."""
        with torch.no_grad():
            return self._run(images, {}).output

    def activations(self, images: Tensor) -> tuple[tuple[Tensor, ...], object]:
        """Returns the activation of every stage, shallow first, and the model's output.

        The gradient flows from the output to `images` where they require it.
        """
        pieces = self._run(images, dict.fromkeys(self._stages))
        return pieces.activations, pieces.output

    def differentiable(self, images: Tensor, stages: Sequence[int] | None = None) -> Pieces:
        """Runs the network so that its output can be differentiated by the stages' activations.

        The graph begins at the earliest stage asked for: what lies before it is not recorded.
        Works inside ``no_grad`` and ``inference_mode`` and with frozen parameters.

        Args:
            images: Images ``(b, c, h, w)``, normalized as the network expects.
            stages: Numbers of the stages, 1 = shallowest; all if None.

        Returns:
            The pieces of the forward pass.
        """
        numbers = self.check_stages(stages)
        names = [self._stages[number - 1] for number in numbers]
        with torch.inference_mode(False), torch.enable_grad():
            if images.is_inference():
                images = images.clone()
            return self._run(images.detach(), dict.fromkeys(names), leaf=names[0])

    def preprocess(self, image: Image.Image | np.ndarray | str | Path) -> Tensor:
        """Returns a picture as the network expects it, ``(1, 3, h, w)``, on its device.

        The whole picture is kept and only resized, so that a place in a map is the same
        place in the picture.

        Args:
            image: A Pillow image, an array of pixels or a file; see
                :func:`attnviz.images.to_pixels`.
        """
        pixels = to_pixels(image)
        height, width = network_size(pixels.shape[:2], self.image_size)
        resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(part)[:, None, None] for part in (self.mean, self.std))
        return ((values - mean) / std).to(self.device, self.dtype)

    def class_id(self, name: str | int) -> int:
        """Returns the number of a class given by its number or name.

        Raises:
            ValueError: No class, or more than one, has this name; the nearest are listed.
        """
        names = self.class_names
        if isinstance(name, int) or name.isdecimal():
            number = int(name)
            if names is not None and not 0 <= number < len(names):
                raise ValueError(f"expected a class from 0 to {len(names) - 1}, got {number}")
            return number
        if names is None:
            raise ValueError(
                f"expected the number of a class, got {name!r}; {self.name} has no class names"
            )
        lowered = [each.lower() for each in names]
        found = [number for number, each in enumerate(lowered) if each == name.lower()]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"expected one class, got {name!r}, the name of {found}; use a number"
            )
        near = get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)
        near += [each for each in lowered if name.lower() in each and each not in near][:3]
        shown = ", ".join(f"{names[lowered.index(each)]} ({lowered.index(each)})" for each in near)
        raise ValueError(
            f"expected a class of {self.name}, got {name!r}; the nearest are {shown or 'none'}"
        )

    def check_stages(self, stages: Sequence[int] | None) -> tuple[int, ...]:
        """Returns the stage numbers in ascending order; all of them for None.

        Raises:
            ValueError: A number is not that of a stage, or none is given.
        """
        count = len(self._stages)
        if stages is None:
            return tuple(range(1, count + 1))
        numbers = tuple(sorted({int(stage) for stage in stages}))
        if not numbers or numbers[0] < 1 or numbers[-1] > count:
            raise ValueError(
                f"expected `stages` from 1 to {count} ({self.name} has {count}), "
                f"got {list(stages)}; 1 is the shallowest"
            )
        return numbers

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the model's parameters."""
        found = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(found, torch.get_default_dtype())

    def to(self, *args: object, **kwargs: object) -> "Staged":
        """Moves or casts the underlying model and returns this object."""
        self.model.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        return f"Staged({self.name}: {' | '.join(self.stage_names)} | head)"

    def _run(self, images: Tensor, keep: Mapping[str, None], leaf: str | None = None) -> Pieces:
        self._check_images(images)
        values: dict[str, object] = {self._segments[0].inputs[0]: images}
        kept: dict[str, Tensor] = {}
        recording = leaf is None
        for segment in self._segments:
            inputs = [values[name] for name in segment.inputs]
            for name in segment.dead:
                del values[name]
            with torch.set_grad_enabled(recording and torch.is_grad_enabled()):
                outputs = segment.module(*inputs)
            del inputs
            values.update(zip(segment.outputs, outputs, strict=True))
            if segment.ends in keep:
                if segment.ends == leaf:
                    values[leaf] = values[leaf].detach().requires_grad_()
                    recording = True
                kept[segment.ends] = values[segment.ends]
            elif segment.ends in self._pools:
                kept[segment.ends] = values[segment.ends]
        order = [(s, p) for s, p in zip(self._stages, self._pools, strict=True) if s in keep]
        return Pieces(
            activations=tuple(kept[stage] for stage, _ in order),
            pooled=tuple(kept.get(pool) for _, pool in order),
            output=values[_OUTPUT],
        )

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(
                f"expected images as a tensor (b, c, h, w), got {type(images).__name__}; "
                "net.preprocess(image) makes one"
            )
        if images.ndim != 4 or images.shape[0] == 0:
            raise ValueError(
                f"expected images of shape (b, c, h, w), got {tuple(images.shape)}; "
                "add the batch dimension with images[None]"
            )
        if self._in_channels is not None and images.shape[1] != self._in_channels:
            raise ValueError(
                f"expected images with {self._in_channels} channels, got {images.shape[1]} "
                f"(shape {tuple(images.shape)}); {self.name} takes (b, {self._in_channels}, h, w)"
            )


def staged(
    model: nn.Module,
    cuts: Sequence[str] | None = None,
    *,
    name: str | None = None,
    image_size: int | tuple[int, int] = 224,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    class_names: Sequence[str] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Staged:
    """Cuts a convolutional network into stages.

    Without `cuts` the stages are found: at each resolution, the last activation through which
    everything after it passes (before the pooling or stride that ends the stage; where a block
    ends without an activation function, as in ConvNeXt, its output). VGG and ResNet have five,
    SqueezeNet four, AlexNet three.

    Args:
        model: A CNN from torchvision, timm or your own. Compiled and data-parallel wrappers are
            taken off. It is never changed.
        cuts: Names of the modules whose outputs are the stages, shallow first, e.g.
            ``["layer1", "layer3"]``. Modules that contain no cut are not traced, so they may
            hold any code.
        name: The network's name; its class if None.
        image_size: Short side of the images it expects, or their exact height and width. Used
            to find the stages and by :meth:`Staged.preprocess`.
        mean: Mean of each color channel that it expects; ImageNet's by default.
        std: Standard deviation of each color channel that it expects.
        class_names: Name of each class.
        provenance: Where its weights come from.

    Returns:
        The staged network.

    Raises:
        TypeError: The model is not a network that can be cut.
        ValueError: A cut does not exist.

    Example:
        >>> from torchvision.models import resnet18
        >>> net = staged(resnet18())
        >>> net.stage_names
        ('relu', 'layer1', 'layer2', 'layer3', 'layer4')
    """
    model = _unwrap(model)
    net = _cut(model, cuts, image_size)
    net.name = name or type(model).__name__
    net.image_size, net.mean, net.std = image_size, tuple(mean), tuple(std)
    net.class_names = tuple(class_names) if class_names is not None else None
    net.provenance = dict(provenance or {"weights": "the model's own"})
    return net


def _cut(
    model: nn.Module, cuts: Sequence[str] | None, image_size: int | tuple[int, int]
) -> Staged:
    if cuts is not None:
        _check_cuts(model, cuts)
        graph = _trace(model, inside=_ancestors(cuts))
        nodes = [_node_of(cut, graph) for cut in cuts]
        order = [node.name for node in graph.graph.nodes]
        positions = [order.index(node.name) for node in nodes]
        if positions != sorted(set(positions)):
            raise ValueError(
                f"expected `cuts` in the order the network runs them, got {list(cuts)}"
            )
        return Staged(model, graph, nodes)
    graph = _trace(model)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    nodes = _find_stages(model, graph, size)
    hooked = _hooked_containers(model)
    if hooked:
        # a hooked container must be called as a whole, or its hooks would not run
        names = [_name_of(node, graph, nodes) for node in nodes]
        inside = _ancestors(names)
        _refuse_hooks(hooked & inside)
        graph = _trace(model, whole=hooked)
        nodes = [_node_of(name, graph) for name in names]
    return Staged(model, graph, nodes)


# ---------------------------------------------------------------------------------------- model


def _unwrap(model: nn.Module) -> nn.Module:
    if isinstance(model, Staged):
        raise TypeError("expected a torch.nn.Module, got Staged; it is cut already")
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("expected a torch.nn.Module, got a ScriptModule; pass the original model")
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    if any(tensor.is_inference() for tensor in model.parameters()):
        raise TypeError(
            "expected parameters that autograd can use, got ones made under inference_mode; "
            "build or load the model outside of it"
        )
    return model


def _in_channels(model: nn.Module) -> int | None:
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
        memo[id(module)] = shadow = copy.copy(module)
        state = shadow.__dict__
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
    return max(inside, key=_position(graph).get) if inside else None


def _position(graph: fx.GraphModule) -> dict[fx.Node, int]:
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
    channels = _in_channels(model)
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

_OUTPUT = "output"


@dataclass(frozen=True)
class _Segment:
    # A run of graph nodes as a module: takes the values `inputs`, gives the values `outputs`.
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ends: str  # the cut that ends it
    dead: tuple[str, ...]  # inputs that no later segment needs


def _split(
    graph: fx.GraphModule, cuts: list[fx.Node], pools: list[fx.Node]
) -> tuple[_Segment, ...]:
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
            _Segment(
                module=module,
                inputs=tuple(node.name for node in inputs),
                outputs=(*names, _OUTPUT) if last else names,
                ends=_OUTPUT if last else nodes[stop - 1].name,
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
