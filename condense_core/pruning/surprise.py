"""How surprised the model is by each token of a context that it reads, from what it computes of it anyway."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.decoder.logits import decoder_logits
from condense_core.pruning.padding import Padding
from condense_core.pruning.pruner import Chunks

BLOCK_ELEMENTS = 1 << 24
"""Logits that exist at a time: 64 MiB in float32."""


@torch.no_grad()
def token_surprise(
    model: PreTrainedModel, hidden: Tensor, ids: Tensor, padding: Padding | None = None, chunks: Chunks | None = None
) -> Tensor:
    """The negative log-likelihood in nats of each token of a prefill so far, given those before it.

    Args:
        model: whose head makes logits of hidden states.
        hidden: ``[B, N, d_model]``, the model's last hidden states in this pass.
        ids: ``[B, N]`` int64, the tokens of this pass.
        padding: of the batch.
        chunks: the prefill that this pass continues, which remembers what the next one needs; None: it is the only one.

    Returns:
        ``[B, T]`` float32 of all T tokens that were read; 0 for the first of a sequence, which has none before it.
    """
    before = None if chunks is None else chunks.hidden
    first = hidden[:, :1] if before is None else before  # of the first token there is nothing to say
    earlier = torch.cat([first, hidden[:, :-1]], 1).flatten(0, 1)
    block = max(1, BLOCK_ELEMENTS // int(model.config.vocab_size))
    losses = [
        F.cross_entropy(decoder_logits(model, rows).float(), tokens, reduction="none")
        for rows, tokens in zip(earlier.split(block), ids.flatten().split(block), strict=True)
    ]
    surprise = torch.cat(losses).view(ids.shape)
    if before is None:
        surprise[:, 0] = 0.0
    if padding is not None:
        surprise.scatter_(1, padding.bounds[:, :1].to(surprise.device), 0.0)
    if chunks is not None:
        surprise = surprise if chunks.surprise is None else torch.cat([chunks.surprise, surprise], 1)
        chunks.surprise, chunks.hidden = surprise, hidden[:, -1:]
    return surprise
