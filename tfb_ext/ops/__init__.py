"""The operators ``torch.ops.tfb_ext.*`` as Python functions; :mod:`tfb_ext.ops.reference` gives their meaning in plain torch.

Sizes: ``S`` samples, ``T`` tokens (rows), ``n`` in, ``m`` out, ``r`` rank. All of them run on the CPU and on CUDA, inside
``torch.compile(fullgraph=True)`` and, reading ``sigma``, ``samples`` and ``seed`` on the device, inside a CUDA graph. Sums
are made in float32 and rounded once to the output's type. None has a derivative: a backward pass raises a RuntimeError.
All raise ValueError where a shape, stride, device or value does not fit, and TypeError where a type does not.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from .. import _C
except ImportError as error:
    raise ImportError(
        f"the compiled part of tfb_ext cannot be loaded ({error}); build it in the repository with "
        "`pip install --no-build-isolation -e .`"
    ) from error

__all__ = [
    "NOISE_ELEMENTS",
    "TOKEN_SEED_STEP",
    "attend_",
    "build_info",
    "expand",
    "expand_",
    "noise",
    "shrink",
    "shrink_group",
    "update_group",
    "use_portable_kernels",
]


# The noise is defined in csrc/noise.h, and by two numbers that only Python needs: others would make other samples.

# Most normals of the full-rank family under one key of the generator: 64 MiB of float32.
NOISE_ELEMENTS = 2**24
# Mode "token" numbers the tokens of one call; a call that goes on after k tokens has the seed + k steps, modulo 2**64. Odd,
# so that no two numbers of tokens share a seed.
TOKEN_SEED_STEP = 0x9E3779B97F4A7C15


def build_info() -> dict[str, bool | str]:
    """Facts about the compiled extension.

    ``cuda`` (bool: it has CUDA operators), ``cuda_arch_list``, ``compiler``, ``torch_version`` (built against),
    ``cpu_capability`` (the kernels in use here: ``avx512``, ``avx2`` or ``baseline``) and, with CUDA operators and a GPU,
    ``cuda_kernels`` (in use on the current device: ``hopper`` or ``portable``).
    """
    info: dict[str, bool | str] = dict(_C.build_info())
    if info["cuda"] and torch.cuda.is_available():
        info["cuda_kernels"] = "hopper" if _C.cuda_clusters_in_use() else "portable"
    return info


def use_portable_kernels(portable: bool) -> None:
    """Leave CUDA instructions newer than compute capability 8.0 unused (``True``) or use what the GPU has (``False``).

    For tests and timings; results differ in the last place. ``TFB_EXT_PORTABLE=1`` in the environment is ``True`` from the start.
    """
    if build_info()["cuda"]:
        _C.limit_machine(**({"cluster_blocks": 1} if portable else {}))


def as_int64(seed: int) -> int:
    """A 64-bit unsigned seed as the signed integer that holds the same bits."""
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(
            f"noise: seed is {seed!r}, expected an integer from 0 to 2**64 - 1. Fix: pass int(seed)"
        ) from None
    if not 0 <= seed < 2**64:
        raise ValueError(f"noise: seed is {seed}, expected 0 to 2**64 - 1")
    return seed - 2**64 if seed >= 2**63 else seed


def noise(
    r: int, n: int, seed: int, layer: int, sample: int, device: torch.device | str = "cpu", antithetic: bool = False
) -> Tensor:
    """The noise matrix ``E`` of one layer and sample: (r, n) float32, standard normal.

    ``E[i, j]`` is a pure function of ``(seed, layer, sample, i, j)``: Philox4x32-10 with the seed's low and high word as its
    key and the counter ``(j // 4, i, sample, layer)``, then Box-Muller on words (0, 1) and (2, 3). Devices agree within 1e-5.
    A kernel never needs this tensor; it is for export, reference and tests.

    Args:
        r, n: rows and columns, 1 or more.
        seed: 0 to 2**64 - 1.
        layer: unsigned 32-bit, the CRC-32 of the module's name in the base model.
        sample: 0 to 2**31 - 1.
        device: where the result lives.
        antithetic: sample 2k+1 is minus the noise of sample 2k.
    """
    return torch.ops.tfb_ext.noise.default(r, n, as_int64(seed), layer, sample, torch.device(device), antithetic)


def shrink(
    x: Tensor,
    mean: Tensor,
    sigma: Tensor,
    samples: Tensor,
    seed: Tensor,
    layer: int,
    mode: str = "weight",
    antithetic: bool = False,
    lead: int = 0,
    each: int = 0,
) -> Tensor:
    """:func:`shrink_group` of one layer: its z (T, r)."""
    return shrink_group(x, [mean], sigma, samples, seed, [layer], mode, antithetic, lead, each)[0]


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
    """Project rows onto the sampled down-projections of layers that share ``x``, which is read once, without a noise tensor.

    Semantics for each layer, with ``G = T / S`` and ``k = t // G``::

        z[t] = (mean + sigma[k] * noise(r, n, seed, layer, samples[k])) @ x[t]

    With ``each`` the rows are items, one after the other: ``lead`` rows of the mean (``z[t] = mean @ x[t]``), then ``each`` rows
    of every sample in turn. Row ``j`` of sample ``k`` in item ``i`` is ``t = i * (lead + S * each) + lead + k * each + j``.

    Args:
        x: (T, n) float32, bfloat16 or float16, T a multiple of S, or of ``lead + S * each``; rows may be strided (last stride 1).
        means: one (r, n) for each layer, all float32 or all x's type, contiguous; the ranks may differ.
        sigma: (S,) float32, the standard deviation of each group's weights.
        samples: (S,) int32, each group's sample index, 0 or more.
        seed: (1,) int64, the seed's 64 bits in two's complement.
        layers: one number for each layer: unsigned 32-bit, the CRC-32 of the module's name in the base model.
        mode: how the noise meets a group's rows, ``g = t % G`` (or ``i * each + j``) being a row's number in its group.
            ``"weight"``: one weight matrix per sample, as above. ``"flipout"``: ``mean @ x[t] + sigma[k] * b[g] * (E @ (a[g] *
            x[t]))`` with random signs ``a`` (n) and ``b`` (r) for every row. ``"token"``: ``mean @ x[t] + sigma[k] * |x[t]| *
            e[g]`` with r normals ``e`` for every row: the distribution of ``"weight"`` for each row alone.
        antithetic: sample 2k+1 uses minus the noise of sample 2k (and the same signs).
        lead: rows of the mean that begin an item.
        each: rows of a sample in an item; 0: x is one group of rows after the other.

    Returns:
        One z (T, r) of x's type for each layer. On one device a row's result is the same bits in any batch and group.
    """
    return torch.ops.tfb_ext.shrink_group.default(x, means, sigma, samples, seed, layers, mode, antithetic, lead, each)


def expand_(y: Tensor, z: Tensor, basis: Tensor, scaling: float) -> Tensor:
    """Add the up-projection in place: ``y += scaling * z @ basis.T``; returns ``y``.

    Args:
        y: (T, m) float32, bfloat16 or float16; rows may be strided (last stride 1) but not overlap.
        z: (T, r) of y's type; rows may be strided. It may share no element with y.
        basis: (m, r) float32 or y's type, contiguous. It may share no element with y.
        scaling: the adapter's scaling.
    """
    torch.ops.tfb_ext.expand_.default(y, z, basis, scaling)
    return y


def expand(z: Tensor, basis: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """The up-projection as a new tensor: ``bias + scaling * z @ basis.T``, (T, m) of z's type.

    Args:
        z, basis, scaling: as in :func:`expand_`.
        bias: (m,) of z's type.
    """
    return torch.ops.tfb_ext.expand.default(z, basis, scaling, bias)


def update_group(
    x: Tensor,
    means: Sequence[Tensor],
    bases: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    sigma: Tensor,
    samples: Tensor,
    seed: Tensor,
    layers: Sequence[int],
    mode: str = "weight",
    antithetic: bool = False,
    lead: int = 0,
    each: int = 0,
    weights: Sequence[Tensor] = (),
) -> list[Tensor]:
    """:func:`shrink_group` and :func:`expand` of every layer: ``bias + scaling * z @ basis.T``, (..., m) of x's type each.

    With ``weights`` a layer's product ``x @ weight.T`` is added onto it, which makes the output of a linear layer with its adapter.

    On CUDA up to 128 rows of half precision, up to 16 of each sample and none of the mean, as in decoding, take one launch.
    It keeps z in float32, so its results may differ from the two operators' in the last place; a row's bits depend on no other
    row or sample.

    Args:
        x: (..., n), whose T rows are as in :func:`shrink_group`.
        means, sigma, samples, seed, layers, mode, antithetic, lead, each: as there.
        bases: one (m, r) for each layer, all float32 or all x's type, contiguous.
        biases: one (m,) of x's type or ``None`` for each layer.
        scalings: one for each layer.
        weights: one (m, n) of x's type for each layer, or none.
    """
    given = x, means, bases, biases, scalings, sigma, samples, seed, layers, mode, antithetic, lead, each
    if torch.compiler.is_compiling():
        return torch.ops.tfb_ext.update_group.default(*given, weights=weights)
    return _C.update_group(*given, weights)


def attend_(out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of the last Q tokens to all columns, written to ``out``: ``softmax(scale * query @ key.T + mask) @ value``; returns ``out``.

    The mask has as many tokens as are asked for; what ``out`` holds for those before them stays. The H / K heads that share keys stand side by side, so that no key is copied. On CUDA of compute capability 9.0 up to 256 rows of
    half precision and width 64 or 128 take a kernel that splits the columns; all else takes torch's attention.

    Args:
        out: (B, N, H, D') of query's type, N at least Q.
        query: (B, H, N, D) float32, bfloat16 or float16.
        key, value: (B, K, C, D) and (B, K, C, D'), H a multiple of K.
        mask: (B, 1, H / K * Q, C) of query's type, added to the scores: its rows are those of a key head's first head, then the next's.
        scale: of the scores.
    """
    (torch.ops.tfb_ext.attend_.default if torch.compiler.is_compiling() else _C.attend_)(
        out, query, key, value, mask, scale
    )
    return out


# The fakes make the kernels' own checks (csrc/check.h), on symbolic sizes too.


@torch.library.register_fake("tfb_ext::noise")
def _(r: int, n: int, seed: int, layer: int, sample: int, device: torch.device, antithetic: bool = False) -> Tensor:
    _C.check_noise(r, n, layer, sample)
    return torch.empty((r, n), dtype=torch.float32, device=device)


@torch.library.register_fake("tfb_ext::shrink_group")
def _(x: Tensor, means: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    _C.check_shrink_group(x, means, *rest)
    return [x.new_empty((x.shape[0], mean.shape[0])) for mean in means]


@torch.library.register_fake("tfb_ext::expand_")
def _(y: Tensor, z: Tensor, basis: Tensor, scaling: float) -> None:
    _C.check_expand_(y, z, basis)


@torch.library.register_fake("tfb_ext::expand")
def _(z: Tensor, basis: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    _C.check_expand(z, basis, bias)
    return z.new_empty((z.shape[0], basis.shape[0]))


@torch.library.register_fake("tfb_ext::attend_")
def _(out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> None:
    _C.check_attend_(out, query, key, value, mask)


@torch.library.register_fake("tfb_ext::update_group")
def _(
    x: Tensor, means: Sequence[Tensor], bases: Sequence[Tensor], *rest: Any, weights: Sequence[Tensor]
) -> list[Tensor]:
    _C.check_update_group(x, means, bases, *rest, weights=weights)
    return [x.new_empty((*x.shape[:-1], basis.shape[0])) for basis in bases]
