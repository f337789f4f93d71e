"""Tiny random models of the architectures we claim, with a random LoRA adapter, and the oracle of separate passes."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tfb_ext.adapters.adapter import BayesianAdapter
from tfb_ext.adapters.attach import bayesianize
from tfb_ext.forward.trunk import Trunk
from tfb_ext.ops import reference
from tfb_ext.posterior.canonical import canonical_name

torch.set_num_threads(1)  # threads only get in each other's way in models this small

BLOCKS = 4
VOCAB = 97
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ATTENTION = ["q_proj", "v_proj"]
_ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _decoder(name: str, targets: list[str], **extra: Any) -> Callable[[], tuple[nn.Module, list[str]]]:
    def build() -> tuple[nn.Module, list[str]]:
        config = getattr(tf, f"{name}Config")(**{**_COMMON, **extra})
        return tf.AutoModelForCausalLM.from_config(config), targets

    return build


def _gpt2() -> tuple[nn.Module, list[str]]:
    config = tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=BLOCKS,
        n_head=4,
        n_positions=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.GPT2LMHeadModel(config), ["c_attn", "c_fc"]


def _bert() -> tuple[nn.Module, list[str]]:
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_labels=3, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    return tf.BertForSequenceClassification(config), ["query", "value"]


def _llama_classifier() -> tuple[nn.Module, list[str]]:
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**_COMMON, num_labels=3)), _ATTENTION


CAUSAL: dict[str, Callable[[], tuple[nn.Module, list[str]]]] = {
    "llama": _decoder("Llama", _ALL_LINEAR),
    "llama-head": _decoder("Llama", [*_ATTENTION, "lm_head"]),
    "qwen2": _decoder("Qwen2", _ATTENTION),
    "qwen3": _decoder("Qwen3", _ALL_LINEAR, head_dim=8),
    "mistral": _decoder("Mistral", _ATTENTION, sliding_window=4, head_dim=8),
    "gemma2": _decoder("Gemma2", _ATTENTION, head_dim=8, sliding_window=4, final_logit_softcapping=3.0),
    "gemma3": _decoder("Gemma3Text", _ALL_LINEAR, head_dim=8, sliding_window=4, sliding_window_pattern=2),
    "mixtral": _decoder("Mixtral", _ATTENTION, num_local_experts=4, num_experts_per_tok=2),
    "phi3": _decoder("Phi3", ["qkv_proj", "gate_up_proj"]),
    "gpt2": _gpt2,
}
CLASSIFIERS: dict[str, Callable[[], tuple[nn.Module, list[str]]]] = {"bert": _bert, "llama-cls": _llama_classifier}
MODELS = {**CAUSAL, **CLASSIFIERS}


def peft_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.2, **lora: Any
) -> PeftModel:
    """A tiny model of the zoo with a random (non-zero) adapter ``default``, r = 4, alpha = 8, in eval mode."""
    torch.manual_seed(seed)
    model, targets = MODELS[name]()
    for parameter in model.parameters():  # larger than the default initialisation, so that logits differ visibly
        parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    task = "SEQ_CLS" if name in CLASSIFIERS else "CAUSAL_LM"
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": task, **lora})
    peft = get_peft_model(model.to(dtype), config)
    randomise(peft, scale)
    return peft.eval()


def bayesian(
    name: str = "llama", device: str = "cpu", *, dtype: torch.dtype = torch.float32, **options: Any
) -> BayesianAdapter:
    """A Bayesian adapter of a tiny model."""
    return bayesianize(peft_model(name, dtype=dtype).to(device), **options)


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test, all but ``quick`` marked slow."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    kept = [value if isinstance(value, tuple) else (value,) for value in quick]
    return [pytest.param(*row, marks=() if row in kept else pytest.mark.slow) for row in rows]


def moved(tensors: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def randomise(model: nn.Module, scale: float = 0.2) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_A" in name:
            parameter.data.normal_(0.0, scale)


def inputs(rows: int = 3, tokens: int = 9, padded: bool = True, left: bool = True) -> dict[str, Tensor]:
    """A batch with padding of different lengths and explicit position ids."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            side = slice(0, row) if left else slice(tokens - row, tokens)
            mask[row, side] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def prompt(rows: int = 3, device: str = "cpu", tokens: int = 6) -> dict[str, Tensor]:
    """What ``generate`` takes, which makes its own positions."""
    batch = inputs(rows, tokens)
    del batch["position_ids"]
    return moved(batch, device)


def lora_layers(adapter: Any) -> dict[str, Any]:
    """PEFT's layers of a Bayesian adapter by canonical name."""
    modules = {canonical_name(name): module for name, module in adapter.model.named_modules()}
    return {name: modules[name] for name in adapter.layers}


def sampled_copy(adapter: Any, sample: int, sigma: float, random: tuple[str, ...]) -> list[tuple[nn.Module, Any]]:
    """Write sample ``k``'s weights into the random layers' base weights, or of quantised bases into PEFT's own ``A`` and ``B``
    (both float32); returns the modules and their old weights."""
    saved: list[tuple[nn.Module, Any]] = []
    layers = lora_layers(adapter)
    for name in random:
        module = layers[name]
        basis, mean = adapter.sample_weights(name, sample, sigma)
        down, up = module.lora_A[adapter.name], module.lora_B[adapter.name]
        base = module.get_base_layer()
        if type(getattr(base, "weight", None)) is not nn.Parameter or base.weight.itemsize == 1:
            saved += [(down, down.weight), (up, up.weight)]
            down.weight, up.weight = (
                nn.Parameter(written.to(own.weight), requires_grad=False)
                for written, own in ((mean, down), (basis, up))
            )
            continue
        delta = module.scaling[adapter.name] * (basis.double() @ mean.double())
        plain = (up.weight.double() @ down.weight.double()).cpu()
        change = (delta - module.scaling[adapter.name] * plain).to(base.weight.device)
        saved.append((base, base.weight))
        written = (base.weight.double() + (change.T if module.fan_in_fan_out else change)).to(base.weight.dtype)
        base.weight = nn.Parameter(written, requires_grad=False)  # this layer's alone, where others share the old one
    return saved


def separate_passes(
    adapter: Any, samples: list[int], sigma: float, call: Callable[[], Tensor], random: tuple[str, ...] | None = None
) -> Tensor:
    """The oracle: for each sample, write its weights into the model, call it, restore. Stacked (S, ...)."""
    random = adapter.random_layers if random is None else random
    outputs = []
    for sample in samples:
        saved = sampled_copy(adapter, sample, sigma, random)
        try:
            with torch.no_grad():
                outputs.append(call())
        finally:
            for module, weight in saved:
                module.weight = weight
    return torch.stack(outputs)


def compared(adapter: Any, *depths: Any) -> Any:
    """The adapter, once its guard has run (at these depths): what a test counts from here on are its own calls."""
    own = adapter.depth
    for depth in depths or (own,):
        adapter.depth = depth
        with adapter.predictive(1, sigma=0.1):
            pass
    adapter.depth = own
    return adapter


def float64_copy(adapter: Any) -> Any:
    """The same Bayesian adapter on a float64 copy of its model; only for :func:`separate_passes`.

    Eager attention makes its softmax in float32, where a float64 mask is minus infinity: such a copy stays float32.
    """
    twin = copy.deepcopy(adapter)
    config = twin.anatomy.model.config
    twin.model.to(torch.float32 if config._attn_implementation == "eager" else torch.float64)
    config._experts_implementation = "eager"  # the grouped product has no float64
    return twin


def average(log_probabilities: Tensor) -> Tensor:
    """``log mean_s`` of per-sample log probabilities (S, ...)."""
    return torch.logsumexp(log_probabilities, dim=0) - math.log(log_probabilities.shape[0])


def assert_as_exact_as(out: Tensor, low: Tensor, exact: Tensor, spread: float) -> None:
    """``out`` may be twice as far from the float64 result as the same arithmetic in plain torch (``low``).

    Slack: 16 units in the last place of float32 at the largest value, and 1e-5 of ``spread`` (how far the samples
    move the result), which is how far two devices' noise may differ.
    """
    out, low = out.double(), low.double()
    assert out.shape == exact.shape
    assert torch.isfinite(out).all()
    error, reference_error = float((out - exact).abs().max()), float((low - exact).abs().max())
    slack = 16 * torch.finfo(torch.float32).eps * float(exact.abs().max()) + 1e-5 * spread
    assert error <= 2 * reference_error + slack, (
        f"error {error:.2e}, plain torch {reference_error:.2e}, slack {slack:.1e}"
    )


class Operators(TorchDispatchMode):
    """Inside, counts what ``torch.ops.tfb_ext`` is asked for; ``plain``: and answers with the definitions in plain torch.

    Attributes:
        calls: operator name -> calls.
        dtypes: of the first tensor of every call.
    """

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain, self.calls, self.dtypes = plain, Counter[str](), set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, name, _ = str(func).split(".")
        if namespace == "tfb_ext":
            self.calls[name] += 1
            self.dtypes |= {args[0].dtype}
            if self.plain:
                found = getattr(reference, name)(*args, **(kwargs or {}))
                return None if name == "expand_" else found
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation inside makes new."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self.elements = max(self.elements, tensor.numel())
        return out


def batch_for(name: str, rows: int = 3, device: str = "cpu") -> dict[str, Tensor]:
    """Left-padded inputs with position ids for decoders, right-padded ones for BERT."""
    batch = inputs(rows, left=name != "bert")
    if name == "bert":
        del batch["position_ids"]
    return moved(batch, device)


def real_positions(name: str, batch: dict[str, Tensor]) -> Any:
    """Index of the outputs that count: padding positions of a language model hold nothing."""
    return batch["attention_mask"].bool() if name in CAUSAL else slice(None)


def trunk(adapter: Any, *depths: Any, limit: float = math.inf) -> Any:
    """An empty store for the hidden states at the first random block of each depth; of the adapter's own without any."""
    firsts = {adapter.first_random_block(d) for d in depths or (adapter.depth,)}
    return Trunk(tuple(sorted(firsts - {0})), limit=limit)
