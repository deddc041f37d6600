"""A host with a chain in memory, wallets and tiers of the embedded model, on which neurons are started as processes."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bittensor

from condense_core.decoder.embedded import EMBEDDED_NAME
from condense_core.neurons.chain.server import RemoteNode
from condense_core.neurons.tiers import DEFAULT_TIERS
from condense_testing.chains import NETUID

NEURONS = Path(__file__).resolve().parents[3] / "neurons"
VALIDATOR = {"stake": 5000.0, "permit": True}


@dataclass(frozen=True)
class Host:
    """A folder with all of it.

    Attributes:
        hotkeys: addresses by the names that the wallet has for them.
    """

    folder: Path
    hotkeys: Mapping[str, str]

    @property
    def network(self) -> str:
        return f"memory:{self.folder / 'chain'}"

    @property
    def tiers(self) -> Path:
        return self.folder / "tiers.toml"

    def command(self, script: str, hotkey: str, *more: str, **options: Any) -> list[str]:
        """The command line of a neuron. options: with ``_`` for ``-``; None leaves one out."""
        given = {
            "netuid": NETUID,
            "network": self.network,
            "wallet": "w",
            "hotkey": hotkey,
            "wallet_path": self.folder,
            "host": "127.0.0.1",
            "port": 0,
            "tiers": self.tiers,
            "state": self.folder / hotkey,
            **options,
        }
        flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
        return [sys.executable, str(NEURONS / script), *(part for flag in flags for part in flag), *more]

    async def control(self, do: str, **arguments: Any) -> None:
        """Do what an operator of the chain does."""
        node = RemoteNode(self.folder / "chain")
        await node.control(do, **arguments)
        await node.close()


@contextmanager
def subnet_host(
    folder: Path,
    hotkeys: Sequence[str],
    registered: Mapping[str, Mapping[str, Any]],
    *,
    block_time: float = 0.2,
    settings: Sequence[str] = (),
) -> Iterator[Host]:
    """A host whose chain runs until the end.

    Args:
        hotkeys: names of those that the wallet has. registered: names of them, or addresses, in the order of their
            uids, and what they have. settings: of the subnet, as the chain takes them.
    """
    found = {}
    for name in hotkeys:
        wallet = bittensor.Wallet(name="w", hotkey=name, path=str(folder))
        wallet.create_new_hotkey(use_password=False, overwrite=True, suppress=True)
        found[name] = wallet.hotkey.ss58_address
    text = DEFAULT_TIERS.read_text().replace("mistralai/Mistral-7B-Instruct-v0.2", EMBEDDED_NAME)
    (folder / "tiers.toml").write_text(text)
    command = [sys.executable, "-m", "condense_core.neurons.chain", str(folder / "chain"), "--netuid", str(NETUID)]
    flags = [flag for setting in settings for flag in ("--setting", setting)]
    chain = subprocess.Popen([*command, "--block-time", str(block_time), *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert chain.stdout is not None
        assert "listens" in chain.stdout.readline()
        host = Host(folder, found)
        for name, facts in registered.items():
            asyncio.run(host.control("register", netuid=NETUID, hotkey=found.get(name, name), **facts))
        yield host
    finally:
        chain.terminate()
        chain.wait(10)


def environment() -> dict[str, str]:
    return os.environ | {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}


def ran(command: Sequence[str], *, seconds: float = 100.0) -> subprocess.CompletedProcess[str]:
    """A process that has ended."""
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment(), check=False)


def refused(command: Sequence[str]) -> str:
    """The one line of a neuron that does not start."""
    ended = ran(command)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]  # without the log
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1, ended.stderr
    return lines[0]


@contextmanager
def running(command: Sequence[str], said: str = "") -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A neuron that says ``said`` once it serves, the URL behind that, and its lines so far; killed at the end."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    lines: list[str] = []
    try:
        assert process.stderr is not None
        while line := process.stderr.readline():
            lines.append(line)
            if found := re.search(rf"{said}.*; (http://[\d.:]+)", line):
                yield process, found[1], lines
                return
        raise AssertionError(f"it ended: {''.join(lines)}")
    finally:
        process.kill()
        process.wait(10)
