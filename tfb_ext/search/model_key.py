"""What identifies the base model of a search, so that another model's results are never taken for its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from ..adapters.adapter import BayesianAdapter

# Of each tensor: this many values, evenly spaced, beside a sum over the bits of all of them.
SAMPLED = 1024
# Facts of a configuration that no result depends on.
_IRRELEVANT = set("_name_or_path name_or_path transformers_version use_cache dtype torch_dtype architectures".split())
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_key(adapter: BayesianAdapter) -> dict[str, str]:
    """Digests of the base model's configuration and weights, the types of these, and of other adapters that are on; without the
    adapter's A and B.

    Of each tensor count its name, shape, type, the sum of all its bits as integers and some of its values. A tensor that is
    not in memory is read where accelerate keeps it; one that is nowhere (``meta``) counts by name, shape and type.
    """
    facts = json.dumps(_facts(adapter.anatomy.model.config.to_dict()), sort_keys=True, default=str)
    digest, types = hashlib.sha256(), set()
    for name, tensor in _weights(adapter):
        _add(digest, (name,), tensor)
        types.add(str(tensor.dtype).removeprefix("torch."))
    return {
        "model": hashlib.sha256(facts.encode()).hexdigest()[:16],
        "base weights": digest.hexdigest()[:16],
        "base type": ", ".join(sorted(types)),
        "other adapters": _others(adapter),
    }


def content(tensor: Tensor) -> bytes:
    """What stands for a tensor's values, alike on every device; nothing for one without values."""
    if tensor.is_meta:
        return b""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's quantised tensors are made of several plain ones
        return b"".join(content(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    tensor = tensor.detach()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    flat = flat.view(_INTEGERS[flat.element_size()])
    spaced = flat[:: max(1, len(flat) // SAMPLED)]
    return repr((int(flat.sum(dtype=torch.int64)), spaced.tolist())).encode()


def _add(digest: Any, name: tuple[str, ...], tensor: Tensor) -> None:
    digest.update(repr((*name, tuple(tensor.shape), str(tensor.dtype))).encode() + content(tensor))


def _facts(value: Any) -> Any:
    if isinstance(value, dict):  # a model of several parts has a configuration for each
        return {str(name): _facts(v) for name, v in value.items() if name not in _IRRELEVANT}
    return value


def _others(adapter: BayesianAdapter) -> str:
    """Names and a digest of the adapters that the model computes with beside this one."""
    digest, names = hashlib.sha256(), set()
    layers: Any = ((n, m) for n, m in adapter.anatomy.model.named_modules() if isinstance(m, BaseTunerLayer))
    for place, layer in layers:
        for name in layer.active_adapters:
            parts = [(n, p) for n, p in layer.named_parameters() if name in n.split(".")]
            if name == adapter.name or not parts:
                continue
            names.add(name)
            digest.update(repr((place, name, getattr(layer, "scaling", {}).get(name))).encode())
            for part, value in parts:
                _add(digest, (part,), value)
    return f"{', '.join(sorted(names))}: {digest.hexdigest()[:16]}" if names else "none"


def _weights(adapter: BayesianAdapter) -> Iterator[tuple[str, Tensor]]:
    """The weights and kept buffers that the model computes with, by the names they have without adapters, sorted."""
    base: Any = adapter.anatomy.model
    found = {}
    for name, value in base.state_dict().items():  # quantised layers add their scales to it
        parts = name.split(".")
        replaced = {"modules_to_save", "trainable_tokens_delta", "trainable_tokens_original"} & set(parts)
        of_another = replaced and adapter.name not in parts
        if not isinstance(value, Tensor) or any(p.startswith("lora_") for p in parts) or of_another:
            continue
        if value.is_meta:
            module, _, last = name.rpartition(".")
            weights = getattr(getattr(base.get_submodule(module), "_hf_hook", None), "weights_map", None)
            value = value if weights is None or last not in weights else weights[last]
        found[name.replace(".base_layer.", ".")] = value
    return iter(sorted(found.items()))
