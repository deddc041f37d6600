"""The surrogate of KVzap for a model: its own hidden states, and what KVzip scores there, on some texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from condense_core.decoder.architecture import decoder_parts
from condense_core.pruning.dense import DensePrefill
from condense_core.pruning.methods.kvzap import SurrogateFit
from condense_core.pruning.methods.kvzip import KVzip
from condense_core.pruning.text import prompt_of


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """What ``KVzap(surrogate=...)`` takes: ``[L, G, d_model + 1]`` float32.

    Args:
        model: every text is read by it twice, as KVzip does.
        tokenizer: its own.
        texts: ordinary ones, about as long as those that will be pruned. How many a model needs shows in use: sixteen
            of 5,000 characters were enough for SmolLM2-135M.
        progress: called behind each with how many were read.

    Raises:
        ValueError: there is no text, or one is empty or longer than the model's positions.
    """
    device = decoder_parts(model).embed_tokens.weight.device
    found = SurrogateFit()
    for done, text in enumerate(texts, 1):
        prompt = prompt_of(model, tokenizer, text)
        dense = DensePrefill(model, torch.tensor([prompt.input_ids], device=device))
        scores = dense.pass_scores(KVzip(keep=1.0, sink=0).for_prompt(prompt))
        start = prompt.text_start  # what stands before is repeated by nobody
        found.add([x[start:] for x in dense.layer_inputs], [own[:, start:] for own in scores])
        if progress:
            progress(done)
    return found.solve()
