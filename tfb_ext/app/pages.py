"""Pages of HTML that need nothing beside them: a report of tables and pictures, and generated texts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..generation import Generation
    from ..metrics import Metrics

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FULL_COLOUR = 0.5  # nats of epistemic uncertainty at which a token's colour is fullest
UNCERTAINTIES = ("total", "aleatoric", "epistemic")
# What tokens are coloured by.
MEASURES = {"epistemic": "epistemic uncertainty", "standard_deviation": "standard deviation of the log probability"}
METRIC_COLUMNS = ("model", "sigma", "accuracy", "ECE", "NLL", "Brier", "time")


@dataclass(frozen=True)
class Table:
    """A table on a page or in a terminal: every cell is a text, the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def metric_row(name: str, sigma: float, metrics: Metrics, seconds: float, digits: int) -> tuple[str, ...]:
    """A row under ``METRIC_COLUMNS``, NLL and Brier score with that many digits."""
    shares = f"{metrics.accuracy:.1%}", f"{metrics.ece:.1%}"
    return name, f"{sigma:.3g}", *shares, f"{metrics.nll:.{digits}f}", f"{metrics.brier:.{digits}f}", f"{seconds:.1f} s"


def html_report(
    path: str | Path,
    title: str,
    tables: Sequence[Table],
    images: Mapping[str, str | Path],
    facts: Mapping[str, str],
) -> None:
    """Write one HTML file that holds everything: style, tables and pictures. It loads nothing and runs no script.

    Args:
        path: the file to write; its folder is made.
        tables: shown first, in their order.
        images: caption -> PNG file.
        facts: name -> value, shown last: versions, the device, the exact command.

    Raises:
        ValueError: a table's row is not as long as its header, or an image is no PNG.
    """
    for table in tables:
        for row in table.rows:
            if len(row) != len(table.columns):
                raise ValueError(
                    f"table {table.title!r}: row {list(row)!r} has {len(row)} cells; expected {len(table.columns)}, "
                    f"one for each of {list(table.columns)!r}"
                )
    pictures = [(caption, _base64_png(Path(image))) for caption, image in images.items()]
    _write_page(path, "report.html", title=title, tables=tables, images=pictures, facts=facts)


def generation_page(
    generation: Generation,
    prompts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    title: str = "How sure is the model of every word?",
    scale: float = FULL_COLOUR,
) -> None:
    """Write the texts as one HTML file: each token coloured by its epistemic uncertainty, its alternatives on hover.

    Without samples the colour is that of the standard deviation of the token's log probability.

    Args:
        generation: made with a tokenizer.
        prompts: one text a prompt; where a prompt has several rows, they follow each other.
        tokenizer: names the alternatives.
        scale: nats at which the colour is fullest.

    Raises:
        ValueError: no texts, or rows that are no multiple of the prompts.
    """
    count = len(generation.texts)
    if not count or not prompts or count % len(prompts):
        raise ValueError(
            f"the generation has {count} texts for {len(prompts)} prompts; expected a generation that was given a tokenizer, "
            "and its prompts"
        )
    names = generation.uncertainties
    rows = [
        {
            "prompt": prompts[row // (count // len(prompts))],
            "tokens": [_token(item, at, tokenizer, names, scale) for at in range(len(item["tokens"]))],
            "sequence_score": item["sequence_score"],
            **{name: fmean(item[name] or [0.0]) for name in names},
        }
        for row, item in enumerate(generation.to_dict()["items"])
    ]
    facts = f"{len(generation.samples) or 'No'} sampled adapters, sigma = {generation.sigma:.3g}"
    shown = {"names": names, "measure": MEASURES[names[-1]], "scale": scale, "facts": facts}
    _write_page(path, "generation.html", title=title, rows=rows, **shown)


def _token(
    item: dict[str, Any], at: int, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], scale: float
) -> dict[str, Any]:
    chosen = item["tokens"][at]
    listed = dict(zip(item["alternatives"][at], item["alternative_probabilities"][at], strict=True))
    listed.setdefault(chosen, exp(item["log_probabilities"][at]))  # a sampled token may be none of them
    return {
        "text": item["pieces"][at],
        "share": min(item[names[-1]][at] / scale, 1.0),
        **{name: item[name][at] for name in names},
        "alternatives": [
            {"text": _shown(str(tokenizer.decode([token]))), "probability": p, "chosen": token == chosen}
            for token, p in listed.items()
        ],
    }


def _shown(text: str) -> str:
    """White space that would not show, shown."""
    return text.replace("\n", "⏎").replace("\t", "⇥") if text.strip() else text.replace(" ", "␣").replace("\n", "⏎")


def _write_page(path: str | Path, template: str, **values: Any) -> None:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    write_atomically(Path(path), environment.get_template(template).render(**values))


def _base64_png(path: Path) -> str:
    content = path.read_bytes()
    if not content.startswith(PNG_SIGNATURE):
        raise ValueError(f"image {path}: begins with {content[:8]!r}; expected a PNG file")
    return base64.b64encode(content).decode("ascii")
