"""`window_scores` beside SnapKV of kvpress: what the last 64 queries attend to."""

from collections.abc import Iterator

from bench import baselines
from bench.case import OURS, Case, Setting
from bench.cases._cache import layer_bytes, queries_keys, scores
from bench.goal import Goal
from condense_core import ops
from condense_core.ops import reference

WINDOW = 64


def cases(s: Setting) -> Iterator[Case]:
    """A layer of each length."""
    for n in s.lengths:
        small = n == s.lengths[0]
        yield scores(
            "window_scores",
            s,
            n,
            bytes=layer_bytes(s, n) + s.itemsize * s.heads * WINDOW * s.head_dim,
            flops=4 * s.heads * WINDOW * n * s.head_dim,
            inputs=queries_keys(s, n, queries=WINDOW),
            variants={
                OURS: lambda q, k: ops.window_scores(q, k),
                "kvpress SnapKV": baselines.snapkv,
                **s.compile("SnapKV", baselines.snapkv),
            },
            expected=lambda q, k: reference.window_scores(q.float(), k.float()),
            goals={
                "cuda": (Goal("speed-up", 8.0, "kvpress"), Goal("temporaries", 1.0))
                if small
                else (Goal("bandwidth", 0.5),),
            },
        )
