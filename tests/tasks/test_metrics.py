"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from condense_core.tasks.metrics import contained, exact_match, normalize, recovered, token_f1

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("The Old  Mill.", ["old", "mill"], id="case, article, full stop"),
        pytest.param("an apple, a day", ["apple", "day"], id="articles"),
        pytest.param("A1234!", ["a1234"], id="code"),
        pytest.param(" \n", [], id="blank"),
        pytest.param("the", [], id="an article alone"),
        pytest.param("Theodor Anders", ["theodor", "anders"], id="words that begin like an article"),
        pytest.param("north-west O'Brien", ["northwest", "obrien"], id="signs inside a word"),
        pytest.param("Ada Alder\u2019s U.S. desk", ["ada", "alder", "us", "desk"], id="possessive, abbreviation"),
        pytest.param("\u201cAda Alder\u201d\u2014the keeper", ["ada", "alder", "keeper"], id="typographic signs"),
        pytest.param("_Ada_ **Alder**", ["ada", "alder"], id="markdown"),
        pytest.param("serial number:X7984.", ["serial", "number", "x7984"], id="no space behind a colon"),
        pytest.param("12,500 crowns", ["12500", "crowns"], id="thousands, comma"),
        pytest.param("12'500 12\u00a0500 12\u202f500", ["12500"] * 3, id="thousands, other signs"),
        pytest.param("1,234,567.89", ["1234567.89"], id="millions, decimal point"),
        pytest.param("3.14, 12:30 and \u22125", ["3.14", "12:30", "and", "-5"], id="numbers of several parts"),
        pytest.param("in 1947,he", ["in", "1947", "he"], id="no space behind a comma"),
        pytest.param("\uff11\uff12\uff13 \u0664\u0662", ["123", "42"], id="digits of other scripts"),
        pytest.param("\u7b54\u6848\u662f\u827e\u3002", ["\u7b54", "\u6848", "\u662f", "\u827e"], id="chinese"),
        pytest.param("soft\u00adware \ufb01ne", ["software", "fine"], id="soft hyphen, ligature"),
    ],
)
def test_normalize(text: str, words: list[str]) -> None:
    assert normalize(text) == words


@pytest.mark.parametrize(
    ("prediction", "answer", "found"),
    [
        pytest.param("The velvet gate was inspected on 2 August 1947.", "2 August 1947", 1.0, id="a sentence around"),
        pytest.param("ada alder.", "Ada Alder", 1.0, id="nothing around"),
        pytest.param("The price is 12,500 crowns, I think.", "12500 crowns", 1.0, id="a number with separators"),
        pytest.param("It is \u201cX7984\u201d\u2026", "X7984", 1.0, id="typographic signs"),
        pytest.param("\u5b88\u536b\u662f\u827e\u8fbe\u3002", "\u827e\u8fbe", 1.0, id="no spaces between words"),
        pytest.param("In 1942 it was.", "42", 0.0, id="part of a number"),
        pytest.param("It is 42.5 or 4:42.", "42", 0.0, id="part of a decimal number or a time"),
        pytest.param("It is -5.", "5", 0.0, id="another sign"),
        pytest.param("Adamantly, Alderman said.", "Ada Alder", 0.0, id="parts of words"),
        pytest.param("Alder Ada", "Ada Alder", 0.0, id="another order"),
        pytest.param("Ada or Bela Alder", "Ada Alder", 0.0, id="not next to each other"),
        pytest.param("Ada", "Ada Alder", 0.0, id="half of it"),
        pytest.param("", "Ada Alder", 0.0, id="no answer"),
        pytest.param("", "the", 1.0, id="nothing expected, nothing said"),
        pytest.param("anything", "the", 0.0, id="nothing expected, something said"),
    ],
)
def test_contained(prediction: str, answer: str, found: float) -> None:
    assert contained(prediction, answer) == found


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
        (4.0, 0.5, 1.0, 7 / 6),  # better than the full context
        (4.0, 6.0, 1.0, -2 / 3),  # worse than none
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
