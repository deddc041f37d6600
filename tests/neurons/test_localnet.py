"""``condense-localnet`` as a process: it plays its rounds, survives kills, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("bittensor", reason="the extra `neurons` is not installed")

from condense_core.neurons.local.adversaries.kinds import ADVERSARIES

CHECKOUT = Path(__file__).resolve().parents[2]
on_linux = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")


def command(*options: str) -> list[str]:
    return [sys.executable, str(CHECKOUT / "neurons" / "localnet.py"), *options]


def environment(folder: Path) -> dict[str, str]:
    """In which temporary folders lie in ``folder``, so that they, and whoever works in them, can be found."""
    return {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}


def ran(folder: Path, *options: str, seconds: float = 280.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options), capture_output=True, text=True, env=environment(folder), timeout=seconds, check=False
    )


def processes(folder: Path) -> dict[int, str]:
    """Command lines of those that were told to work in ``folder``, by their ids."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"TMPDIR={folder}\0".encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


@contextmanager
def starting(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A local subnet whose chain and server run, and whose miners start; it is killed at the end."""
    process = subprocess.Popen(
        command("--miners", "2", "--validators", "1", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(folder) | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        assert any("starting pool, mean" in line for line in process.stdout)
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_none(folder: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while left := processes(folder):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def test_rounds_are_played_and_nothing_is_left(tmp_path: Path) -> None:
    page = tmp_path / "leaderboard.html"
    done = ran(tmp_path, *"--miners 2 --validators 1 --rounds 2 --gateway --json --page".split(), str(page))
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert [(miner["uid"], miner["name"]) for miner in told["miners"]] == [(2, "pool"), (3, "mean")]
    assert told["gateway"]["answered"] > 0
    assert told["gateway"]["failed"] == {}
    (validator,) = told["validators"]
    assert validator["rounds"] == 2
    research = next(tier for tier in validator["board"]["tiers"] if tier["name"] == "research")
    assert len(research["history"]["rounds"]) == 2
    assert {miner["hotkey"] for miner in research["miners"]} == {miner["hotkey"] for miner in told["miners"]}
    # What the last rounds say is on the chain; one validator alone decides.
    written = validator["board"]["next_weights"]
    scored = any(research["history"]["counts"])  # a small model knows nothing of one text in ten
    assert sum(written.values()) == pytest.approx(1 if scored else 0, abs=1e-4)
    for miner in told["miners"]:
        assert validator["weights"].get(miner["hotkey"], 0.0) == pytest.approx(written[miner["hotkey"]], abs=1e-3)
        assert miner["incentive"] == pytest.approx(written[miner["hotkey"]], abs=1e-3)
    inlined = re.search(r'id="inlined">(.*?)</script>', page.read_text())
    assert inlined is not None
    assert json.loads(inlined[1])["boards"][0]["tiers"] == validator["board"]["tiers"]
    assert not list(tmp_path.glob("condense-localnet-*"))
    assert processes(tmp_path) == {}


@on_linux
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_all_processes_and_removes_the_folder(number: signal.Signals, tmp_path: Path) -> None:
    with starting(tmp_path) as process:
        assert len(processes(tmp_path)) >= 3
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (130, "error: interrupted\n")
        assert processes(tmp_path) == {}
        assert not list(tmp_path.glob("condense-localnet-*"))


@pytest.mark.slow
@on_linux
def test_no_process_outlives_one_that_is_killed(tmp_path: Path) -> None:
    with starting(tmp_path) as process:
        assert len(processes(tmp_path)) >= 3
        process.kill()
        wait_none(tmp_path, 10)


@pytest.mark.slow
@on_linux
def test_a_process_that_dies_ends_all_with_the_last_lines_of_its_log(tmp_path: Path) -> None:
    with starting(tmp_path, "--keep") as process:
        chain = next(pid for pid, line in processes(tmp_path).items() if "neurons.chain" in line)
        os.kill(chain, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        *tail, kept, error = said.splitlines()
        assert error == "error: chain: ended with signal 9, expected it to run"
        assert any("listens at" in line for line in tail)
        folder = Path(kept.removeprefix("kept: "))
        assert {"chain.log", "server.log", "tiers.toml"} <= {path.name for path in folder.iterdir()}
        assert processes(tmp_path) == {}


@pytest.mark.slow
def test_kills_of_a_validator_and_a_miner_lose_and_double_nothing(tmp_path: Path) -> None:
    done = ran(tmp_path, *"--miners 2 --validators 1 --rounds 6 --kills 2 --seed 4 --json".split())
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert [killed["kind"] for killed in told["kills"]["killed"]] == ["validator", "miner"]
    assert told["kills"]["problems"] == []
    assert told["kills"]["looked_at"]["validator-1"]["outcomes"] == 2 * len(
        [number for tier in told["validators"][0]["board"]["tiers"] for number in tier["history"]["rounds"]]
    )
    assert told["validators"][0]["rounds"] >= 6
    assert processes(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--miners", "0"], "miners"),
        (["--model", "smollm3"], "error: server: model: 'smollm3' is no model folder"),
        (["--kills", "1", "--rounds", "3"], "kills: got 3 rounds, expected more than 3"),
        (["--page", "nowhere/page.html"], "output: nowhere is not an existing folder"),
        (["--rounds", "some"], "rounds"),
    ],
)
def test_bad_options_are_one_line(options: list[str], expected: str, tmp_path: Path) -> None:
    done = ran(tmp_path, *options)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("condense-localnet-*"))


@pytest.mark.slow
def test_adversaries_of_all_kinds_are_asked_beside_the_honest(tmp_path: Path) -> None:
    done = ran(tmp_path, *"--miners 2 --validators 1 --rounds 1 --adversaries --json".split())
    assert (done.returncode, done.stderr) == (0, "")
    [validator] = json.loads(done.stdout)["validators"]
    [tier] = [tier for tier in validator["board"]["tiers"] if tier["share"] > 0]
    assert len(tier["history"]["values"]) == 2 + len(ADVERSARIES)
    wait_none(tmp_path, 5)
