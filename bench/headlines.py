"""The demonstration's adapters and what a bench of them is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import tfb_ext
from tfb_ext.adapters.adapter import BayesianAdapter
from tfb_ext.app.loading import DEMO, Loaded, load_adapter

# The second and third are trained by bench/run_gpu.sh.
ADAPTERS = (DEMO, "build/adapters/seed1", "build/adapters/seed2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--adapter`` (any number), ``--anchors``, ``--rounds``, ``--device`` and ``--out``."""
    parser.add_argument("--adapter", action="append", help="'demo' or the folder of an adapter for the headlines")
    parser.add_argument("--anchors", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)


def adapters(names: Sequence[str] | None, device: str) -> Iterator[tuple[str, Loaded, BayesianAdapter]]:
    """Each adapter loaded and made Bayesian, one after the other; ``None`` is all of the demonstration's."""
    for name in names or ADAPTERS:
        loaded = load_adapter(str(name), device=device)
        yield str(name), loaded, tfb_ext.bayesianize(loaded.model)
