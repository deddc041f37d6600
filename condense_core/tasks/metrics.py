"""How good an answer is, and how much of the context's worth survived compression."""

from __future__ import annotations

import re
import string
from collections import Counter

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> list[str]:
    """Words of an answer in lower case, without punctuation and articles, as SQuAD does (arXiv 1606.05250)."""
    return [w for w in re.split(r"\s+", text.lower().translate(_PUNCTUATION)) if w and w not in ("a", "an", "the")]


def exact_match(prediction: str, answer: str) -> float:
    """1.0 where both normalise to the same words, else 0.0."""
    return float(normalize(prediction) == normalize(answer))


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
    """Share of the context's worth that soft tokens keep, in [0, 1].

    (loss without context - loss with soft tokens) / (loss without context - loss with full context), losses in nats per
    answer token. 0 where the context is worth nothing (full context no better than none) or a loss is not finite.
    """
    gain = loss_none - loss_full
    share = (loss_none - loss_soft) / gain if gain > 0 else 0.0
    return min(1.0, max(0.0, share)) if share == share else 0.0
