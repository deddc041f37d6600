"""The CPU kernel of lag_scores against the specification.

Ranks are compared by what they rank: two tokens whose information differs by less than rounding may stand in either
order.
"""

from collections.abc import Callable
from typing import NamedTuple

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


def check(args: LagScoresArgs) -> Tensor:
    """Ranks that ascend with the information, each once, and the rest as the specification has it; the scores."""
    k, v, lag, sink, bounds = args
    scores, expected = lag_scores(args), reference.lag_scores(*args)
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


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # [B, G, N, D]
    lag_size: int
    sink: int


CASES = {
    "whole vectors, no rest": Case(shape=(1, 2, 4 + 3 * 16, 32), lag_size=16, sink=4),
    "parts of vectors, a rest": Case(shape=(2, 1, 2 + 4 * 12 + 5, 20), lag_size=12, sink=2),
    "one channel": Case(shape=(1, 1, 40, 1), lag_size=8, sink=0),
    "chunks of one token": Case(shape=(1, 2, 9, 8), lag_size=1, sink=3),
    "one token too short to be scored": Case(shape=(1, 2, 35, 8), lag_size=16, sink=4),
    "just long enough": Case(shape=(1, 2, 36, 8), lag_size=16, sink=4),
    "shorter than the sink": Case(shape=(2, 2, 3, 8), lag_size=16, sink=4),
    "no tokens": Case(shape=(1, 1, 0, 8), lag_size=16, sink=4),
    "wide heads": Case(shape=(1, 1, 130, 250), lag_size=64, sink=1),
    "chunks longer than a digit of the sort": Case(shape=(1, 1, 2600, 6), lag_size=1200, sink=7),
    "more chunks than a run takes": Case(shape=(1, 2, 1500, 16), lag_size=128, sink=4),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_ranks_as_the_formula(case: Case, dtype: torch.dtype) -> None:
    k, v = cache(*case.shape, dtype=dtype)
    check(LagScoresArgs(k=k, v=v, lag_size=case.lag_size, sink=case.sink, bounds=None))


# The real tokens of two sequences of 70; the first token of each is padding, and NaN.
BOUNDS = {
    "padding before": [[5, 70], [1, 70]],
    "padding behind, and a single token": [[1, 51], [1, 2]],
    "no tokens, and beyond the tensor": [[7, 7], [3, 169]],
    "long enough for two chunks, just not": [[30, 52], [9, 50]],
    "falling": [[1, 99], [30, 20]],
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_padding_and_strides(bounds: list[list[int]], index: torch.dtype) -> None:
    k, v = (x.transpose(1, 2) for x in cache(2, 70, 2, 24))
    k[:, :, 0] = float("nan")
    real = torch.tensor(bounds, dtype=index)
    args = LagScoresArgs(k=k[..., ::2], v=v[..., 12:], lag_size=10, sink=3, bounds=real)
    scores = check(args)
    for b, (start, stop) in enumerate(bounds):
        own, part = slice(b, b + 1), slice(start, max(start, min(stop, 70)))
        alone = lag_scores(args._replace(k=args.k[own, :, part], v=args.v[own, :, part], bounds=None))
        assert torch.equal(scores[own, :, part], alone)


@pytest.mark.usefixtures("isa")
def test_the_earlier_of_equal_tokens_ranks_higher() -> None:
    k, v = cache(1, 1, 24, 8)
    k[0, 0, [1, 4, 6]], v[0, 0, [1, 4, 6]] = k[0, 0, 2].clone(), v[0, 0, 2].clone()
    ranks = (lag_scores(LagScoresArgs(k=k, v=v, lag_size=8, sink=0, bounds=None))[0, 0, :8] * 8).tolist()
    assert [ranks[1] - ranks[i] for i in (2, 4, 6)] == [1, 2, 3]
    same, falling = torch.ones(1, 1, 24, 8), torch.arange(7, -1, -1) / 8
    scores = lag_scores(LagScoresArgs(k=same, v=same, lag_size=8, sink=0, bounds=None))
    assert torch.equal(scores[0, 0, :16], falling.repeat(2))


@pytest.mark.usefixtures("isa")
def test_a_channel_without_range_contributes_nothing() -> None:
    k, v = cache(1, 1, 36, 8)
    k[:, :, 12:24, 3] = 1.5  # constant where it is the reference of the first chunk
    v[:, :, 12:24, 5] = 0.0
    v[:, :, 14, 5] = 1e-40  # a range whose reciprocal fp32 cannot hold
    k[:, :, :12, 3] = float("nan")
    scores = lag_scores(LagScoresArgs(k=k, v=v, lag_size=12, sink=0, bounds=None))
    torch.testing.assert_close(scores, reference.lag_scores(k, v, 12, 0), rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_nan_ranks_lowest() -> None:
    k, v = cache(1, 2, 40, 8)
    clean = lag_scores(LagScoresArgs(k=k, v=v, lag_size=10, sink=0, bounds=None))
    k[0, 0, 3, 2] = float("nan")
    v[0, 0, 7, 0] = float("inf")
    scores = lag_scores(LagScoresArgs(k=k, v=v, lag_size=10, sink=0, bounds=None))
    torch.testing.assert_close(scores, reference.lag_scores(k, v, 10, 0), rtol=0, atol=0)
    assert scores[0, 0, 3] == pytest.approx(0.1)
    assert scores[0, 0, 7] == 0.0
    assert torch.equal(scores[0, 1], clean[0, 1])
    # In the chunk that others are compared with, it leaves only their places to tell them apart.
    k[0, 1, 13, 4] = float("nan")
    scores = lag_scores(LagScoresArgs(k=k, v=v, lag_size=10, sink=0, bounds=None))
    assert torch.equal(scores[0, 1, :10], torch.arange(9, -1, -1) / 10)
    torch.testing.assert_close(scores, reference.lag_scores(k, v, 10, 0), rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_threads_do_not_change_a_bit(threads_agree: Callable[..., None]) -> None:
    k, v = cache(1, 3, 900, 64)
    args = LagScoresArgs(k=k, v=v, lag_size=100, sink=4, bounds=None)
    threads_agree(lambda: [lag_scores(args)], 1, 2)
