"""The benchmark of spans (``bench/test_span.py``, and the cases of generation) on a toy: it runs, its checks see faults, and its rows
reach the summary, the page and the plot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import check, report, summary
from bench import test_span as bench
from bench.llama import TINY, token_ids
from bench.plots import draw_spans
from bench.record import ROOT
from bench.rows import by_case, load
from tfb_ext.adapters.adapter import BayesianAdapter
from tfb_ext.data import Encoded

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def test_the_cases_run_and_reach_the_page(tmp_path: Path) -> None:
    file = tmp_path / "span.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={file}", "-k", "span"]
    settings = {
        "TFB_BENCH_TINY": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    # pytest-benchmark times nothing in what it takes for a worker of pytest-xdist.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "bench/test_span.py", "bench/test_generate.py"],
        cwd=ROOT, env=inherited | settings, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    rows = by_case(load(file))
    searches = {"search_span", "search_span_early"}
    named = {case for _, case in report.SPANS} - searches
    assert named <= set(rows) and {"sweep_span_1", "sweep_span_8"} <= set(rows)
    assert set(summary.summarise([file])) == named - {"span_128_rows"}
    assert {row.get("span", "answer") for case, row in rows.items() if case != "span_128_rows"} == {"answer"}
    lines = report.span_table(rows)
    assert sum(line.startswith("| ") for line in lines) == 1 + len(named)
    in_short = [row for row in report.SPANS if row[1] in report.SPANS_IN_SHORT]
    page = report.short_table(rows, in_short, "span.json").splitlines()
    assert sum(line.startswith("| ") for line in page) == 1 + len(set(report.SPANS_IN_SHORT) - searches)
    draw_spans(rows, tmp_path / "span.svg")
    assert (tmp_path / "span.svg").read_text().count("<path") > 20


def test_samples_of_another_span_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise at every token is not that of the last token alone, and no noise is neither."""
    check.check_fused(TINY, "all", CPU, span="answer").require()
    real = BayesianAdapter.predictive

    def everywhere(self: Any, *args: Any, span: Any = None, **kwargs: Any) -> Any:
        return real(self, *args, span="all", **kwargs)

    def nowhere(self: Any, samples: int, *args: Any, **kwargs: Any) -> Any:
        return real(self, samples, 1e-9, **kwargs)

    for fault in (everywhere, nowhere):
        monkeypatch.setattr(BayesianAdapter, "predictive", fault)
        with pytest.raises(RuntimeError, match="the forward is wrong"):
            check.check_fused(TINY, "all", CPU, span="answer").require()


def test_choices_of_another_prompt_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(TINY, 1, CPU).tolist()
    data = Encoded(ids, [None] * len(ids), None, ("a", "b", "c", "d"), pad_id=0, choice_tokens=bench.CHOICES)
    check.check_choices(TINY, "all", CPU, data).require()
    real = check.Scorer.mean
    monkeypatch.setattr(check.Scorer, "mean", lambda self, batch: real(self, batch).roll(1, dims=0))
    with pytest.raises(RuntimeError, match="the forward is wrong"):
        check.check_choices(TINY, "all", CPU, data).require()
