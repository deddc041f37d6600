"""The benchmark of a validator's round counts what it says it counts, and prints no speed of wrong scores."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from condense_core.compressor.condenser import Condenser
from condense_core.decoder.embedded import embedded_model_path

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """`bench/judge.py`, which is in no installed package."""
    sys.path.insert(0, str(CHECKOUT))
    try:
        from bench import judge

        yield judge
    finally:
        sys.path.remove(str(CHECKOUT))


@pytest.fixture(scope="module")
def recorded(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("records")
    bench.main(["--miners", "8", "--rounds", "1", "--device", "cpu", "--out", str(folder)])
    [path] = folder.iterdir()
    return json.loads(path.read_text())


def test_three_ways_agree_and_read_what_they_say(recorded: dict[str, Any]) -> None:
    """Of eight miners six are different, one is a copy and one is invalid."""
    assert recorded["correct"]
    readings = {name: rows[0]["readings"] for name, rows in recorded["ways"].items()}
    references = readings["batched"] - 6
    assert references >= 3  # full, none, and what needs no work
    assert readings == {"one by one": 7 * (1 + references), "cached": 7 + references, "batched": 6 + references}
    for rows in recorded["ways"].values():
        assert 0.3 < rows[0]["llm"] / rows[0]["seconds"] < 1


def test_a_speed_is_printed_only_where_scores_agree(bench: ModuleType, recorded: dict[str, Any]) -> None:
    table = bench.table(recorded)
    assert "8 miners, 1 rounds; condense-tiny, float32; " in table
    assert "| batched |" in table
    assert " |\n\nat least 3x one by one: " in table
    assert "of wall time in the LLM: " in table
    wrong = bench.table(recorded | {"correct": False, "apart": 0.2})
    assert wrong == "WRONG: scores of the three ways differ by up to 0.200, expected at most 0.01"


def test_the_clock_counts_a_pass_once(
    bench: ModuleType, tiny_condenser: Condenser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole model, whose layers are a module with hooks of their own, and of these alone."""
    ids = torch.tensor([[5, 6, 7]])
    ticks = itertools.count()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    with bench.inside(tiny_condenser) as clock:
        tiny_condenser.model(ids)
        tiny_condenser.model.model(ids)
    tiny_condenser.model(ids)
    assert clock.seconds == 2


def test_memory_is_looked_at_ten_times(bench: ModuleType) -> None:
    condenser = Condenser.from_pretrained(embedded_model_path(), method="pool", device="cpu")
    found = bench.growth(condenser, bench.read_tiers(), 2, 10)
    assert len(found["looks"]) == 10
    assert all(rss > 1e8 for _, rss in found["looks"])
    assert found["goals"][0]["met"] is None  # too short to say anything
    told = found | {"model": "m", "dtype": "float32", "machine": {"device": "here"}}
    assert "at most 1 MB a minute: not measured" in bench.table(told)
