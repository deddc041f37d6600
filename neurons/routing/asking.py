"""One attempt: a miner is asked, its answer is verified, and what came of it is remembered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.description import ModelDescription
from condense_core.decoder.model import public_model_id
from condense_core.neurons.asking.client import Peer, Reply
from condense_core.neurons.asking.peers import Peers
from condense_core.neurons.judging.audits import AuditSpool
from condense_core.neurons.protocol.messages import Ask, MessageError, read_answer
from condense_core.neurons.routing.observer import GatewayObserver
from condense_core.neurons.routing.ranking import Ranking
from condense_core.neurons.tiers import Tier
from condense_core.serving.errors import mistake

_log = logging.getLogger(__name__)
T = TypeVar("T")

_LEAST = 0.005  # seconds in which nobody answers
_LONG = 0.3  # share of a tier's timeout: less than what a miner has before another one is asked beside it
_OUTCOMES = {
    "late": "late",
    "refused": "refused",
    "not reached": "unreached",
    "broken": "unreached",
    "not signed": "unsigned",
    "not sealed": "unsigned",
}


@dataclass(frozen=True)
class Answer:
    """A verified answer.

    Attributes:
        payload: the bytes of ``soft``. seconds: until its last byte. checking: that verifying it took.
    """

    peer: Peer
    soft: SoftTokens
    payload: bytes
    seconds: float
    checking: float


@dataclass(frozen=True)
class Question:
    """What miners are asked, and what their answers are checked against.

    Attributes:
        context_tokens: of the text. until: on the event loop's clock, when an answer is of no more use.
        audited: whether answers are left for a validator.
    """

    ask: Ask
    tier: Tier
    context_tokens: int
    until: float
    audited: bool = False


class Asker:
    """Asks miners and believes nothing that it has not verified. It belongs to one event loop.

    Args:
        models: by the name of the tier's model. audits: where answers are left for a validator.
    """

    def __init__(
        self,
        peers: Peers,
        ranking: Ranking,
        models: Mapping[str, ModelDescription],
        observer: GatewayObserver,
        *,
        audits: AuditSpool | None = None,
    ) -> None:
        self.peers, self.ranking, self.models, self.observer, self.audits = peers, ranking, models, observer, audits
        self._threads = ThreadPoolExecutor(4, "condense-verify")

    async def count(self, text: str, model: str) -> int:
        """Tokens of a text; ``ValueError`` where there are none."""
        return await self.computed(lambda: self.models[model].count(text))

    async def computed(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, which computes for longer than an event loop should."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def attempt(self, peer: Peer, question: Question) -> tuple[str, Answer | None]:
        """What came of asking a miner, in some words, and its answer where it is valid."""
        loop, name = asyncio.get_running_loop(), question.ask.tier
        started = loop.time()
        given = min(question.tier.timeout, question.until - started)
        if given < _LEAST:
            return "late", None
        try:
            outcome, told, answer = await self._asked(peer, question, given)
        except asyncio.CancelledError:
            self.observer.attempted(name, "given up")
            self._unfinished(peer, question, loop.time() - started)
            raise
        except Exception as error:  # whatever a miner has found to cause it, the next one is to be asked
            _, where = mistake(error)
            _log.error("mistake", extra={"detail": where})
            outcome, told, answer = "invalid", "invalid", None
        self.observer.attempted(name, outcome)
        if answer is not None:
            self.ranking.answered(name, peer.hotkey, answer.seconds)
        elif outcome == "late":
            self._unfinished(peer, question, loop.time() - started)
        else:
            self.ranking.failed(name, peer.hotkey)
        return told, answer

    async def _asked(self, peer: Peer, question: Question, timeout: float) -> tuple[str, str, Answer | None]:
        """The outcome for the figures, and what to say of it."""
        reply = await self.peers.ask(peer, question.ask, timeout=timeout, max_bytes=question.tier.max_answer_bytes)
        if not reply.is_answer:
            outcome = _OUTCOMES.get(reply.why.partition(":")[0], "invalid")
            return outcome, f"refused with {reply.status}" if outcome == "refused" else outcome, None
        answer = await self._verified(peer, question, reply)
        outcome = "invalid" if answer is None else "valid"
        return outcome, outcome, answer

    def _unfinished(self, peer: Peer, question: Question, seconds: float) -> None:
        """No answer had come after so long. That is a failure where it is long, and not where the caller hurried."""
        tier = question.ask.tier
        self.ranking.unfinished(tier, peer.hotkey, seconds)
        if seconds >= _LONG * question.tier.timeout:
            self.ranking.failed(tier, peer.hotkey)

    async def _verified(self, peer: Peer, question: Question, reply: Reply) -> Answer | None:
        """A signed answer where it is valid."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        if question.audited and self.audits is not None:  # a wrong one as well: it is signed
            left = (question.ask, peer.hotkey, reply.body, reply.seconds)
            loop.run_in_executor(self._threads, self.audits.put, *left)
        try:
            soft, payload = await loop.run_in_executor(self._threads, self._read, question, reply.body)
        except MessageError:
            return None
        return Answer(peer, soft, payload, reply.seconds, loop.time() - begun)

    def _read(self, question: Question, body: bytes) -> tuple[SoftTokens, bytes]:
        model = self.models[question.tier.model]
        soft = read_answer(
            body,
            question.ask,
            question.tier,
            context_tokens=question.context_tokens,
            model_id=public_model_id(question.tier.model),
            width=model.width,
            model_digest=model.digest,
        )
        # Words of a miner's own choice are not passed on as the application's, or as the model's name.
        own = {"text": "", "model_id": public_model_id(question.tier.model), "model_revision": ""}
        if all(getattr(soft, name) == value for name, value in own.items()):
            return soft, body
        soft = replace(soft, **own)
        return soft, soft.to_bytes()

    def close(self) -> None:
        """End the threads behind what they do."""
        self._threads.shutdown(wait=True)
