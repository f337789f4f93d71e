"""One posterior-predictive forward of a Llama-3.1-8B-shaped model against what it competes with.

Random bfloat16 weights, LoRA r = 8, 8 rows of 128 tokens without padding, 10 samples, no key-value cache, no gradients.
Every case computes the logits of the last position alone (``logits_to_keep=1``) but for those named ``*_full_logits``.

    base_8, base_80      the model with plain ``nn.Linear`` layers, PEFT taken out; 80 rows are all samples' rows
    peft_8_*, peft_80_*  PEFT's deterministic LoRA, adapter in float32 (PEFT's default) or in bfloat16
    fused_all, _quarter  this package on 8 rows: all blocks random, or the top quarter of them
    sequential_*         one PEFT forward of 8 rows for each sample, noise from ``torch.randn`` in every layer

Opening a sampling context is not timed, the first forward inside it is. Ratios are taken within a round.

    python -m bench.model_forward           on the GPU, writes bench/results/model_forward.json
    python -m bench.model_forward --tiny    a toy of the same structure, also on the CPU; writes only where --out says
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import tfb_ext
from tfb_ext.adapter import BayesianAdapter

from .check import Check, check_fused
from .llama import LLAMA_8B, TARGETS, TINY, Shape, activate, add_adapters, bare, build, token_ids
from .record import ROOT, environment, table, write_json
from .sequential import SequentialSampler
from .timing import Case, Timings, copy_bandwidth, gemm_rate, interleaved, spread

SIGMA = 0.02
QUARTER = 0.25
# The sequential baseline writes its draws into adapters of its own; those that PEFT is timed with stay as they are.
ADAPTERS = {
    "peft_float32": torch.float32,
    "peft_bfloat16": torch.bfloat16,
    "sequential_float32": torch.float32,
    "sequential_bfloat16": torch.bfloat16,
}
LAST = {"logits_to_keep": 1}
COLUMNS = ["case", "layers", "dtype_adapter", "rows", "depth", "ms_median", "ms_min", "ms_max"]
COLUMNS += ["ratio_to", "ratio_median", "ratio_min", "ratio_max", "peak_gib"]


class Forwards:
    """The cases of one model with one choice of adapted layers, and what each row of the result says about its case."""

    def __init__(self, peft: PeftModel, adapter: BayesianAdapter, layers: str, shape: Shape) -> None:
        self.peft = peft
        self.adapter = adapter
        self.layers = layers
        self.shape = shape
        device = next(peft.parameters()).device
        self.few = {"input_ids": token_ids(shape, 1, device), "use_cache": False}
        self.many = {"input_ids": token_ids(shape, shape.samples, device), "use_cache": False}
        self.cases: list[Case] = []
        self.facts: dict[str, dict[str, Any]] = {}
        self._add_plain()
        self._add_sampled()

    def _add_plain(self) -> None:
        few, many = self.shape.rows, self.shape.rows * self.shape.samples
        base_few, base_many = f"base_{few}", f"base_{many}"
        self._add(base_few, base_many, self._bare(self.few | LAST), self._without_peft, rows=few)
        self._add(base_many, base_few, self._bare(self.many | LAST), self._without_peft, rows=many)
        self._add(f"{base_many}_full_logits", base_many, self._bare(self.many), self._without_peft, rows=many)
        for dtype in ("float32", "bfloat16"):
            context = self._active(f"peft_{dtype}")
            self._add(f"peft_{few}_{dtype}", base_few, self._peft(self.few | LAST), context, rows=few, dtype=dtype)
            self._add(f"peft_{many}_{dtype}", base_many, self._peft(self.many | LAST), context, rows=many, dtype=dtype)

    def _add_sampled(self) -> None:
        few, samples = self.shape.rows, self.shape.samples
        base_few, base_many = f"base_{few}", f"base_{few * samples}"
        sampled: dict[str, Any] = {"rows": few, "samples": samples}
        for name, ratio_to, depth, inputs in (
            ("fused_all", base_many, "all", self.few | LAST),
            ("fused_all_repeat", "fused_all", "all", self.few | LAST),
            ("fused_quarter", base_few, QUARTER, self.few | LAST),
            ("fused_all_full_logits", f"{base_many}_full_logits", "all", self.few),
        ):
            self._add(name, ratio_to, self._peft(inputs), self._fused(depth), depth=depth, dtype="float32", **sampled)
        for dtype in ("float32", "bfloat16"):
            name = f"sequential_{dtype}"
            run = self._sequential(SequentialSampler(self.peft, name, self.adapter.posteriors, SIGMA))
            self._add(name, "fused_all", run, self._active(name), depth="all", dtype=dtype, **sampled)

    def _add(
        self,
        name: str,
        ratio_to: str,
        run: Callable[[], object],
        context: Callable[[], AbstractContextManager[Any]],
        *,
        rows: int,
        samples: int = 1,
        depth: str | float | None = None,
        dtype: str | None = None,
    ) -> None:
        self.cases.append(Case(name, run, context))
        self.facts[name] = {
            "case": name,
            "layers": self.layers,
            "dtype_adapter": dtype,
            "rows": rows,
            "tokens": self.shape.tokens,
            "samples": samples,
            "depth": depth,
            "logits": "all positions" if name.endswith("_full_logits") else "last position",
            "ratio_to": ratio_to,
        }

    def _bare(self, inputs: dict[str, Any]) -> Callable[[], object]:
        base = self.peft.get_base_model()
        return lambda: base(**inputs)

    def _peft(self, inputs: dict[str, Any]) -> Callable[[], object]:
        return lambda: self.peft(**inputs)

    def _sequential(self, sampler: SequentialSampler) -> Callable[[], object]:
        return lambda: sampler.predict(self.shape.samples, **self.few, **LAST)

    @contextmanager
    def _without_peft(self) -> Iterator[None]:
        with bare(self.peft), torch.no_grad():
            yield

    def _active(self, adapter: str) -> Callable[[], AbstractContextManager[Any]]:
        @contextmanager
        def context() -> Iterator[None]:
            activate(self.peft, adapter)
            with torch.no_grad():
                yield

        return context

    def _fused(self, depth: str | float) -> Callable[[], AbstractContextManager[Any]]:
        @contextmanager
        def context() -> Iterator[None]:
            activate(self.peft, self.adapter.name)
            self.adapter.depth = depth
            with self.adapter.predictive(self.shape.samples):
                yield

        return context


def result_rows(forwards: Forwards, timings: dict[str, Timings], check: Check) -> list[dict[str, Any]]:
    """One row a case; ``ratios[other]`` is the median, least and greatest ratio to every other case, within rounds."""
    rows = []
    for name, facts in forwards.facts.items():
        timed = timings[name]
        median, least, most = spread(timed.ms)
        ratios = {
            other: spread([a / b for a, b in zip(timed.ms, against.ms, strict=True)])
            for other, against in timings.items()
            if other != name
        }
        ratio = ratios[facts["ratio_to"]]
        row = {
            **facts,
            "ms_median": median,
            "ms_min": least,
            "ms_max": most,
            "ratio_median": ratio[0],
            "ratio_min": ratio[1],
            "ratio_max": ratio[2],
            "peak_gib": None if timed.peak is None else timed.peak / 2**30,
            "ratios": ratios,
            "rounds": len(timed.ms),
        }
        if name.startswith("fused"):
            row |= {"error": check.error, "error_plain": check.plain}
            row |= {"tolerance": check.tolerance, "effect": check.effect}
        rows.append(row)
    return rows


def time_layers(layers: str, shape: Shape, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Check, then time, all cases with the adapter on ``layers``."""
    check = check_fused(shape, layers, device)
    release(device)
    print(
        f"{layers}: largest error of a sample's log probability {check.error:.2e} (plain bfloat16 {check.plain:.2e}, "
        f"tolerance {check.tolerance:.2e}; without noise it would be {check.effect:.2e})",
        flush=True,
    )
    check.require()
    peft = add_adapters(build(shape, shape.blocks, device), layers, ADAPTERS)
    start = time.perf_counter()
    adapter = tfb_ext.bayesianize(peft, "peft_float32", sigma=SIGMA)
    print(f"{layers}: bayesianize took {time.perf_counter() - start:.1f} s", flush=True)
    forwards = Forwards(peft, adapter, layers, shape)
    release(device)
    found = result_rows(forwards, interleaved(forwards.cases, device, rounds), check)
    print(table(found, COLUMNS), flush=True)
    return found


def release(device: torch.device) -> None:
    """Give back what a dropped model held: modules and hooks refer to each other, so they wait for the collector."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after two that are not")
    parser.add_argument("--layers", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/model_forward.json; --tiny: none)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type != "cuda" and not options.tiny:
        parser.error("an 8B model needs a GPU with 40 GiB free; pass --tiny to try the script without one")
    out = options.out or (None if options.tiny else ROOT / "bench/results/model_forward.json")
    flags = f"{' --tiny' if options.tiny else ''} --rounds {options.rounds} --layers {' '.join(options.layers)}"
    common = {
        "copy_gb_s": copy_bandwidth(device) / 1e9,
        "gemm_tflop_s": gemm_rate(device) / 1e12,
        **environment(device, f"python -m bench.model_forward{flags}"),
    }
    release(device)
    ceilings = f"copy {common['copy_gb_s']:.0f} GB/s, bfloat16 product {common['gemm_tflop_s']:.1f} TFLOP/s"
    print(f"{common['device']}: {ceilings}", flush=True)
    rows: list[dict[str, Any]] = []
    for layers in options.layers:
        found = time_layers(layers, TINY if options.tiny else LLAMA_8B, device, options.rounds)
        rows += [row | common for row in found]
        release(device)
        if out is not None:
            write_json(out, rows)


if __name__ == "__main__":
    main()
