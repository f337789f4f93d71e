"""Checks of numbers that callers pass; numbers of other libraries (numpy) come back as Python's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

# The kernels take sigma as float32, in which a smaller number is subnormal or 0 and a larger one is infinite.
LEAST_SIGMA, MOST_SIGMA = 1.17549435e-38, 3.4028234e38
# Sample numbers reach 2**31; so many of them at once would fill the memory of any machine before the first forward.
MOST_SAMPLES = 2**16


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer of any library; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_count(name: str, value: object, what: str = "a count", least: int = 1, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``.

    Raises:
        ValueError: it is no integer, or outside.
    """
    if (
        not isinstance(value, Integral)
        or isinstance(value, bool)
        or value < least
        or (most is not None and value > most)
    ):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}, expected {what} {bounds}. Fix: pass {name}={least} or more")
    return int(value)


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
    wanted = "expected a count of at least 1 or a list of sample numbers in [0, 2**31)"
    if isinstance(samples, Integral) and not isinstance(samples, bool):
        if samples < 1:
            raise ValueError(f"samples is {samples!r}, {wanted}. Fix: pass a count such as 10")
        _check_number_of_samples(int(samples))
        return tuple(range(int(samples)))
    numbers: tuple[object, ...] = ()
    if isinstance(samples, Sequence) and not isinstance(samples, str | bytes):
        _check_number_of_samples(len(samples))
        numbers = tuple(samples)
    elif hasattr(samples, "tolist"):  # an array or a tensor
        listed = samples.tolist()
        numbers = tuple(listed) if isinstance(listed, list) else ()
        _check_number_of_samples(len(numbers))
    if not numbers or not all(isinstance(k, Integral) and is_integer(k) and 0 <= k < 2**31 for k in numbers):
        raise ValueError(f"samples is {samples!r}, {wanted}. Fix: pass a count such as 10")
    return tuple(int(k) for k in numbers if isinstance(k, Integral))


def _check_number_of_samples(count: int) -> None:
    if count > MOST_SAMPLES:
        raise ValueError(f"samples is {count}, expected at most {MOST_SAMPLES}. Fix: ask for fewer samples")
