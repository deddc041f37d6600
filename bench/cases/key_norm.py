"""`key_norm` beside Knorm of kvpress: the norm of every key."""

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
            "key_norm",
            s,
            n,
            bytes=layer_bytes(s, n),
            flops=2 * s.kv_heads * n * s.head_dim,
            inputs=keys(s, n),
            variants={
                OURS: lambda k: ops.key_norm(k),
                "kvpress Knorm": baselines.knorm,
                **s.compile("Knorm", baselines.knorm),
            },
            expected=lambda k: reference.key_norm(k.float()),
        )
