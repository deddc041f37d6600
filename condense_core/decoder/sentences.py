"""Sentences of a text, as tokens: what ``select`` and pruning by sentences keep or drop as a whole."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence

LONGEST = 64
"""Tokens; what has no end of a sentence for longer (code, tables, lists) is cut into equal parts."""

# An end: a line break; a full stop, question or exclamation mark and the space behind it, unless it follows a single
# capital (J. Smith) or a small letter goes on (approx. 3 days, i.e. this); those of scripts without spaces.
_CLOSING = "[\"'\u2019\u201d)\\]\u00bb]*"
_END = re.compile(
    rf"(?<!\b[^\W\d_a-z])[.!?\u2026\u061f\u06d4\u0964]+{_CLOSING}\s+(?![a-z])"
    rf"|[\u3002\uff01\uff1f\uff0e]+[\u300d\u300f\uff09\"'\u201d]*\s*"
    r"|\s*\n\s*"
)


def sentence_numbers(text: str, offsets: Sequence[tuple[int, int]], longest: int = LONGEST) -> list[int]:
    """For each token the number of its sentence, from 0 and ascending without gaps.

    Args:
        text: which the tokens are of.
        offsets: for each token its characters ``[start, stop)`` in the text.
        longest: tokens of a sentence; a longer one is cut into equal parts.
    """
    ends = [found.end() for found in _END.finditer(text)]
    groups: list[int] = []
    last = None
    for start, stop in offsets:
        # A token may hold the space before a word, which is the end of the sentence before.
        sentence = bisect_right(ends, max(start, stop - 1))
        if sentence != last:
            groups.append(0)
            last = sentence
        groups[-1] += 1
    numbers: list[int] = []
    for size in groups:
        parts = -(-size // longest)
        first = numbers[-1] + 1 if numbers else 0
        numbers += [first + i * parts // size for i in range(size)]
    return numbers
