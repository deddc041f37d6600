"""`query_moments`: mean and covariance of the queries of a layer, which ExpectedAttention needs."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench import baselines
from bench.case import OURS, Case, Setting
from condense_core import ops
from condense_core.ops import reference

SINK = 4


def cases(s: Setting) -> Iterator[Case]:
    """A layer of each length."""
    for n in s.lengths:
        d = s.head_dim
        yield Case(
            f"query_moments n={n}",
            f"n {n}, {s.heads} heads, d {d}",
            bytes=s.itemsize * s.heads * n * d + 4 * s.heads * d * (d + 1),
            flops=2 * s.heads * n * d * d,
            inputs=partial(_queries, s, n),
            variants={
                OURS: lambda q: ops.query_moments(q, sink=SINK),
                "kvpress statistics": lambda q: baselines.query_statistics(q[:, :, SINK:]),
            },
            expected=lambda q: _joined(reference.query_moments(q.float(), sink=SINK)),
            result=_joined,
        )


def _queries(s: Setting, n: int, seed: int) -> tuple[Tensor, ...]:
    return (s.normal(seed, 1, s.heads, n, s.head_dim),)


def _joined(moments: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([moment.flatten().float() for moment in moments])
