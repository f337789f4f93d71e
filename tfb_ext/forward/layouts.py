"""What is known of how a model's samples can share a call, learnt where a context first needs it and kept."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import Any

from ..adapters.attached import Attached
from ..adapters.samples import SampleBatch
from ..errors import GuardError
from .contexts import check_free
from .guard import learn
from .rows import Layout
from .span_guard import learn_span


class Guard:
    """What is known of how a model lays out its rows, learnt where a context first needs it.

    Args:
        attached: the adapter's posteriors in the model.
    """

    def __init__(self, attached: Attached) -> None:
        self.attached = attached
        self._found: dict[Hashable, Layout | GuardError] = {}

    def layout(
        self, first: int, batch: SampleBatch, enabled: bool, by_fan: bool = True, span: int | None = None
    ) -> Layout | None:
        """The model's layout of rows at a first random block.

        Args:
            batch: any samples of the posterior, for its seed and mode.
            enabled: compare at all; otherwise a warning says that nothing was compared.
            by_fan: for the fan; otherwise for calls whose rows the caller lays out.
            span: how many last tokens of a row are random; ``None``: all.

        Raises:
            GuardError: samples in one call differ from separate passes.
        """
        check_free(self.attached)
        if not enabled:
            warnings.warn(
                f"adapter {self.attached.name!r}: samples in one call were not compared with separate passes on this model (guard=False)",
                stacklevel=5,
            )
            return None if span is None else learn_span(self.attached, first, batch, span, enabled)
        if span is None and not any(u.block >= first for u in self.attached.updates):
            return Layout({}, {})
        key = self._key(first, batch, by_fan, None if span is None else min(span, 2))
        if key not in self._found:
            try:
                if span is not None:
                    self._found[key] = learn_span(self.attached, first, batch, span, enabled)
                else:
                    layout, compared = learn(self.attached, first, batch, by_fan, None)
                    if not compared:
                        return layout
                    self._found[key] = layout
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
