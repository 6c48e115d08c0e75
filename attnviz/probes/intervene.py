"""Runs a network with stages changed on the way, or from the activation of a stage on.

Nothing is hooked: the segments of :class:`attnviz.stages.Staged` run one after another, and what
a stage gives is replaced before the next one takes it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..graphs import OUTPUT
from ..stages import Staged

__all__ = ["StageModel", "intervene", "keep_channels"]

Change = Callable[[int, Tensor], Tensor]


def intervene(
    net: Staged,
    value: Tensor,
    change: Change | None = None,
    *,
    after: int = 0,
) -> object:
    """Runs the network and replaces each stage's activation by a change of it.

    The gradient flows where `value` requires it.

    Args:
        net: The network.
        value: The images, or the activation ``(b, c, h, w)`` of the stage `after`.
        change: From the number of a stage, 1 = shallowest, and its activation to what the next
            layers take instead. It is called for the stages later than `after`.
        after: The stage whose activation `value` is; 0 for images.

    Returns:
        The model's output.

    Raises:
        ValueError: Layers after the stage need more than its activation.
    """
    parts = net._parts
    numbers = {name: number for number, name in enumerate(parts.stages, start=1)}
    segments = parts.segments
    if after == 0:
        net._check_images(value)
        values = {segments[0].inputs[0]: value}
    else:
        name = parts.stages[after - 1]
        position = next(i for i, segment in enumerate(segments) if segment.ends == name)
        segments, values = segments[position + 1 :], {name: value}
    for segment in segments:
        lacking = [name for name in segment.inputs if name not in values]
        if lacking:
            raise ValueError(
                f"expected everything after stage {after} to pass through it, but {net.name} "
                f"needs {lacking} as well; name other `cuts`"
            )
        inputs = [values[name] for name in segment.inputs]
        for name in segment.dead:
            del values[name]
        del value
        outputs = segment.module.forward(*inputs)
        values.update(zip(segment.outputs, outputs, strict=True))
        value = values[segment.ends]
        if change is not None and segment.ends in numbers:
            values[segment.ends] = change(numbers[segment.ends], value)
    return values[OUTPUT]


def keep_channels(kept: dict[int, Bool[Tensor, "b c"]]) -> Change:
    """Makes the change that sets every other channel of the stages named to zero."""

    def change(stage: int, activation: Tensor) -> Tensor:
        if stage not in kept:
            return activation
        return activation * kept[stage][:, :, None, None].to(activation)

    return change


class StageModel(nn.Module):
    """A network as a module in which one stage is a module too, for tools that hook modules.

    The hooks are put on `stage`, an identity of this object, not on the user's model.

    Args:
        net: The network.
        stage: The number of the stage.
    """

    def __init__(self, net: Staged, stage: int) -> None:
        super().__init__()
        self.stage = nn.Identity()
        self._net, self._number = net, stage

    def forward(self, images: Tensor) -> object:
        """Returns the network's output."""
        with torch.enable_grad():
            return intervene(
                self._net, images, lambda k, a: self.stage(a) if k == self._number else a
            )
