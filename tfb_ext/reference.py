"""What every operator means, in plain torch: the tests' oracle, and a fallback for who asks for it by name.

Same signatures as :mod:`tfb_ext.ops`. The noise is made whole, in float64, and rounded to float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["expand_", "noise", "noise_float64", "philox", "shrink"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _wide_multiply(words: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a product, from 16-bit halves: int64 has no room for the unsigned product."""
    low_part = words * (multiplier & 0xFFFF)
    high_part = words * (multiplier >> 16)
    middle = high_part + (low_part >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC'11) over int64 tensors that hold 32-bit words and broadcast with each other."""
    x0, x1, x2, x3 = torch.broadcast_tensors(*counter)
    key0, key1 = key
    for _ in range(10):
        high0, low0 = _wide_multiply(x0, _MULTIPLIERS[0])
        high1, low1 = _wide_multiply(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return x0, x1, x2, x3


def noise_float64(
    r: int,
    n: int,
    seed: int,
    layer: int,
    sample: int,
    device: torch.device | str = "cpu",
    antithetic: bool = False,
) -> Tensor:
    """The noise's definition evaluated in float64: (r, n). Arguments as in :func:`tfb_ext.ops.noise`."""
    rows = torch.arange(r, dtype=torch.int64, device=device)[:, None]
    blocks = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)[None, :]
    counter_sample = torch.tensor(sample & ~1 if antithetic else sample, dtype=torch.int64, device=device)
    layer_word = torch.tensor(layer, dtype=torch.int64, device=device)
    words = philox((blocks, rows, counter_sample, layer_word), (seed & _WORD, (seed >> 32) & _WORD))
    columns = []
    for a, b in ((words[0], words[1]), (words[2], words[3])):
        # log1p(-(1 - u)) is exact to float64's last bits on both ends, where log(u) would round u first.
        radius = torch.sqrt(-2.0 * torch.log1p(-((_WORD ^ a).double() + 0.5) * 2.0**-32))
        angle = (2.0 * math.pi) * ((b.double() + 0.5) * 2.0**-32)
        columns += [radius * torch.cos(angle), radius * torch.sin(angle)]
    out = torch.stack(columns, dim=-1).reshape(r, -1)[:, :n]
    return -out if antithetic and sample & 1 else out.contiguous()


def noise(
    r: int,
    n: int,
    seed: int,
    layer: int,
    sample: int,
    device: torch.device | str = "cpu",
    antithetic: bool = False,
) -> Tensor:
    """See :func:`tfb_ext.ops.noise`: (r, n) float32."""
    return noise_float64(r, n, seed, layer, sample, device, antithetic).float()


def shrink(
    x: Tensor,
    mean: Tensor,
    sigma: Tensor,
    samples: Tensor,
    seed: Tensor,
    layer: int,
    mode: str = "weight",
    antithetic: bool = False,
) -> Tensor:
    """See :func:`tfb_ext.ops.shrink`: the weights are materialised, (S, r, n), and multiplied at x's type.

    On the CPU and for float64 ``x`` the product is exact to that type, which makes it the tests' oracle.
    """
    if mode != "weight":
        raise ValueError(f'shrink: mode is "{mode}", expected "weight"')
    r, n = mean.shape
    groups = samples.shape[0]
    if groups == 0:
        return x.new_empty((0, r))
    make = noise_float64 if x.dtype == torch.float64 else noise
    key = int(seed.item()) % 2**64
    e = torch.stack([make(r, n, key, layer, int(k), x.device, antithetic) for k in samples.tolist()])
    weight = mean.to(e.dtype) + sigma.to(e.dtype)[:, None, None] * e
    z = torch.bmm(x.reshape(groups, -1, n), weight.to(x.dtype).transpose(1, 2))
    return z.reshape(-1, r)


def expand_(y: Tensor, z: Tensor, basis: Tensor, scaling: float) -> Tensor:
    """See :func:`tfb_ext.ops.expand_`; every step is rounded to y's type."""
    return y.add_(z @ basis.to(y.dtype).T, alpha=scaling)
