"""Windows of packed sequences: where their rows stand, and which tokens they hold."""

import torch
from torch import Tensor
from torch.nn import functional as F


def window_offsets(cu_seqlens: Tensor, ratio: int) -> Tensor:
    """Rows of each sequence in the output of `attention_pool`: offsets `[S+1]`, as `cu_seqlens` for tokens.

    Sequence s of n_s tokens has ceil(n_s / ratio) windows (none when it is empty), so its rows are
    `out[offsets[s]:offsets[s + 1]]`, and `offsets[-1]` is K. dtype and device are those of `cu_seqlens`.
    """
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    windows = (lengths + ratio - 1) // ratio
    return F.pad(windows.cumsum(0, dtype=cu_seqlens.dtype), (1, 0))


def window_tokens(num_tokens: int, ratio: int, cu_seqlens: Tensor | None, halo: int) -> tuple[Tensor, slice]:
    """Which token stands at every place of every window: `[K, W]`, -1 where a window leaves its sequence.

    A window wider than the longest sequence sees no more than one of its length, so W may be smaller than
    ratio + 2*halo: the slice says which places of a window these are.
    """
    cu_seqlens = torch.tensor([0, num_tokens]) if cu_seqlens is None else cu_seqlens.cpu()
    longest = max([0, *cu_seqlens.diff().tolist()])
    width, reach = min(ratio, max(longest, 1)), min(halo, longest)
    offsets = window_offsets(cu_seqlens, width)  # [S+1]
    sequence = torch.repeat_interleave(offsets.diff())  # [K], which sequence a window belongs to
    first, end = cu_seqlens[:-1][sequence, None], cu_seqlens[1:][sequence, None]  # [K, 1]
    j = torch.arange(len(sequence)) - offsets[:-1][sequence]  # [K], counted in its sequence
    token = first + (j * width)[:, None] + torch.arange(-reach, width + reach)  # [K, W]
    token = token.masked_fill((token < first) | (token >= end), -1)
    return token, slice(halo - reach, halo + width + reach)


def gather_windows(r: Tensor, index: Tensor) -> Tensor:
    """`[T, d]` -> `[K, W, d]`, zeros where the index is -1; a view when every window is full and none overlap."""
    if index.numel() == len(r) and not bool((index < 0).any()):
        return r.reshape(*index.shape, r.shape[-1])
    index = index.to(r.device)
    # Zero, not only unattended: 0 * NaN is NaN, and one sequence's NaN must not reach another's rows.
    return r[index].masked_fill((index < 0).unsqueeze(-1), 0.0)
