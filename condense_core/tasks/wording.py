"""Facts in varied wording: entities of ten types, fifty relations, statements and questions in many sentence forms.

``facts.draw_facts`` writes every fact in one of ten sentence frames, which a model can learn by heart. Here a relation
has words of its own ("was elected mayor of", "is twinned with") beside general frames, and a sentence may have a lead
("according to the local paper,") and a tail. The splits share nothing that can be learned by heart: an entity, a value,
and the frame of a statement or a question that occur in one of them never occur in the other. Nouns ("access code")
are shared, since a question must name what it asks for.

What facts are made of stands in ``wording.txt``.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from importlib.resources import files
from typing import Any, Literal, get_args

from condense_core.tasks.facts import KINDS, Fact, Split, draw_facts, split_of

Wording = Literal["plain", "varied"]
WORDINGS: tuple[str, ...] = get_args(Wording)

#: One frame of a sentence in this many belongs to the ``eval`` split.
_EVAL_FRAMES_ONE_IN = 3
#: Share of facts in a relation's own words ("is twinned with"); the others name it by a noun ("the twin town of"). A
#: small LLM finds the former rarely among facts of the same kind.
_OWN_WORDS = 0.2
#: A statement whose value stands behind its entity is drawn so many times as often as one whose value stands before.
_NEW_BEHIND_KNOWN = 4
#: Characters of the longest statement of either wording, and room for a space behind it.
LONGEST_STATEMENT = {"plain": 100, "varied": 180}

_MONTHS = ("January February March April May June July August September October November December").split()
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True)
class Group:
    """Statements that say a thing in the same words ("founded"), and the questions that use these.

    A statement that begins with ``!`` takes no lead and no tail. Without questions, the relation's first noun is asked
    for.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def split(self) -> Split:
        """Of all its frames."""
        return frame_split((self.questions or self.statements)[0])


@dataclass(frozen=True)
class Relation:
    """What can be said of the entities of one type.

    Attributes:
        entity_type: such as ``town``; a key of ``_ENTITIES``.
        attribute: its name, such as ``access code``; unique within a type.
        kind: one of ``facts.KINDS``.
        form: of its values: the name of a form, then its arguments.
        nouns: words for it, which general frames use.
        groups: frames of its own.
    """

    entity_type: str
    attribute: str
    kind: str
    form: tuple[str, ...]
    nouns: tuple[str, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Tables:
    """The content of ``wording.txt``: relations, and lists by name."""

    relations: tuple[Relation, ...]
    lists: dict[str, tuple[str, ...]]


@lru_cache(maxsize=1)
def tables() -> Tables:
    """What facts in varied wording are made of, read once."""
    relations: list[Relation] = []
    lists: dict[str, tuple[str, ...]] = {}
    text = files("condense_core.tasks").joinpath("wording.txt").read_text(encoding="utf-8")
    for section in text.partition("\n[")[2].split("\n["):
        title, *lines = (line for line in section.splitlines() if line)
        title = title.removesuffix("]")
        if "|" in title:
            entity_type, attribute, kind, form = (part.strip() for part in title.split("|"))
            nouns = next(line for line in lines if line.startswith("="))
            relations.append(
                Relation(
                    entity_type=entity_type,
                    attribute=attribute,
                    kind=kind,
                    form=tuple(form.split()),
                    nouns=tuple(noun.strip() for noun in nouns[1:].split(";")),
                    groups=tuple(_group(part.splitlines()) for part in "\n".join(lines).split("\n-\n")[1:]),
                )
            )
        elif title in ("statements", "questions", "leads", "tails"):
            lists[title] = tuple(line.removeprefix("? ") for line in lines)
        else:
            words = ";".join(lines).split(";") if ";" in "".join(lines) else " ".join(lines).split()
            lists[title] = tuple(word.strip() for word in words if word.strip())
    return Tables(tuple(relations), lists)


def frame_split(frame: str) -> Split:
    """The split that the frame of a sentence belongs to; a function of its text alone."""
    digest = hashlib.blake2s(frame.removeprefix("!").strip().encode(), digest_size=4).digest()
    return "eval" if int.from_bytes(digest, "big") % _EVAL_FRAMES_ONE_IN == 0 else "train"


def _group(lines: Sequence[str]) -> Group:
    questions = tuple(line.removeprefix("? ") for line in lines if line[0] == "?")
    return Group(tuple(line for line in lines if line[0] != "?"), questions)


@cache
def frames(what: str, split: Split) -> tuple[str, ...]:
    """The general frames of a split; what: ``statements``, ``questions``, ``leads`` or ``tails``."""
    return tuple(frame for frame in tables().lists[what] if frame_split(frame) == split)


@cache
def groups_of(relation: Relation, split: Split) -> tuple[Group, ...]:
    """The groups of frames of ``relation`` that belong to a split; there may be none."""
    return tuple(group for group in relation.groups if group.split == split)


# -- entities and values -----------------------------------------------------------------------------------------------


class _Words:
    """Names and values out of the lists, drawn by ``rng``; the entity types and the forms of values are its methods."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def one_of(self, name: str) -> str:
        return self.rng.choice(tables().lists[name])

    def surname(self) -> str:
        return self.one_of("surname heads") + self.one_of("surname tails")

    def coined(self) -> str:
        return "".join(self.one_of("syllables") for _ in range(self.rng.choice((2, 3)))).capitalize()

    def pair(self) -> str:
        return f"{self.one_of('adjectives')} {self.one_of('nouns')}"

    def town_or_surname(self) -> str:
        return self.town() if self.rng.random() < 0.5 else self.surname()

    def person(self) -> str:
        return f"{self.one_of('given names')} {self.surname()}"

    def town(self) -> str:
        name = self.one_of("town heads") + self.one_of("town tails")
        return f"{self.rng.choice(('Port', 'Upper', 'Lower', 'Great'))} {name}" if self.rng.random() < 0.1 else name

    def ship(self) -> str:
        return f"the {self.one_of('ship kinds')} {self.pair()}" if self.rng.random() < 0.6 else f"the {self.pair()}"

    def institution(self) -> str:
        return f"the {self.town_or_surname()} {self.one_of('institution kinds')}"

    def company(self) -> str:
        if self.rng.random() < 0.2:
            return f"{self.surname()} & {self.surname()}"
        name = self.coined() if self.rng.random() < 0.5 else self.surname()
        return f"{name} {self.one_of('company kinds')}"

    def product(self) -> str:
        number = f" {self.rng.randrange(100, 9900, 10)}" if self.rng.random() < 0.5 else ""
        return f"the {self.coined()}{number} {self.one_of('product kinds')}"

    def book(self) -> str:
        several = f"The {self.one_of('nouns')} and the {self.one_of('nouns')}"
        title = f"The {self.pair()}" if self.rng.random() < 0.5 else several
        return f'the {self.rng.choice(("novel", "book"))} "{title}"'

    def bridge(self) -> str:
        return f"the {self.town_or_surname()} {self.one_of('bridge kinds')}"

    def project(self) -> str:
        return self.rng.choice(("Project {}", "Operation {}", "the {} project")).format(self.pair())

    def train(self) -> str:
        name = self.town() if self.rng.random() < 0.5 else self.one_of("adjectives")
        return f"the {name} {self.one_of('train kinds')}"

    def digits(self) -> str:
        return str(self.rng.randint(1000, 9999))

    def code(self) -> str:
        rng = self.rng
        first, second = rng.choice(_LETTERS), rng.choice(_LETTERS)
        return rng.choice(
            (
                f"{first}{rng.randint(1000, 9999)}",
                f"{first}{second}-{rng.randint(1000, 9999)}",
                f"{rng.randint(10, 99)}-{rng.randint(100, 999)}",
                f"{first}{rng.randint(1, 9)}-{rng.randint(100, 999)}",
            )
        )

    def letters(self) -> str:
        word, number = self.coined(), self.rng.randint(10, 99)
        return self.rng.choice((word.upper(), f"{word.lower()}{number}", f"{word}-{number}"))

    def date(self) -> str:
        day, month, year = self.rng.randint(1, 28), self.rng.choice(_MONTHS), self.rng.randint(1700, 2020)
        return f"{day} {month} {year}"

    def year(self) -> str:
        return str(self.rng.randint(1400, 2020))

    def time(self) -> str:
        return f"{self.rng.randint(5, 23)}:{self.rng.randint(0, 59):02d}"

    def number(self, low: str, high: str, _unit: str = "") -> str:
        return str(self.rng.randint(int(low), int(high)))

    def money(self, low: str, high: str) -> str:
        step = 10 ** (len(low) - 2)
        return str(self.rng.randrange(int(low), int(high), step))


def _drawn(draw: Callable[[], str], split: Split) -> str:
    while split_of(text := draw()) != split:
        pass
    return text


def _value(relation: Relation, words: _Words, split: Split) -> tuple[str, str, str]:
    """A value of ``split``: as the answer, in the relation's own frames, and in general ones.

    The split is that of the plain value: 48210 and 48,210, or 3 May 1921 and May 3, 1921, are never in different ones.
    """
    form, *arguments = relation.form
    plain = _drawn(partial(getattr(words, "number" if form in ("count", "measure") else form), *arguments), split)
    if form == "date" and words.rng.random() < 0.4:
        day, month, year = plain.split()
        plain = f"{month} {day}, {year}"
    if form not in ("count", "measure", "money"):
        return plain, plain, plain
    number = f"{int(plain):,}"
    if form == "count":  # the unit says nothing that the question does not say
        return number, f"{number} {arguments[-1]}", number
    text = f"{number} {arguments[-1]}" if form == "measure" else f"${number}"
    return text, text, text


# -- sentences ---------------------------------------------------------------------------------------------------------


def _capitalized(text: str) -> str:
    return re.sub(r"(^|[?] )([a-z])", lambda found: found[1] + found[2].upper(), text)


def _weight(frame: str) -> int:
    """How often a frame is drawn beside others: what is new stands behind what is known in most English sentences."""
    return 1 if frame.find("{v}") < frame.find("{e}") else _NEW_BEHIND_KNOWN


def _chosen(statements: Sequence[str], rng: random.Random) -> str:
    return rng.choices(statements, weights=[_weight(frame) for frame in statements])[0]


def _sentence(frame: str, filled: Callable[[str], str], rng: random.Random, split: Split) -> str:
    """A statement, with a lead and a tail at times where its frame takes them."""
    text = filled(frame.removeprefix("!").strip())
    lead, tail = rng.random() < 0.2, rng.random() < 0.1
    if not frame.startswith("!"):
        if lead:
            text = f"{rng.choice(frames('leads', split))} {text}"
        if tail:
            text = f"{text.removesuffix('.')}, {rng.choice(frames('tails', split))}."
    return _capitalized(text)


def _fact(relation: Relation, entity: str, words: _Words, split: Split) -> Fact:
    """A fact in a group of the relation's own frames or in general ones; the question uses the statement's words."""
    rng = words.rng
    answer, of_own, of_general = _value(relation, words, split)
    groups = groups_of(relation, split)
    group = None
    if groups and rng.random() < _OWN_WORDS:
        group = rng.choices(groups, weights=[max(map(_weight, group.statements)) for group in groups])[0]
    noun = relation.nouns[0] if group else rng.choice(relation.nouns)

    def filled(frame: str) -> str:
        its = "their" if relation.entity_type == "person" else "its"
        what = "who" if relation.form == ("person",) else "what"
        if entity.endswith("s"):
            frame = frame.replace("{e}'s", "{e}'")
        names = {"its": its, "Its": its.capitalize(), "what": what, "What": what.capitalize()}
        return frame.format(e=entity, v=of_own if group else of_general, a=noun, **names)

    frame = _chosen(group.statements if group else frames("statements", split), rng)
    asked = rng.choice((group and group.questions) or frames("questions", split))
    statement = _sentence(frame, filled, rng, split)
    while len(statement) >= LONGEST_STATEMENT["varied"]:
        statement = _sentence(frame, filled, rng, split)
    return Fact(
        kind=relation.kind,
        attribute=relation.attribute,
        entity=entity,
        answer=answer,
        statement=statement,
        question=_capitalized(filled(asked)),
    )


def draw_varied_facts(
    count: int,
    rng: random.Random,
    *,
    split: Split = "eval",
    kinds: tuple[str, ...] = KINDS,
    relatedness: float = 0.4,
) -> list[Fact]:
    """As ``facts.draw_facts``, in varied wording; entities, values and frames are those of ``split``.

    Raises:
        ValueError: a split or a kind that there is not.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(get_args(Split))}")
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds: got {', '.join(kinds) or 'none'}, expected some of {', '.join(KINDS)}")
    words = _Words(rng)
    known = {kind: tuple(r for r in tables().relations if r.kind == kind) for kind in kinds}
    drawn: dict[tuple[str, str], tuple[Relation, Fact]] = {}
    while len(drawn) < count:
        relation = rng.choice(known[rng.choice(kinds)])
        entity = _drawn(getattr(words, relation.entity_type), split)
        if drawn and rng.random() < relatedness:
            other, fact = rng.choice(list(drawn.values()))
            if rng.random() < 0.5:
                relation = rng.choice(
                    [r for r in tables().relations if r.entity_type == other.entity_type and r.kind in kinds]
                )
                entity = fact.entity
            else:
                relation = other
                entity = _drawn(getattr(words, relation.entity_type), split)
        if (relation.attribute, entity) not in drawn:
            fact = _fact(relation, entity, words, split)
            drawn[fact.key] = (relation, fact)
    return [fact for _, fact in drawn.values()]


_DRAW: dict[str, Callable[..., list[Fact]]] = {"plain": draw_facts, "varied": draw_varied_facts}


def draw_worded_facts(wording: str, count: int, rng: random.Random, **options: Any) -> list[Fact]:
    """``count`` facts in the wording of a name; options as ``facts.draw_facts`` takes them.

    Raises:
        ValueError: there is no such wording; else as ``draw_facts``.
    """
    if wording not in _DRAW:
        raise ValueError(f"wording: got {wording!r}, expected one of {', '.join(WORDINGS)}")
    return _DRAW[wording](count, rng, **options)
