"""The experiments of serving: their goals, and the table that docs/serving.md has of their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from condense_core.serving.load.driver import Look, Run, Sample

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def serve() -> Iterator[ModuleType]:
    """`bench/serve.py`, which is in no installed package."""
    sys.path.insert(0, str(CHECKOUT))
    try:
        from bench import serve

        yield serve
    finally:
        sys.path.remove(str(CHECKOUT))


def recorded(serve: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, ends: list[tuple[str, float]]) -> Any:
    """What an experiment makes of a server whose requests end as ``ends`` says: how, and after how many seconds."""

    def drive(settings: Any) -> Run:
        run = Run(settings, "salt", {"id": "m", "dtype": "float32", "device": "cpu"}, seconds=60)
        for number, (outcome, seconds) in enumerate(ends):
            timing = {"queue": 0.0, "tokenize": 0.001, "run": 0.01} if outcome == "ok" else {}
            run.samples.append(Sample(number, number, number, number + seconds, outcome, timing=timing))
        run.looks = [Look(at, 0, 0, 1e8 + 5e4 * at) for at in range(60)]
        return run

    monkeypatch.setattr(serve, "drive", drive)
    found = serve.EXPERIMENTS[name]("http://127.0.0.1:1", 60.0)
    found["versions"]["torch"] = "2"
    return json.loads(json.dumps({"experiment": name, **found}))


GOOD, SLOW = ("ok", 0.0135), ("ok", 0.031)


@pytest.mark.parametrize(
    ("name", "ends", "words"),
    [
        (
            "overhead",
            [GOOD] * 49 + [SLOW],
            [
                "at most 3 ms over compute at the median: 2.50 ms, met",
                "at most 10 ms at the 99th percentile: 20.00 ms, MISSED",
            ],
        ),
        (
            "soak",
            [GOOD] * 57 + [("out_of_memory", 0.1), ("no_answer", 70.0), ("connection_error", 0.1)],
            [
                "at most 0 errors: 1, MISSED",
                "at most 0 lost requests: 2, MISSED",
                "at most 1 MB a minute: +3.00 MB, MISSED",
            ],
        ),
        (
            "overload",
            [GOOD] * 50 + [("queue_full", 0.002)] * 50 + [("deadline_exceeded", 1.001), ("ok", 1.2)],
            [
                "at most 50 ms for the slowest refusal: 2.00 ms, met",
                "at most 0 accepted requests past their deadline: 2, MISSED",
            ],
        ),
    ],
)
def test_an_experiment_is_judged_by_its_goals(
    serve: ModuleType, name: str, ends: list[tuple[str, float]], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recorded(serve, name, monkeypatch, ends)
    assert [serve.sentence(goal) for goal in found["goals"]] == words


def test_records_become_a_table_and_no_record_a_sentence(
    serve: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve.table(tmp_path) == "No record is here yet: `python -m bench.serve` makes one."
    for name in ("soak", "overload"):
        ends = [GOOD] * 50 + [("queue_full", 0.002)] * (name == "overload")
        (tmp_path / f"serve-{name}.json").write_text(json.dumps(recorded(serve, name, monkeypatch, ends)))
    head, _, _, _, soak, overload = serve.table(tmp_path).splitlines()
    assert head.startswith("m, float32, cpu; texts of 500 to 7,000 characters; ")
    assert head.endswith("; torch 2; `bench/results/serve-soak.json`, `bench/results/serve-overload.json`.")
    assert soak.startswith("| soak | 64 clients for 1 min | 50 | 13.5, 13.5 |  | at most 0 errors: 0, met; ")
    # What was probed is a context a second, of which this is the triple.
    assert overload.startswith(
        "| overload | 3 a second (3.0x what was served) for 1 min | 51 | 13.5, 13.5 | 2, 2 | at most 50 ms"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "nothing"], "--only: nothing, expected some of overhead, soak, overload"),
        (["--minutes", "0"], "--minutes: 0, expected a number above 0"),
    ],
)
def test_wrong_options_are_refused(
    serve: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        serve.main(options)
    assert message in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why(serve: ModuleType) -> None:
    with (
        pytest.raises(RuntimeError, match=r"the server did not start: .*keys: cannot read none.toml"),
        serve.server("--keys", "none.toml"),
    ):
        pass


@pytest.mark.slow
def test_every_experiment_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.serve", "--minutes", "0.05", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1), done.stderr  # 1: a goal was missed, as on any machine that is busy
    for name in ("overhead", "soak", "overload"):
        found = json.loads((tmp_path / f"serve-{name}.json").read_text())
        assert found["experiment"] == name
        assert found["counts"]["ok"] > 0
        assert all(goal["reached"] is not None for goal in found["goals"] if goal["kind"] == "count")
