"""Builds ``tfb_ext._C``. TFB_EXT_BUILD=cpu|cuda|auto chooses what is built; auto takes CUDA where torch and nvcc have it."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"


def cuda_obstacle() -> str | None:
    """What keeps the CUDA operators from being built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    home = cpp_extension.CUDA_HOME
    if home is None or shutil.which("nvcc", path=os.path.join(home, "bin")) is None:
        return "nvcc is not found (put it on PATH or set CUDA_HOME)"
    return None


def choose_build() -> bool:
    """True for CPU and CUDA, False for the CPU alone; says which and why on stderr."""
    wanted = os.environ.get("TFB_EXT_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        raise SystemExit(f"tfb_ext: TFB_EXT_BUILD is {wanted!r}, expected auto, cpu or cuda")
    obstacle = cuda_obstacle()
    if wanted == "cuda" and obstacle:
        raise SystemExit(f"tfb_ext: TFB_EXT_BUILD=cuda, but {obstacle}; set TFB_EXT_BUILD=cpu to build without it")
    cuda = wanted != "cpu" and obstacle is None
    reason = "TFB_EXT_BUILD" if wanted != "auto" else obstacle or f"CUDA {torch.version.cuda} and nvcc are there"
    print(f"tfb_ext: building {'CPU and CUDA' if cuda else 'CPU'} operators ({reason})", file=sys.stderr, flush=True)
    return cuda


def extension() -> object:
    cuda = choose_build()
    sources = ["csrc/bindings.cpp", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))]
    # -Wno-psabi: vectors wider than the target's registers only ever live inside one function.
    flags = ["-O3", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wno-psabi"]
    arch_list = ""
    if cuda:
        arch_list = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCH_LIST)
        for pattern in ("*.cpp", "*.cu"):
            sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cuda").glob(pattern))
    macros = [("TFB_EXT_CUDA_ARCH_LIST", f'"{arch_list}"')] + ([("TFB_EXT_WITH_CUDA", None)] if cuda else [])
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        name="tfb_ext._C",
        sources=sources,
        define_macros=macros,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]} if cuda else {"cxx": flags},
        extra_link_args=["-fopenmp"],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)})
