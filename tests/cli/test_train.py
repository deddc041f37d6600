"""`condense train`, in process and on a random tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from condense_core import cli
from condense_core.compressor.condenser import Condenser

TRAIN = ["--encoder-layers", "1", "--lora-rank", "2", "--tokens", "256", "--min-context", "64", "--max-context", "96"]


def test_train_writes_a_checkpoint_that_loads_and_resumes(tiny_model_path, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["train", "--model", str(tiny_model_path), "--out", str(out), *TRAIN, "--eval-questions", "0", "--json"]
    assert cli.main([*argv, "--steps", "2", "--ratios", "2,4"]) == 0
    result = json.loads(capsys.readouterr().out)
    condenser = Condenser.from_pretrained(tiny_model_path, compressor=result["checkpoint"])
    assert condenser.config.ratios == (2, 4)
    assert len(condenser.compress("The keeper of the misty lighthouse is Wanda Beldorf.", 2)) > 0
    assert cli.main([*argv, "--steps", "3", "--ratios", "2,4"]) == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval" not in row] == [2, 3]
    assert [(row["step"], *row["eval"]) for row in rows if "eval" in row] == [(2, "controls"), (3, "controls")]


def test_train_refuses_to_go_on_with_other_settings(tiny_model_path, tmp_path, capsys):
    argv = ["train", "--model", str(tiny_model_path), "--out", str(tmp_path / "run"), *TRAIN, "--eval-questions", "0"]
    assert cli.main([*argv, "--steps", "1", "--ratios", "2,4"]) == 0
    capsys.readouterr()
    assert cli.main([*argv, "--steps", "2", "--ratios", "4", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err == f"error: ratios: the run in {tmp_path / 'run'} has 2, 4, got 4; expected the same, or another folder\n"
    )


def test_a_training_that_diverges_says_so_in_one_line(tiny_model_path, tmp_path, capsys, monkeypatch):
    argv = ["train", "--model", str(tiny_model_path), "--out", str(tmp_path / "run"), *TRAIN, "--eval-questions", "0"]
    monkeypatch.setattr("condense_core.training.trainer.Trainer._is_finite", lambda *_: False)
    assert cli.main([*argv, "--steps", "9", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "error: training: no finite loss or gradient in 5 steps in a row, the last of them 5; stopped"
    )
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_train_takes_text_without_sentence_ends(tiny_model_path, tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\u5929\u5730\u7384\u9ec4" * 400, encoding="utf-8")
    argv = ["train", "--model", str(tiny_model_path), "--out", str(tmp_path / "run"), *TRAIN, "--eval-questions", "0"]
    assert cli.main([*argv, "--steps", "1", "--corpus", str(corpus)]) == 0
    corpus.write_text("Too short.")
    assert cli.main([*argv, "--steps", "1", "--corpus", str(corpus)]) == 2
    err = capsys.readouterr().err
    assert "tokens, expected at least max_context = 96; a shorter one would repeat itself" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("layers", [[], ["--encoder-layers", "0"]], ids=["default", "none"])
def test_train_with_the_default_adapter_at_any_depth(layers, tiny_model_path, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["train", "--model", str(tiny_model_path), "--out", str(out), "--tokens", "256", "--max-context", "96"]
    argv += ["--min-context", "64", "--steps", "1", "--eval-questions", "0", *layers]
    assert cli.main(argv) == 0
    condenser = Condenser.from_pretrained(tiny_model_path, compressor=out / "checkpoint")
    assert condenser.config.encoder_layers == (0 if layers else 1)
    assert condenser.config.lora_rank == (0 if layers else 32)


def test_train_evaluates_on_the_way(tiny_model_path, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["train", "--model", str(tiny_model_path), "--out", str(out), *TRAIN, "--eval-questions", "1"]
    assert cli.main([*argv, "--steps", "1", "--ratios", "4", "--method", "mean"]) == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (evaluation,) = [row["eval"] for row in rows if "eval" in row]
    assert set(evaluation) == {"controls", "full/0", "none/0", "mean/4"}
    printed = capsys.readouterr().out
    assert "GiB per process" in printed
    assert str(out / "checkpoint") in printed


def test_train_never_unpickles_a_model(tiny_model_path, tmp_path, capsys):
    model = tmp_path / "pickled"
    model.mkdir()
    for path in tiny_model_path.iterdir():
        if path.suffix == ".json":
            (model / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(tiny_model_path / "model.safetensors"), model / "pytorch_model.bin")
    argv = ["train", "--model", str(model), "--out", str(tmp_path / "run"), "--steps", "1", *TRAIN]
    assert cli.main(argv) == 2
    assert "cannot load" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dry_run_says_what_a_step_takes(tiny_model_path, tmp_path, capsys):
    argv = ["train", "--model", str(tiny_model_path), "--out", str(tmp_path / "run"), *TRAIN, "--dry-run"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "frozen, float32" in out
    assert "GiB per process, on a GPU" in out
    assert cli.main([*argv, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory_bytes"]
    assert memory["total"] == memory["weights"] + memory["gradients_and_optimizer"] + memory["step"]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # a step of 40 layers, in two dtypes
def test_dry_run_of_mistral_7b_needs_no_weights(tmp_path, capsys):
    argv = ["train", "--model", "mistralai/Mistral-7B-Instruct-v0.2", "--ratios", "2,4,8,16", "--encoder-layers", "8"]
    assert cli.main([*argv, "--lora-rank", "32", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "7,241.7 M parameters, frozen" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "select"], "'select' is not trained"),
        (["--ratios", "2,-4"], "ratio: got -4"),
        (["--encoder-layers", "9"], "encoder_layers: got 9"),
        (["--min-context", "500", "--max-context", "100"], "min_context, max_context"),
        (["--lr", "0"], "lr: got 0.0"),
        (["--corpus", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--model", "no/such/folder/model"], "model"),
    ],
)
def test_train_bad_input_leaves_nothing_behind(options, message, tiny_model_path, tmp_path, capsys):
    out: Path = tmp_path / "run"
    argv = ["train", "--model", str(tiny_model_path), "--out", str(out), "--encoder-layers", "1", *options]
    cli_result = cli.main([*argv, "--steps", "1"])
    assert cli_result == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (out / "checkpoint").exists()
