"""A validator's loop: look at the chain, play a round, write it down, and again."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime

from condense_core.neurons.asking.client import NeuronClient, Peer
from condense_core.neurons.asking.peers import Peers
from condense_core.neurons.chain.base import Chain, Metagraph, WeightsSet
from condense_core.neurons.chain.errors import ChainFailure
from condense_core.neurons.judging.audits import AuditSpool
from condense_core.neurons.judging.challenges import Challenge
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.judging.supply import Supply
from condense_core.neurons.tiers import Tiers
from condense_core.neurons.validating.auditing import audit
from condense_core.neurons.validating.ledger import Ledger, LedgerError
from condense_core.neurons.validating.rounds import Round, play
from condense_core.neurons.validating.weights import WeightSetter
from condense_core.serving.errors import mistake

_log = logging.getLogger("condense_core.neurons")
LOOK_SECONDS = 60.0
"""For which a metagraph is good enough: a new miner is in the first round behind it."""
_MOST_CHALLENGES = 12  # that are looked at for a round
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 120.0


class NoMiners(Exception):
    """Nobody serves a tier."""


class Validator:
    """What a validator does, one step at a time.

    Args:
        judges: by the name of the tier's model. audits: that a gateway leaves; None: nothing is audited.
    """

    def __init__(
        self,
        chain: Chain,
        client: NeuronClient,
        tiers: Tiers,
        judges: Mapping[str, Judge],
        supply: Supply,
        ledger: Ledger,
        *,
        audits: AuditSpool | None = None,
        look_seconds: float = LOOK_SECONDS,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.chain, self.tiers, self.judges, self.supply, self.ledger = chain, tiers, judges, supply, ledger
        self.peers = Peers(client)
        self.setter = WeightSetter(chain, ledger, tiers)
        self.client, self.audits = client, audits
        self._look_seconds, self._sleep = look_seconds, sleep
        self.on_round: Callable[[Round], None] = lambda played: None
        """Is told of each round that was written down."""
        self.metagraph: Metagraph | None = None
        self.waiting = "it has not started"
        """What it waits for, in one line; empty while rounds are played."""
        self._stopping, self._failures = asyncio.Event(), 0

    async def look(self) -> Metagraph:
        """See who is there. A chain that is away for a while leaves what was seen last.

        Raises:
            ChainFailure: the chain was never seen.
        """
        try:
            self.metagraph = await self.chain.metagraph(max_age=self._look_seconds)
        except ChainFailure as error:
            if self.metagraph is None:
                raise
            _log.warning("chain", extra={"detail": f"{error}; going on with what was seen at {self.metagraph.block}"})
        for hotkey in self.ledger.keep(self.metagraph):
            _log.info("gone", extra={"detail": f"{hotkey} has lost its uid, its standing is forgotten"})
        await self.peers.refresh(self.metagraph, but=self.chain.hotkey)
        return self.metagraph

    async def round(self, name: str) -> Round:
        """A round of a tier with all of its miners, written down.

        Raises:
            NoMiners: there is nobody to be asked. ChainFailure: the chain was never seen.
            LedgerError: it could not be written down and counts nothing.
        """
        metagraph = await self.look()
        tier, missing = self.tiers.tiers[name], self._missing(name, metagraph)
        if not missing and not self.peers.serving(name):
            raise NoMiners(f"no miner of subnet {metagraph.netuid} says that it serves {name}")
        challenge = await self.challenge(name)
        played = await play(name, tier, challenge, self.judges[tier.model], self.peers, missing)
        self._written(await asyncio.to_thread(self.ledger.record, played), played)
        return played

    async def challenge(self, name: str) -> Challenge:
        """The next challenge of a tier that tells answers apart; of a few that do not the last one."""
        tier = self.tiers.tiers[name]
        for _ in range(_MOST_CHALLENGES):
            made = await self.supply.next(name)
            if (telling := await asyncio.to_thread(self.judges[tier.model].telling, made, tier.questions)) is not None:
                return telling
        return made

    async def set_weights(self) -> WeightsSet | None:
        """Set the weights now; see ``WeightSetter.set_once``."""
        return await self.setter.set_once()

    def stop(self) -> None:
        """End ``run`` behind the round that runs."""
        self._stopping.set()

    async def run(self, *, rounds: int | None = None, every: float = 60.0) -> None:
        """Play rounds and set weights until ``stop``.

        Args:
            rounds: of each paid tier; None: without end.
            every: seconds between the beginnings of two rounds, on average; each time another number.
        """
        setting = asyncio.ensure_future(self.setter.run())
        number = whole = 0
        try:
            while not self._stopping.is_set() and (rounds is None or whole < rounds):
                shares = self.tiers.shares(datetime.now(UTC))
                turn = tiers_in_turn(shares, number)
                played = [name for name in turn if await self._played(name, every, is_paid=shares[name] > 0)]
                number += 1
                whole += all(share == 0 or name in played for name, share in shares.items())
        finally:
            setting.cancel()
            await asyncio.gather(setting, return_exceptions=True)

    async def _played(self, name: str, every: float, *, is_paid: bool) -> bool:
        """A round, or why there is none, and a pause behind it; whether it was played.

        A tier that nobody is paid for needs no miners.
        """
        if self._stopping.is_set():
            return False
        begun = time.monotonic()
        try:
            await self.round(name)
            if self.audits is not None:
                await audit(self.audits, self.ledger, self.tiers, self.judges, metagraph=self.metagraph)
        except (NoMiners, ChainFailure, LedgerError, ValueError, OSError) as error:
            if isinstance(error, NoMiners) and not is_paid:
                return False
            self.waiting = " ".join(str(error).split())
        except Exception as error:  # a mistake of this software must not end it; the next round may do better
            _, where = mistake(error)
            self.waiting = f"a mistake of this software ({where})"
        else:
            self.waiting, self._failures = "", 0
            # Not at even distances: what comes between two of these would be known to be no challenge.
            await self._pause(random.expovariate(1 / every) - (time.monotonic() - begun) if every else 0.0)
            return True
        pause = min(_FIRST_PAUSE * 2**self._failures, _LONGEST_PAUSE)
        self._failures = min(self._failures + 1, 10)
        _log.error("round", extra={"detail": f"{self.waiting}; trying again in {pause:.0f} s"})
        await self._pause(pause)
        return False

    async def _pause(self, seconds: float) -> None:
        """Wait, or less where it is told to stop."""
        if seconds <= 0:
            return
        stopped, slept = asyncio.ensure_future(self._stopping.wait()), asyncio.ensure_future(self._sleep(seconds))
        try:
            await asyncio.wait({stopped, slept}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            slept.cancel()

    def standing(self, tier: str, hotkey: str) -> float:
        """A miner's standing in a tier."""
        return self.ledger.standings.value(tier, hotkey)

    def _missing(self, name: str, metagraph: Metagraph) -> list[Peer]:
        """Who has a standing in a tier, is registered, and does not say that it serves it: it fails this round."""
        there = {peer.hotkey for peer in self.peers.serving(name)}
        standing = self.ledger.standings.by_tier.get(name, {})
        return [
            Peer(neuron.hotkey, "", neuron.uid)
            for neuron in metagraph.neurons
            if neuron.hotkey in standing and neuron.hotkey not in there
        ]

    def _written(self, number: int, played: Round) -> None:
        scored = sum(outcome.value > 0 for outcome in played.outcomes)
        told = f"round {number}, {played.tier}: {scored} of {len(played.outcomes)} miners scored"
        _log.info("round", extra={"detail": f"{told}; asking {played.asking:.1f} s, judging {played.judging:.1f} s"})
        self.on_round(played)


def tiers_in_turn(shares: Mapping[str, float], number: int, *, unpaid_every: int = 4) -> list[str]:
    """The tiers of pass ``number``: those with a share of the incentive each time, the others every so often."""
    paid = [name for name, share in shares.items() if share > 0]
    return list(shares) if number % unpaid_every == 0 else paid
