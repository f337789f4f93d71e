"""Inner products of the gradients of layers' weights, from the layers' inputs and the gradients at their outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Numbers of a piece of the gradients of a layer's weights: 64 MiB in float32.
_PIECE = 2**24
# Of a layer: x (I, R, T, n), the inputs of an item's R rows, g (I, R, D, T, r), the gradients of the D outputs of each, and a factor of
# these. Products are in float32, their sums in float64.
Layer = tuple[Tensor, Tensor, float]


def jointly(layers: Sequence[Layer]) -> Tensor:
    """Inner products (I, C, C), C = R D, of the gradients ``sum_t g_t x_t^T``: one noise for all positions and rows of an item."""
    few, many = [], []
    for x, g, scale in layers:
        if g.shape[1] == 1 and g.shape[3] <= g.shape[2] * g.shape[4]:
            few.append((x[:, 0], g[:, 0], scale))
        else:
            many.append(scale**2 * _of_weights(x, g))
    return _summed(many + _of_positions(few, lambda x: x @ x.mT))


def by_token(layers: Sequence[Layer]) -> Tensor:
    """The same with noise of its own for every position of every row."""
    if layers[0][1].shape[1] == 1:
        few = [(x[:, 0], g[:, 0], scale) for x, g, scale in layers]
        return _summed(_of_positions(few, lambda x: x.square().sum(-1).diag_embed()))
    own = by_token([(x.flatten(0, 1)[:, None], g.flatten(0, 1)[:, None], scale) for x, g, scale in layers])
    return torch.diag_embed(own.view(layers[0][1].shape[0], -1))


def _of_positions(layers: Sequence[Layer], gram: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Through inner products of the positions' inputs, ``gram(x)`` (I, T, T); layers of one shape are stacked."""
    alike: dict[object, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for x, g, scale in layers:
        alike[g.shape, x.shape, g.device, scale].append((x, g))
    found = []
    for (*_, scale), those in alike.items():  # type: ignore[misc]
        own = {id(x): x for x, _ in those}  # layers may share their input
        if those[0][0].shape[1] == 1:
            inputs = torch.stack(list(own.values())).float()
            grams = dict(zip(own, inputs.square().sum(-1, keepdim=True), strict=True))
        else:
            grams = {name: gram(x.float()) for name, x in own.items()}
        g = torch.stack([g for _, g in those], 2).float()  # (I, D, L, T, r)
        weighted = torch.stack([grams[id(x)] for x, _ in those], 1)[:, None] @ g
        found.append(scale**2 * (g.flatten(2).double() @ weighted.flatten(2).double().mT))
    return found


def _of_weights(x: Tensor, g: Tensor) -> Tensor:
    """Through the gradients themselves, a piece of their columns at a time."""
    items, rows, outputs, _, rank = g.shape
    size = max(1, _PIECE // max(1, items * rows * outputs * rank))
    total = torch.zeros(items, rows * outputs, rows * outputs, dtype=torch.float64, device=g.device)
    transposed = g.float().mT
    for part in x.split(size, dim=-1):
        weights = (transposed @ part[:, :, None].float()).flatten(3).flatten(1, 2)
        total += (weights @ weights.mT).double()
    return total


def _summed(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
