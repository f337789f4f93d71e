"""Every operator at ragged sizes, once each, for compute-sanitizer: ``compute-sanitizer python tests/gpu/sanitize.py``.

Inputs are made on the CPU and copied, so that hardly any kernel but ours runs. Sizes end inside all kinds of tile; rows
are contiguous, or start at an odd element of a wider tensor. Results are compared with the CPU's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from tfb_ext import ops

SEED, LAYER, SCALING = 2**63 + 12345, 0xFEDCBA98, 1.5
TYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISE_SHAPES = ((1, 1), (3, 5), (8, 1030), (17, 129), (65, 31))
# Samples, rows a sample, in features, rank.
SHRINK_SHAPES = (
    (1, 1, 1, 1), (2, 7, 33, 3), (3, 17, 130, 8), (2, 65, 257, 17), (1, 129, 96, 65), (2, 64, 512, 64),
    (3, 5, 1032, 16), (2, 150, 1160, 24), (2, 0, 64, 8),
)  # fmt: skip
MODES = ("weight", "flipout", "token")
# Rows, out features, rank.
EXPAND_SHAPES = (
    (1, 1, 1), (7, 33, 3), (17, 130, 8), (65, 257, 17), (129, 96, 65), (64, 512, 64), (33, 1032, 16), (0, 64, 8),
)  # fmt: skip
# Two devices' noise may differ by this much.
NOISE_TOLERANCE = 1e-5


def layouts(value: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """``value`` (T, n) inside a wider tensor full of NaN, and its columns there: on its own, then from element 1 on."""
    n = value.shape[1]
    for before, after in ((0, 0), (1, 2)):
        wide = torch.full((value.shape[0], before + n + after), float("nan"), dtype=value.dtype)
        wide[:, before : before + n] = value
        yield wide, slice(before, before + n)


def require_close(what: str, out: Tensor, wanted: Tensor, magnitude: Tensor, noise: float = 0.0) -> None:
    """Allow two roundings to the type on each side, of the sum of absolute terms, and what the noise may differ by."""
    if out.numel() == 0:
        return
    tolerance = 4 * torch.finfo(out.dtype).eps * float(magnitude.max()) + noise
    error = float((out.cpu().double() - wanted.double()).abs().max())
    if not error <= tolerance:
        raise SystemExit(f"{what}: differs from the CPU by {error:.3e}, expected at most {tolerance:.3e}")


def run_noise(device: torch.device) -> int:
    for r, n in NOISE_SHAPES:
        for antithetic in (False, True):
            out = ops.noise(r, n, SEED, LAYER, 3, device, antithetic)
            wanted = ops.noise(r, n, SEED, LAYER, 3, torch.device("cpu"), antithetic)
            require_close(f"noise r={r} n={n}", out, wanted, torch.zeros(1), NOISE_TOLERANCE)
    return 2 * len(NOISE_SHAPES)


def draws(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """sigma, samples and seed of ``size`` groups."""
    samples = torch.arange(size, dtype=torch.int32) + 4
    return torch.linspace(0.1, 0.5, size), samples, torch.tensor([SEED - 2**64], dtype=torch.int64)


def run_shrink(device: torch.device, dtype: torch.dtype) -> int:
    done = 0
    for size, rows, n, r in SHRINK_SHAPES:
        x, mean = torch.randn(size * rows, n).to(dtype), torch.randn(r, n)
        given = draws(size)
        sigma = float(given[0].max())
        magnitude = x.double().abs() @ (mean.abs().double() + 6 * sigma).T
        noise = NOISE_TOLERANCE * sigma * float(x.double().abs().sum(1).max()) if len(x) else 0.0
        moved = [t.to(device) for t in given]
        for index, (wide, columns) in enumerate(layouts(x)):
            for mode in MODES:
                m = mean if index == 0 else mean.to(dtype)
                wanted = ops.shrink(x, m, *given, LAYER, mode)
                for portable in (False, True):
                    ops.use_portable_kernels(portable)
                    out = ops.shrink(wide.to(device)[:, columns], m.to(device), *moved, LAYER, mode)
                    what = f"shrink {dtype} {mode} S={size} G={rows} n={n} r={r} portable={portable}"
                    require_close(what, out, wanted, magnitude, noise)
                    done += 1
    ops.use_portable_kernels(False)
    return done


def run_update(device: torch.device, dtype: torch.dtype) -> int:
    """Few rows: the decode kernel, which waits for its whole grid. Then many, and items that begin with rows of the mean."""
    done = 0
    for size, rows, items, lead in (
        (1, 1, 1, 0),
        (5, 3, 1, 0),
        (3, 16, 1, 0),
        (3, 20, 1, 0),
        (3, 4, 3, 45),
        (6, 1, 2, 170),
    ):
        x = torch.randn(items * (lead + size * rows), 1160).to(dtype)
        means = [torch.randn(8, 1160), torch.randn(8, 1160), torch.randn(5, 1160)]
        bases = [torch.randn(264, 8), torch.randn(64, 8), torch.randn(130, 5)]
        biases = [None, None, torch.randn(130).to(dtype)]
        given = draws(size)
        for mode in MODES:
            rest = [1.5, 0.5, 0.5], *given, [LAYER, 7, 8], mode, False, lead, rows if lead else 0
            wanted = ops.update_group(x, means, bases, biases, *rest)
            on_device = [[None if t is None else t.to(device) for t in part] for part in (means, bases, biases)]
            moved = [t.to(device) if isinstance(t, Tensor) else t for t in rest]
            found = ops.update_group(x.to(device), *on_device, *moved)
            weight = means[0].abs().double() + 6 * float(given[0].max())
            z = x.double().abs() @ weight.T
            magnitude = 4 + 1.5 * z @ bases[0].double().abs().T
            noise = 1.5 * NOISE_TOLERANCE * float(given[0].max()) * float(x.double().abs().sum(1).max()) * 40
            for out, right in zip(found, wanted, strict=True):
                require_close(
                    f"update_group {dtype} {mode} S={size} G={rows} lead={lead}", out, right, magnitude, noise
                )
            done += 1
    return done


def run_expand(device: torch.device, dtype: torch.dtype) -> int:
    done = 0
    for rows, m, r in EXPAND_SHAPES:
        y, z, basis = torch.randn(rows, m).to(dtype), torch.randn(rows, r).to(dtype), torch.randn(m, r)
        magnitude = y.double().abs() + SCALING * z.double().abs() @ basis.double().abs().T
        for wide, columns in layouts(y):
            for u in (basis, basis.to(dtype)):
                wanted = ops.expand_(y.clone(), z, u, SCALING)
                whole = wide.to(device, copy=True)
                ops.expand_(whole[:, columns], z.to(device), u.to(device), SCALING)
                after = whole.cpu()
                require_close(f"expand_ {dtype} T={rows} m={m} r={r}", after[:, columns], wanted, magnitude)
                outside = torch.cat([after[:, : columns.start], after[:, columns.stop :]], dim=1)
                if not outside.isnan().all():
                    raise SystemExit(f"expand_ {dtype} T={rows} m={m} r={r}: wrote outside its rows' columns")
                done += 1
        for bias in (None, torch.randn(m).to(dtype)):
            wanted = ops.expand(z, basis, SCALING, bias)
            out = ops.expand(z.to(device), basis.to(device), SCALING, None if bias is None else bias.to(device))
            require_close(f"expand {dtype} T={rows} m={m} r={r}", out, wanted, magnitude + 4)
            done += 1
    return done


def run_attend(device: torch.device, dtype: torch.dtype) -> int:
    if dtype == torch.float32:  # torch's own
        return 0
    shapes = ((1, 1, 1, 1, 1, 64), (2, 2, 4, 10, 150, 128), (1, 2, 3, 7, 700, 64), (2, 1, 2, 65, 70, 128))
    for batch, key_heads, groups, tokens, columns, width in shapes:
        query = torch.randn(batch, key_heads * groups, tokens + 2, width).to(dtype)
        key, value = (torch.randn(batch, key_heads, columns, width).to(dtype) for _ in range(2))
        hidden = torch.rand(batch, 1, groups * tokens, columns) < 0.4
        hidden[..., 0] = False
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        wanted = torch.empty(batch, tokens + 2, key_heads * groups, width, dtype=dtype)
        ops.attend_(wanted, query, key, value, mask, 0.1)
        room = torch.full((batch, tokens + 2, key_heads * groups, width), float("nan"), dtype=dtype, device=device)
        ops.attend_(room, *(t.to(device) for t in (query, key, value, mask)), 0.1)
        what = f"attend_ {dtype} {tuple(query.shape)} C={columns}"
        require_close(what, room[:, 2:], wanted[:, 2:], value.abs().double())
        if not room[:, :2].isnan().all():
            raise SystemExit(f"{what}: wrote outside its tokens")
    return len(shapes)


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    torch.manual_seed(0)
    calls = run_noise(device)
    for dtype in TYPES:
        calls += run_shrink(device, dtype) + run_expand(device, dtype) + run_update(device, dtype)
        calls += run_attend(device, dtype)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls on {device} agree with the CPU")


if __name__ == "__main__":
    main()
