"""The chain behind Bittensor's SDK: one client, used from one event loop.

A client is one connection. Threads that share it crash, and a new client for each transaction leaks, so ``SdkChain``
holds one, opens it again when it breaks, and refuses to be used from another event loop. What it signs, weights and an
address, the hotkey signs; the fee is the coldkey's owner's, whose key is not needed and never asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from condense_core.neurons.chain.base import Metagraph, Neuron, WeightsSet, checked_weights
from condense_core.neurons.chain.errors import (
    ChainFailure,
    ConnectionLost,
    InvalidRequest,
    NoChain,
    NoSubnet,
    NotRegistered,
    RateLimited,
    TemporaryRefusal,
    TooManyCommits,
    WrongVersion,
)
from condense_core.neurons.chain.refusals import failed, is_lost, refusal
from condense_core.neurons.extra import bittensor_module

T = TypeVar("T")


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a broken connection is opened again: twice as long each time, up to ``most`` seconds.

    The wait is a random share of that between a half and the whole, so that neurons which lost the same node do not
    come back in the same moment. After ``attempts`` attempts the caller is told.
    """

    attempts: int = 5
    first: float = 0.5
    most: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first < 0 or self.most < self.first:
            raise ValueError(f"{self}: expected attempts from 1, and seconds with 0 <= first <= most")

    def wait(self, failures: int, share: float) -> float:
        """Seconds to wait after ``failures`` failures in a row; ``share`` is a random number from 0 to 1."""
        return float(min(self.most, self.first * 2 ** min(failures - 1, 60)) * (0.5 + share / 2))


class SdkChain:
    """A subnet through the SDK's client.

    Args:
        network: ``finney``, ``test``, ``local`` or a ``ws://`` address.
        netuid: the subnet.
        wallet: what signs: a ``bittensor.Wallet`` of which only the hotkey is read, or the hotkey's key pair itself.
            None: the chain is only read. A hotkey under a password asks for it here, before anything runs.
        version_key: the version of this software that the subnet's ``weights_version`` is compared with.
        mechid: the mechanism whose weights are set. The metagraph's scores are those of mechanism 0.
        max_age: seconds for which a metagraph is good enough, unless a caller asks for less.
        read_timeout, write_timeout: seconds for one read, and for one transaction until it is in a block.
        substrate: what the SDK talks to instead of a node, such as ``substrate.MemorySubstrate``.
        clock, sleep, share: seconds since any moment, waiting, and a random number from 0 to 1.
    """

    def __init__(
        self,
        network: str,
        netuid: int,
        *,
        wallet: Any = None,
        version_key: int = 0,
        mechid: int = 0,
        max_age: float = 60.0,
        read_timeout: float = 60.0,
        write_timeout: float = 180.0,
        backoff: Backoff = Backoff(),
        substrate: Any = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        share: Callable[[], float] = random.random,
    ) -> None:
        if netuid < 0 or mechid < 0 or version_key < 0:
            raise ValueError(f"netuid {netuid}, mechid {mechid}, version_key {version_key}: expected none below 0")
        self.netuid, self.mechid, self.version_key = netuid, mechid, version_key
        self._signer = None if wallet is None else getattr(wallet, "hotkey", wallet)
        self.hotkey: str | None = None if self._signer is None else self._signer.ss58_address
        self.network, self._max_age, self._backoff = network, max_age, backoff
        self._read_timeout, self._write_timeout = read_timeout, write_timeout
        self._clock, self._sleep, self._share = clock, sleep, share
        self._client: Any = bittensor_module().Client(network, substrate=substrate)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening, self._fetching, self._writing = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._connection = 0  # number of the connection; even: none is open
        self._answered = self._closed = False
        self._kept: tuple[float, Metagraph] | None = None
        self._block_time: float | None = None

    # -- the connection ------------------------------------------------------------------------------------------------

    def _check_use(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError("the chain is used from a second event loop, expected the one of its first call")
        if self._closed:
            raise RuntimeError("the chain is closed, expected no call after close()")

    async def _opened(self) -> int:
        """The number of the open connection, which is opened if there is none."""
        async with self._opening:
            self._check_use()  # it may have been closed while this waited
            if self._connection % 2 == 0:
                try:
                    async with asyncio.timeout(self._read_timeout):
                        await self._client.connect()
                except BaseException:
                    await self._quietly_closed()  # half open, it would pass for open at the next attempt
                    raise
                self._connection += 1
                self._answered = True
        return self._connection

    async def _drop(self, number: int) -> None:
        """Close the connection ``number`` after it broke, unless another call has done so."""
        async with self._opening:
            if number == self._connection and number % 2:
                self._connection += 1
                await self._quietly_closed()

    async def _quietly_closed(self) -> None:
        # It may be broken, and how it breaks while it closes is nobody's business.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(self._read_timeout):
                await self._client.close()

    async def _try(self, doing: str, work: Callable[[Any], Awaitable[T]], timeout: float, attempts: int) -> T:
        """What ``work`` makes of the client; a broken connection is opened again up to ``attempts`` times.

        Raises:
            ChainFailure: of the kind that fits.
        """
        self._check_use()
        for failures in range(1, attempts + 1):
            number = 0
            try:
                number = await self._opened()
                async with asyncio.timeout(timeout):
                    return await work(self._client)
            except ChainFailure:
                raise
            except Exception as error:
                if self._closed or not (is_lost(error) or _is_refused_by_sdk(error)):
                    raise
                failure = refusal(error, doing)
                if not isinstance(failure, ConnectionLost):
                    raise failure from error
                await self._drop(number)
                wait = self._backoff.wait(failures, self._share())
                if failure.retry_after is not None:
                    wait = failure.retry_after
                if failures == attempts or wait > max(self._backoff.most, 1.0):
                    failure.retry_after = wait
                    if not self._answered:
                        text = f"no chain at {self.network!r} ({self._client.endpoint}): {error}"
                        raise NoChain(f"{text}; tried {failures} times") from error
                    raise failure from error
                await self._sleep(wait)
        raise AssertionError("attempts is at least 1")

    async def _read(self, doing: str, work: Callable[[Any], Awaitable[T]]) -> T:
        return await self._try(doing, work, self._read_timeout, self._backoff.attempts)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        async with self._opening:
            await self._quietly_closed()

    # -- reads ---------------------------------------------------------------------------------------------------------

    @property
    def age(self) -> float | None:
        """Seconds since the metagraph was fetched, None if it never was."""
        return None if self._kept is None else self._clock() - self._kept[0]

    async def metagraph(self, *, max_age: float | None = None) -> Metagraph:
        self._check_use()
        allowed = self._max_age if max_age is None else max_age
        asked = self._clock()
        async with self._fetching:
            # Who waited while another fetched has what it asked for, whatever its max_age.
            if self._kept is None or not (self._kept[0] >= asked or self._clock() - self._kept[0] <= allowed):
                started = self._clock()
                self._kept = started, await self._read(f"read subnet {self.netuid}", self._fetch)
            return self._kept[1]

    async def _fetch(self, client: Any) -> Metagraph:
        view = await client.at()
        graph, coming = await asyncio.gather(
            view.subnets.metagraph(self.netuid, commitments=False),
            view.epochs.next_epoch_start_block(self.netuid),
        )
        if graph is None:
            raise NoSubnet(f"netuid is {self.netuid}, expected a subnet of the chain {self.network!r}")
        neurons = tuple(_neuron(row) for row in graph.neurons)
        return Metagraph(self.netuid, graph.block, neurons, graph.tempo, graph.last_step, coming)

    async def block(self) -> int:
        return await self._read("read the block", lambda client: client.block())

    async def block_time(self) -> float:
        if self._block_time is None:
            self._block_time = float(await self._read("read the block time", lambda client: client.block_time()))
        return self._block_time

    async def timestamp(self) -> float:
        return float((await self._read("read the time", lambda client: client.timestamp())).timestamp())

    async def blocks_until_epoch(self) -> int | None:
        def ask(client: Any) -> Awaitable[int | None]:
            return client.epochs.blocks_until_next_epoch(self.netuid)

        return await self._read("read the epoch", ask)

    async def _setting(self, item: str, key: int | None = None) -> Any:
        """A storage item of the subnet."""
        params = [self.netuid if key is None else key]
        return await self._read(f"read {item}", lambda client: client.query(("SubtensorModule", item), params))

    async def _last_update(self) -> int:
        """The block at which this hotkey last set weights of the mechanism."""
        from bittensor.settings import GLOBAL_MAX_SUBNET_COUNT

        uid = (await self._own()).uid
        updates = await self._setting("LastUpdate", self.mechid * GLOBAL_MAX_SUBNET_COUNT + self.netuid)
        if not isinstance(updates, list | tuple) or uid >= len(updates):
            raise NoSubnet(f"mechid is {self.mechid}, expected a mechanism of subnet {self.netuid}")
        return int(updates[uid])

    async def _own(self) -> Neuron:
        neuron = (await self.metagraph(max_age=0)).by_hotkey.get(self.hotkey or "")
        if neuron is None:
            raise NotRegistered(f"the hotkey {self.hotkey} is not registered on subnet {self.netuid}")
        return neuron

    # -- writes --------------------------------------------------------------------------------------------------------

    def _check_signer(self) -> None:
        self._check_use()
        if self._signer is None:
            raise InvalidRequest("wallet is None, expected the hotkey's, as this is to be signed")

    async def _execute(self, doing: str, intent: Any) -> Any:
        """Send a transaction once; the caller decides what a broken connection means."""

        async def send(client: Any) -> Any:
            result = await client.execute(intent, self._signer, wait_for_finalization=False)
            if (error := failed(result)) is not None:
                raise error
            return result

        return await self._try(doing, send, self._write_timeout, 1)

    async def set_weights(
        self, weights: Mapping[int, float], *, hotkeys: Mapping[int, str] | None = None
    ) -> WeightsSet:
        self._check_signer()
        asked = checked_weights(weights)
        async with self._writing:
            dropped: dict[int, float] = {}
            if hotkeys is not None and asked:
                holders = {neuron.uid: neuron.hotkey for neuron in (await self.metagraph(max_age=0)).neurons}
                dropped = {uid: asked[uid] for uid in asked if holders.get(uid) != hotkeys.get(uid, "")}
                asked = checked_weights({uid: weight for uid, weight in asked.items() if uid not in dropped})
            if not asked:
                why = "every uid with a weight belongs to another hotkey by now" if dropped else "all weights are zero"
                return WeightsSet(False, dropped=dropped, reason=f"{why}, the row on the chain stays")
            await self._check_version()
            return await self._weights_sent(asked, dropped)

    async def _check_version(self) -> None:
        """The SDK's preflight does not look at the version, and a commit's would be refused at its revelation only."""
        expected = int(await self._setting("WeightsVersionKey") or 0)
        if self.version_key < expected:
            raise WrongVersion(
                f"version_key is {self.version_key}, expected {expected} or more, as subnet {self.netuid} asks for it; "
                "update this software",
                name="IncorrectWeightVersionKey",
            )

    async def _weights_sent(self, asked: dict[int, float], dropped: dict[int, float]) -> WeightsSet:
        doing = f"set weights of subnet {self.netuid}"
        intent = bittensor_module().SetWeights(
            netuid=self.netuid, weights=asked, mechid=self.mechid, version_key=self.version_key
        )
        before = await self._last_update()
        for failures in range(1, self._backoff.attempts + 1):
            try:
                result = await self._execute(doing, intent)
            except ConnectionLost as error:
                # The chain may have the row although its answer was lost. Its own record of the last row tells.
                await self._sleep(error.retry_after or 0.0)
                if (landed := await self._last_update()) > before:
                    return WeightsSet(True, asked, dropped, block=landed, reason="the chain's answer was lost")
                if failures == self._backoff.attempts:
                    raise
            except TemporaryRefusal as error:
                await self._say_when(error, before)
                raise
            else:
                block = int(result.extrinsic_id.partition("-")[0]) if result.extrinsic_id else None
                return WeightsSet(True, asked, dropped, block=block, reveal_round=result.data.get("reveal_round"))
        raise AssertionError("attempts is at least 1")

    async def _say_when(self, error: TemporaryRefusal, since: int) -> None:
        """Write into a refusal when to try again. Where the chain cannot be asked, that stays unknown."""
        try:
            if isinstance(error, RateLimited):
                limit = int(await self._setting("WeightsSetRateLimit") or 0)
                error.retry_blocks = max(1, since + limit - await self.block())
            elif isinstance(error, TooManyCommits):
                error.retry_blocks = await self.blocks_until_epoch()
            if error.retry_blocks is not None and error.retry_after is None:
                error.retry_after = error.retry_blocks * await self.block_time()
        except ChainFailure:
            pass

    async def announce(self, ip: str, port: int) -> bool:
        self._check_signer()
        try:
            address = ipaddress.ip_address(ip)
        except ValueError:
            raise InvalidRequest(f"ip is {ip!r}, expected an IPv4 or IPv6 address") from None
        if int(address) == 0 or isinstance(port, bool) or not 0 < port < 2**16:
            raise InvalidRequest(f"the address is {ip}, port {port}; expected one that others reach, port 1 to 65535")
        wanted = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
        intent = bittensor_module().ServeAxon(netuid=self.netuid, ip=str(address), port=port)
        async with self._writing:
            for failures in range(1, self._backoff.attempts + 1):
                if (await self._own()).address == wanted:
                    return failures > 1
                try:
                    await self._execute(f"announce {wanted} on subnet {self.netuid}", intent)
                except ConnectionLost as error:
                    if failures == self._backoff.attempts:
                        raise
                    await self._sleep(error.retry_after or 0.0)
                except RateLimited as error:
                    # The chain does not say when the last address was published: wait out the whole limit at most.
                    error.retry_blocks = max(1, int(await self._setting("ServingRateLimit") or 1))
                    error.retry_after = error.retry_blocks * await self.block_time()
                    raise
                else:
                    return True
        raise AssertionError("attempts is at least 1")


def _neuron(row: Any) -> Neuron:
    """A row of the SDK's metagraph."""
    return Neuron(
        uid=row.uid,
        hotkey=row.hotkey,
        coldkey=row.coldkey,
        address=row.axon,
        validator_permit=row.validator_permit,
        stake=float(row.total_stake.decimal),
        tao_stake=float(row.tao_stake.decimal),
        active=row.active,
        last_update=row.last_update,
        registered_at=row.block_at_registration,
        incentive=row.incentive,
        dividends=row.dividends,
        consensus=row.consensus,
    )


def _is_refused_by_sdk(error: Exception) -> bool:
    return isinstance(error, bittensor_module().BittensorError)
