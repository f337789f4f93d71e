"""The task: is this headline sarcastic? Satire from The Onion against news from HuffPost, yes or no.

A headline's split depends on nothing but its text: SHA-256 of it, modulo 100. So splits never overlap, do not move when
headlines are added or dropped, and need no file of indices. Within a split, headlines are in the order of their hash.
"""

from __future__ import annotations

import hashlib
import json

from ...data import Example
from . import assets

PROMPT = "Headline: {headline}\nSarcastic:"
CHOICES = (" no", " yes")  # single tokens of the demonstration's model; the index is the data set's own label

BUCKETS = {
    "test": range(0, 20),
    "anchor": range(20, 30),
    "validation": range(30, 40),
    "train": range(40, 100),
}


def split_of(headline: str) -> str:
    """The name of the split that the headline belongs to."""
    bucket = int(_digest(headline), 16) % 100
    return next(name for name, buckets in BUCKETS.items() if bucket in buckets)


def load_split(name: str, limit: int | None = None) -> list[Example]:
    """The first ``limit`` examples (all by default) of the split ``name``: test, anchor, validation or train.

    Raises:
        ValueError: no such split, or fewer than ``limit`` examples in it.
        DemoAssetError: the headlines cannot be had.
    """
    if name not in BUCKETS:
        raise ValueError(f"no split {name!r}; expected one of {', '.join(BUCKETS)}")
    examples = _splits()[name]
    if limit is not None and not 0 < limit <= len(examples):
        raise ValueError(f"limit={limit} of the split {name!r}: expected 1 to {len(examples)}")
    return examples[:limit]


def _splits() -> dict[str, list[Example]]:
    labels: dict[str, int] = {}
    with assets.unpacked_file(assets.HEADLINES).open(encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            labels[record["input"][-1]["content"]] = int(record["ideal"])
    splits: dict[str, list[Example]] = {name: [] for name in BUCKETS}
    for headline in sorted(labels, key=_digest):
        splits[split_of(headline)].append(Example(PROMPT.format(headline=headline), CHOICES, labels[headline]))
    return splits


def _digest(headline: str) -> str:
    return hashlib.sha256(headline.encode("utf-8")).hexdigest()
