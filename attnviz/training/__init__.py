"""Training loops, short enough to read from top to bottom; a killed run goes on."""

from .classifier import TrainConfig, train_classifier
from .integral import IntegralConfig, integral_config, train_integral
from .oaa import OAAConfig, oaa_config, train_oaa
from .runs import one_cycle

__all__ = [
    "IntegralConfig", "OAAConfig", "TrainConfig", "integral_config", "oaa_config", "one_cycle",
    "train_classifier", "train_integral", "train_oaa",
]  # fmt: skip
