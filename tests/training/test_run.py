"""A run as `condense train` starts it: from a model's folder to a checkpoint that a condenser loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from condense_core.compressor.condenser import Condenser
from condense_core.training.run import RunConfig, train
from condense_core.training.trainer import TrainConfig

CONFIG = TrainConfig(steps=3, tokens=300, min_context=96, max_context=128, turns=2, warmup=1, log_every=1)


@pytest.mark.parametrize("method", ["pool", "memory"])
def test_from_a_model_to_a_checkpoint(tiny_model_path: Path, tmp_path: Path, method: str) -> None:
    run = RunConfig(
        model=str(tiny_model_path),
        corpus=None,
        out=tmp_path / "run",
        method=method,
        ratios=(4, 8),
        encoder_layers=1,
        lora_rank=2,
        eval_questions=5,
        max_documents=3,
    )
    folder = train(run, CONFIG)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    seen = rows[-1]["eval"].pop("controls")
    assert set(seen) == {"told", "quote"}
    assert all(set(found) == {"full", "none", "4", "8"} for found in seen.values())
    assert set(rows[-1]["eval"]) == {"full/0", "none/0", f"{method}/4", f"{method}/8"}
    measures = {"contained", "exact_match", "f1", "loss", "recovered"}
    assert all(set(found) == measures for found in rows[-1]["eval"].values())
    condenser = Condenser.from_pretrained(tiny_model_path, compressor=folder, device="cpu")
    assert (condenser.config.method, condenser.config.ratios) == (method, (4, 8))
    soft = condenser.compress("The postman walked past the hills. " * 5, ratio=8)
    assert soft.embeds.isfinite().all()
    assert isinstance(condenser.generate(soft, "Who was it?", max_new_tokens=3), str)
    again = train(run, CONFIG)  # a finished run is finished
    assert again == folder
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    run = RunConfig(model=str(tmp_path / "nowhere"), corpus=None, out=tmp_path / "run", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"model: '.*nowhere' is no model folder"):
        train(run, CONFIG)
    assert not (tmp_path / "run").exists()
