r"""Excitation backprop: winning probabilities, passed from the scores down a cut network.

A neuron hands its probability of winning :math:`p_i` to its inputs :math:`x_j` in proportion to
what each contributes through positive weights:

.. math:: p'_j = x_j \sum_i \frac{w^+_{ij} \, p_i}{\sum_k w^+_{ik} \, x_k}

Every step of the network follows one of four rules. ``weighted``: a convolution or linear layer
follows the formula, without its bias. ``share``: average pooling, mean and sum follow it with
their own positive weights, so a residual sum splits in proportion to its inputs. ``move``:
maximum pooling, reshaping and concatenation hand each value back to where it was taken from.
``keep``: ReLU, dropout and batch normalization have one input for each output, which gets all.
Where a batch normalization is all that follows a weighted layer, the two are one linear map: a
negative factor swaps excitatory and inhibitory weights; the factor's size cancels.

Times the score, where inputs are not negative, the result is what layer-wise relevance
propagation with its :math:`\alpha_1 \beta_0` rule and deep Taylor decomposition with its
:math:`z^+` rule give.

Inputs are assumed not to be negative; where a network leaves negative values (linear
bottlenecks, sums before their ReLU) they count as zero. Probability is lost only where no input
is positive along a positive weight: what a bias alone excites has no winner below.

Nothing here chooses classes or makes maps: see :mod:`attnviz.explain`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from .graphs import OUTPUT, CutNetwork, Segment, trace

__all__ = ["Record", "descend", "descend_from", "record"]

_Rule = Literal["weighted", "share", "move", "keep"]
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MODULES: dict[_Rule, tuple[type[nn.Module], ...]] = {
    "share": (nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    "move": (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.ZeroPad2d),
    "keep": (
        nn.ReLU, nn.ReLU6, nn.Identity, nn.modules.dropout._DropoutNd,
        nn.modules.batchnorm._BatchNorm,
    ),
}  # fmt: skip
_IDLE = {"StochasticDepth", "DropPath"}  # torchvision's and timm's; idle in evaluation mode
_FUNCTIONS: dict[_Rule, set[str]] = {
    "share": {"add", "iadd", "add_", "sum", "mean", "avg_pool2d", "adaptive_avg_pool2d"},
    "move": {
        "max_pool2d", "boolean_dispatch", "adaptive_max_pool2d", "flatten", "view", "reshape",
        "permute", "transpose", "squeeze", "unsqueeze", "cat", "concat", "getitem",
    },
    "keep": {
        "relu", "relu_", "relu6", "dropout", "dropout_", "dropout2d", "feature_dropout",
        "contiguous", "clone", "stochastic_depth",
    },
}  # fmt: skip
_BY_A_NUMBER = {"add", "iadd", "add_", "mul", "imul", "mul_", "truediv", "div", "div_"}


@dataclass(frozen=True, eq=False)
class _Step:
    # One node of the network as it was run.
    name: str
    kind: str
    rule: _Rule | None
    layer: nn.Module | None
    sign: Tensor | float
    values: dict[fx.Node, object]
    inner: fx.GraphModule | None  # of a module that was called as a whole


@dataclass(frozen=True, eq=False)
class Record:
    """A forward pass with what the way back needs, from one stage on."""

    output: object
    """The network's output."""
    segments: tuple[Segment, ...]
    """The segments after the stage."""
    steps: dict[fx.Node, _Step]
    """What each node was given and the rule that it follows, in the order of the run."""


def record(parts: CutNetwork, images: Tensor, stage: str) -> Record:
    """Runs a network without gradients and records what follows the value `stage`."""
    values: dict[str, object] = {parts.segments[0].inputs[0]: images}
    steps: dict[fx.Node, _Step] = {}
    after: list[Segment] | None = None
    for segment in parts.segments:
        inputs = [values[name] for name in segment.inputs]
        for name in segment.dead:
            del values[name]
        if after is None:
            outputs = segment.module(*inputs)
        else:
            outputs = _Recorder(segment.module, steps).run(*inputs)
            after.append(segment)
        values.update(zip(segment.outputs, outputs, strict=True))
        if segment.ends == stage:
            after = []
    return Record(values[OUTPUT], tuple(after or ()), steps)


def descend(
    record: Record, classes: Tensor, stages: Sequence[str], *, contrastive: bool = False
) -> list[Tensor]:
    """Passes winning probabilities from one class of each image down to stages.

    Args:
        record: The forward pass, from the earliest of the stages on; its output is one row of
            scores per image.
        classes: The class ``(b,)``, -1 for none. Of a single score, 1 is the class that it
            speaks for and 0 the one that it speaks against.
        stages: The values wanted.
        contrastive: Subtract, below the last layer with weights, what the same layer with
            negated weights passes: the evidence against the class. If an average over positions
            follows that layer, the two count as one linear layer, or both would pass the same
            to each position.

    Returns:
        The probabilities at each stage, ``(b, c, h, w)``, with sign if contrastive; in float32
        at least.

    Raises:
        ValueError: A layer has no rule, or there is none with weights to negate.
    """
    start = _start(record.output, classes)
    against = classes == 0 if start.numel() == len(classes) else torch.zeros_like(classes).bool()
    last = next((n for n, s in reversed(record.steps.items()) if s.rule == "weighted"), None)
    if last is None and (contrastive or against.any()):
        raise ValueError(
            "expected a layer with weights after the stage, got none; take an earlier stage, or "
            "contrastive=False"
        )

    averaged = False
    for node, step in record.steps.items():
        averaged = node is not last and (averaged or step.rule == "share")

    def hand_down(node: fx.Node, step: _Step, p: Tensor) -> list[tuple[fx.Node, Tensor]]:
        if node is not last or not (contrastive or against.any()):
            return _hand_down(node, step, p)
        [(source, won)] = _hand_down(node, step, p, averaged=averaged)
        [(_, lost)] = _hand_down(node, step, p, averaged=averaged, negated=True)
        swap = against.reshape(-1, *[1] * (won.ndim - 1))
        won, lost = won.where(~swap, lost), lost.where(~swap, won)
        return [(source, won - lost if contrastive else won)]

    return _pass_down(record, {OUTPUT: start}, stages, hand_down)


def descend_from(record: Record, stage: str, p: Tensor, stages: Sequence[str]) -> list[Tensor]:
    """Passes winning probabilities from the neurons of a stage down to earlier stages.

    Args:
        record: The forward pass, from the earliest of the stages on.
        stage: The value whose neurons have them.
        p: The probabilities, as large as the stage's activation.
        stages: The values wanted.

    Returns:
        The probabilities at each of `stages`, ``(b, c, h, w)``.

    Raises:
        ValueError: A layer between has no rule.
    """
    return _pass_down(record, {stage: p}, stages, _hand_down)


def _start(output: Tensor, classes: Tensor) -> Tensor:
    # 1 at the class of each image.
    kind = torch.promote_types(output.dtype, torch.float32)
    start = torch.zeros_like(output, dtype=kind).reshape(len(classes), -1)
    given = (classes >= 0)[:, None].to(kind)
    place = classes.clamp(0, start.shape[1] - 1)[:, None]
    return start.scatter(1, place, given).reshape(output.shape)


_HandDown = Callable[[fx.Node, _Step, Tensor], list[tuple[fx.Node, Tensor]]]


def _pass_down(
    record: Record, start: dict[str, Tensor], stages: Sequence[str], hand_down: _HandDown
) -> list[Tensor]:
    reached = dict(start)
    for segment in reversed(record.segments):
        [results] = segment.module.graph.output_node().args
        at_end: dict[fx.Node, Tensor] = {}
        for node, name in zip(results, segment.outputs, strict=True):
            if name in reached:
                _add(at_end, node, reached[name])
        for name, p in _walk(segment.module, at_end, record.steps, hand_down).items():
            _add(reached, name, p)
    return [reached[stage] for stage in stages]


def _walk(
    module: fx.GraphModule,
    at_end: dict[fx.Node, Tensor],
    steps: dict[fx.Node, _Step],
    hand_down: _HandDown,
) -> dict[str, Tensor]:
    # From the probabilities of some nodes to those of the inputs, by name.
    reached, inputs = dict(at_end), {}
    for node in reversed(module.graph.nodes):
        p = reached.pop(node, None)
        if p is None:
            continue
        if node.op == "placeholder":
            inputs[node.target] = p
        elif steps[node].inner is not None:
            inner = steps[node].inner
            [result] = inner.graph.output_node().args
            found = _walk(inner, {result: p}, steps, hand_down)
            for source, share in zip(node.args, found.values(), strict=False):
                _add(reached, source, share)
        else:
            for source, share in hand_down(node, steps[node], p):
                _add(reached, source, share)
    return inputs


def _add(reached: dict, key: object, p: Tensor) -> None:
    reached[key] = reached[key] + p if key in reached else p


# ----------------------------------------------------------------------------------------- rules


def _hand_down(
    node: fx.Node, step: _Step, p: Tensor, *, averaged: bool = False, negated: bool = False
) -> list[tuple[fx.Node, Tensor]]:
    # What each input of a node gets of its probability; `averaged`: over all positions at once.
    if step.rule == "keep":
        return [(node.all_input_nodes[0], p)]
    sources = [source for source, value in step.values.items() if _is_float(value)]
    if step.rule is None or not sources:
        raise ValueError(
            f"expected layers that excitation backprop has a rule for, got {step.kind} "
            f"({step.name}); explain a stage behind it in `stages`, or use another method"
        )
    layer = step.layer
    if step.rule == "weighted":
        layer = _excitatory(layer, -step.sign if negated else step.sign, p.dtype)

    def run(inputs: list[Tensor]) -> Tensor:
        output = _call(node, layer, step.values | dict(zip(sources, inputs, strict=True)))
        return output.flatten(2).sum(dim=2) if averaged and output.ndim > 2 else output

    if averaged and p.ndim > 2:
        p = p.flatten(2).sum(dim=2)
    values = [step.values[source].to(p.dtype) for source in sources]
    pass_down = _move if step.rule == "move" else _share
    return list(zip(sources, pass_down(run, values, p), strict=True))


def _share(run: Callable[[list[Tensor]], Tensor], values: list[Tensor], p: Tensor) -> list[Tensor]:
    # p'_j = x_j sum_i w_ij p_i / sum_k w_ik x_k, where `run` is x -> w x with no negative w.
    positive = [value.relu() for value in values]
    with torch.enable_grad():
        inputs = [value.detach().requires_grad_() for value in positive]
        total = run([value.clone() for value in inputs])
    ratio = torch.where(total > torch.finfo(p.dtype).tiny, p / total.detach(), 0)
    gradients = torch.autograd.grad(total, inputs, ratio)
    return [value * gradient for value, gradient in zip(positive, gradients, strict=True)]


def _move(run: Callable[[list[Tensor]], Tensor], values: list[Tensor], p: Tensor) -> list[Tensor]:
    # Each output is one of the inputs: its probability goes there.
    with torch.enable_grad():
        inputs = [value.detach().requires_grad_() for value in values]
        output = run([value.clone() for value in inputs])
    return list(torch.autograd.grad(output, inputs, p))


def _excitatory(layer: nn.Module, sign: Tensor | float, dtype: torch.dtype) -> nn.Module:
    # The layer with its positive weights only and without bias; hooks do not run.
    weight = layer.weight.detach().to(dtype)
    if isinstance(sign, Tensor):
        sign = sign.to(dtype).reshape(-1, *[1] * (weight.ndim - 1))
    positive = copy.copy(layer)
    positive.__dict__["_parameters"] = {"weight": (weight * sign).relu(), "bias": None}
    return positive


def _call(node: fx.Node, layer: nn.Module | None, values: dict[fx.Node, object]) -> Tensor:
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    if layer is not None:
        return layer.forward(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _rule(node: fx.Node, layer: nn.Module | None) -> _Rule | None:
    if layer is not None:
        return _layer_rule(layer)
    sources = sum(isinstance(argument, fx.Node) for argument in node.args)
    if any(source.op == "get_attr" for source in node.all_input_nodes):
        return None
    name = _function_name(node)
    if name in _BY_A_NUMBER and sources == 1:
        return "keep"
    return next((rule for rule, names in _FUNCTIONS.items() if name in names), None)


def _layer_rule(layer: nn.Module) -> _Rule | None:
    if isinstance(layer, _WEIGHTED):
        own = any(type(layer).forward is kind.forward for kind in _WEIGHTED)
        return "weighted" if own and "weight" in layer._parameters else None
    if any(_layer_rule(child) != "keep" for child in layer.children()):
        return None  # a normalization may hold its activation
    if type(layer).__name__ in _IDLE:
        return "keep"
    return next((rule for rule, kinds in _MODULES.items() if isinstance(layer, kinds)), None)


def _function_name(node: fx.Node) -> str:
    return node.target if node.op == "call_method" else getattr(node.target, "__name__", "")


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# --------------------------------------------------------------------------------------- forward


class _Recorder(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, steps: dict[fx.Node, _Step], prefix: str = ""
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._steps = steps
        self._prefix = prefix

    def run_node(self, node: fx.Node) -> object:
        if not node.op.startswith("call"):
            return super().run_node(node)
        layer = self._layer(node)
        rule = _rule(node, layer)
        inner = _open(layer) if rule is None and layer is not None and not node.kwargs else None
        name = f"{self._prefix}{node.target if layer is not None else node.name}"
        self._steps[node] = _Step(
            name=name,
            kind=type(layer).__name__ if layer is not None else _function_name(node),
            rule=rule,
            layer=layer,
            sign=self._sign(node) if rule == "weighted" else 1.0,
            values={} if rule == "keep" else {s: self.env[s] for s in node.all_input_nodes},
            inner=inner,
        )
        if inner is not None:
            arguments, _ = self.fetch_args_kwargs_from_env(node)
            return _Recorder(inner, self._steps, f"{name}.").run(*arguments)
        if _works_in_place(node, layer):
            self.env.update(
                {s: self.env[s].clone() for s in node.all_input_nodes if _is_float(self.env[s])}
            )
        return super().run_node(node)

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def _sign(self, node: fx.Node) -> Tensor | float:
        # The sign of the batch normalization that is folded into a layer.
        users = list(node.users)
        following = self._layer(users[0]) if len(users) == 1 else None
        if isinstance(following, nn.modules.batchnorm._BatchNorm) and following.affine:
            return following.weight.detach().sign()
        return 1.0


def _works_in_place(node: fx.Node, layer: nn.Module | None) -> bool:
    if layer is not None:
        return any(getattr(module, "inplace", False) for module in layer.modules())
    name = _function_name(node)
    return (
        name in ("iadd", "imul", "itruediv")
        or name.endswith("_")
        or any(argument is True for argument in (*node.args, node.kwargs.get("inplace")))
    )


def _open(layer: nn.Module) -> fx.GraphModule | None:
    # The graph inside a module that the network calls as a whole, if it can be had.
    if type(layer).__module__.startswith("torch.nn.modules") and not list(layer.children()):
        return None
    try:
        return trace(layer, None)
    except TypeError:
        return None
