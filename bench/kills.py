"""Replicas that are killed at random under load: each request must end in its answer or in one clear error.

    python -m bench.kills [--requests 10000] [--replicas 2] [--mean-seconds 20] [--clients 8] [--out FOLDER]

It starts ``condense serve --engine ray`` with the embedded model, sends requests over HTTP (one text, a list of texts,
a pruned cache), and kills a replica, drawn at random, in intervals that are exponentially distributed. Answers are
compared, byte for byte, with those of an engine of this process. It writes ``kills-<processor>.json`` with the number
of requests by what they ended in, and fails where one ended in nothing, in a wrong answer, or in two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from bench.run import machine, stem
from condense_core.profiling.processor import processor
from condense_core.serving.engine import CompressionEngine
from condense_core.serving.errors import ERRORS
from condense_core.serving.requests import CompressRequest, PruneRequest
from condense_core.serving.service import LocalService
from condense_core.serving.spec import EngineSpec
from condense_core.serving.wire import END, FRAME, FRAMES, OCTETS

CHECKOUT = Path(__file__).resolve().parents[1]
WAYS = ("one", "one", "one", "list", "prune")
"""Kinds of requests, in their shares."""
LIST, TEXTS = 4, 12
START_SECONDS, RECOVER_SECONDS, END_SECONDS = 600.0, 300.0, 60.0
TIMEOUT = 60.0  # of a request; a client waits somewhat longer for its end
BAD = ("unanswered", "wrong", "twice")
"""What a request must not end in. ``cut_off``, a stream that ends before its announced length, is an error."""


# -- the server --------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """``condense serve``, its URL, the cluster's address, and the file that has its log."""

    process: subprocess.Popen[bytes]
    url: str
    address: str
    log: Path

    def stop(self) -> list[int]:
        """End it with SIGTERM; what is left of its processes after a while."""
        started = {pid: birth(pid) for pid in [self.process.pid, *descendants(self.process.pid)]}
        self.process.terminate()
        self.process.wait(END_SECONDS)
        ends = time.monotonic() + END_SECONDS
        while left := [pid for pid, born in started.items() if born is not None and birth(pid) == born]:
            if time.monotonic() > ends:
                break
            time.sleep(0.2)
        return left


@contextmanager
def serving(*options: str, log: Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server with ``options``, once it accepts requests; ``RuntimeError`` with its last words where it does not."""
    code = "import sys; from condense_core.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "--engine", "ray", "--port", "0", *options]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=CHECKOUT, stderr=stream, env={**os.environ, **(environment or {})})
    try:
        ends = time.monotonic() + START_SECONDS
        while not (found := re.search(r"Ray at (\S+): .*; (https?://\S+)", log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.1)
        yield Server(process, found[2], found[1], log)
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()
        process.wait()


def birth(pid: int) -> str | None:
    """When a process started, in the kernel's clock; None where there is none, or only its exit status is left."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        added = children.get(todo.pop(), [])
        found += added
        todo += added
    return found


# -- requests ----------------------------------------------------------------------------------------------------------


def texts(count: int = TEXTS) -> list[str]:
    """Texts of different lengths."""
    line = "The keeper of the north archive counts {} lamps at dusk, and writes their number down. "
    return ["".join(line.format(10 * i + k) for k in range(1 + 2 * i)) for i in range(count)]


async def expected(given: Sequence[str]) -> dict[tuple[str, str], bytes]:
    """What the library answers, by the kind of request and the text."""
    service = LocalService(CompressionEngine(EngineSpec(threads=1).load()))
    await service.start()
    found: dict[tuple[str, str], bytes] = {}
    for text in given:
        found["one", text] = (await service.compress(CompressRequest(text=text))).payload
        stream = await service.prune(PruneRequest(text=text))
        found["prune", text] = b"".join([bytes(chunk) async for chunk in stream.chunks])
    await service.stop(10.0)
    return found


@dataclass
class Load:
    """Requests for a server, and what became of them.

    Attributes:
        answers: of the library, as ``expected`` gives them.
        ended: number of requests, by their kind and what they ended in. seconds: of those that were answered.
    """

    client: httpx.AsyncClient
    answers: dict[tuple[str, str], bytes]
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    async def ask(self, number: int) -> str:
        """Send the request of this number; what it ended in: ``ok``, a code of an error, or one of ``BAD``."""
        draw = random.Random(number)
        way, known = draw.choice(WAYS), sorted({text for _, text in self.answers})
        chosen = draw.choices(known, k=LIST if way == "list" else 1)
        body = {"texts": chosen} if way == "list" else {"text": chosen[0]}
        accept, name = FRAMES if way == "list" else OCTETS, f"kills-{number}"
        started, received, cut = time.monotonic(), bytearray(), False
        try:
            async with self.client.stream(
                "POST",
                "/v1/prune" if way == "prune" else "/v1/compress",
                json={**body, "timeout": TIMEOUT},
                headers={"accept": accept, "x-request-id": name},
            ) as reply:
                try:
                    async for chunk in reply.aiter_raw():
                        received += chunk
                except httpx.RemoteProtocolError:
                    cut = True
            if reply.headers.get("x-request-id") != name:
                end = "wrong"
            elif reply.status_code != 200:
                end = code_of(bytes(received))
            elif way == "list":
                end = self._of_frames(chosen, bytes(received))
            elif cut:
                end = "cut_off"
            else:
                end = "ok" if bytes(received) == self.answers[way, chosen[0]] else "wrong"
        except httpx.HTTPError:
            end = "unanswered"
        self.ended[way, end] += 1
        if end == "ok":
            self.seconds.append(time.monotonic() - started)
        return end

    def _of_frames(self, chosen: list[str], body: bytes) -> str:
        ends: dict[int, str] = {}
        while len(body) >= FRAME.size:
            index, status, length = FRAME.unpack_from(body)
            payload, body = body[FRAME.size : FRAME.size + length], body[FRAME.size + length :]
            if index == END:
                break
            if index in ends:
                return "twice"
            if status != 200:
                ends[index] = code_of(payload)
            else:
                ends[index] = "ok" if payload == self.answers["one", chosen[index]] else "wrong"
        else:
            return "cut_off"
        if body or sorted(ends) != list(range(len(chosen))):
            return "wrong"
        return next((end for end in ends.values() if end != "ok"), "ok")


def code_of(payload: bytes) -> str:
    """The code of an error on the wire; ``wrong`` where it is none that there is."""
    try:
        code = json.loads(payload)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return "wrong"
    return code if code in ERRORS else "wrong"


async def replicas_of(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The replicas that report, as ``GET /v1/load`` lists them."""
    found: list[dict[str, Any]] = (await client.get("/v1/load")).json()["replicas"]
    return found


async def recovered(client: httpx.AsyncClient, count: int, gone: set[int], seconds: float = RECOVER_SECONDS) -> float:
    """Seconds until ``count`` replicas answer, none of them of ``gone``; ``TimeoutError`` where that takes too long."""
    started = time.monotonic()
    async with asyncio.timeout(seconds):
        while True:
            pids = {replica["pid"] for replica in await replicas_of(client) if replica["ready"]}
            if len(pids) >= count and not pids & gone:
                return time.monotonic() - started
            await asyncio.sleep(0.5)


# -- the run -----------------------------------------------------------------------------------------------------------


async def attack(client: httpx.AsyncClient, mean_seconds: float, seed: int, gone: set[int]) -> None:
    """Kill replicas until cancelled; ``gone`` gets their process ids."""
    draw = random.Random(seed)
    while True:
        await asyncio.sleep(draw.expovariate(1 / mean_seconds))
        with suppress(httpx.HTTPError, ProcessLookupError):
            there = [replica["pid"] for replica in await replicas_of(client) if replica["pid"] not in gone]
            if there:
                pid = draw.choice(there)
                os.kill(pid, signal.SIGKILL)
                gone.add(pid)


async def measure(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """All requests, some clients at once, beside the killing."""
    limits = httpx.Limits(max_connections=options.clients + 2)
    async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT + 30, limits=limits) as client:
        load = Load(client, await expected(texts()))
        numbers, gone, started = iter(range(options.requests)), set[int](), time.monotonic()
        killing = asyncio.ensure_future(attack(client, options.mean_seconds, options.seed, gone))

        async def one_client() -> None:
            for number in numbers:
                await load.ask(number)
                if number % 500 == 499:
                    print(f"{number + 1} sent, {len(gone)} killed, {dict(load.ended)}", flush=True)

        await asyncio.gather(*(one_client() for _ in range(options.clients)))
        killing.cancel()
        seconds = time.monotonic() - started
        back = await recovered(client, options.replicas, gone)
    outcomes: dict[str, dict[str, int]] = {}
    for (way, end), count in sorted(load.ended.items()):
        outcomes.setdefault(way, {})[end] = count
    slow = sorted(load.seconds)
    return {
        "requests": options.requests,
        "outcomes": outcomes,
        "bad": {end: sum(count for (_, found), count in load.ended.items() if found == end) for end in BAD},
        "kills": len(gone),
        "lost_under_work": server.log.read_text(errors="replace").count("a replica was lost"),
        "seconds": round(seconds, 1),
        "recovered_after_seconds": round(back, 1),
        "latency_ms": {
            name: round(1e3 * slow[min(int(share * len(slow)), len(slow) - 1)], 1)
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
            if slow
        },
    }


def table(results: Path) -> str:
    """What the records say, a sentence each; another sentence where there is none."""
    said = []
    for path in sorted(results.glob("kills-*.json")):
        found = json.loads(path.read_text())
        ends = Counter[str]()
        for counts in found["outcomes"].values():
            ends.update(counts)
        errors = [f"{count:,} in `{code}`" for code, count in sorted(ends.items()) if code != "ok"]
        bad = [f"{count:,} {name}" for name, count in found["bad"].items()]
        load = f"{found['requests']:,} requests of {found['clients']} clients to {found['replicas']} replicas"
        killed = f"{found['kills']} kills, {found['lost_under_work']:,} requests on a replica when it was killed"
        where = f"{found['machine']['device']}, {found['machine']['date'][:10]}; `bench/results/{path.name}`"
        ended = ", ".join([f"{ends['ok']:,} ended in their right answer", *(errors or ["none in an error"])])
        said.append(f"{load} in {found['seconds'] / 60:.0f} minutes, {killed}: {ended}; {', '.join(bad)}. {where}.")
    return "\n\n".join(said) or "No record is here yet: `python -m bench.kills` makes one."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and write the record; 1 where a request ended badly, or a process is left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8, help="requests at once")
    parser.add_argument("--mean-seconds", type=float, default=20.0, help="between two kills")
    parser.add_argument("--seed", type=int, default=0, help="of the killing")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "bench" / "results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        # Nothing is answered from earlier results, and one thread gives one order of sums.
        how = ("--replicas", str(options.replicas), "--cache-mb", "0", "--threads", "1", "--plain-logs")
        with serving(*how, log=Path(folder) / "log") as server:
            found = asyncio.run(measure(server, options))
            found["processes_left"] = len(server.stop())
    record = {
        "machine": machine(torch.device("cpu")),
        **{name: getattr(options, name) for name in ("replicas", "clients", "mean_seconds", "seed")},
        **found,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kills-{stem(processor())}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(found, indent=1), f"\n{path}")
    return int(any(found["bad"].values()) or found["processes_left"] > 0)


if __name__ == "__main__":
    sys.exit(main())
