"""The search's criterion: how far the metric may move from the mean adapter's, and which sigma the objective takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Criterion:
    """What is asked of one sigma. Numbers may be floats, or tensors of resampled anchors.

    Attributes:
        metric: its name; that of a caller's own function means nothing here.
        tolerance: relative to the mean adapter's metric; of ``flips`` absolute.
        bound: ``"two-sided"``: any change counts; ``"one-sided"``: only harm.
        objective: ``"tolerance"``, or how the lowest NLL is taken.
        anchors: how many.
        per_item: the authors' code divides the relative change once more by the number of anchors.
    """

    metric: str
    tolerance: float
    bound: str
    objective: str
    anchors: int
    per_item: bool = False

    def __post_init__(self) -> None:
        self.tolerated = self.objective == "tolerance"  # else the lowest NLL is looked for
        self.one_sided = self.bound == "one-sided" or self.metric == "flips"
        self.smooth = self.metric in ("nll", "brier")  # whether the change at an anchor is a smooth function of sigma
        self.worse = -1.0 if self.metric == "accuracy" else 1.0  # direction of the metric that is harm

    def allowed(self, base: Any) -> Any:
        """The largest amount that satisfies the tolerance, for a mean adapter whose metric is ``base``."""
        if self.metric == "flips":
            return self.tolerance
        width = self.tolerance * abs(base)
        return width * self.anchors if self.per_item else width

    def amount(self, harm: Any) -> Any:
        """What the tolerance bounds, of a change in the direction that is worse."""
        return harm if self.one_sided else abs(harm)

    def holds(self, value: float, amount: float, base: float) -> bool:
        """Whether the amount is tolerated; without a tolerance, whether the metric fell."""
        return amount <= self.allowed(base) if self.tolerated else value < base

    def used(self, value: float, base: float) -> float:
        """The share of the tolerance that a metric uses up: 1 at its edge."""
        allowed, amount = float(self.allowed(base)), float(self.amount(self.worse * (value - base)))
        return amount / allowed if allowed > 0 else math.inf if amount > 0 else 0.0

    def band(self, base: float) -> tuple[float, float]:
        """Values of the metric that satisfy the tolerance."""
        width = self.allowed(abs(base))
        low, high = base - width, base + width
        if self.one_sided:
            return (low, math.inf) if self.metric == "accuracy" else (-math.inf, high)
        return low, high

    def __str__(self) -> str:
        if self.objective == "minimum":
            return "lowest NLL on the anchors"
        if self.objective == "one-se":
            return "the smallest within a standard error of the lowest NLL on the anchors"
        if self.per_item:
            return f"NLL change / NLL / {self.anchors} anchors within {self.tolerance:.2%} of the mean adapter"
        return f"{self.metric} within {self.tolerance:.2%} ({self.bound}) of the mean adapter"
