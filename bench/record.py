"""What a result row says about where it came from, and how rows are written and shown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tfb_ext

ROOT = Path(__file__).resolve().parent.parent


@cache
def commit() -> str:
    """The source's commit, from the first that knows: ``TFB_EXT_COMMIT``, a file ``.commit`` in the root, git.

    Git's gets ``+changes`` if files differ from it; ``unknown`` if none knows. The file serves copies without git.
    """
    given = os.environ.get("TFB_EXT_COMMIT")
    if given:
        return given
    note = ROOT / ".commit"
    if note.is_file():
        return note.read_text().strip()
    head = _git("rev-parse", "HEAD")
    if not head:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return head + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """The GPU's product name, or the processor's with the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: torch.device, command: str) -> dict[str, str]:
    """Device, versions, commit and date: the fields every result row ends with."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "tfb_ext": tfb_ext.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command,
    }


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned plain text under ``columns``; missing values are blank."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
