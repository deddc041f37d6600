"""Bytes as text: UTF-8 is taken, everything else is refused by name."""

import pytest

from condense_core.files.text import decode_text


def test_byte_order_mark_is_no_text():
    assert decode_text(b"\xef\xbb\xbfhello", "x") == "hello"


@pytest.mark.parametrize("text", ["plain", "grün", "長い文脈", "\U0001f600"])
def test_utf8_comes_back_as_it_was(text):
    assert decode_text(text.encode(), "x") == text


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        pytest.param("utf-16", "UTF-16 or UTF-32 by its first bytes", id="utf-16 with its mark"),
        pytest.param("utf-16-le", "a NUL at byte offset 1", id="utf-16 little endian without a mark"),
        pytest.param("utf-16-be", "a NUL at byte offset 0", id="utf-16 big endian without a mark"),
        pytest.param("utf-32", "UTF-16 or UTF-32 by its first bytes", id="utf-32 with its mark"),
        pytest.param("utf-32-le", "a NUL at byte offset 1", id="utf-32 without a mark"),
        pytest.param("utf-32-be", "a NUL at byte offset 0", id="utf-32 big endian without a mark"),
        pytest.param("latin-1", "not UTF-8 text: invalid start byte at byte offset 2 (0xfc)", id="latin-1"),
    ],
)
def test_other_encodings_are_refused_by_name(encoding, message):
    with pytest.raises(ValueError, match=r"notes\.txt: ") as caught:
        decode_text("grün ist es".encode(encoding), "notes.txt")
    assert message in str(caught.value)
    assert "expected text in UTF-8" in str(caught.value)


def test_no_characters_at_all_are_refused():
    with pytest.raises(ValueError, match="x: empty"):
        decode_text(b"\xef\xbb\xbf", "x")
