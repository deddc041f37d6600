"""Mutated requests against a running `condense serve`: `python -m bench.fuzz OUT --requests 20000`.

schemathesis makes them of the server's own OpenAPI document, valid ones and ones that are wrong in every way it knows.
OUT, a JSON file, gets how many there were by route and status, and the server's memory over time; a status of 500, an
answer that is none, or a server that ended is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings

from condense_core._version import __version__
from condense_core.files.atomic import write_atomically

ROUTES = {"POST /v1/compress": 0.7, "POST /v1/prune": 0.15, "POST /v1/answer": 0.1, "GET /v1/models": 0.05}
ROUND = 500  # requests between two looks at the memory


def started(port: int, log: BinaryIO) -> subprocess.Popen[bytes]:
    """A server of the embedded model, which logs into a file."""
    command = [sys.executable, "-m", "condense_core.cli", "serve", "--port", str(port), "--threads", "1"]
    command += ["--cache-mb", "16"]
    process = subprocess.Popen(command, stderr=log)
    for _ in range(600):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return process
        time.sleep(0.1)
    raise RuntimeError("the server did not start")


def resident_mb(url: str) -> float:
    """The server's resident memory."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    [value] = [line.split()[1] for line in text.splitlines() if line.startswith("process_resident_memory_bytes ")]
    return round(float(value) / 2**20, 1)


def send(url: str, route: str, count: int, number: int, seen: Counter[str]) -> None:
    """So many requests to one route."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.config.generation.update(modes=list(schemathesis.GenerationMode))
    method, path = route.split()
    strategy = schema[path][method].as_strategy()

    @seed(number)
    @given(case=strategy)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def call(case: schemathesis.Case[Any]) -> None:
        response = case.call()
        seen[f"{route} {response.status_code}"] += 1
        if response.status_code == 500:
            print(f"{response.text}\n{case.as_curl_command()}", flush=True)
        if response.status_code >= 400:
            error = json.loads(response.content)["error"]
            assert {"code", "message", "request_id"} <= set(error), error

    call()


def main(arguments: Sequence[str] | None = None) -> None:
    """Send them, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(tempfile.mkdtemp(prefix="condense-fuzz-")) / "log"  # it says where a mistake was
    with log.open("xb") as file:
        url, server = f"http://127.0.0.1:{port}", started(port, file)
    print(f"the server logs into {log}", flush=True)
    seen: Counter[str] = Counter()
    memory: list[tuple[int, float]] = []
    begun = time.monotonic()
    try:
        number = 0
        while sum(seen.values()) < options.requests:  # a round of a route without input is one request
            number += 1
            memory.append((sum(seen.values()), resident_mb(url)))
            print(f"{sum(seen.values()):,} requests, {memory[-1][1]:,} MB", flush=True)
            for route, share in ROUTES.items():
                send(url, route, round(ROUND * share), number, seen)
        memory.append((sum(seen.values()), resident_mb(url)))
        alive = server.poll() is None and httpx.get(f"{url}/health").status_code == 200
    finally:
        server.terminate()
        server.wait(30)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "library": f"condense_core {__version__}",
        "schemathesis": schemathesis.__version__,
        "requests": sum(seen.values()),
        "seconds": round(time.monotonic() - begun),
        "answers": dict(sorted(seen.items())),
        "memory_mb": memory,
        "alive": alive,
    }
    write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode(), "the record")
    internal = sum(count for name, count in seen.items() if name.endswith(" 500"))
    print(f"{record['requests']:,} requests: {internal} internal errors, memory {memory[0][1]} to {memory[-1][1]} MB")
    if internal or not alive:
        sys.exit("error: the server made mistakes, or ended")


if __name__ == "__main__":
    main()
