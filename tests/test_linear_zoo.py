"""The covariance to first order of every architecture that samples, at every span: that of mirrored samples of a tiny sigma."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import small_sets
import test_linear
import torch
import transformers as tf
import zoo
from peft import LoraConfig, get_peft_model

import tfb_ext
from tfb_ext.forward import linear

NAMES = [(name, span, depth) for name in zoo.MODELS for span in ("all", "answer", 3) for depth in ("all", 2)]
NAMES = [row for row in NAMES if row[0] != "bert" or row[1] == "all"]
# Routing to experts tips over where two of them are level, which is no small change.
SIGMAS = {"mixtral": 2e-5}


def check(adapter: Any, data: Any, samples: int, sigma: float = 1e-3) -> None:
    found = adapter.gaussian(data)
    mean = tfb_ext.predict(adapter, data, 0)
    torch.testing.assert_close(found.predict(0).probabilities, mean.probabilities, atol=1e-5, rtol=0)
    test_linear.assert_moments(found, test_linear.logs(adapter, data, samples, sigma), sigma)


@pytest.mark.parametrize(
    ("name", "span", "depth"),
    zoo.slow_but(
        NAMES,
        *[(name, "all", "all") for name in zoo.MODELS],
        *[(name, "answer", 2) for name in ("mistral", "gemma3", "gpt2", "llama-cls", "phi3")],
    ),
)
def test_equals_the_covariance_of_samples(name: str, span: Any, depth: Any) -> None:
    adapter = zoo.bayesian(name, span=span, depth=depth)
    check(adapter, small_sets.encoded(3, head=name in zoo.CLASSIFIERS), 400, SIGMAS.get(name, 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_equals_the_covariance_of_many_samples(name: str) -> None:
    adapter = zoo.bayesian(name)
    check(adapter, small_sets.encoded(3, head=name in zoo.CLASSIFIERS), 8000, SIGMAS.get(name, 1e-3))


@pytest.mark.parametrize("name", list(zoo.MODELS))
@pytest.mark.parametrize("span", ["all", "answer"])
def test_attention_without_a_mask_is_attention(name: str, span: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows without padding; what is not plain causal attention is left to the model."""
    if name == "bert" and span != "all":
        return
    adapter, attended = zoo.bayesian(name, span=span, depth=2), []
    data = small_sets.encoded(3, head=name in zoo.CLASSIFIERS)
    for width in (3, 9):  # tokens, of which a window of 4 sees all or not
        rows = replace(data, token_ids=[list(range(11 + i, 11 + i + width)) for i in range(3)])
        with linear.ready(adapter, adapter.place):
            run = linear.Linear(adapter, rows, adapter.place, batch_size=3)
            found = run.moments(False)
            attended.append(run.is_causal)
            with monkeypatch.context() as patch:
                patch.setattr(linear.Linear, "_attending", lambda *_: nullcontext())
                expected = linear.Linear(adapter, rows, adapter.place, batch_size=3).moments(False)
        for part in ("mean", "covariance"):
            one, other = getattr(found, part), getattr(expected, part)
            torch.testing.assert_close(one, other, atol=1e-5 * float(other.abs().max()), rtol=0)
    own = adapter.anatomy.model.config.get_text_config()
    windowed = getattr(own, "sliding_window", None) is not None
    if name in ("llama", "qwen2", "gpt2", "llama-head", "llama-cls"):
        assert attended == [True, True]
    elif name == "mistral":
        assert windowed and attended == [True, False]
    elif name == "bert":
        assert attended == [False, False]


@pytest.mark.parametrize("span", ["all", "answer"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention(attention: str, span: Any) -> None:
    adapter = zoo.bayesian("llama", span=span)
    found = adapter.gaussian(small_sets.encoded(5))
    adapter.anatomy.model.set_attn_implementation(attention)
    test_linear.assert_same(adapter.gaussian(small_sets.encoded(5)), found)


def other(name: str, targets: list[str], **config: Any) -> Any:
    """A Bayesian adapter of an architecture that is not in the zoo."""
    torch.manual_seed(0)
    common = {n: v for n, v in zoo._COMMON.items() if name == "Olmo" or n != "num_key_value_heads"}
    made = getattr(tf, f"{name}Config")(**{**common, "num_labels": 3, **config})
    kind = "ForCausalLM" if name in ("Olmo", "GPTNeoX") else "ForSequenceClassification"
    model = getattr(tf, name + kind)(made)
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    zoo.randomise(peft)
    return tfb_ext.bayesianize(peft.eval())


@pytest.mark.parametrize(
    ("name", "targets", "config"),
    [
        ("Olmo", ["q_proj", "k_proj", "v_proj"], {"clip_qkv": 0.5}),  # writes into its layers' outputs
        ("GPTNeoX", ["query_key_value", "dense"], {}),
        ("Roberta", ["query", "dense"], {"max_position_embeddings": 130}),  # with a layer in its head
        ("ModernBert", ["Wqkv", "Wo"], {"local_attention": 4}),
        ("Bert", ["value", "pooler.dense", "classifier"], {}),
    ],
)
def test_other_architectures(name: str, targets: list[str], config: dict[str, Any]) -> None:
    adapter = other(name, targets, **config)
    for span in ("all", 2) if name in ("Olmo", "GPTNeoX") else ("all",):
        adapter.span = span
        check(adapter, small_sets.encoded(3, head=name not in ("Olmo", "GPTNeoX")), 400)


def test_a_recurrent_state() -> None:
    """All of its tokens may be random, not the last alone."""
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model = tf.MambaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    targets = ["in_proj", "x_proj"]
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    zoo.randomise(peft)
    adapter = tfb_ext.bayesianize(peft.eval())
    data = small_sets.encoded(1)  # no padding, which such models may not take
    check(adapter, data, 400)
    adapter.span = "answer"
    with pytest.raises(tfb_ext.errors.GuardError, match="Fix: .*span='all'"):
        adapter.gaussian(data)
