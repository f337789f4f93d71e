"""What sampling an adapter costs without this package: one forward a sample, noise and signs drawn by torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from tfb_ext.posterior.canonical import LayerPosterior

from .llama import lora_layers


class SequentialSampler:
    """Sampled forwards in plain torch and PEFT, one after the other.

    The adapter's ``B`` is set to ``U`` here, once, and its ``A`` to ``M``, so that ``B A`` is the mean in canonical form.
    """

    def __init__(self, peft: PeftModel, adapter: str, posteriors: tuple[LayerPosterior, ...], sigma: float) -> None:
        self.peft = peft
        self.adapter = adapter
        self.sigma = sigma
        self.layers: list[Any] = lora_layers(peft, [p.name for p in posteriors])
        self.weights: list[tuple[Tensor, Tensor]] = []
        for module, posterior in zip(self.layers, posteriors, strict=True):
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            if posterior.rank != a.shape[0]:
                raise ValueError(
                    f"layer {posterior.name!r} has rank {posterior.rank}, expected its adapter's {a.shape[0]}: B has "
                    "dependent columns"
                )
            b.data.copy_(posterior.basis)
            a.data.copy_(posterior.mean)
            self.weights.append((a, posterior.mean.to(a.device)))

    @torch.no_grad()
    def write(self, sampled: Sequence[Tensor]) -> None:
        """Write these down-projections, (r, n) each, into the layers."""
        for (weight, _), value in zip(self.weights, sampled, strict=True):
            weight.copy_(value)

    @torch.no_grad()
    def write_drawn(self) -> None:
        """Write ``M + sigma E`` into every layer, freshly drawn: the ``weight`` mode's sample."""
        for weight, mean in self.weights:
            weight.copy_(mean + self.sigma * torch.randn_like(mean))

    @contextmanager
    def flipout(self) -> Iterator[None]:
        """Inside, every forward of a layer draws noise of its own, and signs for every token, as flipout does."""
        for module in self.layers:
            module.forward = self._flipout_forward(module)
        try:
            yield
        finally:
            for module in self.layers:
                del module.__dict__["forward"]

    def _flipout_forward(self, module: Any) -> Callable[[Tensor], Tensor]:
        a, b = module.lora_A[self.adapter].weight, module.lora_B[self.adapter].weight
        scaling, sigma = module.scaling[self.adapter], self.sigma

        def forward(x: Tensor) -> Tensor:
            result = module.base_layer(x)
            x = x.to(a.dtype)
            noise = sigma * torch.randn_like(a)
            change = torch.nn.functional.linear(x * signs(x), noise)
            z = torch.nn.functional.linear(x, a)
            z = z + change * signs(z)
            return (result + torch.nn.functional.linear(z, b) * scaling).to(result.dtype)

        return forward

    @torch.no_grad()
    def predict(self, samples: int, call: Callable[[], Any], write: bool = False) -> Tensor:
        """``log mean_k softmax`` over ``samples`` calls, (B, ..., V) float32; ``write`` draws the weights before each."""
        total: Tensor | None = None
        for _ in range(samples):
            if write:
                self.write_drawn()
            value = torch.log_softmax(call().logits.float(), dim=-1)
            total = value if total is None else torch.logaddexp(total, value)
        if total is None:
            raise ValueError(f"samples is {samples}, expected at least 1")
        return total - math.log(samples)


def signs(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Plus and minus one with equal chance, of the shape, type and device of ``like``."""
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
