"""What the study consists of: which adapters are trained, and what is predicted with each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .bank import KINDS, Member, Recipe, members
from .data import Sizes

Depth = str | float
# The spans, and the samples each is searched and predicted with; "question" is the fixed last words of a data set's prompts.
QUANTISED = ("nf4", "int8")
SPANS = (("answer", 10), ("answer", 40), ("question", 40))


@dataclass(frozen=True)
class Draw:
    """One call of ``predict``; every number in ``prefixes`` is a row of the study, made of the call's first samples.

    Sample k is the same adapter in every call, so the first four samples of ten are exactly what a call for four gives.
    """

    samples: int
    antithetic: bool
    prefixes: tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """One sigma: how it is searched, and the predictions made with it.

    Attributes:
        recipe: of ``search_sigma``; ``minimum`` is its objective of that name with the recipe ``auto``.
        depth, mode, span: of the posterior; the span ``"question"`` is ``Parts.question`` tokens.
        draws: the predictions.
        samples: posterior samples at each sigma; None: the study's ``search_samples``.
    """

    recipe: str
    depth: Depth
    mode: str
    draws: tuple[Draw, ...]
    span: str = "all"
    samples: int | None = None


@dataclass(frozen=True)
class Unit:
    """All predictions of one adapter, the piece of work that is done or not done.

    Attributes:
        stop: ``overfitted`` (the end of its training) or ``early`` (its epoch of the lowest validation NLL).
        searches: the sigmas; empty for adapters that are only a baseline.
        part: of what is predicted with the adapter. ``laplace``: its Laplace approximation and nothing else, which takes as long as
            many other methods together, and a library that those do without. ``spans``: samples that differ at the last tokens
            alone, and what they are compared with. ``linear``: predictions in closed form. ``nf4`` and ``int8``: the adapter as it is
            and the base setting on a base model that bitsandbytes quantised. Empty: all the rest.
        spread: whether the Monte-Carlo error of antithetic and independent samples is measured on it.
        linear: spans that are predicted in closed form, without samples.
    """

    dataset: str
    targets: str
    stop: str
    member: Member
    searches: tuple[Search, ...]
    part: str
    spread: bool
    linear: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """How the base model's weights are quantised for it; empty: not."""
        return self.part if self.part in QUANTISED else ""

    @property
    def bank(self) -> str:
        return f"{self.dataset}-{self.targets}"

    @property
    def name(self) -> str:
        return f"{self.bank}-{self.stop}-{self.member.kind}-{self.member.seed}{f'-{self.part}' if self.part else ''}"


@dataclass(frozen=True)
class Study:
    """The whole study; the default is the one that is reported.

    Attributes:
        datasets: in the order of importance; ``late`` ones come after everything of the others.
        depths: random blocks, beside ``"head"``, which adapters on the head get too.
        samples: the base setting's; ``few``: the counts at every depth that is drawn twice, antithetic and independent;
            ``numbers``: those of the base setting itself. They hold what costs at most two forwards: 2 samples of all blocks, 5
            of a quarter, 8 of an eighth.
        search_samples: posterior samples at each sigma of a search.
        spans, spanned: the spans with their samples, and the layers of the plain adapters that they are tried on, at the first
            and the last of ``depths``' settings of ``samples`` samples beside them.
        linear: spans that adapters are predicted with in closed form, all blocks random.
        quantised: data sets whose plain adapters on the first of ``targets`` are tried on quantised base models too.
        spread: samples and test items of the measurement of the Monte-Carlo error.
        tiny: a random model of a few blocks instead of SmolLM2, to try the machinery.
    """

    datasets: tuple[str, ...] = ("headlines", "r8", "newsgroups")
    late: tuple[str, ...] = ("logiqa",)
    targets: tuple[str, ...] = ("qv", "qv_head", "all_linear")
    kinds: tuple[str, ...] = KINDS
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: Sizes = field(default_factory=Sizes)
    recipe: Recipe = field(default_factory=Recipe)
    recipes: tuple[str, ...] = ("auto", "paper", "official")
    depths: tuple[Depth, ...] = ("all", 0.5, 0.25, 0.125)
    samples: int = 10
    few: tuple[int, ...] = (2, 4, 5, 8, 10)
    numbers: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 10, 30)
    search_samples: int = 10
    spans: tuple[tuple[str, int], ...] = SPANS
    spanned: tuple[str, ...] = ("qv", "all_linear")
    linear: tuple[str, ...] = ("all", "answer")
    quantised: tuple[str, ...] = ("headlines", "newsgroups")
    spread: tuple[int, int] = (100, 200)
    laplace: bool = True
    tiny: bool = False

    @property
    def members(self) -> tuple[Member, ...]:
        return members(self.kinds, self.seeds)

    def units(self) -> list[Unit]:
        """Every unit, the most important first."""
        first, *others = self.targets
        order = [
            *self._of(self.datasets, first, "overfitted", self.kinds),
            *self._laplace(self.datasets, first, "overfitted"),
            *self._of(self.datasets, first, "early", self.kinds),
            *(unit for targets in others for unit in self._of(self.datasets, targets, "overfitted", ("mle",))),
            *self._spans("overfitted"),
            *self._spans("early"),
            *self._linear("overfitted"),
            *self._linear("early"),
            *self._quantised("overfitted"),
            *self._of(self.late, first, "overfitted", self.kinds),
            *self._laplace(self.late, first, "overfitted"),
            *(unit for targets in others for unit in self._of(self.datasets, targets, "early", ("mle",))),
            *self._of(self.late, first, "early", self.kinds),
            *self._laplace(self.datasets, first, "early"),
            *(unit for targets in others for unit in self._of(self.datasets, targets, "overfitted", KINDS[1:])),
        ]
        return [unit for unit in order if unit.member.kind in self.kinds]

    def _of(self, datasets: tuple[str, ...], targets: str, stop: str, kinds: tuple[str, ...]) -> Iterator[Unit]:
        for dataset in datasets:
            for kind in kinds:
                for seed in self.seeds:
                    yield self._unit(dataset, targets, stop, Member(kind, seed))

    def _laplace(self, datasets: tuple[str, ...], targets: str, stop: str) -> list[Unit]:
        plain = self._of(datasets, targets, stop, ("mle",)) if self.laplace else ()
        return [replace(unit, searches=(), part="laplace", spread=False) for unit in plain]

    def _spans(self, stop: str) -> list[Unit]:
        """The spans, and what they are compared with, searched in the same run: all tokens, all blocks and the fewest."""
        searches = [
            Search("auto", depth, "weight", self._draws(self.samples)) for depth in (self.depths[0], self.depths[-1])
        ]
        for span, samples in self.spans:
            searches.append(Search("auto", self.depths[0], "weight", self._draws(samples), span, samples))
        plain = (u for targets in self.spanned for u in self._of(self.datasets, targets, stop, ("mle",)))
        changed = {"searches": tuple(searches), "part": "spans", "spread": False}
        return [replace(unit, **changed) for unit in plain if self.spans]

    def _linear(self, stop: str) -> list[Unit]:
        """The closed form; where no unit of the spans has them, ten samples of all tokens beside it."""
        first, *others = self.targets
        units = [*self._of(self.datasets, first, stop, tuple(kind for kind in self.kinds if kind != "dropout"))]
        units += [u for targets in others for u in self._of(self.datasets, targets, stop, ("mle",))]
        changed = {"part": "linear", "spread": False, "linear": self.linear}
        return [replace(u, searches=() if self._spanned(u) else tuple(self._auto()), **changed) for u in units]

    def _quantised(self, stop: str) -> list[Unit]:
        plain = [*self._of(self.quantised, self.targets[0], stop, ("mle",))]
        searches = tuple(self._auto())
        return [replace(u, part=base, searches=searches, spread=False) for base in QUANTISED for u in plain]

    def _spanned(self, unit: Unit) -> bool:
        return bool(self.spans) and unit.targets in self.spanned and unit.member.kind == "mle"

    def _draws(self, samples: int) -> tuple[Draw, ...]:
        return (Draw(samples, True, (samples,)),)

    def _unit(self, dataset: str, targets: str, stop: str, member: Member) -> Unit:
        plain = member.kind == "mle"
        main = targets == self.targets[0]
        unit = Unit(
            dataset=dataset,
            targets=targets,
            stop=stop,
            member=member,
            searches=(),
            part="",
            spread=plain and main and stop == "overfitted",
        )
        if member.kind == "dropout":
            return unit
        if not plain:
            return replace(unit, searches=tuple(self._recipes() if stop == "overfitted" else self._auto()))
        if main and stop == "overfitted":
            return replace(unit, searches=tuple(self._everything(self._all(targets))))
        published = self._others("head") if "head" in self._all(targets) else []
        return replace(unit, searches=tuple(self._recipes() + self._depths(self._all(targets)[1:]) + published))

    def _all(self, targets: str) -> tuple[Depth, ...]:
        return (*self.depths, "head") if "head" in targets else self.depths

    def _auto(self) -> list[Search]:
        return [Search("auto", self.depths[0], "weight", self._draws(self.samples))]

    def _others(self, depth: Depth) -> list[Search]:
        """The published recipes as published: independent samples, the authors' code by flipout."""
        draws = (Draw(self.samples, False, (self.samples,)),)
        published = [r for r in self.recipes if r != "auto"]
        return [Search(r, depth, "flipout" if r == "official" else "weight", draws) for r in published]

    def _recipes(self) -> list[Search]:
        return self._auto() + self._others(self.depths[0])

    def _depths(self, depths: tuple[Depth, ...], everything: bool = False) -> list[Search]:
        """Antithetic samples at each depth; with ``everything`` independent ones too, and the published recipes there."""
        draws = [Draw(self.samples, antithetic, self.few) for antithetic in ((True, False) if everything else (True,))]
        searches = [Search("auto", depth, "weight", tuple(draws)) for depth in depths]
        if everything:
            searches += [search for depth in depths for search in self._others(depth)]
        return searches

    def _everything(self, depths: tuple[Depth, ...]) -> list[Search]:
        """Every factor varied around the base setting (auto, all blocks, N samples, antithetic, weight)."""
        most = max(self.numbers)
        base = tuple(Draw(most, antithetic, self.numbers) for antithetic in (True, False))
        flipout = (Draw(self.samples, True, (self.samples,)), Draw(self.samples, False, (self.samples,)))
        return [
            Search("auto", depths[0], "weight", base),
            Search("auto", depths[0], "flipout", flipout),
            *(Search("minimum", depth, "weight", self._draws(self.samples)) for depth in depths[:3]),
            *self._others(depths[0]),
            *self._depths(depths[1:], everything=True),
        ]


SMALL = Study(
    datasets=("headlines",),
    late=(),
    targets=("qv", "qv_head"),
    seeds=(0, 1),
    sizes=Sizes(train=16, validation=8, anchor=12, test=24, stranger=8),
    recipe=Recipe(epochs=2, batch_size=4, lr=1e-2),
    depths=("all", 0.5),
    few=(2, 10),
    numbers=(1, 2, 10),
    search_samples=2,
    spans=(("answer", 2), ("question", 4)),
    spanned=("qv",),
    quantised=("headlines",),
    spread=(20, 8),
    tiny=True,
)
