"""Samples that differ on the answer alone (span "answer") on a Llama-3.1-8B shape, against the base model's one forward.

Random bfloat16 weights, r = 8 on all seven linear layers, prompts without padding, the logits of the last position, no key-value
cache, unless a case says otherwise. The baseline is the base model's own forward of the same prompts, without PEFT's layers: what
one answer costs. Every case is timed in turns with it. Before that the samples are checked against their weights written out in
float32 at the last token, after a prompt of the mean adapter, and the choices against a row for each.

    python -m pytest bench/test_span.py --benchmark-json=span.json     on a GPU with 60 GiB free
    TFB_BENCH_TINY=1 python -m pytest bench/test_span.py               a toy of the same structure, also on the CPU
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tfb_ext.data import Encoded
from tfb_ext.forward.engine import Scorer

from .check import check_choices
from .llama import token_ids
from .setting import DEVICE, SHAPE, TOY, Setting, needs_gpu, release
from .versus import Versus

pytestmark = needs_gpu
MEDIUM, LONG = (32, 64) if TOY else (512, 2048)  # tokens
MANY = 8 if TOY else 64  # samples
SWEEP = (1, 4, 8) if TOY else (1, 10, 64, 256)
# Four choices of three tokens each; any will do: the weights are random.
CHOICES = ((11, 12, 13), (21, 22, 23), (31, 32, 33), (41, 42, 43))
ROUNDS: dict[str, Any] = {"rounds": 15, "warmup": 3}  # a few per cent are looked for, and forwards are short


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    yield Setting("all", 8, ("bf16",), spans=("answer", "all"))
    release()


def forward(
    s: Setting,
    versus: Versus,
    case: str,
    samples: int = SHAPE.samples,
    *,
    rows: int = SHAPE.rows,
    tokens: int = SHAPE.tokens,
    span: str = "answer",
    base: dict[str, Any] | None = None,
    **facts: Any,
) -> None:
    """One forward of ``samples`` samples against the base model's of the same rows, with ``base`` for its arguments."""
    given = s.inputs(rows=rows, tokens=tokens)
    versus(
        case, s.run_peft(**given), s.run_base(**given | (base or {})),
        context=s.fused("bf16", samples=samples, span=span), baseline_context=s.without_peft,
        samples=samples, rows=rows, tokens=tokens, span=span,
        **{"of": f"the base forward on {rows} rows of {tokens} tokens"} | ROUNDS | facts,
    )  # fmt: skip


class TestSpan:
    def test_128(self, setting: Setting, versus: Versus) -> None:
        forward(setting, versus, "span_128")

    def test_128_with_a_row_for_each_sample(self, setting: Setting, versus: Versus) -> None:
        """The same prompts and samples, which differ at every token: what the span saves."""
        forward(setting, versus, "span_128_rows", span="all", rounds=5, warmup=2)

    def test_512(self, setting: Setting, versus: Versus) -> None:
        forward(setting, versus, "span_512", tokens=MEDIUM)

    def test_512_of_64_samples(self, setting: Setting, versus: Versus) -> None:
        forward(setting, versus, "span_512_s64", MANY, tokens=MEDIUM)

    def test_2048(self, setting: Setting, versus: Versus) -> None:
        forward(setting, versus, "span_2048", rows=1, tokens=LONG)

    def test_memory(self, setting: Setting, versus: Versus) -> None:
        of = f"the base forward's peak memory on {SHAPE.rows} rows of {MEDIUM} tokens, its key-value cache and the weights included"
        once = {"rounds": 1, "warmup": 1}
        forward(setting, versus, "span_memory", MANY, tokens=MEDIUM, base={"use_cache": True}, of=of, **once)
        versus.in_gib()

    @pytest.mark.parametrize("samples", SWEEP)
    def test_sweep(self, setting: Setting, versus: Versus, samples: int) -> None:
        forward(setting, versus, f"sweep_span_{samples}", samples, rounds=5, warmup=2)


def prompts_with_choices(s: Setting) -> Encoded:
    ids = token_ids(s.shape, 1, torch.device("cpu")).tolist()
    return Encoded(ids, [None] * len(ids), None, ("a", "b", "c", "d"), pad_id=0, choice_tokens=CHOICES)


class TestChoices:
    """Choices of several tokens under the mean adapter: the prompt is one for all of them."""

    def test_choices(self, setting: Setting, versus: Versus) -> None:
        s = setting
        adapter, data = s.adapters["bf16"], prompts_with_choices(s)
        check_choices(s.shape, "all", DEVICE, data).require()
        release()
        active = s.plain(adapter.name)
        with active():
            scorer = Scorer(adapter, data, batch_size=len(data))
        (batch,) = scorer.batches

        def run() -> Tensor:
            return scorer.mean(batch)

        versus(
            "choices_shared", run, s.run_base(**s.inputs()), context=active, baseline_context=s.without_peft,
            of=f"the base forward on the {len(data)} prompts of {s.shape.tokens} tokens", rows=len(data),
            tokens=s.shape.tokens, choices=len(CHOICES), choice_tokens=len(CHOICES[0]), **ROUNDS,
        )  # fmt: skip
