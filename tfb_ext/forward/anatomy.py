"""Where a transformers model's rows can be fanned and folded: its blocks, its head, and what the head's outputs mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..posterior.canonical import canonical_name

Kind = Literal["categorical", "multi_label", "regression"]

CLASSIFIER_HEADS = ("score", "classifier")

# The way out for a model that cannot be attached to.
BY_HAND = (
    "draw samples by hand: tfb_ext.posterior.canonical.layer_posterior gives a layer's U and M, tfb_ext.ops.noise its E_k, and the sample's "
    "weight is W0 + s U (M + sigma E_k)"
)


@dataclass(frozen=True)
class Anatomy:
    """Where a model's rows can be fanned and folded.

    Attributes:
        model: the transformers model inside PEFT's wrapper; its hooks see every call.
        blocks: its transformer blocks, bottom first, and their canonical name.
        head: the module whose output are logits, and its canonical name.
    """

    model: Any  # a transformers.PreTrainedModel, whose attributes carry no types
    blocks: nn.ModuleList
    blocks_name: str
    head: nn.Module
    head_name: str

    @property
    def device(self) -> torch.device:
        """Where inputs go: to the model's first weight but for offloaded ones, which lie nowhere between calls."""
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def kind(self) -> Kind:
        """What the logits mean by the model's configuration as it is now: classes, independent labels, or real values."""
        return self.kind_of_call(None)

    def kind_of_call(self, labels: Any) -> Kind:
        """The same for a call with ``labels``, by which transformers decides where its configuration does not say.

        It writes what it decided into the configuration. The rule is that of ``ForSequenceClassificationLoss`` in
        ``transformers/loss/loss_utils.py`` (5.17 to 5.24).
        """
        config: Any = self.model.config
        if self.head_name not in CLASSIFIER_HEADS or type(self.model).__name__.endswith("ForTokenClassification"):
            return "categorical"
        problem = config.problem_type
        if problem is None and config.num_labels == 1:
            problem = "regression"
        elif problem is None and isinstance(labels, Tensor) and labels.dtype not in (torch.int64, torch.int32):
            problem = "multi_label_classification"
        kinds: dict[Any, Kind] = {"regression": "regression", "multi_label_classification": "multi_label"}
        return kinds.get(problem, "categorical")

    def block_of(self, layer_name: str) -> int | None:
        """Index of the block that holds the layer; the number of blocks for layers after them; ``None`` if before."""
        if layer_name.startswith(self.blocks_name + "."):
            return int(layer_name[len(self.blocks_name) + 1 :].split(".")[0])
        if "embed" in layer_name.rsplit(".", 1)[-1]:
            return None
        return len(self.blocks)


def find_anatomy(model: Any, lora_names: list[str]) -> Anatomy:
    """Find blocks and head of a transformers model.

    Raises:
        UnsupportedModelError: encoder-decoder models, models whose blocks or head are not found.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no transformers config, expected a PEFT model over a transformers model. Fix: {BY_HAND}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model, whose two row counts the fan does not serve. Fix: use a decoder-only "
            f"or encoder-only model; or {BY_HAND}"
        )
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    names = [canonical_name(name) for name in lora_names]
    holding = [(name, m) for name, m in lists if any(n.startswith(name + ".") for n in names)] or lists[:1]
    if len(holding) != 1:
        found = ", ".join(name for name, _ in holding) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one list of {depth} transformer blocks that holds the adapter, found {found}. "
            f"Fix: {BY_HAND}"
        )
    head_name, head = _find_head(model)
    return Anatomy(model, holding[0][1], holding[0][0], head, head_name)


def blocks_parent(anatomy: Anatomy) -> Any:
    """The module whose forward runs the blocks: it takes tokens and gives the last hidden states."""
    return anatomy.model.get_submodule(anatomy.blocks_name.rpartition(".")[0])


def _find_head(model: Any) -> tuple[str, nn.Module]:
    head = next((getattr(model, n) for n in CLASSIFIER_HEADS if isinstance(getattr(model, n, None), nn.Module)), None)
    if head is None and hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output head, expected score, classifier or get_output_embeddings(). Fix: load it with an "
            "AutoModelFor... class that has one"
        )
    return next(canonical_name(name) for name, m in model.named_modules() if m is head), head


# What a decoder block consists of where attention and MLP are added to a residual stream, each behind norms.
_RESIDUAL_BLOCK = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
}


def last_block_parts(anatomy: Anatomy) -> list[nn.Module]:
    """Of the last block, what may run for the last position alone where only its logits are asked for: the output of its
    attention and its MLP.

    Both are added to the residual stream, so one position's result broadcasts over all and is right where it belongs; what the
    other positions hold then is read by no one. Attention still sees every position. None of a block of an unknown structure.
    """
    if not len(anatomy.blocks):
        return []
    block: Any = anatomy.blocks[-1]
    names = {name for name, part in block.named_children() if not isinstance(part, nn.Dropout)}
    output = getattr(getattr(block, "self_attn", None), "o_proj", None)
    if not isinstance(output, nn.Module) or not {"self_attn", "mlp"} <= names <= _RESIDUAL_BLOCK:
        return []
    return [output, block.mlp]


@contextmanager
def last_position_only(anatomy: Anatomy) -> Iterator[None]:
    """Inside, the plain model makes its last block's output at the last position alone, as a fan does by itself."""
    hooks = [part.register_forward_pre_hook(last_position) for part in last_block_parts(anatomy)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_position(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][:, -1:].contiguous(), *args[1:])
