"""Depth: how many blocks from the top are random."""

from __future__ import annotations

from collections.abc import Sequence

from ..checks import is_integer

Depth = int | float | str


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
