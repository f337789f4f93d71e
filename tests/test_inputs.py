"""Data that a model would fail on, or pass over, is refused before anything runs, on every way in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small_sets
import torch
import transformers as tf
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tfb_ext
from tfb_ext.data import Encoded

SIGMA, CLASSES = 0.1, 3


@pytest.fixture(scope="module")
def adapters() -> dict[str, Any]:
    made = {n: tfb_ext.bayesianize(zoo.peft_model(n), sigma=SIGMA) for n in ("llama", "gpt2", "bert", "llama-cls")}
    made["head"] = tfb_ext.bayesianize(zoo.peft_model("llama-head"), sigma=SIGMA, depth="head")
    return made


def entries(adapter: Any) -> list[Callable[[Any], object]]:
    """Every way in for data."""
    return [
        lambda data: tfb_ext.predict(adapter, data, 2),
        lambda data: tfb_ext.predict(adapter, data, 0),
        lambda data: tfb_ext.search_sigma(adapter, data, samples=2, progress=False, apply=False),
    ]


def refused(adapter: Any, data: Any, message: str) -> None:
    forwards: list[int] = []
    hook = adapter.anatomy.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        for entry in entries(adapter):
            with pytest.raises(ValueError, match=message):
                entry(data)
    finally:
        hook.remove()
    assert not forwards


def plain(name: str, rows: int = 3, tokens: int = 9) -> dict[str, Tensor]:
    batch = zoo.inputs(rows, tokens, left=name != "bert")
    del batch["position_ids"]
    return batch


# Batches of one's own ------------------------------------------------------------------------------------------------

ROWS = torch.tensor([0, 2, 1])
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "minus one": ({"labels": torch.tensor([0, -1, 1])}, r"batch 1, labels: got -1, expected 0 to 2\. Fix: count from 0"),
    "minus hundred": ({"labels": torch.tensor([0, -100, 1])}, "labels: got -100, expected 0 to 2"),
    "from one": ({"labels": torch.tensor([1, 2, 3])}, "labels: got 3, expected 0 to 2"),
    "multi-hot": ({"labels": torch.ones(3, CLASSES)}, r"labels: got float32 of shape \(3, 3\), expected int64 .*predict_multi"),
    "bool": ({"labels": torch.tensor([True, False, True])}, "labels: got bool of shape"),
    "float": ({"labels": torch.tensor([0.0, 1.0, 2.0])}, "labels: got float32"),
    "of tokens": ({"labels": torch.zeros(3, 9, dtype=torch.long)}, r"labels: got int64 of shape \(3, 9\), expected shape \(3,\)"),
    "column": ({"labels": ROWS[:, None]}, r"labels: got int64 of shape \(3, 1\)"),
    "too few": ({"labels": ROWS[:2]}, r"labels: got int64 of shape \(2,\)"),
    "list": ({"labels": [0, 1, 2]}, "labels: got a list, expected a tensor"),
    "numpy": ({"attention_mask": np.ones((3, 9))}, "attention_mask: got a ndarray, expected a tensor"),
    "label": ({"labels": None, "label": ROWS}, "label: got a key, expected an argument of .*Fix: rename it to 'labels'"),
    "misspelt": ({"attention_masks": torch.ones(3, 9)}, "attention_masks: got a key.*rename it to 'attention_mask'"),
    "unknown": ({"idx": torch.arange(3)}, "idx: got a key, expected an argument.*take it out of the batch"),
    "missing": ({"labels": None}, "labels: got no such key, which earlier batches have"),
    "mask of another shape": ({"attention_mask": torch.ones(3, 8)}, r"attention_mask: got float32 of shape \(3, 8\), expected"),
    "mask of a row": ({"attention_mask": torch.ones(9)}, r"attention_mask: got float32 of shape \(9,\)"),
    "mask of four sizes": ({"attention_mask": torch.ones(3, 1, 9, 9)}, r"attention_mask: got .*\(3, 1, 9, 9\)"),
    "additive mask": ({"attention_mask": torch.full((3, 9), -1e9)}, "attention_mask: got numbers other than 0 and 1"),
    "mask of NaN": ({"attention_mask": torch.full((3, 9), math.nan)}, "attention_mask: got numbers other than 0 and 1"),
    "masked row": ({"attention_mask": torch.eye(3, 9) * 0}, "attention_mask: got 0 alone in row 0"),
    "float ids": ({"input_ids": torch.ones(3, 9)}, r"input_ids: got float32 of shape \(3, 9\), expected int64"),
    "one row": ({"input_ids": torch.ones(9, dtype=torch.long)}, r"input_ids: got int64 of shape \(9,\)"),
    "no rows": ({"input_ids": torch.ones(0, 9, dtype=torch.long)}, r"input_ids: got int64 of shape \(0, 9\)"),
    "no tokens": ({"input_ids": torch.ones(3, 0, dtype=torch.long)}, r"input_ids: got int64 of shape \(3, 0\)"),
    "beyond the vocabulary": ({"input_ids": torch.full((3, 9), zoo.VOCAB)}, f"input_ids: got {zoo.VOCAB}, expected 0 to 96"),
    "sparse ids": ({"input_ids": torch.ones(3, 9, dtype=torch.long).to_sparse()}, "input_ids: got a tensor of layout sparse_coo"),
    "sparse mask": ({"attention_mask": torch.ones(3, 9).to_sparse()}, "attention_mask: got a tensor of layout sparse_coo"),
    "sparse labels": ({"labels": ROWS.to_sparse()}, "labels: got a tensor of layout sparse_coo, expected a dense tensor"),
    "labels without data": ({"labels": ROWS.to("meta")}, r"labels: got a tensor without data \(meta\), expected a dense tensor"),
    "ids without data": ({"input_ids": torch.ones(3, 9, device="meta").long()}, "input_ids: got a tensor without data"),
    "a number": ({5: ROWS}, "5: got a key, expected an argument"),
    "below the vocabulary": ({"input_ids": torch.full((3, 9), -1)}, "input_ids: got -1, expected 0 to 96"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "llama-cls"])
@pytest.mark.parametrize("change", CHANGES)
def test_batches_of_a_classifier(adapters: dict[str, Any], name: str, change: str) -> None:
    good = {**plain(name), "labels": ROWS}
    changed, message = CHANGES[change]
    refused(adapters[name], [good, {**good, **changed}], message)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (ROWS, r"labels: got int64 of shape \(3,\), expected shape \(3, 9\).*tfb_ext\.encode"),
        (torch.full((3, 9), zoo.VOCAB), f"labels: got {zoo.VOCAB}, expected 0 to 96 or -100"),
        (torch.full((3, 9), -1), "labels: got -1"),
        (torch.ones(3, 9), "labels: got float32"),
    ],
)
def test_labels_of_a_language_model(adapters: dict[str, Any], labels: Tensor, message: str) -> None:
    refused(adapters["llama"], [{**plain("llama"), "labels": labels}], message)
    with pytest.raises(ValueError, match=message):
        tfb_ext.research.head_gaussian(adapters["head"], [{**plain("llama"), "labels": labels}])


def test_what_is_right_in_another_type_gives_the_same(adapters: dict[str, Any]) -> None:
    for name in ("bert", "llama-cls", "llama"):
        batch = plain(name)
        wanted = tfb_ext.predict(adapters[name], [batch], 2).probabilities
        mask = batch["attention_mask"]
        for other in ({"attention_mask": mask.bool()}, {"attention_mask": mask.float()}, {"labels": None},
                      {"input_ids": batch["input_ids"].int()}):  # fmt: skip
            found = tfb_ext.predict(adapters[name], [{**batch, **other}], np.int64(2), batch_size=np.int32(4))
            assert torch.equal(found.probabilities, wanted)
    # What a tokenizer writes for a model without types.
    zeros = {**plain("llama"), "token_type_ids": torch.zeros(3, 9, dtype=torch.long)}
    assert torch.equal(tfb_ext.predict(adapters["llama"], [zeros], 2).probabilities, wanted)
    refused(
        adapters["llama"], [{**zeros, "token_type_ids": zeros["input_ids"]}], "token_type_ids: got numbers other than 0"
    )
    small = {**plain("bert"), "labels": ROWS.to(torch.uint8)}
    found, plain_labels = (tfb_ext.search_sigma(adapters["bert"], [b], samples=2, progress=False, apply=False)
                           for b in (small, {**small, "labels": ROWS}))  # fmt: skip
    assert found.sigma == plain_labels.sigma and found.labelled


def test_the_model_agrees_about_good_batches(adapters: dict[str, Any]) -> None:
    for name in ("bert", "llama-cls", "gpt2"):
        adapter, batch = adapters[name], plain(name)
        if name == "gpt2":
            batch = zoo.inputs(3)
        with torch.no_grad():
            logits = adapter.model(**batch).logits
        expected = torch.softmax(logits if logits.dim() == 2 else logits[:, -1], -1)
        assert torch.allclose(tfb_ext.predict(adapter, [batch], 0).probabilities, expected, atol=1e-6)


@pytest.mark.parametrize("data", [None, 3, "text", plain("bert")])
def test_what_is_no_data(adapters: dict[str, Any], data: Any) -> None:
    refused(adapters["bert"], data, "data: got a (NoneType|int|str|dict), expected batches of model arguments")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_labels_are_counted_or_refused(adapters: dict[str, Any], data: st.DataObject) -> None:
    """The search's NLL is transformers' loss, for every set of labels that is not refused."""
    values = data.draw(st.lists(st.integers(-2, 4), min_size=3, max_size=3))
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32, torch.int8, torch.float32]))
    adapter, labels = adapters["bert"], torch.tensor(values)
    batch = {**plain("bert"), "labels": labels.to(dtype)}
    good = all(0 <= v < CLASSES for v in values) and dtype != torch.float32
    if not good:
        with pytest.raises(ValueError, match="batch 0, labels: got .*, expected .* Fix: "):
            tfb_ext.predict(adapter, [batch], 1)
        return
    found = tfb_ext.predict(adapter, [batch], 0).probabilities
    with torch.no_grad():
        loss = adapter.model(**{**batch, "labels": labels}).loss
    assert tfb_ext.evaluate(found, labels).nll == pytest.approx(float(loss), abs=1e-5)


# Positions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "llama-cls"])
def test_texts_beyond_the_positions(adapters: dict[str, Any], name: str) -> None:
    adapter, message = adapters[name], "got 129 tokens, expected at most 128, the positions of .*Fix: shorten"
    long = {"input_ids": torch.full((2, 129), 5), "attention_mask": torch.ones(2, 129, dtype=torch.long)}
    refused(adapter, [long], f"batch 0, input_ids: {message}")
    data = small_sets.encoded(3, head=name in zoo.CLASSIFIERS)
    refused(adapter, replace(data, token_ids=[[5], [5] * 129, [5]]), f"item 1: {message}")
    fits = replace(data, token_ids=[[5], [5] * 128, [5]])
    assert tfb_ext.predict(adapter, fits, 1).probabilities.isfinite().all()
    if name in zoo.CAUSAL:
        sequences = replace(small_sets.sequences(2), token_ids=[[5], [5] * 126])
        refused(adapter, sequences, f"item 1: {message}")  # the longest choice has three tokens before its last
        positions = torch.arange(8).repeat(2, 1) + 122
        refused(
            adapter,
            [{"input_ids": torch.full((2, 8), 5), "position_ids": positions}],
            "got 130 tokens, expected at most 128",
        )


def test_raised_positions_are_the_models_word(adapters: dict[str, Any]) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=SIGMA)
    adapter.anatomy.model.config.max_position_embeddings = 200
    data = replace(small_sets.encoded(2), token_ids=[[5] * 150, [6] * 9])
    alone = small_sets.answers(adapter, data)
    with torch.no_grad():
        assert torch.allclose(tfb_ext.predict(adapter, data, 0).probabilities, alone(), atol=1e-5)


@pytest.mark.parametrize("kind", ["roberta", "mpt", "dynamic"])
def test_predicting_and_generating_know_the_same_positions(kind: str) -> None:
    """RoBERTa's table has rows before position 0, MPT calls its positions otherwise, dynamic scaling has no limit."""
    sizes = {"vocab_size": zoo.VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "roberta":
        config: Any = tf.RobertaConfig(
            **sizes, intermediate_size=48, max_position_embeddings=18, pad_token_id=1, is_decoder=True
        )
        plain_model, targets = tf.RobertaForCausalLM(config), ["query"]
    elif kind == "mpt":
        config = tf.MptConfig(vocab_size=zoo.VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=16)
        plain_model, targets = tf.MptForCausalLM(config), ["Wqkv"]
    else:
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        config = tf.LlamaConfig(**sizes, intermediate_size=48, max_position_embeddings=16, rope_parameters=rope)
        plain_model, targets = tf.LlamaForCausalLM(config), ["q_proj"]
    model = get_peft_model(plain_model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    zoo.randomise(model)
    adapter = tfb_ext.bayesianize(model.eval(), sigma=SIGMA)
    data = Encoded([[5] * 16], [None], (6, 7), ("a", "b"), 1)
    options = {"samples": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    assert tfb_ext.predict(adapter, data, 2).probabilities.isfinite().all()
    prompt = {"input_ids": torch.full((1, 14), 5)}
    assert tfb_ext.generate(adapter, prompt, max_new_tokens=2, **options).tokens.shape == (1, 2)
    longer = replace(data, token_ids=[[5] * 17])
    if kind == "dynamic":
        assert tfb_ext.predict(adapter, longer, 2).probabilities.isfinite().all()
        assert tfb_ext.generate(adapter, prompt, max_new_tokens=4, **options).tokens.shape == (1, 4)
        return
    with pytest.raises(ValueError, match="item 0: got 17 tokens, expected at most 16"):
        tfb_ext.predict(adapter, longer, 2)
    with pytest.raises(ValueError, match="14 tokens and 3 more are asked for, but the model's context is 16"):
        tfb_ext.generate(adapter, prompt, max_new_tokens=3, **options)


def test_roberta_counts_from_its_padding() -> None:
    torch.manual_seed(0)
    config = tf.RobertaConfig(vocab_size=zoo.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                              num_labels=CLASSES, max_position_embeddings=20, pad_token_id=1)  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(tf.RobertaForSequenceClassification(config), lora).eval()
    zoo.randomise(model)
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA)
    fits, long = ([{"input_ids": torch.full((2, n), 5)}] for n in (18, 19))
    assert tfb_ext.predict(adapter, fits, 1).probabilities.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(**long[0])
    refused(adapter, long, "got 19 tokens, expected at most 18")


# Encoded sets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [[5], [], [6]]}, r"item 1: got the tokens \[\], expected at least one"),
        (
            {"token_ids": [[5], [5, 97], [6]]},
            r"item 1: got the tokens \[5, 97\], expected at least one, each from 0 to 96",
        ),
        ({"token_ids": [[5], [5.5, 6.0], [6]]}, r"item 1: got the tokens \[5.5, 6.0\]"),
        ({"token_ids": [[5], [True], [6]]}, r"item 1: got the tokens \[True\]"),
        ({"token_ids": [[5], torch.tensor([5]), [6]]}, r"item 1: got the tokens \[tensor\(5\)\]"),
        ({"token_ids": ["a", "b", "c"]}, r"item 0: got the tokens \['a'\]"),
        ({"pad_id": None}, "pad_id: got None, expected a token"),
        ({"targets": [(4,), (5,), (6,)]}, r"targets: got the rows of sequences\(\), expected the set of items"),
        ({"labels": [0, 3, None]}, "item 1: got the label 3, expected 0 to 2"),
        ({"labels": [0, -100, 1]}, "item 1: got the label -100"),
        ({"labels": [0, 1.0, 1]}, "item 1: got the label 1.0"),
        ({"labels": [0, True, 1]}, "item 1: got the label True"),
        ({"choice_ids": (4, 5, 97)}, r"choices: got the tokens \[4, 5, 97\]"),
        ({"choice_ids": (4, 5, 4)}, r"choices: got the tokens \[4, 5, 4\], expected different ones"),
        ({"choice_ids": None, "choice_tokens": ((4,), (5,), (6, 97))}, r"choices: got the tokens \[6, 97\]"),
        ({"choice_ids": None, "choice_tokens": ((4,), (5,), ())}, r"choices: got the tokens \[\]"),
        (
            {"choice_ids": None, "choice_tokens": ((4,), (5, 6), (5, 6))},
            r"got the tokens .*\(5, 6\)\], expected different ones",
        ),
    ],
)
def test_encoded_sets_of_ones_own(adapters: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    data: Encoded = replace(small_sets.encoded(3), **changes)
    refused(adapters["llama"], data, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice_ids": (4, 5)}, "choice_ids: got 2 of them, expected 3. Fix: one for each choice"),
        ({"choice_ids": (4, 5, 6, 7)}, "choice_ids: got 4 of them, expected 3"),
        ({"choice_tokens": ((4,), (5,), (6,))}, "choice_tokens: got them beside choice_ids"),
        ({"choice_ids": None, "choice_tokens": ()}, "choice_tokens: got 0 of them, expected 3"),
        ({"item_choice_tokens": [((4,), (5,), (6,))]}, "item_choice_tokens: got 1 of them, expected 3. Fix: one for each item"),
        ({"item_choice_tokens": [((4,), (5,))] * 3}, "item_choice_tokens: got 2 choices, expected 3"),
        ({"score": "tokens"}, "score is 'tokens', expected one of 'sequence', 'token'"),
        ({"token_ids": [[5], [6]]}, "labels: got 3 of them, expected 2. Fix: one for each item"),
    ],
)  # fmt: skip
def test_encoded_sets_whose_parts_do_not_belong_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small_sets.encoded(3), **changes)


@pytest.mark.parametrize("pad", [-1, zoo.VOCAB, np.int64(9)])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_that_the_model_has_no_embedding_for(adapters: dict[str, Any], name: str, pad: int) -> None:
    """A padding token that was added to the tokenizer alone is masked, and may be any token."""
    data = small_sets.encoded(3, head=name == "bert")
    data = replace(data, token_ids=[[5, 6, 7], [8], [9, 10]])
    found = [tfb_ext.predict(adapters[name], replace(data, pad_id=p), 2).probabilities for p in (0, pad)]
    assert torch.allclose(*found, atol=1e-6)


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{}, {"adaptive": 0.9}])
def test_a_sigma_that_overflows_is_named(adapters: dict[str, Any], mode: dict[str, Any]) -> None:
    data = small_sets.encoded(3)
    with pytest.raises(
        ValueError, match=r"sigma: got 3e\+37, at which the model's outputs are NaN.*Fix: a smaller sigma"
    ):
        tfb_ext.predict(adapters["llama"], data, 20, sigma=3e37, **mode)
    with pytest.raises(ValueError, match="sigma"):
        tfb_ext.predict(adapters["llama"], data, 2, sigma=1e39)


def test_a_mean_adapter_that_gives_nan_is_named() -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("bert"), sigma=SIGMA)
    with torch.no_grad():
        adapter.anatomy.head.bias.fill_(math.nan) if hasattr(adapter.anatomy.head, "bias") else None
        for parameter in adapter.anatomy.head.parameters():
            parameter.fill_(math.nan)
    for samples, message in ((0, "mean adapter's outputs: got NaN"), (2, "sigma: got 0.1, at which .* NaN")):
        with pytest.raises(ValueError, match=message):
            tfb_ext.predict(adapter, [plain("bert")], samples)


def test_a_float64_model_is_refused_in_words() -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=SIGMA)
    adapter.model.double()
    refused(adapter, small_sets.encoded(3), r"got weights of float64, expected float32, .*Fix: model\.float\(\)")


def test_labels_that_count_nothing(adapters: dict[str, Any]) -> None:
    batch = {**plain("llama"), "labels": torch.full((3, 9), -100)}
    for entry in entries(adapters["llama"]):
        with pytest.raises(ValueError, match="-100"):
            entry([batch])


@pytest.mark.parametrize(
    ("problem", "call"),
    [("regression", tfb_ext.predict_regression), ("multi_label_classification", tfb_ext.predict_multi_label)],
)
def test_other_heads_look_at_everything_but_labels(problem: str, call: Callable[..., Any]) -> None:
    model = zoo.peft_model("bert")
    model.get_base_model().config.problem_type = problem
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA)
    batch = plain("bert")
    call(adapter, [{**batch, "labels": torch.rand(3, CLASSES)}], 2)
    for change, message in (
        ({"label": ROWS}, "label: got a key"),
        ({"attention_mask": torch.ones(3, 8)}, "attention_mask: got"),
        ({"input_ids": torch.full((3, 9), zoo.VOCAB)}, "input_ids: got 97"),
    ):
        with pytest.raises(ValueError, match=f"batch 0, {message}"):
            call(adapter, [{**batch, **change}], 2)
    with torch.no_grad():
        adapter.anatomy.head.weight.fill_(float("inf"))  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="NaN or infinit"):
        call(adapter, [batch], 2)
