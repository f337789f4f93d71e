"""What a search for sigma found: every evaluation, the decision, and how sure it is."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from ..checks import check_sigma, is_number
from ..errors import ConfigError
from ..files import for_json, read_json_object, write_atomically
from .criterion import Criterion
from .records import Records, shortened


@dataclass(frozen=True)
class Evaluation:
    """The anchors at one sigma.

    An early stop leaves anchors out. Every metric is then the mean adapter's on all anchors plus the change on those seen; a
    smooth metric that the search asks for is corrected by what a sigma nearby showed on more anchors.

    Attributes:
        sigma: posterior scale; 0 is the mean adapter.
        value: the search's metric.
        standard_error: of the metric's change from the mean adapter, by bootstrap over anchors (paired).
        satisfied: whether the tolerance holds (always true for sigma 0; without a tolerance, whether NLL fell).
        confidence: share of the bootstrap's resamples whose verdict is the same.
        nll, accuracy, flips, brier: four metrics (nats; fractions; 0 to 2). All but flips are against labels, or against the
            mean adapter's own answers.
        entropy: mean entropy of the predictions, nats.
        items: anchors seen.
        depth: random blocks, as :class:`SigmaSearch`.
    """

    sigma: float
    value: float
    standard_error: float
    satisfied: bool
    confidence: float
    nll: float
    accuracy: float
    flips: float
    brier: float
    entropy: float
    items: int
    depth: int | str


@dataclass(frozen=True)
class DepthResult:
    """What the search found at one of several depths and spans.

    Attributes:
        depth, span: random blocks and tokens.
        sigma, satisfied, interval, stop: as :class:`SigmaSearch`.
        nll, accuracy, flips, entropy: of the evaluation at ``sigma``.
        score: what they are compared by: NLL, or with a tolerance minus the entropy that it bought; lower is better.
        behind: ``score`` minus that of the best, and its paired standard error over anchors.
        forwards: cost of a prediction with the search's samples, or by linear, in forwards of the plain model.
    """

    depth: int | str
    span: int | str
    sigma: float
    satisfied: bool
    interval: tuple[float, float]
    stop: str
    nll: float
    accuracy: float
    flips: float
    entropy: float
    score: float
    behind: tuple[float, float]
    forwards: float


@dataclass(frozen=True)
class SigmaSearch:
    """What a search found and how.

    Attributes:
        sigma: the chosen posterior scale.
        satisfied: whether the evaluation at ``sigma`` met the objective; if not, ``sigma`` is the lower bound (the lowest NLL
            of those tried, where no tolerance is asked for).
        confidence: share of resamples of the anchors that give the same verdict at ``sigma``.
        interval: sigmas between which the choice falls in 90 % of resamples of the anchors.
        evaluations: every sigma tried at the chosen depth, ascending.
        baseline: the mean adapter (sigma 0).
        bracket: the interval that was looked at in the end.
        by: what the anchors were predicted by, ``"samples"`` or ``"linear"``.
        samples: at every sigma; 0 by linear.
        reason: why the recipe chose this metric and objective.
        stop: why the search ended.
        depth: random blocks from the top, ``"all"`` or ``"head"``; the chosen one, if there was a choice.
        span: random tokens, ``"all"``, ``"answer"`` or a number of last ones; the chosen one. Sigma holds in no other.
        depths: what was found at each depth and span, if there was a choice, the deepest first.
        mode: noise mode of the search; sigma holds in no other.
        seconds, tokens: wall time, and tokens times samples that went through the random blocks.
        records: what every anchor gave at every sigma, for :func:`~tfb_ext.search_sigma` to go on from; ``None`` after loading
            a file without it.
    """

    sigma: float
    satisfied: bool
    confidence: float
    interval: tuple[float, float]
    evaluations: tuple[Evaluation, ...]
    baseline: Evaluation
    by: str
    recipe: str
    metric: str
    tolerance: float
    bound: str
    objective: str
    method: str
    bracket: tuple[float, float]
    reason: str
    stop: str
    samples: int
    antithetic: bool
    mode: str
    seed: int
    depth: int | str
    span: int | str
    depths: tuple[DepthResult, ...]
    anchors: int
    labelled: bool
    early_stop: float | None
    seconds: float
    tokens: int
    records: Records | None = field(default=None, repr=False, compare=False)

    def _mark(self, found: DepthResult) -> str:
        return _CHOSEN if (found.depth, found.span) == (self.depth, self.span) else ""

    @property
    def chosen(self) -> Evaluation | None:
        """The evaluation at ``sigma``."""
        return next((e for e in self.evaluations if e.sigma == self.sigma), None)

    @property
    def criterion(self) -> Criterion:
        per_item = "official" in (self.recipe, self.method)
        return Criterion(self.metric, self.tolerance, self.bound, self.objective, self.anchors, per_item)

    @property
    def band(self) -> tuple[float, float]:
        """Values of the metric that satisfy the tolerance."""
        return self.criterion.band(self.baseline.value)

    @property
    def predicted(self) -> str:
        """What the anchors were predicted by, in words."""
        return "linear" if self.by == "linear" else f"{self.samples} samples"

    @property
    def rule(self) -> str:
        """The criterion in words."""
        return str(self.criterion)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name without the records, ready for JSON, which has no NaN: such numbers are ``None``."""
        found: dict[str, Any] = for_json(asdict(replace(self, records=None)))
        del found["records"]
        return found

    def save(self, path: str | Path) -> None:
        """Write the result and, where they are known, its records as JSON, whole or not at all.

        ``search_sigma(..., checkpoint=path)`` goes on from such a file: what it holds is not computed again.
        """
        document = self.to_dict() | {"records": None if self.records is None else self.records.to_dict()}
        write_atomically(Path(path), json.dumps(document, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SigmaSearch:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: the file cannot be read, or is no finished search.
        """
        advice = "restore it, or search again"
        raw = read_json_object(Path(path), advice)
        if raw.get("sigma") is None:
            raise ConfigError(
                f"{path} holds no finished search; give it to search_sigma(..., checkpoint={str(path)!r}) to go on with it"
            )
        try:
            depths = raw.get("depths")
            raw.setdefault("by", "samples")  # of a file from before there was another
            for part in (raw, *(depths if isinstance(depths, list) else ())):
                if isinstance(part, dict):
                    part.setdefault("span", "all")  # of a file from before there were spans
            records = raw.pop("records", None)
            found: SigmaSearch = _restored(cls, raw, "the search")
            check_sigma(found.sigma)
            return replace(found, records=None if records is None else Records.from_dict(records))
        except ValueError as error:
            raise ConfigError(f"{path} is no search for sigma: {error}; {advice}") from None

    def plot(self, path: str | Path) -> None:
        """Draw the metric against sigma with the tolerance band and the chosen sigma (PNG; needs matplotlib)."""
        from ..app.pictures import search_trace

        search_trace(self, path)

    def summary(self) -> dict[str, Any]:
        """The part that is worth keeping in ``tfb_config.json``."""
        keep = "by recipe metric tolerance bound objective method mode span samples anchors labelled reason stop confidence".split()
        kept: dict[str, Any] = for_json({name: getattr(self, name) for name in keep})
        return kept | {"interval": for_json(list(self.interval))}

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            f"sigma = {self.sigma:.4g}   ({self.recipe}: {self.rule}; {self.method}, {self.predicted}, "
            f"{self.anchors} anchors, depth {self.depth}, span {self.span}, {self.seconds:.1f} s)",
            f"  why:  {self.reason}",
            f"  stop: {self.stop}",
            f"  sure: {_percent(self.confidence)} of resampled anchors give the same verdict; 90 % of them choose a sigma from "
            f"{low:.3g} to {high:.3g}",
            f"  {'sigma':>10} {'nll':>9} {'accuracy':>9} {'flips':>7} {'anchors':>8}   meets the rule",
        ]
        for e in (self.baseline, *self.evaluations):
            verdict = f"{'yes' if e.satisfied else 'no'} ({_percent(e.confidence)})" if e.sigma else ""
            verdict += _CHOSEN if 0 < e.sigma == self.sigma else ""
            numbers = f"{e.sigma:>10.4g} {e.nll:>9.4f} {e.accuracy:>9.3f} {e.flips:>7.3f} {e.items:>8}"
            lines.append(f"  {numbers}   {verdict}".rstrip())
        if self.depths:
            names = f"{'depth':>10} {'span':>7} {'sigma':>9} {'nll':>9} {'accuracy':>9} {'flips':>7} {'entropy':>8} {'forwards':>9}"
            lines.append(f"  {names}   behind")
        for d in self.depths:
            lines.append(
                f"  {d.depth!s:>10} {d.span!s:>7} {d.sigma:>9.4g} {d.nll:>9.4f} {d.accuracy:>9.3f} {d.flips:>7.3f} {d.entropy:>8.4f} "
                f"{d.forwards:>9.2f}   {d.behind[0]:.4f} +- {d.behind[1]:.4f}{self._mark(d)}"
            )
        return "\n".join(lines)


_CHOSEN = "   <- chosen"


def _percent(share: float) -> str:
    return "?" if math.isnan(share) else f"{share:.0%}"


def _restored(kind: type, raw: Any, name: str) -> Any:
    """The dataclass ``kind`` from the JSON of its fields, each of the type that it is declared with."""
    wanted = {field: hint for field, hint in get_type_hints(kind).items() if hint != (Records | None)}
    if not isinstance(raw, dict) or set(raw) != set(wanted):
        given = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{name} has {given}, expected the fields {sorted(wanted)}")
    return kind(**{field: _as(hint, raw[field], f"{name}: {field}") for field, hint in wanted.items()})


def _as(hint: Any, value: Any, name: str) -> Any:
    """``value`` as a field of that type; JSON has no NaN and no tuples."""
    kinds = get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return _restored(hint, value, name)
    if hint is float and (value is None or is_number(value)):
        return math.nan if value is None else float(value)
    if hint is not float and type(value) in (kinds if isinstance(hint, UnionType) else (hint,)):
        return value
    if kinds and isinstance(value, list):
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        if len(kinds) == len(value):
            return tuple(_as(kind, v, name) for kind, v in zip(kinds, value, strict=True))
    raise ValueError(f"{name} is {shortened(value)}, expected {getattr(hint, '__name__', hint)}")
