"""``condense-localnet``: a whole subnet on this computer. ``python neurons/localnet.py`` does the same."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from condense_core.cli.options import Json
from condense_core.cli.terminal import check_output, extra_missing, print_json, run
from condense_core.decoder.catalog import model_path
from condense_core.decoder.embedded import EMBEDDED_NAME

app = typer.Typer(name="condense-localnet", add_completion=False, pretty_exceptions_enable=False)


@app.command()
def localnet(
    miners: Annotated[int, typer.Option(help="Each compresses in another way.", min=1, max=64)] = 4,
    validators: Annotated[int, typer.Option(help="Each judges all of them.", min=1, max=16)] = 2,
    rounds: Annotated[int, typer.Option(help="Of each paid tier and validator; 0: until Ctrl-C.", min=0)] = 10,
    model: Annotated[
        str, typer.Option(help="Of all tiers: a folder, or a name of 'condense models'.", metavar="MODEL")
    ] = EMBEDDED_NAME,
    gateway: Annotated[bool, typer.Option("--gateway", help="A gateway, and an application that asks it.")] = False,
    adversaries: Annotated[
        bool, typer.Option("--adversaries", help="Miners of all kinds that cheat, beside the honest ones.")
    ] = False,
    every: Annotated[float, typer.Option(help="Seconds between two rounds, on average.", min=0)] = 0.0,
    kills: Annotated[
        int, typer.Option(help="Neurons that are killed and started again, at random moments.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of what --kills draws.")] = 0,
    page: Annotated[
        Path | None, typer.Option(help="Write the leaderboard, as a page, to this file.", show_default=False)
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the folder with state and logs of all processes.")] = False,
    threads: Annotated[int, typer.Option(help="Of the CPU, for each process.", min=1)] = 1,
    as_json: Json = False,
) -> None:
    """Run chain, miners and validators of a subnet, show what miners earn, and end all of them.

    Whatever ends this command ends its processes. With --kills the exit code is 1 where a ledger lost or doubled a
    score, or rounds did not go on.
    """
    with extra_missing("neurons"):
        from condense_core.neurons.extra import bittensor_module
        from condense_core.neurons.local.adversaries.kinds import ADVERSARIES
        from condense_core.neurons.local.children import ChildFailed, Children
        from condense_core.neurons.local.kills import Kills
        from condense_core.neurons.local.running import play
        from condense_core.neurons.local.setting import Setting
        from condense_core.neurons.local.shown import Shown, stderr_tail
        from condense_core.neurons.local.subnet import LocalSubnet
    bittensor_module()
    model_path(model)  # one that has to be fetched first shows before anything has started
    if page is not None:
        check_output(str(page), "")
    killing = Kills(kills, rounds, seed=seed) if kills else None
    setting = Setting(
        model=model,
        miners=miners,
        validators=validators,
        rounds=rounds or None,
        every=every,
        gateway=gateway,
        adversaries=tuple(ADVERSARIES) if adversaries else (),
        kills=kills,
        threads=threads,
    )
    with _ended_by_signals(), _folder(keep) as folder, Children() as children, Shown(quiet=as_json) as shown:
        subnet = LocalSubnet(setting, folder, children, tell=shown.tell)
        try:
            found = play(subnet, shown, kills=killing, page=page)
        except ChildFailed as error:
            stderr_tail(error.tail)
            raise
    if as_json:
        print_json(found)
    if found.get("kills", {}).get("problems"):
        raise typer.Exit(1)


@contextmanager
def _folder(keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="condense-localnet-"))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``condense-localnet``; returns the exit code."""
    return run(app, argv, name="condense-localnet")


if __name__ == "__main__":
    sys.exit(main())
