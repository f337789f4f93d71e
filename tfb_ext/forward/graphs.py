"""Calls as CUDA graphs: captured once, and one launch from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Graph:
    """A captured call: the tensors it reads, and those it writes.

    Args:
        run: called once with a copy of ``inputs``; it may not wait for the device.
        inputs: tensors, and dicts of them, which a replay copies in; anything else is as it was at the capture.
        pool: memory of other graphs, whose results are not needed any more when this one runs.
    """

    def __init__(self, run: Callable[[Any], Any], inputs: Any, pool: Any = None) -> None:
        self.inputs = _clone(inputs)
        self._graph = torch.cuda.CUDAGraph()
        _clear_workspaces()
        try:
            with torch.cuda.graph(self._graph, pool=pool):
                self.output = run(self.inputs)
        finally:
            _clear_workspaces()

    def replay(self, inputs: Any) -> Any:
        """What the call gives for these inputs; the next replay overwrites it."""
        for own, new in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            own.copy_(new)
        self._graph.replay()
        return self.output


def capturable(device: torch.device) -> bool:
    """Whether this device has graphs."""
    return device.type == "cuda"


def has_hooks(parts: Iterable[nn.Module]) -> bool:
    """Whether any of these modules has forward hooks, which a replay would not call."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def describe(value: Any) -> Hashable | None:
    """What a graph has written into it of its inputs; ``None`` where it has more than can be said."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, value.device)
    if isinstance(value, dict):
        parts = [(name, describe(v)) for name, v in value.items()]
        return None if any(part is None for _, part in parts) else tuple(parts)
    return ("value", value) if value is None or isinstance(value, bool | int | float | str) else None


def _clear_workspaces() -> None:
    """Let cuBLAS drop its workspaces, so that it takes one out of a graph's own memory while that is captured.

    One that was there before could be freed while the graph still writes to it: torch.compile does so before it captures.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


def _clone(value: Any) -> Any:
    """The same with tensors of its own; a cache stays the one it is."""
    if isinstance(value, Tensor):
        return value.clone()
    return {name: _clone(v) for name, v in value.items()} if isinstance(value, dict) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
