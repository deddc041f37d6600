"""``condense-miner`` as a process: it serves what was asked for, and says in one line what keeps it from doing so."""

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
from bittensor import http_auth

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.chain.server import RemoteNode
from condense_core.neurons.protocol.messages import COMPRESS, Ask
from condense_core.neurons.protocol.signing import verify_response
from condense_core.neurons.tiers import DEFAULT_TIERS
from condense_testing.chains import NETUID, key

CHECKOUT = Path(__file__).resolve().parents[2]
VALIDATOR = key("validator")
TEXT = "The keeper of the north archive counts the lamps at dusk. " * 30


@dataclass
class Host:
    """A chain in memory with a validator and a miner, a wallet, and tiers of the embedded model."""

    folder: Path
    hotkey: str

    def command(self, **changes: Any) -> list[str]:
        options = {
            "netuid": NETUID,
            "network": f"memory:{self.folder / 'chain'}",
            "wallet": "w",
            "hotkey": "h",
            "wallet-path": self.folder,
            "host": "127.0.0.1",
            "port": 0,
            "external-ip": "127.0.0.1",
            "model": embedded_model_path(),
            "tiers": self.folder / "tiers.toml",
            "state": self.folder / "state",
            "threads": 1,
            **changes,
        }
        flags = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
        return [sys.executable, str(CHECKOUT / "neurons" / "miner.py"), *flags]

    def refused(self, *more: str, **changes: Any) -> str:
        """What a miner says that does not start."""
        ended = subprocess.run(
            [*self.command(**changes), *more], capture_output=True, text=True, timeout=100, env=environment()
        )
        lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]  # without the log
        assert ended.returncode == 2, ended.stderr
        assert len(lines) == 1, ended.stderr
        return lines[0]


def environment() -> dict[str, str]:
    return os.environ | {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("subnet")
    wallet = bittensor.Wallet(name="w", hotkey="h", path=str(folder))
    wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
    wallet = bittensor.Wallet(name="w", hotkey="unknown", path=str(folder))
    wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
    own = bittensor.Wallet(name="w", hotkey="h", path=str(folder)).hotkey.ss58_address
    (folder / "tiers.toml").write_text(
        DEFAULT_TIERS.read_text().replace("mistralai/Mistral-7B-Instruct-v0.2", "condense-tiny")
    )
    command = [sys.executable, "-m", "condense_core.neurons.chain", str(folder / "chain"), "--netuid", str(NETUID)]
    chain = subprocess.Popen([*command, "--block-time", "0.2"], stdout=subprocess.PIPE, text=True)
    try:
        assert chain.stdout is not None
        assert "listens" in chain.stdout.readline()

        async def register() -> None:
            node = RemoteNode(folder / "chain")
            who = {"hotkey": VALIDATOR.ss58_address, "stake": 5000.0, "permit": True}
            await node.control("register", netuid=NETUID, **who)
            await node.control("register", netuid=NETUID, hotkey=own)
            await node.close()

        asyncio.run(register())
        yield Host(folder, own)
    finally:
        chain.terminate()
        chain.wait(10)


@contextmanager
def running(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A miner that serves, its URL and what it has said; it is killed at the end."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    said: list[str] = []
    try:
        assert process.stderr is not None
        while line := process.stderr.readline():
            said.append(line)
            if found := re.search(r" serves .*; (http://[\d.:]+)", line):
                yield process, found[1], said
                return
        raise AssertionError(f"it ended: {''.join(said)}")
    finally:
        process.kill()
        process.wait(10)


def test_a_miner_serves_a_validator_and_ends_well(host: Host) -> None:
    with running(host.command()) as (process, url, said):
        assert f"{host.hotkey} serves inference_0, inference_1, research" in said[-1]
        assert "announced as 127.0.0.1:" in said[-1]
        body, nonce = Ask(tier="research", text=TEXT, ratio=4.0).to_bytes(), time.time_ns()
        signed = http_auth.sign(
            VALIDATOR, method="POST", path=COMPRESS, body=body, receiver_ss58=host.hotkey, nonce_ns=nonce
        )
        headers = {"content-type": "application/json", **signed}
        answer = httpx.post(url + COMPRESS, content=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        who = {"caller": VALIDATOR.ss58_address, "responder": host.hotkey}
        verify_response(answer.headers, answer.content, nonce_ns=nonce, status=200, **who)
        assert SoftTokens.from_bytes(answer.content).model_id == "condense-tiny"
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
        counted = httpx.get(f"{url}/metrics").text
        assert f'condense_http_responses_total{{route="{COMPRESS}",status="200"}} 1.0' in counted
        assert httpx.post(url + COMPRESS, content=body, headers=headers).status_code == 401  # a replay
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        logged = process.stderr.read()
        assert "Traceback" not in logged
        assert "lamps" not in logged


def test_a_dry_run_says_what_would_be_and_publishes_nothing(host: Host) -> None:
    ended = subprocess.run(
        [*host.command(), "--dry-run"], capture_output=True, text=True, timeout=100, env=environment()
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["hotkey"], told["uid"], told["validators"]) == (host.hotkey, 1, 1)
    assert {name: tier["soft_tokens"] > 100 for name, tier in told["tiers"].items()} == dict.fromkeys(
        ("inference_0", "inference_1", "research"), True
    )


def test_the_doctor_needs_no_chain_and_says_what_a_miner_would_earn(host: Host) -> None:
    miner, tiers = str(CHECKOUT / "neurons" / "miner.py"), str(host.folder / "tiers.toml")
    options = ["--model", str(embedded_model_path()), "--tiers", tiers, "--tier", "inference_0", "--threads", "1"]
    command = [sys.executable, miner, "doctor", *options, "--rounds", "2", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())
    assert ended.returncode == 0, ended.stderr
    [told] = json.loads(ended.stdout)
    assert (told["tier"], told["model"], told["challenges"]) == ("inference_0", "condense-tiny", 2)
    assert [row["name"] for row in told["rows"]] == ["yours", "select", "mean"]
    assert told["rows"][0]["invalid"] == {}
    assert told["rows"][0]["recovered"] > 0.2
    misplaced = subprocess.run(
        [sys.executable, miner, "--netuid", "7", "doctor"], capture_output=True, text=True, timeout=100
    )
    assert misplaced.returncode == 2
    assert misplaced.stderr == "error: --netuid: stands before 'doctor', expected behind it\n"
    shown = subprocess.run([sys.executable, miner, "--help"], capture_output=True, text=True, timeout=100).stdout
    assert "doctor" in shown
    assert "--netuid" in shown


def test_what_keeps_it_from_serving_is_one_line(host: Host, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("version = 1")
    assert "netuid: got none, expected --netuid NUMBER" in host.refused(netuid=None)
    assert "hotkey: 'none' of wallet 'w'" in host.refused(hotkey="none")
    assert "has no uid on subnet 7, expected a registered one" in host.refused(hotkey="unknown")
    assert "no chain at" in host.refused(network=f"memory:{tmp_path / 'nowhere'}")
    assert "bad.toml: tiers: Field required" in host.refused(tiers=tmp_path / "bad.toml")
    assert "external-ip: got 'here'" in host.refused(**{"external-ip": "here"})
    assert "expected one of them at most" in host.refused("--server", "http://127.0.0.1:1")
    assert "backend: 'json:Nothing' cannot be made" in host.refused("--backend", "json:Nothing", model=None)
    known = DEFAULT_TIERS
    assert "it serves no tier, expected the model mistralai/Mistral-7B-Instruct-v0.2" in host.refused(tiers=known)


def test_a_clock_that_is_off_or_a_state_that_cannot_be_kept_ends_it_in_one_line(host: Host, tmp_path: Path) -> None:
    async def put(seconds: float) -> None:
        node = RemoteNode(host.folder / "chain")
        await node.control("set_time_offset", seconds=seconds)
        await node.close()

    (tmp_path / "file").write_text("")
    assert "state: nothing can be written in" in host.refused(state=tmp_path / "file")
    # No file may grow, as on a full disk.
    full = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", *host.command(state=tmp_path / "new")]
    ended = subprocess.run(full, capture_output=True, text=True, timeout=100, env=environment())
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(r"error: state: nothing can be written in .* place left\n", ended.stderr)
    asyncio.run(put(60))
    try:
        assert "clock: this host's is at least 60 s behind the chain's, expected at most 10 s" in host.refused()
    finally:
        asyncio.run(put(0))


def test_a_public_network_needs_an_address_that_is_reached(host: Host) -> None:
    assert "is not reached from elsewhere" in host.refused(network="finney", **{"external-ip": "10.0.0.1"})
