"""What judging a round of fake miners costs, and how much of it the LLM takes: `python -m bench.judge`.

    python -m bench.judge [--miners 64] [--rounds 3] [--model PATH] [--device D] [--threads N] [--json] [--out FOLDER]
    python -m bench.judge --memory [--miners 8] [--rounds 1000] [--json] [--out FOLDER]

Miners are made up: soft tokens of the model's own compressor with noise of their own, some at a higher ratio, some
copies of others byte for byte, and some that are invalid. Reading and scoring are the validator's own (`judged`: scores
and copies), of each round in three ways, one after another:

- one by one: each answer as if it were the only one, so the full, empty and trivial contexts are read again with it.
- cached: each answer by itself, with references that are read once a round.
- batched: as the validator does it, all answers of a round together.

Speeds are printed only where all three gave the same scores. With `--memory` short rounds are judged one after another,
and the memory of the process is looked at ten times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.goal import Goal, sentence
from bench.memory import resident
from bench.run import machine, stem
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.architecture import decoder_parts
from condense_core.decoder.embedded import embedded_model_path
from condense_core.neurons.asking.client import Peer, Reply
from condense_core.neurons.incentive.score import Score
from condense_core.neurons.judging.challenges import Challenge, challenge
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.mining.backends import served_ratio
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import Tier, Tiers, read_tiers
from condense_core.neurons.validating.rounds import judged
from condense_core.serving.load.record import memory
from condense_core.tasks.generators import Turn
from condense_core.tasks.sources import open_source

Found = dict[str, tuple[Score, SoftTokens | None]]
Replies = dict[str, tuple[Peer, Reply]]

TIER = "research"
LEAST_NOISE, MOST_NOISE = 0.3, 0.9  # of the standard deviation of all values; those between are hardly copies
SAME = 0.01  # by which scores of two ways to read may differ
GOALS = (Goal("speed-up", 3.0, "one by one"), Goal("llm", 0.85))
SHORT, FEW_TOKENS = {"min_chars": 500, "max_chars": 700, "questions": 1}, 4
"""Of the tier and of answers, with --memory: what grows grows by rounds and not by their size."""
LOOKS = 10


class OneByOne(Judge):
    """Scores each answer as if it were the only one."""

    def scores(self, answers: Mapping[str, tuple[bytes, float]], ask: Ask, tier: Tier, turns: Sequence[Turn]) -> Found:
        """With references of its own."""
        found: Found = {}
        for name, sent in answers.items():
            judge = Judge(self.condenser)
            found |= judge.scores({name: sent}, ask, tier, turns)
            self.readings += judge.readings
        return found


class Cached(Judge):
    """Scores each answer by itself, with references that are read once."""

    def scores(self, answers: Mapping[str, tuple[bytes, float]], ask: Ask, tier: Tier, turns: Sequence[Turn]) -> Found:
        """In turn."""
        found: Found = {}
        for name, sent in answers.items():
            found |= super().scores({name: sent}, ask, tier, turns)
        return found


WAYS: dict[str, type[Judge]] = {"one by one": OneByOne, "cached": Cached, "batched": Judge}


@dataclass
class Clock:
    """Seconds inside the forward passes of a model."""

    seconds: float = 0.0


@contextmanager
def inside(condenser: Condenser) -> Iterator[Clock]:
    """Within, the clock counts what the LLM takes: the whole model, or its layers where only they are called."""
    clock, began, depth = Clock(), 0.0, 0

    def now() -> float:
        if condenser.device.type == "cuda":
            torch.cuda.synchronize(condenser.device)
        return time.perf_counter()

    def enter(*_: Any) -> None:
        nonlocal began, depth
        began, depth = (began if depth else now()), depth + 1

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1
        if not depth:
            clock.seconds += now() - began

    handles = []
    for module in (condenser.model, decoder_parts(condenser.model)):
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


def fake_replies(condenser: Condenser, asked: Challenge, miners: int, seed: int) -> Replies:
    """What so many miners send; of every eight one is invalid, one a copy, and one at a higher ratio."""
    rng, replies = random.Random(seed), {}
    ratios, method = condenser.config.ratios, condenser.config.method
    honest = condenser.compress(asked.ask.text, served_ratio(asked.ask.ratio, method, ratios))
    higher = condenser.compress(asked.ask.text, served_ratio(asked.ask.ratio + 1, method, ratios))
    bodies: list[bytes] = []
    for uid in range(miners):
        kind = uid % 8
        if kind == 7:
            body = rng.choice([b"", rng.randbytes(1000), bodies[0][:-1], bodies[0][:64]])
        elif kind == 6:
            body = rng.choice(bodies)
        else:
            soft = higher if kind == 5 and higher.ratio > honest.ratio else honest
            noise = torch.randn(soft.embeds.shape, generator=torch.Generator().manual_seed(seed * miners + uid))
            share = LEAST_NOISE + (MOST_NOISE - LEAST_NOISE) * uid / miners
            own = soft.embeds.cpu() + share * soft.embeds.cpu().std() * noise
            body = replace(soft, embeds=own, text="").to_bytes()
            bodies.append(body)
        peer = Peer(f"miner {uid}", "", uid)
        replies[peer.hotkey] = (peer, Reply(body, rng.uniform(0.1, 0.5), ""))
    return replies


def telling(condenser: Condenser, tiers: Tiers) -> Iterator[tuple[Challenge, tuple[Turn, ...]]]:
    """Challenges with their questions, of which answers are read: with others a round ends behind the references."""
    source, tier = open_source(None), tiers.tiers[TIER]
    for index in itertools.count():
        asked = challenge(tiers, TIER, source, secret="bench", index=index)
        turns = asked.drawn(tier.questions, "bench")
        if Judge(condenser).reference(asked.ask, turns).is_telling:
            yield asked, turns


def speeds(condenser: Condenser, tiers: Tiers, miners: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way, round by round, of which the LLM's, and by how much their scores differ."""
    tier, challenges = tiers.tiers[TIER], telling(condenser, tiers)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    apart = 0.0
    for index in range(-1, rounds):  # round -1 is for what only the first one takes
        asked, turns = next(challenges)
        replies = fake_replies(condenser, asked, miners if index >= 0 else 1, index)
        values = {}
        for name, kind in WAYS.items():
            judge = kind(condenser)
            started = time.perf_counter()
            with inside(condenser) as clock:
                outcomes = judged(judge, tier, asked, turns, replies, seed=0)
            seconds = time.perf_counter() - started
            values[name] = [outcome.value for outcome in outcomes]
            if index >= 0:
                rows[name].append({"seconds": seconds, "llm": clock.seconds, "readings": judge.readings})
        differences = [abs(a - b) for own in values.values() for a, b in zip(own, values["batched"], strict=True)]
        apart = max(apart, *differences)
        print(f"round {index}: {len(asked.ask.text):,} characters, {asked.ask.ratio:g}x", file=sys.stderr, flush=True)
    sums = {name: sum(row["seconds"] for row in own) for name, own in rows.items()}
    share = sum(row["llm"] for row in rows["batched"]) / sums["batched"]
    speed_up = sums["one by one"] / sums["batched"]
    correct = apart <= SAME
    goals = [goal.judge(speed_up if goal.kind == "speed-up" else share) for goal in GOALS] if correct else []
    return {"miners": miners, "rounds": rounds, "ways": rows, "apart": apart, "correct": correct, "goals": goals}


def growth(condenser: Condenser, tiers: Tiers, miners: int, rounds: int) -> dict[str, Any]:
    """Resident memory over many short rounds with one judge."""
    source = open_source(None)
    tier = tiers.tiers[TIER].model_copy(update=SHORT)
    tiers = tiers.model_copy(update={"tiers": {**tiers.tiers, TIER: tier}})
    judge, looks, started = Judge(condenser, max_new_tokens=FEW_TOKENS), [], time.perf_counter()
    for index in range(rounds):
        asked = challenge(tiers, TIER, source, secret="bench", index=index)
        replies = fake_replies(condenser, asked, miners, index)
        judged(judge, tier, asked, asked.drawn(tier.questions, str(index)), replies, seed=index)
        if (index + 1) % max(1, rounds // LOOKS) == 0:
            looks.append((time.perf_counter() - started, float(resident())))
            print(f"round {index + 1}: {looks[-1][1] / 1e6:.1f} MB", file=sys.stderr, flush=True)
    found = memory(looks) or {}
    goals = [Goal("growth", 1.0).judge(found.get("slope_mb_per_minute"))]
    read = {"readings": judge.readings}
    return {"miners": miners, "rounds": rounds, **read, "looks": looks, **found, "goals": goals}


def table(found: Mapping[str, Any]) -> str:
    """Of a record: the ways beside each other, or the memory over time; and the goals."""
    if "looks" in found:
        lines = ["| seconds | MB |", "|---|---|", *(f"| {at:.0f} | {rss / 1e6:.1f} |" for at, rss in found["looks"])]
    elif not found["correct"]:
        return f"WRONG: scores of the three ways differ by up to {found['apart']:.3f}, expected at most {SAME}"
    else:
        lines = ["| way | seconds a round | in the LLM | contexts read |", "|---|---|---|---|"]
        for name, rows in found["ways"].items():
            seconds, llm, read = (sum(row[key] for row in rows) for key in ("seconds", "llm", "readings"))
            lines.append(f"| {name} | {seconds / len(rows):.2f} | {llm / seconds:.0%} | {read / len(rows):.0f} |")
    head = f"{found['miners']} miners, {found['rounds']:,} rounds; {found['model']}, {found['dtype']}"
    return "\n".join([f"{head}; {found['machine']['device']}.\n", *lines, "", *map(sentence, found["goals"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a goal was missed, or the ways disagree."""
    parser = argparse.ArgumentParser(prog="python -m bench.judge", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--miners", type=int, help="(default: 64; 8 with --memory)")
    parser.add_argument("--rounds", type=int, help="(default: 3; 1000 with --memory)")
    parser.add_argument("--memory", action="store_true", help="short rounds, and what the process holds")
    parser.add_argument("--model", help="a folder or hub id (default: the embedded model)")
    parser.add_argument("--device", help="of the model (default: a GPU if there is one)")
    parser.add_argument("--threads", type=int, help="(default: torch's own)")
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--out", type=Path, help="folder to write the record to")
    options = parser.parse_args(argv)
    miners, rounds = options.miners or (8 if options.memory else 64), options.rounds or (1000 if options.memory else 3)
    if miners < 1 or rounds < 1:
        parser.error(f"--miners, --rounds: {miners} and {rounds}, expected at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    method = "select" if options.model else "pool"
    condenser = Condenser.from_pretrained(options.model or embedded_model_path(), method=method, device=options.device)
    measured = (growth if options.memory else speeds)(condenser, read_tiers(), miners, rounds)
    facts = {"model": condenser.model_id, "dtype": str(condenser.dtype).removeprefix("torch.")}
    found = {"machine": machine(condenser.device), **facts, **measured}
    print(json.dumps(found, indent=1) if options.json else table(found))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"judge{'-memory' if options.memory else ''}-{stem(found['machine']['device'])}.json"
        (options.out / name).write_text(json.dumps(found, indent=1) + "\n")
    return int(not found.get("correct", True) or any(goal["met"] is False for goal in found["goals"]))


if __name__ == "__main__":
    sys.exit(main())
