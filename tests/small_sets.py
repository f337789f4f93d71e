"""Small encoded sets of uneven lengths for the tiny models, and each item's answer from the model alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import zoo
from torch import Tensor, nn

import tfb_ext
from tfb_ext.data import Encoded

CHOICE_IDS, CHOICES = (4, 5, 6), ("a", "b", "c")
CHOICE_TOKENS = ((7, 8, 9), (7, 11), (5,), (12, 13, 14, 15))  # two of them share their first token


def encoded(items: int = 11, *, head: bool = False, seed: int = 1) -> Encoded:
    """Unlabelled items of 2 to 9 random tokens in no order of length, none of them a padding, end or choice token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (items,), generator=generator).tolist()
    tokens = [torch.randint(10, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return Encoded(tokens, [None] * items, None if head else CHOICE_IDS, CHOICES, pad_id=0)


def sequences(items: int = 5, **options: Any) -> Encoded:
    """The same items with choices of one to four tokens."""
    names = ("a", "b", "c", "d")
    return replace(encoded(items), choice_ids=None, choice_tokens=CHOICE_TOKENS, choices=names, **options)


def answers(adapter: Any, data: Encoded) -> Callable[[], Tensor]:
    """Probabilities (N, C) of the items in their order, each from a call of the model with this item alone."""

    def call() -> Tensor:
        rows = []
        for tokens in data.token_ids:
            logits = adapter.model(input_ids=torch.tensor([tokens])).logits[0]
            rows.append(logits if data.choice_ids is None else logits[-1, list(data.choice_ids)])
        return torch.softmax(torch.stack(rows), dim=-1)

    return call


def labelled(adapter: Any, data: Encoded, wrong_every: int = 0) -> Encoded:
    """The mean adapter's own predictions as labels, every so many of them changed to another class."""
    guesses = tfb_ext.predict(adapter, data, samples=0).labels.tolist()
    changed = [bool(wrong_every) and i % wrong_every == 0 for i in range(len(guesses))]
    return replace(data, labels=[(k + c) % len(data.choices) for k, c in zip(guesses, changed, strict=True)])


def sharpen(adapter: Any, factor: float) -> None:
    """Multiply the head's weight: larger logits, so a surer model."""
    with torch.no_grad():
        adapter.anatomy.head.weight.mul_(factor)


def rows_through(module: nn.Module) -> list[int]:
    """A list that grows by the number of rows at every call of ``module``.

    Watch a layer inside a block: a bypassed block is still called, its layers are not.
    """
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def shapes_through(module: nn.Module) -> list[tuple[int, ...]]:
    """A list that grows by the shape of the output at every call of ``module``."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_hook(
        lambda _, args, output: shapes.append(tuple((output if isinstance(output, Tensor) else output[0]).shape))
    )
    return shapes
