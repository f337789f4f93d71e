"""Before anything is timed: does the fused forward compute the samples it claims, at the widths that are timed?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import tfb_ext
from tfb_ext.adapters.adapter import BayesianAdapter

from .llama import RANK, Shape, activate, add_adapters, bare, build, lora_layers, token_ids
from .sequential import SequentialSampler

BLOCKS = 2
# Larger than the sigma of the timed runs, so that a sample differs from the mean by more than bfloat16's rounding.
SIGMA = 0.05


@dataclass(frozen=True)
class Check:
    """Largest differences of per-sample log probabilities from float32 with materialised weights.

    Attributes:
        error: of the fused bfloat16 forward.
        plain: of the same samples through plain PEFT in bfloat16.
        tolerance: ``2 * plain`` and one bfloat16 unit of the largest logit.
        effect: of the mean adapter in float32: what an error would be if the noise were left out.
    """

    error: float
    plain: float
    tolerance: float
    effect: float

    def require(self) -> None:
        """Raise unless the error is within the tolerance and the tolerance could have seen missing noise."""
        if not self.error <= self.tolerance:
            raise RuntimeError(
                f"the fused forward is wrong: error {self.error:.3e} is above the tolerance {self.tolerance:.3e}"
            )
        if not self.effect > 2 * self.tolerance:
            raise RuntimeError(
                f"the check proves nothing: leaving the noise out changes {self.effect:.3e}, the tolerance is "
                f"{self.tolerance:.3e}"
            )


@torch.no_grad()
def check_fused(shape: Shape, layers: str, device: torch.device, rank: int = RANK) -> Check:
    """Compare every sample of a fused forward of a two-block model with its weights written out in float32."""
    peft = add_adapters(
        build(shape, BLOCKS, device), layers, {"of_float32": torch.float32, "plain": torch.bfloat16}, rank
    )
    inputs: dict[str, Any] = {"input_ids": token_ids(shape, 1, device), "use_cache": False, "logits_to_keep": 1}
    adapter = tfb_ext.bayesianize(peft, "of_float32", sigma=SIGMA)
    with adapter.predictive(shape.samples, keep_samples=True) as view:
        peft(**inputs)
    if view.sample_outputs is None:
        raise RuntimeError("the fused forward kept no per-sample outputs")
    fused = view.sample_outputs

    sampled = [[adapter.sample_weights(name, k)[1] for name in adapter.layers] for k in range(shape.samples)]
    sampler = SequentialSampler(peft, "plain", adapter.posteriors, SIGMA)
    activate(peft, "plain")
    plain = []
    for weights in sampled:
        sampler.write(weights)
        plain.append(_log_probabilities(peft, inputs))

    adapter.unload()
    peft.float()
    exact = [_log_probabilities_with(peft, adapter, weights, inputs) for weights in sampled]
    mean = _log_probabilities_with(peft, adapter, [p.mean for p in adapter.posteriors], inputs)
    reference = torch.stack([log_probabilities for log_probabilities, _ in exact])
    largest = max(logit for _, logit in exact)
    rounding = _distance(torch.stack([log_probabilities for log_probabilities, _ in plain]), reference)
    return Check(
        error=_distance(fused, reference),
        plain=rounding,
        tolerance=2 * rounding + torch.finfo(torch.bfloat16).eps * largest,
        effect=_distance(mean[0].expand_as(reference), reference),
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _log_probabilities(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """Log probabilities, float32, and the largest absolute logit."""
    logits = model(**inputs).logits.float()
    return torch.log_softmax(logits, dim=-1), float(logits.abs().max())


def _log_probabilities_with(
    peft: PeftModel, adapter: BayesianAdapter, weights: Sequence[Tensor], inputs: dict[str, Any]
) -> tuple[Tensor, float]:
    """The bare model's answer with ``W0 + s U A`` as its weights, ``A`` (r, n) from ``weights``; they are restored."""
    saved = []
    for module, posterior, a in zip(lora_layers(peft, adapter.layers), adapter.posteriors, weights, strict=True):
        linear = module.get_base_layer()
        saved.append((linear, linear.weight.data))
        delta = posterior.scaling * (posterior.basis.to(linear.weight.device) @ a.to(linear.weight.device))
        linear.weight.data = linear.weight.data + delta
    try:
        with bare(peft) as base:
            return _log_probabilities(base, inputs)
    finally:
        for linear, weight in saved:
            linear.weight.data = weight
