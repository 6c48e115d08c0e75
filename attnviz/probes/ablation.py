r"""The ground truth of a decomposition: what a decision loses when one channel is replaced.

.. math:: \hat \alpha_k = d - d \,(F^k \text{ replaced})

A neuron is computed anew only in the windows that lead to it; up to the first convolution
each copy of the network differs from the original in one channel, so only that one is run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional

from ..checks import check_choice
from ..crops import (
    Forward,
    Neuron,
    _Boxes,
    _call,
    _clipped,
    _counts,
    _Geometry,
    _Path,
    _path,
    _pool,
    _replay,
    _scores_of,
    _seen,
    _Step,
    run,
)
from ..stages import Staged

__all__ = ["AblationFill", "ablate"]

AblationFill = Literal["zero", "spatial_mean", "dataset_mean"]


def ablate(
    net: Staged,
    image: Float[Tensor, "1 c h w"] | Forward,
    decision: int | Neuron,
    stage: int | None = None,
    fill: AblationFill = "zero",
    *,
    means: Float[Tensor, " k"] | None = None,
    crops: bool = True,
    batch_size: int = 64,
) -> Float[Tensor, " k"]:
    """Measures what a decision loses when each channel of a stage is replaced, one at a time.

    Args:
        net: The network.
        image: A normalized image, or its forward pass from :func:`attnviz.crops.run`.
        decision: A class or an open neuron.
        stage: The stage whose channels are replaced; the one below the decision if None.
        fill: With what, everywhere in the channel. ``zero``; ``spatial_mean``: its mean over this
            image; ``dataset_mean``: its mean over a data set, from `means`. The thesis says
            "average activation", which may be either mean.
        means: The mean of each channel, for ``dataset_mean``.
        crops: Run in windows where the layers allow it; else from the stage on in whole maps, as
            for a class.
        batch_size: Copies of the network that run at once.

    Returns:
        The loss of each channel, in the unit of the decision. Contributions of Eq. 5.4 have the
        unit of a mean: times the positions of the stage they compare with this.

    Raises:
        ValueError: An argument is out of range, or the neuron is not open.

    References:
        Thesis section 5.3.1.1.
    """
    check_choice("fill", fill, AblationFill)
    if batch_size < 1:
        raise ValueError(f"expected `batch_size` of at least 1, got {batch_size}")
    forward = image if isinstance(image, Forward) else run(net, image)
    if isinstance(decision, Neuron):
        top = forward.check(decision).stage
    else:
        forward.score(decision)
        top = len(forward.activations) + 1
    stage = top - 1 if stage is None else stage
    if not 1 <= stage < top:
        raise ValueError(f"expected `stage` from 1 to {top - 1}, got {stage}")
    with torch.inference_mode(False), torch.no_grad():
        values = forward.activations[stage - 1]
        fills = _fills(values, fill, means)
        local = crops and isinstance(decision, Neuron)
        path = _path(forward, top, stage) if local else None
        if path is None or any(set(s.sources) - set(path.index) for s in path.steps):
            losses = _in_whole_maps(forward, decision, stage, fills, batch_size)
        else:
            losses = _in_windows(forward, path, decision, values, fills, batch_size)
        found = values.new_zeros(len(values))
        for channels, loss in losses:
            found[channels] = loss
    return found


def _fills(values: Tensor, fill: AblationFill, means: Tensor | None) -> Tensor:
    if fill == "zero":
        return values.new_zeros(len(values))
    if fill == "spatial_mean":
        return values.mean(dim=(1, 2))
    if means is None or means.shape != (len(values),):
        got = "none" if means is None else tuple(means.shape)
        raise ValueError(
            f"expected `means` of {len(values)} channels for the fill 'dataset_mean', got {got}"
        )
    return means.to(values)


_Losses = Iterator[tuple[Tensor, Tensor]]


def _in_whole_maps(
    forward: Forward, decision: int | Neuron, stage: int, fills: Tensor, batch_size: int
) -> _Losses:
    values = forward.activations[stage - 1]
    if isinstance(decision, Neuron):
        until = forward._program.stages[decision.stage]
        before = forward.activations[decision.stage - 1][decision[1:]]
    else:
        until, before = None, forward.score(decision)
    changed = (values != fills[:, None, None]).flatten(1).any(dim=1).nonzero()[:, 0]
    for channels in changed.split(batch_size):
        copies = values.expand(len(channels), -1, -1, -1).clone()
        copies[torch.arange(len(channels)), channels] = fills[channels, None, None]
        env = _replay(forward, stage, copies, until)
        if until is None:
            after = _scores_of(forward, env, decision)
        else:
            after = env[until][:, *decision[1:]]
        yield channels, before - after


# --------------------------------------------------------------------------------------- windows


def _in_windows(
    forward: Forward,
    path: _Path,
    decision: Neuron,
    values: Tensor,
    fills: Tensor,
    batch_size: int,
) -> _Losses:
    _, clipped = _clipped(forward, path, np.array([decision[2:]]))
    ahead = _Ahead(forward, path, _Boxes(path.index, clipped, np.arange(1)))
    (top, left), (bottom, right) = ahead.boxes[path.end][0].tolist()
    window = values[:, top:bottom, left:right]
    original = ahead.original(window[None])
    before = original[path.start][0, decision.channel]
    changed = (window != fills[:, None, None]).flatten(1).any(dim=1).nonzero()[:, 0]
    for channels in changed.split(batch_size):
        lone = fills[channels, None, None, None].expand(-1, 1, *window.shape[1:])
        after = ahead.copies(original, lone, channels)[:, decision.channel]
        yield channels, (before - after).flatten()


@dataclass(frozen=True, eq=False)
class _Ahead:
    # From the window of a stage to one neuron, each layer only as far as it matters.
    forward: Forward
    path: _Path
    boxes: _Boxes

    def original(self, window: Tensor) -> dict[fx.Node, Tensor]:
        # The value (1, c, h, w) of each step in its window.
        env = {self.path.end: window}
        for step, geometry in self._steps():
            env[step.node] = self._apply(step, geometry, env)
        return env

    def copies(self, original: dict[fx.Node, Tensor], lone: Tensor, channels: Tensor) -> Tensor:
        # The neuron's place (k, c, 1, 1) in copies that differ from the original in one channel
        # each, whose values are `lone` (k, 1, h, w). A value is lone for as long as it can be.
        alone, env = {self.path.end: lone}, {}

        def whole(node: fx.Node) -> Tensor:
            if node not in env:
                env[node] = original[node].expand(len(channels), -1, -1, -1).clone()
                env[node][torch.arange(len(channels)), channels] = alone[node][:, 0]
            return env[node]

        for step, geometry in self._steps():
            rule, source = self.forward._rules[step.node], step.sources[0]
            if source in alone and rule in ("scale", "relu", "max", "mean", "same"):
                alone[step.node] = self._apply(step, geometry, alone, channels)
            elif source in alone and rule == "conv" and step.layer.groups == 1:
                change = alone[source] - original[source][0, channels, None]
                change = self._convolve_one(step, geometry, change, channels)
                env[step.node] = original[step.node] + change
            else:
                inputs = {node: whole(node) for node in step.sources}
                env[step.node] = self._apply(step, geometry, inputs)
        return whole(self.path.start)

    def _steps(self) -> Iterator[tuple[_Step, _Geometry | None]]:
        return zip(reversed(self.path.steps), reversed(self.path.geometries), strict=True)

    def _take(
        self, step: _Step, geometry: _Geometry | None, source: fx.Node, value: Tensor
    ) -> Tensor:
        # What a step looks at: a part of the window, and padding beyond the border.
        seen = _seen(self.boxes[step.node][0], geometry)
        (top, left), (bottom, right) = (seen - self.boxes[source][0, 0]).tolist()
        height, width = value.shape[2:]
        part = value[:, :, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        around = [max(0, each) for each in (-left, right - width, -top, bottom - height)]
        fill = -torch.inf if self.forward._rules[step.node] == "max" else 0
        return functional.pad(part, around, value=fill) if any(around) else part

    def _convolve_one(
        self, step: _Step, geometry: _Geometry, change: Tensor, channels: Tensor
    ) -> Tensor:
        # What a change (k, 1, h, w) of one channel in each copy does to a convolution.
        layer, sides = step.layer, self.boxes.sides(step.node)
        columns = functional.unfold(
            self._take(step, geometry, step.sources[0], change),
            layer.kernel_size,
            dilation=layer.dilation,
            stride=layer.stride,
        )
        weight = layer.weight.detach()[:, channels].flatten(2).transpose(0, 1)
        return (weight @ columns).unflatten(2, sides)

    def _apply(
        self,
        step: _Step,
        geometry: _Geometry | None,
        env: dict[fx.Node, Tensor],
        channels: Tensor | None = None,
    ) -> Tensor:
        # A step on whole values, or on one channel of each copy.
        inputs = {node: self._take(step, geometry, node, env[node]) for node in step.sources}
        value, layer = inputs[step.sources[0]], step.layer
        match self.forward._rules[step.node]:
            case "conv":
                weight, bias = layer.weight.detach(), layer.bias
                bias = None if bias is None else bias.detach()
                return functional.conv2d(
                    value, weight, bias, layer.stride, 0, layer.dilation, layer.groups
                )
            case "scale":
                chosen = slice(None) if channels is None else channels
                parts = layer.running_mean, layer.running_var, layer.weight, layer.bias
                parts = [None if each is None else each.detach()[chosen] for each in parts]
                if channels is None:
                    return functional.batch_norm(value, *parts, eps=layer.eps)
                lone = functional.batch_norm(value.transpose(0, 1), *parts, eps=layer.eps)
                return lone.transpose(0, 1)
            case "relu":
                six = isinstance(layer, nn.ReLU6) or step.name == "relu6"
                return value.clamp(0, 6) if six else value.relu()
            case "max":
                pool = _pool(step)
                return functional.max_pool2d(
                    value, pool.kernel_size, pool.stride, 0, pool.dilation
                )
            case "mean":
                pool = _pool(step)
                total = functional.avg_pool2d(
                    value, pool.kernel_size, pool.stride,
                    divisor_override=1,
                )  # fmt: skip
                count = _counts(pool, geometry, self.boxes[step.node], self._size(step))
                return total / count.to(total)[..., 0]
            case "same":
                return value
            case "add":
                return sum(inputs.get(arg, arg) for arg in step.args)
            case "cat":
                return torch.cat([inputs[node] for node in step.sources], dim=1)
            case _:
                return _call(step, {step.sources[0]: value.clone()})  # it may work in place

    def _size(self, step: _Step) -> tuple[int, ...]:
        return self.forward._shapes[step.sources[0]][2:]
