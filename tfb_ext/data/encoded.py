"""Items as token ids, and the padded batches that are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_choice, check_count, is_integer
from ..errors import refusal

Score = Literal["sequence", "token"]
_PER_ITEM = ("token_ids", "labels", "targets", "item_choice_tokens")
_PER_CHOICE = ("choice_ids", "choice_tokens")


@dataclass(frozen=True)
class Encoded:
    """Items as token ids, in the order they came, nothing padded.

    Attributes:
        token_ids: the prompt's tokens, one list an item.
        labels: the index into ``choices`` of the right answer, one an item, None where unknown.
        choice_ids: the token of each choice (C of them): the rows of the language model's head that are the classes.
            None for a classification head, whose rows are the classes.
        choices: their texts.
        pad_id: the token that fills a batch up; always masked.
        choice_tokens: the tokens of each choice where they are scored as sequences, and ``choice_ids`` is None.
        item_choice_tokens: the same for each item, where they are not the same for all; ``choice_tokens`` are the first's.
        score: what a sequence's probability is averaged from, see ``encode``.
        by_length: whether a sequence's log probability is divided by its number of tokens.
        targets: the tokens to score after the last positions of each row, in what ``sequences`` returns.

    Raises:
        ValueError: numbers of items or choices that differ, choices both as tokens and as sequences, or another score.
    """

    token_ids: list[list[int]]
    labels: list[int | None]
    choice_ids: tuple[int, ...] | None
    choices: tuple[str, ...]
    pad_id: int
    choice_tokens: tuple[tuple[int, ...], ...] | None = None
    score: Score = "sequence"
    by_length: bool = False
    targets: list[tuple[int, ...]] | None = None
    item_choice_tokens: list[tuple[tuple[int, ...], ...]] | None = None

    def __post_init__(self) -> None:
        for each, count, names in (("item", len(self), _PER_ITEM), ("choice", len(self.choices), _PER_CHOICE)):
            for name in names:
                values = getattr(self, name)
                if values is not None and len(values) != count:
                    raise refusal(name, f"{len(values)} of them", f"{count}", f"one for each {each}")
        for item in self.item_choice_tokens or ():
            if len(item) != len(self.choices):
                expected, fix = f"{len(self.choices)}", "one for each choice"
                raise refusal("item_choice_tokens", f"{len(item)} choices", expected, fix)
        if self.choice_ids is not None and self.choice_tokens is not None:
            raise refusal("choice_tokens", "them beside choice_ids", "one of the two", "choice_ids=None for sequences")
        check_choice("score", self.score, get_args(Score))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def labelled(self) -> bool:
        """Whether every item has a label."""
        return None not in self.labels

    def select(self, indices: Iterable[int] | Tensor) -> Encoded:
        """The items at ``indices``, in that order.

        Raises:
            ValueError: a number that is no item's, or a mask.
        """
        chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        wrong = [i for i in chosen if not is_integer(i) or i not in range(-len(self), len(self))]
        if wrong:
            fix = "mask.nonzero() gives those of a mask"
            raise refusal("indices", repr(wrong[0]), f"numbers of the {len(self)} items, from 0", fix)
        parts = {name: getattr(self, name) for name in _PER_ITEM}
        kept: dict[str, Any] = {name: [of[i] for i in chosen] for name, of in parts.items() if of is not None}
        return replace(self, **kept)

    def sequences(self) -> Encoded:
        """One row for each item and choice, item-major: the prompt and the choice without its last token."""
        assert self.choice_tokens is not None
        each = self.item_choice_tokens or [self.choice_tokens] * len(self)
        pairs = [(ids, choice) for ids, choices in zip(self.token_ids, each, strict=True) for choice in choices]
        return replace(
            self,
            token_ids=[[*ids, *choice[:-1]] for ids, choice in pairs],
            labels=[None] * len(pairs),
            choice_tokens=None,
            item_choice_tokens=None,
            targets=[choice for _, choice in pairs],
        )

    def choice_log_probabilities(self, logs: Tensor, lengths: Tensor) -> Tensor:
        """Log probabilities (..., N * C) of ``sequences`` of ``lengths`` tokens -> (..., N, C), normalised among the choices."""
        assert self.choice_tokens is not None
        if self.by_length:
            logs = logs / lengths
        return torch.log_softmax(logs.unflatten(-1, (-1, len(self.choice_tokens))), dim=-1)

    def labels_tensor(self, device: str | torch.device = "cpu") -> Tensor:
        """The labels, (N,) int64.

        Raises:
            ValueError: an item has none.
        """
        if not self.labelled:
            raise ValueError(
                f"{self.labels.count(None)} of {len(self)} items have no label, the first is item {self.labels.index(None)}. "
                "Fix: label them, or leave them out with select()"
            )
        return torch.tensor(self.labels, dtype=torch.int64, device=device)

    def collate(
        self, indices: Sequence[int], device: str | torch.device = "cpu", *, left: bool = True
    ) -> dict[str, Tensor]:
        """The items at ``indices`` as one padded batch of B rows, as long as its longest item (L tokens).

        Args:
            left: pad on the left, so that the last column is every item's last token and the answer is read there. Encoders,
                which read their first column, want the padding on the right.

        Returns:
            ``input_ids``, ``attention_mask``, and ``position_ids`` with padding on the left: (B, L) int64 on ``device``.
            Positions count from each item's own first token, as some models (GPT-2) would count from the padding; with
            padding on the right every model counts right by itself.
            ``index``: (B,) int64 on the CPU, ``indices`` themselves; no argument of the model.
        """
        input_ids, mask = pad_rows([self.token_ids[i] for i in indices], self.pad_id, left=left)
        batch = {"input_ids": input_ids, "attention_mask": mask}
        if left:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        return {**batch, "index": torch.tensor(indices, dtype=torch.int64)}

    def groups(self, batch_size: int) -> list[list[int]]:
        """Indices of the items of each batch: every item once, ``batch_size`` at a time (fewer in the last).

        Items of similar length share a batch. The longest come first: a batch size that memory does not allow fails at once.
        """
        batch_size = check_count("batch_size", batch_size, "a count of items")
        order = sorted(range(len(self)), key=lambda i: -len(self.token_ids[i]))
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def batches(
        self, batch_size: int, device: str | torch.device = "cpu", *, left: bool = True
    ) -> Iterator[dict[str, Tensor]]:
        """The ``groups`` as padded batches, see ``collate``."""
        for group in self.groups(batch_size):
            yield self.collate(group, device, left=left)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Token ids of B rows as one batch, as long as the longest (L tokens), and its attention mask: both (B, L) int64."""
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(len(row))
        input_ids[number, where] = torch.tensor(row)
        mask[number, where] = 1
    return input_ids, mask
