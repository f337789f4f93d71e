"""What the study has to show, as bars that are cleared or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .measures import Difference, compare
from .results import Results, Row

SETS = ("headlines", "r8", "newsgroups")
MAIN = "qv-overfitted"
SAMPLES = 10
CHEAP = 2.1  # forwards
BASE: dict[str, Any] = {
    "method": "tfb",
    "depth": "all",
    "span": "all",
    "samples": SAMPLES,
    "mode": "weight",
    "recipe": "auto",
}


@dataclass(frozen=True)
class Bar:
    """``passed`` is None where the runs are missing."""

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{ {True: 'yes', False: 'NO', None: '-'}[self.passed]:>4}  {self.name}: {self.detail}"


def bars(results: Results) -> list[Bar]:
    """Every bar, in the order of the questions."""
    found: list[Bar] = []
    for dataset in SETS:
        found += _honest(results, dataset)
        found += _against_others(results, dataset)
    found.append(_cheap(results))
    found += [_blob(results, dataset) for dataset in SETS]
    found.append(_antithetic(results))
    return found


def mean_of(rows: Iterable[Row], measure: str) -> float:
    """Mean of a measure over rows (seeds)."""
    return fmean(float(row.measures[measure] or 0) for row in rows)


def base_rows(results: Results, dataset: str, kind: str = "mle", **other: Any) -> list[Row]:
    """The seeds of TFB's base setting (auto, all blocks, antithetic, weight) with some of it changed."""
    return results.pick(dataset=dataset, adapter=f"{MAIN}-{kind}", **{**BASE, "antithetic": True, **other})


def _plain(results: Results, dataset: str, method: str, kind: str = "mle") -> list[Row]:
    return results.pick(dataset=dataset, adapter=f"{MAIN}-{kind}", method=method)


def _honest(results: Results, dataset: str) -> Iterator[Bar]:
    """Against the adapter as it is: ECE at most a half, NLL at most 70 %, accuracy within one point."""
    before, after = _plain(results, dataset, "mean"), base_rows(results, dataset)
    for measure, limit in (("ece", 0.5), ("nll", 0.7)):
        name = f"{dataset}: TFB cuts {measure.upper()} to at most {limit:.0%}"
        if not before or not after:
            yield _missing(name)
            continue
        a, b = mean_of(before, measure), mean_of(after, measure)
        yield Bar(name, b <= limit * a, f"{a:.4f} to {b:.4f} ({b / a:.0%})")
    name = f"{dataset}: accuracy within one point"
    if not before or not after:
        yield _missing(name)
        return
    a, b = mean_of(before, "accuracy"), mean_of(after, "accuracy")
    yield Bar(name, b >= a - 0.01, f"{a:.2%} to {b:.2%}")


def _against_others(results: Results, dataset: str) -> Iterator[Bar]:
    ours = base_rows(results, dataset)
    for method, kind in (("dropout", "dropout"), ("ensemble", "mle")):
        theirs = _plain(results, dataset, method, kind)
        for measure in ("ece", "nll"):
            name = f"{dataset}: TFB below {method} in {measure.upper()}"
            if not ours or not theirs:
                yield _missing(name)
                continue
            a, b = mean_of(theirs, measure), mean_of(ours, measure)
            yield Bar(name, b < a, f"{b:.4f} against {a:.4f}")


def cheap_settings(results: Results, dataset: str) -> dict[tuple[Any, ...], dict[str, Difference]]:
    """Settings (depth, span, samples, antithetic) of at most ``CHEAP`` forwards -> what they differ by from ten independent samples
    of all blocks."""
    reference = base_rows(results, dataset, antithetic=False)
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.pick(dataset=dataset, adapter=f"{MAIN}-mle", method="tfb", recipe="auto", mode="weight"):
        if row.forwards <= CHEAP and row.samples > 1:
            found.setdefault((row.depth, row.span, row.samples, row.antithetic), []).append(row)
    if not reference:
        return {}
    against = [row.predicted for row in reference]
    return {key: compare([row.predicted for row in rows], against) for key, rows in found.items()}


def _cheap(results: Results) -> Bar:
    name = f"a setting of at most {CHEAP} forwards is as good as ten independent samples of all blocks, on every set"
    by_set = [cheap_settings(results, dataset) for dataset in SETS]
    if not all(by_set):
        return _missing(name)
    common = [key for key in by_set[0] if all(key in one for one in by_set)]
    good = [key for key in common if all(_no_worse(one[key]) for one in by_set)]
    if not good:
        return Bar(
            name, False, f"none of {len(common)} settings is within one standard error in ECE and NLL on all sets"
        )
    described = ", ".join(
        f"depth {d}{'' if s == 'all' else f' span {s}'} N {n} {'antithetic' if a else 'independent'}"
        for d, s, n, a in good
    )
    return Bar(name, True, described)


def _no_worse(difference: dict[str, Difference]) -> bool:
    return all(difference[measure].value <= difference[measure].error for measure in ("ece", "nll"))


def _blob(results: Results, dataset: str) -> Bar:
    """TFB on BLoB's mean against BLoB's own ten samples."""
    name = f"{dataset}: TFB on BLoB's mean is no worse than BLoB's samples (NLL, one standard error)"
    ours, theirs = base_rows(results, dataset, kind="blob"), _plain(results, dataset, "blob", "blob")
    if not ours or not theirs:
        return _missing(name)
    found = compare([row.predicted for row in ours], [row.predicted for row in theirs])
    detail = ", ".join(
        f"{measure.upper()} {mean_of(ours, measure):.4f} against {mean_of(theirs, measure):.4f}"
        for measure in ("nll", "ece")
    )
    return Bar(
        name, found["nll"].value <= found["nll"].error, f"{detail} (standard error of NLL {found['nll'].error:.4f})"
    )


def variance_reduction(results: Results, samples: int = SAMPLES) -> dict[str, list[float]]:
    """Data set -> squared Monte-Carlo error of independent over that of antithetic samples, one value a seed."""
    found: dict[str, list[float]] = {}
    for unit in results.units:
        spread = unit["spread"]
        if spread and str(samples) in spread["independent"]:
            ratio = spread["independent"][str(samples)] / spread["antithetic"][str(samples)]
            found.setdefault(unit["unit"]["dataset"], []).append(ratio)
    return found


def _antithetic(results: Results) -> Bar:
    name = f"antithetic pairs lower the Monte-Carlo variance at N = {SAMPLES}"
    found = variance_reduction(results)
    if not found:
        return _missing(name)
    detail = ", ".join(f"{dataset} {fmean(ratios):.2f} times" for dataset, ratios in found.items())
    return Bar(name, all(fmean(ratios) > 1 for ratios in found.values()), detail)


def _missing(name: str) -> Bar:
    return Bar(name, None, "not run")
