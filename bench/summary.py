"""The cases that the project holds itself to, out of the benchmarks' JSON: ``summary.json``, for machines to read.

    python -m bench.summary kernels.json models.json search.json generate.json span.json linear.json adaptive.json --out bench/results/summary.json

``case -> {"value", "baseline", "ratio", "spread", "of", "device", "commit", "source"}``. A case measured at several shapes
is its worst; cases of other runs that are in the file already stay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .record import write_json
from .test_kernels import IN_FEATURES, OUT_FEATURES, RANKS, TOKENS

# Where several rows make a case: which end of their ratios is the worst.
LEAST = {"shrink_bandwidth", "expand_bandwidth", "cpu_materialised", "generate_sequential"}
MOST = {"shrink_noise", "cpu_noise", "generate_all", "generate_quarter", "generate_kv_quarter"}
CONFIDENCE = 0.95  # of the adaptive sampling that counts
SINGLE = (
    "prefill_all_linear_bf16 prefill_all_linear_fp32 prefill_all_linear_equal_heads prefill_qv_head prefill_rank64 "
    "prefill_quarter prefill_eighth memory_s64 decode_all decode_quarter sequential_prefill_bf16 sequential_prefill_fp32 "
    "sequential_short sequential_decode portable_all_linear search_all search_quarter search_all_early search_quarter_early "
    "search_all_small search_quarter_small span_128 span_512 span_512_s64 span_2048 span_memory choices_shared "
    "generate_span generate_span_one generate_span_kv search_span search_span_early "
    "linear_answer linear_answer_call linear_answer_512 linear_all linear_all_call linear_memory linear_search "
    "nf4_prefill nf4_span nf4_decode nf4_peft int8_prefill fp8_prefill fp8_dynamic_prefill memory_8gib"
).split()
FIELDS = ("value", "baseline", "ratio", "spread", "of", "device", "commit", "date")
SHAPE = ("tokens", "n", "m", "r", "form", "dtype", "unit", "rows", "span")


def case_of(info: dict[str, Any]) -> str | None:
    """The summary's name for a row, or None if it is not in it."""
    name: str = info["case"]
    if name in ("expand_write_bandwidth", "expand_add_bandwidth"):
        named = info["m"] in OUT_FEATURES and info["tokens"] in TOKENS and info["r"] in RANKS
        return "expand_bandwidth" if named else None
    if name in ("shrink_bandwidth", "shrink_noise"):
        return name if info["n"] in IN_FEATURES and info["r"] in RANKS else None
    return name if name in SINGLE or name in LEAST | MOST else None


def summarise(files: list[Path]) -> dict[str, dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {}
    summary: dict[str, dict[str, Any]] = {}
    for file in files:
        document = json.loads(file.read_text())
        if "benchmarks" not in document:
            summary |= adaptive_cases(document, file.name)
            continue
        for row in document["benchmarks"]:
            info = row["extra_info"]
            name = case_of(info) if "ratio" in info else None
            if name is not None:
                found.setdefault(name, []).append(info | {"source": f"{file.name}: {row['name']}"})
    for name, rows in found.items():
        worst = (max if name in MOST else min)(rows, key=lambda row: row["ratio"])
        summary[name] = {field: worst[field] for field in (*FIELDS, "source")}
        summary[name] |= {field: worst[field] for field in SHAPE if field in worst}
        if len(rows) > 1:
            summary[name]["worst_of"] = len(rows)
    return summary


def adaptive_cases(document: dict[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """The worst adapter and depth of ``bench.adaptive``'s document, a share of all samples and of all answers."""
    rows = [row for row in document["rows"] if row["confidence"] == CONFIDENCE]
    known = {name: document[name] for name in ("device", "commit", "date")}
    cases = {}
    for case, field, pick, of in (
        ("adaptive_samples", "share_drawn", max, f"{document['samples']} samples for every item"),
        ("adaptive_agreement", "same_answers", min, f"the answers of {document['samples']} samples"),
    ):
        values = [row[field] for row in rows]
        worst = {"value": pick(values), "baseline": 1.0, "ratio": pick(values)}
        cases[case] = worst | {"spread": [min(values), max(values)], "of": of} | known
        cases[case] |= {"source": source, "worst_of": len(rows)}
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSON of pytest-benchmark, or of bench.adaptive")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    write_json(options.out, known | summarise(options.files))


if __name__ == "__main__":
    main()
