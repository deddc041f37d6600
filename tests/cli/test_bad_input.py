"""Bad input of every kind to the command line: one line on stderr, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from condense_core import cli
from condense_core.cli import ask, terminal

if TYPE_CHECKING:
    from condense_core.compressor.condenser import Condenser

TEXT = "The keeper of the misty lighthouse is Wanda Beldorf. The postman walked past the market square. " * 8


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def soft_file(tmp_path_factory: pytest.TempPathFactory, tiny_condenser: Condenser) -> Path:
    path = tmp_path_factory.mktemp("soft") / "good.safetensors"
    tiny_condenser.compress(TEXT, 4).save(path)
    return path


def only_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert err.endswith("\n"), err
    assert "Traceback" not in err, err
    return err


BAD_BYTES = [
    ("empty", b"", [], "empty"),
    ("one token at ratio 4", b"a", [], "ratio: got 4, more than the text's 1 tokens"),
    ("ratio above the text", b"a b c d e", ["--ratio", "32"], "ratio: got 32, more than"),
    ("ratio 0", b"some text", ["--ratio", "0"], "'--ratio': got '0', expected a number from 1"),
    ("negative ratio", b"some text", ["--ratio", "-4"], "'--ratio': got '-4', expected a number from 1"),
    ("fraction", b"some text", ["--ratio", "2.5"], "ratio: got 2.5, expected an integer from 1 to 1024 for the"),
    ("not a number", b"some text", ["--ratio", "nan"], "'--ratio': got 'nan', expected a number from 1"),
    ("ratio not trained", TEXT.encode(), ["--ratio", "5"], "ratio: got 5, expected one of 2, 4, 8, 16, 32"),
    ("not UTF-8", b"abc\xff\xfe", [], "byte offset 3 (0xff)"),
    ("UTF-16 without a mark", "a text".encode("utf-16-le"), [], "a NUL at byte offset 1"),
    ("cut UTF-8", "grün".encode()[:3], [], "byte offset 2 (0xc3)"),
    ("unknown method", b"some text", ["--method", "magic"], "method: got 'magic', expected one of pool, mixed, select"),
    ("unknown option", b"some text", ["--speed", "9"], "--speed"),
    ("unknown device", b"some text", ["--device", "abacus"], "device: cannot use 'abacus'"),
    ("valueless device", b"some text", ["--device", "meta"], "device: cannot use 'meta'"),
]


@pytest.mark.parametrize(
    ("data", "options", "message"), [row[1:] for row in BAD_BYTES], ids=[row[0] for row in BAD_BYTES]
)
@pytest.mark.parametrize("command", ["compress", "ask"])
def test_bad_text_and_options(command, data, options, message, tmp_path, tiny_model_path, capsys):
    source, folder = tmp_path / "text.txt", tmp_path / "out"
    source.write_bytes(data)
    folder.mkdir()
    args = [command, str(source), *(["-o", str(folder / "o.safetensors")] if command == "compress" else ["Why?"])]
    assert cli.main([*args, "--model", str(tiny_model_path), *options]) == 2
    assert message in only_error_line(capsys)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["compress", "ask"])
@pytest.mark.parametrize(("name", "message"), [("missing.txt", "No such file"), ("folder", "Is a directory")])
def test_unreadable_file(command, name, message, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    last = ["-o", str(tmp_path / "o.safetensors")] if command == "compress" else ["Why?"]
    assert cli.main([command, str(tmp_path / name), *last]) == 2
    line = only_error_line(capsys)
    assert message in line
    assert name in line


def edit_config(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


POOL = Path("condense", "pool")
# What to do to a copy of a good model folder, and what the message must then name.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config of lists": (lambda f: (f / "config.json").write_text("[]"), "cannot load"),
    "unknown architecture": (lambda f: edit_config(f, model_type="abacus"), "abacus"),
    "no decoder": (lambda f: edit_config(f, model_type="bert", architectures=["BertForMaskedLM"]), "model: "),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "cannot load"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "cannot load"),
    "other sizes": (lambda f: edit_config(f, hidden_size=64), "cannot load"),
    "layers without weights": (lambda f: edit_config(f, num_hidden_layers=3), "weights that its config asks for"),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "model.safetensors"),
    "foreign compressor": (lambda f: (f / POOL / "compressor.json").write_text("{}"), "not a compressor config"),
    "cut compressor": (lambda f: cut(f / POOL / "compressor.safetensors"), "do not fit 'pool'"),
}


@pytest.mark.parametrize(("harm", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_foreign_model_folder(harm, message, tmp_path, text_file, tiny_model_path, capsys):
    folder = tmp_path / "models" / tiny_model_path.name
    shutil.copytree(tiny_model_path, folder)
    harm(folder)
    output = tmp_path / "o.safetensors"
    assert cli.main(["compress", str(text_file), "-o", str(output), "--model", str(folder)]) == 2
    assert message in only_error_line(capsys)
    assert not output.exists()


@pytest.mark.parametrize("model", ["no/such/folder", "nobody/nothing", ""])
def test_missing_model(model, tmp_path, text_file, capsys):
    assert cli.main(["ask", str(text_file), "Why?", "--model", model]) == 2
    assert "model: " in only_error_line(capsys)


def test_soft_tokens_of_another_model(tmp_path, tiny_condenser, tiny_model_path, capsys):
    path = tmp_path / "other.safetensors"
    replace(tiny_condenser.compress(TEXT, 4), model_id="somebody/else", model_digest="ab" * 32).save(path)
    assert cli.main(["ask", str(path), "Why?", "--model", str(tiny_model_path)]) == 2
    assert "made by 'somebody/else', expected one of 'random-tiny' (their weights differ)" in only_error_line(capsys)


def flip_last_byte(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda data: data[: len(data) // 2], "expected"),
        (lambda data: data[:20], "truncated"),
        (flip_last_byte, "SHA-256"),
        (lambda data: data.replace(b'"method":"pool"', b'"method":"mean"'), "SHA-256"),
        (lambda data: pickle.dumps({"embeds": [1.0]}), "pickle"),
        (lambda data: b"", "no bytes"),
    ],
    ids=["truncated", "cut in the header", "tampered data", "tampered metadata", "pickle", "nothing"],
)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "full"])
def test_bad_soft_files(harm, message, full, tmp_path, soft_file, tiny_model_path, capsys):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(harm(soft_file.read_bytes()))
    args = ["ask", str(path), "Why?", "--model", str(tiny_model_path), *(["--full"] if full else [])]
    assert cli.main(args) == 2
    line = only_error_line(capsys)
    assert message in line
    assert "bad.safetensors" in line


@pytest.mark.parametrize("options", [["--ratio", "8"], ["--method", "select"], ["--full"]])
def test_soft_tokens_take_no_compression_options(options, soft_file, tiny_model_path, capsys):
    assert cli.main(["ask", str(soft_file), "Why?", "--model", str(tiny_model_path), *options]) == 2
    assert "holds soft tokens" in only_error_line(capsys)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ask", "FILE", "  "], "question: empty"),
        (["ask", "FILE", "Why?", "--full", "--ratio", "4"], "--full"),
        (["ask", "FILE", "Why?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["ask", "FILE"], "Missing argument"),
        (["compress", "FILE"], "Missing option"),
        (["conquer", "FILE"], "No such command"),
        (["doctor", "extra"], "extra"),
    ],
)
def test_usage_errors_are_one_line(args, message, text_file, capsys):
    assert cli.main([str(text_file) if arg == "FILE" else arg for arg in args]) == 2
    assert message in only_error_line(capsys)


def test_compressing_soft_tokens_is_refused(soft_file, tmp_path, capsys):
    assert cli.main(["compress", str(soft_file), "-o", str(tmp_path / "o.safetensors")]) == 2
    assert "holds safetensors; expected a text" in only_error_line(capsys)


# -- output --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("no/such/o.safetensors", "not an existing folder"),
        (".", "cannot write"),
        ("", "got ''"),
        ("-", "got '-'"),
        ("text.txt", "is the text itself"),
    ],
)
def test_bad_output_paths(output, message, tmp_path, text_file, tiny_model_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compress", str(text_file), "-o", output, "--model", str(tiny_model_path)]) == 2
    assert message in only_error_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]
    assert text_file.read_text() == TEXT


def test_no_disk_space_leaves_nothing_behind(tmp_path, text_file, tiny_model_path, capsys, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "o.safetensors"
    output.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["compress", str(text_file), "-o", str(output), "--model", str(tiny_model_path)]) == 2
    line = only_error_line(capsys)
    assert "No space left on device" in line
    assert str(output) in line
    assert output.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.safetensors", "text.txt"]


# -- failures of the machinery -------------------------------------------------------------------------------------


def test_interrupt(text_file, capsys, monkeypatch):
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ask, "load_condenser", interrupted)
    assert cli.main(["ask", str(text_file), "Why?"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_bug_keeps_its_traceback(text_file, monkeypatch):
    def broken(*_args: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(ask, "load_condenser", broken)
    with pytest.raises(AssertionError, match="a bug"):
        cli.main(["ask", str(text_file), "Why?"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines  and \x1b[31mcolor"), "two lines and ?[31mcolor"),
        (OSError(errno.ENOENT, "No such file", "a.txt"), "a.txt: No such file"),
        (MemoryError(), "out of memory"),
        (ValueError(), "ValueError"),
    ],
)
def test_one_line(error, line):
    assert terminal.one_line(error) == line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Missing option '--output' / '-o'"),
        (["--as-text", "--method", "pool"], "--as-text: the method 'pool' keeps no text, expected the method 'select'"),
        (["-o", "OUT", "--method", "pool", "--question", "Why?"], "question: the method 'pool' reads none"),
        (["--as-text", "--question", " "], "question: empty"),
        (["--as-text", "--question", "why " * 5000], "question: "),
        (["--as-text", "-o", "nowhere/kept.txt"], "output: nowhere is not an existing folder"),
    ],
)
def test_compress_with_a_question_or_as_text(options, message, text_file, tmp_path, tiny_model_path, capsys):
    given = [str(tmp_path / "soft.safetensors") if option == "OUT" else option for option in options]
    assert cli.main(["compress", str(text_file), "--model", str(tiny_model_path), *given]) == 2
    assert message in only_error_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
