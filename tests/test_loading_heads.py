"""What lies in an adapter's folder is what is loaded: its head, its tokenizer, its added tokens; or it is refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_folders
import torch
import zoo
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from small_folders import Folders
from transformers import AutoModelForCausalLM, AutoTokenizer

import tfb_ext
from tfb_ext.app.loading import load_adapter
from tfb_ext.errors import UnsupportedModelError

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
HERE = ("cpu", "float32")


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def edited(source: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(source, target)
    path = target / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


# Heads ----------------------------------------------------------------------------------------------------------------


def auto_mapped(folders: Folders, target: Path) -> Path:
    """The classifier's adapter as PEFT saves one that was given no ``task_type``: the class of its base model instead."""
    model = zoo.peft_model("llama-cls", task_type=None, modules_to_save=["score"])
    model.base_model.model.score.modules_to_save["default"].weight.data.mul_(3)
    model.peft_config["default"].base_model_name_or_path = str(folders.base)
    model.save_pretrained(target)
    assert json.loads((target / "adapter_config.json").read_text())["task_type"] is None
    return target


def test_a_classifier_without_a_task_type_keeps_its_head(classifier: Folders, tmp_path: Path) -> None:
    folder = auto_mapped(classifier, tmp_path / "adapter")
    loaded = load_adapter(str(folder), None, *HERE)
    assert loaded.head
    expected = logits(AutoPeftModel.from_pretrained(folder).eval())
    assert expected.shape == (2, 3) and torch.equal(logits(loaded.model), expected)


def test_a_head_that_the_model_does_not_take_is_refused(classifier: Folders, llama: Folders, tmp_path: Path) -> None:
    folder = auto_mapped(classifier, tmp_path / "adapter")
    for name, config in (("lm", {"task_type": "CAUSAL_LM"}), ("none", {"auto_mapping": None})):
        with pytest.raises(UnsupportedModelError, match=r"score.* for a classifier|does not take, such as .*score"):
            load_adapter(str(edited(folder, tmp_path / name, **config)), str(llama.base), *HERE)


def test_a_head_that_is_missing_in_the_file_is_refused(classifier: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = auto_mapped(classifier, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if "score" not in n}, path, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="lacks tensors that its configuration asks for, such as .*score"):
        load_adapter(str(folder), None, *HERE)


@pytest.mark.parametrize(
    "mapping",
    [
        {
            "base_model_class": "LlamaForTokenClassification",
            "parent_library": "transformers.models.llama.modeling_llama",
        },
        {"base_model_class": "LlamaForCausalLM", "parent_library": "os"},
        {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers_of_mine.llama"},
        {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.gone"},
        {"base_model_class": "LlamaForCausalLM"},
        {"base_model_class": ["LlamaForCausalLM"], "parent_library": "transformers"},
        {"base_model_class": "system", "parent_library": "os"},
    ],
)
def test_mappings_that_are_not_served(mapping: Any, llama: Folders, tmp_path: Path) -> None:
    folder = edited(llama.adapter, tmp_path / "adapter", task_type=None, auto_mapping=mapping)
    with pytest.raises((UnsupportedModelError, ImportError), match="auto_mapping|transformers.models.gone"):
        load_adapter(str(folder), None, *HERE)


# Configurations -------------------------------------------------------------------------------------------------------

FOREIGN: list[dict[str, Any]] = [
    {"peft_type": "NOVEL"}, {"peft_type": None}, {"peft_type": 3}, {"peft_type": "IA3"}, {"r": 0}, {"r": -4}, {"r": "8"}, {"r": 2.5},
    {"r": None}, {"r": True}, {"r": 10**12}, {"lora_alpha": "16"}, {"lora_alpha": None}, {"lora_alpha": float("nan")},
    {"target_modules": 7}, {"target_modules": [1, 2]}, {"target_modules": {"a": 1}}, {"target_modules": "("}, {"target_modules": []},
    {"target_modules": ["nothing"]}, {"modules_to_save": 5}, {"modules_to_save": [3]}, {"rank_pattern": [1]},
    {"rank_pattern": {"q_proj": 0}}, {"alpha_pattern": {"q_proj": "x"}}, {"base_model_name_or_path": 5}, {"task_type": 5},
    {"task_type": ["CAUSAL_LM"]}, {"bias": "some"}, {"layers_to_transform": "x"}, {"lora_dropout": "x"}, {"use_dora": True},
    {"r": 3}, {"auto_mapping": "x", "task_type": None}, {"layers_pattern": 4, "layers_to_transform": [0]}, {"init_lora_weights": "x"},
]  # fmt: skip


@pytest.mark.parametrize("config", FOREIGN, ids=str)
def test_foreign_configurations_are_a_sentence(config: dict[str, Any], llama: Folders, tmp_path: Path) -> None:
    folder = edited(llama.adapter, tmp_path / "adapter", **config)
    with pytest.raises((UnsupportedModelError, ValueError)) as error:
        tfb_ext.bayesianize(load_adapter(str(folder), str(llama.base), *HERE).model)
    assert not isinstance(error.value, TypeError) and len(str(error.value).splitlines()) == 1, error.value


# Tokenizers and added tokens ------------------------------------------------------------------------------------------


def with_tokens(folders: Folders, target: Path, kind: str) -> tuple[Path, torch.Tensor]:
    """An adapter trained with two added tokens, its tokenizer beside it; and the logits it was trained to."""
    tokenizer = small_folders.tokenizer()
    tokenizer.add_tokens([f"<new{n}>" for n in range(zoo.VOCAB)])  # more than the base model has rows
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(folders.base)
    base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64 if kind == "padded" else None)
    options: dict[str, Callable[[], dict[str, Any]]] = {
        "embeddings saved": dict,
        "padded": dict,
        "modules to save": lambda: {"modules_to_save": ["embed_tokens", "lm_head"]},
        "trainable tokens": lambda: {"trainable_token_indices": {"embed_tokens": list(range(97, len(tokenizer)))}},
    }
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options[kind]())
    model = get_peft_model(base, config).eval()
    zoo.randomise(model)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.normal_()
    model.peft_config["default"].base_model_name_or_path = str(folders.base)
    model.save_pretrained(target, save_embedding_layers=True if kind in ("embeddings saved", "padded") else "auto")
    tokenizer.save_pretrained(target)
    return target, logits(model, torch.tensor([[5, 99, 101]]))


@pytest.mark.parametrize("kind", ["embeddings saved", "padded", "modules to save", "trainable tokens"])
def test_added_tokens_come_with_the_adapter(kind: str, llama: Folders, tmp_path: Path) -> None:
    folder, expected = with_tokens(llama, tmp_path / "adapter", kind)
    loaded = load_adapter(str(folder), None, *HERE)
    assert loaded.own_tokenizer and len(loaded.tokenizer) == small_folders.tokenizer().vocab_size + zoo.VOCAB
    assert loaded.tokenizer("<new3>")["input_ids"] == AutoTokenizer.from_pretrained(folder)("<new3>")["input_ids"]
    found = logits(loaded.model, torch.tensor([[5, 99, 101]]))
    shown = slice(None) if kind != "trainable tokens" else slice(97)  # the head's new rows are not saved by PEFT either
    assert torch.equal(found[..., shown], expected[..., shown])
    if kind != "padded":  # which PEFT itself cannot load
        peft = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(logits(peft, torch.tensor([[5, 99, 101]]))[..., shown], found[..., shown])


def test_trainable_tokens_without_their_tokenizer_are_refused(llama: Folders, tmp_path: Path) -> None:
    folder, _ = with_tokens(llama, tmp_path / "adapter", "trainable tokens")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UnsupportedModelError, match="put the tokenizer it was trained with into its folder"):
        load_adapter(str(folder), None, *HERE)


def test_a_tokenizer_of_its_own_without_new_tokens(llama: Folders, tmp_path: Path) -> None:
    folder = edited(llama.adapter, tmp_path / "adapter")
    own = small_folders.tokenizer()
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(folder)
    loaded = load_adapter(str(folder), None, *HERE)
    assert loaded.tokenizer.chat_template == own.chat_template
    assert loaded.model.get_base_model().get_input_embeddings().weight.shape[0] == zoo.VOCAB
    assert torch.equal(logits(loaded.model), logits(load_adapter(str(llama.adapter), None, *HERE).model))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises((UnsupportedModelError, OSError, ValueError)):
        load_adapter(str(folder), None, *HERE)


def test_damaged_base_models_are_a_sentence(llama: Folders, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama.base, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises((UnsupportedModelError, OSError), match="base"):
        load_adapter(str(llama.adapter), str(base), *HERE)
    (base / "config.json").write_text("[" * 100_000)
    with pytest.raises((UnsupportedModelError, OSError, ValueError)):
        load_adapter(str(llama.adapter), str(base), *HERE)
