"""`value_projection_norm` beside CriticalKV of kvpress: what a value can add to the layer's output."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from bench import baselines
from bench.case import OURS, Case, Setting
from bench.cases._cache import layer_bytes, scores
from condense_core import ops
from condense_core.ops import reference


def cases(s: Setting) -> Iterator[Case]:
    """A layer of the shortest length: the products are 69 GFLOP there."""
    n = s.lengths[0]

    def inputs(seed: int) -> tuple[Tensor, ...]:
        return s.normal(seed, 1, s.kv_heads, n, s.head_dim), s.normal(seed + 1, s.width, s.heads * s.head_dim)

    yield scores(
        "value_projection_norm",
        s,
        n,
        bytes=layer_bytes(s, n) + s.itemsize * s.width * s.heads * s.head_dim,
        flops=2 * s.heads * n * s.head_dim * s.width,
        inputs=inputs,
        variants={
            OURS: lambda v, w: ops.value_projection_norm(v, w),
            "kvpress CriticalKV": partial(baselines.value_projection, heads=s.heads),
            **s.compile("CriticalKV", partial(baselines.value_projection, heads=s.heads)),
        },
        expected=lambda v, w: reference.value_projection_norm(v.float(), w.float()),
    )
