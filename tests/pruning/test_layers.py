"""Uniform layers of a pruned cache: against tensors that are concatenated."""

from __future__ import annotations

import pytest
import torch

from condense_core.pruning.layers import GROWTH, ReadOnlyLayer, UniformLayer
from condense_core.pruning.quantized import Quantized
from condense_testing.pruning.layer_cases import B, D, G, H, pruned_uniform, rows


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
