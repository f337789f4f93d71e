"""The options of a generation, as transformers resolves them, and those that samples cannot follow."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from ..adapters.adapter import BayesianAdapter
from ..checks import check_count
from ..errors import refusal
from ..forward.caches import cache_argument
from ..forward.inputs import most_positions

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


def check_ours(options: Mapping[str, Any]) -> None:
    """Refuse options that :func:`~tfb_ext.generation.generate` sets itself."""
    for name, why in _OURS.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"generate() does not take {name}: {why}")


def check_model(adapter: BayesianAdapter) -> None:
    model = adapter.anatomy.model
    if adapter.anatomy.kind != "categorical" or not model.can_generate():
        raise ValueError(f"{type(model).__name__} does not generate text; load a causal language model")
    # BERT and its like predict the next token only as decoders; GPT-NeoX has the same flag and is always one.
    if getattr(model.config, "is_decoder", True) is False and not is_causal(adapter):
        raise ValueError(
            f"model: got {type(model).__name__} with is_decoder=False, whose tokens see what follows them, expected a causal "
            "language model. Fix: load it with is_decoder=True, if it was trained so"
        )


def is_causal(adapter: BayesianAdapter) -> bool:
    """Whether the first token's logits are the same whatever token follows."""
    model = adapter.anatomy.model
    ids = torch.tensor([[0, 1], [0, 2]], device=adapter.anatomy.device)
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 0].float()
    return torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-3 * float(first.abs().max()))


def resolved(adapter: BayesianAdapter, options: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """The generation configuration that transformers makes of these options, and the options left for the model's forward.

    Its special tokens are those that ``generate`` takes (``_pad_token_tensor`` and its like); its lengths are not yet
    those of the prompts, see :func:`with_length`.
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
    model._prepare_special_tokens(config, True, device=adapter.anatomy.device)
    return config, rest


def with_length(
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


def check_options(
    adapter: BayesianAdapter,
    config: GenerationConfig,
    rest: Mapping[str, Any],
    options: Mapping[str, Any],
    span: int | None,
) -> None:
    """Refuse what the fan at ``span`` or the scoring forward cannot follow, wherever it was asked for."""
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
    if span is not None and (mode == GenerationMode.ASSISTED_GENERATION or config.prefill_chunk_size):
        name = "an assistant model or prompt lookup, whose rejected guesses are cut off the cache"
        name = (
            name if mode == GenerationMode.ASSISTED_GENERATION else "prefill_chunk_size, which runs a prompt in parts"
        )
        raise ValueError(
            f"span: got {adapter.span!r} with {name}, expected 'all'. Fix: leave that out, or adapter.span = 'all'"
        )
    check_cache(adapter, config, mode, options)


def check_room(adapter: BayesianAdapter, mask: Tensor, config: GenerationConfig) -> None:
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


def check_cache(
    adapter: BayesianAdapter, config: GenerationConfig, mode: GenerationMode, options: Mapping[str, Any]
) -> None:
    """Refuse a kind of cache that does not serve."""
    kind = config.cache_implementation
    device = adapter.anatomy.device
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
    if kind == "quantized" and (config.num_beams or 1) > 1 and not quantised_rows_move():
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


# Options that know the rows of a call by their place.
BY_ROW = (
    "prefix_allowed_tokens_fn",
    "logits_processor",
    "stopping_criteria",
    "constraints",
    "past_key_values",
    "cache",
)


def rows_at_once(options: Mapping[str, Any], rows: int, asked: int | None, room: Callable[[], int]) -> int:
    """Prompts at once: those asked for, or as many as there is ``room`` for; all where an option knows them by their place."""
    named = [
        n
        for n, v in options.items()
        if (isinstance(v, Tensor) and not n.endswith("_token_id")) or (n in BY_ROW and v is not None)
    ]
    if asked is not None and asked < rows and named:
        raise refusal(
            "batch_size",
            f"{asked} for {rows} prompts with {named[0]}",
            "all at once: it knows them by their place",
            "leave one of them out",
        )
    return rows if named else asked or room()


def quantised_rows_move() -> bool:
    from transformers.cache_utils import QuantizedLayer

    return "reorder_cache" in vars(QuantizedLayer)


def assistant(adapter: BayesianAdapter, name: str) -> Any:
    """The mean adapter as a model of its own: modules without the context's hooks, over the very same tensors."""
    if name != "mean":
        raise ValueError(f"assistant_model is {name!r}, expected a model or 'mean'")
    model = adapter.anatomy.model
    shared = [*model.parameters(), *model.buffers()]
    # Of quantised layers: what bitsandbytes and HQQ keep beside their parameters.
    states = [vars(module).get(name) for module in model.modules() for name in ("state", "quant_state", "meta")]
    shared += [state for state in states if state is not None]
    return copy.deepcopy(model, {id(part): part for part in shared})
