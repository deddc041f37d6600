"""The demonstration: its text and facts, the document it prints, and what its tables claim."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest

from condense_core import cli
from condense_core.cli.demo import render
from condense_core.compressor.condenser import Condenser
from condense_core.tasks import KINDS, demo, facts

KEYS = {"context_chars", "context_tokens", "soft_tokens", "compress_ms", "ttft_ms", "kv_bytes", "questions"}
RATIOS = ["4", "8", "16"]


@pytest.fixture(scope="module")
def report(tiny_condenser) -> demo.Report:
    return demo.run_demo(tiny_condenser)


def rendered(report: demo.Report, *, encoding: str = "utf-8") -> str:
    from rich.console import Console

    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    render(report, Console(file=stream, width=200))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def test_text_has_the_promised_length():
    text = demo.demo_text()
    assert 6500 <= len(text) <= 7000
    assert text.isascii()


@pytest.mark.parametrize("fact", demo.DEMO_FACTS, ids=lambda fact: fact.entity)
def test_fact_stands_in_the_text_and_was_never_trained_on(fact):
    text = demo.demo_text()
    fields = {"attribute": fact.attribute, "entity": fact.entity, "answer": fact.answer}
    assert text.count(fact.statement) == text.count(fact.entity) == text.count(fact.answer) == 1
    assert fact.statement in [template.format(**fields) for template in facts._STATEMENTS]
    assert fact.question in [t.format(**fields) for t in (*facts._QUESTIONS[fact.kind], *facts._ANY_QUESTION)]
    assert fact.attribute in facts._ATTRIBUTES[fact.kind]
    assert facts.split_of(fact.entity) == facts.split_of(fact.answer) == "eval"


def test_facts_are_six_of_every_kind_and_spread():
    assert len({fact.key for fact in demo.DEMO_FACTS}) == 6
    assert {fact.kind for fact in demo.DEMO_FACTS} == set(KINDS)
    text = demo.demo_text()
    places = sorted(text.index(fact.statement) for fact in demo.DEMO_FACTS)
    assert places[0] < len(text) // 4
    assert places[-1] > len(text) * 3 // 4


def test_report_is_measured(report, tiny_condenser):
    tokens = len(tiny_condenser.encode(demo.demo_text()))
    assert report.context_tokens == tokens
    assert report.soft_tokens == {key: -(-tokens // int(key)) for key in RATIOS}
    assert list(report.compress_ms) == RATIOS
    assert list(report.ttft_ms) == ["full", *RATIOS]
    assert all(value > 0 for value in [*report.compress_ms.values(), *report.ttft_ms.values()])
    counts = {"full": tokens, **report.soft_tokens}
    assert report.kv_bytes == {key: tiny_condenser.kv_bytes(count) for key, count in counts.items()}
    assert report.kv_bytes["full"] == tokens * 2 * 2 * 2 * 24 * 4  # layers, K and V, heads, width, fp32


def test_answers_are_the_model_s(report, tiny_condenser):
    soft = tiny_condenser.compress(demo.demo_text(), 16)
    question = demo.DEMO_FACTS[0].question
    assert report.answers["16"][0] == tiny_condenser.generate(soft, question, max_new_tokens=demo.MAX_NEW_TOKENS)
    assert report.answers["none"][0] == tiny_condenser.generate("", question, max_new_tokens=demo.MAX_NEW_TOKENS)


def test_json_has_exactly_the_documented_keys(report):
    document = json.loads(json.dumps(report.to_json()))
    assert set(document) == KEYS
    assert len(document["questions"]) == 6
    for row, fact in zip(document["questions"], demo.DEMO_FACTS, strict=True):
        assert set(row) == {"question", "expected", "full", *RATIOS, "none"}
        assert (row["question"], row["expected"]) == (fact.question, fact.answer)
        assert all(isinstance(value, str) for value in row.values())


@pytest.mark.parametrize(
    ("encoding", "right", "wrong"), [("utf-8", "\N{CHECK MARK} ", "\N{BALLOT X} "), ("ascii", "ok ", "x ")]
)
def test_tables_mark_right_and_wrong_answers(report, encoding, right, wrong):
    expected = [fact.answer for fact in demo.DEMO_FACTS]
    # Case and a final stop do not make an answer wrong; another name does.
    answers = {
        "full": [f"{answer.upper()}." for answer in expected],
        "4": expected,
        "8": [*expected[:4], "", "Carl Quinland"],
        "16": ["[red]no such markup"] * 6,
        "none": [""] * 6,
    }
    text = rendered(replace(report, answers=answers), encoding=encoding)
    assert text.count(right + "Wanda Beldorf") == 2
    assert text.count(right + "WANDA BELDORF.") == 1
    assert text.count(wrong + "(nothing)") == 7
    assert text.count(wrong + "[red]no such markup") == 6
    assert wrong + "Carl Quinland" in text
    totals = next(line for line in text.splitlines() if "right answers" in line)
    assert re.findall(r"(\d) of 6", totals) == ["6", "6", "4", "0", "0"]
    assert "\x1b" not in text


def test_tables_show_the_costs(report):
    text = rendered(report)
    for value in (f"{report.context_tokens:,}", *(f"{count:,}" for count in report.soft_tokens.values())):
        assert value in text
    for heading in ("KV cache", "first token", "compress", "full text", "no text"):
        assert heading in text


def test_command_prints_json_and_nothing_else(report, tiny_model_path, monkeypatch, capsys):
    models = []
    monkeypatch.setattr(demo, "run_demo", lambda condenser: models.append(condenser.model_id) or report)
    assert cli.main(["demo", "--json", "--model", str(tiny_model_path)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == report.to_json()
    assert models == [tiny_model_path.name]
    assert err == ""


def test_model_with_too_few_positions(tiny_model_path, monkeypatch, capsys):
    monkeypatch.setattr(Condenser, "max_positions", property(lambda self: 512))
    assert cli.main(["demo", "--model", str(tiny_model_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: model: the demo's text has")
    assert err.count("\n") == 1
