"""The operators at the widths of Llama-3.1-8B, Qwen3-8B and a 1B model, each timed in turns with its own baseline.

Every result is compared with float64 before it is timed. On a GPU a timing is a CUDA graph of many launches over different
buffers, 1.2 GB of them, so that neither the host's launches nor a warm cache is in it; its baseline is a graph of copies
that move as many bytes each (read and written counted). ``share_of_large_copy`` sets the same bytes against copies of 1 GiB.
On the CPU caches are warm.

    python -m pytest bench/test_kernels.py --benchmark-json=kernels.json     (-k cuda or -k cpu for one device)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tfb_ext import ops
from tfb_ext.ops import reference

from . import oracle
from .llama import LLAMA_1B, LLAMA_8B, QWEN3_8B
from .timing import copy_bandwidth, event_clock
from .versus import Versus

SAMPLES = 10
SEED = 20250101
LAYER = 0x9E3779B9
SCALING = 2.0
ROTATED_BYTES = int(1.2e9)
RANKS = (8, 16, 32, 64)
TOKENS = (2048, 10240)
# The widths that the project's bars name, and the other models' at one size.
IN_FEATURES, OUT_FEATURES = (4096, 14336), (1024, 4096, 14336, 128256)
WIDTHS = (LLAMA_8B.projections() | LLAMA_1B.projections() | QWEN3_8B.projections(128))  # fmt: skip
OTHER_IN = sorted({n for n, _ in WIDTHS} - set(IN_FEATURES))
OTHER_OUT = sorted({m for _, m in WIDTHS} - set(OUT_FEATURES))
CPU_TOKENS, CPU_WIDTH, CPU_RANK, CPU_THREADS = 320, 4096, 8, 2
# What the noise of two devices may differ by, and each from its definition in float64.
NOISE_TOLERANCE = 1e-5

cuda = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine"),
    pytest.mark.benchmark(timer=event_clock),
]
on_cuda = pytest.mark.parametrize("device", [pytest.param("cuda", marks=cuda)])
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
SHRINK_SHAPES = [(t, n, r) for t in TOKENS for n in IN_FEATURES for r in RANKS]
SHRINK_SHAPES += [(TOKENS[-1], n, 8) for n in OTHER_IN]
EXPAND_SHAPES = [(t, m, r) for t in TOKENS for m in OUT_FEATURES for r in RANKS]
EXPAND_SHAPES += [(TOKENS[-1], m, 8) for m in OTHER_OUT]


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Versus:
    return Versus(benchmark, torch.device(request.getfixturevalue("device")), "bench/test_kernels.py")


@dataclass(frozen=True)
class Draws:
    """What a batch of samples draws from, and the layers' means (r, n)."""

    means: Sequence[Tensor]
    sigma: Tensor
    samples: Tensor
    seed: Tensor

    def shrink(self, x: Tensor, sigma: Tensor | None = None) -> list[Tensor]:
        layers = list(range(LAYER, LAYER + len(self.means)))
        given = self.sigma if sigma is None else sigma
        return ops.shrink_group(x, list(self.means), given, self.samples, self.seed, layers)

    def check(self, x: Tensor) -> None:
        for index, (z, mean) in enumerate(zip(self.shrink(x), self.means, strict=True)):
            weights = [
                oracle.sampled_weights(mean.to(dtype), self.sigma, self.samples, SEED, LAYER + index)
                for dtype in (torch.float32, torch.float64)
            ]
            oracle.require_close(z, oracle.shrink(x, weights[0]), oracle.shrink(x.double(), weights[1]))


def draws(device: str, n: int, ranks: Sequence[int]) -> Draws:
    generator = torch.Generator(device).manual_seed(0)
    means = [torch.randn(r, n, generator=generator, device=device) / n**0.5 for r in ranks]
    sigma = torch.linspace(0.01, 0.05, SAMPLES)
    samples = torch.arange(SAMPLES, dtype=torch.int32)
    seed = torch.tensor([SEED], dtype=torch.int64)
    return Draws(means, *(t.to(device) for t in (sigma, samples, seed)))


def rows(tokens: int) -> int:
    """``tokens``, as near as equal groups of all samples come."""
    return tokens // SAMPLES * SAMPLES


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` captured in a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copies(count: int, moved: int) -> Callable[[], None]:
    """``count`` copies of different buffers that move ``moved`` bytes each, in a graph."""
    buffers = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in range(count)]

    def run() -> None:
        for source, target in buffers:
            target.copy_(source)

    return graphed(run)


@pytest.fixture(scope="module")
def large_copy() -> float:
    """Bytes a second of copies of 1 GiB, read and written."""
    return copy_bandwidth(torch.device("cuda"))


def bandwidth(
    versus: Versus, case: str, run: Callable[[], object], count: int, moved: int, large_copy: float, **facts: Any
) -> None:
    """``run`` makes ``count`` launches that move ``moved`` bytes each. The ratio is that of a copy's time to theirs."""
    ratio = versus(
        case, graphed(run), copies(count, moved), of="a copy of as many bytes", faster=True, repeats=count, rounds=9,
        bytes=moved, **facts,
    )  # fmt: skip
    if ratio is not None:
        info = versus.benchmark.extra_info
        info["gb_s"] = moved / info["value"] / 1e6
        info["large_copy_gb_s"] = large_copy / 1e9
        info["share_of_large_copy"] = info["gb_s"] / info["large_copy_gb_s"]


@on_cuda
@pytest.mark.parametrize(("tokens", "n", "r"), SHRINK_SHAPES)
def test_shrink(versus: Versus, device: str, large_copy: float, tokens: int, n: int, r: int) -> None:
    given, tokens = draws(device, n, [r]), rows(tokens)
    x = torch.randn(tokens, n, device=device).bfloat16()
    given.check(x)
    moved = size(x, *given.means, *given.shrink(x))
    buffers = [x, *(torch.randn_like(x) for _ in range(max(2, ROTATED_BYTES // moved)))]
    bandwidth(
        versus, "shrink_bandwidth", lambda: [given.shrink(b) for b in buffers], len(buffers), moved, large_copy,
        tokens=tokens, n=n, r=r,
    )  # fmt: skip


@on_cuda
@pytest.mark.parametrize(("n", "ranks"), [(4096, (8, 8, 8)), (4096, (8, 8)), (4096, (64, 64, 64))])
def test_shrink_group(versus: Versus, device: str, large_copy: float, n: int, ranks: tuple[int, ...]) -> None:
    given, tokens = draws(device, n, ranks), rows(TOKENS[-1])
    x = torch.randn(tokens, n, device=device).bfloat16()
    given.check(x)
    moved = size(x, *given.means, *given.shrink(x))
    buffers = [x, *(torch.randn_like(x) for _ in range(ROTATED_BYTES // moved))]
    bandwidth(
        versus, "shrink_group_bandwidth", lambda: [given.shrink(b) for b in buffers], len(buffers), moved, large_copy,
        tokens=tokens, n=n, r=list(ranks),
    )  # fmt: skip


@on_cuda
@pytest.mark.parametrize(("tokens", "n", "r"), [(t, n, r) for t in TOKENS for n in IN_FEATURES for r in RANKS])
def test_shrink_noise(versus: Versus, device: str, tokens: int, n: int, r: int) -> None:
    """With noise against the same kernel without."""
    given, tokens = draws(device, n, [r]), rows(tokens)
    x = torch.randn(tokens, n, device=device).bfloat16()
    buffers = [x, *(torch.randn_like(x) for _ in range(max(2, ROTATED_BYTES // size(x))))]
    none = torch.zeros_like(given.sigma)
    versus(
        "shrink_noise", graphed(lambda: [given.shrink(b) for b in buffers]),
        graphed(lambda: [given.shrink(b, none) for b in buffers]), of="the same kernel without noise",
        repeats=len(buffers), rounds=9, tokens=tokens, n=n, r=r, normals=SAMPLES * r * n,
    )  # fmt: skip


@on_cuda
@pytest.mark.parametrize("form", ["write", "add"])
@pytest.mark.parametrize(("tokens", "m", "r"), EXPAND_SHAPES)
def test_expand(versus: Versus, device: str, large_copy: float, tokens: int, m: int, r: int, form: str) -> None:
    generator = torch.Generator(device).manual_seed(0)
    y = torch.randn(tokens, m, generator=generator, device=device, dtype=torch.bfloat16)
    z = torch.randn(tokens, r, generator=generator, device=device, dtype=torch.bfloat16)
    basis = (torch.randn(m, r, generator=generator, device=device) / m**0.5).bfloat16()
    part = slice(None) if tokens * m < 2**26 else slice(-40, None)  # of the rows, for the check in float64
    zero = torch.zeros_like(y[part])
    start = y[part].clone() if form == "add" else zero
    out = ops.expand_(y.clone(), z, basis, SCALING)[part] if form == "add" else ops.expand(z, basis, SCALING)[part]
    exact = oracle.expand(start.double(), z[part].double(), basis.double(), SCALING)
    oracle.require_close(out, oracle.expand(start, z[part], basis, SCALING), exact)
    moved = size(y) * (2 if form == "add" else 1) + size(z, basis)
    count = max(2, ROTATED_BYTES // moved)
    buffers = [torch.empty_like(y).copy_(y) for _ in range(count)] if form == "add" else []

    def run() -> object:
        if form == "add":
            return [ops.expand_(b, z, basis, SCALING) for b in buffers]
        return [ops.expand(z, basis, SCALING) for _ in range(count)]

    bandwidth(
        versus, f"expand_{form}_bandwidth", run, count, moved, large_copy, tokens=tokens, m=m, r=r, form=form
    )  # fmt: skip


@on_cuda
def test_fill(versus: Versus, device: str, large_copy: float) -> None:
    """What writing alone reaches on this card: the ceiling of the expand that writes."""
    y = torch.empty(TOKENS[-1], 4096, dtype=torch.bfloat16, device=device)
    buffers = [torch.empty_like(y) for _ in range(ROTATED_BYTES // size(y))]
    bandwidth(versus, "fill_bandwidth", lambda: [b.fill_(1.0) for b in buffers], len(buffers), size(y), large_copy)


@on_cuda
@pytest.mark.parametrize(
    ("n", "outs"), [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))]
)
@pytest.mark.parametrize("group_rows", [1, 8])
def test_decode(versus: Versus, device: str, n: int, outs: tuple[int, ...], group_rows: int) -> None:
    """A group's update by the decode kernel, one launch, against an empty launch."""
    given = draws(device, n, [8] * len(outs))
    x = torch.randn(SAMPLES * group_rows, n, device=device).bfloat16()
    bases = [(torch.randn(m, 8, device=device) / 8).bfloat16() for m in outs]
    biases: list[Tensor | None] = [None] * len(outs)
    layers = list(range(LAYER, LAYER + len(outs)))

    def run() -> list[Tensor]:
        scalings = [SCALING] * len(outs)
        return ops.update_group(
            x, list(given.means), bases, biases, scalings, given.sigma, given.samples, given.seed, layers
        )

    for y, z, basis in zip(run(), given.shrink(x), bases, strict=True):
        exact = SCALING * z.double() @ basis.double().T
        oracle.require_close(y, ops.expand(z, basis, SCALING), exact)
    one = torch.empty(1, device=device)
    versus(
        "few_rows", graphed(lambda: [run() for _ in range(20)]), graphed(lambda: [one.zero_() for _ in range(20)]),
        of="an empty launch", repeats=20, rounds=9, n=n, m=list(outs), rows=len(x),
    )  # fmt: skip


@on_cuda
@pytest.mark.parametrize(("n", "m"), sorted(LLAMA_8B.projections()))
def test_linear(versus: Versus, device: str, n: int, m: int) -> None:
    """The update written first and the base product added to it, against the product alone."""
    tokens = TOKENS[-1] if m < 2**16 else 80
    x = torch.randn(tokens, n, device=device).bfloat16()
    weight = (torch.randn(m, n, device=device) / n**0.5).bfloat16()
    z, basis = torch.randn(tokens, 8, device=device).bfloat16(), (torch.randn(m, 8, device=device) / 8).bfloat16()
    versus(
        "linear", graphed(lambda: [ops.expand(z, basis, SCALING).addmm_(x, weight.T) for _ in range(4)]),
        graphed(lambda: [torch.nn.functional.linear(x, weight) for _ in range(4)]), of="the product without the update",
        repeats=4, rounds=9, tokens=tokens, n=n, m=m, gflop=2e-9 * tokens * n * m,
    )  # fmt: skip


@on_devices
def test_noise(versus: Versus, device: str) -> None:
    r, n, where = 64, 14336, torch.device(device)
    out = ops.noise(r, n, SEED, LAYER, 3, where)
    error = float((out.cpu() - reference.noise(r, n, SEED, LAYER, 3, torch.device("cpu"))).abs().max())
    assert error <= NOISE_TOLERANCE
    empty = torch.empty_like(out)
    versus(
        "noise", lambda: ops.noise(r, n, SEED, LAYER, 3, where), lambda: empty.normal_(), of="torch's own generator",
        rounds=20, normals=out.numel(),
    )  # fmt: skip


# On the CPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(CPU_THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "of"),
    [
        ("cpu_materialised", "noise drawn by torch, weights written out, one batched product"),
        ("cpu_noise", "the same kernel without noise"),
        ("cpu_product", "torch's product with the mean alone"),
    ],
)
def test_cpu(versus: Versus, two_threads: None, device: str, case: str, of: str, dtype: torch.dtype) -> None:
    given = draws(device, CPU_WIDTH, [CPU_RANK])
    x = torch.randn(CPU_TOKENS, CPU_WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    given.check(x)
    mean, none = given.means[0], torch.zeros_like(given.sigma)
    scale = given.sigma[:, None, None]
    baselines: dict[str, Callable[[], object]] = {
        "cpu_materialised": lambda: oracle.shrink(x, mean + scale * torch.randn(SAMPLES, CPU_RANK, CPU_WIDTH)),
        "cpu_noise": lambda: given.shrink(x, none),
        "cpu_product": lambda: x @ mean.T.to(dtype),
    }
    versus(
        case, lambda: given.shrink(x), baselines[case], of=of, faster=case == "cpu_materialised", rounds=200, warmup=20,
        tokens=CPU_TOKENS, n=CPU_WIDTH, r=CPU_RANK, dtype=str(dtype).removeprefix("torch."), threads=CPU_THREADS,
    )  # fmt: skip
