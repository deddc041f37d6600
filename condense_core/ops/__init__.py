"""The ops of the engine: tensors in, tensors out, one function per op over every backend.

The mathematics of an op is its function in `condense_core.ops.reference`; which backend runs it is decided
for every call by `condense_core.ops.registry` (`CONDENSE_BACKEND` overrides). The functions here check every
argument before anything is launched. All are registered with `torch.library`: `torch.compile` traces through them.
"""

from condense_core.ops.cache_scores import key_norm, key_similarity, lag_scores, value_projection_norm
from condense_core.ops.compaction import compact, compact_, ragged_append
from condense_core.ops.expected_attention import expected_attention, query_moments
from condense_core.ops.pooling import attention_pool, cross_pool, num_windows, window_offsets
from condense_core.ops.query_scores import non_causal_chunks, window_scores
from condense_core.ops.ragged_decode import ragged_decode_attention
from condense_core.ops.selection import select

__all__ = [
    "attention_pool",
    "cross_pool",
    "num_windows",
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
