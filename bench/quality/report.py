"""Measure what ``bench.quality.run`` predicted: every row, tables, pictures and the bars.

    python -m bench.quality.report --work FOLDER --out bench/quality      writes rows.csv.gz, RESULTS.md and plots/
    python -m bench.quality.report --work FOLDER --merge                  the folder has a part of the units: adds their rows
    python -m bench.quality.report --work FOLDER --check                  prints the bars; exit status 1 if one is not cleared

``RESULTS.md`` is ``WORDS.md``, written by hand, and behind it everything that is computed. Most of that
needs all predictions: ``--merge`` renews the hand-written part and the sections on spans and quantised bases, and leaves the rest of it as it is.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..record import ROOT
from . import quantised, spans
from .check import MAIN, Bar, bars, base_rows, variance_reduction
from .data import TASKS
from .measures import Difference, compare, spread
from .plots import compared, draw_all
from .results import FIELDS, ORDER, SETTING, Results, Row, load

OUT = ROOT / "bench" / "quality"
COLUMNS = (*spans.MEASURES, ("aurc", "AURC", 1, 3))
WORDS, ROWS, RESULTS = "WORDS.md", "rows.csv.gz", "RESULTS.md"
PICTURES = "Pictures"
Line = dict[str, str]  # of ``rows.csv.gz``


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *lines))


def cells(rows: list[Row]) -> list[str]:
    """The measures of one setting, mean +- standard deviation over its seeds, and its cost."""
    result = []
    for measure, _, factor, digits in COLUMNS:
        values = [row.measures[measure] for row in rows]
        known = [factor * value for value in values if value is not None]
        result.append(_with_spread(known, digits) if known else "")
    seconds = [row.seconds for row in rows if row.seconds is not None]
    result.append(str(len(rows)))
    result.append(f"{rows[0].forwards:.3g}")
    result.append(f"{sum(seconds) / len(seconds):.2f}" if seconds else "")
    return result


def _with_spread(values: list[float], digits: int) -> str:
    mean, deviation = spread(values)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


MEASURES = [title for _, title, _, _ in COLUMNS] + ["seeds", "forwards", "s per 1000"]


def methods_table(results: Results, dataset: str) -> str:
    found = compared(results, dataset)
    return markdown(["method", *MEASURES], ([name, *cells(rows)] for name, rows in found.items()))


def differences_table(results: Results, dataset: str) -> str:
    """TFB's base setting minus each other method, with the bootstrap's standard error."""
    ours = [row.predicted for row in base_rows(results, dataset)]
    lines = []
    for name, rows in compared(results, dataset).items():
        if ours and not name.startswith("TFB on MLE"):
            found = compare(ours, [row.predicted for row in rows])
            lines.append([name, *(_difference(found[m], m) for m in ("accuracy", "ece", "nll", "brier"))])
    return markdown(["TFB on MLE minus", "accuracy, points", "ECE, points", "NLL", "Brier"], lines)


def _difference(difference: Difference, measure: str) -> str:
    factor, digits = (100, 1) if measure in ("accuracy", "ece") else (1, 3)
    low, high = factor * difference.low, factor * difference.high
    return f"{factor * difference.value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def others_table(results: Results) -> str | None:
    """Adapters on other layers and stopped early, every data set's, before and after TFB."""
    lines = []
    for dataset in results.datasets:
        adapters = dict.fromkeys(row.adapter for row in results.pick(dataset=dataset, method="tfb"))
        for adapter in (a.removesuffix("-mle") for a in adapters if a.endswith("-mle") and not a.startswith(MAIN)):
            found = compared(results, dataset, adapter)
            for name in ("MLE", "TFB on MLE"):
                if name in found:
                    lines.append([TASKS[dataset].title, adapter, name, *cells(found[name])])
    return markdown(["set", "adapter", "method", *MEASURES], lines) if lines else None


def bars_table(found: list[Bar]) -> str:
    words = {True: "yes", False: "**no**", None: "not run"}
    return markdown(["bar", "cleared", "figures"], ([bar.name, words[bar.passed], bar.detail] for bar in found))


def document(results: Results, found: list[Bar], words: str, pictures: Sequence[str]) -> str:
    """``RESULTS.md``."""
    parts = [words.strip(), "## The bars", bars_table(found)] if words.strip() else ["## The bars", bars_table(found)]
    parts += [
        f"Below, for each set: over-fitted adapters on the query and value projections ({MAIN}), and TFB's base setting minus each other "
        "method (95 % interval, paired bootstrap of the test items). Every run and measure: `rows.csv.gz`."
    ]
    for dataset in results.datasets:
        parts += [f"## {TASKS[dataset].title}", methods_table(results, dataset), differences_table(results, dataset)]
    others = others_table(results)
    if others:
        parts += ["## Other adapters", "The adapter as it is, and TFB's base setting on it.", others]
    ratios = variance_reduction(results)
    if ratios:
        lines = [[TASKS[name].title, _with_spread(values, 2)] for name, values in ratios.items()]
        parts += ["## Monte-Carlo variance, independent over antithetic, N = 10", markdown(["set", "times"], lines)]
    for title, text in added(results):
        parts += [f"## {title}", text]
    parts += [f"## {PICTURES}", "\n".join(f"![{Path(name).stem.replace('_', ' ')}](plots/{name})" for name in pictures)]
    parts += ["## Where this came from", _origin(results)]
    if results.unusable:
        parts += ["Left out, for they gave NaN: " + "; ".join(results.unusable) + "."]
    return "\n\n".join(parts) + "\n"


def _origin(results: Results) -> str:
    """Versions, devices and commits of all units, each once."""
    lines = []
    for name in ("device", "workers", "torch", "transformers", "peft", "tfb_ext", "commit", "date", "command"):
        values = sorted({str(unit[name]) for unit in results.units})
        lines.append([name, ", ".join(values)])
    return markdown(["", ""], lines)


def write(results: Results, out: Path) -> list[Bar]:
    """Write everything below ``out``; returns the bars."""
    found = bars(results)
    write_rows(out / ROWS, map(line_of, results.rows))
    pictures = [path.name for path in draw_all(results, out / "plots")]
    (out / RESULTS).write_text(document(results, found, _words(out), pictures))
    return found


def _words(out: Path) -> str:
    return (out / WORDS).read_text() if (out / WORDS).is_file() else ""


def added(results: Results) -> Iterator[tuple[str, str]]:
    """Titles and texts of the sections whose units may be run by themselves."""
    for part in (spans, quantised):
        text = part.section(results, markdown)
        if text is not None:
            yield part.TITLE, text


def merge(results: Results, out: Path) -> str:
    """Add rows to those below ``out``, and renew ``RESULTS.md`` as far as they suffice for; returns what was done.

    A new row stands instead of an older one of the same setting. Ensembles are left out: they are of all seeds.
    """
    old = read_rows(out / ROWS)
    new = [line_of(row) for row in results.rows if row.method != "ensemble"]
    found = merged(old, new)
    before, after = (
        {_setting(line): line["nll"] for line in lines if line["method"] == "mean"} for lines in (old, new)
    )
    both = before.keys() & after.keys()
    same = sum(before[key] == after[key] for key in both)
    text = (out / RESULTS).read_text()
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    for title, section in added(results):
        parts = [part for part in parts if not part.startswith(f"## {title}\n")]
        place = next(n for n, part in enumerate(parts) if part.startswith(f"## {PICTURES}\n"))
        parts.insert(place, f"## {title}\n\n{section}\n\n")
    if _words(out).strip():
        parts[0] = _words(out).strip() + "\n\n"
    write_rows(out / ROWS, found)
    (out / RESULTS).write_text("".join(parts))
    return (
        f"{len(found) - len(old)} rows added, {len(new) - len(found) + len(old)} renewed; "
        f"{same} of {len(both)} adapters have the NLL that they had"
    )


def line_of(row: Row) -> Line:
    return {name: "" if value is None else str(value) for name, value in row.to_dict().items()}


def read_rows(path: Path) -> list[Line]:
    """The lines of a table that ``write_rows`` wrote; those of before there were spans are of all tokens, on bases as they are."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [{"span": "all", "base": "", **line} for line in csv.DictReader(file)]


def merged(old: Iterable[Line], new: Iterable[Line]) -> list[Line]:
    """All lines in the order of the table; of two lines of one setting the new one."""
    lines = {_setting(line): line for line in (*old, *new)}.values()
    return sorted(
        lines, key=lambda line: (ORDER.get(line["dataset"], 9), line["adapter"], int(line["seed"] or 1 << 30))
    )


def _setting(line: Line) -> tuple[str, ...]:
    return tuple(line[name] for name in SETTING)


def write_rows(path: Path, rows: Iterable[Line]) -> None:
    """Every run of the study as a line of a compressed CSV file, the same bytes for the same rows."""
    lines = list(rows)
    columns = (*FIELDS, *sorted(lines[0].keys() - set(FIELDS)))
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        text = io.TextIOWrapper(packed, encoding="utf-8", newline="")
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(lines)
        text.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the folder that bench.quality.run worked in")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    parser.add_argument("--merge", action="store_true", help="add the folder's rows to those that OUT has, which stay")
    parser.add_argument("--check", action="store_true", help="print the bars and write nothing")
    parser.add_argument("--json", action="store_true", help="print the bars as JSON")
    options = parser.parse_args(arguments)
    results = load(options.work)
    if options.merge:
        print(merge(results, options.out))
        return 0
    found = bars(results) if options.check else write(results, options.out)
    if options.json:
        print(json.dumps([{"bar": bar.name, "passed": bar.passed, "detail": bar.detail} for bar in found], indent=1))
    else:
        print("\n".join(map(str, found)))
    return 0 if not options.check or all(bar.passed for bar in found) else 1


if __name__ == "__main__":
    sys.exit(main())
