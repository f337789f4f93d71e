"""Attaching, taking off, depth, saving and loading, and every refusal with its sentence."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import tfb_ext
from tfb_ext.adapters.layer import SampledLayer
from tfb_ext.errors import ConfigError, SamplingError, UnsupportedModelError


def snapshot(model: PeftModel) -> dict[str, Any]:
    """Weights, buffers, slots, hooks and instance attributes of every module."""
    named = list(model.named_modules())
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": sorted(name for name, _ in model.named_buffers()),
        "attributes": {name: sorted(module.__dict__) for name, module in named},
        "unsaved": {name: sorted(module._non_persistent_buffers_set) for name, module in named},
        "classes": {name: type(module) for name, module in named},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in named},
        "casts": {name: getattr(module, "cast_input_dtype_enabled", None) for name, module in named},
        "training": {name: module.training for name, module in named},
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    states = first.pop("state"), second.pop("state")
    assert first == second
    assert states[0].keys() == states[1].keys()
    assert all(same(states[0][name], states[1][name]) for name in states[0])


def same(first: Tensor, second: Tensor) -> bool:
    """Equal bit for bit, where NaN equals itself and tensors without data are compared by shape."""
    if first.is_meta or second.is_meta:
        return first.is_meta and second.is_meta and first.shape == second.shape
    return torch.equal(first.nan_to_num(), second.nan_to_num())


def logits(model: PeftModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", zoo.slow_but(zoo.MODELS, "llama", "gpt2", "bert"))
def test_mean_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    model, batch = zoo.peft_model(name, dtype=dtype), zoo.batch_for(name)
    clean, before = snapshot(model), logits(model, batch)
    adapter = tfb_ext.bayesianize(model, sigma=0.3)
    assert torch.equal(logits(model, batch), before)
    assert model.state_dict().keys() == clean["state"].keys()
    attached = snapshot(model)
    with adapter.predictive(2):
        sampled = model(**batch).logits
    assert (sampled - torch.log_softmax(before.float(), -1)).abs().max() > 1e-3
    assert torch.equal(logits(model, batch), before)
    assert_same(attached, snapshot(model))
    assert adapter.unload() is model
    assert torch.equal(logits(model, batch), before)
    assert_same(clean, snapshot(model))


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"layers.2.self_attn.v_proj": 3}},
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
        {"lora_dropout": 0.2},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa"},
        {"r": 40},  # more than any output has features
    ],
    ids=["rslora", "patterns", "lora_bias", "dropout", "olora", "pissa", "r > m"],
)
def test_kinds_of_lora(lora: dict[str, Any]) -> None:
    model = zoo.peft_model("qwen2", **lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data.normal_()
    batch = zoo.batch_for("qwen2")
    keep, before = batch["attention_mask"].bool(), logits(model, batch)
    adapter = tfb_ext.bayesianize(model, sigma=0.2, depth=3)
    assert torch.equal(logits(model, batch), before)

    def call() -> Tensor:
        return torch.log_softmax(model(**batch).logits.double(), dim=-1)

    expected = zoo.average(zoo.separate_passes(adapter, range(3), 0.2, call))
    with adapter.predictive(3):
        sampled = model(**batch).logits
    assert torch.allclose(sampled[keep].double(), expected[keep], atol=1e-4)


def test_mean_can_be_merged_and_unmerged() -> None:
    model, batch = zoo.peft_model("llama"), zoo.batch_for("llama")
    before, adapter = logits(model, batch), tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=0.3)
    for safe in (False, True):
        adapter.model.merge_adapter(safe_merge=safe)
        model.merge_adapter(safe_merge=safe)
        assert torch.equal(logits(adapter.model, batch), logits(model, batch))
        adapter.model.unmerge_adapter()
        model.unmerge_adapter()
        assert torch.allclose(logits(adapter.model, batch), before, atol=1e-4)
    merged = copy.deepcopy(adapter).model.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(**batch).logits, before, atol=1e-4)


def test_layers_and_repr() -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama-head"), depth=1)
    assert len(adapter.layers) == 9 and "lm_head" in adapter.layers
    assert set(adapter.random_layers) == {
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.self_attn.v_proj",
        "lm_head",
    }
    assert "sigma=not searched yet" in repr(adapter) and "3 random of 9 layers" in repr(adapter)
    adapter.sigma = 0.125
    assert "sigma=0.125" in repr(adapter)


@pytest.mark.parametrize(
    ("depth", "first", "kept"),
    [
        ("all", 0, "all"),
        (4, 0, "all"),
        (1, 3, 1),
        (0.5, 2, 2),
        (0.25, 3, 1),
        (0.01, 3, 1),
        (0.75, 1, 3),
        (1.0, 0, "all"),
        ("head", 4, "head"),
    ],
)
def test_depth_counts_from_the_top(depth: Any, first: int, kept: Any) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama-head"), depth=depth)
    assert adapter.first_random_block(depth) == first and adapter.depth == kept


@pytest.mark.parametrize("depth", [0, 5, 1.5, -1, "middle", True, 0.0, None, float("nan")])
def test_bad_depth(depth: Any) -> None:
    model = zoo.peft_model("llama")
    clean = snapshot(model)
    with pytest.raises(ValueError, match=r"depth is .*, expected 1 to 4 blocks from the top, a fraction in \(0, 1\]"):
        tfb_ext.bayesianize(model, depth=depth)
    assert_same(clean, snapshot(model))
    adapter = tfb_ext.bayesianize(model, depth=2)
    with pytest.raises(ValueError, match="depth is"):
        adapter.depth = depth
    assert adapter.depth == 2


def test_depth_above_the_adapter() -> None:
    with pytest.raises(ValueError, match=r"no layer that high \(its highest is in block 3 of 4\); use depth=1 or more"):
        tfb_ext.bayesianize(zoo.peft_model("llama"), depth="head")
    model = zoo.peft_model("llama", layers_to_transform=[0, 1])
    with pytest.raises(ValueError, match=r"no layer that high \(its highest is in block 1 of 4\); use depth=3 or more"):
        tfb_ext.bayesianize(model, depth=2)
    assert tfb_ext.bayesianize(model, depth=3).random_layers[0].startswith("model.layers.1.")


@pytest.mark.parametrize("sigma", [0, -1, float("nan"), float("inf"), True, "x", 0.0])
def test_bad_sigma(sigma: Any) -> None:
    model = zoo.peft_model("llama")
    clean = snapshot(model)
    with pytest.raises(ValueError, match="sigma is .*, expected a finite number above 0"):
        tfb_ext.bayesianize(model, sigma=sigma)
    assert_same(clean, snapshot(model))
    adapter = tfb_ext.bayesianize(model, sigma=0.5)
    with pytest.raises(ValueError, match="expected a finite number above 0"):
        adapter.sigma = sigma
    with pytest.raises(ValueError, match="expected a finite number above 0"):
        with adapter.predictive(2, sigma=sigma):
            pass
    assert adapter.sigma == 0.5


def test_missing_sigma() -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"))
    with pytest.raises(ValueError, match="'default' has no sigma yet; run tfb_ext.search_sigma.*or pass sigma="):
        with adapter.predictive(2):
            pass
    with pytest.raises(ValueError, match="sigma is an empty list"):
        adapter.batch(2, [])


@pytest.mark.parametrize("samples", [0, [], -1, True, 2.5, "ten", [0, -1], [1.0], [True], [2**31]])
def test_bad_samples(samples: Any) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=0.3)
    for context in (adapter.predictive, adapter.sampling):
        with pytest.raises(ValueError, match="samples is .*, expected a count of at least 1 or"):
            with context(samples):
                pass


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "0"])
def test_bad_seed(seed: Any) -> None:
    model = zoo.peft_model("llama")
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*64\)"):
        tfb_ext.bayesianize(model, seed=seed)
    adapter = tfb_ext.bayesianize(model, sigma=0.3)
    adapter.seed = seed
    with pytest.raises(ValueError, match="seed must be an integer"):
        with adapter.predictive(2):
            pass


# Models and adapters that are refused ---------------------------------------------------------------------------------


def small_llama() -> tf.LlamaForCausalLM:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**zoo._COMMON))


def refused(model: Any, words: str, **options: Any) -> None:
    clean = snapshot(model) if isinstance(model, PeftModel) else None
    with pytest.raises(UnsupportedModelError, match=words):
        tfb_ext.bayesianize(model, **options)
    if clean is not None:
        assert_same(clean, snapshot(model))


def lora_on(model: Any, targets: list[str], **options: Any) -> PeftModel:
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": targets, **options}))
    zoo.randomise(peft)
    return peft.eval()


def test_not_a_peft_model() -> None:
    refused(small_llama(), "expected a peft.PeftModel, got LlamaForCausalLM; load the adapter with PeftModel")


def test_unknown_adapter() -> None:
    refused(zoo.peft_model("llama"), r"no adapter 'mine' in the model; it has \['default'\]", adapter="mine")


def test_ia3() -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    refused(get_peft_model(small_llama(), config), "'default' is of type IA3; only LORA")


def test_dora() -> None:
    model = lora_on(small_llama(), ["q_proj"], use_dora=True)
    refused(model, r"layer 'model.layers.0.self_attn.q_proj' \(Linear\).*DoraLinearVariant.*only plain LoRA")


def test_embedding_target() -> None:
    model = lora_on(small_llama(), ["q_proj", "embed_tokens"])
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            parameter.data.normal_()
    refused(
        model, r"layer 'model.embed_tokens' \(Embedding\): this kind of LoRA layer is not supported.*target_modules"
    )


def test_expert_parameters() -> None:
    model, _ = zoo.MODELS["mixtral"]()
    peft = lora_on(model, ["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    refused(peft, r"\(ParamWrapper\): this kind of LoRA layer is not supported")


def test_subclass_of_a_known_layer() -> None:
    model = zoo.peft_model("llama")
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    layer.__class__ = type("Altered", (type(layer),), {})
    refused(model, r"layer 'model.layers.1.self_attn.v_proj' \(Altered\): this kind of LoRA layer is not supported")


def test_merged_adapter() -> None:
    model = zoo.peft_model("llama")
    model.merge_adapter()
    refused(model, r"adapters \['default'\] are merged into the weights; call unmerge_adapter\(\) first")


def test_untrained_adapter() -> None:
    model = get_peft_model(small_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    refused(model, "layer 'model.layers.0.self_attn.q_proj': lora_B is all zero.*train the adapter first")


def test_damaged_adapter() -> None:
    model = zoo.peft_model("llama")
    model.base_model.model.model.layers[2].mlp.up_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    refused(model, "layer 'model.layers.2.mlp.up_proj': lora_B holds NaN or infinite values")


def test_offloaded_adapter() -> None:
    model = zoo.peft_model("llama")
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.to("meta")
    refused(model, "'model.layers.0.self_attn.q_proj': its adapter weights are on the meta device.*before dispatching")


def test_encoder_decoder() -> None:
    config = tf.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = lora_on(tf.T5ForConditionalGeneration(config), ["q", "v"], task_type="SEQ_2_SEQ_LM")
    refused(model, "T5ForConditionalGeneration is an encoder-decoder model.*use a decoder-only or encoder-only model")


def test_twice_on_one_adapter() -> None:
    model = zoo.peft_model("llama")
    adapter = tfb_ext.bayesianize(model)
    refused(model, r"'default' is Bayesian already; call unload\(\) on its BayesianAdapter first")
    adapter.unload()
    tfb_ext.bayesianize(model)


def test_a_forward_that_was_replaced_before_is_refused() -> None:
    model = zoo.peft_model("llama")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    original = layer.forward
    layer.forward = lambda x: original(x)
    refused(model, "its forward was replaced, and would not sample; call tfb_ext.bayesianize before replacing it")


def test_a_layer_with_a_posterior_is_pefts_with_a_forward_of_its_own() -> None:
    model = zoo.peft_model("llama")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    plain = type(layer)
    adapter = tfb_ext.bayesianize(model)
    assert isinstance(layer, SampledLayer) and isinstance(layer, plain) and repr(layer).startswith("lora.Linear(")
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is plain and sorted(vars(copied)) == sorted(
            vars(zoo.peft_model("llama").base_model.model.model.layers[0].self_attn.q_proj)
        )
        assert not any(name.startswith("tfb_") for name, _ in copied.named_buffers())
    adapter.unload()
    assert type(layer) is plain


# Files ----------------------------------------------------------------------------------------------------------------


def predictive(adapter: Any) -> Tensor:
    batch = zoo.batch_for("llama-head")
    with adapter.predictive(4):
        return adapter.model(**batch).logits[batch["attention_mask"].bool()]


def fresh_base(seed: int = 0) -> Any:
    """The base model that ``zoo.peft_model("llama-head", seed)`` has built on."""
    return zoo.peft_model("llama-head", seed=seed).unload()


@pytest.mark.slow
def test_save_and_load(tmp_path: Path) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama-head"), sigma=0.37, seed=2**63 + 5, depth=3, antithetic=False)
    adapter.search = {"reason": "by hand", "evaluations": [[0.1, 0.5]]}
    place = adapter.save_pretrained(tmp_path / "saved")
    assert place == tmp_path / "saved"
    assert {p.name for p in place.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "tfb_config.json"}
    assert not [p for p in place.iterdir() if p.name.startswith(".")]
    assert not [p for p in place.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    loaded = tfb_ext.load(fresh_base(), place)
    for field in ("sigma", "seed", "depth", "antithetic", "layers", "search", "name"):
        assert getattr(loaded, field) == getattr(adapter, field)
    assert torch.equal(predictive(loaded), predictive(adapter))
    plain = PeftModel.from_pretrained(fresh_base(), place)  # a PEFT adapter like any other
    batch = zoo.batch_for("llama-head")
    assert torch.equal(logits(plain.eval(), batch), logits(adapter.model, batch))


def test_retrained_weights_do_not_take_the_old_sigma(tmp_path: Path) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=0.1)
    adapter.save_pretrained(tmp_path)
    other = zoo.peft_model("llama")
    zoo.randomise(other, 0.3)
    with pytest.raises(ConfigError, match="sigma was chosen for other weights than those of adapter 'default'"):
        tfb_ext.load(other, tmp_path)
    assert not any(isinstance(m, SampledLayer) for m in other.modules())
    config = tmp_path / "tfb_config.json"
    config.write_text(config.read_text().replace(f'"{adapter.fingerprint()}"', "null"))
    assert tfb_ext.load(other, tmp_path).sigma == 0.1


def test_an_inactive_adapter_stays_inactive() -> None:
    model = zoo.peft_model("llama")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    zoo.randomise(model)
    model.set_adapter("other")
    clean = snapshot(model)
    adapter = tfb_ext.bayesianize(model, "default")
    assert model.active_adapter == "other"
    assert_same(clean, snapshot(adapter.unload()))


def test_save_and_load_beside_another_adapter(tmp_path: Path) -> None:
    model = zoo.peft_model("llama-head")
    model.add_adapter("mine", LoraConfig(r=3, target_modules=["v_proj", "lm_head"], task_type="CAUSAL_LM"))
    zoo.randomise(model)
    model.set_adapter("mine")
    adapter = tfb_ext.bayesianize(model.eval(), adapter="mine", sigma=0.2)
    place = adapter.save_pretrained(tmp_path)
    assert place == tmp_path / "mine" and (place / "tfb_config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    other = zoo.peft_model("llama-head")
    loaded = tfb_ext.load(other, place, adapter="again")
    with pytest.raises(SamplingError, match="'again' is not active"):
        predictive(loaded)
    other.set_adapter("again")
    assert torch.equal(predictive(loaded.model and loaded), predictive(adapter))


def test_saving_keeps_what_people_wrote(tmp_path: Path) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama-head"), sigma=0.2)
    adapter.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nTrained on my own notes.\n")
    (tmp_path / "notes.txt").write_text("mine")
    adapter.save_pretrained(tmp_path)
    assert "Trained on my own notes." in card.read_text()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_config_of_another_adapter(tmp_path: Path) -> None:
    tfb_ext.bayesianize(zoo.peft_model("llama-head"), sigma=0.2).save_pretrained(tmp_path)
    other = zoo.peft_model("llama")
    clean = snapshot(other)
    with pytest.raises(ConfigError, match=r"belongs to another adapter: of its layers \['lm_head'\] are not here.*mlp"):
        tfb_ext.load(other, tmp_path)
    assert_same(clean, snapshot(other))


def test_config_with_a_depth_the_model_does_not_have(tmp_path: Path) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama-head"), sigma=0.2, depth=3)
    path = adapter.save_pretrained(tmp_path) / "tfb_config.json"
    path.write_text(path.read_text().replace('"depth": 3', '"depth": 99'))
    adapter.unload()
    clean = snapshot(adapter.model)
    with pytest.raises(ConfigError, match="tfb_config.json: depth is 99, expected 1 to 4"):
        tfb_ext.load(adapter.model, tmp_path)
    assert_same(clean, snapshot(adapter.model))


def test_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama-head"), sigma=0.2)
    adapter.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    zoo.lora_layers(adapter)["lm_head"].lora_A["default"].weight.data.zero_()
    adapter.refresh()
    adapter.sigma = 0.5

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        adapter.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_sample_weights_of_an_unknown_layer() -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=0.3)
    with pytest.raises(ValueError, match="no Bayesian layer 'lm_head' in adapter 'default'; see adapter.layers"):
        adapter.sample_weights("lm_head", 0)
