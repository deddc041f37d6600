"""The judge: the tier's LLM reads an answer, and full, no and a trivial context beside it, with the same questions.

An answer is read by the unmodified LLM through its embeddings. What the LLM says is compared with the right answer by
a fixed rule, so that nothing in an answer can talk to a judge.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import num_kept
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.architecture import decoder_parts
from condense_core.neurons.incentive.score import Reading, Reference, Score, failed, score
from condense_core.neurons.protocol.messages import Ask, MessageError, read_answer
from condense_core.neurons.tiers import Tier
from condense_core.tasks.answers import answers_about
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
        self._references: OrderedDict[bytes, Reference] = OrderedDict()

    @property
    def model_id(self) -> str:
        return self.condenser.model_id

    @property
    def width(self) -> int:
        return int(decoder_parts(self.condenser.model).embed_tokens.weight.shape[1])

    def context_tokens(self, text: str) -> int:
        """How many tokens a context has, as compressors count them."""
        return len(self.condenser.encode(text))

    def reference(self, ask: Ask, turns: Sequence[Turn]) -> Reference:
        """What answers to ``ask`` are measured against."""
        key = hashlib.sha256(repr((ask.text, ask.ratio, [(t.question, t.answer) for t in turns])).encode()).digest()
        if (known := self._references.get(key)) is None:
            trivial = [self.reading(soft, turns) for soft in trivial_compressions(self.condenser, ask.text, ask.ratio)]
            known = Reference(
                full=self.reading(ask.text, turns),
                none=self.reading("", turns),
                trivial=min(trivial, key=lambda reading: (sum(reading.losses), -sum(reading.correct))),
            )
            self._references[key] = known
            if len(self._references) > _REFERENCES:
                self._references.popitem(last=False)
        return known

    def reading(self, context: str | SoftTokens, turns: Sequence[Turn]) -> Reading:
        """How the LLM does on ``turns`` with a context."""
        self.readings += 1
        said = answers_about(self.condenser, context, turns, self.max_new_tokens)
        correct = [
            max(float(contained(text, right)) for right in turn.accepted)
            for text, turn in zip(said.texts, turns, strict=True)
        ]
        return Reading(tuple(said.losses), tuple(correct))

    def scores(
        self, answers: Mapping[str, tuple[bytes, float]], ask: Ask, tier: Tier, turns: Sequence[Turn]
    ) -> dict[str, tuple[Score, SoftTokens | None]]:
        """``score`` of each of several miners' answers: body and seconds, by hotkey."""
        return {hotkey: self.score(body, ask, tier, turns, seconds) for hotkey, (body, seconds) in answers.items()}

    def score(
        self, body: bytes, ask: Ask, tier: Tier, turns: Sequence[Turn], seconds: float
    ) -> tuple[Score, SoftTokens | None]:
        """The score of what a miner sent, and the soft tokens, to be compared with others'; None where it sent none.

        What is invalid or late is worth 0 and is not read.

        Args:
            body: from the wire. turns: that were drawn. seconds: until its last byte, as measured here.
        """
        if seconds > tier.timeout:
            return failed(f"late: {seconds:.2f} s, expected at most {tier.timeout:g}", seconds), None
        tokens = self.context_tokens(ask.text)
        try:
            soft = read_answer(body, ask, tier, context_tokens=tokens, model_id=self.model_id, width=self.width)
        except MessageError as error:
            return failed(str(error), seconds), None
        reference = self.reference(ask, turns)
        if not reference.is_telling:
            return failed("the challenge is not telling", seconds), soft
        found = score(
            self.reading(soft, turns), reference, tier, context_tokens=tokens, soft_tokens=len(soft), seconds=seconds
        )
        return found, soft


@torch.no_grad()
def trivial_compressions(condenser: Condenser, text: str, ratio: float) -> list[SoftTokens]:
    """Compressions that need no work: the first tokens' embeddings, and those of tokens at even distances."""
    ids, ratio = condenser.encode(text), int(ratio) if ratio == int(ratio) else ratio
    count = num_kept(len(ids), ratio)
    even = [min(len(ids) - 1, int(i * len(ids) / count)) for i in range(count)]
    embed = decoder_parts(condenser.model).embed_tokens
    made = []
    for kept in (ids[:count], [ids[i] for i in even]):
        rows_kept = embed(torch.tensor(kept, dtype=torch.long, device=embed.weight.device))
        made.append(
            SoftTokens(
                embeds=rows_kept,
                num_context_tokens=len(ids),
                ratio=ratio,
                model_id=condenser.model_id,
                model_digest=condenser.model_digest,
                method="select",
                context_sha256=hashlib.sha256(text.encode()).hexdigest(),
            )
        )
    return made
