"""Several turns behind one cache: new tokens alone are read, at the positions behind what is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from condense_core.pruning import AdaKV, PrunedCache, QueryAware, Rerotate, SnapKV, prune

Build = Callable[..., PreTrainedModel]

HALF = SnapKV(keep=0.5, window=8)
METHODS = {"kept where they are": HALF, "moved": Rerotate(HALF)}
CONTEXT, ANSWER, QUESTION = 90, 6, 7


def tokens(batch: int, count: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(family_model: Build) -> PreTrainedModel:
    found = family_model("Llama")
    prune(found, HALF)  # looks at the model once, before a test counts what it is fed
    return found


@contextmanager
def fed(model: PreTrainedModel) -> Iterator[list[list[int]]]:
    """Inside, the positions of every forward pass are noted."""
    noted: list[list[int]] = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: noted.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    try:
        yield noted
    finally:
        hook.remove()


def say(model: PreTrainedModel, ids: Tensor, cache: object, mask: Tensor | None = None) -> Tensor:
    """transformers' usual recipe: the whole conversation and the cache that has seen most of it."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None}
    out: Tensor = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    return out


@pytest.mark.parametrize("name", METHODS)
def test_every_turn_in_a_session_reads_what_is_new(model: PreTrainedModel, name: str) -> None:
    """Positions go on without a gap: behind all tokens seen, or behind the kept ones that have moved."""
    cache, seen = DynamicCache(config=model.config), CONTEXT if METHODS[name] is HALF else CONTEXT // 2
    with prune(model, METHODS[name]):
        turn = say(model, tokens(1, CONTEXT), cache)
        seen += ANSWER - 1  # the last answer token has not been read yet
        for seed in (2, 3):
            turn = torch.cat([turn, tokens(1, QUESTION, seed)], 1)
            with fed(model) as positions:
                turn = say(model, turn, cache)
            assert positions[0] == list(range(seen, seen + 1 + QUESTION))
            assert [len(step) for step in positions] == [1 + QUESTION, *[1] * (ANSWER - 1)]
            seen += QUESTION + ANSWER


@torch.no_grad()
def test_a_moved_conversation_answers_as_its_tokens_without_the_dropped_ones(model: PreTrainedModel) -> None:
    """One layer of Rerotate and a second turn: the logits are those of a PrunedCache that is asked for both turns."""
    ids, cache = tokens(1, CONTEXT), DynamicCache(config=model.config)
    question = tokens(1, QUESTION, 2)
    with prune(model, Rerotate(HALF)):
        turn = say(model, ids, cache)
        whole = torch.cat([turn, question], 1)
        new = whole[:, cache.get_seq_length() :]
        found = model(new, attention_mask=torch.ones_like(whole), past_key_values=cache).logits
    alone = PrunedCache.prefill(model, ids, Rerotate(HALF))
    expected = model(**alone.inputs(whole[:, CONTEXT:])).logits[:, -new.shape[1] :]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_moved_cache_behind_its_session_is_refused(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    with prune(model, Rerotate(HALF)):
        turn = say(model, tokens(1, CONTEXT), cache)
    with pytest.raises(ValueError, match=r"only the session .*; expected .*generate\(\*\*cache.inputs\(ids\)\)"):
        say(model, torch.cat([turn, tokens(1, QUESTION, 2)], 1), cache)


@pytest.mark.parametrize("attached", [False, True])
def test_a_moved_pruned_cache_refuses_the_whole_prompt(model: PreTrainedModel, attached: bool) -> None:
    ids, question = tokens(1, CONTEXT), tokens(1, QUESTION, 2)
    cache = PrunedCache.prefill(model, ids, Rerotate(HALF))
    whole = torch.cat([ids, question], 1)
    with cache.attached(model) if attached else torch.no_grad():
        with pytest.raises(ValueError, match=r"52 of them are left .* 0 to 44 .*generate\(\*\*cache.inputs\(ids\)\)"):
            say(model, whole, cache)
        cache.rewind()
        inputs = cache.inputs(question)
        with fed(model) as positions:
            say(model, question, cache, inputs["attention_mask"])
    assert positions[0] == list(range(45, 45 + QUESTION))


def test_a_long_question_is_no_whole_prompt(model: PreTrainedModel) -> None:
    """``inputs`` has said how many tokens are new, so that more of them than were dropped are welcome."""
    cache = PrunedCache.prefill(model, tokens(1, 20), Rerotate(SnapKV(budget=12, window=4)))
    with fed(model) as positions, torch.no_grad():
        model(**cache.inputs(tokens(1, 40, 2)))
        model(**cache.inputs(tokens(1, 3, 3)))
    assert positions == [list(range(12, 52)), list(range(52, 55))]


@torch.no_grad()
@pytest.mark.parametrize("method", [HALF, AdaKV(HALF), Rerotate(HALF)], ids=["uniform", "ragged", "moved"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_turns_behind_padded_questions_do_not_see_the_padding(
    model: PreTrainedModel, method: SnapKV, side: str
) -> None:
    """Three turns of a batch whose questions differ in length are those of each sequence alone."""
    ids = tokens(2, CONTEXT)
    lengths = [(7, 4), (3, 5), (2, 2)]
    turns = [[tokens(1, n, 10 * t + b) for b, n in enumerate(pair)] for t, pair in enumerate(lengths)]
    expected = []
    for b in range(2):
        alone = PrunedCache.prefill(model, ids[b : b + 1], method)
        with alone.attached(model):
            expected.append([model(**alone.inputs(turn[b])).logits[0] for turn in turns])
    both = PrunedCache.prefill(model, ids, method)
    with both.attached(model):
        for t, turn in enumerate(turns):
            width = max(lengths[t])
            batch, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
            places = []
            for b, part in enumerate(turn):
                n = part.shape[1]
                places.append(slice(width - n, width) if side == "left" else slice(0, n))
                batch[b, places[b]], mask[b, places[b]] = part[0], 1
            logits = model(**both.inputs(batch, mask)).logits
            for b in range(2):
                torch.testing.assert_close(logits[b, places[b]], expected[b][t], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rewinding_forgets_the_padding_of_earlier_questions(model: PreTrainedModel) -> None:
    cache = PrunedCache.prefill(model, tokens(2, CONTEXT), HALF)
    question = tokens(2, 4, 2)
    with cache.attached(model):
        expected = model(**cache.inputs(question)).logits
        cache.rewind()
        model(**cache.inputs(question, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])))
        cache.rewind()
        assert torch.equal(model(**cache.inputs(question)).logits, expected)


def test_a_gradient_through_ragged_layers_is_an_error(model: PreTrainedModel) -> None:
    ids = tokens(1, 5, 2)
    for method, ragged in ((HALF, False), (AdaKV(HALF), True)):
        cache = PrunedCache.prefill(model, tokens(1, CONTEXT), method)
        embeds = model.model.embed_tokens(ids).detach().requires_grad_()
        with cache.attached(model):
            out = model(**(cache.inputs(ids) | {"input_ids": None, "inputs_embeds": embeds}))
        if ragged:
            with pytest.raises(RuntimeError, match="different lengths has no gradients; expected a method that keeps"):
                out.logits.sum().backward()
        else:
            out.logits.sum().backward()
            assert embeds.grad is not None
            assert embeds.grad.norm() > 0
        model.zero_grad()


def test_a_session_says_what_an_assistant_needs(model: PreTrainedModel, family_model: Build) -> None:
    """A prefill holds the assistant's candidates already, which cannot be taken back once it is pruned."""
    assistant, ids = family_model("Llama", num_hidden_layers=1), tokens(1, CONTEXT)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "assistant_model": assistant}
    with prune(model, HALF), pytest.raises(ValueError, match=r"crop: .*\*\*cache.inputs\(ids\), assistant_model"):
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    cache = PrunedCache.prefill(model, ids, HALF)
    question = tokens(1, QUESTION, 2)
    found = model.generate(**cache.inputs(question), **settings)
    cache.rewind()
    del settings["assistant_model"]
    assert torch.equal(found, model.generate(**cache.inputs(question), **settings))


def test_a_prefill_in_chunks_of_generate_is_refused_by_name(model: PreTrainedModel) -> None:
    ids = tokens(1, CONTEXT)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    with prune(model, HALF), pytest.raises(ValueError, match=r"prefill_chunk_size is 32, .* chunk_size=32\)"):
        model.generate(ids, prefill_chunk_size=32, **settings)


def test_a_question_may_be_any_sequence_of_ids() -> None:
    assert QueryAware(HALF, [5, 6]).question_ids == (5, 6)
    assert QueryAware(HALF, [5, 6]) == QueryAware(HALF, (5, 6))
