"""``PrunedCache``: contexts read once and kept in part answer as the reference in loops does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.methods.knorm import Knorm
from condense_core.pruning.methods.kvzip import KVzip
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.methods.tova import TOVA
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV, PyramidKV, Rerotate, Threshold
from condense_testing.pruning import models
from condense_testing.pruning.sessions import (
    ALL,
    ATTENTIONS,
    EVICTING,
    FAMILIES,
    FAMILY_ATTENTIONS,
    HALF,
    LENGTHS,
    NUM_TOKENS,
    SLIDING_ATTENTIONS,
    TOLERANCE,
    Build,
    answers,
    check,
    generate,
    tokens,
)


@pytest.mark.parametrize(("family", "attention"), FAMILY_ATTENTIONS)
def test_a_whole_context_answers_as_its_prompt_does(lively_model: Build, family: str, attention: str) -> None:
    model, context, question = lively_model(family, attention), tokens(1, NUM_TOKENS), tokens(1, 9, seed=1)
    expected = answers(model, torch.cat([context, question], 1)).tolist()
    for chunk_size in (None, 1, 7, 64, NUM_TOKENS - 1, NUM_TOKENS, 2 * NUM_TOKENS):
        cache = PrunedCache.prefill(model, context, ALL, chunk_size=chunk_size)
        assert cache.is_uniform
        assert generate(model, cache.inputs(question)).tolist() == expected, chunk_size
        cache.rewind()
        assert cache.get_seq_length() == NUM_TOKENS
        with cache.attached(model):
            assert generate(model, cache.inputs(question)).tolist() == expected, chunk_size


@pytest.mark.parametrize(("window", "attention"), SLIDING_ATTENTIONS)
def test_a_whole_context_in_a_sliding_window(lively_model: Build, window: int, attention: str) -> None:
    model = lively_model("mistral", attention, sliding_window=window)
    context, question = tokens(1, NUM_TOKENS), tokens(1, 9, seed=1)
    expected = answers(model, torch.cat([context, question], 1), 30).tolist()
    for chunk_size in (None, 7, 64):
        cache = PrunedCache.prefill(model, context, ALL, chunk_size=chunk_size)
        assert generate(model, cache.inputs(question), 30).tolist() == expected
    # All that later tokens see, heads in competition or not, moved or not.
    for method in (
        SnapKV(budget=60, window=8),
        AdaKV(SnapKV(budget=60, window=8)),
        Rerotate(SnapKV(budget=60, window=8)),
    ):
        cache = PrunedCache.prefill(model, context, method if window == 24 else ALL)
        with cache.attached(model):
            assert generate(model, cache.inputs(question), 30).tolist() == expected
    assert window == 200 or cache.lengths == (23,) == (cache.get_seq_length() - 38,)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_contexts_of_a_batch(lively_model: Build, family: str, side: str) -> None:
    model, question = lively_model(family), tokens(3, 9, seed=1)
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), LENGTHS, side)
    expected = [answers(model, torch.cat([s, q])[None])[0].tolist() for s, q in zip(sequences, question, strict=True)]
    for chunk_size in (None, 16):
        cache = PrunedCache.prefill(model, ids, ALL, attention_mask=mask, chunk_size=chunk_size)
        assert cache.lengths == cache.context_tokens == LENGTHS
        with cache.attached(model):
            assert generate(model, cache.inputs(question)).tolist() == expected
    cache = PrunedCache.prefill(model, ids, ALL, attention_mask=mask)
    assert generate(model, cache.inputs(question)).tolist() == expected  # all hold equally many: nothing to attach


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_sees_the_kept_tokens(lively_model: Build, family: str, attention: str, name: str) -> None:
    model, context, method = lively_model(family, attention), tokens(1, NUM_TOKENS), EVICTING[name]
    cache = PrunedCache.prefill(model, context, method)
    assert cache.is_uniform == (name == "uniform")
    total = sum(len(head) for layer in models.kept(cache, 0, NUM_TOKENS) for head in layer)
    assert total == 2 * sum(method.num_kept(NUM_TOKENS, index, 3) for index in range(3))
    check(model, cache, [context[0]], tokens(1, 9, seed=1))


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_of_a_batch_see_each_contexts_kept_tokens(lively_model: Build, side: str, name: str) -> None:
    model = lively_model("qwen3")
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), LENGTHS, side)
    cache = PrunedCache.prefill(model, ids, EVICTING[name], attention_mask=mask)
    check(model, cache, sequences, tokens(3, 9, seed=1))


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("chunk_size", [None, 20])
def test_a_batch_gives_what_each_sequence_gives(lively_model: Build, chunk_size: int | None, name: str) -> None:
    model, question = lively_model("llama"), tokens(3, 9, seed=1)
    for side in ("left", "right"):
        ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), LENGTHS, side)
        cache = PrunedCache.prefill(model, ids, EVICTING[name], attention_mask=mask, chunk_size=chunk_size)
        with cache.attached(model):
            together = generate(model, cache.inputs(question))
        for b, sequence in enumerate(sequences):
            alone = PrunedCache.prefill(model, sequence[None], EVICTING[name], chunk_size=chunk_size)
            assert models.kept(alone, 0, len(sequence)) == models.kept(cache, b, len(sequence))
            with alone.attached(model):
                assert generate(model, alone.inputs(question[b : b + 1])).tolist() == together[b : b + 1].tolist()


@pytest.mark.parametrize("chunk_size", [1, 7, 20, 64, NUM_TOKENS - 1])
@pytest.mark.parametrize(
    "method",
    [HALF, AdaKV(HALF), PyramidKV(HALF, beta=4), Knorm(keep=0.5), TOVA(keep=0.5), SnapKV(keep=0.9, window=8)],
    ids=lambda method: repr(method),
)
def test_chunks_shrink_to_the_budget(lively_model: Build, method: Any, chunk_size: int) -> None:
    """At no time is more held than the budget and a chunk; what is left in the first layer are keys of the context.

    Deeper layers of a chunk have seen less than the whole context, so that only their positions are known.
    """
    model, context = lively_model(), tokens(1, NUM_TOKENS)
    prune(model, method)  # looks at the model once, before passes are counted
    held: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        held.extend(layer.held for layer in kwargs["past_key_values"].layers if isinstance(layer, UniformLayer))

    handle = model.model.register_forward_hook(note, with_kwargs=True)
    try:
        cache = PrunedCache.prefill(model, context, method, chunk_size=chunk_size)
    finally:
        handle.remove()
    places = models.kept(cache, 0, NUM_TOKENS)
    for index, layer in enumerate(places):
        assert sum(map(len, layer)) == 2 * method.num_kept(NUM_TOKENS, index, 3)
        assert all(head == sorted(set(head)) for head in layer)
        assert all(set(range(NUM_TOKENS - method.protected, NUM_TOKENS)) <= set(head) for head in layer)
    assert max(held) <= max(method.num_kept(NUM_TOKENS, index, 3) for index in range(3))
    reference = models.Reference(model)
    whole = reference.prefill(context[0])
    for g in range(2):
        keys, _ = models.rows(cache.layers[0], 0, g)
        models.close(keys, reference.turned(whole.keys[0][g, places[0][g]], places[0][g]), TOLERANCE)
    assert cache.get_seq_length() == NUM_TOKENS
    with cache.attached(model):
        generate(model, cache.inputs(tokens(1, 5)))


@pytest.mark.parametrize(
    "method", [KVzip(keep=0.5), AdaKV(KVzip(keep=0.5)), Threshold(SnapKV(keep=0.5), 1e-3, window=8)]
)
def test_methods_that_decide_at_the_end(lively_model: Build, method: Any) -> None:
    """In chunks or not, alone or in a batch: the same is kept."""
    model, question = lively_model("qwen2"), tokens(3, 7, seed=1)
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), LENGTHS, "left")
    cache = PrunedCache.prefill(model, ids, method, attention_mask=mask)
    check(model, cache, sequences, question)
    if "KVzip" in repr(method):
        chunks = PrunedCache.prefill(model, ids, method, attention_mask=mask, chunk_size=25)
        for b, sequence in enumerate(sequences):
            assert models.kept(chunks, b, len(sequence)) == models.kept(cache, b, len(sequence))
