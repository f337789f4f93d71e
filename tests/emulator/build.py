"""Compiles the CUDA kernels for the CPU, with the emulator in the place of the device: ``python build.py FOLDER``.

Needs g++ and the CUDA toolkit's headers (of nvcc), no GPU and no torch with CUDA. The library is ``FOLDER/emulated.so``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"


def cuda_include() -> Path | None:
    """The folder with the toolkit's headers, or ``None`` where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "-v", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.*)", told)
    return Path(top[1].strip()) / "include" if top else None


def build(folder: Path) -> Path:
    include = cuda_include()
    if include is None:
        raise SystemExit("build: nvcc is not on PATH, so the CUDA headers are not found")
    folder.mkdir(parents=True, exist_ok=True)
    torch_paths = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = ["g++", "-std=c++20", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-DTFB_EMULATOR", abi]
    common += ["-I", str(HERE), *torch_paths, "-isystem", str(include)]
    sources = [*sorted(KERNELS.glob("*.cu")), HERE / "emulator.cpp", HERE / "emulated.cpp"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([*common, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "emulated.so"
    torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run(
        ["g++", "-shared", *map(str, objects), "-o", str(library), *torch_libraries, "-lc10", "-ltorch", "-ltorch_cpu"],
        check=True,
    )
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
