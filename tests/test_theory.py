"""KL, implied weight and the paper's form against torch.distributions, Monte Carlo, known curves and float64."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as torch_kl

import tfb_ext
from tfb_ext import ops
from tfb_ext.posterior.config import FAMILIES

SIGMA, PRIOR = 0.07, 0.2


def bayesian(name: str = "llama-head", **options: Any) -> Any:
    return tfb_ext.bayesianize(zoo.peft_model(name), **{"sigma": SIGMA, **options})


def mean_of(adapter: Any, name: str) -> Tensor:
    """The mean of the noisy coordinates of one layer, from the adapter's own weights, float64."""
    module = zoo.lora_layers(adapter)[name]
    a, b = (part["default"].weight.detach().double() for part in (module.lora_A, module.lora_B))
    if adapter.family == "constant":
        return a
    if adapter.family == "full-rank":
        return b @ a
    return torch.linalg.svd(b, full_matrices=False)[0].T @ b @ a


def around(mean: Tensor, sigma: float) -> Independent:
    return Independent(Normal(mean, torch.full_like(mean, sigma)), mean.dim())


# KL -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.slow_but(["llama-head", "gpt2"], "gpt2"))
@pytest.mark.parametrize("sigma", [1e-4, 0.07, 0.2, 3.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_kl_equals_torchs(family: str, sigma: float, name: str) -> None:
    adapter = bayesian(name, family=family)
    found = tfb_ext.research.kl_divergence(adapter, PRIOR, sigma)
    assert list(found.layers) == list(adapter.layers)
    dimensions = 0
    for layer, value in found.layers.items():
        mean = mean_of(adapter, layer)
        expected = float(torch_kl(around(mean, sigma), around(torch.zeros_like(mean), PRIOR)))
        dimensions += mean.numel()
        assert value == pytest.approx(expected, rel=1e-6)  # M is kept in float32
        assert isinstance(value, float) and value > 0
    assert found.dimensions == dimensions
    assert found.total == pytest.approx(sum(found.layers.values()), rel=1e-14)
    assert (found.sigma, found.prior_sigma) == (sigma, PRIOR)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["low-rank", "constant"])
def test_kl_is_the_average_log_ratio_of_samples(family: str) -> None:
    adapter = bayesian(depth=1, family=family, antithetic=False)
    found = tfb_ext.research.kl_divergence(adapter, PRIOR)
    for layer in adapter.random_layers[:2]:
        posterior = adapter.posterior(layer)
        draws = torch.stack([adapter.sample_weights(layer, k)[1] for k in range(3000)]).double()
        mean = posterior.mean.double()
        ratio = around(mean, SIGMA).log_prob(draws) - around(torch.zeros_like(mean), PRIOR).log_prob(draws)
        error = float(ratio.std()) / math.sqrt(len(ratio))
        assert abs(float(ratio.mean()) - found.layers[layer]) < 5 * error
        assert error < 0.01 * found.layers[layer]


def test_scaling_cancels() -> None:
    """Densities of ``s (M + sigma E)`` with their Jacobian: the same KL at every LoRA scaling."""
    adapter = bayesian(depth=1)
    layer = adapter.random_layers[0]
    value = tfb_ext.research.kl_divergence(adapter, PRIOR).layers[layer]
    mean, scaling = mean_of(adapter, layer), adapter.posterior(layer).scaling
    assert scaling == 2.0
    scaled = torch_kl(around(scaling * mean, scaling * SIGMA), around(torch.zeros_like(mean), scaling * PRIOR))
    assert value == pytest.approx(float(scaled), rel=1e-6)
    other = tfb_ext.bayesianize(zoo.peft_model("llama-head", lora_alpha=40), sigma=SIGMA, depth=1)
    assert other.posterior(layer).scaling == 10.0
    assert tfb_ext.research.kl_divergence(other, PRIOR).layers[layer] == value


def test_only_random_layers_count() -> None:
    adapter = bayesian()
    everything = tfb_ext.research.kl_divergence(adapter, PRIOR)
    for depth in (1, 2, "head"):
        found = tfb_ext.research.kl_divergence(adapter, PRIOR, depth=depth)
        other = bayesian(depth=depth)
        assert tfb_ext.research.kl_divergence(other, PRIOR) == found
        assert tuple(found.layers) == other.random_layers == adapter.random_layers_at(depth)
        assert found.layers.items() < everything.layers.items()
        assert found.dimensions == sum(other.posterior(n).mean.numel() for n in other.random_layers)
    assert tuple(found.layers) == ("lm_head",)


def test_kl_refuses_bad_scales() -> None:
    adapter = bayesian(sigma=None)
    with pytest.raises(ValueError, match="'default' has no sigma yet"):
        tfb_ext.research.kl_divergence(adapter, PRIOR)
    for bad in (0, -1.0, math.nan, math.inf, True, "wide", [0.1, 0.2]):
        with pytest.raises(ValueError, match="prior_sigma is .*, expected a finite number above 0"):
            tfb_ext.research.kl_divergence(adapter, bad, 0.1)
        with pytest.raises(ValueError, match="sigma is .*, expected a finite number above 0"):
            tfb_ext.research.kl_divergence(adapter, PRIOR, bad)
    with pytest.raises(ValueError, match="depth is 9"):
        tfb_ext.research.kl_divergence(adapter, PRIOR, 0.1, depth=9)


# Implied weight -----------------------------------------------------------------------------------------------------------


def searched(loss: Callable[[float], float], sigma: float, tried: list[float]) -> Any:
    evaluations = tuple(SimpleNamespace(sigma=s, nll=loss(s)) for s in tried)
    return SimpleNamespace(sigma=sigma, evaluations=evaluations, baseline=SimpleNamespace(sigma=0.0, nll=loss(0.0)))


def test_weight_of_a_parabola_is_exact() -> None:
    adapter, c = bayesian(depth=2), 3.7
    found = tfb_ext.research.implied_weight(
        searched(lambda s: 0.4 + c * s**2, 0.05, [0.1, 0.01, 0.05, 0.02]), adapter, PRIOR
    )
    dimensions = tfb_ext.research.kl_divergence(adapter, PRIOR).dimensions
    assert found.slope == pytest.approx(2 * c * 0.05, rel=1e-9) and found.curvature == pytest.approx(2 * c, rel=1e-9)
    assert found.value == pytest.approx(2 * c * 0.05 / (dimensions * (1 / 0.05 - 0.05 / PRIOR**2)), rel=1e-9)
    assert (found.dimensions, found.sigma, found.prior_sigma, found.reason) == (dimensions, 0.05, PRIOR, "")


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: 0.3 + 2.0 * s**2,
        lambda s: 0.3 - s + 12 * s**2,
        lambda s: 0.3 + 40 * s**4,
        lambda s: math.exp(5 * s),
        lambda s: 0.1 + s - 3 * s**2,  # bends down, but less than the KL bends up
    ],
)
@pytest.mark.parametrize("family", ["low-rank", "full-rank"])
def test_the_found_sigma_minimises_with_the_implied_weight(family: str, loss: Callable[[float], float]) -> None:
    adapter, sigma = bayesian(depth=1, family=family), 0.06
    tried = [0.015, 0.03, 0.0585, 0.06, 0.0615, 0.12]
    found = tfb_ext.research.implied_weight(searched(loss, sigma, tried), adapter, PRIOR)
    assert found.reason == "" and found.value > 0
    grid = [sigma * 1.005**k for k in range(-300, 200)]
    objective = [loss(s) + found.value * tfb_ext.research.kl_divergence(adapter, PRIOR, s).total for s in grid]
    assert grid[min(range(len(grid)), key=objective.__getitem__)] == pytest.approx(sigma, rel=0.0051)
    # Another weight has its minimum elsewhere.
    other = [loss(s) + 3 * found.value * tfb_ext.research.kl_divergence(adapter, PRIOR, s).total for s in grid]
    assert grid[min(range(len(grid)), key=other.__getitem__)] > 1.05 * sigma


def test_the_slope_is_the_neighbours_and_the_baseline_is_one() -> None:
    adapter = bayesian()

    def parabola(s: float) -> float:
        return s**2 if s < 0.2 else 99.0

    found = tfb_ext.research.implied_weight(searched(parabola, 0.1, [0.3, 0.1, 0.15]), adapter, 1.0)
    assert found.slope == pytest.approx(0.2)  # from 0, 0.1 and 0.15
    between = tfb_ext.research.implied_weight(searched(parabola, 0.11, [0.05, 0.1, 0.15, 0.3]), adapter, 1.0)
    assert between.slope == pytest.approx(0.22)  # sigma itself was not tried: 0.05, 0.1 and 0.15


def test_weight_counts_the_searchs_depth() -> None:
    adapter = bayesian()
    search = searched(lambda s: s**2, 0.05, [0.02, 0.05, 0.1])
    lower, upper = (tfb_ext.research.implied_weight(search, adapter, PRIOR, depth=d) for d in ("all", "head"))
    assert upper.dimensions == adapter.posterior("lm_head").dimensions < lower.dimensions
    assert upper.value * upper.dimensions == pytest.approx(lower.value * lower.dimensions)


@pytest.mark.parametrize(
    ("loss", "sigma", "tried", "prior", "reason"),
    [
        (lambda s: s**2, 0.1, [0.05, 0.1], 0.5, "sigma 0.1 is the largest that was tried"),
        (lambda s: math.nan if s == 0 else s**2, 0.05, [0.05, 0.1], 0.5, "sigma 0.05 is the smallest that was tried"),
        (lambda s: (s - 0.11) ** 2, 0.1, [0.05, 0.1, 0.15], 0.5, r"the NLL does not rise at sigma 0.1"),
        (lambda s: 1 - s, 0.1, [0.05, 0.1, 0.15], 0.5, r"the NLL does not rise at sigma 0.1 \(slope -1\)"),
        (lambda s: s**2, 0.1, [0.05, 0.1, 0.15], 0.1, r"the prior \(0.1\) is not wider than the posterior \(0.1\)"),
        (lambda s: s**2, 0.1, [0.05, 0.1, 0.15], 0.05, "pass a larger prior_sigma"),
        (lambda s: s - 4.9 * s**2, 0.1, [0.05, 0.1, 0.15], 0.5, r"bends down at sigma 0.1 \(second derivative -9.8\)"),
        (lambda s: s**2, 0.1, [0.15], 0.5, "only two sigmas were tried beside 0.1"),
    ],
)
def test_no_weight_has_a_reason(
    loss: Callable[[float], float], sigma: float, tried: list[float], prior: float, reason: str
) -> None:
    found = tfb_ext.research.implied_weight(searched(loss, sigma, tried), bayesian(), prior)
    assert math.isnan(found.value)
    assert re.search(reason, found.reason), found.reason


@pytest.mark.slow
def test_weight_of_a_real_search() -> None:
    adapter = bayesian("llama", sigma=None)
    data = small_sets.labelled(adapter, small_sets.encoded(24))
    found = tfb_ext.search_sigma(adapter, data, samples=4)
    weight = tfb_ext.research.implied_weight(found, adapter, 10.0, depth=found.depth)
    assert weight.sigma == found.sigma
    assert (weight.value > 0) if not weight.reason else math.isnan(weight.value)


# The paper's form -----------------------------------------------------------------------------------------------------------


def matrices(adapter: Any, name: str) -> tuple[Tensor, Tensor]:
    module = zoo.lora_layers(adapter)[name]
    return module.lora_A["default"].weight.detach().double(), module.lora_B["default"].weight.detach().double()


@pytest.mark.parametrize("name", ["llama-head", "gpt2", "bert"])
def test_paper_form_is_the_svd(name: str) -> None:
    adapter = bayesian(name)
    for layer in adapter.layers:
        a, b = matrices(adapter, layer)
        form, posterior = tfb_ext.research.paper_form(adapter, layer), adapter.posterior(layer)
        exact = b @ a
        assert (form.b @ form.a - exact).abs().max() <= 64 * torch.finfo(torch.float64).eps * b.norm() * a.norm()
        gram = form.b.T @ form.b
        assert torch.allclose(gram, posterior.singular_values.square().diag(), atol=1e-12 * float(gram.max()))
        assert torch.equal(form.omega, (SIGMA / posterior.singular_values)[:, None].expand(4, a.shape[1]))
        assert torch.equal(form.omega[:, 0], posterior.omega(SIGMA))
        assert (form.b.gather(0, form.b.abs().argmax(0, keepdim=True)) > 0).all()
        assert form.scaling == 2.0
        assert all(t.dtype == torch.float64 for t in (form.a, form.b, form.omega))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["low-rank", "constant"])
@pytest.mark.parametrize("rank_deficient", [False, True])
def test_paper_form_has_our_distribution(rank_deficient: bool, family: str) -> None:
    """Covariance of ``dW x`` under B' (A' + Omega E) and under the adapter's samples: analytic, and by draws."""
    model = zoo.peft_model("llama-head")
    if rank_deficient:
        b = model.get_base_model().lm_head.lora_B["default"].weight.data
        b[:, 1] = 2 * b[:, 0]
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA, family=family, antithetic=False)
    form = tfb_ext.research.paper_form(adapter, "lm_head")
    a, b = matrices(adapter, "lm_head")
    assert form.a.shape[0] == (3 if rank_deficient else 4)
    assert (form.b @ form.a - b @ a).abs().max() <= 1e-6 * b.norm() * a.norm()
    # Independent entries: Cov[(B' (Omega * E) x)] = B' diag(sum_j Omega_ij^2 x_j^2) B'^T.
    x = torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    theirs = form.b * (form.omega.square() @ x.square()) @ form.b.T
    posterior = adapter.posterior("lm_head")
    basis = posterior.basis.double()
    ours = SIGMA**2 * x.dot(x) * basis @ basis.T
    assert torch.allclose(theirs, ours, atol=1e-6 * float(ours.max()))
    # Our samples: mean and covariance of U (M + sigma E) x against the paper's, within 5 standard errors.
    count = 3000
    outputs = torch.stack(
        [u.double() @ (w.double() @ x) for u, w in (adapter.sample_weights("lm_head", k) for k in range(count))]
    )
    deviation = outputs - form.b @ (form.a @ x)
    variance = theirs.diagonal()
    assert (deviation.mean(0).abs() <= 5 * (variance / count).sqrt()).all()
    error = ((variance[:, None] * variance + theirs.square()) / count).sqrt()
    assert ((deviation.T @ deviation / count - theirs).abs() <= 5 * error).all()
    assert ((deviation.T @ deviation / count - 1.3 * theirs).abs() > 5 * error).any()


def test_paper_form_by_sigma_and_refusals() -> None:
    adapter = bayesian()
    layer = adapter.layers[0]
    assert torch.allclose(
        tfb_ext.research.paper_form(adapter, layer, 2 * SIGMA).omega,
        2 * tfb_ext.research.paper_form(adapter, layer).omega,
    )
    assert torch.equal(
        tfb_ext.research.paper_form(adapter, "base_model.model." + layer).b,
        tfb_ext.research.paper_form(adapter, layer).b,
    )
    with pytest.raises(ValueError, match="no Bayesian layer 'nowhere' in adapter 'default'; see adapter.layers"):
        tfb_ext.research.paper_form(adapter, "nowhere")
    with pytest.raises(ValueError, match="'default' has no sigma yet"):
        tfb_ext.research.paper_form(bayesian(sigma=None), layer)
    with pytest.raises(ValueError, match="a full-rank posterior has no Omega"):
        tfb_ext.research.paper_form(bayesian(family="full-rank"), layer)


def test_noise_is_the_adapters() -> None:
    """The Monte-Carlo checks above draw from the generator that the model samples with."""
    adapter = bayesian(antithetic=False)
    _, drawn = adapter.sample_weights("lm_head", 4)
    posterior = adapter.posterior("lm_head")
    noise = ops.noise(*posterior.mean.shape, adapter.seed, posterior.layer, 4)
    assert torch.equal(drawn, posterior.mean + SIGMA * noise)
