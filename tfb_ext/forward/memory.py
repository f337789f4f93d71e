"""The one rule for memory: how many rows a forward may hold, and what is done where they do not fit."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch

from ..adapters.layer import updates_of
from ..adapters.samples import SampleBatch

# On a CPU, rows of a batch, and rows one fused forward may hold before its samples are split: what its caches like.
BATCH_CPU, ROWS_CPU = 8, 64
# On a GPU a forward takes so many operations that launching it costs little beside (most of a second of an H100), as far as
# its tokens fit into this share of the free memory, by a rough count of what a block holds at a time.
OPERATIONS, MEMORY_SHARE, MOST_TOKENS, FEWEST_TOKENS = 4e14, 1 / 6, 2**18, 2**10
BATCH_CUDA = 1024  # most rows of a batch

T = TypeVar("T")


class Rows(Protocol):
    """A batch that can be halved, known by its key."""

    @property
    def key(self) -> Hashable: ...

    @property
    def inputs(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def halves(self) -> tuple[Any, Any]: ...


class DoesNotFitError(Exception):
    """One sample of a batch does not fit into memory."""


class Memory:
    """Runs batches in pieces that fit: samples of a batch are split first, then its rows, and what was learnt is kept.

    Args:
        device: where the model is.
        rows: that one forward may hold, of all its samples together.
        split: called with a batch and its halves, once, before these are run.
    """

    def __init__(
        self, device: torch.device, rows: float = math.inf, split: Callable[[Any, Sequence[Any]], None] | None = None
    ) -> None:
        self.device, self.rows, self._split = device, rows, split
        self.halves: dict[Hashable, tuple[Any, Any]] = {}

    def once(self, call: Callable[[], T]) -> T:
        """``call()``, which is one sample of a batch."""
        try:
            return call()
        except torch.OutOfMemoryError:
            pass
        raise DoesNotFitError

    def passes(
        self, batch: Rows, samples: SampleBatch, call: Callable[[SampleBatch], T], share: float = 1.0
    ) -> Iterator[T]:
        """``call`` of chunks of the sample groups; out of memory halves the chunk and goes on with the same samples.

        ``share``: of its batch that one sample takes.
        """
        cost = max(len(batch) * share, 1e-9)
        chunk = int(max(1, min(len(samples), self.rows / cost)))
        start = 0
        while start < len(samples):
            part = samples.part(start, min(start + chunk, len(samples)))
            result: T | None = None
            try:
                result = call(part)
            except torch.OutOfMemoryError:
                pass
            # Outside the handler: while it runs, the exception holds on to every tensor of the failed forward.
            if result is None:
                if len(part) == 1:
                    raise DoesNotFitError
                chunk = len(part) // 2
                self.rows = chunk * cost
                self._release()
                continue
            start += len(part)
            yield result

    def whole_or_halves(self, batch: Any, run: Callable[[Any], T], join: Callable[[list[T]], T]) -> T:
        """``run(batch)``; where a batch does not fit into memory, its halves one after the other, now and ever after."""
        if batch.key not in self.halves:
            try:
                return run(batch)
            except DoesNotFitError:
                pass
            if len(batch) == 1:
                raise torch.OutOfMemoryError(
                    f"one sample of one row of {batch.inputs['input_ids'].shape[1]} tokens does not fit into memory; free some, shorten "
                    "the rows, or load the model in a smaller type"
                )
            self.rows = max(1, min(self.rows, len(batch) // 2))
            self.halves[batch.key] = batch.halves()
            if self._split is not None:
                self._split(batch, self.halves[batch.key])
            self._release()
        return join([self.whole_or_halves(half, run, join) for half in self.halves[batch.key]])

    def parts(self, batch: Any) -> Iterator[Any]:
        """The batch, or the halves of it that were found to fit into memory."""
        if batch.key not in self.halves:
            yield batch
        else:
            for half in self.halves[batch.key]:
                yield from self.parts(half)

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that tensors may still take on a GPU: what is free there or kept idle by torch, within
    ``torch.cuda.set_per_process_memory_fraction``."""
    free, total = torch.cuda.mem_get_info(device)
    taken = torch.cuda.memory_allocated(device)
    idle = torch.cuda.memory_reserved(device) - taken
    return int(min(free + idle, torch.cuda.get_per_process_memory_fraction(device) * total - taken))


def room_for_tokens(model: Any, device: torch.device, work: float = 1.0) -> int:
    """Tokens that one forward may hold on this GPU, where it may take ``work`` times as long as launching it asks for."""
    config = model.config.get_text_config()
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    size = model.get_input_embeddings().weight.element_size()
    free = free_memory(device)
    if any(update.kind is not None for module in model.modules() for update in updates_of(module).values()):
        free -= size * hidden * wide  # one weight at a time is dense
    tokens = free * MEMORY_SHARE / (size * (8 * hidden + 4 * wide))
    tokens = min(tokens, work * OPERATIONS / (2 * sum(p.numel() for p in model.parameters())))
    return int(min(max(tokens, FEWEST_TOKENS), MOST_TOKENS))


def room_for_trunk(device: torch.device, size: int) -> tuple[torch.device | None, float]:
    """Where a trunk of ``size`` bytes goes (``None``: where it is made) and how many bytes of it: where it would take more than a
    quarter of the device's free memory, to host memory, up to half of what is free there."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2
    if device.type != "cuda":
        return None, host if device.type == "cpu" else math.inf
    return (torch.device("cpu"), host) if size > free_memory(device) / 4 else (None, math.inf)


def room_for_rows(model: Any, device: torch.device, shared: int, own: int, copies: int) -> int:
    """Rows of a generation that a GPU has room for, at least one: their keys and values, of ``shared`` tokens once and of ``own`` for each
    of ``copies`` (samples, beams), into half of the free memory. Any number elsewhere."""
    if device.type != "cuda":
        return sys.maxsize
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.get_input_embeddings().weight.element_size()
    return max(1, int(free_memory(device) / 2 / (token * (shared + own * copies))))
