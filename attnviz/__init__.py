"""Visual analytics of the attention inside convolutional networks.

Start with :func:`load_network` or :func:`staged`, then :func:`stage_maps` and :func:`fuse`, or
look with :func:`explore_stages`.
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from .cam import fuse
from .explain import StageMaps, stage_maps
from .localize import map_to_box
from .memory import AttentionMemory
from .networks import load_network
from .stages import Staged, staged
from .tree import Evidence, evidence

if TYPE_CHECKING:
    from .panels.layercam import explore_stages
    from .panels.pipeline import explore_labels
    from .panels.player import explore_accumulation
    from .panels.tree import explore_evidence

__all__ = [
    "AttentionMemory",
    "Evidence",
    "StageMaps",
    "Staged",
    "evidence",
    "explore_accumulation",
    "explore_evidence",
    "explore_labels",
    "explore_stages",
    "fuse",
    "load_network",
    "map_to_box",
    "stage_maps",
    "staged",
]


def __getattr__(name: str) -> object:
    if name == "explore_stages":  # the panels bring in ipywidgets: only when asked for
        from .panels.layercam import explore_stages

        return explore_stages
    if name == "explore_accumulation":
        from .panels.player import explore_accumulation

        return explore_accumulation
    if name == "explore_evidence":
        from .panels.tree import explore_evidence

        return explore_evidence
    if name == "explore_labels":
        from .panels.pipeline import explore_labels

        return explore_labels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
