"""Scores of cached tokens that need no queries: the specification against slower ones, bad input, torch.library."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from condense_core import ops
from condense_core.ops import reference

# The oracles below are written token by token in fp64; the specification gets the same fp64 input, so that what is left
# is the order of summation.
TOLERANCES = {"rtol": 1e-12, "atol": 1e-12}
# And in fp32 from 16-bit input, over sums of at most some hundred terms.
TOLERANCES_FP32 = {"rtol": 1e-5, "atol": 1e-6}

INF = float("inf")
OPS = ["key_norm", "key_similarity", "lag_scores", "value_projection_norm"]


def tensors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(2, shape[-1], generator=generator)
    k, v = (row + torch.randn(*shape, generator=generator) for row in offset)
    return k.to(dtype), v.to(dtype)


def real_tokens(bounds: list[list[int]] | None, b: int, tokens: int) -> range:
    start, stop = (0, tokens) if bounds is None else (min(max(end, 0), tokens) for end in bounds[b])
    return range(start, stop)


def fill(
    k: Tensor, bounds: list[list[int]] | None, score: Callable[[list[list[float]]], list[float]], *more: Tensor
) -> Tensor:
    """`[B, G, N]`: `score` of the real tokens of every sequence and head, as lists; -inf elsewhere."""
    batch, heads, tokens, _ = k.shape
    out = torch.full((batch, heads, tokens), -INF, dtype=torch.float64)
    for b in range(batch):
        real = real_tokens(bounds, b, tokens)
        for g in range(heads):
            rows = [[x[b, g, i].tolist() for i in real] for x in (k, *more)]
            for i, value in zip(real, score(*rows), strict=True):
                out[b, g, i] = value
    return out


def forced(scores: list[float], sink: int, window: int) -> list[float]:
    return [INF if i < sink or i >= len(scores) - window else s for i, s in enumerate(scores)]


def norm(x: list[float]) -> float:
    return math.sqrt(math.fsum(c * c for c in x))


def slow_key_similarity(k: list[list[float]]) -> list[float]:
    mean = [math.fsum(x[c] / max(norm(x), 1e-12) for x in k) / len(k) for c in range(len(k[0]))] if k else []
    return [
        -math.fsum(a * m for a, m in zip(x, mean, strict=True)) / (max(norm(x), 1e-8) * max(norm(mean), 1e-8))
        for x in k
    ]


def slow_information(own: list[list[float]], following: list[list[float]]) -> list[float]:
    low, high = ([f(x[c] for x in following) for c in range(len(own[0]))] for f in (min, max))
    spread = []
    for x in own:
        z = [(x[c] - low[c]) / (high[c] - low[c]) if high[c] > low[c] else 0.0 for c in range(len(x))]
        mean = math.fsum(z) / len(z)
        spread.append(math.sqrt(math.fsum((c - mean) ** 2 for c in z) / (len(z) - 1)))
    total = math.fsum(math.exp(s) for s in spread)
    return [math.exp(s) / total for s in spread]


def slow_lag_scores(k: list[list[float]], v: list[list[float]], lag: int, sink: int) -> list[float]:
    n = len(k)
    if n < sink + 2 * lag:
        return [INF if i < sink else (i - sink) / (n - sink) for i in range(n)]
    scores = [INF] * n
    for first in range(sink, n - 2 * lag + 1, lag):
        infos = [slow_information(x[first : first + lag], x[first + lag : first + 2 * lag]) for x in (k, v)]
        info = [sum(pair) / 2 for pair in zip(*infos, strict=True)]
        for i in range(lag):
            below = sum(info[j] < info[i] or (info[j] == info[i] and j > i) for j in range(lag))
            scores[first + i] = below / lag
    return scores


BOUNDS = [None, [[0, 21], [5, 27]], [[4, 4], [9, 2]], [[-3, 11], [26, 90]]]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(("sink", "window"), [(0, 0), (2, 3), (40, 0)])
def test_key_norm_and_similarity_equal_a_walk_token_by_token(
    bounds: list[list[int]] | None, sink: int, window: int
) -> None:
    k, _ = tensors(2, 2, 27, 5)
    k[0, 0, 7] = 0.0
    k[0, 1, 8] *= 1e-9
    on_device = None if bounds is None else torch.tensor(bounds)
    expected = fill(k, bounds, lambda rows: forced([-norm(x) for x in rows], sink, window))
    torch.testing.assert_close(reference.key_norm(k, sink, window, on_device), expected, **TOLERANCES)
    expected = fill(k, bounds, lambda rows: forced(slow_key_similarity(rows), sink, window))
    torch.testing.assert_close(reference.key_similarity(k, sink, window, on_device), expected, **TOLERANCES)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(("lag", "sink"), [(4, 2), (5, 0), (1, 1), (13, 1), (14, 0), (3, 40)])
def test_lag_scores_equal_a_walk_token_by_token(bounds: list[list[int]] | None, lag: int, sink: int) -> None:
    k, v = tensors(2, 2, 27, 5)
    k[0, :, 9] = k[0, :, 7]  # tokens that tie
    v[0, :, 9] = v[0, :, 7]
    k[:, 0, 4:20, 2] = 0.5  # a channel without range
    on_device = None if bounds is None else torch.tensor(bounds)
    expected = fill(k, bounds, lambda k, v: slow_lag_scores(k, v, lag, sink), v)
    torch.testing.assert_close(reference.lag_scores(k, v, lag, sink, on_device), expected, **TOLERANCES)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("group", [1, 3])
def test_value_projection_norm_is_the_norm_of_what_a_head_adds(bounds: list[list[int]] | None, group: int) -> None:
    v, _ = tensors(2, 2, 27, 5)
    w_o, _ = tensors(11, 2 * group * 5, seed=1)
    expected = torch.full((2, 2, 27), -INF, dtype=torch.float64)
    for b in range(2):
        for i in real_tokens(bounds, b, 27):
            for h in range(2 * group):
                heads = torch.zeros(2 * group, 5, dtype=torch.float64)  # an attention output that holds head h alone
                heads[h] = v[b, h // group, i]
                added = (w_o @ heads.flatten()).abs().sum() / group
                expected[b, h // group, i] = added if h % group == 0 else expected[b, h // group, i] + added
    on_device = None if bounds is None else torch.tensor(bounds)
    torch.testing.assert_close(reference.value_projection_norm(v, w_o, on_device), expected, **TOLERANCES)


def test_lag_scores_of_a_worked_example() -> None:
    """Chunks of two after one sink; the second token of the first chunk spreads further beyond [0, 1] x [0, 1]."""
    k = torch.tensor([[9.0, 9.0], [0.0, 1.0], [0.0, 5.0], [0.0, 1.0], [1.0, 0.0], [3.0, 3.0]]).view(1, 1, 6, 2)
    assert ops.lag_scores(k, k, lag_size=2, sink=1).tolist() == [[[INF, 0.0, 0.5, INF, INF, INF]]]
    assert ops.lag_scores(k[:, :, :4], k[:, :, :4], lag_size=2, sink=1).flatten().tolist() == pytest.approx(
        [INF, 0.0, 1 / 3, 2 / 3]
    )


def test_lag_scores_of_numbers_that_no_range_measures() -> None:
    k, v = tensors(1, 1, 24, 4, dtype=torch.float32)
    k[0, 0, 2, 1] = float("nan")
    scores = ops.lag_scores(k, v, lag_size=8, sink=0)[0, 0, :8]
    others = [i for i in range(8) if i != 2]
    k_rows, v_rows = k[0, 0].tolist(), v[0, 0].tolist()
    k_info = slow_information([k_rows[i] for i in others], k_rows[8:16])  # the softmax of the keys is over seven tokens
    v_info = slow_information(v_rows[:8], v_rows[8:16])
    info = [k_score + v_info[i] for i, k_score in zip(others, k_info, strict=True)]
    assert scores[2] == 0.0
    assert scores[others].argsort().tolist() == torch.tensor(info).argsort().tolist()
    one_channel = torch.randn(1, 1, 12, 1)
    assert ops.lag_scores(one_channel, one_channel, lag_size=4, sink=0)[0, 0, :4].tolist() == [0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    k, _ = tensors(1, 2, 30, 16, dtype=dtype)
    w_o, _ = tensors(20, 64, seed=1, dtype=dtype)
    for actual, expected in [
        (ops.key_norm(k), reference.key_norm(k.double())),
        (ops.key_similarity(k), reference.key_similarity(k.double())),
        (ops.value_projection_norm(k, w_o), reference.value_projection_norm(k.double(), w_o.double())),
    ]:
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected.float(), **TOLERANCES_FP32)


def call(op: str, k: Tensor, **options: Any) -> Tensor:
    """The public op on k, with values and a projection that fit."""
    if op == "lag_scores":
        return ops.lag_scores(k, options.pop("v", k), **{"lag_size": 4, "sink": 1, **options})
    if op == "value_projection_norm":
        w_o = torch.ones(6, 2 * k.shape[-3] * k.shape[-1], dtype=k.dtype)
        return ops.value_projection_norm(k, options.pop("w_o", w_o), **options)
    function: Callable[..., Tensor] = getattr(ops, op)
    return function(k, **options)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens_no_scores(op: str) -> None:
    scores = call(op, torch.zeros(2, 3, 0, 4), bounds=torch.zeros(2, 2, dtype=torch.int64))
    assert scores.shape == (2, 3, 0)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("op", OPS)
def test_padding_is_not_read(op: str) -> None:
    k, _ = tensors(2, 2, 27, 4, dtype=torch.float32)
    bounds = torch.tensor([[0, 21], [5, 27]])
    clean = call(op, k, bounds=bounds)
    k[0, :, 21:], k[1, :, :5] = float("nan"), float("inf")
    assert torch.equal(call(op, k, bounds=bounds), clean)
    assert (clean[0, :, 21:] == -INF).all()
    assert (clean[1, :, :5] == -INF).all()


def test_more_sinks_than_tokens_are_all_tokens() -> None:
    k, v = tensors(1, 1, 5, 4, dtype=torch.float32)
    for scores in (
        ops.key_norm(k, sink=10**30),
        ops.key_similarity(k, window=10**30),
        ops.lag_scores(k, v, sink=10**30),
    ):
        assert (scores == INF).all()
    assert torch.equal(ops.lag_scores(k, v, lag_size=10**30, sink=1), ops.lag_scores(k, v, lag_size=5, sink=1))


K = torch.zeros(2, 2, 9, 4)
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *((op, {"k": K[0]}, ValueError, r"has shape \[2, 9, 4\], expected \[B, G, N, D\]") for op in OPS),
    *((op, {"k": K.double()}, TypeError, "has dtype torch.float64") for op in OPS),
    *((op, {"k": K.tolist()}, TypeError, "is a list, expected a torch.Tensor") for op in OPS[:3]),
    *((op, {"bounds": [[0, 1]] * 2}, TypeError, "bounds is a list") for op in OPS),
    *((op, {"bounds": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, r"bounds has shape \[3, 2\]") for op in OPS),
    *((op, {"bounds": torch.zeros(2, 2)}, TypeError, "bounds has dtype torch.float32") for op in OPS),
    *((op, {"sink": -1}, ValueError, "sink is -1, expected an int >= 0") for op in OPS[:3]),
    *((op, {"sink": 1.0}, TypeError, r"sink is 1.0 \(float\)") for op in OPS[:3]),
    *((op, {"window": True}, TypeError, r"window is True \(bool\)") for op in OPS[:2]),
    ("lag_scores", {"lag_size": 0}, ValueError, "lag_size is 0, expected an int >= 1"),
    ("lag_scores", {"v": K[:, :1]}, ValueError, r"v has shape \[2, 1, 9, 4\], expected \[2, 2, 9, 4\]"),
    ("lag_scores", {"v": K.half()}, TypeError, "v has dtype torch.float16, expected torch.float32, as k has"),
    (
        "value_projection_norm",
        {"w_o": torch.zeros(6, 12)},
        ValueError,
        r"w_o has shape \[6, 12\].*D = 4 and H a multiple of v's 2",
    ),
    ("value_projection_norm", {"w_o": torch.zeros(6, 0)}, ValueError, r"w_o has shape \[6, 0\]"),
    ("value_projection_norm", {"w_o": torch.zeros(0, 8)}, ValueError, r"w_o has shape \[0, 8\]"),
    ("value_projection_norm", {"w_o": torch.zeros(16)}, ValueError, r"w_o has shape \[16\]"),
    (
        "value_projection_norm",
        {"w_o": torch.zeros(6, 16).half()},
        TypeError,
        "w_o has dtype torch.float16, expected torch.float32",
    ),
    (
        "value_projection_norm",
        {"w_o": torch.zeros(6, 16, device="meta")},
        ValueError,
        "w_o is on meta, expected cpu, where v is",
    ),
    ("value_projection_norm", {"w_o": torch.zeros(6, 16).to_sparse()}, TypeError, "w_o has layout torch.sparse_coo"),
    ("value_projection_norm", {"w_o": None}, TypeError, "w_o is a NoneType, expected a torch.Tensor"),
]


@pytest.mark.parametrize(
    ("op", "options", "error", "message"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_input_is_named(op: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"k": K, **options}
    with pytest.raises(error, match=message):
        call(op, arguments.pop("k"), **arguments)


@pytest.mark.parametrize("padded", [False, True])
def test_the_ops_pass_opcheck(padded: bool) -> None:
    k, v = tensors(2, 2, 27, 8, dtype=torch.float32)
    bounds = torch.tensor([[0, 21], [5, 27]]) if padded else None
    namespace = torch.ops.condense_core
    torch.library.opcheck(namespace.key_norm.default, (k, 2, 3, bounds))
    torch.library.opcheck(namespace.key_similarity.default, (k, 2, 3, bounds))
    torch.library.opcheck(namespace.lag_scores.default, (k, v, 4, 2, bounds))
    torch.library.opcheck(namespace.value_projection_norm.default, (v, torch.randn(6, 32), bounds))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_ops_are_traced_without_a_break(op: str, padded: bool) -> None:
    k, _ = tensors(2, 2, 27, 4, dtype=torch.float32)
    bounds = torch.tensor([[0, 21], [5, 27]]) if padded else None
    compiled = torch.compile(lambda k: call(op, 2 * k, bounds=bounds) + 1, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(k), call(op, 2 * k, bounds=bounds) + 1, rtol=0, atol=0)
