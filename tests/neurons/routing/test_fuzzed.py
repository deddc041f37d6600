"""Nearly right requests end in errors of the project; ``condense_testing.fuzzing`` sends as many as one likes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")

from condense_testing.fuzzing import fuzz


def test_no_mutated_request_is_a_mistake_of_gateway_or_miner(tmp_path: Path) -> None:
    seen = asyncio.run(fuzz(tmp_path, 300))
    for answers in seen.values():
        assert sum(answers.values()) == 300
        assert set(answers) >= {"200", "413", "422", "404"}
        assert answers["200"] > 30
