"""What a miner takes beyond the compressing: `python -m bench.miner`.

    python -m bench.miner [--requests 300] [--seconds 10] [--out FOLDER]

A miner is started in a process of its own, on an in-memory chain, with a backend whose soft tokens are ready. This
process asks it over loopback as a validator does, and writes `miner.json`:

- answer: 256 x 4096 soft tokens in float16, 2 MiB, one request after another: milliseconds from signing the request
  until the answer's signature is verified, and of these the miner's own, as its log has them.
- requests: small answers, 16 requests at once; the miner on one core, this process on the others.
- verify: signed requests that the miner's check of signatures alone does in a second of one core's time.

Run it on a quiet machine of at least two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from bench.goal import Goal, sentence
from bench.run import machine
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.asking.client import NeuronClient, Peer
from condense_core.neurons.chain.memory import MemoryChain
from condense_core.neurons.chain.sdk import SdkChain
from condense_core.neurons.chain.substrate import LocalNode, MemorySubstrate
from condense_core.neurons.extra import bittensor_module
from condense_core.neurons.mining import running
from condense_core.neurons.mining.app import Miner
from condense_core.neurons.mining.follower import Follower
from condense_core.neurons.mining.gate import Gate, GateSettings
from condense_core.neurons.protocol.messages import COMPRESS, Ask
from condense_core.neurons.protocol.nonces import SqliteNonceStore
from condense_core.neurons.tiers import Tier, read_tiers
from condense_core.serving.http import logs
from condense_core.serving.http.server import bound_socket
from condense_core.serving.prometheus import PrometheusObserver

TIER = "research"
LARGE, SMALL = (256, 4096), (16, 256)
AT_ONCE = 16
TEXT = "The keeper of the north archive counts the lamps at dusk, and writes their number down. " * 25
_NETUID = 1
_START_SECONDS = 60.0
_WARM = 10  # requests before those that count

Record = dict[str, Any]


def keys() -> tuple[Any, Any]:
    """The hotkeys of the miner and of who asks it, the same in both processes."""
    made = bittensor_module("bittensor.sp_core").Keypair.create_from_uri
    return made("//miner"), made("//validator")


class Ready:
    """A backend that has its soft tokens already."""

    is_ready = is_healthy = True

    def __init__(self, rows: int, width: int) -> None:
        embeds = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(torch.float16)
        self.soft = SoftTokens(embeds, num_context_tokens=4 * rows, ratio=4, model_id="a/model")

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def serves(self, tier: Tier) -> bool:
        return True

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        return self.soft


def made(folder: Path, shape: tuple[int, int]) -> Miner:
    """A miner whose quotas nobody reaches."""
    gate = Gate(GateSettings(requests_per_minute=1e9))
    return Miner(keys()[0], read_tiers(), Ready(*shape), gate, SqliteNonceStore(folder / "nonces.db"))


def serve(folder: Path, shape: tuple[int, int], core: int | None) -> None:
    """The miner's process, until it is told to end; core: the only one that it may use."""
    if core is not None:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
    own, other = keys()
    chain = MemoryChain.running(0.5)
    chain.create_subnet(_NETUID)
    chain.register(_NETUID, other.ss58_address, stake=5000, permit=True)
    chain.register(_NETUID, own.ss58_address)
    seen = SdkChain("local", _NETUID, wallet=own, substrate=MemorySubstrate(LocalNode(chain)))
    miner, bound = made(folder, shape), bound_socket("127.0.0.1", 0)

    def started() -> None:
        (folder / "port").write_text(str(bound.getsockname()[1]))

    logs.configure()
    observer = PrometheusObserver(torch.device("cpu"))
    asyncio.run(running.serve(miner, Follower(seen, miner.gate, None), bound, observer=observer, started=started))


@contextmanager
def miner(shape: tuple[int, int], core: int | None = None) -> Iterator[tuple[Peer, Path]]:
    """A miner in a process of its own, and the file of its log.

    Raises:
        RuntimeError: it did not start.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, port = folder / "log", folder / "port"
        command = [sys.executable, "-m", "bench.miner", "--serve", name, "--shape", *map(str, shape)]
        with log.open("w") as file:
            process = subprocess.Popen([*command, *([] if core is None else ["--core", str(core)])], stderr=file)
        try:
            until = time.monotonic() + _START_SECONDS
            while not (port.exists() and port.read_text()):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the miner did not start: {log.read_text()[-1000:]}")
                time.sleep(0.1)
            yield Peer(keys()[0].ss58_address, f"127.0.0.1:{port.read_text()}"), log
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def asked(client: NeuronClient, peer: Peer) -> float:
    """Seconds until an answer is there and verified."""
    started = time.perf_counter()
    reply = await client.ask(peer, Ask(tier=TIER, text=TEXT, ratio=4.0), timeout=30.0, max_bytes=2**23)
    if not reply.is_answer:
        raise RuntimeError(f"no answer: {reply.why}")
    return time.perf_counter() - started


def answer(requests: int) -> Record:
    """Milliseconds of a large answer."""

    async def use(peer: Peer) -> tuple[list[float], float]:
        async with NeuronClient(keys()[1], private=True) as client:
            for _ in range(_WARM):
                await asked(client, peer)
            spent = time.process_time()
            took = [await asked(client, peer) for _ in range(requests)]
            return took, time.process_time() - spent

    with miner(LARGE) as (peer, log):
        seconds, spent = asyncio.run(use(peer))
        took = sorted(1e3 * each for each in seconds)
        own = sorted(list(map(float, re.findall(r'"milliseconds": ([\d.]+)', log.read_text())))[_WARM:])
    found: Record = {
        "bytes": 2 * LARGE[0] * LARGE[1],
        "requests": requests,
        "ms": {"p50": statistics.median(took), "p99": took[min(int(0.99 * requests), requests - 1)]},
        "miner_ms": {"p50": statistics.median(own)},
        "client_cpu_ms": 1e3 * spent / requests,
    }
    return {**found, "goals": [Goal("ms", 12.0, "until 2 MiB are verified, at the median").judge(found["ms"]["p50"])]}


def requests(seconds: float) -> Record:
    """Small answers a second of a miner on one core."""
    cores = sorted(os.sched_getaffinity(0))
    mine, rest = cores[0], set(cores[1:]) or set(cores)

    async def use(peer: Peer) -> tuple[int, float]:
        count, until = [0], time.monotonic() + seconds

        async def ask_on(client: NeuronClient) -> None:
            while time.monotonic() < until:
                await asked(client, peer)
                count[0] += 1

        async with NeuronClient(keys()[1], private=True) as client:
            for _ in range(_WARM):
                await asked(client, peer)
            started = time.monotonic()
            until = started + seconds
            await asyncio.gather(*(ask_on(client) for _ in range(AT_ONCE)))
            return count[0], time.monotonic() - started

    with miner(SMALL, mine) as (peer, _):
        os.sched_setaffinity(0, rest)
        try:
            count, took = asyncio.run(use(peer))
        finally:
            os.sched_setaffinity(0, cores)
    rate = count / took
    found = {"at_once": AT_ONCE, "cores_of_client": len(rest), "shared_core": mine in rest, "per_second": rate}
    return {**found, "goals": [Goal("rate", 200, "signed requests answered on one core").judge(rate)]}


def verify(seconds: float) -> Record:
    """Requests a second of one core's time that are verified, nonces on disk included."""
    own, other = keys()
    http_auth = bittensor_module("bittensor.http_auth")
    body, count, spent = Ask(tier=TIER, text=TEXT, ratio=4.0).to_bytes(), 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        one = made(Path(name), SMALL)
        while spent < seconds:
            fields = {"method": "POST", "path": COMPRESS, "body": body, "receiver_ss58": own.ss58_address}
            signed = [http_auth.sign(other, **fields) for _ in range(100)]
            started = time.process_time()
            for headers in signed:
                one.caller(headers, body, "POST", COMPRESS)
            spent += time.process_time() - started
            count += len(signed)
        one.nonces.close()
    return {"per_second": count / spent, "goals": [Goal("rate", 200, "requests verified").judge(count / spent)]}


def table(results: Path) -> str:
    """The record in Markdown; a sentence where there is none."""
    path = results / "miner.json"
    if not path.exists():
        return "No record is here yet: `python -m bench.miner` makes one."
    found = json.loads(path.read_text())
    facts, large, small = found["machine"], found["answer"], found["requests"]
    rows = [
        ("an answer of 2 MiB, from signing the request until it is verified, ms", large["ms"], large["goals"]),
        ("of it in the miner, ms", large["miner_ms"], []),
        (
            f"small answers a second, the miner on one core, {small['at_once']} at once",
            {"p50": small["per_second"]},
            small["goals"],
        ),
        (
            "requests verified in a second of one core's time",
            {"p50": found["verify"]["per_second"]},
            found["verify"]["goals"],
        ),
    ]
    lines = [f"{facts['device']}; {facts['date'][:10]}; `bench/results/miner.json`.\n"]
    lines += ["| what | median | 99% | goal |", "|---|---|---|---|"]
    for what, figures, goals in rows:
        cells = [f"{figures[name]:,.1f}" if name in figures else "" for name in ("p50", "p99")]
        lines.append(f"| {what} | {' | '.join(cells)} | {'; '.join(map(sentence, goals))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.miner", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=300, help="for large answers (default: 300)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the load of small ones (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the record")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # the miner's own process
    parser.add_argument("--shape", nargs=2, type=int, default=LARGE, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve is not None:
        with suppress(KeyboardInterrupt):
            serve(options.serve, tuple(options.shape), options.core)
        return 0
    if options.requests < 1 or not 0 < options.seconds <= 600:
        parser.error("--requests, --seconds: expected at least 1, and seconds above 0 and at most 600")
    options.out.mkdir(parents=True, exist_ok=True)
    found: Record = {"machine": machine(torch.device("cpu"))}
    measures: dict[str, Callable[[], Record]] = {
        "answer": lambda: answer(options.requests),
        "requests": lambda: requests(options.seconds),
        "verify": lambda: verify(options.seconds / 5),
    }
    for name, measure in measures.items():
        found[name] = measure()
        print("\n".join(map(sentence, found[name]["goals"])), flush=True)
    (options.out / "miner.json").write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(goal["met"] for name in measures for goal in found[name]["goals"]))


if __name__ == "__main__":
    sys.exit(main())
