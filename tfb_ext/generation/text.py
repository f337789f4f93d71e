"""Text from the posterior predictive, with the samples' uncertainty about every token.

Generation is transformers' own ``generate`` inside :meth:`~tfb_ext.adapters.adapter.BayesianAdapter.predictive`: at every step the
samples' probabilities are averaged and all emit the same token. What comes out is then scored by one forward of the whole
sequences, which works the same for whatever way the text was found.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ..adapters.adapter import BayesianAdapter
from ..adapters.samples import SampleBatch
from ..checks import check_choice, check_count
from ..errors import SamplingError
from ..forward.caches import cache_argument
from ..forward.graphs import capturable
from ..forward.memory import room_for_rows, room_for_tokens
from ..posterior.config import BY, By
from .decoding import captured_decoding, open_decoding
from .linear import linear_sigma, token_variances
from .options import assistant, check_model, check_options, check_ours, check_room, resolved, rows_at_once, with_length
from .prompts import Prompts, encode_prompts, vocabulary
from .result import Generation, joined, pieces_of
from .scores import nan_message, opened, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    adapter: BayesianAdapter,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int | Sequence[int] = 10,
    *,
    by: By = "samples",
    sigma: float | None = None,
    alternatives: int = 5,
    batch_size: int | None = None,
    **options: Any,
) -> Generation:
    """Continue prompts under the posterior predictive, and say how sure it is of every token.

    Args:
        adapter: a Bayesian adapter with a sigma, in mode ``"weight"`` (a sample is one weight for the whole text) or ``"token"``
            (fresh noise at every step; the scores are of one more draw then, not of those that the text was chosen by).
        prompts: a text or several; a conversation (a list of ``{"role", "content"}``) or several, through the tokenizer's chat
            template; or ``input_ids`` and ``attention_mask`` (R, P), padded on the left. A conversation that ends with a message
            of the assistant is continued there. A text that already begins with the tokenizer's first special token gets no
            second one.
        tokenizer: needed for texts and conversations.
        samples: how many samples, or their numbers.
        by: ``"samples"``, or ``"linear"``, which draws none: the text is the mean adapter's, and one backward pass a token says how far
            its log probability varies (``standard_deviation``, ``sequence_standard_deviation``), to first order in sigma. ``samples``
            counts for nothing then. A sigma that was searched by the one is not the best for the other, which warns.
        sigma: posterior scale instead of the adapter's own.
        alternatives: how many of the most probable tokens to keep at every position.
        batch_size: prompts at once; by default as many as a GPU's memory has room for, or all with an option that knows rows by their
            place (a logits processor, a cache). Text that is drawn (``do_sample``) and noise drawn anew (mode ``"token"``) depend on it.
        **options: of transformers' ``generate``: sampling, beams, penalties, stopping, caches, streamers, an assistant model
            (``assistant_model="mean"`` is the mean adapter itself, on the same weights). What rescales logits by their sign or
            size (``repetition_penalty``, ``exponential_decay_length_penalty``) gets log probabilities, as it does in
            transformers' beam search. On a GPU
            ``cache_implementation="static"`` decodes in CUDA graphs, see :func:`~tfb_ext.generation.decoding.captured_decoding`. A
            quantised cache quantises the samples' rows together: with groups within a row (quanto's axis 0) as each sample's
            own would, else about as exactly; the scores, of a forward without a cache, know nothing of it. An offloaded cache
            needs a GPU, and its steps are not compiled.

    Raises:
        ValueError: an empty prompt, a prompt that leaves no room in the model's context, tokens that the model does not have, a
            conversation that the chat template refuses or leaves parts of out, no tokenizer where one is needed, an option that
            this cannot serve, NaN (the message names the first module that gave it).
        SamplingError: from the sampling context, see :meth:`~tfb_ext.adapters.adapter.BayesianAdapter.predictive`.
    """
    check_ours(options)
    alternatives = check_count("alternatives", alternatives)
    batch_size = None if batch_size is None else check_count("batch_size", batch_size, "a count of prompts")
    check_model(adapter)
    check_choice("by", by, BY)
    batch = adapter.batch(samples, sigma) if by == "samples" else None
    scale = linear_sigma(adapter, sigma) if batch is None else batch.sigma[0]
    if isinstance(options.get("assistant_model"), str):
        options["assistant_model"] = assistant(adapter, options["assistant_model"])
    config, rest = resolved(adapter, options)
    if tokenizer is not None and (config.stop_strings is not None or options.get("assistant_tokenizer") is not None):
        options["tokenizer"] = tokenizer
    check_options(adapter, config, rest, options, None if batch is None else adapter.place.span)
    inputs = encode_prompts(adapter.anatomy, prompts, tokenizer, config._pad_token_tensor)
    ids = inputs["input_ids"]
    config = with_length(adapter, config, options, ids)
    check_room(adapter, inputs["attention_mask"], config)
    beams = config.get_generation_mode(options.get("assistant_model")) in (
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    )
    if bool(config.return_dict_in_generate) != beams:  # beams say there how long each of them is
        options["return_dict_in_generate"] = beams
    # transformers compiles this cache by default, and its streams end the process in the compiler.
    if config.cache_implementation == "offloaded_static" and config.compile_config is None:
        options["disable_compile"] = True
    pad = config._pad_token_tensor
    if pad is not None and not 0 <= int(pad) < vocabulary(adapter.anatomy.model):
        options["pad_token_id"] = 0  # ended rows are filled with it, and the model reads it
    call = _Call(adapter, batch, scale, tokenizer, alternatives, config, options, beams)
    size = rows_at_once(options, len(ids), batch_size, lambda: call.room(ids))
    starts = range(0, len(ids), size)
    kept = len(starts) > 1 and _wants_graphs(config) and capturable(ids.device)
    with captured_decoding(adapter) if kept and open_decoding(adapter.anatomy.model) is None else nullcontext():
        parts = [call.run({name: value[start : start + size] for name, value in inputs.items()}) for start in starts]
    return joined(parts, options.get("pad_token_id", 0 if pad is None else int(pad)))


@dataclass(frozen=True)
class _Call:
    """What every batch of prompts of one call of :func:`generate` has in common."""

    adapter: BayesianAdapter
    batch: SampleBatch | None
    scale: float
    tokenizer: PreTrainedTokenizerBase | None
    alternatives: int
    config: GenerationConfig
    options: dict[str, Any]
    beams: bool

    @property
    def copies(self) -> int:
        """Of each prompt: its samples, beams and returned sequences."""
        config = self.config
        beams = max(config.num_beams or 1, config.num_return_sequences or 1)
        return beams * (1 if self.batch is None else len(self.batch))

    @property
    def spanned(self) -> bool:
        return self.batch is not None and self.adapter.place.span is not None

    def room(self, ids: Tensor) -> int:
        """Prompts that there is room for at once."""
        shared = ids.shape[1] if self.spanned else 0
        own = self.config.max_length - shared
        return room_for_rows(self.adapter.anatomy.model, ids.device, shared, own, self.copies)

    def chunks(self, ids: Tensor) -> dict[str, Any]:
        """Prompts whose samples do not fit into one forward are read in parts."""
        tokens = len(ids) * self.copies
        if (
            ids.device.type != "cuda"
            or self.spanned
            or self.config.prefill_chunk_size
            or self.config.use_cache is False
        ):
            return {}
        room = room_for_tokens(self.adapter.anatomy.model, ids.device)
        assisted = self.options.get("assistant_model") is not None
        return {} if assisted or tokens * ids.shape[1] <= room else {"prefill_chunk_size": max(1, room // tokens)}

    def run(self, inputs: dict[str, Tensor]) -> Generation:
        """The text of these prompts, and its scores."""
        adapter, batch, scale, tokenizer = self.adapter, self.batch, self.scale, self.tokenizer
        beams, ids = self.beams, inputs["input_ids"]
        options = self.options | self.chunks(ids)
        started = time.perf_counter()
        try:
            with (
                opened(adapter, batch),
                _static_decoding(adapter, ids, self.config, options) as options,
                _recorded_ends(adapter) as ends,
            ):
                output: Any = adapter.model.generate(**inputs, **options)
        except RuntimeError as error:
            if "probability tensor contains" in str(error):  # torch.multinomial's words for NaN and infinity
                raise ValueError(nan_message(adapter, batch, inputs)) from None
            raise
        sequences: Tensor = output.sequences if beams else output
        _wait(sequences)
        generated = time.perf_counter()
        width = ids.shape[1]
        count = sequences.shape[1] - width
        lengths = (output.beam_indices >= 0).sum(dim=1) if beams else _lengths(ends, width, count)
        lengths = lengths.to(sequences.device)
        rows = len(sequences) // len(ids)
        mask = inputs["attention_mask"].repeat_interleave(rows, dim=0)
        inside = torch.arange(count, device=sequences.device) < lengths[:, None]
        mask = torch.cat([mask, inside.to(mask)], dim=1)
        # What is behind an end need not be a token of the vocabulary: beams may be filled with -1.
        real = torch.cat([sequences[:, :width], sequences[:, width:].masked_fill(~inside, 0)], dim=1)
        scores = score_tokens(adapter, real, mask, width, batch, self.alternatives)
        if scores.mean.masked_fill(~inside, 0.0).isnan().any():
            raise ValueError(nan_message(adapter, batch, {"input_ids": real, "attention_mask": mask}))
        deviations: tuple[Tensor, ...] = ()
        if batch is None:
            variances = token_variances(adapter, real, mask, width, lengths)
            deviations = tuple(scale * each.clamp(min=0).sqrt() for each in variances)
            deviations = (deviations[0].masked_fill(~inside, math.nan).cpu(), deviations[1].cpu())
        _wait(scores.mean)
        outside = ~inside
        cut = {
            name: getattr(scores, name).masked_fill(outside, math.nan).cpu() for name in ("mean", "total", "aleatoric")
        }
        sequences, lengths = sequences.cpu(), lengths.cpu()
        rows_of_tokens = [row[width : width + n].tolist() for row, n in zip(sequences, lengths.tolist(), strict=True)]
        return Generation(
            sequences,
            width,
            lengths,
            ()
            if tokenizer is None
            else tuple(str(tokenizer.decode(r, skip_special_tokens=True)) for r in rows_of_tokens),
            () if tokenizer is None else tuple(pieces_of(row, tokenizer) for row in rows_of_tokens),
            scores.samples.masked_fill(outside, math.nan).cpu(),
            cut["mean"],
            cut["total"],
            cut["aleatoric"],
            scores.alternatives.cpu(),
            scores.alternative_probabilities.masked_fill(outside[..., None], math.nan).cpu(),
            scale,
            () if batch is None else batch.samples,
            generated - started,
            time.perf_counter() - generated,
            batch is not None and batch.antithetic,
            *deviations,
        )


def _wants_graphs(config: GenerationConfig) -> bool:
    return bool(
        config.cache_implementation == "static" and config.compile_config is None and not config.disable_compile
    )


@contextmanager
def _static_decoding(
    adapter: BayesianAdapter, ids: Tensor, config: GenerationConfig, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The options to generate with: in graphs where a static cache is asked for, in the kept one if ``captured_decoding`` is open."""
    model = adapter.anatomy.model
    decoding, span = open_decoding(model), None if adapter.open_context is None else adapter.place.span
    if not _wants_graphs(config) or not (capturable(ids.device) or span is not None):
        yield options
        return
    if decoding is None and span is None:
        with captured_decoding(adapter):
            yield options
        return
    with nullcontext(decoding) if decoding is not None else captured_decoding(adapter) as opened:
        rows = len(ids) * max(config.num_beams or 1, config.num_return_sequences or 1)
        cache = opened.cache(rows, config.max_length, ids.shape[1])
        yield options | {"cache_implementation": None, cache_argument(model): cache}


# What comes out -----------------------------------------------------------------------------------------------------


class _Recorded(StoppingCriteriaList):
    """transformers' criteria of one call, and what they said after every step.

    Attributes:
        said: the tokens of a row by then, and for each row whether it has ended.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.said: list[tuple[int, Tensor]] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.said.append((input_ids.shape[1], ended))
        return ended


@contextmanager
def _recorded_ends(adapter: BayesianAdapter) -> Iterator[list[_Recorded]]:
    """Inside, the criteria that the model's ``generate`` makes are recorded; its own call's are the first."""
    model, made = adapter.anatomy.model, list[_Recorded]()
    original = model._get_stopping_criteria

    def recorded(*args: Any, **kwargs: Any) -> _Recorded:
        made.append(_Recorded(original(*args, **kwargs)))
        return made[-1]

    model._get_stopping_criteria = recorded
    try:
        yield made
    finally:
        del model._get_stopping_criteria


def _lengths(ends: Sequence[_Recorded], width: int, count: int) -> Tensor:
    """(R,) new tokens of each row when a criterion first ended it; all of them where none did."""
    if not ends or not ends[0].said:
        raise SamplingError(
            "generate: got a model that asks transformers for no stopping criteria, expected one that does. Fix: call "
            "adapter.model.generate(...) inside adapter.predictive(...)"
        )
    ended = torch.stack([each for _, each in ends[0].said]).cpu()
    reached = torch.tensor([tokens - width for tokens, _ in ends[0].said])
    first = torch.where(ended.any(dim=0), reached[ended.int().argmax(dim=0)], count)
    return first.clamp(max=count)


def _wait(value: Tensor) -> None:
    if value.is_cuda:
        torch.cuda.synchronize(value.device)
