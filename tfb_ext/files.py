"""``tfb_config.json``: the two numbers, and what they belong to, beside the adapter's own files."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .errors import ConfigError

CONFIG_NAME = "tfb_config.json"
# Version 2 added the family, which a reader of version 1 would take for "low-rank" without a word.
FORMAT_VERSION = 2
MODES = ("weight", "flipout", "token")
FAMILIES = ("low-rank", "constant", "full-rank")


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
        fingerprint: SHA-256 of the adapter's weights that sigma was chosen for; ``None`` (removed by hand) skips the check.
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
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")
        return path

    @classmethod
    def read(cls, folder: str | Path) -> TFBConfig:
        """Read ``tfb_config.json`` from an adapter's folder.

        Raises:
            ConfigError: no such file, not JSON, written by a newer format, or a field of the wrong type or value.
        """
        path = Path(folder) / CONFIG_NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist: this adapter has no saved posterior; make one with tfb_ext.bayesianize and "
                "save_pretrained, or `tfb search --save`"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path} is not valid JSON ({error}); restore it or write it again with a search"
            ) from None
        if not isinstance(raw, dict):
            raise ConfigError(
                f"{path} holds a {type(raw).__name__}, expected a JSON object; write it again with a search"
            )
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
    def number(v: Any) -> bool:
        return isinstance(v, int | float) and not isinstance(v, bool)

    checks: list[tuple[str, bool, str]] = [
        (
            "sigma",
            raw.get("sigma") is None or (number(raw["sigma"]) and 0 < raw["sigma"] < float("inf")),
            "a positive number or null",
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
        ("search", raw.get("search") is None or isinstance(raw["search"], dict), "an object or null"),
    ]
    for name, good, wanted in checks:
        if not good:
            raise ConfigError(
                f"{path}: {name} is {raw.get(name)!r}, expected {wanted}; write the file again with a search"
            )


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all: a temporary file in the same folder, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
