"""``condense-gateway`` as a process, with a chain and a miner that are processes too, and the clients as they are."""

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

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons import gateway
from condense_core.neurons.chain.server import RemoteNode
from condense_core.neurons.judging.audits import AuditSpool
from condense_core.neurons.tiers import DEFAULT_TIERS
from condense_core.serving.client import CondenseClient
from condense_core.serving.errors import InvalidRequest, RateLimited, Unauthorized
from condense_testing.chains import NETUID

CHECKOUT = Path(__file__).resolve().parents[2]
MODEL = "condense-tiny"
TEXTS = [f"The keeper of the {place} archive counts the lamps at dusk. " * 30 for place in ("north", "south", "east")]


@dataclass
class Host:
    """A chain in memory with a gateway's and a miner's hotkey, tiers of the embedded model, and an API key."""

    folder: Path
    hotkeys: dict[str, str]
    key: str

    def command(self, module: str, *flags: str, **changes: Any) -> list[str]:
        options = {
            "netuid": NETUID,
            "network": f"memory:{self.folder / 'chain'}",
            "wallet": "w",
            "hotkey": module,
            "wallet-path": self.folder,
            "host": "127.0.0.1",
            "port": 0,
            "tiers": self.folder / "tiers.toml",
            "state": self.folder / module,
            **changes,
        }
        given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
        return [sys.executable, str(CHECKOUT / "neurons" / f"{module}.py"), *given, *flags]

    def refused(self, **changes: Any) -> str:
        """What a gateway says that does not start."""
        ended = ran(self.command("gateway", **changes))
        lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]  # without the log
        assert ended.returncode == 2, ended.stderr
        assert len(lines) == 1, ended.stderr
        return lines[0]


def environment() -> dict[str, str]:
    return os.environ | {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def ran(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment())


@contextmanager
def running(command: list[str], said: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A neuron that says ``said`` once it serves, and the URL behind it; it is killed at the end."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    lines: list[str] = []
    try:
        assert process.stderr is not None
        while line := process.stderr.readline():
            lines.append(line)
            if found := re.search(rf"{said}.*; (http://[\d.:]+)", line):
                yield process, found[1]
                return
        raise AssertionError(f"it ended: {''.join(lines)}")
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("subnet")
    hotkeys = {}
    for name in ("gateway", "miner", "unknown", "poor"):
        wallet = bittensor.Wallet(name="w", hotkey=name, path=str(folder))
        wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
        hotkeys[name] = wallet.hotkey.ss58_address
    text = DEFAULT_TIERS.read_text().replace("mistralai/Mistral-7B-Instruct-v0.2", MODEL)
    (folder / "tiers.toml").write_text(text)
    command = [sys.executable, "-m", "condense_core.neurons.chain", str(folder / "chain"), "--netuid", str(NETUID)]
    made = ran([sys.executable, str(CHECKOUT / "neurons" / "gateway.py"), "--new-key", "app"])
    key, _, lines = made.stdout.partition("\n\n")
    (folder / "keys.toml").write_text(lines + "chars_per_day = 20000\n")
    chain = subprocess.Popen([*command, "--block-time", "0.2"], stdout=subprocess.PIPE, text=True)
    try:
        assert chain.stdout is not None
        assert "listens" in chain.stdout.readline()

        async def register() -> None:
            node = RemoteNode(folder / "chain")
            await node.control("register", netuid=NETUID, hotkey=hotkeys["gateway"], stake=5000.0, permit=True)
            await node.control("register", netuid=NETUID, hotkey=hotkeys["miner"])
            await node.control("register", netuid=NETUID, hotkey=hotkeys["poor"])
            await node.close()

        asyncio.run(register())
        yield Host(folder, hotkeys, key)
    finally:
        chain.terminate()
        chain.wait(10)


@pytest.fixture(scope="module")
def miner(host: Host) -> Iterator[str]:
    """A miner that has announced itself."""
    command = host.command("miner", "--external-ip", "127.0.0.1", model=MODEL, threads=1)
    with running(command, " serves ") as (_, url):
        for _ in range(100):
            if httpx.get(f"{url}/ready").status_code == 200:
                break
            time.sleep(0.1)
        time.sleep(0.5)  # its address is announced once it serves
        yield url


def test_the_client_works_against_it_and_what_was_used_is_written_down(host: Host, miner: str) -> None:
    audits = host.folder / "audits"
    command = host.command("gateway", keys=host.folder / "keys.toml", audits=audits, **{"audit-share": 1.0, "every": 1})
    with running(command, "routes research by 1, inference_0 by 1, inference_1 by 1 miners") as (process, url):
        with pytest.raises(Unauthorized):
            CondenseClient(url, api_key="ck_wrong").compress(TEXTS[0])
        with CondenseClient(url, api_key=host.key, timeout=60) as client:
            soft = client.compress(TEXTS[0], ratio=4)
            assert soft.model_id == MODEL
            assert len(soft) == -(-soft.num_context_tokens // 4)
            many = client.compress_many(TEXTS, ratio=8, routing="k_of_n", k=2, tier="research")
            assert [each.context_sha256 == soft.context_sha256 for each in many] == [True, False, False]
            chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXTS[1]}]
            compressed = client.compress_messages(chat)
            assert compressed[0] == chat[0]
            assert isinstance(compressed[1]["content"], SoftTokens)
            with pytest.raises(InvalidRequest, match="expected what fits a tier: research 1,000 to 2,500"):
                client.compress("short")
            with pytest.raises(RateLimited, match="of its 20,000 characters of"):
                client.compress_many(TEXTS * 3, timeout=2)
            [model] = client.models()
            assert model["tiers"]["research"]["miners"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        logged = process.stderr.read()
        assert "Traceback" not in logged
        assert "lamps" not in logged
        assert host.key not in logged
    used = ran([sys.executable, str(CHECKOUT / "neurons" / "gateway.py"), "usage", "--state", command_state(command)])
    assert re.search(r"app\D+6\D+5\D", used.stdout), used.stdout  # requests, and those that were answered
    told = ran([*used.args, "--json"])
    [row] = json.loads(told.stdout)
    assert (row["key"], row["requests"], row["answered"]) == ("app", 6, 5)
    assert not any(b"lamps" in file.read_bytes() for file in (host.folder / "gateway").iterdir())
    taken = AuditSpool(audits).take(99)
    assert {audit.hotkey for audit in taken} == {host.hotkeys["miner"]}
    assert len(taken) == 5


def command_state(command: list[str]) -> str:
    return command[command.index("--state") + 1]


def test_quotas_outlive_a_restart(host: Host, miner: str) -> None:
    keys = host.folder / "few.toml"
    keys.write_text((host.folder / "keys.toml").read_text().replace("20000", "4000"))
    command = host.command("gateway", keys=keys, state=host.folder / "few")
    for n in range(2):
        with running(command, "routes") as (process, url), CondenseClient(url, api_key=host.key) as client:
            if n == 0:
                client.compress_many(TEXTS[:2])
            else:
                with pytest.raises(RateLimited, match=r"has sent 3,\d+ of its 4,000"):
                    client.compress(TEXTS[0], timeout=2)
            process.send_signal(signal.SIGINT)
            process.wait(30)


def test_a_dry_run_says_what_would_be_and_serves_nothing(host: Host, miner: str) -> None:
    ended = ran([*host.command("gateway"), "--dry-run"])
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["hotkey"], told["uid"], told["permit"]) == (host.hotkeys["gateway"], 0, True)
    assert {name: (tier["miners"], tier["miner"]) for name, tier in told["tiers"].items()} == dict.fromkeys(
        ("research", "inference_0", "inference_1"), (1, host.hotkeys["miner"])
    )


def test_a_hotkey_without_a_permit_is_warned_about_and_finds_out(host: Host, miner: str) -> None:
    ended = ran([*host.command("gateway", hotkey="poor"), "--dry-run"])
    assert ended.returncode == 0, ended.stderr
    assert "has no validator permit: most miners refuse it" in ended.stderr
    told = json.loads(ended.stdout)
    assert told["tiers"]["research"]["error"] == (
        "none of 1 miners of 'research' gave a valid answer (1 refused with 403)"
    )


def test_what_the_chain_says_against_it_is_one_line(host: Host, tmp_path: Path) -> None:
    assert "has no uid on subnet 7, expected a registered one" in host.refused(hotkey="unknown")
    assert "no chain at" in host.refused(network=f"memory:{tmp_path / 'nowhere'}")


def test_options_that_make_no_sense_are_one_line(
    host: Host, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(**changes: Any) -> str:
        assert gateway.main(host.command("gateway", **changes)[2:]) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    (tmp_path / "bad.toml").write_text("version = 1")
    (tmp_path / "keys.toml").write_text("key = 1")
    assert "hotkey: 'none' of wallet 'w'" in refused(hotkey="none")
    assert "bad.toml: tiers: Field required" in refused(tiers=tmp_path / "bad.toml")
    assert "keys.toml holds no [[key]] tables" in refused(keys=tmp_path / "keys.toml")
    assert "netuid: got none" in refused(netuid=None)
    assert "routing: got 'worst', expected best, fastest or k_of_n" in refused(routing="worst")
    assert "model: 'other' is of no tier, expected one of condense-tiny" in refused(model="other")
    assert "state: " in refused(state=host.folder / "tiers.toml")
    assert "audits: " in refused(audits=host.folder / "tiers.toml")
    assert "--tls-key: got no --tls-cert" in refused(**{"tls-key": "x"})
    assert gateway.main(["usage", "--state", str(tmp_path)]) == 2
    assert "state: no file" in capsys.readouterr().err
