"""A LoRA layer that samples: the class that a PEFT layer gets when a posterior is attached, and the posterior's part in it.

Outside a sampling context the layer is PEFT's own, by ``super().forward``. Inside one, a layer of a random block adds
``s U (M + sigma_k E_k) x`` for the rows of sample k. Where its base is a plain linear layer, or a quantised one that is dense for
the product, the update is written first and the base product accumulates onto it, and layers that share their input share one pass
over it; blocks below the first random one go this way too, as the mean. Any other base runs as PEFT runs it, and the update is
added to its output.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import SamplingError
from ..posterior.canonical import LayerPosterior
from .base import HALF, accumulates, classes_of, dense_kind, float_type, is_plain, matrix_of, version_of
from .products import outputs
from .samples import MEAN
from .state import SamplingState, SharedInput

# PEFT's layers are nn.Modules whose attributes carry no types, so functions here take them as Any.


class SampledLayer(nn.Module):
    """Comes before a PEFT layer's class in the class of a layer with a posterior. A copy of the layer is a plain one.

    Attributes:
        tfb_updates: by adapter, its posterior here.
        tfb_open: the one whose sampling context is open.
    """

    tfb_updates: dict[str, SampledUpdate]
    tfb_open: SampledUpdate | None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        update: SampledUpdate | None = self.__dict__.get("tfb_open")  # others may keep this method beyond the posterior
        if update is not None and not args and not kwargs:
            if update.is_shared(x):
                return update.taken(x)
            if update.writes_first(x):
                return update.written_first(x)
        if update is None or not update.is_active():
            return plain_class(self).forward(self, x, *args, **kwargs)
        if not update.is_random():
            return super().forward(x, *args, **kwargs)
        others = [name for name in self.active_adapters if name != update.adapter and name in self.lora_A]
        if not others:
            result = self.base_layer(x, *args, **kwargs)
            return update.added(x, result.clone() if self.base_layer._forward_hooks else result)
        active, self._active_adapter = self._active_adapter, others
        try:
            result = super().forward(x, *args, **kwargs)
        finally:
            self._active_adapter = active
        return update.added(x, result)

    def _get_name(self) -> str:
        return str(plain_class(self).__name__)  # in PEFT's reports the layer is what it was

    def __reduce_ex__(self, protocol: Any) -> Any:
        if any(update.state.batch is not None for update in self.tfb_updates.values()):
            raise SamplingError(
                "the model is copied or pickled inside a sampling context, whose hooks would stay on the copy. Fix: leave the with "
                "block first"
            )
        made: Any = super().__reduce_ex__(protocol)
        state = made[2]
        plain = plain_class(self)
        state = {name: _bound_to(plain, value) for name, value in state.items() if not name.startswith("tfb_")}
        hidden = {name for update in self.tfb_updates.values() for name in update.buffers}
        state["_buffers"] = {name: value for name, value in state["_buffers"].items() if name not in hidden}
        state["_non_persistent_buffers_set"] = state["_non_persistent_buffers_set"] - hidden
        return object.__new__, (plain,), state


@cache
def sampled_class(plain: Any) -> type:
    return type(f"Sampled{plain.__name__}", (SampledLayer, plain), {})


def plain_class(module: Any) -> Any:
    """A layer's class without a posterior: PEFT's own."""
    return type(module).__mro__[2] if isinstance(module, SampledLayer) else type(module)


def _bound_to(cls: type, value: Any) -> Any:
    """A bound ``forward`` of a sampled layer (accelerate keeps one) as that of another class; anything else as it is."""
    if not isinstance(value, MethodType):
        return value
    ours = value.__func__ in (SampledLayer.forward, getattr(plain_class(value.__self__), "forward", None))
    return MethodType(cls.forward, value.__self__) if ours else value  # type: ignore[attr-defined]


def _become(module: Any, cls: type) -> None:
    module.__class__ = cls
    module.__dict__.update({name: _bound_to(cls, value) for name, value in module.__dict__.items()})


def updates_of(module: Any) -> dict[str, SampledUpdate]:
    """By adapter, the posteriors that a LoRA layer carries."""
    return getattr(module, "tfb_updates", {})


class SampledUpdate:
    """One adapter's posterior in one layer.

    Attributes:
        module: the LoRA layer.
        name, layer: as in the posterior.
        block: index of the transformer block that holds the layer.
        group: the updates that were seen to read one input one after the other (q, k and v; gate and up).
        owner: gives the Bayesian adapter, or ``None`` once that is gone.
        is_alone: whether the call in progress adds this update alone to a plain base product, by :meth:`look`.
    """

    def __init__(self, module: Any, adapter: str, block: int, state: SamplingState, posterior: LayerPosterior) -> None:
        self.module, self.adapter, self.block, self.state = module, adapter, block, state
        self.name, self.layer = posterior.name, posterior.layer
        self.full_rank = posterior.family == "full-rank"
        self.buffers = (f"tfb_basis_{adapter}", f"tfb_mean_{adapter}")
        self.group: list[SampledUpdate] = [self]
        self.values: tuple[Tensor, ...] = ()  # the buffers as they were written
        self.owner: Callable[[], Any] = _nobody
        self.is_alone = False
        self.rounded: tuple[Tensor, Tensor] | None = None  # the basis, and its like in another type

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps the buffers, which the copied layer does not have."""
        kept = tuple(self.module._buffers[name] for name in self.buffers) if self.is_attached() else ()
        return {**self.__dict__, "owner": _nobody, "values": kept, "kind": None, "rounded": None}

    def attach(self, posterior: LayerPosterior, owner: Any) -> None:
        """Put the posterior beside the adapter's weights, in buffers that no checkpoint holds, and let the layer sample."""
        module = self.module
        if not isinstance(module, SampledLayer):
            plain: Any = type(module)
            _become(module, sampled_class(plain))
            module.tfb_updates, module.tfb_open = {}, None
        self.owner = weakref.ref(owner)
        module.tfb_updates[self.adapter] = self
        if self.values:  # of a copy
            self._look_at_base()
            self._keep(*self.values)
        else:
            self.write(posterior)

    def write(self, posterior: LayerPosterior) -> None:
        module = self.module
        device = module.lora_A[self.adapter].weight.device
        if device.type == "meta":  # offloaded: the buffers stay where the layer is brought to
            hook = module.lora_A[self.adapter].__dict__.get("_hf_hook")
            found = [module._buffers[name].device for name in self.buffers if name in module._buffers]
            brought = getattr(hook, "execution_device", None)
            device = torch.device(brought if brought is not None else (found or ["cpu"])[0])
        # The products round the basis to the output's type, so it is kept in that. M + sigma E is rounded once, as a sum.
        self._look_at_base()
        basis = posterior.basis.to(device, self.base_type if self.base_type in HALF else torch.float32)
        self._keep(basis, posterior.mean.to(device))

    def _look_at_base(self) -> None:
        self.base_type, self.kind = float_type(self.module), dense_kind(self.module)
        self.base_classes = classes_of(self.module._modules["base_layer"])

    def _keep(self, *values: Tensor) -> None:
        self.values = values
        for name, value in zip(self.buffers, values, strict=True):
            self.module.register_buffer(name, value, persistent=False)

    def restore_types(self, posterior: LayerPosterior) -> None:
        """Make the buffers anew where the model was moved or converted (``model.to(dtype)``), which may have rounded them."""
        found = [self.module._buffers[name] for name in self.buffers]
        same = all(now is then for now, then in zip(found, self.values, strict=True))
        same = same and float_type(self.module) == self.base_type
        same = same and classes_of(self.module._modules["base_layer"]) == self.base_classes
        if not any(value.is_meta for value in found) and not same:
            self.write(posterior)

    def is_attached(self) -> bool:
        return updates_of(self.module).get(self.adapter) is self

    def detach(self) -> None:
        module = self.module
        if not self.is_attached():
            return
        hook = module.__dict__.get("_hf_hook")  # accelerate's, which puts back what it found
        for name in self.buffers:
            delattr(module, name)
            for each in (hook, *getattr(hook, "hooks", ())):
                getattr(each, "original_devices", {}).pop(name, None)
        self.values = ()
        del module.tfb_updates[self.adapter]
        if not module.tfb_updates:
            del module.tfb_updates, module.tfb_open
            _become(module, plain_class(module))

    # In a context -------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """At a call's beginning, once it is known that this adapter alone is on: look at what the call does not change."""
        modules = self.module._modules
        bias = modules["lora_B"]._modules[self.adapter]._parameters.get("bias")
        self.is_alone = bias is None and is_plain(
            modules["base_layer"], self.base_classes[0] if self.kind else nn.Linear
        )

    def is_active(self) -> bool:
        module = self.module
        active = module._active_adapter
        active = (active,) if isinstance(active, str) else active
        return (
            self.state.batch is not None
            and self.adapter in active
            and not module._disable_adapters
            and not module.merged_adapters
        )

    def is_random(self) -> bool:
        """Whether this layer is random now; one that comes before the fan is noted as missed and is the mean."""
        if self.block < self.state.first:
            return False
        if not self.state.fanned:
            self.state.missed.append(self.name)
        return self.state.fanned

    def is_shared(self, x: Tensor) -> bool:
        """Whether the layer before read ``x`` for this one too, which was asked then whether it can follow."""
        shared = self.state.shared
        return shared is not None and shared.x is x and self.name in shared.outputs and shared.version == version_of(x)

    def multiplies_plainly(self, x: Tensor) -> bool:
        """Whether the base layer's output of ``x`` is one product with a plain weight, whatever a call's beginning found."""
        base = self.module._modules["base_layer"]
        return is_plain(base) and accumulates(base, x)

    def writes_first(self, x: Tensor) -> bool:
        """Whether the update is written before the base product: the adapter alone is on, and the base accumulates."""
        state = self.state
        return (
            self.is_alone
            and state.looked
            and (self.block < state.first or (state.fanned and not self.full_rank))
            and accumulates(self.module._modules["base_layer"], x, self.kind)
        )

    def written_first(self, x: Tensor) -> Tensor:
        """The layer's output (..., m) of ``x`` (..., n), by the update, onto which the base product accumulates."""
        self.state.shared = self._share(x, version_of(x))
        return self.taken(x)

    def taken(self, x: Tensor) -> Tensor:
        """The same where ``x`` was read for this layer too."""
        state, shared = self.state, self.state.shared
        assert shared is not None
        if state.seen is not None:
            state.asked.add(self.name)
        y = shared.outputs.pop(self.name)
        if not shared.outputs:
            state.shared = None
        return y

    def _share(self, x: Tensor, version: int) -> SharedInput:
        """Read ``x`` once for this layer and those of its group that can follow."""
        state = self.state
        if len(self.group) == 1:
            self._join(x, version)
        together = [self, *(u for u in self.group if u is not self and u.writes_first(x))]
        batch, items = MEAN, None
        if self.block >= state.first:
            assert state.batch is not None
            batch, items = state.batch, state.items
            for update in together if state.seen is not None else (self,):
                state.check_rows(update.name, x)
        recording = state.recording.get(self) if state.recording else None  # of every call: no dictionary made for it
        places = items[1:] if items is not None else ()
        found = recording.group(x, together) if recording else outputs(together, x, batch, *places)
        return SharedInput(x, version, dict(zip((u.name for u in together), found, strict=True)))

    def basis_in(self, dtype: torch.dtype) -> Tensor:
        """The basis; of a quantised base, whose outputs have their inputs' type, in that type of half precision."""
        basis: Tensor = self.module._buffers[self.buffers[0]]
        if self.base_type is not None or dtype not in HALF or basis.dtype == dtype:
            return basis
        if self.rounded is None or self.rounded[0] is not basis or self.rounded[1].dtype != dtype:
            found = basis.to(dtype)
            if torch.compiler.is_compiling() or (found.is_cuda and torch.cuda.is_current_stream_capturing()):
                return found
            self.rounded = basis, found
        return self.rounded[1]

    def _join(self, x: Tensor, version: int) -> None:
        """Learn that this layer reads what the layer before it read, so that the next forward reads it once for both."""
        if torch.compiler.is_compiling() or x.is_inference():  # whose writes do not count
            return
        last = self.state.last
        if last is not None and last[1]() is x and last[2] == version:
            group = last[0].group
            if last[0].block == self.block and self not in group:
                group.append(self)
                self.group = group
        self.state.last = (self, weakref.ref(x), version)

    def added(self, x: Tensor, result: Tensor, columns: Tensor | None = None) -> Tensor:
        """``result + s U (M + sigma_k E_k) x`` for rows in the state's groups; ``columns`` picks output features.

        The family ``"full-rank"`` adds ``s U M x`` and then ``s sigma_k |x| e``, see :mod:`tfb_ext.research.families`.
        """
        batch, module = self.state.batch, self.module
        assert batch is not None
        self.state.check_rows(self.name, x)
        if self.state.seen is not None:
            self.state.asked.add(self.name)
        sigma, samples, seed = batch.tensors(x.device)
        scaling = module.scaling[self.adapter]  # the layer's own: PEFT's rescaling helpers change it
        basis, mean = self.basis_in(result.dtype), getattr(module, self.buffers[1])
        features = basis.shape[0]
        bias = module.lora_B[self.adapter].bias
        if columns is not None:
            basis = basis.index_select(0, columns)
            bias = None if bias is None else bias.index_select(0, columns)
        rows = matrix_of(x).to(result.dtype)
        drawn = (*(MEAN if self.full_rank else batch).tensors(x.device), self.layer)
        places = () if self.state.items is None else self.state.items[1:]
        z = ops.shrink(rows, mean, *drawn, "weight" if self.full_rank else batch.mode, batch.antithetic, *places)
        y = result.reshape(-1, result.shape[-1])
        ops.expand_(y, z, basis if basis.dtype == z.dtype else basis.float(), scaling)
        if self.full_rank:
            from ..research.families import add_full_rank_noise_

            add_full_rank_noise_(
                y, rows, features, scaling, sigma, samples, seed, self.layer, batch.antithetic, columns
            )
        if bias is not None:
            y += (bias * scaling).to(y.dtype)
        return y.view(result.shape)


def _nobody() -> None:
    """The owner of a posterior whose adapter is gone."""
