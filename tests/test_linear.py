"""Outputs that are Gaussian to first order: against finite differences, samples of a tiny sigma, and brute force in the logits."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import small_sets
import test_decoding
import test_heads
import torch
import zoo
from torch import Tensor, nn

import tfb_ext
from tfb_ext.errors import GuardError, SamplingError
from tfb_ext.forward import gradients, linear, recording
from tfb_ext.prediction import Gaussian, MultiLabelPrediction, Prediction, RegressionPrediction
from tfb_ext.research import head_gaussian

SIGMA = 0.1


def centred(covariance: Tensor) -> Tensor:
    """Of what is left of the outputs without their mean, which is all that a softmax sees."""
    found = covariance - covariance.mean(1, keepdim=True)
    return found - found.mean(2, keepdim=True)


def assert_moments(found: Gaussian, pairs: Tensor, sigma: float, differences: bool = True) -> None:
    """The covariance is that of mirrored samples of the outputs (2 n, N, C), within 5 standard errors.

    Half the difference of a pair is linear in the noise up to the third order, and its mean is 0.
    """
    half = (pairs[::2] - pairs[1::2]).double() / (2 * sigma)
    covariance = found.covariance
    if differences:
        half, covariance = half - half.mean(-1, keepdim=True), centred(covariance)
    sampled = torch.einsum("snc,snd->ncd", half, half) / len(half)
    variance = covariance.diagonal(dim1=1, dim2=2)
    error = ((variance[:, :, None] * variance[:, None, :] + covariance.square()) / len(half)).sqrt()
    slack = 1e-4 * float(covariance.abs().max())
    assert ((sampled - covariance).abs() <= 5 * error + slack).all()
    assert variance.sum(1).median() > 0


def assert_same(found: Gaussian, other: Gaussian, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(found.mean, other.mean, atol=rtol * float(other.mean.abs().max()), rtol=0)
    torch.testing.assert_close(
        found.covariance, other.covariance, atol=rtol * float(other.covariance.abs().max()), rtol=0
    )


def logs(adapter: Any, data: Any, samples: int, sigma: float) -> Tensor:
    return tfb_ext.predict(adapter, data, samples, sigma=sigma).sample_probabilities.double().log()


# Finite differences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "span", "depth"),
    [("llama", "all", "all"), ("llama", 2, 2), ("mistral", "answer", "all"), ("gpt2", "all", 2), ("llama-head", "answer", 1)],
)  # fmt: skip
def test_equals_finite_differences(name: str, span: Any, depth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry of every layer's E is moved by itself, each in a row of its own, in float64."""
    adapter = zoo.bayesian(name, span=span, depth=depth)
    ids = small_sets.encoded(1).token_ids[0][:5]
    found = adapter.gaussian(replace(small_sets.encoded(1), token_ids=[ids]))
    twin, step = zoo.float64_copy(adapter), 1e-5
    for module in twin.model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # which would round to float32
            monkeypatch.setattr(module, "forward", partial(norm, module.weight), raising=False)
    first = len(ids) - {"all": len(ids), "answer": 1}.get(span, span)
    columns, rows = list(small_sets.CHOICE_IDS), []

    def move(basis: Tensor, inputs: int, _: Any, args: Any, out: Tensor) -> Tensor:
        row = torch.arange(len(out))
        which = row // 2
        change = basis.T[which // inputs][:, None] * args[0][row, :, which % inputs][..., None]
        change *= step * (1 - 2 * (row % 2))[:, None, None]
        begin = max(0, out.shape[1] - len(ids) + first)
        return torch.cat([out[:, :begin], out[:, begin:] + change[:, begin:]], 1)

    for layer in adapter.random_layers:
        posterior = adapter.posterior(layer)
        moved = partial(move, posterior.scaling * posterior.basis.double(), posterior.mean.shape[1])
        hook = zoo.lora_layers(twin)[layer].register_forward_hook(moved)
        with torch.no_grad():
            logits = twin.model(input_ids=torch.tensor([ids] * (2 * posterior.mean.numel()))).logits[:, -1, columns]
        hook.remove()
        rows.append((logits[::2] - logits[1::2]) / (2 * step))
    jacobian = torch.cat(rows).double()
    expected = jacobian.T @ jacobian
    torch.testing.assert_close(found.covariance[0], expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def norm(weight: Tensor, x: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_derivative_of_the_layers(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By gradcheck in float64, the kernels' forward replaced by the same sum in plain arithmetic."""
    adapter = tfb_ext.bayesianize(zoo.peft_model("qwen2", target_modules=["q_proj", "k_proj", "v_proj"]))
    updates = [u for u in adapter.attached.updates if u.block == 1][: 3 if grouped else 1]
    weights = {}
    for update in updates:
        layer = update.module.base_layer.double()
        basis, mean = (update.module._buffers[name].double() for name in update.buffers)
        update.module.scaling[adapter.name] = 0.7
        weights[update] = layer.weight + 0.7 * basis @ mean, layer.bias

    def plain(together: Any, x: Tensor, *_: Any) -> list[Tensor]:
        return [nn.functional.linear(x, *weights[update]) for update in together]

    monkeypatch.setattr(recording, "outputs", plain)
    x = torch.randn(2, 3, weights[updates[0]][0].shape[1], dtype=torch.float64, requires_grad=True)
    anchor = torch.zeros((), requires_grad=True)
    calls = [recording.Call(update, x.detach()) for update in updates]
    assert torch.autograd.gradcheck(lambda x: recording._Layers.apply(x, anchor, calls), (x,))
    outputs = recording._Layers.apply(x, anchor, calls)
    given = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, given)
    for call, d in zip(calls, given, strict=True):
        basis = call.update.module._buffers[call.update.buffers[0]].double()
        torch.testing.assert_close(call.gradient, d @ basis)


# Heads --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_regression(family: str) -> None:
    adapter = test_heads.bayesian(family, "SequenceClassification", 2, "regression")
    data = test_heads.batches(family)
    found = adapter.gaussian(data)
    assert found.kind == "regression" and found.choices == ()
    sampled = tfb_ext.predict_regression(adapter, data, 600, sigma=1e-3)
    assert_moments(found, sampled.sample_outputs, 1e-3, differences=False)
    prediction = found.predict(0.2)
    assert isinstance(prediction, RegressionPrediction)
    torch.testing.assert_close(prediction.mean.double(), found.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prediction.variance.double(), 0.04 * found.variance, atol=0, rtol=1e-5)
    assert prediction.sigma == 0.2 and prediction.samples == () and prediction.standard_error.eq(0).all()
    direct = tfb_ext.predict_regression(adapter, data, by="linear", sigma=0.2)
    torch.testing.assert_close(direct.variance, prediction.variance)
    with pytest.raises(ValueError, match="temperature: got 2.0, expected 1 for a regression"):
        found.predict(0.2, temperature=2)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_multi_label(family: str) -> None:
    adapter = test_heads.bayesian(family, "SequenceClassification", 3, "multi_label_classification")
    data = test_heads.batches(family)
    found = adapter.gaussian(data)
    sampled = tfb_ext.predict_multi_label(adapter, data, 600, sigma=1e-3).sample_probabilities
    assert_moments(found, torch.logit(sampled.double()), 1e-3, differences=False)
    prediction = found.predict(SIGMA)
    assert isinstance(prediction, MultiLabelPrediction) and prediction.total.shape == (6, 3)
    p = torch.sigmoid(found.sample_logits(100_000, SIGMA))
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    assert (prediction.probabilities - p.mean(0)).abs().max() < 5 * p.std(0).max() / 1e5**0.5
    assert (prediction.aleatoric - entropy.mean(0)).abs().max() < 5 * entropy.std(0).max() / 1e5**0.5
    assert (prediction.epistemic >= 0).all() and prediction.epistemic.max() > 0
    direct = tfb_ext.predict_multi_label(adapter, data, by="linear", sigma=SIGMA)
    torch.testing.assert_close(direct.probabilities, prediction.probabilities)


@pytest.mark.parametrize("family", zoo.slow_but(["Llama", "Bert"], "Bert"))
def test_labels_of_tokens(family: str) -> None:
    adapter = test_heads.bayesian(family, "TokenClassification", 3)
    data = test_heads.batches(family)
    for given in (
        data,
        [{**b, "labels": b["input_ids"].remainder(3).index_fill(1, torch.tensor([4]), -100)} for b in data],
    ):
        found = adapter.gaussian(given)
        assert_moments(found, logs(adapter, given, 600, 1e-3), 1e-3)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("span", ["all", "answer", 2])
def test_labels_of_a_language_model(span: Any, left: bool) -> None:
    """Several items a row; of 97 classes the most probable 64 of each vary."""
    adapter = zoo.bayesian("llama", span=span, depth=2)
    batch = zoo.inputs(3, 9, left=left)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :6] = -100
    data = [{**batch, "labels": labels}]
    with pytest.warns(UserWarning, match="97 classes: each item's 64 most probable ones are random"):
        found = adapter.gaussian(data)
    assert found.classes is not None and found.covariance.shape[1:] == (64, 64)
    sampled = logs(adapter, data, 400, 1e-3)
    half = (sampled[::2] - sampled[1::2]).gather(2, found.classes.expand(200, -1, -1)) / 2e-3
    half = half - half.mean(-1, keepdim=True)
    covariance = centred(found.covariance)
    ratio = half.square().mean(0) / covariance.diagonal(dim1=1, dim2=2)
    assert (ratio - 1).abs().max() < 6 * (2 / 200) ** 0.5  # 64 classes of 9 items or more
    mean = tfb_ext.predict(adapter, data, 0)
    torch.testing.assert_close(found.predict(0).probabilities, mean.probabilities, atol=1e-5, rtol=0)
    prediction = found.predict(SIGMA, points=1024)
    p = torch.softmax(found.sample_logits(4000, SIGMA), -1)
    assert ((prediction.probabilities - p.mean(0)).abs() < 5 * p.std(0) / 4000**0.5 + 2e-3).all()


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("span", ["all", "answer", 2])
def test_choices_of_several_tokens(span: Any, by_length: bool) -> None:
    adapter, data = zoo.bayesian("llama", span=span, depth=2), small_sets.sequences(3, by_length=by_length)
    found = adapter.gaussian(data)
    assert found.mean.shape == (3, 4) and found.choices == data.choices
    assert_moments(found, logs(adapter, data, 600, 1e-3), 1e-3)
    assert_same(adapter.gaussian(data, batch_size=1), found)
    mean = tfb_ext.predict(adapter, data, 0)
    torch.testing.assert_close(found.predict(0).probabilities, mean.probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["token", "flipout"])
def test_noise_of_every_token(mode: str) -> None:
    adapter, data = zoo.bayesian("llama", mode=mode), small_sets.encoded(4)
    assert_moments(adapter.gaussian(data), logs(adapter, data, 1000, 1e-3), 1e-3)
    if mode == "token":
        data = small_sets.sequences(2)
        assert_moments(adapter.gaussian(data), logs(adapter, data, 600, 1e-3), 1e-3)


@pytest.mark.parametrize("family", ["constant", "full-rank"])
def test_other_families(family: str) -> None:
    adapter, data = zoo.bayesian("llama", family=family), small_sets.encoded(4)
    assert_moments(adapter.gaussian(data), logs(adapter, data, 600, 3e-4), 3e-4)


@pytest.mark.parametrize("name", ["llama-head", "llama-cls", "bert"])
def test_equals_the_head_gaussian(name: str) -> None:
    targets = {"llama-head": {}, "llama-cls": {"target_modules": ["q_proj", "score"]}, "bert": {"target_modules": ["query", "classifier"]}}[name]  # fmt: skip
    task = {} if name == "llama-head" else {"task_type": None}
    adapter = tfb_ext.bayesianize(zoo.peft_model(name, **targets, **task), sigma=0.3, depth="head")
    data = small_sets.encoded(7, head=name != "llama-head")
    exact = head_gaussian(adapter, data)
    found = adapter.gaussian(data)
    torch.testing.assert_close(found.mean, exact.mean, atol=2e-5, rtol=0)
    torch.testing.assert_close(0.09 * found.covariance, exact.covariance, atol=1e-5 * float(exact.covariance.max()), rtol=1e-4)  # fmt: skip
    prediction = tfb_ext.predict(adapter, data, by="linear")
    torch.testing.assert_close(prediction.probabilities.double(), exact.probabilities(2**14), atol=1e-4, rtol=0)


# Batches ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", ["all", "answer", 3])
def test_batches_and_padding_change_nothing(span: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, data = zoo.bayesian("llama", span=span), small_sets.encoded(7)
    found = adapter.gaussian(data)
    assert_same(adapter.gaussian(data, batch_size=1), found)
    assert_same(adapter.gaussian(data, batch_size=3), found)
    rows = [
        {"input_ids": torch.tensor([t]), "labels": torch.tensor([[-100] * (len(t) - 1) + [4]])} for t in data.token_ids
    ]
    columns = list(small_sets.CHOICE_IDS)
    with torch.no_grad():
        alone = torch.stack([adapter.model(input_ids=r["input_ids"]).logits[0, -1, columns] for r in rows]).double()
    torch.testing.assert_close(found.mean, alone, atol=1e-4, rtol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "_PIECE", 1)  # gradients of weights in pieces of one column
        assert_same(adapter.gaussian(data), found)
    with monkeypatch.context() as patch:  # prompt and random tokens in one call
        patch.setattr(linear.Linear, "_ends_together", lambda *_: False)
        assert_same(adapter.gaussian(data), found)


@pytest.mark.parametrize("span", ["all", "answer", 3])
def test_rows_padded_on_either_side(span: Any) -> None:
    adapter = zoo.bayesian("llama-cls", span=span)
    left, right = zoo.inputs(4, 9), zoo.inputs(4, 9, left=False)
    for row in range(1, 4):  # the same texts
        right["input_ids"][row, : 9 - row] = left["input_ids"][row, row:]
    right["input_ids"][0] = left["input_ids"][0]
    found = adapter.gaussian([left])
    assert_same(adapter.gaussian([right]), found)
    del left["position_ids"], right["position_ids"]
    assert_same(adapter.gaussian([right]), found)
    alone = [{"input_ids": left["input_ids"][i : i + 1, i:]} for i in range(4)]
    assert_same(adapter.gaussian(alone), found)


@pytest.mark.parametrize("span", ["answer", 3])
def test_masks_with_holes(span: Any) -> None:
    """The last tokens of a row are found by its mask: as those of the row without what is masked."""
    adapter = zoo.bayesian("llama-cls", span=span)
    batch = zoo.inputs(3, 9, padded=False)
    batch["attention_mask"][0, 2] = batch["attention_mask"][1, 7] = batch["attention_mask"][2, 6:8] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    kept = batch["attention_mask"].bool()
    alone = [{"input_ids": ids[mask][None]} for ids, mask in zip(batch["input_ids"], kept, strict=True)]
    assert_same(adapter.gaussian([batch]), adapter.gaussian(alone))


@pytest.mark.parametrize("data", [small_sets.encoded(5), small_sets.sequences(3)])
def test_batches_that_do_not_fit_are_halved(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = zoo.bayesian("llama", depth=2)
    found, before = adapter.gaussian(data), linear.Linear._covariance
    rows: list[int] = []

    def limited(self: Any, outputs: Any, *args: Any) -> Tensor:
        rows.append(len(outputs.random))
        if rows[-1] > 4:
            raise torch.OutOfMemoryError
        return before(self, outputs, *args)

    monkeypatch.setattr(linear.Linear, "_covariance", limited)
    assert_same(adapter.gaussian(data), found)
    assert max(rows) > 4
    monkeypatch.setattr(linear.Linear, "_covariance", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError, match="does not fit into memory"):
        adapter.gaussian(data)


def test_the_model_is_left_as_it_was() -> None:
    adapter, data = zoo.bayesian("llama", span=2, depth=2), small_sets.encoded(3)
    wanted = [p.requires_grad for p in adapter.model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules()]
    found = adapter.gaussian(data)
    assert [p.requires_grad for p in adapter.model.parameters()] == wanted
    assert all(p.grad is None for p in adapter.model.parameters())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules()] == hooks
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_same(adapter.gaussian(data), found)
            assert not torch.is_grad_enabled()
    with torch.inference_mode():
        batch = zoo.inputs(2)
        same = {n: v + 0 for n, v in batch.items()}
    cls = zoo.bayesian("llama-cls", span=2)
    assert_same(cls.gaussian([same]), cls.gaussian([batch]))
    adapter.model.requires_grad_(True)
    assert_same(adapter.gaussian(data), found)
    adapter.model.requires_grad_(False)
    assert_same(adapter.gaussian(data), found)
    assert torch.is_grad_enabled()


def test_a_prompt_has_no_graph_and_nor_have_blocks_below() -> None:
    adapter = zoo.compared(zoo.bayesian("llama", span="answer", depth=2))
    data = replace(small_sets.encoded(2), token_ids=[[11, 12, 13, 14, 15], [16, 17, 18, 19, 20]])
    found = adapter.gaussian(data)
    seen: list[tuple[int, bool]] = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append((out.shape[1], out.requires_grad)))
        for block in adapter.anatomy.blocks
    ]
    assert_same(adapter.gaussian(data), found)
    assert seen == [*[(4, False)] * 3, *[(1, False)] * 2, *[(1, True)] * 2]
    adapter.span = "all"
    adapter.gaussian(data)
    assert seen[-4:] == [(5, False)] * 2 + [(5, True)] * 2
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("where", ["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("name", "span", "depth", "options"),
    [
        ("llama", "answer", "all", {}), ("llama", "all", 2, {}), ("mistral", 3, 2, {}), ("llama-head", "answer", "head", {}),
        ("llama-cls", "answer", 2, {}), ("llama", "answer", 2, {"mode": "token"}), ("qwen2", "all", 2, {"family": "full-rank"}),
    ],
)  # fmt: skip
def test_batches_of_one_shape_become_a_graph(
    where: str, name: str, span: Any, depth: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "recorded":
        monkeypatch.setattr(linear, "capturable", lambda device: True)
        monkeypatch.setattr(linear, "room_for_tokens", lambda *_: 1000)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", test_decoding.Recorder)
        monkeypatch.setattr(torch.cuda, "graph", test_decoding.recorded)
        monkeypatch.setattr(
            "transformers.masking_utils.is_tracing", lambda tensor=None: True
        )  # as where a GPU captures
    adapter = zoo.bayesian(name, "cuda" if where == "cuda" else "cpu", span=span, depth=depth, **options)
    data = small_sets.encoded(8, head=name == "llama-cls")
    data = replace(data, token_ids=[list(range(11 + i, 18 + i)) for i in range(8)])
    for centred in (False, True):
        with linear.ready(adapter, adapter.place):
            once = linear.Linear(adapter, data, adapter.place, centred, batch_size=8).moments(False)
            run = linear.Linear(adapter, data, adapter.place, centred, batch_size=1)
            found = run.moments(False)
        assert run.replayed == 8 - linear.MEETINGS
        for part in ("mean", "covariance"):
            one, other = getattr(found, part), getattr(once, part)
            torch.testing.assert_close(one, other, atol=1e-5 * float(other.abs().max()), rtol=0)
        # The caller's hooks are called.
        seen: list[Any] = []
        hook = adapter.anatomy.blocks[0].register_forward_hook(lambda *args, seen=seen: seen.append(args))
        run.of(run.batches[0], adapter.place)
        hook.remove()
        assert seen and run.replayed == 8 - linear.MEETINGS


def test_batches_that_cannot_be_captured_run_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(linear, "capturable", lambda device: True)
    monkeypatch.setattr(linear, "room_for_tokens", lambda *_: 1000)
    monkeypatch.setattr(linear, "Graph", refuse)
    adapter = zoo.bayesian("llama", span="answer")
    data = replace(small_sets.encoded(8), token_ids=[list(range(11 + i, 18 + i)) for i in range(8)])
    with pytest.warns(UserWarning, match="cannot be captured in a CUDA graph .operation not permitted"):
        found = adapter.gaussian(data, batch_size=1)
    assert_same(found, adapter.gaussian(data))


@pytest.mark.parametrize(("classes", "span"), [(2, "answer"), (3, "all"), (3, "answer")])
def test_a_softmax_needs_one_backward_pass_less(classes: int, span: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, data = zoo.bayesian("llama", span=span), small_sets.encoded(4)
    data = replace(data, choices=data.choices[:classes], choice_ids=data.choice_ids[:classes], labels=[0] * 4)
    whole, passes, before = adapter.gaussian(data), [], recording.Recording.gradients
    monkeypatch.setattr(recording.Recording, "gradients", lambda *args: passes.append(1) or before(*args))
    found = tfb_ext.predict(adapter, data, by="linear", sigma=0.2)
    assert len(passes) == classes - 1
    torch.testing.assert_close(found.probabilities, whole.predict(0.2).probabilities, atol=1e-5, rtol=0)
    with linear.ready(adapter, adapter.place):
        less = linear.Linear(adapter, data, adapter.place, centred=True).moments(False).covariance
    expected = centred(whole.covariance)
    torch.testing.assert_close(less, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_half_precision_is_within_its_own_rounding() -> None:
    data = small_sets.encoded(4)
    high = zoo.bayesian("qwen2").gaussian(data)
    low = zoo.bayesian("qwen2", dtype=torch.bfloat16).gaussian(data)
    ratio = low.variance.sum(1) / high.variance.sum(1)
    assert (ratio.log().abs() < 0.3).all()


@pytest.mark.gpu
@pytest.mark.parametrize("span", ["all", "answer"])
def test_a_gpu_gives_the_same(span: Any) -> None:
    for data in (small_sets.encoded(5), small_sets.sequences(3)):
        assert_same(
            zoo.bayesian("llama", "cuda", span=span).gaussian(data),
            zoo.bayesian("llama", span=span).gaussian(data),
            1e-3,
        )


# Predictions --------------------------------------------------------------------------------------------------------------


def made(mean: Tensor, factor: Tensor) -> Gaussian:
    mean, factor = mean.double(), factor.double()
    return Gaussian(mean, factor @ factor.mT, None, "categorical", (), 0.0)


@pytest.mark.parametrize(("classes", "tolerance"), [(2, 1e-9), (3, 1.5e-4)])
@pytest.mark.parametrize("size", [0.3, 1.0, 4.0])
def test_probabilities_equal_brute_force(classes: int, tolerance: float, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = 2 * torch.randn(3, classes, generator=generator)
    factor = size * torch.randn(3, classes, classes, generator=generator)
    found = made(mean, factor).predict(0.5)
    assert isinstance(found, Prediction)
    axis = torch.linspace(-8.5, 8.5, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * (classes - 1)).view(-1, classes - 1)
    weight = torch.exp(-grid.square().sum(1) / 2)
    weight /= weight.sum()
    for i in range(3):
        contrast = torch.eye(classes, dtype=torch.float64)[1:] - torch.eye(classes, dtype=torch.float64)[:1]
        root = torch.linalg.cholesky(contrast @ factor[i].double() @ (contrast @ factor[i].double()).T)
        differences = contrast @ mean[i].double() + 0.5 * grid @ root.T
        p = torch.softmax(torch.nn.functional.pad(differences, (1, 0)), dim=-1)
        assert (found.probabilities[i] - weight @ p).abs().max() < tolerance + 1e-7
        entropy = weight @ torch.special.entr(p).sum(-1)
        assert abs(float(found.aleatoric[i] - entropy)) < tolerance + 1e-6
    assert torch.allclose(found.total, torch.special.entr(found.probabilities).sum(-1))
    assert (found.epistemic > 0).all() and torch.equal(found.labels, found.probabilities.argmax(-1))


def test_many_classes_against_draws() -> None:
    generator = torch.Generator().manual_seed(1)
    found = made(torch.randn(2, 10, generator=generator), torch.randn(2, 10, 10, generator=generator))
    p = torch.softmax(found.sample_logits(200_000, 1.0, seed=3), -1)
    assert ((found.predict(1.0).probabilities - p.mean(0)).abs() < 5 * p.std(0) / 2e5**0.5 + 2e-4).all()
    assert torch.equal(found.sample_logits(5, 1.0), found.sample_logits(5, 1.0))
    assert not torch.equal(found.sample_logits(5, 1.0), found.sample_logits(5, 1.0, seed=1))
    deviation = found.sample_logits(50_000, 2.0) - found.mean
    sampled = torch.einsum("snc,snd->ncd", deviation, deviation) / 50_000
    assert (sampled - 4 * found.covariance).abs().max() < 0.05 * 4 * found.covariance.max()


def test_a_tiny_sigma_is_the_mean_and_a_temperature_follows_the_average() -> None:
    adapter, data = zoo.bayesian("llama", span="answer"), small_sets.encoded(5)
    found = adapter.gaussian(data)
    mean = tfb_ext.predict(adapter, data, 0)
    for sigma in (0, 1e-9):
        prediction = found.predict(sigma)
        torch.testing.assert_close(prediction.probabilities, mean.probabilities, atol=1e-5, rtol=0)
        assert prediction.epistemic.max() < 1e-5
    plain, warm = found.predict(SIGMA), found.predict(SIGMA, temperature=1.5)
    expected = torch.softmax(plain.probabilities.double().log() / 1.5, -1)
    torch.testing.assert_close(warm.probabilities.double(), expected, atol=1e-5, rtol=1e-4)
    kept = torch.minimum(plain.epistemic, warm.total)
    torch.testing.assert_close(warm.epistemic, kept, atol=1e-5, rtol=0)
    for name, bad in (("sigma", -1.0), ("sigma", float("nan")), ("temperature", 0), ("temperature", "warm")):
        with pytest.raises(ValueError, match=f"{name} is .*expected a finite number"):
            found.predict(**{"sigma": SIGMA, name: bad})  # type: ignore[arg-type]


def test_predict_by_linear() -> None:
    adapter, data = zoo.bayesian("llama", sigma=0.02, span="answer"), small_sets.encoded(9)
    found = tfb_ext.predict(adapter, data, by="linear")
    assert found.choices == small_sets.CHOICES and found.sigma == 0.02 and found.samples == () and found.seconds > 0
    torch.testing.assert_close(found.probabilities, adapter.gaussian(data).predict(0.02).probabilities)
    sampled = tfb_ext.predict(adapter, data, 1000)
    assert (found.probabilities - sampled.probabilities).abs().max() < 0.02
    assert (found.probabilities - sampled.probabilities).abs().max() < (tfb_ext.predict(adapter, data, 0).probabilities - sampled.probabilities).abs().max()  # fmt: skip
    torch.testing.assert_close(found.epistemic, sampled.epistemic, atol=0.02, rtol=0.2)
    assert found.standard_error.eq(0).all() and (found.samples_drawn == 0).all()


# Refusals -----------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    adapter, data = zoo.bayesian("llama", sigma=SIGMA), small_sets.encoded(2)
    with pytest.raises(ValueError, match="by is 'laplace', expected one of 'samples', 'linear'"):
        tfb_ext.predict(adapter, data, by="laplace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="adaptive: got 0.95, expected None with by='linear'"):
        tfb_ext.predict(adapter, data, by="linear", adaptive=0.95)
    with pytest.raises(ValueError, match="has no sigma yet"):
        tfb_ext.predict(zoo.bayesian("llama"), data, by="linear")
    with pytest.raises(ValueError, match="the data's score: got 'token', expected 'sequence'.*Fix: encode"):
        adapter.gaussian(small_sets.sequences(2, score="token"))
    with pytest.raises(ValueError, match="head is categorical"):
        tfb_ext.predict_regression(adapter, data, by="linear")
    with pytest.raises(SamplingError, match="contexts of one model do not nest"), adapter.predictive(2):
        adapter.gaussian(data)
    with pytest.raises(SamplingError, match="is switched off .*expected it on.*Fix"), adapter.model.disable_adapter():
        adapter.gaussian(data)
    with pytest.raises(GuardError, match="every token sees the whole text.*Fix: span='all'"):
        zoo.bayesian("bert", span="answer").gaussian(small_sets.encoded(2, head=True))
    adapter.model.train()
    with pytest.raises(SamplingError, match="training mode"):
        adapter.gaussian(data)
    adapter.model.eval()
    labels = [{**zoo.inputs(2), "labels": torch.full((2, 9), -100)}]
    with warnings.catch_warnings(), pytest.raises(ValueError, match="labels: got -100 at every position"):
        adapter.gaussian(labels)
    with torch.no_grad():
        adapter.anatomy.head.weight[4] = float("nan")
    with pytest.raises(ValueError, match="outputs and gradients: got NaN or infinity, expected finite numbers"):
        adapter.gaussian(data)


def test_a_layer_without_rows_is_refused() -> None:
    adapter: Any = zoo.bayesian("llama", guard=False)
    mlp = adapter.anatomy.blocks[1].mlp
    mlp.forward = lambda x: x + mlp.up_proj(x.flatten(0, 1)[1:]).mean()
    with warnings.catch_warnings(), pytest.raises(SamplingError, match="up_proj' has an input or output of shape"):
        warnings.simplefilter("ignore")
        adapter.gaussian(small_sets.encoded(2))


def test_layers_on_plain_bases_and_those_of_peft_agree() -> None:
    """A hook that sees the base layer's own output takes the short way of that layer."""
    adapter, data = zoo.bayesian("llama"), small_sets.encoded(4)
    for span in ("all", "answer"):
        adapter.span = span
        short = adapter.gaussian(data)
        bases = [m.base_layer for m in adapter.attached.modules.values()][::2]
        handles = [base.register_forward_hook(lambda *_: None) for base in bases]
        long = adapter.gaussian(data)
        for handle in handles:
            handle.remove()
        for found, wanted in zip((short.mean, short.covariance), (long.mean, long.covariance), strict=True):
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
