"""Checks of numbers and tensors that callers pass; numbers of other libraries (numpy) come back as Python's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor

from .errors import refusal

# The kernels take sigma as float32, in which a smaller number is subnormal or 0 and a larger one is infinite.
LEAST_SIGMA, MOST_SIGMA = 1.17549435e-38, 3.4028234e38
# JSON also reads Infinity, NaN and integers beyond any float.
MOST_NUMBER = 1e300
# Sample numbers reach 2**31; so many of them at once would fill the memory of any machine before the first forward.
MOST_SAMPLES = 2**16
MOST_SPAN = 2**31 - 1  # tokens, more than any row has


def is_integer(value: object, least: float = -math.inf, most: float = math.inf) -> TypeGuard[Integral]:
    """Whether ``value`` is an integer of any library from ``least`` to ``most``; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most


def is_number(value: object, least: float = -MOST_NUMBER, most: float = MOST_NUMBER) -> TypeGuard[float]:
    """Whether ``value`` is a finite number from ``least`` to ``most``; a bool is none."""
    return least <= as_number(value) <= most


def as_number(value: object) -> float:
    """``value`` as a float; NaN where it is no real number (a bool is none)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_number(name: str, value: object, good: Callable[[float], bool], expected: str) -> float:
    """``value`` as a float for which ``good`` holds, which ``expected`` says in words.

    Raises:
        ValueError: it is no number, or another one.
    """
    number = as_number(value)
    if not good(number):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    return number


def check_choice(name: str, value: object, options: Sequence[str]) -> None:
    """Whether ``value`` is one of the ``options``.

    Raises:
        ValueError: it is none.
    """
    if value not in options:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, options))}")


def check_count(name: str, value: object, what: str = "a count", least: int = 1, most: int | None = None) -> int:
    """``value`` as an int from ``least`` to ``most``.

    Raises:
        ValueError: it is no integer, or outside.
    """
    number = int(value) if is_integer(value) else least - 1
    if number < least or (most is not None and number > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}, expected {what} {bounds}. Fix: pass {name}={least} or more")
    return number


def check_sigma(value: object) -> float:
    """``value`` as a float: a finite number above 0 that float32 can hold.

    Raises:
        ValueError: it is none.
    """
    outside = 0 < as_number(value) < math.inf
    held = f" that float32 can hold ({LEAST_SIGMA:.2g} to {MOST_SIGMA:.2g})" if outside else ""
    expected = f"a finite number above 0{held} (the mean adapter needs no sampling context)"
    return check_number("sigma", value, lambda sigma: LEAST_SIGMA <= sigma <= MOST_SIGMA, expected)


def check_samples(samples: object) -> tuple[int, ...]:
    """Sample numbers from a count or a list of them.

    Raises:
        ValueError: no samples, more than ``MOST_SAMPLES``, or a number outside [0, 2**31).
    """
    listed: object = samples
    if is_integer(samples):
        listed = range(min(int(samples), MOST_SAMPLES + 1))
    elif hasattr(samples, "tolist"):  # an array or a tensor
        listed = samples.tolist()
    if isinstance(listed, Sequence) and not isinstance(listed, str | bytes) and 1 <= len(listed) <= MOST_SAMPLES:
        numbers = tuple(int(k) for k in listed if is_integer(k) and 0 <= int(k) < 2**31)
        if len(numbers) == len(listed):
            return numbers
    raise ValueError(
        f"samples is {samples!r}, expected a count of at least 1 or a list of sample numbers in [0, 2**31), at most "
        f"{MOST_SAMPLES} of them. Fix: pass a count such as 10"
    )


def check_seed(value: object) -> int:
    """``value`` as an int: 64 bits.

    Raises:
        ValueError: it is no integer, or outside [0, 2**64).
    """
    number = int(value) if is_integer(value) else -1
    if not 0 <= number < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {value!r}")
    return number


# Tensors --------------------------------------------------------------------------------------------------------------


def is_dense(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds data, element by element: it is neither sparse, nested nor meta."""
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def has_integers(tensor: Tensor) -> bool:
    """Whether the elements of ``tensor`` are integers; bools are none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized or tensor.dtype == torch.bool)


def kind(value: object) -> str:
    """What errors call a value: ``"int64 of shape (2, 3)"``, or its type where it is no tensor."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def check_tensor(name: object, value: object) -> Tensor:
    """``value`` as a tensor.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Tensor):
        raise refusal(name, kind(value), "a tensor", f"torch.as_tensor({name}), or leave it out")
    return value


def check_dense(name: object, value: object) -> Tensor:
    """``value`` as a tensor that holds data, see ``is_dense``.

    Raises:
        ValueError: it is none.
    """
    tensor = check_tensor(name, value)
    if not is_dense(tensor):
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        got = "a tensor without data (meta)" if tensor.is_meta else f"a tensor of layout {layout}"
        raise refusal(name, got, "a dense tensor with data", ".to_dense(), or load its data first")
    return tensor
