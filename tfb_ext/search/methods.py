"""Ways to the sigma: bisection, a grid, a root of the smooth curve, the lowest NLL; they see the anchors through ``Tried``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .plan import LARGEST, ROOT_USED, SMALLEST, Plan
from .result import Evaluation

# The root finder also stops where sigma is known to this factor, and aims a little inside the tolerance.
ROOT_FACTOR, ROOT_AIM = 1.05, 0.97


class Tried(Protocol):
    """Every sigma tried at one depth, judged by the plan's criterion."""

    evaluations: list[Evaluation]

    def evaluate(self, sigmas: Sequence[float]) -> list[Evaluation]:
        """Evaluate the sigmas not tried yet, all in one fused batch; returns all of them in the order asked."""

    def used(self, evaluation: Evaluation) -> float:
        """The share of the tolerance that is used up."""

    def gap(self, evaluation: Evaluation, lowest: Evaluation) -> tuple[float, float]:
        """How far the NLL is above the lowest one, and the paired standard error of that."""


class Found(NamedTuple):
    """The chosen sigma, the interval looked at, and why the search stopped."""

    sigma: float
    bracket: tuple[float, float]
    stop: str


def find(tried: Tried, plan: Plan) -> Found:
    if plan.objective != "tolerance":
        return _minimum(tried, plan)
    if plan.method == "official":
        from ..research.recipe import smallest_violation

        return smallest_violation(tried, plan)
    return {"bisect": _bisect, "grid": _grid, "root": _root}[plan.method](tried, plan)


def _holds(tried: Tried, sigma: float) -> bool:
    return tried.evaluate([sigma])[0].satisfied


def _bisect(tried: Tried, plan: Plan) -> Found:
    low, high = plan.bracket
    holds = False
    if plan.widen:
        while _holds(tried, high):
            low, holds = high, True
            if high >= LARGEST:
                stop = f"every sigma up to the largest allowed ({LARGEST:g}) holds the tolerance"
                return Found(high, (low, high), stop)
            high = min(2 * high, LARGEST)
        while not holds and not _holds(tried, low):
            if low <= SMALLEST:
                return Found(low, (low, high), _none_down_to(SMALLEST))
            low, high = max(low / 2, SMALLEST), low
        holds = True
    for _ in range(plan.steps):
        # The paper's bracket is narrow and halved in sigma; a widened one spans decades and is halved in log sigma.
        middle = math.sqrt(low * high) if plan.widen else (low + high) / 2
        if _holds(tried, middle):
            low, holds = middle, True
        else:
            high = middle
    stop = f"{plan.steps} bisection steps"
    if not holds and not _holds(tried, low):
        stop = f"no sigma tried holds the tolerance; this is the lower bound of the bracket ({low:g})"
    elif high == plan.bracket[1] and not plan.widen:
        stop += f"; every sigma tried holds the tolerance, so a larger one beyond the bracket's upper bound ({high:g}) may too"
    return Found(low, (low, high), stop)


def _none_down_to(sigma: float) -> str:
    return f"no sigma down to {sigma:g} holds the tolerance; this is the lower bound"


def _root(tried: Tried, plan: Plan) -> Found:
    """Regula falsi on the used share of the tolerance, both axes logarithmic, where the curve is nearly straight.

    The noise is the same at every sigma, so the curve is smooth. A change of the metric begins with the square of sigma, so
    the first step goes by that. On one side for the second time it bisects: a curve with steps (changed predictions) is no
    worse than bisection.
    """
    first, last = (SMALLEST, LARGEST) if plan.widen else plan.bracket
    below: tuple[float, float] | None = None  # the largest sigma that holds, below any that violates; its used share
    above: tuple[float, float] | None = None
    sigma = math.sqrt(plan.bracket[0] * plan.bracket[1])
    sides: list[bool] = []
    for step in range(plan.steps):
        evaluation = tried.evaluate([sigma])[0]
        used = tried.used(evaluation)
        sides.append(evaluation.satisfied)
        if evaluation.satisfied:
            below = sigma, used
            if used >= ROOT_USED:
                return Found(sigma, (sigma, above[0] if above else sigma), f"{used:.0%} of the tolerance used up")
            if sigma >= last:
                return Found(sigma, (sigma, sigma), f"the largest sigma allowed ({last:g}) holds the tolerance")
        else:
            above = sigma, used
            if sigma <= first:
                return Found(sigma, (sigma, sigma), _none_down_to(first))
        if below and above and above[0] / below[0] <= ROOT_FACTOR:
            return Found(below[0], (below[0], above[0]), f"sigma known to a factor of {above[0] / below[0]:.3f}")
        if step + 1 < plan.steps:
            sigma = min(max(_aim(below, above, sides), first), last)
    if below is None:
        assert above is not None
        return Found(above[0], (first, above[0]), f"{plan.steps} steps; no sigma tried holds the tolerance")
    return Found(below[0], (below[0], above[0] if above else last), f"{plan.steps} steps")


def _aim(below: tuple[float, float] | None, above: tuple[float, float] | None, sides: list[bool]) -> float:
    if below is None or above is None:
        known = below or above
        assert known is not None
        sigma, used = known
        # From one point: by the square law, at most to an eighth or eight times; and at least a step.
        step = math.sqrt(ROOT_AIM / used) if used > 0 else 8.0
        step = min(max(step, 1.02), 8.0) if below else max(min(step, 1 / 1.02), 1 / 8)
        return sigma * step
    (low, used_low), (high, used_high) = below, above
    if used_low <= 0 or not math.isfinite(used_high) or sides[-2:] in ([True, True], [False, False]):
        return math.sqrt(low * high)
    share = math.log(ROOT_AIM / used_low) / math.log(used_high / used_low)
    margin = 0.1  # of the bracket, in log sigma: never so close to an end that nothing is learnt
    return low * (high / low) ** min(max(share, margin), 1 - margin)


def _log_grid(low: float, high: float, points: int) -> tuple[list[float], float]:
    """The points with both ends exactly as given, and the ratio of neighbours."""
    ratio = (high / low) ** (1 / (points - 1))
    return [low, *(low * ratio**i for i in range(1, points - 1)), high], ratio


def _grid(tried: Tried, plan: Plan) -> Found:
    """Fused grid, then piecewise-linear interpolation between the largest sigma that holds and the next one."""
    low, high = plan.bracket
    grid = tried.evaluate(_log_grid(low, high, plan.steps)[0])
    while plan.widen and grid[-1].satisfied:
        if high >= LARGEST:
            return Found(high, (low, high), f"the largest sigma allowed ({LARGEST:g}) holds the tolerance")
        grid += tried.evaluate(sorted({min(2 * high, LARGEST), min(4 * high, LARGEST)}))
        high = grid[-1].sigma
    while plan.widen and not any(e.satisfied for e in grid):
        if low <= SMALLEST:
            return Found(low, (low, high), _none_down_to(SMALLEST))
        grid = tried.evaluate(sorted({max(low / 4, SMALLEST), max(low / 2, SMALLEST)})) + grid
        low = grid[0].sigma
    last = max((i for i, e in enumerate(grid) if e.satisfied), default=None)
    if last is None:
        return Found(low, (low, high), f"no sigma of the grid holds the tolerance; this is its lower bound ({low:g})")
    if last == len(grid) - 1:
        stop = f"the largest sigma of the grid holds the tolerance; this is its upper bound ({high:g})"
        return Found(high, (low, high), stop)
    below, above = grid[last], grid[last + 1]
    used, more = tried.used(below), tried.used(above)
    # Where the line through the two meets the edge of the tolerance, unless that is one of them.
    share = (1 - used) / (more - used) if math.isfinite(more) else 0.0
    between = below.sigma + share * (above.sigma - below.sigma)
    if 0.02 < share < 0.98 and _holds(tried, between):
        return Found(between, (below.sigma, above.sigma), "interpolated between grid points, and checked there")
    return Found(below.sigma, (below.sigma, above.sigma), "largest grid point that holds the tolerance")


def _minimum(tried: Tried, plan: Plan) -> Found:
    """The sigma of the lowest NLL: a grid, widened while the lowest is at its end, then both sides of the lowest."""
    low, high = plan.bracket
    grid, ratio = _log_grid(low, high, plan.steps)
    tried.evaluate(grid)

    def best() -> Evaluation:
        return min(tried.evaluations, key=lambda e: e.nll)

    while plan.widen and best().sigma >= high / 1.001 and high < LARGEST:
        high = min(high * ratio, LARGEST)
        tried.evaluate([high])
    while plan.widen and best().sigma <= low * 1.001 and low > SMALLEST:
        low = max(low / ratio, SMALLEST)
        tried.evaluate([low])
    centre, half = best().sigma, math.sqrt(ratio)
    tried.evaluate([s for s in (centre / half, centre * half) if low <= s <= high])
    found = best()
    if not found.satisfied:
        stop = f"no sigma lowers the anchors' NLL; this is the best of those tried ({found.sigma:.3g})"
        return Found(found.sigma, (low, high), stop)
    stop = f"lowest NLL of {len(tried.evaluations)} sigmas, known to a factor of {half:.2f}"
    if found.sigma in (low, high):
        stop += "; it lies on the edge of what was tried"
    sigma = found.sigma
    if plan.objective == "one-se":
        lower = [e for e in tried.evaluations if e.satisfied and e.sigma < found.sigma]
        gaps = {e.sigma: tried.gap(e, found) for e in lower}
        sigma = min([found.sigma, *(s for s, (gap, error) in gaps.items() if gap <= error)])
    if sigma != found.sigma:
        stop += f" ({found.sigma:.3g}); the smallest within a standard error of it"
    return Found(sigma, (low, high), stop)
