"""The one engine: runs the model on a batch, under the mean adapter or under samples, for whatever is made of the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import BayesianAdapter, Place
from ..adapters.samples import MEAN, SampleBatch
from ..errors import UnsupportedModelError
from .anatomy import CLASSIFIER_HEADS, last_position_only
from .batch import Batch, labelled_lengths, mask_of
from .batches import Batches, Data, choice_logs
from .fold import Predictive, log_means, log_values
from .memory import Memory, room_for_trunk
from .rows import at_targets
from .tail import Branches
from .trunk import PROMPT, Trunk

# Above this many classes (a vocabulary) per-sample results are not kept, only their average.
MANY_CLASSES = 1024


@dataclass(frozen=True)
class Request:
    """One call of the model.

    Attributes:
        inputs: its arguments, B rows.
        samples: whose outputs to average; ``None`` for the mean adapter, by PEFT's own arithmetic.
        place: what is random; ``None`` is the adapter's own. With a span an answer is read from the first position that has a
            target, or from the last token of each row.
        keep: give every sample's outputs too.
        answers: (B,), as in :class:`~tfb_ext.forward.fold.Predictive`, where targets do not say.
        columns, targets, observe, trunk, key, branches: as in :class:`~tfb_ext.forward.fold.Predictive`.
    """

    inputs: dict[str, Any]
    samples: SampleBatch | None = None
    place: Place | None = None
    keep: bool = False
    columns: Tensor | None = None
    targets: Tensor | None = None
    observe: Callable[[Tensor], None] | None = None
    trunk: Trunk | None = None
    key: Hashable | None = None
    branches: Branches | None = None
    answers: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """What one call gave, float32 or better.

    Attributes:
        size: samples in it.
        average: (B, ..., V) log mean probability, or the kind's own mean, as the model returns it.
        samples: (size, B, ..., V) of each sample, if asked for.
        targets: (size, *targets.shape) log probabilities of the targets, 0 for those that are not looked up.
    """

    size: int
    average: Tensor
    samples: Tensor | None
    targets: Tensor | None


def run(adapter: BayesianAdapter, request: Request) -> Result:
    """Call the model once."""
    model, place = adapter.anatomy.model, request.place or adapter.place
    if (
        request.samples is None and request.branches is not None
    ):  # prompts that choices share: by the kernels of the samples
        return run(adapter, replace(request, samples=MEAN, place=Place(place.first, 1)))
    if request.samples is not None:
        view = Predictive(
            request.samples,
            columns=request.columns,
            keep_samples=request.keep,
            observe=request.observe,
            targets=request.targets,
            trunk=request.trunk,
            key=request.key,
            span=place.span,
            answers=None if place.span is None else answer_lengths(request),
            branches=request.branches,
        )
        with adapter.fanned_at(place.first, view):
            average = model(**request.inputs).logits
        return Result(len(view.batch), average, view.sample_outputs, view.target_log_probabilities)
    with torch.no_grad():
        adapter.attached.check_call()  # dropout, or another adapter, would be no mean of this one
        one = request.inputs.get("logits_to_keep") == 1
        with last_position_only(adapter.anatomy) if one else nullcontext():
            logits = model(**request.inputs).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if request.columns is not None:
        logits = logits.index_select(-1, request.columns)
    values = log_values(logits, adapter.anatomy.kind)
    targets = None if request.targets is None else at_targets(values[None], request.targets)
    return Result(1, values, values[None] if request.keep else None, targets)


def logits_and_norm(adapter: BayesianAdapter, inputs: dict[str, Any], columns: Tensor | None) -> Tensor:
    """(B, C + 1) or (B, T, C + 1): the mean adapter's logits as the model returns them, and the norm of the head's input.

    As one output more of the head, the norm goes through the model's own pooling: it is that of the position that is returned.

    Raises:
        UnsupportedModelError: a language model that computes on its head's output.
    """
    head: Any = adapter.anatomy.head
    made: list[Tensor] = []

    def after(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        logits = output if columns is None else output.index_select(-1, columns)
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(args[0], dim=-1, keepdim=True, dtype=wide)
        made.append(torch.cat([logits.to(wide), norm.to(logits.device)], dim=-1))
        return made[-1]

    hook = head.register_forward_hook(after)
    try:
        adapter.attached.check_call()
        out: Tensor = adapter.anatomy.model(**inputs).logits
    finally:
        hook.remove()
    if adapter.anatomy.head_name not in CLASSIFIER_HEADS and not torch.equal(out.to(made[-1].dtype), made[-1]):
        raise UnsupportedModelError(
            f"{type(adapter.anatomy.model).__name__} changes its logits after its head, so they may not be Gaussian; use "
            "adapter.sampling(...)"
        )
    return out


def mixture(results: Iterable[Result]) -> Tensor:
    """Log of the mean probability over the samples of several calls."""
    total, size = None, 0
    for result in results:
        part = result.average + math.log(result.size)
        total = part if total is None else torch.logaddexp(total, part)
        size += result.size
    assert total is not None
    return total - math.log(size)


class Scorer(Batches):
    """Runs a data set's batches, with samples fused and chunked, and the trunk kept where that saves work.

    Args:
        place: what is random; ``None`` is the adapter's own.
        keep_trunk: keep what is the same for all samples for later calls; a sequence of places keeps what each of them needs.
        options: of :class:`~tfb_ext.forward.batches.Batches`.

    The methods give log probabilities of the classes; of a multi-label head those of each label, of a regression the outputs.
    """

    def __init__(
        self,
        adapter: BayesianAdapter,
        data: Data,
        *,
        place: Place | None = None,
        keep_trunk: bool | Sequence[Place] = False,
        **options: Any,
    ) -> None:
        adapter.attached.check_ready()
        self.place = adapter.place if place is None else place
        super().__init__(adapter, data, span=self.place.span, **options)
        places = tuple(keep_trunk) if isinstance(keep_trunk, Sequence) else (self.place,)
        self.keep_trunk = bool(keep_trunk)
        self._firsts = tuple(sorted({trunk_of(p) for p in places} - {0}))
        self.trunk: Trunk | None = None
        self._pools = adapter.anatomy.head_name in CLASSIFIER_HEADS and not self.labels_tokens
        self.mean_tokens = self.tokens / max(sum(len(b.index) for b in self.batches), 1)
        self.memory = Memory(self.device, self.fitting_rows, self._split_trunk)
        self.tokens_run = 0

    def mean(self, batch: Batch) -> Tensor:
        """(items, C) under the mean adapter, PEFT's own arithmetic."""
        return self._reduced(batch, None, None, False, _mean_of, 0)

    def samples(self, batch: Batch, samples: SampleBatch, place: Place | None = None) -> Tensor:
        """(S, items, C) of every sample group; only for heads and label sets of up to 1024 classes.

        ``place``: what is random, by default the scorer's own.
        """
        return self._reduced(batch, samples, place, True, _every_sample, 1)

    def averages(self, batch: Batch, samples: SampleBatch, parts: int, place: Place | None = None) -> Tensor:
        """Log of the mean probability (parts, items, C) over each of so many equal parts of the sample groups.

        One fused batch, as :meth:`samples`, and for as few classes. Of sequences that are scored by their tokens it is the
        product of the tokens' means, normalised.
        """
        if self.sequences is None or self.sequences.score == "sequence":
            return log_means(self.samples(batch, samples, place), parts)
        return self._reduced(batch, samples, place, True, lambda results: log_means(_every_sample(results), parts), 1)

    def average(self, batch: Batch, samples: SampleBatch, place: Place | None = None) -> Tensor:
        """Log of the mean probability (items, C) over all sample groups, without keeping any of a large head's."""
        if self.sequences is not None:
            return self.averages(batch, samples, 1, place)[0]
        return self._reduced(batch, samples, place, False, mixture, 0)

    def _reduced(
        self,
        batch: Batch,
        samples: SampleBatch | None,
        place: Place | None,
        keep: bool,
        reduce: Callable[[Iterator[Result]], Tensor],
        dim: int,
    ) -> Tensor:
        """What ``reduce`` makes of the passes over a batch, at its items, which are the axis ``dim``."""

        def whole(batch: Batch) -> Tensor:
            return self.items(reduce(self._passes(batch, samples, place, keep)), batch, stacked=dim == 1)

        values = self.memory.whole_or_halves(batch, whole, lambda parts: torch.cat(parts, dim=dim))
        return choice_logs(self.sequences, values, batch)

    def _passes(self, batch: Batch, samples: SampleBatch | None, place: Place | None, keep: bool) -> Iterator[Result]:
        place = self.place if place is None else place
        request = Request(
            batch.inputs,
            None,
            place,
            keep and batch.targets is None,
            batch.columns,
            batch.targets,
            key=batch.key,
            branches=batch.branches,
            answers=labelled_lengths(batch),
        )
        if samples is None:
            yield self.memory.once(lambda: run(self.adapter, request))
            return
        trunk: Trunk | None = None

        def call(part: SampleBatch) -> Result:
            nonlocal trunk
            trunk = self._trunk_for(batch, place, len(part) < len(samples))
            return run(self.adapter, replace(request, samples=part, trunk=trunk))

        tokens = int(mask_of(batch).sum())
        share = 1.0 if place.span is None else min(1.0, self.random_tokens(batch, place) / tokens)
        for result in self.memory.passes(batch, samples, call, share):
            self.tokens_run += round(share * tokens * result.size)
            yield result
        if not self.keep_trunk and trunk is not None:
            trunk.forget(batch.key)

    # The trunk ----------------------------------------------------------------------------------------------------------

    def random_tokens(self, batch: Batch, place: Place) -> int:
        """Of all rows of a batch, for one sample."""
        span = place.span or 1
        if batch.branches is not None:
            return int(batch.branches.valid.sum()) + span * len(batch) * batch.branches.count
        lengths = answer_lengths(Request(batch.inputs, targets=batch.targets, answers=labelled_lengths(batch)))
        return (len(batch) if lengths is None else int(lengths.sum())) + (span - 1) * len(batch)

    def _trunk_for(self, batch: Batch, place: Place, several_passes: bool) -> Trunk | None:
        if trunk_of(place) == 0 or not (self.keep_trunk or several_passes) or not self._firsts:
            return None
        if place.span is not None and not (self._pools or batch.branches or "logits_to_keep" in batch.inputs):
            return None  # logits of the prompt are asked for, which its keys and values do not give
        if self.trunk is None:
            config = self.model.config.get_text_config()
            width = config.hidden_size
            tokens = sum(b.inputs["input_ids"].numel() for b in self.batches) if self.keep_trunk else 0
            widths = [width] * sum(first != PROMPT for first in self._firsts)
            if PROMPT in self._firsts:
                heads = config.num_attention_heads
                one = getattr(config, "head_dim", None) or width // heads
                shared = getattr(config, "num_key_value_heads", None) or heads
                widths.append(2 * len(self.adapter.anatomy.blocks) * shared * one)
            size = tokens * sum(widths) * next(self.model.parameters()).element_size()
            self.trunk = Trunk(self._firsts, *room_for_trunk(self.device, size))
        return self.trunk

    def _split_trunk(self, batch: Batch, halves: Sequence[Batch]) -> None:
        if self.trunk is not None:
            middle = len(halves[0].index)
            self.trunk.split(batch.key, [(halves[0].key, slice(middle)), (halves[1].key, slice(middle, None))])


def trunk_of(place: Place) -> int:
    """What :class:`~tfb_ext.forward.trunk.Trunk` keeps for it; 0 for nothing."""
    return place.first if place.span is None else PROMPT


def answer_lengths(request: Request) -> Tensor | None:
    """(B,) tokens of each row from the first position on that has one of the targets of the last positions; ``None`` where an answer
    is read from the last token."""
    inputs, targets = request.inputs, request.targets
    if targets is None or request.branches is not None:
        return request.answers
    asked = (targets >= 0).flatten(2).any(2) if targets.dim() > 2 else targets >= 0
    behind = asked.cumsum(1) > 0
    mask = inputs.get("attention_mask")
    if mask is not None:
        behind = behind & mask[:, -targets.shape[1] :].bool().to(behind.device)
    return behind.sum(1).clamp(min=1)


def _mean_of(results: Iterable[Result]) -> Tensor:
    """The mean adapter's one result: (B, ..., C), or (*targets.shape) where targets were asked for."""
    (result,) = results
    return result.average if result.targets is None else result.targets[0]


def _every_sample(results: Iterable[Result]) -> Tensor:
    """(S, B, ..., C), or (S, *targets.shape) where targets were asked for."""
    found = (result.targets if result.targets is not None else result.samples for result in results)
    return torch.cat([values for values in found if values is not None])
