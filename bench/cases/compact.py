"""`compact`: half of the tokens of all layers move together, as they are or with keys turned to new positions."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.case import OURS, Case, Setting
from bench.goal import Goal
from condense_core import ops
from condense_core.ops import reference


def cases(s: Setting) -> Iterator[Case]:
    """Without and with rotation."""
    for rotated in (False, True):
        yield _case(s, rotated=rotated)


def _case(s: Setting, *, rotated: bool) -> Case:
    device, layers, kv, n, d = s.device, s.layers, s.kv_heads, s.middle, s.head_dim
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

    def copy(k: Tensor, v: Tensor) -> Any:
        return k[:, :, :, :kept].clone(), v[:, :, :, :kept].clone()  # into new tensors, as compact does

    def expected(k: Tensor, v: Tensor) -> Tensor:
        cos, sin = tables if rotated else (None, None)
        keys, values = reference.compact(list(k), list(v), [], list(places), [], cos, sin)
        return torch.stack([torch.stack(keys), torch.stack(values)]).float()

    goals = {"cuda": (Goal("bandwidth", 0.8),), "cpu": (Goal("speed-up", 0.75, "copy"),)}
    return Case(
        f"compact {'and rotate ' * rotated}n={n}",
        f"{kept} of {n} tokens, {layers} layers, {kv} heads, d {d}" + ", keys turned to new positions" * rotated,
        bytes=2 * s.itemsize * (2 * layers * kv * kept * d) + 8 * layers * kv * kept,
        flops=6 * layers * kv * kept * d if rotated else 0,
        inputs=lambda seed: tuple(s.normal(seed + i, layers, 1, kv, n, d) for i in range(2)),
        variants={OURS: ours, "copy of as many bytes": copy, "gather": gather},
        expected=expected,
        result=lambda out: torch.stack([torch.stack(list(part)) for part in out]),
        tolerance=(4e-3 if s.itemsize == 2 else 1e-6) if rotated else 0.0,  # of a turned key, rounded once
        goals={} if rotated else goals,
    )
