"""Sends mutated requests to a miner and mutated answers to a validator: ``python tests/neurons/fuzz.py --count 20000``.

Nothing may raise, answer with 500, or be taken for an answer that it is not; memory must not grow. ``test_fuzz.py``
does the same with few. The gateway's part is in ``condense_testing.gateways``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch
from bittensor import http_auth
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.mining.app import Miner, create_miner_app
from condense_core.neurons.mining.gate import Gate, GateSettings
from condense_core.neurons.protocol.messages import COMPRESS, IDENTITY, Ask, MessageError, read_answer
from condense_core.neurons.protocol.nonces import SqliteNonceStore
from condense_core.neurons.protocol.sealing import public_key, seal
from condense_core.neurons.tiers import Tier, read_tiers
from condense_testing.chains import key
from condense_testing.fuzzing import each, mutated_bytes, mutated_headers, mutated_json
from condense_testing.subnets import metagraph_of

TIERS = read_tiers()
MODEL = TIERS.tiers["research"].model
MINER, CALLER = key("miner"), key("caller")
SEALING = X25519PrivateKey.generate()
TEXT = "The keeper of the north archive counts the lamps at dusk. " * 20
TOKENS, WIDTH = 290, 8
ASK = Ask(tier="research", text=TEXT, ratio=4.0)
EXPECTED = {200, 400, 401, 403, 404, 405, 408, 413, 415, 422, 429, 431}


def soft_tokens(ratio: float = 4.0) -> SoftTokens:
    """What an honest miner would send."""
    import hashlib

    rows = torch.randn(-(-TOKENS // int(ratio)), WIDTH, generator=torch.Generator().manual_seed(0))
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    return SoftTokens(embeds=rows, num_context_tokens=TOKENS, ratio=int(ratio), model_id=MODEL, context_sha256=digest)


class Ready:
    """A backend that has its answer."""

    is_ready = is_healthy = True

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def serves(self, _: Tier) -> bool:
        return True

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        return soft_tokens()


def requests(rng: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body of a request in which something is wrong, most of them signed as they are."""
    plain = ASK.model_dump(mode="json")
    kind = rng.randrange(6)
    if kind == 0:
        body = mutated_json(rng, plain)
    elif kind == 1:
        body = mutated_bytes(rng, ASK.to_bytes())
    elif kind == 2:
        inner = mutated_json(rng, plain) if rng.random() < 0.5 else mutated_bytes(rng, ASK.to_bytes())
        sealed, _ = seal(inner, public_key(SEALING), sender_ss58=CALLER.ss58_address, receiver_ss58=MINER.ss58_address)
        body = b'{"sealed": "' + base64.b64encode(sealed) + b'"}'
    elif kind == 3:
        sealed, _ = seal(
            ASK.to_bytes(), public_key(SEALING), sender_ss58=CALLER.ss58_address, receiver_ss58=MINER.ss58_address
        )
        body = mutated_bytes(rng, b'{"sealed": "' + base64.b64encode(mutated_bytes(rng, sealed)) + b'"}')
    elif kind == 4:
        body = json.dumps({"sealed": "A" * rng.choice((0, 1, 4, 100, 4000))}).encode()
    else:
        body = ASK.to_bytes()
    method = rng.choice(("POST",) * 30 + ("GET", "PUT", "DELETE", "PATCH"))
    path = rng.choice((COMPRESS,) * 30 + (IDENTITY, "/", "//", COMPRESS + "?a=b", COMPRESS + "/", "/%2e%2e/metrics"))
    signed = http_auth.sign(
        CALLER, method=method, path=path, body=body, receiver_ss58=MINER.ss58_address, nonce_ns=time.time_ns()
    )
    headers = {"content-type": "application/json", **signed}
    if kind == 5 or rng.random() < 0.2:
        headers = mutated_headers(rng, headers)
    if rng.random() < 0.1:
        body = mutated_bytes(rng, body)  # behind the signature's back
    return method, path, headers, body


async def fuzz_miner(count: int, seed: int = 0) -> Counter[str]:
    """Statuses of the answers to ``count`` requests; ``AssertionError`` for one that must not be."""
    with tempfile.TemporaryDirectory() as folder:
        gate = Gate(GateSettings(requests_per_minute=1e9, allow=frozenset({CALLER.ss58_address})))
        gate.update(metagraph_of(CALLER.ss58_address))
        miner = Miner(MINER, TIERS, Ready(), gate, SqliteNonceStore(Path(folder) / "n.db"), sealing_key=SEALING)
        await miner.start()
        app: Any = create_miner_app(miner)
        found: Counter[str] = Counter()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://miner") as http:
            for _, (method, path, headers, body) in each(count, seed, {"request": requests}):
                sent = http.build_request(method, path, content=body)
                sent.headers = httpx.Headers([(k.encode(), v.encode("latin-1")) for k, v in headers.items()])
                answer = await http.send(sent)
                found[str(answer.status_code)] += 1
                assert answer.status_code in EXPECTED, (answer.status_code, method, path, headers, body[:300])
                if answer.status_code != 200:
                    assert len(answer.content) < 3000, answer.content[:300]
                    told = answer.json()["error"]
                    assert set(told) <= {"code", "message", "request_id", "retry_after"}
                    assert "lamps" not in told["message"], told
        miner.nonces.close()
        return found


def answers(rng: random.Random) -> bytes:
    """A body that is nearly an answer."""
    good = soft_tokens(rng.choice((4, 4, 8))).to_bytes()
    if rng.random() < 0.5:
        return mutated_bytes(rng, good)
    size = int.from_bytes(good[:8], "little")
    header = mutated_json(rng, json.loads(good[8 : 8 + size]))
    return len(header).to_bytes(8, "little") + header + good[8 + size :]


def fuzz_answers(count: int, seed: int = 0) -> Counter[str]:
    """What became of ``count`` answers; ``AssertionError`` for one that was taken and is none."""
    tier = TIERS.tiers["research"]
    found: Counter[str] = Counter()
    for _, body in each(count, seed, {"answer": answers}):
        try:
            soft = read_answer(body, ASK, tier, context_tokens=TOKENS, model_id=MODEL, width=WIDTH)
        except MessageError as error:
            told = str(error)
            found["refused" if told.startswith("answer: ") and told.isprintable() and len(told) < 1000 else told] += 1
            continue
        found["taken"] += 1
        assert soft.embeds.shape == (-(-TOKENS // int(soft.ratio)), WIDTH)
        assert bool(soft.embeds.isfinite().all())
        assert soft.ratio >= ASK.ratio
    assert set(found) <= {"refused", "taken"}, found
    return found


def main() -> int:
    """Send as many as asked for, and say what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name, run in (
        ("miner", lambda count: asyncio.run(fuzz_miner(count, given.seed))),
        ("answers", lambda count: fuzz_answers(count, given.seed)),
    ):
        run(min(500, given.count))
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        found = run(given.count)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        told = ", ".join(f"{what} {number:,}" for what, number in sorted(found.items()))
        print(f"{name}: {given.count:,} in {time.monotonic() - began:.0f} s; {told}; peak memory +{grown:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
