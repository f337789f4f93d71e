"""The authors' search in plain torch (``bench/official.py``): its noise, its rule, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor

import tfb_ext
from bench import parity
from bench.official import OfficialResult, bisect, official_adapter, official_search, pseudo_nll
from bench.sequential import signs

ITEMS = 16


def sharp_model(name: str = "llama") -> Any:
    """A tiny model that is sure of its answers, so that noise changes their NLL by a lot."""
    peft = zoo.peft_model(name)
    with torch.no_grad():
        peft.get_base_model().get_output_embeddings().weight.mul_(6.0)
    return peft


def own_probabilities(peft: Any, anchors: Any) -> Tensor:
    with torch.no_grad():
        batch = anchors.collate(range(len(anchors)))
        batch.pop("index")
        return torch.softmax(peft(**batch).logits[:, -1, list(anchors.choice_ids)], dim=-1)


# The noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_noise_it_is_the_mean_adapter(name: str) -> None:
    peft, anchors = sharp_model(name), small_sets.encoded(ITEMS)
    plain = own_probabilities(peft, anchors)
    with official_adapter(peft, "default", 0) as twin:
        batches = twin.batches(anchors, 5)
        mean = twin.probabilities(batches)
        twin.decompose(1e-9)
        vanishing = twin.probabilities(batches, 2)
    torch.testing.assert_close(mean, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vanishing, plain, rtol=1e-4, atol=1e-5)


def test_the_model_is_restored() -> None:
    peft, anchors = sharp_model(), small_sets.encoded(ITEMS)
    before, plain = copy.deepcopy(peft.state_dict()), own_probabilities(peft, anchors)
    official_search(peft, "default", anchors, steps=1, samples=1)
    with pytest.raises(KeyError), official_adapter(peft, "default", 0):
        raise KeyError
    assert all(torch.equal(before[name], value) for name, value in peft.state_dict().items())
    assert not any("forward" in module.__dict__ for module in peft.modules())
    assert torch.equal(own_probabilities(peft, anchors), plain)


@pytest.mark.slow
def test_nll_is_that_of_flipout_on_average() -> None:
    """The two draw different noise, so averages are compared: of the NLL of four samples' mean and of single samples."""
    groups, size, sigma = 30, 4, 0.05
    peft, anchors = sharp_model(), small_sets.encoded(ITEMS)
    adapter = tfb_ext.bayesianize(peft, antithetic=False, mode="flipout")
    labels = own_probabilities(peft, anchors).argmax(dim=-1)
    with official_adapter(peft, "default", 0) as twin:
        twin.decompose(sigma)
        batches = twin.batches(anchors, ITEMS)
        theirs = torch.stack([twin.probabilities(batches) for _ in range(groups * size)])
    batch = anchors.collate(range(ITEMS))
    batch.pop("index")
    columns = torch.tensor(anchors.choice_ids)
    with adapter.predictive(4 * groups * size, sigma, keep_samples=True, columns=columns) as view:
        peft(**batch, logits_to_keep=1)
    assert view.sample_outputs is not None
    ours = view.sample_outputs[:, :, -1].exp()
    base = pseudo_nll(own_probabilities(peft, anchors), labels)
    for count in (1, size):
        a, b = (torch.tensor([pseudo_nll(p, labels) for p in averaged(side, count)]) for side in (ours, theirs))
        error = math.sqrt(float(a.var()) / len(a) + float(b.var()) / len(b))
        assert abs(float(a.mean() - b.mean())) < 4 * error
        assert float(b.mean()) - base > 10 * error  # the noise is there, and the comparison could see it missing


def averaged(probabilities: Tensor, count: int) -> Tensor:
    """Averages of ``count`` consecutive samples of (S, N, C)."""
    return probabilities.reshape(-1, count, *probabilities.shape[1:]).mean(dim=1)


def test_signs_are_plus_and_minus_one() -> None:
    drawn = signs(torch.empty(100, 100, dtype=torch.bfloat16), torch.Generator().manual_seed(0)).float()
    assert torch.equal(drawn.abs(), torch.ones(100, 100))
    assert abs(float(drawn.mean())) < 5 / 100
    again = signs(torch.empty(100, 100, dtype=torch.bfloat16), torch.Generator().manual_seed(0)).float()
    assert torch.equal(drawn, again)


# The rule -----------------------------------------------------------------------------------------------------------


def sixteenths(sigma: float) -> float:
    return (sigma - 0.001) / 0.014 * 16


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.0, 0.5), (1.0, 1.0), (7.4, 7.5), (8.0, 8.0), (8.1, 8.5), (15.4, 15.5), (15.9, 16.0)],
)
def test_picks_the_smallest_middle_that_violates(threshold: float, expected: float) -> None:
    """NLL 2 of 10 anchors that jumps to where the ratio is over the tolerance once sigma is ``threshold`` or more."""
    sigma, evaluations = bisect(lambda s: 2.0 if sixteenths(s) < threshold - 1e-6 else 2.21, 2.0, 10)
    assert sixteenths(sigma) == pytest.approx(expected)
    assert len(evaluations) == 5
    violating = [e.sigma for e in evaluations if e.ratio > 0.01]
    assert sigma == min(violating, default=0.015)


def test_ratio_is_relative_and_divided_by_the_anchors() -> None:
    _, (found,) = bisect(lambda s: 1.5, 2.0, 10, steps=1)
    assert found.ratio == pytest.approx(0.25 / 10)
    assert bisect(lambda s: 1.5, 2.0, 10, tolerance=0.0249)[0] == pytest.approx(0.001 + 0.014 / 32)
    assert bisect(lambda s: 1.5, 2.0, 10, tolerance=0.0251)[0] == 0.015  # the end itself is never evaluated
    _, (exact,) = bisect(lambda s: 1e-3, 0.0, 10, steps=1)
    assert exact.ratio > 1e100
    _, (unchanged,) = bisect(lambda s: 0.0, 0.0, 10, steps=1)
    assert unchanged.ratio == 0


def test_looks_at_its_own_predictions_and_never_at_labels() -> None:
    peft, anchors = sharp_model(), small_sets.encoded(ITEMS)
    adapter = tfb_ext.bayesianize(peft)
    right, wrong = (small_sets.labelled(adapter, anchors, every) for every in (0, 1))
    assert right.labels != wrong.labels
    found = [
        values(official_search(peft, "default", data, steps=2, samples=2, batch_size=7)) for data in (right, wrong)
    ]
    assert found[0] == found[1]
    p = own_probabilities(peft, anchors)
    assert found[0][2] == pytest.approx(pseudo_nll(p, p.argmax(dim=-1)), rel=1e-4)


def values(result: OfficialResult) -> tuple[Any, ...]:
    return result.sigma, result.evaluations, result.baseline_nll


# Calls --------------------------------------------------------------------------------------------------------------


def test_takes_batches_over_the_vocabulary() -> None:
    peft = sharp_model()
    batches = [zoo.inputs(3, 8), zoo.inputs(2, 8)]
    result = official_search(peft, "default", batches, steps=2, samples=2, high=0.2)
    assert result.anchors == 5 and len(result.evaluations) == len(result.seconds_per_step) == 2
    logits = torch.cat([peft(**batch).logits[:, -1] for batch in batches]).detach()
    assert result.baseline_nll == pytest.approx(float(-torch.log_softmax(logits, -1).amax(-1).mean()), rel=1e-4)
    assert result.peak_bytes == 0


def test_same_seed_same_result() -> None:
    peft, anchors = sharp_model(), small_sets.encoded(ITEMS)

    def search(seed: int) -> OfficialResult:
        return official_search(peft, "default", anchors, steps=2, samples=2, seed=seed)

    assert values(search(1)) == values(search(1)) != values(search(2))


def test_extrapolates_from_what_was_timed() -> None:
    result = OfficialResult(0.01, (), 1.0, 100, 2.0, (11.0, 13.0), (1.0, 1.0), 0)
    # Five steps on 300 anchors: the baseline's 2 s and a step's 10, 11 or 12 s three times, a step's decomposition once.
    assert result.seconds_of(5, 300) == (6 + 5 * 34, 6 + 5 * 31, 6 + 5 * 37)


def test_refusals() -> None:
    peft, anchors = sharp_model(), small_sets.encoded(ITEMS)
    with pytest.raises(ValueError, match="not the active one"):
        official_search(peft, "other", anchors)
    with pytest.raises(ValueError, match="ends in padding"):
        official_search(peft, "default", [zoo.inputs(3, left=False)])
    with pytest.raises(ValueError, match="label tokens"):
        official_search(peft, "default", small_sets.encoded(3, head=True))
    with pytest.raises(ValueError, match="no anchors"):
        official_search(peft, "default", [])
    adapter = tfb_ext.bayesianize(peft)
    with adapter.predictive(2, 0.1), pytest.raises(ValueError, match="nothing wraps"):
        official_search(peft, "default", anchors)


# Parity -------------------------------------------------------------------------------------------------------------


def run_of(number: int, sigma: float, official_sigma: float, accuracy: float = 0.8) -> parity.Parity:
    theirs = {"accuracy": 0.8, "ece": 0.05, "nll": 0.5}
    errors = {"accuracy": 0.01, "ece": 0.0, "nll": 0.1}
    return parity.Parity(
        number, sigma, official_sigma, 0.2, 0.3, {**theirs, "accuracy": accuracy}, theirs, errors, 1.0, 2.0
    )


def test_parity_counts_what_agrees() -> None:
    runs = [run_of(0, 0.008, 0.008), run_of(1, 0.008, 0.0115), run_of(2, 0.008, 0.008 * (1 + 1e-9), accuracy=0.821)]
    found = parity.summary(runs)
    assert (found["same_sigma"], found["same_metrics"], found["same"]) == (2, 2, 1)
    assert found["pairs_same_sigma"] == {"ours": 1.0, "official": 1 / 3, "between": 2 / 3}
    assert found["official_at_upper_end"] == 0
    assert found["nll_at_first_step"] == pytest.approx({"ours": 0.2, "official": 0.3, "standard_error": 0.0})
    assert found["accuracy"]["standard_error"] == pytest.approx(0.021 / 3)  # the spread of ours, over the root of three
    assert parity.summary(runs[:1])["nll"]["standard_error"] is None


def test_paired_errors_see_only_differences() -> None:
    labels = torch.arange(60) % 2
    p = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    p = p / p.sum(1, keepdim=True)
    assert parity.paired_errors(p, p, labels, 20) == {"accuracy": 0.0, "ece": 0.0, "nll": 0.0}
    other = torch.where(torch.arange(60)[:, None] % 3 == 0, p.flip(1), p)  # a third of the items the other way round
    errors = parity.paired_errors(p, other, labels, 300)
    change = (p.gather(1, labels[:, None]).log() - other.gather(1, labels[:, None]).log())[:, 0]
    assert errors["nll"] == pytest.approx(float(change.std()) / 60**0.5, rel=0.2)


def both(samples: int, steps_apart: bool, **options: Any) -> parity.Parity:
    adapter = tfb_ext.bayesianize(sharp_model(), antithetic=False, mode="flipout")
    anchors = small_sets.encoded(ITEMS)
    test = small_sets.labelled(adapter, small_sets.encoded(ITEMS, seed=2), wrong_every=3)
    run = parity.compare(adapter, anchors, test, 3, samples=samples, batch_size=8, tolerance=0.005, **options)
    assert run.metrics.keys() == run.official_metrics.keys() == run.errors.keys()
    assert adapter.sigma is None
    assert steps_apart == (run.nll != pytest.approx(run.official_nll, rel=1e-4))
    return run


@pytest.mark.slow
def test_with_the_same_draws_both_searches_are_the_same() -> None:
    run = both(3, steps_apart=False, shared=True)
    assert run.same_sigma and run.sigma < 0.0149
    assert run.metrics == pytest.approx(run.official_metrics, abs=1e-3)


@pytest.mark.slow
def test_with_draws_of_their_own_they_are_alike() -> None:
    run = both(3, steps_apart=True, shared=False)
    assert run.nll == pytest.approx(run.official_nll, rel=0.5)


def test_shared_draws_need_the_same_range() -> None:
    adapter = tfb_ext.bayesianize(sharp_model(), antithetic=False, mode="flipout")
    with official_adapter(adapter.model, adapter.name, 0) as twin:
        weight = twin.layers[0].lora_B[adapter.name].weight
        weight.data.copy_(torch.randn_like(weight))
        with pytest.raises(ValueError, match="off a rotation"):
            parity.SharedNoise(adapter, twin)
