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


def token_places(x: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    """Places counted from the first real token of a sequence, `[B, 1, N]`, and real tokens in it, `[B, 1, 1]`."""
    start, stop = (t.unsqueeze(-1) for t in real_tokens(bounds, x.shape[0], x.shape[2], x.device))  # [B, 1, 1]
    return torch.arange(x.shape[2], device=x.device) - start, stop - start


def force_scores(scores: Tensor, sink: int, window: int, bounds: Tensor | None) -> Tensor:
    """+inf for the first `sink` and last `window` real tokens, -inf for padding: `[B, G, N] -> [B, G, N]`."""
    place, length = token_places(scores, bounds)
    forced = (place < sink) | (place >= length - window)
    padding = (place < 0) | (place >= length)
    return scores.masked_fill(forced, float("inf")).masked_fill(padding, float("-inf"))


def scored_tokens(x: Tensor, sink: int, bounds: Tensor | None) -> Tensor:
    """Which tokens of `x [B, _, N, _]` are real and not among the first `sink` real ones: `[B, N]`."""
    start, stop = real_tokens(bounds, x.shape[0], x.shape[2], x.device)
    token = torch.arange(x.shape[2], device=x.device)
    return (token >= start + sink) & (token < stop)
