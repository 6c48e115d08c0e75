"""Figures for papers and chapters: results in, a matplotlib figure out.

Widths are in inches; a column of a two-column paper is 3.5, a page 7.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image

from .cam import fuse, scale
from .colors import overlay
from .explain import StageMaps

__all__ = ["Sheet", "stage_grid"]

_NAMES = {
    "cam": "CAM",
    "gradcam": "Grad-CAM",
    "gradcam_pp": "Grad-CAM++",
    "gradcam_pp_released": "Grad-CAM++ (released)",
    "layercam": "LayerCAM",
    "layercam_normal": "LayerCAM-normal",
    "normgrad": "NormGrad",
    "scorecam": "Score-CAM",
    "mwp": "MWP",
    "cmwp": "cMWP",
}


class Sheet(Figure):
    """A figure that a notebook shows as it is, without pyplot and its shared state."""

    def _repr_jpeg_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="jpeg", pil_kwargs={"quality": 90})
        return data.getvalue()


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
        shown = [_large(scale(stage, "tanh", gamma).numpy(), picture) for stage in single[:-1]]
        shown += [_large(scale(single[-1], "none").numpy(), picture), joint.numpy()]
        pictures = [picture, *(overlay(picture, map) for map in shown)]
        for axis, pixels in zip(row, pictures, strict=True):
            axis.imshow(pixels, interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(_NAMES[method], fontsize=8)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    return figure


def _large(map: np.ndarray, picture: UInt8[np.ndarray, "h w 3"]) -> np.ndarray:
    # At the picture's size, with the stage's own grid visible: what the network really sees.
    size = (picture.shape[1], picture.shape[0])
    return np.asarray(Image.fromarray(map).resize(size, Image.Resampling.NEAREST))
