"""The search: recipes, crossings and minima of known curves, the anchors' own metrics, files, refusals."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor

import tfb_ext
from tfb_ext import search_sigma
from tfb_ext.adapters.depth import Place
from tfb_ext.data import Encoded
from tfb_ext.forward.batches import IGNORED
from tfb_ext.search import LARGEST, SMALLEST, SigmaSearch
from tfb_ext.search import anchors as engine
from tfb_ext.search.depths import AtDepth
from tfb_ext.search.methods import Found, find
from tfb_ext.search.plan import Options, Plan, make_plan
from tfb_ext.search.records import Records
from tfb_ext.search.verdicts import Verdicts

SAMPLES = 4


def bayesian(name: str = "llama", **options: Any) -> Any:
    return tfb_ext.bayesianize(zoo.peft_model(name), **options)


def overconfident(items: int = 30, wrong_every: int = 3, factor: float = 6.0) -> tuple[Any, Encoded]:
    """A sure model and labels of which every third contradicts it: some noise lowers its NLL."""
    adapter = bayesian()
    small_sets.sharpen(adapter, factor)
    return adapter, small_sets.labelled(adapter, small_sets.encoded(items), wrong_every)


def look(adapter: Any, anchors: Any, **options: Any) -> SigmaSearch:
    return search_sigma(adapter, anchors, **{"samples": SAMPLES, "progress": False, **options})


def strict(text: str) -> Any:
    """What a parser reads that knows of no NaN and no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


class Curve:
    """Anchors whose metric is a known function of sigma: all have NLL ``base + nll(sigma)``."""

    size = 1000
    rounds = 1

    def __init__(
        self,
        nll: Callable[[float], float] = lambda s: 0.0,
        flips: Callable[[float], float] = lambda s: 0.0,
        hits: Callable[[float], float] = lambda s: 0.8,
        base: float = 1.0,
    ) -> None:
        self.nll, self.flips, self.hits = nll, flips, hits
        nothing = torch.zeros(self.size, dtype=torch.int64)
        self.records = Records(
            {}, self.table(0.0, torch.full((self.size,), base, dtype=torch.float64)), nothing, nothing
        )
        self.calls: list[list[float]] = []

    def share(self, fraction: float) -> Tensor:
        return (torch.arange(self.size) < round(fraction * self.size)).double()

    def table(self, sigma: float, nll: Tensor) -> Tensor:
        rest = torch.zeros(self.size, dtype=torch.float64)
        flips = self.share(self.flips(sigma)) if sigma else rest
        return torch.stack([nll, self.share(self.hits(sigma)), flips, rest, rest], dim=1)

    def run(self, first: int, sigmas: Sequence[float], settled: Any = None) -> None:
        self.calls.append(list(sigmas))
        for s in sigmas:
            self.records.values[first, s] = self.table(s, self.records.baseline[:, 0] + self.nll(s))


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "metric": "nll",
        "tolerance": 0.003,
        "bound": "two-sided",
        "objective": "tolerance",
        "method": "bisect",
        "bracket": (1e-3, 1.5e-2),
        "steps": 5,
        "widen": False,
        "reason": "",
    }
    return Plan(**(fields | changes))


def tried_on(curve: Curve, chosen: Plan) -> AtDepth:
    return AtDepth(curve, Verdicts(chosen, curve.records), Place(0), "all")  # type: ignore[arg-type]


def one(tried: AtDepth, sigma: float) -> Any:
    return tried.evaluate([sigma])[0]


def run(curve: Curve, **changes: Any) -> tuple[float, tuple[float, float], str, AtDepth]:
    chosen = plan(**changes)
    tried = tried_on(curve, chosen)
    found: Found = find(tried, chosen)
    return found.sigma, found.bracket, found.stop, tried


def rising(crossing: float, tolerance: float = 0.003) -> Callable[[float], float]:
    """A change that meets the tolerance exactly at ``crossing``."""
    return lambda sigma: tolerance * (sigma / crossing) ** 2


# The paper's recipe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crossing", [0.0021, 0.0055, 0.0101, 0.0142])
def test_paper_bisects_at_arithmetic_midpoints(crossing: float) -> None:
    curve = Curve(rising(crossing))
    sigma, _, stop, tried = run(curve)
    low, high, expected = 1e-3, 1.5e-2, []
    for _ in range(5):
        middle = (low + high) / 2
        expected.append(middle)
        low, high = (middle, high) if middle <= crossing else (low, middle)
    assert [e.sigma for e in tried.evaluations] == expected and curve.calls == [[s] for s in expected]
    assert sigma == low == max(s for s in expected if s <= crossing)
    assert crossing - sigma <= 0.014 / 2**5 and stop == "5 bisection steps"


def test_paper_says_when_everything_holds() -> None:
    sigma, bounds, stop, tried = run(Curve())
    assert sigma == tried.evaluations[-1].sigma and 0.0145 < sigma < 0.015
    assert "every sigma tried holds the tolerance" in stop and "beyond the bracket's upper bound (0.015)" in stop
    assert bounds == (sigma, 0.015)


def test_paper_falls_back_to_the_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sigma, _, stop, tried = run(Curve(rising(5e-4)))
    assert sigma == 1e-3 and not one(tried, sigma).satisfied and "lower bound of the bracket (0.001)" in stop
    assert len(tried.evaluations) == 6
    assert run(Curve(rising(1.2e-3)))[0] == 1e-3  # below the lowest midpoint, but held at the bound itself
    adapter, anchors = overconfident()
    monkeypatch.setattr(engine.Anchors, "run", self_harm)
    with pytest.warns(UserWarning, match=r"sigma = 0\.001: no sigma tried holds the tolerance"):
        result = look(adapter, anchors, recipe="paper")
    assert not result.satisfied and result.sigma == 1e-3 == adapter.sigma


def self_harm(self: Any, first: int, sigmas: Sequence[float], settled: Any = None) -> None:
    for sigma in sigmas:
        self.records.values[first, sigma] = self.records.baseline * 2


def test_paper_end_to_end() -> None:
    adapter, anchors = overconfident(factor=1.0)
    zoo.compared(adapter)
    batches: list[Any] = []
    original = adapter.batch
    adapter.batch = lambda *a, **k: batches.append(original(*a, **k)) or batches[-1]
    result = look(adapter, anchors, recipe="paper")
    assert (result.metric, result.tolerance, result.bound, result.method) == ("nll", 0.003, "two-sided", "bisect")
    assert len(result.evaluations) in (5, 6) and not result.antithetic and result.reason == "the paper's rule"
    assert batches and not any(b.antithetic for b in batches) and adapter.antithetic
    for e in result.evaluations:
        assert e.satisfied == (abs(e.nll - result.baseline.nll) <= 0.003 * result.baseline.nll)
        assert e.value == e.nll
    assert result.sigma == max(e.sigma for e in result.evaluations if e.satisfied)


def test_paper_without_labels_takes_the_models_own() -> None:
    adapter, anchors = overconfident(factor=1.0)
    unlabelled = replace(anchors, labels=[None] * len(anchors))
    own = small_sets.labelled(adapter, unlabelled)
    a, b = look(adapter, unlabelled, recipe="paper"), look(adapter, own, recipe="paper")
    assert not a.labelled and b.labelled
    assert a.evaluations == b.evaluations and a.baseline == b.baseline and a.baseline.accuracy == 1.0


# Bisection and grids on known curves --------------------------------------------------------------------------------


@pytest.mark.parametrize("crossing", [3e-4, 0.004, 0.02, 0.3, 3.0])
@pytest.mark.parametrize("metric", ["nll", "accuracy", "flips"])
def test_widening_bisection_finds_the_crossing(metric: str, crossing: float) -> None:
    curves = {
        "nll": Curve(rising(crossing)),
        "flips": Curve(flips=lambda s: 0.01 if s <= crossing else 0.02),
        "accuracy": Curve(hits=lambda s: 0.8 if s <= crossing else 0.7),
    }
    tolerance = 0.003 if metric == "nll" else 0.01
    sigma, (low, high), _, tried = run(
        curves[metric], metric=metric, tolerance=tolerance, widen=True, bracket=(0.01, 0.16), steps=8
    )
    assert sigma == low <= crossing <= high
    # The bracket is at most a factor 16 wide at first and halved in log sigma eight times.
    assert high / low <= 16 ** (1 / 2**8) * (1 + 1e-9)
    assert one(tried, sigma).satisfied


@pytest.mark.parametrize("method", ["bisect", "grid"])
def test_widening_ends_at_the_bounds_and_says_so(method: str) -> None:
    options = {"widen": True, "method": method, "bracket": (0.01, 0.16)}
    sigma, _, stop, tried = run(Curve(), **options)
    assert sigma == LARGEST and "largest" in stop and one(tried, sigma).satisfied
    sigma, _, stop, tried = run(Curve(lambda s: 1.0), **options)
    assert sigma == SMALLEST and "lower bound" in stop and not one(tried, sigma).satisfied
    assert min(e.sigma for e in tried.evaluations) == SMALLEST


@pytest.mark.parametrize("crossing", [3e-4, 0.004, 0.0123, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_grid_finds_the_crossing_and_never_a_violation(crossing: float, sign: int) -> None:
    """The line between neighbours of a convex curve meets the edge below its own crossing, so it is taken."""
    curve = Curve(lambda s: sign * rising(crossing)(s))
    sigma, (low, high), stop, tried = run(curve, method="grid", widen=True, bracket=(0.01, 0.16))
    assert low <= sigma <= crossing <= high and high / low <= 4
    assert one(tried, sigma).satisfied and stop == "interpolated between grid points, and checked there"
    below, above = (tolerance_used(s, crossing) for s in (low, high))
    assert math.isclose(sigma, low + (1 - below) / (above - below) * (high - low), rel_tol=1e-6)


def tolerance_used(sigma: float, crossing: float) -> float:
    return (sigma / crossing) ** 2


def test_grid_does_not_trust_an_interpolation_that_violates() -> None:
    def concave(sigma: float) -> float:  # above the line between 0.02 and 0.04, so the line's crossing is too far
        return 0.0 if sigma < 0.021 else 0.004 if sigma < 0.04 else 0.0042

    sigma, _, stop, tried = run(Curve(concave), method="grid", bracket=(0.01, 0.16))
    assert [e.sigma for e in tried.evaluations[:5]] == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16])
    assert len(tried.evaluations) == 6 and not tried.evaluations[-1].satisfied
    assert 0.02 < tried.evaluations[-1].sigma < 0.04
    assert sigma == pytest.approx(0.02) and stop == "largest grid point that holds the tolerance"


def test_grid_takes_the_largest_that_holds_even_beyond_a_violation() -> None:
    """Two-sided, an NLL that first falls and then rises holds again; the largest sigma is asked for."""
    valley = {0.01: 0.0, 0.02: -0.5, 0.04: -0.3, 0.08: 0.001, 0.16: 0.4}
    sigma, _, _, tried = run(
        Curve(lambda s: valley[min(valley, key=lambda g: abs(g - s))]), method="grid", bracket=(0.01, 0.16)
    )
    assert sigma >= 0.0799 and one(tried, sigma).satisfied
    assert sigma == max(e.sigma for e in tried.evaluations if e.satisfied)


@pytest.mark.parametrize("bracket", [(1e-3, 1.5e-2), (1e-3, 0.1), (0.003, 0.2)])
@pytest.mark.parametrize("steps", [2, 5, 6, 7])
def test_grid_that_holds_everywhere_ends_exactly_on_its_upper_bound(bracket: tuple[float, float], steps: int) -> None:
    sigma, _, stop, tried = run(Curve(), method="grid", bracket=bracket, steps=steps)
    assert sigma == bracket[1] and one(tried, sigma).satisfied and len(tried.evaluations) == steps
    assert f"upper bound ({bracket[1]:g})" in stop
    ratios = [b.sigma / a.sigma for a, b in zip(tried.evaluations, tried.evaluations[1:], strict=False)]
    assert ratios == pytest.approx([(bracket[1] / bracket[0]) ** (1 / (steps - 1))] * (steps - 1))


def test_grid_is_one_fused_call() -> None:
    curve = Curve(rising(0.05))
    run(curve, method="grid", bracket=(0.01, 0.16))
    assert [len(c) for c in curve.calls] == [5, 1]


@pytest.mark.parametrize("lowest", [0.004, 0.013, 0.025, 0.05, 0.09, 0.6, 2.2])
def test_minimum_is_found_within_the_factor_it_states(lowest: float) -> None:
    sigma, (low, high), stop, tried = run(
        Curve(lambda s: math.log(s / lowest) ** 2 / 20 - 0.5),
        method="grid",
        objective="minimum",
        widen=True,
        bracket=(0.02, 0.08),
        steps=3,
    )
    factor = float(stop.split("factor of ")[1].split(";")[0])
    assert factor == pytest.approx(math.sqrt(2), abs=0.005)
    assert max(sigma / lowest, lowest / sigma) <= factor and low < sigma < high
    assert one(tried, sigma).nll == min(e.nll for e in tried.evaluations) and one(tried, sigma).satisfied


@pytest.mark.parametrize(("slope", "edge"), [(-0.01, LARGEST), (0.01, SMALLEST)])
def test_minimum_on_an_edge_says_so(slope: float, edge: float) -> None:
    curve = Curve(lambda s: slope * math.log(s) - 0.5)
    options: dict[str, Any] = {"method": "grid", "objective": "minimum", "steps": 3}
    sigma, _, stop, _ = run(curve, widen=True, bracket=(0.02, 0.08), **options)
    assert sigma == edge and "edge of what was tried" in stop
    sigma, _, stop, _ = run(curve, bracket=(1e-3, 0.1), **{**options, "steps": 7})
    assert sigma == (0.1 if slope < 0 else 1e-3) and "edge of what was tried" in stop


def test_minimum_without_any_gain_is_not_satisfied() -> None:
    sigma, _, stop, tried = run(
        Curve(lambda s: s), method="grid", objective="minimum", widen=True, bracket=(0.02, 0.08), steps=3
    )
    assert "no sigma lowers the anchors' NLL" in stop and not one(tried, sigma).satisfied


# Metrics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "bound", "change", "holds"),
    [
        ("nll", "two-sided", 0.0019, True),
        ("nll", "two-sided", 0.0021, False),
        ("nll", "two-sided", -0.0021, False),
        ("nll", "one-sided", -0.5, True),
        ("nll", "one-sided", 0.0021, False),
        ("accuracy", "two-sided", -0.004, True),
        ("accuracy", "two-sided", -0.006, False),
        ("accuracy", "two-sided", 0.006, False),
        ("accuracy", "one-sided", 0.1, True),
        ("accuracy", "one-sided", -0.006, False),
        ("flips", "two-sided", 0.01, True),
        ("flips", "one-sided", 0.011, False),
    ],
)
def test_tolerances_are_relative_but_for_flips(metric: str, bound: str, change: float, holds: bool) -> None:
    """0.1 % of an NLL of 2 is 0.002; 1 % of an accuracy of 0.5 is 0.005."""
    curve = Curve(lambda s: change, lambda s: change, lambda s: 0.5 + (change if s else 0.0), base=2.0)
    tolerance = 0.001 if metric == "nll" else 0.01
    tried = tried_on(curve, plan(metric=metric, bound=bound, tolerance=tolerance))
    assert one(tried, 0.1).satisfied is holds
    baseline = tried.verdicts.evaluation(0, 0.0, "all")
    assert baseline.satisfied and baseline.sigma == 0 and baseline.flips == 0


def test_standard_error_is_of_the_paired_change() -> None:
    curve = Curve(flips=lambda s: 0.2)
    change = torch.linspace(0, 1, curve.size, dtype=torch.float64)
    curve.records.baseline[:, 0] = torch.linspace(0, 50, curve.size, dtype=torch.float64)
    curve.nll = lambda s: change  # type: ignore[assignment, return-value]
    tried = tried_on(curve, plan())
    assert one(tried, 0.1).standard_error == pytest.approx(float(change.std()) / math.sqrt(curve.size), rel=0.08)
    flips = tried_on(curve, plan(metric="flips"))
    assert one(flips, 0.1).standard_error == pytest.approx(math.sqrt(0.2 * 0.8 / 999), rel=0.08)
    assert tried.verdicts.evaluation(0, 0.0, "all").standard_error == 0


def test_metrics_are_those_of_predict() -> None:
    adapter, anchors = overconfident()
    result = look(adapter, anchors, bracket=(0.05, 0.1), steps=2, apply=False)
    labels = anchors.labels_tensor()
    mean = tfb_ext.predict(adapter, anchors, samples=0)
    for e in (result.baseline, *result.evaluations):
        found = tfb_ext.predict(adapter, anchors, SAMPLES, sigma=e.sigma) if e.sigma else mean
        assert e.nll == pytest.approx(tfb_ext.evaluate(found.probabilities, labels).nll, abs=1e-5)
        assert e.accuracy == pytest.approx(float((found.labels == labels).float().mean()))
        assert e.flips == pytest.approx(float((found.labels != mean.labels).float().mean()))


@pytest.mark.parametrize("vocabulary_is_large", [False, True])
def test_token_labels_of_a_language_model(vocabulary_is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if vocabulary_is_large:
        monkeypatch.setattr(engine, "MANY_CLASSES", zoo.VOCAB - 1)
    adapter = bayesian(depth=2)
    batches = []
    for rows in (3, 2):
        batch = zoo.inputs(rows)
        batches.append({**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)})
    counted = [int((b["labels"][:, 1:] != IGNORED).sum()) for b in batches]
    result = look(adapter, batches, recipe="paper", tolerance=0.5, apply=False)
    assert result.anchors == sum(counted) and result.labelled
    for e in (result.baseline, result.evaluations[-1]):
        losses = []
        for batch in batches:
            if e.sigma == 0:
                with torch.no_grad():
                    losses.append(adapter.model(**batch).loss)
                continue
            adapter.antithetic = False
            with adapter.predictive(SAMPLES, e.sigma):
                losses.append(adapter.model(**batch).loss)
        expected = sum(float(x) * n for x, n in zip(losses, counted, strict=True)) / sum(counted)
        assert e.nll == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="all are -100"):
        look(adapter, [{**b, "labels": torch.full_like(b["labels"], IGNORED)} for b in batches])


# Recipes ------------------------------------------------------------------------------------------------------------


def test_auto_takes_the_smallest_sigma_near_the_lowest_nll_of_good_labels() -> None:
    adapter, anchors = overconfident()
    result = look(adapter, anchors)
    assert (result.objective, result.metric, result.method) == ("one-se", "nll", "grid") and result.antithetic
    assert "labelled and not memorised" in result.reason and result.satisfied
    lowest = min(result.evaluations, key=lambda e: e.nll)
    assert result.sigma <= lowest.sigma and "lowest NLL of" in result.stop
    assert look(adapter, anchors, objective="minimum", apply=False).sigma == lowest.sigma
    assert min(e.nll for e in result.evaluations) < result.baseline.nll - 0.05


@pytest.mark.slow
def test_auto_counts_flips_of_memorised_anchors() -> None:
    adapter, anchors = overconfident(wrong_every=0, factor=2000.0)
    result = look(adapter, anchors)
    assert result.baseline.nll < 0.01 and result.labelled
    assert (result.objective, result.metric, result.tolerance) == ("tolerance", "flips", 0.01)
    assert "has memorised the anchors" in result.reason
    assert result.satisfied and next(e for e in result.evaluations if e.sigma == result.sigma).flips <= 0.01
    with pytest.warns(UserWarning, match="it has memorised them.*held-out anchors, or metric='flips'"):
        look(adapter, anchors, recipe="paper", apply=False)


@pytest.mark.slow
def test_auto_counts_flips_without_labels() -> None:
    adapter, anchors = overconfident()
    result = look(adapter, replace(anchors, labels=[None, *anchors.labels[1:]]))
    assert (result.objective, result.metric) == ("tolerance", "flips") and not result.labelled
    assert "not all anchors have labels" in result.reason and result.baseline.accuracy == 1.0


def test_given_arguments_are_taken_and_named() -> None:
    def made(recipe: str, nll: float = 0.5, **given: Any) -> Plan:
        return make_plan(Options(recipe, **given), True, nll)

    assert made("auto").objective == "one-se" and "given" not in made("auto").reason
    assert made("auto", metric="flips").tolerance == 0.01
    assert made("auto", metric="accuracy").tolerance == 0.01
    assert made("auto", method="bisect").steps == 6
    assert made("auto", method="bisect", steps=9).steps == 9
    assert made("paper", method="grid").steps == 5 and not made("paper").widen and made("auto").widen
    assert made("paper", metric="accuracy", tolerance=0.02).tolerance == 0.02
    for name, value in {"tolerance": 0.1, "bound": "one-sided", "objective": "tolerance", "method": "bisect"}.items():
        plan = made("auto", **{name: value})  # these mean something to a tolerance only
        assert plan.objective == "tolerance" and plan.metric == "nll" and getattr(plan, name) == value, name
        assert plan.reason.endswith(f"given by the caller: {name}")
    asked = made("auto", 0.001, objective="minimum")
    assert asked.objective == "minimum" and "memorised the anchors" in asked.reason
    official = made("official")
    assert official.pseudo and official.per_item and official.mode == "flipout" and official.antithetic is False


# Noise, trunk, depth ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grid_equals_each_sigmas_own_run() -> None:
    adapter, anchors = overconfident()
    together = look(adapter, anchors, bracket=(0.03, 0.12), steps=3, method="grid", tolerance=0.003, apply=False)
    for e in together.evaluations:
        alone = look(
            adapter, anchors, bracket=(e.sigma, 10 * e.sigma), steps=2, method="grid", tolerance=0.003, apply=False
        )
        twin = next(o for o in alone.evaluations if o.sigma == e.sigma)
        assert twin.nll == pytest.approx(e.nll, abs=1e-6) and twin.flips == e.flips
    assert len({round(e.nll, 4) for e in together.evaluations}) == len(together.evaluations)


def test_trunk_runs_once_a_search() -> None:
    adapter, anchors = overconfident()
    adapter.depth = 1
    zoo.compared(adapter)
    below = small_sets.rows_through(adapter.anatomy.blocks[0].input_layernorm)
    above = small_sets.rows_through(adapter.anatomy.blocks[3].input_layernorm)
    result = look(adapter, anchors, batch_size=10, recipe="paper")
    assert len(result.evaluations) >= 5
    assert below == [10] * 3  # once for the mean adapter's own answers and for all sigmas and samples together
    assert above == [10] * 3 + [40] * 3 * len(result.evaluations)
    assert result.tokens == sum(map(len, anchors.token_ids)) * (1 + SAMPLES * len(result.evaluations))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "kept"), zoo.slow_but([(2, 2), (0.25, 1), (4, "all"), ("all", "all"), (1.0, "all")], (2, 2))
)
def test_depth_is_searched_and_set(depth: Any, kept: int | str) -> None:
    adapter, anchors = overconfident()
    adapter.depth = 3
    looked = look(adapter, anchors, depth=depth, apply=False)
    assert looked.depth == kept and adapter.depth == 3
    assert look(adapter, anchors, depth=depth).evaluations == looked.evaluations and adapter.depth == kept
    assert look(adapter, anchors).evaluations == looked.evaluations  # the depth is now the adapter's own
    if kept != 1:
        assert look(adapter, anchors, depth=1).evaluations != looked.evaluations


def test_depth_head() -> None:
    adapter = bayesian("llama-head")
    result = look(adapter, small_sets.encoded(), depth="head")
    assert result.depth == "head" == adapter.depth


def test_deterministic_and_seeded() -> None:
    adapter, anchors = overconfident()
    first, second = look(adapter, anchors), look(adapter, anchors)
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    adapter.seed = 5
    assert look(adapter, anchors).evaluations != first.evaluations


@pytest.mark.slow
def test_apply() -> None:
    adapter, anchors = overconfident()
    result = look(adapter, anchors, depth=2, apply=False)
    assert adapter.sigma is None and adapter.search is None and adapter.depth == "all"
    assert look(adapter, anchors, depth=2).sigma == result.sigma == adapter.sigma
    assert adapter.search == result.summary() and adapter.depth == 2


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    adapter, anchors = overconfident(6)
    look(adapter, anchors, recipe="paper", progress=True)
    said = capsys.readouterr()
    assert said.out == "" and "search sigma: 100%" in said.err


# Results ------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Any) -> None:
    adapter, anchors = overconfident()
    result = look(adapter, anchors)
    result.save(tmp_path / "a" / "search.json")
    again = SigmaSearch.load(tmp_path / "a" / "search.json")
    assert again == result and again.records is not None and result.records is not None
    assert torch.equal(again.records.baseline, result.records.baseline)
    assert all(torch.equal(again.records.values[key], v) for key, v in result.records.values.items())
    raw = strict((tmp_path / "a" / "search.json").read_text())
    del raw["records"]
    assert raw == json.loads(json.dumps(result.to_dict()))


@pytest.mark.slow
def test_one_anchor_has_no_standard_error_and_still_saves(tmp_path: Any) -> None:
    adapter, anchors = overconfident()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = look(adapter, anchors.select([0]))
    assert math.isnan(result.evaluations[0].standard_error)
    result.save(tmp_path / "search.json")
    raw = strict((tmp_path / "search.json").read_text())
    assert raw["evaluations"][0]["standard_error"] is None
    again = SigmaSearch.load(tmp_path / "search.json")
    assert math.isnan(again.evaluations[0].standard_error) and again.to_dict() == result.to_dict()
    again.plot(tmp_path / "a.png")


@pytest.mark.slow
def test_printed_table() -> None:
    adapter, anchors = overconfident()
    result = look(adapter, anchors, metric="accuracy", tolerance=0.25, depth=2)
    lines = str(result).splitlines()
    assert lines[0].startswith(f"sigma = {result.sigma:.4g}   (auto: accuracy within 25.00% (two-sided)")
    assert f"{SAMPLES} samples, 30 anchors, depth 2" in lines[0]
    assert lines[1].endswith(result.reason) and lines[2].endswith(result.stop)
    assert f"{result.confidence:.0%} of resampled anchors give the same verdict" in lines[3]
    assert len(lines) == 6 + len(result.evaluations) and lines[5].split()[0] == "0"
    chosen = [line for line in lines if line.endswith(f"yes ({result.confidence:.0%})   <- chosen")]
    assert [float(line.split()[0]) for line in chosen] == [pytest.approx(result.sigma, rel=1e-3)]
    assert "lowest NLL on the anchors" in str(look(adapter, anchors))


@pytest.mark.slow
def test_band_and_plot(tmp_path: Any) -> None:
    adapter, anchors = overconfident(factor=1.0)
    paper = look(adapter, anchors, recipe="paper")
    base = paper.baseline.nll
    assert paper.band == pytest.approx((0.997 * base, 1.003 * base))
    assert replace(paper, bound="one-sided").band == pytest.approx((-math.inf, 1.003 * base))
    flips = look(adapter, anchors, metric="flips")
    assert flips.band == (-math.inf, 0.01)
    accuracy = look(adapter, anchors, metric="accuracy", bound="one-sided")
    assert accuracy.band == pytest.approx((0.99 * accuracy.baseline.accuracy, math.inf))
    for result in (paper, flips, accuracy):
        result.plot(tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "a.png").unlink()


@pytest.mark.slow
def test_summary_ends_in_the_adapters_config(tmp_path: Any) -> None:
    adapter, anchors = overconfident()
    result = look(adapter, anchors, depth=2)
    adapter.save_pretrained(tmp_path)
    raw = strict((tmp_path / "tfb_config.json").read_text())
    assert raw["search"] == result.summary() and raw["sigma"] == result.sigma and raw["depth"] == 2
    again = tfb_ext.load(zoo.peft_model("llama").unload(), tmp_path)
    assert again.search == result.summary() and again.sigma == result.sigma and again.depth == 2


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "fast"}, "recipe is 'fast', expected one of 'auto', 'paper', 'official'"),
        ({"metric": "ece"}, "metric is 'ece', expected one of 'nll', 'accuracy', 'flips', 'brier', or a function"),
        ({"bound": "both"}, "bound is 'both', expected one of 'two-sided', 'one-sided'"),
        ({"objective": "max"}, "objective is 'max', expected one of 'tolerance', 'minimum', 'one-se'"),
        ({"method": "brent"}, "method is 'brent', expected one of 'bisect', 'grid', 'root', 'official'"),
        ({"tolerance": 0}, "tolerance is 0, expected a positive fraction"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"tolerance": "1%"}, "tolerance is '1%'"),
        ({"steps": 1}, "steps is 1, expected an integer from 2 to 1000"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"steps": True}, "steps is True"),
        ({"bracket": 0.1}, r"bracket is 0.1, expected \(lowest sigma, highest sigma\)"),
        ({"bracket": (0.1,)}, r"bracket is \(0.1,\), expected"),
        ({"bracket": (0.1, 0.1)}, "expected a lowest sigma below the highest"),
        ({"bracket": (0, 0.1)}, "sigma is 0, expected a finite number above 0"),
        ({"samples": 0}, "samples is 0, expected a count of at least 1"),
        ({"depth": 9}, "depth is 9, expected 1 to 4 blocks"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"objective": "minimum", "metric": "flips"}, "looks for the lowest NLL, got metric='flips'"),
        ({"objective": "minimum", "method": "bisect"}, "needs method='grid'"),
        ({"objective": "minimum", "recipe": "paper"}, "needs method='grid'"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    adapter, anchors = overconfident(4)
    with pytest.raises(ValueError, match=message):
        look(adapter, anchors, **arguments)
    assert adapter.sigma is None and adapter.search is None and adapter.depth == "all"


def test_refuses_a_minimum_without_labels_and_empty_anchors() -> None:
    adapter = bayesian()
    with pytest.raises(ValueError, match="objective='minimum' needs labelled anchors.*metric='flips'"):
        look(adapter, small_sets.encoded(4), objective="minimum")
    with pytest.raises(ValueError, match="data set is empty"):
        look(adapter, small_sets.encoded(4).select([]))


# Roots, the authors' code, the smallest near the minimum --------------------------------------------------------------


@pytest.mark.parametrize("crossing", [3e-5, 1e-3, 0.0123, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_root_ends_just_inside_the_tolerance_of_a_smooth_curve(crossing: float, power: float) -> None:
    curve = Curve(lambda s: 0.003 * (s / crossing) ** power)
    sigma, (low, high), _, tried = run(curve, method="root", widen=True, bracket=(0.01, 0.16), steps=12)
    assert one(tried, sigma).satisfied and 0.85 <= (sigma / crossing) ** power <= 1 and low == sigma <= high
    if power == 2.0 and crossing >= 1e-3:
        assert len(curve.calls) <= 4  # the first guess goes by the square law


@pytest.mark.parametrize("crossing", [0.004, 0.03, 0.3])
def test_root_on_a_curve_with_steps_is_no_worse_than_bisection(crossing: float) -> None:
    curve = Curve(flips=lambda s: 0.004 if s <= crossing else 0.05)
    sigma, (low, high), stop, tried = run(
        curve, metric="flips", tolerance=0.01, method="root", widen=True, bracket=(0.01, 0.16), steps=12
    )
    assert sigma <= crossing < high and high / low <= 1.05 and "factor" in stop and len(curve.calls) <= 12
    assert one(tried, sigma).satisfied


def test_root_says_when_it_ends_on_a_bound_or_out_of_steps() -> None:
    options: dict[str, Any] = {"method": "root", "bracket": (0.01, 0.16), "steps": 12}
    sigma, _, stop, _ = run(Curve(), widen=True, **options)
    assert sigma == LARGEST and "largest sigma allowed" in stop
    sigma, _, stop, tried = run(Curve(lambda s: 1.0), widen=True, **options)
    assert sigma == SMALLEST and "no sigma down to" in stop and not one(tried, sigma).satisfied
    sigma, _, stop, _ = run(Curve(), **options)
    assert sigma == 0.16 and "largest sigma allowed (0.16)" in stop
    steep = Curve(lambda s: 1.0 if s > 0.02 else 0.0)
    sigma, _, stop, _ = run(steep, **{**options, "steps": 2})
    assert stop == "2 steps"


@pytest.mark.parametrize("crossing", [0.0021, 0.0055, 0.0101, 0.0142])
def test_official_takes_the_smallest_midpoint_that_violates(crossing: float) -> None:
    """Its change is divided by the number of anchors once more."""
    curve = Curve(lambda s: 1000 * rising(crossing)(s))
    sigma, _, stop, tried = run(curve, method="official", per_item=True)
    assert crossing < sigma <= crossing + 0.014 / 2**4 and "smallest sigma that violates" in stop
    assert sigma == min(e.sigma for e in tried.evaluations if not e.satisfied) and len(tried.evaluations) == 5
    assert [e.sigma for e in tried.evaluations][:1] == [0.008]


def test_official_without_a_violation_is_the_upper_bound() -> None:
    sigma, _, stop, tried = run(Curve(), method="official", per_item=True)
    assert sigma == 0.015 and "none of which violates" in stop and all(e.satisfied for e in tried.evaluations)


@pytest.mark.slow
def test_official_end_to_end() -> None:
    adapter, anchors = overconfident(factor=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a violating choice is what it is
        result = look(adapter, anchors, recipe="official", tolerance=1e-5)
    assert (result.mode, result.antithetic, adapter.mode, adapter.antithetic) == ("flipout", False, "flipout", False)
    assert result.labelled and result.baseline.accuracy == 1.0  # its own answers, though there are labels
    ratios = {e.sigma: abs(e.nll - result.baseline.nll) / result.baseline.nll / 30 for e in result.evaluations}
    for e in result.evaluations:
        assert e.satisfied == (ratios[e.sigma] <= 1e-5)
    assert result.sigma == min([s for s, r in ratios.items() if r > 1e-5] or [0.015])
    top = result.band[1] - result.baseline.nll
    assert top == pytest.approx(1e-5 * 30 * result.baseline.nll)


def test_one_standard_error_takes_a_smaller_sigma_that_is_as_good() -> None:
    """Two anchors in three gain, one loses: near the lowest the difference is within its error, farther down it is not."""
    curve = Curve(lambda s: math.log(s / 0.08) ** 2 / 20 - 0.5)
    noise = torch.linspace(-1, 1, curve.size, dtype=torch.float64)
    smooth = curve.nll
    curve.nll = lambda s: smooth(s) + noise * (s - 0.08) * 30  # type: ignore[assignment, return-value]
    options: dict[str, Any] = {"method": "grid", "widen": True, "bracket": (0.02, 0.16), "steps": 8}
    lowest, _, _, _ = run(curve, objective="minimum", **options)
    sigma, _, stop, tried = run(curve, objective="one-se", **options)
    assert sigma < lowest and "the smallest within a standard error" in stop
    gap, error = tried.gap(one(tried, sigma), one(tried, lowest))
    assert 0 < gap <= error
    below = [e for e in tried.evaluations if e.sigma < sigma]
    assert below and all(g > e for g, e in (tried.gap(b, one(tried, lowest)) for b in below))


# How sure, metrics of one's own, early stops --------------------------------------------------------------------------


@pytest.mark.slow
def test_confidence_and_interval_come_from_resampled_anchors() -> None:
    """A change of known mean and spread: the share of resamples below the tolerance is the normal distribution's."""
    curve = Curve()
    change = torch.randn(curve.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = (change - change.mean()) / change.std()
    curve.nll = lambda s: 0.003 * (s / 0.01) + 0.03 * (s / 0.01) * change  # type: ignore[assignment, return-value]
    _, _, _, tried = run(curve, method="grid", bracket=(0.005, 0.02), steps=9, bound="one-sided")
    at = {round(e.sigma, 6): e for e in tried.evaluations}
    assert at[0.005].confidence > 0.99 and at[0.02].confidence > 0.9 and not at[0.02].satisfied
    edge = min(tried.evaluations, key=lambda e: abs(e.sigma - 0.01))
    assert edge.confidence == pytest.approx(0.5, abs=0.06)
    assert edge.standard_error == pytest.approx(0.03 / math.sqrt(1000), rel=0.1)
    low, high = tried.verdicts.interval(Place(0), tried.evaluations)
    # The mean's relative standard error is 10 / sqrt(1000) = 0.32: it crosses at 0.01 / (1 +- 1.64 * 0.32).
    assert 0.0055 < low < 0.0075 and high == pytest.approx(0.02, rel=0.15)


@pytest.mark.slow
def test_metric_of_ones_own() -> None:
    adapter, anchors = overconfident()
    labels = anchors.labels_tensor()

    def brier(probabilities: Tensor, targets: Tensor) -> Tensor:
        assert probabilities.shape == (30, 3) and targets.shape == (30,)
        return (probabilities - torch.nn.functional.one_hot(targets, 3)).square().sum(-1)

    def gap(probabilities: Tensor, targets: Tensor) -> Tensor:  # of a whole set: no number for each item
        return (probabilities.max(-1).values.mean() - (probabilities.argmax(-1) == targets).float().mean()).abs()

    own = look(adapter, anchors, metric=brier, tolerance=0.02, method="root", apply=False)
    ours = look(adapter, anchors, metric="brier", tolerance=0.02, method="root", apply=False)
    assert own.metric == "brier" and own.sigma == pytest.approx(ours.sigma, rel=1e-3)
    assert own.baseline.value == pytest.approx(ours.baseline.value, abs=1e-6)
    found = look(adapter, anchors, metric=gap, tolerance=0.1, method="root", apply=False)
    prediction = tfb_ext.predict(adapter, anchors, SAMPLES, sigma=found.sigma)
    chosen = found.chosen
    assert chosen is not None and chosen.value == pytest.approx(float(gap(prediction.probabilities, labels)), abs=1e-5)
    assert 0 < chosen.standard_error < 1
    gap.__name__ = "brier"  # a name says nothing of what it is
    named = look(adapter, anchors, metric=gap, tolerance=0.1, method="root", apply=False)
    assert [e.brier for e in named.evaluations] == [e.brier for e in found.evaluations]
    with pytest.raises(ValueError, match=r"metric <lambda> returned a tensor of shape \(3,\) for 30 anchors"):
        look(adapter, anchors, metric=lambda p, t: torch.zeros(3))
    with pytest.raises(ValueError, match="returned NaN or infinity"):
        look(adapter, anchors, metric=lambda p, t: torch.tensor(math.nan))


@pytest.mark.slow
def test_early_stop_sees_fewer_anchors_and_comes_to_the_same_verdicts() -> None:
    adapter, anchors = overconfident(200)
    options: dict[str, Any] = {"metric": "nll", "tolerance": 0.05, "method": "bisect", "batch_size": 10}
    options |= {"bracket": (0.002, 0.2), "steps": 3, "bound": "two-sided"}
    whole = look(adapter, anchors, apply=False, **options)
    early = look(adapter, anchors, apply=False, early_stop=0.95, **options)
    assert all(e.items == 200 for e in whole.evaluations) and early.early_stop == 0.95
    seen = {e.sigma: e.items for e in early.evaluations}
    assert min(seen.values()) <= 100 and early.tokens < 0.9 * whole.tokens
    by_sigma = {e.sigma: e for e in whole.evaluations}
    for e in early.evaluations:
        if e.sigma in by_sigma and e.items < 200:
            assert e.satisfied == by_sigma[e.sigma].satisfied
    assert early.sigma == pytest.approx(whole.sigma, rel=0.3)


@pytest.mark.slow
def test_early_stop_of_the_lowest_nll_drops_what_is_clearly_higher() -> None:
    adapter, anchors = overconfident(200)
    early = look(adapter, anchors, apply=False, early_stop=0.95, batch_size=10, bracket=(0.02, 2.0), steps=4)
    whole = look(adapter, anchors, apply=False, batch_size=10, bracket=(0.02, 2.0), steps=4)
    assert early.sigma == whole.sigma and early.chosen is not None and early.chosen.items == 200
    assert min(e.items for e in early.evaluations) < 200


def seen_only(change: Tensor, seen: int) -> Tensor:
    """(size, 5) records of a set whose mean adapter has an NLL of 1 everywhere, NaN from the anchor number ``seen`` on."""
    values = torch.full((len(change), 5), math.nan, dtype=torch.float64)
    values[:seen] = 0.0
    values[:seen, 0] = 1 + change[:seen]
    return values


@pytest.mark.slow
@pytest.mark.parametrize("level", [0.9, 0.99])
def test_early_stop_is_right_as_often_as_it_says(level: float) -> None:
    """Many sets of anchors whose change lies near the tolerance, in random order, looked at every 20."""
    generator = torch.Generator().manual_seed(3)
    rule = tried_on(Curve(), plan(bound="one-sided", tolerance=0.01)).verdicts
    size, wrong, stopped = rule.size, 0, 0
    for _ in range(300):
        mean = 0.01 + 0.01 * float(torch.randn((), generator=generator))
        change = mean + 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)
        for seen in range(20, size, 20):
            if rule.settled(Place(0), seen_only(change, seen), level, size // 20):
                stopped += 1
                wrong += (change[:seen].mean() <= 0.01) != (change.mean() <= 0.01)
                break
    assert stopped > 100 and wrong <= (1 - level) * stopped + 3 * math.sqrt((1 - level) * stopped)


def test_early_stop_near_the_edge_ends_once_the_amount_is_known() -> None:
    """The very edge of the tolerance: the verdict stays open to the end, the amount does not."""
    rule = tried_on(Curve(), plan(bound="one-sided", tolerance=0.1)).verdicts
    change = 0.1 + 0.01 * torch.randn(rule.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert rule.settled(Place(0), seen_only(change, 100), 0.99, 10)
    assert not rule.settled(Place(0), seen_only(0.1 + 10 * (change - 0.1), 100), 0.99, 10)


def two_sigmas(generator: torch.Generator, size: int, tails: bool) -> tuple[Tensor, Tensor]:
    """(size,) changes of NLL at two neighbouring sigmas: nearly on a line, with a scatter that grows with the change."""
    first = torch.randn(size, generator=generator, dtype=torch.float64)
    if tails:
        first = first.sign() * (first.abs().exp() - 1)
    scatter = 0.1 * (1 + first.abs()) * torch.randn(size, generator=generator, dtype=torch.float64)
    return 0.1 * first + 0.1, 0.12 * (first + scatter) + 0.12


def test_what_one_sigma_shows_on_all_anchors_sharpens_the_next() -> None:
    first, second = two_sigmas(torch.Generator().manual_seed(5), Curve.size, tails=False)
    tried = tried_on(Curve(), plan(bound="one-sided", tolerance=0.1, method="root"))
    rule = tried.verdicts
    few = seen_only(second, 40)
    alone = rule.guess(Place(0), rule.harm(few))
    assert alone.control is None and alone.value == pytest.approx(float(second[:40].mean()))
    assert alone.error == pytest.approx(float(second[:40].std()) * math.sqrt(1 / 40 - 1 / Curve.size))
    rule.records.values[Place(0), 0.01] = seen_only(first, Curve.size)
    rule.evaluation(Place(0), 0.01, "all")
    helped = rule.guess(Place(0), rule.harm(few))
    assert helped.control == 0.01 and helped.slope == pytest.approx(1.2, abs=0.1) and helped.error < alone.error / 4
    assert abs(helped.value - float(second.mean())) < 3 * helped.error
    # Not at another depth, not where the other sigma lacks an anchor of these, not with fewer of its own than settle anything.
    assert rule.guess(Place(1), rule.harm(few)) == alone
    assert rule.guess(Place(0), rule.harm(seen_only(second, 31))).control is None
    rule.records.values[Place(0), 0.01][0] = math.nan
    assert rule.guess(Place(0), rule.harm(few)) == alone
    rule.records.values[Place(0), 0.01] = seen_only(first, Curve.size)
    # The evaluation is the better guess, and the error it states over anchors is nearly that of all, not of forty.
    rule.records.values[Place(0), 0.012] = few
    judged = rule.evaluation(Place(0), 0.012, "all")
    assert judged.items == 40 and judged.value == judged.nll == pytest.approx(1 + helped.value)
    of_all = float(second.std()) / math.sqrt(Curve.size)
    assert judged.standard_error == pytest.approx(math.hypot(of_all, helped.error), rel=0.3)
    assert judged.standard_error < float(second.std()) / math.sqrt(40) / 2


@pytest.mark.slow
@pytest.mark.parametrize("tails", [False, True])
@pytest.mark.parametrize("level", [0.9, 0.99])
def test_early_stop_is_right_as_often_as_it_says_with_help(level: float, tails: bool) -> None:
    """The amount is known to 5 % of the tolerance, or the verdict is the full set's, with another sigma seen on all."""
    generator = torch.Generator().manual_seed(7)
    size, wrong, stopped, seen = Curve.size, 0, 0, 0
    for _ in range(200):
        first, second = two_sigmas(generator, size, tails)
        allowed = float(second.mean()) * (0.75 + 0.5 * float(torch.rand((), generator=generator)))
        rule = tried_on(Curve(), plan(bound="one-sided", tolerance=allowed, method="bisect")).verdicts
        rule.records.values[Place(0), 0.01] = seen_only(first, size)
        rule.evaluation(Place(0), 0.01, "all")
        for count in range(40, size, 40):
            values = seen_only(second, count)
            if rule.settled(Place(0), values, level, size // 40):
                guess = rule.guess(Place(0), rule.harm(values))
                stopped, seen = stopped + 1, seen + count
                verdict = (guess.value <= allowed) == (float(second.mean()) <= allowed)
                wrong += not verdict and abs(guess.value - float(second.mean())) > 0.05 * allowed
                break
    assert stopped > 150 and wrong <= (1 - level) * stopped + 3 * math.sqrt((1 - level) * stopped)
    assert seen / stopped < size / 2


def test_the_root_finder_knows_the_amount_near_the_edge_and_then_needs_few_anchors() -> None:
    """A sigma that uses 80 % of the tolerance is run on for the next one's sake; one at 50 or at 91 % is not."""
    noise = torch.randn(Curve.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    noise -= noise.mean()
    for used, count, method, settled in (
        (0.5, 40, "root", True),
        (0.8, 40, "root", False),
        (0.8, 40, "bisect", True),
        (0.91, 60, "root", True),
        (1.3, 40, "root", False),
        (2.0, 40, "root", True),
    ):
        rule = tried_on(Curve(), plan(bound="one-sided", tolerance=0.1, method=method)).verdicts
        change = 0.02 * noise
        change += 0.1 * used - change[:count].mean()
        assert rule.settled(Place(0), seen_only(change, count), 0.9, 10) is settled, (used, method)


@pytest.mark.slow
def test_early_root_search_ends_on_few_anchors_and_goes_on_from_its_file(tmp_path: Path) -> None:
    adapter, anchors = overconfident(300)
    options: dict[str, Any] = {"metric": "nll", "tolerance": 0.02, "method": "root", "bound": "two-sided"}
    options |= {"bracket": (0.01, 0.1), "batch_size": 10, "apply": False, "steps": 6}
    whole = look(adapter, anchors, **options)
    file = tmp_path / "search.json"
    early = look(adapter, anchors, early_stop=0.95, checkpoint=file, **options)
    assert early.tokens < 0.7 * whole.tokens and early.sigma == pytest.approx(whole.sigma, rel=0.05)
    again = look(adapter, anchors, early_stop=0.95, checkpoint=file, **options)
    assert again.tokens == 0 and again.evaluations == early.evaluations and again.sigma == early.sigma


# Several depths -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_depths_share_one_trunk_and_the_cheapest_of_equals_is_taken() -> None:
    adapter, anchors = overconfident()
    zoo.compared(adapter, "all", 0.5, 1)
    blocks = adapter.anatomy.blocks
    rows = [small_sets.rows_through(b.input_layernorm) for b in blocks]
    result = look(adapter, anchors, depth=["all", 0.5, 1], batch_size=30)
    counts = [sum(r) for r in rows]
    tried = {d.depth: d for d in result.depths}
    assert list(tried) == ["all", 2, 1] and adapter.depth == result.depth
    assert counts[0] == counts[1] and counts[2] > counts[1] and counts[3] > counts[2]
    assert [d.forwards for d in result.depths] == [4.0, 2.5, 1.75]
    best = min(result.depths, key=lambda d: d.score)
    assert best.behind == (0.0, 0.0) and all(d.score == d.nll for d in result.depths)
    equal = [d for d in result.depths if d.behind[0] <= d.behind[1] or d is best]
    assert result.depth == equal[-1].depth
    alone = look(adapter, anchors, depth=result.depth, bracket=result.bracket, steps=2, apply=False)
    together = {e.sigma: e for e in result.evaluations}
    assert any(e.sigma in together for e in alone.evaluations)
    for e in alone.evaluations:
        if e.sigma in together:
            assert e.nll == pytest.approx(together[e.sigma].nll, abs=1e-6)
    assert "<- chosen" in str(result).splitlines()[-3 + list(tried).index(result.depth)]


def test_depths_with_a_tolerance_are_compared_by_the_entropy_they_buy() -> None:
    adapter, anchors = overconfident()
    result = look(adapter, anchors, depth=[2, 1], metric="flips", tolerance=0.2)
    assert all(d.score == -d.entropy for d in result.depths)
    assert all(d.flips <= 0.2 for d in result.depths)


def test_refuses_no_depths_and_bad_confidences() -> None:
    adapter, anchors = overconfident(4)
    with pytest.raises(ValueError, match="depth is an empty list"):
        look(adapter, anchors, depth=[])
    for value in (1.0, 0.2, 99, True):
        with pytest.raises(ValueError, match=f"early_stop is {value!r}, expected a confidence"):
            look(adapter, anchors, early_stop=value)
    with pytest.raises(ValueError, match="early_stop is 0.99 with a metric of your own"):
        look(adapter, anchors, early_stop=0.99, metric=lambda p, t: p[:, 0])
