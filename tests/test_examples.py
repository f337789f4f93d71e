"""Every script in examples/ runs, on a tiny model, and gives what it says."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from small_folders import Folders

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def answers(llama: Folders, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Questions whose answers are several tokens."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [json.loads(line) for line in llama.test.read_text().splitlines()][:4]
    lines = [json.dumps({**row, "choices": [f"{c}{c}{c}" for c in row["choices"]], "label": 0}) for row in rows]
    path.write_text("\n".join(lines))
    return str(path)


def test_classification(llama: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("classification").main(str(llama.adapter), str(llama.test), str(llama.test))
    printed = capsys.readouterr().out
    assert (
        found.sigma > 0 and f"sigma = {found.sigma:.4g}" in printed and printed.count("epistemic") == len(found.labels)
    )


def test_multiple_choice(llama: Folders, answers: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("multiple_choice").main(str(llama.adapter), answers)
    assert capsys.readouterr().out.count("samples:") == 4 and int(found.samples_drawn.max()) <= 30


def test_generation(llama: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = json.loads(llama.test.read_text().splitlines()[0])["prompt"]
    found = example("generation").main(str(llama.adapter), 0.1, prompt)
    assert capsys.readouterr().out.count("\n") == 1 + int(found.lengths[0])


def test_selective_prediction(llama: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    curves = example("selective_prediction").main(str(llama.adapter), str(llama.test))
    assert set(curves) == {"confidence", "total", "aleatoric", "epistemic"} and "AURC" in capsys.readouterr().out


def test_notebook(llama: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["notebook.py", str(llama.adapter), str(llama.test)])
    runpy.run_path(str(EXAMPLES / "notebook.py"))
    assert capsys.readouterr().out.count("accuracy=") == 2


def test_every_example_is_run_here() -> None:
    tested = Path(__file__).read_text()
    assert all(f"def test_{path.stem}(" in tested for path in EXAMPLES.glob("*.py"))
