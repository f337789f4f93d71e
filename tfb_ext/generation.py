"""Text from the posterior predictive, with the doubt that its samples have about every token.

Generation is transformers' own ``generate`` inside :meth:`~tfb_ext.adapter.BayesianAdapter.predictive`: at every step the
samples' probabilities are averaged and all emit the same token. What comes out is then scored by one forward of the whole
sequences, which sees every sample's opinion of every token at once and works the same for whatever way the text was found.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .adapter import BayesianAdapter
from .data import pad_rows
from .decoding import capturable, captured_decoding, open_decoding
from .errors import SamplingError
from .caches import cache_argument
from .fan import Predictive, last_positions
from .layers import SampleBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Prompts = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]] | Mapping[str, Tensor]

# Options that ours sets itself, and why.
_OURS = {
    "return_dict_in_generate": "a Generation holds the sequences and their scores",
    "output_scores": "a Generation holds the probabilities of every token",
    "output_logits": "call adapter.model.generate(..., output_logits=True) inside adapter.predictive(...) for those",
    "input_ids": "pass prompts",
    "inputs": "pass prompts",
    "inputs_embeds": "the tokens of a prompt are needed to score it",
    "labels": "nothing is trained here",
}
_REFUSED = {
    "guidance_scale": "its second, unconditional forward would be averaged over samples apart from the first",
    "custom_generate": "its code is not known",
}


@dataclass(frozen=True)
class Generation:
    """Generated sequences: R rows of up to N new tokens, S samples; on the CPU, entropies and logarithms in nats.

    Uncertainties are about the model's own next-token distribution, before temperature, top-k and the like changed it. Entries
    behind a row's end are NaN, tokens there are padding.

    Attributes:
        sequences: (R, P + N) int64, prompts and what follows.
        prompt_length: P, the padding of shorter prompts included.
        lengths: (R,) new tokens of each row, an end-of-sequence token included.
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
        """Numbers and texts as JSON takes them: one entry of ``items`` for each row."""
        names = ("tokens", "log_probabilities", "total", "aleatoric", "epistemic")
        columns = {name: getattr(self, name) for name in (*names, "alternatives", "alternative_probabilities")}
        scores = zip(self.sequence_scores.tolist(), self.token_scores.tolist(), strict=True)
        items = []
        for row, (count, (sequence, token)) in enumerate(zip(self.lengths.tolist(), scores, strict=True)):
            item: dict[str, Any] = {"text": self.texts[row]} if self.texts else {}
            item |= {"sequence_score": sequence, "token_score": token}
            item |= {name: value[row, :count].tolist() for name, value in columns.items()}
            items.append(item | ({"pieces": list(self.pieces[row])} if self.pieces else {}))
        return {"sigma": self.sigma, "samples": list(self.samples), "seconds": self.seconds, "items": items}

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
            template; or ``input_ids`` and ``attention_mask`` (R, P), padded on the left.
        tokenizer: needed for texts and conversations.
        samples: how many samples, or their numbers.
        sigma: posterior scale instead of the adapter's own.
        alternatives: how many of the most probable tokens to keep at every position.
        **options: of transformers' ``generate``: sampling, beams, penalties, stopping, caches, streamers, an assistant model
            (``assistant_model="mean"`` is the mean adapter itself, on the same weights). On a GPU
            ``cache_implementation="static"`` decodes in CUDA graphs, see :func:`~tfb_ext.decoding.captured_decoding`. A
            quantised cache quantises the samples' rows together: with groups within a row (quanto's axis 0) as each sample's
            own would, else about as exactly; the scores, of a forward without a cache, know nothing of it. An offloaded cache
            needs a GPU, and its steps are not compiled.

    Raises:
        ValueError: an empty prompt, a prompt that leaves no room in the model's context, no tokenizer where one is needed, an
            option that this cannot serve, NaN (the message names the first module that gave it).
        SamplingError: from the sampling context, see :meth:`~tfb_ext.adapter.BayesianAdapter.predictive`.
    """
    for name, why in (_OURS | _REFUSED).items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"generate() does not take {name}: {why}")
    if isinstance(alternatives, bool) or not isinstance(alternatives, int) or alternatives < 1:
        raise ValueError(f"alternatives is {alternatives!r}, expected a count of at least 1")
    if adapter.anatomy.kind != "categorical" or not adapter.anatomy.model.can_generate():
        raise ValueError(f"{type(adapter.anatomy.model).__name__} does not generate text; load a causal language model")
    batch = adapter.batch(samples, sigma)
    inputs = _encode(adapter, prompts, tokenizer)
    _check_room(adapter, inputs["attention_mask"], options)
    # transformers compiles this cache by default, and its streams end the process in the compiler.
    if _checked_cache(adapter, options) == "offloaded_static" and options.get("compile_config") is None:
        options["disable_compile"] = True
    if tokenizer is not None and options.get("stop_strings") is not None:
        options.setdefault("tokenizer", tokenizer)
    if isinstance(options.get("assistant_model"), str):
        options["assistant_model"] = _assistant(adapter, options["assistant_model"])
    started = time.perf_counter()
    try:
        with (
            adapter.fanned(Predictive(batch)),
            _static_decoding(adapter, inputs["input_ids"], options) as options,
        ):
            sequences: Tensor = adapter.model.generate(**inputs, **options)
    except RuntimeError as error:
        if "probability tensor contains" in str(error):  # torch.multinomial's words for NaN and infinity
            raise ValueError(_nan_message(adapter, batch, inputs)) from None
        raise
    _wait(sequences)
    generated = time.perf_counter()
    width = inputs["input_ids"].shape[1]
    lengths = _lengths(adapter, sequences[:, width:], options)
    rows = len(sequences) // len(inputs["input_ids"])
    mask = inputs["attention_mask"].repeat_interleave(rows, dim=0)
    inside = torch.arange(sequences.shape[1] - width, device=sequences.device) < lengths[:, None]
    mask = torch.cat([mask, inside.to(mask)], dim=1)
    scores = score_tokens(adapter, sequences, mask, width, batch, alternatives)
    if scores.mean.isnan().any():
        raise ValueError(_nan_message(adapter, batch, {"input_ids": sequences, "attention_mask": mask}))
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
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
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


def _encode(adapter: BayesianAdapter, prompts: Prompts, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Tensor]:
    device = adapter.anatomy.model.get_input_embeddings().weight.device
    if isinstance(prompts, Mapping):
        ids = prompts.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError(
                "prompts is a mapping without input_ids of shape (rows, tokens); expected what a tokenizer returns"
            )
        mask = prompts.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if not len(ids) or not mask.any(dim=1).all():
            raise ValueError("a prompt is empty, expected at least one token in every row")
        if not mask[:, -1].all():
            raise ValueError(
                "prompts are padded on the right, expected padding on the left (tokenizer.padding_side = 'left')"
            )
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if tokenizer is None:
        raise ValueError("prompts are texts, expected a tokenizer with them, or input_ids and attention_mask")
    rows: list[list[int]] = []
    for number, prompt in enumerate(_each(prompts)):
        rows.append(_tokens(number, prompt, tokenizer))
    if not rows:
        raise ValueError("prompts is empty, expected at least one")
    ids, mask = pad_rows(rows, tokenizer.pad_token_id or 0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _each(prompts: Any) -> list[Any]:
    """Single prompts: texts or conversations."""
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], Mapping) else listed


def _tokens(number: int, prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(prompt, str):
        tokens = list(tokenizer(prompt)["input_ids"]) if prompt else []
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(message, Mapping) for message in prompt):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"prompt {number} is a conversation, but the tokenizer has no chat template; pass texts, or set "
                "tokenizer.chat_template"
            )
        text = tokenizer.apply_chat_template([dict(m) for m in prompt], tokenize=False, add_generation_prompt=True)
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        raise ValueError(f"prompt {number} is {prompt!r}, expected a text or a list of messages with role and content")
    if not tokens:
        raise ValueError(f"prompt {number} is empty, expected a text of at least one token")
    return tokens


def _check_room(adapter: BayesianAdapter, mask: Tensor, options: Mapping[str, Any]) -> None:
    config = adapter.anatomy.model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    longest = int(mask.sum(dim=1).max())
    wanted = options.get("max_new_tokens") or 1
    if room is not None and longest + wanted > room:
        raise ValueError(
            f"the longest prompt has {longest} tokens and {wanted} more are asked for, but the model's context is {room} tokens; "
            "shorten the prompt or lower max_new_tokens"
        )


def _checked_cache(adapter: BayesianAdapter, options: Mapping[str, Any]) -> str | None:
    """The kind of cache that is asked for, once it is known to serve."""
    config: Any = options.get("generation_config") or adapter.model.generation_config
    kind: str | None = options.get("cache_implementation") or getattr(config, "cache_implementation", None)
    device = next(adapter.anatomy.model.parameters()).device
    if kind in ("offloaded", "offloaded_static") and device.type == "cpu":
        raise ValueError(
            f"cache_implementation is {kind!r}, which copies between a GPU and the host's memory in streams of their own, and the "
            f"model is on {device}; move it to a GPU, or leave cache_implementation out"
        )
    beams = options.get("num_beams") or getattr(config, "num_beams", None) or 1
    if kind == "quantized" and beams > 1 and not _quantised_rows_move():
        raise ValueError(
            f"cache_implementation is 'quantized' with num_beams {beams}: transformers {version('transformers')} cannot reorder "
            "quantised rows; upgrade it (5.24 can), or leave num_beams or cache_implementation out"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens"):
        if kind == "quantized" and options.get(name) is not None:
            raise ValueError(
                f"cache_implementation is 'quantized' with {name}: rejected guesses are cut off the cache, and quantised states "
                f"cannot be cut; leave {name} or cache_implementation out"
            )
    return kind


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
def _static_decoding(adapter: BayesianAdapter, ids: Tensor, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The options to generate with: in graphs where a static cache is asked for, in the kept one if ``captured_decoding`` is open."""
    model = adapter.anatomy.model
    wanted = options.get("cache_implementation") == "static" and options.get("compile_config") is None
    if not wanted or not capturable(ids.device) or options.get("disable_compile"):
        yield options
        return
    decoding, new = open_decoding(model), options.get("max_new_tokens")
    if decoding is None:
        with captured_decoding(adapter):
            yield options
    elif new is None:  # how long the cache must be is in a configuration
        yield options
    else:
        rows = len(ids) * max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
        rest = {name: value for name, value in options.items() if name != "cache_implementation"}
        yield rest | {cache_argument(model): decoding.cache(rows, ids.shape[1] + new)}


# What comes out -----------------------------------------------------------------------------------------------------


def _lengths(adapter: BayesianAdapter, new: Tensor, options: Mapping[str, Any]) -> Tensor:
    """(R,) tokens of each row up to its end: the first end-of-sequence token, or where only padding follows."""
    config: Any = options.get("generation_config") or adapter.model.generation_config

    def ids(name: str) -> list[int]:
        value = options[name] if name in options else getattr(config, name, None)
        if isinstance(value, Tensor):
            value = value.tolist()
        return [] if value is None else [int(v) for v in value] if isinstance(value, Sequence) else [int(value)]

    count = new.shape[1]
    ends = torch.isin(new, torch.tensor(ids("eos_token_id"), dtype=new.dtype, device=new.device))
    first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, count)
    # A row that another criterion ended is filled with padding while the others go on.
    real = ~torch.isin(new, torch.tensor(ids("pad_token_id"), dtype=new.dtype, device=new.device))
    last = torch.where(real.any(dim=1), count - real.flip(1).int().argmax(dim=1), 0)
    return torch.where(ends.any(dim=1), first, last)


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
    return tuple(found)


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
