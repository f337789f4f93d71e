"""Last-layer TFB in closed form: against float64 by hand, against sampling, and its quadrature against exact integrals."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor

import tfb_ext
from tfb_ext.errors import SamplingError, UnsupportedModelError
from tfb_ext.posterior.config import FAMILIES
from tfb_ext.research import HeadGaussian

SIGMA = 0.3
HEADS: dict[str, dict[str, Any]] = {
    "llama-head": {},
    "llama-cls": {"target_modules": ["q_proj", "score"], "task_type": None},
    "bert": {"target_modules": ["query", "classifier"], "task_type": None},
}


def bayesian(name: str = "llama-head", **options: Any) -> Any:
    dtype, device = options.pop("dtype", torch.float32), options.pop("device", "cpu")
    model = zoo.peft_model(name, dtype=dtype, **HEADS[name]).to(device)
    return tfb_ext.bayesianize(model, **{"sigma": SIGMA, "depth": "head", "antithetic": False, **options})


def data_for(name: str, items: int = 11) -> Any:
    return small_sets.encoded(items, head=name != "llama-head")


def alone(adapter: Any, data: Any) -> tuple[Tensor, Tensor]:
    """By hand, one item at a time: the head's input (N, n) and the class logits (N, C), float64."""
    seen: list[Tensor] = []
    hook = adapter.anatomy.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rows, inputs = [], []
    for tokens in data.token_ids:
        with torch.no_grad():
            logits = adapter.model(input_ids=torch.tensor([tokens])).logits[0].double()
        hidden = seen.pop()[0].double()
        inputs.append(hidden if hidden.dim() == 1 else hidden[-1])  # BERT's head gets pooled rows
        rows.append(logits if data.choice_ids is None else logits[-1, list(data.choice_ids)])
    hook.remove()
    return torch.stack(inputs), torch.stack(rows)


def class_rows(adapter: Any, data: Any) -> slice | list[int]:
    return slice(None) if data.choice_ids is None else list(data.choice_ids)


def sampled_logits(adapter: Any, data: Any, samples: range) -> Tensor:
    """Raw class logits (S, N, C) of every sample, one item a call."""
    found = []
    for tokens in data.token_ids:
        with adapter.sampling(list(samples)):
            logits = adapter.model(input_ids=torch.tensor([tokens]).repeat(len(samples), 1)).logits
        found.append(logits if data.choice_ids is None else logits[:, -1, list(data.choice_ids)])
    return torch.stack(found, dim=1).double()


def made(mean: Tensor, factor: Tensor, scale: Tensor | None = None) -> HeadGaussian:
    scale = torch.ones(len(mean), dtype=torch.float64) if scale is None else scale
    return HeadGaussian(mean.double(), scale, factor.double(), (), 1.0)


# By hand ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", zoo.slow_but([1, 4, None], 4))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", list(HEADS))
def test_equals_float64_by_hand(name: str, family: str, batch_size: int | None) -> None:
    adapter, data = bayesian(name, family=family), data_for(name)
    x, logits = alone(adapter, data)
    found = tfb_ext.research.head_gaussian(adapter, data, batch_size=batch_size)
    assert torch.allclose(found.mean, logits, atol=2e-5)
    module = zoo.lora_layers(adapter)[adapter.anatomy.head_name]
    b = module.lora_B["default"].weight.detach().double()
    u = torch.linalg.svd(b, full_matrices=False)[0]
    rows = class_rows(adapter, data)
    shape = {"low-rank": u @ u.T, "constant": b @ b.T, "full-rank": torch.eye(len(b), dtype=torch.float64)}[family]
    size = (module.scaling["default"] * SIGMA * x.norm(dim=1)).square()
    exact = size[:, None, None] * shape[rows][:, rows]
    assert torch.allclose(found.covariance, exact, atol=1e-5 * float(exact.max()))
    assert torch.allclose(found.variance, found.covariance.diagonal(dim1=1, dim2=2), rtol=1e-12)
    assert found.choices == small_sets.CHOICES and found.sigma == SIGMA
    for tensor in (found.mean, found.scale, found.factor, found.covariance, found.probabilities(64)):
        assert tensor.dtype == torch.float64 and tensor.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(HEADS))
def test_a_gpu_gives_the_same(name: str) -> None:
    data = data_for(name)
    found = tfb_ext.research.head_gaussian(bayesian(name, device="cuda"), data)
    expected = tfb_ext.research.head_gaussian(bayesian(name), data)
    assert torch.allclose(found.mean, expected.mean, atol=1e-4)
    assert torch.allclose(found.covariance, expected.covariance, rtol=1e-4)


def test_sigma_scales_and_nothing_is_left_behind() -> None:
    adapter, data = bayesian(), data_for("llama-head")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules()]
    first, second = (
        tfb_ext.research.head_gaussian(adapter, data),
        tfb_ext.research.head_gaussian(adapter, data, sigma=2 * SIGMA),
    )
    assert torch.allclose(second.scale, 2 * first.scale) and torch.equal(second.mean, first.mean)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.model.modules()] == hooks
    assert not any("forward" in m.__dict__ for m in adapter.model.modules())


def test_batches_of_arguments() -> None:
    adapter = bayesian("llama-cls")
    batches = [zoo.batch_for("llama-cls", rows) for rows in (3, 2)]
    found = tfb_ext.research.head_gaussian(adapter, batches)
    with torch.no_grad():
        own = torch.cat([adapter.model(**b).logits for b in batches]).double()
    assert torch.allclose(found.mean, own, atol=1e-6) and found.choices == ()


def test_token_labels_pick_their_positions() -> None:
    """A language model with a small vocabulary, batches with (B, T) labels: one Gaussian a labelled position."""
    adapter = bayesian()
    batch = zoo.inputs(2)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) < 3, -100)
    found = tfb_ext.research.head_gaussian(adapter, [{**batch, "labels": labels}])
    with torch.no_grad():
        own = adapter.model(**batch).logits[:, :-1][labels[:, 1:] != -100].double()
    assert torch.allclose(found.mean, own, atol=1e-5) and found.mean.shape[1] == zoo.VOCAB
    assert torch.allclose(found.probabilities(512).sum(1), torch.ones(len(own), dtype=torch.float64))


def test_bfloat16_is_within_its_own_rounding() -> None:
    data = data_for("llama-head")
    low = tfb_ext.research.head_gaussian(bayesian(dtype=torch.bfloat16), data)
    adapter = bayesian(dtype=torch.bfloat16)
    adapter.unload()
    exact = tfb_ext.bayesianize(adapter.model.float(), sigma=SIGMA, depth="head")
    high = tfb_ext.research.head_gaussian(exact, data)
    assert torch.allclose(low.scale, high.scale, rtol=0.02)
    assert (low.mean - high.mean).abs().max() < 0.05 * high.mean.abs().max()
    assert torch.equal(low.factor, high.factor)


# Against sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", zoo.slow_but(["weight", "flipout", "token"], "weight"))
@pytest.mark.parametrize("name", zoo.slow_but(HEADS, "bert"))
def test_moments_of_sampled_logits(name: str, mode: str) -> None:
    adapter, data = bayesian(name, mode=mode), data_for(name, 5)
    assert_moments(tfb_ext.research.head_gaussian(adapter, data), sampled_logits(adapter, data, range(4000)))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["constant", "full-rank"])
def test_moments_of_other_families(family: str) -> None:
    adapter, data = bayesian(family=family), data_for("llama-head", 4)
    assert_moments(tfb_ext.research.head_gaussian(adapter, data), sampled_logits(adapter, data, range(4000)))


def test_moments_of_its_own_samples() -> None:
    found = tfb_ext.research.head_gaussian(bayesian(), data_for("llama-head", 4))
    draws = found.sample(4000, torch.Generator().manual_seed(0))
    assert draws.shape == (4000, 4, 3) and torch.equal(draws, found.sample(4000, torch.Generator().manual_seed(0)))
    assert_moments(found, draws)


def assert_moments(found: HeadGaussian, logits: Tensor) -> None:
    """Mean and covariance of the logits (S, N, C) within 5 standard errors, which a covariance 1.3 times as large is not."""
    count = len(logits)
    covariance, variance = found.covariance, found.variance
    deviation = logits - found.mean
    assert (deviation.mean(0).abs() <= 5 * (variance / count).sqrt() + 1e-5).all()
    products = torch.einsum("snc,snd->ncd", deviation, deviation) / count
    error = ((variance[:, :, None] * variance[:, None, :] + covariance.square()) / count).sqrt()
    assert ((products - covariance).abs() <= 5 * error).all()
    assert ((products - 1.3 * covariance).abs() > 5 * error).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HEADS))
def test_probabilities_are_what_predict_converges_to(name: str) -> None:
    adapter, data = bayesian(name), data_for(name, 6)
    exact = tfb_ext.research.head_gaussian(adapter, data).probabilities()
    sampled = tfb_ext.predict(adapter, data, 4000)
    assert ((sampled.probabilities - exact).abs() <= 5 * sampled.standard_error + 1e-4).all()
    mean = tfb_ext.predict(adapter, data, 0).probabilities
    assert (exact - mean).abs().max() > 0.02  # or the mean adapter would pass, too


def test_differences_of_predictives_log_probabilities() -> None:
    """``adapter.predictive`` keeps log probabilities; their differences are those of the logits."""
    adapter, data = bayesian(), data_for("llama-head", 1)
    found = tfb_ext.research.head_gaussian(adapter, data)
    columns = torch.tensor(data.choice_ids)
    with adapter.predictive(4000, keep_samples=True, columns=columns) as view:
        adapter.model(input_ids=torch.tensor([data.token_ids[0]]), logits_to_keep=1)
    logs = view.sample_outputs
    assert logs is not None
    difference = (logs[:, 0, -1, 0] - logs[:, 0, -1, 1]).double()
    mean = found.mean[0, 0] - found.mean[0, 1]
    covariance = found.covariance[0]
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert abs(float(difference.mean() - mean)) < 5 * math.sqrt(variance / 4000)
    assert abs(float((difference - mean).square().mean()) - variance) < 5 * variance * math.sqrt(2 / 4000)


def test_metrics_follow() -> None:
    adapter = bayesian()
    data = small_sets.labelled(adapter, data_for("llama-head"), wrong_every=3)
    probabilities = tfb_ext.research.head_gaussian(adapter, data).probabilities()
    labels = data.labels_tensor()
    found = tfb_ext.evaluate(probabilities, labels)
    assert found.nll == pytest.approx(-float(probabilities[torch.arange(len(labels)), labels].log().mean()), rel=1e-6)


# Quadrature ---------------------------------------------------------------------------------------------------------------


def brute_force(mean: Tensor, directions: Tensor) -> Tensor:
    """E[softmax] of one item by the trapezoidal rule on a fine grid of each dimension of ``directions`` (C, k <= 2)."""
    axis = torch.linspace(-8.5, 8.5, 1201, dtype=torch.float64)
    weight = torch.exp(-axis.square() / 2)
    z = torch.cartesian_prod(*[axis] * directions.shape[1]).view(-1, directions.shape[1])
    w = torch.cartesian_prod(*[weight] * directions.shape[1]).view(-1, directions.shape[1]).prod(1)
    return ((w / w.sum())[:, None] * torch.softmax(mean + z @ directions.T, dim=-1)).sum(0)


def test_two_classes_are_the_logistic_normal_integral() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(6, 2, generator=generator, dtype=torch.float64)
    factor = torch.randn(2, 5, generator=generator)
    scale = torch.tensor([1e-3, 0.1, 1.0, 3.0, 10.0, 20.0], dtype=torch.float64)
    found = made(mean, factor, scale).probabilities()
    for i in range(6):
        spread = scale[i] * (factor[0] - factor[1]).double().norm()
        direction = torch.stack([spread / 2, -spread / 2])[:, None]
        assert torch.allclose(found[i], brute_force(mean[i], direction), atol=1e-12)
    assert torch.equal(found, made(mean, factor, scale).probabilities(points=2, seed=9))  # no points are drawn


def test_two_classes_of_huge_spread_are_a_probit() -> None:
    mean = torch.tensor([[2000.0, 0.0]], dtype=torch.float64)
    found = made(mean, torch.tensor([[4000.0, 0.0], [0.0, 0.0]])).probabilities()
    assert float(found[0, 0]) == pytest.approx(float(torch.special.ndtr(torch.tensor(0.5))), abs=1e-5)


def test_one_direction_of_many_classes_needs_no_sampling() -> None:
    mean = torch.randn(3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor = torch.randn(7, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = made(mean, factor).probabilities(points=1)
    for i in range(3):
        assert torch.allclose(found[i], brute_force(mean[i], factor), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.3, 2.0, 8.0])
def test_three_classes_by_sobol_points(size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    mean = 2 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    factor = size * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    gaussian = made(mean, factor)
    assert gaussian._differences.shape == (3, 2)
    exact = torch.stack([brute_force(mean[i], gaussian._differences) for i in range(4)])
    errors = [float((gaussian.probabilities(n) - exact).abs().max()) for n in (64, 1024, 4096, 16384)]
    assert errors[2] < 5e-4 and errors[3] < 2e-4 and errors[3] < errors[0] / 5
    assert torch.equal(gaussian.probabilities(), gaussian.probabilities())
    assert not torch.equal(gaussian.probabilities(seed=1), gaussian.probabilities())


def test_many_dimensions() -> None:
    """Ten classes in eight dimensions: against a million draws, within 5 standard errors and the rule's own error."""
    generator = torch.Generator().manual_seed(4)
    mean, factor = torch.randn(2, 10, generator=generator), torch.randn(10, 8, generator=generator)
    gaussian = made(mean, factor)
    draws = torch.softmax(gaussian.sample(200_000, generator), dim=-1)
    error = draws.std(0) / math.sqrt(len(draws))
    found = gaussian.probabilities()
    assert ((found - draws.mean(0)).abs() <= 5 * error + 2e-4).all()
    assert torch.allclose(found.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-12)


def test_what_all_classes_share_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(5)
    mean, factor = torch.randn(3, 3, generator=generator), torch.randn(3, 2, generator=generator)
    plain = made(mean, factor).probabilities()
    shifted = made(mean, torch.cat([factor, torch.full((3, 1), 7.0)], dim=1)).probabilities()
    assert torch.allclose(plain, shifted, atol=1e-12)
    same = made(mean, torch.ones(3, 2))
    assert torch.equal(same.probabilities(), torch.softmax(mean.double(), dim=-1)) and (same.variance > 0).all()


def test_items_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    gaussian = made(torch.randn(9, 3, generator=generator), torch.randn(3, 4, generator=generator))
    whole = gaussian.probabilities(256)
    monkeypatch.setattr("tfb_ext.quadrature.PIECE", 256 * 3 * 2)
    assert torch.allclose(gaussian.probabilities(256), whole, atol=1e-15)


# Refusals -----------------------------------------------------------------------------------------------------------------


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_for("llama-head")
    plain = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=SIGMA)
    with pytest.raises(ValueError, match="'default' has no LoRA on the output head 'lm_head'; train it with"):
        tfb_ext.research.head_gaussian(plain, data)
    with pytest.raises(ValueError, match="8 other layers are random .*set adapter.depth = 'head', or sample with"):
        tfb_ext.research.head_gaussian(bayesian(depth="all"), data)
    with pytest.raises(ValueError, match="'default' has no sigma yet"):
        tfb_ext.research.head_gaussian(bayesian(sigma=None), data)
    adapter = bayesian()
    with pytest.raises(ValueError, match="samples is 0, expected a count"):
        tfb_ext.research.head_gaussian(adapter, data).sample(0, torch.Generator())
    for points in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="points is .*, expected a count of at least 1"):
            tfb_ext.research.head_gaussian(adapter, data).probabilities(points)  # type: ignore[arg-type]
    with pytest.raises(SamplingError, match="is switched off"), adapter.model.disable_adapter():
        tfb_ext.research.head_gaussian(adapter, data)
    with pytest.raises(SamplingError, match="contexts of one model do not nest"), adapter.predictive(2):
        tfb_ext.research.head_gaussian(adapter, data)
    adapter.model.train()
    with pytest.raises(SamplingError, match="training mode"):
        tfb_ext.research.head_gaussian(adapter, data)
    adapter.model.eval()
    monkeypatch.setattr("tfb_ext.research.head.MANY_CLASSES", 50)
    batch = zoo.inputs(2)
    with pytest.raises(
        ValueError, match="head has 97 outputs, expected at most 50 classes; encode the data with label"
    ):
        tfb_ext.research.head_gaussian(adapter, [{**batch, "labels": batch["input_ids"]}])
    assert len(tfb_ext.research.head_gaussian(adapter, data).mean) == len(data)
    adapter.unload()
    with pytest.raises(SamplingError, match="was unloaded"):
        tfb_ext.research.head_gaussian(adapter, data)


def test_another_layer_above_the_blocks_is_refused() -> None:
    model = zoo.peft_model("bert", target_modules=["pooler.dense", "classifier"], task_type=None)
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA, depth="head")
    with pytest.raises(ValueError, match="1 other layers are random .first: 'bert.pooler.dense'."):
        tfb_ext.research.head_gaussian(adapter, data_for("bert"))


def test_soft_capped_logits_are_refused() -> None:
    adapter = tfb_ext.bayesianize(
        zoo.peft_model("gemma2", target_modules=["q_proj", "lm_head"]), sigma=SIGMA, depth="head"
    )
    with pytest.raises(UnsupportedModelError, match=r"caps its logits \(final_logit_softcapping = 3.0\)"):
        tfb_ext.research.head_gaussian(adapter, data_for("llama-head"))


def test_a_model_that_changes_its_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, data = bayesian(), data_for("llama-head")
    model = adapter.anatomy.model
    original = type(model).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    scaled.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(UnsupportedModelError, match="changes its logits after its head"):
        tfb_ext.research.head_gaussian(adapter, data)


def test_regression_heads_are_refused() -> None:
    adapter = bayesian("llama-cls")
    adapter.anatomy.model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="head is regression, whose outputs are no class probabilities"):
        tfb_ext.research.head_gaussian(adapter, data_for("llama-cls"))
