"""Choices of several tokens, scored as sequences: equal to separate passes, and no logits of positions nobody asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor

import tfb_ext
from tfb_ext import Example, encode, predict, search_sigma
from tfb_ext.adaptive import StoppingRule
from tfb_ext.data import Encoded
from tfb_ext.errors import ConfigError
from tfb_ext.forward import fold
from tfb_ext.search import SigmaSearch

SIGMA, SAMPLES = 0.3, 4
CHOICES = small_sets.CHOICE_TOKENS
bayesian = partial(zoo.bayesian, sigma=SIGMA)


def token_logs(adapter: Any, data: Encoded) -> Callable[[], Tensor]:
    """Log probabilities (N, C, 4) of the choices' tokens, 0 behind shorter ones, each choice from a call of its own."""

    def call() -> Tensor:
        out = torch.zeros(len(data), len(CHOICES), 4)
        for i, prompt in enumerate(data.token_ids):
            for c, choice in enumerate(CHOICES):
                logits = adapter.model(input_ids=torch.tensor([[*prompt, *choice]])).logits[0]
                logs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
                out[i, c, : len(choice)] = logs[range(len(choice)), list(choice)]
        return out

    return call


@pytest.mark.parametrize("batch_size", zoo.slow_but([3, None], 3))
@pytest.mark.parametrize(
    ("name", "depth"), [("llama-head", "all"), ("llama-head", 2), ("llama-head", "head"), ("gpt2", 2)]
)
def test_equals_separate_passes(
    name: str, depth: int | str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, data = bayesian(name, depth=depth), small_sets.sequences()
    alone = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, token_logs(adapter, data))
    assert alone.std(0).max() > 0.01
    expected = torch.softmax(alone.sum(-1), -1)  # the product for each sample, normalised among the choices
    for piece in (fold.FOLD_BYTES, 1):  # all samples in one piece of head outputs, and one in each
        monkeypatch.setattr(fold, "FOLD_BYTES", piece)
        found = predict(adapter, data, SAMPLES, batch_size=batch_size)
        assert torch.allclose(found.sample_probabilities, expected, atol=1e-5)
    assert torch.allclose(found.probabilities, expected.mean(0), atol=1e-5) and found.epistemic.max() > 1e-4
    by_length = predict(adapter, replace(data, by_length=True), SAMPLES).sample_probabilities
    lengths = torch.tensor([3, 2, 1, 4])
    assert torch.allclose(by_length, torch.softmax(alone.sum(-1) / lengths, -1), atol=1e-5)
    tokens = predict(adapter, replace(data, score="token"), SAMPLES, batch_size=batch_size)
    means = torch.softmax(zoo.average(alone).sum(-1), -1)  # the product of the averages
    assert tokens.sample_probabilities.shape == (1, 5, 4) and torch.allclose(tokens.probabilities, means, atol=1e-5)
    assert (means - expected.mean(0)).abs().max() > 2e-4
    assert tokens.standard_error.isnan().all() and tokens.epistemic.max() < 1e-6


def test_the_soft_cap_counts() -> None:
    adapter, data = bayesian("gemma2"), small_sets.sequences(3)
    alone = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, token_logs(adapter, data))
    found = predict(adapter, data, SAMPLES)
    assert torch.allclose(found.sample_probabilities, torch.softmax(alone.sum(-1), -1), atol=1e-5)


def test_mean_adapter() -> None:
    adapter, data = bayesian(), small_sets.sequences()
    with torch.no_grad():
        expected = torch.softmax(token_logs(adapter, data)().sum(-1), -1)
    assert torch.allclose(predict(adapter, data, 0).probabilities, expected, atol=1e-5)


def test_the_head_makes_the_choices_positions_alone() -> None:
    adapter, data = zoo.compared(bayesian()), small_sets.sequences()
    assert adapter.shares_prompts()
    shapes = small_sets.shapes_through(adapter.anatomy.head)
    predict(adapter, data, SAMPLES, batch_size=2)
    # Two items; for each of four choices as many positions as the longest has.
    assert shapes == [(n * SAMPLES, 4 * 4, zoo.VOCAB) for n in (2, 2, 1)]


class Words:
    """A tokenizer with a token for each letter."""

    eos_token, eos_token_id, pad_token_id = "</s>", 2, 0

    def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, Any]:
        ids = [[10 + ord(c) % 80 for c in t if c != "_"] for t in ([text] if isinstance(text, str) else text)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]


def test_encode_takes_choices_of_any_number_of_tokens() -> None:
    tokenizer: Any = Words()
    data = encode([Example("abc", ("ab", "a", "acd"), 1)], tokenizer, score="sequence")
    a = tokenizer("a")["input_ids"][0]
    assert data.choice_tokens == ((a, a + 1), (a,), (a, a + 2, a + 3)) and data.choice_ids is None
    rows = data.sequences()
    assert rows.token_ids == [[a, a + 1, a + 2, a], [a, a + 1, a + 2], [a, a + 1, a + 2, a, a + 2]]
    assert rows.targets == list(data.choice_tokens) and rows.select([2]).targets == [data.choice_tokens[2]]
    assert predict(bayesian(), data, 2).probabilities.shape == (1, 3)
    for options, choices, wanted in (
        ({}, ("ab", "a"), "'ab' after .*: got 2 tokens.*or score='sequence'"),
        ({"score": "sequence"}, ("_", "a"), "'_' after .*: got no tokens"),
        ({"score": "sequence"}, ("a_", "a"), "'a' after .*: got the same tokens as 'a_'"),
        ({"score": "mean"}, ("a", "b"), "score is 'mean', expected one of 'sequence', 'token'"),
        ({"score": "token", "head": True}, ("a", "b"), "score='token' with head=True"),
        ({"by_length": True}, ("a", "b"), "by_length=True without score="),
    ):
        with pytest.raises(ValueError, match=wanted):
            encode([Example("abc", choices)], tokenizer, **options)


def test_refuses_what_does_not_serve_sequences() -> None:
    with pytest.raises(
        ValueError, match="data's score is 'token'.*adaptive= judges by .*encode with score='sequence', or"
    ):
        predict(bayesian(), small_sets.sequences(score="token"), 30, adaptive=0.99)
    with pytest.raises(
        ValueError, match="data's score is 'sequence'.*no one Gaussian logit; expected choices of one token"
    ):
        tfb_ext.research.head_gaussian(bayesian("llama-head", depth="head"), small_sets.sequences())
    with pytest.raises(ValueError, match="classification head"):
        predict(bayesian("llama-cls"), small_sets.sequences(), 2)


# The search ---------------------------------------------------------------------------------------------------------


def look(adapter: Any, anchors: Encoded, **options: Any) -> SigmaSearch:
    return search_sigma(adapter, anchors, **{"samples": SAMPLES, "progress": False, "apply": False, **options})


def labelled(adapter: Any, items: int = 12, wrong_every: int = 3, **options: Any) -> Encoded:
    return small_sets.labelled(adapter, small_sets.sequences(items, **options), wrong_every)


def measured(p: Tensor, mean: Tensor, labels: Tensor) -> dict[str, float]:
    """The search's columns, of probabilities (N, C)."""
    right = p.gather(1, labels[:, None])[:, 0]
    return {
        "nll": float(-right.log().mean()),
        "accuracy": float((p.argmax(1) == labels).float().mean()),
        "flips": float((p.argmax(1) != mean.argmax(1)).float().mean()),
        "brier": float((p.square().sum(1) - 2 * right + 1).mean()),
        "entropy": float(torch.special.entr(p).sum(1).mean()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("score", zoo.slow_but(["sequence", "token"], "sequence"))
@pytest.mark.parametrize("by_length", zoo.slow_but([False, True], True))
@pytest.mark.parametrize(
    ("name", "depth"), zoo.slow_but([("llama-head", "all"), ("gpt2", 2), ("llama-head", "head")], ("gpt2", 2))
)
def test_the_search_measures_what_separate_passes_give(
    name: str, depth: int | str, by_length: bool, score: Any
) -> None:
    adapter = bayesian(name, depth=depth)
    anchors = labelled(adapter, 6, 3, score=score, by_length=by_length)
    lengths = torch.tensor([len(c) for c in CHOICES]) if by_length else torch.ones(4)
    with torch.no_grad():
        mean = torch.softmax(token_logs(adapter, anchors)().sum(-1) / lengths, -1)
    result = look(adapter, anchors, method="grid", bracket=(0.1, 0.3), steps=2, batch_size=4, tolerance=0.003)
    assert result.anchors == 6 and result.labelled and len(result.evaluations) >= 2
    for e in (result.baseline, *result.evaluations):
        alone = zoo.separate_passes(adapter, range(SAMPLES), e.sigma, token_logs(adapter, anchors)) if e.sigma else None
        if alone is None:
            p = mean
        elif score == "token":
            p = torch.softmax(zoo.average(alone).sum(-1) / lengths, -1)
        else:
            p = torch.softmax(alone.sum(-1) / lengths, -1).mean(0)
        wanted = measured(p, mean, anchors.labels_tensor())
        assert {name: getattr(e, name) for name in wanted} == pytest.approx(wanted, abs=2e-5)
    assert (p - mean).abs().max() > 1e-3


def gap(probabilities: Tensor, targets: Tensor) -> Tensor:
    return 1 - probabilities.gather(1, targets[:, None])[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "minimum"},
        {"recipe": "paper"},
        {"recipe": "official"},
        {"metric": "flips"},
        {"metric": "accuracy", "method": "bisect"},
        {"metric": "brier", "method": "root", "bound": "one-sided"},
        {"metric": gap, "tolerance": 0.05},
    ],
    ids=lambda options: "-".join(str(getattr(v, "__name__", v)) for v in options.values()) or "defaults",
)
def test_recipes_and_metrics_end_on_what_predict_gives(options: dict[str, Any]) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"))
    small_sets.sharpen(adapter, 2.0)
    anchors = labelled(adapter)
    found = look(adapter, anchors, **options, apply=True, batch_size=12)
    assert found.sigma == adapter.sigma and found.mode == adapter.mode
    chosen = found.chosen or found.evaluations[-1]
    adapter.antithetic = found.antithetic
    p = predict(adapter, anchors, SAMPLES, sigma=chosen.sigma, batch_size=12).probabilities
    mean = predict(adapter, anchors, 0).probabilities
    labels = mean.argmax(1) if options.get("recipe") == "official" else anchors.labels_tensor()
    wanted = measured(p, mean, labels)
    assert {name: getattr(chosen, name) for name in wanted} == pytest.approx(wanted, abs=2e-5)
    if found.metric == "gap":
        assert chosen.value == pytest.approx(float(gap(p, labels).mean()), abs=1e-5)


@pytest.mark.slow
def test_unlabelled_anchors_are_judged_by_flips() -> None:
    found = look(bayesian(), small_sets.sequences(12))
    assert (found.metric, found.labelled, found.anchors) == ("flips", False, 12) and found.satisfied


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", zoo.slow_but([1, 5, None], 5))
def test_batches_and_memory_change_nothing(batch_size: int | None) -> None:
    """Rows of one item that do not fit together go one after the other, and are put together again."""
    adapter = bayesian(depth=2)
    anchors = labelled(adapter)
    options: dict[str, Any] = {"recipe": "paper", "bracket": (0.05, 0.3), "steps": 3, "tolerance": 10.0}
    whole = look(adapter, anchors, batch_size=12, **options)
    seen: list[int] = []

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(len(args[0] if args else kwargs["hidden_states"]))
        if seen[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    plain = look(adapter, anchors, batch_size=batch_size, **options)
    hook = adapter.anatomy.blocks[3].register_forward_pre_hook(refuse, with_kwargs=True)
    small = look(adapter, anchors, batch_size=batch_size, **options)
    hook.remove()
    assert max(seen) > 3 and small.sigma == plain.sigma == whole.sigma
    for a, b, c in zip(small.evaluations, plain.evaluations, whole.evaluations, strict=True):
        assert a.nll == pytest.approx(c.nll, abs=1e-5) and b.nll == pytest.approx(c.nll, abs=1e-5)


@pytest.mark.slow
def test_depths_share_a_trunk_that_runs_once() -> None:
    adapter = zoo.compared(bayesian(), 2, 1)
    assert adapter.shares_prompts()
    anchors = labelled(adapter)
    below, above = (small_sets.rows_through(adapter.anatomy.blocks[i].input_layernorm) for i in (1, 3))
    found = look(adapter, anchors, depth=[2, 1], batch_size=6, recipe="paper")
    assert [d.depth for d in found.depths] == [2, 1] and below == [6] * 2
    assert sum(above) > sum(below) * SAMPLES
    alone = look(adapter, anchors, depth=found.depth, batch_size=6, recipe="paper")
    assert [e.nll for e in alone.evaluations] == pytest.approx([e.nll for e in found.evaluations], abs=1e-6)


@pytest.mark.slow
def test_early_stop_sees_fewer_items() -> None:
    adapter = bayesian()
    anchors = labelled(adapter, 120)
    options: dict[str, Any] = {"tolerance": 0.05, "method": "bisect", "bracket": (0.002, 0.3), "steps": 3}
    early = look(adapter, anchors, early_stop=0.95, batch_size=10, **options)
    whole = {e.sigma: e for e in look(adapter, anchors, batch_size=10, **options).evaluations}
    assert min(e.items for e in early.evaluations) < 120 and all(e.items % 10 == 0 for e in early.evaluations)
    same = [e for e in early.evaluations if e.sigma in whole]
    assert same and all(e.satisfied == whole[e.sigma].satisfied for e in same)
    assert early.tokens < 120 * 4 * 20 * SAMPLES * len(early.evaluations)


@pytest.mark.slow
def test_a_checkpoint_is_of_these_choices_and_this_score(tmp_path: Path) -> None:
    adapter = bayesian()
    anchors = labelled(adapter)
    options: dict[str, Any] = {"checkpoint": tmp_path / "a.json", "recipe": "paper", "tolerance": 0.05}
    first = look(adapter, anchors, batch_size=5, **options)
    shapes = small_sets.shapes_through(adapter.anatomy.head)
    again = look(adapter, anchors, batch_size=3, **options)
    assert (again.sigma, again.evaluations) == (first.sigma, first.evaluations) and shapes == []
    for change, named in (
        ({"score": "token"}, "score is 'sequence' there and 'token' here"),
        ({"by_length": True}, "score is 'sequence' there and 'sequence by length' here"),
        ({"choice_tokens": (*CHOICES[:3], (12, 13, 14, 16))}, "anchors is .* there and .* here"),
    ):
        with pytest.raises(ConfigError, match=f"is of another search: {named}; give another checkpoint"):
            look(adapter, replace(anchors, **change), **options)


# Adaptive sampling --------------------------------------------------------------------------------------------------

MOST = 30


@pytest.mark.parametrize("batch_size", zoo.slow_but([1, 3, None], 3))
@pytest.mark.parametrize("depth", ["all", 2, "head"])
def test_adaptive_items_have_the_fixed_runs_first_samples(depth: int | str, batch_size: int | None) -> None:
    adapter, data = bayesian("llama-head", depth=depth), small_sets.sequences(16, by_length=True)
    sigma = {"all": 0.05, 2: 0.1, "head": 0.3}[depth]
    fixed = predict(adapter, data, MOST, sigma=sigma)
    found = predict(adapter, data, MOST, adaptive=0.99, sigma=sigma, batch_size=batch_size)
    drawn = found.samples_drawn.tolist()
    assert len(set(drawn)) > 2 and set(drawn) <= {2 * n for n in (*StoppingRule(0.99, MOST // 2).looks, MOST // 2)}
    for i, k in enumerate(drawn):
        assert torch.allclose(found.sample_probabilities[:k, i], fixed.sample_probabilities[:k, i], atol=1e-5)
        assert found.sample_probabilities[k:, i].isnan().all()
    assert (found.labels == fixed.labels).float().mean() >= 15 / 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "by_length", "sigma", "adaptive"), [("llama-head", False, 1.5, 0.999), ("gpt2", True, 0.6, 0.9)]
)
def test_adaptive_equals_separate_passes(name: str, by_length: bool, sigma: float, adaptive: float) -> None:
    adapter, data = bayesian(name, depth=2), small_sets.sequences(8, by_length=by_length)
    found = predict(adapter, data, 12, adaptive=adaptive, sigma=sigma, batch_size=2)
    alone = zoo.separate_passes(adapter, range(12), sigma, token_logs(adapter, data))
    lengths = torch.tensor([len(c) for c in CHOICES]) if by_length else torch.ones(4)
    each = torch.softmax(alone.sum(-1) / lengths, -1)
    drawn = found.samples_drawn.tolist()
    assert len(set(drawn)) > 1
    expected = torch.stack([each[:k, i].mean(0) for i, k in enumerate(drawn)])
    assert torch.allclose(found.probabilities, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("most", [math.inf, 5])
def test_adaptive_trunk_runs_once_an_item_even_in_parts(most: float) -> None:
    """Later batches hold whole items, packed from several of the first batches, and from halves that part an item's rows."""
    adapter, data = bayesian(depth=2, sigma=0.1), small_sets.sequences(16, by_length=True)
    fixed = predict(adapter, data, MOST)
    below, above = (small_sets.rows_through(adapter.anatomy.blocks[i].input_layernorm) for i in (1, 2))

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        if len(args[0] if args else kwargs["hidden_states"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    adapter.anatomy.blocks[3].register_forward_pre_hook(refuse, with_kwargs=True)
    found = predict(adapter, data, MOST, adaptive=0.99, batch_size=2)
    drawn = found.samples_drawn
    assert 8 < int(drawn.max()) and drawn.float().mean() < MOST
    for i, k in enumerate(drawn.tolist()):
        assert torch.allclose(found.sample_probabilities[:k, i], fixed.sample_probabilities[:k, i], atol=1e-5)
    if most == math.inf:
        assert below == [2] * 8 and sum(above) == int(drawn.sum())
    else:
        # What fails at first runs its lower blocks again; nothing does once the kept trunk is in parts that fit.
        assert sum(below) < 2 * 16 * 4
