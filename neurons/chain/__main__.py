"""``python -m condense_core.neurons.chain SOCKET``: one process with a chain in memory for all neurons of the host."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from dataclasses import fields
from pathlib import Path

from condense_core.neurons.chain.memory import MemoryChain, Subnet
from condense_core.neurons.chain.server import ChainServer

STATE = {"netuid", "registered_at", "neurons", "weights", "commits", "last_epoch", "epoch_index"}
SETTINGS = {field.name: field.default for field in fields(Subnet) if field.name not in STATE}


def setting(text: str) -> tuple[str, object]:
    """A name of ``SETTINGS`` and a value of its default's type, from ``name=value``."""
    name, _, value = text.partition("=")
    default = SETTINGS.get(name)
    try:
        if isinstance(default, bool):
            return name, {"true": True, "false": False}[value.lower()]
        if isinstance(default, int):
            return name, int(value)
        if isinstance(default, str) and value:
            return name, value
    except (KeyError, ValueError):
        pass
    names = ", ".join(sorted(SETTINGS))
    raise ValueError(f"--setting is {text!r}, expected name=value with a value of its type and a name of {names}")


async def serve(socket: Path, netuid: int, block_time: float, settings: dict[str, object]) -> None:
    """Serve a new chain with one subnet until the process is told to stop."""
    chain = MemoryChain.running(block_time)
    chain.create_subnet(netuid, **settings)
    server, stop = ChainServer(chain, socket), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start()
    try:
        print(f"a chain with subnet {netuid} listens at {socket}, a block takes {block_time} s", flush=True)
        await stop.wait()
    finally:
        await server.close()


def main() -> int:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m condense_core.neurons.chain", description=__doc__)
    parser.add_argument("socket", type=Path, help="where to listen; the token is written beside it")
    parser.add_argument("--netuid", type=int, default=1, help="the subnet that exists from the start")
    parser.add_argument("--block-time", type=float, default=12.0, help="seconds of a block")
    parser.add_argument("--setting", action="append", default=[], help="of the subnet: name=value, may be repeated")
    given = parser.parse_args()
    try:
        asyncio.run(serve(given.socket, given.netuid, given.block_time, dict(map(setting, given.setting))))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
