"""The CUDA operators where a CPU cannot follow: agreement between devices, sizes above 2**31, graphs, races, devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tfb_ext import ops
from tfb_ext.ops import reference

LAYER = 77
CUDA = torch.device("cuda")


def inputs(r: int, n: int, groups: int, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(groups * rows, n, generator=generator).to(CUDA, dtype),
        "mean": torch.randn(r, n, generator=generator).to(CUDA),
        "sigma": torch.rand(groups, generator=generator).to(CUDA),
        "samples": torch.arange(groups, dtype=torch.int32, device=CUDA),
        "seed": torch.tensor([5], device=CUDA),
    }


def test_ten_million_draws_agree_with_the_cpu_and_the_contract() -> None:
    host = ops.noise(2500, 4000, 9, LAYER, 1)
    device = ops.noise(2500, 4000, 9, LAYER, 1, CUDA)
    assert (host - device.cpu()).abs().max() <= 1e-5
    assert (device.double() - reference.noise_float64(2500, 4000, 9, LAYER, 1, CUDA)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shrink_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    arguments = inputs(16, 1030, 4, 37, dtype)
    host = ops.shrink(**{name: value.cpu() for name, value in arguments.items()}, layer=LAYER)
    device = ops.shrink(**arguments, layer=LAYER).cpu()
    # Both round float32 sums of 1030 products of size about one.
    scale = 1030**0.5
    assert (host.double() - device.double()).abs().max() <= scale * (8 * torch.finfo(dtype).eps + 1e-5)


def test_shrink_above_two_to_the_31_elements() -> None:
    rows, n, r = 2**17 + 16, 2**14 + 8, 8
    assert rows * n > 2**31
    arguments = inputs(r, n, 1, 1, torch.bfloat16)
    arguments["x"] = torch.zeros(rows, n, dtype=torch.bfloat16, device=CUDA)
    probe = torch.randn(40, n, generator=torch.Generator().manual_seed(2)).to(CUDA, torch.bfloat16)
    arguments["x"][-40:] = probe
    z = ops.shrink(**arguments, layer=LAYER)
    expected = ops.shrink(**{**arguments, "x": probe}, layer=LAYER)
    assert torch.equal(z[-40:], expected) and expected.abs().max() > 1
    assert not z[:-40].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expand_above_two_to_the_31_elements(dtype: torch.dtype) -> None:
    rows, m, r = 2**17 + 16, 2**14 + 8, 8
    y = torch.zeros(rows, m, dtype=dtype, device=CUDA)
    z = torch.zeros(rows, r, dtype=dtype, device=CUDA)
    z[-40:] = torch.randn(40, r, generator=torch.Generator().manual_seed(3)).to(CUDA, dtype)
    basis = torch.randn(m, r, generator=torch.Generator().manual_seed(4)).to(CUDA)
    ops.expand_(y, z, basis, 2.0)
    expected = ops.expand_(torch.zeros(40, m, dtype=dtype, device=CUDA), z[-40:], basis, 2.0)
    assert torch.equal(y[-40:], expected) and expected.abs().max() > 1
    assert not y[:-40].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_serves_every_seed_sample_and_sigma(dtype: torch.dtype) -> None:
    arguments = inputs(8, 512, 4, 5, dtype)
    basis = torch.randn(96, 8, generator=torch.Generator().manual_seed(6)).to(CUDA)
    y = torch.zeros(20, 96, dtype=dtype, device=CUDA)

    def step() -> Tensor:
        return ops.expand_(y.zero_(), ops.shrink(**arguments, layer=LAYER), basis, 1.5)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    results = []
    for seed, first, sigma in ((5, 0, 0.5), (-6, 0, 0.5), (-6, 4, 0.5), (-6, 4, 0.1)):
        arguments["seed"].fill_(seed)
        arguments["samples"].copy_(torch.arange(first, first + 4))
        arguments["sigma"].fill_(sigma)
        graph.replay()
        replayed = y.clone()
        assert torch.equal(replayed, step())
        results.append(replayed)
    for a, b in zip(results, results[1:], strict=False):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_250_times(dtype: torch.dtype) -> None:
    arguments = inputs(24, 3000, 5, 70, dtype)
    basis = torch.randn(1000, 24, generator=torch.Generator().manual_seed(7)).to(CUDA)
    first = ops.shrink(**arguments, layer=LAYER)
    expanded = ops.expand_(torch.ones(350, 1000, dtype=dtype, device=CUDA), first, basis, 0.5)
    for _ in range(250):
        again = ops.shrink(**arguments, layer=LAYER)
        assert torch.equal(again, first)
        assert torch.equal(ops.expand_(torch.ones(350, 1000, dtype=dtype, device=CUDA), again, basis, 0.5), expanded)


@pytest.mark.parametrize("n", [4096, 14336])
@pytest.mark.parametrize("r", [8, 64])
def test_portable_kernels_give_the_same_bits(n: int, r: int) -> None:
    """Clusters and global memory add the panels' sums in the same order."""
    arguments = inputs(r, n, 6, 200, torch.bfloat16)
    try:
        ops.use_portable_kernels(True)
        if torch.cuda.get_device_capability() >= (9, 0):
            assert ops.build_info()["cuda_kernels"] == "portable"
        portable = ops.shrink(**arguments, layer=LAYER)
    finally:
        ops.use_portable_kernels(False)
    assert torch.equal(ops.shrink(**arguments, layer=LAYER), portable)


@pytest.fixture
def limited() -> Iterator[Any]:
    """Sets what the kernels may use of the machine: shared memory of a block, blocks of a cluster."""
    yield ops._C.limit_machine
    ops._C.limit_machine()


@pytest.mark.parametrize("mode", ["weight", "flipout", "token"])
@pytest.mark.parametrize("n", [8192, 12296, 14336, 53248, 61448])
def test_small_machines_give_the_same_bits(limited: Any, n: int, mode: str) -> None:
    """99 KiB of shared memory (compute capability 8.6, 8.9, 12.0) and no clusters, or only those of eight."""
    for r in (8, 40):
        arguments = inputs(r, n, 3, 50, torch.bfloat16)
        wide = torch.zeros(150, n + 8, dtype=torch.bfloat16, device=CUDA)
        wide[:, 1 : n + 1] = arguments["x"]
        limited()
        large = ops.shrink(**arguments, layer=LAYER, mode=mode)
        host = ops.shrink(**{name: value.cpu() for name, value in arguments.items()}, layer=LAYER, mode=mode)
        scale = n**0.5
        assert (large.cpu().double() - host.double()).abs().max() <= scale * (
            8 * torch.finfo(torch.bfloat16).eps + 1e-5
        )
        for shared_bytes, cluster_blocks in ((99 * 1024, 1), (99 * 1024, 8), (163 * 1024, 1), (227 * 1024, 8)):
            limited(shared_bytes, cluster_blocks)
            assert torch.equal(ops.shrink(**arguments, layer=LAYER, mode=mode), large)
            off = {**arguments, "x": wide[:, 1 : n + 1]}
            assert torch.equal(ops.shrink(**off, layer=LAYER, mode=mode), large)


def test_very_many_columns() -> None:
    for mode in ("weight", "flipout", "token"):
        arguments = inputs(3, 2**20 + 8, 2, 2, torch.float16)
        z = ops.shrink(**arguments, layer=LAYER, mode=mode)
        host = ops.shrink(**{name: value.cpu() for name, value in arguments.items()}, layer=LAYER, mode=mode)
        assert (z.cpu().double() - host.double()).abs().max() <= 1e-3 * 2**10 * 8


def test_too_little_shared_memory_is_an_error(limited: Any) -> None:
    limited(64 * 1024, 1)
    with pytest.raises(ValueError, match="shared memory, expected at least 101376 bytes .* Fix: "):
        ops.shrink(**inputs(8, 14336, 1, 4, torch.bfloat16), layer=LAYER, mode="flipout")


def test_additions_over_shared_memory_are_refused() -> None:
    buffer = torch.randn(64, 40, device=CUDA)
    basis = torch.ones(16, 8, device=CUDA)
    with pytest.raises(ValueError, match="expand_: z got memory that is y's too"):
        ops.expand_(buffer[:, 4:20], buffer[:, :8], basis, 1.0)
    wanted = buffer[:, 8:24] + buffer[:, :8] @ basis.T
    assert torch.allclose(ops.expand_(buffer[:, 8:24], buffer[:, :8], basis, 1.0), wanted, atol=1e-3)


def test_decoding_in_a_graph_and_250_times() -> None:
    arguments = inputs(8, 4096, 10, 1, torch.bfloat16)
    mean = arguments.pop("mean")
    bases = [torch.randn(m, 8, generator=torch.Generator().manual_seed(m)).to(CUDA) for m in (4096, 1024)]

    def step() -> list[Tensor]:
        return ops.update_group(
            arguments["x"], [mean, mean], bases, [None, None], [1.0, 2.0], arguments["sigma"], arguments["samples"],
            arguments["seed"], [LAYER, LAYER + 1],
        )  # fmt: skip

    first = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(250):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
    arguments["seed"].fill_(77)
    graph.replay()
    assert not torch.equal(captured[0], first[0])
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def rows_of_items(rows: int, lead: int, each: int, size: int) -> tuple[Tensor, Tensor]:
    """The rows of the mean, and those of the samples, one sample after the other."""
    places = torch.arange(rows, device=CUDA).view(-1, lead + size * each)
    return places[:, :lead].flatten(), places[:, lead:].unflatten(1, (size, each)).transpose(0, 1).flatten()


@pytest.mark.parametrize("mode", ["weight", "flipout", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [520, 4096, 14336, 53248])
def test_items_are_their_rows_alone(limited: Any, n: int, dtype: torch.dtype, mode: str) -> None:
    """In clusters and without, where tiles of 16 rows lie in one item and where they lie in several."""
    for items, lead, each, size in ((5, 130, 20, 3), (70, 5, 3, 2), (40, 0, 1, 4), (3, 7, 200, 2)):
        given = inputs(8, n, 1, items * (lead + size * each), dtype)
        sigma, samples = torch.rand(size).to(CUDA), torch.tensor([5, 2, 3, 0], dtype=torch.int32, device=CUDA)[:size]
        of_mean, of_samples = rows_of_items(len(given["x"]), lead, each, size)
        none = torch.zeros(1, device=CUDA)
        for cluster_blocks in (16, 1):
            limited(2**31 - 1, cluster_blocks)
            means, draws = [given["mean"]], (sigma, samples, given["seed"], [LAYER], mode)
            (z,) = ops.shrink_group(given["x"], means, *draws, lead=lead, each=each)
            (alone,) = ops.shrink_group(given["x"][of_samples], means, *draws)
            assert torch.equal(z[of_samples], alone)
            if lead > 0:
                of_none = none, none.int(), given["seed"], [LAYER], mode
                assert torch.equal(z[of_mean], ops.shrink_group(given["x"][of_mean], means, *of_none)[0])


@pytest.mark.parametrize("mode", ["weight", "flipout", "token"])
def test_decoding_items_and_shared_noise_in_one_graph(mode: str) -> None:
    """The bits of every sample alone; pairs, an odd sample, one sample under many sigmas: all by one captured graph."""
    size, items = 9, 8
    given = inputs(24, 4096, size, items, torch.bfloat16)
    means, bases = (
        [given["mean"], given["mean"][:8].contiguous()],
        [torch.randn(m, r).to(CUDA) for m, r in ((4096, 24), (1000, 8))],
    )
    sigma, samples, seed = given["sigma"], given["samples"], given["seed"]

    def update(x: Tensor, taken: slice, *layout: int) -> list[Tensor]:
        draws = sigma[taken], samples[taken], seed, [LAYER, LAYER + 1], mode, True
        return list(ops.update_group(x, means, bases, [None, None], [1.0, 2.0], *draws, *layout))

    everything = slice(None)
    update(given["x"], everything, 0, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = update(given["x"], everything, 0, 1)
    _, of_samples = rows_of_items(size * items, 0, 1, size)
    for drawn in (list(range(size)), [4] * size, [7, 6, 1, 2, 3, 3, 9, 8, 0], [1, 3, 5, 7, 9, 11, 13, 15, 17]):
        samples.copy_(torch.tensor(drawn, dtype=torch.int32))
        sigma.copy_(torch.rand(size) * (torch.arange(size) != 3))
        graph.replay()
        for k, rows in enumerate(of_samples.view(size, items)):
            for y, wanted in zip(captured, update(given["x"][rows], slice(k, k + 1)), strict=True):
                assert torch.equal(y[rows], wanted)


def test_runs_on_the_current_stream() -> None:
    arguments = inputs(8, 4096, 4, 64, torch.bfloat16)
    expected = ops.shrink(**arguments, layer=LAYER)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(arguments["x"])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(arguments["x"])
        z = ops.shrink(**{**arguments, "x": late}, layer=LAYER)
    stream.synchronize()
    assert torch.equal(z, expected)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    arguments = inputs(8, 512, 2, 5, torch.bfloat16)
    moved = {name: value.to("cuda:1") for name, value in arguments.items()}
    assert torch.equal(ops.shrink(**moved, layer=LAYER).cpu(), ops.shrink(**arguments, layer=LAYER).cpu())
    assert torch.equal(ops.noise(8, 64, 1, 2, 3, "cuda:1").cpu(), ops.noise(8, 64, 1, 2, 3, "cuda:0").cpu())


@pytest.mark.parametrize("name", ["mean", "sigma", "samples", "seed"])
def test_shrink_on_two_devices_is_an_error(name: str) -> None:
    arguments = inputs(8, 512, 2, 5, torch.bfloat16)
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=f"shrink_group: {name} is on cpu, but x is on cuda:0; put both on one device"):
        ops.shrink(**arguments, layer=LAYER)


@pytest.mark.parametrize("name", ["z", "basis"])
def test_expand_on_two_devices_is_an_error(name: str) -> None:
    arguments = {"z": torch.ones(4, 8, device=CUDA), "basis": torch.ones(16, 8, device=CUDA)}
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=f"expand_: {name} is on cpu, but y is on cuda:0; put both on one device"):
        ops.expand_(torch.zeros(4, 16, device=CUDA), **arguments, scaling=1.0)
