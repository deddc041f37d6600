"""`condense report` and `condense eval --plot`: stored evaluations shown, compared and drawn."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from condense_core import cli
from condense_core.tasks import plot
from condense_core.tasks.comparison import compare_reports, name_of

PNG = b"\x89PNG\r\n\x1a\n"


def row(method: str, size: float, right: list[float], *, pruned: bool) -> dict[str, Any]:
    share = sum(right) / len(right)
    found: dict[str, Any] = {
        "method": method,
        **({"keep": size, "ratio": 1 / size if size else 0.0} if pruned else {"ratio": size}),
        **dict.fromkeys(("contained", "f1", "exact_match", "recovered", "share_of_full"), share),
        "loss": 2.0 - share,
        "intervals": {"contained": [share - 0.1, share + 0.1], "share_of_full": [share - 0.1, share + 0.1]},
        "answers": {"contained": right, "loss": [2.0 - value for value in right]},
        **dict.fromkeys(("positions", "compress_ms", "answer_ms", "cache_bytes", "prefill_ms"), 1.0),
        "not_possible": None,
    }
    return found


def report_of(*methods: str, pruned: bool = False, questions: int = 40) -> dict[str, Any]:
    """Of ten contexts; the first method is right about all questions, the next about half, and so on."""
    sizes = (0.5, 0.25) if pruned else (2, 4)
    rows = [row("full", 1.0 if pruned else 0, [1.0] * questions, pruned=pruned)]
    rows.append(row("none", 0, [0.0] * questions, pruned=pruned))
    for number, method in enumerate(methods):
        right = [float(i % (number + 1) == 0) for i in range(questions)]
        rows += [row(method, size, right, pruned=pruned) for size in sizes]
    return {
        "model": "a-model",
        "corpus": "text.txt",
        "complete": True,
        "task": "facts",
        "contexts": 10,
        "questions": questions,
        "context_chars": [600, 700],
        "asked": [{"context": i // 4, "kind": "code", "id": f"{i:016x}"} for i in range(questions)],
        "rows": rows,
    }


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "first.json"
    path.write_text(json.dumps(report_of("pool", "mean")))
    return path


def error_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_a_stored_report_is_shown_with_its_intervals(stored, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["report", str(stored)]) == 0
    out = capsys.readouterr().out
    for part in ("full text", "no context", "pool", "50% [40, 60]", "of full"):
        assert part in out


def test_methods_of_one_report_are_compared_question_by_question(stored, capsys):
    assert cli.main(["report", str(stored), "--against", "mean", "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert [(one["first_row"], one["second_row"]) for one in compared] == [
        ("pool 2x", "mean 2x"),
        ("pool 4x", "mean 4x"),
    ]
    first = compared[0]
    assert (first["difference"], first["interval"]) == (0.5, pytest.approx([0.5, 0.5]))
    assert first["p"] == pytest.approx(2 / 2**10)
    assert (first["first_better"], first["second_better"], first["num_questions"], first["num_contexts"]) == (
        20,
        0,
        40,
        10,
    )


def test_two_reports_are_compared_row_with_row(stored, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    other = report_of("mean", "pool")
    other["rows"] = [one for one in other["rows"] if one["method"] != "none"]
    path = tmp_path / "second.json"
    path.write_text(json.dumps(other))
    assert cli.main(["report", str(stored), str(path), "--measure", "loss"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "mean 2x (2) mean 2x (1) 40 1.00 1.50 -0.50 [-0.50, -0.50] 0.002 20 : 0" in out
    assert "full (2) full (1) 40 1.00 1.00 +0.00 [+0.00, +0.00] 1.000 0 : 0" in out


def test_a_control_is_compared_with_all_sizes_and_reports_with_their_own():
    first, second = report_of("pool"), report_of("mean", "pool")
    compared = compare_reports([first, second], against="full")
    assert [(one["first_row"], one["first_report"], one["second_report"]) for one in compared] == [
        ("pool 2x", 0, 0),
        ("pool 4x", 0, 0),
        ("mean 2x", 1, 1),
        ("mean 4x", 1, 1),
        ("pool 2x", 1, 1),
        ("pool 4x", 1, 1),
    ]


def test_an_unfinished_row_is_compared_on_what_it_has():
    report = report_of("pool", "mean")
    report["rows"][-1]["answers"] = {"contained": report["rows"][-1]["answers"]["contained"][:8]}
    compared = compare_reports([report], against="mean")
    assert [(one["num_questions"], one["num_contexts"]) for one in compared] == [(40, 10), (8, 2)]


def test_names_of_rows():
    assert [name_of(one) for one in report_of("pool")["rows"]] == ["full", "no context", "pool 2x", "pool 4x"]
    assert name_of(report_of("knorm", pruned=True)["rows"][2]) == "knorm 0.5"


@pytest.mark.parametrize("pruned", [False, True], ids=["soft tokens", "pruned caches"])
def test_a_picture_is_drawn(pruned, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = []
    for number in range(2):
        report = report_of("one", "two", pruned=pruned)
        report["rows"].append(
            {"method": "three", "keep": 0.1, "not_possible": "keeps more"} if pruned else report["rows"][-1]
        )
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(report))
    picture = tmp_path / "picture.png"
    assert cli.main(["report", *map(str, files), "--plot", str(picture)]) == 0
    capsys.readouterr()
    assert picture.read_bytes().startswith(PNG)


def test_an_evaluation_draws_itself_and_says_its_dtype(tiny_model_path, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    argv = [
        "eval",
        "--questions",
        "4",
        "--questions-per-context",
        "2",
        "--facts-per-context",
        "3",
        "--min-chars",
        "400",
    ]
    argv += ["--max-chars", "500", "--max-new-tokens", "3", "--model", str(tiny_model_path), "--ratios", "2,4"]
    assert cli.main([*argv, "--dtype", "bfloat16", "--plot", str(picture), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "bfloat16"
    assert picture.read_bytes().startswith(PNG)
    assert [one["context"] for one in report["asked"]] == [0, 0, 1, 1]
    assert len({one["id"] for one in report["asked"]}) == 4
    for one in report["rows"]:
        assert {len(values) for values in one["answers"].values()} == {4}
        low, high = one["intervals"]["loss"]
        assert low <= one["loss"] <= high


# -- bad input ---------------------------------------------------------------------------------------------------------


def damaged(change: str) -> bytes:
    report = report_of("pool")
    if change == "row":
        report["rows"][2]["contained"] = "many"
    elif change == "rows":
        report["rows"] = {}
    else:
        del report[change]
    return json.dumps(report).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"{",
        b"[]",
        b"{}",
        b"[" * 100_000,
        *map(damaged, ("row", "rows", "model", "questions", "context_chars")),
    ],
    ids=["empty", "bytes", "cut", "a list", "no fields", "deep", "a score", "rows", "model", "questions", "lengths"],
)
def test_what_is_no_report_is_refused(content, tmp_path, capsys):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    picture = tmp_path / "picture.png"
    assert "report.json" in error_line(["report", str(path), "--plot", str(picture)], capsys)
    assert not picture.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "magic"], "against: got 'magic', expected one of full, none, pool, mean"),
        (["--against", "full", "--measure", "speed"], "measure: got 'speed', expected one of contained"),
        (["--plot", "no/such/folder/picture.png"], "is not an existing folder"),
        (["--plot", "picture.gif"], "plot: got 'picture.gif', expected a file that ends in .png, .pdf, .svg"),
        (["nowhere.json"], "report: nowhere.json is not a file"),
    ],
)
def test_bad_options(options, message, stored, capsys):
    assert message in error_line(["report", str(stored), *options], capsys)


@pytest.mark.parametrize("name", ["picture.gif", "no/such/folder/picture.png"])
def test_an_evaluation_that_could_not_draw_does_not_begin(name, tmp_path, capsys):
    assert "plot: " in error_line(["eval", "--model", str(tmp_path / "none"), "--plot", name], capsys)


def test_a_picture_without_its_library(stored, monkeypatch, capsys):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert "condense-core[bench]" in error_line(["report", str(stored), "--plot", "picture.png"], capsys)


def test_reports_of_other_questions_or_without_answers_are_not_compared(stored, tmp_path, capsys):
    for change in ("other questions", "no answers"):
        other = deepcopy(report_of("pool"))
        for one in other["asked"]:
            one["id"] += "x" * (change == "other questions")
        for one in other["rows"]:
            one["answers"] = {} if change == "no answers" else one["answers"]
        path = tmp_path / "other.json"
        path.write_text(json.dumps(other))
        assert "have no question in common" in error_line(["report", str(stored), str(path)], capsys)
