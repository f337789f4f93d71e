"""Generation whose prompt is the mean adapter's: every token against passes of one row and one sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_span import passes
from torch import Tensor
from zoo import DEVICES, average, bayesian, prompt, slow_but

import tfb_ext
from tfb_ext.generation.decoding import captured_decoding

SIGMA, SAMPLES, NEW = 0.1, [0, 1, 2, 5], 5


def scored(adapter: Any, sequences: Tensor, mask: Tensor, width: int) -> Tensor:
    """(S, R, NEW) log probabilities of the new tokens under each sample, by the oracle."""
    count, span = sequences.shape[1] - width, adapter.place.span
    mask = torch.cat([mask, mask.new_ones(len(sequences), count)], 1)
    batch = {"input_ids": sequences, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    rows = passes(adapter, batch, [count + span] * len(sequences), SAMPLES)
    tokens = sequences[:, width:]
    return torch.stack([r[:, -count - 1 : -1].gather(2, t.expand(4, count)[..., None])[..., 0] for r, t in zip(rows, tokens, strict=True)], 1)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "span", "cache"),
    slow_but(
        [(n, s, c) for n in ("llama", "mistral", "gemma3", "gpt2", "llama-head") for s in ("answer", 3) for c in (None, "static")],
        ("llama", "answer", None), ("llama", 3, "static"), ("mistral", "answer", "static"), ("gemma3", 3, None),
    ),
)  # fmt: skip
def test_greedy_tokens_and_their_scores(name: str, span: Any, cache: str | None, device: str) -> None:
    adapter = bayesian(name, device, sigma=SIGMA, span=span)
    given = prompt(3, device)
    options = {} if cache is None else {"cache_implementation": cache}
    found = tfb_ext.generate(
        adapter, given, samples=SAMPLES, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options
    )
    sequences = found.sequences.to(device)
    expected = scored(adapter, sequences, given["attention_mask"], 6)
    torch.testing.assert_close(found.sample_log_probabilities.to(device), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.log_probabilities.to(device), average(expected), atol=1e-4, rtol=1e-4)
    # Each token is the most probable one of those that may come: the end may not, so early.
    mask = torch.cat([given["attention_mask"], torch.ones_like(sequences[:, 6:])], 1)
    batch = {"input_ids": sequences, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    for row, logs in enumerate(passes(adapter, batch, [NEW + adapter.place.span] * 3, SAMPLES)):
        mean = average(logs)[-NEW - 1 : -1]
        mean[:, 2] = -100.0
        best = mean.max(-1).values - mean.gather(1, sequences[row, 6:, None])[:, 0]
        assert best.max() < 1e-4


@pytest.mark.parametrize("cache", [None, "static"])
def test_beams(cache: str | None) -> None:
    adapter = bayesian("llama", sigma=SIGMA, span="answer")
    given = prompt(2)
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    if cache is None:
        with adapter.predictive(SAMPLES):
            out = adapter.model.generate(
                **given, **options, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
            )
        sequences, scores = out.sequences, out.sequences_scores
        mask = given["attention_mask"].repeat_interleave(2, 0)
        expected = average(scored(adapter, sequences, mask, 6)).sum(1) / NEW
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    else:
        plain = tfb_ext.generate(adapter, given, samples=SAMPLES, **options)
        static = tfb_ext.generate(adapter, given, samples=SAMPLES, **options, cache_implementation=cache)
        assert torch.equal(plain.sequences, static.sequences)


def test_the_cache_holds_the_prompt_once() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span="answer")
    given = prompt(3)
    with captured_decoding(adapter) as decoding:
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "cache_implementation": "static"}
        first = tfb_ext.generate(adapter, given, samples=SAMPLES, **options)
        with adapter.predictive(SAMPLES):
            cache = decoding.cache(3, 6 + NEW, 6)
        again = tfb_ext.generate(adapter, given, samples=SAMPLES, **options)
    assert cache.layers[0].keys.shape[:1] == (3,) and cache.layers[0].max_cache_len == 64
    assert torch.equal(first.sequences, again.sequences)


def test_rows_that_end_early_are_scored_in_their_places() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span=2)
    given = prompt(3)
    free = tfb_ext.generate(adapter, given, samples=SAMPLES, max_new_tokens=8, do_sample=False)
    stop = int(free.sequences[1, 6 + 2])
    ended = tfb_ext.generate(adapter, given, samples=SAMPLES, max_new_tokens=8, do_sample=False, eos_token_id=stop)
    for row in range(3):
        length = int(ended.lengths[row])
        torch.testing.assert_close(
            ended.sample_log_probabilities[:, row, :length],
            free.sample_log_probabilities[:, row, :length],
            atol=1e-4,
            rtol=1e-4,
        )
        torch.testing.assert_close(ended.total[row, :length], free.total[row, :length], atol=1e-4, rtol=1e-4)


def test_what_cuts_the_cache_is_refused() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span="answer")
    with pytest.raises(ValueError, match="span: got 'answer' with an assistant model or prompt lookup"):
        tfb_ext.generate(adapter, prompt(1), samples=2, prompt_lookup_num_tokens=2, max_new_tokens=4)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        tfb_ext.generate(adapter, prompt(1), samples=2, prefill_chunk_size=2, max_new_tokens=4)
    with adapter.predictive(2), pytest.raises(tfb_ext.errors.SamplingError, match="cache.crop\\(\\) cuts columns off"):
        ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
        adapter.model.generate(input_ids=ids, attention_mask=ids * 0 + 1, prompt_lookup_num_tokens=2, max_new_tokens=8)
