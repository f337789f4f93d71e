"""What uncertainty is worth: whether it tells out-of-distribution items from in-distribution ones, and errors from right
answers.

Every score is higher for the more uncertain item. Only the order of the scores counts, and equal scores stay equal: an area under
a curve counts a tie half, a risk-coverage curve spreads the errors of tied items evenly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_number, check_tensor, kind
from .errors import refusal

if TYPE_CHECKING:
    from .prediction import Prediction

TPR = 0.95
COVERAGES = (0.5, 0.8, 0.9, 0.95)
RISKS = (0.01, 0.05, 0.1)
CURVE_POINTS = 100  # of a curve in JSON


def uncertainty_scores(prediction: Prediction) -> dict[str, Tensor]:
    """The scores of ``prediction`` by name, each (N,) float64.

    confidence: one minus the probability of the most probable class.
    total, aleatoric, epistemic: the entropies in nats, as :class:`~tfb_ext.prediction.Prediction` has them; a single sample
        has no ``epistemic``.
    """
    p = prediction.probabilities.double()
    top = p.argmax(dim=-1, keepdim=True)
    # Added up from the other classes: one minus the largest would round to 0 for every sure item.
    found = {"confidence": p.scatter(-1, top, 0.0).sum(dim=-1)}
    for name in ("total", "aleatoric", *(["epistemic"] if len(prediction.sample_probabilities) > 1 else [])):
        found[name] = getattr(prediction, name).double()
    return found


@dataclass(frozen=True)
class Detection:
    """What ``detection`` returns, all of it fractions; out-of-distribution items are the positive class.

    Attributes:
        auroc: area under the ROC curve: the probability that an out-of-distribution item's score is above an in-distribution
            item's, ties counted half.
        aupr: area under the precision-recall curve (average precision); a score without use has the share of the positives.
        aupr_in: the same with the in-distribution items as the positive class, and the score negated.
        fpr95: the smallest share of in-distribution items above a threshold that finds at least 95 % of the others.
        items_in, items_out: how many items in and out of distribution.
    """

    auroc: float
    aupr: float
    aupr_in: float
    fpr95: float
    items_in: int
    items_out: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, ready for JSON."""
        return asdict(self)


def detection(scores_in: Tensor, scores_out: Tensor) -> Detection:
    """How well a score of uncertainty tells out-of-distribution items from the data's own.

    Args:
        scores_in: (N_in,) floating point, of in-distribution items, higher for the more uncertain.
        scores_out: (N_out,) of out-of-distribution items.

    Raises:
        ValueError: wrong shapes or types, no items on either side, NaN.
    """
    from torchmetrics.functional.classification import binary_average_precision, binary_roc

    n_in, n_out = _check_scores("scores_in", scores_in), _check_scores("scores_out", scores_out)
    ranks = _ranks(torch.cat([scores_in.double().cpu(), scores_out.double().cpu()]))
    out = torch.cat([torch.zeros(n_in), torch.ones(n_out)]).long()
    fpr, tpr, _ = binary_roc(ranks, out)
    # Counted in whole items: 19 of 20 are 95 %, whatever 0.95 rounds to.
    found = (tpr.double() * n_out).round() >= ceil(TPR * n_out - 1e-9)
    return Detection(
        auroc=_auroc(ranks, out),
        aupr=binary_average_precision(ranks, out).item(),
        aupr_in=binary_average_precision(1 - ranks, 1 - out).item(),
        fpr95=fpr[found].min().item(),
        items_in=n_in,
        items_out=n_out,
    )


@dataclass(frozen=True)
class Selective:
    """What ``selective`` returns: the error rate (risk) if only the surer items are answered.

    Attributes:
        coverage: (N,) float64, share of items answered: n / N for the n = 1 .. N least uncertain.
        risk: (N,) float64, error rate among these.
        aurc: area under the risk-coverage curve, the mean of ``risk`` (Geifman and El-Yaniv); lower is better.
        eaurc: excess of ``aurc`` over that of the best order, all errors last, at the same accuracy.
        auroc: probability that an error's score is above a right answer's, ties counted half; ``None`` where all are of a kind.
    """

    coverage: Tensor
    risk: Tensor
    aurc: float
    eaurc: float
    auroc: float | None

    def risk_at(self, coverage: float) -> float:
        """Error rate if at least this share of the items, in (0, 1], is answered."""
        share = check_number("coverage", coverage, lambda c: 0 < c <= 1, "a share of the items above 0 and up to 1")
        items = ceil(share * len(self.risk) - 1e-9)
        return self.risk[max(items, 1) - 1].item()

    def coverage_at(self, risk: float) -> float:
        """The largest share of items that can be answered with an error rate of at most ``risk``, in [0, 1]; 0 if none."""
        most = check_number("risk", risk, lambda r: 0 <= r <= 1, "an error rate from 0 to 1")
        below = (self.risk <= most + 1e-12).nonzero().flatten()
        return self.coverage[below[-1]].item() if len(below) else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: the areas, the risk at ``COVERAGES``, the coverage at ``RISKS``, and the curve at up to 100 points."""
        step = max(len(self.risk) / CURVE_POINTS, 1.0)
        at = sorted({ceil(step * (i + 1) - 1e-9) - 1 for i in range(min(len(self.risk), CURVE_POINTS))})
        return {
            "aurc": self.aurc,
            "eaurc": self.eaurc,
            "auroc": self.auroc,
            "risk_at_coverage": {f"{c:g}": self.risk_at(c) for c in COVERAGES},
            "coverage_at_risk": {f"{r:g}": self.coverage_at(r) for r in RISKS},
            "curve": {"coverage": self.coverage[at].tolist(), "risk": self.risk[at].tolist()},
        }


def selective(scores: Tensor, wrong: Tensor) -> Selective:
    """Selective prediction by a score of uncertainty: the surest items are answered first.

    Args:
        scores: (N,) floating point, higher for the more uncertain.
        wrong: (N,) bool, whether the prediction is an error.

    Raises:
        ValueError: wrong shapes or types, no items, NaN.
    """
    items = _check_scores("scores", scores)
    if not isinstance(wrong, Tensor) or wrong.shape != scores.shape or wrong.dtype != torch.bool:
        raise refusal("wrong", kind(wrong), f"bool of shape ({items},)", "one for each score")
    scores, wrong = scores.cpu(), wrong.cpu()
    errors = int(wrong.sum())
    n = torch.arange(1, items + 1, dtype=torch.float64)
    _, group, counts = scores.unique(return_inverse=True, return_counts=True)
    group_errors = torch.bincount(group, weights=wrong.double(), minlength=len(counts))
    # Items of one score come in no order: among the first n of a group of ties are their share of its errors.
    ordered = group.sort().values
    before = group_errors.cumsum(0) - group_errors
    place = n - (counts.cumsum(0) - counts)[ordered]
    risk = (before[ordered] + group_errors[ordered] * place / counts[ordered]) / n
    best = (n - (items - errors)).clamp(min=0) / n
    aurc = risk.mean().item()
    return Selective(
        coverage=n / items,
        risk=risk,
        aurc=aurc,
        eaurc=max(aurc - best.mean().item(), 0.0),
        auroc=_auroc(_ranks(scores), wrong.long()) if 0 < errors < items else None,
    )


def _auroc(ranks: Tensor, positive: Tensor) -> float:
    from torchmetrics.functional.classification import binary_auroc

    return binary_auroc(ranks, positive).item()


def _ranks(scores: Tensor) -> Tensor:
    """The order of the scores as float64 from 0 to 1, ties equal."""
    # torchmetrics squashes what lies outside, which ties large scores, and a scale would tie close ones.
    values, inverse = scores.unique(return_inverse=True)
    return inverse.double() / max(len(values) - 1, 1)


def _check_scores(name: str, scores: Tensor) -> int:
    """How many scores there are."""
    if check_tensor(name, scores).ndim != 1 or not scores.is_floating_point() or not len(scores):
        expected = "floating point of shape (items,), at least one"
        raise refusal(name, kind(scores), expected, "one score for each item")
    bad = scores.isnan().nonzero().flatten()
    if len(bad):
        raise refusal(name, f"NaN for item {bad[0].item()}", "none", "leave the item out")
    return len(scores)
