"""The rows of ``bench/results/*.json`` and how their figures are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .test_kernels import IN_FEATURES, OUT_FEATURES

Rows = dict[str, dict[str, Any]]


def load(file: Path) -> list[dict[str, Any]]:
    return [row["extra_info"] for row in json.loads(file.read_text())["benchmarks"]]


def load_if_there(*files: Path) -> list[dict[str, Any]]:
    return [row for file in files if file.exists() for row in load(file)]


def by_case(rows: list[dict[str, Any]]) -> Rows:
    return {row["case"]: row for row in rows}


def ratio(row: dict[str, Any], digits: int = 2) -> str:
    low, high = row["spread"]
    return f"{row['ratio']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 20 else f"{value:.1f} ms"


def worst(rows: list[dict[str, Any]], case: str, **where: Any) -> float:
    """The least ratio of a case at the shapes that the project holds itself to."""
    features = {"n": IN_FEATURES, "m": OUT_FEATURES}
    found = [
        row["ratio"]
        for row in rows
        if row["case"] == case
        and all(row[key] in known for key, known in features.items() if key in row)
        and all(row[key] == value for key, value in where.items())
    ]
    return min(found)


def table_head(*columns: str) -> list[str]:
    """The first two lines of a table in Markdown."""
    return [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|" + "---|" * len(columns)]
