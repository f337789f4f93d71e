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

from ..errors import ConfigError
from ..files import write_atomically

# Of each anchor: -log p(target); 1 where the answer is the target; 1 where it is not the mean adapter's; sum over classes of
# (p - y)^2; entropy of the prediction.
FIELDS = ("nll", "right", "flip", "brier", "entropy")


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
    def from_dict(cls, raw: Mapping[str, Any]) -> Records:
        def matrix(columns: Mapping[str, Any]) -> Tensor:
            return torch.stack([_tensor(columns[name], torch.float64) for name in FIELDS], dim=1)

        return cls(
            key=dict(raw["key"]),
            baseline=matrix(raw["baseline"]),
            guesses=torch.tensor(raw["guesses"], dtype=torch.int64),
            targets=torch.tensor(raw["targets"], dtype=torch.int64),
            values={(e["first"], e["sigma"]): matrix(e) for e in raw["evaluations"]},
            probabilities={
                (e["first"], e["sigma"]): torch.stack([_tensor(row, torch.float32) for row in e["rows"]])
                for e in raw["probabilities"]
            },
        )

    def write(self, path: Path) -> None:
        """As the file of a search that has not ended: ``SigmaSearch.save`` writes the same with the result around it."""
        write_atomically(path, json.dumps({"sigma": None, "records": self.to_dict()}, allow_nan=False) + "\n")


def read_records(path: Path, key: Mapping[str, Any]) -> Records | None:
    """The records in a search's file, ``None`` if there is no such file.

    Raises:
        ConfigError: the file is damaged, or its records are of another adapter, data set or noise; the message names what
            differs.
    """
    if not path.exists():
        return None
    advice = "give another checkpoint, or delete this one to start anew"
    try:
        records = Records.from_dict(json.loads(path.read_text(encoding="utf-8"))["records"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{path} holds no records of a search ({type(error).__name__}: {error}); {advice}") from None
    different = [
        f"{name} is {records.key.get(name)!r} there and {value!r} here"
        for name, value in key.items()
        if records.key.get(name) != value
    ]
    if different:
        raise ConfigError(f"{path} is of another search: {'; '.join(different)}; {advice}")
    return records


def _numbers(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values.tolist()]


def _tensor(values: list[float | None], dtype: torch.dtype) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=dtype)
