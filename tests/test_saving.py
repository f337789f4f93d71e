"""An adapter's folder is the old one or the new one, whatever ends the save; a file is written through links and to devices."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import tfb_ext
from tfb_ext import files
from tfb_ext.errors import ConfigError
from tfb_ext.files import check_target, remove_leftovers, write_atomically

# What a save calls on its way; each call is a place to be killed at.
STEPS = ("os.replace", "os.fsync", "os.link", "os.chmod", "os.mkdir", "shutil.rmtree", "tfb_ext.files._exchange")


def content(folder: Path) -> dict[str, bytes]:
    """Every file but temporary ones, by its path in the folder."""
    found = [p for p in folder.rglob("*") if p.is_file() and not any(q.startswith(".tfb-") for q in p.parts)]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def rubbish(root: Path) -> list[str]:
    return [p.name for p in root.rglob(".tfb-*")]


@contextmanager
def at_call(number: int, act: Any) -> Iterator[list[int]]:
    """Calls ``act`` before the ``number``-th of the calls of ``STEPS``; gives how many there were."""
    calls = [0]
    patch = pytest.MonkeyPatch()

    def wrapped(whole: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                act()
            return whole(*args, **kwargs)

        return call

    import importlib

    for step in STEPS:
        module, name = step.rsplit(".", 1)
        patch.setattr(step, wrapped(getattr(importlib.import_module(module), name)))
    try:
        yield calls
    finally:
        patch.undo()


def two_adapters() -> tuple[Any, Any]:
    """One of another sigma, rank and weights than the other."""
    return (
        tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=0.2),
        tfb_ext.bayesianize(zoo.peft_model("llama", r=2, scale=0.3), sigma=0.5),
    )


def old_folder(root: Path, adapter: Any) -> Path:
    place = adapter.save_pretrained(root / "bayes")
    (place / "notes.txt").write_text("mine")
    (place / "runs").mkdir()
    (place / "runs" / "log.txt").write_text("mine too")
    return place


def check_either(place: Path, old: dict[str, bytes], new: dict[str, bytes], sigmas: tuple[float, float]) -> bool:
    """Whether it is the new one; it must be one of them."""
    now = content(place)
    assert now in (old, new), sorted(n for n in now if now[n] not in (old.get(n), new.get(n)))
    loaded = tfb_ext.load(zoo.peft_model("llama").unload(), place)
    assert loaded.sigma == sigmas[now == new]
    return now == new


@pytest.mark.slow
def test_killed_at_any_step_the_folder_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    old, new = two_adapters()
    new.save_pretrained(old_folder(tmp_path / "whole", old))
    whole = content(tmp_path / "whole" / "bayes")
    place = old_folder(tmp_path / "killed", old)
    before = content(place)
    outcomes, number = [], 0
    while True:
        number += 1
        child = os.fork()
        if child == 0:  # nothing of pytest's may run on in here
            with at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                new.save_pretrained(place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        outcomes.append(check_either(place, before, whole, (0.2, 0.5)))
        if os.WIFEXITED(status):
            break
        old.save_pretrained(place)
        assert content(place) == before and not rubbish(tmp_path)  # the next save clears up
    assert number > 8 and outcomes[-1] and not outcomes[0]


@pytest.mark.slow
@pytest.mark.parametrize("error", zoo.slow_but([OSError, KeyboardInterrupt], OSError))
def test_failed_at_any_step_the_folder_is_the_old_or_the_new_one(error: type[BaseException], tmp_path: Path) -> None:
    old, new = two_adapters()
    new.save_pretrained(old_folder(tmp_path / "whole", old))
    whole = content(tmp_path / "whole" / "bayes")
    place = old_folder(tmp_path / "failed", old)
    before = content(place)

    def fail() -> None:
        raise error(28, "No space left on device")

    number, ended = 0, False
    while not ended:
        number += 1
        with at_call(number, fail) as calls, suppress(error):
            new.save_pretrained(place)
        ended = calls[0] < number
        assert content(place) in (before, whole)
        old.save_pretrained(place)
        assert content(place) == before
    assert not rubbish(tmp_path)


def test_a_new_sigma_replaces_one_file_and_keeps_the_folder(tmp_path: Path) -> None:
    adapter, _ = two_adapters()
    place = old_folder(tmp_path, adapter)
    inode = place.stat().st_ino
    adapter.sigma = 0.7
    adapter.save_pretrained(place)
    assert place.stat().st_ino == inode and tfb_ext.load(adapter.unload().unload(), place).sigma == 0.7


@pytest.mark.slow
def test_in_the_current_folder_and_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = two_adapters()
    place = old_folder(tmp_path, old)
    monkeypatch.chdir(place)
    new.save_pretrained(".")
    assert Path("tfb_config.json").is_file() and Path("runs/log.txt").read_text() == "mine too"
    assert tfb_ext.load(zoo.peft_model("llama").unload(), ".").sigma == 0.5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(place)
    old.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and tfb_ext.load(zoo.peft_model("llama").unload(), place).sigma == 0.2
    assert not rubbish(tmp_path)


def test_without_exchange_a_half_replaced_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system on which folders cannot trade places: the fingerprint gives a mixture away."""
    old, new = two_adapters()
    place = old_folder(tmp_path, old)

    def no(*_: Any) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files, "_exchange", no)
    new.save_pretrained(place)
    assert tfb_ext.load(zoo.peft_model("llama").unload(), place).sigma == 0.5
    other = zoo.peft_model("llama", scale=0.4)
    other.save_pretrained(place)  # the adapter's files, without tfb_config.json
    with pytest.raises(ConfigError, match="sigma was chosen for other weights"):
        tfb_ext.load(zoo.peft_model("llama").unload(), place)


def test_a_running_save_is_no_leftover(tmp_path: Path) -> None:
    path, handle = files.new_temporary(tmp_path)
    remove_leftovers(tmp_path)
    assert path.exists()
    os.close(handle)
    (tmp_path / ".tfb-mine").write_text("a name of another kind")
    remove_leftovers(tmp_path)
    assert not path.exists() and (tmp_path / ".tfb-mine").exists()


# The fingerprint ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_another_scaling_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    adapter, _ = two_adapters()
    place = adapter.save_pretrained(tmp_path)
    path = place / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=r"or another scaling \(lora_alpha\)"):
        tfb_ext.load(zoo.peft_model("llama").unload(), place)


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_older_formats_load(version: int, tmp_path: Path) -> None:
    """Their fingerprint is of the weights alone, and all tokens are random."""
    adapter, _ = two_adapters()
    place = adapter.save_pretrained(tmp_path)
    path = place / "tfb_config.json"
    raw = json.loads(path.read_text()) | {"format_version": version, "fingerprint": adapter.fingerprint(version)}
    path.write_text(json.dumps(raw))
    assert raw["fingerprint"] != adapter.fingerprint()
    base = zoo.peft_model("llama").unload()
    loaded = tfb_ext.load(base, place)
    assert (loaded.sigma, loaded.span) == (0.2, "all")
    weights = place / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({n: t * 1.01 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match="sigma was chosen for other weights"):
        tfb_ext.load(zoo.peft_model("llama").unload(), place)


@pytest.mark.parametrize("span", ["all", "answer", 4])
def test_the_span_is_saved_and_restored(span: Any, tmp_path: Path) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=0.2, span=span)
    path = adapter.save_pretrained(tmp_path) / "tfb_config.json"
    raw = json.loads(path.read_text())
    assert (raw["format_version"], raw["span"]) == (6, span)
    loaded = tfb_ext.load(zoo.peft_model("llama").unload(), tmp_path)
    assert loaded.span == span
    batch = zoo.inputs(2)
    outputs = []
    for one in (adapter, loaded):
        with one.predictive(2):
            outputs.append(one.model(**batch).logits)
    assert torch.equal(*outputs)
    # Format 3 had no spans; what it certifies is the same.
    del raw["span"]
    path.write_text(json.dumps(raw | {"format_version": 3}))
    assert tfb_ext.load(zoo.peft_model("llama").unload(), tmp_path).span == "all"


def test_a_span_that_the_family_has_not_is_refused(tmp_path: Path) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=0.2, family="full-rank")
    path = adapter.save_pretrained(tmp_path) / "tfb_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"span": "answer"}))
    with pytest.raises(ConfigError, match="tfb_config.json: span is 'answer' with the family 'full-rank'"):
        tfb_ext.load(zoo.peft_model("llama").unload(), tmp_path)


@pytest.mark.parametrize("sigma", [1e39, 1e-60, 1e-45])
def test_sigma_outside_float32_is_refused(sigma: float, tmp_path: Path) -> None:
    adapter, _ = two_adapters()
    path = adapter.save_pretrained(tmp_path) / "tfb_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sigma": sigma}))
    with pytest.raises(ConfigError, match="sigma is .*, expected within float32"):
        tfb_ext.load(zoo.peft_model("llama").unload(), tmp_path)


# Damaged adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(part: float, tmp_path: Path) -> None:
    adapter, _ = two_adapters()
    path = adapter.save_pretrained(tmp_path) / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(
        tfb_ext.errors.UnsupportedModelError, match="adapter_model.safetensors is no whole safetensors file"
    ):
        tfb_ext.load(zoo.peft_model("llama").unload(), tmp_path)


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter, _ = two_adapters()
    path = adapter.save_pretrained(tmp_path) / "adapter_model.safetensors"
    own = load_file(path)
    for tensors, words in (
        ({"x": torch.zeros(3)}, "has 1 tensors that LlamaForCausalLM does not take, such as 'x'"),
        (own | {"base_model.model.score.weight": torch.zeros(3, 32)}, "does not take, such as .*score.weight"),
        (dict(list(own.items())[1:]), "lacks 1 tensors that its configuration asks for"),
        ({}, "lacks"),
    ):
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(tfb_ext.errors.UnsupportedModelError, match=words):
            tfb_ext.load(zoo.peft_model("llama").unload(), tmp_path)
    path.unlink()
    with pytest.raises(tfb_ext.errors.UnsupportedModelError, match="holds no adapter_model.safetensors"):
        tfb_ext.load(zoo.peft_model("llama").unload(), tmp_path)


# Single files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_new_files_follow_the_umask_and_old_ones_keep_their_mode(mask: int, mode: int, tmp_path: Path) -> None:
    old, _ = two_adapters()
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "new.json", "text")
        place = old.save_pretrained(tmp_path / "bayes")
    finally:
        os.umask(before)
    for path in (tmp_path / "new.json", place / "tfb_config.json", place / "adapter_config.json"):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    (tmp_path / "new.json").chmod(0o604)
    write_atomically(tmp_path / "new.json", "other")
    assert stat.S_IMODE((tmp_path / "new.json").stat().st_mode) == 0o604


def entries(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {p: p.lstat() for p in (folder, *folder.rglob("*"))}
    return {str(p.relative_to(folder)): (s.st_mode, s.st_uid, s.st_gid) for p, s in found.items()}


def test_a_save_keeps_modes_and_owners(tmp_path: Path) -> None:
    """Whoever saves, root too: the folder, what is in it, and a file that is written by itself."""
    old, new = two_adapters()
    place = old.save_pretrained(tmp_path / "bayes")
    (place / "runs" / "deep").mkdir(parents=True)
    (place / "runs" / "deep" / "log.txt").write_text("mine")
    (place / "link").symlink_to("runs")
    modes = {"": 0o2750, "runs": 0o700, "runs/deep": 0o1777, "runs/deep/log.txt": 0o604, "tfb_config.json": 0o640}
    for name, mode in modes.items():
        if os.geteuid() == 0:
            os.chown(place / name, 1234, 4321)
        (place / name).chmod(mode)
    (tmp_path / "alone").write_text("a")
    if os.geteuid() == 0:
        os.chown(tmp_path / "alone", 1234, 4321)
    before, alone = entries(place), entries(tmp_path)["alone"]
    new.save_pretrained(place)
    assert tfb_ext.load(zoo.peft_model("llama").unload(), place).sigma == 0.5
    assert entries(place) == before and (place / "runs" / "deep" / "log.txt").read_text() == "mine"
    write_atomically(tmp_path / "alone", "b")
    assert entries(tmp_path)["alone"] == alone


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("a/real.json")
    (tmp_path / "dangling.json").symlink_to("a/new.json")
    for link, target in (("link.json", "real.json"), ("dangling.json", "new.json")):
        write_atomically(tmp_path / link, "new")
        assert (tmp_path / link).is_symlink() and (tmp_path / "a" / target).read_text() == "new"
    assert not rubbish(tmp_path)


def test_devices_and_pipes_are_written_to(tmp_path: Path) -> None:
    write_atomically(Path("/dev/null"), "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left on device.*full"):
        write_atomically(Path("/dev/full"), "text")
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "text")
    reader.join(20)
    assert read == ["text"] and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("to_file", [True, False])
def test_standard_output_by_its_name(to_file: bool, tmp_path: Path) -> None:
    code = "import pathlib, tfb_ext.files as f; print('a'); f.write_atomically(pathlib.Path('/dev/stdout'), 'b\\n'); print('c')"
    root = Path(__file__).resolve().parents[1]
    with (tmp_path / "out").open("wb") as file:
        kept = file if to_file else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", code], stdout=kept, cwd=root, timeout=120, check=True)
    assert ((tmp_path / "out").read_bytes() if to_file else done.stdout) == b"a\nb\nc\n"


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for path, folder, words in (
        (tmp_path, False, "is a folder, expected a file"),
        (tmp_path / "file", True, "is a file, expected a folder"),
        (tmp_path / "file" / "x.json", False, "would lie in .*file, expected a folder there"),
        (tmp_path / ("x" * 300), False, "cannot be written .File name too long"),
    ):
        with pytest.raises(ValueError, match=words):
            check_target(path, folder)
    for path in (tmp_path / "new", tmp_path / "a" / "b", tmp_path / "file", Path("/dev/null")):
        check_target(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]
