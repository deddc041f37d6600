"""The judge: the tier's LLM reads an answer, and full, no and trivial contexts beside it, with the same questions.

An answer is read by the unmodified LLM through its embeddings. What the LLM says is compared with the right answer by
a fixed rule, so that nothing in an answer can talk to a judge.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.architecture import decoder_parts
from condense_core.neurons.incentive.score import LEAST_RIGHT, Reading, Reference, Score, failed, score
from condense_core.neurons.judging.challenges import Challenge
from condense_core.neurons.judging.trivial import trivial_compressions
from condense_core.neurons.protocol.messages import Ask, MessageError, read_answer
from condense_core.neurons.tiers import Tier
from condense_core.tasks.answers import answers_about_many
from condense_core.tasks.generators import Turn
from condense_core.tasks.metrics import contained

MAX_NEW_TOKENS = 24
_REFERENCES = 64


class Judge:
    """One LLM that reads the answers of a tier's miners.

    It remembers the references of its latest challenges: full, none and trivial are read once for all miners.
    """

    def __init__(self, condenser: Condenser, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        """condenser: of the tier's whole model; its compressor is not used."""
        self.condenser, self.max_new_tokens = condenser, max_new_tokens
        self.readings = 0
        self._references: OrderedDict[bytes, tuple[tuple[Turn, ...], Reference]] = OrderedDict()

    @property
    def model_id(self) -> str:
        return self.condenser.model_id

    @property
    def width(self) -> int:
        return int(decoder_parts(self.condenser.model).embed_tokens.weight.shape[1])

    def context_tokens(self, text: str) -> int:
        """How many tokens a context has, as compressors count them."""
        return len(self.condenser.encode(text))

    def scores(
        self, answers: Mapping[str, tuple[bytes, float]], ask: Ask, tier: Tier, turns: Sequence[Turn]
    ) -> dict[str, tuple[Score, SoftTokens | None]]:
        """The scores of what miners sent, and the soft tokens, to be compared; None where a miner sent none.

        What is invalid or late is worth 0 and is not read; where nothing else came, neither are the references. Soft
        tokens that are the same are read once, the others side by side. A score does not depend on the others but in
        the last bits of a loss.

        Args:
            answers: by hotkey: the body from the wire, and the seconds until its last byte, as measured here.
            turns: that were drawn.
        """
        found: dict[str, tuple[Score, SoftTokens | None]] = {}
        valid: dict[str, SoftTokens] = {}
        tokens = self.context_tokens(ask.text)
        for hotkey, (body, seconds) in answers.items():
            try:
                valid[hotkey] = self._valid(body, ask, tier, seconds, tokens)
            except MessageError as error:
                found[hotkey] = failed(str(error), seconds), None
        if valid:
            reference = self.reference(ask, turns)
            readings = self._readings_by_hotkey(valid, turns) if reference.is_telling else {}
            for hotkey, soft in valid.items():
                seconds, counts = answers[hotkey][1], {"context_tokens": tokens, "soft_tokens": len(soft)}
                if hotkey in readings:
                    one = score(readings[hotkey], reference, tier, **counts, seconds=seconds)
                else:
                    one = failed("the challenge is not telling", seconds)
                found[hotkey] = one, soft
        return {hotkey: found[hotkey] for hotkey in answers}

    def score(
        self, body: bytes, ask: Ask, tier: Tier, turns: Sequence[Turn], seconds: float
    ) -> tuple[Score, SoftTokens | None]:
        """As ``scores``, of one answer."""
        return self.scores({"": (body, seconds)}, ask, tier, turns)[""]

    def telling(self, challenge: Challenge, questions: int) -> Challenge | None:
        """The challenge with those of its questions that the LLM gets right with the full context.

        None where these are fewer than ``questions``, or need no work: it would say nothing of an answer.
        """
        [full] = self.readings_of([challenge.ask.text], challenge.pool)
        right = [place for place, correct in enumerate(full.correct) if correct >= LEAST_RIGHT]
        if len(right) < questions:
            return None
        pool = tuple(challenge.pool[place] for place in right)
        if not self._referred(challenge.ask, pool, full.of(right)).is_telling:
            return None
        return replace(challenge, pool=pool)

    def reference(self, ask: Ask, turns: Sequence[Turn]) -> Reference:
        """What answers to ``ask`` are measured against; read once for all of them, and for all questions of a pool."""
        asked, known = self._references.get(_key(ask), ((), None))
        if known is None or not set(turns) <= set(asked):
            [full] = self.readings_of([ask.text], turns)
            return self._referred(ask, turns, full)
        self._references.move_to_end(_key(ask))
        return known.of([asked.index(turn) for turn in turns])

    def _referred(self, ask: Ask, turns: Sequence[Turn], full: Reading) -> Reference:
        """The reference of questions that were read with the full context, which is remembered."""
        trivial = trivial_compressions(self.condenser, ask.text, ask.ratio)
        none, *readings = self.readings_of(["", *trivial], turns)
        made = Reference(full, none, tuple(readings))
        self._references[_key(ask)] = tuple(turns), made
        self._references.move_to_end(_key(ask))
        if len(self._references) > _REFERENCES:
            self._references.popitem(last=False)
        return made

    def readings_of(self, contexts: Sequence[str | SoftTokens], turns: Sequence[Turn]) -> list[Reading]:
        """How the LLM does on ``turns`` with each of several contexts."""
        self.readings += len(contexts)
        found = []
        for said in answers_about_many(self.condenser, contexts, turns, self.max_new_tokens):
            correct = [
                max(float(contained(text, right)) for right in turn.accepted)
                for text, turn in zip(said.texts, turns, strict=True)
            ]
            found.append(Reading(tuple(said.losses), tuple(correct)))
        return found

    def _valid(self, body: bytes, ask: Ask, tier: Tier, seconds: float, tokens: int) -> SoftTokens:
        if seconds > tier.timeout:
            raise MessageError(f"late: {seconds:.2f} s, expected at most {tier.timeout:g}")
        model = {"model_id": self.model_id, "model_digest": self.condenser.model_digest, "width": self.width}
        return read_answer(body, ask, tier, context_tokens=tokens, **model)

    def _readings_by_hotkey(self, valid: Mapping[str, SoftTokens], turns: Sequence[Turn]) -> dict[str, Reading]:
        """Each different answer is read once."""
        keys = {hotkey: self._as_read(soft) for hotkey, soft in valid.items()}
        different = {keys[hotkey]: soft for hotkey, soft in valid.items()}
        readings = dict(zip(different, self.readings_of(list(different.values()), turns), strict=True))
        return {hotkey: readings[key] for hotkey, key in keys.items()}

    def _as_read(self, soft: SoftTokens) -> bytes:
        """A digest of what the LLM is given: the rows in its own dtype; of as many bytes are as many rows."""
        rows = soft.embeds.to(self.condenser.dtype).contiguous()
        return hashlib.sha256(rows.view(torch.uint8).numpy().data).digest()


def _key(ask: Ask) -> bytes:
    return hashlib.sha256(repr((ask.text, ask.ratio)).encode()).digest()
