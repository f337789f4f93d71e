"""What a prediction is: per-sample outputs, their average, and the uncertainty that their disagreement shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adaptive import is_paired


@dataclass(frozen=True)
class Probabilities:
    """Per-sample probabilities of N items, float32 on the CPU; entropies in nats.

    Attributes:
        sample_probabilities: (S, N, C), one distribution (or a probability of every label) a sample; S = 1 for the mean
            adapter, and for choices scored by tokens. NaN where an item did not need the sample.
        choices: names of the classes or labels, where they are known.
        sigma: posterior scale; 0 for the mean adapter.
        samples: sample numbers; empty for the mean adapter.
        antithetic: whether samples come in mirrored pairs.
        seconds: wall time of the forwards.
        expected_entropy: the average entropy, (N,) or of every label (N, L), where samples were integrated and not drawn.
            ``sample_probabilities`` holds their average alone then.
    """

    sample_probabilities: Tensor
    choices: tuple[str, ...]
    sigma: float
    samples: tuple[int, ...]
    antithetic: bool
    seconds: float
    expected_entropy: Tensor | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Prediction(Probabilities):
    """Predictive distribution of N items over C classes.

    Attributes:
        drawn: (N,) int64, how many of the samples, from the first on, each item got; ``None`` where all got all of them.
    """

    drawn: Tensor | None = None

    @property
    def probabilities(self) -> Tensor:
        """(N, C): the average of the samples' probabilities, the paper's posterior predictive."""
        return self._mean(self.sample_probabilities)

    @property
    def samples_drawn(self) -> Tensor:
        """(N,) int64: how many samples each item got; 0 for the mean adapter."""
        items = self.sample_probabilities.shape[1]
        return torch.full((items,), len(self.samples)) if self.drawn is None else self.drawn

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
        if self.expected_entropy is not None:
            return self.expected_entropy
        return self._mean(_entropy(self.sample_probabilities))

    @property
    def epistemic(self) -> Tensor:
        """(N,) mutual information of label and weights, total minus aleatoric (never below 0): what they disagree about."""
        return (self.total - self.aleatoric).clamp(min=0)

    @property
    def standard_error(self) -> Tensor:
        """(N, C) Monte-Carlo standard error of ``probabilities``; antithetic samples count as pairs.

        NaN below two of them, and where there is no distribution per sample.
        """
        p = self.sample_probabilities
        if not self.per_sample:
            return torch.full_like(p[0], math.nan)
        return _standard_error(p, self.samples, self.antithetic, self.drawn)

    @property
    def per_sample(self) -> bool:
        """Whether there is a distribution per sample; choices scored by their tokens have none."""
        return len(self.sample_probabilities) >= len(self.samples)

    def _mean(self, values: Tensor) -> Tensor:
        """Average (S, N, ...) over the samples that each item got."""
        if self.drawn is None:
            return values.mean(dim=0)
        got = torch.arange(len(values))[:, None] < self.drawn
        shape = (*got.shape, *[1] * (values.dim() - 2))
        return values.where(got.reshape(shape), 0).sum(dim=0) / self.drawn.reshape(shape[1:])


@dataclass(frozen=True)
class MultiLabelPrediction(Probabilities):
    """Predictive probabilities of L independent labels of N items: the sigmoid of each sample's outputs, averaged."""

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
        if self.expected_entropy is not None:
            return self.expected_entropy
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
        expected_variance: (N, D), the variance where it was computed and no samples were drawn.
    """

    sample_outputs: Tensor
    sigma: float
    samples: tuple[int, ...]
    antithetic: bool
    seconds: float
    expected_variance: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """(N, D): the average of the samples' outputs."""
        return self.sample_outputs.mean(dim=0)

    @property
    def variance(self) -> Tensor:
        """(N, D) variance of one sample's output; 0 for the mean adapter; NaN below two samples, or two mirrored pairs."""
        if self.expected_variance is not None:
            return self.expected_variance
        return sample_variance(self.sample_outputs, self.samples, self.antithetic)

    @property
    def standard_deviation(self) -> Tensor:
        """(N, D) square root of ``variance``."""
        return self.variance.sqrt()

    @property
    def standard_error(self) -> Tensor:
        """(N, D) Monte-Carlo standard error of ``mean``, as :attr:`Prediction.standard_error`."""
        return _standard_error(self.sample_outputs, self.samples, self.antithetic)


def sample_variance(values: Tensor, samples: Sequence[int], antithetic: bool) -> Tensor:
    """Variance (N, C) of one sample's values (S, N, C); NaN below two samples, or two mirrored pairs.

    ``mean_s (y_s - mean)^2 + standard_error^2``: squares around the average of the samples fall short of the variance by that
    average's own, which mirrored pairs make smaller than the 1 / S of independent samples. For these it is the usual sum of
    squares over S - 1.
    """
    return values.var(dim=0, correction=0) + _standard_error(values, samples, antithetic).square()


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(dim=-1)


def _binary_entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p) + torch.special.entr(1 - p)


def _standard_error(values: Tensor, samples: Sequence[int], antithetic: bool, drawn: Tensor | None = None) -> Tensor:
    """Standard error of the mean over the first axis (S, N, C), of which item n has the first ``drawn[n]``; mirrored pairs
    count as one."""
    if not samples:
        return torch.zeros_like(values[0])
    size = 2 if antithetic and is_paired(samples) else 1
    values = values.reshape(-1, size, *values.shape[1:]).mean(dim=1)
    if len(values) < 2:
        return torch.full_like(values[0], math.nan)
    if drawn is None:
        return values.std(dim=0) / len(values) ** 0.5
    draws = (drawn // size)[:, None]
    squares = (values - values.nanmean(dim=0)).square().nansum(dim=0)
    return (squares / (draws - 1) / draws).sqrt()
