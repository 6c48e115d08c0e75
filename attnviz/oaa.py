r"""Online attention accumulation (OAA): maps, gate, drop layer and integral losses, as arithmetic.

Symbols: :math:`F^c` is the class map of class :math:`c` before global average pooling,
:math:`A^c` its attention map in [0, 1], :math:`M^c_t` what has been accumulated after the t-th
visit of an image. In the losses :math:`p^c_j` is the accumulated map at position :math:`j`, the
target, and :math:`q^c_j = \sigma(\hat F^c_j)` what the integral model says. Shapes: ``b`` images,
``k`` classes. Every image of a batch is treated as if it were alone.

The maps of a whole data set are kept by :class:`attnviz.memory.AttentionMemory`.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import interpolate, logsigmoid

from .checks import check_choice

__all__ = [
    "Reduction",
    "accepts",
    "accumulate_max",
    "accumulate_mean",
    "attention",
    "constraint_loss",
    "drop",
    "drop_mask",
    "enhancement_loss",
    "hybrid_loss",
    "soft_cross_entropy",
    "started",
]

Reduction = Literal["thesis", "released"]


# -------------------------------------------------------------------------------- accumulation


def attention(class_maps: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
    r"""Divides the positive part of each class map by its maximum.

    .. math:: A^c = \frac{\mathrm{ReLU}(F^c)}{\max F^c}

    A class map without a positive value gives zero.

    References:
        Thesis Eq. 4.2.
    """
    positive = class_maps.relu()
    peak = positive.amax(dim=(2, 3), keepdim=True)
    return positive / torch.where(peak > 0, peak, 1)


def accumulate_max(
    accumulated: Float[Tensor, "*b h w"], attention: Float[Tensor, "*b h w"]
) -> Float[Tensor, "*b h w"]:
    r"""Keeps the larger value at each position: :math:`M_t = \max(M_{t-1}, A_t)`.

    The order of the visits has no influence, nor has a map that comes twice.

    References:
        Thesis Eqs. 4.3, 4.4.
    """
    return torch.maximum(accumulated, attention)


def accumulate_mean(
    accumulated: Float[Tensor, "*b h w"],
    attention: Float[Tensor, "*b h w"],
    count: int | Int[Tensor, "*b"],
) -> Float[Tensor, "*b h w"]:
    r"""Adds one map to a running mean: :math:`M_t = ((t - 1) M_{t-1} + A_t) / t`.

    Args:
        accumulated: The mean :math:`M_{t-1}` of the maps so far.
        attention: The new map :math:`A_t`.
        count: How many maps the mean already holds, :math:`t - 1`. Only accepted maps count.

    References:
        Thesis Eq. 4.9.
    """
    before = torch.as_tensor(count, device=accumulated.device)[..., None, None]
    return (before * accumulated + attention) / (before + 1)


def accepts(scores: Float[Tensor, "b k"], labels: Bool[Tensor, "b k"]) -> Bool[Tensor, "b k"]:
    """Says which maps may be accumulated: labels among the image's highest scores.

    A label of an image with n labels is accepted if its score is one of the n highest of all
    classes. Of equal scores the class with the smaller number comes first. The thesis does not
    mention this rule; the released code has it.

    Args:
        scores: Class scores, or their sigmoid: only the order matters.
        labels: True for the classes of each image.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return labels & (rank < labels.sum(dim=1, keepdim=True))


def started(seen: int, images: int, passes: int | float = 1) -> bool:
    """Says whether accumulation has begun after `seen` images of a data set of `images`.

    The released code lets the network learn for one pass first; the thesis accumulates from the
    first image on (``passes=0``).
    """
    return seen >= passes * images


# ---------------------------------------------------------------------------------- drop layer


def drop_mask(
    attention: Float[Tensor, "b k h w"],
    labels: Bool[Tensor, "b k"],
    size: tuple[int, int],
    threshold: float = 0.6,
) -> Bool[Tensor, "b H W"]:
    r"""Marks where the attention of any label exceeds the threshold :math:`\delta`.

    Args:
        attention: The last accepted maps :math:`A_{t-1}`; zero where there is none yet.
        labels: True for the classes of each image; other maps are ignored.
        size: Height and width of what is to be masked: the images, or a layer's activation.
            Maps are resized bilinearly.
        threshold: The threshold :math:`\delta`.

    References:
        Thesis algorithm 1.
    """
    image, _ = labels.nonzero(as_tuple=True)
    resized = interpolate(attention[labels][:, None], size=size, mode="bilinear")[:, 0]
    marks = torch.zeros(len(labels), *size, dtype=torch.int32, device=attention.device)
    return marks.index_add(0, image, (resized > threshold).int()) > 0


def drop(
    x: Float[Tensor, "b c H W"],
    mask: Bool[Tensor, "b H W"],
    rate: float = 0.5,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c H W"]:
    r"""Sets all channels to zero inside the mask, in each image with probability :math:`\beta`.

    In normalized images zero is the mean color.

    Args:
        x: Images, or a layer's activation.
        mask: From :func:`drop_mask`.
        rate: The drop rate :math:`\beta`.
        generator: Source of the draws, one per image.

    References:
        Thesis algorithm 1.
    """
    device = x.device if generator is None else generator.device
    dropped = torch.rand(len(x), generator=generator, device=device).to(x.device) < rate
    return x.masked_fill((mask & dropped[:, None, None])[:, None], 0)


# ----------------------------------------------------------------------- integral attention model


def soft_cross_entropy(
    class_maps: Float[Tensor, "b k h w"],
    target: Float[Tensor, "b k h w"],
    reduction: Reduction = "thesis",
) -> Float[Tensor, ""]:
    r"""Cross-entropy against the accumulated maps as probabilities.

    .. math:: -\frac{1}{|N|} \sum_{j \in N}
        \big( p^c_j \log q^c_j + (1 - p^c_j) \log (1 - q^c_j) \big)

    Args:
        class_maps: The model's class maps :math:`\hat F`, before any sigmoid.
        target: The accumulated maps :math:`p` in [0, 1]; zero for absent classes.
        reduction: See :func:`hybrid_loss`.

    References:
        Thesis Eq. 4.5.
    """
    loss = -target * logsigmoid(class_maps) - (1 - target) * logsigmoid(-class_maps)
    return _reduce(loss, torch.ones_like(target, dtype=torch.bool), reduction)


def enhancement_loss(
    class_maps: Float[Tensor, "b k h w"],
    target: Float[Tensor, "b k h w"],
    threshold: float = 0.0,
    reduction: Reduction = "thesis",
) -> Float[Tensor, ""]:
    r"""Raises attention where some was accumulated, :math:`N_+`, and lowers it nowhere.

    .. math:: L^c_+ = -\frac{1}{|N^c_+|} \sum_{j \in N^c_+} p^c_j \log q^c_j

    Alone it has no bound but :math:`q = 1` on all of :math:`N_+`.

    Args:
        class_maps: The model's class maps :math:`\hat F`, before any sigmoid.
        target: The accumulated maps :math:`p` in [0, 1]; zero for absent classes.
        threshold: :math:`N_+` is where the target exceeds it.
        reduction: See :func:`hybrid_loss`.

    References:
        Thesis Eq. 4.6.
    """
    return _reduce(-target * logsigmoid(class_maps), target > threshold, reduction)


def constraint_loss(
    class_maps: Float[Tensor, "b k h w"],
    target: Float[Tensor, "b k h w"],
    threshold: float = 0.0,
    reduction: Reduction = "thesis",
) -> Float[Tensor, ""]:
    r"""Lowers attention where none was accumulated, :math:`N_-`.

    .. math:: L^c_- = -\frac{1}{|N^c_-|} \sum_{j \in N^c_-} \log (1 - q^c_j)

    Args:
        class_maps: The model's class maps :math:`\hat F`, before any sigmoid.
        target: The accumulated maps :math:`p` in [0, 1]; zero for absent classes.
        threshold: :math:`N_-` is where the target does not exceed it.
        reduction: See :func:`hybrid_loss`.

    References:
        Thesis Eq. 4.7.
    """
    return _reduce(-logsigmoid(-class_maps), target <= threshold, reduction)


def hybrid_loss(
    class_maps: Float[Tensor, "b k h w"],
    target: Float[Tensor, "b k h w"],
    threshold: float = 0.0,
    reduction: Reduction = "thesis",
) -> Float[Tensor, ""]:
    r"""Sum of :func:`enhancement_loss` and :func:`constraint_loss`.

    .. math:: L = \sum_c (L^c_+ + L^c_-)

    Args:
        class_maps: The model's class maps :math:`\hat F`, before any sigmoid.
        target: The accumulated maps :math:`p` in [0, 1]; zero for absent classes, which so
            count in :math:`N_-` only.
        threshold: What divides :math:`N_+` from :math:`N_-`.
        reduction: ``thesis`` averages over the positions of each class and adds up the classes;
            ``released`` averages once over the positions of all classes together, which gives a
            value up to k times smaller. An empty set contributes 0; images are averaged.

    References:
        Thesis Eq. 4.8.
    """
    raised = enhancement_loss(class_maps, target, threshold, reduction)
    return raised + constraint_loss(class_maps, target, threshold, reduction)


def _reduce(
    loss: Float[Tensor, "b k h w"], inside: Bool[Tensor, "b k h w"], reduction: Reduction
) -> Float[Tensor, ""]:
    check_choice("reduction", reduction, Reduction)
    together = (2, 3) if reduction == "thesis" else (1, 2, 3)
    mean = (loss * inside).sum(dim=together) / inside.sum(dim=together).clamp_min(1)
    return mean.sum() / len(loss)
