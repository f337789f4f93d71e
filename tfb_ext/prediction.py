"""Predictions averaged over posterior samples, and the uncertainty that the samples' disagreement shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .adapter import BayesianAdapter, check_samples
from .fan import Kind
from .scoring import MANY_CLASSES, Data, Scorer, head_outputs, original_order


@dataclass(frozen=True)
class Prediction:
    """Predictive distribution of N items over C classes, float32 on the CPU; entropies in nats.

    Attributes:
        sample_probabilities: (S, N, C), one distribution a sample; S = 1 for the mean adapter.
        choices: names of the classes, where they are known.
        sigma: posterior scale; 0 for the mean adapter.
        samples: sample numbers; empty for the mean adapter.
        antithetic: whether samples come in mirrored pairs.
        seconds: wall time of the forwards.
    """

    sample_probabilities: Tensor
    choices: tuple[str, ...]
    sigma: float
    samples: tuple[int, ...]
    antithetic: bool
    seconds: float

    @property
    def probabilities(self) -> Tensor:
        """(N, C): the average of the samples' probabilities, the paper's posterior predictive."""
        return self.sample_probabilities.mean(dim=0)

    @property
    def labels(self) -> Tensor:
        """(N,) most probable class."""
        return self.probabilities.argmax(dim=-1)

    @property
    def total(self) -> Tensor:
        """(N,) entropy of the average: all the uncertainty there is."""
        return _entropy(self.probabilities)

    @property
    def aleatoric(self) -> Tensor:
        """(N,) average entropy of the samples: what they agree to be uncertain about."""
        return _entropy(self.sample_probabilities).mean(dim=0)

    @property
    def epistemic(self) -> Tensor:
        """(N,) mutual information of label and weights, total minus aleatoric (never below 0): what they disagree about."""
        return (self.total - self.aleatoric).clamp(min=0)

    @property
    def standard_error(self) -> Tensor:
        """(N, C) Monte-Carlo standard error of ``probabilities``; antithetic samples count as pairs; NaN below two of them."""
        return _standard_error(self.sample_probabilities, self.samples, self.antithetic)


@dataclass(frozen=True)
class MultiLabelPrediction:
    """Predictive probabilities of L independent labels of N items, float32 on the CPU; entropies in nats.

    Attributes:
        sample_probabilities: (S, N, L), the sigmoid of each sample's outputs; S = 1 for the mean adapter.
        choices: names of the labels, where they are known.
        sigma: posterior scale; 0 for the mean adapter.
        samples: sample numbers; empty for the mean adapter.
        antithetic: whether samples come in mirrored pairs.
        seconds: wall time of the forwards.
    """

    sample_probabilities: Tensor
    choices: tuple[str, ...]
    sigma: float
    samples: tuple[int, ...]
    antithetic: bool
    seconds: float

    @property
    def probabilities(self) -> Tensor:
        """(N, L): the average of the samples' probabilities."""
        return self.sample_probabilities.mean(dim=0)

    @property
    def labels(self) -> Tensor:
        """(N, L) bool: the labels that are more probable than not."""
        return self.probabilities > 0.5

    @property
    def total(self) -> Tensor:
        """(N, L) entropy of each label's average."""
        return _binary_entropy(self.probabilities)

    @property
    def aleatoric(self) -> Tensor:
        """(N, L) average entropy of the samples."""
        return _binary_entropy(self.sample_probabilities).mean(dim=0)

    @property
    def epistemic(self) -> Tensor:
        """(N, L) mutual information of each label and the weights, total minus aleatoric (never below 0)."""
        return (self.total - self.aleatoric).clamp(min=0)

    @property
    def standard_error(self) -> Tensor:
        """(N, L) Monte-Carlo standard error of ``probabilities``, as :attr:`Prediction.standard_error`."""
        return _standard_error(self.sample_probabilities, self.samples, self.antithetic)


@dataclass(frozen=True)
class RegressionPrediction:
    """Predictive mean of D outputs of N items and the spread of the samples around it, float32 on the CPU, in the outputs' units.

    The variance is the weights' alone (epistemic): a regression head says nothing about the noise of its targets.

    Attributes:
        sample_outputs: (S, N, D), the outputs of each sample; S = 1 for the mean adapter.
        sigma: posterior scale; 0 for the mean adapter.
        samples: sample numbers; empty for the mean adapter.
        antithetic: whether samples come in mirrored pairs.
        seconds: wall time of the forwards.
    """

    sample_outputs: Tensor
    sigma: float
    samples: tuple[int, ...]
    antithetic: bool
    seconds: float

    @property
    def mean(self) -> Tensor:
        """(N, D): the average of the samples' outputs."""
        return self.sample_outputs.mean(dim=0)

    @property
    def variance(self) -> Tensor:
        """(N, D) variance of one sample's output; 0 for the mean adapter; NaN below two samples, or two mirrored pairs.

        ``mean_s (y_s - mean)^2 + standard_error^2``: squares around the average of the samples fall short of the variance by
        that average's own, which mirrored pairs make smaller than the 1 / S of independent samples. For these it is the usual
        sum of squares over S - 1.
        """
        return self.sample_outputs.var(dim=0, correction=0) + self.standard_error.square()

    @property
    def standard_deviation(self) -> Tensor:
        """(N, D) square root of ``variance``."""
        return self.variance.sqrt()

    @property
    def standard_error(self) -> Tensor:
        """(N, D) Monte-Carlo standard error of ``mean``, as :attr:`Prediction.standard_error`."""
        return _standard_error(self.sample_outputs, self.samples, self.antithetic)


def predict(
    adapter: BayesianAdapter,
    data: Data,
    samples: int | Sequence[int] = 10,
    *,
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
        samples: how many samples, or their numbers; 0 for the mean adapter.
        sigma: posterior scale instead of the adapter's own.
        batch_size: rows before the fan; chosen by the device otherwise.
        progress: show a progress bar.

    Raises:
        ValueError: empty data, bad samples or sigma, or a head of more than 1024 classes (a vocabulary: call the model under
            ``adapter.predictive`` instead); a regression or multi-label head (:func:`predict_regression`,
            :func:`predict_multi_label`).
    """
    run = _run(adapter, data, samples, sigma, batch_size, progress, "categorical")
    return Prediction(run.values.exp(), tuple(getattr(data, "choices", ())), *run.facts)


def predict_multi_label(
    adapter: BayesianAdapter,
    data: Data,
    samples: int | Sequence[int] = 10,
    *,
    sigma: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> MultiLabelPrediction:
    """Predictive probability of every label for every item of ``data``; arguments as :func:`predict`, labels are not looked at.

    Raises:
        ValueError: as :func:`predict`, or a head of another kind (``problem_type`` of the model's configuration).
    """
    run = _run(adapter, data, samples, sigma, batch_size, progress, "multi_label")
    return MultiLabelPrediction(run.values.exp(), tuple(getattr(data, "choices", ())), *run.facts)


def predict_regression(
    adapter: BayesianAdapter,
    data: Data,
    samples: int | Sequence[int] = 10,
    *,
    sigma: float | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> RegressionPrediction:
    """Predictive mean and variance for every item of ``data``; arguments as :func:`predict`, labels are not looked at.

    Raises:
        ValueError: as :func:`predict`, or a head of another kind (``problem_type`` of the model's configuration).
    """
    run = _run(adapter, data, samples, sigma, batch_size, progress, "regression")
    return RegressionPrediction(run.values, *run.facts)


@dataclass(frozen=True)
class _Run:
    values: Tensor  # (S, N, C), what the scorer gives for the kind of head
    facts: tuple[float, tuple[int, ...], bool, float]  # sigma, samples, antithetic, seconds


def _run(
    adapter: BayesianAdapter,
    data: Data,
    samples: int | Sequence[int],
    sigma: float | None,
    batch_size: int | None,
    progress: bool,
    kind: Kind,
) -> _Run:
    mean = isinstance(samples, int) and not isinstance(samples, bool) and samples == 0
    batch = None if mean else adapter.batch(check_samples(samples), sigma)
    scorer = Scorer(adapter, data, batch_size=batch_size, samples=1 if batch is None else len(batch), kind=kind)
    classes = head_outputs(adapter)
    parts: list[Tensor] = []
    started = time.perf_counter()
    with tqdm(total=scorer.size, desc="predict", unit="item", disable=not progress) as bar:
        for item in scorer.batches:
            if item.columns is None and classes > MANY_CLASSES:
                raise ValueError(
                    f"the model's head has {classes} outputs; predict() is for label tokens (tfb_ext.encode) and "
                    "classification heads: for a vocabulary call the model inside adapter.predictive(...)"
                )
            values = scorer.mean(item)[None] if batch is None else scorer.samples(item, batch)
            parts.append(values.float().cpu())
            bar.update(len(item.index))
    facts = 0.0 if batch is None else batch.sigma[0], () if batch is None else batch.samples
    seconds = time.perf_counter() - started
    return _Run(original_order(parts, scorer.batches, dim=1), (*facts, adapter.antithetic, seconds))


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(dim=-1)


def _binary_entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)


def _standard_error(values: Tensor, samples: Sequence[int], antithetic: bool) -> Tensor:
    """Standard error of the mean over the first axis; mirrored pairs count as one."""
    if not samples:
        return torch.zeros_like(values[0])
    if antithetic and _is_paired(samples):
        values = values.reshape(-1, 2, *values.shape[1:]).mean(dim=1)
    if len(values) < 2:
        return torch.full_like(values[0], float("nan"))
    return values.std(dim=0) / len(values) ** 0.5


def _is_paired(samples: Sequence[int]) -> bool:
    pairs = zip(samples[::2], samples[1::2], strict=False)
    return len(samples) % 2 == 0 and all(a % 2 == 0 and b == a + 1 for a, b in pairs)
