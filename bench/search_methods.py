"""Ways to the same sigma, compared on a real adapter: how many evaluations, how many seconds, how far off.

    python -m bench.search_methods --out bench/results/search_methods.json

The demonstration's adapters and headlines. For each question (how many answers may change; how far the NLL may move) every
method looks for the largest sigma in the same bracket. The reference is bisection with fourteen steps and the same noise, so
what is left between two methods is where they stopped.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from tfb_ext import search_sigma
from tfb_ext.app.demo.headlines import load_split
from tfb_ext.data import encode
from tfb_ext.search import SigmaSearch

from .headlines import adapters, add_arguments
from .record import environment, write_json
from .timing import spread

COMMAND = "python -m bench.search_methods"
BRACKET = (0.005, 0.32)
QUESTIONS: dict[str, dict[str, Any]] = {
    "flips": {"metric": "flips", "tolerance": 0.02},
    "nll": {"metric": "nll", "tolerance": 0.05, "bound": "two-sided"},
}
METHODS: dict[str, dict[str, Any]] = {
    "bisect": {"method": "bisect", "steps": 6},
    "grid": {"method": "grid", "steps": 5},
    "root": {"method": "root", "steps": 10},
}
REFERENCE: dict[str, Any] = {"method": "bisect", "steps": 14}
CONFIDENCE = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--samples", type=int, default=10)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    where: dict[str, Any] = {}
    for name, loaded, adapter in adapters(options.adapter, options.device):
        where = where or environment(next(loaded.model.parameters()).device, COMMAND)
        anchors = encode(load_split("anchor", options.anchors), loaded.tokenizer)

        def search(adapter: Any = adapter, anchors: Any = anchors, **how: Any) -> SigmaSearch:
            found: SigmaSearch = search_sigma(
                adapter, anchors, bracket=BRACKET, samples=options.samples, progress=False, apply=False, **how
            )
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return found

        for question, rule in QUESTIONS.items():
            reference = search(**rule, **REFERENCE).sigma
            for method, how in METHODS.items():
                for early in (None, CONFIDENCE):
                    runs = [search(**rule, **how, early_stop=early) for _ in range(options.rounds)]
                    seconds, fastest, slowest = spread([run.seconds for run in runs])
                    found = runs[0]
                    rows.append(
                        {
                            "adapter": name,
                            "question": question,
                            "method": method,
                            "early_stop": early,
                            "sigma": found.sigma,
                            "reference": reference,
                            "log2_off": abs(math.log2(found.sigma / reference)),
                            "satisfied": found.satisfied,
                            "evaluations": len(found.evaluations),
                            "tokens_through_random_blocks": found.tokens,
                            "seconds": seconds,
                            "spread": [fastest, slowest],
                        }
                    )
                    print(
                        f"{name} {question} {method}{' early' if early else ''}: sigma {found.sigma:.4g} "
                        f"(reference {reference:.4g}), {len(found.evaluations)} evaluations, {seconds:.2f} s",
                        flush=True,
                    )
    if options.out is not None:
        facts = {"anchors": options.anchors, "samples": options.samples, "bracket": list(BRACKET)}
        write_json(options.out, {"rows": rows} | facts | where)


if __name__ == "__main__":
    main()
