"""What a local subnet is made of: miners that differ, tiers of the chosen model, ports that are free."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.local.coarser import VARIABLE, Coarser
from condense_core.neurons.local.report import least_correlation
from condense_core.neurons.local.setting import flags, free_ports, miner_kinds, write_tiers
from condense_core.neurons.mining.backends import RemoteBackend
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import read_tiers

METHODS = {"pool": {"ratios": [2, 4, 8]}, "select": {"ratios": "any"}}


def test_miners_differ_as_long_as_there_are_differences() -> None:
    kinds = miner_kinds(METHODS, 7)
    assert [kind.name for kind in kinds] == [
        *("pool", "select", "pool x2", "select x2", "pool x4", "select x4"),
        "pool",
    ]
    assert kinds[2].most == 8


@pytest.mark.parametrize("model", ["smollm2-135m", 'C:\\models\\"quoted"', "a/b"])
def test_the_tiers_are_the_subnet_s_own_with_another_model(model: str, tmp_path: Path) -> None:
    own, made = read_tiers(), write_tiers(tmp_path / "tiers.toml", model)
    assert made.version == own.version
    assert made.schedule == own.schedule
    for name, tier in own.tiers.items():
        assert made.tiers[name] == tier.model_copy(update={"model": model, "timeout": 60.0})


def test_ports_are_different_and_free() -> None:
    ports = free_ports(8)
    assert len(set(ports)) == 8
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_options_become_arguments() -> None:
    assert flags({"port": 0, "json": True, "no": False, "none": None}) == ["--port", "0", "--json"]


def test_a_list_is_an_option_for_each() -> None:
    assert flags({"allow": ["a", "b"], "none": []}) == ["--allow", "a", "--allow", "b"]


@pytest.mark.parametrize(("asked", "expected"), [(2.0, 6.0), (4.0, 8.0), (12.0, 12.0)])
def test_a_coarser_miner_asks_for_a_higher_ratio(
    asked: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = []

    async def compress(self: RemoteBackend, ask: Ask, *, priority: int, timeout: float) -> SoftTokens | None:
        ratios.append(ask.ratio)
        return None

    monkeypatch.setenv(VARIABLE, '{"server": "http://127.0.0.1:1", "method": "pool", "factor": 3, "most": 8}')
    monkeypatch.setattr(RemoteBackend, "compress", compress)
    asyncio.run(Coarser().compress(Ask(tier="research", text="a", ratio=asked), priority=0, timeout=1.0))
    assert ratios == [expected]


def test_a_coarser_miner_without_its_settings_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, '{"server": "http://127.0.0.1:1"}')
    with pytest.raises(ValueError, match=r"CONDENSE_COARSER: expected JSON with server, method, factor and most"):
        Coarser()


def test_the_least_correlation_of_two_validators_counts() -> None:
    same, other = {"a": 0.7, "b": 0.3}, {"a": 0.3, "b": 0.7}
    assert least_correlation([same, same], ["a", "b", "c"]) == pytest.approx(1)
    assert least_correlation([same, same, other], ["a", "b"]) == pytest.approx(-1)
    assert least_correlation([same, {"a": 0.5, "b": 0.5}], ["a", "b"]) is None
    assert least_correlation([same], ["a", "b"]) is None
