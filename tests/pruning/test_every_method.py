"""Every method and wrapper of the registries in a session around ``generate``: alone, in a padded batch, ragged.

What a session adds to a method is the same for all, so its correctness is held against an oracle elsewhere
(``test_session.py``, ``test_cache.py``), and that of the scores in ``test_methods.py``. Here every one of them runs
from end to end: it keeps what it was asked to keep, and a sequence answers in a batch what it answers alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from condense_core.pruning import METHODS, WRAPPERS, AdaKV, Method, SnapKV, Threshold, prune
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.ragged import RaggedLayer

Build = Callable[..., PreTrainedModel]

NUM_LAYERS, KV_HEADS, HEAD_DIM, WIDTH = 3, 2, 12, 48
LENGTHS = (90, 61, 44)
# Below the defaults, which would protect all of so few tokens.
SETTINGS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 8},
    "finch": {"window": 8},
    "peak_attention": {"window": 8},
    "lagkv": {"lag": 8},
    "non_causal": {"chunk": 16},
    "compactor": {"chunk": 16, "sketch": 8},
    "leverage": {"sketch": 8},
    "kvzip": {"chunk": 32, "prompt_ids": (7, 8)},
    "kvzap": {"surrogate": torch.randn(NUM_LAYERS, KV_HEADS, WIDTH + 1, generator=torch.Generator().manual_seed(4))},
    "qfilter": {"filters": torch.randn(NUM_LAYERS, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))},
}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "pyramidkv": (2,),  # the first layer then evicts as well, at 60%
    "per_layer": ((0.8, 0.5, 0.4),),
    "threshold": (0.02, 2, 8),
    "decoding": (30, 4),
    "query_aware": ((5, 6, 7, 8),),
}


def batch() -> tuple[Tensor, Tensor]:
    """Ids ``[3, 90]`` and the mask of their padding on the left."""
    ids = torch.randint(3, 400, (3, LENGTHS[0]), generator=torch.Generator().manual_seed(1))
    mask = torch.stack([torch.arange(LENGTHS[0]) >= LENGTHS[0] - n for n in LENGTHS]).long()
    return ids * mask, mask


def generated(model: PreTrainedModel, method: Method, ids: Tensor, mask: Tensor) -> tuple[Tensor, DynamicCache]:
    """Five new tokens ``[B, 5]`` and the cache behind them."""
    with prune(model, method):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
    return out.sequences[:, ids.shape[1] :], out.past_key_values


def held(cache: DynamicCache, index: int) -> list[list[int]]:
    """Tokens that each head of each sequence holds in a layer."""
    layer: Any = cache.layers[index]
    if isinstance(layer, RaggedLayer):
        counts: list[list[int]] = layer.lengths.view(layer.batch, -1).tolist()
        return counts
    assert isinstance(layer, UniformLayer)
    return [[layer.held] * KV_HEADS] * layer.batch_size


def check(model: PreTrainedModel, method: Method) -> None:
    """It keeps what it should, alone and in a batch, where it answers the same."""
    ids, mask = batch()
    together, cache = generated(model, method, ids, mask)
    assert all(isinstance(layer, RaggedLayer) for layer in cache.layers)
    for b, length in enumerate(LENGTHS):
        alone, own = generated(model, method, ids[b : b + 1, -length:], mask[b : b + 1, -length:])
        assert alone.tolist() == together[b : b + 1].tolist(), f"sequence {b} of {method!r}"
        since = 4 * KV_HEADS  # of five new tokens the last is not read
        expected = [KV_HEADS * method.num_kept(length, index, NUM_LAYERS) + since for index in range(NUM_LAYERS)]
        competing = method.traits.whole_model and method.traits.layers_differ
        if competing:
            assert sum(sum(held(own, index)[0]) for index in range(NUM_LAYERS)) == sum(expected)
        for index in range(NUM_LAYERS):
            counts = held(own, index)
            assert counts[0] == held(cache, index)[b]
            if competing:
                continue
            if method.traits.bounded:
                assert sum(counts[0]) == expected[index]
            else:
                assert since < sum(counts[0]) < KV_HEADS * length + since
            assert method.traits.ragged or len(set(counts[0])) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "adakv"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method(lively_model: Build, name: str, ragged: bool, attention: str) -> None:
    method: Method = METHODS[name](keep=0.6, **SETTINGS.get(name, {}))
    check(lively_model("mistral", attention), AdaKV(method) if ragged else method)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "decoding"])
def test_every_wrapper(lively_model: Build, name: str, attention: str) -> None:
    method = WRAPPERS[name](SnapKV(keep=0.6, window=8), *ARGUMENTS.get(name, ()))
    check(lively_model("mistral", attention), method)


def test_decoding_evicts_down_to_its_budget(lively_model: Build) -> None:
    method = WRAPPERS["decoding"](SnapKV(keep=0.6, window=8), *ARGUMENTS["decoding"])
    ids, mask = batch()
    _, cache = generated(lively_model(), method, ids[:1], mask[:1])
    # 54 of 90 tokens; with the first new one they are more than 30 + 4, so 30 stay, and three more follow.
    assert [held(cache, index) for index in range(NUM_LAYERS)] == [[[33, 33]]] * NUM_LAYERS
    with pytest.raises(ValueError, match="cannot evict from a padded batch"):
        generated(lively_model(), method, ids, mask)


def test_a_threshold_below_all_scores_keeps_everything(lively_model: Build) -> None:
    ids, mask = batch()
    method = Threshold(SnapKV(keep=0.6, window=8), -1.0)
    _, cache = generated(lively_model(), method, ids[:1], mask[:1])
    assert held(cache, 0) == [[94, 94]]
