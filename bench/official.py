"""The search for sigma as the authors of TFB wrote it, in plain torch and PEFT: what ours is compared with and timed against.

Shi et al., NeurIPS 2025, by what their published code does and not by the paper's text: flipout noise, pseudo-labels, the
relative change of the NLL divided once more by the number of anchors, five halvings of [0.001, 0.015], and as the result the
smallest sigma that violates the tolerance. The only thing done better than there is the head: it computes the last position
alone (``logits_to_keep=1``) and not every position's logits.

``bench/parity.py`` runs our search with ``recipe="official"`` and this one on the same anchors.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from tfb_ext.data import Encoded

from .sequential import signs
from .timing import clock, spread

LOW, HIGH, STEPS, SAMPLES, TOLERANCE = 0.001, 0.015, 5, 10, 0.01

Anchors = Encoded | Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class OfficialEvaluation:
    """The anchors at one sigma: mean NLL of the pseudo-labels (nats), and its relative change divided by their number."""

    sigma: float
    nll: float
    ratio: float


@dataclass(frozen=True)
class OfficialResult:
    """What the authors' search found and what it took.

    Attributes:
        sigma: the smallest sigma tried that violates the tolerance, or the bracket's upper end if none does.
        evaluations: one for each step, in their order.
        baseline_nll: the mean adapter's NLL (nats) of its own predictions.
        anchors: how many.
        seconds_baseline: of the mean adapter's pass.
        seconds_per_step: of each step, its decompositions included.
        seconds_decompose: the part of each step that decomposes every layer's B again.
        peak_bytes: most device memory allocated meanwhile, weights included; 0 without a GPU.
    """

    sigma: float
    evaluations: tuple[OfficialEvaluation, ...]
    baseline_nll: float
    anchors: int
    seconds_baseline: float
    seconds_per_step: tuple[float, ...]
    seconds_decompose: tuple[float, ...]
    peak_bytes: int

    def seconds_of(self, steps: int, anchors: int) -> tuple[float, float, float]:
        """Seconds of a search of ``steps`` steps on ``anchors`` anchors of the same length: by the median, the fastest and
        the slowest of the steps that were timed.

        The passes grow with the anchors, the decompositions do not; every step is the same work.
        """
        share = anchors / self.anchors
        pairs = zip(self.seconds_per_step, self.seconds_decompose, strict=True)
        middle, least, most = spread([share * (step - decompose) + decompose for step, decompose in pairs])
        base = share * self.seconds_baseline
        return base + steps * middle, base + steps * least, base + steps * most


@dataclass(frozen=True)
class AnchorBatch:
    """Arguments of one forward, the label tokens (C,) (``None``: the whole vocabulary) and the rows' places (B,)."""

    inputs: dict[str, Any]
    columns: Tensor | None
    index: Tensor


class Noise(Protocol):
    """Where the draws of a stochastic forward come from."""

    def begin(self, sample: int) -> None:
        """A forward of one batch starts, the sample-th of them."""

    def change(self, layer: int, x: Tensor, omega: Tensor) -> Tensor:
        """What a layer's input x (rows, tokens, n) adds to A' x, (rows, tokens, r); ``omega`` is (r, 1)."""


class FreshNoise:
    """Torch's own draws, new ones for every forward, as the authors' code has them: ``signs * ((omega * E) (x * signs))``
    with one E (r, n) a forward and signs for every token.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def begin(self, sample: int) -> None:
        pass

    def change(self, layer: int, x: Tensor, omega: Tensor) -> Tensor:
        noise = omega.new_empty(omega.shape[0], x.shape[-1]).normal_(generator=self.generator).mul_(omega)
        change = torch.nn.functional.linear(x * signs(x, self.generator), noise)
        return change * signs(change, self.generator)


class OfficialAdapter:
    """One LoRA adapter with the authors' noise; made by :func:`official_adapter`.

    Attributes:
        omegas: standard deviations (r, 1) of each layer's A' rows; ``None`` switches the noise off.
        noise: its draws; set another before the first stochastic forward.
    """

    def __init__(self, peft: PeftModel, name: str, layers: Sequence[Any], seed: int) -> None:
        self.peft = peft
        self.name = name
        self.layers = layers
        self.device = layers[0].lora_A[name].weight.device
        self.noise: Noise = FreshNoise(seed, self.device)
        self.omegas: list[Tensor] | None = None

    def decompose(self, sigma: float) -> None:
        """Omega = sigma / (d + 1e-6) of every layer, from a singular value decomposition of its B' made anew."""
        self.omegas = []
        for module in self.layers:
            weight = module.lora_B[self.name].weight
            _, d, _ = torch.linalg.svd(weight.float(), full_matrices=False)
            self.omegas.append((sigma / (d + 1e-6))[:, None].to(weight.dtype))

    def forward(self, layer: int, plain: Callable[..., Tensor], x: Tensor) -> Tensor:
        """``base(x) + s B' (A' x + change)``."""
        if self.omegas is None:
            return plain(x)
        module = self.layers[layer]
        result = module.base_layer(x)
        down, up = module.lora_A[self.name], module.lora_B[self.name]
        x = x.to(down.weight.dtype)
        z = down(x)
        z = z + self.noise.change(layer, x, self.omegas[layer])
        return (result + up(z) * module.scaling[self.name]).to(result.dtype)

    @torch.no_grad()
    def probabilities(self, batches: Sequence[AnchorBatch], samples: int = 1) -> Tensor:
        """Class probabilities (N, C) at each anchor's last position, averaged over ``samples`` separate forwards."""
        parts = []
        for batch in batches:
            total: Tensor | float = 0.0
            for sample in range(samples):
                self.noise.begin(sample)
                logits = self.peft(**batch.inputs).logits[:, -1]
                if batch.columns is not None:
                    logits = logits[:, batch.columns]
                total = total + torch.softmax(logits.float(), dim=-1)
            parts.append(total / samples)
        order = torch.argsort(torch.cat([batch.index for batch in batches]))
        return torch.cat(parts)[order.to(self.device)]

    def batches(self, anchors: Anchors, batch_size: int) -> list[AnchorBatch]:
        """Anchors ready to run; ``batch_size`` rows each where they are :class:`~tfb_ext.data.Encoded`.

        Raises:
            ValueError: no anchors, no label tokens, or batches whose last position is padding.
        """
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self.peft.get_base_model().forward).parameters:
            options["logits_to_keep"] = 1
        found = []
        if isinstance(anchors, Encoded):
            if anchors.choice_ids is None:
                raise ValueError("the anchors name classes of a head, expected label tokens (encode without head=True)")
            columns = torch.tensor(anchors.choice_ids, device=self.device)
            for made in anchors.batches(batch_size, self.device):
                index = made.pop("index")
                found.append(AnchorBatch({**made, **options}, columns, index))
        else:
            start = 0
            for given in anchors:
                inputs = {name: value.to(self.device) for name, value in given.items() if name != "labels"}
                rows = len(inputs["input_ids"])
                if "attention_mask" in inputs and not inputs["attention_mask"][:, -1].all():
                    raise ValueError("a batch of anchors ends in padding, expected padding on the left")
                found.append(AnchorBatch({**inputs, **options}, None, torch.arange(start, start + rows)))
                start += rows
        if not found:
            raise ValueError("no anchors, expected at least one")
        return found


@contextmanager
def official_adapter(peft: PeftModel, adapter: str, seed: int) -> Iterator[OfficialAdapter]:
    """Inside, the adapter's (B, A) are (U diag(d), V^T A) of a float32 decomposition B = U diag(d) V^T, and its layers draw
    noise once :meth:`OfficialAdapter.decompose` has said how much. Weights and forwards are put back at the end.

    ``adapter`` is the active one, the model on one device and in evaluation mode.

    Raises:
        ValueError: another adapter is active, or a layer is not a plain LoRA ``Linear`` with as many outputs as ranks.
    """
    if peft.active_adapters != [adapter]:
        raise ValueError(f"adapter {adapter!r} is not the active one (active: {peft.active_adapters})")
    layers: list[Any] = [m for m in peft.modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]
    if not layers:
        raise ValueError(f"adapter {adapter!r} has no LoRA layer")
    for module in layers:
        if (
            not isinstance(module, LoraLinear)
            or module.merged
            or "forward" in module.__dict__
            or getattr(module, "tfb_open", None)
        ):
            raise ValueError(f"a layer is {type(module).__name__}, expected an unmerged LoRA Linear that nothing wraps")
        if module.lora_B[adapter].weight.shape[0] < module.lora_B[adapter].weight.shape[1]:
            raise ValueError(
                f"a layer's B is {tuple(module.lora_B[adapter].weight.shape)}, expected no more ranks than rows"
            )
    authors = OfficialAdapter(peft, adapter, layers, seed)
    kept = []
    try:
        for number, module in enumerate(layers):
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            kept.append((a, a.detach().clone(), b, b.detach().clone()))
            u, d, vh = torch.linalg.svd(b.detach().float(), full_matrices=False)
            b.data.copy_(u * d)
            a.data.copy_(vh @ a.detach().float())
            module.forward = partial(authors.forward, number, module.forward)
        yield authors
    finally:
        for module, (a, old_a, b, old_b) in zip(layers, kept, strict=False):
            a.data.copy_(old_a)
            b.data.copy_(old_b)
            module.__dict__.pop("forward", None)


def bisect(
    nll_at: Callable[[float], float],
    baseline: float,
    anchors: int,
    *,
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
) -> tuple[float, tuple[OfficialEvaluation, ...]]:
    """The smallest of the halved bracket's middles that violates the tolerance (``high`` if none does), and all of them.

    A middle violates it where ``|nll - baseline| / |baseline| / anchors > tolerance``.
    """
    best, evaluations = high, []
    for _ in range(steps):
        sigma = (low + high) / 2
        nll = nll_at(sigma)
        ratio = abs(nll - baseline) / max(abs(baseline), sys.float_info.min) / anchors
        evaluations.append(OfficialEvaluation(sigma, nll, ratio))
        if ratio > tolerance:
            best = high = sigma
        else:
            low = sigma
    return best, tuple(evaluations)


def official_search(
    peft: PeftModel,
    adapter: str,
    anchors: Anchors,
    *,
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    samples: int = SAMPLES,
    tolerance: float = TOLERANCE,
    batch_size: int = 8,
    seed: int = 0,
    noise: Callable[[OfficialAdapter], Noise] | None = None,
) -> OfficialResult:
    """Run the authors' search on the active adapter of ``peft``, on whatever device it is; the model is restored.

    Making the batches and rewriting the adapter once are not timed.

    Args:
        anchors: an encoded set, whose label tokens are the classes and whose labels are not looked at, or batches of
            ``input_ids`` and ``attention_mask``, whose classes are the vocabulary; padding is on the left.
        low, high, steps: the bracket and how often it is halved.
        samples: stochastic forwards at every sigma.
        tolerance: of the NLL's relative change divided by the number of anchors.
        batch_size: anchors a forward.
        seed: of torch's generator on the model's device.
        noise: other draws than that generator's.
    """
    with official_adapter(peft, adapter, seed) as authors:
        authors.noise = authors.noise if noise is None else noise(authors)
        cuda = authors.device.type == "cuda"
        now = clock(authors.device)
        batches = authors.batches(anchors, batch_size)
        if cuda:
            torch.cuda.synchronize(authors.device)
            torch.cuda.reset_peak_memory_stats(authors.device)
        start = now()
        mean = authors.probabilities(batches)
        labels = mean.argmax(dim=-1)
        baseline = pseudo_nll(mean, labels)
        seconds_baseline = now() - start
        seconds_per_step: list[float] = []
        seconds_decompose: list[float] = []

        def nll_at(sigma: float) -> float:
            start = now()
            authors.decompose(sigma)
            decomposed = now()
            nll = pseudo_nll(authors.probabilities(batches, samples), labels)
            seconds_per_step.append(now() - start)
            seconds_decompose.append(decomposed - start)
            return nll

        sigma, evaluations = bisect(nll_at, baseline, len(labels), low=low, high=high, steps=steps, tolerance=tolerance)
        return OfficialResult(
            sigma,
            evaluations,
            baseline,
            len(labels),
            seconds_baseline,
            tuple(seconds_per_step),
            tuple(seconds_decompose),
            torch.cuda.max_memory_allocated(authors.device) if cuda else 0,
        )


def pseudo_nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean of ``-log(p + 1e-12)`` at the labels, nats."""
    return float(-(probabilities.gather(-1, labels[:, None]) + 1e-12).log().mean())
