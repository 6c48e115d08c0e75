r"""Decomposition of networks with other parts than convolution, ReLU and pooling.

Where every layer is linear in pieces and has no bias, the attention maps :math:`G \cdot F` of a
stage sum to the decision. Squeeze-and-excitation, attention, GELU and layer normalization break
this: their outputs are products of values that all depend on the stage, and the gradient counts
each factor. Within :class:`ConstantGates` such a layer is :math:`y = g(x) \, x` with the gate
:math:`g(x)` taken for a constant, so that the maps sum to the decision again.
"""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..gap import attention, explained_fraction
from ..stages import Staged
from .occlusion import _check_scores, _class_ids

__all__ = ["ConstantGates", "completeness"]


class ConstantGates(TorchFunctionMode):
    r"""Within it, no gradient flows through gates; values stay the same, but for rounding.

    * GELU, SiLU, Mish, Hardswish, ReLU6: :math:`y = (y / x) \, x`, with the quotient constant.
    * Sigmoid, Hardsigmoid and softmax, which weigh other values, and the weights of attention:
      constant.
    * Layer, group and instance normalization: the standard deviation is constant.

    Anything that differentiates a network may run within it: :func:`attnviz.stage_maps`,
    :func:`attnviz.probes.importance.channel_importance`. It holds for the thread that enters it
    and for operations that write no input (``x.sigmoid_()`` does). A network whose own
    activation function is a sigmoid passes nothing on.

    References:
        Explaining Recurrent Neural Network Predictions in Sentiment Analysis (Arras et al.,
        2017), https://arxiv.org/abs/1706.07206; XAI for Transformers (Ali et al., 2022),
        https://arxiv.org/abs/2202.07304.
    """

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Replaces the call of a layer with a gate."""
        kwargs = kwargs or {}
        if func in _GATES:
            return func(*args, **kwargs).detach()
        if func is functional.scaled_dot_product_attention:
            fixed = [each.detach() for each in args[:2]]
            kwargs = {
                name: each.detach() if name in ("query", "key") else each
                for name, each in kwargs.items()
            }
            return func(*fixed, *args[2:], **kwargs)
        if func in _NORMS:
            return _NORMS[func](*args, **kwargs)
        if func in _GATED:
            x = args[0]
            if kwargs.get("inplace"):
                kwargs = kwargs | {"inplace": False}
            y = func(x.detach(), *args[1:], **kwargs)
            return x * torch.where(x == 0, 0, y / x).detach()
        return func(*args, **kwargs)


_GATED = {
    functional.gelu, functional.silu, functional.mish, functional.hardswish, functional.relu6,
    functional.hardtanh,
}  # fmt: skip
_GATES = {
    torch.sigmoid, Tensor.sigmoid, functional.sigmoid, functional.hardsigmoid,
    functional.softmax, torch.softmax, Tensor.softmax,
}  # fmt: skip


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    y = _standardized(x, dims, eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    y = _standardized(x.unflatten(1, (num_groups, -1)).flatten(2), (2,), eps).view_as(x)
    shape = (-1, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return functional.instance_norm(
            x, running_mean, running_var, weight, bias, False, momentum, eps
        )
    return _group_norm(x, x.shape[1], weight, bias, eps)


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    deviation = (x.var(dims, correction=0, keepdim=True) + eps).sqrt()
    return (x - x.mean(dims, keepdim=True)) / deviation.detach()


_NORMS = {
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    functional.instance_norm: _instance_norm,
}


def completeness(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None = None,
    *,
    stages: Sequence[int] | None = None,
) -> pd.DataFrame:
    r"""Measures how much of a class score the maps of each stage sum to, :math:`\sum A / d`.

    1 is all of it. What is missing with constant gates is due to biases, those of batch
    normalization included, or to layers that :class:`ConstantGates` does not know.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image; the highest score's if None.
        stages: Numbers of the stages, 1 = shallowest; all if None.

    Returns:
        One row for each image and stage: ``image``, ``stage``, ``score``, and the explained
        fractions ``gradient``, by the plain gradient, and ``gates``, with constant gates.
    """
    numbers = net.check_stages(stages)
    scores, ids, plain = _fractions(net, images, class_ids, numbers)
    with ConstantGates():
        _, _, gated = _fractions(net, images, ids, numbers)
    rows = [
        [image, stage, score, float(plain[i][image]), float(gated[i][image])]
        for image, score in enumerate(scores.tolist())
        for i, stage in enumerate(numbers)
    ]
    return pd.DataFrame(rows, columns=["image", "stage", "score", "gradient", "gates"])


def _fractions(
    net: Staged, images: Tensor, class_ids: object, numbers: Sequence[int]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    with torch.inference_mode(False), torch.enable_grad():
        pieces = net.differentiable(images, numbers)
        scores = _check_scores(pieces.output, len(images))
        ids = _class_ids(scores.detach(), class_ids)
        picked = scores.gather(1, ids[:, None])[:, 0]
        gradients = torch.autograd.grad(picked.sum(), pieces.activations)
    picked = picked.detach()
    pairs = zip(pieces.activations, gradients, strict=True)
    return picked, ids, [explained_fraction(attention(a.detach(), g), picked) for a, g in pairs]
