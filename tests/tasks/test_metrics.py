"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from condense_core.tasks.metrics import exact_match, normalize, recovered, token_f1

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Old  Mill.", ["old", "mill"]),
        ("an apple, a day", ["apple", "day"]),
        ("A1234!", ["a1234"]),
        ("12,500 crowns", ["12500", "crowns"]),
        (" \n", []),
        ("the", []),
        ("Theodor Anders", ["theodor", "anders"]),
    ],
)
def test_normalize(text: str, words: list[str]) -> None:
    assert normalize(text) == words


@pytest.mark.parametrize(
    ("prediction", "answer", "match"),
    [
        ("ada alder.", "Ada Alder", 1.0),
        ("the Ada Alder", "Ada Alder", 1.0),
        ("Alder Ada", "Ada Alder", 0.0),
        ("Ada Alder Alder", "Ada Alder", 0.0),
        ("Ada", "Ada Alder", 0.0),
        ("", "Ada Alder", 0.0),
        ("", "the", 1.0),
    ],
)
def test_exact_match(prediction: str, answer: str, match: float) -> None:
    assert exact_match(prediction, answer) == match


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [
        ("Ada Alder", "ada alder", 1.0),
        ("Alder Ada", "Ada Alder", 1.0),  # a bag of words
        ("Ada", "Ada Alder", 2 / 3),  # precision 1, recall 1/2
        ("Ada Alder of Abadia now", "Ada Alder", 4 / 7),  # precision 2/5, recall 1
        ("no no yes", "no yes yes", 2 / 3),  # shared: one no, one yes
        ("Bela", "Ada Alder", 0.0),
        ("", "Ada", 0.0),
        ("the", "", 1.0),
    ],
)
def test_token_f1(prediction: str, answer: str, f1: float) -> None:
    assert token_f1(prediction, answer) == pytest.approx(f1)
    assert token_f1(answer, prediction) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("none", "soft", "full", "share"),
    [
        (4.0, 2.0, 1.0, 2 / 3),
        (4.0, 1.0, 1.0, 1.0),
        (4.0, 4.0, 1.0, 0.0),
        (4.0, 0.5, 1.0, 1.0),  # better than the full context
        (4.0, 6.0, 1.0, 0.0),  # worse than none
        (2.0, 1.0, 2.0, 0.0),  # the context is worth nothing
        (2.0, 1.0, 3.0, 0.0),  # or less
        (4.0, NAN, 1.0, 0.0),
        (NAN, 2.0, 1.0, 0.0),
        (4.0, 2.0, NAN, 0.0),
        (4.0, INF, 1.0, 0.0),
        (INF, 2.0, 1.0, 0.0),
        (INF, INF, 1.0, 0.0),
        (4.0, 2.0, -INF, 0.0),
        (4.0, 2.0, INF, 0.0),
    ],
)
def test_recovered(none: float, soft: float, full: float, share: float) -> None:
    assert recovered(none, soft, full) == pytest.approx(share)
