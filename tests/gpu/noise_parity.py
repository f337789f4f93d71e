"""Ten million draws of the noise on the CPU and on the GPU: ``python tests/gpu/noise_parity.py parity.json``.

Writes ``{"draws", "max_abs", "device"}`` and exits with 1 if a draw differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from tfb_ext import ops

TOLERANCE = 1e-5
ROWS, COLUMNS, PARTS = 250, 4000, 10
# 2^64 and 2^32 over the golden ratio, made odd: the parts' seeds and layers use all their bits.
SEED_STEP, LAYER_STEP = 0x9E3779B97F4A7C15, 0x9E3779B9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    differences = []
    for part in range(PARTS):
        seed, layer = part * SEED_STEP % 2**64, part * LAYER_STEP % 2**32
        there = ops.noise(ROWS, COLUMNS, seed, layer, part, device).cpu()
        differences.append((there - ops.noise(ROWS, COLUMNS, seed, layer, part, torch.device("cpu"))).abs().max())
    largest = float(torch.stack(differences).max())  # max keeps a NaN, Python's does not
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    result = {"draws": ROWS * COLUMNS * PARTS, "max_abs": largest if math.isfinite(largest) else None, "device": name}
    options.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    raise SystemExit(0 if largest <= TOLERANCE else 1)


if __name__ == "__main__":
    main()
