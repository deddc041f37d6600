"""Challenges: texts with questions whose answers are known, drawn so that nobody can prepare for them.

What is sent is an ``Ask`` like any other. What will be asked is drawn from a pool once the answers are in, of facts in
several wordings and of the text's own sentences, so that an answer must keep all of its context.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from condense_core.neurons.protocol.messages import Ask
from condense_core.neurons.tiers import Tier, Tiers
from condense_core.tasks.facts import KINDS
from condense_core.tasks.generators import Task, Turn, insert_facts, running_text
from condense_core.tasks.sources import TextSource
from condense_core.tasks.wording import LONGEST_STATEMENT, draw_worded_facts

RATIOS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""That most challenges, as applications, ask for, as far as the tier allows."""
ANY_RATIO_SHARE = 0.25
"""Of challenges ask for any whole ratio, as applications do that say how many soft tokens they want."""
ASKED_SHARE = 0.25
"""Of challenges come with a question, as organic requests do; it is none of the pool's."""
_CLOZES = 4
_MOST_FACTS = 24
_MOST_ASKED = 10  # of the facts; the others are there to be kept as well
_LONGEST_SENTENCE = 200  # characters that a cut at the end of a sentence may take
_SENTENCE = re.compile(r"[A-Z][^.!?\n]{30,160}[.!?](?=\s|$)")
_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_LAST_WORDS = 3


@dataclass(frozen=True)
class Challenge:
    """A request, and what may be asked about its context.

    Attributes:
        tier: its name. ask: what miners are sent. pool: questions with their right answers.
    """

    tier: str
    ask: Ask
    pool: tuple[Turn, ...]

    def drawn(self, count: int, secret: str) -> tuple[Turn, ...]:
        """The questions that are asked, once the answers are in: the same for all miners compared.

        secret: of this round, unknown to everybody until then.
        """
        rng = random.Random(f"questions-{secret}-{self.ask.text}")
        return tuple(rng.sample(self.pool, min(count, len(self.pool))))


def challenge(tiers: Tiers, tier: str, source: TextSource, *, secret: str, index: int) -> Challenge:
    """Challenge number ``index`` of a tier, over running text with inserted facts.

    Whoever knows the secret and has the text makes the same one: a round can be computed again from its log.
    """
    limits, rng = tiers.tiers[tier], random.Random(f"challenge-{secret}-{tier}-{index}")
    length = rng.randint(min(limits.min_chars + _LONGEST_SENTENCE, limits.max_chars), limits.max_chars)
    wording = rng.choice(sorted(LONGEST_STATEMENT))
    count = min(_MOST_FACTS, max(1, 3 * length // (4 * LONGEST_STATEMENT[wording])))
    facts = draw_worded_facts(wording, count, rng, split="eval", kinds=KINDS)
    added = sum(len(fact.statement) + 1 for fact in facts)
    own = whole_sentences(running_text(source, rng, length - added), limits.min_chars - added)
    text = insert_facts(own, facts, rng)
    some = rng.sample(facts, min(_MOST_ASKED, len(facts)))
    asked = tuple(Turn(fact.question, fact.answer, fact.kind) for fact in some)
    return _made(tier, limits, text, (*asked, *clozes(text, _CLOZES, rng)), rng)


def challenge_of(tiers: Tiers, tier: str, task: Task, *, secret: str) -> Challenge | None:
    """A challenge over questions that people asked, such as of ``squad_tasks``; None where its text does not fit."""
    limits, rng = tiers.tiers[tier], random.Random(f"challenge-{secret}-{tier}-{task.context}")
    if not limits.min_chars <= len(task.context) <= limits.max_chars:
        return None
    return _made(tier, limits, task.context, (*task.turns, *clozes(task.context, _CLOZES, rng)), rng)


def whole_sentences(text: str, min_chars: int) -> str:
    """``text`` up to the end of its last sentence, where that leaves so many characters.

    A text that breaks off in a word would be known for one that was cut to a length.
    """
    ends = [found.end() for found in _END.finditer(text) if found.end() >= min_chars]
    return text[: ends[-1]] if ends else text


def clozes(text: str, count: int, rng: random.Random) -> list[Turn]:
    """Questions for the last words of sentences of a text, each of which begins like no other sentence of it."""
    sentences = _SENTENCE.findall(text)
    turns = []
    for sentence in rng.sample(sentences, len(sentences)):
        words = sentence.rstrip(".!?").split(" ")
        if len(words) < 2 * _LAST_WORDS + 2:
            continue
        begin, end = " ".join(words[:-_LAST_WORDS]), " ".join(words[-_LAST_WORDS:])
        if text.count(begin) == 1:
            turns.append(Turn(f'In the text, how does this sentence end? "{begin} ..."', end, "cloze"))
        if len(turns) == count:
            break
    return turns


def _made(tier: str, limits: Tier, text: str, pool: Sequence[Turn], rng: random.Random) -> Challenge:
    allowed = [ratio for ratio in RATIOS if limits.min_ratio <= ratio <= limits.max_ratio] or [limits.min_ratio]
    question, left = None, list(pool)
    if len(left) > 1 and rng.random() < ASKED_SHARE:
        question = left.pop(rng.randrange(len(left))).question[: limits.max_question_chars]
    ratio = rng.choice(allowed)
    if rng.random() < ANY_RATIO_SHARE:
        ratio = float(rng.randint(math.ceil(limits.min_ratio), max(math.ceil(limits.min_ratio), int(limits.max_ratio))))
    ask = Ask(tier=tier, text=text, ratio=min(ratio, limits.max_ratio), question=question)
    return Challenge(tier, ask, tuple(left))
