"""The low-rank Gaussian over one adapter matrix, in canonical form.

A LoRA layer adds ``s B A`` to its weight, ``B`` (m, r), ``A`` (r, n). With ``B = U diag(d) V^T`` its posterior (Shi et al.,
NeurIPS 2025, equation 5 and Theorem 4.1) is ::

    dW_k = s U (M + sigma E_k),   M = U^T B A (rank, n),   E_k ~ N(0, 1)

because the division by ``d`` in the paper's ``Omega = sigma / d`` meets a multiplication by ``d`` in ``B'``. The samples
depend on the basis of ``B``'s range, so it is one that every machine agrees on: Gram-Schmidt on the columns in their order,
positive diagonal, float64, CPU. The other variance families are in :mod:`tfb_ext.research.families`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedModelError


def canonical_name(name: str) -> str:
    """The module's name in the base model, without PEFT's and ``torch.compile``'s wrappers."""
    return name.replace("base_model.model.", "").replace("_orig_mod.", "")


def layer_id(name: str) -> int:
    """The noise counter's word for a layer: CRC-32 of its canonical name (unsigned 32-bit)."""
    return zlib.crc32(canonical_name(name).encode("utf-8"))


def unique_layer_ids(names: Iterable[str]) -> dict[str, int]:
    """``layer_id`` of every name.

    Raises:
        UnsupportedModelError: two names have one CRC-32 and would draw the same noise.
    """
    ids = {name: layer_id(name) for name in names}
    owner: dict[int, str] = {}
    for name, number in ids.items():
        if owner.setdefault(number, name) != name:
            raise UnsupportedModelError(
                f"layers {owner[number]!r} and {name!r} have the same noise number {number:#010x} (CRC-32 of the name), expected "
                "different ones. Fix: rename one of the modules, or Bayesianise fewer layers with depth="
            )
    return ids


@dataclass(frozen=True)
class LayerPosterior:
    """The posterior of one layer's adapter weight, without sigma.

    Attributes:
        name: canonical module name.
        layer: the noise counter's word for it (CRC-32 of the name).
        basis: ``U`` (m, rank), float32, orthonormal columns spanning the range of ``B``; for the family ``"constant"`` ``B``.
        mean: ``M`` (rank, n), float32; for the family ``"constant"`` ``A``.
        singular_values: ``d`` of ``B``, float64, descending, without those that count as zero.
        scaling: LoRA's ``s``.
        family: variance family, see :mod:`tfb_ext.research.families`.
    """

    name: str
    layer: int
    basis: Tensor
    mean: Tensor
    singular_values: Tensor
    scaling: float
    family: str = "low-rank"

    @property
    def rank(self) -> int:
        return self.mean.shape[0]

    @property
    def dimensions(self) -> int:
        """How many independent normals a sample has: ``rank n``, or ``m n`` for the family ``"full-rank"``."""
        rows = self.basis.shape[0] if self.family == "full-rank" else self.rank
        return rows * self.mean.shape[1]

    def omega(self, sigma: float) -> Tensor:
        """Standard deviations of the rows of the paper's ``A'``, float64: ``sigma / d_i`` (equation 5), or ``sigma`` for the
        family ``"constant"``.

        Raises:
            ValueError: the family is ``"full-rank"``, whose noise leaves the range of ``B``, so that no ``A'`` has it.
        """
        if self.family == "full-rank":
            fix = "use the family 'low-rank' or 'constant'"
            raise ValueError(
                f"layer {self.name!r}: a full-rank posterior has no Omega, its noise is not of A. Fix: {fix}"
            )
        d = self.singular_values
        return torch.full_like(d, sigma) if self.family == "constant" else sigma / d


def orthonormal_basis(b: Tensor) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt basis ``U`` (m, rank) of the range of ``b`` (m, r), and its singular values (rank,): float64, CPU.

    Singular values ``<= 4 min(m, r) eps(float32) d_max`` count as zero; as many columns of ``b``, those that add least to the
    ones before them, bring no direction.

    Raises:
        ValueError: ``b`` is all zero (nothing was learnt) or not finite.
    """
    b64 = b.detach().to("cpu", torch.float64)
    if not torch.isfinite(b64).all():
        raise ValueError("lora_B holds NaN or infinite values; the adapter file is damaged")
    if b64.numel() == 0 or not b64.any():
        raise ValueError(
            "lora_B is all zero, so that the posterior has no direction to vary in. Fix: train the adapter first, or take the layer "
            "out of the adapter's target_modules"
        )
    q, upper = torch.linalg.qr(b64)
    d = torch.linalg.svdvals(upper)
    # What rounding to float32 leaves of a dependent column grows with its norm, not with its rows: a bound that grows with m
    # would drop real directions of tall matrices.
    tolerance = 4 * min(b64.shape) * torch.finfo(torch.float32).eps * float(d[0])
    rank = int((d > tolerance).sum())
    if rank < b64.shape[1]:
        q, upper = torch.linalg.qr(b64[:, _independent_columns(b64, rank)])
    return q * upper.diagonal().sign(), d[:rank].clone()


def _independent_columns(b: Tensor, rank: int) -> list[int]:
    """The ``rank`` columns, in order, that add most to the span of the columns before them."""
    residuals: dict[int, float] = {}
    basis = b.new_zeros(b.shape[0], 0)
    for j in range(b.shape[1]):
        v = b[:, j]
        # Twice is enough (Kahan, Parlett): the second pass removes what rounding left of the first.
        for _ in range(2):
            v = v - basis @ (basis.T @ v)
        residuals[j] = float(v.norm())
        # What is only rounding must not enter the basis: its direction is noise and would hide a later column.
        if residuals[j] > b.shape[0] * torch.finfo(torch.float64).eps * float(b[:, j].norm()):
            basis = torch.cat([basis, (v / residuals[j])[:, None]], dim=1)
    return sorted(sorted(residuals, key=lambda j: -residuals[j])[:rank])


def layer_posterior(name: str, a: Tensor, b: Tensor, scaling: float, family: str = "low-rank") -> LayerPosterior:
    """Posterior of the layer ``name`` with adapter ``a`` (r, n), ``b`` (m, r) and LoRA scaling ``scaling``.

    Raises:
        UnsupportedModelError: weights on the ``meta`` device, all-zero or non-finite weights, zero or non-finite scaling;
            the message names the layer.
    """
    name = canonical_name(name)
    try:
        if a.is_meta or b.is_meta:
            raise ValueError(
                "its adapter weights are on the meta device (offloaded); Bayesianise before dispatching the model"
            )
        if b.shape[1] != a.shape[0]:
            raise ValueError(f"lora_B {tuple(b.shape)} and lora_A {tuple(a.shape)} do not chain")
        if not math.isfinite(scaling) or scaling == 0:
            raise ValueError(f"LoRA scaling is {scaling}, expected a finite non-zero number")
        a64 = a.detach().to("cpu", torch.float64)
        if not torch.isfinite(a64).all():
            raise ValueError("lora_A holds NaN or infinite values; the adapter file is damaged")
        basis, d = orthonormal_basis(b)
    except ValueError as error:
        raise UnsupportedModelError(f"layer {name!r}: {error}") from None
    if family == "constant":
        mean, basis = (t.detach().to("cpu", torch.float32, copy=True) for t in (a, b))
    else:
        # (U^T B) A, never B A: that one has the full weight's size, 5 GB for a head of 150k rows.
        mean = (basis.T @ b.detach().to("cpu", torch.float64)) @ a64
    parts = (basis.float().contiguous(), mean.float().contiguous(), d)
    return LayerPosterior(name, layer_id(name), *parts, float(scaling), family)
