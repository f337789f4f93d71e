"""From per-anchor records to verdicts by the criterion, each with its uncertainty over anchors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Place
from .criterion import Criterion
from .plan import ROOT_USED, Plan
from .records import FIELDS, MEAN_PLACE, At, Records
from .result import Evaluation

# Resamples of the anchors, fewer where there are very many anchors: their errors are small then.
RESAMPLES, RESAMPLED_NUMBERS = 1000, 20_000_000
SET_RESAMPLES = 100  # of a metric that is a function of the whole set and must be called for each
# A comparison is also settled once the amount is known to this share of the tolerance: by the square law half of it in sigma.
SETTLED_SHARE = 0.05
# Where between this and its inverse of the tolerance is used up, the root finder's next sigma lies close by.
NEAR = 0.7
# Fewer anchors than this settle nothing: the normal approximation of their mean does not hold.
SETTLING_ITEMS = 32


@dataclass(frozen=True)
class _Change:
    """The metric's change from the mean adapter at one sigma.

    ``value`` is the metric itself, ``amount`` what the tolerance bounds, ``error`` the change's standard error. ``resampled`` (R,) is
    over resamples of the anchors: the used share of the tolerance, or the change where there is none; ``None`` for one anchor.
    """

    value: float
    amount: float
    resampled: Tensor | None
    error: float


@dataclass(frozen=True)
class _Guess:
    """The mean change over all anchors, guessed from those seen, and its standard error; see ``Verdicts.guess``.

    ``control`` is a sigma judged before on more anchors, ``slope`` the change here for each unit of change there.
    """

    value: float
    error: float
    control: float | None = None
    slope: float = 0.0


class Verdicts:
    """Judges ``records``, with the mean adapter's baseline in, by a plan."""

    def __init__(self, plan: Plan, records: Records) -> None:
        self.plan = plan
        self.records = records
        self.size = len(records)
        name = plan.metric if isinstance(plan.metric, str) else ""
        self.criterion = Criterion(name, plan.tolerance, plan.bound, plan.objective, self.size, plan.per_item)
        self._changes: dict[At, _Change] = {}

    # Resamples of the anchors -----------------------------------------------------------------------------------------

    @cached_property
    def counts(self) -> Tensor:
        """(R, items) float64: how often each anchor is in each resample; the same for every sigma, so that they compare."""
        times = max(200, min(RESAMPLES, RESAMPLED_NUMBERS // max(self.size, 1)))
        drawn = torch.randint(self.size, (times, self.size), generator=torch.Generator().manual_seed(0))
        counts = torch.zeros(times, self.size, dtype=torch.float32)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        return counts.double()

    def _resampled_mean(self, values: Tensor, seen: Tensor) -> Tensor:
        counts = self.counts[:, seen]
        return counts @ values / counts.sum(dim=1).clamp_min(1)

    # Changes ----------------------------------------------------------------------------------------------------------

    def _metric(self, values: Tensor) -> Tensor:
        """(items,) the records' column that the metric is the mean of."""
        return _column({"accuracy": "right", "flips": "flip"}.get(self.criterion.metric, self.criterion.metric), values)

    def harm(self, values: Tensor) -> Tensor:
        """(items,) what each anchor adds to the change, in the direction that is worse; NaN where it was not run."""
        return self.criterion.worse * (self._metric(values) - self._metric(self.records.baseline))

    @cached_property
    def base_value(self) -> float:
        """The mean adapter's metric."""
        if callable(self.plan.metric):
            return self._custom(0.0, MEAN_PLACE, slice(None))
        return float(self._metric(self.records.baseline).mean())

    def change(self, place: Place, sigma: float) -> _Change:
        """By the records as they are when it is asked for first: a sigma's run over the anchors has ended then."""
        if (place, sigma) not in self._changes:
            of = self._custom_change if callable(self.plan.metric) else self._named_change
            self._changes[place, sigma] = of(place, sigma)
        return self._changes[place, sigma]

    def _named_change(self, place: Place, sigma: float) -> _Change:
        harm = self.harm(self.records.values[place, sigma])
        seen = ~harm.isnan()
        guess = self.guess(place, harm)
        harm, mean = harm[seen], guess.value
        value, amount = self.base_value + self.criterion.worse * mean, self.criterion.amount(mean)
        if len(harm) < 2:
            return _Change(value, amount, None, math.nan)
        drawn = self._resampled_mean(harm, seen)
        if guess.control is not None:
            other = self.harm(self.records.values[place, guess.control])
            more = ~other.isnan()
            drawn += guess.slope * (self._resampled_mean(other[more], more) - self._resampled_mean(other[seen], seen))
        bases = self._resampled_mean(self._metric(self.records.baseline)[seen], seen)
        return _Change(
            value, amount, self._used(drawn, bases) if self.criterion.tolerated else drawn, float(drawn.std())
        )

    def guess(self, place: Place, harm: Tensor) -> _Guess:
        """The mean of ``harm`` (items,), NaN where not seen, over all anchors.

        The noise is the same at every sigma, so an anchor's changes at two sigmas nearly lie on a line through all anchors. Where
        another sigma was seen on more of them, the line through the common ones says what the rest will add (the regression
        estimator of two-phase sampling; Cochran, Sampling Techniques, chapter 12). The error that is left is the scatter around
        the line. Of the plain mean and every such line the guess with the least error is taken.
        """
        seen = ~harm.isnan()
        here, count, size = harm[seen], int(seen.sum()), self.size
        mean = float(here.mean())
        if count < 2 or count == size:
            return _Guess(mean, 0.0 if count == size else math.inf)
        spread = float(here.var())
        best = _Guess(mean, math.sqrt(spread * (1 / count - 1 / size)))
        if not (self.criterion.tolerated and self.criterion.smooth) or count < SETTLING_ITEMS:
            return best
        for sigma in [s for at, s in self._changes if at == place]:
            other = self.harm(self.records.values[place, sigma])
            more = ~other.isnan()
            wider = int(more.sum())
            if wider <= count or bool((seen & ~more).any()):
                continue
            common, whole = other[seen], other[more]
            scatter = float(common.var())
            if scatter <= 0:
                continue
            slope = float(((here - mean) * (common - common.mean())).sum()) / (count - 1) / scatter
            rest = max(spread - slope**2 * scatter, 0.0) * (count - 1) / (count - 2)
            # Anchors that change more also lie further from the line.
            rest *= max(1.0, float(whole.var()) / scatter)
            error = math.sqrt(spread * (1 / wider - 1 / size) + rest * (1 / count - 1 / wider))
            if error < best.error:
                best = _Guess(mean + slope * float(whole.mean() - common.mean()), error, sigma, slope)
        return best

    def _used(self, harm: Any, base: Any) -> Tensor:
        """The used share of the tolerance in resamples."""
        allowed = torch.as_tensor(self.criterion.allowed(base))
        return torch.as_tensor(self.criterion.amount(harm) / torch.clamp(allowed, min=1e-12))

    # A metric of the caller's own -------------------------------------------------------------------------------------

    def _custom(self, sigma: float, place: Place, chosen: Any) -> float:
        assert callable(self.plan.metric)
        targets = self.records.targets[chosen]
        result = torch.as_tensor(self.plan.metric(self.records.probabilities[place, sigma][chosen], targets)).double()
        name = f"metric {self.plan.metric_name} returned"
        if result.dim() > 1 or (result.dim() == 1 and len(result) != len(targets)):
            raise ValueError(
                f"{name} a tensor of shape {tuple(result.shape)} for {len(targets)} anchors, expected one number, or one for "
                "each anchor (lower is better)"
            )
        if not result.isfinite().all():
            raise ValueError(f"{name} NaN or infinity at sigma {sigma:g}, expected finite numbers")
        return float(result.mean())

    def _custom_change(self, place: Place, sigma: float) -> _Change:
        value = self._custom(sigma, place, slice(None))
        amount = self.criterion.amount(value - self.base_value)
        if self.size < 2:
            return _Change(value, amount, None, math.nan)
        drawn = [self._custom(sigma, place, chosen) - before for chosen, before in self._custom_baselines]
        used = [float(self._used(d, before)) for d, (_, before) in zip(drawn, self._custom_baselines, strict=True)]
        return _Change(value, amount, torch.tensor(used), float(torch.tensor(drawn).std()))

    @cached_property
    def _custom_baselines(self) -> list[tuple[Tensor, float]]:
        """Resamples of the anchors, each with the mean adapter's metric on it."""
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randint(self.size, (self.size,), generator=generator) for _ in range(SET_RESAMPLES)]
        return [(chosen, self._custom(0.0, MEAN_PLACE, chosen)) for chosen in drawn]

    # Verdicts ---------------------------------------------------------------------------------------------------------

    def evaluation(self, place: Place, sigma: float, depth: int | str) -> Evaluation:
        """The verdict on one sigma; ``sigma`` 0 is the mean adapter."""
        base = self.records.baseline
        values = base if sigma == 0 else self.records.values[place, sigma]
        seen = ~values[:, 0].isnan()
        metrics = (base.mean(dim=0) + (values[seen] - base[seen]).mean(dim=0)).tolist()
        known = dict(zip(("nll", "accuracy", "flips", "brier", "entropy"), metrics, strict=True))
        if sigma == 0:
            return Evaluation(0.0, self.base_value, 0.0, True, 1.0, **known, items=self.size, depth=depth)
        change, asked = self.change(place, sigma), self.criterion
        if asked.smooth:
            known[asked.metric] = change.value
        holds = asked.holds(change.value, change.amount, self.base_value)
        confidence = math.nan
        if change.resampled is not None:
            same = ((change.resampled <= 1) if asked.tolerated else (change.resampled < 0)) == holds
            confidence = float(same.double().mean())
        items = int(seen.sum())
        return Evaluation(sigma, change.value, change.error, holds, confidence, **known, items=items, depth=depth)

    def used(self, evaluation: Evaluation) -> float:
        """The share of the tolerance that is used up."""
        return self.criterion.used(evaluation.value, self.base_value)

    def interval(self, place: Place, evaluations: list[Evaluation]) -> tuple[float, float]:
        """Sigmas between which the choice falls in 90 % of resamples of the anchors, from the sigmas that were tried."""
        tried = sorted(e.sigma for e in evaluations)
        drawn = [self.change(place, sigma).resampled for sigma in tried]
        known = [d for d in drawn if d is not None]
        if not tried or len(known) < len(drawn):
            return math.nan, math.nan
        curves = torch.stack(known, dim=1)
        sigmas = torch.tensor(tried, dtype=curves.dtype)
        if self.criterion.tolerated:
            chosen = torch.stack([_largest(sigmas, curve) for curve in curves])
        else:
            chosen = sigmas[curves.argmin(dim=1)]
        low, high = torch.quantile(chosen, torch.tensor([0.05, 0.95], dtype=chosen.dtype)).tolist()
        return low, high

    def behind(self, mine: At, other: At, score: str) -> tuple[float, float]:
        """The paired difference of ``score`` between two (place, sigma), and its standard error."""
        values, others = (_column(score, self.records.values[key]) for key in (mine, other))
        difference = others - values if score == "entropy" else values - others
        difference = difference[~difference.isnan()]
        mean = float(difference.mean())
        return mean, math.nan if len(difference) < 2 else float(difference.std() / math.sqrt(len(difference)))

    # Early stopping ---------------------------------------------------------------------------------------------------

    def settled(
        self, place: Place, values: Tensor, confidence: float, looks: int, lowest: Tensor | None = None
    ) -> bool:
        """Whether the anchors not seen yet can hardly change the verdict, or hardly the amount.

        The anchors are a finite set in random order. So the error of a mean over those seen shrinks by the square root of the
        share that is left, and by what a sigma judged before tells (``guess``). ``looks`` questions share the error
        ``1 - confidence``.

        Without a tolerance, ``lowest`` are the records of the lowest NLL so far, and settled means clearly above it.
        """
        asked = self.criterion
        harm = self.harm(values) if lowest is None else values[:, 0] - lowest[:, 0]
        seen = ~harm.isnan()
        count = int(seen.sum())
        if count == self.size or (not asked.tolerated and lowest is None):
            return count == self.size
        if count < SETTLING_ITEMS:
            return False
        guess = self.guess(place, harm)
        mean, error = guess.value, guess.error
        if asked.metric in ("flips", "accuracy"):
            # Of the first few anchors none may have changed; one that did and one that did not are added for what may come.
            share = (float(harm[seen].abs().sum()) + 1) / (count + 2)
            error = max(error, math.sqrt(share * (1 - share) * (1 / count - 1 / self.size)))
        error *= NormalDist().inv_cdf(1 - (1 - confidence) / (2 * max(looks, 1)))
        if not asked.tolerated:
            return mean > error
        allowed, amount = float(asked.allowed(self.base_value)), asked.amount(mean)
        if error <= SETTLED_SHARE * allowed:
            return True
        if abs(amount - allowed) <= error:
            return False
        # The root finder goes on from here to a sigma nearby: with the amount known here, few anchors tell it there.
        next_is_near = NEAR * allowed <= amount < ROOT_USED * allowed or allowed < amount <= allowed / NEAR
        return not (next_is_near and self.plan.method == "root" and asked.smooth)

    def gain(self, values: Tensor) -> float:
        """Mean change of NLL on the anchors seen; infinite where none was."""
        change = values[:, 0] - self.records.baseline[:, 0]
        seen = ~change.isnan()
        return float(change[seen].mean()) if seen.any() else math.inf


def _column(name: str, values: Tensor) -> Tensor:
    return values[:, FIELDS.index(name)]


def _largest(sigmas: Tensor, used: Tensor) -> Tensor:
    """Where the used share of the tolerance crosses 1 above the largest sigma that holds, linear in log sigma."""
    holds = (used <= 1).nonzero().flatten()
    last = int(holds[-1]) if len(holds) else 0
    if not len(holds) or last == len(sigmas) - 1:
        return sigmas[last]
    share = (1 - used[last]) / (used[last + 1] - used[last])
    return sigmas[last] * (sigmas[last + 1] / sigmas[last]) ** share
