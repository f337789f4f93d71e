"""Samples that differ at the last tokens alone, against passes of one row and one sample after a prompt of the mean adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import small_sets
import torch
import transformers as tf
from torch import Tensor
from zoo import CAUSAL, DEVICES, average, batch_for, bayesian, inputs, sampled_copy, slow_but

import tfb_ext
from tfb_ext.forward import batches
from tfb_ext.forward.caches import cache_argument, cache_of

SIGMA = 0.1
SAMPLES = [0, 1, 2, 5]
# Models whose tokens see those before them alone, and whose blocks keep keys and values.
NAMES = [*CAUSAL, "llama-cls"]
TOLERANCE = 1e-5


def passes(adapter: Any, batch: dict[str, Tensor], counts: list[int], samples: list[int] = SAMPLES) -> list[Tensor]:
    """The oracle: of each row (S, L, V) log probabilities at its L tokens, the last ``counts`` of them under each sample.

    The prompt is run by the mean adapter into a cache, alone and without padding; then each sample's weights are written into the
    model, and its tokens go on from a copy of that cache. Of a classifier (S, V).
    """
    model, found = adapter.anatomy.model, []
    name = cache_argument(model)
    for row, count in enumerate(counts):
        mask = batch["attention_mask"][row].bool()
        ids, places = (batch[n][row][mask][None] for n in ("input_ids", "position_ids"))
        start = max(ids.shape[1] - count, 0)
        parts = []
        for sample in samples:
            cache, logits = tf.DynamicCache(config=model.config), []
            for part in (slice(0, start), slice(start, None)):
                if not ids[:, part].shape[1]:
                    continue
                saved = sampled_copy(adapter, sample, adapter.sigma, adapter.random_layers) if part.stop is None else []
                try:
                    with torch.no_grad():
                        out = model(
                            input_ids=ids[:, part], position_ids=places[:, part], use_cache=True, **{name: cache},
                            attention_mask=torch.ones_like(ids[:, : part.stop]),
                        )  # fmt: skip
                finally:
                    for module, weight in saved:
                        module.weight = weight
                cache = cache_of(out)
                logits.append(torch.log_softmax(out.logits.float(), -1))
            parts.append(logits[-1] if logits[-1].dim() == 2 else torch.cat(logits, 1))
        found.append(torch.cat(parts))
    return found


def assert_rows(out: Tensor, rows: list[Tensor], batch: dict[str, Tensor]) -> None:
    """``out`` (B, K, V), the last K positions, is the mean over samples at every attended position."""
    for row, expected in enumerate(rows):
        own = out[row] if expected.dim() == 2 else out[row][batch["attention_mask"][row].bool()[-out.shape[1] :]]
        wanted = average(expected)
        wanted = wanted if expected.dim() == 2 else wanted[wanted.shape[0] - own.shape[0] :]
        torch.testing.assert_close(own, wanted, atol=TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "span", "depth"),
    slow_but(
        [(n, s, d) for n in NAMES for s in ("answer", 3) for d in ("all", 2)],
        ("llama", "answer", "all"), ("llama", 3, 2), ("mistral", 3, "all"), ("gemma2", "answer", "all"), ("gpt2", "answer", 2),
        ("llama-cls", "answer", "all"), ("llama-head", 3, "all"), ("mixtral", "answer", "all"),
    ),
)  # fmt: skip
def test_a_call_is_the_mean_of_separate_passes(name: str, span: Any, depth: Any, device: str) -> None:
    adapter = bayesian(name, device, sigma=SIGMA, span=span, depth=depth)
    batch = batch_for(name, device=device)
    count = 1 if span == "answer" else span
    expected = passes(adapter, batch, [count] * 3)
    with adapter.predictive(SAMPLES, keep_samples=True) as view:
        out = adapter.model(**batch).logits
    assert_rows(out, expected, batch)
    assert view.sample_outputs.shape == (4, *out.shape)
    assert_rows(average(view.sample_outputs), expected, batch)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("span", ["answer", 4, 50])
def test_rows_of_any_padding(name: str, span: Any) -> None:
    """The last tokens of a row are found by its mask, wherever they are; a short row is random as a whole."""
    adapter = bayesian(name, sigma=SIGMA, span=span)
    count = 1 if span == "answer" else span
    right = inputs(4, 9, left=False)
    holes = inputs(3, 9, padded=False)
    holes["attention_mask"][1, 2] = holes["attention_mask"][2, 7] = 0
    holes["position_ids"] = (holes["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    short = {n: v[:, -8:] for n, v in inputs(8, 9).items()}
    for batch in (right, *([holes] if name == "llama" else []), short):  # windows are counted in columns
        expected = passes(adapter, batch, [count] * len(batch["input_ids"]))
        with adapter.predictive(SAMPLES):
            assert_rows(adapter.model(**batch).logits, expected, batch)
            kept = adapter.model(**batch, logits_to_keep=2).logits
        assert kept.shape[1] == 2
        assert_rows(kept, expected, batch)


def test_targets_columns_and_hidden_states() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span=2)
    batch = inputs(3, 9, left=False)
    expected = passes(adapter, batch, [2] * 3)
    targets = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    with adapter.predictive(SAMPLES, targets=targets) as view:
        out = adapter.model(**batch, output_hidden_states=True)
    found = view.target_log_probabilities
    for row, rows in enumerate(expected):
        length = rows.shape[1]
        wanted = rows.gather(2, targets[row, :length].expand(4, length)[..., None])[..., 0]
        torch.testing.assert_close(found[:, row, :length], wanted, atol=TOLERANCE, rtol=1e-4)
    assert all(h.shape == (3, 9, 32) for h in out.hidden_states)
    columns = torch.tensor([5, 7, 60])
    with adapter.predictive(SAMPLES, columns=columns):
        out = adapter.model(**batch).logits
    chosen = [torch.log_softmax(rows[..., columns], -1) for rows in expected]
    assert_rows(out, chosen, batch)


@pytest.mark.parametrize(
    ("name", "kind"),
    slow_but(
        [(n, k) for n in CAUSAL for k in ("dynamic", "static") if (n, k) != ("mistral", "static")],
        ("llama", "static"), ("mistral", "dynamic"), ("gemma3", "static"),
    ),
)  # fmt: skip
def test_steps_from_a_cache(name: str, kind: str) -> None:
    adapter = bayesian(name, sigma=SIGMA, span=2)
    model = adapter.anatomy.model
    argument, whole = cache_argument(model), batch_for(name)
    expected = passes(adapter, whole, [5] * 3)
    prompt = {n: v[:, :6] for n, v in whole.items()}
    cache: Any = tf.DynamicCache(config=model.config)
    if kind == "static":
        cache = tf.StaticCache(config=model.config, max_cache_len=32)
    with adapter.predictive(SAMPLES):
        out = model(**prompt, use_cache=True, **{argument: cache})
        logits = [out.logits]
        for first, last in ((6, 7), (7, 9)):
            step = {n: v[:, first:last] for n, v in whole.items()} | {
                "attention_mask": whole["attention_mask"][:, :last]
            }
            out = model(**step, use_cache=True, **{argument: cache_of(out)})
            logits.append(out.logits)
    assert_rows(torch.cat(logits, 1), expected, whole)
    keys = cache_of(out).layers[-1].keys
    assert keys.shape[0] == 3  # the prompt's columns are there once
    assert keys.shape[2] == (32 if kind == "static" else 6 + len(SAMPLES) * 5)


def test_one_sample_is_the_same_beside_others_and_the_mean_at_sigma_zero() -> None:
    adapter = bayesian("llama", sigma=SIGMA, span="answer")
    batch = inputs(2, 9)
    with adapter.predictive(8, keep_samples=True) as view:
        adapter.model(**batch)
    together = view.sample_outputs
    with adapter.predictive([3], keep_samples=True) as view:
        adapter.model(**batch)
    torch.testing.assert_close(view.sample_outputs[0], together[3], atol=1e-5, rtol=1e-5)
    with adapter.predictive(2, sigma=1e-12), torch.no_grad():
        near = adapter.model(**batch).logits
    with torch.no_grad():
        mean = torch.log_softmax(adapter.model(**batch).logits, -1)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(near[real], mean[real], atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1])[:, :-1][real[:, :-1]].abs().max() == 0  # samples share the prompt
    assert (together[0] - together[1])[:, -1].abs().max() > 1e-3


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(tfb_ext.errors.GuardError, match="every token sees the whole text.*Fix: span='all'"):
        with bayesian("bert", sigma=SIGMA, span="answer").predictive(2):
            pass
    for span in ("last", 0, -1, True, 1.5, None, [1]):
        with pytest.raises(ValueError, match="span is .*expected 'all', 'answer' or a number of last tokens"):
            bayesian("llama", span=span)
    adapter = bayesian("llama", sigma=SIGMA, span=1)
    assert adapter.span == "answer"
    with pytest.raises(tfb_ext.errors.SamplingError, match="sampling\\(\\) gives rows that are random as a whole"):
        with adapter.sampling(2):
            pass
    with adapter.predictive(2), pytest.raises(tfb_ext.errors.SamplingError, match="output_attentions is on"):
        adapter.model(**inputs(), output_attentions=True)
    with pytest.raises(ValueError, match="full-rank"):
        bayesian("llama", span="answer", family="full-rank")


def test_a_context_of_another_span(tmp_path: Any) -> None:
    adapter = bayesian("llama", sigma=SIGMA)
    batch = inputs(2, 9)
    expected = passes(adapter, batch, [1] * 2)
    with adapter.predictive(SAMPLES, span="answer"):
        out = adapter.model(**batch)
    assert_rows(out.logits, expected, batch)
    cache = copy.copy(cache_of(out))
    with pytest.raises(tfb_ext.errors.SamplingError, match="of other samples"):
        with adapter.predictive(SAMPLES):
            adapter.model(**{**batch, cache_argument(adapter.anatomy.model): cache})
    adapter.span = 3
    adapter.save_pretrained(tmp_path)
    assert tfb_ext.load(adapter.unload(), tmp_path).span == 3


def choices(adapter: Any, shared: bool, **options: Any) -> Tensor:
    """(S, N, C) of items with choices of several tokens, the prompts shared or a row for each choice."""
    before = adapter.shares_prompts
    adapter.shares_prompts = lambda: shared and before()
    try:
        data = small_sets.sequences()
        return tfb_ext.predict(adapter, data, **options).sample_probabilities
    finally:
        del adapter.shares_prompts


@pytest.mark.parametrize("name", slow_but(["llama", "mistral", "llama-head", "gpt2", "phi3"], "llama"))
@pytest.mark.parametrize(("span", "depth"), [("all", "all"), ("all", 2), ("answer", "all"), (2, 2)])
def test_choices_that_share_a_prompt_are_those_of_rows_of_their_own(name: str, span: Any, depth: Any) -> None:
    adapter = bayesian(name, sigma=SIGMA, span=span, depth=depth)
    assert adapter.shares_prompts()
    for samples in (0, 5):
        rows = choices(adapter, False, samples=samples)
        torch.testing.assert_close(choices(adapter, True, samples=samples, batch_size=2), rows, atol=1e-5, rtol=1e-4)
    with small_memory():  # in several passes and halves, from kept prompts
        torch.testing.assert_close(choices(adapter, True, samples=5), rows, atol=1e-5, rtol=1e-4)
    some = choices(adapter, True, samples=12, adaptive=0.9)
    whole = choices(adapter, False, samples=12)
    drawn = ~some.isnan()
    torch.testing.assert_close(some[drawn], whole[drawn], atol=1e-5, rtol=1e-4)


@contextmanager
def small_memory() -> Iterator[None]:
    before = batches.ROWS_CPU
    batches.ROWS_CPU = 2
    try:
        yield
    finally:
        batches.ROWS_CPU = before


def test_a_prompt_runs_once_for_all_its_choices_and_samples() -> None:
    adapter, data = bayesian("llama", sigma=SIGMA, span="answer"), small_sets.sequences()
    assert adapter.shares_prompts()
    adapter.batch([0])
    with adapter.predictive(2):
        pass
    seen: list[int] = []
    block = adapter.anatomy.blocks[0]
    handle = block.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].shape[:2].numel()), with_kwargs=True)  # fmt: skip
    try:
        tfb_ext.predict(adapter, data, 6, batch_size=8)
    finally:
        handle.remove()
    longest = max(map(len, data.token_ids))
    each = max(len(c) for item in data.item_choice_tokens or [data.choice_tokens] for c in item or ())
    assert sum(seen) <= len(data) * (longest + 6 * len(data.choices) * each)


def test_samples_in_several_passes_go_on_from_the_prompt() -> None:
    adapter, data = bayesian("llama", sigma=SIGMA, span=2), small_sets.encoded(7)
    plenty = tfb_ext.predict(adapter, data, 8).sample_probabilities
    with small_memory():
        torch.testing.assert_close(tfb_ext.predict(adapter, data, 8).sample_probabilities, plenty, atol=1e-6, rtol=1e-5)
    rows = tfb_ext.predict(adapter, data, 8, batch_size=1).sample_probabilities
    torch.testing.assert_close(rows, plenty, atol=1e-5, rtol=1e-4)


def test_classifiers_from_kept_prompts() -> None:
    adapter, data = bayesian("llama-cls", sigma=SIGMA, span="answer"), small_sets.encoded(7, head=True)
    plenty = tfb_ext.predict(adapter, data, 8).sample_probabilities
    with small_memory():
        torch.testing.assert_close(tfb_ext.predict(adapter, data, 8).sample_probabilities, plenty, atol=1e-6, rtol=1e-5)
