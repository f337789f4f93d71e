"""Generation without samples: how emitted tokens' log probabilities vary, against samples of a tiny sigma on the same tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from small_folders import Folders
from torch import Tensor
from typer.testing import CliRunner

import tfb_ext
from tfb_ext.app.cli import app
from tfb_ext.errors import SamplingError
from tfb_ext.forward import linear as forward_linear
from tfb_ext.generation import Generation
from tfb_ext.generation import linear as tokens_linear
from tfb_ext.generation.scores import score_tokens

SMALL, NEW, PROMPT, DRAWS = 1e-3, 6, 6, 800


def generate(adapter: Any, prompts: Any, **options: Any) -> Generation:
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "by": "linear"}
    return tfb_ext.generate(adapter, prompts, **{**defaults, **options})


def greedy(adapter: Any, prompts: Any, **options: Any) -> Tensor:
    """What PEFT's model generates by itself."""
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        found: Tensor = adapter.model.generate(**prompts, **{**defaults, **options})
    return found


def halves(adapter: Any, found: Generation, mask: Tensor, draws: int = DRAWS) -> Tensor:
    """(draws / 2, R, N) derivatives along the noise of mirrored samples, of the log probabilities of the same tokens; 0 behind an end."""
    count = found.tokens.shape[1]
    inside = torch.arange(count) < found.lengths[:, None]
    ids = torch.cat([found.sequences[:, :PROMPT], found.tokens.masked_fill(~inside, 0)], 1)
    whole = torch.cat([mask.cpu(), inside.to(mask.cpu())], 1)
    device = next(adapter.model.parameters()).device
    parts = [adapter.batch(list(range(first, first + 40)), SMALL) for first in range(0, draws, 40)]
    scores = [score_tokens(adapter, ids.to(device), whole.to(device), PROMPT, part).samples for part in parts]
    each = torch.cat(scores).double().cpu().masked_fill(~inside, 0)
    return (each[::2] - each[1::2]) / (2 * SMALL)


def assert_varies_as(found: Generation, half: Tensor, sigma: float) -> None:
    """Variances are those of the samples within 5 standard errors."""
    error = 5 * (2 / len(half)) ** 0.5
    for deviation, sampled in (
        (found.standard_deviation.nan_to_num(0), half.square().mean(0)),
        (found.sequence_standard_deviation, half.sum(-1).square().mean(0)),
    ):
        variance = (deviation.double() / sigma).square()
        assert variance.max() > 0
        assert ((sampled - variance).abs() <= error * variance + 1e-4 * variance.max()).all()


# Against samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", zoo.DEVICES)
@pytest.mark.parametrize(
    ("name", "span", "depth"),
    zoo.slow_but(
        [(n, s, 2) for n in ("llama", "gpt2", "gemma2", "mistral", "llama-head") for s in ("all", "answer", 3)],
        ("llama", "all", 2), ("llama", "answer", 2), ("gpt2", 3, 2), ("gemma2", "answer", 2), ("llama-head", "all", 2),
    ),
)  # fmt: skip
def test_the_variance_is_that_of_samples(name: str, span: Any, depth: Any, device: str) -> None:
    adapter, batch = zoo.bayesian(name, device, sigma=0.1, span=span, depth=depth), zoo.prompt(3, device)
    found = generate(adapter, batch)
    assert torch.equal(found.sequences, greedy(adapter, batch).cpu())
    assert_varies_as(found, halves(adapter, found, batch["attention_mask"]), 0.1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(found.tokens).to(device)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = adapter.model(input_ids=found.sequences.to(device), attention_mask=mask, position_ids=positions)
    logs = torch.log_softmax(out.logits[:, PROMPT - 1 : -1].float(), -1).cpu()
    own = logs.gather(-1, found.tokens[..., None])[..., 0]
    torch.testing.assert_close(found.log_probabilities, own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.sequence_scores, own.sum(-1), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.total, torch.special.entr(logs.exp()).sum(-1), atol=1e-4, rtol=1e-4)
    assert torch.equal(found.alternatives, logs.topk(5).indices)


@pytest.mark.parametrize("mode", ["token", "flipout"])
def test_noise_of_every_token(mode: str) -> None:
    adapter, batch = zoo.bayesian("llama", mode=mode, sigma=0.1), zoo.prompt(3)
    found = generate(adapter, batch)
    assert_varies_as(found, halves(adapter, found, batch["attention_mask"]), 0.1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("span", ["all", "answer", 2])
def test_rows_end_at_their_end(name: str, span: Any) -> None:
    adapter, batch = zoo.bayesian(name, sigma=0.1, span=span, depth=2), zoo.prompt(3)
    free = generate(adapter, batch)
    end = int(free.tokens[1, 2])
    found = generate(adapter, batch, eos_token_id=end)
    assert len(set(found.lengths.tolist())) > 1 and torch.equal(
        found.sequences, greedy(adapter, batch, eos_token_id=end)
    )
    assert_varies_as(found, halves(adapter, found, batch["attention_mask"]), 0.1)
    for row, count in enumerate(found.lengths.tolist()):
        assert found.standard_deviation[row, count:].isnan().all()
        for name in ("standard_deviation", "log_probabilities"):
            torch.testing.assert_close(
                getattr(found, name)[row, :count], getattr(free, name)[row, :count], atol=1e-5, rtol=1e-4
            )
    assert found.to_dict()["items"][1]["standard_deviation"] == found.standard_deviation[1, : found.lengths[1]].tolist()


@settings(max_examples=6, deadline=None)
@given(
    pads=st.lists(st.integers(0, PROMPT - 1), min_size=1, max_size=3),
    count=st.integers(1, 4),
    span=st.sampled_from(["all", "answer", 2, 5]),
    seed=st.integers(0, 99),
)
def test_a_row_is_what_it_is_alone(pads: list[int], count: int, span: Any, seed: int) -> None:
    """Whatever is generated with it, and however its prompt is padded."""
    adapter = zoo.bayesian("llama", sigma=0.1, span=span, depth=2)
    ids = torch.randint(3, zoo.VOCAB, (len(pads), PROMPT), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(PROMPT) >= torch.tensor(pads)[:, None]).long()
    together = generate(adapter, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=count)
    for row, pad in enumerate(pads):
        alone = generate(adapter, {"input_ids": ids[row : row + 1, pad:]}, max_new_tokens=count)
        for name in ("standard_deviation", "sequence_standard_deviation", "log_probabilities"):
            one, other = getattr(together, name)[row], getattr(alone, name)[0]
            torch.testing.assert_close(one, other, atol=1e-5, rtol=2e-4)


# Passes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", ["all", "answer"])
def test_one_backward_a_token(span: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows; and one for the whole answer. Prompts that end with their random tokens have no graph."""
    adapter, batch = zoo.compared(zoo.bayesian("llama", sigma=0.1, span=span)), zoo.prompt(4)
    end = int(generate(adapter, batch).tokens[1, 2])
    backward, calls, lengths = torch.autograd.grad, [], []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **o: calls.append(1) or backward(*a, **o))
    hook = adapter.anatomy.blocks[0].register_forward_hook(
        lambda module, args, out: lengths.append(args[0].shape[1]) if torch.is_grad_enabled() else None
    )
    found = generate(adapter, batch, eos_token_id=end)
    hook.remove()
    assert len(calls) == NEW + 1 and sorted(set(found.lengths.tolist()))[0] < NEW == found.lengths.max()
    assert lengths == [PROMPT + NEW - 1 if span == "all" else NEW]


def test_long_answers_are_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batch = zoo.bayesian("llama", sigma=0.1, span="answer", depth=2), zoo.prompt(3)
    end = int(generate(adapter, batch).tokens[1, 2])
    found = generate(adapter, batch, eos_token_id=end)
    for limit in (2, 4):
        monkeypatch.setattr(tokens_linear, "MOST_OUTPUTS", limit)
        monkeypatch.setattr(tokens_linear, "BATCH_CPU", limit - 1)
        other = generate(adapter, batch, eos_token_id=end)
        for name in ("standard_deviation", "sequence_standard_deviation"):
            torch.testing.assert_close(getattr(other, name), getattr(found, name), equal_nan=True, atol=1e-6, rtol=1e-4)
    assert generate(adapter, batch, max_new_tokens=70).standard_deviation.shape == (3, 70)


def test_rows_are_halved_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batch = zoo.bayesian("llama", sigma=0.1, depth=2), zoo.prompt(3)
    whole, outputs, asked = generate(adapter, batch), forward_linear.Linear.outputs, []

    def tight(self: Any, rows: Any, *args: Any) -> Any:
        asked.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError
        return outputs(self, rows, *args)

    monkeypatch.setattr(forward_linear.Linear, "outputs", tight)
    cut = generate(adapter, batch)
    assert asked[0] == 3 and asked.count(1) == 3
    torch.testing.assert_close(cut.standard_deviation, whole.standard_deviation, atol=1e-6, rtol=1e-4)


# What it says, and what it does not -----------------------------------------------------------------------------------


def test_fields() -> None:
    adapter, batch = zoo.bayesian("llama", depth=2), zoo.prompt(2)
    with torch.inference_mode():
        found = generate(adapter, batch, sigma=0.2)
    twice = generate(adapter, batch, sigma=0.4, samples=3)
    assert found.sigma == 0.2 and found.samples == () and found.sample_log_probabilities.shape == (1, 2, NEW)
    assert found.uncertainties == ("total", "standard_deviation") and found.aleatoric.isnan().all()
    torch.testing.assert_close(twice.standard_deviation, 2 * found.standard_deviation)
    torch.testing.assert_close(twice.sequence_standard_deviation, 2 * found.sequence_standard_deviation)
    with pytest.raises(
        ValueError, match="epistemic: got a generation by='linear', expected samples.*Fix: standard_dev"
    ):
        _ = found.epistemic
    item = found.to_dict()["items"][0]
    assert "epistemic" not in item and "aleatoric" not in item and len(item["standard_deviation"]) == NEW
    assert item["sequence_standard_deviation"] == pytest.approx(float(found.sequence_standard_deviation[0]))


def test_samples_have_standard_deviations_too() -> None:
    adapter, batch = zoo.bayesian("llama", depth=2, sigma=SMALL), zoo.prompt(2)
    linear, sampled = generate(adapter, batch), generate(adapter, batch, by="samples", samples=400)
    assert torch.equal(linear.sequences, sampled.sequences)
    for name in ("standard_deviation", "sequence_standard_deviation"):
        ratio = getattr(sampled, name) / getattr(linear, name)
        assert (ratio - 1).abs().max() < 5 / 400**0.5
    odd = generate(adapter, batch, by="samples", samples=[0, 2, 4])
    torch.testing.assert_close(odd.standard_deviation, odd.sample_log_probabilities.std(0))
    one = generate(adapter, batch, by="samples", samples=1)
    assert one.standard_deviation.isnan().all() and one.to_dict()["items"][0]["sequence_standard_deviation"] is None


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": "mean"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_search(options: dict[str, Any]) -> None:
    """The text is that of PEFT's model; options that samples of a span cannot follow are none of this one's concern."""
    adapter = zoo.bayesian("llama", depth=2, sigma=0.1, span="answer")
    batch = zoo.prompt(1 if "assistant_model" in options or "prompt_lookup_num_tokens" in options else 2)
    plain = {n: v for n, v in options.items() if n != "assistant_model"}
    torch.manual_seed(3)
    found = generate(adapter, batch, **options)
    torch.manual_seed(3)
    assert torch.equal(found.sequences, greedy(adapter, batch, **plain))
    mask = batch["attention_mask"].repeat_interleave(len(found.sequences) // len(batch["input_ids"]), 0)
    assert_varies_as(found, halves(adapter, found, mask), 0.1)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, batch = zoo.bayesian("llama", depth=2), zoo.prompt(1)
    with pytest.raises(ValueError, match="has no sigma yet"):
        generate(adapter, batch)
    adapter.sigma = 0.1
    with pytest.raises(ValueError, match="by"):
        generate(adapter, batch, by="laplace")
    with monkeypatch.context() as patched, adapter.predictive(2), pytest.raises(SamplingError, match="open already"):
        patched.setattr(adapter.model, "generate", None)  # refused before anything is generated
        generate(adapter, batch)
    with adapter.model.disable_adapter(), pytest.raises(SamplingError, match="switched off"):
        generate(adapter, batch)
    adapter.by = "samples"
    with pytest.warns(UserWarning, match="searched by='samples', expected one searched by='linear'") as seen:
        generate(adapter, batch)
    assert seen[0].filename == __file__
    adapter.sigma = 0.1  # set by hand, it holds for both
    adapter.anatomy.head.weight.data[5] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite under the mean adapter; the first module"):
        generate(adapter, batch)


# Command line ---------------------------------------------------------------------------------------------------------


def test_command(tfb: Callable[..., tuple[int, str, str]], llama: Folders, tmp_path: Path) -> None:
    from tfb_ext.app.loading import load_adapter

    page = tmp_path / "page.html"
    asks = ("generate", "-a", llama.adapter, "--device", "cpu", "--dtype", "float32", "-p", "area man", "-p", "senate")
    asks += ("--sigma", 0.1, "--max-new-tokens", 3, "--span", "answer", "--by", "linear")
    code, out, err = tfb(*asks, "--json", "--html", page)
    assert code == 0, err
    document = json.loads(out)
    model = load_adapter(str(llama.adapter), device="cpu", dtype="float32")
    adapter = tfb_ext.bayesianize(model.model, sigma=0.1, span="answer")
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = tfb_ext.generate(adapter, ["area man", "senate"], model.tokenizer, by="linear", **options).to_dict()
    assert document["by"] == "linear" and document["samples"] == []
    for item, other in zip(document["items"], expected["items"], strict=True):
        assert item["tokens"] == other["tokens"] and "epistemic" not in item
        assert item["standard_deviation"] == pytest.approx(other["standard_deviation"], rel=1e-3)
    text = page.read_text()
    assert text.count('class="token"') == sum(len(item["tokens"]) for item in document["items"])
    assert "standard deviation of the log probability: 0" in text and "aleatoric" not in text
    code, out, err = tfb(*asks)
    assert code == 0 and "standard deviation of the log probability, nats: below 0.2" in out and "no samples" in out
    assert CliRunner().invoke(app, list(map(str, (*asks[:-1], "laplace")))).exit_code == 2
