"""Decoding as CUDA graphs: a step of one token is one launch, whatever its samples, sigma and seed.

transformers asks a model for its compiled call when it decodes from a static cache on a GPU, and compiles it, once more in
every sampling context. Here the same door gives a call that captures the step in a CUDA graph the second time it is made and
replays it from then on. The kernels read samples, sigma and seed from the device, so one graph serves all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters.adapter import BayesianAdapter
from ..adapters.samples import SampleBatch
from ..forward.caches import cache_of, windows_opened
from ..forward.fold import Predictive
from ..forward.graphs import Graph, capturable, describe
from ..forward.rows import asks_for
from ..forward.tail import columns_of

GRAPHS = 4  # kept at a time; each holds the memory of one step

_OPEN: WeakKeyDictionary[nn.Module, CapturedDecoding] = WeakKeyDictionary()


@contextmanager
def captured_decoding(model: BayesianAdapter | nn.Module) -> Iterator[CapturedDecoding]:
    """Inside, ``generate`` with ``cache_implementation="static"`` replays CUDA graphs instead of compiling the model.

    Works for :func:`~tfb_ext.generation.generate`, which also keeps the cache from one call to the next, so that calls of one
    size share their graphs; for the model's own ``generate`` inside ``adapter.predictive(...)`` or outside (then it is the
    plain model); and for any transformers model. Steps that a graph cannot hold run as usual: on the CPU, from caches with
    sliding windows, over several devices, with hidden states or attentions asked for. ``compile_config=`` still compiles.
    Forward hooks of the caller's do not run in a replayed step.

    Args:
        model: a Bayesian adapter, a transformers model, or one that PEFT wrapped.
    """
    adapter = model if isinstance(model, BayesianAdapter) else None
    inner: Any = adapter.anatomy.model if adapter is not None else model
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    if not hasattr(inner, "get_compiled_call"):
        raise ValueError(
            f"{type(inner).__name__} has no get_compiled_call; expected a transformers model that generates text"
        )
    if inner in _OPEN:
        raise ValueError(f"captured_decoding of this {type(inner).__name__} is open already; use that one")
    decoding = CapturedDecoding(inner, adapter)
    try:
        with decoding_with(decoding):
            yield decoding
    finally:
        decoding.clear()


@contextmanager
def decoding_with(decoding: CapturedDecoding) -> Iterator[None]:
    """Inside, the model of ``decoding`` decodes with it; its graphs and cache stay when this ends."""
    model = decoding.model
    model.get_compiled_call = decoding.compiled_call
    _OPEN[model] = decoding
    try:
        yield
    finally:
        del _OPEN[model]
        del model.get_compiled_call


def open_decoding(model: nn.Module) -> CapturedDecoding | None:
    """The :func:`captured_decoding` that this transformers model is in."""
    return _OPEN.get(model)


class CapturedDecoding:
    """The graphs of one model's decoding steps, and the cache that they work on.

    Attributes:
        captured: graphs made so far.
        replayed: steps that were a replay.
        plain: steps that ran as usual, each kind's first among them.
    """

    def __init__(self, model: Any, adapter: BayesianAdapter | None) -> None:
        self.model = model
        self.adapter = adapter
        self.captured = self.replayed = self.plain = 0
        self._original: Callable[..., Any] = model.get_compiled_call
        self._state: int | None = None
        self._states: dict[Hashable, int] = {}
        self._met: set[Hashable] = set()
        self._steps: dict[Hashable, _Step] = {}
        self._cache: tuple[Hashable, int, Any] | None = None

    def clear(self) -> None:
        """Let go of graphs and cache."""
        self._steps.clear()
        self._met.clear()
        self._cache = None

    def cache(self, rows: int, length: int, prompt: int = 1) -> Any:
        """An empty static cache for ``rows`` rows of at least ``length`` tokens; the last call's own if it serves.

        Of these ``prompt`` are the prompt's: with a span it has columns for them once, and for what follows once a sample.

        Give it to the model's ``generate`` as its cache, and the graphs of the call before are used again. Rows are the
        caller's: prompts times beams or returned sequences. Only one cache is kept.
        """
        from transformers import StaticCache

        context = self._context()
        view = None if context is None else context[1]
        kind = (rows, None if context is None or view is None else (context[0], len(view.batch), view.span))
        if view is not None and view.span is not None:
            length = prompt + len(view.batch) * (view.span + max(length - prompt - 1, 0))
        if self._cache is not None:
            kept_kind, kept_length, cache = self._cache
            if kept_kind == kind and kept_length >= length:
                cache.reset()
                return cache
            self._cache = None
        self.clear()  # their cache is gone
        rounded = -(-length // 64) * 64
        made = StaticCache(config=self.model.config.get_text_config(decoder=True), max_cache_len=rounded)
        if view is not None and view.span is not None:
            windows_opened(made, rounded)
        self._cache = (kind, rounded, made)
        return made

    def compiled_call(self, compile_config: Any = None) -> Callable[..., Any]:
        """What ``generate`` decodes with: stands in for ``get_compiled_call`` of the model."""
        if compile_config is not None:
            return self._original(compile_config)
        if self._context() is not None and self.adapter is not None:
            self.adapter.attached.check_call()
        state = self._model_state()
        # By its number: a state names every weight, which no step should have to compare.
        self._state = None if state is None else self._states.setdefault(state, len(self._states))
        return self.step

    def step(self, **inputs: Any) -> Any:
        """The model's call, by a graph where one can hold it. What it returns is overwritten by the next step."""
        context = self._context()
        view = None if context is None else context[1]
        if self.adapter is not None and view is not None:
            self.adapter.attached.check_modes()
        kind = self._kind(inputs, context)
        if kind is None:
            self.plain += 1
            return self.model(**inputs)
        step = self._steps.get(kind)
        if step is None and kind in self._met:
            step = self._capture(kind, inputs, view)
        if step is None:  # libraries choose their kernels and allocate their workspaces on the first call
            self._met.add(kind)
            self.plain += 1
            return self.model(**inputs)
        self.replayed += 1
        if self.adapter is None:
            return step.replay(inputs, view)
        with self.adapter.attached.state.one_call():
            return step.replay(inputs, view)

    # What a graph is good for -----------------------------------------------------------------------------------------

    def _context(self) -> tuple[int, Predictive] | None:
        return None if self.adapter is None else self.adapter.open_context

    def _model_state(self) -> Hashable | None:
        """What a graph has written into it: addresses of weights, and which adapters are on. ``None``: no graph can serve."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if len({t.device for t in tensors}) != 1 or not capturable(tensors[0].device) or self.model.training:
            return None
        adapters = tuple(
            (tuple(m.active_adapters), m.disable_adapters, tuple(m.merged_adapters), tuple(m.scaling.items()))
            for m in self.model.modules()
            if isinstance(m, BaseTunerLayer) and hasattr(m, "scaling")
        )
        return (
            tuple(t.data_ptr() for t in tensors),
            adapters,
            getattr(self.model.config, "_attn_implementation", None),
        )

    def _kind(self, inputs: dict[str, Any], context: tuple[int, Predictive] | None) -> Hashable | None:
        """Calls of one kind differ only in what their tensors hold. ``None``: this call cannot be captured."""
        ids, cache = inputs.get("input_ids"), cache_of(inputs)
        if self._state is None or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        if asks_for(self.model, inputs, "output_hidden_states", "output_attentions") or torch.is_grad_enabled():
            return None
        held = _cache_addresses(cache)
        sampled: Hashable = None
        if context is not None:
            first, view = context
            if view.observe is not None or view.targets is not None or view.key is not None:
                return None
            batch, columns = view.batch, view.columns
            sampled = (len(batch), batch.antithetic, batch.mode, batch.family, first, view.span)
            noted = columns_of(cache)  # which a graph reads
            sampled += (None if noted is None else noted.own.data_ptr(),)
            sampled += (view.keep_samples, None if columns is None else (columns.data_ptr(), tuple(columns.shape)))
        elif self.adapter is not None and self.adapter.is_sampling:
            return None
        given = describe({name: value for name, value in inputs.items() if value is not cache})
        if held is None or given is None:
            return None
        return (self._state, held, sampled, given, torch.is_inference_mode_enabled())

    def _capture(self, kind: Hashable, inputs: dict[str, Any], view: Predictive | None) -> _Step | None:
        try:
            step = _Step(self.model, inputs, view)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"a decoding step of {type(self.model).__name__} cannot be captured in a CUDA graph ({reason}); it runs as usual",
                stacklevel=2,
            )
            self._state = None  # for the rest of this generate
            return None
        self._steps[kind] = step
        self.captured += 1
        while len(self._steps) > GRAPHS:
            oldest = next(iter(self._steps))
            del self._steps[oldest]
            self._met.discard(oldest)
        return step


class _Step:
    """One captured call, and the samples that it reads."""

    def __init__(self, model: Any, inputs: dict[str, Any], view: Predictive | None) -> None:
        self.batch: SampleBatch | None = None
        self.loaded: SampleBatch | None = None
        own = None
        if view is not None:
            own = self.loaded = view.batch
            self.batch = view.batch = own.copy()
            self.batch.tensors(inputs["input_ids"].device)
        try:
            self.graph = Graph(lambda own: model(**own), inputs)
        finally:
            if view is not None and own is not None:
                view.batch = own
        self.seen = None if view is None else (view.folded, view.sample_outputs)

    def replay(self, inputs: dict[str, Any], view: Predictive | None) -> Any:
        if view is not None and self.batch is not None and self.loaded is not view.batch:
            self.batch.load(view.batch)
            self.loaded = view.batch
        output = self.graph.replay(inputs)
        if view is not None and self.seen is not None:
            view.folded, view.sample_outputs = self.seen
        return output


def _cache_addresses(cache: Any) -> Hashable | None:
    """Where a static cache lies; ``None`` for caches whose steps depend on what the host counts."""
    from transformers.cache_utils import StaticLayer

    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, "offloading", False):
        return None
    if not all(type(layer) is StaticLayer and layer.is_initialized for layer in layers):
        return None
    return tuple(
        (layer.keys.data_ptr(), layer.values.data_ptr(), layer.cumulative_length.data_ptr(), tuple(layer.keys.shape))
        for layer in layers
    )
