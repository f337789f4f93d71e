"""What the layers of one Bayesian adapter share while a sampling context is open."""

from __future__ import annotations

import threading
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..errors import SamplingError
from .samples import SampleBatch

# How a layer's input has its rows: S * B of them first, or S * B * T of them, the positions of a row one after the other.
RowLayout = Literal["rows", "tokens"]

# What works on any model whose layers can sample: no row has to be told from another.
ONE_SAMPLE = "one sample a call, `with adapter.sampling([k]): model(**inputs)` for each k, and average the probabilities yourself"


class Turn:
    """Lets one thread's call of a model through at a time; the others wait.

    A call that an exception ended without a word to us is over when its thread begins another, or ends.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._owner: threading.Thread | None = None

    def begin(self) -> None:
        own = threading.current_thread()
        if self._owner is own:
            return
        with self._changed:
            while self._owner is not None and self._owner.is_alive():
                self._changed.wait(1.0)
            self._owner = own

    def end(self) -> None:
        if self._owner is threading.current_thread():
            with self._changed:
                self._owner = None
                self._changed.notify()


@dataclass
class SharedInput:
    """What the first of several layers that share ``x`` has computed for all of them.

    Attributes:
        x: their input, and the version of it that was read.
        outputs: by layer name, what is not taken yet.
    """

    x: Tensor
    version: int
    outputs: dict[str, Tensor]


class Items(NamedTuple):
    """Rows of a layer's input that lie item by item: of each ``lead`` rows of the mean, then ``each`` of every sample in turn."""

    items: int
    lead: int
    each: int

    def rows(self, size: int) -> int:
        """Of one item with so many samples."""
        return self.lead + size * self.each


class SamplingState:
    """The samples of the pass in progress, if any, and where its rows lie.

    Attributes:
        batch: the row groups that the next layers see; ``None`` outside sampling contexts (the mean adapter).
        first: index of the first random block; layers of lower blocks use the mean.
        fanned: whether the rows are already laid out sample by sample at this point of the forward.
        looked: whether the layers have looked at what the call in progress does not change.
        each: rows of one sample in the call in progress; 0 between calls.
        tokens: positions of a row in it.
        items: where rows lie item by item; ``None`` where they lie sample by sample.
        layout: by layer name, how its input's rows lie; ``None`` where that is not known.
        seen: while a list, sampled layers write the shapes of their inputs there and nothing is checked.
        asked: while ``seen`` is a list, the layers that gave their own output.
        missed: random layers that ran before the fan, which the model's hook turns into an error.
        shared: computed for the next layers that get the same input.
        last: the layer that read its input last, that input, and its version.
        recording: by layer, what makes its outputs with derivatives and notes its calls.
        derived: kinds of base layers that are known to have derivatives.
        turn: lets one call at a time through.
        context: the samples that the open context was opened with.
        number: of this posterior, on the caches that it fills; another after each :meth:`renew`.
    """

    def __init__(self) -> None:
        self.batch: SampleBatch | None = None
        self.first = 0
        self.fanned = self.looked = False
        self.each = 0
        self.tokens = 0
        self.items: Items | None = None
        self.layout: Mapping[str, RowLayout] | None = None
        self.seen: list[tuple[str, tuple[int, ...]]] | None = None
        self.asked: set[str] = set()
        self.missed: list[str] = []
        self.shared: SharedInput | None = None
        self.last: tuple[Any, weakref.ref[Tensor], int] | None = None
        self.recording: Mapping[Any, Any] | None = None
        self.derived: set[str] = set()
        self.turn = Turn()
        self.context: SampleBatch | None = None
        self.renew()

    def renew(self) -> None:
        self.number = uuid.uuid4().hex

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy has nothing of a context

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    @contextmanager
    def serving(
        self, batch: SampleBatch, first: int, layout: Mapping[str, RowLayout] | None, fanned: bool = False
    ) -> Iterator[None]:
        """Inside, the layers sample ``batch``."""
        self.context = batch
        self.batch, self.first, self.layout, self.fanned = batch, first, layout, fanned
        try:
            yield
        finally:
            self.context = self.batch = self.layout = self.shared = self.last = self.items = None
            self.fanned, self.looked, self.each = False, False, 0
            self.missed.clear()

    def begin_call(self, context: SampleBatch) -> None:
        """Wait for this thread's turn at a call in the context that was opened with these samples.

        Raises:
            SamplingError: the context ended meanwhile.
        """
        self.turn.begin()
        if self.context is not context:
            self.turn.end()
            raise SamplingError(
                "the sampling context ended while this thread's call waited for another thread's. Fix: join the threads inside the "
                "with block"
            )

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Inside, no other thread's call of the model runs."""
        self.turn.begin()
        try:
            yield
        finally:
            self.turn.end()

    @contextmanager
    def waiting(self) -> Iterator[Callable[[], None]]:
        """Around a context's hooks: no call of another thread runs while they are taken off. Gives what to call before that."""
        try:
            yield self.turn.begin
        finally:
            self.turn.end()

    def check_rows(self, name: str, x: Tensor) -> None:
        """Raise unless the rows of a layer's input are known to lie sample by sample.

        One sample has all rows for itself, however they lie.

        Raises:
            SamplingError: other leading sizes than the layer had when the model was compared with separate passes.
        """
        assert self.batch is not None
        size, lead = len(self.batch.samples), x.shape[0]
        if self.items is not None:
            each = self.items.rows(size)
            if x.shape[:2] == (self.items.items, each) or (x.dim() == 2 and lead == self.items.items * each):
                return
            raise SamplingError(
                f"layer {name!r} got an input of shape {tuple(x.shape)}, expected {self.items.items} rows of {each} tokens "
                f"({self.items.lead} of the prompt, {self.items.each} of each of {size} samples). Fix: span='all'; or {ONE_SAMPLE}"
            )
        if self.seen is not None:
            self.seen.append((name, tuple(x.shape)))
            return
        if size == 1 or lead == 0:
            return
        rows = size * self.each
        known = None if self.layout is None else self.layout.get(name)
        if known is None and self.layout is not None:
            raise SamplingError(
                f"layer {name!r} did not run when the model was compared with separate passes, so it is not known how its rows lie. "
                f"Fix: {ONE_SAMPLE}"
            )
        if lead == rows or (known != "rows" and lead == rows * self.tokens):
            return
        raise SamplingError(
            f"layer {name!r} got an input of shape {tuple(x.shape)}, expected {rows} rows ({size} samples of {self.each}) first, so "
            f"its rows cannot be told apart by sample. Fix: {ONE_SAMPLE}"
        )
