"""``condense-validator`` as a process: it plays rounds with a real miner, is killed, goes on, and sets weights."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")
import bittensor
import httpx

from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.chain.opened import open_chain
from condense_core.neurons.chain.server import RemoteNode
from condense_core.neurons.incentive.standing import Standings
from condense_core.neurons.tiers import DEFAULT_TIERS
from condense_core.neurons.validating.ledger import Ledger
from condense_core.neurons.validator import main
from condense_testing.chains import NETUID

NEURONS = Path(__file__).resolve().parents[2] / "neurons"


@dataclass
class Host:
    """A chain in memory with a validator and a miner that serves the embedded model."""

    folder: Path
    keys: dict[str, str]

    @property
    def ledger(self) -> Path:
        return self.folder / "v" / self.keys["v"]

    def options(self, name: str, **changes: Any) -> list[str]:
        options = {
            "netuid": NETUID,
            "network": f"memory:{self.folder / 'chain'}",
            "wallet": "w",
            "wallet-path": self.folder,
            "hotkey": name,
            "tiers": self.folder / "tiers.toml",
            "state": self.folder / name,
            "port": 0,
            "threads": 1,
            "host": "127.0.0.1",
            **changes,
        }
        return [part for flag, value in options.items() if value is not None for part in (f"--{flag}", str(value))]

    @contextmanager
    def running(self, script: str, name: str, **changes: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """A neuron that has started, and its URL; it is killed at the end."""
        command = [sys.executable, str(NEURONS / script), *self.options(name, **changes)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
        said: list[str] = []
        try:
            assert process.stderr is not None
            while line := process.stderr.readline():
                said.append(line)
                if found := re.search(r"; (http://[\d.:]+)", line):
                    yield process, found[1]
                    return
            raise AssertionError(f"it ended: {''.join(said)}")
        finally:
            process.kill()
            process.wait(10)


def environment() -> dict[str, str]:
    return os.environ | {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("subnet")
    keys = {}
    for name in ("v", "m", "unknown"):
        wallet = bittensor.Wallet(name="w", hotkey=name, path=str(folder))
        wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
        keys[name] = bittensor.Wallet(name="w", hotkey=name, path=str(folder)).hotkey.ss58_address
    text = DEFAULT_TIERS.read_text().replace("mistralai/Mistral-7B-Instruct-v0.2", "condense-tiny")
    (folder / "tiers.toml").write_text(text.replace("max_chars = 2500", "max_chars = 1200"))
    settings = [f for pair in ("tempo=20", "weights_rate_limit=5") for f in ("--setting", pair)]
    command = [sys.executable, "-m", "condense_core.neurons.chain", str(folder / "chain"), "--netuid", str(NETUID)]
    chain = subprocess.Popen([*command, "--block-time", "0.1", *settings], stdout=subprocess.PIPE, text=True)
    try:
        assert chain.stdout is not None
        assert "listens" in chain.stdout.readline()

        async def register() -> None:
            node = RemoteNode(folder / "chain")
            for name in ("v", "m"):
                stake = {"stake": 5000.0, "permit": True} if name == "v" else {}
                await node.control("register", netuid=NETUID, hotkey=keys[name], **stake)
            await node.close()

        asyncio.run(register())
        yield Host(folder, keys)
    finally:
        chain.terminate()
        chain.wait(10)


def count(host: Host) -> int:
    try:
        ledger = Ledger(host.ledger, writes=False)
    except ValueError:
        return 0
    try:
        return ledger.newest() or 0
    finally:
        ledger.close()


def test_it_plays_rounds_survives_a_kill_and_sets_weights(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    miner = {"external-ip": "127.0.0.1", "model": embedded_model_path()}
    with host.running("miner.py", "m", **miner):
        with host.running("validator.py", "v", every=0) as (process, url):
            until = time.monotonic() + 60
            while count(host) < 2 and time.monotonic() < until:
                time.sleep(0.1)
            shown = httpx.get(f"{url}/leaderboard.json", timeout=10).json()
            assert shown["tiers"][0]["miners"][0]["hotkey"] == host.keys["m"]
            assert httpx.get(f"{url}/ready").status_code == 200
            assert 'condense_rounds_total{counts="' in httpx.get(f"{url}/metrics").text
            assert httpx.get(f"{url}/nothing").json()["error"]["code"] == "not_found"
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        before = count(host)
        assert before >= 2
        with host.running("validator.py", "v", every=0, rounds=2) as (process, _):
            assert process.wait(60) == 0
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
        ledger = Ledger(host.ledger, writes=False)
        numbers = [number for (number,) in ledger.rows("SELECT number FROM rounds ORDER BY number")]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= before + 2
        expected = Standings()
        for number in numbers:
            played = ledger.round(number)
            assert [outcome.hotkey for outcome in played.outcomes] == [host.keys["m"]]
            expected.add(played.tier, played.values)
        assert ledger.standings == expected
        assert ledger.standings.value("research", host.keys["m"]) > 0
        ledger.close()

        async def incentive() -> float:
            chain = open_chain(f"memory:{host.folder / 'chain'}", NETUID, max_age=0.0)
            paid, until = 0.0, time.monotonic() + 20
            while not paid and time.monotonic() < until:  # the chain pays when an epoch ends
                paid = (await chain.metagraph()).by_hotkey[host.keys["m"]].incentive
                await asyncio.sleep(0.2)
            await chain.close()
            return paid

        assert asyncio.run(incentive()) == 1.0

        tried = subprocess.run(
            [sys.executable, str(NEURONS / "validator.py"), *host.options("v"), "--dry-run"],
            capture_output=True,
            text=True,
            timeout=100,
            env=environment(),
        )
        assert tried.returncode == 0, tried.stderr
        told = json.loads(tried.stdout)
        assert (told["uid"], told["permit"], told["tiers"]["research"]["miners"]) == (0, True, 1)
        assert count(host) == len(numbers)  # nothing of it was written down

    assert main(["replay", "--state", str(host.ledger), "--tiers", str(host.folder / "tiers.toml"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["round"] == len(numbers)
    assert all(miner["agrees"] for miner in again["miners"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]  # without the log
    assert len(lines) == 1, lines
    return lines[0]


def test_what_keeps_it_from_judging_is_one_line(host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text("version = 1")
    (tmp_path / "file").write_text("")

    def told(*more: str, **changes: Any) -> str:
        return refused(capsys, *host.options("v", **{"state": tmp_path / "v", **changes}), *more)

    assert "netuid: got none" in told(netuid=None)
    assert "hotkey: 'none' of wallet 'w'" in told(hotkey="none")
    assert "has no uid on subnet 7, expected a registered one" in told(hotkey="unknown")
    assert "no chain at" in told(network=f"memory:{tmp_path / 'nowhere'}")
    assert "bad.toml: tiers: Field required" in told(tiers=tmp_path / "bad.toml")
    assert "corpus: nowhere does not exist" in told(corpus="nowhere")
    assert "squad: nowhere is not a file" in told(squad="nowhere")
    assert "model: 'other' is of no tier, expected one of condense-tiny" in told(model="other")
    assert "state: " in told(state=tmp_path / "file")
    assert "holds no validator.db" in refused(capsys, "replay", "--state", str(tmp_path))
