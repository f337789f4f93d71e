"""Samples' outputs folded into one: the mean of their probabilities, and what is asked of each sample on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.samples import SampleBatch
from ..adapters.state import ONE_SAMPLE
from ..errors import SamplingError
from .anatomy import Kind
from .rows import at_targets
from .tail import Branches
from .trunk import Trunk

# Head outputs are made and folded in pieces of at most this many bytes, counted in float32: a vocabulary of 128k over 80
# rows of 128 tokens would take 5 GB otherwise. One decoding step always fits into one piece.
FOLD_BYTES = 256 * 2**20


@dataclass
class Predictive:
    """One sampling context as its user sees it.

    Attributes:
        batch: the samples of the context.
        columns: output features to keep (label tokens), or ``None`` for all; then the model returns only these.
        keep_samples: keep the per-sample results of the last forward.
        observe: called with the per-sample results (s, B, ..., V) of the next samples as the fold makes them, for what needs
            all of them once and none of them afterwards.
        targets: outputs (token ids; with ``columns``, places among them) whose log probability every sample is asked for, int64,
            of the shape of the head's output without its last axis: (B, T) for a language model, or (B, T, K) for K of them a
            position. A target belongs to the position that predicts it; negative ones (-100) are not looked up. May be set anew
            before each forward.
        folded: (B, ..., V) result of the last forward: log mean probability, or the kind's own mean.
        sample_outputs: (S, B, ..., V) per-sample log probabilities (or outputs) of the last forward, if kept. Where the model
            pools its logits they are those of the position that it returned.
        target_log_probabilities: (S, *targets.shape) per-sample log probabilities of the targets in the last forward, 0 for
            those that are not looked up, so that a sum over positions is that of a sequence. All that is kept of S * B * T * V.
        key: which batch of the trunk the next forward is; ``None`` keeps no trunk.
        span: of each row so many last tokens are random, counted from the position that an answer is read from; ``None``: all.
        branches: continuations of each row. The model then gives, of each row, (B, C·(1 + K), V): at the row's last token and at the
            tokens of each continuation. Rows end with their last token.
        answers: (B,) with a span, how many of a row's last tokens are an answer's: that position and those after it. 1 without it.
    """

    batch: SampleBatch
    columns: Tensor | None = None
    keep_samples: bool = False
    observe: Callable[[Tensor], None] | None = None
    targets: Tensor | None = None
    trunk: Trunk | None = None
    key: Hashable | None = None
    span: int | None = None
    answers: Tensor | None = None
    branches: Branches | None = None
    folded: Tensor | None = None
    sample_outputs: Tensor | None = None
    target_log_probabilities: Tensor | None = None


class Folding:
    """Running average of per-sample outputs, in float32 or better.

    Args:
        kind: what the outputs mean.
        keep: keep the per-sample results.
        targets: outputs to look up under every sample, see :class:`~tfb_ext.forward.fan.Predictive`.
        observe: called with the results of the next samples.
    """

    def __init__(
        self, kind: Kind, keep: bool, targets: Tensor | None = None, observe: Callable[[Tensor], None] | None = None
    ) -> None:
        self.kind, self.keep, self.targets, self.observe = kind, keep, targets, observe
        self.total: Tensor | None = None
        self.count = 0
        self.samples: list[Tensor] = []
        self.targeted: list[Tensor] = []

    def add(self, logits: Tensor, rows: int, size: int) -> None:
        """Take the logits (samples * rows, ..., V) of the next samples; of no rows all ``size`` samples at once."""
        count = logits.shape[0] // rows if rows else size
        logits = logits.reshape(count, rows, *logits.shape[1:])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        values = log_values(logits, self.kind)
        if self.keep:
            self.samples.append(values)
        if self.observe is not None:
            self.observe(values)
        if self.targets is not None:
            self.targeted.append(at_targets(values, self.targets))
        if self.kind == "multi_label":
            # Probabilities of both answers, so that the logit of a mean near 1 does not overflow.
            values = torch.stack([values, log_values(-logits, self.kind)], dim=1)
        self.count += count
        if self.kind == "regression":
            piece = values.sum(dim=0)
            self.total = piece if self.total is None else self.total + piece
        else:
            piece = torch.logsumexp(values, dim=0)
            self.total = piece if self.total is None else torch.logaddexp(self.total, piece)

    def result(self) -> Tensor:
        """(B, ..., V): log mean probability, the logit of the mean probability of each label, or the mean."""
        assert self.total is not None
        if self.kind == "categorical":
            return self.total - math.log(self.count)
        return self.total[0] - self.total[1] if self.kind == "multi_label" else self.total / self.count


def log_values(logits: Tensor, kind: Kind) -> Tensor:
    """What is averaged of a sample: log probabilities of the classes, of each label, or the outputs themselves."""
    if kind == "categorical":
        return torch.log_softmax(logits, dim=-1)
    return nn.functional.logsigmoid(logits) if kind == "multi_label" else logits


def log_means(logs: Tensor, parts: int) -> Tensor:
    """Log probabilities (S, ...) -> (parts, ...): log of the mean over each of so many equal parts of the first axis."""
    logs = logs.reshape(parts, -1, *logs.shape[1:])
    return torch.logsumexp(logs, dim=1) - math.log(logs.shape[1])


def check_untouched(model: nn.Module, view: Predictive, output: Any) -> None:
    """Refuse a model that computes on its head's output, for it would do so on log mean probabilities.

    It may cut positions out of it, and take one of each row: then the samples' outputs are cut to those.
    """
    given = [v for v in output if isinstance(v, Tensor) and v.dim() > 1] if isinstance(output, tuple) else []
    logits, made = given[0] if given else getattr(output, "logits", None), view.folded
    if made is None or not isinstance(logits, Tensor):
        return
    if logits.untyped_storage().data_ptr() == made.untyped_storage().data_ptr() or not made.numel():
        return
    made = made.to(logits.dtype)  # a copy in another type is no change
    if logits.shape == made.shape:
        if torch.equal(logits.nan_to_num(), made.nan_to_num()):
            return
    elif logits.dim() == 2 and made.dim() == 3 and logits.shape[-1] == made.shape[-1]:
        here = ((made == logits[:, None]) | (made.isnan() & logits[:, None].isnan())).all(-1)
        if bool(here.any(1).all()):
            if view.sample_outputs is not None:
                rows = torch.arange(len(here), device=here.device)
                view.sample_outputs = view.sample_outputs[:, rows, here.int().argmax(1)]
            return
    raise SamplingError(
        f"{type(model).__name__} changes its logits after its head, so averaging probabilities at the head is wrong. Fix: {ONE_SAMPLE}"
    )


def average_states(output: Any, rows: int, size: int) -> Any:
    """Hidden states and attentions that were asked for: B rows again, the average over samples where these differ."""

    def averaged(states: Any) -> Any:
        if size == 1 or not isinstance(states, tuple) or not all(isinstance(v, Tensor) for v in states):
            return states
        return tuple(v.unflatten(0, (size, -1)).mean(0) if v.shape[0] == size * rows else v for v in states)

    if isinstance(output, tuple):
        return tuple(averaged(part) for part in output)
    for name in ("hidden_states", "attentions"):
        if isinstance(getattr(output, name, None), tuple):
            output[name] = averaged(output[name])
    return output
