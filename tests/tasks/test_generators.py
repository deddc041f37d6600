"""Tasks: a function of source, seed and index; of the promised length; answerable from their context."""

from __future__ import annotations

import random

import pytest

from condense_core.tasks.facts import draw_facts, split_of
from condense_core.tasks.generators import (
    CONTINUE_PROMPT,
    REPEAT_PROMPT,
    TASKS,
    TaskConfig,
    insert_facts,
    make_task,
    make_tasks,
    running_text,
)
from condense_core.tasks.sources import ListSource, ProseWriter

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = TaskConfig(min_chars=900, max_chars=1200, num_facts=6, num_questions=4, target_chars=100)
# Short documents, double spaces, no sentence at all: what a corpus of strangers holds.
ODD = ListSource(["One line.", "Two  spaces.  After!   Each one?  Yes.", "no end of a sentence here", "a\n\n\nb. c. "])
SOURCES = {"prose": ProseWriter(), "odd": ODD}


@pytest.mark.parametrize("task", TASKS)
def test_source_seed_and_index_decide(task: str) -> None:
    def make(seed: int, index: int) -> object:
        return make_task(task, ProseWriter(), seed=seed, index=index, config=SMALL)

    assert make(1, 0) == make(1, 0)
    assert len({make(1, 0), make(2, 0), make(1, 1)}) == 3
    assert list(make_tasks(task, ProseWriter(), 3, seed=1, config=SMALL)) == [make(1, i) for i in range(3)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_contexts_are_as_long_as_promised(task: str, source: ListSource | ProseWriter) -> None:
    lengths = [len(made.context) for made in make_tasks(task, source, 40, seed=0, config=SMALL)]
    assert min(lengths) >= 900
    assert max(lengths) <= 1200
    assert max(lengths) - min(lengths) > 150


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_question_can_be_answered_from_its_context(split: str) -> None:
    config = TaskConfig(min_chars=900, max_chars=1200, num_facts=6, num_questions=4, split=split)
    for index in range(30):
        made = make_task("question", ProseWriter(), seed=5, index=index, config=config)
        assert made.task == "question"
        assert len(made.turns) == 4
        assert len({turn.question for turn in made.turns}) == 4
        # The facts it drew, drawn again: each one stands in the context, word for word.
        rng = random.Random(f"question-5-{index}")
        rng.randint(900, 1200)
        facts = draw_facts(6, rng, split=split, kinds=config.kinds)
        assert all(made.context.count(fact.statement) == 1 for fact in facts)
        known = {(fact.question, fact.answer, fact.kind) for fact in facts}
        for turn in made.turns:
            assert (turn.question, turn.answer, turn.kind) in known
            assert turn.answer in made.context
            assert split_of(turn.answer) == split


def test_facts_stand_anywhere() -> None:
    places = []
    for made in make_tasks("question", ProseWriter(), 60, seed=0, config=SMALL):
        places += [made.context.index(turn.answer) / len(made.context) for turn in made.turns]
    for part in range(4):
        assert sum(part / 4 <= place < (part + 1) / 4 for place in places) > len(places) / 10


def test_kinds() -> None:
    config = TaskConfig(min_chars=900, max_chars=1200, num_facts=6, num_questions=4, kinds=("date", "code"))
    tasks = make_tasks("question", ProseWriter(), 10, seed=0, config=config)
    assert {turn.kind for made in tasks for turn in made.turns} == {"date", "code"}


def test_reconstruction_repeats_the_beginning() -> None:
    made = make_task("reconstruction", ProseWriter(), seed=0, config=SMALL)
    (turn,) = made.turns
    assert turn.question == REPEAT_PROMPT
    assert turn.answer == made.context[:100]


def test_continuation_goes_on_where_the_context_ends() -> None:
    source = ListSource(["".join(f"Sentence number {i} is here. " for i in range(2000))])
    made = make_task("continuation", source, seed=0, config=SMALL)
    (turn,) = made.turns
    assert turn.question == CONTINUE_PROMPT
    assert len(turn.answer) == 100
    assert made.context + turn.answer in source.document(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_chars": 199}, "min_chars, max_chars: got 199, 7000; expected 200 <= min <= max"),
        ({"min_chars": 7001}, "min_chars, max_chars: got 7001, 7000"),
        ({"num_questions": 0}, "num_questions: got 0, expected 1 to num_facts=8"),
        ({"num_questions": 9}, "num_questions: got 9"),
        ({"num_facts": 61}, "num_facts: got 61, expected at most min_chars/100 = 60"),
        ({"kinds": ("name", "colour")}, "kinds: got name, colour, expected some of name, code"),
        ({"kinds": ()}, "kinds: got none"),
        ({"split": "test"}, "split: got 'test', expected one of train, eval"),
        ({"target_chars": 0}, "target_chars: got 0"),
    ],
)
def test_a_bad_config(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**changes)


def test_as_many_facts_as_fit() -> None:
    config = TaskConfig(min_chars=1000, max_chars=1000, num_facts=10, num_questions=10)
    for made in make_tasks("question", ProseWriter(), 20, seed=0, config=config):
        assert len(made.context) == 1000
        assert all(turn.answer in made.context for turn in made.turns)


def test_a_task_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="task: got 'summary', expected one of question, reconstruction, continuation"):
        make_task("summary", ProseWriter(), seed=0)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), num_chars=st.integers(1, 3000))
def test_running_text_has_exactly_its_length(seed: int, num_chars: int) -> None:
    for source in SOURCES.values():
        assert len(running_text(source, random.Random(seed), num_chars)) == num_chars


@given(
    text=st.text(alphabet="ab .!?\n", max_size=60),
    seed=st.integers(0, 100),
)
def test_taking_the_facts_out_again_leaves_the_text(text: str, seed: int) -> None:
    facts = draw_facts(3, random.Random(seed))
    context = insert_facts(text, facts, random.Random(seed))
    for fact in facts:
        assert context.count(f" {fact.statement}") == 1
        context = context.replace(f" {fact.statement}", "")
    assert context == text
