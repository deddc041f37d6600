"""``condense-miner``: sells compression on a subnet. ``python neurons/miner.py`` does the same.

It needs a hotkey that is registered on the subnet, an address that validators reach, and a model of one of the tiers.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense_core.cli.options import Device, Dtype, check_compressor, check_dtype, checked_device, quiet_libraries
from condense_core.cli.terminal import extra_missing, run, working

if TYPE_CHECKING:
    from condense_core.neurons.mining.backends import Backend
    from condense_core.neurons.tiers import Tiers

app = typer.Typer(name="condense-miner", add_completion=False, pretty_exceptions_enable=False)


@app.command()
def mine(
    netuid: Annotated[int, typer.Option(help="The subnet.", min=0, envvar="NETUID")],
    network: Annotated[
        str,
        typer.Option(
            help="finney, test, local, the URL of a node, or memory:SOCKET, a chain of this host for tests.",
            envvar="SUBTENSOR_NETWORK",
        ),
    ] = "finney",
    wallet: Annotated[str, typer.Option(help="Name of the wallet.", envvar="WALLET_NAME")] = "default",
    hotkey: Annotated[str, typer.Option(help="Its hotkey, which signs; no coldkey is needed.")] = "default",
    wallet_path: Annotated[Path, typer.Option(help="Folder of the wallets.")] = Path("~/.bittensor/wallets"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="0: any free one.", min=0, max=65535)] = 8091,
    external_ip: Annotated[
        str | None, typer.Option(help="Where others reach this machine.", show_default="its own address")
    ] = None,
    external_port: Annotated[
        int | None, typer.Option(help="And at which port.", min=1, max=65535, show_default="--port")
    ] = None,
    announce: Annotated[bool, typer.Option(help="Publish the address on the chain.")] = True,
    model: Annotated[
        str | None, typer.Option(help="Model to compress for, in this process.", show_default="that of the tiers")
    ] = None,
    compressor: Annotated[
        list[str] | None,
        typer.Option(help="Folder of a trained compressor. May be repeated.", metavar="FOLDER", show_default=False),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Compressor to answer with.", show_default="the model's first")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="URL of a 'condense serve' that compresses instead.", show_default=False)
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="A class of your own that compresses, as module:Class.", show_default=False)
    ] = None,
    tiers: Annotated[Path | None, typer.Option(help="TOML file of the tiers.", show_default="the subnet's own")] = None,
    state: Annotated[Path, typer.Option(help="Folder for what must outlive a restart.")] = Path(
        "~/.local/state/condense-miner"
    ),
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
    plain_logs: Annotated[bool, typer.Option("--plain-logs", help="Logs for people instead of JSON.")] = False,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.", min=1, show_default="one for each core")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Sell compression on a subnet until Ctrl-C or SIGTERM: what was accepted by then is finished.

    With --server, an API key is read from the environment variable CONDENSE_API_KEY.
    """
    with extra_missing("neurons"):
        from condense_core.neurons.chain.errors import ChainFailure
        from condense_core.neurons.chain.opened import open_chain
        from condense_core.neurons.mining import running
        from condense_core.neurons.mining.app import Miner
        from condense_core.neurons.mining.follower import Follower
        from condense_core.neurons.mining.gate import Gate, GateSettings
        from condense_core.neurons.protocol.nonces import SqliteNonceStore
        from condense_core.neurons.tiers import DEFAULT_TIERS, read_tiers
        from condense_core.serving.http import logs
        from condense_core.serving.http.server import bound_socket
    known = read_tiers(tiers or DEFAULT_TIERS)
    if sum(each is not None for each in (model, server, backend)) > 1:
        raise ValueError("model, server, backend: expected one of them at most")
    check_dtype(dtype)
    for folder in compressor or ():
        check_compressor(folder)
    settings = GateSettings(
        min_stake=min_stake,
        allow=frozenset(allow or ()),
        deny=frozenset(deny or ()),
        requests_per_minute=requests_per_minute,
    )
    key = running.open_hotkey(wallet, hotkey, wallet_path)
    bound = bound_socket(host, port)
    address: tuple[str, int] | None = None
    if announce and not dry_run:
        public = network in ("finney", "test")
        address = running.reached_at(external_ip, external_port or bound.getsockname()[1], public=public)
    own = state.expanduser() / key.ss58_address
    own.mkdir(parents=True, exist_ok=True, mode=0o700)
    with working("loading the model"):
        quiet_libraries()
        made = _backend(known, model, compressor, method, server, backend, device, dtype, threads)
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
            print(json.dumps(asyncio.run(running.tried(miner, follower)), indent=2))
            return
        logs.configure(plain=plain_logs)
        asyncio.run(running.serve(miner, follower, bound, observer=_observer(made), started=started))
    except ChainFailure as error:
        raise ValueError(f"chain: {error}") from None


def _backend(
    tiers: Tiers,
    model: str | None,
    compressors: Sequence[str] | None,
    method: str | None,
    server: str | None,
    name: str | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
) -> Backend:
    from condense_core.neurons.mining.backends import EngineBackend, RemoteBackend, own_backend

    if name is not None:
        return own_backend(name)
    if server is not None:
        return RemoteBackend(server, api_key=os.environ.get("CONDENSE_API_KEY"), method=method)
    from condense_core.serving.engine import CompressionEngine
    from condense_core.serving.prometheus import PrometheusObserver
    from condense_core.serving.spec import EngineSpec

    models = sorted({tier.model for tier in tiers.tiers.values()})
    if model is None and len(models) > 1:
        raise ValueError(f"model: the tiers have {', '.join(models)}, expected --model with one of them")
    checked_device(device)
    spec = EngineSpec(
        model=model or models[0],
        methods=None if method is None else (method,),
        compressors=tuple(compressors or ()),
        device=device,
        dtype=dtype,
        prunes=False,
        answers=False,
        threads=threads,
    )
    served = spec.load()
    return EngineBackend(CompressionEngine(served, limits=spec.limits, observer=PrometheusObserver(served.device)))


def _observer(backend: Backend) -> Any:
    """What counts: the engine's own observer, or one of HTTP alone."""
    import torch

    from condense_core.neurons.mining.backends import EngineBackend
    from condense_core.serving.prometheus import PrometheusObserver

    if isinstance(backend, EngineBackend):
        return backend.engine.observer
    return PrometheusObserver(torch.device("cpu"))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``condense-miner``; returns the exit code."""
    return run(app, argv, name="condense-miner")


if __name__ == "__main__":
    sys.exit(main())
