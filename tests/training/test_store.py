"""A corpus as sentences of token ids: how texts are cut, and that its size is no matter of memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerBase

from condense_core.training.store import MAX_PIECE_CHARS, SentenceStore, sentence_pieces

CHINESE = "\u7b2c\u4e00\u53e5\u8bdd\u3002\u7b2c\u4e8c\u53e5\u8bdd\uff01\u7b2c\u4e09\u53e5"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        pytest.param("One here. Two there!", ["\nOne here.", " Two there!"], id="sentences"),
        pytest.param("Three: four; five.", ["\nThree:", " four;", " five."], id="clauses"),
        pytest.param("a\n\n  b c \n", ["\na", "\nb c"], id="lines"),
        pytest.param("pi is 3.14 or so", ["\npi is 3.14 or so"], id="a full stop inside a number"),
        pytest.param(
            CHINESE,
            ["\n\u7b2c\u4e00\u53e5\u8bdd\u3002", "\u7b2c\u4e8c\u53e5\u8bdd\uff01", "\u7b2c\u4e09\u53e5"],
            id="chinese",
        ),
        pytest.param("x = 1\nfor i in y:\n    pass", ["\nx = 1", "\nfor i in y:", "\npass"], id="code"),
        pytest.param("", [], id="nothing"),
        pytest.param(" \n\t\n", [], id="blank"),
    ],
)
def test_where_a_text_is_cut(text: str, pieces: list[str]) -> None:
    assert list(sentence_pieces(text)) == pieces


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("word " * 1000, id="no full stop"),
        pytest.param("x" * 5000, id="no space"),
        pytest.param("\u5b57" * 5000, id="chinese without full stops"),
        pytest.param("short " * 50 + "y" * 2000 + " end", id="both"),
    ],
)
def test_what_has_no_end_of_a_sentence_is_cut_and_nothing_is_lost(text: str) -> None:
    pieces = list(sentence_pieces(text))
    assert len(pieces) > 2
    assert max(map(len, pieces)) <= MAX_PIECE_CHARS + 1  # with its space
    assert "".join(pieces).strip() == text.strip()


def test_the_store_holds_sentences_in_order(tokenizer: PreTrainedTokenizerBase) -> None:
    store = SentenceStore(["One here. Two there!\nThree: four.", "Five."], tokenizer)
    assert [tokenizer.decode(store.sentences(i, 1)[0]) for i in range(len(store))] == [
        "\nOne here.",
        " Two there!",
        "\nThree:",
        " four.",
        "\nFive.",
    ]
    wrapped = store.sentences(4, len(store.sentences(4, 1)[0]) + 1)
    assert [tokenizer.decode(s) for s in wrapped] == ["\nFive.", "\nOne here."]


@pytest.mark.parametrize("texts", [[], ["", " \n"]], ids=["no document", "blank documents"])
def test_a_corpus_without_text(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="corpus: holds no text; expected at least one document that is not empty"):
        SentenceStore(texts, tokenizer)


def test_the_digest_is_that_of_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    digests = [SentenceStore(texts, tokenizer).digest for texts in (["One. Two."], ["One. Two."], ["One. Too."])]
    assert digests[0] == digests[1] != digests[2]
    assert SentenceStore(["One.Two."], tokenizer).digest != digests[0]


def test_memory_does_not_grow_with_the_corpus(tokenizer: PreTrainedTokenizerBase) -> None:
    """Documents of 10 kB, one after the other: 60 of them take no more than 15 do."""

    def documents(count: int) -> Iterator[str]:
        return (f"Sentence number {i}. " * 500 for i in range(count))

    def peak(count: int) -> int:
        tracemalloc.start()
        store = SentenceStore(documents(count), tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(store) == 500 * count
        return peak

    peak(5)
    assert peak(60) < 1.2 * peak(15)
