"""What a call costs on the host: a model of 32 narrow blocks on one CPU core, whose time is that of Python and of launching operators.

On a GPU this time hides behind the kernels as far as it is shorter than they are. The samples' call is set against the base
model's, PEFT's own and the rows' (span "all"), and profiled.

    OMP_NUM_THREADS=1 python -m bench.host_cost [--samples 10] [--top 25] [--out FILE]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tfb_ext

from .llama import Shape, activate, add_adapters, bare, build, token_ids
from .record import ROOT, environment, table, write_json

NARROW = Shape(64, 128, 32, 4, 2, 512, rows=2, tokens=16, samples=10)
CPU = torch.device("cpu")
RUNS = 40
# A call of the model, and the context that it is made in.
Case = tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]


class Operators(TorchDispatchMode):
    """Counts what is dispatched, views included."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def milliseconds(cases: dict[str, Case]) -> dict[str, list[float]]:
    """Wall times of each case's calls; the cases take turns."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(RUNS // 5):
        for name, (call, context) in cases.items():
            with context():
                for _ in range(2 if run == 0 else 0):
                    call()
                for _ in range(5):
                    started = time.perf_counter()
                    call()
                    times[name].append(1e3 * (time.perf_counter() - started))
    return times


def operators(call: Callable[[], Any], context: Callable[[], AbstractContextManager[Any]]) -> int:
    with context(), Operators() as counted:
        call()
    return counted.count


def profile(
    call: Callable[[], Any], context: Callable[[], AbstractContextManager[Any]], top: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of one call the packages and the functions by their own time; the profiler makes Python's share look larger than it is."""
    profiler = cProfile.Profile()
    with context():
        call()
        profiler.enable()
        for _ in range(RUNS):
            call()
        profiler.disable()
    stats: Any = pstats.Stats(profiler)
    shares: dict[str, float] = defaultdict(float)
    functions = []
    for (file, line, function), (_, calls, own, cumulative, _) in stats.stats.items():
        where = _shown(file)
        package = where.split("/")[0]
        if file == "~":
            package = "operators of tfb_ext" if "torch._ops.tfb_ext" in function else "other built-in functions"
        shares[package] += own
        functions.append(
            {
                "own %": 100 * own / stats.total_tt,
                "own ms": 1e3 * own / RUNS,
                "with callees ms": 1e3 * cumulative / RUNS,
                "calls": round(calls / RUNS),
                "function": function if file == "~" else f"{where}:{line} {function}",
            }
        )
    packages = [
        {"own %": 100 * own / stats.total_tt, "own ms": 1e3 * own / RUNS, "code of": name}
        for name, own in sorted(shares.items(), key=lambda item: -item[1])
        if own >= 1e-3 * stats.total_tt
    ]
    return packages, sorted(functions, key=lambda row: -row["own %"])[:top]


def _shown(file: str) -> str:
    """Without the folder that it was imported from."""
    for root in (str(ROOT), *sorted(sys.path, key=len, reverse=True)):
        if root and file.startswith(root + "/"):
            return file.removeprefix(root + "/")
    return file


def measure(samples: int, top: int) -> dict[str, Any]:
    torch.set_grad_enabled(False)
    peft = add_adapters(
        build(NARROW, NARROW.blocks, CPU, torch.float32), "all", {"ours": torch.float32, "plain": torch.float32}
    )
    adapter = tfb_ext.bayesianize(peft, "ours", sigma=0.02)
    base: Any = peft.get_base_model()
    inputs: dict[str, Any] = {"input_ids": token_ids(NARROW, 1, CPU), "use_cache": False, "logits_to_keep": 1}

    def call() -> Any:
        return base(**inputs)

    def active(name: str) -> AbstractContextManager[Any]:
        activate(peft, name)
        return nullcontext()

    def sampled(span: str) -> Callable[[], AbstractContextManager[Any]]:
        def context() -> AbstractContextManager[Any]:
            activate(peft, "ours")
            return adapter.predictive(samples, span=span)

        return context

    cases = {
        "the base model": (call, lambda: bare(peft)),
        "PEFT's deterministic adapter": (call, lambda: active("plain")),
        f"{samples} samples of the answer": (call, sampled("answer")),
        f"{samples} samples of all tokens": (call, sampled("all")),
    }
    times = milliseconds(cases)
    base_ms = statistics.median(times["the base model"])
    rows = [
        {
            "call": name,
            "ms": statistics.median(values),
            "least ms": min(values),
            "of the base": statistics.median(values) / base_ms,
            "operators": operators(*cases[name]),
        }
        for name, values in times.items()
    ]
    packages, functions = profile(*cases[f"{samples} samples of the answer"], top)
    known = environment(CPU, "python -m bench.host_cost")
    return {"calls": rows, "packages": packages, "functions": functions} | known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=NARROW.samples)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    found = measure(options.samples, options.top)
    print(*(table(found[part], list(found[part][0])) for part in ("calls", "packages", "functions")), sep="\n\n")
    if options.out is not None:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
