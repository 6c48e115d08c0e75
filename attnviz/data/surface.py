"""Magnetic tiles: photographs of surfaces with five kinds of defects, and without.

The folders of the published data set, or a part of them; a mask is bright inside, above 127::

    MT_Crack/exp1_num_3191.jpg             or MT_Crack/Imgs/..., as published
    MT_Crack/exp1_num_3191.png
    MT_Free/exp1_num_71177.jpg             without a defect

A tile was photographed under up to six exposures (``exp1`` to ``exp6``) within some 250 frames
(``num``): pictures less than 300 frames apart are taken as of one tile and stay together when
the set is split, or a test would ask for tiles that the training had seen.

References:
    Surface Defect Saliency of Magnetic Tile (Huang et al., 2020),
    https://doi.org/10.1007/s00371-018-1588-5
"""

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Literal

from ..checks import check_choice
from .dagm import evenly
from .folder import Problems, check_limit, list_pictures
from .masks import MaskedImages, read_region

__all__ = ["TILE_DEFECTS", "load_magnetic_tile"]

TILE_DEFECTS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
"""The classes, in the order of their numbers."""

Split = Literal["train", "test", "all"]
_ONE_TILE = 300  # frames


def load_magnetic_tile(
    root: str | Path, split: Split = "all", *, limit: int | None = None
) -> MaskedImages:
    """Reads photographs of magnetic tiles with the kind and mask of their defect.

    A picture has one class or, in ``MT_Free``, none and an empty mask. A few published masks of
    defects are empty as well.

    Args:
        root: The folder with ``MT_Blowhole``, ``MT_Free``, ...
        split: ``all``, or our own parts, as there are no published ones: of the tiles of each
            folder, by frame, every third is ``test`` and the others are ``train``.
        limit: Keep only so many pictures, taken evenly from all.

    Raises:
        FileNotFoundError: The folder or its pictures are not there.
        ValueError: `split` is unknown.
    """
    check_choice("split", split, Split)
    check_limit(limit)
    root = Path(root)
    problems, rows = Problems(), []
    for class_id, kind in enumerate((*TILE_DEFECTS, "Free")):
        folder = root / f"MT_{kind}"
        if not folder.is_dir():
            problems.add("folders that are not there", folder.name)
            continue
        names = set(list_pictures(folder))
        pictures = {name for name in names if name.lower().endswith((".jpg", ".jpeg"))}
        masks = {name.rpartition(".")[0]: name for name in names - pictures}
        for name in _part(pictures, split):
            mask = masks.get(name.rpartition(".")[0])
            if kind == "Free":
                rows.append((folder / name, (), (None, folder / name, 0)))
                continue
            if mask is None:
                problems.add("masks that are not there", f"{folder.name}/{name}")
            source = None if mask is None else (folder / mask, folder / name, 1 + class_id)
            rows.append((folder / name, (class_id,), source))
    if not rows:
        raise FileNotFoundError(
            f"expected pictures such as MT_Crack/exp1_num_3191.jpg in {str(root)!r}, found none; "
            "unpack the data set there"
        )
    rows = evenly(rows, limit)
    files = [path.relative_to(root).as_posix() for path, _, _ in rows]
    return MaskedImages(
        root, [file.rpartition(".")[0] for file in files], files,
        [class_ids for _, class_ids, _ in rows], [mask for _, _, mask in rows], read_region,
        class_names=TILE_DEFECTS, split=split, problems=problems.lines(),
        sources={"images": str(root), "masks": str(root)},
    )  # fmt: skip


def _part(names: Iterable[str], split: Split) -> list[str]:
    # The pictures of a folder that belong to a split, by frame.
    def frame(name: str) -> int:
        match = re.search(r"num_(\d+)", name)
        return int(match[1]) if match else 0

    ordered = sorted(names, key=lambda name: (frame(name), name))
    tile, tiles = 0, [0] if ordered else []
    for before, after in pairwise(ordered):
        tile += frame(after) - frame(before) >= _ONE_TILE
        tiles.append(tile)
    kept = {"train": (0, 1), "test": (2,), "all": (0, 1, 2)}[split]
    return [name for name, tile in zip(ordered, tiles, strict=True) if tile % 3 in kept]
