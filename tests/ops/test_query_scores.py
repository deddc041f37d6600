"""window_scores and non_causal_chunks: the specification against slow oracles, and the public functions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from condense_core import ops
from condense_core.ops import reference

# Against oracles in fp64 on the same rounded inputs. float64: sums of some dozens of terms in another order. float32,
# and the 16-bit types, which are computed in it: logits of order 10 carry 1e-6, which exp makes a relative error.
TOLERANCES = {
    torch.float64: {"atol": 1e-14, "rtol": 1e-11},
    torch.float32: {"atol": 1e-8, "rtol": 1e-5},
    torch.bfloat16: {"atol": 1e-8, "rtol": 1e-5},
    torch.float16: {"atol": 1e-8, "rtol": 1e-5},
}
DTYPES = list(TOLERANCES)
INF, NAN = float("inf"), float("nan")


def draw(
    batch: int, heads: int, kv_heads: int, queries: int, tokens: int, head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, heads, queries, head_dim), (batch, kv_heads, tokens, head_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attention(q: list[float], keys: list[list[float]], scale: float) -> list[float]:
    logits = [scale * sum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def clamp(bounds: list[list[int]] | None, b: int, tokens: int) -> tuple[int, int]:
    start, stop = (min(max(edge, 0), tokens) for edge in (bounds[b] if bounds else (0, tokens)))
    return start, max(start, stop)


def slow_window_scores(q: Tensor, k: Tensor, scale: float, kernel_size: int, bounds: list[list[int]] | None) -> Tensor:
    """One key of one head after the other."""
    batch, heads, window, _ = q.shape
    kv_heads, tokens = k.shape[1:3]
    scores = torch.full((batch, kv_heads, tokens), -INF, dtype=torch.float64)
    for b in range(batch):
        start, stop = clamp(bounds, b, tokens)
        for g in range(kv_heads):
            keys = k[b, g].double().tolist()
            own = range(g * heads // kv_heads, (g + 1) * heads // kv_heads)
            received = {h: [0.0] * tokens for h in own}
            for h in own:
                rows = [t for t in range(window) if stop - window + t >= start]
                for t in rows:
                    p = attention(q[b, h, t].double().tolist(), keys[start : stop - window + t + 1], scale)
                    for i, weight in enumerate(p, start):
                        received[h][i] += weight / len(rows)
            for i in range(start, stop):
                if i >= stop - window:
                    scores[b, g, i] = INF
                    continue
                near = range(max(start, i - kernel_size // 2), min(stop - window, i + kernel_size // 2 + 1))
                scores[b, g, i] = sum(received[h][j] for h in own for j in near) / kernel_size / len(own)
    return scores


def slow_non_causal_chunks(
    q: Tensor, k: Tensor, chunk_size: int, scale: float, bounds: list[list[int]] | None
) -> Tensor:
    """One query of one chunk after the other."""
    batch, heads, tokens, _ = q.shape
    kv_heads = k.shape[1]
    scores = torch.full((batch, kv_heads, tokens), -INF, dtype=torch.float64)
    for b in range(batch):
        start, stop = clamp(bounds, b, tokens)
        scores[b, :, start:stop] = 0
        for h in range(heads):
            g = h * kv_heads // heads
            for first in range(start, stop, chunk_size):
                chunk = slice(first, min(first + chunk_size, stop))
                for query in q[b, h, chunk].double().tolist():
                    p = attention(query, k[b, g, chunk].double().tolist(), scale)
                    scores[b, g, chunk] += torch.tensor(p, dtype=torch.float64) * kv_heads / heads
    return scores


# None; padding on either side, on both; a sequence shorter than the window; nothing; beyond what is there, and the
# wrong way.
BOUNDS = [None, [[0, 13], [4, 17]], [[2, 12], [13, 16]], [[5, 5], [-3, 40]], [[16, 17], [9, 3]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_window_scores_equal_a_walk_key_by_key(bounds: list[list[int]] | None, dtype: torch.dtype) -> None:
    for (heads, kv_heads, window), kernel_size, scale in [
        ((4, 2, 5), 5, None),
        ((3, 1, 1), 1, 0.7),
        ((2, 2, 17), 3, -0.2),
        ((2, 1, 4), 41, 0.0),
    ]:
        q, k = draw(2, heads, kv_heads, window, 17, 6, dtype)
        on_device = None if bounds is None else torch.tensor(bounds)
        actual = reference.window_scores(q, k, scale, kernel_size, on_device)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = slow_window_scores(q, k, 6**-0.5 if scale is None else scale, kernel_size, bounds)
        torch.testing.assert_close(actual.double(), expected, **TOLERANCES[dtype])


def test_window_scores_are_those_of_kvpress() -> None:
    """The formula of SnapKVPress, version 0.5.5, in its own terms: repeated keys, a triangular mask, avg_pool1d."""
    w, n, d, kernel_size = 8, 50, 16, 5
    q, k = draw(2, 6, 2, w, n, d, torch.float32)
    weights = q @ k.repeat_interleave(3, 1).transpose(2, 3) / math.sqrt(d)
    weights += torch.triu(torch.full((w, n), -INF), diagonal=n - w + 1)
    votes = weights.softmax(-1)[..., :-w].mean(-2)
    pooled = F.avg_pool1d(votes, kernel_size, padding=kernel_size // 2, stride=1)
    expected = pooled.view(2, 2, 3, n - w).mean(2)
    actual = ops.window_scores(q, k, kernel_size=kernel_size)
    torch.testing.assert_close(actual[..., :-w], expected, **TOLERANCES[torch.float32])
    assert torch.isposinf(actual[..., -w:]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4, 5, 17, 10**12])
def test_non_causal_chunks_equal_a_walk_query_by_query(
    chunk_size: int, bounds: list[list[int]] | None, dtype: torch.dtype
) -> None:
    for heads, kv_heads, scale in [(4, 2, None), (1, 1, 1.0), (2, 2, -0.3)]:
        q, k = draw(2, heads, kv_heads, 17, 17, 6, dtype)
        on_device = None if bounds is None else torch.tensor(bounds)
        actual = reference.non_causal_chunks(q, k, chunk_size, scale, on_device)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = slow_non_causal_chunks(q, k, chunk_size, 6**-0.5 if scale is None else scale, bounds)
        torch.testing.assert_close(actual.double(), expected, **TOLERANCES[dtype])


def test_non_causal_chunks_are_those_of_kvpress_where_no_chunk_is_short() -> None:
    """`NonCausalAttnPress.non_causal_chunked_attn`, version 0.5.5: repeated keys, no scale."""
    q, k = draw(1, 4, 2, 24, 24, 8, torch.float32)
    chunks = [x.view(1, 4, 3, 8, 8) for x in (q, k.repeat_interleave(2, 1))]
    expected = (chunks[0] @ chunks[1].transpose(-2, -1)).softmax(-1).sum(-2).view(1, 2, 2, 24).mean(2)
    actual = ops.non_causal_chunks(q, k, chunk_size=8, scale=1.0)
    torch.testing.assert_close(actual, expected, **TOLERANCES[torch.float32])


def test_padding_is_not_read() -> None:
    bounds = torch.tensor([[3, 15], [14, 17]])
    q, k = draw(2, 4, 2, 17, 17, 6, torch.float32)
    q_win = q[:, :, :5]
    before = ops.window_scores(q_win, k, bounds=bounds), ops.non_causal_chunks(q, k, chunk_size=4, bounds=bounds)
    for b, (start, stop) in enumerate(bounds.tolist()):
        for x in (q, k):
            x[b, :, :start], x[b, :, stop:] = NAN, INF
    q_win = q_win.nan_to_num(1.0, 1.0)
    q_win[1, :, :2] = NAN  # rows that stand before the first of three tokens
    q_win[0] = draw(2, 4, 2, 17, 17, 6, torch.float32)[0][0, :, :5]
    after = ops.window_scores(q_win, k, bounds=bounds), ops.non_causal_chunks(q, k, chunk_size=4, bounds=bounds)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_no_tokens_no_scores() -> None:
    q, k = draw(2, 4, 2, 0, 0, 6, torch.float32)
    scores = ops.non_causal_chunks(q, k, bounds=torch.tensor([[0, 0], [3, 4]]))
    assert scores.shape == (2, 2, 0)
    assert scores.dtype == torch.float32


K = torch.ones(2, 2, 9, 8)
Q = torch.ones(2, 4, 9, 8)
WINDOW = Q[:, :, :3]

# (arguments that differ from a good call, error, what its message must contain)
BAD_BOTH = [
    ({"k": [1.0]}, TypeError, ["k is a list"]),
    ({"k": K.double()}, TypeError, ["k has dtype torch.float64"]),
    ({"k": K[0]}, ValueError, ["k has shape [2, 9, 8]", "[B, G, N, D]"]),
    ({"k": torch.ones(2, 2, 9, 0)}, ValueError, ["k has shape [2, 2, 9, 0]", "D >= 1"]),
    ({"k": K.to("meta")}, ValueError, ["cpu", "meta"]),
    ({"k": K.half()}, TypeError, ["has dtype torch.float32, expected torch.float16"]),
    ({"k": K[:1]}, ValueError, ["B = 1"]),
    ({"k": K[..., :4]}, ValueError, ["D = 4"]),
    ({"k": torch.ones(2, 3, 9, 8)}, ValueError, ["has 4 heads", "a multiple of k's 3"]),
    ({"scale": INF}, ValueError, ["scale is inf"]),
    ({"scale": "1"}, TypeError, ["scale is '1' (str)"]),
    ({"bounds": [[0, 9]]}, TypeError, ["bounds is a list"]),
    ({"bounds": torch.ones(2, 2)}, TypeError, ["bounds has dtype torch.float32"]),
    ({"bounds": torch.ones(3, 2, dtype=torch.int64)}, ValueError, ["bounds has shape [3, 2]", "[2, 2]"]),
    ({"bounds": torch.ones(2, 2, dtype=torch.int64, device="meta")}, ValueError, ["bounds is on meta"]),
]
BAD_WINDOW = [
    ({"q_win": None}, TypeError, ["q_win is a NoneType"]),
    ({"q_win": Q[0]}, ValueError, ["q_win has shape [4, 9, 8]"]),
    ({"q_win": Q[:, :, :0]}, ValueError, ["q_win has shape [2, 4, 0, 8]", "w >= 1"]),
    ({"q_win": torch.ones(2, 4, 10, 8)}, ValueError, ["q_win has 10 queries", "at most k's 9 tokens"]),
    ({"k": K[:, :, :0]}, ValueError, ["q_win has 3 queries", "at most k's 0 tokens"]),
    ({"kernel_size": 4}, ValueError, ["kernel_size is 4", "odd"]),
    ({"kernel_size": 0}, ValueError, ["kernel_size is 0", ">= 1"]),
    ({"kernel_size": 5.0}, TypeError, ["kernel_size is 5.0 (float)"]),
]
BAD_CHUNKS = [
    ({"q": None}, TypeError, ["q is a NoneType"]),
    ({"q": Q[0]}, ValueError, ["q has shape [4, 9, 8]"]),
    ({"q": WINDOW}, ValueError, ["q has 3 queries", "expected 9"]),
    ({"q": Q[:, :, :0]}, ValueError, ["q has shape [2, 4, 0, 8]"]),
    ({"k": K[:, :, :0]}, ValueError, ["q has 9 queries", "expected 0"]),
    ({"q": Q[:, :3, :0], "k": K[:, :, :0]}, ValueError, ["q has 3 heads", "a multiple of k's 2"]),
    ({"q": [], "k": K[:, :, :0]}, TypeError, ["q is a list"]),
    ({"chunk_size": 0}, ValueError, ["chunk_size is 0", ">= 1"]),
    ({"chunk_size": 2.0}, TypeError, ["chunk_size is 2.0 (float)"]),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_BOTH + BAD_WINDOW)
def test_bad_input_of_window_scores_is_named(
    options: dict[str, Any], error: type[Exception], message: list[str]
) -> None:
    with pytest.raises(error) as raised:
        ops.window_scores(**{"q_win": WINDOW, "k": K, **options})
    assert all(part in str(raised.value) for part in message), str(raised.value)


@pytest.mark.parametrize(("options", "error", "message"), BAD_BOTH + BAD_CHUNKS)
def test_bad_input_of_non_causal_chunks_is_named(
    options: dict[str, Any], error: type[Exception], message: list[str]
) -> None:
    with pytest.raises(error) as raised:
        ops.non_causal_chunks(**{"q": Q, "k": K, **options})
    assert all(part in str(raised.value) for part in message), str(raised.value)


@pytest.mark.parametrize("padded", [False, True])
def test_the_ops_pass_opcheck(padded: bool) -> None:
    q, k = draw(2, 4, 2, 9, 9, 8, torch.float32)
    bounds = torch.tensor([[0, 7], [3, 9]]) if padded else None
    torch.library.opcheck(torch.ops.condense_core.window_scores.default, (q[:, :, :3], k, 0.3, 3, bounds))
    torch.library.opcheck(torch.ops.condense_core.non_causal_chunks.default, (q, k, 4, 0.3, bounds))


@pytest.mark.parametrize("padded", [False, True])
def test_the_ops_are_traced_without_a_break(padded: bool) -> None:
    q, k = draw(2, 4, 2, 9, 9, 8, torch.float32)
    bounds = torch.tensor([[0, 7], [3, 9]]) if padded else None

    def scores(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        window = ops.window_scores(q[:, :, :3], 2 * k, kernel_size=3, bounds=bounds)
        return window + 1, ops.non_causal_chunks(q, 2 * k, chunk_size=4, bounds=bounds) + 1

    compiled = torch.compile(scores, fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(q, k), scores(q, k), strict=True):
        assert torch.equal(actual, expected)
