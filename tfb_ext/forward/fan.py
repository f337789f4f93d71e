"""Rows out and back: the fan that lets one unchanged model call carry many posterior samples.

The caller's batch stays B rows. A pre-hook on the first random block repeats its hidden states once for every sample
(sample-major: row ``s * B + b``), pre-hooks on it and the later blocks repeat the B-row tensors among their arguments, and
a hook on the output head folds the rows back into B rows of ``log mean_s softmax``. Blocks below run on B rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.layers import ONE_SAMPLE, RowLayout, SampleBatch, SamplingState, head_columns
from ..errors import SamplingError, TFBError, UnsupportedModelError
from ..posterior.canonical import canonical_name
from .caches import CacheWatch, cache_of, rows_of_cache

Kind = Literal["categorical", "multi_label", "regression"]

# Head outputs are made and folded in pieces of at most this many bytes, counted in float32: a vocabulary of 128k over 80
# rows of 128 tokens would take 5 GB otherwise. One decoding step always fits into one piece.
FOLD_BYTES = 256 * 2**20

CLASSIFIER_HEADS = ("score", "classifier")

# The way out for a model that cannot be attached to.
BY_HAND = (
    "draw samples by hand: tfb_ext.posterior.canonical.layer_posterior gives a layer's U and M, tfb_ext.ops.noise its E_k, and the sample's "
    "weight is W0 + s U (M + sigma E_k)"
)


@dataclass(frozen=True)
class Anatomy:
    """Where a model's rows can be fanned and folded.

    Attributes:
        model: the transformers model inside PEFT's wrapper; its hooks see every call.
        blocks: its transformer blocks, bottom first, and their canonical name.
        head: the module whose output are logits, and its canonical name.
    """

    model: Any  # a transformers.PreTrainedModel, whose attributes carry no types
    blocks: nn.ModuleList
    blocks_name: str
    head: nn.Module
    head_name: str

    @property
    def kind(self) -> Kind:
        """What the logits mean by the model's configuration as it is now: classes, independent labels, or real values."""
        return self.kind_of_call(None)

    def kind_of_call(self, labels: Any) -> Kind:
        """The same for a call with ``labels``, by which transformers decides where its configuration does not say.

        It writes what it decided into the configuration. The rule is that of ``ForSequenceClassificationLoss`` in
        ``transformers/loss/loss_utils.py`` (5.17 to 5.24).
        """
        config: Any = self.model.config
        if self.head_name not in CLASSIFIER_HEADS or type(self.model).__name__.endswith("ForTokenClassification"):
            return "categorical"
        problem = config.problem_type
        if problem is None and config.num_labels == 1:
            problem = "regression"
        elif problem is None and isinstance(labels, Tensor) and labels.dtype not in (torch.int64, torch.int32):
            problem = "multi_label_classification"
        kinds: dict[Any, Kind] = {"regression": "regression", "multi_label_classification": "multi_label"}
        return kinds.get(problem, "categorical")

    def block_of(self, layer_name: str) -> int | None:
        """Index of the block that holds the layer; the number of blocks for layers after them; ``None`` if before."""
        if layer_name.startswith(self.blocks_name + "."):
            return int(layer_name[len(self.blocks_name) + 1 :].split(".")[0])
        if "embed" in layer_name.rsplit(".", 1)[-1]:
            return None
        return len(self.blocks)


def find_anatomy(model: Any, lora_names: list[str]) -> Anatomy:
    """Find blocks and head of a transformers model.

    Raises:
        UnsupportedModelError: encoder-decoder models, models whose blocks or head are not found.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no transformers config, expected a PEFT model over a transformers model. Fix: {BY_HAND}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model, whose two row counts the fan does not serve. Fix: use a decoder-only "
            f"or encoder-only model; or {BY_HAND}"
        )
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    names = [canonical_name(name) for name in lora_names]
    holding = [(name, m) for name, m in lists if any(n.startswith(name + ".") for n in names)] or lists[:1]
    if len(holding) != 1:
        found = ", ".join(name for name, _ in holding) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one list of {depth} transformer blocks that holds the adapter, found {found}. "
            f"Fix: {BY_HAND}"
        )
    head_name, head = _find_head(model)
    return Anatomy(model, holding[0][1], holding[0][0], head, head_name)


def _find_head(model: Any) -> tuple[str, nn.Module]:
    head = next((getattr(model, n) for n in CLASSIFIER_HEADS if isinstance(getattr(model, n, None), nn.Module)), None)
    if head is None and hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output head, expected score, classifier or get_output_embeddings(). Fix: load it with an "
            "AutoModelFor... class that has one"
        )
    return next(canonical_name(name) for name, m in model.named_modules() if m is head), head


@dataclass
class Trunk:
    """Hidden states at the inputs of some blocks, kept per batch, so that later samples and sigmas skip the blocks below.

    Attributes:
        firsts: blocks whose input is kept, ascending; the number of blocks stands for the head.
        device: where they are kept; ``None`` keeps them where they were made. Host memory is pinned for a GPU's copies.
        limit: bytes; what goes beyond is not kept, and is computed again.
        hidden: by (block, key of the batch).
    """

    firsts: tuple[int, ...]
    device: torch.device | None = None
    limit: float = math.inf
    hidden: dict[tuple[int, Hashable], Tensor] = field(default_factory=dict)
    returns_tuple: bool = False

    def keep(self, block: int, key: Hashable, hidden: Tensor) -> None:
        """Keep the input of ``block`` for the batch ``key``, if it is asked for, new and within the limit."""
        if block not in self.firsts or (block, key) in self.hidden:
            return
        if self.bytes() + hidden.numel() * hidden.element_size() > self.limit:
            return
        if self.device is None or self.device == hidden.device:
            self.hidden[block, key] = hidden
            return
        pinned = hidden.is_cuda and self.device.type == "cpu"
        room = torch.empty(hidden.shape, dtype=hidden.dtype, device=self.device, pin_memory=pinned)
        # Both ways go through one stream, so that nothing need wait for a copy before the copy that reads it.
        self.hidden[block, key] = room.copy_(hidden, non_blocking=True)

    def nearest(self, first: int, key: Hashable) -> int | None:
        """The highest block not above ``first`` whose input is kept for this batch."""
        return max((b for b in self.firsts if b <= first and (b, key) in self.hidden), default=None)

    def split(self, key: Hashable, parts: Sequence[tuple[Hashable, slice]]) -> None:
        """Keep what is kept for a batch under the keys of parts of its rows instead, without a copy."""
        for block in self.firsts:
            hidden = self.hidden.pop((block, key), None)
            if hidden is not None:
                self.hidden.update({(block, part): hidden[rows] for part, rows in parts})

    def forget(self, key: Hashable) -> None:
        for block in self.firsts:
            self.hidden.pop((block, key), None)

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.hidden.values())


@dataclass
class Predictive:
    """One sampling context as its user sees it.

    Attributes:
        batch: the samples of the context.
        groups: number of equal groups that are averaged apart (several sigmas in one pass); the model returns group 0.
        columns: output features to keep (label tokens), or ``None`` for all; then the model returns only these.
        keep_samples: keep the per-sample results of the last forward.
        observe: called with the per-sample results (s, B, ..., V) of the next samples as the fold makes them, for what needs
            all of them once and none of them afterwards.
        targets: outputs (token ids; with ``columns``, places among them) whose log probability every sample is asked for, int64,
            of the shape of the head's output without its last axis: (B, T) for a language model, or (B, T, K) for K of them a
            position. A target belongs to the position that predicts it; negative ones (-100) are not looked up. May be set anew
            before each forward.
        folded: (groups, B, ..., V) result of the last forward: log mean probability, or the kind's own mean.
        sample_outputs: (S, B, ..., V) per-sample log probabilities (or outputs) of the last forward, if kept. Where the model
            pools its logits they are those of the position that it returned.
        target_log_probabilities: (S, *targets.shape) per-sample log probabilities of the targets in the last forward, 0 for
            those that are not looked up, so that a sum over positions is that of a sequence. All that is kept of S * B * T * V.
        key: which batch of the trunk the next forward is; ``None`` keeps no trunk.
    """

    batch: SampleBatch
    groups: int = 1
    columns: Tensor | None = None
    keep_samples: bool = False
    observe: Callable[[Tensor], None] | None = None
    targets: Tensor | None = None
    trunk: Trunk | None = None
    key: Hashable | None = None
    folded: Tensor | None = None
    sample_outputs: Tensor | None = None
    target_log_probabilities: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How a model lays out its rows below a first random block: learnt by :mod:`tfb_ext.forward.guard`.

    Attributes:
        layers: by layer name, how its input has its rows.
        arguments: by block and the path of a tensor among its arguments, what its leading size counts: ``"rows"`` of the batch (or
            some number for each), ``"tokens"`` of a row, or an integer where it was that whatever the batch.
    """

    layers: Mapping[str, RowLayout]
    arguments: Mapping[int, Mapping[str, str | int]]


class Fan:
    """The hooks of one sampling context on one model.

    Args:
        anatomy: the model's parts.
        state: what its layers share.
        first: index of the first random block.
        view: the context as its user sees it.
        check: raises where a call now would not sample.
        layout: how the model lays out its rows; ``None`` tells them by their number alone.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        state: SamplingState,
        first: int,
        view: Predictive,
        check: Callable[[], None],
        layout: Layout | None = None,
    ) -> None:
        self.anatomy = anatomy
        self.state = state
        self.first = first
        self.view = view
        self.check = check
        self.layout = layout
        self.batch = self.opened = view.batch  # of the forward in progress, and of the context
        self.rows = 0
        self.kind: Kind = anatomy.kind
        self.repeated: list[tuple[Tensor, Tensor]] = []
        self.pending: Tensor | None = None
        self.arguments: Mapping[str, str | int] | None = None  # of the block whose turn it is
        self.broken = False  # did the last forward raise once its rows were laid out?
        self.continues = False  # does the forward in progress go on from a cache?
        self.bypassed: list[nn.Module] = []
        self.resumed: int | None = None
        self.one_position = False  # does the forward in progress need the last block at its last position alone?
        text: Any = anatomy.model.config.get_text_config()
        # Classification heads of the same configuration are not capped by their models.
        capped = anatomy.head_name not in CLASSIFIER_HEADS
        self.soft_cap: float | None = getattr(text, "final_logit_softcapping", None) if capped else None

    @contextmanager
    def open(self) -> Iterator[Predictive]:
        anatomy, state, view = self.anatomy, self.state, self.view
        with state.waiting() as wait, ExitStack() as undo:
            for handle in self.hooks():
                undo.callback(handle.remove)
            undo.callback(self.restore_blocks)
            fanned = self.first < len(anatomy.blocks)
            rows_of = rows_of_cache(state, view.batch, self.first) if fanned else None
            self.caches = CacheWatch(self.first, len(view.batch), rows_of)
            undo.callback(self.caches.close)
            undo.enter_context(
                state.serving(view.batch, self.first, None if self.layout is None else self.layout.layers)
            )
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

    def hooks(self) -> Iterator[Any]:
        """Register the hooks one after the other; each is given out before the next one is made."""
        anatomy, trunk = self.anatomy, self.view.trunk
        yield anatomy.model.register_forward_pre_hook(self.before_model, with_kwargs=True)
        yield anatomy.model.register_forward_hook(self.after_model)
        yield anatomy.model.register_forward_hook(self.end_turn, always_call=True)
        yield anatomy.head.register_forward_pre_hook(self.before_head, with_kwargs=True)
        yield anatomy.head.register_forward_hook(self.after_head)
        for index in range(self.first, len(anatomy.blocks)):
            hook = partial(self.before_block, index)
            yield anatomy.blocks[index].register_forward_pre_hook(hook, with_kwargs=True)
        for part in last_block_parts(anatomy):
            yield part.register_forward_pre_hook(self.before_last_block_part)
        if self.first > 0 and trunk is not None:
            yield anatomy.blocks[0].register_forward_hook(self.after_lowest)
            for index in (i for i in trunk.firsts if i < self.first):
                hook = partial(self.before_trunk_block, index)
                yield anatomy.blocks[index].register_forward_pre_hook(hook, with_kwargs=True)

    # The model's own call -------------------------------------------------------------------------------------------

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.state.begin_call(self.opened)
        self.check()
        check_packing(model, kwargs)
        self.check_outputs(kwargs)
        self.batch = batch_after(self.view.batch, kwargs)
        self.rows, self.state.tokens = batch_shape(args, kwargs)
        self.state.each = self.rows
        self.kind = self.anatomy.kind_of_call(kwargs.get("labels"))
        self.repeated = []
        self.pending = None
        self.broken = False
        self.continues = cache_of(kwargs) is not None
        self.one_position = self.asks_for_one_position(kwargs)
        self.state.fanned = False
        # A forward that raised and was caught may have left a piece of the batch, missed layers or bypassed blocks.
        self.state.batch, self.state.shared = self.batch, None
        self.state.missed.clear()
        self.restore_blocks()
        if not torch.compiler.is_compiling():
            self.caches.enter(cache_of(kwargs))
            self.bypass_blocks()

    def end_turn(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After every call, one that raised too."""
        self.broken = self.state.fanned
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
        self.restore_blocks()
        if self.state.missed:
            names = ", ".join(dict.fromkeys(self.state.missed))
            self.state.missed.clear()
            raise SamplingError(
                f"the random layers {names} ran before the first random block, where all samples still share one row. Fix: take "
                "them out of the adapter's target_modules"
            )
        if not torch.compiler.is_compiling():
            self.check_untouched(output)
            self.caches.adopt(output)
        return self.average_states(output)

    def check_untouched(self, output: Any) -> None:
        """Refuse a model that computes on its head's output, for it would do so on log mean probabilities.

        It may cut positions out of it, and take one of each row: then the samples' outputs are cut to those.
        """
        view, folded = self.view, self.view.folded
        given = [v for v in output if isinstance(v, Tensor) and v.dim() > 1] if isinstance(output, tuple) else []
        logits = given[0] if given else getattr(output, "logits", None)
        if folded is None or not isinstance(logits, Tensor):
            return
        made = folded[0]
        if logits.untyped_storage().data_ptr() == folded.untyped_storage().data_ptr() or not made.numel():
            return
        made = made.to(logits.dtype)  # a copy in another type is no change
        if logits.shape == made.shape:
            if torch.equal(logits.nan_to_num(), made.nan_to_num()):
                return
        elif logits.dim() == 2 and made.dim() == 3 and logits.shape[-1] == made.shape[-1]:
            here = ((made == logits[:, None]) | (made.isnan() & logits[:, None].isnan())).all(-1)
            if bool(here.any(1).all()):
                if view.sample_outputs is not None:
                    rows = torch.arange(len(here), device=here.device)
                    view.sample_outputs = view.sample_outputs[:, rows, here.int().argmax(1)]
                return
        raise SamplingError(
            f"{type(self.anatomy.model).__name__} changes its logits after its head, so averaging probabilities at the head is wrong. "
            f"Fix: {ONE_SAMPLE}"
        )

    def average_states(self, output: Any) -> Any:
        """Hidden states and attentions that were asked for: B rows again, the average over samples where these differ."""
        if isinstance(output, tuple):
            return tuple(self.averaged(part) for part in output)
        for name in ("hidden_states", "attentions"):
            if isinstance(getattr(output, name, None), tuple):
                output[name] = self.averaged(output[name])
        return output

    def averaged(self, states: Any) -> Any:
        size = len(self.view.batch)
        if size == 1 or not isinstance(states, tuple) or not all(isinstance(v, Tensor) for v in states):
            return states
        fanned = size * self.rows
        return tuple(v.unflatten(0, (size, -1)).mean(0) if v.shape[0] == fanned else v for v in states)

    # Blocks ---------------------------------------------------------------------------------------------------------

    def before_block(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if index == self.first:
            if args:
                args = (self.fan_out(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": self.fan_out(kwargs["hidden_states"])}
        self.arguments = None if self.layout is None else self.layout.arguments.get(index, {})
        rest = tuple(self.repeat(a, str(i)) for i, a in enumerate(args[1:], 1))
        kwargs = {name: v if name == "hidden_states" else self.repeat(v, name) for name, v in kwargs.items()}
        return (*args[:1], *rest), kwargs

    def fan_out(self, hidden: Tensor) -> Tensor:
        """Repeat the hidden states for every sample; this is where the trunk ends, so it is kept or put back here."""
        view = self.view
        if hidden.shape[0] != self.rows:
            raise SamplingError(
                f"the first random block got hidden states of shape {tuple(hidden.shape)}, expected the batch's {self.rows} rows "
                f"first. Fix: {ONE_SAMPLE}"
            )
        hidden = self.kept_or(self.first, hidden)
        self.state.fanned = True
        return repeat_rows(hidden, len(view.batch))

    def repeat(self, value: Any, path: str) -> Any:
        """Repeat what is the batch's among a block's arguments: tensors with leading entries for every row.

        Args:
            path: of ``value`` among the arguments.
        """
        if isinstance(value, Tensor):
            if not self.is_batch(value, path):
                return value
            for source, repeated in self.repeated:
                if source is value:
                    return repeated
            repeated = repeat_rows(value, len(self.view.batch))
            self.repeated.append((value, repeated))
            return repeated
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return type(value)(self.repeat(v, f"{path}.{i}") for i, v in enumerate(value))
        if type(value) is dict:
            return {k: self.repeat(v, f"{path}.{k}") for k, v in value.items()}
        return value

    def is_batch(self, value: Tensor, path: str) -> bool:
        """Whether a tensor among a block's arguments has leading entries for every row.

        Raises:
            SamplingError: it has neither these nor serves all rows.
        """
        if len(self.view.batch) == 1 or value.dim() == 0:
            return False
        lead, tokens = value.shape[0], self.state.tokens
        if self.arguments is None:
            return value.dim() > 1 and lead == self.rows
        known = self.arguments.get(path)
        if known is None and lead != 1:
            raise SamplingError(
                f"a block got an argument {path!r} of shape {tuple(value.shape)}, which it did not have when the model was compared with "
                f"separate passes. Fix: adapter.compare(**inputs) once, outside the context; or {ONE_SAMPLE}"
            )
        if known == "rows":
            if lead % max(self.rows, 1) == 0:
                return True
            if lead == 1:
                return False
        elif lead != self.rows or lead == 1:
            return False
        elif lead == (tokens if known == "tokens" else known) or (
            known == "tokens" and self.continues and lead > tokens
        ):
            return False
        elif known == 1:
            return True  # what served all rows may be given for each of them: positions, say
        raise SamplingError(
            f"a block's argument {path!r} has shape {tuple(value.shape)}, expected leading entries for each of the batch's {self.rows} "
            f"rows, or one for all. Fix: {ONE_SAMPLE}"
        )

    def before_last_block_part(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        laid_out = args[0].shape[:2] == (len(self.batch) * self.rows, self.state.tokens) and args[0].dim() == 3
        return _last_position(module, args) if self.one_position and laid_out else args

    # The trunk ------------------------------------------------------------------------------------------------------

    def after_lowest(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.view.trunk is not None and not self.bypassed:
            self.view.trunk.returns_tuple = isinstance(output, tuple)

    def before_trunk_block(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.kept_or(index, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.kept_or(index, kwargs["hidden_states"])}

    def kept_or(self, index: int, hidden: Tensor) -> Tensor:
        """What the trunk holds for the input of block ``index``, if this pass resumes there; else keep ``hidden`` for later."""
        view = self.view
        if view.trunk is None or view.key is None or index == 0:
            return hidden
        if index == self.resumed:
            return view.trunk.hidden[index, view.key].to(hidden.device, non_blocking=True)
        if self.resumed is None or index > self.resumed:
            view.trunk.keep(index, view.key, hidden)
        return hidden

    def bypass_blocks(self) -> None:
        """Turn the blocks below the highest input that is kept into the identity for this forward."""
        view = self.view
        self.resumed = None
        if view.trunk is None or view.key is None:
            return
        self.resumed = view.trunk.nearest(self.first, view.key)
        identity = _identity_tuple if view.trunk.returns_tuple else _identity
        for block in list(self.anatomy.blocks)[: self.resumed or 0]:
            if "forward" in block.__dict__:  # accelerate's offloading hooks: their forward brings weights in and out
                continue
            block.forward = identity
            self.bypassed.append(block)

    def restore_blocks(self) -> None:
        for block in self.bypassed:
            block.__dict__.pop("forward", None)
        self.bypassed = []

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
        return max(1, min(len(self.view.batch), FOLD_BYTES // max(per_sample, 1)))

    def after_head(self, head: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        view, state = self.view, self.state
        hidden, self.pending = self.pending, None
        assert hidden is not None
        size = len(view.batch)
        targets = self.checked_targets(head, hidden)
        folding = _Folding(self.kind, view.groups, size, view.keep_samples, targets, view.observe)
        if view.columns is not None:
            output = head_columns(head, hidden, view.columns)
            piece = size
        else:
            piece = output.shape[0] // self.rows if self.rows else size
        folding.add(self.capped(output), 0, self.rows)
        try:
            for start in range(piece, size, max(piece, 1)):
                stop = min(start + piece, size)
                state.batch = self.batch.part(start, stop)
                logits = head.forward(hidden[start * self.rows : stop * self.rows])
                folding.add(self.capped(logits), start, self.rows)
        finally:
            state.batch = self.batch
        view.folded, view.sample_outputs = folding.result()
        view.target_log_probabilities = None if targets is None else torch.cat(folding.targeted)
        return view.folded[0]

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
        expected = (self.rows, *hidden.shape[1:-1])
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

    def capped(self, logits: Tensor) -> Tensor:
        if self.soft_cap is None:
            return logits
        return torch.tanh(logits / self.soft_cap) * self.soft_cap


class _Folding:
    """Running average of per-sample outputs, in float32 or better, sample groups apart."""

    def __init__(
        self,
        kind: Kind,
        groups: int,
        size: int,
        keep: bool,
        targets: Tensor | None = None,
        observe: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.kind, self.groups, self.size, self.keep = kind, groups, size, keep
        self.targets, self.observe = targets, observe
        self.total: list[Tensor | None] = [None] * groups
        self.samples: list[Tensor] = []
        self.targeted: list[Tensor] = []

    def add(self, logits: Tensor, start: int, rows: int) -> None:
        """Take the logits (samples * rows, ..., V) of consecutive samples from ``start`` on."""
        count = logits.shape[0] // rows if rows else self.size
        logits = logits.reshape(count, rows, *logits.shape[1:])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        values = self.values(logits)
        if self.keep:
            self.samples.append(values)
        if self.observe is not None:
            self.observe(values)
        if self.targets is not None:
            self.targeted.append(at_targets(values, self.targets))
        if self.kind == "multi_label":
            # Probabilities of both answers, so that the logit of a mean near 1 does not overflow.
            values = torch.stack([values, self.values(-logits)], dim=1)
        per_group = self.size // self.groups
        done = 0
        while done < count:
            group = (start + done) // per_group
            take = min(count - done, (group + 1) * per_group - (start + done))
            part = values[done : done + take]
            self.total[group] = self.combine(self.total[group], part)
            done += take

    def values(self, logits: Tensor) -> Tensor:
        if self.kind == "categorical":
            return torch.log_softmax(logits, dim=-1)
        return nn.functional.logsigmoid(logits) if self.kind == "multi_label" else logits

    def combine(self, total: Tensor | None, part: Tensor) -> Tensor:
        if self.kind == "regression":
            piece = part.sum(dim=0)
            return piece if total is None else total + piece
        piece = torch.logsumexp(part, dim=0)
        return piece if total is None else torch.logaddexp(total, piece)

    def result(self) -> tuple[Tensor, Tensor | None]:
        total = torch.stack([t for t in self.total if t is not None])
        per_group = self.size // self.groups
        if self.kind == "categorical":
            total = total - math.log(per_group)
        elif self.kind == "multi_label":
            total = total[:, 0] - total[:, 1]
        else:
            total = total / per_group
        return total, (torch.cat(self.samples) if self.keep else None)


# What a decoder block consists of where attention and MLP are added to a residual stream, each behind norms.
_RESIDUAL_BLOCK = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
}


def last_block_parts(anatomy: Anatomy) -> list[nn.Module]:
    """Of the last block, what may run for the last position alone where only its logits are asked for: the output of its
    attention and its MLP.

    Both are added to the residual stream, so one position's result broadcasts over all and is right where it belongs; what the
    other positions hold then is read by no one. Attention still sees every position. None of a block of an unknown structure.
    """
    if not len(anatomy.blocks):
        return []
    block: Any = anatomy.blocks[-1]
    names = {name for name, part in block.named_children() if not isinstance(part, nn.Dropout)}
    output = getattr(getattr(block, "self_attn", None), "o_proj", None)
    if not isinstance(output, nn.Module) or not {"self_attn", "mlp"} <= names <= _RESIDUAL_BLOCK:
        return []
    return [output, block.mlp]


@contextmanager
def last_position_only(anatomy: Anatomy) -> Iterator[None]:
    """Inside, the plain model makes its last block's output at the last position alone, as a fan does by itself."""
    hooks = [part.register_forward_pre_hook(_last_position) for part in last_block_parts(anatomy)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last_position(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][:, -1:].contiguous(), *args[1:])


def at_targets(values: Tensor, targets: Tensor) -> Tensor:
    """Of values (S, B, ..., V), those at targets (B, ...) or (B, ..., K) in each sample: (S, *targets.shape), 0 at negative ones."""
    index = targets if targets.dim() == values.dim() - 1 else targets[..., None]
    found = values.gather(-1, index.clamp(min=0).expand(values.shape[0], *index.shape))
    return found.masked_fill(index < 0, 0.0).reshape(values.shape[0], *targets.shape)


def last_positions(model: Any, targets: Tensor, width: int) -> tuple[dict[str, int], Tensor]:
    """What to give a model and :class:`Predictive` for targets (B, m) or (B, m, K) at the last m of ``width`` positions.

    Models that can are asked for these positions alone; for the others the targets are filled up on the left.
    """
    count = targets.shape[1]
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return {"logits_to_keep": count}, targets
    fill = (*(0, 0) * (targets.dim() - 2), width - count, 0)
    return {}, nn.functional.pad(targets, fill, value=-100)


def repeat_rows(value: Tensor, size: int) -> Tensor:
    """(B, ...) -> (size * B, ...), sample-major: row ``s * B + b`` is row ``b``. One row of many entries is not copied."""
    if value.shape[0] == 1 and value.dim() > 3:  # attention masks (rows, heads, queries, keys)
        return value.expand(size, *value.shape[1:])
    return value.repeat(size, *([1] * (value.dim() - 1)))


def batch_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Rows of a transformers model call and positions of each, from ``input_ids``, ``inputs_embeds`` or the input there is."""
    named = ("input_ids", "inputs_embeds", "input_values", "input_features", "pixel_values")
    for value in (*(kwargs.get(name) for name in named[:2]), *args, *(kwargs.get(name) for name in named[2:])):
        if isinstance(value, Tensor):
            return value.shape[0], value.shape[1] if value.dim() > 1 else 1
    raise SamplingError("the model was called without input_ids and inputs_embeds, so its number of rows is unknown")


def batch_after(batch: SampleBatch, kwargs: dict[str, Any]) -> SampleBatch:
    """The samples of a call that goes on from a cache: the same weights, or for mode ``"token"`` the next tokens' noise.

    Raises:
        SamplingError: mode ``"flipout"``, whose noise is one matrix a sample with signs that are numbered by a call's tokens, and
            the family ``"full-rank"``, whose parts of one call have keys that the seeds of other steps could meet.
    """
    cache = cache_of(kwargs) if batch.mode != "weight" else None
    tokens = 0 if cache is None else cache.get_seq_length()
    if (batch.mode == "flipout" or batch.family == "full-rank") and tokens:
        what = "the family 'full-rank'" if batch.family == "full-rank" else f"mode {batch.mode!r}"
        raise SamplingError(
            f"{what} numbers its noise by the tokens of one call, so a step from a key-value cache would repeat the noise of the "
            "first tokens; use the family 'low-rank' in mode 'weight' or 'token', or use_cache=False and whole sequences"
        )
    return batch.after(tokens)


def asks_for(model: Any, kwargs: Mapping[str, Any], *outputs: str) -> bool:
    """Whether a call asks for one of these outputs, or the configuration does where the call does not say."""
    config = model.config.get_text_config()
    return any(kwargs[n] if kwargs.get(n) is not None else getattr(config, n, False) for n in outputs)


def check_packing(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse calls whose rows are not the batch's rows."""
    if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")):
        raise SamplingError(
            "packed rows (cumulative sequence lengths) cannot be fanned: rows of the hidden states are not rows of the batch; "
            "pass a padded batch with an attention_mask"
        )
    if getattr(model.config, "_attn_implementation", None) == "flex_attention":
        raise SamplingError(
            "flex attention's block mask cannot be repeated for samples; load the model with attn_implementation='sdpa'"
        )


def _identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _identity_tuple(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    return (hidden_states,)
