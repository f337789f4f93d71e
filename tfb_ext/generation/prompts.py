"""Prompts as tensors: texts and conversations tokenised as transformers does, and tensors checked."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import pad_rows
from ..errors import refusal
from ..forward.anatomy import Anatomy
from ..forward.inputs import attention_mask, token_rows, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Prompts = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]] | Mapping[str, Tensor]


def encode_prompts(
    anatomy: Anatomy, prompts: Prompts, tokenizer: PreTrainedTokenizerBase | None, pad: Tensor | None
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (R, P) int64 on the model's device, padded on the left.

    Args:
        pad: what to fill with where the tokenizer has no padding token that the model knows.

    Raises:
        ValueError: an empty prompt, a token that the model does not have, a conversation that the chat template refuses or
            leaves parts of out, tensors of another form.
    """
    model, size = anatomy.model, vocabulary(anatomy.model)
    if isinstance(prompts, Mapping):
        ids, mask = _checked_tensors(prompts, inspect.signature(model.forward).parameters)
    else:
        if tokenizer is None:
            raise ValueError("prompts are texts, expected a tokenizer with them, or input_ids and attention_mask")
        rows = [_tokens(number, prompt, tokenizer) for number, prompt in enumerate(_each(prompts))]
        if not rows:
            raise ValueError("prompts is empty, expected at least one")
        pads = [int(p) for p in (tokenizer.pad_token_id, pad) if p is not None and 0 <= int(p) < size]
        ids, mask = pad_rows(rows, pads[0] if pads else 0)
    ids, mask = ids.to(anatomy.device), mask.to(anatomy.device)
    outside = (ids < 0) | (ids >= size)
    unknown = (outside & mask.bool()).nonzero()
    if len(unknown):
        row, column = unknown[0].tolist()
        fix = "the tokenizer that belongs to this model, or resize the model's embeddings before the adapter is loaded"
        expected = f"one of the model's {size}, 0 to {size - 1}"
        raise refusal(f"prompt {row}", f"token {int(ids[row, column])}", expected, fix)
    return {"input_ids": ids.masked_fill(outside, 0), "attention_mask": mask}


def _checked_tensors(prompts: Mapping[str, Any], accepted: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    ids, mask = token_rows(prompts.get("input_ids")), prompts.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else attention_mask(mask, ids)
    if not mask[:, -1].all():
        raise ValueError(
            "prompts are padded on the right, expected padding on the left (tokenizer.padding_side = 'left')"
        )
    extra = sorted(name for name in prompts if name in accepted and name not in ("input_ids", "attention_mask"))
    if extra:
        fix = "leave them out, or call adapter.model.generate(...) inside adapter.predictive(...)"
        raise refusal("prompts", f"{extra}, which the model would read", "input_ids and attention_mask", fix)
    return ids, mask


def _each(prompts: Any) -> list[Any]:
    """Single prompts: texts or conversations."""
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], Mapping) else listed


def _tokens(number: int, prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if isinstance(prompt, str):
        tokens = _text_tokens(prompt, tokenizer) if prompt else []
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(message, Mapping) for message in prompt):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"prompt {number} is a conversation, but the tokenizer has no chat template. Fix: pass texts, or set "
                "tokenizer.chat_template"
            )
        text = _Chat(f"prompt {number}", [dict(message) for message in prompt], tokenizer).text()
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        raise ValueError(f"prompt {number} is {prompt!r}, expected a text or a list of messages with role and content")
    if not tokens:
        raise ValueError(f"prompt {number} is empty, expected a text of at least one token")
    return tokens


def _text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's tokens of a text. One that begins with what the tokenizer would put first, as a rendered conversation
    does, is tokenised as a rendered conversation is: without special tokens of the tokenizer's own."""
    whole = list(tokenizer(text)["input_ids"])
    bare, start = (list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (text, text.lstrip()))
    for added in range(1, len(whole) - len(bare) + 1):
        if whole[added : added + len(bare)] == bare and whole[:added] == start[:added]:
            return bare
    return whole


class _Chat:
    """A conversation as its template writes it, up to where the model goes on.

    A started answer (a last message of the assistant) is continued; this is the rule of transformers' text generation
    pipeline (5.24, ``TextGenerationPipeline.preprocess``).
    """

    def __init__(self, name: str, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        for at, message in enumerate(messages):
            _check_message(f"{name}, message {at}", message, at == len(messages) - 1)
        self.name, self.messages, self.tokenizer = name, messages, tokenizer
        self.started = messages[-1]["role"] == "assistant"
        if any(isinstance(message.get("content"), list | tuple) for message in messages):
            self.messages = self.contents()

    def text(self) -> str:
        """The whole conversation.

        Raises:
            ValueError: a message that the template does not take, or that it leaves out.
        """
        fix = "write it as the template of this tokenizer wants it, or pass the finished text"
        try:
            text = self.render(self.messages)
        except Exception as error:  # a template raises what it likes
            roles = ", ".join(str(message["role"]) for message in self.messages)
            got = f"messages of {roles}, which the chat template does not take ({type(error).__name__}: {error})"
            raise refusal(self.name, got, "a conversation that it takes", fix) from error
        for at, message in enumerate(self.messages):
            # Templates may cut the reasoning of earlier answers, and leave out what is empty.
            if message["role"] != "assistant" and message.get("content") and self.without(at) == text:
                got = f"a message of {message['role']} that the chat template leaves out"
                raise refusal(f"{self.name}, message {at}", got, "messages that are part of the prompt", fix)
        return text

    def render(self, messages: list[dict[str, Any]]) -> str:
        options = {"add_generation_prompt": not self.started, "continue_final_message": self.started}
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def without(self, at: int) -> str | None:
        """The conversation with another text in place of one message's; None where the template does not take that."""
        other = "another text" if self.messages[at].get("content") != "another text" else "yet another text"
        try:
            return self.render([*self.messages[:at], self.messages[at] | {"content": other}, *self.messages[at + 1 :]])
        except Exception:  # a template raises what it likes, and this one has read the message
            return None

    def contents(self) -> list[dict[str, Any]]:
        """The messages with contents that the template takes: lists of texts if it writes them out, else their one text."""
        lists = [message for message in self.messages if not isinstance(message.get("content"), str | None)]
        try:
            text = str(self.tokenizer.apply_chat_template(self.messages, tokenize=False))
        except Exception:  # a template raises what it likes
            text = ""
        if all(_is_written_out(part, text) for message in lists for part in message["content"]):
            return self.messages
        if any(len(message["content"]) != 1 for message in lists):
            expected = "one text, because the chat template does not write lists"
            raise refusal(self.name, "a content of several texts", expected, "join the texts")
        return [m | {"content": m["content"][0]["text"]} if m in lists else m for m in self.messages]


def _check_message(what: str, message: Mapping[str, Any], last: bool) -> None:
    fix = "give each message a role and a text"
    if not isinstance(message.get("role"), str):
        raise refusal(what, f"the role {message.get('role')!r}", "a text", fix)
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls") and not last):
        return
    if not isinstance(content, list | tuple) or not content:
        raise refusal(what, f"the content {content!r}", "a text or a list of texts", fix)
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            got = part.get("type", part) if isinstance(part, Mapping) else part
            raise refusal(what, f"a part {got!r}", "parts of the type 'text' with a text", "leave out what is no text")


def _is_written_out(part: Mapping[str, Any], text: str) -> bool:
    """Whether a template wrote a part's text (as it is, without spaces around it, or as JSON) and not the part itself."""
    found = part["text"].strip() in text or json.dumps(part["text"], ensure_ascii=False)[1:-1] in text
    return found and str(part) not in text and json.dumps(part, ensure_ascii=False) not in text
