"""Tiny inputs for a model whose row layout is learnt, and the model as it was before them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.attached import Attached
from ..adapters.base import round_no_inputs
from ..adapters.state import ONE_SAMPLE
from ..errors import GuardError, SamplingError
from .anatomy import Anatomy
from .caches import cache_argument
from .rows import batch_shape

ROWS, TOKENS = 2, 5  # with three samples, rows, rows * samples and rows * samples * tokens all differ

Outputs = list[Tensor]  # of each call, (rows, ..., V)


class TinyCalls:
    """Calls of a model on tiny inputs, or on an example, and what they show of it.

    Attributes:
        rows, tokens: of the first call.
        exact: whether weights and outputs have 24 bits or more.
        rounding: of the outputs.
        others: shapes of what the calls gave beside logits.
    """

    def __init__(self, anatomy: Anatomy, mode: str, example: Mapping[str, Any] | None) -> None:
        model = anatomy.model
        self.model, self.device, self.mode, self.example = model, anatomy.device, mode, example
        self.rows, self.tokens = (ROWS, TOKENS) if example is None else batch_shape((), dict(example))
        self.accepts = set(inspect.signature(model.forward).parameters)
        weights = [p for p in model.parameters() if p.is_floating_point()]
        self.exact = weights[0].dtype in (torch.float32, torch.float64)
        self.rounding = 0.0
        self.others: list[dict[str, tuple[int, ...]]] = []

    def inputs(self, rows: int, padded: bool, attempt: int = 0, tokens: int = TOKENS) -> dict[str, Any]:
        if self.example is None:
            return tiny_inputs(self.model, self.accepts, self.device, rows, padded, attempt, tokens)
        return {**self.example, "use_cache": False} if "use_cache" in self.accepts else dict(self.example)

    def calls(self, attempt: int) -> list[Callable[[int], Outputs]]:
        """Forwards on one row after the other, each as a function of how often its rows are repeated."""
        generates = self.model.can_generate() and self.model.main_input_name == "input_ids"
        steps = generates and "use_cache" in self.accepts and self.mode == "weight"

        def forward(times: int) -> Outputs:
            return [self._logits(self.model(**repeated(self.inputs(self.rows, True, attempt), times)))]

        def one_row(times: int) -> Outputs:
            given = repeated(self.inputs(1, False, attempt), times)
            if generates and "logits_to_keep" in self.accepts:
                given["logits_to_keep"] = 1
            if not steps:
                return [self._logits(self.model(**given))]
            output = self.model(**{**given, "use_cache": True})
            name = cache_argument(self.model)
            cache = getattr(output, name, None)
            found = [self._logits(output)]
            if cache is not None:
                mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
                following = {
                    "input_ids": given["input_ids"][:, :1],
                    "attention_mask": mask,
                    name: cache,
                    "use_cache": True,
                }
                found.append(self._logits(self.model(**following)))
            return found

        return [forward] if self.example is not None else [forward, one_row]

    def _logits(self, output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise SamplingError("return no logits, which averages are made of")
        self.others.append(
            {n: tuple(v.shape) for n, v in output.items() if isinstance(v, Tensor) and n not in ("logits", "loss")}
        )
        self.exact = self.exact and logits.dtype in (torch.float32, torch.float64)
        self.rounding = torch.finfo(logits.dtype).eps
        return logits.detach()


def tiny_inputs(
    model: Any, accepts: set[str], device: torch.device, rows: int, padded: bool, attempt: int = 0, tokens: int = TOKENS
) -> dict[str, Any]:
    """Arguments of a forward; the last row is padded on the right."""
    generator = torch.Generator().manual_seed(attempt)
    if model.main_input_name != "input_ids":
        return {model.main_input_name: _other_input(model, rows, generator).to(device)}
    ids = _ordinary_tokens(model)
    chosen = ids[torch.randint(len(ids), (rows, tokens), generator=generator)]
    mask = torch.ones_like(chosen)
    if padded:
        mask[-1, -1] = 0
    given: dict[str, Any] = {"input_ids": chosen, "attention_mask": mask}
    if padded and "position_ids" in accepts:
        given["position_ids"] = torch.arange(tokens).expand(rows, tokens).contiguous()
    open_ended = "kwargs" in accepts or "input_ids" not in accepts
    given = {name: value.to(device) for name, value in given.items() if open_ended or name in accepts}
    given |= {} if getattr(model.config, "return_dict", True) else {"return_dict": True}
    return given | ({"use_cache": False} if "use_cache" in accepts else {})


def _other_input(model: Any, rows: int, generator: torch.Generator) -> Tensor:
    config, dtype = model.config, next(model.parameters()).dtype
    size = getattr(config, "image_size", None)
    if model.main_input_name == "input_values":  # a fifth of a second of sound
        return torch.randn(rows, 3200, generator=generator).to(dtype)
    if model.main_input_name != "pixel_values" or not isinstance(size, int):
        raise GuardError(
            f"{type(model).__name__} takes {model.main_input_name}, expected input_ids, input_values or pixel_values of "
            f"one size. Fix: {ONE_SAMPLE}; or pass guard=False, if you have compared its samples with separate passes"
        )
    return torch.randn(rows, config.num_channels, size, size, generator=generator).to(dtype)


def _ordinary_tokens(model: Any) -> Tensor:
    """Token ids that no entry of the configuration gives a meaning of its own."""
    config = model.config.get_text_config()
    size = int(getattr(config, "vocab_size", 0) or 2)  # a model of characters has no vocabulary
    special: set[int] = set()
    for settings in (model.config, config):
        for name, value in vars(settings).items():
            if name.endswith(("token_id", "token_index", "token_ids")):
                special |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    ids = [i for i in range(min(size, 4096)) if i not in special]
    return torch.tensor(ids or list(range(size)))


@contextmanager
def undisturbed(attached: Attached) -> Iterator[None]:
    """Inside, calls of the model would sample, whatever mode it is in and whichever adapter is active; they leave nothing on it."""
    model = attached.anatomy.model
    with _unchanged(model), _plain_text(model), torch.inference_mode(False), torch.no_grad():
        for part in model.modules():
            part.training = False
        round_no_inputs(model)
        for module in attached.modules.values():
            module._active_adapter, module._disable_adapters = [attached.name], False
        attached.check_switches()
        yield


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, calls leave nothing on the model: attributes, buffers and submodules are afterwards what they were.

    Some models keep what a call decided: BigBird turns its sparse attention off for good at the first short input.
    """
    before = [(m, dict(vars(m)), dict(m._modules), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, modules, buffers in before:
            for now, then in ((module._modules, modules), (module._buffers, buffers), (vars(module), attributes)):
                now.clear()
                now.update(then)  # type: ignore[arg-type]


@contextmanager
def _plain_text(model: Any) -> Iterator[None]:
    """Inside, the model takes rows of text whatever it did before.

    One without a padding token has one that no text holds, since classifiers want one for several rows. What a vision-language
    model remembers of its last images (Qwen2-VL and its kin, for the positions of the steps after them) is put away.
    """
    with_images = [m for m in model.modules() if vars(m).get("rope_deltas") is not None]
    for module in with_images:  # put back with all that modules hold
        module.rope_deltas = None
    settings = [vars(c) for c in {id(c): c for c in (model.config, model.config.get_text_config())}.values()]
    without = [s for s in settings if s.get("pad_token_id", 0) is None]
    try:
        for s in without:
            s["pad_token_id"] = -1
        yield
    finally:
        for s in without:
            s["pad_token_id"] = None


def repeated(inputs: dict[str, Any], times: int) -> dict[str, Any]:
    return {n: v.repeat(times, *[1] * (v.dim() - 1)) if isinstance(v, Tensor) else v for n, v in inputs.items()}


@contextmanager
def leading_sizes(blocks: Any) -> Iterator[dict[tuple[int, str], int]]:
    """Collects the leading size of every tensor among each block's arguments, by path; hidden states left out."""
    found: dict[tuple[int, str], int] = {}

    def note(value: Any, index: int, path: str) -> None:
        if isinstance(value, Tensor) and value.dim() > 0:
            found[index, path] = value.shape[0]
        elif isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            for i, part in enumerate(value):
                note(part, index, f"{path}.{i}")
        elif type(value) is dict:
            for name, part in value.items():
                note(part, index, f"{path}.{name}")

    def hook(index: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for i, value in enumerate(args[1:], 1):
            note(value, index, str(i))
        for name, value in kwargs.items():
            if name != "hidden_states":
                note(value, index, name)

    hooks = [b.register_forward_pre_hook(partial(hook, i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        yield found
    finally:
        for h in hooks:
            h.remove()
