"""The operators against their definitions: exact identities, statistics of the noise, numerics, errors, tracing."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfb_ext import ops
from tfb_ext.ops import reference

LAYER = 0xC0FFEE11
SEED = 2**64 - 12345
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN, so an output that is not written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def seed_tensor(device: torch.device, seed: int = SEED) -> Tensor:
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed], dtype=torch.int64, device=device)


class Case:
    """Inputs of one shrink call: S groups of G rows."""

    def __init__(
        self,
        device: torch.device,
        r: int,
        n: int,
        groups: int,
        rows: int,
        dtype: torch.dtype = torch.float32,
        mean_dtype: torch.dtype | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(r * 1000003 + n * 101 + groups)
        self.x = torch.randn(groups * rows, n, generator=generator).to(device, dtype)
        self.mean = torch.randn(r, n, generator=generator).to(device, mean_dtype or torch.float32)
        self.sigma = (0.1 + torch.rand(groups, generator=generator)).to(device)
        self.samples = torch.randperm(4 * groups, generator=generator)[:groups].to(device, torch.int32)
        self.seed = seed_tensor(device)

    def shrink(self, antithetic: bool = False) -> Tensor:
        return ops.shrink(self.x, self.mean, self.sigma, self.samples, self.seed, LAYER, antithetic=antithetic)

    def weights(self, antithetic: bool = False) -> Tensor:
        """(S, r, n) float64, with the noise of the operator itself."""
        r, n = self.mean.shape
        make = [ops.noise(r, n, SEED, LAYER, k, self.x.device, antithetic) for k in self.samples.tolist()]
        return self.mean.double() + self.sigma.double()[:, None, None] * torch.stack(make).double()


def rounding_slack(terms_squared: Tensor, dtype: torch.dtype, length: int) -> float:
    """What rounding may add to a sum of ``length`` terms with these squares: two units of the type on the terms and the result,
    and a float32 accumulation's random walk."""
    scale = terms_squared.sqrt().max().item()
    return scale * (2 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(length))


def assert_as_good_as(out: Tensor, low: Tensor, exact: Tensor, slack: float) -> None:
    assert out.isfinite().all()
    error, allowed = (out.double() - exact).abs().max(), (low.double() - exact).abs().max()
    assert error <= 2 * allowed + slack, f"error {error:.3e}, plain torch {allowed:.3e}, slack {slack:.3e}"


# noise


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize(("r", "n"), [(1, 1), (3, 7), (8, 64), (13, 1031), (17, 255), (64, 300)])
def test_noise_is_the_contract(device: torch.device, r: int, n: int, antithetic: bool) -> None:
    for sample in (0, 3, 2**31 - 1):
        exact = reference.noise_float64(r, n, SEED, LAYER, sample, "cpu", antithetic)
        got = ops.noise(r, n, SEED, LAYER, sample, device, antithetic)
        assert got.shape == (r, n) and got.dtype == torch.float32 and got.device.type == device.type
        assert (got.cpu().double() - exact).abs().max() <= 1e-5


def test_contract_from_scratch() -> None:
    """One column block with Python's own integers and math, independent of reference.py's vector arithmetic."""

    def philox(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(10):
            p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = [p1 >> 32 ^ counter[1] ^ key[0], p1 % 2**32, p0 >> 32 ^ counter[3] ^ key[1], p0 % 2**32]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        return counter

    row, block, sample = 5, 9, 6
    w = philox([block, row, sample, LAYER], [SEED % 2**32, SEED >> 32])
    expected = []
    for a, b in ((w[0], w[1]), (w[2], w[3])):
        u, v = ((word + 0.5) * 2.0**-32 for word in (a, b))
        radius = math.sqrt(-2 * math.log(u))
        expected += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    for make in (ops.noise, reference.noise):
        got = make(6, 40, SEED, LAYER, sample)[row, 4 * block :]
        assert torch.allclose(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_noise_moments_tails_and_neighbours(device: torch.device) -> None:
    e = torch.stack([ops.noise(64, 4096, SEED, LAYER, k, device) for k in range(8)]).double()
    count = e.numel()
    for power, expected, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((e**power).mean() - expected) <= 5 * math.sqrt(variance / count), f"moment {power}"
    for bound in (1.0, 2.0, 3.0, 4.0):
        p = math.erfc(bound / math.sqrt(2))
        assert abs((e.abs() > bound).double().mean() - p) <= 5 * math.sqrt(p * (1 - p) / count), f"tail {bound}"
    neighbours = {
        "samples": (e[:-1], e[1:]),
        "rows": (e[:, :-1], e[:, 1:]),
        "columns": (e[..., :-1], e[..., 1:]),
        "blocks": (e[..., :-4], e[..., 4:]),
        "lanes": (e[:, :-8], e[:, 8:]),
    }
    for name, (a, b) in neighbours.items():
        assert abs((a * b).mean()) <= 5 / math.sqrt(a.numel()), f"neighbouring {name} correlate"
        assert abs((a.square() * b.square()).mean() - 1) <= 5 * math.sqrt(8 / a.numel()), f"{name}: squares correlate"


def test_noise_depends_on_every_coordinate(device: torch.device) -> None:
    base = ops.noise(8, 512, 1, 2, 3, device)
    others = [
        ops.noise(8, 512, 1 + 2**32, 2, 3, device),
        ops.noise(8, 512, 2, 2, 3, device),
        ops.noise(8, 512, 1, 3, 3, device),
        ops.noise(8, 512, 1, 2 + 2**31, 3, device),
        ops.noise(8, 512, 1, 2, 4, device),
        ops.noise(8, 512, 1, 3, 2, device),
    ]
    for other in others:
        assert abs((base * other).mean()) <= 5 / math.sqrt(base.numel())
    assert torch.equal(base, ops.noise(8, 512, 1, 2, 3, device))


def test_noise_of_a_smaller_matrix_is_a_corner(device: torch.device) -> None:
    large = ops.noise(70, 1030, SEED, LAYER, 4, device)
    for r, n in ((1, 1), (7, 9), (9, 1029), (64, 256)):
        assert torch.equal(ops.noise(r, n, SEED, LAYER, 4, device), large[:r, :n])


def test_antithetic_pairs(device: torch.device) -> None:
    even, odd = (ops.noise(5, 100, SEED, LAYER, k, device, antithetic=True) for k in (6, 7))
    assert torch.equal(odd, -even)
    assert torch.equal(even, ops.noise(5, 100, SEED, LAYER, 6, device))


# shrink


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("r", "n", "groups", "rows"),
    [
        (1, 1, 1, 1),
        (3, 7, 2, 5),
        (8, 64, 3, 16),
        (8, 4096, 2, 33),
        (13, 1031, 3, 17),
        (16, 600, 1, 70),
        (31, 2049, 2, 3),
        (64, 256, 2, 65),
        (70, 129, 2, 19),
        (136, 300, 1, 40),
    ],
)
def test_shrink_numerics(device: torch.device, r: int, n: int, groups: int, rows: int, dtype: torch.dtype) -> None:
    for mean_dtype in {torch.float32, dtype}:
        case = Case(device, r, n, groups, rows, dtype, mean_dtype)
        weights = case.weights()
        x = case.x.view(groups, rows, n)
        exact = torch.bmm(x.double(), weights.transpose(1, 2)).view(-1, r)
        low = torch.bmm(x, weights.to(dtype).transpose(1, 2)).view(-1, r)
        terms = torch.bmm(x.double().square(), weights.square().transpose(1, 2))
        out = case.shrink()
        assert out.dtype == dtype and out.shape == (groups * rows, r)
        assert_as_good_as(out, low, exact, rounding_slack(terms, dtype, n))


def test_shrink_is_the_reference(device: torch.device) -> None:
    case = Case(device, 8, 300, 4, 6)
    for antithetic in (False, True):
        expected = reference.shrink(
            case.x.double(), case.mean, case.sigma, case.samples, case.seed, LAYER, antithetic=antithetic
        )
        assert torch.allclose(case.shrink(antithetic).double(), expected, rtol=0, atol=1e-3)


def test_zero_sigma_is_the_mean(device: torch.device) -> None:
    case = Case(device, 8, 300, 3, 4)
    case.sigma.zero_()
    assert torch.allclose(case.shrink(), case.x @ case.mean.T, rtol=0, atol=1e-4)


def test_sigma_and_sample_belong_to_their_group(device: torch.device) -> None:
    """Zero mean, equal rows: group k's result is sigma[k] E[samples[k]] x and nothing else."""
    r, n, sigma = 8, 512, [0.0, 1.0, 3.0, 3.0]
    x = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    z = ops.shrink(
        x.expand(8, n),
        torch.zeros(r, n, device=device),
        torch.tensor(sigma, device=device),
        torch.tensor([5, 5, 5, 9], dtype=torch.int32, device=device),
        seed_tensor(device),
        LAYER,
    ).view(4, 2, r)
    draw = {k: ops.noise(r, n, SEED, LAYER, k, device) @ x for k in (5, 9)}
    expected = torch.stack([0 * draw[5], draw[5], 3 * draw[5], 3 * draw[9]])
    assert (draw[5] - draw[9]).norm() > 10, "the case cannot tell the samples apart"
    assert torch.allclose(z, expected[:, None].expand(4, 2, r), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_alone_equals_that_sample_among_others(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(device, 8, 2500, 8, 7, dtype)
    for antithetic in (False, True):
        together = case.shrink(antithetic).view(8, 7, 8)
        for k in (0, 3, 7):
            alone = ops.shrink(
                case.x[7 * k : 7 * k + 7], case.mean, case.sigma[k : k + 1], case.samples[k : k + 1], case.seed, LAYER,
                antithetic=antithetic,
            )  # fmt: skip
            assert torch.equal(alone, together[k])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [5, 24])
def test_a_row_does_not_depend_on_the_rows_beside_it(device: torch.device, dtype: torch.dtype, r: int) -> None:
    case = Case(device, r, 1100, 1, 1100, dtype)
    whole = case.shrink()
    for start, stop in ((0, 1), (3, 16), (5, 40), (17, 90), (500, 1100)):
        part = ops.shrink(case.x[start:stop], case.mean, case.sigma, case.samples, case.seed, LAYER)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    case = Case(torch.device("cpu"), 24, 3000, 5, 130, dtype)
    y = torch.randn(650, 1000).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            z = case.shrink(antithetic=True)
            results.append((z, ops.expand_(y.clone(), z, torch.ones(1000, 24), 0.5), ops.noise(24, 3000, 1, 2, 3)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "pitch"), [(0, 301), (1, 304), (8, 312), (3, 333)])
def test_strided_rows(device: torch.device, dtype: torch.dtype, start: int, pitch: int) -> None:
    n, m, r = 300, 290, 8
    case = Case(device, r, n, 2, 9, dtype)
    expected = case.shrink()
    wide = torch.full((18, pitch), float("nan"), dtype=dtype, device=device)
    wide[:, start : start + n] = case.x
    case.x = wide[:, start : start + n]
    assert torch.equal(case.shrink(), expected)

    basis = torch.randn(m, r, generator=torch.Generator().manual_seed(2)).to(device)
    y = torch.randn(18, pitch, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    dense = ops.expand_(y[:, start : start + m].clone(memory_format=torch.contiguous_format), expected, basis, 2.0)
    around = y.clone()
    z = torch.full((18, r + 3), float("nan"), dtype=dtype, device=device)
    z[:, 1 : r + 1] = expected
    ops.expand_(y[:, start : start + m], z[:, 1 : r + 1], basis, 2.0)
    assert torch.equal(y[:, start : start + m], dense)
    assert torch.equal(y[:, :start], around[:, :start]) and torch.equal(y[:, start + m :], around[:, start + m :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(device: torch.device, dtype: torch.dtype) -> None:
    case = Case(device, 8, 64, 2, 0, dtype)
    assert case.shrink().shape == (0, 8)
    case.samples, case.sigma = case.samples[:0], case.sigma[:0]
    assert case.shrink().shape == (0, 8)
    y = torch.empty(0, 16, dtype=dtype, device=device)
    assert ops.expand_(y, case.shrink(), torch.ones(16, 8, device=device), 1.0).shape == (0, 16)


def test_infinities_stay_in_their_row(device: torch.device) -> None:
    case = Case(device, 8, 300, 1, 40, torch.bfloat16)
    clean = case.shrink()
    case.x[7, 5] = float("inf")
    out = case.shrink()
    assert not out[7].isfinite().any()
    keep = torch.arange(40, device=device) != 7
    assert torch.equal(out[keep], clean[keep])


# modes


MODES = ["weight", "flipout", "token"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["flipout", "token"])
@pytest.mark.parametrize(
    ("r", "n", "groups", "rows"), [(1, 1, 1, 1), (3, 7, 2, 5), (8, 1030, 3, 17), (13, 260, 2, 40), (70, 129, 2, 19)]
)
def test_modes_are_the_reference(
    device: torch.device, r: int, n: int, groups: int, rows: int, mode: str, dtype: torch.dtype
) -> None:
    case = Case(device, r, n, groups, rows, dtype)
    for antithetic in (False, True):
        given = case.mean, case.sigma, case.samples, case.seed, LAYER, mode, antithetic
        exact = reference.shrink(case.x.double(), *given)
        low = reference.shrink(case.x, *given)
        sigma, x = float(case.sigma.max()), case.x.double()
        terms = x.square() @ (case.mean.double().square() + 36 * sigma**2).T
        slack = rounding_slack(terms, dtype, n) + 1e-5 * sigma * float(x.abs().sum(1).max())
        assert_as_good_as(ops.shrink(case.x, *given), low, exact, slack)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_moments_of_every_mode(device: torch.device, mode: str) -> None:
    """Over samples, z - M x has mean 0 and variance sigma^2 |x|^2 in every rank, uncorrelated between ranks."""
    r, n, size, sigma = 4, 64, 40000, 0.7
    x = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device)
    mean = torch.randn(r, n, generator=torch.Generator().manual_seed(4)).to(device)
    samples = torch.arange(size, dtype=torch.int32, device=device)
    z = ops.shrink(
        x.expand(size, n).contiguous(), mean, torch.full((size,), sigma, device=device), samples, seed_tensor(device),
        LAYER, mode,
    )  # fmt: skip
    deviation = (z - mean @ x).double() / (sigma * float(x.norm()))
    bound = 5 / math.sqrt(size)
    assert deviation.mean(0).abs().max() <= bound
    covariance = deviation.T @ deviation / size - torch.eye(r, device=device, dtype=torch.float64)
    assert covariance.abs().max() <= math.sqrt(2) * bound


@pytest.mark.parametrize("mode", ["flipout", "token"])
def test_tokens_differ_where_they_should(device: torch.device, mode: str) -> None:
    """Equal rows of one sample: the noise is fresh for every token in these modes, and uncorrelated between tokens."""
    r, n, tokens = 64, 256, 200
    x = torch.randn(n, generator=torch.Generator().manual_seed(3)).to(device)
    one = torch.ones(1, device=device)
    z = ops.shrink(
        x.expand(tokens, n).contiguous(), torch.zeros(r, n, device=device), one, one.int(), seed_tensor(device), LAYER,
        mode,
    ).double() / float(x.norm())  # fmt: skip
    correlation = z @ z.T / r - torch.eye(tokens, device=device)
    assert correlation.fill_diagonal_(0).pow(2).mean().sqrt() <= 1.2 / math.sqrt(r)
    assert correlation.mean().abs() <= 5 / math.sqrt(r) / tokens


def test_flipout_signs_and_token_noise_are_fair() -> None:
    """The reference's own draws, which every backend is held to: fair signs, standard normals, and other than E."""
    signs = reference.input_signs(300, 1000, SEED, LAYER, 3).double()
    ranks = reference.rank_signs(300, 200, SEED, LAYER, 3).double()
    for drawn in (signs, ranks):
        assert set(drawn.unique().tolist()) == {-1.0, 1.0}
        for shifted in (drawn, drawn[:, 1:] * drawn[:, :-1], drawn[1:] * drawn[:-1]):
            assert abs(float(shifted.mean())) <= 5 / math.sqrt(shifted.numel())
    noise = reference.token_noise(2000, 16, SEED, LAYER, 3)
    assert abs(float(noise.mean())) <= 5 / math.sqrt(noise.numel())
    assert abs(float(noise.square().mean()) - 1) <= 5 * math.sqrt(2 / noise.numel())
    assert (noise - reference.noise_float64(2000, 16, SEED, LAYER, 3)).abs().max() > 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_alone_in_every_mode(device: torch.device, dtype: torch.dtype, mode: str) -> None:
    case = Case(device, 8, 1100, 5, 7, dtype)
    given = case.seed, LAYER, mode, True
    together = ops.shrink(case.x, case.mean, case.sigma, case.samples, *given).view(5, 7, 8)
    for k in (0, 3, 4):
        rows = slice(7 * k, 7 * k + 7)
        alone = ops.shrink(case.x[rows], case.mean, case.sigma[k : k + 1], case.samples[k : k + 1], *given)
        assert torch.equal(alone, together[k])


# groups of layers


class GroupCase(Case):
    """Several layers that share x, of different ranks and widths."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, n: int = 1032, groups: int = 3, rows: int = 11
    ) -> None:
        super().__init__(device, 8, n, groups, rows, dtype)
        generator = torch.Generator().manual_seed(9)
        self.ranks, self.widths = (8, 3, 17, 64), (40, 130, 7, 264)
        self.layers = [LAYER + k for k in range(len(self.ranks))]
        self.scalings = [1.5, 2.0, 0.7, 1.0]
        self.means = [torch.randn(r, n, generator=generator).to(device) for r in self.ranks]
        self.bases = [
            torch.randn(m, r, generator=generator).to(device)
            for m, r in zip(self.widths, self.ranks, strict=True)
        ]  # fmt: skip
        self.biases = [torch.randn(m, generator=generator).to(device, dtype) if m > 7 else None for m in self.widths]
        self.weights = [torch.randn(m, n, generator=generator).to(device, dtype) for m in self.widths]

    def draws(self, mode: str) -> tuple[object, ...]:
        return self.sigma, self.samples, self.seed, self.layers, mode, True


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_is_its_layers(device: torch.device, dtype: torch.dtype, mode: str) -> None:
    """Bit for bit, whatever stands beside a layer."""
    case = GroupCase(device, dtype)
    together = ops.shrink_group(case.x, case.means, *case.draws(mode))
    for z, mean, layer in zip(together, case.means, case.layers, strict=True):
        assert torch.equal(z, ops.shrink(case.x, mean, case.sigma, case.samples, case.seed, layer, mode, True))


def test_more_ranks_than_one_launch_takes(device: torch.device) -> None:
    case = GroupCase(device, torch.bfloat16)
    means = [torch.randn(70, 1032, generator=torch.Generator().manual_seed(k)).to(device) for k in range(5)]
    layers = list(range(5))
    together = ops.shrink_group(case.x, means, case.sigma, case.samples, case.seed, layers)
    for z, mean, layer in zip(together, means, layers, strict=True):
        assert torch.equal(z, ops.shrink(case.x, mean, case.sigma, case.samples, case.seed, layer))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "rows"), [(1, 1), (10, 1), (5, 8), (3, 16), (7, 20), (2, 0)])
def test_update_group(device: torch.device, groups: int, rows: int, dtype: torch.dtype, mode: str) -> None:
    """Few rows go through a launch of their own, many through the two operators; both mean the same."""
    case = GroupCase(device, dtype, groups=groups, rows=rows)
    z = ops.shrink_group(case.x, case.means, *case.draws(mode))
    exact_z = reference.shrink_group(case.x.double(), case.means, *case.draws(mode))
    out = ops.update_group(case.x, case.means, case.bases, case.biases, case.scalings, *case.draws(mode))
    parts = zip(out, z, exact_z, case.bases, case.scalings, case.biases, strict=True)
    for y, low_z, z64, basis, scaling, bias in parts:
        assert y.dtype == dtype and y.shape == (groups * rows, len(basis))
        if y.numel() == 0:
            continue
        start = 0 if bias is None else bias.double()
        exact = start + scaling * z64 @ basis.double().T
        low = start + scaling * low_z.double() @ basis.to(dtype).double().T
        terms = scaling**2 * z64.square() @ basis.double().square().T + 4 * torch.as_tensor(start) ** 2
        noise = 1e-4 * scaling * float(case.x.double().abs().sum(1).max())
        assert_as_good_as(y, low, exact, rounding_slack(terms, dtype, basis.shape[1]) + noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "rows"), [(10, 1), (3, 20), (2, 0)])
def test_base_products_are_added_onto_the_updates(
    device: torch.device, groups: int, rows: int, dtype: torch.dtype
) -> None:
    case = GroupCase(device, dtype, groups=groups, rows=rows)
    arguments = case.x, case.means, case.bases, case.biases, case.scalings, *case.draws("weight")
    updates, outputs = ops.update_group(*arguments), ops.update_group(*arguments, weights=case.weights)
    for update, output, weight in zip(updates, outputs, case.weights, strict=True):
        assert torch.equal(output, update.addmm(case.x, weight.T))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_an_update_does_not_depend_on_its_company(device: torch.device, dtype: torch.dtype) -> None:
    case = GroupCase(device, dtype, groups=8, rows=2)
    arguments = case.means, case.bases, case.biases, case.scalings
    together = ops.update_group(case.x, *arguments, *case.draws("weight"))
    for k in (0, 3, 7):
        alone = ops.update_group(
            case.x[2 * k : 2 * k + 2], *arguments, case.sigma[k : k + 1], case.samples[k : k + 1], case.seed,
            case.layers, "weight", True,
        )  # fmt: skip
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[2 * k : 2 * k + 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "key_heads", "groups", "tokens", "columns", "width"),
    [
        (1, 1, 1, 1, 1, 64), (2, 2, 4, 10, 150, 128), (1, 8, 4, 10, 2058, 128), (3, 1, 2, 64, 70, 64),
        (8, 2, 4, 64, 300, 128), (1, 2, 3, 100, 90, 64), (2, 2, 2, 5, 33, 80), (1, 1, 1, 3, 40, 8), (0, 1, 2, 5, 33, 64),
    ],
)  # fmt: skip
def test_attention(
    device: torch.device, dtype: torch.dtype, batch: int, key_heads: int, groups: int, tokens: int, columns: int,
    width: int,
) -> None:  # fmt: skip
    """Of strided tensors, into a part of a larger one, with columns that some rows do not see."""
    generator = torch.Generator().manual_seed(columns)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    queries = make(batch, tokens + 3, key_heads * groups, width).transpose(1, 2)
    query = queries[:, :, 3:]
    key, value = (make(batch, key_heads, columns + 8, width)[:, :, :columns] for _ in range(2))
    hidden = (torch.rand(batch, 1, groups * tokens, columns, generator=generator) < 0.4).to(device)
    hidden[..., 0] = False
    mask = torch.zeros(batch, 1, groups * tokens, (columns + 7) // 8 * 8, device=device, dtype=dtype)[..., :columns]
    mask.masked_fill_(hidden, torch.finfo(dtype).min)
    room = torch.full((batch, tokens + 3, key_heads * groups, width), 7.0, device=device, dtype=dtype)
    low, exact = room[:, 3:].clone(), room[:, 3:].double()
    ops.attend_(room, queries, key, value, mask, 0.1)
    assert bool((room[:, :3] == 7).all())
    if not batch:
        return
    reference.attend_(exact, query, key, value, mask, 0.1)
    together = query.reshape(batch, key_heads, groups * tokens, width)
    plain = torch.nn.functional.scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=0.1)
    low.copy_(plain.reshape(batch, key_heads * groups, tokens, width).transpose(1, 2))
    assert_as_good_as(room[:, 3:], low, exact, 4 * torch.finfo(dtype).eps)


# rows of samples inside items


class ItemCase(GroupCase):
    """``items`` of ``lead`` rows of the mean and ``each`` rows of every sample; which rows of x these are."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, items: int, lead: int, each: int, size: int, n: int = 300
    ) -> None:
        rows = items * (lead + size * each)
        super().__init__(device, dtype, n, 1, rows)
        generator = torch.Generator().manual_seed(rows)
        self.sigma = torch.rand(size, generator=generator).to(device)
        self.samples = torch.randint(0, 8, (size,), generator=generator).to(device, torch.int32)
        self.layout = lead, each
        places = torch.arange(rows, device=device).view(items, lead + size * each)
        self.of_mean = places[:, :lead].flatten()
        self.of_samples = places[:, lead:].view(items, size, each).transpose(0, 1).flatten()

    def update(self, x: Tensor, mode: str, *layout: int) -> list[Tensor]:
        return ops.update_group(x, self.means, self.bases, self.biases, self.scalings, *self.draws(mode), *layout)

    def check(self, mode: str) -> None:
        """The bits of the rows of the samples alone, one sample after the other, and of the rows of the mean alone."""
        z = ops.shrink_group(self.x, self.means, *self.draws(mode), *self.layout)
        alone = ops.shrink_group(self.x[self.of_samples], self.means, *self.draws(mode))
        none = torch.zeros(1, device=self.x.device)
        of_mean = ops.shrink_group(
            self.x[self.of_mean], self.means, none, none.int(), self.seed, self.layers, mode, True
        )
        for whole, a, b in zip(z, alone, of_mean, strict=True):
            assert torch.equal(whole[self.of_samples], a) and torch.equal(whole[self.of_mean], b)
        y = self.update(self.x, mode, *self.layout)
        parts = zip(z, self.bases, self.scalings, self.biases, strict=True)
        for whole, a, b in zip(y, self.update(self.x[self.of_samples], mode), parts, strict=True):
            # With rows of the mean, a few rows on CUDA do not go the way of few rows alone.
            if self.layout[0] == 0 or self.x.device.type == "cpu":
                assert torch.equal(whole[self.of_samples], a)
            if self.layout[0] > 0 or self.x.device.type == "cpu":
                assert torch.equal(whole, ops.expand(*b))


ITEMS = [(1, 0, 3, 2), (1, 1, 1, 1), (3, 5, 1, 3), (5, 0, 1, 7), (8, 0, 1, 10), (7, 2, 3, 5), (2, 130, 20, 2), (0, 3, 2, 2),
         (3, 4, 2, 0), (600, 1, 1, 2)]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("items", "lead", "each", "size"), ITEMS)
def test_items_are_their_rows_alone(
    device: torch.device, items: int, lead: int, each: int, size: int, dtype: torch.dtype, mode: str
) -> None:
    case = ItemCase(device, dtype, items, lead, each, size)
    case.check(mode)
    wide = torch.full((len(case.x), 331), float("nan"), dtype=dtype, device=device)
    wide[:, 3:303] = case.x
    case.x = wide[:, 3:303]
    case.check(mode)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.integers(0, 40), st.integers(1, 9), st.integers(0, 6), st.sampled_from(MODES))
def test_any_items_are_their_rows_alone(items: int, lead: int, each: int, size: int, mode: str) -> None:
    ItemCase(torch.device("cpu"), torch.float32, items, lead, each, size, n=65).check(mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_items_are_the_reference(device: torch.device, dtype: torch.dtype, mode: str) -> None:
    for items, lead, each, size in ((7, 2, 3, 5), (4, 0, 1, 3), (0, 3, 2, 2), (3, 4, 2, 0)):
        case = ItemCase(device, dtype, items, lead, each, size)
        given = case.means, *case.draws(mode), *case.layout
        found = ops.shrink_group(case.x, *given)
        exact = reference.shrink_group(case.x.double(), *given)
        low = reference.shrink_group(case.x, *given)
        for z, z64, z_low, mean in zip(found, exact, low, case.means, strict=True):
            assert z.shape == z64.shape == (len(case.x), len(mean))
            if len(z):
                terms = case.x.double().square() @ (mean.double().square() + 36).T
                slack = rounding_slack(terms, dtype, 300) + 1e-5 * float(case.x.double().abs().sum(1).max())
                assert_as_good_as(z, z_low, z64, slack)


def test_items_without_a_sample_take_any_number_of_rows(device: torch.device) -> None:
    case = ItemCase(device, torch.float32, 2, 3, 4, 0)
    assert case.update(case.x[:0], "weight", 0, 5)[0].shape == (0, 40)


@pytest.mark.slow
def test_opcheck_of_items(device: torch.device) -> None:
    case = ItemCase(device, torch.bfloat16, 3, 2, 2, 2)
    draws = *case.draws("flipout"), *case.layout
    torch.library.opcheck(torch.ops.tfb_ext.shrink_group.default, (case.x, case.means, *draws))
    update_args = (case.x, case.means, case.bases, case.biases, case.scalings, *draws)
    torch.library.opcheck(torch.ops.tfb_ext.update_group.default, update_args, {"weights": case.weights})


@pytest.mark.slow
def test_one_program_serves_every_item(device: torch.device) -> None:
    """The rows of an item may vary without another compilation; what is no multiple of them is refused."""
    torch._dynamo.reset()

    def update(x: Tensor, case: ItemCase, lead: int, each: int) -> Tensor:
        z = ops.shrink_group(x * 2, case.means, *case.draws("weight"), lead, each)
        return z[0] @ case.bases[0].T + case.update(x, "weight", lead, each)[0]

    compiled = torch.compile(update, fullgraph=True, dynamic=True, backend="aot_eager")
    case = ItemCase(device, torch.float32, 2, 2, 2, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for items, lead, each in ((4, 3, 2), (3, 2, 5), (7, 9, 4)):
            x = torch.randn(items * (lead + 3 * each), 300, generator=torch.Generator().manual_seed(items)).to(device)
            assert torch.allclose(compiled(x, case, lead, each), update(x, case, lead, each), rtol=1e-4, atol=1e-2)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="x got .* rows, expected a multiple of an item's"):
        torch.compile(update, fullgraph=True, dynamic=True, backend="aot_eager")(case.x[1:], case, 3, 2)


@pytest.mark.parametrize(
    ("lead", "each", "sentence"),
    [
        (-1, 2, r"lead got -1, expected 0 to 2\*\*32 - 1. Fix: "),
        (0, -1, r"each got -1, expected 0 to 2\*\*32 - 1. Fix: "),
        (0, 2**62, r"each got 4611686018427387904, expected 0 to 2\*\*32 - 1. Fix: "),
        (1, 0, "lead got 1 where each is 0, expected 0. Fix: "),
        (
            3,
            2,
            r"x got 6 rows, expected a multiple of an item's 7 \(lead 3 and each 2 for 2 entries of samples\). Fix: ",
        ),
        (0, 2**31, "x got 6 rows, expected a multiple of an item's 4294967296 "),
    ],
)
def test_item_errors(lead: int, each: int, sentence: str) -> None:
    arguments = {key: value for key, value in shrink_arguments().items() if key not in ("mean", "layer")}
    with pytest.raises(ValueError, match=f"^shrink_group: {sentence}"):
        ops.shrink_group(**arguments, means=[torch.randn(4, 16)], layers=[7], lead=lead, each=each)


# expand


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "m", "r"),
    [(1, 1, 1), (5, 7, 3), (64, 128, 8), (17, 1031, 16), (70, 304, 32), (70, 300, 31), (33, 520, 64), (9, 40, 136),
     (300, 72, 24), (0, 16, 8)],
)  # fmt: skip
def test_expand_writes(device: torch.device, tokens: int, m: int, r: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens * m + r)
    z = torch.randn(tokens, r, generator=generator).to(device, dtype)
    for basis_dtype in {torch.float32, dtype}:
        basis = torch.randn(m, r, generator=generator).to(device, basis_dtype)
        for bias in (None, torch.randn(m, generator=generator).to(device, dtype)):
            start = torch.zeros(m, device=device, dtype=torch.float64) if bias is None else bias.double()
            exact = start + 1.7 * z.double() @ basis.double().T
            low = reference.expand(z, basis, 1.7, bias)
            out = ops.expand(z, basis, 1.7, bias)
            assert out.shape == (tokens, m) and out.dtype == dtype
            if tokens:
                terms = start.square() + 1.7**2 * z.double().square() @ basis.double().T.square()
                assert_as_good_as(out, low, exact, rounding_slack(terms, dtype, r))


# expand_


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "m", "r"),
    [(1, 1, 1), (5, 7, 3), (64, 128, 8), (17, 1031, 16), (70, 300, 31), (33, 520, 64), (9, 40, 136)],
)
def test_expand_numerics(device: torch.device, tokens: int, m: int, r: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens * m + r)
    y0 = torch.randn(tokens, m, generator=generator).to(device, dtype)
    z = torch.randn(tokens, r, generator=generator).to(device, dtype)
    for basis_dtype in {torch.float32, dtype}:
        basis = torch.randn(m, r, generator=generator).to(device, basis_dtype)
        exact = y0.double() + 1.7 * z.double() @ basis.double().T
        low = reference.expand_(y0.clone(), z, basis, 1.7)
        terms = y0.double().square() + 1.7**2 * z.double().square() @ basis.double().T.square()
        y = y0.clone()
        out = ops.expand_(y, z, basis, 1.7)
        assert out is y
        assert_as_good_as(y, low, exact, rounding_slack(terms, dtype, r))


def test_half_conversions_are_torchs() -> None:
    """Every bfloat16 and float16 goes in and out unchanged, and float32 results round as torch rounds."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = torch.cat([torch.randn(5000), torch.randn(5000) * 1e-5, torch.tensor([65519.0, 65520.0, 1e30, -1e30])])
    for dtype in (torch.bfloat16, torch.float16):
        y = bits.view(dtype).reshape(256, 256)
        out = ops.expand_(y.clone(), torch.zeros(256, 1, dtype=dtype), torch.zeros(256, 1), 1.0)
        assert torch.equal(out.isnan(), y.isnan())
        assert torch.equal(out.nan_to_num(1.0, 2.0, -2.0), (y + 0).nan_to_num(1.0, 2.0, -2.0))
        # z = 1 and y = 0: the basis itself is rounded.
        got = ops.expand_(torch.zeros(1, len(values), dtype=dtype), torch.ones(1, 1, dtype=dtype), values[:, None], 1.0)
        assert torch.equal(got[0], values.to(dtype))


# tracing


@pytest.mark.slow
def test_opcheck(device: torch.device) -> None:
    case = Case(device, 8, 64, 2, 5, torch.bfloat16)
    torch.library.opcheck(torch.ops.tfb_ext.noise.default, (3, 10, -7, LAYER, 2, device, True))
    y = torch.randn(10, 40, device=device, dtype=torch.bfloat16)
    expand_args = (y, case.shrink(), torch.randn(40, 8, device=device), 0.5)
    torch.library.opcheck(torch.ops.tfb_ext.expand_.default, expand_args)
    group = GroupCase(device, torch.bfloat16)
    draws = group.sigma, group.samples, group.seed, group.layers, "weight", True
    torch.library.opcheck(torch.ops.tfb_ext.shrink_group.default, (group.x, group.means, *draws))
    update_args = (group.x, group.means, group.bases, group.biases, group.scalings, *draws)
    torch.library.opcheck(torch.ops.tfb_ext.update_group.default, update_args, {"weights": group.weights})
    z, basis, bias = case.shrink(), torch.randn(40, 8, device=device), torch.randn(40, device=device).bfloat16()
    for start in (None, bias):
        torch.library.opcheck(torch.ops.tfb_ext.expand.default, (z, basis, 0.5, start))


@pytest.mark.slow
def test_compile_without_breaks(device: torch.device) -> None:
    def layer(y: Tensor, x: Tensor, case: Case, basis: Tensor) -> Tensor:
        z = ops.shrink(x * 2, case.mean, case.sigma, case.samples, case.seed, LAYER, "weight", True)
        return ops.expand_(y + 1, z, basis, 0.5) * 3

    compiled = torch.compile(layer, fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(device, 8, 64, 2, 5, dtype)
        y = torch.randn(10, 40, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        basis = torch.randn(40, 8, generator=torch.Generator().manual_seed(2)).to(device)
        for samples in ([0, 1], [4, 9]):
            case.samples = torch.tensor(samples, dtype=torch.int32, device=device)
            expected = layer(y, case.x, case, basis)
            assert torch.allclose(compiled(y, case.x, case, basis), expected, rtol=2e-2, atol=1e-3)


@pytest.mark.slow
def test_compile_groups_without_breaks(device: torch.device) -> None:
    def block(x: Tensor, case: GroupCase, weight: Tensor) -> Tensor:
        z = ops.shrink_group(x * 2, case.means, *case.draws("weight"))
        update = ops.update_group(x, case.means, case.bases, case.biases, case.scalings, *case.draws("weight"))
        return update[0].addmm_(x, weight.T) + ops.expand(z[0], case.bases[0], 2.0)

    case = GroupCase(device, torch.float32)
    weight = torch.randn(40, 1032, generator=torch.Generator().manual_seed(1)).to(device)
    compiled = torch.compile(block, fullgraph=True)
    assert torch.allclose(compiled(case.x, case, weight), block(case.x, case, weight), rtol=1e-4, atol=1e-2)


def test_fake_tensors_have_the_results_shape() -> None:
    x = torch.empty(6, 32, device="meta", dtype=torch.float16)
    small = torch.empty(2, device="meta")
    args = ([torch.empty(8, 32, device="meta")], small, small.int(), torch.empty(1, device="meta", dtype=torch.int64))
    (z,) = torch.ops.tfb_ext.shrink_group(x, *args, [LAYER])
    assert z.shape == (6, 8) and z.dtype == torch.float16 and z.device.type == "meta"


# errors


def shrink_arguments() -> dict:
    return {
        "x": torch.randn(6, 16),
        "mean": torch.randn(4, 16),
        "sigma": torch.ones(2),
        "samples": torch.arange(2, dtype=torch.int32),
        "seed": torch.tensor([1]),
        "layer": 7,
    }


SHRINK_ERRORS = [
    (
        "x",
        torch.randn(6, 16).double(),
        TypeError,
        "shrink_group: x has type Double, expected float32, bfloat16 or float16",
    ),
    ("x", torch.randn(2, 3, 16), ValueError, r"shrink_group: x has shape \[2, 3, 16\], expected two dimensions"),
    ("x", torch.randn(16, 6).T, ValueError, r"shrink_group: x has strides \[1, 6\], expected adjacent elements"),
    (
        "x",
        torch.randn(7, 16),
        ValueError,
        "shrink_group: x has 7 rows, expected a multiple of the 2 entries of samples",
    ),
    ("x", torch.randn(6, 15), ValueError, r"shrink_group: x has 15 columns, but mean has shape \[4, 16\]"),
    (
        "mean",
        torch.randn(4, 16).half(),
        TypeError,
        "shrink_group: mean has type Half, expected Float or x's type Float",
    ),
    ("mean", torch.randn(16), ValueError, r"shrink_group: mean has shape \[16\], expected two dimensions"),
    ("mean", torch.randn(16, 4).T, ValueError, "shrink_group: mean must be contiguous"),
    ("mean", torch.randn(0, 16), ValueError, "shrink_group: r is 0, expected 1 to"),
    ("sigma", torch.ones(2).double(), TypeError, "shrink_group: sigma has type Double, expected Float"),
    ("sigma", torch.ones(3), ValueError, r"shrink_group: sigma has shape \[3\], expected \[2\]"),
    ("sigma", torch.ones(4)[::2], ValueError, "shrink_group: sigma must be contiguous"),
    ("samples", torch.arange(2), TypeError, "shrink_group: samples has type Long, expected Int"),
    (
        "samples",
        torch.zeros(1, 2).int(),
        ValueError,
        r"shrink_group: samples has shape \[1, 2\], expected one dimension",
    ),
    ("samples", torch.zeros(0).int(), ValueError, r"shrink_group: sigma has shape \[2\], expected \[0\]"),
    ("seed", torch.ones(1).int(), TypeError, "shrink_group: seed has type Int, expected Long"),
    ("seed", torch.tensor([1, 2]), ValueError, r"shrink_group: seed has shape \[2\], expected \[1\]"),
    ("layer", -1, ValueError, "shrink_group: layer is -1, expected an unsigned 32-bit value"),
    ("layer", 2**32, ValueError, "shrink_group: layer is 4294967296, expected an unsigned 32-bit value"),
    ("mode", "rows", ValueError, 'shrink_group: mode is "rows", expected "weight", "flipout" or "token"'),
]


@pytest.mark.parametrize(("name", "value", "kind", "sentence"), SHRINK_ERRORS)
def test_shrink_errors(name: str, value: object, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        ops.shrink(**{**shrink_arguments(), name: value})


def test_rows_without_samples_are_an_error() -> None:
    arguments = {**shrink_arguments(), "samples": torch.zeros(0).int(), "sigma": torch.ones(0)}
    with pytest.raises(ValueError, match="shrink_group: x has 6 rows, expected a multiple of the 0 entries of samples"):
        ops.shrink(**arguments)


EXPAND_ERRORS = [
    ("y", torch.randn(6, 16).double(), TypeError, "expand_: y has type Double"),
    ("y", torch.randn(16), ValueError, r"expand_: y has shape \[16\], expected two dimensions"),
    ("y", torch.randn(1, 16).expand(6, 16), ValueError, r"expand_: y has strides \[0, 1\] .* rows overlap"),
    ("y", torch.randn(16, 6).T, ValueError, r"expand_: y has strides \[1, 6\]"),
    ("z", torch.randn(6, 4).half(), TypeError, "expand_: z has type Half, expected y's type Float"),
    ("z", torch.randn(5, 4), ValueError, "expand_: z has 5 rows, expected y's 6"),
    ("z", torch.randn(6, 3), ValueError, r"expand_: basis has shape \[16, 4\], expected \[16, 3\]"),
    ("basis", torch.randn(16, 4).bfloat16(), TypeError, "expand_: basis has type BFloat16, expected Float or y's type"),
    ("basis", torch.randn(4, 16).T, ValueError, "expand_: basis must be contiguous"),
    ("basis", torch.randn(15, 4), ValueError, r"expand_: basis has shape \[15, 4\], expected \[16, 4\]"),
]


@pytest.mark.parametrize(("name", "value", "kind", "sentence"), EXPAND_ERRORS)
def test_expand_errors(name: str, value: Tensor, kind: type[Exception], sentence: str) -> None:
    arguments = {"y": torch.randn(6, 16), "z": torch.randn(6, 4), "basis": torch.randn(16, 4), "scaling": 1.0}
    with pytest.raises(kind, match=sentence):
        ops.expand_(**{**arguments, name: value})


GROUP_ERRORS = [
    ("means", [], ValueError, "update_group: means is empty"),
    ("means", [torch.randn(4, 16)], ValueError, "update_group: layers has 2 entries, expected one for each of the 1"),
    (
        "means",
        [torch.randn(4, 16), torch.randn(3, 15)],
        ValueError,
        r"mean has shape \[3, 15\]; expected mean \(r, 16\)",
    ),
    ("layers", [1, -1], ValueError, "update_group: layer is -1"),
    ("bases", [torch.randn(8, 4)], ValueError, "update_group: bases has 1 entries, expected one for each of the 2"),
    ("bases", [torch.randn(8, 4), torch.randn(5, 4)], ValueError, r"basis has shape \[5, 4\], expected 3 columns"),
    ("biases", [torch.randn(7), None], ValueError, r"update_group: bias has shape \[7\], expected \[8\]"),
    ("biases", [torch.randn(8).half(), None], TypeError, "update_group: bias has type Half, expected Float"),
    ("scalings", [1.0], ValueError, "update_group: scalings has 1 entries"),
    ("sigma", torch.ones(3), ValueError, r"update_group: sigma has shape \[3\], expected \[2\]"),
    ("mode", "row", ValueError, 'update_group: mode is "row", expected "weight", "flipout" or "token"'),
    (
        "weights",
        [torch.randn(8, 16)],
        ValueError,
        "update_group: weights has 1 entries, expected one for each of the 2",
    ),
    (
        "weights",
        [torch.randn(8, 15), torch.randn(5, 16)],
        ValueError,
        r"update_group: weight has shape \[8, 15\], expected \[8, 16\]",
    ),
    (
        "weights",
        [torch.randn(8, 16), torch.randn(5, 16).half()],
        TypeError,
        "update_group: weight has type Half, expected x's type Float",
    ),
]


@pytest.mark.parametrize(("name", "value", "kind", "sentence"), GROUP_ERRORS)
def test_group_errors(name: str, value: object, kind: type[Exception], sentence: str) -> None:
    rest = {key: value for key, value in shrink_arguments().items() if key not in ("mean", "layer")}
    arguments = {
        **rest, "means": [torch.randn(4, 16), torch.randn(3, 16)], "layers": [1, 2], "mode": "weight",
        "bases": [torch.randn(8, 4), torch.randn(5, 3)], "biases": [None, torch.randn(5)], "scalings": [1.0, 2.0],
    }  # fmt: skip
    ops.update_group(**arguments)
    with pytest.raises(kind, match=sentence):
        ops.update_group(**{**arguments, name: value})


def test_expand_of_new_tensors_has_errors_too() -> None:
    with pytest.raises(ValueError, match=r"expand: basis has shape \[8, 3\], expected 4 columns"):
        ops.expand(torch.randn(6, 4), torch.randn(8, 3), 1.0)
    with pytest.raises(ValueError, match=r"expand: bias has shape \[7\], expected \[8\]"):
        ops.expand(torch.randn(6, 4), torch.randn(8, 4), 1.0, torch.randn(7))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 4, 1, 1, 1), "noise: r is 0, expected 1 to"),
        ((4, 0, 1, 1, 1), "noise: n is 0, expected 1 to"),
        ((4, 4, -1, 1, 1), "noise: seed is -1, expected 0 to"),
        ((4, 4, 2**64, 1, 1), "noise: seed is 18446744073709551616, expected 0 to"),
        ((4, 4, 1, 2**32, 1), "noise: layer is 4294967296"),
        ((4, 4, 1, 1, -1), "noise: sample is -1, expected 0 to"),
    ],
)
def test_noise_errors(arguments: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ops.noise(*arguments)


# the CPU's instruction sets

_INSTRUCTION_SET = """
import torch
from tfb_ext import ops
from tfb_ext.ops import reference
assert ops.build_info()["cpu_capability"] == "{name}", ops.build_info()
assert (ops.noise(13, 1031, 5, 6, 7).double() - reference.noise_float64(13, 1031, 5, 6, 7)).abs().max() <= 1e-5
torch.manual_seed(0)
for dtype, bound in ((torch.float32, 2e-3), (torch.bfloat16, 1.0), (torch.float16, 0.2)):
    x, mean, seed = torch.randn(74, 1030).to(dtype), torch.randn(13, 1030), torch.tensor([9])
    samples, sigma = torch.tensor([2, 5], dtype=torch.int32), torch.tensor([0.5, 2.0])
    z = ops.shrink(x, mean, sigma, samples, seed, 8)
    exact = reference.shrink(x.double(), mean, sigma, samples, seed, 8)
    assert (z.double() - exact).abs().max() <= bound, (dtype, (z.double() - exact).abs().max())
    y, basis = torch.randn(74, 301).to(dtype), torch.randn(301, 13)
    exact = y.double() + 0.1 * z.double() @ basis.double().T
    assert (ops.expand_(y, z, basis, 0.1).double() - exact).abs().max() <= bound
"""


@pytest.mark.slow
@pytest.mark.parametrize(("allowed", "name"), [("avx512", "avx512"), ("avx2", "avx2"), ("default", "baseline")])
def test_every_instruction_set(allowed: str, name: str) -> None:
    order = ["default", "avx2", "avx512"]
    own = torch.backends.cpu.get_cpu_capability().lower()
    if own not in order or order.index(allowed) > order.index(own):
        pytest.skip(f"this CPU runs {own}, not {allowed}")
    run = subprocess.run(
        [sys.executable, "-c", _INSTRUCTION_SET.format(name=name)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": allowed},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
