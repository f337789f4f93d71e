"""Inner products of the gradients of a layer's weights, from its inputs and the gradients at its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of a piece of the gradients of a layer's weights: 64 MiB in float32.
_PIECE = 2**24


def jointly(x: Tensor, g: Tensor) -> Tensor:
    """Inner products (I, C, C) of the gradients ``sum_t g_t x_t^T`` with one noise for all positions and rows of an item.

    Args:
        x: (I, R, T, n), of an item's R rows.
        g: (I, R, D, T, r), of the D outputs of each; C = R D.
    """
    items, rows, outputs, positions, rank = g.shape
    if rows == 1 and positions <= outputs * rank:
        x, g = x[:, 0], g[:, 0]
        weighted = (x @ x.mT)[:, None] @ g
        return (g.flatten(2) @ weighted.flatten(2).mT).double()
    size = max(1, _PIECE // max(1, items * rows * outputs * rank))
    total = torch.zeros(items, rows * outputs, rows * outputs, dtype=torch.float64, device=g.device)
    for part in x.split(size, dim=-1):
        weights = (g.mT @ part[:, :, None]).flatten(3).flatten(1, 2)
        total += (weights @ weights.mT).double()
    return total


def by_token(x: Tensor, g: Tensor) -> Tensor:
    """The same with noise of its own for every position of every row."""
    weighted = (g * torch.linalg.vector_norm(x, dim=-1)[:, :, None, :, None]).flatten(3)
    own = (weighted @ weighted.mT).double()
    return own[:, 0] if own.shape[1] == 1 else torch.diag_embed(own[:, :, 0, 0])
