"""Rounds, metagraphs and miners of tests that need no chain and no model."""

from __future__ import annotations

from collections.abc import Mapping

from condense_core.neurons.chain.base import Metagraph, Neuron
from condense_core.neurons.incentive.score import Score, failed
from condense_core.neurons.judging.challenges import Challenge
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.validating.rounds import Outcome, Round
from condense_core.tasks.generators import Turn

TURN = Turn("Who?", "Ada", "person", ("Ada L.",))


def played_round(values: Mapping[str, float], *, tier: str = "research", body: bytes = b"") -> Round:
    """A round in which miners got ``values``; those with 0 were late. body: that each of them sent."""
    outcomes = tuple(
        Outcome(name, uid, Score(value, 0.5, 1.0, value) if value else failed("late: 9 s"), 1.0, name if body else "")
        for uid, (name, value) in enumerate(values.items())
    )
    challenge = Challenge(tier, Ask(tier=tier, text="x" * 50, ratio=4.0, question="Where?"), (TURN, TURN))
    bodies = dict.fromkeys(values, body) if body else {}
    return Round(tier, challenge, "ab", (TURN,), outcomes, 1.5, 0.25, 0.5, bodies)


def metagraph_of(*hotkeys: str, addresses: Mapping[str, str] | None = None) -> Metagraph:
    """Neurons with the uids 0, 1 and so on."""
    where = addresses or {}
    rows = (
        Neuron(uid, name, "cold", where.get(name), False, 0.0, 0.0, True, 0, 0, 0.0, 0.0, 0.0)
        for uid, name in enumerate(hotkeys)
    )
    return Metagraph(7, 1, tuple(rows), 360, 0, None)
