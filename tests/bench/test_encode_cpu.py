"""What reading costs on a CPU: the program runs, and docs/encoder.md gets a table of its record."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def encode() -> Iterator[ModuleType]:
    """`bench/encode_cpu.py`, which is in no installed package."""
    sys.path.insert(0, str(CHECKOUT))
    try:
        from bench import encode_cpu as encode

        yield encode
    finally:
        sys.path.remove(str(CHECKOUT))


def test_a_case_is_measured_judged_and_written(
    encode: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = next(case for case in encode.CASES if case.model == "condense-tiny" and not case.mixed)
    monkeypatch.setattr(encode, "CASES", (case,))
    ended = encode.main(["--rounds", "1", "--out", str(tmp_path)])
    [path] = tmp_path.glob("encode-*.json")
    [row] = json.loads(path.read_text())["rows"]
    assert ended == int(not all(goal["met"] for goal in row["goals"]))
    assert row["tokens"] == round(7000 / encode.CHARS_PER_TOKEN["condense-tiny"])
    faster, memory = row["goals"]
    assert faster["reached"] == row["baseline"]["padded_over_packed"] > 0
    assert memory["reached"] == row["peak_bytes"] / row["layer_activation_bytes"] > 0
    assert "condense-tiny, one: at least 0.97x" in capsys.readouterr().out
    last = encode.table(tmp_path).splitlines()[-1]
    assert last.startswith(f"| condense-tiny, one of 7,000 characters | 2 | {row['tokens']:,} |")


def test_without_a_record_the_table_says_how_to_make_one(encode: ModuleType, tmp_path: Path) -> None:
    assert encode.table(tmp_path) == "No record is here yet: `python -m bench.encode_cpu` makes one."


def test_an_unknown_model_is_refused(encode: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        encode.main(["--models", "gpt"])
    assert "--models: gpt, expected some of condense-tiny, smollm2-135m" in capsys.readouterr().err
