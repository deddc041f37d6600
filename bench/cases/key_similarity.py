"""`key_similarity` beside KeyDiff of kvpress: the cosine of every key to their mean direction."""

from collections.abc import Iterator

from bench import baselines
from bench.case import OURS, Case, Setting
from bench.cases._cache import keys, layer_bytes, scores
from condense_core import ops
from condense_core.ops import reference


def cases(s: Setting) -> Iterator[Case]:
    """A layer of each length."""
    for n in s.lengths:
        yield scores(
            "key_similarity",
            s,
            n,
            bytes=layer_bytes(s, n),
            flops=6 * s.kv_heads * n * s.head_dim,
            inputs=keys(s, n),
            variants={
                OURS: lambda k: ops.key_similarity(k),
                "kvpress KeyDiff": baselines.keydiff,
                **s.compile("KeyDiff", baselines.keydiff),
            },
            expected=lambda k: reference.key_similarity(k.float()),
        )
