"""Counting answers: what is recorded of each question, and the scores that every evaluation reports."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from condense_core.tasks.generators import Turn
from condense_core.tasks.metrics import contained, exact_match, recovered, token_f1


@dataclass
class Tally:
    """What is counted for one way to give the context, question by question."""

    contained: list[float] = field(default_factory=list)
    exact_match: list[float] = field(default_factory=list)
    f1: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    answer_ms: list[float] = field(default_factory=list)
    contained_by_kind: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    by_kind: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, turn: Turn, answer: str, loss: float) -> None:
        """Count the model's ``answer`` to the question of ``turn``; loss: nats per token of the expected answer.

        Of several right answers the one that suits best counts, for each score by itself, as in SQuAD's script.
        """
        inside = max(contained(answer, right) for right in turn.accepted)
        exact = max(exact_match(answer, right) for right in turn.accepted)
        self.contained.append(inside)
        self.exact_match.append(exact)
        self.contained_by_kind[turn.kind].append(inside)
        self.by_kind[turn.kind].append(exact)
        self.f1.append(max(token_f1(answer, right) for right in turn.accepted))
        self.losses.append(loss)

    def scores(self, loss_none: float, loss_full: float) -> dict[str, Any]:
        """The fields that the rows of all evaluations have, given the losses of the controls (NaN: there is none)."""
        mean, loss = statistics.fmean, self.loss()
        return {
            "contained": mean(self.contained),
            "exact_match": mean(self.exact_match),
            "f1": mean(self.f1),
            "loss": loss,
            "recovered": recovered(loss_none, loss, loss_full),
            "answer_ms": mean(self.answer_ms),
            "num_questions": len(self.losses),
            "contained_by_kind": {kind: mean(found) for kind, found in sorted(self.contained_by_kind.items())},
            "by_kind": {kind: mean(found) for kind, found in sorted(self.by_kind.items())},
        }

    def loss(self) -> float:
        """Mean loss; NaN before the first question."""
        return statistics.fmean(self.losses) if self.losses else float("nan")


def default_max_new_tokens(has_chat_template: bool) -> int:
    """How long an answer may get: a chat model says a sentence around the value that it is asked for."""
    return 48 if has_chat_template else 16
