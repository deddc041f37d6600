"""The arguments of every op as they reach its backends: one named record for each, checked and complete.

The public functions of `condense_core.ops` fill in defaults and check; the torch op behind them has a record's fields
as its schema (`library.define`); behind that the record is built once, and backends read its fields by name.

Symbols in the comments: B sequences, H query heads, G key-value heads with H a multiple of G, N tokens of a cache,
D head_dim; T tokens or rows of a pack of S sequences, K rows of a result, d the width of the model. Float tensors are
float32, bfloat16 or float16 unless a dtype stands there, integer tensors int32 or int64. A tensor is on the device of
the first one unless said otherwise; strides are any.
"""

from typing import NamedTuple

from torch import Tensor


class AttentionPoolArgs(NamedTuple):
    """Of `attention_pool`."""

    x: Tensor  # [T, d]
    q: Tensor  # [H, d/H], the same for every window, or [K, H, d/H]
    ratio: int
    cu_seqlens: Tensor | None  # [S+1] int64 on the CPU; None: one sequence
    halo: int
    scale: float
    norm_weight: Tensor | None  # [d]; None: ones
    window_bias: Tensor | None  # [H, ratio + 2*halo]; None: zeros
    eps: float


class AttentionPoolBackwardArgs(NamedTuple):
    """Of `attention_pool_backward`: the gradient of the result, then arguments and results of `attention_pool`."""

    grad: Tensor  # [K, d]
    x: Tensor  # [T, d]
    q: Tensor  # [H, d/H] or [K, H, d/H]
    out: Tensor  # [K, d]
    lse: Tensor  # [K, H] float32
    ratio: int
    cu_seqlens: Tensor | None  # [S+1] int64 on the CPU; None: one sequence
    halo: int
    scale: float
    norm_weight: Tensor | None  # [d]; None: ones
    window_bias: Tensor | None  # [H, ratio + 2*halo]; None: zeros
    eps: float


class CrossPoolArgs(NamedTuple):
    """Of `cross_pool`."""

    x: Tensor  # [T, d]
    q: Tensor  # [K, H, d/H]
    cu_seqlens: Tensor | None  # [S+1] int64 on the CPU; None: one sequence
    cu_queries: Tensor | None  # [S+1] int64 on the CPU; None: all queries are of the only sequence
    scale: float
    norm_weight: Tensor | None  # [d]; None: ones
    eps: float


class CrossPoolBackwardArgs(NamedTuple):
    """Of `cross_pool_backward`: the gradient of the result, then arguments and results of `cross_pool`."""

    grad: Tensor  # [K, d]
    x: Tensor  # [T, d]
    q: Tensor  # [K, H, d/H]
    out: Tensor  # [K, d]
    lse: Tensor  # [K, H] float32
    cu_seqlens: Tensor | None  # [S+1] int64 on the CPU; None: one sequence
    cu_queries: Tensor | None  # [S+1] int64 on the CPU; None: all queries are of the only sequence
    scale: float
    norm_weight: Tensor | None  # [d]; None: ones
    eps: float


class WindowScoresArgs(NamedTuple):
    """Of `window_scores`."""

    q_win: Tensor  # [B, H, w, D], row t the query of token stop - w + t
    k: Tensor  # [B, G, N, D]
    scale: float
    kernel_size: int  # odd
    bounds: Tensor | None  # [B, 2], real tokens of each sequence, clamped to [0, N]; None: all


class NonCausalChunksArgs(NamedTuple):
    """Of `non_causal_chunks`."""

    q: Tensor  # [B, H, N, D]
    k: Tensor  # [B, G, N, D]
    chunk_size: int
    scale: float
    bounds: Tensor | None  # [B, 2], real tokens of each sequence, clamped to [0, N]; None: all


class QueryMomentsArgs(NamedTuple):
    """Of `query_moments`."""

    q: Tensor  # [B, H, N, D]
    cos: Tensor | None  # [B or 1, N, D]; None: q has not been rotated
    sin: Tensor | None  # [B or 1, N, D]
    sink: int
    bounds: Tensor | None  # [B, 2], real tokens of each sequence, clamped to [0, N]; None: all


class ExpectedAttentionArgs(NamedTuple):
    """Of `expected_attention`."""

    k: Tensor  # [B, G, N, D]
    v: Tensor | None  # [B, G, N, D]; None: scores are not multiplied by the norm of the values
    mu: Tensor  # [B, H, D] float32
    cov: Tensor | None  # [B, H, D, D] float32; None: zeros
    mean_cos: Tensor | None  # [D]; None: queries are not rotated
    mean_sin: Tensor | None  # [D]
    scale: float
    epsilon: float
    sink: int
    bounds: Tensor | None  # [B, 2], real tokens of each sequence, clamped to [0, N]; None: all


class KeyNormArgs(NamedTuple):
    """Of `key_norm`."""

    k: Tensor  # [B, G, N, D]
    sink: int
    window: int
    bounds: Tensor | None  # [B, 2], real tokens of each sequence, clamped to [0, N]; None: all


class KeySimilarityArgs(NamedTuple):
    """Of `key_similarity`."""

    k: Tensor  # [B, G, N, D]
    sink: int
    window: int
    bounds: Tensor | None  # [B, 2], real tokens of each sequence, clamped to [0, N]; None: all


class LagScoresArgs(NamedTuple):
    """Of `lag_scores`."""

    k: Tensor  # [B, G, N, D]
    v: Tensor  # [B, G, N, D]
    lag_size: int
    sink: int
    bounds: Tensor | None  # [B, 2], real tokens of each sequence, clamped to [0, N]; None: all


class ValueProjectionNormArgs(NamedTuple):
    """Of `value_projection_norm`."""

    v: Tensor  # [B, G, N, D]
    w_o: Tensor  # [d, H*D], the weight of the output projection
    bounds: Tensor | None  # [B, 2], real tokens of each sequence, clamped to [0, N]; None: all


class SelectArgs(NamedTuple):
    """Of `select`."""

    scores: Tensor  # [B, G, N] float32
    budget: int  # of each head, at most N
    across_heads: bool
    protect: Tensor | None  # [B or 1, P, 2], ranges of tokens to keep first


class CompactArgs(NamedTuple):
    """Of `compact`, and of `compact_`, which writes k and v. Lists have an entry for each layer."""

    k: list[Tensor]  # each [B, G, N, D] or [T, D]
    v: list[Tensor]  # of the same shape
    cu_seqlens: list[Tensor]  # each [B*G+1]; empty: k and v are [B, G, N, D]
    indices: list[Tensor]  # each [B, G, M] or [R]
    cu_indices: list[Tensor]  # each [B*G+1]; empty: indices are [B, G, M]
    cos: Tensor | None  # [P, D/2] float32, row p the rotation by p positions; None: keys are not rotated
    sin: Tensor | None  # [P, D/2] float32
    first: Tensor | None  # [B*G], the index of the token at position 0 of each head; None: zeros


class RaggedAppendArgs(NamedTuple):
    """Of `ragged_append`, which writes k, v and lengths."""

    k: Tensor  # [T, D]
    v: Tensor  # [T, D]
    cu_seqlens: Tensor  # [B*G+1], the room of each head, clamped to [0, T]
    lengths: Tensor  # [B*G], valid rows of each head
    k_new: Tensor  # [B, G, t, D]
    v_new: Tensor  # [B, G, t, D]


class RaggedDecodeAttentionArgs(NamedTuple):
    """Of `ragged_decode_attention`."""

    q: Tensor  # [B, H, D]
    k: Tensor  # [T, D]
    v: Tensor  # [T, D]
    cu_seqlens: Tensor  # [B*G+1], the rows of each head, clamped to [0, T]
    lengths: Tensor | None  # [B*G], valid rows of each head; None: all
    scale: float
