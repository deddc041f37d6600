"""Ragged layers of a pruned cache: against attention in float64, head by head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.pruning.extras import Extras
from condense_core.pruning.layers import GROWTH
from condense_core.pruning.ragged import RaggedLayer
from condense_testing.pruning import models
from condense_testing.pruning.layer_cases import TOLERANCE, B, D, G, H, ragged, rows


def attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """One head: queries ``[Q, D]`` of the last Q of the keys ``[n, D]``, in float64 and query by query."""
    out = []
    for i, query in enumerate(q.double()):
        last = len(keys) - len(q) + i
        first = 0 if window is None else max(0, last - window + 1)
        logits = keys[first : last + 1].double() @ query * 0.3
        out.append(logits.softmax(0) @ values[first : last + 1].double())
    return torch.stack(out) if out else q.double()


def ask(layer: RaggedLayer, heads: list[Any], count: int, real: Tensor | None, seed: int, window: int | None) -> None:
    """New tokens against the oracle; ``heads`` grows with the layer."""
    batch = layer.batch
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, H, count, D, generator=generator)
    k, v = torch.randn(2, batch, G, count, D, generator=generator)
    out = layer.attend(q, k, v, real, Extras(0.3, window))
    assert out.shape == (batch, count, H, D)
    for b in range(batch):
        place = list(range(count)) if real is None else real[b].nonzero().flatten().tolist()
        for g in range(G):
            n = b * G + g
            heads[n] = tuple(torch.cat([old, new[b, g, place]]) for old, new in zip(heads[n], (k, v), strict=True))
            found_keys, found_values = models.rows(layer, b, g)
            assert torch.equal(found_keys, heads[n][0])
            assert torch.equal(found_values, heads[n][1])
            for h in range(2 * g, 2 * g + 2):
                if place:
                    models.close(out[b, place, h], attention(q[b, h, place], *heads[n], window), TOLERANCE)
    padding = torch.zeros(batch, count, dtype=torch.bool) if real is None else ~real
    assert (out[padding] == 0).all()
    assert layer.bound >= int(layer.lengths.sum())
    assert (layer.cu_seqlens.diff() - layer.lengths >= layer.room).all()
    assert layer.room >= 0


LENGTHS = [4, 9, 1, 0, 30, 7]


@pytest.mark.parametrize("window", [None, 1, 3, 12])
def test_heads_of_all_lengths_attend(window: int | None) -> None:
    layer, heads = ragged(LENGTHS)
    assert layer.get_mask_sizes(3) == (43, 0)
    for step, count in enumerate((5, 1, 1, 12, *[1] * 3, 70, 1)):
        ask(layer, heads, count, None, step, window)
    assert layer.get_seq_length() == 40 + 93
    assert layer.since == 93


@pytest.mark.parametrize("window", [None, 6])
def test_padding_among_new_tokens_is_not_held(window: int | None) -> None:
    layer, heads = ragged(LENGTHS)
    real = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    ask(layer, heads, 5, real, 0, window)
    ask(layer, heads, 1, None, 1, window)
    ask(layer, heads, 1, torch.tensor([[True], [False]]), 2, window)
    ask(layer, heads, 5, real.flip(0, 1), 3, window)  # on the right
    ask(layer, heads, 2, torch.zeros(2, 2, dtype=torch.bool), 4, window)
    ask(layer, heads, 80, torch.arange(80) >= torch.tensor([[79], [3]]), 5, window)
    assert layer.seen == 40 + 94
    layer.rewind()
    assert layer.lengths.tolist() == LENGTHS
    fresh, fresh_heads = ragged(LENGTHS)
    assert layer.seen == fresh.seen
    ask(layer, fresh_heads, 3, None, 6, window)


def test_ragged_rows_are_taken_back() -> None:
    layer, heads = ragged(LENGTHS)
    ask(layer, heads, 6, None, 0, None)
    kept = [(k[:-4], v[:-4]) for k, v in heads]
    layer.crop(-4)
    ask(layer, kept, 3, None, 1, None)
    assert (layer.seen, layer.since) == (45, 5)
    with pytest.raises(ValueError, match="6 tokens, expected at most the 5 that came after the pruning"):
        layer.crop(-6)
    layer.crop(0)
    layer.rewind()
    assert (layer.seen, layer.since) == (40, 0)
    sizes = set()
    for turn in range(30):
        _, again = ragged(LENGTHS)
        for step, count in enumerate((9, 1, 1)):
            ask(layer, again, count, None, 10 * turn + step, None)
        layer.rewind()
        sizes.add(layer.nbytes)
    assert len(sizes) == 1


def test_ragged_sequences_are_chosen_and_repeated() -> None:
    layer, heads = ragged(LENGTHS)
    ask(layer, heads, 6, torch.arange(6) >= torch.tensor([[4], [0]]), 0, None)
    layer.batch_repeat_interleave(2)
    heads = heads[:G] * 2 + heads[G:] * 2
    ask(layer, heads, 1, None, 1, None)
    order = [3, 0, 2]
    layer.reorder_cache(torch.tensor(order))
    heads = [head for b in order for head in heads[b * G : (b + 1) * G]]
    ask(layer, heads, 4, None, 2, None)
    ask(layer, heads, 1, None, 3, None)
    assert layer.batch_size == 3
    positions = [[2 * i for i in range(n)] for n in LENGTHS]
    assert layer.positions.tolist() == [p for a, b in ((3, 6), (0, 3), (3, 6)) for head in positions[a:b] for p in head]
    layer.rewind()
    assert layer.lengths.tolist() == LENGTHS[3:] + LENGTHS[:3] + LENGTHS[3:]
    layer.batch_select_indices(torch.tensor([False, True, False]))
    assert layer.lengths.tolist() == LENGTHS[:3]
    with pytest.raises(ValueError, match=r"it holds 1 sequences, expected 2"):
        layer.update(*rows(1))


def test_a_ragged_layer_is_never_read_as_an_ordinary_one() -> None:
    layer, _ = ragged(LENGTHS)
    layer.in_session = False
    for call in (lambda: layer.get_mask_sizes(1), lambda: layer.update(*rows(1))):
        with pytest.raises(ValueError, match=r"expected the call inside `with cache.attached\(model\):`"):
            call()
    with pytest.raises(ValueError, match="cannot be emptied"):
        layer.reset()
    with pytest.raises(ValueError, match="expected a method without AdaKV"):
        layer.quantize("int8")
    layer.in_session = True
    with pytest.raises(ValueError, match="nothing is left of them behind the cache"):
        layer.get_mask_sizes(0)


def test_a_ragged_layer_is_away_and_comes_back() -> None:
    layer, heads = ragged(LENGTHS)
    layer.offload()
    layer.prefetch()
    ask(layer, heads, 3, None, 0, None)
    layer.to("meta")
    assert {t.device.type for t in layer.tensors()} == {"meta"}
    assert layer.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ragged_rows_of_sixteen_bits(dtype: torch.dtype) -> None:
    layer, heads = ragged(LENGTHS, dtype=dtype)
    k, v = (x.to(dtype) for x in rows(1, seed=3))
    q = rows(1, seed=4, heads=H)[0].to(dtype)
    out = layer.attend(q, k, v, None, Extras(0.3))
    assert out.dtype == dtype
    for b in range(B):
        for g in range(G):
            keys, values = (torch.cat([x, new[b, g]]) for x, new in zip(heads[b * G + g], (k, v), strict=True))
            expected = attention(q[b, 2 * g], keys, values, None)
            # Of the result's own rounding; what is between is fp32.
            models.close(out[b, :, 2 * g], expected, 2 * torch.finfo(dtype).eps)


def test_bytes_count_memory_once_and_with_room() -> None:
    layer, heads = ragged(LENGTHS)
    rows_bytes, numbers = 2 * sum(LENGTHS) * D * 4, 4 * (7 + 6 + sum(LENGTHS))
    assert layer.nbytes == rows_bytes + numbers  # offsets of the rows and of the kept ones are one tensor yet
    ask(layer, heads, 1, None, 0, None)
    room = 6 * (1 + GROWTH)
    assert layer.nbytes == rows_bytes + 2 * room * D * 4 + numbers + 4 * 7
    assert not math.isnan(layer.nbytes)
