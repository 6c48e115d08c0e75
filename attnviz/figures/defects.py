"""Figures of section 3.4.3: where the maps of a classifier see the defects of surfaces."""

from collections.abc import Sequence

import numpy as np

from ..cam import normalize
from ..data.defects import Defects
from ..explain import stage_maps
from ..stages import Staged
from .examples import NAMES, Example, Kind, need_stages
from .sheet import PAGE, Sheet, enlarged, map_over, picture_grid

__all__ = ["FIGURES"]


def _surfaces(net: Staged, kind: Kind, seed: int) -> list[Example]:
    # The first test picture of each kind of defect, whatever its maps look like.
    if net.name != "defects":
        raise ValueError(
            f"expected `pictures` for {net.name}, got none; only the network 'defects' knows the "
            "generated surfaces"
        )
    drawn = Defects("test", 10_000, seed)
    found = [next(each for each in drawn if each.kind == name) for name in kind.wanted]
    return [
        Example(each.image, 0, mask=each.mask, name=f"generated {each.image_id} of seed {seed}")
        for each in found
    ]


def _compared(
    net: Staged, examples: Sequence[Example], shown: Sequence[tuple[str, int, str]]
) -> Sheet:
    # A row for each picture: it, its mask, and for each title the map of a method in a stage.
    if "defect" not in (net.class_names or ()):
        raise ValueError(
            f"expected a network with a class 'defect', got {net.name}; train one with attnviz "
            "train defect"
        )
    methods = tuple(dict.fromkeys(method for method, _, _ in shown))
    rows = []
    for each in examples:
        maps = stage_maps(net, net.preprocess(each.picture), "defect", methods)
        mask = np.full_like(each.picture, 255)
        if each.mask is not None:
            mask = np.repeat(255 * each.mask[..., None].astype(np.uint8), 3, axis=2)
        cells = [
            map_over(each.picture, normalize(maps[method][stage - 1][0].cpu()))
            for method, stage, _ in shown
        ]
        rows.append([enlarged(each.picture), enlarged(mask), *cells])
    titles = ["picture", "truth", *(title for _, _, title in shown)]
    return picture_grid(rows, titles, [""] * len(rows), PAGE)[0]


def _methods(net: Staged, examples: list[Example], seed: int) -> Sheet:
    stage = need_stages(net, "3.7", 2) - 1
    methods = ("layercam", "gradcam_pp", "gradcam")
    return _compared(net, examples, [(method, stage, NAMES[method]) for method in methods])


def _layers(net: Staged, examples: list[Example], seed: int) -> Sheet:
    count = need_stages(net, "3.8", 3)
    stages = range(count - 2, count + 1)
    return _compared(
        net, examples, [("layercam", stage, f"layer{stage + 4 - count}") for stage in stages]
    )


_WANTED = ("scratch", "spots", "blotch")

FIGURES = {
    "3.7": Kind(
        "Defects, by three methods in layer3", _methods, "defects", _WANTED, examples=_surfaces
    ),
    "3.8": Kind(
        "Defects, by LayerCAM in layers 2 to 4", _layers, "defects", _WANTED, examples=_surfaces
    ),
}
