"""A search's file: nothing that was computed is computed again, whatever ended it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_sets
import torch
import zoo

import tfb_ext
from tfb_ext import search_sigma
from tfb_ext.errors import ConfigError
from tfb_ext.search import SigmaSearch

OPTIONS: dict[str, Any] = {"samples": 4, "progress": False, "batch_size": 10, "recipe": "paper", "tolerance": 0.02}


def prepared(items: int = 30) -> tuple[Any, Any]:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama"))
    small_sets.sharpen(adapter, 6.0)
    return adapter, small_sets.labelled(adapter, small_sets.encoded(items), 3)


def same(a: SigmaSearch, b: SigmaSearch) -> bool:
    return (a.sigma, a.evaluations, a.baseline) == (b.sigma, b.evaluations, b.baseline)


class Interrupt:
    """Raises in the model's forward of that number, as Ctrl-C does."""

    def __init__(self, adapter: Any, at: int, error: type[BaseException]) -> None:
        self.left = at
        self.error = error
        self.calls = 0
        self.hook = adapter.anatomy.model.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        self.left -= 1
        if self.left == 0:
            raise self.error


@pytest.mark.slow
@pytest.mark.parametrize("error", zoo.slow_but([KeyboardInterrupt, RuntimeError], KeyboardInterrupt))
@pytest.mark.parametrize("at", zoo.slow_but([4, 6, 11], 6))
def test_goes_on_where_it_was_interrupted(error: type[BaseException], at: int, tmp_path: Path) -> None:
    adapter, anchors = prepared()
    whole = search_sigma(adapter, anchors, **OPTIONS, apply=False)
    path = tmp_path / "search.json"
    interrupt = Interrupt(adapter, at, error)
    with pytest.raises(error):
        search_sigma(adapter, anchors, **OPTIONS, checkpoint=path)
    interrupt.hook.remove()
    assert adapter.sigma is None  # nothing is half applied
    held = json.loads(path.read_text())
    assert held["sigma"] is None and held["records"]["evaluations"]
    with pytest.raises(ValueError, match=r"holds no finished search; give it to search_sigma\(\.\.\., checkpoint="):
        SigmaSearch.load(path)
    counter = Interrupt(adapter, 0, error)
    again = search_sigma(adapter, anchors, **OPTIONS, checkpoint=path)
    counter.hook.remove()
    assert same(again, whole) and adapter.sigma == whole.sigma
    batches = 3
    assert counter.calls == batches * (1 + len(whole.evaluations)) - (at - 1)


@pytest.mark.slow
def test_a_finished_search_costs_nothing_and_another_rule_uses_its_results(tmp_path: Path) -> None:
    adapter, anchors = prepared()
    path = tmp_path / "search.json"
    first = search_sigma(adapter, anchors, **OPTIONS, checkpoint=path)
    assert SigmaSearch.load(path) == first
    counter = Interrupt(adapter, 0, RuntimeError)
    assert same(search_sigma(adapter, anchors, **OPTIONS, checkpoint=path), first) and counter.calls == 0
    # Other batches, another metric, more steps: the same records.
    other = search_sigma(adapter, anchors, **(OPTIONS | {"metric": "flips", "batch_size": 30}), checkpoint=path)
    new = {e.sigma for e in other.evaluations} - {e.sigma for e in first.evaluations}
    # One batch of 30 rows x 4 samples at a new sigma is two forwards here, none at an old one.
    assert counter.calls == 2 * len(new) < 2 * len(other.evaluations)
    more = search_sigma(adapter, anchors, **(OPTIONS | {"steps": 7}), checkpoint=path, apply=False)
    assert {e.sigma for e in first.evaluations} <= {e.sigma for e in more.evaluations}
    counter.hook.remove()


def test_save_is_a_checkpoint_too(tmp_path: Path) -> None:
    adapter, anchors = prepared()
    first = search_sigma(adapter, anchors, **OPTIONS)
    first.save(tmp_path / "kept.json")
    counter = Interrupt(adapter, 0, RuntimeError)
    assert same(search_sigma(adapter, anchors, **OPTIONS, checkpoint=tmp_path / "kept.json"), first)
    assert counter.calls == 0
    counter.hook.remove()


@pytest.mark.slow
def test_metrics_of_ones_own_and_depths_are_kept(tmp_path: Path) -> None:
    adapter, anchors = prepared()

    def error(probabilities: Any, targets: Any) -> Any:
        return (probabilities - torch.nn.functional.one_hot(targets, 3)).abs().sum(-1)

    options = OPTIONS | {"recipe": "auto", "metric": error, "depth": ["all", 1]}
    first = search_sigma(adapter, anchors, **options, checkpoint=tmp_path / "a.json", apply=False)
    counter = Interrupt(adapter, 0, RuntimeError)
    again = search_sigma(adapter, anchors, **options, checkpoint=tmp_path / "a.json", apply=False)
    assert same(again, first) and again.depths == first.depths and counter.calls == 0
    assert SigmaSearch.load(tmp_path / "a.json").depths == first.depths
    counter.hook.remove()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed", "seed is 0 there and 5 here"),
        ("samples", r"samples is \[0, 1, 2, 3\] there and \[0, 1\] here"),
        ("anchors", "anchors is .* there and .* here"),
        ("weights", "adapter is .* there and .* here"),
        ("mode", "mode is 'weight' there and 'token' here"),
    ],
)
def test_refuses_the_file_of_another_search(change: str, named: str, tmp_path: Path) -> None:
    adapter, anchors = prepared()
    path = tmp_path / "search.json"
    search_sigma(adapter, anchors, **OPTIONS, checkpoint=path)
    before = path.read_text()
    options = dict(OPTIONS)
    if change == "seed":
        adapter.seed = 5
    elif change == "samples":
        options["samples"] = 2
    elif change == "anchors":
        anchors = anchors.select([*range(29), 0])
    elif change == "weights":
        small_sets.sharpen(adapter, 1.5)
        adapter.unload()
        layer = next(m for m in adapter.model.modules() if hasattr(m, "lora_A"))
        layer.lora_A["default"].weight.data.mul_(2)
        adapter = tfb_ext.bayesianize(adapter.model)
    else:
        adapter.mode = "token"
    with pytest.raises(ConfigError, match=f"is of another search: .*{named}.*; give another checkpoint, or delete"):
        search_sigma(adapter, anchors, **options, checkpoint=path)
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"records": {}}', '{"sigma": 1}'])
def test_refuses_a_damaged_file(text: str, tmp_path: Path) -> None:
    adapter, anchors = prepared(4)
    path = tmp_path / "search.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="holds no records of a search .*; give another checkpoint, or delete"):
        search_sigma(adapter, anchors, **OPTIONS, checkpoint=path)
    assert path.read_text() == text


@pytest.mark.slow
def test_out_of_memory_loses_nothing(tmp_path: Path) -> None:
    """Halved batches fill the same records, and the file of one batch size serves another."""
    adapter, anchors = prepared()
    whole = search_sigma(adapter, anchors, **OPTIONS, apply=False)
    seen: list[int] = []

    def small(_: Any, args: Any, kwargs: Any) -> None:
        rows = len(args[0] if args else kwargs["hidden_states"])
        seen.append(rows)
        if rows > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = adapter.anatomy.blocks[3].register_forward_pre_hook(small, with_kwargs=True)
    again = search_sigma(adapter, anchors, **OPTIONS, apply=False)
    hook.remove()
    assert max(seen) > 6 and again.sigma == whole.sigma
    for a, b in zip(again.evaluations, whole.evaluations, strict=True):
        assert a.nll == pytest.approx(b.nll, abs=1e-5)
