"""What scores of a miner's answers say, for people and for programs, and what of income they do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from condense_core.neurons.incentive.score import Score
from condense_core.neurons.tiers import Tiers
from condense_core.tasks.confidence import share_interval

if TYPE_CHECKING:
    from rich.table import Table

YOURS = "yours"
OTHERS = (1, 9, 63)
"""How many other miners of a tier a share is shown beside."""
_MEANS = ("recovered", "correctness", "quality", "efficiency", "ratio", "seconds")


@dataclass(frozen=True)
class Examined:
    """The scores of one way to compress, challenge by challenge."""

    name: str
    scores: list[Score] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Means, the interval of the score over the challenges, and why answers were invalid.

        All means but that of ``seconds`` count an invalid answer as 0; ``ratio`` leaves it out.
        """
        count, values = len(self.scores), [score.value for score in self.scores]
        valid = [score.ratio for score in self.scores if not score.why]
        means = {name: sum(getattr(score, name) for score in self.scores) / count for name in _MEANS}
        return {
            "name": self.name,
            "score": sum(values) / count,
            "interval": share_interval(values, range(count)),
            **means,
            "ratio": sum(valid) / len(valid) if valid else 0.0,
            "slowest": max(score.seconds for score in self.scores),
            "invalid": dict(Counter(score.why for score in self.scores if score.why)),
        }


def verdict(tiers: Tiers, name: str, found: Sequence[Examined], model_id: str) -> dict[str, Any]:
    """What was found in a tier, as plain values; the miner's own scores come first."""
    tier, rows = tiers.tiers[name], [each.as_dict() for each in found]
    own = rows[0]["score"]
    return {
        "tier": name,
        "model": model_id,
        "challenges": len(found[0].scores),
        "timeout": tier.timeout,
        "tier_share": tiers.shares(datetime.now(UTC))[name],
        "sharpness": tier.sharpness,
        "rows": rows,
        "share_beside": {
            row["name"]: {str(count): share(own, row["score"], count, tier.sharpness) for count in OTHERS}
            for row in rows
        },
    }


def share(own: float, other: float, others: int, sharpness: float) -> float:
    """A miner's share of its tier beside ``others`` that all have the standing ``other``; 0 where it has none."""
    part: float = own**sharpness
    return part / (part + others * other**sharpness) if part else 0.0


def lines(told: Mapping[str, Any]) -> list[str]:
    """What a verdict says of income, in words."""
    own, power, beside, count = told["rows"][0], told["sharpness"], told["share_beside"], str(OTHERS[1])
    said = [
        f"{times} of {told['challenges']} answers would be worth nothing: {why}"
        for why, times in own["invalid"].items()
    ]
    said.append(
        f"The slowest answer took {own['slowest']:.2f} s on this machine, without a network; beyond "
        f"{told['timeout']:g} s it is worth nothing."
    )
    if own["score"]:
        said.append(
            f"Weights go with the power {power:g} of a standing: who scores a tenth less gets {1 - 0.9**power:.0%} "
            f"less. Beside {count} miners like you, you would get {beside[YOURS][count]:.0%} of this tier; beside "
            f"{count} that compress as `select` does, {beside['select'][count]:.0%}."
        )
        said.append("Who the others are nobody knows here, and miners whose answers are alike share one reward.")
    else:
        said.append("A score of 0 earns nothing, whoever the other miners are.")
    said.append(f"This tier has {told['tier_share']:.0%} of the incentive today.")
    return said


def as_table(told: Mapping[str, Any]) -> Table:
    """The scores of a tier, the miner's own first."""
    from rich import box
    from rich.table import Table

    title = f"{told['tier']}: {told['challenges']} challenges, read by {told['model']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, column in enumerate(("", "score", *_MEANS)):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in told["rows"]:
        bounds = "" if row["interval"] is None else f" [{', '.join(f'{bound:.2f}' for bound in row['interval'])}]"
        cells = [f"{row[name]:.2f}" for name in _MEANS]
        table.add_row(row["name"], f"{row['score']:.2f}{bounds}", *cells)
    return table
