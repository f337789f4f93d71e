"""Whether a posterior is still that of the adapter it was made from: the layers in the model, their weights, their switches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SamplingError
from ..posterior.canonical import canonical_name

MOST_ELEMENTS = 2**24  # of the copy that checksums are made from: 64 MiB


class Attachment:
    """What a posterior was made from, to notice when it is no longer so.

    Args:
        model: the transformers model inside PEFT's wrapper.
        name: the adapter's name.
        modules: its LoRA layers by their name in ``model``.
        holds: what each layer's slot must hold for the adapter, by the same names.
    """

    def __init__(self, model: nn.Module, name: str, modules: Mapping[str, Any], holds: Mapping[str, object]) -> None:
        self.model, self.name, self.modules, self.holds = model, name, modules, holds
        paths = {module: path for path, module in model.named_modules()}
        # Where each layer hangs and what is in its slots, as the dictionaries that change with them: a call looks at them.
        self._places, edges = [], {}
        for name, module in modules.items():
            part: Any = model
            for own in paths[module].split("."):
                beside, part = part._modules, part._modules[own]
                edges[id(beside), own] = (beside, own, part)
            self._places.append((name, module, beside, own, module.lora_variant, holds[name]))
        self._edges = list(edges.values())  # all that lies between the model and its layers
        self._weights: dict[tuple[int, torch.device], Tensor] = {}
        self.note()

    def note(self) -> None:
        """Take the weights as they are now for those that the posterior is of."""
        self._noted = self._sums()
        self._types = [t.dtype for module in self.modules.values() for t in adapter_tensors(module, self.name)]

    def check(self, converted: bool = False) -> None:
        """Raise unless the model still has these layers, with this posterior and the weights that it was made from.

        Args:
            converted: let weights of another type pass, which are rounded: those of a model that was converted inside a context.

        Raises:
            SamplingError: the message names the first layer that differs and what to call.
        """
        whole = all(beside.get(own) is part for beside, own, part in self._edges)
        if not whole or not all(
            self.name in m.lora_A and slots.get(self.name) is h for _, m, _, _, slots, h in self._places
        ):
            self._check_layers()
        weights = [t for module in self.modules.values() for t in adapter_tensors(module, self.name)]
        if not all(isinstance(t, Tensor) for t in weights):
            self._check_layers()
        types = [t.dtype for t in weights]
        changed = None if converted and types != self._types else self._first_changed()
        if changed is not None:
            raise SamplingError(
                f"the weights of adapter {self.name!r} are not those that its posterior was made from (first difference in layer "
                f"{changed!r}). Fix: adapter.refresh(), then search sigma again"
            )

    def _check_layers(self) -> None:
        """Raise for the first layer that is not as it was."""
        again = "call tfb_ext.bayesianize(model) again"
        module: Any  # a LoRA layer, whose attributes carry no types
        present = {canonical_name(n): m for n, m in self.model.named_modules()}
        for name, module in self.modules.items():
            found: Any = present.get(name)
            if found is not module:
                what = "gone" if found is None else f"a {type(found).__name__} now"
                raise SamplingError(
                    f"layer {name!r} of the posterior is {what}, expected the LoRA layer that it was made from (unloaded, merged "
                    f"or replaced?). Fix: load the adapter again and {again}"
                )
            if self.name not in module.lora_A or not isinstance(module.lora_A[self.name].weight, Tensor):
                raise SamplingError(
                    f"adapter {self.name!r} has no weights in layer {name!r} (deleted, quantised?), expected those that the posterior was made "
                    f"from. Fix: load the adapter again and {again}"
                )
            if module.lora_variant.get(self.name) is not self.holds[name]:
                raise SamplingError(
                    f"layer {name!r} holds no posterior of this object any more (loaded or Bayesianised anew?), expected its own. "
                    f"Fix: {again}"
                )

    def check_switches(self) -> None:
        """Raise unless every layer would use this adapter in a call now (or none would, with adapters switched off)."""
        wanted = [self.name]
        off = 0
        for name, module, beside, own, slots, held in self._places:
            state = module.__dict__  # at every call: nn.Module's attribute access would cost several times as much
            if beside.get(own) is not module or slots.get(wanted[0]) is not held:
                self.check()
            active = state["_active_adapter"]
            disabled = state["_disable_adapters"]
            if active == wanted and not disabled and not state["merged_adapters"]:
                continue
            off += disabled
            if state["merged_adapters"]:
                raise SamplingError(
                    f"layer {name!r} has adapters {state['merged_adapters']} merged into its weight, expected none. Fix: call "
                    "unmerge_adapter()"
                )
            active = [active] if isinstance(active, str) else list(active)
            if not disabled and self.name not in active:
                raise SamplingError(
                    f"adapter {self.name!r} is not active (active: {active}) in layer {name!r}, expected it in every layer. Fix: call "
                    f"model.set_adapter({self.name!r})"
                )
        if off not in (0, len(self.modules)):
            raise SamplingError(
                f"adapter {self.name!r} is switched off in some of its layers, expected all or none. Fix: call "
                "model.enable_adapter_layers()"
            )

    def _sums(self) -> tuple[list[str], Tensor]:
        """Checksums (N, 2) of the layers' A, B and bias on the CPU, those of one shape together, and whose they are; of weights that
        are offloaded -1, which compares with nothing."""
        alike: dict[object, list[tuple[str, Tensor]]] = {}
        for name, module in self.modules.items():
            for weight in adapter_tensors(module, self.name):
                alike.setdefault((weight.shape, weight.dtype, weight.device), []).append((name, weight))
        sums: list[Tensor] = []
        with torch.no_grad():
            for group in alike.values():
                weight = group[0][1]
                if weight.is_meta:
                    sums.append(torch.full((len(group), 2), -1.0))
                    continue
                # Weights of one shape go through one product, as far as their copy stays small.
                step = max(1, MOST_ELEMENTS // max(weight.numel(), 1))
                for some in (group[i : i + step] for i in range(0, len(group), step)):
                    with torch.autocast(weight.device.type, enabled=False):
                        sums.append(self._sum(torch.stack([w for _, w in some]).float()))
        return [name for group in alike.values() for name, _ in group], torch.cat([s.cpu() for s in sums])

    def _sum(self, weights: Tensor) -> Tensor:
        """(L, 2) of L matrices (or vectors) W: ``u^T W v`` with fixed random u and v, which moves with any entry's value and place, and the norm."""
        weights = weights if weights.dim() == 3 else weights[:, None]
        rows, columns = (self._weights_of(size, weights.device) for size in weights.shape[1:])
        return torch.stack([(weights @ columns) @ rows, torch.linalg.vector_norm(weights, dim=(1, 2))], dim=1)

    def _weights_of(self, size: int, device: torch.device) -> Tensor:
        key = (size, device)
        if key not in self._weights:
            self._weights[key] = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(device)
        return self._weights[key]

    def _first_changed(self) -> str | None:
        """A layer whose weights are others now. Moved to another device they are the same."""
        names, sums = self._sums()
        noted, before = self._noted
        if names != noted:  # of other shapes or types
            return next((n for n, m in zip(names, noted, strict=False) if n != m), names[0])
        # Another order of summation differs by some units in the last place of the norm.
        same = (sums - before).abs() <= 16 * torch.finfo(torch.float32).eps * before[:, 1:]  # not so for NaN
        changed = ~same.all(1) & (sums[:, 1] != -1)
        return names[int(changed.int().argmax())] if bool(changed.any()) else None


def adapter_tensors(module: Any, name: str) -> list[Tensor]:
    """A, B and, where it has one (``lora_bias``), the bias of a layer's adapter."""
    a, b = module._modules["lora_A"]._modules[name], module._modules["lora_B"]._modules[name]
    found = [a._parameters.get("weight"), b._parameters.get("weight"), b._parameters.get("bias")]
    if found[0] is None or found[1] is None:  # computed, as parametrisations do
        found = [a.weight, b.weight, b.bias]
    return [t for t in found if t is not None]
