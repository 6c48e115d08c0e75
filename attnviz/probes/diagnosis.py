"""Why was it wrong? Failures and attacks, traced to the channels that decided.

Thesis sections 5.3.2.1 and 5.3.2.2: from the wrong answer to its channels, to the place that
excites them, and, with this place covered, to the answer without them; and how an attack moves
the channels of the true and of the wanted class.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..stages import Staged
from ..tree import Evidence
from .importance import channel_importance
from .occlusion import Fill, _check_scores, _class_ids, occlude

__all__ = ["attacked_channels", "cover_evidence", "failures"]


def failures(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: Sequence[int] | Int[Tensor, " b"],
) -> pd.DataFrame:
    """Lists the images whose class does not get the highest score.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: The true class of each image.

    Returns:
        One row for each failure, the surest first: ``image``, ``class_id``, ``predicted``, and
        the probabilities ``class_probability`` and ``predicted_probability``.
    """
    scores = _check_scores(net(images), len(images))
    ids = _class_ids(scores, class_ids)
    predicted = scores.argmax(dim=1)
    probabilities = net.probabilities(scores)
    rows = {
        "image": range(len(images)),
        "class_id": ids.tolist(),
        "predicted": predicted.tolist(),
        "class_probability": probabilities.gather(1, ids[:, None])[:, 0].tolist(),
        "predicted_probability": probabilities.gather(1, predicted[:, None])[:, 0].tolist(),
    }
    table = pd.DataFrame(rows)
    wrong = table[table["predicted"] != table["class_id"]]
    return wrong.sort_values("predicted_probability", ascending=False, ignore_index=True)


def cover_evidence(
    tree: Evidence,
    class_id: int,
    *,
    threshold: float = 0.5,
    fill: Fill = "mean",
    batch_size: int = 32,
) -> pd.DataFrame:
    """Covers what excites each channel behind a wrong answer, and asks the network again.

    Args:
        tree: The evidence for the wrong class.
        class_id: The true class.
        threshold: The map of a channel is covered where it has this share of its maximum.
        fill: With what; see :func:`attnviz.probes.occlude`.
        batch_size: Covered images in one forward pass.

    Returns:
        One row for each edge of the tree, the one whose cover helps most first: ``parent``,
        ``child``, ``stage``, ``channel``, ``share``; ``area`` covered, 0 to 1; ``before`` and
        ``after``, the probability of the true class; ``wrong_before`` and ``wrong_after``, that
        of the wrong one; ``predicted``, the class of the highest score after.

    References:
        Thesis figure 5.10.
    """
    net, image = tree.forward.net, tree.forward.image.detach()
    if tree.class_id is None:
        raise ValueError("expected the evidence for a class, got that for a neuron")
    before = _check_scores(net(image), 1)
    true = int(_class_ids(before, [class_id])[0])
    scores, areas = [], []
    for stage in sorted({tree.nodes[edge.child].stage for edge in tree.edges}, reverse=True):
        edges = [edge for edge in tree.edges if tree.nodes[edge.child].stage == stage]
        for start in range(0, len(edges), batch_size):
            maps = torch.stack([edge.map for edge in edges[start : start + batch_size]])
            copies = image.expand(len(maps), -1, -1, -1)
            covered = occlude(net, copies, maps, threshold, fill)
            scores.append(net(covered))
            areas += (covered != copies).any(dim=1).double().mean(dim=(1, 2)).tolist()
    edges = sorted(tree.edges, key=lambda edge: -tree.nodes[edge.child].stage)
    first = net.probabilities(before)[0]
    rows = []
    for edge, after, area in zip(edges, torch.cat(scores) if scores else (), areas, strict=True):
        node, found = tree.nodes[edge.child], net.probabilities(after[None])[0]
        pair = [float(p[id]) for id in (true, tree.class_id) for p in (first, found)]
        rows.append(
            [edge.parent, edge.child, node.stage, node.channel, edge.share, area, *pair,
             int(after.argmax())]
        )  # fmt: skip
    columns = ["parent", "child", "stage", "channel", "share", "area", "before", "after",
               "wrong_before", "wrong_after", "predicted"]  # fmt: skip
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values("after", ascending=False, ignore_index=True, kind="stable")


def attacked_channels(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    attacked: Float[Tensor, "b c h w"],
    class_ids: Sequence[int] | Int[Tensor, " b"],
    wanted_ids: Sequence[int] | Int[Tensor, " b"],
    *,
    stage: int | None = None,
    top: int = 4,
) -> pd.DataFrame:
    """Compares the strongest responses of the decisive channels before and after an attack.

    The channels of the true class are those of the largest contributions to it in the original
    image, the channels of the wanted class those in the attacked one.

    Args:
        net: A network with one score per class.
        images: The original images, normalized.
        attacked: The changed images; see :func:`attnviz.probes.adversarial.carlini_wagner`.
        class_ids: The true class of each image.
        wanted_ids: The class that each attack reached.
        stage: The stage; the deepest if None.
        top: Channels for each class.

    Returns:
        One row for each image, class and channel: ``image``, ``of`` (``true`` or ``wanted``),
        ``rank``, ``channel``; ``original`` and ``attacked``, the largest activation of the
        channel in the two images; ``change``.

    References:
        Thesis figure 5.12; Understanding the Role of Individual Units in a Deep Neural Network
        (Bau et al., 2020), https://arxiv.org/abs/2009.05041.
    """
    number = len(net.stage_names) if stage is None else net.check_stages([stage])[0]
    if images.shape != attacked.shape:
        raise ValueError(
            f"expected attacked images of the shape of the originals, {tuple(images.shape)}, "
            f"got {tuple(attacked.shape)}"
        )
    with torch.no_grad():
        responses = [
            net.activations(each)[0][number - 1].amax((2, 3)) for each in (images, attacked)
        ]
    rows = []
    for of, source, ids in (("true", images, class_ids), ("wanted", attacked, wanted_ids)):
        best = channel_importance(net, source, ids, stage=number).topk(top, dim=1).indices
        peaks = [response.gather(1, best).tolist() for response in responses]
        for image, channels in enumerate(best.tolist()):
            for rank, channel in enumerate(channels):
                pair = [peak[image][rank] for peak in peaks]
                rows.append([image, of, rank + 1, channel, *pair, pair[1] - pair[0]])
    columns = ["image", "of", "rank", "channel", "original", "attacked", "change"]
    return pd.DataFrame(rows, columns=columns)
