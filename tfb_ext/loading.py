"""From names on a command line to a model: adapter folder, base model, device and type."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import UnsupportedModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A PEFT model with its adapter ``default``, its tokenizer, and whether it has a classification head of its own."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    head: bool
    adapter: Path
    base: str


def demo_adapter() -> Path:
    """The adapter that is shipped inside the package (SmolLM2-135M-Instruct, sarcastic headlines)."""
    return Path(__file__).parent / "demo" / "adapter"


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}, expected auto, cpu, cuda, cuda:1, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch sees no GPU; use --device cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the device multiplies it natively (any GPU from 8.0 on, CPUs with AVX512-BF16 or AMX)."""
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r}, expected auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def load_adapter(
    adapter: str, base: str | None = None, device: str = "auto", dtype: str = "auto", classes: int | None = None
) -> Loaded:
    """Load a base model and a trained LoRA adapter.

    Args:
        adapter: a PEFT adapter folder, or ``"demo"`` for the one in the package.
        base: the base model's folder or hub name; by default what the adapter's configuration names.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: of the base model: ``auto``, ``float32``, ``bfloat16``, ``float16``.
        classes: number of classes, for adapters with a classification head.

    Raises:
        UnsupportedModelError: no adapter there, or not for a causal language model or a sequence classifier.
    """
    folder = demo_adapter() if adapter == DEMO else Path(adapter)
    config = _adapter_config(folder)
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    from .demo.assets import BASE_MODEL, load_base

    if base is None and config.get("base_model_name_or_path") == BASE_MODEL:
        model: Any
        model, tokenizer = load_base(place, kind)
        return Loaded(_attach(model, folder, BASE_MODEL), tokenizer, False, folder, BASE_MODEL)

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    name = base or config.get("base_model_name_or_path")
    if not name:
        raise UnsupportedModelError(f"{folder}: the adapter does not name its base model; pass --base")
    task = config.get("task_type")
    if task not in ("CAUSAL_LM", "SEQ_CLS", None):
        raise UnsupportedModelError(
            f"{folder}: task_type {task!r}; the command line serves CAUSAL_LM and SEQ_CLS adapters"
        )
    if task == "SEQ_CLS":
        extra = {} if classes is None else {"num_labels": classes}
        try:
            model = AutoModelForSequenceClassification.from_pretrained(name, dtype=kind, **extra)
        except RuntimeError as error:  # transformers' message only points at a report that it logs
            raise UnsupportedModelError(
                f"{name}: its weights do not make a classifier of {classes} classes ({error}); give as many choices as its own "
                "head has, or the base model without a head"
            ) from None
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if task == "SEQ_CLS" and model.config.pad_token_id is None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return Loaded(_attach(model.to(place), folder, str(name)), tokenizer, task == "SEQ_CLS", folder, str(name))


def _attach(model: Any, folder: Path, base: str) -> PeftModel:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except RuntimeError as error:  # load_state_dict's, a line for each weight
        lines = str(error).splitlines()
        raise UnsupportedModelError(
            f"{folder}: the adapter does not fit the base model {base} ({lines[min(1, len(lines) - 1)].strip()}); pass the model "
            "it was trained on with --base, and for a classifier as many choices as it has classes"
        ) from None


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import platform
    from importlib.metadata import version

    from . import __version__

    found = {"tfb_ext": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {name: version(name) for name in ("transformers", "peft", "safetensors")}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return f"{capabilities.get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{folder} holds no adapter_config.json; expected a PEFT adapter folder, or 'demo'")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedModelError(f"{path} is not valid JSON ({error}); restore it") from None
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"{path} holds a {type(config).__name__}, expected a JSON object; restore it")
    return config
