"""One LoRA layer as a sampled layer: the object in PEFT's per-adapter slot and the state all layers of an adapter share.

Inside a sampling context a layer takes one of two ways. The *slot* is PEFT's own door (``layer.lora_variant[adapter]``): the
layer runs its base, then calls us to add the update. The *direct* way replaces the layer's forward for the length of the
context, where its base is a plain float ``nn.Linear`` that nobody hooks: the update is written first and the base product
accumulates onto it, layers that share their input share one pass over it, and blocks below the first random one take it too,
as the mean. Every call decides anew; whatever does not fit goes to PEFT's forward and through the slot.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import LoraVariant
from torch import Tensor, nn

from .. import ops
from ..checks import check_seed
from ..errors import SamplingError, UnsupportedModelError
from ..posterior.canonical import LayerPosterior

# How a layer's input has its rows: S * B of them first, or S * B * T of them, the positions of a row one after the other.
RowLayout = Literal["rows", "tokens"]

# What works on any model whose layers can sample: no row has to be told from another.
ONE_SAMPLE = "one sample a call, `with adapter.sampling([k]): model(**inputs)` for each k, and average the probabilities yourself"

# Exact classes whose forward is known to call the slot. A subclass may override forward, so isinstance is not enough.
SUPPORTED_CLASSES: tuple[type[LoraLayer], ...] = (LoraLinear,)


# PEFT's layers are nn.Modules whose attributes carry no types, so functions here take them as Any.


def as_int64(seed: int) -> int:
    """A 64-bit unsigned seed as the signed integer that holds the same bits."""
    seed = check_seed(seed)
    return seed - 2**64 if seed >= 2**63 else seed


@dataclass(frozen=True)
class SampleBatch:
    """Which samples one forward pass holds, in the order of its row groups.

    Attributes:
        sigma: posterior scale of each group (S,).
        samples: sample number of each group (S,).
        seed: 64-bit seed of the noise.
        antithetic: sample ``2k + 1`` is minus the noise of sample ``2k``.
        mode, family: of the noise, see :class:`~tfb_ext.adapters.adapter.BayesianAdapter`.
        tokens: how many the key-value cache holds that the pass goes on from, for mode ``"token"``; a tensor on a device is
            read by the device alone.
    """

    sigma: tuple[float, ...]
    samples: tuple[int, ...]
    seed: int
    antithetic: bool
    mode: str = "weight"
    family: str = "low-rank"
    tokens: int | Tensor = field(default=0, compare=False)
    _tensors: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    _parts: dict[tuple[int, int], SampleBatch] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.samples)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``sigma`` (S,) float32, ``samples`` (S,) int32 and ``seed`` (1,) int64 on ``device``; made once a device."""
        if device not in self._tensors:
            seed = torch.tensor([as_int64(self.seed)], dtype=torch.int64, device=device)
            self._tensors[device] = (
                torch.tensor(self.sigma, dtype=torch.float32, device=device),
                torch.tensor(self.samples, dtype=torch.int32, device=device),
                _seed_after(seed, self.tokens),
            )
        return self._tensors[device]

    @property
    def few_rows(self) -> int:
        """Rows up to which one launch does a whole group of layers: 16 of each sample, 128 together (``csrc/cuda/decode.cu``)."""
        return min(128, 16 * len(self.samples))

    def part(self, start: int, stop: int) -> SampleBatch:
        """The row groups ``start:stop`` alone; they are the same samples, on the same memory."""
        key = (start, stop)
        if key not in self._parts:
            part = replace(self, sigma=self.sigma[start:stop], samples=self.samples[start:stop], _tensors={}, _parts={})
            for device, (sigma, samples, seed) in self._tensors.items():
                part._tensors[device] = (sigma[start:stop], samples[start:stop], seed)
            self._parts[key] = part
        return self._parts[key]

    def after(self, tokens: int | Tensor) -> SampleBatch:
        """The same groups with the noise of a call that goes on after so many tokens: fresh for mode ``"token"``.

        Tokens are numbered within a call, so a step of generation would repeat the noise of the first tokens; its seed is
        ``seed + tokens * 0x9E3779B97F4A7C15`` (mod 2**64) instead.
        """
        if isinstance(tokens, int) and not tokens:
            return self
        if isinstance(tokens, Tensor):
            tokens = tokens.clone()  # a static cache counts on in place
        later = replace(self, tokens=tokens, _tensors={}, _parts={})
        for device, (sigma, samples, seed) in self._tensors.items():
            later._tensors[device] = (sigma, samples, _seed_after(seed, tokens))
        return later

    def twin(self) -> SampleBatch:
        """The same groups on memory of their own, which :meth:`load` may write to."""
        return replace(self, _tensors={}, _parts={})

    def load(self, other: SampleBatch) -> None:
        """Overwrite what devices read of this batch with another's: the same number of groups, mode and family."""
        for device, own in self._tensors.items():
            for value, new in zip(own, other.tensors(device), strict=True):
                value.copy_(new)


def _seed_after(seed: Tensor, tokens: int | Tensor) -> Tensor:
    """int64 arithmetic wraps, as that of 64-bit seeds does."""
    if isinstance(tokens, int):
        return seed + as_int64(tokens * _STEP % 2**64) if tokens else seed
    return seed + tokens.to(seed.device) * as_int64(_STEP)


# Odd, so that no two of 2**64 lengths share a seed.
_STEP = 0x9E3779B97F4A7C15

# One group of rows that draws nothing: the mean, for the blocks below the first random one.
MEAN = SampleBatch((0.0,), (0,), 0, False)


@dataclass
class SharedInput:
    """What the first of several layers that share ``x`` has computed for all of them.

    Attributes:
        x: their input, and the version of it that was read.
        rows: ``x`` as a matrix.
        parts: by layer name, what its forward still needs: ``z``, or with ``written`` the update itself.
    """

    x: Tensor
    version: int
    rows: Tensor
    parts: dict[str, Tensor]
    written: bool


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


class SamplingState:
    """What the layers of one Bayesian adapter share: the samples of the pass in progress, if any.

    Attributes:
        batch: the row groups that the next layers see; ``None`` outside sampling contexts (the mean adapter).
        first: index of the first random block; layers of lower blocks use the mean.
        fanned: whether the rows are already laid out sample by sample at this point of the forward.
        each: rows of one sample in the call in progress; 0 between calls.
        tokens: positions of a row in it.
        layout: by layer name, how its input's rows lie, see :class:`RowLayout`; ``None`` where that is not known.
        seen: while a list, sampled layers write the shapes of their inputs there and nothing is checked.
        missed: random layers that ran before the fan, which the model's hook turns into an error.
        probed: while a list, sampled layers write their names there (the check that PEFT really calls the slot).
        shared: computed for the next layers that get the same input.
        turn: lets one call at a time through.
        context: the samples that the open context was opened with.
        number: of this posterior, on the caches that it fills; another after each :meth:`renew`.
        owner: the Bayesian adapter.
    """

    def __init__(self) -> None:
        self.batch: SampleBatch | None = None
        self.first = 0
        self.fanned = False
        self.each = 0
        self.tokens = 0
        self.layout: Mapping[str, RowLayout] | None = None
        self.seen: list[tuple[str, tuple[int, ...]]] | None = None
        self.missed: list[str] = []
        self.probed: list[str] | None = None
        self.shared: SharedInput | None = None
        self.turn = Turn()
        self.context: SampleBatch | None = None
        self.renew()
        self.owner: Callable[[], Any] = lambda: None

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
            self.context = self.batch = self.layout = self.shared = None
            self.fanned, self.each = False, 0
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
    def waiting(self) -> Iterator[Callable[[], None]]:
        """Around a context's hooks: no call of another thread runs while they are taken off. Gives what to call before that."""
        try:
            yield self.turn.begin
        finally:
            self.turn.end()

    def renew(self) -> None:
        self.number = uuid.uuid4().hex

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: nothing of a context. Inside one there is no copy, which would go on sampling by itself."""
        if self.batch is not None:
            raise SamplingError(
                "the model is copied or pickled inside a sampling context, whose hooks would stay on the copy. Fix: leave the with "
                "block first"
            )
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def check_rows(self, name: str, x: Tensor) -> None:
        """Raise unless the rows of a layer's input are known to lie sample by sample.

        One sample has all rows for itself, however they lie.

        Raises:
            SamplingError: other leading sizes than the layer had when the model was compared with separate passes.
        """
        assert self.batch is not None
        size = len(self.batch.samples)
        if self.seen is not None:
            self.seen.append((name, tuple(x.shape)))
            return
        lead = x.shape[0]
        rows = size * self.each
        if size == 1 or lead == 0:
            return
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


class TFBVariant(LoraVariant):
    """Sits in ``layer.lora_variant[adapter]``: the plain adapter outside sampling, ``U (M + sigma E_k) x`` inside it."""

    def __init__(self, state: SamplingState, posterior: LayerPosterior, adapter: str, block: int) -> None:
        self.state = state
        self.adapter = adapter
        self.basis_buffer = f"tfb_basis_{adapter}"
        self.mean_buffer = f"tfb_mean_{adapter}"
        self.name = posterior.name
        self.layer = posterior.layer
        self.rank = posterior.rank
        self.full_rank = posterior.family == "full-rank"
        self.block = block
        self.group: tuple[tuple[TFBVariant, Any], ...] = ()

    def attach(self, module: Any, posterior: LayerPosterior) -> None:
        """Put the posterior beside the adapter's weights (buffers that no checkpoint holds) and take the slot."""
        device = module.lora_A[self.adapter].weight.device
        # The products round the basis to the base's type, so it is kept in that. M + sigma E is rounded once, as a sum.
        dtype = base_dtype(module)
        half = dtype in (torch.bfloat16, torch.float16)
        self.base_dtype = dtype
        # A name with dots would be refused by register_buffer; PEFT refuses such adapter names itself.
        module.register_buffer(
            self.basis_buffer, posterior.basis.to(device, dtype if half else torch.float32), persistent=False
        )
        module.register_buffer(self.mean_buffer, posterior.mean.to(device), persistent=False)
        module.lora_variant[self.adapter] = self

    def restore_types(self, module: Any, posterior: LayerPosterior) -> None:
        """Make the buffers anew where the model was converted (``model.to(dtype)``), which rounded them or left the base another type."""
        mean = module._buffers[self.mean_buffer]
        if not mean.is_meta and (mean.dtype != torch.float32 or base_dtype(module) != self.base_dtype):
            self.attach(module, posterior)

    def detach(self, module: Any) -> None:
        if module.lora_variant.get(self.adapter) is self:
            del module.lora_variant[self.adapter]
        for name in (self.basis_buffer, self.mean_buffer):
            if name in module._buffers:
                delattr(module, name)

    # The direct way ---------------------------------------------------------------------------------------------------

    def install(self, module: Any) -> bool:
        """Take the layer's forward over, if it can ever go the direct way; :meth:`restore` gives it back."""
        base = module.base_layer
        plain = type(module) is LoraLinear and type(base) is nn.Linear and type(base.weight) is nn.Parameter
        if not plain or "forward" in module.__dict__ or module.lora_B[self.adapter].bias is not None:
            return False
        original = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or not self.is_direct(module, x):
                return original(x, *args, **kwargs)
            return self.direct(module, x)

        forward.tfb_direct = True  # type: ignore[attr-defined]
        module.forward = forward
        return True

    @staticmethod
    def restore(module: Any) -> None:
        del module.__dict__["forward"]

    def is_direct(self, module: Any, x: Tensor) -> bool:
        """Whether this call may replace PEFT's: the adapter alone is on, and base and input are as they seem."""
        # Straight from the dictionaries here and below: nn.Module's attribute access would be a third of a layer's cost.
        state, base = self.state, module._modules["base_layer"]
        weight = base._parameters.get("weight")
        active = module._active_adapter
        return (
            state.batch is not None
            # A random layer below the fan is an error, which the slot notes; full-rank noise is the slot's to add.
            and (self.block < state.first or (state.fanned and not self.full_rank))
            and weight is not None
            and not module._disable_adapters
            and not module.merged_adapters
            and (active == self.adapter or active == [self.adapter])
            and x.dtype == weight.dtype
            and x.device == weight.device
            # Hooks see the base layer's own output; an own forward is accelerate's, which brings the weights in.
            and not base._forward_hooks
            and not base._forward_pre_hooks
            and "forward" not in base.__dict__
            and not torch.is_autocast_enabled(x.device.type)
        )

    def direct(self, module: Any, x: Tensor) -> Tensor:
        """The layer's output, update first. ``x`` (..., n) -> (..., m)."""
        shared = self.state.shared
        if shared is None or shared.x is not x or shared.version != _version(x) or self.name not in shared.parts:
            shared = self.state.shared = self.share(module, x)
        part = shared.parts.pop(self.name)
        if not shared.parts:
            self.state.shared = None
        base = module._modules["base_layer"]._parameters
        return part.addmm_(shared.rows, base["weight"].t()).view(*x.shape[:-1], part.shape[-1])

    def share(self, module: Any, x: Tensor) -> SharedInput:
        """Read ``x`` once for this layer and those of its group that can follow."""
        batch = MEAN
        if self.is_random():
            assert self.state.batch is not None
            batch = self.state.batch
        together = [(self, module)]
        together += [(v, m) for v, m in self.group if v is not self and v.is_direct(m, x)]
        if batch is not MEAN:
            layout = self.state.layout if self.state.seen is None else None
            usual = layout is not None and x.shape[0] == len(batch.samples) * self.state.each
            for variant, _ in together:
                if not usual or variant.name not in layout:  # type: ignore[operator]
                    self.state.check_rows(variant.name, x)
        rows = x.reshape(-1, x.shape[-1])
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        sigma, samples, seed = batch.tensors(x.device)
        means = [m._buffers[v.mean_buffer] for v, m in together]
        layers = [v.layer for v, _ in together]
        parts = ops.update_group(
            rows,
            means,
            [m._buffers[v.basis_buffer] for v, m in together],
            [m._modules["base_layer"]._parameters["bias"] for _, m in together],
            [m.scaling[v.adapter] for v, m in together],
            sigma,
            samples,
            seed,
            layers,
            batch.mode,
            batch.antithetic,
        )
        names = [v.name for v, _ in together]
        return SharedInput(x, _version(x), rows, dict(zip(names, parts, strict=True)), True)

    # The slot ---------------------------------------------------------------------------------------------------------

    # PEFT declares these as static methods and calls them on the object in the slot; ours needs its state.
    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        if not self.sampling():
            return self.plain(module, x, result)
        if self.state.probed is not None:
            self.state.probed.append(self.name)
        return self.sampled(module, x, result)

    def is_random(self) -> bool:
        """Whether this layer is random in the context that is open; does not ask whether its rows are fanned."""
        return self.state.batch is not None and self.block >= self.state.first

    def sampling(self) -> bool:
        """Whether this layer is random now; one that comes before the fan is noted as missed and is the mean."""
        if not self.is_random():
            return False
        if not self.state.fanned:
            self.state.missed.append(self.name)
            return False
        return True

    def plain(self, module: Any, x: Tensor, result: Tensor) -> Tensor:
        """PEFT's own arithmetic, operation by operation, so that the mean stays bit-identical."""
        lora_a, lora_b = module.lora_A[self.adapter], module.lora_B[self.adapter]
        x = module.lora_dropout[self.adapter](x.to(lora_a.weight.dtype))
        return result + lora_b(lora_a(x)) * module.scaling[self.adapter]

    def sampled(self, module: Any, x: Tensor, result: Tensor, columns: Tensor | None = None) -> Tensor:
        """``result + s U (M + sigma_k E_k) x`` for rows in the state's groups; ``columns`` picks output features.

        The family ``"full-rank"`` adds ``s U M x`` and then ``s sigma_k |x| e``, see :mod:`tfb_ext.research.families`.
        """
        batch = self.state.batch
        assert batch is not None
        self.state.check_rows(self.name, x)
        sigma, samples, seed = batch.tensors(x.device)
        scaling = module.scaling[self.adapter]  # the layer's own: PEFT's rescaling helpers change it
        mean, basis = getattr(module, self.mean_buffer), getattr(module, self.basis_buffer)
        features = basis.shape[0]
        bias = module.lora_B[self.adapter].bias
        if columns is not None:
            basis = basis.index_select(0, columns)
            bias = None if bias is None else bias.index_select(0, columns)
        rows = x.reshape(-1, x.shape[-1]).to(result.dtype)
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        drawn = MEAN.tensors(x.device) if self.full_rank else (sigma, samples, seed)
        z = ops.shrink(rows, mean, *drawn, self.layer, "weight" if self.full_rank else batch.mode, batch.antithetic)
        basis = basis if basis.dtype == z.dtype else basis.float()
        y = result.reshape(-1, result.shape[-1])
        ops.expand_(y, z, basis, scaling)
        if self.full_rank:
            from ..research.families import add_full_rank_noise_

            add_full_rank_noise_(
                y, rows, features, scaling, sigma, samples, seed, self.layer, batch.antithetic, columns
            )
        if bias is not None:
            y += (bias * scaling).to(y.dtype)
        return y.view(result.shape)

    # The adapter's own weights are untouched, so merging is the mean's, as PEFT does it without a variant.
    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:  # type: ignore[override]
        orig_weight.data += module.get_delta_weight(active_adapter)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:  # type: ignore[override]
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def _version(x: Tensor) -> int:
    """Changes when ``x`` is written to. Tensors of inference mode and of a trace do not count."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
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


def find_groups(model: Any, layers: Sequence[tuple[TFBVariant, Any]]) -> list[tuple[tuple[TFBVariant, Any], ...]]:
    """Layers of one block that get the very same tensor one after the other (q, k and v; gate and up), by one look.

    The model runs on two tokens, in eval mode and without gradients. A model that cannot run on ``input_ids`` alone has no
    groups: its layers read their inputs one by one.
    """
    calls: list[tuple[TFBVariant, Any, Tensor, int]] = []

    def note(variant: TFBVariant, module: Any, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            calls.append((variant, module, args[0], _version(args[0])))

    hooks = [m.register_forward_pre_hook(lambda module, args, v=v: note(v, module, args)) for v, m in layers]
    try:
        with unchanged(model), torch.no_grad():
            for module in model.modules():
                module.training = False
            device = model.get_input_embeddings().weight.device
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=device))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return []
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[tuple[TFBVariant, Any]]] = []
    last: tuple[Tensor, int, int] | None = None
    seen: set[str] = set()
    for variant, module, x, version in calls:
        if variant.name in seen:
            continue
        seen.add(variant.name)
        if last is not None and last[0] is x and last[1:] == (version, variant.block):
            groups[-1].append((variant, module))
        else:
            groups.append([(variant, module)])
        last = (x, version, variant.block)
    return [tuple(group) for group in groups if len(group) > 1]


def base_dtype(module: Any) -> torch.dtype:
    """Type of a layer's base weight; torch's dynamically quantised layers have none, and compute in float32."""
    dtype: torch.dtype = getattr(module.get_base_layer().weight, "dtype", torch.float32)
    return dtype


def take_over(module: Any, adapter: str) -> None:
    """Take a posterior off a layer that no Bayesian adapter holds on to: its handle was lost, or the model was copied."""
    variant = module.lora_variant.get(adapter)
    if isinstance(variant, TFBVariant):
        owner = variant.state.owner()
        if owner is None or owner._modules.get(variant.name) is not module:
            variant.detach(module)


def check_layer(name: str, module: Any, adapter: str, own: SamplingState | None = None) -> None:
    """Refuse a layer that cannot carry a posterior, naming it, the reason and the way out; changes nothing.

    ``own``: the state of a posterior that the layer may carry already.
    """

    def refuse(reason: str, way_out: str) -> None:
        raise UnsupportedModelError(f"layer {name!r} ({type(module).__name__}): {reason}; {way_out}")

    variant = module.lora_variant.get(adapter)
    if isinstance(variant, TFBVariant):
        if variant.state is own:
            variant = None
        else:
            refuse(f"adapter {adapter!r} is Bayesian already", "call unload() on its BayesianAdapter first")
    if variant is not None:
        refuse(
            f"adapter {adapter!r} uses PEFT's {type(variant).__name__}, which owns the slot the posterior needs",
            "only plain LoRA (with rsLoRA, rank patterns, lora_bias, PiSSA, OLoRA, LoftQ) has a TFB posterior",
        )
    if type(module) not in SUPPORTED_CLASSES:
        refuse(
            "this kind of LoRA layer is not supported",
            f"supported: {', '.join(cls.__module__ + '.' + cls.__name__ for cls in SUPPORTED_CLASSES)}; "
            "train the adapter without this module in target_modules",
        )
    if module.merged:
        refuse(f"adapters {module.merged_adapters} are merged into the weights", "call unmerge_adapter() first")
    weight = getattr(module.get_base_layer(), "weight", None)
    if isinstance(weight, Tensor) and weight.dtype == torch.float64:
        refuse("its weight is float64, expected float32, bfloat16 or float16", "convert the model: model.float()")
    for part in (module.lora_A[adapter], module.lora_B[adapter]):
        if not isinstance(part.weight, Tensor):
            refuse(f"its adapter is a {type(part).__name__} without a weight tensor", "quantise the base model alone")
        if type(part.weight).__name__ == "DTensor":
            refuse("its adapter weight is a DTensor shard", "gather the adapter's weights first")


def head_columns(module: Any, hidden: Tensor, columns: Tensor) -> Tensor:
    """Rows ``columns`` of the output head applied to ``hidden`` (..., n) -> (..., len(columns)).

    Only those rows of the weight are multiplied where the head is a linear layer, with or without an adapter.
    """
    columns = columns.to(hidden.device)
    own = module.__dict__.get("forward")
    if own is not None and not getattr(own, "tfb_direct", False):
        # accelerate's offloading brings the weights in for the length of a forward only.
        return module.forward(hidden).index_select(-1, columns)
    if type(module) is nn.Linear:
        return _linear_rows(module, hidden, columns)
    if type(module) is LoraLinear and type(module.base_layer) is nn.Linear and not module.disable_adapters:
        active = [name for name in module.active_adapters if name in module.lora_A]
        if not module.merged and all(isinstance(module.lora_variant.get(name), TFBVariant) for name in active):
            result = _linear_rows(module.base_layer, hidden, columns)
            for name in active:
                variant: Any = module.lora_variant[name]
                if variant.sampling():
                    result = variant.sampled(module, hidden, result, columns)
                else:
                    a: Any = module.lora_A[name]
                    b: Any = module.lora_B[name]
                    low = a(hidden.to(a.weight.dtype))
                    result = result + _linear_rows(b, low, columns).to(result.dtype) * module.scaling[name]
            return result
    return module.forward(hidden).index_select(-1, columns)


def _linear_rows(linear: Any, x: Tensor, rows: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.index_select(0, rows)
    return nn.functional.linear(x, linear.weight.index_select(0, rows), bias)


def disable_input_casts(modules: Sequence[Any], adapter: str) -> Callable[[], None]:
    """Stop PEFT from casting activations to the adapter's type before we see them; returns the undo.

    PEFT keeps adapters in float32 under a bfloat16 base. A layer with a second active adapter keeps its cast, which that
    adapter's plain arithmetic relies on.
    """
    changed: list[tuple[Any, Any]] = []
    for module in modules:
        if [name for name in module.active_adapters if name in module.lora_A] == [adapter]:
            changed.append((module, module.__dict__.get("cast_input_dtype_enabled")))
            module.cast_input_dtype_enabled = False

    def undo() -> None:
        for module, before in changed:
            if before is None:
                module.__dict__.pop("cast_input_dtype_enabled", None)
            else:
                module.cast_input_dtype_enabled = before

    return undo
