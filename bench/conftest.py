"""What pytest-benchmark's JSON says about the machine: the hardware and the versions, nothing that names a host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .record import commit
from .timing import ceilings
from .versus import Versus


@pytest.fixture
def versus(benchmark: Any, request: pytest.FixtureRequest) -> Versus:
    """On the GPU where there is one; rows say what the machine reaches at best."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    benchmark.extra_info |= ceilings(device)
    return Versus(benchmark, device, f"bench/{request.path.name}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """A run that is interrupted keeps the rows it has: pytest-benchmark fails on one that was begun and not timed yet."""
    kept = getattr(session.config, "_benchmarksession", None)
    if kept is not None:
        kept.benchmarks[:] = [row for row in kept.benchmarks if row and "of" in row.extra_info]
    yield


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {"id": commit()}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """The single timings are in ``stats.data``; what each row needs of them is in its ``extra_info``."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
