"""The sampling contexts of a Bayesian adapter, as its user opens them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import GuardError, SamplingError
from ..forward import contexts
from ..forward.fold import Predictive
from .depth import Place, Span
from .samples import SampleBatch

if TYPE_CHECKING:
    from ..forward.layouts import Guard
    from .attached import Attached


class SamplingContexts(ABC):
    """What :class:`~tfb_ext.adapters.adapter.BayesianAdapter` samples with.

    Attributes:
        open_context: first random block and view of the open context, if any.
    """

    attached: Attached
    guard: bool
    first: int
    mode: str
    span: int | str
    open_context: tuple[int, Predictive] | None
    _guard: Guard

    @abstractmethod
    def batch(self, samples: int | Sequence[int], sigma: float | Sequence[float] | None = None) -> SampleBatch: ...

    @abstractmethod
    def span_tokens(self, span: Span) -> int | None: ...

    @contextmanager
    def predictive(
        self,
        samples: int | Sequence[int] = 10,
        sigma: float | None = None,
        *,
        span: Span | None = None,
        keep_samples: bool = False,
        columns: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Iterator[Predictive]:
        """Inside, the model *is* its posterior predictive: B rows in, B rows of ``log mean_k softmax`` (float32) out.

        Args:
            samples: how many samples, or their numbers.
            sigma: posterior scale instead of the adapter's own.
            span: random tokens instead of the adapter's own.
            keep_samples: keep each forward's per-sample log probabilities in ``.sample_outputs`` (S, B, ..., V).
            columns: output features to compute (int64 (C,)), normalised among themselves; the model's logits then have
                C columns. For classification over label tokens.
            targets: token ids (B, T) or (B, T, K) whose log probability under each sample to keep in
                ``.target_log_probabilities``; also to be set on what the context gives, before each call. See
                :class:`~tfb_ext.forward.fold.Predictive`.

        Regression heads give the mean of the outputs, multi-label heads the logit of the mean probability. Where a call asks for
        the last position alone (``logits_to_keep=1``, as ``generate`` does), the last block's attention output and MLP run
        there alone; asked for hidden states or attentions, everywhere.

        Raises:
            ValueError: no sigma, or a bad one; no samples.
            SamplingError: at the model call: gradients are on, the model is in training mode, the adapter is not the active
                one or is merged, rows are packed, targets do not fit.
        """
        batch = self.batch(samples, sigma)
        tokens = self.span_tokens(self.span if span is None else span)
        made = Predictive(batch, keep_samples=keep_samples, columns=columns, targets=targets, span=tokens)
        with self.fanned(made) as view:
            yield view

    @contextmanager
    def fanned(self, view: Predictive) -> Iterator[Predictive]:
        """The context behind :meth:`predictive`, for callers with a view of their own."""
        self.attached.check_ready()
        with self.fanned_at(self.first, view):
            yield view
        # Its weights may not change meanwhile: what the context does not draw would follow them.
        self.attached.check(converted=True)

    @contextmanager
    def fanned_at(self, first: int, view: Predictive) -> Iterator[Predictive]:
        """The same at any first random block, for callers that checked the weights; that of the head is the last."""
        layout = beside = None
        if view.span is None:
            layout = self._guard.layout(first, view.batch, self.guard)
        if view.span is not None or view.branches is not None:
            # Choices are behind whole prompts; how these are laid out does not depend on the depth.
            lowest = self.first if view.span is None else first
            beside = self._guard.beside(lowest, view.batch, view.span or 1, self.guard)
        with contexts.fanned(self.attached, first, view, layout, beside):
            self.open_context = (first, view)
            try:
                yield view
            finally:
                self.open_context = None

    def check_place(self, place: Place) -> None:
        """Refuse a place at which samples in one call are not what separate passes give.

        Raises:
            GuardError: the message names the difference.
        """
        batch = self.batch([0], 1.0)
        if place.span is None:
            self._guard.layout(place.first, batch, self.guard)
        else:
            self._guard.beside(place.first, batch, place.span, self.guard)

    def shares_prompts(self) -> bool:
        """Whether one call can hold a prompt once and several continuations of it, as far as the guard knows."""
        if not self.guard or self.mode != "weight":
            return False
        try:
            return self._guard.beside(self.first, self.batch([0], 1.0), 1, True).route == "split"
        except GuardError:
            return False

    @contextmanager
    def sampling(self, samples: int | Sequence[int] = 10, sigma: float | None = None) -> Iterator[SampleBatch]:
        """Inside, the caller lays out S * B rows, sample-major (row ``s * B + b``), and gets S * B rows of raw outputs.

        In mode ``"token"`` every call draws the noise of its first tokens, also a step from a cache.
        """
        batch = self.batch(samples, sigma)
        if self.span != "all":
            raise SamplingError(
                f"span is {self.span!r}, and sampling() gives rows that are random as a whole, expected span 'all'. Fix: "
                "adapter.predictive(..., keep_samples=True), or set adapter.span = 'all'"
            )
        self.attached.check_ready()
        # One sample has all rows for itself, however they lie.
        layout = self._guard.layout(self.first, batch, self.guard, by_fan=False) if len(batch) > 1 else None
        with contexts.laid_out(self.attached, self.first, batch, layout):
            yield batch
        self.attached.check(converted=True)

    def compare(self, **inputs: Any) -> None:
        """Compare three samples in one call with separate passes on these arguments of the model, at the present depth.

        What the first context does on a tiny text. Later calls may then bring what only such calls bring to the blocks.

        Raises:
            GuardError: they differ.
        """
        self.attached.check()
        self._guard.compare(self.first, self.batch([0], 1.0), self.guard, inputs)
