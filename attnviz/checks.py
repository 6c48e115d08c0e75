"""Checks of arguments, all said in one way: expected ..., got ...."""

import math
from numbers import Integral, Real

__all__ = ["check_number", "check_seed", "check_size", "check_whole"]


def check_whole(name: str, value: object, least: int) -> None:
    """Raises TypeError unless an argument is a whole number, ValueError if it is too low."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"expected `{name}` as a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"expected `{name}` of at least {least}, got {value}")


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises TypeError unless an argument is a number, ValueError if it is NaN or out of range."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected `{name}` as a number, got {value!r}")
    if not low <= value <= high:
        if low == -math.inf:
            raise ValueError(f"expected `{name}` as a number, got {value}")
        limits = f" from {low} to {high}" if high < math.inf else f" of at least {low}"
        raise ValueError(f"expected `{name}`{limits}, got {value}")


def check_size(name: str, value: object) -> None:
    """Raises ValueError unless an argument is a height and a width of at least 1."""
    sides = tuple(value) if isinstance(value, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(each, Integral) and each >= 1 for each in sides):
        raise ValueError(
            f"expected `{name}` as (height, width), whole numbers of at least 1, got {value!r}"
        )


def check_seed(seed: object) -> None:
    """Raises TypeError unless a seed is a whole number, ValueError if torch can't take it."""
    check_whole("seed", seed, 0)
    if seed >= 2**63:
        raise ValueError(f"expected `seed` below 2**63, got {seed}")
