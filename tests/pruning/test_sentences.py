"""Sentences: whole sentences, the same ones in every head of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.compressor.condenser import Condenser
from condense_core.pruning import methods as m
from condense_core.pruning import text
from condense_core.pruning.base import LayerContext, Method
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.wrappers import AdaKV, Decoding, PyramidKV, QueryAware, Sentences, Threshold
from condense_testing.pruning.method_cases import INF, make_case

Build = Callable[..., PreTrainedModel]
STARTS = (5, 12, 13, 40, 61)


def of_layers(count: int, **case: Any) -> tuple[list[Tensor], list[LayerContext]]:
    """Random scores ``[2, 2, 83]`` of ``count`` layers, with padding at -inf, and their contexts."""
    ctx = make_case(**case).ctx
    contexts = [replace(ctx, layer_idx=i, num_layers=count) for i in range(count)]
    generator = torch.Generator().manual_seed(4)
    return [one.protect(torch.rand(2, 2, 83, generator=generator), sink=2) for one in contexts], contexts


def expected(scores: list[Tensor], layers: range, b: int, place: int, length: int, starts: tuple[int, ...]) -> float:
    """The score of position ``place`` of a sequence of ``length`` tokens, which end at the last column."""
    edges = [0, *[start for start in starts if start < length], length]
    first, last = next((a, z) for a, z in pairwise(edges) if a <= place < z)
    if first == 0:
        return INF
    total = 0.0
    for position in range(first, last):
        total += sum(float(scores[i][b, :, 83 - length + position].max()) for i in layers) / len(layers)
    return total / (last - first)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_middle_layers_score_whole_sentences_for_all(padding: str) -> None:
    scores, contexts = of_layers(6, padding=padding)
    method = Sentences(m.SnapKV(keep=0.5, window=8), layers=(0.4, 0.67), starts=STARTS)
    found = method.across(scores, contexts)
    lengths = contexts[0].lengths
    for own, before in zip(found, scores, strict=True):
        assert torch.equal(own.isinf() & (own < 0), before == -INF)
        for b, length in enumerate(lengths):
            for place in range(2, length):  # the two sinks are forced; layers 0.4 * 6 to 0.67 * 6, rounded outwards
                value = expected(scores, range(2, 5), b, place, length, STARTS)
                assert own[b, 0, 83 - length + place] == own[b, 1, 83 - length + place]
                assert float(own[b, 0, 83 - length + place]) == pytest.approx(value, rel=1e-5)


def test_runs_of_tokens_stand_for_sentences_that_are_not_known() -> None:
    scores, contexts = of_layers(1)
    found = Sentences(m.SnapKV(keep=0.5, window=8), width=10).across(scores, contexts)[0]
    token = scores[0].amax(1)
    assert torch.allclose(found[:, 0, 10:20], token[:, 10:20].mean(1, keepdim=True).expand(-1, 10))
    assert torch.allclose(found[:, 0, 80:83], token[:, 80:83].mean(1, keepdim=True).expand(-1, 3))
    assert torch.allclose(found[:, 1, 2:10], token[:, 2:10].mean(1, keepdim=True).expand(-1, 8))


@pytest.mark.parametrize("chunk_size", [None, 25])
def test_every_head_of_every_layer_keeps_the_same_tokens(lively_model: Build, chunk_size: int | None) -> None:
    ids = torch.randint(3, 400, (1, 90), generator=torch.Generator().manual_seed(1))
    for method in (m.Surprise(keep=0.3), m.SnapKV(keep=0.3, window=8)):
        cache = PrunedCache.prefill(lively_model(), ids, Sentences(method, width=9), chunk_size=chunk_size)
        first = cache.layers[0].positions[0, 0]
        assert len(first) == 27
        assert cache.is_uniform
        for layer in cache.layers:
            assert (layer.positions == first).all()


def test_sentences_are_those_of_the_text(tiny_condenser: Condenser) -> None:
    """Whole sentences stay, of the last one that fits in part its first tokens, and what the template wrote."""
    context = "The old mill burned down. A new one was built in 1871! Who paid for it? Nobody knows.\nThe end."
    model, tokenizer = tiny_condenser.model, tiny_condenser.tokenizer
    cache = text.prefill(model, tokenizer, context, Sentences(m.Surprise(keep=0.5, sink=0)))
    prompt = text.prompt_of(model, tokenizer, context)
    edges = [*prompt.sentence_starts(), len(prompt.input_ids)]
    assert len(edges) == 6
    kept = set(cache.layers[0].positions[0, 0].tolist())
    assert set(range(edges[0])) <= kept
    counts = [len(kept & set(range(a, z))) / (z - a) for a, z in pairwise(edges)]
    assert 0 in counts
    assert 1 in counts
    assert len([share for share in counts if 0 < share < 1]) <= 1
    assert "starts" not in repr(cache)
    assert (
        len({repr(cache), repr(text.prefill(model, tokenizer, context, Sentences(m.Surprise(keep=0.5, sink=0))))}) == 1
    )


def test_the_question_decides(tiny_condenser: Condenser) -> None:
    context = " ".join(f"The gate number {i} is {name}." for i, name in enumerate(["red", "blue", "green", "grey"] * 6))
    model, tokenizer = tiny_condenser.model, tiny_condenser.tokenizer
    kept = []
    for question in ("Which gate is grey?", "Tell me the weight of the old barn."):
        ids = tuple(text.question_ids(tokenizer, question))
        method = Sentences(QueryAware(m.PeakAttention(keep=0.3), ids))
        kept.append(text.prefill(model, tokenizer, context, method).layers[0].positions[0, 0].tolist())
    assert kept[0] != kept[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sentences(m.SnapKV(keep=0.5), width=0), "Sentences: width is 0"),
        (lambda: Sentences(m.SnapKV(keep=0.5), layers=(0.5, 0.2)), "Sentences: layers is .* two shares"),
        (lambda: Sentences(AdaKV(m.SnapKV(keep=0.5))), "Sentences: method is AdaKV.* different numbers"),
        (lambda: Sentences(PyramidKV(m.SnapKV(keep=0.5))), "Sentences: method is PyramidKV.* different numbers"),
        (lambda: Sentences(Threshold(m.SnapKV(keep=0.5), 0.1)), "Sentences: method is Threshold"),
        (lambda: Sentences(Decoding(m.SnapKV(keep=0.5), 9)), "Sentences: method is Decoding"),
    ],
)
def test_bad_settings(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
