"""Write the tables of docs/ from the records in `bench/results`: `python -m bench.tables [--check] [--plots]`.

A table stands between `<!-- python -m bench.tables NAME -->` and `<!-- end -->`. Tables of a CPU come from all records
`cpu-*.json`, one after another; `accuracy` comes from the report of `condense eval --pruning`, `quality_facts` and
`quality_squad` from the records of `bench.pruning_quality`, `kept` from `bench.kept_answers`, `soft` from reports of
`condense eval`, `serve` from `bench.serve`, `encode` from `bench.encode_cpu`,
`kills` from `bench.kills`, `miner` from `bench.miner`. A test compares.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import encode_cpu, kept_answers, kills, memory, miner, prefill, pruning_plot, quality, serve, soft_quality
from bench.case import OURS
from bench.goal import sentence
from condense_core.serving.load.plot import plot_load
from condense_core.tasks.plot import plot_reports

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "bench" / "results"
PAGES = (
    *(
        "README.md",
        "docs/encoder.md",
        "docs/miner.md",
        "docs/native.md",
        "docs/pruning.md",
        "docs/select.md",
        "docs/serving.md",
    ),
    "docs/training.md",
    "models/smollm2-135m-condense/README.md",
)
PRUNED = (
    *("across_layers(kvzip)", "across_layers(kvzap)", "sentences(query_aware(peak_attention))", "sentences(surprise)"),
    *("snapkv", "expected_attention", "streaming_llm"),
)
"""Methods of pruning in the picture of the README; the table has all."""
ACCURACY = "pruning-condense-tiny.json"
_TABLE = re.compile(r"(<!-- python -m bench\.tables (?P<name>\w+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)

Record = dict[str, Any]


def _head(part: Record, file: str) -> str:
    """Machine, date and versions, and where the record is."""
    facts = part["machine"]
    where = f"{facts['device']}, {facts['threads']} threads, {facts['instruction_set']}"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "kvpress") if facts.get(name))
    return f"{where}; {facts['date'][:10]}; {versions}; `bench/results/{file}`.\n"


def _timed_rows(part: Record, last: Callable[[Record], str]) -> str:
    lines = ["| case | dtype | ms | rivals, ms | goals |", "|---|---|---|---|---|"]
    for row in part["rows"]:
        rivals = ", ".join(f"{n} {t['median_us'] / 1e3:.2f}" for n, t in row["times"].items() if n != OURS)
        ours = row["times"][OURS]["median_us"] / 1e3
        short = {"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]]
        goals = "; ".join([*map(sentence, row["goals"]), *filter(None, [last(row)])])
        lines.append(f"| {row['name']} | {short} | {ours:.2f} | {rivals} | {goals} |")
    return "\n".join(lines)


def ops_table(part: Record) -> str:
    """Ops beside their rivals."""
    return _timed_rows(part, lambda row: "" if row["correct"] else "WRONG")


def layers_table(part: Record) -> str:
    """Layers pruned by each method, with how many of the kept keys are those of kvpress."""
    return _timed_rows(part, lambda row: f"{row['common']:.1%} of the kept keys are theirs too")


def decode_table(part: Record) -> str:
    """A decode step's attention over pruned caches."""
    return _timed_rows(part, lambda row: "")


CPU_TABLES: dict[str, Callable[[Record], str]] = {
    "ops": ops_table,
    "layers": layers_table,
    "decode": decode_table,
    "prefill": prefill.table,
    "prefill_model": prefill.model_table,
    "memory": memory.table,
}


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def accuracy_table(report: Record) -> str:
    """Answers that contain the value, by method and kept share, and the time of a prefill at the smallest share.

    Reports of version 0.1 counted exact matches alone, under the name `accuracy`.
    """
    rows = report["rows"]
    key, counted = "contained", "Answers that contain the value"
    if key not in rows[0]:
        key, counted = "accuracy", "Exact match"
    shares = sorted({row["keep"] for row in rows if 0 < row["keep"] < 1}, reverse=True)
    least, most = report["context_chars"]
    head = (
        f"{counted}, {report['questions']} questions about {report['contexts']} texts of {least:,} to {most:,} "
        f"characters, {report['facts_per_context']} facts in each; {report['model']}, {report['device']}, "
        f"{report['dtype']}, {report['date']}; `bench/results/{ACCURACY}`.\n"
    )
    lines = ["| method | " + " | ".join(f"{share:.0%} kept" for share in shares) + " | prefill, ms |"]
    lines.append("|---" * (len(shares) + 2) + "|")
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "none"):
        found = {row["keep"]: row for row in rows if row["method"] == method}
        if method == "full":
            cells = [f"{found[1.0][key]:.0%}", *[""] * (len(shares) - 1)]
        else:
            cells = [_share(found.get(share, {}).get(key)) for share in shares]
        name = {"full": "full cache"}.get(method, f"`{method}`")
        _, milliseconds = min(
            (share, row["prefill_ms"]) for share, row in found.items() if row["prefill_ms"] is not None
        )
        lines.append(f"| {name} | {' | '.join(cells)} | {milliseconds:.0f} |")
    return head + "\n" + "\n".join(lines)


def table(name: str, results: Path = RESULTS) -> str:
    """The table of this name, from what is in `results`; a sentence where nothing is."""
    if name == "accuracy":
        return accuracy_table(json.loads((results / ACCURACY).read_text()))
    if name.removeprefix("soft_") in soft_quality.TASKS:
        return soft_quality.table(results, name.removeprefix("soft_"))
    if name.removeprefix("quality_") in quality.TASKS:
        return quality.table(name.removeprefix("quality_"), results)
    if name == "serve":
        return serve.table(results)
    if name == "miner":
        return miner.table(results)
    if name == "kills":
        return kills.table(results)
    if name == "encode":
        return encode_cpu.table(results)
    if name == "kept":
        return kept_answers.table(json.loads((results / kept_answers.RECORD.name).read_text()))
    parts = []
    for path in sorted(results.glob("cpu-*.json")):
        document = json.loads(path.read_text())
        if name in document:
            parts.append(_head(document[name], path.name) + "\n" + CPU_TABLES[name](document[name]))
    return "\n\n".join(parts) or "No record is here yet: `make bench-cpu` makes one."


def filled(text: str, results: Path = RESULTS) -> str:
    """A page with every table written anew."""
    return _TABLE.sub(lambda found: f"{found[1]}{table(found['name'], results)}\n{found[4]}", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the pages, or with --check say which are behind."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a page is behind its records"
    )
    parser.add_argument("--plots", action="store_true", help="draw the pictures of docs/ as well")
    options = parser.parse_args(argv)
    behind = []
    for page in PAGES:
        path = CHECKOUT / page
        before, after = path.read_text(), filled(path.read_text())
        if before != after:
            behind.append(page)
            if not options.check:
                path.write_text(after)
    if options.plots:
        for path in sorted(RESULTS.glob("cpu-*.json")):
            if "memory" in (document := json.loads(path.read_text())):
                memory.plot(document["memory"], CHECKOUT / "docs" / "prefill_memory.png")
        plot_load(json.loads((RESULTS / "serve-soak.json").read_text()), CHECKOUT / "docs" / "serve_soak.png")
        reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("soft-facts-*.json"))]
        pruned = quality.as_report(json.loads((RESULTS / "quality-facts.json").read_text()), PRUNED)
        plot_reports([*reports, pruned], CHECKOUT / "docs" / "smollm2.png")
        pruning_plot.plot(json.loads((RESULTS / ACCURACY).read_text()), CHECKOUT / "docs" / "pruning_accuracy.png")
    print(f"{'behind' if options.check else 'written'}: {', '.join(behind) or 'nothing'}")
    return int(options.check and bool(behind))


if __name__ == "__main__":
    sys.exit(main())
