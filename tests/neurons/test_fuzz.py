"""A few hundred mutated requests and answers; ``fuzz.py`` sends as many as one likes."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")


@pytest.fixture(scope="module")
def fuzz() -> Any:
    path = Path(__file__).with_name("fuzz.py")
    spec = importlib.util.spec_from_file_location("neurons_fuzz", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_request_brings_a_miner_down(fuzz: Any) -> None:
    found = asyncio.run(fuzz.fuzz_miner(600, seed=1))
    assert found["200"] > 5
    assert found["401"] > 50
    assert found["422"] > 50


def test_no_answer_is_taken_for_what_it_is_not(fuzz: Any) -> None:
    found = fuzz.fuzz_answers(1000, seed=1)
    assert found["refused"] > 800
