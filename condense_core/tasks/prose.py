"""Prose that needs no corpus."""

from __future__ import annotations

import random


class ProseWriter:
    """Plain prose about a small town, written from a grammar: filler for tests and demos without a corpus."""

    _SUBJECTS = (
        "the postman|a traveller|the old gardener|her neighbour|the schoolteacher|a group of students|the baker|"
        "the night watchman|an engineer|the librarian|my uncle|the fisherman|a young painter|the council|the choir"
    ).split("|")
    _VERBS = (
        "walked past|looked at|wrote about|spoke of|remembered|painted|repaired|admired|avoided|measured|described|"
        "visited|drew a map of|complained about|told a story about"
    ).split("|")
    _OBJECTS = (
        "the market square|the long road to the coast|the river after the rain|an empty house|the first snow|"
        "the noise of the trains|a field of barley|the broken clock|the harvest|the new bus timetable|the hills|"
        "a box of letters|the smell of bread|the evening light|the price of coal"
    ).split("|")
    _ENDINGS = (
        "before breakfast|without a word|and nobody was surprised|for the third time that week|as people often do|"
        "because there was little else to do|while the rain went on|and then went home|with great patience|"
        "although the day was already late|which pleased everyone|until the lamps were lit"
    ).split("|")
    _OPENINGS = (
        "In the morning|Later that day|As usual|Some years ago|On the way back|To be honest|After a while|"
        "During the winter|Once more|By then"
    ).split("|")

    def __len__(self) -> int:
        return 100

    def document(self, index: int, num_sentences: int = 400) -> str:
        rng = random.Random(f"prose-{index}")
        paragraphs, sentences = [], []
        for _ in range(num_sentences):
            clause = f"{rng.choice(self._SUBJECTS)} {rng.choice(self._VERBS)} {rng.choice(self._OBJECTS)}"
            sentence = f"{clause} {rng.choice(self._ENDINGS)}." if rng.random() < 0.7 else f"{clause}."
            sentence = f"{rng.choice(self._OPENINGS)} {sentence}" if rng.random() < 0.4 else sentence
            sentences.append(sentence[0].upper() + sentence[1:])
            if rng.random() < 0.2:
                paragraphs.append(" ".join(sentences))
                sentences = []
        return "\n".join([*paragraphs, " ".join(sentences)]).strip()
