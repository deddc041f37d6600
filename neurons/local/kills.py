"""Kills neurons at random moments, as a crash or a power cut does, starts them again, and checks what became of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from condense_core.neurons.asking.peers import RETRY
from condense_core.neurons.local.subnet import LocalSubnet, Member, played
from condense_core.neurons.local.verified import counted, problems
from condense_core.neurons.validating.ledger import Ledger

KINDS = ("validator", "miner", "gateway")
CALM = 3
"""Rounds at the end without kills, in which whoever was killed last is seen again."""
BACK = RETRY + 5.0
"""Seconds from which a miner must answer again; a validator that asked while it was away waits nearly as long."""
_LONGEST_DOWN = 2.0


@dataclass(frozen=True)
class Killed:
    """A neuron that was killed.

    Attributes:
        newest: number of each validator's last round at that moment, by the validator's name.
        seconds: from its end until it was ready again. ready_at: when that was, in seconds since the epoch.
    """

    kind: str
    name: str
    hotkey: str
    newest: dict[str, int]
    seconds: float
    ready_at: float


class Kills:
    """Kills ``count`` neurons in the course of ``rounds`` rounds, of each kind about as many."""

    def __init__(self, count: int, rounds: int, *, seed: int) -> None:
        """``ValueError`` where there are too few rounds."""
        if rounds <= CALM:
            raise ValueError(
                f"kills: got {rounds} rounds, expected more than {CALM}, at the end of which nobody is killed"
            )
        self._rng = random.Random(f"kills-{seed}")
        self._due = sorted(self._rng.choices(range(1, rounds - CALM + 1), k=count))
        self._kinds: list[str] = []
        self.killed: list[Killed] = []

    def is_due(self, played: int) -> bool:
        """Whether the next one is to be killed, after so many rounds."""
        return len(self.killed) < len(self._due) and played >= self._due[len(self.killed)]

    def kill(self, subnet: LocalSubnet, tick: Callable[[], None]) -> Killed:
        """Kill a neuron and start it again; ``tick`` is called again and again until it is ready.

        Raises:
            ChildFailed: it does not start again.
        """
        victim = self._victim(subnet)
        pause = time.monotonic() + self._rng.uniform(0, 1)
        while time.monotonic() < pause:  # not at a round's end only, which is when one is seen to have been played
            tick()
            time.sleep(0.02)
        newest = {validator.name: self._newest(subnet, validator) for validator in subnet.of("validator")}
        victim.child.kill()
        began = time.monotonic()
        time.sleep(self._rng.uniform(0, _LONGEST_DOWN))
        victim.child.start()
        victim.child.wait_ready(tick)
        done = Killed(victim.kind, victim.name, victim.hotkey, newest, time.monotonic() - began, time.time())
        self.killed.append(done)
        return done

    def _victim(self, subnet: LocalSubnet) -> Member:
        while True:
            self._kinds = self._kinds or self._rng.sample(KINDS, len(KINDS))
            own = [member for member in subnet.of(self._kinds.pop()) if member.child.is_running]
            if own:
                return self._rng.choice(own)

    @staticmethod
    def _newest(subnet: LocalSubnet, validator: Member) -> int:
        ledger = subnet.ledger(validator)
        try:
            return ledger.newest() or 0
        finally:
            ledger.close()


def checked(subnet: LocalSubnet, killed: Sequence[Killed]) -> dict[str, Any]:
    """What the validators' ledgers say once all rounds are played: what was looked at, and the problems there are.

    ``seen_again`` counts the kills of miners behind which a validator had answers of them again; it is less than all
    where the rounds ended soon after one.
    """
    miners = [member.hotkey for member in subnet.members if member.kind in ("miner", "adversary")]
    found: list[str] = []
    looked = {}
    for validator in subnet.of("validator"):
        ledger = subnet.ledger(validator)
        try:
            found += [f"{validator.name}: {problem}" for problem in problems(ledger, miners)]
            seen = 0
            rounds = played(ledger, subnet.paid)
            if rounds < (subnet.setting.rounds or 0):
                found.append(f"{validator.name}: {rounds} rounds were played, expected {subnet.setting.rounds}")
            for each in killed:
                if each.kind == "miner":
                    later, answers = _since(ledger, each)
                    seen += answers > 0
                    if later and not answers:
                        since = each.newest[validator.name]
                        found.append(f"{validator.name}: {each.name} never answered again after round {since}")
            looked[validator.name] = {**counted(ledger), "seen_again": seen}
        finally:
            ledger.close()
    return {"killed": [asdict(each) for each in killed], "looked_at": looked, "problems": found}


def _since(ledger: Ledger, killed: Killed) -> tuple[int, int]:
    """How many rounds there were in which a killed miner had to answer again, and in how many it has."""
    [(later,)] = ledger.rows("SELECT count(*) FROM rounds WHERE began > ?", killed.ready_at + BACK)
    query = (
        "SELECT count(*) FROM outcomes o JOIN rounds r ON r.number = o.round "
        "WHERE o.hotkey = ? AND r.began > ? AND o.sha256 != ''"
    )
    [(answers,)] = ledger.rows(query, killed.hotkey, killed.ready_at)
    return int(later), int(answers)
