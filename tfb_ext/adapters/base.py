"""Products by kind of base layer: which PEFT layers and base layers are served, what they are called, and how the base multiplies.

A plain linear base accumulates onto the update, see :func:`is_plain`. So does a quantised one for many rows, where its weight is
made dense for the length of the product (:attr:`Kind.dense`). For few rows, or where activations are rounded too, it runs by its
library's own product, and the update is added to its output in place. No library is imported before a model has its layers: a kind
is known by the names of its classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Kind:
    """The quantised base layers of one library.

    Attributes:
        library: its name.
        base: where its base layers' class, or that of their weights, is from: the beginning of the class's full name.
        lora: PEFT's class of the layers over them, whose forward is: the base layer's output, plus every active adapter's update.
            By exact name, since a subclass may compute something else.
        scheme: of a base layer, how its weight is quantised.
        tested: schemes that a test holds to separate passes -> where that runs.
        dense: of a base layer and the type of its input, its weight (m, n) in that type; where ``takes`` says that its product is
            that of such a weight.
        product: the base layer's class whose product that is, by exact name.
        rows: from how many on the product of the dense weight is taken (measured, see ``bench/NOTES.md``): for more than 512,
            bitsandbytes' own makes it dense too.
        rounds: of a base layer, whether its product rounds its input as well, see :func:`round_no_inputs`.
    """

    library: str
    base: str
    lora: str
    scheme: Callable[[Any], str]
    tested: dict[str, str]
    dense: Callable[[Any, torch.dtype], Tensor] | None = None
    takes: Callable[[Any, torch.dtype], bool] = lambda base, dtype: False
    product: str = ""
    rows: int = 513
    rounds: Callable[[Any], bool] = lambda base: False


def _torchao(base: Any) -> str:
    weight = base.weight
    kind = getattr(weight, "target_dtype", None) or getattr(weight, "qdata", weight).dtype
    dynamic = getattr(weight, "act_quant_kwargs", None) or getattr(weight, "activation_quantization", None)
    return str(kind).removeprefix("torch.") + (" dynamic" if dynamic else "")


def _bits(base: Any) -> str:
    return f"{base.bits} bits"


def _bits4_takes(base: Any, dtype: torch.dtype) -> bool:
    state = base.weight.quant_state
    packed = getattr(state, "packing_format_for_cpu", False)
    known = base.compute_type_is_set and base.compute_dtype in (None, dtype)  # it is set by the first call
    return known and not packed and state.shape[0] == base.out_features


def _bits4_dense(base: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    with torch._C.DisableTorchFunctionSubclass():  # what is asked of the weight goes to its class's Python code first
        weight = base._parameters["weight"]
        return dequantize_4bit(weight.view(-1, 1), weight.quant_state).to(dtype)


def _bits8_dense(base: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight, scale = base.weight, base.state.SCB  # where the first call moves it
    return int8_vectorwise_dequant(weight.data, weight.SCB if scale is None else scale).to(dtype)


def _torchao_rounds(base: Any) -> bool:
    return any(getattr(base.weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))


def _torchao_takes(base: Any, dtype: torch.dtype) -> bool:
    """Not of weights in int8, whose own product scales its output instead of making them dense."""
    weight = base.weight
    own = type(weight).__name__ == "Int8Tensor" and weight.scale.numel() == len(weight)
    scales = getattr(weight, "act_pre_scale", None) is not None
    return not own and weight.dtype == dtype and not scales and not _torchao_rounds(base)


def _fp8_dense(base: Any, dtype: torch.dtype) -> Tensor:
    """A scale for each block of the weight, the last of which may be smaller, or one for all."""
    weight, scale = base.weight, base.weight_scale_inv.float()
    if scale.numel() > 1:
        for dim, size in enumerate(base.block_size):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return (weight.float() * scale).to(dtype)


CI, BOTH = "CPU in CI, GPU", "CPU and GPU, where the library is installed"
HERE, THERE = "CPU, where the library is installed", "GPU, where the library is installed"
PLAIN = "CPU in CI, its kernel in plain torch"
PLAIN_LORA = "peft.tuners.lora.layer.Linear"
KINDS = (
    Kind(
        "bitsandbytes",
        "bitsandbytes.nn.modules.Linear4bit",
        "peft.tuners.lora.bnb.Linear4bit",
        lambda base: base.weight.quant_type,
        {"nf4": CI, "fp4": CI, "nf4, double quantisation": CI},
        _bits4_dense,
        _bits4_takes,
        "bitsandbytes.nn.modules.Linear4bit",
    ),
    Kind(
        "bitsandbytes",
        "bitsandbytes.nn.modules.Linear8bitLt",
        "peft.tuners.lora.bnb.Linear8bitLt",
        lambda base: "int8",
        {"int8": CI},
        _bits8_dense,
        rounds=lambda base: True,
    ),
    Kind(
        "torchao",
        "torchao.",
        "peft.tuners.lora.torchao.TorchaoLoraLinear",
        _torchao,
        {"int8": BOTH, "int8 dynamic": BOTH, "int4": BOTH, "float8_e4m3fn": BOTH, "float8_e4m3fn dynamic": THERE},
        lambda base, dtype: base.weight.dequantize().to(dtype),
        _torchao_takes,
        "torch.nn.modules.linear.Linear",
        rounds=_torchao_rounds,
    ),
    Kind("GPTQ (GPT-QModel)", "gptqmodel.", "peft.tuners.lora.gptq.GPTQLoraLinear", _bits, {"4 bits": HERE}),
    Kind("AWQ (GPT-QModel)", "gptqmodel.", "peft.tuners.lora.awq.AwqLoraLinear", _bits, {"4 bits": HERE}),
    Kind(
        "HQQ",
        "hqq.",
        "peft.tuners.lora.hqq.HqqLoraLinear",
        lambda base: f"{base.meta['nbits']} bits",
        {"4 bits": BOTH},
        lambda base, dtype: base.dequantize(),
        lambda base, dtype: base.compute_dtype == dtype,
        "hqq.core.quantize.HQQLinear",
    ),
    Kind(
        "optimum-quanto",
        "optimum.quanto.",
        PLAIN_LORA,
        lambda base: base.weight_qtype.name,
        {"qint8": HERE, "qint4": HERE},
        lambda base, dtype: base.qweight.dequantize().to(dtype),
        lambda base, dtype: base.activation_qtype is None and base.weight.dtype == dtype,
        "optimum.quanto.nn.qlinear.QLinear",
        rounds=lambda base: base.activation_qtype is not None,
    ),
    Kind(
        "transformers",
        "transformers.integrations.finegrained_fp8.",
        PLAIN_LORA,
        lambda base: "fp8",
        {"fp8": PLAIN},
        _fp8_dense,
        rounds=lambda base: base.weight.element_size() == 1,
    ),
)
# Every PEFT layer class that is served. The plain one may stand over other kinds of base layers too: it calls them as they are.
SERVED = tuple(dict.fromkeys((PLAIN_LORA, *(kind.lora for kind in KINDS))))


SUPPORT_COLUMNS = ("library", "weights", "PEFT's layer", "tested")


def support_table() -> list[tuple[str, str, str, str]]:
    """Of every scheme of :data:`KINDS`: library, scheme, PEFT's class of layer, and where it is tested."""
    return [(k.library, scheme, k.lora.rpartition(".")[2], where) for k in KINDS for scheme, where in k.tested.items()]


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of(layer: Any) -> Kind | None:
    """How a LoRA layer's base is quantised; ``None`` where it is not, or not as :data:`KINDS` knows."""
    cls: Any = type(layer)
    return _kind_of(KINDS, cls, classes_of(layer.get_base_layer()))


def classes_of(base: nn.Module) -> tuple[type, type]:
    """A base layer's class and its weight's, by which its kind is known."""
    return type(base), type(base._parameters.get("weight"))


@cache  # asked of every layer at every call by linear
def _kind_of(kinds: tuple[Kind, ...], layer: type, classes: tuple[type, type]) -> Kind | None:
    lora = {full_name(cls) for cls in layer.__mro__}
    return next((k for k in kinds if k.lora in lora and _stands_on(k, classes)), None)


def _stands_on(kind: Kind, classes: tuple[type, type]) -> bool:
    return any(full_name(cls).startswith(kind.base) for cls in classes)


def round_no_inputs(model: nn.Module) -> None:
    """Products of base layers that round their input become those of their dense weights, for as long as a comparison takes.

    They round to 8 bits by a scale of the row, or of all rows of a call, and LLM.int8 (Dettmers et al., 2022) leaves a column as it is
    where any row has an outlier in it. So a row's numbers change with the rows beside it, and jump where a last bit tips a step over:
    on a small model by as much as samples differ. Undone by restoring the modules' attributes.
    """
    for part in model.modules():
        kind = next((k for k in KINDS if _stands_on(k, classes_of(part))), None)
        if kind is not None and kind.dense is not None and kind.rounds(part):
            name = "_old_forward" if "_old_forward" in vars(part) else "forward"  # accelerate's own moves inputs
            if name != "forward" or "forward" not in vars(part):  # anybody else's stays, and is compared
                setattr(part, name, partial(_dense_product, kind.dense, part))


def _dense_product(dense: Callable[[Any, torch.dtype], Tensor], base: Any, x: Tensor) -> Tensor:
    bias = None if base.bias is None else base.bias.to(x.dtype)
    return nn.functional.linear(x, dense(base, x.dtype), bias)


def dense_kind(layer: Any) -> Kind | None:
    """:func:`kind_of` where the base layer may have a dense weight for a product."""
    kind = kind_of(layer)
    return kind if kind is not None and kind.product == full_name(type(layer.get_base_layer())) else None


def base_kind(layer: Any) -> str:
    """How a LoRA layer's base weight is quantised, in words; ``"float"`` where it is not."""
    kind, base = kind_of(layer), layer.get_base_layer()
    if kind is not None:
        return f"{kind.library} {kind.scheme(base)}"
    return "float" if float_type(layer) is not None else type(base).__name__


def computes_in_half(layer: Any) -> bool:
    """Whether a LoRA layer's quantised base rounds an input of float32 to half precision: tried on one that is none."""
    base: Any = layer.get_base_layer()
    weight: Any = next(iter(layer.lora_A.values())).weight
    x = torch.linspace(-1, 1, weight.shape[1], device=weight.device)[None] / 3
    try:
        y = base(x)
        return any(torch.equal(y, base(x.to(half).float())) for half in HALF)
    except RuntimeError:  # it takes its own type alone
        return True


def float_type(layer: Any) -> torch.dtype | None:
    """Type of a LoRA layer's base weight, and of its output; ``None`` for a quantised one, whose output has its input's type."""
    weight: Any = getattr(layer.get_base_layer(), "weight", None)
    plain = type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.float64, *HALF)
    return weight.dtype if plain else None


def is_plain(base: nn.Module, cls: type = nn.Linear) -> bool:
    """Whether ``base(x)`` is one product with a weight, so that it can be added onto an update written before it: of this very class.

    Besides, ``x`` must be of the weight's type, and not under autocast: :func:`accumulates`.
    """
    # Straight from the dictionaries: nn.Module's attribute access would be a third of a layer's cost.
    return (
        type(base) is cls
        # Hooks see the base layer's own output; an own forward is accelerate's, which brings the weights in.
        and not base._forward_hooks
        and not base._forward_pre_hooks
        and "forward" not in base.__dict__
    )


def accumulates(base: nn.Module, x: Tensor, kind: Kind | None = None) -> bool:
    """Whether a base layer that :func:`is_plain` can multiply ``x`` (..., n) as it is, or has a dense weight for it."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    if kind is not None:
        enough = x.numel() >= kind.rows * x.shape[-1] and not torch.compiler.is_compiling()
        return enough and kind.takes(base, x.dtype)
    weight = base._parameters.get("weight")
    return type(weight) is nn.Parameter and x.dtype == weight.dtype and x.device == weight.device


def linear_columns(linear: Any, x: Tensor, columns: Tensor) -> Tensor:
    """Output features ``columns`` of a plain linear layer: ``x`` (..., n) -> (..., len(columns))."""
    bias = None if linear.bias is None else linear.bias.index_select(0, columns)
    return nn.functional.linear(x, linear.weight.index_select(0, columns), bias)


def has_derivative(base: Any, x: Tensor) -> bool:
    """Whether gradients through ``base`` are those of the product that it computes, tried on the largest row of ``x`` (..., n).

    Of a linear layer ``f`` with ``v = f(x) - f(0)``, the gradient of ``<v, f>`` has the product ``|v|^2`` with x. Rounding changes
    that by some per cent; a gradient that stops at rounded activations (torchao's dynamic kinds), or at a product of packed weights
    (bitsandbytes' 4 bits on CPUs with AVX512-BF16), is wholly wrong.
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    x = rows[rows.float().square().sum(-1).argmax()][None].clone().requires_grad_()  # others may be padding, and zero
    with torch.enable_grad():
        out = base(x)
        v = (out - base(x * 0.0)).detach()
        if not out.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(out, x, v, allow_unused=True)
    wanted = float(v.double().square().sum())
    found = 0.0 if gradient is None else float((gradient.double() * x.detach().double()).sum())
    return abs(found - wanted) <= 0.2 * wanted


def matrix_of(x: Tensor) -> Tensor:
    """(..., n) as rows that are each in one piece."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def version_of(x: Tensor) -> int:
    """Changes when ``x`` is written to. Tensors of inference mode and of a trace do not count."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
