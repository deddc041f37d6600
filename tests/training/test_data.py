"""Batches: what a row is made of, token by token, and that a step alone decides."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from condense_core.decoder.prompt import SEPARATOR
from condense_core.tasks.facts import split_of
from condense_core.tasks.generators import CONTINUE_PROMPT, REPEAT_PROMPT
from condense_core.tasks.sources import ProseWriter
from condense_core.training.data import QUOTE_LEAD, QUOTE_LENGTH, QUOTE_PROMPT, Batch, BatchMaker, ChatFormat
from condense_core.training.store import SentenceStore

# Mistral-7B-Instruct-v0.2 writes spaces around its markers and before the end of a turn.
MISTRAL_LIKE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answers(batch: Batch, tokenizer: PreTrainedTokenizerBase, row: int) -> list[str]:
    """The runs of tokens that the mask of a row selects, as text."""
    mask = [False, *batch.tail_mask[row].tolist(), False]
    starts = [i for i, (a, b) in enumerate(pairwise(mask)) if b and not a]
    stops = [i for i, (a, b) in enumerate(pairwise(mask)) if a and not b]
    return [tokenizer.decode(batch.tail[row, a:b]) for a, b in zip(starts, stops, strict=True)]


@pytest.mark.parametrize("template", [..., MISTRAL_LIKE], ids=["tiny", "mistral"])
def test_pieces_in_a_row_are_what_the_template_renders(
    tiny_model_path: str, tokenizer: PreTrainedTokenizerBase, template: object
) -> None:
    own = type(tokenizer).from_pretrained(tiny_model_path)
    if template is not ...:
        own.chat_template = template
    chat = ChatFormat(own)
    contents = ["The hills.\n\nWho was it?", "Ada Alder", "And why?", "The harvest"]
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    rendered = own.apply_chat_template(turns, tokenize=False)
    pieces = [
        chat.opening,
        " The hills.",
        f"{SEPARATOR}Who was it?{chat.question_end}",
        f"{chat.answer_lead}Ada Alder{chat.end}",
        f"{chat.next_turn}And why?{chat.question_end}",
        f"{chat.answer_lead}The harvest{chat.end}",
    ]
    assert "".join(pieces) == rendered
    assert [i for piece in pieces for i in ids(own, piece)] == ids(own, rendered)
    assert chat.end == "</s>"


def test_pieces_without_a_template(tiny_model_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    own = type(tokenizer).from_pretrained(tiny_model_path)
    own.chat_template = None
    chat = ChatFormat(own)
    assert (chat.opening, chat.question_end, chat.answer_lead, chat.end) == ("<s>", "\n", "", "</s>")


def test_a_batch_is_a_function_of_seed_and_step(store: SentenceStore, tokenizer: PreTrainedTokenizerBase) -> None:
    def draw(seed: int, step: int) -> list[torch.Tensor]:
        maker = BatchMaker(store, tokenizer, seed=seed)
        rng = maker.rng(step)
        one = maker.questions(rng, batch=2, context=120, facts=3, turns=2)
        two = maker.reconstruction(rng, batch=2, context=64, length=20)
        three = maker.continuation(rng, batch=2, context=64, length=20)
        four = maker.text(rng, batch=2, context=64, length=20)
        return [t for b in (one, two, three, four) for t in (b.prefix, b.context, b.tail, b.tail_mask)]

    def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert equal(draw(1, 7), draw(1, 7))
    contexts = [draw(seed, step)[1] for seed, step in ((1, 7), (1, 8), (2, 7))]
    assert not torch.equal(contexts[0], contexts[1])
    assert not torch.equal(contexts[0], contexts[2])


@pytest.mark.parametrize(("context", "facts", "turns"), [(120, 3, 3), (300, 8, 2), (250, 2, 1)])
def test_questions(maker: BatchMaker, tokenizer: PreTrainedTokenizerBase, context: int, facts: int, turns: int) -> None:
    batch = maker.questions(maker.rng(0), batch=4, context=context, facts=facts, turns=turns)
    assert batch.task == "question"
    assert batch.prefix.tolist() == ids(tokenizer, "<s>[INST]")
    assert batch.context.shape == (4, context)
    assert batch.tail.shape == batch.tail_mask.shape
    assert batch.num_tokens == batch.context.numel() + batch.tail.numel() + 4 * len(batch.prefix)
    for row in range(4):
        text = tokenizer.decode(batch.context[row])
        said = answers(batch, tokenizer, row)
        assert len(said) == turns
        for reply in said:
            assert reply.startswith(" ")
            assert reply.endswith("</s>")
            assert f"{reply.removesuffix('</s>')}." in text  # the statement that was asked for stands there
            assert split_of(reply.removesuffix("</s>").strip()) == "train"
        tail = tokenizer.decode(batch.tail[row])
        asked = re.findall(r"(?:^\n\n|\[INST\] )(.*?)\[/INST\]", tail)
        assert len(asked) == len(set(asked)) == turns
        for question, reply in zip(asked, said, strict=True):
            assert f"{question}[/INST]{reply}" in tail
            assert re.search(r"the [a-z]+ [a-z]+(?=[.,?])", question).group() in text
        # Nothing stands behind the last answer but padding, and padding is not learned.
        last = batch.tail_mask[row].nonzero().max().item()
        assert set(batch.tail[row, last + 1 :].tolist()) <= {tokenizer.eos_token_id}
        assert not batch.tail_mask[row, last + 1 :].any()


def test_questions_of_the_other_split(store: SentenceStore, tokenizer: PreTrainedTokenizerBase) -> None:
    maker = BatchMaker(store, tokenizer, seed=5, split="eval")
    batch = maker.questions(maker.rng(0), batch=4, context=120, facts=3, turns=2)
    replies = [reply.removesuffix("</s>").strip() for row in range(4) for reply in answers(batch, tokenizer, row)]
    assert {split_of(reply) for reply in replies} == {"eval"}


def test_facts_stand_in_running_text(maker: BatchMaker, tokenizer: PreTrainedTokenizerBase) -> None:
    """Without its statements a context is consecutive prose: no filler was lost or doubled at the places."""
    batch = maker.questions(maker.rng(3), batch=2, context=200, facts=2, turns=2)
    prose = " ".join(ProseWriter().document(i, 60).replace("\n", " ") for i in range(20, 26))
    for row in range(2):
        text = tokenizer.decode(batch.context[row]).replace("\n", " ")
        sentences = [s.strip() for s in re.split(r"(?<=\.) ", text) if s.strip()]
        filler = [sentence for sentence in sentences[:-1] if sentence in prose]
        assert len(filler) >= len(sentences) - 1 - 2
        runs = " ".join(filler)
        assert runs in prose or prose.endswith(filler[0])


@pytest.mark.parametrize(("make", "prompt"), [("reconstruction", REPEAT_PROMPT), ("continuation", CONTINUE_PROMPT)])
def test_instructions(maker: BatchMaker, tokenizer: PreTrainedTokenizerBase, make: str, prompt: str) -> None:
    batch = getattr(maker, make)(maker.rng(0), batch=3, context=90, length=25)
    asked = ids(tokenizer, f"\n\n{prompt}[/INST]")
    assert batch.task == make
    assert batch.context.shape == (3, 90)
    for row in range(3):
        assert batch.tail[row].tolist()[: len(asked)] == asked
        assert batch.tail_mask[row].tolist() == [False] * len(asked) + [True] * 25
    target = batch.tail[:, len(asked) :]
    if make == "reconstruction":
        assert torch.equal(target, batch.context[:, :25])
    else:
        follows_on(maker, batch.context, target)


def follows_on(maker: BatchMaker, context: torch.Tensor, target: torch.Tensor) -> None:
    stored = " ".join(map(str, maker.store.ids.tolist() * 2))
    for row, rest in zip(context.tolist(), target.tolist(), strict=True):
        assert f" {' '.join(map(str, row + rest))} " in f" {stored} "


def test_running_text_goes_on(maker: BatchMaker) -> None:
    batch = maker.text(maker.rng(0), batch=3, context=70, length=30)
    assert (batch.context.shape, batch.tail.shape) == ((3, 70), (3, 30))
    assert batch.tail_mask.all()
    follows_on(maker, batch.context, batch.tail)


def test_a_context_too_short_for_its_facts(maker: BatchMaker) -> None:
    """It holds as many as there is room for, at least one."""
    facts = maker.with_facts(maker.rng(0), 40, 6).facts
    assert 1 <= len(facts) < 6
    with pytest.raises(ValueError, match=r"context: got 10 tokens, too few for 1 facts; expected [0-9]+ more"):
        maker.questions(maker.rng(0), batch=1, context=10, facts=3, turns=1)


def test_a_batch_moves_as_a_whole(maker: BatchMaker) -> None:
    batch = maker.text(random.Random(0), batch=1, context=70, length=30).to(torch.device("meta"))
    assert all(t.is_meta for t in (batch.prefix, batch.context, batch.tail, batch.tail_mask))
    assert batch.task == "text"


def conversations(batch: Batch, row: int) -> list[tuple[list[int], list[int]]]:
    """(question, answer) of each conversation of a row, as token ids."""
    assert batch.turns is not None
    found = []
    for turn in range(int(batch.turns[row].max()) + 1):
        own = batch.turns[row] == turn
        answer = own & batch.tail_mask[row]
        found.append((batch.tail[row, own & ~answer].tolist(), batch.tail[row, answer].tolist()))
    return found


def test_quotes_ask_for_the_words_behind_some_words(maker: BatchMaker, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = maker.quotes(random.Random(0), batch=3, context=120, quotes=3)
    assert batch.task == "quote"
    assert batch.turns is not None
    assert torch.equal(batch.turns >= 0, torch.arange(batch.tail.shape[1]) < (batch.turns >= 0).sum(1)[:, None])
    for row in range(3):
        context = batch.context[row].tolist()
        pairs = conversations(batch, row)
        assert len(pairs) == 3
        for question, answer in pairs:
            text = tokenizer.decode(question)
            before, behind = (part.strip() for part in QUOTE_PROMPT)
            assert before in text
            assert text.index(before) < text.index(behind)
            assert len(answer) == QUOTE_LENGTH
            starts = [i for i in range(len(context)) if context[i : i + len(answer)] == answer]
            leads = [context[i - QUOTE_LEAD : i] for i in starts]
            assert any(lead == question[k : k + QUOTE_LEAD] for lead in leads for k in range(len(question)))


def test_told_facts_are_answered_in_a_sentence_that_holds_the_value(
    store: SentenceStore, tokenizer: PreTrainedTokenizerBase
) -> None:
    maker = BatchMaker(store, tokenizer, seed=1, wording="varied")
    batch = maker.told_facts(random.Random(0), batch=2, context=200, facts=3)
    facts = maker.with_facts(random.Random(0), 200, 3).facts
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for _, answer in conversations(batch, 0)]
    assert len(texts) == 3
    for fact, text in zip(facts, texts, strict=True):
        assert fact.answer in text
        assert text.strip().endswith(".")


def test_marks_are_the_tokens_of_inserted_statements(maker: BatchMaker, tokenizer: PreTrainedTokenizerBase) -> None:
    row = maker.with_facts(random.Random(3), 150, 4)
    assert len(row.ids) == len(row.marks) == 150
    marked = tokenizer.decode([token for token, mark in zip(row.ids, row.marks, strict=True) if mark])
    rest = tokenizer.decode([token for token, mark in zip(row.ids, row.marks, strict=True) if not mark])
    assert all(fact.statement in marked for fact in row.facts)
    assert not any(fact.answer in rest for fact in row.facts)
    batch = maker.quotes(random.Random(3), batch=2, context=150, quotes=1)
    assert batch.marks is not None
    assert batch.marks.shape == batch.context.shape
    assert batch.marks.any()


def test_tokens_that_end_a_sentence(maker: BatchMaker, tokenizer: PreTrainedTokenizerBase) -> None:
    ids_ = ids(tokenizer, " It was so. And then!")
    texts = [tokenizer.decode([i]) for i in ids_]
    assert maker.sentence_ends[ids_].tolist() == [any(c in text for c in ".!") for text in texts]
