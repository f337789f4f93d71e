"""The authors' recipes for the search: what the paper says (``"paper"``), and what their published code does (``"official"``)."""

from __future__ import annotations

from dataclasses import replace

from ..search.methods import Found, Tried
from ..search.plan import Plan

PAPER = Plan(
    metric="nll",
    tolerance=0.003,
    bound="two-sided",
    objective="tolerance",
    method="bisect",
    bracket=(1e-3, 1.5e-2),
    steps=5,
    widen=False,
    reason="the paper's rule",
    antithetic=False,
)
OFFICIAL = replace(
    PAPER, method="official", reason="the rule of the authors' code", pseudo=True, per_item=True, mode="flipout"
)
RECIPES = {"paper": PAPER, "official": OFFICIAL}


def smallest_violation(tried: Tried, plan: Plan) -> Found:
    """The smallest midpoint that violates, or the bracket's upper end if none does: what the authors' code returns."""
    low, high = plan.bracket
    violated = False
    for _ in range(plan.steps):
        middle = (low + high) / 2
        if tried.evaluate([middle])[0].satisfied:
            low = middle
        else:
            high, violated = middle, True
    stop = f"{plan.steps} bisection steps; the smallest sigma that violates"
    if not violated:
        stop = f"{plan.steps} bisection steps, none of which violates: the bracket's upper bound ({high:g}), not tried itself"
    return Found(high, (low, high), stop)
