"""What is asked of a server: lengths of a distribution or of a recorded mix, and texts of which none comes twice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from condense_core.compressor.config import COMPRESSION_METHODS, check_ratio
from condense_core.files.text import decode_text
from condense_core.tasks.prose import ProseWriter

CHARS = (500, 7000)
"""Lengths of the built-in mix."""
MIN_CHARS, MAX_CHARS = 50, 2**21
_RECENT = 50  # a request that comes again is one of so many before it, which a server may still know
_DOCUMENTS = 8  # of prose, of about 25,000 characters each, that texts are cut from


@dataclass(frozen=True)
class Shape:
    """What a request asks, without its text; None: what the run, or else the server, takes."""

    chars: int
    method: str | None = None
    ratio: float | None = None
    question: str | None = None


class Mix(Protocol):
    """A distribution of shapes."""

    def draw(self, rng: Random) -> Shape:
        """One of them."""

    def describe(self) -> dict[str, Any]:
        """What a record says of it."""


@dataclass(frozen=True)
class LogUniform:
    """Lengths whose logarithm is uniform, so that short texts are more frequent than long ones.

    From 500 to 7,000 characters, half have at most 1,871, and the mean is 2,463.
    """

    least: int = CHARS[0]
    most: int = CHARS[1]

    def draw(self, rng: Random) -> Shape:
        return Shape(round(math.exp(rng.uniform(math.log(self.least), math.log(self.most)))))

    def describe(self) -> dict[str, Any]:
        return {"lengths": "log-uniform", "chars": [self.least, self.most]}


class RecordedMix:
    """Shapes with weights."""

    def __init__(self, shapes: list[Shape], weights: list[float], name: str) -> None:
        """Of at least one shape; name: for records."""
        self.shapes, self.weights, self.name = shapes, weights, name

    @classmethod
    def load(cls, path: Path) -> RecordedMix:
        """Read JSON lines ``{"chars": n, "method": ..., "ratio": ..., "question": ..., "weight": ...}``.

        All but ``chars`` may be missing; a weight is 1 by default.

        Raises:
            ValueError: a line is none of these; the message names it. OSError: there is no such file.
        """
        shapes, weights = [], []
        for number, line in enumerate(decode_text(path.read_bytes(), str(path)).splitlines(), 1):
            if line.strip():
                try:
                    shape, weight = _parsed(line)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"mix: {path}, line {number}: {error}") from None
                shapes.append(shape)
                weights.append(weight)
        if not sum(weights):
            raise ValueError(f"mix: {path} has no line with a weight above 0, expected at least one")
        return cls(shapes, weights, path.name)

    def draw(self, rng: Random) -> Shape:
        return rng.choices(self.shapes, self.weights)[0]

    def describe(self) -> dict[str, Any]:
        lengths = [shape.chars for shape in self.shapes]
        return {"file": self.name, "shapes": len(self.shapes), "chars": [min(lengths), max(lengths)]}


class Requests:
    """The requests of a run by their number, each as the JSON that is sent.

    What a request asks depends on the seed and its number alone. Its text begins with both the number and a salt, so
    that a server that keeps results knows none of them, not even from an earlier run.
    """

    def __init__(
        self,
        mix: Mix,
        *,
        seed: int,
        salt: str,
        timeout: float,
        method: str | None = None,
        ratio: float | None = None,
        repeat: float = 0.0,
    ) -> None:
        """Requests with texts of the built-in prose.

        Args:
            timeout: seconds that the server is given for each.
            method, ratio: for shapes that have none.
            repeat: share of the requests that ask again what one of the 50 before them asked; below 1.
        """
        self._mix, self._seed, self._salt, self._repeat = mix, seed, salt, repeat
        self._defaults: dict[str, Any] = {"method": method, "ratio": ratio, "timeout": timeout}
        self._prose = "\n".join(ProseWriter().document(i) for i in range(_DOCUMENTS)) + "\n"
        self._starts = [i + 2 for i in range(len(self._prose) - 2) if self._prose.startswith(". ", i)]

    def fields(self, number: int) -> dict[str, Any]:
        """What request ``number`` says."""
        while True:
            rng = Random(f"{self._seed}-{number}")
            if number == 0 or rng.random() >= self._repeat:
                break
            number = rng.randrange(max(number - _RECENT, 0), number)
        shape = self._mix.draw(rng)
        opening = f"Note {self._salt}-{number}. "
        start = rng.choice(self._starts)
        text = opening + self._prose[start : start + shape.chars]
        while len(text) < shape.chars:
            text += self._prose
        asked = {"method": shape.method, "ratio": shape.ratio, "question": shape.question}
        given = self._defaults | {name: value for name, value in asked.items() if value is not None}
        return {"text": text[: shape.chars]} | {name: value for name, value in given.items() if value is not None}

    def body(self, number: int) -> bytes:
        """The same as bytes of JSON."""
        return json.dumps(self.fields(number)).encode()


def poisson_times(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start to each arrival, without end: gaps are exponential, 1 / ``rate`` seconds in the mean."""
    rng, at = Random(f"arrivals-{seed}"), 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


def _parsed(line: str) -> tuple[Shape, float]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError('expected a JSON object such as {"chars": 2000}')
    known = {"chars", "method", "ratio", "question", "weight"}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown field {unknown[0]!r:.60}, expected some of {', '.join(sorted(known))}")
    chars, method, question, weight = (fields.get(name) for name in ("chars", "method", "question", "weight"))
    if type(chars) is not int or not MIN_CHARS <= chars <= MAX_CHARS:
        raise ValueError(f"chars: got {chars!r:.40}, expected an integer from {MIN_CHARS} to {MAX_CHARS:,}")
    if method is not None and method not in COMPRESSION_METHODS:
        raise ValueError(f"method: got {method!r:.60}, expected one of {', '.join(COMPRESSION_METHODS)}")
    if question is not None and not (isinstance(question, str) and question.strip()):
        raise ValueError(f"question: got {question!r:.60}, expected a text that is not empty")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"weight: got {weight!r:.40}, expected a number of at least 0")
    ratio = None if fields.get("ratio") is None else check_ratio(fields["ratio"])
    return Shape(chars, method, ratio, question), float(weight)
