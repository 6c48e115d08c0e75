r"""How important each channel of a stage is for a class, and what removing it does.

Symbols: :math:`y` is a class score, :math:`F` a stage's activation, :math:`x` an image,
:math:`\alpha` a contribution and :math:`R` a propagated importance.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import check_choice
from ..gap import attention
from ..stages import Staged
from .intervene import StageModel, intervene
from .occlusion import _check_scores, _chosen, _class_ids

if TYPE_CHECKING:
    from ..tree import Evidence

__all__ = ["Importance", "channel_importance", "propagated_importance", "removal_curve"]

Importance = Literal["lrp", "conductance", "internal_influence"]


def channel_importance(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None = None,
    method: Importance = "lrp",
    *,
    stage: int,
    steps: int = 50,
    batch_size: int = 32,
) -> Float[Tensor, "b k"]:
    r"""Sums the importance of each channel of a stage for a class over its positions.

    * ``lrp``: :math:`\sum \frac{\partial y}{\partial F} F`. In a network of ReLUs this is what
      layer-wise relevance propagation by the epsilon rule gives each unit (epsilon to 0), and
      the contribution of a decomposition straight from the class, but for its mean.
    * ``conductance``: :math:`\sum \int_0^1 \frac{\partial y}{\partial F}
      \frac{\partial F}{\partial t} dt` on the straight way from the mean color to the image. All
      units of a stage sum to :math:`y(x) - y(0)` as `steps` grow. By captum.
    * ``internal_influence``: :math:`\sum \int_0^1 \frac{\partial y}{\partial F} dt` on that
      way. By captum.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image; the highest score's if None.
        method: The method.
        stage: Number of the stage, 1 = shallowest.
        steps: Nodes of the integrals.
        batch_size: Images on the way that exist at one time.

    Returns:
        The importance, one row per image, one column per channel.

    References:
        On Pixel-Wise Explanations by Layer-Wise Relevance Propagation (Bach et al., 2015);
        How Important Is a Neuron (Dhamdhere et al., 2019), https://arxiv.org/abs/1805.12233;
        Influence-Directed Explanations (Leino et al., 2018), https://arxiv.org/abs/1802.03788;
        thesis figure 5.9.
    """
    check_choice("method", method, Importance)
    net.check_stages([stage])
    with torch.inference_mode(False), torch.enable_grad():
        if method == "lrp":
            pieces = net.differentiable(images, [stage])
            scores = _check_scores(pieces.output, len(images))
            picked = scores.gather(1, _class_ids(scores.detach(), class_ids)[:, None])
            (activation,) = pieces.activations
            (gradient,) = torch.autograd.grad(picked.sum(), pieces.activations)
            return attention(activation.detach(), gradient).sum(dim=(2, 3))
        from captum.attr import InternalInfluence, LayerConductance

        ids = _chosen(net, images, class_ids).clone()
        model = StageModel(net, stage)
        make = LayerConductance if method == "conductance" else InternalInfluence
        found = make(model, model.stage).attribute(
            images.detach().clone(), torch.zeros_like(images), target=ids, n_steps=steps,
            internal_batch_size=max(batch_size, 2 * len(images)),
        )  # fmt: skip
        return found.detach().sum(dim=(2, 3)).to(images.dtype)


def propagated_importance(tree: "Evidence", stage: int, channels: int) -> Float[Tensor, " k"]:
    r"""Passes the contributions to a class down the tree to the channels of a stage.

    .. math:: R_j = \sum_i R_i \, s_{j|i}

    :math:`R_i` of a channel of the deepest stage is its contribution :math:`\alpha_i`; a neuron
    hands its :math:`R_i` on in shares :math:`s_{j|i}` of the positive contributions to it. The
    thesis says no more than that importance is propagated from the selected channels.

    Args:
        tree: The evidence for a class.
        stage: Number of the stage.
        channels: How many channels it has.

    Returns:
        The importance of each channel; 0 for those outside the tree.

    References:
        Thesis section 5.3.1.7.
    """
    importance = torch.zeros(channels, dtype=torch.float64)
    reached: dict[str, float] = {}
    for edge in sorted(tree.edges, key=lambda edge: -tree.nodes[edge.child].stage):
        top = edge.parent not in tree.nodes
        given = edge.contribution if top else reached.get(edge.parent, 0.0) * edge.share
        reached[edge.child] = reached.get(edge.child, 0.0) + given
    for key, value in reached.items():
        if tree.nodes[key].stage == stage:
            importance[tree.nodes[key].channel] += value
    return importance


def removal_curve(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: Sequence[int] | Int[Tensor, " b"],
    importances: Mapping[str, Float[Tensor, "b k"]],
    *,
    stage: int,
    counts: Iterable[int] = (1, 2, 4, 8, 16, 32),
) -> pd.DataFrame:
    """Classifies images without the most important channels of a stage.

    Removed channels are zero everywhere. Only channels of positive importance are removed: a
    method that names fewer removes fewer.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: The true class of each image.
        importances: By name of the method, the importance of each channel for each image.
        stage: Number of the stage.
        counts: How many channels to remove.

    Returns:
        One row for each method and count: ``method``, ``stage``, ``removed`` (0 first),
        ``accuracy``, ``score`` (mean of the true class), and ``removed_mean``, how many channels
        were removed on average.

    References:
        Thesis figure 5.9: the lower, the better.
    """
    net.check_stages([stage])
    rows = []
    with torch.inference_mode(False), torch.no_grad():
        kept, output = net.activations(images)
        scores = _check_scores(output, len(images))
        ids = _class_ids(scores, class_ids)
        activation = kept[stage - 1]
        for method, importance in importances.items():
            if importance.shape != activation.shape[:2]:
                raise ValueError(
                    f"expected importances of shape {tuple(activation.shape[:2])} for stage "
                    f"{stage}, got {tuple(importance.shape)} of {method!r}"
                )
            importance = importance.to(activation.device)
            rank = importance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            for count in [0, *counts]:
                gone = (rank < count) & (importance > 0)
                left = activation * ~gone[:, :, None, None]
                found = intervene(net, left, after=stage)
                accuracy = (found.argmax(dim=1) == ids).double().mean().item()
                score = found.gather(1, ids[:, None]).double().mean().item()
                removed = gone.sum(dim=1).double().mean().item()
                rows.append([method, stage, count, accuracy, score, removed])
    columns = ["method", "stage", "removed", "accuracy", "score", "removed_mean"]
    return pd.DataFrame(rows, columns=columns)
