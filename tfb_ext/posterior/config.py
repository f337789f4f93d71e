"""``tfb_config.json``: what is saved of a posterior beside the adapter's own files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from .. import __version__
from ..checks import MOST_SPAN, check_choice, check_count, check_seed, check_sigma
from ..errors import ConfigError
from ..files import CONFIG_NAME, read_json_object, write_atomically

# Version 2 added the family: a reader of version 1 would take every family for "low-rank". From version 3 on the fingerprint is
# of the layers' scaling too. Version 4 added the span, version 5 what sigma was searched by,
# version 6 how the base weights were quantised that it was searched on.
FORMAT_VERSION = 6
MODES = ("weight", "flipout", "token")
FAMILIES = ("low-rank", "constant", "full-rank")
# What a prediction is averaged by: posterior samples, or outputs that are Gaussian to first order.
By = Literal["samples", "linear"]
BY: tuple[By, ...] = get_args(By)


def check_family(value: str) -> str:
    check_choice("family", value, FAMILIES)
    return value


def check_mode(value: str, family: str) -> str:
    if value not in MODES:
        raise ValueError(f"mode is {value!r}, expected one of {', '.join(map(repr, MODES))}")
    if family == "full-rank" and value != "token":
        raise ValueError(
            f"mode is {value!r}, but the family 'full-rank' has noise for every token only; expected mode='token', or the family "
            "'low-rank' or 'constant'"
        )
    return value


@dataclass(frozen=True)
class TFBConfig:
    """A saved posterior, without the adapter's weights.

    Attributes:
        sigma: posterior scale, ``None`` if no search has set one.
        seed: 64-bit noise seed.
        mode: noise mode.
        antithetic: whether sample ``2k + 1`` mirrors sample ``2k``.
        depth: number of random blocks from the top, ``"all"`` or ``"head"``.
        span: random tokens, ``"all"``, ``"answer"`` or a number of last ones; before format 4 ``"all"``.
        by: what sigma was searched by, ``"samples"`` or ``"linear"``; ``None`` where no search set it.
        searched_on: how the base weights were quantised that sigma was searched on (``"float"``: not), ``None`` where that is not known.
        layers: canonical names of the Bayesian layers.
        base_model: the base model's name as PEFT recorded it.
        family: variance family; files of format 1 have none and mean ``"low-rank"``.
        search: summary of the search that chose sigma, or ``None``.
        fingerprint: SHA-256 of the adapter's weights and scaling that sigma was chosen for (of the weights alone in formats 1
            and 2); ``None`` (removed by hand) skips the check.
        package_version: version of tfb_ext that wrote the file.
        format_version: version of this file's format.
    """

    sigma: float | None
    seed: int
    mode: str
    antithetic: bool
    depth: int | str
    layers: tuple[str, ...]
    base_model: str | None
    family: str = "low-rank"
    span: int | str = "all"
    by: By | None = None
    searched_on: str | None = None
    search: dict[str, Any] | None = None
    fingerprint: str | None = None
    package_version: str = __version__
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> Path:
        path = folder / CONFIG_NAME
        write_atomically(path, json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, folder: str | Path) -> TFBConfig:
        """The configuration in an adapter's folder.

        Raises:
            ConfigError: no such file, not JSON, written by a newer format, or a field of the wrong type or value.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist: this adapter has no saved posterior. Fix: make one with tfb_ext.bayesianize and "
                "save_pretrained, or `tfb search --save`"
            )
        raw = read_json_object(path, "write it again with a search")
        version = raw.get("format_version")
        if type(version) is not int or version < 1:
            raise ConfigError(f"{path}: format_version is {version!r}, expected an integer from 1 to {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format_version {version}, this tfb_ext {__version__} reads up to {FORMAT_VERSION}; upgrade "
                f"tfb_ext (the file was written by {raw.get('package_version')})"
            )
        if version == 1:
            raw["family"] = "low-rank"
        if version < 4:
            raw["span"] = "all"
        if version < 5:
            raw["by"] = None if raw.get("search") is None else "samples"
        for name, good, wanted in _FIELDS:
            if not good(raw.get(name)):
                _refuse(path, name, raw.get(name), wanted)
        if raw["family"] == "full-rank" and raw["mode"] != "token":
            _refuse(path, "mode", raw["mode"], "'token', the only one of family 'full-rank'")
        return cls(**{name: raw.get(name) for name in cls.__dataclass_fields__} | {"layers": tuple(raw["layers"])})


def _passes(check: Callable[[Any], object], value: Any) -> bool:
    with suppress(ValueError, RecursionError):  # values may be nested too deeply to be shown
        check(value)
        return True
    return False


def _is_plain(value: Any, levels: int = 20) -> bool:
    """Whether a value can be written as JSON again: Python reads NaN, infinities and any depth."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_is_plain(part, levels - 1) for part in parts)
    return not isinstance(value, float) or math.isfinite(value)


def _is_depth(value: Any) -> bool:
    return value in ("all", "head") or _passes(lambda number: check_count("depth", number), value)


def _is_span(value: Any) -> bool:
    return value in ("all", "answer") or _passes(lambda number: check_count("span", number, most=MOST_SPAN), value)


def _is_layers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


# Field, what holds for it, and that in words.
_FIELDS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("sigma", lambda v: v is None or _passes(check_sigma, v), "within float32, a positive number or null"),
    ("seed", lambda v: _passes(check_seed, v), "an integer in [0, 2**64)"),
    ("mode", lambda v: v in MODES, " or ".join(map(repr, MODES))),
    ("family", lambda v: v in FAMILIES, " or ".join(map(repr, FAMILIES))),
    ("antithetic", lambda v: isinstance(v, bool), "true or false"),
    ("depth", _is_depth, "a positive number of blocks, 'all' or 'head'"),
    ("span", _is_span, "a positive number of tokens, 'all' or 'answer'"),
    ("by", lambda v: v is None or v in BY, "'samples' or 'linear' or null"),
    ("searched_on", lambda v: isinstance(v, str | None), "a kind of base weights or null"),
    ("layers", _is_layers, "a list of layer names"),
    ("fingerprint", lambda v: isinstance(v, str | None), "a SHA-256 in hexadecimal or null"),
    ("base_model", lambda v: isinstance(v, str | None), "the base model's name or null"),
    ("search", lambda v: isinstance(v, dict | None), "an object or null"),
    ("search", _is_plain, "finite numbers and text, at most 20 deep, or null"),
]


def _refuse(path: Path, name: str, value: Any, wanted: str) -> NoReturn:
    got = repr(value) if _is_plain(value) or isinstance(value, float) else "nested too deeply"
    got = got if len(got) <= 200 else f"{got[:200]}..."
    raise ConfigError(f"{path}: {name} is {got}, expected {wanted}; write the file again with a search")
