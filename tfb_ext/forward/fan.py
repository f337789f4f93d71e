"""Rows out and back: the fan that lets one unchanged model call carry many posterior samples.

The caller's batch stays B rows. A pre-hook on the first random block repeats its hidden states once for every sample
(sample-major: row ``s * B + b``), pre-hooks on it and the later blocks repeat the B-row tensors among their arguments, and
a hook on the output head folds the rows back into B rows of ``log mean_s softmax``. Blocks below run on B rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attached import Attached
from ..adapters.base import linear_columns
from ..adapters.layer import SampledLayer
from ..adapters.state import ONE_SAMPLE
from ..errors import SamplingError, TFBError
from . import fold
from .anatomy import CLASSIFIER_HEADS, Kind, last_block_parts, last_position
from .caches import CacheWatch, cache_of, rows_of_cache
from .fold import Folding, Predictive, average_states, check_untouched
from .rows import Layout, Repeater, asks_for, batch_after, batch_shape, check_packing, repeat_rows
from .trunk import TrunkPass


class Fan:
    """The hooks of one sampling context on one model.

    Args:
        attached: the adapter's posteriors in the model.
        first: index of the first random block.
        view: the context as its user sees it.
        layout: how the model lays out its rows; ``None`` tells them by their number alone.
    """

    def __init__(self, attached: Attached, first: int, view: Predictive, layout: Layout | None = None) -> None:
        self.attached, self.anatomy, self.state = attached, attached.anatomy, attached.state
        self.first, self.view, self.layout = first, view, layout
        self.batch = self.opened = view.batch  # of the forward in progress, and of the context
        self.rows = 0
        self.kind: Kind = self.anatomy.kind
        self.repeater = Repeater(len(view.batch), layout)
        self.trunk = TrunkPass(list(self.anatomy.blocks), first, view.trunk)
        self.pending: Tensor | None = None
        # The caller's hooks on the head see its whole input, and the fold what they make of its output.
        self.hooked = bool(self.anatomy.head._forward_hooks or self.anatomy.head._forward_pre_hooks)
        self.broken = False  # did the last forward raise once its rows were laid out?
        self.one_position = False  # does the forward in progress need the last block at its last position alone?
        text: Any = self.anatomy.model.config.get_text_config()
        # Classification heads of the same configuration are not capped by their models.
        capped = self.anatomy.head_name not in CLASSIFIER_HEADS
        self.soft_cap: float | None = getattr(text, "final_logit_softcapping", None) if capped else None

    @contextmanager
    def open(self) -> Iterator[Predictive]:
        anatomy, state, view = self.anatomy, self.state, self.view
        with state.waiting() as wait, ExitStack() as undo:
            for handle in self.hooks():
                undo.callback(handle.remove)
            undo.callback(self.trunk.end)
            self.caches = self.cache_watch()
            undo.callback(self.caches.close)
            layers = None if self.layout is None else self.layout.layers
            undo.enter_context(state.serving(view.batch, self.first, layers))
            if self.soft_cap is not None:
                # The model caps after its head, on probabilities by then; the fold caps each sample's logits instead. Written past
                # the configuration's own checks, which may not take None.
                settings = vars(anatomy.model.config.get_text_config())
                undo.callback(settings.__setitem__, "final_logit_softcapping", self.soft_cap)
                settings["final_logit_softcapping"] = None
            undo.callback(wait)
            try:
                yield view
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                if not self.broken or isinstance(error, TFBError | torch.OutOfMemoryError):
                    raise
                name, lines = type(anatomy.model).__name__, str(error).strip().splitlines() or [""]
                raise SamplingError(
                    f"{name} failed between its blocks or in them, where rows are laid out by sample ({type(error).__name__}: {lines[0]}), "
                    f"expected a model that takes any number of rows there. Fix: {ONE_SAMPLE}"
                ) from error

    def cache_watch(self) -> CacheWatch:
        fanned = self.first < len(self.anatomy.blocks)
        rows_of = rows_of_cache(self.state, self.view.batch, self.first) if fanned else None
        return CacheWatch(self.first, len(self.view.batch), rows_of)

    def hooks(self) -> Iterator[Any]:
        """Register the hooks one after the other; each is given out before the next one is made."""
        anatomy = self.anatomy
        yield anatomy.model.register_forward_pre_hook(self.before_model, with_kwargs=True)
        yield anatomy.model.register_forward_hook(self.after_model)
        yield anatomy.model.register_forward_hook(self.end_turn, always_call=True)
        yield anatomy.head.register_forward_pre_hook(self.before_head, with_kwargs=True)
        yield anatomy.head.register_forward_hook(self.after_head)
        yield from self.block_hooks()

    def block_hooks(self) -> Iterator[Any]:
        anatomy = self.anatomy
        for index in range(self.first, len(anatomy.blocks)):
            hook = partial(self.before_block, index)
            yield anatomy.blocks[index].register_forward_pre_hook(hook, with_kwargs=True)
        for part in last_block_parts(anatomy):
            yield part.register_forward_pre_hook(self.before_last_block_part)
        yield from self.trunk.hooks()

    # The model's own call -------------------------------------------------------------------------------------------

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, cache = self.state, cache_of(kwargs)
        if not torch.compiler.is_compiling():
            state.begin_call(self.opened)
        self.attached.check_call()
        check_packing(model, kwargs)
        self.check_outputs(kwargs)
        self.batch = batch_after(self.view.batch, kwargs)
        self.rows, state.tokens = batch_shape(args, kwargs)
        state.each = self.rows
        self.kind = self.anatomy.kind_of_call(kwargs.get("labels"))
        self.repeater.begin(self.rows, state.tokens, cache is not None)
        self.pending = None
        self.broken = False
        self.one_position = self.asks_for_one_position(kwargs)
        state.fanned = False
        # A forward that raised and was caught may have left a piece of the batch, missed layers or bypassed blocks.
        state.batch, state.shared = self.batch, None
        state.missed.clear()
        self.trunk.end()
        if not torch.compiler.is_compiling():
            self.caches.enter(cache)
            self.trunk.begin(self.view.key)

    def end_turn(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After every call, one that raised too."""
        self.broken, self.state.looked = self.state.fanned, False
        if not torch.compiler.is_compiling():
            self.state.turn.end()

    def check_outputs(self, kwargs: dict[str, Any]) -> None:
        """Refuse what the model would compute of the samples' rows as if they were the batch's."""
        if len(self.view.batch) > 1 and asks_for(self.anatomy.model, kwargs, "output_router_logits"):
            raise SamplingError(
                "output_router_logits is on, expected off: experts are chosen for each sample's tokens, and the auxiliary loss counts "
                f"the batch's. Fix: pass output_router_logits=False, or set it in model.config; or {ONE_SAMPLE}"
            )

    def asks_for_one_position(self, kwargs: dict[str, Any]) -> bool:
        """Whether the model looks at the last position's logits alone, and the noise of the others is numbered by nothing."""
        keep = kwargs.get("logits_to_keep")
        asked = asks_for(self.anatomy.model, kwargs, "output_hidden_states", "output_attentions")
        return isinstance(keep, int) and keep == 1 and not asked and self.batch.mode == "weight"

    def after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self.state.fanned = False
        self.trunk.end()
        if self.state.missed:
            names = ", ".join(dict.fromkeys(self.state.missed))
            self.state.missed.clear()
            raise SamplingError(
                f"the random layers {names} ran before the first random block, where all samples still share one row. Fix: take "
                "them out of the adapter's target_modules"
            )
        if not torch.compiler.is_compiling():
            check_untouched(model, self.view, output)
            self.caches.adopt(output)
        return average_states(output, self.rows, len(self.view.batch))

    # Blocks ---------------------------------------------------------------------------------------------------------

    def before_block(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if index == self.first:
            if args:
                args = (self.fan_out(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": self.fan_out(kwargs["hidden_states"])}
        return self.repeater.arguments(index, args, kwargs)

    def fan_out(self, hidden: Tensor) -> Tensor:
        """Repeat the hidden states for every sample; this is where the trunk ends, so it is kept or put back here."""
        if hidden.shape[0] != self.rows:
            raise SamplingError(
                f"the first random block got hidden states of shape {tuple(hidden.shape)}, expected the batch's {self.rows} rows "
                f"first. Fix: {ONE_SAMPLE}"
            )
        hidden = self.trunk.kept_or(self.first, hidden)
        self.state.fanned = True
        return repeat_rows(hidden, len(self.view.batch))

    def before_last_block_part(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        laid_out = args[0].shape[:2] == (len(self.batch) * self.rows, self.state.tokens) and args[0].dim() == 3
        return last_position(module, args) if self.one_position and laid_out else args

    # The head -------------------------------------------------------------------------------------------------------

    def before_head(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0]
        if not self.state.fanned:
            hidden = self.fan_out(hidden)
        # The last positions of a longer sequence are a slice, which torch would multiply row by row, reading the head's
        # weight once a row.
        hidden = hidden.contiguous()
        size = len(self.view.batch)
        if hidden.shape[0] != size * self.rows:
            raise SamplingError(
                f"the output head got hidden states of shape {tuple(hidden.shape)}, expected {size * self.rows} rows ({size} samples of "
                f"{self.rows}) first. Fix: {ONE_SAMPLE}"
            )
        self.pending = hidden
        if self.hooked:
            return (hidden, *args[1:]), kwargs
        if self.view.columns is not None:
            return (hidden[:0], *args[1:]), kwargs
        piece = self.samples_per_piece(head, hidden)
        if piece < size:
            self.state.batch = self.batch.part(0, piece)
            hidden = hidden[: piece * self.rows]
        return (hidden, *args[1:]), kwargs

    def samples_per_piece(self, head: nn.Module, hidden: Tensor) -> int:
        config = self.anatomy.model.config.get_text_config()
        width: int = getattr(head, "out_features", None) or getattr(config, "vocab_size", None) or 1
        per_sample = 4 * width * (hidden.numel() // max(hidden.shape[-1], 1)) // len(self.view.batch)
        return max(1, min(len(self.view.batch), fold.FOLD_BYTES // max(per_sample, 1)))

    def after_head(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        view, state = self.view, self.state
        hidden, self.pending = self.pending, None
        assert hidden is not None
        size = len(view.batch)
        targets = self.checked_targets(head, hidden)
        folding = Folding(self.kind, view.keep_samples, targets, view.observe)
        if view.columns is not None:
            columns = view.columns.to(output.device)
            output = output.index_select(-1, columns) if self.hooked else head_columns(head, hidden, columns)
            piece = size
        else:
            piece = output.shape[0] // self.rows if self.rows else size
        folding.add(self.capped(output), self.rows, size)
        try:
            for start in range(piece, size, max(piece, 1)):
                stop = min(start + piece, size)
                state.batch = self.batch.part(start, stop)
                logits = head.forward(hidden[start * self.rows : stop * self.rows])
                folding.add(self.capped(logits), self.rows, size)
        finally:
            state.batch = self.batch
        view.folded = folding.result()
        view.sample_outputs = torch.cat(folding.samples) if view.keep_samples else None
        view.target_log_probabilities = None if targets is None else torch.cat(folding.targeted)
        return view.folded

    def checked_targets(self, head: nn.Module, hidden: Tensor) -> Tensor | None:
        """The view's targets on the head's device, once they are known to fit its input (S * B, ..., n)."""
        targets, columns = self.view.targets, self.view.columns
        if targets is None:
            return None
        if self.kind != "categorical":
            raise SamplingError(
                f"targets need class probabilities, and the model's head is {self.kind.replace('_', '-')}; use "
                "keep_samples=True and take what you need of .sample_outputs"
            )
        expected = self.shape_of_targets(hidden)
        axes = len(expected)
        fits = tuple(targets.shape[:axes]) == expected and targets.dim() in (axes, axes + 1)
        if targets.dtype != torch.int64 or not fits:
            raise SamplingError(
                f"targets are {targets.dtype} of shape {tuple(targets.shape)}, expected int64 of shape {expected}, one for every "
                "position whose logits the head makes, or that with one more axis for several a position"
            )
        width = len(columns) if columns is not None else getattr(head, "out_features", None)
        if width is not None and not torch.compiler.is_compiling() and targets.numel() and int(targets.max()) >= width:
            raise SamplingError(
                f"targets reach {int(targets.max())}, expected numbers below {width}, one for each output that the head makes"
            )
        return targets.to(hidden.device)

    def shape_of_targets(self, hidden: Tensor) -> tuple[int, ...]:
        return (self.rows, *hidden.shape[1:-1])

    def capped(self, logits: Tensor) -> Tensor:
        if self.soft_cap is None:
            return logits
        return torch.tanh(logits / self.soft_cap) * self.soft_cap


def head_columns(head: Any, hidden: Tensor, columns: Tensor) -> Tensor:
    """Rows ``columns`` of the output head applied to ``hidden`` (..., n) -> (..., len(columns)).

    Only those rows of the weight are multiplied where the head is a plain linear layer, alone or under this adapter.
    """
    columns = columns.to(hidden.device)
    if "forward" not in head.__dict__:  # accelerate's offloading brings the weights in for the length of a forward only
        if type(head) is nn.Linear and type(head.weight) is nn.Parameter:
            return linear_columns(head, hidden, columns)
        update = head.tfb_open if isinstance(head, SampledLayer) else None
        if update is not None and update.multiplies_plainly(hidden) and head.active_adapters == [update.adapter]:
            if head.disable_adapters or (update.is_active() and update.is_random()):
                base = linear_columns(head.base_layer, hidden, columns)
                return base if head.disable_adapters else update.added(hidden, base, columns)
    result: Tensor = head.forward(hidden).index_select(-1, columns)
    return result
