"""A checkpoint serves the search it is of and no other; its records are looked at whole before one of them is used."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_sets
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tfb_ext
from tfb_ext import search_sigma
from tfb_ext.errors import ConfigError, SamplingError
from tfb_ext.search import SigmaSearch

OPTIONS: dict[str, Any] = {"samples": 2, "progress": False, "batch_size": 10, "recipe": "paper", "apply": False}


def prepared(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    adapter = tfb_ext.bayesianize(zoo.peft_model("llama", dtype=dtype))
    anchors = small_sets.labelled(adapter, small_sets.encoded(8), 3)
    return adapter, anchors


def base_weight(adapter: Any) -> torch.Tensor:
    return adapter.anatomy.model.model.layers[0].self_attn.q_proj.base_layer.weight.data


def one_value(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    base_weight(adapter)[3, 5] += 1.0
    return adapter, anchors


def two_rows(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    weight = base_weight(adapter)
    weight[[1, 2]] = weight[[2, 1]].clone()
    return adapter, anchors


def embeddings(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    adapter.anatomy.model.model.embed_tokens.weight.data.mul_(1.01)
    return adapter, anchors


def kind_of_weights(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    return prepared(dtype=torch.bfloat16)[0], anchors


def configuration(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    adapter.anatomy.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 77.0}
    return adapter, anchors


def scaling(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    model = adapter.unload()
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2
    return tfb_ext.bayesianize(model), anchors


def other_adapter(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    adapter.model.add_adapter("second", copy.deepcopy(adapter.model.peft_config["default"]))
    adapter.model.base_model.set_adapter(["default", "second"])
    adapter.model.eval()
    return adapter, anchors


def bias(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    for module in zoo.lora_layers(adapter).values():
        module.lora_B["default"].bias = torch.nn.Parameter(torch.ones(module.out_features))
    return tfb_ext.bayesianize(adapter.unload()), anchors


def order(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    return adapter, anchors.select([1, 0, *range(2, len(anchors))])


def choices(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    other = next(t for t in range(5, 90) if t not in anchors.choice_ids)
    return adapter, replace(anchors, choice_ids=(other, *anchors.choice_ids[1:]))


def sequences(adapter: Any, anchors: Any) -> tuple[Any, Any]:
    return adapter, replace(anchors, choice_ids=None, choice_tokens=tuple((t,) for t in anchors.choice_ids))


CHANGES: list[Callable[[Any, Any], tuple[Any, Any]]] = [
    one_value, two_rows, embeddings, kind_of_weights, configuration, scaling, other_adapter, bias, order, choices, sequences,
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "search.json"
    search_sigma(*prepared(), **OPTIONS, checkpoint=path)
    return path


@pytest.mark.parametrize("change", zoo.slow_but(CHANGES, bias, order), ids=lambda c: c.__name__)
def test_another_searchs_file_is_refused(change: Any, finished: Path) -> None:
    before = finished.read_bytes()
    with pytest.raises(ConfigError, match="is of another search: .*; give another checkpoint, or delete"):
        search_sigma(*change(*prepared()), **OPTIONS, checkpoint=finished)
    assert finished.read_bytes() == before


def test_what_no_result_depends_on_may_change(finished: Path) -> None:
    adapter, anchors = prepared()
    adapter.anatomy.model.config._name_or_path = "elsewhere"
    adapter.model.peft_config["default"].base_model_name_or_path = "elsewhere"
    adapter.model.add_adapter("other", copy.deepcopy(adapter.model.peft_config["default"]))
    again = search_sigma(adapter, anchors, **(OPTIONS | {"batch_size": 3}), checkpoint=finished)
    assert again.tokens == 0 and again.sigma == SigmaSearch.load(finished).sigma


def test_an_adapter_that_is_switched_off_has_no_sigma() -> None:
    adapter, anchors = prepared()
    with adapter.model.disable_adapter(), pytest.raises(SamplingError, match="switched off.*Fix: search outside"):
        search_sigma(adapter, anchors, **OPTIONS)


def test_arguments_other_than_tokens_count(tmp_path: Path) -> None:
    adapter = tfb_ext.bayesianize(zoo.peft_model("bert"))
    batch = zoo.batch_for("bert") | {"labels": torch.tensor([0, 1, 2])}
    kinds = torch.zeros_like(batch["input_ids"])
    search_sigma(adapter, [batch | {"token_type_ids": kinds}], **OPTIONS, checkpoint=tmp_path / "a.json")
    kinds = kinds.clone()
    kinds[0, -1] = 1
    with pytest.raises(ConfigError, match="anchors is .* there and .* here"):
        search_sigma(adapter, [batch | {"token_type_ids": kinds}], **OPTIONS, checkpoint=tmp_path / "a.json")


# Records ----------------------------------------------------------------------------------------------------------------


def drop_last(values: list[Any]) -> None:
    values.pop()


def damage(name: str, raw: dict[str, Any]) -> None:
    records = raw["records"]
    baseline, entry = records["baseline"], records["evaluations"][0]
    changes: dict[str, Callable[[], Any]] = {
        "short column": lambda: drop_last(entry["nll"]),
        "long column": lambda: entry["nll"].append(0.5),
        "all short": lambda: [drop_last(v) for v in (*baseline.values(), records["guesses"], records["targets"])],
        "null baseline": lambda: baseline.update({n: [None] * len(v) for n, v in baseline.items()}),
        "one null": lambda: baseline["nll"].__setitem__(0, None),
        "part of a row": lambda: entry["nll"].__setitem__(0, None),
        "NaN": lambda: entry["nll"].__setitem__(0, float("nan")),
        "infinite": lambda: entry["nll"].__setitem__(0, 1e999),
        "text": lambda: entry["nll"].__setitem__(0, "0.5"),
        "true": lambda: entry["right"].__setitem__(0, True),
        "negative": lambda: entry["nll"].__setitem__(0, -3.0),
        "half right": lambda: entry["right"].__setitem__(0, 0.5),
        "huge": lambda: entry["nll"].__setitem__(0, 10**400),
        "class outside": lambda: records["guesses"].__setitem__(0, 3),
        "class below": lambda: records["targets"].__setitem__(0, -1),
        "class of text": lambda: records["targets"].__setitem__(0, "1"),
        "guess turned": lambda: records["guesses"].__setitem__(0, (records["guesses"][0] + 1) % 3),
        "sigma null": lambda: entry.update(sigma=None),
        "sigma negative": lambda: entry.update(sigma=-0.1),
        "block of text": lambda: entry.update(first="all"),
        "twice": lambda: records["evaluations"].append(entry),
        "no list": lambda: records.update(evaluations={}),
        "no key": lambda: records.pop("key"),
        "no column": lambda: entry.pop("entropy"),
    }
    changes[name]()


NAMES = [
    "short column", "long column", "all short", "null baseline", "one null", "part of a row", "NaN", "infinite", "text", "true",
    "negative", "half right", "huge", "class outside", "class below", "class of text", "guess turned", "sigma null",
    "sigma negative", "block of text", "twice", "no list", "no key", "no column",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_damaged_records_are_refused(name: str, finished: Path, tmp_path: Path) -> None:
    raw = json.loads(finished.read_text())
    damage(name, raw)
    path = tmp_path / "search.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="holds no records of a search .*; give another checkpoint, or delete"):
        search_sigma(*prepared(), **OPTIONS, checkpoint=path)
    if name != "class outside":  # a file alone does not say how many classes there are
        with pytest.raises(ConfigError, match="is no search for sigma: .*; restore it, or search again"):
            SigmaSearch.load(path)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_a_sentence_or_harmless(data: Any, finished: Path, tmp_path: Path) -> None:
    """A value somewhere in the file is replaced: load gives the search or a ConfigError, never anything else."""
    raw = json.loads(finished.read_text())
    place: Any = raw
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 4)) == 0:
            break
        place = place[key]
    odd = st.sampled_from([None, True, -1, 10**30, 1e308, float("nan"), "text", [], {}, [None], [[1]], {"a": 1}])
    place[key] = data.draw(odd)
    path = tmp_path / "search.json"
    path.write_text(json.dumps(raw))
    try:
        found = SigmaSearch.load(path)
    except ConfigError as error:
        assert str(path) in str(error)
        return
    str(found)
    found.to_dict()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"{}", b'{"sigma": 0.1}', b"[" * 100_000, b'{"a":' * 100_000, b"null"],
    ids=["empty", "brace", "list", "bytes", "object", "sigma alone", "deep list", "deep object", "null"],
)
def test_load_refuses_foreign_files(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="search.json"):
        SigmaSearch.load(path)
    with pytest.raises(ConfigError, match="search.json holds no records of a search"):
        search_sigma(*prepared(), **OPTIONS, checkpoint=path)
    with pytest.raises(ConfigError, match="is no regular file"):
        SigmaSearch.load(tmp_path)


def test_load_refuses_a_truncated_file(finished: Path, tmp_path: Path) -> None:
    whole = finished.read_bytes()
    for part in (0.1, 0.5, 0.99):
        (tmp_path / "search.json").write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ConfigError, match="is not valid JSON"):
            SigmaSearch.load(tmp_path / "search.json")
    assert SigmaSearch.load(finished).sigma > 0
