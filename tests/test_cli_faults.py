"""The command line with odd text, bad targets and broken files: text is shown as it is, results are never lost, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_folders
import torch
import zoo
from small_folders import HERE, Folders, plain

import tfb_ext

pytest.importorskip("typer", reason="the command line needs typer and rich")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from rich.console import Console  # noqa: E402

from tfb_ext.app import terminal  # noqa: E402
from tfb_ext.app.pages import Table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, str, str]]


def asks(folders: Folders, *more: object, command: str = "predict") -> tuple[object, ...]:
    return (command, "-a", folders.adapter, *HERE, "-n", 2, "--sigma", 0.1, *more)


# Text is shown as it is -----------------------------------------------------------------------------------------------

ODD = ["[INST] area [/INST]", "[man]", "[/man]", ":warning: area", "[bold]area[/bold]", "area\\[red]", "[link=x]y"]


@pytest.mark.parametrize("text", zoo.slow_but(ODD, ODD[0]))
def test_odd_text_in_tables(text: str, llama: Folders, tfb: Run) -> None:
    status, out, _ = tfb(*asks(llama, "-t", text, "--choices", " no| yes"))
    assert status == 0 and text in out


@pytest.mark.slow
def test_odd_names_of_files(llama: Folders, tfb: Run, tmp_path: Path) -> None:
    file = tmp_path / "[man]:warning:[/x].jsonl".replace("/", "")
    choices = [" no", " yes"]
    lines = [{"prompt": text, "choices": choices, "label": i % 2} for i, text in enumerate(ODD)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, _ = tfb(
        *asks(llama, "-d", file, "--ood", file, "--out", tmp_path / "[r]:warning:", command="evaluate")
    )
    assert status == 0 and "".join(out.split()).count(file.name) == 2  # in two titles, which are broken into lines
    assert f"report: {tmp_path / '[r]:warning:' / 'report.html'}" in out


@pytest.mark.slow
def test_odd_text_of_choices_and_errors(llama: Folders, tfb: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama.base, base)
    tokenizer = small_folders.tokenizer()
    tokenizer.add_tokens(["[man]", ":warning:"])
    tokenizer.save_pretrained(base)
    status, out, _ = tfb(*asks(llama, "-t", "area", "--choices", "[man]|:warning:", "--base", base))
    assert status == 0 and ("[man]" in out or ":warning:" in out)
    for name in ODD:
        status, _, err = tfb("info", tmp_path / name.replace("/", "_"))
        assert status == 1 and name.replace("/", "_") in err
        status, _, err = tfb(*asks(llama, "-t", "area", "--choices", " no| yes", "--depth", name))
        assert status == 2 and name.replace("\\", "\\\\") in plain(err)


def test_control_characters_are_spelt_out(llama: Folders, tfb: Run, tmp_path: Path) -> None:
    evil = "area \x1b]0;title\x07\x1b[2J man\x9b31m \u202egnp.exe\x08"
    status, out, _ = tfb(*asks(llama, "-t", evil, "--choices", " no| yes"))
    assert status == 0 and not {"\x1b", "\x07", "\x9b", "\x08", "\u202e"} & set(out) and "\\x1b]0;title\\x07" in out
    status, out, err = tfb("info", tmp_path / "a\x1b[31mb")
    assert status == 1 and "\x1b" not in err and "\\x1b[31mb" in err


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_printed_as_it_is(text: str) -> None:
    import io

    out = io.StringIO()
    terminal.say(text, Console(file=out, width=10_000))
    shown = out.getvalue()
    assert shown.rstrip("\n") == terminal.visible(text).rstrip("\n") or "\t" in text
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in shown)
    terminal.show_table(Table(text, ("a", "b"), [(text, text)]), Console(file=out, width=10_000))


# Targets and side outputs ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> Any:
        raise AssertionError("the model was loaded before the targets were looked at")

    monkeypatch.setattr("tfb_ext.app.loading.load_adapter", load)


def test_targets_are_looked_at_before_the_work(llama: Folders, tfb: Run, tmp_path: Path, no_loading: None) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full" / "adapter_model.safetensors").mkdir(parents=True)
    search = ("search", "-a", llama.adapter, "-d", llama.anchors, *HERE)
    cases = [
        (search, "--plot", tmp_path, "is a folder, expected a file"),
        (search, "--trace", tmp_path / "file" / "x", "expected a folder there"),
        (search, "--save", tmp_path / "file", "is a file, expected a folder"),
        (search, "--save", tmp_path / "full", "is a folder, expected a file"),
        (search, "--checkpoint", tmp_path, "is a folder, expected a file"),
        (search, "--checkpoint", "/dev/null", "is no regular file"),
        (search, "--trace", llama.anchors, "is --data too, expected a file of its own"),
        (asks(llama, "-d", llama.test, command="evaluate"), "--out", tmp_path / "file", "is a file, expected a folder"),
        (asks(llama, "-p", "area", command="generate"), "--html", tmp_path, "is a folder, expected a file"),
        (("demo", "--no-report"), "--save", tmp_path, "is a folder, expected a file"),
        (("demo",), "--out", tmp_path / "file", "is a file, expected a folder"),
    ]
    for command, option, path, words in cases:
        status, out, err = tfb(*command, option, path)
        assert status == 2 and out == "" and option in err and words in plain(err), (option, err)
    both = tmp_path / "both"
    status, _, err = tfb(*search, "--plot", both, "--trace", both)
    assert status == 2 and "is --plot too" in plain(err) and not both.exists()


@pytest.mark.slow
@pytest.mark.parametrize("as_json", zoo.slow_but([False, True], False))
def test_a_failed_side_output_hides_nothing(
    as_json: bool, llama: Folders, tfb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--json",) if as_json else ()
    search = ("search", "-a", llama.adapter, "-d", llama.anchors, *HERE, "-n", 2, "--recipe", "paper", *more)
    saved = tmp_path / "bayes"
    status, out, err = tfb(*search, "--trace", "/dev/full", "--plot", tmp_path / "a.png", "--save", saved)
    assert status == 1 and "error: --trace: [Errno 28] No space left on device: '/dev/full'" in err
    found = tfb_ext.load(tfb_ext.app.loading.load_adapter(str(llama.adapter), None, "cpu", "float32").model, saved)
    sigma = json.loads(out)["sigma"] if as_json else float(out.split()[2])
    assert found.sigma == pytest.approx(sigma, rel=1e-3) and (tmp_path / "a.png").stat().st_size > 1000

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("tfb_ext.adapters.adapter.BayesianAdapter.save_pretrained", fail)
    status, out, err = tfb(*search, "--save", tmp_path / "other")
    assert status == 1 and "error: --save: [Errno 28]" in err and not (tmp_path / "other").exists()
    assert json.loads(out)["saved"] is None if as_json else out.startswith("sigma = ")
    monkeypatch.setattr("tfb_ext.app.evaluation.html_report", fail)
    status, out, err = tfb(*asks(llama, "-d", llama.test, "--out", tmp_path / "r", *more, command="evaluate"))
    assert status == 1 and "error: --out: " in err
    assert json.loads(out)["report"] is None if as_json else "mean adapter" in out
    status, out, err = tfb(
        *asks(llama, "-p", "area", "--max-new-tokens", 2, "--html", "/dev/full", *more, command="generate")
    )
    assert status == 1 and "error: --html: " in err
    assert json.loads(out)["items"] if as_json else "epistemic uncertainty" in out


def command(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tfb_ext", *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, **options
    )


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_lose_what_is_saved(llama: Folders, tmp_path: Path) -> None:
    search = ("search", "-a", llama.adapter, "-d", llama.anchors, *HERE, "-n", 2, "--recipe", "paper")
    read, write = os.pipe()
    os.close(read)
    process = command(*search, "--save", tmp_path / "bayes", stdout=write)
    os.close(write)
    err = process.communicate(timeout=200)[1].decode()
    assert process.returncode == 1 and "Traceback" not in err and "Exception ignored" not in err
    assert (tmp_path / "bayes" / "tfb_config.json").is_file()


@pytest.mark.slow
def test_a_full_or_closed_standard_output(llama: Folders) -> None:
    with open("/dev/full", "wb") as full:
        process = command("info", "--json", stdout=full)
        err = process.communicate(timeout=200)[1].decode()
    assert process.returncode == 1 and "Traceback" not in err and "Exception ignored" not in err
    assert "No space left on device" in err


@pytest.mark.slow
def test_terminals_without_utf8(llama: Folders) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    text = "senate votes on budget – " * 4
    ask = asks(llama, "-t", text, "--choices", " no| yes")
    process = command(*ask, stdout=subprocess.PIPE, env=environment)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert b"senate votes on budget \\u2013" in out


# Values ---------------------------------------------------------------------------------------------------------------


def test_numbers_that_cannot_be(llama: Folders, tfb: Run, no_loading: None) -> None:
    text = ("-t", "area", "--choices", " no| yes")
    predict = ("predict", "-a", llama.adapter, *HERE, *text)
    generate = ("generate", "-a", llama.adapter, *HERE, "-p", "area", "--sigma", 0.1)
    cases: list[tuple[tuple[object, ...], str]] = [
        *(((*predict, "--sigma", s), "sigma is") for s in ("1e39", "1e-60", "0", "-1", "nan", "inf", "1e999")),
        *(((*predict, "--sigma", 0.1, "-n", n), "samples is") for n in (2147483648, 10**30, -3, 65537)),
        (
            ("search", "-a", llama.adapter, "-d", llama.anchors, "-n", 2147483648),
            "samples is 2147483648, expected",
        ),
        (("evaluate", "-a", llama.adapter, "-d", llama.test, "-n", 2147483648), "samples is"),
        (("demo", "-n", 2147483648), "samples is"),
        (("demo", "--search-samples", 2147483648), "samples is"),
        ((*generate, "-n", 2147483648), "samples is"),
        ((*generate, "--max-new-tokens", 2147483648), "max_new_tokens is 2147483648, expected a count from 1 to"),
        ((*generate, "--max-new-tokens", 0), "max_new_tokens is 0"),
        ((*generate, "--temperature", "nan"), "temperature is nan, expected a finite number above 0"),
        ((*generate, "--top-p", "inf"), "top_p is inf, expected a finite number above 0"),
        ((*generate, "--top-p", 2), "top_p is 2.0, expected a probability above 0 and at most 1"),
        *(
            (
                ("search", "-a", llama.adapter, "-d", llama.anchors, option, ""),
                "'' is no name, expected a file or folder",
            )
            for option in ("--save", "--plot", "--trace", "--checkpoint")
        ),
        (("evaluate", "-a", llama.adapter, "-d", llama.test, "--out", ""), "'' is no name"),
        ((*generate, "--html", ""), "'' is no name"),
        (("demo", "--out", ""), "'' is no name"),
        (("demo", "--save", ""), "'' is no name"),
        (("search", "-a", llama.adapter, "-d", llama.anchors, "--bracket", "a"), "expected LOW,HIGH"),
        (("search", "-a", llama.adapter, "-d", llama.anchors, "--depth", "all,,1"), "expected a number of blocks"),
        ((*predict[:-4], "-t", "area \udcff", "--choices", "a|b"), "is no UTF-8"),
    ]
    for arguments, words in cases:
        status, out, err = tfb(*arguments)
        assert status in (1, 2) and out == "" and words in plain(err), (arguments, err)


@pytest.mark.slow
def test_values_that_are_found_later(llama: Folders, tfb: Run, tmp_path: Path) -> None:
    search = ("search", "-a", llama.adapter, "-d", llama.anchors, "--dtype", "float32", "-n", 2)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*search, "--device", "mps"), "device 'mps', expected auto, cpu, cuda"),
        ((*search, "--device", "meta"), "device 'meta', expected auto, cpu, cuda"),
        (
            (*search, "--device", "cpu", "--steps", 2147483648),
            "steps is 2147483648, expected an integer from 2 to 1000",
        ),
        ((*search, "--device", "cpu", "--bracket", "1e-60,1e39"), "sigma is 1e-60, expected"),
        ((*search, "--device", "cpu", "--limit", 0), "Invalid value for '--limit'"),
        (asks(llama, "-t", "area", "--choices", "yes"), "expected at least two"),
        (asks(llama, "-t", "area", "--choices", " no| yes", "--depth", "nan"), "'nan', expected a number of blocks"),
        (asks(llama, "-t", "area", "--choices", " no| yes", "--depth", "1.5"), "depth is 1.5, expected"),
    ]
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    cases.append(((*search, "--device", "cpu", "--checkpoint", deep), "is nested too deeply"))
    for name, content in (
        ("adapter_config.json", "[" * 100_000),
        ("tfb_config.json", "[" * 100_000),
        ("adapter_model.safetensors", "x"),
    ):
        folder = tmp_path / name
        shutil.copytree(llama.adapter, folder)
        (folder / name).write_text(content)
        cases.append((("predict", "-a", folder, *HERE, "-t", "area", "--choices", " no| yes", "--sigma", 1), name))
    for arguments, words in cases:
        status, out, err = tfb(*arguments)
        assert status in (1, 2) and out == "" and words in plain(err), (arguments, err)


def test_json_has_no_nan(llama: Folders, tfb: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tfb_ext import prediction

    whole = prediction.predict

    def unsure(*arguments: Any, **options: Any) -> Any:
        found = whole(*arguments, **options)
        found.standard_error.fill_(float("nan"))
        return found

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    monkeypatch.setattr(prediction, "predict", unsure)
    status, out, _ = tfb(*asks(llama, "-t", "area", "--choices", " no| yes", "--json"))
    (item,) = json.loads(out, parse_constant=refuse)["items"]
    assert status == 0 and item["standard_error"] == [None, None]


def test_whatever_a_library_raises_is_a_sentence(llama: Folders, tfb: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        KeyError("a\nb"),
        TypeError(),
        RecursionError("deep"),
        MemoryError(),
        AssertionError("x"),
        RuntimeError("y"),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("tfb_ext.app.loading.load_adapter", fail)
        status, out, err = tfb(*asks(llama, "-t", "area", "--choices", " no| yes"))
        assert status == 1 and out == "" and err.count("error:") == 1 and len(err.strip().splitlines()) == 1


# Loading, by the command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_tokenizer_of_the_adapters_goes_with_its_posterior(llama: Folders, tfb: Run, tmp_path: Path) -> None:
    from test_loading_heads import with_tokens

    folder, _ = with_tokens(llama, tmp_path / "adapter", "embeddings saved")
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"area <new{i}>", "choices": ["<new1>", "<new2>"], "label": i % 2} for i in range(8)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, err = tfb("search", "-a", folder, "-d", data, *HERE, "-n", 2, "--save", tmp_path / "bayes")
    assert status == 0, err
    status, out, err = tfb("predict", "-a", tmp_path / "bayes", "-d", data, *HERE, "-n", 2, "--json")
    assert status == 0, err
    assert list(json.loads(out)["items"][0]["probabilities"]) == ["<new1>", "<new2>"]
    assert not [p for p in tmp_path.rglob(".tfb-*")]


def test_a_classifier_without_a_task_type(classifier: Folders, tfb: Run, tmp_path: Path) -> None:
    from peft import AutoPeftModel
    from test_loading_heads import auto_mapped

    folder = auto_mapped(classifier, tmp_path / "adapter")
    ask = ("predict", "-a", folder, *HERE, "-n", 0, "-t", "area man", "--choices", "bad|fair|good", "--json")
    status, out, err = tfb(*ask)
    assert status == 0, err
    with torch.no_grad():
        ids = torch.tensor([small_folders.tokenizer()("area man")["input_ids"]])
        expected = AutoPeftModel.from_pretrained(folder).eval()(ids).logits.softmax(-1)[0]
    found = torch.tensor(list(json.loads(out)["items"][0]["probabilities"].values()))
    assert torch.allclose(found, expected, atol=1e-5)
