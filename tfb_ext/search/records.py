"""What each anchor gave at each sigma: the search's memory, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import MOST_NUMBER, check_sigma, is_integer, is_number
from ..errors import ConfigError
from ..files import parse_json_object, write_atomically

# Of each anchor, with its largest value: -log p(target); 1 where the answer is the target; 1 where it is not the mean adapter's;
# sum over classes of (p - y)^2; entropy of the prediction. All are 0 or more.
MOST = {"nll": math.inf, "right": 1.0, "flip": 1.0, "brier": 2.0, "entropy": math.inf}
FIELDS = tuple(MOST)
ROUNDING = 1e-3  # may cross these bounds by so much

Part = TypeVar("Part")
At = tuple[int, float]


@dataclass
class Records:
    """Per-anchor results, float64 on the CPU, NaN where an anchor was not run.

    Attributes:
        key: what they depend on: adapter, anchors, samples, seed, mode, ... Records of one key fit each other.
        baseline: (items, 5), of the mean adapter; columns are ``FIELDS``.
        guesses: (items,) int64, the mean adapter's answers.
        targets: (items,) int64, the labels, or the guesses again.
        values: by (first random block, sigma), (items, 5).
        probabilities: by (first random block, sigma), (items, C) float32; the mean adapter's under (-1, 0). Empty unless a
            metric of the caller's own asks for them.
    """

    key: dict[str, Any]
    baseline: Tensor
    guesses: Tensor
    targets: Tensor
    values: dict[At, Tensor] = field(default_factory=dict)
    probabilities: dict[At, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.baseline)

    def at(self, first: int, sigma: float) -> Tensor:
        """(items, 5) of this sigma, made empty where it is new."""
        return self.values.setdefault((first, sigma), torch.full_like(self.baseline, math.nan))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: NaN is ``None``, a column is a list."""

        def columns(values: Tensor) -> dict[str, list[float | None]]:
            return dict(zip(FIELDS, map(_with_none, values.T), strict=True))

        return {
            "key": self.key,
            "baseline": columns(self.baseline),
            "evaluations": [{"first": f, "sigma": s, **columns(v)} for (f, s), v in self.values.items()],
            "probabilities": [
                {"first": f, "sigma": s, "rows": [_with_none(row) for row in p]}
                for (f, s), p in self.probabilities.items()
            ],
            "guesses": self.guesses.tolist(),
            "targets": self.targets.tolist(),
        }

    @classmethod
    def from_dict(cls, raw: Any) -> Records:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: it is anything else: a part is missing or of the wrong kind, length or range.
        """
        parts = _kind(dict, raw, "records")
        key = _kind(dict, parts.get("key"), "key")
        guesses, targets = (_classes(parts.get(n), n) for n in ("guesses", "targets"))
        items = len(guesses)
        if not items or len(targets) != items or key.get("items") != items:
            found = f"{items}, {len(targets)} and {key.get('items')!r}"
            raise ValueError(f"guesses, targets and key.items are of {found} items, expected one number, at least 1")
        baseline = _table(parts.get("baseline"), "baseline", items)
        if baseline.isnan().any() or bool(((guesses == targets) != (baseline[:, 1] == 1)).any()):
            raise ValueError("baseline is not what guesses and targets say, expected a value for every item")
        values = {
            at: _table(entry, f"evaluations at {at}", items) for at, entry in _entries(parts, "evaluations", 0).items()
        }
        probabilities = {
            at: _rows(entry.get("rows"), f"probabilities at {at}", items)
            for at, entry in _entries(parts, "probabilities", -1).items()
        }
        return cls(key, baseline, guesses, targets, values, probabilities)

    def check(self, classes: int) -> None:
        """Whether they can be of a model with that many classes, and complete for the metric in their key.

        Raises:
            ValueError: they cannot.
        """
        most = int(max(self.guesses.max(), self.targets.max()))
        if most >= classes:
            raise ValueError(f"guesses and targets reach class {most}, expected 0 to {classes - 1}")
        runs = {} if self.key.get("metric") is None else {(-1, 0.0): self.baseline, **self.values}
        if set(self.probabilities) != set(runs):
            raise ValueError(f"probabilities are there at {sorted(self.probabilities)}, expected {sorted(runs)}")
        for at, run in runs.items():
            rows = self.probabilities[at]
            if rows.shape[1] != classes or not torch.equal(rows.isnan()[:, 0], run.isnan()[:, 0]):
                raise ValueError(f"probabilities at {at}: expected {classes} classes, and the items of the evaluation")

    def write(self, path: Path) -> None:
        """As the file of a search that has not ended: ``SigmaSearch.save`` writes the same with the result around it."""
        write_atomically(path, json.dumps({"sigma": None, "records": self.to_dict()}, allow_nan=False) + "\n")


def read_records(path: Path, key: Mapping[str, Any], classes: int) -> Records | None:
    """The records in a search's file, ``None`` if there is no such file.

    Args:
        key: of this search.
        classes: of the model.

    Raises:
        ConfigError: the file is damaged, or its records are of another adapter, model, data set or noise; the message names what
            differs.
    """
    if not path.exists():
        return None
    advice = "give another checkpoint, or delete this one to start anew"
    try:
        records = Records.from_dict(parse_json_object(path).get("records"))
        different = [
            f"{name} is {records.key[name]!r} there and {value!r} here"
            if name in records.key
            else f"{name} is not said there"
            for name, value in key.items()
            if name not in records.key or records.key[name] != value
        ]
        if different:
            raise ConfigError(f"{path} is of another search: {'; '.join(different)}; {advice}")
        records.check(classes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} holds no records of a search ({error}); {advice}") from None
    return records


# Reading a file -------------------------------------------------------------------------------------------------------


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _with_none(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values.tolist()]


def _kind(kind: type[Part], value: Any, name: str) -> Part:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {shortened(value)}, expected a {kind.__name__}")
    return value


def _numbers(value: Any, name: str, most: float, length: int) -> Tensor:
    """(length,) float64 of numbers from 0 to ``most``; ``None`` is NaN."""
    numbers = _kind(list, value, name)
    if len(numbers) != length:
        raise ValueError(f"{name} has {len(numbers)} values, expected {length}")
    for number in numbers:
        if number is not None and not is_number(number, -ROUNDING, min(most + ROUNDING, MOST_NUMBER)):
            raise ValueError(f"{name} has {shortened(number)}, expected numbers from 0 to {most}")
    return torch.tensor([math.nan if v is None else v for v in numbers], dtype=torch.float64)


def _classes(value: Any, name: str) -> Tensor:
    numbers = _kind(list, value, name)
    for number in numbers:
        if not is_integer(number, 0, 2**31 - 1):
            raise ValueError(f"{name} has {shortened(number)}, expected numbers of classes")
    return torch.tensor(numbers, dtype=torch.int64)


def _entries(parts: dict[str, Any], name: str, least: int) -> dict[At, dict[str, Any]]:
    """Each entry by the first random block and the sigma that it is of; (-1, 0) is the mean adapter."""
    found: dict[At, dict[str, Any]] = {}
    for raw in _kind(list, parts.get(name), name):
        entry = _kind(dict, raw, name)
        first: Any = entry.get("first")
        sigma = entry.get("sigma")
        if not is_integer(first, least, 2**31 - 1):
            raise ValueError(f"{name} has first {shortened(first)}, expected the number of a block")
        at = first, 0.0 if first < 0 and is_number(sigma, 0, 0) else check_sigma(sigma)
        if at in found:
            raise ValueError(f"{name} has {at} twice, expected it once")
        found[at] = entry
    return found


def _table(value: Any, name: str, items: int) -> Tensor:
    """(items, 5) of the columns ``FIELDS``."""
    columns = _kind(dict, value, name)
    table = torch.stack([_numbers(columns.get(n), f"{name}: {n}", most, items) for n, most in MOST.items()], dim=1)
    right_and_flip = table[~_empty(table, name)][:, 1:3]
    if bool(((right_and_flip != 0) & (right_and_flip != 1)).any()):
        raise ValueError(f"{name}: right and flip have other values, expected 0 and 1")
    return table


def _rows(value: Any, name: str, items: int) -> Tensor:
    """(items, C) float32 of probabilities."""
    rows = _kind(list, value, name)
    widths = {len(_kind(list, row, name)) for row in rows}
    if len(rows) != items or len(widths) != 1:
        raise ValueError(f"{name} has {len(rows)} rows of {sorted(widths)} values, expected {items} of one length")
    table = torch.stack([_numbers(row, name, 1, len(row)) for row in rows]).float()
    if bool(((table[~_empty(table, name)].sum(1) - 1).abs() > ROUNDING).any()):
        raise ValueError(f"{name} has rows that are no probabilities, expected a sum of 1")
    return table


def _empty(table: Tensor, name: str) -> Tensor:
    """(items,) where a row is NaN, which it must be in all columns or in none."""
    empty = table.isnan()
    if bool((empty.any(1) != empty.all(1)).any()):
        raise ValueError(f"{name} has items with some values only, expected all or none")
    return empty.all(1)
