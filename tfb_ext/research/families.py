"""Families of posterior variance: what is noisy in a layer's update ``dW``, all with the adapter as their mean.

========== ========================= ================================ ====================================================
family     a sample                  covariance of ``dW x``           noise
========== ========================= ================================ ====================================================
low-rank   ``s U (M + sigma E)``     ``(s sigma |x|)^2 U U^T``        isotropic in the range of ``B``: TFB (Theorem 4.1)
constant   ``s B (A + sigma E)``     ``(s sigma |x|)^2 B B^T``        one standard deviation for all entries of ``A``
full-rank  ``s (B A + sigma E)``     ``(s sigma |x|)^2 I``            one for all m n entries, outside the range of ``B`` too
========== ========================= ================================ ====================================================

``U`` is an orthonormal basis of the range of ``B``, ``M = U^T B A``, ``s`` LoRA's scaling. The last two are the comparisons
of the paper's ablation. In all of them LoRA's scaling multiplies the noise as it multiplies the mean, so one sigma means the
same size of noise a direction in ``low-rank`` and ``full-rank``; in ``constant`` the singular values of ``B`` come on top.

``low-rank`` and ``constant`` are the same kernels with another basis and mean. A matrix of m n normals a sample would be as
large as the layer's own weight, so ``full-rank`` is drawn where it meets the token (local reparametrisation): ``E x_t`` is
``|x_t|`` times m standard normals, fresh for every token. That is the law of one weight matrix for each token alone, and not
for several together: it is noise mode ``"token"``, the only one this family has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import NOISE_ELEMENTS


def add_full_rank_noise_(
    y: Tensor,
    x: Tensor,
    features: int,
    scaling: float,
    sigma: Tensor,
    samples: Tensor,
    seed: Tensor,
    layer: int,
    antithetic: bool,
    columns: Tensor | None = None,
) -> Tensor:
    """Add a full-rank sample's noise to a layer's output in place; returns ``y``.

    Semantics, with ``G = T / S``, ``k = t // G`` and ``g = t % G``::

        y[t, j] += scaling * sigma[k] * |x[t]| * e[samples[k], g, j]

    ``e[sample, g, j]`` are the token normals of :mod:`tfb_ext.ops` for as many ranks as the layer has outputs: a key of their
    own, so never a normal of a weight noise, counter ``(j // 4, g, sample, layer)``. They restart every
    ``max(1, NOISE_ELEMENTS // features)`` rows of a group, for memory's sake: the c-th such part has ``g`` counted from its
    start and ``c`` xor-ed into the key's high word, which the words of other keys do not meet below ``c = 2^30``. A seed that
    differs from this one by such a ``c`` in its high word would meet them; seeds below 2^32 do not.

    Args:
        y: (T, features), or (T, C) with ``columns``; float32, bfloat16 or float16, contiguous.
        x: (T, n), rows in S equal groups.
        features: outputs of the layer.
        scaling: LoRA's scaling, which multiplies the noise as it does in the other families.
        sigma, samples, seed, layer, antithetic: as in :func:`tfb_ext.ops.shrink`; the first three are read on the device.
        columns: (C,) int64, the outputs that ``y`` holds; they get the noise they have among all of them.
    """
    groups = samples.shape[0]
    tokens = x.shape[0] // groups
    out = y.view(groups, tokens, y.shape[-1])
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).view(groups, tokens)
    # For one column |x| and a mean of zero, shrink in token mode is exactly sigma |x| e, of as many ranks as there are rows.
    nothing = norms.new_zeros(features, 1)
    step = max(1, NOISE_ELEMENTS // features)
    for part, start in enumerate(range(0, tokens, step)):
        stop = min(start + step, tokens)
        key = seed ^ (part << 32)
        together = max(1, NOISE_ELEMENTS // (features * (stop - start)))
        for first in range(0, groups, together):
            last = min(first + together, groups)
            lengths = norms[first:last, start:stop].reshape(-1, 1)
            noise = ops.shrink(
                lengths, nothing, sigma[first:last], samples[first:last], key, layer, "token", antithetic
            )
            if columns is not None:
                noise = noise.index_select(1, columns)
            # Added in float32 and rounded once to y's type.
            out[first:last, start:stop].add_(noise.view(last - first, stop - start, y.shape[-1]), alpha=scaling)
    return y
