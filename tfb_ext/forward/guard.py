"""The guard: before the samples of one call are trusted, they are compared with separate passes on a tiny input.

Samples share a forward by laying out their rows side by side, which is right only where the model keeps rows first, sample-major,
in every input of a random layer, and uses its head's output as it is. That is learnt here, once for each model and first random
block: two calls of the mean adapter tell which arguments of the blocks belong to rows, then three samples in one call are
compared with three passes of one sample each, in which no row needs to be told from another. Two padded rows in one forward;
one row with a key-value cache and a step from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.attached import Attached
from ..adapters.base import base_kind, computes_in_half, kind_of
from ..adapters.samples import SampleBatch
from ..adapters.state import ONE_SAMPLE, RowLayout
from ..errors import GuardError, SamplingError
from .contexts import fanned, laid_out
from .fold import Folding, Predictive
from .rows import Layout, check_packing
from .tiny import ROWS, TOKENS, Outputs, TinyCalls, leading_sizes, undisturbed

SAMPLES = (0, 2, 4)  # no two of them mirror each other
SIGMAS = tuple(0.05 * 4.0**i for i in range(6))
# By whether numbers have 24 bits or more. The samples should differ by this much (root mean square, of log probabilities in
# nats), and a call may differ from separate passes by this share of it; or, up to the largest share, by a few times what rounding
# does. Rows that get another sample's weights differ by about the whole of it.
SPREAD = {True: 0.03, False: 0.5}
SHARE = {True: 2e-3, False: 0.15}
NOISE, LARGEST_SHARE = 8.0, 0.4
# Four times the sigma should move the samples apart by this much more; where it does not, and they are well above rounding, they are as
# far apart as they get.
GROWTH, SATURATED = 1.25, 4.0
FLOOR = -100.0  # a log probability below is none: some models give classes minus infinity
ATTEMPTS = 3  # with other tokens: routing to experts may tip over by rounding

Arguments = dict[int, dict[str, str | int]]  # what a block's arguments count, see Layout


def learn(
    attached: Attached, first: int, batch: SampleBatch, by_fan: bool, example: Mapping[str, Any] | None
) -> tuple[Layout, bool]:
    """The layout of rows, once samples in one call are known to equal separate passes; and whether they are.

    Of a model that gives NaN nothing is known but where its rows lie. ``example``: arguments of a forward to compare on.
    """
    model = attached.anatomy.model
    check_packing(model, {})
    with undisturbed(attached):
        trial = Trial(attached, first, batch, by_fan, example)
        arguments = trial.arguments() if by_fan else {}
        problem = ""
        for attempt in range(ATTEMPTS):
            layers, problem = trial.compare(arguments, attempt)
            if not problem:
                return Layout(layers, arguments), trial.finite
            if not trial.rounds:
                break
    raise GuardError(
        f"{type(model).__name__}, first random block {first}: several samples in one call {problem}, expected what separate passes "
        f"give. Fix: {ONE_SAMPLE}"
    )


class Trial(TinyCalls):
    """The comparison on one model, at one first random block."""

    def __init__(
        self, attached: Attached, first: int, batch: SampleBatch, by_fan: bool, example: Mapping[str, Any] | None
    ) -> None:
        super().__init__(attached.anatomy, batch.mode, example)
        self.attached, self.first, self.template, self.by_fan = attached, first, batch, by_fan
        self.kind = attached.anatomy.kind
        if self.exact:  # one layer of each kind tells
            quantised = {base_kind(m): m for m in attached.modules.values() if kind_of(m) is not None}
            self.exact = not any(computes_in_half(module) for module in quantised.values())
        self.rounds = True  # whether another attempt could end otherwise
        self.finite = True

    # The mean adapter -----------------------------------------------------------------------------------------------

    def arguments(self) -> Arguments:
        """What the leading size of each tensor among a block's arguments counts: of two calls of different sizes."""
        sizes = []
        for more in (0, 1):
            with self._alone(), leading_sizes(self.attached.anatomy.blocks[self.first :]) as found:
                self.model(**self.inputs(ROWS + more, padded=True, tokens=TOKENS + more))
            sizes.append(found)
        learnt: Arguments = {}
        if self.example is not None:  # one size tells less than two
            for (block, path), size in sizes[0].items():
                learnt.setdefault(self.first + block, {})[path] = "rows" if size == self.rows else size
            return learnt
        for (block, path), small in sizes[0].items():
            large = sizes[1].get((block, path), small)
            known = learnt.setdefault(self.first + block, {})
            if small * (ROWS + 1) == large * ROWS:
                known[path] = "rows"
            elif (small, large) == (TOKENS, TOKENS + 1):
                known[path] = "tokens"
            elif small == large:
                known[path] = small
            else:
                raise GuardError(
                    f"{type(self.model).__name__}: a block's argument {path!r} has {small} leading entries for {ROWS} rows of {TOKENS} "
                    f"tokens and {large} for {ROWS + 1} of {TOKENS + 1}, expected some number for each row. Fix: {ONE_SAMPLE}"
                )
        return learnt

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Calls outside any context; what they raise says that the tiny input is to blame."""
        try:
            with torch.no_grad():
                yield
        except (GuardError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise GuardError(
                f"{type(self.model).__name__} does not run on a tiny input ({_first_line(error)}), so its samples cannot be compared with "
                f"separate passes. Fix: {ONE_SAMPLE}; or pass guard=False, if you have compared them yourself"
            ) from error

    # The comparison -------------------------------------------------------------------------------------------------

    def compare(self, arguments: Arguments, attempt: int) -> tuple[dict[str, RowLayout], str]:
        """Each layer's layout of rows, and what is wrong; nothing if that is empty."""
        calls = self.calls(attempt)
        with self._alone():
            self.others = []
            alone = [self.values(out) for call in calls for out in call(1)]
            others, self.others = self.others, []
            beside = [
                self.values(out)[: len(a)] for call in calls for out, a in zip(call(len(SAMPLES)), alone, strict=False)
            ]
        # Rows of a batch are the same whatever is beside them, but for rounding; and outputs are rounded once more.
        noise = max(_rms(alone[0] - beside[0]), self.rounding * _rms(alone[0]) / math.sqrt(12))
        sigma, spread, separate = self._apart(calls, noise)
        self.finite = spread > 0
        if self.finite and LARGEST_SHARE * spread <= noise:
            return {}, "cannot be told apart on a tiny input"
        seen: list[tuple[str, tuple[int, ...]]] = []
        self.others = []
        try:
            together = self._together(calls, arguments, sigma, seen)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.rounds = False
            wrong = self._layouts(seen)[1]
            return {}, wrong or f"fail ({_first_line(error.__cause__ or error)})"
        layers, wrong = self._layouts(seen)
        if wrong:
            self.rounds = False
            return {}, wrong
        for shapes, usual in zip(self.others, others, strict=True) if self.by_fan else ():
            if shapes != usual:
                self.rounds = False
                return {}, f"give outputs of shapes {shapes} where one gives {usual}"
        bound = max(SHARE[self.exact] * spread, min(NOISE * noise, LARGEST_SHARE * spread))
        categorical = self.kind == "categorical"
        for found, expected in zip(together, self._expected(separate), strict=True) if self.finite else ():
            if found.shape != expected.shape:
                return {}, f"give outputs of shape {tuple(found.shape)} for {tuple(expected.shape)}"
            off = _rms((found.clamp(min=FLOOR) if categorical else found) - expected)
            if not off <= bound:
                return (
                    {},
                    f"differ by {off:.2g} on a tiny input, where samples differ by {spread:.2g} and rounding by {noise:.1g}",
                )
        return layers, ""

    def values(self, logits: Tensor) -> Tensor:
        """What the fold averages, in float32 or better."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.kind == "categorical":
            return torch.log_softmax(logits, dim=-1).clamp(min=FLOOR)
        return logits

    def _batch(self, samples: tuple[int, ...], sigma: float) -> SampleBatch:
        scales = (sigma,) * len(samples)
        return replace(self.template, sigma=scales, samples=samples, tokens=0, _tensors={}, _parts={})

    def _apart(self, calls: list[Callable[[int], Outputs]], noise: float) -> tuple[float, float, list[Tensor]]:
        """A sigma at which samples differ enough, by how much, and their separate passes; 0 where none gives finite numbers."""
        found: tuple[float, float, list[Tensor]] = (SIGMAS[0], 0.0, [])
        for sigma in (*SIGMAS, *(SIGMAS[0] / 4.0**i for i in range(1, 6))):
            with self._alone():
                separate = self._separate(calls[:1], sigma)
            spread = _rms(separate[0] - separate[0].mean(0))
            if found[1] >= SATURATED * noise and spread < GROWTH * found[1]:
                break  # it only makes the samples' numbers chaotic, whose rounding no bound holds
            if math.isfinite(spread):
                found = (sigma, spread, separate)
            if found[1] and (spread != found[1] or sigma == SIGMAS[-1]):
                break  # a larger one overflows, or there is none
            if found[1] >= SPREAD[self.exact] and 2 * NOISE * noise <= found[1]:
                break
        sigma, spread, separate = found
        with self._alone():
            separate = separate + self._separate(calls[1:], sigma)
        return sigma, spread, separate

    def _separate(self, calls: list[Callable[[int], Outputs]], sigma: float) -> list[Tensor]:
        """(S, rows, ..., V) of each output: one pass a sample, all rows of which are that sample's."""
        found: list[list[Tensor]] = []
        for k in SAMPLES:
            with laid_out(self.attached, self.first, self._batch((k,), sigma), None):
                found.append([self.values(out) for call in calls for out in call(1)])
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    def _together(
        self, calls: list[Callable[[int], Outputs]], arguments: Arguments, sigma: float, seen: list[Any]
    ) -> list[Tensor]:
        batch, state = self._batch(SAMPLES, sigma), self.attached.state
        context = self._context(batch, arguments)
        called: list[str] = []
        random = [u for u in self.attached.updates if u.block >= self.first]
        hooks = [u.module.register_forward_pre_hook(partial(_note, called, u.name)) for u in random]
        with context:
            state.seen, state.asked = seen, set()
            try:
                outputs = [out for call in calls for out in call(1 if self.by_fan else len(SAMPLES))]
            finally:
                state.seen = None
                for hook in hooks:
                    hook.remove()
        missing = sorted(set(called) - state.asked)
        if missing:
            raise SamplingError(f"layer {missing[0]!r} never asked its posterior; was its forward replaced?")
        return outputs if self.by_fan else [self.values(out).unflatten(0, (len(SAMPLES), -1)) for out in outputs]

    def _context(self, batch: SampleBatch, arguments: Arguments) -> AbstractContextManager[Any]:
        if self.by_fan:
            return fanned(self.attached, self.first, Predictive(batch), Layout({}, arguments))
        return laid_out(self.attached, self.first, batch, None)

    def _expected(self, separate: list[Tensor]) -> list[Tensor]:
        if not self.by_fan:
            return separate
        found = []
        for values in separate:
            folding = Folding(self.kind, keep=False)
            folding.add(values.flatten(0, 1), values.shape[1], len(SAMPLES))
            found.append(folding.result())
        return found

    def _layouts(self, seen: list[tuple[str, tuple[int, ...]]]) -> tuple[dict[str, RowLayout], str]:
        """Of the shapes of the inputs that each layer had, its layout of rows, and the first input that has none."""
        found: dict[str, RowLayout] = {}
        for name, shape in seen:
            leads: dict[int, RowLayout] = {}
            for rows in (1, self.rows):
                leads[rows * len(SAMPLES) * self.tokens] = "tokens"
            for rows in (1, self.rows):
                leads[rows * len(SAMPLES)] = "rows"
            layout = leads.get(shape[0])
            if shape[0] == 0:  # a head whose columns are asked for gets no rows from the model
                continue
            if layout is None:
                expected = f"{self.rows * len(SAMPLES)} rows ({len(SAMPLES)} samples of {self.rows}) first"
                return {}, f"give layer {name!r} an input of shape {shape} where {expected} is needed"
            if layout == "tokens" or name not in found:
                found[name] = layout
        return found, ""


def _note(called: list[str], name: str, module: Any, args: Any) -> None:
    called.append(name)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
