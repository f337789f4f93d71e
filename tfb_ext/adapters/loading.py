"""From names on a command line to a model: adapter folder, base model, device and type."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, TFBError, UnsupportedModelError
from ..files import read_json_object

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A PEFT model with its adapter ``default``, its tokenizer, and whether it has a classification head of its own.

    ``own_tokenizer``: the tokenizer lies beside the adapter, not beside the base model.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    head: bool
    adapter: Path
    base: str
    own_tokenizer: bool = False


def demo_adapter() -> Path:
    """The adapter that is shipped inside the package (SmolLM2-135M-Instruct, sarcastic headlines)."""
    return Path(__file__).parents[1] / "app" / "demo" / "adapter"


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}, expected auto, cpu, cuda, cuda:1, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}, expected auto, cpu, cuda, cuda:1, ...: there are kernels for these only")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch sees no GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count() > 0:
        raise ValueError(f"device {name!r}: torch sees {torch.cuda.device_count()} GPUs, counted from cuda:0")
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

    The tokenizer is the one beside the adapter where there is one; the embeddings get a row for every token that it or the
    adapter's file has (as PEFT's ``AutoPeftModel``).

    Raises:
        UnsupportedModelError: no adapter there, a damaged one, one that does not fit the base model, or one that is not for a
            causal language model or a sequence classifier.
    """
    folder = demo_adapter() if adapter == DEMO else Path(adapter)
    config = _adapter_config(folder)
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    from transformers import AutoTokenizer

    from ..app.demo.assets import BASE_MODEL, base_model_dir

    name = base or config.get("base_model_name_or_path")
    if not name:
        raise UnsupportedModelError(f"{folder}: the adapter does not name its base model; pass --base")
    source = base_model_dir() if base is None and name == BASE_MODEL else name
    model_class, head = _model_class(folder, config)
    with _in_words(f"{name}: the base model cannot be loaded", "restore its files, or pass another with --base"):
        extra = {"num_labels": classes} if head and classes is not None else {}
        try:
            model = model_class.from_pretrained(source, dtype=kind, **extra)
        except RuntimeError as error:  # transformers' message only points at a report that it logs
            if not extra:
                raise
            raise UnsupportedModelError(
                f"{name}: its weights do not make a classifier of {classes} classes ({error}); give as many choices as its own "
                "head has, or the base model without a head"
            ) from None
    own = (folder / "tokenizer_config.json").is_file()
    with _in_words(f"{folder if own else name}: its tokenizer cannot be loaded", "restore its files"):
        tokenizer = AutoTokenizer.from_pretrained(folder if own else source)
    _fit_embeddings(model, len(tokenizer) if own else 0, folder)
    if head and model.config.pad_token_id is None:
        model.config.pad_token_id = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    attached = attach_adapter(model.to(place), folder, "default", str(name))
    return Loaded(attached, tokenizer, head, folder, str(name), own)


def attach_adapter(model: Any, folder: Path, name: str = "default", base: str | None = None) -> PeftModel:
    """The PEFT model of ``model`` with the adapter in ``folder`` under ``name``, which it may hold already; in eval mode.

    Args:
        base: the base model's name, for messages.

    Raises:
        UnsupportedModelError: the adapter's files are damaged or of another kind, or hold tensors that the model does not take,
            or lack some of which it has.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel) and name in model.peft_config:
        return model
    _adapter_config(folder)
    tensors = _adapter_tensors(folder)
    fits = "pass the model it was trained on with --base, and for a classifier as many choices as it has classes"
    restore = "restore the file or its adapter_config.json"
    try:
        if not isinstance(model, PeftModel):
            mapping = getattr(model, "_checkpoint_conversion_mapping", None)
            model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
        else:
            mapping = None
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
    extra = [k for k in found.unexpected_keys if _WRAPPED.sub(".", k) not in tensors or not _WRAPPED.search(k)]
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


_WRAPPED = re.compile(r"\.(modules_to_save|original_module)\.")


def _model_class(folder: Path, config: dict[str, Any]) -> tuple[Any, bool]:
    """What loads the base model, and whether that has a classification head: the task decides, else PEFT's ``auto_mapping``."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.models.auto import modeling_auto

    task, mapping = config.get("task_type"), config.get("auto_mapping")
    if task not in ("CAUSAL_LM", "SEQ_CLS", None):
        raise UnsupportedModelError(
            f"{folder}: task_type {task!r}; the command line serves CAUSAL_LM and SEQ_CLS adapters"
        )
    if task is not None or mapping is None:
        return (AutoModelForSequenceClassification, True) if task == "SEQ_CLS" else (AutoModelForCausalLM, False)
    # As peft 0.21's AutoPeftModel (auto.py, line 148), but for classes of transformers alone.
    library, name = mapping.get("parent_library"), mapping.get("base_model_class")
    served = {
        False: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        True: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    heads = [head for head, names in served.items() if name in names.values()]
    if not heads or not isinstance(library, str) or library.split(".")[0] != "transformers":
        raise UnsupportedModelError(
            f"{folder}: auto_mapping names {name!r} of {library!r}; the command line serves transformers' causal language models and "
            "sequence classifiers. Fix: attach the adapter in Python with tfb_ext.bayesianize"
        )
    with _in_words(f"{folder}: auto_mapping names {name!r} of {library!r}, which is not there", "restore its files"):
        return getattr(importlib.import_module(library), name), heads[0]


def _fit_embeddings(model: Any, tokens: int, folder: Path) -> None:
    """Give the embeddings as many rows as the adapter's file has, else at least one for each of ``tokens``."""
    embeddings = model.get_input_embeddings()
    rows, width = embeddings.weight.shape
    name = next(n for n, module in model.named_modules() if module is embeddings)
    saved = [
        shape[0]
        for k, shape in _adapter_tensors(folder).items()
        if k.endswith(f".{name}.weight") and shape[1:] == [width]
    ]
    wanted = saved[0] if saved else max(rows, tokens)
    if wanted != rows:
        with torch.random.fork_rng(devices=[]):  # rows that nobody trained: the same in every run
            torch.manual_seed(0)
            model.resize_token_embeddings(wanted)


def _adapter_tensors(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in the adapter's file; nothing for one in PyTorch's old format.

    Raises:
        UnsupportedModelError: there is no file, or it is damaged.
    """
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


@contextmanager
def _in_words(what: str, way_out: str) -> Iterator[None]:
    """Whatever a library raises over files that it did not write, as one sentence."""
    try:
        yield
    except (TFBError, OSError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{what} ({type(error).__name__}: {error}); {way_out}") from error


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import platform
    from importlib.metadata import version

    from .. import __version__

    found = {"tfb_ext": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {name: version(name) for name in ("transformers", "peft", "safetensors")}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return f"{capabilities.get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"


def _adapter_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json``, the values that are used here checked.

    Raises:
        UnsupportedModelError: there is none, or it is damaged.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UnsupportedModelError(f"{folder} holds no adapter_config.json; expected a PEFT adapter folder, or 'demo'")
    try:
        config = read_json_object(path, "restore it")
    except ConfigError as error:
        raise UnsupportedModelError(str(error)) from None

    def whole(value: Any) -> bool:
        return type(value) is int and 0 < value < 2**31

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)

    def pattern(value: Any, good: Any) -> bool:
        return value is None or (isinstance(value, dict) and all(map(good, value.values())))

    name, targets = config.get("base_model_name_or_path"), config.get("target_modules")
    checks = [
        ("peft_type", config.get("peft_type") == "LORA", "'LORA', the only one with a posterior"),
        ("base_model_name_or_path", name is None or isinstance(name, str), "a name or null"),
        ("r", "r" not in config or whole(config["r"]), "an integer of at least 1"),
        ("lora_alpha", "lora_alpha" not in config or number(config["lora_alpha"]), "a finite number"),
        ("target_modules", targets is None or isinstance(targets, str) or texts(targets), "names, a text or null"),
        ("modules_to_save", (saved := config.get("modules_to_save")) is None or texts(saved), "names or null"),
        ("rank_pattern", pattern(config.get("rank_pattern"), whole), "an object of integers of at least 1"),
        ("alpha_pattern", pattern(config.get("alpha_pattern"), number), "an object of finite numbers"),
        (
            "auto_mapping",
            pattern(config.get("auto_mapping"), lambda v: isinstance(v, str)),
            "an object of names or null",
        ),
    ]
    for field, good, wanted in checks:
        if not good:
            raise UnsupportedModelError(f"{path}: {field} is {config.get(field)!r}, expected {wanted}; restore it")
    return config
