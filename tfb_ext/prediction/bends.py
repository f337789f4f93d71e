"""Where the closed form ends: how far samples are from it at a sigma, on some items."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from ..adapters.adapter import BayesianAdapter
from ..data import Encoded
from ..forward.anatomy import Kind
from ..forward.batches import Data, original_order
from ..forward.engine import Scorer
from .gaussian import Gaussian, gaussian
from .results import Probabilities, RegressionPrediction

ITEMS, SAMPLES = 32, 32  # samples in mirrored pairs
# Standard deviations of a squared gap that it must be above: with noise alone 1 % of checks are, at worst.
_SURE = 5.0
# Gaps below are never told: in probabilities and nats, and in standard deviations of a regression's output.
_SMALL, _SMALL_OUTPUT = 0.01, 0.1


def some_items(data: Data) -> tuple[Data, Data]:
    """About ``ITEMS`` items of ``data``, of an encoded set evenly spaced, else its first batches; and all of it."""
    if isinstance(data, Encoded):
        chosen = torch.linspace(0, max(len(data) - 1, 0), min(ITEMS, len(data))).round().long()
        return data.select(chosen), data
    if not isinstance(data, Iterable) or isinstance(data, Mapping | str):
        return data, data  # which is refused
    batches = iter(data)
    first = list(_of_items(batches))
    return first, chain(first, batches)


def warn_of_bends(adapter: BayesianAdapter, some: Data, kind: Kind, sigma: float, batch_size: int | None) -> None:
    """Warn where samples at ``sigma`` are not what the closed form says of ``some``, at the adapter's depth and span.

    The gap is the root mean square over items and classes of what the average over samples is off, in probability and in
    entropy (for a regression: in its mean and its spread, in standard deviations). The samples' own error is taken off.
    """
    scorer = Scorer(adapter, some, batch_size=batch_size, samples=SAMPLES, kind=kind)
    draws = adapter.batch(SAMPLES, sigma, antithetic=True)
    sampled = original_order([scorer.samples(b, draws).double().cpu() for b in scorer.batches], scorer.batches, dim=1)
    found = gaussian(adapter, some, batch_size=batch_size, kind=kind, centred=True)
    told = []
    for name, off, small in _differences(found, sampled, sigma):
        gap, error = _gap(off)
        if not gap <= max(small, error):
            told.append(f"{name} by {gap:.2g} ({error:.2g} would be chance)")
    if told:
        warnings.warn(
            f"sigma = {sigma:.4g} is too large for by='linear': on {sampled.shape[1]} items {SAMPLES} samples differ from it, in "
            f"{' and in '.join(told)}. Fix: by='samples', or a smaller sigma, depth or span",
            stacklevel=4,
        )


def _of_items(batches: Iterator[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    """The first batches, until they have ``ITEMS`` rows."""
    left = ITEMS
    for batch in batches:
        yield batch
        rows = batch.get("input_ids") if isinstance(batch, Mapping) else None
        left -= len(rows) if isinstance(rows, Tensor) else left
        if left <= 0:
            return


def _differences(found: Gaussian, sampled: Tensor, sigma: float) -> Iterator[tuple[str, Tensor, float]]:
    """What is compared, (pairs, numbers) of each pair of samples minus the closed form, and what of it is small."""
    prediction = found.predict(sigma)
    if isinstance(prediction, RegressionPrediction):
        deviation = sigma * found.variance.sqrt()
        units = (sampled - found.mean) / deviation.clamp(min=torch.finfo(torch.float32).tiny)
        units = units[:, deviation > 1e-6 * deviation.max()]
        yield "the mean", _of_pairs(units), _SMALL_OUTPUT
        yield "the variance", _of_pairs(units.square() - 1), 2 * _SMALL_OUTPUT
        return
    assert isinstance(prediction, Probabilities)
    p = sampled.exp()
    entropy = torch.special.entr(p)
    if found.kind == "multi_label":
        entropy = entropy + torch.special.entr(1 - p)
    else:
        entropy = entropy.sum(-1)
    yield "probability", _of_pairs(p - prediction.probabilities), _SMALL
    yield "entropy", _of_pairs(entropy - prediction.aleatoric), _SMALL


def _of_pairs(samples: Tensor) -> Tensor:
    """(S, ...) -> (S / 2, numbers) averages of mirrored pairs."""
    return samples.unflatten(0, (-1, 2)).mean(1).flatten(1)


def _gap(off: Tensor) -> tuple[float, float]:
    """Root mean square of the expectation of ``off`` (K, numbers), and what it could be if that were 0.

    ``|mean|^2 - tr(S) / K`` is an unbiased estimate of the squared length, S the covariance of a row; of Gaussian rows around 0
    its variance is ``2 tr(S^2) / K^2``.
    """
    pairs, numbers = off.shape
    if not numbers:
        return 0.0, 0.0
    mean = off.mean(0)
    products = (off - mean) @ (off - mean).T / (pairs - 1)
    square = float(mean.square().sum() - products.trace() / pairs) / numbers
    deviation = math.sqrt(2) * float(torch.linalg.matrix_norm(products)) / pairs / numbers
    return math.sqrt(max(square, 0.0)) if not math.isnan(square) else square, math.sqrt(_SURE * deviation)
