"""Checks of numbers that come in by more than one way."""

from __future__ import annotations

import math
from collections.abc import Sequence

# The kernels take sigma as float32, in which a smaller number is subnormal or 0 and a larger one is infinite.
LEAST_SIGMA, MOST_SIGMA = 1.17549435e-38, 3.4028234e38
# Sample numbers reach 2**31; so many of them at once would fill the memory of any machine before the first forward.
MOST_SAMPLES = 2**16


def check_sigma(value: float) -> float:
    """``value`` as a float: a finite number above 0 that float32 can hold.

    Raises:
        ValueError: it is none.
    """
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not LEAST_SIGMA <= value <= MOST_SIGMA:
        within = number and 0 < value < math.inf
        wanted = f" that float32 can hold ({LEAST_SIGMA:.2g} to {MOST_SIGMA:.2g})" if within else ""
        raise ValueError(
            f"sigma is {value!r}, expected a finite number above 0{wanted} (the mean adapter needs no sampling context)"
        )
    return float(value)


def check_samples(samples: int | Sequence[int]) -> tuple[int, ...]:
    """Sample numbers from a count or a list of them.

    Raises:
        ValueError: no samples, more than ``MOST_SAMPLES``, or a number outside [0, 2**31).
    """
    if isinstance(samples, bool | float | str) or (isinstance(samples, int) and samples < 1):
        raise ValueError(f"samples is {samples!r}, expected a count of at least 1 or a list of sample numbers")
    count = samples if isinstance(samples, int) else len(samples)
    if count > MOST_SAMPLES:
        raise ValueError(f"samples is {count}, expected at most {MOST_SAMPLES}. Fix: ask for fewer samples")
    numbers = tuple(range(samples)) if isinstance(samples, int) else tuple(samples)
    if not numbers or any(isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < 2**31 for k in numbers):
        raise ValueError(f"samples is {samples!r}, expected a count of at least 1 or sample numbers in [0, 2**31)")
    return numbers


def check_count(name: str, value: int, most: int) -> int:
    """``value``: an integer from 1 to ``most``.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected an integer from 1 to {most}")
    return value
