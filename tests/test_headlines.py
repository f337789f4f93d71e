from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo_fakes import headline_lines, open_shop, write_wheel

from examples.headlines.train import load_base
from tfb_ext.app.demo import assets, headlines
from tfb_ext.app.demo.headlines import BUCKETS, CHOICES, load_split, split_of
from tfb_ext.data import encode


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return open_shop(tmp_path, monkeypatch)


def offer(shop: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the wheel hold these lines, and forget what was unpacked before."""
    monkeypatch.setattr(assets, "HEADLINES", write_wheel(shop, assets.HEADLINES, "\n".join(lines).encode()))
    for path in (assets.cache_dir() / assets.HEADLINES.wheel, assets.cache_dir() / assets.HEADLINES.member):
        path.unlink(missing_ok=True)


def texts(name: str) -> list[str]:
    return [example.prompt for example in load_split(name)]


@pytest.mark.slow
def test_every_headline_is_in_one_split(shop: Path) -> None:
    prompts = [prompt for name in BUCKETS for prompt in texts(name)]
    published = {json.loads(line)["input"][-1]["content"] for line in headline_lines(600)}
    assert len(prompts) == 600 and set(prompts) == {headlines.PROMPT.format(headline=text) for text in published}
    assert sorted(bucket for buckets in BUCKETS.values() for bucket in buckets) == list(range(100))


@pytest.mark.slow
def test_split_sizes_follow_the_buckets(shop: Path) -> None:
    for name, buckets in BUCKETS.items():
        expected = 6 * len(buckets)
        assert abs(len(load_split(name)) - expected) < 5 * (expected * (1 - len(buckets) / 100)) ** 0.5


def test_splits_never_change() -> None:
    # Known answers: SHA-256 of the text modulo 100, worked out with another program's sha256sum.
    assert split_of("area man no. 0") == "test"
    assert split_of("senate no. 1") == "train"
    assert split_of("naïve café") == "test"


@pytest.mark.slow
def test_order_of_the_file_and_repeats_do_not_matter(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_split("train")
    lines = headline_lines(600)
    offer(shop, [*reversed(lines), *lines[:50]], monkeypatch)
    assert load_split("train") == before
    assert texts("train") != sorted(texts("train"))  # in the order of the hash, not of the alphabet


@pytest.mark.slow
def test_labels_follow_their_headlines(shop: Path) -> None:
    for example in load_split("test"):
        assert CHOICES[example.label] == (" yes" if "area man" in example.prompt else " no")


@pytest.mark.slow
def test_limit_takes_the_first(shop: Path) -> None:
    assert load_split("anchor", 7) == load_split("anchor")[:7]
    count = len(load_split("anchor"))
    for limit in (0, -1, count + 1):
        with pytest.raises(ValueError, match=rf"limit={limit} .* 1 to {count}"):
            load_split("anchor", limit)


def test_unknown_split_lists_the_splits() -> None:
    with pytest.raises(ValueError, match="'dev'.*test, anchor, validation, train"):
        load_split("dev")


@pytest.mark.slow
def test_answers_are_single_tokens_of_the_model(shop: Path) -> None:
    tokenizer = load_base()[1]
    encoded = encode(load_split("anchor", 3), tokenizer)
    # Not decoded and compared as text: some versions of transformers drop a leading space when they decode.
    assert [[token] for token in encoded.choice_ids] == tokenizer(list(CHOICES), add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]).strip() for token in encoded.choice_ids] == [c.strip() for c in CHOICES]
