"""What a local subnet is made of, and the files that it needs."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condense_core.neurons.extra import bittensor_module
from condense_core.neurons.tiers import DEFAULT_TIERS, Tiers, read_tiers

FACTORS = (1, 2, 4)
"""By which miners of one method exceed the ratio that they are asked for."""
TIMEOUT = 60.0
"""Seconds of an answer in every tier: all miners share this computer, where the subnet's own have one each."""
HURRIED = 10.0
"""With adversaries, some of whom use all of it in every round."""
WALLET = "localnet"
_PORTS = range(
    20_000, 32_000
)  # below those that systems hand out, so that a neuron finds its own free when it comes back
_HIGHEST_RATIO = 1000.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What was asked for.

    Attributes:
        model: of all tiers, a name or a folder. rounds: of each paid tier and validator; None: without end.
        every: seconds between two rounds. adversaries: kinds that are started.
        kills: how many neurons are killed at random.
    """

    model: str
    miners: int = 4
    validators: int = 2
    rounds: int | None = 10
    every: float = 0.0
    gateway: bool = False
    adversaries: tuple[str, ...] = ()
    kills: int = 0
    threads: int = 1


@dataclass(frozen=True)
class MinerKind:
    """How a miner compresses: a method, at ``factor`` times the ratio that it is asked for, up to ``most``."""

    method: str
    factor: int = 1
    most: float = _HIGHEST_RATIO

    @property
    def name(self) -> str:
        return self.method if self.factor == 1 else f"{self.method} x{self.factor}"


def miner_kinds(methods: Mapping[str, Any], count: int) -> list[MinerKind]:
    """Kinds of ``count`` miners that differ as far as there are differences; what comes again is a copy.

    methods: of a ``condense serve``, by name, with their ratios.
    """
    tops = {
        name: _HIGHEST_RATIO if isinstance(facts["ratios"], str) else float(max(facts["ratios"]))
        for name, facts in methods.items()
    }
    kinds = [MinerKind(name, factor, most) for factor in FACTORS for name, most in tops.items()]
    return [kinds[number % len(kinds)] for number in range(count)]


def write_tiers(path: Path, model: str, timeout: float = TIMEOUT) -> Tiers:
    """The subnet's own tiers with another model, and ``timeout`` seconds for an answer."""
    text = re.sub(r"(?m)^model = .*$", lambda _: f"model = {_toml(model)}", DEFAULT_TIERS.read_text(encoding="utf-8"))
    path.write_text(re.sub(r"(?m)^timeout = \S+", f"timeout = {timeout}", text), encoding="utf-8")
    return read_tiers(path)


def make_hotkey(folder: Path, name: str) -> str:
    """A new hotkey in a wallet that has no coldkey; its address."""
    wallet = bittensor_module().Wallet(name=WALLET, hotkey=name, path=str(folder))
    wallet.create_new_hotkey(use_password=False, overwrite=False, suppress=True)
    return str(wallet.hotkey.ss58_address)


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens on."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ValueError(f"ports: {len(found)} from {_PORTS.start} to {_PORTS.stop} are free, expected {count}")


def flags(options: Mapping[str, Any]) -> Sequence[str]:
    """A command line's options: True is a flag, None is left out, a list is an option for each."""
    parts: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            parts += [part for each in value for part in (f"--{name}", str(each))]
        elif value is True:
            parts.append(f"--{name}")
        elif value is not None and value is not False:
            parts += [f"--{name}", str(value)]
    return parts


def _toml(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
