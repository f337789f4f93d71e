"""What transformers decides is asked of transformers: which position a classifier reads, and what its outputs mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tfb_ext

SIGMA, SAMPLES = 0.3, [0, 2, 4, 6]
EOS = 2


def classifier(name: str, labels: int = 3, problem: str | None = None, pad: int = EOS) -> Any:
    torch.manual_seed(0)
    config: Any = {
        "gpt2": lambda: tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "opt": lambda: tf.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        ),
        "llama": lambda: tf.LlamaConfig(**zoo._COMMON),
        "bert": lambda: tf.BertConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        ),
    }[name]()
    config.num_labels, config.problem_type, config.pad_token_id, config.eos_token_id = labels, problem, pad, EOS
    model = tf.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    targets = {"gpt2": ["c_attn"], "bert": ["query", "value"]}.get(name, ["q_proj", "v_proj"])
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="SEQ_CLS", target_modules=targets))
    zoo.randomise(peft)
    return tfb_ext.bayesianize(peft.eval(), sigma=SIGMA)


def apart(adapter: Any, given: dict[str, Tensor], act: Any) -> Tensor:
    return zoo.separate_passes(adapter, SAMPLES, SIGMA, lambda: act(adapter.model(**given).logits))


def cases() -> dict[str, dict[str, Tensor]]:
    ids = torch.randint(3, 97, (3, 7), generator=torch.Generator().manual_seed(0))
    ends = ids.clone()
    ends[0, -1] = ends[1, -2:] = EOS  # texts that end in the token that also pads
    mask = torch.ones_like(ids)
    right = ids.clone()
    right[1, 5:] = EOS
    padded = mask.clone()
    padded[1, 5:] = 0
    inner = ids.clone()
    inner[2, 3] = EOS
    return {
        "ends in eos": {"input_ids": ends, "attention_mask": mask},
        "no mask": {"input_ids": right},
        "padded on the right": {"input_ids": right, "attention_mask": padded},
        "eos inside": {"input_ids": inner, "attention_mask": mask},
        "nothing but padding": {"input_ids": torch.full_like(ids, EOS), "attention_mask": mask},
        "one row": {"input_ids": ends[:1], "attention_mask": mask[:1]},
    }


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bert"])
def test_predict_reads_the_position_that_the_model_reads(name: str, case: str) -> None:
    adapter, batch = classifier(name), cases()[case]
    expected = apart(adapter, batch, lambda logits: torch.softmax(logits, -1))
    found = tfb_ext.predict(adapter, [batch], SAMPLES)
    assert torch.allclose(found.sample_probabilities, expected, atol=1e-4)
    with adapter.predictive(SAMPLES, keep_samples=True) as view:
        logits = adapter.model(**batch).logits
    assert torch.allclose(logits.exp(), expected.mean(0), atol=1e-4)
    assert view.sample_outputs is not None and torch.allclose(view.sample_outputs.exp(), expected, atol=1e-4)
    with torch.no_grad():
        mean = torch.softmax(adapter.model(**batch).logits, -1)
    assert torch.allclose(tfb_ext.predict(adapter, [batch], 0).probabilities, mean, atol=1e-5)
    tiny = tfb_ext.predict(adapter, [batch], SAMPLES, sigma=1e-6)
    assert torch.allclose(tiny.probabilities, mean, atol=1e-4)  # before and after are of the same token


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.sampled_from([EOS, 5, 9, 40]), min_size=6, max_size=6), min_size=1, max_size=4), st.booleans()
)
def test_any_tokens_are_read_where_the_model_reads_them(rows: list[list[int]], masked: bool) -> None:
    adapter = CACHED.setdefault("llama", None) or classifier("llama")
    CACHED["llama"] = adapter
    ids = torch.tensor(rows)
    batch = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
    expected = apart(adapter, batch, lambda logits: torch.softmax(logits, -1))
    assert torch.allclose(tfb_ext.predict(adapter, [batch], SAMPLES).sample_probabilities, expected, atol=1e-4)


CACHED: dict[str, Any] = {}

LABELS: dict[str, Tensor] = {
    "classes": torch.tensor([0, 2, 1]),
    "classes, int32": torch.tensor([0, 2, 1], dtype=torch.int32),
    "multi-hot": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]]),
    "multi-hot, half": torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]]).bfloat16(),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_the_first_call_with_labels_decides_what_outputs_mean(name: str, labels: str) -> None:
    """As in transformers, which writes its decision into the configuration."""
    adapter, plain = classifier(name), classifier(name)
    batch = {"input_ids": cases()["eos inside"]["input_ids"], "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    given = LABELS[labels]
    with torch.no_grad():
        plain.model(**batch, labels=given.float() if given.is_floating_point() else given.long())
    decided = plain.anatomy.model.config.problem_type
    assert decided == ("multi_label_classification" if given.dim() == 2 else "single_label_classification")
    with adapter.predictive(SAMPLES):
        out = adapter.model(**batch, labels=given.float() if given.is_floating_point() else given.long())
    assert adapter.anatomy.model.config.problem_type == decided
    if given.dim() == 2:
        expected = torch.logit(apart(adapter, batch, torch.sigmoid).double().mean(0)).float()
    else:
        expected = apart(adapter, batch, lambda logits: torch.softmax(logits, -1)).mean(0).log()
    assert torch.allclose(out.logits, expected, atol=1e-3)
    with adapter.predictive(SAMPLES):  # later calls without labels too
        assert torch.allclose(adapter.model(**batch).logits, expected, atol=1e-3)
    if given.dim() == 2:
        assert tfb_ext.predict_multi_label(adapter, [batch], SAMPLES).probabilities.shape == (3, 3)
        with pytest.raises(ValueError, match="predict_multi_label"):
            tfb_ext.predict(adapter, [batch], SAMPLES)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bfloat16, torch.bool, torch.int16]),
    st.sampled_from([None, "regression", "single_label_classification", "multi_label_classification"]),
)
def test_kinds_are_transformers_own(outputs: int, dtype: torch.dtype, problem: str | None) -> None:
    adapter = classifier("bert", outputs, problem)
    config = adapter.anatomy.model.config
    labels = (
        torch.zeros(2, outputs, dtype=dtype) if dtype not in (torch.int64, torch.int32) else torch.zeros(2, dtype=dtype)
    )
    ours = adapter.anatomy.kind_of_call(labels)
    try:
        with torch.no_grad():
            adapter.model(input_ids=torch.tensor([[5, 6], [7, 8]]), labels=labels)
    except (RuntimeError, ValueError):  # a loss that does not take such labels, once it is decided
        pass
    decided = {
        "regression": "regression",
        "multi_label_classification": "multi_label",
        "single_label_classification": "categorical",
    }
    assert ours == decided[config.problem_type]


def test_a_problem_type_set_later_counts() -> None:
    adapter = classifier("llama", 3)
    adapter.anatomy.model.config.problem_type = "regression"
    batch = cases()["eos inside"]
    found = tfb_ext.predict_regression(adapter, [batch], SAMPLES)
    assert torch.allclose(found.sample_outputs, apart(adapter, batch, lambda logits: logits), atol=1e-4)
