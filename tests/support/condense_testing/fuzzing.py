"""Mutated requests to a gateway and its miners: ``python -m condense_testing.fuzzing --count 20000``.

None of them may end in a status of 500, or in an answer that is no error of the project. ``tests/support`` must be on
``PYTHONPATH``; what it used of memory is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import httpx
from bittensor import http_auth

from condense_core.neurons.mining.app import create_miner_app
from condense_core.neurons.protocol.messages import COMPRESS, Ask
from condense_core.neurons.protocol.sealing import public_key, seal
from condense_core.neurons.routing.app import create_gateway_app
from condense_core.neurons.routing.requests import ROUTINGS
from condense_core.serving.wire import FRAMES, JSON, LINES, OCTETS
from condense_testing.chains import key
from condense_testing.gateways import MODEL, TEXT, Subnet, small_tiers, subnet
from condense_testing.mutations import any_value, mutated

_CHUNK = 1000
_FORMS = (OCTETS, JSON, LINES, FRAMES, "*/*", "text/html", "", "application/*;q=0.1, */*", "x" * 1200)
_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
_BODIES: tuple[dict[str, Any], ...] = (
    {"text": TEXT, "ratio": 4, "timeout": 2},
    {"texts": [TEXT, TEXT * 2, "short"], "timeout": 2},
    {"messages": _CHAT, "min_chars": 60, "timeout": 2},
    {"text": TEXT, "routing": "k_of_n", "k": 2, "timeout": 2},
    {"text": TEXT, "routing": "one", "miner": 1, "timeout": 2},
)
_VALUES: dict[str, tuple[Any, ...]] = {
    "text": (TEXT, TEXT * 2, TEXT * 4, TEXT * 9, TEXT[:1000], "é" * 2000, "\x00" * 1500, "</s>" * 400, "\ud800" * 1500),
    "texts": ([TEXT], [TEXT] * 3, [], [""], [TEXT, 3], ["x"] * 300),
    "messages": (_CHAT, [], [{}], [{"role": "user", "content": None}], _CHAT * 600),
    "ratio": (1, 2, 3, 3.3, 7.5, 16, 16.5, 32, 1000, 1001),
    "max_soft_tokens": (1, 30, 100, 500, 2**20),
    "question": ("Who counts the lamps?", "", " ", "x" * 500, "x" * 501, "\x00"),
    "tier": ("research", "inference_0", "inference_1", "gold"),
    "model": (MODEL, f"owner/{MODEL}", "other"),
    "routing": (*ROUTINGS, "worst"),
    "miner": (0, 1, 2, 3, 99, "5F"),
    "k": (1, 2, 3, 8, 9),
    "timeout": (0.001, 0.01, 0.1, 2, 3600, 3601),
    "min_chars": (1, 2000, 10**6),
    "method": ("pool", "select"),
    "priority": (-10, 0, 1, 11),
}
_ASK = {"version": 1, "tier": "research", "text": TEXT, "ratio": 4.0, "question": None}
_ASK_VALUES: dict[str, tuple[Any, ...]] = {
    **{name: _VALUES[name] for name in ("text", "tier", "question")},
    "ratio": (1.0, 2.0, 4.0, 7.5, 16.0, 17.0, 4),
    "version": (1, 2, "1"),
    "sealed": ("", "AAAA", "Q1NFQUwx" * 20, "\n"),
}


async def fuzz_gateway(net: Subnet, count: int, seed: int = 0) -> Counter[str]:
    """Send mutated requests to a gateway; how many ended in each status."""
    rng, seen = Random(seed), Counter[str]()
    async with _client(create_gateway_app(net.gateway)) as http:
        for number in range(count):
            headers = {"content-type": JSON if rng.random() < 0.97 else "text/plain", "accept": rng.choice(_FORMS)}
            if rng.random() < 0.05:
                headers[rng.choice(["x-request-id", "authorization", "content-length"])] = "9" * rng.randrange(1, 60)
            path = "/v1/compress" if rng.random() < 0.95 else rng.choice(["/v1/prune", "/v1/models", "/v1/x", "/%00"])
            body = mutated(rng, rng.choice(_BODIES), _VALUES)
            await _sent(http, path, body, headers, seen, f"gateway, seed {seed}, request {number}")
        good = await http.post("/v1/compress", json={"text": TEXT})
        assert good.status_code == 200, good.text
    return seen


async def fuzz_miner(net: Subnet, count: int, seed: int = 0) -> Counter[str]:
    """Send mutated requests to a miner, most of them signed as they should be; how many ended in each status."""
    rng, seen = Random(seed), Counter[str]()
    miner, sender = net.miners[0], key("validator")
    both = {"sender_ss58": sender.ss58_address, "receiver_ss58": miner.hotkey.ss58_address}
    async with _client(create_miner_app(miner)) as http:
        for number in range(count):
            body = mutated(rng, _ASK, _ASK_VALUES)
            if rng.random() < 0.3:
                sealed, _ = seal(body, public_key(miner.sealing_key), **both)
                if rng.random() < 0.5:
                    at = rng.randrange(len(sealed))
                    sealed = sealed[:at] + bytes([rng.randrange(256)]) + sealed[at + 1 :]
                body = b'{"sealed": "' + base64.b64encode(sealed) + b'"}'
            signed: dict[str, str] = http_auth.sign(
                sender, method="POST", path=COMPRESS, body=body, receiver_ss58=miner.hotkey.ss58_address
            )
            if rng.random() < 0.1:
                signed[rng.choice(list(signed))] = str(any_value(rng)).encode("ascii", "replace").decode()[:300]
            headers = {"content-type": JSON, **{name: _printable(value) for name, value in signed.items()}}
            await _sent(http, COMPRESS, body, headers, seen, f"miner, seed {seed}, request {number}")
        body = Ask(tier="research", text=TEXT, ratio=4.0).to_bytes()
        signed = http_auth.sign(
            sender, method="POST", path=COMPRESS, body=body, receiver_ss58=miner.hotkey.ss58_address
        )
        good = await http.post(COMPRESS, content=body, headers={"content-type": JSON, **signed})
        assert good.status_code == 200, good.text
    return seen


async def fuzz(
    folder: Path, count: int, seed: int = 0, told: Callable[[int], None] = lambda sent: None
) -> dict[str, Counter[str]]:
    """So many to a gateway, and so many to a miner; how many ended in each status.

    Args:
        folder: for what they keep. told: is called now and then with how many were sent to each.
    """
    gateway, miner = Counter[str](), Counter[str]()
    async with subnet(folder, tiers=small_tiers(timeout=1.0)) as net:
        for start in range(0, count, _CHUNK):
            some = min(_CHUNK, count - start)
            gateway += await fuzz_gateway(net, some, seed + start)
            miner += await fuzz_miner(net, some, seed + start)
            told(start + some)
    return {"gateway": gateway, "miner": miner}


def _client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://fuzzed", timeout=30)


def _printable(value: str) -> str:
    return "".join(c for c in value if c.isprintable())


async def _sent(
    http: httpx.AsyncClient, path: str, body: bytes, headers: dict[str, str], seen: Counter[str], what: str
) -> None:
    begun = time.monotonic()
    response = await http.post(path, content=body, headers=headers)
    seen[str(response.status_code)] += 1
    assert response.status_code != 500, f"{what}: {response.text} for {body[:300]!r}"
    assert time.monotonic() - begun < 20, f"{what}: it took {time.monotonic() - begun:.1f} s"
    if response.status_code >= 400:
        error = json.loads(response.content)["error"]
        assert {"code", "message", "request_id"} <= set(error), f"{what}: {response.text}"
        assert "\n" not in error["message"], f"{what}: {response.text}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Send them, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="requests to each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    begun = time.monotonic()

    def told(sent: int) -> None:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{time.monotonic() - begun:.0f} s, {sent:,} to each, {most:,.0f} MiB", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        seen = asyncio.run(fuzz(Path(folder), options.count, options.seed * 1_000_000, told))
    print(json.dumps({name: dict(sorted(statuses.items())) for name, statuses in seen.items()}))


if __name__ == "__main__":
    main()
