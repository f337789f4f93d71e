from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_fakes import open_shop
from peft import PeftModel
from safetensors.torch import load_file

from examples.headlines.train import TrainingOptions, load_base, main, train
from tfb_ext.app.demo.headlines import load_split
from tfb_ext.data import encode

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = TrainingOptions(items=24, epochs=8, lr=5e-2, batch_size=5, test_items=40, device="cpu")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return open_shop(tmp_path, monkeypatch)


def silent(message: str) -> None:
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.slow
def test_training_learns_and_leaves_an_adapter_that_loads(shop: Path, tmp_path: Path) -> None:
    said: list[str] = []
    summary = train(OPTIONS, tmp_path / "out", said.append)
    first = float(next(message for message in said if message.startswith("epoch 1/8")).split()[-1])
    assert summary["train_loss"] < 0.5 * first
    assert summary["train_accuracy"] > 0.9

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == summary
    assert str(tmp_path) not in "".join(
        p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix != ".safetensors"
    )

    base, tokenizer = load_base()
    model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    test = encode(load_split("test", 40), tokenizer)
    hits = 0
    with torch.inference_mode():
        for ids, label in zip(test.token_ids, test.labels, strict=True):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1, list(test.choice_ids)]
            hits += logits.argmax().item() == label
    assert summary["test"]["accuracy"] == pytest.approx(hits / 40)


@pytest.mark.slow
def test_a_seed_is_one_adapter(shop: Path, tmp_path: Path) -> None:
    short = replace(OPTIONS, epochs=1, lr=1e-7)  # stays where it began, so that the beginnings are compared too
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(replace(short, seed=seed), tmp_path / name, silent)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all((a[name] - c[name]).abs().max() > 1e-2 for name in a if "lora_A" in name)
    assert not any(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.slow
def test_bfloat16_base_keeps_a_float32_adapter(shop: Path, tmp_path: Path) -> None:
    train(replace(OPTIONS, epochs=1, dtype="bfloat16"), tmp_path / "out", silent)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}


@pytest.mark.slow
def test_command_line_sets_every_option(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = replace(OPTIONS, seed=3, epochs=1, rank=2, alpha=4, targets="o_proj", dtype="float32", lr=1e-3)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in vars(given).items()]
    main([f"--out={tmp_path / 'out'}", *arguments])
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert summary["arguments"] == vars(given)
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["test"] == summary["test"]


@pytest.mark.parametrize(
    "change", [{"items": 0}, {"epochs": 0}, {"lr": 0.0}, {"rank": -1}, {"batch_size": 0}, {"dtype": "int8"}]
)
def test_refuses_options_before_any_work(change: dict[str, int], tmp_path: Path) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        train(replace(OPTIONS, **change), tmp_path / "out", silent)


def test_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another"):
        train(OPTIONS, tmp_path, silent)
    assert (tmp_path / "training.json").read_text() == "mine"


@pytest.mark.slow
def test_does_without_the_compiled_extension() -> None:
    code = (
        "import sys, examples.headlines.train; "
        "print([name for name in sys.modules if name == 'tfb_ext.ops' or name.startswith('tfb_ext._')])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout.strip() == "[]"
