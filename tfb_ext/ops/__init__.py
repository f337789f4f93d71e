"""The operators ``torch.ops.tfb_ext.*`` as Python functions; :mod:`tfb_ext.ops.reference` gives their meaning in plain torch.

Sizes: ``S`` samples, ``T`` tokens (rows), ``n`` in, ``m`` out, ``r`` rank. All of them run on the CPU and on CUDA, inside
``torch.compile(fullgraph=True)`` and, reading ``sigma``, ``samples`` and ``seed`` on the device, inside a CUDA graph. None
has a derivative: a backward pass through one raises a RuntimeError that says so.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

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
    "build_info",
    "expand",
    "expand_",
    "linear",
    "noise",
    "shrink",
    "shrink_group",
    "update_group",
    "use_portable_kernels",
]


def build_info() -> dict[str, bool | str]:
    """Facts about the compiled extension.

    ``cuda`` (bool: CUDA operators are in), ``cuda_arch_list``, ``compiler``, ``cpu_capability`` (``avx512``, ``avx2`` or
    ``baseline``: the kernels in use on this machine) and ``torch_version`` it was built against. With CUDA operators and a
    GPU also ``cuda_kernels`` (``hopper`` or ``portable``: those in use on the current device).
    """
    info: dict[str, bool | str] = dict(_C.build_info())
    if info["cuda"] and torch.cuda.is_available():
        info["cuda_kernels"] = "hopper" if _C.cuda_clusters_in_use() else "portable"
    return info


def use_portable_kernels(portable: bool) -> None:
    """Leave CUDA instructions newer than compute capability 8.0 unused (``True``) or use what the GPU has (``False``).

    For tests and timings; results differ in the last place. ``TFB_EXT_PORTABLE=1`` in the environment does the same from the
    start. Without the CUDA operators nothing changes.
    """
    if build_info()["cuda"]:
        _C.limit_machine(**({"cluster_blocks": 1} if portable else {}))


def _signed(seed: int) -> int:
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
    r: int,
    n: int,
    seed: int,
    layer: int,
    sample: int,
    device: torch.device | str = "cpu",
    antithetic: bool = False,
) -> Tensor:
    """The noise matrix ``E`` of one layer and sample: (r, n) float32, standard normal.

    ``E[i, j]`` is a pure function of ``(seed, layer, sample, i, j)``: Philox4x32-10 with the seed's low and high word as its
    key and the counter ``(j // 4, i, sample, layer)``, then Box-Muller on words (0, 1) and (2, 3). Devices agree within 1e-5.
    A kernel never needs this tensor; it is for export, reference and tests.

    Args:
        r: rows, 1 or more.
        n: columns, 1 or more.
        seed: 0 to 2**64 - 1.
        layer: unsigned 32-bit, the CRC-32 of the module's name in the base model.
        sample: 0 to 2**31 - 1.
        device: where the result lives.
        antithetic: sample 2k+1 is minus the noise of sample 2k.

    Raises:
        ValueError: an argument is out of its range.
    """
    return torch.ops.tfb_ext.noise.default(r, n, _signed(seed), layer, sample, torch.device(device), antithetic)


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
    """Project rows onto sampled down-projections, without a noise tensor.

    Semantics, with ``G = T / S`` and ``k = t // G``::

        z[t] = (mean + sigma[k] * noise(r, n, seed, layer, samples[k])) @ x[t]

    Args:
        x: (T, n) float32, bfloat16 or float16, T a multiple of S; rows may be strided (last stride 1).
        mean: (r, n) float32 or x's type, contiguous.
        sigma: (S,) float32, the standard deviation of each group's weights.
        samples: (S,) int32, each group's sample index, 0 or more.
        seed: (1,) int64, the seed's 64 bits in two's complement.
        layer: unsigned 32-bit, the CRC-32 of the module's name in the base model.
        mode: how the noise meets a group's rows, ``g = t % G`` being a row's number in its group. ``"weight"``: one weight
            matrix per sample, as above. ``"flipout"``: ``mean @ x[t] + sigma[k] * b[g] * (E @ (a[g] * x[t]))`` with random
            signs ``a`` (n) and ``b`` (r) for every row. ``"token"``: ``mean @ x[t] + sigma[k] * |x[t]| * e[g]`` with r
            normals ``e`` for every row: the distribution of ``"weight"`` for each row alone.
        antithetic: sample 2k+1 uses minus the noise of sample 2k (and the same signs).

    Returns:
        z, (T, r) of x's type, accumulated in float32. On one device a row's result is the same bits in any batch.

    Raises:
        ValueError: a shape, stride, device, layer or mode does not fit.
        TypeError: a tensor has another type than listed.
    """
    return torch.ops.tfb_ext.shrink.default(x, mean, sigma, samples, seed, layer, mode, antithetic)


def shrink_group(
    x: Tensor,
    means: Sequence[Tensor],
    sigma: Tensor,
    samples: Tensor,
    seed: Tensor,
    layers: Sequence[int],
    mode: str = "weight",
    antithetic: bool = False,
) -> list[Tensor]:
    """:func:`shrink` for layers that share ``x`` (a block's q, k and v; gate and up), which is read once for all of them.

    Args:
        means: one (r, n) for each layer, all float32 or all x's type; the ranks may differ.
        layers: one layer number for each.

    The other arguments and the errors are :func:`shrink`'s.

    Returns:
        One z (T, r) for each layer, bit for bit that of :func:`shrink`.
    """
    return torch.ops.tfb_ext.shrink_group.default(x, means, sigma, samples, seed, layers, mode, antithetic)


def expand_(y: Tensor, z: Tensor, basis: Tensor, scaling: float) -> Tensor:
    """Add the up-projection in place: ``y += scaling * z @ basis.T``; returns ``y``.

    Args:
        y: (T, m) float32, bfloat16 or float16; rows may be strided (last stride 1) but not overlap.
        z: (T, r) of y's type; rows may be strided. It may share no element with y.
        basis: (m, r) float32 or y's type, contiguous. It may share no element with y.
        scaling: the adapter's scaling.

    The sum over r and the addition are made in float32 and rounded once to y's type.

    Raises:
        ValueError: a shape, stride or device does not fit, or y shares memory with what is read.
        TypeError: a tensor has another type than listed.
    """
    torch.ops.tfb_ext.expand_.default(y, z, basis, scaling)
    return y


def expand(z: Tensor, basis: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """The up-projection as a new tensor: ``bias + scaling * z @ basis.T``, (T, m) of z's type.

    Args:
        z: (T, r) float32, bfloat16 or float16; rows may be strided.
        basis: (m, r) float32 or z's type, contiguous.
        scaling: the adapter's scaling.
        bias: (m,) of z's type.

    The sum is made in float32 and rounded once.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a tensor has another type than listed.
    """
    return torch.ops.tfb_ext.expand.default(z, basis, scaling, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, basis: Tensor, scaling: float) -> Tensor:
    """A linear layer with its update: ``x @ weight.T + bias + scaling * z @ basis.T``.

    On CUDA the update is written first and the library's product accumulates onto it, which costs one write of y where
    :func:`expand_` after the product reads and writes it.

    Args:
        x: (..., n) float32, bfloat16 or float16.
        weight: (m, n) of x's type.
        bias: (m,) of x's type, or ``None``.
        z: (T, r) of x's type, T the rows of x.
        basis: (m, r) float32 or x's type, contiguous.
        scaling: the adapter's scaling.

    Returns:
        (..., m) of x's type.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a tensor has another type than listed.
    """
    return torch.ops.tfb_ext.linear.default(x, weight, bias, z, basis, scaling)


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
) -> list[Tensor]:
    """:func:`shrink_group` and :func:`expand` of every layer. For few rows, as in decoding, one CUDA launch does it all.

    That launch serves up to 128 rows of half precision, up to 16 of each sample. It keeps z in float32, so its results may
    differ from the two operators' in the last place; a row's bits depend on neither the rows nor the samples beside it.

    Args:
        bases: one (m, r) for each layer, all float32 or all x's type, contiguous.
        biases: one (m,) of x's type or ``None`` for each layer.
        scalings: one for each layer.

    The other arguments and the errors are those of :func:`shrink_group` and :func:`expand`.

    Returns:
        One (T, m) of x's type for each layer: ``bias + scaling * z @ basis.T``.
    """
    return torch.ops.tfb_ext.update_group.default(
        x, means, bases, biases, scalings, sigma, samples, seed, layers, mode, antithetic
    )


# The fakes make the kernels' own checks (csrc/check.h), on symbolic sizes too.


@torch.library.register_fake("tfb_ext::noise")
def _(r: int, n: int, seed: int, layer: int, sample: int, device: torch.device, antithetic: bool = False) -> Tensor:
    _C.check_noise(r, n, layer, sample)
    return torch.empty((r, n), dtype=torch.float32, device=device)


@torch.library.register_fake("tfb_ext::shrink")
def _(
    x: Tensor,
    mean: Tensor,
    sigma: Tensor,
    samples: Tensor,
    seed: Tensor,
    layer: int,
    mode: str = "weight",
    antithetic: bool = False,
) -> Tensor:
    _C.check_shrink(x, mean, sigma, samples, seed, layer, mode)
    return x.new_empty((x.shape[0], mean.shape[0]))


@torch.library.register_fake("tfb_ext::shrink_group")
def _(
    x: Tensor,
    means: Sequence[Tensor],
    sigma: Tensor,
    samples: Tensor,
    seed: Tensor,
    layers: Sequence[int],
    mode: str = "weight",
    antithetic: bool = False,
) -> list[Tensor]:
    _C.check_shrink_group(x, means, sigma, samples, seed, layers, mode)
    return [x.new_empty((x.shape[0], mean.shape[0])) for mean in means]


@torch.library.register_fake("tfb_ext::expand_")
def _(y: Tensor, z: Tensor, basis: Tensor, scaling: float) -> None:
    _C.check_expand_(y, z, basis)


@torch.library.register_fake("tfb_ext::expand")
def _(z: Tensor, basis: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    _C.check_expand(z, basis, bias)
    return z.new_empty((z.shape[0], basis.shape[0]))


@torch.library.register_fake("tfb_ext::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, basis: Tensor, scaling: float) -> Tensor:
    _C.check_linear(x, weight, bias, z, basis)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("tfb_ext::update_group")
def _(
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
) -> list[Tensor]:
    _C.check_update_group(x, means, bases, biases, scalings, sigma, samples, seed, layers, mode)
    return [x.new_empty((x.shape[0], basis.shape[0])) for basis in bases]
