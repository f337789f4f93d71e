"""Key-value caches under the fan: whose rows they hold, how beams move them, and what an offloaded one must wait for.

Layers of the random blocks hold S * B rows, sample-major; the layers below hold the B rows of the caller. What is put on a cache
here is taken off when the context ends, and follows a copy of the cache to the copy.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SamplingError
from .tail import columns_of

if TYPE_CHECKING:
    from ..adapters.samples import SampleBatch
    from ..adapters.state import SamplingState

_PATCHED = ("reorder_cache", "batch_select_indices", "prefetch", "crop", "batch_repeat_interleave")
_ROWS = "tfb_rows"  # the attribute that says which samples a cache's rows are of


def cache_of(given: dict[str, Any]) -> Any:
    """The key-value cache among a model call's arguments or results; transformers 5.24 renamed it."""
    # Past the outputs' own look-up, which warns of the old name also where the new one holds nothing.
    found = dict.get(given, "cache")
    return dict.get(given, "past_key_values") if found is None else found


def cache_argument(model: nn.Module) -> str:
    """The name that a model's call has for it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def rows_of_cache(state: SamplingState, batch: SampleBatch, first: int | None) -> Hashable:
    """Names what a cache's layers hold: the samples of one posterior, from the first random block on, or in the caller's rows.

    Where the caller lays out the rows, a step of mode ``"token"`` may have a seed of its own.
    """
    seed = None if first is None and batch.mode == "token" else batch.seed
    return (state.number, first, batch.sigma, batch.samples, seed, batch.antithetic, batch.mode, batch.family)


class CacheWatch:
    """The caches of one sampling context.

    Args:
        first: index of the first block whose layer holds rows of every sample.
        size: how many samples.
        rows_of: names the samples; a cache goes on only under the same. ``None``: no layer holds rows of every sample.
        side_by_side: samples lie along the sequence, so that the last columns are not the last tokens.
    """

    def __init__(self, first: int, size: int, rows_of: Hashable | None, side_by_side: bool = False) -> None:
        self.first, self.size, self.rows_of, self.side_by_side = first, size, rows_of, side_by_side
        self.is_open = True
        self._seen: list[weakref.ref[Any]] = []

    def enter(self, cache: Any) -> None:
        """Check a cache that a call brings, and make it follow this context.

        Raises:
            SamplingError: it holds tokens of other samples, or of a call outside any context.
        """
        for part in _caches(cache):
            found = part.__dict__.get(_ROWS)
            if found != self.rows_of and is_filled(part):
                whose = "of a call outside this context" if found is None else "of other samples"
                raise SamplingError(
                    f"the key-value cache holds tokens {whose}, expected an empty cache or one that these samples filled. "
                    "Fix: run the prompt inside this context, with the same adapter, samples, sigma and depth"
                )
        self.adopt(cache)

    def adopt(self, output: Any) -> None:
        """Make the cache that a call of this context gives out with its results (or the cache itself) follow it."""
        for cache in _caches(output):
            cache.__dict__[_ROWS] = self.rows_of
            patched = cache.__dict__.get("reorder_cache")
            if isinstance(patched, _Patch) and patched.watch is self:
                continue
            cache.reorder_cache = _Reorder(cache, self)
            if self.side_by_side:
                cache.crop, cache.batch_repeat_interleave = _Crop(cache, self), _Repeat(cache, self)
                if isinstance(cache.__dict__.get("update"), _Closed):
                    del cache.__dict__["update"]
            if hasattr(cache, "batch_select_indices"):
                cache.batch_select_indices = _Select(cache, self)
            if getattr(cache, "offloading", False):
                cache.prefetch = _Prefetch(cache, self)
            self._seen.append(weakref.ref(cache))

    def close(self) -> None:
        """Take everything off the caches again."""
        self.is_open = False
        for reference in self._seen:
            cache = reference()
            for name in () if cache is None else _PATCHED:
                if isinstance(cache.__dict__.get(name), _Patch) and cache.__dict__[name].watch is self:
                    del cache.__dict__[name]
            if cache is not None and self.side_by_side and is_filled(cache):
                cache.update = _Closed(cache, self)
        self._seen.clear()


class _Patch:
    """A method of one cache, which a copy of the cache has for itself; the class's own once the context has ended."""

    name: str

    def __init__(self, cache: Any, watch: CacheWatch) -> None:
        self.cache, self.watch = weakref.ref(cache), watch

    def __deepcopy__(self, memo: dict[int, Any]) -> _Patch:
        cache = self.cache()
        return type(self)(memo[id(cache)] if id(cache) in memo else copy.deepcopy(cache, memo), self.watch)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache()
        plain = getattr(type(cache), self.name).__get__(cache)
        return self.run(cache, plain, *args, **kwargs) if self.watch.is_open else plain(*args, **kwargs)

    def run(self, cache: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _Reorder(_Patch):
    """Beam search reorders the cache by B-row indices; the fanned layers hold S * B rows."""

    name = "reorder_cache"

    def run(self, cache: Any, plain: Any, indices: Any) -> None:
        if getattr(cache, "offloading", False):  # a layer's rows may still be on their way back to the GPU
            torch.cuda.current_stream(cache.prefetch_stream.device).wait_stream(cache.prefetch_stream)
        for index, layer in enumerate(cache.layers):
            fanned = indices if index < self.watch.first else self.fanned(layer, indices)
            getattr(layer, self.name)(fanned)
        columns = columns_of(cache)
        if columns is not None:
            columns.select(indices)

    def fanned(self, layer: Any, indices: Tensor) -> Tensor:
        rows = indices.shape[0]
        return torch.cat([indices + s * rows for s in range(self.watch.size)])


class _Select(_Reorder):
    """The same for rows that are picked, of which there may be fewer, by numbers or by a mask."""

    name = "batch_select_indices"

    def fanned(self, layer: Any, indices: Any) -> Any:
        keys = getattr(layer, "keys", None)
        if not isinstance(keys, Tensor) or keys.dim() == 0:  # nothing is held yet
            return indices
        rows = keys.shape[0] // self.watch.size
        picked = torch.arange(rows, device=keys.device)[indices]
        return torch.cat([picked + s * rows for s in range(self.watch.size)])


class _Crop(_Patch):
    """With a span, the last columns are not the last tokens."""

    name = "crop"

    def run(self, cache: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
        raise SamplingError(
            "cache.crop() cuts columns off, and with a span the samples' columns lie beside each other, expected a cache that only grows. "
            "Fix: generate without an assistant model or prompt lookup, or span='all'"
        )


class _Repeat(_Patch):
    """Whose the columns are is known of each row."""

    name = "batch_repeat_interleave"

    def run(self, cache: Any, plain: Any, repeats: int) -> Any:
        columns = columns_of(cache)
        if columns is not None:
            rows = torch.arange(columns.order.shape[0], device=columns.order.device)
            columns.select(rows.repeat_interleave(repeats))
        return plain(repeats)


class _Closed(_Patch):
    """A cache whose context has ended: outside, its columns are no text."""

    name = "update"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache()
        if is_filled(cache):
            raise SamplingError(
                "the key-value cache holds the tokens of several samples side by side, and the context that filled it has ended, expected a "
                "cache of this call's own. Fix: go on inside the context, or cache.reset()"
            )
        del cache.__dict__[self.name]
        return getattr(cache, self.name)(*args, **kwargs)


class _Prefetch(_Patch):
    """Makes an offloaded cache fetch a layer only after what the GPU was asked before.

    transformers fetches in a stream of its own. Before 5.24 that stream did not wait for the copy to the host that it reads
    from, nor for the last use of the memory that it writes to; a GPU that lags behind the host, as with many samples, then
    read what was there before.
    """

    name = "prefetch"

    def run(self, cache: Any, plain: Any, *args: Any, **kwargs: Any) -> Any:
        stream = cache.prefetch_stream
        computing = torch.cuda.current_stream(stream.device)
        with stream:
            torch.cuda.current_stream(stream.device).wait_stream(computing)
        return plain(*args, **kwargs)


def _caches(found: Any) -> Iterator[Any]:
    """The caches with layers in a cache, a model's output, or nothing; one of an encoder and a decoder is made of two."""
    if isinstance(found, dict):
        found = cache_of(found)
    for part in found if isinstance(found, tuple) else (found,):
        inner = getattr(part, "self_attention_cache", None), getattr(part, "cross_attention_cache", None)
        for cache in (part, *inner):
            if hasattr(cache, "layers") and hasattr(cache, "reorder_cache"):
                yield cache


def filled_cache(kept: Sequence[Tensor]) -> Any:
    """A cache that holds these keys and values, layer after layer, and does not write to them."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(kept[::2], kept[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


class FilledError(Exception):
    """A prompt's keys and values are all there: what its last block would go on with is not needed."""


def filling_cache(blocks: int) -> Any:
    """An empty cache that ends the call which fills it, of a model with so many blocks, by :class:`FilledError`; where not all of its
    layers hold plain keys and values the call ends as usual. Then ``del cache.update``."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache: Any = DynamicCache()

    def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        found = DynamicCache.update(cache, keys, values, layer_idx, *args, **kwargs)
        if layer_idx == blocks - 1 == len(cache.layers) - 1 and all(type(x) is DynamicLayer for x in cache.layers):
            raise FilledError
        return found

    cache.update = update
    return cache


def room_of(cache: Any) -> int | None:
    """Columns that a static cache has; ``None`` of one that grows."""
    layers = getattr(cache, "layers", None) or ()
    return next((int(layer.max_cache_len) for layer in layers if hasattr(layer, "max_cache_len")), None)


def windows_opened(cache: Any, room: int = 0) -> None:
    """Let an empty cache's layers keep what is behind a sliding window, since their columns are not the places of tokens; in a
    static cache with that room, or that of its longest layer."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

    room = room or max((getattr(layer, "max_cache_len", 0) for layer in getattr(cache, "layers", ())), default=0)
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = DynamicLayer()
        elif type(layer) is StaticSlidingWindowLayer:
            cache.layers[index] = StaticLayer(max_cache_len=room)


def is_filled(cache: Any) -> bool:
    """Whether any layer holds a token."""
    for layer in getattr(cache, "layers", None) or ():
        recurrent = getattr(layer, "has_previous_state", False)  # a dict of states from transformers 5.24 on
        if any(recurrent.values()) if isinstance(recurrent, dict) else recurrent:
            return True
        if getattr(layer, "is_initialized", False) and hasattr(layer, "get_seq_length") and int(layer.get_seq_length()):
            return True
    return False
