"""Visual analytics of the attention inside convolutional networks.

Start with :func:`load_network` or :func:`staged`, then :func:`stage_maps` and :func:`fuse`, or
look with :func:`explore_stages`.
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from .cam import fuse
from .explain import StageMaps, stage_maps
from .localize import map_to_box
from .networks import load_network
from .stages import Staged, staged

if TYPE_CHECKING:
    from .panels.layercam import explore_stages

__all__ = [
    "StageMaps",
    "Staged",
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
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
