"""What the tests of sessions and caches share: contexts, methods that evict in every layout, and generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import AdaKV, PyramidKV
from condense_testing.pruning import models

Build = Callable[..., PreTrainedModel]
FAMILIES = ("mistral", "llama", "qwen2", "qwen3")
ATTENTIONS = ("sdpa", "eager")
# Families differ in what stands before the attention function: each is tested with one of them, the first with both.
FAMILY_ATTENTIONS = [
    pytest.param(family, attention, marks=pytest.mark.slow if attention == "eager" and family != "mistral" else ())
    for family in FAMILIES
    for attention in ATTENTIONS
]
SLIDING_ATTENTIONS = [(24, "sdpa"), (24, "eager"), (200, "sdpa"), pytest.param(200, "eager", marks=pytest.mark.slow)]
NUM_TOKENS = 90
LENGTHS = (NUM_TOKENS, 61, 40)
# Relative to a float64 model of the same weights: three layers of sums of some fifty fp32 products each.
TOLERANCE = 2e-5
ALL = SnapKV(keep=1.0)
HALF = SnapKV(keep=0.5, window=8)
EVICTING = {
    "uniform": HALF,
    "ragged": AdaKV(HALF),
    "pyramid": PyramidKV(HALF, beta=4),
    "ragged pyramid": AdaKV(PyramidKV(HALF, beta=4)),
}


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 400, (batch, count), generator=torch.Generator().manual_seed(seed))


def generate(model: PreTrainedModel, inputs: dict[str, Any], count: int = 6, **options: Any) -> Tensor:
    """The new tokens; no sequence ends early."""
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    new: Tensor = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return new


def generate_ids(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, count: int = 8, **options: Any
) -> Any:
    """The new tokens; with ``return_dict_in_generate`` whatever transformers returns. No sequence ends early."""
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(input_ids=ids, attention_mask=mask, **settings)
    return out if options.get("return_dict_in_generate") else out[:, ids.shape[1] :]


def answers(model: PreTrainedModel, prompt: Tensor, count: int = 6, **options: Any) -> Tensor:
    """What the unpruned model says behind ``prompt [B, N]``."""
    return generate(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, count, **options)


def check(
    model: PreTrainedModel, cache: PrunedCache, sequences: list[Tensor], question: Tensor, *, seed: int = 2
) -> None:
    """What is held, the logits of a question and of five tokens behind it, against the reference."""
    reference, following = models.Reference(model), tokens(len(question), 5, seed)
    places = [models.kept(cache, b, len(s)) for b, s in enumerate(sequences)]
    contexts = [reference.prefill(sequence) for sequence in sequences]
    for b, context in enumerate(contexts):
        for index, layer in enumerate(cache.layers):
            for g, columns in enumerate(places[b][index]):
                assert columns == sorted(set(columns))
                if isinstance(layer, UniformLayer) and layer.positions is None:
                    continue  # padding included: the logits tell
                keys, values = models.rows(layer, b, g)
                models.close(keys, reference.turned(context.keys[index][g, columns], columns), TOLERANCE)
                models.close(values, context.values[index][g, columns], TOLERANCE)
    with torch.no_grad(), cache.attached(model):
        inputs = cache.inputs(question)
        found = [model(**inputs).logits]
        for step in following.split(1, 1):
            found.append(model(**cache.inputs(step)).logits)
    logits = torch.cat(found, 1)
    for b, context in enumerate(contexts):
        new = torch.cat([question[b], following[b]])
        models.close(logits[b], reference.answer(context, places[b], new, len(sequences[b])), TOLERANCE)
