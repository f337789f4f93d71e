"""Stand-ins for the quality study's data, beside those of the demonstration: a few short texts for every set."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import demo_fakes
import pytest

from bench.quality import data
from tfb_ext.app.demo import assets

HEADER = "Category\tText\nd\tstring\nclass\t\n"


def table(topics: list[str], count: int, word: str) -> str:
    """Orange's format; the topic can be read off the text."""
    lines = [f"{topics[i % len(topics)]}\t{word} {i} about {topics[i % len(topics)]} " for i in range(count)]
    return HEADER + "\n".join(lines) + "\n"


def logiqa_line(number: int) -> str:
    options = "".join(f"\n{letter}. {letter}.option {letter} of {number}" for letter in "ABCD")
    content = f"\nPassage: Fact {number} holds.Question: Which one?{options}\nAnswer:"
    return json.dumps({"input": [{"role": "user", "content": content}], "ideal": "ABCD"[number % 4]})


def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put small files of every set into an empty cache folder, and the demonstration's stand-ins into pip's reach."""
    demo_fakes.open_shop(tmp_path, monkeypatch)
    r8, newsgroups = list(data.R8_WORDS), list(data.NEWSGROUPS_WORDS)
    shared = "earn\tthe very same text in both files \n"
    contents = {
        "R8_TRAIN": table(r8, 160, "train") + shared + "acq\t \n",
        "R8_TEST": table(r8, 40, "test") + shared,
        "NEWSGROUPS_TRAIN": table(newsgroups, 200, "train"),
        "NEWSGROUPS_TEST": table(newsgroups, 40, "test"),
        "LOGIQA": "\n".join(logiqa_line(i) for i in range(60)) + "\n",
    }
    for name, text in contents.items():
        asset = getattr(data, name)
        path = assets.cache_dir() / asset.member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        monkeypatch.setattr(data, name, replace(asset, member_sha256=digest))
    forget()


def forget() -> None:
    """The sets' readers remember what they read."""
    for task in data.TASKS.values():
        task.read.cache_clear()
