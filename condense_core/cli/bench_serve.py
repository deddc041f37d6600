"""``condense bench serve``: a running server under load."""

from __future__ import annotations

import json as json_format
import os
from pathlib import Path
from typing import Annotated

import typer

from condense_core.cli.options import Json
from condense_core.cli.terminal import EXIT_INTERRUPTED, console, print_json, progress_bar


def serve(
    server: Annotated[
        str, typer.Option(help="Of a running 'condense serve'.", metavar="URL")
    ] = "http://127.0.0.1:8000",
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second, at random times, whatever the answers take.", show_default="5"),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Instead, clients that each ask again once they were answered.")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds in which requests begin.", show_default="30, or as long as --requests takes"),
    ] = None,
    requests: Annotated[int | None, typer.Option(help="At most so many.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that the server is given for each.")] = 30.0,
    method: Annotated[str | None, typer.Option(help="Compressor.", show_default="the server's first")] = None,
    ratio: Annotated[float | None, typer.Option(help="Context tokens per soft token.", show_default="4")] = None,
    mix: Annotated[
        Path | None,
        typer.Option(
            help='What is asked, as JSON lines: {"chars": 2000, "method": ..., "ratio": ..., "question": ..., '
            '"weight": ...}, of which all but chars may be missing.',
            show_default="500 to 7,000 characters, their logarithm uniform",
            metavar="FILE.jsonl",
        ),
    ] = None,
    repeat: Annotated[float, typer.Option(help="Share of the requests that come again.", metavar="SHARE")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and texts.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write all that was measured here, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency, rates and memory over time into this file.", metavar="FILE.png")
    ] = None,
    json: Json = False,
) -> None:
    """Put a running server under load, and measure latencies, refusals, rates and its memory.

    Latency begins when a request was due, even where it could only be sent later. No text comes twice, so that the
    server's cache answers none. A server with keys takes the one in CONDENSE_API_KEY. Ctrl-C shows what was measured
    until then.
    """
    from condense_core.serving.load.driver import drive
    from condense_core.serving.load.mix import LogUniform, RecordedMix
    from condense_core.serving.load.record import record_of
    from condense_core.serving.load.settings import LoadSettings
    from condense_core.serving.load.table import as_table, lines

    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"output: {output.parent} is not an existing folder; expected one to write {output.name} into")
    if plot is not None:
        from condense_core.tasks.plot import check_picture

        check_picture(plot)
    settings = LoadSettings(
        server=server,
        rate=rate,
        concurrency=concurrency,
        duration=duration,
        requests=requests,
        timeout=timeout,
        method=method,
        ratio=ratio,
        mix=LogUniform() if mix is None else RecordedMix.load(mix),
        repeat=repeat,
        seed=seed,
    )
    with progress_bar("requests") as show:

        def told(seconds: float, sent: int, answered: int) -> None:
            show(answered, requests, f"{seconds:.0f} s, {sent - answered:,} on their way")

        run = drive(settings, key=os.environ.get("CONDENSE_API_KEY"), progress=told)
    record = record_of(run)
    if output is not None:
        from condense_core.files.atomic import write_atomically

        write_atomically(output, (json_format.dumps(record, indent=1) + "\n").encode(), "the record")
    if json:
        print_json(record)
    else:
        console().print(as_table(record))
        print("\n".join(lines(record)))
    if plot is not None:
        from condense_core.serving.load.plot import plot_load

        plot_load(record, plot)
    if run.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
