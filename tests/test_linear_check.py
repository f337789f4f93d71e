"""predict(..., by="linear", check=True): a warning where samples are not what the closed form says, and none where they are."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import small_sets
import test_heads
import torch
import zoo

import tfb_ext
from tfb_ext.prediction import bends

LARGE, SMALL = "is too large for by='linear'", 0.002


def told(adapter: Any, data: Any, sigma: float, predict: Any = tfb_ext.predict) -> list[str]:
    """The warnings of a checked prediction, which is the one that is not checked."""
    plain = predict(adapter, data, by="linear", sigma=sigma)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        checked = predict(adapter, data, by="linear", sigma=sigma, check=True)
    for name in ("probabilities", "aleatoric") if hasattr(plain, "probabilities") else ("mean", "variance"):
        assert torch.equal(getattr(plain, name), getattr(checked, name))
    return [str(each.message) for each in found if LARGE in str(each.message)]


@pytest.mark.parametrize(("span", "mode"), [("all", "weight"), ("answer", "weight"), ("all", "token")])
def test_warns_where_logits_bend(span: Any, mode: str) -> None:
    adapter, data = zoo.bayesian("llama", span=span, mode=mode, antithetic=False), small_sets.encoded(40)
    assert not told(adapter, data, SMALL)
    (message,) = told(adapter, data, 1.0)
    assert re.match(
        rf"sigma = 1 {LARGE}: on 32 items 32 samples differ from it, in probability by 0\.\d+ \(0\.0\d+ would be chance\) and in "
        r"entropy by 0\.\d+ \(0\.\d+ would be chance\)\. Fix: by='samples'",
        message,
    )


def test_the_measured_gap_is_that_of_many_samples() -> None:
    adapter, data = zoo.bayesian("llama", sigma=0.5, span="answer"), small_sets.encoded(32)
    (message,) = told(adapter, data, 0.5)
    gap, chance = map(float, re.findall(r"probability by (\S+) \((\S+) would", message)[0])
    sampled = tfb_ext.predict(adapter, data, 1000).probabilities
    exact = (sampled - tfb_ext.predict(adapter, data, by="linear").probabilities).square().mean().sqrt()
    assert abs(gap - float(exact)) < chance


def test_a_head_alone_is_exact_at_every_sigma_and_a_cap_on_its_logits_is_not() -> None:
    data = small_sets.encoded(32)
    for name, bent in (("llama-head", False), ("gemma2", True)):
        adapter = tfb_ext.bayesianize(zoo.peft_model(name, target_modules=["q_proj", "lm_head"]), depth="head")
        assert not told(adapter, data, SMALL)
        assert len(told(adapter, data, 2.0)) == bent


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_heads(problem: str) -> None:
    adapter = test_heads.bayesian("Bert", "SequenceClassification", 3, problem)
    data = test_heads.batches("Bert")
    predict = tfb_ext.predict_regression if problem == "regression" else tfb_ext.predict_multi_label
    assert not told(adapter, data, SMALL, predict)
    (message,) = told(adapter, data, 2.0, predict)
    assert ("the variance by" if problem == "regression" else "probability by") in message


def test_batches_that_come_once_are_all_predicted() -> None:
    adapter = zoo.bayesian("llama-cls", sigma=SMALL)
    batches = [zoo.inputs(4, 9)] * 10
    found = tfb_ext.predict(adapter, iter(batches), by="linear", check=True)
    assert len(found.probabilities) == 40
    torch.testing.assert_close(found.probabilities, tfb_ext.predict(adapter, batches, by="linear").probabilities)
    assert len(bends.some_items(iter(batches))[0]) == 8  # type: ignore[arg-type]


def test_sequences_and_refusals() -> None:
    adapter = zoo.bayesian("llama", span="answer")
    assert not told(adapter, small_sets.sequences(5), SMALL)
    assert len(told(adapter, small_sets.sequences(5), 2.0)) == 1
    with pytest.raises(ValueError, match="check: got True, expected False with by='samples'.*Fix: leave it out"):
        tfb_ext.predict(adapter, small_sets.encoded(2), sigma=0.1, check=True)
    with pytest.raises(ValueError, match="the data's score: got 'token'"):
        tfb_ext.predict(adapter, small_sets.sequences(2, score="token"), sigma=0.1, by="linear", check=True)


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_noise_alone_is_seldom_told(rank: int) -> None:
    """Of sets without a gap 2 % or fewer are told; one of twice what chance gives is."""
    generator = torch.Generator().manual_seed(rank)
    factor = torch.randn(rank, 60, generator=generator, dtype=torch.float64)
    noise = torch.randn(1000, 16, rank, generator=generator, dtype=torch.float64) @ factor
    wrong = [gap > error for gap, error in map(bends._gap, noise)]
    assert sum(wrong) < 0.025 * len(wrong)
    _, error = bends._gap(noise[0])
    gap, error = bends._gap(noise[0] + 3 * error * torch.ones(60))
    assert gap > error


def test_the_code_of_the_page_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "linear.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"model": zoo.peft_model("llama"), "questions": small_sets.encoded(6), "tokenizer": None}
    names["prompts"] = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3).long()}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and names["outputs"].covariance.shape == (6, 3, 3)
    assert names["found"].standard_deviation.shape == names["found"].log_probabilities.shape
