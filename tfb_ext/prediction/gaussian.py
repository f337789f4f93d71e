"""The posterior predictive in closed form: Gaussian outputs of every item, to first order, for every sigma at once."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..adapters.adapter import BayesianAdapter
from ..checks import MOST_SIGMA, check_count, check_number, check_seed
from ..errors import refusal
from ..forward.anatomy import Kind
from ..forward.batches import Data
from ..forward.linear import linearised
from ..quadrature import softmax_moments
from .results import MultiLabelPrediction, Prediction, RegressionPrediction

CPU = torch.device("cpu")
POINTS = 2**14  # of the quadrature over three classes and more


@dataclass(frozen=True)
class Gaussian:
    """Gaussian outputs of N items, float64 on the CPU: ``z ~ N(mean, sigma^2 covariance)`` for each, to first order in sigma.

    The outputs are the logits of classes or labels, the log probabilities of choices of several tokens (by token, if the set says
    so), or a regression's values. Items share weights, so their outputs are correlated with each other, which is not said here.

    Attributes:
        mean: (N, C) the mean adapter's outputs.
        covariance: (N, k, k) at sigma 1, of ``classes``.
        classes: (N, k) int64, the outputs that vary, where these are not all of them; the others stay at their mean.
        kind: what the outputs are: ``"categorical"``, ``"multi_label"`` or ``"regression"``.
        choices: names of the classes or labels, where they are known.
        seconds: wall time of the passes.
        device: where averages over it are computed; they come back to the CPU.
    """

    mean: Tensor
    covariance: Tensor
    classes: Tensor | None
    kind: Kind
    choices: tuple[str, ...]
    seconds: float
    device: torch.device = CPU

    @property
    def variance(self) -> Tensor:
        """(N, C) at sigma 1."""
        found = self.covariance.diagonal(dim1=1, dim2=2)
        return found if self.classes is None else torch.zeros_like(self.mean).scatter(1, self.classes, found)

    def predict(
        self, sigma: float, temperature: float = 1.0, *, points: int = POINTS
    ) -> Prediction | MultiLabelPrediction | RegressionPrediction:
        """The prediction of infinitely many samples at ``sigma``, by a deterministic rule.

        Two classes, and each of several labels, are one integral, right to 1e-12. More classes are quasi-Monte-Carlo, see
        :func:`tfb_ext.quadrature.softmax_moments`; at the default the largest errors seen for three classes are 1e-5 where the
        logits vary by about 1, 1e-4 where by about 8. A regression's variance needs no rule.

        Args:
            sigma: posterior scale; 0 for the mean adapter.
            temperature: divides the log of the averaged probability. ``total`` is that of the result, and ``epistemic`` stays what
                it is without one.
            points: of the rule for more classes; powers of two are balanced.

        Raises:
            ValueError: sigma is no finite number of at least 0, or temperature none above 0; a temperature of a regression.
        """
        sigma = check_number("sigma", sigma, lambda s: 0 <= s <= MOST_SIGMA, "a finite number of at least 0")
        temperature = check_number("temperature", temperature, lambda t: 0 < t < math.inf, "a finite number above 0")
        facts = (sigma, (), False, self.seconds)
        if self.kind == "regression":
            if temperature != 1:
                raise refusal(
                    "temperature", temperature, "1 for a regression, which has no probabilities", "leave it out"
                )
            return RegressionPrediction(self.mean.float()[None], *facts, (sigma**2 * self.variance).float())
        if self.kind == "multi_label":
            z = torch.stack([self.mean, torch.zeros_like(self.mean)], dim=-1).flatten(0, 1)
            factor = torch.stack([self.variance.clamp(min=0).sqrt(), torch.zeros_like(self.mean)], dim=-1)
            p, entropy = self._averages(z, factor.flatten(0, 1)[..., None], sigma, points)
            tempered, entropy = _tempered(p, entropy, temperature)
            shape = self.mean.shape
            probabilities = tempered[:, 0].view(shape).float()[None]
            return MultiLabelPrediction(
                probabilities, self.choices, *facts, expected_entropy=entropy.view(shape).float()
            )
        p, entropy = _tempered(*self.averages(sigma, points), temperature)
        return Prediction(p.float()[None], self.choices, *facts, expected_entropy=entropy.float())

    def averages(self, sigma: float, points: int = POINTS) -> tuple[Tensor, Tensor]:
        """(N, C) mean probabilities of the classes and (N,) mean entropy at ``sigma``, float64; see :meth:`predict`."""
        return self._averages(self.mean, self._differences, sigma, points)

    def _averages(self, mean: Tensor, factor: Tensor, sigma: float, points: int) -> tuple[Tensor, Tensor]:
        scale = mean.new_full((len(mean),), sigma)
        mean, factor, scale = (part.to(self.device) for part in (mean, factor, scale))
        p, entropy = softmax_moments(mean, factor, scale, points)
        return p.cpu(), entropy.cpu()

    def sample_logits(self, samples: int, sigma: float, seed: int = 0) -> Tensor:
        """Draws (samples, N, C) of the outputs, independent for every item.

        Raises:
            ValueError: samples is no count, sigma no finite number of at least 0, or seed no 64-bit number.
        """
        samples = check_count("samples", samples)
        sigma = check_number("sigma", sigma, lambda s: 0 <= s <= MOST_SIGMA, "a finite number of at least 0")
        factor = self._embedded(_root(self.covariance))
        generator = torch.Generator().manual_seed(check_seed(seed))
        z = torch.randn(samples, *factor.shape[::2], generator=generator, dtype=torch.float64)
        return self.mean + sigma * torch.einsum("ncq,snq->snc", factor, z)

    @cached_property
    def _differences(self) -> Tensor:
        """(N, C, k): a root of the covariance without what all classes share, of at most C - 1 directions, the largest first."""
        if self.classes is not None:
            return self._embedded(_root(self.covariance))
        centred = self.covariance - self.covariance.mean(dim=1, keepdim=True)
        return _root(centred - centred.mean(dim=2, keepdim=True))[..., : max(self.mean.shape[1] - 1, 0)]

    def _embedded(self, factor: Tensor) -> Tensor:
        """Rows of ``classes`` -> of all classes."""
        if self.classes is None:
            return factor
        room = factor.new_zeros(*self.mean.shape, factor.shape[-1])
        return room.scatter(1, self.classes[..., None].expand_as(factor), factor)


def gaussian(
    adapter: BayesianAdapter,
    data: Data,
    *,
    batch_size: int | None = None,
    progress: bool = False,
    kind: Kind | None = None,
    centred: bool = False,
) -> Gaussian:
    """Every item's outputs as a Gaussian, see :meth:`tfb_ext.BayesianAdapter.gaussian`.

    Args:
        kind: what the head must be.
        centred: whether classes' logits may be taken less their mean, as a softmax takes them: a backward pass less.
    """
    kind = adapter.anatomy.kind if kind is None else kind
    started = time.perf_counter()
    found = linearised(adapter, data, kind, batch_size, progress, centred)
    choices = tuple(getattr(data, "choices", ())) if kind != "regression" else ()
    seconds = time.perf_counter() - started
    return Gaussian(found.mean, found.covariance, found.classes, kind, choices, seconds, device_of(adapter))


def device_of(adapter: BayesianAdapter) -> torch.device:
    """Where averages over an adapter's outputs are computed: on its GPU, which is far faster at float64 than the host, or the CPU."""
    device = adapter.anatomy.device
    return device if device.type == "cuda" else CPU


def _root(covariance: Tensor) -> Tensor:
    """(N, C, C): F with ``F F^T`` the covariance, its columns orthogonal, the longest first, and each with a sign of its own."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return vectors * largest.sign() * values.clamp(min=0).sqrt()[:, None]


def _tempered(p: Tensor, entropy: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) at a temperature, and what of their entropy is not between the samples."""
    if temperature == 1:
        return p, entropy
    tempered = torch.softmax(p.log() / temperature, dim=-1)
    between = torch.special.entr(p).sum(-1) - entropy
    return tempered, (torch.special.entr(tempered).sum(-1) - between).clamp(min=0)
