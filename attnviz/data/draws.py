"""What the generated data sets are drawn from: small integers that are the same everywhere."""

from collections.abc import Iterable, Iterator

import numpy as np

__all__ = ["Draws", "check_choice", "check_integer"]


class Draws:
    """Small integers from one seeded bit generator, whose raw stream numpy keeps stable."""

    def __init__(self, *key: int) -> None:
        self._values = self._stream(np.random.PCG64(np.random.SeedSequence(key)))

    @staticmethod
    def _stream(bits: np.random.PCG64) -> Iterator[int]:
        while True:
            yield from bits.random_raw(128).astype("<u8").view("<u2").tolist()

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return next(self._values) * n >> 16

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + (next(self._values) * (high - low + 1) >> 16)

    def chance(self, percent: int) -> bool:
        """True in so many of a hundred cases."""
        return next(self._values) * 100 >> 16 < percent


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    if value not in tuple(choices):
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"expected `{name}` in {{{allowed}}}, got {value!r}; choose one of them")


def check_integer(name: str, value: object, low: int) -> None:
    """Raises TypeError unless `value` is an integer, ValueError if it is less than `low`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"expected `{name}` to be an integer, got {type(value).__name__}; give a whole number"
        )
    if value < low:
        raise ValueError(f"expected `{name}` >= {low}, got {value}; give a larger number")
