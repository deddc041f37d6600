"""The table of ops and backends, a block for each op, most preferred backend first. A kernel joins by a line here."""

from condense_core.ops.registry import Registry, cpu, cuda, reference, triton

REGISTRY = Registry(
    [
        # attention_pool
        cuda("attention_pool", unmeasured=True),
        triton("attention_pool"),
        cpu("attention_pool"),
        reference("attention_pool", function="attention_pool_with_lse"),
        # attention_pool_backward
        triton("attention_pool_backward", function="backward"),
        cpu("attention_pool_backward"),
        reference("attention_pool_backward"),
        # cross_pool
        triton("cross_pool"),
        cpu("cross_pool"),
        reference("cross_pool", function="cross_pool_with_lse"),
        # cross_pool_backward
        triton("cross_pool_backward", function="backward"),
        reference("cross_pool_backward"),
        # window_scores
        triton("window_scores"),
        cpu("window_scores"),
        reference("window_scores"),
        # non_causal_chunks
        triton("non_causal_chunks"),
        cpu("non_causal_chunks"),
        reference("non_causal_chunks"),
        # query_moments
        triton("query_moments"),
        cpu("query_moments"),
        reference("query_moments"),
        # expected_attention
        triton("expected_attention"),
        cpu("expected_attention"),
        reference("expected_attention"),
        # key_norm
        triton("key_norm"),
        cpu("key_norm"),
        reference("key_norm"),
        # key_similarity
        triton("key_similarity"),
        cpu("key_similarity"),
        reference("key_similarity"),
        # lag_scores
        triton("lag_scores"),
        cpu("lag_scores"),
        reference("lag_scores"),
        # value_projection_norm
        triton("value_projection_norm"),
        cpu("value_projection_norm"),
        reference("value_projection_norm"),
        # select
        cuda("select"),
        cpu("select"),
        reference("select"),
        # compact
        cuda("compact"),
        cpu("compact"),
        reference("compact"),
        # compact_
        cuda("compact_", module="compact"),
        cpu("compact_", module="compact"),
        reference("compact_", module="compact"),
        # ragged_append
        cuda("ragged_append"),
        cpu("ragged_append"),
        reference("ragged_append"),
        # ragged_decode_attention
        triton("ragged_decode_attention"),
        cpu("ragged_decode_attention"),
        reference("ragged_decode_attention"),
    ]
)
