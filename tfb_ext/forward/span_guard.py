"""The guard of spans: samples side by side along the sequence are compared with separate passes on a tiny input.

The oracle runs each row by itself, without padding: its prompt by the mean adapter into a cache of its own, then its random tokens
under one sample after the other. So it also learns whether the model has what a span needs: tokens that see those before them alone,
and a cache of keys and values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..adapters.attached import Attached
from ..adapters.samples import SampleBatch
from ..adapters.state import RowLayout
from ..errors import GuardError
from .anatomy import CLASSIFIER_HEADS, blocks_parent
from .caches import cache_argument, cache_of
from .contexts import fanned, laid_out
from .fold import Predictive
from .guard import ATTEMPTS, SAMPLES, Arguments, Trial
from .side_by_side import Route, SpanLayout
from .tiny import ROWS, Outputs, repeated, undisturbed

_WHOLE = "span='all'"
_WINDOWS, _SHORT = ("sliding_window", "local_attention", "window_size", "attention_window"), 3  # tokens


def learn_span(attached: Attached, first: int, batch: SampleBatch, span: int, enabled: bool) -> SpanLayout:
    """How the model's blocks are run for a span, once that is known to equal separate passes.

    Args:
        enabled: compare at all.

    Raises:
        GuardError: the model has no random last tokens: it is no decoder with a key-value cache, or the comparison fails.
    """
    model: Any = attached.anatomy.model
    stack = blocks_parent(attached.anatomy)
    name, config = type(model).__name__, model.config.get_text_config()
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if stack is model or other:
        reason = (
            f"layers of the kinds {other}, other than full and sliding attention"
            if other
            else "no module around its blocks"
        )
        raise GuardError(f"{name} has {reason}, expected a decoder whose tokens see those before them. Fix: {_WHOLE}")
    attention = str(getattr(config, "_attn_implementation", None))
    if "flash" in attention:
        warnings.warn(
            f"{name}: random tokens of a span attend by sdpa, under a mask that {attention} does not take", stacklevel=6
        )
    if any(b.dim() == 4 and b.shape[-1] == b.shape[-2] > 1 and not b.is_floating_point() for b in stack.buffers()):
        raise GuardError(
            f"{name} keeps a causal mask of its own by columns, expected one that is made of positions. Fix: {_WHOLE}"
        )
    routes: tuple[Route, ...] = ("masked",) if attention == "eager" else ("split", "masked")
    problem = ""
    with undisturbed(attached), _short_windows(model, config) as windowed:
        by_mask = _counts_by_mask(attached, first, batch)
        ways = [(route, windows) for route in routes for windows in ((True, False) if windowed else (True,))]
        for route, windows in ways if enabled else ways[:1]:
            layout = SpanLayout({}, {}, route, by_mask, windows)
            if not enabled:
                return layout
            trial = SpanTrial(attached, first, batch, min(span, 2), layout)
            for attempt in range(ATTEMPTS):
                _, problem = trial.compare({}, attempt)
                if not problem:
                    return layout
                if not trial.rounds:
                    break
    raise GuardError(
        f"{name}, first random block {first}: several samples along the sequence {problem}, expected what separate passes give. "
        f"Fix: {_WHOLE}"
    )


@contextmanager
def _short_windows(model: Any, config: Any) -> Iterator[bool]:
    """Inside, windows are shorter than the tiny text, so that they count; gives whether there are any. Modules are put back by
    :func:`~tfb_ext.forward.tiny.undisturbed`."""
    settings = [vars(c) for c in {id(c): c for c in (model.config, config)}.values()]
    before = [(s, n, s[n]) for s in settings for n in _WINDOWS if isinstance(s.get(n), int) and s[n] > _SHORT]
    for owner, name, value in before:
        owner[name] = _SHORT
        for part in model.modules():
            for own in _WINDOWS:
                if vars(part).get(own) == value:
                    setattr(part, own, _SHORT)
    try:
        yield any(s.get(n) for s in settings for n in _WINDOWS)
    finally:
        for owner, name, value in before:
            owner[name] = value


def _counts_by_mask(attached: Attached, first: int, batch: SampleBatch) -> bool:
    """Whether the model counts positions by its mask where it is given none. A ``GuardError`` where it has no cache."""
    trial = SpanTrial(attached, first, batch, 1, SpanLayout({}, {}))
    with trial._alone():
        ids = trial.inputs(ROWS, padded=False)["input_ids"]
        mask = torch.ones_like(ids)
        mask[:, 0] = 0

        def last(**more: Any) -> Tensor:
            return trial.values(trial._logits(trial.model(input_ids=ids, attention_mask=mask, use_cache=False, **more)))

        columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        own, by_columns = last(), last(position_ids=columns)
        by_mask = last(position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        attended = slice(None) if own.dim() == 2 else (slice(None), slice(1, None))
    return float((own - by_mask)[attended].abs().max()) < float((own - by_columns)[attended].abs().max())


class SpanTrial(Trial):
    """The comparison on one model, at one first random block, with the last one or two tokens random."""

    def __init__(self, attached: Attached, first: int, batch: SampleBatch, span: int, layout: SpanLayout) -> None:
        super().__init__(attached, first, batch, True, None)
        self.span, self.layout = span, layout
        name = type(self.model).__name__
        if not {"use_cache", "position_ids"} <= self.accepts or self.model.main_input_name != "input_ids":
            raise GuardError(
                f"{name} takes no use_cache and position_ids, so it is no decoder with a key-value cache, expected one: where every token "
                f"sees the whole text, all of it is random. Fix: {_WHOLE}"
            )
        self.cache_name = cache_argument(self.model)

    def calls(self, attempt: int) -> list[Callable[[int], Outputs]]:
        pad = self.model.config.get_text_config().pad_token_id
        pooled = self.attached.anatomy.head_name in CLASSIFIER_HEADS  # at the last token that is no padding token
        # Noise of every token is numbered by the tokens of a call, so the rows of one call are not those of two.
        rows = ROWS if self.mode == "weight" else 1
        given = self.inputs(rows, rows > 1 and (not pooled or (pad is not None and pad >= 0)), attempt)
        if pooled:
            given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, pad or 0)
        one = self.inputs(1, False, attempt)
        generates = self.mode == "weight" and self.model.can_generate()
        return [_Rows(self, given), *([_Steps(self, one)] if generates else [])]

    def _separate(self, calls: list[Callable[[int], Outputs]], sigma: float) -> list[Tensor]:
        found = [[out for call in calls for out in call.separately(k, sigma)] for k in SAMPLES]  # type: ignore[attr-defined]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def _context(self, batch: SampleBatch, arguments: Arguments) -> AbstractContextManager[Any]:
        return fanned(self.attached, self.first, Predictive(batch, span=self.span), None, self.layout)

    def _layouts(self, seen: list[tuple[str, tuple[int, ...]]]) -> tuple[dict[str, RowLayout], str]:
        return {}, ""

    def continued(self, ids: Tensor, sample: int, sigma: float, random: int) -> Tensor:
        """Logits (1, L, V) of one row (or of its last token, pooled), the last ``random`` tokens under one sample."""
        state, batch = self.attached.state, self._batch((sample,), sigma)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        start = ids.shape[1] - random
        with laid_out(self.attached, self.first, batch, None):
            cache, parts = None, []
            for part, first in (
                (slice(0, start), len(self.attached.anatomy.blocks) + 1),
                (slice(start, None), self.first),
            ):
                if ids[:, part].shape[1] == 0:
                    continue
                state.first = first
                mask = torch.ones_like(ids[:, : part.stop])
                given = {"input_ids": ids[:, part], "attention_mask": mask, "position_ids": positions[:, part]}
                out = self.model(**given, use_cache=True, **({} if cache is None else {self.cache_name: cache}))
                cache = cache_of(out)
                if cache is None:
                    raise GuardError(
                        f"{type(self.model).__name__} gives no key-value cache with its outputs, expected a decoder that does. Fix: {_WHOLE}"
                    )
                parts.append(self.values(out.logits.detach()))
        return parts[-1] if parts[-1].dim() == 2 else torch.cat(parts, 1)


class _Rows:
    """Rows in one forward, the last of two padded on the right: their random tokens and the others, or what is pooled of each."""

    def __init__(self, trial: SpanTrial, given: dict[str, Any]) -> None:
        self.trial, self.given = trial, given

    def __call__(self, times: int) -> Outputs:
        given = repeated(self.given, times)
        logits = self.trial._logits(self.trial.model(**given))
        if logits.dim() == 2:
            return [logits]
        rank = given["attention_mask"].cumsum(1)
        attended, last = given["attention_mask"].bool(), rank > rank[:, -1:] - self.trial.span
        return [logits[attended & last], logits[attended & ~last]]

    def separately(self, sample: int, sigma: float) -> list[Tensor]:
        rows = []
        for ids, mask in zip(self.given["input_ids"], self.given["attention_mask"].bool(), strict=True):
            found = self.trial.continued(ids[mask][None], sample, sigma, self.trial.span)
            rows.append(found if found.dim() == 2 else found[0])
        if rows[0].shape[0] == 1:
            return [torch.cat(rows)]
        span = self.trial.span
        return [torch.cat([row[-span:] for row in rows]), torch.cat([row[:-span] for row in rows])]


class _Steps:
    """One row with a cache, of which the last logits are asked for, and a step from it."""

    def __init__(self, trial: SpanTrial, given: dict[str, Any]) -> None:
        self.trial, self.ids = trial, given["input_ids"]

    def __call__(self, times: int) -> Outputs:
        trial, ids = self.trial, self.ids.repeat(times, 1)
        keep = {"logits_to_keep": 1} if "logits_to_keep" in trial.accepts else {}
        mask = torch.ones_like(ids)
        out = trial.model(input_ids=ids, attention_mask=mask, use_cache=True, **keep)
        found = [trial._logits(out)[:, -1]]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = {"input_ids": ids[:, :1], "attention_mask": mask, "use_cache": True, trial.cache_name: cache_of(out)}
        return [*found, trial._logits(trial.model(**step, **keep))[:, -1]]

    def separately(self, sample: int, sigma: float) -> list[Tensor]:
        trial = self.trial
        whole = torch.cat([self.ids, self.ids[:, :1]], 1)
        found = trial.continued(whole, sample, sigma, trial.span + 1)
        return [found[:, -2], found[:, -1]]
