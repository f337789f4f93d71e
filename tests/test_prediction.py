"""Predictions: separate passes in the data's order, identities of the entropies, standard errors, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import small_sets
import torch
import zoo
from torch import Tensor

from tfb_ext import predict, prediction
from tfb_ext.forward.engine import Scorer
from tfb_ext.prediction import Prediction

SIGMA = 0.3
bayesian = partial(zoo.bayesian, sigma=SIGMA)


def made(p: Tensor, samples: tuple[int, ...], antithetic: bool = True) -> Prediction:
    return Prediction(p, ("a", "b", "c"), SIGMA, samples, antithetic, 0.0)


def random_probabilities(*shape: int) -> Tensor:
    return torch.softmax(2 * torch.randn(*shape, generator=torch.Generator().manual_seed(3)), dim=-1)


# Against the oracle -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", zoo.slow_but([1, 3, None], 3))
@pytest.mark.parametrize("name", ["llama-head", "bert"])
def test_equals_separate_passes_in_the_data_sets_order(name: str, batch_size: int | None) -> None:
    adapter = bayesian(name, depth=2)
    data = small_sets.encoded(head=name == "bert")
    lengths = [len(ids) for ids in data.token_ids]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)
    numbers = [5, 2, 3]
    alone = zoo.separate_passes(adapter, numbers, SIGMA, small_sets.answers(adapter, data))
    found = predict(adapter, data, numbers, batch_size=batch_size)
    assert torch.allclose(found.sample_probabilities, alone, atol=1e-5)
    assert torch.allclose(found.probabilities, alone.mean(0), atol=1e-5)
    assert found.labels.tolist() == alone.mean(0).argmax(-1).tolist()
    assert (found.samples, found.sigma, found.choices) == ((5, 2, 3), SIGMA, small_sets.CHOICES)
    assert found.seconds > 0 and found.sample_probabilities.dtype == torch.float32


def test_no_samples_is_the_mean_adapter() -> None:
    adapter, data = bayesian(sigma=None), small_sets.encoded()  # no sigma needed
    found = predict(adapter, data, samples=0)
    with torch.no_grad():
        mean = small_sets.answers(adapter, data)()
    assert found.sample_probabilities.shape == (1, len(data), 3)
    assert torch.allclose(found.probabilities, mean, atol=1e-5)
    assert (found.samples, found.sigma) == ((), 0.0)
    assert found.standard_error.eq(0).all() and found.epistemic.abs().max() < 1e-6


def test_sigma_and_seed_count() -> None:
    adapter, data = bayesian(), small_sets.encoded()
    first = predict(adapter, data, 4)
    assert torch.equal(predict(adapter, data, 4).sample_probabilities, first.sample_probabilities)
    assert (predict(adapter, data, 4, sigma=0.1).probabilities - first.probabilities).abs().max() > 0.01
    assert predict(adapter, data, 4, sigma=0.1).sigma == 0.1 and adapter.sigma == SIGMA
    adapter.seed = 1
    assert (predict(adapter, data, 4).probabilities - first.probabilities).abs().max() > 0.01


def test_batches_of_a_classification_head() -> None:
    adapter = bayesian("llama-cls")
    batches = [zoo.batch_for("llama-cls", rows) for rows in (3, 2)]
    found = predict(adapter, batches, 4)
    with adapter.predictive(4):
        own = torch.cat([adapter.model(**b).logits for b in batches]).exp()
    assert torch.allclose(found.probabilities, own, atol=1e-5) and found.choices == ()


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    adapter, data = bayesian(), small_sets.encoded()
    predict(adapter, data, 2, progress=True)
    said = capsys.readouterr()
    assert said.out == "" and f"{len(data)}/{len(data)}" in said.err
    predict(adapter, data, 2)
    assert capsys.readouterr() == ("", "")


# Uncertainty --------------------------------------------------------------------------------------------------------


def test_entropies_add_up_and_keep_their_bounds() -> None:
    found = made(random_probabilities(6, 20, 3), tuple(range(6)))
    p = found.sample_probabilities.double()
    average = p.mean(0)
    divergence = (p * (p / average).log()).sum(-1).mean(0)  # the mutual information's other definition
    assert torch.allclose(found.epistemic.double(), divergence, atol=1e-6)
    assert torch.allclose(found.total, found.aleatoric + found.epistemic, atol=1e-6)
    assert (found.total <= math.log(3) + 1e-6).all() and (found.aleatoric >= 0).all() and (found.epistemic > 0).all()


def test_one_sample_knows_of_no_disagreement() -> None:
    found = predict(bayesian(), small_sets.encoded(), samples=1)
    assert found.epistemic.abs().max() < 1e-6 and torch.allclose(found.total, found.aleatoric)
    assert found.standard_error.isnan().all()


def test_certain_samples_that_disagree() -> None:
    p = torch.eye(3)[[0, 1, 2, 0]][:, None]
    found = made(p, (0, 1, 2, 3))
    assert found.aleatoric.eq(0).all()
    assert math.isclose(float(found.epistemic), 1.5 * math.log(2), rel_tol=1e-6)


def test_epistemic_is_never_below_zero() -> None:
    same = random_probabilities(1, 2000, 3).expand(7, -1, -1)
    found = made(same, tuple(range(7)))
    assert (found.total - found.aleatoric).min() < 0  # by rounding
    assert (found.epistemic >= 0).all() and found.epistemic.max() < 1e-6


def test_standard_error_counts_mirrored_samples_as_pairs() -> None:
    p = random_probabilities(6, 9, 3)
    pairs = (p[0::2] + p[1::2]) / 2
    by_pairs, by_samples = pairs.std(0) / math.sqrt(3), p.std(0) / math.sqrt(6)
    assert torch.allclose(made(p, (0, 1, 2, 3, 4, 5)).standard_error, by_pairs)
    assert torch.allclose(made(p, (4, 5, 0, 1, 8, 9)).standard_error, by_pairs)
    for samples in ((1, 2, 3, 4, 5, 6), (0, 2, 4, 6, 8, 10)):  # no two of them mirror each other side by side
        assert torch.allclose(made(p, samples).standard_error, by_samples)
    assert torch.allclose(made(p, (0, 1, 2, 3, 4, 5), antithetic=False).standard_error, by_samples)
    assert made(p[:2], (0, 1)).standard_error.isnan().all()
    assert made(p[:2], (0, 1), antithetic=False).standard_error.isfinite().all()


@pytest.mark.parametrize("antithetic", [True, False])
def test_standard_error_is_the_spread_over_independent_runs(antithetic: bool) -> None:
    """Twenty disjoint sets of eight samples: their averages spread as much as each set says by itself."""
    adapter = bayesian(antithetic=antithetic)
    found = predict(adapter, small_sets.encoded(6), range(160), sigma=0.1)
    sets = found.sample_probabilities.reshape(20, 8, 6, 3)
    spread = sets.mean(1).var(0).mean().sqrt()
    said = [made(s, tuple(range(8)), antithetic).standard_error.square().mean() for s in sets]
    # A variance from 20 runs is known to sqrt(2 / 19) = 32 %, averaged over items; the ratio of errors to half of it.
    assert 0.6 < float(torch.stack(said).mean().sqrt() / spread) < 1.6


# Refusals -----------------------------------------------------------------------------------------------------------


def test_refuses_a_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "MANY_CLASSES", zoo.VOCAB - 1)
    with pytest.raises(ValueError, match=f"head has {zoo.VOCAB} outputs.*adapter.predictive"):
        predict(bayesian(), [zoo.inputs(2)])
    assert predict(bayesian(), small_sets.encoded(3), 2).probabilities.shape == (3, 3)


@pytest.mark.parametrize("samples", [-1, True, False, 2.5, "3", [], [0.5], [-1], [2**31]])
def test_refuses_samples(samples: Any) -> None:
    with pytest.raises(ValueError, match="samples is .*, expected a count of at least 1"):
        predict(bayesian(), small_sets.encoded(2), samples)


def test_refuses_a_missing_or_bad_sigma() -> None:
    with pytest.raises(ValueError, match=r"no sigma yet; run tfb_ext\.search_sigma"):
        predict(bayesian(sigma=None), small_sets.encoded(2))
    for sigma in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma is .*, expected a finite number above 0"):
            predict(bayesian(), small_sets.encoded(2), sigma=sigma)


def test_refuses_empty_data_and_bad_batch_size() -> None:
    with pytest.raises(ValueError, match="data set is empty"):
        predict(bayesian(), small_sets.encoded(2).select([]))
    with pytest.raises(ValueError, match="batch_size is 0"):
        predict(bayesian(), small_sets.encoded(2), batch_size=0)


def test_labels_of_the_data_do_not_matter() -> None:
    adapter, data = bayesian(), small_sets.encoded(5)
    known = replace(data, labels=[2, 1, 0, 1, 2])
    assert Scorer(adapter, known).labelled
    assert torch.equal(predict(adapter, data, 2).probabilities, predict(adapter, known, 2).probabilities)
