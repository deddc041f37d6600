"""Several processes share one chain in memory, each through its own client of the SDK."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")

from condense_core.neurons.chain import errors, server
from condense_core.neurons.chain.memory import MemoryChain, Refused
from condense_core.neurons.chain.sdk import Backoff, SdkChain
from condense_core.neurons.chain.server import ChainServer, RemoteNode, token_path
from condense_core.neurons.chain.substrate import MemorySubstrate, NodeLost
from condense_testing.chains import NETUID, World, key

QUICK = Backoff(attempts=3, first=0.01, most=0.02)


@contextlib.asynccontextmanager
async def served(chain: MemoryChain, folder: Path) -> AsyncIterator[Path]:
    socket = folder / "chain"
    running = ChainServer(chain, socket)
    await running.start()
    try:
        yield socket
    finally:
        await running.close()


NEURON = """
import asyncio, sys
from pathlib import Path
from bittensor.sp_core import Keypair
from condense_core.neurons.chain.sdk import SdkChain
from condense_core.neurons.chain.server import RemoteNode
from condense_core.neurons.chain.substrate import MemorySubstrate

async def main(socket, netuid, name, work):
    substrate = MemorySubstrate(RemoteNode(Path(socket)))
    chain = SdkChain("local", int(netuid), wallet=Keypair.create_from_uri("//" + name), substrate=substrate)
    print(await eval(work))
    await chain.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def neuron(socket: Path, name: str, work: str) -> str:
    """What ``work`` prints in a process of its own, in which ``chain`` is the chain of the neuron ``name``."""
    arguments = (sys.executable, "-c", NEURON, str(socket), str(NETUID), name, work)
    started = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = await asyncio.wait_for(started.communicate(), 60)
    assert started.returncode == 0, err.decode()
    return out.decode().strip()


def test_neurons_of_two_processes_share_a_chain(tmp_path: Path) -> None:
    world = World()

    async def run() -> None:
        async with served(world.chain, tmp_path) as socket:
            assert await neuron(socket, "miner1", "chain.announce('203.0.113.7', 8091)") == "True"
            assert "address='203.0.113.7:8091'" in await neuron(socket, "validator", "chain.metagraph()")
            assert "sent=True" in await neuron(socket, "validator", "chain.set_weights({1: 1.0})")

    asyncio.run(run())
    assert world.net.weights == {(0, 0): {1: 65535}}


def test_an_operator_lets_blocks_pass_and_gives_uids(tmp_path: Path) -> None:
    world = World()

    async def run() -> None:
        async with served(world.chain, tmp_path) as socket:
            operator = RemoteNode(socket)
            assert await operator.control("register", netuid=NETUID, hotkey=key("late").ss58_address, stake=2.0) == 4
            assert await operator.control("advance", blocks=9) == 110
            with pytest.raises(Refused, match="HotKeyAlreadyRegisteredInSubNet"):
                await operator.control("register", netuid=NETUID, hotkey=key("late").ss58_address)
            with pytest.raises(Refused, match="not a request: KeyError"):
                await operator.control("shut_down")
            chain = SdkChain("local", NETUID, substrate=MemorySubstrate(RemoteNode(socket)))
            graph = await chain.metagraph()
            assert (graph.block, graph.neurons[4].stake) == (110, 2.0)
            await chain.close()
            await operator.close()

    asyncio.run(run())


def test_a_call_needs_the_signature_of_its_hotkey(tmp_path: Path) -> None:
    """Whoever has the token can speak to the chain, but not in the name of another hotkey, and not twice."""
    world = World()
    recorded: list[dict[str, object]] = []

    async def run() -> None:
        async with served(world.chain, tmp_path) as socket:
            node = RemoteNode(socket)
            real = node.request

            async def recording(method: str, params: dict[str, object]) -> object:
                recorded.extend([params] if method == "submit" else [])
                return await real(method, params)

            node.request = recording  # type: ignore[method-assign]
            await SdkChain("local", NETUID, wallet=key("miner1"), substrate=MemorySubstrate(node)).announce(
                "10.0.0.1", 1
            )
            with pytest.raises(Refused, match="Stale"):
                await real("submit", recorded[0])
            for change in ({"signer": key("miner2").ss58_address}, {"nonce": 1}, {"signature": "00" * 64}):
                with pytest.raises(Refused, match="BadProof"):
                    await real("submit", {**recorded[0], **change})
            await node.close()

    asyncio.run(run())
    assert world.net.neurons[2].axon == {}


def test_without_the_token_nothing_is_answered(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(World().chain, tmp_path) as socket:
            assert token_path(socket).stat().st_mode & 0o777 == 0o600
            assert socket.stat().st_mode & 0o777 == 0o600
            reader, writer = await asyncio.open_unix_connection(str(socket))
            writer.write(b"guess\n" + json.dumps({"method": "block", "params": {}}).encode() + b"\n")
            assert json.loads(await reader.readline()) == {"refused": "the token is wrong"}
            assert await reader.readline() == b""
            writer.close()

    asyncio.run(run())


def test_a_token_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(World().chain, tmp_path) as socket:
            token_path(socket).chmod(0o644)
            await RemoteNode(socket).connect()

    with pytest.raises(NodeLost, match="mode 0644, expected 0600"):
        asyncio.run(run())


def test_a_message_beyond_the_bound_ends_the_connection_and_not_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MOST_BYTES", 4096)

    async def run() -> None:
        async with served(World().chain, tmp_path) as socket:
            reader, writer = await asyncio.open_unix_connection(str(socket))
            writer.write(token_path(socket).read_bytes() + b"\n")
            assert json.loads(await reader.readline()) == {"result": "welcome"}
            writer.write(b"x" * 10000 + b"\n")
            with contextlib.suppress(ConnectionError):
                assert await reader.readline() == b""
            writer.close()
            node = RemoteNode(socket)
            await node.connect()
            assert await node.request("block", {}) == 101
            with pytest.raises(ValueError, match="expected at most 4096"):
                await node.request("block", {"padding": "x" * 5000})
            await node.close()

    asyncio.run(run())


@pytest.mark.parametrize("line", [b"[]\n", b'{"method": "block"}\n', b'{"method": "no", "params": {}}\n', b"7\n"])
def test_what_is_no_request_is_refused_and_the_connection_goes_on(tmp_path: Path, line: bytes) -> None:
    async def run() -> None:
        async with served(World().chain, tmp_path) as socket:
            reader, writer = await asyncio.open_unix_connection(str(socket))
            writer.write(token_path(socket).read_bytes() + b"\n" + line + b'{"method":"block","params":{}}\n')
            answers = [json.loads(await reader.readline()) for _ in range(3)]
            assert list(answers[1]) == ["refused"]
            assert answers[2] == {"result": 101}
            writer.close()

    asyncio.run(run())


def test_a_chain_that_was_started_again_is_found_again(tmp_path: Path) -> None:
    """The token is another one then, and is read again."""
    world = World()

    async def run() -> None:
        chain = SdkChain("local", NETUID, substrate=MemorySubstrate(RemoteNode(tmp_path / "chain")), backoff=QUICK)
        with pytest.raises(errors.NoChain, match="no chain at"):
            await chain.block()
        async with served(world.chain, tmp_path):
            assert await chain.block() == 101
        with pytest.raises(errors.ConnectionLost):
            await chain.block()
        async with served(world.chain, tmp_path):
            assert await chain.block() == 101
            await chain.close()

    asyncio.run(run())


def test_a_cancelled_request_does_not_leave_its_answer_to_the_next(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(World().chain, tmp_path) as socket:
            node = RemoteNode(socket)
            await node.connect()
            asked = asyncio.create_task(node.request("nonce", {"address": "nobody"}))
            await asyncio.sleep(0)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            await node.connect()
            assert await node.request("block", {}) == 101
            await node.close()

    asyncio.run(run())


def test_a_second_chain_at_the_same_socket_is_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(World().chain, tmp_path) as socket:
            with pytest.raises(FileExistsError, match="in use"):
                await ChainServer(World().chain, socket).start()
            node = RemoteNode(socket)
            await node.connect()  # the first one goes on, with its token
            await node.close()

    asyncio.run(run())


def test_a_message_within_the_bound_is_answered(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(World().chain, tmp_path) as socket:
            node = RemoteNode(socket)
            await node.connect()
            assert await node.request("block", {"padding": "x" * (server.MOST_BYTES - 1000)}) == 101
            await node.close()

    asyncio.run(run())


def test_a_wrong_token_is_final_and_the_right_one_is_tried_the_next_time(tmp_path: Path) -> None:
    async def run() -> None:
        async with served(World().chain, tmp_path) as socket:
            token = token_path(socket).read_text()
            token_path(socket).write_text("guess")
            chain = SdkChain(
                "local", NETUID, substrate=MemorySubstrate(RemoteNode(socket)), backoff=Backoff(attempts=1)
            )
            with pytest.raises(errors.OtherRefusal, match="the token is wrong"):
                await chain.block()
            token_path(socket).write_text(token)
            assert await chain.block() == 101
            await chain.close()

    asyncio.run(run())


def test_a_chain_process_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    socket = tmp_path / "chain"

    async def run() -> int:
        arguments = [str(socket), "--netuid", "3", "--block-time", "0.05", "--setting", "tempo=10"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "condense_core.neurons.chain", *arguments, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert b"subnet 3" in await asyncio.wait_for(process.stdout.readline(), 60)
        chain = SdkChain("local", 3, substrate=MemorySubstrate(RemoteNode(socket)))
        first = await chain.metagraph()
        assert first.tempo == 10
        while await chain.block() < first.block + 2:
            await asyncio.sleep(0.05)
        await chain.close()
        process.terminate()
        return await asyncio.wait_for(process.wait(), 60)

    assert asyncio.run(run()) == 0
    assert list(tmp_path.glob("chain*")) == []


@pytest.mark.parametrize("setting", ["tempo", "tempo=soon", "nothing=1", "netuid=2"])
def test_a_setting_that_is_none_ends_the_chain_process_with_code_2(tmp_path: Path, setting: str) -> None:
    arguments = [sys.executable, "-m", "condense_core.neurons.chain", str(tmp_path / "chain"), "--setting", setting]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"--setting is {setting!r}, expected" in done.stderr


def test_a_socket_that_a_dead_process_left_is_replaced(tmp_path: Path) -> None:
    import socket as sockets

    with sockets.socket(sockets.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "chain"))

    async def run() -> None:
        async with served(World().chain, tmp_path) as socket:
            node = RemoteNode(socket)
            await node.connect()
            assert await node.request("block", {}) == 101
            await node.close()

    asyncio.run(run())
