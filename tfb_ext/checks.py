"""Checks of numbers and tensors that callers pass; numbers of other libraries (numpy) come back as Python's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

# The kernels take sigma as float32, in which a smaller number is subnormal or 0 and a larger one is infinite.
LEAST_SIGMA, MOST_SIGMA = 1.17549435e-38, 3.4028234e38
# JSON also reads Infinity, NaN and integers beyond any float.
MOST_NUMBER = 1e300
# Sample numbers reach 2**31; so many of them at once would fill the memory of any machine before the first forward.
MOST_SAMPLES = 2**16


def is_integer(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether ``value`` is an integer of any library from ``least`` to ``most``; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_number(value: Any, least: float = -MOST_NUMBER, most: float = MOST_NUMBER) -> TypeGuard[float]:
    """Whether ``value`` is a finite number from ``least`` to ``most``; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(least <= value <= most)  # type: ignore[operator]


def is_dense(tensor: Tensor) -> bool:
    """Whether ``tensor`` has data of its own, element by element: neither sparse, nested nor meta."""
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def check_count(name: str, value: object, what: str = "a count", least: int = 1, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``.

    Raises:
        ValueError: it is no integer, or outside.
    """
    number = int(value) if isinstance(value, Integral) and is_integer(value) else least - 1
    if number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}, expected {what} {bounds}. Fix: pass {name}={least} or more")
    return number


def check_number(name: str, value: object, what: str, above: float = 0.0, below: float = math.inf) -> float:
    """``value`` as a float between ``above`` and ``below``, which are outside.

    Raises:
        ValueError: it is no number, or outside.
    """
    if not is_number(value) or not above < value < below:
        raise ValueError(f"{name} is {value!r}, expected {what}")
    return float(value)


def check_sigma(value: object) -> float:
    """``value`` as a float: a finite number above 0 that float32 can hold.

    Raises:
        ValueError: it is none.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    scale = float(value) if isinstance(value, Real) and number else math.nan
    if not LEAST_SIGMA <= scale <= MOST_SIGMA:
        within = number and 0 < scale < math.inf
        wanted = f" that float32 can hold ({LEAST_SIGMA:.2g} to {MOST_SIGMA:.2g})" if within else ""
        raise ValueError(
            f"sigma is {value!r}, expected a finite number above 0{wanted} (the mean adapter needs no sampling context)"
        )
    return scale


def check_samples(samples: object) -> tuple[int, ...]:
    """Sample numbers from a count or a list of them.

    Raises:
        ValueError: no samples, more than ``MOST_SAMPLES``, or a number outside [0, 2**31).
    """
    wrong = (
        f"samples is {samples!r}, expected a count of at least 1 or a list of sample numbers in [0, 2**31), at most {MOST_SAMPLES} of "
        "them. Fix: pass a count such as 10"
    )
    if isinstance(samples, Integral) and is_integer(samples):
        if not 1 <= int(samples) <= MOST_SAMPLES:
            raise ValueError(wrong)
        return tuple(range(int(samples)))
    listed: object = samples
    if hasattr(samples, "tolist"):  # an array or a tensor
        listed = samples.tolist()
    if isinstance(listed, str | bytes) or not isinstance(listed, Sequence) or not 1 <= len(listed) <= MOST_SAMPLES:
        raise ValueError(wrong)
    numbers = [int(k) for k in listed if isinstance(k, Integral) and is_integer(k) and 0 <= int(k) < 2**31]
    if len(numbers) < len(listed):
        raise ValueError(wrong)
    return tuple(numbers)


def check_seed(value: object) -> int:
    """``value`` as an int: 64 bits.

    Raises:
        ValueError: it is no integer, or outside [0, 2**64).
    """
    number = int(value) if isinstance(value, Integral) and is_integer(value) else -1
    if not 0 <= number < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {value!r}")
    return number
