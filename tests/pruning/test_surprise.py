"""Surprise: the model's own loss on the context decides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from condense_core.pruning import surprise as module
from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.methods import Surprise
from condense_core.pruning.session import prune
from condense_core.pruning.surprise import token_surprise

Build = Callable[..., PreTrainedModel]
# float32 logits from hidden states of one pass, or of several
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def context(batch: int = 1) -> Tensor:
    return torch.randint(3, 400, (batch, 90), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of one sequence ``[N]``, from the logits that the model gives."""
    logits = model(input_ids=ids[None]).logits[0].double()
    found = torch.zeros(len(ids), dtype=torch.float64)
    for t in range(1, len(ids)):
        found[t] = F.cross_entropy(logits[t - 1], ids[t])
    return found


def test_surprise_is_the_loss_of_each_token(lively_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lively_model(), context(2)
    hidden = model.model(input_ids=ids).last_hidden_state
    whole = token_surprise(model, hidden, ids)
    for b in range(2):
        torch.testing.assert_close(whole[b].double(), losses(model, ids[b]), **TOLERANCE)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 400 * 7)  # seven rows at a time
    torch.testing.assert_close(token_surprise(model, hidden, ids), whole, **TOLERANCE)


@pytest.mark.parametrize("chunk_size", [None, 30])
def test_the_most_surprising_tokens_stay(lively_model: Build, chunk_size: int | None) -> None:
    """In chunks, what an eviction leaves changes how later tokens surprise: then only what the first chunk says."""
    model, ids = lively_model(), context()
    cache = PrunedCache.prefill(model, ids, Surprise(keep=0.4, sink=3), chunk_size=chunk_size)
    expected = losses(model, ids[0])
    expected[:3] = torch.inf
    for layer in cache.layers:
        for g in range(2):
            kept = set(layer.positions[0, g].tolist())
            assert len(kept) == 36
            if chunk_size is None:
                assert kept == set(expected.topk(36).indices.tolist())
            else:
                early = sorted(place for place in kept if place < 30)
                assert early == sorted(expected[:30].topk(len(early)).indices.tolist())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_keeps_what_its_sequences_keep_alone(lively_model: Build, side: str) -> None:
    model, ids = lively_model(), context(2)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 31) if side == "left" else slice(59, 90)] = 0
    cache = PrunedCache.prefill(model, ids, Surprise(keep=0.4), attention_mask=mask)
    alone = [PrunedCache.prefill(model, ids[b : b + 1][:, mask[b].bool()], Surprise(keep=0.4)) for b in range(2)]
    for index, layer in enumerate(cache.layers):
        offsets = layer.cu_seqlens.tolist()
        for n in range(4):
            kept = layer.positions[offsets[n] : offsets[n + 1]]
            assert kept.tolist() == alone[n // 2].layers[index].positions[0, n % 2].tolist()


def test_tokens_must_be_known(lively_model: Build) -> None:
    model = lively_model()
    embeds = model.model.embed_tokens(context())
    with pytest.raises(ValueError, match="it reads tokens, expected input_ids and not inputs_embeds"):
        PrunedCache.prefill(model, None, Surprise(keep=0.5), inputs_embeds=embeds)
    with torch.no_grad(), prune(model, Surprise(keep=0.5)):
        cache = model(input_ids=context(), use_cache=True).past_key_values
    expected = PrunedCache.prefill(model, context(), Surprise(keep=0.5))
    for own, other in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(own.positions, other.positions)


def test_the_first_use_of_a_model_is_pruned_like_the_second(build_model: Callable[..., PreTrainedModel]) -> None:
    """The check of its logits runs the model, which must not be in the session."""
    model = build_model("mistral", max_position_embeddings=512)
    with torch.no_grad(), prune(model, Surprise(keep=0.5)):
        counts = [model(input_ids=context(), use_cache=True).past_key_values.layers[0].held for _ in range(2)]
    assert counts == [45, 45]
