"""The panels: what a network attends to, explored in JupyterLab or in a saved page."""

from attnviz.panels.layercam import LayerCAMPanel, explore_stages

__all__ = ["LayerCAMPanel", "explore_stages"]
