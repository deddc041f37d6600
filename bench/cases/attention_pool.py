"""`attention_pool` and its backward op: packs of texts, a row for every four tokens."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import baselines
from bench.case import OURS, Backward, Case, Setting
from bench.goal import Goal
from condense_core import ops
from condense_core.ops import reference

EPS, RATIO = 1e-5, 4


def cases(s: Setting) -> Iterator[Case]:
    """Forward and backward, of one text and of a pack."""
    for sequences in s.packs:
        yield from _pack(s, sequences)


def _pack(s: Setting, sequences: int) -> Iterator[Case]:
    rows = sequences * -(-s.tokens // RATIO)
    tokens = sequences * s.tokens
    shape = f"{sequences} x {s.tokens} tokens, d {s.width}, ratio {RATIO}, {s.heads} heads"
    cu_seqlens = s.tokens * torch.arange(sequences + 1) if sequences > 1 else None
    options: dict[str, Any] = {"ratio": RATIO, "cu_seqlens": cu_seqlens, "eps": EPS}

    def inputs(seed: int) -> tuple[Tensor, ...]:
        x = s.normal(seed, sequences, s.tokens, s.width)
        return x, s.normal(seed + 1, s.heads, s.head_dim), s.normal(seed + 2, s.width)

    def ours(x: Tensor, q: Tensor, w: Tensor) -> Tensor:
        return ops.attention_pool(x.flatten(0, 1), q, norm_weight=w, **options)

    def expected(x: Tensor, q: Tensor, w: Tensor) -> Tensor:
        return reference.attention_pool(x.flatten(0, 1).float(), q.float(), norm_weight=w.float(), **options)

    eager = {
        "eager einsum": partial(baselines.pool_einsum, ratio=RATIO, eps=EPS),
        "eager elementwise": partial(baselines.pool_elementwise, ratio=RATIO, eps=EPS),
    }
    # The strongest rival: compiled everywhere.
    compiled = torch.compile(eager["eager elementwise"], dynamic=False)
    cuda = (
        (Goal("us", 12.0),)
        if sequences == 1
        else (Goal("bandwidth", 0.85), Goal("speed-up", 6.0, "eager"), Goal("speed-up", 2.0, "compile"))
    )
    cpu = (Goal("speed-up", 10.0, "eager"), Goal("speed-up", 2.5, "compile"), Goal("bandwidth", 0.5))
    yield Case(
        f"attention_pool {sequences}x{s.tokens}",
        shape,
        bytes=s.itemsize * s.width * (tokens + rows),
        flops=4 * s.width * tokens,
        inputs=inputs,
        variants={OURS: ours, **eager, "compile elementwise": compiled},
        expected=expected,
        goals={"cuda": cuda, "cpu": cpu},
    )
    yield Case(
        f"attention_pool_backward {sequences}x{s.tokens}",
        shape,
        bytes=s.itemsize * s.width * (2 * tokens + 2 * rows),
        flops=16 * s.width * tokens,
        inputs=inputs,
        variants={
            OURS: Backward(ours),
            **{name: Backward(baseline) for name, baseline in eager.items()},
            **({"compile elementwise": Backward(compiled)} if s.compiled else {}),
        },
        expected=Backward(expected),
        goals={
            "cuda": (Goal("speed-up", 4.0, "eager"),) if sequences > 1 else (),
            "cpu": (Goal("speed-up", 4.0, "eager"),),
        },
    )
