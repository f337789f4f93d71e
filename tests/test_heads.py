"""Heads other than one class a row: regression, independent labels, a class for every token; all against separate passes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import small_sets
import torch
import transformers as tf
import zoo
from peft import LoraConfig, get_peft_model
from torch import Tensor

import tfb_ext
from tfb_ext import predict, predict_multi_label, predict_regression
from tfb_ext.prediction import MultiLabelPrediction, RegressionPrediction

SIGMA, SAMPLES = 0.3, [5, 2, 3, 0]
MODELS = ["Llama", "Bert"]


def bayesian(family: str, task: str, outputs: int, problem: str | None = None, **options: Any) -> Any:
    """A Bayesian adapter on a tiny ``{family}For{task}`` with visible differences between its items and samples."""
    torch.manual_seed(0)
    common = {n: v for n, v in zoo._COMMON.items() if family == "Llama" or n != "num_key_value_heads"}
    config = getattr(tf, f"{family}Config")(**common, num_labels=outputs, problem_type=problem)
    model = getattr(tf, f"{family}For{task}")(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    targets = ["q_proj", "v_proj"] if family == "Llama" else ["query", "value"]
    kind = "TOKEN_CLS" if task == "TokenClassification" else "SEQ_CLS"
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=kind))
    zoo.randomise(peft)
    return tfb_ext.bayesianize(peft.eval(), **{"sigma": SIGMA, **options})


def batches(family: str, rows: tuple[int, ...] = (3, 2, 1)) -> list[dict[str, Tensor]]:
    return [zoo.batch_for("bert" if family == "Bert" else "llama", n) for n in rows]


def outputs(adapter: Any, data: list[dict[str, Tensor]]) -> Tensor:
    """The oracle: the model's own outputs (S, N, ...), one pass a sample and batch."""
    return torch.cat(
        [zoo.separate_passes(adapter, SAMPLES, SIGMA, lambda b=b: adapter.model(**b).logits) for b in data], dim=1
    )


class TestRegression:
    @pytest.mark.parametrize("depth", ["all", 2])
    @pytest.mark.parametrize("width", [1, 3])
    @pytest.mark.parametrize("family", MODELS)
    def test_equals_separate_passes(self, family: str, width: int, depth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        adapter, data = bayesian(family, "SequenceClassification", width, "regression", depth=depth), batches(family)
        alone = outputs(adapter, data)
        labelled = [{**b, "labels": torch.zeros(len(b["input_ids"]), width)} for b in data]  # no labels of tokens
        for given in (data, labelled):
            found = predict_regression(adapter, given, SAMPLES)
            assert found.sample_outputs.shape == (4, 6, width)
            assert torch.allclose(found.sample_outputs, alone, atol=1e-4)
            assert torch.allclose(found.mean, alone.mean(0), atol=1e-4)
        assert (found.samples, found.sigma) == (tuple(SAMPLES), SIGMA) and found.seconds > 0
        monkeypatch.setattr("tfb_ext.forward.batches.ROWS_CPU", 3)  # one sample a forward, the blocks below run once
        lowest = adapter.anatomy.blocks[0]
        seen = small_sets.rows_through(lowest.self_attn.q_proj if family == "Llama" else lowest.attention.self.query)
        chunked = predict_regression(adapter, data, SAMPLES)
        assert torch.allclose(chunked.sample_outputs, alone, atol=1e-4)
        if depth == 2:
            assert seen == [3, 2, 1]

    def test_encoded_sets_keep_their_order(self) -> None:
        adapter = bayesian("Bert", "SequenceClassification", 2, "regression")
        data = small_sets.encoded(head=True)  # three choices, which do not matter
        rows = [{"input_ids": torch.tensor([ids])} for ids in data.token_ids]
        assert torch.allclose(
            predict_regression(adapter, data, SAMPLES).sample_outputs, outputs(adapter, rows), atol=1e-4
        )

    def test_no_samples_is_the_mean_adapter(self) -> None:
        adapter, data = bayesian("Llama", "SequenceClassification", 1, sigma=None), batches("Llama")
        found = predict_regression(adapter, data, 0)
        with torch.no_grad():
            mean = torch.cat([adapter.model(**b).logits for b in data])
        assert torch.allclose(found.mean, mean, atol=1e-5)
        assert found.variance.eq(0).all() and found.standard_error.eq(0).all() and found.samples == ()

    def test_variance_by_hand(self) -> None:
        y = torch.tensor([1.0, 4.0, 2.0, 9.0])[:, None, None]
        made = RegressionPrediction(y, SIGMA, (0, 2, 4, 6), True, 0.0)  # no two of them mirror each other
        assert float(made.variance) == pytest.approx(float(y.var())) and float(made.mean) == 4
        assert float(made.standard_error) == pytest.approx(float(y.std()) / 2)
        pairs = replace(made, samples=(0, 1, 2, 3))
        error = (5.5 - 2.5) / math.sqrt(2) / math.sqrt(2)
        assert float(pairs.standard_error) == pytest.approx(error)
        assert float(pairs.variance) == pytest.approx((9 + 0 + 4 + 25) / 4 + error**2)
        assert float(pairs.standard_deviation) == pytest.approx(math.sqrt(float(pairs.variance)))
        assert replace(made, sample_outputs=y[:2], samples=(0, 1)).variance.isnan().all()
        assert replace(made, sample_outputs=y[:1], samples=(0,)).variance.isnan().all()

    @pytest.mark.parametrize("antithetic", [True, False])
    def test_variance_is_unbiased(self, antithetic: bool) -> None:
        """Outputs almost linear in the noise, whose average mirrored pairs know exactly."""
        noise = torch.randn(4000, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        signed = torch.stack([noise, -noise], 2).reshape(4000, 6, 1, 1) if antithetic else noise
        runs = [RegressionPrediction(y, SIGMA, tuple(range(len(y))), antithetic, 0.0).variance for y in signed]
        # An estimate from three squares has a variance of 2 / 3, around their own average 1; five standard errors of 4000.
        assert float(torch.stack(runs).mean()) == pytest.approx(1, abs=5 / math.sqrt(4000))

    def test_spread_is_that_of_many_samples(self) -> None:
        adapter, data = bayesian("Llama", "SequenceClassification", 1), batches("Llama")
        many = predict_regression(adapter, data, range(200), sigma=0.05)
        few = [replace(many, sample_outputs=s, samples=tuple(range(8))) for s in many.sample_outputs.split(8)]
        ratio = torch.stack([f.variance for f in few]).mean(0) / many.variance
        # Four squares a set, 25 sets: 2 / 100 of variance, so five standard errors are 0.7.
        assert (ratio - 1).abs().max() < 0.7


class TestMultiLabel:
    @pytest.mark.parametrize("family", MODELS)
    def test_equals_separate_passes(self, family: str) -> None:
        adapter = bayesian(family, "SequenceClassification", 3, "multi_label_classification", depth=2)
        data = batches(family)
        alone = torch.sigmoid(outputs(adapter, data))
        labelled = [{**b, "labels": torch.ones(len(b["input_ids"]), 3)} for b in data]
        found = predict_multi_label(adapter, labelled, SAMPLES)
        assert torch.allclose(found.sample_probabilities, alone, atol=1e-5)
        assert torch.allclose(found.probabilities, alone.mean(0), atol=1e-5)
        assert torch.equal(found.labels, alone.mean(0) > 0.5) and found.standard_error.shape == (6, 3)
        p = alone.double()
        entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean(0)
        assert torch.allclose(found.aleatoric.double(), entropy, atol=1e-5)
        assert torch.allclose(found.total, found.aleatoric + found.epistemic, atol=1e-6)
        with adapter.predictive(SAMPLES):
            direct = torch.cat([adapter.model(**b).logits for b in data])
        assert torch.allclose(found.probabilities, torch.sigmoid(direct), atol=1e-5)
        with torch.no_grad():
            mean = torch.sigmoid(torch.cat([adapter.model(**b).logits for b in data]))
        assert torch.allclose(predict_multi_label(adapter, data, 0).probabilities, mean, atol=1e-5)

    def test_sure_samples_that_disagree(self) -> None:
        p = torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None, None]
        found = MultiLabelPrediction(p, (), SIGMA, (0, 2, 4, 6), False, 0.0)
        assert float(found.aleatoric) == 0 and float(found.epistemic) == pytest.approx(math.log(2))
        assert found.labels.tolist() == [[False]]

    def test_choices_name_the_labels(self) -> None:
        adapter = bayesian("Bert", "SequenceClassification", 3, "multi_label_classification")
        assert predict_multi_label(adapter, small_sets.encoded(head=True), 2).choices == small_sets.CHOICES
        with pytest.raises(ValueError, match="the data has 2 choices"):
            predict_multi_label(adapter, replace(small_sets.encoded(head=True), choices=("a", "b")), 2)


class TestTokens:
    @pytest.mark.parametrize("depth", ["all", 2])
    @pytest.mark.parametrize("family", zoo.slow_but(MODELS, "Bert"))
    def test_every_labelled_token_is_an_item(self, family: str, depth: Any) -> None:
        adapter, data = bayesian(family, "TokenClassification", 3, depth=depth), batches(family)
        alone = torch.softmax(outputs(adapter, data).double(), -1)
        generator = torch.Generator().manual_seed(0)
        known = [torch.randint(3, b["input_ids"].shape, generator=generator) for b in data]
        for labels, batch in zip(known, data, strict=True):
            labels[batch["attention_mask"] == 0] = -100
            labels[:, 5] = -100  # not the first piece of a word
        labelled = [{**b, "labels": k} for b, k in zip(data, known, strict=True)]
        gold = torch.cat(known)
        found = predict(adapter, labelled, SAMPLES)
        expected = alone[:, gold != -100]
        assert torch.allclose(found.sample_probabilities.double(), expected, atol=1e-4)
        # Metrics of the same items, in the same order.
        metrics = tfb_ext.evaluate(found.probabilities, gold[gold != -100])
        nll = -expected.mean(0).log().gather(1, gold[gold != -100][:, None]).mean()
        assert metrics.nll == pytest.approx(float(nll), abs=1e-4) and metrics.items == int((gold != -100).sum())
        with adapter.predictive(SAMPLES):
            losses = [adapter.model(**b).loss for b in labelled]
        counts = [int((k != -100).sum()) for k in known]
        mean = sum(float(x) * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
        assert metrics.nll == pytest.approx(mean, abs=1e-4)
        # Without labels every token that is not padding.
        attended = torch.cat([b["attention_mask"] for b in data]).bool()
        for count, values in ((SAMPLES, alone[:, attended]), (0, None)):
            unlabelled = predict(adapter, data, count)
            assert unlabelled.probabilities.shape == (int(attended.sum()), 3)
            if values is not None:
                assert torch.allclose(unlabelled.sample_probabilities.double(), values, atol=1e-4)

    def test_the_search_reads_token_labels(self) -> None:
        adapter, data = bayesian("Bert", "TokenClassification", 3, sigma=None), batches("Bert")
        labelled = [{**b, "labels": b["input_ids"] % 3} for b in data]
        found = tfb_ext.search_sigma(adapter, labelled, samples=2, objective="minimum", progress=False)
        assert found.labelled and found.sigma > 0

    def test_encoded_sets_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"BertForTokenClassification labels every token.*labels \(B, T\)"):
            predict(bayesian("Bert", "TokenClassification", 3), small_sets.encoded(head=True))


@pytest.mark.parametrize(
    ("problem", "call", "said"),
    [
        (
            "regression",
            predict,
            r"head is regression, whose outputs are no class probabilities; use tfb_ext\.predict_regression",
        ),
        ("regression", predict_multi_label, "no independent probabilities of labels"),
        ("multi_label_classification", predict, r"head is multi-label.*use tfb_ext\.predict_multi_label\("),
        ("multi_label_classification", predict_regression, "no values of a regression"),
        (None, predict_regression, r"head is categorical.*use tfb_ext\.predict\("),
    ],
)
def test_other_heads_are_refused(problem: str | None, call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(bayesian("Bert", "SequenceClassification", 3, problem), small_sets.encoded(head=True), 2)


def test_bad_arguments_are_refused() -> None:
    adapter = bayesian("Bert", "SequenceClassification", 1)
    for arguments, said in ((([], 2), "data set is empty"), ((batches("Bert"), -1), "samples is -1")):
        with pytest.raises(ValueError, match=said):
            predict_regression(adapter, *arguments)
    adapter = bayesian("Bert", "SequenceClassification", 1, sigma=None)
    with pytest.raises(ValueError, match="no sigma yet"):
        predict_regression(adapter, batches("Bert"))
