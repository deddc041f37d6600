"""Counting answers: what is recorded of each question, and the scores that every evaluation reports."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from condense_core.tasks.confidence import Bounds, cluster_sums, mean_interval, ratio_interval, share_interval
from condense_core.tasks.generators import Turn
from condense_core.tasks.metrics import contained, exact_match, recovered, token_f1

MEASURES = ("contained", "f1", "exact_match", "loss")
"""What is recorded of each question; of ``loss`` less is better."""


@dataclass
class Tally:
    """What is counted for one way to give the context, question by question.

    context: the number of the context that is asked about now. contexts: that of each question so far.
    """

    context: int = 0

    contained: list[float] = field(default_factory=list)
    exact_match: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    answer_ms: list[float] = field(default_factory=list)

    def add(self, turn: Turn, answer: str, loss: float) -> None:
        """Count the model's ``answer`` to the question of ``turn``.

        Of several right answers the one that suits best counts, for each score by itself, as in SQuAD's script.

        Args:
            turn: the question and what is right.
            answer: what the model said.
            loss: nats per token of the expected answer.
        """
        self.contained.append(max(contained(answer, right) for right in turn.accepted))
        self.exact_match.append(max(exact_match(answer, right) for right in turn.accepted))
        self.f1.append(max(token_f1(answer, right) for right in turn.accepted))
        self.losses.append(loss)
        self.contexts.append(self.context)
        self.kinds.append(turn.kind)
        self.texts.append(answer)

    def scores(self, none: Tally | None, full: Tally | None) -> dict[str, Any]:
        """The fields that the rows of all evaluations have, given the tallies of the controls (None: there is none)."""
        mean, loss = statistics.fmean, self.loss()
        shared = self._against(full, "contained")
        share = sum(shared[0]) / sum(shared[1]) if sum(shared[1]) > 0 else None
        intervals: dict[str, Bounds | None] = {
            "contained": share_interval(self.contained, self.contexts),
            "exact_match": share_interval(self.exact_match, self.contexts),
            "f1": share_interval(self.f1, self.contexts),
            "loss": mean_interval(self.losses, self.contexts),
            "recovered": self._recovered_interval(none, full),
            "share_of_full": ratio_interval(*shared) if share is not None else None,
        }
        return {
            "contained": mean(self.contained),
            "exact_match": mean(self.exact_match),
            "f1": mean(self.f1),
            "loss": loss,
            "recovered": recovered(none.loss() if none else _NAN, loss, full.loss() if full else _NAN),
            "share_of_full": share,
            "intervals": intervals,
            "answer_ms": mean(self.answer_ms),
            "num_questions": len(self.losses),
            "contained_by_kind": self._by_kind(self.contained),
            "by_kind": self._by_kind(self.exact_match),
            "answers": {
                "contained": self.contained,
                "f1": self.f1,
                "exact_match": self.exact_match,
                "loss": self.losses,
            },
        }

    def loss(self) -> float:
        """Mean loss; NaN before the first question."""
        return statistics.fmean(self.losses) if self.losses else _NAN

    def _by_kind(self, values: Sequence[float]) -> dict[str, float]:
        found: dict[str, list[float]] = defaultdict(list)
        for kind, value in zip(self.kinds, values, strict=True):
            found[kind].append(value)
        return {kind: statistics.fmean(one) for kind, one in sorted(found.items())}

    def _against(self, other: Tally | None, name: str) -> tuple[list[float], list[float]]:
        """The sums of both over each context that both have."""
        if other is None:
            return [], []
        own, others = (cluster_sums(getattr(one, name), one.contexts) for one in (self, other))
        both = [context for context in own if context in others]
        return [own[context] for context in both], [others[context] for context in both]

    def _recovered_interval(self, none: Tally | None, full: Tally | None) -> Bounds | None:
        own, without = self._against(none, "losses")
        _, whole = self._against(full, "losses")
        if not len(own) == len(whole) == len(set(self.contexts)):
            return None
        saved = [a - b for a, b in zip(without, own, strict=True)]
        return ratio_interval(saved, [a - b for a, b in zip(without, whole, strict=True)])


_NAN = float("nan")


def default_max_new_tokens(has_chat_template: bool) -> int:
    """How long an answer may get: a chat model says a sentence around the value that it is asked for."""
    return 48 if has_chat_template else 16
