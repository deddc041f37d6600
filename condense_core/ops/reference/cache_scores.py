"""Scores of cached tokens that need no queries, from keys and values alone. A higher score is more worth keeping.

Shapes: B sequences, G key-value heads, N cached tokens, D head_dim, H query heads, d_model the width of the model.
    `bounds`
says which tokens of a padded batch are real: start <= i < stop of each sequence, clamped to [0, N]; None: all. Padding
scores -inf, tokens that must be kept +inf.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from condense_core.ops.reference.padding import accumulation_dtype, real_tokens

_TINY = torch.finfo(torch.float32).tiny


def key_norm(
    k: Tensor,  # [B, G, N, D]
    sink: int = 0,
    window: int = 0,
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """`-||k_i||_2`, `[B, G, N]` fp32: keys of small norm draw attention (arXiv 2406.11430).

    The first `sink` and the last `window` real tokens of a sequence score +inf.
    """
    scores = -k.to(accumulation_dtype(k)).norm(dim=-1)
    return _force(scores, sink, window, bounds)


def key_similarity(
    k: Tensor,  # [B, G, N, D]
    sink: int = 0,
    window: int = 0,
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """KeyDiff, `-cos(k_i, mean_j k_j / ||k_j||)` over the real tokens j of the sequence and head, `[B, G, N]` fp32.

    Keys that point elsewhere than the rest are distinctive (arXiv 2504.15364). Norms are clamped from below as torch
    clamps them: to 1e-12 in the mean, to 1e-8 in the cosine. `sink` and `window` as in `key_norm`.
    """
    place, length = _places(k, bounds)  # [B, 1, N], [B, 1, 1]
    real = (place >= 0) & (place < length)
    x = k.to(accumulation_dtype(k)).masked_fill(~real.unsqueeze(-1), 0.0)
    mean = F.normalize(x, dim=-1).sum(2, keepdim=True) / length.clamp_min(1).unsqueeze(-1)  # [B, G, 1, D]
    return _force(-F.cosine_similarity(x, mean, dim=-1), sink, window, bounds)


def lag_scores(
    k: Tensor,  # [B, G, N, D]
    v: Tensor,  # [B, G, N, D]
    lag_size: int = 128,
    sink: int = 4,
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """LagKV, `[B, G, N]` fp32: tokens that spread far beyond the range of the tokens after them (arXiv 2504.04704).

    The n real tokens of a sequence after its first `sink` ones are cut into chunks of `lag_size`. A full chunk is
    scored against the next full one, so all but the last are. With low_c and high_c the minimum and maximum of channel
    c over that next chunk:

        z_ic = (x_ic - low_c) / (high_c - low_c),   info_i = softmax over the chunk of std_c(z_ic)   (unbiased, D - 1),

    averaged over K and V and replaced by its rank in the chunk / lag_size: 0 for the lowest, (lag_size - 1) / lag_size
    for the highest; of equal tokens the earlier ranks higher. Everything else, the sinks and the tokens from the last
    full chunk on, scores +inf. A sequence of n < sink + 2*lag_size has nothing to compare: its token i scores (i -
    sink) / (n - sink), the sinks +inf.

    This is kvpress 0.5.5 but for four cases. kvpress gives 1 for +inf. It leaves the order of equal tokens to argsort.
    A channel that is constant over the next chunk (a range below 2^-126, the smallest normal fp32 number), divides by
    zero there and makes the chunk NaN; here it contributes z = 0. A standard deviation that is not finite makes the
    chunk NaN there; here its token is left out of the softmax and ranks below the others. (With D = 1 every deviation
    is 0.)
    """
    batch, _, tokens, _ = k.shape
    scores = k.new_full(k.shape[:3], float("-inf"), dtype=accumulation_dtype(k))
    ends = [(0, tokens)] * batch if bounds is None else bounds.clamp(0, tokens).tolist()
    for b, (start, stop) in enumerate(ends):
        if start < stop:
            scores[b, :, start:stop] = _lag_sequence(k[b, :, start:stop], v[b, :, start:stop], lag_size, sink)
    return scores


def value_projection_norm(
    v: Tensor,  # [B, G, N, D]
    w_o: Tensor,  # [d_model, H*D], the weight of the output projection
    bounds: Tensor | None = None,  # [B, 2]
) -> Tensor:
    """CriticalKV, the mean over the query heads h of a group of `||W_h v_i||_1`, `[B, G, N]` fp32 (arXiv 2502.03805).

    `W_h = w_o[:, h*D:(h+1)*D]` is what the output projection does to head h; heads g*H/G to (g+1)*H/G - 1 share values
    g.
    """
    batch, heads, tokens, head_dim = v.shape
    compute = accumulation_dtype(v)
    norms = v.new_zeros(batch, heads, tokens, dtype=compute)
    per_head = w_o.to(compute).unflatten(1, (heads, -1, head_dim))  # [d_model, G, H/G, D]
    for w in per_head.unbind(2):  # one head of every group at a time: [B, G, N, d_model] is large enough
        norms += torch.einsum("bgnd,mgd->bgnm", v.to(compute), w).abs().sum(-1)
    return _force(norms / per_head.shape[2], 0, 0, bounds)


def _places(x: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    """Places counted from the first real token of a sequence, `[B, 1, N]`, and real tokens in it, `[B, 1, 1]`."""
    start, stop = (t.unsqueeze(-1) for t in real_tokens(bounds, x.shape[0], x.shape[2], x.device))  # [B, 1, 1]
    return torch.arange(x.shape[2], device=x.device) - start, stop - start


def _force(scores: Tensor, sink: int, window: int, bounds: Tensor | None) -> Tensor:
    """+inf for the first `sink` and last `window` real tokens, -inf for padding: `[B, G, N] -> [B, G, N]`."""
    place, length = _places(scores, bounds)
    forced = (place < sink) | (place >= length - window)
    padding = (place < 0) | (place >= length)
    return scores.masked_fill(forced, float("inf")).masked_fill(padding, float("-inf"))


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
