"""A subnet of honest miners and adversaries in one event loop, with real requests, a real validator and a real LLM.

The honest miners are made of three checkpoints, all that there are for the embedded model, so that the rule against
copies makes some of them share. What it does is claimed by itself; the other claims are about weights in which honest
miners do not share.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from statistics import mean, median
from threading import Lock
from typing import Any

import torch

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.decoder.identity import same_name
from condense_core.neurons.asking.client import NeuronClient, Peer
from condense_core.neurons.incentive.standing import Standing, Standings, weights
from condense_core.neurons.judging.challenges import RATIOS, Challenge
from condense_core.neurons.judging.judge import Judge
from condense_core.neurons.judging.supply import Supply
from condense_core.neurons.local.adversaries.kinds import ADVERSARIES, create
from condense_core.neurons.local.adversaries.means import Means
from condense_core.neurons.mining.app import Miner, create_miner_app, miner_limits
from condense_core.neurons.mining.backends import Backend, served_ratio
from condense_core.neurons.mining.gate import Gate, GateSettings
from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.protocol.nonces import SqliteNonceStore
from condense_core.neurons.tiers import Tier, Tiers, read_tiers
from condense_core.neurons.validating.ledger import Ledger
from condense_core.neurons.validating.loop import Validator
from condense_core.neurons.validating.rounds import Round
from condense_core.serving.http.server import Server, bound_socket
from condense_core.tasks.facts import draw_facts
from condense_core.tasks.generators import Turn, insert_facts, running_text
from condense_core.tasks.prose import ProseWriter
from condense_testing.chains import NETUID, World, key

TIER = "research"
SOURCE = "source"
"""The honest miner whose answers are copied; it lets the copiers in."""
HIGHEST_SHARE = 0.05
CHARS_PER_FACT = 100  # of a text; a fact's statement has about 60
LEAST_CORRELATION = 0.9


@dataclass(frozen=True)
class Grade:
    """How well an honest miner compresses.

    Attributes:
        method: of the embedded model's compressors. factor: by which it exceeds the ratio that it is asked for.
        offset: where its first window begins, of a window.
        change: of its encoder's weights, of their own spread. Two such compressors differ as two trainings do; the more
            they are changed, the worse they are.
    """

    method: str = "pool"
    factor: int = 1
    offset: float = 0.0
    change: float = 0.0


HONEST = {
    SOURCE: Grade(),
    "very good": Grade(offset=0.5),
    "good": Grade(method="mean", offset=0.25, change=0.35),
    "fair": Grade(method="memory"),
    "modest": Grade(offset=0.75, change=0.45),
    "poor": Grade(factor=4, offset=0.4, change=0.45),
    "words": Grade(method="select"),
}


class ReadableSupply(Supply):
    """Challenges that the embedded model can read: it knows facts in plain wording, and gets few other things right.

    Facts stand close together, so that not all of them can be kept without work.
    """

    def make(self, tier: str) -> Challenge:
        index = self._made[tier]
        self._made[tier] += 1
        return readable_challenge(self.tiers, tier, secret=self.secret, index=index)


def readable_challenge(tiers: Tiers, tier: str, *, secret: str, index: int) -> Challenge:
    """Challenge number ``index``: as ``challenge`` makes them, of dense facts in plain wording."""
    limits, rng = tiers.tiers[tier], random.Random(f"readable-{secret}-{index}")
    length = rng.randint(limits.min_chars, limits.max_chars)
    facts = draw_facts(length // CHARS_PER_FACT, rng, split="eval")
    own = length - sum(len(fact.statement) + 1 for fact in facts)
    text = insert_facts(running_text(ProseWriter(), rng, own), facts, rng)
    turns = tuple(Turn(fact.question, fact.answer, fact.kind) for fact in facts)
    ratio = rng.choice([ratio for ratio in RATIOS if limits.min_ratio <= ratio <= limits.max_ratio])
    return Challenge(tier, Ask(tier=tier, text=text, ratio=ratio), turns)


class Compressors:
    """The embedded model's compressors, which all miners of the process share, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, Lock()
        self._made: dict[tuple[str, float], Condenser] = {}

    def of(self, method: str, change: float = 0.0) -> Condenser:
        if (method, change) not in self._made:
            made = self._made[method, change] = Condenser.from_pretrained(self._folder, method=method)
            if change:
                generator = torch.Generator().manual_seed(round(1000 * change))
                for weight in made.compressor.encoder.layers.parameters():
                    if weight.ndim > 1:
                        noise = torch.randn(weight.shape, generator=generator)
                        weight.data += change * weight.data.std() * noise
        return self._made[method, change]

    def compress(self, ask: Ask, grade: Grade) -> SoftTokens:
        with self._lock:
            return _graded(self.of(grade.method, grade.change), ask, grade)


def _graded(condenser: Condenser, ask: Ask, grade: Grade) -> SoftTokens:
    most = max(condenser.config.ratios, default=ask.ratio)
    ratio = served_ratio(min(ask.ratio * grade.factor, most), grade.method, condenser.config.ratios or "any")
    whole = condenser.compress(ask.text, ratio)
    before = "the " * ceil(grade.offset * ratio)
    rows = condenser.compress(before + ask.text, ratio).embeds[: len(whole)] if before else whole.embeds
    return replace(whole, embeds=rows.clone(), text="")


@dataclass
class GradedBackend:
    """Compresses as well as its grade says."""

    compressors: Compressors
    grade: Grade
    is_ready: bool = True
    is_healthy: bool = True

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def serves(self, tier: Tier) -> bool:
        return same_name(tier.model, self.compressors.of("pool").model_id)

    async def compress(self, ask: Ask, *, priority: int, timeout: float) -> SoftTokens:
        return await asyncio.to_thread(self.compressors.compress, ask, self.grade)


@dataclass
class Arena:
    """A subnet that runs.

    Attributes:
        names: of the miners, by hotkey. rounds: that were played. failures: of rounds that were not.
    """

    world: World
    validator: Validator
    tiers: Tiers
    compressors: Compressors
    names: dict[str, str]
    rounds: list[Round] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def play(self, count: int) -> None:
        """Rounds; one that fails is written down, and the next is played."""
        for _ in range(count):
            try:
                self.rounds.append(await self.validator.round(TIER))
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")

    async def on_chain(self) -> dict[str, float]:
        """The weights that the validator sets, by name."""
        done = await self.validator.set_weights()
        assert done is not None
        assert done.sent
        uids = {uid: neuron.hotkey for uid, neuron in enumerate(self.world.net.neurons)}
        found = {self.names[uids[uid]]: weight for uid, weight in done.weights.items()}
        return {name: found.get(name, 0.0) for name in self.names.values()}

    def weights(self) -> dict[str, float]:
        """The weights, by name, where honest miners but the source share with nobody."""
        standings = Standings()
        for played in self.rounds:
            own = {o.hotkey for o in played.outcomes if self.names[o.hotkey] in HONEST} - {self.hotkey(SOURCE)}
            standings.add(TIER, {o.hotkey: o.score.value if o.hotkey in own else o.value for o in played.outcomes})
        uids = {hotkey: uid for uid, hotkey in enumerate(self.names)}
        found = weights(standings, uids, self.tiers, {TIER: 1.0})
        assert found is not None
        return {name: found[uids[hotkey]] for hotkey, name in self.names.items()}

    def hotkey(self, name: str) -> str:
        """Of a miner."""
        return next(own for own, called in self.names.items() if called == name)

    def scores(self, name: str, *, shared: bool = True) -> list[float]:
        """What a miner got in the rounds that count; shared: with those who answered alike."""
        hotkey = self.hotkey(name)
        found = [o for played in self.rounds if played.counts for o in played.outcomes if o.hotkey == hotkey]
        return [o.value if shared else o.score.value for o in found]

    def why(self, name: str) -> str:
        """Why a miner got nothing, the last time that it was said."""
        hotkey = self.hotkey(name)
        told = [o.score.why for played in self.rounds for o in played.outcomes if o.hotkey == hotkey and o.score.why]
        return told[-1] if told else ""

    def true_quality(self, count: int) -> dict[str, float]:
        """What each honest miner's answers to other challenges are worth, read alone."""
        judge, tier = self.validator.judges[self.tiers.tiers[TIER].model], self.tiers.tiers[TIER]
        found: dict[str, list[float]] = {name: [] for name in HONEST}
        for index in range(count):
            one = readable_challenge(self.tiers, TIER, secret="true quality", index=index)
            turns = one.drawn(tier.questions, "true quality")
            if judge.reference(one.ask, turns).is_telling:
                for name, grade in HONEST.items():
                    body = self.compressors.compress(one.ask, grade).to_bytes()
                    found[name].append(judge.score(body, one.ask, tier, turns, 0.5)[0].value)
        return {name: mean(values) for name, values in found.items()}


@asynccontextmanager
async def open_arena(
    kinds: Sequence[str] = tuple(ADVERSARIES), *, timeout: float = 8.0, seed: str = "arena", seconds: float = 10.0
) -> AsyncIterator[Arena]:
    """A subnet with all honest miners and an adversary of each kind.

    timeout: of the tier. seed: of the challenges. seconds: that an adversary may take to get ready.
    """
    compressors = Compressors(embedded_model_path())
    known = read_tiers()
    tier = known.tiers[TIER].model_copy(update={"model": "condense-tiny", "timeout": timeout})
    schedule = tuple(entry.model_copy(update={"shares": {TIER: 1.0}}) for entry in known.schedule)
    tiers = known.model_copy(update={"tiers": {TIER: tier}, "schedule": schedule})
    world = World(miners=0)
    keys = {name: key(f"arena {name}") for name in (*HONEST, *kinds)}
    for own in keys.values():
        world.chain.register(NETUID, own.ss58_address)
    world.chain.advance(200)
    metagraph = await world.sees().metagraph()
    robbers = frozenset(keys[name].ss58_address for name in kinds if ADVERSARIES[name].robs)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        victim: Peer | None = None
        for name, own in keys.items():
            settings = GateSettings(requests_per_minute=1e6, allow=robbers if name == SOURCE else frozenset())
            gate = Gate(settings)
            gate.update(metagraph)
            nonces = SqliteNonceStore(folder / f"{own.ss58_address}.db")
            stack.callback(nonces.close)
            backend: Backend = GradedBackend(compressors, HONEST.get(name, HONEST[SOURCE]))
            if name in HONEST:
                miner = Miner(own, tiers, backend, gate, nonces)
                app: Any = create_miner_app(miner)
            else:
                good = GradedBackend(compressors, HONEST["fair"]) if name.startswith("mix-") else backend
                judge = compressors.of("select")
                means = Means(own, tiers, good, judge, gate, nonces, victim=victim, seconds=seconds)
                adversary, app = create(name, means)
                stack.push_async_callback(adversary.stop)
                miner = adversary
            await miner.start()
            port = await _served(stack, app, tiers)
            await world.sees(own).announce("127.0.0.1", port)
            if name == SOURCE:
                victim = Peer(own.ss58_address, f"127.0.0.1:{port}")
        client = await stack.enter_async_context(NeuronClient(world.validator, private=True, connections=256))
        ledger = Ledger(folder / "validator")
        stack.callback(ledger.close)
        supply = ReadableSupply(tiers, ProseWriter(), secret=seed)
        stack.push_async_callback(supply.aclose)
        judges = {tier.model: Judge(compressors.of("select"))}
        validator = Validator(world.sees(world.validator), client, tiers, judges, supply, ledger)
        names = {own.ss58_address: name for name, own in keys.items()}
        yield Arena(world, validator, tiers, compressors, names)


async def _served(stack: AsyncExitStack, app: Any, tiers: Tiers) -> int:
    """Serve an application until the stack ends; its port."""
    bound, started = bound_socket("127.0.0.1", 0), asyncio.Event()
    server = Server(app, limits=miner_limits(tiers), stop_seconds=0.0, started=started.set, signals=False)
    serving = asyncio.ensure_future(server.serve(sockets=[bound]))

    async def stop() -> None:
        server.should_exit = True
        await asyncio.wait({serving}, timeout=10)
        bound.close()

    stack.push_async_callback(stop)
    await asyncio.wait_for(started.wait(), 30)
    return int(bound.getsockname()[1])


# -- verdicts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether something holds, and by which numbers."""

    claim: str
    holds: bool
    numbers: str


def verdicts(arena: Arena, chain: Mapping[str, float], quality: Mapping[str, float], rounds: int) -> list[Verdict]:
    """What is to be proved. chain: the weights that were set. rounds: that were to be played."""
    earned, honest = arena.weights(), [name for name in HONEST if name != SOURCE]
    middle = median(earned[name] for name in honest)
    robbers = [name for name in earned if name in ADVERSARIES and ADVERSARIES[name].robs]
    shares = {name: earned[name] / middle for name in earned if name in ADVERSARIES and name not in robbers}
    worst = max(shares, key=lambda name: shares[name])
    alone, sharpness = Standing(), arena.tiers.tiers[TIER].sharpness
    for value in arena.scores(SOURCE, shared=False):
        alone = alone.after(value)
    group = [arena.validator.standing(TIER, arena.hotkey(name)) for name in (SOURCE, *robbers)]
    together = sum(standing**sharpness for standing in group) / alone.value**sharpness
    correlation = spearman([quality[name] for name in honest], [earned[name] for name in honest])
    counted = sum(played.counts for played in arena.rounds)
    failures = "".join(f"; {failure}" for failure in arena.failures[:3])
    return [
        Verdict(
            "nobody who does no work, or sends what is no answer, earns more than 5% of the honest median",
            shares[worst] <= HIGHEST_SHARE,
            f"{worst} has {shares[worst]:.1%}, the most of {len(shares)}",
        ),
        Verdict(
            "copiers and what they copy together earn no more than one honest miner",
            together <= 1.0,
            f"{len(robbers)} and their source {together:.1%} of it",
        ),
        Verdict(
            "honest miners are ordered by their true quality",
            correlation >= LEAST_CORRELATION,
            f"Spearman {correlation:.3f} of {len(honest)}",
        ),
        Verdict(
            "no round fails",
            not arena.failures and len(arena.rounds) == rounds,
            f"{len(arena.rounds)} of {rounds} played, {counted} counted{failures}",
        ),
        Verdict("the weights on the chain sum to 1", abs(sum(chain.values()) - 1) < 1e-6, f"{sum(chain.values()):.6f}"),
    ]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of ranks; equal values have the mean of their ranks."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]

    stacked = torch.tensor([ranks(one), ranks(other)], dtype=torch.float64)
    return float(torch.corrcoef(stacked)[0, 1])
