"""What became of a local subnet: as JSON, and as the page that a validator shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from condense_core.neurons.local.chain import NETUID
from condense_core.neurons.local.subnet import LocalSubnet, Member, played
from condense_core.neurons.validating.board import board
from condense_core.neurons.validating.page import with_boards


def report(subnet: LocalSubnet, *, seconds: float) -> dict[str, Any]:
    """Everything at the end. An epoch ends first, so that the incentive is that of the last weights."""
    subnet.chain.end_epoch()
    metagraph = subnet.chain.metagraph()
    hotkeys = {neuron.uid: neuron.hotkey for neuron in metagraph.neurons}
    rows = subnet.chain.weights()
    validators = []
    for validator in subnet.of("validator"):
        ledger = subnet.ledger(validator)
        facts = {"hotkey": validator.hotkey, "netuid": NETUID, "uid": validator.uid, "block": metagraph.block}
        shown = board(ledger, subnet.tiers, **facts, waiting="", weights_waiting="")
        validators.append(
            {
                "name": validator.name,
                "uid": validator.uid,
                "hotkey": validator.hotkey,
                "rounds": played(ledger, subnet.paid),
                "weights": {hotkeys[to]: weight for to, weight in rows.get(validator.uid, {}).items()},
                "board": shown,
            }
        )
        ledger.close()
    miners = [member for member in subnet.members if member.kind in ("miner", "adversary")]
    return {
        "model": subnet.setting.model,
        "seconds": round(seconds, 1),
        "block": metagraph.block,
        "miners": [
            {
                "uid": member.uid,
                "name": member.name,
                "kind": member.kind,
                "hotkey": member.hotkey,
                "incentive": metagraph.by_hotkey[member.hotkey].incentive,
            }
            for member in sorted(miners, key=lambda member: member.uid)
        ],
        "validators": validators,
        "correlation": least_correlation([v["weights"] for v in validators], [m.hotkey for m in miners]),
    }


def least_correlation(given: Sequence[Mapping[str, float]], hotkeys: Sequence[str]) -> float | None:
    """The smallest correlation between two validators' weights; None where there is none to speak of.

    hotkeys: of the miners, also of those without a weight.
    """
    pairs = itertools.combinations([[weights.get(hotkey, 0.0) for hotkey in hotkeys] for weights in given], 2)
    found = [value for one, other in pairs if (value := _correlation(one, other)) is not None]
    return min(found, default=None)


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    own, others = _centred(one), _centred(other)
    size = math.sqrt(math.fsum(x * x for x in own) * math.fsum(y * y for y in others))
    return math.fsum(x * y for x, y in zip(own, others, strict=True)) / size if size else None


def _centred(values: Sequence[float]) -> list[float]:
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def write_page(path: Path, given: Mapping[str, Any], members: Sequence[Member]) -> None:
    """The validators' page with all that it shows, as one file."""
    boards = [{"by": validator["name"], **validator["board"]} for validator in given["validators"]]
    path.write_text(with_boards(boards, {member.hotkey: member.name for member in members}), encoding="utf-8")
