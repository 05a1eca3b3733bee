"""Argument checks that plans, grouping and embedding have in common; every message names what it is about."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def integer(value: Any, name: str, minimum: int | None = None) -> int:
    """`value` as an int; bools and floats are refused, NumPy integers are not."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def fraction(value: Any, name: str) -> float:
    """`value` as a float in [0, 1], or an error that names it."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    number = float(value)
    if not 0.0 <= number <= 1.0:  # NaN fails too
        raise ValueError(f"{name} must be in [0, 1], got {number}")
    return number


def threshold(value: Any, name: str) -> float:
    """A cosine threshold as a float in (-1, 1], or an error that names it."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number in (-1, 1], got {value!r}")
    number = float(value)
    if not -1.0 < number <= 1.0:
        raise ValueError(f"{name} must be in (-1, 1], got {number}")
    return number


def items(value: Any, name: str) -> Sequence:
    """`value`, refused when it is no list, tuple or array."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return value


def check_types(values: Sequence, kind: type, name: str) -> None:
    """Refuse a value of another class."""
    for number, item in enumerate(values):
        if not isinstance(item, kind):
            raise TypeError(f"SharingPlan: {name}[{number}] must be a {kind.__name__}, got {item!r}")


def texts(values: Any, name: str) -> list[str]:
    """`values` as a list of at least one str."""
    if isinstance(values, str) or not isinstance(values, (Sequence, np.ndarray)):
        raise TypeError(f"{name} must be a sequence of str, got {type(values).__name__}")
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{number}] must be a str, got {value!r}")
    if len(values) == 0:
        raise ValueError(f"{name} must hold at least one prompt, got none")
    return list(values)


def short(indices: Sequence[int], limit: int = 8) -> str:
    """A list of indices for an error message, cut when long."""
    text = ", ".join(map(str, indices[:limit]))
    return f"[{text}, … {len(indices)} in all]" if len(indices) > limit else f"[{text}]"
