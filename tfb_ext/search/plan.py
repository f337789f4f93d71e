"""What is looked for: a recipe with its blanks filled in by the caller or by a look at the anchors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor

from ..checks import check_sigma

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
TOLERANCES = {"nll": 0.003, "brier": 0.003, "accuracy": 0.01, "flips": 0.01}
CUSTOM_TOLERANCE = 0.01
PAPER_BRACKET = (1e-3, 1.5e-2)

_ALLOWED: dict[str, tuple[str, ...]] = {
    "recipe": ("auto", "paper", "official"),
    "metric": ("nll", "accuracy", "flips", "brier"),
    "bound": ("two-sided", "one-sided"),
    "objective": ("tolerance", "minimum", "one-se"),
    "method": ("bisect", "grid", "root", "official"),
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

    def check(self) -> None:
        """Raise ``ValueError`` for a value outside what ``search_sigma`` documents."""
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value is None or value in allowed or (name == "metric" and callable(value)):
                continue
            or_function = ", or a function of probabilities and targets" if name == "metric" else ""
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}{or_function}")
        if self.tolerance is not None and not (
            isinstance(self.tolerance, int | float) and 0 < self.tolerance < math.inf
        ):
            raise ValueError(f"tolerance is {self.tolerance!r}, expected a positive fraction such as 0.003 (0.3 %)")
        if self.steps is not None and (
            isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 2 <= self.steps <= MOST_STEPS
        ):
            raise ValueError(f"steps is {self.steps!r}, expected an integer of at least 2 and at most {MOST_STEPS}")
        if self.bracket is not None:
            if not isinstance(self.bracket, tuple | list) or len(self.bracket) != 2:
                raise ValueError(f"bracket is {self.bracket!r}, expected (lowest sigma, highest sigma)")
            low, high = (check_sigma(b) for b in self.bracket)
            if low >= high:
                raise ValueError(f"bracket is {self.bracket!r}, expected a lowest sigma below the highest")

    @property
    def given(self) -> dict[str, object]:
        """What is not left to the recipe, in the order of the arguments."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recipe"}
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

    @property
    def metric_name(self) -> str:
        return metric_name(self.metric)


def fixed_recipe(recipe: str) -> Plan | None:
    """The recipes that do not look at the anchors."""
    if recipe == "paper":
        return Plan(
            "nll",
            0.003,
            "two-sided",
            "tolerance",
            "bisect",
            PAPER_BRACKET,
            5,
            False,
            "the paper's rule",
            antithetic=False,
        )
    if recipe == "official":
        return Plan(
            "nll",
            0.003,
            "two-sided",
            "tolerance",
            "official",
            PAPER_BRACKET,
            5,
            False,
            "the rule of the authors' code",
            pseudo=True,
            per_item=True,
            antithetic=False,
            mode="flipout",
        )
    return None


def make_plan(options: Options, labelled: bool, nll: float) -> Plan:
    """Fill in the recipe's blanks. ``nll``: of the mean adapter on the anchors, nats.

    Raises:
        ValueError: a minimum is asked for in a way, or on anchors, that cannot give one.
    """
    plan = fixed_recipe(options.recipe) or _auto(options, labelled, nll)
    given = {name: value for name, value in options.given.items() if name != "tolerance"}
    if options.method == "bisect" and plan.widen and options.steps is None:
        given["steps"] = 6  # a bracket of several octaves, halved in log sigma
    plan = replace(plan, **given)  # type: ignore[arg-type]
    if plan.method == "official":
        plan = replace(plan, per_item=True, widen=False)
    if options.given:
        plan = replace(plan, reason=f"{plan.reason}; given by the caller: {', '.join(options.given)}")
    if plan.objective != "tolerance":
        _check_minimum(plan, labelled)
    usual = TOLERANCES[plan.metric] if isinstance(plan.metric, str) else CUSTOM_TOLERANCE
    return replace(plan, tolerance=usual if options.tolerance is None else float(options.tolerance))


def _check_minimum(plan: Plan, labelled: bool) -> None:
    asked = f"objective={plan.objective!r}"
    if plan.metric != "nll":
        raise ValueError(f"{asked} looks for the lowest NLL, got metric={plan.metric_name!r}; use metric='nll'")
    if plan.method != "grid":
        raise ValueError(
            f"{asked} needs method='grid', got {plan.method!r}: the others look for a crossing, not for a minimum"
        )
    if not labelled or plan.pseudo:
        raise ValueError(
            f"{asked} needs labelled anchors: the mean adapter's own predictions have their lowest NLL at sigma 0; give "
            "labels, or use metric='flips'"
        )


def _auto(options: Options, labelled: bool, nll: float) -> Plan:
    """What the anchors suggest, within what the caller asked for."""
    usable = labelled and nll >= MEMORISED_NLL
    # Arguments that mean something to a tolerance only.
    asks_tolerance = (
        options.objective == "tolerance"
        or options.tolerance is not None
        or options.bound is not None
        or options.method in ("bisect", "root", "official")
        or options.metric not in (None, "nll")
    )
    if options.objective in ("minimum", "one-se") or (usable and not asks_tolerance):
        reason = (
            f"the anchors are labelled and not memorised (NLL {nll:.3g} nats), so the NLL on them decides"
            if usable
            else f"the NLL decides, though the mean adapter has memorised the anchors (NLL {nll:.2g} nats)"
        )
        return Plan("nll", 0.0, "two-sided", "one-se", "grid", (0.02, 0.08), 3, True, reason)
    if usable:
        reason = f"the anchors are labelled and not memorised (NLL {nll:.3g} nats), so their NLL may be held"
    elif labelled:
        reason = (
            f"the mean adapter has memorised the anchors (NLL {nll:.2g} nats < {MEMORISED_NLL}), so their labels say nothing and "
            "changed predictions are counted"
        )
    else:
        reason = "not all anchors have labels, so changes of the mean adapter's predictions are counted"
    if usable:
        return Plan("nll", 0.0, "two-sided", "tolerance", "root", (0.01, 0.16), 10, True, reason)
    return Plan("flips", 0.0, "two-sided", "tolerance", "grid", (0.01, 0.16), 5, True, reason)
