"""Where rows end: lengths, texts and scores of a batch are those of each prompt alone in transformers' own ``generate``."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import bayesian, separate, tokenizer
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria

import tfb_ext
from tfb_ext.generation import Generation

TINY = 1e-7  # a posterior that is its mean
WORDS = tokenizer()
PROMPTS = ["w5 w6 w7", "w8", "w30 w9"]


class Ends(StoppingCriteria):
    """Ends a row at one of these tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.isin(input_ids[:, -1], self.tokens)


class Slow(StoppingCriteria):
    """Ends everything at its third call, whatever the tokens: it cannot be asked again afterwards."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= 3)


def plain(adapter: Any, prompt: str, **options: Any) -> list[int]:
    """The new tokens of one prompt alone, of the mean adapter."""
    ids = torch.tensor([WORDS(prompt)["input_ids"]])
    mask = torch.ones_like(ids)
    found: Any = adapter.model.generate(input_ids=ids, attention_mask=mask, tokenizer=WORDS, **copy.deepcopy(options))
    found = found if isinstance(found, Tensor) else found.sequences
    return found[0, ids.shape[1] :].tolist()


def score(adapter: Any, prompt: str, new: list[int]) -> float:
    """Log probability of the new tokens after the prompt under the mean adapter."""
    before = WORDS(prompt)["input_ids"]
    with torch.no_grad():
        logits = adapter.model(input_ids=torch.tensor([before + new])).logits[0]
    rows = torch.log_softmax(logits.float(), dim=-1)[len(before) - 1 : -1]
    return float(rows.gather(1, torch.tensor(new)[:, None]).sum())


def check(adapter: Any, prompts: list[str], **options: Any) -> Generation:
    """A batch against each of its prompts alone."""
    found = tfb_ext.generate(adapter, prompts, WORDS, samples=2, sigma=TINY, **copy.deepcopy(options))
    for row, prompt in enumerate(prompts):
        new = plain(adapter, prompt, **options)
        assert found.lengths[row] == len(new)
        assert found.tokens[row, : len(new)].tolist() == new
        assert found.texts[row] == WORDS.decode(new, skip_special_tokens=True)
        assert len(found.pieces[row]) == len(new)
        expected = score(adapter, prompt, new)
        assert math.isclose(found.token_scores[row], expected, abs_tol=1e-3)
        assert math.isclose(found.sequence_scores[row], expected, abs_tol=1e-3)
        assert found.total[row, : len(new)].isfinite().all() and found.total[row, len(new) :].isnan().all()
    return found


@pytest.fixture(scope="module")
def adapter() -> Any:
    return bayesian("llama", "all")


@pytest.fixture(scope="module")
def free(adapter: Any) -> list[list[int]]:
    """What the prompts go on with, if nothing ends them."""
    return [plain(adapter, p, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0) for p in PROMPTS]


GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def test_stop_strings_where_padding_is_the_end(adapter: Any, free: list[list[int]]) -> None:
    found = check(adapter, PROMPTS, **GREEDY, stop_strings=[f"w{free[0][0]}"], eos_token_id=2, pad_token_id=2)
    assert found.lengths[0] == 1 and found.lengths.max() == 8


def test_stop_strings_without_an_end_of_sequence_token(adapter: Any, free: list[list[int]]) -> None:
    found = check(adapter, PROMPTS, **GREEDY, stop_strings=[f"w{free[0][1]}"], eos_token_id=None, pad_token_id=0)
    assert found.lengths[0] == 2 and found.lengths.max() == 8


@pytest.mark.parametrize("eos", [-1, [-1], None])
def test_padding_that_is_no_token_of_the_model(adapter: Any, free: list[list[int]], eos: Any) -> None:
    """Plain transformers fails here where a row goes on after another has ended."""
    found = check(adapter, PROMPTS, **GREEDY, stop_strings=[f"w{free[0][0]}"], eos_token_id=eos)
    assert found.lengths[0] == 1 and found.lengths.max() == 8


def test_padding_that_the_model_may_say(adapter: Any, free: list[list[int]]) -> None:
    end, pad = free[0][2], free[1][7]
    found = check(adapter, PROMPTS, **GREEDY, eos_token_id=end, pad_token_id=pad)
    assert found.lengths[0] == free[0].index(end) + 1 and found.tokens[1, -1] == pad and found.lengths[1] == 8


@pytest.mark.parametrize("given", ["config", "model", "wrapper", "both"])
def test_a_generation_config_is_merged_as_transformers_merges_it(
    adapter: Any, free: list[list[int]], given: str
) -> None:
    """Ends and padding of the model's own configuration count in one that names only a length."""
    inner, end = adapter.anatomy.model, free[0][1]
    kept = inner.generation_config
    values = {"do_sample": False, "eos_token_id": [end, 2], "pad_token_id": 0}
    try:
        inner.generation_config = GenerationConfig(**values, **({"max_new_tokens": 6} if given == "model" else {}))
        if given == "wrapper":
            adapter.model.generation_config = GenerationConfig(**values, max_new_tokens=6)
        options: dict[str, Any] = {"generation_config": GenerationConfig(max_new_tokens=6)} if given == "config" else {}
        if given == "both":
            options = {"generation_config": GenerationConfig(max_new_tokens=3), "max_new_tokens": 6}
        found = check(adapter, PROMPTS, **options)
    finally:
        inner.generation_config = kept
        adapter.model.__dict__.pop("generation_config", None)
    assert found.lengths[0] == free[0].index(end) + 1 and found.lengths.max() == 6


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 9, "pad_token_id": 0, "eos_token_id": None},
        {"pad_token_id": 0, "eos_token_id": None},  # transformers' twenty
        {"max_new_tokens": 5, "max_length": 90, "pad_token_id": 0},
        {"max_new_tokens": 8, "stopping_criteria": [Slow()], "pad_token_id": 0},
        {"max_new_tokens": 8, "forced_eos_token_id": 2, "eos_token_id": 2, "pad_token_id": 2},
        {"max_new_tokens": 8, "max_time": 1e-9, "pad_token_id": 0},
        {"generation_config": GenerationConfig(max_new_tokens=4, return_dict_in_generate=True, output_scores=True)},
    ],
    ids=lambda options: "-".join(options),
)
def test_ways_to_end(adapter: Any, options: dict[str, Any]) -> None:
    prompts = (
        PROMPTS[:1] if "max_length" in options and len(options) == 3 and "max_new_tokens" not in options else PROMPTS
    )
    found = check(adapter, prompts, do_sample=False, **options)
    if "stopping_criteria" in options:
        assert found.lengths.tolist() == [3, 3, 3]
    if "max_time" in options:
        assert found.lengths.tolist() == [1, 1, 1]


@pytest.mark.parametrize("assist", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": "mean"}])
@pytest.mark.parametrize("end", [1, 3, 5])
def test_assisted_decoding(adapter: Any, free: list[list[int]], assist: dict[str, Any], end: int) -> None:
    options = {**GREEDY, "eos_token_id": free[0][end], "pad_token_id": 0}
    found = tfb_ext.generate(adapter, PROMPTS[0], WORDS, 2, sigma=TINY, **options, **assist)
    new = plain(adapter, PROMPTS[0], **options)
    assert found.tokens[0].tolist() == new and found.lengths.tolist() == [len(new)]
    assert math.isclose(found.token_scores[0], score(adapter, PROMPTS[0], new), abs_tol=1e-3)


@pytest.mark.parametrize(
    "padding",
    zoo.slow_but(
        [{"eos_token_id": 2, "pad_token_id": 2}, {"eos_token_id": None}, {"pad_token_id": 0}], {"pad_token_id": 0}
    ),
)
@pytest.mark.parametrize("stop", ["stop_strings", "stopping_criteria"])
def test_beams(adapter: Any, padding: dict[str, Any], stop: str) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "length_penalty": -3.0, **padding}
    said = [plain(adapter, p, **options) for p in PROMPTS]
    at = said[0][1]
    options[stop] = [f"w{at}"] if stop == "stop_strings" else [Ends([at])]
    found = check(adapter, PROMPTS, **options, early_stopping=True)
    assert found.lengths.min() < found.lengths.max()
    several = tfb_ext.generate(
        adapter, PROMPTS, WORDS, 2, sigma=TINY, **options, early_stopping=True, num_return_sequences=2
    )
    assert torch.equal(several.lengths[::2], found.lengths)
    for row, length in enumerate(several.lengths.tolist()):
        new = several.tokens[row, :length].tolist()
        assert at not in new[:-1] and (new[-1] == at or length == 6)
        assert math.isclose(several.token_scores[row], score(adapter, PROMPTS[row // 2], new), abs_tol=1e-3)


def test_several_sequences_of_a_prompt_end_apart(adapter: Any, free: list[list[int]]) -> None:
    torch.manual_seed(3)
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 4, "pad_token_id": 7}
    ends = list(range(3, 20))
    found = tfb_ext.generate(adapter, PROMPTS, WORDS, 2, sigma=TINY, stopping_criteria=[Ends(ends)], **options)
    assert len(found.lengths) == 12 and found.lengths.min() < found.lengths.max()
    for row, length in enumerate(found.lengths.tolist()):
        new = found.tokens[row, :length].tolist()
        assert not set(new[:-1]) & set(ends) and (new[-1] in ends or length == 8)
        assert math.isclose(found.token_scores[row], score(adapter, PROMPTS[row // 4], new), abs_tol=1e-3)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_batch_ends_as_its_prompts_do_alone(data: st.DataObject) -> None:
    adapter = _shared()
    word = st.integers(3, zoo.VOCAB - 1)
    prompts = [
        " ".join(f"w{i}" for i in data.draw(st.lists(word, min_size=1, max_size=5)))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    said = sorted({t for p in prompts for t in plain(adapter, p, **GREEDY, eos_token_id=None, pad_token_id=0)})
    token = st.sampled_from(said)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": data.draw(st.integers(1, 8))}
    options["eos_token_id"] = data.draw(st.none() | token | st.lists(token, min_size=1, max_size=2) | st.just(-1))
    options["pad_token_id"] = data.draw(st.none() | token | st.just(0))
    if data.draw(st.booleans()):
        options["stop_strings"] = [WORDS.convert_ids_to_tokens(data.draw(token))]
    if data.draw(st.booleans()):
        options["min_new_tokens"] = data.draw(st.integers(1, options["max_new_tokens"]))
    if data.draw(st.booleans()):
        options["stopping_criteria"] = [Ends([data.draw(token)])]
    if data.draw(st.booleans()):
        options["num_beams"] = 2
    named = {"stopping_criteria"}
    if data.draw(st.booleans()):  # the same in a configuration, where transformers takes None for "the model's own"
        config = GenerationConfig(**{n: v for n, v in options.items() if n not in named})
        options = {n: v for n, v in options.items() if n in named} | {"generation_config": config}
    check(adapter, prompts, **options)


_ADAPTERS: list[Any] = []


def _shared() -> Any:
    if not _ADAPTERS:
        _ADAPTERS.append(bayesian("llama", "all"))
    return _ADAPTERS[0]


def test_the_models_patched_method_is_put_back(adapter: Any) -> None:
    before = set(vars(adapter.anatomy.model))

    class Raises(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tfb_ext.generate(adapter, PROMPTS, WORDS, 2, **GREEDY, stopping_criteria=[Raises()])
    assert set(vars(adapter.anatomy.model)) == before


@pytest.mark.parametrize("seed", range(3))
def test_the_length_is_the_one_that_transformers_makes(adapter: Any, seed: int) -> None:
    """Our copy of how ``generate`` tells a length that somebody chose from its default."""
    from tfb_ext.generation.options import resolved, with_length

    draw, model = torch.Generator().manual_seed(seed), adapter.anatomy.model
    kept, found = model.generation_config, list[int]()
    original = model._get_stopping_criteria

    def some(*names: str) -> dict[str, int]:
        values = {name: int(torch.randint(8, 40, (1,), generator=draw)) for name in names}
        return {name: value for name, value in values.items() if torch.rand(1, generator=draw) < 0.4}

    def recorded(generation_config: Any, **rest: Any) -> Any:
        found.append(generation_config.max_length)
        return original(generation_config=generation_config, **rest)

    ids = torch.tensor([[5, 6, 7]])
    model._get_stopping_criteria = recorded
    try:
        for _ in range(8):
            names = ("max_new_tokens", "max_length")
            model.generation_config = GenerationConfig(do_sample=False, **some(*names))
            options: dict[str, Any] = {"pad_token_id": 0, "max_time": 1e-9, **some(*names)}
            if torch.rand(1, generator=draw) < 0.5:
                options["generation_config"] = GenerationConfig(do_sample=False, **some(*names))
            adapter.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            config = with_length(adapter, resolved(adapter, options)[0], options, ids)
            assert config.max_length == found[-1]
    finally:
        model.generation_config = kept
        del model._get_stopping_criteria


def test_json_has_no_word_for_what_is_not_finite(adapter: Any) -> None:
    import dataclasses

    found = tfb_ext.generate(adapter, PROMPTS, WORDS, 2, **GREEDY)
    scores = found.log_probabilities.clone()
    scores[0, 1] = -math.inf
    items = dataclasses.replace(found, log_probabilities=scores).to_dict()["items"]
    read = json.loads(json.dumps(items, allow_nan=False))
    assert read[0]["log_probabilities"][1] is None and read[0]["token_score"] is None
    assert isinstance(read[1]["token_score"], float)


def test_scores_of_a_mask_with_holes() -> None:
    adapter, batch = bayesian(), zoo.prompt(2)
    batch["attention_mask"][0, 2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = tfb_ext.generate(adapter, batch, samples=3, **options)
    with separate(adapter), torch.no_grad():
        expected = adapter.model.generate(
            **batch, **options, use_cache=False, return_dict_in_generate=True, output_logits=True
        )
    assert torch.equal(found.sequences, expected.sequences)
    logits = torch.stack(expected.logits, dim=1)
    at = found.tokens[..., None]
    assert torch.allclose(found.log_probabilities, torch.log_softmax(logits, -1).gather(-1, at)[..., 0], atol=1e-4)
