"""Figures for papers and chapters: results in, a matplotlib figure out.

:func:`make_figure` draws a figure of the thesis by its number, from generated scenes or given
pictures; :func:`stage_grid` and :func:`map_grid` show maps one already has. Widths are in inches;
a column of a two-column paper is 3.5, a page 7. Maps lie over the darkened picture in grey, so
bright means attention in a print without color, too.

In figures 1.2, 1.3, 3.1, 3.2 and 3.4 to 3.6 shallow stages take their gradient at the pooling
layer that follows (``gradient_at="pool_up"``), as the released code does.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from ..cam import fuse, normalize, scale
from ..colors import overlay
from ..data.folder import LabeledImages
from ..explain import StageMaps
from ..networks import load_network
from ..stages import Staged
from . import accumulation, attention, datasets, decomposition, defects, layercam, segmentation
from .accumulation import RunKind, given_runs
from .attention import LABEL_SECONDS
from .examples import NAMES, Example, generated_examples, given_examples
from .segmentation import MaskKind, draw_masks
from .sheet import TEXT, Sheet, blocky, canvas, enlarged, map_over, put_image, put_text

__all__ = [
    "LABEL_SECONDS",
    "Example",
    "Sheet",
    "figure_names",
    "make_figure",
    "map_grid",
    "stage_grid",
]

_FIGURES = dict(
    sorted(
        (
            attention.FIGURES | datasets.FIGURES | layercam.FIGURES | defects.FIGURES
            | accumulation.FIGURES | segmentation.FIGURES | decomposition.FIGURES
        ).items(),
        key=lambda entry: tuple(map(int, entry[0].split("."))),
    )
)  # fmt: skip


def stage_grid(
    picture: UInt8[np.ndarray, "h w 3"],
    maps: StageMaps,
    *,
    index: int = 0,
    fused: Sequence[int] | None = None,
    gamma: float = 2.0,
    width: float = 7.0,
    dpi: int = 130,
) -> Sheet:
    """Shows a picture with the map of every stage and their fusion, one row per method.

    Every map is drawn as it enters the fusion: divided by its maximum and, but for the deepest
    fused stage, scaled by tanh.

    Args:
        picture: The picture that was explained.
        maps: The maps, of one class per image.
        index: The image's place in the batch.
        fused: Numbers of the stages that are fused; the deepest three if None.
        gamma: The factor inside tanh; see :func:`attnviz.cam.scale`.
        width: Width of the figure in inches.
        dpi: Resolution of the figure on a screen.

    References:
        The layout of thesis figures 3.1, 3.2 and 3.5.
    """
    numbers = maps.stages
    chosen = [numbers.index(stage) for stage in (fused or numbers[-3:])]
    columns, rows = len(numbers) + 2, len(maps)
    height = width / columns * picture.shape[0] / picture.shape[1] * rows + 0.25
    figure = Sheet(figsize=(width, height), dpi=dpi, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    axes = figure.subplots(rows, columns, squeeze=False)
    titles = ["picture", *(f"stage {number}" for number in numbers)]
    titles.append("fused " + "+".join(str(numbers[position]) for position in chosen))
    for row, (method, stages) in zip(axes, maps.items(), strict=True):
        single = [stage[index].cpu() for stage in stages]
        joint = fuse([single[position] for position in chosen], gamma, picture.shape[:2])
        shown = [blocky(scale(stage, "tanh", gamma).numpy(), picture) for stage in single[:-1]]
        shown += [blocky(scale(single[-1], "none").numpy(), picture), joint.numpy()]
        pictures = [picture, *(overlay(picture, map) for map in shown)]
        for axis, pixels in zip(row, pictures, strict=True):
            axis.imshow(pixels, interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(NAMES[method], fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    return figure


def map_grid(
    picture: UInt8[np.ndarray, "h w 3"],
    maps: Mapping[str, Float[Tensor, "_ _"]],
    *,
    columns: int = 5,
    width: float = 7.0,
    dpi: int = 80,
) -> Sheet:
    """Shows a picture and any maps of it, each under its name, to compare methods or classes.

    Args:
        picture: The picture that was explained.
        maps: One map of any resolution for each title; each is divided by its own maximum.
        columns: Cells in a row, the picture's among them.
        width: Width of the figure in inches.
        dpi: Resolution of the figure on a screen.
    """
    cells = {"picture": enlarged(picture)}
    cells |= {title: map_over(picture, normalize(map.cpu())) for title, map in maps.items()}
    names = list(cells)
    ratio = picture.shape[0] / picture.shape[1]
    cell = (width - 0.04) / columns
    title = 0.05 + 0.12 * max(name.count("\n") + 1 for name in names)
    height = cell * ratio + title
    rows = -(-len(names) // columns)
    figure, axis = canvas(width, rows * height + 0.02, dpi)
    for position, name in enumerate(names):
        x = 0.04 + position % columns * cell
        y = (rows - 1 - position // columns) * height + 0.02
        put_image(axis, cells[name], x, y, cell - 0.04)
        put_text(axis, x + cell / 2 - 0.02, y + height - title + 0.01, name, TEXT, va="bottom")
    return figure


def figure_names() -> list[tuple[str, str]]:
    """The number and the title of every figure that :func:`make_figure` draws, in order."""
    return [(number, kind.title) for number, kind in _FIGURES.items()]


def make_figure(
    number: str,
    *,
    network: str | Staged | None = None,
    pictures: LabeledImages | Iterable[object] | None = None,
    runs: Iterable[object] | None = None,
    masks: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Sheet:
    """Draws a figure of the thesis.

    Args:
        number: The figure's number, such as ``"3.1"``; see :func:`figure_names`.
        network: A network or its name; a bundled one if None.
        pictures: Pictures to draw, of which the first ones are taken, as many as the figure has
            room for; all for a figure that counts or measures. :class:`Example` objects, a
            :class:`~attnviz.data.folder.LabeledImages` or what :func:`attnviz.images.to_pixels`
            reads; pictures with masks (:class:`~attnviz.data.masks.MaskedImage`) for figures 2.5,
            3.7 to 3.9, 4.8 and 4.9. A labeled picture is explained for its class where the network
            knows the name, others for the highest score. None takes generated scenes: the first
            of the validation split that show one object, of a class named beforehand where the
            figure has one, whatever their maps look like.
        runs: For the figures of chapter 4: folders of trainings, or what
            :func:`attnviz.evolution.load_evolution` returns; bundled ones if None.
        masks: For figures 3.9, 4.8 and 4.9: folders of label pictures ``IMAGE_ID.png`` by the
            titles of their columns; bundled ones if None. Those of scenes need no `pictures`.
        seed: Number of the generated data set, and of random choices.

    Returns:
        The figure, ready for ``savefig``.

    Raises:
        ValueError: There is no such figure, or what is given can't be shown in it.
    """
    if number not in _FIGURES:
        known = ", ".join(_FIGURES)
        raise ValueError(f"expected a figure in {{{known}}}, got {number!r}")
    kind = _FIGURES[number]
    taken = {RunKind: ("runs",), MaskKind: ("masks", "pictures")}
    taken = taken.get(type(kind), ("network", "pictures"))
    taken = {"1.4": (), "2.5": ("pictures",)}.get(number, taken)
    given = {"network": network, "pictures": pictures, "runs": runs, "masks": masks}
    if idle := [name for name, each in given.items() if each is not None and name not in taken]:
        raise ValueError(
            f"expected {' or '.join(f'`{name}`' for name in taken)} for figure {number}, "
            f"got `{idle[0]}`; leave it out"
        )
    if isinstance(kind, MaskKind):
        figure = draw_masks(number, kind, masks, pictures, seed)
        return figure
    if isinstance(kind, RunKind):
        shown = given_runs(number, kind, runs)
        figure = kind.draw(shown, seed)
        figure.facts = f"figure {number}; " + "; ".join(
            f"{name}: {run.network} on {run.data}, run {run.run_id}" for name, run in shown.items()
        )
        return figure
    net = load_network(network or kind.network) if not isinstance(network, Staged) else network
    if pictures is None:
        examples = generated_examples(net, kind, seed)
    else:
        most = None if kind.sample else len(kind.wanted) + kind.several
        examples = given_examples(net, pictures, most)
    figure = kind.draw(net, examples, seed)
    if not examples:  # a diagram
        figure.facts = f"figure {number}"
        return figure
    weights = {key: net.provenance[key] for key in ("weights", "sha256") if key in net.provenance}
    weights = ", ".join(f"{key} {value}" for key, value in weights.items())
    names = ", ".join(each.name for each in examples[:24])
    if len(examples) > 24:
        names += f" and so on to {examples[-1].name}, {len(examples)} pictures"
    figure.facts = f"figure {number}; network {net.name}, {weights}; {names}; seed {seed}"
    return figure
