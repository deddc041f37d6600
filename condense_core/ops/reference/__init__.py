"""The specification of every op: its mathematics in plain PyTorch, accumulated in fp32. One module per op.

Kernels are tested against these functions, and they run where there is no kernel. Arguments are taken as valid: the
checks stand in the public functions of `condense_core.ops`. fp64 input, which only tests have, is computed in fp64.
"""

from condense_core.ops.reference.attention_pool import attention_pool, attention_pool_with_lse
from condense_core.ops.reference.attention_pool_backward import attention_pool_backward
from condense_core.ops.reference.compact import compact, compact_
from condense_core.ops.reference.cross_pool import cross_pool, cross_pool_with_lse
from condense_core.ops.reference.cross_pool_backward import cross_pool_backward
from condense_core.ops.reference.expected_attention import expected_attention
from condense_core.ops.reference.key_norm import key_norm
from condense_core.ops.reference.key_similarity import key_similarity
from condense_core.ops.reference.lag_scores import lag_scores
from condense_core.ops.reference.non_causal_chunks import non_causal_chunks
from condense_core.ops.reference.norm import rms_norm
from condense_core.ops.reference.query_moments import query_moments
from condense_core.ops.reference.ragged_append import ragged_append
from condense_core.ops.reference.ragged_decode_attention import ragged_decode_attention
from condense_core.ops.reference.select import select
from condense_core.ops.reference.value_projection_norm import value_projection_norm
from condense_core.ops.reference.window_scores import window_scores
from condense_core.ops.reference.windows import window_offsets

__all__ = [
    "attention_pool",
    "attention_pool_with_lse",
    "attention_pool_backward",
    "cross_pool",
    "cross_pool_with_lse",
    "cross_pool_backward",
    "rms_norm",
    "window_offsets",
    "window_scores",
    "non_causal_chunks",
    "query_moments",
    "expected_attention",
    "key_norm",
    "key_similarity",
    "lag_scores",
    "value_projection_norm",
    "select",
    "compact",
    "compact_",
    "ragged_append",
    "ragged_decode_attention",
]
