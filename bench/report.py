"""The tables of the README, docs/performance.md, span.md, linear.md and quantised.md, and the plots, out of ``bench/results/*.json``.

python -m bench.report            writes all of them (needs matplotlib)
python -m bench.report --check    says whether the tables are those of the results; writes nothing
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import draw, draw_spans, series
from .record import ROOT
from .rows import Rows, by_case, load, load_if_there, milliseconds, ratio, table_head, worst
from .test_kernels import IN_FEATURES, OUT_FEATURES, RANKS, TOKENS

PERFORMANCE = "docs/performance.md"

# What a row is called and what it is measured against; a case whose ratio is baseline / value is "faster".
FORWARDS = (
    ("**ten samples**, bfloat16 adapter", "prefill_all_linear_bf16"),
    ("**ten samples**, float32 adapter (as PEFT saves it)", "prefill_all_linear_fp32"),
    ("ten samples, the base model's head given a contiguous input too", "prefill_all_linear_equal_heads"),
    ("ten samples, portable kernels (compute capability 8.0)", "portable_all_linear"),
    ("ten samples, q, v and head alone", "prefill_qv_head"),
    ("ten samples, rank 64", "prefill_rank64"),
    ("PEFT's deterministic LoRA, bfloat16 adapter", "peft_all_linear_bf16"),
    ("PEFT's deterministic LoRA, float32 adapter", "peft_all_linear_fp32"),
    ("**ten samples, upper quarter of the blocks random**", "prefill_quarter"),
    ("**ten samples, upper eighth of the blocks random**", "prefill_eighth"),
    ("decoding a token, ten samples, all blocks, in a graph", "decode_all"),
    ("decoding a token, ten samples, upper quarter, in a graph", "decode_quarter"),
)
# The README's table: label, case, what it is of.
HEADLINES = (
    ("ten samples of a batch, all blocks", "prefill_all_linear_bf16", "the base model on as many rows"),
    (
        "the same, the base model's head given a contiguous input too",
        "prefill_all_linear_equal_heads",
        "the base model on as many rows",
    ),
    ("ten samples, upper eighth of the blocks random", "prefill_eighth", "one base forward of the batch"),
    ("decoding a token with ten samples, in a graph", "decode_all", "the base model's decoding of as many rows"),
    ("PEFT's deterministic LoRA, as it saves adapters", "peft_all_linear_fp32", "the base model on as many rows"),
    ("64 samples, peak memory", "memory_s64", "the base model on as many rows"),
)
SEQUENTIAL = (
    ("8 rows x 128 tokens, bfloat16 adapter, flipout", "sequential_prefill_bf16"),
    ("8 rows x 128 tokens, float32 adapter, flipout", "sequential_prefill_fp32"),
    ("8 rows x 128 tokens, bfloat16 adapter, weights drawn", "sequential_weights_bf16"),
    ("one row of 64 tokens, flipout", "sequential_short"),
    ("decoding a token, ours in a graph, theirs not", "sequential_decode"),
)
GENERATIONS = (
    ("**all blocks random**", "generate_all"),
    ("upper quarter random", "generate_quarter"),
    ("the same, the prompt and one token", "generate_quarter_prefill"),
    ("the quarter's keys and values", "generate_kv_quarter"),
    ("all blocks against sequential samples (times faster)", "generate_sequential"),
    ("upper quarter against the same (times faster)", "generate_sequential_quarter"),
    ("the scores of every token", "generate_scored"),
    ("a call that captures its graph", "generate_first"),
    ("the baseline itself by torch.compile", "generate_base_compiled"),
)
# Samples that differ on the answer alone: label, case.
SPANS = (
    ("**ten samples**, 8 prompts of 128 tokens", "span_128"),
    ("the same with a row for each sample, random as a whole", "span_128_rows"),
    ("**ten samples**, 8 prompts of 512 tokens", "span_512"),
    ("64 samples, 8 prompts of 512 tokens", "span_512_s64"),
    ("ten samples, one prompt of 2,048 tokens", "span_2048"),
    ("64 samples, 8 prompts of 512 tokens, peak memory", "span_memory"),
    ("the mean adapter, four choices of three tokens on 8 prompts of 128", "choices_shared"),
    ("**`generate`**, ten samples, 8 prompts of 512 tokens, 64 new ones, in graphs", "generate_span"),
    ("the same, one prompt", "generate_span_one"),
    ("keys and values of 8 prompts and of ten samples of 64 new tokens", "generate_span_kv"),
    ("the whole search for sigma, six evaluations of ten samples (times faster)", "search_span"),
    ("the same, stopping early (times faster)", "search_span_early"),
)
# Those of them that docs/span.md shows.
SPANS_IN_SHORT = (
    "span_128 span_128_rows span_512 span_512_s64 span_2048 generate_span generate_span_one search_span search_span_early"
).split()
# Without samples; all are in docs/linear.md.
LINEARS = (
    ('**8 prompts of 128 tokens, `span="answer"`**, batches of one shape', "linear_answer"),
    ("8 prompts of 512 tokens, the same", "linear_answer_512"),
    ("the same, peak memory from the first batch on", "linear_memory"),
    ('8 prompts of 128 tokens, `span="all"`, batches of one shape', "linear_all"),
    ('one call of `predict` for 8 prompts of 128, `span="answer"`', "linear_answer_call"),
    ('the same, `span="all"`', "linear_all_call"),
    ("**the whole search for sigma**, 500 anchors of 128 tokens, four classes (times faster)", "linear_search"),
)
QUANTISED = (
    ("**ten samples**, 8 prompts of 128, nf4 base (bitsandbytes, double quantisation)", "nf4_prefill"),
    ("the same, int8 base (torchao, weights alone)", "int8_prefill"),
    ("the same, float8 base (torchao, weights alone)", "fp8_prefill"),
    ("the same, float8 base (torchao, activations too)", "fp8_dynamic_prefill"),
    ("PEFT's deterministic LoRA on the nf4 base", "nf4_peft"),
    ('ten samples, `span="answer"`, nf4 base', "nf4_span"),
    ("decoding a token, ten samples, nf4 base, in a graph", "nf4_decode"),
    ("64 samples: predictions of 8 prompts and 32 generated tokens, nf4 base, peak of all memory", "memory_8gib"),
)
SEARCHES = (
    ("all blocks random, the same six evaluations", "search_all"),
    ("upper quarter of the blocks random, the same six evaluations", "search_quarter"),
    ("all blocks random, the same, four anchors at once", "search_all_small"),
    ("upper quarter, the same, four anchors at once", "search_quarter_small"),
    ("all blocks random, stopping early", "search_all_early"),
    ("upper quarter of the blocks random, stopping early", "search_quarter_early"),
)


def amount(row: dict[str, Any], key: str) -> str:
    """``value`` or ``baseline`` with its unit: milliseconds where the row names none."""
    unit = row.get("unit")
    return milliseconds(row[key]) if unit is None else f"{row[key]:.1f} s" if unit == "s" else f"{row[key]:.2f} {unit}"


def search_table(search: Rows) -> list[str]:
    """The whole search for sigma against the authors', for the cases that are there; no lines without any."""
    cases = [(label, search[case]) for label, case in SEARCHES if case in search]
    if not cases:
        return []
    first = cases[0][1]
    what = f"the whole search for sigma, {first['anchors']} anchors x {first['tokens']} tokens, {first['device']}"
    lines = ["", *table_head(what, "ours", "the authors'", "times faster", "peak memory, ours and theirs")]
    for label, row in cases:
        ours, theirs = f"{row['value']:.1f} s", f"{row['baseline']:.0f} s"
        memory = f"{row['peak_gib']:.1f}, {row['baseline_peak_gib']:.1f} GiB" if "peak_gib" in row else ""
        lines.append(f"| {label} | {ours} | {theirs} | {ratio(row, 1)} | {memory} |")
    early = [row for _, row in cases if row["early_stop"]]
    sigmas = [f"{row['sigma']:.3g} where the full search found {row['sigma_full']:.3g}" for row in early]
    lines += [
        "",
        f"The authors' search, in plain torch ([`bench/official.py`](../bench/official.py)): a baseline pass and {first['steps']} "
        f"steps of {first['samples']} sequential passes, always through all blocks; {first['steps_timed']} of its equal steps are "
        f"timed, on {first['anchors_timed']} of the anchors, and the rest is counted"
        + (f". Stopping early found sigma = {' and '.join(sigmas)}" if sigmas else "")
        + " ([`search.json`](../bench/results/search.json)).",
    ]
    return lines


def generate_table(rows: list[dict[str, Any]]) -> list[str]:
    """Whole calls of ``generate`` against the base model's own, for the cases that are there; no lines without any."""
    cases = [(label, row) for label, case in GENERATIONS for row in rows if row["case"] == case]
    if not cases:
        return []
    first = cases[0][1]
    what = f"`generate` from end to end: prompts of 512 tokens, 64 new ones, ten samples, in graphs, {first['device']}"
    lines = ["", *table_head(what, "ours", "against", "its time", "ratio")]
    for label, row in cases:
        n = row.get("rows", 1)
        prompts = f"{n} prompt{'s' if n > 1 else ''}"
        value, base = amount(row, "value"), amount(row, "baseline")
        of = row["of"].replace(" 1 rows", " 1 row")
        lines.append(f"| {label}, {prompts} | {value} | {of} | {base} | {ratio(row)} |")
    text = (
        "With samples in the upper quarter alone a prompt still costs them a prefill each there, which is what the ratio of many "
        "prompts is made of ([`generate.json`](../bench/results/generate.json), transformers "
        f"{first['transformers']}; on 5.17 eight prompts take up to twice as long, ours and the base model's, see "
        "[the notes](../bench/NOTES.md))."
    )
    return [*lines, "", text]


def span_table(rows: Rows) -> list[str]:
    """What samples on the answer alone cost, for the cases that are there; no lines without any."""
    cases = [(label, rows[case]) for label, case in SPANS if case in rows]
    if not cases:
        return []
    devices = ", ".join(dict.fromkeys(row["device"] for _, row in cases))
    head = table_head(f"on {devices}", "ours", "against", "its own", "ratio")
    lines = ["", '**Samples that differ on the answer alone** (`span="answer"`):', "", *head]
    for label, row in cases:
        of = row["of"].replace(" 1 rows", " 1 row")
        digits = 1 if row.get("unit") == "s" else 2
        lines.append(f"| {label} | {amount(row, 'value')} | {of} | {amount(row, 'baseline')} | {ratio(row, digits)} |")
    sweep = series(rows, "sweep_span_", {})
    if sweep:
        costs = ", ".join(f"{row['ratio']:.2f} with {samples}" for samples, row in sweep)
        lines += [
            "",
            f"By the number of samples, 8 prompts of 128 tokens, of the base forward on these: {costs}.",
            "",
            "![cost against samples that differ on the answer alone](../bench/results/span.svg)",
        ]
    return [*lines, "", source([row for _, row in cases])]


def source(rows: list[dict[str, Any]], file: str = "span.json") -> str:
    """Which code the rows are of: they need not be of one run."""
    commits, versions = ({row[key]: None for row in rows} for key in ("commit", "transformers"))
    return (
        f"Measured at {' and '.join(commit[:7] for commit in commits)} with transformers {' and '.join(versions)} "
        f"([`{file}`](../bench/results/{file}) names each row's commit; [the notes](../bench/NOTES.md) say what "
        "limits each)."
    )


def short_table(rows: Rows, named: Sequence[tuple[str, str]], file: str) -> str:
    """The table of a page of its own."""
    cases = [(label, rows[case]) for label, case in named if case in rows]
    if not cases:
        return ""
    devices = ", ".join(dict.fromkeys(row["device"] for _, row in cases))
    what = f"Llama-3.1-8B shape, bfloat16, r = 8 on seven linear layers, {devices}"
    lines = table_head(what, "of", "ratio")
    for label, row in cases:
        of, digits = row["of"].replace(" 1 rows", " 1 row"), 1 if row.get("unit") == "s" else 2
        lines.append(f"| {label} | {of} | {ratio(row, digits)} |")
    return "\n".join([*lines, "", source([row for _, row in cases], file)])


def section(
    models: Rows,
    kernels: list[dict[str, Any]],
    summary: Rows,
    search: Rows,
    generate: list[dict[str, Any]],
    spans: Rows,
) -> str:
    """The tables of docs/performance.md."""
    all_linear = models["prefill_all_linear_bf16"]
    memory = models["memory_s64"]
    lines = [
        f"Llama-3.1-8B shape with random weights, bfloat16, r = 8 on all seven linear layers, 8 rows x 128 tokens, ten samples: "
        f"80 rows; one {all_linear['device']}, torch {all_linear['torch'].split('+')[0]}. Each ratio is the median of rounds that "
        "alternate with their own baseline, with the least and the greatest round "
        "([`bench/results/summary.json`](../bench/results/summary.json), [`models.json`](../bench/results/models.json)).",
        "",
        *table_head("", "time", "against", "its time", "ratio"),
    ]
    for label, case in FORWARDS:
        row = models[case]
        value, base = milliseconds(row["value"]), milliseconds(row["baseline"])
        of = row["of"].split(", its head")[0].replace(" 1 rows", " 1 row")
        lines.append(f"| {label} | {value} | {of} | {base} | {ratio(row)} |")
    lines += [
        "",
        "Why below 1: torch multiplies the sliced rows that a head gets for the last position alone one row at a time; our fan "
        "lays them out first, which is worth 18 ms here. The third row gives the base model the same: what the samples cost is "
        f"{100 * (models['prefill_all_linear_equal_heads']['ratio'] - 1):.0f} %.",
        "",
        *table_head(
            "ten samples against ten sequential sampled passes in plain torch", "ours", "theirs", "times faster"
        ),
    ]
    for label, case in SEQUENTIAL:
        row = models[case]
        lines.append(f"| {label} | {milliseconds(row['value'])} | {milliseconds(row['baseline'])} | {ratio(row, 1)} |")
    lines += span_table(spans)
    lines += generate_table(generate)
    lines += search_table(search)
    lines += [
        "",
        f"Peak memory of 64 samples x 8 rows is {memory['value']:.1f} GiB, the base forward's on the same 512 rows "
        f"{memory['baseline']:.1f} GiB (weights included). On two CPU cores the sampled projection is "
        f"{summary['cpu_materialised']['ratio']:.1f} times faster than drawing the weights in torch (S = 10, n = 4096, T = 320) and "
        f"takes {summary['cpu_noise']['ratio']:.2f} times as long as the same product without noise.",
        "",
        "![cost against samples, depth, rank and tokens, memory against samples](../bench/results/speed.svg)",
        "",
        "The kernels alone, as a share of a copy of as many bytes "
        "([`kernels.json`](../bench/results/kernels.json); the worst of "
        f"n = {', '.join(map(str, IN_FEATURES))} and of m = {', '.join(map(str, OUT_FEATURES))}):",
        "",
        *table_head("", *(f"r = {r}" for r in RANKS)),
    ]
    for label, case in (
        ("shrink, noise included", "shrink_bandwidth"),
        ("expand, writing", "expand_write_bandwidth"),
        ("expand, accumulating", "expand_add_bandwidth"),
    ):
        for tokens in TOKENS:
            given = tokens if case != "shrink_bandwidth" else tokens // 10 * 10
            cells = [f"{100 * worst(kernels, case, r=r, tokens=given):.0f} %" for r in RANKS]
            lines.append(f"| {label}, T = {given} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Expand is near a copy's speed up to rank 16; the rest is not there yet. [`bench/NOTES.md`](../bench/NOTES.md) says what "
        "binds each kernel, version by version.",
    ]
    return "\n".join(lines)


def headline(models: Rows) -> str:
    """The README's table of speed."""
    row = models[HEADLINES[0][1]]
    lines = [
        f"Llama-3.1-8B shape, bfloat16, r = 8 on seven linear layers, 8 rows x 128 tokens, one {row['device']} "
        "([all measurements](docs/performance.md)):",
        "",
        *table_head("", "of", "ratio"),
    ]
    lines += [f"| {label} | {of} | {ratio(models[case])} |" for label, case, of in HEADLINES]
    faster = models["sequential_prefill_fp32"]["ratio"]
    lines.append(f"| ten sampled passes one after the other, in plain torch | ours | {faster:.1f} times ours |")
    return "\n".join(lines)


def demo_table(runs: list[dict[str, Any]]) -> str:
    """The README's table of the demonstration: means and ranges over adapters and noise seeds."""
    first = runs[0]
    runs, linear = ([run for run in runs if run.get("by", "samples") == by] for by in ("samples", "linear"))
    depths = list(dict.fromkeys(run["depth"] for run in runs))
    each = len(runs) // len(depths)
    lines = [
        f"`make demo`, run {each} times ({len({r['adapter'] for r in runs})} adapters, {len({r['seed'] for r in runs})} noise seeds) on "
        f"{first['test_items']:,} headlines that the search never saw, one {first['device']} "
        "([`demo.json`](bench/results/demo.json)); means, and the range of the runs:",
        "",
        *table_head("", "accuracy", "ECE", "NLL"),
    ]

    def line(label: str, measured: list[dict[str, float]], spread: bool) -> str:
        cells = []
        for name, factor, form in (("accuracy", 100, ".1f"), ("ece", 100, ".1f"), ("nll", 1, ".3f")):
            values = [factor * m[name] for m in measured]
            unit = " %" if factor == 100 else ""
            bounds = f" ({min(values):{form}} to {max(values):{form}})" if spread else ""
            cells.append(f"{sum(values) / len(values):{form}}{unit}{bounds}")
        return f"| {label} | {' | '.join(cells)} |"

    lines.append(line("the adapter as it is", [r["mean"] for r in runs if r["depth"] == depths[0]], False))
    for depth in depths:
        named = "all blocks random" if depth == "all" else f"upper {depth} blocks random"
        lines.append(line(f"TFB, {named}", [r["tfb"] for r in runs if r["depth"] == depth], True))
    if linear:
        lines.append(line("TFB without samples, the answer's token random", [r["tfb"] for r in linear], True))
    return "\n".join(lines)


def replace_section(page: str, name: str, text: str) -> str:
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    before, rest = page.split(start)
    return f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}"


def pages(results: Path) -> dict[Path, str]:
    """The README and the pages under docs with the tables of these results."""
    models = by_case(load(results / "models.json"))
    summary = json.loads((results / "summary.json").read_text())
    search = by_case(load_if_there(results / "search.json"))
    # The last case of generation is run alone.
    generate = load_if_there(results / "generate.json", results / "generate_compiled.json")
    spans = by_case(load_if_there(results / "span.json"))
    tables = section(models, load(results / "kernels.json"), summary, search, generate, spans)
    readme = replace_section((ROOT / "README.md").read_text(), "speed", headline(models))
    readme = replace_section(readme, "demo", demo_table(json.loads((results / "demo.json").read_text())))
    made = {
        ROOT / "README.md": readme,
        ROOT / PERFORMANCE: replace_section((ROOT / PERFORMANCE).read_text(), "speed", tables),
    }
    in_short = [(label, case) for label, case in SPANS if case in SPANS_IN_SHORT]
    for name, cases in (("span", in_short), ("linear", LINEARS), ("quantised", QUANTISED)):
        page, file = ROOT / "docs" / f"{name}.md", f"{name}.json"
        table = short_table(by_case(load_if_there(results / file)), cases, file)
        made[page] = replace_section(page.read_text(), name, table)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    made = pages(options.results)
    if options.check:
        stale = [page for page, text in made.items() if page.read_text() != text]
        for page in stale:
            print(f"{page}: its tables are not those of {options.results}; run python -m bench.report")
        return int(bool(stale))
    models = by_case(load(options.results / "models.json"))
    draw(models, load(options.results / "kernels.json"), options.results / "speed.svg")
    draw_spans(by_case(load_if_there(options.results / "span.json")), options.results / "span.svg")
    for page, text in made.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
