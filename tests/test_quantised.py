"""On quantised base layers: samples are those of separate passes, the mean is PEFT's, and the table of what is served is true."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_sets
import torch
import zoo
from quantised import QUANTISE, quantised
from small_folders import Folders
from torch import Tensor

import tfb_ext
from tfb_ext.adapters import base
from tfb_ext.adapters.base import support_table
from tfb_ext.app.loading import load_adapter
from tfb_ext.errors import SamplingError
from tfb_ext.forward.guard import Trial
from tfb_ext.generation.options import assistant

SAMPLES, SIGMA = 4, 0.05
TYPES = [torch.float32, torch.bfloat16]
ROUNDED = (("bitsandbytes", "int8"), ("transformers", "fp8"))  # whose activations are
NF4 = ("bitsandbytes", "nf4, double quantisation")
SUPPORT = Path(__file__).resolve().parents[1] / "docs" / "support.md"


def bayesian(
    kind: tuple[str, str] = NF4, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say of themselves
        return tfb_ext.bayesianize(quantised(*kind, dtype=dtype, device=device), **{"sigma": SIGMA, **options})


@pytest.fixture(params=["library's product", "dense"])
def product(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of a quantised base's products is taken: few rows have its library's, many that of its dense weight."""
    rows = 1 if request.param == "dense" else 2**40
    monkeypatch.setattr(base, "KINDS", tuple(replace(kind, rows=rows) for kind in base.KINDS))
    return str(request.param)


def logs(adapter: Any, batch: dict[str, Tensor]) -> Tensor:
    return torch.log_softmax(adapter.model(**batch).logits.float(), -1)[batch["attention_mask"].bool()]


def samples(adapter: Any, batch: dict[str, Tensor]) -> Tensor:
    with adapter.predictive(SAMPLES, keep_samples=True) as view:
        adapter.model(**batch)
    return view.sample_outputs[:, batch["attention_mask"].bool()].float()


def passes(adapter: Any, batch: dict[str, Tensor]) -> Tensor:
    return zoo.separate_passes(adapter, list(range(SAMPLES)), SIGMA, lambda: logs(adapter, batch))


def skip_what_does_not_run(kind: tuple[str, str], dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and ("GPT" in kind[0] or kind[0] == "optimum-quanto"):
        pytest.skip("its layers here are for CPUs")
    if device == "cuda" and dtype == torch.float32 and "dynamic" in kind[1]:
        pytest.skip("its kernels take half precision")
    if device == "cpu" and kind[1] == "float8_e4m3fn dynamic":
        pytest.skip("its kernels are for GPUs")


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", QUANTISE, ids=" ".join)
def test_samples_equal_separate_passes(product: str, kind: tuple[str, str], dtype: torch.dtype, device: str) -> None:
    skip_what_does_not_run(kind, dtype, device)
    adapter, batch = bayesian(kind, dtype, device), zoo.moved(zoo.inputs(), device)
    expected = passes(adapter, batch)
    spread = rms(expected - expected.mean(0))
    # Activations rounded to 8 bits turn differences in the last place into whole steps, which in float8 are an eighth of a value; half
    # precision rounds anyway.
    rounds = dtype == torch.bfloat16 or "dynamic" in kind[1] or kind in ROUNDED or "AWQ" in kind[0]
    share = 0.1 if kind[1] in ("fp8", "float8_e4m3fn dynamic") else 0.05
    assert rms(samples(adapter, batch) - expected) <= (share * spread if rounds else 1e-5)
    assert spread > 0.1
    assert adapter.base_kind == f"{kind[0]} {kind[1].partition(',')[0]}"


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", QUANTISE, ids=" ".join)
def test_the_mean_is_pefts(product: str, kind: tuple[str, str], dtype: torch.dtype, device: str) -> None:
    """Outside a context bit for bit. Below the first random block inside one too, but for the order of the dense weight's sum."""
    skip_what_does_not_run(kind, dtype, device)
    model, batch = (
        quantised(*kind, dtype=dtype, device=device),
        zoo.moved(zoo.inputs(), device),
    )
    seen: list[Tensor] = []
    with torch.no_grad():
        plain = model(**batch, output_hidden_states=True)
        adapter = tfb_ext.bayesianize(model, sigma=SIGMA, depth=1)
        assert torch.equal(model(**batch).logits, plain.logits)
    adapter.anatomy.blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with adapter.predictive(2):
        seen.clear()  # the guard's
        model(**batch)
    below = torch.cat([plain.hidden_states[-2]] * 2) if len(seen[0]) > 3 else plain.hidden_states[-2]
    assert rms(seen[0] - below) <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * rms(below)
    assert product == "dense" or torch.equal(seen[0], below)


def test_the_adapters_type_does_not_widen_the_activations() -> None:
    """The adapter is in float32, the compute type bfloat16: PEFT would widen the input of every layer."""
    adapter, batch = bayesian(dtype=torch.bfloat16), zoo.inputs()
    with adapter.predictive(SAMPLES), zoo.Operators() as operators:
        adapter.model(**batch)
    assert operators.dtypes == {torch.bfloat16}


def test_activations_wider_than_the_compute_type() -> None:
    """As ``prepare_model_for_kbit_training`` leaves them: the update keeps what the base's product rounds."""
    model = quantised(*NF4, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA)
    layer = zoo.lora_layers(adapter)[adapter.layers[0]]
    x = torch.randn(3, 64)
    with torch.no_grad():
        base = layer.base_layer(x)
        basis, mean = adapter.sample_weights(adapter.layers[0], 0)
        expected = base.double() + layer.scaling["default"] * (x.double() @ mean.double().T @ basis.double().T)
        with adapter.sampling([0]):
            found = layer(x)
    assert base.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [NF4, ("bitsandbytes", "int8")], ids=" ".join)
@pytest.mark.parametrize("depth", ["all", 2])
def test_spans(product: str, kind: tuple[str, str], depth: Any) -> None:
    """The answer's token alone is random: of a last token, samples by the prompt's keys and values of the mean."""
    adapter = bayesian(kind, depth=depth, span="answer")
    batch = zoo.inputs(padded=False)
    with adapter.predictive(SAMPLES, keep_samples=True) as view:
        adapter.model(**batch, logits_to_keep=1)
    found = view.sample_outputs[:, :, -1].float()
    name = "past_key_values"
    start = {n: v[:, :-1] for n, v in batch.items()}
    last = {**{n: v[:, -1:] for n, v in batch.items()}, "attention_mask": batch["attention_mask"]}

    def call() -> Tensor:
        cache = caches.pop(0)
        return torch.log_softmax(adapter.model(**last, **{name: cache}).logits[:, -1].float(), -1)

    with torch.no_grad():  # before any sample's weights are in the model
        caches = [getattr(adapter.model(**start, use_cache=True), name) for _ in range(SAMPLES)]
    expected = zoo.separate_passes(adapter, list(range(SAMPLES)), SIGMA, call)
    assert rms(found - expected) <= 0.05 * rms(expected - expected.mean(0))


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("kind", [kind for kind in QUANTISE if kind in ROUNDED or "dynamic" in kind[1]], ids=" ".join)
@pytest.mark.parametrize("span", ["all", "answer"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_steps_of_rounding_are_no_wrong_samples(
    kind: tuple[str, str], span: Any, dtype: torch.dtype, device: str
) -> None:
    """With outliers, whose columns LLM.int8 leaves as they are: what a row gives depends on the rows beside it as much as on its sample."""
    skip_what_does_not_run(kind, dtype, device)
    model, batch = quantised(*kind, dtype=dtype, device=device), zoo.moved(zoo.inputs(padded=False), device)
    for name, part in model.named_modules():
        if name.endswith("norm"):
            part.weight.data *= 4
    state = {id(part): dict(vars(part)) for part in model.modules()}
    with torch.no_grad():
        alone, beside = (model(**{n: v[:rows] for n, v in batch.items()}).logits[0].float() for rows in (1, 2))
    assert kind[0] != "bitsandbytes" or rms(alone - beside) > 0.02
    adapter = tfb_ext.bayesianize(model, sigma=SIGMA, span=span)
    with adapter.predictive(SAMPLES):
        adapter.model(**batch, logits_to_keep=1)
    adapter.unload()
    assert all("forward" not in vars(part) or "forward" in state[id(part)] for part in model.modules())


@pytest.mark.parametrize("kind", [NF4, ("AWQ (GPT-QModel)", "4 bits")], ids=" ".join)
def test_products_in_half_precision_of_a_model_in_float32(kind: tuple[str, str]) -> None:
    """As bitsandbytes' ``bnb_4bit_compute_dtype`` has it: the guard compares samples as in half precision."""
    adapter = bayesian(kind, span="answer")

    def exact() -> bool:
        return Trial(adapter.attached, 0, adapter.batch(2), True, None).exact

    assert exact() == (kind == NF4)
    for part in zoo.lora_layers(adapter).values() if kind == NF4 else ():
        part.base_layer.compute_dtype, part.base_layer.compute_type_is_set = torch.bfloat16, True
    assert not exact()
    with adapter.predictive(SAMPLES):
        adapter.model(**zoo.inputs(padded=False), logits_to_keep=1)


@pytest.mark.parametrize("device", zoo.DEVICES)
def test_generation(product: str, device: str) -> None:
    """Eager, in a static cache, and on a GPU in graphs."""
    adapter, prompt = bayesian(device=device), zoo.prompt(2, device)
    options = {"max_new_tokens": 5, "do_sample": False}
    with adapter.predictive(SAMPLES):
        eager = adapter.model.generate(**prompt, **options)
        static = adapter.model.generate(**prompt, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(eager, static)
    for cache in ({}, {"cache_implementation": "static"}):
        found = tfb_ext.generate(adapter, prompt, samples=SAMPLES, **options, **cache)
        assert torch.equal(found.sequences, eager.cpu())
    new = eager[:, 6:, None]
    full = {"input_ids": eager, "attention_mask": torch.nn.functional.pad(prompt["attention_mask"], (0, 5), value=1)}
    full["position_ids"] = (full["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def call() -> Tensor:
        return torch.log_softmax(adapter.model(**full).logits[:, 5:-1], -1).gather(2, new)[..., 0]

    expected = zoo.separate_passes(adapter, list(range(SAMPLES)), SIGMA, call)
    torch.testing.assert_close(found.sample_log_probabilities, expected.cpu(), atol=1e-4, rtol=1e-4)


def test_prediction_and_search_by_samples() -> None:
    adapter, data = bayesian(sigma=None), small_sets.encoded(6)
    data = small_sets.labelled(adapter, data, 3)
    found = tfb_ext.search_sigma(adapter, data, samples=2, progress=False, tolerance=0.2, metric="nll", steps=2)
    assert adapter.sigma == found.sigma and adapter.searched_on == adapter.base_kind == "bitsandbytes nf4"
    predicted = tfb_ext.predict(adapter, data, samples=SAMPLES, sigma=SIGMA).sample_probabilities
    expected = zoo.separate_passes(adapter, list(range(SAMPLES)), SIGMA, small_sets.answers(adapter, data))
    torch.testing.assert_close(predicted, expected.to(predicted), atol=1e-5, rtol=1e-4)


def test_a_quantised_head_is_asked_whole() -> None:
    """Its weight has no rows to pick: predictions are those of the model's own calls."""
    adapter, data = bayesian(("torchao", "int8")), small_sets.encoded(4)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(adapter.anatomy.head, Int8WeightOnlyConfig())
    expected = zoo.separate_passes(adapter, [0, 1], SIGMA, small_sets.answers(adapter, data))
    found = tfb_ext.predict(adapter, data, samples=2, sigma=SIGMA).sample_probabilities
    torch.testing.assert_close(found, expected.to(found), atol=1e-5, rtol=1e-4)


def test_a_base_layer_with_a_forward_of_its_own(product: str) -> None:
    """Known by its weight alone: what its product is, nobody knows."""

    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    adapter = bayesian(("torchao", "float8_e4m3fn"))
    for module in zoo.lora_layers(adapter).values():
        module.base_layer.__class__ = Doubled
    batch = zoo.inputs()
    torch.testing.assert_close(samples(adapter, batch), passes(adapter, batch), atol=1e-5, rtol=1e-5)


def test_another_type_now_and_then(product: str) -> None:
    """What half precision rounds, it rounds for itself alone."""
    adapter, batch = bayesian(), zoo.inputs()
    expected = samples(adapter, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(samples(adapter, batch), expected)
    assert torch.equal(samples(adapter, batch), expected)
    adapter = bayesian(dtype=torch.bfloat16)
    samples(adapter, batch)
    for parameter in adapter.model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    assert rms(samples(adapter, batch) - passes(adapter, batch)) < 1e-3  # 2.7e-3 with a basis in bfloat16


def test_base_layers_of_another_library_later(product: str) -> None:
    adapter, batch = bayesian(), zoo.inputs()
    samples(adapter, batch)
    others = dict(quantised("bitsandbytes", "int8").get_base_model().named_modules())
    for name, module in zoo.lora_layers(adapter).items():
        module.base_layer = others[name].base_layer
    expected = passes(adapter, batch)
    assert rms(samples(adapter, batch) - expected) <= 0.05 * rms(expected - expected.mean(0))


@pytest.mark.parametrize("kind", [NF4, ("bitsandbytes", "int8")], ids=" ".join)
def test_copies(product: str, kind: tuple[str, str]) -> None:
    adapter, batch = bayesian(kind), zoo.inputs()
    expected = samples(adapter, batch)
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        torch.testing.assert_close(samples(twin, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [NF4, ("bitsandbytes", "int8")], ids=" ".join)
def test_an_assistant_is_on_the_same_weights(kind: tuple[str, str]) -> None:
    adapter = bayesian(kind)
    samples(adapter, zoo.inputs())
    for own, twin in zip(adapter.anatomy.model.modules(), assistant(adapter, "mean").modules(), strict=True):
        for name in ("state", "quant_state"):
            assert vars(own).get(name) is vars(twin).get(name)


# Without samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", zoo.DEVICES)
def test_derivatives(product: str, device: str) -> None:
    """bitsandbytes' 4-bit product has them, and so has the dense weight's: the covariance is that of the same weights in floating point."""
    adapter, data = bayesian(device=device), small_sets.encoded(5)
    found = adapter.gaussian(data)
    for module in zoo.lora_layers(adapter).values():
        with torch.no_grad():
            weight = module.base_layer(torch.eye(module.in_features, device=device)).T.contiguous()
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=False, device=device)
        plain.weight.data = weight
        module.base_layer = plain
    twin = adapter.gaussian(data)
    scale = float(twin.covariance.abs().max())
    torch.testing.assert_close(found.mean, twin.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.covariance, twin.covariance, atol=1e-4 * scale, rtol=0)


def test_a_product_that_loses_derivatives_is_refused() -> None:
    """As bitsandbytes' of weights that it packed for a CPU with AVX512-BF16, at the first call without gradients."""
    adapter = bayesian()
    for module in zoo.lora_layers(adapter).values():
        module.base_layer.forward = partial(_without_derivatives, module.base_layer.forward)
    with pytest.raises(SamplingError, match="by='linear' on base weights 'bitsandbytes nf4'.*Fix: by='samples'"):
        adapter.gaussian(small_sets.encoded(3))


def _without_derivatives(product: Any, x: Tensor) -> Tensor:
    return product(x).detach()


def test_8_bits_by_linear() -> None:
    """Its activations are rounded, and its derivatives are the product's without: the covariance is close to that of samples."""
    adapter, data = bayesian(("bitsandbytes", "int8")), small_sets.encoded(5)
    found = adapter.gaussian(data).covariance
    logits = tfb_ext.predict(adapter, data, 256, sigma=1e-2).sample_probabilities.double().log()
    half = (logits[::2] - logits[1::2]) / 2e-2
    half = half - half.mean(-1, keepdim=True)
    sampled = half.square().mean(0)
    centred = found - found.mean(1, keepdim=True)
    centred = (centred - centred.mean(2, keepdim=True)).diagonal(dim1=1, dim2=2)
    assert ((sampled / centred).log().abs() < 0.7).all()


def test_a_product_without_derivatives_is_refused() -> None:
    adapter = bayesian(("torchao", "int8 dynamic"))
    with pytest.raises(SamplingError, match="by='linear' on base weights 'torchao int8 dynamic'.*Fix: by='samples'"):
        adapter.gaussian(small_sets.encoded(3))


# What is said -----------------------------------------------------------------------------------------------------------


def test_sigma_of_another_base_warns(tmp_path: Path) -> None:
    adapter = bayesian()
    adapter.searched_on = adapter.base_kind  # as a search leaves it
    adapter.save_pretrained(tmp_path)
    assert tfb_ext.load(quantised(*NF4).unload(), tmp_path).searched_on == "bitsandbytes nf4"
    loaded = tfb_ext.load(quantised("bitsandbytes", "int8").unload(), tmp_path)
    with pytest.warns(
        UserWarning, match="searched on base weights 'bitsandbytes nf4', expected one searched on 'bitsandbytes int8'"
    ):
        loaded.batch(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.batch(2, sigma=SIGMA)
        loaded.sigma = SIGMA
        loaded.batch(2)


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_the_command_line_loads_in_few_bits(load_in: str, llama: Folders, tfb: Any, tmp_path: Path) -> None:
    """A search says on what base it was; a checkpoint that is quantised already is taken as it is."""
    kind = f"bitsandbytes {'nf4' if load_in == '4bit' else 'int8'}"
    saved, small = tmp_path / "saved", ("--dtype", "float32", "--device", "cpu", "--samples", "2")
    status, _, said = tfb(
        "search",
        "-a",
        llama.adapter,
        "-d",
        llama.anchors,
        *small,
        "--load-in",
        load_in,
        "--save",
        saved,
        "--steps",
        "2",
    )
    assert status == 0, said
    assert json.loads((saved / "tfb_config.json").read_text())["searched_on"] == kind
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sigma: got")
        status, out, said = tfb("predict", "-a", saved, "-d", llama.test, *small, "--load-in", load_in, "--json")
    assert status == 0, said
    with pytest.warns(UserWarning, match=f"searched on base weights '{kind}', expected one searched on 'float'"):
        status, plain, said = tfb("predict", "-a", saved, "-d", llama.test, *small, "--json")
    assert status == 0 and plain != out
    loaded = load_adapter(str(llama.adapter), device="cpu", dtype="float32", load_in=load_in)
    base = tmp_path / "base"
    loaded.model.unload().save_pretrained(base)
    loaded.tokenizer.save_pretrained(base)
    again = tfb("predict", "-a", saved, "-d", llama.test, *small, "--base", base, "--json")
    assert again[0] == 0, again[2]
    for item, other in zip(documents(again[1]), documents(out), strict=True):
        assert item["probabilities"] == pytest.approx(other["probabilities"], abs=2e-2)
    status, _, said = tfb("predict", "-a", saved, "-d", llama.test, *small, "--base", base, "--load-in", load_in)
    assert status != 0 and "for a checkpoint that is quantised already (bitsandbytes)" in said.replace("\n", " ")


def documents(text: str) -> Any:
    found = json.loads(text)
    return found if isinstance(found, list) else next(v for v in found.values() if isinstance(v, list))


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_classifiers_head_is_not_quantised(load_in: str, classifier: Folders, tfb: Any) -> None:
    small = (
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--load-in",
        load_in,
        "--samples",
        "2",
        "--sigma",
        "0.05",
        "--json",
    )
    status, _, said = tfb("predict", "-a", classifier.adapter, "-d", classifier.test, *small)
    assert status == 0, said
    config = json.loads((classifier.adapter / "adapter_config.json").read_text())
    loaded = load_adapter(str(classifier.adapter), device="cpu", dtype="float32", load_in=load_in)
    head = getattr(loaded.model.get_base_model(), "score", None) or loaded.model.get_base_model().classifier
    assert config["task_type"] == "SEQ_CLS" and {p.dtype for p in head.parameters()} == {torch.float32}


@pytest.mark.parametrize("device_map", ["nonsense", "disk", "meta", ""])
@pytest.mark.parametrize("more", [(), ("--load-in", "4bit")], ids=["plain", "4bit"])
def test_wrong_device_maps_are_refused(device_map: str, more: tuple[str, ...], llama: Folders, tfb: Any) -> None:
    status, _, said = tfb("predict", "-a", llama.adapter, "-d", llama.test, "--device-map", device_map, *more)
    wanted = f"error: device_map: got {device_map!r}, expected auto, balanced, balanced_low_0, sequential, or a device that is there"
    assert status != 0 and wanted in " ".join(said.split())


def test_other_ways_to_load_are_refused(llama: Folders, tfb: Any) -> None:
    status, _, said = tfb("predict", "-a", llama.adapter, "-d", llama.test, "--load-in", "2bit", "--device", "cpu")
    assert status != 0 and "error: load_in: got '2bit', expected 4bit or 8bit. Fix: leave it out" in said.replace(
        "\n", " "
    )


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("much", "got 'much', expected a number and MiB, GiB, MB or GB. Fix: write 8GiB, say"),
        ("8 apples", "got '8 apples', expected a number"),
        ("8GiB", "got '8GiB' on cpu, expected a GPU, whose memory it is about. Fix: leave it out"),
    ],
)
def test_memory_is_an_amount_of_a_gpus(memory: str, message: str, llama: Folders, tfb: Any) -> None:
    status, _, said = tfb("predict", "-a", llama.adapter, "-d", llama.test, "--memory", memory, "--device", "cpu")
    assert status != 0 and f"error: memory: {message}" in " ".join(said.split())


@pytest.mark.parametrize("device_map", ["cpu", "auto", "sequential"])
def test_a_device_map(device_map: str, llama: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 2**30})
    assert_as_on_one_device(load_adapter(str(llama.adapter), dtype="float32", device_map=device_map), llama, "cpu")


@pytest.mark.parametrize("span", ["all", "answer"])
def test_layers_that_lie_nowhere_between_calls(span: Any, llama: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's way to keep weights in host memory, with the CPU as the device that they are brought to."""
    import accelerate

    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 2**30})
    monkeypatch.setattr(
        "accelerate.dispatch_model", lambda model, places: accelerate.cpu_offload(model, torch.device("cpu"))
    )
    loaded = load_adapter(str(llama.adapter), dtype="float32", device_map="auto")
    assert {p.is_meta for n, p in loaded.model.named_parameters() if "lora_" not in n} == {True}
    assert_as_on_one_device(loaded, llama, "cpu", span=span)


@pytest.mark.gpu
def test_layers_that_a_gpu_has_no_room_for_stay_on_the_host(llama: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_adapter(str(llama.adapter), device="cpu", dtype="float32").model
    size = sum(p.numel() * p.element_size() for p in whole.parameters())
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: size // 2, "cpu": 2**30})
    loaded = load_adapter(str(llama.adapter), dtype="float32", device_map="sequential")
    places = {p.device.type for p in loaded.model.parameters()}
    assert places == {"cuda", "meta"}
    assert_as_on_one_device(loaded, llama, "cuda")
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: size // 8, "cpu": size // 8})
    with pytest.raises(ValueError, match="device_map: got 'sequential' for a model that memory is too small for"):
        load_adapter(str(llama.adapter), dtype="float32", device_map="sequential")


def assert_as_on_one_device(loaded: Any, llama: Folders, device: str, **options: Any) -> None:
    adapter = tfb_ext.bayesianize(loaded.model, sigma=SIGMA, **options)
    alone = load_adapter(str(llama.adapter), device=device, dtype="float32").model
    twin = tfb_ext.bayesianize(alone, sigma=SIGMA, **options)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    batch = zoo.moved(batch, device)
    torch.testing.assert_close(samples(adapter, batch), samples(twin, batch), atol=1e-5, rtol=1e-5)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    found, expected = (tfb_ext.generate(each, batch, samples=SAMPLES, **greedy) for each in (adapter, twin))
    assert torch.equal(found.sequences, expected.sequences)
    data = small_sets.encoded(4)
    for by in ("samples", "linear"):
        found, expected = (tfb_ext.predict(each, data, SAMPLES, by=by).probabilities for each in (adapter, twin))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_table_is_shown(tfb: Any) -> None:
    status, out, _ = tfb("info", "--support", "--json")
    assert status == 0
    assert [tuple(row.values()) for row in json.loads(out)["quantised bases"]] == support_table()
    assert "AwqLoraLinear" in tfb("info", "--support")[1] and "AwqLoraLinear" not in tfb("info")[1]


def test_the_table_is_what_is_tested() -> None:
    assert [row[:2] for row in support_table()] == list(QUANTISE)
    rows = [f"| {' | '.join(row)} |" for row in support_table()]
    assert "\n".join(rows) in SUPPORT.read_text(encoding="utf-8"), "docs/support.md: run python tests/test_quantised.py"


if __name__ == "__main__":
    print("\n".join(f"| {' | '.join(row)} |" for row in support_table()))
