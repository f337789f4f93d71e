"""Class probabilities of a data set under the mean adapter and under many samples, the one engine of search and predict."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter import BayesianAdapter, Depth
from .data import Encoded
from .fan import CLASSIFIER_HEADS, Predictive, Trunk
from .layers import SampleBatch

IGNORED = -100
# Rows one fused forward may hold before its samples are split: enough to fill the machine, small enough for its memory.
ROWS_CUDA, ROWS_CPU = 512, 64
# Above this many classes (a vocabulary) per-sample results are not kept, only their average.
MANY_CLASSES = 1024

Data = Encoded | Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        key: its number, under which a trunk is kept.
        inputs: the model's arguments.
        labels: (B,) or (B, T) int64, or ``None``; ``-100`` is not counted.
        index: (B,) positions of the rows in the data set.
        columns: label tokens (C,), or ``None`` for the whole head.
        shifted: whether the logits at a position are about the next one (language models with (B, T) labels).
    """

    key: int
    inputs: dict[str, Any]
    labels: Tensor | None
    index: Tensor
    columns: Tensor | None
    shifted: bool


class Scorer:
    """Runs a data set through the model, with samples fused and chunked, and the trunk kept where that saves work.

    Args:
        adapter: the Bayesian adapter.
        data: an :class:`~tfb_ext.data.Encoded` set, or batches of model arguments (``input_ids``, ``attention_mask``,
            ``labels``): token labels (B, T) for language models, class labels (B,) for classification heads.
        depth: random blocks; ``None`` is the adapter's own.
        batch_size: rows of a batch before the fan.
        keep_trunk: keep the hidden states at the first random block for later calls of :meth:`samples`.
    """

    def __init__(
        self,
        adapter: BayesianAdapter,
        data: Data,
        *,
        depth: Depth | None = None,
        batch_size: int | None = None,
        keep_trunk: bool = False,
    ) -> None:
        self.adapter = adapter
        self.model = adapter.anatomy.model
        self.device = next(self.model.parameters()).device
        kind = adapter.anatomy.kind
        if kind != "categorical":
            raise ValueError(
                f"the model's head is {kind.replace('_', '-')}, whose outputs are no class probabilities; call the model inside "
                "adapter.predictive(...) instead"
            )
        self.depth: Depth = adapter.depth if depth is None else depth
        self.first = adapter.first_random_block(self.depth)
        cuda = self.device.type == "cuda"
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise ValueError(f"batch_size is {batch_size!r}, expected a count of rows, at least 1")
        self.batch_size = batch_size or (64 if cuda else 8)
        self.rows = max(ROWS_CUDA if cuda else ROWS_CPU, self.batch_size)
        self.keep_trunk = keep_trunk
        self._accepts = set(inspect.signature(self.model.forward).parameters)
        self.batches = list(self._prepare(data))
        if not self.batches:
            raise ValueError("the data set is empty, expected at least one example")
        self.tokens = sum(int(_mask(b).sum()) for b in self.batches)
        self.size = sum(len(b.index) for b in self.batches)
        self.tokens_run = 0
        self._trunk: Trunk | None = None

    def _prepare(self, data: Data) -> Iterator[Batch]:
        if isinstance(data, Encoded):
            head = data.choice_ids is None
            self._check_head(data)
            columns = None if head else torch.tensor(data.choice_ids, device=self.device)
            labels = data.labels_tensor() if data.labelled else None
            # Encoders read their first position, so padding goes to the right of it.
            left = not head or self.adapter.anatomy.head_name != "classifier"
            for key, made in enumerate(data.batches(self.batch_size, self.device, left=left)):
                index = made.pop("index").cpu()
                inputs: dict[str, Any] = {n: v for n, v in made.items() if n in self._accepts}
                if not head and "logits_to_keep" in self._accepts:
                    inputs["logits_to_keep"] = 1
                known = None if labels is None else labels[index].to(self.device)
                yield Batch(key, self._plain(inputs), known, index, columns, shifted=False)
            return
        start = 0
        for key, raw in enumerate(data):
            if not isinstance(raw, Mapping) or not isinstance(raw.get("input_ids"), Tensor):
                raise ValueError(
                    f"batch {key} is a {type(raw).__name__}, expected a mapping with tensors input_ids, attention_mask and "
                    "labels, or an Encoded set from tfb_ext.encode(examples, tokenizer)"
                )
            inputs = {n: v.to(self.device) for n, v in raw.items() if n != "labels" and isinstance(v, Tensor)}
            found = raw.get("labels")
            rows = len(inputs["input_ids"])
            yield Batch(
                key,
                self._plain(inputs),
                None if found is None else found.to(self.device),
                torch.arange(start, start + rows),
                None,
                # A model that generates predicts the next token; others label the token they stand on.
                shifted=self.adapter.anatomy.head_name not in CLASSIFIER_HEADS and self.model.can_generate(),
            )
            start += rows

    def _check_head(self, data: Encoded) -> None:
        name, classes = self.adapter.anatomy.head_name, head_outputs(self.adapter)
        if data.choice_ids is not None and name in CLASSIFIER_HEADS:
            raise ValueError(
                f"the model has a classification head ({name!r}, {classes} classes), but the data names label tokens; encode "
                "it with tfb_ext.encode(examples, tokenizer, head=True)"
            )
        if data.choice_ids is None and len(data.choices) != classes:
            raise ValueError(
                f"the data has {len(data.choices)} choices, {list(data.choices)!r}, and the model's head {name!r} {classes} "
                "outputs; expected one choice for each (for label tokens of a language model encode without head=True)"
            )

    def _plain(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "use_cache": False} if "use_cache" in self._accepts else inputs

    @property
    def labelled(self) -> bool:
        return all(batch.labels is not None for batch in self.batches)

    def mean(self, batch: Batch) -> Tensor:
        """Log probabilities (items, C) of the mean adapter."""
        with torch.no_grad():
            self.adapter._check_call()  # dropout, or another adapter, would be no mean of this one
            logits = self.model(**batch.inputs).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if batch.columns is not None:
            logits = logits.index_select(-1, batch.columns)
        return self.items(torch.log_softmax(logits, dim=-1), batch)

    def samples(self, batch: Batch, samples: SampleBatch) -> Tensor:
        """Log probabilities (S, items, C) of every sample group; only for heads and label sets of up to 1024 classes."""
        parts = [
            self.items(view.sample_outputs, batch, stacked=True) for view in self._passes(batch, samples, keep=True)
        ]
        return torch.cat(parts)

    def average(self, batch: Batch, samples: SampleBatch) -> Tensor:
        """Log of the mean probability (items, C) over all sample groups, without keeping any of them."""
        total: Tensor | None = None
        for view in self._passes(batch, samples, keep=False):
            assert view.folded is not None
            part = view.folded[0] + torch.log(torch.tensor(float(len(view.batch))))
            total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return self.items(total - torch.log(torch.tensor(float(len(samples)))), batch)

    def _passes(self, batch: Batch, samples: SampleBatch, keep: bool) -> Iterator[Predictive]:
        """Forwards over chunks of the sample groups; out of memory halves the chunk and goes on with the same samples."""
        rows = len(batch.index)
        chunk = max(1, min(len(samples), self.rows // max(rows, 1)))
        trunk = self._trunk_for(chunk < len(samples))
        tokens = int(_mask(batch).sum())
        start = 0
        while start < len(samples):
            part = samples.part(start, min(start + chunk, len(samples)))
            view = Predictive(part, columns=batch.columns, keep_samples=keep, trunk=trunk, key=batch.key)
            if not self._fits(view, batch):
                # Outside the handler: while it runs, the exception holds on to every tensor of the failed forward.
                if chunk == 1:
                    raise torch.OutOfMemoryError(
                        f"one sample of a batch of {rows} rows does not fit into memory; pass a smaller batch_size"
                    )
                chunk //= 2
                self.rows = chunk * rows
                trunk = self._trunk_for(True)
                torch.cuda.empty_cache()
                continue
            self.tokens_run += tokens * len(part)
            start += len(part)
            yield view
        if not self.keep_trunk and trunk is not None:
            trunk.hidden.pop(batch.key, None)

    def _fits(self, view: Predictive, batch: Batch) -> bool:
        try:
            with self.adapter.fanned(view, self.depth):
                self.model(**batch.inputs)
        except torch.OutOfMemoryError:
            return False
        return True

    def _trunk_for(self, several_passes: bool) -> Trunk | None:
        if self.first == 0 or not (self.keep_trunk or several_passes):
            return None
        if self._trunk is None:
            self._trunk = self.adapter.trunk(self.depth, self._trunk_device())
        return self._trunk

    def _trunk_device(self) -> torch.device | None:
        """Host memory where the whole trunk would take more than a quarter of the free device memory."""
        if self.device.type != "cuda":
            return None
        width = self.model.config.get_text_config().hidden_size
        size = (
            sum(b.inputs["input_ids"].numel() for b in self.batches)
            * width
            * next(self.model.parameters()).element_size()
        )
        free, _ = torch.cuda.mem_get_info(self.device)
        return torch.device("cpu") if self.keep_trunk and size > free / 4 else None

    def items(self, values: Tensor | None, batch: Batch, stacked: bool = False) -> Tensor:
        """The positions that carry a prediction: (B, C) or (B, T, C) -> (items, C), with a sample axis first if ``stacked``."""
        assert values is not None
        lead = (slice(None),) if stacked else ()
        if values.dim() == len(lead) + 2:  # a head over pooled rows
            return values
        if batch.columns is not None or not self._token_labels(batch):
            position = self._last_position(values.shape[-2], batch)
            return values[(*lead, torch.arange(len(batch.index), device=values.device), position)]
        labels = batch.labels
        assert labels is not None
        if batch.shifted:
            values, labels = values[..., :-1, :], labels[:, 1:]
        return values[(*lead, labels != IGNORED)]

    def _token_labels(self, batch: Batch) -> bool:
        return batch.labels is not None and batch.labels.dim() == 2

    def _last_position(self, width: int, batch: Batch) -> Tensor:
        """Rightmost attended position of each row, among the ``width`` positions that the head computed."""
        mask = _mask(batch)[:, -width:]
        return (torch.arange(width, device=mask.device) * mask).argmax(-1)


def item_labels(batch: Batch) -> Tensor:
    labels = batch.labels
    assert labels is not None
    if labels.dim() == 1:
        return labels
    labels = labels[:, 1:] if batch.shifted else labels
    return labels[labels != IGNORED]


def head_outputs(adapter: BayesianAdapter) -> int:
    """Number of outputs of the model's head."""
    head: Any = adapter.anatomy.head
    return int(getattr(head, "out_features", None) or adapter.anatomy.model.config.num_labels)


def _mask(batch: Batch) -> Tensor:
    mask = batch.inputs.get("attention_mask")
    return mask if mask is not None else torch.ones_like(batch.inputs["input_ids"])


def original_order(parts: Sequence[Tensor], batches: Sequence[Batch], dim: int) -> Tensor:
    """Concatenate per-batch results along ``dim`` in the data set's order, where every row has one item."""
    joined = torch.cat(list(parts), dim=dim)
    index = torch.cat([b.index for b in batches])
    # Token labels give any number of items a row; such batches are never reordered in the first place.
    return joined.index_select(dim, torch.argsort(index)) if joined.shape[dim] == len(index) else joined
