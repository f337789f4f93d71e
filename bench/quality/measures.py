"""Measures of predictions: accuracy, calibration, and how well the uncertainty ranks errors and out-of-distribution prompts.

Accuracy, ECE, NLL and Brier are ``tfb_ext.evaluate``'s, areas under curves torchmetrics'. Three scores of uncertainty are
judged, each higher for the more uncertain item: the confidence (minus the top probability), the entropy of the mean probabilities
(total uncertainty) and the mutual information (epistemic). Where one number has to do: errors by confidence, for that is what a
prediction is taken or left by, and out-of-distribution prompts by entropy, for the mutual information of a single pass is zero, so it cannot
compare methods; all three are in every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tfb_ext

BINS = 15
SCORES = ("confidence", "entropy", "information")


@dataclass(frozen=True)
class Predicted:
    """One set of predictions, as the measures want them.

    Attributes:
        probabilities: (N, C) float64, rows sum to 1.
        labels: (N,) int64.
        scores, strange: name in ``SCORES`` -> (N,) and (N_stranger,) float64, the higher the more uncertain.
    """

    probabilities: Tensor
    labels: Tensor
    scores: dict[str, Tensor]
    strange: dict[str, Tensor]

    @property
    def wrong(self) -> Tensor:
        """(N,) bool."""
        return self.probabilities.argmax(1) != self.labels


def measure(predicted: Predicted) -> dict[str, float | None]:
    """Every measure by name; an area that does not exist (no error, no out-of-distribution prompt) is None."""
    metrics = tfb_ext.evaluate(predicted.probabilities, predicted.labels)
    values: dict[str, float | None] = {
        "accuracy": metrics.accuracy,
        "ece": metrics.ece,
        "nll": metrics.nll,
        "brier": metrics.brier,
        "aurc": aurc(predicted.scores["confidence"], predicted.wrong),
    }
    for name in SCORES:
        own, strange = predicted.scores[name], predicted.strange[name]
        values[f"auroc_error_{name}"] = auroc(own, predicted.wrong)
        outside = torch.cat([torch.zeros(len(own)), torch.ones(len(strange))]).bool()
        values[f"auroc_ood_{name}"] = auroc(torch.cat([own, strange]), outside)
    values["auroc_error"] = values["auroc_error_confidence"]
    values["auroc_ood"] = values["auroc_ood_entropy"]
    return values


def auroc(scores: Tensor, positive: Tensor) -> float | None:
    """Probability that a positive's score is above a negative's, ties counted half; None where either kind is missing."""
    from torchmetrics.functional.classification import binary_auroc

    if positive.all() or not positive.any():
        return None
    span = (scores.max() - scores.min()).clamp(min=torch.finfo(scores.dtype).tiny)
    # Within [0, 1], or torchmetrics would squash them and tie what is large.
    return binary_auroc((scores - scores.min()) / span, positive.long()).item()


def risk_coverage(scores: Tensor, wrong: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Error rate among the n least uncertain items, for n = 1 .. N.

    Items of one score come in no order, so the errors among them count as spread evenly.

    Returns:
        coverage n / N and risk, both (N,).
    """
    values, inverse, counts = np.unique(scores.numpy(), return_inverse=True, return_counts=True)
    errors = np.bincount(inverse, weights=wrong.double().numpy(), minlength=len(values))
    n = np.arange(1, len(wrong) + 1)
    total = np.interp(n, np.concatenate([[0], counts.cumsum()]), np.concatenate([[0], errors.cumsum()]))
    return n / len(wrong), total / n


def aurc(scores: Tensor, wrong: Tensor) -> float:
    """Area under the risk-coverage curve: the mean error rate over all coverages (Geifman and El-Yaniv), lower is better."""
    return float(risk_coverage(scores, wrong)[1].mean())


def fit_temperature(log_probabilities: Tensor, labels: Tensor) -> float:
    """The temperature T of ``softmax(log p / T)`` with the lowest NLL (Guo et al. 2017), within [1/20, 20].

    The NLL is convex in 1 / T; LBFGS finds its minimum.
    """
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(log_probabilities / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().exp().clamp(1 / 20, 20))


@dataclass(frozen=True)
class Difference:
    """``value`` of a minus b, its standard error and its 95 % interval over bootstrap draws of the test items."""

    value: float
    error: float
    low: float
    high: float


def compare(a: list[Predicted], b: list[Predicted], draws: int = 1000, seed: int = 0) -> dict[str, Difference]:
    """Paired bootstrap of accuracy, ECE, NLL and Brier: mean over ``a`` minus mean over ``b``.

    Every draw takes the same test items for all predictions of both, so what is common to them (hard items) cancels. Lists
    hold one set of predictions a training seed; they may be of different lengths (an ensemble is one).

    Raises:
        ValueError: predictions of different test items.
    """
    labels = a[0].labels
    if any(not torch.equal(labels, p.labels) for p in (*a, *b)):
        raise ValueError("the predictions have different labels; compare predictions of one test set")
    n = len(labels)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=draws)
    weights = np.concatenate([np.ones((1, n)), counts])  # the first row is the test set itself
    mean = [np.mean([_weighted(p, weights) for p in side], axis=0) for side in (a, b)]
    change = mean[0] - mean[1]
    return {
        name: Difference(
            float(values[0]),
            float(values[1:].std(ddof=1)),
            *(float(q) for q in np.quantile(values[1:], [0.025, 0.975])),
        )
        for name, values in zip(("accuracy", "ece", "nll", "brier"), change, strict=True)
    }


def _weighted(p: Predicted, weights: np.ndarray) -> np.ndarray:
    """Accuracy, ECE, NLL and Brier (4, W) under W weightings (W, N) of the items, each of sum N."""
    n = len(p.labels)
    confidence, top = p.probabilities.max(1)
    hit = (top == p.labels).double()
    own = p.probabilities.gather(1, p.labels[:, None])[:, 0].clamp(min=torch.finfo(torch.float32).tiny)
    squares = p.probabilities.square().sum(1) - 2 * own + 1
    members = torch.nn.functional.one_hot((confidence * BINS).long().clamp(max=BINS - 1), BINS)
    gaps = weights @ (members * (confidence - hit)[:, None]).numpy()
    rows = [weights @ hit.numpy(), np.abs(gaps).sum(1), weights @ -own.log().numpy(), weights @ squares.numpy()]
    return np.stack(rows) / n


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (ddof 1; None of a single one)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values with numbers rounded to six digits, for files that people read."""
    return {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in values.items()}
