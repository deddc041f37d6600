"""One cache used again and again: questions, conversations, beams, copies, sequences chosen."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV
from condense_testing.pruning import models
from condense_testing.pruning.sessions import (
    ALL,
    ATTENTIONS,
    EVICTING,
    HALF,
    LENGTHS,
    NUM_TOKENS,
    TOLERANCE,
    Build,
    answers,
    generate,
    tokens,
)


@pytest.mark.parametrize("name", [*EVICTING, "all", "all, in chunks"])
def test_questions_one_after_another(lively_model: Build, name: str) -> None:
    """Behind ``rewind`` a question gets the answer that it got first, and the cache does not grow."""
    model, context = lively_model(), tokens(1, NUM_TOKENS)
    method, chunk_size = EVICTING.get(name, ALL), 20 if "chunks" in name else None
    cache = PrunedCache.prefill(model, context, method, chunk_size=chunk_size)
    questions = [tokens(1, 9, seed=1), tokens(1, 4, seed=2)]
    answered, sizes = [], []
    for turn in range(10):
        with cache.attached(model):
            answered.append(generate(model, cache.inputs(questions[turn % 2])).tolist())
        cache.rewind()
        sizes.append(cache.nbytes)
        assert cache.get_seq_length() == NUM_TOKENS
    assert answered == answered[:2] * 5
    assert answered[0] != answered[1]
    assert sizes[2:] == [sizes[2]] * 8


@pytest.mark.parametrize("name", ["all", *EVICTING])
def test_inference_mode_may_come_and_go(lively_model: Build, name: str) -> None:
    model, question = lively_model(), tokens(1, 9, seed=1)
    with torch.inference_mode():
        cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), EVICTING.get(name, ALL))
        with cache.attached(model):
            expected = generate(model, cache.inputs(question)).tolist()
    for mode in (False, True, False):
        cache.rewind()
        with torch.inference_mode(mode), cache.attached(model):
            assert generate(model, cache.inputs(question)).tolist() == expected


def test_a_batch_is_asked_again_though_its_questions_were_padded(lively_model: Build) -> None:
    model, question = lively_model("qwen2"), tokens(3, 9, seed=1)
    question, question_mask, alone = models.padded(question, (9, 3, 6), "left")
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), LENGTHS, "left")
    for method in (AdaKV(HALF), HALF, ALL):
        cache = PrunedCache.prefill(model, ids, method, attention_mask=mask)
        expected = []
        for sequence, own in zip(sequences, alone, strict=True):
            single = PrunedCache.prefill(model, sequence[None], method)
            with single.attached(model):
                expected += generate(model, single.inputs(own[None]), 70).tolist()
        sizes = []
        for _ in range(4):
            with cache.attached(model):
                assert generate(model, cache.inputs(question, question_mask), 70).tolist() == expected
            cache.rewind()
            sizes.append(cache.nbytes)
        assert sizes[1:] == [sizes[1]] * 3


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", EVICTING)
def test_questions_are_padded_behind_contexts_of_one_length(lively_model: Build, name: str, attention: str) -> None:
    model, ids = lively_model("llama", attention), tokens(3, NUM_TOKENS)
    question, mask, alone = models.padded(tokens(3, 9, seed=1), (9, 3, 6), "left")
    cache = PrunedCache.prefill(model, ids, EVICTING[name])
    places = [models.kept(cache, b, NUM_TOKENS) for b in range(3)]
    reference = models.Reference(model)
    found = []
    with torch.no_grad():
        for attach in (True, False) if cache.is_uniform else (True,):
            with cache.attached(model) if attach else nullcontext():
                found.append(model(**cache.inputs(question, mask)).logits)
            cache.rewind()
    for logits in found:
        for b, own in enumerate(alone):
            expected = reference.answer(reference.prefill(ids[b]), places[b], own, NUM_TOKENS)
            models.close(logits[b, -len(own) :], expected, TOLERANCE)


@pytest.mark.parametrize("name", ["uniform", "ragged"])
def test_a_conversation_goes_on(lively_model: Build, name: str) -> None:
    """Several turns without ``rewind``, one of them taken back."""
    model, context = lively_model(), tokens(1, NUM_TOKENS)
    cache = PrunedCache.prefill(model, context, EVICTING[name])
    places = models.kept(cache, 0, NUM_TOKENS)
    reference = models.Reference(model)
    read = reference.prefill(context[0])
    turns = tokens(1, 12, seed=1)
    with torch.no_grad(), cache.attached(model):
        model(**cache.inputs(turns[:, :5]))
        model(**cache.inputs(tokens(1, 4, seed=9)))
        cache.crop(-4)
        logits = [model(**cache.inputs(turns[:, 5:7])).logits, model(**cache.inputs(turns[:, 7:])).logits]
    expected = reference.answer(read, places, turns[0], NUM_TOKENS)
    models.close(torch.cat(logits, 1)[0], expected[5:], TOLERANCE)


@pytest.mark.parametrize("name", ["all", *EVICTING])
def test_beams_and_several_answers(lively_model: Build, name: str) -> None:
    model, context, question = lively_model("llama"), tokens(1, NUM_TOKENS), tokens(1, 9, seed=1)
    method = EVICTING.get(name, ALL)
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3, "top_k": 10}):
        torch.manual_seed(3)
        with prune(model, method):  # the question comes later than the pruning, as below
            warm = model(context, use_cache=True).past_key_values
            inputs = {"input_ids": question, "attention_mask": torch.ones(1, NUM_TOKENS + 9, dtype=torch.long)}
            warm.batch_repeat_interleave(3)
            expected = generate(model, inputs | {"past_key_values": warm}, **options)
        cache = PrunedCache.prefill(model, context, method)
        inputs = cache.inputs(question)
        cache.batch_repeat_interleave(3)
        torch.manual_seed(3)
        with cache.attached(model):
            assert generate(model, inputs, **options).tolist() == expected.tolist()
        if name == "all":
            torch.manual_seed(3)
            prompt = torch.cat([context, question], 1)
            assert answers(model, prompt, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["all", *EVICTING])
def test_tokens_may_be_guessed_and_taken_back(lively_model: Build, name: str) -> None:
    """Prompt lookup proposes several tokens at a time, and crops those that the model would not have said."""
    model, context = lively_model(), tokens(1, NUM_TOKENS)
    question = tokens(1, 4, seed=1).repeat(1, 3)  # whose last token has a continuation
    cache = PrunedCache.prefill(model, context, EVICTING.get(name, ALL))
    cropped: list[int] = []
    crop = cache.crop
    cache.crop = lambda count: (cropped.append(count), crop(count))[1]  # type: ignore[method-assign]
    with cache.attached(model):
        expected = generate(model, cache.inputs(question), 12)
        cache.rewind()
        guesses = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
        assert generate(model, cache.inputs(question), 12, **guesses).tolist() == expected.tolist()
    assert min(cropped) < 0


def test_a_cache_can_be_copied(lively_model: Build) -> None:
    model, context, question = lively_model(), tokens(1, NUM_TOKENS), tokens(1, 9, seed=1)
    for method in EVICTING.values():
        cache = PrunedCache.prefill(model, context, method)
        other = copy.deepcopy(cache)
        with cache.attached(model):
            expected = generate(model, cache.inputs(question)).tolist()
            assert other.get_seq_length() == NUM_TOKENS
            assert generate(model, other.inputs(question)).tolist() == expected


def test_sequences_can_be_chosen_and_repeated(lively_model: Build) -> None:
    model, question = lively_model(), tokens(1, 9, seed=1)
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), LENGTHS, "left")
    for method in (HALF, AdaKV(HALF), ALL):
        cache = PrunedCache.prefill(model, ids, method, attention_mask=mask)
        bytes_each = [n * cache.full_nbytes // sum(LENGTHS) for n in LENGTHS]
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        assert cache.lengths == cache.context_tokens == (40, 40, 90, 90)
        assert cache.full_nbytes == 2 * (bytes_each[0] + bytes_each[2])
        with cache.attached(model):
            found = generate(model, cache.inputs(question.repeat(4, 1))).tolist()
        for row, sequence in zip((0, 2), (sequences[2], sequences[0]), strict=True):
            alone = PrunedCache.prefill(model, sequence[None], method)
            with alone.attached(model):
                expected = generate(model, alone.inputs(question)).tolist()
            assert found[row : row + 2] == expected * 2
