"""Class probabilities averaged over posterior samples, and the uncertainty that the samples' disagreement shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .adapter import BayesianAdapter, check_samples
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
        p = self.sample_probabilities
        if not self.samples:
            return torch.zeros_like(p[0])
        if self.antithetic and _is_paired(self.samples):
            p = p.reshape(-1, 2, *p.shape[1:]).mean(dim=1)
        if len(p) < 2:
            return torch.full_like(p[0], float("nan"))
        return p.std(dim=0) / len(p) ** 0.5


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
        data: an encoded set, or batches of model arguments for a classification head.
        samples: how many samples, or their numbers; 0 for the mean adapter.
        sigma: posterior scale instead of the adapter's own.
        batch_size: rows before the fan; chosen by the device otherwise.
        progress: show a progress bar.

    Raises:
        ValueError: empty data, bad samples or sigma, or a head of more than 1024 classes (a vocabulary: call the model under
            ``adapter.predictive`` instead).
    """
    mean = isinstance(samples, int) and not isinstance(samples, bool) and samples == 0
    batch = None if mean else adapter.batch(check_samples(samples), sigma)
    scorer = Scorer(adapter, data, batch_size=batch_size, samples=1 if batch is None else len(batch))
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
            logs = scorer.mean(item)[None] if batch is None else scorer.samples(item, batch)
            parts.append(logs.exp().float().cpu())
            bar.update(len(item.index))
    choices = getattr(data, "choices", ())
    return Prediction(
        original_order(parts, scorer.batches, dim=1),
        tuple(choices),
        0.0 if batch is None else batch.sigma[0],
        () if batch is None else batch.samples,
        adapter.antithetic,
        time.perf_counter() - started,
    )


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(dim=-1)


def _is_paired(samples: Sequence[int]) -> bool:
    pairs = zip(samples[::2], samples[1::2], strict=False)
    return len(samples) % 2 == 0 and all(a % 2 == 0 and b == a + 1 for a, b in pairs)
