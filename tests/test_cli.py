"""The command line from end to end on tiny models that lie on disk: what it prints where, what it saves, how it fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_folders
import torch
from small_folders import HERE, Folders, plain

import tfb_ext
from tfb_ext.app.loading import load_adapter
from tfb_ext.data import encode, read_jsonl

pytest.importorskip("typer", reason="the command line needs typer and rich")

from click.testing import Result  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from tfb_ext.app import cli  # noqa: E402
from tfb_ext.app.options import parse_depth, parse_span  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def works(*arguments: object) -> Result:
    """Run a command that must work."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    return result


def document(*arguments: object) -> Any:
    """The one JSON document that ``--json`` prints; nothing else may be on stdout, and no NaN in it."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(works(*arguments, "--json").stdout, parse_constant=refuse)


@pytest.fixture
def fails(tfb: Any) -> Any:
    """Runs ``main()`` with arguments it must refuse, and returns its exit status and what it says on stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        status, out, err = tfb(*arguments)
        assert out == ""
        return status, err

    return run


# Help ---------------------------------------------------------------------------------------------------------------


def test_help_names_commands_and_data_format() -> None:
    said = plain(works("--help").stdout)
    for command in ("demo", "search", "evaluate", "predict", "info"):
        assert f" {command} " in said
    assert '"choices": [" no", " yes"], "label": 1}' in said and "Start with tfb demo" in said


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        (
            "demo",
            [
                "--anchors",
                "--test-items",
                "--samples",
                "--seed",
                "--depth",
                "--span",
                "--out",
                "--save",
                "Downloads two",
            ],
        ),
        (
            "search",
            ["--adapter", "--data", "[required]", "--recipe", "--span", "--save", "--plot", "Example: tfb search"],
        ),
        (
            "evaluate",
            [
                "--adapter",
                "--data",
                "[required]",
                "--sigma",
                "--span",
                "--selective",
                "--ood",
                "--out",
                "Example: tfb evaluate",
            ],
        ),
        ("predict", ["--adapter", "--span", "--text", "--choices", "[required]", "epistemic", "Example: tfb predict"]),
        ("generate", ["--adapter", "--depth", "--span", "--prompt"]),
        ("info", ["adapter", "--json"]),
    ],
)
def test_help_of_a_command(command: str, needed: list[str]) -> None:
    said = plain(works(command, "--help").stdout)
    assert [text for text in needed if text not in said] == []


def test_no_command_shows_the_help() -> None:
    result = CliRunner().invoke(cli.app, [])
    assert "Usage" in result.output and "evaluate" in result.output


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, tfb_ext.app.cli; print(sorted({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


# Search, evaluate, predict ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_search_goes_on_from_its_checkpoint_and_chooses_a_depth(llama: Folders, tmp_path: Path) -> None:
    kept = tmp_path / "search.json"
    common = ("search", "-a", llama.adapter, "-d", llama.anchors, *HERE, "-n", 2, "--checkpoint", kept)
    first = document(*common, "--depth", "all,1", "--bracket", "0.05,0.2", "--steps", 2, "--objective", "minimum")
    assert [d["depth"] for d in first["depths"]] == ["all", 1] and first["depth"] in ("all", 1)
    again = document(*common, "--depth", "all,1", "--bracket", "0.05,0.2", "--steps", 2, "--objective", "minimum")
    assert again["tokens"] == 0 and again["sigma"] == first["sigma"] and again["evaluations"] == first["evaluations"]


def test_search_then_evaluate_and_predict_with_the_saved_sigma(llama: Folders, tmp_path: Path) -> None:
    saved, plot, trace = tmp_path / "bayes", tmp_path / "a.png", tmp_path / "trace.json"
    searched = ("search", "-a", llama.adapter, "-d", llama.anchors, *HERE, "-n", 4, "--depth", 2, "--seed", 7)
    found = document(*searched, "--save", saved, "--plot", plot, "--trace", trace)
    assert found["saved"] == str(saved) and found["depth"] == 2 and found["seed"] == 7 and found["anchors"] == 24
    written = json.loads(trace.read_text())
    assert written.pop("records")["evaluations"] and written == {n: v for n, v in found.items() if n != "saved"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    config = json.loads((saved / "tfb_config.json").read_text())
    assert (config["sigma"], config["depth"], config["seed"]) == (found["sigma"], 2, 7)

    model = load_adapter(str(llama.adapter), device="cpu", dtype="float32")
    adapter = tfb_ext.bayesianize(model.model, depth=2, seed=7)
    anchors = encode(read_jsonl(llama.anchors), model.tokenizer)
    assert tfb_ext.search_sigma(adapter, anchors, samples=4, progress=False).sigma == pytest.approx(found["sigma"])
    test = encode(read_jsonl(llama.test), model.tokenizer)

    measured = document("evaluate", "-a", saved, "-d", llama.test, *HERE, "-n", 6)
    for name, samples in (("mean", 0), ("tfb", 6)):
        p = tfb_ext.predict(adapter, test, samples).probabilities
        assert measured[name] == pytest.approx(tfb_ext.evaluate(p, test.labels_tensor()).to_dict(), abs=1e-5)
    assert (measured["sigma"], measured["samples"], measured["depth"], measured["seed"]) == (found["sigma"], 6, 2, 7)
    assert measured["report"] is None

    items = document("predict", "-a", saved, "-d", llama.test, *HERE, "-n", 6, "--limit", 3)
    expected = tfb_ext.predict(adapter, test.select(range(3)), 6)
    assert (items["sigma"], items["samples"], len(items["items"])) == (found["sigma"], 6, 3)
    for i, (item, example) in enumerate(zip(items["items"], read_jsonl(llama.test), strict=False)):
        assert item["prompt"] == example.prompt and list(item["probabilities"]) == small_folders.CHOICES
        assert list(item["probabilities"].values()) == pytest.approx(expected.probabilities[i].tolist(), abs=1e-5)
        assert item["prediction"] == max(item["probabilities"], key=item["probabilities"].get)
        assert item["total"] == pytest.approx(item["aleatoric"] + item["epistemic"], abs=1e-5)
        assert item["standard_error"] == pytest.approx(expected.standard_error[i].tolist(), abs=1e-5)

    override = document("predict", "-a", saved, "-d", llama.test, *HERE, "--sigma", 0.9, "-n", 2, "--limit", 1)
    assert override["sigma"] == pytest.approx(0.9) and override["items"][0]["standard_error"] == [None, None]


@pytest.mark.slow
def test_spans_are_searched_saved_used_and_overridden(llama: Folders, tmp_path: Path) -> None:
    saved, plot = tmp_path / "bayes", tmp_path / "a.png"
    rule = ("--recipe", "paper", "--bracket", "0.05,0.2", "--steps", 2, "-n", 2)
    common = ("search", "-a", llama.adapter, "-d", llama.anchors, *HERE, *rule)
    kept = tmp_path / "search.json"
    found = document(*common, "--depth", "all,2", "--span", "all,answer,3", "--checkpoint", kept, "--plot", plot)
    tried = [(d["depth"], d["span"]) for d in found["depths"]]
    assert tried == [(depth, span) for depth in ("all", 2) for span in ("all", 3, "answer")]
    assert (found["depth"], found["span"]) in tried and plot.read_bytes().startswith(b"\x89PNG")
    said = works(*common, "--depth", "all,2", "--span", "all,answer,3", "--checkpoint", kept).stdout
    assert f"depth {found['depth']}, span {found['span']}" in said and "<- chosen" in said

    found = document(*common, "--span", 1, "--depth", 2, "--save", saved)
    assert found["span"] == "answer" and found["depths"] == []
    config = json.loads((saved / "tfb_config.json").read_text())
    assert (config["span"], config["search"]["span"]) == ("answer", "answer")
    info = document("info", saved)["adapter"]
    assert info["span"] == "answer" and "adapter: span answer" in plain(works("info", saved).stdout)

    model = load_adapter(str(llama.adapter), device="cpu", dtype="float32")
    adapter = tfb_ext.bayesianize(model.model, sigma=found["sigma"], depth=2)
    test = encode(read_jsonl(llama.test), model.tokenizer)
    asks = ("-a", saved, "-d", llama.test, *HERE, "-n", 4)
    for given, span in (((), "answer"), (("--span", 3), 3), (("--span", "all"), "all"), (("--span", 1), "answer")):
        adapter.span = span
        expected = tfb_ext.predict(adapter, test, 4).probabilities
        items = document("predict", *asks, *given)
        assert (items["depth"], items["span"]) == (2, span)
        for item, p in zip(items["items"], expected.tolist(), strict=True):
            assert list(item["probabilities"].values()) == pytest.approx(p, abs=1e-5)
        measured = document("evaluate", *asks, *given)
        assert (measured["depth"], measured["span"]) == (2, span)
        assert measured["tfb"] == pytest.approx(tfb_ext.evaluate(expected, test.labels_tensor()).to_dict(), abs=1e-5)
    out = document("evaluate", *asks, "--span", 3, "--out", tmp_path / "r")["report"]
    assert "span=3" in Path(out).read_text()
    adapter.span = 2
    options = ("-a", saved, "-p", "area man", *HERE, "-n", 4, "--max-new-tokens", 3)
    written = document("generate", *options, "--span", 2)
    expected_text = tfb_ext.generate(adapter, ["area man"], model.tokenizer, 4, max_new_tokens=3, do_sample=False)
    assert (written["depth"], written["span"]) == (2, 2) and written["items"][0]["text"] == expected_text.texts[0]
    scores = expected_text.log_probabilities[0].tolist()
    assert written["items"][0]["log_probabilities"] == pytest.approx(scores, abs=1e-4)


@pytest.mark.slow
def test_tables_for_people(llama: Folders, tmp_path: Path) -> None:
    saved = tmp_path / "bayes"
    result = works(
        "search", "-a", llama.adapter, "-d", llama.anchors, *HERE, "-n", 2, "--recipe", "paper", "--save", saved
    )
    assert result.stdout.startswith("sigma = ") and "five" not in result.stdout and f"saved: {saved}" in result.stdout
    assert "not saved; add --save" in works("search", "-a", llama.adapter, "-d", llama.anchors, *HERE, "-n", 2).stdout
    table = plain(works("evaluate", "-a", saved, "-d", llama.test, *HERE, "-n", 2).stdout)
    assert "10 items" in table and "mean adapter" in table and "TFB, 2 samples" in table and "ECE" in table
    table = plain(works("predict", "-a", saved, "-d", llama.test, *HERE, "-n", 2).stdout)
    assert "10 items, 2 samples" in table and "epistemic" in table and "sarcastic:" in table
    table = plain(works("info", saved).stdout)
    assert f"tfb_ext {tfb_ext.__version__}" in table and "adapter: sigma" in table and "layers" in table


def test_report_of_an_evaluation_holds_everything(llama: Folders, tmp_path: Path) -> None:
    found = document(
        "evaluate", "-a", llama.adapter, "-d", llama.test, *HERE, "--sigma", 0.2, "-n", 2, "--out", tmp_path / "r"
    )
    page = Path(found["report"]).read_text()
    assert found["report"] == str(tmp_path / "r" / "report.html")
    loaded = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>]*)", page)
    assert len(loaded) == 1 and loaded[0].startswith("data:image/png;base64,")
    assert (tmp_path / "r" / "reliability.png").is_file() and str(llama.adapter) in page


@pytest.mark.slow
def test_errors_and_out_of_distribution(llama: Folders, tmp_path: Path) -> None:
    outside = tmp_path / "outside.jsonl"
    items = [{"prompt": f"{'on ' * n}budget", "choices": small_folders.CHOICES} for n in range(1, 8)]
    outside.write_text("".join(json.dumps(i) + "\n" for i in items))
    common = ("evaluate", "-a", llama.adapter, "-d", llama.test, *HERE, "--sigma", 0.2, "-n", 4)
    found = document(*common, "--selective", "--ood", outside, "--out", tmp_path / "r")
    assert found["ood"].pop("data") == str(outside) and "selective" not in document(*common)

    model = load_adapter(str(llama.adapter), device="cpu", dtype="float32")
    adapter = tfb_ext.bayesianize(model.model, sigma=0.2)
    own, other = (encode(read_jsonl(f), model.tokenizer) for f in (llama.test, outside))
    for name, samples in (("mean", 0), ("tfb", 4)):
        p, q = (tfb_ext.predict(adapter, data, samples) for data in (own, other))
        wrong, ours, theirs = p.labels != own.labels_tensor(), *map(tfb_ext.uncertainty.uncertainty_scores, (p, q))
        scores = ["confidence", "total", "aleatoric", *(["epistemic"] if samples else [])]
        assert list(found["selective"][name]) == list(found["ood"][name]) == scores
        for score in scores:
            assert found["selective"][name][score]["aurc"] == pytest.approx(
                tfb_ext.uncertainty.selective(ours[score], wrong).aurc
            )
            expected = tfb_ext.uncertainty.detection(ours[score], theirs[score]).to_dict()
            assert found["ood"][name][score] == pytest.approx(expected, abs=1e-6)
    page = Path(found["report"]).read_text()
    assert page.count("data:image/png;base64,") == 3 and "risk at 90%" in page and "FPR at 95 % TPR" in page
    for picture in ("risk_coverage.png", "out_of_distribution.png"):
        assert (tmp_path / "r" / picture).read_bytes().startswith(b"\x89PNG")
    table = plain(works(*common, "--selective", "--ood", outside).stdout)
    for text in (
        "Selective prediction: 10 items",
        "AURC",
        "Out of distribution: 7 items",
        "FPR at 95 % TPR",
        "epistemic",
    ):
        assert text in table


@pytest.mark.slow
def test_out_of_distribution_with_another_number_of_samples(llama: Folders, tmp_path: Path) -> None:
    """With adaptive sampling the two sets draw differently, and what was not drawn counts for nothing."""
    common = ("evaluate", "-a", llama.adapter, "-d", llama.test, *HERE, "--sigma", 0.05, "-n", 12, "--adaptive", 0.9)
    found = document(*common, "--selective", "--ood", llama.anchors, "--out", tmp_path / "r")
    assert 8 <= found["samples_drawn"] <= 12
    scores = found["ood"]["tfb"]
    assert list(scores) == ["confidence", "total", "aleatoric", "epistemic"]
    assert all(0 <= s["auroc"] <= 1 for s in scores.values())
    assert 0 <= found["selective"]["tfb"]["total"]["aurc"] <= 1


@pytest.mark.slow
def test_selective_without_errors_has_no_auroc(llama: Folders, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in llama.test.read_text().splitlines()][:3]
    common = ("-a", llama.adapter, *HERE, "--sigma", 1e-6, "-n", 2)
    answers = document("predict", *common, "-d", llama.test, "--limit", 3)["items"]
    right = tmp_path / "right.jsonl"
    labelled = [{**line, "label": answer["prediction"]} for line, answer in zip(lines, answers, strict=True)]
    right.write_text("".join(json.dumps(line) + "\n" for line in labelled))
    found = document("evaluate", *common, "-d", right, "--selective")["selective"]["tfb"]["total"]
    assert (found["auroc"], found["aurc"], found["coverage_at_risk"]["0.01"]) == (None, 0, 1)
    assert "n/a" in works("evaluate", *common, "-d", right, "--selective").stdout


def test_out_of_distribution_items_must_have_the_datas_choices(llama: Folders, tmp_path: Path, fails: Any) -> None:
    other, empty = tmp_path / "other.jsonl", tmp_path / "empty.jsonl"
    other.write_text(json.dumps({"prompt": "area", "choices": [" yes", " no"]}) + "\n")
    empty.write_text("\n")
    cases = [
        (other, "other.jsonl: item 0 has the choices [' yes', ' no'], --data has [' no', ' yes']; expected the same"),
        (empty, "empty.jsonl: no examples in it"),
        (tmp_path / "gone.jsonl", "gone.jsonl does not exist"),
    ]
    for file, sentence in cases:
        status, said = fails(
            "evaluate", "-a", llama.adapter, "-d", llama.test, *HERE, "--sigma", 0.1, "--ood", file, "--selective"
        )
        assert status == 1 and sentence in plain(said)


def test_one_text(llama: Folders) -> None:
    options = ("-a", llama.adapter, *HERE, "--sigma", 0.2, "-n", 4, "--choices", " no| yes")
    found = document("predict", *options, "-t", "senate votes on budget sarcastic:")
    (item,) = found["items"]
    assert item["prompt"].startswith("senate") and sum(item["probabilities"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_adaptive_samples(llama: Folders) -> None:
    common = ("-a", llama.adapter, "-d", llama.test, *HERE, "--sigma", 0.1, "-n", 14, "--adaptive", 0.9)
    items = document("predict", *common)["items"]
    drawn = [item["samples_drawn"] for item in items]
    assert min(drawn) == 8 and max(drawn) <= 14
    assert document("evaluate", *common)["samples_drawn"] == pytest.approx(sum(drawn) / len(drawn))
    said = f"{sum(drawn) / len(drawn):.1f} of 14 samples"
    assert said in plain(works("predict", *common).stdout) and f"TFB, {said}" in plain(
        works("evaluate", *common).stdout
    )


@pytest.mark.slow
def test_choices_of_several_tokens(llama: Folders, tmp_path: Path) -> None:
    file, saved = tmp_path / "long.jsonl", tmp_path / "bayes"
    choices = [" no", " yes", " area man", " wins on budget"]
    lines = [json.loads(line) for line in (llama.anchors.read_text() + llama.test.read_text()).splitlines()]
    file.write_text("".join(json.dumps({**x, "choices": choices, "label": i % 4}) + "\n" for i, x in enumerate(lines)))
    model = load_adapter(str(llama.adapter), device="cpu", dtype="float32")
    adapter = tfb_ext.bayesianize(model.model)
    anchors = {
        by_length: encode(read_jsonl(file), model.tokenizer, score="sequence", by_length=by_length)
        for by_length in (False, True)
    }
    search = ("search", "-a", llama.adapter, "-d", file, *HERE, "-n", 4, "--score", "sequence", "--recipe", "paper")
    found = document(*search, "--tolerance", 0.05, "--save", saved)
    expected = tfb_ext.search_sigma(adapter, anchors[False], samples=4, recipe="paper", tolerance=0.05, progress=False)
    assert found["sigma"] == expected.sigma and found["anchors"] == 34 and found["labelled"]
    common = ("-a", saved, "-d", file, *HERE, "-n", 12, "--sigma", 0.3)
    for options, data in (
        (("--score", "sequence"), anchors[False]),
        (("--score", "sequence", "--by-length"), anchors[True]),
        (("--score", "token"), replace(anchors[False], score="token")),
        (("--score", "sequence", "--by-length", "--adaptive", 0.9), anchors[True]),
    ):
        p = tfb_ext.predict(adapter, data, 12, sigma=0.3, adaptive=0.9 if "--adaptive" in options else None)
        items = document("predict", *common, *options)["items"]
        assert [list(item["probabilities"]) for item in items] == [choices] * 34
        got = torch.tensor([list(item["probabilities"].values()) for item in items])
        assert torch.allclose(got, p.probabilities, atol=1e-5)
        assert [item["samples_drawn"] for item in items] == p.samples_drawn.tolist()
        assert {item["epistemic"] is None for item in items} == {"token" in options}
        measured = document("evaluate", *common, *options, "--selective", "--ood", file)
        wanted = tfb_ext.evaluate(p.probabilities, data.labels_tensor()).to_dict()
        assert measured["tfb"] == pytest.approx(wanted, abs=1e-5)
        assert ("epistemic" in measured["selective"]["tfb"]) == ("token" not in options)
    assert "n/a" in works("predict", *common, "--score", "token").stdout
    one = document(
        "predict", "-a", saved, *HERE, "-t", "area man", "--choices", "|".join(choices), "--score", "sequence"
    )
    assert list(one["items"][0]["probabilities"]) == choices


def test_scores_that_cannot_be(llama: Folders, classifier: Folders, fails: Any) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--score", "mean"), "'mean' is not one of 'sequence', 'token'"),
        (("--by-length",), "--by-length: needs --score sequence or --score token"),
        (("--score", "token", "--adaptive", 0.9), "--adaptive: does not go with --score token"),
    ]
    common = ("-d", llama.test, *HERE, "--sigma", 0.1)
    for options, sentence in cases:
        status, said = fails("predict", "-a", llama.adapter, *common, *options)
        assert status == 2 and sentence in plain(said), said
    status, said = fails("search", "-a", classifier.adapter, "-d", classifier.anchors, *HERE, "--score", "token")
    assert status == 2 and "'token' with a classification head, whose classes are no tokens; leave it out" in plain(
        said
    )


@pytest.mark.slow
def test_classifier(classifier: Folders, tmp_path: Path) -> None:
    common = ("-a", classifier.adapter, *HERE, "-n", 4)
    found = document("search", *common, "-d", classifier.anchors, "--save", tmp_path / "bayes")
    assert found["labelled"] and found["sigma"] > 0
    items = document("predict", "-a", tmp_path / "bayes", *HERE, "-d", classifier.test)["items"]
    assert list(items[0]["probabilities"]) == ["bad", "fair", "good"] and len(items) == 10


@pytest.mark.slow
def test_data_sets(llama: Folders, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets need the package datasets")
    rows = [json.loads(line) for line in llama.test.read_text().splitlines()]
    columns = {
        "headline": [r["prompt"].removesuffix("sarcastic:").strip() for r in rows],
        "gold": [r["label"] for r in rows],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "rows")
    common = ("evaluate", "-a", llama.adapter, *HERE, "--sigma", 0.2, "-n", 4)
    named = ("--prompt", "{headline} sarcastic:", "--label", "gold", "--choices", " no| yes")
    from_disk = document(*common, "-d", tmp_path / "rows", *named)
    from_file = document(*common, "-d", llama.test)
    assert from_disk == from_file and from_disk["tfb"]["items"] == 10
    unlabelled = ("--prompt", "headline", "--choices", " no| yes", "--split", "train")
    found = document("search", "-a", llama.adapter, *HERE, "-n", 2, "-d", tmp_path / "rows", *unlabelled)
    assert not found["labelled"] and found["metric"] == "flips"


# Info ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_info_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tfb_ext", "info", "--json"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["tfb_ext"] == tfb_ext.__version__ and found["versions"]["torch"] == torch.__version__
    assert found["extension"] == tfb_ext.ops.build_info()
    assert len(found["devices"]["cuda"]) == torch.cuda.device_count()


@pytest.mark.slow
def test_missing_extension_is_one_sentence() -> None:
    code = "import sys; sys.modules['tfb_ext._C'] = None; sys.argv = ['tfb', 'info']\nfrom tfb_ext.app.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert "pip install --no-build-isolation -e ." in plain(done.stderr)


# Failures -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_errors_are_one_sentence(llama: Folders, tmp_path: Path, fails: Any) -> None:
    bad_label, two_tokens = tmp_path / "label.jsonl", tmp_path / "tokens.jsonl"
    bad_label.write_text(json.dumps({"prompt": "area", "choices": small_folders.CHOICES, "label": "maybe"}) + "\n")
    two_tokens.write_text(json.dumps({"prompt": "area", "choices": [" no", " yes man"]}) + "\n")
    good = ("-a", llama.adapter, *HERE)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("search", "-a", tmp_path / "nowhere", "-d", llama.anchors), "nowhere holds no adapter_config.json"),
        (("search", *good, "-d", tmp_path / "gone.jsonl"), "gone.jsonl does not exist"),
        (
            ("evaluate", *good, "-d", llama.test),
            "no saved sigma; run `tfb search ... --save FOLDER` first, or pass --sigma",
        ),
        (("predict", *good, "-d", llama.test), "no saved sigma"),
        (("predict", *good, "-d", llama.test, "--depth", 9), "depth is 9, expected 1 to 4 blocks"),
        (("predict", *good, "-d", llama.test, "--sigma", -1), "sigma is -1.0, expected a finite number above 0"),
        (("predict", *good, "-d", llama.test, "--sigma", 0.1, "-n", -3), "samples is -3"),
        (("search", *good, "-d", llama.anchors, "--seed", -1), "seed must be an integer in [0, 2**64), got -1"),
        (
            ("search", *good, "-d", bad_label),
            "label.jsonl:1: label: got 'maybe', expected one of the choices [' no', ' yes']",
        ),
        (("search", *good, "-d", two_tokens), "choice ' yes man' after the prompt of example 0: got 2 tokens"),
        (
            ("search", *good, "-d", llama.anchors, "--recipe", "fast"),
            "recipe is 'fast', expected one of 'auto', 'paper'",
        ),
        (("search", *good, "-d", llama.anchors, "--base", tmp_path / "nowhere"), "nowhere"),
        (("search", "-a", llama.adapter, "-d", llama.anchors, "--device", "gpu"), "device 'gpu', expected auto, cpu"),
        (("search", "-a", llama.adapter, "-d", llama.anchors, "--dtype", "int8"), "dtype 'int8', expected auto"),
        (
            ("predict", *good, "-t", "area", "--choices", " no", "--sigma", 1),
            "choices: got [' no'], expected at least two",
        ),
        (("info", tmp_path / "nowhere"), "tfb_config.json does not exist: this adapter has no saved posterior"),
    ]
    for arguments, sentence in cases:
        status, said = fails(*arguments)
        assert status == 1 and said.count("error:") == 1 and sentence in plain(said), (arguments, said)


def test_unlabelled_data_cannot_be_evaluated(llama: Folders, tmp_path: Path, fails: Any) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"prompt": "area", "choices": small_folders.CHOICES}) + "\n")
    status, said = fails("evaluate", "-a", llama.adapter, *HERE, "-d", data, "--sigma", 0.1)
    assert status == 1 and "1 of 1 items have no label" in said


def test_wrong_usage_names_the_option(llama: Folders, fails: Any) -> None:
    good = ("-a", llama.adapter, *HERE)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("search", "-a", llama.adapter), "--data"),
        (("predict", *good), "give either --data or --text"),
        (("predict", *good, "-t", "area"), "--text needs --choices"),
        (
            ("predict", *good, "-t", "area", "--choices", " no| yes", "--depth", "deep"),
            "'deep', expected a number of blocks",
        ),
        *(
            (
                ("predict", *good, "-t", "area", "--choices", " no| yes", "--span", span),
                f"'{span}', expected a number of last",
            )
            for span in ("last", "1.5", "", "head", "0.5", "nan", "all,4")
        ),
        *(
            (
                ("search", *good, "-d", llama.anchors, "--span", span),
                "expected a number of last tokens, 'all' or 'answer'",
            )
            for span in ("all,,4", "answer,0.5", ",", "all;4")
        ),
        (("generate", *good, "-p", "area", "--span", "deep"), "'deep', expected a number of last tokens"),
        (("evaluate", *good, "-d", llama.test, "--span", "deep"), "'deep', expected a number of last tokens"),
        (("demo", "--span", "deep"), "'deep', expected a number of last tokens"),
        (("search", *good, "-d", llama.anchors, "--limit", 0), "Invalid value for '--limit'"),
        (("search", *good, "-d", llama.root), "a data set needs --prompt"),
    ]
    for arguments, sentence in cases:
        status, said = fails(*arguments)
        assert status == 2 and sentence in plain(said), (arguments, said)


def test_out_of_memory_is_one_sentence_too(llama: Folders, monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
    def full(*_: object) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("tfb_ext.forward.engine.run", full)
    common = ("predict", "-a", llama.adapter, *HERE, "-d", llama.test, "--sigma", 0.1)
    status, said = fails(*common)
    assert status == 1 and "does not fit into memory; free some, shorten the rows" in plain(said)


def test_debugging_shows_the_traceback(llama: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tfb", "predict", "-a", str(llama.adapter), "-d", "gone.jsonl"])
    monkeypatch.setenv("TFB_EXT_DEBUG", "1")
    with pytest.raises(ValueError, match=r"gone\.jsonl does not exist"):
        cli.main()


@pytest.mark.parametrize(("text", "depth"), [("all", "all"), ("head", "head"), ("3", 3), ("0.5", 0.5)])
def test_depths(text: str, depth: object) -> None:
    found = parse_depth(text)
    assert found == depth and type(found) is type(depth)


@pytest.mark.parametrize(("text", "span"), [("all", "all"), ("answer", "answer"), ("3", 3), ("1", 1)])
def test_spans(text: str, span: object) -> None:
    found = parse_span(text)
    assert found == span and type(found) is type(span)


@pytest.mark.parametrize("span", [0, -1, 2**31])
def test_a_span_outside_any_row_is_refused(span: int, llama: Folders, fails: Any) -> None:
    for command in (("search", "-d", llama.anchors), ("predict", "-d", llama.test, "--sigma", 0.1)):
        status, said = fails(*command, "-a", llama.adapter, *HERE, "--span", span)
        assert status == 1 and f"span is {span}, expected 'all', 'answer' or a number of last tokens" in plain(said)
