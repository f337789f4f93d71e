"""The predictive in closed form (no samples) on a Llama-3.1-8B shape, against the base model's one forward of the same prompts.

Random bfloat16 weights, r = 8 on all seven linear layers, two label tokens, prompts without padding. A case makes the mean and the
covariance of both logits of every prompt: the prompts' forward by the mean adapter, and forward and backward of the random tokens.

    python -m pytest bench/test_linear.py --benchmark-json=linear.json     on a GPU with 60 GiB free
    TFB_BENCH_TINY=1 python -m pytest bench/test_linear.py                 a toy of the same structure, also on the CPU
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tfb_ext.data import Encoded

from .llama import token_ids
from .setting import SHAPE, TOY, Setting, needs_gpu, release
from .versus import Versus

pytestmark = needs_gpu
MEDIUM = 32 if TOY else 512
ROUNDS: dict[str, Any] = {"rounds": 15, "warmup": 3}


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    yield Setting("all", 8, ("bf16",), spans=("answer",))
    release()


def linear(s: Setting, versus: Versus, case: str, span: str, tokens: int, **facts: Any) -> None:
    ids = token_ids(s.shape, 1, torch.device("cpu"), SHAPE.rows, tokens).tolist()
    data = Encoded(ids, [None] * len(ids), (11, 21), ("a", "b"), pad_id=0)
    adapter = s.adapters["bf16"]
    before, adapter.span = adapter.span, span
    try:
        versus(
            case, lambda: adapter.gaussian(data, batch_size=len(ids)), s.run_base(**s.inputs(tokens=tokens)),
            context=s.plain(adapter.name), baseline_context=s.without_peft, rows=len(ids), tokens=tokens, span=span, classes=2,
            of=f"the base forward on {len(ids)} rows of {tokens} tokens", **ROUNDS | facts,
        )  # fmt: skip
    finally:
        adapter.span = before


class TestLinear:
    def test_answer(self, setting: Setting, versus: Versus) -> None:
        linear(setting, versus, "linear_answer", "answer", SHAPE.tokens)

    def test_answer_512(self, setting: Setting, versus: Versus) -> None:
        linear(setting, versus, "linear_answer_512", "answer", MEDIUM)

    def test_all(self, setting: Setting, versus: Versus) -> None:
        linear(setting, versus, "linear_all", "all", SHAPE.tokens, rounds=7, warmup=2)

    def test_memory(self, setting: Setting, versus: Versus) -> None:
        linear(setting, versus, "linear_memory", "answer", MEDIUM, rounds=1, warmup=1)
        versus.in_gib()

    def test_finite(self, setting: Setting) -> None:
        """What was timed is a covariance."""
        adapter = setting.adapters["bf16"]
        ids = token_ids(setting.shape, 1, torch.device("cpu")).tolist()
        data = Encoded(ids, [None] * len(ids), (11, 21), ("a", "b"), pad_id=0)
        with setting.plain(adapter.name)():
            found = adapter.gaussian(data)
        assert found.covariance.isfinite().all() and bool((found.covariance.diagonal(dim1=1, dim2=2) > 0).all())
