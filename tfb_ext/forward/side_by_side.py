"""What the blocks are given where tokens of several samples, or of several choices, lie side by side behind one prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import SamplingError
from .anatomy import Anatomy, blocks_parent
from .caches import cache_argument, filled_cache, is_filled, room_of, windows_opened
from .fold import Predictive
from .rows import Layout, batch_shape
from .tail import Columns, Tail, TailCall, attended_of, columns_of, note_columns, tail_of
from .trunk import PROMPT

# How the blocks are run: prompt and random tokens in one call with an attention function of our own; or the prompt first, by the
# model's own attention, and then the random tokens under a mask.
Route = Literal["split", "masked"]


@dataclass(frozen=True)
class SpanLayout(Layout):
    """What :mod:`tfb_ext.forward.span_guard` learnt of a model.

    Attributes:
        route: how its blocks are run.
        by_mask: whether the model counts positions by its mask where it is given none; else by columns.
        windows: whether its layers have the windows that they or their configuration name.
        last: of the last call whose columns and masks followed from its shape, that shape, and they.
    """

    route: Route = "split"
    by_mask: bool = False
    windows: bool = True
    last: list[tuple[Any, TailCall, Tensor, Tensor]] = field(default_factory=list, compare=False, repr=False)


class SideBySide:
    """One call of the module that runs the blocks: what its caller gave, and what it is given instead.

    Args:
        anatomy: of the model.
        layout: what the guard learnt of it.
        view: whose samples, span and continuations these are. Without a span nothing is appended but the continuations.

    Attributes:
        stack: the module that runs the blocks.
        rows, tokens: of the caller's.
        starts: whether the call begins with the prompt, and does not go on from a cache.
        call: the columns and masks.
        prompt_run: what the prompt gave where it ran by itself.
        returns_cache: whether the caller gets the cache.
    """

    def __init__(self, anatomy: Anatomy, layout: SpanLayout, view: Predictive) -> None:
        self.stack: Any = blocks_parent(anatomy)
        self.layout, self.view = layout, view
        self.signature = inspect.signature(self.stack.forward)
        self.cache_name = cache_argument(self.stack)
        self.size = len(view.batch) if view.span is not None else 1
        self.begin()

    def begin(self) -> None:
        self.call: TailCall | None = None
        self.prompt_run: Any = None
        self.returns_cache = self.starts = True
        self.rows = self.tokens = 0

    @property
    def now(self) -> TailCall:
        """The call in progress."""
        assert self.call is not None
        return self.call

    def arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], run_prompt: Callable[[dict[str, Any]], Any]
    ) -> dict[str, Any]:
        """What to call the module with; ``run_prompt`` runs it on the prompt alone, for the mean adapter."""
        given = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        given.pop("cache_position", None)  # the model's own count of columns
        cache = given.get(self.cache_name)
        known = columns_of(cache) if _capturing() or is_filled(cache) else None
        self.rows, self.tokens = batch_shape((), given)
        self.starts = known is None
        lead = given.get("input_ids")
        self.device: torch.device = given["inputs_embeds"].device if lead is None else lead.device
        key = (self.rows, self.tokens, self.size, self.view.span, self.device) if self._is_plain(given, cache) else None
        last = self.layout.last[:]
        if key is not None and last and last[0][0] == key:
            self.returns_cache = False
            _, self.call, positions, mask = last[0]
        else:
            given["position_ids"] = positions = self._positions(given, known)
            if known is None:
                cache = self._start(given, cache, run_prompt)
            else:
                self._go_on(given, cache, known)
            each = positions if positions.dim() > 2 else positions[None]
            laid = torch.stack([self._laid_out("position_ids", p) for p in each])
            positions = laid if positions.dim() > 2 else laid[0]
            # Where the attention function knows what a token sees, for models alone that warn without one.
            is_split = self.layout.route == "split"
            mask = torch.ones(self.rows, laid.shape[-1], device=self.device) if is_split else self._masks()
        if key is not None:
            self.layout.last[:] = [(key, self.now, positions, mask)]
        new = {name: self._laid_out(name, v) if self._is_of_tokens(name, v) else v for name, v in given.items()}
        new |= {"position_ids": positions, "attention_mask": mask, self.cache_name: cache}
        if "use_cache" in self.signature.parameters:
            new["use_cache"] = cache is not None
        return new

    def _is_plain(self, given: dict[str, Any], cache: Any) -> bool:
        """Whether the call's columns and masks follow from its shape: prompts without padding, whose keys and values nobody keeps."""
        view, mask, wanted = self.view, given.get("attention_mask"), given.get("use_cache")
        wanted = getattr(self.stack.config, "use_cache", False) if wanted is None else wanted
        special = (cache, given.get("position_ids"), view.trunk, view.branches, view.answers)
        if view.span is None or self.layout.route != "split" or wanted or any(value is not None for value in special):
            return False
        return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()))

    def _is_of_tokens(self, name: str, value: Any) -> bool:
        of_tokens = isinstance(value, Tensor) and value.shape[:2] == (self.rows, self.tokens)
        return of_tokens and name not in ("attention_mask", "position_ids")

    def _laid_out(self, name: str, value: Tensor) -> Tensor:
        """(B, N, ...) of the caller's tokens -> of those of the call."""
        tail, branches = self.now.tail, self.view.branches if self.starts else None
        slots = tail.of(value) if self.view.span is not None else value[:, :0]
        if branches is not None:
            rows, count, width = branches.ids.shape
            more = value[:, -1:].unsqueeze(1).expand(rows, count, width, *value.shape[2:])
            if name == "input_ids":
                more = branches.ids
            elif name == "position_ids":
                more = more + 1 + torch.arange(width, device=self.device)
            roots = slots.unsqueeze(1).expand(rows, count, *slots.shape[1:])
            slots = torch.cat([roots, more], 2).flatten(1, 2)
        samples = slots.repeat(1, self.size, *[1] * (value.dim() - 2))
        return torch.cat([value, samples], 1) if self.now.lead else samples

    def _positions(self, given: dict[str, Any], known: Columns | None) -> Tensor:
        """(B, N), or several of these: what is given, or what the model would count."""
        rows, tokens, by_mask = self.rows, self.tokens, self.layout.by_mask
        found: Tensor | None = given.get("position_ids")
        if found is None and by_mask and known is None:
            attended = attended_of(given.get("attention_mask"), rows, tokens, self.device)
            found = (attended.cumsum(1) - 1).clamp(min=0)
        elif found is None:
            found = torch.arange(tokens, device=self.device)
            if known is not None:
                found = found + (known.length[:, None] if by_mask else known.tokens)
        return found.expand(*found.shape[:-2], rows, tokens) if found.dim() > 1 else found.expand(rows, tokens)

    def _start(self, given: dict[str, Any], cache: Any, run_prompt: Callable[[dict[str, Any]], Any]) -> Any:
        """A call that begins with the prompt, which is kept from another call, part of this one, or run by itself; gives the cache."""
        from transformers import DynamicCache

        view, tokens = self.view, self.tokens
        attended = attended_of(given.get("attention_mask"), self.rows, tokens, self.device)
        self._check_mask(given.get("attention_mask"), attended)
        tail = tail_of(attended, self._counts())
        if view.span is None:
            tail = tail._replace(seen=attended)
        wanted = given.get("use_cache")
        self.returns_cache = bool(getattr(self.stack.config, "use_cache", False) if wanted is None else wanted)
        kept = None if view.trunk is None or view.span is None else view.trunk.kept(PROMPT, view.key, self.device)
        lead = tokens if kept is None and self.layout.route == "split" else 0
        if kept is not None:
            cache = filled_cache(kept)
        elif cache is None and (self.returns_cache or lead == 0 or self.keeps_prompt):
            cache = DynamicCache()
        else:
            windows_opened(cache)
        if kept is None and lead == 0:
            extra = {"use_cache": True} if "use_cache" in self.signature.parameters else {}
            self.prompt_run = run_prompt(given | extra | {self.cache_name: cache})
        own, order, valid = self._side_by_side(tail)
        columns = Columns(
            torch.cat([torch.full((tokens,), -1, device=self.device), own]),
            torch.cat([torch.arange(tokens, device=self.device).expand(self.rows, tokens), order], 1),
            torch.cat([tail.seen, valid], 1),
            attended.sum(1),
            tokens,
            self.size,
            room_of(cache),
        )
        columns = columns if cache is None else note_columns(cache, columns)
        self.call = TailCall(lead, tail, own, order, valid, columns, self.layout.windows)
        return cache

    def _check_mask(self, mask: Any, attended: Tensor) -> None:
        """Refuse a prepared mask that says more than which tokens are padding."""
        masks = [
            m for m in (mask.values() if isinstance(mask, dict) else (mask,)) if isinstance(m, Tensor) and m.dim() == 4
        ]
        if not masks:
            return
        place = torch.arange(self.tokens, device=self.device)
        behind = place[:, None] - place
        window = getattr(self.stack.config, "sliding_window", None) or self.tokens
        for one in masks:
            sees = one[:, 0, :, : self.tokens]
            sees = sees if sees.dtype == torch.bool else sees == 0
            causal = (behind >= 0) & attended[:, None]
            same = [(sees == (causal & (behind < w))) | ~attended[:, :, None] for w in (self.tokens, window)]
            if not any(bool(each.all()) for each in same):
                raise SamplingError(
                    f"attention_mask has shape {tuple(one.shape)} and is not causal, expected (with span {self.view.span}) what a causal model "
                    "makes of padding. Fix: pass the padding (rows, tokens), or span='all'"
                )

    def _go_on(self, given: dict[str, Any], cache: Any, known: Columns) -> None:
        """A call that goes on from a cache: all its tokens are random."""
        tokens, mask = self.tokens, given.get("attention_mask")
        valid = torch.ones(self.rows, tokens, dtype=torch.bool, device=self.device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            valid = mask[:, -tokens:].bool()
            before = mask[:, :-tokens].sum(1)
            if mask.shape[1] > tokens and not torch.equal(before, known.length.to(before)):
                raise SamplingError(
                    f"attention_mask has {before.tolist()} tokens before this step's, expected the {known.length.tolist()} that the cache was "
                    "filled with. Fix: leave those as they were, or span='all'"
                )
        # A static cache's columns are made for single tokens, of which a graph's step may not ask how many are filled.
        asks = known.fixed and (tokens > 1 or not _capturing())
        filled, room = int(cache.get_seq_length()) if asks else 0, known.own.shape[0]
        if asks and filled + self.size * tokens > room:
            raise SamplingError(
                f"the cache has {room} columns, expected {filled + self.size * tokens}: {filled} are filled, and {self.size} samples "
                "need one for each token. Fix: leave the cache to tfb_ext.generate, or make it larger"
            )
        tail = Tail(None, valid, valid, valid, False, False)
        own, order, seen = self._side_by_side(tail)
        order = order + known.tokens
        known.advance(valid)
        if tokens > 1 or not known.fixed:
            known.append(own, order, seen, filled)
        self.call = TailCall(0, tail, own, order, seen, known, self.layout.windows)

    def _counts(self) -> Tensor:
        """(B,) random tokens of each row: the span, and what of an answer follows the position that it is read from."""
        span, answers = self.view.span, self.view.answers
        whole = torch.full((self.rows,), span or 1, device=self.device)
        return whole if answers is None else whole + answers.to(self.device) - 1

    def _side_by_side(self, tail: Tail) -> tuple[Tensor, Tensor, Tensor]:
        """Of the tokens behind the prompt (Q,) whose they are, and (B, Q) their places and whether they are tokens at all."""
        branches = self.view.branches if self.starts else None
        places, valid = tail.places(), tail.valid
        if self.view.span is None:
            places, valid = places[:, :0], valid[:, :0]
        count = 1
        if branches is not None:
            rows, count, width = branches.ids.shape
            behind = torch.arange(self.tokens, self.tokens + width, device=self.device).expand(rows, count, width)
            places = torch.cat([places[:, None].expand(rows, count, -1), behind], 2).flatten(1)
            valid = torch.cat([valid[:, None].expand(rows, count, -1), branches.valid], 2).flatten(1)
        own = torch.arange(self.size * count, device=self.device).repeat_interleave(places.shape[1] // count)
        return own, places.repeat(1, self.size), valid.repeat(1, self.size)

    @property
    def each(self) -> int:
        """Tokens of one sample behind the prompt."""
        return self.now.own.shape[0] // self.size

    def _masks(self) -> Any:
        """The mask of the random tokens as the model takes it: one, or one for each kind of its layers."""
        config, dtype, call = self.stack.config, self.stack.dtype, self.now
        eager = config._attn_implementation == "eager"

        def mask(window: int | None) -> Tensor:
            return call.tail_mask(window, 1, dtype) if eager else call.sees(window)[:, None]

        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if len(kinds) > 1:
            return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
        return mask(None if kinds == {"full_attention"} else window)

    # What comes out -------------------------------------------------------------------------------------------------

    @property
    def keeps_prompt(self) -> bool:
        trunk, key = self.view.trunk, self.view.key
        return trunk is not None and key is not None and self.view.span is not None and trunk.wants(PROMPT, key)

    def keep_prompt(self, cache: Any) -> None:
        """Keep the prompt's keys and values, if they are asked for and this call made them."""
        trunk = self.view.trunk
        made = self.now.lead > 0 or self.prompt_run is not None
        if trunk is None or cache is None or not (made and self.keeps_prompt):
            return
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        trunk.keep(PROMPT, self.view.key, *(part[:, :, : self.tokens] for pair in pairs for part in pair))

    @property
    def is_even(self) -> bool:
        """Whether the slots are the last columns of every row, all of them random."""
        return self.now.tail.columns is None and not self.now.tail.uneven

    def asks_for_prompt(self, keep: int) -> bool:
        """Whether logits of the prompt are asked for, where the head is asked for the last ``keep`` positions (0 for all)."""
        if self.view.branches is not None:
            return False
        return not (self.is_even and 0 < keep <= self.each)

    def positions(self, keep: int) -> int:
        """How many of the last positions a model would give that is asked to keep so many."""
        return keep if keep > 0 else self.tokens + keep

    def parts(self, state: Tensor, before: Tensor | None, positions: int) -> tuple[Tensor | None, Tensor]:
        """Of what the blocks gave (B, lead + Q, n): the prompt's part of the last positions, if any is asked for, and the samples'
        (S, B, T, n).

        Args:
            before: (B, N, n) of a prompt that ran by itself.
            positions: how many of the last positions of the rows are asked for.
        """
        call = self.now
        samples = state[:, call.lead :].unflatten(1, (self.size, self.each)).transpose(0, 1)
        branches = self.view.branches if self.starts else None
        if branches is not None:
            roots = self.now.tail.slots - 1  # those before the last token of a prompt have no choice behind them
            apart = samples.unflatten(2, (branches.count, self.each // branches.count))
            return None, apart[:, :, :, roots:].flatten(2, 3)
        prompt = state[:, : call.lead] if call.lead else before
        if prompt is None or self.is_even:
            from_prompt, first = max(positions - self.each, 0), self.tokens - positions
            samples = samples[:, :, -min(positions, self.each) :]
            return None if prompt is None or not from_prompt else prompt[:, first : first + from_prompt], samples
        return prompt[:, -positions:], samples

    def merged(self, prompt: Tensor | None, slots: Tensor) -> Tensor:
        """(B, K, ...) of the prompt's part and the slots' (B, T, ...): K positions of each row, in their order."""
        if prompt is None:
            return slots
        if self.is_even:
            return torch.cat([prompt.to(slots.dtype), slots], 1)
        return self.now.tail.merged(prompt.to(slots.dtype), slots)


def _capturing() -> bool:
    """Whether a graph records this call, which may not ask the device how full a cache is: steps follow prompts."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
