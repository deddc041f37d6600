"""`condense calibrate`, in process and on a random tiny model, and a prune with what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from condense_core import cli
from condense_core.pruning import PrunedCache

SMALL = ["--texts", "2", "--min-chars", "400", "--max-chars", "500"]


def test_what_is_calibrated_prunes(tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    surrogate, cache, text = tmp_path / "kvzap.safetensors", tmp_path / "c.safetensors", tmp_path / "text.txt"
    text.write_text("The keeper of the misty lighthouse is Wanda Beldorf. " * 12)
    model = ["--model", str(tiny_model_path)]
    assert cli.main(["calibrate", "-o", str(surrogate), *SMALL, *model, "--json"]) == 0
    shape = json.loads(capsys.readouterr().out)["shape"]
    assert len(shape) == 3
    spec = f"across_layers(kvzap:{surrogate})"
    assert cli.main(["prune", str(text), "-o", str(cache), "--method", spec, "--keep", "0.5", *model]) == 0
    assert "KVzap" in PrunedCache.load(cache).method


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--min-chars", "600"], "min_chars: got 600, expected at most max_chars = 500"),
        (["--dtype", "int8"], "dtype: got 'int8', expected one of"),
        (["--corpus", "nowhere.txt"], "nowhere.txt"),
        (["-o", "nowhere/file"], "output: nowhere is not an existing folder"),
    ],
)
def test_bad_input(
    argv: list[str], message: str, tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2, nothing written."""
    out = tmp_path / "kvzap.safetensors"
    assert cli.main(["calibrate", "-o", str(out), *SMALL, "--model", str(tiny_model_path), *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()
