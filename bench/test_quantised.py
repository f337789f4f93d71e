"""Samples on quantised base models of a Llama-3.1-8B shape, against those models' own forwards.

Random weights, quantised by bitsandbytes (nf4, double quantisation) and torchao; r = 8 on all seven linear layers, the adapter in float32
under bfloat16. Every case is timed in turns with the quantised base model alone, without PEFT's layers. The first context of each
compares samples with separate passes. ``switch`` says from how many rows on a dense weight for the length of a product is faster than the
library's own product and the update added to it: the seven layers of a block.

    python -m pytest bench/test_quantised.py --benchmark-json=quantised.json     on a GPU with 24 GiB free, with the extra "quantised" and torchao
    TFB_BENCH_TINY=1 python -m pytest bench/test_quantised.py                    a toy of the same structure, also on the CPU
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import tfb_ext
from tfb_ext import ops
from tfb_ext.adapters.products import outputs

from .llama import activate, add_adapters, build_quantised, lora_layers
from .setting import CONTEXT, DEVICE, SHAPE, SIGMA, STEPS, TOY, Decoder, Setting, needs_gpu, release
from .versus import Versus

pytestmark = needs_gpu
LIBRARY = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao", "fp8-dynamic": "torchao"}
SWITCH_ROWS = (1, 8) if TOY else (8, 64, 256, 1024, 4096, 8192)
MANY, NEW = (8, 4) if TOY else (64, 32)
BUDGET = "8GiB"


class Quantised(Setting):
    """A quantised model with a Bayesian adapter, and PEFT's own on the same weights' values."""

    def __init__(self, scheme: str) -> None:
        if importlib.util.find_spec(LIBRARY[scheme]) is None:
            pytest.skip(f"needs {LIBRARY[scheme]}")
        if scheme == "fp8-dynamic" and DEVICE.type == "cpu":
            pytest.skip("its kernels are for GPUs")
        self.shape, self.scheme = SHAPE, scheme
        model = build_quantised(SHAPE, SHAPE.blocks, DEVICE, scheme)
        self.peft = add_adapters(model, "all", {"ours_fp32": torch.float32, "plain_fp32": torch.float32})
        self.base: Any = self.peft.get_base_model()
        self.adapters = {"fp32": tfb_ext.bayesianize(self.peft, "ours_fp32", sigma=SIGMA)}


@pytest.fixture(scope="module", params=list(LIBRARY))
def setting(request: pytest.FixtureRequest) -> Iterator[Quantised]:
    release()
    yield Quantised(request.param)
    release()


def case_of(scheme: str, what: str) -> str:
    return f"{scheme.replace('-', '_')}_{what}"


def test_memory(versus: Versus) -> None:
    """An nf4 model, 64 samples: predictions of 8 prompts and 32 generated tokens, the process held to 8 GiB. First, with no other model."""
    from tfb_ext.app.loading import CONTEXT as OF_CONTEXT
    from tfb_ext.app.loading import hold_memory
    from tfb_ext.data import Encoded

    release()
    if DEVICE.type == "cuda":
        hold_memory(BUDGET, DEVICE)
    try:
        s = Quantised("nf4")
        adapter, ids = s.adapters["fp32"], s.inputs()["input_ids"]
        data = Encoded(ids.tolist(), [None] * len(ids), (11, 12), ("a", "b"), 0)
        greedy = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
        prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        activate(s.peft, adapter.name)

        def run() -> None:
            for span in ("all", "answer"):
                adapter.span = span
                tfb_ext.predict(adapter, data, samples=MANY)
                tfb_ext.generate(adapter, prompts, samples=MANY, **greedy)

        versus(
            "memory_8gib", run, lambda: None, of=f"{BUDGET}, CUDA's context (600 MiB) in them", rounds=1, warmup=0,
            samples=MANY, new_tokens=NEW, scheme="nf4",
        )  # fmt: skip
        if DEVICE.type == "cuda":
            free, total = torch.cuda.mem_get_info(DEVICE)
            versus.benchmark.extra_info["card_gib"] = (total - free) / 2**30
            versus.in_gib((torch.cuda.max_memory_reserved(DEVICE) + OF_CONTEXT) / 2**30, 8.0)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
        release()


def test_prefill(setting: Quantised, versus: Versus) -> None:
    s, many = setting, SHAPE.rows * SHAPE.samples
    versus(
        case_of(s.scheme, "prefill"), s.run_peft(**s.inputs()), s.run_base(**s.inputs(SHAPE.samples)), scheme=s.scheme,
        of=f"the quantised base model on {many} rows", context=s.fused("fp32"), baseline_context=s.without_peft,
        rounds=5,
    )  # fmt: skip


def test_peft(setting: Quantised, versus: Versus) -> None:
    """PEFT's own deterministic LoRA on as many rows."""
    s, many = setting, SHAPE.rows * SHAPE.samples
    inputs = s.inputs(SHAPE.samples)
    versus(
        case_of(s.scheme, "peft"), s.run_peft(**inputs), s.run_base(**inputs), scheme=s.scheme, rounds=5,
        of=f"the quantised base model on {many} rows", context=s.plain("plain_fp32"), baseline_context=s.without_peft,
    )  # fmt: skip


def test_span(setting: Quantised, versus: Versus) -> None:
    s = setting
    versus(
        case_of(s.scheme, "span"), s.run_peft(**s.inputs()), s.run_base(**s.inputs()), scheme=s.scheme, span="answer",
        of=f"the quantised base model on {SHAPE.rows} rows", context=s.fused("fp32", span="answer"),
        baseline_context=s.without_peft, rounds=9,
    )  # fmt: skip


def test_decode(setting: Quantised, versus: Versus) -> None:
    s, rows = setting, SHAPE.samples
    with s.without_peft():
        base = Decoder(s.base, rows, s.shape)
    with s.fused("fp32")():
        ours = Decoder(s.peft, 1, s.shape)
    versus(
        case_of(s.scheme, "decode"), ours, base, scheme=s.scheme, repeats=STEPS, rounds=9,
        of=f"the quantised base model's captured decoding of {rows} rows, {CONTEXT} tokens of context",
        context=s.fused("fp32"), baseline_context=s.without_peft,
    )  # fmt: skip


@pytest.mark.parametrize("rows", SWITCH_ROWS)
def test_switch(setting: Quantised, versus: Versus, rows: int) -> None:
    s, adapter = setting, setting.adapters["fp32"]
    names = [name for name in adapter.layers if ".0." in name]
    updates = [layer.tfb_updates[adapter.name] for layer in lora_layers(s.peft, names)]  # type: ignore[operator,index]
    kind = updates[0].kind
    if kind is None or not kind.takes(updates[0].module.base_layer, torch.bfloat16):
        pytest.skip("its product is its library's alone")
    inputs = [torch.randn(rows, u.module.in_features, device=DEVICE, dtype=torch.bfloat16) for u in updates]

    samples = max(n for n in range(1, SHAPE.samples + 1) if rows % n == 0)
    batch = adapter.batch(samples)

    def library() -> list[Tensor]:
        return [added(u, x, u.module.base_layer(x), batch) for u, x in zip(updates, inputs, strict=True)]

    def dense() -> list[Tensor]:
        return [outputs([u], x, batch)[0] for u, x in zip(updates, inputs, strict=True)]

    @contextmanager
    def inside() -> Iterator[None]:
        activate(s.peft, adapter.name)
        with torch.no_grad():
            yield

    versus(
        case_of(s.scheme, f"switch_{rows}"), captured(dense, inside), captured(library, inside), scheme=s.scheme,
        of=f"the library's product and the update added to it, the layers of a block, {rows} rows in a graph",
        rows=rows, rounds=9, context=inside, baseline_context=inside,
    )  # fmt: skip


def added(update: Any, x: Tensor, y: Tensor, batch: Any) -> Tensor:
    """A quantised product ``y`` of ``x`` with the update added to it."""
    mean = update.module._buffers[update.buffers[1]]
    z = ops.shrink(x, mean, *batch.tensors(x.device), update.layer, batch.mode, batch.antithetic)
    return ops.expand_(y, z, update.basis_in(y.dtype), update.module.scaling[update.adapter])


def captured(run: Callable[[], Any], inside: Callable[[], Any]) -> Callable[[], Any]:
    """``run`` as a CUDA graph, so that the host counts for nothing; as it is where there is no GPU."""
    with inside():
        for _ in range(2):
            run()
        if DEVICE.type != "cuda":
            return run
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return graph.replay
