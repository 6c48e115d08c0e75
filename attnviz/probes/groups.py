r"""Channels studied together: groups that light up the same places, removed as one.

Symbols: :math:`d` is a class score, :math:`d(F_{-S})` the score with the channels :math:`S` of a
stage set to zero.
"""

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checks import check_number, check_whole
from ..gap import attention, contributions
from ..stages import Staged
from .channels import channel_groups
from .intervene import intervene
from .occlusion import _check_scores, _class_ids

__all__ = ["group_effects"]


def group_effects(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: Sequence[int] | Int[Tensor, " b"] | None = None,
    *,
    stage: int,
    top: int = 32,
    threshold: float = 0.5,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Measures what channels that overlap lose together and one by one.

    .. math:: \text{together} = d - d(F_{-S}), \qquad
        \text{alone} = \sum_{k \in S} \big( d - d(F_{-k}) \big)

    Channels that stand in for one another lose more together than alone. Behind the stage must
    be something that is not linear: directly before global average pooling and one linear layer
    the two are equal.

    Of each decision the `top` channels with the largest positive contributions are grouped by
    the overlap of their maps, see :func:`attnviz.probes.channels.channel_groups`. As a control
    stands beside each group one of the same size, drawn from the same channels.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class per image; the one with the highest score if None.
        stage: Number of the stage, 1 = shallowest.
        top: How many channels of a decision are grouped.
        threshold: The intersection over union above which two channels are linked.
        seed: Number behind the control.

    Returns:
        One row for each group of two or more and each of its control: ``image``, ``class_id``,
        ``chosen`` (``overlap`` or ``random``), ``channels``, ``size``, and the losses
        ``together`` and ``alone``, in the unit of the score.

    Raises:
        ValueError: An argument is out of range.

    References:
        Thesis chapter 6; Net2Vec (Fong and Vedaldi, 2018), https://arxiv.org/abs/1801.03454.
    """
    check_whole("top", top, 1)
    check_number("threshold", threshold, 0, 1)
    net.check_stages([stage])
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.enable_grad():
        pieces = net.differentiable(images, [stage])
        scores = _check_scores(pieces.output, len(images))
        ids = _class_ids(scores.detach(), class_ids)
        picked = scores.gather(1, ids[:, None]).sum()
        gradients = torch.autograd.grad(picked, pieces.activations)[0]
    rows = []
    values = pieces.activations[0].detach()
    for image, class_id in enumerate(ids.tolist()):
        maps = attention(values[image], gradients[image])
        alphas = contributions(maps)
        best = alphas.argsort(descending=True, stable=True)[:top]
        best = best[alphas[best] > 0]
        groups = [group for group in channel_groups(maps[best], threshold) if len(group) > 1]
        drawn = [
            tuple(torch.randperm(len(best), generator=generator)[: len(group)].tolist())
            for group in groups
        ]
        sets = [*((k,) for k in range(len(best))), *groups, *drawn]
        losses = _losses(net, values[image], stage, class_id, [best[list(s)] for s in sets])
        alone, together = losses[: len(best)], losses[len(best) :].tolist()
        kinds = ["overlap"] * len(groups) + ["random"] * len(drawn)
        for kind, group, loss in zip(kinds, [*groups, *drawn], together, strict=True):
            row = [image, class_id, kind, tuple(best[list(group)].tolist()), len(group), loss]
            rows.append([*row, float(alone[list(group)].sum())])
    columns = ["image", "class_id", "chosen", "channels", "size", "together", "alone"]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def _losses(
    net: Staged, values: Tensor, stage: int, class_id: int, sets: Iterable[Tensor]
) -> Float[Tensor, " n"]:
    # What the class loses without each set of channels.
    sets = [values.new_zeros(0, dtype=torch.long), *sets]
    copies = values.expand(len(sets), -1, -1, -1).clone()
    for copy, channels in zip(copies, sets, strict=True):
        copy[channels] = 0
    scores = intervene(net, copies, after=stage)[:, class_id]
    return scores[0] - scores[1:]
