"""The evaluation on a random model: what is asked, counted, measured and left out."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from condense_core.compressor.condenser import Condenser
from condense_core.tasks.evaluate import answer_ids, answer_loss, evaluate
from condense_core.tasks.generators import Task, TaskConfig, Turn, make_tasks
from condense_core.tasks.metrics import recovered
from condense_core.tasks.sources import ProseWriter

# fp32 losses of some five nats, computed over sequences of another length.
TOLERANCE = 1e-4

# A template that closes turns in its own way and opens the model's.
CLOSED_BY_BARS = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CONFIG = TaskConfig(min_chars=300, max_chars=350, num_facts=2, num_questions=2)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return list(make_tasks("question", ProseWriter(), 2, seed=0, config=CONFIG))


@pytest.fixture(scope="module")
def condensers(tiny_condenser: Condenser) -> dict[str, Condenser]:
    select = Condenser(tiny_condenser.model, tiny_condenser.tokenizer, method="select", model_id="random-tiny")
    return {"pool": tiny_condenser, "select": select}


def test_rows_and_what_they_count(condensers: dict[str, Condenser], tasks: list[Task]) -> None:
    done = []
    rows = evaluate(condensers, tasks, ratios=(4, 8), max_new_tokens=3, progress=lambda: done.append(1))
    assert len(done) == 2
    assert [(row.method, row.ratio) for row in rows] == [
        ("full", 0),
        ("none", 0),
        ("pool", 4),
        ("pool", 8),
        ("select", 4),
        ("select", 8),
    ]
    by_key = {(row.method, row.ratio): row for row in rows}
    none, full = by_key["none", 0], by_key["full", 0]
    counts = [len(condensers["pool"].encode(task.context)) for task in tasks]
    for row in rows:
        assert row.num_questions == 4
        assert 0 <= row.exact_match <= min(row.contained, row.f1) <= 1
        assert row.accuracy == row.exact_match
        assert set(row.contained_by_kind) == set(row.by_kind)
        assert set(row.by_kind) == {turn.kind for task in tasks for turn in task.turns}
        assert math.isfinite(row.loss)
        assert row.recovered == recovered(none.loss, row.loss, full.loss)
        assert row.answer_ms > 0
        assert (row.compress_ms > 0) == (row.ratio > 0)
        expected = {0: 0, 4: sum(-(-n // 4) for n in counts), 8: sum(-(-n // 8) for n in counts)}[row.ratio]
        assert row.positions == (sum(counts) if row.method == "full" else expected) / 2
        assert row.as_dict()["by_kind"] == row.by_kind
    assert (none.recovered, by_key["full", 0].positions) == (0.0, sum(counts) / 2)
    losses = [
        answer_loss(condensers["select"], condensers["select"].compress(task.context, 8), turn.question, turn.answer)
        for task in tasks
        for turn in task.turns
    ]
    assert by_key["select", 8].loss == pytest.approx(sum(losses) / 4, abs=TOLERANCE)


def test_with_the_question_every_question_has_its_own_soft_tokens(
    condensers: dict[str, Condenser], tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    select, asked, used = condensers["select"], [], []
    compress, generate = select.compress, select.generate
    monkeypatch.setattr(select, "compress", lambda *args, **kw: asked.append(kw["question"]) or compress(*args, **kw))
    monkeypatch.setattr(select, "generate", lambda *args, **kw: used.append(args) or generate(*args, **kw))
    rows = evaluate({"select+question": select}, tasks, ratios=(4,), controls=False, max_new_tokens=3)
    questions = [[turn.question for turn in task.turns] for task in tasks]
    assert asked == questions
    for (contexts, prompts), task, own in zip(used, tasks, questions, strict=True):
        assert prompts == own
        assert [soft.text for soft in contexts] == [compress(task.context, 4, question=each).text for each in own]
    (row,) = rows
    assert (row.method, row.ratio, row.num_questions) == ("select+question", 4, 4)
    losses = [
        answer_loss(select, compress(task.context, 4, question=turn.question), turn.question, turn.answer)
        for task in tasks
        for turn in task.turns
    ]
    assert row.loss == pytest.approx(sum(losses) / len(losses), abs=TOLERANCE)


def test_correct_answers_are_counted(tiny_condenser: Condenser, tasks: list[Task]) -> None:
    """Ask for what the model says: a random model is then right about everything."""
    said = [
        Task(
            task.task,
            task.context,
            tuple(
                Turn(turn.question, tiny_condenser.generate(task.context, turn.question, max_new_tokens=6), turn.kind)
                for turn in task.turns
            ),
        )
        for task in tasks
    ]
    (full, none) = evaluate({"pool": tiny_condenser}, said, ratios=(), max_new_tokens=6)
    assert (full.contained, full.exact_match, full.f1) == (1.0, 1.0, 1.0)
    assert set(full.by_kind.values()) == {1.0}
    assert (none.method, none.num_questions) == ("none", 4)


def test_without_controls(condensers: dict[str, Condenser], tasks: list[Task]) -> None:
    (row,) = evaluate({"pool": condensers["pool"]}, tasks[:1], ratios=(8,), controls=False, max_new_tokens=2)
    assert (row.method, row.ratio, row.num_questions) == ("pool", 8, 2)
    assert row.recovered == 0.0  # nothing to measure it against


def test_nothing_to_evaluate(condensers: dict[str, Condenser], tasks: list[Task]) -> None:
    with pytest.raises(ValueError, match="tasks: empty"):
        evaluate(condensers, [], ratios=(4,))
    with pytest.raises(ValueError, match="condensers: empty"):
        evaluate({}, tasks, ratios=(4,))


@pytest.mark.parametrize("context", ["", "The keeper of the amber abbey is Ada Alder."])
def test_the_loss_is_that_of_the_whole_conversation(tiny_condenser: Condenser, context: str) -> None:
    """One forward pass over the chat as a template writes it, question and answer."""
    condenser, question, reply = tiny_condenser, "Who is the keeper?", "Ada Alder"
    content = f"{context}\n\n{question}" if context else question
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    text = condenser.tokenizer.apply_chat_template(chat, tokenize=False)
    ids = condenser.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    count = len(condenser.tokenizer(" Ada Alder</s>", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        log_probs = condenser.model(input_ids=ids).logits[0].log_softmax(-1)
    picked = log_probs[-count - 1 : -1].gather(1, ids[0, -count:, None])
    assert answer_loss(condenser, context, question, reply) == pytest.approx(-picked.mean().item(), abs=TOLERANCE)


@pytest.fixture
def tokenizer(tiny_model_path: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (..., " Ada Alder</s>"),
        (None, "Ada Alder</s>"),
        (CLOSED_BY_BARS, "Ada Alder|"),
    ],
    ids=["tiny", "none", "other"],
)
def test_an_answer_is_written_as_the_template_writes_it(
    tokenizer: PreTrainedTokenizerBase, template: object, written: str
) -> None:
    if template is not ...:
        tokenizer.chat_template = template
    expected = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert answer_ids(tokenizer, "Who?", "Ada Alder") == expected
