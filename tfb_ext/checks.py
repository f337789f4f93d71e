"""Checks of numbers that callers pass; integers of other libraries (numpy) come back as Python's."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

MOST_SAMPLES = 2**20  # of a count: their numbers are held as a tuple


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of any library; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: object, what: str = "a count", least: int = 1) -> int:
    """``value`` as an int of at least ``least``.

    Raises:
        ValueError: it is no integer, or a smaller one.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, expected {what} of at least {least}. Fix: pass {name}={least} or more")
    return int(value)


def check_samples(samples: int | Sequence[int]) -> tuple[int, ...]:
    """Sample numbers from a count or a list of them.

    Raises:
        ValueError: a count outside [1, 2**20], an empty list, or a number outside [0, 2**31).
    """
    if is_integer(samples):
        if not 1 <= samples <= MOST_SAMPLES:  # type: ignore[operator]
            raise ValueError(
                f"samples is {samples!r}, expected a count of at least 1 or a list of sample numbers, at most {MOST_SAMPLES}. "
                "Fix: pass a count such as 10"
            )
        return tuple(range(int(samples)))  # type: ignore[arg-type]
    try:
        numbers = () if isinstance(samples, str | bytes) else tuple(samples)  # type: ignore[arg-type]
    except TypeError:
        numbers = ()
    if not numbers or not all(is_integer(k) and 0 <= k < 2**31 for k in numbers):
        raise ValueError(
            f"samples is {samples!r}, expected a count of at least 1 or sample numbers in [0, 2**31). Fix: pass a count such as "
            "10"
        )
    return tuple(int(k) for k in numbers)
