"""Probes of a network: what changes when something in it, or in the picture, is changed.

Named here are those of pictures. Those of channels and decisions are modules of their own:
:mod:`~attnviz.probes.pearson` (does removal agree with contributions),
:mod:`~attnviz.probes.channels` (what a channel responds to),
:mod:`~attnviz.probes.visualization` (pictures made to excite it, and what a stage still knows),
:mod:`~attnviz.probes.context` (on which parts and contexts),
:mod:`~attnviz.probes.surrogate` and :mod:`~attnviz.probes.importance` (what is left without some
channels), :mod:`~attnviz.probes.sanity` and :mod:`~attnviz.probes.saliency` (random weights and
labels, attribution to pixels), :mod:`~attnviz.probes.masks` (what hiding parts of a picture
tells), :mod:`~attnviz.probes.diagnosis` and :mod:`~attnviz.probes.adversarial` (failures and
attacks), :mod:`~attnviz.probes.concepts` and :mod:`~attnviz.probes.groups` (directions of
concepts, channels that overlap), :mod:`~attnviz.probes.preferences` (what shallow stages look
for), :mod:`~attnviz.probes.gates` (other layers than convolution and ReLU),
:mod:`~attnviz.probes.presence` (pictures without a main object).
"""

from .deletion import Curves, average_drop, deletion_curves
from .occlusion import Fill, gradient_variance, occlude, occlusion_scores, occlusion_table

__all__ = [
    "Curves",
    "Fill",
    "average_drop",
    "deletion_curves",
    "gradient_variance",
    "occlude",
    "occlusion_scores",
    "occlusion_table",
]
