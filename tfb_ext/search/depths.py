"""The search at one depth and at several, and the depth to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from ..adapters.adapter import BayesianAdapter, Depth
from .anchors import Anchors
from .methods import Found, find
from .plan import LARGEST, SMALLEST, Plan
from .result import DepthResult, Evaluation
from .verdicts import Verdicts


class AtDepth:
    """Every sigma tried at one depth; what the methods of :mod:`.methods` see."""

    def __init__(self, run: Anchors, verdicts: Verdicts, first: int, depth: int | str) -> None:
        self.run = run
        self.verdicts = verdicts
        self.first = first
        self.depth = depth
        self.evaluations: list[Evaluation] = []
        self.found = Found(0.0, (0.0, 0.0), "")

    def at(self, sigma: float) -> Evaluation | None:
        return next((e for e in self.evaluations if e.sigma == sigma), None)

    def evaluate(self, sigmas: Sequence[float]) -> list[Evaluation]:
        """Evaluate the sigmas not tried yet, all in one fused batch; returns all of them in the order asked."""
        new = [s for s in dict.fromkeys(sigmas) if self.at(s) is None]
        if new:
            self.run.run(self.first, new, None if self.verdicts.plan.early_stop is None else self._settled)
        self.evaluations += [self.verdicts.evaluation(self.first, s, self.depth) for s in new]
        return [e for e in map(self.at, sigmas) if e is not None]

    def used(self, evaluation: Evaluation) -> float:
        return self.verdicts.used(evaluation)

    def gap(self, evaluation: Evaluation, lowest: Evaluation) -> tuple[float, float]:
        return self.verdicts.behind((self.first, evaluation.sigma), (self.first, lowest.sigma), "nll")

    def _settled(self, sigmas: Sequence[float]) -> set[float]:
        """Which of them need no more anchors."""
        judge, confidence = self.verdicts, self.verdicts.plan.early_stop
        assert confidence is not None
        values = {s: self.run.records.at(self.first, s) for s in (*sigmas, *(e.sigma for e in self.evaluations))}
        lowest = None if judge.criterion.tolerated else min(values.values(), key=judge.gain)
        others = {s: None if values[s] is lowest else lowest for s in sigmas}
        return {s for s in sigmas if judge.settled(self.first, values[s], confidence, self.run.rounds, others[s])}

    @property
    def chosen(self) -> Evaluation | None:
        """The evaluation at the sigma found; the authors' bisection may end on one that it did not try."""
        return self.at(self.found.sigma)

    @property
    def satisfied(self) -> bool:
        return self.chosen is not None and self.chosen.satisfied

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Of the sigma found: asked for once the search at this depth has ended."""
        return self.verdicts.interval(self.first, self.evaluations)


def depths_of(adapter: BayesianAdapter, depth: Depth | Sequence[Depth] | None) -> list[Depth]:
    """The depths to try, the deepest first, each once."""
    if depth is None:
        return [adapter.depth]
    given: Sequence[Depth] = [depth] if isinstance(depth, int | float | str) else list(depth)
    if not given:
        raise ValueError("depth is an empty list, expected at least one depth")
    by_first = {adapter.first_random_block(d): d for d in given}
    return [by_first[first] for first in sorted(by_first)]


def search_depths(adapter: BayesianAdapter, run: Anchors, plan: Plan, depths: Sequence[Depth]) -> list[AtDepth]:
    verdicts = Verdicts(plan, run.records)
    tried: list[AtDepth] = []
    for depth in depths:
        first = adapter.first_random_block(depth)
        here = AtDepth(run, verdicts, first, adapter.depth_name(first))
        if tried and plan.widen:
            # Look first around twice the sigma of the depth before: with fewer random blocks it is larger.
            low, high = verdicts.plan.bracket
            sigma, half = 2 * tried[-1].found.sigma, (high / low) ** 0.5
            plan = replace(plan, bracket=(max(sigma / half, SMALLEST), min(sigma * half, LARGEST)))
        here.found = find(here, plan)
        tried.append(here)
    return tried


def choose(adapter: BayesianAdapter, tried: list[AtDepth], samples: int) -> tuple[AtDepth, tuple[DepthResult, ...]]:
    """The depth to take and what was found at each."""
    verdicts, total = tried[0].verdicts, len(adapter.anatomy.blocks)
    score, sign = ("entropy", -1.0) if verdicts.criterion.tolerated else ("nll", 1.0)
    scores = {h.first: float("inf") if h.chosen is None else sign * getattr(h.chosen, score) for h in tried}
    accepted = [h for h in tried if h.satisfied] or tried
    top = min(accepted, key=lambda h: scores[h.first])
    behind = {
        h.first: verdicts.behind((h.first, h.found.sigma), (top.first, top.found.sigma), score)
        if h is not top and h.chosen is not None and top.chosen is not None
        else (0.0, 0.0)
        for h in tried
    }
    results = []
    for here in tried:
        chosen = here.chosen or verdicts.evaluation(here.first, 0.0, here.depth)
        results.append(
            DepthResult(
                depth=here.depth,
                sigma=here.found.sigma,
                satisfied=here.satisfied,
                interval=here.interval,
                stop=here.found.stop,
                **{name: getattr(chosen, name) for name in ("nll", "accuracy", "flips", "entropy")},
                score=scores[here.first],
                behind=behind[here.first],
                forwards=(here.first + samples * (total - here.first)) / total,
            )
        )
    equal = [h for h in accepted if h is top or behind[h.first][0] <= behind[h.first][1]]
    return max(equal, key=lambda h: h.first), tuple(results)
