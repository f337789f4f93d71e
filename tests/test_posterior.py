"""The canonical form against the paper's: moments, uniqueness of the basis, degenerate B, names."""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tfb_ext import ops
from tfb_ext.errors import UnsupportedModelError
from tfb_ext.posterior.canonical import (
    LayerPosterior,
    canonical_name,
    layer_id,
    layer_posterior,
    orthonormal_basis,
    unique_layer_ids,
)

M, N, R, S = 12, 16, 4, 4000
SIGMA, SCALING = 0.3, 2.0


def rotated(seed: int = 0, d: tuple[float, ...] = (3.0, 1.5, 0.4, 0.05)) -> tuple[Tensor, Tensor]:
    """``A`` and a ``B = U diag(d) V^T`` whose V is a random rotation."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(M, len(d), generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(len(d), len(d), generator=g, dtype=torch.float64))[0]
    b = u @ torch.diag(torch.tensor(d, dtype=torch.float64)) @ v.T
    return torch.randn(len(d), N, generator=g), b.float()


def deviations(posterior: LayerPosterior, x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared Frobenius norms (S,) of ``dW_k - dW`` and ``(dW_k - dW) x`` (S, m), float64."""
    norms, outputs = [], []
    change = SCALING * SIGMA * posterior.basis.double()
    for k in range(S):
        noise = ops.noise(posterior.rank, N, 11, posterior.layer, k, torch.device("cpu")).double()
        delta = change @ noise
        norms.append(delta.square().sum())
        outputs.append(delta @ x)
    return torch.stack(norms), torch.stack(outputs)


def covariance_misfit(outputs: Tensor, expected: Tensor) -> float:
    """Largest difference of the sample covariance (mean known to be zero) from ``expected``, in standard errors."""
    count = outputs.shape[0]
    sample = outputs.T @ outputs / count
    diagonal = expected.diagonal()
    error = ((diagonal[:, None] * diagonal[None, :] + expected.square()) / count).sqrt()
    return float(((sample - expected).abs() / error).max())


def form_of_the_paper(a: Tensor, b: Tensor, rotate: bool = True) -> tuple[Tensor, Tensor]:
    """``U diag(d)`` and draws (S, r, n) of ``A' ~ N(V^T A, (sigma / d)^2)``; ``rotate=False`` forgets V."""
    u, d, vt = torch.linalg.svd(b.double(), full_matrices=False)
    noise = torch.randn(S, R, N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    draws = (vt if rotate else torch.eye(R, dtype=torch.float64)) @ a.double() + (SIGMA / d)[:, None] * noise
    return (u * d) if rotate else b.double(), draws


@pytest.fixture(scope="module")
def drawn() -> tuple[LayerPosterior, Tensor, Tensor, Tensor]:
    a, b = rotated()
    posterior = layer_posterior("model.layers.0.q_proj", a, b, SCALING)
    x = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return posterior, x, *deviations(posterior, x)


def test_sigma_zero_is_the_adapter() -> None:
    a, b = rotated()
    posterior = layer_posterior("q", a, b, SCALING)
    product = posterior.basis.double() @ posterior.mean.double()
    exact = b.double() @ a.double()
    assert (product - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_expected_squared_norm(drawn: tuple[LayerPosterior, Tensor, Tensor, Tensor]) -> None:
    posterior, _, norms, _ = drawn
    freedom, unit = posterior.rank * N, (SCALING * SIGMA) ** 2
    standard_error = unit * math.sqrt(2 * freedom / S)
    assert abs(float(norms.mean()) - unit * freedom) < 5 * standard_error
    assert standard_error < 0.01 * unit * freedom  # a factor of d, s or sigma too many would be seen


def test_covariance_of_the_output(drawn: tuple[LayerPosterior, Tensor, Tensor, Tensor]) -> None:
    posterior, x, _, outputs = drawn
    u = posterior.basis.double()
    expected = (SCALING * SIGMA) ** 2 * x.dot(x) * u @ u.T
    assert covariance_misfit(outputs, expected) < 5


def test_same_distribution_as_the_paper(drawn: tuple[LayerPosterior, Tensor, Tensor, Tensor]) -> None:
    posterior, x, _, _ = drawn
    a, b = rotated()
    u = posterior.basis.double()
    expected = (SCALING * SIGMA) ** 2 * x.dot(x) * u @ u.T
    mean = SCALING * (b.double() @ a.double())
    left, draws = form_of_the_paper(a, b)
    outputs = SCALING * torch.einsum("mr,srn,n->sm", left, draws, x) - mean @ x
    assert covariance_misfit(outputs, expected) < 5
    norms = (SCALING * left @ draws - mean).square().sum((1, 2))
    freedom, unit = R * N, (SCALING * SIGMA) ** 2
    assert abs(float(norms.mean()) - unit * freedom) < 5 * unit * math.sqrt(2 * freedom / S)


def test_the_forgotten_rotation_would_be_seen(drawn: tuple[LayerPosterior, Tensor, Tensor, Tensor]) -> None:
    posterior, x, _, _ = drawn
    a, b = rotated()
    u = posterior.basis.double()
    left, draws = form_of_the_paper(a, b, rotate=False)
    outputs = SCALING * (torch.einsum("mr,srn,n->sm", left, draws, x) - b.double() @ (a.double() @ x))
    assert covariance_misfit(outputs, (SCALING * SIGMA) ** 2 * x.dot(x) * u @ u.T) > 20


def test_omega_and_singular_values() -> None:
    a, b = rotated()
    posterior = layer_posterior("q", a, b, 1.0)
    expected = torch.tensor([3.0, 1.5, 0.4, 0.05], dtype=torch.float64)
    assert torch.allclose(posterior.singular_values, expected, rtol=1e-5)
    assert torch.equal(posterior.omega(0.3), 0.3 / posterior.singular_values)


def test_basis_is_gram_schmidt_with_positive_diagonal() -> None:
    _, b = rotated()
    u, _ = orthonormal_basis(b)
    upper = u.T @ b.double()
    assert torch.allclose(u.T @ u, torch.eye(R, dtype=torch.float64), atol=1e-14)
    assert (upper.diagonal() > 0).all()
    assert upper.tril(-1).abs().max() < 1e-14 * upper.abs().max()


def test_basis_is_a_function_of_the_values() -> None:
    _, b = rotated()
    u, d = orthonormal_basis(b)
    strided = torch.zeros(2 * M, 2 * R)[::2, ::2].copy_(b)
    for other in (b.clone(), b.double(), b.T.contiguous().T, strided, torch.nn.Parameter(b)):
        again, values = orthonormal_basis(other)
        assert torch.equal(again, u) and torch.equal(values, d)


def test_basis_keeps_to_its_columns() -> None:
    """The first columns fix the first basis vectors; positive scales of columns change nothing but rounding."""
    _, b = rotated()
    u, _ = orthonormal_basis(b)
    shorter, _ = orthonormal_basis(b[:, :2])
    assert torch.allclose(shorter, u[:, :2], atol=1e-14)
    scaled, _ = orthonormal_basis(b * torch.tensor([2.0, 0.25, 8.0, 1.0]))
    assert torch.allclose(scaled, u, atol=1e-13)


def test_basis_is_continuous() -> None:
    _, b = rotated(d=(3.0, 1.5, 0.4, 0.4))  # an SVD's basis is free to turn inside the repeated pair
    u, _ = orthonormal_basis(b.double())
    direction = torch.randn(M, R, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    changes = [float((orthonormal_basis(b.double() + h * direction)[0] - u).norm()) for h in (1e-4, 1e-6, 1e-8)]
    condition = 3.0 / 0.4
    for change, h in zip(changes, (1e-4, 1e-6, 1e-8), strict=True):
        assert change < 4 * condition * h * float(direction.norm()) / 0.4
        assert change > 0


@pytest.mark.parametrize(
    ("columns", "kept"),
    [
        pytest.param(lambda p, q: [p, p, q, 2 * p - q], [0, 2], id="duplicates"),
        pytest.param(lambda p, q: [0 * p, p, 0 * p, q], [1, 3], id="zero columns"),
        pytest.param(lambda p, q: [p, q, p + q, 1e-9 * p], [0, 1], id="combinations"),
        pytest.param(lambda p, q: [p, 0 * p, 0 * p, 0 * p], [0], id="one column"),
    ],
)
def test_dependent_columns_are_dropped(columns: object, kept: list[int]) -> None:
    p = torch.tensor([1.0, 2.0, 0.0, -1.0, 3.0, 0.5])
    q = torch.tensor([0.0, 1.0, 1.0, 2.0, -1.0, 0.0])
    b = torch.stack(columns(p, q), dim=1)  # type: ignore[operator]
    u, d = orthonormal_basis(b)
    assert u.shape == (6, len(kept)) and d.shape == (len(kept),)
    assert torch.allclose(u, orthonormal_basis(b[:, kept])[0], atol=1e-14)
    a = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    posterior = layer_posterior("q", a, b, 1.0)
    assert posterior.mean.shape == (len(kept), 8)
    assert torch.allclose(posterior.basis @ posterior.mean, b @ a, atol=1e-5)


def test_product_of_low_rank_in_float32() -> None:
    g = torch.Generator().manual_seed(1)
    b = torch.randn(64, 3, generator=g) @ torch.randn(3, 8, generator=g)
    a = torch.randn(8, 10, generator=g)
    posterior = layer_posterior("q", a, b, 1.0)
    assert posterior.rank == 3
    exact = b.double() @ a.double()
    error = (posterior.basis.double() @ posterior.mean.double() - exact).abs().max()
    assert error < 64 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_fewer_outputs_than_rank() -> None:
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(8, 10, generator=g), torch.randn(3, 8, generator=g)
    posterior = layer_posterior("score", a, b, 1.0)
    assert posterior.basis.shape == (3, 3) and posterior.mean.shape == (3, 10)
    assert torch.allclose(posterior.basis @ posterior.basis.T, torch.eye(3), atol=1e-6)
    assert torch.allclose(posterior.basis @ posterior.mean, b @ a, atol=1e-4)


def test_tiny_singular_values_stay() -> None:
    """1e-4 of the largest: the paper's Omega would be 1e4 sigma, beyond half precision at sigma = 10."""
    a, b = rotated(d=(1.0, 0.5, 1e-3, 1e-4))
    posterior = layer_posterior("q", a, b, 1.0)
    assert posterior.rank == 4
    assert torch.isfinite(posterior.mean).all()
    assert float(posterior.mean.abs().max()) <= float((b.double() @ a.double()).norm()) * (1 + 1e-6)
    assert torch.allclose(posterior.basis.T @ posterior.basis, torch.eye(4), atol=1e-6)


def test_small_weights_are_not_zero() -> None:
    a, b = rotated()
    small = layer_posterior("q", a, b * 2.0**-80, 1.0)
    assert torch.equal(small.basis, layer_posterior("q", a, b, 1.0).basis)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_the_full_weight_is_never_made() -> None:
    m, n, r = 300, 200, 4
    with Largest() as largest:
        layer_posterior("q", torch.randn(r, n), torch.randn(m, r), 1.0)
    assert largest.elements <= 2 * r * m


@pytest.mark.parametrize(
    ("a", "b", "scaling", "words"),
    [
        (torch.ones(2, 3), torch.zeros(4, 2), 1.0, ["lora_B is all zero", "train the adapter first", "model.q"]),
        (torch.ones(2, 3), torch.full((4, 2), float("nan")), 1.0, ["lora_B holds NaN", "model.q"]),
        (torch.ones(2, 3), torch.full((4, 2), float("inf")), 1.0, ["lora_B holds NaN or infinite", "model.q"]),
        (torch.full((2, 3), float("nan")), torch.ones(4, 2), 1.0, ["lora_A holds NaN", "damaged", "model.q"]),
        (torch.ones(2, 3, device="meta"), torch.ones(4, 2), 1.0, ["meta device", "before dispatching", "model.q"]),
        (torch.ones(2, 3), torch.ones(4, 2, device="meta"), 1.0, ["meta device", "before dispatching", "model.q"]),
        (torch.ones(2, 3), torch.ones(4, 2), 0.0, ["scaling is 0.0", "finite non-zero", "model.q"]),
        (torch.ones(2, 3), torch.ones(4, 2), float("inf"), ["scaling is inf", "model.q"]),
        (torch.ones(3, 3), torch.ones(4, 2), 1.0, ["(4, 2)", "(3, 3)", "do not chain", "model.q"]),
    ],
)
def test_bad_weights_name_layer_and_reason(a: Tensor, b: Tensor, scaling: float, words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        layer_posterior("base_model.model.model.q", a, b, scaling)
    for word in words:
        assert word in str(error.value)


def test_layer_id_is_the_crc_of_the_canonical_name() -> None:
    name = "model.layers.3.self_attn.q_proj"
    assert layer_id(name) == zlib.crc32(name.encode())
    for wrapped in ("base_model.model." + name, "_orig_mod." + name, "base_model.model._orig_mod." + name):
        assert canonical_name(wrapped) == name and layer_id(wrapped) == layer_id(name)
    assert layer_id("123456789") == 0xCBF43926  # the check value of CRC-32


def test_colliding_names_are_an_error() -> None:
    first, second = "plumless", "buckeroo"  # the textbook collision of CRC-32
    assert zlib.crc32(first.encode()) == zlib.crc32(second.encode())
    with pytest.raises(UnsupportedModelError, match=r"'plumless' and 'buckeroo' have the same noise number 0x4ddb0c25"):
        unique_layer_ids([first, "other", second])
    assert unique_layer_ids(["a", "b", "a"]) == {"a": layer_id("a"), "b": layer_id("b")}


@pytest.mark.parametrize("m", [64, 4096, 14336])
def test_tall_matrices_keep_their_small_directions(m: int) -> None:
    """The rank bound must not grow with m: an adapter of rank 16 with singular values from 1 to 1e-3 stays whole."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(m, 16, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    b = ((left * torch.logspace(0, -3, 16, dtype=torch.float64)) @ right.T).float()
    a = torch.randn(16, 8, generator=generator)
    found = layer_posterior("x", a, b, 1.0)
    assert found.rank == 16
    exact = b.double() @ a.double()
    assert (found.basis.double() @ found.mean.double() - exact).norm() <= 1e-6 * exact.norm()
