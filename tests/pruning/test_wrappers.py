"""Wrappers inside one another, and what all of them share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from condense_core.pruning.base import Kept, Method, Wrapper
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import (
    WRAPPERS,
    AdaKV,
    ChunkKV,
    CriticalKV,
    Decoding,
    Merge,
    PerLayer,
    PyramidKV,
    QueryAware,
    Rerotate,
    Threshold,
)
from condense_core.pruning.wrappers.kept import kept_mask
from condense_testing.pruning import layers
from condense_testing.pruning.wrapper_cases import (
    DTYPES,
    HEADS,
    PADDINGS,
    batch,
    chosen,
    run,
)


def compositions() -> list[Method]:
    base = SnapKV(keep=0.4, window=6)
    return [
        AdaKV(base),
        AdaKV(CriticalKV(base)),
        CriticalKV(AdaKV(base)),
        AdaKV(ChunkKV(base, 5)),
        PyramidKV(base),
        AdaKV(PyramidKV(base, 2)),
        PerLayer(base, (0.9, 0.3, 0.2, 0.2)),
        Rerotate(ChunkKV(base, 5)),
        Rerotate(CriticalKV(ChunkKV(base, 5))),
        Merge(AdaKV(base)),
        Merge(Rerotate(base)),
        Merge(Threshold(CriticalKV(base), 0.0)),
        Decoding(Merge(base), 20),
        AdaKV(QueryAware(base, (1, 2, 3))),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("method", compositions(), ids=repr)
def test_compositions_meet_their_budgets(
    method: Method, padding: str, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    layer = batch(padding, heads, dtype)
    scores, kept, keys, values = run(method, layer)
    assert scores.dtype == torch.float32
    own = chosen(layer, kept)
    mask = kept_mask(kept, *scores.shape)
    assert keys.shape == values.shape == (*kept.indices.shape, 8)
    assert keys.dtype == values.dtype == dtype
    assert keys.isfinite().all()
    assert values.isfinite().all()
    for b, real in enumerate(layer.real()):
        heads_of_b = own[b * heads[1] : (b + 1) * heads[1]]
        for g, row in enumerate(heads_of_b):
            assert row == sorted(set(row))
            assert mask[b, g].nonzero().flatten().tolist() == row
            assert set(row) <= set(real)
            assert set(real[-6:]) <= set(row)
        if method.traits.bounded:
            budget = layer.context(method).budgets[b]
            assert sum(map(len, heads_of_b)) == heads[1] * budget
            assert method.traits.ragged or {len(row) for row in heads_of_b} == {budget}


@pytest.mark.parametrize("method", compositions(), ids=repr)
def test_only_a_threshold_reads_the_device_back(method: Method) -> None:
    """Fake tensors have no data: whatever asks for some raises."""
    layer = layers.build()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer = replace(layer, **{name: mode.from_tensor(getattr(layer, name)) for name in ("q", "k", "v")})
        for changes in ({}, {"positions": mode.from_tensor(torch.arange(61).repeat(1, 2, 1))}):
            if "Threshold" in repr(method):
                with pytest.raises(DynamicOutputShapeException):
                    run(method, layer, **changes)
            else:
                _, kept, keys, _ = run(method, layer, **changes)
                assert keys.shape[:-1] == kept.indices.shape


def test_a_selection_becomes_a_mask() -> None:
    uniform = kept_mask(Kept(torch.tensor([[[0, 3, -1], [1, 2, 3]]])), 1, 2, 4)
    assert uniform.tolist() == [[[True, False, False, True], [False, True, True, True]]]
    # Heads 0 and 2 are empty; the last row belongs to no head.
    ragged = kept_mask(Kept(torch.tensor([1, 3, 0, 2]), torch.tensor([0, 0, 2, 2, 3], dtype=torch.int32)), 2, 2, 4)
    assert ragged.nonzero().tolist() == [[0, 1, 1], [0, 1, 3], [1, 1, 0]]
    assert kept_mask(Kept(torch.zeros(1, 2, 0, dtype=torch.int64)), 1, 2, 4).sum() == 0


def test_every_wrapper_is_listed_by_its_name() -> None:
    assert {name: wrapper.__name__ for name, wrapper in WRAPPERS.items()} == {
        "across_layers": "AcrossLayers",
        "sentences": "Sentences",
        "adakv": "AdaKV",
        "pyramidkv": "PyramidKV",
        "per_layer": "PerLayer",
        "chunkkv": "ChunkKV",
        "criticalkv": "CriticalKV",
        "rerotate": "Rerotate",
        "threshold": "Threshold",
        "merge": "Merge",
        "decoding": "Decoding",
        "query_aware": "QueryAware",
    }
    assert all(issubclass(wrapper, Wrapper) and wrapper.__doc__ for wrapper in WRAPPERS.values())
