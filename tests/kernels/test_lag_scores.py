"""lag_scores on Triton: kernels/lag_scores.py against condense_core/ops/reference/lag_scores.py.

Ranks are compared by what they rank: two tokens whose information differs by less than rounding may stand in either
order.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.kernels import lag_scores as kernel
from condense_core.ops import reference
from condense_core.ops.arguments import LagScoresArgs

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF, NAN = float("inf"), float("nan")

# Information of a token in a chunk of L is of order 1 / L. In fp32 a standard deviation of order 1 over at most 256
# channels is off by some units of 2^-23, and exp turns that into a relative error; the kernel multiplies by the
# reciprocal of a range where the formula divides. Tokens that differ by less, relatively, may change places.
TOLERANCES = {"rank_gap": 4e-6}


def draw(
    *,
    batch: int = 1,
    num_kv_heads: int = 2,
    num_tokens: int = 40,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    lag_size: int = 8,
    sink: int = 4,
    bounds: list[list[int]] | None = None,
) -> LagScoresArgs:
    """Arguments of the op: keys and values with channels of different offset and scale."""
    generator = torch.Generator().manual_seed(0)
    offset, scale = torch.randn(2, num_kv_heads, 1, head_dim, generator=generator).abs().unbind(0)

    def cache() -> Tensor:
        noise = torch.randn(batch, num_kv_heads, num_tokens, head_dim, generator=generator)
        return (offset + (0.2 + scale) * noise).to(DEVICE, dtype)

    on_device = None if bounds is None else torch.tensor(bounds, device=DEVICE)
    return LagScoresArgs(k=cache(), v=cache(), lag_size=lag_size, sink=sink, bounds=on_device)


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


def check(args: LagScoresArgs) -> Tensor:
    """The kernel's scores, after they were found right; bounds must lie in the tensor, in order."""
    k, v, lag_size, sink, bounds = args
    scores, expected = kernel.forward(args), reference.lag_scores(*args)
    assert scores.dtype == torch.float32
    for b, (start, stop) in enumerate([(0, k.shape[2])] * len(k) if bounds is None else bounds.tolist()):
        full = max(stop - start - sink, 0) // lag_size
        scored = slice(start + sink, start + sink + max(full - 1, 0) * lag_size)
        rest = torch.ones(k.shape[2], dtype=torch.bool)
        rest[scored] = False
        # Padding, forced tokens and short sequences exactly: a division is rounded correctly on both sides.
        assert torch.equal(scores[b][:, rest], expected[b][:, rest])
        for g in range(k.shape[1]):
            assert_ranks(scores[b, g], k[b, g], v[b, g], lag_size, sink, start, stop)
    return scores


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"num_tokens": 4 + 3 * 16, "head_dim": 32, "lag_size": 16}, id="whole-chunks"),
        pytest.param(
            {"batch": 2, "num_tokens": 2 + 4 * 12 + 5, "head_dim": 20, "lag_size": 12, "sink": 2},
            id="no-powers-of-two-and-a-rest",
        ),
        pytest.param({"head_dim": 1, "sink": 0}, id="one-channel"),
        pytest.param({"num_tokens": 9, "lag_size": 1, "sink": 3}, id="chunks-of-one-token"),
        pytest.param({"num_tokens": 35, "lag_size": 16}, id="one-token-short-of-two-chunks"),
        pytest.param({"num_tokens": 36, "lag_size": 16}, id="just-two-chunks"),
        pytest.param({"batch": 2, "num_tokens": 3, "lag_size": 16}, id="only-sinks"),
        pytest.param({"num_tokens": 0}, id="no-tokens"),
        pytest.param({"num_kv_heads": 1, "num_tokens": 130, "head_dim": 250, "lag_size": 64}, id="channels-in-tiles"),
    ],
)
def test_shapes(shape: dict[str, int]) -> None:
    check(draw(**shape))


def test_dtypes(dtype: torch.dtype) -> None:
    check(draw(dtype=dtype))


def test_the_tiling_of_the_default() -> None:
    check(draw(num_kv_heads=1, num_tokens=4 + 2 * 128 + 9, head_dim=128, lag_size=128, dtype=torch.float16))


@settings(max_examples=20, deadline=None)
@given(
    num_kv_heads=st.integers(1, 2),
    num_tokens=st.integers(1, 60),
    head_dim=st.integers(2, 20),
    lag_size=st.integers(1, 20),
    sink=st.integers(0, 10),
    data=st.data(),
)
def test_any_shape_and_padding(num_tokens: int, data: st.DataObject, **changes: Any) -> None:
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, num_tokens)] * 2))) for _ in range(2)]
    check(draw(batch=2, num_tokens=num_tokens, bounds=bounds, **changes))


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param([[5, 50], [0, 41]], id="left-and-right"),
        pytest.param([[7, 7], [20, 42]], id="no-real-token-and-too-few-to-compare"),
    ],
)
def test_sequences_are_cut_from_their_own_first_token(bounds: list[list[int]]) -> None:
    args = draw(batch=2, num_tokens=50, head_dim=12, lag_size=10, sink=3, bounds=bounds)
    scores = check(args)
    for b, (start, stop) in enumerate(bounds):
        own = (slice(b, b + 1), slice(None), slice(start, stop))
        alone = kernel.forward(args._replace(k=args.k[own], v=args.v[own], bounds=None))
        assert torch.equal(scores[own], alone)


def test_bounds_are_clamped() -> None:
    bounds = torch.tensor([[-9, 100], [30, 20]], dtype=torch.int32, device=DEVICE)
    args = draw(batch=2)
    scores = kernel.forward(args._replace(bounds=bounds))
    assert torch.equal(scores[0], kernel.forward(args)[0])
    assert (scores[1] == -INF).all()


def test_the_earlier_of_equal_tokens_ranks_higher() -> None:
    args = draw(num_kv_heads=1, num_tokens=24, sink=0)
    for x in (args.k, args.v):
        x[0, 0, [1, 4, 6]] = x[0, 0, 2].clone()
    ranks = (kernel.forward(args)[0, 0, :8] * 8).tolist()
    assert [ranks[1] - ranks[i] for i in (2, 4, 6)] == [1, 2, 3]
    same = torch.ones_like(args.k)
    falling = torch.arange(7, -1, -1, device=DEVICE) / 8
    assert torch.equal(kernel.forward(args._replace(k=same, v=same))[0, 0, :16], falling.repeat(2))


def test_a_channel_without_range_contributes_nothing() -> None:
    args = draw(num_kv_heads=1, num_tokens=36, lag_size=12, sink=0)
    k, v = args.k, args.v
    k[:, :, 12:24, 3] = 1.5  # constant where it is the reference of the first chunk
    v[:, :, 12:24, 5] = 0.0
    v[:, :, 14, 5] = 1e-40  # a range whose reciprocal fp32 cannot hold
    k[:, :, :12, 3] = NAN
    scores = kernel.forward(args)
    without = v[0, 0].where(torch.arange(8, device=DEVICE) != 5, 0.0)
    assert_ranks(scores[0, 0], k[0, 0], without, 12, 0, 0, 24)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_ranks_lowest() -> None:
    args = draw(lag_size=10, sink=0)
    clean = kernel.forward(args)
    args.k[0, 0, 3, 2], args.v[0, 0, 7, 0] = NAN, INF
    scores = kernel.forward(args)
    torch.testing.assert_close(scores, reference.lag_scores(*args), rtol=0, atol=0)
    assert scores[0, 0, 3] == pytest.approx(0.1)
    assert scores[0, 0, 7] == 0.0
    assert torch.equal(scores[0, 1], clean[0, 1])
    assert torch.equal(scores[0, 0, 10:], clean[0, 0, 10:])
    # In the chunk that others are compared with, it leaves only their places to tell them apart.
    args.k[0, 1, 13, 4] = NAN
    scores = kernel.forward(args)
    assert torch.equal(scores[0, 1, :10], torch.arange(9, -1, -1, device=DEVICE) / 10)
    torch.testing.assert_close(scores, reference.lag_scores(*args), rtol=0, atol=0)


def test_strides_do_not_matter() -> None:
    args = draw(head_dim=12, sink=3)
    expected, (k, v, *_) = kernel.forward(args), args
    as_projected = k.transpose(1, 2).contiguous().transpose(1, 2)
    half_of_a_row = torch.cat([v, v], 3)[..., 12:]
    channels_apart = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(kernel.forward(args._replace(k=as_projected, v=half_of_a_row)), expected)
    assert torch.equal(kernel.forward(args._replace(v=channels_apart)), expected)


@pytest.mark.usefixtures("triton_backend")
def test_the_public_op_runs_it() -> None:
    args = draw(num_tokens=45, lag_size=10, sink=2, bounds=[[1, 45]])
    actual = ops.lag_scores(args.k, args.v, lag_size=10, sink=2, bounds=args.bounds)
    assert torch.equal(actual, kernel.forward(args))
    # Larger than the kernel takes, but the cache is smaller.
    whole = kernel.forward(args._replace(lag_size=45, sink=4, bounds=None))
    assert torch.equal(ops.lag_scores(args.k, args.v, lag_size=10**20), whole)


def test_a_chunk_too_long_for_a_program_is_declined() -> None:
    assert kernel.unsupported(draw(lag_size=1024)) is None
    assert "1025" in str(kernel.unsupported(draw(lag_size=1025)))
