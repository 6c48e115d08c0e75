"""Figures of chapter 5: decisions decomposed into channels, and what that is worth."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle
from PIL import Image
from torch import Tensor

from ..cam import normalize
from ..crops import decompose
from ..localize import Box
from ..probes import occlude
from ..probes.adversarial import carlini_wagner
from ..probes.channels import (
    count_channels,
    discriminativeness,
    index_channels,
    stage_discriminativeness,
)
from ..probes.context import map_labels, scene_regions
from ..probes.diagnosis import attacked_channels, failures
from ..probes.importance import channel_importance, propagated_importance, removal_curve
from ..probes.pearson import contribution_curves, decompositions, overlap_counts
from ..probes.saliency import guided_backprop, integrated_gradients, pixel_map, smoothgrad
from ..probes.sanity import evidence_maps, parameter_randomization, weighted_layers
from ..probes.surrogate import surrogate
from ..stages import Staged
from ..tree import CLASS, Edge, Evidence, Node, evidence
from .examples import Example, Kind, class_label, need_stages
from .sheet import (
    COLUMN,
    PAGE,
    SMALL,
    TEXT,
    TINY,
    Sheet,
    blocky,
    canvas,
    map_over,
    map_tile,
    picture_grid,
    put_arrow,
    put_image,
    put_text,
)

__all__ = ["FIGURES"]

_STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
_COLORS = ("#0b559f", "#c2410c", "#4d7c0f", "#6b21a8")

Place = tuple[float, float, float, float]


# ----------------------------------------------------------------------------- parts of trees


def _tree(net: Staged, example: Example, **options: object) -> Evidence:
    return evidence(net, net.preprocess(example.picture), example.class_id, **options)


def _grown(net: Staged, example: Example, depth: int | None = None) -> Evidence:
    tree = _tree(net, example, depth=depth)
    if tree.note:
        raise ValueError(f"expected a picture with evidence for its class, got none: {tree.note}")
    return tree


def _seen(tree: Evidence) -> UInt8[np.ndarray, "h w 3"]:
    # The picture as the network takes it, in which fields are counted.
    net, image = tree.forward.net, tree.forward.image[0].detach()
    mean, std = (image.new_tensor(part)[:, None, None] for part in (net.mean, net.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return np.broadcast_to(pixels.cpu().numpy(), (*pixels.shape[:2], 3)).copy()


def _laid(tree: Evidence, edge: Edge) -> np.ndarray:
    return map_over(_seen(tree), normalize(edge.map.cpu()))


def _dot(axis: Axes, tree: Evidence, node: Node, place: Place, box: Box | None = None) -> None:
    # The neuron in a picture, or in a box of it, that is drawn at (x, y, width, height).
    (height, width), size = tree.forward.size(0), tree.forward.size(node.stage)
    x0, y0, x1, y1 = box or (0, 0, width, height)
    column = ((node.peak[1] + 0.5) / size[1] * width - x0) / (x1 - x0)
    row = ((node.peak[0] + 0.5) / size[0] * height - y0) / (y1 - y0)
    x, y, wide, tall = place
    axis.plot(x + column * wide, y + tall - row * tall, "o", ms=4, mfc="black", mec="white",
              mew=0.9)  # fmt: skip


def _magnified(tree: Evidence, edge: Edge) -> tuple[np.ndarray, Box]:
    # The map over what the decision can see, and which box of the picture that is; the box has the
    # picture's shape.
    picture = _seen(tree)
    height, width = picture.shape[:2]
    x0, y0, x1, y1 = (0, 0, width, height)
    if edge.parent != CLASS:
        x0, y0, x1, y1 = tree.nodes[edge.parent].field
        wide = max(x1 - x0, math.ceil((y1 - y0) * width / height))
        tall = math.ceil(wide * height / width)
        x0, y0 = min(x0, width - wide), min(y0, height - tall)
        x1, y1 = x0 + wide, y0 + tall
    map = torch.tensor(blocky(normalize(edge.map.cpu()).numpy(), picture))
    return map_over(picture[y0:y1, x0:x1], map[y0:y1, x0:x1]), (x0, y0, x1, y1)


def _excited(tree: Evidence, nodes: Sequence[Node]) -> list[np.ndarray]:
    # The guided gradients of nodes of one stage, grey where zero, as squares round what is above
    # a tenth of the maximum; flattened, since few values are large.
    found = []
    for window in tree.guided(*(node.id for node in nodes)):
        values = window.gradient.cpu()
        values = values / values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
        strong = values.abs().amax(dim=0) > 0.1
        strong |= ~strong.any()  # nothing that excites: all of it, in grey
        rows, columns = strong.any(dim=1).nonzero()[:, 0], strong.any(dim=0).nonzero()[:, 0]
        inside = values[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        pixels = 128 + 127 * inside.sign() * inside.abs() ** 0.7
        found.append(_square(pixels.byte().permute(1, 2, 0).numpy()))
    return found


def _square(pixels: UInt8[np.ndarray, "h w c"], side: int = 112) -> UInt8[np.ndarray, "s s 3"]:
    # Kept in shape, on grey.
    height, width = pixels.shape[:2]
    size = max(height, width)
    padded = np.full((size, size, 3), 128, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    padded[top : top + height, left : left + width] = pixels
    return np.asarray(Image.fromarray(padded).resize((side, side), Image.Resampling.NEAREST))


def _name(net: Staged, class_id: int) -> str:
    return class_label(net, class_id).replace("\n", " ")


def _pyramid(net: Staged, examples: list[Example], seed: int) -> Sheet:
    tree = _grown(net, examples[0])
    picture = _seen(tree)
    ratio = picture.shape[0] / picture.shape[1]
    count, step = len(net.stage_names), 0.66
    figure, axis = canvas(PAGE, (count + 1) * step + 0.24)
    weights = tree._weights()
    middle, top = 3.2, count * step + step / 2
    side = min(1.0, 1.0 / ratio)
    put_image(axis, picture, 0.04, top + step / 2 - side * ratio, side)
    put_text(axis, 0.04 + side / 2, top + step / 2 - side * ratio - 0.1, "picture")
    put_text(axis, 5.9, top, "what excites the strongest", TEXT)
    put_text(axis, 0.04, 0.36, "circle: neuron,\nby its channel\nline: share", ha="left")
    name = f"“{_name(net, tree.class_id)}”, {tree.probability:.0%}"
    put_text(axis, middle, top, name, TEXT, zorder=4,
             bbox={"facecolor": "white", "edgecolor": "black", "lw": 0.8, "pad": 3})  # fmt: skip
    put_text(axis, 1.16, top, "decision", TEXT, ha="left")
    above = {CLASS: (middle, top)}
    for row in range(count):
        y, stage = top - (row + 1) * step, count - row
        parents: dict[str, list[Edge]] = {}
        for edge in (edge for parent in above for edge in tree.children(parent)):
            parents.setdefault(edge.child, []).append(edge)
        chosen = sorted(parents, key=lambda id: -weights[id])[: 3 + row]
        strongest = list({tree.nodes[id].channel: tree.nodes[id] for id in reversed(chosen)}
                         .values())[:-4:-1]  # fmt: skip
        chosen.sort(key=lambda id: np.mean([above[edge.parent][0] for edge in parents[id]]))
        gap = 0.4
        here = {id: (middle + (k - (len(chosen) - 1) / 2) * gap, y) for k, id in enumerate(chosen)}
        for id, (x, _) in here.items():
            for edge in parents[id]:
                ends = zip(above[edge.parent], (x, y), strict=True)
                axis.plot(*ends, color="0.45", lw=0.3 + 3 * edge.share, zorder=1)
            shade = str(0.75 + 0.25 * row / count)
            axis.add_patch(Circle((x, y), 0.15, facecolor=shade, ec="black", lw=0.8, zorder=2))
            put_text(axis, x, y, str(tree.nodes[id].channel), SMALL, zorder=3)
        put_text(axis, 1.16, y, f"stage {stage}", TEXT, ha="left")
        for position, (node, pixels) in enumerate(
            zip(strongest, _excited(tree, strongest), strict=True)
        ):
            x = 4.97 + position * 0.68
            put_image(axis, pixels, x, y - 0.21, 0.5)
            put_text(axis, x + 0.25, y - 0.275, f"no. {node.channel}", TINY)
        above = here
    return figure


def _propagation(net: Staged, examples: list[Example], seed: int) -> Sheet:
    deepest = need_stages(net, "5.2", 2)
    tree = _grown(net, examples[0], depth=2)
    edge = tree.children(CLASS)[0]
    decision, below = tree.nodes[edge.child], tree.children(edge.child)
    [window] = decompose(tree.forward, [decision.neuron], deepest - 1)
    side, step = 0.8, 0.97
    figure, axis = canvas(PAGE, len(below) * step + 0.42)
    top = axis.get_ylim()[1] - 0.36
    middle = top - len(below) * step / 2 + 0.06
    activation = tree.forward.activations[deepest - 1][decision.channel].detach()
    tile = map_tile(normalize(activation))
    tall = side * tile.shape[0] / tile.shape[1]
    put_image(axis, tile, 0.08, middle - tall / 2, side)
    _dot(axis, tree, decision, (0.08, middle - tall / 2, side, tall))
    facts = f"stage {deepest}, no. {decision.channel}\n{decision.activation:.2f} at the dot"
    put_text(axis, 0.08 + side / 2, middle + tall / 2 + 0.1, "decision $d$", TEXT)
    put_text(axis, 0.08 + side / 2, middle - tall / 2 - 0.17, facts)
    columns = {"gradient": 1.86, "activation": 2.98, "attention map": 4.1, "excites": 6.16}
    titles = {
        "gradient": r"gradient $G=\partial d/\partial F$",
        "activation": r"activation $F$",
        "attention map": r"attention map $A$",
        "excites": "what excites it",
    }
    for key, x in columns.items():
        put_text(axis, x + side / 2, top + 0.16, titles[key])
    put_text(axis, 5.53, top + 0.16, r"contribution $\alpha$")
    excited = _excited(tree, [tree.nodes[each.child] for each in below])
    start = 0.08 + side + 0.06
    for row, (child, pixels) in enumerate(zip(below, excited, strict=True)):
        node = tree.nodes[child.child]
        y = top - (row + 1) * step + 0.15
        center = y + tall / 2
        put_arrow(axis, (start, middle), (1.47, center))
        put_text(axis, 1.66, center, f"no.\n{node.channel}")
        gradient = window.whole(window.gradient)[node.channel].cpu()
        values = window.whole(window.activation)[node.channel].cpu()
        tiles = (_signed(gradient), map_tile(normalize(values)), map_tile(normalize(child.map)))
        for each, key in zip(tiles, columns, strict=False):
            put_image(axis, each, columns[key], y, side)
        _dot(axis, tree, node, (columns["attention map"], y, side, tall))
        put_text(axis, columns["activation"] - 0.16, center, "×", 11)
        put_text(axis, columns["attention map"] - 0.16, center, "=", 11)
        put_arrow(axis, (4.95, center), (5.17, center))
        text = f"{child.contribution:.3g}\n{child.share:.0%} of all > 0"
        put_text(axis, 5.58, center, text)
        put_image(axis, pixels, columns["excites"], y, side)
    put_text(axis, 1.86, 0.06, f"stage {deepest - 1}: the {len(below)} channels that contribute "
             "most; gradient grey where 0, darker below", ha="left")  # fmt: skip
    return figure


def _signed(map: Float[Tensor, "h w"], side: int = 112) -> UInt8[np.ndarray, "s s 3"]:
    grey = (128 + 127 * map / map.abs().max().clamp_min(1e-30)).byte().numpy()
    size = (side, round(side * map.shape[0] / map.shape[1]))
    large = Image.fromarray(grey).resize(size, Image.Resampling.NEAREST)
    return np.repeat(np.asarray(large)[..., None], 3, axis=2)


def _strongest_maps(net: Staged, examples: list[Example], seed: int) -> Sheet:
    deepest = need_stages(net, "5.3", 2)
    tree = _grown(net, examples[0], depth=2)
    decision = tree.nodes[tree.children(CLASS)[0].child]
    below = tree.children(decision.id)
    nodes = [tree.nodes[edge.child] for edge in below]
    rows = [[_laid(tree, edge) for edge in below], _excited(tree, nodes)]
    titles = [f"no. {node.channel}, {edge.share:.0%}"
              for node, edge in zip(nodes, below, strict=True)]  # fmt: skip
    labels = [f"stage {deepest - 1} maps of\nstage {deepest}, no. {decision.channel}",
              "what excites\nthe dot"]  # fmt: skip
    figure, axis, places = picture_grid(rows, titles, labels, COLUMN)
    for node, place in zip(nodes, places[0], strict=True):
        _dot(axis, tree, node, place)
    return figure


def _hierarchy(net: Staged, examples: list[Example], seed: int) -> Sheet:
    tree = _grown(net, examples[0])
    picture = _seen(tree)
    ratio = picture.shape[0] / picture.shape[1]
    count = len(net.stage_names)
    step = (PAGE - 0.04) / (count + 1)
    side, crop, row = step - 0.22, 0.54, 0.74
    low = side * ratio + 0.4
    figure, axis = canvas(PAGE, low + 3 * row + 0.3)
    middle = low + 1.5 * row
    top = axis.get_ylim()[1] - 0.1
    put_text(axis, 0.04 + side / 2, top, "decision", TEXT)
    put_text(axis, 0.04 + side / 2, middle, f"“{class_label(net, tree.class_id)}”\n"
             f"{tree.probability:.0%}", TEXT)  # fmt: skip
    put_image(axis, picture, 0.04, 0.2, side)
    put_text(axis, 0.04 + side / 2, 0.1, "picture")
    parent, start = CLASS, (0.04 + side - 0.05, middle)
    for number in range(1, count + 1):
        edges = tree.children(parent)
        nodes = [tree.nodes[edge.child] for edge in edges]
        x = 0.04 + number * step
        left = x + (side - crop) / 2
        if nodes:
            put_text(axis, x + side / 2, top, f"stage {nodes[0].stage}", TEXT)
        excited = _excited(tree, nodes)
        for edge, node, pixels, shift in zip(edges, nodes, excited, (0, 1, -1), strict=False):
            y = middle + shift * row
            axis.plot(*zip(start, (left - 0.03, y), strict=True), color="0.35",
                      lw=0.4 + 5 * edge.share)  # fmt: skip
            put_image(axis, pixels, left, y - crop / 2, crop)
            put_text(axis, left + crop / 2, y - crop / 2 - 0.085,
                     f"no. {node.channel}, {edge.share:.0%}", TINY)  # fmt: skip
        if not nodes:
            break
        frame = Rectangle((left, middle - crop / 2), crop, crop, fill=False, lw=1.8)
        axis.add_patch(frame)
        pixels, box = _magnified(tree, edges[0])
        tall = put_image(axis, pixels, x, 0.2, side)
        _dot(axis, tree, nodes[0], (x, 0.2, side, tall), box)
        put_text(axis, x + side / 2, 0.1, f"map of no. {nodes[0].channel}")
        parent, start = nodes[0].id, (left + crop + 0.03, middle)
    return figure


# ----------------------------------------------------------------------------------- samples


def _batch(net: Staged, examples: Sequence[Example]) -> Float[Tensor, "b c h w"]:
    images = [net.preprocess(each.picture) for each in examples]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"expected pictures that {net.name} takes at one size, got several; crop them alike"
        )
    return torch.cat(images)


def _known(examples: Sequence[Example], number: str) -> list[int]:
    ids = [each.class_id for each in examples]
    if None in ids:
        raise ValueError(
            f"expected pictures of known classes for figure {number}, got one without; give a "
            "folder of classes whose names the network knows"
        )
    return ids


def _score_ids(net: Staged, images: Tensor, examples: Sequence[Example]) -> Int[Tensor, " b"]:
    best = net(images).argmax(dim=1).tolist()
    pairs = zip(examples, best, strict=True)
    return torch.tensor([b if e.class_id is None else e.class_id for e, b in pairs])


def _chart(
    rows: int, columns: int, height: float, note: str, width: float = PAGE
) -> tuple[Sheet, np.ndarray]:
    figure = Sheet(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.tick_params(labelsize=SMALL, length=2, pad=1.5)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(note, fontsize=SMALL)
    return figure, axes


def _line(axis: Axes, x: Sequence[float], y: Sequence[float], number: int, label: str) -> None:
    style, marker = _STYLES[number]
    axis.plot(x, y, style, marker=marker, ms=3, lw=1.1, color=_COLORS[number], label=label)


def _explain(figure: Sheet, axis: Axes, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=columns, fontsize=SMALL, frameon=False,
                  loc="outside upper center")  # fmt: skip


def _named(axis: Axes, title: str = "", x: str = "", y: str = "") -> None:
    axis.set_title(title, fontsize=TEXT)
    axis.set_xlabel(x, fontsize=SMALL, labelpad=1)
    axis.set_ylabel(y, fontsize=SMALL, labelpad=1)


def _pictures(count: int) -> str:
    return f"{count} picture{'s' if count > 1 else ''}"


def _contributions(net: Staged, examples: list[Example], seed: int, most: int = 3) -> Sheet:
    images = _batch(net, examples)
    ids = _score_ids(net, images, examples)
    records = list(decompositions(net, images, ids, fills=("zero",), most=most, progress=True))
    curves, counts = contribution_curves(records), overlap_counts(records)
    stages = counts["stage"].tolist()
    rows = -(-(len(stages) + 1) // 3)
    note = (f"{_pictures(len(images))}; the class and at most {most} neurons of each stage, "
            "mean over decisions")  # fmt: skip
    figure, axes = _chart(rows, 3, 1.65 * rows + 0.2, note)
    for axis, stage in zip(axes.flat, reversed(stages), strict=False):
        one = curves[curves["stage"] == stage]
        axis.plot(one["rank"], 100 * one["removal"], "--", lw=1.8, color="0.6", label="removal")
        axis.plot(one["rank"], 100 * one["gap"], "-", lw=0.9, color="black", label="gAP")
        _named(axis, f"(a) stage {stage}", "channels, sorted", "contribution (%)")
    axes[0, 0].legend(fontsize=SMALL, frameon=False)
    axis = axes.flat[len(stages)]
    looks = {"active": ("0.35", ""), "overlapping": ("white", "////"), "total": ("0.8", "")}
    for number, (name, (color, hatch)) in enumerate(looks.items()):
        places = np.arange(len(stages)) + (number - 1) * 0.27
        axis.bar(places, counts[name], 0.27, color=color, hatch=hatch, ec="black", lw=0.5,
                 label=name)  # fmt: skip
    axis.set_xticks(range(len(stages)), stages)
    axis.legend(fontsize=SMALL, frameon=False)
    _named(axis, "(b) channels", "stage", "channels per decision")
    for axis in axes.flat[len(stages) + 1 :]:
        axis.set_visible(False)
    return figure


def _discriminative(net: Staged, examples: list[Example], seed: int, least: int = 5) -> Sheet:
    ids = _known(examples, "5.6")
    trees = ((id, _tree(net, each)) for id, each in zip(ids, examples, strict=True))
    counts = count_channels(trees)
    table = discriminativeness(counts)
    table = table[table["count"] >= least]
    if table.empty:
        raise ValueError(
            f"expected channels that are counted {least} times for figure 5.6, got none; give "
            "more pictures"
        )
    means = stage_discriminativeness(counts, least)
    classes = len(set(ids))
    note = (f"{_pictures(len(ids))} of {classes} classes;\n"
            f"channels counted {least} times or more")  # fmt: skip
    figure, [[axis]] = _chart(1, 1, 2.5, note, COLUMN)
    spread = np.random.default_rng(seed).uniform(-0.16, 0.16, len(table))
    axis.plot(table["stage"] + spread, table["discriminativeness"], "o", ms=2.6, mfc="0.75",
              mec="0.5", mew=0.4, label="channel")  # fmt: skip
    axis.plot(means.index, means, "k-s", ms=4, lw=1.2, label="mean")
    axis.axhline(1 / classes, color="black", ls=":", lw=0.9, label="least, 1 / classes")
    for stage, size in table.groupby("stage").size().items():
        axis.text(stage, 1.05, f"{size} ch.", fontsize=SMALL, ha="center", va="bottom")
    axis.set(ylim=(0, 1.14), xticks=means.index)
    _explain(figure, axis, 3)
    _named(axis, "", "stage", "discriminativeness $D$")
    return figure


def _sanity(net: Staged, examples: list[Example], seed: int) -> Sheet:
    images = _batch(net, examples)
    ids = _score_ids(net, images, examples)
    maps = {
        "gAP": evidence_maps,
        "SG": lambda n, x, c: pixel_map(smoothgrad(n, x, c, samples=10)),
        "GB": lambda n, x, c: pixel_map(guided_backprop(n, x, c)),
        "IG": lambda n, x, c: pixel_map(integrated_gradients(n, x, c, steps=10)),
    }
    layers = weighted_layers(net)
    table = parameter_randomization(net, images, maps, ids, seed=seed, progress=True)
    means = table.groupby(["method", "position"])["spearman"].mean()
    note = (f"{_pictures(len(images))}; SG: SmoothGrad of 10 samples, GB: guided "
            "backpropagation,\nIG: integrated gradients of 10 steps; random weights from left "
            "to right, cumulative")  # fmt: skip
    figure, [[axis]] = _chart(1, 1, 3.0, note, PAGE)
    for number, method in enumerate(maps):
        values = means[method].reindex(range(1, len(layers) + 1))
        _line(axis, range(len(layers) + 1), [1.0, *values], number, method)
    axis.axhline(0, color="0.6", lw=0.6)
    step = -(-len(layers) // 20)  # as many names as can be read
    names = ["none", *layers][::step]
    axis.set_xticks(range(0, len(layers) + 1, step), names, rotation=40, ha="right")
    _explain(figure, axis, 4)
    _named(axis, "", "", "rank correlation with the maps\nof the trained network")
    return figure


def _surrogate(net: Staged, examples: list[Example], seed: int) -> Sheet:
    ids = _known(examples, "5.8")
    tops = (1, 2, 4, 8, 16)
    images = _batch(net, examples)
    table = surrogate(net, images, ids, tops=tops, progress=True)
    means = 100 * table.groupby("top")[["accurate", "matches", "kept"]].mean()
    whole = 100 * (table["class_id"] == table["predicted"]).mean()
    figure, [[axis]] = _chart(1, 1, 2.3, _pictures(len(ids)), COLUMN)
    axis.axhline(whole, color="0.75", lw=4, label="accuracy, whole network")
    places = range(len(tops))
    axis.plot(places, means["accurate"], "-o", ms=6, lw=2.6, color="0.5", label="accuracy")
    _line(axis, places, means["matches"], 1, "match rate")
    _line(axis, places, means["kept"], 3, "share of channels kept")
    axis.set_xticks(places, tops)
    axis.set_ylim(-3, 108)
    _explain(figure, axis, 2)
    _named(axis, "", "channels for each decision", "%")
    return figure


def _removal(
    net: Staged, examples: list[Example], seed: int, most: int = 16, steps: int = 10
) -> Sheet:
    ids = _known(examples, "5.9")
    deepest = need_stages(net, "5.9", 3)
    images = _batch(net, examples)
    trees = [_tree(net, each, top=most, depth=3) for each in examples]
    names = {"gAP": None, "LRP": "lrp", "conductance": "conductance",
             "internal influence": "internal_influence"}  # fmt: skip
    note = (f"{_pictures(len(ids))}; gAP: trees of {most} channels for each decision; "
            f"conductance and influence in {steps} steps; lower is better")  # fmt: skip
    figure, axes = _chart(1, 3, 2.2, note)
    for axis, stage in zip(axes[0], range(deepest - 2, deepest + 1), strict=True):
        channels = len(trees[0].forward.activations[stage - 1])
        importances = {
            name: torch.stack([propagated_importance(tree, stage, channels) for tree in trees])
            if method is None
            else channel_importance(net, images, ids, method, stage=stage, steps=steps)
            for name, method in names.items()
        }
        counts = [n for n in (1, 2, 4, 8, 16) if n < channels]
        table = removal_curve(net, images, ids, importances, stage=stage, counts=counts)
        for number, name in enumerate(names):
            one = table[table["method"] == name]
            _line(axis, range(len(one)), 100 * one["accuracy"], number, name)
        axis.set_xticks(range(len(counts) + 1), [0, *counts])
        axis.set_ylim(-3, 105)
        _named(axis, f"stage {stage}", "channels removed")
    axes[0, 0].set_ylabel("accuracy (%)", fontsize=SMALL)
    axes[0, 0].legend(fontsize=SMALL, frameon=False)
    return figure


# ---------------------------------------------------------------------------------- failures


@dataclass(frozen=True)
class _Picture:
    image_id: str
    image: UInt8[np.ndarray, "h w 3"]


def _failures(
    net: Staged, examples: list[Example], seed: int, number: str, most: int, cover: bool
) -> Sheet:
    deepest = need_stages(net, number, 2)
    ids = _known(examples, number)
    found = []
    for start in range(0, len(examples), 32):
        part = slice(start, start + 32)
        wrong = failures(net, _batch(net, examples[part]), ids[part])
        found += wrong.assign(image=wrong["image"] + start).itertuples()
    if not found:
        raise ValueError(
            f"expected a picture whose class {net.name} gets wrong for figure {number}, got "
            f"{len(ids)} that it gets right; give other ones or another seed"
        )
    found.sort(key=lambda row: -row.predicted_probability)
    data = [_Picture(each.name, each.picture) for each in examples[:100]]
    index = index_channels(net, data, [deepest - 1], top=4, progress=False)
    rows, below, trees = [], [], []
    for wrong in found[:most]:
        example = replace(examples[wrong.image], class_id=wrong.predicted)
        tree = _grown(net, example, depth=2)
        edges = tree.children(CLASS)[:1]
        edges += tree.children(edges[0].child)[:1]
        channel = tree.nodes[edges[-1].child].channel
        texts = [f"{_name(net, wrong.predicted)} {wrong.predicted_probability:.0%}, "
                 f"true: {_name(net, wrong.class_id)}"]  # fmt: skip
        texts += [f"no. {tree.nodes[edge.child].channel}, {edge.share:.0%}" for edge in edges]
        texts.append(f"of no. {channel}")
        patches = _mosaic(index.pictures(deepest - 1, channel))
        shown = [_seen(tree), *(_laid(tree, edge) for edge in edges), patches]
        if cover:
            covered = occlude(net, tree.forward.image, edges[-1].map[None], 0.5)
            after = evidence(net, covered, wrong.class_id, depth=1)
            shown.append(_seen(after))
            texts.append(f"{_name(net, wrong.class_id)} {wrong.class_probability:.0%} → "
                         f"{after.probability:.0%}")  # fmt: skip
        rows.append(shown)
        below.append(texts)
        trees.append((tree, edges))
    titles = ["picture", f"stage {deepest}", f"stage {deepest - 1}", "strongest patches"]
    titles += ["map covered"] if cover else []
    figure, axis, places = picture_grid(rows, titles, [""] * len(rows), PAGE, below=0.19)
    for texts, (tree, edges), line in zip(below, trees, places, strict=True):
        for text, (x, y, width, _) in zip(texts, line, strict=True):
            put_text(axis, x + width / 2, y - 0.09, text)
        for edge, place in zip(edges, line[1:], strict=False):
            _dot(axis, tree, tree.nodes[edge.child], place)
    return figure


def _mosaic(patches: Sequence[np.ndarray], side: int = 110) -> UInt8[np.ndarray, "h w 3"]:
    blank = np.full((side, side, 3), 255, np.uint8)
    tiles = [_square(patch, side) for patch in patches[:4]]
    tiles = [np.pad(tile, ((1, 1), (1, 1), (0, 0)), constant_values=255)
             for tile in [*tiles, *[blank] * (4 - len(tiles))]]  # fmt: skip
    return np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])


# ----------------------------------------------------------------------------------- attacks


def _attack(net: Staged, examples: list[Example], seed: int, top: int = 4) -> Sheet:
    images = _batch(net, examples)
    best = net(images).topk(2, dim=1).indices
    true, wanted = best[:, 0], best[:, 1]
    attack = carlini_wagner(
        net, images, wanted, confidence=2.0, searches=1, steps=60, learning_rate=0.01,
        constant=10.0, progress=True,
    )  # fmt: skip
    if not attack.success.any():
        raise ValueError("expected an attack that succeeds, got none; give other pictures")
    kept = attack.success.nonzero()[:, 0]
    table = attacked_channels(
        net, images[kept], attack.images[kept], true[kept], wanted[kept], top=top
    )
    first = int(kept[0])
    picture = examples[first].picture
    ratio, cell, gap = picture.shape[0] / picture.shape[1], 1.13, 0.05
    row, low = cell * ratio + 0.22, 1.9
    figure, axis = canvas(PAGE, low + 2 * row + 0.26)
    ceiling = axis.get_ylim()[1] - 0.1
    left = (PAGE - 5 * cell - 0.3 - 3 * gap) / 2 + 0.1
    place = len(net.stage_names)
    put_text(axis, left + cell / 2, ceiling, "(a) picture", TEXT)
    title = f"the {top} channels of stage {place} that contribute most"
    put_text(axis, left + 3 * cell + 0.36, ceiling, title, TEXT)
    cases = (("original", images, true), ("attacked", attack.images, wanted))
    for number, (what, batch, ids) in enumerate(cases):
        class_id = int(ids[first])
        tree = evidence(net, batch[first : first + 1], class_id, top, depth=1)
        y = low + (1 - number) * row + 0.18
        put_text(axis, left - 0.12, y + cell * ratio / 2, what, TEXT, rotation=90)
        put_image(axis, _seen(tree), left, y, cell)
        put_text(axis, left + cell / 2, y - 0.09, f"{_name(net, class_id)} {tree.probability:.0%}")
        for position, edge in enumerate(tree.children(CLASS)):
            x = left + cell + 0.28 + position * (cell + gap)
            if position == 0:
                put_arrow(axis, (left + cell + 0.04, y + cell * ratio / 2),
                          (x - 0.04, y + cell * ratio / 2))  # fmt: skip
            node = tree.nodes[edge.child]
            tall = put_image(axis, _laid(tree, edge), x, y, cell)
            _dot(axis, tree, node, (x, y, cell, tall))
            put_text(axis, x + cell / 2, y - 0.09, f"no. {node.channel}, {edge.share:.0%}")
    names = {"true": f"of {_name(net, int(true[first]))}",
             "wanted": f"of {_name(net, int(wanted[first]))}"}  # fmt: skip
    one = table[table["image"] == 0]
    mean = table.groupby(["of", "rank"])[["original", "attacked"]].mean().reset_index()
    height = axis.get_ylim()[1]
    size = (0.385, 1.05 / height)
    charts = [figure.add_axes((x, 0.5 / height, *size)) for x in (0.075, 0.59)]
    _peaks(charts[0], one, one["channel"], names)
    _named(charts[0], "(b) this picture", "", "largest activation")
    _peaks(charts[1], mean, mean["rank"], {"true": "of the class before, by rank",
                                           "wanted": "of the class after"})  # fmt: skip
    found = f"{len(kept)} of {_pictures(len(images))} attacked"
    _named(charts[1], f"(c) mean, {found} with success", "", "largest activation")
    charts[0].legend(fontsize=SMALL, frameon=False, ncols=2, loc="upper center",
                     bbox_to_anchor=(0.5, 1.06))  # fmt: skip
    return figure


def _peaks(
    axis: Axes, table: pd.DataFrame, ticks: Sequence[int], names: Mapping[str, str]
) -> None:
    # Bars before and after, for the channels of two classes.
    half = len(table) // 2
    places = np.arange(len(table)) + 0.6 * (np.arange(len(table)) >= half)
    axis.bar(places - 0.19, table["original"], 0.38, color="white", hatch="////", ec="black",
             lw=0.6, label="original")  # fmt: skip
    axis.bar(places + 0.19, table["attacked"], 0.38, color="0.3", ec="black", lw=0.6,
             label="attacked")  # fmt: skip
    axis.set_xticks(places, ticks)
    axis.set_ylim(0, 1.3 * table[["original", "attacked"]].max().max())
    axis.tick_params(labelsize=SMALL, length=2, pad=1.5)
    axis.spines[["top", "right"]].set_visible(False)
    for center, of in ((places[:half].mean(), "true"), (places[half:].mean(), "wanted")):
        axis.text(center, -0.2, names[of], fontsize=SMALL, ha="center", va="top",
                  transform=axis.get_xaxis_transform())  # fmt: skip


# ----------------------------------------------------------------------------------- context


def _regions(example: Example) -> Mapping[str, Bool[np.ndarray, "h w"]]:
    if example.regions is not None:
        return example.regions
    return {} if example.scene is None else scene_regions(example.scene)


def _context(net: Staged, examples: list[Example], seed: int) -> Sheet:
    deepest = need_stages(net, "5.13", 2)
    rows, below, labels, trees = [], [], [], []
    for each in examples:
        tree = _grown(net, each, depth=2)
        table = map_labels(tree, _regions(each))
        labelled = dict(zip(tree.edges, table.itertuples(), strict=True))
        edges = tree.children(CLASS)[:1]
        edges += tree.children(edges[0].child)
        texts = []
        for edge in edges:
            found = labelled[edge]
            text = f"no. {found.channel}, {edge.share:.0%}"
            if found.iou > 0:
                text += f"\n{found.label}, IoU {found.iou:.2f}"
            texts.append(text)
        shown = [_laid(tree, edge) for edge in edges]
        blank = [np.full_like(shown[0], 255)] * (4 - len(shown))
        rows.append([_seen(tree), *shown, *blank])
        below.append(texts)
        labels.append(class_label(net, tree.class_id))
        trees.append((tree, edges))
    titles = ["picture", f"stage {deepest}", "", f"stage {deepest - 1}", ""]
    figure, axis, places = picture_grid(rows, titles, labels, PAGE, below=0.3)
    for texts, (tree, edges), line in zip(below, trees, places, strict=True):
        for text, edge, place in zip(texts, edges, line[1:], strict=False):
            put_text(axis, place[0] + place[2] / 2, place[1] - 0.03, text, va="top")
            _dot(axis, tree, tree.nodes[edge.child], place)
    return figure


def _context_shares(net: Staged, examples: list[Example], seed: int) -> Sheet:
    deepest = need_stages(net, "5.14", 2)
    ids = _known(examples, "5.14")
    chosen = [pair for pair in zip(ids, examples, strict=True) if len(_regions(pair[1])) > 1]
    if not chosen:
        raise ValueError(
            "expected pictures with masks of what lies where for figure 5.14, got none with two "
            "or more; give Example(picture, class_id, regions=...) or leave `pictures` out"
        )
    tables = [map_labels(_tree(net, each, depth=2), _regions(each)) for _, each in chosen]
    table = pd.concat(tables)
    table = table[table["stage"] == deepest - 1]
    labels = table["label"].where(table["iou"] > 0, "none")
    counts = dict(sorted(Counter(id for id, _ in chosen).most_common(12)))
    columns = min(4, len(counts))
    rows = -(-len(counts) // columns)
    note = (f"maps of stage {deepest - 1} in {_pictures(len(chosen))} (n for each class), by the "
            "region of the largest\nintersection over union, none where it is 0")  # fmt: skip
    figure, axes = _chart(rows, columns, 1.15 * rows + 0.4, note)
    for axis, (class_id, count) in zip(axes.flat, counts.items(), strict=False):
        own = labels[table["class_id"] == class_id]
        part = 100 * own.value_counts(normalize=True)[:4]
        axis.bar(range(len(part)), part, 0.6, color="0.6", ec="black", lw=0.6)
        for place, value in enumerate(part):
            axis.text(place, value + 2, f"{value:.0f}", fontsize=SMALL, ha="center", va="bottom")
        names = ["object" if name == _name(net, class_id) else name for name in part.index]
        axis.set_xticks(range(len(part)), [name.replace(" ", "\n") for name in names],
                        fontsize=TINY)  # fmt: skip
        axis.set(ylim=(0, 119), xlim=(-0.6, 3.6), yticks=(0, 50, 100))
        _named(axis, f"{_name(net, class_id)}, n = {count}", "", "maps (%)")
    for axis in axes.flat[len(counts) :]:
        axis.set_visible(False)
    for axis in axes[:, 1:].flat:
        axis.set_ylabel("")
    return figure


FIGURES = {
    "5.1": Kind("The pyramid of evidence behind a decision", _pyramid),
    "5.2": Kind("Gradient-based activation propagation (gAP)", _propagation),
    "5.3": Kind("The most important attention maps of a stage", _strongest_maps),
    "5.4": Kind("A decision decomposed down to the first stage", _hierarchy),
    "5.5": Kind("Contributions of channels, and how many overlap", _contributions, sample=12),
    "5.6": Kind("How much channels belong to one class", _discriminative, sample=72),
    "5.7": Kind(
        "Sanity check: weights made random, layer by layer", _sanity, "scenes_conv", sample=3
    ),
    "5.8": Kind("Sparse surrogates of a network", _surrogate, "scenes_conv", sample=12),
    "5.9": Kind(
        "Accuracy without the most important channels", _removal, "scenes_conv", sample=12
    ),
    "5.10": Kind(
        "A failure, traced to a channel",
        partial(_failures, number="5.10", most=1, cover=True), sample=300,
    ),
    "5.11": Kind(
        "More failures", partial(_failures, number="5.11", most=5, cover=False), sample=300
    ),
    "5.12": Kind("What an attack does to channels", _attack, "scenes_conv", sample=4),
    "5.13": Kind(
        "What lies under the maps of a decision", _context,
        wanted=("ox", "ram", "taxi", "fire engine"), in_context=True,
    ),
    "5.14": Kind("On what the maps of each class lie", _context_shares, sample=120),
}  # fmt: skip
