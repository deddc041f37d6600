"""Several processes of one training run agree on what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In one process of two the loss of the second step is not finite. The decoder's first argument is its folder.
PROGRAM = """
import json, os, sys
from pathlib import Path
from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig
from condense_core.decoder.model import load_decoder
from condense_core.tasks.prose import ProseWriter
from condense_core.training.data import BatchMaker
from condense_core.training.store import SentenceStore
from condense_core.training.trainer import Distillation, TrainConfig, train_compressor
import torch

model, tokenizer = load_decoder(sys.argv[1], dtype=torch.float32)
torch.manual_seed(0)
compressor = Compressor(model, CompressorConfig("mean", d_model=96, encoder_layers=1, ratios=(4,), mlp_hidden=8))
maker = BatchMaker(SentenceStore([ProseWriter().document(0, 60)], tokenizer), tokenizer, seed=0)
forward, calls = Distillation.forward, []

def spoiled(self, batch, ratio):
    loss, kl, cross_entropy = forward(self, batch, ratio)
    calls.append(ratio)
    bad = os.environ["RANK"] == "1" and len(calls) == 2
    return loss * (float("nan") if bad else 1.0), kl, cross_entropy

Distillation.forward = spoiled
config = TrainConfig(steps=3, tokens=150, min_context=64, max_context=64, turns=1, lr=0.01, warmup=1, log_every=1)
out = Path(sys.argv[2])
train_compressor(model, compressor, maker, config, out)
weights = [float(p.double().sum()) for p in compressor.trainable_parameters()]
(out / f"end-{os.environ['RANK']}.json").write_text(json.dumps(weights))
"""


@pytest.mark.slow  # two interpreters that load torch and transformers
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(tiny_model_path: Path, tmp_path: Path) -> None:
    program, out = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(program), str(tiny_model_path), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = [json.loads((out / f"end-{rank}.json").read_text()) for rank in (0, 1)]
    assert ends[0] == ends[1]
    rows = [json.loads(line) for line in (out / "log.jsonl").open()]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1]
    assert [row["step"] for row in rows] == [1, 2, 3]
