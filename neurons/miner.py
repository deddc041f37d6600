"""``condense-miner``: sells compression on a subnet. ``python neurons/miner.py`` does the same.

It needs a hotkey that is registered on the subnet, an address that validators reach, and a model of one of the tiers.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from condense_core.cli.options import (
    Compressors,
    Corpus,
    Device,
    Dtype,
    Json,
    PlainLogs,
    Squad,
    Threads,
    quiet_libraries,
)
from condense_core.cli.terminal import console, extra_missing, print_json, progress_bar, run, working
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

app = typer.Typer(name="condense-miner", add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[
    str | None, typer.Option(help="Model to compress for, in this process.", show_default="that of the tiers")
]
Method = Annotated[str | None, typer.Option(help="Compressor to answer with.", show_default="the model's first")]
Server = Annotated[
    str | None, typer.Option("--server", help="URL of a 'condense serve' that compresses instead.", show_default=False)
]
OwnBackend = Annotated[
    str | None,
    typer.Option("--backend", help="A class of your own that compresses, as module:Class.", show_default=False),
]


@app.callback(invoke_without_command=True)
def mine(
    context: typer.Context,
    netuid: Netuid = None,
    network: Network = "finney",
    wallet: WalletName = "default",
    hotkey: HotkeyName = "default",
    wallet_path: WalletPath = WALLETS,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8091,
    external_ip: Annotated[
        str | None,
        typer.Option(help="Where others reach this machine.", envvar="EXTERNAL_IP", show_default="its own address"),
    ] = None,
    external_port: Annotated[
        int | None,
        typer.Option(help="And at which port.", min=1, max=65535, envvar="EXTERNAL_PORT", show_default="--port"),
    ] = None,
    announce: Annotated[bool, typer.Option(help="Publish the address on the chain.")] = True,
    model: Model = None,
    compressor: Compressors = None,
    method: Method = None,
    server: Server = None,
    backend: OwnBackend = None,
    tiers: TiersFile = None,
    state: State = Path("~/.local/state/condense-miner"),
    min_stake: Annotated[float, typer.Option(help="Of a validator that may ask.", min=0)] = 1000.0,
    allow: Annotated[
        list[str] | None, typer.Option(help="Hotkey that may ask in any case. May be repeated.", show_default=False)
    ] = None,
    deny: Annotated[
        list[str] | None, typer.Option(help="Hotkey that may not. May be repeated.", show_default=False)
    ] = None,
    requests_per_minute: Annotated[
        float, typer.Option(help="Of all validators together, in each tier.", min=1)
    ] = 600.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check it all, compress one text of each tier, and publish nothing.")
    ] = False,
    plain_logs: PlainLogs = False,
    check_updates: CheckUpdates = False,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Sell compression on a subnet until Ctrl-C or SIGTERM: what was accepted by then is finished.

    With --server, an API key is read from the environment variable CONDENSE_API_KEY.
    """
    if is_another_command(context):
        return
    netuid = given_netuid(netuid)
    with extra_missing("neurons"):
        from condense_core.neurons.chain.errors import ChainFailure
        from condense_core.neurons.chain.opened import open_chain
        from condense_core.neurons.mining import running
        from condense_core.neurons.mining.app import Miner
        from condense_core.neurons.mining.follower import Follower
        from condense_core.neurons.mining.gate import Gate, GateSettings
        from condense_core.neurons.mining.opened import BackendChoice, observer_of
        from condense_core.neurons.protocol.nonces import SqliteNonceStore
        from condense_core.neurons.tiers import DEFAULT_TIERS, read_tiers
        from condense_core.neurons.wallets import open_hotkey
        from condense_core.serving.http import logs
        from condense_core.serving.http.server import bound_socket
    known = read_tiers(tiers or DEFAULT_TIERS)
    choice = BackendChoice(
        model=model,
        compressors=tuple(compressor or ()),
        method=method,
        server=server,
        own=backend,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    choice.check()
    settings = GateSettings(
        min_stake=min_stake,
        allow=frozenset(allow or ()),
        deny=frozenset(deny or ()),
        requests_per_minute=requests_per_minute,
    )
    key = open_hotkey(wallet, hotkey, wallet_path)
    bound = bound_socket(host, port)
    address: tuple[str, int] | None = None
    if announce and not dry_run:
        public = network in ("finney", "test")
        address = running.reached_at(external_ip, external_port or bound.getsockname()[1], public=public)
    own = state_folder(state, key.ss58_address)
    with working("loading the model"):
        quiet_libraries()
        made = choice.open(known)
    miner = Miner(key, known, made, Gate(settings), SqliteNonceStore(own / "nonces.db"))
    follower = Follower(
        open_chain(network, netuid, wallet=key, version_key=known.version),
        miner.gate,
        None if address is None else lambda: address,
    )

    def started() -> None:
        place = "" if address is None else f", announced as {address[0]}:{address[1]}"
        where = f"http://{host}:{bound.getsockname()[1]}{place}"
        print(f"{key.ss58_address} serves {', '.join(miner.served)}; {where}", file=sys.stderr, flush=True)

    try:
        if dry_run:
            print_json(asyncio.run(running.tried(miner, follower)))
            return
        logs.configure(plain=plain_logs)
        serving = running.serve(miner, follower, bound, observer=observer_of(made), started=started)
        asyncio.run(telling_updates(serving, check_updates))
    except ChainFailure as error:
        raise ValueError(f"chain: {error}") from None


@app.command("doctor")
def doctor(
    model: Model = None,
    compressor: Compressors = None,
    method: Method = None,
    server: Server = None,
    backend: OwnBackend = None,
    tiers: TiersFile = None,
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Tier to look at. May be repeated.", show_default="those that the model serves"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Challenges of each tier.", min=1, max=1000)] = 5,
    corpus: Corpus = None,
    squad: Squad = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """What would this miner earn? Score its answers as a validator does, without a chain or a wallet.

    Needs a machine that holds the tier's whole model, which reads the answers.
    """
    with extra_missing("neurons"):
        from condense_core.neurons.mining.doctor import examined
        from condense_core.neurons.mining.opened import BackendChoice
        from condense_core.neurons.mining.verdict import as_table, lines
        from condense_core.neurons.tiers import DEFAULT_TIERS, read_tiers
    known = read_tiers(tiers or DEFAULT_TIERS)
    for name in tier or ():
        if name not in known.tiers:
            raise ValueError(f"tier: got {name!r:.40}, expected one of {', '.join(sorted(known.tiers))}")
    choice = BackendChoice(
        model=model,
        compressors=tuple(compressor or ()),
        method=method,
        server=server,
        own=backend,
        device=device,
        dtype=dtype,
        threads=threads,
    )
    choice.check()
    quiet_libraries()
    with progress_bar("scoring") as show:
        found = asyncio.run(examined(choice, known, tier or (), corpus=corpus, squad=squad, rounds=rounds, told=show))
    if json:
        print_json(found)
        return
    for told in found:
        console().print(as_table(told))
        print("\n".join(lines(told)), end="\n\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``condense-miner``; returns the exit code."""
    return run(app, argv, name="condense-miner")


if __name__ == "__main__":
    sys.exit(main())
