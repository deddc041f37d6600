"""Stored reports of ``condense eval``: read, and compared row with row on the questions that both were asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from condense_core.files.text import decode_text
from condense_core.tasks.confidence import Difference, compare
from condense_core.tasks.tally import MEASURES

Report = dict[str, Any]
Row = dict[str, Any]

MAX_BYTES = 256 * 2**20
CONTROLS = ("full", "none")


def read_report(path: str | Path) -> Report:
    """A report that ``condense eval -o`` wrote.

    Raises:
        ValueError: the file is missing, too large, or no such report; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"report: {path} is not a file; expected one that 'condense eval -o' wrote")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES:,} bytes; expected a report of 'condense eval -o'")
    try:
        report = json.loads(decode_text(data, str(path)))
    except (json.JSONDecodeError, RecursionError):
        report = None
    if not isinstance(report, dict) or not _is_report(report):
        raise ValueError(f"{path}: no report; expected a file that 'condense eval -o' wrote")
    return report


def _is_report(report: Report) -> bool:
    """Whether tables, comparisons and pictures find what they read."""
    texts, counts = ("model", "corpus"), ("contexts", "questions")
    rows, bounds = report.get("rows"), report.get("context_chars")
    if not all(isinstance(report.get(key), str) for key in texts):
        return False
    if not all(isinstance(report.get(key), int) for key in counts) or not isinstance(report.get("complete"), bool):
        return False
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(isinstance(bound, int) for bound in bounds):
        return False
    return isinstance(rows, list) and all(isinstance(row, dict) and _is_row(row) for row in rows)


def _is_row(row: Row) -> bool:
    if not isinstance(row.get("method"), str):
        return False
    if row.get("not_possible"):
        return isinstance(row.get("keep"), int | float)
    scores = ("contained", "exact_match", "f1", "loss", "recovered", "ratio", "answer_ms")
    return all(isinstance(row.get(key), int | float) for key in scores)


def size_of(row: Row) -> float:
    """The ratio of soft tokens, or the kept share of a cache; 0 for the controls."""
    return 0.0 if row["method"] in CONTROLS else float(row["keep"] if "keep" in row else row["ratio"])


def name_of(row: Row) -> str:
    """How a row is called: ``pool 4x``, ``snapkv 25%``."""
    if row["method"] in CONTROLS:
        return {"full": "full", "none": "no context"}[row["method"]]
    return f"{row['method']} {size_of(row):.4g}x" if "keep" not in row else f"{row['method']} {size_of(row):.3g}"


def compare_reports(
    reports: Sequence[Report], *, measure: str = "contained", against: str | None = None
) -> list[dict[str, Any]]:
    """Pairs of rows, question by question; see ``confidence.compare`` for what is said of each.

    Args:
        reports: as ``read_report`` gives them.
        measure: one of ``MEASURES``.
        against: a method: every other row is compared with that method's at the same ratio or kept share, or with the
            control of that name. None, for two reports: the second's rows with those of the same name in the first.

    Raises:
        ValueError: there is no such measure or method, no pair, or a pair has no question in common.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure: got {measure!r}, expected one of {', '.join(MEASURES)}")
    rows = [(i, row) for i, report in enumerate(reports) for row in report["rows"] if not row.get("not_possible")]
    if against is None:
        if len(reports) != 2:
            raise ValueError(f"reports: got {len(reports)}; expected two to compare, or a method to compare with")
        pairs = [
            (second, first)
            for second in rows
            for first in rows
            if (first[0], second[0]) == (0, 1) and _key(first[1]) == _key(second[1])
        ]
    else:
        bases = [row for row in rows if row[1]["method"] == against]
        if not bases:
            known = ", ".join(dict.fromkeys(row["method"] for _, row in rows))
            raise ValueError(f"against: got {against!r}, expected one of {known}")
        pairs = [
            (row, base)
            for row in rows
            for base in bases
            if row[1]["method"] not in (against, *CONTROLS) and (against in CONTROLS or _size(row[1]) == _size(base[1]))
        ]
        pairs = _nearest(pairs)
    if not pairs:
        raise ValueError("reports: no two rows to compare; expected a method at the same ratio or kept share in both")
    return [_compared(reports, first, second, measure) for first, second in pairs]


Numbered = tuple[int, Row]


def _nearest(pairs: list[tuple[Numbered, Numbered]]) -> list[tuple[Numbered, Numbered]]:
    """Each row with one base: that of its own report, where there is one."""
    chosen: dict[int, tuple[Numbered, Numbered]] = {}
    for row, base in pairs:
        known = chosen.get(id(row[1]))
        if known is None or (known[1][0] != row[0] and base[0] == row[0]):
            chosen[id(row[1])] = (row, base)
    return list(chosen.values())


def _size(row: Row) -> tuple[bool, float]:
    return "keep" in row, size_of(row)


def _key(row: Row) -> tuple[str, bool, float]:
    return row["method"], *_size(row)


def _compared(reports: Sequence[Report], first: Numbered, second: Numbered, measure: str) -> dict[str, Any]:
    values = [_by_question(reports[number], row, measure) for number, row in (first, second)]
    both = [question for question in values[0] if question in values[1]]
    if not both:
        raise ValueError(
            f"reports: {name_of(first[1])!r} and {name_of(second[1])!r} have no question in common; expected reports "
            "of the same corpus, seed and shape, with answers (as release 0.2 writes them)"
        )
    found: Difference = compare(
        [values[0][question][0] for question in both],
        [values[1][question][0] for question in both],
        [values[0][question][1] for question in both],
    )
    names = {"first_row": name_of(first[1]), "second_row": name_of(second[1])}
    return {**names, "first_report": first[0], "second_report": second[0], "measure": measure, **found.as_dict()}


def _by_question(report: Report, row: Row, measure: str) -> dict[str, tuple[float, int]]:
    """The values of a row, and their contexts, by question."""
    asked, values = report.get("asked"), row.get("answers")
    found = values.get(measure) if isinstance(values, dict) else None
    if not isinstance(asked, list) or not isinstance(found, list):
        return {}
    try:
        return {q["id"]: (float(value), int(q["context"])) for q, value in zip(asked, found, strict=False)}
    except (TypeError, KeyError, ValueError):
        return {}


def as_comparison_table(compared: Sequence[dict[str, Any]]) -> Table:
    """What ``compare_reports`` found, a line for each pair."""
    loss = compared[0]["measure"] == "loss"
    shown = "{:.2f}".format if loss else "{:.0%}".format
    signed = "{:+.2f}".format if loss else "{:+.0%}".format
    two_reports = any(one["first_report"] != one["second_report"] for one in compared)
    table = Table(
        title=f"{compared[0]['measure']}, question by question; 95% intervals over contexts",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(("row", "with", "questions", "first", "second", "difference", "p", "better : worse")):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2, overflow="fold")
    for one in compared:
        names = [f"{one[f'{which}_row']}" for which in ("first", "second")]
        if two_reports:
            names = [f"{name} ({one[f'{w}_report'] + 1})" for name, w in zip(names, ("first", "second"), strict=True)]
        bounds = one["interval"]
        interval = "" if bounds is None else f" [{', '.join(signed(bound).removesuffix('%') for bound in bounds)}]"
        better, worse = one["first_better"], one["second_better"]
        table.add_row(
            *names,
            f"{one['num_questions']}",
            shown(one["first"]),
            shown(one["second"]),
            signed(one["difference"]) + interval,
            f"{one['p']:.3f}",
            f"{worse} : {better}" if loss else f"{better} : {worse}",
        )
    return table
