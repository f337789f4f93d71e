"""Whole models: one posterior predictive of a Llama-3.1-8B shape against the model's own forward, and what else there is.

Random bfloat16 weights, 8 rows of 128 tokens without padding, 10 samples, the logits of the last position, no key-value
cache, unless a case says otherwise. The baselines are the base model without PEFT's layers on 8 rows or on all samples'
80, PEFT's deterministic adapter, and ten sequential sampled passes in plain torch. Every case is timed in turns with its
baseline; before that, each model's samples are checked against their weights written out in float32.

    python -m pytest bench/test_models.py --benchmark-json=models.json     on a GPU with 60 GiB free
    TFB_BENCH_TINY=1 python -m pytest bench/test_models.py                 a toy of the same structure, also on the CPU
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import tfb_ext
from tfb_ext import ops
from tfb_ext.forward.caches import cache_argument

from .check import check_fused
from .llama import LLAMA_8B, TINY, Shape, activate, add_adapters, bare, build, token_ids
from .sequential import SequentialSampler
from .timing import event_clock
from .versus import Versus

TOY = os.environ.get("TFB_BENCH_TINY") == "1"
SHAPE = TINY if TOY else LLAMA_8B
SIGMA = 0.02
QUARTER, EIGHTH = 0.25, 0.25 if TOY else 0.125
CONTEXT = 16 if TOY else 512  # tokens before decoding
STEPS = 8  # of decoding, in one timing
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

pytestmark = [
    pytest.mark.skipif(
        not (TOY or torch.cuda.is_available()), reason="torch sees no CUDA device; TFB_BENCH_TINY=1 tries a toy"
    ),
    *([pytest.mark.benchmark(timer=event_clock)] if torch.cuda.is_available() else []),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Setting:
    """One model with an adapter of each type, Bayesian, and a sampler in plain torch for each."""

    def __init__(self, layers: str, rank: int, dtypes: tuple[str, ...], shape: Shape = SHAPE) -> None:
        check_fused(shape, layers, DEVICE, rank).require()
        release()
        self.shape = shape
        names = {f"ours_{d}": DTYPES[d] for d in dtypes} | {f"plain_{d}": DTYPES[d] for d in dtypes}
        self.peft = add_adapters(build(shape, shape.blocks, DEVICE), layers, names, rank)
        self.base: Any = self.peft.get_base_model()
        self.adapters = {d: tfb_ext.bayesianize(self.peft, f"ours_{d}", sigma=SIGMA) for d in dtypes}
        self.samplers = {
            d: SequentialSampler(self.peft, f"plain_{d}", self.adapters[d].posteriors, SIGMA) for d in dtypes
        }

    def inputs(self, copies: int = 1, rows: int | None = None, tokens: int | None = None) -> dict[str, Any]:
        ids = token_ids(self.shape, copies, DEVICE, rows, tokens)
        return {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}

    def run_base(self, **inputs: Any) -> Callable[[], Any]:
        return lambda: self.base(**inputs)

    def run_peft(self, **inputs: Any) -> Callable[[], Any]:
        return lambda: self.peft(**inputs)

    @contextmanager
    def without_peft(self) -> Iterator[None]:
        with bare(self.peft), torch.no_grad():
            yield

    @contextmanager
    def without_peft_and_head_in_one_product(self) -> Iterator[None]:
        """torch multiplies the slice of last positions row by row; in one piece, the head reads its weight once."""
        with self.without_peft():
            hook = self.base.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
            try:
                yield
            finally:
                hook.remove()

    def plain(self, name: str) -> Callable[[], AbstractContextManager[None]]:
        """PEFT's deterministic adapter."""

        @contextmanager
        def context() -> Iterator[None]:
            activate(self.peft, name)
            with torch.no_grad():
                yield

        return context

    def flipout(self, dtype: str) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def context() -> Iterator[None]:
            activate(self.peft, f"plain_{dtype}")
            with torch.no_grad(), self.samplers[dtype].flipout():
                yield

        return context

    def fused(
        self, dtype: str, depth: int | float | str = "all", samples: int | None = None, portable: bool = False
    ) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def context() -> Iterator[None]:
            adapter = self.adapters[dtype]
            activate(self.peft, adapter.name)
            adapter.depth = depth
            ops.use_portable_kernels(portable)
            try:
                with adapter.predictive(samples or self.shape.samples):
                    yield
            finally:
                ops.use_portable_kernels(False)

        return context


def release() -> None:
    """Give back what a dropped model held: modules and hooks refer to each other, so they wait for the collector."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(scope="class")
def all_linear() -> Iterator[Setting]:
    yield Setting("all", 8, ("bf16", "fp32"))
    release()


MANY = f"the base forward on {SHAPE.rows * SHAPE.samples} rows"
FEW = f"the base forward on {SHAPE.rows} rows"


class TestAllLinear:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_prefill(self, all_linear: Setting, versus: Versus, dtype: str) -> None:
        s = all_linear
        versus(
            f"prefill_all_linear_{dtype}", s.run_peft(**s.inputs()), s.run_base(**s.inputs(s.shape.samples)), of=MANY,
            context=s.fused(dtype), baseline_context=s.without_peft,
        )  # fmt: skip

    def test_prefill_with_equal_heads(self, all_linear: Setting, versus: Versus) -> None:
        s = all_linear
        versus(
            "prefill_all_linear_equal_heads", s.run_peft(**s.inputs()), s.run_base(**s.inputs(s.shape.samples)),
            of=f"{MANY}, its head's input made contiguous as ours is",
            context=s.fused("bf16"), baseline_context=s.without_peft_and_head_in_one_product,
        )  # fmt: skip

    def test_portable(self, all_linear: Setting, versus: Versus) -> None:
        s = all_linear
        versus(
            "portable_all_linear", s.run_peft(**s.inputs()), s.run_base(**s.inputs(s.shape.samples)), of=MANY,
            context=s.fused("bf16", portable=True), baseline_context=s.without_peft,
        )  # fmt: skip

    @pytest.mark.parametrize(("case", "depth"), [("prefill_quarter", QUARTER), ("prefill_eighth", EIGHTH)])
    def test_upper_blocks(self, all_linear: Setting, versus: Versus, case: str, depth: float) -> None:
        s = all_linear
        versus(
            case, s.run_peft(**s.inputs()), s.run_base(**s.inputs()), of=FEW,
            context=s.fused("bf16", depth), baseline_context=s.without_peft, rounds=9,
        )  # fmt: skip

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_peft(self, all_linear: Setting, versus: Versus, dtype: str) -> None:
        """PEFT's own deterministic adapter on the same rows."""
        s = all_linear
        many = s.inputs(s.shape.samples)
        versus(
            f"peft_all_linear_{dtype}", s.run_peft(**many), s.run_base(**many), of=MANY, rounds=5,
            context=s.plain(f"ours_{dtype}"), baseline_context=s.without_peft,
        )  # fmt: skip

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sequential_prefill(self, all_linear: Setting, versus: Versus, dtype: str) -> None:
        s = all_linear
        run, samples = s.run_peft(**s.inputs()), s.shape.samples
        versus(
            f"sequential_prefill_{dtype}", run, lambda: s.samplers[dtype].predict(samples, run), faster=True, rounds=5,
            of=f"{samples} sequential passes with flipout in plain torch",
            context=s.fused(dtype), baseline_context=s.flipout(dtype),
        )  # fmt: skip

    def test_sequential_weights(self, all_linear: Setting, versus: Versus) -> None:
        """Instead of flipout, M + sigma E written into the adapter before each pass: cheaper, and the paper's equation."""
        s = all_linear
        run, samples = s.run_peft(**s.inputs()), s.shape.samples
        versus(
            "sequential_weights_bf16", run, lambda: s.samplers["bf16"].predict(samples, run, write=True), faster=True,
            of=f"{samples} sequential passes with weights drawn in plain torch", rounds=5,
            context=s.fused("bf16"), baseline_context=s.plain("plain_bf16"),
        )  # fmt: skip

    def test_sequential_short(self, all_linear: Setting, versus: Versus) -> None:
        s = all_linear
        run, samples = s.run_peft(**s.inputs(rows=1, tokens=8 if TOY else 64)), s.shape.samples
        versus(
            "sequential_short", run, lambda: s.samplers["bf16"].predict(samples, run), faster=True, rounds=9,
            of=f"{samples} sequential passes with flipout in plain torch, one row of 64 tokens",
            context=s.fused("bf16"), baseline_context=s.flipout("bf16"),
        )  # fmt: skip

    def test_memory_of_64_samples(self, all_linear: Setting, versus: Versus) -> None:
        s = all_linear
        samples = 8 if TOY else 64
        versus(
            "memory_s64", s.run_peft(**s.inputs()), s.run_base(**s.inputs(samples)), rounds=1, warmup=1,
            of=f"the base forward's peak memory on {samples * s.shape.rows} rows, weights included",
            context=s.fused("bf16", samples=samples), baseline_context=s.without_peft,
        )  # fmt: skip
        versus.in_gib()

    # Sweeps, for the plots ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("samples", [1, 2, 4, 20, 40])
    def test_sweep_samples(self, all_linear: Setting, versus: Versus, samples: int) -> None:
        s = all_linear
        versus(
            f"sweep_samples_{samples}", s.run_peft(**s.inputs()), s.run_base(**s.inputs(samples)), rounds=3, warmup=1,
            of="the base forward on the same rows", samples=samples,
            context=s.fused("bf16", samples=samples), baseline_context=s.without_peft,
        )  # fmt: skip

    @pytest.mark.parametrize("blocks", [1, 2] if TOY else [1, 2, 4, 8, 16, 32])
    def test_sweep_depth(self, all_linear: Setting, versus: Versus, blocks: int) -> None:
        s = all_linear
        versus(
            f"sweep_depth_{blocks}", s.run_peft(**s.inputs()), s.run_base(**s.inputs()), rounds=3, warmup=1,
            of=FEW, depth=blocks, context=s.fused("bf16", blocks), baseline_context=s.without_peft,
        )  # fmt: skip

    @pytest.mark.parametrize("tokens", [8] if TOY else [16, 64, 256])
    def test_sweep_tokens(self, all_linear: Setting, versus: Versus, tokens: int) -> None:
        s = all_linear
        many = s.inputs(s.shape.samples, tokens=tokens)
        versus(
            f"sweep_tokens_{tokens}", s.run_peft(**s.inputs(tokens=tokens)), s.run_base(**many), rounds=3, warmup=1,
            of="the base forward on the same rows", tokens=tokens,
            context=s.fused("bf16"), baseline_context=s.without_peft,
        )  # fmt: skip

    # Decoding -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("case", "depth"), [("decode_all", "all"), ("decode_quarter", QUARTER)])
    def test_decode(self, all_linear: Setting, versus: Versus, case: str, depth: Any) -> None:
        s = all_linear
        rows = s.shape.samples if depth == "all" else 1
        with s.without_peft():
            base = Decoder(s.base, rows, s.shape)
        with s.fused("bf16", depth)():
            ours = Decoder(s.peft, 1, s.shape)
        versus(
            case, ours, base, of=f"the base model's captured decoding of {rows} rows, {CONTEXT} tokens of context",
            repeats=STEPS, context=s.fused("bf16", depth), baseline_context=s.without_peft, rounds=9,
        )  # fmt: skip

    def test_sequential_decode(self, all_linear: Setting, versus: Versus) -> None:
        s = all_linear
        samples = s.shape.samples
        with s.fused("bf16")():
            ours = Decoder(s.peft, 1, s.shape)
        with s.flipout("bf16")():
            plain = Decoder(s.peft, 1, s.shape, capture=False)
        step = plain.forward
        versus(
            "sequential_decode", ours.once, lambda: s.samplers["bf16"].predict(samples, step), faster=True, rounds=9,
            of=f"{samples} sequential sampled steps in plain torch, not captured",
            context=s.fused("bf16"), baseline_context=s.flipout("bf16"),
        )  # fmt: skip


class Decoder:
    """Greedy decoding after a context of random tokens, in a static cache; one step is captured in a CUDA graph.

    A call takes ``STEPS`` steps from the context's end. Without a GPU the steps are not captured.
    """

    def __init__(self, model: Any, rows: int, shape: Shape, capture: bool = True) -> None:
        self.model = model
        config = model.config
        self.cache = StaticCache(config=config, max_cache_len=CONTEXT + 2 * STEPS)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.arguments = {cache_argument(base): self.cache, "use_cache": True, "logits_to_keep": 1}
        prompt = token_ids(shape, 1, DEVICE, rows, CONTEXT)
        self.ids = prompt[:, :1].contiguous()
        model(input_ids=prompt, **self.arguments)
        self.graph: torch.cuda.CUDAGraph | None = None
        for _ in range(2):
            self.step()
        if capture and DEVICE.type == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
        self.rewind()

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(CONTEXT)

    def forward(self) -> Any:
        """One step that leaves the cache's length as it was."""
        self.rewind()
        return self.model(input_ids=self.ids, **self.arguments)

    def step(self) -> Tensor:
        logits = self.model(input_ids=self.ids, **self.arguments).logits
        return self.ids.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))

    def advance(self) -> None:
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def once(self) -> None:
        self.rewind()
        self.advance()

    def __call__(self) -> None:
        self.rewind()
        for _ in range(STEPS):
            self.advance()


@pytest.fixture(scope="class")
def queries_values_head() -> Iterator[Setting]:
    yield Setting("qv_head", 8, ("bf16",))
    release()


class TestQueriesValuesHead:
    def test_prefill(self, queries_values_head: Setting, versus: Versus) -> None:
        s = queries_values_head
        versus(
            "prefill_qv_head", s.run_peft(**s.inputs()), s.run_base(**s.inputs(s.shape.samples)), of=MANY,
            context=s.fused("bf16"), baseline_context=s.without_peft,
        )  # fmt: skip


@pytest.fixture(scope="class", params=[16, 64])
def other_rank(request: pytest.FixtureRequest) -> Iterator[tuple[int, Setting]]:
    yield request.param, Setting("all", request.param, ("bf16",))
    release()


class TestRank:
    def test_prefill(self, other_rank: tuple[int, Setting], versus: Versus) -> None:
        rank, s = other_rank
        versus(
            f"prefill_rank{rank}", s.run_peft(**s.inputs()), s.run_base(**s.inputs(s.shape.samples)), of=MANY,
            rank=rank, rounds=7 if rank == 64 else 3, context=s.fused("bf16"), baseline_context=s.without_peft,
        )  # fmt: skip
