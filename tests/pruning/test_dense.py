"""A context that is read once and pruned in many ways: every cache is the one that a prefill of its own gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.pruning import methods as m
from condense_core.pruning import wrappers as w
from condense_core.pruning.base import Method
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.dense import DensePrefill
from condense_core.pruning.prefill_inputs import checked_inputs
from condense_core.pruning.session import Session

Build = Callable[..., PreTrainedModel]
QUESTION = (5, 6, 7, 8)
METHODS: list[Method] = [
    m.SnapKV(keep=1.0),
    m.SnapKV(keep=0.5, window=8),
    m.ExpectedAttention(keep=0.3),
    m.Compactor(keep=0.5, chunk=16, sketch=8),
    m.LagKV(keep=0.5, lag=8),
    m.KVzip(keep=0.4, prompt_ids=(3, 4), chunk=32),
    m.KVzip(keep=0.2, prompt_ids=(3, 4), chunk=32),
    m.Surprise(keep=0.3),
    w.AdaKV(m.SnapKV(keep=0.5, window=8)),
    w.AdaKV(m.KVzip(keep=0.4, prompt_ids=(3, 4), chunk=32)),
    w.AcrossLayers(m.KVzip(keep=0.2, prompt_ids=(3, 4), chunk=32)),
    w.AcrossLayers(m.SnapKV(keep=0.3, window=8)),
    w.ChunkKV(m.SnapKV(keep=0.5, window=8)),
    w.CriticalKV(m.ObservedAttention(keep=0.3)),
    w.Merge(m.NonCausal(keep=0.3, chunk=16)),
    w.PyramidKV(m.SnapKV(keep=0.4, window=8), 2),
    w.QueryAware(m.SnapKV(keep=0.3), QUESTION),
    w.Rerotate(m.KeyDiff(keep=0.2)),
    w.Sentences(m.Surprise(keep=0.3)),
    w.Sentences(w.QueryAware(m.PeakAttention(keep=0.3), QUESTION)),
    w.Rerotate(w.Sentences(w.QueryAware(m.PeakAttention(keep=0.3), QUESTION))),
    w.Threshold(m.SnapKV(keep=0.5, window=8), 0.01, 2, 8),
]


def context(num_tokens: int = 90) -> Tensor:
    return torch.randint(3, 400, (1, num_tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_every_cache_is_that_of_a_prefill_bit_for_bit(lively_model: Build, family: str) -> None:
    model = lively_model(family)
    dense = DensePrefill(model, context())
    for method in METHODS:
        found, expected = dense.prune(method), PrunedCache.prefill(model, context(), method)
        assert repr(found) == repr(expected)
        assert found.lengths == expected.lengths
        for own, other in zip(found.layers, expected.layers, strict=True):
            assert type(own) is type(other), method
            assert own.seen == other.seen
            for name in ("keys", "values", "positions"):
                mine, theirs = getattr(own, name), getattr(other, name)
                assert (mine is None and theirs is None) or torch.equal(mine, theirs), f"{name} of {method!r}"


def test_a_sliding_window_is_that_of_a_prefill(lively_model: Build) -> None:
    model = lively_model("mistral", sliding_window=40)
    dense = DensePrefill(model, context())
    for method in (m.SnapKV(keep=0.5, window=8), m.KeyDiff(keep=0.2)):
        found, expected = dense.prune(method), PrunedCache.prefill(model, context(), method)
        for own, other in zip(found.layers, expected.layers, strict=True):
            assert torch.equal(own.keys, other.keys)
            assert torch.equal(own.positions, other.positions)


def test_a_cache_leaves_the_context_as_it_was(lively_model: Build) -> None:
    """What is asked of one cache grows that cache alone, also where it holds the whole context."""
    model = lively_model()
    dense = DensePrefill(model, context())
    first = dense.prune(m.SnapKV(keep=1.0))
    kept = [layer.keys.clone() for layer in first.layers]
    model.generate(**first.inputs(torch.tensor([[7, 8, 9]])), max_new_tokens=3, do_sample=False, pad_token_id=0)
    second = dense.prune(m.SnapKV(keep=1.0))
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(second.layers, kept, strict=True))


def test_what_does_not_depend_on_the_share_is_computed_once(
    lively_model: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = lively_model(), [0, 0]
    score, read = m.KVzip.score, Session.prefill

    def counted(*args: object) -> Tensor:
        calls[0] += 1
        return score(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(m.KVzip, "score", counted)
    dense = DensePrefill(model, context())
    seconds = []
    for share in (0.5, 0.25, 0.125):
        dense.prune(m.KVzip(keep=share))
        seconds.append(dense.seconds)
    assert calls[0] == len(dense.prune(m.Knorm(keep=0.5)).layers)
    assert min(seconds) > dense.seconds  # what is shared is counted in the time of every cache
    assert read is Session.prefill


def test_questions_that_are_forgotten_are_read_again(lively_model: Build) -> None:
    model = lively_model()
    dense = DensePrefill(model, context())
    for i in range(40):
        method = w.QueryAware(m.PeakAttention(keep=0.3), (3 + i, 4))
        found = dense.prune(method)
        if i % 13 == 0:
            expected = PrunedCache.prefill(model, context(), method)
            assert all(torch.equal(a.keys, b.keys) for a, b in zip(found.layers, expected.layers, strict=True))


def test_one_sequence_is_expected(lively_model: Build) -> None:
    model = lively_model()
    with pytest.raises(ValueError, match="input_ids: 2 sequences, expected one"):
        DensePrefill(model, context().repeat(2, 1))
    assert checked_inputs(model, context(), None, None)[1] is None
