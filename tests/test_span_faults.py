"""Spans where a number could be wrong without a word: windows, masks, pooled tokens, caches of others, labels of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import small_sets
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from test_span import SAMPLES, SIGMA, assert_rows, passes
from torch import Tensor
from zoo import BLOCKS, VOCAB, bayesian, inputs, randomise

import tfb_ext
from tfb_ext.errors import GuardError, SamplingError
from tfb_ext.forward.caches import cache_argument, cache_of

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}


def adapter_of(config: Any, targets: list[str], span: Any = "answer") -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    randomise(peft)
    return tfb_ext.bayesianize(peft.eval(), sigma=SIGMA, span=span)


WINDOWED: dict[str, Any] = {
    # Which make the mask, and pass no window to the attention function.
    "qwen2moe": lambda: tf.Qwen2MoeConfig(
        **COMMON, **EXPERTS, num_experts=4, use_sliding_window=True, sliding_window=12, max_window_layers=2
    ),
    "phimoe": lambda: tf.PhimoeConfig(**COMMON, num_local_experts=4, sliding_window=12),
    # Which passes a window, and makes a mask without.
    "olmoe": lambda: tf.OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2, sliding_window=12),
    "mistral": lambda: tf.MistralConfig(**COMMON, head_dim=8, sliding_window=12),
}


@pytest.mark.slow
@pytest.mark.parametrize("span", ["answer", 3])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_counts_where_the_model_has_one(name: str, span: Any) -> None:
    adapter = adapter_of(WINDOWED[name](), ["q_proj", "v_proj"], span)
    batch = inputs(3, 30)
    try:
        with adapter.predictive(SAMPLES):
            out = adapter.model(**batch).logits
    except GuardError:
        return  # a refusal is no wrong number
    assert name != "mistral" or out is not None
    assert_rows(out, passes(adapter, batch, [1 if span == "answer" else span] * 3), batch)


def test_a_causal_mask_by_columns_is_refused() -> None:
    config = tf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=4, num_heads=4, max_position_embeddings=128,
        attention_types=[[["global", "local"], 2]], window_size=24,
    )  # fmt: skip
    adapter = adapter_of(config, ["q_proj", "v_proj"])
    with pytest.raises(GuardError, match="causal mask of its own by columns"), adapter.predictive(2):
        pass


def test_a_prepared_mask_that_is_not_causal_is_refused() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span="answer")
    causal = torch.tril(torch.ones(9, 9, dtype=torch.bool))[None, None].repeat(3, 1, 1, 1)
    apart = causal.clone()
    apart[:, :, 5:, :5] = False
    batch = inputs(3, 9, padded=False)
    with adapter.predictive(SAMPLES):
        whole = adapter.model(**batch).logits
        torch.testing.assert_close(adapter.model(**{**batch, "attention_mask": causal}).logits, whole)
        for mask in (
            apart,
            torch.zeros(apart.shape).masked_fill(~apart, torch.finfo(torch.float32).min),
            {"full_attention": apart},
        ):
            with pytest.raises(SamplingError, match="is not causal"):
                adapter.model(**{**batch, "attention_mask": mask})


def test_a_pooled_token_that_is_not_the_last_is_refused() -> None:
    adapter = bayesian("llama-cls", sigma=SIGMA, span="answer")
    batch = inputs(3, 9, left=False)
    del batch["attention_mask"]
    batch["input_ids"][1, -1] = 0  # padding for the model, a token for us
    with adapter.predictive(SAMPLES), pytest.raises(SamplingError, match="pools a token that is not the last"):
        adapter.model(**batch)


def test_a_step_that_hides_earlier_tokens_is_refused() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span="answer")
    batch = inputs(2, 8, padded=False)
    name = cache_argument(adapter.anatomy.model)
    with adapter.predictive(SAMPLES):
        cache = cache_of(adapter.model(**batch, use_cache=True))
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[:, 3] = 0
        step = {"input_ids": batch["input_ids"][:, :1], "attention_mask": mask, name: cache}
        with pytest.raises(SamplingError, match="tokens before this step's"):
            adapter.model(**step)


def test_a_cache_of_a_span_serves_inside_its_context_alone() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span="answer")
    batch, name = inputs(2, 8, padded=False), cache_argument(adapter.anatomy.model)
    step = {"input_ids": batch["input_ids"][:, :1]}
    with adapter.predictive(SAMPLES):
        cache = cache_of(adapter.model(**batch, use_cache=True))
        inside = adapter.model(**step, **{name: cache}).logits
    with pytest.raises(SamplingError, match="context that filled it has ended"), torch.no_grad():
        adapter.model(**step, **{name: cache})
    with adapter.predictive(SAMPLES):
        cache = cache_of(adapter.model(**batch, use_cache=True))
    with adapter.predictive(SAMPLES):
        torch.testing.assert_close(adapter.model(**step, **{name: cache}).logits, inside)
        cache.batch_repeat_interleave(2)
        twice = {"input_ids": step["input_ids"].repeat_interleave(2, 0)}
        assert adapter.model(**twice, **{name: cache}).logits.shape[0] == 4


def test_labels_of_tokens_say_where_an_answer_begins() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span="answer")
    batch = {n: v for n, v in inputs(3, 9).items()}
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    found = tfb_ext.predict(adapter, [{**batch, "labels": labels}], SAMPLES).sample_probabilities
    expected = passes(adapter, batch, [3] * 3)  # the position before the first label, and what follows
    wanted = torch.cat([rows[:, -3:-1] for rows in expected], 1).exp()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_positions_to_keep_are_counted_as_the_model_does() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span="answer")
    batch = inputs(2, 9, padded=False)
    with adapter.predictive(SAMPLES):
        whole = adapter.model(**batch).logits
        torch.testing.assert_close(adapter.model(**batch, logits_to_keep=-2).logits, whole[:, 2:])


@pytest.mark.parametrize("span", ["all", "answer", 3, 50])
@pytest.mark.parametrize("batch_size", [1, None])
def test_choices_of_one_token_and_short_prompts(span: Any, batch_size: int | None) -> None:
    from dataclasses import replace

    adapter = bayesian("llama", sigma=SIGMA, span=span)
    data = small_sets.sequences()
    single = replace(data, choice_tokens=((5,), (6,), (7,), (8,)), item_choice_tokens=None)
    for items in (data, single):
        shared = tfb_ext.predict(adapter, items, 4, batch_size=batch_size).sample_probabilities
        adapter.shares_prompts = lambda: False
        rows: Tensor = tfb_ext.predict(adapter, items, 4).sample_probabilities
        del adapter.shares_prompts
        torch.testing.assert_close(shared, rows, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_search_over_spans_and_depths_of_choices() -> None:
    adapter, data = bayesian("llama", sigma=SIGMA), small_sets.sequences()
    options: dict[str, Any] = {"samples": 4, "progress": False, "apply": False}
    found = tfb_ext.search_sigma(adapter, data, span=[3, "all"], depth=["all", 2], **options)
    assert {(d.depth, d.span) for d in found.depths} == {("all", "all"), ("all", 3), (2, "all"), (2, 3)}
