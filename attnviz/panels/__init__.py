"""The panels: what a network attends to, explored in JupyterLab or in a saved page."""

from attnviz.panels.export import save_story
from attnviz.panels.layercam import LayerCAMPanel, explore_stages
from attnviz.panels.pipeline import LabelPanel, explore_labels
from attnviz.panels.player import EvolutionPlayer, explore_accumulation
from attnviz.panels.tree import TreePanel, explore_evidence

__all__ = [
    "EvolutionPlayer",
    "LabelPanel",
    "LayerCAMPanel",
    "TreePanel",
    "explore_accumulation",
    "explore_evidence",
    "explore_labels",
    "explore_stages",
    "save_story",
]
