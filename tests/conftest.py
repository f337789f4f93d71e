"""Devices for the tests. A test marked ``gpu`` is skipped with a reason where no CUDA device or no CUDA build is at hand; with
TFB_EXT_REQUIRE_GPU=1 it fails instead, so that a GPU machine cannot look green without running them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
import small_folders
import torch
from small_folders import Folders


def gpu_obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    from tfb_ext import ops

    return None if ops.build_info()["cuda"] else "tfb_ext is built without CUDA (see TFB_EXT_BUILD)"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    obstacle = gpu_obstacle()
    if obstacle and os.environ.get("TFB_EXT_REQUIRE_GPU") == "1":
        pytest.fail(f"TFB_EXT_REQUIRE_GPU=1, but {obstacle}", pytrace=False)
    if obstacle:
        pytest.skip(f"needs a GPU: {obstacle}")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that the operators are built for."""
    return torch.device(request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny language model on disk, with an adapter and data."""
    return small_folders.write(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The same for a tiny classifier."""
    return small_folders.write(tmp_path_factory.mktemp("classifier"), "llama-cls")


@pytest.fixture
def tfb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line's ``main()``: exit status, standard output, standard error; never a traceback."""
    from tfb_ext.app import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tfb", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.setenv("NO_COLOR", "1")
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capfd.readouterr()
        assert "Traceback" not in said.err + said.out
        return int(stopped.value.code or 0), said.out, said.err

    return run
