"""Some items of a data set packed anew into batches, with what is kept of them moved along: for adaptive sampling."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from .batch import Batch
from .engine import Scorer, trunk_of


class Repacking:
    """Batches of some items of a scorer's data set, each good until the next is asked for."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._selections = 0

    def select(self, items: Tensor, samples: int) -> Iterator[Batch]:
        """Batches of some items of the data set, each good until the next is asked for, for another call with new samples.

        Their hidden states are rows of the kept trunk, moved to where the padding of the new batch has them, so that no block
        below the first random one runs again (but for items that the trunk's limit left out, and where nothing is kept). Items
        of an :class:`~tfb_ext.data.Encoded` set are packed anew, in the order of their lengths; those of other batches stay
        with the rest of their batch.

        Args:
            items: int64 (n,), positions of items in the data set.
            samples: sample groups that the call will have; a batch takes about as many rows as one forward may hold.
        """
        homes = [leaf for batch in self.scorer.batches for leaf in self.scorer.memory.parts(batch)]
        if self.scorer.trunk is not None and self.scorer.trunk.device is not None and self.scorer.device.type == "cuda":
            torch.cuda.synchronize(
                self.scorer.device
            )  # rows are picked on the host, where copies may still be on their way
        packed = self.scorer.encoded is not None
        for batch in self._packed(homes, items.tolist(), samples) if packed else self._shrunk(homes, items):
            yield batch
            self._forget(batch)

    def _forget(self, batch: Batch) -> None:
        if self.scorer.trunk is not None:
            self.scorer.trunk.forget(batch.key)
        for half in self.scorer.memory.halves.pop(batch.key, ()):
            self._forget(half)

    def _shrunk(self, homes: Sequence[Batch], items: Tensor) -> Iterator[Batch]:
        wanted = torch.isin(torch.cat([home.index for home in homes]), items)
        for home, here in zip(homes, wanted.split([len(home.index) for home in homes]), strict=True):
            if not here.any():
                continue
            rows = here.nonzero()[:, 0]
            batch = home.part(self._next_key(), rows)
            self._move_trunk(batch, [(home, rows.tolist(), list(range(len(rows))))])
            yield batch

    def _packed(self, homes: Sequence[Batch], items: Sequence[int], samples: int) -> Iterator[Batch]:
        encoded = self.scorer.encoded
        assert encoded is not None
        places = {index: (home, row) for home in homes for row, index in enumerate(home.index.tolist())}
        kept = {item: all(self._is_kept(places[row][0]) for row in self.scorer.rows_of([item])) for item in items}
        share = (
            1.0
            if self.scorer.place.span is None
            else min(1.0, 1 / samples + self.scorer.place.span / self.scorer.mean_tokens)
        )
        size = max(
            1, min(int(self.scorer.memory.rows / (samples * share)), self.scorer.most_rows) // self.scorer.rows_per_item
        )
        for from_trunk in (True, False):
            some = [item for item in items if kept[item] is from_trunk]
            for group in encoded.select(some).groups(size):
                batch = self.scorer.encoded_batch(self._next_key(), [some[i] for i in group])
                sources: dict[Hashable, tuple[Batch, list[int], list[int]]] = {}
                for target, index in enumerate(batch.index.tolist()):
                    home, row = places[index]
                    _, rows, targets = sources.setdefault(home.key, (home, [], []))
                    rows.append(row)
                    targets.append(target)
                if from_trunk:
                    self._move_trunk(batch, list(sources.values()))
                yield batch

    def _is_kept(self, home: Batch) -> bool:
        return self.scorer.trunk is not None and (trunk_of(self.scorer.place), home.key) in self.scorer.trunk.hidden

    def _next_key(self) -> Hashable:
        self._selections += 1
        return "selection", self._selections

    def _move_trunk(self, batch: Batch, sources: Sequence[tuple[Batch, list[int], list[int]]]) -> None:
        """Keep for ``batch`` what its rows have in the trunk: of each source the rows, and which rows of ``batch`` they are."""
        trunk = self.scorer.trunk
        if trunk is None or not all(self._is_kept(home) for home, _, _ in sources):
            return
        block = trunk_of(self.scorer.place)

        def joined(parts: Sequence[Tensor]) -> Tensor:
            moved: Tensor | None = None
            for part, (home, rows, targets) in zip(parts, sources, strict=True):
                hidden = self._fitted(part[rows].to(self.scorer.device), home, batch)
                if moved is None:
                    moved = hidden.new_empty(len(batch.index), *hidden.shape[1:])
                moved[targets] = hidden
            assert moved is not None
            return moved

        kept = zip(*(trunk.hidden[block, home.key] for home, _, _ in sources), strict=True)
        trunk.hidden[block, batch.key] = tuple(map(joined, kept))

    def _fitted(self, hidden: Tensor, home: Batch, batch: Batch) -> Tensor:
        """Rows of what is kept for ``home``, as wide as those of ``batch`` are: (rows, tokens, n), or (rows, heads, tokens, n)."""
        width, choices = batch.inputs["input_ids"].shape[1], batch.branches
        at_head = trunk_of(self.scorer.place) == len(self.scorer.adapter.anatomy.blocks)
        # At the head there may be less than a hidden state a position: the last one's, or a pooled one.
        if hidden.dim() < 3 or (at_head and choices is None and "logits_to_keep" in batch.inputs):
            return hidden
        behind = hidden[..., :0, :]
        if choices is not None and home.branches is not None and hidden.dim() == 3:
            prompt = 0 if at_head else home.inputs["input_ids"].shape[1]
            behind = hidden[:, prompt:].unflatten(1, (choices.count, -1))
            more = choices.ids.shape[2] - home.branches.ids.shape[2]
            behind = torch.nn.functional.pad(behind, (0, 0, 0, more)).flatten(
                1, 2
            )  # a negative number cuts padding off
            if at_head:
                return behind
            hidden = hidden[:, :prompt]
        missing = width - hidden.shape[-2]
        pad = (0, 0, missing, 0) if self.scorer.padded_left else (0, 0, 0, missing)
        return torch.cat([torch.nn.functional.pad(hidden, pad), behind], -2)
