"""`lag_scores` beside LagKV of kvpress: ranks inside a chunk of the spread relative to the next chunk's range."""

from collections.abc import Iterator

from bench import baselines
from bench.case import OURS, Case, Setting
from bench.cases._cache import keys_values, layer_bytes, scores
from condense_core import ops
from condense_core.ops import reference


def cases(s: Setting) -> Iterator[Case]:
    """A layer of each length."""
    for n in s.lengths:
        yield scores(
            "lag_scores",
            s,
            n,
            bytes=2 * layer_bytes(s, n),
            flops=12 * s.kv_heads * n * s.head_dim,
            inputs=keys_values(s, n),
            variants={
                OURS: lambda k, v: ops.lag_scores(k, v),
                "kvpress LagKV": baselines.lagkv,
                **s.compile("LagKV", baselines.lagkv),
            },
            expected=lambda k, v: reference.lag_scores(k.float(), v.float()),
            tolerance=1e-2,  # in fp32 too: two tokens whose spreads differ in the last digit may change ranks
        )
