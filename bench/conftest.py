"""What pytest-benchmark's JSON says about the machine: the hardware and the versions, nothing that names a host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .record import commit


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {"id": commit()}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """The single timings are in ``stats.data``; what each row needs of them is in its ``extra_info``."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
