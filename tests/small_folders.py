"""A tiny language model and a tiny classifier on disk, each with a tokenizer, an adapter and data."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

import zoo
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<unk>", "<end>", "no", "yes", "area", "man", "wins", "senate", "votes", "on", "budget", "sarcastic:"]
CHOICES = [" no", " yes"]
HERE = ("--device", "cpu", "--dtype", "float32")


@dataclass(frozen=True)
class Folders:
    """Paths of what :func:`write` wrote."""

    root: Path
    base: Path
    adapter: Path
    anchors: Path
    test: Path


def tokenizer() -> PreTrainedTokenizerFast:
    """Splits at white space; knows :data:`WORDS`."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>")


def write(root: Path, name: str = "llama") -> Folders:
    """Save the zoo's model ``name``, its adapter and two JSONL files, labelled: 24 anchors and 10 test items."""
    folders = Folders(root, root / "base", root / "adapter", root / "anchors.jsonl", root / "test.jsonl")
    model = zoo.peft_model(name)
    model.peft_config["default"].base_model_name_or_path = str(folders.base)
    copy.deepcopy(model).unload().save_pretrained(folders.base)
    model.save_pretrained(folders.adapter)
    tokenizer().save_pretrained(folders.base)
    choices = CHOICES if name in zoo.CAUSAL else ["bad", "fair", "good"]
    folders.anchors.write_text("".join(line(i, choices) for i in range(24)))
    folders.test.write_text("".join(line(i, choices) for i in range(24, 34)))
    return folders


def line(number: int, choices: list[str]) -> str:
    """One item: some words, the label anything."""
    words = [WORDS[5 + (number * k + k) % 7] for k in range(1, 2 + number % 5)]
    prompt = " ".join([*words, "sarcastic:"])
    return json.dumps({"prompt": prompt, "choices": choices, "label": number * 7 % 5 % len(choices)}) + "\n"


def plain(text: str) -> str:
    """What a terminal shows, without colours, boxes and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())
