"""Several processes with one search: anchors are split among them, and every one of them sees all results.

Whoever started the processes (torchrun, accelerate) has made the default group of ``torch.distributed``. Results are gathered
item by item, not as sums: every rank judges the same numbers in the same order as one process would.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import SamplingError

# A rank that has died is noticed at once, by its closed connection; one that hangs, after this. A batch takes far less.
TIMEOUT = timedelta(minutes=10)


class Ranks:
    """The processes of the search; one alone where ``torch.distributed`` has not been started.

    Its methods raise a ``SamplingError`` where another rank has died or hangs.
    """

    def __init__(self) -> None:
        started = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if started else 1
        self.rank = dist.get_rank() if started else 0
        # Over gloo, whatever the default group is: results are small and on the CPU, and gloo notices a closed connection.
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if self.size > 1 else None

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def gather(self, values: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in their order: same type and same shape but for the first axis."""
        if self.size == 1:
            return [values]
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._watched():
            dist.all_gather(counts, torch.tensor([len(values)]), group=self._group)
            room = values.new_zeros(max(map(int, counts)), *values.shape[1:])
            room[: len(values)] = values
            rooms = [torch.empty_like(room) for _ in range(self.size)]
            dist.all_gather(rooms, room, group=self._group)
        return [r[: int(c)] for r, c in zip(rooms, counts, strict=True)]

    def every(self, values: Sequence[float]) -> list[list[float]]:
        """A few numbers of each rank."""
        return [part[0].tolist() for part in self.gather(torch.tensor([list(values)], dtype=torch.float64))]

    def from_first(self, value: Any) -> Any:
        """The first rank's ``value``, everywhere."""
        box = [value]
        if self.size > 1:
            with self._watched():
                dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise SamplingError(
                f"rank {self.rank} of {self.size} lost another rank during the search for sigma ({str(error).splitlines()[0]}): a "
                "process died or hangs; its own error says why. Start all of them again, with checkpoint= to go on from what is "
                "done"
            ) from error
