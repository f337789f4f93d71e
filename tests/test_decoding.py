"""Captured decoding: the same text and the same probabilities as steps that run as usual.

On the CPU a recorder stands in for CUDA graphs: it notes every operator of the captured call and replays them on the same
memory, and refuses what a capture refuses, reading a value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

import tfb_ext
from tfb_ext import captured_decoding
from tfb_ext.forward.caches import cache_argument
from tfb_ext.generation import decoding
from tfb_ext.generation.decoding import CapturedDecoding

SAMPLES, SIGMA, NEW = 3, 0.3, 6
STATIC = {"cache_implementation": "static"}


class Recorder(TorchDispatchMode):
    """A graph of the operators that ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            with torch.no_grad():
                new = func(*args, **kwargs)
            for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


@contextmanager
def recorded(graph: Recorder, pool: None = None) -> Iterator[None]:
    """``torch.cuda.graph``: what is captured has not run, so what it wrote to memory from before is put back."""
    before = [(t, t.clone()) for t in everything()]
    with graph:
        yield
    for tensor, value in before:
        tensor.copy_(value)


def everything() -> list[Tensor]:
    """Caches' tensors, which a step writes in place."""
    return [
        t for cache in CACHES for layer in cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)
    ]


CACHES: list[Any] = []


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(decoding, "capturable", lambda device: True)
    monkeypatch.setattr("tfb_ext.generation.text.capturable", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    # transformers asks for a compiled call on accelerators only.
    monkeypatch.setattr(
        "transformers.generation.utils.GenerationMixin._valid_auto_compile_criteria",
        lambda self, kwargs, config: isinstance(kwargs.get("cache", kwargs.get("past_key_values")), StaticCache),
    )
    made = StaticCache.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        CACHES.append(self)

    monkeypatch.setattr(StaticCache, "__init__", init)
    CACHES.clear()
    return "cpu"


def bayesian(device: str, name: str = "llama", depth: Any = 2, **options: Any) -> Any:
    return tfb_ext.bayesianize(zoo.peft_model(name).to(device), depth=depth, sigma=SIGMA, **options)


OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def run(
    adapter: Any, batch: dict[str, Tensor], samples: Any = SAMPLES, sigma: float | None = None, **options: Any
) -> Any:
    """Sequences and the log probabilities (B, NEW, V) behind them, by the model's own ``generate``."""
    with adapter.predictive(samples, sigma):
        out = adapter.model.generate(
            **batch, **{**OPTIONS, **options}, return_dict_in_generate=True, output_logits=True
        )
    return out.sequences, torch.stack(out.logits, dim=1)


def same(found: Any, expected: Any) -> bool:
    return torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], atol=1e-4)


@pytest.mark.parametrize("mode", zoo.slow_but(["weight", "token"], "weight"))
@pytest.mark.parametrize("depth", ["all", 2, "head"])
def test_steps_are_those_of_a_plain_run(device: str, depth: Any, mode: str) -> None:
    name = "llama-head" if depth == "head" else "llama"
    adapter, batch = bayesian(device, name, depth, mode=mode), zoo.prompt(device=device)
    expected = run(adapter, batch)
    with captured_decoding(adapter) as steps:
        assert same(run(adapter, batch, **STATIC), expected)
    assert (steps.captured, steps.plain, steps.replayed) == (1, 1, NEW - 2)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_other_architectures(device: str, name: str) -> None:
    adapter, batch = bayesian(device, name), zoo.prompt(device=device)
    expected = run(adapter, batch)
    with captured_decoding(adapter) as steps:
        assert same(run(adapter, batch, **STATIC), expected)
    assert steps.captured == 1


@pytest.mark.parametrize("mode", ["weight", "token"])
def test_one_graph_serves_every_sample_sigma_and_seed(device: str, mode: str) -> None:
    adapter = bayesian(device, mode=mode)
    settings = [
        (zoo.prompt(device=device), [0, 1, 2], SIGMA, 0),
        (zoo.prompt(device=device, tokens=8), [4, 5, 7], SIGMA, 0),
        (zoo.prompt(device=device), [0, 1, 2], 0.05, 0),
        (zoo.prompt(device=device), [0, 1, 2], SIGMA, 2**63 + 11),
    ]
    expected = []
    for batch, samples, sigma, seed in settings:
        adapter.seed = seed
        expected.append(run(adapter, batch, samples, sigma))
    assert len({tuple(e[1].flatten().tolist()) for e in expected}) == len(settings)
    argument = cache_argument(adapter.anatomy.model)
    with captured_decoding(adapter) as steps:
        for (batch, samples, sigma, seed), there in zip(settings, expected, strict=True):
            adapter.seed = seed
            rows = len(batch["input_ids"])
            with adapter.predictive(samples, sigma):
                cache = steps.cache(rows, 8 + NEW)
            assert same(run(adapter, batch, samples, sigma, **{argument: cache}), there)
    assert (steps.captured, steps.plain) == (1, 1) and steps.replayed == len(settings) * (NEW - 1) - 1


def test_generate_keeps_its_cache(device: str) -> None:
    adapter = bayesian(device)

    def generate(batch: dict[str, Tensor], **options: Any) -> tfb_ext.generation.Generation:
        return tfb_ext.generate(adapter, batch, samples=SAMPLES, **{**OPTIONS, **options})

    batches = [
        zoo.prompt(device=device),
        zoo.prompt(device=device, tokens=5),
        zoo.prompt(2, device),
        zoo.prompt(device=device),
    ]
    expected = [generate(b) for b in batches]
    with captured_decoding(adapter) as steps:
        for batch, there, captured in zip(batches, expected, [1, 1, 2, 3], strict=True):
            found = generate(batch, **STATIC)
            assert torch.equal(found.sequences, there.sequences)
            assert torch.allclose(found.log_probabilities, there.log_probabilities, atol=1e-4)
            assert steps.captured == captured  # another number of rows replaces the cache
        # Longer than the cache that is kept: another one.
        longer = generate(batches[0], **{**OPTIONS, "max_new_tokens": 70}, **STATIC)
        assert longer.sequences.shape[1] == 76 and steps.captured == 4
    assert torch.equal(generate(batches[0], **STATIC).sequences, expected[0].sequences)  # by graphs of its own
    assert not decoding._OPEN and "get_compiled_call" not in adapter.anatomy.model.__dict__


def test_drawn_tokens(device: str) -> None:
    adapter, batch = bayesian(device), zoo.prompt(2, device)
    draws = {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(3)
    expected = run(adapter, batch, **draws)
    with captured_decoding(adapter) as steps:
        torch.manual_seed(3)
        assert same(run(adapter, batch, **draws, **STATIC), expected)
    assert steps.captured == 1 and steps.replayed == NEW - 2


def test_the_mean_and_a_model_without_adapter(device: str) -> None:
    adapter, batch = bayesian(device), zoo.prompt(device=device)
    for model, context in ((adapter.model, adapter), (adapter.model, adapter.model), (base(device), None)):
        with torch.no_grad():
            expected = model.generate(**batch, **OPTIONS)
            with captured_decoding(model if context is None else context) as steps:
                assert torch.equal(model.generate(**batch, **OPTIONS, **STATIC), expected)
        assert steps.captured == 1


def base(device: str) -> Any:
    return zoo.peft_model("llama").unload().to(device).eval()


def test_weights_that_moved_are_captured_anew(device: str) -> None:
    adapter, batch = bayesian(device), zoo.prompt(device=device)
    argument = cache_argument(adapter.anatomy.model)
    layer = next(m for m in adapter.model.modules() if hasattr(m, "lora_A")).base_layer
    with captured_decoding(adapter) as steps:

        def again() -> Any:
            with adapter.predictive(SAMPLES):
                cache = steps.cache(3, 6 + NEW)
            return run(adapter, batch, **{argument: cache})

        before = again()
        layer.weight.data = layer.weight.data * 1.5
        assert same(again(), run(adapter, batch)) and steps.captured == 2
        layer.weight.data.div_(1.5)  # in place: the graph reads it
        assert same(again(), before) and steps.captured == 2


UNCAPTURED: dict[str, tuple[str, dict[str, Any]]] = {
    "sliding windows": ("gemma3", STATIC),
    "hidden states": ("llama", STATIC | {"output_hidden_states": True}),
    "a dynamic cache": ("llama", {}),
    "beams, which transformers does not compile": ("llama", STATIC | {"num_beams": 3}),
}


@pytest.mark.parametrize("case", UNCAPTURED)
def test_what_a_graph_cannot_hold_runs_as_usual(device: str, case: str) -> None:
    name, options = UNCAPTURED[case]
    adapter, batch = bayesian(device, name), zoo.prompt(device=device)
    expected = run(adapter, batch, **{k: v for k, v in options.items() if k == "num_beams"})
    with captured_decoding(adapter) as steps:
        assert same(run(adapter, batch, **options), expected)
    assert steps.captured == 0


def test_observers_run_at_every_step(device: str) -> None:
    adapter, batch = bayesian(device), zoo.prompt(device=device)
    seen: list[Tensor] = []
    view = tfb_ext.forward.fold.Predictive(adapter.batch(SAMPLES), observe=seen.append)
    with captured_decoding(adapter) as steps, adapter.fanned(view):
        adapter.model.generate(**batch, **OPTIONS, **STATIC)
    assert len(seen) >= NEW and steps.captured == 0


def test_a_model_that_reads_on_the_host_runs_as_usual(device: str) -> None:
    if device == "cuda":
        pytest.skip("a capture that fails on a GPU may take the process's other graphs with it")
    adapter, batch = bayesian(device), zoo.prompt(device=device)
    expected = run(adapter, batch)
    hook = adapter.anatomy.blocks[0].register_forward_pre_hook(lambda module, args: float(args[0].sum()) and None)
    try:
        with captured_decoding(adapter) as steps, pytest.warns(UserWarning, match="cannot be captured .*capturing"):
            assert same(run(adapter, batch, **STATIC), expected)
    finally:
        hook.remove()
    assert steps.captured == 0 and steps.plain == NEW - 1


@pytest.mark.parametrize("spoil", [lambda a: a.model.train(), lambda a: a.model.merge_adapter()])
def test_a_replayed_step_checks_what_any_call_does(device: str, spoil: Callable[[Any], object]) -> None:
    adapter, batch = bayesian(device), zoo.prompt(device=device)

    class Spoiler:
        """Spoils the model after the third token."""

        def __init__(self) -> None:
            self.left = 3

        def put(self, tokens: Tensor) -> None:
            self.left -= 1
            if not self.left:
                spoil(adapter)

        def end(self) -> None: ...

    with captured_decoding(adapter), pytest.raises(tfb_ext.errors.SamplingError):
        run(adapter, {k: v[:1] for k, v in batch.items()}, streamer=Spoiler(), **STATIC)


def test_refusals() -> None:
    adapter = bayesian("cpu")
    with captured_decoding(adapter), pytest.raises(ValueError, match="open already"), captured_decoding(adapter):
        pass
    with pytest.raises(ValueError, match="Linear has no get_compiled_call"), captured_decoding(torch.nn.Linear(2, 2)):
        pass


def test_on_the_cpu_nothing_is_captured() -> None:
    adapter, batch = bayesian("cpu"), zoo.prompt()
    expected = run(adapter, batch)
    with captured_decoding(adapter) as steps:
        assert isinstance(steps, CapturedDecoding)
        assert same(run(adapter, batch, **STATIC), expected)
        found = tfb_ext.generate(adapter, batch, samples=SAMPLES, **OPTIONS, **STATIC)
    assert steps.captured == 0 and torch.equal(found.sequences, expected[0])


@pytest.mark.gpu
def test_a_graph_survives_what_a_compiler_frees() -> None:
    """torch.compile lets cuBLAS's workspaces go before it captures; a graph must not have been writing to one of those."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=zoo.VOCAB, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    batch = zoo.prompt(8, "cuda")

    def text() -> Tensor:
        cache = {cache_argument(model): steps.cache(8, 6 + NEW)}
        out: Tensor = model.generate(**batch, **OPTIONS, **cache)
        return out

    def compiled() -> None:
        halve = torch.compile(lambda x, w: torch.nn.functional.gelu(x @ w) / 2, mode="reduce-overhead")
        weight = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            halve(torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16), weight)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    for _ in range(2):  # the first one's memory is gone when the second captures
        with torch.no_grad(), captured_decoding(model) as steps:
            text()
            expected = text()
            compiled()
            assert torch.equal(text(), expected) and steps.captured == 1
