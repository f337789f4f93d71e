"""Folds the output of ``tests/run_gpu.sh`` into ``summary.json``; exits with 1 if anything failed or did not run.

``python tests/gpu/summary.py FOLDER build=0 pytest=0 memcheck=0 ...`` with every step's exit status.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from bench.record import commit

SANITIZERS = ("memcheck", "racecheck")
STEPS = ("build", "pytest", "noise_parity", *SANITIZERS)


def junit_counts(path: Path) -> dict[str, int]:
    """Tests run, passed, failed (errors too) and skipped."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {
        "run": total - skipped,
        "passed": total - skipped - failures - errors,
        "failed": failures + errors,
        "skipped": skipped,
    }


def sanitizer_verdict(path: Path) -> str:
    """The tool's own closing line, such as ``ERROR SUMMARY: 0 errors``."""
    lines = [line.lstrip("= ") for line in path.read_text().splitlines()] if path.exists() else []
    return next((line for line in reversed(lines) if "SUMMARY" in line), "no summary line: it did not run to its end")


def summarise(folder: Path, status: dict[str, int]) -> dict[str, Any]:
    junit, parity = folder / "junit.xml", folder / "noise_parity.json"
    tests = junit_counts(junit) if junit.exists() else None
    tested = tests is not None and tests["passed"] > 0 and tests["failed"] == 0
    return {
        "passed": tested and all(status.get(step) == 0 for step in STEPS),
        "exit_status": status,
        "tests": tests,
        "sanitizer": {tool: sanitizer_verdict(folder / f"{tool}.log") for tool in SANITIZERS},
        "noise": json.loads(parity.read_text()) if parity.exists() else None,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "commit": commit(),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    status = {name: int(code) for name, code in (argument.split("=") for argument in sys.argv[2:])}
    summary = summarise(folder, status)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    raise SystemExit(0 if summary["passed"] else 1)


if __name__ == "__main__":
    main()
