"""``--compressor FOLDER``: a checkpoint outside of the model's folder, for every command that compresses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from condense_core import cli
from condense_core.compressor.compressor import Compressor
from condense_core.compressor.condenser import Condenser
from condense_core.compressor.config import CompressorConfig
from condense_core.compressor.soft_tokens import SoftTokens

TEXT = "The keeper of the misty lighthouse is Wanda Beldorf. " * 6


@pytest.fixture(scope="module")
def checkpoint(tiny_condenser: Condenser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `mean` compressor for the ratio 4, as a training run leaves it: `OUT/checkpoint`."""
    config = CompressorConfig(
        method="mean",
        d_model=tiny_condenser.config.d_model,
        encoder_layers=1,
        ratios=(4,),
        mlp_hidden=32,
        model_id=tiny_condenser.model_id,
    )
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    Compressor(tiny_condenser.model, config).save(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_compress_uses_the_named_checkpoint(checkpoint, text_file, tiny_model_path, tmp_path):
    output = tmp_path / "soft.safetensors"
    argv = ["compress", str(text_file), "-o", str(output), "--model", str(tiny_model_path)]
    assert cli.main([*argv, "--compressor", str(checkpoint)]) == 0
    expected = Condenser.from_pretrained(tiny_model_path, compressor=checkpoint, device="cpu").compress(TEXT, 4)
    made = SoftTokens.load(output)
    assert made.method == "mean"
    assert torch.equal(made.embeds, expected.embeds)


def test_ask_answers_through_the_named_checkpoint(checkpoint, text_file, tiny_model_path, capsys):
    argv = ["ask", str(text_file), "Who?", "--model", str(tiny_model_path), "--max-new-tokens", "4", "--json"]
    assert cli.main([*argv, "--compressor", str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "mean"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        pytest.param("{run}", "its checkpoint is {run}/checkpoint", id="the run's folder"),
        pytest.param("{run}/nowhere", "no compressor.json in", id="no folder"),
        pytest.param("{model}", "no compressor.json in", id="a model's folder"),
    ],
)
def test_a_folder_without_checkpoint_is_one_line(folder, message, checkpoint, text_file, tiny_model_path, capsys):
    names = {"run": str(checkpoint.parent), "model": str(tiny_model_path)}
    argv = ["ask", str(text_file), "Who?", "--model", str(tiny_model_path)]
    assert cli.main([*argv, "--compressor", folder.format(**names)]) == 2
    error = capsys.readouterr().err
    assert message.format(**names) in error
    assert error.count("\n") == 1


def test_another_method_than_the_checkpoints_is_refused(checkpoint, text_file, tiny_model_path, capsys):
    argv = ["ask", str(text_file), "Who?", "--model", str(tiny_model_path), "--compressor", str(checkpoint)]
    assert cli.main([*argv, "--method", "pool"]) == 2
    assert "method: got 'pool'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [pytest.param(["--full"], id="full text"), pytest.param(["--cache", "x.cache"], id="a cache")]
)
def test_it_is_refused_where_nothing_is_compressed(given, checkpoint, text_file, capsys):
    arguments = ["Who?"] if "--cache" in given else [str(text_file), "Who?"]
    assert cli.main(["ask", *arguments, *given, "--compressor", str(checkpoint)]) == 2
    assert "--compressor" in capsys.readouterr().err
