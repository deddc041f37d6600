"""Shows a local subnet: a live table on a terminal, a line for each round elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from condense_core.cli.terminal import console
from condense_core.neurons.local.subnet import LocalSubnet, Member
from condense_core.neurons.local.watch import Board, Row, new_rounds, rows

_ROOMY = 110


class Shown:
    """What people see while it runs; use it as a context manager.

    quiet: nothing is written.
    """

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(quiet=True) if quiet else console()
        self._live: Live | None = None
        self._before: dict[str, Board] = {}

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """The table lives no longer."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def tell(self, line: str) -> None:
        """A line of what happens."""
        if self._live is None:
            self.console.print(line, markup=False)
        else:
            self._live.update(Text(f"{line} ..."), refresh=True)

    def note(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, markup=False)

    def update(self, boards: Mapping[str, Board], subnet: LocalSubnet) -> None:
        """The validators' leaderboards have changed."""
        if self._live is not None:
            table = miners_table(rows(list(boards.values()), subnet.members, subnet.paid), width=self.console.width)
            counts = [f"{name} {_newest(board)} rounds" for name, board in boards.items()]
            self._live.update(Group(table, Text(", ".join(counts))), refresh=True)
            return
        for validator, board in boards.items():
            for tier, number, values in new_rounds(self._before.get(validator), board):
                self.console.print(_round_line(validator, tier, number, values, subnet.members), markup=False)
            self._before[validator] = board


def miners_table(shown: Sequence[Row], *, width: int) -> Table:
    """The miners of the tiers that pay; why a score is 0 where there is room for it."""
    table = Table(box=box.SIMPLE, header_style="dim", padding=(0, 1, 0, 0))
    for column in ("uid", "miner", "tier", "recovered", "latency", "score", "standing", "weight"):
        table.add_column(column, justify="left" if column in ("miner", "tier") else "right", no_wrap=True)
    if width >= _ROOMY:
        table.add_column("")
    for row in shown:
        cells = (
            str(row.uid),
            escape(row.name),
            row.tier,
            _share(row.recovered),
            "" if row.seconds is None else f"{row.seconds:.2f} s",
            "" if row.score is None else f"{row.score:.3f}",
            f"{row.standing:.3f}",
            f"{row.weight:.1%}",
        )
        table.add_row(*cells, *([escape(row.why[:48])] if width >= _ROOMY else []))
    return table


def weights_table(report: Mapping[str, Any]) -> Table:
    """What the chain has at the end, by miner: the row of each validator, and the incentive."""
    table = Table(title="on the chain", title_justify="left", box=box.SIMPLE, header_style="dim")
    for column in ("uid", "miner", "hotkey"):
        table.add_column(column, justify="right" if column == "uid" else "left")
    for validator in report["validators"]:
        table.add_column(validator["name"], justify="right")
    table.add_column("incentive", justify="right")
    for miner in report["miners"]:
        given = [f"{validator['weights'].get(miner['hotkey'], 0.0):.1%}" for validator in report["validators"]]
        name = escape(miner["name"])
        table.add_row(str(miner["uid"]), name, miner["hotkey"][:12], *given, f"{miner['incentive']:.1%}")
    return table


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _newest(board: Board) -> int:
    return max((tier["history"]["rounds"][-1] for tier in board["tiers"] if tier["history"]["rounds"]), default=0)


def _round_line(
    validator: str, tier: str, number: int, values: Mapping[str, float | None], members: Sequence[Member]
) -> str:
    known = {member.hotkey: member for member in members}
    asked = [(known[hotkey], value) for hotkey, value in values.items() if value is not None and hotkey in known]
    asked.sort(key=lambda each: each[0].uid)
    told = ", ".join(f"{member.name} {value:.2f}" for member, value in asked)
    return f"{validator}, round {number}, {tier}: {told}"


def stderr_tail(lines: Sequence[str]) -> None:
    """The last lines of a log, as they are."""
    for line in lines:
        print(line, file=sys.stderr)
