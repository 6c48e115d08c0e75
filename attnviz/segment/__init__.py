"""From maps to masks: pseudo labels for a data set, and masks from a segmentation network."""

from .inference import SCALES, Scores, evaluate, segment, write_submission
from .pseudo import (
    LabelConfig,
    LabelRun,
    fused_maps,
    label_file,
    label_picture,
    memory_maps,
    network_maps,
    run_network,
    write_labels,
)

__all__ = [
    "SCALES", "LabelConfig", "LabelRun", "Scores", "evaluate", "fused_maps", "label_file",
    "label_picture", "memory_maps", "network_maps", "run_network", "segment", "write_labels",
    "write_submission",
]  # fmt: skip
