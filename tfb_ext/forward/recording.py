"""The mean adapter's forward by the kernels, with a graph from the first random layer on, and its layers' calls, for derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import BayesianAdapter
from ..adapters.base import base_kind, has_derivative
from ..adapters.layer import SampledUpdate
from ..adapters.products import outputs, weight_of
from ..adapters.samples import MEAN
from ..errors import SamplingError
from .contexts import exclusive


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        update: the layer's posterior.
        x: its input.
        at: its output, where its derivatives are taken; ``None`` where its own derivative notes them.
        gradient: of the output in question at the layer's output d, ``U^T d`` (..., r); ``d`` of the family ``"full-rank"``.
    """

    update: SampledUpdate
    x: Tensor
    at: Tensor | None = None
    gradient: Tensor | None = None


class Recording:
    """The calls of random layers in one call of the model, in their order.

    ``tried``: kinds of base layers that are known to have derivatives.
    """

    def __init__(self, tried: set[str]) -> None:
        self.tried = tried
        self.calls: list[Call] = []
        self._own: set[SampledUpdate] = set()  # that came by their own derivative, up to their modules' hooks
        self._anchor: Tensor | None = None

    def group(self, x: Tensor, updates: Sequence[SampledUpdate]) -> Sequence[Tensor]:
        """Outputs (..., m) of layers that read ``x`` (..., n), with a derivative of their own."""
        if self._anchor is None:  # so that the first layers, whose input has no graph, are in it
            self._anchor = torch.zeros((), device=x.device, requires_grad=True)
        own = x.detach()
        calls = [Call(update, own) for update in updates]
        self.calls += calls
        self._own.update(updates)
        outputs: Sequence[Tensor] = _Layers.apply(x, self._anchor, calls)
        return outputs

    def keep(self, update: SampledUpdate, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Note the call of a layer that ran as PEFT runs it; what the model goes on with is a copy, so that nothing is written into
        what is noted."""
        if update in self._own:
            self._own.discard(update)
            return output
        self._try(module, args[0])
        output = output if output.requires_grad else output.detach().requires_grad_()
        self.calls.append(Call(update, args[0].detach(), output))
        return output.clone()

    def _try(self, module: Any, x: Tensor) -> None:
        kind = base_kind(module)
        if kind in self.tried or not x.numel():
            return
        if kind != "float" and not has_derivative(module.get_base_layer(), x):
            raise SamplingError(
                f"by='linear' on base weights {kind!r}, expected ones whose product has derivatives: this one's stop at a rounding, or are "
                "not computed. Fix: by='samples', or a base whose weights alone are quantised"
            )
        self.tried.add(kind)

    def gradients(self, total: Tensor) -> list[Tensor]:
        """Of every call, the gradient of ``total`` () as :class:`Call` has it; the graph stays."""
        others = [call for call in self.calls if call.at is not None]
        for call in self.calls:
            call.gradient = None
        at = [*([] if self._anchor is None else [self._anchor]), *(call.at for call in others)]
        parts = torch.autograd.grad(total, at, retain_graph=True, allow_unused=True)  # type: ignore[arg-type]
        for call, part in zip(others, parts[len(parts) - len(others) :], strict=True):
            if part is not None:
                call.gradient = part.float() if call.update.full_rank else part.float() @ _posterior(call)[0].float()
        return [_zero(call) if call.gradient is None else call.gradient for call in self.calls]


def _posterior(call: Call) -> tuple[Any, Any]:
    """Basis and mean."""
    basis, mean = (call.update.module._buffers[name] for name in call.update.buffers)
    return basis, mean


def _zero(call: Call) -> Tensor:
    width = _posterior(call)[0].shape[0 if call.update.full_rank else 1]
    return call.x.new_zeros(*call.x.shape[:-1], width, dtype=torch.float32)


class _Layers(torch.autograd.Function):
    """The outputs of layers that read one input, under the mean adapter, by the kernels.

    Of outputs ``W x + s U M x + b`` with gradients d, that of x is ``W^T d + s M^T (U^T d)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, calls: list[Call]) -> tuple[Tensor, ...]:
        found = tuple(outputs([call.update for call in calls], x, MEAN))
        ctx.layers = [(call, *(part.to(x.dtype) for part in _posterior(call))) for call in calls]
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        total: Tensor | None = None
        for (call, basis, mean), given in zip(ctx.layers, gradients, strict=True):
            d = given.flatten(0, -2)
            part = d @ basis
            call.gradient = given if call.update.full_rank else part.view(*given.shape[:-1], -1)
            if ctx.needs_input_grad[0]:
                weight = weight_of(call.update, d.dtype)  # a quantised one is dense for this product alone
                total = d @ weight if total is None else total.addmm_(d, weight)
                total.addmm_(part, mean, alpha=call.update.module.scaling[call.update.adapter])
        return None if total is None else total.view(*gradients[0].shape[:-1], -1), None, None


@contextmanager
def by_kernels(adapter: BayesianAdapter) -> Iterator[None]:
    """Inside, calls of the model are the mean adapter's, by the kernels wherever its layers are on plain bases."""
    attached, everything = adapter.attached, len(adapter.anatomy.blocks) + 1
    with exclusive(attached), attached.state.one_call(), attached.state.serving(MEAN, everything, None):
        attached.check_call()
        yield


@contextmanager
def recording(adapter: BayesianAdapter, updates: Sequence[SampledUpdate]) -> Iterator[Recording]:
    """Inside :func:`by_kernels`, gradients are on from the first of these layers that a call of the model reaches."""
    state = adapter.attached.state
    found = Recording(state.derived)
    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        for update in updates:
            undo.callback(update.module.register_forward_pre_hook(_gradients_on).remove)
            undo.callback(update.module.register_forward_hook(partial(found.keep, update)).remove)
        undo.callback(setattr, state, "recording", None)
        state.recording = {update: found for update in updates}
        yield found


def _gradients_on(module: nn.Module, args: tuple[Any, ...]) -> None:
    torch.set_grad_enabled(True)
