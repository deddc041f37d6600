"""`condense compress --server` and `condense prune --server` against the real application over the embedded model."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from condense_core import cli
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder.embedded import embedded_model_path
from condense_core.pruning.cache import PrunedCache
from condense_core.serving.engine import CompressionEngine
from condense_core.serving.http.app import create_app
from condense_core.serving.keys import Keys, new_key
from condense_core.serving.served import ServedModel
from condense_core.serving.service import LocalService
from condense_core.tasks.sources import ProseWriter
from condense_testing.running_server import running_server
from condense_testing.scripted_server import error_reply, reply, scripted_server

TEXT = ProseWriter().document(3, 60)[:1500]
QUESTION = "Who is the keeper of the north archive?"


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return ServedModel.load(embedded_model_path(), device="cpu")


@pytest.fixture(scope="module")
def key_and_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    key, lines = new_key("ann")
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(lines)
    return key, path


@pytest.fixture(scope="module")
def url(served: ServedModel, key_and_file: tuple[str, Path]) -> Iterator[str]:
    keys = Keys.load(key_and_file[1])
    with running_server(create_app(LocalService(CompressionEngine(served)), keys=keys, page=False)) as url:
        yield url


@pytest.fixture
def key(key_and_file: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDENSE_API_KEY", key_and_file[0])


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "made.safetensors"


@pytest.fixture(autouse=True)
def folder(output: Path) -> None:
    output.parent.mkdir()


def error_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.usefixtures("key")
def test_compress_gives_what_the_servers_model_makes(url, served, text_file, output, capsys):
    args = ["compress", str(text_file), "-o", str(output), "--server", url, "--ratio", "8"]
    assert cli.main(args) == 0
    assert output.read_bytes() == served.condensers[served.default_method].compress(TEXT, 8).to_bytes()
    out, err = capsys.readouterr()
    assert err == ""
    assert f"{output}: 1,500 characters, " in out
    assert cli.main([*args, "--json", "--method", "mean"]) == 0
    told, soft = json.loads(capsys.readouterr().out), SoftTokens.load(output)
    assert (told["soft_tokens"], told["context_tokens"]) == (len(soft), soft.num_context_tokens)
    assert (told["method"], told["model"], told["ratio"]) == ("mean", "condense-tiny", 8)
    assert told["bytes"] == output.stat().st_size
    assert told["compress_ms"] > 0


@pytest.mark.usefixtures("key")
def test_compress_to_text_with_a_question(url, served, text_file, output, capsys):
    soft = served.condensers["select"].compress(TEXT, 2.5, question=QUESTION)
    args = ["compress", str(text_file), "--as-text", "--server", url, "--ratio", "2.5", "--question", QUESTION]
    assert cli.main(args) == 0
    assert capsys.readouterr().out == f"{soft.text}\n"
    assert cli.main([*args, "-o", str(output)]) == 0
    assert output.read_text() == f"{soft.text}\n"


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("how", [["--wrap", "adakv"], ["--storage", "int8", "--question", QUESTION]], ids=str)
def test_prune_gives_what_it_gives_here(how, url, text_file, output, tmp_path, capsys):
    here = tmp_path / "here.safetensors"
    args = ["prune", str(text_file), "--keep", "0.5", *how, "--json"]
    assert cli.main([*args, "-o", str(here)]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert cli.main([*args, "-o", str(output), "--server", url]) == 0
    told = json.loads(capsys.readouterr().out)
    assert output.read_bytes() == here.read_bytes()
    own = {"output": str(output), "prune_ms": told["prune_ms"], "cache_bytes": PrunedCache.load(here).nbytes}
    assert told == expected | own
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress", "--ratio", "3"], "ratio: got 3, expected one of 2, 4, 8, 16, 32"),
        (["compress", "--ratio", "1000", "--method", "select"], "ratio: got 1000, more than the text's"),
        (["compress", "--method", "zip"], "method: got 'zip', expected one of"),
        (["compress", "--as-text", "--method", "pool"], "--as-text: the method 'pool' keeps no text"),
        (["compress", "--model", "m"], "--model: of a model that runs here, expected without --server"),
        (["compress", "--device", "cpu"], "--device: of a model that runs here"),
        (["compress", "--compressor", "folder"], "--compressor: of a model that runs here"),
        (["compress", "--timeout", "0"], "timeout: got 0.0, expected seconds"),
        (["prune", "--model", "m"], "--model: of a model that runs here"),
        (["prune", "--window", "8"], "--window: of a model that runs here"),
        (["prune", "--chunk-size", "64"], "--chunk-size: of a model that runs here"),
        (["prune", "--template-arg", "a=1"], "--template-arg: of a model that runs here"),
        (["prune", "--method", "kvzap:/etc/passwd"], "method: got 'kvzap:/etc/passwd'"),
        (["prune", "--keep", "2"], "keep: got 2"),
    ],
)
def test_what_makes_no_sense_is_one_line(words, message, url, text_file, output, capsys):
    argv = [words[0], str(text_file), "-o", str(output), "--server", url, *words[1:]]
    assert message in error_line(argv, capsys)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("command", ["compress", "prune"])
def test_errors_of_servers_are_one_line(command, url, text_file, output, capsys, monkeypatch):
    monkeypatch.delenv("CONDENSE_API_KEY", raising=False)
    argv = [command, str(text_file), "-o", str(output)]
    assert "key" in error_line([*argv, "--server", url], capsys)
    assert "--timeout: how long a server may take" in error_line([*argv, "--timeout", "1"], capsys)
    assert "--server: got 'localhost', expected http" in error_line([*argv, "--server", "localhost"], capsys)
    with scripted_server(reply(b"<html>", kind="text/html")) as other:
        assert "content-type is 'text/html'" in error_line([*argv, "--server", other.url], capsys)
    with scripted_server(error_reply(503, "queue_full", "come\nagain\x1b[31m", retry_after="90")) as other:
        assert "come again [31m" in error_line([*argv, "--server", other.url], capsys)
    assert list(output.parent.iterdir()) == []


def test_nothing_heavy_is_loaded_for_a_server_that_is_not_there(text_file, output):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    code = f"""
import sys
from condense_core import cli
code = cli.main(["compress", {str(text_file)!r}, "-o", {str(output)!r}, "--server", {url!r}])
assert not {{"torch", "transformers"}} & set(sys.modules)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {url}: cannot be reached (Connection refused)\n"
