"""The outputs' covariance under the posterior to first order, from gradients of one run of the mean adapter.

With the random weights ``s U (M + sigma E)`` of every layer, to first order in sigma ::

    Cov(z_c, z_d) = sigma^2 K_cd,    K_cd = sum_layers s^2 sum_{t,u} <U^T d_t^c, U^T d_u^d> <x_t, x_u>

over the random positions t, u, where ``x_t`` is a layer's input and ``d_t^c`` the gradient of output c at the layer's output. Noise that
is drawn anew for every token (modes ``"token"`` and ``"flipout"``) leaves the terms ``t = u``.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.adapter import BayesianAdapter, Place
from ..adapters.layer import SampledUpdate
from ..errors import SamplingError, refusal
from .anatomy import CLASSIFIER_HEADS, Kind
from .batch import Batch, labelled_lengths, mask_of
from .batches import IGNORED, Batches, Data, head_outputs, original_order
from .caches import cache_argument
from .contexts import check_free
from .engine import MANY_CLASSES, Request, answer_lengths
from .gradients import by_token, jointly
from .memory import Memory
from .recording import Call, Recording, by_kernels, recording
from .rows import at_targets
from .tail import Tail, tail_of

# Of more outputs, the largest of each item are random: every one costs a backward pass.
MOST_OUTPUTS = 64
# What a batch may hold for its prompt to be run apart, each (rows, tokens).
_PLAIN = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}


@dataclass(frozen=True)
class Moments:
    """Of N items, float64 on the CPU.

    Attributes:
        mean: (N, C) the mean adapter's outputs.
        covariance: (N, k, k) of ``classes``, at sigma 1.
        classes: (N, k) int64, or ``None`` for all.
    """

    mean: Tensor
    covariance: Tensor
    classes: Tensor | None


@dataclass(frozen=True)
class _Outputs:
    """Of a batch that was run, with a graph: (M, D) outputs, and (M,) the row of each."""

    values: Tensor
    rows: Tensor
    recording: Recording
    random: Tensor  # (B, N) bool, and whether all are
    everything: bool


def linearised(
    adapter: BayesianAdapter, data: Data, kind: Kind, batch_size: int | None = None, progress: bool = False
) -> Moments:
    """The mean and covariance of every item's outputs: logits of its classes or labels, log probabilities of sequences, or values.

    Raises:
        ValueError: empty data, a head of another kind, more than 1024 classes, or choices that are scored by their tokens.
        GuardError: samples at the adapter's depth and span are not what separate passes give.
        SamplingError: inside a sampling context, in training mode, or the adapter is merged, off or not active.
    """
    with ready(adapter, adapter.place):
        return Linear(adapter, data, adapter.place, batch_size=batch_size, kind=kind).moments(progress)


@contextmanager
def ready(adapter: BayesianAdapter, place: Place) -> Iterator[None]:
    """Inside, graphs may be recorded, whatever the caller's mode."""
    check_free(adapter.attached)
    adapter.attached.check_ready()
    with torch.inference_mode(False), torch.no_grad():
        adapter.attached.check_call()
        if not adapter.attached.is_on:
            raise SamplingError(
                f"adapter {adapter.name!r} is switched off (disable_adapter), expected it on: nothing is random. Fix: leave the with block"
            )
        adapter.check_place(place)
        yield


class Linear(Batches):
    """Runs a data set's batches with a graph from the first random layer on.

    Args:
        place: what is random; for several, that with most.
        options: of :class:`~tfb_ext.forward.batches.Batches`.
    """

    def __init__(self, adapter: BayesianAdapter, data: Data, place: Place, **options: Any) -> None:
        # A graph keeps what a forward holds for one block at a time.
        options |= {"samples": max(1, len(adapter.anatomy.blocks) - place.first), "span": place.span, "share": False}
        with torch.inference_mode(False):
            super().__init__(adapter, data, **options)
        if self.sequences is not None and self.sequences.score == "token":
            expected = "'sequence': the product of averages over samples has no distribution"
            raise refusal("the data's score", "'token'", expected, "encode(..., score='sequence'), or by='samples'")
        classes = head_outputs(adapter)
        if classes > MANY_CLASSES and any(b.columns is None and b.targets is None for b in self.batches):
            expected = f"at most {MANY_CLASSES}"
            raise refusal("the model's head", f"{classes} outputs", expected, "encode the data with label tokens")
        if self.batches and self.sequences is None and self.classes > MOST_OUTPUTS:
            warnings.warn(
                f"{self.classes} classes: each item's {MOST_OUTPUTS} most probable ones are random, the others stay at the mean",
                stacklevel=5,
            )
        self.memory = Memory(self.device)
        self.by_token = adapter.mode != "weight"
        self._at(place)

    def _at(self, place: Place) -> None:
        self.place, attached = place, self.adapter.attached
        self.updates = [u for u in attached.updates if u.block >= place.first]

    def moments(self, progress: bool) -> Moments:
        parts: list[tuple[Tensor, ...]] = []
        with tqdm(total=self.size, desc="linearise", unit="item", disable=not progress) as bar:
            for batch in self.batches:
                parts.append(self._whole(batch))
                bar.update(len(batch.items))
        mean, covariance, *classes = (original_order(p, self.batches, dim=0) for p in zip(*parts, strict=True))
        if not len(mean):
            raise refusal("labels", "-100 at every position", "at least one label", "leave the key out, or label some")
        return Moments(mean, covariance, classes[0] if classes else None)

    def of(self, batch: Batch, place: Place) -> Moments:
        """Of one batch's items at any place that is not deeper than the first."""
        with ready(self.adapter, place):
            self._at(place)
            mean, covariance, *classes = self._whole(batch)
        return Moments(mean, covariance, classes[0] if classes else None)

    def _whole(self, batch: Batch) -> tuple[Tensor, ...]:
        found = self.memory.whole_or_halves(batch, self._run, _joined)
        if not all(part.isfinite().all() for part in found):
            fix = "load the model in float32 or bfloat16, and look for NaN in its weights"
            raise refusal("the mean adapter's outputs and gradients", "NaN or infinity", "finite numbers", fix)
        return found

    def _run(self, batch: Batch) -> tuple[Tensor, ...]:
        """Mean, covariance and, of many, the classes of a batch's items."""
        if len(batch) % batch.rows_per_item:
            raise torch.OutOfMemoryError(
                f"one item of {batch.rows_per_item} choices does not fit into memory. Fix: free some, or shorten the rows"
            )
        found = self.memory.once(lambda: self._outputs(batch))
        return self.memory.once(lambda: self._moments(found, batch.rows_per_item))

    # Forward ------------------------------------------------------------------------------------------------------------

    def _outputs(self, batch: Batch) -> _Outputs:
        mask, tokens = mask_of(batch).bool(), batch.inputs["input_ids"].shape[1]
        random, inputs = torch.ones_like(mask), _own(batch.inputs)  # what nothing depends on has no gradient
        if self.place.span is not None:
            found = tail_of(mask, self._counts(batch, self.place.span))
            random, tail = mask & ~found.seen, found.slots
            if self._ends_together(batch, found):
                inputs = self._after_prompt(inputs, tail, tokens)
                of_tokens = {n: getattr(batch, n) for n in ("labels", "targets")}
                cut = {n: v[:, -tail:] for n, v in of_tokens.items() if v is not None and v.dim() == 2}
                batch, random = replace(batch, **cut), random[:, -tail:]
        elif batch.columns is not None and batch.targets is None and "logits_to_keep" in self._accepts:
            if bool(mask[:, -1].all()):  # where the answers are read from
                inputs = inputs | {"logits_to_keep": 1}
        with by_kernels(self.adapter), recording(self.adapter, self.updates) as calls:
            logits = self.model(**inputs).logits
        with torch.enable_grad():
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if batch.columns is not None:
                logits = logits.index_select(-1, batch.columns)
            if batch.targets is not None:
                values = self.items(at_targets(torch.log_softmax(logits, -1)[None], batch.targets)[0], batch)
                if self.sequences is not None and self.sequences.by_length:
                    values = values / (batch.targets != IGNORED).sum(-1, keepdim=True)
                rows = torch.arange(len(batch), device=values.device)
            else:
                values = self.items(logits, batch)
                numbers = torch.arange(len(batch), device=logits.device).view(-1, *[1] * (logits.dim() - 1))
                rows = self.items(numbers.expand(*logits.shape[:-1], 1), batch)[:, 0]
        return _Outputs(values, rows, calls, random, bool(random.all()))

    def random_tokens(self, batch: Batch, place: Place) -> int:
        """Of all rows of a batch."""
        lengths = mask_of(batch).sum(1)
        return int((lengths if place.span is None else self._counts(batch, place.span).minimum(lengths)).sum())

    def _counts(self, batch: Batch, span: int) -> Tensor:
        """(B,) random tokens of each row that is long enough: the span, and what of an answer follows where it is read from."""
        answers = answer_lengths(Request(batch.inputs, targets=batch.targets, answers=labelled_lengths(batch)))
        lengths = mask_of(batch).sum(1)
        return torch.full_like(lengths, span) if answers is None else span - 1 + answers.to(lengths)

    def _ends_together(self, batch: Batch, tail: Tail) -> bool:
        """Whether the prompt can be run by itself: all random tokens are in the last columns, where all items are."""
        inputs, mask = batch.inputs, mask_of(batch)
        ids = inputs["input_ids"]
        tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor)}
        plain = tensors.keys() <= _PLAIN and all(v.shape == ids.shape for v in tensors.values())
        if not plain or tail.columns is not None or tail.slots >= ids.shape[1] or not bool(mask[:, -1].all()):
            return False
        if "position_ids" not in inputs and not bool(mask.all()):
            return False  # where positions begin is the model's own rule
        pad = self.model.config.get_text_config().pad_token_id
        pools = self.adapter.anatomy.head_name in CLASSIFIER_HEADS  # at the last token that is no padding token
        return not pools or pad is None or not bool((ids[:, -1] == pad).any())

    def _after_prompt(self, inputs: dict[str, Any], tail: int, tokens: int) -> dict[str, Any]:
        """The last columns' arguments, with the keys and values of those before, which are run without a graph."""
        from transformers import DynamicCache

        of_tokens = {n: v for n, v in inputs.items() if isinstance(v, Tensor)}
        rest: dict[str, Any] = {n: v for n, v in inputs.items() if n not in of_tokens}
        rest |= {"use_cache": True, cache_argument(self.model): DynamicCache()}
        one = {"logits_to_keep": 1} if "logits_to_keep" in self._accepts else {}
        with by_kernels(self.adapter):
            self.model(**{n: v[:, : tokens - tail] for n, v in of_tokens.items()}, **rest | one)
        last = {n: v if n == "attention_mask" else v[:, -tail:] for n, v in of_tokens.items()}
        return {**last, **rest}

    # Backward -----------------------------------------------------------------------------------------------------------

    def _moments(self, found: _Outputs, rows_per_item: int) -> tuple[Tensor, ...]:
        values, rows = found.values, found.rows
        mean = values.detach()
        classes: tuple[Tensor, ...] = ()
        if values.shape[1] > MOST_OUTPUTS:
            classes = (mean.topk(MOST_OUTPUTS, dim=1).indices,)
            with torch.enable_grad():
                values = values.gather(1, classes[0])
        width = values.shape[1] * rows_per_item
        covariance = torch.zeros(len(values) // rows_per_item, width, width, dtype=torch.float64, device=mean.device)
        if values.requires_grad:
            # One item of every row at a time: rows do not see each other, so a sum over them has the gradient of each.
            same = rows[:, None] == rows
            place = same.tril(-1).sum(1)
            for turn in range(int(place.max()) + 1 if len(place) else 0):
                chosen = (place == turn).nonzero()[:, 0]
                part = self._covariance(found, values, chosen, rows_per_item)
                if rows_per_item > 1:
                    covariance = part
                else:
                    covariance[chosen] = part
        if rows_per_item > 1:
            mean = mean.view(-1, rows_per_item)
        return tuple(part.cpu() for part in (mean.double(), covariance, *classes))

    def _covariance(self, found: _Outputs, values: Tensor, chosen: Tensor, rows_per_item: int) -> Tensor:
        """(I, C, C) of the items ``chosen``, no two of a row; the outputs of one item may be those of several rows."""
        rows, calls = found.rows[chosen], found.recording.calls
        gradients: list[list[Tensor]] = [[] for _ in calls]
        for column in range(values.shape[1]):
            with torch.enable_grad():
                total = values[chosen, column].sum()
            for call, kept, part in zip(calls, gradients, found.recording.gradients(total), strict=True):
                kept.append(self._by_row(call, part, found)[rows.to(part.device)])
        layers: dict[SampledUpdate, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        inputs: dict[int, Tensor] = {}  # of layers that share theirs
        for call, kept in zip(calls, gradients, strict=True):
            if id(call.x) not in inputs:
                x = self._by_row(call, call.x.float(), found)[rows.to(call.x.device)]
                inputs[id(call.x)] = x.unflatten(0, (-1, rows_per_item))
            g = torch.stack(kept, 1) * call.update.module.scaling[self.adapter.name]
            layers[call.update].append((inputs[id(call.x)], g.unflatten(0, (-1, rows_per_item))))
        joined = [
            those[0] if len(those) == 1 else (torch.cat([x for x, _ in those], 2), torch.cat([g for _, g in those], 3))
            for those in layers.values()
        ]
        return (by_token if self.by_token else jointly)(joined).to(values.device)

    def _by_row(self, call: Call, value: Tensor, found: _Outputs) -> Tensor:
        """(B, K, ...) of a layer's input or output, 0 where nothing is random; pooled rows are one position each.

        Raises:
            SamplingError: it has no such rows.
        """
        name, (rows, tokens) = call.update.name, found.random.shape
        if value.dim() == 2 and value.shape[0] == rows:
            return value[:, None]
        if value.dim() == 2 and value.shape[0] == rows * tokens:
            value = value.unflatten(0, (rows, tokens))
        kept = value.shape[1] if value.dim() == 3 and value.shape[0] == rows else 0
        # A head may be given the last positions alone.
        if kept == tokens or (0 < kept < tokens and name == self.adapter.anatomy.head_name):
            return value if found.everything else value.masked_fill(~found.random[:, -kept:, None].to(value.device), 0)
        raise SamplingError(
            f"layer {name!r} has an input or output of shape {tuple(value.shape)}, expected {rows} rows of {tokens} tokens first. Fix: "
            "by='samples', or train the adapter without it in target_modules"
        )


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _own(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a graph can keep them."""
    return {n: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for n, v in inputs.items()}
