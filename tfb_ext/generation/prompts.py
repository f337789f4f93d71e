"""Prompts as tensors: texts and conversations tokenised as transformers does, and tensors checked."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import is_dense
from ..data import pad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Prompts = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]] | Mapping[str, Tensor]


def vocabulary(model: Any) -> int:
    """How many tokens the model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def encode_prompts(
    model: Any, prompts: Prompts, tokenizer: PreTrainedTokenizerBase | None, pad: Tensor | None
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (R, P) int64 on the model's device, padded on the left.

    Args:
        pad: what to fill with where the tokenizer has no padding token that the model knows.

    Raises:
        ValueError: an empty prompt, a token that the model does not have, a conversation that the chat template refuses or
            leaves parts of out, tensors of another form.
    """
    device = model.get_input_embeddings().weight.device
    size = vocabulary(model)
    if isinstance(prompts, Mapping):
        ids, mask = _checked_tensors(prompts, inspect.signature(model.forward).parameters)
    else:
        if tokenizer is None:
            raise ValueError("prompts are texts, expected a tokenizer with them, or input_ids and attention_mask")
        rows = [_tokens(number, prompt, tokenizer) for number, prompt in enumerate(_each(prompts))]
        if not rows:
            raise ValueError("prompts is empty, expected at least one")
        given = (tokenizer.pad_token_id, pad)
        pads = [int(p) for p in given if p is not None and 0 <= int(p) < size]
        ids, mask = pad_rows(rows, pads[0] if pads else 0)
    ids, mask = ids.to(device), mask.to(device)
    outside = (ids < 0) | (ids >= size)
    if (outside & mask.bool()).any():
        row = int((outside & mask.bool()).any(dim=1).nonzero()[0])
        token = int(ids[row][outside[row] & mask[row].bool()][0])
        raise ValueError(
            f"prompt {row}: got token {token}, expected one of the model's {size}, 0 to {size - 1}. Fix: use the tokenizer that "
            "belongs to this model, or resize the model's embeddings before the adapter is loaded"
        )
    return {"input_ids": ids.masked_fill(outside, 0), "attention_mask": mask}


def _checked_tensors(prompts: Mapping[str, Any], accepted: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    ids = prompts.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError(
            "prompts is a mapping without input_ids of shape (rows, tokens); expected what a tokenizer returns"
        )
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"input_ids: got {ids.dtype}, expected whole numbers (torch.int64). Fix: pass what a tokenizer returns"
        )
    for name in ("input_ids", "attention_mask"):
        if isinstance(value := prompts.get(name), Tensor) and not is_dense(value):
            raise ValueError(
                f"{name}: got a tensor that is sparse, nested or meta, expected a dense one with data. Fix: pass what a tokenizer "
                "returns"
            )
    mask = prompts.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: got {got}, expected a tensor of the shape of input_ids, {tuple(ids.shape)}. Fix: pass the tokenizer's"
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            "attention_mask: got numbers other than 0 and 1, expected 1 for a token and 0 for padding. Fix: pass the tokenizer's"
        )
    if not len(ids) or not mask.any(dim=1).all():
        raise ValueError("a prompt is empty, expected at least one token in every row")
    if not mask[:, -1].all():
        raise ValueError(
            "prompts are padded on the right, expected padding on the left (tokenizer.padding_side = 'left')"
        )
    extra = sorted(name for name in prompts if name in accepted and name not in ("input_ids", "attention_mask"))
    if extra:
        raise ValueError(
            f"prompts: got {extra}, which the model would read, expected input_ids and attention_mask. Fix: leave them out, or call "
            "adapter.model.generate(...) inside adapter.predictive(...)"
        )
    return ids.long(), mask.long()


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
                f"prompt {number} is a conversation, but the tokenizer has no chat template; pass texts, or set "
                "tokenizer.chat_template"
            )
        text = _conversation(number, [dict(message) for message in prompt], tokenizer)
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        raise ValueError(f"prompt {number} is {prompt!r}, expected a text or a list of messages with role and content")
    if not tokens:
        raise ValueError(f"prompt {number} is empty, expected a text of at least one token")
    return tokens


def _text_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's tokens of a text. One that begins with what the tokenizer would put first, as a rendered conversation
    does, is tokenised as a rendered conversation is: without special tokens of the tokenizer's own."""

    def encode(part: str, special: bool) -> list[int]:
        return list(tokenizer(part, add_special_tokens=special)["input_ids"])

    whole, bare, start = encode(text, True), encode(text, False), encode(text.lstrip(), False)
    for added in range(1, len(whole) - len(bare) + 1):
        if whole[added : added + len(bare)] == bare and whole[:added] == start[:added]:
            return bare
    return whole


def _conversation(number: int, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation as its template writes it, up to where the model goes on.

    A started answer (a last message of the assistant) is continued; this is the rule of transformers' text generation
    pipeline (5.24, ``TextGenerationPipeline.preprocess``).

    Raises:
        ValueError: a message that the template does not take, or that it leaves out.
    """
    for at, message in enumerate(messages):
        _check_message(f"prompt {number}, message {at}", message, at == len(messages) - 1)
    started = messages[-1]["role"] == "assistant"

    def render(messages: list[dict[str, Any]]) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not started, continue_final_message=started
            )
        )

    def refused(what: str, got: str, expected: str) -> ValueError:
        return ValueError(
            f"{what}: got {got}, expected {expected}. Fix: write it as the template of this tokenizer wants it, or pass the "
            "finished text"
        )

    if any(isinstance(message.get("content"), list | tuple) for message in messages):
        messages = _contents(number, messages, tokenizer)
    try:
        text = render(messages)
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(str(message["role"]) for message in messages)
        what = f"messages of {roles}, which the chat template does not take ({type(error).__name__}: {error})"
        raise refused(f"prompt {number}", what, "a conversation that it takes") from error
    for at, message in enumerate(messages):
        # Templates may cut the reasoning of earlier answers, and leave out what is empty.
        if message["role"] == "assistant" or not message.get("content"):
            continue
        if _without(messages, at, render) == text:
            got = f"a message of {message['role']} that the chat template leaves out"
            raise refused(f"prompt {number}, message {at}", got, "messages that are part of the prompt")
    return text


def _check_message(what: str, message: Mapping[str, Any], last: bool) -> None:
    fix = "Fix: give each message a role and a text"
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{what}: got the role {message.get('role')!r}, expected a text. {fix}")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls") and not last):
        return
    if not isinstance(content, list | tuple) or not content:
        raise ValueError(f"{what}: got the content {content!r}, expected a text or a list of texts. {fix}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type", part) if isinstance(part, Mapping) else part
            raise ValueError(
                f"{what}: got a part {kind!r}, expected parts of the type 'text' with a text. Fix: leave out what is no text"
            )


def _contents(number: int, messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The messages with contents that the template takes: lists of texts if it writes them out, else their one text."""
    lists = [message for message in messages if not isinstance(message.get("content"), str | None)]
    parts = [part for message in lists for part in message["content"]]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template raises what it likes
        text = ""
    if all(
        _appears(part["text"], text) and str(part) not in text and json.dumps(part, ensure_ascii=False) not in text
        for part in parts
    ):
        return messages
    if any(len(message["content"]) != 1 for message in lists):
        raise ValueError(
            f"prompt {number}: got a content of several texts, expected one text, because the chat template does not write lists. "
            "Fix: join the texts"
        )
    return [m | {"content": m["content"][0]["text"]} if m in lists else m for m in messages]


def _without(messages: list[dict[str, Any]], at: int, render: Callable[[list[dict[str, Any]]], str]) -> str | None:
    """The conversation with another text in place of one message's; None where the template does not take that."""
    other = "another text" if messages[at].get("content") != "another text" else "yet another text"
    try:
        return render([*messages[:at], messages[at] | {"content": other}, *messages[at + 1 :]])
    except Exception:  # a template raises what it likes, and this one has read the message
        return None


def _appears(part: str, text: str) -> bool:
    """Whether a template wrote this part: as it is, without spaces around it, or as JSON."""
    return part.strip() in text or json.dumps(part, ensure_ascii=False)[1:-1] in text
