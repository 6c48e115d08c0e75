r"""Do contributions say what removing a channel does? Thesis table 5.1 and figure 5.5.

Symbols: :math:`d` is a decision, a class score or a neuron; :math:`\alpha_k` the contribution
of channel :math:`k` to it and :math:`\hat\alpha_k` the fall of :math:`d` when the channel is
replaced by a constant.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from ..crops import Neuron, Window, decompose
from ..gap import Score, suppress
from ..stages import Staged
from ..tree import Evidence, evidence
from .ablation import AblationFill, ablate
from .occlusion import _chosen

__all__ = [
    "Decomposed",
    "agreement",
    "channel_means",
    "contribution_curves",
    "decompositions",
    "overlap_counts",
    "pearson_table",
]


@dataclass(frozen=True, eq=False)
class Decomposed:
    """One decision, decomposed into a stage and compared with removal."""

    image: int
    """The number of the image."""
    decision: str
    """``class``, or the neuron, ``stage:channel@row,column``."""
    value: float
    """The class score, or the neuron's activation."""
    stage: int
    """The stage that it was decomposed into."""
    step: str
    """The same in the thesis' words, such as ``S5->S4``; T is the class."""
    scores: dict[Score, Float[Tensor, "..."]]
    """A value for each channel in the ways of table 5.1; ``AA`` is the contribution."""
    effects: dict[AblationFill, Float[Tensor, "..."]]
    """For each fill, by how much the decision falls without each channel."""
    active: int
    """How many channels have a positive contribution."""
    distinct: int
    """How many of these are left when those that light up the same places are merged."""


def channel_means(
    net: Staged, images: Iterable[Float[Tensor, "_ c h w"]]
) -> tuple[Float[Tensor, " _"], ...]:
    """Averages each channel of each stage over positions and images, for ``dataset_mean``.

    Args:
        net: The network.
        images: Batches of normalized images.
    """
    totals, count = None, 0
    for batch in images:
        with torch.no_grad():
            means = [a.double().mean(dim=(2, 3)).sum(dim=0) for a in net.activations(batch)[0]]
        totals = means if totals is None else [a + b for a, b in zip(totals, means, strict=True)]
        count += len(batch)
    if totals is None:
        raise ValueError("expected images, got none")
    return tuple((total / count).to(net.dtype) for total in totals)


def decompositions(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None = None,
    *,
    fills: Sequence[AblationFill] = ("zero", "spatial_mean", "dataset_mean"),
    means: Sequence[Float[Tensor, " _"]] | None = None,
    top: int = 3,
    most: int | None = None,
    progress: bool = False,
) -> Iterator[Decomposed]:
    """Decomposes a class and the neurons of its tree, and removes every channel below them.

    The thesis says "set to the mean activation" without saying the mean of what, and not which
    neurons are decided on below the class; here they are the nodes of the evidence tree.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image; the highest score's if None.
        fills: What a channel is replaced by: ``zero``; ``spatial_mean``, its mean over the
            positions of the image; ``dataset_mean``, that over `means`.
        means: The result of :func:`channel_means`; made of `images` if None.
        top: Channels for each decision of the tree.
        most: At most so many decisions for each stage and image, the first found.
        progress: Whether to show a bar.

    Yields:
        One record for each decision.
    """
    wrong = [fill for fill in fills if fill not in get_args(AblationFill)]
    if wrong or not fills:
        raise ValueError(f"expected `fills` in {get_args(AblationFill)}, got {list(fills)}")
    ids = _chosen(net, images, class_ids).tolist()
    if means is None and "dataset_mean" in fills:
        means = channel_means(net, images.split(16))
    deepest = len(net.stage_names)
    bar = tqdm(range(len(images)), "removing channels", unit="image", delay=2,
               disable=not progress)  # fmt: skip
    for row in bar:
        tree = evidence(net, images[row : row + 1], ids[row], top)
        for stage in range(deepest, 0, -1):
            step = f"{'T' if stage == deepest else f'S{stage + 1}'}->S{stage}"
            mean = None if means is None else means[stage - 1]
            for name, decision, window in _decisions(tree, stage, most):
                yield Decomposed(
                    image=row,
                    decision=name,
                    value=window.decision,
                    stage=stage,
                    step=step,
                    scores={score: window.scores(score) for score in get_args(Score)},
                    effects={
                        fill: ablate(net, tree.forward, decision, stage, fill, means=mean)
                        for fill in fills
                    },
                    active=int((window.contributions > 0).sum()),
                    distinct=len(suppress(window.attention, window.contributions)),
                )


def agreement(records: Iterable[Decomposed]) -> pd.DataFrame:
    r"""Correlates, over channels, each score of a decision with the effect of removal.

    .. math:: \rho = \frac{E[(\alpha - \mu_\alpha)(\hat\alpha - \mu_{\hat\alpha})]}
        {\sigma_\alpha \sigma_{\hat\alpha}}

    Args:
        records: The decisions.

    Returns:
        One row for each decision, fill and score: ``image``, ``decision``, ``stage``, ``step``,
        ``fill``, ``score`` and ``pearson``, NaN where no channel has an
        effect but for rounding, as with the spatial mean before global average pooling.

    References:
        Thesis Eq. 5.12.
    """
    rows = [
        [r.image, r.decision, r.stage, r.step, fill, score, _pearson(values, effect, r.value)]
        for r in records
        for fill, effect in r.effects.items()
        for score, values in r.scores.items()
    ]
    columns = ["image", "decision", "stage", "step", "fill", "score", "pearson"]
    return pd.DataFrame(rows, columns=columns)


def pearson_table(table: pd.DataFrame) -> pd.DataFrame:
    """Averages :func:`agreement` over the decisions of each image, then over images.

    Returns:
        One row for each ``fill`` and ``score``, one column for each step, from the class down.

    References:
        Thesis table 5.1.
    """
    images = table.groupby(["fill", "score", "stage", "step", "image"])["pearson"].mean()
    means = images.groupby(["fill", "score", "stage", "step"]).mean()
    wide = means.unstack(["stage", "step"]).sort_index(axis=1, level="stage", ascending=False)
    return wide.droplevel("stage", axis=1)


def contribution_curves(
    records: Iterable[Decomposed], fill: AblationFill = "zero"
) -> pd.DataFrame:
    """Sorts the contributions to each decision and averages them rank by rank.

    Args:
        records: The decisions.
        fill: Which effect to compare with.

    Returns:
        One row for each stage and rank: ``stage``, ``rank`` (1 = largest), and the ``gap``
        contribution and the effect of ``removal``, both sorted by themselves, as shares of the
        sum of the positive ones.

    References:
        Thesis figure 5.5 (a).
    """
    parts: Mapping[int, list[Tensor]] = {}
    for record in records:
        pair = torch.stack([record.scores["AA"], record.effects[fill]]).double().cpu()
        total = pair.relu().sum(dim=1, keepdim=True)
        pair = pair / torch.where(total > 0, total, torch.inf)
        parts.setdefault(record.stage, []).append(pair.sort(dim=1, descending=True).values)
    rows = []
    for stage, pairs in sorted(parts.items()):
        gap, removal = torch.stack(pairs).mean(dim=0).tolist()
        ranks = range(1, len(gap) + 1)
        rows.append(pd.DataFrame({"stage": stage, "rank": ranks, "gap": gap, "removal": removal}))
    return pd.concat(rows, ignore_index=True)


def overlap_counts(records: Iterable[Decomposed]) -> pd.DataFrame:
    """Counts, on average, the active and the overlapping channels of a decision.

    Returns:
        One row for each ``stage``: ``active`` channels, of positive contribution; of these the
        ``overlapping`` ones, which light up the same places as a stronger one; ``total``.

    References:
        Thesis figure 5.5 (b).
    """
    rows = [[r.stage, r.active, r.active - r.distinct, len(r.scores["AA"])] for r in records]
    table = pd.DataFrame(rows, columns=["stage", "active", "overlapping", "total"])
    return table.groupby("stage").mean().reset_index()


def _decisions(
    tree: Evidence, stage: int, most: int | None
) -> Iterator[tuple[str, int | Neuron, Window]]:
    # What the tree decides on one stage above, decomposed into the stage.
    if stage == len(tree.forward.activations):
        [window] = decompose(tree.forward, tree.class_id, stage)
        yield tree.root, tree.class_id, window
        return
    nodes = [node for node in tree.nodes.values() if node.stage == stage + 1][:most]
    windows = decompose(tree.forward, [node.neuron for node in nodes], stage)
    for node, window in zip(nodes, windows, strict=True):
        yield node.id, node.neuron, window


def _pearson(scores: Tensor, effect: Tensor, decision: float) -> float:
    a, b = scores.double(), effect.double()
    if b.abs().max() <= 1e-6 * abs(decision):  # rounding
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    sizes = a.norm() * b.norm()
    return float(a @ b / sizes) if sizes > 0 else float("nan")
