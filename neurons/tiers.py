"""What the subnet buys: its tiers, and their shares of the incentive over time, as `tiers.toml` says.

A tier is an entry of a file, never a branch in code. The file is checked as a whole before anything runs.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from condense_core.decoder.identity import same_name

DEFAULT_TIERS = Path(__file__).with_name("tiers.toml")
"""The subnet's own."""

_MAX_BYTES = 256 * 1024
_SAMPLE = "The keeper of the north archive counts the lamps at dusk, and writes their number down. "

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tier(_Entry):
    """What a miner of a tier is asked for, and what its answers are worth.

    Attributes:
        model: the LLM that reads the soft tokens: a hub id, a folder, or a name of ``condense models``.
        min_chars, max_chars: of a context. max_question_chars: of a question about it.
        min_ratio, max_ratio: context tokens for each soft token that a request may ask for.
        timeout: seconds from sending a request to its last byte, as the validator measures them.
        max_answer_bytes: beyond, an answer is not read.
        efficiency_weight: share of the score that compression and latency decide about.
        quality_floor: efficiency counts from this quality on.
        questions: how many are asked about each context.
        sharpness: weights go with this power of a miner's standing, so that better answers pay more than in proportion.
    """

    model: Annotated[str, Field(min_length=1, max_length=200)]
    min_chars: Annotated[int, Field(ge=1)]
    max_chars: Annotated[int, Field(ge=1, le=1_000_000)]
    max_question_chars: Annotated[int, Field(ge=1, le=10_000)]
    min_ratio: Annotated[float, Field(ge=1, le=1000)]
    max_ratio: Annotated[float, Field(ge=1, le=1000)]
    timeout: Annotated[float, Field(gt=0, le=600)]
    max_answer_bytes: Annotated[int, Field(ge=1024, le=2**31)]
    efficiency_weight: Share
    quality_floor: Share
    questions: Annotated[int, Field(ge=1, le=64)]
    sharpness: Annotated[float, Field(ge=1, le=8)] = 2.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for low, high in (("min_chars", "max_chars"), ("min_ratio", "max_ratio")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}: got {getattr(self, low)}, expected at most {high}, {getattr(self, high)}")
        return self

    def sample(self) -> str:
        """A text of the greatest length, for whoever tries how a tier goes."""
        return (_SAMPLE * (self.max_chars // len(_SAMPLE) + 1))[: self.max_chars]

    def most_soft_tokens(self, context_tokens: int) -> int:
        """How many soft tokens an answer may have for a context of so many tokens: those of the smallest ratio."""
        return max(1, math.ceil(context_tokens / self.min_ratio))


class _Shares(_Entry):
    """Shares of the incentive from a day on, by tier; they sum to 1."""

    since: Annotated[date, Field(alias="from")]
    shares: dict[Name, Share]


class Tiers(_Entry):
    """All tiers and the schedule of their shares.

    Attributes:
        version: of the rules, for the weights' ``version_key``.
        tiers: by name. schedule: by day, the earliest first.
    """

    version: Annotated[int, Field(ge=0, lt=2**64)]
    tiers: Annotated[dict[Name, Tier], Field(min_length=1, max_length=64)]
    schedule: Annotated[tuple[_Shares, ...], Field(min_length=1, max_length=1000, strict=False)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for entry in self.schedule:
            if unknown := sorted(set(entry.shares) - set(self.tiers)):
                raise ValueError(f"schedule: {entry.since} has shares of {', '.join(unknown)}, expected known tiers")
            if not math.isclose(total := sum(entry.shares.values()), 1.0, abs_tol=1e-9):
                raise ValueError(f"schedule: the shares of {entry.since} sum to {total:g}, expected 1")
        for one, other in pairwise(self.schedule):
            if one.since >= other.since:
                raise ValueError(f"schedule: {other.since} stands behind {one.since}, expected the earliest day first")
        return self

    def shares(self, now: datetime) -> dict[str, float]:
        """Each tier's share of the incentive at ``now``; those of the first entry before its day.

        Days begin at midnight UTC, for all validators at once.
        """
        today = now.astimezone(UTC).date()
        entry = max((e for e in self.schedule if e.since <= today), key=lambda e: e.since, default=self.schedule[0])
        return {name: entry.shares.get(name, 0.0) for name in self.tiers}

    def sources(self, given: Sequence[str] = ()) -> dict[str, str]:
        """What to load for each of the tiers' models: itself, or the one of ``given`` whose name ends alike.

        given: folders or names. ``ValueError`` where one of them is no tier's.
        """
        wanted = sorted({tier.model for tier in self.tiers.values()})
        for one in given:
            if not any(same_name(one.rstrip("/"), name) for name in wanted):
                raise ValueError(f"model: {one!r} is of no tier, expected one of {', '.join(wanted)}")
        return {name: next((one for one in given if same_name(one.rstrip("/"), name)), name) for name in wanted}

    def next_change(self, now: datetime) -> datetime | None:
        """When the shares change next; None: never."""
        today = now.astimezone(UTC).date()
        coming = next((entry.since for entry in self.schedule if entry.since > today), None)
        return None if coming is None else datetime.combine(coming, datetime.min.time(), UTC)


def read_tiers(path: str | Path = DEFAULT_TIERS) -> Tiers:
    """The tiers of a TOML file.

    Raises:
        ValueError: it cannot be read, or an entry is not what it must be; one line that names the file and the entry.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"tiers: {path} cannot be read ({error.strerror or error})") from None
    if len(content) > _MAX_BYTES:
        raise ValueError(f"tiers: {path} has more than {_MAX_BYTES:,} bytes")
    try:
        entries: Mapping[str, Any] = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"tiers: {path} is no TOML ({' '.join(str(error).split())})") from None
    try:
        return Tiers.model_validate(entries)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"tiers: {path}: {where + ': ' if where else ''}{what}") from None
