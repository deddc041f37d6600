"""Caches of every kind of layer to be written into files, and what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.pruning import PrunedCache
from condense_core.pruning.cache_layers import mark_uneven
from condense_core.pruning.extras import Extras
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.rotary import Rotary

B, G, D, SEEN = 2, 3, 4, 20


def bits(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern may come: NaN, infinities, subnormals, -0."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def places(*shape: int, seed: int, below: int = SEEN) -> Tensor:
    """Ascending positions, others in every row."""
    scores = torch.rand(*shape[:-1], below, generator=torch.Generator().manual_seed(seed))
    return scores.topk(shape[-1]).indices.sort().values


def uniform(
    *,
    kept: int | None = 7,
    added: int = 0,
    storage: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> UniformLayer:
    layer = UniformLayer()
    held = SEEN if kept is None else kept
    if storage is None:
        keys, values = (bits(B, G, held, D, dtype=dtype, seed=seed + i) for i in range(2))
    else:
        generator = torch.Generator().manual_seed(seed)
        keys, values = (torch.randn(B, G, held, D, generator=generator).to(dtype) for _ in range(2))
    if kept is None:
        layer.hold(keys, values, SEEN)
    else:
        layer.hold_kept(keys, values, places(B, G, kept, seed=seed), SEEN)
    if storage is not None:
        layer.quantize(storage)
    for i in range(added):
        layer.update(*(bits(B, G, 1, D, dtype=dtype, seed=seed + 10 + 2 * i + j) for j in range(2)))
    return layer


def ragged(*, added: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0) -> RaggedLayer:
    counts = torch.tensor([5, 0, 9, 1, 20, 7])
    positions = torch.cat([places(1, int(n), seed=seed + i).flatten() for i, n in enumerate(counts)])
    layer = RaggedLayer(
        *(bits(int(counts.sum()), D, dtype=dtype, seed=seed + i) for i in range(2)),
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        batch=B,
        kv_heads=G,
        positions=positions,
        seen=SEEN,
    )
    if added:
        new = (torch.randn(B, heads, added, D).to(dtype) for heads in (2 * G, G, G))
        real = torch.ones(B, added, dtype=torch.bool)
        real[0, 0] = False  # padding: the heads of one sequence grow by less
        layer.attend(*new, real, Extras(1.0))
    return layer


def made_of(*layers: Any, **changes: Any) -> PrunedCache:
    facts = {
        "model_id": "maker/model é",
        "method": "SnapKV(keep=0.25)",
        "lengths": [SEEN, SEEN - 3],
        "context_tokens": [SEEN, SEEN - 3],
        "full_nbytes": 4096,
        "rotary": [Rotary(torch.rand(D // 2), 1.25), Rotary(torch.rand(1), 1.0, D, interleaved=True)] * len(layers),
    }
    facts["rotary"] = facts["rotary"][: len(layers)]
    cache = PrunedCache(layers, **(facts | changes))
    mark_uneven(cache)
    return cache


def rows_of(layer: RaggedLayer, name: str) -> list[Tensor]:
    rows = getattr(layer, name)
    return [rows[start : start + n] for start, n in zip(layer.cu_seqlens.tolist(), layer.lengths.tolist())]  # noqa: B905


def contents(cache: PrunedCache) -> list[Any]:
    """All that a cache is, tensors as bytes: equal lists, equal caches."""

    def raw(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        return tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    found: list[Any] = [cache.model_id, cache.method, cache.lengths, cache.context_tokens, cache.full_nbytes]
    for rotary in cache.rotary or ():
        found += [raw(rotary.inv_freq), rotary.factor, rotary.width, rotary.interleaved]
    for layer in cache.layers:
        found += [type(layer), layer.seen, layer.since, layer.dtype, raw(layer.positions)]
        if isinstance(layer, RaggedLayer):
            found += [layer.batch, layer.kv_heads, raw(layer.lengths), raw(layer.kept_offsets)]
            found += [raw(t) for name in ("keys", "values") for t in rows_of(layer, name)]
        else:
            found += [layer.held, layer.num_kept, layer.uneven, raw(layer.keys), raw(layer.values)]
            found += [] if layer.stored is None else [raw(t) for t in layer.stored.tensors()]
    return found


KINDS: dict[str, Callable[[], list[Any]]] = {
    "unpruned": lambda: [uniform(kept=None)],
    "unpruned, asked": lambda: [uniform(kept=None, added=2)],
    "uniform": lambda: [uniform(), uniform(seed=5)],
    "uniform, asked": lambda: [uniform(added=3)],
    "nothing kept": lambda: [uniform(kept=0)],
    "layers of different sizes": lambda: [uniform(kept=9), uniform(kept=4), uniform(kept=None)],
    "bfloat16": lambda: [uniform(dtype=torch.bfloat16), ragged(dtype=torch.bfloat16)],
    "float16": lambda: [uniform(dtype=torch.float16)],
    "float64": lambda: [uniform(dtype=torch.float64)],
    "int8": lambda: [uniform(storage="int8")],
    "int8, asked": lambda: [uniform(storage="int8", added=2, dtype=torch.bfloat16)],
    "fp8": lambda: [uniform(storage="fp8"), uniform(storage="fp8", kept=None)],
    "ragged": lambda: [ragged(), ragged(seed=7)],
    "ragged, asked": lambda: [ragged(added=3)],
    "mixed": lambda: [uniform(), ragged()],
}


def refused(path: Path, data: bytes, *parts: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        PrunedCache.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]
