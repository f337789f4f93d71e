"""Through a layer: the update first or the base first, equal outputs, one pass for layers with one input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tfb_ext

SAMPLES, SIGMA = 4, 0.3


def bayesian(name: str = "llama", device: str = "cpu", **options: Any) -> Any:
    dtype = options.pop("dtype", torch.float32)
    return zoo.compared(tfb_ext.bayesianize(zoo.peft_model(name, dtype=dtype).to(device), sigma=SIGMA, **options))


def predict(adapter: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with adapter.predictive(SAMPLES, keep_samples=True, **options) as view:
        adapter.model(**batch)
    assert view.sample_outputs is not None
    return view.sample_outputs


def passes(adapter: Any, batch: dict[str, Tensor]) -> Tensor:
    """:func:`predict` by the oracle: one pass a sample, its weights written into the model."""

    def call() -> Tensor:
        return torch.log_softmax(adapter.model(**batch).logits.float(), dim=-1)

    return zoo.separate_passes(adapter, list(range(SAMPLES)), SIGMA, call)


# Layers that share an input -------------------------------------------------------------------------------------------


def groups(name: str) -> Any:
    adapter = zoo.compared(bayesian(name))  # in whose first context a sampled forward ran
    return adapter.attached.shared_inputs


def test_groups_are_the_layers_that_share_an_input() -> None:
    block = "model.layers.2."
    llama = groups("llama")
    assert (f"{block}self_attn.q_proj", f"{block}self_attn.k_proj", f"{block}self_attn.v_proj") in llama
    assert (f"{block}mlp.gate_proj", f"{block}mlp.up_proj") in llama and len(llama) == 2 * zoo.BLOCKS
    # Phi-3 has one layer for q, k and v; GPT-2's c_attn and c_fc have inputs of their own.
    assert groups("phi3") == groups("gpt2") == ()
    assert groups("bert")[0] == tuple(f"bert.encoder.layer.0.attention.self.{n}" for n in ("query", "value"))


@pytest.mark.parametrize("mode", ["weight", "flipout", "token"])
@pytest.mark.parametrize("name", zoo.slow_but(["llama", "qwen2", "gemma3", "bert"], "llama", "bert"))
def test_grouped_layers_equal_ungrouped_ones(name: str, mode: str) -> None:
    """The first forward of all reads every layer's input by itself, and learns which are one."""
    adapter, batch = tfb_ext.bayesianize(zoo.peft_model(name), sigma=SIGMA, mode=mode, guard=False), zoo.batch_for(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with zoo.Operators() as single:
            alone = predict(adapter, batch)
        with zoo.Operators() as grouped:
            assert torch.equal(predict(adapter, batch), alone)
    assert grouped.calls.total() < single.calls.total() == len(adapter.layers)


def test_an_input_that_was_changed_in_between_is_read_again() -> None:
    """Layers were seen to share an input; a model that writes into it later must not get the old result."""
    adapter, other = zoo.compared(bayesian("llama", depth=1)), zoo.compared(bayesian("llama", depth=1))
    batch = zoo.batch_for("llama")
    before = predict(adapter, batch)
    first = adapter.anatomy.blocks[-1].self_attn.v_proj

    def double(module: Any, args: tuple[Any, ...]) -> None:
        args[0].mul_(2.0)

    first.register_forward_pre_hook(double)
    changed = predict(adapter, batch)
    other.anatomy.blocks[-1].self_attn.v_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    assert torch.allclose(changed, predict(other, batch), atol=1e-5)
    assert not torch.allclose(changed, before, atol=1e-3)


# The update first, and the base first ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", ["all", 1])
def test_update_first_equals_base_first(depth: Any, dtype: torch.dtype, device: str) -> None:
    adapter = bayesian("qwen2", device, dtype=dtype, depth=depth)  # whose q, k and v have a bias
    batch = zoo.batch_for("qwen2", device=device)
    keep = batch["attention_mask"].bool()
    direct = predict(adapter, batch)[:, keep]
    seen: list[int] = []
    for module in zoo.lora_layers(adapter).values():  # a hook on a base layer has the base run first
        module.get_base_layer().register_forward_pre_hook(lambda *_: seen.append(1))
    slot = predict(adapter, batch)[:, keep]
    assert len(seen) == len(adapter.layers)
    tolerance = 2e-5 if dtype == torch.float32 else 0.15
    assert torch.allclose(direct, slot, atol=tolerance)
    assert (direct[0] - direct[1]).abs().max() > 0.3  # the samples differ by more than that


def test_blocks_below_cost_what_random_ones_cost() -> None:
    """The mean adapter writes its update first too: as many operators below the first random block as in it."""
    with zoo.Operators() as upper:
        predict(bayesian("llama", depth=1), zoo.batch_for("llama"))
    with zoo.Operators() as whole:
        predict(bayesian("llama"), zoo.batch_for("llama"))
    assert upper.calls == whole.calls


def test_float32_adapters_do_not_widen_the_activations() -> None:
    """Under a bfloat16 base PEFT would push every input through float32; no operation of ours and of the blocks does."""
    model = zoo.peft_model("llama", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA, depth=2)
    seen: set[torch.dtype] = set()
    for module in zoo.lora_layers(adapter).values():
        module.register_forward_hook(lambda _, args, out: seen.add(out.dtype))
    with zoo.Operators() as operators:
        predict(adapter, zoo.batch_for("llama"))
    assert operators.dtypes == seen == {torch.bfloat16}


def hook(base: nn.Module, seen: list[int]) -> None:
    base.register_forward_hook(lambda _, args, out: seen.append(1) or out * 1.0)


def pre_hook(base: nn.Module, seen: list[int]) -> None:
    base.register_forward_pre_hook(lambda _, args: seen.append(1))


def own_forward(base: nn.Module, seen: list[int]) -> None:
    original = base.forward
    base.forward = lambda x: seen.append(1) or original(x)


@pytest.mark.parametrize("watch", [hook, pre_hook, own_forward])
def test_what_must_see_the_base_layer_sees_it(watch: Callable[[nn.Module, list[int]], None]) -> None:
    adapter, seen = bayesian("llama"), []
    batch = zoo.batch_for("llama")
    keep = batch["attention_mask"].bool()
    expected = predict(adapter, batch)[:, keep]
    watch(adapter.anatomy.blocks[-1].self_attn.q_proj.base_layer, seen)
    found = predict(adapter, batch)[:, keep]
    assert seen == [1]
    assert torch.allclose(found, expected, atol=2e-5)


def test_hooks_on_the_layer_itself_run() -> None:
    adapter = bayesian("llama")
    batch, seen = zoo.batch_for("llama"), []
    layer = zoo.lora_layers(adapter)[adapter.layers[0]]
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    predict(adapter, batch)
    hook.remove()
    rows, tokens = batch["input_ids"].shape
    assert seen == [(SAMPLES * rows, tokens, 32)]


class Shifted(nn.Linear):
    """Stands for a quantised layer: a subclass of ``nn.Linear`` with arithmetic of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


def test_only_plain_linear_bases_are_replaced() -> None:
    model = zoo.peft_model("llama")
    before = tfb_ext.bayesianize(model, sigma=SIGMA)
    batch = zoo.batch_for("llama")
    keep = batch["attention_mask"].bool()
    plain = predict(before, batch)[:, keep]
    before.unload()
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.__class__ = Shifted
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA)
    found = predict(adapter, batch)[:, keep]
    assert torch.allclose(found.double(), passes(adapter, batch)[:, keep].double(), atol=5e-5)
    assert not torch.allclose(found, plain, atol=0.1)


def test_a_bias_of_lora_counts() -> None:
    model = zoo.peft_model("llama", lora_bias=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data.fill_(0.5)
    adapter, batch = tfb_ext.bayesianize(model, sigma=SIGMA), zoo.batch_for("llama")
    keep = batch["attention_mask"].bool()
    assert torch.allclose(predict(adapter, batch)[:, keep], passes(adapter, batch)[:, keep], atol=5e-5)


def test_autocast_is_the_models_own() -> None:
    adapter, batch = bayesian("llama"), zoo.batch_for("llama")
    keep = batch["attention_mask"].bool()
    exact = predict(adapter, batch)[:, keep]
    with torch.autocast("cpu", torch.bfloat16):
        found, low = predict(adapter, batch)[:, keep], passes(adapter, batch)[:, keep]
    assert (found - exact).abs().max() <= 2 * (low - exact).abs().max()
    assert (found - exact).abs().max() > 1e-3  # it was bfloat16


def test_disable_adapter_inside_is_the_base_model() -> None:
    adapter = bayesian("llama")
    batch = zoo.batch_for("llama")
    with adapter.model.disable_adapter(), torch.no_grad():
        base = torch.log_softmax(adapter.model(**batch).logits, dim=-1)
    with adapter.predictive(SAMPLES), adapter.model.disable_adapter():
        found = adapter.model(**batch).logits
    keep = batch["attention_mask"].bool()
    assert torch.allclose(found[keep], base[keep], atol=1e-5)


def test_forwards_are_put_back() -> None:
    adapter = bayesian("llama", depth=2)
    with adapter.predictive(SAMPLES):
        pass
    assert not any("forward" in m.__dict__ for m in adapter.model.modules())
    with pytest.raises(RuntimeError, match="planned"), adapter.predictive(SAMPLES):
        raise RuntimeError("planned")
    assert not any("forward" in m.__dict__ for m in adapter.model.modules())


def test_a_forward_of_someone_elses_stays() -> None:
    adapter = bayesian("llama")
    layer = zoo.lora_layers(adapter)[adapter.layers[0]]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)
    mine = layer.forward
    batch = zoo.batch_for("llama")
    found = predict(adapter, batch)
    assert layer.forward is mine
    keep = batch["attention_mask"].bool()
    assert torch.allclose(found[:, keep], predict(bayesian("llama"), batch)[:, keep], atol=2e-5)


# Modes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["flipout", "token"])
def test_modes_reach_the_layers(mode: str) -> None:
    """The model with the operators against the model with their definitions in plain torch."""
    adapter = bayesian("llama", mode=mode, depth=3)
    batch = zoo.batch_for("llama")
    keep = batch["attention_mask"].bool()
    found = predict(adapter, batch)[:, keep]
    with zoo.Operators(plain=True):
        assert torch.allclose(found, predict(adapter, batch)[:, keep], atol=1e-4)
    adapter.mode = "weight"
    assert (found - predict(adapter, batch)[:, keep]).abs().max() > 0.1
    assert "mode" not in repr(adapter)


@pytest.mark.parametrize("mode", ["flipout", "token"])
def test_modes_are_saved_and_refused_where_they_do_not_fit(mode: str, tmp_path: Any) -> None:
    adapter = bayesian("llama", mode=mode)
    assert f"mode='{mode}'" in repr(adapter)
    adapter.save_pretrained(tmp_path)
    loaded = tfb_ext.load(zoo.peft_model("llama").get_base_model(), tmp_path)
    assert loaded.mode == mode
    with pytest.raises(ValueError, match=f"samples of mode '{mode}' are no weights"):
        adapter.sample_weights(adapter.layers[0], 0)
    with pytest.raises(ValueError, match="mode is 'rows', expected one of 'weight', 'flipout', 'token'"):
        adapter.mode = "rows"


def test_flipout_does_not_go_on_from_a_cache() -> None:
    adapter, ids = bayesian("llama", mode="flipout"), zoo.batch_for("llama", 1)["input_ids"]
    with (
        pytest.raises(tfb_ext.errors.SamplingError, match="mode 'flipout' numbers its noise by the tokens of one call"),
        adapter.predictive(SAMPLES),
    ):
        adapter.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("depth", ["all", 1])
def test_one_graph_decodes_and_serves_every_seed(depth: Any) -> None:
    """A whole decoding step captured: no host sync, no new memory, and sigma, samples and seed are read by the kernels."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        tf.LlamaForCausalLM(config).to("cuda", torch.bfloat16),
        LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"),
    ).eval()
    zoo.randomise(model, 0.05)
    adapter = tfb_ext.bayesianize(model, sigma=0.05, depth=depth)
    prompt = torch.randint(0, 512, (1, 12), device="cuda")
    cache = tf.StaticCache(config=config, max_cache_len=16)
    name = "cache" if "cache" in tf.LlamaForCausalLM.forward.__code__.co_varnames else "past_key_values"
    arguments = {name: cache, "use_cache": True, "logits_to_keep": 1}
    ids = prompt[:, :1].clone()

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(12)

    with adapter.predictive(SAMPLES) as view:
        model(input_ids=prompt, **arguments)
        for _ in range(2):
            model(input_ids=ids, **arguments)
        rewind()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(input_ids=ids, **arguments).logits
        sigma, samples, seed = view.batch.tensors(ids.device)
        results = []
        for number in (0, 1, 2):
            seed.fill_(number)
            samples.copy_(torch.arange(SAMPLES) + 10 * number)
            rewind()
            graph.replay()
            replayed = captured.clone()
            rewind()
            assert torch.allclose(model(input_ids=ids, **arguments).logits, replayed, atol=1e-3)
            results.append(replayed)
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
