"""What a cache refuses, each in one line that says what would do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.methods.kvzip import KVzip
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.ragged import RaggedLayer
from condense_core.pruning.wrappers import AdaKV
from condense_testing.pruning.sessions import (
    ATTENTIONS,
    EVICTING,
    HALF,
    NUM_TOKENS,
    Build,
    answers,
    generate,
    tokens,
)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", ["ragged", "pyramid", "ragged pyramid"])
@pytest.mark.parametrize("count", [1, 9])
def test_layers_that_differ_want_to_be_attached(lively_model: Build, attention: str, name: str, count: int) -> None:
    model = lively_model("mistral", attention)
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), EVICTING[name])
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


@pytest.mark.parametrize("name", EVICTING)
def test_a_batch_of_another_size_is_refused(lively_model: Build, name: str) -> None:
    model, question = lively_model(), tokens(1, 9, seed=1)
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), EVICTING[name])
    with pytest.raises(ValueError, match=r"input_ids: 2 sequences, expected 1, as the cache holds"):
        cache.inputs(question.repeat(2, 1))
    with cache.attached(model), pytest.raises(ValueError, match=r"expected 3, .* cache.batch_repeat_interleave\(3\)"):
        generate(model, cache.inputs(question), num_beams=3)
    with cache.attached(model), pytest.raises(ValueError, match=r"it holds 1 sequences, expected 2"):
        model(question.repeat(2, 1), past_key_values=cache)


@pytest.mark.parametrize("name", EVICTING)
def test_ids_that_do_not_say_that_they_are_new_are_refused(lively_model: Build, name: str) -> None:
    """To generate, ids without a mask of all tokens seen are the whole prompt once more, of which nothing is left."""
    model = lively_model()
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), EVICTING[name])
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


@pytest.mark.parametrize("name", EVICTING)
def test_what_was_thinned_out_cannot_be_cropped(lively_model: Build, name: str) -> None:
    model = lively_model()
    cache = PrunedCache.prefill(model, tokens(1, NUM_TOKENS), EVICTING[name])
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
