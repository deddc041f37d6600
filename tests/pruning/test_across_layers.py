"""AcrossLayers: one budget for the heads of all layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from condense_core.pruning.cache import PrunedCache
from condense_core.pruning.dense import DensePrefill
from condense_core.pruning.methods import KeyDiff, KVzip, SnapKV
from condense_core.pruning.wrappers import AcrossLayers, AdaKV, CriticalKV, Rerotate, Sentences, Threshold
from condense_core.pruning.wrappers.kept import kept_mask
from condense_testing.pruning.method_cases import INF, make_case

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("padding", ["none", "left"])
def test_the_best_of_all_heads_of_all_layers_stay(padding: str) -> None:
    ctx = make_case(padding=padding).ctx
    generator = torch.Generator().manual_seed(2)
    scores = [ctx.protect((1 + i) * torch.rand(2, 2, 83, generator=generator), sink=2) for i in range(3)]
    scores[0][:, 1, 2:] -= 5  # next to nothing of this head is worth keeping
    scores[0] = ctx.protect(scores[0], sink=2)
    method = AcrossLayers(SnapKV(keep=0.5, window=8))
    ranked = method.across(scores, [ctx] * 3)
    masks = [kept_mask(method.select(own, ctx), 2, 2, 83) for own in ranked]
    for b in range(2):
        pairs = [(float(scores[i][b, g, t]), i, g, t) for i in range(3) for g in range(2) for t in range(83)]
        best = sorted(pairs, reverse=True)[: 3 * 2 * ctx.budgets[b]]
        expected = {(i, g, t) for _, i, g, t in best}
        assert {(i, g, t) for i in range(3) for g, t in masks[i][b].nonzero().tolist()} == expected
    assert masks[0][:, 1].sum(1).tolist() == [2, 2]


def test_a_head_that_wins_nothing_keeps_its_best_token() -> None:
    ctx = make_case().ctx
    scores = [torch.rand(2, 2, 83) + 1, torch.rand(2, 2, 83)]
    method = AcrossLayers(KeyDiff(keep=0.5))
    ranked = method.across(scores, [ctx] * 2)
    masks = [kept_mask(method.select(own, ctx), 2, 2, 83) for own in ranked]
    assert sum(int(mask[0].sum()) for mask in masks) >= 2 * 2 * ctx.budgets[0]
    for b in range(2):
        for g in range(2):
            assert masks[1][b, g, scores[1][b, g].argmax()]


@pytest.mark.parametrize("chunk_size", [None, 25])
def test_a_cache_holds_as_much_as_heads_that_share_nothing(lively_model: Build, chunk_size: int | None) -> None:
    model = lively_model()
    ids = torch.randint(3, 400, (1, 90), generator=torch.Generator().manual_seed(1))
    for method in (SnapKV(keep=0.3, window=8), KVzip(keep=0.3, prompt_ids=(3,))):
        cache = PrunedCache.prefill(model, ids, AcrossLayers(method), chunk_size=chunk_size)
        counts = [layer.lengths.tolist() for layer in cache.layers]
        assert sum(map(sum, counts)) == 3 * 2 * 27
        assert len({count for layer in counts for count in layer}) > 1
        with cache.attached(model):
            model.generate(**cache.inputs(torch.tensor([[5, 6]])), max_new_tokens=3, pad_token_id=0)


def test_kvzip_of_all_layers_is_the_published_selection(lively_model: Build) -> None:
    """The largest scores of the whole model, where each pass's are those of ``KVzip`` alone."""
    model = lively_model()
    ids = torch.randint(3, 400, (1, 60), generator=torch.Generator().manual_seed(3))
    seen: list[torch.Tensor] = []

    class Spy(KVzip):
        def score(self, *args: object) -> torch.Tensor:
            scores = super().score(*args)  # type: ignore[arg-type]
            seen.append(scores[0, :, :60])
            return scores

    cache = DensePrefill(model, ids).prune(AcrossLayers(Spy(keep=0.25, prompt_ids=(3, 4))))
    flat = torch.stack(seen).flatten()
    least = flat.topk(3 * 2 * 15).values[-1]
    for layer, scores in zip(cache.layers, seen, strict=True):
        offsets = layer.cu_seqlens.tolist()
        for g in range(2):
            kept = layer.positions[offsets[g] : offsets[g + 1]].long()
            assert (scores[g, kept] >= least).all()
            assert len(kept) == int((scores[g] >= least).sum())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AdaKV(AcrossLayers(SnapKV(keep=0.5))),
            "AdaKV: method is AcrossLayers.* compete across layers already",
        ),
        (lambda: CriticalKV(AcrossLayers(SnapKV(keep=0.5))), "CriticalKV: method is AcrossLayers"),
        (lambda: Threshold(AcrossLayers(SnapKV(keep=0.5)), 0.1), "Threshold: method is AcrossLayers"),
        (lambda: AcrossLayers(AcrossLayers(SnapKV(keep=0.5))), "AcrossLayers: method is AcrossLayers"),
        (lambda: AcrossLayers(Rerotate(SnapKV(keep=0.5))), "AcrossLayers: method is Rerotate"),
        (lambda: AcrossLayers(Threshold(SnapKV(keep=0.5), 0.1)), "AcrossLayers: method is Threshold"),
        (lambda: Sentences(AcrossLayers(SnapKV(keep=0.5))), "Sentences: method is AcrossLayers"),
    ],
)
def test_what_does_not_go_together(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_padding_is_never_kept() -> None:
    ctx = make_case(padding="right").ctx
    scores = [ctx.protect(torch.rand(2, 2, 83)) for _ in range(2)]
    method = AcrossLayers(KeyDiff(keep=0.9))
    for own in method.across(scores, [ctx] * 2):
        assert (kept_mask(method.select(own, ctx), 2, 2, 83) <= (scores[0] > -INF)).all()
