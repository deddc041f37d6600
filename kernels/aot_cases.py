"""The calls that aot.py compiles: every kernel at the shapes of Mistral-7B, in bf16, on meta tensors.

A case is named OP/NAME. `WARPGROUP` and `NARROW` say what is expected of a kernel beyond the common budget.
"""

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
from condense_core.ops.arguments import (
    AttentionPoolArgs,
    AttentionPoolBackwardArgs,
    CrossPoolArgs,
    CrossPoolBackwardArgs,
    ExpectedAttentionArgs,
    KeyNormArgs,
    KeySimilarityArgs,
    LagScoresArgs,
    NonCausalChunksArgs,
    QueryMomentsArgs,
    RaggedDecodeAttentionArgs,
    ValueProjectionNormArgs,
    WindowScoresArgs,
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
    arguments = AttentionPoolArgs(
        x=meta(sequences * TOKENS, WIDTH),
        q=meta(*[rows] * per_window, HEADS, HEAD_DIM),
        ratio=ratio,
        cu_seqlens=cu_seqlens,
        halo=halo,
        scale=HEAD_DIM**-0.5,
        norm_weight=meta(WIDTH),
        window_bias=meta(HEADS, ratio + 2 * halo),
        eps=1e-6,
    )
    if backward:
        attention_pool_backward.backward(AttentionPoolBackwardArgs(**_results(rows), **arguments._asdict()))
    else:
        attention_pool.forward(arguments)


def _cross(queries: int, tokens: int = TOKENS, *, sequences: int = 1, backward: bool = False) -> None:
    arguments = CrossPoolArgs(
        x=meta(sequences * tokens, WIDTH),
        q=meta(sequences * queries, HEADS, HEAD_DIM),
        cu_seqlens=tokens * torch.arange(sequences + 1) if sequences > 1 else None,
        cu_queries=queries * torch.arange(sequences + 1) if sequences > 1 else None,
        scale=HEAD_DIM**-0.5,
        norm_weight=meta(WIDTH),
        eps=1e-6,
    )
    if backward:
        rows = sequences * queries
        cross_pool_backward.backward(CrossPoolBackwardArgs(**_results(rows), **arguments._asdict()))
    else:
        cross_pool.forward(arguments)


def _results(rows: int) -> dict[str, Any]:
    """What a backward pass gets besides the arguments of the forward one."""
    return {"grad": meta(rows, WIDTH), "out": meta(rows, WIDTH), "lse": meta(rows, HEADS, dtype=torch.float32)}


def _queries(tokens: int) -> Tensor:
    """Queries of one layer."""
    return meta(1, HEADS, tokens, HEAD_DIM)


def _cache(tokens: int) -> Tensor:
    """Keys or values of one layer."""
    return meta(1, KV_HEADS, tokens, HEAD_DIM)


def _bounds() -> Tensor:
    return meta(1, 2, dtype=torch.int64)


def _window(tokens: int) -> None:
    window_scores.forward(
        WindowScoresArgs(q_win=_queries(64), k=_cache(tokens), scale=HEAD_DIM**-0.5, kernel_size=5, bounds=_bounds())
    )


def _chunks(tokens: int, chunk_size: int) -> None:
    non_causal_chunks.forward(
        NonCausalChunksArgs(
            q=_queries(tokens), k=_cache(tokens), chunk_size=chunk_size, scale=HEAD_DIM**-0.5, bounds=_bounds()
        )
    )


def _moments(tokens: int) -> None:
    rotation = meta(1, tokens, HEAD_DIM)
    query_moments.forward(QueryMomentsArgs(q=_queries(tokens), cos=rotation, sin=rotation, sink=4, bounds=_bounds()))


def _expected(tokens: int) -> None:
    rotation = meta(HEAD_DIM, dtype=torch.float32)
    expected_attention.forward(
        ExpectedAttentionArgs(
            k=_cache(tokens),
            v=_cache(tokens),
            mu=meta(1, HEADS, HEAD_DIM, dtype=torch.float32),
            cov=meta(1, HEADS, HEAD_DIM, HEAD_DIM, dtype=torch.float32),
            mean_cos=rotation,
            mean_sin=rotation,
            scale=HEAD_DIM**-0.5,
            epsilon=0.0,
            sink=4,
            bounds=_bounds(),
        )
    )


def _key_norm(tokens: int) -> None:
    key_norm.forward(KeyNormArgs(k=_cache(tokens), sink=4, window=32, bounds=_bounds()))


def _key_similarity(tokens: int, bounds: Tensor | None) -> None:
    key_similarity.forward(KeySimilarityArgs(k=_cache(tokens), sink=4, window=32, bounds=bounds))


def _lag(tokens: int) -> None:
    lag_scores.forward(LagScoresArgs(k=_cache(tokens), v=_cache(tokens), lag_size=128, sink=4, bounds=_bounds()))


def _projection(tokens: int, bounds: Tensor | None) -> None:
    value_projection_norm.forward(ValueProjectionNormArgs(v=_cache(tokens), w_o=meta(WIDTH, WIDTH), bounds=bounds))


def _ragged_decode(kept: int, *, batch: int = 1, room: bool = True) -> None:
    heads = batch * KV_HEADS
    ragged_decode_attention.forward(
        RaggedDecodeAttentionArgs(
            q=meta(batch, HEADS, HEAD_DIM),
            k=meta(heads * kept, HEAD_DIM),
            v=meta(heads * kept, HEAD_DIM),
            cu_seqlens=meta(heads + 1, dtype=torch.int64),
            lengths=meta(heads, dtype=torch.int32) if room else None,
            scale=HEAD_DIM**-0.5,
        )
    )


CASES: dict[str, Callable[[], Any]] = {
    "attention_pool/4x": partial(_pool, 4),
    "attention_pool/32x": partial(_pool, 32),
    "attention_pool/packed": partial(_pool, 4, halo=2, per_window=True, sequences=16),
    "attention_pool_backward/4x": partial(_pool, 4, backward=True),
    "attention_pool_backward/halo": partial(_pool, 4, halo=2, per_window=True, sequences=16, backward=True),
    "cross_pool/438": partial(_cross, 438),
    "cross_pool/packed": partial(_cross, 438, sequences=4),
    "cross_pool/split": partial(_cross, 32, 32_768),
    "cross_pool_backward/438": partial(_cross, 438, backward=True),
    "cross_pool_backward/packed": partial(_cross, 438, sequences=4, backward=True),
    "window_scores/2k": partial(_window, 2_048),
    "window_scores/32k": partial(_window, 32_768),
    "non_causal_chunks/2k": partial(_chunks, 2_048, 256),
    "non_causal_chunks/long": partial(_chunks, 32_768, 4_096),
    "query_moments/2k": partial(_moments, 2_048),
    "query_moments/32k": partial(_moments, 32_768),
    "expected_attention/2k": partial(_expected, 2_048),
    "expected_attention/32k": partial(_expected, 32_768),
    "key_norm/2k": partial(_key_norm, 2_048),
    "key_similarity/2k": partial(_key_similarity, 2_048, _bounds()),
    "key_similarity/32k": partial(_key_similarity, 32_768, None),
    "lag_scores/2k": partial(_lag, 2_048),
    "value_projection_norm/2k": partial(_projection, 2_048, _bounds()),
    "value_projection_norm/32k": partial(_projection, 32_768, None),
    "ragged_decode_attention/4096": partial(_ragged_decode, 4096),
    "ragged_decode_attention/batch": partial(_ragged_decode, 4096, batch=128, room=False),
}
"""Every case by name, the first one of an op the most usual."""

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
