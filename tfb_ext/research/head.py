"""Last-layer TFB in closed form: with only the output head random, an item's class logits are exactly Gaussian.

The head's input x is the same for every sample, and its logits ``W0 x + s U (M + sigma E) x`` are linear in E. So for a single
position ::

    logits ~ N(mean, (s sigma |x|)^2 U_c U_c^T)

with the mean adapter's logits as mean and ``U_c`` the rows of U for the classes (the label tokens, or all of a classification
head): the law that sampling draws from, at ``depth="head"``, without samples. It holds in every noise mode, whose draws for one
row have this law; other families (:mod:`tfb_ext.research.families`) have ``B_c`` or the identity in place of ``U_c``. Items share E,
so their logits are correlated with each other, which a distribution for each item does not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import BayesianAdapter
from ..checks import check_count
from ..data import Encoded
from ..errors import SamplingError, UnsupportedModelError
from ..forward.anatomy import CLASSIFIER_HEADS
from ..forward.batches import Data, head_outputs, original_order
from ..forward.contexts import exclusive
from ..forward.engine import MANY_CLASSES, Scorer, logits_and_norm
from ..quadrature import POINTS, softmax_moments


@dataclass(frozen=True)
class HeadGaussian:
    """Gaussian class logits of N items, float64 on the CPU: ``logits = mean + scale * factor @ z``, z standard normal.

    Attributes:
        mean: (N, C) the mean adapter's logits.
        scale: (N,) ``s sigma |x|``.
        factor: (C, q) the rows of the basis for the classes, the same for all items.
        choices: names of the classes, where they are known.
        sigma: posterior scale.
    """

    mean: Tensor
    scale: Tensor
    factor: Tensor
    choices: tuple[str, ...]
    sigma: float

    @property
    def covariance(self) -> Tensor:
        """(N, C, C) of each item's logits."""
        return self.scale.square()[:, None, None] * (self.factor @ self.factor.T)

    @property
    def variance(self) -> Tensor:
        """(N, C), the covariance's diagonal."""
        return self.scale.square()[:, None] * self.factor.square().sum(dim=1)

    def sample(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draws (samples, N, C), independent for every item: each item's law is exact, the items' correlation is not there."""
        samples = check_count("samples", samples)
        z = torch.randn(samples, len(self.mean), self.factor.shape[1], generator=generator, dtype=torch.float64)
        return self._logits(z)

    def probabilities(self, points: int = POINTS, seed: int = 0) -> Tensor:
        """(N, C) ``E[softmax(logits)]``, the posterior predictive of infinitely many samples, by a deterministic rule.

        Softmax sees differences of logits only, so the rule of :func:`tfb_ext.quadrature.softmax_moments` runs in the space of
        these, of at most ``min(C - 1, q)`` dimensions. With one (two classes, rank 1) it is exact. With more, largest errors seen
        at the default: 1e-5 where the logits of three classes vary by about 1, 3e-4 where by about 8; 6e-3 for fifty classes that
        vary by about 7 in 49 directions. Four times the points take a half to three quarters of it away.

        Args:
            points: Sobol points; powers of two are balanced.
            seed: of their scrambling; the same seed gives the same points.

        Raises:
            ValueError: points is not a count of at least 1.
        """
        return softmax_moments(self.mean, self._differences, self.scale, points, seed)[0]

    def _logits(self, z: Tensor) -> Tensor:
        return self.mean + self.scale[:, None] * (z @ self.factor.T)

    @cached_property
    def _differences(self) -> Tensor:
        """(C, k): the factor without what all classes share, in orthogonal columns, the largest first."""
        centred = self.factor - self.factor.mean(dim=0)
        left, values, _ = torch.linalg.svd(centred, full_matrices=False)
        kept = values > 1e-12 * max(float(self.factor.norm()), 1e-300)
        return left[:, kept] * values[kept]


def head_gaussian(
    adapter: BayesianAdapter, data: Data, sigma: float | None = None, *, batch_size: int | None = None
) -> HeadGaussian:
    """The exact Gaussian of every item's class logits, from one pass of the mean adapter.

    Args:
        adapter: a Bayesian adapter whose output head is its only random layer (``depth="head"``).
        data: as in :func:`tfb_ext.predict`: an encoded set for label tokens or a classification head, or batches of model
            arguments for a classification head.
        sigma: posterior scale instead of the adapter's own.
        batch_size: rows of a batch; chosen by the device otherwise.

    Raises:
        UnsupportedModelError: the model caps its logits, which are not Gaussian then.
        ValueError: no LoRA on the head, other random layers, no sigma, empty data, more than 1024 classes, or choices that are
            scored as sequences.
        SamplingError: the model is in training mode or in a sampling context, or the adapter is merged, off or not active.
    """
    scale = adapter.scale(sigma)
    name = adapter.anatomy.head_name
    _check_adapter(adapter, name)
    if isinstance(data, Encoded) and data.choice_tokens is not None:
        raise ValueError(
            f"the data's score is {data.score!r}, and a choice of several tokens is no one Gaussian logit; expected choices of "
            "one token (tfb_ext.encode without score=), or sample with tfb_ext.predict"
        )
    scorer = Scorer(adapter, data, batch_size=batch_size)
    classes = head_outputs(adapter)
    parts: list[Tensor] = []
    columns: Tensor | None = None
    with exclusive(adapter.attached):
        for batch in scorer.batches:
            if batch.columns is None and classes > MANY_CLASSES:
                raise ValueError(
                    f"the model's head has {classes} outputs, expected at most {MANY_CLASSES} classes; encode the data with "
                    "label tokens (tfb_ext.encode), or use a model with a classification head"
                )
            columns = batch.columns
            parts.append(scorer.items(logits_and_norm(adapter, batch.inputs, columns), batch).double().cpu())
    found = original_order(parts, scorer.batches, dim=0)
    if not found.isfinite().all():
        raise ValueError(
            "the mean adapter's logits: got NaN or infinity, expected finite numbers. Fix: load the model in float32 or bfloat16, "
            "and look for NaN in its weights"
        )
    posterior = adapter.posterior(name)
    rows = torch.arange(classes) if columns is None else columns.cpu()
    factor = torch.eye(len(rows)) if adapter.family == "full-rank" else posterior.basis[rows]
    scaling: float = adapter.attached.modules[name].scaling[adapter.name]
    return HeadGaussian(
        found[:, :-1],
        abs(scaling) * scale * found[:, -1],
        factor.double(),
        tuple(getattr(data, "choices", ())),
        scale,
    )


def _check_adapter(adapter: BayesianAdapter, name: str) -> None:
    if name not in adapter.layers:
        raise ValueError(
            f"adapter {adapter.name!r} has no LoRA on the output head {name!r}; train it with {name!r} in target_modules, or "
            "sample with adapter.predictive(...)"
        )
    others = [layer for layer in adapter.random_layers if layer != name]
    if others:
        raise ValueError(
            f"{len(others)} other layers are random (first: {others[0]!r}), so the logits are not Gaussian; expected the head "
            f"{name!r} alone: set adapter.depth = 'head', or sample with tfb_ext.predict"
        )
    model: Any = adapter.anatomy.model
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None and name not in CLASSIFIER_HEADS:
        raise UnsupportedModelError(
            f"{type(model).__name__} caps its logits (final_logit_softcapping = {cap}), so they are not Gaussian; sample with "
            "tfb_ext.predict"
        )
    if adapter.attached.modules[name].disable_adapters:
        raise SamplingError(f"adapter {adapter.name!r} is switched off (disable_adapter), so nothing is random")
