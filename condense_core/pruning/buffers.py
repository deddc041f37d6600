"""What the layers of a pruned cache share: their buffers, and what ``crop`` takes away from them."""

from __future__ import annotations

import torch
from torch import Tensor


def storage_bytes(tensor: Tensor) -> int:
    """Bytes of the memory behind ``tensor``, also where it is a view of a part."""
    return tensor.untyped_storage().nbytes()


def grown(buffer: Tensor, length: int, room: int) -> Tensor:
    """``buffer [B, G, N, D]`` with its first ``length`` tokens copied into a new one of ``room`` tokens."""
    larger = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])
    larger[:, :, :length] = buffer[:, :, :length]
    return larger


def is_sealed(buffer: Tensor) -> bool:
    """Whether it was made in torch's inference mode, which is over: it must be copied before it is written."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def too_many(count: int, most: int) -> str:
    """What is said of tokens that a pruning has thinned out and that are to be removed one by one."""
    return (
        f"crop: {count} tokens, expected at most the {most} that came after the pruning; an assistant model's "
        "candidates are part of the prefill in a session: expected PrunedCache.prefill(...) and "
        "model.generate(**cache.inputs(ids), assistant_model=...)"
    )


def removed(tokens_to_remove: int) -> int:
    """How many tokens ``crop`` is asked to take away; ``ValueError`` for the older form, a length to keep."""
    if tokens_to_remove > 0:
        raise ValueError(f"crop: {tokens_to_remove}, expected minus the number of tokens to remove")
    return -tokens_to_remove
