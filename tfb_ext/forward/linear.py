"""The outputs' covariance under the posterior to first order, from gradients of one run of the mean adapter.

With the random weights ``s U (M + sigma E)`` of every layer, to first order in sigma ::

    Cov(z_c, z_d) = sigma^2 K_cd,    K_cd = sum_layers s^2 sum_{t,u} <U^T d_t^c, U^T d_u^d> <x_t, x_u>

over the random positions t, u, where ``x_t`` is a layer's input and ``d_t^c`` the gradient of output c at the layer's output. Noise that
is drawn anew for every token (modes ``"token"`` and ``"flipout"``) leaves the terms ``t = u``.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..adapters.adapter import BayesianAdapter, Place
from ..adapters.layer import SampledUpdate
from ..errors import SamplingError, refusal
from .anatomy import Kind
from .batch import Batch
from .batches import Data, head_outputs, original_order
from .contexts import check_free
from .engine import MANY_CLASSES
from .gradients import by_token, jointly
from .graphs import Graph, capturable, describe, has_hooks
from .memory import Memory, room_for_tokens
from .recording import Call
from .tail_forward import Outputs, Plan, TailForward

# Of more outputs, the largest of each item are random: every one costs a backward pass.
MOST_OUTPUTS = 64
# A batch's shape is captured when it was met so often, which takes about as long as a graph saves then; so many are kept.
MEETINGS, GRAPHS = 3, 4


@dataclass(frozen=True)
class Moments:
    """Of N items, float64 on the CPU.

    Attributes:
        mean: (N, C) the mean adapter's outputs.
        covariance: (N, k, k) of ``classes``, at sigma 1.
        classes: (N, k) int64, or ``None`` for all.
    """

    mean: Tensor
    covariance: Tensor
    classes: Tensor | None


def linearised(
    adapter: BayesianAdapter,
    data: Data,
    kind: Kind,
    batch_size: int | None = None,
    progress: bool = False,
    centred: bool = False,
) -> Moments:
    """The mean and covariance of every item's outputs: logits of its classes or labels, log probabilities of sequences, or values.

    With ``centred`` the covariance may be that of the outputs less their mean, which is all that a softmax sees of them.

    Raises:
        ValueError: empty data, a head of another kind, more than 1024 classes, or choices that are scored by their tokens.
        GuardError: samples at the adapter's depth and span are not what separate passes give.
        SamplingError: inside a sampling context, in training mode, or the adapter is merged, off or not active.
    """
    with ready(adapter, adapter.place):
        linear = Linear(adapter, data, adapter.place, centred, batch_size=batch_size, kind=kind)
        return linear.moments(progress)


@contextmanager
def ready(adapter: BayesianAdapter, place: Place | None) -> Iterator[None]:
    """Inside, graphs may be recorded, whatever the caller's mode; ``None`` for a place that was ready before."""
    check_free(adapter.attached)
    if place is not None:
        adapter.attached.check_ready()
    with torch.inference_mode(False), torch.no_grad():
        adapter.attached.check_call()
        if not adapter.attached.is_on:
            raise SamplingError(
                f"adapter {adapter.name!r} is switched off (disable_adapter), expected it on: nothing is random. Fix: leave the with block"
            )
        if place is not None:
            adapter.check_place(place)
        yield


class Linear(TailForward):
    """Runs a data set's batches with a graph from the first random layer on.

    Args:
        place: what is random; for several, that with most.
        centred: whether of a softmax's outputs the covariance is that of their differences from their mean, of which there is one
            less, so that two classes take one backward pass.
        options: of :class:`~tfb_ext.forward.batches.Batches`.

    Attributes:
        replayed: batches that were a CUDA graph's replay.
    """

    work = 4.0  # a batch is also some passes of few tokens, which the host takes long to launch

    def __init__(
        self, adapter: BayesianAdapter, data: Data, place: Place, centred: bool = False, **options: Any
    ) -> None:
        # A graph keeps what a forward holds for one block at a time.
        options |= {"samples": max(1, len(adapter.anatomy.blocks) - place.first), "span": place.span, "share": False}
        with torch.inference_mode(False):
            super().__init__(adapter, data, **options)
        if self.sequences is not None and self.sequences.score == "token":
            expected = "'sequence': the product of averages over samples has no distribution"
            raise refusal("the data's score", "'token'", expected, "encode(..., score='sequence'), or by='samples'")
        classes = head_outputs(adapter)
        if classes > MANY_CLASSES and any(b.columns is None and b.targets is None for b in self.batches):
            expected = f"at most {MANY_CLASSES}"
            raise refusal("the model's head", f"{classes} outputs", expected, "encode the data with label tokens")
        if self.batches and self.sequences is None and self.classes > MOST_OUTPUTS:
            warnings.warn(
                f"{self.classes} classes: each item's {MOST_OUTPUTS} most probable ones are random, the others stay at the mean",
                stacklevel=5,
            )
        self.memory = Memory(self.device)
        self.by_token = adapter.mode != "weight"
        self.centred = centred and self.kind == "categorical"
        self.replayed = 0
        self._ready: set[Place] = set()
        self._graphs: dict[Hashable, Graph] = {}
        self._met: Counter[Hashable] = Counter()
        self.at(place)

    def moments(self, progress: bool) -> Moments:
        parts: list[tuple[Tensor, ...]] = []
        with tqdm(total=self.size, desc="linearise", unit="item", disable=not progress) as bar:
            for batch in self.batches:
                parts.append(self._whole(batch))
                bar.update(len(batch.items))
        mean, covariance, *classes = (original_order(p, self.batches, dim=0) for p in zip(*parts, strict=True))
        if not len(mean):
            raise refusal("labels", "-100 at every position", "at least one label", "leave the key out, or label some")
        return Moments(mean, covariance, classes[0] if classes else None)

    def of(self, batch: Batch, place: Place) -> Moments:
        """Of one batch's items at any place that is not deeper than the first."""
        with ready(self.adapter, None if place in self._ready else place):
            self._ready.add(place)
            self.at(place)
            mean, covariance, *classes = self._whole(batch)
        return Moments(mean, covariance, classes[0] if classes else None)

    def _whole(self, batch: Batch) -> tuple[Tensor, ...]:
        found = self.memory.whole_or_halves(batch, self._run, _joined)
        if not all(part.isfinite().all() for part in found):
            fix = "load the model in float32 or bfloat16, and look for NaN in its weights"
            raise refusal("the mean adapter's outputs and gradients", "NaN or infinity", "finite numbers", fix)
        return found

    def _run(self, batch: Batch) -> tuple[Tensor, ...]:
        """Mean, covariance and, of many, the classes of a batch's items."""
        if len(batch) % batch.rows_per_item:
            raise torch.OutOfMemoryError(
                f"one item of {batch.rows_per_item} choices does not fit into memory. Fix: free some, or shorten the rows"
            )
        planned = self.memory.once(lambda: self.planned(batch))
        found = self.memory.once(lambda: self._by_graph(*planned))
        return tuple(part.to("cpu", copy=True) for part in found)  # the next replay writes to it

    # Graphs -------------------------------------------------------------------------------------------------------------

    def _by_graph(self, batch: Batch, random: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        """:meth:`_moments` by a CUDA graph, where batches of one shape are met so often that capturing one pays: the host takes longer
        for a few tokens forward and backward than the GPU."""
        tensors = {name: getattr(batch, name) for name in ("inputs", "labels", "targets", "columns")} | {
            "random": random
        }
        kind = describe(tensors) if plan.alone and batch.inputs["input_ids"].numel() <= self._room_of_graphs else None
        if kind is None:
            return self._moments(batch, random, plan)
        kind = (self.place, plan, kind)
        self._met[kind] += 1
        if kind not in self._graphs and (self._met[kind] <= MEETINGS or has_hooks(self._parts)):
            return self._moments(batch, random, plan)
        if kind not in self._graphs:

            def run(own: dict[str, Any]) -> tuple[Tensor, ...]:
                return self._moments(replace(batch, **{n: own[n] for n in own if n != "random"}), own["random"], plan)

            while len(self._graphs) >= GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            try:
                self._graphs[kind] = Graph(run, tensors)
            except RuntimeError as error:  # its memory among others
                self._room_of_graphs = 0
                reason = str(error).strip().splitlines()[0]
                what = f"a batch of {type(self.model).__name__} cannot be captured in a CUDA graph"
                warnings.warn(f"{what} ({reason}); it runs as usual", stacklevel=2)
                return self._moments(batch, random, plan)
        with self.adapter.attached.state.one_call():
            found: tuple[Tensor, ...] = self._graphs[kind].replay(tensors)
        if has_hooks(self._parts):  # looked at while the GPU works: they are to be called
            return self._moments(batch, random, plan)
        self.replayed += 1
        return found

    @cached_property
    def _parts(self) -> list[nn.Module]:
        return list(self.model.modules())

    @cached_property
    def _room_of_graphs(self) -> int:
        """Tokens of a batch that a graph may hold: its memory is kept."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if len({t.device for t in tensors}) != 1 or not capturable(self.device):
            return 0
        return room_for_tokens(self.model, self.device) // GRAPHS

    # Backward -----------------------------------------------------------------------------------------------------------

    def _moments(self, batch: Batch, random: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        """On the model's device, mean, covariance and, of many, the classes of a batch's items."""
        try:
            found = self.outputs(batch, random, plan)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # NotCausalError, or what a model of its own kind makes of attention that it does not know
            if not self.is_causal:
                raise
            self.is_causal = False
            found = self.outputs(batch, random, plan)
        values, each = found.values, plan.rows_per_item
        mean, count = values.detach(), values.shape[1]
        classes: tuple[Tensor, ...] = ()
        differences = self.centred and each == 1 and 1 < count <= MOST_OUTPUTS
        with torch.enable_grad():
            if count > MOST_OUTPUTS:
                classes = (mean.topk(MOST_OUTPUTS, dim=1).indices,)
                values = values.gather(1, classes[0])
            elif differences:
                values = values[:, 1:] - values[:, :1]
        width = values.shape[1] * each
        covariance = torch.zeros(len(values) // each, width, width, dtype=torch.float64, device=mean.device)
        if not values.requires_grad:
            pass
        elif found.rows is None:
            covariance = self._covariance(found, values, None)
        else:
            # One item of every row at a time: rows do not see each other, so a sum over them has the gradient of each.
            same = found.rows[:, None] == found.rows
            place = same.tril(-1).sum(1)
            for turn in range(int(place.max()) + 1 if len(place) else 0):
                chosen = (place == turn).nonzero()[:, 0]
                covariance[chosen] = self._covariance(found, values, chosen)
        if differences:
            spread = (
                nn.functional.pad(torch.eye(width, dtype=torch.float64, device=mean.device), (0, 0, 1, 0)) - 1 / count
            )
            covariance = spread @ covariance @ spread.mT
        return mean.double().view(-1, count * each), covariance, *classes

    def _covariance(self, found: Outputs, values: Tensor, chosen: Tensor | None) -> Tensor:
        """(I, C, C) of the items ``chosen``, no two of a row; of all, the outputs of one item may be those of several rows."""
        calls, each = found.recording.calls, found.plan.rows_per_item

        def of_items(call: Call, value: Tensor) -> Tensor:
            value = self._by_row(call, value, found)
            return value if chosen is None or found.rows is None else value[found.rows[chosen].to(value.device)]

        gradients: list[list[Tensor]] = [[] for _ in calls]
        for column in range(values.shape[1]):
            with torch.enable_grad():
                total = (values if chosen is None else values[chosen])[:, column].sum()
            for call, kept, part in zip(calls, gradients, found.recording.gradients(total), strict=True):
                kept.append(of_items(call, part))
        layers: dict[SampledUpdate, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        inputs: dict[int, Tensor] = {}  # of layers that share theirs
        for call, kept in zip(calls, gradients, strict=True):
            if id(call.x) not in inputs:
                inputs[id(call.x)] = of_items(call, call.x).unflatten(0, (-1, each))
            g = kept[0][:, None] if len(kept) == 1 else torch.stack(kept, 1)
            layers[call.update].append((inputs[id(call.x)], g.unflatten(0, (-1, each))))
        joined = []
        for update, those in layers.items():
            x, g = (
                part[0] if len(part) == 1 else torch.cat(part, 2 + n) for n, part in enumerate(zip(*those, strict=True))
            )
            joined.append((x, g, update.module.scaling[self.adapter.name]))
        return (by_token if self.by_token else jointly)(joined).to(values.device)

    def _by_row(self, call: Call, value: Tensor, found: Outputs) -> Tensor:
        """(B, K, ...) of a layer's input or output, 0 where nothing is random; pooled rows are one position each.

        Raises:
            SamplingError: it has no such rows.
        """
        name, (rows, tokens) = call.update.name, found.random.shape
        if value.dim() == 2 and value.shape[0] == rows:
            return value[:, None]
        if value.dim() == 2 and value.shape[0] == rows * tokens:
            value = value.unflatten(0, (rows, tokens))
        kept = value.shape[1] if value.dim() == 3 and value.shape[0] == rows else 0
        # A head may be given the last positions alone.
        if kept == tokens or (0 < kept < tokens and name == self.adapter.anatomy.head_name):
            return (
                value
                if found.plan.everything
                else value.masked_fill(~found.random[:, -kept:, None].to(value.device), 0)
            )
        raise SamplingError(
            f"layer {name!r} has an input or output of shape {tuple(value.shape)}, expected {rows} rows of {tokens} tokens first. Fix: "
            "by='samples', or train the adapter without it in target_modules"
        )


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(map(torch.cat, zip(*parts, strict=True)))
