"""Averages over Gaussian logits by fixed points: E[softmax(logits)] and the average entropy of softmax(logits)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from .checks import check_count

POINTS = 4096
# Numbers of a piece of items' logits at all points: 32 MiB.
PIECE = 2**22
# The trapezoidal rule goes as far as the normal density does in float64.
_REACH = 8.5
_MOST_NODES = 2**15


def softmax_moments(
    mean: Tensor, factor: Tensor, scale: Tensor, points: int = POINTS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Of ``p = softmax(mean + scale * factor @ z)``, z standard normal: (N, C) ``E[p]`` and (N,) ``E[entropy(p)]`` in nats.

    With one direction it is the trapezoidal rule on the normal density, which for an integrand that is analytic in a strip
    converges geometrically: right to 1e-12 while the logits' differences have a standard deviation below 1000. With more it is
    quasi-Monte-Carlo: scrambled Sobol points taken to normals.

    Args:
        mean: (N, C) float64.
        factor: (C, k) for all items or (N, C, k); directions that softmax sees, the largest first.
        scale: (N,).
        points: Sobol points; powers of two are balanced.
        seed: of their scrambling; the same seed gives the same points.

    Raises:
        ValueError: points is not a count of at least 1.
    """
    points = check_count("points", points)
    directions = factor.shape[-1]
    if directions == 0 or not len(mean):
        z, weights = mean.new_zeros(1, directions), mean.new_ones(1)
    elif directions == 1:
        z, weights = _trapezoid(float(((factor.amax(-2) - factor.amin(-2)).amax(-1) * scale).max()))
    else:
        z, weights = _sobol(points, directions, seed)
    z, weights = z.to(mean.device), weights.to(mean.device)
    size = max(1, PIECE // (len(z) * mean.shape[1]))
    averages, entropies = [], []
    for start in range(0, len(mean), size):
        part = slice(start, start + size)
        own = factor[part] if factor.dim() == 3 else factor
        p = torch.softmax(mean[part, None] + scale[part, None, None] * (z @ own.mT), dim=-1)
        averages.append(torch.einsum("p,npc->nc", weights, p))
        entropies.append(torch.special.entr(p).sum(dim=-1) @ weights)
    return torch.cat([mean[:0], *averages]), torch.cat([scale[:0], *entropies])


def _trapezoid(spread: float) -> tuple[Tensor, Tensor]:
    """Nodes (P, 1) and weights (P,) of E over one standard normal, for softmax of logits that differ by ``spread`` a unit.

    Its poles lie pi / spread or more from the real line, so a step h costs exp(-2 pi^2 / (h spread)): h spread = 1/2.
    """
    count = min(_MOST_NODES, math.ceil(2 * _REACH * 2 * max(1.0, spread))) | 1
    z = torch.linspace(-_REACH, _REACH, count, dtype=torch.float64)
    weights = torch.exp(-z.square() / 2)
    return z[:, None], weights / weights.sum()


@lru_cache(8)
def _sobol(points: int, dimensions: int, seed: int) -> tuple[Tensor, Tensor]:
    uniform = SobolEngine(dimensions, scramble=True, seed=seed).draw(points, dtype=torch.float64)
    smallest = torch.finfo(torch.float64).eps
    z = torch.special.ndtri(uniform.clamp(smallest, 1 - smallest))
    return z, torch.full((points,), 1 / points, dtype=torch.float64)
