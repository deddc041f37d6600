"""The evaluation of pruned caches on a random model: what is read, asked, counted and measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from condense_core.compressor.condenser import Condenser
from condense_core.pruning import TOVA, AdaKV, Method, PrunedCache, QueryAware, Random, SnapKV
from condense_core.pruning.dense import DensePrefill
from condense_core.pruning.session import Session
from condense_core.pruning.text import ask, prefill, question_ids
from condense_core.tasks import pruning as module
from condense_core.tasks.answers import answers_from_cache, answers_from_caches
from condense_core.tasks.evaluate import answer_loss
from condense_core.tasks.generators import Task, TaskConfig, Turn, make_tasks
from condense_core.tasks.metrics import recovered
from condense_core.tasks.pruning import PruningRow, evaluate_pruning
from condense_core.tasks.sources import ProseWriter

# fp32 losses of some seven nats; the context and the question are read in two passes instead of one.
TOLERANCE = 1e-4
CONFIG = TaskConfig(min_chars=300, max_chars=350, num_facts=2, num_questions=2)
SHARES = (0.5, 0.25)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return list(make_tasks("question", ProseWriter(), 2, seed=0, config=CONFIG))


def run(condenser: Condenser, tasks: list[Task], **changes: Any) -> list[PruningRow]:
    options = {"methods": ["keydiff", "adakv(snapkv)"], "shares": SHARES, "window": 8, "max_new_tokens": 3}
    return evaluate_pruning(condenser, tasks, **(options | changes))


def test_rows_and_what_they_count(tiny_condenser: Condenser, tasks: list[Task]) -> None:
    done: list[int] = []
    rows = run(tiny_condenser, tasks, progress=lambda: done.append(1))
    assert len(done) == 2
    assert [(row.method, row.keep) for row in rows] == [
        ("full", 1.0),
        ("none", 0.0),
        *((name, share) for name in ("random", "query_aware", "keydiff", "adakv(snapkv)") for share in SHARES),
    ]
    by_key = {(row.method, row.keep): row for row in rows}
    full, none = by_key["full", 1.0], by_key["none", 0.0]
    for row in rows:
        assert row.num_questions == 4
        assert set(row.by_kind) == {turn.kind for task in tasks for turn in task.turns}
        assert math.isfinite(row.loss)
        assert row.recovered == recovered(none.loss, row.loss, full.loss)
        assert row.answer_ms > 0
        assert (row.prefill_ms > 0) == (row.method != "none")
        assert row.as_dict()["keep"] == row.keep
    assert (none.cache_bytes, none.ratio, full.ratio) == (0.0, 0.0, 1.0)
    model, tokenizer = tiny_condenser.model, tiny_condenser.tokenizer
    for key, method in (
        (("random", 0.5), Random(keep=0.5)),
        (("adakv(snapkv)", 0.25), AdaKV(SnapKV(keep=0.25, window=8))),
    ):
        caches = [prefill(model, tokenizer, task.context, method) for task in tasks]
        assert by_key[key].cache_bytes == sum(cache.nbytes for cache in caches) / 2
        assert by_key[key].ratio == sum(c.full_nbytes for c in caches) / sum(c.nbytes for c in caches)
    turns = [(task.context, turn) for task in tasks for turn in task.turns]
    for row, context in ((full, True), (none, False)):
        losses = [answer_loss(tiny_condenser, text if context else "", t.question, t.answer) for text, t in turns]
        assert row.loss == pytest.approx(sum(losses) / 4, abs=TOLERANCE)


def test_correct_answers_are_counted(tiny_condenser: Condenser, tasks: list[Task]) -> None:
    """Ask for what the model says from one of the caches: from that it is then right about everything."""
    model, tokenizer = tiny_condenser.model, tiny_condenser.tokenizer

    def said(task: Task) -> Task:
        cache = prefill(model, tokenizer, task.context, SnapKV(keep=0.25, window=8))
        answers = [ask(model, tokenizer, cache, turn.question, max_new_tokens=6) for turn in task.turns]
        turns = (Turn(turn.question, answer, turn.kind) for turn, answer in zip(task.turns, answers, strict=True))
        return Task(task.task, task.context, tuple(turns))

    rows = run(tiny_condenser, [said(t) for t in tasks], methods=["snapkv"], shares=[0.25], max_new_tokens=6)
    row = {row.method: row for row in rows}["snapkv"]
    assert (row.contained, row.exact_match, row.f1) == (1.0, 1.0, 1.0)


def test_what_decides_what_stays(tiny_condenser: Condenser, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that know their question are one each; all others are made once for all questions, and know none."""
    seen: list[Method] = []
    prune = DensePrefill.prune

    def spy(dense: DensePrefill, method: Method) -> PrunedCache:
        seen.append(method)
        return prune(dense, method)

    monkeypatch.setattr(DensePrefill, "prune", spy)
    run(tiny_condenser, tasks[:1], methods=["snapkv", "snapkv", "random", "adakv(query_aware(tova))"], shares=[0.5])
    ids = [tuple(question_ids(tiny_condenser.tokenizer, turn.question)) for turn in tasks[0].turns]
    assert seen == [
        Random(keep=1.0),
        Random(keep=0.5),
        *(QueryAware(SnapKV(keep=0.5, window=8), question) for question in ids),
        SnapKV(keep=0.5, window=8),
        *(AdaKV(QueryAware(TOVA(keep=0.5), question)) for question in ids),
    ]


def test_a_context_is_read_once_for_all_rows_and_once_a_row_in_chunks(
    tiny_condenser: Condenser, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int | None] = []
    prefill = Session.prefill

    def spy(session: Session, cache: Any, embeds: Any, mask: Any, chunk_size: int | None, ids: Any = None) -> Any:
        read.append(chunk_size)
        return prefill(session, cache, embeds, mask, chunk_size, ids)

    monkeypatch.setattr(Session, "prefill", spy)
    whole = run(tiny_condenser, tasks)
    assert read == [None] * len(tasks)
    read.clear()
    chunked = run(tiny_condenser, tasks, chunk_size=10_000)  # a chunk that holds it all
    rows = len([row for row in whole if row.method not in ("none", "query_aware")])
    assert read == [10_000] * (len(tasks) * rows + 4 * len(SHARES))
    for one, other in zip(whole, chunked, strict=True):
        assert (one.loss, one.cache_bytes, one.contained) == (other.loss, other.cache_bytes, other.contained)


def test_caches_of_their_own_are_asked_as_one_batch(tiny_condenser: Condenser, tasks: list[Task]) -> None:
    model, tokenizer = tiny_condenser.model, tiny_condenser.tokenizer
    turns = tasks[0].turns
    for wrap in (lambda method: method, AdaKV):
        caches = [
            prefill(model, tokenizer, tasks[0].context, wrap(SnapKV(keep=share, window=8))) for share in (0.5, 0.25)
        ]
        found = answers_from_caches(tiny_condenser, caches, turns, 6)
        for i, (cache, turn) in enumerate(zip(caches, turns, strict=True)):
            assert found.texts[i] == ask(model, tokenizer, cache, turn.question, max_new_tokens=6)
            alone = answers_from_cache(tiny_condenser, cache, [turn], 6)
            assert found.losses[i] == pytest.approx(alone.losses[0], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["magic"]}, "method: got 'magic'"),
        ({"shares": [0.5, 1.5]}, "keep is 1.5, expected a share in"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str, tiny_condenser: Condenser, tasks: list[Task]) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny_condenser, tasks, **changes)


def test_a_share_below_what_a_method_protects_is_a_row_known_before_the_first_prefill(
    tiny_condenser: Condenser, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[PruningRow] = []
    monkeypatch.setattr(module, "DensePrefill", lambda *_: first or pytest.fail("read before anything was reported"))
    with pytest.raises(AttributeError):  # what is read is no cache
        run(tiny_condenser, tasks, window=None, shares=[0.1], on_rows=lambda rows: first.extend(rows()))
    refused = {row.method: row for row in first}
    assert set(refused) == {"adakv(snapkv)"}
    assert "fewer than the 64 that it always keeps" in refused["adakv(snapkv)"].not_possible
    monkeypatch.undo()
    rows = run(tiny_condenser, tasks, window=None, shares=[0.5, 0.1], methods=["snapkv", "keydiff"])
    by_key = {(row.method, row.keep): row for row in rows}
    assert [key for key, row in by_key.items() if row.not_possible] == [("snapkv", 0.5), ("snapkv", 0.1)]
    assert {row.num_questions for row in rows if not row.not_possible} == {4}
    assert by_key["snapkv", 0.1].contained is by_key["snapkv", 0.1].loss is None


def test_a_method_that_refuses_the_model_does_not_end_the_evaluation(
    tiny_condenser: Condenser, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    prune = DensePrefill.prune

    def picky(dense: DensePrefill, method: Method) -> PrunedCache:
        if isinstance(method, AdaKV):
            raise TypeError("AdaKV:\nnot for this model")
        return prune(dense, method)

    monkeypatch.setattr(DensePrefill, "prune", picky)
    rows = {(row.method, row.keep): row for row in run(tiny_condenser, tasks)}
    assert rows["adakv(snapkv)", 0.5].not_possible == "AdaKV: not for this model"
    assert rows["keydiff", 0.25].num_questions == 4


def test_rows_grow(tiny_condenser: Condenser, tasks: list[Task]) -> None:
    lengths: list[int] = []
    run(tiny_condenser, tasks, methods=["keydiff"], shares=[0.5], on_rows=lambda rows: lengths.append(len(rows())))
    assert lengths == [0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5]


def test_a_context_beyond_the_positions_is_refused_before_anything_is_read(
    tiny_condenser: Condenser, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DensePrefill", lambda *_: pytest.fail("read"))
    long = Task("question", "hill " * 5000, tasks[0].turns)
    with pytest.raises(ValueError, match=r"text: .* tokens with the template before it, the model has"):
        run(tiny_condenser, [tasks[0], long])


def test_nothing_to_evaluate(tiny_condenser: Condenser) -> None:
    with pytest.raises(ValueError, match="tasks: empty"):
        run(tiny_condenser, [])
