"""Figures of chapter 3: LayerCAM."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..cam import fuse, normalize
from ..colors import palette
from ..localize import box_iou, map_to_box
from ..probes import gradient_variance
from ..stages import Staged
from .examples import NAMES, Example, Kind, class_label, example_maps, need_stages, phased
from .sheet import (
    COLUMN,
    FOUND,
    PAGE,
    SMALL,
    TEXT,
    TINY,
    TRUTH,
    Sheet,
    canvas,
    color_bar,
    enlarged,
    map_over,
    map_tile,
    picture_grid,
    put_arrow,
    put_box,
    put_image,
    put_outline,
    put_text,
)

__all__ = ["FIGURES"]


def _compared(
    net: Staged, examples: list[Example], methods: Sequence[str], stages: Sequence[int]
) -> Sheet:
    # A row for each method below each other; the picture and a color bar in the first column.
    rows, labels = [], []
    for each in examples:
        maps, picture = example_maps(net, each, methods, stages), enlarged(each.picture)
        for method in methods:
            shown = [map_over(each.picture, map) for map in phased(maps, method, net)]
            first = picture if method == methods[0] else np.full_like(picture, 255)
            rows.append([first, *shown])
            labels.append(class_label(net, int(maps.class_ids[0])))
    titles = ["picture", *(f"stage {stage}" for stage in stages)]
    figure, axis, places = picture_grid(
        rows, titles, [NAMES[m] for m in methods] * len(examples), COLUMN
    )
    for line, name in list(zip(places, labels, strict=True))[1 :: len(methods)]:
        x, y, width, height = line[0]
        middle = y + height / 2
        put_text(axis, x + width / 2, middle + 0.22, f"class\n“{name}”")
        color_bar(axis, x + 0.1 * width, middle - 0.18, 0.8 * width)
    return figure


def _two_methods(net: Staged, examples: list[Example], seed: int) -> Sheet:
    count = need_stages(net, "3.1", 3)
    return _compared(net, examples, ("gradcam", "layercam"), (count - 2, count))


def _shallow(net: Staged, examples: list[Example], seed: int) -> Sheet:
    count = need_stages(net, "3.2", 4)
    return _compared(net, examples, ("gradcam", "gradcam_pp"), tuple(range(count - 3, count)))


def _variance(net: Staged, examples: list[Example], seed: int) -> Sheet:
    tables = [
        gradient_variance(net, net.preprocess(each.picture), each.class_id) for each in examples
    ]
    keys = ["method", "stage", "channel"]
    table = pd.concat(tables).groupby(keys)[["variance", "relative"]].mean()
    count = len(net.stage_names)
    blocks, channels = _channel_blocks(net, examples[0], seed)
    picture = enlarged(examples[0].picture)
    ratio = picture.shape[0] / picture.shape[1]
    cell = min((PAGE - 0.3) / (count + 1) - 0.08, 1.05 / ratio)
    height = 2.4 + cell * ratio
    figure = Sheet(figsize=(PAGE, height), dpi=130)
    for column, (method, what) in enumerate(
        (m, w) for m in ("gradcam", "gradcam_pp") for w in ("variance", "relative")
    ):
        axis = figure.add_axes((0.065 + column * 0.243, 1 - 1.53 / height, 0.185, 1.24 / height))
        for stage in range(1, count + 1):
            _curve(axis, table.loc[method, stage][what].dropna().to_numpy(), stage, count)
        if what == "variance":
            axis.set_yscale("log")
            title = f"({'ab'[column // 2]}) {NAMES[method]}"
            axis.set_title(title, fontsize=TEXT, pad=4, x=1.16)
        else:
            axis.set_ylim(0, 1.04)
        axis.set_ylabel("variance" if what == "variance" else "variance / mean square",
                        fontsize=SMALL, labelpad=1)  # fmt: skip
        axis.set_xlabel("feature maps, sorted (%)", fontsize=SMALL, labelpad=1)
        axis.tick_params(labelsize=TINY, length=2, pad=1.5)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=count, fontsize=SMALL, frameon=False, loc="upper center",
        bbox_to_anchor=(0.5, 1 - 1.81 / height), handlelength=3.2,
    )  # fmt: skip
    _channel_row(figure, picture, cell, blocks, channels)
    return figure


def _curve(axis: Axes, values: np.ndarray, stage: int, count: int) -> None:
    shares = (np.arange(len(values)) + 0.5) / max(len(values), 1) * 100
    color = palette("inferno")[round((stage - 1) / max(count - 1, 1) * 190)] / 255
    axis.plot(
        shares, np.sort(values)[::-1], color=color, lw=1.1, label=f"stage {stage}",
        linestyle=("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))[(stage - 1) % 5],
        marker="osD^v"[(stage - 1) % 5], markersize=2.6, markevery=0.25,
    )  # fmt: skip


def _channel_blocks(
    net: Staged, example: Example, seed: int
) -> tuple[list[np.ndarray], list[list[int]]]:
    # Four channels of each stage, chosen at random among those that vary, as 2 x 2 pictures.
    with torch.no_grad():
        activations, _ = net.activations(net.preprocess(example.picture))
    generator = np.random.default_rng(seed)
    blocks, numbers = [], []
    for activation in activations:
        varied = (activation[0].amax((1, 2)) > activation[0].amin((1, 2))).nonzero()[:, 0].tolist()
        chosen = sorted(generator.choice(varied, min(4, len(varied)), replace=False).tolist())
        tiles = [
            np.pad(
                map_tile(normalize(activation[0, k])),
                ((3, 3), (3, 3), (0, 0)),
                constant_values=255,
            )
            for k in chosen
        ]
        tiles += [np.full_like(tiles[0], 255)] * (4 - len(tiles))
        blocks.append(np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])]))
        numbers.append(chosen)
    return blocks, numbers


def _channel_row(
    figure: Sheet,
    picture: np.ndarray,
    cell: float,
    blocks: list[np.ndarray],
    channels: list[list[int]],
) -> None:
    tall = 0.36 + cell * picture.shape[0] / picture.shape[1]
    axis = figure.add_axes((0, 0, 1, tall / figure.get_figheight()), label="channels")
    axis.set(xlim=(0, PAGE), ylim=(0, tall))
    axis.axis("off")
    start = (PAGE - (cell + 0.08) * (len(blocks) + 1)) / 2 + 0.08
    put_text(axis, start - 0.11, tall / 2 - 0.01, "(c) feature maps", TEXT, rotation=90)
    height = put_image(axis, picture, start, 0.17, cell)
    put_text(axis, start + cell / 2, 0.17 + height + 0.09, "picture", SMALL)
    for position, (block, numbers) in enumerate(zip(blocks, channels, strict=True), start=1):
        x = start + position * (cell + 0.08)
        height = put_image(axis, block, x, 0.17, cell)
        put_text(axis, x + cell / 2, 0.17 + height + 0.09, f"stage {position}", SMALL)
        put_text(axis, x + cell / 2, 0.08, "no. " + ", ".join(map(str, numbers)), TINY)


def _pipeline(net: Staged, examples: list[Example], seed: int) -> Sheet:
    count = need_stages(net, "3.4", 3)
    example = examples[0]
    maps = example_maps(net, example)
    raw = [stage[0] for stage in maps["layercam"]]
    fused = fuse(raw[-3:], size=example.picture.shape[:2])
    picture = enlarged(example.picture)
    ratio = picture.shape[0] / picture.shape[1]
    wide = 0.86 / max(ratio, 0.9)
    tall = wide * ratio
    figure, axis = canvas(PAGE, 2 * tall + 0.66)
    top, low = tall + 0.64, 0.22
    middle, left, gap = top + tall / 2, wide + 0.3, 0.05
    cell = min(wide, (PAGE - left - 2 * wide - 0.62) / count - gap)
    bar = cell * 0.64
    put_image(axis, picture, 0.02, top, wide)
    put_text(axis, 0.02 + wide / 2, top - 0.09, "picture")
    put_text(axis, left - 0.08, low + cell * ratio / 2, "LayerCAM", TEXT, ha="right")
    end = wide + 0.05
    for number, map in enumerate(phased(maps, "layercam", net)):
        x, height = left + number * (cell + gap), tall * (1 - 0.5 * number / (count - 1))
        center = x + cell / 2
        put_arrow(axis, (end, middle), (center - bar / 2, middle))
        end = center + bar / 2
        put_box(axis, center - bar / 2, middle - height / 2, bar, height, f"stage {number + 1}")
        drawn = put_image(axis, map_over(example.picture, map), x, low, cell)
        put_arrow(axis, (center, middle - height / 2), (center, low + drawn + 0.03))
        put_text(axis, center, low - 0.1, f"$M^{{({number + 1})}}$", TEXT)
        if number >= count - 3:
            axis.add_patch(Rectangle((x, low), cell, drawn, fill=False, lw=1.8, color="black"))
    right = left + count * (cell + gap) - gap
    name = class_label(net, int(maps.class_ids[0]))
    put_arrow(axis, (end, middle), (right + 0.12, middle))
    put_text(axis, right + 0.15, middle, f"score $y$ of “{name}”", TEXT, ha="left")
    formulas = (
        r"$g^k = \partial y\,/\,\partial A^k$",
        r"$M = \mathrm{ReLU}\,(\sum_k \mathrm{ReLU}(g^k)\,A^k)$",
    )
    for line, formula in enumerate(formulas, start=1):
        put_text(axis, right + 0.15, middle - 0.24 * line, formula, TEXT, ha="left")
    x, pixels = right + 0.3, map_over(example.picture, fused.clamp(0, 1), smooth=True)
    put_arrow(axis, (right + 0.04, low + drawn / 2), (x - 0.03, low + drawn / 2))
    put_image(axis, pixels, x, low, wide)
    put_text(axis, x + wide / 2, low - 0.1, f"fused, stages {count - 2} to {count}", SMALL)
    put_arrow(axis, (x + wide + 0.03, low + drawn / 2), (x + wide + 0.26, low + drawn / 2))
    x += wide + 0.29
    put_image(axis, picture, x, low, wide)
    box = map_to_box(fused, 0.4)
    if box is not None:
        place = (x, low, wide, tall)
        put_outline(axis, box, example.picture.shape[:2], place, FOUND, (0, (3, 1.5)))
    put_text(axis, x + wide / 2, low - 0.1, "box, above 40 %", SMALL)
    return figure


def _stages(net: Staged, examples: list[Example], seed: int) -> Sheet:
    count = need_stages(net, "3.5", 3)
    rows, names = [], []
    for each in examples:
        maps = example_maps(net, each)
        fused = fuse([stage[0] for stage in maps["layercam"][-3:]], size=each.picture.shape[:2])
        shown = [map_over(each.picture, map) for map in phased(maps, "layercam", net)]
        rows.append([enlarged(each.picture), *shown, map_over(each.picture, fused, smooth=True)])
        names.append(class_label(net, int(maps.class_ids[0])))
    titles = ["picture", *(f"stage {number}" for number in range(1, count + 1))]
    titles.append("fused " + "+".join(map(str, range(count - 2, count + 1))))
    return picture_grid(rows, titles, names, PAGE)[0]


def _boxes(net: Staged, examples: list[Example], seed: int, threshold: float = 0.15) -> Sheet:
    need_stages(net, "3.6", 3)
    if not all(each.boxes for each in examples):
        raise ValueError(
            "expected pictures with true boxes for figure 3.6, got one without; give a folder "
            "with a list of boxes, or leave `pictures` out"
        )
    methods = ("gradcam", "gradcam_pp", "layercam")
    rows, found, names = [], [], []
    for each in examples:
        maps, size = example_maps(net, each, methods), each.picture.shape[:2]
        deep = [fuse([maps[m][-1][0]], size=size, scaled="none") for m in methods[:2]]
        fused = fuse([stage[0] for stage in maps["layercam"][-3:]], size=size)
        rows.append([enlarged(each.picture)])
        rows[-1] += [
            map_over(each.picture, map.clamp(0, 1), smooth=True) for map in (*deep, fused)
        ]
        found.append([map_to_box(map, threshold) for map in (*deep, fused)])
        names.append(class_label(net, int(maps.class_ids[0])))
    titles = ["picture", *(NAMES[method] for method in methods)]
    figure, axis, places = picture_grid(rows, titles, names, COLUMN, below=0.15)
    for each, line, boxes in zip(examples, places, found, strict=True):
        for place in line:
            for box in each.boxes:
                put_outline(axis, box, each.picture.shape[:2], place, TRUTH)
        for (x, y, width, height), box in zip(line[1:], boxes, strict=True):
            iou = max(box_iou(box, truth) for truth in each.boxes) if box else 0.0
            if box is not None:
                place = (x, y, width, height)
                put_outline(axis, box, each.picture.shape[:2], place, FOUND, (0, (3, 1.5)))
            put_text(axis, x + width / 2, y - 0.075, f"IoU {iou:.2f}")
    return figure


FIGURES = {
    "3.1": Kind("Grad-CAM and LayerCAM, a shallow and the deepest stage", _two_methods),
    "3.2": Kind(
        "Grad-CAM and Grad-CAM++ in shallow stages", _shallow, wanted=("horse", "fire engine")
    ),
    "3.3": Kind(
        "How much the gradient varies within a feature map", _variance,
        wanted=("horse", "deer", "fire engine", "steamer"),
    ),
    "3.4": Kind("LayerCAM: maps of all stages, fused", _pipeline),
    "3.5": Kind(
        "LayerCAM, stage by stage, and fused", _stages,
        wanted=("horse", "fire engine", "steamer", "deer"),
    ),
    "3.6": Kind(
        "Boxes of three methods against the truth", _boxes, "scenes_conv",
        ("horse", "taxi", "trawler", "crane ship"),
    ),
}  # fmt: skip
