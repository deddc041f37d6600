"""The calls that `aot.py` compiles: every kernel at the shapes of Mistral-7B, in bf16, on meta tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from condense_core.kernels import (
    attention_pool,
    attention_pool_backward,
    cross_pool,
    cross_pool_backward,
    expected_attention,
    key_norm,
    key_similarity,
    lag_scores,
    non_causal_chunks,
    query_moments,
    ragged_decode_attention,
    value_projection_norm,
    window_scores,
)

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 32, 8, 128, 4096
TOKENS = 1_750  # of a context of 7,000 characters


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _pool(ratio: int, *, halo: int = 0, per_window: bool = False, sequences: int = 1, backward: bool = False) -> None:
    cu_seqlens = None
    rows = -(-TOKENS // ratio)
    if sequences > 1:
        cu_seqlens = TOKENS * torch.arange(sequences + 1)
        cu_seqlens[1] -= ratio  # sequences of one length would need no offsets
        rows *= sequences
    x = meta(sequences * TOKENS, WIDTH)
    q = meta(*[rows] * per_window, HEADS, HEAD_DIM)
    arguments = (ratio, cu_seqlens, halo, HEAD_DIM**-0.5, meta(WIDTH), meta(HEADS, ratio + 2 * halo), 1e-6)
    if backward:
        out, lse = meta(rows, WIDTH), meta(rows, HEADS, dtype=torch.float32)
        attention_pool_backward.backward(meta(rows, WIDTH), x, q, out, lse, *arguments)
    else:
        attention_pool.forward(x, q, *arguments)


def _ragged_decode(kept: int, *, batch: int = 1, room: bool = True) -> None:
    heads = batch * KV_HEADS
    offsets = meta(heads + 1, dtype=torch.int64)
    lengths = meta(heads, dtype=torch.int32) if room else None
    k, v = (meta(heads * kept, HEAD_DIM) for _ in range(2))
    ragged_decode_attention.forward(meta(batch, HEADS, HEAD_DIM), k, v, offsets, lengths, HEAD_DIM**-0.5)


def _cross(queries: int, tokens: int = TOKENS, *, sequences: int = 1, backward: bool = False) -> None:
    ends = [n * torch.arange(sequences + 1) if sequences > 1 else None for n in (tokens, queries)]
    x, q = meta(sequences * tokens, WIDTH), meta(sequences * queries, HEADS, HEAD_DIM)
    arguments = (*ends, HEAD_DIM**-0.5, meta(WIDTH), 1e-6)
    if backward:
        out, lse = meta(len(q), WIDTH), meta(len(q), HEADS, dtype=torch.float32)
        cross_pool_backward.backward(meta(len(q), WIDTH), x, q, out, lse, *arguments)
    else:
        cross_pool.forward(x, q, *arguments)


def _cache(tokens: int) -> Tensor:
    """Keys or values of one layer."""
    return meta(1, KV_HEADS, tokens, HEAD_DIM)


def _bounds() -> Tensor:
    return meta(1, 2, dtype=torch.int64)


def _queries(tokens: int) -> Tensor:
    """Queries of one layer."""
    return meta(1, HEADS, tokens, HEAD_DIM)


def _window(tokens: int) -> None:
    window_scores.forward(_queries(64), _cache(tokens), HEAD_DIM**-0.5, 5, _bounds())


def _chunks(tokens: int, chunk_size: int) -> None:
    non_causal_chunks.forward(_queries(tokens), _cache(tokens), chunk_size, HEAD_DIM**-0.5, _bounds())


def _moments(tokens: int) -> None:
    rotation = meta(1, tokens, HEAD_DIM)
    query_moments.forward(_queries(tokens), rotation, rotation, 4, _bounds())


def _expected(tokens: int) -> None:
    mu = meta(1, HEADS, HEAD_DIM, dtype=torch.float32)
    cov = meta(1, HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float32)
    rotation = meta(HEAD_DIM, dtype=torch.float32)
    cache = _cache(tokens)
    expected_attention.forward(cache, cache, mu, cov, rotation, rotation, HEAD_DIM**-0.5, 0.0, 4, _bounds())


CASES: dict[str, Callable[[], Any]] = {
    "attention_pool/4x": partial(_pool, 4),
    "attention_pool/32x": partial(_pool, 32),
    "attention_pool/packed": partial(_pool, 4, halo=2, per_window=True, sequences=16),
    "attention_pool/backward": partial(_pool, 4, backward=True),
    "attention_pool/backward-halo": partial(_pool, 4, halo=2, per_window=True, sequences=16, backward=True),
    "cross_pool/438": partial(_cross, 438),
    "cross_pool/packed": partial(_cross, 438, sequences=4),
    "cross_pool/split": partial(_cross, 32, 32_768),
    "cross_pool/backward": partial(_cross, 438, backward=True),
    "cross_pool/backward-packed": partial(_cross, 438, sequences=4, backward=True),
    "ragged_decode/4096": partial(_ragged_decode, 4096),
    "ragged_decode/batch": partial(_ragged_decode, 4096, batch=128, room=False),
    "key_norm/2k": lambda: key_norm.forward(_cache(2_048), 4, 32, _bounds()),
    "key_similarity/2k": lambda: key_similarity.forward(_cache(2_048), 4, 32, _bounds()),
    "key_similarity/32k": lambda: key_similarity.forward(_cache(32_768), 4, 32, None),
    "lag_scores/2k": lambda: lag_scores.forward(_cache(2_048), _cache(2_048), 128, 4, _bounds()),
    "value_projection_norm/2k": lambda: value_projection_norm.forward(_cache(2_048), meta(WIDTH, WIDTH), _bounds()),
    "value_projection_norm/32k": lambda: value_projection_norm.forward(_cache(32_768), meta(WIDTH, WIDTH), None),
    "query_moments/2k": partial(_moments, 2_048),
    "query_moments/32k": partial(_moments, 32_768),
    "expected_attention/2k": partial(_expected, 2_048),
    "expected_attention/32k": partial(_expected, 32_768),
    "window_scores/2k": partial(_window, 2_048),
    "window_scores/32k": partial(_window, 32_768),
    "non_causal_chunks/2k": partial(_chunks, 2_048, 256),
    "non_causal_chunks/long": partial(_chunks, 32_768, 4_096),
}

WARPGROUP: frozenset[str] = frozenset(
    {
        "_projection_kernel",
        "_cross_queries_kernel",
        "_cross_tokens_kernel",
        "_window_logsumexp_kernel",
        "_window_scores_kernel",
        "_chunk_scores_kernel",
        "_chunk_logsumexp_kernel",
        "_chunk_columns_kernel",
        "_moments_partial_kernel",
        "_expected_logits_kernel",
    }
)
"""Kernels whose products are meant for Hopper's warpgroup instructions."""

NARROW: dict[str, str] = {
    "_expected_logits_kernel": "mu, a row per head, is read as the products lie in the registers",
    "_expected_scores_kernel": "the inner loop reads two numbers per 128 keys; keys' values are read outside of it",
}
"""Kernels that may load less than 16 bytes at a time in their inner loops, and why."""
