"""What the specifications share: the dtype they compute in, and which tokens of a padded batch are real."""

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp32; fp64 for fp64, which only tests have."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def real_tokens(bounds: Tensor | None, batch: int, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First token and end of each sequence, `[B, 1]` each, within [0, N] and in order; nothing is read on the host."""
    if bounds is None:
        bounds = torch.tensor([0, num_tokens], device=device).expand(batch, 2)
    start, stop = bounds.long().clamp(0, num_tokens).unsqueeze(-1).unbind(1)
    return start, stop.maximum(start)
