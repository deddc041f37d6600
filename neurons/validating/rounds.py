"""A round: one challenge for all miners of a tier, what they answered, and what it was worth."""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.asking.client import Peer, Reply
from condense_core.neurons.asking.peers import Peers
from condense_core.neurons.incentive.copies import shares
from condense_core.neurons.incentive.score import Score, failed
from condense_core.neurons.judging.challenges import Challenge
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.tiers import Tier
from condense_core.tasks.generators import Turn


@dataclass(frozen=True)
class Outcome:
    """What a miner got in a round.

    Attributes:
        score: of its answer alone. share: of the reward of answers like it, 1 where there is none.
        sha256: of the body that it sent, "" where it sent none.
    """

    hotkey: str
    uid: int
    score: Score
    share: float = 1.0
    sha256: str = ""

    @property
    def value(self) -> float:
        """What counts, in [0, 1]."""
        return self.score.value * self.share


@dataclass(frozen=True)
class Round:
    """A round that is over.

    Attributes:
        began: seconds since the epoch. asking, judging: seconds that both parts took.
        secret: of the questions. turns: that were asked.
        bodies: what was sent, by SHA-256, for whoever computes the round again.
    """

    tier: str
    challenge: Challenge
    secret: str
    turns: tuple[Turn, ...]
    outcomes: tuple[Outcome, ...]
    began: float
    asking: float
    judging: float
    bodies: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def values(self) -> dict[str, float]:
        """What counts, by hotkey."""
        return {outcome.hotkey: outcome.value for outcome in self.outcomes}

    @property
    def counts(self) -> bool:
        """Whether anybody scored; a round in which nobody did says more about the validator."""
        return any(outcome.value > 0 for outcome in self.outcomes)


async def asked(
    peers: Peers, miners: Sequence[Peer], challenge: Challenge, tier: Tier
) -> dict[str, tuple[Peer, Reply]]:
    """What each miner sent. All are asked at once, in an order that is new each time."""
    order = random.sample(list(miners), len(miners))
    replies = await asyncio.gather(
        *(peers.ask(peer, challenge.ask, timeout=tier.timeout, max_bytes=tier.max_answer_bytes) for peer in order)
    )
    return {peer.hotkey: (peer, reply) for peer, reply in zip(order, replies, strict=True)}


def judged(
    judge: Judge,
    tier: Tier,
    challenge: Challenge,
    turns: Sequence[Turn],
    replies: Mapping[str, tuple[Peer, Reply]],
    *,
    seed: int,
) -> list[Outcome]:
    """What each reply was worth: its own score, and its share among those like it.

    A pure function of its arguments, so that a round can be computed again.
    """
    answers = {hotkey: (reply.body, reply.seconds) for hotkey, (_, reply) in replies.items() if reply.is_answer}
    found = judge.scores(answers, challenge.ask, tier, turns)
    soft: dict[str, SoftTokens] = {hotkey: made for hotkey, (_, made) in found.items() if made is not None}
    scores = {hotkey: score.value for hotkey, (score, _) in found.items()}
    parts = shares({hotkey: made.embeds for hotkey, made in soft.items()}, scores, seed=seed)
    return [
        Outcome(
            hotkey,
            peer.uid,
            found[hotkey][0] if hotkey in found else failed(reply.why, reply.seconds),
            parts.get(hotkey, 1.0),
            hashlib.sha256(reply.body).hexdigest() if reply.is_answer else "",
        )
        for hotkey, (peer, reply) in sorted(replies.items(), key=lambda item: item[1][0].uid)
    ]


async def play(
    tier_name: str,
    tier: Tier,
    challenge: Challenge,
    judge: Judge,
    peers: Peers,
    missing: Sequence[Peer] = (),
) -> Round:
    """One round: ask, draw the questions, judge. Nothing of it is written down.

    missing: miners that have a standing in this tier and are not there; they fail.
    """
    began, started = time.time(), time.monotonic()
    replies = await asked(peers, peers.serving(tier_name), challenge, tier)
    asking = time.monotonic() - started
    secret = secrets.token_hex(16)  # of the questions: nobody knows it before all answers are in
    turns = challenge.drawn(tier.questions, secret)
    outcomes = await asyncio.to_thread(judged, judge, tier, challenge, turns, replies, seed=_seed(secret))
    gone = [Outcome(peer.hotkey, peer.uid, failed("not there")) for peer in missing if peer.hotkey not in replies]
    return Round(
        tier_name,
        challenge,
        secret,
        turns,
        (*outcomes, *gone),
        began,
        asking,
        time.monotonic() - started - asking,
        {o.sha256: replies[o.hotkey][1].body for o in outcomes if o.sha256},
    )


def again(judge: Judge, tier: Tier, played: Round) -> list[Outcome]:
    """The outcomes of a round computed from its bodies, with what was measured then: its failures and seconds."""
    replies = {}
    for outcome in played.outcomes:
        peer = Peer(outcome.hotkey, "", outcome.uid)
        body = played.bodies.get(outcome.sha256, b"")
        why = outcome.score.why if not body else ""
        replies[outcome.hotkey] = (peer, Reply(body, outcome.score.seconds, why))
    return judged(judge, tier, played.challenge, played.turns, replies, seed=_seed(played.secret))


def _seed(secret: str) -> int:
    """Of the sketches in which copies are looked for: drawn with the questions, so that nobody can prepare for it."""
    return int(secret, 16) % 2**63
