"""Tiers are data: the file is checked as a whole, and its schedule says what a tier is worth on a day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from condense_core.neurons.tiers import DEFAULT_TIERS, read_tiers

GOOD = DEFAULT_TIERS.read_text()
SMOLLM2 = """
[tiers.small]
model = "smollm2-135m"
min_chars = 100
max_chars = 7000
max_question_chars = 200
min_ratio = 2.0
max_ratio = 8.0
timeout = 30.0
max_answer_bytes = 1_000_000
efficiency_weight = 0.2
quality_floor = 0.5
questions = 2

[[schedule]]
from = 2027-02-01
shares = { research = 0.25, small = 0.75 }
"""


def test_the_subnets_own_tiers_are_those_of_the_first_one() -> None:
    tiers = read_tiers()
    limits = {name: (tier.max_chars, tier.model) for name, tier in tiers.tiers.items()}
    mistral = "mistralai/Mistral-7B-Instruct-v0.2"
    assert limits == {"research": (2500, mistral), "inference_0": (3000, mistral), "inference_1": (7000, mistral)}
    assert tiers.shares(datetime.now(UTC)) == {"research": 1.0, "inference_0": 0.0, "inference_1": 0.0}


def test_a_tier_of_another_model_is_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(GOOD + SMOLLM2)
    tiers = read_tiers(path)
    assert tiers.tiers["small"].model == "smollm2-135m"
    before, after = datetime(2027, 1, 31, 23, 59, tzinfo=UTC), datetime(2027, 2, 1, tzinfo=UTC)
    assert tiers.shares(before)["small"] == 0.0
    assert tiers.shares(after) == {"research": 0.25, "inference_0": 0.0, "inference_1": 0.0, "small": 0.75}
    assert tiers.next_change(before) == after
    assert tiers.next_change(after) is None


def test_days_begin_at_midnight_utc_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(GOOD + SMOLLM2)
    east = timezone(timedelta(hours=9))
    assert read_tiers(path).shares(datetime(2027, 2, 1, 8, 59, tzinfo=east))["small"] == 0.0
    assert read_tiers(path).shares(datetime(2027, 2, 1, 9, 0, tzinfo=east))["small"] == 0.75


def test_before_its_first_day_the_schedule_begins_with_its_first_entry() -> None:
    assert read_tiers().shares(datetime(2020, 1, 1, tzinfo=UTC))["research"] == 1.0


@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (2, 1), (3, 2), (1000, 500)])
def test_the_smallest_ratio_bounds_an_answer(tokens: int, rows: int) -> None:
    assert read_tiers().tiers["research"].most_soft_tokens(tokens) == rows


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("research = 1.0", "research = 0.9", "the shares of 2026-12-01 sum to 0.9, expected 1"),
        ("research = 1.0", "other = 1.0", "has shares of other, expected known tiers"),
        ("research = 1.0", "research = nan", "schedule.0.shares.research"),
        ("min_chars = 1000", "min_chars = 9000", "min_chars: got 9000, expected at most max_chars, 2500"),
        ("min_chars = 1000", "min_chars = true", "tiers.research.min_chars: Input should be a valid integer"),
        ("min_chars = 1000", "", "tiers.research.min_chars: Field required"),
        ("min_chars = 1000", "min_chars = 1000\nspeed = 1", "tiers.research.speed: Extra inputs are not permitted"),
        ("[tiers.research]", "[tiers.'Re search']", "tiers.Re search"),
        ("timeout = 8.0", "timeout = -8.0", "timeout: Input should be greater than 0"),
        ("[[schedule]]", "[[schedule]]\n[[schedule]]", "schedule.0.from: Field required"),
        ("version = 1", "version = 1 = 2", "is no TOML"),
        ("version = 1", "", "version: Field required"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_file_and_entry(old: str, new: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match="tiers: ") as caught:
        read_tiers(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_days_out_of_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(GOOD + SMOLLM2.replace("2027-02-01", "2026-11-01"))
    with pytest.raises(ValueError, match=r"2026-11-01 stands behind 2026-12-01, expected the earliest day first"):
        read_tiers(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#" * 300_000], ids=["no UTF-8", "too large"])
def test_a_file_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tiers: .*bad.toml"):
        read_tiers(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.toml cannot be read \(No such file or directory\)"):
        read_tiers(tmp_path / "none.toml")
