"""A folder of PEFT's: what its files hold, and a model with the adapter in it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsupportedModelError
from ..files import read_json_object

if TYPE_CHECKING:
    from peft import PeftModel

_WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.")


@dataclass(frozen=True)
class AdapterFiles:
    """The files of a PEFT adapter.

    Attributes:
        config: ``adapter_config.json``, the values that are used here checked.
        shapes: name -> shape of each tensor; empty for a file in PyTorch's old format.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, list[int]]


def read_adapter(folder: Path) -> AdapterFiles:
    """What the files in ``folder`` hold; no tensor is loaded.

    Raises:
        UnsupportedModelError: a file is missing or damaged, or the adapter is no LoRA.
    """
    return AdapterFiles(folder, _config(folder), _shapes(folder))


def attach_adapter(
    model: Any, adapter: Path | AdapterFiles, name: str = "default", base: str | None = None
) -> PeftModel:
    """The PEFT model of ``model`` with the adapter under ``name``, which it may hold already; in eval mode.

    Args:
        adapter: the folder, or its files where they are read already.
        base: the base model's name, for messages.

    Raises:
        UnsupportedModelError: the adapter's files are damaged or of another kind, or hold tensors that the model does not take,
            or lack some of which it has.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel) and name in model.peft_config:
        return model
    files = adapter if isinstance(adapter, AdapterFiles) else read_adapter(adapter)
    folder = files.folder
    fits = "pass the model it was trained on with --base, and for a classifier as many choices as it has classes"
    restore = "restore the file or its adapter_config.json"
    mapping = None
    try:
        if not isinstance(model, PeftModel):
            mapping = getattr(model, "_checkpoint_conversion_mapping", None)
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        # The first load does not say which tensors it passed over, so PEFT loads them again.
        found = model.load_adapter(str(folder), adapter_name=name, key_mapping=mapping)
    except RuntimeError as error:  # load_state_dict's, a line for each weight
        lines = str(error).splitlines() or [""]
        raise UnsupportedModelError(
            f"{folder}: the adapter does not fit the base model {base or ''} ({lines[min(1, len(lines) - 1)].strip()}); {fits}"
        ) from None
    except IndexError as error:  # trainable tokens beyond the embeddings
        raise UnsupportedModelError(
            f"{folder}: the adapter has tokens that the base model {base or ''} does not have ({error}); put the tokenizer it was "
            "trained with into its folder, or resize the model's embeddings before"
        ) from None
    except KeyError as error:
        raise UnsupportedModelError(
            f"{folder}: the adapter's file lacks tensors that its configuration asks for, such as {error}, expected all; {restore}"
        ) from None
    except Exception as error:
        raise UnsupportedModelError(
            f"{folder}: PEFT cannot load this adapter ({type(error).__name__}: {error}); restore its files"
        ) from error
    # With resized embeddings in modules_to_save, PEFT saves the wrapper's own tensors a second time.
    extra = [k for k in found.unexpected_keys if _WRAPPED.sub(".", k) not in files.shapes or not _WRAPPED.search(k)]
    if extra:
        raise UnsupportedModelError(
            f"{folder}: the adapter's file has {len(extra)} tensors that {type(model.get_base_model()).__name__} does not take, "
            f"such as {extra[0]!r}, expected none; load it over the kind of model it was trained on: {fits}"
        )
    if found.missing_keys:
        raise UnsupportedModelError(
            f"{folder}: the adapter's file lacks {len(found.missing_keys)} tensors that its configuration asks for, such as "
            f"{found.missing_keys[0]!r}, expected all; {restore}"
        )
    return model.eval()


def _shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            return {}
        raise UnsupportedModelError(
            f"{folder} holds no adapter_model.safetensors, expected the adapter's weights; restore it"
        )
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise UnsupportedModelError(f"{path} is no whole safetensors file ({error}); restore it") from None


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_text, value)))


def _values_are(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(good, value.values())))


# field -> (whether a value is served, what is expected); a field that is not there has PEFT's default.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda v: v == "LORA", "'LORA', the only one with a posterior"),
    "base_model_name_or_path": (lambda v: v is None or _is_text(v), "a name or null"),
    "r": (_is_whole, "an integer of at least 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "target_modules": (lambda v: _is_text(v) or _are_texts(v), "names, a text or null"),
    "modules_to_save": (_are_texts, "names or null"),
    "rank_pattern": (_values_are(_is_whole), "an object of integers of at least 1"),
    "alpha_pattern": (_values_are(_is_number), "an object of finite numbers"),
    "auto_mapping": (_values_are(_is_text), "an object of names or null"),
}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{folder} holds no adapter_config.json; expected a PEFT adapter folder, or 'demo'")
    try:
        config = read_json_object(path, "restore it")
    except ConfigError as error:
        raise UnsupportedModelError(str(error)) from None
    config.setdefault("peft_type", None)
    for field, (served, wanted) in _FIELDS.items():
        if field in config and not served(config[field]):
            raise UnsupportedModelError(f"{path}: {field} is {config[field]!r}, expected {wanted}; restore it")
    return config
