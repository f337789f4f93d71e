"""Accuracy and calibration of predicted class probabilities."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

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
    for name, value in (("probabilities", probabilities), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: got a {type(value).__name__}, expected a tensor. Fix: torch.as_tensor({name})")
    if labels.device != probabilities.device:
        raise ValueError(
            f"labels: got {labels.device}, expected {probabilities.device}, where the probabilities are. Fix: "
            "labels.to(probabilities.device)"
        )
    if probabilities.ndim != 2 or not probabilities.is_floating_point() or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities: {probabilities.dtype} of shape {tuple(probabilities.shape)}; expected floating point of "
            "shape (items, classes), at least two classes"
        )
    if labels.shape != probabilities.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: {labels.dtype} of shape {tuple(labels.shape)}; expected integers of shape "
            f"({len(probabilities)},), one for each row of probabilities"
        )
    if not len(labels):
        raise ValueError("probabilities: no items; expected at least one")
    _refuse_rows(probabilities.isnan().any(1), probabilities, "no NaN")
    _refuse_rows(((probabilities < 0) | (probabilities > 1)).any(1), probabilities, "values from 0 to 1 (not logits)")
    sums = probabilities.double().sum(1)
    _refuse_rows((sums - 1).abs() > 1e-3, probabilities, "a sum of 1")
    wrong = ((labels < 0) | (labels >= probabilities.shape[1])).nonzero().flatten()
    if len(wrong):
        raise ValueError(
            f"labels: item {wrong[0].item()} is {labels[wrong[0]].item()}; expected 0 to {probabilities.shape[1] - 1}"
        )


def _refuse_rows(bad: Tensor, probabilities: Tensor, expected: str) -> None:
    rows = bad.nonzero().flatten()
    if len(rows):
        row = probabilities[rows[0]]
        raise ValueError(f"probabilities: item {rows[0].item()} is {row.tolist()}; expected {expected}")
