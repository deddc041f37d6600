"""`ragged_append`: the rows of one decode step, written into a cache whose heads hold differently many."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import OURS, Case, Setting
from condense_core import ops


def cases(s: Setting) -> Iterator[Case]:
    """One token."""
    kv, d, room = s.kv_heads, s.head_dim, s.middle
    offsets = torch.arange(kv + 1, device=s.device) * room
    lengths = torch.zeros(kv, dtype=torch.int64, device=s.device)

    def ours(k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor) -> Tensor:
        ops.ragged_append(k, v, offsets, lengths, k_new, v_new)
        return k

    def expected(k: Tensor, _v: Tensor, k_new: Tensor, _v_new: Tensor) -> Tensor:
        lengths.zero_()
        out = k.clone()
        out[offsets[:-1]] = k_new[0, :, 0]
        return out

    yield Case(
        "ragged_append",
        f"one token, {kv} heads with room for {room}, d {d}",
        bytes=4 * s.itemsize * kv * d,
        flops=0,
        inputs=lambda seed: (
            *(s.normal(seed + i, kv * room, d) for i in range(2)),
            *(s.normal(seed + i, 1, kv, 1, d) for i in (2, 3)),
        ),
        variants={OURS: ours},
        expected=expected,
        tolerance=0.0,
    )
