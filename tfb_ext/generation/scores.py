"""Every sample's probabilities of tokens that are there already, by one forward of whole sequences without a cache."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import BayesianAdapter
from ..adapters.samples import SampleBatch
from ..errors import SamplingError
from ..forward.batch import Batch
from ..forward.engine import Request, Result, mixture, run
from ..forward.fold import Predictive
from ..forward.memory import Memory, room_for_tokens
from ..forward.rows import last_positions


@dataclass(frozen=True)
class Scores:
    """Of R rows of N tokens: (S, R, N) under each sample, (R, N) of the mean and the entropies, (R, N, K) alternatives.

    Of the mean adapter S = 1, and ``aleatoric`` is NaN.
    """

    samples: Tensor
    mean: Tensor
    total: Tensor
    aleatoric: Tensor
    alternatives: Tensor
    alternative_probabilities: Tensor


def sequence_arguments(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """What a model is given for whole sequences (R, L) as for generation, positions among it."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = model._prepare_position_ids_for_generation(ids, {"attention_mask": mask}).expand_as(
            ids
        )
    return inputs


def score_tokens(
    adapter: BayesianAdapter,
    sequences: Tensor,
    mask: Tensor,
    start: int,
    batch: SampleBatch | None,
    alternatives: int = 5,
) -> Scores:
    """Every sample's probabilities of the tokens from position ``start`` on; the mean adapter's without ``batch``.

    Samples and rows are halved while they do not fit into memory. The logits of S samples are made and let go piece by piece.

    Args:
        sequences, mask: (R, L), padding where the mask is 0, on either side.
    """
    model, tokens = adapter.anatomy.model, sequences[:, start:]
    count = tokens.shape[1]
    inputs = sequence_arguments(model, sequences, mask) | {"use_cache": False}
    following = torch.nn.functional.pad(tokens, (0, 1), value=-1)  # the token that each kept position predicts
    keep, following = last_positions(model, following, sequences.shape[1])
    whole = Batch(0, inputs | keep, None, torch.arange(len(sequences)), None, False, following)
    device = sequences.device
    memory = Memory(device, room_for_tokens(model, device) / sequences.shape[1] if device.type == "cuda" else math.inf)
    kept = slice(-count - 1, -1)  # the last position says what would follow the last token

    def score(rows: Batch) -> Scores:
        def call(part: SampleBatch | None) -> tuple[Result, list[Tensor]]:
            seen: list[Tensor] = []

            def observe(values: Tensor) -> None:
                for one in values[..., kept, :]:  # one at a time: an entropy's temporaries are as large as the logits
                    seen.append(torch.special.entr(one.exp()).sum(dim=-1))

            return run(adapter, Request(rows.inputs, part, targets=rows.targets, observe=observe)), seen

        passes = [memory.once(lambda: call(None))] if batch is None else memory.passes(rows, batch, call)
        results, entropies = zip(*passes, strict=True)
        mean = (results[0].average if len(results) == 1 else mixture(results))[:, kept]
        top = mean.topk(min(alternatives, mean.shape[-1]), dim=-1)
        own = rows.inputs["input_ids"][:, start:].to(mean.device)
        total = torch.special.entr(mean.exp()).sum(dim=-1)
        return Scores(
            torch.cat([result.targets for result in results])[..., kept],
            mean.gather(-1, own[..., None])[..., 0],
            total,
            torch.full_like(total, math.nan) if batch is None else torch.stack(sum(entropies, [])).mean(dim=0),
            top.indices,
            top.values.exp(),
        )

    def join(parts: list[Scores]) -> Scores:
        names = [field.name for field in fields(Scores)]
        return Scores(**{n: torch.cat([getattr(p, n) for p in parts], dim=int(n == "samples")) for n in names})

    adapter.attached.check_ready()
    return memory.whole_or_halves(whole, score, join)


def opened(adapter: BayesianAdapter, batch: SampleBatch | None) -> AbstractContextManager[object]:
    """The sampling context of ``batch``; without one the model is the mean adapter."""
    return nullcontext() if batch is None else adapter.fanned(Predictive(batch, span=adapter.place.span))


def nan_message(adapter: BayesianAdapter, batch: SampleBatch | None, inputs: Mapping[str, Tensor]) -> str:
    where = "under the mean adapter" if batch is None else f"at sigma = {batch.sigma[0]:g}"
    return (
        f"the model's probabilities are NaN or infinite {where}; the first module to give such a value is "
        f"{first_nan(adapter, batch, inputs)}: load the model in float32 or bfloat16"
        f"{'' if batch is None else ', or lower sigma'}"
    )


def first_nan(adapter: BayesianAdapter, batch: SampleBatch | None, inputs: Mapping[str, Tensor]) -> str:
    """Name and class of the innermost module that is the first to return NaN or infinity on these inputs."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            if not found and isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                found.append(f"{name} ({type(module).__name__})")

        return hook

    modules = list(adapter.anatomy.model.named_modules())
    hooks = [m.register_forward_hook(watch(n)) for n, m in modules if n]
    try:
        with opened(adapter, batch):
            adapter.anatomy.model(**inputs, use_cache=False)
    except SamplingError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "none in a forward without a cache"
