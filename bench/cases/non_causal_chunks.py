"""`non_causal_chunks` beside the rival of that name in kvpress: attention from both sides inside chunks of 256."""

from collections.abc import Iterator

from bench import baselines
from bench.case import OURS, Case, Setting
from bench.cases._cache import layer_bytes, queries_keys, scores
from condense_core import ops
from condense_core.ops import reference


def cases(s: Setting) -> Iterator[Case]:
    """A layer of each length."""
    for n in s.lengths:
        yield scores(
            "non_causal_chunks",
            s,
            n,
            bytes=layer_bytes(s, n) + s.itemsize * s.heads * n * s.head_dim,
            flops=2 * s.heads * n * 256 * s.head_dim,
            inputs=queries_keys(s, n),
            variants={
                OURS: lambda q, k: ops.non_causal_chunks(q, k),
                "kvpress NonCausal": baselines.non_causal,
                **s.compile("NonCausal", baselines.non_causal),
            },
            expected=lambda q, k: reference.non_causal_chunks(q.float(), k.float()),
        )
