"""Options of a generation, for soft tokens and for caches: they do what they say, or are refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from condense_core.compressor.condenser import Condenser
from condense_core.pruning import AdaKV, PrunedCache, SnapKV, text
from condense_core.tasks import ProseWriter

TEXT = ProseWriter().document(3, 4)[:500]
QUESTION = "Why?"

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "several answers": ({"do_sample": True, "num_return_sequences": 3}, "num_return_sequences: got 3, expected 1"),
    "several answers, in a config": (
        {"generation_config": GenerationConfig(num_return_sequences=2, num_beams=2)},
        "num_return_sequences: got 2, expected 1",
    ),
    "a dict": ({"return_dict_in_generate": True}, "return_dict_in_generate: got True, expected none"),
    "scores": ({"output_scores": True}, "output_scores: got True, expected none"),
    "logits": ({"output_logits": True}, "output_logits: got True, expected none"),
    "a prompt": ({"input_ids": torch.ones(1, 2)}, "input_ids: comes with the prompt"),
    "a mask": ({"attention_mask": torch.ones(1, 2)}, "attention_mask: comes with the prompt"),
    "a length that counts the prompt": ({"max_length": 50}, "max_length: got 50, expected max_new_tokens"),
    "an assistant": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: assisted generation"),
    "no beam": ({"num_beams": 0}, "num_beams: got 0, expected an integer of at least 1"),
    "no token": ({"max_new_tokens": 0}, "max_new_tokens: got 0, expected an integer of at least 1"),
}
REFUSED_OF_CACHES = {
    "no cache": ({"use_cache": False}, "use_cache: got False, expected none: the context is a cache"),
    "another cache": ({"cache_implementation": "static"}, "cache_implementation: got 'static', expected none"),
}
REFUSED_TO_STREAM = {"beams": ({"num_beams": 2}, "num_beams: got 2, expected 1 to stream")}


@pytest.fixture(scope="module")
def cache(lively: Condenser) -> PrunedCache:
    return text.prefill(lively.model, lively.tokenizer, TEXT[:150], SnapKV(keep=0.5, window=8))


@pytest.fixture
def no_work(lively: Condenser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside, the model must not be run."""
    monkeypatch.setattr(lively.model, "generate", lambda *_, **__: pytest.fail("generates"))
    monkeypatch.setattr(lively, "prepare", lambda *_, **__: pytest.fail("prepares"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(lively: Condenser, cache: PrunedCache, name: str) -> None:
    options, message = REFUSED[name]
    for call in (lively.generate, lively.stream):
        with pytest.raises(ValueError, match=message):
            call(TEXT, QUESTION, **options)
    ask: Callable[..., Any]
    for ask in (text.ask, text.stream):
        with pytest.raises(ValueError, match=message):
            ask(lively.model, lively.tokenizer, cache, QUESTION, **options)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", REFUSED_OF_CACHES)
def test_a_cache_takes_no_other_cache(lively: Condenser, cache: PrunedCache, name: str) -> None:
    options, message = REFUSED_OF_CACHES[name]
    with pytest.raises(ValueError, match=message):
        text.ask(lively.model, lively.tokenizer, cache, QUESTION, **options)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", REFUSED_TO_STREAM)
def test_beams_do_not_stream(lively: Condenser, cache: PrunedCache, name: str) -> None:
    options, message = REFUSED_TO_STREAM[name]
    with pytest.raises(ValueError, match=message):
        lively.stream(TEXT, QUESTION, **options)
    with pytest.raises(ValueError, match=message):
        text.stream(lively.model, lively.tokenizer, cache, QUESTION, **options)


def test_beams_on_soft_tokens_are_those_of_transformers(lively: Condenser) -> None:
    soft = lively.compress(TEXT, 4)
    inputs = lively.prepare(soft, QUESTION)
    pad = lively.tokenizer.eos_token_id
    with torch.no_grad():
        own = lively.model.generate(**inputs, num_beams=3, do_sample=False, max_new_tokens=6, pad_token_id=pad)
    expected = lively.tokenizer.decode(own[0], skip_special_tokens=True).strip()
    assert lively.generate(soft, QUESTION, num_beams=3, max_new_tokens=6) == expected


@pytest.mark.parametrize("wrap", [lambda method: method, AdaKV], ids=["uniform", "ragged"])
def test_beams_on_a_cache_are_those_over_the_text_and_leave_it_as_it_was(lively: Condenser, wrap: Any) -> None:
    """A cache that keeps everything answers as the text does, beam for beam."""
    model, tokenizer = lively.model, lively.tokenizer
    cache = text.prefill(model, tokenizer, TEXT[:150], wrap(SnapKV(keep=1.0, window=8)))
    greedy = text.ask(model, tokenizer, cache, QUESTION, max_new_tokens=6)
    found = text.ask(model, tokenizer, cache, QUESTION, num_beams=3, max_new_tokens=6)
    assert found == lively.generate(TEXT[:150], QUESTION, num_beams=3, max_new_tokens=6)
    assert cache.lengths == cache.context_tokens
    assert text.ask(model, tokenizer, cache, QUESTION, max_new_tokens=6) == greedy


def test_a_generation_config_counts_unless_an_option_says_otherwise(lively: Condenser) -> None:
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    short = lively.generate(TEXT, QUESTION, generation_config=config)
    assert short == lively.generate(TEXT, QUESTION, max_new_tokens=3)
    sampled = GenerationConfig(max_new_tokens=8, do_sample=True, temperature=50.0, top_k=0)
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        answers.append(lively.generate(TEXT, QUESTION, generation_config=sampled))
    assert answers[0] != answers[1]


def test_the_room_for_new_tokens_is_checked_first(lively: Condenser, cache: PrunedCache) -> None:
    """The model has 256 positions; of the new tokens all but the last take one."""
    count = lively.prepare(TEXT[:150], QUESTION)["attention_mask"].shape[1]
    left = 256 - count
    lively.prepare(TEXT[:150], QUESTION, max_new_tokens=left + 1)
    message = f"{count} positions with its context and up to {left + 2} new tokens, the model has 256; compress"
    for call in (lively.generate, lively.stream):
        with pytest.raises(ValueError, match=f"prompt: {message}.*or a smaller max_new_tokens"):
            call(TEXT[:150], QUESTION, max_new_tokens=left + 2)
    message = f"question: {count} positions with the context before it and up to {left + 2} new tokens"
    ask: Callable[..., Any]
    for ask in (text.ask, text.stream):
        with pytest.raises(ValueError, match=message):
            ask(lively.model, lively.tokenizer, cache, QUESTION, max_new_tokens=left + 2)


def test_template_args_of_the_condenser_and_of_a_call(lively: Condenser) -> None:
    template = "{{ mood | default('calm') }}: {{ messages[0]['content'] }}{{ tone | default('') }}"
    tokenizer = type(lively.tokenizer).from_pretrained(lively.tokenizer.name_or_path, chat_template=template)
    moody = Condenser(lively.model, tokenizer, method="select", template_args={"mood": "gay"})

    def prompt(**options: Any) -> str:
        table = moody.model.get_input_embeddings().weight
        rows = moody.prepare("", "Why?", **options)["inputs_embeds"][0]
        return str(tokenizer.decode([int((table == row).all(-1).nonzero()[0]) for row in rows]))

    assert prompt() == "gay: Why?"
    assert prompt(template_args={"tone": "!"}) == "gay: Why?!"
    assert prompt(template_args={"mood": "sad"}) == "sad: Why?"
    ids = text.question_ids(tokenizer, "Why?", {"tone": "!"})
    assert tokenizer.decode(ids) == "\n\nWhy?!"
    assert tokenizer.decode(text.context_ids(moody.model, tokenizer, "A hill.", {"mood": "sad"})) == "sad: A hill."
