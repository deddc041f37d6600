"""``mixed``: exact counts, the order of the text, rows that are embeddings or pooled windows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

from condense_core.compressor.compressor import Compressor
from condense_core.compressor.config import CompressorConfig, num_kept
from condense_core.compressor.mixing import mix, num_exact

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

# fp32 through two layers, in packs of other shapes.
TOLERANCES = {"atol": 2e-4, "rtol": 2e-4}


def mixed_config(**changes: object) -> CompressorConfig:
    fields = {
        "method": "mixed",
        "d_model": 48,
        "encoder_layers": 2,
        "num_heads": 4,
        "mlp_hidden": 24,
        "residual": True,
        "window": 8,
        "ratios": (2.5, 4),
    }
    return CompressorConfig(**(fields | changes))


@pytest.fixture(scope="module")
def compressor(build_model: Callable[..., PreTrainedModel]) -> Compressor:
    made = Compressor(build_model(), mixed_config())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


@given(n=st.integers(1, 3000), window=st.integers(2, 32), share=st.floats(0, 1))
def test_exact_and_pooled_rows_are_as_many_as_asked_for(n: int, window: int, share: float) -> None:
    ratio = round(1 + share * (window - 1), 2)
    exact = num_exact(n, ratio, window)
    assert 0 <= exact <= n
    assert exact + -(-(n - exact) // window) == num_kept(n, ratio)
    more = exact + 1
    assert exact == n or more + -(-(n - more) // window) > num_kept(n, ratio)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    ratio=st.sampled_from([1, 1.5, 2.5, 4, 8]),
    with_sentences=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_token_is_used_once_and_rows_stand_in_the_order_of_the_text(
    lengths: list[int], ratio: float, with_sentences: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    scores = torch.randn(ends[-1], generator=generator)
    sentences = [i // 7 for n in lengths for i in range(n)] if with_sentences else None
    made = mix(scores, ends, ratio, 8, sentences)
    assert sorted([*made.exact.tolist(), *made.pooled.tolist()]) == list(range(ends[-1]))
    last = [
        made.pooled[min(at + 8, stop) - 1].item()
        for start, stop in pairwise(made.cu_seqlens)
        for at in range(start, stop, 8)
    ]
    places = torch.tensor([*made.exact.tolist(), *last])[made.order]
    assert places.tolist() == sorted(places.tolist())
    assert len(made.order) == sum(num_kept(n, ratio) for n in lengths)
    for start, stop in pairwise(ends):  # each text has rows of its own tokens
        assert ((places >= start) & (places < stop)).sum() == num_kept(stop - start, ratio)


def test_the_best_sentences_stay_whole() -> None:
    sentences = [0] * 5 + [1] * 5 + [2] * 10
    scores = torch.tensor([0.0] * 5 + [3.0] * 5 + [1.0] * 10)
    made = mix(scores, [0, 20], 2.5, 8, sentences)  # 8 rows: 6 exact, 14 pooled in two windows
    assert made.exact.tolist()[:5] == [5, 6, 7, 8, 9]
    assert len(made.exact) == 6


@torch.no_grad()
def test_rows_are_embeddings_or_pooled_windows(compressor: Compressor) -> None:
    ids = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:50]
    soft, scores = compressor.mixed(ids, [0, 50], 2.5)
    made = mix(scores, [0, 50], 2.5, 8, None)
    embeds = compressor.embed_tokens(ids)
    hidden, _ = compressor.encoder(embeds, [0, 50])
    assert compressor.pooler is not None
    pooled = compressor.pooler(hidden[made.pooled], None, 8)
    lengths = torch.tensor([min(8, len(made.pooled) - at) for at in range(0, len(made.pooled), 8)])
    windows = compressor.projection(pooled, embeds[made.pooled], lengths)
    back = torch.empty_like(soft)
    back[made.order] = soft
    assert torch.equal(back[: len(made.exact)], embeds[made.exact])
    torch.testing.assert_close(back[len(made.exact) :], windows, **TOLERANCES)


@torch.no_grad()
def test_at_ratio_1_it_returns_the_embeddings(compressor: Compressor) -> None:
    ids = torch.arange(3, 40)
    assert torch.equal(compressor(ids, [0, 37], 1), compressor.embed_tokens(ids))


def test_the_scorer_learns_from_its_own_loss_alone(compressor: Compressor) -> None:
    ids = torch.arange(3, 60)
    soft, scores = compressor.mixed(ids, [0, 57], 4)
    assert compressor.scorer is not None
    (gradient,) = torch.autograd.grad(scores.sum(), [compressor.scorer.down.weight], retain_graph=True)
    assert gradient.abs().sum() > 0
    assert torch.autograd.grad(soft.sum(), [compressor.scorer.down.weight], allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window: got 0, expected at least 2 for the method 'mixed'"),
        ({"method": "pool", "ratios": (4,)}, "window: got 8, expected .* 0 for others"),
        ({"residual": False}, "'mixed' has only the last of them, and needs it"),
        ({"halo": 2}, "'mixed' has only the last"),
        ({"ratios": (4, 16)}, "ratio: got 16, expected at most 8, the window"),
    ],
)
def test_a_bad_config(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixed_config(**changes)
