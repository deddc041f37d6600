"""Goals, records and tables: what docs/ prints is what `bench/results` holds, and the programs that write both run."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from condense_core.decoder.embedded import embedded_model_path

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    """The modules of `bench/`, which is no installed package."""
    sys.path.insert(0, str(CHECKOUT))
    try:
        from bench import compare, cpu, decode, goal, kept_answers, layer, memory, prefill, run, tables

        yield SimpleNamespace(
            compare=compare,
            cpu=cpu,
            decode=decode,
            goal=goal,
            kept_answers=kept_answers,
            layer=layer,
            memory=memory,
            prefill=prefill,
            run=run,
            tables=tables,
        )
    finally:
        sys.path.remove(str(CHECKOUT))


def test_the_table_of_kept_answers_counts_what_was_recorded(bench) -> None:
    flags = {"2": [1, 1, 1, 1], "4": [1, 1, 1, 0], "8": [1, 1, 0, 0], "16": [0, 0, 0, 0]}
    recorded = {"model": "m", "dtype": "torch.float32", "contexts": 2, "kept": {"facts, question known": flags}}
    found = bench.kept_answers.table(recorded)
    assert "| facts inserted into other text, question known | 4 | 100% | 75% | 50% | 0% |" in found
    assert "m, float32, 2 contexts" in found


def test_kept_answers_runs(bench, tiny_model_path, tmp_path) -> None:
    """On a random model, of what it does with a text, a question and four ratios."""
    squad = tmp_path / "squad.json"
    paragraph = {"context": "The keeper of the mill is Ada Bach. " * 170, "qas": []}
    answer = {"text": "Ada Bach", "answer_start": paragraph["context"].index("Ada Bach")}
    paragraph["qas"] = [{"id": "1", "question": "Who keeps the mill?", "answers": [answer]}]
    squad.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [paragraph]}]}))
    found = bench.kept_answers.record(str(tiny_model_path), None, str(squad), 1, torch.float32)
    assert {name: {len(flags) for flags in rows.values()} for name, rows in found["kept"].items()} == {
        f"{task}, question {known}": {count}
        for task, count in (("facts", 10), ("squad", 1))
        for known in ("known", "unknown")
    }
    assert found["kept"]["squad, question known"]["2"] == [1]


@pytest.mark.parametrize("page", ["docs/native.md", "docs/pruning.md", "docs/select.md", "docs/serving.md"])
def test_a_page_s_tables_are_those_of_the_records(bench, page: str) -> None:
    assert page in bench.tables.PAGES
    text = (CHECKOUT / page).read_text()
    assert "<!-- python -m bench.tables" in text
    assert text == bench.tables.filled(text), "run python -m bench.tables"


@pytest.mark.parametrize(
    ("kind", "reached", "met", "words"),
    [
        ("speed-up", 2.0, True, "at least 2x rival: 2.00x, met"),
        ("speed-up", 1.9, False, "at least 2x rival: 1.90x, MISSED"),
        ("bandwidth", 2.5, True, "at least 200% of a copy's bandwidth: 250%, met"),
        ("us", 2.1, False, "at most 2 us: 2.1 us, MISSED"),
        ("temporaries", 0.5, True, "at most 2 MiB of temporaries: 0.50 MiB, met"),
        ("overhead", 0.1, True, "at most 200% of the prefill: 10.0%, met"),
        ("peak", None, None, "at most 200% of the peak of rival: not measured"),
    ],
)
def test_a_goal_says_what_was_wanted_and_what_was_reached(
    bench, kind: str, reached: float | None, met: bool | None, words: str
) -> None:
    verdict = bench.goal.Goal(kind, 2.0, "rival").judge(reached)
    assert verdict["met"] is met
    assert bench.goal.sentence(verdict) == words


def test_a_goal_of_an_unknown_kind_is_refused(bench) -> None:
    with pytest.raises(ValueError, match="kind: 'fast', expected one of speed-up"):
        bench.goal.Goal("fast", 1.0)


@pytest.mark.parametrize(
    ("device", "stem"),
    [
        ("AMD EPYC 9554 64-Core Processor", "amd-epyc-9554"),
        ("Intel(R) Xeon(R) Platinum 8480C", "intel-xeon-platinum-8480c"),
        ("NVIDIA H200", "nvidia-h200"),
    ],
)
def test_a_record_is_named_after_its_processor(bench, device: str, stem: str) -> None:
    assert bench.run.stem(device) == stem


def smoke(bench, part: str) -> dict:
    """A part of the CPU's record at small sizes, as it would be read back."""
    found = bench.cpu.PARTS[part](argparse.Namespace(smoke=True, kvpress=None))
    return json.loads(json.dumps({"machine": bench.run.machine(torch.device("cpu")), **found}))


@pytest.mark.parametrize("part", ["layers", "decode"])
def test_a_part_of_the_record_becomes_a_table(bench, part: str, tmp_path: Path) -> None:
    (tmp_path / "cpu-here.json").write_text(json.dumps({part: smoke(bench, part)}))
    table = bench.tables.table(part, tmp_path)
    assert "`bench/results/cpu-here.json`" in table
    assert table.count("\n| ") == 1 + {"layers": 12, "decode": 4}[part]
    assert "WRONG" not in table
    page = f"before\n<!-- python -m bench.tables {part} -->\nstale\n<!-- end -->\nbehind\n"
    assert table in bench.tables.filled(page, tmp_path)
    assert "stale" not in bench.tables.filled(page, tmp_path)


def test_without_a_record_a_page_says_how_to_make_one(bench, tmp_path: Path) -> None:
    assert bench.tables.table("ops", tmp_path) == "No record is here yet: `make bench-cpu` makes one."


@pytest.mark.slow
def test_every_part_is_measured_and_written(tmp_path: Path) -> None:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "CONDENSE_BACKEND")
    }
    command = [sys.executable, "-m", "bench.cpu", "--smoke", "--out", str(tmp_path)]
    command += ["--model", str(embedded_model_path())]
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment | {"TORCH_COMPILE_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("cpu-*.json")
    document = json.loads(path.read_text())
    assert list(document) == ["ops", "layers", "decode", "prefill", "prefill_model", "memory"]
    assert all(part["machine"]["torch"] == torch.__version__ for part in document.values())
    assert {row["dtype"] for row in document["ops"]["rows"]} == {"float32", "bfloat16"}


def test_a_comparison_imports_the_side_that_it_measures(bench, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for folder in ("condense_core", "kernels", "models"):
        (other / folder).mkdir(parents=True)
    (other / "condense_core" / "__init__.py").write_text("SIDE = 'the other'")
    variables = bench.compare.environment(other, tmp_path / "links")
    code = "import condense_core, bench; print(condense_core.SIDE, bench.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("the other ")[1].strip() == str(tmp_path / "links" / "bench" / "__init__.py"), done.stderr


def test_a_comparison_takes_turns_over_every_case(bench, tmp_path: Path) -> None:
    sides = {name: bench.compare.environment(CHECKOUT, tmp_path / name) for name in ("base", "working tree")}
    options = argparse.Namespace(case="key_norm", dtype="fp32", rounds=2, smoke=True)
    times = bench.compare.take_turns(sides, options)
    assert list(times) == ["key_norm n=512", "key_norm n=1024"]
    for rounds in times.values():
        assert {name: len(values) for name, values in rounds.items()} == {"base": 2, "working tree": 2}
        assert min(map(min, rounds.values())) > 0


def test_a_comparison_refuses_an_op_whose_tests_fail(bench, tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    (folder / "test_key_norm.py").write_text("def test_it(): assert 1 == 2, 'off by one'")
    assert "off by one" in bench.compare.test("key_norm", tmp_path, dict(os.environ))
    (folder / "test_key_norm.py").write_text("def test_it(): pass")
    assert bench.compare.test("key_norm", tmp_path, dict(os.environ)) == ""
