"""A benchmark against its own baseline: the two take turns, so that the drift of a GPU's clock hits both alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from .record import environment
from .timing import clock, spread

COMMAND = "python -m pytest {} --benchmark-json=FILE"


class Versus:
    """Times ``run`` inside ``context`` through pytest-benchmark, and ``baseline`` before each of its rounds.

    Entering and leaving the contexts is not timed. The result goes into the benchmark's ``extra_info``:

    ``case``; ``value`` and ``baseline``, median milliseconds of one ``run`` and one ``baseline``; ``ratio`` and ``spread``, the
    median, least and greatest of the rounds' ratios value / baseline (``faster``: baseline / value); ``of``, what the
    baseline is; ``peak_gib`` and ``baseline_peak_gib``, the most memory allocated while either ran, the weights included.
    """

    def __init__(self, benchmark: Any, device: torch.device, source: str) -> None:
        self.benchmark = benchmark
        self.device = device
        self.source = source

    def __call__(
        self,
        case: str,
        run: Callable[[], object],
        baseline: Callable[[], object],
        *,
        of: str,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        baseline_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        faster: bool = False,
        rounds: int = 7,
        warmup: int = 2,
        repeats: int = 1,
        **facts: Any,
    ) -> float | None:
        """``repeats``: how often one call of ``run`` and of ``baseline`` does its work. Returns the median ratio."""
        now = clock(self.device)
        baseline_seconds: list[float] = []
        peaks: list[float] = []
        baseline_peaks: list[float] = []
        stack = ExitStack()

        def setup() -> None:
            if baseline_seconds:
                peaks.append(self._peak())
            stack.close()
            with baseline_context():
                self._start_peak()
                start = now()
                baseline()
                baseline_seconds.append(now() - start)
                baseline_peaks.append(self._peak())
            stack.enter_context(context())
            self._start_peak()

        with stack:
            self.benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=warmup)
            peaks.append(self._peak())
        info = {"case": case, "of": of, **facts, **environment(self.device, COMMAND.format(self.source))}
        self.benchmark.extra_info |= info
        if self.benchmark.stats is None:  # --benchmark-disable: it ran, nothing was timed
            return None
        seconds = self.benchmark.stats.stats.data
        pairs = list(zip(seconds, baseline_seconds[-len(seconds) :], strict=True))
        ratio, least, most = spread([b / a if faster else a / b for a, b in pairs])
        self.benchmark.extra_info |= {
            "value": 1e3 * spread([a for a, _ in pairs])[0] / repeats,
            "baseline": 1e3 * spread([b for _, b in pairs])[0] / repeats,
            "ratio": ratio,
            "spread": [least, most],
            "rounds": len(pairs),
        }
        if self.device.type == "cuda":
            self.benchmark.extra_info |= {"peak_gib": max(peaks), "baseline_peak_gib": max(baseline_peaks)}
        print(f"\n{case}: {ratio:.3f} ({least:.3f} to {most:.3f}) of {of}", flush=True)
        return ratio

    def in_gib(self, value: float | None = None, baseline: float | None = None) -> None:
        """Make the last case one of memory, these GiB or the peaks, with its times beside them; nothing where there are none."""
        info = self.benchmark.extra_info
        value, baseline = value or info.get("peak_gib"), baseline or info.get("baseline_peak_gib")
        if "ratio" not in info or value is None or baseline is None:  # --benchmark-disable, or peaks of a CPU
            return
        ratio = value / baseline
        info |= {"value_ms": info["value"], "baseline_ms": info["baseline"], "unit": "GiB"}
        info |= {"value": value, "baseline": baseline, "ratio": ratio, "spread": [ratio, ratio]}

    def _start_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> float:
        """GiB."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
