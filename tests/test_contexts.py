"""What happens inside a sampling context and around it: changes of the model, of its types, of caches, threads that outlive it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import tfb_ext
from tfb_ext.errors import SamplingError, TFBError
from tfb_ext.forward.caches import cache_argument

SIGMA, SAMPLES = 0.3, 3
bayesian = partial(zoo.bayesian, sigma=SIGMA)


def logs(adapter: Any, given: dict[str, Tensor]) -> Tensor:
    return torch.log_softmax(adapter.model(**given).logits, dim=-1)


def assert_right(adapter: Any) -> None:
    given = zoo.inputs()
    with adapter.predictive(SAMPLES):
        found = adapter.model(**given).logits
    apart = zoo.separate_passes(adapter, list(range(SAMPLES)), SIGMA, lambda: logs(adapter, given))
    assert torch.allclose(found, zoo.average(apart), atol=1e-4)


# Changes inside a context -------------------------------------------------------------------------------------------


def other_weights(adapter: Any, folder: Path) -> None:
    zoo.peft_model("llama", seed=5).save_pretrained(folder)
    adapter.model.load_adapter(str(folder), "default")
    adapter.model.eval()


def written(adapter: Any, folder: Path) -> None:
    adapter.anatomy.blocks[0].self_attn.v_proj.lora_B["default"].weight.data.mul_(2.0)


def taken_off(adapter: Any, folder: Path) -> None:
    adapter.model.unload()


def merged(adapter: Any, folder: Path) -> None:
    adapter.model.merge_and_unload()


def one_layer(adapter: Any, folder: Path) -> None:
    attention = adapter.anatomy.blocks[3].self_attn
    attention.v_proj = attention.v_proj.base_layer


def slot(adapter: Any, folder: Path) -> None:
    adapter.anatomy.blocks[3].self_attn.v_proj.tfb_updates.pop("default")


@pytest.mark.parametrize("context", zoo.slow_but(["predictive", "sampling"], "predictive"))
@pytest.mark.parametrize("how", [other_weights, written, taken_off, merged, one_layer, slot], ids=lambda f: f.__name__)
def test_a_change_inside_a_context_is_noticed_before_it_ends(
    how: Callable[[Any, Path], None], context: str, tmp_path: Path
) -> None:
    adapter = zoo.compared(bayesian(depth=2))
    given = zoo.inputs()
    with pytest.raises(SamplingError, match="Fix: "):
        with getattr(adapter, context)(SAMPLES):
            adapter.model(**given)
            how(adapter, tmp_path)
            if how is not written:
                adapter.model(**given)
    assert torch.is_grad_enabled()


def test_weights_that_turned_nan_are_noticed() -> None:
    adapter = zoo.compared(bayesian())
    adapter.anatomy.blocks[1].mlp.up_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(SamplingError, match="refresh"), adapter.predictive(2):
        pass


@pytest.mark.slow
def test_the_bias_of_an_adapter_counts(tmp_path: Path) -> None:
    model = zoo.peft_model("llama", lora_bias=True)
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA)
    assert_right(adapter)
    before = adapter.fingerprint()
    saved = adapter.save_pretrained(tmp_path / "saved")
    adapter.anatomy.blocks[1].mlp.up_proj.lora_B["default"].bias.data[0] += 0.1
    assert adapter.fingerprint() != before
    with pytest.raises(SamplingError, match="refresh"), adapter.predictive(2):
        pass
    base = zoo.peft_model("llama").unload()
    assert tfb_ext.load(base, saved).fingerprint() == before


@pytest.mark.parametrize("context", ["predictive", "sampling"])
def test_a_part_in_training_mode_is_noticed(context: str) -> None:
    adapter = bayesian("gpt2")  # which has dropout
    for part in (adapter.anatomy.blocks[1], adapter.anatomy.blocks[2].mlp.dropout):
        part.train()
        with pytest.raises(SamplingError, match="'transformer.h.*is in training mode.*Fix: call model.eval"):
            with getattr(adapter, context)(2):
                pass
        with pytest.raises(SamplingError, match="is in training mode"):
            tfb_ext.predict(adapter, [zoo.inputs()], samples=0)
        adapter.model.eval()
    plain = bayesian()  # without any
    plain.anatomy.blocks[1].train()
    assert_right(plain)


def test_quantised_copies_are_right_or_refused() -> None:
    quantise: Any = torch.ao.quantization.quantize_dynamic
    with pytest.raises(TFBError, match="without a weight tensor; quantise the base model alone"):
        tfb_ext.bayesianize(quantise(zoo.peft_model("llama"), {torch.nn.Linear}, dtype=torch.qint8))
    adapter = bayesian()
    quantise(adapter.model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    with pytest.raises(SamplingError, match="no weights in layer.*quantised"), adapter.predictive(2):
        pass


# Types --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps", zoo.slow_but(["float", "bfloat16", "bfloat16 float", "double float"], "bfloat16 float")
)
def test_a_converted_model_keeps_its_posterior(steps: str) -> None:
    adapter = bayesian(dtype=torch.bfloat16)
    adapter.model.to(torch.bfloat16)
    adapter.refresh()
    zoo.compared(adapter)
    given = zoo.inputs()
    if steps.endswith("float"):
        for step in steps.split():
            adapter.model.to(getattr(torch, step))
        assert_right(adapter)
        return
    with adapter.predictive(SAMPLES):
        before = adapter.model(**given).logits
    adapter.model.to(torch.bfloat16)
    with adapter.predictive(SAMPLES):
        assert torch.equal(adapter.model(**given).logits, before)


# Caches -------------------------------------------------------------------------------------------------------------


def call(adapter: Any, cache: Any, given: dict[str, Tensor]) -> Tensor:
    return adapter.model(**given, **{cache_argument(adapter.anatomy.model): cache}, use_cache=True).logits


def following(rows: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.full((rows, 1), 7)
    return {"input_ids": ids, "attention_mask": torch.ones(rows, tokens + 1).long()}


def prompt(rows: int, tokens: int = 5) -> dict[str, Tensor]:
    given = zoo.inputs(rows, tokens, padded=False)
    return {n: given[n] for n in ("input_ids", "attention_mask")}


def empty(adapter: Any, kind: str = "dynamic") -> Any:
    cache = DynamicCache(config=adapter.anatomy.model.config)
    return EncoderDecoderCache(cache, DynamicCache()) if kind == "pair" else cache


OTHERS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "adapter": lambda a: (a.predictive([2]), second(a).predictive([2])),
    "depth": lambda a: (a.predictive([2]), at(a, 2)),
    "head": lambda a: (a.predictive([2]), at(a, "head")),
    "head first": lambda a: (at(a, "head"), a.predictive([2])),
    "outside": lambda a: (torch.no_grad(), a.sampling([2])),
    "sampling": lambda a: (a.sampling([1]), a.sampling([2])),
    "kind": lambda a: (a.sampling([2]), a.predictive([2])),
    "refreshed": lambda a: (a.predictive([2]), a.predictive([2])),
}


def second(adapter: Any) -> Any:
    if "second" not in adapter.model.peft_config:
        adapter.model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
        zoo.randomise(adapter.model.base_model.model)
        adapter.refresh()
        adapter.model.eval()
    return tfb_ext.bayesianize(adapter.model, "second", sigma=SIGMA)


def at(adapter: Any, depth: Any) -> Any:
    class Context:
        def __enter__(self) -> None:
            self.before = adapter.depth
            adapter.depth = depth
            self.context = adapter.predictive([2])
            self.context.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)
            adapter.depth = self.before

    return Context()


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("kind", zoo.slow_but(["dynamic", "pair"], "dynamic"))
def test_a_cache_of_one_sample_serves_no_other_posterior(case: str, kind: str) -> None:
    """Of one sample the rows fit, so nothing else would say so."""
    adapter = bayesian("llama-head")
    contexts = OTHERS[case](adapter)
    cache = empty(adapter)
    given = EncoderDecoderCache(cache, DynamicCache()) if kind == "pair" else cache
    adapter.model.set_adapter("default")
    with contexts[0]:
        call(adapter, cache, prompt(2))
    if case == "refreshed":
        adapter.anatomy.blocks[0].self_attn.v_proj.lora_B["default"].weight.data.mul_(2.0)
        adapter.refresh()
    if case == "adapter":
        adapter.model.set_adapter("second")
    with contexts[1], pytest.raises(SamplingError, match="key-value cache holds tokens of"):
        call(adapter, given, following(2, 5))


@pytest.mark.parametrize("context", ["predictive", "sampling"])
def test_a_step_of_flipout_is_refused_in_both_contexts(context: str) -> None:
    adapter = bayesian(mode="flipout")
    cache = empty(adapter)
    with getattr(adapter, context)([2]), pytest.raises(SamplingError, match="'flipout' numbers its noise"):
        call(adapter, cache, prompt(2))
        call(adapter, cache, following(2, 5))


def test_the_cache_of_a_tuple_goes_on() -> None:
    adapter = bayesian()
    with adapter.predictive(SAMPLES):
        cache = adapter.model(**prompt(2), use_cache=True, return_dict=False)[1]
        found = call(adapter, cache, following(2, 5))
        ids = torch.cat([prompt(2)["input_ids"], following(2, 5)["input_ids"]], 1)
        whole = adapter.model(input_ids=ids).logits[:, -1:]
    assert torch.allclose(found, whole, atol=1e-4)


@pytest.mark.parametrize("depth", zoo.slow_but(["all", 2, "head"], 2))
@pytest.mark.parametrize("picked", [[1], [2, 0], [False, True, True], [0, 0, 1, 2, 2]])
def test_rows_picked_out_of_a_cache_are_those_of_every_sample(depth: Any, picked: list[Any]) -> None:
    adapter = bayesian("llama-head", depth=depth)
    rows = torch.arange(3)[torch.tensor(picked)]
    given = prompt(3)
    with adapter.predictive(SAMPLES):
        cache = empty(adapter)
        call(adapter, cache, given)
        cache.batch_select_indices(torch.tensor(picked))
        found = call(adapter, cache, following(len(rows), 5))
        ids = torch.cat([given["input_ids"][rows], following(len(rows), 5)["input_ids"]], 1)
        whole = adapter.model(input_ids=ids).logits[:, -1:]
        repeated = empty(adapter)
        call(adapter, repeated, given)
        repeated.batch_repeat_interleave(2)
        repeated.batch_select_indices(2 * rows)
        assert torch.allclose(call(adapter, repeated, following(len(rows), 5)), whole, atol=1e-4)
    assert torch.allclose(found, whole, atol=1e-4)
    assert "batch_select_indices" not in vars(cache)


# Outputs ------------------------------------------------------------------------------------------------------------


def test_router_logits_of_samples_are_refused_and_of_one_sample_given() -> None:
    adapter = bayesian("mixtral")
    given = zoo.inputs()
    with adapter.predictive(SAMPLES), pytest.raises(SamplingError, match="output_router_logits.*Fix: pass"):
        adapter.model(**given, output_router_logits=True)
    with adapter.predictive([1]):
        found = adapter.model(**given, output_router_logits=True)
    apart = zoo.separate_passes(
        adapter, [1], SIGMA, lambda: adapter.model(**given, output_router_logits=True).router_logits[3]
    )
    assert torch.allclose(found.router_logits[3], apart[0], atol=1e-4)


# Threads ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("context", ["predictive", "sampling"])
def test_a_context_ends_after_the_calls_that_run_in_it(context: str) -> None:
    adapter = zoo.compared(bayesian())
    given = {n: v.repeat(SAMPLES, 1) for n, v in zoo.inputs().items()} if context == "sampling" else zoo.inputs()
    with getattr(adapter, context)(SAMPLES):
        expected = adapter.model(**given).logits
    with torch.no_grad():
        plain = adapter.model(**given).logits
    started = threading.Event()

    def slow(*_: Any) -> None:
        started.set()
        time.sleep(0.2)

    handle = adapter.anatomy.blocks[2].register_forward_pre_hook(slow)
    found: list[Any] = []

    def work() -> None:
        with torch.no_grad():
            try:
                found.append(adapter.model(**given).logits)
            except SamplingError as error:
                found.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    with getattr(adapter, context)(SAMPLES):
        for thread in threads:
            thread.start()
        assert started.wait(30)
    for thread in threads:
        thread.join(30)
    handle.remove()
    assert len(found) == 3
    for result in found:
        if isinstance(result, Exception):
            assert "context ended while this thread's call waited" in str(result)
        else:
            assert torch.equal(result, expected)
    with torch.no_grad():
        assert torch.equal(adapter.model(**given).logits, plain)
    assert not adapter.is_sampling
    assert_right(adapter)


def test_a_thread_that_ended_in_the_middle_of_a_call_holds_up_no_other() -> None:
    adapter = zoo.compared(bayesian())
    given = zoo.inputs()
    leave = [True]

    def hook(*_: Any) -> None:
        if leave and threading.current_thread() is not threading.main_thread():
            raise SystemExit

    handle = adapter.anatomy.blocks[2].register_forward_pre_hook(hook)
    with adapter.predictive(SAMPLES):
        expected = adapter.model(**given).logits

        def work() -> None:
            with suppress(SystemExit), torch.no_grad():
                adapter.model(**given)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(30)
        assert torch.equal(adapter.model(**given).logits, expected)
    handle.remove()
    assert_right(adapter)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_a_call_that_was_interrupted_leaves_nothing(error: type[BaseException]) -> None:
    adapter = zoo.compared(bayesian("llama-head", depth=2))
    given = zoo.inputs()
    places = [adapter.anatomy.model, *adapter.anatomy.blocks, adapter.anatomy.blocks[3].mlp, adapter.anatomy.head]
    with adapter.predictive(SAMPLES):
        expected = adapter.model(**given).logits

    def stop(*_: Any) -> None:
        raise error

    for place in places:
        for register in (place.register_forward_pre_hook, place.register_forward_hook):
            handle = register(stop)
            with adapter.predictive(SAMPLES):
                with pytest.raises(error):
                    adapter.model(**given)
                handle.remove()
                assert torch.equal(adapter.model(**given).logits, expected)
            assert torch.is_grad_enabled()
    assert_right(adapter)


def test_two_threads_that_open_a_context_at_once_get_one() -> None:
    adapter = zoo.compared(bayesian())
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        try:
            with adapter.predictive(2):
                time.sleep(0.1)
            outcomes.append("open")
        except TFBError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("open") >= 1 and all(o == "open" or "do not nest" in o for o in outcomes)
    assert_right(adapter)
