"""Labelled prompts, and reading them from JSON lines and from what the ``datasets`` package opens."""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checks import is_integer
from ..errors import refusal


@dataclass(frozen=True)
class Example:
    """One item: the text before the answer, the possible answers and the index of the right one, None if unknown.

    A choice is compared with what the model says next, so its leading space belongs to it: ``" yes"`` after a prompt
    that ends in ``":"``.

    Raises:
        ValueError: an empty text, half a character, fewer than two choices, two of them equal, a label that is no index.
    """

    prompt: str
    choices: tuple[str, ...]
    label: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.choices, Iterable) or isinstance(self.choices, str | Mapping):
            raise refusal("choices", repr(self.choices), "a list of texts", 'such as [" no", " yes"]')
        choices = tuple(self.choices)
        _check_text("prompt", self.prompt)
        for choice in choices:
            _check_text("choices", choice)
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise refusal("choices", list(choices), "at least two, all different", "list every answer once")
        label = int(self.label) if is_integer(self.label) else self.label
        if label is not None and (type(label) is not int or not 0 <= label < len(choices)):
            expected = f"an index from 0 to {len(choices) - 1} into the choices {list(choices)!r}"
            raise refusal("label", repr(label), expected, "count from 0, and None for an unlabelled item")
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "label", label)


def read_jsonl(path: str | Path) -> list[Example]:
    """The examples of a file of JSON objects, one a line.

    Fields: ``prompt`` (text), ``choices`` (list of texts), ``label`` (index of a choice, or its text; missing or null
    for an unlabelled item). Other fields and empty lines are passed over, but not one that looks like a misspelt ``label``.

    Raises:
        ValueError: a line that is no example, named as ``file:line``; a file without any.
    """
    examples = []
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                examples.append(_parse_line(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            except RecursionError:
                raise ValueError(f"{path}:{number}: got objects or lists too deep within each other") from None
    if not examples:
        raise ValueError(f"{path}: no examples in it, expected one JSON object a line")
    return examples


def read_dataset(
    name: str | Path,
    split: str,
    *,
    prompt: str,
    label: str | None = None,
    choices: Sequence[str] | None = None,
    **options: Any,
) -> list[Example]:
    """The examples of a split that the ``datasets`` package opens.

    Args:
        name: a data set's name on the hub, a builder (``"json"``, ``"csv"``, with ``data_files=...``), or a folder
            written by ``save_to_disk``.
        split: the split's name; slices such as ``"train[:200]"`` work for everything but ``save_to_disk`` folders.
        prompt: the column with the prompt, or a template over columns: ``"{premise} Therefore, {hypothesis}?"``.
        label: the column with the answer: an index into ``choices`` (true is 1, and -1, the hub's mark of a withheld
            label, is None) or the text of a choice. None for unlabelled items.
        choices: the answers. May be left out where the label column knows its class names.
        options: further arguments of ``datasets.load_dataset``.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: no such column or split, no choices, no rows, or a row that makes no example (its number is named).
    """
    dataset = _load_dataset(str(name), split, options)
    parts = [(field, form) for _, field, form, _ in string.Formatter().parse(prompt) if field is not None]
    for field, form in parts:
        if "{" in (form or ""):
            got = f"the format {form!r} of column {field!r}"
            raise refusal("prompt", got, "none with columns in it", "write it out")
    fields = [field for field, _ in parts]
    for column in [*(fields or [prompt]), *([] if label is None else [label])]:
        if column not in dataset.column_names:
            raise ValueError(f"column {column!r} is not in {name}, expected one of {sorted(dataset.column_names)!r}")
    names = None if label is None else getattr(dataset.features[label], "names", None)
    choices = names if choices is None else choices
    if choices is None:
        raise refusal("choices", None, f"the answers, as {name} names no classes for {label!r}", "pass choices=[...]")
    bare = [str(choice).strip() for choice in choices] if isinstance(choices, list | tuple) else []
    if names and bare != names and sorted(bare) == sorted(names):
        expected = f"the order of the label's classes, {names!r}, whose numbers the rows have"
        raise refusal("choices", list(choices), expected, "put the choices into that order")
    examples = []
    for number, row in enumerate(dataset):
        try:
            for field in fields:
                if not _is_written(row[field]):
                    fix = "leave the row out, or give it a text"
                    raise refusal(f"column {field!r}", repr(row[field]), "a value for the template", fix)
            answer = None if label is None else row[label]
            answer = int(answer) if isinstance(answer, bool) else None if answer == -1 else answer
            examples.append(_example(prompt.format_map(row) if fields else row[prompt], choices, answer))
        except ValueError as error:
            raise ValueError(f"{name}, split {split}, row {number}: {error}") from error
    if not examples:
        raise ValueError(f"{name}, split {split}: no rows in it, expected at least one")
    return examples


def _load_dataset(name: str, split: str, options: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("read_dataset needs the package datasets: pip install datasets") from error
    if not any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(name, split=split, **options)
    loaded = datasets.load_from_disk(name)
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if split not in loaded:
        raise ValueError(f"split {split!r} is not in {name}, expected one of {sorted(loaded)!r}")
    return loaded[split]


def _parse_line(line: bytes) -> Example:
    record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    if not isinstance(record, dict):
        raise ValueError(f"got {record!r}, expected an object with prompt, choices and label")
    for field in ("prompt", "choices"):
        if field not in record:
            raise ValueError(f"{field}: missing, the fields are {sorted(record)!r}, expected prompt, choices and label")
    names = [] if "label" in record else [name.lower() for name in record]
    close = difflib.get_close_matches("label", names, n=1, cutoff=0.8)
    if close:
        raise refusal("label", f"none, but a field {close[0]!r}", "'label'", "rename or remove that field")
    return _example(record["prompt"], record["choices"], record.get("label"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in ("prompt", "choices", "label"):
        if names.count(name) > 1:
            raise refusal(name, "more than one", "one", "leave one out")
    return dict(pairs)


def _example(prompt: Any, choices: Any, label: Any) -> Example:
    """An example whose label may be the text of a choice."""
    if not isinstance(label, str):
        return Example(prompt, choices, label)
    example = Example(prompt, choices)
    if label not in example.choices:
        expected = f"one of the choices {list(choices)!r}, spaces included, or its index as a number"
        raise refusal("label", repr(label), expected, "write it as the choice is written")
    return replace(example, label=example.choices.index(label))


def _is_written(value: Any) -> bool:
    """Whether a value has a text: no bytes, and no missing value (None, or NaN as pandas writes it) anywhere in it."""
    if isinstance(value, list | tuple | dict):
        return all(map(_is_written, value.values() if isinstance(value, dict) else value))
    return not (value is None or isinstance(value, bytes | bytearray) or value != value)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise refusal(name, repr(text), "a text that is not empty", "write it out, or leave the item out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"{text[error.start : error.end]!r} at character {error.start}, half of a character"
        fix = "write both halves of the emoji's \\u escape, or the character itself"
        raise refusal(name, got, "whole ones", fix) from None
