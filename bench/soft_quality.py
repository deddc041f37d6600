"""The tables of an LLM's answers from soft tokens, from reports of `condense eval` (`results/soft-TASK-*.json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Report = dict[str, Any]


_FACTS = "facts in varied wording in"
TASKS = {"facts": _FACTS, "controls": _FACTS, "weights": _FACTS, "squad": "questions of XQuAD about"}


def table(results: Path, task: str = "facts") -> str:
    """A row for each way to give the context, each report's controls first; a sentence where there is no report."""
    reports = [json.loads(path.read_text()) for path in sorted(results.glob(f"soft-{task}-*.json"))]
    if not reports:
        return "No report is here yet: `tools/train_smollm2.sh eval` makes one."
    first = reports[0]
    low, high = first["context_chars"]
    where = f"{first['model']}, {first['dtype']}, {first['device']}, {first['date']}"
    lines = [
        f"{where}; {TASKS[task]} contexts of {low:,} to {high:,} characters; 95% intervals.",
        "",
        "| the model has | positions | questions | right | of full | recovered loss |",
        "|---|---|---|---|---|---|",
    ]
    written: list[str] = []
    for report in reports:
        for line in (_row(row, report.get("encoder_weights")) for row in report["rows"]):
            if line not in written:  # reports of the same questions have the same controls
                written.append(line)
    lines += written
    return "\n".join(lines)


def _row(row: dict[str, Any], encoder_weights: str | None) -> str:
    encoder = f", encoder in {encoder_weights}" if encoder_weights else ""
    made = f"`{row['method']}`, {row['ratio']}x{encoder}"
    name = {"full": "the full text", "none": "nothing"}.get(row["method"], made)
    shares = []
    for key in ("contained", "share_of_full"):
        bounds = row["intervals"].get(key)
        shown = "" if row[key] is None else f"{row[key]:.0%}"
        shares.append(f"{shown} [{bounds[0]:.0%}, {bounds[1]:.0%}]" if bounds and shown else shown)
    right, share = shares
    share = "" if row["method"] in ("full", "none") else share
    recovered = ""
    if row["method"] not in ("full", "none"):
        bounds = row["intervals"].get("recovered")
        recovered = f"{row['recovered']:.2f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")
    return f"| {name} | {row['positions']:,.0f} | {row['num_questions']} | {right} | {share} | {recovered} |"
