"""Whether a compressor says something of its text at all: controls that a run measures as it goes.

A compressor can reach a low loss without reading anything, from what all answers have in common, and its soft tokens
can become the same for all texts. So the loss is measured beside that of the soft tokens of other texts and of no
context at all, and the soft tokens of different texts are compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.tasks.metrics import recovered
from condense_core.training.data import Batch, BatchMaker
from condense_core.training.losses import answer_losses, answer_states, soft_context

_ROWS, _CONTEXT = 8, 192


def control_batches(maker: BatchMaker) -> list[Batch]:
    """Batches of the maker's split: questions about facts, answered as in a sentence, and quotes."""
    rng = random.Random(f"controls-{maker.seed}")
    return [
        maker.told_facts(rng, batch=_ROWS, context=_CONTEXT, facts=4),
        maker.quotes(rng, batch=_ROWS, context=_CONTEXT, quotes=4),
    ]


@torch.no_grad()
def controls(
    model: PreTrainedModel, compressor: Compressor, batches: Sequence[Batch], ratios: Sequence[float]
) -> dict[str, Any]:
    """Losses in nats per answer token, and cosines, in [-1, 1], by task.

    ``full``, ``none``: with the context as tokens, and without one. For each ratio: ``loss`` with the soft tokens;
    ``shuffled`` with those of another row; ``recovered``, as ``metrics.recovered``; ``cosine``, the mean over pairs of
    rows of the cosine between soft tokens of one place, which is near 1 where all texts give the same.
    """
    found: dict[str, Any] = {}
    for batch in batches:
        embeds = model.get_input_embeddings()(batch.context)
        full, none = _loss(model, embeds, batch), _loss(model, embeds[:, :0], batch)
        rows: dict[str, Any] = {"full": full, "none": none}
        for ratio in ratios:
            soft = soft_context(compressor, batch, ratio)
            loss, shuffled = _loss(model, soft, batch), _loss(model, soft.roll(1, 0), batch)
            rows[f"{ratio}"] = {
                "loss": loss,
                "shuffled": shuffled,
                "recovered": recovered(none, loss, full),
                "cosine": float(F.cosine_similarity(soft.float(), soft.float().roll(1, 0), dim=-1).mean()),
            }
        found[batch.task] = rows
    return found


def _loss(model: PreTrainedModel, context: Tensor, batch: Batch) -> float:
    return float(answer_losses(model, answer_states(model, context, batch), batch.answer_ids)[0])
