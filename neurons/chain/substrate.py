"""The in-memory chain beneath the SDK's own client: ``bittensor.Client("local", substrate=MemorySubstrate(node))``.

The SDK talks to a chain through one interface, its ``Substrate``. ``MemorySubstrate`` plays it over a ``Node``, which
takes small requests and answers in values that JSON can hold: ``LocalNode`` is the chain of this process, and
``server.RemoteNode`` one of another process. A neuron therefore runs the same code of the SDK, with its preflight, its
rounding of weights and its signatures, over the public chain and over this one; only what lies below differs.

A call is signed by the hotkey's own key over the call and its nonce, and the node checks that signature.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from condense_core.neurons.chain import calls, reads
from condense_core.neurons.chain.memory import MemoryChain, Refused

POLL = 0.05
"""Seconds between two looks for a new block."""


class NodeLost(Exception):
    """The node did not answer."""


class Node(Protocol):
    """Where the chain is."""

    async def request(self, method: str, params: dict[str, Any]) -> Any:
        """The answer in values of JSON.

        Raises:
            NodeLost: the connection broke.
            Refused: the chain refused, with its name of the error.
        """

    async def connect(self) -> None: ...

    async def close(self) -> None: ...


def payload(call: dict[str, Any], nonce: int) -> bytes:
    """The bytes that a hotkey signs: the call and its nonce."""
    return json.dumps(["condense-memory-chain", call, nonce], sort_keys=True, separators=(",", ":")).encode()


def answer(chain: MemoryChain, method: str, params: dict[str, Any], verify: Callable[[str, bytes, bytes], bool]) -> Any:
    """What ``chain`` answers to a request; ``verify(address, payload, signature)`` judges signatures.

    Raises:
        Refused: the chain refused, with its name of the error.
    """
    if method == "block":
        return chain.block
    if method == "submit":
        signer, call, nonce = str(params["signer"]), params["call"], int(params["nonce"])
        if not verify(signer, payload(call, nonce), bytes.fromhex(params["signature"])):
            raise Refused("BadProof")
        expected = chain.nonces.get(signer, 0)
        if nonce != expected:
            raise Refused("Stale" if nonce < expected else "Future")
        chain.nonces[signer] = nonce + 1
        return calls.dispatch(chain, signer, call["module"], call["function"], call["params"])
    if method == "nonce":
        return chain.nonces.get(str(params["address"]), 0)
    read = {"query": reads.query, "query_map": reads.query_map, "runtime": reads.runtime}.get(method)
    if read is not None:
        return read(chain, params["module"], params["name"], list(params["params"]))
    if method == "constant":
        return reads.constant(chain, params["module"], params["name"])
    raise Refused(f"the in-memory chain does not know the method {method!r}")


def verify(address: str, signed: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is that of the hotkey ``address`` over ``signed``."""
    from bittensor.sp_core import Keypair

    try:
        return bool(Keypair(ss58_address=address).verify(signed, signature))
    except (ValueError, TypeError):
        return False


class LocalNode:
    """The chain of this process, with failures on demand.

    A connection that ``drop`` broke stays broken until it is opened again; ``delay`` is the seconds of a request.
    """

    def __init__(self, chain: MemoryChain) -> None:
        self.chain = chain
        self.delay = 0.0
        self.requests: list[str] = []
        self._drops: list[tuple[str | None, bool]] = []
        self._up = False

    def drop(self, requests: int = 1, *, method: str | None = None, after: bool = False) -> None:
        """Lose the connection at the next ``requests`` requests (of ``method``).

        With ``after`` the chain carries the request out first, and only its answer is lost.
        """
        self._drops += [(method, after)] * requests

    async def request(self, method: str, params: dict[str, Any]) -> Any:
        self.requests.append(method)
        await asyncio.sleep(self.delay)
        if not self._up:
            raise NodeLost("the connection is closed")
        lost = next((drop for drop in self._drops if drop[0] in (None, method)), None)
        if lost is not None:
            self._drops.remove(lost)
        if lost is None or lost[1]:
            # Through JSON, as between processes: what only one process could answer is seen here.
            given = json.loads(json.dumps(answer(self.chain, method, json.loads(json.dumps(params)), verify)))
        if lost is not None:
            self._up = False
            raise NodeLost("the connection was dropped")
        return given

    async def connect(self) -> None:
        self._up = True
        await self.request("block", {})

    async def close(self) -> None:
        self._up = False


class MemorySubstrate:
    """The SDK's ``Substrate`` over a node, as far as neurons need it.

    Fees are zero. Blocks have no contents: their hash is their number.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.token_symbols: dict[int, str] = {}
        self._open = False
        self._block_time: float | None = None

    def balance(self, rao: int, netuid: int = 0) -> Any:
        from bittensor import Balance

        return Balance(int(rao), netuid, self.token_symbols.get(netuid))

    async def connect(self) -> None:
        if not self._open:
            await self._translated(self.node.connect())
            self._open = True

    async def close(self) -> None:
        self._open = False
        await self.node.close()

    async def _translated(self, asked: Any) -> Any:
        """The answer, with failures as the SDK's own backend raises them."""
        from bittensor.result import ChainError, RpcConnectionError

        try:
            return await asked
        except NodeLost as error:
            raise RpcConnectionError(str(error)) from error
        except Refused as error:
            raise ChainError(str(error)) from error

    async def _ask(self, method: str, **params: Any) -> Any:
        if not self._open:
            from bittensor.result import ConnectionNotReady

            raise ConnectionNotReady("Client connection is not open.")
        return await self._translated(self.node.request(method, params))

    # -- reads ---------------------------------------------------------------------------------------------------------

    async def block_hash(self, block: int | None = None) -> str:
        return f"0x{await self.block_number() if block is None else block:064x}"

    async def block_number(self) -> int:
        return int(await self._ask("block"))

    async def finalized_block_number(self) -> int:
        return await self.block_number()

    async def block_time(self) -> float:
        if self._block_time is None:
            self._block_time = int(await self.constant("Aura", "SlotDuration")) / 1000
        return self._block_time

    async def spec_version(self) -> int:
        return 0

    async def query(
        self, module: str, storage_function: str, params: list[Any] | None = None, block_hash: str | None = None
    ) -> Any:
        return await self._ask("query", module=module, name=storage_function, params=params or [])

    async def query_map(
        self, module: str, storage_function: str, params: list[Any] | None = None, block_hash: str | None = None
    ) -> list[tuple[Any, Any]]:
        rows = await self._ask("query_map", module=module, name=storage_function, params=params or [])
        return [(key, value) for key, value in rows]

    async def query_batch(
        self, module: str, storage_function: str, param_sets: list[list[Any]], block_hash: str | None = None
    ) -> list[Any]:
        return [await self.query(module, storage_function, params) for params in param_sets]

    async def runtime_call(self, api: str, method: str, params: list[Any], block_hash: str | None = None) -> Any:
        return await self._ask("runtime", module=api, name=method, params=params)

    async def constant(self, module: str, name: str) -> Any:
        return await self._ask("constant", module=module, name=name)

    async def blocks(self, *, finalized: bool = False) -> AsyncIterator[dict[str, Any]]:
        seen = await self.block_number()
        while True:
            newest = await self.block_number()
            for number in range(seen + 1, newest + 1):
                yield {"header": {"number": number, "parentHash": f"0x{number - 1:064x}"}}
            seen = newest
            await asyncio.sleep(POLL)

    async def events(self, block_hash: str | None = None) -> list[dict[str, Any]]:
        return []

    async def account_next_index(self, address: str) -> int:
        return int(await self._ask("nonce", address=address))

    # -- writes --------------------------------------------------------------------------------------------------------

    async def compose(self, call: Any) -> Any:
        return call

    async def estimate_fee(self, call: Any, keypair: Any) -> Any:
        return self.balance(0)

    async def submit(
        self,
        call: Any,
        keypair: Any,
        *,
        nonce: int | None = None,
        period: int | None = None,
        wait_for_inclusion: bool = True,
        wait_for_finalization: bool = True,
    ) -> Any:
        """Sign and send. A refusal of the chain is a result without success, as it is of the SDK's own backend."""
        from bittensor.result import ChainError, ExtrinsicResult, RpcConnectionError

        module, function, params = call
        plain = {name: f"0x{v.hex()}" if isinstance(v, bytes | bytearray) else v for name, v in params.items()}
        sent = {"module": module, "function": function, "params": plain}
        address = keypair.ss58_address
        if nonce is None:
            nonce = await self.account_next_index(address)
        signature = keypair.sign(payload(sent, nonce)).hex()
        request = {"signer": address, "call": sent, "nonce": nonce, "signature": signature}
        try:
            block = await self.node.request("submit", request)
        except NodeLost as error:
            raise RpcConnectionError(str(error)) from error
        except Refused as error:
            name = str(error)
            return ExtrinsicResult(success=False, message=name, error=ChainError(name, name))
        mined = {"block_hash": f"0x{block:064x}", "extrinsic_id": f"{block}-0001"}
        return ExtrinsicResult(success=True, message="Success", fee=self.balance(0), **mined)
