"""The rotary embedding whose pairs are the two halves of a head, as Llama's."""

import torch
from torch import Tensor


def rotate_half(x: Tensor) -> Tensor:
    """`P x` of the rotary embedding whose pairs are the two halves: `(x1, x2) -> (-x2, x1)` over the last dimension."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)
