"""Which samples one forward pass holds, as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_samples, check_seed, check_sigma
from ..ops import TOKEN_SEED_STEP, as_int64


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
        ``seed + tokens * TOKEN_SEED_STEP`` (mod 2**64) instead.
        """
        if isinstance(tokens, int) and not tokens:
            return self
        if isinstance(tokens, Tensor):
            tokens = tokens.clone()  # a static cache counts on in place
        later = replace(self, tokens=tokens, _tensors={}, _parts={})
        for device, (sigma, samples, seed) in self._tensors.items():
            later._tensors[device] = (sigma, samples, _seed_after(seed, tokens))
        return later

    def copy(self) -> SampleBatch:
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
        return seed + as_int64(tokens * TOKEN_SEED_STEP % 2**64) if tokens else seed
    return seed + tokens.to(seed.device) * as_int64(TOKEN_SEED_STEP)


# One group of rows that draws nothing: the mean, for the blocks below the first random one.
MEAN = SampleBatch((0.0,), (0,), 0, False)


def make_batch(samples: Any, sigma: Any, seed: int, antithetic: bool, mode: str, family: str) -> SampleBatch:
    """Row groups for samples (a count or numbers); with several sigmas one group of samples after another, the same noise in each.

    Raises:
        ValueError: a bad number, or none.
    """
    numbers = check_samples(samples)
    seed = check_seed(seed)  # here and not in a layer, where an exception would come in the middle of a forward
    scales = list(sigma) if isinstance(sigma, Sequence) and not isinstance(sigma, str) else [sigma]
    if not scales:
        raise ValueError("sigma is an empty list, expected at least one number above 0")
    scales = [check_sigma(s) for s in scales]
    return SampleBatch(tuple(s for s in scales for _ in numbers), numbers * len(scales), seed, antithetic, mode, family)
