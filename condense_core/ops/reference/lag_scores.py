"""Specification of `lag_scores`: tokens that spread far beyond the range of the tokens after them.

Public function: `condense_core.ops.lag_scores`. Kernels: kernels/lag_scores.py, csrc/cpu/kernels/lag_scores.h.

Shapes: B sequences, G key-value heads, N cached tokens, D head_dim.
"""

import torch
from torch import Tensor

from condense_core.ops.reference.padding import accumulation_dtype

_TINY = torch.finfo(torch.float32).tiny


def lag_scores(
    k: Tensor,  # [B, G, N, D]
    v: Tensor,  # [B, G, N, D]
    lag_size: int = 128,
    sink: int = 4,
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """The rank of a token in its chunk, by its spread relative to the next chunk: `[B, G, N]` fp32.

    The n real tokens of a sequence after its first `sink` ones are cut into chunks of `lag_size`. A full chunk is
    scored against the next full one, so all full chunks but the last are. With low_c and high_c the minimum and maximum
    of channel c over that next chunk:

        z_ic = (x_ic - low_c) / (high_c - low_c)
        info_i = softmax over the chunk of std_c(z_ic), the unbiased standard deviation over channels (0 where D = 1)

    info is averaged over keys and values and replaced by its rank in the chunk / lag_size: 0 for the lowest,
    (lag_size - 1) / lag_size for the highest; of equal tokens the earlier ranks higher. Everything else, the sinks and
    the tokens from the last full chunk on, scores +inf, padding -inf. A sequence of n < sink + 2*lag_size tokens has
    nothing to compare: its token i after the sinks scores (i - sink) / (n - sink).

    LagKV, arXiv 2504.04704. kvpress 0.5.5 computes the same but for four cases:

    - It gives 1 where this gives +inf.
    - It leaves the order of equal tokens to argsort.
    - A channel that is constant over the next chunk divides by zero there and makes the chunk NaN. Here a range below
      2^-126, the smallest normal fp32 number, contributes z = 0.
    - A standard deviation that is not finite makes the chunk NaN there. Here its token is left out of the softmax and
      ranks below the others.
    """
    batch, _, tokens, _ = k.shape
    scores = k.new_full(k.shape[:3], float("-inf"), dtype=accumulation_dtype(k))
    ends = [(0, tokens)] * batch if bounds is None else bounds.clamp(0, tokens).tolist()
    for b, (start, stop) in enumerate(ends):
        if start < stop:
            scores[b, :, start:stop] = _lag_sequence(k[b, :, start:stop], v[b, :, start:stop], lag_size, sink)
    return scores


def _lag_sequence(k: Tensor, v: Tensor, lag_size: int, sink: int) -> Tensor:
    """`lag_scores` of one sequence without padding, `[G, n, D]` twice `-> [G, n]`."""
    heads, length, _ = k.shape
    compute = accumulation_dtype(k)
    scores = k.new_full((heads, length), float("inf"), dtype=compute)
    rest = length - sink
    if rest < 2 * lag_size:
        if rest > 0:
            scores[:, sink:] = torch.arange(rest, device=k.device, dtype=compute) / rest
        return scores
    full = rest // lag_size
    k, v = (x[:, sink : sink + full * lag_size].to(compute).unflatten(1, (full, lag_size)) for x in (k, v))
    info = (_relative_information(k) + _relative_information(v)) / 2  # [G, full - 1, lag_size]
    order = info.nan_to_num(nan=-1.0).argsort(dim=-1, descending=True, stable=True)
    rank = lag_size - 1 - order.argsort(dim=-1)
    scores[:, sink : sink + (full - 1) * lag_size] = (rank.to(compute) / lag_size).flatten(1)
    return scores


def _relative_information(x: Tensor) -> Tensor:
    """Softmax over a chunk of the spread relative to the next, `[G, full, lag_size, D] -> [G, full - 1, lag_size]`."""
    own, reference = x[:, :-1], x[:, 1:]
    low, high = reference.amin(2, keepdim=True), reference.amax(2, keepdim=True)  # [G, full - 1, 1, D]
    flat = high - low < _TINY
    z = ((own - low) / (high - low).masked_fill(flat, 1.0)).masked_fill(flat, 0.0)
    std = z.var(dim=-1, correction=1 if x.shape[-1] > 1 else 0).sqrt()
    left_out = ~std.isfinite()
    return std.masked_fill(left_out, float("-inf")).softmax(-1).masked_fill(left_out, float("nan"))
