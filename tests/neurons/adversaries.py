"""The proof at full scale that cheating does not pay: ``python tests/neurons/adversaries.py --rounds 30``.

Honest miners of graded quality and an adversary of each kind (``condense_core.neurons.local.adversaries``) serve in
one process, over real HTTP with real signatures; a validator plays rounds with the embedded model as LLM and sets
weights on a chain in memory. It prints what each miner earned and why, and which claims hold; the exit code is 1 if
one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from condense_core.neurons.local.adversaries.kinds import ADVERSARIES
from condense_testing.arena import HONEST, SOURCE, open_arena, verdicts


async def proved(rounds: int, timeout: float, seed: str, kinds: list[str]) -> dict[str, Any]:
    """Play, and say what came of it."""
    started = time.monotonic()
    async with open_arena(kinds, timeout=timeout, seed=seed) as arena:
        for number in range(1, rounds + 1):
            await arena.play(1)
            print(f"\rround {number} of {rounds}, {time.monotonic() - started:.0f} s", end="", file=sys.stderr)
        print(file=sys.stderr)
        chain, weights = await arena.on_chain(), arena.weights()
        quality = await asyncio.to_thread(arena.true_quality, 2 * rounds)
        found = verdicts(arena, chain, quality, rounds)
        middle = median(weights[name] for name in HONEST if name != SOURCE)
        miners = [
            {
                "miner": name,
                "about": ADVERSARIES[name].about if name in ADVERSARIES else "honest",
                "alone": round(mean(arena.scores(name, shared=False)), 4),
                "score": round(mean(arena.scores(name)), 4),
                "weight": round(chain[name], 6),
                "of_median": round(weights[name] / middle, 4),
                "true_quality": round(quality[name], 4) if name in quality else None,
                "why": arena.why(name),
            }
            for name in sorted(weights, key=lambda name: (name not in HONEST, -weights[name]))
        ]
    seconds = round(time.monotonic() - started, 1)
    return {"rounds": rounds, "seconds": seconds, "miners": miners, "verdicts": [asdict(v) for v in found]}


def main() -> int:
    """Read the arguments, play, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--timeout", type=float, default=8.0, help="seconds of an answer; some miners use them all")
    parser.add_argument("--seed", default="arena", help="of the challenges")
    parser.add_argument("--only", action="append", help="a kind of adversary; may be repeated (default: all)")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    given = parser.parse_args()
    found = asyncio.run(proved(given.rounds, given.timeout, given.seed, given.only or list(ADVERSARIES)))
    print(
        f"{'miner':20} {'alone':>6} {'score':>6} {'weight':>8} {'of median':>9}  what it sends, and why it got nothing"
    )
    for miner in found["miners"]:
        why = f" [{miner['why']}]" if miner["why"] else ""
        print(
            f"{miner['miner']:20} {miner['alone']:6.3f} {miner['score']:6.3f} {miner['weight']:8.4f} "
            f"{miner['of_median']:9.1%}  {miner['about']}{why}"
        )
    for verdict in found["verdicts"]:
        print(f"{'holds' if verdict['holds'] else 'FAILS'}: {verdict['claim']} ({verdict['numbers']})")
    print(f"{found['rounds']} rounds in {found['seconds']:.0f} s")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(verdict["holds"] for verdict in found["verdicts"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
