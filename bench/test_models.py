"""Whole models: one posterior predictive of a Llama-3.1-8B shape against the model's own forward, and what else there is.

Random bfloat16 weights, 8 rows of 128 tokens without padding, 10 samples, the logits of the last position, no key-value
cache, unless a case says otherwise. The baselines are the base model without PEFT's layers on 8 rows or on all samples'
80, PEFT's deterministic adapter, and ten sequential sampled passes in plain torch. Every case is timed in turns with its
baseline; before that, each model's samples are checked against their weights written out in float32.

    python -m pytest bench/test_models.py --benchmark-json=models.json     on a GPU with 60 GiB free
    TFB_BENCH_TINY=1 python -m pytest bench/test_models.py                 a toy of the same structure, also on the CPU
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .setting import CONTEXT, DTYPES, EIGHTH, QUARTER, SHAPE, STEPS, TOY, Decoder, Setting, needs_gpu, release
from .versus import Versus

pytestmark = needs_gpu


@pytest.fixture(scope="class")
def all_linear() -> Iterator[Setting]:
    yield Setting("all", 8, ("bf16", "fp32"))
    release()


MANY = f"the base forward on {SHAPE.rows * SHAPE.samples} rows"
FEW = f"the base forward on {SHAPE.rows} rows"
SAME = "the base forward on the same rows"


def prefill(
    s: Setting,
    versus: Versus,
    case: str,
    context: Any,
    copies: int = SHAPE.samples,
    tokens: int | None = None,
    *,
    baseline_context: Any = None,
    **facts: Any,
) -> None:
    """One forward of the setting's rows in ``context`` against the base model's of ``copies`` times as many."""
    versus(
        case, s.run_peft(**s.inputs(tokens=tokens)), s.run_base(**s.inputs(copies, tokens=tokens)),
        context=context, baseline_context=baseline_context or s.without_peft,
        **{"of": MANY, **facts, **({"tokens": tokens} if tokens else {})},
    )  # fmt: skip


class TestAllLinear:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_prefill(self, all_linear: Setting, versus: Versus, dtype: str) -> None:
        prefill(all_linear, versus, f"prefill_all_linear_{dtype}", all_linear.fused(dtype))

    def test_prefill_with_equal_heads(self, all_linear: Setting, versus: Versus) -> None:
        s = all_linear
        prefill(
            s, versus, "prefill_all_linear_equal_heads", s.fused("bf16"),
            of=f"{MANY}, its head's input made contiguous as ours is",
            baseline_context=s.without_peft_and_head_in_one_product,
        )  # fmt: skip

    def test_portable(self, all_linear: Setting, versus: Versus) -> None:
        prefill(all_linear, versus, "portable_all_linear", all_linear.fused("bf16", portable=True))

    @pytest.mark.parametrize(("case", "depth"), [("prefill_quarter", QUARTER), ("prefill_eighth", EIGHTH)])
    def test_upper_blocks(self, all_linear: Setting, versus: Versus, case: str, depth: float) -> None:
        prefill(all_linear, versus, case, all_linear.fused("bf16", depth), 1, of=FEW, rounds=9)

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
        samples = 8 if TOY else 64
        of = f"the base forward's peak memory on {samples * SHAPE.rows} rows, weights included"
        context = all_linear.fused("bf16", samples=samples)
        prefill(all_linear, versus, "memory_s64", context, samples, of=of, rounds=1, warmup=1)
        versus.in_gib()

    # Sweeps, for the plots ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("samples", [1, 2, 4, 20, 40])
    def test_sweep_samples(self, all_linear: Setting, versus: Versus, samples: int) -> None:
        context, sweep = all_linear.fused("bf16", samples=samples), {"rounds": 3, "warmup": 1, "samples": samples}
        prefill(all_linear, versus, f"sweep_samples_{samples}", context, samples, of=SAME, **sweep)

    @pytest.mark.parametrize("blocks", [1, 2] if TOY else [1, 2, 4, 8, 16, 32])
    def test_sweep_depth(self, all_linear: Setting, versus: Versus, blocks: int) -> None:
        context, sweep = all_linear.fused("bf16", blocks), {"rounds": 3, "warmup": 1, "depth": blocks}
        prefill(all_linear, versus, f"sweep_depth_{blocks}", context, 1, of=FEW, **sweep)

    @pytest.mark.parametrize("tokens", [8] if TOY else [16, 64, 256])
    def test_sweep_tokens(self, all_linear: Setting, versus: Versus, tokens: int) -> None:
        sweep: dict[str, Any] = {"rounds": 3, "warmup": 1}
        prefill(all_linear, versus, f"sweep_tokens_{tokens}", all_linear.fused("bf16"), tokens=tokens, of=SAME, **sweep)

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


@pytest.fixture(scope="class")
def queries_values_head() -> Iterator[Setting]:
    yield Setting("qv_head", 8, ("bf16",))
    release()


class TestQueriesValuesHead:
    def test_prefill(self, queries_values_head: Setting, versus: Versus) -> None:
        prefill(queries_values_head, versus, "prefill_qv_head", queries_values_head.fused("bf16"))


@pytest.fixture(scope="class", params=[16, 64])
def other_rank(request: pytest.FixtureRequest) -> Iterator[tuple[int, Setting]]:
    yield request.param, Setting("all", request.param, ("bf16",))
    release()


class TestRank:
    def test_prefill(self, other_rank: tuple[int, Setting], versus: Versus) -> None:
        rank, s = other_rank
        prefill(s, versus, f"prefill_rank{rank}", s.fused("bf16"), rank=rank, rounds=7 if rank == 64 else 3)
