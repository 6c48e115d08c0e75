"""The tables of the thesis: the numbers it printed beside those of a network and data at hand.

:func:`make_table` measures or trains what a table compares and returns a :class:`Table`.
"""

import inspect
import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import torch

from ..checks import check_whole
from ..networks import data_root as find_data_root
from ..stages import Staged
from . import accumulation, decomposition, defects, localization, segmentation
from .localization import METHODS, THRESHOLDS
from .table import Table, table_names

__all__ = ["METHODS", "THRESHOLDS", "Table", "make_table", "table_names", "table_options"]

_COMMON = ("id", "data", "network", "weights", "root", "limit", "seed", "device", "cache",
           "progress")  # fmt: skip


def make_table(
    id: str,
    *,
    data: str = "scenes",
    network: str | Staged | None = None,
    weights: str | Path = "auto",
    data_root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: bool = True,
    **options: object,
) -> Table:
    """Makes one table of the thesis with a network and data of one's own.

    Args:
        id: Number of the table; see :func:`table_names`.
        data: Where the pictures come from: the generated ``scenes``, or a folder of the data
            root: ``ilsvrc`` or ``cub`` in chapter 3, but in tables 3.9 and 3.10 ``dagm2007`` or
            ``magnetic_tile`` (the generated ``defects`` stand in for ``scenes`` there);
            ``voc2012`` (or ``coco``, ``cub``) in chapter 4, ``ilsvrc`` or ``voc2012`` in
            chapter 5.
        network: In chapters 3 and 5 a name for :func:`attnviz.load_network` or a network that is
            loaded; the bundled ``scenes_fc`` or ``vgg16`` if None. In chapter 4 the name of a
            network to train; see :func:`attnviz.networks.oaa_network`. In tables 3.9 and 3.10
            either: a network that is loaded, or the name of one to train.
        weights: See :func:`attnviz.load_network`; in chapter 4 those that trainings start from,
            as in tables 3.9 and 3.10, where those of ``attnviz train defect`` are taken as they
            are.
        data_root: Folder of the data sets; see :func:`attnviz.networks.data_root`.
        limit: Take only so many pictures.
        seed: Number of the generated data set, and behind everything random.
        device: Where to compute.
        cache: Folder for measurements and trainings; a stopped table goes on from there.
            ``attnviz/tables`` in the user's cache folder if None.
        progress: Show progress bars.
        **options: What belongs to a chapter only.

            Chapter 3: ``preset``: ``thesis`` squeezes the picture to the network's input, takes
            the gradient of the activation itself, the largest component above 15 % of the
            maximum, and the graph cut of Simonyan et al. for LayerCAM in S1 and S2; ``released``
            ten crops, the gradient after the pooling, the largest rectangle, grabCut in S1 to
            S3; ``literature`` is as ``thesis``, but the largest contour above 20 %, no graph
            cut. ``threshold``: which one the rows show (the other is in ``extra``): ``fixed``:
            the preset's, 5 % in table 3.6; ``held_out``: for each picture the one that is best
            on the half of the pictures it is not in; ``auto``: ``fixed`` for VGG16, for which
            the 15 % were chosen. ``gradient_at``: where the gradient is taken, in place of the
            preset's choice; before a max-pooling it makes a large difference. ``methods``: keys
            of :data:`METHODS`; Score-CAM takes by far the longest. ``channels``: how many
            channels Score-CAM uses in each stage, those of highest variance; all if None.
            ``batch``: pictures in one forward pass.

            Tables 3.9 and 3.10: ``gradient_at`` as above; ``preset``: see
            :func:`attnviz.training.defect_config`; ``epochs``, ``repeats`` as in chapter 4.

            Chapter 4: ``preset``: see :func:`attnviz.training.oaa_config`, ``thesis`` if None;
            not for the small network of scenes, which has its own. ``epochs``: of each training.
            ``repeats``: trainings of each row, with seeds from `seed` on; of several, the mean is
            shown with the least and largest. ``measure``: in tables 4.5 to 4.10 ``maps``, their
            own mIoU, or ``segmentation``, that of a network trained on labels made from them, as
            in the thesis and in tables 4.1 to 4.4, 4.7, 4.12 and 3.11 to 3.13. For these:
            ``rule``: what is background in pseudo labels, see
            :class:`attnviz.segment.LabelConfig`; ``segment_epochs``: of each segmentation;
            ``workers``: processes for labels and dense CRFs.

            Table 5.1: ``top``: channels for each decision of a tree; ``decisions``: at most so
            many for each stage and picture.

    Returns:
        The table.

    Raises:
        ValueError: There is no such table, an argument is out of range, or the network does not
            know the data's classes.
        TypeError: An option does not belong to the table.
        FileNotFoundError: The data set or the weights are not there.
    """
    make = _maker(id)
    known = table_options(id)
    for name in options:
        if name not in known:
            raise TypeError(
                f"expected options of table {id} in {{{', '.join(known)}}}, got {name!r}; "
                "leave it out"
            )
    if limit is not None:
        check_whole("limit", limit, 1)
    folder = _cache_folder() if cache is None else Path(cache)
    return make(
        id, data=data, network=network, weights=weights, root=find_data_root(data_root),
        limit=limit, seed=seed, device=device, cache=folder, progress=progress, **options,
    )  # fmt: skip


def table_options(id: str) -> tuple[str, ...]:
    """Returns the options that :func:`make_table` takes for one table only."""
    return tuple(name for name in inspect.signature(_maker(id)).parameters if name not in _COMMON)


def _maker(id: str) -> Callable[..., Table]:
    for module in (localization, defects, segmentation, accumulation, decomposition):
        if id in module.TABLES:
            return module.make
    names = [name for name, _ in table_names()]
    near = get_close_matches(str(id), names, n=3)
    raise ValueError(
        f"expected the number of a table in {', '.join(names)}, got {id!r}"
        + (f"; the nearest are {', '.join(near)}" if near else "")
    )


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "attnviz" / "tables"
