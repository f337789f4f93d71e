"""Predictions of one adapter, by every method, in a form small enough to keep.

A prediction of N items over C classes is kept as the log of the mean probabilities and as the mutual information, both
float16: a half has three good digits of a logarithm, where of a probability near 1 it would keep only ties. The total
entropy follows from the probabilities, the expected entropy is total minus mutual information. Of items out of distribution only the
three scores are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tfb_ext.data import Encoded

from .bank import flipout
from .data import Parts

SMALLEST_LOG = -80.0  # of a mean probability; e^-80 is 0 to every measure, and well inside float16


@dataclass(frozen=True)
class Kept:
    """What is kept of one prediction; every array float16.

    Attributes:
        test: (N, C) log mean probabilities.
        information: (N,) mutual information of label and weights, nats; 0 for a single pass.
        stranger: (3, M) minus the log of the top probability, total entropy, mutual information.
        validation, outside: (N_validation, C) and (M, C) log mean probabilities of the validation items and of the strangers, for
            what is computed from a prediction later (temperature scaling, ensembles); no rows where that is not asked for.
    """

    test: np.ndarray
    information: np.ndarray
    stranger: np.ndarray
    validation: np.ndarray
    outside: np.ndarray

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return {f"{name}/{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, arrays: Any, name: str) -> Kept:
        return cls(*(arrays[f"{name}/{field.name}"] for field in fields(cls)))


@dataclass(frozen=True)
class Questions:
    """Test, stranger and validation items as one set, so that one call predicts them all."""

    joined: Encoded
    test: slice
    stranger: slice
    validation: slice

    @classmethod
    def of(cls, parts: Parts) -> Questions:
        ends = np.cumsum([len(parts.test), len(parts.stranger), len(parts.validation)]).tolist()
        sets = (parts.test, parts.stranger, parts.validation)
        joined = Encoded(
            [ids for part in sets for ids in part.token_ids],
            [label for part in sets for label in part.labels],
            parts.test.choice_ids,
            parts.test.choices,
            parts.test.pad_id,
        )
        return cls(joined, slice(0, ends[0]), slice(ends[0], ends[1]), slice(ends[1], ends[2]))

    def keep(self, samples: Tensor, whole: bool = True, information: Tensor | None = None) -> Kept:
        """From per-sample probabilities (S, N, C) of the joined items; ``whole``: with ``validation`` and ``outside``.

        ``information`` (N,) is the mutual information where no samples were drawn, and ``samples`` is their average.
        """
        mean = samples.double().mean(0)
        total = torch.special.entr(mean).sum(-1)
        if information is None:
            information = (total - torch.special.entr(samples.double()).sum(-1).mean(0)).clamp(min=0)
        logs = mean.log().clamp(min=SMALLEST_LOG)
        strange = torch.stack([-logs.amax(-1), total, information])[:, self.stranger]
        more = (logs[self.validation], logs[self.stranger]) if whole else (logs[:0], logs[:0])
        parts = (logs[self.test], information[self.test], strange, *more)
        return Kept(*(part.to(torch.float16).numpy() for part in parts))


@dataclass(frozen=True)
class Cost:
    """Wall time of a prediction, with the device idle before and after it, and the most memory allocated (None on a CPU)."""

    seconds: float
    peak_gib: float | None


def measured(device: torch.device, run: Callable[[], Any]) -> tuple[Any, Cost]:
    """What ``run`` returns, and what it cost."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return result, Cost(seconds, torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None)


@contextmanager
def adapted(base: Any, targets: Sequence[str], rank: int, alpha: int, dropout: float) -> Iterator[Any]:
    """The base model as a PEFT model with an empty adapter ``default``, in evaluation mode; the base as it was afterwards.

    The head's product is made in float32 by everyone: bfloat16 logits would tie the confidences of sure predictions.
    """
    from peft import LoraConfig, get_peft_model

    inner = base.get_output_embeddings()
    head = nn.Linear(inner.in_features, inner.out_features, bias=False, device="meta")
    head.weight = nn.Parameter(inner.weight.detach().float(), requires_grad=False)
    base.set_output_embeddings(head)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).eval()
    hook = model.get_base_model().get_output_embeddings().register_forward_pre_hook(_as_float)
    try:
        yield model
    finally:
        hook.remove()
        model.unload()
        base.set_output_embeddings(inner)


def _as_float(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (arguments[0].float(), *arguments[1:])


def set_weights(model: Any, state: dict[str, Tensor]) -> None:
    """Put an adapter's weights into ``default``.

    Raises:
        ValueError: the state has other names than the adapter.
    """
    own = {n.replace(".default.", "."): p for n, p in model.named_parameters() if ".default." in n}
    if set(own) != set(state):
        odd = sorted(set(own) ^ set(state))
        raise ValueError(f"{len(odd)} names are not both in the adapter and in the state, the first is {odd[0]}")
    for name, parameter in own.items():
        parameter.data.copy_(state[name])


def passes(model: Any, data: Encoded, samples: int, batch_size: int = 256) -> Tensor:
    """Probabilities of ``samples`` plain passes of a PEFT model over ``data``, (S, N, C) float32 on the CPU."""
    columns = torch.tensor(data.choice_ids, device=model.device)
    result = torch.empty(samples, len(data), len(data.choices))
    with torch.no_grad():
        for batch in data.batches(batch_size, model.device):
            index = batch.pop("index")
            for sample in range(samples):
                logits = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]
                result[sample, index] = logits.index_select(-1, columns).float().softmax(-1).cpu()
    return result


@contextmanager
def dropping(model: Any) -> Iterator[None]:
    """Inside, the adapter's dropout draws masks, though the model is in evaluation mode."""
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    for module in drops:
        module.train()
    try:
        yield
    finally:
        for module in drops:
            module.eval()


@contextmanager
def blobbing(model: Any, omega: dict[str, Tensor]) -> Iterator[None]:
    """Inside, every pass draws BLoB's A once and gives every token its own signs, as in its training.

    Args:
        omega: layer name in the base model -> (r, n) standard deviations of A.
    """
    base = model.get_base_model()
    hooks = []
    for name, deviation in omega.items():
        layer = base.get_submodule(name).lora_A["default"]
        hooks.append(layer.register_forward_hook(_Sampler(deviation.to(layer.weight.device))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Sampler:
    deviation: Tensor

    def __call__(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + flipout(arguments[0], self.deviation * torch.randn_like(self.deviation)).to(output.dtype)


def save(path: Path, kept: dict[str, Kept], **more: np.ndarray) -> None:
    """Write predictions by name into one compressed file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {key: value for name, one in kept.items() for key, value in one.arrays(name).items()}
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays, **more)
    temporary.replace(path)
