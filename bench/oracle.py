"""The operators in plain torch, from noise written out, in float64 and at the timed type: what a result must match."""

from __future__ import annotations

import torch
from torch import Tensor

from tfb_ext import ops


def sampled_weights(mean: Tensor, sigma: Tensor, samples: Tensor, seed: int, layer: int) -> Tensor:
    """``M + sigma_k E_k`` for every group, (S, r, n), in ``mean``'s type and on its device."""
    r, n = mean.shape
    noise = [ops.noise(r, n, seed, layer, int(k), mean.device) for k in samples.tolist()]
    return mean + sigma.to(mean.dtype)[:, None, None] * torch.stack(noise).to(mean.dtype)


def shrink(x: Tensor, weights: Tensor) -> Tensor:
    """``z`` (T, r) from ``x`` (T, n) and one weight (r, n) a group, by one batched product in ``x``'s type."""
    groups = x.view(weights.shape[0], -1, x.shape[-1])
    return torch.bmm(groups, weights.to(x.dtype).transpose(1, 2)).reshape(x.shape[0], -1)


def expand(y: Tensor, z: Tensor, basis: Tensor, scaling: float) -> Tensor:
    """``y + scaling z basis^T`` in ``y``'s type."""
    return y + scaling * (z @ basis.to(y.dtype).T)


def require_close(out: Tensor, low: Tensor, exact: Tensor) -> None:
    """``out`` may be at most twice as far from the float64 ``exact`` as plain torch's ``low``, and a unit of its type.

    Raises:
        AssertionError: it is further away, or not finite.
    """
    error = float((out.double() - exact).abs().max())
    plain = float((low.double() - exact).abs().max())
    tolerance = 2 * plain + torch.finfo(out.dtype).eps * float(exact.abs().max())
    if not error <= tolerance:
        raise AssertionError(f"largest error {error:.3e}, expected at most {tolerance:.3e} (plain torch: {plain:.3e})")
