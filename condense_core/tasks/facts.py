"""Facts with a known answer: who keeps the north archive, the serial number of the amber engine.

A fact is a statement that can stand anywhere in running text, a question about it and the answer. Everything that must
be *retrieved* rather than guessed is drawn from a large vocabulary that is split by hash: an entity or value of the
``eval`` split never occurs in a ``train`` fact, so a model that answers has read its context.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

Split = Literal["train", "eval"]
KINDS = ("name", "code", "date", "place", "amount")

#: One entity or value in this many belongs to the ``eval`` split.
_EVAL_ONE_IN = 5


@dataclass(frozen=True)
class Fact:
    """One retrievable fact; ``key`` (attribute, entity) is what makes it unique within a context."""

    kind: str
    attribute: str
    entity: str
    answer: str
    statement: str
    question: str

    @property
    def key(self) -> tuple[str, str]:
        return (self.attribute, self.entity)


def split_of(text: str) -> Split:
    """The split that an entity or value belongs to; a function of its text alone."""
    digest = hashlib.blake2s(text.encode(), digest_size=4).digest()
    return "eval" if int.from_bytes(digest, "big") % _EVAL_ONE_IN == 0 else "train"


_ADJECTIVES = (
    "amber ancient autumn basalt bitter blue brass bright broken bronze calm cedar cobalt copper coral crimson "
    "crooked crystal desert distant dusty eastern ebony emerald empty fallen foggy forgotten frozen gilded golden "
    "granite green grey hidden hollow indigo inner iron ivory jade little lonely lower marble misty narrow new "
    "northern oaken old olive outer pale pearl quiet red royal rusty sacred sandy scarlet silent silver slate "
    "southern stone sunken twin upper velvet violet western white wild winter wooden yellow"
).split()
_NOUNS = (
    "abbey academy archive armory arsenal bakery balcony barge barn beacon bridge brewery cabin canal castle cave "
    "cellar chapel clinic clock college cottage dam depot dock engine factory farm ferry forge fort fountain gallery "
    "garden garrison gate glacier granary harbor hangar hospital hotel island kiln laboratory lagoon library "
    "lighthouse lodge market mill mine monastery museum observatory orchard palace pavilion pier printer quarry "
    "railway reactor refinery reservoir sawmill school shipyard shrine stable stadium statue station tavern telescope "
    "temple theater tower tunnel turbine vault vessel viaduct village vineyard warehouse well windmill workshop"
).split()
_GIVEN = (
    "Ada Alan Anna Arno Bela Carl Clara Cora Dora Edgar Elsa Emil Erik Eva Felix Flora Greta Hans Hugo Ida Igor Irma "
    "Jonas Karin Lars Lena Leo Lydia Marta Max Mira Nora Olga Oscar Otto Paula Petra Ralph Rosa Ruth Selma Stella "
    "Theo Tilda Udo Vera Viktor Wanda Wilma Yves"
).split()
_SURNAME_HEADS = (
    "Alder Bal Bar Bel Bran Cal Car Dal Dor Eld Fal Fen Gar Gol Hal Har Hol Kel Kor Lan Lor Mal Mar Mel Mor Nor Or "
    "Pel Quin Ral Ros Sal San Sel Tal Tor Val Var Vel Wal Wen Zan"
).split()
_SURNAME_TAILS = (
    "bach berg brook by den der dorf feld field ford gard ham hart holm hurst ing kin land ley man mark mont more "
    "ner quist son stein strom ton vale vik wood worth"
).split()
_PLACE_HEADS = (
    "Ab Ar As Bor Bre Cas Cor Cre Dun El Es Fer Gan Glen Gri Hav Il Jor Kal Kes Lin Lus Mer Mon Nar Nev Ol Os Pal "
    "Per Ras Rin Sar Sol Ter Tri Ul Ur Ves Vin Wes Yar Zel"
).split()
_PLACE_TAILS = (
    "adia amar anda aria avia bury dale dria elle endo eria esta etta gate haven ilia inia issa mere minster mouth "
    "ona onia oria ossa port stead ula una ville wick"
).split()
_MONTHS = ("January February March April May June July August September October November December").split()
_UNITS = "barrels bushels coins crates crowns dollars gallons kilograms liters meters miles pounds sacks tons".split()

_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "name": ("keeper", "architect", "owner", "founder", "warden", "inspector", "manager", "patron"),
    "code": ("access code", "serial number", "call sign", "file number", "locker code", "permit number"),
    "date": (
        "opening date",
        "closing date",
        "inspection date",
        "founding date",
        "repair date",
        "delivery date",
    ),
    "place": (
        "home town",
        "sister town",
        "supply port",
        "place of origin",
        "mailing address",
        "nearest city",
    ),
    "amount": ("price", "weight", "budget", "capacity", "daily output", "annual rent", "length", "reserve"),
}
_STATEMENTS = (
    "The {attribute} of {entity} is {answer}.",
    "The {attribute} for {entity} is {answer}.",
    "For {entity}, the {attribute} is {answer}.",
    "As for {entity}, the {attribute} was {answer}.",
    "Note that the {attribute} of {entity} is {answer}.",
    "According to the records, the {attribute} of {entity} was {answer}.",
    "Everyone agrees that the {attribute} of {entity} is {answer}.",
    "In the case of {entity}, the {attribute} is {answer}.",
    "Since last year the {attribute} of {entity} has been {answer}.",
    "At {entity}, the {attribute} has long been {answer}.",
)
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": ("Who is the {attribute} of {entity}?", "Name the {attribute} of {entity}."),
    "code": ("What is the {attribute} of {entity}?", "Which {attribute} belongs to {entity}?"),
    "date": ("What is the {attribute} of {entity}?", "On which day is the {attribute} of {entity}?"),
    "place": ("What is the {attribute} of {entity}?", "Where is the {attribute} of {entity}?"),
    "amount": ("What is the {attribute} of {entity}?", "How much is the {attribute} of {entity}?"),
}
_ANY_QUESTION = ("Tell me the {attribute} of {entity}.", "For {entity}, what is the {attribute}?")


def _draw_value(kind: str, rng: random.Random) -> str:
    if kind == "name":
        return f"{rng.choice(_GIVEN)} {rng.choice(_SURNAME_HEADS)}{rng.choice(_SURNAME_TAILS)}"
    if kind == "code":
        return f"{rng.choice('ABCDEFGHJKLMNPQRSTUVWXYZ')}{rng.randint(1000, 9999)}"
    if kind == "date":
        return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1700, 2020)}"
    if kind == "place":
        return f"{rng.choice(_PLACE_HEADS)}{rng.choice(_PLACE_TAILS)}"
    if kind == "amount":
        return f"{rng.randint(11, 9999)} {rng.choice(_UNITS)}"
    raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")


def _draw_entity(rng: random.Random) -> str:
    return f"the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"


def _of_split(draw: Callable[[], str], split: Split) -> str:
    """Draw until the text falls into ``split`` (five draws on average for ``eval``)."""
    while split_of(text := draw()) != split:
        pass
    return text


def draw_facts(
    count: int,
    rng: random.Random,
    *,
    split: Split = "eval",
    kinds: tuple[str, ...] = KINDS,
    relatedness: float = 0.4,
) -> list[Fact]:
    """``count`` facts with distinct (attribute, entity) keys.

    With probability ``relatedness`` a fact shares its entity or its attribute with an earlier one, so that neither the
    entity nor the attribute alone leads to the answer.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(get_args(Split))}")
    facts: list[Fact] = []
    seen: set[tuple[str, str]] = set()
    while len(facts) < count:
        kind = rng.choice(kinds)
        attribute = rng.choice(_ATTRIBUTES[kind])
        entity = _of_split(partial(_draw_entity, rng), split)
        if facts and rng.random() < relatedness:
            other = rng.choice(facts)
            if rng.random() < 0.5:
                entity = other.entity
            else:
                kind, attribute = other.kind, other.attribute
        if (attribute, entity) in seen:
            continue
        seen.add((attribute, entity))
        answer = _of_split(partial(_draw_value, kind, rng), split)
        fields = {"attribute": attribute, "entity": entity, "answer": answer}
        facts.append(
            Fact(
                kind=kind,
                statement=rng.choice(_STATEMENTS).format(**fields),
                question=rng.choice(_QUESTIONS[kind] + _ANY_QUESTION).format(**fields),
                **fields,
            )
        )
    return facts


def vocabulary_text(seed: int, count: int) -> list[str]:
    """Train-split statements, questions and answers, for training a tokenizer that knows the vocabulary's pieces."""
    facts = draw_facts(count, random.Random(seed), split="train")
    return [f"{fact.statement} {fact.question} {fact.answer}" for fact in facts]
