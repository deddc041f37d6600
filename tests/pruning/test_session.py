"""Sessions: what is generated inside one is what the model computes from the kept tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.pruning.methods.snapkv import SnapKV
from condense_core.pruning.session import prune
from condense_core.pruning.wrappers import AdaKV, Rerotate
from condense_testing.pruning import models
from condense_testing.pruning.sessions import (
    ATTENTIONS,
    EVICTING,
    FAMILIES,
    FAMILY_ATTENTIONS,
    HALF,
    NUM_TOKENS,
    SLIDING_ATTENTIONS,
    TOLERANCE,
    Build,
    generate_ids,
    tokens,
)


@pytest.mark.parametrize(("family", "attention"), FAMILY_ATTENTIONS)
def test_keeping_all_generates_what_the_model_does(lively_model: Build, family: str, attention: str) -> None:
    model = lively_model(family, attention)
    ids, mask, _ = models.padded(tokens(3, NUM_TOKENS), (NUM_TOKENS, 61, 40), "left")
    for batch in ((ids[:1], None), (ids, mask)):
        expected = generate_ids(model, *batch)
        for method in (SnapKV(keep=1.0), AdaKV(SnapKV(keep=1.0)), Rerotate(SnapKV(keep=1.0))):
            with prune(model, method):
                assert generate_ids(model, *batch).tolist() == expected.tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_keeping_all_searches_and_samples_alike(lively_model: Build, attention: str) -> None:
    model = lively_model("llama", attention)
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 50), "left")
    ways = {"beams": {"num_beams": 3}, "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 20}}
    for options in ways.values():
        torch.manual_seed(7)
        expected = generate_ids(model, ids, mask, **options)
        torch.manual_seed(7)
        with prune(model, SnapKV(keep=1.0)):
            assert generate_ids(model, ids, mask, **options).tolist() == expected.tolist()


@pytest.mark.parametrize(("window", "attention"), SLIDING_ATTENTIONS)
def test_keeping_all_of_a_sliding_window(lively_model: Build, window: int, attention: str) -> None:
    """The window is shorter than the prompt, or longer; it slides on while 40 tokens are generated."""
    model = lively_model("mistral", attention, sliding_window=window)
    ids, mask, _ = models.padded(tokens(3, NUM_TOKENS), (NUM_TOKENS, 61, 13), "left")
    for batch in ((ids[:1], None), (ids, mask)):
        expected = generate_ids(model, *batch, count=40)
        # A budget of more tokens than the window has evicts what no later token will see, and nothing else.
        for method in (SnapKV(keep=1.0), SnapKV(budget=60, window=8), AdaKV(SnapKV(budget=60, window=8))):
            if window == 24 or (isinstance(method, SnapKV) and method.keep):
                with prune(model, method):
                    assert generate_ids(model, *batch, count=40).tolist() == expected.tolist(), method


def test_layers_with_a_window_and_layers_without(lively_model: Build) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    model, ids = lively_model("qwen2", **changes), tokens(1, NUM_TOKENS)
    expected = generate_ids(model, ids, count=30)
    for method in (SnapKV(keep=1.0), AdaKV(SnapKV(keep=1.0))):
        with prune(model, method):
            assert generate_ids(model, ids, count=30).tolist() == expected.tolist()
    with prune(model, SnapKV(budget=60, window=8)):
        assert [layer.held for layer in model(ids).past_key_values.layers] == [60, 23, 23]
    with prune(model, Rerotate(HALF)), pytest.raises(ValueError, match=r"its layers keep 23 to 45 tokens"):
        model(ids)


def check_generated(model: PreTrainedModel, method: Any, ids: Tensor, mask: Tensor, sequences: list[Tensor]) -> None:
    """Logits and tokens of a generation inside a session, sequence by sequence, against the reference."""
    first: dict[str, Any] = {}

    def remember(module: Any, args: Any, output: Any) -> None:
        first.setdefault("kept", [models.kept(output.past_key_values, b, len(s)) for b, s in enumerate(sequences)])

    handle = model.register_forward_hook(remember)
    try:
        with prune(model, method):
            out = generate_ids(model, ids, mask, 6, return_dict_in_generate=True, output_logits=True)
    finally:
        handle.remove()
    logits = torch.stack(out.logits, 1)  # [B, 6, V]
    reference = models.Reference(model)
    for b, sequence in enumerate(sequences):
        context = reference.prefill(sequence)
        models.close(logits[b, 0], context.logits[-1], TOLERANCE)
        columns = first["kept"][b]
        positions = [[list(range(len(head))) for head in layer] for layer in columns] if method.traits.rotates else None
        if method.traits.rotates:
            columns = moved_columns(model, method, sequence)
        start = len(columns[0][0]) if method.traits.rotates else len(sequence)
        new = out.sequences[b, ids.shape[1] :]
        expected = reference.answer(context, columns, new[:-1], start, positions)
        models.close(logits[b, 1:], expected, TOLERANCE)
        assert expected.argmax(-1).tolist() == new[1:].tolist()
        total = sum(len(head) for layer in columns for head in layer)
        budgets = [method.num_kept(len(sequence), index, len(columns)) for index in range(len(columns))]
        assert total == sum(budgets) * len(columns[0])
        assert total < len(sequence) * len(columns) * len(columns[0])


def moved_columns(model: PreTrainedModel, method: Rerotate, sequence: Tensor) -> Any:
    """The columns that the method inside keeps: where a cache was moved, its positions do not say."""
    with prune(model, method.method):
        cache = model(sequence[None]).past_key_values
    return models.kept(cache, 0, len(sequence))


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_sees_the_kept_tokens(lively_model: Build, attention: str, name: str) -> None:
    ids = tokens(1, NUM_TOKENS)
    check_generated(lively_model("mistral", attention), EVICTING[name], ids, torch.ones_like(ids), [ids[0]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["uniform", "ragged", "pyramid"])
def test_generation_of_a_batch_sees_each_sequences_kept_tokens(lively_model: Build, family: str, name: str) -> None:
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), (NUM_TOKENS, 61, 40), "left")
    check_generated(lively_model(family), EVICTING[name], ids, mask, sequences)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_goes_on_behind_moved_keys(lively_model: Build, attention: str) -> None:
    model, method = lively_model("qwen2", attention), Rerotate(HALF)
    ids, mask, sequences = models.padded(tokens(3, NUM_TOKENS), (NUM_TOKENS, 61, 40), "left")
    check_generated(model, method, ids[:1], mask[:1], sequences[:1])
    check_generated(model, method, ids, mask, sequences)


@pytest.mark.parametrize("name", ["uniform", "ragged"])
def test_embeddings_generate_what_their_ids_do(lively_model: Build, name: str) -> None:
    model = lively_model("qwen2")
    ids, mask, _ = models.padded(tokens(2, NUM_TOKENS), (NUM_TOKENS, 40), "left")
    with prune(model, EVICTING[name]):
        expected = generate_ids(model, ids, mask)
        embeds = model.get_input_embeddings()(ids)
        found = model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    assert found.tolist() == expected.tolist()
