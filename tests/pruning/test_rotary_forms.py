"""What moves keys, or scores by their rotary embedding, is right for every form of it that a model may have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from condense_core.pruning import (
    Compactor,
    Decoding,
    ExpectedAttention,
    Knorm,
    LeverageScore,
    PrunedCache,
    Rerotate,
    SnapKV,
    StreamingLLM,
    prune,
)
from condense_core.pruning.methods.leverage import leverage, projection
from condense_core.pruning.rotary_check import rotary_of

Build = Callable[..., PreTrainedModel]

ALL = SnapKV(keep=1.0)
READERS = (ExpectedAttention(keep=0.5), LeverageScore(keep=0.5), Compactor(keep=0.5))
# One of each form: halves, pairs, pairs of the first channels, halves of the first, none in some layers, two tables.
FORMS = ("Llama", "Cohere", "Glm4", "StableLm", "SmolLM3", "Cohere2", "Gemma3Text", "GptOss", "NanoChat")


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(seed))


def first_keys(cache: PrunedCache) -> Tensor:
    """Keys of layer 0, which depend on a token and its position alone."""
    return cache.layers[0].keys


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [None, 32])
@pytest.mark.parametrize("family", FORMS)
def test_rerotate_leaves_the_keys_of_a_text_without_the_dropped_tokens(
    family_model: Build, family: str, chunk_size: int | None
) -> None:
    model, ids, keep = family_model(family), tokens(90), StreamingLLM(budget=24)
    kept = PrunedCache.prefill(model, ids, keep, chunk_size=chunk_size).layers[0].positions[0, 0].long()
    expected = first_keys(PrunedCache.prefill(model, ids[:, kept], ALL))
    found = first_keys(PrunedCache.prefill(model, ids, Rerotate(keep), chunk_size=chunk_size))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FORMS)
def test_merged_caches_have_the_keys_of_one_text(family_model: Build, family: str) -> None:
    model, ids = family_model(family), tokens(90)
    parts = [PrunedCache.prefill(model, part, ALL) for part in ids.split((31, 40, 19), 1)]
    merged = PrunedCache.merge(PrunedCache.merge(parts[0], parts[1]), parts[2])
    expected = first_keys(PrunedCache.prefill(model, ids, ALL))
    torch.testing.assert_close(first_keys(merged), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FORMS)
def test_a_merge_of_caches_from_files_is_the_same(family_model: Build, family: str, tmp_path: Path) -> None:
    model, ids = family_model(family), tokens(60)
    parts = [PrunedCache.prefill(model, part, ALL) for part in ids.split(30, 1)]
    expected = first_keys(PrunedCache.merge(*parts))
    for i, part in enumerate(parts):
        part.save(tmp_path / f"{i}.safetensors")
    loaded = [PrunedCache.load(tmp_path / f"{i}.safetensors") for i in range(2)]
    assert torch.equal(first_keys(PrunedCache.merge(*loaded)), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FORMS)
def test_expected_attention_is_its_formula(family_model: Build, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries before RoPE come from positions 0 of the model's own rotation; the mean rotation is applied key by key.

    ``k' R mu`` is the mean over future positions t of ``k' R_t mu``, each by ``Rotary.move``.
    """
    model, ids, given = family_model(family), tokens(50), {}
    method = ExpectedAttention(keep=0.5, sink=2, future=7, use_covariance=False, use_vnorm=False)
    own = ExpectedAttention.score

    def score(self, layer, q, k, v, ctx):  # type: ignore[no-untyped-def]
        given[ctx.layer_idx] = q, k, ctx, own(self, layer, q, k, v, ctx)
        return given[ctx.layer_idx][3]

    monkeypatch.setattr(ExpectedAttention, "score", score)
    PrunedCache.prefill(model, ids, method)
    assert set(given) == {0, 1}
    for q, k, ctx, found in given.values():
        rotary = rotary_of(model)[ctx.layer_idx]
        factor = torch.ones(rotary.width)
        factor[: rotary.rotary_dim] = rotary.factor
        raw = rotary.move(q.double(), -torch.arange(50)) / factor
        mean = raw[:, :, 2:].mean(2)  # [1, H, D]
        moved = torch.stack([rotary.move(mean, torch.tensor(50 + t)) for t in range(7)]).mean(0) * factor
        keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = (keys @ moved[..., None]).squeeze(-1) * ctx.scale
        weights = logits[:, :, 2:].softmax(-1).unflatten(1, (k.shape[1], -1)).mean(2)
        torch.testing.assert_close(found[:, :, 2:].double(), weights, atol=1e-5, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", FORMS)
def test_leverage_is_that_of_keys_before_their_rotation(
    family_model: Build, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = family_model(family), {}
    own = LeverageScore.score

    def score(self, layer, q, k, v, ctx):  # type: ignore[no-untyped-def]
        given[ctx.layer_idx] = k, own(self, layer, q, k, v, ctx)
        return given[ctx.layer_idx][1]

    monkeypatch.setattr(LeverageScore, "score", score)
    PrunedCache.prefill(model, tokens(50), LeverageScore(keep=0.5))
    for index, (k, found) in given.items():
        rotary = rotary_of(model)[index]
        factor = torch.ones(rotary.width)
        factor[: rotary.rotary_dim] = rotary.factor
        raw = rotary.to_halves(rotary.move(k, -torch.arange(50)) / factor)
        phi = projection(0, index, (k.shape[1], k.shape[3], 48))
        still = torch.ones(1, 50, k.shape[3]), torch.zeros(1, 50, k.shape[3])
        torch.testing.assert_close(found, leverage(raw, *still, phi, None), atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", FORMS)
def test_methods_that_read_the_embedding_prune_while_generating(family_model: Build, family: str) -> None:
    """Decoding scores by remembered queries, whose rotation is made from their positions."""
    model, ids = family_model(family), tokens(40)
    with prune(model, Decoding(ExpectedAttention(keep=0.5), budget=16, interval=4)):
        cache = DynamicCache(config=model.config)
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
    assert [layer.held < 20 for layer in cache.layers] == [True, True]


@torch.no_grad()
def test_only_methods_that_need_the_embedding_are_refused_for_it(family_model: Build) -> None:
    """Frequencies that change with the length: Knorm and SnapKV leave keys where they are."""
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model, ids = family_model("Llama", rope_parameters=scaled), tokens(50)
    for method in (Knorm(keep=0.5), SnapKV(keep=0.5, window=8)):
        cache = PrunedCache.prefill(model, ids, method)
        assert model(**cache.inputs(ids[:, :4])).logits.isfinite().all()
        with pytest.raises(ValueError, match="merge: it is not known how 'unnamed' turns its keys"):
            PrunedCache.merge(cache, cache)
    for method in (*READERS, Rerotate(Knorm(keep=0.5))):
        with pytest.raises(ValueError, match=r"needs to know .* LlamaForCausalLM is of the kind 'dynamic'") as error:
            PrunedCache.prefill(model, ids, method)
        assert "\n" not in str(error.value)
