"""Where sentences end, and which tokens are in which."""

from __future__ import annotations

import pytest

from condense_core.decoder.sentences import sentence_numbers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One. ", "Two! ", "Three? ", "Four"]),
        ('He said: "Go." Then J. Smith went.', ['He said: "Go." ', "Then J. Smith went."]),
        ("About 3.14 m, approx. three. Done.", ["About 3.14 m, approx. three. ", "Done."]),
        ("Heading\n\nText of it.\nMore", ["Heading\n\n", "Text of it.\n", "More"]),
        ("他来了。他走了。好", ["他来了。", "他走了。", "好"]),
        ("Él vino. Ático sur.", ["Él vino. ", "Ático sur."]),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    numbers = sentence_numbers(text, [(i, i + 1) for i in range(len(text))])
    found = ["" for _ in range(numbers[-1] + 1)]
    for number, character in zip(numbers, text, strict=True):
        found[number] += character
    # A space that ends a sentence may be a token's first character, and then belongs to the next.
    assert [piece.strip() for piece in found] == [piece.strip() for piece in expected]


def test_what_has_no_end_is_cut_into_equal_parts() -> None:
    numbers = sentence_numbers("x" * 100, [(i, i + 1) for i in range(100)], longest=40)
    assert [numbers.count(part) for part in range(3)] == [34, 33, 33]
    assert numbers == sorted(numbers)
    assert sentence_numbers("", []) == []
