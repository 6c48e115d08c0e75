r"""Instances of one class told apart: peaks of its evidence, each with a map of its own.

Symbols: :math:`F^k_{ij}` is the deepest stage's activation, :math:`G^k_{ij}` the gradient of a
class score, :math:`R_{ij} = \sum_k G^k_{ij} F^k_{ij}` the class's response, which is its class
map, but for a bias, where global average pooling follows a 1x1 convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import check_number, check_whole
from .crops import class_score
from .excitation import descend_from, record
from .explain import _check_class_ids, _scores
from .localize import peaks
from .stages import Staged, check_network

__all__ = ["Instance", "find_instances"]


@dataclass(frozen=True, eq=False)
class Instance:
    """One instance of a class, at best: a peak of its response. See :func:`find_instances`."""

    class_id: int
    """The class."""
    peak: tuple[int, int]
    """Row and column in the deepest stage."""
    place: tuple[float, float]
    """Row and column of the same place in the image that was passed in, in its pixels; a picture
    of another size is ``picture / image`` times as large."""
    response: float
    """The response at the peak, as a share of the class's highest."""
    map: Float[Tensor, "h w"]
    """What excites the peak, at the resolution of the stage asked for. It sums to 1, less what
    only biases or negative inputs excite: nearly all of it where bottlenecks are linear, as in
    MobileNetV2."""


def find_instances(
    net: Staged,
    image: Float[Tensor, "1 c h w"],
    class_ids: Sequence[int | str] | None = None,
    *,
    least: float = 0.5,
    window: int = 5,
    stage: int = 1,
) -> list[Instance]:
    r"""Finds the peaks of each class's response and passes each down to a shallow stage.

    A peak hands the probability of winning to its channels by what each adds to the response,
    :math:`p_k \propto \mathrm{ReLU}(G^k_{ij}) F^k_{ij}`, and from there each layer passes it on
    by excitation: see :mod:`attnviz.excitation`. An instance that the network does not answer
    to has no peak, and a large one may have several.

    Args:
        net: A network of convolutions, batch normalization, ReLU and pooling between the stages.
        image: An image, normalized as the network expects.
        class_ids: Numbers or names of the classes; the one with the highest score if None.
        least: Lowest peak, as a share of the class's highest response, from 0 to 1.
        window: Odd side of the square of the deepest stage in which a peak is the highest.
        stage: The stage of the maps, 1 = shallowest.

    Returns:
        The instances, class by class, the highest response first; none of a class without a
        positive response.

    Raises:
        ValueError: An argument is out of range, a score is not finite, or a layer between the
            stages has no rule.

    References:
        Weakly Supervised Instance Segmentation using Class Peak Response (Zhou et al., 2018),
        https://arxiv.org/abs/1804.00880; thesis chapter 6. Trained as they are elsewhere,
        networks lack that paper's peak stimulation.
    """
    check_network(net)
    check_number("least", least, 0, 1)
    check_whole("stage", stage, 1)
    if not isinstance(image, Tensor):
        raise TypeError(f"expected `image` as a tensor, got {type(image).__name__}; preprocess it")
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(f"expected one image (1, c, h, w), got {tuple(image.shape)}")
    net.check_stages([stage])
    deepest = len(net.stage_names)
    with torch.inference_mode(False), torch.enable_grad():
        image = image.clone() if image.is_inference() else image
        pieces = net.differentiable(image, [deepest])
        [activation] = pieces.activations
        if isinstance(class_ids, Sequence | Tensor) and not isinstance(class_ids, str):
            class_ids = [list(class_ids) if isinstance(class_ids, Sequence) else class_ids]
        numbers = _check_class_ids(net, _scores(pieces.output.detach(), 1), class_ids)
        found = []
        for class_id in dict.fromkeys(numbers.flatten().tolist()):
            [score] = class_score(pieces.output, class_id)
            [gradient] = torch.autograd.grad(score, [activation], retain_graph=True)
            found += _peaks(activation.detach(), gradient, class_id, least, window)
    if not found:
        return []
    starts = torch.stack([start for *_, start in found])
    rows, columns = (image.shape[d] / activation.shape[d] for d in (2, 3))
    with torch.inference_mode(False), torch.no_grad():
        names = [net._parts.stages[number - 1] for number in (stage, deepest)]
        passed = record(net._parts, image.expand(len(starts), -1, -1, -1), names[0])
        [reached] = descend_from(passed, names[1], starts, names[:1])
    return [
        Instance(class_id, (i, j), ((i + 0.5) * rows, (j + 0.5) * columns), share, map)
        for (class_id, (i, j), share, _), map in zip(found, reached.sum(dim=1), strict=True)
    ]


_Peak = tuple[int, tuple[int, int], float, Tensor]


def _peaks(
    activation: Tensor, gradient: Tensor, class_id: int, least: float, window: int
) -> list[_Peak]:
    # Class, place and share of each peak, and the probabilities of its channels (c, h, w).
    response = (gradient * activation).sum(dim=1)[0]
    highest = float(response.max())
    if not highest > 0:
        return []
    found = []
    for i, j in peaks(response, window=window, at_least=least * highest).tolist():
        winners = (gradient.relu() * activation)[0, :, i, j]
        start = torch.zeros_like(activation[0])
        start[:, i, j] = winners / winners.sum()
        found.append((class_id, (i, j), float(response[i, j]) / highest, start))
    return found
