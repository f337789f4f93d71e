"""What ``generate`` makes of texts, conversations and tensors: the tokens that transformers makes, or words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_generation import bayesian, generate, oracle, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

import tfb_ext

PLAIN = "{% for m in messages %}{{ 'w9' if m['role'] == 'user' else 'w10' }} {{ m['content'] }} </s> {% endfor %}"
START = "{% if add_generation_prompt %}w10{% endif %}"
CHAT = "{{ bos_token }} " + PLAIN + START
LISTS = (
    "{% for m in messages %}w9 {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }} {% endfor %}{% endif %} </s> {% endfor %}" + START
)
STRIPS = "{% for m in messages %}w9 {{ m['content'] | trim }} </s> {% endfor %}" + START
USERS = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}w9 {{ m['content'] }} </s> {% endif %}{% endfor %}"
    + START
)
AS_JSON = "{% for m in messages %}w9 {{ m['content'] | tojson }} </s> {% endfor %}" + START
STRICT = (
    "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN + START
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def with_bos(template: str = CHAT) -> Any:
    """A tokenizer that puts its beginning-of-sequence token before every text, as Llama's does."""
    words = tokenizer(chat_template=template)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return words


@pytest.fixture(scope="module")
def adapter() -> Any:
    return bayesian("llama", 2)


def prompt_tokens(adapter: Any, prompts: Any, words: Any) -> list[int]:
    found = generate(adapter, prompts, tokenizer=words, max_new_tokens=1)
    tokens: list[int] = found.sequences[0, : found.prompt_length].tolist()
    return tokens


# Texts and conversations --------------------------------------------------------------------------------------------


def test_a_rendered_conversation_begins_once(adapter: Any) -> None:
    words, messages = with_bos(), [user("w5 w6")]
    text = words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = words.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert expected[0] == 1 and 1 not in expected[1:]
    assert prompt_tokens(adapter, text, words) == expected
    assert prompt_tokens(adapter, "\n" + text, words) == expected
    assert prompt_tokens(adapter, messages, words) == expected
    assert prompt_tokens(adapter, "w5 w6", words) == words("w5 w6")["input_ids"] == [1, 5, 6]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["<s>", "</s>", "w4", "w5"]), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(" \n"),
)
def test_special_tokens_come_once(parts: list[str], last: bool, space: str) -> None:
    """A text with what the tokenizer puts first is tokenised without the tokenizer's own, any other with them."""
    from tfb_ext.generation.prompts import _text_tokens

    words = with_bos()
    if last:
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    text = space.join(parts)
    expected = words(text, add_special_tokens=parts[0] != "<s>")["input_ids"]
    assert _text_tokens(text, words) == expected


@pytest.mark.parametrize("template", [CHAT, LISTS, STRIPS, AS_JSON], ids=["plain", "lists", "strips", "json"])
@pytest.mark.parametrize("start", ["w7 w8", "w7 ", ""])
def test_a_started_answer_is_continued(adapter: Any, template: str, start: str) -> None:
    words, messages = with_bos(template), [user("w5 w6"), assistant(start)]
    expected = words.apply_chat_template(messages, continue_final_message=True)["input_ids"]
    assert prompt_tokens(adapter, messages, words) == expected
    assert expected.count(2) == 1 and (not start or template == AS_JSON or expected[-1] in (7, 8))


def test_conversations_of_both_kinds_in_one_call(adapter: Any) -> None:
    words = with_bos()
    talks = [[user("w5")], [user("w5 w6"), assistant("w7")], [user("w5"), assistant("w7"), user("w8")]]
    found = generate(adapter, talks, tokenizer=words)
    for row, talk in enumerate(talks):
        assert generate(adapter, talk, tokenizer=words).texts[0] == found.texts[row]


@pytest.mark.parametrize(
    ("template", "content", "same"),
    [
        (CHAT, [part("w5 w6")], "w5 w6"),
        (STRIPS, [part("w5")], "w5"),
        (LISTS, [part("w5"), part("w6")], "w5 w6"),
        (AS_JSON, [part("w5")], "w5"),
    ],
)
def test_lists_of_texts(adapter: Any, template: str, content: list[Any], same: str) -> None:
    words = with_bos(template)
    assert prompt_tokens(adapter, [user(content)], words) == prompt_tokens(adapter, [user(same)], words)
    started, text = [user("w4"), assistant(content)], [user("w4"), assistant(same)]
    assert prompt_tokens(adapter, started, words) == prompt_tokens(adapter, text, words)


def test_tool_messages_and_reasoning(adapter: Any) -> None:
    words = with_bos()
    calls = [{"type": "function", "function": {"name": "w4", "arguments": {}}}]
    talk = [user("w5"), assistant("", tool_calls=calls), {"role": "tool", "content": "w6"}]
    assert (
        prompt_tokens(adapter, talk, words) == words.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    )
    cuts = "{% for m in messages %}w9 {{ m['content'].split('w8')[-1] if m['role'] == 'assistant' else m['content'] }} </s> {% endfor %}"
    talk, words = [user("w5"), assistant("w7 w8 w6"), user("w5")], with_bos(cuts + START)
    assert (
        prompt_tokens(adapter, talk, words) == words.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    )


def test_a_templates_json_is_part_of_the_prompt(adapter: Any) -> None:
    prompt_tokens(adapter, [user('w5 "w6"\nw7')], with_bos(AS_JSON))
    lowered = "{% for m in messages %}{{ m['content'] | lower }} {% endfor %}"
    assert prompt_tokens(adapter, [user("W5 w6")], with_bos(lowered)) == [5, 6]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHAT, [user([part("w5"), part("w6")])], "prompt 0: got a content of several texts, expected one text"),
        (
            CHAT,
            [user([{"type": "image", "url": "x"}])],
            "message 0: got a part 'image', expected parts of the type 'text'",
        ),
        (CHAT, [user(["w5"])], "message 0: got a part 'w5', expected parts"),
        (CHAT, [user([])], r"message 0: got the content \[\], expected a text"),
        (CHAT, [user(None)], "message 0: got the content None, expected a text"),
        (CHAT, [user("w5"), user(5)], "message 1: got the content 5, expected a text"),
        (CHAT, [{"content": "w5"}], "message 0: got the role None, expected a text"),
        (CHAT, [user("w5"), assistant(None, tool_calls=[{}])], "message 1: got the content None"),
        (USERS, [user("w5"), {"role": "tool", "content": "w6"}], "message 1: got a message of tool that .* leaves out"),
        (USERS, [{"role": "system", "content": "w6"}, user("w5")], "message 0: got a message of system that .* leaves"),
        (STRICT, [{"role": "system", "content": "w6"}, user("w5")], "roles must alternate"),
        ("{{ messages[0]['content'] }} w4", [user("w5"), assistant("w6")], "prompt 0: got messages of user, assistant"),
        ("{{ messages[0]['content'] }} w4", [user("w5"), user("w6")], "message 1: got a message of user that"),
    ],
)
def test_conversations_that_are_refused(adapter: Any, template: str, messages: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        prompt_tokens(adapter, messages, with_bos(template))
    assert "expected" in str(refused.value) and "Fix:" in str(refused.value)


@pytest.mark.parametrize("content", ["w", "w3", "another text"])
def test_a_message_left_out_is_found_though_its_text_is_elsewhere(adapter: Any, content: str) -> None:
    template = "{{ messages[-1]['content'] }}"
    words = tokenizer(chat_template=template)
    messages = [{"role": "user", "content": content}, {"role": "user", "content": "w30 w31 another text"}]
    with pytest.raises(ValueError, match="message 0: got a message of user that the chat template leaves out"):
        tfb_ext.generate(adapter, messages, words, 2, max_new_tokens=1)
    one = [{"role": "user", "content": content}]
    assert tfb_ext.generate(adapter, one, words, 2, max_new_tokens=1).lengths.tolist() == [1]


def test_padding_of_texts_without_a_padding_token(adapter: Any) -> None:
    """Penalties look at the padding, so it is the token that transformers would fill ended rows with."""
    words = tokenizer()
    words.pad_token = None
    found = generate(adapter, ["w5 w6 w7", "w8"], tokenizer=words, eos_token_id=2, pad_token_id=None)
    assert found.sequences[1, :2].tolist() == [2, 2]
    words.add_special_tokens({"pad_token": "<new>"})  # has no embedding
    assert words.pad_token_id >= zoo.VOCAB
    again = generate(adapter, ["w5 w6 w7", "w8"], tokenizer=words, eos_token_id=2, pad_token_id=None)
    assert again.texts == found.texts


# Tensors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("mask", zoo.slow_but([torch.bool, torch.int32, torch.float32], torch.bool))
def test_whole_numbers_of_any_type(adapter: Any, dtype: Any, mask: Any) -> None:
    batch = zoo.prompt(2)
    given = {"input_ids": batch["input_ids"].to(dtype), "attention_mask": batch["attention_mask"].to(mask)}
    assert torch.equal(generate(adapter, given).sequences, oracle(adapter, batch))


IDS = torch.tensor([[5, 6, 7], [5, 6, 7]])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"input_ids": IDS.float()}, r"input_ids: got float32 of shape \(2, 3\), expected int64"),
        ({"input_ids": IDS.bool()}, "input_ids: got bool of shape"),
        (
            {"input_ids": IDS + zoo.VOCAB},
            f"prompt 0: got token {5 + zoo.VOCAB}, expected one of the model's {zoo.VOCAB}",
        ),
        ({"input_ids": -IDS}, "prompt 0: got token -5"),
        (
            {"input_ids": IDS, "attention_mask": IDS[:, :2]},
            r"attention_mask: got int64 of shape \(2, 2\), expected shape \(2, 3\)",
        ),
        ({"input_ids": IDS, "attention_mask": IDS[:1]}, r"attention_mask: got int64 of shape \(1, 3\)"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)},
            r"attention_mask: got float32 of shape \(2, 1, 3, 3\)",
        ),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, "attention_mask: got a list, expected a tensor"),
        ({"input_ids": IDS, "attention_mask": (IDS - 7).float()}, "attention_mask: got numbers other than 0 and 1"),
        ({"input_ids": IDS, "attention_mask": IDS * float("nan")}, "attention_mask: got numbers other than 0 and 1"),
        ({"input_ids": IDS, "position_ids": IDS}, r"prompts: got \['position_ids'\], which the model would read"),
    ],
)
def test_tensors_that_are_refused(adapter: Any, prompts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(adapter, prompts)


def test_padding_may_be_any_number(adapter: Any) -> None:
    batch = zoo.prompt(2)
    expected = generate(adapter, batch)
    for filler in (-100, zoo.VOCAB):
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, filler)
        found = generate(adapter, {"input_ids": ids, "attention_mask": batch["attention_mask"]})
        assert torch.equal(found.tokens, expected.tokens)


def test_what_a_tokenizer_returns_beside_them(adapter: Any) -> None:
    """Llama reads no token types."""
    batch = tokenizer()(["w5 w6"], return_tensors="pt") | {"token_type_ids": torch.zeros(1, 2)}
    assert torch.equal(generate(adapter, dict(batch)).sequences[:, :2], torch.tensor([[5, 6]]))


# Room and options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.slow_but(["llama", "gpt2", "mistral"], "llama"))
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"max_new_tokens": 20}, 20),
        ({"max_length": 140}, 20),
        ({"generation_config": GenerationConfig(max_new_tokens=20)}, 20),
        ({"max_new_tokens": np.int64(20)}, 20),
    ],
)
def test_prompts_that_leave_no_room(name: str, options: dict[str, Any], wanted: int) -> None:
    adapter = bayesian(name, 2)
    ids = torch.full((2, 120), 5)
    message = f"longest prompt has 120 tokens and {wanted} more are asked for, but the model's context is 128"
    with pytest.raises(ValueError, match=message):
        tfb_ext.generate(adapter, {"input_ids": ids}, **options)
    mask = torch.ones_like(ids)
    mask[:, :20] = 0  # padding takes no positions
    tfb_ext.generate(adapter, {"input_ids": ids, "attention_mask": mask}, samples=2, pad_token_id=0, **options)


def test_a_prompt_as_long_as_the_context(adapter: Any) -> None:
    with pytest.raises(ValueError, match="longest prompt has 128 tokens and 1 more are asked for"):
        tfb_ext.generate(adapter, {"input_ids": torch.full((1, 128), 5)})
    with pytest.raises(ValueError, match="max_length: got 3 for prompts of 3 tokens, expected room .* Fix:"):
        tfb_ext.generate(adapter, {"input_ids": IDS}, max_length=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_config": GenerationConfig(guidance_scale=2.0)}, "does not take guidance_scale"),
        ({"generation_config": GenerationConfig(token_healing=True)}, "does not take token_healing"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "generation mode: got contrastive_search"),
        ({"position_ids": IDS}, r"options: got \['position_ids'\] for the model's forward"),
        ({"attention_mask": IDS}, "does not take attention_mask: pass prompts="),
        ({"cache_implementation": "paged"}, "cache_implementation: got 'paged'"),
        ({"generation_config": GenerationConfig(cache_implementation="offloaded")}, "is 'offloaded', which copies"),
        ({"generation_config": {"max_new_tokens": 3}}, "generation_config: got a dict, expected a transformers.Gen"),
        ({"num_beams": 0}, "num_beams is 0, expected a count of at least 1"),
        ({"generation_config": GenerationConfig(num_return_sequences=-1)}, "num_return_sequences is -1, expected"),
        ({"alternatives": True}, "alternatives is True"),
        ({"alternatives": 2.0}, "alternatives is 2.0"),
    ],
)
def test_options_that_are_refused(adapter: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(adapter, {"input_ids": IDS}, **options)


def test_whole_numbers_of_numpy(adapter: Any) -> None:
    found = generate(adapter, {"input_ids": IDS}, alternatives=np.int64(3), max_new_tokens=np.int64(2))
    assert found.alternatives.shape == (2, 2, 3)


def test_a_model_that_sees_what_follows() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    for decoder in (True, False):
        torch.manual_seed(0)
        model = BertLMHeadModel(BertConfig(vocab_size=40, is_decoder=decoder, **sizes))
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="CAUSAL_LM")).eval()
        zoo.randomise(peft)
        adapter = tfb_ext.bayesianize(peft, sigma=0.1)
        if decoder:
            assert generate(adapter, {"input_ids": IDS}).total.isfinite().all()
        else:
            with pytest.raises(ValueError, match="got BertLMHeadModel with is_decoder=False"):
                generate(adapter, {"input_ids": IDS})


# Pieces -------------------------------------------------------------------------------------------------------------


def byte_fallback() -> Any:
    """As Llama 2's: what is not in the vocabulary is written in bytes, and bytes that are no character spoil their neighbours."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁w", "a", "."]
    made = Tokenizer(
        models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def word_pieces() -> Any:
    """As BERT's, whose clean-up takes spaces away again when the next token comes."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", "do", "##n", "'", "t", ".", "'s", "'m", "n't", "n"]
    made = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


SPELLING = {"bytes": byte_fallback(), "pieces": word_pieces()}


@pytest.mark.parametrize("kind", zoo.slow_but(SPELLING, "bytes"))
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_join_to_the_text(kind: str, data: st.DataObject) -> None:
    from tfb_ext.generation.result import pieces_of

    words = SPELLING[kind]
    token = st.integers(0, len(words) - 1)
    if kind == "bytes":
        token |= st.sampled_from([words.convert_tokens_to_ids(n) for n in ("<0x30>", "<0xC3>", "<0xA9>", "▁w", "▁")])
    tokens = data.draw(st.lists(token, max_size=7))
    pieces = pieces_of(tokens, words)
    assert len(pieces) == len(tokens) and "".join(pieces) == words.decode(tokens)
