"""`select` beside topk and sort: a quarter of a layer's tokens, per head and over all heads of the layer."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from bench.case import OURS, Case, Setting
from bench.goal import Goal
from condense_core import ops
from condense_core.ops import reference


def cases(s: Setting) -> Iterator[Case]:
    """Both scopes. Scores are fp32, whatever the cache is."""
    scopes: tuple[Any, ...] = ("head", "layer")
    n, kept, kv = s.long, s.long // 4, s.kv_heads
    for scope in scopes:
        yield Case(
            f"select {scope} n={n}",
            f"{kept} of {n} tokens, {kv} heads, scope {scope!r}",
            bytes=4 * kv * n + 8 * kv * kept,
            flops=0,
            inputs=lambda seed: (s.normal(seed, 1, kv, n).float(),),
            variants={
                OURS: partial(ops.select, budget=kept, scope=scope),
                "topk + sort": partial(_topk, per_head=scope == "head"),
            },
            expected=lambda scores, scope=scope: reference.select(scores, kept, scope == "layer")[0],
            result=lambda out: out[0],
            tolerance=0.0,
            goals={"cuda": (Goal("us", 20.0),), "cpu": (Goal("speed-up", 6.0, "topk"),)} if scope == "head" else {},
        )


def _topk(scores: Tensor, *, per_head: bool) -> Tensor:
    rows = scores if per_head else scores.flatten(1)
    return rows.topk(rows.shape[-1] // 4, dim=-1, sorted=False).indices.sort(-1).values
