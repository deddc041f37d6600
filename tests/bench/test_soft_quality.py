"""The table of answers from soft tokens says what the reports hold, and what is missing where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import soft_quality


def row(method: str, ratio: float, right: float, share: float | None) -> dict[str, Any]:
    return {
        "method": method,
        "ratio": ratio,
        "contained": right,
        "share_of_full": share,
        "recovered": 0.5,
        "positions": 1234.4,
        "num_questions": 90,
        "intervals": {"contained": [right - 0.1, right + 0.1], "share_of_full": [0.5, 1.25], "recovered": [0.4, 0.6]},
    }


def test_every_row_once_and_no_context_once(tmp_path: Path) -> None:
    head = {"model": "m", "dtype": "bfloat16", "device": "CPU", "date": "2026-11-27", "context_chars": [6000, 7000]}
    reports = {
        "a": [row("full", 0, 0.4, 1.0), row("none", 0, 0.1, 0.0), row("mixed", 2.5, 0.3, 0.75)],
        "b": [row("full", 0, 0.5, 1.0), row("none", 0, 0.1, 0.0), row("pool", 4, 0.2, None)],
    }
    for name, rows in reports.items():
        (tmp_path / f"soft-facts-{name}.json").write_text(json.dumps({**head, "rows": rows}))
    lines = soft_quality.table(tmp_path).splitlines()
    assert lines[0].startswith("m, bfloat16, CPU, 2026-11-27; facts in varied wording in contexts of 6,000 to 7,000")
    assert lines[4:] == [
        "| the full text | 1,234 | 90 | 40% [30%, 50%] |  |  |",
        "| nothing | 1,234 | 90 | 10% [0%, 20%] |  |  |",
        "| `mixed`, 2.5x | 1,234 | 90 | 30% [20%, 40%] | 75% [50%, 125%] | 0.50 [0.40, 0.60] |",
        "| the full text | 1,234 | 90 | 50% [40%, 60%] |  |  |",
        "| `pool`, 4x | 1,234 | 90 | 20% [10%, 30%] |  | 0.50 [0.40, 0.60] |",
    ]


def test_without_a_report_it_says_how_to_make_one(tmp_path: Path) -> None:
    assert "tools/train_smollm2.sh eval" in soft_quality.table(tmp_path)


def test_tasks_have_tables_of_their_own(tmp_path: Path) -> None:
    head = {"model": "m", "dtype": "bfloat16", "device": "CPU", "date": "2026-11-27", "context_chars": [6000, 7000]}
    (tmp_path / "soft-squad-a.json").write_text(json.dumps({**head, "rows": [row("pool", 4, 0.2, None)]}))
    assert "questions of XQuAD about contexts of" in soft_quality.table(tmp_path, "squad")
    assert "No report" in soft_quality.table(tmp_path, "facts")
