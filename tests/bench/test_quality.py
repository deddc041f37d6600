"""The tables of answers from pruned caches, from small records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import quality


def cell(contained: list[float], loss: float) -> dict[str, Any]:
    return {"contained": contained, "loss": [loss] * len(contained)}


def record(task: str) -> dict[str, Any]:
    """Six contexts of four questions, of which the full cache answers two and ``half`` one."""
    contexts: list[dict[str, Any]] = [
        {
            "full@1": cell([1.0, 1.0, 0.0, 0.0], 2.0),
            "none@0": cell([0.0] * 4, 6.0),
            "half@0.5": cell([1.0, 0.0, 0.0, 0.0], 4.0),
            "half@0.25": None,
        }
        for _ in range(6)
    ]
    return {"task": task, "model": "m", "dtype": "float32", "date": "2026-11-27", "contexts": contexts}


def test_shares_are_of_the_full_cache() -> None:
    answers = quality.Answers(record("facts"))
    assert answers.rows == ["full@1", "none@0", "half@0.5"]
    for score in ("contained", "loss"):
        share, interval, count = quality.share_kept(answers, "half@0.5", score) or (0.0, None, 0)
        assert share == pytest.approx(0.5)
        assert interval == pytest.approx([0.5, 0.5])  # every context is the same
        assert count == 24


@pytest.mark.parametrize(("task", "shown"), [("facts", "0.50 [0.50, 0.50] (25% right"), ("squad", "(4.00 nats")])
def test_the_table_and_its_rival(task: str, shown: str) -> None:
    theirs = {"contexts": [{"half@0.5": cell([0.0] * 4, 5.0)} for _ in range(6)]}
    text = quality.quality_table(record(task), theirs)
    assert shown in text
    assert "ours better" in text
    assert "24 questions about 6 contexts" in text
    swapped = {"contexts": [{"half@0.5": cell([1.0] * 4, 1.0)} for _ in range(6)]}
    assert "ours WORSE" in quality.quality_table(record(task), swapped)
    assert "kvpress" not in quality.quality_table(record(task))


def test_a_context_that_is_not_finished_counts_where_it_can() -> None:
    unfinished = record("facts")
    unfinished["contexts"].append({"full@1": cell([1.0], 1.0)})
    answers = quality.Answers(unfinished)
    assert answers.complete("half@0.5", "full@1") == list(range(6))
    assert quality.share_kept(answers, "half@0.25", "contained") is None


def test_a_task_without_a_record_says_how_to_make_one(tmp_path: Path) -> None:
    assert "python -m bench.pruning_quality" in quality.table("facts", tmp_path)
    (tmp_path / "quality-facts.json").write_text(json.dumps(record("facts")))
    assert "| `half` |" in quality.table("facts", tmp_path)
