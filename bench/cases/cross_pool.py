"""`cross_pool`: a query for every four tokens of a text attends over all of them."""

from collections.abc import Iterator
from functools import partial

from bench import baselines
from bench.case import OURS, Case, Setting
from condense_core import ops
from condense_core.ops import reference

EPS = 1e-5


def cases(s: Setting) -> Iterator[Case]:
    """One text."""
    queries = -(-s.tokens // 4)
    yield Case(
        f"cross_pool {queries}x{s.tokens}",
        f"{queries} queries over {s.tokens} tokens, d {s.width}, {s.heads} heads",
        bytes=s.itemsize * s.width * (s.tokens + 2 * queries),
        flops=4 * queries * s.tokens * s.width,
        inputs=lambda seed: (
            s.normal(seed, s.tokens, s.width),
            s.normal(seed + 1, queries, s.heads, s.head_dim),
            s.normal(seed + 2, s.width),
        ),
        variants={
            OURS: lambda x, q, w: ops.cross_pool(x, q, norm_weight=w, eps=EPS),
            "sdpa": partial(baselines.cross_pool_sdpa, eps=EPS),
            **s.compile("sdpa", partial(baselines.cross_pool_sdpa, eps=EPS)),
        },
        expected=lambda x, q, w: reference.cross_pool(x.float(), q.float(), norm_weight=w.float(), eps=EPS),
    )
