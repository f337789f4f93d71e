"""Products by kind of base layer: which PEFT layers and base layers are served, and how the base multiplies."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

# PEFT's layer classes whose forward is: the base layer's output, plus every active adapter's update. By exact class, since
# a subclass may compute something else.
SUPPORTED: tuple[type[LoraLayer], ...] = (LoraLinear,)


def float_type(layer: Any) -> torch.dtype:
    """Type of a LoRA layer's base weight; torch's dynamically quantised layers have none, and compute in float32."""
    dtype: torch.dtype = getattr(layer.get_base_layer().weight, "dtype", torch.float32)
    return dtype


def is_plain(base: nn.Module) -> bool:
    """Whether ``base(x)`` is one product with a plain weight, so that it can be added onto an update written before it.

    Besides, ``x`` must be of the weight's type, and not under autocast: :func:`accumulates`.
    """
    # Straight from the dictionaries: nn.Module's attribute access would be a third of a layer's cost.
    return (
        type(base) is nn.Linear
        # Hooks see the base layer's own output; an own forward is accelerate's, which brings the weights in.
        and not base._forward_hooks
        and not base._forward_pre_hooks
        and "forward" not in base.__dict__
    )


def accumulates(base: nn.Module, x: Tensor) -> bool:
    """Whether a base layer that :func:`is_plain` can multiply ``x`` as it is."""
    weight = base._parameters.get("weight")
    return (
        type(weight) is nn.Parameter
        and x.dtype == weight.dtype
        and x.device == weight.device
        and not torch.is_autocast_enabled(x.device.type)
    )


def linear_columns(linear: Any, x: Tensor, columns: Tensor) -> Tensor:
    """Output features ``columns`` of a plain linear layer: ``x`` (..., n) -> (..., len(columns))."""
    bias = None if linear.bias is None else linear.bias.index_select(0, columns)
    return nn.functional.linear(x, linear.weight.index_select(0, columns), bias)
