"""`ragged_decode_attention`: a decode step over a cache pruned 8x, its heads of very different lengths."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import baselines
from bench.case import OURS, Case, Setting
from bench.goal import Goal
from condense_core import ops
from condense_core.ops import reference


def cases(s: Setting) -> Iterator[Case]:
    """Beside the full cache, and beside as many tokens in heads of one length."""
    kept, kv, d = s.long // 8, s.kv_heads, s.head_dim
    # Heads keep from a quarter to seven quarters of the average.
    lengths = torch.linspace(kept / 4, 7 * kept / 4, kv).round().long()
    lengths[-1] += kv * kept - lengths.sum()
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(s.device)
    total = kv * kept

    def inputs(seed: int) -> tuple[Tensor, ...]:
        q = s.normal(seed, 1, s.heads, d)
        ragged = [s.normal(seed + i, total, d) for i in (1, 2)]
        full = [s.normal(seed + i, 1, kv, s.long, d) for i in (3, 4)]
        return (q, *ragged, *full)

    def uniform(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return baselines.sdpa_decode(q, k.view(1, kv, kept, d), v.view(1, kv, kept, d))

    goals = (Goal("speed-up", 5.0, "sdpa full"), Goal("speed-up", 1 / 1.15, "uniform"))
    yield Case(
        f"ragged_decode_attention {kept} of {s.long}",
        f"{kept} of {s.long} tokens kept on average, {s.heads}/{kv} heads, d {d}, batch 1",
        bytes=2 * s.itemsize * total * d,
        flops=4 * s.heads * kept * d,
        inputs=inputs,
        variants={
            OURS: lambda q, k, v, *_: ops.ragged_decode_attention(q, k, v, cu_seqlens),
            "sdpa full cache": lambda q, _k, _v, k, v: baselines.sdpa_decode(q, k, v),
            "uniform sdpa": uniform,
        },
        expected=lambda q, k, v, *_: reference.ragged_decode_attention(q.float(), k.float(), v.float(), cu_seqlens),
        goals={"cuda": goals, "cpu": goals},
    )
