"""The heads by hand: what each starts as, where an ordered start looks, and where memory slots stand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from condense_core.compressor.config import CompressorConfig
from condense_core.compressor.pooler import MemoryTokens, Projection, ResidualProjection, WindowPooler

# fp32: means and softmaxes of a few values of order 1.
TOLERANCES = {"atol": 2e-6, "rtol": 2e-5}


def config(**changes: object) -> CompressorConfig:
    return CompressorConfig(**({"method": "pool", "d_model": 16, "encoder_layers": 0, "num_heads": 4} | changes))


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rows(count: int) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(count)) * 3


@pytest.mark.parametrize("method", ["pool", "mean"])
@pytest.mark.parametrize("window_queries", [False, True])
def test_an_untrained_pooler_is_the_mean_of_each_window(method: str, window_queries: bool) -> None:
    heads = 4 if method == "pool" else 1
    pooler = WindowPooler(config(method=method, ratios=(4,), num_heads=heads, window_queries=window_queries))
    x = rows(10)
    pooled = pooler(x, torch.tensor([0, 7, 10]), 4)
    expected = torch.stack([rms(x[a:b]).mean(0) for a, b in ((0, 4), (4, 7), (7, 10))])
    torch.testing.assert_close(pooled, expected, **TOLERANCES)


def test_queries_from_the_window_mean() -> None:
    """A projection of 1 makes each head ask for what its window holds on average."""
    pooler = WindowPooler(config(window_queries=True))
    assert pooler.query_proj is not None
    torch.nn.init.eye_(pooler.query_proj.weight)
    x = rows(8)
    expected = []
    for window in rms(x).split(4):
        parts = []
        for part in window.split(4, dim=1):  # one head owns four columns
            weights = (part @ part.mean(0) / 4**0.5).softmax(0)
            parts.append(weights @ part)
        expected.append(torch.cat(parts))
    torch.testing.assert_close(pooler(x, torch.tensor([0, 8]), 4), torch.stack(expected), **TOLERANCES)


@pytest.mark.parametrize("halo", [0, 2])
def test_an_ordered_start_gives_every_head_its_quarter(halo: int) -> None:
    pooler = WindowPooler(config(ratios=(2, 8), halo=halo))
    pooler.start_ordered(strength=60.0)
    x = rows(16)
    pooled = pooler(x, torch.tensor([0, 16]), 8).view(2, 4, 4)
    normed = rms(x).view(2, 8, 4, 4)  # window, place, head, column
    for head in range(4):
        quarter = normed[:, 2 * head : 2 * head + 2, head].mean(1)
        torch.testing.assert_close(pooled[:, head], quarter, **TOLERANCES)
    halves = pooler(x, torch.tensor([0, 16]), 2).view(8, 4, 4)  # two places: heads take turns
    normed = rms(x).view(8, 2, 4, 4)
    torch.testing.assert_close(halves[:, 3], normed[:, 1, 3], **TOLERANCES)
    torch.testing.assert_close(halves[:, 2], normed[:, 0, 2], **TOLERANCES)


def test_a_ratio_it_was_not_trained_on_has_no_bias() -> None:
    pooler = WindowPooler(config(ratios=(4,)))
    pooler.start_ordered(strength=60.0)
    x = rows(6)
    expected = torch.stack([rms(x[:3]).mean(0), rms(x[3:]).mean(0)])
    torch.testing.assert_close(pooler(x, torch.tensor([0, 6]), 3), expected, **TOLERANCES)


@pytest.mark.parametrize("hidden", [0, 8])
def test_the_projection_starts_as_a_rescaling(hidden: int) -> None:
    x = rows(5)
    projected = Projection(16, hidden, embed_norm=2.5)(x)
    torch.testing.assert_close(projected, 2.5 * x / x.norm(dim=-1, keepdim=True), **TOLERANCES)


def test_the_projections_mlp_and_gain() -> None:
    projection = Projection(16, 8, embed_norm=1.0)
    assert projection.up is not None
    assert projection.down is not None
    torch.nn.init.normal_(projection.down.weight)
    torch.nn.init.constant_(projection.log_gain, 0.5)
    x = rows(5)
    inner = rms(x) @ projection.up.weight.T + projection.up.bias
    y = x + (inner * inner.sigmoid()) @ projection.down.weight.T
    expected = torch.tensor(0.5).exp() * y / y.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(projection(x), expected, **TOLERANCES)


def test_memory_slots_stand_behind_their_segment_and_are_read_back() -> None:
    memory = MemoryTokens(config(method="memory", segment_tokens=8, ratios=(2, 4), num_heads=1), embed_norm=1.0)
    assert len(memory.embeds) == 4  # as many as the smallest ratio needs
    x = rows(11)
    mixed, ends, picked = memory.append(x, [0, 8, 11], 4)
    assert ends == [0, 10, 14]
    assert picked.tolist() == [8, 9, 13]
    assert torch.equal(mixed[[*range(8), 10, 11, 12]], x)
    # Two slots are spread over the table of four: the halves' first; a single one is the first.
    assert torch.equal(mixed[picked], memory.embeds[[0, 2, 0]])
    torch.testing.assert_close(memory.read(mixed, picked), rms(memory.embeds[[0, 2, 0]]), **TOLERANCES)


def test_a_residual_projection_starts_as_the_sum_of_embeddings() -> None:
    """Divided by the root of their number; of one token, it is that token's embedding, bit for bit."""
    projection = ResidualProjection(16, 8, embed_norm=2.5)
    embeds, lengths = rows(7), torch.tensor([4, 1, 2])
    projected = projection(rows(3), embeds, lengths)
    assert torch.equal(projected[1], embeds[4])
    expected = torch.stack([part.sum(0) / len(part) ** 0.5 for part in embeds.split([4, 1, 2])])
    torch.testing.assert_close(projected, expected, **TOLERANCES)


def test_what_a_residual_projection_learns_is_added_at_the_norm_of_embeddings() -> None:
    projection = ResidualProjection(16, 8, embed_norm=2.5)
    torch.nn.init.ones_(projection.down.bias)
    x, embeds, lengths = rows(2), rows(4), torch.tensor([2, 2])
    added = projection(x, embeds, lengths) - projection.base * (embeds[::2] + embeds[1::2]) / 2**0.5
    torch.testing.assert_close(added, torch.full_like(added, 2.5 / 16**0.5), **TOLERANCES)
    projection(x, embeds, lengths).sum().backward()
    assert all(parameter.grad is not None for parameter in projection.parameters())
