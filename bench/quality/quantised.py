"""The section of the report on quantised base models: the adapter as it is and the base setting there."""

from __future__ import annotations

from collections.abc import Iterator

from .check import BASE
from .results import Results
from .spans import MEASURES, Table, cells, origin, titled

TITLE = "Quantised base models"
BASES = {"": "bfloat16", "nf4": "nf4, double quantisation", "int8": "int8"}


def section(results: Results, table: Table) -> str | None:
    """The section's text; None where no quantised base was tried."""
    rows = [row for row in results.rows if row.base]
    if not rows:
        return None
    columns = ["set, adapter", "base", "setting", *(title for _, title, _, _ in MEASURES), "sigma", "seeds"]
    return "\n\n".join(
        [
            "The same adapters, trained on the base model in bfloat16, on that base and on ones that bitsandbytes quantised; sigma is searched "
            "on each. Mean over the seeds ± its standard error.",
            table(columns, list(_lines(results))),
            origin(rows),
        ]
    )


def _lines(results: Results) -> Iterator[list[str]]:
    for dataset, adapter in dict.fromkeys((row.dataset, row.adapter) for row in results.rows if row.base):
        for base, title in BASES.items():
            one = {"dataset": dataset, "adapter": adapter, "base": base}
            for name, wanted in (("the adapter as it is", {"method": "mean"}), ("TFB", {**BASE, "antithetic": True})):
                found = results.pick(**one, **wanted)
                if found:
                    yield [titled(dataset, adapter), title, name, *cells(found)[:-3]]
