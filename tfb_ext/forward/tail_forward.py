"""A batch's forward with a graph from the first random layer on: the prompt by itself where that can be, without one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Place
from .anatomy import CLASSIFIER_HEADS
from .attention import attending_causally
from .batch import Batch, labelled_lengths, mask_of
from .batches import IGNORED, Batches
from .caches import FilledError, cache_argument, filling_cache
from .engine import Request, answer_lengths
from .recording import Recording, by_kernels, recording
from .rows import at_targets
from .tail import tail_of

# What a batch may hold for its prompt to be run apart, each (rows, tokens).
_PLAIN = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}


@dataclass(frozen=True)
class Plan:
    """How a batch is run: what of it the host must know.

    Attributes:
        tail: so many last tokens are run apart from the prompt before them, which has no graph; 0 for one call.
        everything: whether all tokens that have a graph are random.
        padded: whether any token is masked.
        alone: whether each row has one item.
        rows_per_item: as of the batch.
    """

    tail: int
    everything: bool
    padded: bool
    alone: bool
    rows_per_item: int


@dataclass(frozen=True)
class Outputs:
    """Of a batch that was run, with a graph: (M, D) outputs, and (M,) the row of each; ``None`` if these are the rows."""

    values: Tensor
    rows: Tensor | None
    recording: Recording
    random: Tensor  # (B, N) bool, of the tokens that have a graph
    plan: Plan


class TailForward(Batches):
    """Batches whose random tokens, and all behind them, have a graph.

    Attributes:
        place: what is random.
        updates: its layers.
        is_causal: whether rows without padding attend without a mask, until a layer says otherwise.
    """

    is_causal = True

    def at(self, place: Place) -> None:
        self.place, attached = place, self.adapter.attached
        self.updates = [u for u in attached.updates if u.block >= place.first]

    def planned(self, batch: Batch) -> tuple[Batch, Tensor, Plan]:
        """A batch as it is run, and (B, N) which of the tokens that have a graph are random."""
        mask, tail = mask_of(batch).bool(), 0
        whole = bool(mask.all())
        inputs = _own(batch.inputs)  # what nothing depends on has no gradient
        random, everything = torch.ones_like(mask), True
        if self.place.span is not None:
            counts = self._counts(batch, self.place.span)
            plain = whole and isinstance(counts, int)
            if whole and isinstance(counts, int):
                slots, together = min(counts, mask.shape[1]), True
                random[:, :-slots] = False
            else:
                found = tail_of(mask, counts)
                slots, together, random = found.slots, found.columns is None, mask & ~found.seen
            if together and self._ends_together(batch, slots, whole):
                tail = slots
                of_tokens = {n: getattr(batch, n) for n in ("labels", "targets")}
                cut = {n: v[:, -tail:] for n, v in of_tokens.items() if v is not None and v.dim() == 2}
                batch, random = replace(batch, **cut), random[:, -tail:]
            everything = (plain and tail > 0) or bool(random.all())
        elif batch.columns is not None and batch.targets is None and "logits_to_keep" in self._accepts:
            if whole or bool(mask[:, -1].all()):  # where the answers are read from
                inputs = inputs | {"logits_to_keep": 1}
        alone = batch.targets is not None or batch.columns is not None
        alone = alone or not (self.labels_tokens or batch.token_labelled)
        plan = Plan(tail, everything, not whole, alone, batch.rows_per_item)
        return replace(batch, inputs=inputs), random, plan

    def outputs(self, batch: Batch, random: Tensor, plan: Plan) -> Outputs:
        inputs = self._after_prompt(batch.inputs, plan) if plan.tail else batch.inputs
        with by_kernels(self.adapter), recording(self.adapter, self.updates) as calls, self._attending(plan):
            logits = self.model(**inputs).logits
        rows = None
        with torch.enable_grad():
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if batch.columns is not None:
                logits = logits.index_select(-1, batch.columns)
            if batch.targets is not None:
                values = self.items(at_targets(torch.log_softmax(logits, -1)[None], batch.targets)[0], batch)
                if self.sequences is not None and self.sequences.by_length:
                    values = values / (batch.targets != IGNORED).sum(-1, keepdim=True)
            else:
                values = self.items(logits, batch)
                if not plan.alone:
                    numbers = torch.arange(len(batch), device=logits.device).view(-1, *[1] * (logits.dim() - 1))
                    rows = self.items(numbers.expand(*logits.shape[:-1], 1), batch)[:, 0]
        return Outputs(values, rows, calls, random, plan)

    def random_tokens(self, batch: Batch, place: Place) -> int:
        """Of all rows of a batch."""
        lengths = mask_of(batch).sum(1)
        return int((lengths if place.span is None else lengths.clamp(max=self._counts(batch, place.span))).sum())

    def _counts(self, batch: Batch, span: int) -> int | Tensor:
        """Random tokens of each row that is long enough, of all or (B,): the span, and what of an answer follows where it is read from."""
        answers = answer_lengths(Request(batch.inputs, targets=batch.targets, answers=labelled_lengths(batch)))
        return span if answers is None else span - 1 + answers.to(batch.inputs["input_ids"])

    def _ends_together(self, batch: Batch, slots: int, whole: bool) -> bool:
        """Whether the prompt of random tokens in the last columns can be run by itself: the items are there too."""
        inputs, mask = batch.inputs, mask_of(batch)
        ids = inputs["input_ids"]
        tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor)}
        plain = tensors.keys() <= _PLAIN and all(v.shape == ids.shape for v in tensors.values())
        if not plain or slots >= ids.shape[1]:
            return False
        if not whole and ("position_ids" not in inputs or not bool(mask[:, -1].all())):
            return False  # where positions begin is the model's own rule
        pad = self.model.config.get_text_config().pad_token_id
        pools = self.adapter.anatomy.head_name in CLASSIFIER_HEADS  # at the last token that is no padding token
        return not pools or pad is None or not bool((ids[:, -1] == pad).any())

    def _attending(self, plan: Plan) -> AbstractContextManager[None]:
        plain = self.is_causal and not plan.padded and plan.tail in (0, 1)
        return attending_causally(self.model, len(self.adapter.anatomy.blocks)) if plain else nullcontext()

    def _after_prompt(self, inputs: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """The last columns' arguments, with the keys and values of those before, which are run without a graph."""
        cache = filling_cache(len(self.adapter.anatomy.blocks))
        of_tokens = {n: v for n, v in inputs.items() if isinstance(v, Tensor)}
        rest: dict[str, Any] = {n: v for n, v in inputs.items() if n not in of_tokens}
        rest |= {"use_cache": True, cache_argument(self.model): cache}
        none = {"logits_to_keep": inputs["input_ids"].new_empty(0)} if "logits_to_keep" in self._accepts else {}
        with suppress(FilledError), by_kernels(self.adapter), self._attending(plan):
            self.model(**{n: v[:, : -plan.tail] for n, v in of_tokens.items()}, **rest | none)
        del cache.update
        last = {n: v if n == "attention_mask" else v[:, -plan.tail :] for n, v in of_tokens.items()}
        return {**last, **rest}


def _own(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a graph can keep them."""
    return {n: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for n, v in inputs.items()}
