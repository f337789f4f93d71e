"""A choice's tokens are those of the joint text after its prompt's: real tokenizers of every kind, and what they themselves say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tfb_ext
from tfb_ext.data import Example, encode

LINES = [
    "is the sky blue ? A: yes", "is the sea dry ? A: no", "question: will it rain? answer: maybe not", "A:yes A:no B: c",
    "yes no yes no yes no good bad good bad", "area man wins area man loses :: : :", "A: B: C: D:\n\nA: yes\n", "the areas",
]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>"]


def llama(template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """As Llama 2's file: a space is ▁, one more is put before every text, and nothing cuts a text into words."""
    inner = metaspace().backend_tokenizer
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = None
    return finished(inner, template)


def metaspace(template: str = "<s> $A", scheme: str = "first") -> PreTrainedTokenizerFast:
    """As transformers makes sentencepiece's: a space is ▁, and a text begins with one."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    inner.decoder = decoders.Metaspace()
    inner.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False))
    return finished(inner, template)


def byte_level(template: str = "$A", prefix: bool = False) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(LINES, trainer)
    return finished(inner, template)


def word_piece(template: str = "$A") -> PreTrainedTokenizerFast:
    letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    words = ["the", "area", "yes", "no", "is", "sky", "blue", "##yes", "##no", "##s", ":", "?", "."]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *letters, *words]))}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return finished(inner, template)


def unigram(template: str = "$A") -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    inner.train_from_iterator(LINES, trainer)
    return finished(inner, template)


def finished(inner: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    special = [(token, inner.token_to_id(token)) for token in SPECIAL]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


MAKERS = {
    "llama": llama,
    "metaspace": metaspace,
    "byte-level": byte_level,
    "word-piece": word_piece,
    "unigram": unigram,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: make() for name, make in MAKERS.items()} | {"prefix": byte_level(prefix=True)}


def joint(tokenizer: PreTrainedTokenizerFast, prompt: str, choice: str) -> list[int]:
    return list(tokenizer(prompt + choice)["input_ids"])


def harness_pair(tokenizer: PreTrainedTokenizerFast, prompt: str, choice: str) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness 0.4.9, ``TemplateLM._encode_pair``: trailing spaces go to the continuation, then the joint text is cut."""
    spaces = len(prompt) - len(prompt.rstrip())
    if spaces > 0:
        prompt, choice = prompt[:-spaces], prompt[-spaces:] + choice
    whole, context = tokenizer(prompt + choice)["input_ids"], tokenizer(prompt)["input_ids"]
    return context, whole[len(context) :]


@pytest.mark.parametrize("name", ["llama", "metaspace", "byte-level", "word-piece", "unigram", "prefix"])
@pytest.mark.parametrize("score", [None, "sequence"])
def test_prompt_and_choice_are_the_joint_text(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, score: Any
) -> None:
    tokenizer = tokenizers[name]
    prompts = ["is the sky blue ? A:", "A:", "will it rain? A:"]
    data = encode([Example(p, (" yes", " no"), 1) for p in prompts], tokenizer, score=score)
    tokens = data.choice_tokens if score else tuple((token,) for token in data.choice_ids)
    for prompt, ids in zip(prompts, data.token_ids, strict=True):
        for choice, ending in zip(data.choices, tokens, strict=True):
            assert [*ids, *ending] == joint(tokenizer, prompt, choice)
            assert (ids, list(ending)) == harness_pair(tokenizer, prompt, choice)


def test_a_metaspace_vocabulary_scores_what_the_model_would_write(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    """The probabilities are the model's own for the tokens of the joint text; alone, " yes" has a token for its space as well."""
    tokenizer = tokenizers["llama"]
    assert len(tokenizer(" yes", add_special_tokens=False)["input_ids"]) > 1
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=0.1)
    prompt, choices = "is the sky blue ? A:", (" yes", " no")
    data = encode([Example(prompt, choices)], tokenizer)
    whole = [joint(tokenizer, prompt, choice) for choice in choices]
    assert whole[0][:-1] == whole[1][:-1]

    def call() -> torch.Tensor:
        logits = adapter.model(input_ids=torch.tensor([whole[0][:-1]])).logits[0, -1]
        return torch.softmax(logits[[ids[-1] for ids in whole]], dim=-1)

    expected = zoo.separate_passes(adapter, [0, 1, 2], 0.1, call)
    assert torch.allclose(tfb_ext.predict(adapter, data, 3).sample_probabilities[:, 0], expected, atol=1e-5)
    sequences = encode([Example(prompt, choices)], tokenizer, score="sequence")
    assert sequences.choice_tokens == tuple((ids[-1],) for ids in whole)


def test_word_pieces_go_on_with_a_word(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["word-piece"]
    data = encode([Example("the area", ("yes", "no"))], tokenizer, score="sequence")
    assert [tokenizer.convert_ids_to_tokens(list(ids))[0][:2] for ids in data.choice_tokens] == ["##", "##"]
    for choice, ending in zip(data.choices, data.choice_tokens, strict=True):
        assert [*data.token_ids[0], *ending] == joint(tokenizer, "the area", choice)


@pytest.mark.parametrize(
    ("name", "prompt", "choices", "way"),
    [
        ("llama", "A: ", ("yes", "no"), "end the prompt without ' ' and begin the choices with it, ' yes'"),
        ("metaspace", "A: ", ("yes", "no"), "end the prompt without ' ' and begin the choices with it, ' yes'"),
        ("byte-level", "A: ", ("yes", "no"), "end the prompt without ' ' and begin the choices with it, ' yes'"),
        ("byte-level", "the ye", ("s", "t"), "begin the choices with a space, or end the prompt otherwise"),
        ("metaspace", "the ye", ("s", "t"), "begin the choices with a space, or end the prompt otherwise"),
    ],
)
def test_tokens_that_merge_are_refused(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, prompt: str, choices: tuple[str, ...], way: str
) -> None:
    for score in (None, "sequence", "token"):
        with pytest.raises(
            ValueError, match=f"example 1: got the prompt's last tokens .*they merge, expected .*Fix: {way}"
        ):
            encode([Example("A:\n\n", choices), Example(prompt, choices)], tokenizers[name], score=score)  # type: ignore[arg-type]


def test_tokens_that_differ_from_item_to_item() -> None:
    """A space is put before the text after a special token: the choice is ▁yes there, and yes after a letter."""
    tokenizer = metaspace(scheme="always")
    items = [Example("A:", ("yes", "no"), 0), Example("A: B<unk>", ("yes", "no"), 1), Example("B:", ("yes", "no"), 0)]
    tokens = [
        [joint(tokenizer, i.prompt, c)[len(tokenizer(i.prompt)["input_ids"]) :] for c in i.choices] for i in items
    ]
    assert tokens[0] != tokens[1] and tokens[0] == tokens[2]
    with pytest.raises(
        ValueError, match="(examples 0 and 1: got the choices .*Fix: end all prompts alike|is [23] tokens)"
    ):
        encode(items, tokenizer)
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=0.1)
    for by_length in (False, True):
        data = encode(items, tokenizer, score="sequence", by_length=by_length)
        expected = []
        for item, ids, endings in zip(items, data.token_ids, tokens, strict=True):
            logs = []
            for choice, ending in zip(item.choices, endings, strict=True):
                whole = joint(tokenizer, item.prompt, choice)
                assert whole == [*ids, *ending]
                with torch.no_grad():
                    log = torch.log_softmax(adapter.model(input_ids=torch.tensor([whole])).logits[0], -1)
                score = sum(log[len(ids) - 1 + i, token] for i, token in enumerate(ending))
                logs.append(score / (len(ending) if by_length else 1))
            expected.append(torch.softmax(torch.stack(logs), 0))
        found = tfb_ext.predict(adapter, data, 0, batch_size=2).probabilities
        assert torch.allclose(found, torch.stack(expected), atol=1e-5)
        assert data.select([1, 0]).sequences().targets == [tuple(e) for n in (1, 0) for e in tokens[n]]


@pytest.mark.parametrize("make", [llama, metaspace, byte_level, word_piece])
def test_a_token_after_every_text_is_refused(make: Any) -> None:
    for score in (None, "sequence"):
        with pytest.raises(ValueError, match="add_eos_token"):
            encode([Example("A:", (" yes", " no"))], make("<s> $A </s>"), score=score)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="add_eos_token"):  # as BERT's [SEP], which is no end-of-text token
            encode([Example("A:", (" yes", " no"))], make("$A <unk>"), score=score)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [llama, metaspace, byte_level, word_piece])
def test_a_rendered_chat_has_one_beginning(make: Any) -> None:
    tokenizer = make("<s> $A")
    once = encode([Example("<s>A:", (" yes", " no"))], tokenizer, score="sequence")
    begin = tokenizer.bos_token_id
    assert once.token_ids[0].count(begin) == 1 and once.token_ids[0][0] == begin
    bare = tokenizer("<s>A: yes", add_special_tokens=False)["input_ids"]
    assert [*once.token_ids[0], *once.choice_tokens[0]] == bare


def test_control_characters_and_white_space(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["byte-level"]
    for prompt in ("a\x00b:", "\x00", "\n", "\t:"):
        data = encode([Example(prompt, (" yes", " no"))], tokenizer)
        for choice, token in zip(data.choices, data.choice_ids, strict=True):
            assert [*data.token_ids[0], token] == joint(tokenizer, prompt, choice)


TEXT = st.text(alphabet="yesno AB:\n.é\x00", min_size=1, max_size=8)


@pytest.mark.parametrize("name", ["llama", "metaspace", "byte-level", "word-piece", "unigram", "prefix"])
@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(TEXT, min_size=1, max_size=3), choices=st.lists(TEXT, min_size=2, max_size=3, unique=True))
def test_any_text_is_the_joint_one_or_refused(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, prompts: list[str], choices: list[str]
) -> None:
    tokenizer = tokenizers[name]
    items = [Example(prompt, tuple(choices)) for prompt in prompts]
    for score in (None, "sequence"):
        try:
            data = encode(items, tokenizer, score=score)  # type: ignore[arg-type]
        except ValueError as error:
            assert any(word in str(error) for word in ("merge", "tokens", "token"))
            continue
        if score is None:
            endings = [[(token,) for token in data.choice_ids]] * len(items)
        else:
            endings = [data.sequences().targets[i * len(choices) : (i + 1) * len(choices)] for i in range(len(items))]
        for prompt, ids, tokens in zip(prompts, data.token_ids, endings, strict=True):
            assert ids == tokenizer(prompt)["input_ids"]
            for choice, ending in zip(choices, tokens, strict=True):
                assert [*ids, *ending] == joint(tokenizer, prompt, choice)
