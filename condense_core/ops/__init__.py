"""The ops of the engine: tensors in, tensors out, one function per op over every backend.

An op has one name in every folder: its public function here, its specification in `reference/`, backends in `cpu/`,
`cuda/` and `condense_core.kernels`; docs/ops.md lists the files. The functions here check every argument and call an op
registered with `torch.library`, so `torch.compile` traces through them. Which backend runs is decided for every call
by `condense_core.ops.registry` (`CONDENSE_BACKEND` overrides), from the table in `condense_core.ops.backends`.
"""

from condense_core.ops.attention_pool import attention_pool
from condense_core.ops.compact import compact, compact_
from condense_core.ops.cross_pool import cross_pool
from condense_core.ops.expected_attention import expected_attention
from condense_core.ops.key_norm import key_norm
from condense_core.ops.key_similarity import key_similarity
from condense_core.ops.lag_scores import lag_scores
from condense_core.ops.non_causal_chunks import non_causal_chunks
from condense_core.ops.query_moments import query_moments
from condense_core.ops.ragged_append import ragged_append
from condense_core.ops.ragged_decode_attention import ragged_decode_attention
from condense_core.ops.select import select
from condense_core.ops.value_projection_norm import value_projection_norm
from condense_core.ops.window_scores import window_scores
from condense_core.ops.windows import num_windows, window_offsets

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
