"""The commands that answer: predict and generate."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from .options import PATH, Posterior, Predictions, check_samples, check_texts, option, options
from .pages import MEASURES, UNCERTAINTIES, Table, generation_page
from .terminal import Output, shorten, visible

if TYPE_CHECKING:
    from ..generation import Generation

_MOST_NEW_TOKENS = 2**20  # more than any model's context
# Colours by epistemic uncertainty, or standard deviation of a log probability, nats: from these values on.
_STYLES = ("", "yellow", "bold dark_orange3", "bold red")
_FROM = {"epistemic": (0.0, 0.02, 0.1, 0.3), "standard_deviation": (0.0, 0.2, 0.5, 1.0)}


@options
class Predict(Predictions, Posterior):
    """Ask: probabilities of the choices, and how much of the uncertainty is the model's own (epistemic, in nats).

    Example: tfb predict -a demo --sigma 0.05 -t $'Headline: area man wins argument\\nSarcastic:' --choices ' no| yes'
    """

    data: str | None = option(None, "JSONL file or data set; or use --text.", "--data", "-d")
    text: str | None = option(None, "One prompt; needs --choices.", "--text", "-t")
    samples: int = option(
        10, "Posterior samples; 0 for the mean adapter.", "--samples", "-n", callback=lambda n: n and check_samples(n)
    )

    def run(self) -> None:
        from ..prediction import predict
        from .evaluation import drawn

        examples = self._examples()
        loaded, bayesian = self.open(examples)
        found = predict(
            bayesian,
            self.encode(examples, loaded),
            samples=self.samples,
            by=self.by,
            adaptive=self.adaptive,
            batch_size=self.batch_size,
            progress=self.data is not None,
        )
        columns: dict[str, list[float | None]] = {name: getattr(found, name).tolist() for name in UNCERTAINTIES}
        if not found.per_sample:  # then the two parts are unknown
            columns |= {name: [None] * len(examples) for name in ("aleatoric", "epistemic")}
        answers = [found.choices[label] for label in found.labels.tolist()]
        items = [
            {
                "prompt": example.prompt,
                "prediction": answers[i],
                "probabilities": dict(zip(found.choices, found.probabilities[i].tolist(), strict=True)),
                "standard_error": found.standard_error[i].tolist(),
                **{name: values[i] for name, values in columns.items()},
                "samples_drawn": int(found.samples_drawn[i]),
            }
            for i, example in enumerate(examples)
        ]
        rows = [
            (
                shorten(item["prompt"]),
                item["prediction"].strip(),
                f"{max(item['probabilities'].values()):.1%}",
                *("n/a" if item[name] is None else f"{item[name]:.3f}" for name in columns),
            )
            for item in items
        ]
        title = f"{len(items)} items, {drawn(found)}, sigma {found.sigma:.3g} (uncertainty in nats)"
        with Output(self.json) as output:
            place = {"depth": bayesian.depth, "span": bayesian.span}
            output.document(
                {"sigma": found.sigma, "by": self.by, "samples": len(found.samples), **place, "items": items}
            )
            output.table(Table(title, ("prompt", "prediction", "probability", *columns), rows))

    def _examples(self) -> list[Any]:
        from ..data import Example

        if (self.data is None) == (self.text is None):
            raise typer.BadParameter("give either --data or --text", param_hint="--data/--text")
        if self.data is not None:
            return self.read(self.data)
        if self.choices is None:
            raise typer.BadParameter("--text needs --choices, such as ' no| yes'", param_hint="--choices")
        assert self.text is not None
        check_texts("--text", [self.text])
        check_texts("--choices", [self.choices])
        return [Example(self.text, tuple(self.choices.split("|")))]


@options
class Generate(Posterior):
    """Answer prompts, every token coloured by how much the sampled adapters disagree about it."""

    by: Literal["samples", "linear"] = option(
        "samples", "samples, or linear: the mean adapter's answer, and how far its tokens' log probabilities vary."
    )
    prompt: list[str] | None = option(None, "A prompt; repeat for several. Default: standard input.", "--prompt", "-p")
    max_new_tokens: int = option(128, "Longest answer, in tokens.")
    temperature: float | None = option(None, "Sample tokens at this temperature; default: the most probable token.")
    top_p: float | None = option(None, "Sample from the smallest set of this probability.")
    chat: bool = option(False, "Put the prompt through the tokenizer's chat template, as a user.")
    system: str | None = option(None, "System message before a --chat prompt.")
    static: bool = option(False, "Decode from a static cache, on a GPU in CUDA graphs.", "--static")
    html: Path | None = option(None, "Also write the answers as one HTML file.", **PATH)

    def run(self) -> None:
        from ..generation import generate

        decoding = self._decoding()
        output = Output(self.json, files={"--html": self.html})
        texts = self.prompt or [sys.stdin.read().rstrip("\n")]
        check_texts("--prompt", texts)
        loaded, bayesian = self.open()
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompts: Any = [[*first, {"role": "user", "content": text}] for text in texts] if self.chat else texts
        found = generate(bayesian, prompts, loaded.tokenizer, self.samples, by=self.by, **decoding)
        with output:
            place = {"by": self.by, "depth": bayesian.depth, "span": bayesian.span}
            output.document(found.to_dict() | place | {"prompts": texts})
            if not self.json:
                output.show(lambda: show_answers(found, texts))
            written = output.write("--html", lambda file: generation_page(found, texts, loaded.tokenizer, file))
            if written is not None:
                output.say(f"page: {written}")

    def _decoding(self) -> dict[str, Any]:
        """The arguments of transformers' ``generate``, checked."""
        from ..checks import check_count

        if self.system is not None and not self.chat:
            raise typer.BadParameter("needs --chat", param_hint="--system")
        check_count("max_new_tokens", self.max_new_tokens, most=_MOST_NEW_TOKENS)
        given = {name: getattr(self, name) for name in ("temperature", "top_p") if getattr(self, name) is not None}
        for name, value in given.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}, expected a finite number above 0")
        if given.get("top_p", 1) > 1:
            raise ValueError(f"top_p is {self.top_p}, expected a probability above 0 and at most 1")
        sampling = {"do_sample": True, "top_k": 0, "temperature": 1.0, "top_p": 1.0} if given else {"do_sample": False}
        static = {"cache_implementation": "static"} if self.static else {}
        return {"max_new_tokens": self.max_new_tokens, **sampling, **given, **static}


def show_answers(found: Generation, prompts: Sequence[str]) -> None:
    """Print generated texts, every token coloured by its epistemic uncertainty, and what the colours mean."""
    console, measure = Console(), found.uncertainties[-1]
    colours = list(zip(_FROM[measure], _STYLES, strict=True))
    for row, prompt in enumerate(prompts):
        if len(prompts) > 1:
            console.print(Text(shorten(prompt), "dim"))
        text = Text()
        for piece, value in zip(found.pieces[row], getattr(found, measure)[row].tolist(), strict=False):
            text.append(visible(piece), [style for least, style in colours if value >= least][-1])
        console.print(text, soft_wrap=True)
    ramp = ", ".join(f"[{style}]from {least:g}[/]" for least, style in colours[1:])
    drawn = f"{len(found.samples)} samples" if found.samples else "no samples"
    console.print(
        f"{MEASURES[measure]}, nats: below {colours[1][0]:g}, {ramp}; {drawn}, "
        f"sigma {found.sigma:.3g}, {found.seconds:.1f} s",
        highlight=False,
    )
