"""How good an answer is, and how much of the context's worth survived compression."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from functools import lru_cache

_ARTICLES = ("a", "an", "the")

# 12,500 and 12'500 and 12 500 with a space that does not break: signs between the groups of one number.
_GROUP_SIGN = r"[,'_\u2019\u00a0\u2009\u202f]"
_GROUPED = re.compile(rf"(?<![\w.,])\d{{1,3}}(?:{_GROUP_SIGN}\d{{2,3}})*{_GROUP_SIGN}\d{{3}}(?!\d)")
_LETTER = r"[^\s.:/,'-]"  # of a text in which all other punctuation is space already
_WORD = re.compile(
    rf"(?<!\S)-\d+(?:[.:/,]\d+)*(?!{_LETTER})"  # a negative number
    rf"|\d+(?:[.:/,]\d+)+(?!{_LETTER})"  # 3.14, 12:30, 3/4: no part of these is a number of its own
    rf"|(?<!{_LETTER})(?:[^\W\d_]\.){{2,}}"  # U.S.
    rf"|{_LETTER}+(?:['-]{_LETTER}+)*"  # o'brien and north-west lose the sign, as in SQuAD's script
)
# Scripts that put no space between words.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def normalize(text: str) -> list[str]:
    """The words of an answer, in a form that all spellings of them share.

    As SQuAD's script (Rajpurkar et al. 2016, arXiv 1606.05250): lower case, without punctuation and without the
    articles a, an, the. Beyond it, variants of a character become one (NFKC), punctuation and digits are those of all
    scripts, 12,500 is 12500, a number such as 3.14, 12:30 or -5 stays one word, and scripts that put no space between
    words are cut into characters.
    """
    joined = _GROUPED.sub(lambda match: "".join(c for c in match[0] if c.isdecimal()), text)
    spaced = "".join(map(_in_words, unicodedata.normalize("NFKC", joined).casefold()))
    words = (word if _is_number(word) else _without_signs(word) for word in _WORD.findall(spaced))
    return [word for word in words if word and word not in _ARTICLES]


@lru_cache(maxsize=4096)
def _in_words(character: str) -> str:
    """What ``character`` is for ``_WORD``: a letter, a digit, one of .:/,'- or a space."""
    if character in ".:/,'-":
        return character
    if character in "\u2018\u2019\u02bc":
        return "'"
    if character in "\u2010\u2011\u2212":
        return "-"
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    category = unicodedata.category(character)
    if category == "Cf":  # soft hyphens and joiners stand inside words
        return ""
    if category[0] in "PSZC":
        return " "
    return f" {character} " if _SPACELESS.match(character) else character


def _is_number(word: str) -> bool:
    return word[-1].isdigit() and not any(c.isalpha() for c in word) and word[0] in "-0123456789"


def _without_signs(word: str) -> str:
    return re.sub(r"['.-]", "", word.removesuffix("'s"))


def exact_match(prediction: str, answer: str) -> float:
    """1.0 where both normalise to the same words, else 0.0."""
    return float(normalize(prediction) == normalize(answer))


def contained(prediction: str, answer: str) -> float:
    """1.0 where the words of ``answer`` stand in ``prediction``, next to each other and in order; else 0.0.

    A chat model answers in a sentence, which exact match counts as wrong. Words are compared as wholes: 42 is not
    contained in 1942. An answer without words is contained in a prediction without words.
    """
    said, expected = normalize(prediction), normalize(answer)
    if not expected:
        return float(not said)
    return float(any(said[i : i + len(expected)] == expected for i in range(len(said) - len(expected) + 1)))


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the words of prediction and answer, as bags; 1.0 where both are empty."""
    predicted, expected = normalize(prediction), normalize(answer)
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall)


def recovered(loss_none: float, loss_soft: float, loss_full: float) -> float:
    """Share of the context's worth that soft tokens or a pruned cache keep; 1 is all of it.

    (loss without context - loss with soft tokens) / (loss without context - loss with full context), losses in nats per
    answer token. Negative where the answer is less likely than without any context, above 1 where it is more likely
    than with the full one. 0 where the context is worth nothing (full context no better than none) or a loss is not
    finite.
    """
    gain = loss_none - loss_full
    if not all(map(math.isfinite, (loss_none, loss_soft, loss_full))) or gain <= 0:
        return 0.0
    return (loss_none - loss_soft) / gain
