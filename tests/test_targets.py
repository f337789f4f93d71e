"""Per-sample log probabilities of target tokens, kept while the head's outputs are folded, against separate passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import tfb_ext
from tfb_ext.errors import SamplingError
from tfb_ext.forward import fold
from tfb_ext.forward.fold import Predictive

SAMPLES, SIGMA = 4, 0.3


def bayesian(name: str, depth: Any = "all", device: str = "cpu") -> Any:
    return tfb_ext.bayesianize(zoo.peft_model(name).to(device), depth=depth, sigma=SIGMA)


def next_tokens(batch: dict[str, Tensor], several: int = 0) -> Tensor:
    """The next token of every position, -100 where that or the position itself is padding; with ``several`` others beside it."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = torch.where(mask[:, 1:] * mask[:, :-1] == 1, ids[:, 1:], -100)
    if not several:
        return targets
    others = torch.stack([(targets + 7 * k) % zoo.VOCAB for k in range(several)], dim=-1)
    return torch.where(targets[..., None] < 0, -100, others)


def oracle(adapter: Any, batch: dict[str, Tensor], targets: Tensor, columns: Tensor | None = None) -> Tensor:
    """(S, *targets.shape) by one pass with each sample's weights written in, looked up one by one."""

    def call() -> Tensor:
        logits = adapter.model(**batch).logits.double()
        return torch.log_softmax(logits if columns is None else logits[..., columns], dim=-1)

    full = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, call)
    out = torch.zeros(SAMPLES, *targets.shape, dtype=torch.float64)
    for at in (targets >= 0).nonzero().tolist():
        position = at if targets.dim() == full.dim() - 2 else at[:-1]
        out[(slice(None), *at)] = full[(slice(None), *position, int(targets[tuple(at)]))]
    return out


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("several", [0, 3])
@pytest.mark.parametrize("depth", ["all", 2])
@pytest.mark.parametrize("name", ["llama", "llama-head", "gemma2", "gpt2", "mixtral"])
def test_equal_separate_passes(name: str, depth: Any, several: int, left: bool, device: str) -> None:
    adapter = bayesian(name, depth, device)
    batch = zoo.moved(zoo.inputs(3, left=left), device)
    targets = next_tokens(batch, several)
    exact_adapter = zoo.float64_copy(adapter)
    exact, low = oracle(exact_adapter, batch, targets), oracle(adapter, batch, targets)
    with adapter.predictive(SAMPLES, targets=targets) as view:
        logits = adapter.model(**batch).logits
    found = view.target_log_probabilities
    assert found is not None and found.shape == (SAMPLES, *targets.shape) and view.sample_outputs is None
    zoo.assert_as_exact_as(found.cpu(), low, exact, 1.0)
    assert torch.equal(found[:, targets < 0], torch.zeros_like(found[:, targets < 0]))
    assert (found[0] - found[1]).abs().max() > 0.01
    # The mean over samples is what the model returns.
    index = targets if several else targets[..., None]
    mean = logits.gather(-1, index.clamp(min=0)).reshape(targets.shape)
    assert torch.allclose(zoo.average(found)[targets >= 0], mean[targets >= 0], atol=2e-5)


@pytest.mark.parametrize("name", ["llama-head", "gemma2"])
@pytest.mark.parametrize("sigmas", [1, 2])
def test_pieces_of_the_head_give_the_same(name: str, sigmas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batch = bayesian(name), zoo.batch_for(name)
    targets = next_tokens(batch)
    results = []
    per_sample = 4 * 3 * 9 * zoo.VOCAB
    for limit in (2**30, 2 * per_sample, 1):
        monkeypatch.setattr(fold, "FOLD_BYTES", limit)
        view = Predictive(adapter.batch(3, [0.1, 0.4][:sigmas]), targets=targets)
        with adapter.fanned(view):
            adapter.model(**batch)
        assert view.target_log_probabilities is not None
        results.append(view.target_log_probabilities)
    assert results[0].shape == (3 * sigmas, 3, 9)
    for other in results[1:]:
        assert torch.allclose(other, results[0], atol=2e-5)


def test_places_among_columns() -> None:
    adapter, batch = bayesian("llama", 2), zoo.batch_for("llama")
    columns = torch.tensor([11, 3, 90])
    targets = torch.where(batch["attention_mask"] == 1, batch["input_ids"] % 3, -100)
    with adapter.predictive(SAMPLES, columns=columns, targets=targets) as view:
        adapter.model(**batch)
    found = view.target_log_probabilities
    assert found is not None and torch.allclose(found.double(), oracle(adapter, batch, targets, columns), atol=2e-5)


@pytest.mark.parametrize("name", ["bert", "llama-cls"])
def test_classes_of_a_head(name: str) -> None:
    """BERT's head is asked once a row, Llama's for every token, of which the model takes the last."""
    adapter, batch = bayesian(name), zoo.batch_for(name)
    targets = torch.tensor([0, 2, -100])
    given = targets
    if name == "llama-cls":
        given = torch.full_like(batch["input_ids"], -100)
        given[:, -1] = targets
    with adapter.predictive(SAMPLES, targets=given) as view:
        adapter.model(**batch)
    found = view.target_log_probabilities
    assert found is not None and found.shape == (SAMPLES, *given.shape)
    assert torch.allclose(found.reshape(SAMPLES, 3, -1)[..., -1].double(), oracle(adapter, batch, targets), atol=2e-5)


def test_set_anew_before_each_call() -> None:
    """With the positions that ``logits_to_keep`` leaves, and with none at all."""
    adapter, batch = bayesian("llama", 2), zoo.batch_for("llama")
    targets = next_tokens(batch)
    expected = oracle(adapter, batch, targets)
    with adapter.predictive(SAMPLES) as view:
        adapter.model(**batch)
        assert view.target_log_probabilities is None
        view.targets = targets[:, -3:]
        adapter.model(**batch, logits_to_keep=3)
        assert view.target_log_probabilities is not None
        assert torch.allclose(view.target_log_probabilities.double(), expected[:, :, -3:], atol=2e-5)
        view.targets = None
        adapter.model(**batch)
        assert view.target_log_probabilities is None


@pytest.mark.slow
def test_full_graph_compile_equals_eager() -> None:
    adapter, batch = bayesian("llama", 2), zoo.batch_for("llama")
    targets = next_tokens(batch)
    torch.compiler.reset()
    compiled = torch.compile(adapter.model, backend="aot_eager", fullgraph=True)
    with adapter.predictive(SAMPLES, targets=targets) as view:
        compiled(**batch)
    found = view.target_log_probabilities
    assert found is not None and torch.allclose(found.double(), oracle(adapter, batch, targets), atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (torch.zeros(3, 8, dtype=torch.int64), r"shape \(3, 8\), expected int64 of shape \(3, 9\)"),
        (torch.zeros(3, 9), r"torch.float32 of shape \(3, 9\), expected int64"),
        (torch.zeros(3, 9, 1, 1, dtype=torch.int64), r"expected int64 of shape \(3, 9\)"),
        (torch.full((3, 9), zoo.VOCAB), r"reach 97, expected numbers below 97"),
    ],
)
def test_refuses_what_does_not_fit(targets: Tensor, complaint: str) -> None:
    adapter, batch = bayesian("llama"), zoo.batch_for("llama")
    with adapter.predictive(SAMPLES, targets=targets) as view:
        with pytest.raises(SamplingError, match=complaint):
            adapter.model(**batch)
        view.targets = next_tokens(batch)
        adapter.model(**batch)
        assert view.target_log_probabilities is not None


def test_refuses_heads_without_classes() -> None:
    model = zoo.peft_model("llama-cls")
    model.config.problem_type = "multi_label_classification"
    adapter, batch = tfb_ext.bayesianize(model, sigma=SIGMA), zoo.batch_for("llama-cls")
    with adapter.predictive(SAMPLES, targets=torch.zeros_like(batch["input_ids"])):
        with pytest.raises(SamplingError, match="multi-label; use keep_samples=True"):
            adapter.model(**batch)
