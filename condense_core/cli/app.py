"""The ``condense`` program: its commands, each a module of this package, and its entry point.

Heavy imports (torch, transformers) stand inside the commands, so that ``condense --help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from condense_core._version import __version__
from condense_core.cli import ask, bench, calibrate, compress, demo, doctor, eval, models, prune, report, serve, train
from condense_core.cli.terminal import run

app = typer.Typer(
    name="condense",
    help="Long contexts become a few soft tokens, or a pruned KV cache, that an unmodified LLM can use.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"condense {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command("compress")(compress.compress)
app.command("ask")(ask.ask)
app.command("eval")(eval.evaluate)
app.command("report")(report.report)
app.command("prune")(prune.prune)
app.command("calibrate")(calibrate.calibrate)
app.command("train")(train.train)
app.command("serve")(serve.serve)
app.add_typer(bench.app, name="bench")
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)
app.command("demo")(demo.demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``condense``; returns the exit code."""
    return run(app, argv, name="condense")
