"""The whole search for sigma, ours against the authors' (``bench/official.py``), on a Llama-3.1-8B shape.

Random bfloat16 weights, r = 8 on all seven linear layers, 500 anchors of 128 random tokens, whose classes are four label
tokens and whose pseudo-labels are the mean adapter's predictions; ten samples. Theirs: a baseline pass and five steps, always
through the whole model. Ours: the same six evaluations (``bisect``) with all blocks random and with the upper quarter, and
the same two with what the search can leave out (``root``, ``early_stop``), which must find the full search's sigma to a step
of its grid. The same six evaluations once more with about as many rows at once as theirs, for the memory. And both forms with
samples that differ on the answer alone (span "answer"), whose prompts run once for all sigmas.

Every step of theirs is the same work, so two are timed on some of the anchors and the rest is counted: the passes grow with
the anchors, the decompositions of B do not. Their batch is the faster of two sizes.

    python -m pytest bench/test_search.py --benchmark-json=search.json     on a GPU with 60 GiB free
    TFB_BENCH_TINY=1 python -m pytest bench/test_search.py                 a toy of the same structure, also on the CPU
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch

import tfb_ext
from tfb_ext import search_sigma
from tfb_ext.data import Encoded
from tfb_ext.search import SigmaSearch

from .check import check_fused
from .llama import LLAMA_8B, TINY, Shape, activate, add_adapters, build, lora_layers
from .official import HIGH, LOW, STEPS, OfficialResult, official_adapter, official_search, pseudo_nll
from .record import environment
from .timing import clock, event_clock, spread
from .versus import COMMAND

SOURCE = "bench/test_search.py"
TOY = os.environ.get("TFB_BENCH_TINY") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What is random: depth and span.
PLACES: dict[str, tuple[float | str, str]] = {
    "all": ("all", "all"),
    "quarter": (0.25, "all"),
    "span": ("all", "answer"),
    "linear": ("all", "answer"),
}
# The six evaluations; what of them the search can leave out; the six in small batches.
FORMS = ("full", "early", "small")
CASES = [
    (place, form)
    for form in FORMS
    for place in PLACES
    if (place, form) != ("span", "small") and (place != "linear" or form == "full")
]
CONFIDENCE = 0.99
# Any four tokens will do: the weights are random.
LABEL_TOKENS, LABELS = (10, 20, 30, 40), ("a", "b", "c", "d")
# Off the points that bisection tries, and near the middle of the bracket.
CROSSING = 0.4
# A smaller change of the NLL there would drown in the noise of ten samples and of bfloat16: the bracket moves up.
LEAST_CHANGE = 0.02
WIDEST = 64

pytestmark = [
    pytest.mark.skipif(
        not (TOY or torch.cuda.is_available()), reason="torch sees no CUDA device; TFB_BENCH_TINY=1 tries a toy"
    ),
    *([pytest.mark.benchmark(timer=event_clock)] if torch.cuda.is_available() else []),
]


@dataclass(frozen=True)
class Load:
    """How much is searched, and how much of the authors' search is timed.

    Attributes:
        anchors, tokens, samples: of every search; tokens an anchor.
        probed: anchors from which the tolerance is taken.
        timed_anchors, timed_steps: of theirs.
        batch_sizes: of theirs, of which the faster is taken.
        small_batch: anchors at once of ours where memory counts.
    """

    shape: Shape
    anchors: int
    tokens: int
    samples: int
    probed: int
    timed_anchors: int
    timed_steps: int
    batch_sizes: tuple[int, ...]
    small_batch: int


FULL = Load(LLAMA_8B, 500, 128, 10, probed=32, timed_anchors=128, timed_steps=2, batch_sizes=(8, 32), small_batch=4)
SMALL = Load(TINY, 24, 16, 4, probed=16, timed_anchors=16, timed_steps=2, batch_sizes=(4, 8), small_batch=2)


@dataclass(frozen=True)
class Rule:
    """Bracket and relative tolerance of the NLL (two-sided); the crossing is inside the bracket."""

    low: float
    high: float
    tolerance: float

    @property
    def step(self) -> float:
        """Width of the bracket after the last halving."""
        return (self.high - self.low) / 2**STEPS


class Setting:
    """One model with the same random adapter twice: ours, Bayesian, and theirs."""

    def __init__(self, load: Load, device: torch.device = DEVICE) -> None:
        for span in sorted({span for _, span in PLACES.values()}):
            check_fused(load.shape, "all", device, span=span).require()
            release()
        self.load = load
        self.device = device
        names = {"ours": torch.bfloat16, "theirs": torch.bfloat16}
        self.peft = add_adapters(build(load.shape, load.shape.blocks, device), "all", names)
        self.adapter = tfb_ext.bayesianize(self.peft, "ours", antithetic=False)
        modules: list[Any] = lora_layers(self.peft, self.adapter.layers)
        for module in modules:
            for part in (module.lora_A, module.lora_B):
                part["theirs"].weight.data.copy_(part["ours"].weight)
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(2, load.shape.vocabulary, (load.anchors, load.tokens), generator=generator).tolist()
        self.anchors = Encoded(tokens, [None] * load.anchors, LABEL_TOKENS, LABELS, pad_id=0)
        self.rules: dict[str, Rule] = {}
        self.found: dict[str, SigmaSearch] = {}

    def rule(self, place: str) -> Rule:
        """A tolerance that a probe of few anchors says is crossed inside the bracket, once for each place."""
        if place not in self.rules:
            self.rules[place] = self._probe(place)
        return self.rules[place]

    def _probe(self, place: str) -> Rule:
        activate(self.peft, "ours")
        self.adapter.depth, self.adapter.span = PLACES[place]
        few = self.anchors.select(range(self.load.probed))
        mean = tfb_ext.predict(self.adapter, few, 0).probabilities
        labels = mean.argmax(dim=-1)
        base = pseudo_nll(mean, labels)
        factor = 1
        while factor <= WIDEST:
            low, high = factor * LOW, factor * HIGH
            sampled = tfb_ext.predict(self.adapter, few, self.load.samples, sigma=low + CROSSING * (high - low))
            change = abs(pseudo_nll(sampled.probabilities, labels) - base) / base
            if change >= LEAST_CHANGE:
                return Rule(low, high, change)
            factor *= 2
        raise RuntimeError(f"sigma = {high:g} changes the NLL by {change:.2%}, expected at least {LEAST_CHANGE:.0%}")

    def search(self, place: str, form: str) -> SigmaSearch:
        rule = self.rule(place)
        depth, span = PLACES[place]
        activate(self.peft, "ours")
        how: dict[str, Any] = {"method": "bisect", "steps": STEPS}
        if form == "early":
            how = {"method": "root", "early_stop": CONFIDENCE}
        if place == "linear":  # the default search: the largest sigma that changes 1 % of the answers, wherever it is
            return search_sigma(
                self.adapter, self.anchors, by="linear", depth=depth, span=span, progress=False, apply=False
            )
        found = search_sigma(
            self.adapter, self.anchors, recipe="paper", metric="nll", tolerance=rule.tolerance, bound="two-sided",
            bracket=(rule.low, rule.high), samples=self.load.samples, depth=depth, span=span, progress=False,
            apply=False, batch_size=self.batch_size(form), **how,
        )  # fmt: skip
        if form == "full":
            self.found[place] = found
        return found

    def batch_size(self, form: str) -> int | None:
        """Anchors at once of ours; ``None``: as memory allows."""
        return self.load.small_batch if form == "small" else None

    def full(self, place: str) -> SigmaSearch:
        """The full search at this place: the one that was timed, or run now."""
        return self.found.get(place) or self.search(place, "full")

    @cached_property
    def official_batch_size(self) -> int:
        """The faster one of two; on the way, the two sides' mean adapters are compared and their kernels warmed up."""
        few = self.anchors.select(range(self.load.probed))
        activate(self.peft, "ours")
        ours = tfb_ext.predict(self.adapter, few, 0).probabilities
        activate(self.peft, "theirs")
        now, seconds = clock(self.device), {}
        with official_adapter(self.peft, "theirs", 0) as authors:
            theirs = authors.probabilities(authors.batches(few, self.load.batch_sizes[0])).cpu()
            authors.decompose(LOW)
            for size in self.load.batch_sizes:
                batches = authors.batches(few, size)
                authors.probabilities(batches[:1])
                start = now()
                authors.probabilities(batches, 2)
                seconds[size] = now() - start
        labels = ours.argmax(dim=-1)
        nll = pseudo_nll(ours, labels), pseudo_nll(theirs, labels)
        if not abs(nll[0] - nll[1]) <= 0.05 * nll[0]:
            raise RuntimeError(f"the mean adapter's NLL is {nll[0]:.4f} with ours and {nll[1]:.4f} with theirs")
        return min(seconds, key=lambda size: seconds[size])

    @cached_property
    def official(self) -> OfficialResult:
        rule, size = self.rule("all"), self.official_batch_size
        activate(self.peft, "theirs")
        return official_search(
            self.peft, "theirs", self.anchors.select(range(self.load.timed_anchors)), low=rule.low, high=rule.high,
            steps=self.load.timed_steps, samples=self.load.samples, batch_size=size,
        )  # fmt: skip

    def facts(self, place: str, form: str, found: SigmaSearch, seconds: list[float]) -> dict[str, Any]:
        """The row of a search that took ``seconds`` in each of its rounds.

        ``value`` and ``baseline``, seconds of ours and of theirs; ``ratio`` = baseline / value and its ``spread`` over the
        rounds of ours and the timed steps of theirs; ``sigma``, and ``sigma_full`` of the full search at the same depth and span.
        """
        load, rule, official = self.load, self.rule(place), self.official
        baseline, least, most = official.seconds_of(STEPS, load.anchors)
        value, fastest, slowest = spread(seconds)
        row = {
            "case": "linear_search" if place == "linear" else f"search_{place}" + f"_{form}" * (form != "full"),
            "of": f"the authors' search: a baseline pass and {STEPS} steps of {load.samples} sequential flipout passes",
            "unit": "s",
            "value": value,
            "baseline": baseline,
            "ratio": baseline / value,
            "spread": [least / slowest, most / fastest],
            "rounds": len(seconds),
            "sigma": found.sigma,
            "sigma_full": found.sigma if place == "linear" else self.full(place).sigma,
            "grid_step": rule.step,
            "bracket": [rule.low, rule.high],
            "metric": found.metric,
            "tolerance": found.tolerance,
            "method": found.method,
            "early_stop": found.early_stop,
            "evaluations": len(found.evaluations),
            "anchors_seen": [e.items for e in found.evaluations],
            "batch_size": self.batch_size(form),
            "depth": found.depth,
            "span": found.span,
            "tokens_through_random_blocks": found.tokens,
            "anchors": load.anchors,
            "tokens": load.tokens,
            "samples": found.samples,
            "baseline_samples": load.samples,
            "steps": STEPS,
            "steps_timed": load.timed_steps,
            "anchors_timed": load.timed_anchors,
            "baseline_batch_size": self.official_batch_size,
            "baseline_pass_seconds": official.seconds_baseline,
            "baseline_step_seconds": list(official.seconds_per_step),
            "baseline_decompose_seconds": list(official.seconds_decompose),
        }
        if self.device.type == "cuda":
            row["baseline_peak_gib"] = official.peak_bytes / 2**30
        return row | environment(self.device, COMMAND.format(SOURCE))


def release() -> None:
    """Give back what a dropped model held: modules and hooks refer to each other, so they wait for the collector."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def require_crossing(found: SigmaSearch, rule: Rule) -> None:
    """Raise unless the tolerance was held and violated inside the bracket: else the search did not have to look."""
    held = {bool(e.satisfied) for e in found.evaluations}
    if held != {True, False} or not rule.low < found.sigma < rule.high:
        raise RuntimeError(f"no crossing between {rule.low:g} and {rule.high:g}:\n{found}")


def require(holds: bool, found: SigmaSearch) -> None:
    if not holds:
        raise RuntimeError(f"not a search:\n{found}")


def require_same(found: SigmaSearch, full: SigmaSearch, rule: Rule) -> None:
    """Raise unless the two searches' sigmas are at most a step of the full search's grid apart."""
    if not abs(found.sigma - full.sigma) <= rule.step * (1 + 1e-9):
        raise RuntimeError(
            f"the early search found sigma = {found.sigma:.5g}, the full one {full.sigma:.5g}, more than a step of "
            f"{rule.step:.2g} apart\n{found}\n{full}"
        )


@pytest.fixture(scope="module")
def setting() -> Iterator[Setting]:
    yield Setting(SMALL if TOY else FULL)
    release()


@pytest.mark.parametrize(("place", "form"), CASES)
def test_search(setting: Setting, benchmark: Any, place: str, form: str) -> None:
    rule = setting.rule(place)
    results: list[SigmaSearch] = []
    peaks: list[float] = []

    def setup() -> None:
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def run() -> None:
        results.append(setting.search(place, form))

    # Short ones are repeated; the full search of all tokens takes a minute and a half, and the same noise in every round.
    rounds = 3 if place in ("span", "linear") or (place, form) == ("quarter", "early") else 1
    warmup = int(place == "linear")  # the first meets shapes that the device has not seen
    benchmark.pedantic(run, setup=setup, warmup_rounds=warmup, rounds=rounds)
    if setting.device.type == "cuda":
        peaks.append(torch.cuda.max_memory_allocated() / 2**30)
    found = results[-1]
    if place != "linear":  # whose sigma lies elsewhere
        require_crossing(setting.full(place), rule)
    require(found.satisfied and len(found.evaluations) > 2, found)
    if form != "full":
        require_same(found, setting.full(place), rule)
    if benchmark.stats is None:  # --benchmark-disable: it ran, nothing was timed
        return
    row = setting.facts(place, form, found, list(benchmark.stats.stats.data))
    benchmark.extra_info |= row | ({"peak_gib": peaks[0]} if peaks else {})
    low, high = row["spread"]
    print(f"\n{row['case']}: {row['ratio']:.2f} ({low:.2f} to {high:.2f}) times faster than {row['of']}", flush=True)
