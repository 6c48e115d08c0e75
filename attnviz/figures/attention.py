"""Figures of chapters 1 and 2: what attention maps are, what they cost, how they are made."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

from ..cam import fuse, normalize, resize
from ..colors import palette
from ..explain import excitation_backprop, stage_maps
from ..localize import map_to_box
from ..stages import Pieces, Staged
from .examples import Example, Kind, class_label, example_maps
from .sheet import (
    COLUMN,
    PAGE,
    SMALL,
    TEXT,
    TINY,
    TRUTH,
    Sheet,
    canvas,
    enlarged,
    greyed,
    map_over,
    map_tile,
    picture_grid,
    put_arrow,
    put_box,
    put_image,
    put_network,
    put_outline,
    put_text,
    rim,
)

__all__ = ["FIGURES", "LABEL_SECONDS"]

LABEL_SECONDS = {"label": 1, "box": 10, "mask": 78}
"""What a person needs for one label of each kind, as thesis section 1.1 prints it."""


def _label_costs(net: Staged, examples: list[Example], seed: int) -> Sheet:
    if any(each.scene is None for each in examples):
        raise ValueError(
            "expected generated scenes for figure 1.1, got pictures without the masks of their "
            "objects; leave `pictures` out"
        )
    rows = []
    for each in examples:
        picture = enlarged(each.picture)
        masks = [item.mask for item in each.scene.objects]
        rows.append([picture, picture, _painted(picture, masks)])
    titles = [f"{what}, {LABEL_SECONDS[key]} s" for key, what in
              (("label", "class label"), ("box", "box"), ("mask", "pixel mask"))]  # fmt: skip
    figure, axis, places = picture_grid(rows, titles, [""] * len(rows), COLUMN, below=0.17)
    for each, line in zip(examples, places, strict=True):
        classes, objects = each.scene.class_ids, each.scene.objects
        x, y, width, height = line[0]
        names = "\n".join(class_label(net, class_id) for class_id in classes)
        frame = {"facecolor": "white", "edgecolor": "black", "lw": 0.6, "pad": 1.5}
        top = y + height - 0.06
        put_text(axis, x + 0.06, top, names, TINY, ha="left", va="top", bbox=frame)
        for item in objects:
            put_outline(axis, item.box, each.picture.shape[:2], line[1], TRUTH)
        counts = {"label": len(classes), "box": len(objects), "mask": len(objects)}
        for (key, count), (x, y, width, _) in zip(counts.items(), line, strict=True):
            total = f"{count} × {LABEL_SECONDS[key]} s = {count * LABEL_SECONDS[key]} s"
            put_text(axis, x + width / 2, y - 0.085, total)
    return figure


def _painted(picture: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    # Objects in shades from light to dark with a white rim, over the faded picture.
    size = (picture.shape[1], picture.shape[0])
    painted = greyed(picture, 0.45).astype(float)
    levels = np.linspace(235, 120, len(masks)).astype(int)
    for mask, level in zip(masks, levels, strict=True):
        large = np.asarray(Image.fromarray(mask).resize(size))
        painted[large] = 0.25 * painted[large] + 0.75 * palette("inferno")[level]
        painted[rim(large)] = 255
    return painted.astype(np.uint8)


_WORKS = (
    (
        "LayerCAM (chapter 3)", "deep maps are coarse,\nshallow ones noisy",
        "each place of each feature map\nweighed by its own positive\ngradient; stages fused",
        "localization, defects,\nsegmentation",
    ),
    (
        "OAA (chapter 4)", "maps cover the most\ndiscriminative parts only",
        "maps accumulated while the\nclassifier trains; drop layer;\nintegral model",
        "segmentation,\nlocalization",
    ),
    (
        "gAP (chapter 5)", "maps say where,\nnot by what evidence",
        "a decision traced to channels,\nstage by stage, as a tree",
        "diagnosis: failures,\nattacks, context",
    ),
)  # fmt: skip


def _works(net: Staged, examples: list[Example], seed: int) -> Sheet:
    heights = {"difficulty": 0.42, "idea": 0.56, "use": 0.42}
    left, gap = 0.72, 0.2
    width = (PAGE - left - 0.02) / len(_WORKS)
    figure, axis = canvas(PAGE, 0.24 + sum(heights.values()) + 2 * gap + 0.04)
    for column, (title, *texts) in enumerate(_WORKS):
        x, y = left + column * width, axis.get_ylim()[1] - 0.24
        put_text(axis, x + width / 2 - 0.05, y + 0.11, title, TEXT)
        for number, (text, height) in enumerate(zip(texts, heights.values(), strict=True)):
            if number:
                put_arrow(axis, (x + width / 2 - 0.05, y), (x + width / 2 - 0.05, y - gap))
                y -= gap
            y -= height
            put_box(axis, x, y, width - 0.1, height, text)
            if not column:
                put_text(axis, 0.06, y + height / 2, tuple(heights)[number], TEXT, ha="left")
    return figure


def _concept(net: Staged, examples: list[Example], seed: int) -> Sheet:
    example = examples[0]
    maps = example_maps(net, example, ("gradcam",), [len(net.stage_names)])
    class_id = int(maps.class_ids[0])
    raw = fuse([maps["gradcam"][0][0]], size=example.picture.shape[:2], scaled="none")
    picture, laid = enlarged(example.picture), map_over(example.picture, raw, smooth=True)
    ratio = picture.shape[0] / picture.shape[1]
    side = min(1.1, 1.1 / ratio)
    tall = side * ratio
    figure, axis = canvas(COLUMN, 2 * tall + 0.44)
    top, low = tall + 0.42, 0.02
    middle = top + tall / 2
    put_image(axis, picture, 0.02, top, side)
    put_text(axis, 0.02 + side / 2, top - 0.09, "picture")
    start = side + 0.27
    last = put_network(axis, len(net.stage_names), start, middle, 1.15, tall)[-1]
    put_text(axis, start + 0.4, top - 0.09, "network")
    put_arrow(axis, (side + 0.05, middle), (start - 0.03, middle))
    put_arrow(axis, (last + 0.09, middle), (last + 0.3, middle))
    name = class_label(net, class_id)
    put_text(axis, last + 0.33, middle, f"predicts\n“{name}”", ha="left")
    x = min(last - side / 2, COLUMN - side - 0.02)
    put_image(axis, laid, x, low, side)
    box = map_to_box(raw, 0.5)
    if box is not None:
        put_outline(axis, box, example.picture.shape[:2], (x, low, side, tall), TRUTH)
    put_arrow(axis, (last, middle - 0.21 * tall), (last, low + tall + 0.03))
    put_text(axis, last + 0.06, top - 0.09, "activation,\ngradient", ha="left")
    put_text(axis, x - 0.1, low + tall * 0.62, f"attention map\nof “{name}”", TEXT, ha="right")
    put_text(axis, x - 0.1, low + tall * 0.27, "box: values above\nhalf the maximum", ha="right")
    return figure


def _rough(net: Staged, examples: list[Example], seed: int) -> Sheet:
    if any(each.mask is None for each in examples):
        raise ValueError(
            "expected pictures with a mask of the object for figure 1.3, got one without; give "
            "Example(picture, mask=...) or leave `pictures` out"
        )
    deepest = len(net.stage_names)
    rows, names, shares = [], [], []
    for each in examples:
        maps = example_maps(net, each, ("gradcam",), [deepest])
        map = normalize(maps["gradcam"][0][0])
        region = resize(map, each.picture.shape[:2]).numpy() > 0.5
        shares.append(_shares(region, each.mask))
        picture = enlarged(each.picture)
        regions = [_filled(picture, region, each.mask), _filled(picture, each.mask, each.mask)]
        rows.append([picture, map_over(each.picture, map), *regions])
        names.append(class_label(net, int(maps.class_ids[0])))
    titles = ["picture", f"stage {deepest} map", "above half", "object"]
    figure, axis, places = picture_grid(rows, titles, names, COLUMN, below=0.17)
    for line, (found, inside) in zip(places, shares, strict=True):
        text = f"{found:.0%} of the object found, {inside:.0%} of the region on it"
        put_text(axis, line[0][0], line[0][1] - 0.085, text, ha="left")
    return figure


def _shares(region: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """The share of the mask that lies in the region, and of the region in the mask."""
    both = (region & mask).sum()
    return both / max(mask.sum(), 1), both / max(region.sum(), 1)


def _filled(picture: np.ndarray, region: np.ndarray, mask: np.ndarray) -> np.ndarray:
    # A region in white over the dark picture, the true object's rim in red.
    size = (picture.shape[1], picture.shape[0])
    inside, truth = (np.asarray(Image.fromarray(m).resize(size)) for m in (region, mask))
    painted = greyed(picture, 0.4)
    painted[inside] = 255 - greyed(picture, 0.25)[inside]
    painted[rim(truth)] = np.array(to_rgb("#ff3030")) * 255
    return painted


def _cam_pipeline(net: Staged, examples: list[Example], seed: int) -> Sheet:
    example = examples[0]
    images = net.preprocess(example.picture)
    pieces = net.differentiable(images, [len(net.stage_names)])
    activation = pieces.activations[0].detach()
    class_id, weights = _linear_weights(net, pieces, example.class_id)
    contributions = weights * activation[0].sum((1, 2)) / activation[0, 0].numel()
    order = contributions.argsort(descending=True).tolist()
    channels = [*order[:2], order[-1]]  # what speaks most for the class, and most against it
    map = normalize(torch.einsum("c,chw->hw", weights, activation[0]))
    tiles = [map_tile(normalize(activation[0, k]), 168) for k in channels]
    name, picture = class_label(net, class_id).replace("\n", " "), enlarged(example.picture)
    ratio = picture.shape[0] / picture.shape[1]
    side = min(0.85, 0.85 / ratio)
    tall = side * ratio
    figure, axis = canvas(PAGE, 2 * tall + 0.8)
    top, low = tall + 0.74, 0.26
    middle, across = top + tall / 2, low + tall / 2
    put_image(axis, picture, 0.02, top, side)
    put_text(axis, 0.02 + side / 2, top - 0.1, "picture")
    put_arrow(axis, (side + 0.06, middle), (1.12, middle))
    last = put_network(axis, len(net.stage_names), 1.15, middle, 1.05, tall)[-1]
    put_text(axis, 1.6, top - 0.1, "convolutions")
    put_arrow(axis, (last + 0.1, middle), (2.44, middle))
    for position, tile in enumerate(reversed(tiles)):  # a pile, the strongest in front
        shift = 0.1 * (1 - position)
        put_image(axis, tile, 2.62 + shift, middle - 0.35 * tall + 0.8 * shift, 0.7 * side)
    put_text(axis, 2.9, top - 0.1, f"{len(weights)} feature maps $A^k$")
    boxes = ((3.72, 0.78, "average\nover places"), (4.86, 0.78, "linear layer\n$w_k$"))
    starts = (3.4, 4.52, 5.66)
    for (x, width, text), start in zip(boxes, starts, strict=False):
        put_arrow(axis, (start, middle), (x - 0.03, middle))
        put_box(axis, x, middle - 0.2, width, 0.4, text)
    put_arrow(axis, (5.66, middle), (5.92, middle))
    score = float(pieces.output[0, class_id].detach())
    put_text(axis, 5.96, middle, f"score of\n“{name}”\n{score:.1f}", ha="left")
    x = 0.02
    for position, (k, tile) in enumerate(zip(channels, tiles, strict=True)):
        weight = float(weights[k])
        sign = "−" if weight < 0 else "+" if position else ""
        before = "+ ...  " if position == 2 else ""
        x += 0.27 if before else 0
        put_text(axis, x + 0.56, across, f"{before}{sign} {abs(weight):.2f} ×", TEXT, ha="right")
        put_image(axis, tile, x + 0.6, low, side)
        put_text(axis, x + 0.6 + side / 2, low - 0.12, f"$A^{{{k}}}$", TEXT)
        x += side + 0.64
    put_text(axis, x + 0.06, across, "=", TEXT)
    x = PAGE - 2 * side - 0.42
    put_image(axis, map_tile(map, 168), x, low, side)
    put_text(axis, x + side / 2, low - 0.14, r"map $M=\sum_k w_k A^k$", SMALL)
    put_arrow(axis, (x + side + 0.04, across), (x + side + 0.31, across))
    x += side + 0.34
    put_image(axis, map_over(example.picture, map, smooth=True), x, low, side)
    put_text(axis, x + side / 2, low - 0.12, "enlarged")
    rail = low + tall + 0.14  # the weights come down to the sum below
    corner = [(5.25, middle - 0.2), (5.25, rail), (0.42, rail)]
    axis.plot(*zip(*corner, strict=True), color="black", lw=0.9, linestyle="--")
    put_arrow(axis, (0.42, rail), (0.42, across + 0.1))
    put_text(axis, 5.31, rail + 0.1, "the same weights", ha="left")
    return figure


def _linear_weights(net: Staged, pieces: Pieces, class_id: int | None) -> tuple[int, Tensor]:
    # The weights behind the global average: the gradient, summed over places that are all equal.
    chosen = int(pieces.output[0].argmax()) if class_id is None else class_id
    gradient = torch.autograd.grad(pieces.output[0, chosen], pieces.activations[0])[0][0]
    weights = gradient.sum((1, 2))
    if not torch.allclose(gradient * gradient[0].numel(), weights[:, None, None], atol=1e-5):
        raise ValueError(
            f"expected a network that ends in a global average and one linear layer for figure "
            f"2.1, got {net.name}; scenes_conv and resnet50 do"
        )
    return chosen, weights


def _families(net: Staged, examples: list[Example], seed: int) -> Sheet:
    example, size = examples[0], examples[0].picture.shape[:2]
    images, stages = net.preprocess(example.picture), [2, len(net.stage_names)]
    deep = stage_maps(net, images, example.class_id, ("gradcam",), stages=stages)
    class_id = int(deep.class_ids[0])
    relevance = excitation_backprop(net, images, class_id, stages=stages)["cmwp"][0][0]
    drop = _occlusion_drop(net, images, class_id)
    maps = (relevance, deep["gradcam"][1][0], drop)
    picture = enlarged(example.picture)
    ratio = picture.shape[0] / picture.shape[1]
    side = min(0.95, 0.95 / ratio)
    tall, small = side * ratio, 0.5 * side
    figure, axis = canvas(PAGE, 0.85 * tall + max(tall, 0.95) + 0.6)
    for column, (family, map) in enumerate(zip(_FAMILIES, maps, strict=True)):
        left, top = 0.05 + column * 2.34, axis.get_ylim()[1] - 0.12
        put_text(axis, left + 1.1, top, f"({'abc'[column]}) {family.title}", TEXT)
        middle = top - 0.14 - 0.375 * tall
        hidden = [_hidden(picture, place) for place in ((0.1, 0.1), (0.5, 0.2), (0.3, 0.55))]
        pile = hidden if column == 2 else [picture]
        for number, each in enumerate(pile):
            shift = 0.07 * (number - (len(pile) - 1) / 2)
            put_image(axis, each, left + 0.05 + shift, middle - small * ratio / 2 - shift, small)
        start = left + 0.05 + small
        put_arrow(axis, (start + 0.13, middle), (start + 0.3, middle))
        centers = put_network(axis, len(net.stage_names), start + 0.33, middle, 0.72, 0.75 * tall)
        end = start + 1.0
        put_arrow(axis, (end, middle), (end + 0.2, middle))
        put_text(axis, end + 0.23, middle, "score", ha="left")
        low = 0.04 + (max(tall, 0.95) - tall) / 2
        large = normalize(resize(map, size) if column == 2 else map)
        put_image(axis, map_over(example.picture, large, smooth=column > 0), left, low, side)
        target = (left + side / 2, low + tall + 0.03)
        below = middle - 0.47 * tall
        if column == 0:
            points = [(end + 0.38, middle - 0.09), (end + 0.38, below), (target[0], below)]
        elif column == 1:
            points = [
                (centers[-1], middle - 0.16 * tall),
                (centers[-1], below),
                (target[0], below),
            ]
            axis.plot([end + 0.38, end + 0.38, centers[-1]], [middle - 0.09, below, below],
                      color="black", lw=0.9, linestyle="--")  # fmt: skip
        else:
            points = [(end + 0.38, middle - 0.09), (end + 0.38, below), (target[0], below)]
        axis.plot(*zip(*points, strict=True), color="black", lw=0.9, linestyle=family.line)
        put_arrow(axis, points[-1], target)
        text = f"{family.way}\n\n{family.members}"
        put_text(axis, left + side + 0.08, low + tall / 2 - 0.02, text, SMALL, ha="left")
    return figure


@dataclass(frozen=True)
class _Family:
    title: str
    way: str
    members: str
    line: str


_FAMILIES = (
    _Family(
        "backpropagation", "relevance or gradient\npassed down to\nthe pixels",
        "gradient, guided\nbackpropagation,\nMWP, cMWP (shown)", "--",
    ),
    _Family(
        "class activation maps", "feature maps, weighed\nand summed",
        "CAM, Grad-CAM\n(shown), Grad-CAM++,\nLayerCAM, NormGrad,\nScore-CAM", "-",
    ),
    _Family(
        "perturbation", "places hidden, the loss\nof score drawn there",
        "occlusion (shown),\nlearned masks", "-",
    ),
)  # fmt: skip


def _occlusion_drop(net: Staged, images: Tensor, class_id: int, places: int = 14) -> Tensor:
    # How much of the score is lost where a grey square, a fifth of the side, covers the image.
    height, width = images.shape[-2:]
    covered = images.repeat(places * places, 1, 1, 1)
    for number in range(places * places):
        row, column = divmod(number, places)
        y, x = round((row + 0.5) * height / places), round((column + 0.5) * width / places)
        rows = slice(max(0, y - height // 10), y + height // 10)
        covered[number, :, rows, max(0, x - width // 10) : x + width // 10] = 0
    scores = torch.cat([net(part)[:, class_id] for part in covered.split(49)])
    return (net(images)[0, class_id] - scores).relu().reshape(places, places)


def _hidden(picture: UInt8[np.ndarray, "h w 3"], place: tuple[float, float]) -> np.ndarray:
    covered, (height, width) = picture.copy(), picture.shape[:2]
    y, x = round(place[0] * height), round(place[1] * width)
    covered[y : y + height // 3, x : x + width // 3] = 128
    return covered


FIGURES = {
    "1.1": Kind("Label types and what they cost", _label_costs, several=1),
    "1.2": Kind("What an attention map is", _concept, "scenes_conv", ("deer",)),
    "1.3": Kind(
        "A deep map is rough and incomplete", _rough, "scenes_conv",
        ("deer", "fire engine", "steamer"),
    ),
    "1.4": Kind("Three works, and how they are related", _works, wanted=()),
    "2.1": Kind("How CAM weighs feature maps", _cam_pipeline, "scenes_conv", ("deer",)),
    "2.2": Kind("Three families of explainers", _families, "scenes_conv", ("deer",)),
}  # fmt: skip
