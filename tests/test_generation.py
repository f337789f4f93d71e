"""``tfb_ext.generate``: the same text as an oracle of separate uncached passes for every option, and what it says about it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

import tfb_ext
from tfb_ext.forward.caches import cache_argument
from tfb_ext.generation import Generation
from tfb_ext.generation.options import quantised_rows_move

SAMPLES, SIGMA, NEW, PROMPT = 3, 0.3, 6, 6


def tokenizer(**options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, zoo.VOCAB)}
    words["abcdef"] = zoo.VOCAB  # the text with which transformers tries out a tokenizer for stop strings
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left", **options
    )


def bayesian(name: str = "llama", depth: Any = 2, device: str = "cpu", **options: Any) -> Any:
    return tfb_ext.bayesianize(zoo.peft_model(name).to(device), depth=depth, sigma=SIGMA, **options)


def generate(adapter: Any, prompts: Any, **options: Any) -> Generation:
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "samples": SAMPLES}
    return tfb_ext.generate(adapter, prompts, **{**defaults, **options})


@contextmanager
def separate(adapter: Any) -> Iterator[None]:
    """Inside, the model's forward is the mean of separate passes, one for each sample's written weights."""
    model = adapter.anatomy.model
    plain = model.forward

    @functools.wraps(plain)  # generate looks at its arguments
    def forward(**inputs: Any) -> Any:
        outputs: list[Any] = []

        def call() -> Tensor:
            outputs.append(plain(**inputs))
            return torch.log_softmax(outputs[-1].logits.float(), dim=-1)

        mean = zoo.average(zoo.separate_passes(adapter, range(SAMPLES), SIGMA, call))
        outputs[-1].logits = mean
        return outputs[-1]

    model.forward = forward
    try:
        yield
    finally:
        del model.__dict__["forward"]


def oracle(adapter: Any, prompts: dict[str, Tensor], **options: Any) -> Tensor:
    """Sequences of transformers' own ``generate``, without a cache, over the mean of separate passes."""
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with separate(adapter), torch.no_grad():
        sequences: Tensor = adapter.model.generate(**prompts, **{**defaults, **options}, use_cache=False)
    return sequences


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-4, equal_nan=True)


# What it says about a text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("depth", ["all", 2])
@pytest.mark.parametrize("name", zoo.slow_but(["llama", "gemma2", "gemma3", "gpt2", "llama-head"], "llama"))
def test_scores_are_those_of_separate_passes(name: str, depth: Any, device: str) -> None:
    adapter, batch = bayesian(name, depth, device), zoo.prompt(3, device)
    found = generate(adapter, batch, alternatives=4)
    assert torch.equal(found.sequences, oracle(adapter, batch).cpu())
    ids = found.sequences.to(device)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, PROMPT:])], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def call() -> Tensor:
        out = adapter.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return torch.log_softmax(out.logits[:, PROMPT - 1 : -1].float(), dim=-1)

    each = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, call).cpu()
    mean, at = zoo.average(each), found.tokens[..., None]
    assert close(found.sample_log_probabilities, each.gather(-1, at.expand(SAMPLES, -1, -1, 1))[..., 0])
    assert close(found.log_probabilities, mean.gather(-1, at)[..., 0])
    assert close(found.total, torch.special.entr(mean.exp()).sum(-1))
    assert close(found.aleatoric, torch.special.entr(each.exp()).sum(-1).mean(0))
    assert (found.epistemic > 1e-3).all() and close(found.epistemic, found.total - found.aleatoric)
    assert torch.equal(found.alternatives, mean.topk(4).indices)
    assert close(found.alternative_probabilities, mean.topk(4).values.exp())
    products = found.sample_log_probabilities.double().exp().prod(-1)
    assert close(found.sequence_scores, products.mean(0).log().float())
    assert close(found.token_scores, found.log_probabilities.sum(-1))
    assert (found.sequence_scores - found.token_scores).abs().max() > 1e-3
    assert found.lengths.tolist() == [NEW] * 3 and found.sigma == SIGMA and found.samples == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "mode", "longest"),
    [({}, "weight", 1), ({"prompt_lookup_num_tokens": 2}, "weight", PROMPT + 2), ({}, "token", PROMPT)],
)
def test_the_last_block_makes_what_a_step_looks_at(options: dict[str, Any], mode: str, longest: int) -> None:
    adapter = zoo.compared(bayesian(mode=mode))
    shapes = small_sets.shapes_through(adapter.anatomy.blocks[-1].mlp)
    batch = zoo.prompt(1)
    batch["input_ids"] = batch["input_ids"][:, :2].repeat(1, PROMPT // 2)  # so that there is something to look up
    with adapter.predictive(SAMPLES):
        adapter.model(**batch)
    assert [s[1] for s in shapes] == [PROMPT]
    shapes.clear()
    found = generate(adapter, batch, **options)
    *seen, scoring = (s[1] for s in shapes)  # at last the whole text at once
    assert max(seen) == longest and scoring == found.sequences.shape[1]


def test_rows_end_at_their_end() -> None:
    adapter, batch = bayesian(), zoo.prompt(2)
    free = generate(adapter, batch)
    end = int(free.tokens[0, 2])
    assert end not in free.tokens[1]
    found = generate(adapter, batch, eos_token_id=end)
    first = free.tokens[0].tolist().index(end) + 1
    assert found.lengths.tolist() == [first, NEW]
    assert (found.tokens[0, first:] == 0).all() and found.total[0, first:].isnan().all()
    assert not found.total[0, :first].isnan().any() and not found.total[1].isnan().any()
    for name in ("log_probabilities", "total", "aleatoric"):
        assert close(getattr(found, name)[0, :first], getattr(free, name)[0, :first])
    assert found.sequence_scores.isfinite().all()


def test_scoring_is_cut_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from tfb_ext.generation import scores

    adapter, batch = bayesian(), zoo.prompt(3)
    whole, run, asked = generate(adapter, batch), scores.run, []

    def tight(adapter: Any, request: Any) -> Any:
        asked.append((len(request.samples), len(request.inputs["input_ids"])))
        if len(request.samples) * len(request.inputs["input_ids"]) > 4:
            raise torch.OutOfMemoryError
        return run(adapter, request)

    monkeypatch.setattr(scores, "run", tight)
    cut = generate(adapter, batch)
    assert asked[0] == (len(whole.samples), 3) and {rows for _, rows in asked} == {3}  # samples are split first
    assert sum(size for size, rows in asked if size * rows <= 4) == len(whole.samples)
    asked.clear()

    def one_row(adapter: Any, request: Any) -> Any:
        asked.append(len(request.inputs["input_ids"]))
        if asked[-1] > 1:
            raise torch.OutOfMemoryError
        return run(adapter, request)

    monkeypatch.setattr(scores, "run", one_row)
    rows = generate(adapter, batch)
    assert asked.count(1) >= 3
    for name in ("sample_log_probabilities", "log_probabilities", "total", "aleatoric", "alternative_probabilities"):
        assert close(getattr(cut, name), getattr(whole, name)), name
        assert close(getattr(rows, name), getattr(whole, name)), name


def test_per_sample_logits_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little room for the fold, scores come from several pieces of samples and are the same."""
    from tfb_ext.forward import fold

    adapter, batch = bayesian(), zoo.prompt(3)
    whole = generate(adapter, batch)
    monkeypatch.setattr(fold, "FOLD_BYTES", 1)
    pieces = generate(adapter, batch)
    assert close(pieces.sample_log_probabilities, whole.sample_log_probabilities)
    assert close(pieces.aleatoric, whole.aleatoric)


# Every option of generate -------------------------------------------------------------------------------------------

SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "top_k": 0, "temperature": 0.5},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.6},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.2},
    "typical_p": {"do_sample": True, "top_k": 0, "typical_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "suppress_tokens": {"suppress_tokens": list(range(3, 50))},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": list(range(3, 60))},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(40, zoo.VOCAB)]},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "top_k": 20},
    "return sequences": {"num_return_sequences": 2, "do_sample": True},
    "return beams": {"num_return_sequences": 2, "num_beams": 3},
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
}


# What reorders or multiplies rows meets every cache; the rest only changes probabilities.
MOVING = ("greedy", "beams", "return sequences", "return beams")


@pytest.mark.parametrize(
    ("search", "cache"),
    zoo.slow_but(
        [(search, cache) for cache in CACHES for search in (MOVING if cache != "dynamic" else SEARCHES)],
        *[(search, "dynamic") for search in MOVING],
    ),
)
def test_every_search_is_the_oracles(search: str, cache: str) -> None:
    adapter, batch, options = bayesian("qwen2"), zoo.prompt(2), SEARCHES[search]
    torch.manual_seed(1)
    expected = oracle(adapter, batch, **options)
    torch.manual_seed(1)
    found = generate(adapter, batch, **options, **CACHES[cache])
    assert torch.equal(found.sequences[:, : expected.shape[1]], expected)
    assert found.total.isfinite().sum() == found.lengths.sum()
    if search != "greedy":
        assert found.sequences.shape != (2, PROMPT + NEW) or not torch.equal(found.sequences, oracle(adapter, batch))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2"])
@pytest.mark.parametrize("cache", ["static", "chunked prefill"])
def test_caches_of_other_architectures(name: str, cache: str) -> None:
    adapter, batch = bayesian(name), zoo.prompt(2)
    assert torch.equal(generate(adapter, batch, **CACHES[cache]).sequences, oracle(adapter, batch))


# Quantised and offloaded caches -------------------------------------------------------------------------------------

# Groups of 16 numbers lie within one row, whose keys of a token are 16 numbers here; four tokens stay as they are.
GROUPED = {"nbits": 4, "q_group_size": 16, "residual_length": 4}
BACKENDS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "quanto": GROUPED,
    "hqq": {**GROUPED, "axis_key": 1, "axis_value": 1},
}


def quantised(backend: str) -> dict[str, Any]:
    """Options of ``generate``, skipping the test where the backend is not there."""
    from transformers import cache_utils
    from transformers.utils import is_hqq_available, is_optimum_quanto_available

    if backend == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    if backend == "fp8" and torch.tensor(500.0).to(torch.float8_e4m3fn).isnan():
        pytest.skip("this torch makes NaN of keys larger than the prompt's")
    if backend == "quanto" and not is_optimum_quanto_available():
        pytest.skip("needs optimum-quanto")
    if backend == "hqq" and not is_hqq_available():
        pytest.skip("needs hqq")
    return {"cache_implementation": "quantized", "cache_config": {"backend": backend, **BACKENDS[backend]}}


@contextmanager
def separate_caches(adapter: Any, backend: str) -> Iterator[dict[str, Any]]:
    """As :func:`separate`, each pass with a quantised cache of its own; gives ``generate`` the cache to go by."""
    from transformers import QuantizedCache

    model = adapter.anatomy.model
    plain = model.forward
    caches = [QuantizedCache(backend, model.config, **BACKENDS[backend]) for _ in range(SAMPLES)]

    class Together(type(caches[0])):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(caches[0].__dict__)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            for cache in caches:
                cache.reorder_cache(beam_idx)

    together = Together()
    name = cache_argument(model)

    @functools.wraps(plain)
    def forward(**inputs: Any) -> Any:
        left, outputs = iter(caches), list[Any]()

        def call() -> Tensor:
            outputs.append(plain(**{**inputs, name: next(left)}))
            return torch.log_softmax(outputs[-1].logits.float(), dim=-1)

        mean = zoo.average(zoo.separate_passes(adapter, range(SAMPLES), SIGMA, call))
        outputs[-1].logits, outputs[-1][name] = mean, together
        return outputs[-1]

    model.forward = forward
    try:
        yield {name: together}
    finally:
        del model.__dict__["forward"]


def step_logits(adapter: Any, prompts: dict[str, Tensor], forced: Tensor, **options: Any) -> Tensor:
    """(R, NEW, V) what transformers' ``generate`` says at every step, along a given continuation."""
    found = adapter.model.generate(
        **prompts,
        **options,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        prefix_allowed_tokens_fn=lambda row, ids: [int(forced[row, len(ids)])],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(found.sequences, forced)
    logits: Tensor = torch.log_softmax(torch.stack(found.logits, dim=1).float(), dim=-1)
    return logits


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", zoo.slow_but(["all", 2], 2))
def test_quantised_caches_are_as_exact_as_each_samples_own(depth: Any, backend: str, device: str) -> None:
    """Quanto's groups lie within a row, so the samples' common cache holds what their own would; the scale of fp8 is of a whole
    batch and hqq's refinement of its zero points stops for a whole batch at once, so these may be twice as far from no
    quantisation at all as their own caches are."""
    options, adapter, batch = quantised(backend), bayesian("qwen2", depth, device), zoo.prompt(2, device)
    forced = generate(adapter, batch).sequences.to(device)
    with separate(adapter), torch.no_grad():
        exact = step_logits(adapter, batch, forced, use_cache=False)
    with separate_caches(adapter, backend) as cache, torch.no_grad():
        alone = step_logits(adapter, batch, forced, **cache)
    with adapter.predictive(SAMPLES):
        together = step_logits(adapter, batch, forced, **options)
    error, own = (float((logits - exact).abs().max()) for logits in (together, alone))
    assert own > 1e-3 and error <= 2 * own
    if backend == "quanto":
        assert close(together, alone)


@pytest.mark.parametrize("search", zoo.slow_but(MOVING, "beams"))
@pytest.mark.parametrize("backend", ["fp8", "quanto"])
def test_searches_move_the_rows_of_quantised_caches(backend: str, search: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, adapter, batch = quantised(backend), bayesian("qwen2"), zoo.prompt(2)
    if "beams" in search and not quantised_rows_move():
        with pytest.raises(ValueError, match=r"num_beams 3: transformers .* cannot reorder quantised rows; upgrade it"):
            generate(adapter, batch, **SEARCHES[search], **options)
        return
    if backend == "fp8":  # one scale for all batches, so that a row is quantised alike in each
        from transformers.cache_utils import Fp8QuantizedLayer

        quantise, fixed = Fp8QuantizedLayer._quantize, torch.tensor(1 / 16)
        monkeypatch.setattr(Fp8QuantizedLayer, "_quantize", lambda self, x, scale=None: quantise(self, x, fixed))
    torch.manual_seed(1)
    with separate_caches(adapter, backend) as cache, torch.no_grad():
        defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = adapter.model.generate(**batch, **{**defaults, **SEARCHES[search]}, **cache)
    torch.manual_seed(1)
    found = generate(adapter, batch, **SEARCHES[search], **options)
    assert torch.equal(found.sequences[:, : expected.shape[1]], expected)


def test_an_offloaded_cache_fetches_after_what_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            current.append(self)

        def __exit__(self, *_: Any) -> None:
            current.pop()

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits for {other.name}")

    current = [Stream("computing")]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])

    class Offloaded(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.offloading, self.prefetch_stream = True, Stream("fetching")

        def update(self, *args: Any, **kwargs: Any) -> Any:  # the copies themselves need a GPU
            self.offloading = False
            try:
                return super().update(*args, **kwargs)
            finally:
                self.offloading = True

        def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
            log.append(f"fetch {layer_idx}")

    adapter, cache = bayesian("qwen2"), Offloaded()
    model, batch = adapter.model, zoo.prompt(2)
    name = cache_argument(adapter.anatomy.model)
    with adapter.predictive(SAMPLES):
        model(**batch, **{name: cache})
        for _ in range(2):  # prepared once
            model(batch["input_ids"][:, -1:], **{name: cache})
            cache.prefetch(1, False)
            assert log == ["fetching waits for computing", "fetch 1"]
            log.clear()
        cache.reorder_cache(torch.tensor([1, 0]))
    assert log == ["computing waits for fetching"]


@pytest.mark.gpu
@pytest.mark.parametrize("search", MOVING)
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches(cache: str, search: str) -> None:
    """Also where the GPU lags behind the host, so that copies between them are late."""
    adapter, batch, options = bayesian("qwen2", device="cuda"), zoo.prompt(2, "cuda"), SEARCHES[search]
    torch.manual_seed(1)
    expected = oracle(adapter, batch, **options).cpu()
    torch.manual_seed(1)
    for block in adapter.anatomy.blocks:
        block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(1_000_000))
    found = generate(adapter, batch, **options, cache_implementation=cache)
    assert torch.equal(found.sequences[:, : expected.shape[1]], expected)


def test_a_streamer_gets_the_tokens_as_they_come() -> None:
    from transformers.generation.streamers import BaseStreamer

    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[Tensor] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.parts.append(value.flatten())

        def end(self) -> None:
            self.ended = True

    adapter, batch, streamer = bayesian(), zoo.prompt(1), Kept()
    found = generate(adapter, batch, streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat(streamer.parts), found.sequences[0])
    assert len(streamer.parts) == 1 + NEW


def test_an_interrupted_stream_leaves_the_model_as_it_was() -> None:
    from transformers.generation.streamers import BaseStreamer

    class Stops(BaseStreamer):
        def put(self, value: Tensor) -> None:
            raise KeyboardInterrupt

        def end(self) -> None:
            pass

    adapter, batch = bayesian(), zoo.prompt(1)
    before = adapter.model(**batch).logits
    with pytest.raises(KeyboardInterrupt):
        generate(adapter, batch, streamer=Stops())
    assert torch.equal(adapter.model(**batch).logits, before)
    generate(adapter, batch)


@pytest.mark.parametrize("depth", zoo.slow_but(["all", 2], 2))
def test_assisted_by_the_mean_adapter(depth: Any) -> None:
    adapter, batch = bayesian("llama", depth), zoo.prompt(1)
    expected = oracle(adapter, batch)
    found = generate(adapter, batch, assistant_model="mean")
    assert torch.equal(found.sequences, expected)
    looked_up = generate(adapter, batch, prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up.sequences, expected)


def test_fresh_noise_at_every_step_is_scored_too() -> None:
    adapter, batch = bayesian(), zoo.prompt(2)
    adapter.mode = "token"
    found = generate(adapter, batch)
    again = generate(adapter, batch)
    assert torch.equal(found.sequences, again.sequences) and torch.equal(found.total, again.total)
    assert (found.epistemic > 0).all()
    adapter.mode = "weight"
    assert (found.total - generate(adapter, batch).total).abs().max() > 1e-3


# Texts --------------------------------------------------------------------------------------------------------------


def test_texts_and_pieces() -> None:
    adapter, words = bayesian(), tokenizer()
    found = generate(adapter, ["w5 w6 w7", "w8"], tokenizer=words)
    batch = words(["w5 w6 w7", "w8"], return_tensors="pt", padding=True)
    assert torch.equal(found.sequences, oracle(adapter, {n: batch[n] for n in ("input_ids", "attention_mask")}))
    for row, (text, pieces) in enumerate(zip(found.texts, found.pieces, strict=True)):
        assert text == words.decode(found.tokens[row], skip_special_tokens=True)
        assert len(pieces) == NEW and "".join(pieces) == words.decode(found.tokens[row])
    assert generate(adapter, "w8", tokenizer=words).texts == (found.texts[1],)


def test_conversations_go_through_the_chat_template() -> None:
    template = "{% for m in messages %}{{ m['role'] == 'user' and 'w9' or 'w10' }} {{ m['content'] }} {% endfor %}w11"
    adapter, words = bayesian(), tokenizer(chat_template=template)
    found = generate(adapter, [{"role": "user", "content": "w5"}], tokenizer=words)
    assert words.decode(found.sequences[0, : found.prompt_length]) == "w9 w5 w11"
    two = generate(
        adapter, [[{"role": "user", "content": "w5"}], [{"role": "user", "content": "w6 w7"}]], tokenizer=words
    )
    assert len(two.texts) == 2 and two.texts[0] == found.texts[0]
    with pytest.raises(ValueError, match="prompt 0 is a conversation, but the tokenizer has no chat template"):
        generate(adapter, [{"role": "user", "content": "w5"}], tokenizer=tokenizer())


def test_stop_strings_end_a_row() -> None:
    adapter, words = bayesian(), tokenizer()
    free = generate(adapter, ["w5 w6 w7", "w8"], tokenizer=words)
    stop = free.pieces[0][2].strip()
    assert stop not in free.texts[1].split()
    # transformers fills an ended row with padding only where there is an end-of-sequence token, too.
    found = generate(adapter, ["w5 w6 w7", "w8"], tokenizer=words, stop_strings=[stop], eos_token_id=2)
    assert found.lengths.tolist() == [free.texts[0].split().index(stop) + 1, NEW]
    assert found.texts[0].split()[-1] == stop


def test_characters_of_several_tokens() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tfb_ext.generation.result import pieces_of

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    byte = PreTrainedTokenizerFast(tokenizer_object=made)
    text = "aé日b"
    tokens = byte(text)["input_ids"]
    assert pieces_of(tokens, byte) == ("a", "", "é", "", "", "日", "b")
    cut = pieces_of(tokens[:-2], byte)  # the text ends inside a character
    assert cut[:3] == ("a", "", "é") and "".join(cut) == byte.decode(tokens[:-2])


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {"tokenizer": tokenizer()}, "prompt 0 is empty"),
        (["w5", ""], {"tokenizer": tokenizer()}, "prompt 1 is empty"),
        ([], {"tokenizer": tokenizer()}, "prompts is empty"),
        ([3], {"tokenizer": tokenizer()}, "prompt 0 is 3, expected a text or a list of messages"),
        ("w5", {}, "prompts are texts, expected a tokenizer"),
        (
            {"input_ids": torch.ones(3)},
            {},
            r"input_ids: got float32 of shape \(3,\), expected int64 of shape \(rows, tokens\)",
        ),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.zeros(1, 2)},
            {},
            "attention_mask: got 0 alone in row 0",
        ),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[1, 0]])}, {}, "padded on the right"),
        (
            zoo.prompt(1),
            {"max_new_tokens": 125},
            "longest prompt has 6 tokens and 125 more are asked for.*context is 128",
        ),
        (zoo.prompt(1), {"alternatives": 0}, "alternatives is 0"),
        (zoo.prompt(1), {"samples": 0}, "samples is 0"),
        (zoo.prompt(1), {"guidance_scale": 2.0}, "does not take guidance_scale: its second"),
        (zoo.prompt(1), {"output_scores": True}, "does not take output_scores"),
        (
            zoo.prompt(1),
            {"cache_implementation": "offloaded"},
            "is 'offloaded', which copies .* model is on cpu; move it",
        ),
        (
            zoo.prompt(1),
            {"cache_implementation": "offloaded_static"},
            "is 'offloaded_static', which copies .*, or leave",
        ),
        (
            zoo.prompt(1),
            {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}, "assistant_model": "mean"},
            "'quantized' with assistant_model: rejected guesses .* cannot be cut; leave assistant_model or",
        ),
        (
            zoo.prompt(1),
            {"generation_config": GenerationConfig(cache_implementation="quantized"), "prompt_lookup_num_tokens": 2},
            "'quantized' with prompt_lookup_num_tokens",
        ),
        (zoo.prompt(1), {"assistant_model": "median"}, "assistant_model is 'median', expected a model or 'mean'"),
    ],
)
def test_refusals(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(bayesian(), prompts, **options)


def test_classifiers_do_not_generate() -> None:
    with pytest.raises(ValueError, match="LlamaForSequenceClassification does not generate text"):
        generate(bayesian("llama-cls"), zoo.prompt(1))


@pytest.mark.slow
@pytest.mark.parametrize("options", zoo.slow_but([{}, {"do_sample": True}], {}))
def test_nan_names_the_module(options: dict[str, Any]) -> None:
    adapter = bayesian()
    adapter.model.get_base_model().model.layers[3].mlp.act_fn.register_forward_hook(lambda m, a, out: out * math.nan)
    with pytest.raises(ValueError, match=r"NaN or infinite at sigma = 0.3.*model.layers.3.mlp.act_fn \(SiLU"):
        generate(adapter, zoo.prompt(1), **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2, "num_return_sequences": 2}, {"by": "linear"}, {"span": "answer"}],
    ids=["greedy", "beams", "linear", "span"],
)
def test_prompts_a_few_at_a_time_are_what_they_are_together(options: dict[str, Any]) -> None:
    """Rows end after different numbers of tokens, so those of one batch are shorter than those of another."""
    adapter, words = bayesian(span=options.pop("span", "all")), tokenizer()
    batch = zoo.prompt(3)
    free = generate(adapter, batch, **options)
    ends = free.tokens[0, 1].item()
    asked = {"eos_token_id": ends, "tokenizer": words, **options}
    whole = generate(adapter, batch, **asked)
    assert len(set(whole.lengths.tolist())) > 1
    for size in (1, 2):
        found = generate(adapter, batch, batch_size=size, **asked)
        assert found.lengths.tolist() == whole.lengths.tolist() and found.pieces == whole.pieces
        assert found.texts == whole.texts and found.prompt_length == whole.prompt_length
        inside = torch.arange(whole.tokens.shape[1]) < whole.lengths[:, None]
        assert torch.equal(found.tokens[inside], whole.tokens[inside])
        for name in ("log_probabilities", "total", "aleatoric", "standard_deviation", "sequence_standard_deviation"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), atol=1e-4, rtol=1e-4, equal_nan=True)
        torch.testing.assert_close(
            found.sample_log_probabilities, whole.sample_log_probabilities, atol=1e-4, rtol=1e-4, equal_nan=True
        )
        assert torch.equal(found.alternatives[inside], whole.alternatives[inside])
    with pytest.raises(ValueError, match="batch_size"):
        generate(adapter, batch, batch_size=0)


@pytest.mark.parametrize(
    "name", ["prefix_allowed_tokens_fn", "logits_processor", "stopping_criteria", "past_key_values"]
)
def test_what_knows_rows_by_their_place_has_all_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batch = bayesian(), zoo.prompt(3)
    made: dict[str, Any] = {
        "prefix_allowed_tokens_fn": lambda: lambda row, ids: [10 + int(row)],
        "logits_processor": lambda: [lambda ids, logits: logits - 50 * torch.arange(len(logits))[:, None]],
        "stopping_criteria": lambda: [lambda ids, scores: torch.arange(len(ids)) < ids.shape[1] - 7],
        "past_key_values": lambda: DynamicCache(config=adapter.anatomy.model.config),
    }
    whole = generate(adapter, batch, **{name: made[name]()})
    monkeypatch.setattr("tfb_ext.generation.text.room_for_rows", lambda *_: 1)
    assert torch.equal(generate(adapter, batch, **{name: made[name]()}).sequences, whole.sequences)
    with pytest.raises(ValueError, match=f"batch_size: got 1 for 3 prompts with {name}, expected all at once"):
        generate(adapter, batch, batch_size=1, **{name: made[name]()})


def test_prompts_that_memory_has_no_room_for_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their keys and values: the whole text of every sample, or with a span what follows the prompt and that once."""
    asked: list[tuple[int, ...]] = []

    def room(model: Any, device: Any, *counts: int) -> int:
        asked.append(counts)
        return 2

    batch = zoo.prompt(3)
    for span in ("all", "answer"):
        adapter = bayesian(span=span)
        whole = generate(adapter, batch)
        with monkeypatch.context() as patched:
            patched.setattr("tfb_ext.generation.text.room_for_rows", room)
            found = generate(adapter, batch)
        assert torch.equal(found.sequences, whole.sequences)
    width = batch["input_ids"].shape[1]
    assert asked == [(0, width + NEW, SAMPLES), (width, NEW, SAMPLES)]


@pytest.mark.gpu
def test_prompts_whose_samples_do_not_fit_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batch = bayesian(device="cuda"), zoo.prompt(3, "cuda")
    whole = generate(adapter, batch)
    lengths: list[int] = []
    adapter.anatomy.blocks[-1].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    monkeypatch.setattr("tfb_ext.generation.text.room_for_tokens", lambda *_: 2 * 3 * SAMPLES)
    found = generate(adapter, batch)
    assert torch.equal(found.sequences, whole.sequences)
    width = batch["input_ids"].shape[1]
    assert lengths[: (width + 1) // 2] == [2] * (width // 2) + [1] * (width % 2)
