"""A run for people: what became of the requests, how long that took, and how the server stood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("p50", "p90", "p99", "p99.9", "max")


def as_table(record: Mapping[str, Any]) -> Table:
    """Latencies of each outcome in milliseconds."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title(record), title_justify="left")
    table.add_column("milliseconds")
    for heading in ("requests", *_COLUMNS):
        table.add_column(heading, justify="right")

    def row(name: str, found: Mapping[str, float]) -> None:
        if found["count"]:
            table.add_row(name, f"{found['count']:,}", *(_ms(found[column]) for column in _COLUMNS))

    for outcome, found in record["latency_ms"].items():
        row(outcome, found)
        row("  from sending", record["from_sending_ms"].get(outcome, {"count": 0}))
        if outcome == "ok":
            row("  beyond the engine", record["overhead_ms"])
            row("  beyond its compute, alone", record["overhead_alone_ms"])
            for stage, seconds in record["stages_ms"].items():
                row(f"  {stage}", seconds)
    return table


def title(record: Mapping[str, Any]) -> str:
    """One line: what was asked of whom."""
    settings, offered = record["settings"], record["offered"]
    how = f"{settings['concurrency']} clients"
    if settings["rate"] is not None:
        how = f"{settings['rate']:.3g} arrivals a second"
    least, most = settings["mix"]["chars"]
    ended = "interrupted after " if record["interrupted"] else ""
    seconds = f"{record['seconds']:{'.0f' if record['seconds'] >= 10 else '.2g'}} s"
    who = f"{offered['id']} on {offered['device']}" if offered["device"] else str(offered["id"])
    return f"{settings['server']} ({who}): {how}, {ended}{seconds}, {least:,} to {most:,} characters"


def lines(record: Mapping[str, Any]) -> list[str]:
    """What stands below the table."""
    counts, rates, late = record["counts"], record["throughput"], record["driver"]["lag_ms"]
    ended = (
        f"{counts['due']:,} requests, {counts['unfinished']:,} unfinished, {record['lost']:,} lost, "
        f"{record['refused']:,} refused, {record['missed_deadline']:,} past their deadline, "
        f"{record['cached']:,} answered from a cache"
    )
    a_second = (
        f"{rates['answers_per_second']:,.1f} answers, {rates['contexts_per_second']:,.1f} contexts and "
        f"{rates['input_tokens_per_second']:,.0f} tokens a second"
    )
    found = [ended, a_second]
    if (memory := record["memory"]) is not None:
        slope = memory["slope_mb_per_minute"]
        found.append(
            f"server: {memory['start_mb']:,.0f} MB at first, {memory['max_mb']:,.0f} at most, "
            f"{memory['end_mb']:,.0f} at last"
            + ("" if slope is None else f", {slope:+.2f} MB a minute in the second half")
        )
    if record["queue"]["max"] is not None:
        found.append(f"queue: at most {record['queue']['max']:,} waited, {record['queue']['end'] or 0:,} at last")
    if late["count"]:
        found.append(
            f"driver: sent {_ms(late['p50'])} ms late at the median, {_ms(late['p99'])} at the 99th percentile"
        )
    if not record["driver"]["kept_up"]:
        found.append(
            "note: the driver could not keep up; latencies hold its own delay, those from sending hide the wait"
        )
    return found


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if abs(milliseconds) >= 100 else f"{milliseconds:.3g}"
