"""The rivals that benchmarks name, each as its authors would write and tune it in PyTorch.

Shapes are those of `condense_core.ops.reference`. Scores with names of kvpress restate the formulas of kvpress 0.5.5;
`tests/pruning/test_kvpress.py` holds what that package recorded.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# --- pooling


def pool_einsum(x: Tensor, q: Tensor, weight: Tensor, *, ratio: int, eps: float) -> Tensor:
    """`attention_pool` of sequences of one length, x `[S, N, d]`, through batched products."""
    return _pool(x, q, weight, ratio, eps, einsum=True)


def pool_elementwise(x: Tensor, q: Tensor, weight: Tensor, *, ratio: int, eps: float) -> Tensor:
    """The same with products and sums, which torch.compile can fuse."""
    return _pool(x, q, weight, ratio, eps, einsum=False)


def _pool(x: Tensor, q: Tensor, weight: Tensor, ratio: int, eps: float, *, einsum: bool) -> Tensor:
    r = F.rms_norm(x, x.shape[-1:], weight, eps)
    full = x.shape[1] // ratio * ratio  # the short last window goes apart, so that the others are a view
    parts = [r[:, :full].unflatten(1, (full // ratio, ratio))]
    if full < x.shape[1]:
        parts.append(r[:, full:].unsqueeze(1))
    rows = [_attend_windows(part.unflatten(-1, q.shape), q, einsum=einsum) for part in parts]
    return torch.cat(rows, 1).flatten(0, 1)


def _attend_windows(t: Tensor, q: Tensor, *, einsum: bool) -> Tensor:
    """t `[S, K, W, H, D]` -> `[S, K, H*D]`."""
    scale = q.shape[-1] ** -0.5
    if einsum:
        p = (scale * torch.einsum("skwhd,hd->skwh", t, q)).softmax(2)
        return torch.einsum("skwh,skwhd->skhd", p, t).flatten(-2)
    p = (scale * (t * q).sum(-1, dtype=torch.float32)).softmax(2).to(t.dtype)
    return (p.unsqueeze(-1) * t).sum(2).flatten(-2)


def cross_pool_sdpa(x: Tensor, q: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """`cross_pool` of one sequence through the fused attention of PyTorch: keys and values are the normed rows."""
    r = F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, q.shape[1:]).transpose(0, 1)  # [H, N, D]
    out = F.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), r.unsqueeze(0), r.unsqueeze(0))
    return out[0].transpose(0, 1).flatten(-2)


# --- scores, as kvpress 0.5.5 computes them


def _repeat(t: Tensor, group: int) -> Tensor:
    """`[B, G, N, D]` -> `[B, G * group, N, D]`, copied as kvpress does."""
    return t.repeat_interleave(group, 1)


def _group_mean(scores: Tensor, kv_heads: int) -> Tensor:
    return scores.unflatten(1, (kv_heads, -1)).mean(2)


def snapkv(q_win: Tensor, k: Tensor, *, kernel_size: int = 5) -> Tensor:
    """Window attention, its mean over the window, average pooling, mean over the group."""
    window, n = q_win.shape[2], k.shape[2]
    logits = q_win @ _repeat(k, q_win.shape[1] // k.shape[1]).transpose(2, 3) / math.sqrt(k.shape[3])
    logits += torch.full_like(logits, float("-inf")).triu(n - window + 1)
    p = logits.softmax(-1, dtype=torch.float32).to(k.dtype)[..., :-window].mean(2)
    p = F.avg_pool1d(p, kernel_size, stride=1, padding=kernel_size // 2)
    scores = _group_mean(p, k.shape[1])
    return F.pad(scores, (0, window), value=scores.max().item() + 1)


def knorm(k: Tensor) -> Tensor:
    """Minus the norm of each key."""
    return -k.norm(dim=-1)


def keydiff(k: Tensor) -> Tensor:
    """Minus the cosine to the mean of the normalised keys."""
    anchor = F.normalize(k, p=2, dim=-1).mean(2, keepdim=True)
    return -F.cosine_similarity(k, anchor, dim=-1)


def lagkv(k: Tensor, v: Tensor, *, sink: int = 4, lag: int = 128) -> Tensor:
    """Ranks inside each chunk of the standard deviation relative to the next chunk's range."""
    n = k.shape[2]
    end = sink + (n - sink) // lag * lag

    def deviation(t: Tensor) -> Tensor:
        chunks = t[:, :, sink:end].unflatten(2, (-1, lag))
        low, high = (f(chunks[:, :, 1:], 3, keepdim=True) for f in (torch.amin, torch.amax))
        return ((chunks[:, :, :-1] - low) / (high - low)).std(-1).softmax(-1)

    ranks = ((deviation(k) + deviation(v)) / 2).argsort(-1).argsort(-1) / lag
    return F.pad(F.pad(ranks.flatten(2), (sink, 0), value=1.0), (0, lag + n - end), value=1.0)


def query_statistics(q: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the queries before RoPE, `[B, H, N, D]`; what computes them is left out."""
    mu = q.mean(2, keepdim=True)
    centred = q - mu
    return mu.squeeze(2), torch.einsum("bnsi,bnsj->bnij", centred, centred) / q.shape[2]


def mean_rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """The matrix of the mean rotary embedding over positions, cos and sin `[P, D]`."""
    eye = torch.eye(cos.shape[1], dtype=cos.dtype)
    half = torch.cat([-eye[cos.shape[1] // 2 :], eye[: cos.shape[1] // 2]])
    return (cos.unsqueeze(1) * eye + sin.unsqueeze(1) * half).mean(0)


def expected_attention(k: Tensor, v: Tensor, mu: Tensor, cov: Tensor, *, sink: int = 4) -> Tensor:
    """Expected attention under Gaussian queries, times the norm of the values."""
    n, d = k.shape[2] - sink, k.shape[3]
    keys = _repeat(k[:, :, sink:], mu.shape[1] // k.shape[1]).transpose(2, 3)
    scores = (mu.unsqueeze(2) @ keys).squeeze(2) / math.sqrt(d)
    scores += torch.einsum("bhin, bhij, bhjn->bhn", keys, cov, keys) / d / 2
    scores = _group_mean(scores.softmax(-1), k.shape[1]) * v[:, :, -n:].norm(dim=-1)
    return F.pad(scores, (sink, 0), value=scores.max().item() + 1)


def non_causal(q: Tensor, k: Tensor, *, chunk: int = 256) -> Tensor:
    """Sums over the queries of a chunk of their attention inside it, for lengths that the chunk divides."""
    keys = _repeat(k, q.shape[1] // k.shape[1]).unflatten(2, (-1, chunk))
    p = (q.unflatten(2, (-1, chunk)) @ keys.transpose(-2, -1) / math.sqrt(k.shape[3])).to(torch.float32).softmax(-1)
    return _group_mean(p.sum(-2).flatten(2), k.shape[1])


def value_projection(v: Tensor, w_o: Tensor, *, heads: int) -> Tensor:
    """`||v W_h||_1` head by head, one `[N, d_model]` product at a time."""
    values = _repeat(v, heads // v.shape[1])
    weights = w_o.t().unflatten(0, (heads, v.shape[3]))
    norms = [torch.norm(values[:, h] @ weights[h], p=1, dim=-1) for h in range(heads)]
    return _group_mean(torch.stack(norms, 1), v.shape[1])


def keep(k: Tensor, v: Tensor, scores: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The rows of the highest scores, in the order of the scores."""
    indices = scores.topk(budget, dim=-1).indices.unsqueeze(-1).expand(-1, -1, -1, k.shape[3])
    return k.gather(2, indices).contiguous(), v.gather(2, indices).contiguous()


# --- decoding


def sdpa_decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One decode step over a cache whose heads are all as long: q `[B, H, D]`, k and v `[B, G, N, D]`."""
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)
