"""The section of the report on spans: samples that differ at the last tokens of a prompt alone, and what they compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from .check import BASE
from .data import TASKS
from .measures import Difference, compare
from .results import Results, Row

TITLE = "Spans"
ALL = "all tokens, N = 10"
UPPER = "upper eighth, N = 10"
LINEAR = {"all tokens, linear": "all", "answer, linear": "answer"}
MEASURES = (
    ("accuracy", "accuracy %", 100, 1),
    ("ece", "ECE %", 100, 1),
    ("nll", "NLL", 1, 3),
    ("brier", "Brier", 1, 3),
    ("auroc_error", "AUROC error", 1, 3),
    ("auroc_ood", "AUROC OOD", 1, 3),
)
JUDGED = ("nll", "ece")
Table = Callable[[list[str], list[list[str]]], str]


@dataclass(frozen=True)
class Group:
    """One data set's adapters of one kind: name of a setting -> its seeds."""

    dataset: str
    adapter: str
    settings: dict[str, list[Row]]

    @property
    def title(self) -> str:
        return titled(self.dataset, self.adapter)

    def against_all(self, name: str) -> dict[str, Difference] | None:
        """A setting minus ten samples of all tokens; None where either is missing."""
        ours, theirs = self.settings.get(name), self.settings.get(ALL)
        if not ours or not theirs:
            return None
        return compare([row.predicted for row in ours], [row.predicted for row in theirs])


def groups(results: Results) -> Iterator[Group]:
    """All adapters that a span or the closed form was tried on, the over-fitted ones first."""
    spanned = _sampled(results)
    settings = sorted({(row.span, row.samples) for row in spanned})
    places = dict.fromkeys((row.dataset, row.adapter) for row in [*spanned, *results.pick(method="linear")])
    for dataset, adapter in sorted(places, key=lambda place: "-early-" in place[1]):

        def pick(dataset: str = dataset, adapter: str = adapter, **wanted: Any) -> list[Row]:
            return results.pick(dataset=dataset, adapter=adapter, **wanted)

        tfb = {**BASE, "antithetic": True}
        found = {
            "the adapter as it is": pick(method="mean"),
            "temperature scaling": pick(method="mean+temperature"),
            ALL: pick(**tfb),
            UPPER: pick(**{**tfb, "depth": 0.125}),
            **{name_of(s, n): pick(**{**tfb, "span": s, "samples": n}) for s, n in settings},
            **{name: pick(method="linear", span=span) for name, span in LINEAR.items()},
            **{f"{name}, temperature": pick(method="linear+temperature", span=span) for name, span in LINEAR.items()},
        }
        yield Group(dataset, adapter, {name: rows for name, rows in found.items() if rows})


def titled(dataset: str, adapter: str) -> str:
    """A data set and the kind of its adapters, in words."""
    return f"{TASKS[dataset].title}, {adapter.removesuffix('-mle')}"


def origin(rows: list[Row]) -> str:
    """Where rows were measured."""
    return "From " + ", ".join(sorted({f"{row.device} at {row.commit}" for row in rows})) + "."


def _sampled(results: Results) -> list[Row]:
    """Rows of samples that differ at the last tokens alone."""
    return [row for row in results.rows if row.span != "all" and row.method == "tfb"]


def name_of(span: str, samples: int) -> str:
    return f"{span}, N = {samples}"


def section(results: Results, table: Table) -> str | None:
    """The section's text; None where no span was tried."""
    found = list(groups(results))
    if not found:
        return None
    rows = _sampled(results)
    names = [name for name in (UPPER, *LINEAR) if any(name in group.settings for group in found)]
    names += [name_of(*key) for key in sorted({(row.span, row.samples) for row in rows})]
    lines = [[group.title, name, *cells(rows)] for group in found for name, rows in group.settings.items()]
    titles = [title for _, title, _, _ in MEASURES]
    parts = [
        "Samples of the span `answer` differ at the last token of a prompt, those of `question` at its fixed last words; the tokens before "
        "are the mean adapter's. Sigma is searched for each with the samples it is used with. What is called linear is the closed form, "
        "without samples, at the sigma searched without them. Mean over the seeds ± its standard error.",
        table(["set, adapter", "setting", *titles, "sigma", "seeds", "forwards", "s per 1000", "search s"], lines),
        f"Each minus {ALL}, ± the standard error (paired bootstrap of the test items):",
        table(
            ["set, adapter", *(f"{name}: {measure.upper()}" for name in names for measure in JUDGED)],
            _differences(found, names),
        ),
        "\n".join(f"* {verdict(found, name)}" for name in names),
        origin([*rows, *results.pick(method="linear")]),
    ]
    return "\n\n".join(parts)


def cells(rows: list[Row]) -> list[str]:
    found = []
    for measure, _, factor, digits in MEASURES:
        values = [row.measures[measure] for row in rows]
        found.append(_mean([factor * value for value in values if value is not None], f".{digits}f"))
    sigmas = [row.sigma for row in rows if row.sigma is not None]
    return [
        *found,
        f"{min(sigmas):.2g} to {max(sigmas):.2g}" if sigmas else "",
        str(len(rows)),
        f"{fmean(row.forwards for row in rows):.3g}",
        _seconds([row.seconds for row in rows]),
        _seconds([row.search_seconds for row in rows]),
    ]


def _seconds(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.2f}" if known else ""


def _mean(values: list[float], form: str) -> str:
    if not values:
        return ""
    error = f" ± {stdev(values) / len(values) ** 0.5:{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{error}"


def _differences(found: list[Group], names: list[str]) -> list[list[str]]:
    lines = []
    for group in found:
        line = [group.title]
        for name in names:
            difference = group.against_all(name)
            line += ["" if difference is None else _difference(difference[m], m) for m in JUDGED]
        lines.append(line)
    return lines


def _difference(difference: Difference, measure: str) -> str:
    factor, digits = (100, 1) if measure == "ece" else (1, 3)
    return f"{factor * difference.value:+.{digits}f} ± {factor * difference.error:.{digits}f}"


def verdict(found: list[Group], name: str) -> str:
    """Where a setting is level with ten samples of all tokens or better, within a standard error."""
    compared = {group.title: group.against_all(name) for group in found}
    known = {title: differences for title, differences in compared.items() if differences is not None}
    parts = []
    for measure in JUDGED:
        worse = [title for title, d in known.items() if d[measure].value > d[measure].error]
        behind = f" (higher: {'; '.join(worse)})" if worse else ""
        parts.append(
            f"{measure.upper()} is level with that of {ALL} or lower in {len(known) - len(worse)} of {len(known)}{behind}"
        )
    return f"**{name}**: {'; '.join(parts)}."
