"""What pytest-benchmark's JSON says about the machine: the hardware and the versions, nothing that names a host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .record import commit
from .timing import copy_bandwidth


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {"id": commit()}


@pytest.fixture(scope="session")
def copy_rates() -> dict[str, float]:
    """Measured copy bandwidth, bytes a second, by device type; ``cuda`` only where there is one."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {name: copy_bandwidth(torch.device(name)) for name in devices}
