"""The anchors: run at any sigmas and depths, on one process or several, and remembered item by item."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.adapter import BayesianAdapter, Place
from ..errors import SamplingError
from ..forward.batch import item_labels
from ..forward.batches import IGNORED, Data
from ..forward.engine import MANY_CLASSES
from ..posterior.config import By
from .model_key import content, model_key
from .ranks import Ranks
from .records import FIELDS, MEAN_PLACE, Records, read_records
from .scorers import Linearised, Sampled

Settled = Callable[[Sequence[float]], set[float]]


class Anchors:
    """A data set under the mean adapter and at any sigmas.

    Args:
        by: what they are predicted by, ``"samples"`` or ``"linear"``.
        places: for which what all samples share is kept; the deepest first.
        shuffle: batches in random order.
        sharded: every rank brought its own anchors; otherwise all hold the same set and run a part of it.
        numbers, antithetic, mode: of the samples.
        pseudo: targets are the mean adapter's answers even where there are labels.
        metric: name of a metric of the caller's own, for which probabilities are kept.

    Raises:
        ValueError: no anchors.
        ConfigError: the checkpoint is of another search.
    """

    def __init__(
        self,
        adapter: BayesianAdapter,
        data: Data,
        ranks: Ranks,
        *,
        by: By,
        places: Sequence[Place],
        batch_size: int | None,
        shuffle: bool,
        sharded: bool,
        numbers: tuple[int, ...],
        antithetic: bool,
        mode: str,
        pseudo: bool,
        metric: str | None,
        checkpoint: Path | None,
        progress: bool,
    ) -> None:
        shard = (0, 1) if sharded else (ranks.rank, ranks.size)
        options = {"batch_size": batch_size, "shuffle": shuffle, "shard": shard, "may_be_empty": ranks.size > 1}
        self.scorer: Sampled | Linearised
        if by == "linear":
            self.scorer = Linearised(adapter, data, places, **options)
        else:
            self.scorer = Sampled(adapter, data, places, numbers, antithetic, mode, **options)
        scorer = self.scorer
        self.adapter = adapter
        self.ranks = ranks
        self.sharded = sharded
        self.keep_probabilities = metric is not None
        self.checkpoint = checkpoint if ranks.rank == 0 else None
        by_token = any(b.token_labelled for b in scorer.batches)
        classes = scorer.classes if scorer.batches else 0
        facts = zip(*ranks.every([scorer.labelled, classes, len(scorer.batches), by_token]), strict=True)
        labelled, heads, batches, in_turn = (list(map(int, fact)) for fact in facts)
        self.labelled = all(labelled)
        self.classes = max(heads)
        self.rounds = max(batches)  # of the rank that has most
        self.positions, self.size = self._lay_out(sharded or any(in_turn))
        if self.size == 0 and scorer.batches:
            raise ValueError("the anchors hold no label to score (all are -100), expected at least one")
        if self.size == 0:
            raise ValueError("the data set is empty, expected at least one example")
        self.local = sum(len(p) for p in self.positions)
        self.bar = tqdm(total=self.local, desc="search sigma", unit="anchor", disable=not progress or ranks.rank != 0)
        if not adapter.attached.is_on:
            raise SamplingError(
                f"adapter {adapter.name!r} is switched off, so no sigma changes anything, expected it on. Fix: search outside "
                "disable_adapter(), or call model.enable_adapter_layers()"
            )
        self.use_labels = self.labelled and not pseudo
        choices = scorer.sequences
        key = {
            "adapter": adapter.fingerprint(),
            "family": adapter.family,
            **model_key(adapter),
            "anchors": self._digest(),
            "items": self.size,
            "targets": "labels" if self.use_labels else "the mean adapter's answers",
            **scorer.key,
            "mode": mode,
            "metric": metric,
            "score": None if choices is None else choices.score + " by length" * choices.by_length,
        }
        known = None if self.checkpoint is None else read_records(self.checkpoint, key, self.classes)
        known = ranks.from_first(known)
        self.records: Records = self._baseline(key) if known is None else known

    @property
    def tokens(self) -> int:
        """Tokens times samples that went through the random blocks."""
        return self.scorer.tokens_run

    def forwards(self, place: Place) -> float:
        """Cost of a prediction, in forwards of the plain model."""
        share = 1 - place.first / len(self.adapter.anatomy.blocks)
        if place.span is not None:
            random = sum(self.scorer.random_tokens(batch, place) for batch in self.scorer.batches)
            share = min(1.0, random / max(self.scorer.tokens, 1))
        return self.scorer.forwards(place, share)

    # Who has which anchors --------------------------------------------------------------------------------------------

    def _lay_out(self, in_turn: bool) -> tuple[list[Tensor], int]:
        """Positions of each of this rank's batches' items among all items, and how many those are.

        An item is a row, in its own place, or (``in_turn``) items follow each other by the number of their batch and its rank.
        """
        batches = self.scorer.batches
        if not in_turn:
            return [b.items for b in batches], int(sum(row[0] for row in self.ranks.every([self.scorer.size])))
        counts = [len(item_labels(b)) if b.token_labelled else len(b.items) for b in batches]
        rows = [[b.key, count] for b, count in zip(batches, counts, strict=True)]
        parts = self.ranks.gather(torch.tensor(rows, dtype=torch.int64).reshape(-1, 2))
        turns = sorted((key, rank, count) for rank, part in enumerate(parts) for key, count in part.tolist())
        places, total = {}, 0
        for key, rank, count in turns:
            places[key, rank] = torch.arange(total, total + count)
            total += count
        return [places[b.key, self.ranks.rank] for b in batches], total

    def _digest(self) -> str:
        """Of all anchors in their order: every argument of the model, labels and classes, however they are batched and split."""
        total = 0
        for batch, positions in zip(self.scorer.batches, self.positions, strict=True):
            # A row's place: its own number, or where a rank's numbers are its own, that of its batch's first item and its place.
            places = batch.index.tolist()
            if self.sharded:
                start = int(positions[0]) if len(positions) else -1
                places = [(start, row) for row in range(len(places))]
            columns = None if batch.columns is None else batch.columns.tolist()
            inputs = {name: v.cpu() for name, v in sorted(batch.inputs.items()) if isinstance(v, Tensor)}
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            attended = mask.bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids).bool()
            for row, place in enumerate(places):
                label = None if batch.labels is None else batch.labels[row].tolist()
                wanted = None
                if batch.targets is not None:
                    wanted = (row % batch.rows_per_item, batch.targets[row][batch.targets[row] != IGNORED].tolist())
                    if batch.branches is not None:
                        wanted = (
                            batch.branches.count,
                            batch.targets[row].unflatten(0, (batch.branches.count, -1)).tolist(),
                        )
                digest = hashlib.sha256(repr((place, label, columns, wanted)).encode())
                for name, value in inputs.items():
                    if value.shape == ids.shape:  # padding does not count
                        digest.update(repr((name, value[row][attended[row]].tolist())).encode())
                    else:
                        own = value[row] if value.shape[:1] == ids.shape[:1] else value
                        digest.update(repr((name, str(own.dtype), tuple(own.shape))).encode() + content(own))
                total += int.from_bytes(digest.digest()[:7], "big")
        totals = self.ranks.gather(torch.tensor([total % 2**62], dtype=torch.int64))
        return f"{sum(int(t) for t in totals) % 2**62:016x}"

    # Runs -------------------------------------------------------------------------------------------------------------

    def _baseline(self, key: dict[str, Any]) -> Records:
        """The mean adapter."""
        rows: list[Tensor] = []
        kept: list[Tensor] = []
        for batch in self.scorer.batches:
            logs = self.scorer.baseline(batch)
            guesses = logs.argmax(-1)
            targets = item_labels(batch).to(logs.device) if self.use_labels else guesses
            numbers = torch.stack([guesses.cpu(), targets.cpu()], dim=1).double()
            rows.append(torch.cat([_measure(logs, targets, guesses, 0.0), numbers], dim=1))
            if self.keep_probabilities:
                kept.append(_probabilities(logs))
            self.bar.update(len(guesses))
        table = self._everywhere(rows, len(FIELDS) + 2)
        records = Records(key, table[:, : len(FIELDS)].clone(), table[:, -2].long(), table[:, -1].long())
        if self.keep_probabilities:
            records.probabilities[MEAN_PLACE, 0.0] = self._everywhere(kept, self.classes).float()
        return records

    def run(self, place: Place, sigmas: Sequence[float], settled: Settled | None = None) -> None:
        """Fill the records of these sigmas at this place, as far as they are not there.

        All sigmas and samples of a batch are one fused batch, which the scorer cuts as memory asks. ``settled`` is asked after
        every batch which of the sigmas need no more anchors.
        """
        active = list(sigmas)
        if settled is not None:
            active = [s for s in active if s not in settled(active)]
        if self.keep_probabilities:
            for sigma in active:
                room = torch.full((self.size, self.classes), math.nan)
                self.records.probabilities.setdefault((place, sigma), room)
        self.bar.total = max(self.bar.total, self.bar.n + self.local * len(active))
        try:
            for i in range(self.rounds):
                if not active:
                    break
                if i < len(self.scorer.batches):
                    self.bar.set_postfix_str(f"sigma {', '.join(f'{s:.3g}' for s in active)}")
                    self._score(i, place, active)
                    self.bar.update(len(self.positions[i]) * len(active))
                if settled is not None:
                    self._share(place, active, self.positions[i : i + 1])
                    done = settled(active)
                    active = [s for s in active if s not in done]
            if settled is None:
                self._share(place, active, self.positions)
        finally:
            if self.checkpoint is not None:
                self.records.write(self.checkpoint)

    def expect(self, sigmas: int) -> None:
        """Tell the progress bar how many more sigmas are likely to come."""
        self.bar.total = self.bar.n + self.local * sigmas

    def close(self) -> None:
        self.bar.total = self.bar.n
        self.bar.refresh()
        self.bar.close()

    def _score(self, number: int, place: Place, sigmas: Sequence[float]) -> None:
        """One batch into the records, at those sigmas that lack it."""
        batch, at = self.scorer.batches[number], self.positions[number]
        missing = [s for s in sigmas if self.records.at(place, s)[at, 0].isnan().any()]
        guesses, targets = self.records.guesses[at], self.records.targets[at]
        for sigma, logs in zip(missing, self.scorer.log_probabilities(batch, place, missing), strict=True):
            self.records.at(place, sigma)[at] = _measure(logs, targets.to(logs.device), guesses.to(logs.device), sigma)
            if self.keep_probabilities:
                self.records.probabilities[place, sigma][at] = _probabilities(logs)

    # Between ranks ----------------------------------------------------------------------------------------------------

    def _everywhere(self, rows: Sequence[Tensor], width: int) -> Tensor:
        """This rank's rows, batch by batch, and those of all others, in the order of the anchors."""
        mine = [torch.cat([p.double()[:, None], r.double()], dim=1) for p, r in zip(self.positions, rows, strict=True)]
        table = torch.full((self.size, width), math.nan, dtype=torch.float64)
        for part in self.ranks.gather(torch.cat([torch.zeros(0, width + 1, dtype=torch.float64), *mine])):
            table[part[:, 0].long()] = part[:, 1:]
        return table

    def _share(self, place: Place, sigmas: Sequence[float], positions: Sequence[Tensor]) -> None:
        """Exchange what the ranks found for their items at these positions."""
        if self.ranks.size == 1 or not sigmas:
            return
        at = torch.cat([torch.zeros(0, dtype=torch.int64), *positions])
        tables = [self.records.at(place, s) for s in sigmas]
        if self.keep_probabilities:
            tables += [self.records.probabilities[place, s] for s in sigmas]
        mine = torch.cat([at.double()[:, None], *(t[at].double() for t in tables)], dim=1)
        for part in self.ranks.gather(mine):
            columns = part[:, 1:].split([t.shape[1] for t in tables], dim=1)
            for table, found in zip(tables, columns, strict=True):
                table[part[:, 0].long()] = found.to(table.dtype)


def _probabilities(logs: Tensor) -> Tensor:
    if logs.shape[-1] > MANY_CLASSES:
        raise ValueError(
            f"a metric of your own gets every anchor's probabilities: got {logs.shape[-1]} classes, expected at most "
            f"{MANY_CLASSES}. Fix: metric='nll', 'accuracy', 'flips' or 'brier'"
        )
    return logs.exp().float().cpu()


def _measure(logs: Tensor, targets: Tensor, guesses: Tensor, sigma: float) -> Tensor:
    """(items, 5) float64 on the CPU of log probabilities (items, C); columns are ``FIELDS``.

    Raises:
        ValueError: NaN.
    """
    if logs.isnan().any():
        raise ValueError(
            f"the model's probabilities are NaN at sigma = {sigma:g}; load it in float32 or bfloat16, or look at a bracket of "
            "smaller sigmas"
        )
    p = logs.exp()
    # An answer that underflows to probability 0 costs what the smallest float32 would.
    nll = -logs.gather(-1, targets[:, None])[:, 0].clamp_min(math.log(torch.finfo(torch.float32).tiny))
    labels = logs.argmax(-1)
    brier = p.square().sum(-1) - 2 * p.gather(-1, targets[:, None])[:, 0] + 1
    columns = (nll, labels == targets, labels != guesses, brier, torch.special.entr(p).sum(-1))
    return torch.stack([c.double() for c in columns], dim=1).cpu()
