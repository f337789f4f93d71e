"""Samples that differ at the last tokens of each row alone: hooks that lay them side by side along the sequence.

The caller's batch stays B rows. Before the module that holds the blocks, the random tokens of every row are appended once for
each sample; the prompt's tokens are the mean adapter's, and run once. Behind it the samples' hidden states go to the output head
sample-major (row ``s * B + b``), whose logits are folded as those of any other call, and put back in their places in the rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..adapters.attached import Attached
from ..adapters.layer import head_columns
from ..adapters.samples import MEAN
from ..adapters.state import Items
from ..errors import SamplingError
from .anatomy import blocks_parent
from .attention import NAME, attending
from .caches import CacheWatch, cache_argument, filled_cache, is_filled, room_of, rows_of_cache, windows_opened
from .fan import Fan
from .fold import Folding, Predictive
from .rows import Layout, asks_for, at_targets, batch_shape
from .tail import Columns, Tail, TailCall, attended_of, columns_of, note_columns, tail_of
from .trunk import PROMPT, TrunkPass

# How the blocks are run: prompt and random tokens in one call with an attention function of our own; or the prompt first, by the
# model's own attention, and then the random tokens under a mask.
Route = Literal["split", "masked"]


@dataclass(frozen=True)
class SpanLayout(Layout):
    """What :mod:`tfb_ext.forward.span_guard` learnt of a model.

    Attributes:
        route: how its blocks are run.
        by_mask: whether the model counts positions by its mask where it is given none; else by columns.
    """

    route: Route = "split"
    by_mask: bool = False


class SpanFan(Fan):
    """The hooks of one sampling context whose samples differ at the last tokens alone.

    Args:
        attached, first: as :class:`~tfb_ext.forward.fan.Fan`.
        view: with a span.
    """

    def __init__(self, attached: Attached, first: int, view: Predictive, layout: SpanLayout) -> None:
        super().__init__(attached, first, view)
        self.trunk = TrunkPass([], 0, None)  # no hidden states are kept, but the prompt's keys and values
        self.route, self.by_mask = layout.route, layout.by_mask
        self.stack: Any = blocks_parent(self.anatomy)
        self.signature = inspect.signature(self.stack.forward)
        self.cache_name = cache_argument(self.stack)
        self.in_stack = ExitStack()
        self._begin(0)

    def _begin(self, keep: int) -> None:
        """Args: keep: of the last positions, how many the head is asked for; 0 for all."""
        self.keep = keep
        self.call: TailCall | None = None
        self.run_before: Any = None  # what the prompt gave where it ran by itself
        self.prompt: Tensor | None = None  # its hidden states whose logits are asked for
        self.returns_cache = self.starts = True

    def cache_watch(self) -> CacheWatch:
        # Every layer holds the caller's rows, so beams move them as they move any rows.
        rows_of = rows_of_cache(self.state, self.view.batch, self.first)
        return CacheWatch(len(self.anatomy.blocks), 1, ("span", self.view.span, rows_of), side_by_side=True)

    def hooks(self) -> Iterator[Any]:
        model, head = self.anatomy.model, self.anatomy.head
        yield model.register_forward_pre_hook(self.before_call, with_kwargs=True)
        yield model.register_forward_hook(self.after_model)
        yield model.register_forward_hook(self.end_turn, always_call=True)
        yield self.stack.register_forward_pre_hook(self.before_stack, with_kwargs=True)
        yield self.stack.register_forward_hook(self.after_stack)
        yield head.register_forward_pre_hook(self.before_head, with_kwargs=True)
        yield head.register_forward_hook(self.after_head)

    # The model's own call -------------------------------------------------------------------------------------------

    def before_call(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if torch.compiler.is_compiling():
            raise SamplingError(
                f"span is {self.view.span}, and the model is being compiled, expected a plain call. Fix: captured_decoding(adapter) for "
                "generation, or span='all'"
            )
        self.before_model(model, args, kwargs)
        keep = kwargs.get("logits_to_keep")
        if isinstance(keep, Tensor):
            raise SamplingError(
                f"logits_to_keep is a tensor of {keep.numel()} positions, expected a number of last positions (span {self.view.span}). "
                "Fix: pass a number, or 0 and pick the positions yourself"
            )
        self._begin(int(keep or 0))
        return args, {**kwargs, "logits_to_keep": 0} if keep else kwargs  # what leaves the blocks is cut here

    def check_outputs(self, kwargs: dict[str, Any]) -> None:
        super().check_outputs(kwargs)
        if asks_for(self.anatomy.model, kwargs, "output_attentions"):
            raise SamplingError(
                "output_attentions is on, expected off: with a span the samples' columns lie beside each other. Fix: leave it out, or "
                "span='all'"
            )

    def end_turn(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.in_stack.close()
        self.state.items = None
        super().end_turn(model, args, output)

    # The blocks -----------------------------------------------------------------------------------------------------

    def before_stack(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(self.signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        given.pop("cache_position", None)  # the model's own count of columns
        cache = given.get(self.cache_name)
        known = columns_of(cache) if _capturing() or is_filled(cache) else None
        self.rows, self.state.tokens = batch_shape((), given)
        self.starts = known is None
        positions = self._positions(given, known)
        given["position_ids"] = positions
        self.call, cache = self._start(given, cache) if known is None else self._go_on(given, cache, known)
        tail, lead, size = self.call.tail, self.call.lead, len(self.view.batch)

        def laid_out(value: Tensor) -> Tensor:
            samples = tail.of(value).repeat(1, size, *[1] * (value.dim() - 2))
            return torch.cat([value, samples], 1) if lead else samples

        new = {name: laid_out(v) if self._is_of_tokens(name, v) else v for name, v in given.items()}
        new["position_ids"] = (
            laid_out(positions) if positions.dim() == 2 else torch.stack(list(map(laid_out, positions)))
        )
        new[self.cache_name] = cache
        if "use_cache" in self.signature.parameters:
            new["use_cache"] = cache is not None
        self.state.items = Items(self.rows, lead, tail.slots)
        self.state.fanned = True
        if self.route == "split":
            # Only for models that warn without one: the attention function knows what a token sees.
            new["attention_mask"] = torch.ones(self.rows, new["position_ids"].shape[-1])
            self.in_stack.enter_context(attending(self.stack.config, NAME, self.call))
        else:
            if "flash" in self.stack.config._attn_implementation:  # which takes no such mask
                self.in_stack.enter_context(attending(self.stack.config, "sdpa"))
            new["attention_mask"] = self._masks(self.call)
        return (), new

    def _is_of_tokens(self, name: str, value: Any) -> bool:
        of_tokens = isinstance(value, Tensor) and value.shape[:2] == (self.rows, self.state.tokens)
        return of_tokens and name not in ("attention_mask", "position_ids")

    def _positions(self, given: dict[str, Any], known: Columns | None) -> Tensor:
        """(B, N), or several of these: what is given, or what the model would count."""
        rows, tokens = self.rows, self.state.tokens
        found: Tensor | None = given.get("position_ids")
        if found is None and self.by_mask and known is None:
            mask = given.get("attention_mask")
            attended = attended_of(mask, rows, tokens, self._device(given))
            found = (attended.cumsum(1) - 1).clamp(min=0)
        elif found is None:
            found = torch.arange(tokens, device=self._device(given))
            if known is not None:
                found = found + (known.length[:, None] if self.by_mask else known.tokens)
        return found.expand(*found.shape[:-2], rows, tokens) if found.dim() > 1 else found.expand(rows, tokens)

    def _device(self, given: dict[str, Any]) -> torch.device:
        lead = given.get("input_ids")
        found: Tensor = given["inputs_embeds"] if lead is None else lead
        return found.device

    def _start(self, given: dict[str, Any], cache: Any) -> tuple[TailCall, Any]:
        """A call that begins with the prompt: its random tokens, and the prompt before them, kept, in this call, or run by itself."""
        view, size, tokens = self.view, len(self.view.batch), self.state.tokens
        device = self._device(given)
        attended = attended_of(given.get("attention_mask"), self.rows, tokens, device)
        tail = tail_of(attended, self._counts(device))
        wanted = given.get("use_cache")
        self.returns_cache = bool(getattr(self.stack.config, "use_cache", False) if wanted is None else wanted)
        kept = None if view.trunk is None else view.trunk.kept(PROMPT, view.key, device)
        lead = tokens if kept is None and self.route == "split" else 0
        if kept is not None:
            cache = filled_cache(kept)
        elif cache is None and (self.returns_cache or lead == 0 or self._keeps_prompt):
            cache = DynamicCache()
        else:
            windows_opened(cache)
        if kept is None and lead == 0:
            self.run_before = self._run_prompt(given, cache)
        own, order, valid = self._side_by_side(tail, device)
        columns = Columns(
            torch.cat([torch.full((tokens,), -1, device=device), own]),
            torch.cat([torch.arange(tokens, device=device).expand(self.rows, tokens), order], 1),
            torch.cat([tail.seen, valid], 1),
            attended.sum(1),
            tokens,
            size,
            room_of(cache),
        )
        if cache is not None:
            columns = note_columns(cache, columns)
        return TailCall(lead, tail, own, order, valid, columns), cache

    def _go_on(self, given: dict[str, Any], cache: Any, known: Columns) -> tuple[TailCall, Any]:
        """A call that goes on from a cache: all its tokens are random."""
        tokens, device, mask = self.state.tokens, self._device(given), given.get("attention_mask")
        valid = torch.ones(self.rows, tokens, dtype=torch.bool, device=device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            valid = mask[:, -tokens:].bool()
        tail = Tail(None, valid, valid, valid, False, False)
        own, order, seen = self._side_by_side(tail, device)
        order = order + known.tokens
        self.batch = self.state.batch = (
            self.view.batch.after(known.tokens) if self.view.batch.mode == "token" else self.batch
        )
        known.advance(valid)
        if tokens > 1 or not known.fixed:  # a static cache's columns are made for single tokens
            known.append(own, order, seen, int(cache.get_seq_length()))
        return TailCall(0, tail, own, order, seen, known), cache

    def _counts(self, device: torch.device) -> Tensor:
        """(B,) random tokens of each row: the span, and what of an answer follows the position that it is read from."""
        span, answers = self.view.span, self.view.answers
        assert span is not None
        whole = torch.full((self.rows,), span, device=device)
        return whole if answers is None else whole + answers.to(device) - 1

    def _side_by_side(self, tail: Tail, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of the samples' tokens (S·T,) whose they are, and (B, S·T) their places and whether they are tokens at all."""
        size = len(self.view.batch)
        own = torch.arange(size, device=device).repeat_interleave(tail.slots)
        return own, tail.places().repeat(1, size), tail.valid.repeat(1, size)

    def _run_prompt(self, given: dict[str, Any], cache: Any) -> Any:
        state, first = self.state, self.state.first
        state.batch, state.first = MEAN, len(self.anatomy.blocks) + 1
        try:
            extra = {"use_cache": True} if "use_cache" in self.signature.parameters else {}
            return self.stack.forward(**given | extra | {self.cache_name: cache})
        finally:
            state.batch, state.first = self.batch, first

    def _masks(self, call: TailCall) -> Any:
        """The mask of the random tokens as the model takes it: one, or one for each kind of its layers."""
        config = self.stack.config
        dtype = self.stack.dtype
        eager = config._attn_implementation == "eager"

        def mask(window: int | None) -> Tensor:
            return call.tail_mask(window, 1, dtype) if eager else call.sees(window)[:, None]

        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if len(kinds) > 1:
            return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
        return mask(None if kinds == {"full_attention"} else window)

    @property
    def _keeps_prompt(self) -> bool:
        trunk, key = self.view.trunk, self.view.key
        return trunk is not None and key is not None and trunk.wants(PROMPT, key)

    def after_stack(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, size = self.call, len(self.view.batch)
        assert call is not None
        self.in_stack.close()
        self.state.items = None
        tail, tokens, cache = (
            call.tail,
            self.state.tokens,
            output.get(self.cache_name) if isinstance(output, dict) else None,
        )
        if self._keeps_prompt and cache is not None and (call.lead or self.run_before is not None):
            pairs = [(layer.keys[:, :, :tokens], layer.values[:, :, :tokens]) for layer in cache.layers]
            assert self.view.trunk is not None
            self.view.trunk.keep(PROMPT, self.view.key, *(part for pair in pairs for part in pair))
        wanted = self.keep or tokens
        hidden = output[0]

        def parts(state: Tensor, before: Tensor | None, positions: int) -> tuple[Tensor | None, Tensor]:
            """The prompt's part that is asked for, and (S, B, T', n) of the samples."""
            samples = state[:, call.lead :].unflatten(1, (size, tail.slots)).transpose(0, 1)
            prompt = state[:, : call.lead] if call.lead else before
            if prompt is None or (tail.columns is None and not tail.uneven):
                from_prompt = max(positions - tail.slots, 0)
                samples = samples[:, :, -min(positions, tail.slots) :]
                if prompt is None or not from_prompt:
                    return None, samples
                return prompt[:, tokens - positions : tokens - positions + from_prompt], samples
            return prompt[:, -positions:], samples

        before = None if self.run_before is None else self.run_before[0]
        if call.lead == 0 and before is None and not self.keep and self.starts:
            # Of a kept prompt nothing is looked at but the random tokens; a classifier picks the last of them by its place.
            before = hidden.new_zeros(1, 1, 1).expand(self.rows, tokens, hidden.shape[-1])
        self.prompt, samples = parts(hidden, before, wanted)
        if isinstance(output, tuple):
            return (samples.flatten(0, 1), *output[1:])
        output["last_hidden_state"] = samples.flatten(0, 1)
        if output.get("hidden_states") is not None:
            earlier = (None,) * len(output["hidden_states"])
            earlier = earlier if self.run_before is None else self.run_before["hidden_states"]
            states = [parts(s, e, tokens) for s, e in zip(output["hidden_states"], earlier, strict=True)]
            output["hidden_states"] = tuple(self.merged(prompt, some.mean(0)) for prompt, some in states)
        if not self.returns_cache and cache is not None:
            output[self.cache_name] = None
        return output

    def merged(self, prompt: Tensor | None, slots: Tensor) -> Tensor:
        """(B, K, ...) of the prompt's part and the slots' (B, T', ...): K positions of each row, in their order."""
        assert self.call is not None
        tail = self.call.tail
        if prompt is None:
            return slots
        if tail.columns is None and not tail.uneven:
            return torch.cat([prompt.to(slots.dtype), slots], 1)
        return tail.merged(prompt.to(slots.dtype), slots)

    # The head -------------------------------------------------------------------------------------------------------

    def checked_targets(self, head: nn.Module, hidden: Tensor) -> Tensor | None:
        """Those of the slots; the prompt's are looked up apart."""
        targets = super().checked_targets(head, hidden)
        assert self.call is not None
        if targets is None or self.prompt is None:
            return targets
        tail, before = self.call.tail, self.state.tokens - targets.shape[1]
        if tail.columns is None and not tail.uneven:
            return targets[:, targets.shape[1] - hidden.shape[1] :]
        return tail.of(nn.functional.pad(targets, (*(0, 0) * (targets.dim() - 2), before, 0), value=-100))

    def shape_of_targets(self, hidden: Tensor) -> tuple[int, ...]:
        rows, positions = super().shape_of_targets(hidden)
        tail = None if self.call is None else self.call.tail
        if self.prompt is None:
            return rows, positions
        even = tail is not None and tail.columns is None and not tail.uneven
        return rows, self.prompt.shape[1] + positions if even else self.prompt.shape[1]

    def after_head(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.prompt is None:
            return super().after_head(head, args, output)
        mean, average = self._prompt_logs(head)
        view, observe = self.view, self.view.observe
        if observe is not None:
            view.observe = lambda values: observe(torch.stack([self.merged(mean[0], one) for one in values]))
        try:
            folded = super().after_head(head, args, output)
        finally:
            view.observe = observe
        if view.target_log_probabilities is not None and view.targets is not None:
            apart = at_targets(mean, view.targets.to(mean.device)[:, : mean.shape[2]])[0]
            view.target_log_probabilities = torch.stack(
                [self.merged(apart, one) for one in view.target_log_probabilities]
            )
        if view.sample_outputs is not None:
            view.sample_outputs = torch.stack([self.merged(mean[0], one) for one in view.sample_outputs])
        view.folded = self.merged(average, folded)
        return view.folded

    def _prompt_logs(self, head: nn.Module) -> tuple[Tensor, Tensor]:
        """Of the prompt's positions (1, B, K, V) what is averaged, and (B, K, V) the average of that alone."""
        assert self.prompt is not None
        view = self.view
        self.state.batch = MEAN
        try:
            if view.columns is None:
                logits = head.forward(self.prompt.contiguous())
            else:
                logits = head_columns(head, self.prompt.contiguous(), view.columns)
        finally:
            self.state.batch = self.batch
        folding = Folding(self.kind, True)
        folding.add(self.capped(logits), self.rows, 1)
        return folding.samples[0], folding.result()


def _capturing() -> bool:
    """Whether a graph records this call, which may not ask the device how full a cache is: steps follow prompts."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
