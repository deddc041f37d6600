"""Controls of a run: they tell a compressor that reads from one whose soft tokens are the same for all texts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import MistralForCausalLM

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig
from condense_core.training.controls import control_batches, controls
from condense_core.training.data import BatchMaker
from condense_core.training.losses import tail_logits

# fp32: means of losses of order 10.
TOLERANCES = {"atol": 1e-4, "rtol": 1e-4}


def test_controls_of_one_that_reads_and_of_one_that_does_not(
    build_model: Callable[[int], MistralForCausalLM], maker: BatchMaker
) -> None:
    model = build_model(0).requires_grad_(False).eval()
    config = CompressorConfig("mean", d_model=48, encoder_layers=0, ratios=(1, 2), mlp_hidden=8, residual=True)
    reading = Compressor(model, config)
    batches = [batch.map(lambda tensor: tensor[:2] if tensor.dim() > 1 else tensor) for batch in control_batches(maker)]
    batches = [type(b)(b.prefix, b.context, b.tail, b.tail_mask, b.task, b.turns) for b in batches]
    found = controls(model, reading, batches, (1, 2))
    assert set(found) == {"told", "quote"}
    for batch in batches:
        row = found[batch.task]
        logits, ids = tail_logits(model, model.get_input_embeddings()(batch.context), batch)
        torch.testing.assert_close(row["full"], float(torch.nn.functional.cross_entropy(logits, ids)), **TOLERANCES)
        # At ratio 1 an untrained residual compressor gives the embeddings: the full context, and another row's.
        assert abs(row["1"]["loss"] - row["full"]) < 1e-4
        assert row["1"]["shuffled"] != row["1"]["loss"]
        assert row["1"]["cosine"] < 0.9
        assert row["none"] != row["full"]
    same = Compressor(model, config)
    assert same.projection is not None
    with torch.no_grad():
        same.projection.base.zero_()
        same.projection.down.bias.fill_(1.0)
    for row in controls(model, same, batches, (2,)).values():
        assert row["2"]["cosine"] > 0.999
        assert abs(row["2"]["loss"] - row["2"]["shuffled"]) < 1e-4
