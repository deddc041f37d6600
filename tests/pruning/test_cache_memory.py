"""What a cache occupies: 8 bits, bytes, devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV, Decoding
from condense_testing.pruning import models
from condense_testing.pruning.sessions import (
    ALL,
    EVICTING,
    HALF,
    NUM_TOKENS,
    TOLERANCE,
    Build,
    generate,
    tokens,
)

# Relative error of a row's numbers: half a step of 1/127 of the largest one; half of e4m3's last of three bits.
STORAGES = {"int8": 0.5 / 127, "fp8": 2**-4}


@pytest.mark.parametrize("storage", STORAGES)
def test_eight_bits(lively_model: Build, storage: str) -> None:
    model, context, question = lively_model(), tokens(1, NUM_TOKENS), tokens(1, 9, seed=1)
    for method in (HALF, ALL):
        whole, small = (PrunedCache.prefill(model, context, method) for _ in range(2))
        assert small.quantize(storage) is small
        # fp32 becomes a byte, for a row of 12 with four bytes of scale; the position takes four in both.
        assert small.nbytes < whole.nbytes * (0.4 if method is HALF else 0.45)
        assert small.get_seq_length() == NUM_TOKENS
        for a, b in zip(whole.layers, small.layers, strict=True):
            for x, y in ((a.keys, b.keys), (a.values, b.values)):
                assert ((x - y).abs() <= STORAGES[storage] * x.abs().amax(-1, keepdim=True) * 1.001).all()
        with torch.no_grad():
            first = model(**small.inputs(question)).logits
        models.close(first, model(**whole.inputs(question)).logits, 0.5 if storage == "fp8" else 0.1)
        small.rewind()
        assert small.get_seq_length() == NUM_TOKENS
        with torch.no_grad(), small.attached(model):
            assert torch.equal(model(**small.inputs(question)).logits, first)
    with pytest.raises(ValueError, match="expected one of int8, fp8"):
        PrunedCache.prefill(model, context, HALF).quantize("int4")
    with pytest.raises(ValueError, match="expected a method without AdaKV"):
        PrunedCache.prefill(model, context, AdaKV(HALF)).quantize("int8")


def test_an_eviction_leaves_eight_bits(lively_model: Build) -> None:
    model, method = lively_model(), Decoding(HALF, 40, interval=4)
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), HALF).quantize("int8")
    with prune(model, method):
        generate(model, cache.inputs(tokens(1, 1, seed=1)), count=3)
    for layer in cache.layers:
        assert layer.stored is not None
        assert layer.stored.storage == "int8"
        assert layer.held == 40 + layer.since
        assert layer.num_kept == layer.stored.length == 40


def test_padding_stays_padding_in_eight_bits(lively_model: Build) -> None:
    model, question = lively_model(), tokens(2, 9, seed=1)
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 40), "left")
    cache = PrunedCache.prefill(model, ids, ALL, attention_mask=mask).quantize("int8")
    with torch.no_grad():
        expected = model(**cache.inputs(question)).logits
        cache.rewind()
        with cache.attached(model):
            models.close(model(**cache.inputs(question)).logits, expected, TOLERANCE)


@pytest.mark.parametrize("name", [*EVICTING, "all"])
def test_bytes_are_those_of_the_memory_behind_the_tensors(lively_model: Build, name: str) -> None:
    model, question = lively_model(), tokens(2, 9, seed=1)
    cache = PrunedCache.prefill(model, tokens(2, NUM_TOKENS), EVICTING.get(name, ALL))

    def occupied() -> int:
        """Of all tensors that the layers can reach, whatever they say themselves."""
        found: dict[int, int] = {}
        queue: list[Any] = [vars(layer) for layer in cache.layers]
        while queue:
            item = queue.pop()
            if isinstance(item, Tensor):
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            elif isinstance(item, dict):
                queue.extend(item.values())
            elif isinstance(item, list | tuple):
                queue.extend(item)
            elif hasattr(item, "__dict__"):
                queue.append(vars(item))
        return sum(found.values())

    full = 2 * NUM_TOKENS * 3 * 2 * 2 * 12 * 4  # sequences, tokens, layers, heads, k and v, head_dim, bytes
    assert cache.nbytes == occupied()
    assert cache.full_nbytes == full
    assert cache.ratio == full / cache.nbytes
    if name != "all":
        assert 1.7 < cache.ratio < 2
    assert f"{cache.ratio:.2f}x smaller" in repr(cache)
    with cache.attached(model):
        generate(model, cache.inputs(question))
    assert cache.nbytes == occupied()
    if "ragged" not in name:
        cache.quantize()
        assert cache.nbytes == occupied()


@pytest.mark.parametrize("name", EVICTING)
def test_a_cache_moves(lively_model: Build, name: str) -> None:
    model, context, question = lively_model(), tokens(1, NUM_TOKENS), tokens(1, 9, seed=1)
    cache = PrunedCache.prefill(model, context, EVICTING[name])
    with cache.attached(model):
        expected = generate(model, cache.inputs(question)).tolist()
    cache.rewind()
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert cache.to("cpu") is cache
    with cache.attached(model):
        assert generate(model, cache.inputs(question)).tolist() == expected
    if name != "pyramid":
        away = cache.to("meta")
        assert {t.device.type for layer in away.layers for t in layer.tensors()} == {"meta"}
