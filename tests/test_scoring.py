"""The engine of search and prediction: which rows, positions, samples and blocks it runs, and what it does about memory."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tfb_ext
from tfb_ext.adapters.depth import Place
from tfb_ext.adapters.samples import MEAN
from tfb_ext.data import Encoded
from tfb_ext.errors import SamplingError
from tfb_ext.forward.batch import item_labels
from tfb_ext.forward.batches import IGNORED, original_order
from tfb_ext.forward.engine import Scorer

SIGMA, SAMPLES = 0.3, 5
bayesian = partial(zoo.bayesian, sigma=SIGMA)


def sampled(scorer: Scorer, samples: int = SAMPLES) -> Tensor:
    """Probabilities (S, N, C) in the data set's order."""
    batch = scorer.adapter.batch(samples)
    return original_order([scorer.samples(b, batch).exp() for b in scorer.batches], scorer.batches, dim=1)


def token_batches(rows: tuple[int, ...] = (3, 2)) -> list[dict[str, Tensor]]:
    """Language-model batches with token labels; padding and the first two real tokens are not counted."""
    made = []
    for number, count in enumerate(rows):
        batch = zoo.inputs(count, tokens=8 + number)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) < 3, IGNORED)
        made.append({**batch, "labels": labels})
    return made


class Results(TorchDispatchMode):
    """Shapes of all tensors that an operation made new, as opposed to views of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known and tensor.numel():
                self.shapes.append(tuple(tensor.shape))
        return out


# Equal to separate passes, however it is cut ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("depth", zoo.slow_but(["all", 2, 1, "head"], 1))
def test_equals_separate_passes_however_it_is_cut(depth: int | str) -> None:
    adapter = bayesian("llama-head", depth=depth)
    data = small_sets.encoded()
    alone = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, small_sets.answers(adapter, data))
    with torch.no_grad():
        mean = small_sets.answers(adapter, data)()
    assert (alone - mean).abs().max() > 0.01
    for batch_size in (1, 4, 50):
        for rows in (1, 8, 1000):
            for keep in (False, True):
                scorer = Scorer(adapter, data, batch_size=batch_size, keep_trunk=keep)
                scorer.memory.rows = rows
                for _ in range(1 + keep):  # the second time from the kept trunk
                    assert torch.allclose(sampled(scorer), alone, atol=1e-5), (batch_size, rows, keep)
        means = original_order([scorer.mean(b).exp() for b in scorer.batches], scorer.batches, dim=0)
        assert torch.allclose(means, mean, atol=1e-5)


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_adapter_at_the_head_is_the_models_own(dtype: torch.dtype, device: str) -> None:
    """No layer below has anything to sample, and the head itself is called with no rows at all."""
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama-head", dtype=dtype).to(device), sigma=SIGMA, depth="head")
    scorer = Scorer(adapter, small_sets.encoded(4))
    for batch in scorer.batches:
        logs = scorer.average(batch, MEAN, Place(len(adapter.anatomy.blocks)))
        assert torch.allclose(logs, scorer.mean(batch), atol=1e-5 if dtype == torch.float32 else 0.05)


def test_depth_of_the_scorer_overrules_the_adapters() -> None:
    adapter, data = bayesian(), small_sets.encoded()
    upper = sampled(Scorer(adapter, data, place=Place(adapter.first_random_block(1))))
    assert adapter.depth == "all" and (sampled(Scorer(adapter, data)) - upper).abs().max() > 0.01
    adapter.depth = 1
    assert torch.equal(sampled(Scorer(adapter, data)), upper)


@pytest.mark.parametrize("name", zoo.slow_but(["gpt2", "gemma2", "bert", "llama-cls"], "bert"))
def test_other_architectures_equal_separate_passes(name: str) -> None:
    adapter = bayesian(name, depth=2)
    data = small_sets.encoded(7, head=name in zoo.CLASSIFIERS)
    alone = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, small_sets.answers(adapter, data))
    assert alone.std(0).max() > 0.01
    scorer = Scorer(adapter, data, batch_size=3)
    scorer.memory.rows = 6
    assert torch.allclose(sampled(scorer), alone, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama-cls"])
def test_classification_heads_equal_the_models_own_logits(name: str) -> None:
    adapter = bayesian(name)
    data = small_sets.encoded(head=True)
    scorer = Scorer(adapter, data, batch_size=4)
    masks = [b.inputs["attention_mask"].bool() for b in scorer.batches]
    assert not all(m.all() for m in masks)
    assert all(m[:, 0 if name == "bert" else -1].all() for m in masks)  # padding is where the head does not read
    with adapter.predictive(SAMPLES):
        own = torch.cat([adapter.model(**b.inputs).logits for b in scorer.batches]).exp()
    own = original_order([own], scorer.batches, dim=0)
    assert torch.allclose(sampled(scorer).mean(0), own, atol=1e-5)
    averaged = [scorer.average(b, adapter.batch(SAMPLES)).exp() for b in scorer.batches]
    assert torch.allclose(original_order(averaged, scorer.batches, dim=0), own, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 6, 1000])
@pytest.mark.parametrize("depth", zoo.slow_but(["all", 2], 2))
def test_average_is_the_mean_of_the_samples(depth: int | str, rows: int) -> None:
    adapter = bayesian(depth=depth)
    scorer = Scorer(adapter, token_batches())
    scorer.memory.rows = rows
    batch = adapter.batch(SAMPLES)
    for item in scorer.batches:
        assert torch.allclose(scorer.average(item, batch), zoo.average(scorer.samples(item, batch)), atol=1e-5)


# Which positions and outputs count ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_token_labels_of_a_language_model_are_about_the_next_token(name: str) -> None:
    """The scorer's NLL is the loss that transformers computes from the same labels."""
    adapter = bayesian(name)
    for batch in token_batches():
        scorer = Scorer(adapter, [batch])
        (item,) = scorer.batches
        logs = scorer.mean(item)
        labels = item_labels(item)
        assert len(labels) == int((batch["labels"][:, 1:] != IGNORED).sum()) == len(logs)
        with torch.no_grad():
            loss = adapter.model(**batch).loss
        assert math.isclose(float(-logs.gather(1, labels[:, None]).mean()), float(loss), abs_tol=1e-5)
        with adapter.predictive(SAMPLES):
            predictive_loss = adapter.model(**batch).loss
        averaged = scorer.average(item, adapter.batch(SAMPLES))
        assert math.isclose(float(-averaged.gather(1, labels[:, None]).mean()), float(predictive_loss), abs_tol=1e-5)
        assert abs(float(loss) - float(predictive_loss)) > 1e-3


def test_unlabelled_batches_count_the_last_attended_position() -> None:
    adapter = bayesian()
    for left in (True, False):
        batch = zoo.inputs(3, left=left)
        scorer = Scorer(adapter, [batch])
        last = [8, 8, 8] if left else [8, 7, 6]
        with torch.no_grad():
            expected = torch.log_softmax(adapter.model(**batch).logits, -1)[range(3), last]
        assert not scorer.labelled and torch.allclose(scorer.mean(scorer.batches[0]), expected, atol=1e-5)


def test_only_the_label_rows_at_the_last_position_are_computed() -> None:
    adapter = zoo.compared(bayesian("llama-head"))
    scorer = Scorer(adapter, small_sets.encoded(), batch_size=4)
    classes, rows = len(small_sets.CHOICE_IDS), 4
    assert zoo.VOCAB not in (32, 48)  # no other width of the model
    with Results() as results:
        scorer.samples(scorer.batches[0], adapter.batch(SAMPLES))
    assert results.shapes and not [s for s in results.shapes if s[-1:] == (zoo.VOCAB,)]
    answered = [math.prod(s) for s in results.shapes if s[-1:] == (classes,)]
    assert max(answered) == SAMPLES * rows * classes
    with Results() as whole:
        scorer.mean(scorer.batches[0])
    assert (rows, 1, zoo.VOCAB) in whole.shapes  # the spy sees the head where it runs


@pytest.mark.parametrize(
    "name", zoo.slow_but(["qwen2", "qwen3", "mistral", "gemma2", "gemma3", "mixtral", "phi3"], "qwen2", "mistral")
)
def test_the_last_block_makes_one_position_and_the_same_probabilities(name: str) -> None:
    adapter, data = zoo.compared(bayesian(name)), small_sets.encoded(7)
    alone = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, small_sets.answers(adapter, data))
    below, last = (small_sets.shapes_through(adapter.anatomy.blocks[i].mlp) for i in (-2, -1))
    scorer = Scorer(adapter, data, batch_size=7)
    assert torch.allclose(sampled(scorer), alone, atol=1e-5)
    scorer.mean(scorer.batches[0])
    longest = scorer.batches[0].inputs["input_ids"].shape[1]
    assert [s[1] for s in below] == [longest, longest] and [s[1] for s in last] == [1, 1]
    last.clear()
    with torch.no_grad():  # outside, the model is the caller's
        adapter.model(**zoo.inputs(2))
    assert [s[1] for s in last] == [9]


def test_noise_numbered_by_tokens_runs_them_all() -> None:
    adapter = zoo.compared(bayesian(mode="flipout"))
    last = small_sets.shapes_through(adapter.anatomy.blocks[-1].mlp)
    scorer = Scorer(adapter, small_sets.encoded(7), batch_size=7)
    sampled(scorer)
    assert last[0][1] == scorer.batches[0].inputs["input_ids"].shape[1]


# The trunk ----------------------------------------------------------------------------------------------------------


def test_blocks_below_run_once_a_batch_however_many_chunks() -> None:
    adapter = zoo.compared(bayesian(depth=2))
    scorer = Scorer(adapter, small_sets.encoded(8), batch_size=4)
    blocks = adapter.anatomy.blocks
    below, above = (small_sets.rows_through(blocks[i].input_layernorm) for i in (1, 2))
    for rows, sizes in ((1000, [5]), (8, [2, 2, 1]), (1, [1] * 5)):
        below.clear(), above.clear()
        scorer.memory.rows = rows
        sampled(scorer)
        assert below == [4, 4], rows
        assert above == [4 * s for s in sizes] * 2, rows
    assert scorer.trunk is not None and not scorer.trunk.hidden  # nothing is kept that nobody asked for


def test_kept_trunk_serves_every_later_call() -> None:
    adapter = zoo.compared(bayesian(depth=1))
    scorer = Scorer(adapter, small_sets.encoded(8), batch_size=4, keep_trunk=True)
    below = small_sets.rows_through(adapter.anatomy.blocks[0].input_layernorm)
    for sigma in (0.1, 0.2, 0.3):
        for item in scorer.batches:
            scorer.samples(item, adapter.batch(SAMPLES, sigma))
    assert below == [4, 4]


def test_counts_of_tokens_and_items() -> None:
    adapter = bayesian()
    data = small_sets.encoded()
    scorer = Scorer(adapter, data, batch_size=4)
    assert scorer.size == len(data) and scorer.tokens == sum(map(len, data.token_ids))
    scorer.memory.rows = 4
    sampled(scorer)
    assert scorer.tokens_run == SAMPLES * scorer.tokens


# Memory -------------------------------------------------------------------------------------------------------------


class SmallMemory:
    """Lets a block take at most so many rows, and raises what torch raises above."""

    def __init__(self, block: nn.Module, most: int) -> None:
        self.most = most
        self.tried: list[int] = []
        block.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.tried.append(len(args[0] if args else kwargs["hidden_states"]))
        if self.tried[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("depth", ["all", 2])
@pytest.mark.parametrize("keep", [False, True])
def test_out_of_memory_halves_the_samples_and_goes_on(depth: int | str, keep: bool) -> None:
    adapter = bayesian(depth=depth)
    data = small_sets.encoded(12)
    plenty = sampled(Scorer(adapter, data, batch_size=4), samples=8)
    memory = SmallMemory(adapter.anatomy.blocks[3], most=9)
    below = small_sets.rows_through(adapter.anatomy.blocks[0].input_layernorm)
    scorer = Scorer(adapter, data, batch_size=4, keep_trunk=keep)
    assert torch.allclose(sampled(scorer, samples=8), plenty, atol=1e-5)
    assert memory.tried[:6] == [32, 16, 8, 8, 8, 8]
    assert memory.tried[6:] == [8] * 8  # the later batches begin with what was found to fit
    if depth == 2:
        # A trunk outlives the failed forwards; without one to keep, the first failure shows that one is needed.
        assert below == ([4, 4, 4] if keep else [4, 4, 4, 4])


@pytest.mark.parametrize("depth", ["all", 2])
def test_out_of_memory_at_one_sample_halves_the_batch(depth: int | str) -> None:
    adapter = bayesian(depth=depth)
    data = small_sets.encoded(11)
    plenty = sampled(Scorer(adapter, data, batch_size=4))
    average = [
        Scorer(adapter, data, batch_size=4).average(b, adapter.batch(SAMPLES))
        for b in Scorer(adapter, data, batch_size=4).batches
    ]
    memory = SmallMemory(adapter.anatomy.blocks[3], most=2)
    scorer = Scorer(adapter, data, batch_size=4, keep_trunk=True)
    assert torch.allclose(sampled(scorer), plenty, atol=1e-5)
    assert memory.tried[:5] == [20, 8, 4, 2, 2]  # samples first, then rows
    memory.tried.clear()
    for batch, expected in zip(scorer.batches, average, strict=True):
        assert torch.allclose(scorer.average(batch, adapter.batch(SAMPLES)), expected, atol=1e-5)
    assert set(memory.tried) == {1, 2}  # what was found not to fit is not tried again


def test_out_of_memory_at_one_row_says_what_to_do() -> None:
    adapter = zoo.compared(bayesian())
    memory = SmallMemory(adapter.anatomy.blocks[3], most=0)
    scorer = Scorer(adapter, small_sets.encoded(8), batch_size=4)
    with pytest.raises(torch.OutOfMemoryError, match="one sample of one row of .* tokens does not fit.*smaller type"):
        scorer.samples(scorer.batches[0], adapter.batch(SAMPLES))
    assert memory.tried == [20, 8, 4, 2, 1]
    memory.most = 1000
    with adapter.predictive(1):  # nothing was left behind that a later context stumbles over
        assert adapter.model(**zoo.inputs(2)).logits.isfinite().all()


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_refuses_batch_size(batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size is .*, expected a count of items"):
        Scorer(bayesian(), small_sets.encoded(), batch_size=batch_size)


@pytest.mark.parametrize("data", [[], small_sets.encoded().select([])])
def test_refuses_empty_data(data: Any) -> None:
    with pytest.raises(ValueError, match="data set is empty"):
        Scorer(bayesian(), data)


@pytest.mark.parametrize("data", [["text"], [{"labels": torch.ones(2)}], [{"input_ids": [1, 2]}]])
def test_refuses_what_is_no_batch(data: Any) -> None:
    with pytest.raises(ValueError, match=r"batch 0 is a (str|dict), expected a mapping .*tfb_ext\.encode"):
        Scorer(bayesian(), data)


def test_refuses_label_tokens_for_a_classification_head() -> None:
    with pytest.raises(ValueError, match="classification head .'score', 3 classes.*head=True"):
        Scorer(bayesian("llama-cls"), small_sets.encoded())


def test_refuses_choices_that_are_not_the_heads_classes() -> None:
    two = replace(small_sets.encoded(head=True), choices=("a", "b"))
    with pytest.raises(ValueError, match=r"the data has 2 choices, \['a', 'b'\], and the model's head 'classifier' 3"):
        Scorer(bayesian("bert"), two)
    with pytest.raises(ValueError, match=f"head 'lm_head' {zoo.VOCAB} outputs.*without head=True"):
        Scorer(bayesian("llama"), small_sets.encoded(head=True))


@pytest.mark.parametrize(
    ("kind", "name"), [("regression", "regression"), ("multi_label_classification", "multi-label")]
)
def test_refuses_heads_without_class_probabilities(kind: str, name: str) -> None:
    model = zoo.peft_model("bert")
    model.get_base_model().config.problem_type = kind
    with pytest.raises(ValueError, match=f"head is {name}, whose outputs are no class probabilities.*predictive"):
        Scorer(tfb_ext.bayesianize(model, sigma=SIGMA), small_sets.encoded(head=True))


def test_the_mean_of_a_model_in_training_is_refused() -> None:
    adapter = bayesian()
    scorer = Scorer(adapter, small_sets.encoded())
    adapter.model.train()
    with pytest.raises(SamplingError, match=r"model\.eval\(\)"):
        scorer.mean(scorer.batches[0])


def test_partly_labelled_data_counts_as_unlabelled() -> None:
    data = small_sets.encoded(4)
    half: Encoded = replace(data, labels=[0, None, 1, None])
    assert not Scorer(bayesian(), half).labelled
    assert Scorer(bayesian(), replace(data, labels=[0, 2, 1, 0])).labelled
