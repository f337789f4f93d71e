"""What every operator means, in plain torch: the tests' oracle, and a fallback for who asks for it by name.

Same signatures as :mod:`tfb_ext.ops`. The noise (csrc/noise.h) is made whole, in float64, and rounded to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "attend_",
    "expand",
    "expand_",
    "input_signs",
    "noise",
    "noise_float64",
    "philox",
    "rank_signs",
    "shrink",
    "shrink_group",
    "token_noise",
    "update_group",
]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_INPUT_SIGN_KEY, _RANK_SIGN_KEY, _TOKEN_KEY = 0x6A09E667, 0x3C6EF372, 0xA54FF53A


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


def _words(rows: int, blocks: int, seed: int, key: int, layer: int, sample: int, device: Any) -> tuple[Tensor, ...]:
    """The four output words of the counters (block, row, sample, layer), each (rows, blocks)."""
    row, block = torch.arange(rows, device=device)[:, None], torch.arange(blocks, device=device)
    sample_word, layer_word = torch.tensor(sample, device=device), torch.tensor(layer, device=device)
    return philox((block, row, sample_word, layer_word), (seed & _WORD, (seed >> 32) & _WORD ^ key))


def _normals(rows: int, count: int, seed: int, key: int, layer: int, sample: int, device: Any) -> Tensor:
    words = _words(rows, (count + 3) // 4, seed, key, layer, sample, device)
    columns = []
    for a, b in ((words[0], words[1]), (words[2], words[3])):
        # log1p(-(1 - u)) is exact to float64's last bits on both ends, where log(u) would round u first.
        radius = torch.sqrt(-2.0 * torch.log1p(-((_WORD ^ a).double() + 0.5) * 2.0**-32))
        angle = (2.0 * math.pi) * ((b.double() + 0.5) * 2.0**-32)
        columns += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(columns, dim=-1).flatten(1)[:, :count].contiguous()


def _signs(rows: int, count: int, seed: int, key: int, layer: int, sample: int, device: Any) -> Tensor:
    words = torch.stack(_words(rows, (count + 127) // 128, seed, key, layer, sample, device), dim=-1)
    bits = words[..., None] >> torch.arange(32, device=device) & 1
    return (1 - 2 * bits).flatten(1)[:, :count].contiguous()


def input_signs(tokens: int, n: int, seed: int, layer: int, sample: int, device: torch.device | str = "cpu") -> Tensor:
    """flipout's signs of the inputs, (tokens, n) int64 of plus and minus one; ``tokens`` numbers the rows of a group."""
    return _signs(tokens, n, seed, _INPUT_SIGN_KEY, layer, sample, device)


def rank_signs(tokens: int, r: int, seed: int, layer: int, sample: int, device: torch.device | str = "cpu") -> Tensor:
    """flipout's signs of the ranks, (tokens, r) int64 of plus and minus one."""
    return _signs(tokens, r, seed, _RANK_SIGN_KEY, layer, sample, device)


def token_noise(tokens: int, r: int, seed: int, layer: int, sample: int, device: torch.device | str = "cpu") -> Tensor:
    """token mode's standard normals, (tokens, r) float64."""
    return _normals(tokens, r, seed, _TOKEN_KEY, layer, sample, device)


def noise_float64(
    r: int, n: int, seed: int, layer: int, sample: int, device: torch.device | str = "cpu", antithetic: bool = False
) -> Tensor:
    """:func:`noise` before it is rounded to float32."""
    out = _normals(r, n, seed, 0, layer, sample & ~1 if antithetic else sample, device)
    return -out if antithetic and sample & 1 else out


def noise(
    r: int, n: int, seed: int, layer: int, sample: int, device: torch.device | str = "cpu", antithetic: bool = False
) -> Tensor:
    """See :func:`tfb_ext.ops.noise`."""
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
    """See :func:`tfb_ext.ops.shrink`; the weights (S, r, n) are written out and multiplied at x's type, float64 included."""
    if mode not in ("weight", "flipout", "token"):
        raise ValueError(f'shrink: mode is "{mode}", expected "weight", "flipout" or "token"')
    r, n = mean.shape
    groups = samples.shape[0]
    if groups == 0:
        return x.new_empty((0, r))
    make = noise_float64 if x.dtype == torch.float64 else noise
    key = int(seed.item()) % 2**64
    numbers = [int(k) for k in samples.tolist()]
    shared = [k & ~1 if antithetic else k for k in numbers]  # a pair shares all draws but the sign of its noise
    sign = [-1.0 if antithetic and k & 1 else 1.0 for k in numbers]
    tokens = x.shape[0] // groups
    rows = x.reshape(groups, tokens, n)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = (sigma.to(wide) * torch.tensor(sign, dtype=wide, device=x.device))[:, None, None]
    if mode == "weight":
        weight = mean.to(wide) + scale * torch.stack([make(r, n, key, layer, k, x.device) for k in shared])
        return torch.bmm(rows, weight.to(x.dtype).transpose(1, 2)).reshape(x.shape[0], r)
    if mode == "token":
        e = torch.stack([token_noise(tokens, r, key, layer, k, x.device) for k in shared]).to(wide)
        change = rows.to(wide).norm(dim=-1, keepdim=True) * e
    else:
        e = torch.stack([make(r, n, key, layer, k, x.device) for k in shared]).to(x.dtype)
        s = torch.stack([input_signs(tokens, n, key, layer, k, x.device) for k in shared]).to(x.dtype)
        t = torch.stack([rank_signs(tokens, r, key, layer, k, x.device) for k in shared]).to(wide)
        change = t * torch.bmm(rows * s, e.transpose(1, 2)).to(wide)
    z = (rows @ mean.to(x.dtype).T).to(wide) + scale * change
    return z.to(x.dtype).reshape(x.shape[0], r)


def shrink_group(
    x: Tensor,
    means: Sequence[Tensor],
    sigma: Tensor,
    samples: Tensor,
    seed: Tensor,
    layers: Sequence[int],
    mode: str = "weight",
    antithetic: bool = False,
    lead: int = 0,
    each: int = 0,
) -> list[Tensor]:
    """See :func:`tfb_ext.ops.shrink_group`: one :func:`shrink` after the other, of the items' rows sorted by sample."""
    pairs = list(zip(means, layers, strict=True))
    if each == 0:
        return [shrink(x, mean, sigma, samples, seed, layer, mode, antithetic) for mean, layer in pairs]
    size, pitch = len(samples), lead + len(samples) * each
    items = x.reshape(len(x) // pitch, pitch, x.shape[1])
    own = items[:, lead:].unflatten(1, (size, each)).transpose(0, 1).flatten(0, 2)
    out = []
    for mean, layer in pairs:
        z = shrink(own, mean, sigma, samples, seed, layer, mode, antithetic)
        sampled = z.view(size, len(items), each, len(mean)).transpose(0, 1).flatten(1, 2)
        out.append(torch.cat([items[:, :lead] @ mean.to(x.dtype).T, sampled], dim=1).flatten(0, 1))
    return out


def expand_(y: Tensor, z: Tensor, basis: Tensor, scaling: float) -> Tensor:
    """See :func:`tfb_ext.ops.expand_`; every step is rounded to y's type."""
    return y.add_(z @ basis.to(y.dtype).T, alpha=scaling)


def expand(z: Tensor, basis: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """See :func:`tfb_ext.ops.expand`."""
    y = scaling * (z @ basis.to(z.dtype).T)
    return y if bias is None else y + bias


def attend_(out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """See :func:`tfb_ext.ops.attend_`; sums and softmax in float64."""
    groups = query.shape[1] // key.shape[1]
    first = query.shape[2] - mask.shape[2] // groups
    together = query.double()[:, :, first:].unflatten(1, (key.shape[1], groups)).flatten(2, 3)
    found = (scale * together @ key.double().mT + mask.double()).softmax(-1) @ value.double()
    out[:, first:] = found.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2)
    return out


def update_group(
    x: Tensor,
    means: Sequence[Tensor],
    bases: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    *draws: Any,
    weights: Sequence[Tensor] = (),
    **options: Any,
) -> list[Tensor]:
    """See :func:`tfb_ext.ops.update_group`; ``z`` is rounded to x's type on its way."""
    z = shrink_group(x.flatten(0, -2), means, *draws, **options)
    out = [expand(*part) for part in zip(z, bases, scalings, biases, strict=True)]
    out = [y.view(*x.shape[:-1], -1) for y in out]
    return [y + x @ weight.T for y, weight in zip(out, weights, strict=True)] if weights else out
