"""Detection of out-of-distribution items and selective prediction: values by hand, definitions pair by pair, ties, sets with one kind only."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tfb_ext.prediction import Prediction
from tfb_ext.uncertainty import detection, selective, uncertainty_scores

pytest.importorskip("torchmetrics", reason="areas under curves are torchmetrics'")


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_scores(items: int, seed: int, levels: int | None = None) -> Tensor:
    scores = torch.randn(items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores if levels is None else (scores * levels).round() / levels


def pairs(positive: Tensor, negative: Tensor) -> float:
    """The area under the ROC curve by its definition."""
    difference = positive[:, None] - negative[None]
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


class TestDetection:
    def test_by_hand(self) -> None:
        found = detection(t(0.1, 0.2, 0.4, 0.8), t(0.3, 0.9))
        # Of the eight pairs .3 is above two, .9 above all four.
        assert found.auroc == pytest.approx(6 / 8)
        # Out-of-distribution items found at ranks 1 and 4 from the top: precisions 1 and 2 / 4.
        assert found.aupr == pytest.approx((1 + 2 / 4) / 2)
        # In-distribution items from the surest: ranks 1, 2, 4, 5.
        assert found.aupr_in == pytest.approx((1 + 1 + 3 / 4 + 4 / 5) / 4)
        # Both are found at .3 and above, with two of four in-distribution items.
        assert found.fpr95 == pytest.approx(2 / 4)
        assert (found.items_in, found.items_out) == (4, 2)
        assert json.loads(json.dumps(found.to_dict()))["auroc"] == found.auroc

    @pytest.mark.parametrize("levels", [None, 1, 3])
    def test_definitions(self, levels: int | None) -> None:
        own, out = random_scores(61, 0, levels), random_scores(37, 1, levels) + 1
        found = detection(own, out)
        assert found.auroc == pytest.approx(pairs(out, own), abs=1e-6)
        thresholds = [float(s) for s in out if float((out >= s).double().mean()) >= 0.95]
        assert found.fpr95 == pytest.approx(min(float((own >= s).double().mean()) for s in thresholds), abs=1e-6)
        precision = [(s, float((out >= s).sum()) / float((torch.cat([own, out]) >= s).sum())) for s in out]
        assert found.aupr == pytest.approx(sum(p for _, p in precision) / len(out), abs=1e-6)

    def test_nineteen_of_twenty_are_enough(self) -> None:
        out = torch.cat([t(0.0), torch.ones(19, dtype=torch.float64)])
        assert detection(t(0.5, 0.5, 0.1), out).fpr95 == 0
        assert detection(t(0.5, 0.5, 0.1), out[:-1]).fpr95 == 1  # 18 of 19 are not

    def test_perfect_useless_and_reversed(self) -> None:
        low, high = t(0.1, 0.2), t(0.3, 0.4, 0.5)
        best, worst, same = detection(low, high), detection(high, low), detection(t(1.0, 1.0), t(1.0, 1.0, 1.0))
        assert (best.auroc, best.aupr, best.aupr_in, best.fpr95) == (1, 1, 1, 0)
        assert (worst.auroc, worst.fpr95) == (0, 1)
        assert (same.auroc, same.fpr95) == (0.5, 1) and same.aupr == pytest.approx(3 / 5)

    def test_only_the_order_counts(self) -> None:
        own, out = random_scores(40, 2), random_scores(40, 3) + 0.5
        found = detection(own, out)
        assert detection(own * 1e-20, out * 1e-20) == found  # no two of them tied by rounding
        assert detection(own * 1e6 + 3, out * 1e6 + 3) == found  # nor by a squash of what is large
        assert detection(own.exp(), out.exp()) == found

    def test_single_items_and_infinities(self) -> None:
        assert detection(t(0.0), t(math.inf)).auroc == 1 and detection(t(0.0), t(-math.inf)).auroc == 0

    @pytest.mark.parametrize(
        ("own", "out", "message"),
        [
            (t(), t(1.0), r"scores_in: got float64 of shape \(0,\), expected .* at least one"),
            (t(1.0), t(), r"scores_out: got float64 of shape \(0,\)"),
            (t(1.0), t(0.0, math.nan), "scores_out: got NaN for item 1, expected none"),
            (t(1.0)[None], t(1.0), r"scores_in: .* shape \(1, 1\), expected floating point of shape \(items,\)"),
            (torch.tensor([1]), t(1.0), "scores_in: got int64"),
            (t(1.0), [1.0], "scores_out: got a list, expected a tensor"),
        ],
    )
    def test_refuses(self, own: Tensor, out: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            detection(own, out)


class TestSelective:
    def test_by_hand(self) -> None:
        found = selective(t(0.4, 0.1, 0.3, 0.2), torch.tensor([True, False, False, True]))
        risk = [0, 1 / 2, 1 / 3, 2 / 4]
        assert found.risk.tolist() == pytest.approx(risk) and found.coverage.tolist() == [0.25, 0.5, 0.75, 1]
        assert found.aurc == pytest.approx(sum(risk) / 4)
        assert found.eaurc == pytest.approx(sum(risk) / 4 - (1 / 3 + 2 / 4) / 4)
        assert found.auroc == pytest.approx(3 / 4)
        assert found.risk_at(0.5) == pytest.approx(1 / 2) and found.risk_at(0.51) == pytest.approx(1 / 3)
        assert found.risk_at(1e-6) == 0 and found.risk_at(1) == pytest.approx(1 / 2)
        assert found.coverage_at(0) == 0.25 and found.coverage_at(0.4) == 0.75 and found.coverage_at(1) == 1

    def test_tied_items_share_their_errors(self) -> None:
        wrong = torch.tensor([False, True, False, True, True])
        found = selective(t(1.0, 2.0, 2.0, 2.0, 3.0), wrong)
        assert found.risk.tolist() == pytest.approx([0, 2 / 3 / 2, 4 / 3 / 3, 2 / 4, 3 / 5])
        same = selective(torch.ones(5), wrong)
        assert same.risk.tolist() == pytest.approx([3 / 5] * 5) and same.auroc == 0.5

    def test_is_the_mean_over_orders_of_ties(self) -> None:
        scores, wrong = random_scores(60, 4, 1), random_scores(60, 5) > 0.3
        jitter = [random_scores(60, seed) * 1e-6 for seed in range(400)]
        mean = torch.stack([selective(scores + j, wrong).risk for j in jitter]).mean(0)
        # 400 orders: five standard errors of a share are at most 5 * 0.5 / 20.
        assert (selective(scores, wrong).risk - mean).abs().max() < 0.125

    def test_the_best_order_has_no_excess(self) -> None:
        wrong = random_scores(101, 6) > 0.5
        best = selective(wrong.double() + 1e-3 * random_scores(101, 7), wrong)
        assert best.eaurc == pytest.approx(0, abs=1e-12) and best.auroc == 1
        assert selective(-wrong.double(), wrong).eaurc > 0.3

    def test_no_errors_and_nothing_else(self) -> None:
        scores = random_scores(7, 8)
        right, wrong = selective(scores, torch.zeros(7).bool()), selective(scores, torch.ones(7).bool())
        assert (right.aurc, right.eaurc, right.auroc, right.coverage_at(0)) == (0, 0, None, 1)
        assert (wrong.aurc, wrong.eaurc, wrong.auroc, wrong.coverage_at(0.5)) == (1, 0, None, 0)
        assert selective(t(1.0), torch.tensor([True])).risk.tolist() == [1]

    @pytest.mark.parametrize("items", [1, 7, 100, 101, 1234])
    def test_json(self, items: int) -> None:
        found = selective(random_scores(items, 9), random_scores(items, 10) > 0)
        told = json.loads(json.dumps(found.to_dict()))
        assert told["risk_at_coverage"].keys() == {"0.5", "0.8", "0.9", "0.95"}
        assert told["coverage_at_risk"].keys() == {"0.01", "0.05", "0.1"}
        curve = told["curve"]
        assert len(curve["coverage"]) == len(curve["risk"]) == min(items, 100) and curve["coverage"][-1] == 1
        assert curve["risk"][-1] == pytest.approx(float(found.risk[-1]))

    @pytest.mark.parametrize(
        ("scores", "wrong", "message"),
        [
            (t(), torch.tensor([]).bool(), r"scores: got float64 of shape \(0,\)"),
            (t(math.nan), torch.tensor([True]), "scores: got NaN for item 0"),
            (
                t(1.0, 2.0),
                torch.tensor([True]),
                r"wrong: got bool of shape \(1,\), expected bool of shape \(2,\)",
            ),
            (t(1.0), torch.tensor([1]), "wrong: got int64"),
            (t(1.0), [True], "wrong: got a list, expected bool"),
        ],
    )
    def test_refuses(self, scores: Tensor, wrong: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            selective(scores, wrong)

    @pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
    def test_refuses_shares(self, value: float) -> None:
        found = selective(t(1.0), torch.tensor([True]))
        with pytest.raises(ValueError, match="coverage is .*above 0 and up to 1"):
            found.risk_at(value)
        with pytest.raises(ValueError, match="risk is .*from 0 to 1"):
            found.coverage_at(value)
        with pytest.raises(ValueError, match="coverage is 0"):
            found.risk_at(0)


def made(p: Tensor) -> Prediction:
    options: dict[str, Any] = {"choices": ("a", "b"), "sigma": 0.1, "antithetic": False, "seconds": 0.0}
    return Prediction(p, samples=tuple(range(len(p))), **options)


class TestScores:
    def test_are_those_of_the_prediction(self) -> None:
        p = torch.softmax(torch.randn(4, 9, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
        found = uncertainty_scores(made(p))
        assert list(found) == ["confidence", "total", "aleatoric", "epistemic"]
        assert torch.allclose(found["confidence"], 1 - p.double().mean(0).amax(-1), atol=1e-6)
        for name in ("total", "aleatoric", "epistemic"):
            assert torch.allclose(found[name], getattr(made(p), name).double())

    def test_sure_items_keep_their_order(self) -> None:
        rest = torch.tensor([1e-12, 1e-10, 1e-11])
        found = uncertainty_scores(made(torch.stack([1 - rest, rest], dim=-1)[None]))
        assert found["confidence"].argsort().tolist() == [0, 2, 1]

    def test_a_single_pass_has_no_epistemic_part(self) -> None:
        assert "epistemic" not in uncertainty_scores(made(torch.full((1, 2, 2), 0.5)))
