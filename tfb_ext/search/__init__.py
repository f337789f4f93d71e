"""The search for sigma: the largest posterior scale whose harm on an anchor set stays within a tolerance.

TFB (Shi et al., NeurIPS 2025, section 4 and appendix) asks for the largest sigma with ``|m(sigma) - m(0)| <= tolerance`` for
a metric ``m`` on anchors. The noise is the same at every sigma (it is a function of seed, layer and sample), so the metric is
a smooth function of sigma and the search is deterministic.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ..adapters.adapter import BayesianAdapter, Depth
from ..checks import check_samples
from ..forward.batches import Data
from ..forward.engine import Scorer
from .anchors import Anchors
from .methods import Found, find
from .plan import (
    LARGEST,
    MEMORISED_NLL,
    SMALLEST,
    Bound,
    Method,
    Metric,
    Objective,
    Options,
    Plan,
    fixed_recipe,
    make_plan,
    metric_name,
)
from .ranks import Ranks
from .result import DepthResult, Evaluation, SigmaSearch
from .rule import Rule

__all__ = ["LARGEST", "MEMORISED_NLL", "SMALLEST", "DepthResult", "Evaluation", "SigmaSearch", "search_sigma"]


def search_sigma(
    adapter: BayesianAdapter,
    anchors: Data,
    *,
    recipe: str = "auto",
    metric: Metric | None = None,
    tolerance: float | None = None,
    bound: Bound | None = None,
    objective: Objective | None = None,
    method: Method | None = None,
    bracket: tuple[float, float] | None = None,
    steps: int | None = None,
    samples: int | Sequence[int] = 10,
    depth: Depth | Sequence[Depth] | None = None,
    batch_size: int | None = None,
    early_stop: float | None = None,
    checkpoint: str | Path | None = None,
    sharded: bool = False,
    progress: bool = True,
    apply: bool = True,
) -> SigmaSearch:
    """Find sigma on anchors and (``apply=True``) set it, its depth, its mode and its summary on the adapter.

    Recipes fill in what is not given:

    * ``"auto"`` looks at the anchors: labelled and not memorised: the smallest sigma whose NLL is within a standard error of the
      lowest, by a fused grid; unlabelled or memorised: the largest sigma that changes at most 1 % of the mean adapter's predictions.
    * ``"paper"``: NLL within 0.3 % of the mean adapter's, two-sided, five bisection steps in [0.001, 0.015], independent
      samples; labels, or the mean adapter's own predictions where there are none.
    * ``"official"``: what the authors' code does. Flipout noise, the mean adapter's own predictions as labels, the relative
      change of NLL divided once more by the number of anchors, and of five midpoints the smallest that violates 0.3 %, or 0.015.

    Under torchrun or accelerate all processes call this alike; the anchors are split among them and each gets the same result.

    Args:
        adapter: from :func:`tfb_ext.bayesianize`.
        anchors: an encoded set, or batches of model arguments; labels are optional.
        metric: ``"nll"``, ``"brier"``, ``"accuracy"`` (relative tolerance), ``"flips"`` (fraction of changed predictions,
            absolute), or a function of probabilities (items, C) and targets (items,) that gives one number, or one for each
            item, lower is better (relative tolerance, 1 % by default).
        tolerance: 0.003 for nll and brier, 0.01 for the others by default.
        bound: ``"two-sided"`` (the paper: any change counts) or ``"one-sided"`` (only harm).
        objective: ``"tolerance"`` (the largest sigma that holds it), ``"minimum"`` (the sigma of the lowest NLL) or
            ``"one-se"`` (the smallest sigma whose NLL is within a standard error of the lowest).
        method: ``"bisect"``; ``"grid"``: all sigmas in one fused batch, then a finer look where it matters; ``"root"``: regula
            falsi on the smooth curve, the fewest evaluations; ``"official"``: the authors' bisection.
        bracket: where to look first.
        steps: bisection steps, grid points, or the most steps of the root finder.
        samples: posterior samples at every sigma, the same ones.
        depth: random blocks, if other than the adapter's; several to choose from: the one with the lowest NLL, or with a
            tolerance the one that buys the most entropy within it, where depths within a standard error of the best are equal
            and the cheapest of them is taken. Depths share the blocks below.
        batch_size: anchors a forward, before the fan; halved by itself where memory runs out.
        early_stop: stop a sigma's run over the anchors once its verdict is settled at this confidence, such as 0.99, or the
            change is known to 5 % of the tolerance; sigmas tried before on more anchors help to know it. Anchors then go in
            random order, and small batches give more occasions.
        checkpoint: file that holds every result as it comes; a search that finds it there goes on from it.
        sharded: every process brings anchors of its own (as from ``accelerator.prepare`` with ``even_batches=False``).
        progress: show a progress bar.
        apply: set the result on the adapter.

    Raises:
        ValueError: empty anchors, or an argument outside what is said here.
        ConfigError: the checkpoint is damaged or of another adapter, base model, data set or noise.
        SamplingError: another process of the search was lost.
    """
    started = time.perf_counter()
    options = Options(recipe, metric, tolerance, bound, objective, method, bracket, steps)
    options.check()
    _check_early_stop(early_stop, metric)
    numbers = check_samples(samples)
    depths = _depths(adapter, depth)
    fixed = fixed_recipe(recipe)
    antithetic = adapter.antithetic if fixed is None or fixed.antithetic is None else fixed.antithetic
    mode = adapter.mode if fixed is None or fixed.mode is None else fixed.mode
    ranks = Ranks()
    run: Anchors | None = None
    try:
        scorer = Scorer(
            adapter,
            anchors,
            depth=depths[0],
            batch_size=batch_size,
            samples=len(numbers),
            keep_trunk=depths,
            shuffle=early_stop is not None,
            shard=(0, 1) if sharded else (ranks.rank, ranks.size),
            may_be_empty=ranks.size > 1,
        )
        run = Anchors(
            adapter,
            scorer,
            ranks,
            sharded=sharded,
            numbers=numbers,
            antithetic=antithetic,
            mode=mode,
            pseudo=fixed is not None and fixed.pseudo,
            metric=metric_name(metric) if callable(metric) else None,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            progress=progress,
        )
        baseline_nll = float(run.records.baseline[:, 0].mean())
        plan = make_plan(options, run.labelled, baseline_nll)
        _warn_of_memorised(plan, baseline_nll)
        run.expect(plan.steps * len(depths))
        tried = _search_depths(adapter, run, plan, depths, early_stop)
    finally:
        if run is not None:
            run.close()
        ranks.close()
    best, results = _choose(adapter, tried, plan, len(numbers))
    chosen = best.chosen
    result = SigmaSearch(
        sigma=best.found.sigma,
        satisfied=best.satisfied,
        confidence=float("nan") if chosen is None else chosen.confidence,
        interval=best.interval,
        evaluations=tuple(sorted(best.evaluations, key=lambda e: e.sigma)),
        baseline=best.rule.evaluation(best.first, 0.0, best.depth),
        recipe=recipe,
        metric=plan.metric_name,
        tolerance=plan.tolerance,
        bound=plan.bound,
        objective=plan.objective,
        method=plan.method,
        bracket=best.found.bracket,
        reason=plan.reason,
        stop=best.found.stop,
        samples=len(numbers),
        antithetic=antithetic,
        mode=mode,
        seed=adapter.seed,
        depth=best.depth,
        depths=results if len(tried) > 1 else (),
        anchors=run.size,
        labelled=run.labelled,
        early_stop=early_stop,
        seconds=time.perf_counter() - started,
        tokens=scorer.tokens_run,
        records=run.records,
    )
    if not result.satisfied and plan.method != "official":  # whose choice is one that violates
        warnings.warn(f"sigma = {result.sigma:.3g}: {result.stop}", stacklevel=2)
    if checkpoint is not None and ranks.rank == 0:
        result.save(checkpoint)
    if apply:
        adapter.sigma = result.sigma
        adapter.search = result.summary()
        adapter.mode = mode
        if depth is not None:
            adapter.depth = result.depth
        if fixed is not None and fixed.mode is not None:
            adapter.antithetic = antithetic
    return result


class _AtDepth:
    """Every sigma tried at one depth; what the methods of :mod:`.methods` see."""

    def __init__(self, run: Anchors, rule: Rule, first: int, depth: int | str, early_stop: float | None) -> None:
        self.run = run
        self.rule = rule
        self.first = first
        self.depth = depth
        self.early_stop = early_stop
        self.evaluations: list[Evaluation] = []
        self.found = Found(0.0, (0.0, 0.0), "")

    def at(self, sigma: float) -> Evaluation | None:
        return next((e for e in self.evaluations if e.sigma == sigma), None)

    def evaluate(self, sigmas: Sequence[float]) -> list[Evaluation]:
        """Evaluate the sigmas not tried yet, all in one fused batch; returns all of them in the order asked."""
        new = [s for s in dict.fromkeys(sigmas) if self.at(s) is None]
        if new:
            self.run.run(self.first, new, None if self.early_stop is None else self._settled)
        self.evaluations += [self.rule.evaluation(self.first, s, self.depth) for s in new]
        return [e for e in map(self.at, sigmas) if e is not None]

    def used(self, evaluation: Evaluation) -> float:
        return self.rule.used(evaluation)

    def gap(self, evaluation: Evaluation, lowest: Evaluation) -> tuple[float, float]:
        return self.rule.behind((self.first, evaluation.sigma), (self.first, lowest.sigma), "nll")

    def _settled(self, sigmas: Sequence[float]) -> set[float]:
        """Which of them need no more anchors."""
        assert self.early_stop is not None
        values = {s: self.run.records.at(self.first, s) for s in (*sigmas, *(e.sigma for e in self.evaluations))}
        lowest = None
        if self.rule.plan.objective != "tolerance":
            lowest = min(values.values(), key=self.rule.gain)
        looks = self.run.rounds
        return {
            s
            for s in sigmas
            if self.rule.settled(self.first, values[s], self.early_stop, looks, None if values[s] is lowest else lowest)
        }

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
        return self.rule.interval(self.first, self.evaluations)


def _search_depths(
    adapter: BayesianAdapter, run: Anchors, plan: Plan, depths: Sequence[Depth], early_stop: float | None
) -> list[_AtDepth]:
    rule = Rule(plan, run.records)
    tried: list[_AtDepth] = []
    for depth in depths:
        first = adapter.first_random_block(depth)
        here = _AtDepth(run, rule, first, adapter.depth_name(first), early_stop)
        here.found = find(here, plan if not tried else _moved(plan, tried[-1].found.sigma))
        tried.append(here)
    return tried


def _moved(plan: Plan, sigma: float) -> Plan:
    """Look first around twice the sigma of the depth before: with fewer random blocks it is larger."""
    if not plan.widen:
        return plan
    low, high = plan.bracket
    half = (high / low) ** 0.5
    return replace(plan, bracket=(max(2 * sigma / half, SMALLEST), min(2 * sigma * half, LARGEST)))


def _choose(
    adapter: BayesianAdapter, tried: list[_AtDepth], plan: Plan, samples: int
) -> tuple[_AtDepth, tuple[DepthResult, ...]]:
    """The depth to take and what was found at each."""
    total = len(adapter.anatomy.blocks)
    score = "entropy" if plan.objective == "tolerance" else "nll"
    sign = -1.0 if score == "entropy" else 1.0
    scores = {h.first: float("inf") if h.chosen is None else sign * getattr(h.chosen, score) for h in tried}
    accepted = [h for h in tried if h.satisfied] or tried
    top = min(accepted, key=lambda h: scores[h.first])
    behind = {
        h.first: (0.0, 0.0)
        if h is top or h.chosen is None or top.chosen is None
        else top.rule.behind((h.first, h.found.sigma), (top.first, top.found.sigma), score)
        for h in tried
    }
    equal = [h for h in accepted if h is top or behind[h.first][0] <= behind[h.first][1]]
    best = max(equal, key=lambda h: h.first)
    results = []
    for here in tried:
        chosen = here.chosen or here.rule.evaluation(here.first, 0.0, here.depth)
        results.append(
            DepthResult(
                depth=here.depth,
                sigma=here.found.sigma,
                satisfied=here.satisfied,
                interval=here.interval,
                stop=here.found.stop,
                nll=chosen.nll,
                accuracy=chosen.accuracy,
                flips=chosen.flips,
                entropy=chosen.entropy,
                score=scores[here.first],
                behind=behind[here.first],
                forwards=(here.first + samples * (total - here.first)) / total,
            )
        )
    return best, tuple(results)


def _depths(adapter: BayesianAdapter, depth: Depth | Sequence[Depth] | None) -> list[Depth]:
    """The depths to try, the deepest first, each once."""
    if depth is None:
        return [adapter.depth]
    given: Sequence[Depth] = [depth] if isinstance(depth, int | float | str) else list(depth)
    if not given:
        raise ValueError("depth is an empty list, expected at least one depth")
    by_first = {adapter.first_random_block(d): d for d in given}
    return [by_first[first] for first in sorted(by_first)]


def _check_early_stop(early_stop: float | None, metric: Metric | None) -> None:
    if early_stop is not None and not (isinstance(early_stop, float) and 0.5 < early_stop < 1):
        raise ValueError(
            f"early_stop is {early_stop!r}, expected a confidence such as 0.99, or None to see all anchors"
        )
    if early_stop is not None and callable(metric):
        raise ValueError(
            f"early_stop is {early_stop!r} with a metric of your own, which is a function of all anchors; use early_stop=None, or "
            "metric='nll', 'brier', 'accuracy' or 'flips'"
        )


def _warn_of_memorised(plan: Plan, nll: float) -> None:
    if plan.metric == "nll" and plan.objective == "tolerance" and not plan.pseudo and nll < MEMORISED_NLL:
        warnings.warn(
            f"the mean adapter's NLL on the anchors is {nll:.2g} nats: it has memorised them, and a tolerance of "
            f"{plan.tolerance:.2%} of that allows almost no noise; use held-out anchors, or metric='flips'",
            stacklevel=3,
        )
