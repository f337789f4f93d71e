"""Numbers that callers give, checked in one place."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def check_count(value: Any, what: str) -> int:
    """``value`` as an int of at least 1; an integer of numpy is one, a bool is none.

    Args:
        what: its name, for the message.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{what} is {value!r}, expected a count of at least 1. Fix: pass a positive integer")
    return int(value)
