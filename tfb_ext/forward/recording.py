"""The mean adapter's forward with a graph from the first random layer on, and its layers' calls, for derivatives of the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.adapter import BayesianAdapter
from ..adapters.base import base_kind, has_derivative
from ..adapters.layer import SampledUpdate
from ..errors import SamplingError


class Call(NamedTuple):
    """One call of a layer: its input, and what the outputs' gradients are taken at: its output, or where ``direct``, ``z = M x``."""

    x: Tensor
    at: Tensor
    direct: bool


class DirectLayer:
    """Stands for a layer's posterior where its base is a plain product: in the base's type, by operators with derivatives.

    ``calls``: where to note its calls, with gradients on from the first of them; ``None`` notes nothing.
    """

    def __init__(self, update: SampledUpdate, calls: list[Call] | None) -> None:
        self.update, self.calls = update, calls
        self.took = False  # the layer's latest call

    def is_shared(self, x: Tensor) -> bool:
        return False

    def is_active(self) -> bool:
        return False

    def writes_first(self, x: Tensor) -> bool:
        self.took = self.update.is_alone and self.update.multiplies_plainly(x)
        return self.took

    def written_first(self, x: Tensor) -> Tensor:
        """The layer's output (..., m) of ``x`` (..., n)."""
        module, linear = self.update.module, nn.functional.linear
        basis, mean = (module._buffers[name].to(x.dtype) for name in self.update.buffers)
        base = module._modules["base_layer"]._parameters
        z = linear(x, mean)
        if self.calls is not None:
            torch.set_grad_enabled(True)
            zero = torch.zeros_like(z, requires_grad=True)
            self.calls.append(Call(x.detach(), zero, True))
            z = z + zero
        return linear(x, base["weight"], base["bias"]) + module.scaling[self.update.adapter] * linear(z, basis)


@contextmanager
def directly(adapter: BayesianAdapter, seen: Mapping[str, list[Call]] | None = None) -> Iterator[None]:
    """Inside, layers on plain bases run as :class:`DirectLayer`, and those that ``seen`` names note their calls there.

    The family ``"full-rank"`` adds its noise at the outputs, so its layers run as PEFT runs them.
    """
    updates = adapter.attached.updates if adapter.family != "full-rank" else ()
    try:
        for update in updates:
            vars(update.module)["tfb_open"] = DirectLayer(update, None if seen is None else seen.get(update.name))
        yield
    finally:
        for update in updates:
            vars(update.module)["tfb_open"] = None


@contextmanager
def recording(adapter: BayesianAdapter, modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Inside, gradients are on from the first of these layers that a call of the model reaches; by layer, its calls."""
    seen: dict[str, list[Call]] = {name: [] for name in modules}
    with ExitStack() as undo:
        undo.enter_context(directly(adapter, seen))
        tried: set[str] = set()
        for name, module in modules.items():
            undo.callback(module.register_forward_pre_hook(_gradients_on).remove)
            undo.callback(module.register_forward_hook(partial(_keep, seen[name], tried)).remove)
        yield seen


def _gradients_on(module: nn.Module, args: tuple[Any, ...]) -> None:
    torch.set_grad_enabled(True)


def _keep(calls: list[Call], tried: set[str], module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Note a layer's call; what the model goes on with is a copy, so that nothing is written into what is noted.

    ``tried``: kinds of base layers that are known to have derivatives.
    """
    direct: DirectLayer | None = vars(module).get("tfb_open")
    if direct is not None and direct.took:
        return output
    kind = base_kind(module)
    if kind not in tried and args[0].numel():
        if kind != "float" and not has_derivative(module.get_base_layer(), args[0]):
            raise SamplingError(
                f"by='linear' on base weights {kind!r}, expected ones whose product has derivatives: this one's stop at a rounding, or are "
                "not computed. Fix: by='samples', or a base whose weights alone are quantised"
            )
        tried.add(kind)
    output = output if output.requires_grad else output.detach().requires_grad_()
    calls.append(Call(args[0].detach(), output, False))
    return output.clone()
