"""The predictive in closed form (no samples) on a Llama-3.1-8B shape, against the base model's one forward of the same prompts.

Random bfloat16 weights, r = 8 on all seven linear layers, two label tokens, prompts without padding. A case makes the mean and the
covariance of the logits of every prompt: the prompts' forward by the mean adapter, and forward and backward of the random tokens.

    python -m pytest bench/test_linear.py --benchmark-json=linear.json     on a GPU with 60 GiB free
    TFB_BENCH_TINY=1 python -m pytest bench/test_linear.py                 a toy of the same structure, also on the CPU
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tfb_ext
from tfb_ext.data import Encoded
from tfb_ext.forward.linear import Linear

from .llama import token_ids
from .setting import DEVICE, SHAPE, TOY, Setting, needs_gpu, release
from .versus import Versus

pytestmark = needs_gpu
MEDIUM = 32 if TOY else 512
SIGMA = 0.05
ROUNDS: dict[str, Any] = {"rounds": 15, "warmup": 5}  # a shape becomes a graph when it was met three times


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    yield Setting("all", 8, ("bf16",), spans=("answer",))
    release()


def linear(s: Setting, versus: Versus, case: str, span: str, tokens: int, prepared: bool = True, **facts: Any) -> None:
    """``prepared``: batches of one shape, as a search has them, by a graph where that fits; else one call of ``predict``, everything
    in it."""
    data = encoded(s, tokens)
    adapter = s.adapters["bf16"]
    before, adapter.span = adapter.span, span
    try:
        run = Linear(adapter, data, adapter.place, centred=True, batch_size=SHAPE.rows)

        def passes() -> None:
            run.of(run.batches[0], adapter.place)

        def call() -> None:
            tfb_ext.predict(adapter, data, by="linear", sigma=SIGMA, batch_size=SHAPE.rows)

        versus(
            case, passes if prepared else call, s.run_base(**s.inputs(tokens=tokens)),
            context=s.plain(adapter.name), baseline_context=s.without_peft, rows=SHAPE.rows, tokens=tokens, span=span, classes=2,
            of=f"the base forward on {SHAPE.rows} rows of {tokens} tokens", **ROUNDS | facts,
        )  # fmt: skip
        versus.benchmark.extra_info["replayed"] = run.replayed
    finally:
        adapter.span = before


def encoded(s: Setting, tokens: int) -> Encoded:
    ids = token_ids(s.shape, 1, torch.device("cpu"), SHAPE.rows, tokens).tolist()
    return Encoded(ids, [None] * len(ids), (11, 21), ("a", "b"), pad_id=0)


class TestLinear:
    def test_answer(self, setting: Setting, versus: Versus) -> None:
        linear(setting, versus, "linear_answer", "answer", SHAPE.tokens)

    def test_answer_call(self, setting: Setting, versus: Versus) -> None:
        linear(setting, versus, "linear_answer_call", "answer", SHAPE.tokens, prepared=False)

    def test_answer_512(self, setting: Setting, versus: Versus) -> None:
        linear(setting, versus, "linear_answer_512", "answer", MEDIUM)

    def test_all(self, setting: Setting, versus: Versus) -> None:
        linear(setting, versus, "linear_all", "all", SHAPE.tokens, rounds=9, warmup=5)

    def test_all_call(self, setting: Setting, versus: Versus) -> None:
        linear(setting, versus, "linear_all_call", "all", SHAPE.tokens, prepared=False, rounds=7, warmup=2)

    def test_memory(self, setting: Setting, versus: Versus) -> None:
        """From the first batch on: those that have no graph yet, and the one that is captured."""
        release()
        linear(setting, versus, "linear_memory", "answer", MEDIUM, rounds=5, warmup=0)
        versus.in_gib()

    def test_the_graph_gives_what_the_passes_give(self, setting: Setting) -> None:
        """What was timed is a covariance."""
        adapter = setting.adapters["bf16"]
        data = encoded(setting, SHAPE.tokens)
        before = adapter.span
        for span in ("answer", "all"):
            adapter.span = span
            with setting.plain(adapter.name)():
                run = Linear(adapter, data, adapter.place, centred=True, batch_size=SHAPE.rows)
                found = [run.of(run.batches[0], adapter.place) for _ in range(6)]
            assert run.replayed == (0 if DEVICE.type == "cpu" else 3)
            for one in found[1:]:
                torch.testing.assert_close(one.mean, found[0].mean, atol=0.05, rtol=0.05)
                torch.testing.assert_close(one.covariance, found[0].covariance, atol=0, rtol=0.1)
            assert bool((found[0].covariance.diagonal(dim1=1, dim2=2) > 0).all())
        adapter.span = before
