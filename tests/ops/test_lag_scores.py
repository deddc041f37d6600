"""lag_scores: the specification against a loop, the public function, and its registration."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference
from tests.ops.oracles import INF, Bounds, on_device, score_sequences, softmax

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

# The oracle sums the same fp64 numbers in another order. Scores are ranks: exact, once the order is.
TOLERANCES = {"rtol": 1e-12, "atol": 1e-12}


def cache(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return k, v


def information(own: list[list[float]], following: list[list[float]]) -> list[float]:
    low, high = ([f(x[c] for x in following) for c in range(len(own[0]))] for f in (min, max))
    spread = []
    for x in own:
        z = [(x[c] - low[c]) / (high[c] - low[c]) if high[c] > low[c] else 0.0 for c in range(len(x))]
        mean = math.fsum(z) / len(z)
        spread.append(math.sqrt(math.fsum((c - mean) ** 2 for c in z) / (len(z) - 1)))
    return softmax(spread)


def oracle(k: list[list[float]], v: list[list[float]], lag: int, sink: int) -> list[float]:
    n = len(k)
    if n < sink + 2 * lag:
        return [INF if i < sink else (i - sink) / (n - sink) for i in range(n)]
    scores = [INF] * n
    for first in range(sink, n - 2 * lag + 1, lag):
        infos = [information(x[first : first + lag], x[first + lag : first + 2 * lag]) for x in (k, v)]
        info = [sum(pair) / 2 for pair in zip(*infos, strict=True)]
        for i in range(lag):
            below = sum(info[j] < info[i] or (info[j] == info[i] and j > i) for j in range(lag))
            scores[first + i] = below / lag
    return scores


BOUNDS = {
    "all real": None,
    "padding on the right, on the left": [[0, 21], [5, 27]],
    "nothing real, crossed": [[4, 4], [9, 2]],
    "beyond the tokens": [[-3, 11], [26, 90]],
}


def check(k: Tensor, v: Tensor, lag: int, sink: int, bounds: Bounds) -> None:
    actual = reference.lag_scores(k=k, v=v, lag_size=lag, sink=sink, bounds=on_device(bounds))
    expected = score_sequences(lambda k, v: oracle(k, v, lag, sink), k, v, bounds=bounds)
    torch.testing.assert_close(actual, expected, **TOLERANCES)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS.keys())
@pytest.mark.parametrize(
    ("lag", "sink"),
    [
        pytest.param(4, 2, id="tokens behind the last full chunk"),
        pytest.param(5, 0, id="no sinks"),
        pytest.param(1, 1, id="chunks of one token"),
        pytest.param(13, 1, id="just long enough"),
        pytest.param(14, 0, id="just too short"),
        pytest.param(3, 40, id="more sinks than tokens"),
    ],
)
def test_it_equals_a_walk_token_by_token(bounds: Bounds, lag: int, sink: int) -> None:
    k, v = cache(2, 2, 27, 5, dtype=torch.float64)
    k[0, :, 9] = k[0, :, 7]  # tokens that tie
    v[0, :, 9] = v[0, :, 7]
    k[:, 0, 4:20, 2] = 0.5  # a channel without range
    check(k, v, lag, sink, bounds)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 30),
    lag=st.integers(1, 12),
    sink=st.integers(0, 6),
    start=st.integers(-2, 8),
    stop=st.integers(0, 34),
    seed=st.integers(0, 2**16),
)
def test_any_lengths(tokens: int, lag: int, sink: int, start: int, stop: int, seed: int) -> None:
    check(*cache(1, 1, tokens, 3, seed=seed, dtype=torch.float64), lag, sink, [[start, stop]])


def test_a_worked_example() -> None:
    """Chunks of two after one sink; the second token of the first chunk spreads further beyond [0, 1] x [0, 1]."""
    k = torch.tensor([[9.0, 9.0], [0.0, 1.0], [0.0, 5.0], [0.0, 1.0], [1.0, 0.0], [3.0, 3.0]]).view(1, 1, 6, 2)
    assert ops.lag_scores(k, k, lag_size=2, sink=1).tolist() == [[[INF, 0.0, 0.5, INF, INF, INF]]]
    short = ops.lag_scores(k[:, :, :4], k[:, :, :4], lag_size=2, sink=1)
    assert short.flatten().tolist() == pytest.approx([INF, 0.0, 1 / 3, 2 / 3])


@pytest.mark.parametrize("seed", range(12))
def test_a_token_with_nan_ranks_lowest_and_has_no_part_in_the_softmax(seed: int) -> None:
    k, v = cache(1, 1, 24, 4, seed=seed, dtype=torch.float64)
    k[0, 0, 2, 1] = float("nan")
    scores = reference.lag_scores(k=k, v=v, lag_size=8, sink=0)[0, 0, :8]
    others = [i for i in range(8) if i != 2]
    k_rows, v_rows = k[0, 0].tolist(), v[0, 0].tolist()
    k_info = information([k_rows[i] for i in others], k_rows[8:16])  # over seven tokens, which changes the average
    v_info = information(v_rows[:8], v_rows[8:16])
    info = [k_score + v_info[i] for i, k_score in zip(others, k_info, strict=True)]
    assert scores[2] == 0.0
    assert scores[others].argsort().tolist() == torch.tensor(info, dtype=torch.float64).argsort().tolist()


def test_one_channel_has_no_spread_and_the_earlier_token_ranks_higher() -> None:
    k, v = cache(1, 1, 12, 1)
    assert ops.lag_scores(k, v, lag_size=4, sink=0)[0, 0, :4].tolist() == [0.75, 0.5, 0.25, 0.0]


def test_no_tokens_no_scores() -> None:
    none = torch.zeros(2, 3, 0, 4)
    scores = ops.lag_scores(none, none, bounds=torch.zeros(2, 2, dtype=torch.int64))
    assert scores.shape == (2, 3, 0)
    assert scores.dtype == torch.float32


def test_padding_is_not_read() -> None:
    (k, v), bounds = cache(2, 2, 27, 4), torch.tensor([[0, 21], [5, 27]])
    clean = ops.lag_scores(k, v, lag_size=4, sink=1, bounds=bounds)
    for x in (k, v):
        x[0, :, 21:], x[1, :, :5] = float("nan"), INF
    assert torch.equal(ops.lag_scores(k, v, lag_size=4, sink=1, bounds=bounds), clean)


def test_numbers_beyond_64_bits_are_all_tokens() -> None:
    k, v = cache(1, 1, 5, 4)
    assert (ops.lag_scores(k, v, sink=10**30) == INF).all()
    assert torch.equal(ops.lag_scores(k, v, lag_size=10**30, sink=1), ops.lag_scores(k, v, lag_size=5, sink=1))


K = torch.zeros(2, 2, 9, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"k": K[0]}, ValueError, r"k has shape \[2, 9, 4\], expected \[B, G, N, D\]", id="rank"),
        pytest.param({"k": K.double()}, TypeError, "k has dtype torch.float64", id="dtype"),
        pytest.param({"k": K.tolist()}, TypeError, "k is a list, expected a torch.Tensor", id="no tensor"),
        pytest.param({"v": K[:, :1]}, ValueError, r"v has shape \[2, 1, 9, 4\], expected \[2, 2, 9, 4\]", id="heads"),
        pytest.param({"v": K.half()}, TypeError, "v has dtype torch.float16, expected torch.float32, as k", id="mixed"),
        pytest.param({"lag_size": 0}, ValueError, "lag_size is 0, expected an int >= 1", id="no chunk"),
        pytest.param({"sink": -1}, ValueError, "sink is -1, expected an int >= 0", id="negative sink"),
        pytest.param({"sink": 1.0}, TypeError, r"sink is 1.0 \(float\)", id="sink of float"),
        pytest.param({"bounds": [[0, 1]] * 2}, TypeError, "bounds is a list", id="bounds of list"),
        pytest.param(
            {"bounds": torch.zeros(3, 2).long()}, ValueError, r"bounds has shape \[3, 2\]", id="bounds of another batch"
        ),
        pytest.param({"bounds": torch.zeros(2, 2)}, TypeError, "bounds has dtype torch.float32", id="bounds of floats"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.lag_scores(**{"k": K, "v": K, **change})


def test_it_passes_opcheck() -> None:
    k, v = cache(2, 2, 27, 8)
    bounds = torch.tensor([[0, 21], [5, 27]])
    torch.library.opcheck(torch.ops.condense_core.lag_scores.default, (k, v, 4, 2, bounds))


def test_it_is_traced_without_a_break() -> None:
    def scores(k: Tensor, v: Tensor) -> Tensor:
        return ops.lag_scores(2 * k, v, lag_size=4, sink=1) + 1

    k, v = cache(2, 2, 27, 4)
    assert torch.equal(torch.compile(scores, fullgraph=True, backend="eager")(k, v), scores(k, v))
