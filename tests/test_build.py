"""What the build says: which operators it builds and why, what a wrong switch and a missing extension answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tfb_ext import ops

ROOT = Path(__file__).parent.parent


def setup_py(switch: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, "TFB_EXT_BUILD": switch, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_cpu_build_says_so() -> None:
    run = setup_py("cpu")
    assert run.returncode == 0, run.stderr
    assert "tfb_ext: building CPU operators (TFB_EXT_BUILD)" in run.stderr


@pytest.mark.slow
def test_unknown_switch_is_an_error() -> None:
    run = setup_py("gpu")
    assert run.returncode != 0
    assert "TFB_EXT_BUILD is 'gpu', expected auto, cpu or cuda" in run.stderr


@pytest.mark.slow
def test_cuda_build_names_what_is_missing() -> None:
    # Without nvcc anywhere the CUDA build must refuse, whether or not torch has CUDA.
    run = setup_py("cuda", PATH="/nonexistent", CUDA_HOME="/nonexistent")
    assert run.returncode != 0
    reason = "built without CUDA" if torch.version.cuda is None else "nvcc is not found"
    assert reason in run.stderr and "TFB_EXT_BUILD=cpu" in run.stderr


@pytest.mark.slow
def test_auto_falls_back_and_says_why() -> None:
    run = setup_py("auto", PATH="/nonexistent", CUDA_HOME="/nonexistent")
    assert run.returncode == 0, run.stderr
    reason = "built without CUDA" if torch.version.cuda is None else "nvcc is not found"
    assert "tfb_ext: building CPU operators (" in run.stderr and reason in run.stderr


@pytest.mark.slow
def test_missing_extension_names_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['tfb_ext._C'] = None; import tfb_ext.ops"],
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "ImportError" in run.stderr and "pip install --no-build-isolation -e ." in run.stderr


def test_build_info() -> None:
    info = ops.build_info()
    kernels = {"cuda_kernels"} if info["cuda"] and torch.cuda.is_available() else set()
    assert set(info) == {"cuda", "cuda_arch_list", "compiler", "cpu_capability", "torch_version"} | kernels
    assert info.get("cuda_kernels", "portable") in ("hopper", "portable")
    assert info["cpu_capability"] in ("baseline", "avx2", "avx512")
    assert bool(info["cuda_arch_list"]) == info["cuda"]
    assert torch.__version__.startswith(info["torch_version"])


def test_the_switch_for_portable_kernels_is_harmless_without_a_gpu() -> None:
    ops.use_portable_kernels(True)
    ops.use_portable_kernels(False)
