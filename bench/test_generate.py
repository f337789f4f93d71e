"""Generation from end to end: transformers' ``generate`` under the predictive against the base model's own, both in CUDA graphs.

A Llama-3.1-8B shape in bfloat16, 1 and 8 prompts of 512 random tokens, 64 greedy tokens each, 10 samples, static caches that
are kept from call to call. Times are those of whole calls, prefill included. Each case takes turns with its baseline.

    python -m pytest bench/test_generate.py --benchmark-json=generate.json     on a GPU with 60 GiB free
    TFB_BENCH_TINY=1 python -m pytest bench/test_generate.py                   a toy of the same structure, also on the CPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import tfb_ext
from tfb_ext.forward.caches import cache_argument
from tfb_ext.generation.decoding import CapturedDecoding, decoding_with

from .llama import activate, token_ids
from .setting import DEVICE, QUARTER, TOY, Setting, needs_gpu, release
from .versus import Versus

pytestmark = needs_gpu
CONTEXT, NEW = (16, 6) if TOY else (512, 64)
PROMPTS = (1, 2) if TOY else (1, 8)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
Context = Callable[[], AbstractContextManager[None]]


class Generator:
    """Calls of ``generate`` on one model that share a cache and its graphs.

    Attributes:
        rows: prompts.
        new: tokens a call.
        samples: of a scored call.
    """

    def __init__(self, setting: Setting, rows: int, adapter: Any = None, new: int = NEW) -> None:
        self.model = setting.base if adapter is None else adapter.model
        self.inner = setting.base
        self.ids: Tensor = token_ids(setting.shape, 1, DEVICE, rows, CONTEXT)
        self.adapter = adapter
        self.rows, self.new, self.samples = rows, new, setting.shape.samples
        self.decoding = CapturedDecoding(self.inner, adapter)

    @property
    def prompts(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}

    @property
    def options(self) -> dict[str, Any]:
        return GREEDY | {"max_new_tokens": self.new}

    def cache(self) -> Any:
        return self.decoding.cache(self.rows, CONTEXT + NEW, CONTEXT)

    def __call__(self) -> Tensor:
        cache = {cache_argument(self.inner): self.cache()}
        with decoding_with(self.decoding):
            out: Tensor = self.model.generate(**self.prompts, **self.options, **cache)
        return out

    def first(self) -> Tensor:
        """A call that captures its graph itself."""
        self.decoding.clear()
        return self()

    def eager(self) -> Tensor:
        out: Tensor = self.model.generate(**self.prompts, **self.options)
        return out

    def compiled(self) -> Tensor:
        """As transformers does it: torch.compile, a new static cache every call."""
        out: Tensor = self.model.generate(**self.prompts, **self.options, cache_implementation="static")
        return out

    def scored(self) -> tfb_ext.generation.Generation:
        with decoding_with(self.decoding):
            return tfb_ext.generate(
                self.adapter, self.prompts, samples=self.samples, **self.options, cache_implementation="static"
            )

    def cache_bytes(self) -> int:
        tensors = (t for layer in self.cache().layers for t in (layer.keys, layer.values))
        return sum(t.numel() * t.element_size() for t in tensors)


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    yield Setting("all", 8, ("bf16",), spans=("all", "answer"))
    release()


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    release()


def base(s: Setting, rows: int, new: int = NEW) -> Generator:
    return Generator(s, rows, new=new)


def ours(s: Setting, rows: int, new: int = NEW) -> Generator:
    return Generator(s, rows, s.adapters["bf16"], new)


@pytest.mark.parametrize("rows", PROMPTS)
class TestGenerate:
    @pytest.mark.parametrize(("case", "new"), [("generate_all", NEW), ("generate_all_prefill", 1)])
    def test_all(self, setting: Setting, versus: Versus, rows: int, case: str, new: int) -> None:
        s = setting
        many = rows * s.shape.samples
        versus(
            case, ours(s, rows, new), base(s, many, new), rounds=5, rows=rows, new_tokens=new,
            of=f"the base model's own captured generation of {many} rows",
            context=s.fused("bf16"), baseline_context=s.without_peft,
        )  # fmt: skip

    @pytest.mark.parametrize(("case", "new"), [("generate_quarter", NEW), ("generate_quarter_prefill", 1)])
    def test_quarter(self, setting: Setting, versus: Versus, rows: int, case: str, new: int) -> None:
        s = setting
        versus(
            case, ours(s, rows, new), base(s, rows, new), rounds=5, rows=rows, new_tokens=new,
            of=f"the base model's own captured generation of {rows} rows",
            context=s.fused("bf16", QUARTER), baseline_context=s.without_peft,
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("case", "depth"), [("generate_sequential", "all"), ("generate_sequential_quarter", QUARTER)]
    )
    def test_sequential(self, setting: Setting, versus: Versus, rows: int, case: str, depth: Any) -> None:
        """One generation a sample, its weights written into PEFT's adapter first; captured too, in one graph for all."""
        s = setting
        one = Generator(s, rows)

        def sequential() -> None:
            for _ in range(s.shape.samples):
                s.samplers["bf16"].write_drawn()
                one()

        versus(
            case, ours(s, rows), sequential, faster=True, rounds=2, warmup=1, rows=rows,
            of=f"{s.shape.samples} sequential captured generations with weights drawn in plain torch",
            context=s.fused("bf16", depth), baseline_context=s.plain("plain_bf16"),
        )  # fmt: skip

    def test_keys_and_values(self, setting: Setting, versus: Versus, rows: int) -> None:
        s = setting
        quarter, whole = ours(s, rows), ours(s, rows)
        versus(
            "generate_kv_quarter", quarter, whole, rounds=1, warmup=1, rows=rows,
            of="the key-value cache with samples in all blocks",
            context=s.fused("bf16", QUARTER), baseline_context=s.fused("bf16"),
        )  # fmt: skip
        with s.fused("bf16", QUARTER)():
            small = quarter.cache_bytes()
        with s.fused("bf16")():
            large = whole.cache_bytes()
        versus.in_gib(small / 2**30, large / 2**30)


class TestSpan:
    """Samples of what follows the prompt alone, which is the mean adapter's and there once."""

    @pytest.mark.parametrize(("case", "rows"), list(zip(("generate_span_one", "generate_span"), PROMPTS, strict=True)))
    def test_span(self, setting: Setting, versus: Versus, case: str, rows: int) -> None:
        s = setting
        versus(
            case, ours(s, rows), base(s, rows), rounds=5, rows=rows, new_tokens=NEW, span="answer",
            of=f"the base model's own captured generation of {rows} rows",
            context=s.fused("bf16", span="answer"), baseline_context=s.without_peft,
        )  # fmt: skip

    def test_span_keys_and_values(self, setting: Setting, versus: Versus) -> None:
        s, rows = setting, PROMPTS[-1]
        some, one = ours(s, rows), base(s, rows)
        context = s.fused("bf16", span="answer")
        versus(
            "generate_span_kv", some, one, rounds=1, warmup=1, rows=rows, span="answer",
            columns=(CONTEXT + s.shape.samples * NEW) / (CONTEXT + NEW),
            of="the base model's key-value cache", context=context, baseline_context=s.without_peft,
        )  # fmt: skip
        with context():
            large = some.cache_bytes()
        versus.in_gib(large / 2**30, one.cache_bytes() / 2**30)


class TestOneByOne:
    """What else a call costs, for one prompt."""

    def test_the_first_call(self, setting: Setting, versus: Versus) -> None:
        s = setting
        first, next_ = ours(s, 1), ours(s, 1)
        versus(
            "generate_first", first.first, next_, of="a call that finds its graph", rounds=3, warmup=2,
            context=s.fused("bf16"), baseline_context=s.fused("bf16"),
        )  # fmt: skip

    def test_without_graphs(self, setting: Setting, versus: Versus) -> None:
        s = setting
        plain = ours(s, 1)
        versus(
            "generate_captured", ours(s, 1), plain.eager, faster=True, of="the same with a dynamic cache, not captured",
            rounds=3, context=s.fused("bf16"), baseline_context=s.fused("bf16"),
        )  # fmt: skip

    @pytest.mark.parametrize("rows", PROMPTS)
    def test_scores(self, setting: Setting, versus: Versus, rows: int) -> None:
        s = setting
        scored = ours(s, rows)

        @contextmanager
        def active() -> Iterator[None]:
            activate(s.peft, scored.adapter.name)
            scored.adapter.depth = "all"
            yield

        versus(
            "generate_scored", scored.scored, ours(s, rows), of="generate alone, without the forward that scores",
            rounds=3, rows=rows, context=active, baseline_context=s.fused("bf16"),
        )  # fmt: skip

    def test_memory_of_all_logits(self, setting: Setting, versus: Versus) -> None:
        """Every position's mean log probabilities over the whole vocabulary; no sample's are kept beside them."""
        s = setting
        ours, many = s.inputs(), s.inputs(s.shape.samples)
        for inputs in (ours, many):
            del inputs["logits_to_keep"]
        versus(
            "memory_all_logits", s.run_peft(**ours), s.run_base(**many), rounds=1, warmup=1,
            of=f"the base forward's peak memory on {len(many['input_ids'])} rows, all of its logits and the weights included",
            context=s.fused("bf16"), baseline_context=s.without_peft,
        )  # fmt: skip
        versus.in_gib()

    def test_memory_of_label_tokens(self, setting: Setting, versus: Versus) -> None:
        """Classification: the last position, two label tokens of the vocabulary."""
        s = setting
        adapter = s.adapters["bf16"]

        @contextmanager
        def labels() -> Iterator[None]:
            activate(s.peft, adapter.name)
            adapter.depth = "all"
            with adapter.predictive(s.shape.samples, columns=torch.tensor([5, 7])):
                yield

        versus(
            "memory_label_tokens", s.run_peft(**s.inputs()), s.run_base(**s.inputs()), rounds=1, warmup=1,
            of=f"the base forward's peak memory on {s.shape.rows} rows, the weights included",
            context=labels, baseline_context=s.without_peft,
        )  # fmt: skip
        versus.in_gib()

    @pytest.mark.skipif(DEVICE.type != "cuda", reason="transformers compiles on accelerators alone")
    def test_the_base_compiled(self, setting: Setting, versus: Versus) -> None:
        """Is our graph of the base model a fair baseline? Against transformers' own way, torch.compile."""
        s = setting
        compiled, captured = base(s, s.shape.samples), base(s, s.shape.samples)
        versus(
            "generate_base_compiled", compiled.compiled, captured, rounds=3, warmup=3, rows=s.shape.samples,
            of="the same generation in a CUDA graph of ours",
            context=s.without_peft, baseline_context=s.without_peft,
        )  # fmt: skip
