"""A Llama-3.1-8B shape with its adapters and the ways to run it, and greedy decoding of it; ``TFB_BENCH_TINY=1``: a toy."""

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

TOY = os.environ.get("TFB_BENCH_TINY") == "1"
SHAPE = TINY if TOY else LLAMA_8B
SIGMA = 0.02
QUARTER, EIGHTH = 0.25, 0.25 if TOY else 0.125
CONTEXT = 16 if TOY else 512  # tokens before decoding
STEPS = 8  # of decoding, in one timing
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = [
    pytest.mark.skipif(
        not (TOY or torch.cuda.is_available()), reason="torch sees no CUDA device; TFB_BENCH_TINY=1 tries a toy"
    ),
    *([pytest.mark.benchmark(timer=event_clock)] if torch.cuda.is_available() else []),
]


class Setting:
    """One model with an adapter of each type, Bayesian, and a sampler in plain torch for each.

    ``spans``: those that are timed, whose samples are checked first.
    """

    def __init__(
        self,
        layers: str,
        rank: int,
        dtypes: tuple[str, ...],
        shape: Shape = SHAPE,
        spans: tuple[int | str, ...] = ("all",),
    ) -> None:
        for span in spans:
            check_fused(shape, layers, DEVICE, rank, span).require()
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
        self,
        dtype: str,
        depth: int | float | str = "all",
        samples: int | None = None,
        portable: bool = False,
        span: int | str = "all",
    ) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def context() -> Iterator[None]:
            adapter = self.adapters[dtype]
            activate(self.peft, adapter.name)
            adapter.depth = depth
            ops.use_portable_kernels(portable)
            try:
                with adapter.predictive(samples or self.shape.samples, span=span):
                    yield
            finally:
                ops.use_portable_kernels(False)

        return context


def release() -> None:
    """Give back what a dropped model held: modules and hooks refer to each other, so they wait for the collector."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


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
