"""What the paper proves, in closed form: KL to a prior, the KL's weight that a found sigma implies, and the form (B', A', Omega).

A random layer's weight is ``W0 + s U (M + sigma E)`` (:mod:`tfb_ext.posterior`), the prior ``s U (sigma_p E)``: for the family
``"low-rank"`` the low-rank isotropic prior of Shi et al. (NeurIPS 2025, Theorem 4.2) and BLoB. ``W0``, ``s`` and ``U`` cancel, and
the KL is that of ``N(M, sigma^2)`` to ``N(0, sigma_p^2)`` over ``D = rank n`` coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters.adapter import BayesianAdapter, Depth
from ..checks import check_number
from ..posterior.canonical import LayerPosterior

if TYPE_CHECKING:
    from ..search import SigmaSearch

PRIOR = "a finite number above 0, the prior's standard deviation"


@dataclass(frozen=True)
class KLDivergence:
    """KL of a posterior to its prior, in nats.

    Attributes:
        sigma, prior_sigma: scales of the posterior and the prior, in the same units.
        layers: KL of each random layer, by its name.
        dimensions: coordinates of all random layers together, the ``D`` of the formulas.
    """

    sigma: float
    prior_sigma: float
    layers: dict[str, float]
    dimensions: int

    @property
    def total(self) -> float:
        return math.fsum(self.layers.values())


def kl_divergence(
    adapter: BayesianAdapter, prior_sigma: float, sigma: float | None = None, depth: Depth | None = None
) -> KLDivergence:
    """Closed-form KL of the adapter's posterior to a Gaussian prior around zero, over its random layers, in float64.

    For a layer with D coordinates::

        KL = D (ln(prior_sigma / sigma) - 1/2 + sigma^2 / (2 prior_sigma^2)) + |M|_F^2 / (2 prior_sigma^2)

    ``D = rank n`` and ``M = U^T B A`` for the family ``"low-rank"``, ``D = r n`` and ``A`` for ``"constant"`` (the prior is on
    the entries of A then), ``D = m n`` and ``B A`` for ``"full-rank"``. LoRA's scaling does not enter.

    Args:
        prior_sigma: standard deviation of the prior, in sigma's units.
        sigma, depth: posterior scale and random blocks instead of the adapter's own; layers below do not count.

    Raises:
        ValueError: no sigma, a scale that is not a finite number above 0, or a bad depth.
    """
    scale, prior = adapter.scale(sigma), check_number("prior_sigma", prior_sigma, lambda v: 0 < v < math.inf, PRIOR)
    ratio, random = scale / prior, _random(adapter, depth)
    layers = {}
    for p in random:
        # |U M|_F = |M|_F for an orthonormal U, so the full-rank family needs no m x n matrix.
        distance = float(p.mean.double().square().sum()) / prior**2
        layers[p.name] = p.dimensions * (-math.log(ratio) - 0.5 + ratio**2 / 2) + distance / 2
    return KLDivergence(scale, prior, layers, sum(p.dimensions for p in random))


@dataclass(frozen=True)
class ImpliedWeight:
    """The weight of the KL under which a found sigma is optimal.

    Attributes:
        value: ``lambda``, in nats of mean NLL a nat of KL; NaN where none exists or is known, for the ``reason``.
        sigma, prior_sigma: the found posterior scale, and the prior's.
        dimensions: coordinates ``D`` of the random layers.
        slope, curvature: derivatives of the anchors' mean NLL at sigma; NaN where sigma is an edge of what was tried.
    """

    value: float
    sigma: float
    prior_sigma: float
    dimensions: int
    slope: float
    curvature: float
    reason: str


def implied_weight(
    search: SigmaSearch, adapter: BayesianAdapter, prior_sigma: float, depth: Depth | None = None
) -> ImpliedWeight:
    """The ``lambda`` of Theorem 4.2: the found sigma minimises ``l(sigma) + lambda KL(sigma)``.

    ``l`` is the anchors' mean NLL at sigma, as the search has measured it. Where the derivative of the sum is zero::

        lambda = l'(sigma) / (D (1 / sigma - sigma / prior_sigma^2))

    ``l'`` and ``l''`` are those of the parabola through sigma and its neighbours among the evaluations and the baseline.
    Against the anchors' summed NLL the KL's weight is ``lambda`` times their number; variational inference has 1 there.

    Args:
        search: a search of this adapter.
        prior_sigma: standard deviation of the prior, in sigma's units; above the found sigma.
        depth: the search's, if it is not the adapter's now.

    Raises:
        ValueError: prior_sigma or depth is bad.
    """
    prior, sigma = check_number("prior_sigma", prior_sigma, lambda v: 0 < v < math.inf, PRIOR), float(search.sigma)
    dimensions = sum(p.dimensions for p in _random(adapter, depth))
    slope, curvature, unknown = _derivatives(search)
    pull = dimensions * (1 / sigma - sigma / prior**2)  # of the KL, towards larger sigma
    value = slope / pull if pull > 0 else math.nan
    bend = curvature + value * dimensions * (1 / sigma**2 + 1 / prior**2)
    wide = f"the prior ({prior:g}) is not wider than the posterior ({sigma:g}), so the KL does not fall as sigma grows; pass a "
    flat = f"the NLL does not rise at sigma {sigma:g} (slope {slope:.3g}), so no positive weight makes it the minimum"
    bent = f"the NLL bends down at sigma {sigma:g} (second derivative {curvature:.3g}) more than the KL bends up, so the sum has "
    reasons = {
        wide + "larger prior_sigma": sigma >= prior,
        unknown: unknown,
        flat: slope <= 0,
        bent + "a maximum": bend <= 0,
    }
    reason = next((text for text, holds in reasons.items() if holds), "")
    return ImpliedWeight(math.nan if reason else value, sigma, prior, dimensions, slope, curvature, reason)


def _derivatives(search: SigmaSearch) -> tuple[float, float, str]:
    """First and second derivative of the NLL at the found sigma, and a reason where they are unknown."""
    sigma = float(search.sigma)
    tried = {float(e.sigma): float(e.nll) for e in (search.baseline, *search.evaluations)}
    points = sorted(p for p in tried.items() if math.isfinite(p[1]))
    below = [p for p in points if p[0] < sigma]
    above = [p for p in points if p[0] > sigma]
    if not above or not below:
        side = "largest" if below else "smallest"
        return math.nan, math.nan, f"sigma {sigma:g} is the {side} that was tried, so the NLL's slope there is unknown"
    # With its neighbours goes the sigma itself, or the next nearest.
    others = sorted([p for p in points if p not in (below[-1], above[0])], key=lambda p: abs(p[0] - sigma))
    chosen = sorted([below[-1], above[0], *others[:1]])
    if len(chosen) < 3:
        return math.nan, math.nan, f"only two sigmas were tried beside {sigma:g}, too few for the NLL's slope there"
    (x0, y0), (x1, y1), (x2, y2) = chosen
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (second - first) / (x2 - x0)
    return first + bend * (2 * sigma - x0 - x1), 2 * bend, ""


@dataclass(frozen=True)
class PaperForm:
    """A layer's posterior as the paper writes it: ``dW = s B' (A' + Omega * E)``, elementwise, all float64 on the CPU.

    Attributes:
        b: ``B' = U diag(d)`` (m, rank), from the thin SVD ``B = U diag(d) V^T``; the largest entry of each column is positive.
        a: ``A' = V^T A`` (rank, n), the mean; ``B' A' = B A``.
        omega: standard deviations (rank, n); row i holds ``sigma / d_i``.
        scaling: LoRA's ``s``.
    """

    b: Tensor
    a: Tensor
    omega: Tensor
    scaling: float


def paper_form(adapter: BayesianAdapter, layer: str, sigma: float | None = None) -> PaperForm:
    """``(B', A', Omega)`` of one layer (equation 5): the same distribution as the adapter's samples, not the same samples.

    The family ``"constant"`` has ``Omega = sigma``, which is ``B (A + sigma E)`` turned by ``V``. Singular values that count
    as zero are left out.

    Raises:
        ValueError: no such layer in ``adapter.layers``, no sigma, or the family ``"full-rank"``, which no noise of A' gives.
    """
    posterior = adapter.posterior(layer)
    omega = posterior.omega(adapter.scale(sigma))
    module = adapter.attached.modules[posterior.name]
    a, b = (part[adapter.name].weight.detach().to("cpu", torch.float64) for part in (module.lora_A, module.lora_B))
    # The small factor's SVD: B itself may have a vocabulary of rows.
    q, upper = torch.linalg.qr(b)
    u, _, vt = torch.linalg.svd(upper)
    u, vt = q @ u[:, : len(omega)], vt[: len(omega)]
    sign = u.gather(0, u.abs().argmax(dim=0, keepdim=True)).sign()
    means = (sign.T * vt) @ a
    return PaperForm(u * sign * posterior.singular_values, means, omega[:, None].expand_as(means), posterior.scaling)


def _random(adapter: BayesianAdapter, depth: Depth | None) -> list[LayerPosterior]:
    names = adapter.random_layers_at(adapter.depth if depth is None else depth)
    return [p for p in adapter.posteriors if p.name in names]
