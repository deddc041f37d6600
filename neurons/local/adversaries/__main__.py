"""``python -m condense_core.neurons.local.adversaries KIND=HOTKEY ...``: adversaries that share one process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from condense_core.cli.options import quiet_libraries
from condense_core.cli.terminal import extra_missing, run
from condense_core.neurons.options import WALLETS, Netuid, Network, TiersFile, WalletName, WalletPath, given_netuid

if TYPE_CHECKING:
    from condense_core.neurons.asking.client import Peer
    from condense_core.neurons.chain.base import Metagraph

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_LOOK_SECONDS = 30.0


@app.command()
def cheat(
    kinds: Annotated[
        list[str] | None, typer.Argument(metavar="KIND=HOTKEY ...", help="Kinds, each with the hotkey that it has.")
    ] = None,
    netuid: Netuid = None,
    network: Network = "local",
    wallet: WalletName = "default",
    wallet_path: WalletPath = WALLETS,
    model: Annotated[str, typer.Option(help="Of the tiers.")] = "condense-tiny",
    server: Annotated[
        str | None, typer.Option(help="URL of a 'condense serve' that compresses.", show_default="an engine of its own")
    ] = None,
    tiers: TiersFile = None,
    victim: Annotated[
        str | None, typer.Option(help="Hotkey (ss58) of the miner that some rob; it lets them in.")
    ] = None,
    state: Annotated[Path, typer.Option(help="Folder for nonces.")] = Path("adversaries"),
    listed: Annotated[bool, typer.Option("--list", help="Say which kinds there are.")] = False,
) -> None:
    """Serve adversaries on free ports of this host, and announce them, until Ctrl-C or SIGTERM."""
    with extra_missing("neurons"):
        from condense_core.neurons.local.adversaries.kinds import ADVERSARIES
        from condense_core.neurons.tiers import DEFAULT_TIERS, read_tiers
    if listed:
        print("\n".join(f"{name:20} {kind.about}" for name, kind in ADVERSARIES.items()))
        return
    wanted = dict(part.partition("=")[::2] for part in kinds or ())
    if not wanted or not all(wanted.values()):
        raise ValueError(f"kinds: got {' '.join(kinds or ()) or 'none'}, expected KIND=HOTKEY, one or more")
    if unknown := [name for name in wanted if name not in ADVERSARIES]:
        raise ValueError(f"kinds: got {unknown[0]!r:.60}, expected one of {', '.join(ADVERSARIES)}")
    quiet_libraries()
    known = read_tiers(tiers or DEFAULT_TIERS)
    where = {"network": network, "netuid": given_netuid(netuid), "wallet": wallet, "folder": wallet_path}
    asyncio.run(_serve(wanted, known, where, model, server, victim, state.expanduser()))


async def _serve(
    wanted: dict[str, str],
    tiers: Any,
    where: dict[str, Any],
    model: str,
    server: str | None,
    victim: str | None,
    state: Path,
) -> None:
    from condense_core.compressor.condenser import Condenser
    from condense_core.decoder.embedded import EMBEDDED_NAME, embedded_model_path
    from condense_core.neurons.chain.opened import open_chain
    from condense_core.neurons.local.adversaries.kinds import create
    from condense_core.neurons.local.adversaries.means import Means
    from condense_core.neurons.mining.app import miner_limits
    from condense_core.neurons.mining.follower import Follower
    from condense_core.neurons.mining.gate import Gate
    from condense_core.neurons.mining.opened import BackendChoice
    from condense_core.neurons.protocol.nonces import SqliteNonceStore
    from condense_core.neurons.wallets import open_hotkey
    from condense_core.serving.http.server import Server, bound_socket

    source = embedded_model_path() if model == EMBEDDED_NAME else model
    condenser = Condenser.from_pretrained(source, method="select")
    good = BackendChoice(model=None if server else model, server=server).open(tiers)
    state.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        serving: list[Server] = []
        running: list[Any] = []
        for name, hotkey in wanted.items():
            key = open_hotkey(where["wallet"], hotkey, where["folder"])
            chain = open_chain(where["network"], where["netuid"], wallet=key, version_key=tiers.version)
            stack.push_async_callback(chain.close)
            nonces = SqliteNonceStore(state / f"{key.ss58_address}.db")
            stack.callback(nonces.close)
            robbed = _peer(await chain.metagraph(), victim)
            adversary, made = create(name, Means(key, tiers, good, condenser, Gate(), nonces, victim=robbed))
            stack.push_async_callback(adversary.stop)
            bound = bound_socket("127.0.0.1", 0)
            port = int(bound.getsockname()[1])
            follower = Follower(chain, adversary.gate, lambda port=port: ("127.0.0.1", port), every=_LOOK_SECONDS)
            await follower.start()
            await adversary.start()
            first = not serving  # which has the signals
            serving.append(Server(made, limits=miner_limits(tiers), stop_seconds=0.0, signals=first))
            running += [follower.run(), serving[-1].serve(sockets=[bound])]
            print(f"{name}: {key.ss58_address} at http://127.0.0.1:{port}", file=sys.stderr, flush=True)
        tasks = [asyncio.ensure_future(each) for each in running]
        await asyncio.wait({tasks[1]})  # the first server ends with a signal
        for each in serving:
            each.should_exit = True
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await good.stop()


def _peer(metagraph: Metagraph, victim: str | None) -> Peer | None:
    """The victim as the chain has it; ``ValueError`` where it has no address."""
    from condense_core.neurons.asking.client import Peer

    if victim is None:
        return None
    neuron = metagraph.by_hotkey.get(victim)
    if neuron is None or neuron.address is None:
        raise ValueError(f"victim: {victim:.60} has no address on the chain, expected a miner that has announced one")
    return Peer(victim, neuron.address, neuron.uid)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(app, argv, name="python -m condense_core.neurons.local.adversaries")


if __name__ == "__main__":
    sys.exit(main())
