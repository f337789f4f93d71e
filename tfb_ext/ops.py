"""The operators ``torch.ops.tfb_ext.*`` as Python functions; :mod:`tfb_ext.reference` gives their meaning in plain torch.

Sizes: ``S`` samples, ``T`` tokens (rows), ``n`` in, ``m`` out, ``r`` rank. All of them run on the CPU and on CUDA, inside
``torch.compile(fullgraph=True)`` and, reading ``sigma``, ``samples`` and ``seed`` on the device, inside a CUDA graph. None
has a derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"the compiled part of tfb_ext cannot be loaded ({error}); build it in the repository with "
        "`pip install --no-build-isolation -e .`"
    ) from error

__all__ = ["build_info", "expand_", "noise", "shrink"]


def build_info() -> dict[str, bool | str]:
    """Facts about the compiled extension.

    ``cuda`` (bool: CUDA operators are in), ``cuda_arch_list``, ``compiler``, ``cpu_capability`` (``avx512``, ``avx2`` or
    ``baseline``: the kernels in use on this machine) and ``torch_version`` it was built against.
    """
    return _C.build_info()


def _signed(seed: int) -> int:
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
    return torch.ops.tfb_ext.noise(r, n, _signed(seed), layer, sample, torch.device(device), antithetic)


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
        mode: ``"weight"``, one weight matrix per sample.
        antithetic: sample 2k+1 uses minus the noise of sample 2k.

    Returns:
        z, (T, r) of x's type, accumulated in float32. On one device a row's result is the same bits in any batch.

    Raises:
        ValueError: a shape, stride, device, layer or mode does not fit.
        TypeError: a tensor has another type than listed.
    """
    return torch.ops.tfb_ext.shrink(x, mean, sigma, samples, seed, layer, mode, antithetic)


def expand_(y: Tensor, z: Tensor, basis: Tensor, scaling: float) -> Tensor:
    """Add the up-projection in place: ``y += scaling * z @ basis.T``; returns ``y``.

    Args:
        y: (T, m) float32, bfloat16 or float16; rows may be strided (last stride 1) but not overlap.
        z: (T, r) of y's type; rows may be strided.
        basis: (m, r) float32 or y's type, contiguous.
        scaling: the adapter's scaling.

    The sum over r and the addition are made in float32 and rounded once to y's type.

    Raises:
        ValueError: a shape, stride or device does not fit.
        TypeError: a tensor has another type than listed.
    """
    torch.ops.tfb_ext.expand_(y, z, basis, scaling)
    return y


@torch.library.register_fake("tfb_ext::noise")
def _(r: int, n: int, seed: int, layer: int, sample: int, device: torch.device, antithetic: bool = False) -> Tensor:
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
    return x.new_empty((x.shape[0], mean.shape[0]))


@torch.library.register_fake("tfb_ext::expand_")
def _(y: Tensor, z: Tensor, basis: Tensor, scaling: float) -> None:
    return None
