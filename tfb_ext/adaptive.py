"""When enough samples of an item are drawn: a sequential test on the differences between its class probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .checks import check_number

# Independent draws (mirrored pairs, or samples) before the first look: two or three agree by chance too often.
FIRST_LOOK = 4
GROWTH = 1.5  # of the draws from look to look; every look costs a share of the error allowed


@dataclass(frozen=True)
class StoppingRule:
    """Stops an item's draws once those left, of N, are unlikely to change its answer (or to move its entropy).

    *Semantics.* With the draws u = 1..n of N, their class probabilities p_u(c) and the class a of the largest mean, the mean
    difference over all N lies within ::

        mean_u d_u(c)  +-  t * std_u d_u(c) * sqrt(1/n - 1/N),      d_u(c) = p_u(a) - p_u(c)

    with t the quantile of Student's t with n - 1 degrees of freedom at 1 - (1 - confidence) / (looks * (C - 1)): Bonferroni's
    correction over the looks and the other classes c. The item is settled when no interval reaches 0. With ``precision`` it is
    settled instead when the interval of the mean's entropy (linearised in the mean, plus the bias of second order; two sides,
    corrected for the looks) is no wider than ``precision`` to either side.

    The answer is that of all N draws with a probability of at least ``confidence`` for every item, where differences are
    normally distributed over draws. Nothing is promised where they are far from normal, of the answer of infinitely many draws,
    or (without ``precision``) of the probabilities. Draws that all agree settle an item at the first look.

    Attributes:
        confidence: between 0.5 and 1.
        draws: N, more than ``FIRST_LOOK``.
        precision: nats, or ``None`` to settle the answer.

    Raises:
        ValueError: a confidence, precision or number of draws out of range.
    """

    confidence: float
    draws: int
    precision: float | None = None

    def __post_init__(self) -> None:
        expected = "a confidence between 0.5 and 1 such as 0.95, or None for the same number of samples everywhere"
        check_number("adaptive", self.confidence, lambda c: 0.5 < c < 1, expected)
        if self.precision is not None:
            expected = "nats above 0 such as 0.01, or None to settle the answer"
            check_number("precision", self.precision, lambda p: 0 < p < math.inf, expected)
        if self.draws <= FIRST_LOOK:
            raise ValueError(f"draws is {self.draws}, expected more than {FIRST_LOOK}, made before the first look")

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of draws, ascending, after which an item may stop; N itself, where it must, is not among them."""
        found = [FIRST_LOOK]
        # One more look shortly before the end could save little.
        while GROWTH * (following := math.ceil(GROWTH * found[-1])) <= self.draws:
            found.append(following)
        return tuple(found)

    def settled(self, draws: Tensor) -> Tensor:
        """Which items need no more draws: (n, B, C) probabilities of n >= 2 draws of B items -> (B,) bool.

        A NaN among an item's probabilities keeps it open.
        """
        draws = draws.double()
        n, _, classes = draws.shape
        mean = draws.mean(dim=0)
        left = 1 / n - 1 / self.draws
        error = (1 - self.confidence) / len(self.looks)
        if self.precision is not None:
            log = mean.clamp_min(torch.finfo(torch.float64).tiny).log()
            spread = (draws * log).sum(dim=-1).std(dim=0) * left**0.5
            bias = draws.var(dim=0).div(mean).nan_to_num(nan=0.0).sum(dim=-1) * left / 2
            found = student_quantile(error / 2, n - 1) * spread + bias <= self.precision
            return found & mean.isfinite().all(dim=-1)
        answer = mean.argmax(dim=-1, keepdim=True)
        difference = draws.gather(-1, answer.expand(n, -1, -1)) - draws
        reach = student_quantile(error / max(classes - 1, 1), n - 1) * difference.std(dim=0) * left**0.5
        clear = (difference.mean(dim=0) > reach).scatter(-1, answer, True)
        return clear.all(dim=-1) & mean.isfinite().all(dim=-1)


def draw_size(samples: Sequence[int], antithetic: bool, given: object) -> int:
    """How many consecutive samples make one independent draw: 2 for mirrored pairs, else 1. ``given`` is what errors show.

    Raises:
        ValueError: too few samples, one that comes twice, or some that are mirrored pairs and others that are not.
    """
    step, kind, different = 1, "samples", {k // 2 for k in samples} if antithetic else set(samples)
    if antithetic and is_paired(samples):
        step, kind = 2, "mirrored pairs"
    elif len(different) < len(samples):
        pairs = "whole mirrored pairs, each side by side with the even number first (a count must be even)"
        wanted = pairs if antithetic else "different numbers"
        raise ValueError(f"samples is {given!r}, expected {wanted}: adaptive= judges by independent draws")
    if len(samples) // step <= FIRST_LOOK:
        raise ValueError(
            f"samples is {given!r}, expected more than {FIRST_LOOK * step} with adaptive=, which looks first after {FIRST_LOOK} "
            f"{kind}. Fix: ask for more samples, or leave adaptive out"
        )
    return step


def is_paired(samples: Sequence[int]) -> bool:
    """Whether the samples are mirrored pairs side by side: 2k, 2k + 1."""
    pairs = zip(samples[::2], samples[1::2], strict=False)
    return len(samples) % 2 == 0 and all(a % 2 == 0 and b == a + 1 for a, b in pairs)


@cache
def student_quantile(tail: float, degrees: int) -> float:
    """The t that Student's t with so many degrees of freedom exceeds with probability ``tail``, in (0, 0.5).

    Bisection of the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - _within(middle, degrees)) / 2 > tail else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(theta: float, degrees: int) -> float:
    """P(\\|t\\| < sqrt(degrees) tan(theta))."""
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= (k - 1) / k * math.cos(theta) ** 2
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total
