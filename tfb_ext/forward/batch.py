"""One batch of a data set, and what its rows are."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .inputs import IGNORED
from .tail import Branches


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        key: its number in the data set, under which a trunk is kept; halves of it add to that.
        inputs: the model's arguments.
        labels: (B,) or (B, T) int64, or ``None``; ``-100`` is not counted.
        index: (B,) positions of the rows in the data set; row ``c`` of item ``i`` is ``i * rows_per_item + c``.
        columns: label tokens (C,), or ``None`` for the whole head.
        targets: (B, m) tokens after the last m positions, to score as sequences, ``-100`` before shorter ones; or ``None``.
        shifted: whether the logits at a position are about the next one (language models with (B, T) labels).
        rows_per_item: choices that are scored as sequences have a row each, side by side; else 1.
        branches: of rows that are prompts, the choices behind them; ``targets`` are (B, C·m) then, m of each choice.
    """

    key: Hashable
    inputs: dict[str, Any]
    labels: Tensor | None
    index: Tensor
    columns: Tensor | None
    shifted: bool
    targets: Tensor | None = None
    rows_per_item: int = 1
    branches: Branches | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def items(self) -> Tensor:
        """Positions of the items in the data set, in their order here; not of halves, which may part an item's rows."""
        return self.index[:: self.rows_per_item] // self.rows_per_item

    @property
    def token_labelled(self) -> bool:
        """Whether labels are of positions, (B, T), so that a row has any number of items."""
        return self.labels is not None and self.labels.dim() == 2

    def halves(self) -> tuple[Batch, Batch]:
        """The upper and the lower half of the rows, of at least two; of several items whole ones."""
        each = self.rows_per_item if len(self.index) >= 2 * self.rows_per_item else 1
        middle = len(self.index) // each // 2 * each
        return self.part((self.key, 0), slice(middle)), self.part((self.key, 1), slice(middle, None))

    def part(self, key: Hashable, rows: slice | Tensor) -> Batch:
        """Some of the rows, under a key of their own."""
        size = len(self.index)
        inputs = {n: v[rows] if isinstance(v, Tensor) and v.shape[:1] == (size,) else v for n, v in self.inputs.items()}
        labels = None if self.labels is None else self.labels[rows]
        targets = None if self.targets is None else self.targets[rows]
        branches = None if self.branches is None else self.branches.part(rows)
        return replace(
            self, key=key, inputs=inputs, labels=labels, index=self.index[rows], targets=targets, branches=branches
        )


def item_labels(batch: Batch) -> Tensor:
    labels = batch.labels
    assert labels is not None
    if labels.dim() == 1:
        return labels[:: batch.rows_per_item]
    labels = labels[:, 1:] if batch.shifted else labels
    return labels[labels != IGNORED]


def mask_of(batch: Batch) -> Tensor:
    mask = batch.inputs.get("attention_mask")
    return mask if mask is not None else torch.ones_like(batch.inputs["input_ids"])


def labelled_lengths(batch: Batch) -> Tensor | None:
    """(B,) attended tokens of each row from the first on whose logits a label is compared with; ``None`` without labels of tokens."""
    if not batch.token_labelled or batch.columns is not None:
        return None
    assert batch.labels is not None
    counted = batch.labels != IGNORED
    if batch.shifted:  # a position's logits are about the next token
        counted = torch.nn.functional.pad(counted[:, 1:], (0, 1))
    behind = (counted.cumsum(1) > 0) & mask_of(batch).bool()
    return behind.sum(1).clamp(min=1)
