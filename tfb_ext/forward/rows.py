"""Which rows of a call belong to which sample: read off its arguments, repeated for the samples, and refused where unknown."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters.samples import SampleBatch
from ..adapters.state import ONE_SAMPLE, RowLayout
from ..errors import SamplingError
from .caches import cache_of


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


class Repeater:
    """Repeats the B-row tensors among the arguments of blocks for the samples of one context."""

    def __init__(self, size: int, layout: Layout | None) -> None:
        self.size, self.layout = size, layout
        self.begin(0, 0, False)

    def begin(self, rows: int, tokens: int, continues: bool) -> None:
        """A call begins: its rows, positions of each, and whether it goes on from a cache."""
        self.rows, self.tokens, self.continues = rows, tokens, continues
        self._done: list[tuple[Tensor, Tensor]] = []

    def arguments(
        self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments for all samples; its hidden states are as they are."""
        known = None if self.layout is None else self.layout.arguments.get(block, {})
        rest = tuple(self._repeat(a, str(i), known) for i, a in enumerate(args[1:], 1))
        kwargs = {n: v if n == "hidden_states" else self._repeat(v, n, known) for n, v in kwargs.items()}
        return (*args[:1], *rest), kwargs

    def _repeat(self, value: Any, path: str, known: Mapping[str, str | int] | None) -> Any:
        if isinstance(value, Tensor):
            if not self._is_batch(value, path, known):
                return value
            for source, repeated in self._done:
                if source is value:
                    return repeated
            repeated = repeat_rows(value, self.size)
            self._done.append((value, repeated))
            return repeated
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return type(value)(self._repeat(v, f"{path}.{i}", known) for i, v in enumerate(value))
        if type(value) is dict:
            return {k: self._repeat(v, f"{path}.{k}", known) for k, v in value.items()}
        return value

    def _is_batch(self, value: Tensor, path: str, arguments: Mapping[str, str | int] | None) -> bool:
        """Whether a tensor among a block's arguments has leading entries for every row.

        Raises:
            SamplingError: it has neither these nor serves all rows.
        """
        if self.size == 1 or value.dim() == 0:
            return False
        lead, tokens = value.shape[0], self.tokens
        if arguments is None:
            return value.dim() > 1 and lead == self.rows
        known = arguments.get(path)
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
