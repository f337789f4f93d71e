"""A data set as batches on the model's device, and which of a batch's outputs are its items'."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import BayesianAdapter
from ..checks import check_count
from ..data import Encoded
from .anatomy import CLASSIFIER_HEADS, Kind
from .batch import Batch, mask_of
from .inputs import IGNORED as IGNORED  # here too for those who score
from .inputs import Labels, ModelInputs
from .memory import BATCH_CPU, BATCH_CUDA, ROWS_CPU, room_for_tokens
from .rows import last_positions
from .tail import Branches

# At least: who wants them in random order looks at the results after each. With a span a batch costs little more than its launch, so
# a quarter of that.
SHUFFLED_BATCHES = 16

Data = Encoded | Iterable[Mapping[str, Tensor]]


class Batches:
    """A data set's batches.

    Args:
        adapter: the Bayesian adapter whose model they are for.
        data: an :class:`~tfb_ext.data.Encoded` set, or batches of model arguments (``input_ids``, ``attention_mask``,
            ``labels``): token labels (B, T) for language models, class labels (B,) for classification heads.
        batch_size: items of a batch before the fan; by default what a CPU's caches like, or what a GPU's memory has room for.
        samples: sample groups that calls will have, of which a batch should take about that many.
        span: of a row so many last tokens are random, all without it.
        share: whether the choices of a prompt may share its forward.
        shuffle: batches in a random order (always the same), instead of the longest first.
        shard: (rank, world size): every ``world size``-th batch only, from ``rank`` on.
        may_be_empty: whether no batch at all is no error.
        kind: what the head's outputs must be; other than classes, labels are not looked at.

    A model that labels tokens has an item for every labelled position, or for every attended one where there are no labels.
    An item whose choices are scored as sequences is one of C classes, and a row of its batch for each.
    """

    work = 1.0  # of a batch, see room_for_tokens

    def __init__(
        self,
        adapter: BayesianAdapter,
        data: Data,
        *,
        batch_size: int | None = None,
        samples: int = 10,
        span: int | None = None,
        share: bool = True,
        shuffle: bool = False,
        shard: tuple[int, int] = (0, 1),
        may_be_empty: bool = False,
        kind: Kind = "categorical",
    ) -> None:
        self.adapter = adapter
        self.model = adapter.anatomy.model
        self.device = adapter.anatomy.device
        _check_kind(adapter.anatomy.kind, kind)
        if any(p.dtype == torch.float64 for p in adapter.model.parameters()):
            raise ValueError(
                f"{type(self.model).__name__}: got weights of float64, expected float32, bfloat16 or float16, which the kernels "
                "take. Fix: model.float()"
            )
        self.kind: Kind = kind
        self.labels_tokens = type(self.model).__name__.endswith("ForTokenClassification")
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size, "a count of items")
        encoded = data if isinstance(data, Encoded) else None
        self.sequences = encoded if encoded is not None and encoded.choice_tokens is not None else None
        self._choices = len(self.sequences.choices) if self.sequences is not None else 1
        self.encoded = encoded
        self._rows = encoded if self.sequences is None else self.sequences.sequences()
        longest = None if self._rows is None else max(map(len, self._rows.token_ids), default=1)
        by_position = self.labels_tokens or adapter.anatomy.head_name not in CLASSIFIER_HEADS
        looked_at: Labels | None = None if kind != "categorical" else "positions" if by_position else "rows"
        self._inputs = ModelInputs(self.model, head_outputs(adapter), looked_at)
        if encoded is not None and self._rows is not None:
            self._check_head()
            self._inputs.encoded(encoded, self._rows)
            if (
                not 0 <= self._rows.pad_id < self._inputs.vocabulary
            ):  # a padding token that was added to the tokenizer alone
                self._rows = replace(self._rows, pad_id=0)
        self._labels = encoded.labels_tensor() if encoded is not None and encoded.labelled else None
        # Choices of one prompt share its forward where the model can hold them side by side.
        self._shared = share and self.sequences is not None and adapter.shares_prompts()
        self.rows_per_item = 1 if self._shared else self._choices
        self.most_rows = batch_size * self.rows_per_item if batch_size else BATCH_CUDA
        room = (
            room_for_tokens(self.model, self.device, self.work)
            if batch_size is None and self.device.type == "cuda"
            else 0
        )
        random = longest if span is None or longest is None else min(span, longest)
        per_row = 1 if longest is None or random is None else longest - random + random * max(samples, 1)
        rows = min(BATCH_CUDA, room // per_row) if room and longest else BATCH_CPU
        self.batch_size = batch_size or max(1, rows // self.rows_per_item)
        if batch_size is None and shuffle and encoded is not None:
            least = SHUFFLED_BATCHES if span is None else SHUFFLED_BATCHES // 4
            self.batch_size = max(1, min(self.batch_size, len(encoded) // least))
        self._accepts = set(inspect.signature(self.model.forward).parameters)
        self.batches = list(self._prepare(data, shuffle, shard))
        if not self.batches and not may_be_empty:
            raise ValueError("the data set is empty, expected at least one example")
        widest = max((b.inputs["input_ids"].shape[1] for b in self.batches), default=1)
        tallest = max((len(b.index) for b in self.batches), default=1)
        self.fitting_rows = max(room // widest if room else ROWS_CPU, tallest)
        self.tokens = sum(int(mask_of(b).sum()) for b in self.batches)
        self.size = sum(len(b.items) for b in self.batches)

    def _prepare(self, data: Data, shuffle: bool, shard: tuple[int, int]) -> Iterator[Batch]:
        rank, world = shard
        if isinstance(data, Encoded):
            groups = data.groups(self.batch_size)
            order = list(range(len(groups)))
            if shuffle:
                order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
            for key in order[rank::world]:
                yield self.encoded_batch(key, groups[key])
            return
        start = 0
        if not isinstance(data, Iterable) or isinstance(data, Mapping | str):
            raise ValueError(
                f"data: got a {type(data).__name__}, expected batches of model arguments. Fix: a list of them, or an Encoded set "
                "from tfb_ext.encode(examples, tokenizer)"
            )
        for key, raw in enumerate(data):
            if not isinstance(raw, Mapping) or not isinstance(raw.get("input_ids"), Tensor):
                raise ValueError(
                    f"batch {key} is a {type(raw).__name__}, expected a mapping with tensors input_ids, attention_mask and "
                    "labels, or an Encoded set from tfb_ext.encode(examples, tokenizer)"
                )
            checked = self._inputs.batch(key, raw)  # on every rank, so that all of them stop
            index = torch.arange(start, start + len(raw["input_ids"]))
            start += len(index)
            if key % world != rank:
                continue
            inputs = {n: v.to(self.device) for n, v in checked.items()}
            labels = inputs.pop("labels", None)
            # A model that generates predicts the next token; others label the token they stand on.
            shifted = self.adapter.anatomy.head_name not in CLASSIFIER_HEADS and self.model.can_generate()
            yield Batch(key, self._plain(inputs), labels, index, None, shifted)

    def encoded_batch(self, key: Hashable, items: Sequence[int]) -> Batch:
        data, rows = self._rows, self.rows_of(items)
        assert data is not None
        if self._shared:
            return self._shared_batch(key, items)
        columns = None if data.choice_ids is None else torch.tensor(data.choice_ids, device=self.device)
        targets: Tensor | None = None
        if data.targets is not None:
            wanted = [data.targets[i] for i in rows]
            most = max(map(len, wanted))
            targets = torch.tensor([[IGNORED] * (most - len(w)) + list(w) for w in wanted], device=self.device)
        made = data.collate(rows, self.device, left=self.padded_left)
        index = made.pop("index")
        inputs: dict[str, Any] = {n: v for n, v in made.items() if n in self._accepts}
        if targets is not None:
            keep, targets = last_positions(self.model, targets, made["input_ids"].shape[1])
            inputs |= keep
        elif columns is not None and "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = 1
        each = self.rows_per_item
        labels = None if self._labels is None else self._labels[index // each].to(self.device)
        return Batch(key, self._plain(inputs), labels, index, columns, False, targets, each)

    def _shared_batch(self, key: Hashable, items: Sequence[int]) -> Batch:
        """Prompts, each with its choices as branches."""
        data = self.sequences
        assert data is not None and data.choice_tokens is not None
        made = data.collate(items, self.device)
        index = made.pop("index")
        each = [data.choice_tokens if data.item_choice_tokens is None else data.item_choice_tokens[i] for i in items]
        most = max(len(choice) for choices in each for choice in choices)
        filled = torch.full((len(items), self._choices, most), IGNORED)
        for row, choices in enumerate(each):
            for column, choice in enumerate(choices):
                filled[row, column, : len(choice)] = torch.tensor(choice)
        targets = filled.to(self.device)
        read = targets[:, :, :-1]  # a choice's last token is only predicted
        branches = Branches(read.masked_fill(targets[:, :, 1:] == IGNORED, data.pad_id), targets[:, :, 1:] != IGNORED)
        inputs = {n: v for n, v in made.items() if n in self._accepts}
        labels = None if self._labels is None else self._labels[index].to(self.device)
        return Batch(key, self._plain(inputs), labels, index, None, False, targets.flatten(1), branches=branches)

    def rows_of(self, items: Sequence[int]) -> list[int]:
        each = self.rows_per_item
        return [item * each + choice for item in items for choice in range(each)]

    @property
    def padded_left(self) -> bool:
        # Encoders read their first position, so padding goes to the right of it.
        return self.adapter.anatomy.head_name != "classifier"

    def _check_head(self) -> None:
        data = self._rows
        assert data is not None
        name, classes = self.adapter.anatomy.head_name, head_outputs(self.adapter)
        tokens = data.choice_ids is not None or data.targets is not None
        if tokens and name in CLASSIFIER_HEADS:
            raise ValueError(
                f"the model has a classification head ({name!r}, {classes} classes), but the data names label tokens; encode "
                "it with tfb_ext.encode(examples, tokenizer, head=True)"
            )
        if self.labels_tokens:
            raise ValueError(
                f"{type(self.model).__name__} labels every token, but an Encoded set has one answer a prompt; pass batches of "
                "model arguments (input_ids, attention_mask, and labels (B, T) with -100 where no item is)"
            )
        if self.kind == "regression":
            return
        if not tokens and len(data.choices) != classes:
            raise ValueError(
                f"the data has {len(data.choices)} choices, {list(data.choices)!r}, and the model's head {name!r} {classes} "
                "outputs; expected one choice for each (for label tokens of a language model encode without head=True)"
            )

    def _plain(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "use_cache": False} if "use_cache" in self._accepts else inputs

    @property
    def labelled(self) -> bool:
        return all(batch.labels is not None for batch in self.batches)

    @property
    def classes(self) -> int:
        """Classes of an item."""
        if self.sequences is not None:
            return self._choices
        columns = next((b.columns for b in self.batches if b.columns is not None), None)
        return head_outputs(self.adapter) if columns is None else len(columns)

    def items(self, values: Tensor | None, batch: Batch, stacked: bool = False) -> Tensor:
        """The positions that carry a prediction: (B, C) or (B, T, C) -> (items, C), with a sample axis first if ``stacked``.

        With targets (B, m) -> (B, 1): the sum over a sequence's tokens; of B prompts with C choices (B * C, 1).
        """
        assert values is not None
        if batch.targets is not None:
            values = values.masked_fill(batch.targets == IGNORED, 0)
            if batch.branches is not None:
                values = values.unflatten(-1, (batch.branches.count, -1)).flatten(-3, -2)
            return values.sum(dim=-1, keepdim=True)
        lead = (slice(None),) if stacked else ()
        if values.dim() == len(lead) + 2:  # a head over pooled rows
            return values
        if self.labels_tokens and batch.labels is None:
            return values[(*lead, mask_of(batch).bool())]
        if batch.columns is not None or not batch.token_labelled:
            position = self._last_position(values.shape[-2], batch)
            return values[(*lead, torch.arange(len(batch.index), device=values.device), position)]
        labels = batch.labels
        assert labels is not None
        if batch.shifted:
            values, labels = values[..., :-1, :], labels[:, 1:]
        return values[(*lead, labels != IGNORED)]

    def _last_position(self, width: int, batch: Batch) -> Tensor:
        """Rightmost attended position of each row, among the ``width`` positions that the head computed."""
        mask = mask_of(batch)[:, -width:]
        return (torch.arange(width, device=mask.device) * mask).argmax(-1)


def choice_logs(data: Encoded | None, values: Tensor, batch: Batch) -> Tensor:
    """Sequences' log probabilities (..., rows, 1) -> their items' (..., items, C); anything else as it is."""
    if data is None or batch.targets is None:
        return values
    counted = batch.targets != IGNORED
    lengths = counted if batch.branches is None else counted.unflatten(-1, (batch.branches.count, -1)).flatten(0, 1)
    return data.choice_log_probabilities(values[..., 0], lengths.sum(dim=-1))


def _check_kind(found: Kind, expected: Kind) -> None:
    if found == expected:
        return
    calls = {"categorical": "predict", "multi_label": "predict_multi_label", "regression": "predict_regression"}
    what = {
        "categorical": "no class probabilities",
        "multi_label": "no independent probabilities of labels",
        "regression": "no values of a regression",
    }[expected]
    raise ValueError(
        f"the model's head is {found.replace('_', '-')}, whose outputs are {what}; use tfb_ext.{calls[found]}(...), or call the "
        "model inside adapter.predictive(...)"
    )


def head_outputs(adapter: BayesianAdapter) -> int:
    """Number of outputs of the model's head."""
    head: Any = adapter.anatomy.head
    return int(getattr(head, "out_features", None) or adapter.anatomy.model.config.num_labels)


def original_order(parts: Sequence[Tensor], batches: Sequence[Batch], dim: int) -> Tensor:
    """Concatenate per-batch results along ``dim`` in the data set's order, where no row has several items."""
    joined = torch.cat(list(parts), dim=dim)
    index = torch.cat([b.items for b in batches])
    # Token labels give any number of items a row; such batches are never reordered in the first place.
    return joined.index_select(dim, torch.argsort(index)) if joined.shape[dim] == len(index) else joined
