"""The operators at Llama-3.1-8B's widths: time, bytes against the measured copy bandwidth, normals a second.

Every result is compared with float64 before it is timed. GPU calls are timed with events behind a flush of the cache,
so neither launch latency nor a warm cache is in them; CPU calls with the host's clock and warm caches. ``extra_info``
has rates at the median: ``bytes`` counts each input and output once, ``normals`` each draw once, however often made.

    python -m pytest bench/test_kernels.py --benchmark-json=kernels.json     (-k cpu or -k cuda for one device)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tfb_ext import ops, reference

from . import oracle
from .record import environment
from .timing import CacheFlush, event_clock

SAMPLES = 10
SEED = 20250101
LAYER = 0x9E3779B9
SCALING = 2.0
TOKENS = {"cpu": 320, "cuda": 10240}
ROUNDS = {"cpu": 7, "cuda": 30}
IN_FEATURES = (4096, 14336)
OUT_FEATURES = (1024, 4096, 14336)
RANKS = (8, 16, 64)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What the noise of two devices may differ by, and each from its definition in float64.
NOISE_TOLERANCE = 1e-5

on_devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
                pytest.mark.benchmark(timer=event_clock),
            ],
        ),
    ],
)
on_types = pytest.mark.parametrize("dtype", TYPES)
on_ranks = pytest.mark.parametrize("r", RANKS)


@dataclass(frozen=True)
class Problem:
    """Inputs of one sampled product: ``x`` (T, n), ``mean`` (r, n), and the samples' tensors."""

    x: Tensor
    mean: Tensor
    sigma: Tensor
    samples: Tensor
    seed: Tensor

    def fused(self) -> Tensor:
        return ops.shrink(self.x, self.mean, self.sigma, self.samples, self.seed, LAYER)

    def weights(self, dtype: torch.dtype) -> Tensor:
        return oracle.sampled_weights(self.mean.to(dtype), self.sigma, self.samples, SEED, LAYER)

    def check(self) -> None:
        low = oracle.shrink(self.x, self.weights(torch.float32))
        oracle.require_close(self.fused(), low, oracle.shrink(self.x.double(), self.weights(torch.float64)))


def problem(device: str, dtype: str, n: int, r: int) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(TOKENS[device], n, generator=generator, device=device).to(TYPES[dtype])
    mean = torch.randn(r, n, generator=generator, device=device) / n**0.5
    sigma = torch.linspace(0.01, 0.05, SAMPLES)
    samples = torch.arange(SAMPLES, dtype=torch.int32)
    seed = torch.tensor([SEED], dtype=torch.int64)
    return Problem(*(t.to(device) for t in (x, mean, sigma, samples, seed)))


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(
    benchmark: Any,
    device: str,
    copy_rates: dict[str, float],
    run: Callable[[], object],
    *,
    moved: int,
    normals: int = 0,
) -> None:
    """Time ``run`` and put its rates, the ceiling and where it all ran into the row."""
    flush = CacheFlush(torch.device(device))
    benchmark.pedantic(run, setup=flush, rounds=ROUNDS[device], warmup_rounds=2)
    benchmark.extra_info |= {"bytes": moved, "copy_bytes_per_s": copy_rates[device]}
    benchmark.extra_info |= environment(torch.device(device), "python -m pytest bench/test_kernels.py")
    if benchmark.stats is None:  # --benchmark-disable: the check above is all that was asked for
        return
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["share_of_copy"] = moved / seconds / copy_rates[device]
    if normals:
        benchmark.extra_info |= {"normals": normals, "normals_per_s": normals / seconds}


@on_devices
@on_ranks
@pytest.mark.parametrize("n", IN_FEATURES)
def test_noise(benchmark: Any, copy_rates: dict[str, float], device: str, n: int, r: int) -> None:
    benchmark.group = f"noise {device}"
    where = torch.device(device)
    out = ops.noise(r, n, SEED, LAYER, 3, where)
    error = float((out.cpu() - reference.noise(r, n, SEED, LAYER, 3, torch.device("cpu"))).abs().max())
    assert error <= NOISE_TOLERANCE

    def run() -> Tensor:
        return ops.noise(r, n, SEED, LAYER, 3, where)

    measure(benchmark, device, copy_rates, run, moved=size(out), normals=out.numel())


@on_devices
@on_types
@on_ranks
@pytest.mark.parametrize("n", IN_FEATURES)
def test_shrink(benchmark: Any, copy_rates: dict[str, float], device: str, dtype: str, n: int, r: int) -> None:
    benchmark.group = f"shrink {device} {dtype}"
    given = problem(device, dtype, n, r)
    given.check()

    moved = size(given.x, given.mean, given.fused())
    measure(benchmark, device, copy_rates, given.fused, moved=moved, normals=SAMPLES * r * n)


@on_devices
@on_types
@on_ranks
@pytest.mark.parametrize("m", OUT_FEATURES)
def test_expand(benchmark: Any, copy_rates: dict[str, float], device: str, dtype: str, m: int, r: int) -> None:
    benchmark.group = f"expand_ {device} {dtype}"
    generator = torch.Generator(device).manual_seed(0)
    y = torch.randn(TOKENS[device], m, generator=generator, device=device).to(TYPES[dtype])
    z = torch.randn(TOKENS[device], r, generator=generator, device=device).to(TYPES[dtype])
    basis = torch.randn(m, r, generator=generator, device=device) / m**0.5
    out = ops.expand_(y.clone(), z, basis, SCALING)
    oracle.require_close(
        out, oracle.expand(y, z, basis, SCALING), oracle.expand(y.double(), z.double(), basis.double(), SCALING)
    )

    def run() -> Tensor:
        return ops.expand_(y, z, basis, SCALING)

    measure(benchmark, device, copy_rates, run, moved=2 * size(y) + size(z, basis))


@on_devices
@on_types
@pytest.mark.parametrize("form", ["fused", "materialised", "given_noise", "mean_only"])
def test_sampled_product(benchmark: Any, copy_rates: dict[str, float], device: str, dtype: str, form: str) -> None:
    """The fused product and plain torch: noise drawn (randn, add, bmm), given (bmm), and none at all (mm)."""
    benchmark.group = f"sampled product {device} {dtype}"
    n, r = 4096, 8
    given = problem(device, dtype, n, r)
    given.check()
    shape, scale = (SAMPLES, r, n), given.sigma[:, None, None]
    weights = given.weights(torch.float32).to(given.x.dtype)
    mean = given.mean.to(given.x.dtype)

    forms: dict[str, Callable[[], Tensor]] = {
        "fused": given.fused,
        "materialised": lambda: oracle.shrink(given.x, given.mean + scale * torch.randn(shape, device=device)),
        "given_noise": lambda: oracle.shrink(given.x, weights),
        "mean_only": lambda: given.x @ mean.T,
    }
    normals = SAMPLES * r * n if form in ("fused", "materialised") else 0
    moved = size(given.x, given.mean, given.fused())
    measure(benchmark, device, copy_rates, forms[form], moved=moved, normals=normals)
