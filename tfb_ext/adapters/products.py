"""The outputs of layers that read one input: their updates first, and the base products onto them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from .samples import SampleBatch

if TYPE_CHECKING:
    from .layer import SampledUpdate


def outputs(
    together: Sequence[SampledUpdate], x: Tensor, batch: SampleBatch, lead: int = 0, each: int = 0
) -> list[Tensor]:
    """Outputs (..., m) of layers whose base :func:`~.base.accumulates`, of ``x`` (..., n), with rows as in :func:`tfb_ext.ops.update_group`."""
    quantised = any(u.kind is not None for u in together)
    x = x if x.stride(-1) == 1 else x.contiguous()
    found = ops.update_group(
        x,
        [u.module._buffers[u.buffers[1]] for u in together],
        [u.basis_in(x.dtype) if quantised else u.module._buffers[u.buffers[0]] for u in together],
        [_bias(u, x.dtype) for u in together],
        [u.module.scaling[u.adapter] for u in together],
        *batch.tensors(x.device),
        [u.layer for u in together],
        batch.mode,
        batch.antithetic,
        lead,
        each,
        () if quantised else [weight_of(u, x.dtype) for u in together],
    )
    if quantised:  # one dense weight at a time
        rows = x.reshape(-1, x.shape[-1])
        for u, y in zip(together, found, strict=True):
            y.view(len(rows), -1).addmm_(rows, weight_of(u, x.dtype).T)
    return found


def _bias(update: SampledUpdate, dtype: torch.dtype) -> Any:
    base = update.module._modules["base_layer"]
    if update.kind is None:
        return base._parameters["bias"]
    return None if base.bias is None else base.bias.to(dtype)


def weight_of(update: SampledUpdate, dtype: torch.dtype) -> Any:
    """The base layer's weight (m, n), of a quantised one a dense copy in this type."""
    base, kind = update.module._modules["base_layer"], update.kind
    return base._parameters["weight"] if kind is None else kind.dense(base, dtype)  # type: ignore[misc]
