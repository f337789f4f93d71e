"""Clocks, interleaved rounds and the machine's own ceilings, shared by all benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

# Larger than any GPU's last-level cache (50 MB on Hopper), and long enough in writing (over 100 us) that the host has
# queued the timed call before the device reaches it: launch latency stays out of a kernel's time.
FLUSH_BYTES = 512 * 2**20


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


class CacheFlush:
    """Overwrites the GPU's cache; on the CPU nothing is flushed and timings are with warm caches."""

    def __init__(self, device: torch.device) -> None:
        size = FLUSH_BYTES if device.type == "cuda" else 0
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


@dataclass(frozen=True)
class Case:
    """One thing to time: ``run`` inside ``context``. Entering and leaving the context is not timed."""

    name: str
    run: Callable[[], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Timings:
    """Milliseconds of each round, and the most GPU memory one call took above what was allocated before it (bytes)."""

    ms: list[float] = field(default_factory=list)
    peak: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


def interleaved(cases: Sequence[Case], device: torch.device, rounds: int, warmup: int = 2) -> dict[str, Timings]:
    """Time every case once a round, each round starting with another case, so that drift of the clocks hits all alike.

    Returns:
        Timings by case name, ``rounds`` entries each, index by round.
    """
    now = clock(device)
    results = {case.name: Timings() for case in cases}
    if len(results) != len(cases):
        raise ValueError(f"case names must differ, got {[case.name for case in cases]}")
    for index in range(-warmup, rounds):
        shift = index % len(cases)
        for case in [*cases[shift:], *cases[:shift]]:
            with case.context():
                before = _start_peak(device)
                start = now()
                case.run()
                elapsed = now() - start
            if index >= 0:
                result = results[case.name]
                result.ms.append(1e3 * elapsed)
                if before is not None:
                    result.peak = max(result.peak or 0, torch.cuda.max_memory_allocated(device) - before)
    return results


def _start_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, minimum and maximum."""
    return statistics.median(values), min(values), max(values)


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
    return interleaved([Case("only", run)], device, rounds, warmup=3)["only"].median / 1e3
