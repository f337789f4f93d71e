"""Llama-3.1-8B's shape with random weights, LoRA adapters on it, and the same model without PEFT's layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

RANK = 8
# Standard deviation of the random adapter's A and B. With it the mean M has entries of about the size of sigma = 0.02.
ADAPTER_STD = 0.02
TARGETS: dict[str, list[str]] = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qv_head": ["q_proj", "v_proj", "lm_head"],
}


@dataclass(frozen=True)
class Shape:
    """Widths of a Llama model and the batch it is timed with."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    rows: int
    tokens: int
    samples: int

    def projections(self, head_dim: int | None = None) -> set[tuple[int, int]]:
        """(in, out) features of its linear layers, the head included."""
        wide = head_dim or self.hidden // self.heads
        queries, keys = self.heads * wide, self.kv_heads * wide
        return {
            (self.hidden, queries),
            (self.hidden, keys),
            (queries, self.hidden),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
            (self.hidden, self.vocabulary),
        }


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256, rows=8, tokens=128, samples=10)
LLAMA_1B = Shape(2048, 8192, 16, 32, 8, 128256, rows=8, tokens=128, samples=10)
QWEN3_8B = Shape(4096, 12288, 36, 32, 8, 151936, rows=8, tokens=128, samples=10)  # its widths; the model differs
TINY = Shape(64, 128, 4, 4, 4, 512, rows=2, tokens=16, samples=4)


def build(shape: Shape, blocks: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A random model of ``shape`` with ``blocks`` blocks, made and initialised on ``device``, with sdpa attention.

    Raises:
        RuntimeError: the rotary tables are not the ones the configuration asks for.
    """
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    rotary = model.model.rotary_emb
    wanted = type(rotary)(config).inv_freq
    if rotary.inv_freq.dtype != torch.float32 or not torch.allclose(rotary.inv_freq.cpu(), wanted, rtol=1e-6):
        raise RuntimeError(f"rotary frequencies are {rotary.inv_freq}, expected {wanted} in float32")
    return model.eval().requires_grad_(False)


def build_quantised(shape: Shape, blocks: int, device: torch.device, scheme: str) -> nn.Module:
    """:func:`build` with the linear layers of its blocks quantised, a block at a time: ``nf4`` (bitsandbytes, double quantisation), or
    torchao's ``int8`` and ``fp8`` (weights alone) and ``fp8-dynamic`` (activations too)."""
    model: Any = build(shape, 1, device)
    block = type(model.model.layers[0])
    for index in range(blocks):
        if index:
            with torch.device(device):
                model.model.layers.append(block(model.config, index).to(torch.bfloat16).eval().requires_grad_(False))
        quantise(model.model.layers[index], scheme)
    model.config.num_hidden_layers = blocks
    model.config.layer_types = None
    model.is_loaded_in_4bit = scheme == "nf4"  # which PEFT goes by
    return model  # type: ignore[no-any-return]


def quantise(block: nn.Module, scheme: str) -> None:
    """Quantise the linear layers below ``block``, in place."""
    if scheme != "nf4":
        from torchao import quantization as ao

        made = {
            "int8": lambda: ao.Int8WeightOnlyConfig(),
            "fp8": lambda: ao.Float8WeightOnlyConfig(),
            "fp8-dynamic": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
        }
        ao.quantize_(block, made[scheme](), filter_fn=lambda module, name: isinstance(module, nn.Linear))
        return
    import bitsandbytes as bnb

    for parent in list(block.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                own = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, False, linear.weight.dtype, quant_type="nf4"
                )
                own.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=own)
                setattr(parent, name, own.to(linear.weight.device).eval())


def add_adapters(model: nn.Module, layers: str, dtypes: dict[str, torch.dtype], rank: int = RANK) -> PeftModel:
    """Put one random, non-zero LoRA adapter for each name of ``dtypes`` on the ``layers`` (a key of ``TARGETS``)."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS[layers], task_type="CAUSAL_LM")
    first, *others = dtypes
    peft = get_peft_model(model, config, adapter_name=first)
    for name in others:
        peft.add_adapter(name, config)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    for module in peft.modules():
        if isinstance(module, LoraLayer):
            for name, dtype in dtypes.items():
                for part in (module.lora_A[name], module.lora_B[name]):
                    part.to(dtype)
                    nn.init.normal_(part.weight, std=ADAPTER_STD, generator=generator)
    return peft.eval().requires_grad_(False)


def activate(peft: PeftModel, adapter: str) -> None:
    """Make ``adapter`` the active one; its weights stay frozen."""
    peft.set_adapter(adapter, inference_mode=True)


@contextmanager
def bare(peft: PeftModel) -> Iterator[nn.Module]:
    """The base model as it was before PEFT: inside, every LoRA layer is replaced by its own ``nn.Linear``."""
    base = peft.get_base_model()
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoraLayer):
                swapped.append((parent, name, child))
                setattr(parent, name, child.get_base_layer())
    try:
        yield base
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)


def token_ids(
    shape: Shape, copies: int, device: torch.device, rows: int | None = None, tokens: int | None = None
) -> torch.Tensor:
    """``copies`` times the same random batch, (copies * rows, tokens), copy after copy."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, shape.vocabulary, (rows or shape.rows, tokens or shape.tokens), generator=generator)
    return ids.repeat(copies, 1).to(device)


def lora_layers(peft: PeftModel, names: Sequence[str]) -> list[LoraLayer]:
    """The base model's LoRA layers by canonical name, in that order."""
    modules = dict(peft.get_base_model().named_modules())
    return [modules[name] for name in names]
