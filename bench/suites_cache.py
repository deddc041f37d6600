"""What is measured of selecting and compacting: the ops that move a cache's rows, at the shapes of Mistral-7B."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import OURS, Case, Goal, Sizes, normal
from condense_core import ops
from condense_core.ops import reference


def cases(s: Sizes, device: torch.device) -> Iterator[Case]:
    """One layer's selection, a whole cache's compaction, and the append of a decode step."""
    for scope in ("head", "layer"):
        yield _select(s, scope, device)
    for rotated in (False, True):
        yield _compact(s, device, rotated=rotated)
    yield _append(s, device)


def _select(s: Sizes, scope: Any, device: torch.device) -> Case:
    n, kept, kv = s.long, s.long // 4, s.kv_heads

    def topk(scores: Tensor) -> Tensor:
        rows = scores if scope == "head" else scores.flatten(1)
        return rows.topk(rows.shape[-1] // 4, dim=-1, sorted=False).indices.sort(-1).values

    return Case(
        f"select {scope} n={n}",
        f"{kept} of {n} tokens, {kv} heads, scope {scope!r}",
        bytes=4 * kv * n + 8 * kv * kept,
        flops=0,
        inputs=lambda seed: (normal(seed, device, 1, kv, n).float(),),
        variants={OURS: lambda scores: ops.select(scores, kept, scope=scope), "topk + sort": topk},
        expected=lambda scores: reference.select(scores, kept, scope == "layer")[0],
        result=lambda out: out[0],
        tolerance=0.0,
        goals=(Goal("us", 20.0),) if scope == "head" else (),
    )


def _compact(s: Sizes, device: torch.device, *, rotated: bool) -> Case:
    layers, kv, n, d = s.layers, s.kv_heads, s.middle, s.head_dim
    kept = n // 2
    angles = torch.arange(n, device=device)[:, None] * 10_000.0 ** (-torch.arange(d // 2, device=device) * 2 / d)
    tables = (angles.cos(), angles.sin())
    generator = torch.Generator(device).manual_seed(0)
    places = torch.rand(layers, 1, kv, n, generator=generator, device=device).argsort(-1)[..., :kept].sort(-1).values

    def ours(k: Tensor, v: Tensor) -> Any:
        options: dict[str, Any] = {"rotate": tables} if rotated else {}
        return ops.compact(k.unbind(0), v.unbind(0), places.unbind(0), **options)

    def gather(k: Tensor, v: Tensor) -> Any:
        rows = places.unsqueeze(-1).expand(*places.shape, d)
        return k.gather(3, rows), v.gather(3, rows)

    def expected(k: Tensor, v: Tensor) -> Tensor:
        cos, sin = tables if rotated else (None, None)
        keys, values = reference.compact(list(k), list(v), [], list(places), [], cos, sin)
        return torch.stack([torch.stack(keys), torch.stack(values)]).float()

    return Case(
        f"compact {'and rotate ' * rotated}n={n}",
        f"{kept} of {n} tokens, {layers} layers, {kv} heads, d {d}" + ", keys turned to new positions" * rotated,
        bytes=2 * (2 * layers * kv * kept * d * 2) + 8 * layers * kv * kept,
        flops=6 * layers * kv * kept * d if rotated else 0,
        inputs=lambda seed: (
            normal(seed, device, layers, 1, kv, n, d),
            normal(seed + 1, device, layers, 1, kv, n, d),
        ),
        variants={OURS: ours} if rotated else {OURS: ours, "gather": gather},
        expected=expected,
        result=lambda out: torch.stack([torch.stack(list(part)) for part in out]),
        tolerance=4e-3 if rotated else 0.0,
        goals=() if rotated else (Goal("copy", 0.8),),
    )


def _append(s: Sizes, device: torch.device) -> Case:
    kv, d, room = s.kv_heads, s.head_dim, s.middle
    offsets = torch.arange(kv + 1, device=device) * room
    lengths = torch.zeros(kv, dtype=torch.int64, device=device)

    def ours(k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor) -> Tensor:
        ops.ragged_append(k, v, offsets, lengths, k_new, v_new)
        return k

    def expected(k: Tensor, _v: Tensor, k_new: Tensor, _v_new: Tensor) -> Tensor:
        lengths.zero_()
        out = k.clone()
        out[offsets[:-1]] = k_new[0, :, 0]
        return out

    return Case(
        "ragged_append",
        f"one token, {kv} heads with room for {room}, d {d}",
        bytes=8 * kv * d,
        flops=0,
        inputs=lambda seed: (
            *(normal(seed + i, device, kv * room, d) for i in range(2)),
            *(normal(seed + i, device, 1, kv, 1, d) for i in (2, 3)),
        ),
        variants={OURS: ours},
        expected=expected,
        tolerance=0.0,
    )
