"""`condense bench encode`, in process, on a small configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from condense_core import cli
from condense_core.profiling import encode

ENCODE = ["bench", "encode", "--rounds", "1", "--chars", "400", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peaks are not measured."""
    monkeypatch.setattr(encode, "matmul_peak", lambda device, dtype: 1e11)
    monkeypatch.setattr(encode, "copy_bandwidth", lambda device: 1e10)


@pytest.fixture
def config(tmp_path: Path) -> str:
    settings = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    MistralConfig(**settings, num_attention_heads=4, num_key_value_heads=2, head_dim=16).save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def test_rows_as_text(config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main([*ENCODE, "--config", config, "--layers", "1,3", "--batch", "2", "--baseline"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for part in (
        "config.json, pool 4x, float32 on cpu",
        "embed",
        "encode",
        "pool",
        "project",
        "contexts/s",
        "of floor",
    ):
        assert part in out
    rows = [line.split()[:3] for line in out.splitlines() if line.split()[1:2] == ["2"]]
    assert rows == [["1", "2", "200"], ["3", "2", "200"]] * 2  # and beside the padded batch


def test_rows_as_json_in_a_file_and_as_a_picture(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    report, picture = tmp_path / "report.json", tmp_path / "times.png"
    argv = [*ENCODE, "--config", config, "--layers", "1,2", "--json", "-o", str(report), "--plot", str(picture)]
    assert cli.main([*argv, "--dtype", "bfloat16", "--threads", "1", "--method", "mean", "--ratio", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(report.read_text())
    assert (found["model"], found["dtype"], found["threads"]) == ("config.json", "bfloat16", 1)
    assert found["settings"]["method"] == "mean"
    assert [row["soft_tokens"] for row in found["rows"]] == [13, 13]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_all_layers_of_the_embedded_model_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*ENCODE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "condense-tiny"
    assert [(row["layers"], row["batch"]) for row in found["rows"]] == [(4, 1)]


def test_an_interrupt_leaves_what_was_measured(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = encode.EncodeBenchmark.rows

    def interrupted(self: encode.EncodeBenchmark) -> Any:
        yield next(rows(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(encode.EncodeBenchmark, "rows", interrupted)
    assert cli.main([*ENCODE, "--config", config, "--layers", "1,2", "--json"]) == 130
    out, err = capsys.readouterr()
    assert [row["layers"] for row in json.loads(out)["rows"]] == [1]
    assert err == "error: interrupted\n"


def test_a_row_that_does_not_fit_is_a_note_and_no_row_at_all_an_error(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # processes of pytest-xdist have 80
    monkeypatch.setattr(encode, "free_memory", lambda device: 3_000_000)
    assert cli.main([*ENCODE, "--config", config, "--layers", "1", "--batch", "1,64"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("note: 1 layers x 64 contexts: needs about")
    assert err.count("\n") == 1
    assert "contexts/s" in out
    assert cli.main([*ENCODE, "--config", config, "--layers", "1", "--batch", "64"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: layers, batch: no row fits into the free memory")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--layers", "1,x"], "layers: got '1,x', expected integers of at least 1 separated by commas"),
        (["--layers", "0"], "layers: got '0', expected integers"),
        (["--layers", "5"], "layers: got 5, expected 1 to 4, the layers of 'condense-tiny'"),
        (["--batch", "-1"], "batch: got '-1', expected integers"),
        (["--mixed", "--batch", "2"], "batch: of contexts of one length; expected --mixed without it"),
        (["--chars", "0"], "chars: got 0, expected an integer of at least 1"),
        (["--rounds", "0"], "rounds: got 0"),
        (["--ratio", "5000"], "ratio: got 5000, expected an integer from 1 to 1024"),
        (["--method", "select"], "method: got 'select', expected one of pool, mean, memory"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--device", "gpu7"], "device: cannot use 'gpu7'"),
        (["--dtype", "int3"], "dtype: got 'int3', expected one of"),
        (["--model", "nowhere"], "model: 'nowhere' is no model folder"),
        (["--model", "mistral-7b", "--config", "x"], "config: got --model too; expected one of them"),
        (["--config", "{folder}/gone.json"], "gone.json: No such file or directory"),
        (["--config", "{folder}/none.json"], "none.json holds no JSON object"),
        (["--config", "{folder}/other.json"], "has the model_type 'nothing', expected one that transformers knows"),
        (["--config", "{folder}/wrong.json"], "wrong.json: "),
        (["--plot", "{folder}/x.bmp"], "plot: got "),
        (["--output", "{folder}/no/x.json"], "is not an existing folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "wrong.json").write_text('{"model_type": "mistral", "hidden_size": "wide"}')
    assert cli.main([*ENCODE, *(part.format(folder=tmp_path) for part in argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
