"""Speed of evidence trees and ablations, as ratios to forward passes timed in the same round.

Weights and image are random, so that every stage has open neurons; what is timed depends on where
the neurons of a tree lie, not on what they mean. Rounds, clock and quartiles are those of
:mod:`attnviz.bench`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .bench import Benchmark, Row, _check, _device_name, _quiet, _Subject, _subject, _time
from .bench import _versions as _all_versions
from .crops import Neuron
from .probes.ablation import ablate
from .tree import CLASS, Evidence, evidence

__all__ = ["bench_tree"]

FORWARD = "forward pass"
TREE = "evidence tree, all stages, top 3"
BESIDE = f"{TREE}, beside its forward pass"
PLAIN = "forward + backward for each decision, from one of each stage"


def bench_tree(
    networks: Sequence[str] = ("vgg16", "resnet50"),
    rounds: int = 5,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    *,
    size: int = 224,
    ablation: bool = True,
    progress: bool = True,
) -> Benchmark:
    """Measures the time of :func:`attnviz.evidence` and of :func:`attnviz.probes.ablate`.

    The plain way, one forward and one backward pass for each of the tree's decisions, is timed on
    one decision of each stage and multiplied; so are the forward passes of an ablation, one for
    each channel.

    Args:
        networks: Names for :func:`attnviz.load_network`.
        rounds: How often each case runs.
        device: ``auto`` takes CUDA where there is one.
        seed: The seed of weights and image.
        size: Height and width of the image.
        ablation: Whether to measure ablations too, which takes most of the time.
        progress: Whether to show a progress bar.

    Returns:
        The ratios.

    Raises:
        ValueError: An argument is out of range, or a network is unknown.
    """
    chosen = _check(networks, [1], rounds, device, size)
    rows: list[Row] = []
    notes = [f"{PLAIN}, and {FORWARD} for each channel: timed on a sample and multiplied"]
    with (
        tqdm(total=len(networks) * rounds, disable=not progress, unit="round") as bar,
        _quiet(),
    ):
        for network in networks:
            bar.set_description(network)
            subject = _subject(network, size, chosen.type, seed)
            image = subject.images(1)
            tree = evidence(subject.net, image)
            found = [_round(subject, image, tree, ablation, bar) for _ in range(rounds)]
            for case, baseline in found[0]:
                low, ratio, high = np.quantile(
                    [each[case, baseline] for each in found], (0.25, 0.5, 0.75)
                )
                rows.append({
                    "case": f"{network}: {case}", "baseline": f"{network}: {baseline}",
                    "ratio": round(float(ratio), 5), "low": round(float(low), 5),
                    "high": round(float(high), 5), "peak_memory_ratio": None,
                })  # fmt: skip
            notes.append(
                f"{network}: the tree has {len(tree.nodes)} nodes from {len(tree.explained)} "
                "decisions"
            )
    versions = {"torch": _all_versions()["torch"]}
    return Benchmark(_device_name(chosen), versions, rows, rounds, seed, tuple(notes))


def _round(
    subject: _Subject, image: Tensor, tree: Evidence, ablation: bool, bar: tqdm
) -> dict[tuple[str, str], float]:
    net = subject.net
    forward = _time(net, image)
    whole = _time(lambda images: evidence(net, images), image)
    stages = Counter(_stage(tree, id) for id in tree.explained)
    examples = {_stage(tree, id): id for id in tree.explained}
    plain = sum(
        count * _time(lambda images, id=examples[stage]: _plain(tree, images, id), image)
        for stage, count in stages.items()
    )
    found = {
        (BESIDE, FORWARD): (whole - forward) / forward,
        (PLAIN, BESIDE): plain / (whole - forward),
        (PLAIN, f"{TREE}, with its forward pass"): plain / whole,
    }
    if ablation:
        neurons = (tree.nodes[id].neuron for id in examples.values() if id != CLASS)
        for neuron in sorted(neurons):
            taken = _time(lambda _, neuron=neuron: ablate(net, tree.forward, neuron), image)
            channels = len(tree.forward.activations[neuron.stage - 2])
            case = f"{FORWARD} for each of the {channels} channels of stage {neuron.stage - 1}"
            baseline = f"ablation of stage {neuron.stage - 1}, one neuron above it"
            found[case, baseline] = channels * forward / taken
    bar.update()
    return found


def _stage(tree: Evidence, id: str) -> int:
    return len(tree.forward.activations) + 1 if id == CLASS else tree.nodes[id].stage


def _plain(tree: Evidence, image: Tensor, id: str) -> Tensor:
    # One decision as the thesis does it: the network forward, then back to the stage below.
    stage = _stage(tree, id)
    if id == CLASS:
        pieces = tree.forward.net.differentiable(image, [stage - 1])
        decision = pieces.output[0, tree.class_id]
    else:
        neuron: Neuron = tree.nodes[id].neuron
        pieces = tree.forward.net.differentiable(image, [stage - 1, stage])
        decision = pieces.activations[1][0][neuron[1:]]
    [gradient] = torch.autograd.grad(decision, pieces.activations[0])
    return gradient
