"""Whether a posterior is still that of the adapter it was made from: the layers in the model, their weights, their switches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SamplingError

MOST_ELEMENTS = 2**24  # of the copy that checksums are made from: 64 MiB


class Attachment:
    """What a posterior was made from, to notice when it is no longer so.

    Args:
        model: the transformers model inside PEFT's wrapper.
        name: the adapter's name.
        modules: its LoRA layers by their name in ``model``.
    """

    def __init__(self, model: nn.Module, name: str, modules: Mapping[str, Any]) -> None:
        self.model, self.name, self.modules = model, name, modules
        self._weights: dict[tuple[int, torch.device], Tensor] = {}
        self._noted = self._sums()

    def note(self) -> None:
        """Take the weights as they are now for those that the posterior is of."""
        self._noted = self._sums()

    def check(self, holds: Mapping[str, object]) -> None:
        """Raise unless the model still has these layers, with this posterior and the weights that it was made from.

        Args:
            holds: what each layer's slot must hold for the adapter.

        Raises:
            SamplingError: the message names the first layer that differs and what to call.
        """
        again = "call tfb_ext.bayesianize(model) again"
        module: Any  # a LoRA layer, whose attributes carry no types
        for name, module in self.modules.items():
            try:
                present: Any = self.model.get_submodule(name)
            except AttributeError:
                present = None
            if present is not module:
                what = "gone" if present is None else f"a {type(present).__name__} now"
                raise SamplingError(
                    f"layer {name!r} of the posterior is {what}, expected the LoRA layer that it was made from (unloaded, merged "
                    f"or replaced?). Fix: load the adapter again and {again}"
                )
            if self.name not in module.lora_A:
                raise SamplingError(
                    f"adapter {self.name!r} has no weights in layer {name!r} (deleted?), expected those that the posterior was made "
                    f"from. Fix: load the adapter again and {again}"
                )
            if module.lora_variant.get(self.name) is not holds[name]:
                raise SamplingError(
                    f"layer {name!r} holds no posterior of this object any more (loaded or Bayesianised anew?), expected its own. "
                    f"Fix: {again}"
                )
        changed = self._first_changed()
        if changed is not None:
            raise SamplingError(
                f"the weights of adapter {self.name!r} are not those that its posterior was made from (first difference in layer "
                f"{changed!r}). Fix: adapter.refresh(), then search sigma again"
            )

    def check_switches(self) -> None:
        """Raise unless every layer would use this adapter in a call now (or none would, with adapters switched off)."""
        off: set[bool] = set()
        for name, module in self.modules.items():
            state = module.__dict__
            if state["merged_adapters"]:
                raise SamplingError(
                    f"layer {name!r} has adapters {state['merged_adapters']} merged into its weight, expected none. Fix: call "
                    "unmerge_adapter()"
                )
            disabled = state["_disable_adapters"]
            off.add(disabled)
            active = state["_active_adapter"]
            if not disabled and self.name not in ([active] if isinstance(active, str) else active):
                raise SamplingError(
                    f"adapter {self.name!r} is not active (active: {list(module.active_adapters)}) in layer {name!r}, expected it "
                    f"in every layer. Fix: call model.set_adapter({self.name!r})"
                )
        if len(off) > 1:
            raise SamplingError(
                f"adapter {self.name!r} is switched off in some of its layers, expected all or none. Fix: call "
                "model.enable_adapter_layers()"
            )

    def _sums(self) -> dict[str, Tensor]:
        """(4,) checksums of each layer's A and B on the CPU; of weights that are offloaded NaN, which compares with nothing."""
        alike: dict[object, list[tuple[str, int, Tensor]]] = {}
        for name, module in self.modules.items():
            for place, part in enumerate((module.lora_A, module.lora_B)):
                weight = part[self.name].weight.detach()
                alike.setdefault((weight.shape, weight.dtype, weight.device), []).append((name, 2 * place, weight))
        found = {name: torch.full((4,), math.nan) for name in self.modules}
        with torch.no_grad():
            for group in alike.values():
                weight = group[0][2]
                if weight.is_meta:
                    continue
                # Weights of one shape go through one product, as far as their copy stays small.
                step = max(1, MOST_ELEMENTS // max(weight.numel(), 1))
                for some in (group[i : i + step] for i in range(0, len(group), step)):
                    with torch.autocast(weight.device.type, enabled=False):
                        sums = self._sum(torch.stack([w for _, _, w in some]).float()).cpu()
                    for (name, place, _), pair in zip(some, sums, strict=True):
                        found[name][place : place + 2] = pair
        return found

    def _sum(self, weights: Tensor) -> Tensor:
        """(L, 2) of L matrices W: ``u^T W v`` with fixed random u and v, which moves with any entry's value and place, and the norm."""
        rows, columns = (self._weights_of(size, weights.device) for size in weights.shape[1:])
        return torch.stack([(weights @ columns) @ rows, torch.linalg.vector_norm(weights, dim=(1, 2))], dim=1)

    def _weights_of(self, size: int, device: torch.device) -> Tensor:
        key = (size, device)
        if key not in self._weights:
            self._weights[key] = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device)
        return self._weights[key]

    def _first_changed(self) -> str | None:
        """The first layer whose weights are others now. Moved to another device they are the same."""
        for name, sums in self._sums().items():
            before = self._noted[name]
            # Another order of summation differs by some units in the last place of the norm.
            slack = 16 * torch.finfo(torch.float32).eps * before[[1, 1, 3, 3]]
            if bool(((sums - before).abs() > slack).any()):
                return name
        return None
