"""The posteriors in a model's layers, and whether they are still those of the adapter that they were made from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..errors import SamplingError, UnsupportedModelError
from ..forward.anatomy import Anatomy
from ..posterior.canonical import LayerPosterior, canonical_name, layer_posterior
from .layer import SampledUpdate
from .state import SamplingState
from .supported import check_layer

MOST_ELEMENTS = 2**24  # of the copy that checksums are made from: 64 MiB


class Attached:
    """One adapter's posteriors in the layers of a model: what sampling contexts work on.

    Attributes:
        peft_model: the PEFT model, and ``anatomy.model`` the transformers model in it.
        name: the adapter's name.
        family: variance family.
        modules: the LoRA layers by their name in the transformers model.
        posteriors, updates: of each layer, in their order.
        state: what the layers share while a context is open.
    """

    def __init__(
        self, peft_model: PeftModel, name: str, anatomy: Anatomy, modules: dict[str, Any], family: str, owner: Any
    ) -> None:
        self.peft_model, self.name, self.anatomy, self.family, self.modules = (
            peft_model,
            name,
            anatomy,
            family,
            modules,
        )
        self.state = SamplingState()
        self.posteriors = self._posteriors()
        self.updates = [
            SampledUpdate(module, name, _block_of(anatomy, p.name), self.state, p)
            for module, p in zip(modules.values(), self.posteriors, strict=True)
        ]
        self.is_attached = True
        self._weights: dict[tuple[int, torch.device], Tensor] = {}
        self.attach(owner)
        # Where each layer hangs, as the dictionaries that change with it: every call looks at them.
        paths = {module: path for path, module in anatomy.model.named_modules()}
        self._places, edges = [], {}
        for update in self.updates:
            part: Any = anatomy.model
            for own in paths[update.module].split("."):
                beside, part = part._modules, part._modules[own]
                edges[id(beside), own] = (beside, own, part)
            self._places.append((update, update.module, beside, own))
        self._edges = list(edges.values())  # all that lies between the model and its layers
        self.note()

    def _posteriors(self) -> tuple[LayerPosterior, ...]:
        found = self.modules.items()
        return tuple(
            layer_posterior(
                n, m.lora_A[self.name].weight, m.lora_B[self.name].weight, m.scaling[self.name], self.family
            )
            for n, m in found
        )

    def attach(self, owner: Any) -> None:
        """Let the layers sample for ``owner``, the Bayesian adapter, where they do not yet."""
        for update, posterior in zip(self.updates, self.posteriors, strict=True):
            if not update.is_attached():
                update.attach(posterior, owner)

    def scalings(self) -> tuple[float, ...]:
        """LoRA's scaling of each layer; NaN where the adapter is gone."""
        return tuple(m.scaling.get(self.name, math.nan) for m in self.modules.values())

    def detach(self) -> None:
        for update in self.updates:
            update.detach()
        self.is_attached = False

    def refresh(self) -> None:
        """Make the posteriors of the weights as they are now; the old ones stay where these cannot carry any."""
        for name, module in self.modules.items():
            if self.name not in module.lora_A:
                raise UnsupportedModelError(
                    f"layer {name!r} has no weights of adapter {self.name!r} any more. Fix: load it and call tfb_ext.bayesianize again"
                )
            check_layer(name, module, self.name, own=self.state)
        self.posteriors = self._posteriors()
        for update, posterior in zip(self.updates, self.posteriors, strict=True):
            update.write(posterior)
        self.note()
        self.state.renew()

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers that were seen to read one input together (q, k and v; gate and up), after a forward in a context."""
        groups = (tuple(member.name for member in u.group) for u in self.updates if len(u.group) > 1)
        return tuple(dict.fromkeys(groups))

    @property
    def is_on(self) -> bool:
        """Whether the model computes with adapters at all: not inside PEFT's ``disable_adapter``."""
        return not any(m.disable_adapters for m in self.modules.values())

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, the layers ask this adapter's state what to sample."""
        self.check_present()
        try:
            for update in self.updates:
                vars(update.module)["tfb_open"] = update  # nn.Module's own way would take a millisecond of a model
            yield
        finally:
            for update in self.updates:
                if update.is_attached():
                    vars(update.module)["tfb_open"] = None

    # Checks -------------------------------------------------------------------------------------------------------------

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
        self.check_present()
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

    def check_present(self) -> None:
        """Raise unless the layers are in the model, with this posterior."""
        if not self.is_attached:
            raise SamplingError(f"adapter {self.name!r} was unloaded; call tfb_ext.bayesianize again")
        whole = all(beside.get(own) is part for beside, own, part in self._edges)
        if not whole or not all(u.is_attached() and self._is_plain(u.module) for u in self.updates):
            self._check_layers()

    def _is_plain(self, module: Any) -> bool:
        state = vars(module)
        return self.name in state["_modules"]["lora_A"]._modules and self.name not in state["lora_variant"]

    def _check_layers(self) -> None:
        """Raise for the first layer that is not as it was."""
        again = "call tfb_ext.bayesianize(model) again"
        module: Any  # a LoRA layer, whose attributes carry no types
        present = {canonical_name(n): m for n, m in self.anatomy.model.named_modules()}
        for update, (name, module) in zip(self.updates, self.modules.items(), strict=True):
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
            if not update.is_attached() or self.name in module.lora_variant:
                raise SamplingError(
                    f"layer {name!r} holds no posterior of this object any more (loaded or Bayesianised anew?), expected its own. "
                    f"Fix: {again}"
                )

    def check_switches(self) -> None:
        """Raise unless every layer would use this adapter in a call now (or none would, with adapters switched off); they look at
        the rest of what a call does not change."""
        wanted, off = [self.name], 0
        for update, module, beside, own in self._places:
            state = module.__dict__  # at every call: nn.Module's attribute access would cost several times as much
            here = beside.get(own) is module and state.get("tfb_updates", {}).get(self.name) is update
            if not here or self.name in state["lora_variant"]:
                self.check()
            active = state["_active_adapter"]
            disabled = state["_disable_adapters"]
            if active == wanted and not disabled and not state["merged_adapters"]:
                update.look()
                continue
            update.is_alone = False
            off += disabled
            if state["merged_adapters"]:
                raise SamplingError(
                    f"layer {update.name!r} has adapters {state['merged_adapters']} merged into its weight, expected none. Fix: call "
                    "unmerge_adapter()"
                )
            active = [active] if isinstance(active, str) else list(active)
            if not disabled and self.name not in active:
                raise SamplingError(
                    f"adapter {self.name!r} is not active (active: {active}) in layer {update.name!r}, expected it in every layer. Fix: call "
                    f"model.set_adapter({self.name!r})"
                )
        if off not in (0, len(self.modules)):
            raise SamplingError(
                f"adapter {self.name!r} is switched off in some of its layers, expected all or none. Fix: call "
                "model.enable_adapter_layers()"
            )
        self.state.looked = True

    def check_modes(self) -> None:
        """Raise where no call would sample whatever its layers: what a replayed graph needs."""
        if torch.is_grad_enabled():
            raise SamplingError(
                "gradients are on inside a sampling context; samples are not differentiable, drop torch.enable_grad()"
            )
        if self.anatomy.model.training:
            raise SamplingError("the model is in training mode, so dropout would add its own noise; call model.eval()")

    def check_call(self) -> None:
        """Raise a :class:`~tfb_ext.errors.SamplingError` if a model call now would not sample: what every call begins with."""
        self.check_modes()
        self.check_switches()

    def check_ready(self) -> None:
        """Raise where a context may not open: other weights, or a part of the model in training mode by itself."""
        self.check()
        for update, posterior in zip(self.updates, self.posteriors, strict=True):
            update.restore_types(posterior)
        model = self.anatomy.model
        if model.training or not any(part.training for part in _parts(model)):  # a call says it of the whole model
            return
        for name, part in model.named_modules():
            if part.training and _drops(part, name, self.peft_model.active_adapters):
                raise SamplingError(
                    f"{name!r} is in training mode, so its dropout would add its own noise, expected evaluation mode. Fix: call "
                    "model.eval()"
                )

    # Checksums ----------------------------------------------------------------------------------------------------------

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


def _block_of(anatomy: Anatomy, name: str) -> int:
    block = anatomy.block_of(name)
    if block is None:
        raise UnsupportedModelError(
            f"layer {name!r} embeds tokens before the first block, where samples still share their rows; train the adapter "
            "without it in target_modules"
        )
    return block


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, some perhaps twice; a fraction of the time that ``modules()`` takes."""
    left: list[nn.Module | None] = [model]
    while left:
        part = left.pop()
        if part is not None:
            yield part
            left += part._modules.values()


def _drops(part: nn.Module, name: str, active: Sequence[str]) -> bool:
    """Whether a module in training mode drops activations: by itself, or by a rate that it gives to a function."""
    *above, own = name.split(".")
    if above[-1:] == ["lora_dropout"] and own not in active:
        return False
    rates = [v for n, v in vars(part).items() if n == "p" or "drop" in n]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
