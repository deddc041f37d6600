"""``PrunedCache``: contexts read once, kept in part and asked about in every way, against the reference in loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pruning_models as models
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.methods.knorm import Knorm
from condense_core.pruning.methods.kvzip import KVzip
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.methods.tova import TOVA
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV, Decoding, PyramidKV, Rerotate, Threshold

Build = Callable[..., PreTrainedModel]

FAMILIES = ("mistral", "llama", "qwen2", "qwen3")
ATTENTIONS = ("sdpa", "eager")
NUM_TOKENS = 90
LENGTHS = (NUM_TOKENS, 61, 40)
# Relative to a float64 model of the same weights: three layers of sums of some fifty fp32 products each.
TOLERANCE = 2e-5

ALL = SnapKV(keep=1.0)
HALF = SnapKV(keep=0.5, window=8)
METHODS = {
    "uniform": HALF,
    "ragged": AdaKV(HALF),
    "pyramid": PyramidKV(HALF, beta=4),
    "ragged pyramid": AdaKV(PyramidKV(HALF, beta=4)),
}


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 400, (batch, count), generator=torch.Generator().manual_seed(seed))


def generate(model: PreTrainedModel, inputs: dict[str, Any], count: int = 6, **options: Any) -> Tensor:
    """The new tokens; no sequence ends early."""
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    new: Tensor = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return new


def answers(model: PreTrainedModel, prompt: Tensor, count: int = 6, **options: Any) -> Tensor:
    """What the unpruned model says behind ``prompt [B, N]``."""
    return generate(model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}, count, **options)


# -- nothing evicted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("window", [24, 200])
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


# -- what was evicted is not seen --------------------------------------------------------------------------------------


def check(
    model: PreTrainedModel, cache: PrunedCache, sequences: list[Tensor], question: Tensor, *, seed: int = 2
) -> None:
    """What is held, the logits of a question and of five tokens behind it, against the reference."""
    reference, following = models.Reference(model), tokens(len(question), 5, seed)
    places = [models.kept(cache, b, len(s)) for b, s in enumerate(sequences)]
    contexts = [reference.prefill(sequence) for sequence in sequences]
    for b, context in enumerate(contexts):
        for index, layer in enumerate(cache.layers):
            for g, columns in enumerate(places[b][index]):
                assert columns == sorted(set(columns))
                if isinstance(layer, UniformLayer) and layer.positions is None:
                    continue  # padding included: the logits tell
                keys, values = models.rows(layer, b, g)
                models.close(keys, reference.turned(context.keys[index][g, columns], columns), TOLERANCE)
                models.close(values, context.values[index][g, columns], TOLERANCE)
    with torch.no_grad(), cache.attached(model):
        inputs = cache.inputs(question)
        found = [model(**inputs).logits]
        for step in following.split(1, 1):
            found.append(model(**cache.inputs(step)).logits)
    logits = torch.cat(found, 1)
    for b, context in enumerate(contexts):
        new = torch.cat([question[b], following[b]])
        models.close(logits[b], reference.answer(context, places[b], new, len(sequences[b])), TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_sees_the_kept_tokens(lively_model: Build, family: str, attention: str, name: str) -> None:
    model, context, method = lively_model(family, attention), tokens(1, NUM_TOKENS), METHODS[name]
    cache = PrunedCache.prefill(model, context, method)
    assert cache.is_uniform == (name == "uniform")
    total = sum(len(head) for layer in models.kept(cache, 0, NUM_TOKENS) for head in layer)
    assert total == 2 * sum(method.num_kept(NUM_TOKENS, index, 3) for index in range(3))
    check(model, cache, [context[0]], tokens(1, 9, seed=1))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_of_a_batch_see_each_contexts_kept_tokens(lively_model: Build, side: str, name: str) -> None:
    model = lively_model("qwen3")
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), LENGTHS, side)
    cache = PrunedCache.prefill(model, ids, METHODS[name], attention_mask=mask)
    check(model, cache, sequences, tokens(3, 9, seed=1))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chunk_size", [None, 20])
def test_a_batch_gives_what_each_sequence_gives(lively_model: Build, chunk_size: int | None, name: str) -> None:
    model, question = lively_model("llama"), tokens(3, 9, seed=1)
    for side in ("left", "right"):
        ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), LENGTHS, side)
        cache = PrunedCache.prefill(model, ids, METHODS[name], attention_mask=mask, chunk_size=chunk_size)
        with cache.attached(model):
            together = generate(model, cache.inputs(question))
        for b, sequence in enumerate(sequences):
            alone = PrunedCache.prefill(model, sequence[None], METHODS[name], chunk_size=chunk_size)
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


# -- moved keys --------------------------------------------------------------------------------------------------------


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


# -- again and again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, "all", "all, in chunks"])
def test_questions_one_after_another(lively_model: Build, name: str) -> None:
    """Behind ``rewind`` a question gets the answer that it got first, and the cache does not grow."""
    model, context = lively_model(), tokens(1, NUM_TOKENS)
    method, chunk_size = METHODS.get(name, ALL), 20 if "chunks" in name else None
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


@pytest.mark.parametrize("name", ["all", *METHODS])
def test_inference_mode_may_come_and_go(lively_model: Build, name: str) -> None:
    model, question = lively_model(), tokens(1, 9, seed=1)
    with torch.inference_mode():
        cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), METHODS.get(name, ALL))
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
@pytest.mark.parametrize("name", METHODS)
def test_questions_are_padded_behind_contexts_of_one_length(lively_model: Build, name: str, attention: str) -> None:
    model, ids = lively_model("llama", attention), tokens(3, NUM_TOKENS)
    question, mask, alone = models.padded(tokens(3, 9, seed=1), (9, 3, 6), "left")
    cache = PrunedCache.prefill(model, ids, METHODS[name])
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
    cache = PrunedCache.prefill(model, context, METHODS[name])
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


@pytest.mark.parametrize("name", ["all", *METHODS])
def test_beams_and_several_answers(lively_model: Build, name: str) -> None:
    model, context, question = lively_model("llama"), tokens(1, NUM_TOKENS), tokens(1, 9, seed=1)
    method = METHODS.get(name, ALL)
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


@pytest.mark.parametrize("name", ["all", *METHODS])
def test_tokens_may_be_guessed_and_taken_back(lively_model: Build, name: str) -> None:
    """Prompt lookup proposes several tokens at a time, and crops those that the model would not have said."""
    model, context = lively_model(), tokens(1, NUM_TOKENS)
    question = tokens(1, 4, seed=1).repeat(1, 3)  # whose last token has a continuation
    cache = PrunedCache.prefill(model, context, METHODS.get(name, ALL))
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
    for method in METHODS.values():
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


# -- 8 bits ------------------------------------------------------------------------------------------------------------


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


# -- facts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*METHODS, "all"])
def test_bytes_are_those_of_the_memory_behind_the_tensors(lively_model: Build, name: str) -> None:
    model, question = lively_model(), tokens(2, 9, seed=1)
    cache = PrunedCache.prefill(model, tokens(2, NUM_TOKENS), METHODS.get(name, ALL))

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


@pytest.mark.parametrize("name", METHODS)
def test_a_cache_moves(lively_model: Build, name: str) -> None:
    model, context, question = lively_model(), tokens(1, NUM_TOKENS), tokens(1, 9, seed=1)
    cache = PrunedCache.prefill(model, context, METHODS[name])
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


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["ragged", "pyramid", "ragged pyramid"])
@pytest.mark.parametrize("count", [1, 9])
def test_layers_that_differ_want_to_be_attached(lively_model: Build, attention: str, name: str, count: int) -> None:
    model = lively_model("mistral", attention)
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), METHODS[name])
    inputs = cache.inputs(tokens(1, count, seed=1))
    for call in (lambda: model(**inputs), lambda: generate(model, inputs)):
        with pytest.raises(ValueError, match=r"expected the call inside `with cache.attached\(model\):`"):
            call()
    with cache.attached(model):
        generate(model, inputs)
    assert not any(layer.in_session for layer in cache.layers)
    with pytest.raises(ValueError, match=r"expected the call inside `with cache.attached\(model\):`"):
        generate(model, cache.inputs(tokens(1, count)))


def test_an_interrupted_pass_leaves_no_layer_in_session(lively_model: Build) -> None:
    """torch runs no hooks behind a pass that the keyboard interrupts."""
    model = lively_model()
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), AdaKV(HALF))
    inputs = cache.inputs(tokens(1, 9))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), cache.attached(model):
            model(**inputs)
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="attached"):
        model(**inputs)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_another_size_is_refused(lively_model: Build, name: str) -> None:
    model, question = lively_model(), tokens(1, 9, seed=1)
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), METHODS[name])
    with pytest.raises(ValueError, match=r"input_ids: 2 sequences, expected 1, as the cache holds"):
        cache.inputs(question.repeat(2, 1))
    with cache.attached(model), pytest.raises(ValueError, match=r"expected 3, .* cache.batch_repeat_interleave\(3\)"):
        generate(model, cache.inputs(question), num_beams=3)
    with cache.attached(model), pytest.raises(ValueError, match=r"it holds 1 sequences, expected 2"):
        model(question.repeat(2, 1), past_key_values=cache)


@pytest.mark.parametrize("name", METHODS)
def test_ids_that_do_not_say_that_they_are_new_are_refused(lively_model: Build, name: str) -> None:
    """To generate, ids without a mask of all tokens seen are the whole prompt once more, of which nothing is left."""
    model = lively_model()
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), METHODS[name])
    with cache.attached(model), pytest.raises(ValueError, match=r"expected model.generate\(\*\*cache.inputs\(ids\)\)"):
        generate(model, {"input_ids": tokens(1, 9), "past_key_values": cache})


def test_caches_of_other_models_are_refused(lively_model: Build, build_model: Build) -> None:
    model = lively_model()
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), HALF)
    with pytest.raises(ValueError, match="it has 3 layers, expected 1, as the model has"):
        cache.attached(build_model(num_hidden_layers=1))
    other = build_model(seed=9)
    other.config._name_or_path = other.name_or_path = "someone/other-7b"
    with pytest.raises(ValueError, match="it was made by 'unnamed', expected one of 'someone/other-7b'"):
        cache.attached(other)


@pytest.mark.parametrize("name", METHODS)
def test_what_was_thinned_out_cannot_be_cropped(lively_model: Build, name: str) -> None:
    model = lively_model()
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), METHODS[name])
    with torch.no_grad(), cache.attached(model):
        model(**cache.inputs(tokens(1, 9)))
    with pytest.raises(ValueError, match="crop: 10 tokens, expected at most the 9 that came after the pruning"):
        cache.crop(-10)
    with pytest.raises(ValueError, match="crop: 3, expected minus the number of tokens"):
        cache.crop(3)
    assert cache.get_seq_length() == NUM_TOKENS + 9
    cache.crop(-9)
    assert cache.get_seq_length() == NUM_TOKENS


def prefill(model: PreTrainedModel, **options: Any) -> PrunedCache:
    settings: dict[str, Any] = {"input_ids": tokens(1, 20), "method": SnapKV(keep=1.0)} | options
    return PrunedCache.prefill(model, settings.pop("input_ids"), settings.pop("method"), **settings)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_ids": [1, 2]}, TypeError, "input_ids is a list, expected a torch.Tensor"),
        ({"input_ids": None}, ValueError, "expected either these or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(1, 20, 48)}, ValueError, "expected either these or inputs_embeds"),
        ({"input_ids": tokens(1, 20)[0]}, ValueError, r"input_ids has shape \[20\], expected \[B, N\]"),
        ({"input_ids": tokens(1, 0)}, ValueError, r"shape \[1, 0\], expected \[B, N\] with B and N >= 1"),
        ({"input_ids": torch.zeros(1, 3)}, TypeError, "dtype torch.float32, expected int64"),
        ({"input_ids": torch.tensor([[1, 400]])}, ValueError, "from 1 to 400, expected 0 to 399"),
        ({"input_ids": torch.tensor([[-1, 4]])}, ValueError, "from -1 to 4, expected 0 to 399"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(1, 3, 47)},
            ValueError,
            r"inputs_embeds has shape \[1, 3, 47\], expected \[B, N, 48\]",
        ),
        ({"attention_mask": torch.ones(1, 19)}, ValueError, r"attention_mask: got \[1, 19\], expected \[1, 20\]"),
        ({"attention_mask": [1] * 20}, ValueError, r"attention_mask: got list, expected \[1, 20\]"),
        (
            {"attention_mask": torch.tensor([[1, 0, 1] + [0] * 17])},
            ValueError,
            "sequence 0 has 2 tokens between columns 0 and 3",
        ),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0, expected an int >= 1, or None"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size is 2.0, expected an int >= 1, or None"),
        ({"chunk_size": True}, TypeError, "chunk_size is True"),
        ({"method": "snapkv"}, TypeError, "expected a pruning method"),
        ({"method": None}, TypeError, "expected a pruning method"),
        ({"method": SnapKV(keep=0.5, window=16)}, ValueError, "10 of 20 tokens in layer 0, fewer than the 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_contexts_are_named(
    lively_model: Build, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prefill(lively_model(), **options)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1]], None, "input_ids: got list"),
        (tokens(1, 3)[0], None, r"input_ids: got \[3\]"),
        (tokens(1, 0), None, r"expected \[B, Q\] with Q >= 1"),
        (tokens(1, 3), torch.ones(1, 2), r"attention_mask has shape \[1, 2\], expected \[1, 3\]"),
    ],
)
def test_bad_questions_are_named(lively_model: Build, ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefill(lively_model()).inputs(ids, mask)


def test_embeddings_are_as_good_as_ids(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(2, NUM_TOKENS)
    embeds = model.get_input_embeddings()(ids)
    by_ids = PrunedCache.prefill(model, ids, HALF)
    by_embeds = PrunedCache.prefill(model, None, HALF, inputs_embeds=embeds)
    for a, b in zip(by_ids.layers, by_embeds.layers, strict=True):
        assert isinstance(a, UniformLayer)
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.positions, b.positions)
        assert not b.keys.requires_grad


def test_a_sequence_of_nothing_but_padding(lively_model: Build) -> None:
    """It holds nothing, and answers like a prompt without a context."""
    model, ids, question = lively_model(), tokens(2, NUM_TOKENS), tokens(2, 9, seed=1)
    mask = torch.ones_like(ids)
    mask[1] = 0
    expected = answers(model, question[1:]).tolist()
    for method in (HALF, AdaKV(HALF), KVzip(keep=0.5)):
        cache = PrunedCache.prefill(model, ids, method, attention_mask=mask)
        assert isinstance(cache.layers[0], RaggedLayer)
        assert cache.lengths == (NUM_TOKENS, 0)
        with cache.attached(model):
            assert generate(model, cache.inputs(question))[1:].tolist() == expected
