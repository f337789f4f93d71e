"""The search at one depth and span and at several, and which to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..adapters.adapter import BayesianAdapter, Depth, Place, Span
from ..adapters.depth import span_name
from ..checks import MOST_SPAN
from .anchors import Anchors
from .methods import Found, find
from .plan import LARGEST, SMALLEST, Plan
from .result import DepthResult, Evaluation
from .verdicts import Verdicts


class AtDepth:
    """Every sigma tried at one depth and span; what the methods of :mod:`.methods` see."""

    def __init__(self, run: Anchors, verdicts: Verdicts, place: Place, depth: int | str) -> None:
        self.run = run
        self.verdicts = verdicts
        self.place, self.span = place, span_name(place.span)
        self.depth = depth
        self.evaluations: list[Evaluation] = []
        self.found = Found(0.0, (0.0, 0.0), "")

    def at(self, sigma: float) -> Evaluation | None:
        return next((e for e in self.evaluations if e.sigma == sigma), None)

    def evaluate(self, sigmas: Sequence[float]) -> list[Evaluation]:
        """Evaluate the sigmas not tried yet, all in one fused batch; returns all of them in the order asked."""
        new = [s for s in dict.fromkeys(sigmas) if self.at(s) is None]
        if new:
            self.run.run(self.place, new, None if self.verdicts.plan.early_stop is None else self._settled)
        self.evaluations += [self.verdicts.evaluation(self.place, s, self.depth) for s in new]
        return [e for e in map(self.at, sigmas) if e is not None]

    def used(self, evaluation: Evaluation) -> float:
        return self.verdicts.used(evaluation)

    def gap(self, evaluation: Evaluation, lowest: Evaluation) -> tuple[float, float]:
        return self.verdicts.behind((self.place, evaluation.sigma), (self.place, lowest.sigma), "nll")

    def _settled(self, sigmas: Sequence[float]) -> set[float]:
        """Which of them need no more anchors."""
        judge, confidence = self.verdicts, self.verdicts.plan.early_stop
        assert confidence is not None
        values = {s: self.run.records.at(self.place, s) for s in (*sigmas, *(e.sigma for e in self.evaluations))}
        lowest = None if judge.criterion.tolerated else min(values.values(), key=judge.gain)
        others = {s: None if values[s] is lowest else lowest for s in sigmas}
        return {s for s in sigmas if judge.settled(self.place, values[s], confidence, self.run.rounds, others[s])}

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
        return self.verdicts.interval(self.place, self.evaluations)


def places_of(
    adapter: BayesianAdapter, depth: Depth | Sequence[Depth] | None, span: Span | Sequence[Span] | None
) -> list[Place]:
    """The depths to try, crossed with the spans: the deepest first, and of these the longest span first, each once."""
    depths = _listed("depth", adapter.depth if depth is None else depth)
    spans = [adapter.span_tokens(s) for s in _listed("span", adapter.span if span is None else span)]
    firsts = sorted({adapter.first_random_block(d) for d in depths})
    return [Place(f, s) for f in firsts for s in sorted(set(spans), key=lambda s: -MOST_SPAN - 1 if s is None else -s)]


def _listed(name: str, given: Any) -> list[Any]:
    found = [given] if isinstance(given, int | float | str) else list(given)
    if not found:
        raise ValueError(f"{name} is an empty list, expected at least one {name}")
    return found


def search_places(adapter: BayesianAdapter, run: Anchors, plan: Plan, places: Sequence[Place]) -> list[AtDepth]:
    verdicts = Verdicts(plan, run.records)
    tried: list[AtDepth] = []
    for place in places:
        here = AtDepth(run, verdicts, place, adapter.depth_name(place.first))
        before = [t for t in tried if place.first == t.place.first or place.span == t.place.span]
        if before and plan.widen:
            # Look first around twice the sigma of the longer span, or of the depth before: where less is random it is larger.
            # The bracket stays as wide as the first.
            low, high = verdicts.plan.bracket
            half = (high / low) ** 0.5
            sigma = min(max(2 * before[-1].found.sigma, SMALLEST * half), LARGEST / half)
            plan = replace(plan, bracket=(max(sigma / half, SMALLEST), min(sigma * half, LARGEST)))
        here.found = find(here, plan)
        tried.append(here)
    return tried


def choose(tried: list[AtDepth]) -> tuple[AtDepth, tuple[DepthResult, ...]]:
    """The depth and span to take and what was found at each."""
    verdicts, run = tried[0].verdicts, tried[0].run
    forwards = {h.place: run.forwards(h.place) for h in tried}
    score, sign = ("entropy", -1.0) if verdicts.criterion.tolerated else ("nll", 1.0)
    scores = {h.place: float("inf") if h.chosen is None else sign * getattr(h.chosen, score) for h in tried}
    accepted = [h for h in tried if h.satisfied] or tried
    top = min(accepted, key=lambda h: scores[h.place])
    behind = {
        h.place: verdicts.behind((h.place, h.found.sigma), (top.place, top.found.sigma), score)
        if h is not top and h.chosen is not None and top.chosen is not None
        else (0.0, 0.0)
        for h in tried
    }
    results = []
    for here in tried:
        chosen = here.chosen or verdicts.evaluation(here.place, 0.0, here.depth)
        results.append(
            DepthResult(
                depth=here.depth,
                span=here.span,
                sigma=here.found.sigma,
                satisfied=here.satisfied,
                interval=here.interval,
                stop=here.found.stop,
                **{name: getattr(chosen, name) for name in ("nll", "accuracy", "flips", "entropy")},
                score=scores[here.place],
                behind=behind[here.place],
                forwards=forwards[here.place],
            )
        )
    equal = [h for h in accepted if h is top or behind[h.place][0] <= behind[h.place][1]]
    return min(equal, key=lambda h: forwards[h.place]), tuple(results)
