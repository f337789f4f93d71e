"""Adaptive sampling: the rule keeps its promise on synthetic draws; predict stops early, with the fixed run's samples."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor

from tfb_ext import predict
from tfb_ext.adaptive import FIRST_LOOK, StoppingRule, draw_size, student_quantile
from tfb_ext.forward.engine import Scorer
from tfb_ext.forward.repacking import Repacking
from tfb_ext.prediction import Prediction

SIGMA, MOST = 0.05, 30
bayesian = partial(zoo.bayesian, sigma=SIGMA)


def assert_prefix(found: Prediction, fixed: Prediction) -> None:
    """Each item has the first k samples of the fixed run and nothing after them."""
    assert found.sample_probabilities.shape == fixed.sample_probabilities.shape and found.samples == fixed.samples
    for i, k in enumerate(found.samples_drawn.tolist()):
        assert torch.allclose(found.sample_probabilities[:k, i], fixed.sample_probabilities[:k, i], atol=1e-5)
        assert found.sample_probabilities[k:, i].isnan().all()


# The rule -----------------------------------------------------------------------------------------------------------


def run(rule: StoppingRule, draws: Tensor) -> tuple[Tensor, Tensor]:
    """All draws (N, B, C) given to the rule look by look: draws used (B,) and the mean when stopped (B, C)."""
    used = torch.full((draws.shape[1],), rule.draws)
    for look in reversed(rule.looks):
        used[rule.settled(draws[:look])] = look
    got = torch.arange(rule.draws)[:, None] < used
    return used, draws.where(got[..., None], 0).sum(0) / used[:, None]


@pytest.mark.parametrize("confidence", [0.9, 0.99])
@pytest.mark.parametrize("classes", zoo.slow_but([2, 3, 10], 3))
@pytest.mark.parametrize("probabilities", [False, True])
def test_answers_change_less_often_than_promised(confidence: float, classes: int, probabilities: bool) -> None:
    """At every distance between the two best classes, ties included: normal values, and probabilities of normal logits."""
    rule, items = StoppingRule(confidence, 15), 4000
    generator = torch.Generator().manual_seed(classes)
    shares = []
    for margin in (0.0, 0.1, 0.3, 1.0, 3.0):
        values = torch.randn(rule.draws, items, classes, generator=generator, dtype=torch.float64)
        values[..., 0] += margin
        values = torch.softmax(values, -1) if probabilities else values
        used, mean = run(rule, values)
        flips = float((mean.argmax(-1) != values.mean(0).argmax(-1)).double().mean())
        allowed = 1 - confidence
        assert flips <= allowed + 5 * math.sqrt(allowed * confidence / items), (margin, flips)
        shares.append(float(used.double().mean()) / rule.draws)
    assert shares[0] > 0.75 and shares[-1] < 0.65 and shares[2:] == sorted(shares[2:], reverse=True)


@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_entropies_are_as_precise_as_promised(confidence: float) -> None:
    rule, items = StoppingRule(confidence, 30, precision=0.03), 4000
    generator = torch.Generator().manual_seed(5)
    center = 2 * torch.randn(items, 3, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.rand(items, 1, generator=generator) * torch.randn(30, items, 3, generator=generator)
    draws = torch.softmax(center + noise, -1)
    used, mean = run(rule, draws)
    off = (torch.special.entr(mean).sum(-1) - torch.special.entr(draws.mean(0)).sum(-1)).abs()
    allowed = 1 - confidence
    assert float((off > 0.03).double().mean()) <= allowed + 5 * math.sqrt(allowed * confidence / items)
    assert used.min() == FIRST_LOOK and used.max() == 30 and 8 < float(used.double().mean()) < 22


def test_draws_that_agree_settle_at_the_first_look() -> None:
    same = torch.tensor([0.4, 0.6]).expand(FIRST_LOOK, 3, 2)
    for precision in (None, 0.01):
        rule = StoppingRule(0.99, 15, precision)
        assert rule.looks[0] == FIRST_LOOK >= 4 and rule.settled(same).all()
    certain = torch.tensor([0.0, 1.0]).expand(FIRST_LOOK, 3, 2)
    assert StoppingRule(0.99, 15, 0.01).settled(certain).all()
    tied = torch.tensor([0.5, 0.5]).expand(FIRST_LOOK, 3, 2)
    assert not StoppingRule(0.99, 15).settled(tied).any()
    broken = same.clone()
    broken[1, 1] = math.nan
    for precision in (None, 0.01):
        assert StoppingRule(0.99, 15, precision).settled(broken).tolist() == [True, False, True]


def test_looks_ascend_and_leave_a_third_to_save() -> None:
    for draws in range(FIRST_LOOK + 1, 200):
        looks = StoppingRule(0.9, draws).looks
        assert looks[0] == FIRST_LOOK and list(looks) == sorted(set(looks)) and looks[-1] < draws
        assert all(3 * look <= 2 * draws for look in looks[1:])


@pytest.mark.parametrize(
    ("degrees", "tail", "t"),  # of published tables
    [(1, 0.05, 6.314), (2, 0.01, 6.965), (3, 0.005, 5.841), (4, 0.025, 2.776), (9, 0.001, 4.297), (60, 0.025, 2.000)],
)
def test_quantiles_of_student(degrees: int, tail: float, t: float) -> None:
    assert math.isclose(student_quantile(tail, degrees), t, abs_tol=5e-4)


def test_draws_are_pairs_only_of_mirrored_samples() -> None:
    assert draw_size(range(30), True, 30) == 2 and draw_size(range(15), False, 15) == 1
    assert draw_size((8, 9, 2, 3, 4, 5, 6, 7, 0, 1), True, None) == 2
    assert draw_size((0, 2, 4, 6, 9), True, None) == 1  # no two of them mirror each other
    for numbers, antithetic, wanted in (
        (range(15), True, "a count must be even"),
        ((1, 2, 3, 0, 4, 5, 6, 7, 8, 9), True, "side by side"),
        ((0, 1, 2, 3, 4, 4), False, "different numbers"),
    ):
        with pytest.raises(ValueError, match=f"samples is given, expected .*{wanted}.*independent draws"):
            draw_size(numbers, antithetic, type("Given", (), {"__repr__": lambda _: "given"})())


# Against the fixed run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", zoo.slow_but([1, 7, None], 7))
@pytest.mark.parametrize("depth", ["all", 2, "head"])
def test_every_item_has_the_fixed_runs_first_samples(depth: int | str, batch_size: int | None) -> None:
    adapter, data = bayesian("llama-head", depth=depth), small_sets.encoded(24)
    sigma = {"all": 0.05, 2: 0.2, "head": 0.5}[depth]
    fixed = predict(adapter, data, MOST, sigma=sigma)
    found = predict(adapter, data, MOST, adaptive=0.99, sigma=sigma, batch_size=batch_size)
    assert_prefix(found, fixed)
    counts = set(found.samples_drawn.tolist())
    assert len(counts) > 2 and counts <= {2 * n for n in (*StoppingRule(0.99, MOST // 2).looks, MOST // 2)}
    assert (found.labels == fixed.labels).float().mean() >= 23 / 24
    everything = found.samples_drawn == MOST
    assert everything.any()
    for name in ("probabilities", "total", "aleatoric", "epistemic", "standard_error"):
        assert torch.allclose(getattr(found, name)[everything], getattr(fixed, name)[everything], atol=1e-5), name
    assert fixed.samples_drawn.eq(MOST).all() and found.choices == fixed.choices


@pytest.mark.parametrize("antithetic", [True, False])
def test_uncertainty_of_an_item_is_that_of_its_own_samples(antithetic: bool) -> None:
    adapter, data = bayesian(antithetic=antithetic), small_sets.encoded(24)
    found = predict(adapter, data, MOST, adaptive=0.95)
    assert len(set(found.samples_drawn.tolist())) > 2
    assert found.probabilities.isfinite().all() and found.standard_error.isfinite().all()
    for i, k in enumerate(found.samples_drawn.tolist()):
        alone = predict(adapter, data.select([i]), k)
        for name in ("probabilities", "total", "aleatoric", "epistemic", "standard_error", "labels"):
            assert torch.allclose(getattr(found, name)[i], getattr(alone, name)[0], atol=2e-5), name


@pytest.mark.parametrize("name", zoo.slow_but(["gpt2", "gemma2", "bert", "llama-cls"], "bert"))
def test_other_architectures(name: str) -> None:
    adapter = bayesian(name, sigma=0.1, depth=2)
    data = small_sets.encoded(16, head=name in zoo.CLASSIFIERS)
    found = predict(adapter, data, MOST, adaptive=0.99, batch_size=3)
    assert found.samples_drawn.min() < MOST < int(found.samples_drawn.sum())
    assert_prefix(found, predict(adapter, data, MOST))


@pytest.mark.parametrize("depth", ["all", 2])
def test_batches_of_a_classification_head_shrink(depth: int | str) -> None:
    adapter = zoo.compared(bayesian("llama-cls", depth=depth))
    batches = [zoo.batch_for("llama-cls", rows) for rows in (8, 5)]
    rows = small_sets.rows_through(adapter.anatomy.blocks[3].input_layernorm)
    found = predict(adapter, batches, MOST, adaptive=0.99)
    assert sum(rows) == int(found.samples_drawn.sum()) < 13 * MOST
    assert_prefix(found, predict(adapter, batches, MOST))


def test_the_trunk_runs_once_an_item_and_later_batches_are_full() -> None:
    adapter, data = zoo.compared(bayesian(depth=2, sigma=0.2)), small_sets.encoded(24)
    below, above = (small_sets.rows_through(adapter.anatomy.blocks[i].input_layernorm) for i in (1, 2))
    found = predict(adapter, data, MOST, adaptive=0.99, batch_size=4)
    assert below == [4] * 6 and sum(above) == int(found.samples_drawn.sum()) < 24 * MOST
    second = int((found.samples_drawn > 8).sum())
    assert second > 4 and above[6] == 4 * 4  # four samples of as many items, from several of the first batches


def test_precision_settles_the_entropy() -> None:
    adapter, data = bayesian(), small_sets.encoded(24)
    fixed = predict(adapter, data, MOST)
    found = predict(adapter, data, MOST, adaptive=0.99, precision=0.03)
    assert_prefix(found, fixed)
    assert ((found.total - fixed.total).abs() <= 0.03).all()
    assert len(set(found.samples_drawn.tolist())) > 1
    finer = predict(adapter, data, MOST, adaptive=0.99, precision=0.001)
    assert finer.samples_drawn.float().mean() > found.samples_drawn.float().mean()


def test_progress_counts_settled_items(capsys: pytest.CaptureFixture[str]) -> None:
    predict(bayesian(), small_sets.encoded(12), MOST, adaptive=0.99, progress=True)
    assert "12/12" in capsys.readouterr().err


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [0.5, 1.0, 1, True, 99, math.nan, "0.99"])
def test_refuses_a_confidence(adaptive: Any) -> None:
    with pytest.raises(ValueError, match="adaptive is .*, expected a confidence between 0.5 and 1 such as 0.95"):
        predict(bayesian(), small_sets.encoded(2), MOST, adaptive=adaptive)


@pytest.mark.parametrize("precision", [0, -1.0, math.inf, math.nan, True, "fine"])
def test_refuses_a_precision(precision: Any) -> None:
    with pytest.raises(ValueError, match="precision is .*, expected nats above 0"):
        predict(bayesian(), small_sets.encoded(2), MOST, adaptive=0.99, precision=precision)


def test_refuses_what_cannot_stop() -> None:
    data = small_sets.encoded(2)
    with pytest.raises(ValueError, match="samples is 0, the mean adapter"):
        predict(bayesian(), data, 0, adaptive=0.99)
    with pytest.raises(ValueError, match=r"precision is 0\.01 without adaptive="):
        predict(bayesian(), data, MOST, precision=0.01)
    with pytest.raises(ValueError, match="samples is 8, expected more than 8 with adaptive=.* 4 mirrored pairs"):
        predict(bayesian(), data, 8, adaptive=0.99)
    with pytest.raises(ValueError, match="samples is 4, expected more than 4 with adaptive=.* 4 samples"):
        predict(bayesian(antithetic=False), data, 4, adaptive=0.99)
    with pytest.raises(ValueError, match="samples is 15, expected whole mirrored pairs"):
        predict(bayesian(), data, 15, adaptive=0.99)
    with pytest.raises(ValueError, match="draws is 4, expected more than 4"):
        StoppingRule(0.99, 4)
    with pytest.raises(ValueError, match="mode is 'flipout'.*needs mode='weight'"):
        predict(bayesian(mode="flipout"), data, MOST, adaptive=0.99)
    with pytest.raises(ValueError, match="labels tokens.*adaptive=None"):
        batch = zoo.inputs(2)
        predict(bayesian(), [{**batch, "labels": batch["input_ids"]}], MOST, adaptive=0.99)


# The scorer's part --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("most", zoo.slow_but([2, 9, 1000], 9))
def test_out_of_memory_keeps_the_trunk_in_halves(most: int) -> None:
    """Whether the first batches or the packed ones do not fit: rows below run once, and samples are the same."""
    adapter, data = bayesian(depth=2), small_sets.encoded(12)
    plenty = torch.cat([Scorer(adapter, data.select([i])).samples(b, adapter.batch(4)) for i in range(12)
                        for b in Scorer(adapter, data.select([i])).batches], dim=1)  # fmt: skip
    scorer = Scorer(adapter, data, batch_size=4, keep_trunk=True)
    for item in scorer.batches:
        scorer.samples(item, adapter.batch(4))
    below = small_sets.rows_through(adapter.anatomy.blocks[1].input_layernorm)

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        if len(args[0] if args else kwargs["hidden_states"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    adapter.anatomy.blocks[3].register_forward_pre_hook(refuse, with_kwargs=True)
    for chosen in ([0, 3, 4, 5, 7, 11], [3, 4, 11], [4]):
        seen = []
        for item in Repacking(scorer).select(torch.tensor(chosen), 4):
            assert torch.allclose(scorer.samples(item, adapter.batch(4)), plenty[:, item.index], atol=1e-5)
            seen += item.index.tolist()
        assert sorted(seen) == chosen
    assert below == []
    for item in scorer.batches:
        assert torch.allclose(scorer.samples(item, adapter.batch(4)), plenty[:, item.index], atol=1e-5)
    assert below == []
    for item in Repacking(scorer).select(torch.arange(12), 4):  # by now from halves where the batches did not fit
        assert torch.allclose(scorer.samples(item, adapter.batch(4)), plenty[:, item.index], atol=1e-5)
    assert below == [] and scorer.trunk is not None
    assert {key for _, key in scorer.trunk.hidden} == {h.key for b in scorer.batches for h in scorer.memory.parts(b)}


def test_items_beyond_the_trunks_limit_run_again() -> None:
    adapter, data = bayesian(depth=2), small_sets.encoded(12)
    scorer = Scorer(adapter, data, batch_size=4, keep_trunk=True)
    first = [scorer.samples(item, adapter.batch(4)) for item in scorer.batches]
    assert scorer.trunk is not None
    scorer.trunk.forget(scorer.batches[1].key)
    below = small_sets.rows_through(adapter.anatomy.blocks[1].input_layernorm)
    for item in Repacking(scorer).select(torch.arange(12), 4):
        found = scorer.samples(item, adapter.batch(4))
        for batch, logs in zip(scorer.batches, first, strict=True):
            here = torch.isin(item.index, batch.index)
            order = [batch.index.tolist().index(i) for i in item.index[here].tolist()]
            assert torch.allclose(found[:, here], logs[:, order], atol=1e-5)
    assert sum(below) == 4
