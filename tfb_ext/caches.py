"""Key-value caches under the fan: whose rows they hold, how beams move them, and what an offloaded one must wait for.

Layers of the random blocks hold S * B rows, sample-major; the layers below hold the B rows of the caller. What is put on a cache
here is taken off when the context ends, and follows a copy of the cache to the copy.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SamplingError

_ROWS = "tfb_rows"  # the attribute that says which samples a cache's rows are of


def cache_of(given: Mapping[str, Any]) -> Any:
    """The key-value cache among a model call's arguments or results; transformers 5.24 renamed it."""
    return given["cache"] if given.get("cache") is not None else given.get("past_key_values")


def cache_argument(model: nn.Module) -> str:
    """The name that a model's call has for it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class CacheWatch:
    """The caches of one sampling context.

    Args:
        first: index of the first block whose layer holds rows of every sample.
        size: how many samples.
        rows_of: names the samples; a cache goes on only under the same. ``None``: no layer holds rows of every sample.
    """

    def __init__(self, first: int, size: int, rows_of: Hashable | None) -> None:
        self.first, self.size, self.rows_of = first, size, rows_of
        self.is_open = True
        self._seen: list[weakref.ref[Any]] = []

    def enter(self, cache: Any) -> None:
        """Check a cache that a call brings, and make it follow this context.

        Raises:
            SamplingError: it holds tokens of other samples, or of a call outside any context.
        """
        if cache is None or not hasattr(cache, "layers"):
            return
        found = cache.__dict__.get(_ROWS)
        if found != self.rows_of or self.rows_of is None:
            if self.rows_of is not None and _is_filled(cache):
                whose = "of a call outside this context" if found is None else "of other samples"
                raise SamplingError(
                    f"the key-value cache holds tokens {whose}, expected an empty cache or one that these samples filled. "
                    "Fix: run the prompt inside this context, with the same samples, sigma and depth"
                )
        self.adopt(cache)

    def adopt(self, cache: Any) -> None:
        """Make a cache that a call of this context filled follow it."""
        if cache is None or not hasattr(cache, "layers"):
            return
        cache.__dict__[_ROWS] = self.rows_of
        patched = cache.__dict__.get("reorder_cache")
        if isinstance(patched, _Reorder) and patched.watch is self:
            return
        cache.reorder_cache = _Reorder(cache, self)
        if getattr(cache, "offloading", False):
            cache.prefetch = _Prefetch(cache, self)
        self._seen.append(weakref.ref(cache))

    def close(self) -> None:
        """Take everything off the caches again."""
        self.is_open = False
        for reference in self._seen:
            cache = reference()
            for name in () if cache is None else ("reorder_cache", "prefetch"):
                if isinstance(cache.__dict__.get(name), _Patch) and cache.__dict__[name].watch is self:
                    del cache.__dict__[name]
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

    def run(self, cache: Any, plain: Any, beam_idx: Tensor) -> None:
        rows = beam_idx.shape[0]
        fanned = torch.cat([beam_idx + s * rows for s in range(self.watch.size)])
        if getattr(cache, "offloading", False):  # a layer's rows may still be on their way back to the GPU
            torch.cuda.current_stream(cache.prefetch_stream.device).wait_stream(cache.prefetch_stream)
        for index, layer in enumerate(cache.layers):
            layer.reorder_cache(beam_idx if index < self.watch.first else fanned)


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


def _is_filled(cache: Any) -> bool:
    """Whether any layer holds a token."""
    for layer in cache.layers:
        recurrent = getattr(layer, "has_previous_state", False)  # a dict of states from transformers 5.24 on
        if any(recurrent.values()) if isinstance(recurrent, dict) else recurrent:
            return True
        if getattr(layer, "is_initialized", False) and hasattr(layer, "get_seq_length") and int(layer.get_seq_length()):
            return True
    return False
