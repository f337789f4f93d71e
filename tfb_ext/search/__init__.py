"""The search for sigma: the largest posterior scale whose harm on an anchor set stays within a tolerance.

TFB (Shi et al., NeurIPS 2025, section 4 and appendix) asks for the largest sigma with ``|m(sigma) - m(0)| <= tolerance`` for
a metric ``m`` on anchors (:mod:`.criterion`). The noise is the same at every sigma (it is a function of seed, layer and
sample), so the metric is a smooth function of sigma and the search is deterministic.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..adapters.adapter import BayesianAdapter, Depth, Span
from ..checks import check_samples
from ..forward.batches import Data
from ..posterior.config import By
from .anchors import Anchors
from .depths import choose, places_of, search_places
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
    make_plan,
    metric_name,
    settings_of,
)
from .ranks import Ranks
from .result import DepthResult, Evaluation, SigmaSearch

__all__ = ["LARGEST", "MEMORISED_NLL", "SMALLEST", "DepthResult", "Evaluation", "SigmaSearch", "search_sigma"]


def search_sigma(
    adapter: BayesianAdapter,
    anchors: Data,
    *,
    by: By = "samples",
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
    span: Span | Sequence[Span] | None = None,
    batch_size: int | None = None,
    early_stop: float | None = None,
    checkpoint: str | Path | None = None,
    sharded: bool = False,
    progress: bool = True,
    apply: bool = True,
) -> SigmaSearch:
    """Find sigma on anchors and (``apply=True``) set it, its depth, span, mode and its summary on the adapter.

    Recipes fill in what is not given:

    * ``"auto"`` looks at the anchors. Labelled and not memorised: the smallest sigma whose NLL is within a standard error of the
      lowest, by a fused grid. Else: the largest sigma that changes at most 1 % of the mean adapter's predictions.
    * ``"paper"``: NLL within 0.3 % of the mean adapter's, two-sided, five bisection steps in [0.001, 0.015], independent
      samples; labels, or the mean adapter's own predictions where there are none.
    * ``"official"``: what the authors' code does. Flipout noise, the mean adapter's own predictions as labels, the relative
      change of NLL divided once more by the number of anchors, and of five midpoints the smallest that violates 0.3 %, or 0.015.

    Under torchrun or accelerate all processes call this alike; the anchors are split among them and each gets the same result.

    Args:
        adapter: from :func:`tfb_ext.bayesianize`.
        anchors: an encoded set, or batches of model arguments; labels are optional.
        by: what the anchors are predicted by, as in :func:`tfb_ext.predict`. ``"linear"`` draws no samples: one pass over the anchors
            for each depth and span (:meth:`BayesianAdapter.gaussian <tfb_ext.BayesianAdapter.gaussian>`) serves every sigma.
        metric: ``"nll"``, ``"brier"``, ``"accuracy"`` (relative tolerance) or ``"flips"`` (changed predictions, absolute); or a
            function of probabilities (items, C) and targets (items,) that gives one number, or one for each item, lower is better.
        tolerance: by default 0.003 for nll and brier, 0.01 for the others.
        bound: ``"two-sided"`` (the paper: any change counts) or ``"one-sided"`` (only harm).
        objective: ``"tolerance"`` (the largest sigma that holds it), ``"minimum"`` (the sigma of the lowest NLL) or
            ``"one-se"`` (the smallest sigma whose NLL is within a standard error of the lowest).
        method: ``"bisect"``; ``"grid"``: all sigmas in one fused batch, then a finer look; ``"root"``: regula falsi on the
            smooth curve, the fewest evaluations; ``"official"``: the authors' bisection.
        bracket: where to look first.
        steps: bisection steps, grid points, or the most steps of the root finder.
        samples: posterior samples at every sigma, the same ones; they count for nothing by linear.
        depth: random blocks, if other than the adapter's. Of several the one with the lowest NLL is taken, or with a tolerance
            the one with most entropy within it; of those within a standard error of the best the cheapest.
        span: random tokens, if other than the adapter's; of several, each at every depth, one is taken in the same way. The prompt
            before them runs once for all sigmas.
        batch_size: anchors a forward, before the fan; halved where memory runs out.
        early_stop: leave out anchors once a sigma's verdict is settled at this confidence, such as 0.99, or its change is known
            to 5 % of the tolerance. Anchors then go in random order; small batches give more occasions. Not by linear.
        checkpoint: file that holds every result as it comes; a search that finds it there goes on from it.
        sharded: every process brings its own anchors (as from ``accelerator.prepare`` with ``even_batches=False``).
        progress: show a progress bar.
        apply: set the result on the adapter.

    Raises:
        ValueError: empty anchors, or an argument outside what is said here.
        ConfigError: the checkpoint is damaged or of another adapter, base model, data set or noise.
        SamplingError: another process of the search was lost.
    """
    started = time.perf_counter()
    options = Options(recipe, metric, tolerance, bound, objective, method, bracket, steps, early_stop, by)
    options.check()
    numbers, places, settings = check_samples(samples), places_of(adapter, depth, span), settings_of(recipe)
    antithetic = adapter.antithetic if settings.antithetic is None else settings.antithetic
    mode = adapter.mode if settings.mode is None else settings.mode
    ranks = Ranks()
    run: Anchors | None = None
    try:
        run = Anchors(
            adapter,
            anchors,
            ranks,
            by=by,
            places=places,
            batch_size=batch_size,
            shuffle=early_stop is not None,
            sharded=sharded,
            numbers=numbers,
            antithetic=antithetic,
            mode=mode,
            pseudo=settings.pseudo,
            metric=metric_name(metric) if callable(metric) else None,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            progress=progress,
        )
        baseline_nll = float(run.records.baseline[:, 0].mean())
        plan = make_plan(options, run.labelled, baseline_nll)
        _warn_of_memorised(plan, baseline_nll)
        run.expect(plan.steps * len(places))
        tried = search_places(adapter, run, plan, places)
    finally:
        if run is not None:
            run.close()
        ranks.close()
    best, results = choose(tried)
    result = SigmaSearch(
        **best.found._asdict(),
        satisfied=best.satisfied,
        confidence=float("nan") if best.chosen is None else best.chosen.confidence,
        interval=best.interval,
        evaluations=tuple(sorted(best.evaluations, key=lambda e: e.sigma)),
        baseline=best.verdicts.evaluation(best.place, 0.0, best.depth),
        by=by,
        recipe=recipe,
        metric=plan.metric_name,
        **{name: getattr(plan, name) for name in ("tolerance", "bound", "objective", "method", "reason", "early_stop")},
        samples=0 if by == "linear" else len(numbers),
        antithetic=antithetic,
        mode=mode,
        seed=adapter.seed,
        depth=best.depth,
        span=best.span,
        depths=results if len(tried) > 1 else (),
        anchors=run.size,
        labelled=run.labelled,
        seconds=time.perf_counter() - started,
        tokens=run.tokens,
        records=run.records,
    )
    if not result.satisfied and plan.method != "official":  # whose choice is one that violates
        warnings.warn(f"sigma = {result.sigma:.3g}: {result.stop}", stacklevel=2)
    if checkpoint is not None and ranks.rank == 0:
        result.save(checkpoint)
    if apply:
        adapter.sigma, adapter.by, adapter.searched_on = result.sigma, by, adapter.base_kind
        adapter.search = result.summary()
        adapter.mode = mode
        if depth is not None:
            adapter.depth = result.depth
        if span is not None:
            adapter.span = result.span
        if settings.mode is not None:
            adapter.antithetic = antithetic
    return result


def _warn_of_memorised(plan: Plan, nll: float) -> None:
    if plan.metric == "nll" and plan.objective == "tolerance" and not plan.pseudo and nll < MEMORISED_NLL:
        warnings.warn(
            f"the mean adapter's NLL on the anchors is {nll:.2g} nats: it has memorised them, and a tolerance of "
            f"{plan.tolerance:.2%} of that allows almost no noise; use held-out anchors, or metric='flips'",
            stacklevel=3,
        )
