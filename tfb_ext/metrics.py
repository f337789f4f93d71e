"""Accuracy and calibration of predicted class probabilities."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .checks import check_tensor, has_integers, kind
from .errors import refusal

BINS = 15


@dataclass(frozen=True)
class Metrics:
    """What ``evaluate`` returns; accuracy and ece are fractions, nll is in nats."""

    accuracy: float
    ece: float
    nll: float
    brier: float
    items: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, ready for JSON."""
        return asdict(self)


def evaluate(probabilities: Tensor, labels: Tensor) -> Metrics:
    """Judge ``probabilities`` (N, C) against ``labels`` (N,), integers from 0 to C - 1, all on one device.

    accuracy: the fraction of items whose most probable class is the label (torchmetrics).
    ece: expected calibration error of the most probable class, l1, 15 bins of equal width; torchmetrics keeps items of
        confidence exactly 1 apart, in a bin of their own.
    nll: mean of ``-log p(label)``; a probability below the smallest normal float32 (1.2e-38) counts as that, so one
        underflowed probability costs 87 nats and not infinity.
    brier: mean over items of the *sum* over classes of ``(p - y)^2``, from 0 to 2: for two classes twice the value that
        only looks at one of them.

    Raises:
        ValueError: wrong shapes or types, no items, NaN, probabilities outside [0, 1] or that do not sum to 1 (1e-3), a
            label that is no class.
    """
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    check(probabilities, labels)
    exact = probabilities.double()
    labels = labels.long()
    classes = exact.shape[1]
    target = torch.nn.functional.one_hot(labels, classes).double()
    log_probabilities = exact.clamp_min(torch.finfo(torch.float32).tiny).log()
    return Metrics(
        accuracy=multiclass_accuracy(exact, labels, classes, average="micro").item(),
        ece=multiclass_calibration_error(exact, labels, classes, n_bins=BINS, norm="l1").item(),
        nll=torch.nn.functional.nll_loss(log_probabilities, labels).item(),
        brier=torch.nn.functional.mse_loss(exact, target, reduction="sum").item() / len(labels),
        items=len(labels),
    )


def check(probabilities: Tensor, labels: Tensor) -> None:
    """Raise the ``ValueError`` of ``evaluate`` unless these are probabilities and labels of the same items."""
    check_tensor("probabilities", probabilities)
    if check_tensor("labels", labels).device != probabilities.device:
        fix = "labels.to(probabilities.device)"
        raise refusal("labels", labels.device, f"{probabilities.device}, where the probabilities are", fix)
    if probabilities.ndim != 2 or not probabilities.is_floating_point() or probabilities.shape[1] < 2:
        expected = "floating point of shape (items, classes), at least two classes"
        raise refusal("probabilities", kind(probabilities), expected, "pass the probabilities of a prediction")
    items, classes = probabilities.shape
    if labels.shape != (items,) or not has_integers(labels):
        raise refusal("labels", kind(labels), f"integers of shape ({items},)", "one for each row of probabilities")
    if not items:
        raise refusal("probabilities", "no items", "at least one", "leave an empty set out")
    for bad, expected in (
        (probabilities.isnan(), "no NaN"),
        ((probabilities < 0) | (probabilities > 1), "values from 0 to 1"),
        (((probabilities.double().sum(1) - 1).abs() > 1e-3)[:, None], "a sum of 1"),
    ):
        rows = bad.any(1).nonzero().flatten()
        if len(rows):
            got = f"{probabilities[rows[0]].tolist()} for item {int(rows[0])}"
            raise refusal("probabilities", got, expected, "pass probabilities, not logits")
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        got = f"{int(labels[wrong[0]])} for item {int(wrong[0])}"
        raise refusal("labels", got, f"0 to {classes - 1}", "count from 0, and leave unlabelled items out")
