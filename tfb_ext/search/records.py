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

from ..adapters.adapter import Place
from ..checks import MOST_NUMBER, MOST_SPAN, check_sigma, is_integer
from ..errors import ConfigError
from ..files import parse_json_object, write_atomically

# Of each anchor, with its largest value: -log p(target); 1 where the answer is the target; 1 where it is not the mean adapter's;
# sum over classes of (p - y)^2; entropy of the prediction. All are 0 or more.
MOST = {"nll": MOST_NUMBER, "right": 1.0, "flip": 1.0, "brier": 2.0, "entropy": MOST_NUMBER}
FIELDS = tuple(MOST)
ROUNDING = 1e-3  # may cross these bounds by so much

At = tuple[Place, float]  # what is random, and sigma
MEAN_PLACE = Place(-1)  # of the mean adapter


@dataclass
class Records:
    """Per-anchor results, float64 on the CPU, NaN where an anchor was not run.

    Attributes:
        key: what they depend on: adapter, anchors, samples, seed, mode, ... Records of one key fit each other.
        baseline: (items, 5), of the mean adapter; columns are ``FIELDS``.
        guesses: (items,) int64, the mean adapter's answers.
        targets: (items,) int64, the labels, or the guesses again.
        values: by (place, sigma), (items, 5).
        probabilities: by (place, sigma), (items, C) float32; the mean adapter's under (``MEAN_PLACE``, 0). Empty unless a
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

    def at(self, place: Place, sigma: float) -> Tensor:
        """(items, 5) of this sigma, made empty where it is new."""
        return self.values.setdefault((place, sigma), torch.full_like(self.baseline, math.nan))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: NaN is ``None``, a column is a list."""

        def columns(values: Tensor) -> dict[str, list[float | None]]:
            return dict(zip(FIELDS, map(_with_none, values.T), strict=True))

        return {
            "key": self.key,
            "baseline": columns(self.baseline),
            "evaluations": [{**p._asdict(), "sigma": s, **columns(v)} for (p, s), v in self.values.items()],
            "probabilities": [
                {**p._asdict(), "sigma": s, "rows": [_with_none(row) for row in rows]}
                for (p, s), rows in self.probabilities.items()
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
        try:
            for entry in (*raw["evaluations"], *raw["probabilities"]):
                entry.setdefault("span", None)  # of a file from before there were spans
            records = cls(
                raw["key"],
                _table(raw["baseline"]),
                torch.tensor(raw["guesses"], dtype=torch.int64),
                torch.tensor(raw["targets"], dtype=torch.int64),
                {(_place(entry), check_sigma(entry["sigma"])): _table(entry) for entry in raw["evaluations"]},
                {(_place(e), float(e["sigma"])): _tensor(e["rows"]).float() for e in raw["probabilities"]},
            )
            written = records.to_dict()
            # Where reading and writing gives another text, an entry is there twice, a class is no integer, ...
            damaged = [name for name in written if _text(written[name]) != _text(raw[name])] or records._damaged()
        except (AttributeError, LookupError, ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"records: got {shortened(error)}, expected what a search writes") from None
        if damaged:
            raise ValueError(f"records: got a damaged {', '.join(damaged)}, expected what a search writes")
        return records

    def _damaged(self) -> list[str]:
        """Parts that no search gives: of the wrong shape or range, or that contradict each other."""
        items, most = len(self.guesses), torch.tensor(list(MOST.values()), dtype=torch.float64) + ROUNDING
        classes = torch.stack([self.guesses, self.targets])
        fits = {
            "key": items > 0 and self.key.get("items") == items,
            "guesses": bool((classes >= 0).all() and (classes < 2**31).all()),
            "baseline": torch.equal((self.guesses == self.targets).double(), self.baseline[:, 1]),
        }
        for at, table in [((Place(0), 0.0), self.baseline), *self.values.items()]:
            seen = table[~table.isnan().all(1)]
            inside = bool(((seen >= -ROUNDING) & (seen <= most)).all() and (seen[:, 1:3] % 1 == 0).all())
            fits[f"evaluation at {at}"] = inside and len(table) == items and _is_place(at[0])
        for at, rows in self.probabilities.items():
            seen = rows[~rows.isnan().all(1)]
            inside = bool((seen >= -ROUNDING).all() and ((seen.sum(1) - 1).abs() <= ROUNDING).all())
            fits[f"probabilities at {at}"] = inside and len(rows) == items
        return [name for name, fit in fits.items() if not fit]

    def check(self, classes: int) -> None:
        """Whether they can be of a model with that many classes, and complete for the metric in their key.

        Raises:
            ValueError: they cannot.
        """
        most = int(max(self.guesses.max(), self.targets.max()))
        if most >= classes:
            raise ValueError(f"guesses and targets reach class {most}, expected 0 to {classes - 1}")
        runs = {} if self.key.get("metric") is None else {(MEAN_PLACE, 0.0): self.baseline, **self.values}
        if set(self.probabilities) != set(runs):
            raise ValueError(f"probabilities are there at {list(self.probabilities)}, expected {list(runs)}")
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
        there = {name: f"{records.key[name]!r} there" if name in records.key else "not said there" for name in key}
        different = [f"{n} is {there[n]} and {v!r} here" for n, v in key.items() if there[n] != f"{v!r} there"]
        if different:
            raise ConfigError(f"{path} is of another search: {'; '.join(different)}; {advice}")
        records.check(classes)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path} holds no records of a search ({error}); {advice}") from None
    return records


def _place(entry: Mapping[str, Any]) -> Place:
    return Place(entry["first"], entry["span"])


def _is_place(place: Place) -> bool:
    return is_integer(place.first, 0) and (place.span is None or is_integer(place.span, 1, MOST_SPAN))


def _table(columns: Any) -> Tensor:
    """(items, 5) of the columns ``FIELDS``."""
    return torch.stack([_tensor([columns[name]])[0] for name in FIELDS], dim=1)


def _tensor(rows: Any) -> Tensor:
    return torch.tensor([[math.nan if v is None else v for v in row] for row in rows], dtype=torch.float64)


def _with_none(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values.tolist()]


def _text(value: Any) -> str:
    """JSON in which a number is written in one way, whether it was read as 1 or as 1.0."""
    return json.dumps(json.loads(json.dumps(value, sort_keys=True), parse_int=float))


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
