"""A trained LoRA adapter as a distribution over adapters: its settings, its samples, its sampling contexts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from .. import ops
from ..checks import check_seed, check_sigma
from ..errors import SamplingError
from ..forward import contexts
from ..forward.anatomy import Anatomy
from ..forward.fold import Predictive
from ..forward.layouts import Guard
from ..posterior.canonical import LayerPosterior, canonical_name
from ..posterior.config import FORMAT_VERSION, By, check_mode
from .attached import Attached
from .base import base_kind
from .contexts import SamplingContexts
from .depth import Depth as Depth
from .depth import Place as Place
from .depth import Span as Span
from .depth import first_random_block, span_name, span_tokens
from .samples import SampleBatch, make_batch
from .saving import fingerprint, save

if TYPE_CHECKING:
    from ..forward.batches import Data
    from ..prediction.gaussian import Gaussian


class BayesianAdapter(SamplingContexts):
    """One LoRA adapter of a PEFT model with its Gaussian posterior attached. Made by :func:`bayesianize` and :func:`load`.

    Outside its contexts the model is the plain (mean) adapter, bit for bit. The posterior is ``(adapter, sigma, seed)``:
    sample ``k`` is the same weight on every device and in every batch.

    Attributes:
        model: the PEFT model.
        name: the adapter's name in it.
        sigma: posterior scale, in units of the adapter's weight; ``None`` until a search or the caller sets it.
        seed: 64-bit noise seed.
        depth: random blocks counted from the top, or ``"all"`` or ``"head"``; assign to change it.
        first: index of the first random block.
        span: which tokens of a row are random: ``"all"``, ``"answer"`` (the position that an answer is read from and what follows
            it), or so many last tokens up to that position. Assign to change it. The prompt before them is the mean adapter's and
            runs once. In :meth:`predictive` the answer is read from the last token of each row, by its mask.
        antithetic: sample ``2k + 1`` is minus the noise of sample ``2k``.
        mode: how the noise meets the tokens: ``"weight"`` (one weight matrix a sample, the paper's equation), ``"flipout"``
            (that, with random signs for every token) or ``"token"`` (fresh noise for every token, the cheapest). A step from a
            key-value cache draws anew in mode ``"token"`` and is refused in ``"flipout"``.
        family: what is noisy: ``"low-rank"`` (the paper's posterior), or one of :mod:`tfb_ext.research.families`. A sigma found for
            one family or mode does not hold for another.
        search: summary of the search that chose sigma, kept in the saved file.
        by: what sigma was searched by, ``"samples"`` or ``"linear"`` (:meth:`gaussian`); ``None`` where it was set by hand, which says
            that it holds for both. It is not the best sigma of the other, so a prediction by that warns.
        searched_on: :attr:`base_kind` of the model that sigma was searched on; ``None`` where it was set by hand. A prediction on
            another warns.
        guard: whether the first context at a depth compares the model with separate passes, see :mod:`tfb_ext.forward.guard`.
    """

    def __init__(
        self,
        model: PeftModel,
        name: str,
        anatomy: Anatomy,
        modules: dict[str, Any],
        *,
        depth: Depth,
        span: Span,
        sigma: float | None,
        seed: int,
        antithetic: bool,
        mode: str,
        family: str,
        guard: bool,
    ) -> None:
        self.model, self.name, self.anatomy = model, name, anatomy
        self.family, self.mode = family, mode
        self.seed, self.antithetic = check_seed(seed), antithetic
        self.search: dict[str, Any] | None = None
        self.by: By | None = None
        self.searched_on: str | None = None
        self._sigma = None if sigma is None else check_sigma(sigma)
        self.attached = Attached(model, name, anatomy, modules, family, self)
        self.guard, self._guard = guard, Guard(self.attached)
        self._sigma_scalings = None if sigma is None else self.attached.scalings()
        self.open_context: tuple[int, Predictive] | None = None
        try:
            self.depth, self.span = depth, span
        except BaseException:
            self.attached.detach()
            raise

    @property
    def sigma(self) -> float | None:
        return self._sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._sigma, self.by, self.searched_on = check_sigma(value), None, None
        self._sigma_scalings = self.attached.scalings()

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
        self.first = self.first_random_block(value)
        self._depth: int | str = self.depth_name(self.first)

    @property
    def span(self) -> int | str:
        return self._span

    @span.setter
    def span(self, value: Span) -> None:
        self._span: int | str = span_name(self.span_tokens(value))

    @property
    def place(self) -> Place:
        """What is random, as numbers: the first random block and the last tokens."""
        return Place(self.first, span_tokens(self.span))

    def depth_name(self, first: int) -> int | str:
        """The depth whose first random block is ``first``, as :attr:`depth` spells it."""
        total = len(self.anatomy.blocks)
        return "head" if first == total else "all" if first == 0 else total - first

    @property
    def layers(self) -> tuple[str, ...]:
        """Canonical names of the layers that have a posterior, the ones below the first random block included."""
        return tuple(p.name for p in self.posteriors)

    @property
    def posteriors(self) -> tuple[LayerPosterior, ...]:
        return self.attached.posteriors

    @property
    def random_layers(self) -> tuple[str, ...]:
        """Names of the layers that are random at the present depth."""
        return self.random_layers_at(self.depth)

    def random_layers_at(self, depth: Depth) -> tuple[str, ...]:
        """Names of the layers that are random at ``depth``, as :meth:`first_random_block` takes it."""
        first = self.first_random_block(depth)
        return tuple(v.name for v in self.attached.updates if v.block >= first)

    def first_random_block(self, depth: Depth) -> int:
        """Index of the lowest random block for ``depth``.

        Args:
            depth: number of blocks from the top, a fraction of them (rounded, at least one), ``"all"`` or ``"head"``.

        Raises:
            ValueError: outside the model, or nothing of the adapter lies that high.
        """
        blocks = [update.block for update in self.attached.updates]
        return first_random_block(depth, len(self.anatomy.blocks), blocks, self.name)

    def span_tokens(self, span: Span) -> int | None:
        """Random tokens of ``span`` up to the position that an answer is read from; ``None`` for all.

        Raises:
            ValueError: no span, or one that the family does not have.
        """
        tokens = span_tokens(span)
        if tokens is not None and self.family == "full-rank":
            raise ValueError(
                f"span is {span!r} with the family 'full-rank', whose noise is of whole rows, expected span='all'. Fix: the family "
                "'low-rank' or 'constant', or span='all'"
            )
        return tokens

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
        given: Any = self.scale(by="samples") if sigma is None else sigma
        mirrored = self.antithetic if antithetic is None else antithetic
        return make_batch(samples, given, self.seed, mirrored, check_mode(mode or self.mode, self.family), self.family)

    def scale(self, sigma: float | None = None, by: By | None = None) -> float:
        """``sigma``, or the adapter's own; a ``ValueError`` if there is none or it is no finite number above 0.

        ``by``: what its user predicts by; a warning if the adapter's own was searched by the other.
        """
        if sigma is not None:
            return check_sigma(sigma)
        if self.sigma is None:
            raise ValueError(
                f"adapter {self.name!r} has no sigma yet; run tfb_ext.search_sigma(adapter, anchors), set adapter.sigma, or "
                "pass sigma="
            )
        if by is not None and self.by not in (by, None):
            warnings.warn(
                f"sigma: got {self.sigma:.4g}, searched by={self.by!r}, expected one searched by={by!r}, as this prediction is. Fix: "
                f"search_sigma(adapter, anchors, by={by!r}), or say that it holds by adapter.sigma = or sigma=",
                stacklevel=4,
            )
        if by is not None and self.searched_on is not None and self.searched_on != self.base_kind:
            warnings.warn(
                f"sigma: got {self.sigma:.4g}, searched on base weights {self.searched_on!r}, expected one searched on {self.base_kind!r}, as "
                "this model's are. Fix: search_sigma on this model, or say that it holds by adapter.sigma = or sigma=",
                stacklevel=4,
            )
        return self.sigma

    def refresh(self) -> None:
        """Rebuild the posterior of the adapter's weights as they are now, after training, loading or writing to them.

        The search's summary is dropped. Sigma can still be used, but is not saved before it is set or searched again.

        Raises:
            SamplingError: inside a sampling context, or after :meth:`unload`.
            UnsupportedModelError: a layer is gone, or its weights cannot carry a posterior. The old posterior stays then.
        """
        if contexts.is_open(self.attached) or not self.attached.is_attached:
            raise SamplingError(
                "refresh() inside a sampling context or after unload(). Fix: leave the with block first"
            )
        self.attached.refresh()
        self.search, self._sigma_scalings = None, None

    def gaussian(self, data: Data, *, batch_size: int | None = None, progress: bool = False) -> Gaussian:
        """The outputs of every item of ``data`` as a Gaussian, to first order in sigma: the predictive without samples, for every sigma.

        ``Cov(z_c, z_d) = sigma^2 K_cd`` with ``K`` from one run of the mean adapter and one backward pass an output, over the random
        layers and tokens (:attr:`depth`, :attr:`span`), see :mod:`tfb_ext.forward.linear`. Of an item with more than 64 classes the
        most probable 64 vary. A sigma that was found with samples is not the best one here, nor the other way round.

        Args:
            data: as in :func:`tfb_ext.predict`.
            batch_size: items of a batch; chosen by the device otherwise.
            progress: show a progress bar.

        Returns:
            A :class:`~tfb_ext.prediction.gaussian.Gaussian`, whose ``predict(sigma)`` needs no model.

        Raises:
            ValueError: empty data, more than 1024 classes, or choices that are scored by their tokens.
            GuardError: samples at this depth and span are not what separate passes give.
            SamplingError: inside a sampling context, in training mode, or the adapter is merged, off or not active.
        """
        from ..prediction.gaussian import gaussian

        return gaussian(self, data, batch_size=batch_size, progress=progress)

    @property
    def base_kind(self) -> str:
        """How the base weights of the adapter's layers are quantised, such as ``"bitsandbytes nf4"``; ``"float"`` where they are not."""
        return ", ".join(sorted({base_kind(module) for module in self.attached.modules.values()}))

    @property
    def is_sampling(self) -> bool:
        """Whether a context of any kind is open."""
        return self.attached.state.batch is not None

    def unload(self) -> PeftModel:
        """Take the posterior off; the PEFT model is what it was before. Returns it."""
        if contexts.is_open(self.attached):
            raise SamplingError("unload() inside a sampling context; leave the with block first")
        self.attached.detach()
        return self.model

    def save_pretrained(self, folder: str | Path) -> Path:
        """Save the adapter as PEFT does with ``tfb_config.json`` beside it, all of it or nothing. Returns that folder.

        As in PEFT, an adapter that is not called ``default`` goes into a subfolder of its name. Other files there stay.

        Raises:
            OSError: it cannot be written.
        """
        return save(
            self, Path(folder), certified=self.sigma is None or self._sigma_scalings == self.attached.scalings()
        )

    def fingerprint(self, version: int = FORMAT_VERSION) -> str:
        """SHA-256 of the adapter's A, B and bias as float32 and of the scaling: sigma was chosen for these and no others.

        ``version`` is that of ``tfb_config.json``; before 3 the bias and the scaling were not part of it.
        """
        return fingerprint(self.attached, version)

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
        if self.mode != "weight":
            way = (
                "set adapter.mode = 'weight'"
                if self.family != "full-rank"
                else "use the family 'low-rank' or 'constant'"
            )
            raise ValueError(f"samples of mode {self.mode!r} are no weights; {way}")
        posterior = self.posterior(name)
        batch = self.batch([sample], sigma)
        rank, n = posterior.mean.shape
        noise = ops.noise(rank, n, self.seed, posterior.layer, sample, torch.device("cpu"), self.antithetic)
        return posterior.basis, posterior.mean + batch.sigma[0] * noise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, also one by pickle, is this posterior on the copied layers, with all that is known of it."""
        self.__dict__.update(state)
        if self.attached.is_attached:
            self.attached.attach(self)

    def __repr__(self) -> str:
        sigma = "not searched yet" if self.sigma is None else f"{self.sigma:.4g}"
        return (
            f"BayesianAdapter({self.name!r}, sigma={sigma}, depth={self.depth!r} of {len(self.anatomy.blocks)} blocks, "
            f"{len(self.random_layers)} random of {len(self.layers)} layers, seed={self.seed}, antithetic={self.antithetic}"
            f"{'' if self.span == 'all' else f', span={self.span!r}'}"
            f"{'' if self.mode == 'weight' else f', mode={self.mode!r}'}"
            f"{'' if self.family == 'low-rank' else f', family={self.family!r}'})"
        )
