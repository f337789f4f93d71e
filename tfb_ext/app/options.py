"""The options of the command line, each defined once. A command is a dataclass whose fields are its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from ..adapters.adapter import BayesianAdapter
    from ..data import Encoded, Example
    from .loading import Loaded

options = dataclass(frozen=True, kw_only=True)


def option(default: Any, help: str, *names: str, kind: Callable[..., Any] = typer.Option, **more: Any) -> Any:
    """A field that is an option of a command; ``...`` as its default makes it required."""
    return field(default=MISSING if default is ... else default, metadata={"typer": kind(*names, help=help, **more)})


def register(app: typer.Typer, command: type) -> None:
    """Make ``command`` a command of its name in small letters: its fields are options, its docstring the help, ``run`` the work."""
    hints = get_type_hints(command)

    def run(**values: Any) -> None:
        command(**values).run()

    parameters = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is MISSING else each.default,
            annotation=Annotated[hints[each.name], each.metadata["typer"]],
        )
        for each in sorted(fields(command), key=lambda each: each.default is not MISSING)  # the required ones first
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(command.__name__.lower(), help=inspect.getdoc(command))(run)


# Values ---------------------------------------------------------------------------------------------------------------


def parse_depth(text: str) -> int | float | str:
    """``"all"``, ``"head"``, a number of blocks, or a fraction."""
    if text in ("all", "head"):
        return text
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}, expected a number of blocks, a fraction such as 0.5, 'all' or 'head'", param_hint="--depth"
        ) from None


def parse_depths(text: str) -> list[int | float | str]:
    """Several, with commas."""
    return [parse_depth(part) for part in text.split(",")]


def parse_span(text: str) -> int | str:
    """``"all"``, ``"answer"``, or a number of last tokens."""
    if text in ("all", "answer"):
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}, expected a number of last tokens, 'all' or 'answer'", param_hint="--span"
        ) from None


def parse_spans(text: str) -> list[int | str]:
    """Several, with commas."""
    return [parse_span(part) for part in text.split(",")]


def parse_bracket(text: str) -> tuple[float, float]:
    """``LOW,HIGH``."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected LOW,HIGH such as 0.001,0.1", param_hint="--bracket") from None
    return low, high


def parse_path(text: str) -> Path:
    """A file's or folder's name; an empty one, as a shell makes of an unset variable, would be the current folder."""
    if text == "":
        raise typer.BadParameter("'' is no name, expected a file or folder. Fix: give one ('.' is the current folder)")
    return Path(text)


def _sigma(value: float | None) -> float | None:
    from ..checks import check_sigma

    return None if value is None else check_sigma(value)


def check_samples(value: int | None) -> int | None:
    from ..checks import check_samples

    if value is not None:
        check_samples(value)
    return value


def check_texts(name: str, texts: Iterable[str]) -> None:
    """Bytes that are no UTF-8 reach Python as half characters, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise typer.BadParameter(
                f"character {error.start + 1} of {text!r} is no UTF-8, expected text. Fix: convert it", param_hint=name
            ) from None


PATH: dict[str, Any] = {"parser": parse_path, "metavar": "PATH"}
DEPTH: dict[str, Any] = {"parser": parse_depth, "metavar": "DEPTH"}
DEPTH_HELP = "Random blocks from the top: a number, a fraction, 'all', 'head'"
SPAN: dict[str, Any] = {"parser": parse_span, "metavar": "SPAN"}
BY_HELP = "samples, or linear: no samples, outputs that are Gaussian to first order"
SPAN_HELP = "Random tokens of a prompt: 'all', 'answer' (the last one, and what follows), or a number of last ones"

# Options that belong together -----------------------------------------------------------------------------------------


@options
class Format:
    """How results are printed."""

    json: bool = option(False, "Print one JSON document on stdout and nothing else there.", "--json")


@options
class Runs(Format):
    """How a model runs."""

    samples: int = option(10, "Posterior samples.", "--samples", "-n", callback=check_samples)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = option("auto", "Type of the base model: auto, float32, bfloat16, float16.")


@options
class Model(Runs):
    """An adapter over its base model."""

    adapter: str = option(..., "PEFT adapter folder, or 'demo' for the packaged one.", "--adapter", "-a")
    base: str | None = option(None, "Base model; default: the one the adapter names.", "--base", "-b")
    seed: int | None = option(None, "Noise seed; default: the saved one, else 0.")
    load_in: str | None = option(None, "Quantise the base model by bitsandbytes: 4bit (nf4) or 8bit.", "--load-in")
    device_map: str | None = option(
        None, "Where its layers go, instead of --device: auto, balanced, ...", "--device-map"
    )
    memory: str | None = option(None, "Most that this process may take of the GPU, such as 8GiB.")

    def open(self, examples: list[Example] | None = None) -> tuple[Loaded, BayesianAdapter]:
        """The model with its posterior: the saved one where the folder has it."""
        from ..adapters.attach import bayesianize, load
        from ..files import CONFIG_NAME
        from .loading import load_adapter

        classes = None if examples is None else len(examples[0].choices)
        place = self.load_in, self.device_map, self.memory
        loaded = load_adapter(self.adapter, self.base, self.device, self.dtype, classes, *place)
        saved = (loaded.adapter / CONFIG_NAME).is_file()
        bayesian = load(loaded.model, loaded.adapter) if saved else bayesianize(loaded.model)
        if self.seed is not None:
            bayesian.seed = self.seed
        return loaded, bayesian


@options
class Posterior(Model):
    """An adapter that is sampled."""

    sigma: float | None = option(None, "Posterior scale; default: the one saved beside the adapter.", callback=_sigma)
    depth: str | None = option(None, f"{DEPTH_HELP}.", "--depth", **DEPTH)
    span: str | None = option(None, f"{SPAN_HELP}.", "--span", **SPAN)

    def open(self, examples: list[Example] | None = None) -> tuple[Loaded, BayesianAdapter]:
        loaded, bayesian = super().open(examples)
        if self.depth is not None:
            bayesian.depth = self.depth
        if self.span is not None:
            bayesian.span = self.span
        if self.sigma is not None:
            bayesian.sigma = self.sigma
        if self.samples and bayesian.sigma is None:
            raise ValueError(
                "this adapter has no saved sigma; run `tfb search ... --save FOLDER` first, or pass --sigma"
            )
        return loaded, bayesian


@options
class Items:
    """Prompts with choices, and how they are scored."""

    split: str = option("test", "Split of a data set (not for JSONL).")
    prompt: str | None = option(None, "Column or template such as 'Text: {text}' (data sets only).")
    choices: str | None = option(None, "Choices separated by |, such as ' no| yes' (data sets, --text).")
    score: Literal["sequence", "token"] | None = option(
        None,
        "Choices of several tokens: product over tokens, averaged over samples (sequence), or the reverse (token).",
    )
    by_length: bool = option(
        False, "With --score: divide a choice's log probability by its number of tokens.", "--by-length"
    )
    limit: int | None = option(None, "Use only the first N items.", min=1)
    batch_size: int | None = option(None, "Items a forward, before samples are fanned out.")

    def __post_init__(self) -> None:
        if self.by_length and self.score is None:
            raise typer.BadParameter("needs --score sequence or --score token", param_hint="--by-length")

    def read(self, data: str, label: str | None = None) -> list[Example]:
        """The items of a JSONL file or a data set."""
        from ..data import read_dataset, read_jsonl

        if Path(data).is_file():
            return read_jsonl(data)[: self.limit]
        if data.endswith((".jsonl", ".json")):
            raise ValueError(f"{data} does not exist")
        if self.prompt is None:
            raise typer.BadParameter(
                "a data set needs --prompt, a column or a template of columns", param_hint="--prompt"
            )
        choices = None if self.choices is None else self.choices.split("|")
        return read_dataset(data, self.split, prompt=self.prompt, label=label, choices=choices)[: self.limit]

    def encode(self, examples: list[Example], loaded: Loaded) -> Encoded:
        """The items as tokens."""
        from ..data import encode

        if self.score is not None and loaded.head:
            raise typer.BadParameter(
                f"{self.score!r} with a classification head, whose classes are no tokens; leave it out",
                param_hint="--score",
            )
        return encode(examples, loaded.tokenizer, head=loaded.head, score=self.score, by_length=self.by_length)


@options
class Labelled(Items):
    """Items that may have labels."""

    data: str = option(..., "JSONL file, or a data set for the datasets package.", "--data", "-d")
    label: str | None = option(None, "Label column (data sets only).")


@options
class Predictions(Items):
    """Items that are predicted."""

    by: Literal["samples", "linear"] = option("samples", f"What predictions are by: {BY_HELP}.")
    adaptive: float | None = option(
        None, "Stop an item's samples once its answer is that of all --samples at this confidence, such as 0.95."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "linear" and self.adaptive is not None:
            raise typer.BadParameter("does not go with --by linear, which draws no samples", param_hint="--adaptive")
        if self.score == "token" and self.adaptive is not None:
            raise typer.BadParameter(
                "does not go with --score token, which has no distribution per sample to judge by; use --score sequence",
                param_hint="--adaptive",
            )


@options
class Rule:
    """The arguments of ``search_sigma``."""

    by: Literal["samples", "linear"] = option(
        "samples", f"What anchors are predicted by: {BY_HELP}, one pass for all sigmas."
    )
    recipe: str = option(
        "auto", "auto: looks at the anchors; paper: NLL within 0.3 %, five bisections; official: the authors' code."
    )
    metric: str | None = option(None, "nll, brier, accuracy or flips, instead of the recipe's.")
    tolerance: float | None = option(None, "Fraction: 0.003 is 0.3 %.")
    bound: str | None = option(None, "two-sided (any change counts) or one-sided (only harm).")
    objective: str | None = option(None, "tolerance, minimum (lowest NLL) or one-se (smallest sigma near it).")
    method: str | None = option(None, "bisect, grid, root or official.")
    bracket: str | None = option(
        None, "Where to look first, such as 0.001,0.1.", "--bracket", parser=parse_bracket, metavar="LOW,HIGH"
    )
    steps: int | None = option(None, "Bisection steps, grid points, most steps of root.")
    depth: str | None = option(
        None, f"{DEPTH_HELP}; several with commas to choose from.", "--depth", parser=parse_depths, metavar="DEPTHS"
    )
    span: str | None = option(
        None, f"{SPAN_HELP}; several with commas to choose from.", "--span", parser=parse_spans, metavar="SPANS"
    )
    early_stop: float | None = option(
        None, "Stop a sigma once its verdict is settled at this confidence, such as 0.99."
    )
    checkpoint: Path | None = option(
        None, "Keep results in this file as they come, and go on from it if it is there.", **PATH
    )

    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in get_type_hints(Rule)}
