"""The layers of a pruned cache by themselves: against tensors that are concatenated, and attention in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pruning_models as models
import pytest
import torch
from torch import Tensor

from condense_core.pruning.extras import Extras
from condense_core.pruning.layers import GROWTH, ReadOnlyLayer, UniformLayer
from condense_core.pruning.quantized import Quantized
from condense_core.pruning.ragged import RaggedLayer

B, G, H, D = 2, 3, 6, 8
TOLERANCE = 2e-6  # fp32 sums of some ten products, relative to float64


def rows(count: int, seed: int = 0, heads: int = G, batch: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, heads, count, D, generator=generator)
    return keys, values


def pruned_uniform(kept: int = 5, seen: int = 20) -> tuple[UniformLayer, Tensor, Tensor]:
    """A layer that kept every fourth of ``seen`` tokens."""
    layer, (keys, values) = UniformLayer(), rows(seen)
    positions = torch.arange(0, seen, seen // kept)[:kept].expand(B, G, -1)
    keys, values = keys[:, :, positions[0, 0]], values[:, :, positions[0, 0]]
    layer.hold_kept(keys, values, positions, seen)
    return layer, keys.clone(), values.clone()


# -- uniform -----------------------------------------------------------------------------------------------------------


def test_a_growing_layer_holds_what_came() -> None:
    layer = UniformLayer()
    expected = [torch.empty(B, G, 0, D)] * 2
    total = 0
    for step, count in enumerate((7, 1, 1, 5, *[1] * 70, 30, 1)):
        new = rows(count, seed=step)
        expected = [torch.cat(pair, 2) for pair in zip(expected, new, strict=True)]
        total += count
        sizes = layer.get_mask_sizes(count)
        found = layer.update(*new)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert torch.equal(layer.keys, expected[0])
        assert sizes == (total, 0)
        assert layer.get_seq_length() == layer.held == total
        assert layer.all_positions() is None
        assert layer.since == total - 7
    assert layer.get_max_length() == -1
    assert layer.batch_size == B


def test_room_is_added_in_steps_not_for_every_token() -> None:
    layer = UniformLayer()
    layer.update(*rows(10))
    buffers = set()
    for _ in range(3 * GROWTH):
        layer.update(*rows(1))
        assert layer._keys is not None
        buffers.add(layer._keys.shape[2])
    assert buffers == {10 + 1 + GROWTH, 10 + 2 * (1 + GROWTH), 10 + 3 * (1 + GROWTH)}
    assert layer.nbytes == 2 * B * G * max(buffers) * D * 4


def test_a_pruned_layer_goes_on_behind_what_it_saw() -> None:
    layer, keys, values = pruned_uniform()
    assert layer.get_seq_length() == 20
    assert layer.get_mask_sizes(3) == (8, 15)
    new = rows(3, seed=1)
    found = layer.update(*new)
    assert torch.equal(found[0], torch.cat([keys, new[0]], 2))
    assert torch.equal(found[1], torch.cat([values, new[1]], 2))
    assert layer.all_positions()[1, 2].tolist() == [0, 4, 8, 12, 16, 20, 21, 22]  # type: ignore[index]
    assert (layer.held, layer.seen, layer.since) == (8, 23, 3)


def test_a_layer_that_kept_nothing_goes_on() -> None:
    layer = UniformLayer()
    empty = torch.empty(B, G, 0, D)
    layer.hold_kept(empty, empty, torch.empty(B, G, 0), 20)
    new = rows(2)
    assert torch.equal(layer.update(*new)[0], new[0])
    assert layer.get_seq_length() == 22
    assert layer.all_positions()[0, 0].tolist() == [20, 21]  # type: ignore[index]


@pytest.mark.parametrize("storage", [None, "int8", "fp8"])
def test_cropping_takes_back_what_came_last(storage: str | None) -> None:
    layer, _, _ = pruned_uniform()
    if storage is not None:
        layer.quantize(storage)
    before = layer.keys.clone()  # type: ignore[union-attr]
    new = rows(6, seed=1)
    layer.update(*new)
    layer.crop(-2)
    layer.crop(0)
    assert torch.equal(layer.keys, torch.cat([before, new[0][:, :, :4]], 2))
    assert (layer.held, layer.seen, layer.since) == (9, 24, 4)
    for wrong in (-5, -9):
        with pytest.raises(ValueError, match="expected at most the 4 that came after the pruning"):
            layer.crop(wrong)
    with pytest.raises(ValueError, match="expected minus the number of tokens"):
        layer.crop(1)
    layer.rewind()
    assert torch.equal(layer.keys, before)
    assert (layer.held, layer.seen, layer.since) == (5, 20, 0)
    again = rows(1, seed=2)
    assert torch.equal(layer.update(*again)[1][:, :, -1:], again[1])


def test_an_unpruned_layer_rewinds_to_its_prefill_and_crops_further() -> None:
    layer = UniformLayer()
    keys, values = rows(10)
    layer.update(keys[:, :, :6], values[:, :, :6])
    layer.update(keys[:, :, 6:], values[:, :, 6:])
    layer.end_prefill()
    for _ in range(2):
        layer.update(*rows(3, seed=1))
        layer.update(*rows(1, seed=2))
        layer.rewind()
        assert torch.equal(layer.keys, keys)
        assert (layer.seen, layer.since) == (10, 0)
    layer.crop(-4)
    assert torch.equal(layer.keys, keys[:, :, :6])
    layer.update(*rows(2))
    layer.rewind()
    assert layer.seen == 6


@pytest.mark.parametrize("storage", [None, "int8"])
def test_sequences_are_chosen_and_repeated(storage: str | None) -> None:
    layer, _, _ = pruned_uniform()
    if storage is not None:
        layer.quantize(storage)
    layer.update(*rows(3, seed=1))
    layer.recent = torch.randn(B, H, 4, D)
    keys, values, recent = layer.keys.clone(), layer.values.clone(), layer.recent  # type: ignore[union-attr]
    layer.batch_repeat_interleave(3)
    assert layer.batch_size == 6
    assert torch.equal(layer.keys, keys.repeat_interleave(3, 0))
    layer.reorder_cache(torch.tensor([5, 0, 4]))
    assert torch.equal(layer.keys, keys[[1, 0, 1]])
    assert torch.equal(layer.values, values[[1, 0, 1]])
    assert torch.equal(layer.recent, recent[[1, 0, 1]])
    layer.batch_select_indices(torch.tensor([1]))
    assert torch.equal(layer.update(*rows(1, batch=1))[0][:, :, :-1], keys[:1])
    assert layer.positions.shape == (1, G, 5)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"it holds 1 sequences, expected 2"):
        layer.update(*rows(1))


def test_an_empty_layer_takes_every_call() -> None:
    layer = UniformLayer()
    assert layer.batch_size == -1
    assert layer.keys is layer.values is None
    for call in (layer.rewind, layer.offload, layer.prefetch, lambda: layer.to("cpu"), lambda: layer.crop(0)):
        call()
    layer.batch_repeat_interleave(2)
    layer.quantize("int8")
    assert layer.nbytes == layer.get_seq_length() == 0
    layer.lazy_initialization(*rows(0))
    assert layer.is_initialized
    assert layer.get_seq_length() == 0
    new = rows(4)
    assert torch.equal(layer.update(*new)[0], new[0])


def test_a_layer_becomes_empty_again() -> None:
    layer, _, _ = pruned_uniform()
    layer.reset()
    assert (layer.seen, layer.held, layer.since, layer.num_kept, layer.keys) == (0, 0, 0, None, None)
    layer.update(*rows(2))
    assert layer.get_seq_length() == 2


def test_a_layer_is_away_and_comes_back() -> None:
    """The other device is the meta device: what comes back is empty, but everything has moved."""
    layer, keys, _ = pruned_uniform()
    layer.update(*rows(1))
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys[:, :, :5], keys)  # type: ignore[index]
    layer.device = torch.device("meta")
    layer.prefetch()
    assert {t.device.type for t in layer.tensors()} == {"meta"}


def test_queries_look_at_layers_of_one_size_only() -> None:
    layer, _, _ = pruned_uniform()
    layer.uneven = True
    with pytest.raises(ValueError, match="its layers hold different numbers of tokens"):
        layer.get_mask_sizes(3)
    layer.in_session = True
    assert layer.get_mask_sizes(3) == (8, 15)
    with pytest.raises(ValueError, match="nothing is left of them behind the cache"):
        layer.get_mask_sizes(0)


def test_a_passing_layer_forgets() -> None:
    layer, (keys, values) = ReadOnlyLayer(), rows(5)
    layer.hold(keys, values, 5)
    for seed in (1, 2):
        new = rows(3, seed=seed)
        found = layer.update(*new)
        assert torch.equal(found[0], torch.cat([keys, new[0]], 2))
        assert torch.equal(found[1], torch.cat([values, new[1]], 2))
    assert torch.equal(layer.keys, keys)
    assert layer.get_seq_length() == 5


# -- 8 bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_a_row_is_off_by_half_a_step_of_its_own(storage: str, dtype: torch.dtype) -> None:
    keys, values = rows(200)
    keys, values = (keys * torch.logspace(-3, 3, 200)[:, None]).to(dtype), values.to(dtype)
    keys[0, 0, 0], values[0, 0, 1] = 0, torch.finfo(dtype).max if dtype == torch.float16 else 1e30
    quantized = Quantized.of(keys, values, storage)
    assert quantized.length == 200
    for which, x in enumerate((keys, values)):
        exact, largest = x.double(), x.double().abs().amax(-1, keepdim=True)
        error = (quantized.restore(which, torch.float32).double() - exact).abs()
        if storage == "int8":
            bound = largest / 254
        else:  # e4m3 has three bits behind the leading one, down to 2^-6; below, steps of 2^-9; 448 is the largest
            bound = torch.maximum(exact.abs() * 2**-4, largest / 448 * 2**-10)
        assert (error <= bound * (1 + 1e-5)).all()
        restored = quantized.restore(which, dtype)
        assert restored.dtype == dtype
        assert restored.isfinite().all()
    assert (quantized.restore(0, dtype)[0, 0, 0] == 0).all()
    assert sum(t.nbytes for t in quantized.tensors()) == 2 * B * G * 200 * (D + 4)


def test_what_comes_later_is_not_quantised() -> None:
    layer, keys, values = pruned_uniform()
    layer.update(*rows(2, seed=1))
    layer.quantize("int8")
    nbytes = layer.nbytes
    layer.quantize("int8")  # once is enough
    assert layer.nbytes == nbytes
    new = rows(3, seed=2)
    found_keys, found_values = layer.update(*new)
    assert layer.held == 10
    for found, kept, earlier, later in zip(
        (found_keys, found_values), (keys, values), rows(2, seed=1), new, strict=True
    ):
        assert torch.equal(found[:, :, 5:], torch.cat([earlier, later], 2))
        assert 0 < (found[:, :, :5] - kept).abs().max() <= kept.abs().max() / 254 * 1.001


# -- ragged ------------------------------------------------------------------------------------------------------------


def ragged(lengths: list[int], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[RaggedLayer, list[Any]]:
    """A layer, and the rows of each of its heads."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, sum(lengths), D, generator=generator).to(dtype)
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    positions = torch.cat([torch.arange(length) * 2 for length in lengths])
    layer = RaggedLayer(
        keys.clone(),
        values.clone(),
        torch.tensor(edges),
        batch=len(lengths) // G,
        kv_heads=G,
        positions=positions,
        seen=40,
    )
    layer.in_session = True
    return layer, [(keys[a:b], values[a:b]) for a, b in pairwise(edges)]


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
