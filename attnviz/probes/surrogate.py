"""Sparse surrogates: does a network say the same with the channels of its evidence alone?"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from ..crops import Forward, Neuron, Window, decompose, run
from ..stages import Staged
from .intervene import intervene, keep_channels
from .occlusion import _check_scores, _class_ids

__all__ = ["surrogate", "top_channels"]

_TOGETHER = 4096  # decisions decomposed at once


def top_channels(
    forward: Forward,
    class_id: int,
    tops: Sequence[int] = (1, 2, 4, 8, 16, 32),
    stages: Sequence[int] | None = None,
) -> dict[int, dict[int, set[int]]]:
    """Collects the channels of trees of several sizes, which are decomposed together.

    A tree of more children holds the trees of fewer: its first children are theirs. Only
    channels are kept, so this takes a fraction of the time of :func:`attnviz.evidence`.

    Args:
        forward: The forward pass.
        class_id: The class.
        tops: Children of each decision.
        stages: Numbers of the stages; all if None.

    Returns:
        For each of `tops` and each stage the channels that some decision of the tree rests on.
    """
    numbers = forward.net.check_stages(stages)
    fronts: dict[int, list[int | Neuron]] = {top: [class_id] for top in tops}
    found: dict[int, dict[int, set[int]]] = {top: {} for top in tops}
    for stage in reversed(numbers):
        decisions = list(dict.fromkeys(each for front in fronts.values() for each in front))
        below: dict[int | Neuron, list[Neuron]] = {}
        for start in range(0, len(decisions), _TOGETHER):
            part = decisions[start : start + _TOGETHER]
            root = isinstance(part[0], int)
            for decision, window in zip(
                part, decompose(forward, class_id if root else part, stage), strict=True
            ):
                below[decision] = _children(window, stage, max(tops))
        for top in tops:
            front = dict.fromkeys(child for each in fronts[top] for child in below[each][:top])
            fronts[top] = list(front)
            found[top][stage] = {neuron.channel for neuron in front}
    return found


def surrogate(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: Sequence[int] | Int[Tensor, " b"],
    *,
    tops: Sequence[int] = (1, 2, 4, 8, 16, 32),
    stages: Sequence[int] | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Classifies images with only the channels that the evidence for the answer names.

    The class that the network names is decomposed; of each stage the union of the channels in
    the tree stays, all others become zero.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: The true class of each image.
        tops: How many channels each decision keeps.
        stages: The stages decomposed and thinned out, 1 = shallowest; all if None.
        progress: Whether to show a bar.

    Returns:
        One row for each image and top: ``image``, ``class_id``, ``predicted`` by the whole
        network, ``top``, ``surrogate`` (the class that is left), ``accurate`` and ``matches``
        (the same class as before), ``kept``, the share of the channels of these stages.

    References:
        Thesis section 5.3.1.6 and figure 5.8.
    """
    numbers = net.check_stages(stages)
    if not tops or min(tops) < 1:
        raise ValueError(f"expected `tops` of at least 1, got {list(tops)}")
    predicted = _check_scores(net(images), len(images)).argmax(dim=1).tolist()
    labels = _class_ids(net(images), class_ids).tolist()
    rows = []
    bar = tqdm(range(len(images)), "surrogate", unit="image", delay=2, disable=not progress)
    for row in bar:
        image = images[row : row + 1]
        forward = run(net, image)
        trees = top_channels(forward, predicted[row], tops, numbers)
        masks = {
            n: torch.zeros(
                len(tops), len(forward.activations[n - 1]), dtype=torch.bool, device=image.device
            )
            for n in numbers
        }
        for place, top in enumerate(tops):
            for stage, channels in trees[top].items():
                masks[stage][place, sorted(channels)] = True
        with torch.no_grad():
            copies = image.expand(len(tops), -1, -1, -1)
            left = intervene(net, copies, keep_channels(masks)).argmax(dim=1).tolist()
        kept = torch.cat(list(masks.values()), dim=1).double().mean(dim=1)
        for top, found, share in zip(tops, left, kept.tolist(), strict=True):
            hits = found == labels[row], found == predicted[row]
            rows.append([row, labels[row], predicted[row], top, found, *hits, share])
    columns = ["image", "class_id", "predicted", "top", "surrogate", "accurate", "matches", "kept"]
    return pd.DataFrame(rows, columns=columns)


def _children(window: Window, stage: int, top: int) -> list[Neuron]:
    # What a tree of evidence holds below a decision, the largest contribution first.
    alphas = window.contributions
    maps = window.attention.masked_fill(window.activation <= 0, 0)
    highest, places = maps.flatten(1).max(dim=1)
    usable = ((alphas > 0) & (highest > 0)).nonzero()[:, 0]
    channels = usable[alphas[usable].topk(min(top, len(usable))).indices]
    pairs = zip(channels.tolist(), places[channels].tolist(), strict=True)
    width = maps.shape[2]
    return [
        Neuron(stage, channel, window.top + place // width, window.left + place % width)
        for channel, place in pairs
    ]
