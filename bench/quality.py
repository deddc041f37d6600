"""The tables of an LLM's answers from pruned caches, from the records of `pruning_quality` and `kvpress_quality`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condense_core.tasks.confidence import cluster_sums, compare, ratio_interval

Record = dict[str, Any]
TASKS = ("facts", "squad")


class Answers:
    """The answers of a record, row by row: ``values("snapkv@0.5", "loss")``."""

    def __init__(self, record: Record) -> None:
        self.contexts = record["contexts"]
        self.rows = list(dict.fromkeys(key for cells in self.contexts for key, cell in cells.items() if cell))

    def complete(self, *rows: str) -> list[int]:
        """The contexts in which all of ``rows`` were measured."""
        return [i for i, cells in enumerate(self.contexts) if all(cells.get(row) for row in rows)]

    def values(self, row: str, score: str, contexts: Sequence[int]) -> tuple[list[float], list[int]]:
        """What each question gave, and the number of its context."""
        found = [(float(value), i) for i in contexts for value in self.contexts[i][row][score]]
        return [value for value, _ in found], [i for _, i in found]


def share_kept(ours: Answers, row: str, score: str) -> tuple[float, list[float] | None, int] | None:
    """The share of the full cache's worth that a row keeps, its interval and the number of questions.

    Of ``contained`` the right answers over those of the full cache; of ``loss`` what is recovered of the difference
    between no context and all of it. None where nothing was measured.
    """
    contexts = ours.complete(row, "full@1", "none@0")
    if not contexts:
        return None
    own, clusters = ours.values(row, score, contexts)
    full, _ = ours.values("full@1", score, contexts)
    none = ours.values("none@0", score, contexts)[0] if score == "loss" else [0.0] * len(own)
    sign = -1.0 if score == "loss" else 1.0
    gained = cluster_sums([sign * (a - b) for a, b in zip(own, none, strict=True)], clusters)
    whole = cluster_sums([sign * (a - b) for a, b in zip(full, none, strict=True)], clusters)
    total = sum(whole.values())
    if total <= 0:
        return None
    return sum(gained.values()) / total, ratio_interval(list(gained.values()), list(whole.values())), len(own)


def _beside(ours: Answers, theirs: Answers | None, row: str, score: str) -> str:
    """What kvpress has for the same questions, and whether the difference is beyond its interval."""
    theirs_row = row.replace("across_layers(kvzip)", "kvzip")  # as kvpress selects
    if theirs is None or theirs_row not in theirs.rows or row.startswith("kvzip@"):
        return ""
    contexts = [i for i in theirs.complete(theirs_row) if i < len(ours.contexts) and ours.contexts[i].get(row)]
    if not contexts:
        return ""
    (mine, clusters), (other, _) = ours.values(row, score, contexts), theirs.values(theirs_row, score, contexts)
    found = compare(mine, other, clusters)
    mean = sum(other) / len(other)
    verdict = ""
    if found.interval is not None and not found.interval[0] <= 0 <= found.interval[1]:
        better = (found.difference > 0) == (score != "loss")
        verdict = ", ours better" if better else ", ours WORSE"
    return f"; kvpress {mean:.0%}{verdict}" if score == "contained" else f"; kvpress {mean:.2f}{verdict}"


def quality_table(record: Record, kvpress: Record | None = None) -> str:
    """For each method and share what is kept of the full cache's worth, with 95% intervals, and kvpress beside it."""
    ours, theirs = Answers(record), None if kvpress is None else Answers(kvpress)
    score = "loss" if record["task"] == "squad" else "contained"
    shares = sorted({key.split("@")[1] for key in ours.rows} - {"0", "1"}, key=float, reverse=True)
    methods = list(dict.fromkeys(key.split("@")[0] for key in ours.rows if key not in ("full@1", "none@0")))
    contexts = ours.complete("full@1", "none@0")
    values = {row: ours.values(row, score, contexts)[0] for row in ("full@1", "none@0")}
    full, none = (sum(values[row]) / max(len(values[row]), 1) for row in ("full@1", "none@0"))
    what = "Recovered loss" if score == "loss" else "Right answers, as a share of those from the full cache"
    unit = "nats" if score == "loss" else "right"
    level = f"{full:.2f} {unit}, none {none:.2f}" if score == "loss" else f"{full:.0%} {unit}, none {none:.0%}"
    asked = f"{len(values['full@1'])} questions about {len(contexts)} contexts"
    lines = [
        f"{what} (full cache: {level}; {asked}), with 95% intervals.",
        "",
        f"{record['model']}, {record['dtype']}, {record['date']}.",
        "",
        f"| method | {' | '.join(f'{float(share):.3g} kept' for share in shares)} |",
        "|---" * (len(shares) + 1) + "|",
    ]
    for method in methods:
        cells = []
        for share in shares:
            row = f"{method}@{share}"
            kept = share_kept(ours, row, score) if row in ours.rows else None
            if kept is None:
                cells.append("")
                continue
            value, bounds, count = kept
            interval = "" if bounds is None else f" [{bounds[0]:.2f}, {bounds[1]:.2f}]"
            scale = f"{value:.2f}{interval}"
            mean = _mean(ours, row, score)
            fewer = "" if count == len(values["full@1"]) else f"; {count} questions"
            cells.append(f"{scale} ({mean}{_beside(ours, theirs, row, score)}{fewer})")
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(ours: Answers, row: str, score: str) -> str:
    values, _ = ours.values(row, score, ours.complete(row))
    mean = sum(values) / len(values)
    return f"{mean:.2f} nats" if score == "loss" else f"{mean:.0%} right"


def table(task: str, results: Path) -> str:
    """The table of ``task`` from ``quality-TASK.json`` and ``quality-TASK-kvpress.json``; a sentence where none is."""
    path = results / f"quality-{task}.json"
    if not path.exists():
        return f"No record is here yet: `python -m bench.pruning_quality bench/results/{path.name}` makes one."
    theirs = results / f"quality-{task}-kvpress.json"
    return quality_table(json.loads(path.read_text()), json.loads(theirs.read_text()) if theirs.exists() else None)


def as_report(record: Record, methods: Sequence[str]) -> dict[str, Any]:
    """The rows of some pruning methods as a report of `condense eval --pruning`, for pictures."""
    ours = Answers(record)
    rows = []
    for key in ours.rows:
        method, share = key.rsplit("@", 1)
        if method not in methods or (kept := share_kept(ours, key, "contained")) is None:
            continue
        value, interval, _ = kept
        rows.append(
            {
                "method": f"pruned: {method}",
                "keep": float(share),
                "share_of_full": value,
                "intervals": {"share_of_full": interval},
            }
        )
    questions = sum(len(cells["full@1"]["contained"]) for cells in record["contexts"])
    chars = record.get("context_chars", [6000, 7000])
    facts = {"model": record["model"], "questions": questions, "contexts": len(record["contexts"])}
    return {**facts, "context_chars": chars, "task": record["task"], "rows": rows}
