"""Sampling contexts: opened on a model one at a time, with the hooks they need, and closed whatever happened inside."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapters.attached import Attached
from ..adapters.samples import SampleBatch
from ..errors import SamplingError
from .caches import CacheWatch, cache_of, rows_of_cache
from .fan import Fan
from .fold import Predictive
from .rows import Layout, batch_after, batch_shape, check_packing
from .side_by_side import SpanLayout
from .span import SpanFan

# Models inside a sampling context: two fans on one model would multiply their rows and mix up the samples.
_SAMPLING_MODELS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_OPENING = threading.Lock()


def is_open(attached: Attached) -> bool:
    """Whether a context of the model is open, of whichever adapter."""
    return attached.anatomy.model in _SAMPLING_MODELS


def check_free(attached: Attached) -> None:
    if is_open(attached):
        raise SamplingError("a sampling context of this model is open already; contexts of one model do not nest")


@contextmanager
def fanned(
    attached: Attached, first: int, view: Predictive, layout: Layout | None, beside: SpanLayout | None = None
) -> Iterator[Predictive]:
    """Inside, calls of the model carry the view's samples from block ``first`` on: B rows in and out.

    ``layout``: of rows, without a span; ``beside``: of tokens side by side, with a span or branches.
    """
    fan = Fan(attached, first, view, layout) if beside is None else SpanFan(attached, first, view, beside, layout)
    with exclusive(attached), fan.open():
        yield view


@contextmanager
def laid_out(attached: Attached, first: int, batch: SampleBatch, layout: Layout | None) -> Iterator[None]:
    """Inside, the caller lays out S * B rows and gets as many."""
    model, state = attached.anatomy.model, attached.state
    # Every layer holds the caller's rows, so beams move them as they move any rows.
    caches = CacheWatch(len(attached.anatomy.blocks), 1, rows_of_cache(state, batch, None))
    with exclusive(attached), state.waiting() as wait, ExitStack() as undo:
        before = partial(_before_laid_out, attached, batch, caches)
        undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        after = partial(_after_laid_out, attached, caches)
        undo.callback(model.register_forward_hook(after, always_call=True).remove)
        undo.callback(caches.close)
        undo.enter_context(state.serving(batch, first, None if layout is None else layout.layers, fanned=True))
        undo.callback(wait)
        yield


def _before_laid_out(
    attached: Attached,
    batch: SampleBatch,
    caches: CacheWatch,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    state = attached.state
    if not torch.compiler.is_compiling():
        state.begin_call(batch)
        caches.enter(cache_of(kwargs))
    attached.check_call()
    check_packing(module, kwargs)
    rows, state.tokens = batch_shape(args, kwargs)
    if rows % len(batch):
        raise SamplingError(
            f"sampling({len(batch)} samples) got {rows} rows, expected a multiple of {len(batch)}: repeat the batch "
            "once for every sample, sample-major (inputs.repeat(samples, 1))"
        )
    state.each = rows // len(batch)
    batch_after(batch, kwargs)  # refuses what a step from a cache cannot be
    state.shared = None


def _after_laid_out(
    attached: Attached, caches: CacheWatch, module: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    attached.state.looked = False
    if not torch.compiler.is_compiling():
        caches.adopt(output)
        attached.state.turn.end()


@contextmanager
def exclusive(attached: Attached) -> Iterator[None]:
    """Inside, no other context of the model opens, and its layers ask this adapter's state what to sample."""
    model = attached.anatomy.model
    with ExitStack() as undo:
        with _OPENING:  # of two threads that open a context, one does
            check_free(attached)
            _SAMPLING_MODELS.add(model)
        undo.callback(_SAMPLING_MODELS.discard, model)
        undo.callback(attached.peft_model.register_forward_pre_hook(_refuse_adapter_names, with_kwargs=True).remove)
        undo.enter_context(attached.open())
        undo.enter_context(torch.no_grad())
        yield


def _refuse_adapter_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise SamplingError(
            "adapter_names= mixes adapters row by row, which a sampling context cannot; call once for each adapter, "
            "with model.set_adapter(name)"
        )
