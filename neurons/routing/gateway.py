"""What a gateway does with a text: a tier is chosen, miners are asked, and a verified answer is passed on."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Any

from condense_core.decoder.model import public_model_id
from condense_core.neurons.asking.client import Peer
from condense_core.neurons.chain.base import Metagraph
from condense_core.neurons.incentive.copies import ALIKE, similarity
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.routing.asking import Answer, Asker, Question
from condense_core.neurons.routing.choosing import fitting_tiers, limits_of, ratio_for
from condense_core.neurons.routing.race import race
from condense_core.neurons.routing.requests import DEFAULT_K, MAX_K, ROUTINGS, RoutedRequest
from condense_core.neurons.routing.usage import UsageLog, Use
from condense_core.neurons.tiers import Tier, Tiers
from condense_core.serving.errors import DeadlineExceeded, InvalidRequest, QueueFull, ServingError, ShuttingDown
from condense_core.serving.wire import Compressed

_MARGIN, _MARGIN_SHARE = 0.05, 0.1
"""Seconds, or share of the time, that are left for what comes behind the miners."""
_LEAST_PATIENCE, _PATIENCE, _PATIENCE_SHARE = 0.25, 3.0, 1 / 3


class NoMiners(ServingError):
    """Nobody serves the tier now."""

    code, status = "no_miners", 503


class UnknownMiner(ServingError):
    """The miner that was asked for does not serve the tier."""

    code, status = "unknown_miner", 404


class NoAnswer(ServingError):
    """Miners were asked, and none gave a valid answer."""

    code, status = "no_answer", 502


@dataclass(frozen=True)
class GatewaySettings:
    """How a gateway works.

    Attributes:
        routing: for requests that name none. timeout: seconds for requests that name none.
        audit_share: of requests whose answers are left for a validator.
        max_running: texts that miners are asked about at once. max_waiting: that wait for their turn.
        max_held_bytes: of answers that applications have not taken yet; beyond, nothing new is accepted.
    """

    routing: str = "best"
    timeout: float = 30.0
    audit_share: float = 0.02
    max_running: int = 64
    max_waiting: int = 1024
    max_held_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.routing not in ROUTINGS or self.routing == "one":
            raise ValueError(f"routing: got {self.routing!r:.40}, expected best, fastest or k_of_n")
        if not 0 <= self.audit_share <= 1:
            raise ValueError(f"audit-share: got {self.audit_share}, expected a number in [0, 1]")
        if not 0 < self.timeout <= 3600 or self.max_running < 1 or self.max_waiting < 0:
            raise ValueError("timeout, max_running: expected seconds from 0 to 3,600, and at least 1 at once")


class Gateway:
    """Routes requests to the miners of a subnet. It belongs to one event loop; ``see`` tells it who is there.

    Args:
        own: its hotkey, which is not asked.
    """

    def __init__(
        self,
        tiers: Tiers,
        asker: Asker,
        usage: UsageLog,
        own: str,
        *,
        settings: GatewaySettings | None = None,
        rng: Random | None = None,
    ) -> None:
        self.tiers, self.asker, self.usage, self.own = tiers, asker, usage, own
        self.settings, self._rng = settings or GatewaySettings(), rng or Random()
        self._room = asyncio.Semaphore(self.settings.max_running)
        self._waiting = self._running = self._held = 0
        self._seen, self._state = False, "new"

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._state = "running"

    async def stop(self, timeout: float | None) -> None:
        """End. What was accepted has been answered before: whoever accepts requests waits for its answers.

        All is written down then: a server that was ended by a signal raises it again behind this.
        """
        self._state = "stopped"
        await asyncio.to_thread(self.asker.close)
        await asyncio.to_thread(self.usage.flush)

    async def see(self, metagraph: Metagraph) -> None:
        """Learn from the chain who there is, and from the miners what they serve."""
        self.asker.ranking.update(metagraph)
        await self.asker.peers.refresh(metagraph, but=self.own)
        for name in self.tiers.tiers:
            self.asker.observer.miners(name, len(self.asker.peers.serving(name)))
        self._seen = True

    # -- what it says of itself ----------------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        shares = self._shares()
        by_model: dict[str, dict[str, Any]] = {}
        for name, tier in self.tiers.tiers.items():
            entry = by_model.setdefault(tier.model, self._model(tier))
            limits = tier.model_dump(
                include={"min_chars", "max_chars", "max_question_chars", "min_ratio", "max_ratio", "timeout"}
            )
            miners = len(self.asker.peers.serving(name))
            entry["tiers"][name] = {**limits, "share": shares[name], "miners": miners}
            entry["limits"]["max_chars"] = max(entry["limits"]["max_chars"], tier.max_chars)
        return list(by_model.values())

    def _model(self, tier: Tier) -> dict[str, Any]:
        described = self.asker.models[tier.model]
        return {
            "id": public_model_id(tier.model),
            "digest": described.digest,
            "d_model": described.width,
            "methods": {},
            "prunes": False,
            "answers": False,
            "routings": list(ROUTINGS),
            "default_routing": self.settings.routing,
            "max_k": MAX_K,
            "limits": {"max_chars": 0, "timeout": self.settings.timeout},
            "tiers": {},
        }

    def load(self) -> dict[str, Any]:
        miners = {name: len(self.asker.peers.serving(name)) for name in self.tiers.tiers}
        return {"waiting": self._waiting, "running": self._running, "wait_seconds": 0.0, "miners": miners}

    @property
    def is_ready(self) -> bool:
        return self._state == "running" and self._seen and any(map(self.asker.peers.serving, self.tiers.tiers))

    @property
    def is_healthy(self) -> bool:
        return True

    # -- requests ------------------------------------------------------------------------------------------------------

    async def compress(self, request: RoutedRequest) -> Compressed:
        """Verified soft tokens of a text, by the deadline; ``ServingError`` says why there are none."""
        at, started = time.time(), time.monotonic()
        code, tier, made = "internal", request.tier or "", None
        try:
            made, code = await self._in_time(request), "ok"
            return made
        except ServingError as error:
            code = error.code
            if request.tenant and not self._was_hurried(request, error):
                self.usage.refund(request.tenant, request.num_chars, at)
            raise
        except asyncio.CancelledError:
            code = "cancelled"
            raise
        finally:
            seconds = time.monotonic() - started
            told: Mapping[str, Any] = {} if made is None else made.told
            tier = str(told.get("tier", tier if tier in self.tiers.tiers else ""))
            self.asker.observer.ended(tier or "none", code, seconds)
            counts = (0, 0) if made is None else (made.num_context_tokens, made.num_soft_tokens)
            miner = str(told.get("miner", ""))
            self.usage.record(Use(at, request.tenant, tier, request.num_chars, *counts, miner, seconds, code))

    def _was_hurried(self, request: RoutedRequest, error: ServingError) -> bool:
        """Whether the caller gave miners less time than any tier does: they have worked for it, and it is paid."""
        least = min(tier.timeout for tier in self.tiers.tiers.values())
        return isinstance(error, DeadlineExceeded) and request.timeout is not None and request.timeout < least

    async def _in_time(self, request: RoutedRequest) -> Compressed:
        if self._state != "running":
            raise ShuttingDown(f"the gateway is {self._state}, expected one that runs", retry_after=5.0)
        if self._room.locked() and self._waiting >= self.settings.max_waiting:
            raise QueueFull(f"{self._waiting:,} texts wait already, expected another try", retry_after=1.0)
        if self._held > self.settings.max_held_bytes:
            raise QueueFull("answers wait to be taken, expected applications to read faster", retry_after=1.0)
        timeout = self.settings.timeout if request.timeout is None else request.timeout
        begun = asyncio.get_running_loop().time()
        until = begun + timeout - min(_MARGIN, _MARGIN_SHARE * timeout)
        try:
            async with asyncio.timeout(timeout):
                self._waiting += 1
                try:
                    await self._room.acquire()
                finally:
                    self._waiting -= 1
                self._running += 1
                try:
                    return await self._routed(request, begun, until)
                finally:
                    self._running -= 1
                    self._room.release()
        except TimeoutError:
            raise DeadlineExceeded(
                f"timeout: {timeout:g} s are over, expected the miners to take less, or more of them"
            ) from None

    async def _routed(self, request: RoutedRequest, begun: float, until: float) -> Compressed:
        loop = asyncio.get_running_loop()
        admitted = loop.time()
        routing = request.routing or self.settings.routing
        tier, ask, context_tokens = await self._chosen(request)
        peers = self._candidates(request, routing, ask.tier)
        counted = loop.time()
        audited = self.asker.audits is not None and self._rng.random() < self.settings.audit_share
        question = Question(ask, tier, context_tokens, until, audited)
        asked: list[Peer] = []
        outcomes: Counter[str] = Counter()

        async def attempt(peer: Peer) -> Answer | None:
            asked.append(peer)
            outcome, answer = await self.asker.attempt(peer, question)
            outcomes[outcome] += 1
            return answer

        def patience(peer: Peer, left: float) -> float:
            share = min(left, tier.timeout) * _PATIENCE_SHARE
            known = self.asker.ranking.expected(ask.tier, peer.hotkey)
            return share if known is None else min(share, max(_PATIENCE * known, _LEAST_PATIENCE))

        want = (request.k or DEFAULT_K) if routing == "k_of_n" else 1
        found = await race(peers, attempt, want=min(want, len(peers)), until=until, patience=patience)
        if not found:
            raise self._unanswered(ask.tier, asked, outcomes, loop.time() >= until)
        best = min(found, key=lambda answer: peers.index(answer.peer))
        told: dict[str, str | int] = {
            "miner": best.peer.hotkey,
            "uid": best.peer.uid,
            "tier": ask.tier,
            "asked": len(asked),
        }
        if routing == "k_of_n":
            told |= {"valid": len(found), **await self._agreeing(best, found, until)}
        soft = best.soft
        timing = {"queue": admitted - begun, "tokenize": counted - admitted, "run": loop.time() - counted}
        self.asker.observer.written(len(best.payload), 0.0)
        made = Compressed(
            best.payload,
            soft.num_context_tokens,
            len(soft),
            soft.ratio,
            soft.method,
            soft.model_id,
            soft.text,
            timing={**timing, "miner": best.seconds, "verify": best.checking},
            told=told,
        )
        self._held += len(made.payload)
        weakref.finalize(made, self._taken, len(made.payload))
        return made

    def _taken(self, num_bytes: int) -> None:
        self._held -= num_bytes

    async def _chosen(self, request: RoutedRequest) -> tuple[Tier, Ask, int]:
        """The first tier that the text fits and that somebody serves, what is asked, and the tokens of the text."""
        names = fitting_tiers(self.tiers, self._shares(), request)
        served = [name for name in names if self.asker.peers.serving(name)]
        if not served:
            raise NoMiners(f"tier: nobody serves {' or '.join(names)} now, expected another try", retry_after=10.0)
        for name in served:
            tier = self.tiers.tiers[name]
            try:
                count = await self.asker.count(request.text, tier.model)
            except ValueError as error:
                raise InvalidRequest(str(error)) from None
            ratio = ratio_for(request, tier, count)
            if ratio is not None:
                return tier, Ask(tier=name, text=request.text, ratio=ratio, question=request.question), count
        raise InvalidRequest(
            f"max_soft_tokens: got {request.max_soft_tokens} for {count:,} tokens of text, expected what fits a tier: "
            + limits_of(self.tiers, served)
        )

    def _candidates(self, request: RoutedRequest, routing: str, tier: str) -> list[Peer]:
        """Whom to ask, in this order."""
        peers = self.asker.peers.serving(tier)
        if routing == "one":
            chosen = [peer for peer in peers if request.miner in (peer.hotkey, peer.uid)]
            if not chosen:
                raise UnknownMiner(f"miner: got {request.miner!r:.70}, expected one that serves {tier!r} now")
            return chosen
        ranking = self.asker.ranking
        return ranking.fastest(tier, peers) if routing == "fastest" else ranking.best(tier, peers)

    async def _agreeing(self, best: Answer, found: list[Answer], until: float) -> dict[str, int]:
        """How many of the valid answers are alike the one that is passed on, which is one of them, if time allows."""

        def compare() -> int:
            rest = (answer for answer in found if answer is not best)
            return 1 + sum(similarity(best.soft.embeds, answer.soft.embeds) >= ALIKE for answer in rest)

        try:
            async with asyncio.timeout_at(until + _MARGIN / 2):
                return {"agree": await self.asker.computed(compare)}
        except TimeoutError:
            return {}

    def _unanswered(self, tier: str, asked: list[Peer], outcomes: Counter[str], late: bool) -> ServingError:
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        if unfinished := len(asked) - outcomes.total():
            told = f"{told}, {unfinished} unfinished" if told else f"{unfinished} unfinished"
        message = f"none of {len(asked)} miners of {tier!r} gave a valid answer ({told})"
        return DeadlineExceeded(f"timeout: it is over, and {message}") if late else NoAnswer(message, retry_after=1.0)

    def _shares(self) -> dict[str, float]:
        return self.tiers.shares(datetime.now(UTC))
