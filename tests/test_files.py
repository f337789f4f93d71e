"""``tfb_config.json``: the round trip, damage of every kind, and writing whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tfb_ext.errors import ConfigError
from tfb_ext.files import write_atomically
from tfb_ext.posterior.config import CONFIG_NAME, FORMAT_VERSION, TFBConfig

GOOD = TFBConfig(
    sigma=0.04, seed=2**64 - 1, mode="weight", antithetic=True, depth=15, layers=("model.layers.0.q_proj", "lm_head"),
    base_model="some/model", span="answer", by="samples", search={"reason": "flips", "evaluations": []},
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        GOOD,
        dataclasses.replace(GOOD, span=7, by="linear"),
        dataclasses.replace(
            GOOD, span="all", sigma=None, depth="all", search=None, base_model=None, seed=0, antithetic=False
        ),
    ],
)
def test_round_trip(tmp_path: Path, config: TFBConfig) -> None:
    path = config.write(tmp_path)
    assert path == tmp_path / CONFIG_NAME
    assert TFBConfig.read(tmp_path) == TFBConfig.read(str(tmp_path)) == config
    assert json.loads(path.read_text())["format_version"] == FORMAT_VERSION


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tfb_config.json does not exist.*make one with tfb_ext.bayesianize"):
        TFBConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1, 2]", "holds a list, expected a JSON object"),
        (b"{}", "format_version is None, expected an integer from 1 to 6"),
        (b'{"alpha": 16, "peft_type": "LORA"}', "format_version is None"),
        (b'{"format_version": "1"}', "format_version is '1', expected an integer"),
        (b'{"format_version": true}', "format_version is True, expected an integer"),
        (b'{"format_version": 0}', "format_version is 0, expected an integer"),
    ],
)
def test_damaged_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        TFBConfig.read(tmp_path)
    assert str(tmp_path / CONFIG_NAME) in str(error.value)


def test_newer_file(tmp_path: Path) -> None:
    raw = {"format_version": FORMAT_VERSION + 1, "package_version": "9.8.7"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"has format_version 7, this tfb_ext .* reads up to 6; upgrade.*9\.8\.7"):
        TFBConfig.read(tmp_path)


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        *[("sigma", v, "a positive number or null") for v in (0, -0.1, "0.1", True, float("nan"), float("inf"), [0.1])],
        *[("seed", v, r"an integer in \[0, 2\*\*64\)") for v in (-1, 2**64, 1.5, "7", None, True)],
        *[("mode", v, "'weight' or 'flipout' or 'token'") for v in ("rows", None, 3)],
        *[("antithetic", v, "true or false") for v in (None, 1, "yes")],
        *[("depth", v, "'all' or 'head'") for v in (0, -2, 0.5, "middle", True, None, [1])],
        *[("span", v, "'all' or 'answer'") for v in (0, -1, "last", "head", True, 1.5, 1.0, None, [1], 2**31, "4")],
        *[("by", v, "'samples' or 'linear' or null") for v in ("laplace", "", 1, True, [], ["linear"], {})],
        *[("layers", v, "a list of layer names") for v in ([], None, "lm_head", ["a", 3])],
        *[("search", v, "an object or null") for v in ([], "x", 3)],
        *[("search", v, "at most 20 deep, or null") for v in ({"a": [float("nan")]}, {"a": -1e999})],
        *[(field, nested(500), "") for field in ("search", "layers", "sigma", "depth", "span", "seed", "base_model")],
    ],
)
def test_bad_field(tmp_path: Path, field: str, value: Any, wanted: str) -> None:
    raw = {**json.loads(GOOD.write(tmp_path).read_text()), field: value}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"{field} is .*, expected .*{wanted}; write the file again"):
        TFBConfig.read(tmp_path)


@pytest.mark.parametrize("field", ["seed", "mode", "antithetic", "depth", "span", "layers"])
def test_missing_field(tmp_path: Path, field: str) -> None:
    raw = json.loads(GOOD.write(tmp_path).read_text())
    del raw[field]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"{field} is None"):
        TFBConfig.read(tmp_path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_from_before_spans_are_of_all_tokens(tmp_path: Path, version: int) -> None:
    raw = json.loads(GOOD.write(tmp_path).read_text()) | {"format_version": version}
    for span in ("answer", "last", None):  # a field that these formats do not have
        (tmp_path / CONFIG_NAME).write_text(json.dumps(raw | {"span": span}))
        assert TFBConfig.read(tmp_path).span == "all"
    del raw["span"]
    (tmp_path / CONFIG_NAME).write_text(json.dumps(raw))
    assert TFBConfig.read(tmp_path) == dataclasses.replace(GOOD, span="all", format_version=version)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_sigmas_of_older_files_were_searched_by_samples(tmp_path: Path, version: int) -> None:
    raw = json.loads(GOOD.write(tmp_path).read_text()) | {"format_version": version}
    for by in ("linear", None):  # a field that these formats do not have
        (tmp_path / CONFIG_NAME).write_text(json.dumps(raw | {"by": by}))
        assert TFBConfig.read(tmp_path).by == "samples"
    (tmp_path / CONFIG_NAME).write_text(json.dumps(raw | {"search": None}))
    assert TFBConfig.read(tmp_path).by is None


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = GOOD.write(tmp_path).read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    for name in ("os.replace", "os.fsync"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(name, fail)
            dataclasses.replace(GOOD, sigma=1.0).write(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == [CONFIG_NAME]
        assert (tmp_path / CONFIG_NAME).read_bytes() == before


def test_writing_makes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.txt"
    write_atomically(path, "text\n")
    assert path.read_text() == "text\n" and [p.name for p in path.parent.iterdir()] == ["x.txt"]
    assert path.stat().st_mode & 0o777 == 0o644
