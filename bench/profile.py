"""One launch of each kernel for Nsight Compute, and what its log says in short.

    ncu --set detailed -k 'regex:(shrink|expand|decode)_kernel' --metrics "$(python -m bench.profile --metrics)" \\
        --clock-control none python -m bench.profile | tee ncu.log
    python -m bench.profile --read ncu.log --out bench/results/ncu.json
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

from tfb_ext import ops

from .record import environment, write_json
from .test_kernels import LAYER, SCALING, draws, rows

TOKENS = 10240
STALLS = (
    "barrier lg_throttle long_scoreboard math_pipe_throttle membar mio_throttle no_instruction short_scoreboard wait"
).split()
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
# JSON's name -> ncu's.
METRICS = {
    "us": "Duration",
    "dram_percent": "DRAM Throughput",
    "elapsed_cycles": "Elapsed Cycles",
    "active_cycles": "SM Active Cycles",
    "ipc": "Executed Ipc Active",
    "occupancy_percent": "Achieved Occupancy",
    "registers": "Registers Per Thread",
    "blocks": "Grid Size",
    "threads": "Block Size",
    "instructions": "smsp__inst_executed.sum",
} | {f"stall_{name}": STALL.format(name) for name in STALLS}

LAUNCHES: tuple[dict[str, Any], ...] = (
    {"kernel": "shrink", "tokens": TOKENS, "n": 4096, "r": 8},
    {"kernel": "shrink", "tokens": TOKENS, "n": 14336, "r": 8},
    {"kernel": "shrink", "tokens": TOKENS, "n": 4096, "r": 16},
    {"kernel": "shrink", "tokens": TOKENS, "n": 4096, "r": 32},
    {"kernel": "shrink", "tokens": TOKENS, "n": 4096, "r": 64},
    {"kernel": "shrink", "tokens": rows(2048), "n": 4096, "r": 8},
    *(
        {"kernel": f"expand_{form}", "tokens": TOKENS, "m": 4096, "r": r}
        for r in (8, 32, 64)
        for form in ("write", "add")
    ),
    {"kernel": "decode", "tokens": 10, "n": 4096, "m": (4096, 1024, 1024), "r": 8},
)


def launch(kernel: str, device: str, tokens: int, r: int, n: int = 0, m: int | tuple[int, ...] = 0) -> None:
    """Once, on random numbers."""
    x = torch.randn(tokens, n or r, device=device).bfloat16()
    outs = m if isinstance(m, tuple) else (m,)
    bases = [torch.randn(out, r, device=device).bfloat16() for out in outs]
    if kernel == "expand_write":
        ops.expand(x, bases[0], SCALING)
    elif kernel == "expand_add":
        ops.expand_(torch.zeros(tokens, outs[0], device=device, dtype=torch.bfloat16), x, bases[0], SCALING)
    else:
        given = draws(device, n, [r] * len(outs))
        if kernel == "shrink":
            given.shrink(x)
            return
        layers = list(range(LAYER, LAYER + len(outs)))
        scalings, biases = [SCALING] * len(outs), [None] * len(outs)
        ops.update_group(x, list(given.means), bases, biases, scalings, given.sigma, given.samples, given.seed, layers)


def read(log: str) -> dict[str, Any]:
    """Where the log is from, and a row for each of :data:`LAUNCHES`, in order."""
    printed = re.search(r"^\{.*\}$", log, re.MULTILINE)
    if printed is None:
        raise ValueError("the log does not say where it is from; python -m bench.profile prints that at its end")
    parts = re.split(r"\n  (?:void )?(?:[^\n ]*::)?(?=\w+_kernel<)", log)[1:]
    if len(parts) != len(LAUNCHES):
        raise ValueError(f"the log has {len(parts)} kernels, expected {len(LAUNCHES)}")
    found = []
    for given, part in zip(LAUNCHES, parts, strict=True):
        if not part.startswith(given["kernel"].split("_")[0]):
            raise ValueError(f"the log has {part.splitlines()[0]!r} where {given} was expected")
        row = dict(given)
        for key, name in METRICS.items():
            match = re.search(rf"^ *{re.escape(name)} .*?([\d,.]+) *$", part, re.MULTILINE)
            row[key] = float(match.group(1).replace(",", "")) if match else None
        found.append(row)
    return json.loads(printed.group()) | {"kernels": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", action="store_true", help="print the stall metrics that a log should have")
    parser.add_argument("--read", type=Path, help="log of ncu")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.metrics:
        print(",".join(name for name in METRICS.values() if name.startswith("smsp__")))
    elif options.read is not None:
        if options.out is None:
            parser.error("--read needs --out")
        write_json(options.out, read(options.read.read_text()))
    else:
        for given in LAUNCHES:
            launch(device=options.device, **given)
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(json.dumps(environment(torch.device(options.device), "ncu python -m bench.profile")))


if __name__ == "__main__":
    main()
