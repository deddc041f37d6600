"""The specification of every op: its mathematics in plain PyTorch, accumulated in fp32.

Kernels are tested against these functions, and they run where there is no kernel. Arguments are taken as valid: the
checks stand in the public functions of `condense_core.ops`. fp64 input, which only tests have, is computed in fp64.
"""

from condense_core.ops.reference.cache_scores import key_norm, key_similarity, lag_scores, value_projection_norm
from condense_core.ops.reference.compaction import compact, compact_, ragged_append
from condense_core.ops.reference.expected_attention import expected_attention, query_moments
from condense_core.ops.reference.pooling import attention_pool, cross_pool, rms_norm, window_offsets
from condense_core.ops.reference.query_scores import non_causal_chunks, window_scores
from condense_core.ops.reference.ragged_decode import ragged_decode_attention
from condense_core.ops.reference.selection import select

__all__ = [
    "attention_pool",
    "cross_pool",
    "rms_norm",
    "window_offsets",
    "select",
    "compact",
    "compact_",
    "ragged_append",
    "ragged_decode_attention",
    "key_norm",
    "key_similarity",
    "lag_scores",
    "value_projection_norm",
    "window_scores",
    "non_causal_chunks",
    "query_moments",
    "expected_attention",
]
