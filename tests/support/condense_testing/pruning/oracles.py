"""What every scoring method must give: one sequence without padding, in float64, from the formulas of the papers.

Nothing here calls condense_core's ops. Query heads h read KV head h // (H/G).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INF = math.inf


@dataclass
class OneSequence:
    """One sequence of a case, without padding; all float64 but positions.

    q ``[H, Q, D]`` of the last Q of N tokens; k, v ``[G, N, D]``; cos, sin ``[Q, D]``; hidden ``[Q, d_model]``;
    positions ``[G, N]``; previous ``[G, N-Q]`` or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    hidden: Tensor
    positions: Tensor
    previous: Tensor | None
    scale: float
    inv_freq: Tensor
    factor: float
    layer_idx: int
    budget: int

    @property
    def past(self) -> int:
        return self.k.shape[1] - self.q.shape[1]

    @property
    def group(self) -> int:
        return self.q.shape[0] // self.k.shape[0]


def softmax(logits: Tensor) -> Tensor:
    weights = (logits - logits.max()).exp()
    return weights / weights.sum()


def causal_attention(s: OneSequence, h: int, t: int) -> Tensor:
    """What query row t of head h gives each of the N tokens."""
    own = s.past + t
    keys = s.k[h // s.group]
    weights = torch.zeros(keys.shape[0], dtype=torch.float64)
    weights[: own + 1] = softmax(s.scale * keys[: own + 1] @ s.q[h, t])
    return weights


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [n, D]`` before RoPE: each pair of channels solves its own two equations."""
    half = x.shape[-1] // 2
    c, t = cos[:, :half], sin[:, :half]
    turn = torch.stack([torch.stack([c, -t], -1), torch.stack([t, c], -1)], -2)  # [n, D/2, 2, 2]
    pairs = torch.stack([x[:, :half], x[:, half:]], -1)
    solved = torch.linalg.solve(turn, pairs)
    return torch.cat([solved[..., 0], solved[..., 1]], -1)


def force(scores: Tensor, sink: int = 0, window: int = 0) -> Tensor:
    scores = scores.clone()
    scores[:, :sink] = INF
    scores[:, max(scores.shape[1] - window, 0) :] = INF
    return scores


def zscore(scores: Tensor) -> Tensor:
    """Over heads and tokens, with the unbiased variance."""
    if scores.numel() < 2:
        return torch.zeros_like(scores)
    return (scores - scores.mean()) / max(float(scores.std()), 1e-6)


def random(s: OneSequence, m: Any) -> Tensor:
    def mixed(word: int) -> int:
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            word = (word ^ word >> shift) * factor % 2**32
        return word ^ word >> 15

    layer = (mixed(mixed(m.seed % 2**32) ^ m.seed // 2**32 % 2**32) + s.layer_idx) % 2**32
    scores = torch.empty(s.k.shape[:2], dtype=torch.float64)
    for g in range(s.k.shape[0]):
        head = mixed((g + mixed(layer)) % 2**32)
        for i, position in enumerate(s.positions[g].tolist()):
            scores[g, i] = mixed((position + head) % 2**32) // 256 / 2**24
    return scores


def streaming_llm(s: OneSequence, m: Any) -> Tensor:
    order = torch.arange(s.k.shape[1], dtype=torch.float64)
    return force(order.repeat(s.k.shape[0], 1), sink=m.sink)


def knorm(s: OneSequence, m: Any) -> Tensor:
    return -s.k.square().sum(-1).sqrt()


def keydiff(s: OneSequence, m: Any) -> Tensor:
    unit = s.k / s.k.norm(dim=-1, keepdim=True)
    anchor = unit.mean(1, keepdim=True)
    return -(unit * anchor).sum(-1) / anchor.norm(dim=-1)


def qfilter(s: OneSequence, m: Any) -> Tensor:
    filters = m.filters[s.layer_idx].double()
    return torch.stack([-(s.k[g] @ filters[g]) for g in range(s.k.shape[0])])


def lagkv(s: OneSequence, m: Any) -> Tensor:
    heads, tokens = s.k.shape[:2]
    scores = torch.full((heads, tokens), INF, dtype=torch.float64)
    rest = tokens - m.sink
    if tokens < m.sink + 2 * m.lag:
        if rest > 0:
            scores[:, m.sink :] = torch.arange(rest, dtype=torch.float64) / rest
        return scores
    for c in range(rest // m.lag - 1):
        here = slice(m.sink + c * m.lag, m.sink + (c + 1) * m.lag)
        later = slice(here.stop, here.stop + m.lag)
        for g in range(heads):
            worth = torch.zeros(m.lag, dtype=torch.float64)
            for x in (s.k[g], s.v[g]):
                low, high = x[later].amin(0), x[later].amax(0)
                worth += softmax(((x[here] - low) / (high - low)).std(-1)) / 2
            scores[g, here] = worth.argsort().argsort().double() / m.lag
    return scores


def window_attention(s: OneSequence, window: int, weigh: bool = False) -> Tensor:
    """``[H, N]``: mean over the last queries, at most ``window``; ``weigh`` by the number of tokens before each."""
    rows = range(max(s.q.shape[1] - window, 0), s.q.shape[1])
    total = torch.zeros(s.q.shape[0], s.k.shape[1], dtype=torch.float64)
    for h in range(s.q.shape[0]):
        for t in rows:
            total[h] += causal_attention(s, h, t) * (s.past + t if weigh else 1)
    return total / len(rows)


def group_mean(s: OneSequence, per_head: Tensor) -> Tensor:
    return torch.stack([per_head[g * s.group : (g + 1) * s.group].mean(0) for g in range(s.k.shape[0])])


def snapkv(s: OneSequence, m: Any) -> Tensor:
    received = window_attention(s, m.window)
    tokens = received.shape[1]
    received[:, max(tokens - min(m.window, s.q.shape[1]), 0) :] = 0
    reach = m.kernel_size // 2
    pooled = torch.stack(
        [received[:, max(i - reach, 0) : i + reach + 1].sum(1) / m.kernel_size for i in range(tokens)], 1
    )
    return force(group_mean(s, pooled), window=m.window)


def tova(s: OneSequence, m: Any) -> Tensor:
    last = window_attention(s, 1).mean(0)
    return force(last.repeat(s.k.shape[0], 1), window=1)


def finch(s: OneSequence, m: Any) -> Tensor:
    return force(group_mean(s, window_attention(s, m.window, weigh=m.normalize_scores)), window=m.window)


def peak_attention(s: OneSequence, m: Any) -> Tensor:
    peaks = torch.zeros(s.k.shape[:2], dtype=torch.float64)
    for h in range(s.q.shape[0]):
        for t in range(max(s.q.shape[1] - m.window, 0), s.q.shape[1]):
            peaks[h // s.group] = torch.maximum(peaks[h // s.group], causal_attention(s, h, t))
    return force(peaks, window=m.window)


def kvzap(s: OneSequence, m: Any) -> Tensor:
    fresh = torch.empty(s.k.shape[0], s.q.shape[1], dtype=torch.float64)
    for g, weights in enumerate(m.surrogate[s.layer_idx].double()):
        for t, x in enumerate(s.hidden):
            fresh[g, t] = math.exp(weights[:-1] @ x / x.square().mean().sqrt() + weights[-1])
    scores = fresh if s.previous is None else torch.cat([s.previous, fresh], 1)
    return force(scores, sink=m.sink)


def surprise(s: OneSequence, m: Any) -> Tensor:
    """Of a layer alone; what counts is known behind the last one."""
    return force(torch.zeros(s.k.shape[:2], dtype=torch.float64), sink=m.sink)


def observed_attention(s: OneSequence, m: Any) -> Tensor:
    received = torch.zeros(s.q.shape[0], s.k.shape[1], dtype=torch.float64)
    for h in range(s.q.shape[0]):
        for t in range(s.q.shape[1]):
            received[h] += causal_attention(s, h, t)
    received = group_mean(s, received)
    scores = torch.empty_like(received)
    for g in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            total, seen = received[g, i], s.q.shape[1] if i < s.past else s.k.shape[1] - i
            if i < s.past and s.previous is not None:
                # Every token of the sequence between it and the present queries had seen it.
                before = max(int(s.positions[g, s.past] - s.positions[g, i]), 1) if s.q.shape[1] else 1
                total, seen = total + s.previous[g, i] * before, seen + before
            scores[g, i] = total / max(seen, 1)
    return scores


def expected_attention(s: OneSequence, m: Any) -> Tensor:
    heads, tokens, width = s.k.shape
    later = int(s.positions[0, -1]) + 1 + torch.arange(m.future, dtype=torch.float64)
    angles = later[:, None] * s.inv_freq
    cos, sin = angles.cos().mean(0) * s.factor, angles.sin().mean(0) * s.factor
    rotation = torch.zeros(width, width, dtype=torch.float64)
    for c in range(width // 2):
        rotation[c, c] = rotation[c + width // 2, c + width // 2] = cos[c]
        rotation[c, c + width // 2], rotation[c + width // 2, c] = -sin[c], sin[c]
    first = max(m.sink - s.past, 0)
    scores = torch.full((heads, tokens), INF, dtype=torch.float64)
    for g in range(heads):
        expected = torch.zeros(tokens - m.sink, dtype=torch.float64)
        for h in range(g * s.group, (g + 1) * s.group):
            p = unrotated(s.q[h], s.cos, s.sin)[first:]
            mu = p.mean(0) if len(p) else torch.zeros(width, dtype=torch.float64)
            cov = (p - mu).T @ (p - mu) / max(len(p), 1)
            keys = s.k[g, m.sink :] @ rotation
            logits = s.scale * keys @ mu
            if m.use_covariance:
                logits = logits + s.scale**2 / 2 * (keys @ cov * keys).sum(-1)
            expected += softmax(logits) / s.group
        if m.use_vnorm:
            expected = (expected + m.epsilon) * s.v[g, m.sink :].norm(dim=-1)
        scores[g, m.sink :] = expected
    return scores


def leverage_part(s: OneSequence, rows: slice, phi: Tensor) -> Tensor:
    scores = []
    for g in range(s.k.shape[0]):
        keys = unrotated(s.k[g, s.past :], s.cos, s.sin)[rows]
        x = (keys - keys.mean(0)) @ phi[g].double()
        inverse = torch.linalg.inv(x.T @ x + 0.01 * torch.eye(x.shape[1], dtype=torch.float64))
        scores.append((x @ inverse * x).sum(-1))
    return zscore(torch.stack(scores))


def non_causal_part(s: OneSequence, rows: slice, chunk: int, scale: float) -> Tensor:
    keys, values, queries = s.k[:, s.past :][:, rows], s.v[:, s.past :][:, rows], s.q[:, rows]
    tokens = keys.shape[1]
    received = torch.zeros(queries.shape[0], tokens, dtype=torch.float64)
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        for h in range(queries.shape[0]):
            for query in queries[h, part]:
                received[h, part] += softmax(scale * keys[h // s.group, part] @ query)
    worth = group_mean(s, received) * values.norm(dim=-1)
    pooled = torch.stack([worth[:, max(i - 1, 0) : i + 2].sum(1) / 3 for i in range(tokens)], 1)
    return zscore(pooled)


def with_previous(s: OneSequence, fresh: Tensor) -> Tensor:
    return fresh if s.previous is None else torch.cat([s.previous, fresh], 1)


def sketch_of(s: OneSequence, m: Any) -> Tensor:
    generator = torch.Generator().manual_seed((m.seed * 2654435761 + s.layer_idx) % 2**63)
    return torch.randn(s.k.shape[0], s.k.shape[2], m.sketch, generator=generator) / math.sqrt(m.sketch)


def leverage(s: OneSequence, m: Any) -> Tensor:
    return with_previous(s, leverage_part(s, slice(None), sketch_of(s, m)))


def non_causal(s: OneSequence, m: Any) -> Tensor:
    return with_previous(s, non_causal_part(s, slice(None), m.chunk, m.scale))


def compactor(s: OneSequence, m: Any) -> Tensor:
    queries = s.q.shape[1]
    first = min(max(m.sink - s.past, 0), queries)
    rows = slice(first, max(queries - m.window, first))
    fresh = torch.zeros(s.k.shape[0], queries, dtype=torch.float64)
    if rows.start < rows.stop:
        blending = m.blending
        if blending is None:
            blending = 1 - (m.keep if m.keep is not None else s.budget / s.k.shape[1])
        geometry = leverage_part(s, rows, sketch_of(s, m))
        fresh[:, rows] = blending * geometry + non_causal_part(s, rows, m.chunk, m.scale)
    scores = with_previous(s, fresh)
    scores[scores == INF] = 0
    return force(scores, sink=m.sink, window=m.window)


def kvzip(s: OneSequence, m: Any, start: int, stop: int) -> Tensor:
    """Of the N tokens the last Q are those of a scoring pass; those from ``start`` to ``stop`` are what it repeats."""
    scores = torch.zeros(s.k.shape[:2], dtype=torch.float64)
    for h in range(s.q.shape[0]):
        for t in range(s.q.shape[1]):
            weights = causal_attention(s, h, t)[start:stop]
            scores[h // s.group, start:stop] = scores[h // s.group, start:stop].maximum(weights)
    return force(scores, sink=m.sink)
