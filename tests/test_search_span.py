"""The search over spans and depths, its files, and prediction with spans, against calls of one anchor at a time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import small_folders
import small_sets
import torch
import zoo
from test_span import passes
from torch import Tensor

import tfb_ext
from tfb_ext import predict, search_sigma
from tfb_ext.data import Encoded
from tfb_ext.errors import ConfigError
from tfb_ext.search import SigmaSearch

SAMPLES = 5
SPANS = ["all", "answer", 3]
OPTIONS: dict[str, Any] = {
    "samples": SAMPLES, "progress": False, "objective": "minimum", "method": "grid", "bracket": (0.05, 0.4), "steps": 2,
}  # fmt: skip


def prepared(items: int = 16, name: str = "llama") -> tuple[Any, Encoded]:
    """A sure model and labels of which every third contradicts it."""
    adapter = zoo.bayesian(name)
    small_sets.sharpen(adapter, 6.0)
    return adapter, small_sets.labelled(adapter, small_sets.encoded(items), 3)


def row_of(tokens: tuple[int, ...] | list[int]) -> dict[str, Tensor]:
    ids = torch.tensor([list(tokens)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}


def places(result: SigmaSearch) -> list[tuple[Any, Any]]:
    return [(d.depth, d.span) for d in result.depths]


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float | tuple) else value


class Calls:
    """Counts the model's forwards, and may end the search in one of them as Ctrl-C does."""

    def __init__(self, adapter: Any, end: int = 0) -> None:
        self.count, self.end = 0, end
        self.hook = adapter.anatomy.model.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.end:
            raise KeyboardInterrupt


# What is found --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "depth"), zoo.slow_but([("answer", "all"), (3, 2), ("answer", "head")], ("answer", "all"))
)
def test_an_evaluation_is_that_of_calls_of_one_anchor(span: Any, depth: Any) -> None:
    adapter, anchors = prepared(name="llama-head")
    result = search_sigma(adapter, anchors, span=span, depth=depth, **OPTIONS, batch_size=7)
    assert (result.span, result.depth) == (span, depth) == (adapter.span, adapter.depth) and result.depths == ()
    columns, labels = torch.tensor(anchors.choice_ids), torch.tensor(anchors.labels)
    for evaluation in result.evaluations:
        rows = []
        for tokens in anchors.token_ids:
            with adapter.predictive(SAMPLES, evaluation.sigma, columns=columns):
                rows.append(adapter.model(input_ids=torch.tensor([list(tokens)])).logits[0, -1])
        logs = torch.stack(rows).double()
        p = logs.exp()
        assert evaluation.nll == pytest.approx(float(-logs.gather(1, labels[:, None]).mean()), abs=1e-5)
        assert evaluation.accuracy == pytest.approx(float((p.argmax(1) == labels).double().mean()))
        assert evaluation.entropy == pytest.approx(float(torch.special.entr(p).sum(1).mean()), abs=1e-5)
    assert len({e.nll for e in result.evaluations}) >= 2


@pytest.fixture(scope="module")
def both() -> tuple[Any, Encoded, SigmaSearch]:
    """A search over spans and depths."""
    adapter, anchors = prepared()
    return adapter, anchors, search_sigma(adapter, anchors, span=SPANS, depth=[1, "all"], **OPTIONS)


def test_every_span_is_tried_at_every_depth(both: tuple[Any, Encoded, SigmaSearch]) -> None:
    adapter, anchors, result = both
    assert places(result) == [("all", "all"), ("all", 3), ("all", "answer"), (1, "all"), (1, 3), (1, "answer")]
    assert (adapter.depth, adapter.span, adapter.sigma) == (result.depth, result.span, result.sigma)
    lines = str(result).splitlines()
    assert f"depth {result.depth}, span {result.span}" in lines[0]
    (chosen,) = [line.split()[:2] for line in lines[-6:] if "<- chosen" in line]
    assert chosen == [str(result.depth), str(result.span)]
    assert result.summary()["span"] == result.span
    adapter = zoo.bayesian("llama")
    small_sets.sharpen(adapter, 6.0)
    labels = torch.tensor(anchors.labels)
    for found in result.depths:
        adapter.depth, adapter.span = found.depth, found.span
        p = predict(adapter, anchors, SAMPLES, sigma=found.sigma).probabilities
        assert found.nll == pytest.approx(float(-p.gather(1, labels[:, None]).log().mean()), abs=1e-5)


def test_depths_find_beside_spans_what_they_find_alone(both: tuple[Any, Encoded, SigmaSearch]) -> None:
    _, anchors, result = both
    adapter, _ = prepared()
    alone = search_sigma(adapter, anchors, depth=[1, "all"], **OPTIONS, apply=False)
    assert [(d.sigma, d.nll) for d in result.depths if d.span == "all"] == [(d.sigma, d.nll) for d in alone.depths]


def test_the_cheapest_of_equals_is_taken(both: tuple[Any, Encoded, SigmaSearch]) -> None:
    _, anchors, result = both
    tokens = [len(t) for t in anchors.token_ids]
    # One forward, and for each sample the random tokens of all rows (a short row is random as a whole, but counted with n).
    for found in result.depths:
        if found.span != "all":
            random = {"answer": 1, 3: 3}[found.span]
            assert found.forwards == pytest.approx(1 + SAMPLES * random * len(tokens) / sum(tokens))
    assert [d.forwards for d in result.depths if d.span == "all"] == [SAMPLES, 0.75 + SAMPLES / 4]
    best = min(result.depths, key=lambda d: d.score)
    equal = [d for d in result.depths if d is best or d.behind[0] <= d.behind[1]]
    cheapest = min(equal, key=lambda d: d.forwards)
    assert (result.depth, result.span) == (cheapest.depth, cheapest.span)
    costs = {(d.depth, d.span): d.forwards for d in result.depths}
    assert costs["all", "answer"] < costs["all", 3] < costs["all", "all"]


def test_where_noise_always_helps_every_search_ends_at_the_largest_sigma() -> None:
    """The search at one span begins where the one before ended, at the bound."""
    adapter, anchors = prepared(6)
    anchors = small_sets.labelled(adapter, anchors, 1)  # all wrong
    result = search_sigma(adapter, anchors, span=["all", 3, "answer"], depth=["all", 2], **OPTIONS, apply=False)
    assert len(result.depths) == 6
    for found in result.depths:
        assert 0.4 < found.sigma <= 10 and found.stop


def test_spans_are_named_once_and_refused_before_anything_runs() -> None:
    adapter, anchors = prepared(4)
    calls = Calls(adapter)
    assert search_sigma(adapter, anchors, span=["answer", 1], **OPTIONS, apply=False).depths == ()
    assert adapter.span == "all"
    before = calls.count
    for span in ([], ["all", 0], "last", [True], -1, 1.5, 2**31):
        with pytest.raises(ValueError, match="span is .*, expected"):
            search_sigma(adapter, anchors, span=span, **OPTIONS)
    full = tfb_ext.bayesianize(zoo.peft_model("llama"), family="full-rank", sigma=0.1)
    for refused in (
        lambda: search_sigma(full, anchors, span=["all", 2], **OPTIONS),
        lambda: full.span_tokens("answer"),
    ):
        with pytest.raises(ValueError, match="span is .* with the family 'full-rank'.*Fix: "):
            refused()
    with pytest.raises(ValueError, match="span is 2 with the family 'full-rank'"), full.predictive(2, span=2):
        pass
    assert calls.count == before and adapter.sigma is None


# What it costs --------------------------------------------------------------------------------------------------------


def test_the_prompt_runs_once_a_batch() -> None:
    """Whatever the sigmas, spans, depths and samples: every later call has the random tokens alone."""
    adapter, anchors = prepared()
    for span in ("answer", 3):  # the guard's own calls come before
        adapter.sigma = 0.1
        with adapter.predictive(1, span=span):
            pass
    anchors = replace(anchors, token_ids=[(10 + i % 7, *range(20, 57)) for i in range(16)])  # 38 tokens
    width, random = 38, {SAMPLES * n * sigmas for n in (1, 3) for sigmas in (1, 2)}
    for block in (0, 3):
        shapes = small_sets.shapes_through(adapter.anatomy.blocks[block].input_layernorm)
        search_sigma(adapter, anchors, span=["answer", 3], **OPTIONS, batch_size=8, apply=False)
        whole = [s for s in shapes if s[1] >= width]
        assert len(whole) == 2 and all(s[0] == 8 for s in whole)  # two batches
        assert {s[1] for s in shapes if s[1] < width} <= random and len(shapes) > len(whole)


# Files ----------------------------------------------------------------------------------------------------------------


def as_before_spans(path: Path) -> None:
    """The file as it was written before there were spans."""
    raw = json.loads(path.read_text())
    raw.pop("span", None)
    for entry in (*raw.get("depths", ()), *raw["records"]["evaluations"], *raw["records"]["probabilities"]):
        del entry["span"]
    path.write_text(json.dumps(raw))


def test_a_search_is_saved_with_its_spans(both: tuple[Any, Encoded, SigmaSearch], tmp_path: Path) -> None:
    adapter, anchors, result = both
    path = tmp_path / "search.json"
    result.save(path)
    raw = json.loads(path.read_text())
    assert raw["span"] == result.span and {d["span"] for d in raw["depths"]} == {"all", "answer", 3}
    assert {e["span"] for e in raw["records"]["evaluations"]} == {None, 1, 3}
    assert SigmaSearch.load(path) == result
    calls = Calls(adapter)
    again = search_sigma(adapter, anchors, span=SPANS, depth=[1, "all"], **OPTIONS, checkpoint=path, apply=False)
    assert again.depths == result.depths and calls.count == 0
    calls.hook.remove()


def test_a_list_goes_on_where_it_was_interrupted(both: tuple[Any, Encoded, SigmaSearch], tmp_path: Path) -> None:
    _, _, whole = both
    adapter, anchors = prepared()
    options = {"span": SPANS, "depth": [1, "all"], **OPTIONS, "checkpoint": tmp_path / "search.json"}
    for depth in ("all", 1):  # the guard's calls are not counted
        for span in SPANS:
            adapter.depth, adapter.sigma = depth, 0.1
            with adapter.predictive(1, span=span):
                pass
    adapter.depth = "all"
    calls = Calls(adapter, end=6)
    with pytest.raises(KeyboardInterrupt):
        search_sigma(adapter, anchors, **options)
    calls.hook.remove()
    held = json.loads(options["checkpoint"].read_text())
    assert held["sigma"] is None and held["records"]["evaluations"]
    calls = Calls(adapter)
    again = search_sigma(adapter, anchors, **options)
    done = calls.count
    for found, wanted in zip((*again.depths, *again.evaluations), (*whole.depths, *whole.evaluations), strict=True):
        # Passes that keep the prompts and passes that do not differ in the last place.
        assert asdict(found) == {n: near(v) for n, v in asdict(wanted).items()}
    # A part of the list: nothing is computed again.
    part = search_sigma(adapter, anchors, **options | {"depth": "all"})
    assert [(d.span, d.sigma) for d in part.depths] == [(d.span, d.sigma) for d in whole.depths if d.depth == "all"]
    assert calls.count == done > 0
    calls.hook.remove()


def test_files_from_before_spans_are_of_all_tokens(tmp_path: Path) -> None:
    adapter, anchors = prepared()
    path = tmp_path / "search.json"
    first = search_sigma(adapter, anchors, depth=["all", 1], **OPTIONS, checkpoint=path, apply=False)
    as_before_spans(path)
    loaded = SigmaSearch.load(path)
    assert loaded == first and loaded.span == "all" and {d.span for d in loaded.depths} == {"all"}
    calls = Calls(adapter)
    again = search_sigma(adapter, anchors, depth=["all", 1], **OPTIONS, checkpoint=path, apply=False)
    assert again.depths == first.depths and calls.count == 0
    as_before_spans(path)
    more = search_sigma(adapter, anchors, span=["all", "answer"], **OPTIONS, checkpoint=path, apply=False)
    assert calls.count > 0 and places(more) == [("all", "all"), ("all", "answer")]
    assert more.depths[0].nll == first.depths[0].nll
    calls.hook.remove()


@pytest.mark.parametrize("span", [0, -1, "last", "answer", True, 1.5, [1], 2**31])
def test_a_damaged_span_is_refused(span: Any, both: tuple[Any, Encoded, SigmaSearch], tmp_path: Path) -> None:
    adapter, anchors, result = both
    path = tmp_path / "search.json"
    result.save(path)
    raw = json.loads(path.read_text())
    raw["records"]["evaluations"][-1]["span"] = span
    path.write_text(json.dumps(raw))
    before = path.read_text()
    with pytest.raises(ConfigError, match="holds no records of a search .*; give another checkpoint, or delete"):
        search_sigma(adapter, anchors, span=SPANS, **OPTIONS, checkpoint=path, apply=False)
    with pytest.raises(ConfigError, match="is no search for sigma"):
        SigmaSearch.load(path)
    assert path.read_text() == before


@pytest.mark.parametrize("change", [{"span": None}, {"span": 1.5}, {"depths": [1]}, {"depths": None}, {"depths": 3}])
def test_a_damaged_result_is_refused(change: Any, both: tuple[Any, Encoded, SigmaSearch], tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    both[2].save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match="is no search for sigma: the search.*expected"):
        SigmaSearch.load(path)


def test_the_code_of_the_page_runs(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "span.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    model, anchors = zoo.peft_model("llama"), small_sets.encoded(6)
    names = {"model": model, "anchors": anchors, "questions": anchors, "tokenizer": small_folders.tokenizer()}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3 and (names["adapter"].mode, names["adapter"].span) == ("token", "answer")
    assert len(names["found"].depths) == 6


# Prediction -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("span", "depth"), [("answer", "all"), (3, 2)])
def test_predictions_and_their_standard_errors(span: Any, depth: Any) -> None:
    adapter, data = zoo.bayesian("llama", sigma=0.2, span=span, depth=depth), small_sets.encoded(9)
    found = predict(adapter, data, 6, batch_size=4)
    count, columns = {"answer": 1, 3: 3}[span], torch.tensor(data.choice_ids)
    for i, tokens in enumerate(data.token_ids):
        (logs,) = passes(adapter, row_of(tokens), [count], list(range(6)))
        p = torch.softmax(logs[:, -1, columns], -1)
        assert torch.allclose(found.sample_probabilities[:, i], p, atol=1e-5)
        pairs = (p[0::2] + p[1::2]) / 2  # mirrored samples are one draw
        assert torch.allclose(found.standard_error[i], pairs.std(0) / math.sqrt(3), atol=1e-5)
        mean = p.mean(0)
        assert float(found.total[i]) == pytest.approx(float(torch.special.entr(mean).sum()), abs=1e-5)
        assert float(found.aleatoric[i]) == pytest.approx(float(torch.special.entr(p).sum(-1).mean()), abs=1e-5)


@pytest.mark.parametrize("batch_size", zoo.slow_but([7, None], 7))
@pytest.mark.parametrize(("span", "depth"), [("answer", "all"), (3, 2)])
def test_adaptive_sampling_draws_the_fixed_runs_first_samples(span: Any, depth: Any, batch_size: int | None) -> None:
    adapter, data = zoo.bayesian("llama", sigma=0.1, span=span, depth=depth), small_sets.encoded(24)
    fixed = predict(adapter, data, 30)
    found = predict(adapter, data, 30, adaptive=0.95, batch_size=batch_size)
    assert len(set(found.samples_drawn.tolist())) > 2
    for i, k in enumerate(found.samples_drawn.tolist()):
        assert torch.allclose(found.sample_probabilities[:k, i], fixed.sample_probabilities[:k, i], atol=1e-5)
        assert found.sample_probabilities[k:, i].isnan().all()
    assert (found.labels == fixed.labels).double().mean() >= 22 / 24
    assert found.standard_error.isfinite().all()


def test_noise_of_every_token_gives_an_item_the_distribution_of_one_weight() -> None:
    """Where one token is random: means within 5 standard errors, and spreads within 10 %."""
    adapter, data = zoo.bayesian("llama", sigma=0.2, span="answer", antithetic=False), small_sets.encoded(6)
    weight, token = [], []
    for mode, found in (("weight", weight), ("token", token)):
        adapter.mode = mode
        found.append(predict(adapter, data, 2000).sample_probabilities.double())
    (a,), (b,) = weight, token
    error = ((a.var(0) + b.var(0)) / 2000).sqrt()
    assert ((a.mean(0) - b.mean(0)) / error).abs().max() < 5
    assert (a.std(0) / b.std(0) - 1).abs().max() < 0.1
    assert (a - b).abs().max() > 0.01


@pytest.mark.parametrize(
    ("score", "span"),
    zoo.slow_but([(score, span) for score in ("sequence", "token") for span in ("answer", 3)], ("sequence", "answer")),
)
def test_choices_of_several_tokens_are_random_from_their_first_one_on(score: str, span: Any) -> None:
    """The position that a choice's first token is read from, and what follows; with a number, so many tokens before."""
    extra = 0 if span == "answer" else span - 1
    adapter, data = zoo.bayesian("llama", sigma=0.2, span=span), small_sets.sequences(3, score=score)
    found = predict(adapter, data, 4)
    for i, tokens in enumerate(data.token_ids):
        scores = []
        for choice in data.choice_tokens or ():
            row = row_of([*tokens, *choice[:-1]])
            (logs,) = passes(adapter, row, [len(choice) + extra], list(range(4)))
            own = logs[:, -len(choice) :].gather(2, torch.tensor(choice).expand(4, -1)[..., None])[..., 0]
            scores.append(own)
        if score == "sequence":
            p = torch.softmax(torch.stack([s.sum(1) for s in scores], 1), 1).mean(0)
        else:
            p = torch.softmax(torch.stack([zoo.average(s).sum() for s in scores]), 0)
        assert torch.allclose(found.probabilities[i], p.to(found.probabilities.dtype), atol=1e-5), i
