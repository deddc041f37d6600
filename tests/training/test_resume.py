"""What a training run survives and what it refuses: losses that are not finite, other settings, a process killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MistralForCausalLM, PreTrainedTokenizerBase

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig
from condense_core.training import trainer as module
from condense_core.training.checkpoint import read_meta
from condense_core.training.config import TrainConfig
from condense_core.training.data import BatchMaker
from condense_core.training.finite import DivergenceError
from condense_core.training.pretrain import Stage, pretrain
from condense_core.training.store import SentenceStore
from condense_core.training.trainer import Distillation, train_compressor

CONFIG = TrainConfig(
    steps=6,
    tokens=150,
    min_context=64,
    max_context=64,
    turns=1,
    lr=0.01,
    warmup=1,
    save_every=2,
    log_every=1,
    max_skipped=3,
    bf16=False,
)

Build = Callable[[int], MistralForCausalLM]


def build_compressor(model: MistralForCausalLM, **changes: Any) -> Compressor:
    torch.manual_seed(0)
    settings = {"method": "mean", "d_model": 48, "encoder_layers": 1, "ratios": (2, 4), "mlp_hidden": 8}
    compressor = Compressor(model, CompressorConfig(**(settings | {"lora_rank": 2, "lora_alpha": 2.0} | changes)))
    compressor.attach_lora()
    return compressor


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").open()]


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], what: str) -> None:
    """Let the loss of some steps, counted from 1, be NaN or infinite, or have a gradient that is."""
    forward, done = Distillation.forward, []

    def spoiled(self: Distillation, batch: Any, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
        loss, kl, cross_entropy = forward(self, batch, ratio)
        done.append(ratio)
        if len(done) in steps:
            if what == "gradient":  # of a finite loss: the root's slope at 0 is infinite
                return loss + (loss - loss.detach()).abs().sqrt(), kl, cross_entropy
            return loss * float(what), kl, cross_entropy
        return loss, kl, cross_entropy

    monkeypatch.setattr(Distillation, "forward", spoiled)


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(
    build_model: Build, maker: BatchMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As if the optimizer had not been called: a run in which it is not called is the same."""
    accept = module.StepGuard.accept

    def omit(guard: module.StepGuard, step: int, finite: bool) -> bool:
        return accept(guard, step, finite and step not in (3, 5))

    ends = []
    for name in ("spoiled", "reference"):
        with monkeypatch.context() as patch:
            if name == "spoiled":
                spoil(patch, {3, 5}, what)
            else:
                patch.setattr(module.StepGuard, "accept", omit)
            model = build_model(0)
            compressor = build_compressor(model)
            train_compressor(model, compressor, maker, CONFIG, tmp_path / name)
            ends.append(compressor.trainable_parameters())
    assert all(torch.isfinite(p).all() for p in ends[0])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    rows = log(tmp_path / "spoiled")
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 1, 1, 2, 2]
    assert ["ce" in row for row in rows] == [True, True, False, True, False, True]
    assert read_meta(tmp_path / "spoiled")["skipped"] == 2


def test_several_in_a_row_end_the_run_and_leave_the_last_good_checkpoint(
    build_model: Build, maker: BatchMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {4, 5, 6}, "nan")
    model = build_model(0)
    with pytest.raises(DivergenceError) as caught:
        train_compressor(model, build_compressor(model), maker, replace(CONFIG, steps=9), tmp_path)
    message = str(caught.value)
    assert "3 steps in a row, the last of them 6" in message
    assert f"the last good checkpoint is that of step 4, {tmp_path / 'checkpoint'}" in message
    assert "\n" not in message
    for path in (tmp_path / "state.safetensors", *(tmp_path / "checkpoint").glob("*.safetensors")):
        assert all(torch.isfinite(t).all() for t in load_file(path).values())
    assert read_meta(tmp_path)["step"] == 4


def test_a_weight_that_is_not_finite_is_never_saved(
    build_model: Build, maker: BatchMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(0)
    compressor = build_compressor(model)
    before: dict[Path, bytes] = {}

    def overflow(done: int, _: str) -> None:
        if done == 2:
            files = [tmp_path / "state.safetensors", *(tmp_path / "checkpoint").glob("*.safetensors")]
            before.update({path: path.read_bytes() for path in files})
        if done == 3:
            compressor.trainable_parameters()[0].data[0] = float("inf")
            monkeypatch.setattr(module.StepGuard, "accept", lambda *_: False)

    with pytest.raises(
        DivergenceError, match=r"the weight trained/0 is not finite after step 4; it is not saved, the "
    ):
        train_compressor(model, compressor, maker, CONFIG, tmp_path, progress=overflow)
    assert len(before) == 3
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"ratios": (2, 8)}, "ratios: the run in FOLDER has 2, 4, got 2, 8", id="ratios"),
        pytest.param({"causal": False}, "causal: the run in FOLDER has True, got False", id="causality"),
        pytest.param({"method": "pool"}, "method: the run in FOLDER has mean, got pool", id="method"),
        pytest.param({"lora_rank": 4}, "lora_rank: the run in FOLDER has 2, got 4", id="rank"),
        pytest.param({"encoder_layers": 2}, "encoder_layers: the run in FOLDER has 1, got 2", id="depth"),
        pytest.param({"halo": 1}, "halo: the run in FOLDER has 0, got 1", id="halo"),
        pytest.param({"num_heads": 4}, "num_heads: the run in FOLDER has 1, got 4", id="heads"),
        pytest.param({"tokens": 200}, "tokens: the run in FOLDER has 150, got 200", id="tokens"),
        pytest.param({"lr": 0.02}, "lr: the run in FOLDER has 0.01, got 0.02", id="learning rate"),
        pytest.param({"kl_weight": 2.0}, "kl_weight: the run in FOLDER has 1.0, got 2.0", id="weight of a loss"),
        pytest.param({"corpus": "Another text. " * 50}, "corpus: the run in FOLDER has", id="corpus"),
        pytest.param({"hidden": 96}, "model: the run in FOLDER has", id="model"),
        pytest.param({"weights": 1}, "model: the run in FOLDER has", id="model of the same shape"),
    ],
)
def test_other_settings_are_refused_by_name(
    build_model: Build,
    maker: BatchMaker,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    model = build_model(0)
    train_compressor(model, build_compressor(model), maker, replace(CONFIG, steps=1), tmp_path)
    state = (tmp_path / "state.safetensors").read_bytes()
    rest = dict(changes)
    if "corpus" in rest:
        maker = BatchMaker(SentenceStore([rest.pop("corpus")], tokenizer), tokenizer, seed=5)
    if hidden := rest.pop("hidden", 0):
        model = type(model)(type(model.config)(**(model.config.to_dict() | {"intermediate_size": hidden})))
    if seed := rest.pop("weights", 0):
        model = build_model(seed)
    config = replace(CONFIG, **{key: rest.pop(key) for key in list(rest) if hasattr(CONFIG, key)})
    with pytest.raises(ValueError, match="the run in") as caught:
        train_compressor(model, build_compressor(model, **rest), maker, config, tmp_path)
    assert message.replace("FOLDER", str(tmp_path)) in str(caught.value)
    assert str(caught.value).endswith("; expected the same, or another folder")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "state.safetensors").read_bytes() == state


def test_length_and_intervals_and_the_name_of_the_model_may_change(
    build_model: Build, maker: BatchMaker, tmp_path: Path
) -> None:
    model = build_model(0)
    train_compressor(model, build_compressor(model), maker, replace(CONFIG, steps=2), tmp_path)
    changed = replace(
        CONFIG, steps=4, warmup=2, save_every=1, eval_every=3, log_every=2, gradient_checkpointing=True, bf16=True
    )
    done: list[int] = []
    model.name_or_path = "the same weights under another name"
    train_compressor(model, build_compressor(model), maker, changed, tmp_path, progress=lambda n, _: done.append(n))
    assert done == [3, 4]


def test_a_pretraining_skips_refuses_and_ends_likewise(
    build_model: Build, maker: BatchMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from condense_core.training import pretrain as pretraining

    losses = pretraining.lm_losses
    stages = [Stage(4, 64, 64, tokens=150, lr=0.01, turns=1)]
    bad = {1}

    def spoiled(*args: Any, seed: int, **options: Any) -> tuple[Tensor, Tensor]:
        answer, context = losses(*args, seed=seed, **options)
        return answer * float("nan") if seed in bad else answer, context

    monkeypatch.setattr(pretraining, "lm_losses", spoiled)
    model = build_model(0)
    pretrain(model, {}, maker, stages, tmp_path / "run", log_every=1)
    assert [row.get("skipped", 0) for row in log(tmp_path / "run")] == [0, 1, 1, 1]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(ValueError, match=r"stages: the run in .* has .*, got .*; expected the same"):
        pretrain(model, {}, maker, [replace(stages[0], lr=0.02)], tmp_path / "run")
    bad.update(range(100))
    with pytest.raises(DivergenceError, match="5 steps in a row, the last of them 5; stopped, nothing was saved"):
        pretrain(build_model(0), {}, maker, [replace(stages[0], steps=9)], tmp_path / "diverging")
