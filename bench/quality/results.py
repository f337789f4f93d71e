"""The rows of the study, out of the files that ``bench.quality.run`` left."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .measures import SCORES, Predicted, finite, fit_temperature, measure
from .methods import Kept

FIELDS = (
    "dataset", "adapter", "method", "recipe", "depth", "span", "samples", "antithetic", "mode", "seed", "accuracy", "ece", "nll",
    "brier", "auroc_error", "auroc_ood", "aurc", "forwards", "seconds", "peak_gib", "base",
)  # fmt: skip
SETTING = (
    "dataset",
    "adapter",
    "seed",
    "method",
    "recipe",
    "depth",
    "span",
    "samples",
    "antithetic",
    "mode",
    "base",
)  # no two rows have the same
LATER = ("-linear", "-spans", "-nf4", "-int8")  # units that were added to the study, and ran a part of it again
ORDER = {"headlines": 0, "r8": 1, "newsgroups": 2, "logiqa": 3}


@dataclass(frozen=True)
class Row:
    """One run of the study: what it is, its predictions, and (on demand) its measures.

    Attributes:
        adapter: TARGETS-STOP-KIND, such as ``qv-overfitted-mle``.
        method: ``mean``, ``dropout``, ``ensemble``, ``laplace``, ``blob``, ``tfb``, ``linear`` (the closed form, without
            samples), or one of them with ``+temperature``.
        seed: the training seed; None for an ensemble.
        span: which tokens of a prompt are random: ``all``, ``answer`` or ``question``.
        forwards: what the prediction costs, in forwards of the model: see ``forwards``.
        base: how the base model's weights are quantised; empty: not.
        outside: (M, C) log probabilities of the out-of-distribution prompts, where they are known as a whole.
        seconds: of a prediction of a thousand items; None where it was no call of its own.
        search_seconds: of the search for its sigma.
    """

    dataset: str
    adapter: str
    method: str
    seed: int | None
    samples: int
    forwards: float
    predicted: Predicted
    recipe: str | None = None
    depth: str | float | None = None
    span: str = "all"
    antithetic: bool | None = None
    mode: str | None = None
    base: str = ""
    outside: Tensor | None = None
    sigma: float | None = None
    temperature: float | None = None
    seconds: float | None = None
    search_seconds: float | None = None
    peak_gib: float | None = None
    commit: str | None = None
    device: str | None = None

    @cached_property
    def measures(self) -> dict[str, float | None]:
        return measure(self.predicted)

    def to_dict(self) -> dict[str, Any]:
        """A line of ``rows.csv.gz``."""
        whole = {**{name: getattr(self, name) for name in self.__dataclass_fields__}, **self.measures}
        del whole["predicted"], whole["outside"]
        return finite({name: whole[name] for name in (*FIELDS, *sorted(set(whole) - set(FIELDS)))})


@dataclass(frozen=True)
class Results:
    """All rows, what the units' files say beside them (one dict a unit), and which runs gave NaN and are left out."""

    rows: list[Row]
    units: list[dict[str, Any]]
    unusable: list[str] = field(default_factory=list)

    def pick(self, **wanted: Any) -> list[Row]:
        """The rows with these values of their fields; on the base model as it is, where nothing else is said."""
        wanted = {"base": "", **wanted}
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(row.dataset for row in self.rows))


def forwards(
    method: str, samples: int, classes: int, blocks: int, random_blocks: int | None, share: float | None = None
) -> float:
    """Cost of a prediction in forwards of the model.

    A sample costs its random blocks, what lies below them runs once: ``((L - k) + N k) / L``. With a span a sample costs the
    ``share`` of a test prompt's tokens that is random, beside the prompt: ``1 + N share``. Dropout and BLoB draw in every
    block. Laplace takes the gradients of every class's logit, a backward pass counted as two forwards; the closed form those of
    one class less, with a span through its tokens alone.
    """
    if method == "laplace":
        return 1.0 + 2 * classes
    if method == "linear":
        return 1 + 2 * (classes - 1) * (1.0 if share is None else share)
    if share is not None:
        return 1 + samples * share
    if method == "tfb":
        assert random_blocks is not None
        return (blocks - random_blocks + samples * random_blocks) / blocks
    return float(samples)


def load(work: Path) -> Results:
    """Read every finished unit of a study's folder, and add what follows from them: ensembles and scaled temperatures.

    What the units of the spans and of the closed form ran again (the adapter as it is, settings with all tokens) stands instead of
    the older runs.

    Raises:
        FileNotFoundError: no finished unit in the folder.
    """
    files = sorted((work / "predictions").glob("*.json"), key=lambda file: (file.stem.endswith(LATER), file))
    if not files:
        raise FileNotFoundError(
            f"no finished unit in {work / 'predictions'}; run python -m bench.quality.run --work {work}"
        )
    units = [json.loads(file.read_text()) for file in files]
    rows: list[Row] = []
    unusable: list[str] = []
    for file, facts in zip(files, units, strict=True):
        with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
            rows += _unit_rows(facts, arrays, unusable)
    rows = list({tuple(getattr(row, name) for name in SETTING): row for row in rows}.values())
    return Results(_sorted([*rows, *_ensembles(rows)]), units, unusable)


def _sorted(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (ORDER.get(row.dataset, 9), row.adapter, row.seed is None, row.seed or 0))


def _unit_rows(facts: dict[str, Any], arrays: Any, unusable: list[str]) -> list[Row]:
    unit = facts["unit"]
    labels = {part: torch.tensor(facts["labels"][part]) for part in ("test", "validation")}
    rows = []
    for row in facts["rows"]:
        kept = Kept.of(arrays, row["name"])
        if np.isnan(kept.test).any():
            unusable.append(
                f"{unit['dataset']} {unit['targets']}-{unit['stop']}-{unit['kind']} {unit['seed']}: {row['method']}"
            )
            continue
        common = {
            "dataset": unit["dataset"],
            "adapter": f"{unit['targets']}-{unit['stop']}-{unit['kind']}",
            "seed": unit["seed"],
            "base": unit.get("base", ""),
            "samples": row["samples"],
            "forwards": forwards(
                row["method"],
                row["samples"],
                len(facts["choices"]),
                facts["blocks"],
                row.get("random_blocks"),
                row["span_tokens"] / facts["tokens"] if row.get("span_tokens") else None,
            ),
            "span": row.get("span", "all"),
            **{name: row[name] for name in ("recipe", "depth", "antithetic", "mode", "sigma", "peak_gib")},
            "search_seconds": row.get("search_seconds"),
            "seconds": None if row["seconds"] is None else row["seconds"] * 1000 / facts["items"],
            "commit": facts["commit"],
            "device": facts["device"],
        }
        whole = _whole(kept)
        strange = dict(zip(SCORES, _double(kept.stranger), strict=True))
        predicted = judged(_logs(kept.test), labels["test"], _double(kept.information), strange)
        rows.append(Row(method=row["method"], predicted=predicted, outside=whole, **common))
        if whole is not None:
            temperature = fit_temperature(_logs(kept.validation), labels["validation"])
            scaled = _scaled(rows[-1], temperature)
            rows.append(
                replace(rows[-1], method=f"{row['method']}+temperature", predicted=scaled, temperature=temperature)
            )
    return rows


def judged(logs: Tensor, labels: Tensor, information: Tensor, strange: dict[str, Tensor]) -> Predicted:
    """Predictions (N, C) with their scores of uncertainty."""
    return Predicted(logs.exp(), labels, uncertainty(logs, information), strange)


def uncertainty(logs: Tensor, information: Tensor) -> dict[str, Tensor]:
    """The three scores of log mean probabilities (N, C). Minus the log of the top one is as good as minus the top one."""
    scores = (-logs.amax(1), torch.special.entr(logs.exp()).sum(1), information)
    return dict(zip(SCORES, scores, strict=True))


def _logs(half: np.ndarray) -> Tensor:
    return _double(half).log_softmax(-1)


def _double(half: np.ndarray) -> Tensor:
    return torch.from_numpy(half.astype(np.float64))


def _whole(kept: Kept) -> Tensor | None:
    return _logs(kept.outside) if len(kept.outside) else None


def _scaled(row: Row, temperature: float) -> Predicted:
    """At another temperature; the mutual information stays, since a temperature on the mean says nothing about it."""
    plain = row.predicted
    assert row.outside is not None
    logs = (plain.probabilities.log() / temperature).log_softmax(-1)
    strange = uncertainty((row.outside / temperature).log_softmax(-1), plain.strange["information"])
    return judged(logs, plain.labels, plain.scores["information"], strange)


def _ensembles(rows: list[Row]) -> list[Row]:
    """The average of the plain adapters of all seeds, for every data set, set of layers and stop that has at least two."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.method == "mean" and row.adapter.endswith("-mle") and not row.base:
            groups.setdefault((row.dataset, row.adapter), []).append(row)
    return [_ensemble(group) for group in groups.values() if len(group) > 1]


def _ensemble(group: list[Row]) -> Row:
    members = [row.predicted for row in group]
    logs, information = _averaged([p.probabilities for p in members])
    outside, strange = _averaged([row.outside.exp() for row in group if row.outside is not None])
    seconds = [row.seconds for row in group if row.seconds is not None]
    return replace(
        group[0],
        method="ensemble",
        seed=None,
        samples=len(group),
        forwards=float(len(group)),
        predicted=judged(logs, members[0].labels, information, uncertainty(outside, strange)),
        outside=outside,
        seconds=sum(seconds) if len(seconds) == len(group) else None,
    )


def _averaged(members: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Log of the mean of probabilities (N, C), and the members' mutual information (N,)."""
    p = torch.stack(members)
    mean = p.mean(0)
    information = torch.special.entr(mean).sum(-1) - torch.special.entr(p).sum(-1).mean(0)
    return mean.log(), information.clamp(min=0)
