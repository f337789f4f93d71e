"""Philox4x32-10 against the known-answer vectors of Random123, exactly, on every implementation."""

from __future__ import annotations

import pytest
import torch

from tfb_ext import _C
from tfb_ext.ops import reference

# Random123's kat_vectors: zeros, ones, the digits of pi.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

known_answers = pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)


@known_answers
def test_host(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(_C.philox(counter, key)) == words


@known_answers
def test_reference(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    got = reference.philox(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in got) == words


@pytest.mark.gpu
@known_answers
def test_device(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert tuple(_C.philox_cuda(counter, key)) == words


def test_host_equals_reference_on_many_counters() -> None:
    generator = torch.Generator().manual_seed(1)
    counters = torch.randint(0, 2**32, (4, 500), generator=generator)
    key = (0x12345678, 0x9ABCDEF0)
    expected = torch.stack(reference.philox(tuple(counters), key))
    got = torch.tensor([_C.philox(tuple(column.tolist()), key) for column in counters.T]).T
    assert torch.equal(got, expected)


def test_words_out_of_range_are_refused() -> None:
    with pytest.raises(TypeError):
        _C.philox((2**32, 0, 0, 0), (0, 0))
