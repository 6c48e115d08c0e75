"""Figures of the data sets of section 2.5: pictures with the labels that belong to them.

Without given pictures they show generated scenes in the place of ILSVRC, CUB-200-2011 and PASCAL
VOC 2012.
"""

from collections.abc import Sequence

from ..stages import Staged
from .examples import Example, Kind, class_label
from .sheet import (
    COLUMN,
    PAGE,
    TINY,
    TRUTH,
    Sheet,
    enlarged,
    picture_grid,
    put_outline,
    put_text,
)

__all__ = ["FIGURES"]


def _samples(net: Staged, examples: list[Example], seed: int) -> Sheet:
    return _labeled(net, examples, 4, PAGE, boxes=False)


def _boxed(net: Staged, examples: list[Example], seed: int) -> Sheet:
    return _labeled(net, examples, 3, COLUMN, boxes=True)


def _labeled(
    net: Staged, examples: Sequence[Example], columns: int, width: float, boxes: bool
) -> Sheet:
    columns = min(columns, len(examples))
    lines = [examples[k : k + columns] for k in range(0, len(examples), columns)]
    rows = [[enlarged(each.picture) for each in line] for line in lines]
    titles, labels = [""] * columns, [""] * len(rows)
    figure, axis, places = picture_grid(rows, titles, labels, width, below=0.24)
    for line, spots in zip(lines, places, strict=True):
        for each, place in zip(line, spots, strict=False):
            x, y, side, _ = place
            if each.class_id is not None:
                name = class_label(net, each.class_id)
                put_text(axis, x + side / 2, y - 0.03, name, TINY, va="top")
            for box in each.boxes if boxes else ():
                put_outline(axis, box, each.picture.shape[:2], place, TRUTH)
    return figure


_ALL = ("deer", "ox", "ram", "horse", "taxi", "ambulance", "fire engine", "steamer")
FIGURES = {
    "2.3": Kind("Pictures and classes of a data set", _samples, wanted=_ALL),
    "2.4": Kind("Pictures, classes and boxes of a data set", _boxed, wanted=_ALL[:3]),
}
