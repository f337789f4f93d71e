"""Attention of a call that holds prompts and the random tokens behind them: the prompt's tokens apart from the random ones.

One masked product over both would take the prompt's fused kernel away. So all tokens attend as a causal model's do, and what the
random tokens, few of them, got by that is replaced: they attend to all columns under their mask, the heads that share keys side by
side, so that no key is copied. Prompts that need a mask themselves (padding, windows), or that are shorter than what follows them,
share one masked product with it.
transformers calls it where ``config._attn_implementation`` is ``NAME``, and makes no mask of its own then.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from .. import ops
from ..errors import SamplingError
from .tail import TailCall

NAME = "tfb_tail"
CAUSAL = "tfb_causal"
# What transformers' attention functions may be asked for beside plain attention; none of it is done here.
_OTHER = ("softcap", "position_bias", "s_aux")
_SDPA = AttentionInterface()["sdpa"]
_sdpa = torch.nn.functional.scaled_dot_product_attention
_now = threading.local()


@contextmanager
def attending(config: Any, name: str, call: TailCall | None = None) -> Iterator[None]:
    """Inside, the model with this configuration attends by the function of this name; ``NAME`` is that of ``call``."""
    settings = vars(config)
    before = settings["_attn_implementation_internal"]
    settings["_attn_implementation_internal"], _now.call = name, call
    try:
        yield
    finally:
        settings["_attn_implementation_internal"], _now.call = before, None


def _beyond(module: Any, is_causal: bool | None, other: dict[str, Any]) -> str:
    """What a layer asks for beyond plain causal attention, in words; empty for nothing."""
    asked = next((name for name in _OTHER if other.get(name) is not None), None)
    if asked is not None:
        return f"attention with {asked}"
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return "" if causal else "attention that is not causal"


class NotCausalError(Exception):
    """Attention is not that of :func:`causal_attention`."""


@contextmanager
def attending_causally(model: Any, layers: int) -> Iterator[None]:
    """Inside, each of so many layers attends by :func:`causal_attention`, and no mask is made: transformers makes one, and copies keys
    for it, while a CUDA graph is captured, where it cannot look whether tokens are masked.

    Raises:
        NotCausalError: a layer that does not.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None)
    if other or config._attn_implementation != "sdpa" or getattr(config, "use_bidirectional_attention", None):
        raise NotCausalError
    with attending(config, CAUSAL):
        _now.layers = 0
        yield
        if _now.layers != layers:
            raise NotCausalError


def causal_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of whole rows without padding, or of the last token alone: query (B, H, Q, d) -> (B, Q, H, d); differentiable."""
    tokens, columns = query.shape[2], key.shape[2]
    windowed = sliding_window is not None and columns > sliding_window
    if _beyond(module, is_causal, other) or windowed or attention_mask is not None or tokens not in (1, columns):
        raise NotCausalError
    _now.layers += 1
    shared = query.shape[1] > key.shape[1]
    return _sdpa(query, key, value, is_causal=tokens > 1, scale=scaling, enable_gqa=shared).transpose(1, 2), None


def tail_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of the call in progress: query (B, H, lead + Q, d), key and value (B, H / G, C, d) -> (B, lead + Q, H, d)."""
    call: TailCall | None = getattr(_now, "call", None)
    beyond = _beyond(module, is_causal, other)
    if call is None or beyond:
        raise SamplingError(f"{type(module).__name__} has {beyond or 'no call'}, expected plain causal attention")
    lead, times = call.lead, query.shape[0] // call.order.shape[0]
    rows, heads, width = query.shape[0], query.shape[1], query.shape[3]
    tokens, shared = query.shape[2] - lead, key.shape[1]
    if lead and (tokens > lead or not call.is_causal(sliding_window)):
        columns, seen = lead + tokens, call.mask(sliding_window, times)
        out = _SDPA(module, query, key[:, :, :columns], value[:, :, :columns], seen, 0.0, scaling, is_causal=False)
        return out[0], None
    groups, scale = heads // shared, width**-0.5 if scaling is None else scaling
    if lead:
        own = key, value
        if key.shape[2] > lead + tokens:  # a cache with room for more
            own = key[:, :, : lead + tokens], value[:, :, : lead + tokens]
        out = _sdpa(query, *own, is_causal=lead > 1, scale=scale, enable_gqa=groups > 1).transpose(1, 2)
    else:
        out = query.new_empty(rows, tokens, heads, value.shape[3])
    if tokens:
        ops.attend_(out, query, key, value, call.tail_mask(sliding_window, groups, query.dtype, times), scale)
    return out, None


AttentionInterface.register(NAME, tail_attention)
AttentionInterface.register(CAUSAL, causal_attention)
