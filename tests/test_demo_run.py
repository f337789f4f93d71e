"""The demonstration on a tiny model and made-up headlines: its order, its rows, its report, its command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_folders
import torch

import tfb_ext
from tfb_ext.app.demo import run
from tfb_ext.app.demo.run import DemoOptions, result_table, run_demo, write_report
from tfb_ext.app.loading import Loaded, load_adapter
from tfb_ext.data import Example, encode, read_jsonl

FOUR = {"accuracy", "ece", "nll", "brier"}
KEYS = {"adapter", "seed", "depth", "span", "sigma", "test_items", "mean", "tfb", "seconds", "device"}
OPTIONS = DemoOptions(anchors=16, test_items=8, samples=4, search_samples=2, linear=False)


class Stage:
    """The demonstration's model and headlines replaced by small ones; keeps what was asked for and in which order."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders = small_folders.write(root)
        self.asked: list[tuple[str, Any]] = []
        searching = run.search_sigma
        monkeypatch.setattr(run, "load_adapter", self.load)
        monkeypatch.setattr(run, "load_split", self.split)
        monkeypatch.setattr(run, "search_sigma", lambda *a, **k: self.noted("search", searching(*a, **k)))

    def noted(self, what: str, value: Any) -> Any:
        self.asked.append((what, value))
        return value

    def load(self, name: str, device: str = "auto", dtype: str = "auto") -> Loaded:
        self.asked.append(("load", name))
        return load_adapter(str(self.folders.adapter), device="cpu", dtype="float32")

    def split(self, name: str, limit: int | None) -> list[Example]:
        self.asked.append((name, limit))
        return read_jsonl({"anchor": self.folders.anchors, "test": self.folders.test}[name])[:limit]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(tmp_path / "stage", monkeypatch)


@pytest.mark.slow
def test_rows(stage: Stage) -> None:
    said: list[str] = []
    runs = run_demo(OPTIONS, said.append, progress=False)
    assert [r.depth for r in runs] == ["all", 2]
    for made in runs:
        row = made.to_dict()
        assert set(row) >= KEYS and set(row["mean"]) == set(row["tfb"]) == FOUR
        assert (row["adapter"], row["seed"], row["test_items"], row["anchors"]) == ("demo", 0, 8, 16)
        assert (row["samples"], row["search_samples"]) == (4, 2)
        assert row["sigma"] == made.search.sigma > 0
        assert row["seconds"] == pytest.approx(row["seconds_search"] + row["seconds_predict"], abs=0.002)
        assert row["device"] and json.loads(json.dumps(row)) == row
    assert runs[0].to_dict()["mean"] == runs[1].to_dict()["mean"]
    assert runs[0].to_dict()["tfb"] != runs[1].to_dict()["tfb"]
    assert sum("searching sigma on 16 labelled anchors" in line for line in said) == 2
    assert any("all 4 blocks random" in line for line in said) and any("upper 2 of 4 blocks" in line for line in said)


@pytest.mark.slow
def test_numbers_are_those_of_a_run_by_hand(stage: Stage) -> None:
    (made,) = run_demo(replace(OPTIONS, seeds=(3,), depths=(1,)), lambda text: None, progress=False)
    loaded = stage.load("demo")
    adapter = tfb_ext.bayesianize(loaded.model, depth=1, seed=3)
    anchors, test = (encode(stage.split(n, k), loaded.tokenizer) for n, k in (("anchor", 16), ("test", 8)))
    found = tfb_ext.search_sigma(adapter, anchors, samples=2, progress=False)
    assert made.search.sigma == found.sigma and made.search.evaluations == found.evaluations
    assert made.search.recipe == "auto" and made.search.labelled
    for samples, prediction, metrics in ((0, made.mean, made.mean_metrics), (4, made.tfb, made.tfb_metrics)):
        expected = tfb_ext.predict(adapter, test, samples)
        assert torch.equal(prediction.probabilities, expected.probabilities)
        assert metrics == tfb_ext.evaluate(expected.probabilities, test.labels_tensor())


@pytest.mark.slow
def test_test_headlines_are_not_touched_before_every_sigma_is_fixed(stage: Stage) -> None:
    run_demo(replace(OPTIONS, adapters=("one", "two"), seeds=(0, 1)), lambda text: None, progress=False)
    order = [what for what, _ in stage.asked]
    each = ["load", "anchor", *["search"] * 4, "test"]
    assert order == each * 2
    assert [value for what, value in stage.asked if what == "load"] == ["one", "two"]
    assert {value for what, value in stage.asked if what in ("anchor", "test")} == {16, 8}


@pytest.mark.slow
def test_each_run_predicts_with_its_own_sigma_seed_and_depth(stage: Stage) -> None:
    runs = run_demo(replace(OPTIONS, seeds=(0, 1)), lambda text: None, progress=False)
    assert [(r.seed, r.depth) for r in runs] == [(0, "all"), (0, 2), (1, "all"), (1, 2)]
    for made in runs:
        assert made.tfb.sigma == made.search.sigma and (made.search.seed, made.search.depth) == (made.seed, made.depth)
    assert len({r.tfb.probabilities.sum(0).tolist()[0] for r in runs}) == 4


@pytest.mark.slow
def test_spans_are_searched_and_measured_apart(stage: Stage, tmp_path: Path) -> None:
    said: list[str] = []
    runs = run_demo(replace(OPTIONS, depths=("all",), spans=("all", "answer")), said.append, progress=False)
    assert [(r.depth, r.span, r.search.span) for r in runs] == [("all", "all", "all"), ("all", "answer", "answer")]
    assert [r.to_dict()["span"] for r in runs] == ["all", "answer"]
    loaded = stage.load("demo")
    adapter = tfb_ext.bayesianize(loaded.model, span="answer", sigma=runs[1].search.sigma)
    test = encode(stage.split("test", 8), loaded.tokenizer)
    assert torch.equal(runs[1].tfb.probabilities, tfb_ext.predict(adapter, test, 4).probabilities)
    assert any("all 4 blocks random, span answer" in line for line in said)
    names = [row[0] for row in result_table(runs).rows]
    assert names == ["mean adapter", "TFB, all blocks", "TFB, all blocks, span answer"]
    page = write_report(runs, tmp_path / "out", "tfb demo", 1.0).read_text()
    assert "depth all, span answer, seed 0" in page


def test_once_without_samples(stage: Stage, tmp_path: Path) -> None:
    said: list[str] = []
    runs = run_demo(replace(OPTIONS, depths=(2,), linear=True), said.append, progress=False)
    assert [(r.depth, r.span, r.to_dict()["by"]) for r in runs] == [(2, "all", "samples"), ("all", "answer", "linear")]
    loaded = stage.load("demo")
    adapter = tfb_ext.bayesianize(loaded.model, span="answer")
    anchors, test = (encode(stage.split(n, k), loaded.tokenizer) for n, k in (("anchor", 16), ("test", 8)))
    found = tfb_ext.search_sigma(adapter, anchors, by="linear", progress=False)
    assert found.sigma == runs[1].search.sigma
    assert torch.equal(runs[1].tfb.probabilities, tfb_ext.predict(adapter, test, by="linear").probabilities)
    assert any(line.startswith("no samples on the test headlines") for line in said)
    assert result_table(runs).rows[2][0] == "TFB without samples, all blocks, span answer"
    assert "without samples" in write_report(runs, tmp_path / "out", "tfb demo", 1.0).read_text()


def test_sizes_by_the_device(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "ANCHORS_CPU", 12)
    monkeypatch.setattr(run, "TEST_CPU", 6)
    (made,) = run_demo(
        DemoOptions(depths=("all",), samples=2, search_samples=2, linear=False), lambda text: None, progress=False
    )
    assert made.search.anchors == 12 and len(made.labels) == 6


@pytest.mark.slow
def test_report_holds_everything(stage: Stage, tmp_path: Path) -> None:
    runs = run_demo(OPTIONS, lambda text: None, progress=False)
    path = write_report(runs, tmp_path / "out", "tfb demo", 12.3)
    assert path == tmp_path / "out" / "report.html"
    page = path.read_text()
    loaded = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>]*)", page)
    assert len(loaded) == 4  # reliability and search, for each run
    assert all(source.startswith("data:image/png;base64,") for source in loaded)
    assert not re.search(r"https?://|url\(", page)
    assert "<script" not in page and "<link" not in page and "@import" not in page
    for text in ("tfb demo", "12 s", "mean adapter", "TFB, all blocks", "TFB, upper 2 blocks", runs[0].search.reason):
        assert text in page, text
    assert len(list((tmp_path / "out").glob("*.png"))) == 4


@pytest.mark.slow
def test_table_shows_each_mean_once(stage: Stage) -> None:
    runs = run_demo(replace(OPTIONS, seeds=(0, 1)), lambda text: None, progress=False)
    names = [row[0] for row in result_table(runs).rows]
    assert names[0] == "mean adapter" and len(names) == 5
    assert names[1:3] == ["TFB, all blocks, seed 0", "TFB, upper 2 blocks, seed 0"]
    two = [*runs[:1], replace(runs[1], adapter="other")]
    assert [row[0] for row in result_table(two).rows][2:] == ["mean adapter [other]", "TFB, upper 2 blocks [other]"]
    assert {len(row) for row in result_table(runs).rows} == {7}


@pytest.mark.slow
def test_command(stage: Stage, tmp_path: Path) -> None:
    pytest.importorskip("typer", reason="the command line needs typer and rich")
    from typer.testing import CliRunner

    from tfb_ext.app import cli

    options = [
        "--anchors",
        "16",
        "--test-items",
        "8",
        "-n",
        "4",
        "--search-samples",
        "2",
        "--depth",
        "0.5",
        "--span",
        "2",
    ]
    files = ["--out", str(tmp_path / "out"), "--save", str(tmp_path / "demo.json"), "--json"]
    result = CliRunner().invoke(cli.app, ["demo", *options, *files])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert rows == json.loads((tmp_path / "demo.json").read_text())
    assert [(r["depth"], r["span"], r["by"]) for r in rows] == [(2, 2, "samples"), ("all", "answer", "linear")]
    assert (tmp_path / "out" / "report.html").is_file() and "mean adapter" in result.stderr
