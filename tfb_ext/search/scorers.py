"""What gives the anchors' probabilities at any sigma: posterior samples, or outputs that are Gaussian to first order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import BayesianAdapter, Place
from ..adapters.samples import MEAN, SampleBatch
from ..forward.batch import Batch
from ..forward.batches import Data
from ..forward.engine import MANY_CLASSES, Scorer
from ..forward.linear import MOST_OUTPUTS, Linear
from ..prediction.gaussian import Gaussian, device_of


class Sampled(Scorer):
    """By posterior samples, the same at every sigma.

    Args:
        places: for which what all samples share is kept; the deepest first.
        numbers, antithetic, mode: of the samples.
        options: of :class:`~tfb_ext.forward.batches.Batches`.

    Attributes:
        key: what its probabilities depend on.
    """

    def __init__(
        self,
        adapter: BayesianAdapter,
        data: Data,
        places: Sequence[Place],
        numbers: tuple[int, ...],
        antithetic: bool,
        mode: str,
        **options: Any,
    ) -> None:
        share = mode == "weight"  # other modes number their noise by the tokens of a call
        options |= {"samples": len(numbers), "keep_trunk": places, "share": share}
        super().__init__(adapter, data, place=places[0], **options)
        # Where a span is tried, the mean adapter's keys and values are kept; else hidden states at the depths.
        spans = [p for p in places if p.span is not None]
        self._of_mean = spans[0] if spans else Place(len(adapter.anatomy.blocks))
        self._noise = numbers, antithetic, mode
        self.key = {"samples": list(numbers), "seed": adapter.seed, "antithetic": antithetic}

    def baseline(self, batch: Batch) -> Tensor:
        """Log probabilities (items, C) under the mean adapter, by the kernels that the samples go through; the trunk is kept."""
        return self.average(batch, MEAN, self._of_mean)

    def log_probabilities(self, batch: Batch, place: Place, sigmas: Sequence[float]) -> list[Tensor]:
        """Log mean probability (items, C) at each sigma; small heads take all sigmas in one fused batch."""
        if not sigmas:
            return []
        if self.classes > MANY_CLASSES:
            return [self.average(batch, self._samples([s]), place) for s in sigmas]
        return list(self.averages(batch, self._samples(sigmas), len(sigmas), place))

    def forwards(self, place: Place, share: float) -> float:
        """Of the plain model, for a prediction; one sample takes ``share`` of one."""
        # One for what all samples share; with a span the blocks below run on its tokens too.
        return (1 if place.span is not None else 1 - share) + len(self._noise[0]) * share

    def _samples(self, sigmas: Sequence[float]) -> SampleBatch:
        numbers, antithetic, mode = self._noise
        return self.adapter.batch(numbers, list(sigmas), antithetic, mode)


class Linearised(Linear):
    """By :class:`~tfb_ext.prediction.gaussian.Gaussian` outputs: one pass over the anchors for each place serves every sigma.

    Args:
        places: the deepest first.
        options: of :class:`~tfb_ext.forward.batches.Batches`.

    Attributes:
        key: what its probabilities depend on, named as that of samples.
        tokens_run: random tokens that were passed.
    """

    key = {"samples": "none, by linear", "seed": None, "antithetic": None}

    def __init__(self, adapter: BayesianAdapter, data: Data, places: Sequence[Place], **options: Any) -> None:
        super().__init__(adapter, data, places[0], centred=True, **options)
        self._deepest = places[0]
        self._known: dict[tuple[Hashable, Place], Gaussian] = {}
        self.tokens_run = 0

    def baseline(self, batch: Batch) -> Tensor:
        """Log probabilities (items, C) under the mean adapter."""
        return torch.log_softmax(self._gaussian(batch, self._deepest).mean, dim=-1)

    def log_probabilities(self, batch: Batch, place: Place, sigmas: Sequence[float]) -> list[Tensor]:
        """Log mean probability (items, C) at each sigma."""
        return [self._gaussian(batch, place).averages(sigma)[0].log() for sigma in sigmas]

    def forwards(self, place: Place, share: float) -> float:
        """Of the plain model, for a prediction: one, and for each difference of outputs a backward pass of the random part."""
        return 1 + share * (1 if self.sequences is not None else max(1, min(self.classes - 1, MOST_OUTPUTS)))

    def _gaussian(self, batch: Batch, place: Place) -> Gaussian:
        if (batch.key, place) not in self._known:
            found = self.of(batch, place)
            self.tokens_run += self.random_tokens(batch, place)
            self._known[batch.key, place] = Gaussian(
                found.mean, found.covariance, found.classes, self.kind, (), 0.0, device_of(self.adapter)
            )
        return self._known[batch.key, place]
