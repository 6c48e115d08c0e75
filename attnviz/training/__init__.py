"""Training loops, short enough to read from top to bottom; a killed run goes on."""

from .classifier import TrainConfig, train_classifier
from .defect import DefectConfig, defect_config, train_defect
from .integral import IntegralConfig, integral_config, train_integral
from .oaa import OAAConfig, oaa_config, train_oaa
from .runs import one_cycle
from .segment import SegmentConfig, segment_config, train_segment

__all__ = [
    "DefectConfig", "IntegralConfig", "OAAConfig", "SegmentConfig", "TrainConfig",
    "defect_config", "integral_config", "oaa_config", "one_cycle", "segment_config",
    "train_classifier", "train_defect", "train_integral", "train_oaa", "train_segment",
]  # fmt: skip
