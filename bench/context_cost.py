"""What the guard and the checks of a context cost on a Llama-3.1-8B shape, ten samples, one GPU.

python -m bench.context_cost --out FILE
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tfb_ext
from tfb_ext.forward.caches import cache_argument

from .llama import LLAMA_8B, add_adapters, build
from .record import write_json

SAMPLES, SIGMA, CONTEXT = 10, 0.02, 512


def seconds(call: Callable[[], Any], runs: int = 20) -> float:
    """Median wall time of a call, the GPU's work included."""
    times = []
    for run in range(runs + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times += [time.perf_counter() - started] if run >= 3 else []
    return statistics.median(times)


def measure() -> dict[str, Any]:
    device = torch.device("cuda")
    peft = add_adapters(build(LLAMA_8B, LLAMA_8B.blocks, device), "all", {"default": torch.bfloat16})
    adapter = tfb_ext.bayesianize(peft, sigma=SIGMA)
    model: Any = peft.get_base_model()
    ids = torch.randint(10, 1000, (1, CONTEXT), device=device)

    def opened() -> None:
        with adapter.predictive(SAMPLES):
            pass

    started = time.perf_counter()
    opened()
    torch.cuda.synchronize()
    found = {"first_context_ms": 1e3 * (time.perf_counter() - started), "warm_context_ms": 1e3 * seconds(opened)}
    with adapter.predictive(SAMPLES):
        found["eager_token_ms"] = 1e3 * seconds(lambda: model(input_ids=ids[:, :1], use_cache=False), 40)
    with tfb_ext.captured_decoding(adapter) as decoding, adapter.predictive(SAMPLES):

        def generate(tokens: int) -> None:
            cache = {cache_argument(model): decoding.cache(1, CONTEXT + 128)}
            model.generate(ids, **cache, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

        generate(8)
        found["graph_step_ms"] = 1e3 * (seconds(lambda: generate(72), 7) - seconds(lambda: generate(8), 7)) / 64
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tfb_ext": tfb_ext.__version__}
    write_json(options.out, measure() | facts)


if __name__ == "__main__":
    main()
