"""Many continuations of one context: the same hidden states and tokens as behind a copy of the context each."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from condense_core.pruning import AdaKV, Method, PrunedCache, PyramidKV, Random, Rerotate, SnapKV
from condense_core.pruning.branches import Branches, WindowTooShort
from condense_core.tasks.architectures import FAMILIES

# fp32 logits of some units; the sums over the context and over the rest are added in another order.
TOLERANCE = 1e-4

CONTEXT = torch.arange(3, 63)[None] % 128
ROWS = ([5, 9, 77, 30, 2], [8, 8], [101, 44, 3, 9])
METHODS = {
    "whole": Random(keep=1.0),
    "uniform": SnapKV(keep=0.4, window=8),
    "moved": Rerotate(SnapKV(keep=0.4, window=8)),
    "uneven": PyramidKV(SnapKV(keep=0.4, window=8)),
    "ragged": AdaKV(SnapKV(keep=0.4, window=8)),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return next(family for family in FAMILIES if family.name == "Llama").build(max_position_embeddings=256)


def padded(rows: tuple[list[int], ...]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def alone(model: PreTrainedModel, cache: PrunedCache, row: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and five generated tokens of one row, behind a copy of the cache."""
    results = []
    for run in (model, lambda **inputs: model.generate(**inputs, max_new_tokens=5, do_sample=False)):
        own = copy.deepcopy(cache)
        with own.attached(model):
            results.append(run(**own.inputs(torch.tensor([row]))))
    return results[0].logits[0], results[1][0, len(row) :]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_each_row_gives_what_it_gives_alone(method: Method, model: PreTrainedModel) -> None:
    cache = PrunedCache.prefill(model, CONTEXT, method)
    held = [layer.keys.clone() for layer in cache.layers]
    ids, mask = padded(ROWS)
    with Branches(model, cache) as branches, torch.no_grad():
        logits = model(**branches.inputs(ids, mask)).logits
        tokens = model.generate(**branches.inputs(ids, mask), max_new_tokens=5, do_sample=False)
    for row, found, said in zip(ROWS, logits, tokens, strict=True):
        expected, expected_tokens = alone(model, cache, row)
        torch.testing.assert_close(found[-len(row) :], expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert said[ids.shape[1] :].tolist()[: len(expected_tokens)] == expected_tokens.tolist()
    assert all(torch.equal(layer.keys, before) for layer, before in zip(cache.layers, held, strict=True))


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_a_context_in_8_bits_is_read_as_it_is_restored(storage: str, model: PreTrainedModel) -> None:
    cache = PrunedCache.prefill(model, CONTEXT, SnapKV(keep=0.4, window=8)).quantize(storage)
    ids, mask = padded(ROWS)
    with Branches(model, cache) as branches, torch.no_grad():
        logits = model(**branches.inputs(ids, mask)).logits
    torch.testing.assert_close(logits[0, -5:], alone(model, cache, ROWS[0])[0], atol=TOLERANCE, rtol=TOLERANCE)


# Softcap, sinks, multipliers, layers without rotary embedding, and all heads with keys of their own; wide windows.
OTHERS = ("Mistral", "Qwen3", "Granite", "Gemma2", "Gemma3", "GPT-OSS", "SmolLM3", "Cohere", "Phi3")


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_families_with_an_attention_of_their_own(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    wide = {"sliding_window": 200} if "sliding_window" in family.settings else {}
    model = family.build(**wide)
    cache = DynamicCache()
    model(input_ids=CONTEXT, past_key_values=cache, use_cache=True)
    ids, mask = padded(ROWS)
    with Branches(model, cache) as branches:
        logits = model(**branches.inputs(ids, mask)).logits
    for row, found in zip(ROWS, logits, strict=True):
        whole = model(input_ids=torch.cat([CONTEXT, torch.tensor([row])], 1), use_cache=False).logits[0]
        torch.testing.assert_close(found[-len(row) :], whole[-len(row) :], atol=TOLERANCE, rtol=1e-3)


@pytest.mark.parametrize("name", ["Llama", *OTHERS])
@torch.no_grad()
def test_several_contexts_of_one_length_have_continuations_of_their_own(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model = family.build(**({"sliding_window": 200} if "sliding_window" in family.settings else {}))
    contexts = torch.cat([CONTEXT, CONTEXT.flip(1), (CONTEXT * 7 + 5) % 128])
    cache = DynamicCache()
    model(input_ids=contexts, past_key_values=cache, use_cache=True)
    rows = ROWS[:2] * 3
    ids, mask = padded(rows)
    with Branches(model, cache) as branches:
        logits = model(**branches.inputs(ids, mask)).logits
    for i, (row, found) in enumerate(zip(rows, logits, strict=True)):
        own = torch.cat([contexts[i // 2], torch.tensor(row)])[None]
        expected = model(input_ids=own, use_cache=False).logits[0, -len(row) :]
        torch.testing.assert_close(found[-len(row) :], expected, atol=TOLERANCE, rtol=1e-3)
    with pytest.raises(ValueError, match="input_ids: 4 rows, expected a multiple of 3"):
        branches.inputs(ids[:4], mask[:4])


@torch.no_grad()
def test_tokens_that_are_taken_back_leave_nothing_behind(model: PreTrainedModel) -> None:
    cache = DynamicCache()
    model(input_ids=CONTEXT, past_key_values=cache, use_cache=True)
    ids, mask = padded(ROWS)
    with Branches(model, cache) as branches:
        inputs = branches.inputs(ids, mask)
        expected = model(**inputs).logits[:, -1:]
        for layer in inputs["past_key_values"].layers:
            layer.forget(1)
        last = {name: inputs[name][:, -1:] for name in ("input_ids", "position_ids")}
        again = model(**inputs | last).logits
    torch.testing.assert_close(again, expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_without_a_context(model: PreTrainedModel) -> None:
    ids, mask = padded(ROWS)
    with Branches(model, None) as branches:
        logits = model(**branches.inputs(ids, mask)).logits
        tokens = model.generate(**branches.inputs(ids, mask), max_new_tokens=3, do_sample=False)
    for row, found, said in zip(ROWS, logits, tokens, strict=True):
        prompt = torch.tensor([row])
        torch.testing.assert_close(found[-len(row) :], model(prompt).logits[0], atol=TOLERANCE, rtol=TOLERANCE)
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
        assert said[ids.shape[1] :].tolist() == expected[0, len(row) :].tolist()


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    before = model.config._attn_implementation
    with pytest.raises(KeyError), Branches(model, None):
        raise KeyError
    assert model.config._attn_implementation == before


def test_a_window_that_does_not_hold_everything(build_model: Callable[..., PreTrainedModel]) -> None:
    model = build_model("mistral", sliding_window=40)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=CONTEXT, past_key_values=cache, use_cache=True)
    ids, mask = padded(ROWS)
    with pytest.raises(WindowTooShort, match="a window of 40 tokens"), Branches(model, cache) as branches:
        model(**branches.inputs(ids, mask))


@pytest.mark.parametrize("name", ["DiffLlama", "DeepSeek-V3", "Doge", "Llama4", "MiniMax"])
def test_an_attention_that_branches_cannot_read_is_refused(name: str) -> None:
    model = next(family for family in FAMILIES if family.name == name).build()
    with pytest.raises(TypeError, match=r"^model: "):
        Branches(model, None)


def test_a_pruned_cache_of_two_contexts_is_refused(model: PreTrainedModel) -> None:
    for method in (SnapKV(keep=0.4, window=8), AdaKV(SnapKV(keep=0.4, window=8))):
        cache = PrunedCache.prefill(model, CONTEXT.repeat(2, 1), method)
        with pytest.raises(ValueError, match="context: it holds 2 sequences, expected one"):
            Branches(model, cache)
