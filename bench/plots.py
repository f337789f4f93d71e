"""``speed.svg`` and ``span.svg``: what samples cost, drawn from the rows of ``bench/results/*.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .rows import Rows, worst
from .test_kernels import RANKS, TOKENS


def series(models: Rows, prefix: str, given: dict[int, str]) -> list[tuple[int, dict[str, Any]]]:
    """``(number, row)`` of the cases named ``prefix_number`` and of those in ``given``, ascending."""
    found = {int(case.removeprefix(prefix)): row for case, row in models.items() if case.startswith(prefix)}
    found |= {number: models[case] for number, case in given.items()}
    return sorted(found.items())


def _figure(width: float, height: float) -> Any:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "tfb_ext"  # the same file for the same results
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def draw_spans(rows: Rows, file: Path) -> None:
    """Time of samples that differ on the answer alone against their number; nothing without such rows."""
    sweep = series(rows, "sweep_span_", {})
    if not sweep:
        return
    figure = _figure(4.4, 3.4)
    axis = figure.subplots()
    samples = [number for number, _ in sweep]
    axis.plot(samples, [row["value"] for _, row in sweep], "o-", label="tfb_ext, the answer alone")
    axis.plot(samples, [row["baseline"] for _, row in sweep], "s--", label="base model, one forward")
    axis.legend(frameon=False)
    axis.set_ylim(0)
    axis.set(xlabel="samples of 8 rows x 128 tokens", ylabel="ms", title=sweep[0][1]["device"])
    figure.savefig(file, metadata={"Date": None})


def draw(models: Rows, rows: list[dict[str, Any]], file: Path) -> None:
    """Time against samples, depth, rank and tokens; memory against samples."""
    figure = _figure(11, 6.2)
    axes = figure.subplots(2, 3)

    def lines(axis: Any, points: list[tuple[int, dict[str, Any]]], of: str, *, share: bool = False) -> None:
        numbers = [number for number, _ in points]
        for key, label, style in (("value", "tfb_ext", "o-"), ("baseline", of, "s--")):
            axis.plot(numbers, [row[key] / (row["baseline"] if share else 1) for _, row in points], style, label=label)
        axis.set_ylim(0)
        axis.legend(frameon=False)

    samples = series(models, "sweep_samples_", {10: "prefill_all_linear_bf16"})
    memory = models["memory_s64"]
    samples.append((64, memory | {"value": memory["value_ms"], "baseline": memory["baseline_ms"]}))
    lines(axes[0, 0], samples, "base model, as many rows")
    axes[0, 0].set(xlabel="samples of 8 rows x 128 tokens", ylabel="ms", title="Time against samples")

    lines(axes[0, 1], series(models, "sweep_depth_", {}), "base model, 8 rows", share=True)
    axes[0, 1].set(xlabel="random blocks of 32", ylabel="base forwards of 8 rows", title="Ten samples against depth")

    ranks = [(8, models["prefill_all_linear_bf16"]), (16, models["prefill_rank16"]), (64, models["prefill_rank64"])]
    lines(axes[0, 2], ranks, "base model, 80 rows", share=True)
    axes[0, 2].set(xlabel="rank", ylabel="base forwards of 80 rows", title="Ten samples against rank", ylim=(0, 1.2))

    tokens = series(models, "sweep_tokens_", {128: "prefill_all_linear_bf16"})
    lines(axes[1, 0], tokens, "base model, 80 rows")
    axes[1, 0].set(xlabel="tokens a row", ylabel="ms", title="Ten samples against tokens")

    held = [(n, {"value": row["peak_gib"], "baseline": row["baseline_peak_gib"]}) for n, row in samples]
    lines(axes[1, 1], held, "base model, as many rows")
    axes[1, 1].set(xlabel="samples of 8 rows x 128 tokens", ylabel="GiB", title="Peak memory, weights included")

    kernels = [("shrink_bandwidth", "shrink"), ("expand_write_bandwidth", "expand, writing")]
    kernels.append(("expand_add_bandwidth", "expand, accumulating"))
    for (case, label), style in zip(kernels, ("o-", "s--", "^:"), strict=True):
        shares = [worst(rows, case, r=r, tokens=TOKENS[-1]) for r in RANKS]
        axes[1, 2].plot(range(len(RANKS)), [100 * share for share in shares], style, label=label)
    axes[1, 2].legend(frameon=False)
    axes[1, 2].set_xticks(range(len(RANKS)), RANKS)
    axes[1, 2].set(
        xlabel="rank", ylabel="% of a copy of as many bytes", title=f"Kernels at T = {TOKENS[-1]}", ylim=(0, 105)
    )

    figure.suptitle(f"Llama-3.1-8B shape, bfloat16, all seven linear layers, {models['memory_s64']['device']}")
    figure.savefig(file, metadata={"Date": None})
