"""A search by linear is arithmetic on the anchors' Gaussian: brute force over its predictions, in one pass, for linear alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import small_folders
import small_sets
import torch
import zoo
from small_folders import HERE, Folders

import tfb_ext
from tfb_ext import predict, search_sigma
from tfb_ext.errors import ConfigError
from tfb_ext.search import Evaluation, SigmaSearch

OPTIONS: dict[str, Any] = {"by": "linear", "progress": False}
SPANS = ["all", "answer"]
MISMATCH = "sigma: got .*, searched by={!r}, expected one searched by={!r}.*Fix: search_sigma"


def prepared(items: int = 24, **options: Any) -> tuple[Any, Any]:
    adapter = zoo.bayesian("llama", **options)
    small_sets.sharpen(adapter, 6.0)
    return adapter, small_sets.labelled(adapter, small_sets.encoded(items), 3)


def assert_evaluation(found: Evaluation, p: torch.Tensor, mean: torch.Tensor, labels: torch.Tensor) -> None:
    """Every metric is that of probabilities (N, C)."""
    p = p.double()
    right = p.gather(1, labels[:, None])[:, 0]
    assert found.nll == pytest.approx(float(-right.log().mean()), abs=1e-5)
    assert found.accuracy == pytest.approx(float((p.argmax(1) == labels).double().mean()))
    assert found.flips == pytest.approx(float((p.argmax(1) != mean.argmax(1)).double().mean()))
    wrong = p - torch.nn.functional.one_hot(labels, p.shape[1])
    assert found.brier == pytest.approx(float(wrong.square().sum(1).mean()), abs=1e-5)
    assert found.entropy == pytest.approx(float(torch.special.entr(p).sum(1).mean()), abs=1e-5)
    assert found.items == len(labels)


# Against brute force ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "depth", "options"),
    [
        ("all", "all", {"batch_size": 5}),
        ("answer", 2, {"metric": "brier", "tolerance": 0.05, "method": "root"}),
        ("all", 1, {"recipe": "paper", "tolerance": 0.02, "bound": "one-sided"}),
        ("answer", "all", {"metric": "flips", "tolerance": 0.1, "method": "grid", "samples": 3}),
    ],
)
def test_every_evaluation_is_that_of_the_gaussians_prediction(span: Any, depth: Any, options: dict[str, Any]) -> None:
    adapter, anchors = prepared()
    result = search_sigma(adapter, anchors, span=span, depth=depth, **OPTIONS, **options)
    assert (result.by, result.samples, adapter.by, adapter.sigma) == ("linear", 0, "linear", result.sigma)
    assert "linear" in str(result).splitlines()[0] and result.summary()["by"] == "linear"
    assert (adapter.depth, adapter.span) == (depth, span)
    gaussian, labels = adapter.gaussian(anchors), torch.tensor(anchors.labels)
    mean = gaussian.predict(0).probabilities
    assert len({e.nll for e in result.evaluations}) >= 2
    for evaluation in (result.baseline, *result.evaluations):
        assert_evaluation(evaluation, gaussian.predict(evaluation.sigma).probabilities, mean, labels)
    direct = predict(adapter, anchors, by="linear").probabilities
    assert result.chosen is not None
    assert_evaluation(result.chosen, direct, mean, labels)


@pytest.mark.parametrize("span", SPANS)
def test_the_sigma_is_the_largest_of_a_fine_grid_that_holds(span: Any) -> None:
    adapter, anchors = prepared(span=span)
    result = search_sigma(adapter, anchors, metric="nll", tolerance=0.05, method="root", steps=30, **OPTIONS)
    gaussian, labels = adapter.gaussian(anchors), torch.tensor(anchors.labels)

    def change(sigma: float) -> float:
        p = gaussian.predict(sigma).probabilities.double()
        return float(-p.gather(1, labels[:, None]).log().mean())

    base, grid = change(0), [result.sigma * 1.1**k for k in range(-12, 3)]
    holds = [s for s in grid if abs(change(s) - base) <= 0.05 * base]
    assert result.satisfied and result.sigma == pytest.approx(max(holds))


def test_depths_and_spans_are_chosen_among_as_by_samples() -> None:
    adapter, anchors = prepared()
    result = search_sigma(adapter, anchors, span=SPANS, depth=["all", 2], **OPTIONS)
    assert [(d.depth, d.span) for d in result.depths] == [(d, s) for d in ("all", 2) for s in SPANS]
    labels = torch.tensor(anchors.labels)
    for found in result.depths:
        adapter.depth, adapter.span = found.depth, found.span
        p = adapter.gaussian(anchors).predict(found.sigma).probabilities.double()
        assert found.nll == pytest.approx(float(-p.gather(1, labels[:, None]).log().mean()), abs=1e-5)
    # A forward, and for each of two differences of classes a backward pass of what is random.
    assert [d.forwards for d in result.depths if d.span == "all"] == [3, 2]
    best = min(result.depths, key=lambda d: d.score)
    equal = [d for d in result.depths if d is best or d.behind[0] <= d.behind[1]]
    cheapest = min(equal, key=lambda d: d.forwards)
    assert (result.depth, result.span) == (cheapest.depth, cheapest.span)


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("data", ["sequences", "token labels", "head"])
def test_other_anchors(data: str, span: Any) -> None:
    adapter: Any = zoo.bayesian("llama-cls" if data == "head" else "llama", span=span)
    given: Any = small_sets.encoded(6, head=True)
    if data == "sequences":
        given = small_sets.labelled(adapter, small_sets.sequences(4), 2)
    elif data == "token labels":
        batch = zoo.inputs(1, 3)
        given = [{**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        rule = {"metric": "flips", "tolerance": 0.3, "method": "grid", "steps": 2, "bracket": (0.05, 0.1)}
        result = search_sigma(adapter, given, recipe="paper", **rule, **OPTIONS)  # type: ignore[arg-type]
        gaussian = adapter.gaussian(given)
    many = [w for w in warned if "97 classes" in str(w.message)]
    assert len(many) == (2 if data == "token labels" else 0)  # one for the search, one for the Gaussian
    assert all(w.filename == __file__ for w in many)
    mean = gaussian.predict(0).probabilities
    for evaluation in result.evaluations:
        p = gaussian.predict(evaluation.sigma).probabilities
        flips = float((p.argmax(1) != mean.argmax(1)).double().mean())
        assert evaluation.flips == pytest.approx(flips) and evaluation.items == len(p)
        assert evaluation.entropy == pytest.approx(float(torch.special.entr(p).sum(1).mean()), abs=1e-4)


def test_a_metric_of_the_callers_own() -> None:
    def gap(p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (p.amax(1).mean() - (p.argmax(1) == labels).double().mean()).abs()

    adapter, anchors = prepared()
    result = search_sigma(adapter, anchors, metric=gap, tolerance=0.5, method="root", steps=4, **OPTIONS)
    gaussian, labels = adapter.gaussian(anchors), torch.tensor(anchors.labels)
    for evaluation in result.evaluations:
        value = float(gap(gaussian.predict(evaluation.sigma).probabilities, labels))
        assert evaluation.value == pytest.approx(value, abs=1e-5)


# One pass -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 12])
def test_one_pass_for_each_place_whatever_the_sigmas(steps: int) -> None:
    adapter, anchors = prepared(12)
    zoo.compared(adapter, "all", 2)  # the guard's own calls come before
    rows = small_sets.rows_through(adapter.anatomy.blocks[3].input_layernorm)
    options = {**OPTIONS, "metric": "flips", "method": "grid", "steps": steps, "batch_size": 4}
    result = search_sigma(adapter, anchors, depth=["all", 2], **options)
    assert rows == [4] * 3 * 2 and len(result.evaluations) >= steps
    assert result.tokens == 2 * sum(map(len, anchors.token_ids))
    del rows[:]
    search_sigma(adapter, anchors, **options)
    assert rows == [4] * 3


def test_it_takes_the_callers_mode_and_leaves_the_model_as_it_was() -> None:
    adapter, anchors = prepared(8)
    found = search_sigma(adapter, anchors, **OPTIONS)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert search_sigma(adapter, anchors, **OPTIONS).sigma == found.sigma
    assert all(p.grad is None for p in adapter.model.parameters()) and torch.is_grad_enabled()


# Refusals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "laplace"}, "by is 'laplace', expected one of 'samples', 'linear'"),
        ({"by": None}, "by is None, expected one of 'samples', 'linear'"),
        ({"early_stop": 0.9}, "early_stop: got 0.9, expected None with by='linear', which knows all anchors.*Fix: "),
        ({"recipe": "official"}, "recipe: got 'official', expected 'auto' or 'paper' with by='linear'.*Fix: by='samples'"),
        ({"samples": 0}, "samples is 0, expected"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it(options: dict[str, Any], words: str) -> None:
    adapter, anchors = prepared(4)
    rows = small_sets.rows_through(adapter.anatomy.blocks[0].input_layernorm)
    with pytest.raises(ValueError, match=words):
        search_sigma(adapter, anchors, **{**OPTIONS, **options})
    assert rows == [] and adapter.sigma is None and adapter.by is None


def test_choices_scored_by_their_tokens_are_refused() -> None:
    adapter, data = zoo.bayesian("llama"), small_sets.sequences(2, score="token")
    with pytest.raises(ValueError, match="the data's score: got 'token'.*Fix: encode.*or by='samples'"):
        search_sigma(adapter, data, **OPTIONS)


# For linear alone ---------------------------------------------------------------------------------------------------------


def test_a_sigma_of_the_one_is_not_taken_for_the_others() -> None:
    adapter, anchors = prepared(8)
    rule: Any = {"metric": "flips", "method": "grid", "steps": 2, "samples": 2, "progress": False}
    uses = {
        "linear": [lambda **o: predict(adapter, anchors, by="linear", **o)],
        "samples": [lambda **o: predict(adapter, anchors, 2, **o), lambda **o: adapter.predictive(2, **o).__enter__],
    }
    for by, other in (("linear", "samples"), ("samples", "linear")):
        search_sigma(adapter, anchors, by=by, **rule)
        assert adapter.by == by
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for use in uses[by]:
                use()
            uses[other][0](sigma=adapter.sigma)  # who gives one knows what it is
            predict(adapter, anchors, 0)
        with pytest.warns(UserWarning, match=MISMATCH.format(by, other)):
            uses[other][0]()
    search_sigma(adapter, anchors, by="linear", **rule)
    with pytest.warns(UserWarning, match=MISMATCH.format("linear", "samples")), adapter.predictive(2):
        pass
    adapter.sigma = adapter.sigma
    assert adapter.by is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uses["samples"][0]()
    before = search_sigma(adapter, anchors, by="linear", apply=False, **rule)
    assert adapter.by is None and before.by == "linear"
    with pytest.raises(ValueError, match="samples: got 0, expected none with by='linear'.*Fix"):
        predict(adapter, anchors, 0, by="linear")


def test_saved_and_loaded(tmp_path: Path) -> None:
    adapter, anchors = zoo.bayesian("llama"), small_sets.encoded(8)
    result = search_sigma(adapter, anchors, **OPTIONS)
    raw = json.loads((adapter.save_pretrained(tmp_path) / "tfb_config.json").read_text())
    assert (raw["by"], raw["search"]["by"], raw["sigma"]) == ("linear", "linear", result.sigma)
    loaded = tfb_ext.load(zoo.peft_model("llama").unload(), tmp_path)
    assert (loaded.by, loaded.sigma) == ("linear", adapter.sigma)
    expected = predict(adapter, anchors, by="linear").probabilities
    torch.testing.assert_close(predict(loaded, anchors, by="linear").probabilities, expected)
    with pytest.warns(UserWarning, match=MISMATCH.format("linear", "samples")):
        predict(loaded, anchors, 2)
    path = tmp_path / "trace.json"
    result.save(path)
    assert SigmaSearch.load(path) == result
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_from_before_is_of_samples(tmp_path: Path) -> None:
    adapter, anchors = prepared(6)
    path = tmp_path / "trace.json"
    search_sigma(adapter, anchors, samples=2, recipe="paper", progress=False).save(path)
    raw = json.loads(path.read_text())
    assert raw.pop("by") == "samples"
    path.write_text(json.dumps(raw))
    assert SigmaSearch.load(path).by == "samples"


def test_a_checkpoint_serves_one_of_them(tmp_path: Path) -> None:
    adapter, anchors = prepared(8)
    kept: Any = {"samples": 2, "progress": False, "apply": False, "recipe": "paper"}
    paths = {by: tmp_path / f"{by}.json" for by in ("samples", "linear")}
    found = {by: search_sigma(adapter, anchors, by=by, checkpoint=path, **kept) for by, path in paths.items()}
    assert found["linear"].sigma and found["linear"].evaluations != found["samples"].evaluations
    for by, path in (("samples", paths["linear"]), ("linear", paths["samples"])):
        with pytest.raises(ConfigError, match="is of another search: .*samples is "):
            search_sigma(adapter, anchors, by=by, checkpoint=path, **kept)
    rows = small_sets.rows_through(adapter.anatomy.blocks[0].input_layernorm)
    adapter.seed = 5  # which draws nothing here
    again = search_sigma(adapter, anchors, by="linear", checkpoint=paths["linear"], **kept)
    assert rows == [] and again.evaluations == found["linear"].evaluations


# Command line -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    pytest.importorskip("typer", reason="the command line needs typer and rich")
    return small_folders.write(tmp_path_factory.mktemp("llama"))


def test_command_line(llama: Folders, tmp_path: Path, tfb: Any) -> None:
    def document(*arguments: object) -> Any:
        status, out, err = tfb(*arguments, *HERE, "--json")
        assert status == 0, err
        return json.loads(out), err

    by, saved = ("--by", "linear"), tmp_path / "bayes"
    found, _ = document("search", "-a", llama.adapter, "-d", llama.anchors, *by, "--save", saved, "--span", "answer")
    assert (found["by"], found["samples"]) == ("linear", 0)
    asks = ("-a", saved, "-d", llama.test)
    items, said = document("predict", *asks, *by)
    assert (items["by"], items["samples"], items["sigma"], items["span"]) == ("linear", 0, found["sigma"], "answer")
    assert "searched by" not in said
    from tfb_ext.app.loading import load_adapter
    from tfb_ext.data import encode, read_jsonl

    model = load_adapter(str(saved), device="cpu", dtype="float32")
    adapter, test = tfb_ext.load(model.model, saved), encode(read_jsonl(llama.test), model.tokenizer)
    expected = predict(adapter, test, by="linear")
    for i, item in enumerate(items["items"]):
        assert list(item["probabilities"].values()) == pytest.approx(expected.probabilities[i].tolist(), abs=1e-5)
        assert item["epistemic"] == pytest.approx(float(expected.epistemic[i]), abs=1e-5)
    measured, _ = document("evaluate", *asks, *by)
    metrics = tfb_ext.evaluate(expected.probabilities, test.labels_tensor()).to_dict()
    assert (measured["by"], measured["samples"]) == ("linear", 0) and measured["tfb"] == pytest.approx(
        metrics, abs=1e-5
    )
    assert "TFB, linear" in tfb("evaluate", *asks, *by, *HERE)[1]
    assert "linear, sigma" in tfb("predict", *asks, *by, *HERE)[1]
    with pytest.warns(UserWarning, match=MISMATCH.format("linear", "samples")):
        document("predict", *asks, "-n", 2)
    for command, options, words in (
        ("predict", ("--adaptive", 0.9), "--adaptive: does not go with --by linear"),
        ("evaluate", ("--adaptive", 0.9), "--adaptive: does not go with --by linear"),
        ("predict", ("-n", 0), "samples: got 0"),
        ("search", ("--early-stop", 0.9), "early_stop: got 0.9"),
        ("search", ("--recipe", "official"), "recipe: got 'official'"),
    ):
        status, _, err = tfb(command, *asks, *by, *HERE, *options)
        assert status != 0 and words in err, err
    assert tfb("search", *asks, *HERE, "--by", "laplace")[0] == 2
