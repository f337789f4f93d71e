"""The benchmark of the search (``bench/test_search.py``) on a toy: it runs, and its rows reach the summary and the README."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report, summary
from bench import test_search as bench
from bench.rows import by_case, load_if_there
from tfb_ext import search_sigma

pytestmark = pytest.mark.slow

PLACES = list(bench.PLACES)
stops_early = pytest.mark.skipif(
    "early_stop" not in inspect.signature(search_sigma).parameters, reason="search_sigma has no early_stop"
)


@pytest.fixture(scope="module")
def setting() -> bench.Setting:
    return bench.Setting(bench.SMALL, torch.device("cpu"))


def row(setting: bench.Setting, place: str, form: str) -> dict[str, Any]:
    found = setting.search(place, form)
    return setting.facts(place, form, found, [found.seconds])


@pytest.mark.parametrize("place", PLACES)
def test_full_search(setting: bench.Setting, place: str) -> None:
    rule = setting.rule(place)
    made = row(setting, place, "full")
    if place != "linear":
        bench.require_crossing(setting.full(place), rule)
    assert (made["depth"], made["span"]) == (setting.adapter.depth_name(setting.adapter.first), bench.PLACES[place][1])
    assert made["sigma"] == made["sigma_full"]
    assert made["evaluations"] == bench.STEPS or place == "linear"
    assert made["steps_timed"] == len(made["baseline_step_seconds"]) == 2
    low, high = made["spread"]
    assert 0 < low <= made["ratio"] <= high


@stops_early
@pytest.mark.parametrize("place", PLACES)
def test_early_search(setting: bench.Setting, place: str) -> None:
    bench.require_same(setting.search(place, "early"), setting.full(place), setting.rule(place))


def test_theirs_runs_the_adapter_that_ours_runs(setting: bench.Setting) -> None:
    for module in setting.peft.modules():
        if hasattr(module, "lora_B") and "theirs" in module.lora_B:
            assert torch.equal(module.lora_B["ours"].weight, module.lora_B["theirs"].weight)
    assert setting.official.baseline_nll > 0
    assert setting.official.anchors == bench.SMALL.timed_anchors


def test_rows_reach_summary_and_readme(setting: bench.Setting, tmp_path: Path) -> None:
    rows = [row(setting, place, "full") for place in PLACES]
    file = tmp_path / "search.json"
    file.write_text(json.dumps({"benchmarks": [{"name": r["case"], "extra_info": r} for r in rows]}))
    found = summary.summarise([file])
    assert set(found) == {"search_all", "search_quarter", "search_span", "linear_search"}
    assert found["search_all"]["unit"] == "s" and found["search_all"]["value"] == rows[0]["value"]
    lines = report.search_table(by_case(load_if_there(file)))
    assert sum(line.startswith("| ") for line in lines) == 3  # a head and two cases
    assert "2 of its equal steps are timed, on 16 of the anchors" in lines[-1]
    spans = report.span_table(by_case(load_if_there(file)))
    assert sum(line.startswith("| the whole search") for line in spans) == 1
    for table in (report.search_table, report.span_table):
        assert table(by_case(load_if_there(tmp_path / "nowhere.json"))) == []


def test_an_early_search_that_finds_another_sigma_is_refused(setting: bench.Setting) -> None:
    rule, full = setting.rule("all"), setting.full("all")
    with pytest.raises(RuntimeError, match="more than a step"):
        bench.require_same(full, setting.full("quarter"), rule)
    with pytest.raises(RuntimeError, match="no crossing"):
        bench.require_crossing(full, bench.Rule(full.sigma, rule.high, rule.tolerance))
