"""Class probabilities of a data set under the mean adapter and under many samples, the one engine of search and predict."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import BayesianAdapter, Depth
from ..adapters.layers import SampleBatch
from ..checks import check_count
from ..data import Encoded
from .fan import CLASSIFIER_HEADS, Kind, Predictive, Trunk, at_targets, last_position_only, last_positions
from .inputs import IGNORED as IGNORED  # here too for those who score
from .inputs import Labels, ModelInputs

# On a CPU, rows of a batch, and rows one fused forward may hold before its samples are split: what its caches like.
BATCH_CPU, ROWS_CPU = 8, 64
# On a GPU a forward takes so many operations that launching it costs little beside (most of a second of an H100), as far as
# its tokens fit into this share of the free memory, by a rough count of what a block holds at a time.
OPERATIONS, MEMORY_SHARE, MOST_TOKENS, FEWEST_TOKENS = 4e14, 1 / 6, 2**18, 2**10
BATCH_CUDA = 1024  # most rows of a batch
SHUFFLED_BATCHES = 16  # at least: who wants them in random order looks at the results after each
# Above this many classes (a vocabulary) per-sample results are not kept, only their average.
MANY_CLASSES = 1024

Data = Encoded | Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device.

    Attributes:
        key: its number in the data set, under which a trunk is kept; halves of it add to that.
        inputs: the model's arguments.
        labels: (B,) or (B, T) int64, or ``None``; ``-100`` is not counted.
        index: (B,) positions of the rows in the data set; row ``c`` of item ``i`` is ``i * rows_per_item + c``.
        columns: label tokens (C,), or ``None`` for the whole head.
        targets: (B, m) tokens after the last m positions, to score as sequences, ``-100`` before shorter ones; or ``None``.
        shifted: whether the logits at a position are about the next one (language models with (B, T) labels).
        rows_per_item: choices that are scored as sequences have a row each, side by side; else 1.
    """

    key: Hashable
    inputs: dict[str, Any]
    labels: Tensor | None
    index: Tensor
    columns: Tensor | None
    shifted: bool
    targets: Tensor | None = None
    rows_per_item: int = 1

    @property
    def items(self) -> Tensor:
        """Positions of the items in the data set, in their order here; not of halves, which may part an item's rows."""
        return self.index[:: self.rows_per_item] // self.rows_per_item

    @property
    def token_labelled(self) -> bool:
        """Whether labels are of positions, (B, T), so that a row has any number of items."""
        return self.labels is not None and self.labels.dim() == 2

    def halves(self) -> tuple[Batch, Batch]:
        """The upper and the lower half of the rows, of at least two."""
        middle = len(self.index) // 2
        return self.part((self.key, 0), slice(middle)), self.part((self.key, 1), slice(middle, None))

    def part(self, key: Hashable, rows: slice | Tensor) -> Batch:
        """Some of the rows, under a key of their own."""
        size = len(self.index)
        inputs = {n: v[rows] if isinstance(v, Tensor) and v.shape[:1] == (size,) else v for n, v in self.inputs.items()}
        labels = None if self.labels is None else self.labels[rows]
        targets = None if self.targets is None else self.targets[rows]
        return replace(self, key=key, inputs=inputs, labels=labels, index=self.index[rows], targets=targets)


class _DoesNotFitError(Exception):
    """One sample of a batch does not fit into memory."""


class Scorer:
    """Runs a data set through the model, with samples fused and chunked, and the trunk kept where that saves work.

    Args:
        adapter: the Bayesian adapter.
        data: an :class:`~tfb_ext.data.Encoded` set, or batches of model arguments (``input_ids``, ``attention_mask``,
            ``labels``): token labels (B, T) for language models, class labels (B,) for classification heads.
        depth: random blocks; ``None`` is the adapter's own.
        batch_size: items of a batch before the fan; by default what a CPU's caches like, or what a GPU's memory has room for.
        samples: sample groups that calls will have, of which a batch should take about that many.
        keep_trunk: keep the hidden states at the first random block for later calls; a sequence of depths keeps those of each.
        shuffle: batches in a random order (always the same), instead of the longest first.
        shard: (rank, world size): run every ``world size``-th batch only, from ``rank`` on.
        may_be_empty: whether no batch at all is no error.
        kind: what the head's outputs must be; other than classes, labels are not looked at, and the methods below give log
            probabilities of each label, or the outputs themselves, where they say log probabilities of the classes.

    A model that labels tokens has an item for every labelled position, or for every attended one where there are no labels.
    An item whose choices are scored as sequences is one of C classes, and a row of its batch for each.
    """

    def __init__(
        self,
        adapter: BayesianAdapter,
        data: Data,
        *,
        depth: Depth | None = None,
        batch_size: int | None = None,
        samples: int = 10,
        keep_trunk: bool | Sequence[Depth] = False,
        shuffle: bool = False,
        shard: tuple[int, int] = (0, 1),
        may_be_empty: bool = False,
        kind: Kind = "categorical",
    ) -> None:
        adapter.check_ready()
        self.adapter = adapter
        self.model = adapter.anatomy.model
        self.device = next(self.model.parameters()).device
        _check_kind(adapter.anatomy.kind, kind)
        if any(p.dtype == torch.float64 for p in adapter.model.parameters()):
            raise ValueError(
                f"{type(self.model).__name__}: got weights of float64, expected float32, bfloat16 or float16, which the kernels "
                "take. Fix: model.float()"
            )
        self.kind: Kind = kind
        self.labels_tokens = type(self.model).__name__.endswith("ForTokenClassification")
        self.depth: Depth = adapter.depth if depth is None else depth
        self.first = adapter.first_random_block(self.depth)
        cuda = self.device.type == "cuda"
        if batch_size is not None:
            batch_size = check_count("batch_size", batch_size, "a count of items")
        encoded = data if isinstance(data, Encoded) else None
        self.sequences = encoded if encoded is not None and encoded.choice_tokens is not None else None
        choices = encoded.choice_tokens if encoded is not None and encoded.choice_tokens is not None else ((),)
        self._rows_per_item = len(choices)
        room = self._room_for_tokens() if cuda else 0
        self._most_rows = batch_size * self._rows_per_item if batch_size else BATCH_CUDA
        self._encoded = encoded
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
        self._selections = 0
        rows = min(BATCH_CUDA, room // (longest * max(samples, 1))) if cuda and longest else BATCH_CPU
        self.batch_size = batch_size or max(1, rows // self._rows_per_item)
        if batch_size is None and shuffle and encoded is not None:
            self.batch_size = max(1, min(self.batch_size, len(encoded) // SHUFFLED_BATCHES))
        self.keep_trunk = bool(keep_trunk)
        self._trunk_depths = tuple(keep_trunk) if isinstance(keep_trunk, Sequence) else (self.depth,)
        self._halves: dict[Hashable, tuple[Batch, Batch]] = {}
        self._accepts = set(inspect.signature(self.model.forward).parameters)
        self.batches = list(self._prepare(data, shuffle, shard))
        if not self.batches and not may_be_empty:
            raise ValueError("the data set is empty, expected at least one example")
        widest = max((b.inputs["input_ids"].shape[1] for b in self.batches), default=1)
        tallest = max((len(b.index) for b in self.batches), default=1)
        self.rows = max(room // widest if cuda else ROWS_CPU, tallest)
        self.tokens = sum(int(_mask(b).sum()) for b in self.batches)
        self.size = sum(len(b.items) for b in self.batches)
        self.tokens_run = 0
        self._trunk: Trunk | None = None

    def _prepare(self, data: Data, shuffle: bool, shard: tuple[int, int]) -> Iterator[Batch]:
        rank, world = shard
        if isinstance(data, Encoded):
            groups = data.groups(self.batch_size)
            order = list(range(len(groups)))
            if shuffle:
                order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
            for key in order[rank::world]:
                yield self._encoded_batch(key, groups[key])
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

    def _encoded_batch(self, key: Hashable, items: Sequence[int]) -> Batch:
        data, rows = self._rows, self._rows_of(items)
        assert data is not None
        columns = None if data.choice_ids is None else torch.tensor(data.choice_ids, device=self.device)
        targets: Tensor | None = None
        if data.targets is not None:
            wanted = [data.targets[i] for i in rows]
            most = max(map(len, wanted))
            targets = torch.tensor([[IGNORED] * (most - len(w)) + list(w) for w in wanted], device=self.device)
        made = data.collate(rows, self.device, left=self._padded_left)
        index = made.pop("index")
        inputs: dict[str, Any] = {n: v for n, v in made.items() if n in self._accepts}
        if targets is not None:
            keep, targets = last_positions(self.model, targets, made["input_ids"].shape[1])
            inputs |= keep
        elif columns is not None and "logits_to_keep" in self._accepts:
            inputs["logits_to_keep"] = 1
        each = self._rows_per_item
        labels = None if self._labels is None else self._labels[index // each].to(self.device)
        return Batch(key, self._plain(inputs), labels, index, columns, False, targets, each)

    def _rows_of(self, items: Sequence[int]) -> list[int]:
        each = self._rows_per_item
        return [item * each + choice for item in items for choice in range(each)]

    @property
    def _padded_left(self) -> bool:
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

    def _room_for_tokens(self) -> int:
        """Tokens that one forward may hold on this GPU."""
        config = self.model.config.get_text_config()
        hidden = config.hidden_size
        wide = getattr(config, "intermediate_size", None) or 4 * hidden
        size = next(self.model.parameters()).element_size()
        free, _ = torch.cuda.mem_get_info(self.device)
        idle = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        tokens = (free + idle) * MEMORY_SHARE / (size * (8 * hidden + 4 * wide))
        tokens = min(tokens, OPERATIONS / (2 * sum(p.numel() for p in self.model.parameters())))
        return int(min(max(tokens, FEWEST_TOKENS), MOST_TOKENS))

    def _plain(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "use_cache": False} if "use_cache" in self._accepts else inputs

    @property
    def labelled(self) -> bool:
        return all(batch.labels is not None for batch in self.batches)

    @property
    def classes(self) -> int:
        """Classes of an item."""
        if self.sequences is not None:
            return self._rows_per_item
        columns = next((b.columns for b in self.batches if b.columns is not None), None)
        return head_outputs(self.adapter) if columns is None else len(columns)

    def mean(self, batch: Batch) -> Tensor:
        """Log probabilities (items, C) of the mean adapter, PEFT's own arithmetic."""

        def run(batch: Batch) -> Tensor:
            with torch.no_grad():
                self.adapter.check_call()  # dropout, or another adapter, would be no mean of this one
                try:
                    one = batch.inputs.get("logits_to_keep") == 1
                    with last_position_only(self.adapter.anatomy) if one else nullcontext():
                        logits = self.model(**batch.inputs).logits
                except torch.OutOfMemoryError:
                    raise _DoesNotFitError from None
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if batch.targets is not None:
                return self.items(at_targets(torch.log_softmax(logits, dim=-1)[None], batch.targets)[0], batch)
            if batch.columns is not None:
                logits = logits.index_select(-1, batch.columns)
            if self.kind == "multi_label":
                logits = torch.nn.functional.logsigmoid(logits)
            elif self.kind == "categorical":
                logits = torch.log_softmax(logits, dim=-1)
            return self.items(logits, batch)

        return self._chosen(self._whole_or_halves(batch, run, dim=0), batch)

    def samples(self, batch: Batch, samples: SampleBatch, first: int | None = None) -> Tensor:
        """Log probabilities (S, items, C) of every sample group; only for heads and label sets of up to 1024 classes.

        ``first``: the first random block, by default the scorer's own.
        """

        def run(batch: Batch) -> Tensor:
            passes = self._passes(batch, samples, first, keep=True)
            found = (view.sample_outputs if batch.targets is None else view.target_log_probabilities for view in passes)
            return torch.cat([self.items(values, batch, stacked=True) for values in found])

        return self._chosen(self._whole_or_halves(batch, run, dim=1), batch)

    def averages(self, batch: Batch, samples: SampleBatch, parts: int, first: int | None = None) -> Tensor:
        """Log of the mean probability (parts, items, C) over each of so many equal parts of the sample groups.

        One fused batch, as :meth:`samples`, and for as few classes. Of sequences that are scored by their tokens it is the
        product of the tokens' means, normalised.
        """
        if self.sequences is None or self.sequences.score == "sequence":
            return _log_means(self.samples(batch, samples, first), parts)

        def run(batch: Batch) -> Tensor:
            found = [view.target_log_probabilities for view in self._passes(batch, samples, first, keep=True)]
            logs = torch.cat([values for values in found if values is not None])
            return self.items(_log_means(logs, parts), batch, stacked=True)

        return self._chosen(self._whole_or_halves(batch, run, dim=1), batch)

    def average(self, batch: Batch, samples: SampleBatch, first: int | None = None) -> Tensor:
        """Log of the mean probability (items, C) over all sample groups, without keeping any of a large head's."""
        if self.sequences is not None:
            return self.averages(batch, samples, 1, first)[0]

        def run(batch: Batch) -> Tensor:
            total: Tensor | None = None
            for view in self._passes(batch, samples, first, keep=False):
                assert view.folded is not None
                part = view.folded[0] + math.log(len(view.batch))
                total = part if total is None else torch.logaddexp(total, part)
            assert total is not None
            return self.items(total - math.log(len(samples)), batch)

        return self._whole_or_halves(batch, run, dim=0)

    def _chosen(self, values: Tensor, batch: Batch) -> Tensor:
        """Sequences' log probabilities (..., rows, 1) -> their items' (..., items, C); anything else as it is."""
        if self.sequences is None or batch.targets is None:
            return values
        return self.sequences.choice_log_probabilities(values[..., 0], (batch.targets != IGNORED).sum(dim=-1))

    def _whole_or_halves(self, batch: Batch, run: Callable[[Batch], Tensor], dim: int) -> Tensor:
        """``run(batch)``; where a batch does not fit into memory, its halves one after the other, now and ever after."""
        if batch.key not in self._halves:
            try:
                return run(batch)
            except _DoesNotFitError:
                pass
            # Outside the handler: while it runs, the exception holds on to every tensor of the failed forward.
            rows = len(batch.index)
            if rows == 1:
                length = batch.inputs["input_ids"].shape[1]
                raise torch.OutOfMemoryError(
                    f"one sample of one row of {length} tokens does not fit into memory; free some, shorten the rows, or load "
                    "the model in a smaller type"
                )
            self.rows = max(1, min(self.rows, rows // 2))
            halves = self._halves[batch.key] = batch.halves()
            if self._trunk is not None:
                middle = len(halves[0].index)
                self._trunk.split(batch.key, [(halves[0].key, slice(middle)), (halves[1].key, slice(middle, None))])
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return torch.cat([self._whole_or_halves(half, run, dim) for half in self._halves[batch.key]], dim=dim)

    def _passes(self, batch: Batch, samples: SampleBatch, first: int | None, keep: bool) -> Iterator[Predictive]:
        """Forwards over chunks of the sample groups; out of memory halves the chunk and goes on with the same samples."""
        first = self.first if first is None else first
        rows = len(batch.index)
        chunk = max(1, min(len(samples), self.rows // max(rows, 1)))
        trunk = self._trunk_for(first, chunk < len(samples))
        tokens = int(_mask(batch).sum())
        start = 0
        while start < len(samples):
            part = samples.part(start, min(start + chunk, len(samples)))
            view = Predictive(
                part,
                columns=batch.columns,
                targets=batch.targets,
                keep_samples=keep and batch.targets is None,
                trunk=trunk,
                key=batch.key,
            )
            if not self._fits(view, batch, first):
                if chunk == 1:
                    raise _DoesNotFitError
                chunk = min(chunk, len(part)) // 2 or 1
                self.rows = chunk * rows
                trunk = self._trunk_for(first, True)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            self.tokens_run += tokens * len(part)
            start += len(part)
            yield view
        if not self.keep_trunk and trunk is not None:
            trunk.forget(batch.key)

    def _fits(self, view: Predictive, batch: Batch, first: int) -> bool:
        try:
            with self.adapter.fanned_at(first, view):
                self.model(**batch.inputs)
        except torch.OutOfMemoryError:
            return False
        return True

    def select(self, items: Tensor, samples: int) -> Iterator[Batch]:
        """Batches of some items of the data set, each good until the next is asked for, for another call with new samples.

        Their hidden states are rows of the kept trunk, moved to where the padding of the new batch has them, so that no block
        below the first random one runs again (but for items that the trunk's limit left out, and where nothing is kept). Items
        of an :class:`~tfb_ext.data.Encoded` set are packed anew, in the order of their lengths; those of other batches stay
        with the rest of their batch.

        Args:
            items: int64 (n,), positions of items in the data set.
            samples: sample groups that the call will have; a batch takes about as many rows as one forward may hold.
        """
        homes = [leaf for batch in self.batches for leaf in self._leaves(batch)]
        if self._trunk is not None and self._trunk.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # rows are picked on the host, where copies may still be on their way
        packed = self._encoded is not None
        for batch in self._packed(homes, items.tolist(), samples) if packed else self._shrunk(homes, items):
            yield batch
            self._forget(batch)

    def _leaves(self, batch: Batch) -> Iterator[Batch]:
        """The batch, or the halves of it that were found to fit into memory."""
        if batch.key not in self._halves:
            yield batch
        else:
            for half in self._halves[batch.key]:
                yield from self._leaves(half)

    def _forget(self, batch: Batch) -> None:
        if self._trunk is not None:
            self._trunk.forget(batch.key)
        for half in self._halves.pop(batch.key, ()):
            self._forget(half)

    def _shrunk(self, homes: Sequence[Batch], items: Tensor) -> Iterator[Batch]:
        wanted = torch.isin(torch.cat([home.index for home in homes]), items)
        for home, here in zip(homes, wanted.split([len(home.index) for home in homes]), strict=True):
            if not here.any():
                continue
            rows = here.nonzero()[:, 0]
            batch = home.part(self._next_key(), rows)
            self._move_trunk(batch, [(home, rows.tolist(), list(range(len(rows))))])
            yield batch

    def _packed(self, homes: Sequence[Batch], items: Sequence[int], samples: int) -> Iterator[Batch]:
        encoded = self._encoded
        assert encoded is not None
        places = {index: (home, row) for home in homes for row, index in enumerate(home.index.tolist())}
        kept = {item: all(self._is_kept(places[row][0]) for row in self._rows_of([item])) for item in items}
        size = max(1, min(self.rows // samples, self._most_rows) // self._rows_per_item)
        for from_trunk in (True, False):
            some = [item for item in items if kept[item] is from_trunk]
            for group in encoded.select(some).groups(size):
                batch = self._encoded_batch(self._next_key(), [some[i] for i in group])
                sources: dict[Hashable, tuple[Batch, list[int], list[int]]] = {}
                for target, index in enumerate(batch.index.tolist()):
                    home, row = places[index]
                    _, rows, targets = sources.setdefault(home.key, (home, [], []))
                    rows.append(row)
                    targets.append(target)
                if from_trunk:
                    self._move_trunk(batch, list(sources.values()))
                yield batch

    def _is_kept(self, home: Batch) -> bool:
        return self._trunk is not None and (self.first, home.key) in self._trunk.hidden

    def _next_key(self) -> Hashable:
        self._selections += 1
        return "selection", self._selections

    def _move_trunk(self, batch: Batch, sources: Sequence[tuple[Batch, list[int], list[int]]]) -> None:
        """Keep for ``batch`` what its rows have in the trunk: of each source the rows, and which rows of ``batch`` they are."""
        trunk, width = self._trunk, batch.inputs["input_ids"].shape[1]
        if trunk is None or not all(self._is_kept(home) for home, _, _ in sources):
            return
        # At the head there may be less than a hidden state a position: the last one's, or a pooled one.
        last = self.first == len(self.adapter.anatomy.blocks) and "logits_to_keep" in batch.inputs
        moved: Tensor | None = None
        for home, rows, targets in sources:
            hidden = trunk.hidden[self.first, home.key][rows].to(self.device)
            if hidden.dim() == 3 and not last:
                missing = width - hidden.shape[1]
                # A negative number cuts padding off.
                hidden = torch.nn.functional.pad(
                    hidden, (0, 0, missing, 0) if self._padded_left else (0, 0, 0, missing)
                )
            if moved is None:
                moved = hidden.new_empty(len(batch.index), *hidden.shape[1:])
            moved[targets] = hidden
        assert moved is not None
        trunk.hidden[self.first, batch.key] = moved

    def _trunk_for(self, first: int, several_passes: bool) -> Trunk | None:
        if first == 0 or not (self.keep_trunk or several_passes):
            return None
        if self._trunk is None:
            self._trunk = self.adapter.trunk(*self._trunk_depths)
            self._trunk.device, self._trunk.limit = self._trunk_room(len(self._trunk.firsts))
        return self._trunk if self._trunk.firsts else None

    def _trunk_room(self, kept: int) -> tuple[torch.device | None, float]:
        """Where the inputs of so many blocks go and how many bytes of them: where the whole trunk would take more than a quarter of
        the device's free memory, to host memory, up to half of what is free there."""
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_AVPHYS_PAGES")
        host = page * pages / 2
        if self.device.type != "cuda" or not self.keep_trunk:
            return None, host if self.device.type == "cpu" else math.inf
        width = self.model.config.get_text_config().hidden_size
        tokens = sum(b.inputs["input_ids"].numel() for b in self.batches)
        size = tokens * width * next(self.model.parameters()).element_size() * kept
        free, _ = torch.cuda.mem_get_info(self.device)
        return (torch.device("cpu"), host) if size > free / 4 else (None, math.inf)

    def items(self, values: Tensor | None, batch: Batch, stacked: bool = False) -> Tensor:
        """The positions that carry a prediction: (B, C) or (B, T, C) -> (items, C), with a sample axis first if ``stacked``.

        With targets (B, m) -> (B, 1): the sum over a sequence's tokens.
        """
        assert values is not None
        if batch.targets is not None:
            return values.masked_fill(batch.targets == IGNORED, 0).sum(dim=-1, keepdim=True)
        lead = (slice(None),) if stacked else ()
        if values.dim() == len(lead) + 2:  # a head over pooled rows
            return values
        if self.labels_tokens and batch.labels is None:
            return values[(*lead, _mask(batch).bool())]
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
        mask = _mask(batch)[:, -width:]
        return (torch.arange(width, device=mask.device) * mask).argmax(-1)


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


def item_labels(batch: Batch) -> Tensor:
    labels = batch.labels
    assert labels is not None
    if labels.dim() == 1:
        return labels[:: batch.rows_per_item]
    labels = labels[:, 1:] if batch.shifted else labels
    return labels[labels != IGNORED]


def _log_means(logs: Tensor, parts: int) -> Tensor:
    """Log probabilities (S, ...) -> (parts, ...): log of the mean over each of so many equal parts of the first axis."""
    logs = logs.reshape(parts, -1, *logs.shape[1:])
    return torch.logsumexp(logs, dim=1) - math.log(logs.shape[1])


def head_outputs(adapter: BayesianAdapter) -> int:
    """Number of outputs of the model's head."""
    head: Any = adapter.anatomy.head
    return int(getattr(head, "out_features", None) or adapter.anatomy.model.config.num_labels)


def _mask(batch: Batch) -> Tensor:
    mask = batch.inputs.get("attention_mask")
    return mask if mask is not None else torch.ones_like(batch.inputs["input_ids"])


def original_order(parts: Sequence[Tensor], batches: Sequence[Batch], dim: int) -> Tensor:
    """Concatenate per-batch results along ``dim`` in the data set's order, where no row has several items."""
    joined = torch.cat(list(parts), dim=dim)
    index = torch.cat([b.items for b in batches])
    # Token labels give any number of items a row; such batches are never reordered in the first place.
    return joined.index_select(dim, torch.argsort(index)) if joined.shape[dim] == len(index) else joined
