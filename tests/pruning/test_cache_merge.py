"""Keys that move: ``Rerotate`` and ``PrunedCache.merge``."""

from __future__ import annotations

import pytest
import torch

from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.wrappers import AdaKV, Rerotate
from condense_testing.pruning import models
from condense_testing.pruning.sessions import (
    ALL,
    HALF,
    LENGTHS,
    NUM_TOKENS,
    TOLERANCE,
    Build,
    tokens,
)


@pytest.mark.parametrize("batch", [1, 3])
def test_moved_keys_are_those_of_a_shorter_prompt(lively_model: Build, batch: int) -> None:
    """In the first layer keys depend on their token and its position alone."""
    model, method = lively_model("qwen3"), Rerotate(HALF)
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS)[:batch], LENGTHS[:batch], "left")
    cache = PrunedCache.prefill(model, ids, method, attention_mask=mask)
    plain = PrunedCache.prefill(model, ids, HALF, attention_mask=mask)
    assert cache.lengths == tuple(HALF.num_kept(n, 0, 3) for n in LENGTHS[:batch])
    reference = models.Reference(model)
    question = tokens(batch, 9, seed=1)
    with torch.no_grad(), cache.attached(model):
        logits = model(**cache.inputs(question)).logits
    for b, sequence in enumerate(sequences):
        columns = models.kept(plain, b, len(sequence))
        count = cache.lengths[b]
        moved = [[list(range(count))] * 2] * 3
        for g in range(2):
            short = reference.prefill(sequence[columns[0][g]])
            models.close(
                models.rows(cache.layers[0], b, g)[0][:count],
                reference.turned(short.keys[0][g], range(count)),
                TOLERANCE,
            )
        expected = reference.answer(reference.prefill(sequence), columns, question[b], count, moved)
        models.close(logits[b], expected, TOLERANCE)


def test_two_documents_become_one_cache(lively_model: Build) -> None:
    model = lively_model("llama")
    ids, question = tokens(2, NUM_TOKENS), tokens(1, 9, seed=1)
    reference = models.Reference(model)
    for methods in ((HALF, SnapKV(keep=0.3, window=8)), (ALL, ALL), (ALL, HALF), (Rerotate(HALF), HALF)):
        pair = [PrunedCache.prefill(model, ids[b : b + 1], method) for b, method in enumerate(methods)]
        merged = PrunedCache.merge(*pair)
        shift = pair[0].get_seq_length()
        assert merged.get_seq_length() == shift + NUM_TOKENS == merged.lengths[0]
        contexts = [reference.prefill(row) for row in ids]
        plain = [
            models.kept(PrunedCache.prefill(model, ids[b : b + 1], getattr(m, "method", m)), 0, NUM_TOKENS)
            for b, m in enumerate(methods)
        ]
        first = [[list(range(len(h))) for h in layer] for layer in plain[0]] if shift < NUM_TOKENS else plain[0]
        # Both contexts as one of 2N columns, of which the second's stand behind the first's positions.
        both = models.Context(
            *([torch.cat([getattr(c, name)[i] for c in contexts], 1) for i in range(3)] for name in ("keys", "values")),
            contexts[0].logits,
        )
        columns = [
            [a + [NUM_TOKENS + p for p in b] for a, b in zip(x, y, strict=True)] for x, y in zip(*plain, strict=True)
        ]
        places = [
            [a + [shift + p for p in b] for a, b in zip(x, y, strict=True)]
            for x, y in zip(first, plain[1], strict=True)
        ]
        assert [layer.all_positions()[0].tolist() for layer in merged.layers] == places
        with torch.no_grad():
            logits = model(**merged.inputs(question)).logits[0]
        models.close(logits, reference.answer(both, columns, question[0], merged.lengths[0], places), TOLERANCE)
        assert merged.context_tokens == (2 * NUM_TOKENS,)
        assert merged.full_nbytes == 2 * pair[0].full_nbytes
        merged.rewind()
        assert merged.get_seq_length() == merged.lengths[0]


def test_what_cannot_be_merged_is_refused(lively_model: Build, build_model: Build) -> None:
    model, ids = lively_model(), tokens(2, NUM_TOKENS)
    one, two, ragged = (
        PrunedCache.prefill(model, given, method)
        for given, method in ((ids[:1], HALF), (ids, HALF), (ids[:1], AdaKV(HALF)))
    )
    with pytest.raises(ValueError, match="second is ragged or of 2 sequences, expected one, uniform"):
        PrunedCache.merge(one, two)
    with pytest.raises(ValueError, match="first is ragged or of 1 sequences"):
        PrunedCache.merge(ragged, one)
    shallow = PrunedCache.prefill(build_model(num_hidden_layers=1), ids[:1], HALF)
    with pytest.raises(ValueError, match="expected two of one model"):
        PrunedCache.merge(one, shallow)
