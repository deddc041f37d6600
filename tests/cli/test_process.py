"""The command line as a process: exit codes, streams, signals and what stays on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import condense_core

ROOT = Path(condense_core.__file__).parents[1]
CONDENSE = [sys.executable, "-c", "import sys; from condense_core.cli import main; sys.exit(main())"]
TEXT = "The keeper of the misty lighthouse is Wanda Beldorf. " * 8


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def start(args: list[str], environment: dict[str, str], **options) -> subprocess.Popen[bytes]:
    # A job started in the background of a shell ignores SIGINT, and so would its children.
    return subprocess.Popen(
        [*CONDENSE, *args],
        env=environment,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_help_is_fast_because_it_loads_nothing_heavy(environment):
    code = (
        "import sys; from condense_core.cli import main; main(['ask', '--help']); "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL).returncode == 0


def test_a_pipe_in_and_a_file_out(tmp_path, tiny_model_path, environment):
    output = tmp_path / "soft.safetensors"
    args = ["compress", "-", "-o", str(output), "--model", str(tiny_model_path)]
    process = start(args, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = process.communicate(TEXT.encode())
    assert (process.returncode, err) == (0, b"")  # transformers says nothing either
    assert b"soft tokens" in out
    assert b"\x1b" not in out
    assert output.stat().st_size > 0


def test_bad_input_is_one_line(tmp_path, tiny_model_path, environment):
    args = ["compress", "-", "-o", str(tmp_path / "soft.safetensors"), "--model", str(tiny_model_path)]
    process = start(args, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = process.communicate(b"a")
    assert process.returncode == 2
    assert out == b""
    assert err.startswith(b"error: ratio: got 4")
    assert err.count(b"\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_interrupt_is_one_line(tmp_path, environment):
    pipe = tmp_path / "text"
    os.mkfifo(pipe)
    process = start(["ask", str(pipe), "Why?"], environment, stdout=subprocess.PIPE)
    with pipe.open("wb"):  # returns when the process has opened its end, and so waits for text
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, b"", b"error: interrupted\n")


def test_broken_pipe_is_quiet(environment):
    reader, writer = os.pipe()
    os.close(reader)
    process = start(["--version"], environment, stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=300)[1] == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_behind_stdout_is_one_line(environment):
    with Path("/dev/full").open("wb") as full:
        process = start(["--version"], environment, stdout=full)
        err = process.communicate(timeout=300)[1]
    assert (process.returncode, err) == (2, b"error: No space left on device\n")
