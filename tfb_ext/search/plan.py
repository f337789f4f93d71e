"""What is looked for: the caller's arguments, and a recipe's settings that fill in the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor

from ..checks import check_choice, check_count, check_number, check_sigma
from ..errors import refusal
from ..posterior.config import BY

MetricName = Literal["nll", "accuracy", "flips", "brier"]
MetricFunction = Callable[[Tensor, Tensor], Tensor]
Metric = MetricName | MetricFunction
Bound = Literal["two-sided", "one-sided"]
Objective = Literal["tolerance", "minimum", "one-se"]
Method = Literal["bisect", "grid", "root", "official"]

# Below this mean NLL (nats) the anchors are taken as memorised: a relative tolerance on it then measures nothing.
MEMORISED_NLL = 0.01
# Bracket and grid are widened by doubling, up to these; a weight noise of 10 leaves nothing of any adapter.
SMALLEST, LARGEST = 1e-5, 10.0
MOST_STEPS = 1000  # the grid's points are evaluated at once
# The root finder stops where the tolerance is used up to this share.
ROOT_USED = 0.9
TOLERANCES = {"nll": 0.003, "brier": 0.003}
USUAL_TOLERANCE = 0.01  # of all other metrics

_ALLOWED: dict[str, tuple[str, ...]] = {
    "recipe": ("auto", "paper", "official"),
    "metric": get_args(MetricName),
    "bound": get_args(Bound),
    "objective": get_args(Objective),
    "method": get_args(Method),
}


def metric_name(metric: Metric) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "custom")


@dataclass(frozen=True)
class Options:
    """What the caller asked for; ``None`` leaves it to the recipe. The fields are arguments of ``search_sigma``."""

    recipe: str = "auto"
    metric: Metric | None = None
    tolerance: float | None = None
    bound: Bound | None = None
    objective: Objective | None = None
    method: Method | None = None
    bracket: tuple[float, float] | None = None
    steps: int | None = None
    early_stop: float | None = None
    by: str = "samples"

    def check(self) -> None:
        """Raise ``ValueError`` for a value outside what ``search_sigma`` documents."""
        check_choice("by", self.by, BY)
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in (None, *allowed) and not (name == "metric" and callable(value)):
                expected = f"one of {', '.join(map(repr, allowed))}" + ", or a function" * (name == "metric")
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        if self.tolerance is not None:
            check_number(
                "tolerance", self.tolerance, lambda v: 0 < v < math.inf, "a positive fraction such as 0.003 (0.3 %)"
            )
        if self.steps is not None:
            check_count("steps", self.steps, "an integer", 2, MOST_STEPS)
        if self.bracket is not None:
            if not isinstance(self.bracket, tuple | list) or len(self.bracket) != 2:
                raise ValueError(f"bracket is {self.bracket!r}, expected (lowest sigma, highest sigma)")
            if check_sigma(self.bracket[0]) >= check_sigma(self.bracket[1]):
                raise ValueError(f"bracket is {self.bracket!r}, expected a lowest sigma below the highest")
        if self.early_stop is not None:
            check_number(
                "early_stop",
                self.early_stop,
                lambda v: 0.5 < v < 1,
                "a confidence such as 0.99, or None to see all anchors",
            )
            if callable(self.metric):
                raise ValueError(
                    f"early_stop is {self.early_stop!r} with a metric of your own, which is a function of all anchors, expected "
                    "None. Fix: metric='nll', 'brier', 'accuracy' or 'flips'"
                )

        if self.by == "linear":
            if self.early_stop is not None:
                expected = "None with by='linear', which knows all anchors after one pass"
                raise refusal("early_stop", self.early_stop, expected, "leave it out")
            if self.recipe == "official":
                expected = "'auto' or 'paper' with by='linear': the authors' code draws samples"
                raise refusal("recipe", "'official'", expected, "by='samples'")

    @property
    def given(self) -> dict[str, Any]:
        """What is not left to the recipe, in the order of the arguments."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("recipe", "early_stop", "by")}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Plan:
    """A recipe with its blanks filled in.

    Attributes:
        widen: the bracket is only where to look first.
        reason: why it is this metric and objective, in words.
        pseudo: targets are the mean adapter's own answers, even where there are labels.
        per_item: divide the change by the number of anchors once more (the authors' code).
        antithetic, mode: of the noise; ``None`` is the adapter's own.
        early_stop: confidence at which a sigma needs no more anchors.
    """

    metric: Metric
    tolerance: float
    bound: Bound
    objective: Objective
    method: Method
    bracket: tuple[float, float]
    steps: int
    widen: bool
    reason: str
    pseudo: bool = False
    per_item: bool = False
    antithetic: bool | None = None
    mode: str | None = None
    early_stop: float | None = None

    @property
    def metric_name(self) -> str:
        return metric_name(self.metric)


_AUTO = Plan("nll", 0.0, "two-sided", "tolerance", "root", (0.01, 0.16), 10, True, "")


def settings_of(recipe: str) -> Plan:
    """A recipe before it has looked at the anchors."""
    if recipe == "auto":
        return _AUTO
    from ..research.recipe import RECIPES

    return RECIPES[recipe]


def make_plan(options: Options, labelled: bool, nll: float) -> Plan:
    """Fill in the recipe's blanks. ``nll``: of the mean adapter on the anchors, nats.

    Raises:
        ValueError: a minimum is asked for in a way, or on anchors, that cannot give one.
    """
    plan = settings_of(options.recipe) if options.recipe != "auto" else _auto(options, labelled, nll)
    given = options.given
    if options.method == "bisect" and plan.widen:
        given.setdefault("steps", 6)  # a bracket of several octaves, halved in log sigma
    plan = replace(plan, **given, early_stop=options.early_stop)
    if plan.method == "official":
        plan = replace(plan, per_item=True, widen=False)
    if options.given:
        plan = replace(plan, reason=f"{plan.reason}; given by the caller: {', '.join(options.given)}")
    if plan.objective != "tolerance":
        _check_minimum(plan, labelled)
    usual = TOLERANCES.get(plan.metric, USUAL_TOLERANCE) if isinstance(plan.metric, str) else USUAL_TOLERANCE
    return replace(plan, tolerance=usual if options.tolerance is None else float(options.tolerance))


def _check_minimum(plan: Plan, labelled: bool) -> None:
    asked = f"objective={plan.objective!r}"
    if plan.metric != "nll":
        raise ValueError(f"{asked} looks for the lowest NLL, got metric={plan.metric_name!r}, expected metric='nll'")
    if plan.method != "grid":
        raise ValueError(f"{asked} needs method='grid', got {plan.method!r}, which looks for a crossing")
    if not labelled or plan.pseudo:
        raise ValueError(
            f"{asked} needs labelled anchors: the mean adapter's own predictions have their lowest NLL at sigma 0. Fix: give "
            "labels, or use metric='flips'"
        )


def _auto(options: Options, labelled: bool, nll: float) -> Plan:
    """What the anchors suggest, within what the caller asked for."""
    usable = labelled and nll >= MEMORISED_NLL
    good = f"the anchors are labelled and not memorised (NLL {nll:.3g} nats), so"
    # Arguments that mean something to a tolerance only.
    asks_tolerance = (
        options.objective == "tolerance"
        or options.tolerance is not None
        or options.bound is not None
        or options.method in ("bisect", "root", "official")
        or options.metric not in (None, "nll")
    )
    if options.objective in ("minimum", "one-se") or (usable and not asks_tolerance):
        reason = f"the NLL decides, though the mean adapter has memorised the anchors (NLL {nll:.2g} nats)"
        reason = f"{good} the NLL on them decides" if usable else reason
        return replace(_AUTO, objective="one-se", method="grid", bracket=(0.02, 0.08), steps=3, reason=reason)
    if usable:
        return replace(_AUTO, reason=f"{good} their NLL may be held")
    reason = "not all anchors have labels, so changes of the mean adapter's predictions are counted"
    if labelled:
        reason = (
            f"the mean adapter has memorised the anchors (NLL {nll:.2g} nats < {MEMORISED_NLL}), so their labels say nothing and "
            "changed predictions are counted"
        )
    return replace(_AUTO, metric="flips", method="grid", steps=5, reason=reason)
