"""The random tokens at the end of each row, laid side by side for all samples along the sequence, and what each of them sees.

A row's prompt is run once by the mean adapter. Its random tokens follow S times, sample after sample, and a mask lets each see the
prompt and its own sample's tokens before it. So keys and values of the prompt exist once, whatever S is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

_COLUMNS = "tfb_columns"  # the attribute of a cache that says whose its columns are


class Tail(NamedTuple):
    """The random tokens among the N columns of a call: T slots a row, some of them empty.

    Attributes:
        columns: (B, T) int64, the column of each slot; ``None`` where they are the last T of every row.
        valid: (B, T) bool, whether the slot is a random token of its row.
        seen: (B, N) bool, the columns that random tokens see as the mean adapter's.
        attended: (B, N) bool, and ``padded``: whether some are not.
        uneven: whether a column of the last T is attended and not random.
    """

    columns: Tensor | None
    valid: Tensor
    seen: Tensor
    attended: Tensor
    padded: bool
    uneven: bool

    @property
    def slots(self) -> int:
        return self.valid.shape[1]

    def places(self) -> Tensor:
        """(B, T) int64, the column of each slot."""
        if self.columns is not None:
            return self.columns
        width = self.attended.shape[1]
        return torch.arange(width - self.slots, width, device=self.valid.device).expand(self.valid.shape)

    def of(self, value: Tensor) -> Tensor:
        """The slots' part of a tensor (B, N, ...)."""
        if self.columns is None:
            return value[:, value.shape[1] - self.slots :]
        index = self.columns.reshape(*self.columns.shape, *[1] * (value.dim() - 2))
        return value.gather(1, index.expand(*self.columns.shape, *value.shape[2:]))

    def merged(self, prompt: Tensor, slots: Tensor) -> Tensor:
        """(B, K, ...): the last K columns of the prompt, with the slots (B, T, ...) in their places."""
        kept, before = prompt.shape[1], self.attended.shape[1] - prompt.shape[1]
        place = self.places() - before
        place = place.masked_fill(~self.valid | (place < 0), kept)  # one more column takes what has no place
        room = torch.cat([prompt, prompt[:, :1]], 1)
        index = place.reshape(*place.shape, *[1] * (prompt.dim() - 2)).expand(*place.shape, *prompt.shape[2:])
        return room.scatter(1, index, slots.to(room.dtype))[:, :kept]


def tail_of(attended: Tensor, counts: int | Tensor) -> Tail:
    """The last ``counts`` (of all rows, or (B,)) attended tokens of each row of a mask (B, N)."""
    rank = attended.cumsum(1)
    length = rank[:, -1]
    random = attended & (rank > (length - counts)[:, None])
    width, own = attended.shape[1], random.sum(1)
    first = torch.where(own > 0, random.int().argmax(1), width).min()
    uneven = (own < torch.minimum(own.max(), length)).any()
    facts = torch.stack([own.max(), first, attended.all().long(), uneven.long()]).tolist()  # one wait for the device
    slots, start, whole, uneven = max(facts[0], 1), *facts[1:]
    # Where every row ends with its random tokens, no column need be looked for.
    columns = None if start >= width - slots else random.int().argsort(dim=1, stable=True)[:, -slots:]
    tail = Tail(columns, random[:, :slots], attended & ~random, attended, not whole, bool(uneven))
    return tail._replace(valid=tail.of(random))


def attended_of(mask: Any, rows: int, tokens: int, device: torch.device) -> Tensor:
    """(B, N) bool of what a model is given as its mask for N tokens without a past: 2-D, prepared (B, 1, N, columns), or none."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if mask is None:
        return torch.ones(rows, tokens, dtype=torch.bool, device=device)
    if mask.dim() == 2:
        return mask[:, -tokens:].bool().expand(rows, tokens)
    own = mask[:, 0].diagonal(dim1=1, dim2=2)[:, :tokens]  # whether a token sees itself
    return (own if own.dtype == torch.bool else own == 0).expand(rows, tokens)


@dataclass(frozen=True)
class Branches:
    """C continuations of each row, which see the row and themselves alone: the choices of a prompt.

    Attributes:
        ids: (B, C, K) int64, their tokens, shorter ones filled up on the right.
        valid: (B, C, K) bool.
    """

    ids: Tensor
    valid: Tensor

    @property
    def count(self) -> int:
        return self.ids.shape[1]

    def part(self, rows: slice | Tensor) -> Branches:
        return Branches(self.ids[rows], self.valid[rows])


class Columns:
    """Whose the columns of a key-value cache are, as far as its calls have filled it.

    Attributes:
        own: (C,) int64, the sample's place of each column, -1 for the prompt.
        order: (B, C) int64, the columns of a row as the caller counts them: a token sees none behind its own.
        seen: (B, C) bool, whether its own sample (any, for the prompt) sees a column.
        length: (B,) int64, attended tokens of each row so far.
        tokens: () int64, columns of a row so far, as the caller counts them.
        fixed: whether the tensors have room for all columns to come, as a static cache has, and stay where they are.
    """

    def __init__(
        self, own: Tensor, order: Tensor, seen: Tensor, length: Tensor, tokens: int, size: int, room: int | None
    ) -> None:
        self.length, self.tokens = length.clone(), torch.tensor(tokens, device=length.device)
        self.size, self.fixed = size, room is not None
        more = 0 if room is None else room - own.shape[0]
        if more < 0:
            raise ValueError(
                f"max_cache_len is {room}, expected at least {own.shape[0]}: a prompt's columns and those of {size} samples. Fix: leave "
                "the cache to tfb_ext.generate, or make it larger"
            )
        pad = torch.nn.functional.pad
        self.own, self.order, self.seen = pad(own, (0, more)), pad(order, (0, more)), pad(seen, (0, more), value=True)
        self._expect(own.shape[0])

    def append(self, own: Tensor, order: Tensor, seen: Tensor, filled: int) -> None:
        """Add a call's columns to those that are filled, once its tokens are counted."""
        if self.fixed:
            end = filled + own.shape[0]
            self.own[filled:end], self.order[:, filled:end], self.seen[:, filled:end] = own, order, seen
            self._expect(end)
        else:
            self.own = torch.cat([self.own, own])
            self.order, self.seen = torch.cat([self.order, order], 1), torch.cat([self.seen, seen], 1)

    def advance(self, valid: Tensor) -> None:
        """Count the tokens (B, T) of a call."""
        self.length.add_(valid.sum(1))
        self.tokens.add_(valid.shape[1])

    def select(self, rows: Tensor) -> None:
        """The cache's rows were moved, or picked, by these numbers or this mask."""
        for name in ("order", "seen", "length"):
            before = getattr(self, name)
            picked = before[rows.to(before.device)]
            if self.fixed and picked.shape == before.shape:
                before.copy_(picked)
            else:
                setattr(self, name, picked)

    def _expect(self, filled: int) -> None:
        """What the columns to come are where single tokens follow, so that a graph's step need write nothing here."""
        coming = torch.arange(self.own.shape[0] - filled, device=self.own.device)
        self.own[filled:] = coming % self.size
        self.order[:, filled:] = self.tokens + coming // self.size
        self.seen[:, filled:] = True


def columns_of(cache: Any) -> Columns | None:
    found: Columns | None = getattr(cache, "__dict__", {}).get(_COLUMNS)
    return found


def note_columns(cache: Any, columns: Columns) -> Columns:
    """Put it on the cache; on one that had as many before, in the same tensors, which graphs may read."""
    before = columns_of(cache)
    if before is None or not before.fixed or before.order.shape != columns.order.shape or before.size != columns.size:
        cache.__dict__[_COLUMNS] = columns
        return columns
    for name in ("own", "order", "seen", "length", "tokens"):
        getattr(before, name).copy_(getattr(columns, name))
    return before


@dataclass
class TailCall:
    """One call of the blocks: ``lead`` columns of the prompt, then Q tokens a row behind it, and the masks of both.

    Attributes:
        lead: tokens of the prompt in this call; 0 where they are in the cache.
        tail: the random tokens of one sample.
        own: (Q,) int64, whose the tokens behind the prompt are; ``order`` and ``valid`` (B, Q), where they are and whether they
            are tokens at all.
        columns: of all keys, the call's own included.
        windows: whether windows count.
    """

    lead: int
    tail: Tail
    own: Tensor
    order: Tensor
    valid: Tensor
    columns: Columns
    windows: bool = True
    _sees: dict[int | None, Tensor] = field(default_factory=dict)
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    def sees(self, window: int | None) -> Tensor:
        """(B, Q, C) bool: which columns each of the tokens sees, by a window of so many places if there is one."""
        window = window if self.windows else None
        if window not in self._sees:
            c = self.columns
            ahead = self.order[:, :, None] - c.order[:, None, :]
            same = c.own == self.own[:, None]
            sees = c.seen[:, None] & (ahead >= 0) & ((c.own < 0) | same)
            if window is not None:
                sees &= ahead < window
            # An empty slot sees its sample's columns, so that no softmax is over nothing.
            self._sees[window] = sees | (~self.valid[:, :, None] & same)
        return self._sees[window]

    def tail_mask(self, window: int | None, groups: int, dtype: torch.dtype, times: int = 1) -> Tensor:
        """(times·B, 1, groups·Q, C) of ``dtype``, to be added: the queries of so many heads one after the other."""
        key = (window, groups, dtype, times)
        if key not in self._masks:
            sees = self.sees(window)
            width = sees.shape[-1]
            # Rows of the mask begin at multiples of 16 bytes, which the fused kernels want.
            room = torch.zeros(*sees.shape[:-1], -(-width // 8) * 8, dtype=dtype, device=sees.device)
            room[..., :width].masked_fill_(~sees, torch.finfo(dtype).min)
            room = room[:, None].expand(-1, groups, -1, -1).flatten(1, 2).repeat(times, 1, 1)
            self._masks[key] = room[:, None, :, :width]
        return self._masks[key]

    def is_causal(self, window: int | None) -> bool:
        """Whether each of the prompt's tokens sees all before it: none is padding, and the window is no narrower."""
        return not self.tail.padded and (window is None or not self.windows or self.lead <= window)

    def mask(self, window: int | None, times: int = 1) -> Tensor:
        """(times·B, 1, lead + Q, lead + Q) bool of the prompt's tokens and those behind it."""
        window = window if self.windows else None
        key = ("all", window, times)
        if key not in self._masks:
            place = torch.arange(self.lead, device=self.own.device)
            behind = place[:, None] - place
            sees = (behind >= 0) & (behind < (self.lead if window is None else window))
            sees = (sees & self.tail.attended[:, None]) | (behind == 0)
            tail = self.sees(window)
            sees = torch.cat(
                [torch.nn.functional.pad(sees, (0, tail.shape[1])), tail[..., : self.lead + tail.shape[1]]], 1
            )
            self._masks[key] = sees[:, None].repeat(times, 1, 1, 1)
        return self._masks[key]
