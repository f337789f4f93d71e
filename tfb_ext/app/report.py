"""Pictures and a one-file report: reliability diagrams, the trace of a search, HTML that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import write_atomically
from ..metrics import BINS, check, evaluate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from ..generation import Generation
    from ..search import SigmaSearch
    from ..uncertainty import Selective

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, RED, GREEN = "#2f6db3", "#d64545", "#2d8a5f"
AXIS_NAMES = {"nll": "NLL (nats)", "accuracy": "accuracy", "flips": "changed predictions", "brier": "Brier score"}
DOUBT_SCALE = 0.5  # nats of epistemic uncertainty at which a token's colour is fullest
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Table:
    """A table of the report: every cell is a text already, the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


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
    """Bin items by the probability of their most probable class.

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
    """Draw accuracy against confidence, one panel for each set of predictions, side by side, as a PNG file.

    Blue bars are the accuracy in a bin of confidence, hatched red the gap to the mean confidence there: above the bar
    the model is surer than right. Below each panel stands the share of items in each bin.

    Args:
        panels: name -> (probabilities (N, C), labels (N,)).
        path: the file to write; its folder is made.

    Raises:
        ValueError: no panels, or as ``metrics.evaluate``.
    """
    if not panels:
        raise ValueError("panels: {}; expected at least one name with its probabilities and labels")
    width = 4.2 * len(panels) + 0.6
    figure = _figure(width, 5.2)
    grid = figure.add_gridspec(2, len(panels), height_ratios=(3.4, 1), hspace=0.08, wspace=0.18)
    share = None
    for column, (name, (probabilities, labels)) in enumerate(panels.items()):
        bins = reliability(probabilities, labels)
        metrics = evaluate(probabilities, labels)
        upper = figure.add_subplot(grid[0, column])
        lower = figure.add_subplot(grid[1, column], sharex=upper, sharey=share)
        share = share or lower
        _draw_gaps(upper, bins)
        _draw_counts(lower, bins, metrics.items)
        upper.set_title(f"{name}\nECE {metrics.ece:.1%},  accuracy {metrics.accuracy:.1%}", fontsize=11, color=INK)
        upper.tick_params(labelbottom=False)
        if column == 0:
            upper.set_ylabel("accuracy")
            upper.legend(loc="upper left", frameon=False, fontsize=9)
            lower.set_ylabel("share of items")
        else:
            upper.tick_params(labelleft=False)
            lower.tick_params(labelleft=False)
    _write(figure, path)


def risk_coverage_diagram(panels: Mapping[str, Mapping[str, Selective]], path: str | Path) -> None:
    """Draw the error rate among the answers given against the share of items answered, one panel a score, as a PNG file.

    Args:
        panels: name of the predictions -> name of the score -> its curve; a score that only some of them have is drawn for
            these.
        path: the file to write; its folder is made.

    Raises:
        ValueError: no panels.
    """
    scores = list(dict.fromkeys(score for curves in panels.values() for score in curves))
    if not scores:
        raise ValueError(f"panels: {dict(panels)!r}; expected at least one name with at least one score")
    figure = _figure(3.4 * len(scores) + 0.6, 3.6)
    first = None
    for column, score in enumerate(scores):
        axes = figure.add_subplot(1, len(scores), column + 1, sharey=first)
        first = first or axes
        _plain(axes)
        for number, (name, curves) in enumerate(panels.items()):
            if score in curves:
                curve = curves[score]
                label = f"{name}: AURC {curve.aurc:.3g}"
                axes.plot(curve.coverage.tolist(), curve.risk.tolist(), color=_colour(number), lw=1.6, label=label)
        axes.set_xlim(0, 1)
        axes.set_title(score, fontsize=11, color=INK)
        axes.set_xlabel("coverage: share answered")
        axes.legend(frameon=False, fontsize=8)
        if column == 0:
            axes.set_ylabel("risk: error rate among these")
        else:
            axes.tick_params(labelleft=False)
    _write(figure, path)


def score_histograms(panels: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], path: str | Path) -> None:
    """Draw how scores of uncertainty are distributed in (blue) and out of distribution (red), as a PNG file.

    One row a set of predictions, one column a score; both kinds share bins and count as densities.

    Args:
        panels: name of the predictions -> (scores in distribution, scores out of distribution), each name -> (N,).
        path: the file to write; its folder is made.

    Raises:
        ValueError: no panels.
    """
    scores = list(dict.fromkeys(score for own, _ in panels.values() for score in own))
    if not scores:
        raise ValueError(f"panels: {dict(panels)!r}; expected at least one name with at least one score")
    figure = _figure(3.2 * len(scores) + 0.6, 2.7 * len(panels) + 0.4)
    grid = figure.add_gridspec(len(panels), len(scores), hspace=0.5, wspace=0.28)
    for row, (name, (own, strange)) in enumerate(panels.items()):
        for column, score in enumerate(scores):
            if score not in own:
                continue
            axes = figure.add_subplot(grid[row, column])
            _plain(axes)
            top = max(float(own[score].max()), float(strange[score].max()), 1e-12)
            for values, label, colour in (
                (own[score], "in distribution", BLUE),
                (strange[score], "out of distribution", RED),
            ):
                axes.hist(values.tolist(), bins=30, range=(0, top), density=True, color=colour, alpha=0.5, label=label)
            unit = "1 - top probability" if score == "confidence" else "nats"
            axes.set_title(f"{name}: {score}", fontsize=10, color=INK)
            axes.set_xlabel(unit)
            if row == column == 0:
                axes.legend(frameon=False, fontsize=9)
            if column == 0:
                axes.set_ylabel("density")
    _write(figure, path)


def _colour(number: int) -> str:
    return (MUTED, BLUE, RED, GREEN)[number % 4]


def search_trace(search: SigmaSearch, path: str | Path) -> None:
    """Draw the metric of a search against sigma (log scale) as a PNG file.

    Shown are every sigma tried with the standard error of its change from the mean adapter, the mean adapter's own
    value, the band of values within the tolerance (where the objective is a tolerance), the sigma chosen and where 90 % of
    resampled anchors choose it. A search over depths has a second panel: what each found against what its predictions cost.

    Raises:
        ValueError: the search tried no sigma.
    """
    tried = search.evaluations
    if not tried:
        raise ValueError("search: it has no evaluations; expected at least one")
    figure = _figure(11.2 if search.depths else 7.2, 4.4)
    axes = figure.add_subplot(1, 2 if search.depths else 1, 1)
    _plain(axes)
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
    axes.set_ylim(low, high)
    axes.set_xlabel("posterior scale sigma")
    axes.set_ylabel(f"{AXIS_NAMES.get(search.metric, search.metric)} on {search.anchors} anchors")
    where = f", depth {search.depth}" if search.depths else ""
    rule = f"{search.metric} within {search.tolerance:.2%}, {search.bound}"
    rule = {"minimum": "lowest NLL", "one-se": "smallest near the lowest NLL"}.get(search.objective, rule)
    axes.set_title(f"Search for sigma{where}: {rule}", fontsize=11, color=INK)
    axes.legend(frameon=False, fontsize=9)
    if search.depths:
        _draw_depths(figure.add_subplot(1, 2, 2), search)
    _write(figure, path)


def _draw_depths(axes: Axes, search: SigmaSearch) -> None:
    """What each depth's sigma gives against what its predictions cost, behind the best with a standard error."""
    _plain(axes)
    best = min(d.score for d in search.depths)
    for found in search.depths:
        colour = RED if found.depth == search.depth else BLUE if found.satisfied else MUTED
        axes.errorbar(
            found.forwards, best + found.behind[0], found.behind[1], color=colour, marker="o", ms=5, capsize=3, lw=1
        )
        axes.annotate(
            f" {found.depth}\n sigma {found.sigma:.3g}", (found.forwards, best + found.behind[0]), fontsize=8, color=INK
        )
    tolerance = search.objective == "tolerance"
    axes.set_xlabel(f"cost of a prediction with {search.samples} samples, forwards of the plain model")
    axes.set_ylabel("minus entropy (nats)" if tolerance else "NLL (nats)")
    axes.set_title("Depths, and how far each is behind the best", fontsize=11, color=INK)


def html_report(
    path: str | Path,
    title: str,
    tables: Sequence[Table],
    images: Mapping[str, str | Path],
    facts: Mapping[str, str],
) -> None:
    """Write one HTML file that holds everything: style, tables and pictures. It loads nothing and runs no script.

    Args:
        path: the file to write; its folder is made.
        tables: shown first, in their order.
        images: caption -> PNG file.
        facts: name -> value, shown last: versions, the device, the exact command.

    Raises:
        ValueError: a table's row is not as long as its header, or an image is no PNG.
    """
    for table in tables:
        for row in table.rows:
            if len(row) != len(table.columns):
                raise ValueError(
                    f"table {table.title!r}: row {list(row)!r} has {len(row)} cells; expected {len(table.columns)}, "
                    f"one for each of {list(table.columns)!r}"
                )
    pictures = [(caption, _base64_png(Path(image))) for caption, image in images.items()]
    page = _template("report.html").render(title=title, tables=tables, images=pictures, facts=facts)
    write_atomically(Path(path), page)


def generation_page(
    generation: Generation,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    title: str = "How sure is the model of every word?",
    scale: float = DOUBT_SCALE,
) -> None:
    """Write the texts as one HTML file: each token coloured by its epistemic uncertainty, its alternatives on hover.

    Args:
        generation: made with a tokenizer.
        prompts: one text a prompt; where a prompt has several rows, they follow each other.
        tokenizer: names the alternatives.
        scale: nats at which the colour is fullest.

    Raises:
        ValueError: no texts, or rows that are no multiple of the prompts.
    """
    count = len(generation.texts)
    if not count or not prompts or count % len(prompts):
        raise ValueError(
            f"the generation has {count} texts for {len(prompts)} prompts; expected a generation that was given a tokenizer, and "
            "its prompts"
        )
    rows = []
    for row, item in enumerate(generation.to_dict()["items"]):
        means = {name: fmean(item[name] or [0.0]) for name in ("total", "aleatoric", "epistemic")}
        rows.append(
            {
                "prompt": prompts[row // (count // len(prompts))],
                "tokens": [_page_token(item, at, tokenizer, scale) for at in range(len(item["tokens"]))],
                "sequence_score": item["sequence_score"],
                **means,
            }
        )
    facts = f"{len(generation.samples)} sampled adapters, sigma = {generation.sigma:.3g}"
    page = _template("generation.html").render(title=title, rows=rows, scale=scale, facts=facts)
    write_atomically(Path(path), page)


def _page_token(item: dict[str, Any], at: int, tokenizer: PreTrainedTokenizerBase, scale: float) -> dict[str, Any]:
    chosen = item["tokens"][at]
    listed = dict(zip(item["alternatives"][at], item["alternative_probabilities"][at], strict=True))
    listed.setdefault(chosen, exp(item["log_probabilities"][at]))  # a sampled token may be none of them
    return {
        "text": item["pieces"][at],
        "share": min(item["epistemic"][at] / scale, 1.0),
        **{name: item[name][at] for name in ("total", "aleatoric", "epistemic")},
        "alternatives": [
            {"text": _visible(str(tokenizer.decode([token]))), "probability": p, "chosen": token == chosen}
            for token, p in listed.items()
        ],
    }


def _visible(text: str) -> str:
    """White space that would not show, shown."""
    return text.replace("\n", "⏎").replace("\t", "⇥") if text.strip() else text.replace(" ", "␣").replace("\n", "⏎")


def _template(name: str) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(name)


def _base64_png(path: Path) -> str:
    content = path.read_bytes()
    if not content.startswith(PNG_SIGNATURE):
        raise ValueError(f"image {path}: begins with {content[:8]!r}; expected a PNG file")
    return base64.b64encode(content).decode("ascii")


def _draw_gaps(axes: Axes, bins: Reliability) -> None:
    width = 1 / len(bins.counts)
    centres = [(i + 0.5) * width for i in range(len(bins.counts))]
    filled = [i for i, count in enumerate(bins.counts.tolist()) if count]
    accuracy, confidence = bins.accuracy.tolist(), bins.confidence.tolist()
    axes.bar(
        [centres[i] for i in filled],
        [accuracy[i] for i in filled],
        width * 0.92,
        color=BLUE,
        label="accuracy",
        zorder=2,
    )
    axes.bar(
        [centres[i] for i in filled],
        [confidence[i] - accuracy[i] for i in filled],
        width * 0.92,
        bottom=[accuracy[i] for i in filled],
        color="#f6dcdc",
        edgecolor=RED,
        hatch="////",
        lw=0.8,
        label="gap to the confidence",
        zorder=3,
    )
    axes.plot([0, 1], [0, 1], color=INK, lw=1, ls="--", zorder=4, label="perfectly calibrated")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    _plain(axes)


def _draw_counts(axes: Axes, bins: Reliability, items: int) -> None:
    width = 1 / len(bins.counts)
    axes.bar(
        [(i + 0.5) * width for i in range(len(bins.counts))], (bins.counts / items).tolist(), width * 0.92, color=MUTED
    )
    axes.set_xlabel(f"confidence ({items} items)")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(color=GRID, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)


def _figure(width: float, height: float) -> Figure:
    """A figure with its own Agg canvas: the caller's pyplot state and backend stay as they are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160)
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: str | Path) -> None:
    for axes in figure.axes:
        legend = axes.get_legend()
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.get_texts() if legend else ())]
        for text in texts:
            text.set_parse_math(False)  # a name with two dollar signs is no formula
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight", facecolor="white")
    write_atomically(Path(path), image.getvalue())
