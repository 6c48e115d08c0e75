"""Checks of arguments, all said in one way: expected ..., got ...."""

import math
from numbers import Integral, Real
from typing import get_args

__all__ = [
    "check_choice", "check_number", "check_seed", "check_size", "check_whole", "plain", "shown",
]  # fmt: skip

_LARGEST = 2**63 - 1  # of the whole numbers that torch takes


def check_choice(name: str, value: object, choices: object) -> None:
    """Raises ValueError unless an argument is one of the words of a ``Literal``."""
    if not isinstance(value, str) or value not in get_args(choices):
        raise ValueError(f"expected `{name}` in {get_args(choices)}, got {shown(value)}")


def check_whole(name: str, value: object, least: int) -> int:
    """Returns a whole number as an int.

    Raises:
        TypeError: It is none.
        ValueError: It is too low, or too large for torch.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"expected `{name}` as a whole number, got {shown(value)}")
    if value < least:
        raise ValueError(f"expected `{name}` of at least {least}, got {value}")
    if value > _LARGEST:
        raise ValueError(f"expected `{name}` below 2**63, got {value}")
    return int(value)


def check_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf
) -> float:
    """Returns a number as it is, or as a float where torch does not know its kind.

    Raises:
        TypeError: It is none.
        ValueError: It is NaN or out of range.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"expected `{name}` as a number, got {shown(value)}")
    if not low <= value <= high:
        if low == -math.inf:
            raise ValueError(f"expected `{name}` as a number, got {value}")
        limits = f" from {low} to {high}" if high < math.inf else f" of at least {low}"
        raise ValueError(f"expected `{name}`{limits}, got {value}")
    return value if isinstance(value, int | float) else float(value)


def check_seed(seed: object) -> int:
    """Returns a seed, a whole number from 0; raises as :func:`check_whole`."""
    return check_whole("seed", seed, 0)


def check_size(name: str, value: object) -> None:
    """Raises ValueError unless an argument is a height and a width of at least 1."""
    sides = tuple(value) if isinstance(value, tuple | list) else ()
    whole = [isinstance(each, Integral) and not isinstance(each, bool) for each in sides]
    if len(sides) != 2 or not all(whole) or min(sides) < 1:
        raise ValueError(
            f"expected `{name}` as (height, width), whole numbers of at least 1, "
            f"got {shown(value)}"
        )


def plain(value: object) -> object:
    """Returns a tensor or an array as a number or as lists of numbers, all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def shown(value: object) -> str:
    """Returns any value in a few words: what it is, or the kind and shape of an array."""
    shape = getattr(value, "shape", None)
    if shape is not None and tuple(shape):
        return f"{type(value).__name__} of shape {tuple(shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
