"""A model that torch.compile made, inside a session: the same numbers, and no new program for each length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from condense_core.pruning import AdaKV, Method, SnapKV, prune

LENGTHS = (40, 41, 47, 56, 60)  # the second makes the length dynamic, the third is the first that may find a program


@pytest.fixture
def fresh_dynamo():
    """No programs of other tests count towards the limit, or are left behind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def logits_of_a_conversation(model: PreTrainedModel, forward: Callable, method: Method, length: int) -> Tensor:
    """Logits ``[1, 3, V]`` of a pruned prefill of ``length`` tokens and two steps behind it."""
    ids = torch.randint(3, 400, (1, length), generator=torch.Generator().manual_seed(length))
    found = []
    with prune(model, method), torch.no_grad():
        cache = DynamicCache(config=model.config)
        for _ in range(3):
            found.append(forward(ids, past_key_values=cache, use_cache=True).logits[:, -1:])
            ids = found[-1].argmax(-1)
    return torch.cat(found, 1)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(SnapKV(keep=0.5, window=8), id="uniform layers"),
        pytest.param(AdaKV(SnapKV(keep=0.5, window=8)), id="ragged layers", marks=pytest.mark.slow),
    ],
)
def test_lengths_share_a_program_and_change_no_number(lively_model, method):
    model = lively_model("llama", num_hidden_layers=2)
    compiled = torch.compile(model, backend="eager")  # dynamo alone: what it makes of the code behind is not ours
    programs = []
    for length in LENGTHS:
        own = logits_of_a_conversation(model, model, method, length)
        torch.testing.assert_close(logits_of_a_conversation(model, compiled, method, length), own)
        programs.append(torch._dynamo.utils.counters["frames"]["total"])
    assert programs[-1] == programs[2], f"programs after each length: {programs}; expected none after the third"
