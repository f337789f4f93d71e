"""The trunk: hidden states below the first random block, which are the same for every sample, kept for further passes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PROMPT = -1


@dataclass
class Trunk:
    """Hidden states at the inputs of some blocks, kept per batch, so that later samples and sigmas skip the blocks below.

    Attributes:
        firsts: blocks whose input is kept, ascending; the number of blocks stands for the head, and ``PROMPT`` for keys and values
            of all positions, the mean adapter's, which spans go on from.
        device: where they are kept; ``None`` keeps them where they were made. Host memory is pinned for a GPU's copies.
        limit: bytes; what goes beyond is not kept, and is computed again.
        hidden: by (block, key of the batch).
    """

    firsts: tuple[int, ...]
    device: torch.device | None = None
    limit: float = math.inf
    hidden: dict[tuple[int, Hashable], tuple[Tensor, ...]] = field(default_factory=dict)
    returns_tuple: bool = False

    def wants(self, block: int, key: Hashable) -> bool:
        return block in self.firsts and (block, key) not in self.hidden

    def keep(self, block: int, key: Hashable, *hidden: Tensor) -> None:
        """Keep the input of ``block`` for the batch ``key``, if it is asked for, new and within the limit."""
        if not self.wants(block, key) or self.bytes() + _bytes(hidden) > self.limit:
            return
        self.hidden[block, key] = tuple(map(self._moved, hidden))

    def _moved(self, hidden: Tensor) -> Tensor:
        if self.device is None or self.device == hidden.device:
            return hidden
        pinned = hidden.is_cuda and self.device.type == "cpu"
        room = torch.empty(hidden.shape, dtype=hidden.dtype, device=self.device, pin_memory=pinned)
        # Both ways go through one stream, so that nothing need wait for a copy before the copy that reads it.
        return room.copy_(hidden, non_blocking=True)

    def kept(self, block: int, key: Hashable, device: torch.device) -> tuple[Tensor, ...] | None:
        """What is kept, on ``device``; ``None`` where nothing is."""
        found = self.hidden.get((block, key))
        return None if found is None else tuple(part.to(device, non_blocking=True) for part in found)

    def nearest(self, first: int, key: Hashable) -> int | None:
        """The highest block not above ``first`` whose input is kept for this batch."""
        return max((b for b in self.firsts if 0 <= b <= first and (b, key) in self.hidden), default=None)

    def split(self, key: Hashable, parts: Sequence[tuple[Hashable, slice]]) -> None:
        """Keep what is kept for a batch under the keys of parts of its rows instead, without a copy."""
        for block in self.firsts:
            hidden = self.hidden.pop((block, key), None)
            if hidden is not None:
                self.hidden.update({(block, part): tuple(h[rows] for h in hidden) for part, rows in parts})

    def forget(self, key: Hashable) -> None:
        for block in self.firsts:
            self.hidden.pop((block, key), None)

    def bytes(self) -> int:
        return sum(map(_bytes, self.hidden.values()))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class TrunkPass:
    """The blocks below the first random one in the forwards of one context: recorded, or passed over.

    Args:
        blocks: of the model.
        first: index of the first random block.
        trunk: the store; ``None`` keeps nothing.
    """

    def __init__(self, blocks: Sequence[nn.Module], first: int, trunk: Trunk | None) -> None:
        self.blocks, self.first, self.trunk = list(blocks), first, trunk
        self.key: Hashable | None = None  # of the forward's batch; None keeps nothing
        self.resumed: int | None = None
        self.bypassed: list[nn.Module] = []

    def hooks(self) -> Iterator[Any]:
        if self.first > 0 and self.trunk is not None:
            yield self.blocks[0].register_forward_hook(self._after_lowest)
            for index in (i for i in self.trunk.firsts if 0 <= i < self.first):
                yield self.blocks[index].register_forward_pre_hook(partial(self._before, index), with_kwargs=True)

    def _after_lowest(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.trunk is not None and not self.bypassed:
            self.trunk.returns_tuple = isinstance(output, tuple)

    def _before(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.kept_or(index, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.kept_or(index, kwargs["hidden_states"])}

    def kept_or(self, index: int, hidden: Tensor) -> Tensor:
        """What is kept for the input of block ``index``, if this forward resumes there; else keep ``hidden`` for later."""
        if self.trunk is None or self.key is None or index == 0:
            return hidden
        if index == self.resumed:
            found = self.trunk.kept(index, self.key, hidden.device)
            assert found is not None
            return found[0]
        if self.resumed is None or index > self.resumed:
            self.trunk.keep(index, self.key, hidden)
        return hidden

    def begin(self, key: Hashable | None) -> None:
        """Turn the blocks below the highest input that is kept for this batch into the identity for this forward."""
        self.key, self.resumed = key, None
        if self.trunk is None or key is None:
            return
        self.resumed = self.trunk.nearest(self.first, key)
        identity = _identity_tuple if self.trunk.returns_tuple else _identity
        for block in self.blocks[: self.resumed or 0]:
            if "forward" in block.__dict__:  # accelerate's offloading hooks: their forward brings weights in and out
                continue
            block.forward = identity
            self.bypassed.append(block)

    def end(self) -> None:
        for block in self.bypassed:
            block.__dict__.pop("forward", None)
        self.bypassed = []


def _identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _identity_tuple(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    return (hidden_states,)
