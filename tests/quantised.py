"""Tiny models with quantised base layers, by the names in ``tfb_ext.adapters.base.KINDS``: library, scheme."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers as tf
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

Quantise = Callable[[Any, torch.dtype], Any]


def _each_linear(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, make(linear))
    return model


def _bits4(kind: str, nested: bool = False) -> Quantise:
    def quantise(model: Any, dtype: torch.dtype) -> Any:
        import bitsandbytes as bnb

        def make(linear: nn.Linear) -> nn.Module:
            own = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, False, dtype, compress_statistics=nested, quant_type=kind
            )
            own.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, compress_statistics=nested, quant_type=kind, module=own
            )
            return own.to("cuda" if linear.weight.is_cuda else "cpu")

        model.is_loaded_in_4bit = True  # which PEFT goes by
        return _each_linear(model, make)

    return quantise


def _bits8(model: Any, dtype: torch.dtype) -> Any:
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        own = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=6.0)
        own.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return own.to("cuda" if linear.weight.is_cuda else "cpu")

    model.is_loaded_in_8bit = True
    return _each_linear(model, make)


def _torchao(config: str, **options: Any) -> Quantise:
    def quantise(model: Any, dtype: torch.dtype) -> Any:
        from torchao import quantization

        if config.startswith("Intx"):
            options["granularity"] = quantization.PerGroup(32)
        made = getattr(quantization, config)(**options)
        quantization.quantize_(model.model, made, filter_fn=lambda part, name: isinstance(part, nn.Linear))
        return model

    return quantise


def _gptqmodel(file: str, name: str, transposed: bool) -> Quantise:
    def quantise(model: Any, dtype: torch.dtype) -> Any:
        from importlib import import_module

        cls = getattr(import_module(f"gptqmodel.nn_modules.qlinear.{file}"), name)

        def make(linear: nn.Linear) -> nn.Module:
            m, n = linear.weight.shape
            groups = linear.weight.data.float().view(m, n // 32, 32)
            low, high = groups.amin(-1), groups.amax(-1)
            scales = (high - low) / 15
            zeros = (-low / scales).round().clamp(0, 15)
            own = cls(
                bits=4, group_size=32, sym=False, desc_act=False, in_features=n, out_features=m, bias=False
            )  # fmt: skip
            own.pack(linear.float(), scales, zeros, *(() if transposed else (torch.arange(n) // 32,)))
            own.post_init()
            return own.eval()

        return _each_linear(model, make)

    return quantise


def _hqq(model: Any, dtype: torch.dtype) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=32)
    device = str(model.device)
    return _each_linear(model, lambda linear: HQQLinear(linear, config, compute_dtype=dtype, device=device))


def _quanto(weights: str) -> Quantise:
    def quantise(model: Any, dtype: torch.dtype) -> Any:
        import optimum.quanto as quanto

        quanto.quantize(model.model, weights=getattr(quanto, weights))
        quanto.freeze(model.model)
        return model

    return quantise


def _blocks(weight: torch.Tensor, size: int) -> torch.Tensor:
    """(m, n) as (m / size, size, n / size, size)."""
    m, n = weight.shape
    return weight.view(m // size, size, n // size, size)


def _fp8_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """What the kernel computes, which is loaded from a hub: weights in blocks and every row's groups of inputs in float8."""
    size, most = self.block_size[0], torch.finfo(torch.float8_e4m3fn).max
    weight = _blocks(self.weight.float(), size) * self.weight_scale_inv[:, None, :, None]
    groups = x.float().unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
    rounded = (groups / scale).to(torch.float8_e4m3fn).float() * scale
    y = rounded.flatten(-2) @ weight.view(self.weight.shape).T
    return (y if self.bias is None else y + self.bias).to(x.dtype)


def _fp8(model: Any, dtype: torch.dtype) -> Any:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    FP8Linear.forward = _fp8_forward  # type: ignore[method-assign]
    size, most = 32, torch.finfo(torch.float8_e4m3fn).max

    def make(linear: nn.Linear) -> nn.Module:
        own = FP8Linear(linear.in_features, linear.out_features, block_size=(size, size))
        blocks = _blocks(linear.weight.data.float(), size)
        scale = blocks.abs().amax((1, 3)) / most
        own.weight.data = (blocks / scale[:, None, :, None]).view(linear.weight.shape).to(torch.float8_e4m3fn)
        own.weight_scale_inv.data = scale
        return own.to(linear.weight.device).requires_grad_(False)

    return _each_linear(model, make)


QUANTISE: dict[tuple[str, str], tuple[str, Quantise]] = {
    ("bitsandbytes", "nf4"): ("bitsandbytes", _bits4("nf4")),
    ("bitsandbytes", "fp4"): ("bitsandbytes", _bits4("fp4")),
    ("bitsandbytes", "nf4, double quantisation"): ("bitsandbytes", _bits4("nf4", nested=True)),
    ("bitsandbytes", "int8"): ("bitsandbytes", _bits8),
    ("torchao", "int8"): ("torchao", _torchao("Int8WeightOnlyConfig")),
    ("torchao", "int8 dynamic"): ("torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    ("torchao", "int4"): ("torchao", _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4)),
    ("torchao", "float8_e4m3fn"): ("torchao", _torchao("Float8WeightOnlyConfig")),
    ("torchao", "float8_e4m3fn dynamic"): ("torchao", _torchao("Float8DynamicActivationFloat8WeightConfig")),
    ("GPTQ (GPT-QModel)", "4 bits"): ("gptqmodel", _gptqmodel("torch", "TorchLinear", False)),
    ("AWQ (GPT-QModel)", "4 bits"): ("gptqmodel", _gptqmodel("torch_awq", "AwqTorchLinear", True)),
    ("HQQ", "4 bits"): ("hqq", _hqq),
    ("optimum-quanto", "qint8"): ("optimum.quanto", _quanto("qint8")),
    ("optimum-quanto", "qint4"): ("optimum.quanto", _quanto("qint4")),
    ("transformers", "fp8"): ("transformers", _fp8),
}


def quantised(
    library: str, scheme: str, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu", **lora: Any
) -> PeftModel:
    """A tiny Llama whose blocks' linear layers are quantised, with a random adapter in float32; skips where the library is not there."""
    package, quantise = QUANTISE[library, scheme]
    if find_spec(package.partition(".")[0]) is None or find_spec(package) is None:
        pytest.skip(f"needs {package}")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tf.LlamaConfig(
        vocab_size=zoo.VOCAB, num_hidden_layers=zoo.BLOCKS, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, **sizes,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = quantise(model.to(device, dtype).eval(), dtype)
    options = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **lora}
    peft = get_peft_model(made, LoraConfig(**options))
    zoo.randomise(peft, 0.05)
    return peft.to(device).eval()
