"""Everything that the study predicts with one adapter."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tfb_ext
from tfb_ext.adapters.adapter import BayesianAdapter
from tfb_ext.adapters.depth import span_tokens

from . import methods
from .data import Parts
from .methods import Cost, Kept, Questions, measured
from .study import Draw, Search, Study, Unit


class UnitRun:
    """Everything that is predicted with one adapter.

    Attributes:
        kept: row name -> prediction.
        rows: what each row is: method, recipe, depth, span, samples, antithetic, mode, sigma, and its cost where it had a call of
            its own (rows made of a larger call's first samples have none).
        searches: each search's own record.
        spread: see ``monte_carlo``.
    """

    def __init__(self, study: Study, unit: Unit, model: Any, parts: Parts, device: torch.device) -> None:
        self.study, self.unit, self.model, self.parts, self.device = study, unit, model, parts, device
        self.questions = Questions.of(parts)
        self.kept: dict[str, Kept] = {}
        self.rows: list[dict[str, Any]] = []
        self.searches: list[dict[str, Any]] = []
        self.spread: dict[str, Any] | None = None

    def add(
        self,
        samples: Tensor,
        cost: Cost | None,
        method: str,
        number: int,
        whole: bool = True,
        information: Tensor | None = None,
        **facts: Any,
    ) -> None:
        """A row out of per-sample probabilities; ``whole``: more will be made of it, see ``Kept``."""
        name = str(len(self.rows))
        self.kept[name] = self.questions.keep(samples, whole, information)
        nothing = dict.fromkeys(("recipe", "depth", "antithetic", "mode", "sigma")) | {"span": "all"}
        spent = asdict(cost) if cost is not None else dict.fromkeys(("seconds", "peak_gib"))
        self.rows.append({"name": name, "method": method, "samples": number, **nothing, **facts, **spent})

    def plain(self, omega: dict[str, Tensor]) -> None:
        """The mean adapter, and what its kind is for: dropout's or BLoB's samples."""
        joined, number = self.questions.joined, self.study.samples
        self.add(*measured(self.device, lambda: methods.passes(self.model, joined, 1)), "mean", 1)
        if self.unit.member.kind == "dropout":
            with methods.dropping(self.model):
                self.add(*measured(self.device, lambda: methods.passes(self.model, joined, number)), "dropout", number)
        if omega:
            with methods.blobbing(self.model, omega):
                self.add(*measured(self.device, lambda: methods.passes(self.model, joined, number)), "blob", number)

    def laplace(self) -> None:
        from . import laplace

        parts, joined = self.parts, self.questions.joined
        found, cost = measured(self.device, lambda: laplace.predict(self.model, parts.train, parts.anchor, joined))
        self.add(found.probabilities, cost, "laplace", found.samples, prior_precision=found.prior_precision)

    def bayesian(self) -> None:
        if not self.unit.searches and not self.unit.linear:
            return
        adapter = tfb_ext.bayesianize(self.model, seed=self.unit.member.seed)
        try:
            for span in self.unit.linear:
                self.linear(adapter, span)
            with tempfile.TemporaryDirectory() as kept:
                for search in self.unit.searches:
                    self.search(adapter, search, Path(kept))
        finally:
            adapter.unload()

    def search(self, adapter: BayesianAdapter, search: Search, kept: Path) -> None:
        """``kept``: folder where searches with the same noise and targets find each other's evaluations."""
        adapter.depth, adapter.mode, adapter.antithetic = (
            search.depth,
            search.mode,
            search.recipe in ("auto", "minimum"),
        )
        adapter.span = self.parts.question if search.span == "question" else search.span
        samples = search.samples or self.study.search_samples
        rule: dict[str, Any] = {"recipe": search.recipe}
        if search.recipe == "minimum":
            rule = {"recipe": "auto", "objective": "minimum"}
        same = (
            kept / f"{search.recipe in ('auto', 'minimum')}-{search.recipe == 'official'}-{search.mode}-{samples}.json"
        )
        found = tfb_ext.search_sigma(
            adapter, self.parts.anchor, **rule, samples=samples, checkpoint=same, progress=False
        )
        self.searches.append({"mode": search.mode, "asked_depth": search.depth, **found.to_dict()})
        for draw in search.draws:
            adapter.antithetic = draw.antithetic
            self.draw(adapter, search, draw, found.seconds)
        if self.unit.spread and self.spread is None:
            self.spread = self.monte_carlo(adapter)

    def draw(self, adapter: BayesianAdapter, search: Search, draw: Draw, search_seconds: float) -> None:
        prediction, cost = measured(
            self.device, lambda: tfb_ext.predict(adapter, self.questions.joined, samples=draw.samples)
        )
        base = replace(search, draws=()) == Search("auto", self.study.depths[0], "weight", ()) and draw.antithetic
        for number in draw.prefixes:
            self.add(
                prediction.sample_probabilities[:number],
                cost if number == draw.samples else None,
                "tfb",
                number,
                whole=base and number == self.study.samples,
                recipe=search.recipe,
                depth=search.depth,
                antithetic=draw.antithetic,
                mode=search.mode,
                span=search.span,
                span_tokens=span_tokens(adapter.span),
                sigma=adapter.sigma,
                search_seconds=search_seconds,
                random_blocks=len(adapter.anatomy.blocks) - adapter.first_random_block(search.depth),
            )

    def linear(self, adapter: BayesianAdapter, span: str) -> None:
        """The prediction in closed form, at the sigma that is searched in closed form."""
        adapter.depth, adapter.mode, adapter.span = self.study.depths[0], "weight", span
        found = tfb_ext.search_sigma(adapter, self.parts.anchor, by="linear", progress=False)
        self.searches.append({"mode": "weight", "asked_depth": adapter.depth, **found.to_dict()})
        prediction, cost = measured(self.device, lambda: tfb_ext.predict(adapter, self.questions.joined, by="linear"))
        self.add(
            prediction.sample_probabilities,
            cost,
            "linear",
            0,
            information=prediction.epistemic,
            recipe=found.recipe,
            depth=self.study.depths[0],
            mode="weight",
            span=span,
            span_tokens=span_tokens(adapter.span),
            sigma=adapter.sigma,
            search_seconds=found.seconds,
        )

    def monte_carlo(self, adapter: BayesianAdapter) -> dict[str, Any]:
        """How far the mean of N samples lies from its expectation, antithetic and independent.

        S samples make S / N disjoint groups of N; the variance of the groups' means, averaged over items and classes, is an
        unbiased estimate of the squared Monte-Carlo error of one mean, whatever the expectation is. Both ways of sampling have
        the same expectation, because a mirrored draw is an exact draw.
        """
        samples, items = self.study.spread
        some = self.parts.test.select(range(min(items, len(self.parts.test))))
        result: dict[str, Any] = {"samples": samples, "items": len(some), "sigma": adapter.sigma}
        for antithetic in (False, True):
            adapter.antithetic = antithetic
            p = tfb_ext.predict(adapter, some, samples=samples).sample_probabilities.double()
            errors = {}
            for number in self.study.few:
                groups = p[: samples // number * number].unflatten(0, (-1, number)).mean(1)
                errors[str(number)] = float(groups.var(0).mean())
            result["antithetic" if antithetic else "independent"] = errors
        return result
