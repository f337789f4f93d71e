"""The variance families against their analytic moments, against separate passes and definitions, in files, and refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import tfb_ext
from tfb_ext import ops
from tfb_ext.adapters.saving import config_of
from tfb_ext.errors import ConfigError, SamplingError
from tfb_ext.ops import reference
from tfb_ext.posterior.canonical import layer_posterior
from tfb_ext.posterior.config import FAMILIES, TFBConfig
from tfb_ext.research import families
from tfb_ext.research.families import add_full_rank_noise_

SIGMA, SAMPLES = 0.3, 4
IN_WEIGHTS = ["low-rank", "constant"]  # whose samples are weight matrices


def bayesian(name: str = "llama-head", **options: Any) -> Any:
    device = options.pop("device", "cpu")
    return tfb_ext.bayesianize(zoo.peft_model(name).to(device), **{"sigma": SIGMA, **options})


def predict(adapter: Any, batch: dict[str, Tensor], samples: Any = SAMPLES, **options: Any) -> Tensor:
    """Per-sample log probabilities (S, B, ..., V)."""
    with adapter.predictive(samples, keep_samples=True, **options) as view:
        adapter.model(**batch)
    assert view.sample_outputs is not None
    return view.sample_outputs


def logits(adapter: Any, batch: dict[str, Tensor], samples: int | list[int], sigma: float | None = None) -> Tensor:
    """Raw per-sample outputs (S, B, ..., V)."""
    count, rows = samples if isinstance(samples, int) else len(samples), len(batch["input_ids"])
    with adapter.sampling(samples, sigma):
        out = adapter.model(**{name: t.repeat(count, 1) for name, t in batch.items()}).logits
    return out.view(count, rows, *out.shape[1:])


def head_input(adapter: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the mean adapter's output head gets, (B, T, n)."""
    seen: list[Tensor] = []
    hook = adapter.anatomy.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        adapter.model(**batch)
    hook.remove()
    return seen[0]


def adapter_weights(adapter: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """``A``, ``B`` in float64 and ``s`` of one layer."""
    module = zoo.lora_layers(adapter)[name]
    a, b = module.lora_A[adapter.name].weight, module.lora_B[adapter.name].weight
    return a.detach().double(), b.detach().double(), module.scaling[adapter.name]


def per_direction(adapter: Any, name: str, family: str) -> Tensor:
    """Covariance (m, m) of ``dW x`` for ``sigma |x| = 1``, from the adapter's own weights."""
    _, b, scaling = adapter_weights(adapter, name)
    u, d, _ = torch.linalg.svd(b, full_matrices=False)
    u, m = u[:, d > 1e-5 * d[0]], b.shape[0]
    return scaling**2 * {"low-rank": u @ u.T, "constant": b @ b.T, "full-rank": torch.eye(m).double()}[family]


def misfit(
    left: Tensor, right: Tensor, expected: Tensor, variances: tuple[Tensor, Tensor], rounding: float = 0.0
) -> float:
    """Largest difference of the samples' mean product (S, a) x (S, b) from ``expected`` (a, b), in standard errors.

    Both have mean zero and the given variances, so a product's variance is v_a v_b + expected^2 (Isserlis). A share
    ``rounding`` of the product of the standard deviations is forgiven.
    """
    scale = variances[0][:, None] * variances[1][None, :]
    error = ((scale + expected.square()) / len(left)).sqrt()
    found = left.T @ right / len(left)
    return float((((found - expected).abs() - rounding * scale.sqrt()) / error).max())


# The form of a layer ----------------------------------------------------------------------------------------------------


def weights(rank_deficient: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 16, generator=generator), torch.randn(12, 4, generator=generator)
    if rank_deficient:
        b[:, 2] = b[:, 0] - 2 * b[:, 1]
    return a, b


@pytest.mark.parametrize("rank_deficient", [False, True])
def test_constant_is_the_adapters_own_matrices(rank_deficient: bool) -> None:
    a, b = weights(rank_deficient)
    found = layer_posterior("q", a, b, 2.0, "constant")
    assert torch.equal(found.basis, b) and torch.equal(found.mean, a)
    assert found.basis.data_ptr() != b.data_ptr() and found.mean.data_ptr() != a.data_ptr()
    assert (found.rank, found.dimensions) == (4, 4 * 16)
    low = layer_posterior("q", a, b, 2.0)
    assert low.rank == (3 if rank_deficient else 4) and low.dimensions == low.rank * 16
    assert torch.equal(found.singular_values, low.singular_values)
    assert torch.equal(found.omega(0.5), torch.full((low.rank,), 0.5, dtype=torch.float64))
    half = layer_posterior("q", a.half(), b.half(), 2.0, "constant")
    assert half.basis.dtype == half.mean.dtype == torch.float32


def test_full_rank_keeps_the_mean_in_its_basis() -> None:
    a, b = weights()
    found, low = layer_posterior("q", a, b, 2.0, "full-rank"), layer_posterior("q", a, b, 2.0)
    assert torch.equal(found.basis, low.basis) and torch.equal(found.mean, low.mean)
    assert found.dimensions == 12 * 16
    with pytest.raises(ValueError, match="layer 'q': a full-rank posterior has no Omega"):
        found.omega(0.5)


# Moments ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank_deficient", "dtype"),
    zoo.slow_but([(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)], (False, torch.float32)),
)
@pytest.mark.parametrize("family", zoo.slow_but(FAMILIES, "constant"))
def test_moments_of_the_outputs(family: str, rank_deficient: bool, dtype: torch.dtype) -> None:
    """Mean, covariance at a token, and covariance between tokens of one call, of the head's raw outputs."""
    model = zoo.peft_model("llama-head", dtype=dtype)
    if rank_deficient:
        b = model.get_base_model().lm_head.lora_B["default"].weight.data
        b[:, 3] = b[:, 0] + b[:, 2]
    adapter = tfb_ext.bayesianize(model, depth="head", family=family, sigma=SIGMA, antithetic=False)
    count, tokens = 4000, [0, 5]
    batch = zoo.inputs(1, padded=False)
    with torch.no_grad():
        mean = adapter.model(**batch).logits[0, tokens].double()
    x = head_input(adapter, batch)[0, tokens].double()
    passes = torch.arange(count).split(500)
    outputs = torch.cat([logits(adapter, batch, p.tolist())[:, 0, tokens].double() for p in passes])
    unit = per_direction(adapter, "lm_head", family)
    variances = [SIGMA**2 * v.dot(v) * unit.diagonal() for v in x]
    # Outputs and basis are rounded to the base's type.
    rounding = 0.0 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    deviation = outputs - mean
    error = (torch.stack(variances) / count).sqrt()
    assert (deviation.mean(0).abs() <= 5 * error + (rounding + 1e-6) * mean.abs().max()).all()
    for i, j in ((0, 0), (1, 1), (0, 1)):
        shared = x[i].dot(x[j]) if i == j or family != "full-rank" else 0.0
        pair = deviation[:, i], deviation[:, j]
        spread = variances[i], variances[j]
        assert misfit(*pair, SIGMA**2 * shared * unit, spread, rounding) < 5
        # A noise of another size, or one that tokens share or do not share, would be seen.
        other = 1.3 * shared if shared else x[i].dot(x[j])
        assert misfit(*pair, SIGMA**2 * other * unit, spread, rounding) > 5


def test_families_differ_in_the_directions_they_leave_alone() -> None:
    batch = zoo.inputs(1, padded=False)
    _, b, _ = adapter_weights(bayesian(), "lm_head")
    outside = torch.linalg.svd(b, full_matrices=True)[0][:, 4:].float()
    spread = {}
    for family in FAMILIES:
        adapter = bayesian(depth="head", family=family)
        with torch.no_grad():
            mean = adapter.model(**batch).logits
        spread[family] = float(((logits(adapter, batch, 2) - mean) @ outside).abs().max())
    assert spread["low-rank"] < 1e-4 and spread["constant"] < 1e-4 and spread["full-rank"] > 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_mirrored_samples_average_to_the_mean(family: str) -> None:
    """At the head the outputs are linear in the noise, so a mirrored pair's average is the mean adapter's."""
    adapter = bayesian(depth="head", family=family)
    batch = zoo.inputs(2)
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        mean = adapter.model(**batch).logits[keep]
    found = logits(adapter, batch, 4)[:, keep]
    assert (found[0] - mean).abs().max() > 1
    for even, odd in ((0, 1), (2, 3)):
        assert torch.allclose((found[even] + found[odd]) / 2, mean, atol=2e-5)
    assert (found[0] - found[2]).abs().max() > 1
    adapter.antithetic = False
    independent = logits(adapter, batch, 4)[:, keep]
    assert torch.equal(independent[0], found[0])
    assert ((independent[0] + independent[1]) / 2 - mean).abs().max() > 0.5


@pytest.mark.parametrize("name", zoo.slow_but(["llama", "gpt2", "bert"], "llama"))
@pytest.mark.parametrize("family", FAMILIES)
def test_no_sigma_is_the_adapter(family: str, name: str) -> None:
    adapter = bayesian(name, family=family)
    batch = zoo.batch_for(name)
    keep = zoo.real_positions(name, batch)
    with torch.no_grad():
        mean = adapter.model(**batch).logits
    assert torch.allclose(
        logits(adapter, batch, 2, sigma=1e-9)[:, keep], mean[keep].expand(2, *mean[keep].shape), atol=1e-4
    )


# Constant: the same kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("name", ["llama-head", "gemma3", "gpt2", "bert"])
def test_constant_equals_separate_passes(name: str, device: str) -> None:
    adapter = bayesian(name, device=device, family="constant", depth=2)
    batch = zoo.batch_for(name, device=device)
    keep = zoo.real_positions(name, batch)

    def own() -> Tensor:
        return torch.log_softmax(adapter.model(**batch).logits, dim=-1)

    alone = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, own)
    with adapter.predictive(SAMPLES):
        found = adapter.model(**batch).logits
    assert alone.std(0).max() > 0.01
    assert torch.allclose(found[keep], zoo.average(alone)[keep], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", IN_WEIGHTS)
def test_half_types_are_within_their_own_rounding(family: str, dtype: torch.dtype) -> None:
    """The head alone against float64, beside the same arithmetic in plain torch with B in the base's type."""
    model = zoo.peft_model("llama-head", dtype=dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # as PEFT keeps adapters
            parameter.data = parameter.data.float() * (1 + 1e-3)
    adapter = tfb_ext.bayesianize(model, depth="head", family=family, sigma=SIGMA)
    with adapter.sampling(3):  # whose guard runs once
        pass
    module = zoo.lora_layers(adapter)["lm_head"]
    assert module.tfb_basis_default.dtype == dtype
    assert module.tfb_mean_default.dtype == torch.float32
    batch = zoo.inputs(2, padded=False)
    seen: list[Tensor] = []  # the trunk rounds a batch of other size in another way
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = logits(adapter, batch, 3)[2]
    hook.remove()
    x, base = seen[0].unflatten(0, (3, 2))[2], module.base_layer.weight
    left, right = adapter.sample_weights("lm_head", 2)
    a, b, scaling = adapter_weights(adapter, "lm_head")
    if family == "constant":
        assert torch.equal(left.double(), b)
    exact = x.double() @ base.double().T + scaling * (x.double() @ right.double().T) @ left.double().T
    low = x @ base.T + ((x @ right.to(dtype).T) @ left.to(dtype).T) * scaling
    zoo.assert_as_exact_as(found, low, exact, 1.0)


# Full rank: the noise -----------------------------------------------------------------------------------------------------


def drawn(
    tokens: int, features: int, samples: list[int], seed: int = 5, layer: int = 77, antithetic: bool = False, **o: Any
) -> Tensor:
    """The normals alone, (S, tokens, features): unit scale, rows of length 1."""
    out = torch.zeros(len(samples) * tokens, o["columns"].numel() if "columns" in o else features)
    x = torch.zeros(len(samples) * tokens, 3)
    x[:, 1] = 1.0
    add_full_rank_noise_(
        out, x, features, 1.0, torch.ones(len(samples)), torch.tensor(samples, dtype=torch.int32),
        torch.tensor([seed]), layer, antithetic, **o,
    )  # fmt: skip
    return out.view(len(samples), tokens, -1)


def defined(tokens: int, features: int, seed: int, layer: int, sample: int, part: int) -> Tensor:
    """The docstring's definition of ``e`` for ``tokens`` rows, in parts of ``part``."""
    pieces = [
        reference.token_noise(min(part, tokens - start), features, seed ^ (c << 32), layer, sample)
        for c, start in enumerate(range(0, tokens, part))
    ]
    return torch.cat(pieces)


@pytest.mark.parametrize("elements", [2**24, 70, 20, 3])
def test_noise_is_what_the_docstring_says(elements: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "NOISE_ELEMENTS", elements)
    tokens, features, number, layer = 11, 10, 2**40 + 3, 0xDEADBEEF
    part = max(1, elements // features)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3 * tokens, 14, generator=generator).to(device)[:, ::2]
    before = torch.randn(3 * tokens, features, generator=generator).to(device)
    sigma = torch.tensor([0.5, 2.0, 0.25], device=device)
    samples = torch.tensor([4, 0, 7], dtype=torch.int32, device=device)
    seed = torch.tensor([number], device=device)
    y = before.clone()
    same = add_full_rank_noise_(y, x, features, -1.5, sigma, samples, seed, layer, False)
    assert same is y
    for k, sample in enumerate(samples.tolist()):
        rows = slice(k * tokens, (k + 1) * tokens)
        e = defined(tokens, features, number, layer, sample, part).to(device)
        exact = before[rows] - 1.5 * sigma[k] * x[rows].double().norm(dim=1, keepdim=True) * e
        # 1e-5 a normal between devices, on a scale of 1.5 sigma |x|, and float32's rounding.
        assert (y[rows] - exact).abs().max() < 1.5e-5 * float(sigma[k] * x[rows].norm(dim=1).max()) + 1e-5
    columns = torch.tensor([7, 0, 3], device=device)
    picked = before[:, columns].clone()
    add_full_rank_noise_(picked, x, features, -1.5, sigma, samples, seed, layer, False, columns)
    assert torch.equal(picked, y[:, columns])


@pytest.mark.parametrize("features", [4099, 128_256])
def test_wide_layers(features: int, device: torch.device) -> None:
    """More outputs than any rank a kernel is tuned for."""
    y = torch.zeros(4, features, device=device)
    arguments = 2.0, torch.ones(2, device=device), torch.tensor([3, 1], dtype=torch.int32, device=device)
    add_full_rank_noise_(
        y, torch.ones(4, 9, device=device), features, *arguments, torch.tensor([8], device=device), 21, False
    )
    exact = torch.cat([reference.token_noise(2, features, 8, 21, k) for k in (3, 1)])
    assert (y.cpu() - 6 * exact).abs().max() < 1e-4


@pytest.mark.parametrize("elements", [2**24, 50])
def test_a_samples_noise_does_not_depend_on_its_company(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "NOISE_ELEMENTS", elements)
    together = drawn(12, 9, [6, 3, 1, 3])
    assert torch.equal(together[1], together[3])
    for k, sample in enumerate((6, 3, 1)):
        assert torch.equal(drawn(12, 9, [sample])[0], together[k])
    mirrored = drawn(12, 9, [6, 7], antithetic=True)
    assert torch.equal(mirrored[0], together[0]) and torch.equal(mirrored[1], -mirrored[0])


def test_no_normal_is_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, samples, layers, seeds and the weight noise of the same layer and sample: all apart."""
    monkeypatch.setattr(families, "NOISE_ELEMENTS", 40)
    draws = [
        drawn(20, 8, [2]),
        drawn(20, 8, [3]),
        drawn(20, 8, [2], layer=78),
        drawn(20, 8, [2], seed=6),
        ops.noise(20, 8, 5, 77, 2),
        ops.noise(20, 8, 5 ^ (1 << 32), 77, 2),
    ]
    flat = torch.cat([d.flatten() for d in draws])
    assert flat.unique().numel() == flat.numel()


def test_noise_is_standard_normal_across_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "NOISE_ELEMENTS", 64 * 50)
    tokens, features = 400, 64
    e = drawn(tokens, features, [1])[0].double()
    count = tokens * features
    assert abs(float(e.mean())) < 5 / math.sqrt(count)
    assert abs(float(e.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float(e.pow(4).mean()) - 3) < 5 * math.sqrt(96 / count)
    for shifted in (e[50:] * e[:-50], e[1:] * e[:-1], e[:, 1:] * e[:, :-1], e[:, 4:] * e[:, :-4]):
        assert abs(float(shifted.mean())) < 5 / math.sqrt(shifted.numel())


def test_memory_beside_the_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 4 * families.NOISE_ELEMENTS == 64 * 2**20
    monkeypatch.setattr(families, "NOISE_ELEMENTS", 1000)
    y, x = torch.zeros(5 * 90, 100, dtype=torch.bfloat16), torch.ones(5 * 90, 700, dtype=torch.bfloat16)
    with zoo.Largest() as largest:
        add_full_rank_noise_(
            y, x, 100, 1.0, torch.ones(5), torch.arange(5, dtype=torch.int32), torch.tensor([0]), 1, False
        )
    assert largest.elements <= 1000 and y.abs().max() > 1


def test_no_rows() -> None:
    y = torch.zeros(0, 5)
    empty = (
        torch.zeros(0, 3),
        5,
        1.0,
        torch.ones(2),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([9]),
        3,
        False,
    )
    assert add_full_rank_noise_(y, *empty).shape == (0, 5)


def test_noise_of_half_outputs_is_added_in_float32() -> None:
    x = torch.full((6, 40), 3.0, dtype=torch.bfloat16)
    arguments = (x, 8, 0.5, torch.ones(2), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([9]), 3, False)
    exact = add_full_rank_noise_(torch.full((6, 8), 100.0), *arguments)
    found = add_full_rank_noise_(torch.full((6, 8), 100.0, dtype=torch.bfloat16), *arguments)
    assert torch.equal(found, exact.bfloat16())


# Full rank: in the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("name", ["llama-head", "gpt2", "bert"])
def test_the_model_equals_the_definitions_in_plain_torch(name: str, device: str) -> None:
    # With a larger sigma rounding would grow from block to block.
    adapter = bayesian(name, device=device, family="full-rank", depth=3, sigma=0.05)
    batch = zoo.batch_for(name, device=device)
    keep = zoo.real_positions(name, batch)
    found = predict(adapter, batch)[:, keep]
    assert found.std(0).max() > 0.01
    with zoo.Operators(plain=True):
        assert torch.allclose(found, predict(adapter, batch)[:, keep], atol=1e-4)


def test_samples_in_pieces_are_the_same_samples() -> None:
    adapter = bayesian(family="full-rank", depth=2)
    batch = zoo.batch_for("llama-head")
    together = predict(adapter, batch, [5, 3, 6])
    for k, sample in enumerate((5, 3, 6)):
        assert torch.allclose(predict(adapter, batch, [sample])[0], together[k], atol=1e-5)


def test_label_columns_get_their_own_noise() -> None:
    adapter = bayesian(family="full-rank", depth="head")
    batch, columns = zoo.batch_for("llama-head"), torch.tensor([4, 60, 11])
    keep = batch["attention_mask"].bool()
    whole = torch.log_softmax(predict(adapter, batch)[..., columns], dim=-1)
    assert torch.allclose(predict(adapter, batch, columns=columns)[:, keep], whole[:, keep], atol=1e-5)


@pytest.mark.slow
def test_noise_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "NOISE_ELEMENTS", 40)  # several parts
    y, x = torch.zeros(12, 8), torch.ones(12, 5)
    arguments = (x, 8, 0.5, torch.ones(2), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([9]), 3, False)
    torch.compiler.reset()
    compiled = torch.compile(add_full_rank_noise_, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(y.clone(), *arguments), add_full_rank_noise_(y.clone(), *arguments))


@pytest.mark.parametrize("family", zoo.slow_but(["constant", "full-rank"], "constant"))
def test_predict_and_search_serve_every_family(family: str) -> None:
    import small_sets

    adapter = bayesian("llama", family=family, depth=1)
    data = small_sets.labelled(adapter, small_sets.encoded(), wrong_every=4)
    found = tfb_ext.search_sigma(adapter, data)
    assert found.sigma > 0
    assert torch.isfinite(tfb_ext.predict(adapter, data, 4).probabilities).all()


# Files and refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "mode"),
    [("low-rank", "weight"), ("constant", "weight"), ("constant", "flipout"), ("full-rank", "token")],
)
def test_save_and_load(family: str, mode: str, tmp_path: Path) -> None:
    adapter = bayesian(family=family, mode=mode, depth=2, seed=11)
    assert ("family" in repr(adapter)) == (family != "low-rank")
    place = adapter.save_pretrained(tmp_path)
    assert json.loads((place / "tfb_config.json").read_text())["family"] == family
    loaded = tfb_ext.load(zoo.peft_model("llama-head").unload(), place)
    assert (loaded.family, loaded.mode) == (family, mode)
    batch = zoo.batch_for("llama-head")
    assert torch.equal(predict(loaded, batch), predict(adapter, batch))


def test_files_without_the_field_are_low_rank(tmp_path: Path) -> None:
    path = bayesian().save_pretrained(tmp_path) / "tfb_config.json"
    raw = json.loads(path.read_text())
    del raw["family"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="family is None, expected 'low-rank' or 'constant' or 'full-rank'"):
        TFBConfig.read(tmp_path)
    path.write_text(json.dumps({**raw, "format_version": 1, "fingerprint": None}))
    assert tfb_ext.load(zoo.peft_model("llama-head").unload(), tmp_path).family == "low-rank"


def test_bad_families_in_files(tmp_path: Path) -> None:
    good = config_of(bayesian(family="full-rank"))
    for change, words in (
        ({"family": "isotropic"}, "family is 'isotropic', expected 'low-rank' or 'constant' or 'full-rank'"),
        ({"mode": "weight"}, "mode is 'weight', expected 'token', the only one of family 'full-rank'"),
    ):
        dataclasses.replace(good, **change).write(tmp_path)
        with pytest.raises(ConfigError, match=words):
            TFBConfig.read(tmp_path)


def test_info_shows_the_family(tmp_path: Path) -> None:
    pytest.importorskip("typer", reason="the command line needs typer and rich")
    from typer.testing import CliRunner

    from tfb_ext.app import cli

    bayesian(family="constant").save_pretrained(tmp_path)
    said = CliRunner().invoke(cli.app, ["info", str(tmp_path)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert said.exit_code == 0 and any(
        line.split() == ["adapter:", "family", "constant"] for line in said.stdout.splitlines()
    )


def test_refusals() -> None:
    model = zoo.peft_model("llama")
    with pytest.raises(ValueError, match="family is 'isotropic', expected one of 'low-rank', 'constant', 'full-rank'"):
        tfb_ext.bayesianize(model, family="isotropic")
    for mode in ("weight", "flipout"):
        with pytest.raises(
            ValueError, match=f"mode is '{mode}', but the family 'full-rank' has noise for every token only"
        ):
            tfb_ext.bayesianize(model, family="full-rank", mode=mode)
    assert not any(getattr(m, "lora_variant", None) for m in model.modules())  # nothing was attached
    adapter = tfb_ext.bayesianize(model, family="full-rank", sigma=SIGMA)
    assert (adapter.mode, adapter.family) == ("token", "full-rank")
    with pytest.raises(ValueError, match="expected mode='token', or the family 'low-rank' or 'constant'"):
        adapter.mode = "weight"
    assert adapter.mode == "token"
    with pytest.raises(ValueError, match="samples of mode 'token' are no weights; use the family 'low-rank'"):
        adapter.sample_weights(adapter.layers[0], 0)
    ids = zoo.batch_for("llama", 1)["input_ids"]
    with pytest.raises(SamplingError, match="numbers its noise by the tokens of one call"), adapter.predictive(SAMPLES):
        adapter.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)


def test_unload_leaves_the_model_as_it_was() -> None:
    for family in FAMILIES:
        model = zoo.peft_model("llama")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        tfb_ext.bayesianize(model, family=family).unload()
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
