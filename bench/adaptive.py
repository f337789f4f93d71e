"""Adaptive sampling on a real adapter: how many of N samples items draw, and how many answers are still those of all N.

    python -m bench.adaptive --out bench/results/adaptive.json

The demonstration's adapters and test headlines. For each adapter and depth sigma is given, or found on anchors first. The fixed
run draws N samples for every item; the adaptive run draws from the same samples until an item's answer is settled.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import tfb_ext
from tfb_ext import metrics
from tfb_ext.app.demo.headlines import load_split
from tfb_ext.app.options import parse_depth
from tfb_ext.data import encode
from tfb_ext.prediction import Prediction

from .headlines import adapters, add_arguments
from .record import environment, write_json
from .timing import spread

COMMAND = "python -m bench.adaptive"
DEPTHS = ("all", "0.25")
CONFIDENCES = (0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--depth", action="append", help="random blocks: 'all', 'head', a number, a fraction")
    parser.add_argument("--confidence", action="append", type=float)
    parser.add_argument("--sigma", type=float, help="instead of a search on the anchors")
    parser.add_argument("--test-items", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=30, help="N")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    where: dict[str, Any] = {}
    for name, loaded, adapter in adapters(options.adapter, options.device):
        device = next(loaded.model.parameters()).device
        where = where or environment(device, COMMAND)
        anchors = encode(load_split("anchor", options.anchors), loaded.tokenizer)
        test = encode(load_split("test", options.test_items), loaded.tokenizer)

        def runs(adaptive: float | None, adapter: Any = adapter, test: Any = test, device: Any = device) -> Any:
            done, seconds = [], []
            for _ in range(options.rounds):
                started = time.perf_counter()
                done.append(tfb_ext.predict(adapter, test, options.samples, adaptive=adaptive))
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - started)
            return done[0], spread(seconds)

        for depth in map(parse_depth, options.depth or DEPTHS):
            adapter.depth = depth
            adapter.sigma = options.sigma
            if options.sigma is None:
                tfb_ext.search_sigma(adapter, anchors, progress=False)
            fixed, fixed_seconds = runs(None)
            for confidence in options.confidence or CONFIDENCES:
                found, seconds = runs(confidence)
                require_prefix(found, fixed)
                row = {"adapter": name, "depth": depth, "sigma": found.sigma, "confidence": confidence}
                row |= compared(found, fixed, test.labels_tensor())
                row |= {"seconds": seconds[0], "spread": list(seconds[1:])}
                row |= {"fixed_seconds": fixed_seconds[0], "fixed_spread": list(fixed_seconds[1:])}
                rows.append(row)
                print(
                    f"{name} depth {depth} confidence {confidence}: {row['share_drawn']:.1%} of the samples, "
                    f"{row['same_answers']:.2%} the same answers, {seconds[0]:.2f} s instead of {fixed_seconds[0]:.2f} s",
                    flush=True,
                )
    if options.out is not None:
        facts = {"anchors": options.anchors, "test_items": options.test_items, "samples": options.samples}
        write_json(options.out, {"rows": rows} | facts | where)


def compared(found: Prediction, fixed: Prediction, labels: torch.Tensor) -> dict[str, Any]:
    """The adaptive run beside the fixed one: samples drawn, answers, calibration."""
    counts, items = found.samples_drawn.unique(return_counts=True)
    measured = {run: metrics.evaluate(p.probabilities, labels) for run, p in (("", found), ("fixed_", fixed))}
    return {
        "share_drawn": float(found.samples_drawn.double().mean()) / len(fixed.samples),
        "same_answers": float((found.labels == fixed.labels).double().mean()),
        "items_by_samples": dict(zip(map(str, counts.tolist()), items.tolist(), strict=True)),
        "largest_change": float((found.probabilities - fixed.probabilities).abs().max()),
    } | {f"{run}{n}": getattr(m, n) for run, m in measured.items() for n in ("accuracy", "nll", "ece")}


def require_prefix(found: Prediction, fixed: Prediction) -> None:
    """Raise unless every item's samples are the first of the fixed run's, to what half precision leaves of a batch's layout.

    Another sample in a place would change its probabilities by as much as samples differ; layouts change them far less.
    """
    change = float((found.sample_probabilities - fixed.sample_probabilities).abs().nanmean())
    apart = float(fixed.sample_probabilities.diff(dim=0).abs().mean())
    drawn = found.sample_probabilities.isfinite().all(dim=-1).sum(dim=0)
    if not torch.equal(drawn, found.samples_drawn) or change > 0.1 * apart:
        raise SystemExit(
            f"the adaptive run is not the fixed one's first samples: mean change {change:.1e}, samples differ by {apart:.1e}"
        )


if __name__ == "__main__":
    main()
