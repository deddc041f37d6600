"""What a miner answered to applications is read as well, now and then: whoever serves only validators earns nothing.

Nobody knows the right answers about an application's text, but its own sentences ask for themselves. What that is worth
is not to be compared with a challenge's score, so an audit never adds: it counts, as one more round, where it is worth
less than half of what the miner usually gets.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Mapping

from condense_core.neurons.chain.base import Metagraph
from condense_core.neurons.judging.audits import Audit, AuditSpool
from condense_core.neurons.judging.challenges import clozes
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.protocol.messages import MessageError
from condense_core.neurons.tiers import Tiers
from condense_core.neurons.validating.ledger import Ledger

_log = logging.getLogger("condense_core.neurons")
PER_ROUND = 2
"""Audits that are read behind each round."""
FAILED_SHARE = 0.5
_UNTELLING = "the challenge is not telling"


def failed_audit(standing: float, value: float) -> bool:
    """Whether an audit of this value counts against a miner of this standing."""
    return value < FAILED_SHARE * standing


async def audit(
    spool: AuditSpool, ledger: Ledger, tiers: Tiers, judges: Mapping[str, Judge], *, metagraph: Metagraph | None
) -> int:
    """Read what a gateway has left, and book what failed; how many were read."""
    taken = await asyncio.to_thread(spool.take, PER_ROUND)
    for each in taken:
        neuron = None if metagraph is None else metagraph.by_hotkey.get(each.hotkey)
        if neuron is None or each.ask.tier not in tiers.tiers:
            continue
        value = await asyncio.to_thread(_value, each, tiers, judges)
        standing = ledger.standings.value(each.ask.tier, each.hotkey)
        if value is not None and failed_audit(standing, value):
            ledger.count(each.ask.tier, each.hotkey, neuron.uid, value)
            _log.warning("audit", extra={"detail": f"{each.hotkey}: {value:.3f}, where its standing is {standing:.3f}"})
    return len(taken)


def _value(audited: Audit, tiers: Tiers, judges: Mapping[str, Judge]) -> float | None:
    """What the answer is worth; None where the text says nothing about it."""
    try:
        tier = audited.ask.tier_of(tiers)
    except MessageError:  # the tiers were others when it was asked
        return None
    turns = clozes(audited.ask.text, tier.questions, random.Random(secrets.token_hex(16)))
    if not turns:
        return None
    found, _ = judges[tier.model].score(audited.body, audited.ask, tier, turns, audited.seconds)
    return None if found.why == _UNTELLING else found.value
