"""The table of ops and backends, a block for each op, most preferred backend first. A kernel joins by a line here."""

from condense_core.ops.reference import cache_scores, compaction, gradients, query_scores, ragged_decode, selection
from condense_core.ops.reference.expected_attention import expected_attention, query_moments
from condense_core.ops.registry import Registry, cpu, cuda, reference, triton

REGISTRY = Registry(
    [
        # attention_pool
        cuda("attention_pool", unmeasured=True),
        triton("attention_pool"),
        cpu("attention_pool"),
        reference("attention_pool", gradients.attention_pool),
        # attention_pool_backward
        triton("attention_pool_backward", "backward"),
        cpu("attention_pool_backward"),
        reference("attention_pool_backward", gradients.attention_pool_backward),
        # cross_pool
        triton("cross_pool"),
        cpu("cross_pool"),
        reference("cross_pool", gradients.cross_pool),
        # cross_pool_backward
        triton("cross_pool_backward", "backward"),
        reference("cross_pool_backward", gradients.cross_pool_backward),
        # window_scores
        triton("window_scores"),
        cpu("window_scores"),
        reference("window_scores", query_scores.window_scores),
        # non_causal_chunks
        triton("non_causal_chunks"),
        cpu("non_causal_chunks"),
        reference("non_causal_chunks", query_scores.non_causal_chunks),
        # query_moments
        triton("query_moments"),
        cpu("query_moments"),
        reference("query_moments", query_moments),
        # expected_attention
        triton("expected_attention"),
        cpu("expected_attention"),
        reference("expected_attention", expected_attention),
        # key_norm
        triton("key_norm"),
        cpu("key_norm"),
        reference("key_norm", cache_scores.key_norm),
        # key_similarity
        triton("key_similarity"),
        cpu("key_similarity"),
        reference("key_similarity", cache_scores.key_similarity),
        # lag_scores
        triton("lag_scores"),
        cpu("lag_scores"),
        reference("lag_scores", cache_scores.lag_scores),
        # value_projection_norm
        triton("value_projection_norm"),
        cpu("value_projection_norm"),
        reference("value_projection_norm", cache_scores.value_projection_norm),
        # select
        cuda("select"),
        cpu("select"),
        reference("select", selection.select),
        # compact
        cuda("compact"),
        cpu("compact"),
        reference("compact", compaction.compact),
        # compact_
        cuda("compact_", "compact"),
        cpu("compact_", "compact"),
        reference("compact_", compaction.compact_),
        # ragged_append
        cuda("ragged_append"),
        cpu("ragged_append"),
        reference("ragged_append", compaction.ragged_append),
        # ragged_decode_attention
        triton("ragged_decode_attention"),
        cpu("ragged_decode_attention"),
        reference("ragged_decode_attention", ragged_decode.ragged_decode_attention),
    ]
)
