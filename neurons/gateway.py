"""``condense-gateway``: compression by a subnet's miners for applications. ``python neurons/gateway.py`` does the same.

It needs a hotkey that is registered on the subnet with a validator permit, since miners answer nobody else, and of
each tier's model config and tokenizer.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from condense_core.cli.options import Json, PlainLogs, quiet_libraries
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

app = typer.Typer(name="condense-gateway", add_completion=False, pretty_exceptions_enable=False)

_STATE = Path("~/.local/state/condense-gateway")


@app.callback(invoke_without_command=True)
def route(
    context: typer.Context,
    netuid: Netuid = None,
    network: Network = "finney",
    wallet: WalletName = "default",
    hotkey: HotkeyName = "default",
    wallet_path: WalletPath = WALLETS,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8001,
    keys: Annotated[
        Path | None, typer.Option(help="TOML file of API keys, as --new-key prints.", show_default="everybody may ask")
    ] = None,
    new_key: Annotated[
        str | None, typer.Option(help="Make a key of this name, print it and its lines for --keys, and exit.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate in PEM, for https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.", show_default="in the certificate")] = None,
    tiers: TiersFile = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of config and tokenizer of a tier's model, where they are not to come from the hub. May be "
            "repeated.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    state: State = _STATE,
    routing: Annotated[str, typer.Option(help="For requests that name none: best, fastest or k_of_n.")] = "best",
    timeout: Annotated[float, typer.Option(help="Seconds for requests that name none.", min=0.001, max=3600)] = 30.0,
    audits: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which texts of applications and answers to them are left for a validator of this host.",
            show_default="nothing is left",
        ),
    ] = None,
    audit_share: Annotated[float, typer.Option(help="Of requests, with --audits.", min=0, max=1)] = 0.02,
    usage_days: Annotated[float, typer.Option(help="For which the log of usage is kept.", min=0)] = 90.0,
    private: Annotated[
        bool | None,
        typer.Option(help="Ask miners of private networks too.", show_default="on test chains of this host"),
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks at the chain and its miners.", min=1)] = 60.0,
    stop_seconds: Annotated[float, typer.Option(help="To finish what was accepted, when told to end.", min=0)] = 30.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check it all, have one text of each tier compressed, and serve nothing.")
    ] = False,
    plain_logs: PlainLogs = False,
    check_updates: CheckUpdates = False,
) -> None:
    """Serve compression by a subnet's miners over HTTP until Ctrl-C or SIGTERM: what was accepted is finished."""
    if is_another_command(context):
        return
    with extra_missing("neurons"):
        from condense_core.neurons.asking.client import NeuronClient
        from condense_core.neurons.asking.peers import Peers
        from condense_core.neurons.chain.errors import ChainFailure
        from condense_core.neurons.chain.opened import is_of_this_host, open_chain
        from condense_core.neurons.judging.audits import AuditSpool
        from condense_core.neurons.routing import running
        from condense_core.neurons.routing.asking import Asker
        from condense_core.neurons.routing.gateway import Gateway, GatewaySettings
        from condense_core.neurons.routing.observer import GatewayObserver
        from condense_core.neurons.routing.ranking import Ranking
        from condense_core.neurons.routing.usage import UsageLog
        from condense_core.neurons.tiers import DEFAULT_TIERS, read_tiers
        from condense_core.neurons.wallets import open_hotkey
        from condense_core.serving.http import logs
        from condense_core.serving.http.server import bound_socket, check_certificate
        from condense_core.serving.keys import Keys
        from condense_core.serving.keys import new_key as make_key
    if new_key is not None:
        made, lines = make_key(new_key)
        print(f"{made}\n\n{lines}", end="")
        return
    netuid = given_netuid(netuid)
    known = read_tiers(tiers or DEFAULT_TIERS)
    settings = GatewaySettings(routing=routing, timeout=timeout, audit_share=audit_share)
    if tls_key is not None and tls_cert is None:
        raise ValueError("--tls-key: got no --tls-cert, expected both")
    if tls_cert is not None:
        check_certificate(tls_cert, tls_key)
    key = open_hotkey(wallet, hotkey, wallet_path)
    usage = UsageLog(state_folder(state), days=usage_days)
    allowed = None if keys is None else Keys.load(keys, usage)
    spool = None if audits is None else AuditSpool(audits.expanduser())
    bound = bound_socket(host, port)
    with working("reading the tokenizers"):
        quiet_libraries()
        models = running.load_descriptions(known, model or [])
    client = NeuronClient(key, private=is_of_this_host(network) if private is None else private, connections=512)
    asker = Asker(Peers(client), Ranking(), models, GatewayObserver(), audits=spool)
    gateway = Gateway(known, asker, usage, key.ss58_address, settings=settings)
    chain = open_chain(network, netuid, wallet=key, version_key=known.version)
    parts = running.Running(gateway, chain, client, every)
    url = f"{'http' if tls_cert is None else 'https'}://{host}:{bound.getsockname()[1]}"

    def started() -> None:
        miners = ", ".join(f"{name} by {len(asker.peers.serving(name))}" for name in known.tiers)
        print(f"{key.ss58_address} routes {miners} miners; {url}", file=sys.stderr, flush=True)
        if allowed is None and host not in ("127.0.0.1", "localhost", "::1"):
            print("note: no --keys, so that whoever reaches this address may ask", file=sys.stderr, flush=True)

    logs.configure(plain=plain_logs)
    try:
        if dry_run:
            print_json(asyncio.run(running.tried(parts)))
            return
        listening = running.Listening(bound, tls_cert, tls_key)
        serving = running.serve(parts, listening, keys=allowed, stop_seconds=stop_seconds, started=started)
        asyncio.run(telling_updates(serving, check_updates))
    except ChainFailure as error:
        raise ValueError(f"chain: {error}") from None


@app.command()
def usage(
    state: Annotated[Path, typer.Option(help="Folder that the gateway has as --state.")] = _STATE,
    as_json: Json = False,
) -> None:
    """What was used, by day and key."""
    from condense_core.neurons.routing.usage import summed

    rows = summed(state.expanduser())
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table("day", "key", *("requests", "answered", "characters", "context tokens", "soft tokens", "mean, s"))
    for row in rows:
        counts = (row[name] for name in ("requests", "answered", "chars", "context_tokens", "soft_tokens"))
        mean = "" if row["mean_seconds"] is None else f"{row['mean_seconds']:.3f}"
        table.add_row(row["day"], row["key"] or "-", *(f"{count:,}" for count in counts), mean)
    console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``condense-gateway``; returns the exit code."""
    return run(app, argv, name="condense-gateway")


if __name__ == "__main__":
    sys.exit(main())
