"""A session's scope: outside of it, behind it and in other threads, the model is as it was."""

from __future__ import annotations

import contextvars
import sys
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from condense_core.pruning.base import LayerContext, ScoringMethod
from condense_core.pruning.layers import UniformLayer
from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV
from condense_testing.pruning import models
from condense_testing.pruning.session_state import state
from condense_testing.pruning.sessions import (
    ATTENTIONS,
    HALF,
    NUM_TOKENS,
    Build,
    generate_ids,
    tokens,
)


class Failing(ScoringMethod):
    """Raises in the layer ``at``."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        object.__setattr__(self, "keep", 0.5)
        object.__setattr__(self, "budget", None)
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "error", error)

    def score(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, ctx: LayerContext) -> Tensor:
        if ctx.layer_idx == self.at:  # type: ignore[attr-defined]
            raise self.error("on purpose")  # type: ignore[attr-defined]
        return k.float().norm(dim=-1)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_model_as_it_was(
    lively_model: Build, attention: str, error: type[BaseException]
) -> None:
    model, ids = lively_model("llama", attention), tokens(1, NUM_TOKENS)
    before, expected = state(model), generate_ids(model, ids)
    cache = DynamicCache()
    with pytest.raises(error, match="on purpose"), prune(model, Failing(1, error)):
        model(ids, past_key_values=cache)
    assert state(model) == before
    assert not any(layer.in_session for layer in cache.layers if isinstance(layer, UniformLayer))
    assert generate_ids(model, ids).tolist() == expected.tolist()
    with prune(model, HALF):  # and a new session begins from nothing
        out = generate_ids(model, ids, return_dict_in_generate=True)
    assert out.past_key_values.layers[2].num_kept == 45
    assert state(model) == before


def test_an_exception_inside_a_session_does_not_spoil_it(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    with prune(model, HALF):
        expected = generate_ids(model, ids)
    with prune(model, HALF) as session:
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS))
        assert session._state.call is None
        assert generate_ids(model, ids).tolist() == expected.tolist()


def test_the_innermost_session_prunes(lively_model: Build) -> None:
    model, other, ids = lively_model(), lively_model("qwen3"), tokens(1, NUM_TOKENS)
    before = state(model), state(other)

    def held() -> int:
        return model(ids).past_key_values.layers[0].held

    with prune(model, SnapKV(keep=0.5, window=8)):
        assert held() == 45
        with prune(model, SnapKV(budget=20, window=8)):
            assert held() == 20
            with prune(other, SnapKV(budget=11, window=8)):  # another model's does not count
                assert held() == 20
                assert other(ids).past_key_values.layers[0].held == 11
        assert held() == 45
        assert type(other(ids).past_key_values.layers[0]) is not UniformLayer
    assert (state(model), state(other)) == before
    assert type(model(ids).past_key_values.layers[0]) is not UniformLayer


def test_sessions_may_end_in_any_order(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    before = state(model)
    outer, inner = prune(model, SnapKV(budget=30, window=8)), prune(model, SnapKV(budget=20, window=8))
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert model(ids).past_key_values.layers[0].held == 20
    inner.__exit__(None, None, None)
    assert state(model) == before


def test_a_session_is_opened_once(lively_model: Build) -> None:
    model = lively_model()
    before = state(model)
    session = prune(model, HALF)
    with session:
        with pytest.raises(RuntimeError, match="open already"), session:
            pass
        assert model(tokens(1, NUM_TOKENS)).past_key_values.layers[0].held == 45
    assert state(model) == before
    with session:  # but again, once it has ended
        assert model(tokens(1, NUM_TOKENS)).past_key_values.layers[0].held == 45
    assert state(model) == before


def test_generate_outside_is_unaffected(lively_model: Build) -> None:
    model, ids = lively_model(), tokens(1, NUM_TOKENS)
    expected = model(ids).logits
    with prune(model, HALF):
        pass
    assert torch.equal(model(ids).logits, expected)


def test_threads_have_sessions_of_their_own(lively_model: Build) -> None:
    """Two threads prune by different methods, a third without a session gets the plain model's bits meanwhile."""
    model = lively_model("llama")
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 47), "left")
    methods = [HALF, AdaKV(SnapKV(budget=30, window=8)), None]
    before, expected = state(model), []
    for method in methods:
        if method is None:
            expected.append(model(ids, attention_mask=mask).logits)
        else:
            with prune(model, method):
                expected.append(generate_ids(model, ids, mask, 4))
    barrier, wrong, errors = Barrier(3), [], []

    def work(index: int) -> None:
        try:
            barrier.wait()
            for _ in range(12):
                method = methods[index]
                if method is None:
                    same = torch.equal(model(ids, attention_mask=mask).logits, expected[index])
                else:
                    with prune(model, method):
                        same = torch.equal(generate_ids(model, ids, mask, 4), expected[index])
                if not same:
                    wrong.append(index)
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=work, args=(index,)) for index in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that threads take turns inside a layer, not only between passes
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert not wrong
    assert state(model) == before


@pytest.mark.parametrize("where", ["before", "behind", "layer"])
def test_a_session_may_end_amid_a_pass_of_another_thread(lively_model: Build, where: str) -> None:
    """torch has collected a module's hooks by then, but no longer knows that they take keyword arguments."""
    model, ids = lively_model("qwen2"), tokens(1, NUM_TOKENS)
    prune(model, HALF)  # the model has been looked at once, before anything waits in it
    expected = model(ids).logits
    reached, ended = Event(), Event()

    def wait(*_: Any) -> None:
        reached.set()
        assert ended.wait(20)

    module = model.model.layers[1].self_attn if where == "layer" else model.model
    handle = (module.register_forward_hook if where == "behind" else module.register_forward_pre_hook)(wait)
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(model(ids).logits)
        except Exception as error:
            found.append(error)

    thread = Thread(target=work)
    try:
        with prune(model, HALF):
            thread.start()
            assert reached.wait(20)
    finally:
        ended.set()
        thread.join()
        handle.remove()
    assert isinstance(found[0], Tensor), found[0]
    assert torch.equal(found[0], expected)


def test_a_copy_of_the_context_takes_the_session_along(lively_model: Build) -> None:
    model, ids, held = lively_model(), tokens(1, NUM_TOKENS), []

    def work() -> None:
        held.append(model(ids).past_key_values.layers[0])

    with prune(model, HALF):
        context = contextvars.copy_context()
        for target in (work, lambda: context.run(work)):
            thread = Thread(target=target)
            thread.start()
            thread.join()
    assert type(held[0]) is not UniformLayer
    assert held[1].held == 45
