"""The fused predictive against separate passes with written-out sample weights, on every architecture of the zoo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import small_sets
import torch
import transformers as tf
import zoo
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tfb_ext
from tfb_ext.errors import SamplingError, UnsupportedModelError
from tfb_ext.forward import anatomy, fold
from tfb_ext.forward.fold import Predictive

SAMPLES, SIGMA = 4, 0.3
DEPTHS = zoo.slow_but(
    [(name, depth) for name in zoo.MODELS for depth in ("all", 2)] + [("llama-head", "head")],
    ("llama", "all"), ("llama", 2), ("gpt2", "all"), ("bert", 2), ("llama-head", "head"),
)  # fmt: skip


def log_probabilities(adapter: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.log_softmax(adapter.model(**batch).logits.double(), dim=-1)


bayesian = partial(zoo.bayesian, sigma=SIGMA)


def pooled(name: str, outputs: Tensor) -> Tensor:
    """Outputs (S, B, T, V) of a head that is applied to every token, at the last token as the classifier's are."""
    return outputs[:, :, -1] if name == "llama-cls" else outputs


def footprint(adapter: Any) -> dict[str, Any]:
    """Everything a context changes and must put back."""
    model = adapter.model
    return {
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "own": sorted(name for name, m in model.named_modules() if "forward" in m.__dict__),
        "open": sorted(name for name, m in model.named_modules() if getattr(m, "tfb_open", None) is not None),
        "cap": getattr(adapter.anatomy.model.config, "final_logit_softcapping", None),
        "state": (adapter.is_sampling, adapter.open_context),
        "grad": torch.is_grad_enabled(),
    }


# The claim: equal to separate passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize(("name", "depth"), DEPTHS)
def test_equals_separate_passes(name: str, depth: str | int, device: str) -> None:
    adapter = bayesian(name, device, depth=depth)
    exact_adapter = zoo.float64_copy(adapter)
    for rows in (1, 3):
        batch = zoo.batch_for(name, rows, device)
        keep = zoo.real_positions(name, batch)
        exact = zoo.separate_passes(exact_adapter, range(SAMPLES), SIGMA, log_probabilities(exact_adapter, batch))
        low = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, log_probabilities(adapter, batch))
        with torch.no_grad():
            mean = log_probabilities(exact_adapter, batch)()
        spread = float((exact - mean)[:, keep].abs().max()) if name in zoo.CAUSAL else float((exact - mean).abs().max())
        assert spread > 0.01  # the samples must differ visibly from the mean, or the comparison says nothing
        with adapter.predictive(SAMPLES, keep_samples=True) as view:
            logits = adapter.model(**batch).logits
        assert logits.dtype == torch.float32
        zoo.assert_as_exact_as(logits[keep], zoo.average(low)[keep], zoo.average(exact)[keep], spread)
        assert view.folded is not None and torch.equal(pooled(name, view.folded[None])[0][keep], logits[keep])
        assert view.sample_outputs is not None
        per_sample = view.sample_outputs
        for k in range(SAMPLES):
            zoo.assert_as_exact_as(per_sample[k][keep], low[k][keep], exact[k][keep], spread)


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize("name", zoo.slow_but(["llama-head", "gemma3", "gpt2", "llama-cls"], "llama-head"))
def test_bfloat16_is_within_its_own_rounding(name: str, device: str) -> None:
    adapter = bayesian(name, device, dtype=torch.bfloat16, depth=2)
    batch = zoo.batch_for(name, device=device)
    keep = zoo.real_positions(name, batch)
    exact_adapter = zoo.float64_copy(adapter)
    exact = zoo.separate_passes(exact_adapter, range(SAMPLES), SIGMA, log_probabilities(exact_adapter, batch))
    low = zoo.separate_passes(adapter, range(SAMPLES), SIGMA, log_probabilities(adapter, batch))
    with adapter.predictive(SAMPLES):
        logits = adapter.model(**batch).logits
    assert logits.dtype == torch.float32
    zoo.assert_as_exact_as(logits[keep], zoo.average(low)[keep], zoo.average(exact)[keep], 1.0)


def test_a_sample_does_not_depend_on_its_company() -> None:
    adapter = bayesian("llama", depth=2)
    batch = zoo.batch_for("llama")
    with adapter.predictive([5, 3, 6, 3], keep_samples=True) as view:
        adapter.model(**batch)
    with adapter.predictive([3], keep_samples=True) as alone:
        adapter.model(**batch)
    together, single = view.sample_outputs, alone.sample_outputs
    assert together is not None and single is not None
    assert torch.allclose(together[1], single[0], atol=1e-5)
    assert torch.allclose(together[1], together[3], atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.01


def test_antithetic_samples_mirror_each_other() -> None:
    adapter = bayesian("llama")
    basis, even = adapter.sample_weights(adapter.layers[0], 4)
    _, odd = adapter.sample_weights(adapter.layers[0], 5)
    assert torch.allclose(even + odd, 2 * adapter.posteriors[0].mean, atol=1e-6)
    plain = tfb_ext.bayesianize(zoo.peft_model("llama"), sigma=SIGMA, antithetic=False)
    assert torch.equal(plain.sample_weights(adapter.layers[0], 4)[1], even)
    assert (plain.sample_weights(adapter.layers[0], 5)[1] - odd).abs().max() > 0.1
    assert torch.equal(basis, adapter.posteriors[0].basis)


def test_seed_and_sigma_reach_the_layers() -> None:
    adapter = bayesian("qwen2")
    batch = zoo.batch_for("qwen2")

    def predict(**options: Any) -> Tensor:
        with adapter.predictive(SAMPLES, **options):
            return adapter.model(**batch).logits

    first = predict()
    assert torch.equal(first, predict())
    assert (predict(sigma=0.5) - first).abs().max() > 0.01
    adapter.seed = 2**64 - 1
    assert (predict() - first).abs().max() > 0.01
    adapter.seed = 0
    assert torch.equal(first, predict(sigma=SIGMA))
    with torch.no_grad():
        mean = torch.log_softmax(adapter.model(**batch).logits, dim=-1)
    assert torch.allclose(predict(sigma=1e-7), mean, atol=1e-4)


# Views: columns, groups, pieces, trunk ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.slow_but(["llama", "llama-head", "gemma2", "bert"], "llama-head", "bert"))
@pytest.mark.parametrize("depth", ["all", 1])
def test_columns_are_the_full_distribution_renormalised(name: str, depth: str | int) -> None:
    adapter = bayesian(name, depth=depth)
    batch = zoo.batch_for(name)
    keep = zoo.real_positions(name, batch)
    columns = torch.tensor([2, 0]) if name == "bert" else torch.tensor([11, 3, 90])
    with adapter.predictive(SAMPLES, keep_samples=True) as full:
        adapter.model(**batch)
    with adapter.predictive(SAMPLES, keep_samples=True, columns=columns) as view:
        logits = adapter.model(**batch).logits
    assert full.sample_outputs is not None and view.sample_outputs is not None
    expected = torch.log_softmax(full.sample_outputs.double()[..., columns], dim=-1)
    assert torch.allclose(view.sample_outputs.double()[:, keep], expected[:, keep], atol=2e-5)
    assert torch.allclose(logits.double()[keep], zoo.average(expected)[keep], atol=2e-5)


def test_columns_of_a_head_with_two_adapters() -> None:
    adapter = bayesian("llama-head", depth="head")
    adapter.model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    zoo.randomise(adapter.model)
    adapter.unload()
    adapter = tfb_ext.bayesianize(adapter.model, depth="head", sigma=SIGMA)
    adapter.model.base_model.set_adapter(["default", "other"])
    batch, columns = zoo.batch_for("llama-head"), torch.tensor([5, 50])
    with adapter.predictive(SAMPLES):
        full = adapter.model(**batch).logits
    with adapter.predictive(SAMPLES, keep_samples=True) as every:
        adapter.model(**batch)
    with adapter.predictive(SAMPLES, columns=columns):
        some = adapter.model(**batch).logits
    assert every.sample_outputs is not None and torch.isfinite(full[batch["attention_mask"].bool()]).all()
    expected = zoo.average(torch.log_softmax(every.sample_outputs[..., columns], dim=-1))
    keep = batch["attention_mask"].bool()
    assert torch.allclose(some[keep], expected[keep], atol=2e-5)


@pytest.mark.parametrize("name", zoo.slow_but(["llama-head", "gemma2", "bert"], "llama-head"))
@pytest.mark.parametrize("sigmas", [1, 2])
def test_head_in_pieces_equals_whole(name: str, sigmas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = bayesian(name)
    batch = zoo.batch_for(name)
    keep = zoo.real_positions(name, batch)
    seen: list[int] = []
    head_forward = adapter.anatomy.head.forward

    def passed(limit: int) -> Predictive:
        monkeypatch.setattr(fold, "FOLD_BYTES", limit)
        seen.clear()
        view = Predictive(adapter.batch(3, [0.1, 0.4][:sigmas]), keep_samples=True)
        with adapter.fanned(view):
            adapter.model(**batch)
        return view

    monkeypatch.setattr(
        adapter.anatomy.head, "forward", lambda hidden: seen.append(hidden.shape[0]) or head_forward(hidden)
    )
    zoo.compared(adapter)
    whole = passed(2**30)
    assert len(seen) == 1
    outputs = adapter.anatomy.model.config.num_labels if name == "bert" else zoo.VOCAB
    per_sample = 4 * 3 * (outputs if name == "bert" else outputs * 9)
    for limit, pieces in ((1, 3 * sigmas), (2 * per_sample, -(-3 * sigmas // 2))):
        parts = passed(limit)
        if name != "bert":  # whose wrapped head has no out_features, so its pieces are counted by the vocabulary
            assert len(seen) == pieces
        assert sum(seen) == 3 * 3 * sigmas
        assert whole.folded is not None and parts.folded is not None
        assert torch.allclose(whole.folded[keep], parts.folded[keep], atol=2e-5)
        assert whole.sample_outputs is not None and parts.sample_outputs is not None
        assert torch.allclose(whole.sample_outputs[:, keep], parts.sample_outputs[:, keep], atol=2e-5)


@pytest.mark.parametrize("name", zoo.slow_but(["llama", "gemma3", "gpt2", "bert", "llama-cls"], "llama", "bert"))
@pytest.mark.parametrize("depth", [1, 3])
def test_trunk_recorded_and_replayed_equals_none(name: str, depth: int) -> None:
    adapter = bayesian(name, depth=depth)
    batches = {key: zoo.batch_for(name, rows) for key, rows in ((7, 3), (8, 1))}
    trunk = zoo.trunk(adapter)
    calls: list[int] = []
    lowest = adapter.anatomy.blocks[0]
    attention = next(m for n, m in lowest.named_modules() if n.endswith(("q_proj", "c_attn", "query")))
    hook = attention.register_forward_hook(lambda *_: calls.append(1))
    for sigma in (0.2, 0.4):
        for key, batch in batches.items():
            keep = zoo.real_positions(name, batch)
            with adapter.predictive(SAMPLES, sigma=sigma):
                expected = adapter.model(**batch).logits
            calls.clear()
            recording = (trunk.firsts[0], key) not in trunk.hidden
            with adapter.fanned(Predictive(adapter.batch(SAMPLES, sigma), trunk=trunk, key=key)):
                logits = adapter.model(**batch).logits
            assert len(calls) == (1 if recording else 0)
            assert torch.equal(logits[keep], expected[keep])
    hook.remove()
    assert trunk.bytes() == sum(4 * t.numel() for (t,) in trunk.hidden.values()) > 0
    assert {key for _, key in trunk.hidden} == {7, 8}
    assert not any("forward" in block.__dict__ for block in adapter.anatomy.blocks)


def test_one_trunk_serves_several_depths() -> None:
    """What a pass keeps on its way up serves every higher first block; a lower one runs what lies between."""
    adapter = bayesian("llama-head")
    batch = zoo.batch_for("llama-head", 3)
    keep = batch["attention_mask"].bool()
    ran = [small_sets.rows_through(b.input_layernorm) for b in adapter.anatomy.blocks]

    def call(first: int, trunk: Any) -> Tensor:
        for rows in ran:
            rows.clear()
        with adapter.fanned_at(first, Predictive(adapter.batch(SAMPLES, 0.3), trunk=trunk, key=0)):
            return adapter.model(**batch).logits[keep]

    alone = {first: call(first, None) for first in (1, 2, 3, 4)}
    trunk = zoo.trunk(adapter, 3, 2, 1, "head")
    assert trunk.firsts == (1, 2, 3, 4)
    assert torch.equal(call(2, trunk), alone[2]) and [b for b, _ in trunk.hidden] == [1, 2]
    assert [len(rows) for rows in ran] == [1, 1, 1, 1]
    assert torch.equal(call(3, trunk), alone[3]) and [len(rows) for rows in ran] == [0, 0, 1, 1]
    assert ran[2] == [3] and ran[3] == [3 * SAMPLES]
    assert torch.equal(call(1, trunk), alone[1]) and [len(rows) for rows in ran] == [0, 1, 1, 1]
    assert torch.equal(call(4, trunk), alone[4]) and [len(rows) for rows in ran] == [0, 0, 0, 1]
    for first in (1, 2, 3, 4):
        assert torch.equal(call(first, trunk), alone[first]) and [len(rows) for rows in ran] == [0] * first + [1] * (
            4 - first
        )


def test_a_trunk_keeps_within_its_limit() -> None:
    adapter = bayesian("llama", depth=1)
    trunk = zoo.trunk(adapter, limit=1.0)
    batch = zoo.inputs()
    for _ in range(2):
        with adapter.fanned(Predictive(adapter.batch(SAMPLES, 0.3), trunk=trunk, key=0)):
            assert adapter.model(**batch).logits.isfinite().all()
    assert not trunk.hidden and trunk.bytes() == 0


def test_only_the_upper_blocks_carry_the_samples() -> None:
    adapter = bayesian("llama", depth=1)
    rows: dict[int, int] = {}
    hooks = [
        block.mlp.register_forward_hook(lambda m, a, o, i=i: rows.update({i: o.shape[0]}))
        for i, block in enumerate(adapter.anatomy.blocks)
    ]
    with adapter.predictive(SAMPLES):
        adapter.model(**zoo.batch_for("llama"))
    for hook in hooks:
        hook.remove()
    assert rows == {0: 3, 1: 3, 2: 3, 3: 3 * SAMPLES}


def test_sampling_rows_laid_out_by_the_caller() -> None:
    adapter = bayesian("llama-head", depth=2)
    batch = zoo.batch_for("llama-head")
    keep = batch["attention_mask"].bool()
    with adapter.predictive(SAMPLES, keep_samples=True) as view:
        adapter.model(**batch)
    with adapter.sampling(SAMPLES):
        raw = adapter.model(**{k: v.repeat(SAMPLES, 1) for k, v in batch.items()}).logits
    assert view.sample_outputs is not None
    per_sample = torch.log_softmax(raw, dim=-1).reshape(SAMPLES, 3, *raw.shape[1:])
    assert torch.allclose(per_sample[:, keep], view.sample_outputs[:, keep], atol=2e-5)
    with adapter.sampling(SAMPLES), pytest.raises(SamplingError, match="got 3 rows, expected a multiple of 4"):
        adapter.model(**batch)


# Heads and losses ---------------------------------------------------------------------------------------------------


def test_labels_give_the_predictive_nll() -> None:
    for name in ("llama", "llama-cls"):
        adapter = bayesian(name)
        batch = zoo.batch_for(name)
        labels = batch["input_ids"].clone() if name == "llama" else torch.tensor([2, 0, 1])
        if name == "llama":
            labels[batch["attention_mask"] == 0] = -100
        with adapter.predictive(SAMPLES):
            out = adapter.model(**batch, labels=labels)
        if name == "llama":
            picked = out.logits[:, :-1].gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
            expected = -picked[labels[:, 1:] >= 0].mean()
        else:
            expected = -out.logits.gather(-1, labels[:, None]).mean()
        assert torch.allclose(out.loss, expected, atol=1e-5)
        assert torch.logsumexp(out.logits, -1).abs().max() < 1e-5


def classifier(labels: int, problem: str | None) -> Any:
    torch.manual_seed(0)
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**zoo._COMMON, num_labels=labels, problem_type=problem))
    model.score.weight.data.mul_(20)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS"))
    zoo.randomise(peft, 0.3)
    return tfb_ext.bayesianize(peft.eval(), sigma=SIGMA)


def raw_outputs(adapter: Any, batch: dict[str, Tensor]) -> Tensor:
    return zoo.separate_passes(adapter, range(SAMPLES), SIGMA, lambda: adapter.model(**batch).logits.double())


def test_multi_label_head_averages_probabilities() -> None:
    adapter, batch = classifier(5, "multi_label_classification"), zoo.batch_for("llama-cls")
    raw = raw_outputs(adapter, batch)
    expected = torch.logit(torch.sigmoid(raw).mean(0))
    with adapter.predictive(SAMPLES, keep_samples=True) as view:
        logits = adapter.model(**batch).logits
    assert torch.allclose(logits.double(), expected, atol=1e-4)
    assert (raw.mean(0) - expected).abs().max() > 0.01  # the mean of the logits is something else
    assert view.sample_outputs is not None
    per_sample = view.sample_outputs.double()
    assert torch.allclose(per_sample, nn.functional.logsigmoid(raw), atol=1e-4)


def test_multi_label_head_stays_finite_when_sure() -> None:
    adapter, batch = classifier(5, "multi_label_classification"), zoo.batch_for("llama-cls")
    adapter.anatomy.head.modules_to_save["default"].weight.data.mul_(200)
    raw = raw_outputs(adapter, batch)
    assert raw.abs().min(0).values.max() > 30  # float32's sigmoid is 1 from 17 on
    with adapter.predictive(SAMPLES):
        out = adapter.model(**batch, labels=torch.ones(3, 5))
    expected = torch.logsumexp(nn.functional.logsigmoid(raw), 0) - torch.logsumexp(nn.functional.logsigmoid(-raw), 0)
    assert torch.isfinite(out.loss)
    assert torch.allclose(out.logits.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("problem", ["regression", None])
def test_regression_head_averages_outputs(problem: str | None) -> None:
    adapter, batch = classifier(1, problem), zoo.batch_for("llama-cls")
    raw = raw_outputs(adapter, batch)
    with adapter.predictive(SAMPLES, keep_samples=True) as view:
        logits = adapter.model(**batch).logits
    assert torch.allclose(logits.double(), raw.mean(0), atol=1e-4)
    assert view.sample_outputs is not None
    assert torch.allclose(view.sample_outputs.double(), raw, atol=1e-4)


def test_soft_cap_is_not_put_on_classification_scores() -> None:
    torch.manual_seed(0)
    config = tf.Gemma2Config(**zoo._COMMON, head_dim=8, sliding_window=4, num_labels=3, final_logit_softcapping=0.5)
    peft = get_peft_model(
        tf.Gemma2ForSequenceClassification(config), LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    )
    peft.base_model.model.score.modules_to_save["default"].weight.data.mul_(30)
    zoo.randomise(peft)
    adapter, batch = tfb_ext.bayesianize(peft.eval(), sigma=SIGMA), zoo.batch_for("llama-cls")
    expected = zoo.average(torch.log_softmax(raw_outputs(adapter, batch), dim=-1))
    with adapter.predictive(SAMPLES):
        logits = adapter.model(**batch).logits
    assert torch.allclose(logits.double(), expected, atol=1e-4)
    assert config.final_logit_softcapping == 0.5


# What the model goes on being ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_full_graph_compile_equals_eager() -> None:
    adapter = bayesian("llama-head", depth=2)
    batch = zoo.batch_for("llama-head")
    torch.compiler.reset()
    compiled = torch.compile(adapter.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, adapter.model(**batch).logits)
    # Contexts of the same and of other samples in turn: a stale graph would show in the numbers or in the view.
    for sigma, count, keep in ((0.3, 4, True), (0.5, 4, True), (0.3, 2, False), (0.3, 4, True)):
        with adapter.predictive(count, sigma=sigma, keep_samples=keep) as eager:
            expected = adapter.model(**batch).logits
        with adapter.predictive(count, sigma=sigma, keep_samples=keep) as view:
            logits = compiled(**batch).logits
        assert torch.allclose(logits, expected, atol=1e-5, equal_nan=True)
        assert view.folded is not None and torch.equal(view.folded, logits)
        assert (view.sample_outputs is not None) is keep
        assert eager.folded is not None and torch.allclose(view.folded, eager.folded, atol=1e-5, equal_nan=True)
    with torch.no_grad():
        assert torch.equal(compiled(**batch).logits, adapter.model(**batch).logits)
    torch.compiler.reset()


def test_weights_offloaded_by_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    adapter = bayesian("llama-head", depth=2)
    batch = zoo.batch_for("llama-head")
    keep = batch["attention_mask"].bool()

    def outputs() -> list[Tensor]:
        trunk, results = zoo.trunk(adapter), []
        views = [
            Predictive(adapter.batch(SAMPLES)),
            Predictive(adapter.batch(SAMPLES), columns=torch.tensor([3, 9])),
            Predictive(adapter.batch(SAMPLES), trunk=trunk, key=0),
            Predictive(adapter.batch(SAMPLES), trunk=trunk, key=0),
        ]
        for view in views:
            with adapter.fanned(view):
                results.append(adapter.model(**batch).logits[keep])
        return results

    before = outputs()
    accelerate.cpu_offload(adapter.model, execution_device=torch.device("cpu"))
    assert adapter.anatomy.head.get_base_layer().weight.is_meta
    for offloaded, resident in zip(outputs(), before, strict=True):
        assert torch.allclose(offloaded, resident, atol=1e-5)


def test_deepcopy_samples_on_its_own() -> None:
    adapter = bayesian("llama", depth=2)
    batch = zoo.batch_for("llama")
    twin = copy.deepcopy(adapter)
    with torch.no_grad():
        mean = adapter.model(**batch).logits
    with adapter.predictive(SAMPLES):
        expected = adapter.model(**batch).logits
        with torch.no_grad():
            assert torch.equal(twin.model(**batch).logits, mean)  # the copy is not in the original's context
        with twin.predictive(SAMPLES):
            assert torch.equal(twin.model(**batch).logits, expected)
        assert torch.equal(adapter.model(**batch).logits, expected)
    twin.unload()
    with adapter.predictive(SAMPLES):
        assert torch.equal(adapter.model(**batch).logits, expected)


def test_disable_adapter_inside_gives_the_base_model() -> None:
    adapter = bayesian("llama", depth=2)
    batch = zoo.batch_for("llama")
    keep = batch["attention_mask"].bool()
    with torch.no_grad(), adapter.model.disable_adapter():
        base = torch.log_softmax(adapter.model(**batch).logits, dim=-1)
    with adapter.predictive(SAMPLES):
        with adapter.model.disable_adapter():
            inside = adapter.model(**batch).logits
        sampled = adapter.model(**batch).logits
    assert torch.allclose(inside[keep], base[keep], atol=1e-5)
    assert (sampled - base)[keep].abs().max() > 0.01


def two_adapters() -> tuple[Any, Any, dict[str, Tensor]]:
    model = zoo.peft_model("llama")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    zoo.randomise(model, 0.25)
    first = tfb_ext.bayesianize(model.eval(), sigma=SIGMA)
    return first, tfb_ext.bayesianize(model, adapter="second", sigma=SIGMA, depth=2), zoo.batch_for("llama")


def test_two_adapters_on_one_model() -> None:
    first, second, batch = two_adapters()
    keep = batch["attention_mask"].bool()
    for adapter in (first, second, first):
        adapter.model.set_adapter(adapter.name)
        low = zoo.average(zoo.separate_passes(adapter, range(SAMPLES), SIGMA, log_probabilities(adapter, batch)))
        with adapter.predictive(SAMPLES):
            logits = adapter.model(**batch).logits
        assert torch.allclose(logits[keep].double(), low[keep], atol=5e-5)


def test_both_adapters_active_samples_one_of_them() -> None:
    first, second, batch = two_adapters()
    keep = batch["attention_mask"].bool()
    first.model.base_model.set_adapter(["default", "second"])
    for adapter in (first, second):
        low = zoo.average(zoo.separate_passes(adapter, range(SAMPLES), SIGMA, log_probabilities(adapter, batch)))
        with adapter.predictive(SAMPLES):
            logits = adapter.model(**batch).logits
        assert torch.allclose(logits[keep].double(), low[keep], atol=5e-5)


def test_rescaled_adapter_is_rescaled_in_samples_too() -> None:
    adapter = bayesian("qwen2")
    batch = zoo.batch_for("qwen2")
    keep = batch["attention_mask"].bool()
    for module in zoo.lora_layers(adapter).values():
        module.set_scale("default", 0.5)
    low = zoo.average(zoo.separate_passes(adapter, range(SAMPLES), SIGMA, log_probabilities(adapter, batch)))
    with adapter.predictive(SAMPLES):
        logits = adapter.model(**batch).logits
    assert torch.allclose(logits[keep].double(), low[keep], atol=5e-5)


# Refusals -----------------------------------------------------------------------------------------------------------


def refusal(adapter: Any, words: str, call: Callable[[], Any], context: str = "predictive") -> None:
    """The call raises ``SamplingError`` with these words, leaves nothing behind, and the next call works."""
    before = footprint(adapter)
    with getattr(adapter, context)(SAMPLES):
        inside = footprint(adapter)
        with pytest.raises(SamplingError, match=words):
            call()
        assert footprint(adapter) == inside
    assert footprint(adapter) == before


def refused_at_once(adapter: Any, words: str) -> None:
    """No context opens, now or later, and nothing is left behind."""
    before = footprint(adapter)
    for _ in range(2):
        with pytest.raises(SamplingError, match=words):
            with adapter.predictive(SAMPLES):
                pass
        assert footprint(adapter) == before


@pytest.mark.parametrize("context", ["predictive", "sampling"])
def test_refused_calls(context: str) -> None:
    first, _, batch = two_adapters()
    rows = {k: v.repeat(SAMPLES, 1) for k, v in batch.items()}
    model = first.model

    def with_grad() -> None:
        with torch.enable_grad():
            model(**rows)

    def in_training() -> None:
        model.train()
        try:
            model(**rows)
        finally:
            model.eval()

    def with_another_adapter() -> None:
        model.set_adapter("second")
        try:
            model(**rows)
        finally:
            model.set_adapter("default")

    def merged() -> None:
        model.merge_adapter()
        try:
            model(**rows)
        finally:
            model.unmerge_adapter()

    refusal(first, "gradients are on.*drop torch.enable_grad", with_grad, context)
    refusal(first, "training mode.*model.eval", in_training, context)
    words = r"'default' is not active \(active: \['second'\]\).*set_adapter\('default'\)"
    refusal(first, words, with_another_adapter, context)
    refusal(first, "merged.*unmerge_adapter", merged, context)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    refusal(first, "packed rows.*attention_mask", lambda: model(**rows, cu_seq_lens_q=offsets), context)
    refusal(
        first,
        "adapter_names= mixes adapters.*set_adapter",
        lambda: model(**rows, adapter_names=["default"] * rows["input_ids"].shape[0]),
        context,
    )


def test_contexts_of_one_model_do_not_nest() -> None:
    first, second, batch = two_adapters()
    for inner in (first, second):
        for outer_context in ("predictive", "sampling"):
            for inner_context in ("predictive", "sampling"):
                with getattr(first, outer_context)(2):
                    with pytest.raises(SamplingError, match="open already"):
                        with getattr(inner, inner_context)(2):
                            pass
    with first.predictive(2), pytest.raises(SamplingError, match="unload.. inside a sampling context"):
        first.unload()
    with first.predictive(2):
        first.model(**batch)


def test_unloaded_adapter_is_refused() -> None:
    adapter = bayesian("llama")
    adapter.unload()
    with pytest.raises(SamplingError, match="was unloaded; call tfb_ext.bayesianize again"):
        with adapter.predictive(2):
            pass


class FrontedLlama(tf.LlamaForCausalLM):
    """A model with a linear layer before its blocks."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.front = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        kwargs["inputs_embeds"] = self.front(self.model.embed_tokens(input_ids))
        return super().forward(**kwargs)


def test_random_layer_below_the_fan_is_refused() -> None:
    model = FrontedLlama(tf.LlamaConfig(**zoo._COMMON))
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["front", "q_proj"], task_type="CAUSAL_LM"))
    zoo.randomise(peft)
    adapter = tfb_ext.bayesianize(peft.eval(), sigma=SIGMA)
    refused_at_once(adapter, "random layers front ran before the first random block.*target_modules")


class ScaledLlama(tf.LlamaForCausalLM):
    """A model that computes on its head's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


class CastLlama(tf.LlamaForCausalLM):
    """A model that only casts its head's output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.to(torch.bfloat16)
        return out


def test_logits_changed_after_the_head_are_refused() -> None:
    for cls in (ScaledLlama, CastLlama):
        model = cls(tf.LlamaConfig(**zoo._COMMON))
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        zoo.randomise(peft)
        adapter = tfb_ext.bayesianize(peft.eval(), sigma=SIGMA)
        batch = zoo.inputs(padded=False)
        if cls is ScaledLlama:
            refused_at_once(adapter, "changes its logits after its head.*adapter.sampling")
        else:
            with adapter.predictive(2):
                assert peft(**batch).logits.dtype == torch.bfloat16


def test_hidden_states_without_rows_first_are_refused() -> None:
    adapter = bayesian("llama", depth=1)
    blocks = adapter.anatomy.blocks
    original = blocks[2].forward
    zoo.compared(adapter)  # a model that lays out its rows otherwise only later
    blocks[2].forward = lambda hidden, **kw: original(hidden, **kw).transpose(0, 1)
    words = r"hidden states of shape \(9, 3, 32\), expected the batch's 3 rows"
    with adapter.predictive(2), pytest.raises(SamplingError, match=words):
        adapter.model(**zoo.batch_for("llama"))


def test_call_without_rows_is_refused() -> None:
    adapter = bayesian("llama")
    refusal(adapter, "without input_ids and inputs_embeds", lambda: adapter.model())


def test_flex_attention_is_refused() -> None:
    adapter = bayesian("llama")
    zoo.compared(adapter)
    with adapter.predictive(SAMPLES):
        adapter.anatomy.model.config._attn_implementation = "flex_attention"
        with pytest.raises(SamplingError, match="flex attention.*attn_implementation='sdpa'"):
            adapter.model(**zoo.batch_for("llama"))
    refused_at_once(adapter, "flex attention.*attn_implementation='sdpa'")


# Exceptions ---------------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def places(adapter: Any) -> dict[str, nn.Module]:
    blocks = adapter.anatomy.blocks
    return {"trunk": blocks[0].mlp, "first": blocks[2].mlp, "last": blocks[3].mlp, "head": adapter.anatomy.head}


@pytest.mark.parametrize("place", ["trunk", "first", "last", "head"])
@pytest.mark.parametrize("name", zoo.slow_but(["llama", "gemma2"], "llama"))
def test_an_exception_leaves_nothing_behind(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = bayesian(name, depth=2)
    batch = zoo.batch_for(name)
    keep = batch["attention_mask"].bool()
    monkeypatch.setattr(fold, "FOLD_BYTES", 1)  # several pieces, so that the head fails with a part of the samples
    with adapter.predictive(SAMPLES):
        expected = adapter.model(**batch).logits
    clean = footprint(adapter)
    module = places(adapter)[place]
    calls = {"left": 1 if place == "head" else 0}
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if calls["left"] == 0:
            raise Broken
        calls["left"] -= 1
        return original(*args, **kwargs)

    def call(view: Predictive | None = None) -> Tensor:
        with adapter.fanned(view or Predictive(adapter.batch(SAMPLES))):
            return adapter.model(**batch).logits

    module.forward = forward
    with pytest.raises(Broken):
        call()
    del module.forward
    assert footprint(adapter) == clean
    assert torch.equal(call()[keep], expected[keep])

    # Caught inside the context, as a caller that halves its batch does: the next call in it is right.
    trunk = zoo.trunk(adapter)
    recorded = Predictive(adapter.batch(SAMPLES), trunk=trunk, key=0)
    with adapter.fanned(recorded):
        module.forward, calls["left"] = forward, 0
        with pytest.raises(Broken):
            adapter.model(**batch)
        del module.forward
        assert torch.equal(adapter.model(**batch).logits[keep], expected[keep])
        assert {key for _, key in trunk.hidden} == {0}
        if place != "trunk":  # which a replay does not run
            module.forward = forward
            with pytest.raises(Broken):
                adapter.model(**batch)
            del module.forward
        recorded.key = 1  # a batch not kept yet: its lower blocks must run again
        assert torch.equal(adapter.model(**batch).logits[keep], expected[keep])
        assert torch.equal(trunk.hidden[trunk.firsts[0], 0][0], trunk.hidden[trunk.firsts[0], 1][0])
    assert footprint(adapter) == clean


# Anatomy ------------------------------------------------------------------------------------------------------------


def test_anatomy_of_unknown_models() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="Sequential has no transformers config"):
        anatomy.find_anatomy(plain, [])
    headless = tf.LlamaModel(tf.LlamaConfig(**zoo._COMMON))
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no output head"):
        anatomy.find_anatomy(headless, ["layers.0.self_attn.q_proj"])
    shortened = tf.LlamaForCausalLM(tf.LlamaConfig(**zoo._COMMON))
    del shortened.model.layers[3]
    with pytest.raises(UnsupportedModelError, match="expected one list of 4 transformer blocks.*found none"):
        anatomy.find_anatomy(shortened, ["model.layers.0.self_attn.q_proj"])


def test_blocks_of_layers() -> None:
    anatomy = bayesian("llama-head").anatomy
    assert anatomy.blocks_name == "model.layers" and anatomy.head_name == "lm_head" and anatomy.kind == "categorical"
    assert anatomy.block_of("model.layers.2.self_attn.q_proj") == 2
    assert anatomy.block_of("lm_head") == zoo.BLOCKS
    assert anatomy.block_of("model.embed_tokens") is None
