"""What is known of how a model's samples can share a call, learnt where a context first needs it and kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from ..adapters.attached import Attached
from ..adapters.samples import SampleBatch
from ..errors import GuardError
from .contexts import check_free
from .guard import learn
from .rows import Layout
from .side_by_side import SpanLayout
from .span_guard import learn_span

T = TypeVar("T", bound=Layout)


class Guard:
    """What is known of how a model lays out its rows, learnt where a context first needs it.

    Args:
        attached: the adapter's posteriors in the model.
    """

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self._found: dict[Hashable, Any] = {}

    def layout(self, first: int, batch: SampleBatch, enabled: bool, by_fan: bool = True) -> Layout | None:
        """The model's layout of rows at a first random block.

        Args:
            batch: any samples of the posterior, for its seed and mode.
            enabled: compare at all; otherwise a warning says that nothing was compared.
            by_fan: for the fan; otherwise for calls whose rows the caller lays out.

        Raises:
            GuardError: samples in one call differ from separate passes.
        """
        self._check(enabled)
        if not enabled:
            return None
        if not any(u.block >= first for u in self.attached.updates):
            return Layout({}, {})
        key, compared = self._key(first, batch, by_fan, None), True

        def found() -> Layout:
            nonlocal compared
            layout, compared = learn(self.attached, first, batch, by_fan, None)
            return layout

        layout = self._once(key, found)
        if not compared:
            del self._found[key]
        return layout

    def beside(self, first: int, batch: SampleBatch, span: int, enabled: bool) -> SpanLayout:
        """How tokens of samples, the last ``span`` of a row, are laid side by side behind one prompt.

        Raises:
            GuardError: samples side by side differ from separate passes, or the model has no such tokens.
        """
        self._check(enabled)
        if not enabled:
            return learn_span(self.attached, first, batch, span, enabled)
        key = self._key(first, batch, True, min(span, 2))
        return self._once(key, lambda: learn_span(self.attached, first, batch, span, enabled))

    def _check(self, enabled: bool) -> None:
        check_free(self.attached)
        if not enabled:
            warnings.warn(
                f"adapter {self.attached.name!r}: samples in one call were not compared with separate passes on this model (guard=False)",
                stacklevel=6,
            )

    def _once(self, key: Hashable, learnt: Callable[[], T]) -> T:
        """What was learnt under this key, or a new error with the words of the first."""
        if key not in self._found:
            try:
                self._found[key] = learnt()
            except GuardError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, GuardError):
            raise GuardError(str(found))
        return found

    def compare(self, first: int, batch: SampleBatch, enabled: bool, example: Mapping[str, Any]) -> None:
        """The same on these arguments of the model, whose blocks' arguments calls may then bring too."""
        text = self.layout(first, batch, enabled)
        found, _ = learn(self.attached, first, batch, True, example)
        if text is not None:
            blocks = {*found.arguments, *text.arguments}
            arguments = {b: {**found.arguments.get(b, {}), **text.arguments.get(b, {})} for b in blocks}
            self._found[self._key(first, batch, True, None)] = Layout({**found.layers, **text.layers}, arguments)

    def _key(self, first: int, batch: SampleBatch, by_fan: bool, span: int | None) -> Hashable:
        model = self.attached.anatomy.model
        weight = next(model.parameters())
        attention = getattr(model.config, "_attn_implementation", None)
        replaced = tuple(u.name for u in self.attached.updates if "forward" in u.module.__dict__)
        return (first, by_fan, span, batch.mode, weight.dtype, weight.device, attention, replaced)
