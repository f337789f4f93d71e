"""What sampling an adapter costs without this package: one forward a sample, its noise drawn by ``torch.randn``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor

from tfb_ext.posterior import LayerPosterior

from .llama import lora_layers


class SequentialSampler:
    """Sampled forwards in plain torch and PEFT: ``A <- M + sigma E`` in every layer, then a forward, once a sample.

    The adapter's ``B`` is set to ``U`` here, once, so that ``B A`` is the sampled weight in canonical form.
    """

    def __init__(self, peft: PeftModel, adapter: str, posteriors: tuple[LayerPosterior, ...], sigma: float) -> None:
        self.peft = peft
        self.sigma = sigma
        self.weights: list[tuple[Tensor, Tensor]] = []
        for module, posterior in zip(lora_layers(peft, [p.name for p in posteriors]), posteriors, strict=True):
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            if posterior.rank != a.shape[0]:
                raise ValueError(
                    f"layer {posterior.name!r} has rank {posterior.rank}, expected its adapter's {a.shape[0]}: B has "
                    "dependent columns"
                )
            b.data.copy_(posterior.basis)
            self.weights.append((a, posterior.mean.to(a.device)))

    @torch.no_grad()
    def write(self, sampled: Sequence[Tensor] | None = None) -> None:
        """Write ``M + sigma E`` into every layer: the given ones, (r, n) each, or freshly drawn."""
        for index, (weight, mean) in enumerate(self.weights):
            if sampled is None:
                weight.copy_(mean + self.sigma * torch.randn_like(mean))
            else:
                weight.copy_(sampled[index])

    @torch.no_grad()
    def predict(self, samples: int, **inputs: object) -> Tensor:
        """``log mean_k softmax`` over ``samples`` sampled forwards, (B, ..., V) float32."""
        total: Tensor | None = None
        for _ in range(samples):
            self.write()
            value = torch.log_softmax(self.peft(**inputs).logits.float(), dim=-1)
            total = value if total is None else torch.logaddexp(total, value)
        if total is None:
            raise ValueError(f"samples is {samples}, expected at least 1")
        return total - math.log(samples)
