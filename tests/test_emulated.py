"""The CUDA kernels on the CPU: compiled against tests/emulator, they must give what the CPU's own operators give.

The emulator runs a kernel's threads as fibers. It sees reads before an asynchronous copy has landed, threads that wait for
others that never come, and wrong places in fragments, shared memory or clusters; it does not see races within a warp.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tfb_ext import ops
from tfb_ext.ops import reference

sys.path.insert(0, str(Path(__file__).parent / "emulator"))
import build

SEED = 2**40 + 12345
HALVES = [torch.bfloat16, torch.float16]
MODES = ["weight", "flipout", "token"]
PATHS = ["clusters", "portable"]
SHRINKS: list[tuple[int, int, int, tuple[int, ...]]] = [
    (1, 1, 1, (1,)),
    (2, 5, 64, (3,)),
    (3, 17, 130, (8,)),
    (2, 33, 1032, (8, 8, 8)),
    (3, 330, 1100, (8,)),
    (7, 50, 1040, (24, 4)),
    (5, 100, 8200, (8,)),
    (1, 260, 1288, (33,)),
    (9, 20, 1288, (64, 16)),
    (2, 20, 1033, (70,)),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        build.cuda_include() is None or shutil.which("g++") is None,
        reason="nvcc's headers or g++ are not on this machine, so the CUDA kernels cannot be compiled for the CPU",
    ),
]


LARGEST = 2**31 - 1
# Shared memory of a block by compute capability: 8.6, 8.9 and 12.0; 8.0 and 8.7; 9.0 and 10.0.
SHARED = {"99 KiB": 99 * 1024, "163 KiB": 163 * 1024, "227 KiB": 227 * 1024}


class Plan(NamedTuple):
    """What csrc/cuda/tuning.h answers."""

    tiles: int
    warps: int
    panels: int
    panel_columns: int
    clustered: int
    round_tiles: int
    shared: int


class Emulated:
    """``torch.ops.tfb_emulated``, with limits to the machine."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self.ops: Any = torch.ops.tfb_emulated
        self._library = ctypes.CDLL(str(library))

    def limit(self, shared_bytes: int = LARGEST, cluster_blocks: int = LARGEST) -> None:
        self._library.tfb_emulated_limit_machine(shared_bytes, cluster_blocks)

    def plan(self, mode: str, n: int, tiles: int, aligned: bool, shared_bytes: int, cluster_blocks: int) -> Plan:
        out = (ctypes.c_int64 * 7)()
        given = ctypes.c_int64(n), ctypes.c_int64(tiles), ctypes.c_bool(aligned)
        self._library.tfb_emulated_plan(MODES.index(mode), *given, shared_bytes, cluster_blocks, out)
        return Plan(*out)

    def item(self, each: int, items: int, number: int) -> int:
        find = self._library.tfb_emulated_item
        find.restype = ctypes.c_int64
        return int(find(*map(ctypes.c_int64, (each, items, number))))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(build.build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def emulated(built: Emulated, path: str) -> Iterator[Any]:
    """The operators that add up in clusters or, where those are missing, in global memory."""
    built.limit(cluster_blocks=1 if path == "portable" else LARGEST)
    yield built.ops
    built.limit()


@pytest.fixture
def alike(built: Emulated) -> Any:
    """The operators whose kernels the switch does not reach."""
    return built.ops


class Case:
    """Layers of some ranks that share x, S groups of G rows; the draws are the CPU's and the emulated kernels' alike."""

    def __init__(self, groups: int, rows: int, n: int, ranks: tuple[int, ...], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(groups * 1009 + rows * 31 + n)
        self.x = torch.randn(groups * rows, n, generator=generator).to(dtype)
        self.means = [torch.randn(r, n, generator=generator) for r in ranks]
        self.sigma = 0.1 + torch.rand(groups, generator=generator)
        self.samples = torch.randperm(4 * groups, generator=generator)[:groups].to(torch.int32)
        self.seed = torch.tensor([SEED])
        self.layers = [0xC0FFEE + k for k in range(len(ranks))]

    def draws(self, mode: str) -> tuple[Any, ...]:
        return self.means, self.sigma, self.samples, self.seed, self.layers, mode, True

    def terms(self) -> Tensor:
        """Squares of the terms of a row's sums, largest row."""
        largest = max(float(m.double().square().max()) for m in self.means) + 36 * float(self.sigma.max()) ** 2
        return self.x.double().square().sum(1).max() * largest


def rows_of_items(rows: int, lead: int, each: int, size: int) -> tuple[Tensor, Tensor]:
    """The rows of the mean, and those of the samples, one sample after the other."""
    places = torch.arange(rows).view(-1, lead + size * each)
    return places[:, :lead].flatten(), places[:, lead:].unflatten(1, (size, each)).transpose(0, 1).flatten()


def assert_close(out: Tensor, wanted: Tensor, terms: Tensor, length: int) -> None:
    """Two ways to round the same sum: two units of the type each, and float32 sums of ``length`` terms in another order."""
    scale = math.sqrt(float(terms))
    slack = scale * (4 * torch.finfo(out.dtype).eps + 2 * torch.finfo(torch.float32).eps * math.sqrt(length) + 1e-6)
    assert out.isfinite().all()
    assert (out.double() - wanted.double()).abs().max() <= slack


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(len(SHRINKS)))
def test_shrink(emulated: Any, path: str, number: int, mode: str) -> None:
    """Every shape meets every mode in clusters and without, with one type each: the types take turns over all three."""
    groups, rows, n, ranks = SHRINKS[number]
    case = Case(groups, rows, n, ranks, HALVES[(number + MODES.index(mode) + PATHS.index(path)) % 2])
    found = emulated.shrink_group(case.x, *case.draws(mode))
    for z, wanted in zip(found, ops.shrink_group(case.x, *case.draws(mode)), strict=True):
        assert_close(z, wanted, case.terms(), n)


@pytest.mark.parametrize("mode", MODES)
def test_shrink_float32(alike: Any, mode: str) -> None:
    for groups, rows, n, ranks in ((1, 1, 1, (1,)), (3, 17, 300, (8, 3)), (2, 9, 1031, (17,)), (2, 3, 1, (300,))):
        case = Case(groups, rows, n, ranks, torch.float32)
        found = alike.shrink_group(case.x, *case.draws(mode))
        for z, wanted in zip(found, ops.shrink_group(case.x, *case.draws(mode)), strict=True):
            assert_close(z, wanted, case.terms(), n)


def test_items_are_counted_without_a_division(built: Emulated) -> None:
    largest = 2**31 - 1
    for each in (1, 2, 3, 5, 7, 16, 127, 641, 2**16 - 1, 2**16 + 1, 2**30 - 1, 2**30, 2**30 + 1):
        edges = {k * each + d for k in (0, 1, 2, 3, 1000, largest // each) for d in (-1, 0, 1)}
        random = torch.randint(0, largest, (200,), generator=torch.Generator().manual_seed(each)).tolist()
        for number in {*edges, *random, largest - 1, largest}:
            if 0 <= number <= largest:
                assert built.item(each, largest // each + 1, number) == number // each
    assert built.item(4, 1, 3) == 0


# Items, lead, each, samples, columns: tiles whose rows lie in one item, in two, in sixteen.
ITEMS = [(9, 5, 3, 2, 130), (40, 0, 1, 3, 64), (2, 130, 20, 1, 64), (3, 0, 20, 3, 1160), (7, 5, 3, 2, 1160)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(len(ITEMS)))
def test_items(emulated: Any, path: str, number: int, mode: str) -> None:
    """The bits of the same rows alone, wherever they lie: copied behind the back and, off 16 bytes, through registers."""
    items, lead, each, size, n = ITEMS[number]
    types = [torch.float32, *HALVES]
    case = Case(1, items * (lead + size * each), n, (8, 3), types[(number + MODES.index(mode)) % 3])
    case.sigma, case.samples = 0.1 + torch.rand(size), torch.randint(0, 4, (size,), dtype=torch.int32)
    of_mean, of_samples = rows_of_items(len(case.x), lead, each, size)
    wide = torch.zeros(len(case.x), n + 8, dtype=case.x.dtype)
    wide[:, 1 : n + 1] = case.x
    start = (number + PATHS.index(path)) % 2
    x = wide[:, 1 : n + 1] if start else case.x
    found = emulated.shrink_group(x, *case.draws(mode), lead, each)
    alone = emulated.shrink_group(case.x[of_samples], *case.draws(mode))
    for z, wanted, host in zip(found, alone, ops.shrink_group(x, *case.draws(mode), lead, each), strict=True):
        assert torch.equal(z[of_samples], wanted)
        assert_close(z, host, case.terms(), n)
    if lead > 0:
        none = torch.zeros(1)
        alone = emulated.shrink_group(case.x[of_mean], case.means, none, none.int(), case.seed, case.layers, mode, True)
        for z, wanted in zip(found, alone, strict=True):
            assert torch.equal(z[of_mean], wanted)


def test_bits_depend_on_neither_company_nor_tiles(built: Emulated) -> None:
    """A row alone, its sample alone, its layer alone, clusters or global memory: the same bits."""
    case = Case(3, 40, 1160, (8, 16, 8), torch.bfloat16)
    means, sigma, samples, seed, layers, mode, antithetic = case.draws("weight")
    together = built.ops.shrink_group(case.x, *case.draws("weight"))
    built.limit(cluster_blocks=1)
    for a, b in zip(built.ops.shrink_group(case.x, *case.draws("weight")), together, strict=True):
        assert torch.equal(a, b)
    built.limit()
    for mean, layer, z in zip(means, layers, together, strict=True):
        for rows, groups in ((slice(None), slice(None)), (slice(40, 80), slice(1, 2)), (slice(47, 48), slice(1, 2))):
            (alone,) = built.ops.shrink_group(
                case.x[rows], [mean], sigma[groups], samples[groups], seed, [layer], mode, antithetic
            )
            assert torch.equal(alone, z[rows])


@pytest.mark.parametrize("shared_bytes", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize("mode", MODES)
def test_every_size_finds_a_plan_on_every_machine(built: Emulated, mode: str, shared_bytes: int) -> None:
    """The plan fits, covers the columns, and has panels by n and the mode alone; without clusters it takes the portable way."""
    near = (
        1023,
        1024,
        7168,
        7169,
        12288,
        14336,
        16 * 1792,
        16 * 1792 + 1,
        53248,
        16 * 3840,
        16 * 3840 + 1,
        2**24,
        2**34,
    )
    for n in sorted({*near, *(2**k for k in range(25)), *(3 * 2**k + 1 for k in range(23))}):
        panels = {built.plan(mode, n, 1, True, SHARED["227 KiB"], 16)[2:4]}
        for tiles in (1, 2, 3, 4, 5, 8, 32):
            for aligned in (True, False):
                for cluster_blocks in (1, 8, 16):
                    plan = built.plan(mode, n, tiles, aligned, shared_bytes, cluster_blocks)
                    assert plan.tiles >= 1 and plan.shared <= shared_bytes, (n, tiles, aligned, plan)
                    assert plan.round_tiles >= plan.warps and plan.round_tiles % plan.warps == 0
                    assert plan.panels * plan.panel_columns >= n and plan.panel_columns % 128 == 0
                    assert not plan.clustered or plan.panels <= cluster_blocks
                    # Kernels of more than four warps are compiled for clusters only.
                    assert plan.warps == 4 or cluster_blocks > 1
                    panels.add(plan[2:4])
        assert len(panels) == 1


@pytest.mark.parametrize(
    ("mode", "n", "rank"),
    # Llama-8B's down projection; one that 99 KiB hold with one row of tiles in hand only; Llama-405B's; beyond 16 panels.
    [("flipout", 14336, 16), ("token", 14336, 16), ("weight", 14336, 40), ("weight", 8192, 32), ("flipout", 53248, 3),
     ("weight", 61448, 9)],
)  # fmt: skip
def test_small_machines(built: Emulated, mode: str, n: int, rank: int) -> None:
    """Little shared memory and no clusters: right, and the bits of the large machine; also for rows off 16 bytes."""
    case = Case(2, 5, n, (rank,), HALVES[rank % 2])
    (wanted,) = ops.shrink_group(case.x, *case.draws(mode))
    wide = torch.zeros(10, n + 8, dtype=case.x.dtype)
    wide[:, 1 : n + 1] = case.x
    try:
        (large,) = built.ops.shrink_group(case.x, *case.draws(mode))
        for cluster_blocks, x in ((1, case.x), (16, wide[:, 1 : n + 1])):
            built.limit(SHARED["99 KiB"], cluster_blocks)
            (z,) = built.ops.shrink_group(x, *case.draws(mode))
            assert torch.equal(z, large)
    finally:
        built.limit()
    assert_close(large, wanted, case.terms(), n)


def test_too_little_shared_memory_is_an_error(built: Emulated) -> None:
    case = Case(1, 2, 14336, (8,), torch.bfloat16)
    built.limit(64 * 1024)
    try:
        with pytest.raises(ValueError, match="shared memory, expected at least 101376 bytes .* Fix: "):
            built.ops.shrink_group(case.x, *case.draws("flipout"))
    finally:
        built.limit()


@pytest.mark.parametrize("start", [0, 1, 8])
def test_strided_rows_touch_nothing_else(emulated: Any, start: int) -> None:
    case = Case(2, 21, 1032, (8,), torch.bfloat16)
    (expected,) = emulated.shrink_group(case.x, *case.draws("weight"))
    wide = torch.full((42, 1032 + 16), float("nan"), dtype=torch.bfloat16)
    wide[:, start : start + 1032] = case.x
    (found,) = emulated.shrink_group(wide[:, start : start + 1032], *case.draws("weight"))
    # Off 16 bytes another kernel serves; the order of its sums is the same.
    assert torch.equal(found, expected)
    basis = torch.randn(264, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = torch.full((42, 264 + 16), float("nan"), dtype=torch.bfloat16)
    y[:, start : start + 264] = 1.0
    emulated.expand_(y[:, start : start + 264], expected, basis, 2.0)
    assert torch.equal(y[:, start : start + 264], emulated.expand(expected, basis, 2.0, torch.ones(264).bfloat16()))
    assert y[:, :start].isnan().all() and y[:, start + 264 :].isnan().all()


@pytest.mark.parametrize(
    ("tokens", "m", "r"),
    [(1, 1, 1), (5, 7, 3), (64, 128, 8), (37, 264, 12), (200, 1032, 16), (300, 520, 40), (33, 520, 64), (50, 136, 24),
     (17, 130, 8), (40, 72, 136), (700, 64, 8), (9, 2056, 32)],
)  # fmt: skip
def test_expand(alike: Any, tokens: int, m: int, r: int) -> None:
    generator = torch.Generator().manual_seed(tokens + m)
    for dtype in (*HALVES, torch.float32):
        z = torch.randn(tokens, r, generator=generator).to(dtype)
        basis = torch.randn(m, r, generator=generator)
        bias = torch.randn(m, generator=generator).to(dtype)
        y = torch.randn(tokens, m, generator=generator).to(dtype)
        added = y.clone()
        alike.expand_(added, z, basis, 1.5)
        pairs = [
            (added, y.double()),
            (alike.expand(z, basis, 1.5), torch.zeros(m, dtype=torch.float64)),
            (alike.expand(z, basis, 1.5, bias), bias.double()),
        ]
        for out, start in pairs:
            update = 1.5 * z.double() @ basis.to(dtype).double().T
            terms = (1.5**2 * z.double().square() @ basis.double().square().T + start.square()).max()
            assert_close(out, start + update, terms, r)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("groups", "rows"), [(1, 1), (10, 1), (5, 8), (3, 16), (4, 20)])
def test_update_group(alike: Any, groups: int, rows: int, mode: str) -> None:
    for dtype in HALVES:
        case = Case(groups, rows, 1100, (8, 3, 17), dtype)
        generator = torch.Generator().manual_seed(5)
        widths = (264, 7, 130)
        bases = [torch.randn(m, len(mean), generator=generator) for m, mean in zip(widths, case.means, strict=True)]
        biases = [None, torch.randn(7, generator=generator).to(dtype), torch.randn(130, generator=generator).to(dtype)]
        weights = [torch.randn(m, 1100, generator=generator).to(dtype) for m in widths]
        means, *draws = case.draws(mode)
        given = case.x, means, bases, biases, [1.5, 2.0, 0.5], *draws
        found = alike.update_group(*given, weights=[])
        for y, output, weight in zip(found, alike.update_group(*given, weights=weights), weights, strict=True):
            assert torch.equal(output, y.addmm(case.x, weight.T))
        z = ops.shrink_group(case.x.float(), *case.draws(mode))
        for y, low, basis, bias, scaling in zip(found, z, bases, biases, (1.5, 2.0, 0.5), strict=True):
            exact = (0 if bias is None else bias.double()) + scaling * low.double() @ basis.double().T
            terms = scaling**2 * case.terms() * basis.double().square().sum(1).max()
            assert_close(y, exact, terms, 1100)


# Items, each, samples, sigmas: items of decoding; pairs and an odd sample; one sample under many sigmas, one of them 0.
DECODES: list[tuple[int, int, list[int], list[float]]] = [
    (8, 1, list(range(10)), [0.3] * 10),
    (1, 3, [0, 1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4, 0.5]),
    (2, 2, [5, 5, 5, 4, 3, 2, 9], [0.5, 0.0, 0.3, 0.2, 0.0, 0.1, 0.4]),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", range(len(DECODES)))
def test_decode_of_items_and_shared_noise(alike: Any, number: int, mode: str) -> None:
    """Bits of every sample alone, which shares its noise with no other; antithetic and not."""
    items, each, samples, sigma = DECODES[number]
    case = Case(1, items * each * len(samples), 600, (8, 3), HALVES[(number + MODES.index(mode)) % 2])
    bases = [torch.randn(m, len(mean)) for m, mean in zip((130, 7), case.means, strict=True)]
    given = case.means, bases, [None, None], [1.5, 0.5]
    _, of_samples = rows_of_items(len(case.x), 0, each, len(samples))
    for antithetic in (True, False):

        def update(op: Any, x: Tensor, taken: slice, *rest: Any) -> list[Tensor]:
            draws = torch.tensor(sigma)[taken], torch.tensor(samples, dtype=torch.int32)[taken], case.seed, case.layers
            return list(op.update_group(x, *given, *draws, mode, antithetic, *rest, weights=[]))  # noqa: B023

        everything = slice(None)
        found = update(alike, case.x, everything, 0, each)
        for y, host in zip(found, update(ops, case.x, everything, 0, each), strict=True):
            assert_close(y, host, 1.5**2 * case.terms() * 40, 600)
        for k, rows in enumerate(of_samples.view(len(samples), -1)):
            for y, wanted in zip(found, update(alike, case.x[rows], slice(k, k + 1)), strict=True):
                assert torch.equal(y[rows], wanted)


@pytest.mark.parametrize("lead", [0, 5])
def test_update_of_items(alike: Any, lead: int) -> None:
    """Rows of the mean, or more rows than one launch takes: the two operators, over all rows."""
    case = Case(1, 6 * (lead + 24), 600, (8, 3), torch.bfloat16)
    case.sigma, case.samples = torch.tensor([0.5, 1.0]), torch.tensor([4, 5], dtype=torch.int32)
    bases = [torch.randn(m, len(mean)) for m, mean in zip((130, 7), case.means, strict=True)]
    means, *draws = case.draws("weight")
    found = alike.update_group(case.x, means, bases, [None, None], [1.5, 0.5], *draws, lead, 12, weights=[])
    z = alike.shrink_group(case.x, means, *draws, lead, 12)
    for y, part, basis, scaling in zip(found, z, bases, (1.5, 0.5), strict=True):
        assert torch.equal(y, alike.expand(part, basis, scaling))


def test_no_rows(emulated: Any) -> None:
    case = Case(2, 0, 64, (8, 3), torch.bfloat16)
    for layout in ((0, 0), (3, 2)):
        assert [z.shape for z in emulated.shrink_group(case.x, *case.draws("weight"), *layout)] == [(0, 8), (0, 3)]
    assert emulated.expand(torch.empty(0, 8), torch.ones(16, 8), 1.0).shape == (0, 16)


@pytest.mark.parametrize(
    ("batch", "key_heads", "groups", "tokens", "columns", "width"),
    [(1, 1, 1, 1, 1, 64), (2, 2, 4, 10, 150, 128), (1, 2, 3, 7, 300, 64), (1, 1, 2, 40, 70, 128)],
)
def test_attention(alike: Any, batch: int, key_heads: int, groups: int, tokens: int, columns: int, width: int) -> None:
    """Of strided tensors, into a part of a larger one, some columns hidden from all rows and some from a few."""
    for dtype in HALVES:
        generator = torch.Generator().manual_seed(columns)
        query = torch.randn(batch, tokens + 2, key_heads * groups, width, generator=generator).to(dtype).transpose(1, 2)
        key, value = torch.randn(2, batch, key_heads, columns + 3, width, generator=generator).to(dtype)
        key, value = key[:, :, :columns], value[:, :, :columns]
        hidden = torch.rand(batch, 1, groups * tokens, columns, generator=generator) < 0.4
        hidden[..., 0] = False
        mask = torch.zeros(batch, 1, groups * tokens, columns + 8, dtype=dtype)[..., :columns]
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
        room = torch.full((batch, tokens + 2, key_heads * groups, width), 7.0, dtype=dtype)
        exact = reference.attend_(room.double(), query, key, value, mask, 0.2)
        alike.attend_(room, query, key, value, mask, 0.2)
        assert bool((room[:, :2] == 7).all())
        unit = torch.finfo(dtype).eps
        assert float((room - exact).abs().max()) < 4 * unit * float(value.abs().max())
