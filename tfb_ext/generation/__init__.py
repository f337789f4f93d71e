"""Text from the posterior predictive, with the samples' uncertainty about every token.

Generation is transformers' own ``generate`` inside :meth:`~tfb_ext.adapters.adapter.BayesianAdapter.predictive`: at every step the
samples' probabilities are averaged and all emit the same token. What comes out is then scored by one forward of the whole
sequences, which sees every sample's opinion of every token at once and works the same for whatever way the text was found.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ..adapters.adapter import BayesianAdapter
from ..adapters.layers import SampleBatch
from ..checks import check_count
from ..errors import SamplingError
from ..forward.caches import cache_argument
from ..forward.fan import Predictive, last_positions
from ..forward.inputs import most_positions
from .decoding import capturable, captured_decoding, open_decoding
from .prompts import Prompts, encode_prompts, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Options that ours sets itself, and why.
_OURS = {
    "return_dict_in_generate": "a Generation holds the sequences and their scores",
    "output_scores": "a Generation holds the probabilities of every token",
    "output_logits": "call adapter.model.generate(..., output_logits=True) inside adapter.predictive(...) for those",
    "input_ids": "pass prompts",
    "attention_mask": "pass prompts={'input_ids': ..., 'attention_mask': ...}",
    "inputs": "pass prompts",
    "inputs_embeds": "the tokens of a prompt are needed to score it",
    "labels": "nothing is trained here",
    "custom_generate": "its code is not known",
}
_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)


@dataclass(frozen=True)
class Generation:
    """Generated sequences: R rows of up to N new tokens, S samples; on the CPU, entropies and logarithms in nats.

    Uncertainties are about the model's own next-token distribution, before temperature, top-k and the like changed it. Entries
    behind a row's end are NaN. Tokens there are what transformers fills an ended row with: padding, or, where it knows no
    end-of-sequence token, further tokens.

    Attributes:
        sequences: (R, P + N) int64, prompts and what follows.
        prompt_length: P, the padding of shorter prompts included.
        lengths: (R,) new tokens of each row up to where transformers' criteria ended it, the last token included.
        texts: what each row adds to its prompt, without special tokens; empty without a tokenizer.
        pieces: each new token's own part of the text, special tokens included; empty without a tokenizer.
        sample_log_probabilities: (S, R, N) of each new token under each sample.
        log_probabilities: (R, N) log of their mean probability: what the model inside the context gives.
        total: (R, N) entropy of the mean distribution.
        aleatoric: (R, N) mean entropy of the samples' distributions.
        alternatives, alternative_probabilities: (R, N, K) the K most probable tokens and their mean probabilities.
        sigma, samples: of the posterior.
        seconds, scoring_seconds: of ``generate``, and of the forward that scores.
    """

    sequences: Tensor
    prompt_length: int
    lengths: Tensor
    texts: tuple[str, ...]
    pieces: tuple[tuple[str, ...], ...]
    sample_log_probabilities: Tensor
    log_probabilities: Tensor
    total: Tensor
    aleatoric: Tensor
    alternatives: Tensor
    alternative_probabilities: Tensor
    sigma: float
    samples: tuple[int, ...]
    seconds: float
    scoring_seconds: float

    @property
    def tokens(self) -> Tensor:
        """(R, N) int64 the new tokens."""
        return self.sequences[:, self.prompt_length :]

    @property
    def epistemic(self) -> Tensor:
        """(R, N) mutual information of the token and the weights, total minus aleatoric: what the samples disagree about."""
        return (self.total - self.aleatoric).clamp(min=0)

    @property
    def sequence_scores(self) -> Tensor:
        """(R,) log of the mean over samples of the whole continuation's probability: weights are drawn once a text."""
        per_sample = self.sample_log_probabilities.nan_to_num(0.0).double().sum(dim=-1)
        return (torch.logsumexp(per_sample, dim=0) - math.log(len(per_sample))).float()

    def to_dict(self) -> dict[str, Any]:
        """Numbers and texts as JSON takes them: one entry of ``items`` for each row, null for what is not finite."""
        names = ("tokens", "log_probabilities", "total", "aleatoric", "epistemic")
        columns = {name: getattr(self, name) for name in (*names, "alternatives", "alternative_probabilities")}
        scores = zip(self.sequence_scores.tolist(), self.token_scores.tolist(), strict=True)
        items = []
        for row, (count, (sequence, token)) in enumerate(zip(self.lengths.tolist(), scores, strict=True)):
            item: dict[str, Any] = {"text": self.texts[row]} if self.texts else {}
            item |= {"sequence_score": sequence, "token_score": token}
            item |= {name: value[row, :count].tolist() for name, value in columns.items()}
            items.append(item | ({"pieces": list(self.pieces[row])} if self.pieces else {}))
        numbers = {"sigma": self.sigma, "samples": list(self.samples), "seconds": self.seconds}
        found: dict[str, Any] = _for_json(numbers | {"items": items})
        return found

    @property
    def token_scores(self) -> Tensor:
        """(R,) sum of ``log_probabilities``: as if weights were drawn anew for every token."""
        return self.log_probabilities.nansum(dim=-1)


@dataclass(frozen=True)
class _Scores:
    samples: Tensor
    mean: Tensor
    total: Tensor
    aleatoric: Tensor
    alternatives: Tensor
    alternative_probabilities: Tensor


def generate(
    adapter: BayesianAdapter,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int | Sequence[int] = 10,
    *,
    sigma: float | None = None,
    alternatives: int = 5,
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
        sigma: posterior scale instead of the adapter's own.
        alternatives: how many of the most probable tokens to keep at every position.
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
    for name, why in _OURS.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"generate() does not take {name}: {why}")
    alternatives = check_count("alternatives", alternatives)
    _check_model(adapter)
    batch = adapter.batch(samples, sigma)
    if isinstance(options.get("assistant_model"), str):
        options["assistant_model"] = _assistant(adapter, options["assistant_model"])
    config, rest = _resolved(adapter, options)
    if tokenizer is not None and (config.stop_strings is not None or options.get("assistant_tokenizer") is not None):
        options["tokenizer"] = tokenizer
    _check_options(adapter, config, rest, options)
    inputs = encode_prompts(adapter.anatomy.model, prompts, tokenizer, config._pad_token_tensor)
    ids = inputs["input_ids"]
    config = _with_length(adapter, config, options, ids)
    _check_room(adapter, inputs["attention_mask"], config)
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
    started = time.perf_counter()
    try:
        with (
            adapter.fanned(Predictive(batch)),
            _static_decoding(adapter, ids, config, options) as options,
            _recorded_ends(adapter) as ends,
        ):
            output: Any = adapter.model.generate(**inputs, **options)
    except RuntimeError as error:
        if "probability tensor contains" in str(error):  # torch.multinomial's words for NaN and infinity
            raise ValueError(_nan_message(adapter, batch, inputs)) from None
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
    scores = score_tokens(adapter, real, mask, width, batch, alternatives)
    if scores.mean.masked_fill(~inside, 0.0).isnan().any():
        raise ValueError(_nan_message(adapter, batch, {"input_ids": real, "attention_mask": mask}))
    _wait(scores.mean)
    outside = ~inside
    cut = {name: getattr(scores, name).masked_fill(outside, math.nan).cpu() for name in ("mean", "total", "aleatoric")}
    sequences, lengths = sequences.cpu(), lengths.cpu()
    rows_of_tokens = [row[width : width + n].tolist() for row, n in zip(sequences, lengths.tolist(), strict=True)]
    return Generation(
        sequences,
        width,
        lengths,
        () if tokenizer is None else tuple(str(tokenizer.decode(r, skip_special_tokens=True)) for r in rows_of_tokens),
        () if tokenizer is None else tuple(pieces_of(row, tokenizer) for row in rows_of_tokens),
        scores.samples.masked_fill(outside, math.nan).cpu(),
        cut["mean"],
        cut["total"],
        cut["aleatoric"],
        scores.alternatives.cpu(),
        scores.alternative_probabilities.masked_fill(outside[..., None], math.nan).cpu(),
        batch.sigma[0],
        batch.samples,
        generated - started,
        time.perf_counter() - generated,
    )


def score_tokens(
    adapter: BayesianAdapter, sequences: Tensor, mask: Tensor, start: int, batch: SampleBatch, alternatives: int = 5
) -> _Scores:
    """Every sample's opinion of the tokens from position ``start`` on, by one forward without a cache.

    Rows are halved while they do not fit into memory. The logits of S samples are made and let go piece by piece.

    Args:
        sequences, mask: (R, L), padding where the mask is 0, on either side.
    """
    try:
        return _score(adapter, sequences, mask, start, batch, alternatives)
    except torch.OutOfMemoryError:
        if len(sequences) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(sequences) // 2
    parts = [
        score_tokens(adapter, sequences[rows], mask[rows], start, batch, alternatives)
        for rows in (slice(half), slice(half, None))
    ]
    joined = {
        name: torch.cat([getattr(part, name) for part in parts], dim=1 if name == "samples" else 0)
        for name in _Scores.__dataclass_fields__
    }
    return _Scores(**joined)


def _score(
    adapter: BayesianAdapter, sequences: Tensor, mask: Tensor, start: int, batch: SampleBatch, alternatives: int
) -> _Scores:
    model = adapter.anatomy.model
    count = sequences.shape[1] - start
    targets = sequences[:, start:]
    entropies: list[Tensor] = []

    def observe(values: Tensor) -> None:
        """``values`` (s, R, kept positions, V); the last position says what would follow the last token."""
        for one in values[
            ..., -count - 1 : -1, :
        ]:  # one at a time: an entropy's temporaries are as large as the logits
            entropies.append(torch.special.entr(one.exp()).sum(dim=-1))

    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": sequences, "attention_mask": mask, "use_cache": False}
    if "position_ids" in accepted:
        inputs["position_ids"] = model._prepare_position_ids_for_generation(sequences, {"attention_mask": mask})
    following = torch.nn.functional.pad(targets, (0, 1), value=-1)  # the token that each kept position predicts
    keep, following = last_positions(model, following, sequences.shape[1])
    with adapter.fanned(Predictive(batch, observe=observe, targets=following)) as view:
        mean = model(**inputs, **keep).logits[:, -count - 1 : -1]
    assert view.target_log_probabilities is not None
    top = mean.topk(min(alternatives, mean.shape[-1]), dim=-1)
    return _Scores(
        view.target_log_probabilities[..., -count - 1 : -1],
        mean.gather(-1, targets.to(mean.device)[..., None])[..., 0],
        torch.special.entr(mean.exp()).sum(dim=-1),
        torch.stack(entropies).mean(dim=0),
        top.indices,
        top.values.exp(),
    )


# What goes in -------------------------------------------------------------------------------------------------------


def _check_model(adapter: BayesianAdapter) -> None:
    model = adapter.anatomy.model
    if adapter.anatomy.kind != "categorical" or not model.can_generate():
        raise ValueError(f"{type(model).__name__} does not generate text; load a causal language model")
    # BERT and its like predict the next token only as decoders; GPT-NeoX has the same flag and is always one.
    if getattr(model.config, "is_decoder", True) is False and not _is_causal(adapter):
        raise ValueError(
            f"model: got {type(model).__name__} with is_decoder=False, whose tokens see what follows them, expected a causal "
            "language model. Fix: load it with is_decoder=True, if it was trained so"
        )


def _is_causal(adapter: BayesianAdapter) -> bool:
    """Whether the first token's logits are the same whatever token follows."""
    model = adapter.anatomy.model
    ids = torch.tensor([[0, 1], [0, 2]], device=model.get_input_embeddings().weight.device)
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 0].float()
    return torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-3 * float(first.abs().max()))


def _resolved(adapter: BayesianAdapter, options: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """The generation configuration that transformers makes of these options, and the options left for the model's forward.

    Its special tokens are those that ``generate`` takes (``_pad_token_tensor`` and its like); its lengths are not yet
    those of the prompts, see :func:`_with_length`.
    """
    model = adapter.anatomy.model
    if isinstance(adapter.model, PeftModelForCausalLM):  # its generate passes its own on to the model
        model.generation_config = adapter.model.generation_config
    own = {*inspect.signature(model.generate).parameters, "tokenizer", "assistant_tokenizer", "trust_remote_code"}
    given = options.get("generation_config")
    if not isinstance(given, GenerationConfig | None):
        raise ValueError(
            f"generation_config: got a {type(given).__name__}, expected a transformers.GenerationConfig. Fix: GenerationConfig(**...), "
            "or pass the options themselves"
        )
    config, rest = model._prepare_generation_config(given, **{n: v for n, v in options.items() if n not in own})
    model._prepare_special_tokens(config, True, device=model.get_input_embeddings().weight.device)
    return config, rest


def _with_length(
    adapter: BayesianAdapter, config: GenerationConfig, options: Mapping[str, Any], ids: Tensor
) -> GenerationConfig:
    """The configuration with ``max_length`` and ``min_length`` of whole rows, as ``generate`` makes them for these prompts."""
    model, given = adapter.anatomy.model, options.get("generation_config")

    def default(name: str) -> bool:  # transformers 5.24, has_default_max_length in GenerationMixin.generate
        places = (options.get(name), getattr(given, name, None), getattr(model.generation_config, name))
        return all(value is None for value in places)

    found: GenerationConfig = model._prepare_generated_length(
        generation_config=config,
        has_default_max_length=default("max_length"),
        has_default_min_length=default("min_length"),
        model_input_name="input_ids",
        input_ids_length=ids.shape[1],
        inputs_tensor=ids,
    )
    return found


def _check_options(
    adapter: BayesianAdapter, config: GenerationConfig, rest: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Refuse what the fan or the scoring forward cannot follow, wherever it was asked for."""
    model = adapter.anatomy.model
    for name in ("num_beams", "num_return_sequences"):
        if getattr(config, name) is not None:
            check_count(name, getattr(config, name))
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            "generate() does not take guidance_scale: its second, unconditional forward would be averaged over samples apart "
            "from the first"
        )
    if config.token_healing:
        raise ValueError("generate() does not take token_healing: it changes the prompts, which are scored as they are")
    mode = config.get_generation_mode(options.get("assistant_model"))
    if mode not in _MODES:
        raise ValueError(
            f"generation mode: got {mode.value}, whose code is not part of transformers, expected one of "
            f"{', '.join(m.value for m in _MODES)}. Fix: leave the option that asks for it out"
        )
    accepted = inspect.signature(model.forward).parameters
    known = {cache_argument(model), "past_key_values", "cache_params", "logits_to_keep", "return_dict"}
    extra = sorted(
        n for n, v in rest.items() if v is not None and n in accepted and n not in known and not hasattr(config, n)
    )
    if extra:
        raise ValueError(
            f"options: got {extra} for the model's forward, expected none, because the forward that scores the tokens is not given "
            "them. Fix: leave them out, or call adapter.model.generate(...) inside adapter.predictive(...)"
        )
    _check_cache(adapter, config, mode, options)


def _check_room(adapter: BayesianAdapter, mask: Tensor, config: GenerationConfig) -> None:
    """Refuse prompts that leave no room, in ``max_length`` or in the model's context."""
    room = most_positions(adapter.anatomy.model)
    width = mask.shape[1]
    longest = int(mask.sum(dim=1).max())
    wanted = config.max_length - width
    if longest + max(wanted, 1) > room:
        raise ValueError(
            f"the longest prompt has {longest} tokens and {max(wanted, 1)} more are asked for, but the model's context is {room} "
            "tokens; shorten the prompt or lower max_new_tokens"
        )
    if wanted < 1:
        raise ValueError(
            f"max_length: got {config.max_length} for prompts of {width} tokens, expected room for at least one new token. Fix: "
            "raise max_length, or pass max_new_tokens"
        )


def _check_cache(
    adapter: BayesianAdapter, config: GenerationConfig, mode: GenerationMode, options: Mapping[str, Any]
) -> None:
    """Refuse a kind of cache that does not serve."""
    kind = config.cache_implementation
    device = next(adapter.anatomy.model.parameters()).device
    if kind == "paged":
        raise ValueError(
            "cache_implementation: got 'paged', which runs transformers' continuous batching, expected a cache of one batch. Fix: "
            "leave cache_implementation out"
        )
    if kind in ("offloaded", "offloaded_static") and device.type == "cpu":
        raise ValueError(
            f"cache_implementation is {kind!r}, which copies between a GPU and the host's memory in streams of their own, and the "
            f"model is on {device}; move it to a GPU, or leave cache_implementation out"
        )
    if kind == "quantized" and (config.num_beams or 1) > 1 and not _quantised_rows_move():
        raise ValueError(
            f"cache_implementation is 'quantized' with num_beams {config.num_beams}: transformers {version('transformers')} cannot "
            "reorder quantised rows; upgrade it (5.24 can), or leave num_beams or cache_implementation out"
        )
    if kind == "quantized" and mode == GenerationMode.ASSISTED_GENERATION:
        names = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
        asked = [name for name in names if getattr(config, name, None)]
        name = "assistant_model" if options.get("assistant_model") is not None else asked[0] if asked else mode.value
        raise ValueError(
            f"cache_implementation is 'quantized' with {name}: rejected guesses are cut off the cache, and quantised states "
            f"cannot be cut; leave {name} or cache_implementation out"
        )


def _quantised_rows_move() -> bool:
    from transformers.cache_utils import QuantizedLayer

    return "reorder_cache" in vars(QuantizedLayer)


def _assistant(adapter: BayesianAdapter, name: str) -> Any:
    """The mean adapter as a model of its own: modules without the context's hooks, over the very same tensors."""
    if name != "mean":
        raise ValueError(f"assistant_model is {name!r}, expected a model or 'mean'")
    model = adapter.anatomy.model
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@contextmanager
def _static_decoding(
    adapter: BayesianAdapter, ids: Tensor, config: GenerationConfig, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The options to generate with: in graphs where a static cache is asked for, in the kept one if ``captured_decoding`` is open."""
    model = adapter.anatomy.model
    wanted = config.cache_implementation == "static" and config.compile_config is None and not config.disable_compile
    if not wanted or not capturable(ids.device):
        yield options
        return
    decoding = open_decoding(model)
    if decoding is None:
        with captured_decoding(adapter):
            yield options
    else:
        rows = len(ids) * max(config.num_beams or 1, config.num_return_sequences or 1)
        cache = decoding.cache(rows, config.max_length)
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


def pieces_of(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Each token's part of the text. A character of several tokens is the last one's; joined they are the decoded text."""

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part)))

    found: list[str] = []
    done = start = 0  # tokens before `start` are written out; some before `done` give the decoder its context
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[done:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            found.append("")
            continue
        found.append(text[len(decode(tokens[done:start])) :])
        done, start = start, end
    whole = decode(tokens)
    if "".join(found) == whole:
        return tuple(found)
    # A decoder that looks further than a token back (bytes that are no character, clean-up): cut the whole text instead, each
    # piece up to where the text so far is still the whole's.
    ends = [0]
    for end in range(1, len(tokens)):
        ends.append(max(ends[-1], len(os.path.commonprefix([decode(tokens[:end]), whole]))))
    ends.append(len(whole))
    return tuple(whole[start:end] for start, end in pairwise(ends))


def _for_json(value: Any) -> Any:
    """The same with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _for_json(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_for_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wait(value: Tensor) -> None:
    if value.is_cuda:
        torch.cuda.synchronize(value.device)


def _nan_message(adapter: BayesianAdapter, batch: SampleBatch, inputs: Mapping[str, Tensor]) -> str:
    where = first_nan(adapter, batch, inputs)
    return (
        f"the model's probabilities are NaN or infinite at sigma = {batch.sigma[0]:g}; the first module to give such a value is "
        f"{where}: load the model in float32 or bfloat16, or lower sigma"
    )


def first_nan(adapter: BayesianAdapter, batch: SampleBatch, inputs: Mapping[str, Tensor]) -> str:
    """Name and class of the innermost module that is the first to return NaN or infinity on these inputs."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) and output else output
            if not found and isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                found.append(f"{name} ({type(module).__name__})")

        return hook

    modules = list(adapter.anatomy.model.named_modules())
    hooks = [m.register_forward_hook(watch(n)) for n, m in modules if n]
    try:
        with adapter.fanned(Predictive(batch)):
            adapter.anatomy.model(**inputs, use_cache=False)
    except SamplingError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "none in a forward without a cache"
