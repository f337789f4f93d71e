"""Clocks and the machine's own ceilings, shared by all benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class EventStamp:
    """A point in the GPU's queue. ``later - earlier`` is in seconds, and waits until the GPU has passed ``later``."""

    event: torch.cuda.Event

    def __sub__(self, earlier: EventStamp) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def event_clock() -> EventStamp:
    """The current place in the current CUDA stream; usable as pytest-benchmark's ``timer``."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return EventStamp(event)


def clock(device: torch.device) -> Callable[[], Any]:
    """Two readings of the clock that fits ``device``, subtracted, are the seconds between them."""
    return event_clock if device.type == "cuda" else time.perf_counter


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, minimum and maximum."""
    return statistics.median(values), min(values), max(values)


@cache
def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine's memory and its products reach, measured in this run."""
    return {"copy_gb_s": copy_bandwidth(device) / 1e9, "gemm_tflop_s": gemm_rate(device) / 1e12}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy moves, read and write both counted (median of 9)."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source), device)


def gemm_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a large square matrix product through torch (median of 9), random operands."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)


def _median_seconds(run: Callable[[], object], device: torch.device, rounds: int = 9) -> float:
    now, seconds = clock(device), []
    for _ in range(3 + rounds):
        start = now()
        run()
        seconds.append(now() - start)
    return statistics.median(seconds[3:])
