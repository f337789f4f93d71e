"""``tfb_config.json``: what is saved of a posterior beside the adapter's own files."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..checks import check_sigma
from ..errors import ConfigError
from ..files import CONFIG_NAME, read_json_object, write_atomically

# Version 2 added the family, which a reader of version 1 would take for "low-rank" without a word. From version 3 on the
# fingerprint is of the layers' scaling too.
FORMAT_VERSION = 3
MODES = ("weight", "flipout", "token")
FAMILIES = ("low-rank", "constant", "full-rank")


def check_family(value: str) -> str:
    if value not in FAMILIES:
        raise ValueError(f"family is {value!r}, expected one of {', '.join(map(repr, FAMILIES))}")
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
        """Read ``tfb_config.json`` from an adapter's folder.

        Raises:
            ConfigError: no such file, not JSON, written by a newer format, or a field of the wrong type or value.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist: this adapter has no saved posterior; make one with tfb_ext.bayesianize and "
                "save_pretrained, or `tfb search --save`"
            )
        raw = read_json_object(path, "write it again with a search")
        version = raw.get("format_version")
        if type(version) is not int or version < 1:
            raise ConfigError(f"{path}: format_version is {version!r}, expected an integer from 1 to {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format_version {version}, this tfb_ext {__version__} reads up to {FORMAT_VERSION}; "
                f"upgrade tfb_ext (the file was written by {raw.get('package_version')})"
            )
        if version == 1:
            raw = {**raw, "family": "low-rank"}
        fields: dict[str, Any] = {name: raw.get(name) for name in cls.__dataclass_fields__}
        _check_fields(path, raw)
        fields["layers"] = tuple(raw["layers"])
        return cls(**fields)


def _check_fields(path: Path, raw: dict[str, Any]) -> None:
    def sigma(value: Any) -> bool:
        with suppress(ValueError):
            return check_sigma(value) > 0
        return False

    checks: list[tuple[str, bool, str]] = [
        (
            "sigma",
            raw.get("sigma") is None or sigma(raw["sigma"]),
            "within float32, a positive number or null",
        ),
        ("seed", type(raw.get("seed")) is int and 0 <= raw["seed"] < 2**64, "an integer in [0, 2**64)"),
        ("mode", raw.get("mode") in MODES, " or ".join(map(repr, MODES))),
        ("family", raw.get("family") in FAMILIES, " or ".join(map(repr, FAMILIES))),
        (
            "mode",
            raw.get("family") != "full-rank" or raw.get("mode") == "token",
            "'token', the only one of family 'full-rank'",
        ),
        ("antithetic", isinstance(raw.get("antithetic"), bool), "true or false"),
        (
            "depth",
            raw.get("depth") in ("all", "head") or (type(raw.get("depth")) is int and raw["depth"] > 0),
            "a positive number of blocks, 'all' or 'head'",
        ),
        (
            "layers",
            isinstance(raw.get("layers"), list)
            and bool(raw["layers"])
            and all(isinstance(n, str) for n in raw["layers"]),
            "a list of layer names",
        ),
        (
            "fingerprint",
            raw.get("fingerprint") is None or isinstance(raw["fingerprint"], str),
            "a SHA-256 in hexadecimal or null",
        ),
        (
            "base_model",
            raw.get("base_model") is None or isinstance(raw["base_model"], str),
            "the base model's name or null",
        ),
        ("search", raw.get("search") is None or isinstance(raw["search"], dict), "an object or null"),
        ("search", _is_plain(raw.get("search")), "finite numbers and text, at most 20 deep, or null"),
    ]
    for name, good, wanted in checks:
        if not good:
            raise ConfigError(
                f"{path}: {name} is {_short(raw.get(name))}, expected {wanted}; write the file again with a search"
            )


def _short(value: Any) -> str:
    text = "nested too deeply" if isinstance(value, dict | list) and not _is_plain(value) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_plain(value: Any, levels: int = 20) -> bool:
    """Whether a value can be written as JSON again: Python reads NaN, infinities and any depth."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_is_plain(part, levels - 1) for part in parts)
    return not isinstance(value, float) or math.isfinite(value)
