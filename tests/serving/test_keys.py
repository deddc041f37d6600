"""Files of API keys."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from condense_core.serving.keys import Bucket, Keys, RateLimited, Unauthorized, new_key


def test_a_new_key_is_known_by_its_lines_and_not_written_in_them(tmp_path: Path) -> None:
    (first, one), (second, two) = new_key("first app"), new_key("second")
    path = tmp_path / "keys.toml"
    path.write_text(one + "requests_per_minute = 60\n\n" + two)
    assert first not in path.read_text()
    assert len(first) > 40
    keys = Keys.load(path)
    assert keys.find(f"Bearer {first}").name == "first app"
    assert keys.find(f"bearer  {second}").name == "second"
    for wrong in (None, "", "Bearer", f"Bearer {first}x", f"Basic {first}", first, "Bearer " + "x" * 10_000):
        with pytest.raises(Unauthorized, match="expected 'Authorization: Bearer ck_"):
            keys.find(wrong)


@pytest.mark.parametrize("name", ["", "a\nb", 'a"b', "x" * 101, "a\\"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="name: got"):
        new_key(name)


GOOD = f'[[key]]\nname = "a"\nsha256 = "{hashlib.sha256(b"k").hexdigest()}"\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no"),
        ("key = 3", "holds no"),
        ("[[key]]\nname = 3\nsha256 = 4", "expected 64 lower-case hex digits, not the key itself"),
        ('[[key]]\nname = "a"', "a key has no sha256"),
        (GOOD.replace('sha256 = "', 'sha256 = "X'), "expected 64 lower-case hex digits"),
        (GOOD + "limit = 3", "unknown entry 'limit'"),
        (GOOD + "max_concurrent = -1", "max_concurrent of 'a': got -1"),
        (GOOD + "requests_per_minute = nan", "requests_per_minute of 'a': got nan"),
        (GOOD + "chars_per_minute = true", "chars_per_minute of 'a': got True"),
        (GOOD + GOOD, "has a name twice"),
        ("\x00", "holds no"),
    ],
)
def test_a_file_that_holds_no_keys(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Keys.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="keys: cannot read"):
        Keys.load(tmp_path / "none.toml")


def test_a_bucket_fills_again_and_takes_more_than_it_holds_as_a_debt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    bucket = Bucket(60)
    assert bucket.take(150) is None  # more than a minute's: spent at once, and paid for afterwards
    assert bucket.take(1) == pytest.approx(91)
    now += 90
    assert bucket.take(1) == pytest.approx(1)
    now += 1
    assert bucket.take(1) is None
    now += 3600
    assert bucket.take(60) is None
    assert bucket.take(1) == pytest.approx(1)


def test_a_key_says_which_of_its_limits_was_met() -> None:
    key, lines = new_key("a")
    from condense_core.serving.keys import Key

    mine = Key("a", lines.split('sha256 = "')[1][:64], requests_per_minute=1)
    mine.enter()
    with pytest.raises(RateLimited, match="'a' may send 1 requests a minute"):
        mine.enter()
    assert key.startswith("ck_")
