"""The inputs of ``PrunedCache.prefill``: checked, and brought into one form."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.decoder.architecture import decoder_parts


def check_chunk_size(chunk_size: int | None) -> None:
    """An int of at least 1, or None."""
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size is {chunk_size!r}, expected an int >= 1, or None")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected an int >= 1, or None")


def checked_inputs(
    model: PreTrainedModel, input_ids: Tensor | None, inputs_embeds: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Embeddings ``[B, N, d_model]`` and the mask ``[B, N]``, once they are as ``prefill`` describes them."""
    embedding = decoder_parts(model).embed_tokens
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids: expected either these or inputs_embeds")
    given, name, rank = (input_ids, "input_ids", 2) if input_ids is not None else (inputs_embeds, "inputs_embeds", 3)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is a {type(given).__name__}, expected a torch.Tensor")
    if given.dim() != rank or min(given.shape) < 1 or (rank == 3 and given.shape[2] != embedding.weight.shape[1]):
        expected = "[B, N]" if rank == 2 else f"[B, N, {embedding.weight.shape[1]}]"
        raise ValueError(f"{name} has shape {list(given.shape)}, expected {expected} with B and N >= 1")
    if rank == 2:
        if given.is_floating_point():
            raise TypeError(f"input_ids has dtype {given.dtype}, expected int64")
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= embedding.weight.shape[0]:
            raise ValueError(f"input_ids: from {low} to {high}, expected 0 to {embedding.weight.shape[0] - 1}")
        with torch.no_grad():
            given = embedding(given.to(embedding.weight.device))
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != given.shape[:2]):
        came = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: got {came}, expected {list(given.shape[:2])}")
    return given, None if mask is None else mask.to(given.device)
