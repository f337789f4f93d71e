"""Depth: how many blocks from the top are random. Span: how many tokens from the end are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..checks import MOST_SPAN, is_integer

Depth = int | float | str
Span = int | str

ANSWER = 1  # tokens of the span "answer": the position that an answer is read from


class Place(NamedTuple):
    """What is random: the blocks from ``first`` on, in the last ``span`` tokens up to an answer's position, or in all (``None``)."""

    first: int
    span: int | None = None


def first_random_block(depth: Depth, total: int, blocks: Sequence[int], name: str) -> int:
    """Index of the lowest random block.

    Args:
        depth: number of blocks from the top, a fraction of them (rounded, at least one), ``"all"`` or ``"head"``.
        total: blocks of the model.
        blocks: of the layers of the adapter ``name``.

    Raises:
        ValueError: outside the model, or nothing of the adapter lies that high.
    """
    found: int | None = None
    if depth in ("all", "head"):
        found = 0 if depth == "all" else total
    elif isinstance(depth, float) and 0 < depth <= 1:
        found = total - max(1, round(total * depth))
    elif is_integer(depth) and 1 <= int(depth) <= total:
        found = total - int(depth)
    if found is None:
        raise ValueError(
            f"depth is {depth!r}, expected 1 to {total} blocks from the top, a fraction in (0, 1] (a float), 'all' or 'head'"
        )
    highest = max(blocks)
    if highest < found:
        raise ValueError(
            f"depth is {depth!r}, but adapter {name!r} has no layer that high (its highest is in block {highest} of "
            f"{total}); use depth={total - highest if highest < total else 'all'!r} or more"
        )
    return found


def span_tokens(span: Span) -> int | None:
    """Random tokens up to the position that an answer is read from; ``None`` for all.

    Raises:
        ValueError: no span.
    """
    if span in ("all", "answer"):
        return None if span == "all" else ANSWER
    if is_integer(span, 1, MOST_SPAN):
        return int(span)
    raise ValueError(f"span is {span!r}, expected 'all', 'answer' or a number of last tokens from 1 to {MOST_SPAN}")


def span_name(tokens: int | None) -> int | str:
    """The span of so many random tokens, as ``adapter.span`` spells it."""
    return "all" if tokens is None else "answer" if tokens == ANSWER else tokens
