"""`condense prune`, `condense ask --cache` and `condense eval --pruning`, in process and on a random tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from condense_core import cli
from condense_core.compressor.condenser import Condenser
from condense_core.pruning import AdaKV, ExpectedAttention, PrunedCache, QueryAware, SnapKV
from condense_core.pruning.build import methods_by_name, wrappers_by_name
from condense_core.pruning.text import ask, prefill, question_ids

TEXT = "The keeper of the misty lighthouse is Wanda Beldorf. The postman walked past the market square. " * 8
EVAL = ["eval", "--pruning", "--questions", "4", "--questions-per-context", "2", "--facts-per-context", "3"]
SHORT = ["--min-chars", "400", "--max-chars", "500", "--window", "8", "--max-new-tokens", "4"]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "ctx.safetensors"


@pytest.fixture
def model(tiny_model_path: Path) -> list[str]:
    return ["--model", str(tiny_model_path)]


@pytest.fixture
def parts(tiny_condenser: Condenser) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return tiny_condenser.model, tiny_condenser.tokenizer


@pytest.fixture
def cache_file(output: Path, parts: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Path:
    prefill(*parts, TEXT, AdaKV(SnapKV(keep=0.25, window=8))).save(output)
    return output


def error_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run bad input; returns its one line on stderr."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# -- prune -------------------------------------------------------------------------------------------------------------


def test_prune_writes_a_cache(text_file, output, model, parts, capsys):
    assert cli.main(["prune", str(text_file), "-o", str(output), "--window", "8", *model]) == 0
    expected = prefill(*parts, TEXT, SnapKV(keep=0.25, window=8))
    expected.save(output.with_suffix(".expected"))
    assert output.read_bytes() == output.with_suffix(".expected").read_bytes()
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    tokens = expected.context_tokens[0]
    for part in (f"{len(TEXT)} characters", f"{tokens} tokens -> {expected.layers[0].held} kept", "SnapKV(keep=0.25"):
        assert part in out
    assert f"{expected.nbytes:,} bytes instead of {expected.full_nbytes:,} ({expected.ratio:.2f}x)" in out


@pytest.mark.parametrize("sentences", [1, 4, 9])
def test_a_short_text_is_kept_as_it_is_unless_a_share_was_asked_for(sentences, tmp_path, output, model, capsys):
    """65 to 252 tokens: a quarter of them is less than the 64 that SnapKV protects."""
    file = tmp_path / "short.txt"
    file.write_text("The keeper of the misty lighthouse is Wanda Beldorf. " * sentences)
    assert cli.main(["prune", str(file), "-o", str(output), "--json", *model]) == 0
    assert json.loads(capsys.readouterr().out)["kept_share"] == 1.0
    cache = PrunedCache.load(output)
    if cache.context_tokens[0] > 64:
        asked = ["prune", str(file), "-o", str(output), "--keep", "0.25", *model]
        assert "fewer than the 64 that it always keeps" in error_line(asked, capsys)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["--keep", "0.5", "--method", "expected_attention"], ExpectedAttention(keep=0.5)),
        (["--budget", "20", "--window", "8"], SnapKV(budget=20, window=8)),
        (["--wrap", "adakv", "--window", "8"], AdaKV(SnapKV(keep=0.25, window=8))),
        (["--method", "adakv(snapkv)", "--window", "8"], AdaKV(SnapKV(keep=0.25, window=8))),
        (["--question", "Who?", "--keep", "0.1"], None),
        (["--storage", "int8", "--window", "8"], SnapKV(keep=0.25, window=8)),
        (["--chunk-size", "50", "--window", "8"], SnapKV(keep=0.25, window=8)),
    ],
    ids=["method", "budget", "wrap", "nested", "question", "storage", "chunks"],
)
def test_prune_json(options, method, text_file, output, model, parts, capsys):
    if method is None:
        method = QueryAware(SnapKV(keep=0.1), tuple(question_ids(parts[1], "Who?")))
    assert cli.main(["prune", str(text_file), "-o", str(output), "--json", *options, *model]) == 0
    result = json.loads(capsys.readouterr().out)
    cache = PrunedCache.load(output)
    expected = prefill(*parts, TEXT, method, chunk_size=50 if "--chunk-size" in options else None)
    if "--storage" in options:
        expected.quantize("int8")
        assert result["storage"] == "int8"
    expected.save(output.with_suffix(".expected"))
    assert output.read_bytes() == output.with_suffix(".expected").read_bytes()
    assert result["method"] == cache.method == repr(method)
    assert (result["model"], result["context_tokens"]) == (cache.model_id, expected.context_tokens[0])
    assert (result["bytes"], result["cache_bytes"]) == (output.stat().st_size, expected.nbytes)
    assert (result["full_bytes"], result["ratio_achieved"]) == (expected.full_nbytes, round(expected.ratio, 3))
    kept = method.num_kept(result["context_tokens"], 0, 2)
    assert result["kept_tokens"] == kept
    assert result["kept_share"] == pytest.approx(kept / result["context_tokens"], abs=1e-4)
    assert result["prune_ms"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0"], "keep is 0.0, expected a share in (0, 1]"),
        (["--keep", "1.5"], "keep is 1.5, expected a share in (0, 1]"),
        (["--keep", "half"], "--keep"),
        (["--keep", "0.5", "--budget", "9"], "expected one of them"),
        (["--budget", "0"], "budget is 0, expected an int >= 1"),
        (["--budget", "9"], "fewer than the 64 that it always keeps; expected a share of at least"),
        (["--method", "magic"], "method: got 'magic', expected one of"),
        (["--wrap", "magic"], "wrapper: got 'magic', expected one of across_layers, adakv"),
        (["--wrap", "rerotate,adakv"], "Rerotate: method is AdaKV"),
        (["--method", "keydiff", "--window", "8"], "window: 'keydiff' has none"),
        (["--chunk-size", "0"], "chunk_size is 0, expected an int >= 1"),
        (["--storage", "int4"], "storage: got 'int4', expected int8 or fp8"),
        (["--storage", "int8", "--wrap", "adakv", "--window", "8"], "expected a method without AdaKV"),
        (["--question", " "], "question: empty"),
        (["--method", "kvzip", "--question", "Why?"], "something else read behind the context"),
        (["--device", "abacus"], "device: cannot use 'abacus'"),
        (["--model", "no/such/folder"], "model: "),
    ],
)
def test_prune_bad_input(options, message, text_file, output, model, capsys):
    assert message in error_line(["prune", str(text_file), "-o", str(output), *model, *options], capsys)
    assert not output.exists()


def test_prune_bad_files(tmp_path, text_file, output, cache_file, model, capsys):
    assert "holds safetensors" in error_line(["prune", str(cache_file), "-o", str(tmp_path / "o"), *model], capsys)
    assert "is the text itself" in error_line(["prune", str(text_file), "-o", str(text_file), *model], capsys)
    assert "not an existing folder" in error_line(["prune", str(text_file), "-o", "no/such/file", *model], capsys)
    text_file.write_text("The postman walked. " * 1500)
    line = error_line(["prune", str(text_file), "-o", str(tmp_path / "o"), *model], capsys)
    assert "the model has 4,096 positions; expected a shorter text" in line
    assert not (tmp_path / "o").exists()


# -- ask ---------------------------------------------------------------------------------------------------------------


def test_ask_a_cache(cache_file, model, parts, capsys):
    cache = PrunedCache.load(cache_file)
    expected = ask(*parts, cache, "Why?", max_new_tokens=8)
    more = ["--max-new-tokens", "8", *model]
    for words in (["--cache", str(cache_file), "Why?"], ["Why?", "--cache", str(cache_file)]):
        assert cli.main(["ask", *words, *more]) == 0
        assert capsys.readouterr().out == f"{expected}\n"
    assert cli.main(["ask", "--cache", str(cache_file), "Why?", "--json", *more]) == 0
    result = json.loads(capsys.readouterr().out)
    fresh = PrunedCache.load(cache_file)
    assert (result["answer"], result["question"], result["method"]) == (expected, "Why?", fresh.method)
    assert (result["context_tokens"], result["cache_bytes"]) == (fresh.context_tokens[0], fresh.nbytes)
    assert result["ratio_achieved"] == round(fresh.ratio, 3)


def test_the_model_is_loaded_in_the_dtype_of_the_cache(output, tiny_model_path, model, capsys):
    import torch

    half = Condenser.from_pretrained(tiny_model_path, dtype=torch.bfloat16, device="cpu")
    cache = prefill(half.model, half.tokenizer, TEXT, SnapKV(keep=0.25, window=8))
    cache.save(output)
    expected = ask(half.model, half.tokenizer, cache, "Why?", max_new_tokens=8)
    assert cli.main(["ask", "--cache", str(output), "Why?", "--max-new-tokens", "8", *model]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cache", "CACHE"], "Missing argument 'QUESTION'"),
        (["--cache", "CACHE", "text.txt", "Why?"], "--cache: got two arguments beside it; expected the question alone"),
        (["--cache", "CACHE", " "], "question: empty"),
        (["--cache", "CACHE", "Why?", "--full"], "expected without --full, --ratio, --method and --compressor"),
        (["--cache", "CACHE", "Why?", "--ratio", "4"], "expected without --full, --ratio, --method and --compressor"),
        (
            ["--cache", "CACHE", "Why?", "--method", "pool"],
            "expected without --full, --ratio, --method and --compressor",
        ),
        (["--cache", "nowhere", "Why?"], "cannot read a pruned cache from nowhere: No such file"),
        (["CACHE", "Why?"], "holds a pruned cache; expected condense ask --cache"),
        ([], "Missing argument 'FILE'"),
        (["CACHE"], "Missing argument 'QUESTION'"),
    ],
)
def test_ask_bad_input(words, message, cache_file, model, capsys):
    argv = ["ask", *(str(cache_file) if word == "CACHE" else word for word in words), *model]
    assert message in error_line(argv, capsys)


def test_ask_a_damaged_or_foreign_cache(cache_file, text_file, model, capsys):
    data = cache_file.read_bytes()
    cache_file.write_bytes(data[:-1])
    line = error_line(["ask", "--cache", str(cache_file), "Why?", *model], capsys)
    assert f"{cache_file}: truncated: " in line
    assert "expected a pruned cache" in error_line(["ask", "--cache", str(text_file), "Why?", *model], capsys)
    cache_file.write_bytes(data)
    line = error_line(["ask", "--cache", str(cache_file), "Why?"], capsys)
    assert "expected 4, as the model has (it was made by 'random-tiny'); --model names another model" in line


# -- eval --------------------------------------------------------------------------------------------------------------


def test_eval_pruning(tmp_path, model, capsys):
    path = tmp_path / "report.json"
    argv = [*EVAL, *SHORT, "--keep", "0.5,0.25", "--methods", "keydiff,adakv(snapkv)", *model]
    assert cli.main([*argv, "--json", "-o", str(path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(path.read_text())
    assert (report["questions"], report["contexts"], report["model"]) == (4, 2, "random-tiny")
    names = ["random", "query_aware", "keydiff", "adakv(snapkv)"]
    expected = [("full", 1.0), ("none", 0.0), *((name, share) for name in names for share in (0.5, 0.25))]
    assert [(row["method"], row["keep"]) for row in report["rows"]] == expected
    full = report["rows"][0]
    for row in report["rows"][2:]:
        assert 0 < row["cache_bytes"] < row["keep"] * full["cache_bytes"] * 1.1  # and 4 bytes for each position
        assert row["num_questions"] == 4


def test_eval_pruning_prints_a_table(model, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "240")  # processes of pytest-xdist have 80, in which headings fold
    assert cli.main([*EVAL, *SHORT, "--keep", "0.5", "--methods", "knorm", *model]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    for part in ("full cache", "no context", "random", "query_aware", "knorm", "0.5", "prefill ms", "exact match"):
        assert part in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pruning", "--ratios", "4"], "--ratios: of soft tokens"),
        (["--keep", "0.5"], "--keep: of pruned caches; expected with --pruning"),
        (["--window", "8"], "--window: of pruned caches; expected with --pruning"),
        (["--pruning", "--keep", "2"], "keep: got '2', expected shares in (0, 1]"),
        (["--pruning", "--keep", "nan"], "keep: got 'nan'"),
        (["--pruning", "--keep", ""], "keep: got ''"),
        (["--pruning", "--methods", "magic"], "method: got 'magic'"),
        (["--pruning", "--methods", ","], "methods: got ','"),
        (["--pruning", "--min-chars", "400", "--max-chars", "500", "--facts-per-context", "4"], "questions"),
    ],
)
def test_eval_pruning_bad_input(options, message, model, capsys):
    assert message in error_line(["eval", *model, *options], capsys)


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_shows_options_and_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["prune", "--help"]) == 0
    out = capsys.readouterr().out
    for part in (
        "--keep",
        "0.25",
        "snapkv",
        "adakv",
        "--list-methods",
        "the embedded condense-tiny",
        "int8 or fp8",
        "--json",
    ):
        assert part in out
    assert cli.main(["ask", "--help"]) == 0
    assert "--cache" in capsys.readouterr().out
    assert cli.main(["eval", "--help"]) == 0
    out = capsys.readouterr().out
    for part in ("--pruning", "0.5,0.25,0.1", "4,8,16"):
        assert part in out


def test_list_methods_names_what_can_be_built_by_its_name(capsys):
    assert cli.main(["prune", "--list-methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(" ")] == [
        *methods_by_name(),
        *("kvzap", "qfilter"),
        *wrappers_by_name(),
    ]
    assert f"  {'snapkv':<20}{SnapKV.summary}" in lines


def test_the_help_imports_no_torch():
    code = "import sys; from condense_core import cli; cli.main(['prune', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
