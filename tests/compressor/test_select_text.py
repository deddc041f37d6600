"""``select`` on texts: with a question and without, what is kept as text, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from condense_core import SoftTokens
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import num_kept
from condense_core.compressor.tokenized import GAP, check_questions, kept_text, make_passage
from condense_core.decoder.tokens import encode_text, encode_with_offsets
from condense_core.tasks import ProseWriter

TEXT, OTHER = (ProseWriter().document(i, 12) for i in (3, 4))
QUESTIONS = ["Who was it?", "What did the old gardener say about the river after the rain?"]


def kept_indices(condenser: Condenser, soft: SoftTokens, text: str) -> list[int]:
    """Where the rows of ``soft`` stand in the text: the earliest places that ascend."""
    rows = condenser.model.get_input_embeddings().weight[condenser.encode(text)]
    found: list[int] = []
    for embed in soft.embeds:
        at = found[-1] + 1 if found else 0
        while not torch.equal(rows[at], embed):
            at += 1
        found.append(at)
    return found


@pytest.mark.parametrize("question", [None, *QUESTIONS])
@pytest.mark.parametrize("ratio", [1, 2.5, 4, 16])
def test_what_is_kept_is_a_part_of_the_text_in_its_order(lively: Condenser, question: str | None, ratio: float) -> None:
    soft = lively.compress(TEXT, ratio, question=question)
    assert len(soft) == num_kept(len(lively.encode(TEXT)), ratio)
    assert len(kept_indices(lively, soft, TEXT)) == len(soft)
    at = 0
    for piece in soft.text.split(GAP):
        at = TEXT.index(piece, at) + len(piece)
    if ratio == 1:
        assert soft.text == TEXT.strip()


def test_a_question_changes_what_is_kept(lively: Condenser) -> None:
    texts = {lively.compress(TEXT, 4, question=question).text for question in (None, *QUESTIONS)}
    assert len(texts) == 3


def test_several_texts_and_questions_equal_one_by_one(lively: Condenser) -> None:
    texts = [TEXT, TEXT, OTHER, TEXT, "One word, more."]
    questions = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0], None, QUESTIONS[1]]
    together = lively.compress(texts, 4, question=questions)
    for soft, text, question in zip(together, texts, questions, strict=True):
        alone = lively.compress(text, 4, question=question)
        assert soft.text == alone.text
        assert torch.equal(soft.embeds, alone.embeds)
        assert soft.context_sha256 == alone.context_sha256
    assert lively.compress([], 4, question=[]) == []


def test_no_questions_in_a_list_are_no_question(lively: Condenser) -> None:
    first, second = lively.compress([TEXT, OTHER], 4), lively.compress([TEXT, OTHER], 4, question=[None, None])
    assert [soft.text for soft in first] == [soft.text for soft in second]


def test_a_text_beyond_the_positions_keeps_its_count(lively: Condenser) -> None:
    text = f"{TEXT} {OTHER} " * 10
    assert len(lively.encode(text)) > 3 * lively.max_positions
    for question in (None, QUESTIONS[0]):
        for ratio in (8, 7.3):
            soft = lively.compress(text, ratio, question=question)
            assert len(soft) == num_kept(len(lively.encode(text)), ratio)


def test_the_text_is_read_in_the_prompt_that_the_question_will_stand_in(lively: Condenser) -> None:
    """What stands before the text and behind it is what `prepare` puts there."""
    passage, _ = make_passage(lively.tokenizer, TEXT, QUESTIONS[0], None)
    whole = [*passage.before, *passage.ids, *passage.question]
    expected = lively.prepare(lively.compress(TEXT, 1), QUESTIONS[0])["inputs_embeds"][0]
    assert torch.equal(lively.model.get_input_embeddings().weight[whole], expected)
    assert passage.neutral != passage.question
    alone, _ = make_passage(lively.tokenizer, TEXT, None, None)
    assert not alone.question
    assert not alone.neutral


def test_a_template_that_renders_no_question(lively: Condenser) -> None:
    """Without a question the text is read alone; with one there is no prompt to read it in."""
    tokenizer = copy.deepcopy(lively.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('not for users') }}"
    condenser = Condenser(lively.model, tokenizer)
    assert condenser.compress(TEXT, 4).text
    with pytest.raises(ValueError, match="chat_template: it refuses a user's message: not for users"):
        condenser.compress(TEXT, 4, question="Why?")


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        ("", ValueError, "question: empty; expected what will be asked, or None"),
        (" \n", ValueError, "question: empty"),
        (5, TypeError, "question: got int, expected str"),
        (["Why?"], TypeError, "question: got list, expected str"),
        ("Why \ud800?", ValueError, "question: not valid Unicode"),
        ("why " * 300, ValueError, r"question: \d+ tokens with the prompt around it, expected at most 128, half"),
    ],
)
def test_a_question_that_is_none(lively: Condenser, question: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        lively.compress(TEXT, 4, question=question)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("question", "error", "message"),
    [
        ("Why?", TypeError, "question: got str, expected a list with one for each text"),
        (["Why?"], ValueError, "question: got 1 for 2 texts, expected one for each"),
        (["Why?", ""], ValueError, r"question\[1\]: empty"),
        (["Why?", 3], TypeError, r"question\[1\]: got int, expected str"),
        (5, TypeError, "question: got int, expected a list"),
    ],
)
def test_questions_for_several_texts(lively: Condenser, question: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lively.compress([TEXT, OTHER], 4, question=question)


def test_a_question_for_a_method_that_reads_none(tiny_condenser: Condenser) -> None:
    with pytest.raises(ValueError, match="question: the method 'pool' reads none, expected the method 'select'"):
        tiny_condenser.compress(TEXT, 4, question="Why?")
    assert tiny_condenser.compress(TEXT, 4).text == ""
    assert tiny_condenser.compress(TEXT, 4, question=None).text == ""


def test_check_questions_gives_one_for_each() -> None:
    assert check_questions(None, 2, "select", several=True) == [None, None]
    assert check_questions("Why?", 1, "select", several=False) == ["Why?"]
    assert check_questions(("Why?", None), 2, "select", several=True) == ["Why?", None]


# -- kept text ---------------------------------------------------------------------------------------------------------

UNICODE = "Zoë naïvely said 10\u00a0€ — “no”. 他来了。 🙂👩‍👩‍👧 ok\n\nend  "


@pytest.mark.parametrize("text", [UNICODE, " leading", "a", "</s> spelled", "He wrote </s> on it."])
def test_offsets_are_those_of_the_tokens(lively: Condenser, text: str) -> None:
    ids, offsets = encode_with_offsets(lively.tokenizer, text)
    assert ids == encode_text(lively.tokenizer, text)
    assert len(offsets) == len(ids)
    assert all(0 <= start <= stop <= len(text) for start, stop in offsets)
    assert offsets == sorted(offsets)
    assert kept_text(text, offsets, range(len(ids))) == text.strip()


def test_every_kept_piece_stands_in_the_text(lively: Condenser) -> None:
    """Also where a character takes several tokens, of which some are kept."""
    ids, offsets = encode_with_offsets(lively.tokenizer, UNICODE)
    for step in (2, 3, 5):
        for first in range(step):
            found = kept_text(UNICODE, offsets, range(first, len(ids), step))
            at = 0
            for piece in found.split(GAP):
                at = UNICODE.index(piece, at) + len(piece)


def test_pieces_are_joined_where_something_is_missing() -> None:
    text, offsets = "ab cd  ef", [(0, 2), (2, 5), (5, 7), (7, 9)]
    assert kept_text(text, offsets, [0, 1]) == "ab cd"
    assert kept_text(text, offsets, [0, 3]) == "ab ... ef"
    assert kept_text(text, offsets, [0, 2]) == "ab"
    assert kept_text(text, offsets, []) == ""


def test_names_and_numbers_are_marked(lively: Condenser) -> None:
    text = "the man Bob had 7 apples"
    passage, offsets = make_passage(lively.tokenizer, text, None, None)
    marked = [text[a:b].strip() for (a, b), mark in zip(offsets, passage.marks, strict=True) if mark]
    assert "7" in marked
    assert any("B" in piece for piece in marked)
    assert "the" not in marked


def test_the_text_travels_with_the_soft_tokens_and_can_be_left_out(lively: Condenser) -> None:
    soft = lively.compress(TEXT, 4, question=QUESTIONS[0])
    assert SoftTokens.from_bytes(soft.to_bytes()).text == soft.text
    assert SoftTokens.from_bytes(replace(soft, text="").to_bytes()).text == ""
    assert soft.to(dtype=torch.bfloat16).text == soft.text
