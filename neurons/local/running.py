"""A local subnet from its first process to its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from condense_core.neurons.local.children import ChildFailed
from condense_core.neurons.local.customer import Customer
from condense_core.neurons.local.kills import Killed, Kills, checked
from condense_core.neurons.local.report import report, write_page
from condense_core.neurons.local.shown import Shown, miners_table, weights_table
from condense_core.neurons.local.subnet import LocalSubnet, played
from condense_core.neurons.local.watch import Boards, rows

STUCK = 900.0
"""Seconds without a new round after which it is given up: the slowest model on two cores needs less for one."""
_LOOK = 0.1


def play(subnet: LocalSubnet, shown: Shown, *, kills: Kills | None = None, page: Path | None = None) -> dict[str, Any]:
    """Start the subnet, follow its rounds to their end and say what became of it.

    Raises:
        ChildFailed: a process ended that should not have, or no round was played for long.
    """
    began = time.monotonic()
    subnet.start()
    started = time.monotonic()
    for member in (*subnet.of("validator"), *subnet.of("gateway")):
        shown.note(f"{member.name}: {member.url}{'/' if member.kind == 'validator' else ''}")
    customers = [Customer(gateway.url, subnet.tiers.tiers[subnet.paid[0]]) for gateway in subnet.of("gateway")]
    try:
        _follow(subnet, shown, kills, customers)
    finally:
        for customer in customers:
            customer.close()
    found = report(subnet, seconds=time.monotonic() - started)
    found["starting_seconds"] = round(started - began, 1)
    for customer in customers:
        found["gateway"] = customer.facts()
    if kills is not None:
        found["kills"] = checked(subnet, kills.killed)
    if page is not None:
        write_page(page, found, subnet.members)
    _tell(subnet, shown, found, page)
    return found


def _follow(subnet: LocalSubnet, shown: Shown, kills: Kills | None, customers: Sequence[Customer]) -> None:
    """Until all validators have played their rounds."""
    validators = subnet.of("validator")
    ends = [validator.child for validator in validators]
    boards = Boards(validators)
    last = time.monotonic()

    def look() -> None:
        nonlocal last
        subnet.children.check(ends=ends)
        if boards.poll():
            last = time.monotonic()
            shown.update(boards.latest, subnet)
        if time.monotonic() - last > STUCK:
            child = next(child for child in ends if child.is_running)
            raise ChildFailed(f"{child.name}: no round within {STUCK:g} s", child.tail())

    try:
        while any(child.is_running for child in ends):
            if kills is not None and all(child.is_running for child in ends) and kills.is_due(_played(subnet)):
                _killed(shown, kills.kill(subnet, look))
            look()
            for customer in customers:
                customer.ask()
            time.sleep(_LOOK)
    finally:
        boards.close()


def _played(subnet: LocalSubnet) -> int:
    """Rounds of each paid tier that all validators have played."""
    counts = []
    for validator in subnet.of("validator"):
        ledger = subnet.ledger(validator)
        counts.append(played(ledger, subnet.paid))
        ledger.close()
    return min(counts)


def _killed(shown: Shown, killed: Killed) -> None:
    shown.note(f"killed {killed.kind} {killed.name}; it was ready again after {killed.seconds:.1f} s")


def _tell(subnet: LocalSubnet, shown: Shown, found: dict[str, Any], page: Path | None) -> None:
    """The end for people."""
    boards = {validator["name"]: validator["board"] for validator in found["validators"]}
    if shown.console.is_terminal:
        shown.end()
    else:
        shown.update(boards, subnet)  # the last rounds, which nobody could be asked for any more
    shown.console.print(
        miners_table(rows(list(boards.values()), subnet.members, subnet.paid), width=shown.console.width)
    )
    shown.console.print(weights_table(found))
    if (least := found["correlation"]) is not None:
        shown.note(f"correlation of the validators' weights: {least:.3f}")
    shown.note(f"{found['starting_seconds']:.0f} s to start, {found['seconds']:.0f} s of rounds")
    if "gateway" in found:
        answered, failed = found["gateway"]["answered"], found["gateway"]["failed"]
        told = ", ".join(f"{code} {count} times" for code, count in failed.items())
        shown.note(f"the gateway answered {answered} requests" + (f", and not for {told}" if told else ""))
    if "kills" in found:
        for name, looked in found["kills"]["looked_at"].items():
            shown.note(f"{name}: {looked['rounds']} rounds with {looked['outcomes']} outcomes were checked")
        problems = found["kills"]["problems"]
        shown.note("\n".join(problems) or f"{len(found['kills']['killed'])} kills: nothing was lost or doubled")
    if page is not None:
        shown.note(f"wrote {page}")
