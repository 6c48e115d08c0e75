r"""Directions of human concepts among the channels of a stage, and what classes make of them.

Symbols: :math:`F_{ij}` is a stage's activation at one place, a vector of its channels,
:math:`v` a concept's direction, :math:`G` the gradient of a class score. Which single channels
detect a concept is asked by :func:`attnviz.probes.context.concept_detectors`.
"""

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..cam import resize
from ..stages import Staged
from .occlusion import _check_scores, _class_ids

__all__ = ["concept_direction", "concept_sensitivity"]


def concept_direction(
    activations: Float[Tensor, "b c h w"], masks: Bool[Tensor, "b H W"], ridge: float = 0.1
) -> Float[Tensor, " c"]:
    r"""Finds the direction that tells places on a concept from all others.

    .. math:: v \propto (\Sigma + \lambda I)^{-1} (\mu_1 - \mu_0)

    Fisher's linear discriminant: :math:`\mu_1, \mu_0` are the mean activations on and off the
    concept, :math:`\Sigma` the covariance around them, :math:`\lambda` the share `ridge` of its
    mean variance. A place of the stage lies on the concept if half of it does.

    Args:
        activations: A stage's activations of many pictures.
        masks: Where the concept is in each.
        ridge: See the formula; above 0.

    Returns:
        The direction, of length 1; NaN where the concept is nowhere or everywhere, or no
        channel changes.

    Raises:
        ValueError: An argument is out of range, or there is not one mask per picture.

    References:
        Interpretability Beyond Feature Attribution: Quantitative Testing with Concept Activation
        Vectors (Kim et al., 2018), https://arxiv.org/abs/1711.11279, which learns from whole
        pictures with and without the concept.
    """
    if not 0 < ridge < math.inf:
        raise ValueError(f"expected `ridge` above 0 and finite, got {ridge}")
    if len(masks) != len(activations):
        raise ValueError(
            f"expected a mask for each of {len(activations)} pictures, got {len(masks)}"
        )
    on = resize(masks.to(activations), tuple(activations.shape[2:])).flatten() >= 0.5
    places = activations.transpose(0, 1).flatten(1).double()
    constant = not places.var(dim=1).any()
    if on.all() or not on.any() or constant:
        return activations.new_full(places.shape[:1], torch.nan)
    first, second = places[:, on], places[:, ~on]
    around = [each - each.mean(dim=1, keepdim=True) for each in (first, second)]
    spread = sum(each @ each.T for each in around) / places.shape[1]
    spread.diagonal().add_(ridge * spread.diagonal().mean())
    direction = torch.linalg.solve(spread, first.mean(dim=1) - second.mean(dim=1))
    return (direction / direction.norm()).to(activations)


def concept_sensitivity(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None,
    directions: Mapping[str, Float[Tensor, " k"]],
    *,
    stage: int,
) -> pd.DataFrame:
    r"""Measures how a class score changes as a stage moves towards concepts.

    .. math:: S = \frac{1}{hw} \sum_{ij} G_{ij} \cdot v

    The share of a class's images with :math:`S > 0` is the TCAV score. It means something only
    beside directions of no concept, such as those of other pictures' masks.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image; the highest score's if None.
        directions: By name, from :func:`concept_direction`.
        stage: The stage that they belong to.

    Returns:
        One row per image: ``class_id``, and by name of each concept the sensitivity :math:`S`.
    """
    net.check_stages([stage])
    with torch.inference_mode(False), torch.enable_grad():
        pieces = net.differentiable(images, [stage])
        scores = _check_scores(pieces.output, len(images))
        ids = _class_ids(scores.detach(), class_ids)
        picked = scores.gather(1, ids[:, None]).sum()
        gradients = torch.autograd.grad(picked, pieces.activations)[0].mean(dim=(2, 3))
    values = {name: (gradients @ v.to(gradients)).tolist() for name, v in directions.items()}
    return pd.DataFrame({"class_id": ids.tolist()} | values)
