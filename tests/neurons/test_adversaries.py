"""Cheating does not pay: the proof of ``adversaries.py`` at small scale, with every kind of adversary."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
import bittensor
import httpx

from condense_core.neurons.chain.server import RemoteNode
from condense_core.neurons.local.adversaries.kinds import ADVERSARIES, create
from condense_core.neurons.protocol.identity import read_identity
from condense_core.neurons.protocol.messages import IDENTITY
from condense_core.neurons.tiers import DEFAULT_TIERS
from condense_testing.arena import Arena, Verdict, open_arena, spearman, verdicts
from condense_testing.chains import NETUID

ROUNDS, SEED = 4, 2
REASONS = {
    "too-few-rows": "answer: embeds has 1 soft tokens",
    "too-many-rows": "answer: embeds has",
    "lower-ratio": "a ratio of 1, expected at least",
    "longer-context": "answer: it says that the context has",
    "nan": "answer: embeds has NaN or infinite values",
    "infinite": "answer: embeds has NaN or infinite values",
    "huge": "answer: a value of",
    "one-huge-row": "answer: a value of",
    "another-width": "answer: soft tokens are 383 wide",
    "another-dtype": "answer: ",
    "another-model": "answer: soft tokens were made by 'another'",
    "claims-memory": "answer: ",
    "cut-short": "answer: ",
    "no-file": "answer: this is JSON text",
    "replay": "answer: soft tokens of another context",
    "replay-signed": "not signed: answer: its signature is not that",
    "unsigned": "not signed: answer: it is not signed",
    "forged-signature": "not signed: answer: its signature is not that",
    "forged-receiver": "not signed: answer: its signature is not that",
    "late": "late: ",
    "drip": "late: ",
    "endless": "it has more than",
    "bomb": "it is compressed",
    "crash": "broken: ",
    "redirect": "refused: 307",
    "relay": "refused: 401",
}
"""What a validator writes down of who sends no answer."""


@pytest.fixture(scope="module")
def played() -> Iterator[tuple[Arena, list[Verdict]]]:
    """A few rounds whose questions are the same each time: so few would let luck decide now and then."""
    rng = random.Random(SEED)

    async def play() -> tuple[Arena, list[Verdict]]:
        async with open_arena(timeout=4.0, seconds=2.0) as arena:
            await arena.play(ROUNDS)
            return arena, verdicts(arena, await arena.on_chain(), arena.true_quality(8), ROUNDS)

    with pytest.MonkeyPatch.context() as patch:
        drawn = SimpleNamespace(token_hex=lambda count: f"{rng.getrandbits(8 * count):0{2 * count}x}")
        patch.setattr("condense_core.neurons.validating.rounds.secrets", drawn)
        yield asyncio.run(play())


def test_what_is_claimed_holds(played: tuple[Arena, list[Verdict]]) -> None:
    _, found = played
    assert len(found) == 5
    assert [f"{verdict.claim}: {verdict.numbers}" for verdict in found if not verdict.holds] == []


@pytest.mark.parametrize("name", REASONS)
def test_what_is_no_answer_earns_nothing_and_it_is_written_down_why(
    played: tuple[Arena, list[Verdict]], name: str
) -> None:
    arena, _ = played
    assert set(arena.scores(name)) == {0.0}
    assert REASONS[name] in arena.why(name)


def test_every_adversary_was_asked_in_every_round(played: tuple[Arena, list[Verdict]]) -> None:
    arena, _ = played
    for one in arena.rounds:
        assert {arena.names[outcome.hotkey] for outcome in one.outcomes} == set(arena.names.values())
    assert set(ADVERSARIES) < set(arena.names.values())
    assert len(ADVERSARIES) >= 50


def test_a_kind_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="kind: got 'angel', expected one of zeros, "):
        create("angel", None)


def test_spearman_is_the_correlation_of_ranks() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)


def test_adversaries_are_announced_and_served_by_one_process(tmp_path: Path) -> None:
    found = {}
    for name in ("h1", "h2"):
        wallet = bittensor.Wallet(name="w", hotkey=name, path=str(tmp_path))
        wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
        found[name] = bittensor.Wallet(name="w", hotkey=name, path=str(tmp_path)).hotkey.ss58_address
    tiers = DEFAULT_TIERS.read_text().replace("mistralai/Mistral-7B-Instruct-v0.2", "condense-tiny")
    (tmp_path / "tiers.toml").write_text(tiers)
    socket, python = tmp_path / "chain", [sys.executable, "-m"]
    chain = subprocess.Popen(
        [*python, "condense_core.neurons.chain", str(socket), "--netuid", str(NETUID), "--block-time", "0.1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert chain.stdout is not None
        assert "listens" in chain.stdout.readline()

        async def register() -> None:
            node = RemoteNode(socket)
            for hotkey in found.values():
                await node.control("register", netuid=NETUID, hotkey=hotkey)
            await node.close()

        asyncio.run(register())
        options = {"netuid": NETUID, "network": f"memory:{socket}", "wallet": "w", "wallet-path": tmp_path}
        options |= {"tiers": tmp_path / "tiers.toml", "state": tmp_path / "state"}
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        served = subprocess.Popen(
            [*python, "condense_core.neurons.local.adversaries", "zeros=h1", "late=h2", *flags],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_COLOR": "1"},
        )
        try:
            assert served.stderr is not None
            urls: dict[str, str] = {}
            while len(urls) < 2 and (line := served.stderr.readline()):
                if told := re.match(r"([\w-]+): \w+ at (http://[\d.:]+)", line):
                    urls[told[1]] = told[2]
            assert set(urls) == {"zeros", "late"}
            for url, hotkey in zip(urls.values(), found.values(), strict=True):
                told = httpx.get(url + IDENTITY, timeout=30)
                assert "research" in read_identity(told.content, told.headers, hotkey=hotkey).tiers
            served.send_signal(signal.SIGTERM)
            assert served.wait(30) in (0, -signal.SIGTERM)
        finally:
            served.kill()
            served.wait(10)
    finally:
        chain.terminate()
        chain.wait(10)
