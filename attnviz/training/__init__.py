"""Training loops, short enough to read from top to bottom; a killed run goes on."""

from .classifier import TrainConfig, one_cycle, train_classifier

__all__ = ["TrainConfig", "one_cycle", "train_classifier"]
