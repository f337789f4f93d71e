"""Other people's tools under the predictive context: Trainer, pipelines and inference mode see the posterior predictive."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_folders
import torch
import transformers as tf
import zoo
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tfb_ext
from tfb_ext.errors import SamplingError

SIGMA, SAMPLES, ROWS = 0.3, 4, 5

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
bayesian = partial(zoo.bayesian, sigma=SIGMA)


def labelled_batch(name: str) -> dict[str, Tensor]:
    """Rows of different lengths with labels: the classes, or the tokens themselves, but for what nothing or padding predicts.

    The first token is no target of a language model's loss, but Trainer counts its label as one for GPT-2, whose loss type it
    does not know.
    """
    batch = zoo.batch_for(name, ROWS)
    if name in zoo.CAUSAL:
        labels = batch["input_ids"].clone()
        labels[:, 1:].masked_fill_(batch["attention_mask"][:, :-1] == 0, -100)
        labels[:, 0] = -100
        return {**batch, "labels": labels}
    return {**batch, "labels": torch.arange(ROWS) % 3}


def dataset(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: value[i] for name, value in batch.items()} for i in range(ROWS)]


def trainer(model: nn.Module, folder: Path, **options: Any) -> tf.Trainer:
    compute_metrics = options.pop("compute_metrics", None)
    arguments = tf.TrainingArguments(
        str(folder), per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True, **options
    )
    return tf.Trainer(model, arguments, compute_metrics=compute_metrics)


def oracle(adapter: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log mean probability (ROWS, ..., C), from one pass a sample with its weights written into the model."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    passes = zoo.separate_passes(
        adapter, range(SAMPLES), SIGMA, lambda: torch.log_softmax(adapter.model(**inputs).logits.double(), -1)
    )
    return zoo.average(passes)


def oracle_loss(name: str, logs: Tensor, labels: Tensor) -> float:
    """What Trainer reports: the mean NLL of every batch of two rows, weighted by its rows."""
    if name in zoo.CAUSAL:
        logs, labels = logs[:, :-1], labels[:, 1:]
    total = 0.0
    for start in range(0, ROWS, 2):
        part, known = logs[start : start + 2], labels[start : start + 2]
        total += len(known) * float(nn.functional.nll_loss(part.flatten(0, -2), known.flatten()))
    return total / ROWS


def accuracy(prediction: tf.EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# Trainer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", zoo.slow_but(["all", 2], 2))
@pytest.mark.parametrize("name", zoo.slow_but(["bert", "llama-cls", "llama", "gpt2"], "bert", "llama"))
def test_trainer_predicts_and_evaluates_the_posterior(name: str, depth: Any, tmp_path: Path) -> None:
    adapter, batch = bayesian(name, depth=depth), labelled_batch(name)
    expected = oracle(adapter, batch)
    tool = trainer(adapter.model, tmp_path, compute_metrics=accuracy)
    plain = tool.predict(dataset(batch))
    with adapter.predictive(SAMPLES):
        found = tool.predict(dataset(batch))
        metrics = tool.evaluate(dataset(batch))
    at = zoo.real_positions(name, batch)
    assert torch.allclose(torch.tensor(found.predictions).double()[at], expected[at], atol=1e-4)
    loss = oracle_loss(name, expected, batch["labels"])
    assert found.metrics["test_loss"] == pytest.approx(loss, abs=1e-4)
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-4)
    assert metrics["eval_accuracy"] == found.metrics["test_accuracy"]
    if name not in zoo.CAUSAL:
        assert metrics["eval_accuracy"] == float((expected.argmax(-1) == batch["labels"]).double().mean())
    assert abs(plain.metrics["test_loss"] - loss) > 1e-3  # the mean adapter is something else
    again = tool.predict(dataset(batch))
    assert (again.predictions == plain.predictions).all()  # and it is back afterwards


def test_trainer_smooths_labels_of_the_predictive(tmp_path: Path) -> None:
    adapter, batch = bayesian("llama-cls"), labelled_batch("llama-cls")
    expected = oracle(adapter, batch)
    with adapter.predictive(SAMPLES):
        found = trainer(adapter.model, tmp_path, label_smoothing_factor=0.2).evaluate(dataset(batch))
    nll = -expected.gather(1, batch["labels"][:, None])[:, 0]
    loss = (0.8 * nll - 0.2 * expected.mean(-1)).mean()
    assert found["eval_loss"] == pytest.approx(float(loss), abs=1e-4)


def test_trainer_leaves_the_model_in_evaluation(tmp_path: Path) -> None:
    """Trainer switches to evaluation by itself, so a model that was training is no obstacle."""
    adapter, batch = bayesian("llama-cls"), labelled_batch("llama-cls")
    expected = oracle(adapter, batch)
    adapter.model.train()
    with adapter.predictive(SAMPLES):
        found = trainer(adapter.model, tmp_path).predict(dataset(batch))
    assert torch.allclose(torch.tensor(found.predictions).double(), expected, atol=1e-4)


@pytest.mark.parametrize("option", ["bf16_full_eval", "bf16"])
def test_trainer_in_half_precision(option: str, tmp_path: Path) -> None:
    """Samples stay themselves when Trainer casts the model or runs it under autocast."""
    adapter, batch = bayesian("llama-cls"), labelled_batch("llama-cls")
    expected = oracle(adapter, batch)
    with torch.no_grad():
        mean = torch.log_softmax(adapter.model(**batch).logits.double(), -1)
    with adapter.predictive(SAMPLES):
        found = torch.tensor(trainer(adapter.model, tmp_path, **{option: True}).predict(dataset(batch)).predictions)
    assert torch.isfinite(found).all()
    assert (found.double() - expected).abs().max() < 0.25 * (mean - expected).abs().max()


def test_training_inside_the_context_is_refused(tmp_path: Path) -> None:
    adapter, batch = bayesian("llama-cls"), labelled_batch("llama-cls")
    tool = trainer(adapter.model, tmp_path, max_steps=1, per_device_train_batch_size=2, save_strategy="no")
    tool.train_dataset = dataset(batch)
    with adapter.predictive(SAMPLES), pytest.raises(SamplingError, match="training mode|gradients are on"):
        tool.train()


# Pipelines ----------------------------------------------------------------------------------------------------------

TEXTS = ["area man wins", "senate votes on budget", "man"]


def test_text_classification_pipeline() -> None:
    adapter, tokenizer = bayesian("llama-cls"), small_folders.tokenizer()
    adapter.anatomy.model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    pipe = tf.pipeline("text-classification", model=adapter.model, tokenizer=tokenizer, device="cpu")
    plain = pipe(TEXTS, top_k=None)
    with adapter.predictive(SAMPLES):
        found = [pipe(TEXTS, top_k=None, batch_size=size) for size in (1, 3)]
        direct = [adapter.model(**tokenizer(text, return_tensors="pt")).logits[0].exp() for text in TEXTS]
    alone = [oracle(adapter, dict(tokenizer(text, return_tensors="pt")))[0].exp() for text in TEXTS]
    names = ["bad", "fair", "good"]
    for answers in found:
        for answer, one, other in zip(answers, direct, alone, strict=True):
            scores = {a["label"]: a["score"] for a in answer}
            assert [scores[n] for n in names] == pytest.approx(one.tolist(), abs=1e-5)
            assert [scores[n] for n in names] == pytest.approx(other.tolist(), abs=1e-4)
    assert max(abs(a[0]["score"] - b[0]["score"]) for a, b in zip(found[0], plain, strict=True)) > 1e-3


def test_token_classification_pipeline() -> None:
    adapter, tokenizer = token_classifier("bert"), small_folders.tokenizer()
    pipe = tf.pipeline("token-classification", model=adapter.model, tokenizer=tokenizer, device="cpu", ignore_labels=[])
    with adapter.predictive(SAMPLES):
        found = pipe(TEXTS[0])
        direct = adapter.model(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0].exp()
    assert [token["score"] for token in found] == pytest.approx(direct.amax(-1).tolist(), abs=1e-5)
    alone = oracle(adapter, dict(tokenizer(TEXTS[0], return_tensors="pt")))[0].exp()
    assert torch.allclose(direct.double(), alone, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_text_generation_pipeline(options: dict[str, Any]) -> None:
    adapter, tokenizer = bayesian("llama", depth=2), small_folders.tokenizer()
    adapter.anatomy.model.generation_config.eos_token_id = None  # every answer is as long as asked for
    settings = {"max_new_tokens": 6, "do_sample": False, **options}
    pipe = tf.pipeline("text-generation", model=adapter.model, tokenizer=tokenizer, device="cpu")
    with adapter.predictive(SAMPLES):
        found = pipe(TEXTS, return_tensors=True, **settings)
        for text, (answer,) in zip(TEXTS, found, strict=True):
            direct = adapter.model.generate(**tokenizer(text, return_tensors="pt"), **settings)
            assert answer["generated_token_ids"] == direct[0].tolist()
    if not options:
        ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
        for _ in range(6):  # the oracle: every step from scratch, one pass a sample
            step = oracle(adapter, {"input_ids": ids})[:, -1].argmax(-1)
            ids = torch.cat([ids, step[:, None]], dim=1)
        assert found[0][0]["generated_token_ids"] == ids[0].tolist()


# Inference mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", ["all", 2])
@pytest.mark.parametrize("name", zoo.slow_but(["bert", "llama", "mixtral"], "llama"))
def test_inference_mode(name: str, depth: Any) -> None:
    """Inside out and outside in; and what was made in there does not hinder gradients later."""
    adapter, batch = bayesian(name, depth=depth), zoo.batch_for(name)
    with adapter.predictive(SAMPLES):
        expected = adapter.model(**batch).logits
    with torch.inference_mode(), adapter.predictive(SAMPLES):
        inside = adapter.model(**batch).logits
    with adapter.predictive(SAMPLES), torch.inference_mode():
        outside = adapter.model(**batch).logits
    assert torch.equal(inside, expected) and torch.equal(outside, expected)
    with adapter.predictive(SAMPLES):
        assert torch.equal(adapter.model(**batch).logits, expected)
    for parameter_name, parameter in adapter.model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    adapter.model(**batch).logits.float().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.model.parameters())


def test_predict_and_generate_in_inference_mode() -> None:
    import small_sets

    adapter, data = bayesian("llama", depth=2), small_sets.encoded()
    expected = tfb_ext.predict(adapter, data, SAMPLES)
    ids = zoo.inputs(2, padded=False)["input_ids"]
    with adapter.predictive(SAMPLES):
        generated = adapter.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    with torch.inference_mode():
        found = tfb_ext.predict(adapter, data, SAMPLES)
        with adapter.predictive(SAMPLES):
            again = adapter.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found.probabilities, expected.probabilities) and torch.equal(again, generated)


def token_classifier(name: str) -> Any:
    """A Bayesian adapter on a tiny model that labels every token with one of three classes."""
    torch.manual_seed(0)
    if name == "bert":
        base = zoo._bert()[0].config
        model: Any = tf.BertForTokenClassification(base)
        targets = ["query", "value"]
    else:
        model = tf.LlamaForTokenClassification(tf.LlamaConfig(**zoo._COMMON, num_labels=3))
        targets = ["q_proj", "v_proj"]
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="TOKEN_CLS"))
    zoo.randomise(peft)
    return tfb_ext.bayesianize(peft.eval(), sigma=SIGMA)
