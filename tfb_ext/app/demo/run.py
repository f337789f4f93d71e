"""The main job on an embedded default: a real over-confident adapter, made honest, on real headlines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...adapters.adapter import BayesianAdapter, Depth, Span
from ...adapters.attach import bayesianize
from ...data import Encoded, encode
from ...metrics import Metrics, evaluate
from ...posterior.config import By
from ...prediction import Prediction, predict
from ...search import SigmaSearch, search_sigma
from ..loading import DEMO, Loaded, device_name, load_adapter, versions
from ..pages import METRIC_COLUMNS, Table, html_report, metric_row
from .headlines import load_split

# Chosen for two CPU cores: about 250,000 tokens through the model in all, four minutes.
ANCHORS_CPU, ANCHORS_GPU = 100, 500
TEST_CPU, TEST_GPU = 400, 2000
SEARCH_SAMPLES_CPU, SEARCH_SAMPLES_GPU = 4, 10


@dataclass(frozen=True)
class DemoOptions:
    """What the demonstration runs.

    Attributes:
        adapters: adapter folders, ``"demo"`` for the one in the package.
        seeds: noise seeds.
        depths: random blocks, each searched and measured apart.
        spans: random tokens, likewise, at each depth.
        linear: whether to go without samples too, in closed form, the answer's token random in all blocks.
        anchors, test_items: labelled headlines for the search, and others for the judgement; ``None``: by the device.
        samples: posterior samples of the prediction.
        search_samples: posterior samples at each sigma of the search; ``None``: by the device.
        device, dtype: see :func:`tfb_ext.app.loading.load_adapter`.
    """

    adapters: tuple[str, ...] = (DEMO,)
    seeds: tuple[int, ...] = (0,)
    depths: tuple[Depth, ...] = ("all", 0.5)
    spans: tuple[Span, ...] = ("all",)
    linear: bool = True
    anchors: int | None = None
    test_items: int | None = None
    samples: int = 10
    search_samples: int | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class DemoRun:
    """One adapter, seed, depth and span: what was searched, what came out, and how long search and prediction took."""

    adapter: str
    seed: int
    depth: int | str
    span: int | str
    search: SigmaSearch
    labels: Tensor
    mean: Prediction
    tfb: Prediction
    device: str

    @property
    def mean_metrics(self) -> Metrics:
        return evaluate(self.mean.probabilities, self.labels)

    @property
    def tfb_metrics(self) -> Metrics:
        return evaluate(self.tfb.probabilities, self.labels)

    def to_dict(self) -> dict[str, Any]:
        """One row of ``demo.json``: fractions, nats and seconds (of search and sampled prediction)."""

        def four(metrics: Metrics) -> dict[str, float]:
            return {name: float(value) for name, value in metrics.to_dict().items() if name != "items"}

        return {
            "adapter": self.adapter,
            "seed": self.seed,
            "depth": self.depth,
            "span": self.span,
            "by": self.search.by,
            "sigma": self.search.sigma,
            "test_items": len(self.labels),
            "mean": four(self.mean_metrics),
            "tfb": four(self.tfb_metrics),
            "seconds": round(self.search.seconds + self.tfb.seconds, 3),
            "device": self.device,
            "anchors": self.search.anchors,
            "samples": len(self.tfb.samples),
            "search_samples": self.search.samples,
            "seconds_search": round(self.search.seconds, 3),
            "seconds_predict": round(self.tfb.seconds, 3),
            "seconds_mean": round(self.mean.seconds, 3),
            "versions": versions(),
            "commit": os.environ.get("TFB_EXT_COMMIT"),
        }


def run_demo(options: DemoOptions, log: Callable[[str], None], progress: bool = True) -> list[DemoRun]:
    """Search sigma on anchors and judge mean adapter and posterior on the test split, for every adapter, seed, depth and span.

    The test split is not even loaded before an adapter's every sigma is fixed: they come from ``recipe="auto"`` on the anchor
    split alone.
    """
    runs: list[DemoRun] = []
    for name in options.adapters:
        log(f"loading SmolLM2-135M-Instruct and the adapter {name!r}")
        loaded = load_adapter(name, device=options.device, dtype=options.dtype)
        device = next(loaded.model.parameters()).device
        gpu = device.type == "cuda"
        anchors = _encoded("anchor", _count(options.anchors, ANCHORS_GPU if gpu else ANCHORS_CPU), loaded)
        adapter = bayesianize(loaded.model)
        search_samples = _count(options.search_samples, SEARCH_SAMPLES_GPU if gpu else SEARCH_SAMPLES_CPU)
        ways: list[tuple[int, Depth, Span, By]] = [
            (seed, depth, span, "samples")
            for seed in options.seeds
            for depth in options.depths
            for span in options.spans
        ]
        if options.linear:
            ways.append((options.seeds[0], "all", "answer", "linear"))
        searches = [_search(adapter, *way, anchors, search_samples, log, progress) for way in ways]
        test = _encoded("test", _count(options.test_items, TEST_GPU if gpu else TEST_CPU), loaded)
        log(f"mean adapter on {len(test)} test headlines ({device_name(device)}, {_dtype_of(loaded)})")
        mean = predict(adapter, test, samples=0, progress=progress)
        labels = test.labels_tensor()
        for search, (*_, by) in zip(searches, ways, strict=True):
            adapter.seed, adapter.sigma = search.seed, search.sigma
            adapter.depth, adapter.span, adapter.by = search.depth, search.span, by
            how = f"{options.samples} samples" if by == "samples" else "no samples"
            log(f"{how} on the test headlines, {_random(adapter)}, seed {search.seed}")
            tfb = predict(adapter, test, samples=options.samples, by=by, progress=progress)
            where = search.depth, search.span
            runs.append(DemoRun(name, search.seed, *where, search, labels, mean, tfb, device_name(device)))
    return runs


def _search(
    adapter: BayesianAdapter,
    seed: int,
    depth: Depth,
    span: Span,
    by: By,
    anchors: Encoded,
    samples: int,
    log: Callable[[str], None],
    progress: bool,
) -> SigmaSearch:
    adapter.seed, adapter.depth, adapter.span = seed, depth, span
    how = "" if by == "samples" else ", without samples"
    log(f"{_random(adapter)}{how}, seed {seed}: searching sigma on {len(anchors)} labelled anchors")
    search = search_sigma(adapter, anchors, samples=samples, by=by, progress=progress)
    log(str(search))
    return search


def _random(adapter: BayesianAdapter) -> str:
    """What is random, in words."""
    blocks = len(adapter.anatomy.blocks)
    named = {"head": f"none of {blocks}", "all": f"all {blocks}"}
    found = f"{named.get(str(adapter.depth), f'upper {adapter.depth} of {blocks}')} blocks random"
    return found if adapter.span == "all" else f"{found}, span {adapter.span}"


def _count(asked: int | None, usual: int) -> int:
    return usual if asked is None else asked


def write_report(runs: Sequence[DemoRun], folder: Path, command: str, seconds: float) -> Path:
    """Reliability diagrams before and after, the search traces and ``report.html`` (self-contained) in ``folder``."""
    from ..pictures import reliability_diagram

    folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, Path] = {}
    for number, run in enumerate(runs):
        title = _title(run)
        reliability, trace = folder / f"reliability-{number}.png", folder / f"search-{number}.png"
        how = f"{len(run.tfb.samples)} samples" if run.search.by == "samples" else "no samples"
        both = {"mean adapter": run.mean, f"TFB, {how}": run.tfb}
        reliability_diagram({name: (p.probabilities, run.labels) for name, p in both.items()}, reliability)
        run.search.plot(trace)
        images[f"Reliability before and after: {title}"] = reliability
        images[f"Search for sigma: {title}"] = trace
    facts = {
        "command": command,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "device": runs[0].device,
        "wall time": f"{seconds:.0f} s",
        **{_title(run): run.search.reason for run in runs},
        **versions(),
    }
    target = folder / "report.html"
    html_report(target, "tfb_ext: calibrated headlines", [result_table(runs)], images, facts)
    return target


def _title(run: DemoRun) -> str:
    how = "" if run.search.by == "samples" else ", without samples"
    return f"{run.adapter}, depth {run.depth}, span {run.span}{how}, seed {run.seed}"


def result_table(runs: Sequence[DemoRun]) -> Table:
    """Each adapter's mean once, then its posteriors."""
    rows: list[tuple[str, ...]] = []
    several_adapters, several_seeds = (len({getattr(r, name) for r in runs}) > 1 for name in ("adapter", "seed"))
    for number, run in enumerate(runs):
        suffix = f" [{run.adapter}]" if several_adapters else ""
        if run.adapter not in {r.adapter for r in runs[:number]}:
            rows.append(metric_row(f"mean adapter{suffix}", 0, run.mean_metrics, run.mean.seconds, 3))
        depth = "all blocks" if run.depth == "all" else f"upper {run.depth} blocks"
        span = "" if run.span == "all" else f", span {run.span}"
        name = "TFB" if run.search.by == "samples" else "TFB without samples"
        name += f", {depth}{span}{f', seed {run.seed}' if several_seeds else ''}{suffix}"
        seconds = run.search.seconds + run.tfb.seconds
        rows.append(metric_row(name, run.search.sigma, run.tfb_metrics, seconds, 3))
    note = "ECE: 15 bins, l1, top label. Time: search plus prediction; for the mean adapter, prediction."
    return Table(
        f"Sarcastic headlines, {len(runs[0].labels)} test items ({runs[0].device})", METRIC_COLUMNS, rows, note
    )


def _encoded(split: str, limit: int, loaded: Loaded) -> Encoded:
    return encode(load_split(split, limit), loaded.tokenizer)


def _dtype_of(loaded: Loaded) -> str:
    return str(next(loaded.model.get_base_model().parameters()).dtype).removeprefix("torch.")
