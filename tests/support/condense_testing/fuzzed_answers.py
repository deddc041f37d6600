"""Answers that are nearly right, for a validator: ``python -m condense_testing.fuzzed_answers --count 20000``.

None of them may raise anything but what an invalid answer is, or be taken for an answer that it is not.
``tests/support`` must be on ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import time
from collections import Counter
from random import Random
from typing import Any

import torch

from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.neurons.protocol.messages import Ask, MessageError, read_answer
from condense_core.neurons.tiers import read_tiers
from condense_testing.mutations import bytes_changed, mutated

TIER = read_tiers().tiers["research"]
TOKENS, WIDTH = 290, 8
ASK = Ask(tier="research", text="The keeper of the north archive counts the lamps at dusk. " * 20, ratio=4.0)
_SOUND = [
    SoftTokens(
        embeds=torch.randn(-(-TOKENS // ratio), WIDTH, generator=torch.Generator().manual_seed(0)),
        num_context_tokens=TOKENS,
        ratio=ratio,
        model_id=TIER.model,
        context_sha256=hashlib.sha256(ASK.text.encode()).hexdigest(),
    ).to_bytes()
    for ratio in (4, 8)
]
_VALUES: dict[str, tuple[Any, ...]] = {
    "embeds": (
        {"dtype": "F32", "shape": [73, 8], "data_offsets": [0, 2336]},
        {"dtype": "F16", "shape": [146, 8], "data_offsets": [0, 2336]},
        {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2336]},
        {"dtype": "F32", "shape": [73, 8], "data_offsets": [0, 2**60]},
    )
}


def answer(rng: Random) -> bytes:
    """A sound answer with some bytes, or some of its header, changed."""
    sound = rng.choice(_SOUND)
    if rng.random() < 0.4:
        return bytes_changed(rng, sound)
    size = int.from_bytes(sound[:8], "little")
    header = mutated(rng, json.loads(sound[8 : 8 + size]), _VALUES)
    length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63))
    return length.to_bytes(8, "little") + header + sound[8 + size :]


def fuzz_answers(count: int, seed: int = 0) -> Counter[str]:
    """How many of ``count`` answers were refused, and how many taken; ``AssertionError`` for one that must not be."""
    found: Counter[str] = Counter()
    for number in range(count):
        body = answer(Random(f"{seed}-{number}"))
        try:
            soft = read_answer(body, ASK, TIER, context_tokens=TOKENS, model_id=TIER.model, width=WIDTH)
        except MessageError as error:
            told = str(error)
            good = told.startswith("answer: ") and told.isprintable() and len(told) < 1000
            found["refused" if good else f"a bad line: {told}"] += 1
            continue
        found["taken"] += 1
        assert soft.embeds.shape == (-(-TOKENS // int(soft.ratio)), WIDTH), number
        assert bool(soft.embeds.isfinite().all()), number
        assert soft.ratio >= ASK.ratio, number
    assert set(found) <= {"refused", "taken"}, found
    return found


def main() -> None:
    """Read as many as asked for, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    fuzz_answers(100)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found = fuzz_answers(given.count, given.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{dict(found)} in {time.monotonic() - begun:.0f} s, peak memory +{grown:.1f} MiB")


if __name__ == "__main__":
    main()
