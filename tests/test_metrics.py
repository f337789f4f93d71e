from __future__ import annotations

import json
import math

import pytest
import torch

from tfb_ext.metrics import evaluate


def random_case(items: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(items, classes, generator=generator)
    probabilities = logits.softmax(1)
    # Labels drawn from the probabilities: gaps of both signs, so that the bins' edges matter.
    return probabilities, probabilities.multinomial(1, generator=generator).squeeze(1)


def test_by_hand() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 1, 0])
    metrics = evaluate(probabilities, labels)
    assert metrics.accuracy == 0.5 and metrics.items == 4
    # The bins' gaps, weighted by their share of the items: |.9 - .5| / 2, |.7 - 1| / 4, |.6 - 0| / 4.
    assert metrics.ece == pytest.approx(0.4 / 2 + 0.3 / 4 + 0.6 / 4, abs=1e-6)
    assert metrics.nll == pytest.approx(-math.log(0.9 * 0.1 * 0.7 * 0.4) / 4, abs=1e-6)
    assert metrics.brier == pytest.approx(2 * (0.01 + 0.81 + 0.09 + 0.36) / 4, abs=1e-6)


@pytest.mark.parametrize(("items", "classes"), [(1, 2), (257, 2), (500, 5)])
def test_definitions_item_by_item(items: int, classes: int) -> None:
    probabilities, labels = random_case(items, classes)
    bins: dict[int, list[tuple[float, bool]]] = {}
    nll = brier = hits = 0.0
    for row, label in zip(probabilities.double().tolist(), labels.tolist(), strict=True):
        top = max(row)
        bins.setdefault(int(top * 15), []).append((top, row.index(top) == label))
        hits += row.index(top) == label
        nll -= math.log(row[label])
        brier += sum((p - (c == label)) ** 2 for c, p in enumerate(row))
    ece = sum(abs(sum(p for p, _ in members) - sum(hit for _, hit in members)) for members in bins.values())
    metrics = evaluate(probabilities, labels)
    assert metrics.accuracy == pytest.approx(hits / items, rel=1e-6)
    assert metrics.nll == pytest.approx(nll / items, rel=1e-12)
    assert metrics.brier == pytest.approx(brier / items, rel=1e-12)
    # torchmetrics adds its bins up in float32.
    assert metrics.ece == pytest.approx(ece / items, abs=items * torch.finfo(torch.float32).eps)


def test_perfect_and_hopeless() -> None:
    sure = torch.eye(3)
    best = evaluate(sure, torch.arange(3))
    assert (best.accuracy, best.ece, best.nll, best.brier) == (1, 0, 0, 0)
    worst = evaluate(sure, torch.tensor([1, 2, 0]))
    assert (worst.accuracy, worst.ece, worst.brier) == (0, 1, 2)
    assert worst.nll == pytest.approx(-math.log(torch.finfo(torch.float32).tiny))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([[0.75, 0.25], [0.125, 0.875]])
    labels = torch.tensor([0, 0], dtype=torch.int32)
    assert evaluate(probabilities.to(dtype), labels) == evaluate(probabilities, labels)


def test_to_dict_is_json() -> None:
    metrics = evaluate(*random_case(20, 3))
    assert json.loads(json.dumps(metrics.to_dict())) == {
        "accuracy": metrics.accuracy,
        "ece": metrics.ece,
        "nll": metrics.nll,
        "brier": metrics.brier,
        "items": 20,
    }


HALF = [0.5, 0.5]


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([HALF], torch.tensor([0]), "probabilities: got a list, expected a tensor"),
        (torch.tensor([HALF]), [0], "labels: got a list, expected a tensor"),
        (torch.tensor([HALF]), torch.tensor([0], device="meta"), "labels: got meta, expected cpu.*Fix"),
        (torch.empty(0, 2), torch.empty(0, dtype=torch.int64), "no items"),
        (torch.tensor([HALF, [math.nan, 0.5]]), torch.tensor([0, 1]), "got .*nan.* for item 1, expected no NaN"),
        (torch.tensor([HALF, [0.5, 0.4]]), torch.tensor([0, 1]), "item 1, expected a sum of 1"),
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), "item 0, expected values from 0 to 1"),
        (torch.tensor([HALF]), torch.tensor([2]), "labels: got 2 for item 0, expected 0 to 1"),
        (torch.tensor([HALF]), torch.tensor([-100]), "labels: got -100 for item 0"),
        (torch.tensor([HALF]), torch.tensor([0, 1]), r"shape \(2,\)"),
        (torch.tensor([HALF]), torch.tensor([0.0]), "labels: got float32"),
        (torch.tensor([HALF]), torch.tensor([True]), "labels: got bool"),
        (torch.tensor(HALF), torch.tensor([0, 1]), r"shape \(2,\), expected floating"),
        (torch.tensor([[1], [1]]), torch.tensor([0, 0]), "probabilities: got int64"),
        (torch.ones(2, 1), torch.tensor([0, 0]), "at least two classes"),
    ],
)
def test_refuses(probabilities: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(probabilities, labels)
