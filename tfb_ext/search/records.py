"""What each anchor gave at each sigma: the search's memory, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_sigma
from ..errors import ConfigError
from ..files import parse_json_object, write_atomically

# Of each anchor: -log p(target); 1 where the answer is the target; 1 where it is not the mean adapter's; sum over classes of
# (p - y)^2; entropy of the prediction.
FIELDS = ("nll", "right", "flip", "brier", "entropy")
# Between which they lie; rounding may cross an end by ``ROUNDING``.
_RANGES = {"nll": (0, math.inf), "right": (0, 1), "flip": (0, 1), "brier": (0, 2), "entropy": (0, math.inf)}
ROUNDING = 1e-3


@dataclass
class Records:
    """Per-anchor results, float64 on the CPU, NaN where an anchor was not run.

    Attributes:
        key: what they depend on: adapter, anchors, samples, seed, mode, ... Records of one key fit each other.
        baseline: (items, 5), of the mean adapter; columns are ``FIELDS``.
        values: by (first random block, sigma), (items, 5).
        guesses: (items,) int64, the mean adapter's answers.
        targets: (items,) int64, the labels, or the guesses again.
        probabilities: by (first random block, sigma), (items, C) float32; the mean adapter's under (-1, 0). Empty unless a
            metric of the caller's own asks for them.
    """

    key: dict[str, Any]
    baseline: Tensor
    guesses: Tensor
    targets: Tensor
    values: dict[tuple[int, float], Tensor] = field(default_factory=dict)
    probabilities: dict[tuple[int, float], Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.baseline)

    def at(self, first: int, sigma: float) -> Tensor:
        """(items, 5) of this sigma, made empty where it is new."""
        return self.values.setdefault((first, sigma), torch.full_like(self.baseline, math.nan))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: NaN is ``None``, a column is a list."""

        def columns(values: Tensor) -> dict[str, list[float | None]]:
            return {name: _numbers(values[:, i]) for i, name in enumerate(FIELDS)}

        return {
            "key": self.key,
            "baseline": columns(self.baseline),
            "evaluations": [{"first": f, "sigma": s, **columns(v)} for (f, s), v in self.values.items()],
            "probabilities": [
                {"first": f, "sigma": s, "rows": [_numbers(row) for row in p]}
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
        parts = _object(raw, "records")
        key = _object(parts.get("key"), "key")
        guesses, targets = (_classes(parts.get(name), name) for name in ("guesses", "targets"))
        items = len(guesses)
        if not items or len(targets) != items or key.get("items") != items:
            raise ValueError(
                f"guesses, targets and key.items are of {items}, {len(targets)} and {key.get('items')!r} items, expected one "
                "number, at least 1"
            )
        baseline = _table(parts.get("baseline"), "baseline", items)
        if baseline.isnan().any() or bool(((guesses == targets) != (baseline[:, 1] == 1)).any()):
            raise ValueError("baseline is not what guesses and targets say, expected a value for every item")
        values = {
            at: _table(entry, f"evaluations at {at}", items)
            for at, entry in _entries(parts.get("evaluations"), "evaluations", 0)
        }
        probabilities = {
            at: _rows(entry.get("rows"), f"probabilities at {at}", items)
            for at, entry in _entries(parts.get("probabilities"), "probabilities", -1)
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
        widths = {p.shape[1] for p in self.probabilities.values()}
        if widths - {classes}:
            raise ValueError(f"probabilities are of {sorted(widths)} classes, expected {classes}")
        wanted = set() if self.key.get("metric") is None else {(-1, 0.0), *self.values}
        if set(self.probabilities) != wanted:
            raise ValueError(f"probabilities are there at {sorted(self.probabilities)}, expected {sorted(wanted)}")
        gaps = (
            [
                at
                for at in self.values
                if not torch.equal(self.probabilities[at].isnan()[:, 0], self.values[at].isnan()[:, 0])
            ]
            if wanted
            else []
        )
        if gaps or (wanted and self.probabilities[-1, 0.0].isnan().any()):
            raise ValueError(
                f"probabilities at {gaps or (-1, 0.0)} are of other items than the evaluations, expected the same"
            )

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

    def damaged(error: ValueError) -> ConfigError:
        return ConfigError(f"{path} holds no records of a search ({error}); {advice}")

    try:
        records = Records.from_dict(parse_json_object(path).get("records"))
    except ValueError as error:
        raise damaged(error) from None
    different = [
        f"{name} is {records.key[name]!r} there and {value!r} here"
        if name in records.key
        else f"{name} is not said there"
        for name, value in key.items()
        if records.key.get(name, _NOTHING) != value
    ]
    if different:
        raise ConfigError(f"{path} is of another search: {'; '.join(different)}; {advice}")
    try:
        records.check(classes)
    except ValueError as error:
        raise damaged(error) from None
    return records


_NOTHING = object()


def _numbers(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values.tolist()]


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_short(value)}, expected an object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_short(value)}, expected a list")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _classes(value: Any, name: str) -> Tensor:
    numbers = _list(value, name)
    for number in numbers:
        if type(number) is not int or not 0 <= number < 2**31:
            raise ValueError(f"{name} has {_short(number)}, expected numbers of classes")
    return torch.tensor(numbers, dtype=torch.int64)


def _entries(value: Any, name: str, lowest: int) -> list[tuple[tuple[int, float], dict[str, Any]]]:
    """Each entry with the first random block and the sigma that it is of; (-1, 0) is the mean adapter."""
    found: dict[tuple[int, float], dict[str, Any]] = {}
    for raw in _list(value, name):
        entry = _object(raw, name)
        first, sigma = entry.get("first"), entry.get("sigma")
        if type(first) is not int or not lowest <= first < 2**31:
            raise ValueError(f"{name} has first {_short(first)}, expected the number of a block")
        at = first, sigma if first < 0 and sigma == 0 and not isinstance(sigma, bool) else check_sigma(sigma)
        if at in found:
            raise ValueError(f"{name} has {at} twice, expected it once")
        found[at] = entry
    return list(found.items())


def _table(value: Any, name: str, items: int) -> Tensor:
    """(items, 5) of the columns ``FIELDS``, NaN in all of a row or in none."""
    columns = _object(value, name)
    table = torch.stack(
        [_column(columns.get(field), f"{name}: {field}", items, *_RANGES[field]) for field in FIELDS], dim=1
    )
    empty = table.isnan()
    if bool((empty.any(1) != empty.all(1)).any()):
        raise ValueError(f"{name} has items with some values only, expected all or none")
    if bool(((table[:, 1:3] != 0) & (table[:, 1:3] != 1) & ~empty[:, 1:3]).any()):
        raise ValueError(f"{name}: right and flip have other values, expected 0 and 1")
    return table


def _rows(value: Any, name: str, items: int) -> Tensor:
    rows = _list(value, name)
    widths = {len(_list(row, name)) for row in rows}
    if len(rows) != items or len(widths) != 1:
        raise ValueError(f"{name} has {len(rows)} rows of {sorted(widths)} values, expected {items} of one length")
    table = torch.stack([_column(row, name, len(row), 0, 1) for row in rows]).float()
    empty = table.isnan()
    if bool((empty.any(1) != empty.all(1)).any()) or bool(
        ((table.nan_to_num().sum(1) - 1).abs() > ROUNDING)[~empty[:, 0]].any()
    ):
        raise ValueError(f"{name} has rows that are no probabilities, expected a sum of 1")
    return table


def _column(value: Any, name: str, length: int, low: float, high: float) -> Tensor:
    """A list of numbers in a range, ``None`` as NaN."""
    numbers = _list(value, name)
    if len(numbers) != length:
        raise ValueError(f"{name} has {len(numbers)} values, expected {length}")
    for number in numbers:
        known = isinstance(number, int | float) and not isinstance(number, bool)
        if number is not None and not (known and low - ROUNDING <= number <= high + ROUNDING and abs(number) < 1e300):
            raise ValueError(f"{name} has {_short(number)}, expected numbers from {low} to {high}")
    return torch.tensor([math.nan if v is None else v for v in numbers], dtype=torch.float64)
