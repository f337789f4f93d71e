"""Choices of several tokens, scored as sequences: equal to separate passes, and no logits of positions nobody asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor

import tfb_ext
from tfb_ext import Example, encode, fan, predict
from tfb_ext.data import Encoded

SIGMA, SAMPLES = 0.3, 4
CHOICES = ((7, 8, 9), (7, 11), (5,), (12, 13, 14, 15))  # two of them share their first token


def bayesian(name: str = "llama", **options: Any) -> Any:
    return tfb_ext.bayesianize(zoo.peft_model(name), **{"sigma": SIGMA, **options})


def made(items: int = 5, **options: Any) -> Encoded:
    names = ("a", "b", "c", "d")
    return replace(small_sets.encoded(items), choice_ids=None, choice_tokens=CHOICES, choices=names, **options)


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


@pytest.mark.parametrize("batch_size", [3, None])
@pytest.mark.parametrize(
    ("name", "depth"), [("llama-head", "all"), ("llama-head", 2), ("llama-head", "head"), ("gpt2", 2)]
)
def test_equals_separate_passes(
    name: str, depth: int | str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, data = bayesian(name, depth=depth), made()
    alone = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, token_logs(adapter, data))
    assert alone.std(0).max() > 0.01
    expected = torch.softmax(alone.sum(-1), -1)  # the product for each sample, normalised among the choices
    for piece in (fan.FOLD_BYTES, 1):  # all samples in one piece of head outputs, and one in each
        monkeypatch.setattr(fan, "FOLD_BYTES", piece)
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
    adapter, data = bayesian("gemma2"), made(3)
    alone = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, token_logs(adapter, data))
    found = predict(adapter, data, SAMPLES)
    assert torch.allclose(found.sample_probabilities, torch.softmax(alone.sum(-1), -1), atol=1e-5)


def test_mean_adapter() -> None:
    adapter, data = bayesian(), made()
    with torch.no_grad():
        expected = torch.softmax(token_logs(adapter, data)().sum(-1), -1)
    assert torch.allclose(predict(adapter, data, 0).probabilities, expected, atol=1e-5)


def test_the_head_makes_the_choices_positions_alone() -> None:
    adapter, data = bayesian(), made()
    shapes = small_sets.shapes_through(adapter.anatomy.head)
    predict(adapter, data, SAMPLES, batch_size=4)
    assert {shape[1:] for shape in shapes} == {
        (4, zoo.VOCAB),
        (2, zoo.VOCAB),
    }  # as many as a batch's longest choice has


class Words:
    """A tokenizer with a token for each letter."""

    eos_token, eos_token_id, pad_token_id = "</s>", 2, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [10 + ord(c) % 80 for c in text if c != "_"]}

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
        ({}, ("ab", "a"), "'ab' is 2 tokens.*or score='sequence'"),
        ({"score": "sequence"}, ("_", "a"), "'_' has no tokens"),
        ({"score": "sequence"}, ("a_", "a"), "'a_' and 'a' are the same tokens"),
        ({"score": "mean"}, ("a", "b"), "score='mean': expected 'sequence', 'token'"),
        ({"score": "token", "head": True}, ("a", "b"), "score='token' with head=True"),
        ({"by_length": True}, ("a", "b"), "by_length=True without score="),
    ):
        with pytest.raises(ValueError, match=wanted):
            encode([Example("abc", choices)], tokenizer, **options)


def test_refuses_what_does_not_serve_sequences() -> None:
    with pytest.raises(ValueError, match="as sequences, which adaptive= does not serve"):
        predict(bayesian(), made(), 30, adaptive=0.99)
    with pytest.raises(ValueError, match=r"score='sequence'\), which only tfb_ext.predict\(\) serves"):
        tfb_ext.search_sigma(bayesian(), made(), progress=False)
    with pytest.raises(ValueError, match="classification head"):
        predict(bayesian("llama-cls"), made(), 2)
