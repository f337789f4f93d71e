"""What ``tfb evaluate`` measures of the mean adapter and its posterior, as tables, JSON and a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.adapter import BayesianAdapter
from ..data import Encoded
from ..metrics import Metrics, evaluate
from ..posterior.config import By
from ..prediction import Prediction, predict
from ..uncertainty import COVERAGES, RISKS, Detection, Selective, detection, selective, uncertainty_scores
from . import pictures
from .pages import METRIC_COLUMNS, Table, html_report, metric_row


@dataclass(frozen=True)
class Measured:
    """One set of predictions and what it is worth.

    Attributes:
        key: ``mean`` or ``tfb``.
        scores, scores_out: uncertainty of the labelled items, and of the out-of-distribution items if there are any.
        selective, detection: name of a score -> how well it finds errors, and out-of-distribution items.
    """

    key: str
    name: str
    prediction: Prediction
    metrics: Metrics
    scores: dict[str, Tensor]
    scores_out: dict[str, Tensor]
    selective: dict[str, Selective]
    detection: dict[str, Detection]


def drawn(prediction: Prediction) -> str:
    """How many samples an item got, on average and of how many where that differs; ``"linear"`` where none was drawn."""
    if prediction.expected_entropy is not None:
        return "linear"
    most, mean = len(prediction.samples), float(prediction.samples_drawn.double().mean())
    return f"{most} samples" if prediction.drawn is None else f"{mean:.1f} of {most} samples"


def measure(
    adapter: BayesianAdapter,
    items: Encoded,
    out: Encoded | None,
    by: By,
    samples: int,
    adaptive: float | None,
    batch_size: int | None,
    errors: bool,
) -> list[Measured]:
    """The mean adapter and the posterior on labelled items, and on the out-of-distribution items ``out``."""
    labels, measured = items.labels_tensor(), []
    for key, number, way in (("mean", 0, {}), ("tfb", samples, {"by": by, "adaptive": adaptive})):
        options: dict[str, Any] = {**way, "batch_size": batch_size, "progress": True}
        found = predict(adapter, items, number, **options)
        scores = uncertainty_scores(found)
        scores_out = {} if out is None else uncertainty_scores(predict(adapter, out, number, **options))
        measured.append(
            Measured(
                key=key,
                name="mean adapter" if key == "mean" else f"TFB, {drawn(found)}",
                prediction=found,
                metrics=evaluate(found.probabilities, labels),
                scores=scores,
                scores_out=scores_out,
                selective={name: selective(s, found.labels != labels) for name, s in scores.items()} if errors else {},
                detection={name: detection(scores[name], s) for name, s in scores_out.items()},
            )
        )
    return measured


def document(measured: Sequence[Measured], ood: str | None) -> dict[str, Any]:
    """What was measured, ready for JSON."""

    def each(part: str) -> dict[str, Any]:
        return {m.key: {name: value.to_dict() for name, value in getattr(m, part).items()} for m in measured}

    found: dict[str, Any] = {m.key: m.metrics.to_dict() for m in measured}
    found["samples_drawn"] = float(measured[-1].prediction.samples_drawn.double().mean())
    if measured[0].selective:
        found["selective"] = each("selective")
    if measured[0].detection:
        found["ood"] = {"data": ood, **each("detection")}
    return found


def tables(measured: Sequence[Measured], data: str, ood: str | None) -> list[Table]:
    """Metrics, then selective prediction and out-of-distribution detection where they were asked for."""
    rows = [metric_row(m.name, m.prediction.sigma, m.metrics, m.prediction.seconds, 4) for m in measured]
    items = len(measured[0].prediction.labels)
    found = [Table(f"{data}: {items} items", METRIC_COLUMNS, rows, "ECE: 15 bins, l1, top label.")]
    if measured[0].selective:
        found.append(_selective_table(measured, items))
    if measured[0].detection:
        found.append(_detection_table(measured, str(ood)))
    return found


def _selective_table(measured: Sequence[Measured], items: int) -> Table:
    shares = *(f"risk at {c:.0%}" for c in COVERAGES), *(f"coverage at {r:.0%}" for r in RISKS)
    rows = [
        (
            m.name,
            score,
            f"{s.aurc:.4f}",
            f"{s.eaurc:.4f}",
            "n/a" if s.auroc is None else f"{s.auroc:.1%}",
            *(f"{s.risk_at(c):.1%}" for c in COVERAGES),
            *(f"{s.coverage_at(r):.1%}" for r in RISKS),
        )
        for m in measured
        for score, s in m.selective.items()
    ]
    note = "Risk: error rate among the surest share of the items that is answered; AURC: its mean over all shares. Lower is better."
    if any(s.auroc is None for m in measured for s in m.selective.values()):
        note += " n/a: all answers of one kind, right or wrong, so there is nothing to tell apart."
    columns = ("model", "score", "AURC", "excess", "AUROC of errors", *shares)
    return Table(f"Selective prediction: {items} items, the surest first", columns, rows, note)


def _detection_table(measured: Sequence[Measured], ood: str) -> Table:
    rows = [
        (m.name, score, f"{d.auroc:.1%}", f"{d.aupr:.1%}", f"{d.aupr_in:.1%}", f"{d.fpr95:.1%}")
        for m in measured
        for score, d in m.detection.items()
    ]
    first = next(iter(measured[0].detection.values()))
    share = first.items_out / (first.items_in + first.items_out)
    title = f"Out of distribution: {first.items_out} items of {ood} against {first.items_in} of the data"
    note = (
        "Items out of distribution are the positive class; AUPR in: those of the data are. By chance: AUROC 50 %, AUPR "
        f"{share:.1%}, AUPR in {1 - share:.1%}, FPR 95 %. The mean adapter cannot disagree with itself: it has no epistemic score."
    )
    return Table(title, ("model", "score", "AUROC", "AUPR", "AUPR in", "FPR at 95 % TPR"), rows, note)


def write_report(
    folder: Path, measured: Sequence[Measured], labels: Tensor, tables: Sequence[Table], facts: Mapping[str, str]
) -> Path:
    """``report.html`` and its pictures in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {"Reliability before and after": folder / "reliability.png"}
    panels = {m.name: (m.prediction.probabilities, labels) for m in measured}
    pictures.reliability_diagram(panels, folder / "reliability.png")
    if measured[0].selective:
        images["Errors among the answers given, the surest first"] = folder / "risk_coverage.png"
        pictures.risk_coverage_diagram({m.name: m.selective for m in measured}, folder / "risk_coverage.png")
    if measured[0].detection:
        images["Uncertainty in and out of distribution"] = folder / "out_of_distribution.png"
        both = {m.name: (m.scores, m.scores_out) for m in measured}
        pictures.score_histograms(both, folder / "out_of_distribution.png")
    html_report(folder / "report.html", "tfb_ext: evaluation", tables, images, facts)
    return folder / "report.html"
