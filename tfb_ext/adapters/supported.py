"""Which layers can carry a posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from .base import SERVED, full_name
from .layer import SampledLayer, plain_class, updates_of
from .state import SamplingState


def check_layer(name: str, module: Any, adapter: str, own: SamplingState | None = None) -> None:
    """Refuse a layer that cannot carry a posterior, naming it, the reason and the way out; changes nothing.

    ``own``: the state of a posterior that the layer may carry already.
    """

    def refuse(reason: str, way_out: str) -> None:
        raise UnsupportedModelError(f"layer {name!r} ({plain_class(module).__name__}): {reason}; {way_out}")

    update = updates_of(module).get(adapter)
    if update is not None and update.state is not own and update.owner() is not None:
        refuse(f"adapter {adapter!r} is Bayesian already", "call unload() on its BayesianAdapter first")
    variant = module.lora_variant.get(adapter)
    if variant is not None:
        refuse(
            f"adapter {adapter!r} uses PEFT's {type(variant).__name__}, whose update is not B A x",
            "only plain LoRA (with rsLoRA, rank patterns, lora_bias, PiSSA, OLoRA, LoftQ) has a TFB posterior",
        )
    if full_name(plain_class(module)) not in SERVED:
        refuse(
            "this kind of LoRA layer is not supported",
            f"supported: {', '.join(SERVED)}; train the adapter without this module in target_modules",
        )
    # accelerate's hooks keep the bound method that they call, which becomes ours; other wrappers keep it where nobody finds it.
    own = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    known = isinstance(module, SampledLayer) or getattr(own, "__func__", None) is plain_class(module).forward
    if own is not None and not known:
        refuse("its forward was replaced, and would not sample", "call tfb_ext.bayesianize before replacing it")
    if module.merged:
        refuse(f"adapters {module.merged_adapters} are merged into the weights", "call unmerge_adapter() first")
    weight = getattr(module.get_base_layer(), "weight", None)
    if isinstance(weight, Tensor) and weight.dtype == torch.float64:
        refuse("its weight is float64, expected float32, bfloat16 or float16", "convert the model: model.float()")
    for part in (module.lora_A[adapter], module.lora_B[adapter]):
        if not isinstance(part.weight, Tensor):
            refuse(f"its adapter is a {type(part).__name__} without a weight tensor", "quantise the base model alone")
        if type(part.weight).__name__ == "DTensor":
            refuse("its adapter weight is a DTensor shard", "gather the adapter's weights first")
