"""transformers' own ``generate`` under the predictive, against an oracle of separate uncached passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import small_sets
import torch
import transformers
import zoo
from torch import Tensor

import tfb_ext

SAMPLES, SIGMA, NEW = 3, 0.3, 5


def step_log_probabilities(adapter: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Log of the mean probability (B, V) of the next token, from separate passes without any cache."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def call() -> Tensor:
        out = adapter.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return torch.log_softmax(out.logits[:, -1].float(), dim=-1)

    return zoo.average(zoo.separate_passes(adapter, range(SAMPLES), SIGMA, call))


def oracle(adapter: Any, batch: dict[str, Tensor], choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (B, NEW) and the log probabilities (B, NEW, V) that they were chosen from."""
    ids, mask, steps = batch["input_ids"], batch["attention_mask"], []
    for _ in range(NEW):
        steps.append(step_log_probabilities(adapter, ids, mask))
        token = choose(steps[-1])[:, None]
        ids = torch.cat([ids, token], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
    return ids[:, -NEW:], torch.stack(steps, dim=1)


def generate(adapter: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with adapter.predictive(SAMPLES):
        return adapter.model.generate(**batch, **{**defaults, **options})


def bayesian(name: str, depth: Any, device: str = "cpu") -> Any:
    return tfb_ext.bayesianize(zoo.peft_model(name).to(device), depth=depth, sigma=SIGMA)


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("depth", ["all", 2])
@pytest.mark.parametrize("name", zoo.slow_but(["llama", "qwen2", "gemma2", "gemma3", "mistral", "gpt2"], "llama"))
def test_greedy_equals_the_oracle(name: str, depth: Any, device: str) -> None:
    adapter, batch = bayesian(name, depth, device), zoo.prompt(3, device)
    tokens, steps = oracle(adapter, batch, lambda logp: logp.argmax(-1))
    top = steps.topk(2, dim=-1).values
    assert (top[..., 0] - top[..., 1]).min() > 1e-4  # no tie that rounding could turn
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        out = generate(adapter, batch, return_dict_in_generate=True, output_logits=True, **cache)
        assert torch.equal(out.sequences[:, -NEW:], tokens), cache
        assert torch.allclose(torch.stack(out.logits, dim=1), steps, atol=1e-4), cache
    with torch.no_grad():
        mean = adapter.model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert mean.shape == (3, 6 + NEW)


@pytest.mark.parametrize("depth", zoo.slow_but(["all", 2], 2))
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_sampled_tokens_come_from_the_mean_probability(depth: Any, cache: dict[str, Any]) -> None:
    adapter, batch = bayesian("qwen2", depth), zoo.prompt(2, "cpu")

    def draw(logp: Tensor) -> Tensor:
        return torch.multinomial(logp.exp(), 1)[:, 0]

    torch.manual_seed(12)
    tokens, steps = oracle(adapter, batch, draw)
    assert not torch.equal(tokens, steps.argmax(-1))
    torch.manual_seed(12)
    drawn = generate(adapter, batch, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, **cache)
    assert torch.equal(drawn[:, -NEW:], tokens)


@pytest.mark.parametrize("asked", zoo.slow_but([{}, {"output_hidden_states": True}, {"output_attentions": True}], {}))
def test_a_prompt_passes_the_last_block_at_its_last_position(asked: dict[str, bool]) -> None:
    """Unless someone looks at the others."""
    adapter, batch = bayesian("llama", 2), zoo.prompt(2, "cpu")
    adapter.model.base_model.model.set_attn_implementation("eager")  # the one that has attentions to give
    zoo.compared(adapter)
    below, last = (small_sets.shapes_through(adapter.anatomy.blocks[i].mlp) for i in (-2, -1))
    generate(adapter, batch, return_dict_in_generate=True, **asked)
    width = batch["input_ids"].shape[1]
    assert [s[1] for s in below] == [width] + [1] * (NEW - 1)
    assert [s[1] for s in last] == [width if asked else 1] + [1] * (NEW - 1)


def test_sampling_does_not_move_the_posterior() -> None:
    """Tokens use torch's generator, weights do not: with one seed the same prompt gives the same text twice."""
    adapter, batch = bayesian("llama", 2), zoo.prompt(2, "cpu")
    texts = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        texts.append(generate(adapter, batch, do_sample=True))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("name", zoo.slow_but(["llama", "gpt2", "gemma3"], "llama"))
@pytest.mark.parametrize("depth", ["all", 2])
@pytest.mark.parametrize("cache", zoo.slow_but([{}, {"cache_implementation": "static"}], {}))
def test_beam_search_equals_its_uncached_run(name: str, depth: Any, cache: dict[str, Any]) -> None:
    adapter, batch = bayesian(name, depth), zoo.prompt(2, "cpu")
    options = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    plain = generate(adapter, batch, use_cache=False, **options)
    beams = plain.beam_indices[:, :NEW].reshape(2, 2, NEW) % 3
    assert (beams[..., 1:] != beams[..., :-1]).any()  # some beam was really reordered
    cached = generate(adapter, batch, **options, **cache)
    assert torch.equal(cached.sequences, plain.sequences)
    assert torch.allclose(cached.sequences_scores, plain.sequences_scores, atol=1e-4)


def test_several_sequences_of_one_prompt() -> None:
    adapter, batch = bayesian("llama", 2), zoo.prompt(2, "cpu")
    torch.manual_seed(0)
    out = generate(adapter, batch, do_sample=True, num_return_sequences=2)
    assert out.shape == (4, 6 + NEW)
    assert torch.equal(out[:, :6], batch["input_ids"].repeat_interleave(2, 0))
    assert not torch.equal(out[0], out[1])


def test_lower_blocks_keep_a_cache_of_the_batch() -> None:
    adapter, batch = bayesian("llama", 1), zoo.prompt(2, "cpu")
    out = generate(adapter, batch, return_dict_in_generate=True)
    assert [layer.keys.shape[0] for layer in out.past_key_values.layers] == [2, 2, 2, 2 * SAMPLES]


def test_a_sample_is_one_weight_over_all_steps() -> None:
    """One sample alone must generate what the model with that sample's weights written in generates."""
    adapter, batch = bayesian("llama", "all"), zoo.prompt(2, "cpu")
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = []
    for sample in (0, 2):
        with adapter.predictive([sample]):
            text = adapter.model.generate(**batch, **options)
        written = zoo.separate_passes(adapter, [sample], SIGMA, lambda: adapter.model.generate(**batch, **options))
        assert torch.equal(text, written[0])
        texts.append(text)
    assert not torch.equal(texts[0], texts[1])


# Fresh noise at every step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["all", 2])
@pytest.mark.parametrize("cache", zoo.slow_but([{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], {}))
def test_token_noise_is_fresh_at_every_step(depth: Any, cache: dict[str, Any]) -> None:
    """Against rows laid out by the caller, whose every step has a seed of its own."""
    adapter, batch = bayesian("llama", depth), zoo.prompt(2, "cpu")
    adapter.mode, seed = "token", adapter.seed
    out = generate(adapter, batch, return_dict_in_generate=True, output_logits=True, **cache)
    ids, mask, past = batch["input_ids"], batch["attention_mask"], transformers.DynamicCache()
    calls = [(0, 4), (4, 6)] if cache.get("prefill_chunk_size") else [(0, 6)]
    calls += [(6 + step, 7 + step) for step in range(NEW - 1)]
    steps, sequences = [], out.sequences
    for start, stop in calls:
        mask = torch.cat([batch["attention_mask"], torch.ones(2, sequences.shape[1] - 6, dtype=torch.int64)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        adapter.seed = (seed + start * 0x9E3779B97F4A7C15) % 2**64
        rows = {
            "input_ids": sequences[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
        }
        with adapter.sampling(SAMPLES):
            wide = {name: value.repeat(SAMPLES, 1) for name, value in rows.items()}
            logits = adapter.model(**wide, past_key_values=past, use_cache=True).logits[:, -1]
        steps.append(zoo.average(torch.log_softmax(logits.view(SAMPLES, 2, -1), dim=-1)))
    adapter.seed = seed
    assert ids.shape[1] == 6
    assert torch.allclose(torch.stack(out.logits, dim=1), torch.stack(steps[-NEW:], dim=1), atol=1e-4)


def test_a_steps_noise_is_not_that_of_another() -> None:
    batch, device = bayesian("llama", "all").batch(SAMPLES), torch.device("cpu")
    seeds = [batch.after(tokens).tensors(device)[2].item() for tokens in range(1000)]
    assert len(set(seeds)) == 1000 and seeds[0] == batch.seed and batch.after(0) is batch
    later = batch.after(3)
    assert later.samples == batch.samples and later.part(0, 2).tensors(device)[2].item() == seeds[3]
    counted = torch.tensor(3)
    on_device = batch.after(counted)
    counted += 1  # a static cache counts in place
    assert on_device.tensors(device)[2].item() == seeds[3]
    assert batch.after(3).tensors(device)[2].item() == (3 * 0x9E3779B97F4A7C15) % 2**64 - 2**64
