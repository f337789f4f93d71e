"""The search for sigma: the largest posterior scale whose harm on an anchor set stays within a tolerance.

TFB (Shi et al., NeurIPS 2025, section 4 and appendix) asks for the largest sigma with ``|m(sigma) - m(0)| <= tolerance`` for
a metric ``m`` on anchors. The noise is the same at every sigma (it is a function of seed, layer and sample), so the metric is
a smooth function of sigma and the search is deterministic.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .adapter import BayesianAdapter, Depth, check_samples, check_sigma
from .files import write_atomically
from .scoring import MANY_CLASSES, Batch, Data, Scorer, item_labels

Metric = Literal["nll", "accuracy", "flips"]
Bound = Literal["two-sided", "one-sided"]
Objective = Literal["tolerance", "minimum"]
Method = Literal["bisect", "grid"]

# Below this mean NLL (nats) the anchors are taken as memorised: a relative tolerance on it then measures nothing.
MEMORISED_NLL = 0.01
# Bracket and grid are widened by doubling, up to these; a weight noise of 10 leaves nothing of any adapter.
SMALLEST, LARGEST = 1e-5, 10.0
TOLERANCES: dict[str, float] = {"nll": 0.003, "accuracy": 0.01, "flips": 0.01}


@dataclass(frozen=True)
class Evaluation:
    """The anchors at one sigma.

    Attributes:
        sigma: posterior scale; 0 is the mean adapter.
        value: the search's metric.
        standard_error: of the metric's change from the mean adapter, paired over anchors.
        satisfied: whether the tolerance holds (always true for sigma 0; for ``objective="minimum"`` whether NLL fell).
        nll, accuracy, flips: all three metrics (nats; fractions). NLL and accuracy need labels or take the mean's own.
    """

    sigma: float
    value: float
    standard_error: float
    satisfied: bool
    nll: float
    accuracy: float
    flips: float


@dataclass(frozen=True)
class SigmaSearch:
    """What a search found and how.

    Attributes:
        sigma: the chosen posterior scale.
        satisfied: whether the evaluation at ``sigma`` met the objective; if not, ``sigma`` is the lower bound (the lowest NLL
            of those tried, for ``objective="minimum"``).
        evaluations: every sigma tried, ascending.
        baseline: the mean adapter (sigma 0).
        bracket: the interval that was looked at in the end.
        reason: why the recipe chose this metric and objective.
        stop: why the search ended.
        seconds, tokens: wall time, and tokens times samples that went through the random blocks.
    """

    sigma: float
    satisfied: bool
    evaluations: tuple[Evaluation, ...]
    baseline: Evaluation
    recipe: str
    metric: Metric
    tolerance: float
    bound: Bound
    objective: Objective
    method: Method
    bracket: tuple[float, float]
    reason: str
    stop: str
    samples: int
    antithetic: bool
    seed: int
    depth: int | str
    anchors: int
    labelled: bool
    seconds: float
    tokens: int

    @property
    def band(self) -> tuple[float, float]:
        """Values of the metric that satisfy the tolerance."""
        width = self.tolerance if self.metric == "flips" else self.tolerance * self.baseline.value
        low, high = self.baseline.value - width, self.baseline.value + width
        if self.bound == "one-sided" or self.metric == "flips":
            return (low, math.inf) if self.metric == "accuracy" else (-math.inf, high)
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON, which has no NaN: such numbers are ``None``."""
        fields = asdict(self)
        fields["evaluations"] = [_finite(e) for e in fields["evaluations"]]
        return {**fields, "baseline": _finite(fields["baseline"])}

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SigmaSearch:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        raw["evaluations"] = tuple(_evaluation(e) for e in raw["evaluations"])
        raw["baseline"] = _evaluation(raw["baseline"])
        raw["bracket"] = tuple(raw["bracket"])
        return cls(**raw)

    def plot(self, path: str | Path) -> None:
        """Draw the metric against sigma with the tolerance band and the chosen sigma (PNG; needs matplotlib)."""
        from .report import search_trace

        search_trace(self, path)

    def summary(self) -> dict[str, Any]:
        """The part that is worth keeping in ``tfb_config.json``."""
        keep = (
            "recipe",
            "metric",
            "tolerance",
            "bound",
            "objective",
            "method",
            "samples",
            "anchors",
            "labelled",
            "reason",
            "stop",
        )
        return {name: getattr(self, name) for name in keep}

    def __str__(self) -> str:
        rule = (
            "lowest NLL on the anchors"
            if self.objective == "minimum"
            else f"{self.metric} within {self.tolerance:.2%} ({self.bound}) of the mean adapter"
        )
        lines = [
            f"sigma = {self.sigma:.4g}   ({self.recipe}: {rule}; {self.method}, {self.samples} samples, {self.anchors} anchors, "
            f"depth {self.depth}, {self.seconds:.1f} s)",
            f"  why:  {self.reason}",
            f"  stop: {self.stop}",
            f"  {'sigma':>10} {'nll':>9} {'accuracy':>9} {'flips':>7}   meets the rule",
        ]
        for e in (self.baseline, *self.evaluations):
            mark = (
                ""
                if e.sigma == 0
                else ("yes" if e.satisfied else "no") + ("   <- chosen" if e.sigma == self.sigma else "")
            )
            lines.append(f"  {e.sigma:>10.4g} {e.nll:>9.4f} {e.accuracy:>9.3f} {e.flips:>7.3f}   {mark}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Plan:
    """A recipe with its blanks filled in."""

    metric: Metric
    tolerance: float
    bound: Bound
    objective: Objective
    method: Method
    bracket: tuple[float, float]
    steps: int
    widen: bool
    antithetic: bool
    reason: str


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
    depth: Depth | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    apply: bool = True,
) -> SigmaSearch:
    """Find sigma on anchors and (``apply=True``) set it, its depth and its summary on the adapter.

    Recipes fill in what is not given:

    * ``"auto"`` looks at the anchors: labelled and not memorised: the sigma of the lowest NLL; unlabelled or memorised: the
      largest sigma that changes at most 1 % of the mean adapter's predictions. By a fused grid, widened as needed.
    * ``"paper"``: NLL within 0.3 % of the mean adapter's, two-sided, five bisection steps in [0.001, 0.015], independent
      samples; labels, or the mean adapter's own predictions where there are none.

    Args:
        adapter: from :func:`tfb_ext.bayesianize`.
        anchors: an encoded set, or batches of model arguments; labels are optional.
        metric: ``"nll"``, ``"accuracy"`` (relative tolerance) or ``"flips"`` (fraction of changed predictions, absolute).
        tolerance: 0.003 for nll, 0.01 for the others by default.
        bound: ``"two-sided"`` (the paper: any change counts) or ``"one-sided"`` (only harm).
        objective: ``"tolerance"`` (the largest sigma that holds it) or ``"minimum"`` (the sigma of the lowest NLL).
        method: ``"bisect"``, or ``"grid"``: all sigmas in one fused batch, then a finer look where it matters.
        bracket: where to look first.
        steps: bisection steps, or grid points.
        samples: posterior samples at every sigma, the same ones.
        depth: random blocks, if other than the adapter's.
        batch_size: anchors a forward, before the fan.
        progress: show a progress bar.
        apply: set the result on the adapter.

    Raises:
        ValueError: empty anchors, or an argument outside what is said here.
    """
    numbers = check_samples(samples)
    _check_arguments(recipe, metric, tolerance, bound, objective, method, bracket, steps)
    started = time.perf_counter()
    scorer = Scorer(adapter, anchors, depth=depth, batch_size=batch_size, keep_trunk=True)
    bench = _Anchors(scorer, adapter, numbers, progress)
    plan = _plan(
        recipe,
        bench.labelled,
        bench.baseline_nll,
        adapter.antithetic,
        metric,
        tolerance,
        bound,
        objective,
        method,
        bracket,
        steps,
    )
    if plan.metric == "nll" and plan.objective == "tolerance" and bench.baseline_nll < MEMORISED_NLL:
        warnings.warn(
            f"the mean adapter's NLL on the anchors is {bench.baseline_nll:.2g} nats: it has memorised them, and a tolerance of "
            f"{plan.tolerance:.2%} of that allows almost no noise; use held-out anchors, or metric='flips'",
            stacklevel=2,
        )
    with bench.bar(plan):
        tried = _Tried(bench, plan)
        sigma, bounds, stop = _run(tried, plan)
    chosen = next((e for e in tried.evaluations if e.sigma == sigma), None)
    result = SigmaSearch(
        sigma=sigma,
        satisfied=chosen is not None and chosen.satisfied,
        evaluations=tuple(sorted(tried.evaluations, key=lambda e: e.sigma)),
        baseline=tried.baseline,
        recipe=recipe,
        metric=plan.metric,
        tolerance=plan.tolerance,
        bound=plan.bound,
        objective=plan.objective,
        method=plan.method,
        bracket=bounds,
        reason=plan.reason,
        stop=stop,
        samples=len(numbers),
        antithetic=plan.antithetic,
        seed=adapter.seed,
        depth=adapter.depth if depth is None else _depth_name(adapter, depth),
        anchors=bench.size,
        labelled=bench.labelled,
        seconds=time.perf_counter() - started,
        tokens=scorer.tokens_run,
    )
    if not result.satisfied:
        warnings.warn(f"sigma = {sigma:.3g}: {stop}", stacklevel=2)
    if apply:
        adapter.sigma = result.sigma
        adapter.search = result.summary()
        if depth is not None:
            adapter.depth = depth
    return result


def _plan(
    recipe: str,
    labelled: bool,
    nll: float,
    antithetic: bool,
    metric: Metric | None,
    tolerance: float | None,
    bound: Bound | None,
    objective: Objective | None,
    method: Method | None,
    bracket: tuple[float, float] | None,
    steps: int | None,
) -> _Plan:
    if recipe == "paper":
        base = _Plan(
            "nll", 0.003, "two-sided", "tolerance", "bisect", (1e-3, 1.5e-2), 5, False, False, "the paper's rule"
        )
    else:
        base = _auto(labelled, nll, antithetic, metric, tolerance, bound, objective, method)
    given = {
        "metric": metric,
        "bound": bound,
        "objective": objective,
        "method": method,
        "bracket": bracket,
        "steps": steps if steps is not None or method != "bisect" or recipe == "paper" else 6,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    base = replace(base, **changed)  # type: ignore[arg-type]
    asked = [name for name in given if name in changed and (name != "steps" or steps is not None)]
    if tolerance is not None:
        asked.append("tolerance")
    if asked:
        base = replace(base, reason=f"{base.reason}; given by the caller: {', '.join(asked)}")
    if base.objective == "minimum":
        if base.metric != "nll":
            raise ValueError(
                f"objective='minimum' looks for the lowest NLL, got metric={base.metric!r}; use metric='nll'"
            )
        if base.method == "bisect":
            raise ValueError(
                "objective='minimum' needs method='grid': bisection looks for a crossing, not for a minimum"
            )
        if not labelled:
            raise ValueError(
                "objective='minimum' needs labelled anchors: the mean adapter's own predictions have their lowest NLL at sigma "
                "0; give labels, or use metric='flips'"
            )
    return replace(base, tolerance=TOLERANCES[base.metric] if tolerance is None else float(tolerance))


def _auto(
    labelled: bool,
    nll: float,
    antithetic: bool,
    metric: Metric | None,
    tolerance: float | None,
    bound: Bound | None,
    objective: Objective | None,
    method: Method | None,
) -> _Plan:
    """What the anchors suggest, within what the caller asked for."""
    usable = labelled and nll >= MEMORISED_NLL
    # Arguments that mean something to a tolerance only.
    asks_tolerance = (
        objective == "tolerance"
        or tolerance is not None
        or bound is not None
        or method == "bisect"
        or metric not in (None, "nll")
    )
    if objective == "minimum" or (usable and not asks_tolerance):
        reason = (
            f"the anchors are labelled and not memorised (NLL {nll:.3g} nats), so the lowest NLL on them decides"
            if usable
            else f"the lowest NLL decides, though the mean adapter has memorised the anchors (NLL {nll:.2g} nats)"
        )
        return _Plan("nll", 0.0, "two-sided", "minimum", "grid", (0.02, 0.08), 3, True, antithetic, reason)
    if usable:
        reason = f"the anchors are labelled and not memorised (NLL {nll:.3g} nats), so their NLL may be held"
    elif labelled:
        reason = (
            f"the mean adapter has memorised the anchors (NLL {nll:.2g} nats < {MEMORISED_NLL}), so their labels say nothing and "
            "changed predictions are counted"
        )
    else:
        reason = "not all anchors have labels, so changes of the mean adapter's predictions are counted"
    chosen: Metric = "nll" if usable else "flips"
    return _Plan(chosen, 0.0, "two-sided", "tolerance", "grid", (0.01, 0.16), 5, True, antithetic, reason)


def _check_arguments(
    recipe: str,
    metric: str | None,
    tolerance: float | None,
    bound: str | None,
    objective: str | None,
    method: str | None,
    bracket: tuple[float, float] | None,
    steps: int | None,
) -> None:
    for name, value, allowed in (
        ("recipe", recipe, ("auto", "paper")),
        ("metric", metric, ("nll", "accuracy", "flips", None)),
        ("bound", bound, ("two-sided", "one-sided", None)),
        ("objective", objective, ("tolerance", "minimum", None)),
        ("method", method, ("bisect", "grid", None)),
    ):
        if value not in allowed:
            raise ValueError(
                f"{name} is {value!r}, expected one of {', '.join(repr(a) for a in allowed if a is not None)}"
            )
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 < tolerance < math.inf):
        raise ValueError(f"tolerance is {tolerance!r}, expected a positive fraction such as 0.003 (0.3 %)")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 2):
        raise ValueError(f"steps is {steps!r}, expected an integer of at least 2")
    if bracket is not None:
        if not isinstance(bracket, tuple | list) or len(bracket) != 2:
            raise ValueError(f"bracket is {bracket!r}, expected (lowest sigma, highest sigma)")
        low, high = (check_sigma(b) for b in bracket)
        if low >= high:
            raise ValueError(f"bracket is {bracket!r}, expected a lowest sigma below the highest")


class _Anchors:
    """The anchor set, its baseline under the mean adapter, and per-anchor results at any sigmas."""

    def __init__(self, scorer: Scorer, adapter: BayesianAdapter, samples: tuple[int, ...], progress: bool) -> None:
        self.scorer = scorer
        self.adapter = adapter
        self.numbers = samples
        self.progress = progress
        self._bar: Any = None
        self.labelled = scorer.labelled
        self.guesses: list[Tensor] = []
        self.targets: list[Tensor] = []
        nll: list[Tensor] = []
        for batch in scorer.batches:  # one at a time: log probabilities over a vocabulary are large
            logs = scorer.mean(batch)
            self.guesses.append(logs.argmax(-1))
            self.targets.append(item_labels(batch) if self.labelled else self.guesses[-1])
            nll.append(_nll(logs, self.targets[-1]).cpu())
            self.classes = logs.shape[-1]
        self.size = sum(len(g) for g in self.guesses)
        if self.size == 0:
            raise ValueError("the anchors hold no label to score (all are -100), expected at least one")
        self.base_nll = torch.cat(nll)
        self.base_right = torch.cat([(g == t).cpu() for g, t in zip(self.guesses, self.targets, strict=True)])
        self.baseline_nll = float(self.base_nll.double().mean())

    def bar(self, plan: _Plan) -> Any:
        # Points that widening and refining may add are not known ahead, so the bar counts anchors times sigmas and grows.
        self._bar = tqdm(total=self.size * plan.steps, desc="search sigma", unit="anchor", disable=not self.progress)
        return self._bar

    def run(self, sigmas: Sequence[float], antithetic: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each sigma: NLL (items,), hits (items,) and changed predictions (items,), on the CPU."""
        results: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in sigmas]
        if self._bar is not None and self._bar.n + self.size * len(sigmas) > self._bar.total:
            self._bar.total = self._bar.n + self.size * len(sigmas)
        for batch, guess, target in zip(self.scorer.batches, self.guesses, self.targets, strict=True):
            for k, logs in enumerate(self.log_probabilities(batch, sigmas, antithetic)):
                label = logs.argmax(-1)
                results[k].append((_nll(logs, target).cpu(), (label == target).cpu(), (label != guess).cpu()))
            if self._bar is not None:
                self._bar.update(len(guess) * len(sigmas))
        return [tuple(torch.cat(column) for column in zip(*parts, strict=True)) for parts in results]  # type: ignore[misc]

    def log_probabilities(self, batch: Batch, sigmas: Sequence[float], antithetic: bool) -> list[Tensor]:
        """Log mean probability (items, C) at each sigma; small heads take all sigmas in one fused batch."""
        if self.classes > MANY_CLASSES:
            return [self.scorer.average(batch, self.adapter.batch(self.numbers, s, antithetic)) for s in sigmas]
        logs = self.scorer.samples(batch, self.adapter.batch(self.numbers, list(sigmas), antithetic))
        logs = logs.reshape(len(sigmas), len(self.numbers), *logs.shape[1:])
        return list(torch.logsumexp(logs, dim=1) - math.log(len(self.numbers)))


class _Tried:
    """Every sigma tried, judged by the plan's rule."""

    def __init__(self, anchors: _Anchors, plan: _Plan) -> None:
        self.anchors = anchors
        self.plan = plan
        zero = torch.zeros(anchors.size, dtype=torch.bool)
        self.baseline = self._judge(0.0, anchors.base_nll, anchors.base_right, zero)
        self.evaluations: list[Evaluation] = []

    def evaluate(self, sigmas: Sequence[float]) -> list[Evaluation]:
        """Evaluate the sigmas not tried yet, all in one fused batch; returns all of them in the order asked."""
        known = {e.sigma: e for e in self.evaluations}
        new = [s for s in dict.fromkeys(sigmas) if s not in known]
        if new:
            for sigma, (nll, right, flipped) in zip(new, self.anchors.run(new, self.plan.antithetic), strict=True):
                known[sigma] = self._judge(sigma, nll, right, flipped)
                self.evaluations.append(known[sigma])
        return [known[s] for s in sigmas]

    def one(self, sigma: float) -> Evaluation:
        return self.evaluate([sigma])[0]

    def _judge(self, sigma: float, nll: Tensor, right: Tensor, flipped: Tensor) -> Evaluation:
        change = {
            "nll": nll.double() - self.anchors.base_nll.double(),
            "accuracy": right.double() - self.anchors.base_right.double(),
            "flips": flipped.double(),
        }[self.plan.metric]
        values = {
            "nll": float(nll.double().mean()),
            "accuracy": float(right.double().mean()),
            "flips": float(flipped.double().mean()),
        }
        error = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else math.nan
        return Evaluation(
            sigma, values[self.plan.metric], error, sigma == 0 or self._holds(float(change.mean()), values), **values
        )

    def _holds(self, change: float, values: dict[str, float]) -> bool:
        plan = self.plan
        if plan.objective == "minimum":
            return change < 0
        if plan.metric == "flips":
            return values["flips"] <= plan.tolerance
        harm = -change if plan.metric == "accuracy" else change
        amount = harm if plan.bound == "one-sided" else abs(change)
        return amount <= plan.tolerance * abs(self.baseline.value)


def _run(tried: _Tried, plan: _Plan) -> tuple[float, tuple[float, float], str]:
    """The chosen sigma, the interval looked at, and why the search stopped."""
    if plan.objective == "minimum":
        return _minimum(tried, plan)
    return _bisect(tried, plan) if plan.method == "bisect" else _grid(tried, plan)


def _bisect(tried: _Tried, plan: _Plan) -> tuple[float, tuple[float, float], str]:
    low, high = plan.bracket
    holds = False
    if plan.widen:
        while tried.one(high).satisfied:
            low, holds = high, True
            if high >= LARGEST:
                return high, (low, high), f"every sigma up to the largest allowed ({LARGEST:g}) holds the tolerance"
            high = min(2 * high, LARGEST)
        while not holds and not tried.one(low).satisfied:
            if low <= SMALLEST:
                return low, (low, high), f"no sigma down to {SMALLEST:g} holds the tolerance; this is the lower bound"
            low, high = max(low / 2, SMALLEST), low
        holds = True
    for _ in range(plan.steps):
        # The paper's bracket is narrow and halved in sigma; a widened one spans decades and is halved in log sigma.
        middle = math.sqrt(low * high) if plan.widen else (low + high) / 2
        if tried.one(middle).satisfied:
            low, holds = middle, True
        else:
            high = middle
    if not holds and not tried.one(low).satisfied:
        return low, (low, high), f"no sigma tried holds the tolerance; this is the lower bound of the bracket ({low:g})"
    stop = f"{plan.steps} bisection steps"
    if high == plan.bracket[1] and not plan.widen:
        stop += f"; every sigma tried holds the tolerance, so a larger one beyond the bracket's upper bound ({high:g}) may too"
    return low, (low, high), stop


def _log_grid(low: float, high: float, points: int) -> list[float]:
    ratio = (high / low) ** (1 / (points - 1))
    return [low, *(low * ratio**i for i in range(1, points - 1)), high]  # both ends exactly as given


def _grid(tried: _Tried, plan: _Plan) -> tuple[float, tuple[float, float], str]:
    """Fused grid, then piecewise-linear interpolation between the largest sigma that holds and the next one."""
    low, high = plan.bracket
    grid = tried.evaluate(_log_grid(low, high, plan.steps))
    while plan.widen and grid[-1].satisfied:
        if high >= LARGEST:
            return high, (low, high), f"the largest sigma allowed ({LARGEST:g}) holds the tolerance"
        more = [min(2 * high, LARGEST), min(4 * high, LARGEST)]
        grid += tried.evaluate(sorted(set(more)))
        high = more[-1]
    while plan.widen and not any(e.satisfied for e in grid):
        if low <= SMALLEST:
            return low, (low, high), f"no sigma down to {SMALLEST:g} holds the tolerance; this is the lower bound"
        more = [max(low / 4, SMALLEST), max(low / 2, SMALLEST)]
        grid = tried.evaluate(sorted(set(more))) + grid
        low = more[0]
    last = max((i for i, e in enumerate(grid) if e.satisfied), default=None)
    if last is None:
        return low, (low, high), f"no sigma of the grid holds the tolerance; this is its lower bound ({low:g})"
    if last == len(grid) - 1:
        return (
            high,
            (low, high),
            f"the largest sigma of the grid holds the tolerance; this is its upper bound ({high:g})",
        )
    below, above = grid[last], grid[last + 1]
    between = _crossing(below, above, tried, plan)
    if between is not None and tried.one(between).satisfied:
        return between, (below.sigma, above.sigma), "interpolated between grid points, and checked there"
    return below.sigma, (below.sigma, above.sigma), "largest grid point that holds the tolerance"


def _crossing(below: Evaluation, above: Evaluation, tried: _Tried, plan: _Plan) -> float | None:
    """Where the line through two neighbours meets the edge of the tolerance band."""
    base = 0.0 if plan.metric == "flips" else tried.baseline.value
    width = plan.tolerance if plan.metric == "flips" else plan.tolerance * abs(base)
    edge = base + math.copysign(width, above.value - base)
    share = (edge - below.value) / (above.value - below.value)
    if not 0.02 < share < 0.98:
        return None
    return below.sigma + share * (above.sigma - below.sigma)


def _minimum(tried: _Tried, plan: _Plan) -> tuple[float, tuple[float, float], str]:
    """Fused grid in log sigma, widened while the lowest NLL is at its edge, then the two half steps beside the best."""
    low, high = plan.bracket
    ratio = (high / low) ** (1 / (plan.steps - 1))
    tried.evaluate(_log_grid(low, high, plan.steps))

    def best() -> Evaluation:
        return min(tried.evaluations, key=lambda e: e.nll)

    while plan.widen and best().sigma >= high * 0.999 and high < LARGEST:
        high = min(high * ratio, LARGEST)
        tried.one(high)
    while plan.widen and best().sigma <= low * 1.001 and low > SMALLEST:
        low = max(low / ratio, SMALLEST)
        tried.one(low)
    centre = best().sigma
    half = math.sqrt(ratio)
    tried.evaluate([s for s in (centre / half, centre * half) if low <= s <= high])
    found = best()
    if not found.satisfied:
        return (
            found.sigma,
            (low, high),
            f"no sigma lowers the anchors' NLL; this is the best of those tried ({found.sigma:.3g})",
        )
    stop = f"lowest NLL of {len(tried.evaluations)} sigmas, known to a factor of {half:.2f}"
    if found.sigma in (low, high):
        stop += "; it lies on the edge of what was tried"
    return found.sigma, (low, high), stop


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in fields.items()}


def _evaluation(fields: dict[str, Any]) -> Evaluation:
    known: dict[str, Any] = {name: math.nan if value is None else value for name, value in fields.items()}
    return Evaluation(**known)


def _nll(logs: Tensor, target: Tensor) -> Tensor:
    return -logs.gather(-1, target[:, None].to(logs.device))[:, 0].float()


def _depth_name(adapter: BayesianAdapter, depth: Depth) -> int | str:
    """``depth`` as the adapter spells it once it is set there."""
    first, total = adapter.first_random_block(depth), len(adapter.anatomy.blocks)
    return "head" if first == total else "all" if first == 0 else total - first
