"""From names on a command line to a model: adapter folder, base model, device and type."""

from __future__ import annotations

import importlib
import logging
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..adapters.loading import AdapterFiles, attach_adapter, read_adapter
from ..errors import TFBError, UnsupportedModelError, refusal
from ..forward.anatomy import CLASSIFIER_HEADS
from .demo.assets import BASE_MODEL, base_model_dir

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

DEMO = "demo"
LOAD_IN = ("4bit", "8bit")
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
UNITS = {"MIB": 2**20, "GIB": 2**30, "MB": 10**6, "GB": 10**9}
CONTEXT = 600 * 2**20  # of a process on a GPU beside its tensors: CUDA's context and kernels
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A PEFT model with its adapter ``default``, its tokenizer, and whether it has a classification head.

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
    return Path(__file__).parent / "demo" / "adapter"


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
    found = _cpu_capabilities()
    native = device.type == "cuda" or found.get("avx512_bf16") or found.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def hold_memory(memory: str, device: torch.device) -> int:
    """Hold this process to so much of a GPU's memory, from now on: torch raises rather than take more, and batches are chosen to fit.

    Args:
        memory: a number and MiB, GiB, MB or GB, such as ``"8GiB"``; CUDA's own context (about 600 MiB) counts.

    Returns:
        bytes that are left for tensors.

    Raises:
        ValueError: no amount, one that the context fills, more than the card has, or no GPU.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]+)\s*", memory)
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise refusal("memory", repr(memory), "a number and MiB, GiB, MB or GB", "write 8GiB, say")
    if device.type != "cuda":
        raise refusal("memory", f"{memory!r} on {device}", "a GPU, whose memory it is about", "leave it out")
    _, total = torch.cuda.mem_get_info(device)
    size = float(found[1]) * unit
    if not CONTEXT < size <= total:
        expected = f"more than CUDA's context (0.6 GiB), and no more than the card has ({total / 2**30:.1f} GiB)"
        raise refusal("memory", repr(memory), expected, "name an amount between them")
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction((size - CONTEXT) / total, index)
    return int(size - CONTEXT)


def _cpu_capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_capabilities().get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"tfb_ext": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {name: version(name) for name in ("transformers", "peft", "safetensors")}


def load_adapter(
    adapter: str,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    classes: int | None = None,
    load_in: str | None = None,
    device_map: str | None = None,
    memory: str | None = None,
) -> Loaded:
    """A base model with a trained LoRA adapter, and the tokenizer.

    Args:
        adapter: a PEFT adapter folder, or ``"demo"`` for the one in the package.
        base: the base model's folder or hub name; by default what the adapter's configuration names.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: of the base model: ``auto``, ``float32``, ``bfloat16``, ``float16``.
        classes: number of classes, for adapters with a classification head.
        load_in: quantise the base model by bitsandbytes: ``"4bit"`` (nf4, double quantisation) or ``"8bit"``.
        device_map: where its layers go, as transformers takes it (``"auto"``), instead of ``device``. What the GPUs have no room for stays in
            host memory and is brought in for its calls, unless it is quantised.
        memory: what this process may take of each GPU, such as ``"8GiB"``; see :func:`hold_memory`.

    The tokenizer is the one beside the adapter where there is one; the embeddings get a row for every token that it or the
    adapter's file has (as PEFT's ``AutoPeftModel``).

    Raises:
        UnsupportedModelError: no adapter there, a damaged one, one that does not fit the base model, or one that is not for a
            causal language model or a sequence classifier.
    """
    folder = demo_adapter() if adapter == DEMO else Path(adapter)
    files = read_adapter(folder)
    if device_map is not None and device_map not in MAPS:
        device, device_map = _device_of(device_map), None
    place = pick_device(device)
    rooms: dict[int | str, int] = {}
    if memory is not None:
        gpus = range(torch.cuda.device_count()) if device_map is not None and place.type == "cuda" else [place.index]
        rooms = {gpu or 0: hold_memory(memory, place if gpu is None else torch.device("cuda", gpu)) for gpu in gpus}
    kind = pick_dtype(dtype, place)
    from transformers import AutoConfig, AutoTokenizer

    name = base or files.config.get("base_model_name_or_path")
    if not name:
        raise UnsupportedModelError(f"{folder}: the adapter does not name its base model; pass --base")
    source = base_model_dir() if base is None and name == BASE_MODEL else name
    model_class, head = _model_class(files)
    words = f"{name}: the base model cannot be loaded", "restore its files, or pass another with --base"
    with _in_words(*words):
        config = AutoConfig.from_pretrained(source)
    found = getattr(config, "quantization_config", None)
    settings = {} if load_in is None else quantisation(load_in, kind, found, files if head else None)
    if found is not None or settings:  # such weights are made in their place
        settings["device_map"] = device_map or {"": place}
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each product in int8
        settings |= {"max_memory": rooms} if rooms and device_map is not None else {}
    with _in_words(*words):
        extra: dict[str, Any] = {"num_labels": classes} if head and classes is not None else {}
        try:
            model = model_class.from_pretrained(source, dtype=kind, **extra, **settings)
        except RuntimeError as error:  # transformers' message only points at a report that it logs
            if not extra:
                raise
            raise UnsupportedModelError(
                f"{name}: its weights do not make a classifier of {classes} classes ({error}); give as many choices as its "
                "head has, or the base model without a head"
            ) from None
    own = (folder / "tokenizer_config.json").is_file()
    with _in_words(f"{folder if own else name}: its tokenizer cannot be loaded", "restore its files"):
        tokenizer = AutoTokenizer.from_pretrained(folder if own else source)
    _fit_embeddings(model, len(tokenizer) if own else 0, files)
    if head and model.config.pad_token_id is None:
        padding = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.eos_token_id if padding is None else padding
    if not settings and device_map is None:
        model = model.to(place)
    attached = attach_adapter(model, files, base=str(name))
    if not settings and device_map is not None:
        attached = _dispatched(attached, device_map, rooms)
    return Loaded(attached, tokenizer, head, folder, str(name), own)


def _device_of(device_map: str) -> str:
    """The device where a map puts the whole model."""
    try:
        return str(pick_device(device_map or "none"))
    except ValueError:
        raise refusal(
            "device_map", repr(device_map), f"{', '.join(MAPS)}, or a device that is there", "--device for one device"
        ) from None


def _dispatched(model: Any, device_map: str, rooms: Mapping[int | str, int]) -> Any:
    """The model over the devices, with its adapter: PEFT loads none into layers that are in host memory already."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    most = get_max_memory()
    most |= {gpu: min(room, most.get(gpu, room)) for gpu, room in rooms.items()}
    whole = model._no_split_modules or None
    if device_map != "sequential":
        most = get_balanced_memory(model, most, whole, low_zero=device_map == "balanced_low_0")
    places = infer_auto_device_map(model, most, whole)
    if "disk" in places.values():
        raise refusal(
            "device_map", f"{device_map!r} for a model that memory is too small for", "one that fits", "--load-in 4bit"
        )
    model = dispatch_model(model, places)
    _bring_in_adapters(model)
    return model


def _bring_in_adapters(model: Any) -> None:
    """An adapter's weights, of which its posterior is made, to where their layers are called: offloaded ones lie nowhere between calls."""
    from accelerate.hooks import remove_hook_from_module
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    own = [child for layer in layers for name, child in layer.named_children() if name != "base_layer"]
    for part in [part for child in own for part in child.modules()]:
        hook: Any = getattr(part, "_hf_hook", None)
        if getattr(hook, "offload", False):
            remove_hook_from_module(part).to(hook.execution_device)


def quantisation(
    load_in: str, dtype: torch.dtype, found: Any = None, classifier: AdapterFiles | None = None
) -> dict[str, Any]:
    """How the base model is to be quantised by bitsandbytes, as ``from_pretrained`` takes it; ``found``: how it is already; ``classifier``: the adapter
    of one, whose head stays as it is."""
    from transformers import BitsAndBytesConfig

    if load_in not in LOAD_IN:
        raise refusal("load_in", repr(load_in), " or ".join(LOAD_IN), "leave it out for the weights as they are")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise refusal(
            "load_in", f"{load_in!r} for a checkpoint that is quantised already ({method})", "none", "leave it out"
        )
    if find_spec("bitsandbytes") is None:
        raise refusal("load_in", f"{load_in!r} without bitsandbytes", "it installed", "pip install bitsandbytes")
    four: dict[str, Any] = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    if classifier is not None:
        saved = classifier.config.get("modules_to_save") or []
        four["llm_int8_skip_modules"] = sorted({*CLASSIFIER_HEADS, *saved})
    return {"quantization_config": BitsAndBytesConfig(**{f"load_in_{load_in}": True}, **four)}


def _model_class(files: AdapterFiles) -> tuple[Any, bool]:
    """What loads the base model, and whether that has a classification head: the task decides, else PEFT's ``auto_mapping``."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.models.auto import modeling_auto

    folder, task, mapping = files.folder, files.config.get("task_type"), files.config.get("auto_mapping")
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


def _fit_embeddings(model: Any, tokens: int, files: AdapterFiles) -> None:
    """Give the embeddings as many rows as the adapter's file has, else at least one for each of ``tokens``."""
    embeddings = model.get_input_embeddings()
    rows, width = embeddings.weight.shape
    name = next(n for n, module in model.named_modules() if module is embeddings)
    saved = [s[0] for k, s in files.shapes.items() if k.endswith(f".{name}.weight") and s[1:] == [width]]
    wanted = saved[0] if saved else max(rows, tokens)
    if wanted != rows:
        with torch.random.fork_rng(devices=[]):  # rows that nobody trained: the same in every run
            torch.manual_seed(0)
            model.resize_token_embeddings(wanted)


@contextmanager
def _in_words(what: str, way_out: str) -> Iterator[None]:
    """Whatever a library raises over files that it did not write, as one sentence."""
    try:
        yield
    except (TFBError, OSError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{what} ({type(error).__name__}: {error}); {way_out}") from error
