"""Samples that differ at the last tokens of each row alone, and prompts that their choices share: hooks on one unchanged model call.

The caller's batch stays B rows. Before the module that runs the blocks, the random tokens of every row are appended once for each
sample, and the tokens of its choices; the prompt's tokens run once. With a span they are the mean adapter's. Behind that module the
samples' hidden states go to the output head sample-major (row ``s * B + b``), whose logits are folded as those of any other call, and
put back in their places in the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attached import Attached
from ..adapters.samples import MEAN
from ..adapters.state import Items
from ..errors import SamplingError
from .anatomy import last_block_parts
from .attention import NAME, attending
from .caches import CacheWatch, rows_of_cache
from .fan import Fan, head_columns
from .fold import Folding, Predictive
from .rows import Layout, asks_for, at_targets
from .side_by_side import SideBySide, SpanLayout
from .trunk import TrunkPass


class SpanFan(Fan):
    """The hooks of one sampling context with a span, or whose rows have continuations.

    Args:
        attached, first: as :class:`~tfb_ext.forward.fan.Fan`.
        view: with a span, with branches, or with both.
        layout: how tokens are laid side by side.
        rows: how rows are repeated, where there is no span.
    """

    def __init__(
        self, attached: Attached, first: int, view: Predictive, layout: SpanLayout, rows: Layout | None = None
    ) -> None:
        super().__init__(attached, first, view, rows)
        if view.span is not None:
            self.trunk = TrunkPass([], 0, None)  # no hidden states are kept, but the prompt's keys and values
        self.beside = SideBySide(self.anatomy, layout, view)
        self.in_stack = ExitStack()
        self.apart = False  # whether the head runs on the prompt now
        self._begin(0)

    def _begin(self, keep: int) -> None:
        """Args: keep: of the last positions, how many the head is asked for; 0 for all."""
        self.keep = keep
        self.prompt: Tensor | None = None  # its hidden states whose logits are asked for
        self.cuts = False  # whether the last block's parts run for the random tokens alone
        self.beside.begin()

    def cache_watch(self) -> CacheWatch:
        # Every layer holds the caller's rows, so beams move them as they move any rows.
        rows_of = rows_of_cache(self.state, self.view.batch, self.first)
        return CacheWatch(len(self.anatomy.blocks), 1, ("span", self.view.span, rows_of), side_by_side=True)

    def hooks(self) -> Iterator[Any]:
        model, head, stack = self.anatomy.model, self.anatomy.head, self.beside.stack
        yield model.register_forward_pre_hook(self.before_call, with_kwargs=True)
        yield model.register_forward_hook(self.after_model)
        yield model.register_forward_hook(self.end_turn, always_call=True)
        yield stack.register_forward_pre_hook(self.before_stack, with_kwargs=True)
        yield stack.register_forward_hook(self.after_stack)
        yield head.register_forward_pre_hook(self.before_head, with_kwargs=True)
        yield head.register_forward_hook(self.after_head)
        if self.view.span is None:
            yield from self.block_hooks()
            return
        for part in last_block_parts(self.anatomy):
            yield part.register_forward_pre_hook(self.before_last_part)
            yield part.register_forward_hook(self.after_last_part)

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

    def after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        logits: Any = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
        made, call = self.view.folded, self.beside.call
        pooled = made is not None and made.dim() == 3 and isinstance(logits, Tensor) and logits.dim() == 2
        if pooled and call is not None and made is not None and made.shape[1] == call.tail.attended.shape[1]:
            random = call.tail.attended & ~call.tail.seen
            here = (made == logits[:, None].to(made.dtype)).all(-1)
            if not bool((here & random.to(here.device)).any(1).all()):
                raise SamplingError(
                    f"{type(model).__name__} pools a token that is not the last of its row by attention_mask, where the samples differ, expected "
                    "that one. Fix: pad with pad_token_id where attention_mask is 0, and nowhere else; or span='all'"
                )
        return super().after_model(model, args, output)

    def end_turn(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.in_stack.close()
        self.state.items = None
        super().end_turn(model, args, output)

    # The blocks -----------------------------------------------------------------------------------------------------

    def before_stack(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        beside, state = self.beside, self.state
        new = beside.arguments(args, kwargs, self._run_prompt)
        call = beside.now
        self.rows, state.tokens = beside.rows, beside.tokens
        if self.view.span is None:
            state.tokens = self.repeater.tokens = call.lead + call.own.shape[0]
        else:
            state.items, state.fanned = Items(self.rows, call.lead, beside.each), True
            asked = asks_for(self.anatomy.model, kwargs, "output_hidden_states")
            self.cuts = call.lead > 0 and not asked and not beside.asks_for_prompt(self.keep)
            if not beside.starts and self.batch.mode == "token":
                self.batch = state.batch = self.view.batch.after(call.columns.tokens)
        config = beside.stack.config
        if beside.layout.route == "split":
            self.in_stack.enter_context(attending(config, NAME, call))
        elif "flash" in config._attn_implementation:  # which takes no such mask
            self.in_stack.enter_context(attending(config, "sdpa"))
        return (), new

    def before_last_part(self, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not self.cuts:
            return args
        lead, each = self.beside.now.lead, self.beside.each
        self.state.items = Items(self.rows, 0, each)
        return (args[0][:, lead:].contiguous(), *args[1:])

    def after_last_part(self, part: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Nothing reads what the prompt's tokens would get here."""
        if not self.cuts:
            return output
        lead, each = self.beside.now.lead, self.beside.each
        self.state.items = Items(self.rows, lead, each)
        return nn.functional.pad(output, (0, 0, lead, 0))

    def _run_prompt(self, given: dict[str, Any]) -> Any:
        state, first = self.state, self.state.first
        state.batch, state.first = MEAN, len(self.anatomy.blocks) + 1
        try:
            return self.beside.stack.forward(**given)
        finally:
            state.batch, state.first = self.batch, first

    def after_stack(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        beside, view = self.beside, self.view
        self.in_stack.close()
        self.state.items = None
        cache = output.get(beside.cache_name) if isinstance(output, dict) else None
        beside.keep_prompt(cache)
        if view.span is None:
            hidden = self._at_choices(output[0])
        else:
            before = None if beside.prompt_run is None else beside.prompt_run[0]
            if beside.starts and not (beside.now.lead or self.keep or view.branches) and before is None:
                # Of a kept prompt nothing is looked at but the random tokens; a classifier picks the last of them by its place.
                before = output[0].new_zeros(1, 1, 1).expand(self.rows, beside.tokens, output[0].shape[-1])
            self.prompt, samples = beside.parts(output[0], before, beside.positions(self.keep))
            hidden = samples.flatten(0, 1)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        if output.get("hidden_states") is not None:
            output["hidden_states"] = self._averaged_states(output["hidden_states"])
        if not beside.returns_cache and cache is not None:
            output[beside.cache_name] = None
        return output

    def _at_choices(self, hidden: Tensor) -> Tensor:
        """(R, C·(1 + K), n) of rows and their continuations (R, N + C·K, n): at each row's last token, for every choice, and behind it."""
        branches = self.view.branches
        assert branches is not None
        lead = self.beside.now.lead
        roots = hidden[:, lead - 1 : lead, None].transpose(1, 2).expand(-1, branches.count, -1, -1)
        behind = hidden[:, lead:].unflatten(1, (branches.count, branches.ids.shape[2]))
        return torch.cat([roots, behind], 2).flatten(1, 2)

    def _averaged_states(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        beside = self.beside
        earlier = (None,) * len(states) if beside.prompt_run is None else beside.prompt_run["hidden_states"]
        parts = [beside.parts(s, e, beside.tokens) for s, e in zip(states, earlier, strict=True)]
        return tuple(beside.merged(prompt, samples.mean(0)) for prompt, samples in parts)

    # The head -------------------------------------------------------------------------------------------------------

    def before_head(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args, kwargs) if self.apart else super().before_head(head, args, kwargs)

    def shape_of_targets(self, hidden: Tensor) -> tuple[int, ...]:
        if self.prompt is None:
            return super().shape_of_targets(hidden)
        positions = self.prompt.shape[1] + (hidden.shape[1] if self.beside.is_even else 0)
        return self.rows, positions

    def checked_targets(self, head: nn.Module, hidden: Tensor) -> Tensor | None:
        """Those of the slots; the prompt's are looked up apart."""
        targets = super().checked_targets(head, hidden)
        if targets is None or self.prompt is None:
            return targets
        if self.beside.is_even:
            return targets[:, targets.shape[1] - hidden.shape[1] :]
        before = self.beside.tokens - targets.shape[1]
        padded = nn.functional.pad(targets, (*(0, 0) * (targets.dim() - 2), before, 0), value=-100)
        return self.beside.now.tail.of(padded)

    def after_head(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.apart:
            return output
        if self.prompt is None:
            return super().after_head(head, args, output)
        mean, average = self._prompt_logs(head)
        view, observe, merged = self.view, self.view.observe, self.beside.merged
        if observe is not None:
            view.observe = lambda values: observe(torch.stack([merged(mean[0], one) for one in values]))
        try:
            folded = super().after_head(head, args, output)
        finally:
            view.observe = observe
        if view.target_log_probabilities is not None and view.targets is not None:
            apart = at_targets(mean, view.targets.to(mean.device)[:, : mean.shape[2]])[0]
            view.target_log_probabilities = torch.stack([merged(apart, one) for one in view.target_log_probabilities])
        if view.sample_outputs is not None:
            view.sample_outputs = torch.stack([merged(mean[0], one) for one in view.sample_outputs])
        view.folded = merged(average, folded)
        return view.folded

    def _prompt_logs(self, head: nn.Module) -> tuple[Tensor, Tensor]:
        """Of the prompt's positions (1, B, K, V) what is averaged, and (B, K, V) the average of that alone."""
        assert self.prompt is not None
        hidden, columns = self.prompt.contiguous(), self.view.columns
        self.state.batch, self.apart = MEAN, True
        try:
            if columns is not None and not self.hooked:
                logits = head_columns(head, hidden, columns)
            else:
                logits = head(hidden) if self.hooked else head.forward(hidden)  # the caller's hooks see it too
                logits = logits if columns is None else logits.index_select(-1, columns.to(logits.device))
        finally:
            self.state.batch, self.apart = self.batch, False
        folding = Folding(self.kind, True)
        folding.add(self.capped(logits), self.rows, 1)
        return folding.samples[0], folding.result()
