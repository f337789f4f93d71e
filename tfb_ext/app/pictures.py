"""Pictures as PNG files: reliability diagrams, risk-coverage curves, histograms, the trace of a search."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import write_atomically
from ..metrics import BINS, check, evaluate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..search import SigmaSearch
    from ..uncertainty import Selective

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, RED, GREEN = "#2f6db3", "#d64545", "#2d8a5f"
CURVES = (MUTED, BLUE, RED, GREEN)
AXIS_NAMES = {"nll": "NLL (nats)", "accuracy": "accuracy", "flips": "changed predictions", "brier": "Brier score"}


@dataclass(frozen=True)
class Reliability:
    """Items of one set by the confidence of their prediction, in bins of equal width over [0, 1].

    Attributes:
        counts: (bins,) items in each bin.
        confidence, accuracy: (bins,) means over the items of the bin; NaN where it is empty.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> Reliability:
    """Items binned by the probability of their most probable class.

    A confidence on an inner edge counts in the bin above it, 1.0 in the last one.

    Args:
        probabilities: (N, C).
        labels: (N,) integers.

    Raises:
        ValueError: as ``metrics.evaluate``.
    """
    check(probabilities, labels)
    confidence, predicted = probabilities.double().max(1)
    index = (confidence * bins).long().clamp_max(bins - 1)
    counts = torch.bincount(index, minlength=bins)
    hits = torch.bincount(index, weights=(predicted == labels).double(), minlength=bins)
    mass = torch.bincount(index, weights=confidence, minlength=bins)
    return Reliability(counts.cpu(), (mass / counts).cpu(), (hits / counts).cpu())


def reliability_diagram(panels: Mapping[str, tuple[Tensor, Tensor]], path: str | Path) -> None:
    """Draw accuracy against confidence, one panel for each set of predictions.

    Blue bars: accuracy in a bin of confidence. Hatched red: the gap to the mean confidence there. Below: the share of items
    in each bin.

    Args:
        panels: name -> (probabilities (N, C), labels (N,)).
        path: the file to write; its folder is made.

    Raises:
        ValueError: no panels, or as ``metrics.evaluate``.
    """
    if not panels:
        raise ValueError("panels: {}; expected at least one name with its probabilities and labels")
    figure = _figure(4.2 * len(panels) + 0.6, 5.2)
    grid = figure.add_gridspec(2, len(panels), height_ratios=(3.4, 1), hspace=0.08, wspace=0.18)
    share = None
    for column, (name, (probabilities, labels)) in enumerate(panels.items()):
        bins, metrics = reliability(probabilities, labels), evaluate(probabilities, labels)
        upper = _axes(figure, grid[0, column])
        lower = _axes(figure, grid[1, column], sharex=upper, sharey=share)
        share = share or lower
        _draw_bins(upper, lower, bins)
        lower.set_xlabel(f"confidence ({metrics.items} items)")
        _title(upper, f"{name}\nECE {metrics.ece:.1%},  accuracy {metrics.accuracy:.1%}")
        upper.tick_params(labelbottom=False, labelleft=column == 0)
        lower.tick_params(labelleft=column == 0)
        if column == 0:
            upper.set_ylabel("accuracy")
            upper.legend(loc="upper left", frameon=False, fontsize=9)
            lower.set_ylabel("share of items")
    _write(figure, path)


def _draw_bins(upper: Axes, lower: Axes, bins: Reliability) -> None:
    count = len(bins.counts)
    centres = (torch.arange(count) + 0.5) / count
    filled = bins.counts > 0
    at, accuracy, confidence = (part[filled].tolist() for part in (centres, bins.accuracy, bins.confidence))
    width = 0.92 / count
    upper.bar(at, accuracy, width, color=BLUE, label="accuracy", zorder=2)
    gaps = [c - a for c, a in zip(confidence, accuracy, strict=True)]
    hatched: dict[str, Any] = {
        "color": "#f6dcdc",
        "edgecolor": RED,
        "hatch": "////",
        "lw": 0.8,
        "label": "gap to the confidence",
    }
    upper.bar(at, gaps, width, bottom=accuracy, zorder=3, **hatched)
    upper.plot([0, 1], [0, 1], color=INK, lw=1, ls="--", zorder=4, label="perfectly calibrated")
    upper.set(xlim=(0, 1), ylim=(0, 1))
    lower.bar(centres.tolist(), (bins.counts / bins.counts.sum()).tolist(), width, color=MUTED)


def risk_coverage_diagram(panels: Mapping[str, Mapping[str, Selective]], path: str | Path) -> None:
    """Draw the error rate among the answers given against the share of items answered, one panel a score.

    Args:
        panels: name of the predictions -> name of the score -> its curve; not all need to have every score.
        path: the file to write; its folder is made.

    Raises:
        ValueError: no panels.
    """
    scores = _scores(panels, panels.values())
    figure = _figure(3.4 * len(scores) + 0.6, 3.6)
    first = None
    for column, score in enumerate(scores):
        axes = _axes(figure, (1, len(scores), column + 1), sharey=first)
        first = first or axes
        for number, (name, curves) in enumerate(panels.items()):
            if score in curves:
                curve, colour = curves[score], CURVES[number % len(CURVES)]
                label = f"{name}: AURC {curve.aurc:.3g}"
                axes.plot(curve.coverage.tolist(), curve.risk.tolist(), color=colour, lw=1.6, label=label)
        axes.set(xlim=(0, 1), xlabel="coverage: share answered")
        _title(axes, score)
        axes.legend(frameon=False, fontsize=8)
        axes.tick_params(labelleft=column == 0)
    assert first is not None
    first.set_ylabel("risk: error rate among these")
    _write(figure, path)


def score_histograms(panels: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], path: str | Path) -> None:
    """Draw how scores of uncertainty are distributed in (blue) and out of distribution (red).

    One row a set of predictions, one column a score; both kinds share bins and count as densities.

    Args:
        panels: name of the predictions -> (scores in distribution, scores out of distribution), each name -> (N,).
        path: the file to write; its folder is made.

    Raises:
        ValueError: no panels.
    """
    scores = _scores(panels, (inside for inside, _ in panels.values()))
    figure = _figure(3.2 * len(scores) + 0.6, 2.7 * len(panels) + 0.4)
    grid = figure.add_gridspec(len(panels), len(scores), hspace=0.5, wspace=0.28)
    for row, (name, (inside, outside)) in enumerate(panels.items()):
        for column, score in enumerate(scores):
            if score not in inside:
                continue
            axes = _axes(figure, grid[row, column])
            top = max(float(inside[score].max()), float(outside[score].max()), 1e-12)
            shared: dict[str, Any] = {"bins": 30, "range": (0, top), "density": True, "alpha": 0.5}
            axes.hist(inside[score].tolist(), color=BLUE, label="in distribution", **shared)
            axes.hist(outside[score].tolist(), color=RED, label="out of distribution", **shared)
            axes.set_xlabel("1 - top probability" if score == "confidence" else "nats")
            _title(axes, f"{name}: {score}", 10)
            if row == column == 0:
                axes.legend(frameon=False, fontsize=9)
            if column == 0:
                axes.set_ylabel("density")
    _write(figure, path)


def _scores(panels: Mapping[str, Any], each: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all scores, in the order they appear."""
    scores = list(dict.fromkeys(score for named in each for score in named))
    if not scores:
        raise ValueError(f"panels: {dict(panels)!r}; expected at least one name with at least one score")
    return scores


def search_trace(search: SigmaSearch, path: str | Path) -> None:
    """Draw the metric of a search against sigma (log scale).

    Shown are every sigma tried with the standard error of its change from the mean adapter, the mean adapter's value, the
    band within the tolerance (where the objective is one), the sigma chosen, and where 90 % of resampled anchors choose it.
    A search over depths has a second panel: what each found against what its predictions cost.

    Raises:
        ValueError: the search tried no sigma.
    """
    tried = search.evaluations
    if not tried:
        raise ValueError("search: it has no evaluations; expected at least one")
    panels = 2 if search.depths else 1
    figure = _figure(11.2 if search.depths else 7.2, 4.4)
    axes = _axes(figure, (1, panels, 1))
    axes.set_xscale("log")
    axes.errorbar(
        [e.sigma for e in tried],
        [e.value for e in tried],
        [e.standard_error for e in tried],
        color=BLUE,
        lw=1.4,
        marker="o",
        ms=4.5,
        elinewidth=1,
        capsize=2,
        label="tried, with the standard error of the change",
    )
    start = search.baseline.value
    low, high = axes.get_ylim()
    low, high = min(low, start), max(high, start)
    if search.objective == "tolerance":
        bottom, top = search.band
        low, high = min(low, bottom) if isfinite(bottom) else low, max(high, top) if isfinite(top) else high
        axes.axhspan(max(bottom, low), min(top, high), color=GREEN, alpha=0.16, lw=0, label="within the tolerance")
    axes.axhline(start, color=MUTED, lw=1, ls="--", label="mean adapter (sigma = 0)")
    least, most = search.interval
    if isfinite(least) and most > least:
        axes.axvspan(least, most, color=RED, alpha=0.08, lw=0, label="90 % of resampled anchors choose here")
    axes.axvline(search.sigma, color=RED, lw=1.4, label=f"chosen: sigma = {search.sigma:.3g}")
    metric = AXIS_NAMES.get(search.metric, search.metric)
    axes.set(ylim=(low, high), xlabel="posterior scale sigma", ylabel=f"{metric} on {search.anchors} anchors")
    where = f", depth {search.depth}, span {search.span}" if search.depths else ""
    rule = f"{search.metric} within {search.tolerance:.2%}, {search.bound}"
    rule = {"minimum": "lowest NLL", "one-se": "smallest near the lowest NLL"}.get(search.objective, rule)
    _title(axes, f"Search for sigma{where}: {rule}")
    axes.legend(frameon=False, fontsize=9)
    if search.depths:
        _draw_depths(_axes(figure, (1, panels, 2)), search)
    _write(figure, path)


def _draw_depths(axes: Axes, search: SigmaSearch) -> None:
    """What each depth's sigma gives against what its predictions cost, behind the best with a standard error."""
    best = min(d.score for d in search.depths)
    for found in search.depths:
        chosen = (found.depth, found.span) == (search.depth, search.span)
        colour = RED if chosen else BLUE if found.satisfied else MUTED
        x, y = found.forwards, best + found.behind[0]
        axes.errorbar(x, y, found.behind[1], color=colour, marker="o", ms=5, capsize=3, lw=1)
        axes.annotate(
            f" {found.depth}{'' if found.span == 'all' else f', {found.span}'}\n sigma {found.sigma:.3g}",
            (x, y),
            fontsize=8,
            color=INK,
        )
    axes.set_xlabel(f"cost of a prediction ({search.predicted}), forwards of the plain model")
    axes.set_ylabel("minus entropy (nats)" if search.objective == "tolerance" else "NLL (nats)")
    _title(axes, "Depths, and how far each is behind the best")


def _figure(width: float, height: float) -> Figure:
    """A figure with its own Agg canvas: the caller's pyplot state and backend stay as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, place: Any, **shared: Any) -> Axes:
    """A plain subplot at a cell of a grid, or at (rows, columns, number)."""
    axes = figure.add_subplot(*(place if isinstance(place, tuple) else (place,)), **shared)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)
    return axes


def _title(axes: Axes, text: str, size: int = 11) -> None:
    axes.set_title(text, fontsize=size, color=INK)


def _write(figure: Figure, path: str | Path) -> None:
    for axes in figure.axes:
        legend = axes.get_legend()
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.get_texts() if legend else ())]
        for text in texts:
            text.set_parse_math(False)  # a name with two dollar signs is no formula
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight", facecolor="white")
    write_atomically(Path(path), image.getvalue())
