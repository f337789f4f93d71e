"""Predictions averaged over posterior samples, and the uncertainty that the samples' disagreement shows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.adapter import BayesianAdapter
from ..adapters.samples import SampleBatch
from ..adaptive import StoppingRule, draw_size
from ..checks import check_choice, check_samples, is_integer
from ..errors import refusal
from ..forward.anatomy import Kind
from ..forward.batch import Batch
from ..forward.batches import Data, head_outputs, original_order
from ..forward.engine import MANY_CLASSES, Scorer
from ..forward.repacking import Repacking
from ..posterior.config import BY, By
from .bends import some_items, warn_of_bends
from .gaussian import Gaussian, gaussian
from .results import MultiLabelPrediction, Prediction, RegressionPrediction

__all__ = [
    "Gaussian",
    "MultiLabelPrediction",
    "Prediction",
    "RegressionPrediction",
    "predict",
    "predict_multi_label",
    "predict_regression",
]


class Options(TypedDict, total=False):
    """Options of every prediction, see :func:`predict`."""

    by: By
    check: bool
    sigma: float | None
    batch_size: int | None
    progress: bool


def predict(
    adapter: BayesianAdapter,
    data: Data,
    samples: int | Sequence[int] = 10,
    *,
    by: By = "samples",
    check: bool = False,
    adaptive: float | None = None,
    precision: float | None = None,
    sigma: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Prediction:
    """Predictive probabilities of every item of ``data``.

    Only the last position and the label tokens' rows of the head are computed for an :class:`~tfb_ext.data.Encoded` set; the
    blocks below the first random one run once a batch, however many samples there are and in however many chunks.

    Args:
        adapter: a Bayesian adapter with a sigma.
        data: an encoded set, or batches of model arguments for a classification head. One that labels tokens gives an item for
            every label (B, T) other than -100, or for every attended token without labels, row by row.
        samples: how many samples, or their numbers; 0 for the mean adapter. With ``adaptive`` the most that an item gets.
        by: ``"samples"``, or ``"linear"``, which draws none: the prediction of :meth:`BayesianAdapter.gaussian
            <tfb_ext.BayesianAdapter.gaussian>`, to first order in sigma. ``samples`` counts for nothing then. A sigma that was searched
            by the one is not the best for the other, which warns.
        check: with ``by="linear"``, compare 32 items with 32 samples at this sigma, and warn with the measured gap in probability
            and in entropy where it is more than the samples' own error and 0.01.
        adaptive: stop drawing samples of an item once its answer, the arg max of the mean probability, is settled: with this
            confidence, such as 0.95, that of all ``samples``. :class:`~tfb_ext.adaptive.StoppingRule` says what is promised and
            what is not. Every item gets the first k of the samples that it would get without (whole pairs if antithetic), so
            one that gets all has the same probabilities; its k is in ``samples_drawn``. Blocks below the first random one
            run once an item all the same; the items that need more samples are packed into new batches.
        precision: with ``adaptive``, settle the entropy of the mean probability instead, to so many nats to either side of
            that of all ``samples``.
        sigma: posterior scale instead of the adapter's own.
        batch_size: items a forward, before the fan; chosen by the device otherwise. One whose choices are scored as sequences
            is a row for each of them.
        progress: show a progress bar.

    Raises:
        ValueError: empty data, bad samples or sigma, or a head of more than 1024 classes (a vocabulary: call the model under
            ``adapter.predictive`` instead); a regression or multi-label head (:func:`predict_regression`,
            :func:`predict_multi_label`); with ``adaptive`` also a confidence outside (0.5, 1), too few samples, samples that
            are neither all in pairs nor all independent, noise that depends on an item's place in its batch (a ``mode`` other
            than ``"weight"``), labels of single tokens, ``score="token"`` (no distribution per sample to judge by).
    """
    options: Options = {"by": by, "check": check, "sigma": sigma, "batch_size": batch_size, "progress": progress}
    if by != "samples":
        if is_integer(samples, 0, 0):
            raise refusal("samples", 0, f"none with by={by!r}: 0 is the mean adapter", "leave it out, or by='samples'")
        for name, value in (("adaptive", adaptive), ("precision", precision)):
            if value is not None:
                raise refusal(name, value, f"None with by={by!r}, which draws no samples", "leave it out")
        return cast(Prediction, _linear(adapter, data, "categorical", **options))
    run = _run(adapter, data, samples, "categorical", adaptive=adaptive, precision=precision, **options)
    return Prediction(run.values, tuple(getattr(data, "choices", ())), *run.facts, run.drawn)


def predict_multi_label(
    adapter: BayesianAdapter, data: Data, samples: int | Sequence[int] = 10, **options: Unpack[Options]
) -> MultiLabelPrediction:
    """Predictive probability of every label for every item of ``data``; arguments as :func:`predict`, labels are not looked at.

    Raises:
        ValueError: as :func:`predict`, or a head of another kind (``problem_type`` of the model's configuration).
    """
    if options.get("by", "samples") != "samples":
        return cast(MultiLabelPrediction, _linear(adapter, data, "multi_label", **options))
    run = _run(adapter, data, samples, "multi_label", **options)
    return MultiLabelPrediction(run.values, tuple(getattr(data, "choices", ())), *run.facts)


def predict_regression(
    adapter: BayesianAdapter, data: Data, samples: int | Sequence[int] = 10, **options: Unpack[Options]
) -> RegressionPrediction:
    """Predictive mean and variance for every item of ``data``; arguments as :func:`predict`, labels are not looked at.

    Raises:
        ValueError: as :func:`predict`, or a head of another kind (``problem_type`` of the model's configuration).
    """
    if options.get("by", "samples") != "samples":
        return cast(RegressionPrediction, _linear(adapter, data, "regression", **options))
    run = _run(adapter, data, samples, "regression", **options)
    return RegressionPrediction(run.values, *run.facts)


def _linear(
    adapter: BayesianAdapter,
    data: Data,
    kind: Kind,
    by: By,
    check: bool = False,
    sigma: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Prediction | MultiLabelPrediction | RegressionPrediction:
    check_choice("by", by, BY)
    scale = adapter.scale(sigma, by)
    some, data = some_items(data) if check else (data, data)
    found = gaussian(adapter, data, batch_size=batch_size, progress=progress, kind=kind, centred=True)
    if check:
        warn_of_bends(adapter, some, kind, scale, batch_size)
    return found.predict(scale)


@dataclass(frozen=True)
class _Run:
    values: Tensor  # (S, N, C): probabilities, or a regression head's outputs
    facts: tuple[float, tuple[int, ...], bool, float]  # sigma, samples, antithetic, seconds
    drawn: Tensor | None  # (N,) samples of each item, where they differ


def _run(
    adapter: BayesianAdapter,
    data: Data,
    samples: int | Sequence[int],
    kind: Kind,
    sigma: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    adaptive: float | None = None,
    precision: float | None = None,
    by: By = "samples",
    check: bool = False,
) -> _Run:
    if check:
        raise refusal("check", check, "False with by='samples', which it compares with", "leave it out")
    mean = is_integer(samples) and samples == 0
    batch = None if mean else adapter.batch(check_samples(samples), sigma)
    stopping = None if adaptive is None and precision is None else _stopping(batch, adaptive, precision, samples)
    first = 1 if batch is None else len(batch) if stopping is None else stopping.stops[0]
    scorer = Scorer(adapter, data, batch_size=batch_size, samples=first, keep_trunk=stopping is not None, kind=kind)
    by_token = scorer.sequences is not None and scorer.sequences.score == "token"
    if by_token and stopping is not None:
        raise ValueError(
            "the data's score is 'token', the product of averages over samples, and adaptive= judges by the distribution that "
            "each sample gives; encode with score='sequence', or predict it with adaptive=None"
        )
    classes = head_outputs(adapter)
    whole = any(item.columns is None and item.targets is None for item in scorer.batches)
    if classes > MANY_CLASSES and whole:
        raise ValueError(
            f"the model's head has {classes} outputs; predict() is for label tokens (tfb_ext.encode) and "
            "classification heads: for a vocabulary call the model inside adapter.predictive(...)"
        )
    if stopping is not None and any(item.token_labelled for item in scorer.batches):
        raise ValueError(
            "the data labels tokens, several a row, and adaptive= stops whole rows; predict it with adaptive=None"
        )
    drawn: Tensor | None = None
    started = time.perf_counter()
    with tqdm(total=scorer.size, desc="predict", unit="item", disable=not progress) as bar:
        if batch is None or stopping is None:
            parts = []
            for item in scorer.batches:
                if batch is None:
                    found = scorer.mean(item)[None]
                elif by_token:
                    found = scorer.average(item, batch)[None]
                else:
                    found = scorer.samples(item, batch)
                parts.append(_finite(found if kind == "regression" else found.exp(), item, batch))
                bar.update(len(item.items))
            values = original_order(parts, scorer.batches, dim=1)
        else:
            values, drawn = _until_settled(scorer, batch, stopping, bar.update)
    if not values.shape[1]:
        raise ValueError(
            "labels: got -100 at every position, which leaves no items, expected at least one label. Fix: leave the key out for the "
            "last position of each row, or label some"
        )
    facts = 0.0 if batch is None else batch.sigma[0], () if batch is None else batch.samples
    return _Run(values, (*facts, adapter.antithetic, time.perf_counter() - started), drawn)


@dataclass(frozen=True)
class _Stopping:
    """The rule, how many samples make a draw, and after how many samples it is asked."""

    rule: StoppingRule
    size: int

    @property
    def stops(self) -> tuple[int, ...]:
        return tuple(self.size * n for n in (*self.rule.looks, self.rule.draws))


def _stopping(batch: SampleBatch | None, adaptive: float | None, precision: float | None, given: object) -> _Stopping:
    if adaptive is None:
        raise ValueError(
            f"precision is {precision!r} without adaptive=, the confidence it is to hold with, such as 0.95"
        )
    if batch is None:
        raise ValueError(
            "samples is 0, the mean adapter, which draws nothing that adaptive= could stop; leave adaptive out"
        )
    if batch.mode != "weight":
        raise ValueError(
            f"the adapter's mode is {batch.mode!r}, whose noise depends on an item's place in its batch; adaptive= packs items "
            "anew between samples and needs mode='weight'"
        )
    size = draw_size(batch.samples, batch.antithetic, given)
    return _Stopping(StoppingRule(adaptive, len(batch) // size, precision), size)


def _until_settled(
    scorer: Scorer, batch: SampleBatch, stopping: _Stopping, update: Callable[[int], object]
) -> tuple[Tensor, Tensor]:
    """Samples for all items up to the first look, then for those left: (S, N, C), NaN where none was drawn, and (N,) counts."""
    p: Tensor | None = None
    unsettled = torch.ones(scorer.size, dtype=torch.bool)
    drawn = torch.zeros(scorer.size, dtype=torch.int64)
    done, repacking = 0, Repacking(scorer)
    for stop in stopping.stops:
        samples = batch.part(done, stop)
        left = unsettled.nonzero()[:, 0]
        batches = repacking.select(left, len(samples)) if done else scorer.batches
        for some in batches:
            new = _finite(scorer.samples(some, samples).exp(), some, samples)
            if p is None:
                p = torch.full((len(batch), scorer.size, new.shape[-1]), math.nan)
            items = some.items
            p[done:stop, items] = new
            drawn[items] = stop
            draws = p[:stop, items].reshape(-1, stopping.size, *new.shape[1:]).mean(dim=1)
            unsettled[items] = ~stopping.rule.settled(draws) if stop < len(batch) else False
            update(int((~unsettled[items]).sum()))
        if not unsettled.any():
            break
        done = stop
    assert p is not None
    return p, drawn


def _finite(values: Tensor, batch: Batch, samples: SampleBatch | None) -> Tensor:
    """Probabilities or outputs (S, items, C) as float32 on the CPU; a ``ValueError`` if one is NaN or infinite."""
    values = values.float().cpu()
    bad = (~values.isfinite()).flatten(2).any(dim=-1).nonzero()
    if len(bad):
        draw, item = bad[0].tolist()
        where = f"item {item} of batch {batch.key}" if batch.token_labelled else f"item {int(batch.items[item])}"
        if samples is None:
            raise ValueError(
                f"the mean adapter's outputs: got NaN or infinity for {where}, expected finite numbers. Fix: load the model in "
                "float32 or bfloat16, and look for NaN in its weights"
            )
        raise ValueError(
            f"sigma: got {samples.sigma[0]:g}, at which the model's outputs are NaN or infinite (first: {where}, sample "
            f"{samples.samples[min(draw, len(samples) - 1)]}), expected one at which they are finite. Fix: a smaller sigma, or load "
            "the model in float32 or bfloat16"
        )
    return values
