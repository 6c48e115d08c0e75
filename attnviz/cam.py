r"""The CAM family: attention maps from an activation and a gradient.

Symbols: :math:`A^k_{ij}` is channel :math:`k` of a stage's activation at row :math:`i`, column
:math:`j`; :math:`g^k_{ij} = \partial y^c / \partial A^k_{ij}` the gradient of one class score,
:math:`M` the attention map. Every method maps ``(b, c, h, w)`` to ``(b, h, w)`` and returns the
raw map at the stage's resolution; :func:`normalize` and :func:`scale` change its unit and
:func:`fuse` joins the stages. Nothing here runs a network: see :mod:`attnviz.explain`.
"""

import math
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, threshold

from .checks import check_choice, check_number, check_size

__all__ = [
    "METHODS",
    "cam",
    "fuse",
    "gradcam",
    "gradcam_pp",
    "gradcam_pp_released",
    "layercam",
    "layercam_normal",
    "normalize",
    "normgrad",
    "scale",
]

Scaling = Literal["none", "tanh", "sqrt", "tan"]
Rule = Literal["max", "or"]


def cam(
    activation: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    r"""Weighs each channel by its weight in the class score of a pooled network, with sign.

    .. math:: M_{ij} = \sum_k w_k A^k_{ij}, \qquad w_k = \sum_{ij} g^k_{ij}

    With global average pooling and one linear layer, :math:`w_k` is the weight of that layer
    exactly. On other heads, and in other stages than the deepest, it is an extension without
    that meaning. The map is signed.

    References:
        Learning Deep Features for Discriminative Localization (Zhou et al., 2016),
        https://arxiv.org/abs/1512.04150; thesis Eqs. 5.6, 5.7.
    """
    activation, gradient = _alike(activation, gradient)
    return _weighted_sum(gradient.sum(dim=(2, 3)), activation)


def gradcam(
    activation: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    r"""Weighs each channel by its mean gradient.

    .. math:: M = \mathrm{ReLU} \Big( \sum_k w_k A^k \Big),
        \qquad w_k = \frac{1}{hw} \sum_{ij} g^k_{ij}

    References:
        Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization
        (Selvaraju et al., 2017), https://arxiv.org/abs/1610.02391; thesis Eqs. 3.2, 3.3.
    """
    activation, gradient = _alike(activation, gradient)
    return _weighted_sum(gradient.mean(dim=(2, 3)), activation).relu()


def gradcam_pp(
    activation: Float[Tensor, "b c h w"],
    gradient: Float[Tensor, "b c h w"],
    alpha_norm: bool = False,
) -> Float[Tensor, "b h w"]:
    r"""Weighs each channel by a weighted sum of its positive gradients.

    .. math:: M = \mathrm{ReLU} \Big( \sum_k w_k A^k \Big), \qquad
        w_k = \sum_{ij} \alpha^k_{ij} \, \mathrm{ReLU}(g^k_{ij}), \qquad
        \alpha^k_{ij} = \frac{(g^k_{ij})^2}{2 (g^k_{ij})^2 + (\sum_{ab} A^k_{ab}) (g^k_{ij})^3}

    Only :math:`\alpha` at :math:`g > 0` matters, where it is
    :math:`1 / (2 + g^k_{ij} \sum_{ab} A^k_{ab})`: no small constant is needed, and activations
    that are not negative keep the denominator at 2 or above.

    Args:
        activation: The stage's activation :math:`A`, after its ReLU.
        gradient: The gradient :math:`g` of one class score per image.
        alpha_norm: Divide each channel's :math:`\alpha` by its sum over :math:`g > 0`, as the
            authors' released code does; :math:`w_k` is a weighted mean of gradients then.

    References:
        Grad-CAM++: Improved Visual Explanations for Deep Convolutional Networks
        (Chattopadhay et al., 2018), https://arxiv.org/abs/1710.11063; thesis Eqs. 3.4, 3.5.
    """
    activation, gradient = _alike(activation, gradient)
    positive = gradient.relu()
    below = (positive * activation.sum(dim=(2, 3), keepdim=True)).add_(2)
    weight = (positive / below).sum(dim=(2, 3))  # (3.4), (3.5)
    if alpha_norm:
        alphas = ((positive > 0) / below).sum(dim=(2, 3))
        weight = weight / alphas.clamp_min(torch.finfo(weight.dtype).tiny)
    return _weighted_sum(weight, activation).relu()


def gradcam_pp_released(
    activation: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    """:func:`gradcam_pp` as its authors released it, with ``alpha_norm=True``."""
    return gradcam_pp(activation, gradient, alpha_norm=True)


def layercam(
    activation: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    r"""Weighs each location of each channel by its positive gradient.

    .. math:: M_{ij} = \mathrm{ReLU} \Big( \sum_k \mathrm{ReLU}(g^k_{ij}) \, A^k_{ij} \Big)

    Unlike :func:`gradcam`, the map stays reliable in shallow stages, where the gradient varies
    within a channel.

    References:
        LayerCAM: Exploring Hierarchical Class Activation Maps for Localization
        (Jiang et al., 2021), https://ieeexplore.ieee.org/document/9462463;
        thesis Eqs. 3.6-3.8.
    """
    activation, gradient = _alike(activation, gradient)
    positive = threshold(gradient, 0.0, 0.0)  # ReLU, whose result may be overwritten
    return positive.mul_(activation).sum(dim=1).relu()


def layercam_normal(
    activation: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    r"""Weighs each location of each channel by its gradient, negative ones included.

    .. math:: M_{ij} = \mathrm{ReLU} \Big( \sum_k g^k_{ij} A^k_{ij} \Big)

    The ablation of :func:`layercam` in thesis table 3.7 (elsewhere called HiResCAM).
    """
    activation, gradient = _alike(activation, gradient)
    return (gradient * activation).sum(dim=1).relu()


def normgrad(
    activation: Float[Tensor, "b c h w"], gradient: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    r"""Multiplies the norms of activation and gradient over the channels.

    .. math:: M_{ij} = \lVert A_{ij} \rVert_2 \, \lVert g_{ij} \rVert_2

    The norm of the weight gradient of a virtual 1x1 convolution at each location. It does not
    depend on the sign of the gradient: what speaks against the class lights up as well.

    References:
        There and Back Again: Revisiting Backpropagation Saliency Methods (Rebuffi et al., 2020),
        https://arxiv.org/abs/2004.02866.
    """
    activation, gradient = _alike(activation, gradient)
    return activation.square().sum(dim=1).sqrt() * gradient.square().sum(dim=1).sqrt()


def _alike(activation: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    # Both in the more exact of their types.
    if activation.shape != gradient.shape or activation.ndim != 4:
        raise ValueError(
            "expected activation and gradient of one shape (b, c, h, w), got "
            f"{tuple(activation.shape)} and {tuple(gradient.shape)}"
        )
    dtype = torch.promote_types(activation.dtype, gradient.dtype)
    return activation.to(dtype), gradient.to(dtype)


def _weighted_sum(weight: Float[Tensor, "b c"], activation: Float[Tensor, "b c h w"]) -> Tensor:
    return torch.einsum("bc,bchw->bhw", weight, activation)  # without a product of full size


METHODS = {
    "layercam": layercam,
    "gradcam": gradcam,
    "gradcam_pp": gradcam_pp,
    "gradcam_pp_released": gradcam_pp_released,
    "layercam_normal": layercam_normal,
    "normgrad": normgrad,
    "cam": cam,
}
"""The methods that need only an activation and a gradient, by name."""


def normalize(maps: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
    r"""Divides each map by its maximum: :math:`\mathrm{ReLU}(M) / \max M`, in [0, 1].

    The result does not depend on the unit of the map, however small. A map without a positive
    value becomes zero.
    """
    positive = maps.relu()
    peak = positive.amax(dim=(-2, -1), keepdim=True)
    return positive / peak.clamp_min(torch.finfo(maps.dtype).tiny)


def scale(
    maps: Float[Tensor, "*b h w"], scaling: Scaling = "tanh", gamma: float = 2.0
) -> Float[Tensor, "*b h w"]:
    r"""Applies the scaling function of Eq. 3.9 to each normalized map.

    .. math:: \hat M = \phi(M / \max M), \qquad
        \phi(x) = x, \; \tanh(\gamma x), \; \sqrt{x}, \; \tan x

    Args:
        maps: Raw maps.
        scaling: The function: ``none``, ``tanh``, ``sqrt`` or ``tan``.
        gamma: The factor inside ``tanh``; the other functions ignore it.

    Returns:
        Maps from 0 to 1, or to :math:`\tanh \gamma` or :math:`\tan 1`.

    References:
        Thesis Eq. 3.9 and table 3.3.
    """
    gamma = check_number("gamma", gamma)
    normalized = normalize(maps)
    match scaling:
        case "none":
            return normalized
        case "tanh":
            return (gamma * normalized).tanh()
        case "sqrt":
            return normalized.sqrt()
        case "tan":
            return normalized.tan()
    raise ValueError(f"expected `scaling` in {get_args(Scaling)}, got {scaling!r}")


def fuse(
    maps: Sequence[Float[Tensor, "*b _ _"]],
    gamma: float = 2.0,
    size: tuple[int, int] | None = None,
    *,
    scaling: Scaling = "tanh",
    scaled: Literal["shallow", "all", "none"] | Collection[int] = "shallow",
    rule: Rule = "max",
) -> Float[Tensor, "*b h w"]:
    r"""Fuses the maps of several stages: scaled, resized, joined by the largest value.

    .. math:: M_{ij} = \max_k \hat M^{(k)}_{ij}, \qquad \hat M^{(k)} = \phi(M^{(k)} / \max M^{(k)})

    A map that is not scaled is still divided by its maximum, so every stage has a say. With
    ``rule="or"`` stages that agree raise one another:

    .. math:: M_{ij} = 1 - \prod_k \big( 1 - \min(1, \hat M^{(k)}_{ij}) \big)

    Args:
        maps: Raw maps, shallow stage first; sizes may differ, leading dimensions may not.
        gamma: The factor inside ``tanh``. The thesis found 2 best.
        size: Height and width of the result; the largest map's if None. Maps are resized
            bilinearly, pixel centers aligned.
        scaling: See :func:`scale`.
        scaled: Which maps are scaled: all but the last one given (``shallow``, what the thesis
            describes), ``all``, ``none``, or their positions in `maps`.
        rule: ``max``, the thesis' rule, or ``or``, the probability that one of several
            independent stages is right, whose best threshold is higher.

    Returns:
        The fused map, at least 0.

    Example:
        >>> shallow, deep = torch.rand(1, 8, 8), torch.rand(1, 4, 4)
        >>> fuse([shallow, deep], size=(16, 16)).shape
        torch.Size([1, 16, 16])

    References:
        Thesis Eq. 3.9 and section 3.4.1.2.
    """
    if isinstance(maps, Tensor):
        raise TypeError(f"expected a list of maps, got one tensor {tuple(maps.shape)}; [maps]")
    if not maps:
        raise ValueError("expected at least one map in `maps`, got none; select a stage")
    if not all(isinstance(stage, Tensor) for stage in maps):
        kinds = [type(stage).__name__ for stage in maps]
        raise TypeError(f"expected maps as tensors, got {kinds}")
    if len({tuple(stage.shape[:-2]) for stage in maps}) > 1:
        shapes = [tuple(stage.shape) for stage in maps]
        raise ValueError(f"expected maps of the same images and classes, got shapes {shapes}")
    check_choice("rule", rule, Rule)
    for stage in maps:
        if not stage.is_floating_point():
            raise TypeError(f"expected maps of floats, got {stage.dtype}; maps.float()")
        if 0 in stage.shape[-2:] or not stage.isfinite().all():
            raise ValueError(
                f"expected finite maps of at least 1 x 1, got {tuple(stage.shape)} or NaN or "
                "infinity; check the network"
            )
    if not isinstance(gamma, Real) or not 0 < gamma < math.inf:
        raise ValueError(f"expected `gamma` above 0 and finite, got {gamma!r}")
    if size is not None:
        check_size("size", size)
    else:
        size = max((tuple(stage.shape[-2:]) for stage in maps), key=lambda hw: hw[0] * hw[1])
    presets = {"shallow": range(len(maps) - 1), "all": range(len(maps)), "none": ()}
    chosen = presets.get(scaled) if isinstance(scaled, str) else scaled
    if not isinstance(chosen, Collection) or any(each not in range(len(maps)) for each in chosen):
        raise ValueError(
            f"expected `scaled` in {tuple(presets)} or a list of positions from 0 to "
            f"{len(maps) - 1}, got {scaled!r}"
        )
    fused = None
    for position, stage in enumerate(maps):
        value = scale(stage, scaling if position in chosen else "none", gamma)
        value = resize(value, size)
        value = value if rule == "max" else value.clamp(max=1)
        if fused is None:
            fused = value
        elif rule == "max":
            fused = torch.maximum(fused, value)
        else:
            fused = fused + value - fused * value
    return fused


def resize(maps: Float[Tensor, "*b h w"], size: tuple[int, int]) -> Float[Tensor, "*b H W"]:
    """Resizes maps bilinearly, pixel centers aligned."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    return interpolate(flat, size=size, mode="bilinear").reshape(*maps.shape[:-2], *size)
