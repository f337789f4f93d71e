"""A trained LoRA adapter as a distribution over adapters: attach, sample, save, load, take off again."""

from __future__ import annotations

import hashlib
import math
import shutil
import struct
import threading
import warnings
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import ops
from ..checks import check_samples, check_seed, check_sigma, is_integer
from ..errors import ConfigError, GuardError, SamplingError, UnsupportedModelError
from ..files import replacing_folder
from ..forward import guard
from ..forward.caches import CacheWatch, cache_of, rows_of_cache
from ..forward.fan import Anatomy, Fan, Layout, Predictive, Trunk, batch_after, batch_shape, check_packing, find_anatomy
from ..posterior.canonical import LayerPosterior, canonical_name, layer_posterior, unique_layer_ids
from ..posterior.config import CONFIG_NAME, FORMAT_VERSION, MODES, TFBConfig, check_family
from .attachment import Attachment, adapter_tensors
from .layers import (
    SampleBatch,
    SamplingState,
    TFBVariant,
    base_dtype,
    check_layer,
    disable_input_casts,
    find_groups,
    take_over,
    unchanged,
)
from .loading import attach_adapter

Depth = int | float | str

# Models inside a sampling context: two fans on one model would multiply their rows and mix up the samples.
_SAMPLING_MODELS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_OPENING = threading.Lock()


class BayesianAdapter:
    """One LoRA adapter of a PEFT model with its Gaussian posterior attached. Made by :func:`bayesianize` and :func:`load`.

    Outside its contexts the model is the plain (mean) adapter, bit for bit. The posterior is ``(adapter, sigma, seed)``:
    sample ``k`` is the same weight on every device and in every batch.

    Attributes:
        model: the PEFT model.
        name: the adapter's name in it.
        sigma: posterior scale, in units of the adapter's weight; ``None`` until a search or the caller sets it.
        seed: 64-bit noise seed.
        depth: random blocks counted from the top, or ``"all"`` or ``"head"``; assign to change it.
        antithetic: sample ``2k + 1`` is minus the noise of sample ``2k``.
        mode: how the noise meets the tokens: ``"weight"`` (one weight matrix a sample, the paper's equation), ``"flipout"``
            (that, with random signs for every token) or ``"token"`` (fresh noise for every token, the cheapest). Rows and
            positions of a call are numbered from 0; a step from a key-value cache draws anew in mode ``"token"`` and is refused
            in ``"flipout"``. A sigma found in one mode does not hold in another.
        family: what is noisy: ``"low-rank"`` (the paper's posterior), ``"constant"`` (the entries of A) or ``"full-rank"`` (all
            entries of the update, in mode ``"token"`` only); see :mod:`tfb_ext.research.families`. A sigma found for one family does
            not hold for another.
        search: summary of the search that chose sigma, kept in the saved file.
        guard: whether the first context at a depth compares the model with separate passes, see :mod:`tfb_ext.forward.guard`.
    """

    def __init__(
        self,
        model: PeftModel,
        name: str,
        anatomy: Anatomy,
        posteriors: Sequence[LayerPosterior],
        modules: Sequence[Any],
        *,
        depth: Depth,
        sigma: float | None,
        seed: int,
        antithetic: bool,
        mode: str = "weight",
        guard: bool = True,
    ) -> None:
        self.family = posteriors[0].family
        self.mode = mode
        self.model = model
        self.name = name
        self.anatomy = anatomy
        self.seed = check_seed(seed)
        self.antithetic = antithetic
        self.guard = guard
        self.search: dict[str, Any] | None = None
        self._state = SamplingState()
        self._modules: dict[str, Any] = dict(zip((p.name for p in posteriors), modules, strict=True))
        blocks = [_block_of(anatomy, p.name) for p in posteriors]
        self._variants = [TFBVariant(self._state, p, name, block) for p, block in zip(posteriors, blocks, strict=True)]
        self.posteriors = tuple(posteriors)
        self._attached = False
        self._open: tuple[int, Predictive] | None = None
        self._guarded: dict[Hashable, Layout | GuardError] = {}
        self._attachment = Attachment(anatomy.model, name, self._modules, {v.name: v for v in self._variants})
        self._sigma: float | None = None
        self._sigma_scalings: tuple[float, ...] | None = None
        if sigma is not None:
            self.sigma = sigma
        self.depth = depth

    @property
    def sigma(self) -> float | None:
        return self._sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._sigma = check_sigma(value)
        self._sigma_scalings = self._scalings()

    def _scalings(self) -> tuple[float, ...]:
        return tuple(m.scaling.get(self.name, math.nan) for m in self._modules.values())

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        self._mode = check_mode(value, self.family)

    @property
    def depth(self) -> int | str:
        return self._depth

    @depth.setter
    def depth(self, value: Depth) -> None:
        self._first = self.first_random_block(value)
        self._depth: int | str = self.depth_name(self._first)

    def depth_name(self, first: int) -> int | str:
        """The depth whose first random block is ``first``, as :attr:`depth` spells it."""
        total = len(self.anatomy.blocks)
        return "head" if first == total else "all" if first == 0 else total - first

    @property
    def layers(self) -> tuple[str, ...]:
        """Canonical names of the layers that have a posterior, the ones below the first random block included."""
        return tuple(p.name for p in self.posteriors)

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers that read one input together, a tuple for each such input (q, k and v; gate and up)."""
        groups = dict.fromkeys(tuple(member.name for member, _ in v.group) for v in self._variants if v.group)
        return tuple(groups)

    @property
    def random_layers(self) -> tuple[str, ...]:
        """Names of the layers that are random at the present depth."""
        return self.random_layers_at(self.depth)

    def random_layers_at(self, depth: Depth) -> tuple[str, ...]:
        """Names of the layers that are random at ``depth``, as :meth:`first_random_block` takes it."""
        first = self.first_random_block(depth)
        return tuple(v.name for v in self._variants if v.block >= first)

    def first_random_block(self, depth: Depth) -> int:
        """Index of the lowest random block for ``depth``.

        Args:
            depth: number of blocks from the top, a fraction of them (rounded, at least one), ``"all"`` or ``"head"``.

        Raises:
            ValueError: outside the model, or nothing of the adapter lies that high.
        """
        total = len(self.anatomy.blocks)
        depth = int(depth) if is_integer(depth) else depth
        wanted = f"expected 1 to {total} blocks from the top, a fraction in (0, 1] (a float), 'all' or 'head'"
        if depth == "all":
            first = 0
        elif depth == "head":
            first = total
        elif isinstance(depth, bool) or not isinstance(depth, int | float):
            raise ValueError(f"depth is {depth!r}, {wanted}")
        elif isinstance(depth, float) and 0 < depth <= 1:
            first = total - max(1, round(total * depth))
        elif isinstance(depth, int) and 1 <= depth <= total:
            first = total - depth
        else:
            raise ValueError(f"depth is {depth!r}, {wanted}")
        if not any(variant.block >= first for variant in self._variants):
            highest = max(variant.block for variant in self._variants)
            raise ValueError(
                f"depth is {depth!r}, but adapter {self.name!r} has no layer that high (its highest is in block {highest} of "
                f"{total}); use depth={total - highest if highest < total else 'all'!r} or more"
            )
        return first

    # Contexts -------------------------------------------------------------------------------------------------------

    @contextmanager
    def predictive(
        self,
        samples: int | Sequence[int] = 10,
        sigma: float | None = None,
        *,
        keep_samples: bool = False,
        columns: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Iterator[Predictive]:
        """Inside, the model *is* its posterior predictive: B rows in, B rows of ``log mean_k softmax`` (float32) out.

        Args:
            samples: how many samples, or their numbers.
            sigma: posterior scale instead of the adapter's own.
            keep_samples: keep each forward's per-sample log probabilities in ``.sample_outputs`` (S, B, ..., V).
            columns: output features to compute (int64 (C,)), normalised among themselves; the model's logits then have
                C columns. For classification over label tokens.
            targets: token ids (B, T) or (B, T, K) whose log probability under each sample to keep in
                ``.target_log_probabilities``; also to be set on what the context gives, before each call. See
                :class:`~tfb_ext.forward.fan.Predictive`.

        Regression heads give the mean of the outputs, multi-label heads the logit of the mean probability. Where a call asks for
        the last position alone (``logits_to_keep=1``, as ``generate`` does), the last block's attention output and MLP run
        there alone; asked for hidden states or attentions, everywhere.

        Raises:
            ValueError: no sigma, or a bad one; no samples.
            SamplingError: at the model call: gradients are on, the model is in training mode, the adapter is not the active
                one or is merged, rows are packed, targets do not fit.
        """
        batch = self.batch(samples, sigma)
        with self.fanned(Predictive(batch, keep_samples=keep_samples, columns=columns, targets=targets)) as view:
            yield view

    @contextmanager
    def fanned(self, view: Predictive, depth: Depth | None = None) -> Iterator[Predictive]:
        """The context behind :meth:`predictive`, for callers that hold several sigmas in one batch or keep a trunk."""
        self.check_ready()
        with self.fanned_at(self._first if depth is None else self.first_random_block(depth), view):
            yield view
        # Its weights may not change meanwhile: what the context does not draw would follow them.
        self._attachment.check(converted=True)

    @contextmanager
    def fanned_at(self, first: int, view: Predictive) -> Iterator[Predictive]:
        """The same by the index of the first random block; with that of the head no block is random, only a head may be."""
        layout = self._layout(first)
        with self.opened(first, Fan(self.anatomy, self._state, first, view, self.check_call, layout)):
            yield view

    @contextmanager
    def opened(self, first: int, fan: Fan) -> Iterator[None]:
        """A fan's context on this adapter's model."""
        with self._exclusive(first), fan.open() as view:
            self._open = (first, view)
            try:
                yield
            finally:
                self._open = None

    def _layout(self, first: int, fanned: bool = True) -> Layout | None:
        """How the model lays out its rows at this first random block, compared with separate passes where that was not done yet.

        Raises:
            GuardError: samples in one call differ from separate passes.
        """
        self._check_free()
        if not self.guard:
            warnings.warn(
                f"adapter {self.name!r}: samples in one call were not compared with separate passes on this model (guard=False)",
                stacklevel=4,
            )
            return None
        if not any(v.block >= first for v in self._variants):
            return Layout({}, {})
        key = self._guard_key(first, fanned)
        if key not in self._guarded:
            try:
                layout, compared = guard.learn(self, first, fanned)
                if not compared:
                    return layout
                self._guarded[key] = layout
            except GuardError as error:
                self._guarded[key] = error
        found = self._guarded[key]
        if isinstance(found, GuardError):
            raise GuardError(str(found))
        return found

    def compare(self, **inputs: Any) -> None:
        """Compare three samples in one call with separate passes on these arguments of the model, at the present depth.

        What the first context does by itself on a tiny text. Calls in later contexts may then bring what only such calls bring to the
        blocks.

        Raises:
            GuardError: they differ.
        """
        self.check_attached()
        text = self._layout(self._first)
        found, _ = guard.learn(self, self._first, example=inputs)
        if text is None:
            return
        blocks = {*found.arguments, *text.arguments}
        arguments = {b: {**found.arguments.get(b, {}), **text.arguments.get(b, {})} for b in blocks}
        self._guarded[self._guard_key(self._first, True)] = Layout({**found.layers, **text.layers}, arguments)

    def _guard_key(self, first: int, fanned: bool) -> Hashable:
        model = self.anatomy.model
        weight = next(model.parameters())
        attention = getattr(model.config, "_attn_implementation", None)
        return (first, fanned, self.mode, weight.dtype, weight.device, attention)

    def _check_free(self) -> None:
        if self.anatomy.model in _SAMPLING_MODELS:
            raise SamplingError("a sampling context of this model is open already; contexts of one model do not nest")

    def check_attached(self) -> None:
        """Raise a :class:`~tfb_ext.errors.SamplingError` if the posterior is not that of the model's adapter any more."""
        if not self._attached:
            raise SamplingError(f"adapter {self.name!r} was unloaded; call tfb_ext.bayesianize again")
        self._attachment.check()

    def check_ready(self) -> None:
        """The same before a context opens, in which no part of the model may be in training mode by itself."""
        self.check_attached()
        for variant, posterior in zip(self._variants, self.posteriors, strict=True):
            variant.restore_types(self._modules[variant.name], posterior)
        model = self.anatomy.model
        if model.training or not any(part.training for part in _parts(model)):  # a call says it of the whole model
            return
        for name, part in model.named_modules():
            if part.training and _drops(part, name, self.model.active_adapters):
                raise SamplingError(
                    f"{name!r} is in training mode, so its dropout would add its own noise, expected evaluation mode. Fix: call "
                    "model.eval()"
                )

    @contextmanager
    def sampling(self, samples: int | Sequence[int] = 10, sigma: float | None = None) -> Iterator[SampleBatch]:
        """Inside, the caller lays out S * B rows, sample-major (row ``s * B + b``), and gets S * B rows of raw outputs.

        In mode ``"token"`` every call has the noise of its first tokens: a step from a cache needs a seed of its own, in a context
        of its own, which :meth:`predictive` sees to by itself.
        """
        batch = self.batch(samples, sigma)
        self.check_ready()
        # One sample has all rows for itself, however they lie.
        layout = self._layout(self._first, fanned=False) if len(batch) > 1 else None
        with self.laid_out(self._first, batch, layout):
            yield batch
        self._attachment.check(converted=True)

    @contextmanager
    def laid_out(self, first: int, batch: SampleBatch, layout: Layout | None) -> Iterator[None]:
        """The context behind :meth:`sampling`, for callers that know how the model lays out its rows."""
        model, state = self.anatomy.model, self._state
        # Every layer holds the caller's rows, so beams move them as they move any rows.
        caches = CacheWatch(len(self.anatomy.blocks), 1, rows_of_cache(state, batch, None))
        with self._exclusive(first), state.waiting() as wait, ExitStack() as undo:
            before = partial(self._before_laid_out, batch, caches)
            undo.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(model.register_forward_hook(partial(self._after_laid_out, caches), always_call=True).remove)
            undo.callback(caches.close)
            undo.enter_context(state.serving(batch, first, None if layout is None else layout.layers, fanned=True))
            undo.callback(wait)
            yield

    def _before_laid_out(
        self, batch: SampleBatch, caches: CacheWatch, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        state = self._state
        if not torch.compiler.is_compiling():
            state.begin_call(batch)
            caches.enter(cache_of(kwargs))
        self.check_call()
        check_packing(module, kwargs)
        rows, state.tokens = batch_shape(args, kwargs)
        if rows % len(batch):
            raise SamplingError(
                f"sampling({len(batch)} samples) got {rows} rows, expected a multiple of {len(batch)}: repeat the batch "
                "once for every sample, sample-major (inputs.repeat(samples, 1))"
            )
        state.each = rows // len(batch)
        batch_after(batch, kwargs)  # refuses what a step from a cache cannot be
        state.shared = None

    def _after_laid_out(self, caches: CacheWatch, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            caches.adopt(output)
            self._state.turn.end()

    def batch(
        self,
        samples: int | Sequence[int],
        sigma: float | Sequence[float] | None = None,
        antithetic: bool | None = None,
        mode: str | None = None,
    ) -> SampleBatch:
        """Row groups for ``samples``; with several sigmas one group of samples after another, the same noise in each.

        ``antithetic`` and ``mode`` are the adapter's own where they are not given.
        """
        numbers = check_samples(samples)
        if sigma is None and self.sigma is None:
            raise ValueError(
                f"adapter {self.name!r} has no sigma yet; run tfb_ext.search_sigma(adapter, anchors), set adapter.sigma, or "
                "pass sigma="
            )
        seed = check_seed(self.seed)  # here and not in a layer, where an exception would leave PEFT's hooks behind
        given: Any = self.sigma if sigma is None else sigma
        scales = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        if not scales:
            raise ValueError("sigma is an empty list, expected at least one number above 0")
        checked = [check_sigma(s) for s in scales]
        mirrored = self.antithetic if antithetic is None else antithetic
        scales = [s for s in checked for _ in numbers]
        noise = check_mode(mode or self.mode, self.family)
        return SampleBatch(tuple(scales), numbers * len(checked), seed, mirrored, noise, self.family)

    def scale(self, sigma: float | None = None) -> float:
        """``sigma``, or the adapter's own; a ``ValueError`` if there is none or it is no finite number above 0."""
        return self.batch([0], None if sigma is None else check_sigma(sigma)).sigma[0]

    def trunk(self, *depths: Depth, device: torch.device | None = None, limit: float = math.inf) -> Trunk:
        """An empty store for the hidden states at the first random block of each depth; of the adapter's own without any."""
        firsts = {self.first_random_block(d) for d in depths or (self.depth,)}
        return Trunk(tuple(sorted(firsts - {0})), device, limit)

    @contextmanager
    def _exclusive(self, first: int) -> Iterator[None]:
        model = self.anatomy.model
        with ExitStack() as undo:
            with _OPENING:  # of two threads that open a context, one does
                self._check_free()
                _SAMPLING_MODELS.add(model)
            undo.callback(_SAMPLING_MODELS.discard, model)
            random = [self._modules[v.name] for v in self._variants if v.block >= first]
            undo.callback(disable_input_casts(random, self.name))
            undo.callback(self.model.register_forward_pre_hook(_refuse_adapter_names, with_kwargs=True).remove)
            for variant in self._variants:
                module = self._modules[variant.name]
                if variant.install(module):
                    undo.callback(variant.restore, module)
            undo.enter_context(torch.no_grad())
            yield

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Inside, no other thread's call of the model runs."""
        self._state.turn.begin()
        try:
            yield
        finally:
            self._state.turn.end()

    @property
    def open_context(self) -> tuple[int, Predictive] | None:
        """First random block and view of the predictive context that is open, if one is."""
        return self._open

    @property
    def is_sampling(self) -> bool:
        """Whether a context of any kind is open."""
        return self._state.batch is not None

    @property
    def is_on(self) -> bool:
        """Whether the model computes with adapters at all: not inside PEFT's ``disable_adapter``."""
        return not any(m.disable_adapters for m in self._modules.values())

    def check_call(self) -> None:
        """Raise a :class:`~tfb_ext.errors.SamplingError` if a model call now would not sample: what every call begins with."""
        self.check_modes()
        self._attachment.check_switches()

    def check_modes(self) -> None:
        """The part of it that a replayed graph needs, whose layers are those it was captured with."""
        if torch.is_grad_enabled():
            raise SamplingError(
                "gradients are on inside a sampling context; samples are not differentiable, drop torch.enable_grad()"
            )
        if self.anatomy.model.training:
            raise SamplingError("the model is in training mode, so dropout would add its own noise; call model.eval()")

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Inside, calls of the model would sample, whatever mode it is in and whichever adapter is active; for the guard.

        They leave nothing on the model.
        """
        model = self.anatomy.model
        with unchanged(model), torch.no_grad():
            for part in model.modules():
                part.training = False
            for module in self._modules.values():
                module._active_adapter, module._disable_adapters = [self.name], False
            self.check_call()
            yield

    # Attaching ------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        for variant, posterior in zip(self._variants, self.posteriors, strict=True):
            variant.attach(self._modules[variant.name], posterior)
        self._state.owner = weakref.ref(self)
        self._attached = True

    def refresh(self) -> None:
        """Rebuild the posterior of the adapter's weights as they are now, after training, loading or writing to them.

        The search's summary is dropped. Sigma stays what it was and can be used, but is not saved before it is set or searched
        again: it was found for other weights.

        Raises:
            SamplingError: inside a sampling context, or after :meth:`unload`.
            UnsupportedModelError: a layer is gone, or its weights cannot carry a posterior. The old posterior stays then.
        """
        if self.anatomy.model in _SAMPLING_MODELS or not self._attached:
            raise SamplingError(
                "refresh() inside a sampling context or after unload(), expected neither. Fix: leave the with block first"
            )
        for name, module in self._modules.items():
            if self.name not in module.lora_A:
                raise UnsupportedModelError(
                    f"layer {name!r} has no weights of adapter {self.name!r} any more. Fix: load it and call tfb_ext.bayesianize again"
                )
            check_layer(name, module, self.name, own=self._state)
        posteriors = _posteriors(self._modules.items(), self.name, self.family)
        for variant, posterior in zip(self._variants, posteriors, strict=True):
            variant.detach(self._modules[variant.name])
            variant.rank = posterior.rank
            variant.attach(self._modules[variant.name], posterior)
        self.posteriors = tuple(posteriors)
        self._attachment.note()
        self._state.renew()
        self.search, self._sigma_scalings = None, None

    def _group(self) -> None:
        for group in find_groups(self.anatomy.model, [(v, self._modules[v.name]) for v in self._variants]):
            for variant, _ in group:
                variant.group = group

    def _probe(self) -> None:
        """Send one row through a layer of each class: PEFT has layer classes that ignore the slot silently."""
        seen: set[type] = set()
        state = self._state
        for variant in self._variants:
            module = self._modules[variant.name]
            if type(module) in seen:
                continue
            seen.add(type(module))
            weight = module.lora_A[self.name].weight
            row = torch.zeros(1, module.in_features, dtype=base_dtype(module), device=weight.device)
            state.batch, state.first, state.fanned, state.probed = SampleBatch((1.0,), (0,), 0, False), 0, True, []
            # The probe must reach the slot whatever adapter is active at the moment.
            before = module._active_adapter, module._disable_adapters
            module._active_adapter, module._disable_adapters = [self.name], False
            undo = disable_input_casts([module], self.name)
            try:
                with torch.no_grad():
                    module(row)
                called = variant.name in state.probed
            finally:
                undo()
                module._active_adapter, module._disable_adapters = before
                state.batch, state.fanned, state.probed = None, False, None
            if not called:
                raise UnsupportedModelError(
                    f"layer {variant.name!r} ({type(module).__name__}): PEFT did not call the posterior's slot in its forward; "
                    "this version of PEFT is not supported for this layer class"
                )

    def unload(self) -> PeftModel:
        """Take the posterior off; the PEFT model is what it was before. Returns it."""
        if self.anatomy.model in _SAMPLING_MODELS:
            raise SamplingError("unload() inside a sampling context; leave the with block first")
        self._state.owner = lambda: None
        for variant in self._variants:
            variant.detach(self._modules[variant.name])
        self._attached = False
        return self.model

    # Files ----------------------------------------------------------------------------------------------------------

    def config(self) -> TFBConfig:
        peft_config = self.model.peft_config[self.name]
        return TFBConfig(
            sigma=self.sigma,
            seed=self.seed,
            mode=self.mode,
            family=self.family,
            antithetic=self.antithetic,
            depth=self.depth,
            layers=self.layers,
            base_model=peft_config.base_model_name_or_path,
            search=self.search,
            fingerprint=self.fingerprint(),
        )

    def fingerprint(self, version: int = FORMAT_VERSION) -> str:
        """SHA-256 of the adapter's A, B and bias as float32 and of the scaling: sigma was chosen for these and no others.

        ``version`` is that of ``tfb_config.json``; before 3 the bias and the scaling were not part of it.
        """
        digest = hashlib.sha256()
        for name in self.layers:
            module = self._modules[name]
            digest.update(name.encode())
            for tensor in adapter_tensors(module, self.name)[: None if version >= 3 else 2]:
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
            if version >= 3:
                digest.update(struct.pack("<d", module.scaling[self.name]))
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Save the adapter as PEFT does with ``tfb_config.json`` beside it, all of it or nothing. Returns that folder.

        As in PEFT, an adapter that is not called ``default`` goes into a subfolder of its name. Other files there stay.

        Raises:
            OSError: it cannot be written.
        """
        self._check_certified()
        target = Path(folder)
        place = target if self.name == "default" else target / self.name
        with replacing_folder(place) as staged:
            if self.name == "default" and (place / "README.md").is_file():  # PEFT keeps what people wrote into the card
                shutil.copyfile(place / "README.md", staged / "README.md")
            try:
                self.model.save_pretrained(str(staged), selected_adapters=[self.name], safe_serialization=True)
            except SafetensorError as error:  # its errors of the operating system are no OSError
                raise OSError(
                    f"{place}: the adapter's weights cannot be written ({error}). Fix: free some space"
                ) from None
            if self.name != "default":
                (staged / "README.md").unlink(missing_ok=True)
                for file in (staged / self.name).iterdir():
                    file.rename(staged / file.name)
                (staged / self.name).rmdir()
            self.config().write(staged)
        return place

    def _check_certified(self) -> None:
        """Raise unless sigma was set for the weights and the scaling that the adapter has now: what a file says of them."""
        self.check_attached()
        if self.sigma is None or self._sigma_scalings == self._scalings():
            return
        was = "weights" if self._sigma_scalings is None else "LoRA scaling"
        raise ConfigError(
            f"sigma = {self.sigma:g} was set for another {was} of adapter {self.name!r}, expected one for those it has now. Fix: search "
            "sigma again, or set adapter.sigma to say that it holds"
        )

    def posterior(self, name: str) -> LayerPosterior:
        """The posterior of one layer; a ``ValueError`` if it has none."""
        posterior = next((p for p in self.posteriors if p.name == canonical_name(name)), None)
        if posterior is None:
            raise ValueError(f"no Bayesian layer {name!r} in adapter {self.name!r}; see adapter.layers")
        return posterior

    def sample_weights(self, name: str, sample: int, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """``(U, M + sigma E_k)`` of one layer, float32 on the CPU: sample ``k``'s weight is ``scaling * U @ (M + sigma E_k)``.

        ``(B, A + sigma E_k)`` for the family ``"constant"``.

        Raises:
            ValueError: no such layer, no sigma, or a mode other than ``"weight"`` (the family ``"full-rank"`` with it), whose
                samples are no weights.
        """
        if self.family == "full-rank":
            raise ValueError(
                "samples of the family 'full-rank' are drawn for every token and are no weights; use the family 'low-rank' or "
                "'constant'"
            )
        if self.mode != "weight":
            raise ValueError(f"samples of mode {self.mode!r} are no weights; set adapter.mode = 'weight'")
        posterior = self.posterior(name)
        batch = self.batch([sample], sigma)
        rank, n = posterior.mean.shape
        noise = ops.noise(rank, n, self.seed, posterior.layer, sample, torch.device("cpu"), self.antithetic)
        return posterior.basis, posterior.mean + batch.sigma[0] * noise

    def __repr__(self) -> str:
        sigma = "not searched yet" if self.sigma is None else f"{self.sigma:.4g}"
        return (
            f"BayesianAdapter({self.name!r}, sigma={sigma}, depth={self.depth!r} of {len(self.anatomy.blocks)} blocks, "
            f"{len(self.random_layers)} random of {len(self.layers)} layers, seed={self.seed}, antithetic={self.antithetic}"
            f"{'' if self.mode == 'weight' else f', mode={self.mode!r}'}"
            f"{'' if self.family == 'low-rank' else f', family={self.family!r}'})"
        )


def bayesianize(
    model: PeftModel,
    adapter: str = "default",
    depth: Depth = "all",
    sigma: float | None = None,
    seed: int = 0,
    antithetic: bool = True,
    mode: str | None = None,
    family: str = "low-rank",
    guard: bool = True,
) -> BayesianAdapter:
    """Attach the TFB posterior to a trained LoRA adapter; the model's outputs do not change until a context is opened.

    Args:
        model: PEFT model over a transformers model, adapter loaded and not merged.
        adapter: its name in the model.
        depth: which blocks are random, from the top: a number, a fraction, ``"all"`` (the paper) or ``"head"``.
        sigma: posterior scale if already known.
        seed: 64-bit noise seed.
        antithetic: draw samples in mirrored pairs, which lowers the Monte-Carlo error of the mean probability.
        mode: ``"weight"``, ``"flipout"`` or ``"token"``; see :class:`BayesianAdapter`. ``None`` is ``"weight"``, and ``"token"``
            for the family ``"full-rank"``.
        family: ``"low-rank"`` (the paper's posterior), ``"constant"`` or ``"full-rank"``; see :mod:`tfb_ext.research.families`.
        guard: compare the model with separate passes on a tiny input in its first context at each depth. A few forwards;
            ``False`` (for models whose weights are offloaded, say) puts it off, and every context says so.

    Raises:
        ValueError: an unknown depth, mode or family, a mode that the family does not have, a bad sigma or seed.
        UnsupportedModelError: unknown adapter, no LoRA layer, or a layer that cannot carry a posterior (the message names it,
            the reason and the way out). Nothing has been changed then.
    """
    if mode is None:
        mode = "token" if family == "full-rank" else "weight"
    check_mode(mode, check_family(family))
    if not isinstance(model, PeftModel):
        raise UnsupportedModelError(
            f"expected a peft.PeftModel, got {type(model).__name__}; load the adapter with PeftModel.from_pretrained(base, folder)"
        )
    if adapter not in model.peft_config:
        raise UnsupportedModelError(f"no adapter {adapter!r} in the model; it has {sorted(model.peft_config)}")
    kind = model.peft_config[adapter].peft_type
    if getattr(kind, "value", kind) != "LORA":
        raise UnsupportedModelError(
            f"adapter {adapter!r} is of type {getattr(kind, 'value', kind)}; only LORA has a TFB posterior"
        )
    base = model.get_base_model()
    found: list[tuple[str, Any]] = [
        (canonical_name(n), m) for n, m in base.named_modules() if isinstance(m, LoraLayer) and adapter in _adapters(m)
    ]
    if not found:
        raise UnsupportedModelError(
            f"adapter {adapter!r} has no LoRA layer in this model; its target_modules matched nothing"
        )
    for name, module in found:
        take_over(module, adapter)
        check_layer(name, module, adapter)
    unique_layer_ids(name for name, _ in found)
    anatomy = find_anatomy(base, [name for name, _ in found])
    for name, _ in found:
        _block_of(anatomy, name)
    posteriors = _posteriors(found, adapter, family)
    bayesian = BayesianAdapter(
        model,
        adapter,
        anatomy,
        posteriors,
        [m for _, m in found],
        depth=depth,
        sigma=sigma,
        seed=seed,
        antithetic=antithetic,
        mode=mode,
        guard=guard,
    )
    try:
        bayesian._attach()
        bayesian._probe()
        bayesian._group()
    except BaseException:
        bayesian.unload()
        raise
    return bayesian


def load(model: nn.Module, folder: str | Path, adapter: str = "default") -> BayesianAdapter:
    """Load a saved posterior: the adapter from ``folder`` (if the model does not hold it yet) and ``tfb_config.json``.

    Args:
        model: the base model, or a PEFT model.
        folder: what :meth:`BayesianAdapter.save_pretrained` returned.
        adapter: the name to give the adapter, or its name in the PEFT model.

    Raises:
        ConfigError: the file is missing, damaged, newer than this package, or of another adapter. The model is untouched
            unless the mismatch could only be seen after loading the adapter.
        UnsupportedModelError: the adapter's own files are damaged or do not fit the model.
    """
    config = TFBConfig.read(folder)
    peft_model = attach_adapter(model, Path(folder), adapter)
    bayesian = bayesianize(
        peft_model,
        adapter,
        sigma=config.sigma,
        seed=config.seed,
        antithetic=config.antithetic,
        mode=config.mode,
        family=config.family,
    )
    try:
        _restore(bayesian, config, Path(folder) / CONFIG_NAME)
    except ConfigError:
        bayesian.unload()
        raise
    return bayesian


def _restore(bayesian: BayesianAdapter, config: TFBConfig, path: Path) -> None:
    """Set what the file holds beside sigma and seed, once it is known to belong to this adapter."""
    if set(bayesian.layers) != set(config.layers):
        missing = sorted(set(config.layers) - set(bayesian.layers))
        extra = sorted(set(bayesian.layers) - set(config.layers))
        raise ConfigError(
            f"{path} belongs to another adapter: of its layers {missing[:3]} are not here, and {extra[:3]} are not in it; "
            "search sigma again for this adapter"
        )
    if config.fingerprint is not None and config.fingerprint != bayesian.fingerprint(config.format_version):
        scaling = " or another scaling (lora_alpha)" if config.format_version >= 3 else ""
        raise ConfigError(
            f"{path}: sigma was chosen for other weights than those of adapter {bayesian.name!r}{scaling} (their SHA-256 differs); "
            "search sigma again, or set fingerprint to null if the weights were only converted"
        )
    bayesian.search = config.search
    try:
        bayesian.depth = config.depth
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_mode(value: str, family: str) -> str:
    if value not in MODES:
        raise ValueError(f"mode is {value!r}, expected one of {', '.join(map(repr, MODES))}")
    if family == "full-rank" and value != "token":
        raise ValueError(
            f"mode is {value!r}, but the family 'full-rank' has noise for every token only; expected mode='token', or the family "
            "'low-rank' or 'constant'"
        )
    return value


def _refuse_adapter_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise SamplingError(
            "adapter_names= mixes adapters row by row, which a sampling context cannot; call once for each adapter, "
            "with model.set_adapter(name)"
        )


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """All modules, some perhaps twice; a fraction of the time that ``modules()`` takes."""
    left: list[nn.Module | None] = [model]
    while left:
        part = left.pop()
        if part is not None:
            yield part
            left += part._modules.values()


def _drops(part: nn.Module, name: str, active: Sequence[str]) -> bool:
    """Whether a module in training mode drops activations: by itself, or by a rate that it gives to a function."""
    *above, own = name.split(".")
    if above[-1:] == ["lora_dropout"] and own not in active:
        return False
    rates = [v for n, v in vars(part).items() if n == "p" or "drop" in n]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def _posteriors(layers: Iterable[tuple[str, Any]], adapter: str, family: str) -> list[LayerPosterior]:
    """Each layer's posterior of the weights that ``adapter`` has in it now."""
    return [
        layer_posterior(name, m.lora_A[adapter].weight, m.lora_B[adapter].weight, m.scaling[adapter], family)
        for name, m in layers
    ]


def _adapters(module: Any) -> set[str]:
    return {
        *module.lora_A,
        *module.lora_embedding_A,
        *getattr(module, "lora_variant", {}),
    }


def _block_of(anatomy: Anatomy, name: str) -> int:
    block = anatomy.block_of(name)
    if block is None:
        raise UnsupportedModelError(
            f"layer {name!r} embeds tokens before the first block, where samples still share their rows; train the adapter "
            "without it in target_modules"
        )
    return block
