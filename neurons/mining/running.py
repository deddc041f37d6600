"""A miner from its start to its end, in one event loop: chain, backend and server."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
from collections.abc import Callable
from typing import Any

from condense_core.neurons.chain.clock import ClockWatch
from condense_core.neurons.mining.app import Miner, create_miner_app, miner_limits
from condense_core.neurons.mining.follower import Follower
from condense_core.neurons.protocol.messages import Ask
from condense_core.serving.http.server import Server
from condense_core.serving.prometheus import PrometheusObserver
from condense_core.serving.service import SWITCH_SECONDS


async def serve(
    miner: Miner,
    follower: Follower,
    bound: socket.socket,
    *,
    observer: PrometheusObserver | None = None,
    stop_seconds: float = 30.0,
    started: Callable[[], None] | None = None,
) -> None:
    """Serve on ``bound`` until SIGINT or SIGTERM; what was accepted by then is finished.

    Raises:
        ChainFailure: there is no chain, or it does not know the hotkey. WrongClock: signatures would be refused.
        ValueError: no tier's model is served.
    """
    clock = ClockWatch(follower.chain)
    sys.setswitchinterval(SWITCH_SECONDS)
    app = create_miner_app(miner, observer=observer)
    server = Server(app, limits=miner_limits(miner.tiers), stop_seconds=stop_seconds, started=started)
    try:
        await follower.start()  # first: what the chain refuses shows before a model has been warmed up
        await clock.check()
        await miner.start()
        beside = asyncio.gather(follower.run(), clock.run())
        try:
            await server.serve(sockets=[bound])
        finally:
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)
    finally:
        await miner.backend.stop()
        await follower.chain.close()
        miner.nonces.close()


async def tried(miner: Miner, follower: Follower) -> dict[str, Any]:
    """What this miner would do: look at the chain, compress one text of each tier, and say how that went.

    Nothing is served or published. Errors as of ``serve``.
    """
    try:
        await follower.start()
        await ClockWatch(follower.chain).check()
        await miner.start()
        tiers = {}
        for name in miner.served:
            tier = miner.tiers.tiers[name]
            begun = asyncio.get_running_loop().time()
            ask = Ask(tier=name, text=tier.sample(), ratio=tier.min_ratio)
            soft = await miner.backend.compress(ask, priority=0, timeout=tier.timeout)
            seconds = asyncio.get_running_loop().time() - begun
            soft.check_finite()
            tiers[name] = {"soft_tokens": len(soft), "seconds": round(seconds, 3), "timeout": tier.timeout}
        metagraph = await follower.chain.metagraph()
        own = metagraph.by_hotkey.get(miner.hotkey.ss58_address)
        return {
            "hotkey": miner.hotkey.ss58_address,
            "netuid": metagraph.netuid,
            "uid": None if own is None else own.uid,
            "block": metagraph.block,
            "validators": len(metagraph.validators),
            "tiers": tiers,
        }
    finally:
        await miner.backend.stop()
        await follower.chain.close()
        miner.nonces.close()


def reached_at(ip: str | None, port: int, *, public: bool) -> tuple[str, int]:
    """Where others reach this machine: ``ip``, or the address from which it goes to the internet.

    Raises:
        ValueError: it is none, or ``public`` is wanted and nobody elsewhere can reach it.
    """
    if ip is None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # nothing is sent: only the route is looked up
                ip = str(probe.getsockname()[0])
            except OSError:
                ip = "127.0.0.1"
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        raise ValueError(f"external-ip: got {ip!r:.60}, expected an address such as 203.0.113.7") from None
    if public and not address.is_global:
        raise ValueError(f"external-ip: {ip} is not reached from elsewhere, expected --external-ip with one that is")
    return str(address), port
