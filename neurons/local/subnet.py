"""Starts the processes of a local subnet, each with the command that an operator would use."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from condense_core.neurons.local.chain import NETUID, LocalChain
from condense_core.neurons.local.children import Child, Children
from condense_core.neurons.local.coarser import VARIABLE
from condense_core.neurons.local.setting import (
    HURRIED,
    TIMEOUT,
    WALLET,
    MinerKind,
    Setting,
    flags,
    free_ports,
    make_hotkey,
    miner_kinds,
    write_tiers,
)
from condense_core.neurons.validating.ledger import FILE, Ledger

_HOST = "127.0.0.1"
_READY = r"; (http://[\d.:]+)"
_AT_ONCE = 2
_GATEWAY_LOOKS = 5.0  # seconds between two looks at the chain


@dataclass(frozen=True)
class Member:
    """A neuron of the subnet with its process. ``kind`` is miner, validator, gateway or adversary."""

    kind: str
    name: str
    hotkey: str
    uid: int
    url: str
    child: Child


class LocalSubnet:
    """All processes of a local subnet, in a folder that holds whatever they write.

    Args:
        tell: is told in a line what happens. tick: is called again and again while it waits.
    """

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        children: Children,
        *,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.setting, self.folder, self.children, self._tell = setting, folder, children, tell
        timeout = HURRIED if setting.adversaries else TIMEOUT
        self.tiers = write_tiers(folder / "tiers.toml", setting.model, timeout)
        self.chain = LocalChain(folder / "chain")
        self.members: list[Member] = []

    def of(self, kind: str) -> list[Member]:
        """The members of a kind, by uid."""
        return [member for member in self.members if member.kind == kind]

    def start(self) -> None:
        """Start all, a few at a time; validators, who look at once for miners, come last.

        Raises:
            ChildFailed: one of them did not start.
        """
        setting = self.setting
        self._tell("starting the chain")
        self._ready("chain", ["-m", "condense_core.neurons.chain", *self.chain.arguments], "listens at")
        names = [f"validator-{n}" for n in range(1, setting.validators + 1)]
        names += ["gateway"] * setting.gateway + [f"miner-{n}" for n in range(1, setting.miners + 1)]
        names += map(_adversary, setting.adversaries)
        hotkeys = {name: make_hotkey(self.folder, name) for name in names}
        earning = ("miner-", _adversary(""))
        asks = [(hotkey, not name.startswith(earning)) for name, hotkey in hotkeys.items()]
        uids = dict(zip(names, self.chain.register(asks), strict=True))
        ports = dict(zip([*names, "server"], free_ports(len(names) + 1), strict=True))

        self._tell(f"starting the server that compresses for the miners, with {setting.model}")
        server = self._ready(
            "server",
            ["-m", "condense_core.cli", "serve", *flags(self._server_options(ports["server"]))],
            rf" on .*{_READY}",
        )
        methods = httpx.get(f"{server}/v1/models", timeout=60).json()["data"][0]["methods"]
        kinds = miner_kinds(methods, setting.miners)
        starting = []
        for name, kind in zip((name for name in names if name.startswith("miner")), kinds, strict=True):
            options, environment = self._miner_options(kind, server)
            if name == "miner-1":  # whom they rob
                options["allow"] = [hotkeys[_adversary(each)] for each in setting.adversaries]
            command = self._neuron("miner", name, ports[name], options)
            child = self._child(name, command.copy, rf" serves .*{_READY}", environment)
            starting.append(Member("miner", kind.name, hotkeys[name], uids[name], _url(ports[name]), child))
        self._join(starting)
        self.chain.wait_announced([member.hotkey for member in self.members], self.children.check)
        if setting.adversaries:
            self._start_adversaries(hotkeys, uids, server)
        if setting.gateway:
            command = self._neuron("gateway", "gateway", ports["gateway"], self._gateway_options())
            child = self._child("gateway", command.copy, rf" routes .*{_READY}")
            found = ("gateway", "gateway", hotkeys["gateway"], uids["gateway"], _url(ports["gateway"]), child)
            self._join([Member(*found)])
        starting = []
        for name in (name for name in names if name.startswith("validator")):
            child = self._child(name, self._validator(name, hotkeys[name], ports[name]), rf" judges .*{_READY}")
            starting.append(Member("validator", name, hotkeys[name], uids[name], _url(ports[name]), child))
        self._join(starting)

    def _start_adversaries(self, hotkeys: Mapping[str, str], uids: Mapping[str, int], server: str) -> None:
        """All of them in one process, since each is small, behind the miner that some of them rob."""
        kinds = self.setting.adversaries
        self._tell(f"starting {len(kinds)} adversaries")
        options = {
            "netuid": NETUID,
            "network": self.chain.network,
            "wallet": WALLET,
            "wallet-path": self.folder,
            "tiers": self.folder / "tiers.toml",
            "model": self.setting.model,
            "server": server,
            "victim": hotkeys["miner-1"],
            "state": self.folder / "state" / "adversaries",
        }
        command = [sys.executable, "-m", "condense_core.neurons.local.adversaries", *flags(options)]
        command += [f"{kind}={_adversary(kind)}" for kind in kinds]
        child = self._child("adversaries", command.copy, rf"(?m)^{re.escape(kinds[-1])}: .* at http://")
        self.children.add(child).wait_ready(self.children.check)
        own = [_adversary(kind) for kind in kinds]
        self.members += [
            Member("adversary", kind, hotkeys[name], uids[name], "", child)
            for kind, name in zip(kinds, own, strict=True)
        ]
        self.chain.wait_announced([hotkeys[name] for name in own], self.children.check)

    def state(self, validator: Member) -> Path:
        """The folder of a validator's ledger."""
        return self.folder / "state" / validator.child.name / validator.hotkey

    def ledger(self, validator: Member) -> Ledger:
        """What a validator has written down so far, to be read and closed."""
        return Ledger(self.state(validator), writes=False)

    def _ready(self, name: str, arguments: list[str], ready: str) -> str:
        """Start a process that is no neuron; what ``ready`` caught."""
        child = Child(name, lambda: [sys.executable, *arguments], folder=self.folder, ready=ready)
        found = self.children.add(child).wait_ready(self.children.check)
        return found[1] if found.re.groups else ""

    def _child(
        self, name: str, command: Callable[[], list[str]], ready: str, environment: Mapping[str, str] | None = None
    ) -> Child:
        return Child(name, command, folder=self.folder, ready=ready, environment=environment)

    def _join(self, members: Sequence[Member]) -> None:
        """Start neurons, a few at a time, since all of them would load their libraries at once."""
        for first in range(0, len(members), _AT_ONCE):
            some = members[first : first + _AT_ONCE]
            self._tell(f"starting {', '.join(member.name for member in some)}")
            for member in some:
                self.children.add(member.child)
            for member in some:
                member.child.wait_ready(self.children.check)
        self.members += members

    def _neuron(self, module: str, name: str, port: int, options: Mapping[str, Any]) -> list[str]:
        """The command line of a neuron."""
        common = {
            "netuid": NETUID,
            "network": self.chain.network,
            "wallet": WALLET,
            "hotkey": name,
            "wallet-path": self.folder,
            "tiers": self.folder / "tiers.toml",
            "host": _HOST,
            "port": port,
            "state": self.folder / "state" / name,
            "plain-logs": True,
        }
        return [sys.executable, "-m", f"condense_core.neurons.{module}", *flags({**common, **options})]

    def _server_options(self, port: int) -> dict[str, Any]:
        own = {"model": self.setting.model, "port": port, "threads": self.setting.threads}
        return {**own, "no-prune": True, "no-answers": True, "plain-logs": True}

    def _gateway_options(self) -> dict[str, Any]:
        return {"every": _GATEWAY_LOOKS, "audits": self._audits, "audit-share": 0.5 if self._audits else None}

    @property
    def _audits(self) -> Path | None:
        """Where the gateway leaves answers for the first validator; not with kills, since an audit is in no round."""
        return self.folder / "audits" if self.setting.gateway and not self.setting.kills else None

    def _miner_options(self, kind: MinerKind, server: str) -> tuple[dict[str, Any], dict[str, str]]:
        """Options and environment by which a miner is of a kind."""
        common = {"external-ip": _HOST, "threads": self.setting.threads}
        if kind.factor == 1:
            return {**common, "server": server, "method": kind.method}, {}
        told = {"server": server, "method": kind.method, "factor": kind.factor, "most": kind.most}
        return {**common, "backend": "condense_core.neurons.local.coarser:Coarser"}, {VARIABLE: json.dumps(told)}

    def _validator(self, name: str, hotkey: str, port: int) -> Callable[[], list[str]]:
        """A validator's command line: one that is started again plays the rounds that are left."""
        rounds = self.setting.rounds
        state = self.folder / "state" / name / hotkey

        def command() -> list[str]:
            left = rounds
            if rounds is not None and (state / FILE).is_file():
                ledger = Ledger(state, writes=False)
                left = max(1, rounds - played(ledger, self.paid))
                ledger.close()
            options = {"every": self.setting.every, "rounds": left, "threads": self.setting.threads}
            options["audits"] = self._audits if name == "validator-1" else None
            return self._neuron("validator", name, port, options)

        return command

    @property
    def paid(self) -> list[str]:
        """The tiers that pay."""
        return [name for name, share in self.tiers.shares(datetime.now(UTC)).items() if share > 0]


def _adversary(kind: str) -> str:
    """The hotkey of a kind's name."""
    return f"adversary-{kind}"


def _url(port: int) -> str:
    return f"http://{_HOST}:{port}"


def played(ledger: Ledger, tiers: list[str]) -> int:
    """How many rounds of each of ``tiers`` are written down."""
    counts = dict(ledger.rows("SELECT tier, count(*) FROM rounds GROUP BY tier"))
    return min(int(counts.get(tier, 0)) for tier in tiers)
