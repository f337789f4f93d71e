from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tfb_ext.checks import (
    MOST_SAMPLES,
    as_number,
    check_choice,
    check_count,
    check_dense,
    check_number,
    check_samples,
    check_seed,
    check_sigma,
    kind,
)


def test_integers_of_any_library() -> None:
    for given in (3, np.int64(3), np.uint8(3), range(3), np.arange(3), [np.int32(0), 1, 2]):
        found = check_samples(given)
        assert found == (0, 1, 2) and all(type(k) is int for k in found)
    assert check_samples([2**31 - 1]) == (2**31 - 1,) and type(check_count("n", np.int16(2))) is int


@pytest.mark.parametrize(
    "given",
    [0, -1, True, np.bool_(True), 2.5, float("nan"), "3", b"3", None, [], [-1], [0.0], [True], [2**31], np.array(3),
     torch.tensor(3), MOST_SAMPLES + 1, 2**31],
)  # fmt: skip
def test_refuses_samples(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^samples is .*, expected a count of at least 1 or .*Fix: "):
        check_samples(given)


@pytest.mark.parametrize("given", [0, -1, True, 1.0, "1", None, [1], np.float32(1)])
def test_refuses_counts(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^n is .*, expected a count of items of at least 1\. Fix: pass n=1 or more"):
        check_count("n", given, "a count of items")


@pytest.mark.parametrize("given", [True, np.bool_(True), "1", None, [1.0], torch.tensor(1.0), float("nan")])
def test_numbers(given: Any) -> None:
    assert np.isnan(as_number(given)) and as_number(np.float32(0.5)) == 0.5 and as_number(10**400) == float("inf")
    with pytest.raises(ValueError, match=r"^share is .*, expected a share from 0 to 1$"):
        check_number("share", given, lambda share: 0 <= share <= 1, "a share from 0 to 1")
    with pytest.raises(ValueError, match="^sigma is .*, expected a finite number above 0 "):
        check_sigma(given)
    with pytest.raises(ValueError, match=r"^seed must be an integer in \[0, 2\*\*64\)"):
        check_seed(given)
    assert (
        type(check_number("share", np.float64(1), bool, "")) is float and check_seed(np.uint64(2**64 - 1)) == 2**64 - 1
    )


def test_names() -> None:
    check_choice("mode", "a", ("a", "b"))
    for given in ("c", None, ["a"]):
        with pytest.raises(ValueError, match="^mode is .*, expected one of 'a', 'b'$"):
            check_choice("mode", given, ("a", "b"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "got a list, expected a tensor"),
        (torch.ones(2, device="meta"), r"got a tensor without data \(meta\)"),
        (torch.ones(2).to_sparse(), "got a tensor of layout sparse_coo, expected a dense tensor"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "got a tensor of layout nested"),
    ],
)
def test_tensors(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^x: {message}.* Fix: "):
        check_dense("x", given)
    assert check_dense("x", torch.ones(2)).sum() == 2 and kind(torch.ones(2, 3)) == "float32 of shape (2, 3)"
