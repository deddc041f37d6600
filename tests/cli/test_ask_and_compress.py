"""The command line in process: what the commands print and write."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from condense_core import cli
from condense_core.cli import ask, options
from condense_core.compressor.soft_tokens import SoftTokens
from condense_core.decoder import embedded

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


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Put bytes on standard input."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# -- what works ----------------------------------------------------------------------------------------------------


def test_compress_with_an_encoder_in_8_bits(tmp_path, text_file, tiny_model_path, tiny_condenser, capsys):
    output = tmp_path / "soft.safetensors"
    argv = ["compress", str(text_file), "-o", str(output), "--model", str(tiny_model_path)]
    assert cli.main([*argv, "--encoder-weights", "int8"]) == 0
    soft, exact = SoftTokens.load(output).embeds, tiny_condenser.compress(TEXT, options.DEFAULT_RATIO).embeds
    assert not soft.equal(exact)
    assert (soft - exact).norm() < 0.05 * exact.norm()


def test_compress_writes_soft_tokens(tmp_path, text_file, tiny_model_path, tiny_condenser, capsys):
    output = tmp_path / "soft.safetensors"
    assert cli.main(["compress", str(text_file), "-o", str(output), "--model", str(tiny_model_path)]) == 0
    soft = SoftTokens.load(output)
    expected = tiny_condenser.compress(TEXT, options.DEFAULT_RATIO)
    assert soft.embeds.equal(expected.embeds)
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert out.count("\n") == 1
    for part in (f"{len(TEXT)} characters", f"{soft.num_context_tokens} tokens", f"{len(soft)} soft tokens", "pool"):
        assert part in out


def test_compress_json(tmp_path, text_file, tiny_model_path, capsys):
    output = tmp_path / "soft.safetensors"
    code = cli.main(
        ["compress", str(text_file), "-o", str(output), "--ratio", "8", "--json", "--model", str(tiny_model_path)]
    )
    result = json.loads(capsys.readouterr().out)
    soft = SoftTokens.load(output)
    assert code == 0
    assert (result["context_tokens"], result["soft_tokens"]) == (soft.num_context_tokens, len(soft))
    assert result["ratio_achieved"] == pytest.approx(soft.num_context_tokens / len(soft), abs=1e-3)
    assert (result["bytes"], result["ratio"], result["method"]) == (output.stat().st_size, 8, "pool")
    assert result["compress_ms"] > 0


@pytest.fixture
def selecting(tiny_condenser: Condenser) -> Condenser:
    from condense_core.compressor.condenser import Condenser

    return Condenser(tiny_condenser.model, tiny_condenser.tokenizer, method="select")


@pytest.mark.parametrize("question", [None, "Who keeps the misty lighthouse?"])
def test_compress_as_text(tmp_path, text_file, tiny_model_path, selecting, capsys, question):
    soft = selecting.compress(TEXT, 2.5, question=question)
    args = ["compress", str(text_file), "--as-text", "--ratio", "2.5", "--model", str(tiny_model_path)]
    args += [] if question is None else ["--question", question]
    assert cli.main(args) == 0
    assert capsys.readouterr().out == f"{soft.text}\n"
    assert cli.main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["text_chars"], result["output"]) == (soft.text, len(soft.text), None)
    assert (result["soft_tokens"], result["ratio"], result.get("question")) == (len(soft), 2.5, question)
    output = tmp_path / "kept.txt"
    assert cli.main([*args, "-o", str(output)]) == 0
    assert output.read_text() == f"{soft.text}\n"
    assert f"{len(soft)} tokens (" in capsys.readouterr().out


def test_compress_with_a_question_selects(tmp_path, text_file, tiny_model_path, selecting):
    output = tmp_path / "soft.safetensors"
    args = ["compress", str(text_file), "-o", str(output), "--model", str(tiny_model_path)]
    assert cli.main([*args, "--question", "Who keeps the misty lighthouse?"]) == 0
    soft, expected = SoftTokens.load(output), selecting.compress(TEXT, 4, question="Who keeps the misty lighthouse?")
    assert (soft.method, soft.text) == ("select", expected.text)
    assert soft.embeds.equal(expected.embeds)


def test_ask_gives_select_the_question(text_file, tiny_model_path, selecting, capsys):
    context = selecting.compress(TEXT, 4, question="Who keeps the misty lighthouse?")
    expected = selecting.generate(context, "Who keeps the misty lighthouse?", max_new_tokens=8)
    args = ["ask", str(text_file), "Who keeps the misty lighthouse?", "--model", str(tiny_model_path)]
    assert cli.main([*args, "--method", "select", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_compress_standard_input(tmp_path, type_in, tiny_model_path, text_file, capsys):
    outputs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    type_in(TEXT.encode())
    for source, output in zip(("-", str(text_file)), outputs, strict=True):
        assert cli.main(["compress", source, "-o", str(output), "--model", str(tiny_model_path)]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_compress_one_token_at_ratio_one(tmp_path, type_in, tiny_model_path, tiny_condenser):
    assert len(tiny_condenser.encode("a")) == 1
    output = tmp_path / "one.safetensors"
    type_in(b"a")
    args = ["compress", "-", "-o", str(output), "--ratio", "1", "--method", "select", "--model", str(tiny_model_path)]
    assert cli.main(args) == 0
    assert len(SoftTokens.load(output)) == 1


def test_compress_replaces_an_older_file(tmp_path, text_file, tiny_model_path):
    output = tmp_path / "soft.safetensors"
    output.write_bytes(b"old")
    assert cli.main(["compress", str(text_file), "-o", str(output), "--model", str(tiny_model_path)]) == 0
    assert len(SoftTokens.load(output)) > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["soft.safetensors", "text.txt"]


@pytest.mark.parametrize("full", [False, True], ids=["soft", "full"])
def test_ask_streams_what_generate_answers(text_file, tiny_model_path, tiny_condenser, capsys, full):
    context = TEXT if full else tiny_condenser.compress(TEXT, 16)
    expected = tiny_condenser.generate(context, "Why?", max_new_tokens=8)
    args = ["ask", str(text_file), "Why?", "--model", str(tiny_model_path), "--max-new-tokens", "8"]
    args += ["--full"] if full else ["--ratio", "16"]
    assert cli.main(args) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert cli.main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] == expected
    assert result["soft_tokens"] == (None if full else len(context))
    assert result["context_tokens"] == len(tiny_condenser.encode(TEXT))


@pytest.mark.parametrize("by", ["extension", "content", "stdin"])
def test_ask_soft_tokens(by, tmp_path, soft_file, type_in, tiny_model_path, tiny_condenser, capsys):
    source = str(soft_file)
    if by == "content":
        (tmp_path / "soft.bin").write_bytes(soft_file.read_bytes())
        source = str(tmp_path / "soft.bin")
    if by == "stdin":
        type_in(soft_file.read_bytes())
        source = "-"
    args = ["ask", source, "Why?", "--model", str(tiny_model_path), "--max-new-tokens", "8", "--json"]
    assert cli.main(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] == tiny_condenser.generate(SoftTokens.load(soft_file), "Why?", max_new_tokens=8)
    assert result["ratio"] == 4


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([" ", "\n", " a", " b ", " \n"], "a b\n"),
        (["a \n", "\n", " b"], "a \n\n b\n"),
        (["one ", "two"], "one two\n"),
        (["  "], "\n"),
        ([], "\n"),
    ],
)
def test_streamed_answers_are_stripped(pieces, expected, capsys):
    ask._print_stream(iter(pieces))
    assert capsys.readouterr().out == expected


def test_closing_a_stream_ends_its_generation(tiny_condenser):
    the = tiny_condenser.encode(" the")[-1]
    steps = 0

    def always_the(_ids, scores):
        nonlocal steps
        steps += 1
        return scores.new_full(scores.shape, float("-inf")).index_fill_(-1, scores.new_tensor([the]).long(), 0.0)

    from transformers import LogitsProcessorList

    stream = tiny_condenser.stream(
        "a", "Why?", max_new_tokens=2000, min_new_tokens=2000, logits_processor=LogitsProcessorList([always_the])
    )
    next(stream)
    stream.close()  # joins the generating thread
    assert 0 < steps < 2000


def test_untrained_method_is_announced(tmp_path, text_file, tiny_model_path, capsys):
    args = ["compress", str(text_file), "-o", str(tmp_path / "o.safetensors"), "--model", str(tiny_model_path)]
    assert cli.main([*args, "--method", "mean"]) == 0
    assert capsys.readouterr().err == "note: 'mean' is untrained for this model; 'select' needs no training\n"


# -- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compress", "ask", "doctor", "demo"])
def test_help_shows_options_and_defaults(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    if command in ("compress", "ask"):
        for part in ("--ratio", "4", "the embedded condense-tiny", "pool if the model has one"):
            assert part in out


def test_version_and_no_command(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("condense ")
    assert cli.main([]) == 0
    assert "compress" in capsys.readouterr().out


def test_default_ratio_is_the_library_s():
    from condense_core.compressor import condenser

    assert options.DEFAULT_RATIO == condenser.DEFAULT_RATIO


# -- the embedded model --------------------------------------------------------------------------------------------


def test_embedded_model_is_looked_up(tmp_path, monkeypatch, text_file, capsys):
    package = tmp_path / "site" / "condense_core"
    installed, checkout = package / "_models" / "condense-tiny", tmp_path / "site" / "models" / "condense-tiny"
    monkeypatch.setattr(embedded, "_PACKAGE", package)
    with pytest.raises(FileNotFoundError, match="make tiny"):
        embedded.embedded_model_path()
    assert cli.main(["ask", str(text_file), "Why?"]) == 2
    assert "make tiny" in capsys.readouterr().err
    for folder in (installed, checkout):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert embedded.embedded_model_path() == installed
    (tmp_path / "site" / "pyproject.toml").write_text("")
    assert embedded.embedded_model_path() == checkout
