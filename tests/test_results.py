"""The figures that the project shows are those of its measurements."""

from __future__ import annotations

import json

import pytest

from bench import report, summary
from bench.plots import draw
from bench.record import ROOT
from bench.rows import by_case, load

RESULTS = ROOT / "bench" / "results"
FILES = [
    RESULTS / f"{name}.json"
    for name in ("models", "kernels", "kernels_cpu", "search", "generate", "span", "linear", "quantised")
]
FILES = [
    file for file in FILES if file.exists() or file.stem not in ("generate", "span", "linear", "quantised")
]  # these cases take a run of their own
ADAPTIVE = RESULTS / "adaptive.json"


def test_pages_show_the_results() -> None:
    for page, text in report.pages(RESULTS).items():
        assert page.read_text() == text, "run python -m bench.report"


def test_summary_is_that_of_the_results() -> None:
    made = summary.summarise([*FILES, ADAPTIVE])
    assert made == json.loads((RESULTS / "summary.json").read_text())


def test_every_row_says_where_it_is_from() -> None:
    for file in FILES:
        for row in load(file):
            assert row["device"] and len(row["commit"]) == 40 and row["torch"], row["case"]


@pytest.mark.slow
def test_plots_come_from_the_results(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    models = by_case(load(RESULTS / "models.json"))
    draw(models, load(RESULTS / "kernels.json"), tmp_path / "speed.svg")
    assert (tmp_path / "speed.svg").read_text().count("<path") > 100
