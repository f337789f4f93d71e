"""From names to a model: devices, types, adapter folders and what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_folders
import torch
from peft import PeftModel
from small_folders import Folders
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

import tfb_ext
from tfb_ext.app import loading
from tfb_ext.app.loading import device_name, load_adapter, pick_device, pick_dtype, versions
from tfb_ext.errors import UnsupportedModelError


def changed(folders: Folders, target: Path, **config: Any) -> str:
    """A copy of the adapter with another configuration."""
    shutil.copytree(folders.adapter, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return str(target)


def test_loads_an_adapter_over_the_base_it_names(llama: Folders) -> None:
    loaded = load_adapter(str(llama.adapter), device="cpu", dtype="float32")
    assert isinstance(loaded.model, PeftModel) and not loaded.model.training and not loaded.head
    assert (loaded.adapter, loaded.base) == (llama.adapter, str(llama.base))
    assert loaded.tokenizer(" yes")["input_ids"] == [small_folders.WORDS.index("yes")]
    weights = tfb_ext.bayesianize(loaded.model).posteriors[0].mean
    assert weights.abs().max() > 0.1  # the trained adapter, not a fresh one, whose B is zero


def test_base_and_dtype_can_be_given(llama: Folders, tmp_path: Path) -> None:
    adapter = changed(llama, tmp_path / "adapter", base_model_name_or_path="somewhere/else")
    loaded = load_adapter(adapter, str(llama.base), "cpu", "bfloat16")
    assert loaded.base == str(llama.base)
    assert loaded.model.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_classification_head(classifier: Folders) -> None:
    loaded = load_adapter(str(classifier.adapter), device="cpu", dtype="float32", classes=3)
    assert loaded.head and loaded.model.config.pad_token_id == 0
    assert loaded.model(torch.tensor([[5, 6], [7, 8]])).logits.shape == (2, 3)


def test_classifiers_without_a_padding_token_get_the_tokenizers(classifier: Folders, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(classifier.base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    assert load_adapter(str(classifier.adapter), str(base), "cpu", "float32", 3).model.config.pad_token_id == 0
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": None}))
    assert load_adapter(str(classifier.adapter), str(base), "cpu", "float32", 3).model.config.pad_token_id == 2


def test_folders_that_are_no_adapter(llama: Folders, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"nowhere holds no adapter_config\.json.*or 'demo'"):
        load_adapter(str(tmp_path / "nowhere"))
    with pytest.raises(UnsupportedModelError, match="base holds no adapter_config"):
        load_adapter(str(llama.base))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"adapter_config\.json is not valid JSON"):
        load_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UnsupportedModelError, match="holds a list, expected a JSON object"):
        load_adapter(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_model_name_or_path": None}, "does not name its base model; pass --base"),
        ({"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS'; the command line serves CAUSAL_LM and SEQ_CLS"),
    ],
)
def test_adapters_that_are_not_served(llama: Folders, tmp_path: Path, config: dict, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load_adapter(changed(llama, tmp_path / "adapter", **config))


def test_adapter_of_another_model(llama: Folders, classifier: Folders, tmp_path: Path) -> None:
    base = tmp_path / "wide"
    shutil.copytree(llama.base, base)
    config = LlamaConfig.from_pretrained(llama.base)
    config.hidden_size = 64
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    with pytest.raises(UnsupportedModelError, match=r"does not fit the base model .*wide \(size mismatch.*--base"):
        load_adapter(str(llama.adapter), str(base), "cpu", "float32")


def test_classifier_of_another_number_of_classes(classifier: Folders, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="do not make a classifier of 2 classes.*as many choices"):
        load_adapter(str(classifier.adapter), device="cpu", dtype="float32", classes=2)
    headless = tmp_path / "headless"
    shutil.copytree(classifier.base, headless)
    AutoModel.from_pretrained(classifier.base).save_pretrained(headless)
    with pytest.raises(UnsupportedModelError, match="size mismatch.*as many choices as it has classes"):
        load_adapter(str(classifier.adapter), str(headless), "cpu", "float32", 2)
    assert load_adapter(str(classifier.adapter), str(headless), "cpu", "float32", 3).head


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda:1': torch sees no GPU; use --device cpu"):
        pick_device("cuda:1")
    with pytest.raises(ValueError, match="device 'gpu', expected auto, cpu, cuda"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").type == "cuda" and pick_device("cuda:1") == torch.device("cuda", 1)


def test_types(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype("float16", cpu) == torch.float16 and pick_dtype("auto", cuda) == torch.bfloat16
    for capabilities, expected in (
        ({}, torch.float32),
        ({"avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert pick_dtype("auto", cpu) == expected
    with pytest.raises(ValueError, match="dtype 'int8', expected auto, float32, bfloat16, float16"):
        pick_dtype("int8", cpu)


def test_what_a_result_depends_on() -> None:
    found = versions()
    assert found["tfb_ext"] == tfb_ext.__version__ and found["torch"] == torch.__version__
    assert set(found) == {"tfb_ext", "python", "torch", "transformers", "peft", "safetensors"}
    assert device_name(torch.device("cpu")).endswith(f"{torch.get_num_threads()} threads")


def test_the_packaged_adapter_is_there() -> None:
    folder = loading.demo_adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and (folder / "adapter_model.safetensors").is_file()
