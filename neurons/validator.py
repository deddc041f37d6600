"""``condense-validator``: measures miners on a subnet and sets weights. ``python neurons/validator.py`` does the same.

It needs a hotkey that is registered on the subnet and has a validator permit, and the LLMs of the tiers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from condense_core.cli.options import (
    Device,
    Dtype,
    Json,
    PlainLogs,
    Threads,
    check_dtype,
    checked_device,
    quiet_libraries,
)
from condense_core.cli.terminal import console, extra_missing, print_json, run, working
from condense_core.neurons.options import (
    WALLETS,
    HotkeyName,
    Netuid,
    Network,
    State,
    TiersFile,
    WalletName,
    WalletPath,
    given_netuid,
    is_another_command,
    state_folder,
)
from condense_core.neurons.updates import CheckUpdates, telling_updates

if TYPE_CHECKING:
    from condense_core.neurons.judging.supply import Supply
    from condense_core.neurons.tiers import Tiers

app = typer.Typer(name="condense-validator", add_completion=False, pretty_exceptions_enable=False)

Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="Folder of a tier's model, where it is not to come from the hub. May be repeated.",
        metavar="FOLDER",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def validate(
    context: typer.Context,
    netuid: Netuid = None,
    network: Network = "finney",
    wallet: WalletName = "default",
    hotkey: HotkeyName = "default",
    wallet_path: WalletPath = WALLETS,
    tiers: TiersFile = None,
    state: State = Path("~/.local/state/condense-validator"),
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Running text: a folder, a text or .jsonl(.xz) file, or dataset:NAME. Text of your own is harder to "
            "tell from an application's than what the built-in writer writes.",
            show_default="a built-in writer",
        ),
    ] = None,
    squad: Annotated[
        list[Path] | None,
        typer.Option(help="File of questions in SQuAD's format. May be repeated.", show_default=False),
    ] = None,
    model: Models = None,
    every: Annotated[float, typer.Option(help="Seconds between two rounds, on average.", min=0)] = 60.0,
    rounds: Annotated[
        int | None, typer.Option(help="Of each paid tier, then it ends.", min=1, show_default="without end")
    ] = None,
    audits: Annotated[
        Path | None,
        typer.Option(help="Folder in which a gateway leaves answers to audit.", show_default="nothing is audited"),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(help="Ask miners of private networks too.", show_default="on test chains of this host"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address where the leaderboard is shown.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="And its port; 0: any free one.", min=0, max=65535)] = 8092,
    body_mb: Annotated[int, typer.Option(help="Of answers that are kept for 'replay'.", min=0)] = 1024,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Play one round of each tier, and write down and publish nothing.")
    ] = False,
    plain_logs: PlainLogs = False,
    check_updates: CheckUpdates = False,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Measure miners and set weights until Ctrl-C or SIGTERM, which end it behind the round that runs."""
    if is_another_command(context):
        return
    netuid = given_netuid(netuid)
    with extra_missing("neurons"):
        from condense_core.neurons.asking.client import NeuronClient
        from condense_core.neurons.chain.errors import ChainFailure
        from condense_core.neurons.chain.opened import is_of_this_host, open_chain
        from condense_core.neurons.judging.audits import AuditSpool
        from condense_core.neurons.tiers import DEFAULT_TIERS, read_tiers
        from condense_core.neurons.validating import running
        from condense_core.neurons.validating.ledger import Ledger
        from condense_core.neurons.validating.loop import Validator
        from condense_core.neurons.wallets import open_hotkey
        from condense_core.serving.http import logs
        from condense_core.serving.http.server import bound_socket
    known = read_tiers(tiers or DEFAULT_TIERS)
    check_dtype(dtype)
    checked_device(device)
    supply = _supply(known, corpus, squad or [])
    key = open_hotkey(wallet, hotkey, wallet_path)
    bound = bound_socket(host, port)
    nowhere = TemporaryDirectory()  # for a dry run
    own = Path(nowhere.name) if dry_run else state_folder(state, key.ss58_address)
    ledger = Ledger(own, body_bytes=body_mb * 2**20)
    spool = None if audits is None else AuditSpool(audits.expanduser())
    chain = open_chain(network, netuid, wallet=key, version_key=known.version)
    with working("loading the model"):
        quiet_libraries()
        judges = running.load_judges(known, model or [], device=device, dtype=dtype, threads=threads)
    client = NeuronClient(key, private=is_of_this_host(network) if private is None else private)
    validator = Validator(chain, client, known, judges, supply, ledger, audits=spool)

    def started() -> None:
        where = f"http://{host}:{bound.getsockname()[1]}"
        print(f"{key.ss58_address} judges {', '.join(known.tiers)}; {where}", file=sys.stderr, flush=True)

    try:
        if dry_run:
            print_json(asyncio.run(running.tried(validator)))
            return
        logs.configure(plain=plain_logs)
        serving = running.serve(validator, bound, rounds=rounds, every=every, started=started)
        asyncio.run(telling_updates(serving, check_updates))
    except ChainFailure as error:
        raise ValueError(f"chain: {error}") from None


@app.command()
def replay(
    state: Annotated[Path, typer.Option(help="Folder of one validator's log: --state and its hotkey.")],
    number: Annotated[int | None, typer.Option("--round", help="Which round.", show_default="the last")] = None,
    tiers: TiersFile = None,
    model: Models = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Compute a round again from its log, beside a validator that runs. Exit code 1 where a score differs."""
    with extra_missing("neurons"):
        from condense_core.neurons.tiers import DEFAULT_TIERS, read_tiers
        from condense_core.neurons.validating import running
        from condense_core.neurons.validating.ledger import Ledger
        from condense_core.neurons.validating.replay import as_table, replayed
    known = read_tiers(tiers or DEFAULT_TIERS)
    ledger = Ledger(state.expanduser(), writes=False)
    number = number or ledger.newest()
    if number is None:
        raise ValueError(f"round: none is written down in {state} yet")
    played = ledger.round(number)
    if played.tier not in known.tiers:
        raise ValueError(f"tiers: round {number} is of {played.tier!r}, expected a file that has it")
    check_dtype(dtype)
    tier = known.tiers[played.tier]
    with working("loading the model"):
        quiet_libraries()
        own = known.model_copy(update={"tiers": {played.tier: tier}})
        judges = running.load_judges(own, model or [], device=checked_device(device), dtype=dtype, threads=threads)
    with working(f"round {number}"):
        rows = replayed(played, judges[tier.model], tier)
    if as_json:
        print_json({"round": number, "tier": played.tier, "miners": rows})
    else:
        console().print(as_table(number, played, rows))
    if not all(row["agrees"] for row in rows):
        raise typer.Exit(1)


def _supply(tiers: Tiers, corpus: str | None, squad: Sequence[Path]) -> Supply:
    from condense_core.neurons.judging.supply import Supply
    from condense_core.tasks.sources import open_source
    from condense_core.tasks.squad import read_squad

    paragraphs = [paragraph for path in squad for paragraph in read_squad(path)]
    return Supply(tiers, open_source(corpus), paragraphs)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``condense-validator``; returns the exit code."""
    return run(app, argv, name="condense-validator")


if __name__ == "__main__":
    sys.exit(main())
