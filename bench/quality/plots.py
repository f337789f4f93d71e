"""The study's pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from tfb_ext.app.pictures import reliability_diagram

from .check import MAIN
from .data import TASKS
from .measures import risk_coverage
from .results import Results, Row

DPI = 110
NAMES = {"ece": "ECE", "nll": "NLL (nats)", "accuracy": "accuracy", "auroc_error": "AUROC of errors", "brier": "Brier"}


def compared(results: Results, dataset: str, adapter: str = MAIN) -> dict[str, list[Row]]:
    """The methods that the pictures and the first table of a data set show, with their seeds; those that were run."""
    pick = results.pick
    mle = f"{adapter}-mle"
    tfb: dict[str, Any] = {
        "depth": "all",
        "span": "all",
        "samples": 10,
        "recipe": "auto",
        "antithetic": True,
        "mode": "weight",
    }
    found = {
        "MLE": pick(dataset=dataset, adapter=mle, method="mean"),
        "MAP": pick(dataset=dataset, adapter=f"{adapter}-map", method="mean"),
        "MLE + temperature": pick(dataset=dataset, adapter=mle, method="mean+temperature"),
        "MC dropout": pick(dataset=dataset, adapter=f"{adapter}-dropout", method="dropout"),
        "ensemble of 3": pick(dataset=dataset, adapter=mle, method="ensemble"),
        "Laplace": pick(dataset=dataset, adapter=mle, method="laplace"),
        "BLoB mean": pick(dataset=dataset, adapter=f"{adapter}-blob", method="mean"),
        "BLoB, N = 10": pick(dataset=dataset, adapter=f"{adapter}-blob", method="blob"),
        "TFB on MLE": pick(dataset=dataset, adapter=mle, method="tfb", **tfb),
        "TFB on MLE + temperature": pick(dataset=dataset, adapter=mle, method="tfb+temperature", **tfb),
        "TFB on MAP": pick(dataset=dataset, adapter=f"{adapter}-map", method="tfb", **tfb),
        "TFB on BLoB mean": pick(dataset=dataset, adapter=f"{adapter}-blob", method="tfb", **tfb),
    }
    return {name: rows for name, rows in found.items() if rows}


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Every picture that the rows suffice for."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [_reliability(results, dataset, folder) for dataset in results.datasets]
    pictures: Sequence[tuple[str, Callable[[Any, Results, str], None], str, str]] = (
        ("risk_coverage", _risk_coverage, "coverage", "error rate"),
        ("cost_ece", lambda axes, r, d: _cost(axes, r, d, "ece"), "forwards-equivalents", NAMES["ece"]),
        ("cost_nll", lambda axes, r, d: _cost(axes, r, d, "nll"), "forwards-equivalents", NAMES["nll"]),
        ("sigma", _sigma, "sigma", "NLL on the anchors (nats)"),
    )
    made += [_panels(results, folder / f"{name}.png", draw, x, y) for name, draw, x, y in pictures]
    made.append(_samples(results, folder / "samples.png"))
    return made


def _reliability(results: Results, dataset: str, folder: Path) -> Path:
    """All seeds of a method in one panel."""
    shown = ("MLE", "MLE + temperature", "MC dropout", "ensemble of 3", "BLoB, N = 10", "TFB on MLE")
    panels = {}
    for name, rows in compared(results, dataset).items():
        if name in shown:
            predicted = [row.predicted for row in rows]
            panels[name] = (
                torch.cat([p.probabilities for p in predicted]),
                torch.cat([p.labels for p in predicted]),
            )
    path = folder / f"reliability_{dataset}.png"
    reliability_diagram(panels, path)
    return path


def _panels(
    results: Results, path: Path, draw: Callable[[Any, Results, str], None], x: str, y: str, width: float = 4.2
) -> Path:
    """One panel a data set, side by side."""
    figure = _figure(width * len(results.datasets), 4.0)
    all_axes = figure.subplots(1, len(results.datasets), squeeze=False)[0]
    for axes, dataset in zip(all_axes, results.datasets, strict=True):
        draw(axes, results, dataset)
        axes.set(xlabel=x, title=TASKS[dataset].title)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(y)
    handles, labels = all_axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=max(2 * len(results.datasets), 2),
            fontsize=8,
            frameon=False,
        )
    figure.savefig(path, dpi=DPI)
    return path


def _risk_coverage(axes: Any, results: Results, dataset: str) -> None:
    for name, rows in compared(results, dataset).items():
        if "MAP" in name or name == "BLoB mean":
            continue
        curves = [risk_coverage(row.predicted.scores["confidence"], row.predicted.wrong) for row in rows]
        coverage, risk = curves[0][0], np.mean([curve[1] for curve in curves], axis=0)
        shown = coverage >= 0.05  # a handful of items has no error rate worth a line
        axes.plot(coverage[shown], risk[shown], "-" if "TFB" in name else "--", lw=1.3, label=name)


def _cost(axes: Any, results: Results, dataset: str, measure: str) -> None:
    """Every (depth or span, N) of TFB auto, the other methods, and the front of what nothing cheaper beats."""
    points: dict[tuple[Any, ...], list[Row]] = {}
    for row in results.pick(dataset=dataset, adapter=f"{MAIN}-mle", method="tfb", recipe="auto", mode="weight"):
        points.setdefault((_place(row), row.antithetic, row.samples), []).append(row)
    front: list[tuple[float, float]] = []
    for n, place in enumerate(dict.fromkeys(key[0] for key in points)):
        for antithetic in (True, False):
            line = sorted(
                (rows[0].forwards, _mean(rows, measure))
                for key, rows in points.items()
                if key[:2] == (place, antithetic)
            )
            if line:
                label = f"TFB, {place}, {'antithetic' if antithetic else 'independent'}"
                axes.plot(
                    *zip(*line, strict=True), "o-" if antithetic else "x:", color=f"C{n}", ms=4, lw=1, label=label
                )
                front += line
    for name, rows in compared(results, dataset).items():
        if name in ("MLE", "MLE + temperature", "MC dropout", "ensemble of 3", "BLoB, N = 10", "Laplace"):
            point = (rows[0].forwards, _mean(rows, measure))
            axes.plot(*point, "*", ms=9, color="black", alpha=0.7)
            axes.annotate(name, point, fontsize=7, xytext=(4, 4), textcoords="offset points")
            front.append(point)
    axes.step(*zip(*_pareto(front), strict=True), where="post", color="grey", lw=3, alpha=0.3, zorder=0)
    axes.set_xscale("log")


def _pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that nothing cheaper or as cheap beats, by cost."""
    best: list[tuple[float, float]] = []
    for cost, value in sorted(points):
        if not best or value < best[-1][1]:
            best.append((cost, value))
    return best


def _samples(results: Results, path: Path) -> Path:
    """N against each measure, all blocks random: one row of panels a measure."""
    measures = ("ece", "nll", "accuracy", "auroc_error")
    figure = _figure(3.6 * len(results.datasets), 2.6 * len(measures))
    grid = figure.subplots(len(measures), len(results.datasets), squeeze=False, sharex=True)
    for column, dataset in enumerate(results.datasets):
        grid[0][column].set_title(TASKS[dataset].title)
        for axes, measure in zip(grid[:, column], measures, strict=True):
            for antithetic, style in ((True, "o-"), (False, "x--")):
                rows = results.pick(
                    dataset=dataset, adapter=f"{MAIN}-mle", method="tfb", recipe="auto", mode="weight", depth="all",
                    span="all", antithetic=antithetic,
                )  # fmt: skip
                numbers = sorted({row.samples for row in rows})
                means = [_mean([row for row in rows if row.samples == n], measure) for n in numbers]
                axes.plot(numbers, means, style, ms=4, label="antithetic" if antithetic else "independent")
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(NAMES[measure])
        grid[-1][column].set_xlabel("samples N")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI)
    return path


def _sigma(axes: Any, results: Results, dataset: str) -> None:
    """Every sigma tried on the over-fitted adapters, all blocks random, and those chosen."""
    seen: set[str] = set()
    for unit in results.units:
        name = unit["unit"]
        if (name["dataset"], name["targets"], name["stop"], name["kind"]) != (dataset, *MAIN.split("-"), "mle"):
            continue
        for search in unit["searches"]:
            if search["asked_depth"] != "all" or search.get("span", "all") != "all":
                continue
            label = f"{search['recipe']}, {search['mode']}"
            color = {"auto": "C0", "paper": "C1"}.get(search["recipe"], "C2")
            tried = [(e["sigma"], e["nll"]) for e in search["evaluations"] if e["sigma"] > 0 and e["nll"] is not None]
            style = "o-" if search["mode"] == "weight" else "s--"
            axes.plot(
                *zip(*tried, strict=True), style, color=color, ms=3, lw=0.8, label=None if label in seen else label
            )
            axes.axvline(search["sigma"], color=color, lw=0.8, ls=":")
            seen.add(label)
    axes.set_xscale("log")


def _mean(rows: list[Row], measure: str) -> float:
    return fmean(float(row.measures[measure] or 0) for row in rows)


def _place(row: Row) -> str:
    """Which blocks, or which tokens, are random."""
    if row.span != "all":
        return row.span
    names: dict[Any, str] = {"all": "all blocks", "head": "head", 0.5: "1/2", 0.25: "1/4", 0.125: "1/8"}
    return names.get(row.depth, str(row.depth))


def _figure(width: float, height: float) -> Any:
    """A figure with its own canvas: the caller's pyplot state stays as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
