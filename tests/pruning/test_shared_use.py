"""Caches and sessions that more than one caller, thread or layer has to do with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import copy_context
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from condense_core.pruning import Knorm, PrunedCache, PyramidKV, SnapKV, prune
from condense_core.pruning.text import restoring

Build = Callable[..., PreTrainedModel]
HALF = SnapKV(keep=0.5, window=8)


def tokens(batch: int, count: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


def test_a_cache_that_is_being_asked_says_so(family_model: Build) -> None:
    model = family_model("Llama")
    cache, other = (PrunedCache.prefill(model, tokens(1, 60), HALF) for _ in range(2))
    errors: list[Exception] = []

    def ask() -> None:
        try:
            with restoring(model, cache):
                pass
        except ValueError as error:
            errors.append(error)

    with restoring(model, cache):
        thread = Thread(target=ask)
        thread.start()
        thread.join()
        with restoring(model, other):
            pass
    assert len(errors) == 1
    assert "it is being asked already" in str(errors[0])
    for _ in range(2):  # afterwards it is free again, also behind an error
        with pytest.raises(KeyError), restoring(model, cache):
            raise KeyError
        ask()
    assert len(errors) == 1


def test_a_thread_that_began_in_a_session_is_told_that_it_has_none(family_model: Build) -> None:
    model, ids = family_model("Llama"), tokens(1, 40)

    def caught(target: Callable[..., Any], *args: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            thread = Thread(target=target, args=args, name="worker")
            thread.start()
            thread.join()
        return [str(one.message) for one in found if "was started in the session" in str(one.message)]

    def twice() -> None:
        for _ in range(2):
            model(ids)

    with prune(model, HALF):
        assert [text.split(" was")[0] for text in caught(twice)] == ["prune: 'worker'"]
        assert not caught(copy_context().run, model, ids)
    assert not caught(model, ids)


class _Reads(TorchFunctionMode):
    """Counts what is read back from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (Tensor.__bool__, Tensor.item, Tensor.tolist)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_layers_of_different_sizes_read_a_mask_back_once(family_model: Build) -> None:
    model, question = family_model("Llama", num_hidden_layers=6), tokens(1, 1, 2)
    counts = []
    for method in (HALF, PyramidKV(HALF, beta=4)):
        cache = PrunedCache.prefill(model, tokens(1, 90), method)
        with cache.attached(model):
            inputs = cache.inputs(question)
            with _Reads() as reads:
                model(**inputs)
        counts.append(reads.count)
    assert counts[0] == counts[1]


@torch.no_grad()
@pytest.mark.parametrize("method", [Knorm(keep=0.5), Knorm(budget=15)], ids=["all of the window", "a part of it"])
def test_chunks_keep_what_a_sliding_window_will_see(family_model: Build, method: Knorm) -> None:
    """A query at position 90 looks back at 23 tokens: nothing before them is kept, read at once or in chunks."""
    model = family_model("Mistral", sliding_window=24)
    for chunk_size in (None, 20, 45):
        cache = PrunedCache.prefill(model, tokens(1, 90), method, chunk_size=chunk_size)
        for layer in cache.layers:
            assert layer.held == min(23, method.num_kept(90, 0, 1))
            assert int(layer.positions.min()) >= 90 - 23
