"""A layer with a posterior is PEFT's own to everyone else: kept methods, copies, conversions, wrappers, other libraries' hooks."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

import tfb_ext
from tfb_ext.errors import ConfigError, GuardError, SamplingError, UnsupportedModelError

SIGMA = 0.3


def first(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def bayesian(name: str = "llama", **options: Any) -> Any:
    return tfb_ext.bayesianize(zoo.peft_model(name), sigma=SIGMA, **options)


def outputs(adapter: Any, **options: Any) -> Tensor:
    batch = zoo.batch_for("llama")
    with adapter.predictive(3, keep_samples=True, **options) as view:
        adapter.model(**batch)
    found: Tensor = view.sample_outputs[:, batch["attention_mask"].bool()]
    return found


def mean(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**zoo.batch_for("llama")).logits
    return logits


def wrapped(layer: Any) -> Callable[..., Any]:
    return functools.partial(lambda forward, *args, **kwargs: forward(*args, **kwargs), layer.forward)


@pytest.mark.parametrize("how", ["unload", "copy"])
def test_a_kept_forward_outlives_the_posterior(how: str) -> None:
    adapter = bayesian()
    plain = mean(adapter.model)
    first(adapter.model).forward = wrapped(first(adapter.model))
    model = adapter.unload() if how == "unload" else copy.deepcopy(adapter.model)
    assert torch.equal(mean(model), plain)


def test_a_layer_wrapped_afterwards_samples_and_can_be_refreshed() -> None:
    adapter = bayesian()
    expected = outputs(adapter)
    first(adapter.model).forward = wrapped(first(adapter.model))
    assert torch.equal(outputs(adapter), expected)
    adapter.refresh()
    assert torch.equal(outputs(adapter), expected)


def test_a_forward_that_passes_the_posterior_over_is_refused() -> None:
    adapter = bayesian()
    outputs(adapter)
    layer = first(adapter.model)
    layer.forward = lambda x: LoraLinear.forward(layer, x)
    with pytest.raises(GuardError, match="q_proj' never asked its posterior; was its forward replaced"):
        outputs(adapter)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["deepcopy", "pickle"])
def test_a_copy_is_this_posterior(copied: Callable[[Any], Any], tmp_path: Path) -> None:
    adapter = bayesian(depth=2)
    adapter.note = "mine"
    expected = outputs(adapter)
    assert torch.equal(outputs(copied(adapter)), expected) and copied(adapter).note == "mine"
    adapter.refresh()
    with pytest.raises(ConfigError):
        copied(adapter).save_pretrained(tmp_path)  # as uncertified as the original
    zoo.randomise(adapter.model, 0.3)
    with pytest.raises(SamplingError, match="are not those"):
        outputs(copied(adapter))
    adapter.unload()
    with pytest.raises(SamplingError, match="was unloaded"):
        outputs(copied(adapter))


def test_copies_of_merged_and_of_shallow() -> None:
    adapter = bayesian()
    expected = outputs(adapter)
    assert torch.equal(outputs(copy.copy(adapter)), expected)
    adapter.model.merge_adapter()
    merged = copy.deepcopy(adapter)
    merged.model.unmerge_adapter()
    assert (outputs(merged) - expected).abs().max() < 0.05  # unmerging rounds the base's weights


def test_another_kind_of_adapter_under_the_same_name_is_noticed() -> None:
    adapter = bayesian()
    model = adapter.model
    state = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    model.delete_adapter("default")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=zoo._ALL_LINEAR, use_dora=True)
    model.add_adapter("default", config)
    model.set_adapter("default")
    model.load_state_dict(state, strict=False)
    model.eval()
    with pytest.raises(SamplingError, match="Fix: "):
        outputs(adapter)


def test_an_input_written_in_place_under_inference_mode() -> None:
    model = zoo.peft_model("llama")
    for block in model.base_model.model.model.layers:
        block.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0].mul_(1.5), None)[1])
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA)
    with torch.inference_mode():
        found = outputs(adapter)
    assert torch.allclose(found, outputs(adapter), atol=1e-5)


def test_a_context_after_unload_leaves_nothing() -> None:
    adapter = bayesian()
    adapter.unload()
    view = tfb_ext.forward.fold.Predictive(adapter.batch(2))
    with pytest.raises((SamplingError, UnsupportedModelError)), adapter.fanned_at(0, view):
        pass
    assert not any("tfb_open" in vars(module) for module in adapter.model.modules())


@pytest.mark.parametrize("where", ["base", "head"])
@pytest.mark.parametrize("name", ["llama", "llama-head"])
def test_hooks_on_the_head_count_for_columns(name: str, where: str) -> None:
    adapter, batch, columns = bayesian(name), zoo.batch_for(name), torch.tensor([3, 50, 7])
    head = adapter.anatomy.head
    target = getattr(head, "base_layer", head) if where == "base" else head
    target.register_forward_hook(lambda module, args, output: output * 2)
    keep = batch["attention_mask"].bool()
    with adapter.sampling([0]):
        alone = adapter.model(**batch).logits.index_select(-1, columns).log_softmax(-1)[keep]
    with adapter.predictive([0], columns=columns):
        assert torch.allclose(adapter.model(**batch).logits[keep], alone, atol=1e-5)


def test_a_conversion_there_and_back_rounds_nothing() -> None:
    """Weights that bfloat16 holds are the same afterwards, the posterior's mean is not among them."""
    adapter = bayesian()
    for parameter in adapter.model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    adapter.refresh()
    before = {name: value.clone() for name, value in adapter.model.named_buffers() if "tfb_" in name}
    adapter.model.bfloat16()
    adapter.model.float()
    outputs(adapter)
    after = dict(adapter.model.named_buffers())
    assert before and all(torch.equal(after[name], value) for name, value in before.items())


def test_hooks_of_accelerate_can_go_after_the_posterior() -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    adapter = bayesian()
    plain = mean(adapter.model)
    accelerate.cpu_offload(adapter.model, execution_device=torch.device("cpu"))
    model = adapter.unload()
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(mean(model), plain)


def test_outputs_that_a_hook_keeps_stay_the_base_layers() -> None:
    adapter, kept = bayesian(), []
    base = first(adapter.model).base_layer
    base.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    outputs(adapter)
    assert kept and all(torch.equal(now, then) for now, then in kept)
