from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tfb_ext.checks import MOST_SAMPLES, check_count, check_samples


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
