"""`condense eval`, in process and on a random tiny model."""

from __future__ import annotations

import json

import pytest

from condense_core import cli
from condense_core.compressor.condenser import Condenser
from condense_core.tasks import evaluate
from condense_core.tasks import report as reports
from condense_core.tasks.answers import Answers
from tests.tasks.squad_file import write_squad

EVAL = ["eval", "--questions", "4", "--questions-per-context", "2", "--facts-per-context", "3"]
SHORT = ["--min-chars", "400", "--max-chars", "500", "--max-new-tokens", "4"]


def error_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run bad input; returns its one line on stderr."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_eval_reports_controls_and_every_method_and_ratio(tiny_model_path, tmp_path, capsys):
    report_path = tmp_path / "report.json"
    argv = [*EVAL, *SHORT, "--model", str(tiny_model_path), "--ratios", "4,8", "--json", "-o", str(report_path)]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(report_path.read_text())
    assert report["questions"] == 4
    assert report["contexts"] == 2
    found = [(row["method"], row["ratio"]) for row in report["rows"]]
    methods = [(method, ratio) for method in ("pool", "select", "select+question") for ratio in (4, 8)]
    assert found == [("full", 0), ("none", 0), *methods]
    full, none, pool4, pool8 = report["rows"][:4]
    assert full["positions"] > pool4["positions"] > pool8["positions"] > none["positions"] == 0
    assert all(row["num_questions"] == 4 and row["loss"] > 0 for row in report["rows"])


def test_eval_is_reproducible_and_depends_on_the_seed(tiny_model_path, capsys):
    def losses(seed: int) -> list[float]:
        argv = [*EVAL, *SHORT, "--model", str(tiny_model_path), "--ratios", "4", "--methods", "pool", "--json"]
        assert cli.main([*argv, "--seed", str(seed)]) == 0
        return [row["loss"] for row in json.loads(capsys.readouterr().out)["rows"]]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_eval_prints_a_table(tiny_model_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # processes of pytest-xdist have 80
    argv = [*EVAL, *SHORT, "--model", str(tiny_model_path), "--ratios", "4", "--methods", "pool"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    for part in ("full text", "no context", "pool", "4x", "contained", "exact match", "recovered"):
        assert part in out


@pytest.fixture
def checkpoints(tiny_model_path, tmp_path) -> list[str]:
    """Two checkpoints of one method, as two training runs leave them."""
    folders = [tmp_path / run / "checkpoint" for run in ("first", "second")]
    for folder in folders:
        Condenser.from_pretrained(tiny_model_path, device="cpu").compressor.save(folder)
    return [str(folder) for folder in folders]


def test_eval_of_select_with_and_without_the_question(tiny_model_path, capsys):
    argv = [*EVAL, *SHORT, "--model", str(tiny_model_path), "--ratios", "2.5", "--methods", "select,select+question"]
    assert cli.main([*argv, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["method"], row["ratio"]) for row in rows[2:]] == [("select", 2.5), ("select+question", 2.5)]


@pytest.mark.parametrize(
    ("count", "methods", "names"),
    [
        pytest.param(1, None, ["pool"], id="one, under its method's name"),
        pytest.param(2, None, ["first", "second"], id="two of one method, under their folders' names"),
        pytest.param(1, "pool,select", ["first", "pool", "select"], id="one beside the model's own"),
    ],
)
def test_eval_of_trained_checkpoints(count, methods, names, checkpoints, tiny_model_path, tmp_path, capsys):
    argv = [*EVAL, *SHORT, "--model", str(tiny_model_path), "--ratios", "4", "--json"]
    argv += [part for folder in checkpoints[:count] for part in ("--compressor", folder)]
    assert cli.main(argv if methods is None else [*argv, "--methods", methods]) == 0
    found = [row["method"] for row in json.loads(capsys.readouterr().out)["rows"]]
    folders = {name: str(tmp_path / name / "checkpoint") for name in ("first", "second")}
    assert found == ["full", "none", *(folders.get(name, name) for name in names)]


def test_a_chat_model_that_answers_in_a_sentence_has_the_value_counted(tiny_model_path, monkeypatch, capsys):
    """The random model is made to say what a chat model says."""
    asked = {}

    def answers_about(_condenser, context, turns, max_new_tokens):
        asked["max_new_tokens"] = max_new_tokens
        said = f"Certainly! {context}" if isinstance(context, str) and context else "I do not know."
        return Answers([said] * len(turns), [1.0] * len(turns), 1.0)

    monkeypatch.setattr(evaluate, "answers_about", answers_about)
    argv = [*EVAL, *SHORT[:4], "--model", str(tiny_model_path), "--ratios", "4", "--methods", "pool", "--json"]
    assert cli.main(argv) == 0
    full, none, pool = json.loads(capsys.readouterr().out)["rows"]
    assert (full["contained"], full["exact_match"]) == (1.0, 0.0)
    assert set(full["contained_by_kind"].values()) == {1.0}
    assert none["contained"] == pool["contained"] == 0.0
    assert asked["max_new_tokens"] == 48
    assert cli.main([*argv, "--max-new-tokens", "7"]) == 0
    assert asked["max_new_tokens"] == 7


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError], ids=["Ctrl-C", "an error of ours"])
@pytest.mark.parametrize("pruning", [False, True], ids=["soft tokens", "pruned caches"])
def test_an_evaluation_cut_off_leaves_what_was_measured(end, pruning, tiny_model_path, tmp_path, monkeypatch, capsys):
    path = tmp_path / "report.json"
    name = "evaluate_pruning" if pruning else "evaluate"
    evaluation = getattr(reports, name)

    def cut_off(*args, on_rows, **options):
        cells = []

        def count(rows):
            on_rows(rows)
            assert json.loads(path.read_text())["complete"] is False
            cells.append(rows)
            if len(cells) == 3:
                raise end

        return evaluation(*args, on_rows=count, **options)

    monkeypatch.setattr(reports, name, cut_off)
    argv = [
        *EVAL,
        *SHORT,
        "--model",
        str(tiny_model_path),
        "-o",
        str(path),
        "--methods",
        "knorm" if pruning else "pool",
    ]
    argv += ["--pruning", "--keep", "0.5"] if pruning else ["--ratios", "4,8"]
    if end is KeyboardInterrupt:
        assert cli.main(argv) == 130
        out, err = capsys.readouterr()
        assert err == "error: interrupted\n"
    else:
        with pytest.raises(end):
            cli.main(argv)
        out, err = capsys.readouterr()
    assert "not complete" in out
    report = json.loads(path.read_text())
    assert (report["complete"], report["contexts"]) == (False, 0)
    measured = [row["method"] for row in report["rows"] if row["num_questions"]]
    assert measured == (["full", "none"] if pruning else ["full", "none", "pool"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_share_that_is_not_possible_is_a_row(tiny_model_path, capsys):
    argv = [*EVAL, *SHORT, "--model", str(tiny_model_path), "--pruning", "--methods", "snapkv", "--keep", "0.9,0.1"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "snapkv at 0.1 is not possible" in out
    assert "always keeps" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratios", "four"], "ratios: got 'four'"),
        (["--ratios", "0"], "ratio: got 0"),
        (["--ratios", "3"], "expected one of 2, 4, 8, 16, 32"),
        (["--methods", "magic"], "methods: got 'magic'"),
        (["--min-chars", "9000"], "min_chars"),
        (["--facts-per-context", "1000"], "num_facts"),
        (["--corpus", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--compressor", "no/such/run"], "no/such/run"),
        (["--pruning", "--compressor", "run"], "--compressor: of soft tokens"),
        (["-o", "no/such/folder/report.json"], "is not an existing folder"),
    ],
)
def test_eval_bad_input(options, message, tiny_model_path, capsys):
    assert message in error_line(["eval", "--model", str(tiny_model_path), *options], capsys)


SQUAD = ["--questions-per-context", "3", "--min-chars", "600", "--max-chars", "900", "--max-new-tokens", "3"]


@pytest.mark.parametrize("pruning", [False, True], ids=["soft tokens", "pruned caches"])
def test_questions_of_a_squad_file_are_asked(pruning, tiny_model_path, tmp_path, capsys):
    path = write_squad(tmp_path / "questions.json", articles=4, paragraphs=2)
    argv = ["eval", "--squad", str(path), "--questions", "6", *SQUAD, "--model", str(tiny_model_path), "--json"]
    argv += ["--pruning", "--methods", "knorm", "--keep", "0.5"] if pruning else ["--ratios", "4", "--methods", "pool"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["task"], report["corpus"], report["wording"]) == ("squad", "questions.json", None)
    assert (report["questions"], report["contexts"], report["complete"]) == (6, 2, True)
    full = report["rows"][0]
    assert full["num_questions"] == 6
    assert set(full["by_kind"]) <= {"who", "when", "how many"}


def test_facts_in_varied_wording_are_asked(tiny_model_path, capsys):
    argv = [*EVAL, "--min-chars", "600", "--max-chars", "700", "--max-new-tokens", "3", "--wording", "varied", "--json"]
    assert cli.main([*argv, "--model", str(tiny_model_path), "--ratios", "4", "--methods", "pool"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["task"], report["wording"], report["questions"]) == ("facts", "varied", 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpus", "text.txt"], "--corpus: of inserted facts"),
        (["--facts-per-context", "3"], "--facts-per-context: of inserted facts"),
        (["--wording", "varied"], "--wording: of inserted facts"),
        (["--min-chars", "90000", "--max-chars", "99000"], "min_chars, max_chars: got 90000, 99000; no such context"),
        (["--squad", "nowhere.json"], "squad: nowhere.json is not a file"),
    ],
)
def test_squad_bad_input(options, message, tiny_model_path, tmp_path, capsys):
    path = write_squad(tmp_path / "questions.json")
    argv = ["eval", "--squad", str(path), "--model", str(tiny_model_path), *options]
    assert message in error_line(argv, capsys)


def test_a_damaged_squad_file_is_one_line_and_leaves_no_report(tiny_model_path, tmp_path, capsys):
    path = tmp_path / "questions.json"
    path.write_text('{"data": [{"paragraphs": [{"context": "A text."}]}]}')
    report = tmp_path / "report.json"
    line = error_line(["eval", "--squad", str(path), "--model", str(tiny_model_path), "-o", str(report)], capsys)
    assert "questions.json, data[0].paragraphs[0]: no 'qas'" in line
    assert not report.exists()


def test_a_wording_that_there_is_not(tiny_model_path, capsys):
    line = error_line(["eval", "--wording", "odd", "--model", str(tiny_model_path)], capsys)
    assert "wording: got 'odd', expected one of plain, varied" in line


def test_eval_of_an_encoder_in_8_bits(tiny_model_path, capsys):
    argv = [*EVAL, *SHORT, "--model", str(tiny_model_path), "--ratios", "4", "--methods", "pool,mean", "--json"]
    reports = []
    for more in ([], ["--encoder-weights", "fp8"]):
        assert cli.main([*argv, *more]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    exact, coarse = reports
    assert "encoder_weights" not in exact
    assert coarse["encoder_weights"] == "fp8"
    assert coarse["rows"][0]["loss"] == exact["rows"][0]["loss"]  # of the full text: the decoder is the same
    pool = [report["rows"][2] for report in reports]
    assert [row["method"] for row in pool] == ["pool", "pool"]
    assert pool[0]["loss"] != pool[1]["loss"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--encoder-weights", "int3"], "encoder_weights: got 'int3', expected one of int8, fp8"),
        (["--pruning", "--encoder-weights", "int8"], "--encoder-weights: of soft tokens"),
    ],
)
def test_eval_refuses_other_encoder_weights(more, message, capsys):
    assert message in error_line([*EVAL, *more], capsys)
