"""What changes behind a posterior's back is noticed, and what a context changes is undone: weights, layers, caches, threads, copies."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import DynamicCache, StaticCache

import tfb_ext
from tfb_ext.errors import ConfigError, SamplingError, TFBError
from tfb_ext.forward.caches import cache_argument

SIGMA, SAMPLES = 0.3, 3
bayesian = partial(zoo.bayesian, sigma=SIGMA)


def logs(adapter: Any, given: dict[str, Tensor]) -> Tensor:
    return torch.log_softmax(adapter.model(**given).logits, dim=-1)


def assert_right(adapter: Any, given: dict[str, Tensor] | None = None) -> None:
    given = zoo.inputs() if given is None else given
    with adapter.predictive(SAMPLES):
        found = adapter.model(**given).logits
    apart = zoo.separate_passes(adapter, list(range(SAMPLES)), SIGMA, lambda: logs(adapter, given))
    assert torch.allclose(found, zoo.average(apart), atol=1e-4)


# Weights ------------------------------------------------------------------------------------------------------------


def layer_of(adapter: Any) -> Any:
    return adapter.anatomy.blocks[2].self_attn.v_proj


def train(adapter: Any, folder: Path) -> None:
    part = layer_of(adapter).lora_B["default"].weight
    part.requires_grad_(True)
    optimiser = torch.optim.SGD([part], lr=1e-3)
    adapter.model(**zoo.inputs()).logits.square().mean().backward()
    optimiser.step()


def load_over(adapter: Any, folder: Path) -> None:
    zoo.peft_model("llama", seed=5).save_pretrained(folder)
    adapter.model.load_adapter(str(folder), "default")
    adapter.model.eval()


def swap(adapter: Any, folder: Path) -> None:
    zoo.peft_model("llama", seed=5).save_pretrained(folder)
    hotswap_adapter(adapter.model, str(folder), "default")


def load_state(adapter: Any, folder: Path) -> None:
    adapter.model.load_state_dict(zoo.peft_model("llama", seed=5).state_dict(), strict=False)


def swap_rows(adapter: Any, folder: Path) -> None:
    layer_of(adapter).lora_A["default"].weight.data[[0, 1]] = layer_of(adapter).lora_A["default"].weight.data[[1, 0]]


def new_data(adapter: Any, folder: Path) -> None:
    part = layer_of(adapter).lora_A["default"].weight
    part.data = part.data * 1.1


def one_entry(adapter: Any, folder: Path) -> None:
    layer_of(adapter).lora_A["default"].weight.data[1, 3] += 0.05


def negate(adapter: Any, folder: Path) -> None:
    layer_of(adapter).lora_B["default"].weight.data.neg_()


CHANGES: dict[str, Callable[[Any, Path], None]] = {
    f.__name__: f for f in (train, load_over, swap, load_state, swap_rows, new_data, one_entry, negate)
}


@pytest.mark.parametrize("how", CHANGES)
def test_changed_weights_are_noticed_and_refreshed(how: str, tmp_path: Path) -> None:
    adapter = bayesian()
    assert_right(adapter)
    adapter.save_pretrained(tmp_path / "before")
    CHANGES[how](adapter, tmp_path / "other")
    words = "weights of adapter 'default' are not those.*adapter.refresh\\(\\)"
    if how == "load_over":  # PEFT may make new layers for it
        words = "refresh\\(\\)|bayesianize"
    for context in (adapter.predictive, adapter.sampling):
        with pytest.raises(SamplingError, match=words):
            with context(SAMPLES):
                pass
    encoded = [zoo.inputs()]
    with pytest.raises(SamplingError, match=words):
        tfb_ext.search_sigma(adapter, encoded, progress=False)
    with pytest.raises(SamplingError, match=words):
        tfb_ext.generate(adapter, zoo.prompt(), samples=2, max_new_tokens=2)
    with pytest.raises(TFBError):
        adapter.save_pretrained(tmp_path / "after")
    assert not (tmp_path / "after").exists()
    if "bayesianize" in words and "default" not in getattr(layer_of(adapter), "tfb_updates", {}):
        adapter.unload()
        adapter = tfb_ext.bayesianize(adapter.model, sigma=SIGMA)
    else:
        adapter.refresh()
        # Sigma was found for other weights: it can be used, and is not certified.
        with pytest.raises(ConfigError, match="sigma = 0.3 was set for other weights"):
            adapter.save_pretrained(tmp_path / "after")
        assert not (tmp_path / "after").exists()
    assert_right(adapter)
    adapter.sigma = SIGMA
    saved = adapter.save_pretrained(tmp_path / "after")
    first = json.loads((tmp_path / "before" / "tfb_config.json").read_text())
    assert json.loads((saved / "tfb_config.json").read_text())["fingerprint"] != first["fingerprint"]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 27), st.booleans(), st.integers(0, 3), st.integers(0, 31), st.sampled_from([0.02, -0.5, 3.0]))
def test_any_entry_counts(layer: int, upper: bool, i: int, j: int, change: float) -> None:
    adapter = SHARED[0] if SHARED else SHARED.append(bayesian()) or SHARED[0]
    module = zoo.lora_layers(adapter)[adapter.layers[layer]]
    weight = (module.lora_B if upper else module.lora_A)["default"].weight
    place = (j % weight.shape[0], i) if upper else (i, j % weight.shape[1])
    before = float(weight[place])
    weight.data[place] += change
    try:
        with pytest.raises(SamplingError, match="refresh"):
            with adapter.predictive(2):
                pass
    finally:
        weight.data[place] = before
    with adapter.predictive(2):
        pass


SHARED: list[Any] = []


def test_moving_and_copying_weights_is_no_change() -> None:
    adapter = bayesian()
    with torch.no_grad():
        for module in zoo.lora_layers(adapter).values():
            for part in (module.lora_A, module.lora_B):
                part["default"].weight = torch.nn.Parameter(part["default"].weight.clone())
    adapter.model.load_state_dict(copy.deepcopy(adapter.model.state_dict()))
    assert_right(adapter)
    assert_right(copy.deepcopy(adapter))
    with torch.autocast("cpu", torch.bfloat16), adapter.predictive(2):
        pass


def test_a_file_certifies_the_scaling_that_sigma_was_set_for(tmp_path: Path) -> None:
    adapter = bayesian()
    for module in zoo.lora_layers(adapter).values():
        module.scaling["default"] *= 2
    assert_right(adapter)  # which the samples follow
    with pytest.raises(ConfigError, match="or another LoRA scaling"):
        adapter.save_pretrained(tmp_path / "saved")
    adapter.sigma = SIGMA
    adapter.save_pretrained(tmp_path / "saved")


def test_refresh_leaves_the_old_posterior_where_the_new_weights_cannot_carry_one() -> None:
    adapter = bayesian()
    weight = layer_of(adapter).lora_B["default"].weight
    kept = weight.data.clone()
    weight.data.zero_()
    with pytest.raises(TFBError, match="all zero"):
        adapter.refresh()
    weight.data.copy_(kept)
    assert_right(adapter)
    with adapter.predictive(2), pytest.raises(SamplingError, match="refresh\\(\\) inside"):
        adapter.refresh()


# Layers and switches ------------------------------------------------------------------------------------------------


def second(adapter: Any) -> Any:
    adapter.model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    return adapter.model


def merge_one(adapter: Any) -> Callable[[], None]:
    layer_of(adapter).merge()
    return layer_of(adapter).unmerge


def other_active(adapter: Any) -> Callable[[], None]:
    second(adapter)
    layer_of(adapter).set_adapter("second")
    return lambda: layer_of(adapter).set_adapter("default")


def one_off(adapter: Any) -> Callable[[], None]:
    layer_of(adapter).enable_adapters(False)
    return lambda: layer_of(adapter).enable_adapters(True)


@pytest.mark.parametrize("how", [merge_one, other_active, one_off])
@pytest.mark.parametrize("context", zoo.slow_but(["predictive", "sampling"], "predictive"))
def test_one_layer_that_would_not_sample_is_noticed(how: Callable[[Any], Callable[[], None]], context: str) -> None:
    adapter = zoo.compared(bayesian())
    given = zoo.inputs(padded=False)
    undo = how(adapter)
    with getattr(adapter, context)(1), pytest.raises(SamplingError, match="layer 'model.layers.2|some of its layers"):
        adapter.model(**given)
    with pytest.raises(SamplingError):
        tfb_ext.predict(adapter, [given], samples=0)
    undo()
    assert_right(adapter, given)


def unloaded(adapter: Any) -> None:
    adapter.model.unload()


def merged_away(adapter: Any) -> None:
    adapter.model.merge_and_unload()


def deleted(adapter: Any) -> None:
    second(adapter).delete_adapter("default")


def replaced(adapter: Any) -> None:
    adapter.anatomy.blocks[2].self_attn.v_proj = copy.deepcopy(layer_of(adapter))


@pytest.mark.parametrize("how", [unloaded, merged_away, deleted, replaced])
def test_a_posterior_whose_layers_are_gone_says_so_and_locks_nothing(how: Callable[[Any], None]) -> None:
    adapter = bayesian()
    model = adapter.model
    how(adapter)
    for _ in range(2):
        for context in (adapter.predictive, adapter.sampling):
            with pytest.raises(SamplingError, match="Fix:.*bayesianize"):
                with context(2):
                    pass
    if how is deleted:
        model.set_adapter("second")
        zoo.randomise(model)
        assert_right(tfb_ext.bayesianize(model, "second", sigma=SIGMA))
    adapter.unload()


def test_an_exception_while_a_context_opens_locks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = zoo.compared(bayesian("gemma2"))
    before = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
        for name, m in adapter.model.named_modules()
    }
    places = [
        (adapter.anatomy.blocks[3], "register_forward_pre_hook"),
        (adapter.anatomy.head, "register_forward_hook"),
        (adapter.anatomy.model, "register_forward_hook"),
        (adapter.model, "register_forward_pre_hook"),
    ]
    for module, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                with adapter.predictive(2):
                    pass
        after = {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for n, m in adapter.model.named_modules()
        }
        assert after == before
    assert adapter.anatomy.model.config.final_logit_softcapping == 3.0
    with adapter.predictive(2):
        pass


def gemma3n() -> Any:
    config = tf.Gemma3nTextConfig(
        vocab_size=97, vocab_size_per_layer_input=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4, sliding_window=8,
        final_logit_softcapping=3.0, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.Gemma3nForCausalLM(config)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    zoo.randomise(peft)
    return tfb_ext.bayesianize(peft.eval(), sigma=SIGMA)


def test_a_strict_configuration_is_no_lock() -> None:
    adapter = gemma3n()
    given = zoo.inputs(2, 5, padded=False)
    del given["position_ids"]
    for _ in range(2):
        try:
            with adapter.predictive(SAMPLES):
                found = adapter.model(**given).logits
        except TFBError as error:
            assert "Fix: one sample a call" in str(error)
            continue
        apart = zoo.separate_passes(adapter, list(range(SAMPLES)), SIGMA, lambda: logs(adapter, given))
        assert torch.allclose(found, zoo.average(apart), atol=1e-4)
    assert adapter.anatomy.model.config.final_logit_softcapping == 3.0
    with adapter.sampling([0]):
        one = adapter.model(**given).logits
    (apart,) = zoo.separate_passes(adapter, [0], SIGMA, lambda: adapter.model(**given).logits)
    assert torch.allclose(one, apart, atol=1e-4)


# Threads ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("context", ["predictive", "sampling"])
def test_calls_of_several_threads_are_right(context: str) -> None:
    adapter = zoo.compared(bayesian(depth=2))
    batches = [zoo.inputs(rows, tokens) for rows, tokens in ((1, 4), (3, 7), (2, 5), (4, 6))]
    if context == "sampling":
        batches = [{n: v.repeat(SAMPLES, 1) for n, v in b.items()} for b in batches]
    with getattr(adapter, context)(SAMPLES):
        expected = [adapter.model(**b).logits for b in batches]
        wrong: list[object] = []

        def work(number: int) -> None:
            try:
                with torch.no_grad():
                    for _ in range(15):
                        if not torch.allclose(adapter.model(**batches[number]).logits, expected[number], atol=1e-5):
                            wrong.append(number)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_call_that_raised_lets_the_next_thread_through() -> None:
    adapter = zoo.compared(bayesian())
    found: list[Tensor] = []
    with adapter.predictive(SAMPLES):
        with pytest.raises(SamplingError):
            adapter.model()
        with torch.enable_grad(), pytest.raises(SamplingError):
            adapter.model(**zoo.inputs())

        def work() -> None:
            with torch.no_grad():
                found.append(adapter.model(**zoo.inputs()).logits)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(timeout=60)
    assert len(found) == 1


# Copies and lost handles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["predictive", "sampling"])
def test_copies_inside_a_context_are_refused(context: str) -> None:
    adapter = zoo.compared(bayesian())
    with getattr(adapter, context)(2):
        for what in (adapter.model, adapter, adapter.anatomy.blocks[1]):
            with pytest.raises(SamplingError, match="copied or pickled inside a sampling context"):
                copy.deepcopy(what)
            with pytest.raises(SamplingError, match="copied or pickled inside a sampling context"):
                pickle.dumps(what)
    other = copy.deepcopy(adapter)
    assert_right(other)
    assert_right(adapter)


@pytest.mark.slow
def test_a_lost_handle_can_be_made_anew() -> None:
    adapter = bayesian()
    model = adapter.model
    with pytest.raises(TFBError, match="Bayesian already"):
        tfb_ext.bayesianize(model)
    del adapter
    gc.collect()
    assert_right(tfb_ext.bayesianize(model, sigma=SIGMA))


def test_a_copied_model_is_bayesianised_by_itself() -> None:
    adapter = bayesian()
    copied = copy.deepcopy(adapter.model)
    for parameter in copied.get_base_model().lm_head.parameters():
        parameter.data.mul_(2.0)
    other = tfb_ext.bayesianize(copied, sigma=SIGMA)
    assert_right(other)
    assert_right(adapter)
    given = zoo.inputs()
    with adapter.predictive(2), other.predictive(2):
        assert (adapter.model(**given).logits - other.model(**given).logits).abs().max() > 1e-3


# Caches -------------------------------------------------------------------------------------------------------------


def filled(adapter: Any, given: dict[str, Tensor]) -> Any:
    cache = DynamicCache(config=adapter.anatomy.model.config)
    with torch.no_grad():
        adapter.model(**given, **{cache_argument(adapter.anatomy.model): cache}, use_cache=True)
    return cache


def step(adapter: Any, cache: Any) -> Tensor:
    given = zoo.inputs(2, 6, padded=False)
    following = {
        "input_ids": given["input_ids"][:, -1:],
        "attention_mask": torch.ones(2, cache.get_seq_length() + 1).long(),
    }
    return adapter.model(**following, **{cache_argument(adapter.anatomy.model): cache}, use_cache=True).logits


def test_a_cache_of_other_rows_is_refused() -> None:
    adapter = bayesian()
    given = zoo.inputs(2, 5, padded=False)
    outside = filled(adapter, given)
    with adapter.predictive(3):
        inside = filled(adapter, given)
    for samples, sigma, cache in ((3, None, outside), (2, None, inside), ([3, 4, 5], None, inside), (3, 0.1, inside)):
        with adapter.predictive(samples, sigma):
            with pytest.raises(SamplingError, match="key-value cache holds tokens of.*Fix: run the prompt inside"):
                step(adapter, cache)
    with pytest.raises(RuntimeError):  # the plain model cannot go on from rows of samples either
        with torch.no_grad():
            step(adapter, inside)
    with adapter.predictive(3):
        whole = adapter.model(
            input_ids=torch.cat([given["input_ids"], zoo.inputs(2, 6, padded=False)["input_ids"][:, -1:]], 1)
        )
        assert torch.allclose(step(adapter, copy.deepcopy(inside))[:, -1], whole.logits[:, -1], atol=1e-4)
        assert torch.allclose(step(adapter, inside)[:, -1], whole.logits[:, -1], atol=1e-4)


def test_a_static_cache_serves_another_context_once_it_is_reset() -> None:
    adapter = bayesian()
    cache = StaticCache(config=adapter.anatomy.model.config, max_cache_len=16)
    given = zoo.inputs(2, 5, padded=False)
    name = cache_argument(adapter.anatomy.model)
    with adapter.predictive(3):
        adapter.model(**given, **{name: cache}, use_cache=True)
    with adapter.predictive(3, 0.1), pytest.raises(SamplingError, match="of other samples"):
        adapter.model(**given, **{name: cache}, use_cache=True)
    cache.reset()
    with adapter.predictive(3, 0.1):
        again = adapter.model(**given, **{name: cache}, use_cache=True).logits
        assert torch.allclose(again, adapter.model(**given).logits, atol=1e-4)


def test_nothing_stays_on_a_cache_and_copies_have_their_own() -> None:
    adapter = bayesian()
    prompt = zoo.prompt(2)
    name = cache_argument(adapter.anatomy.model)
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "num_return_sequences": 3}
    with adapter.predictive(SAMPLES):
        expected = adapter.model.generate(**prompt, **options)
        prefix = DynamicCache(config=adapter.anatomy.model.config)
        start = {n: v[:, :-1] for n, v in zoo.inputs(2, 6).items()}
        adapter.model(**start, **{name: prefix}, use_cache=True)
        for _ in range(2):
            copied = copy.deepcopy(prefix)
            copied.batch_repeat_interleave(3)
            found = adapter.model.generate(**prompt, **options, **{name: copied})
            assert torch.equal(found, expected)
    assert not {"reorder_cache", "prefetch"} & set(vars(prefix))
    later = copy.deepcopy(prefix)
    later.batch_repeat_interleave(3)
    with adapter.predictive(SAMPLES):
        assert torch.equal(adapter.model.generate(**prompt, **options, **{name: later}), expected)
    plain = DynamicCache(config=adapter.anatomy.model.config)
    with torch.no_grad():
        adapter.model.generate(**prompt, **options, **{name: plain})


# Outputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.slow_but(["llama", "bert", "gpt2"], "llama"))
@pytest.mark.parametrize("depth", ["all", 2])
def test_hidden_states_have_the_callers_rows(name: str, depth: Any) -> None:
    adapter = bayesian(name, depth=depth)
    adapter.anatomy.model.set_attn_implementation("eager")
    given = zoo.batch_for(name)
    asked = {"output_hidden_states": True, "output_attentions": True}

    def states() -> list[Tensor]:
        out = adapter.model(**given, **asked)
        return [*out.hidden_states, *out.attentions]

    with adapter.predictive(SAMPLES):
        found = states()
        as_tuple = adapter.model(**given, **asked, return_dict=False)
    with torch.no_grad():
        plain = states()
    lists = [part for part in as_tuple if isinstance(part, tuple)]
    assert [t.shape for t in found] == [t.shape for t in plain]
    assert sum(len(part) for part in lists) == len(found)
    for place in range(len(found)):
        apart = zoo.separate_passes(adapter, list(range(SAMPLES)), SIGMA, lambda i=place: states()[i])
        assert torch.allclose(found[place], apart.mean(0), atol=1e-4)
