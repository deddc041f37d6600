"""The lag_scores kernel against the specification.

Ranks are compared by what they rank: two tokens whose information differs by less than rounding may stand in either
order.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from condense_core import ops
from condense_core.kernels import lag_scores as kernel
from condense_core.ops import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Information of a token in a chunk of L is of order 1 / L. In fp32 a standard deviation of order 1 over at most 256
# channels is off by some units of 1.2e-7, and exp turns that into a relative error; the kernel multiplies by the
# reciprocal of a range where the formula divides. Tokens that differ by less, relatively, may change places.
TOLERANCES = {"rank_gap": 4e-6}


def cache(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values with channels of different offset and scale."""
    generator = torch.Generator().manual_seed(seed)
    offset, scale = (torch.randn(2, shape[1], 1, shape[3], generator=generator)).abs().unbind(0)
    k, v = ((offset + (0.2 + scale) * torch.randn(*shape, generator=generator)).to(DEVICE, dtype) for _ in range(2))
    return k, v


def information(x: Tensor, reference_chunk: Tensor) -> Tensor:
    """In fp64: `[L, D]` against `[L, D]` -> `[L]`."""
    low, high = reference_chunk.double().amin(0), reference_chunk.double().amax(0)
    z = torch.where(high > low, (x.double() - low) / (high - low), 0.0)
    return z.std(-1, correction=min(1, x.shape[-1] - 1)).softmax(0)


def assert_ranks(
    scores: Tensor, k: Tensor, v: Tensor, lag: int, sink: int, start: int = 0, stop: int | None = None
) -> None:
    """Scored chunks of one head, `[N]`, hold every rank once, in the order of the information."""
    stop = len(k) if stop is None else stop
    begin = start + sink
    for first in range(begin, begin + ((stop - begin) // lag - 1) * lag, lag):
        own, following = slice(first, first + lag), slice(first + lag, first + 2 * lag)
        info = (information(k[own], k[following]) + information(v[own], v[following])) / 2
        rank = (scores[own] * lag).round()
        assert torch.equal(rank.sort().values.cpu(), torch.arange(lag, dtype=torch.float32))
        ascending = info[rank.argsort()]
        highest_so_far = ascending.cummax(0).values
        assert (highest_so_far - ascending).max() <= TOLERANCES["rank_gap"] * info.max()


def check(k: Tensor, v: Tensor, lag: int, sink: int, bounds: list[list[int]] | None = None) -> Tensor:
    on_device = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    scores = kernel.forward(k, v, lag, sink, on_device)
    expected = reference.lag_scores(k, v, lag, sink, on_device)
    assert scores.dtype == torch.float32
    for b in range(k.shape[0]):
        start, stop = (0, k.shape[2]) if bounds is None else bounds[b]
        full = max(stop - start - sink, 0) // lag
        scored = slice(start + sink, start + sink + max(full - 1, 0) * lag)
        rest = torch.ones(k.shape[2], dtype=torch.bool)
        rest[scored] = False
        # Padding, forced tokens and short sequences exactly: a division is rounded correctly on both sides.
        assert torch.equal(scores[b][:, rest], expected[b][:, rest])
        for g in range(k.shape[1]):
            assert_ranks(scores[b, g], k[b, g], v[b, g], lag, sink, start, stop)
    return scores


# (shape, lag_size, sink): chunks of a power of two and not, rest or none, head_dim of a power of two or not, one of
# several tiles, one channel; chunks of one token; a short sequence, one that just is not, none.
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
]


@pytest.mark.parametrize(("shape", "lag", "sink"), CASES, ids=str)
def test_it_ranks_as_the_formula(shape: tuple[int, ...], lag: int, sink: int, dtype: torch.dtype) -> None:
    check(*cache(*shape, dtype=dtype), lag, sink)


def test_the_tiling_of_the_default() -> None:
    check(*cache(1, 1, 4 + 2 * 128 + 9, 128, dtype=torch.float16), 128, 4)


BOUNDS = {
    "left": [[5, 70], [0, 70]],
    "right": [[0, 51], [0, 1]],
    "empty": [[7, 7], [3, 69]],
    "short": [[30, 52], [9, 50]],
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_sequences_are_cut_from_their_own_first_token(bounds: list[list[int]]) -> None:
    k, v = cache(2, 2, 70, 12)
    scores = check(k, v, 10, 3, bounds)
    for b, (start, stop) in enumerate(bounds):
        alone = kernel.forward(k[b : b + 1, :, start:stop], v[b : b + 1, :, start:stop], 10, 3, None)
        assert torch.equal(scores[b : b + 1, :, start:stop], alone)


def test_bounds_are_clamped() -> None:
    k, v = cache(2, 1, 40, 8)
    bounds = torch.tensor([[-9, 100], [30, 20]], dtype=torch.int32, device=DEVICE)
    scores = kernel.forward(k, v, 8, 2, bounds)
    assert torch.equal(scores[0], kernel.forward(k[:1], v[:1], 8, 2, None)[0])
    assert (scores[1] == float("-inf")).all()


def test_the_earlier_of_equal_tokens_ranks_higher() -> None:
    k, v = cache(1, 1, 24, 8)
    k[0, 0, [1, 4, 6]], v[0, 0, [1, 4, 6]] = k[0, 0, 2].clone(), v[0, 0, 2].clone()
    ranks = (kernel.forward(k, v, 8, 0, None)[0, 0, :8] * 8).tolist()
    assert [ranks[1] - ranks[i] for i in (2, 4, 6)] == [1, 2, 3]
    same = torch.ones(1, 1, 24, 8, device=DEVICE)
    falling = torch.arange(7, -1, -1, device=DEVICE) / 8
    assert torch.equal(kernel.forward(same, same, 8, 0, None)[0, 0, :16], falling.repeat(2))


def test_a_channel_without_range_contributes_nothing() -> None:
    k, v = cache(1, 1, 36, 8)
    k[:, :, 12:24, 3] = 1.5  # constant where it is the reference of the first chunk
    v[:, :, 12:24, 5] = 0.0
    v[:, :, 14, 5] = 1e-40  # a range whose reciprocal fp32 cannot hold
    k[:, :, :12, 3] = float("nan")
    scores = kernel.forward(k, v, 12, 0, None)
    assert_ranks(scores[0, 0], k[0, 0], v[0, 0].where(torch.arange(8, device=DEVICE) != 5, 0.0), 12, 0, 0, 24)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_ranks_lowest() -> None:
    k, v = cache(1, 2, 40, 8)
    clean = kernel.forward(k, v, 10, 0, None)
    k[0, 0, 3, 2] = float("nan")
    v[0, 0, 7, 0] = float("inf")
    scores = kernel.forward(k, v, 10, 0, None)
    torch.testing.assert_close(scores, reference.lag_scores(k, v, 10, 0), rtol=0, atol=0)
    assert scores[0, 0, 3] == pytest.approx(0.1)
    assert scores[0, 0, 7] == 0.0
    assert torch.equal(scores[0, 1], clean[0, 1])
    assert torch.equal(scores[0, 0, 10:], clean[0, 0, 10:])
    # In the chunk that others are compared with, it leaves only their places to tell them apart.
    k[0, 1, 13, 4] = float("nan")
    scores = kernel.forward(k, v, 10, 0, None)
    assert torch.equal(scores[0, 1, :10], torch.arange(9, -1, -1, device=DEVICE) / 10)
    torch.testing.assert_close(scores, reference.lag_scores(k, v, 10, 0), rtol=0, atol=0)


def test_strides_do_not_matter() -> None:
    k, v = cache(2, 2, 40, 12)
    expected = kernel.forward(k, v, 8, 3, None)
    transposed = k.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.cat([v, v], 3)[..., 12:]
    dim_last = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(kernel.forward(transposed, sliced, 8, 3, None), expected)
    assert torch.equal(kernel.forward(k, dim_last, 8, 3, None), expected)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.just(1), st.integers(1, 2), st.integers(1, 60), st.integers(2, 20)),
    st.integers(1, 20),
    st.integers(0, 10),
    st.data(),
)
def test_any_shape_and_bounds(shape: tuple[int, ...], lag: int, sink: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, shape[2]))
    stop = data.draw(st.integers(start, shape[2]))
    check(*cache(*shape), lag, sink, [[start, stop]])


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it() -> None:
    k, v = cache(1, 2, 45, 8)
    bounds = torch.tensor([[1, 45]], device=DEVICE)
    expected = kernel.forward(k, v, 10, 2, bounds)
    assert torch.equal(ops.lag_scores(k, v, lag_size=10, sink=2, bounds=bounds), expected)
    # Larger than the kernel takes, but the cache is smaller.
    assert torch.equal(ops.lag_scores(k, v, lag_size=10**20), kernel.forward(k, v, 45, 4, None))


def test_a_chunk_too_long_for_a_program_is_declined() -> None:
    k = torch.empty(1, 1, 1, 8)
    assert kernel.unsupported(k, k, 1024, 4, None) is None
    assert "1025" in str(kernel.unsupported(k, k, 1025, 4, None))
