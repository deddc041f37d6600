"""What a miner compresses with serves what it is asked for, whichever ratios its checkpoint was trained on."""

from __future__ import annotations

import asyncio

import pytest

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.mining.backends import Backend, EngineBackend, RemoteBackend, served_ratio
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import read_tiers
from condense_core.serving.engine import CompressionEngine
from condense_core.serving.http.app import create_app
from condense_core.serving.service import LocalService
from condense_testing.running_server import running_server

TEXT = "The keeper of the north archive counts the lamps at dusk. " * 30
TIER = read_tiers().tiers["research"].model_copy(update={"model": "condense-tiny"})


@pytest.mark.parametrize(
    ("asked", "method", "ratios", "expected"),
    [
        (3.0, "pool", [2, 4, 8], 4),
        (4.0, "pool", [2, 4, 8], 4),
        (2.5, "pool", "any", 3),
        (2.5, "mixed", [2, 4], 2.5),
        (2.5, "select", "any", 2.5),
        (9.0, "pool", [2, 4, 8], 9.0),  # the engine says which ratios there are
    ],
)
def test_the_next_higher_ratio_is_served(asked: float, method: str, ratios: list[int] | str, expected: float) -> None:
    assert served_ratio(asked, method, ratios) == expected


async def answered(backend: Backend) -> list[SoftTokens]:
    await backend.start()
    try:
        assert backend.serves(TIER)
        assert backend.is_ready
        asks = [Ask(tier="research", text=TEXT, ratio=ratio, question="Who counts?") for ratio in (2.0, 3.0, 12.0)]
        return [await backend.compress(ask, priority=0, timeout=60.0) for ask in asks]
    finally:
        await backend.stop()


def engine() -> CompressionEngine:
    return CompressionEngine.from_pretrained(embedded_model_path(), methods=("pool",), prunes=False, answers=False)


def test_an_engine_and_a_server_answer_every_ratio_alike() -> None:
    here = asyncio.run(answered(EngineBackend(engine())))
    assert [soft.ratio for soft in here] == [2, 4, 16]
    with running_server(create_app(LocalService(engine()), page=False)) as url:
        there = asyncio.run(answered(RemoteBackend(url)))
    for one, other in zip(here, there, strict=True):
        assert one.to_bytes() == other.to_bytes()
