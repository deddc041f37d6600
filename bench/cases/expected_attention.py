"""`expected_attention` with `query_moments` before it, beside ExpectedAttention of kvpress."""

from collections.abc import Iterator

from torch import Tensor

from bench import baselines
from bench.case import OURS, Case, Setting
from bench.cases._cache import layer_bytes, scores
from bench.goal import Goal
from condense_core import ops
from condense_core.ops import reference


def cases(s: Setting) -> Iterator[Case]:
    """A layer of each length."""
    for n in s.lengths:

        def inputs(seed: int, n: int = n) -> tuple[Tensor, ...]:
            heads = (s.heads, s.kv_heads, s.kv_heads)
            return tuple(s.normal(seed + i, 1, heads[i], n, s.head_dim) for i in range(3))

        yield scores(
            "expected_attention",
            s,
            n,
            bytes=2 * layer_bytes(s, n) + s.itemsize * s.heads * n * s.head_dim,
            flops=4 * s.heads * n * s.head_dim**2,
            inputs=inputs,
            variants={
                OURS: lambda q, k, v: ops.expected_attention(k, v, *ops.query_moments(q)),
                "kvpress ExpectedAttention": lambda q, k, v: baselines.expected_attention(
                    k, v, *baselines.query_statistics(q[:, :, 4:])
                ),
            },
            expected=lambda q, k, v: reference.expected_attention(
                k.float(), v.float(), *reference.query_moments(q.float())
            ),
            goals={"cuda": (Goal("layer", 0.02),)} if n == s.lengths[0] else {},
        )
