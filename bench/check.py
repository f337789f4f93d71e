"""Before anything is timed: does a forward compute the samples it claims, at the widths that are timed?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import tfb_ext
from tfb_ext.adapters.adapter import BayesianAdapter
from tfb_ext.data import Encoded
from tfb_ext.forward.caches import cache_argument, cache_of
from tfb_ext.forward.engine import Scorer

from .llama import RANK, Shape, activate, add_adapters, bare, build, lora_layers, token_ids
from .sequential import SequentialSampler

BLOCKS = 2
# Larger than the sigma of the timed runs, so that a sample differs from the mean by more than bfloat16's rounding.
SIGMA = 0.05


@dataclass(frozen=True)
class Check:
    """Largest differences of log probabilities from float32 with the weights written out.

    Attributes:
        error: of the bfloat16 forward that is timed.
        plain: of the same through plain PEFT in bfloat16.
        tolerance: ``2 * plain`` and one bfloat16 unit of the largest logit.
        effect: of the fault that the check must see, in float32: no noise; with a span also noise at every token; for choices
            another one's tokens. The smallest of them.
    """

    error: float
    plain: float
    tolerance: float
    effect: float

    def require(self) -> None:
        """Raise unless the error is within the tolerance and the tolerance could have seen missing noise."""
        if not self.error <= self.tolerance:
            raise RuntimeError(
                f"the forward is wrong: error {self.error:.3e} is above the tolerance {self.tolerance:.3e}"
            )
        if not self.effect > 2 * self.tolerance:
            raise RuntimeError(
                f"the check proves nothing: the fault it must see changes {self.effect:.3e}, the tolerance is "
                f"{self.tolerance:.3e}"
            )


# Runs the model with these down-projections written into it, (r, n) for each layer.
Call = Callable[[Sequence[Tensor], dict[str, Any]], Any]


@torch.no_grad()
def check_fused(shape: Shape, layers: str, device: torch.device, rank: int = RANK, span: int | str = "all") -> Check:
    """Compare every sample of a forward of a two-block model with its weights written out in float32.

    With ``span`` ``"answer"`` the weights are those of the last token, after a prompt of the mean adapter.
    """
    peft = _two_blocks(shape, layers, device, rank)
    inputs: dict[str, Any] = {"input_ids": token_ids(shape, 1, device), "use_cache": False, "logits_to_keep": 1}
    adapter = tfb_ext.bayesianize(peft, "of_float32", sigma=SIGMA)
    with adapter.predictive(shape.samples, span=span, keep_samples=True) as view:
        peft(**inputs)
    if view.sample_outputs is None:
        raise RuntimeError("the forward kept no per-sample outputs")
    given = view.sample_outputs

    mean = [p.mean for p in adapter.posteriors]
    sampled = [[adapter.sample_weights(name, k)[1] for name in adapter.layers] for k in range(shape.samples)]
    prompt = None if span == "all" else mean
    answer = partial(_last_token, inputs, cache_argument(peft.get_base_model()))
    call = _written(peft, adapter)
    plain = [answer(call, weights, prompt) for weights in sampled]

    adapter.unload()
    peft.float()
    call = _written_out(peft, adapter)
    exact = [answer(call, weights, prompt) for weights in sampled]
    faults = [answer(call, mean, None)[0].expand_as(given)]
    if prompt is not None:
        faults.append(torch.stack([answer(call, weights, None)[0] for weights in sampled]))
    largest = max(logit for _, logit in exact)
    return _check(given, *(torch.stack([logs for logs, _ in found]) for found in (plain, exact)), faults, largest)


@torch.no_grad()
def check_choices(shape: Shape, layers: str, device: torch.device, data: Encoded, rank: int = RANK) -> Check:
    """Compare the choices' log probabilities under the mean adapter with a row for each choice, its weights written out.

    ``data``: prompts of one length, and choices of one length.
    """
    peft = _two_blocks(shape, layers, device, rank)
    adapter = tfb_ext.bayesianize(peft, "of_float32", sigma=SIGMA)
    scorer = Scorer(adapter, data, batch_size=len(data))
    (batch,) = scorer.batches
    given = torch.empty(len(data), len(data.choices))
    given[batch.items] = scorer.mean(batch).float().cpu()

    mean = [p.mean for p in adapter.posteriors]
    prompts, choices = (torch.tensor(ids, device=device) for ids in (data.token_ids, data.choice_tokens))
    targets = choices.repeat(len(prompts), 1)
    rows = torch.cat([prompts.repeat_interleave(len(choices), 0), targets[:, :-1]], 1)

    def scored(call: Call) -> tuple[Tensor, float]:
        inputs = {"input_ids": rows, "use_cache": False, "logits_to_keep": targets.shape[1]}
        logits = call(mean, inputs).logits.float()
        logs = torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None]).sum((1, 2))
        return torch.log_softmax(logs.view(-1, len(choices)), dim=-1).cpu(), float(logits.abs().max())

    plain, _ = scored(_written(peft, adapter))
    adapter.unload()
    peft.float()
    exact, largest = scored(_written_out(peft, adapter))
    return _check(given, plain, exact, [exact.roll(1, dims=-1)], largest)


def _two_blocks(shape: Shape, layers: str, device: torch.device, rank: int) -> PeftModel:
    names = {"of_float32": torch.float32, "plain": torch.bfloat16}
    return add_adapters(build(shape, BLOCKS, device), layers, names, rank)


def _check(given: Tensor, plain: Tensor, exact: Tensor, faults: Sequence[Tensor], largest: float) -> Check:
    def distance(a: Tensor) -> float:
        return float((a - exact).abs().max())

    rounding = distance(plain)
    return Check(
        error=distance(given),
        plain=rounding,
        tolerance=2 * rounding + torch.finfo(torch.bfloat16).eps * largest,
        effect=min(map(distance, faults)),
    )


def _last_token(
    inputs: dict[str, Any], cache: str, call: Call, weights: Sequence[Tensor], prompt: Sequence[Tensor] | None
) -> tuple[Tensor, float]:
    """Log probabilities, float32, and the largest absolute logit; the tokens before the last by other weights if they are given."""
    if prompt is not None:
        ids = inputs["input_ids"]
        before = call(prompt, {**inputs, "input_ids": ids[:, :-1], "use_cache": True})
        inputs = {**inputs, "input_ids": ids[:, -1:], "use_cache": True, cache: cache_of(before)}
    logits = call(weights, inputs).logits.float()
    return torch.log_softmax(logits, dim=-1), float(logits.abs().max())


def _written(peft: PeftModel, adapter: BayesianAdapter) -> Call:
    """Plain PEFT, in its own type."""
    sampler = SequentialSampler(peft, "plain", adapter.posteriors, SIGMA)
    activate(peft, "plain")

    def call(weights: Sequence[Tensor], inputs: dict[str, Any]) -> Any:
        sampler.write(weights)
        return peft(**inputs)

    return call


def _written_out(peft: PeftModel, adapter: BayesianAdapter) -> Call:
    """The bare model with ``W0 + s U A`` as its weights, which are restored."""
    modules = lora_layers(peft, adapter.layers)

    def call(weights: Sequence[Tensor], inputs: dict[str, Any]) -> Any:
        saved = []
        for module, posterior, a in zip(modules, adapter.posteriors, weights, strict=True):
            linear = module.get_base_layer()
            saved.append((linear, linear.weight.data))
            delta = posterior.scaling * (posterior.basis.to(linear.weight.device) @ a.to(linear.weight.device))
            linear.weight.data = linear.weight.data + delta
        try:
            with bare(peft) as base:
                return base(**inputs)
        finally:
            for linear, weight in saved:
                linear.weight.data = weight

    return call
