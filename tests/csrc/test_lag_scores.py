"""The CPU kernel of lag_scores against the specification.

Ranks are compared by what they rank: two tokens whose information differs by less than rounding may stand in either
order.
"""

import pytest
import torch
from torch import Tensor

from condense_core.ops import reference
from condense_core.ops.arguments import LagScoresArgs
from condense_core.ops.cpu.lag_scores import lag_scores

# In fp32 a standard deviation of order 1 over at most 256 channels is off by some units of 1.2e-7, and exp turns that
# into a relative error; the kernel multiplies by the reciprocal of a range where the formula divides.
TOLERANCES = {"rank_gap": 4e-6}


def cache(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values with channels of different offset and scale."""
    generator = torch.Generator().manual_seed(seed)
    offset, scale = (torch.randn(2, shape[1], 1, shape[3], generator=generator)).abs().unbind(0)
    k, v = ((offset + (0.2 + scale) * torch.randn(*shape, generator=generator)).to(dtype) for _ in range(2))
    return k, v


def information(x: Tensor, following: Tensor) -> Tensor:
    """In fp64: `[L, D]` against `[L, D]` -> `[L]`."""
    low, high = following.double().amin(0), following.double().amax(0)
    z = torch.where(high > low, (x.double() - low) / (high - low), 0.0)
    return z.std(-1, correction=min(1, x.shape[-1] - 1)).softmax(0)


def check(k: Tensor, v: Tensor, lag: int, sink: int, bounds: Tensor | None = None) -> Tensor:
    scores = lag_scores(LagScoresArgs(k, v, lag, sink, bounds))
    expected = reference.lag_scores(k, v, lag, sink, bounds)
    assert scores.dtype == torch.float32
    for b in range(k.shape[0]):
        start, stop = (0, k.shape[2]) if bounds is None else bounds[b].clamp(0, k.shape[2]).tolist()
        begin, chunks = start + sink, max(max(stop - start - sink, 0) // lag - 1, 0)
        rest = torch.ones(k.shape[2], dtype=torch.bool)
        rest[begin : begin + chunks * lag] = False
        # Padding, forced tokens and short sequences exactly: a division is rounded correctly on both sides.
        assert torch.equal(scores[b][:, rest], expected[b][:, rest])
        for g in range(k.shape[1]):
            for first in range(begin, begin + chunks * lag, lag):
                own, following = slice(first, first + lag), slice(first + lag, first + 2 * lag)
                info = sum(information(x[b, g, own], x[b, g, following]) / 2 for x in (k, v))
                rank = (scores[b, g, own] * lag).round()
                assert torch.equal(rank.sort().values, torch.arange(lag, dtype=torch.float32))
                ascending = info[rank.argsort()]
                gap = (ascending.cummax(0).values - ascending).max()
                assert gap <= TOLERANCES["rank_gap"] * info.max()
    return scores


# (shape, lag_size, sink): chunks of whole vectors and not, rest or none; one channel; chunks of one token; a short
# sequence, one that just is not, none; chunks beyond a run of them, a chunk larger than any digit of the sort.
CASES = [
    ((1, 2, 4 + 3 * 16, 32), 16, 4),
    ((2, 1, 2 + 4 * 12 + 5, 20), 12, 2),
    ((1, 1, 40, 1), 8, 0),
    ((1, 2, 9, 8), 1, 3),
    ((1, 2, 35, 8), 16, 4),
    ((1, 2, 36, 8), 16, 4),
    ((2, 2, 3, 8), 16, 4),
    ((1, 1, 0, 8), 16, 4),
    ((1, 1, 130, 250), 64, 1),
    ((1, 1, 2600, 6), 1200, 7),
    ((1, 2, 1500, 16), 128, 4),
]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("shape", "lag", "sink"), CASES, ids=str)
def test_it_ranks_as_the_formula(shape: tuple[int, ...], lag: int, sink: int, dtype: torch.dtype) -> None:
    check(*cache(*shape, dtype=dtype), lag, sink)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_padding_and_strides(index: torch.dtype) -> None:
    k, v = (x.transpose(1, 2) for x in cache(2, 70, 2, 24))
    k[:, :, 0] = float("nan")
    for bounds in ([[5, 70], [1, 70]], [[1, 51], [1, 2]], [[7, 7], [3, 169]], [[30, 52], [9, 50]], [[1, 99], [30, 20]]):
        real = torch.tensor(bounds, dtype=index)
        scores = check(k[..., ::2], v[..., 12:], 10, 3, real)
        for b, (start, stop) in enumerate(bounds):
            part = slice(start, max(start, min(stop, 70)))
            alone = lag_scores(LagScoresArgs(k[b : b + 1, :, part, ::2], v[b : b + 1, :, part, 12:], 10, 3, None))
            assert torch.equal(scores[b : b + 1, :, part], alone)


@pytest.mark.usefixtures("isa")
def test_the_earlier_of_equal_tokens_ranks_higher() -> None:
    k, v = cache(1, 1, 24, 8)
    k[0, 0, [1, 4, 6]], v[0, 0, [1, 4, 6]] = k[0, 0, 2].clone(), v[0, 0, 2].clone()
    ranks = (lag_scores(LagScoresArgs(k, v, 8, 0, None))[0, 0, :8] * 8).tolist()
    assert [ranks[1] - ranks[i] for i in (2, 4, 6)] == [1, 2, 3]
    same, falling = torch.ones(1, 1, 24, 8), torch.arange(7, -1, -1) / 8
    assert torch.equal(lag_scores(LagScoresArgs(same, same, 8, 0, None))[0, 0, :16], falling.repeat(2))


@pytest.mark.usefixtures("isa")
def test_a_channel_without_range_contributes_nothing() -> None:
    k, v = cache(1, 1, 36, 8)
    k[:, :, 12:24, 3] = 1.5  # constant where it is the reference of the first chunk
    v[:, :, 12:24, 5] = 0.0
    v[:, :, 14, 5] = 1e-40  # a range whose reciprocal fp32 cannot hold
    k[:, :, :12, 3] = float("nan")
    scores = lag_scores(LagScoresArgs(k, v, 12, 0, None))
    torch.testing.assert_close(scores, reference.lag_scores(k, v, 12, 0), rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_nan_ranks_lowest() -> None:
    k, v = cache(1, 2, 40, 8)
    clean = lag_scores(LagScoresArgs(k, v, 10, 0, None))
    k[0, 0, 3, 2] = float("nan")
    v[0, 0, 7, 0] = float("inf")
    scores = lag_scores(LagScoresArgs(k, v, 10, 0, None))
    torch.testing.assert_close(scores, reference.lag_scores(k, v, 10, 0), rtol=0, atol=0)
    assert scores[0, 0, 3] == pytest.approx(0.1)
    assert scores[0, 0, 7] == 0.0
    assert torch.equal(scores[0, 1], clean[0, 1])
    # In the chunk that others are compared with, it leaves only their places to tell them apart.
    k[0, 1, 13, 4] = float("nan")
    scores = lag_scores(LagScoresArgs(k, v, 10, 0, None))
    assert torch.equal(scores[0, 1, :10], torch.arange(9, -1, -1) / 10)
    torch.testing.assert_close(scores, reference.lag_scores(k, v, 10, 0), rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit() -> None:
    (k, v), before = cache(1, 3, 900, 64), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = lag_scores(LagScoresArgs(k, v, 100, 4, None))
        torch.set_num_threads(2)
        assert torch.equal(lag_scores(LagScoresArgs(k, v, 100, 4, None)), alone)
    finally:
        torch.set_num_threads(before)
